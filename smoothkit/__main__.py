"""`python -m smoothkit`."""

import sys

from smoothkit.cli import main

sys.exit(main())
