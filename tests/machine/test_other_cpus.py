"""Numeric tests once more with the kernels of a CPU that has AVX2 and no more: what they ask for holds on every CPU.

The libraries choose kernels when they are loaded, so this is one process of its own, this file run as a program.
"""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CHOSEN = (
    "tests/compression/test_solver.py",
    "tests/compression/test_walk.py::test_each_block_sees_the_compressed_ones_before_it",
    "tests/compression/test_walk.py::test_the_result_does_not_depend_on_the_batch_size",
    "tests/compression/test_walk.py::test_bfloat16_models_compress_in_their_dtype",
    "tests/formats/test_checkpoints.py::test_half_precision_exports",
    "tests/formats/test_checkpoints.py::test_checkpoints_of_the_real_libraries_give_their_weights_and_logits",
    "tests/machine/test_half_precision.py",
    "tests/architectures/test_head.py",
    "tests/learning/test_objective.py",
    "tests/formats/test_pack.py",
    "tests/formats/test_packed_linear.py",
    "tests/evaluation/test_perplexity.py",
    "tests/prompts/test_prefix.py",
    "tests/learning/test_soft_prompt.py",
    "tests/learning/test_soft_prompt_run.py::test_an_interrupted_run_resumes_to_the_same_bytes",
    "tests/learning/test_soft_prompt_run.py::test_runs_of_different_precision_follow_each_other_in_one_process",
    "tests/models/test_tiny_models.py::test_revision_and_logits_are_pinned",
)


def test_numeric_tests_hold_on_a_cpu_with_avx2_alone():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"AVX2 is x86's, and this is {platform.machine()}")
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        pytest.skip("this CPU has no more than AVX2: the other tests are this one")
    kept = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}  # plugins and options of the outer run
    env = {**kept, **AVX2, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kernels"] == "AVX2"
    assert told["passed"].keys() == set(CHOSEN)  # a name that is there no more, or is skipped, is no test


class Passed(Counter[str]):
    """A plugin of pytest: how many tests of each choice have passed."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            name = report.nodeid.split("[")[0]
            self.update(c for c in CHOSEN if c in (name, name.split("::")[0]))


if __name__ == "__main__":
    passed = Passed()
    code = pytest.main(["-p", "no:cacheprovider", *CHOSEN], plugins=[passed])
    print(json.dumps({"kernels": torch.backends.cpu.get_cpu_capability(), "passed": passed}))
    sys.exit(code)
