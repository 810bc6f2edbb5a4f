"""The motions data set: made videos of eight movements, which no single frame tells apart."""

from __future__ import annotations

import json
import multiprocessing
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track

from octvideo.errors import UserError

CLASSES = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink")
SIZE = 72  # pixels
FRAMES = 40
FPS = 24
LEAST_RADIUS, RADIUS_RANGE = 13.0, 2.2  # pixels; the largest is 2.2 times the least
SPEED = {"move": (1.2, 2.4), "turn": (7.0, 12.0), "scale": (0.04, 0.08)}  # pixels, degrees, log radius; each a frame


def movement(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """The path of a sprite, as FRAMES rows of (x, y, angle, radius) in pixels and radians.

    Each of the four starts anywhere on a circle of values (positions leave on one side and come back on the other,
    a radius that has grown to the largest goes on from the least), and the class decides which one changes, and in
    which direction. So in every class each frame alone shows a sprite anywhere, at any angle and size.

    Args:
        name: one of CLASSES.
        rng: source of the start and the speed.
    """
    quantity, direction = {
        "left": (0, -1),
        "right": (0, 1),
        "up": (1, -1),
        "down": (1, 1),
        "clockwise": (2, 1),
        "counter-clockwise": (2, -1),
        "grow": (3, 1),
        "shrink": (3, -1),
    }[name]
    periods = np.array([SIZE, SIZE, 2 * np.pi, np.log(RADIUS_RANGE)])
    path = np.tile(rng.random(4) * periods, (FRAMES, 1))
    speed = rng.uniform(*SPEED[("move", "move", "turn", "scale")[quantity]])
    speed = np.radians(speed) if quantity == 2 else speed
    path[:, quantity] += direction * speed * np.arange(FRAMES)
    path %= periods
    path[:, 3] = LEAST_RADIUS * np.exp(path[:, 3])
    return path


def draw(path: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws a textured disc that follows a path over a textured background.

    Args:
        path: rows of (x, y, angle, radius); y points down and the angle turns clockwise, as on a screen.
        rng: source of the textures.

    Returns:
        RGB frames (len(path), SIZE, SIZE, 3).
    """
    background = _texture(SIZE, 6, rng) // 3 + 85  # paler than the sprite
    sprite = _texture(64, 5, rng)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    frames = np.empty((len(path), SIZE, SIZE, 3), np.uint8)
    for frame, (left, top, angle, radius) in zip(frames, path, strict=True):
        dx = (x - left + SIZE / 2) % SIZE - SIZE / 2  # the picture's edges are joined
        dy = (y - top + SIZE / 2) % SIZE - SIZE / 2
        u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
        v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
        inside = u**2 + v**2 < 1
        frame[:] = background
        frame[inside] = sprite[((v[inside] + 1) * 32).astype(int), ((u[inside] + 1) * 32).astype(int)]
    return frames


def _texture(size: int, cells: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth random picture (size, size, 3) with about `cells` blobs a side."""
    coarse = torch.from_numpy(rng.random((1, 3, cells, cells)))
    fine = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    return (fine[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()


def write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Writes RGB frames (T, H, W, 3) as an h264 mp4 file, byte for byte the same for the same frames."""
    # Without asm=0 x264's output depends on what it encoded before.
    encoding: dict[str, Any] = {
        "crf": "18",
        "preset": "ultrafast",
        "threads": "1",
        "g": "12",
        "x264-params": "asm=0",
    }
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = encoding
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def _make_video(job: tuple[Path, str, tuple[int, ...]]) -> None:
    path, name, seed = job
    rng = np.random.default_rng(seed)
    write_video(path, draw(movement(name, rng), rng), FPS)


def make_data_set(folder: Path, num_train: int = 480, num_val: int = 160, seed: int = 0) -> None:
    """Writes videos, their lists train.csv and val.csv, and labels.txt; does nothing if they are there already.

    Args:
        folder: where to; made if missing. The lists name paths that start from it.
        num_train: training videos, in turn of each class.
        num_val: validation videos.
        seed: the same seed gives the same files.

    Raises:
        ValueError: fewer than one video of each class.
    """
    if min(num_train, num_val) < len(CLASSES):
        raise UserError(f"each split needs at least {len(CLASSES)} videos, got {num_train} and {num_val}")
    settings = {"num_train": num_train, "num_val": num_val, "seed": seed}
    done = folder / "motions.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{folder} is complete: {num_train} training and {num_val} validation videos")
        return
    done.unlink(missing_ok=True)
    jobs, lists = [], {}
    for split, (part, count) in enumerate((("train", num_train), ("val", num_val))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        names = [CLASSES[index % len(CLASSES)] for index in range(count)]
        files = [f"{part}/{name}_{index:05d}.mp4" for index, name in enumerate(names)]
        jobs += [
            (folder / file, name, (seed, split, index))
            for index, (file, name) in enumerate(zip(files, names, strict=True))
        ]
        lists[part] = "".join(f"{file} {CLASSES.index(name)}\n" for file, name in zip(files, names, strict=True))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        list(track(pool.imap_unordered(_make_video, jobs, 8), "making videos", len(jobs)))
    for part, lines in lists.items():
        (folder / f"{part}.csv").write_text(lines)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    done.write_text(json.dumps(settings))
