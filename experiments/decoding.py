"""Measures how fast videos become clips: each decoding backend and sampling protocol, beside pytorchvideo and FFmpeg.

python experiments/decoding.py LIST --json FILE [--root DIR --backends pyav,torchcodec --protocols slowfast ...]

LIST is a list file, with a line 'path class' for each video. Everything runs in one thread; times are CPU seconds, so
clips per second are those of one core, and other programs disturb little. The sources are interleaved, pass by pass
over the videos, and the fastest of several rounds counts for each pass.

Sources: octvideo decodes, scales and crops training clips of --crop-size; "10 x 3 views" is a whole multi-view test of
a video from one pass of decoding, and "10 x 3 views, separate" the same with each view read by itself (a clip is a view
there). pytorchvideo is its LabeledVideoDataset: the frames of the same windows, neither scaled nor cropped, without
sound. ffmpeg is the program with -threads 1, which decodes the spans of the slowfast clips and discards the frames,
without its start-up time: the limit for a decoder that skips nothing.

Rows of FILE, a JSON list: source, backend, protocol, clips_per_second, frames_decoded_per_clip. For decoders that do
not report what they decoded, that is the number of frames from the key frame before a clip to its last frame.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from choices import one_of
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from octvideo.commands.options import Parser, fail, number, several
from octvideo.data.clips import Draw, TestViews, TrainingClips, cut
from octvideo.data.decoding import Decoding, clips_of
from octvideo.data.lists import VideoList, read_list
from octvideo.data.multigrid import ClipShape
from octvideo.data.reader import Backend
from octvideo.data.sampling import PROTOCOLS, Sampling, even_crops
from octvideo.data.stream import ANY_METADATA
from octvideo.data.video import READERS, Video
from octvideo.errors import DecodeError, ListError
from octvideo.files import appearing

TEST_CLIPS, TEST_CROPS = 10, 3
SEED = 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("list", type=Path, metavar="LIST", help="list file, with a line 'path class' for each video")
    add("--json", type=Path, metavar="FILE", help="where to write the rows")
    add("--root", metavar="DIR", help="folder that the paths start from; default: the list's own")
    add("--separator", default=" ", help="what stands between path and class (default: a space)")
    backends, protocols = several(one_of(READERS, "backend")), several(one_of(PROTOCOLS, "protocol"))
    add("--backends", type=backends, default=",".join(READERS), help="decoders (default: all installed)")
    add("--protocols", type=protocols, default=",".join(PROTOCOLS), help="sampling protocols (default: %(default)s)")
    add("--clip-frames", type=number, default=8, help="frames in a clip (default: 8)")
    add("--frame-stride", type=number, default=8, help="length of a clip's window for each frame (default: 8)")
    add("--target-fps", type=float, default=30, help="rate at which windows are counted (default: 30)")
    add("--crop-size", type=number, default=224, help="height and width of clips (default: 224)")
    add("--short-side", type=int, nargs=2, default=(256, 320), help="of frames before the crop (default: 256 320)")
    add("--passes", type=number, default=8, help="clips of each video (default: 8)")
    add("--rounds", type=number, default=3, help="times that each pass is measured; the fastest counts (default: 3)")
    add("--max-videos", type=number, default=20, help="take at most so many videos, evenly from the list (default: 20)")
    options = parser.parse_args(words)
    if not options.crop_size <= options.short_side[0] <= options.short_side[1]:
        fail(f"--short-side must be two sizes from --crop-size {options.crop_size} upwards, the smaller first")
    if options.target_fps <= 0:
        fail(f"--target-fps must be positive, got {options.target_fps}")
    if options.json is not None and not options.json.parent.is_dir():
        fail(f"--json {options.json}: no such folder")
    return options


@dataclass
class Task:
    """One way of making clips."""

    source: str  # octvideo, pytorchvideo or ffmpeg
    backend: str
    protocol: str
    read: Callable[[int], Any]  # makes the clips of a pass over the videos
    clips: int  # in a pass
    decoded: Callable[[int], float]  # frames decoded for a pass
    start_seconds: float = 0.0  # CPU time of a pass that does not go into decoding
    seconds: dict[int, float] = field(default_factory=dict)

    def measure(self, number: int) -> None:
        """Times one pass, and keeps the shortest time of each."""
        start = cpu_seconds()
        self.read(number)
        self.seconds[number] = min(self.seconds.get(number, np.inf), cpu_seconds() - start - self.start_seconds)

    def row(self) -> dict[str, Any]:
        """The task's row of FILE."""
        clips = self.clips * len(self.seconds)
        return {
            "source": self.source,
            "backend": self.backend,
            "protocol": self.protocol,
            "clips_per_second": clips / max(1e-9, sum(self.seconds.values())),
            "frames_decoded_per_clip": sum(self.decoded(number) for number in self.seconds) / clips,
        }


def cpu_seconds() -> float:
    """CPU time of this process and of child processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Timeline:
    """The timestamps of a video's frames and key frames, read from its packets."""

    def __init__(self, path: str) -> None:
        with av.open(path, **ANY_METADATA) as container:
            stream = container.streams.best("video")
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            seconds = np.array([float((packet.pts or 0) * packet.time_base) for packet in packets])
            keys = np.array([packet.is_keyframe for packet in packets], dtype=bool)
        self.frames = np.sort(seconds) - seconds.min()
        self.keys = np.sort(seconds[keys]) - seconds.min()

    def span(self, first_seconds: float, last_seconds: float) -> int:
        """The number of frames from the key frame before one timestamp to the frame shown at another."""
        before = self.keys[self.keys <= first_seconds + 1e-3]
        start = before[-1] if len(before) else 0.0
        return int(((self.frames >= start - 1e-6) & (self.frames <= last_seconds + 1e-3)).sum())


class Videos:
    """The videos to measure, and the timestamps of their training clips."""

    def __init__(self, videos: VideoList, options: argparse.Namespace) -> None:
        self.list = videos
        self.options = options
        self.facts = []
        for path in videos.paths:
            with Video(path) as video:
                self.facts.append((video.num_frames, video.fps))
        self.timelines = [Timeline(path) for path in videos.paths]

    def __len__(self) -> int:
        return len(self.list.paths)

    def sampling(self, protocol: Any) -> Sampling:
        """A protocol with the sizes of the command line."""
        return Sampling(self.options.clip_frames, self.options.frame_stride, protocol, self.options.target_fps)

    def position(self, number: int, video: int) -> int:
        """The position in an epoch of a video in a pass."""
        return number * len(self) + video

    def times(self, protocol: str, number: int, video: int) -> NDArray[np.float64]:
        """The timestamps of the frames of a video's training clip in a pass."""
        rng = np.random.default_rng((SEED, 0, self.position(number, video), 0))
        frames, fps = self.facts[video]
        return np.sort((self.sampling(protocol).train_clips(frames, fps, 1, rng).ravel() + 0.5) / fps)

    def spans(self, protocol: str, number: int) -> int:
        """Frames from key frames to the last frames of a pass's training clips."""
        times = [self.times(protocol, number, video) for video in range(len(self))]
        return sum(
            timeline.span(seconds[0], seconds[-1]) for timeline, seconds in zip(self.timelines, times, strict=True)
        )


def readable(videos: VideoList, backends: Sequence[Backend], console: Console) -> VideoList:
    """The videos that every backend can read to the end; prints the others."""
    good = []
    for index, path in enumerate(videos.paths):
        try:
            for backend in backends:
                with Video(path, backend) as video:
                    video.frames_at([0, video.duration_seconds])
            Timeline(path)
            good.append(index)
        except (DecodeError, av.error.FFmpegError, ValueError) as error:
            console.print(f"left out: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return chosen(videos, good)


def chosen(videos: VideoList, indices: Any) -> VideoList:
    """Some videos of a list."""
    return VideoList([videos.paths[index] for index in indices], videos.labels[indices])


def octvideo_training(videos: Videos, backend: Any, protocol: str) -> Task:
    """Training clips as `octvideo.data.clips` makes them."""
    options = videos.options
    decoding = Decoding(videos.list, videos.sampling(protocol), backend)
    least, most = options.short_side
    shape = ClipShape(options.clip_frames, options.frame_stride, options.crop_size, (least, most))
    clips = TrainingClips(decoding, shape, mirror=True, seed=SEED)

    def decoded(number: int) -> float:
        total = 0
        for index, path in enumerate(videos.list.paths):
            with Video(path, backend) as video:
                video.frames_at(videos.times(protocol, number, index))
                if video.frames_decoded is None:
                    return videos.spans(protocol, number)
                total += video.frames_decoded
        return total

    def read(number: int) -> None:
        for video in range(len(videos)):
            clips[Draw(0, videos.position(number, video), video)]

    return Task("octvideo", backend, protocol, read, len(videos), decoded)


def octvideo_views(videos: Videos, backend: Any, protocol: str, separate: bool) -> Task:
    """All views of each video, from one pass of decoding or each read by itself."""
    size = videos.options.short_side[0]
    sampling = videos.sampling(protocol)
    views = TestViews(
        Decoding(videos.list, sampling, backend),
        **{"crop_size": size, "short_side": size, "num_clips": TEST_CLIPS, "num_crops": TEST_CROPS},
    )
    frames: list[int | None] = []

    def read(number: int) -> None:
        frames.clear()
        for index, path in enumerate(videos.list.paths):
            if not separate:
                views[Draw(0, 0, index)]
                continue
            for view in range(TEST_CLIPS * TEST_CROPS):
                with Video(path, backend) as video:
                    numbers = sampling.dense_clips(video.num_frames, video.fps, TEST_CLIPS)
                    (clip,) = clips_of(video, numbers[view // TEST_CROPS][None], size)
                    height, width, _ = clip[0].shape
                    crops = even_crops(height, width, size, TEST_CROPS)
                    np.ascontiguousarray(cut(clip, crops[view % TEST_CROPS], size))
                    frames.append(video.frames_decoded)

    def decoded(number: int) -> float:
        if separate and None not in frames:
            return sum(count for count in frames if count is not None)
        total = 0.0
        for index, path in enumerate(videos.list.paths):
            with Video(path, backend) as video:
                dense = sampling.dense_clips(video.num_frames, video.fps, TEST_CLIPS)
                times = ((dense + 0.5) / video.fps).astype(np.float64)
                video.frames_at(times.ravel())
                timeline = videos.timelines[index]
                if separate:
                    total += TEST_CROPS * sum(timeline.span(clip.min(), clip.max()) for clip in times)
                elif video.frames_decoded is None:
                    total += timeline.span(times.min(), times.max())
                else:
                    total += video.frames_decoded
        return total

    name = f"{TEST_CLIPS} x {TEST_CROPS} views{', separate' if separate else ''}"
    return Task("octvideo", backend, f"{protocol}, {name}", read, len(videos) * TEST_CLIPS * TEST_CROPS, decoded)


def pytorchvideo_clips(videos: Videos, backend: str) -> Task:
    """The same windows from pytorchvideo's data set, with all of their frames."""
    from pytorchvideo.data import LabeledVideoDataset
    from pytorchvideo.data.clip_sampling import ClipInfo, ClipSampler

    starts: list[float] = []

    class SameWindows(ClipSampler):  # type: ignore[misc]  # pytorchvideo has no types
        def __call__(self, last_end: Any, duration: Any, annotation: Any) -> ClipInfo:
            start = starts.pop(0)
            return ClipInfo(start, start + self._clip_duration, 0, 0, True)

    options = videos.options
    seconds = options.clip_frames * options.frame_stride / options.target_fps
    data = LabeledVideoDataset(
        [(path, {}) for path in videos.list.paths],
        SameWindows(seconds),
        video_sampler=torch.utils.data.SequentialSampler,
        decode_audio=False,
        decoder=backend,
    )

    def read(number: int) -> None:
        starts[:] = [videos.times("pytorchvideo", number, video)[0] for video in range(len(videos))]
        count = sum(1 for _ in data)
        if count != len(videos):
            raise DecodeError("pytorchvideo", f"gave {count} clips of {len(videos)} videos")

    return Task("pytorchvideo", backend, "pytorchvideo", read, len(videos), partial(videos.spans, "pytorchvideo"))


def ffmpeg_spans(videos: Videos) -> Task:
    """The spans of the slowfast clips, decoded by the ffmpeg program, which discards the frames."""

    def run(path: str, *options: str) -> None:
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", *options[:2], "-i", path]
        command += [*options[2:], "-map", "0:V:0", "-an", "-f", "null", "-"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    def read(number: int) -> None:
        for video, path in enumerate(videos.list.paths):
            seconds = videos.times("slowfast", number, video)
            length = seconds[-1] - seconds[0] + 1 / videos.facts[video][1]
            run(path, "-ss", f"{seconds[0]:.4f}", "-t", f"{length:.4f}")

    def start() -> float:
        begin = cpu_seconds()
        for path in videos.list.paths:
            run(path, "-ss", "0", "-frames:v", "1")
        return cpu_seconds() - begin

    starts = min(start() for _ in range(3))
    return Task("ffmpeg", "ffmpeg", "slowfast", read, len(videos), partial(videos.spans, "slowfast"), starts)


def plan(videos: Videos, backends: Sequence[str], console: Console) -> list[Task]:
    """All ways of making clips that can be measured here."""
    options = videos.options
    tasks = [octvideo_training(videos, backend, protocol) for backend in backends for protocol in options.protocols]
    tasks += [octvideo_views(videos, backend, options.protocols[0], separate=False) for backend in backends]
    tasks += [octvideo_views(videos, backends[0], options.protocols[0], separate=True)]
    for backend in ("pyav", "decord"):
        task = pytorchvideo_clips(videos, backend)
        try:
            task.read(0)
            tasks.append(task)
        except Exception as error:  # another project, which is only compared with, may raise anything
            reason = str(error).strip().split("\n")[0]
            console.print(f"pytorchvideo with {backend} cannot be measured: {type(error).__name__}: {reason}")
    if shutil.which("ffmpeg"):
        tasks.append(ffmpeg_spans(videos))
    else:
        console.print("ffmpeg is not installed and not measured (apt-get install ffmpeg)")
    return tasks


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints rows."""
    table = Table("source", "backend", "protocol")
    table.add_column("clips / s", justify="right")
    table.add_column("frames decoded\na clip", justify="right")
    for row in rows:
        names = (row[key] for key in ("source", "backend", "protocol"))
        table.add_row(*names, *(f"{row[key]:.1f}" for key in ("clips_per_second", "frames_decoded_per_clip")))
    console.print(table)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the experiment."""
    options = parse(words)
    console = Console(highlight=False)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        root = options.root if options.root is not None else options.list.parent
        videos = read_list(options.list, root=root, separator=options.separator)
    except ListError as error:
        fail(str(error))
    number_of = min(options.max_videos, len(videos.paths))
    videos = chosen(videos, np.linspace(0, len(videos.paths) - 1, number_of).round().astype(int))
    backends = []
    for backend in options.backends:
        try:
            Video(videos.paths[0], backend).close()
        except DecodeError:
            pass
        except ValueError as error:
            console.print(f"{error}", markup=False, soft_wrap=True)
            continue
        backends.append(backend)
    videos = readable(videos, backends, console)
    if not backends or not videos.paths:
        fail("nothing to measure: no video that every backend can read")
    tasks = plan(Videos(videos, options), backends, console)
    with Progress(console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("measuring", total=options.rounds * options.passes * len(tasks))
        for _ in range(options.rounds):
            for number in range(options.passes):
                for task in tasks:
                    if number == 0 or "views" not in task.protocol:  # every pass reads the same views
                        task.measure(number)
                    progress.update(bar, advance=1, refresh=True)
    rows = [task.row() for task in tasks]
    print(f"{len(videos.paths)} videos, {options.passes} clips of each, best of {options.rounds} rounds")
    print_table(rows, console)
    if options.json:
        with appearing(options.json) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
