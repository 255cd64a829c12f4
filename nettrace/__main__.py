"""`python -m nettrace`."""

import sys

from nettrace.cli import main

sys.exit(main())
