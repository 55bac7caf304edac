"""The machine and this process: what it is, how it computes, what it has."""
