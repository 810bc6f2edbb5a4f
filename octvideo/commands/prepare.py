"""Checks, re-encodes, lists and indexes the videos of a data set. Killed or stopped, the same command continues.

python tools/prepare_data.py SOURCE [SOURCE ...] --videos DIR --output DIR [--reencode SHORT_SIDE] [--workers N]
                             [--labels FILE] [--timeout SECONDS]

A SOURCE is one of
  a folder per class       DIR/<class>/<video>, or DIR/{train,val,test}/<class>/<video>
  a list file              lines of 'path label' or 'path,label', the label a number (names in labels.txt beside it) or
                           a name; kinetics_val_list.txt is of the split val, by a word in its name, and one without
                           such a word of train; or a folder with train.csv, val.csv, test.csv
  Kinetics' annotations    CSV or JSON; the videos are <id>_<start, 6 digits>_<end, 6 digits>.* anywhere below --videos
  ActivityNet's JSON       the videos are v_<id>.* or <id>.* anywhere below --videos

OUTPUT gets train.csv, val.csv, test.csv and labels.txt to train with, index.bin, report.csv with a line for every video
of the sources (its status is ok, bad, missing or duplicate; its numbers are those of the source file), and, with
--reencode, videos/.

Exit status: 0 if all files were worked on, whatever came out; 1 if the machine or this program failed on some (disk
full, permission denied, an unexpected error), which the next run tries again, or cannot write the results; 2 for a
mistake in the command; 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from octvideo.commands.options import Parser, fail
from octvideo.data.preparation.prepare import SPLITS, Outcome, prepare
from octvideo.data.preparation.sources import Catalogue, read_sources
from octvideo.errors import ListError, PreparationError

STATUSES = ("ok", "bad", "missing", "duplicate")
SECONDS_A_LINE = 10.0  # between two lines where there is no terminal


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("sources", metavar="SOURCE", nargs="+", type=Path, help="folder or file that names the videos")
    parser.add_argument("--videos", type=Path, help="folder of the videos; default: the SOURCE, if it is one folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--reencode", metavar="SHORT_SIDE", type=int, help="pixels, such as 256 or 320")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="files at once; default: CPU cores")
    parser.add_argument("--labels", type=Path, help="file with the name of a class on each line, class 0 first")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a decoder may hang; default: 60")
    arguments = parser.parse_args(words)
    if arguments.videos is None:
        if len(arguments.sources) != 1 or not arguments.sources[0].is_dir():
            fail("--videos DIR is needed, the folder of the videos, unless SOURCE is one folder")
        arguments.videos = arguments.sources[0]
    return arguments


class Display:
    """How far the work is: a bar in a terminal, elsewhere a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files, {task.fields[counts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._counts: Counter[str] = Counter()
        self._started = self._printed = time.monotonic()
        self._before = 0  # files that an earlier run has done

    def show(self, stage: str, done: int, total: int, status: str | None) -> None:
        """Shows that files are done; see octvideo.data.preparation.prepare.prepare."""
        if status is not None:
            self._counts[status] += 1
        counts = f"{self._counts['ok']} ok, {self._counts['bad']} bad"
        if stage not in self._tasks:
            self._tasks[stage] = self.bar.add_task(stage, total=total, completed=done, counts=counts)
            self._started, self._before = time.monotonic(), done
            if status is None and done:
                self.console.print(f"{done} of {total} files are known from an earlier run", highlight=False)
        self.bar.update(self._tasks[stage], completed=done, counts=counts)
        now = time.monotonic()
        if not self.console.is_terminal and now > self._printed + SECONDS_A_LINE and done > self._before:
            left = (now - self._started) / (done - self._before) * (total - done)
            self.console.print(f"{stage} {done}/{total} files, {counts}, {left / 60:.0f} min left", highlight=False)
            self._printed = now


def print_summary(
    console: Console, catalogue: Catalogue, outcomes: Sequence[Outcome], arguments: argparse.Namespace
) -> None:
    """Prints how many videos there are of each status and split, and how to train with them."""
    counts = Counter((outcome.entry.split, outcome.status) for outcome in outcomes)
    table = Table("split", *STATUSES, "all", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for split in (*SPLITS, "all"):
        row = [
            sum(number for (of, is_), number in counts.items() if split in (of, "all") and is_ == status)
            for status in STATUSES
        ]
        if any(row):
            table.add_row(split, *map(str, row), str(sum(row)))
    console.print(table)
    unlabelled = sum(outcome.status == "ok" and outcome.entry.label is None for outcome in outcomes)
    if unlabelled:
        console.print(f"{unlabelled} videos have no label: they are in index.bin and in no list", highlight=False)
    output: Path = arguments.output
    root = arguments.videos if arguments.reencode is None else output / "videos"
    options = [f"--data.{split}_list={output / f'{split}.csv'}" for split in SPLITS]
    options = [option for option, split in zip(options, SPLITS, strict=True) if (output / f"{split}.csv").exists()]
    if options:
        options += [f"--data.root={root}", f"--data.labels={output / 'labels.txt'}"]
        options += [f"--model.num_classes={len(catalogue.class_names)}"]
        print("train with  " + " ".join(map(shlex.quote, options)))
    print(f"report in   {output / 'report.csv'}")


def main(words: list[str]) -> int:
    """Runs the tool; returns its exit status."""
    arguments = read_arguments(words)
    console = Console()
    display = Display(console)
    try:
        catalogue = read_sources(arguments.sources, arguments.videos, labels=arguments.labels, output=arguments.output)
        console.print(f"{len(catalogue.entries)} videos, {len(catalogue.class_names)} classes", highlight=False)
        with display.bar:
            outcomes = prepare(
                catalogue,
                arguments.videos,
                arguments.output,
                short_side=arguments.reencode,
                workers=arguments.workers,
                timeout_seconds=arguments.timeout,
                progress=display.show,
            )
    except (ListError, PreparationError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or arguments.output}: {error.strerror}; the same command continues", 1)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # decoders may be at work; they end with this process
    print_summary(console, catalogue, outcomes, arguments)
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in Counter(one.reason for one in failed).items())
        fail(f"{len(failed)} files failed for reasons that are not theirs ({reasons}): the same command tries again", 1)
    return 0
