"""The machine and this process: what it is, how fast it computes, its memory, threads, signals and versions."""
