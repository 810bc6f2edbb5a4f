"""Predicts live video with a checkpoint of octvideo train.

octvideo predict SOURCE --stream --ckpt CHECKPOINT [--every SECONDS] [--json FILE|-] [--save-video DIR]

A source is the number of a camera, such as 0; an address of rtsp://, http://, udp:// and the like; - for standard
input; or a file or named pipe. A file, at an address too, is read at its own pace, as if a camera showed it, and ends.

Each step scores one clip, the centre of the newest frames, and prints a line. A network that is too slow for --every
takes the newest frames whenever it is done: what it had no time for is dropped and counted, never queued. A camera or
an address that is lost, or silent for --silence seconds, is tried again and again for --reconnect seconds, and the next
clip has no frame from before.

--json   a line for each step: {"time" (UTC), "seconds" (of the clip's newest frame, from the stream's first),
         "timestamp" (the same by the source's clock, or null), "predictions": [{"label", "class", "probability"}],
         "latency_seconds" (from the arrival of that frame to its label), "received", "dropped" (frames so far),
         "reconnects"}, with --budget also "alpha" and "network_seconds" (that it took). Lines are added to a file that
         exists; - is standard output, and the lines for readers go to standard error then
--save-video   writes all frames, with the most likely class along the lower edge, to files of --segment seconds that
         are named by the time at which they start, such as DIR/20261128T083039.123Z.mp4

Ctrl-C and SIGTERM end a stream; a second one does not wait for the step at hand. The last line sums it up.

Exit status: 0 if the stream ended or was ended; 1 if it was lost for good; 2 for a mistake in the command, a source
that could not be read from the start, or results that cannot be written; 130 after a second Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from octvideo.commands.options import (
    COMPILE,
    Parser,
    add_budget,
    check_budget,
    checkpoint,
    device_of,
    fail,
    local_path,
    number,
    one_line_errors,
    positive,
)
from octvideo.errors import DecodeError
from octvideo.evaluation.drawing import clock
from octvideo.evaluation.prediction import Predictor
from octvideo.evaluation.streaming import Segments, Step, Stream
from octvideo.models.checkpoint import load_trained
from octvideo.models.compilation import compile_network

KEPT_LATENCIES = 100_000  # of the last steps, for the summary


def file_or_output(text: str) -> Path | str:
    return text if text == "-" else local_path(text)


def as_json(step: Step, top: int) -> str:
    names = ("label", "class", "probability")
    record: dict[str, Any] = {"time": step.time.isoformat(timespec="milliseconds"), "seconds": round(step.seconds, 3)}
    record["timestamp"] = step.stamp_seconds and round(step.stamp_seconds, 3)
    record["predictions"] = [dict(zip(names, best, strict=True)) for best in step.top(top)]
    record |= {"latency_seconds": round(step.latency_seconds, 4), "received": step.received, "dropped": step.dropped}
    record["reconnects"] = step.reconnects
    if step.alpha is not None and step.network_seconds is not None:
        record |= {"alpha": step.alpha, "network_seconds": round(step.network_seconds, 4)}
    return json.dumps(record)


def as_line(step: Step, top: int) -> str:
    best = ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in step.top(top))
    alpha = "" if step.alpha is None else f", alpha {step.alpha:g}"
    return f"{clock(step.seconds):>8}  {best}  ({1000 * step.latency_seconds:.0f} ms{alpha})"


@contextlib.contextmanager
def ended_by_signals(stream: Stream) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the stream after the step at hand; a second one interrupts that."""

    def end(*_: object) -> None:
        stream.stop()
        for name in before:
            signal.signal(name, signal.default_int_handler)

    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name in before:
            signal.signal(name, end)
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def follow(arguments: argparse.Namespace, written: IO[str] | None, said: IO[str]) -> int:
    device, trained = device_of(arguments.device), load_trained(arguments.ckpt, arguments.alpha)
    compile_network(trained.network, arguments.compile)
    segments = None if arguments.save_video is None else Segments(arguments.save_video, arguments.segment)
    limits = {"every_seconds": arguments.every, "reconnect_seconds": arguments.reconnect}
    limits |= {"silence_seconds": arguments.silence, "see": segments and segments.see}
    stream = Stream(arguments.source, Predictor(trained, device=device, budget_ms=arguments.budget), **limits)
    steps, lost, latencies = 0, None, deque[float](maxlen=KEPT_LATENCIES)
    timer = threading.Timer(arguments.seconds or 0, stream.stop)
    with ended_by_signals(stream):
        try:
            if arguments.seconds is not None:
                timer.start()
            for step in stream:
                steps, best = steps + 1, step.top(1)[0]
                latencies.append(step.latency_seconds)
                if segments is not None:
                    segments.label, segments.probability = best.label, best.probability
                print(as_line(step, arguments.top), file=said, flush=True)
                if written is not None:
                    print(as_json(step, arguments.top), file=written, flush=True)
        except DecodeError as error:
            if not stream.live.frames_decoded:
                raise
            lost = error
        finally:
            timer.cancel()
            if segments is not None:
                segments.close()
    live, times = stream.live, np.array(latencies) * 1000
    how = f", latency {np.median(times):.0f} ms, 95 % within {np.percentile(times, 95):.0f} ms" if steps else ""
    frames = f"{live.received} frames received, {live.dropped} dropped, {live.reconnects} reconnects"
    print(f"{steps} steps in {live.seconds:.1f} s of the stream, {frames}{how}", file=said, flush=True)
    if lost is not None:
        print(f"error: {lost}", file=sys.stderr)
    return int(lost is not None)


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="number of a camera, address, - or file")
    add("--stream", action="store_true", required=True, help="predict live video")
    add("--ckpt", type=checkpoint, required=True, help="checkpoint of octvideo train, or a published network")
    add("--alpha", type=float, help="alpha of res2 to res4; default: the checkpoint's")
    add_budget(parser)
    add("--device", help="such as cpu, cuda or cuda:1; default: cuda if available, else cpu")
    add("--compile", choices=("blocks", "true"), help=COMPILE)
    add("--every", metavar="SECONDS", type=positive, default=1.0, help="from one step to the next; default: 1")
    add("--top", metavar="K", type=number, default=5, help="most likely classes to show; default: 5")
    add("--json", metavar="FILE", type=file_or_output, help="file for a record of each step, or -")
    add("--save-video", metavar="DIR", type=Path, help="folder for what the stream showed, with its classes")
    add("--segment", metavar="SECONDS", type=positive, default=60.0, help="length of those files; default: 60")
    add("--seconds", metavar="SECONDS", type=positive, help="end after this time; default: never")
    add("--reconnect", metavar="SECONDS", type=positive, default=300.0, help="how long to try; default: 300")
    add("--silence", metavar="SECONDS", type=positive, default=5.0, help="until an address is lost; default: 5")
    arguments, others = parser.parse_known_args(words)
    if others:
        fail(f"--stream takes one source and no {' '.join(others)}; see octvideo predict --stream --help")
    check_budget(arguments)
    return arguments


def main(words: list[str]) -> int:
    arguments = parse(words)
    with contextlib.ExitStack() as stack, one_line_errors():
        written = sys.stdout if arguments.json == "-" else None
        if isinstance(arguments.json, Path):
            if os.path.realpath(arguments.json) == os.path.realpath(arguments.source):
                fail(f"--json {arguments.json}: that is the source")
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            written = stack.enter_context(arguments.json.open("a"))
        try:
            return follow(arguments, written, sys.stderr if arguments.json == "-" else sys.stdout)
        except KeyboardInterrupt:
            return 130
    return 2
