"""How many channels are held at which resolution: the share alpha, or several, in whole channels."""

from collections.abc import Sequence
from itertools import pairwise

from octvideo.errors import UserError

Shares = float | tuple[float, ...]  # at half the resolution; or at half, a quarter, an eighth ...


def shares_of(alpha: float | Sequence[float]) -> Shares:
    """An alpha in its shortest form: a number, or several shares, the last one above 0.

    Raises UserError for numbers outside [0, 1], for no number, and for shares of more than 1 together.
    """
    shares = tuple(alpha) if isinstance(alpha, Sequence) else (alpha,)
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")
    if sum(shares) > 1 + 1e-9:
        raise UserError(f"the shares of an alpha must add up to at most 1, got {alpha}")
    while len(shares) > 1 and not shares[-1]:
        shares = shares[:-1]
    return shares if len(shares) > 1 else shares[0]


def say_shares(alpha: float | Sequence[float]) -> str:
    """An alpha in words: "0.25", or "0.25 + 0.125"."""
    return " + ".join(f"{share:g}" for share in (alpha if isinstance(alpha, Sequence) else (alpha,)))


def split_channels(channels: int, alpha: float, round_to: int = 1) -> tuple[int, int]:
    """How many of `channels` are (high, low): low = floor(alpha * channels); the only place that rounds.

    `round_to` takes the nearest multiple of it instead of the floor, and leaves some channels of either kind. 16, the
    floats in an AVX-512 vector, made I3D up to 17 % faster at alphas such as .1, .2 and .3 for the same arithmetic.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")
    if channels < 1 or round_to < 1:
        raise UserError(f"channels and round_to must be at least 1, got {channels} and {round_to}")
    if round_to > 1 and 0 < alpha < 1 and channels >= 2 * round_to:
        low = round_to * max(1, min(int(alpha * channels / round_to + 0.5), channels // round_to - 1))
    else:
        low = int(alpha * channels + 1e-6)  # 0.2 * 15 is just below 3
    return channels - low, low


def split_octaves(channels: int, alpha: float | Sequence[float], round_to: int = 1) -> tuple[int, ...]:
    """How many of `channels` are at the full resolution, at half, a quarter ...; the last number is above 0, or alone.

    Those at a resolution and all lower ones are `split_channels` of the sum of their shares: two octaves of .25 and
    .125 have as many low channels as one of .375.
    """
    shares = shares_of(alpha)
    shares = shares if isinstance(shares, tuple) else (shares,)
    counts = [channels]  # at this resolution and below
    for i in range(len(shares)):
        below = split_channels(channels, min(1, sum(shares[i:])), round_to)[1]
        if i and shares[i - 1] and channels >= 2 * round_to > 2:
            below = max(0, min(below, counts[-1] - round_to))  # rounding leaves channels where the share is above 0
        counts.append(below)
    found = [above - below for above, below in pairwise((*counts, 0))]
    while len(found) > 1 and not found[-1]:
        found.pop()
    return tuple(found)
