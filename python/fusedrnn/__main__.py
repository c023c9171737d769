"""`python -m fusedrnn`: see _cli.py."""

import sys

from fusedrnn._cli import main

if __name__ == "__main__":
    sys.exit(main())
