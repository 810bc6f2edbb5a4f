"""The motions data set: made videos of eight movements, which no single frame tells apart."""

import json
from pathlib import Path

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
LEAST_RADIUS, RADIUS_RANGE = 13.0, 2.2  # pixels; the largest is 2.2 times the least


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


def write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Writes RGB frames (T, H, W, 3) as an h264 mp4 file, byte for byte the same for the same frames."""
    # Without asm=0 x264's output depends on what it encoded before.
    encoding = {"crf": "18", "preset": "ultrafast", "threads": "1", "g": "12", "x264-params": "asm=0"}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=encoding)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def make_data_set(folder: Path, num_train: int = 480, num_val: int = 160, seed: int = 0) -> None:
    """Writes videos, their lists train.csv and val.csv, and labels.txt; does nothing if they are there already.

    The lists name paths that start from the folder. Classes take turns; the same seed gives the same files.
    """
    if min(num_train, num_val) < len(CLASSES):
        raise UserError(f"each split needs at least {len(CLASSES)} videos, got {num_train} and {num_val}")
    settings, done = {"num_train": num_train, "num_val": num_val, "seed": seed}, folder / "motions.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{folder} is complete: {num_train} training and {num_val} validation videos")
        return
    done.unlink(missing_ok=True)
    texts = {}
    for split, (part, count) in enumerate((("train", num_train), ("val", num_val))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in track(range(count), f"making {part} videos"):
            label, rng = index % len(CLASSES), np.random.default_rng((seed, split, index))
            file = f"{part}/{CLASSES[label]}_{index:05d}.mp4"
            write_video(folder / file, draw(movement(CLASSES[label], rng), rng), FPS)
            lines.append(f"{file} {label}\n")
        texts[f"{part}.csv"] = "".join(lines)
    for name, text in (texts | {"labels.txt": "\n".join([*CLASSES, ""]), done.name: json.dumps(settings)}).items():
        with appearing(folder / name) as partial:
            partial.write_text(text)
