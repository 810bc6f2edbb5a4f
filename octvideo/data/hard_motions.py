"""The hard motions: made videos of 24 classes, whose textures are photographs.

Two discs with fine stripes move over a photograph, among three with checks, behind an occluder, before a moving
camera, with noise and compression. What is the class depends on the group:

fine    both wander, and the angle of their stripes is the class; in the other groups it is any
wide    one of six ways in which two things can meet; needs a view of both, and of all the time
order   both wander, and one of them flashes, grows and turns, in one of the six orders
speed   one circles, at one of three rates, in one of two directions

Discs with checks flash, grow and turn as well. Photographs are those of scikit-image and scikit-learn:
`pip install 'octvideo[motions]'`.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from octvideo.data.motions import FRAMES, Film
from octvideo.errors import UserError

SIZE, FINER = 80, 2  # pixels, and samples of each in x and in y
MIDDLE = SIZE / 2 * (1 + 1j)
ANGLES = (0, 30, 60, 90, 120, 150)  # degrees
PITCH = 4.0  # of the stripes, in pixels
MEETINGS = ("approach", "separate", "collide", "pass", "overtake", "swap")
EVENTS = ("flash", "grow", "turn")
ORDERS = tuple(permutations(EVENTS))
RATES = {"slow": 1.0, "medium": 1.75, "fast": 3.0}  # rounds in a video
CIRCLES = tuple(product(RATES, ("clockwise", "counter-clockwise")))
CLASSES = (
    *(f"fine: stripes at {angle} degrees" for angle in ANGLES),
    *(f"wide: {meeting}" for meeting in MEETINGS),
    *(f"order: {', '.join(order)}" for order in ORDERS),
    *(f"speed: {rate}, {direction}" for rate, direction in CIRCLES),
)
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "retina", "rocket"),
)
Array = NDArray[Any]
TIME = np.linspace(0, 1, FRAMES)  # of the frames


class Disc(NamedTuple):
    """Something that moves: a row for each frame, in pixels, radians and shares; y points down."""

    picture: Array  # (S, S, 3), from 0 to 1, stretched over the square around it
    center: Array  # complex: x + iy
    radius: Array
    angle: Array
    flash: Array  # from 0 to 1: how white it is


@cache
def sources(split: int) -> list[Array]:
    """The left halves of the photographs, (H, W, 3) from 0 to 1, for split 0, the right ones for split 1."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]
    except ImportError as error:
        cure = "python -m pip install 'octvideo[motions]'"
        raise UserError(f"the hard motions need scikit-image and scikit-learn: {cure} ({error})") from None
    photographs = []
    for image in [*(getattr(skimage.data, name)() for name in PHOTOGRAPHS), *load_sample_images().images]:
        colors = np.atleast_3d(image)[..., :3].astype(np.float32) / 255
        half = colors.shape[1] // 2
        photographs.append(np.broadcast_to(colors[:, half * split : half * (split + 1)], (*colors.shape[:1], half, 3)))
    return photographs


def make(label: int, split: int, rng: np.random.Generator) -> Film:
    """A video of a class."""
    photographs = sources(split)
    discs = scene(label, photographs, rng)
    pan, zoom = rng.uniform(-5, 5) * np.exp(2j * np.pi * rng.random()), rng.uniform(-0.1, 0.1)
    shift, scale = pan * (TIME - 0.5), np.exp(zoom * (TIME - 0.5))
    frames = background(photographs, shift, scale, rng)
    for one in discs:
        center = MIDDLE + scale * (one.center - MIDDLE) + shift
        paint(frames, one._replace(center=center, radius=one.radius * scale))
    if rng.random() < 0.5:
        occlude(frames, photographs, rng)
    rows = frames[:, ::FINER] + frames[:, 1::FINER]
    small = 255 / FINER**2 * (rows[:, :, ::FINER] + rows[:, :, 1::FINER])
    noisy = small + rng.uniform(2, 8) * rng.standard_normal(small.shape, np.float32)
    return Film(noisy.clip(0, 255).round().astype(np.uint8), kilobits=int(rng.integers(110, 171)))


def scene(label: int, photographs: list[Array], rng: np.random.Generator) -> list[Disc]:
    """Three discs with checks, and the two with stripes in front of them, in random order."""
    group, which = divmod(label, 6)
    angle = ANGLES[which] if group == 0 else int(rng.choice(ANGLES))
    pair = [disc(photographs, rng, angle) for _ in range(2)]
    others = [disc(photographs, rng) for _ in range(3)]
    pair[1] = pair[1]._replace(center=apart(pair[0].center, rng))
    # Every third of the video has each event once, on one of three discs: colours over time are those of any class.
    order = ORDERS[which] if group == 2 else ORDERS[rng.integers(6)]
    turns = [order[start:] + order[:start] for start in range(3)]
    if group == 2:
        pair[0], others[0], others[1] = map(happen, (pair[0], *others[:2]), turns)
    else:
        others = list(map(happen, others, turns))
    if group == 1:
        centers = meeting(MEETINGS[which], rng)
        pair = [one._replace(center=center) for one, center in zip(pair, centers, strict=True)]
    elif group == 3:
        rate, direction = CIRCLES[which]
        rounds = RATES[rate] * rng.uniform(0.92, 1.08) * (1 if direction == "clockwise" else -1)
        around = wander(rng, 6) + rng.uniform(9, 14) * np.exp(2j * np.pi * (rng.random() + rounds * TIME))
        pair = [pair[0]._replace(center=around), pair[1]._replace(center=apart(around, rng))]
    return [*others, *(pair[i] for i in rng.permutation(2))]


def disc(photographs: list[Array], rng: np.random.Generator, stripes: int | None = None) -> Disc:
    """One that wanders, with a photograph on it, and stripes at so many degrees, or checks."""
    radius, angle = rng.uniform(8, 10), rng.uniform(-0.1, 0.1)
    picture = crop(photographs, rng, int(rng.integers(16, 64)), 64)
    color = 0.5 + 0.3 * np.cos(2 * np.pi * (rng.random() + np.arange(3) / 3))  # of any hue, alike in brightness
    picture = color + 0.35 * (picture - picture.mean())
    pixels = np.arange(len(picture)) * 2 * radius / len(picture)
    turn = np.radians(rng.uniform(0, 180) if stripes is None else stripes)
    across = np.cos(turn) * pixels + np.sin(turn) * pixels[:, None]
    along = np.cos(turn) * pixels[:, None] - np.sin(turn) * pixels
    bands = [np.sign(np.sin(2 * np.pi * (at / PITCH + rng.random()))) for at in (across, along)]
    picture += 0.3 * (bands[0] * bands[1] if stripes is None else bands[0])[..., None]
    still = np.ones(FRAMES)
    return Disc(picture.clip(0, 1), wander(rng, 24), radius * still, angle * still, 0 * still)


def wander(rng: np.random.Generator, reach: float) -> Array:
    """A path between two points that are at most so many pixels from the middle in x and y, a little bent."""
    begin, end = (rng.uniform(-reach, reach, 2) @ (1, 1j) for _ in range(2))
    bend = rng.uniform(-3, 3) * np.exp(2j * np.pi * rng.random()) * np.sin(np.pi * TIME)
    path: Array = MIDDLE + begin + (end - begin) * TIME + bend
    return path


def apart(path: Array, rng: np.random.Generator) -> Array:
    """Another path, which mostly leaves room for both: where two overlap, less is seen of them, and that could tell."""
    for _ in range(20):
        other = wander(rng, 24)
        if abs(other - path).min() > 18:
            break
    return other


def meeting(name: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Two paths. Whichever way they meet, single frames show two discs at any distance, in any direction."""
    middle, axis = wander(rng, 5), np.exp(2j * np.pi * rng.random())
    far, near, when = rng.uniform(16, 19), rng.uniform(10, 11.5), rng.uniform(0.4, 0.6)
    course = (TIME - when) / max(when, 1 - when)  # within -1 and 1, and 0 when they meet
    side = near * rng.choice((-1j, 1j))
    if name in ("approach", "separate"):
        half = far + (near - far) * (TIME if name == "approach" else 1 - TIME)
    elif name == "collide":
        half = near + (far - near) * abs(course)
    elif name == "pass":
        half = far * course + side
    elif name == "overtake":
        half = 10 * course + side
        middle = middle + axis * 30 * (TIME - 0.5)
    else:
        half = rng.uniform(10, 18) * np.exp(1j * np.pi * rng.choice((-1, 1)) * TIME)
    return middle + axis * half, middle - axis * half


def happen(disc: Disc, events: Sequence[str]) -> Disc:
    """The disc, to which three events happen, in a third of the time each."""
    radius, angle, flash = disc.radius.copy(), disc.angle.copy(), disc.flash.copy()
    for third, event in enumerate(events):
        now = (3 * TIME - third).clip(0, 1)
        swell = np.sin(np.pi * now) ** 2
        if event == "flash":
            flash += 0.8 * swell
        elif event == "grow":
            radius *= 1 + 0.6 * swell
        elif event == "turn":
            angle += 2 * np.pi * now
    return disc._replace(radius=radius, angle=angle, flash=flash)


def crop(photographs: list[Array], rng: np.random.Generator, extent: int, size: int) -> Array:
    """A square of a photograph, (size, size, 3)."""
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (int(rng.integers(length - extent + 1)) for length in photograph.shape[:2])
    square = photograph[top : top + extent, left : left + extent]
    return resized(square[:, :: rng.choice((-1, 1))], size)


def resized(image: Array, size: int) -> Array:
    """An image (H, W, C) as (size, size, C)."""
    planes = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]
    return F.interpolate(planes, (size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


def background(photographs: list[Array], shift: Array, scale: Array, rng: np.random.Generator) -> Array:
    """A photograph before the camera, (FRAMES, SIZE * FINER, SIZE * FINER, 3)."""
    picture = crop(photographs, rng, int(rng.integers(64, 160)), 256)  # three quarters of it are seen at first
    theta = torch.zeros(FRAMES, 2, 3)
    inverse = torch.from_numpy(0.75 / scale).float()
    theta[:, 0, 0] = theta[:, 1, 1] = inverse
    moved = -2 * shift / SIZE
    theta[:, 0, 2], theta[:, 1, 2] = torch.from_numpy(moved.real) * inverse, torch.from_numpy(moved.imag) * inverse
    grid = F.affine_grid(theta, [FRAMES, 3, SIZE * FINER, SIZE * FINER], align_corners=False)
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None].expand(FRAMES, -1, -1, -1)
    frames = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return (0.35 + 0.3 * frames).permute(0, 2, 3, 1).contiguous().numpy()


def paint(frames: Array, disc: Disc) -> None:
    """Draws a disc into the frames."""
    size, extent = len(disc.picture), SIZE * FINER
    for frame, center, radius, angle, flash in zip(frames, *disc[1:], strict=True):
        x, y, reach = center.real * FINER, center.imag * FINER, radius * FINER
        left, top = (max(0, int(at - reach)) for at in (x, y))
        right, bottom = (min(extent, int(at + reach) + 2) for at in (x, y))
        if left >= right or top >= bottom:
            continue
        dx, dy = np.arange(left, right) + 0.5 - x, np.arange(top, bottom)[:, None] + 0.5 - y
        turned = (dx + 1j * dy) * np.exp(-1j * angle) / reach
        inside = abs(turned) < 1
        u, v = ((part[inside] + 1) * size / 2 for part in (turned.real, turned.imag))
        shown = disc.picture[v.astype(int), u.astype(int)]
        frame[top:bottom, left:right][inside] = shown + flash * (1 - shown)


def occlude(frames: Array, photographs: list[Array], rng: np.random.Generator) -> None:
    """Moves a bar with a photograph on it across the frames."""
    extent, width = SIZE * FINER, int(rng.uniform(5, 11) * FINER)
    bar = crop(photographs, rng, 64, extent)[:, :width]
    begin, end = rng.permutation([-width, extent]) if rng.random() < 0.5 else rng.integers(0, extent - width, 2)
    upright = rng.random() < 0.5
    for frame, at in zip(frames, np.linspace(begin, end, FRAMES).round().astype(int), strict=True):
        left, right = max(0, at), min(extent, at + width)
        turned = frame if upright else frame.swapaxes(0, 1)
        turned[:, left:right] = bar[:, left - at : right - at]
