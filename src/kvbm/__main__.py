"""`python -m kvbm`: the command line."""

import sys

from kvbm.cli.main import main

sys.exit(main())
