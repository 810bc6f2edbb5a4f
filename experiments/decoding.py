"""Measures how fast videos become clips: each decoding backend and sampling protocol, beside pytorchvideo and FFmpeg.

python experiments/decoding.py LIST --json FILE [--root DIR --backends pyav,torchcodec --protocols slowfast ...]

LIST is a list file, with a line 'path class' for each video. Everything runs in one thread; times are CPU seconds, so
clips a second are those of one core, and other programs disturb little. The sources take turns, pass by pass over the
videos, and of several rounds the fastest counts for each pass.

Sources: octvideo decodes, scales and crops training clips of --crop-size; "10 x 3 views" is a whole multi-view test of
a video from one pass of decoding, and "10 x 3 views, separate" the same with each view read by itself (their clips are
views). pytorchvideo is its LabeledVideoDataset: the frames of the same windows, neither scaled nor cropped, without
sound. ffmpeg is the program with -threads 1, which decodes the spans of the slowfast clips to nothing, without the time
of its start: what a decoder that leaves nothing out can reach.

Rows of FILE, a JSON list: source, backend, protocol, clips_per_second, frames_decoded_per_clip. For decoders that do
not tell what they decoded, that is the number of frames from the key frame before a clip to its last frame.
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
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from octvideo.commands.options import Parser, fail
from octvideo.data.clips import Decoding, Draw, TestViews, TrainingClips, clips_of, cut
from octvideo.data.lists import VideoList, read_list
from octvideo.data.multigrid import ClipShape
from octvideo.data.sampling import PROTOCOLS, Sampling, even_crops
from octvideo.data.video import READERS, Video
from octvideo.errors import DecodeError, ListError

TEST_CLIPS, TEST_CROPS = 10, 3
SEED = 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("list", type=Path, metavar="LIST", help="list file, with a line 'path class' for each video")
    add("--json", type=Path, metavar="FILE", help="where to write the rows")
    add("--root", metavar="DIR", help="folder that the paths start from; default: the list's own")
    add("--separator", default=" ", help="what stands between path and class (default: a space)")
    add("--backends", default=",".join(READERS), help="decoders, with commas between them (default: all installed)")
    add("--protocols", default=",".join(PROTOCOLS), help="sampling protocols (default: %(default)s)")
    add("--clip-frames", type=int, default=8, help="frames in a clip (default: 8)")
    add("--frame-stride", type=int, default=8, help="length of a clip's window for each frame (default: 8)")
    add("--target-fps", type=float, default=30, help="rate that windows are counted at (default: 30)")
    add("--crop-size", type=int, default=224, help="height and width of clips (default: 224)")
    add("--short-side", type=int, nargs=2, default=(256, 320), help="of frames before the crop (default: 256 320)")
    add("--passes", type=int, default=8, help="clips of each video (default: 8)")
    add("--rounds", type=int, default=3, help="times that each pass is measured; the fastest counts (default: 3)")
    add("--max-videos", type=int, default=20, help="take no more videos than these, evenly from the list (default: 20)")
    options = parser.parse_args(arguments)
    options.backends = options.backends.split(",")
    options.protocols = options.protocols.split(",")
    for name, known in (("backends", READERS), ("protocols", PROTOCOLS)):
        for value in getattr(options, name):
            if value not in known:
                fail(f"--{name}: no {value!r}; there are {', '.join(known)}")
    for name in ("clip_frames", "frame_stride", "crop_size", "passes", "rounds", "max_videos"):
        if getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not options.crop_size <= options.short_side[0] <= options.short_side[1]:
        fail(f"--short-side must be two sizes from --crop-size {options.crop_size} upwards, the smaller first")
    if options.target_fps <= 0:
        fail(f"--target-fps must be positive, got {options.target_fps}")
    if options.json is not None and not options.json.parent.is_dir():
        fail(f"--json {options.json}: no such folder")
    return options


@dataclass
class Task:
    """One way of making clips.

    Args:
        source: octvideo, pytorchvideo or ffmpeg.
        backend: what decodes.
        protocol: which clips.
        read: makes the clips of one pass over the videos.
        clips: how many these are.
        decoded: frames decoded for a pass.
        start_seconds: CPU time of a pass that is none of the decoding.
    """

    source: str
    backend: str
    protocol: str
    read: Callable[[int], Any]
    clips: int
    decoded: Callable[[int], float]
    start_seconds: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)

    def measure(self, number: int) -> None:
        """Times one pass, and keeps the shortest time of each."""
        start = cpu_seconds()
        self.read(number)
        self.seconds[number] = min(self.seconds.get(number, np.inf), cpu_seconds() - start - self.start_seconds)

    def row(self) -> dict[str, Any]:
        """What was measured."""
        clips = self.clips * len(self.seconds)
        return {
            "source": self.source,
            "backend": self.backend,
            "protocol": self.protocol,
            "clips_per_second": clips / max(1e-9, sum(self.seconds.values())),
            "frames_decoded_per_clip": sum(self.decoded(number) for number in self.seconds) / clips,
        }


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Timeline:
    """When the frames of a video are shown, read from its packets.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            packets = [packet for packet in container.demux(stream) if packet.size and packet.pts is not None]
            seconds = np.array([float(packet.pts * packet.time_base) for packet in packets])
            keys = np.array([packet.is_keyframe for packet in packets], dtype=bool)
        self.frames = np.sort(seconds) - seconds.min()
        self.keys = np.sort(seconds[keys]) - seconds.min()

    def span(self, first_seconds: float, last_seconds: float) -> int:
        """Frames from the key frame before one moment to the one shown at another."""
        before = self.keys[self.keys <= first_seconds + 1e-3]
        start = before[-1] if len(before) else 0.0
        return int(((self.frames >= start - 1e-6) & (self.frames <= last_seconds + 1e-3)).sum())


class Videos:
    """The videos that are measured, and where their training clips lie.

    Args:
        videos: the list.
        options: of the command line.
    """

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
        """Which turn of an epoch a video has in a pass."""
        return number * len(self) + video

    def times(self, protocol: str, number: int, video: int) -> NDArray[np.float64]:
        """The moments of the frames of the training clip that a pass takes of a video."""
        rng = np.random.default_rng((SEED, 0, self.position(number, video), 0))
        frames, fps = self.facts[video]
        return np.sort((self.sampling(protocol).train_clips(frames, fps, 1, rng).ravel() + 0.5) / fps)

    def spans(self, protocol: str, number: int) -> int:
        """Frames from key frames to the last frames of a pass's training clips."""
        times = [self.times(protocol, number, video) for video in range(len(self))]
        return sum(
            timeline.span(moments[0], moments[-1]) for timeline, moments in zip(self.timelines, times, strict=True)
        )


def readable(videos: VideoList, backends: Sequence[str], console: Console) -> VideoList:
    """The videos that every backend can read to their end; the others are named."""
    good = []
    for place, path in enumerate(videos.paths):
        try:
            for backend in backends:
                with Video(path, backend) as video:  # type: ignore[arg-type]
                    video.frames_at([0, video.duration_seconds])
            Timeline(path)
            good.append(place)
        except (DecodeError, av.error.FFmpegError, ValueError) as error:
            console.print(f"left out: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return VideoList([videos.paths[place] for place in good], videos.labels[good])


def octvideo_training(videos: Videos, backend: Any, protocol: str) -> Task:
    """Training clips as `octvideo.data.clips` makes them."""
    options = videos.options
    decoding = Decoding(videos.list, videos.sampling(protocol), backend)
    least, most = options.short_side
    shape = ClipShape(options.clip_frames, options.frame_stride, options.crop_size, (least, most))
    clips = TrainingClips(decoding, shape, mirror=True, seed=SEED)

    def decoded(number: int) -> float:
        frames = []
        for index, path in enumerate(videos.list.paths):
            with Video(path, backend) as video:
                video.frames_at(videos.times(protocol, number, index))
                frames.append(video.frames_decoded)
        return videos.spans(protocol, number) if None in frames else sum(frames)

    def read(number: int) -> None:
        for video in range(len(videos)):
            clips[Draw(0, videos.position(number, video), video)]

    return Task("octvideo", backend, protocol, read, len(videos), decoded)


def octvideo_views(videos: Videos, backend: Any, protocol: str, separate: bool) -> Task:
    """All views of each video, from one pass of decoding or each by itself."""
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
                    crops = even_crops(*clip[0].shape[:2], size, TEST_CROPS)
                    np.ascontiguousarray(cut(clip, crops[view % TEST_CROPS], size))
                    frames.append(video.frames_decoded)

    def decoded(number: int) -> float:
        if separate and None not in frames:
            return sum(count for count in frames if count is not None)
        total = 0.0
        for index, path in enumerate(videos.list.paths):
            with Video(path, backend) as video:
                dense = sampling.dense_clips(video.num_frames, video.fps, TEST_CLIPS)
                times = (dense + 0.5) / video.fps
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
    """The same windows from pytorchvideo's data set, with every frame in them."""
    from pytorchvideo.data import LabeledVideoDataset
    from pytorchvideo.data.clip_sampling import ClipInfo, ClipSampler

    starts: list[float] = []

    class SameWindows(ClipSampler):
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

    return Task(
        "pytorchvideo",
        backend,
        "pytorchvideo",
        read,
        len(videos),
        lambda number: videos.spans("pytorchvideo", number),
    )


def ffmpeg_spans(videos: Videos) -> Task:
    """The spans of the slowfast clips, decoded by the program to nothing."""

    def run(path: str, *options: str) -> None:
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", *options[:2], "-i", path]
        subprocess.run(
            [*command, *options[2:], "-map", "0:V:0", "-an", "-f", "null", "-"],
            check=True,
            stderr=subprocess.DEVNULL,
        )

    def read(number: int) -> None:
        for video, path in enumerate(videos.list.paths):
            moments = videos.times("slowfast", number, video)
            length = moments[-1] - moments[0] + 1 / videos.facts[video][1]
            run(path, "-ss", f"{moments[0]:.4f}", "-t", f"{length:.4f}")

    def start() -> float:
        begin = cpu_seconds()
        for path in videos.list.paths:
            run(path, "-ss", "0", "-frames:v", "1")
        return cpu_seconds() - begin

    starts = min(start() for _ in range(3))
    return Task(
        "ffmpeg", "ffmpeg", "slowfast", read, len(videos), lambda number: videos.spans("slowfast", number), starts
    )


def plan(videos: Videos, backends: Sequence[str], console: Console) -> list[Task]:
    """What is measured."""
    options = videos.options
    tasks = [octvideo_training(videos, backend, protocol) for backend in backends for protocol in options.protocols]
    tasks += [octvideo_views(videos, backend, options.protocols[0], separate=False) for backend in backends]
    tasks += [octvideo_views(videos, backends[0], options.protocols[0], separate=True)]
    for backend in ("pyav", "decord"):
        task = pytorchvideo_clips(videos, backend)
        try:
            task.read(0)
            tasks.append(task)
        except Exception as error:  # whatever it raises: it is another project's, and only compared with
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
        table.add_row(
            row["source"],
            row["backend"],
            row["protocol"],
            f"{row['clips_per_second']:.1f}",
            f"{row['frames_decoded_per_clip']:.1f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures."""
    options = parse(arguments)
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
    chosen = np.linspace(0, len(videos.paths) - 1, min(options.max_videos, len(videos.paths))).round().astype(int)
    videos = VideoList([videos.paths[place] for place in chosen], videos.labels[chosen])
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
        unfinished = options.json.with_name(f"{options.json.name}.{os.getpid()}.unfinished")
        unfinished.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(unfinished, options.json)


if __name__ == "__main__":
    main()
