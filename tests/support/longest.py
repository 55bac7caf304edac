"""The order in which files of tests begin."""

# Files that take longest begin first, so that processes which share the files end at about the same time. No two that
# start Ray stand side by side.
LONG = (
    "scheduling/test_runs.py", "zoo/test_zoo_compress.py", "machine/test_other_cpus.py", "project/test_docs.py",
    "execution/test_workers.py", "compression/test_settle.py", "zoo/test_zoo_generation.py",
    "machine/test_half_precision.py", "zoo/test_zoo_gradients.py", "formats/test_checkpoints.py",
)  # fmt: skip
