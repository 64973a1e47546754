"""Pictures of training and of results that survive a black-and-white printer: line style and marker carry what colour
carries.

- `plot_curves`: every logged figure of one or several runs, as Zoom-Zero's Figure 4 does for R_IoU and R_Acc.
- `plot_by_clue`: mIoU against the duration and the proportion of the evidence, as Zoom-Zero's Figure 3. Different from
  the paper: bins hold about equally many questions, so that their error bars can be compared, and the score of simply
  answering "the whole video" is drawn as well, because it alone rises with the proportion.
- `plot_statistics`: durations of videos and shares of the evidence, as LongVTG-R1's Figure 3.

From the shell: `python report.py RUN [RUN ...] --out curves.png`, where RUN is a run's folder or its metrics.jsonl.
"""

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

Span = tuple[float, float]


class ReportError(ValueError):
    """Something cannot be drawn; the message names the file or the item, the value and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------

# Panels in reading order: what is learned, how the policy moves, what it costs. Keys not named here follow by name.
TITLES = {
    "reward/iou_mean": "IoU reward",
    "reward/accuracy_mean": "Answer reward",
    "reward/zoom_mean": "Zoom reward",
    "reward/format_mean": "Format reward",
    "zero_variance_fraction": "Groups without variance",
    "kl/time": "KL, time tokens",
    "kl/text": "KL, text tokens",
    "entropy": "Entropy (nats)",
    "clip_fraction": "Clipped ratios",
    "response_tokens": "Response length (tokens)",
    "loss": "Loss",
    "lr": "Learning rate",
    "seconds/rollout": "Rollout (s)",
    "seconds/zoom": "Zoom pass (s)",
    "seconds/update": "Update (s)",
}
# Okabe and Ito's colours, dark ones first, each with a line style and a marker of its own.
COLOURS = ["#0072b2", "#d55e00", "#222222", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
LINES = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, MUTED, RULE = "#1c1c1c", "#6b6b6b", "#d8d8d4"


def read_metrics(path: str | Path) -> list[dict]:
    """Read the rows of a metrics.jsonl, ordered by step; of a step that was run again after a resume, the last.

    A broken last line is what a crash leaves behind and is dropped.
    Raises ReportError (file, row) on any other broken line, on a row without a numeric step, and if no row is left.
    """
    path = Path(path)
    if not path.is_file():
        raise ReportError(f"{path}: no such file; give a run's folder or its metrics.jsonl")
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    by_step = {}
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:  # broken JSON or broken UTF-8
            if number == lines[-1][0]:
                break
            raise ReportError(f"{path}, row {number}: not JSON ({error}); repair or delete the row") from error
        if not isinstance(row, dict) or not is_number(row.get("step")) or not math.isfinite(row["step"]):
            raise ReportError(f"{path}, row {number}: expected an object with a numeric 'step', got {line[:80]!r}")
        by_step[row["step"]] = row
    if not by_step:
        raise ReportError(f"{path}: no complete row; has the run logged its first step yet?")
    return [by_step[step] for step in sorted(by_step)]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number under `key`; a value that is not finite leaves a gap."""
    points = [(row["step"], row[key]) for row in rows if is_number(row.get(key))]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` points (odd), over fewer at the ends, ignoring gaps."""
    half = window // 2
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        if np.isfinite(near).any():
            means[i] = np.nanmean(near)
    return means


def logged_keys(runs: Mapping[str, list[dict]]) -> list[str]:
    """Every key under which any run has a number, in the order of TITLES, then by name."""
    present = {key for rows in runs.values() for row in rows for key, value in row.items() if is_number(value)}
    return [key for key in TITLES if key in present] + sorted(present - set(TITLES) - {"step"})


def label_runs(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Name each run by its folder, with as many parent folders as it takes to tell the runs apart."""
    files = [Path(f) / "metrics.jsonl" if Path(f).is_dir() else Path(f) for f in folders]
    parents = [file.resolve().parent.parts for file in files]
    for depth in range(1, max(map(len, parents)) + 1):
        labels = ["/".join(parts[-depth:]) for parts in parents]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, files, strict=True))
    raise ReportError(f"the same run is named twice: {', '.join(map(str, folders))}")


def plot_curves(
    runs: Mapping[str, str | Path] | Sequence[str | Path], out: str | Path, keys: Sequence[str] | None = None
) -> list[str]:
    """Draw each logged figure in a panel of its own, the runs overlaid: a smoothed line over faint raw points.

    runs: {label: metrics.jsonl or run folder}, or a list of those. keys: panels to draw, in this order; all by default.
    A single run also shows mean +- std where both are logged. Returns the keys of the panels, in order.
    Raises ReportError for an unreadable file and for a key that no run has. Source: Zoom-Zero, Figure 4.
    """
    if not runs:
        raise ReportError("no run to draw; name at least one")
    if not isinstance(runs, Mapping):
        runs = label_runs(runs)
    runs = {label: read_metrics(Path(p) / "metrics.jsonl" if Path(p).is_dir() else p) for label, p in runs.items()}
    logged = logged_keys(runs)
    if not logged:
        raise ReportError(f"{', '.join(runs)}: nothing but steps is logged")
    if keys is None:  # a spread beside its mean is that panel's band
        keys = [k for k in logged if not (k.endswith("_std") and k.removesuffix("_std") + "_mean" in logged)]
    for key in keys:
        if key not in logged:
            nearest = difflib.get_close_matches(key, logged, n=1, cutoff=0)[0]
            raise ReportError(f"no run has logged numbers as {key!r}; the nearest key is {nearest!r}")

    columns = len(keys) if len(keys) <= 3 else 2 if len(keys) == 4 else 3 if len(keys) <= 9 else 4
    n_rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(3.3 * columns + 0.4, 2.2 * n_rows + 0.6), dpi=150, layout="constrained")
    window = max(len(rows) for rows in runs.values()) // 20 // 2 * 2 + 1
    for position, key in enumerate(keys, start=1):
        draw_panel(figure.add_subplot(n_rows, columns, position), runs, key, window)
    add_legend(figure)
    note = "horizontal axis: step"
    if window > 1:
        note += f"; line: mean of {window} neighbouring rows; dots: single rows"
    if len(runs) == 1:
        note += "; band: ± standard deviation; number: end of the line"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=MUTED)
    save_figure(figure, out)
    return list(keys)


def add_legend(figure: Figure) -> None:
    """One legend above all panels: a panel may lack a run, so each panel's entries are collected."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    inches = 0.75 + 0.068 * max(map(len, entries))  # of one entry
    columns = max(1, min(len(entries), int(figure.get_figwidth() / inches)))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handlelength=4,
        fontsize=9,
    )


def draw_panel(axes, runs: Mapping[str, list[dict]], key: str, window: int) -> None:
    lowest, highest = math.inf, -math.inf
    for i, (label, rows) in enumerate(runs.items()):
        steps, values = series(rows, key)
        if not np.isfinite(values).any():
            continue
        colour, mean = COLOURS[i % len(COLOURS)], smooth(values, window)
        if window > 1:
            axes.plot(steps, values, ".", color=colour, alpha=0.3, markersize=2.5, markeredgewidth=0)
        if len(runs) == 1 and key.endswith("_mean"):
            spread_steps, spread = series(rows, key.removesuffix("_mean") + "_std")
            if np.array_equal(spread_steps, steps):
                spread = smooth(spread, window)
                axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle=LINES[i % len(LINES)],
            linewidth=1.5,
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            markevery=(i / (8 * len(runs)), 1 / 8) if len(steps) > 8 else 1,
            label=label,
        )
        lowest, highest = min(lowest, np.nanmin(values)), max(highest, np.nanmax(values))
        if len(runs) == 1:
            last = mean[np.isfinite(mean)][-1]
            axes.set_title(f"{last:.3g}", loc="right", fontsize=8, color=MUTED)
    axes.set_title(TITLES.get(key, key), loc="left", fontsize=9, color=INK)
    if 0 <= lowest < math.inf:  # the axis starts at 0, so that a rise from 0.50 to 0.52 looks like one
        is_share = highest <= 1 and (key.startswith("reward/") or key == "zero_variance_fraction")
        top = 1 if is_share else highest or 1
        axes.set_ylim(-0.03 * top, 1.05 * top)
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=8, length=2)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    formatter = ScalarFormatter()
    formatter.set_powerlimits((-3, 4))
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.get_offset_text().set(size=7, color=MUTED)


def save_figure(figure: Figure, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white")


# ---------------------------------------------------------------------------------------------------------------------
# mIoU by evidence
# ---------------------------------------------------------------------------------------------------------------------


def union_length(spans: Sequence[Span]) -> float:
    """Seconds covered by the spans, overlaps counted once."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges, taken from the values so that no bin is empty, of at most `bins` bins with about equally many values."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1), method="nearest"))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def short(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def plot_by_clue(results: Mapping[str, Sequence[Mapping]], out: str | Path, bins: int = 5) -> dict[str, list[int]]:
    """Draw mIoU against the evidence's duration (left) and its share of the video (right), one line per label.

    results: {label: rows with "id", "duration", "glue" and "iou"}, the first label being the baseline (grey). Questions
    without annotated evidence are left out. Whiskers are 1.96 standard errors over questions. Returns the number of
    questions in each bin, {"duration": [...], "proportion": [...]}.
    Raises ReportError if the labels do not answer the same questions. Source: Zoom-Zero, Figure 3.
    """
    if not results:
        raise ReportError("no results to draw; give at least one label")
    by_id = {label: {row["id"]: row for row in rows if row["glue"]} for label, rows in results.items()}
    first = next(iter(by_id))
    questions = list(by_id[first])
    if not questions:
        raise ReportError(f"{first}: no question has annotated evidence ('glue')")
    for label, rows in by_id.items():
        annotated = sum(bool(row["glue"]) for row in results[label])
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
    lengths = np.array([union_length(by_id[first][q]["glue"]) for q in questions])
    shares = lengths / np.array([by_id[first][q]["duration"] for q in questions])
    iou = {label: np.array([rows[q]["iou"] for q in questions]) for label, rows in by_id.items()}

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
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
    save_figure(figure, out)
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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of a data set
# ---------------------------------------------------------------------------------------------------------------------


def round_edges(values: Sequence[float]) -> list[float]:
    """Bin edges of the series ..., 0.5, 1, 2, 5, 10, ... around all values, which must be positive."""
    powers = range(math.floor(math.log10(min(values))) - 1, math.floor(math.log10(max(values))) + 3)
    edges = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    low = max(k for k, edge in enumerate(edges) if edge <= min(values))
    high = min(k for k, edge in enumerate(edges) if edge > max(values))
    return edges[low : high + 1]


def plot_statistics(durations: Sequence[float], shares: Sequence[float], out: str | Path) -> None:
    """Draw how long the videos are (left) and which share of its video each question's evidence has (right).

    durations: seconds, one per video. shares: of 1, one per question. Raises ReportError if there are none, or one is
    not positive. Source: LongVTG-R1, Figure 3.
    """
    for name, values in (("durations", durations), ("shares", shares)):
        if not len(values) or not all(0 < value < math.inf for value in values):
            raise ReportError(f"{name} must be positive, and at least one, not {list(values)[:3]}")
    figure = Figure(figsize=(9, 3.2), dpi=150, layout="constrained")
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
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xticks(range(len(counts)), [f"{low:g}–{high:g}" for low, high in pairwise(edges)])
    save_figure(figure, out)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the training curves of one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or its metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--keys", nargs="+", help="draw only these keys, in this order (default: all)")
    options = parser.parse_args(arguments)
    try:
        keys = plot_curves(options.runs, options.out, options.keys)
    except ReportError as error:
        parser.error(str(error))
    print(f"{options.out}: {len(keys)} panels")


if __name__ == "__main__":
    main()
