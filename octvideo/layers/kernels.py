"""The fused passes of `finishing` in Triton, for GPUs.

Maps are channels_last: (frames, H, W, channels) in memory, frames being B T. A program handles some low positions, each
with the window of high positions that it covers, of some channels: either high or low ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octvideo.layers.resampling import lay_channels_last

# Without these, a kernel would be compiled anew for sizes that are 1 or multiples of 16.
_SIZES = ["positions", "high_blocks", "H", "W", "h", "w", "CH", "CL", "add_row", "low_row", "low_at"]
_SIZES += ["tiles", "parts", "channels"]
_ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "relu6": 3}


@triton.jit
def _at(positions, row, channels):
    """Where channels of positions lie in a map of `row` channels."""
    return positions[:, None].to(tl.int64) * row + channels[None, :]


@triton.jit
def _read(x, at, ok):
    return tl.load(x + at, ok, 0.0).to(tl.float32)


@triton.jit
def _above(add, p, c, ok, add_row, ADD: tl.constexpr):
    """What is added to a whole window of high positions."""
    v = tl.zeros(ok.shape, tl.float32)
    if ADD == 1:
        v = _read(add, _at(p, add_row, c), ok)
    return v


@triton.jit
def _high_sum(high, add, above, q, c, ok, CH, add_row, ADD: tl.constexpr):
    v = _read(high, _at(q, CH, c), ok) + above
    if ADD == 2:
        v += _read(add, _at(q, add_row, c), ok)
    return v


@triton.jit
def _low_sum(low, low_add, p, c, ok, CL, low_row, low_at, LOW_ADD: tl.constexpr):
    v = _read(low, _at(p, CL, c), ok)
    if LOW_ADD:
        v += _read(low_add, _at(p, low_row, low_at + c), ok)
    return v


@triton.jit
def _activated(v, ACT: tl.constexpr):
    if ACT == 1:
        v = tl.where(v < 0, 0.0, v)  # keeps NaN
    elif ACT == 2:
        v = v / (1 + tl.exp(-v))
    elif ACT == 3:
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    return v


@triton.jit
def _slope(v, ACT: tl.constexpr):
    """The derivative at v; of relu and relu6 also in terms of their output."""
    if ACT == 1:
        return tl.where(v > 0, 1.0, 0.0)
    elif ACT == 2:
        s = 1 / (1 + tl.exp(-v))
        return s * (1 + v * (1 - s))
    else:
        return tl.where((v > 0) & (v < 6), 1.0, 0.0)


@triton.jit
def _scales(mean, var, weight, bias, c, ok, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """(centre, 1 / deviation, weight, bias) of channels."""
    m, r = tl.zeros_like(c).to(tl.float32), tl.zeros_like(c).to(tl.float32) + 1
    w, b = r, m
    if NORM:
        m = tl.load(mean + c, ok, 0.0).to(tl.float32)
        r = tl.rsqrt(tl.load(var + c, ok, 1.0).to(tl.float32) + eps)
    if WEIGHT:
        w = tl.load(weight + c, ok, 0.0).to(tl.float32)
    if BIAS:
        b = tl.load(bias + c, ok, 0.0).to(tl.float32)
    return m[None, :], r[None, :], w[None, :], b[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _finish_kernel(
    high, add, low, low_add, mean, var, weight, bias, eps, plus_high, plus_low, out_high, out_low, pooled,
    positions, high_blocks, H, W, h, w, CH, CL, add_row, low_row, low_at,
    UNIT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, ADD: tl.constexpr, LOW_ADD: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr,
    ACT: tl.constexpr, POOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    CH, CL, add_row, low_row, low_at = CH * UNIT, CL * UNIT, add_row * UNIT, low_row * UNIT, low_at * UNIT
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    block = tl.program_id(1)
    valid = p < positions
    if block < high_blocks:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = c < CH
        m, r, g, b = _scales(mean, var, weight, bias, c, ok_c, eps, NORM, WEIGHT, BIAS)
        j = p % w
        i = (p // w) % h
        n = p // w // h
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        above = _above(add, p, c, valid[:, None] & ok_c[None, :], add_row, ADD)
        for dy in tl.static_range(FH):
            for dx in tl.static_range(FW):
                y, x = i * FH + dy, j * FW + dx
                q = (n * H + y) * W + x
                ok = (valid & (y < H) & (x < W))[:, None] & ok_c[None, :]
                at = _at(q, CH, c)
                v = _high_sum(high, add, above, q, c, ok, CH, add_row, ADD)
                v = (v - m) * (r * g) + b
                if PLUS:
                    v += _read(plus_high, at, ok)
                rounded = _activated(v, ACT).to(out_high.dtype.element_ty)
                tl.store(out_high + at, rounded, ok)
                total += tl.where(ok, rounded.to(tl.float32), 0.0)
        if POOL:
            count = tl.minimum(H - i * FH, FH) * tl.minimum(W - j * FW, FW)
            mask = valid[:, None] & ok_c[None, :]
            tl.store(pooled + _at(p, CH, c), total / count[:, None].to(tl.float32), mask)
    else:
        c = (block - high_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
        ok_c = c < CL
        m, r, g, b = _scales(mean, var, weight, bias, CH + c, ok_c, eps, NORM, WEIGHT, BIAS)
        ok = valid[:, None] & ok_c[None, :]
        at = _at(p, CL, c)
        v = _low_sum(low, low_add, p, c, ok, CL, low_row, low_at, LOW_ADD)
        v = (v - m) * (r * g) + b
        if PLUS:
            v += _read(plus_low, at, ok)
        tl.store(out_low + at, _activated(v, ACT), ok)


@triton.jit(do_not_specialize=_SIZES)
def _statistics_kernel(
    high, add, low, low_add, counts, means, squares,
    positions, high_blocks, H, W, h, w, CH, CL, add_row, low_row, low_at, tiles,
    UNIT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, ADD: tl.constexpr, LOW_ADD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The count, mean and sum of squared deviations of a part of the positions, shifted by its first value."""
    CH, CL, add_row, low_row, low_at = CH * UNIT, CL * UNIT, add_row * UNIT, low_row * UNIT, low_at * UNIT
    part = tl.program_id(0)
    block = tl.program_id(1)
    first = part * tiles * BLOCK_P
    one = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)  # summed over positions at the end: each time would be slow
    two = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    number = tl.zeros((BLOCK_P,), tl.float32)
    is_high = block < high_blocks
    c = tl.where(is_high, block, block - high_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_c = c < tl.where(is_high, CH, CL)
    row = (part * (CH + CL) + tl.where(is_high, 0, CH) + c).to(tl.int64)
    if is_high:
        j0 = first % w
        i0 = (first // w) % h
        q0 = (first // w // h * H + i0 * FH) * W + j0 * FW
        shift = tl.load(high + q0.to(tl.int64) * CH + c, ok_c & (first < positions), 0.0).to(tl.float32)
        for tile in range(tiles):
            p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
            valid = p < positions
            j = p % w
            i = (p // w) % h
            n = p // w // h
            above = _above(add, p, c, valid[:, None] & ok_c[None, :], add_row, ADD)
            for dy in tl.static_range(FH):
                for dx in tl.static_range(FW):
                    y, x = i * FH + dy, j * FW + dx
                    q = (n * H + y) * W + x
                    ok_p = valid & (y < H) & (x < W)
                    ok = ok_p[:, None] & ok_c[None, :]
                    v = _high_sum(high, add, above, q, c, ok, CH, add_row, ADD)
                    v = tl.where(ok, v - shift[None, :], 0.0)
                    one += v
                    two += v * v
                    number += ok_p.to(tl.float32)
    else:
        shift = tl.load(low + first.to(tl.int64) * CL + c, ok_c & (first < positions), 0.0).to(tl.float32)
        for tile in range(tiles):
            p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
            ok = (p < positions)[:, None] & ok_c[None, :]
            v = _low_sum(low, low_add, p, c, ok, CL, low_row, low_at, LOW_ADD)
            v = tl.where(ok, v - shift[None, :], 0.0)
            one += v
            two += v * v
            number += (p < positions).to(tl.float32)
    count = tl.sum(number, 0)
    some, total, square = tl.maximum(count, 1.0), tl.sum(one, 0), tl.sum(two, 0)
    tl.store(counts + row, tl.zeros((BLOCK_C,), tl.float32) + count, ok_c)
    tl.store(means + row, shift + total / some, ok_c)
    tl.store(squares + row, tl.maximum(square - total * total / some, 0.0), ok_c)


@triton.jit(do_not_specialize=_SIZES)
def _combine_kernel(
    counts, means, squares, mean, var, running_mean, running_var, momentum, parts, channels,
    RUNNING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Joins the parts' statistics (Chan et al. 1979) and moves the running ones."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    number = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        at, mask = rows[:, None] * channels + c[None, :], (rows < parts)[:, None] & ok[None, :]
        n = tl.load(counts + at, mask, 0.0)
        number += tl.sum(n, 0)
        total += tl.sum(n * tl.load(means + at, mask, 0.0), 0)
    centre = total / number
    square = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        at, mask = rows[:, None] * channels + c[None, :], (rows < parts)[:, None] & ok[None, :]
        n = tl.load(counts + at, mask, 0.0)
        off = tl.load(means + at, mask, 0.0) - centre[None, :]
        square += tl.sum(tl.load(squares + at, mask, 0.0) + n * off * off, 0)
    tl.store(mean + c, centre, ok)
    tl.store(var + c, square / number, ok)
    if RUNNING:
        old, old_var = _read(running_mean, c, ok), _read(running_var, c, ok)
        unbiased = square / tl.maximum(number - 1, 1.0)
        tl.store(running_mean + c, old + momentum * (centre - old), ok)
        tl.store(running_var + c, old_var + momentum * (unbiased - old_var), ok)


@triton.jit(do_not_specialize=_SIZES)
def _reduce_kernel(
    grad_high, grad_low, grad_pooled, high, add, low, low_add, mean, var, weight, bias, eps, out_high, out_low,
    masked_high, masked_low, sums,
    positions, high_blocks, H, W, h, w, CH, CL, add_row, low_row, low_at, tiles,
    UNIT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, ADD: tl.constexpr, LOW_ADD: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr, ACT: tl.constexpr,
    GRAD_HIGH: tl.constexpr, GRAD_LOW: tl.constexpr, GRAD_POOLED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the positions of the gradient behind the activation, and of it times the normalised value."""
    CH, CL, add_row, low_row, low_at = CH * UNIT, CL * UNIT, add_row * UNIT, low_row * UNIT, low_at * UNIT
    part = tl.program_id(0)
    block = tl.program_id(1)
    first = part * tiles * BLOCK_P
    is_high = block < high_blocks
    c = tl.where(is_high, block, block - high_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_c = c < tl.where(is_high, CH, CL)
    channel = tl.where(is_high, 0, CH) + c
    m, r, g, b = _scales(mean, var, weight, bias, channel, ok_c, eps, NORM, WEIGHT, BIAS)
    one = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)  # summed over positions at the end: each time would be slow
    two = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tile in range(tiles):
        p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
        valid = p < positions
        if is_high:
            j = p % w
            i = (p // w) % h
            n = p // w // h
            mask = valid[:, None] & ok_c[None, :]
            base = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            if GRAD_POOLED:
                count = tl.minimum(H - i * FH, FH) * tl.minimum(W - j * FW, FW)
                base += _read(grad_pooled, _at(p, CH, c), mask) / count[:, None]
            above = _above(add, p, c, mask, add_row, ADD)
            for dy in tl.static_range(FH):
                for dx in tl.static_range(FW):
                    y, x = i * FH + dy, j * FW + dx
                    q = (n * H + y) * W + x
                    ok = (valid & (y < H) & (x < W))[:, None] & ok_c[None, :]
                    at = _at(q, CH, c)
                    d = base
                    if GRAD_HIGH:
                        d += _read(grad_high, at, ok)
                    v = _high_sum(high, add, above, q, c, ok, CH, add_row, ADD)
                    v = (v - m) * r
                    if ACT > 0:
                        if PLUS:
                            d *= _slope(_read(out_high, at, ok), ACT)
                        else:
                            d *= _slope(v * g + b, ACT)
                    if PLUS:
                        tl.store(masked_high + at, d, ok)
                    d = tl.where(ok, d, 0.0)
                    one += d
                    two += d * v
        else:
            ok = valid[:, None] & ok_c[None, :]
            at = _at(p, CL, c)
            d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            if GRAD_LOW:
                d += _read(grad_low, at, ok)
            v = _low_sum(low, low_add, p, c, ok, CL, low_row, low_at, LOW_ADD)
            v = (v - m) * r
            if ACT > 0:
                if PLUS:
                    d *= _slope(_read(out_low, at, ok), ACT)
                else:
                    d *= _slope(v * g + b, ACT)
            if PLUS:
                tl.store(masked_low + at, d, ok)
            d = tl.where(ok, d, 0.0)
            one += d
            two += d * v
    at = part.to(tl.int64) * 2 * (CH + CL) + channel
    tl.store(sums + at, tl.sum(one, 0), ok_c)
    tl.store(sums + at + CH + CL, tl.sum(two, 0), ok_c)


@triton.jit(do_not_specialize=_SIZES)
def _apply_kernel(
    grad_high, grad_low, grad_pooled, high, add, low, low_add, mean, var, weight, bias, eps, sums,
    to_high, to_add, to_low, inverse_high, inverse_low,
    positions, high_blocks, H, W, h, w, CH, CL, add_row, low_row, low_at,
    UNIT: tl.constexpr, FH: tl.constexpr, FW: tl.constexpr, ADD: tl.constexpr, LOW_ADD: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OF_BATCH: tl.constexpr, ACT: tl.constexpr,
    GRAD_HIGH: tl.constexpr, GRAD_LOW: tl.constexpr, GRAD_POOLED: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of the maps in front of the batch norm, from those behind the activation or, ACT 0, before it."""
    CH, CL, add_row, low_row, low_at = CH * UNIT, CL * UNIT, add_row * UNIT, low_row * UNIT, low_at * UNIT
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    block = tl.program_id(1)
    valid = p < positions
    is_high = block < high_blocks
    c = tl.where(is_high, block, block - high_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok_c = c < tl.where(is_high, CH, CL)
    channel = tl.where(is_high, 0, CH) + c
    m, r, g, b = _scales(mean, var, weight, bias, channel, ok_c, eps, NORM, WEIGHT, BIAS)
    mask = valid[:, None] & ok_c[None, :]
    one = tl.zeros((1, BLOCK_C), tl.float32)
    two = one
    if OF_BATCH:
        inverse = tl.where(is_high, inverse_high, inverse_low)
        one = (tl.load(sums + channel, ok_c, 0.0) * inverse)[None, :]
        two = (tl.load(sums + CH + CL + channel, ok_c, 0.0) * inverse)[None, :]
    if is_high:
        j = p % w
        i = (p // w) % h
        n = p // w // h
        base = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        if GRAD_POOLED:
            count = tl.minimum(H - i * FH, FH) * tl.minimum(W - j * FW, FW)
            base += _read(grad_pooled, _at(p, CH, c), mask) / count[:, None]
        above = _above(add, p, c, mask, add_row, ADD)
        for dy in tl.static_range(FH):
            for dx in tl.static_range(FW):
                y, x = i * FH + dy, j * FW + dx
                q = (n * H + y) * W + x
                ok = (valid & (y < H) & (x < W))[:, None] & ok_c[None, :]
                at = _at(q, CH, c)
                d = base
                if GRAD_HIGH:
                    d += _read(grad_high, at, ok)
                if NORM or ACT > 0:
                    v = _high_sum(high, add, above, q, c, ok, CH, add_row, ADD)
                    v = (v - m) * r
                    if ACT > 0:
                        d *= _slope(v * g + b, ACT)
                    d = (d - one - v * two) * (r * g)
                rounded = d.to(to_high.dtype.element_ty)
                tl.store(to_high + at, rounded, ok)
                if ADD == 2:
                    tl.store(to_add + _at(q, add_row, c), rounded, ok)
                total += tl.where(ok, rounded.to(tl.float32), 0.0)
        if ADD == 1:
            tl.store(to_add + _at(p, add_row, c), total, mask)
    else:
        at = _at(p, CL, c)
        d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        if GRAD_LOW:
            d += _read(grad_low, at, mask)
        if NORM or ACT > 0:
            v = _low_sum(low, low_add, p, c, mask, CL, low_row, low_at, LOW_ADD)
            v = (v - m) * r
            if ACT > 0:
                d *= _slope(v * g + b, ACT)
            d = (d - one - v * two) * (r * g)
        tl.store(to_low + at, d, mask)
        if JOINED:
            tl.store(to_add + _at(p, add_row, CH + c), d, mask)


class _Launch:
    """What the kernels share: the maps, their sizes as arguments, and blocks of channels and positions."""

    def __init__(self, high: Tensor, add: Tensor | None, low: Tensor, low_add: Tensor | None) -> None:
        laid: list[Any] = [x if x is None else lay_channels_last(x) for x in (high, add, low, low_add)]
        self.high, self.add, self.low, low_add = laid
        (*_, H, W), (*_, h, w) = high.shape, low.shape
        self.counts = (high.shape[1], low.shape[1])
        self.positions = low.numel() // low.shape[1]
        self.joined = add is not None and add.shape[1] > high.shape[1]  # what is added to the low map comes behind
        self.low_add = self.add if self.joined else low_add
        row = 0 if add is None else add.shape[1]
        low_row, low_at = (row, high.shape[1]) if self.joined else (low.shape[1], 0)
        self.maps: Any = (self.high, self.add, self.low, self.low_add)
        wide = 64 if max(self.counts) <= 64 else 128
        block = min(wide, max(16, triton.next_power_of_2(max(self.counts))))
        highs, lows = (triton.cdiv(n, block) for n in self.counts)
        unit = math.gcd(*self.counts, 16)  # tells Triton how channels are aligned
        numbers = (n // unit for n in (*self.counts, row, low_row, low_at))
        self.sizes = (self.positions, highs, H, W, h, w, *numbers)
        at_high = add is not None and add.shape[-2:] == high.shape[-2:] != low.shape[-2:]
        self.options = {
            "UNIT": unit,
            "FH": 1 if h == H else 2,
            "FW": 1 if w == W else 2,
            "ADD": 0 if add is None else 2 if at_high else 1,
            "LOW_ADD": self.low_add is not None,
            "BLOCK_C": block,
            "BLOCK_P": max(1, 1024 // block),
        }
        self.columns = highs + lows
        self.rows = triton.cdiv(self.positions, self.options["BLOCK_P"])

    def parts(self) -> tuple[int, int]:
        """How many programs share the positions of a reduction, and how many blocks of them each takes."""
        tiles = triton.cdiv(self.rows, max(1, 1024 // self.columns))
        return triton.cdiv(self.rows, tiles), tiles


def _affine(mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> dict[str, bool]:
    return {"NORM": mean is not None, "WEIGHT": weight is not None, "BIAS": bias is not None}


def _given(grads: list[Tensor | None]) -> dict[str, bool]:
    return {f"GRAD_{name}": x is not None for name, x in zip(("HIGH", "LOW", "POOLED"), grads, strict=True)}


def statistics(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `finishing._statistics`."""
    high, add, low, low_add, running_mean, running_var, momentum = arguments
    launch = _Launch(high, add, low, low_add)
    (parts, tiles), channels = launch.parts(), sum(launch.counts)
    partial = high.new_empty((3, parts, channels), dtype=torch.float32)
    _statistics_kernel[parts, launch.columns](*launch.maps, *partial, *launch.sizes, tiles, **launch.options)
    mean, var = high.new_empty((2, channels), dtype=torch.float32)
    running = running_mean is not None and running_var is not None
    numbers = (momentum, parts, channels, running, 16, 128)
    _combine_kernel[(triton.cdiv(channels, 16),)](*partial, mean, var, running_mean, running_var, *numbers)
    return mean, var


def finish(*arguments: Any) -> tuple[Tensor, ...]:
    """As `finishing._finish`."""
    maps, norm, (*pluses, _, activation, pool) = arguments[:4], arguments[4:9], arguments[9:]
    launch, high, low = _Launch(*maps), maps[0], maps[2]
    pluses = [None if x is None else lay_channels_last(x) for x in pluses]
    pooled = lay_channels_last(high.new_empty((*high.shape[:2], *low.shape[2:]))) if pool else high.new_empty(0)
    outputs = (torch.empty_like(launch.high), torch.empty_like(launch.low), pooled)
    how = {"PLUS": pluses[0] is not None, "ACT": _ACTIVATIONS[activation], "POOL": pool, **_affine(*norm)}
    arguments = (*launch.maps, *norm, *pluses, *outputs, *launch.sizes)
    _finish_kernel[launch.rows, launch.columns](*arguments, **how, **launch.options)
    return outputs


def finish_backward(*arguments: Any) -> list[Tensor]:
    """As `finishing._finish_backward`."""
    maps, norm, (*outs, plus, of_batch, activation) = arguments[3:7], arguments[7:12], arguments[12:]
    (high, add, low, _), (mean, _, weight, bias, _) = maps, norm
    launch = _Launch(*maps)
    (parts, tiles), channels = launch.parts(), sum(launch.counts)
    act, empty, how = _ACTIVATIONS[activation], high.new_empty(0), _affine(*norm) | launch.options
    grads = [None if x is None else lay_channels_last(x) for x in arguments[:3]]
    masked: list[Any] = [torch.empty_like(x) if plus else None for x in (launch.high, launch.low)]
    sums = None
    if plus or mean is not None:
        partial = high.new_empty((parts, 2, channels), dtype=torch.float32)
        _reduce_kernel[parts, launch.columns](
            *grads, *launch.maps, *norm, *outs, *masked, partial, *launch.sizes, tiles,
            PLUS=plus, ACT=act, **_given(grads), **how,
        )  # fmt: skip
        sums = partial.sum(0)
    if plus:  # what was written is behind neither pool nor activation
        grads, act = [*masked, None], 0
    to_high, to_low = torch.empty_like(launch.high), torch.empty_like(launch.low)
    to_add = None if launch.add is None else torch.empty_like(launch.add)
    if plus and mean is None and add is None:
        to_high, to_low = masked
    else:
        inverses = (channels_ / high.numel() for high, channels_ in zip((high, low), launch.counts, strict=True))
        _apply_kernel[launch.rows, launch.columns](
            *grads, *launch.maps, *norm, sums, to_high, to_add, to_low, *inverses, *launch.sizes,
            OF_BATCH=of_batch and mean is not None, ACT=act, JOINED=launch.joined, **_given(grads), **how,
        )  # fmt: skip
    affine = [None if x is None or sums is None else sums[i].to(x.dtype) for x, i in ((weight, 1), (bias, 0))]
    return [empty if x is None else x for x in (to_high, to_add, to_low, *affine, *masked)]
