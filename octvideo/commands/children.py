"""Trainings and tests that a command runs as child processes, each in a folder of its own."""

import contextlib
import fcntl
import json
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from octvideo.commands.options import Parser, config_file, fail, one_line_errors
from octvideo.files import appearing

COMMAND = [sys.executable, "-P", "-m", "octvideo"]  # -P: not what the current folder names octvideo or random
LOOK_SECONDS = 5.0  # between two looks at a run that is watched


class RunFailedError(Exception):
    """A run without a result; the message says why, `status` is the exit status of its process."""

    def __init__(self, reason: str, status: int = 1) -> None:
        super().__init__(reason)
        self.status = status


def add_recipe(parser: Parser, required: bool = True) -> None:
    """Adds the options of what is trained, and where."""
    what = "YAML file of the recipe, or the name of an installed one; given again, the later one overrides"
    parser.add_argument("--cfg", "-c", action="append", required=required, metavar="FILE", help=what)
    what = "folder for the runs and the results"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=what)


def read_recipe(parser: Parser, words: list[str], own: Collection[str], cure: str) -> Namespace:
    """The command line; `others` are options that the parser lacks, `recipe` all that every run gets.

    Ends the program with `cure` for options in `own`, which differ between the runs.
    """
    arguments, others = parser.parse_known_args(words)
    if others and not others[0].startswith("--"):
        fail(f"unrecognized arguments: {others[0]}")
    for option in set(own).intersection(other.split("=")[0] for other in others):
        fail(f"{cure.format(option)}")
    arguments.cfg = [config_file(name) for name in arguments.cfg or ()]
    arguments.others = others
    arguments.recipe = [f"--cfg={file}" for file in arguments.cfg] + others
    return arguments


def contents(arguments: Namespace) -> dict[str, Any]:
    """What makes a recipe: the contents of its files, and the options."""
    return {"cfg": [yaml.safe_load(Path(name).read_text()) for name in arguments.cfg], "options": arguments.others}


def keep(path: Path, what: dict[str, Any], other: str) -> None:
    """Records what a folder is for; ends the program if it was for something else before, which `other` names."""
    what = json.loads(json.dumps(what, default=str))  # as it is read back
    if not path.is_file():
        with appearing(path) as partial:
            partial.write_text(json.dumps(what, indent=1))
    elif json.loads(path.read_text()) != what:
        fail(f"{path.parent} holds {other} ({path}): choose another --output")


def resolve(tool: str, options: Sequence[str]) -> dict[str, Any]:
    """All options of a command with their values; ends the program for those that it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            call(tool, [*options, "--print_config"], log := Path(folder, "log.txt"))
        except RunFailedError as error:
            fail(str(error).removeprefix(f"octvideo {tool}: error: "))
        return yaml.safe_load(log.read_text())  # type: ignore[no-any-return]


def call(tool: str, options: Sequence[str], log: Path, hopeless: Callable[[], bool] | None = None) -> bool:
    """Runs a command, its output appended to a log; returns whether it came to its end.

    Where `hopeless`, asked every LOOK_SECONDS, is true, the command is stopped by SIGTERM. Waits first for a process
    that still writes to the log, as a killed parent leaves it. Raises RunFailedError with the last line of one that
    fails.
    """
    with log.open("a") as printed, tempfile.TemporaryFile("w+") as errors:
        fcntl.flock(printed, fcntl.LOCK_EX)  # the child inherits it
        process = subprocess.Popen([*COMMAND, tool, *options], stdout=printed, stderr=errors)
        status = None
        try:
            while status is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(LOOK_SECONDS if hopeless else None)
                if status is None and hopeless and hopeless():
                    return False
        finally:
            process.terminate()  # where this was interrupted: the command saves, then ends; one that has ended stays
            process.wait()
            errors.seek(0)
            said = errors.read()
            printed.write(said)
    if status < 0:
        raise RunFailedError(f"{tool} was killed by {signal.Signals(-status).name}", status)
    if status:
        raise RunFailedError([f"{tool} ended with {status}", *said.strip().splitlines()][-1], status)
    return True


class RunProgress(Progress):
    """A progress bar of `total` runs on a terminal; elsewhere a line for each."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=console, disable=not console.file.isatty())
        self.runs = self.add_task("", total=total)

    def begin(self, name: str, more: str = "") -> None:
        """Shows which run is under way; a line that is printed has room for more."""
        self.update(self.runs, description=name)
        if not self.console.file.isatty():
            self.console.print(f"{name} {more}".rstrip(), highlight=False, markup=False, soft_wrap=True)

    def say(self, line: str, failed: bool) -> None:
        """Prints a line that stays."""
        self.print(line, markup=False, style="yellow" if failed else None, highlight=False, soft_wrap=True)


def stoppable(work: Callable[[], int]) -> int:
    """The exit status of work(): 130 on Ctrl-C, 143 on SIGTERM, 2 and one line for a user's mistake."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with one_line_errors():
            return work()
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
