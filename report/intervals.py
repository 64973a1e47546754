"""How sure one can be of a mean over questions: intervals, and a test of two results."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from annotations.rows import DataError
from report.scores import score


def sums_by_video(rows: list[dict], names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the scores and numbers of questions that have them: two arrays [videos, scores]."""
    index = {video: i for i, video in enumerate(dict.fromkeys(row["video"] for row in rows))}
    columns = {name: j for j, name in enumerate(names)}
    sums, counts = np.zeros((2, len(index), len(columns)))
    for row in rows:
        for name, value in score(row).items():
            if name in columns:
                sums[index[row["video"]], columns[name]] += value
                counts[index[row["video"]], columns[name]] += 1
    return sums, counts


def bootstrap(
    rows: list[dict], level: float = 0.95, samples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of `summarise`'s means, by drawing videos with replacement.

    Questions about one video are not independent, so whole videos are drawn. {name: (low, high)}.
    """
    names = list(dict.fromkeys(name for row in rows for name in score(row)))
    if not names:
        return {}
    sums, counts = sums_by_video(rows, names)  # [V, K]
    videos = len(sums)
    draws = np.random.default_rng(seed).multinomial(videos, np.full(videos, 1 / videos), size=samples)  # [S, V]
    drawn = draws @ counts  # [S, K]
    # A draw in which no question has the score tells nothing about it.
    means = np.divide(draws @ sums, drawn, out=np.full_like(drawn, np.nan), where=drawn > 0)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(low[j]), float(high[j])) for j, name in enumerate(names)}


@lru_cache(maxsize=1)
def exchanges(videos: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of S samples, whether the results of a video are exchanged (-1 or 1), and how often it is drawn, [S, V]
    each: the same for all scores of a table.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(samples, videos)).astype(np.int8)
    draws = rng.multinomial(videos, np.full(videos, 1 / videos), size=samples).astype(np.int32)
    signs.flags.writeable = draws.flags.writeable = False
    return signs, draws


def paired_test(rows_a: list[dict], rows_b: list[dict], metric: str, samples: int = 10000, seed: int = 0) -> dict:
    """Is A's mean of a score different from B's? A permutation test over videos, on the same questions.

    Under the null hypothesis the two results of a video could be exchanged: the p-value (two-sided) is the share of
    random exchanges whose difference is at least as large as the observed one, which counts itself. "low" and "high"
    are the 95% bootstrap interval of the difference A - B, over videos; "least_p" is the least p-value that so many
    exchanges can give. Raises DataError if the questions differ.
    """
    by_id = {row["id"]: row for row in rows_b}
    if len(rows_a) != len(rows_b) or any(row["id"] not in by_id for row in rows_a):
        only = sorted({row["id"] for row in rows_a} ^ set(by_id))
        raise DataError(f"the two results are about different questions; {len(only)} are in only one, first {only[:3]}")
    rows_b = [by_id[row["id"]] for row in rows_a]
    sums_a, counts = (x[:, 0] for x in sums_by_video(rows_a, [metric]))  # [V]
    sums_b, counts_b = (x[:, 0] for x in sums_by_video(rows_b, [metric]))
    if not counts.sum() or not np.array_equal(counts, counts_b):
        raise DataError(f"'{metric}' is not a score of the same questions in both results")
    differences = sums_a - sums_b
    observed = differences.sum() / counts.sum()
    signs, draws = exchanges(len(differences), samples, seed)
    exchanged = signs @ differences / counts.sum()
    # The tolerance keeps exchanges that equal the observed one up to rounding.
    extreme = int((np.abs(exchanged) >= abs(observed) - 1e-12).sum())
    drawn = draws @ counts
    low, high = np.quantile((draws @ differences)[drawn > 0] / drawn[drawn > 0], [0.025, 0.975])
    return {
        "metric": metric,
        "difference": float(observed),
        "low": float(low),
        "high": float(high),
        "p_value": (1 + extreme) / (1 + samples),
        "least_p": 1 / (1 + samples),
        "questions": int(counts.sum()),
        "videos": len(differences),
    }
