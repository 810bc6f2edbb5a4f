"""Checks, re-encodes, lists and indexes the videos of a data set. Killed or stopped, the same command continues.

octvideo prepare SOURCE [SOURCE ...] --videos DIR --output DIR [--reencode SHORT_SIDE] [--shards SIZE] [--workers N]
                 [--labels FILE] [--val-share SHARE] [--whole] [--timeout SECONDS]
                 [--scheduler ADDRESS | --part I/N | --merge]
                                                            (python tools/prepare_data.py is the same)

A SOURCE, like --videos and --output, may be in a store (s3://bucket/raw). It is one of
  a folder per class       DIR/<class>/<video>, or DIR/{train,val,test}/<class>/<video>; a video is a file, or a folder
                           of numbered pictures
  a list file              lines of 'path label' or 'path,label'; a label is a number (names in labels.txt beside the
                           file), several with commas (path 3,17), or a name; with a span of seconds as path#t=START,END
                           or behind the label. The split is a word in the file's name (kinetics_val_list.txt), else
                           train. A folder with train.csv, val.csv or test.csv is read as these lists
  Kinetics' annotations    CSV or JSON; the videos are <id>_<start, 6 digits>_<end, 6 digits>.* anywhere below --videos
  ActivityNet's JSON, Charades' and AVA's CSV, Something-Something's JSON
                           whose segments, actions and timestamps are spans (--whole: each video whole, with all its
                           classes); the videos are v_<id>.* or <id>.* anywhere below --videos

OUTPUT gets train.csv, val.csv, test.csv and labels.txt to train with, index.bin, report.csv with a line for every video
(its status is ok, bad, missing or duplicate; its numbers are those of the source file), and, with --reencode, videos/,
with --shards, shards/: tar files of webdataset's layout, which the lists then name.

Many machines share the work as the workers of a scheduler of dask.distributed, tcp://HOST:PORT; local:N starts N here,
slurm:N so many jobs. Or as N runs with --part 1/N to N/N, and then one with --merge. The results are the same bytes.

Exit status: 0 if all files were processed, whatever their status; 1 if the machine or this program failed on some (disk
full, an unexpected error), which the next run tries again, or cannot write the results; 2 for a mistake in the command;
130 on Ctrl-C.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn
from rich.table import Column, Table

from octvideo.commands.options import Parser, fail, positive
from octvideo.data.preparation.prepare import SPLITS, prepare
from octvideo.data.preparation.sources import hold_out, read_sources
from octvideo.errors import UserError
from octvideo.stores import child, exists, is_uri, real

STATUSES = ("ok", "bad", "missing", "duplicate")
SHOWN = 10  # bad and missing videos, each in a line
SECONDS_A_LINE = 10.0  # between two lines where there is no terminal, and so no bar


class Display:
    def __init__(self, console: Console) -> None:
        self.console, self._printed = console, time.monotonic()
        counts = TextColumn("{task.completed}/{task.total} files, {task.fields[counts]}")
        # A few files an hour are a speed too.
        options: dict[str, Any] = {"disable": not console.file.isatty(), "speed_estimate_period": 3600}
        self.bar = Progress(*Progress.get_default_columns(), counts, console=console, **options)
        self._tasks: dict[str, TaskID] = {}
        self._counts: Counter[str | None] = Counter()

    def show(self, stage: str, done: int, total: int, status: str | None) -> None:
        self._counts[status] += 1
        counts = f"{self._counts['ok']} ok, {self._counts['bad']} bad"
        if stage not in self._tasks:
            self._tasks[stage] = self.bar.add_task(stage, total=total, completed=done, counts=counts)
            if done:
                self.console.print(f"{done} of {total} files are known from an earlier run")
        self.bar.update(self._tasks[stage], completed=done, counts=counts)
        if not self.console.file.isatty() and time.monotonic() > self._printed + SECONDS_A_LINE:
            seconds = self.bar.tasks[self._tasks[stage]].time_remaining
            left = "" if seconds is None else f", {seconds / 60:.0f} min left"
            speed = self.bar.tasks[self._tasks[stage]].speed
            left += "" if not speed else f", {speed:.1f} files/s"
            self.console.print(f"{stage} {done}/{total} files, {counts}{left}")
            self._printed = time.monotonic()


def size(text: str) -> int:
    """The type of an option for a number of bytes."""
    if not (match := re.fullmatch(r"([1-9]\d*)(MB|GB)", text.upper())):
        raise argparse.ArgumentTypeError(f"must be a size such as 256MB or 1GB, got {text!r}")
    return int(match[1]) * {"MB": 10**6, "GB": 10**9}[match[2]]


def below_one(text: str) -> float:
    """The type of an option for a share of something, of which there is also a rest."""
    if (value := positive(text)) >= 1:
        raise argparse.ArgumentTypeError(f"must be below 1, got {text!r}")
    return value


def part(text: str) -> tuple[int, int]:
    """The type of an option for one of several parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 3/8, got {text!r}")
    return int(match[1]), int(match[2])


def main(words: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="folder or file that names the videos, or its URI")
    add("--videos", help="folder of the videos, or its URI; default: the SOURCE, if it is one folder")
    add("--output", required=True, help="folder for the results, or its URI")
    add("--reencode", metavar="SHORT_SIDE", type=int, help="pixels, such as 256 or 320")
    add("--shards", metavar="SIZE", type=size, help="pack the videos into tar files of at most SIZE, such as 256MB")
    add("--workers", type=int, default=os.cpu_count() or 1, help="files processed at once; default: CPU cores")
    add("--labels", help="file with a class name on each line, class 0 first, or JSON of their numbers")
    add(
        "--val-share",
        metavar="SHARE",
        type=below_one,
        help="of each class's training videos, for validation; such as 0.2",
    )
    add("--whole", action="store_true", help="take spans of a video as one entry, with all their classes")
    add("--frames-fps", metavar="FPS", type=positive, default=25.0, help="of folders of frames; default: 25")
    add("--timeout", type=float, default=60.0, help="seconds that a decoder may hang; default: 60")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--scheduler", metavar="ADDRESS", help="of a cluster: tcp://HOST:PORT, local[:N] or slurm[:N]")
    shared.add_argument("--part", metavar="I/N", type=part, help="work on one of N parts, which --merge joins")
    add("--merge", action="store_true", help="join the N parts")
    options = parser.parse_args(words)
    videos, output = options.videos or options.sources[0], options.output.rstrip("/")
    if options.merge and options.part:
        fail("--merge comes after all parts, without --part")
    if options.videos is None and (len(options.sources) != 1 or not (is_uri(videos) or os.path.isdir(videos))):
        if missing := [source for source in options.sources if not is_uri(source) and not os.path.exists(source)]:
            fail(f"{missing[0]}: No such file or directory")
        fail("--videos DIR is needed, the folder of the videos, unless SOURCE is one folder")
    results = {real(file): file for split in SPLITS if is_uri(file := child(output, f"{split}.csv")) or exists(file)}
    for source in options.sources:
        for file in (source, *(child(source, f"{split}.csv") for split in SPLITS)):
            if real(file) in results and exists(file):
                fail(f"{file} would be overwritten by the result of that name: give another --output")
    console = Console(highlight=False)
    display = Display(console)
    try:
        catalogue = read_sources(options.sources, videos, labels=options.labels, output=output, whole=options.whole)
        if options.val_share is not None:
            if any(entry.split == "val" for entry in catalogue.entries):
                fail("--val-share is for sources without validation videos: these have some")
            catalogue = hold_out(catalogue, options.val_share)
        console.print(f"{len(catalogue.entries)} videos, {len(catalogue.class_names)} classes")
        with display.bar:
            how = {"short_side": options.reencode, "workers": options.workers, "timeout_seconds": options.timeout}
            how |= {"scheduler": options.scheduler, "part": options.part, "merge": options.merge}
            how |= {"shard_bytes": options.shards, "frames_fps": options.frames_fps}
            outcomes = prepare(catalogue, videos, output, **how, progress=display.show)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or output}: {error.strerror}; the same command continues", 1)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # decoders may be working; they end with this process
    if options.part:
        print(f"part {options.part[0]} of {options.part[1]} is complete; when all are: the same command with --merge")
        return 0
    table = Table("split", *(Column(name, justify="right") for name in (*STATUSES, "all")), box=box.SIMPLE)
    for split in (*SPLITS, "all"):
        if counts := Counter(outcome.status for outcome in outcomes if split in (outcome.entry.split, "all")):
            table.add_row(split, *(str(counts[status]) for status in STATUSES), str(counts.total()))
    console.print(table)
    spoilt = [outcome for outcome in outcomes if outcome.status in ("bad", "missing")]
    for outcome in spoilt[:SHOWN]:
        console.print(f"{outcome.status}  {outcome.entry.path}: {outcome.reason}", soft_wrap=True, markup=False)
    if len(spoilt) > SHOWN:
        console.print(f"and {len(spoilt) - SHOWN} more, in the report")
    if unlabelled := sum(outcome.status == "ok" and outcome.entry.label is None for outcome in outcomes):
        console.print(f"{unlabelled} videos have no label: they are in index.bin and in no list")
    lists = {f"--data.{split}_list": child(output, f"{split}.csv") for split in SPLITS}
    if training := [f"{option}={path}" for option, path in lists.items() if exists(path)]:
        root = output if options.shards else videos if options.reencode is None else child(output, "videos")
        if not exists(lists["--data.val_list"]):
            training += ["--data.val_list=null"]
            console.print("no video is for validation: --val-share 0.2 would take a fifth of the training videos")
        training += [
            f"--data.root={root}",
            f"--data.labels={child(output, 'labels.txt')}",
            f"--model.num_classes={len(catalogue.class_names)}",
        ]
        print("train with  " + shlex.join(training))
    print(f"report in   {child(output, 'report.csv')}")
    if failures := Counter(outcome.reason for outcome in outcomes if outcome.failed):
        reasons = ", ".join(f"{number} x {reason}" for reason, number in failures.items())
        fail(f"{failures.total()} files failed through no fault of theirs ({reasons}): the same command tries again", 1)
    return 0
