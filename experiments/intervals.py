"""Means over seeds, with their intervals."""

from collections.abc import Sequence

import numpy as np

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's, of n - 1 degrees of freedom


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval, in percent; the half is nan of one value, or more than five."""
    percent = 100 * np.array(values)
    half = T95[len(percent)] * percent.std(ddof=1) / len(percent) ** 0.5 if len(percent) in T95 else float("nan")
    return float(percent.mean()), float(half)


def shown(values: Sequence[float], sign: str = "") -> str:
    """Mean and half the interval as text, or the one value; with sign="+" both signs are written."""
    mean, half = interval(values)
    return f"{mean:{sign}.1f}" if len(values) == 1 else f"{mean:{sign}.1f} ± {half:.1f}"
