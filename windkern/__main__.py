"""`python -m windkern`."""

import sys

from windkern.commands.cli import main

sys.exit(main())
