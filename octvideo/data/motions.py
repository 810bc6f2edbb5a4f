"""The motions data set: made videos of eight movements, which no single frame tells apart."""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track

from octvideo.errors import UserError
from octvideo.files import appearing

CLASSES = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink")
DIRECTIONS = (-1, 1, -1, 1, 1, -1, 1, -1)  # of the classes: two each for x, y, angle and radius
SPEEDS = ((1.2, 2.4), (1.2, 2.4), (7.0, 12.0), (0.04, 0.08))  # pixels, pixels, degrees, log radius; each a frame
SIZE, FRAMES, FPS = 72, 40, 24  # pixels, frames, frames a second
LEVELS = {"easy": "octvideo.data.motions", "hard": "octvideo.data.hard_motions"}  # modules with CLASSES and make
LEAST_RADIUS, RADIUS_RANGE = 13.0, 2.2  # pixels; the largest is 2.2 times the least


class Film(NamedTuple):
    """RGB frames (T, H, W, 3) of 8 bits, and how they are encoded."""

    frames: NDArray[np.uint8]
    fps: int = FPS
    kilobits: int = 0  # a second, the same for every frame; 0: by quality, with a key frame every half second


def make(label: int, split: int, rng: np.random.Generator) -> Film:
    """A video of a class."""
    return Film(draw(movement(CLASSES[label], rng), rng))


def movement(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """The path of a sprite of a class: FRAMES rows of (x, y, angle, radius) in pixels and radians.

    All four start anywhere in their ranges. The class decides which one changes, in which direction; beyond one end of
    its range it goes on from the other. So each frame alone shows a sprite anywhere, at any angle and size.
    """
    quantity, direction = CLASSES.index(name) // 2, DIRECTIONS[CLASSES.index(name)]
    periods = np.array([SIZE, SIZE, 2 * np.pi, np.log(RADIUS_RANGE)])
    path = np.tile(rng.random(4) * periods, (FRAMES, 1))
    speed = rng.uniform(*SPEEDS[quantity])
    path[:, quantity] += direction * (np.radians(speed) if quantity == 2 else speed) * np.arange(FRAMES)
    path %= periods
    path[:, 3] = LEAST_RADIUS * np.exp(path[:, 3])
    return path


def draw(path: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """RGB frames (len(path), SIZE, SIZE, 3) of a textured disc that follows a path over a textured background.

    Rows of the path are (x, y, angle, radius); y points down and the angle turns clockwise, as on a screen.
    """
    background, sprite = _texture(SIZE, 6, rng) // 3 + 85, _texture(64, 5, rng)  # paler than the sprite
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    frames = np.tile(background, (len(path), 1, 1, 1))
    for frame, (left, top, angle, radius) in zip(frames, path, strict=True):
        dx = (x - left + SIZE / 2) % SIZE - SIZE / 2  # the picture's edges are joined
        dy = (y - top + SIZE / 2) % SIZE - SIZE / 2
        u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
        v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
        inside = u**2 + v**2 < 1
        frame[inside] = sprite[((v[inside] + 1) * 32).astype(int), ((u[inside] + 1) * 32).astype(int)]
    return frames


def _texture(size: int, blobs: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth random picture (size, size, 3) with about this many blobs a side."""
    coarse = torch.from_numpy(rng.random((1, 3, blobs, blobs)))
    fine = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    return (fine[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()


def write_video(path: Path, frames: NDArray[np.uint8], fps: int, kilobits: int = 0) -> None:
    """Writes RGB frames (T, H, W, 3) as an h264 mp4 file, byte for byte the same for the same frames."""
    encoding = {"crf": "18", "g": "12", "preset": "ultrafast", "threads": "1"}
    encoding["x264-params"] = "asm=0"  # or x264's output depends on what it encoded before
    if kilobits:  # packets as long as the first one, whatever they hold
        encoding |= {"b": f"{kilobits}k", "maxrate": f"{kilobits}k", "bufsize": f"{kilobits // 20}k", "g": "1"}
        del encoding["crf"]
        encoding["x264-params"] += ":nal-hrd=cbr"
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=encoding)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def make_file(level: str, path: Path, label: int, split: int, seed: int, index: int) -> None:
    """Writes a video, which depends on nothing else."""
    write_video(path, *import_module(LEVELS[level]).make(label, split, np.random.default_rng((seed, split, index))))


def make_data_set(
    folder: Path, num_train: int = 480, num_val: int = 160, seed: int = 0, level: str = "easy", num_workers: int = 1
) -> None:
    """Writes videos, their lists train.csv and val.csv, and labels.txt; does nothing if they are there already.

    The lists name paths that start from the folder. Classes take turns; the same seed gives the same files, whatever
    the number of processes that make them.
    """
    classes: tuple[str, ...] = import_module(LEVELS[level]).CLASSES
    if min(num_train, num_val) < len(classes):
        raise UserError(f"each split needs at least {len(classes)} videos, got {num_train} and {num_val}")
    settings: dict[str, Any] = {"num_train": num_train, "num_val": num_val, "seed": seed}
    settings |= {"level": level} if level != "easy" else {}
    done = folder / "motions.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{folder} is complete: {num_train} training and {num_val} validation videos")
        return
    done.unlink(missing_ok=True)
    texts, files = {}, []
    for split, (part, count) in enumerate((("train", num_train), ("val", num_val))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            label = index % len(classes)
            file = f"{part}/{re.sub('[^a-z0-9-]+', '_', classes[label])}_{index:05d}.mp4"
            files.append((level, folder / file, label, split, seed, index))
            lines.append(f"{file} {label}\n")
        texts[f"{part}.csv"] = "".join(lines)
    for _ in track(made(files, num_workers), "making videos", len(files), disable=not sys.stdout.isatty()):
        pass
    for name, text in (texts | {"labels.txt": "\n".join([*classes, ""]), done.name: json.dumps(settings)}).items():
        with appearing(folder / name) as partial:
            partial.write_text(text)
    print(f"{folder}: {num_train} training and {num_val} validation videos, train.csv, val.csv and labels.txt")


def made(files: list[tuple[str, Path, int, int, int, int]], num_workers: int) -> Iterator[None]:
    """Makes files in so many processes; one is this process."""
    if num_workers == 1:
        for file in files:
            make_file(*file)
            yield
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,)))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield from pool.map(make_file, *zip(*files, strict=True), chunksize=16)
