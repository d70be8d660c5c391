"""`python -m windkern`."""

import sys

from windkern.cli import main

sys.exit(main())
