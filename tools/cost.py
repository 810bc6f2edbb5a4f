"""The script of `octvideo cost`: the same options, and --help lists them."""

import sys

from octvideo.commands.main import run

if __name__ == "__main__":
    sys.exit(run("cost"))
