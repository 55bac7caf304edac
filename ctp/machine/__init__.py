"""The machine and this process: what it is, how fast it computes, its memory, threads, signals and versions.

record        what a timing depends on: processor, threads, GPUs
arithmetic    number types, and how fast the CPU computes in them
device        which device work runs on
memory        memory that runs out
threads       threads and heap of this process
random        random streams named by their use
process       whether the process behind an MLflow run still runs
signals       how a signal stops a run
contained     methods that end their process
triton        whether Triton runs on this GPU
triton_trial  the kernel that it tries
versions      the commit and package versions
"""
