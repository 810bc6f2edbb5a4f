"""The script of `octvideo runs`: the same options, and --help lists them."""

import sys

from octvideo.commands.main import run

if __name__ == "__main__":
    sys.exit(run("runs"))
