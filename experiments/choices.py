"""The type of an option that takes one of several names."""

import argparse
from collections.abc import Callable, Collection


def one_of(names: Collection[str], what: str) -> Callable[[str], str]:
    """The type of an option for one of several names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; there are {', '.join(names)}")
        return text

    return convert
