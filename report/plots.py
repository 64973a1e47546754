"""Pictures of results and of data sets.

- `plot_by_clue`: mIoU against the duration and the proportion of the evidence, as Zoom-Zero's Figure 3. Different from
  the paper: bins hold about equally many questions, so that their error bars can be compared, and the score of simply
  answering "the whole video" is drawn as well, because it alone rises with the proportion.
- `plot_reliability`: accuracy against confidence.
- `plot_statistics`: durations of videos and shares of the evidence, as LongVTG-R1's Figure 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from report import ReportError, drawing
from report.drawing import INK, LINE_COLOURS, MUTED, add_legend, line_look, named, new_figure, tidy
from report.scores import bin_names, bin_of, evidence_edges, evidence_size

if TYPE_CHECKING:  # only a program that draws needs it
    from matplotlib.axes import Axes


def plot_by_clue(results: Mapping[str, Sequence[Mapping]], out: str | Path, bins: int = 5) -> dict[str, list[int]]:
    """Draw mIoU against the evidence's duration (left) and its share of the video (right), one line per label.

    results: {label: rows with "id", "duration", "evidence" and "iou"}, the first label being the baseline (grey).
    Questions without annotated evidence are left out. Whiskers are 1.96 standard errors over questions. Returns the
    number of questions in each bin, {"duration": [...], "proportion": [...]}; bins are those of tables.clue_table.
    Raises ReportError if the labels do not answer the same questions. Source: Zoom-Zero, Figure 3.
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
    rows = [by_id[first][q] for q in questions]
    shares = np.array([evidence_size(row, "clue_portion") for row in rows]) / 100
    iou = {label: np.array([rows[q]["iou"] for q in questions]) for label, rows in by_id.items()}

    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    counts = {
        "duration": draw_bins(left, rows, "clue_length", iou, shares, bins),
        "proportion": draw_bins(right, rows, "clue_portion", iou, shares, bins),
    }
    left.set_xlabel("duration of the evidence (s)", fontsize=9, color=INK)
    right.set_xlabel("evidence as a share of the video (%)", fontsize=9, color=INK)
    left.set_title("mIoU", loc="left", fontsize=9, color=INK)
    left.set_ylim(0, 1.02)
    add_legend(figure)
    drawing.save_figure(figure, out)
    return counts


def draw_bins(
    axes: Axes, rows: Sequence[dict], by: str, iou: Mapping[str, np.ndarray], shares: np.ndarray, bins: int
) -> list[int]:
    edges = evidence_edges(rows, by, bins)
    index = np.array([bin_of(evidence_size(row, by), edges) for row in rows])
    members = [np.flatnonzero(index == b) for b in range(index.max() + 1)]
    x = np.arange(len(members))
    baseline = next(iter(iou)) if len(iou) > 1 else None
    for i, label in enumerate(sorted(iou, key=lambda label: label == baseline)):  # the baseline last: others keep style
        scores = [iou[label][m] for m in members]
        colour, style, marker = line_look(i)
        axes.errorbar(
            x + 0.07 * (i - (len(iou) - 1) / 2),
            [s.mean() for s in scores],
            [1.96 * s.std(ddof=1) / math.sqrt(len(s)) if len(s) > 1 else 0 for s in scores],
            color=MUTED if label == baseline else colour,
            linestyle=style,
            marker=marker,
            markerfacecolor="white" if label == baseline else None,
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
            label=named(f"{label} (baseline)" if label == baseline else label),
        )
    # Answering "the whole video" has an IoU of exactly the evidence's share.
    whole = [shares[m].mean() for m in members]
    axes.errorbar(x, whole, color=MUTED, linewidth=0.7, marker="_", label="whole video as answer")
    tidy(axes)
    axes.set_xlim(-0.5, len(members) - 0.5)
    axes.set_xticks(x, [f"{name}\nn = {len(m)}" for name, m in zip(bin_names(edges), members, strict=True)])
    return [len(m) for m in members]


def plot_reliability(found: Mapping[str, Mapping], out: str | Path) -> None:
    """Draw accuracy against confidence, a line per label: what lies below the diagonal is surer than it is right.

    found: {label: one kind of answer's `calibration`}. Areas of points follow the numbers of answers. Source: Guo
    et al. 2017, Figure 1.
    """
    if not found:
        raise ReportError("no answer with a confidence to draw")
    figure = new_figure(5.2, 4.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, label="as sure as right")
    for i, (label, one) in enumerate(found.items()):
        words = f"{label} (ECE {one['ECE']:.3f})"
        colour, style, marker = line_look(i)
        look = {"color": colour, "linestyle": style, "marker": marker}
        x, y = ([part[name] for part in one["bins"]] for name in ("confidence", "accuracy"))
        share = np.array([part["questions"] for part in one["bins"]]) / one["questions"]
        axes.plot(x, y, linewidth=1.2, markersize=5, **look, label=named(words))
        axes.scatter(x, y, s=30 + 400 * share, alpha=0.3, linewidths=0, color=colour, clip_on=False)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence (mean of a bin; discs: share of the answers)", fontsize=9, color=INK)
    axes.set_title("accuracy", loc="left", fontsize=9, color=INK)
    tidy(axes)
    add_legend(figure)
    drawing.save_figure(figure, out)


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
        drawn = axes.bar(range(len(counts)), counts, width=0.9, color=LINE_COLOURS[0])
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
