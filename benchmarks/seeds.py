"""Statistics over seeds: means with intervals, and differences that are paired by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Sequence

# Student's t, 97.5%, by degrees of freedom.
T = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95% interval of Student's t (0 for one value)."""
    if len(values) == 1:
        return values[0], 0.0
    return statistics.mean(values), T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def figure(values: Sequence[float], digits: int = 3) -> str:
    """0.812 ± 0.013"""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def flip_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of the mean under all ways to flip the differences' signs."""
    observed = abs(sum(differences))
    flipped = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-12 for value in flipped) / len(flipped)


def common_seeds(found: Collection[tuple[str, int]], names: Iterable[str]) -> list[int]:
    """Of what has ended, by name and seed, the seeds that all of these names have, in their order."""
    return sorted(set.intersection(*({seed for other, seed in found if other == name} for name in names)))


def paired_cells(differences: Sequence[float]) -> list[str]:
    """Of differences, one per seed: their mean, its p-value, and how many are above 0; empty cells where none is."""
    if not differences:
        return [""] * 3
    return [figure(differences), f"{flip_test(differences):.3f}", f"{sum(d > 0 for d in differences)}"]
