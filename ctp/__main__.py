"""`python -m ctp`: the command `ctp`, where it is not on the path."""

import sys

from ctp.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
