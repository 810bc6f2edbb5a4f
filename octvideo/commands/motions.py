"""Makes the quickstart's data set: videos of eight movements that no single frame can tell apart.

octvideo motions [FOLDER] [--num-train N] [--num-val N] [--seed SEED]
"""

from pathlib import Path

from octvideo.commands.options import Parser, number, one_line_errors
from octvideo.data.motions import make_data_set


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("data/motions"), help="folder to write; default: data/motions")
    add("--num-train", type=number, default=480, help="training videos; default: 480")
    add("--num-val", type=number, default=160, help="validation videos; default: 160")
    add("--seed", type=int, default=0, help="the same seed makes the same files; default: 0")
    options = parser.parse_args(words)
    with one_line_errors():
        make_data_set(options.folder, options.num_train, options.num_val, options.seed)
    return 0
