"""`python -m ladimo`."""

import sys

from ladimo.cli import main

sys.exit(main())
