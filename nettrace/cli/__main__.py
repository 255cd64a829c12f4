"""`python -m nettrace.cli`."""

import sys

from nettrace.cli import main

if __name__ == "__main__":
    sys.exit(main())
