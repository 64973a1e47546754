"""Pictures of results and of data sets.

- `plot_by_clue`: mIoU against the duration and the proportion of the evidence, as Zoom-Zero's Figure 3. Different from
  the paper: bins hold about equally many questions, so that their error bars can be compared, and the score of simply
  answering "the whole video" is drawn as well, because it alone rises with the proportion.
- `plot_statistics`: durations of videos and shares of the evidence, as LongVTG-R1's Figure 3.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from report import ReportError, drawing
from report.drawing import COLOURS, INK, LINES, MARKERS, MUTED, add_legend, new_figure, tidy
from rewards import union_length


def plot_by_clue(results: Mapping[str, Sequence[Mapping]], out: str | Path, bins: int = 5) -> dict[str, list[int]]:
    """Draw mIoU against the evidence's duration (left) and its share of the video (right), one line per label.

    results: {label: rows with "id", "duration", "evidence" and "iou"}, the first label being the baseline (grey).
    Questions without annotated evidence are left out. Whiskers are 1.96 standard errors over questions. Returns the
    number of questions in each bin, {"duration": [...], "proportion": [...]}. Raises
    ReportError if the labels do not answer the same questions. Source: Zoom-Zero, Figure 3.
    """
    if not results:
        raise ReportError("no results to draw; give at least one label")
    by_id = {label: {row["id"]: row for row in rows if row["evidence"]} for label, rows in results.items()}
    first = next(iter(by_id))
    questions = list(by_id[first])
    if not questions:
        raise ReportError(f"{first}: no question has annotated evidence")
    for label, rows in by_id.items():
        annotated = sum(bool(row["evidence"]) for row in results[label])
        if annotated != len(rows):
            raise ReportError(f"{label}: {annotated} rows with evidence but {len(rows)} different ids")
        different = sorted(set(rows) ^ set(questions), key=str)
        if different:
            raise ReportError(f"{label!r} and {first!r} must answer the same questions; only one has {different[:3]}")
        if label == first and any(rows[q]["duration"] is None for q in questions):
            raise ReportError(f"{label}: a question without a duration; the evidence's share of the video is unknown")
        unscored = [q for q in questions if rows[q]["iou"] is None or not math.isfinite(rows[q]["iou"])]
        if unscored:
            raise ReportError(f"{label}: no IoU for {unscored[:3]}, whose evidence is annotated")
    lengths = np.array([union_length(by_id[first][q]["evidence"]) for q in questions])
    shares = lengths / np.array([by_id[first][q]["duration"] for q in questions])
    iou = {label: np.array([rows[q]["iou"] for q in questions]) for label, rows in by_id.items()}

    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    counts = {
        "duration": draw_bins(left, lengths, iou, shares, bins),
        "proportion": draw_bins(right, 100 * shares, iou, shares, bins),
    }
    left.set_xlabel("duration of the evidence (s)", fontsize=9, color=INK)
    right.set_xlabel("evidence as a share of the video (%)", fontsize=9, color=INK)
    left.set_title("mIoU", loc="left", fontsize=9, color=INK)
    left.set_ylim(0, 1.02)
    add_legend(figure)
    drawing.save_figure(figure, out)
    return counts


def draw_bins(axes, values: np.ndarray, iou: Mapping[str, np.ndarray], shares: np.ndarray, bins: int) -> list[int]:
    edges = bin_edges(values, bins)
    index = np.digitize(values, edges[1:-1])  # bins are [low, high), the last one [low, high]
    members = [np.flatnonzero(index == b) for b in range(index.max() + 1)]
    x = np.arange(len(members))
    baseline = next(iter(iou)) if len(iou) > 1 else None
    for i, label in enumerate(sorted(iou, key=lambda label: label == baseline)):  # the baseline last: others keep style
        scores = [iou[label][m] for m in members]
        axes.errorbar(
            x + 0.07 * (i - (len(iou) - 1) / 2),
            [s.mean() for s in scores],
            [1.96 * s.std(ddof=1) / math.sqrt(len(s)) if len(s) > 1 else 0 for s in scores],
            color=MUTED if label == baseline else COLOURS[i % len(COLOURS)],
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markerfacecolor="white" if label == baseline else None,
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
            label=f"{label} (baseline)" if label == baseline else label,
        )
    # Answering "the whole video" has an IoU of exactly the evidence's share.
    whole = [shares[m].mean() for m in members]
    axes.errorbar(x, whole, color=MUTED, linewidth=0.7, marker="_", label="whole video as answer")
    tidy(axes)
    axes.set_xlim(-0.5, len(members) - 0.5)
    ranges = [f"{short(low)}–{short(high)}" for low, high in pairwise(edges)]
    axes.set_xticks(x, [f"{name}\nn = {len(m)}" for name, m in zip(ranges, members, strict=True)])
    return [len(m) for m in members]


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges, taken from the values so that no bin is empty, of at most `bins` bins with about equally many values."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1), method="nearest"))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def short(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def plot_statistics(durations: Sequence[float], shares: Sequence[float], out: str | Path) -> None:
    """Draw how long the videos are (left) and which share of its video each question's evidence has (right).

    durations: seconds, one per video. shares: of 1, one per question. Raises ReportError if there are none, or one is
    not positive. Source: LongVTG-R1, Figure 3.
    """
    for name, values in (("durations", durations), ("shares", shares)):
        if not len(values) or not all(0 < value < math.inf for value in values):
            raise ReportError(f"{name} must be positive, and at least one, not {list(values)[:3]}")
    figure = new_figure(9, 3.2)
    panels = (
        ("videos", "duration (s)", durations),
        ("questions", "evidence as a share of the video (%)", [100 * share for share in shares]),
    )
    for axes, (title, label, values) in zip(figure.subplots(1, 2), panels, strict=True):
        edges = round_edges(values)
        counts, _ = np.histogram(values, edges)
        drawn = axes.bar(range(len(counts)), counts, width=0.9, color=COLOURS[0])
        axes.bar_label(drawn, fontsize=8, color=MUTED)
        axes.set_title(f"{title}: {len(values)}, median {np.median(values):.3g}", loc="left", fontsize=9, color=INK)
        axes.set_xlabel(label, fontsize=9, color=INK)
        tidy(axes)
        axes.yaxis.get_major_locator().set_params(nbins=5, integer=True)
        axes.set_xticks(range(len(counts)), [f"{low:g}–{high:g}" for low, high in pairwise(edges)])
    drawing.save_figure(figure, out)


def round_edges(values: Sequence[float]) -> list[float]:
    """Bin edges of the series ..., 0.5, 1, 2, 5, 10, ... around all values, which must be positive."""
    powers = range(math.floor(math.log10(min(values))) - 1, math.floor(math.log10(max(values))) + 3)
    edges = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    low = max(k for k, edge in enumerate(edges) if edge <= min(values))
    high = min(k for k, edge in enumerate(edges) if edge > max(values))
    return edges[low : high + 1]
