"""Makes videos to train on: the quickstart's eight movements, or 24 classes that are hard to tell apart.

octvideo motions [FOLDER] [--level easy|hard] [--num-train N] [--num-val N] [--seed SEED] [--num-workers N]

easy   8 classes of 72 x 72 pixels, 480 and 160 videos in a few seconds
hard   24 classes of 80 x 80 pixels, 2880 and 960 videos, several minutes: python -m pip install 'octvideo[motions]'
"""

from pathlib import Path

from octvideo.commands.options import Parser, number, one_line_errors
from octvideo.data.motions import LEVELS, make_data_set

COUNTS = {"easy": (480, 160), "hard": (2880, 960)}


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("data/motions"), help="folder to write; default: data/motions")
    add("--level", choices=LEVELS, default="easy", help="default: easy")
    add("--num-train", type=number, help="training videos; default: 480, or 2880 hard ones")
    add("--num-val", type=number, help="validation videos; default: 160, or 960 hard ones")
    add("--seed", type=int, default=0, help="the same seed makes the same files; default: 0")
    add("--num-workers", type=number, default=1, help="processes; default: 1")
    options = parser.parse_args(words)
    num_train, num_val = COUNTS[options.level]
    counts = options.num_train or num_train, options.num_val or num_val
    with one_line_errors():
        make_data_set(options.folder, *counts, options.seed, options.level, options.num_workers)
    return 0
