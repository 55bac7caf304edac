"""`python -m analysis.report`."""

import sys

from analysis.report.page import main

sys.exit(main())
