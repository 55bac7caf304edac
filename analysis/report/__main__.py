"""`python -m analysis.report`."""

import sys

from .page import main

sys.exit(main())
