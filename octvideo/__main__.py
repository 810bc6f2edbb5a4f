"""`python -m octvideo` is the `octvideo` command."""

import sys

from octvideo.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
