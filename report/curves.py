"""Training curves: the logged figures of one or several runs, as Zoom-Zero's Figure 4 shows R_IoU and R_Acc.

From the shell: `python -m report.curves RUN [RUN ...] --out curves.png`, where RUN is a run's folder or its
metrics.jsonl.
"""

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from report import ReportError, drawing
from report.drawing import INK, MUTED, add_legend, line_look, named, new_figure, tidy

# Panels in reading order: what is learned, how the policy moves, what it costs. Keys not named here follow by name.
TITLES = {
    "reward/iou_mean": "IoU reward",
    "reward/giou_mean": "GIoU reward",
    "reward/tg_mean": "IoU and centre reward (R_tg)",
    "reward/accuracy_mean": "Answer reward",
    "reward/zoom_mean": "Zoom reward",
    "reward/tool_mean": "Tool reward",
    "reward/format_mean": "Format reward",
    "zero_variance_fraction": "Groups without variance",
    "kl/time": "KL, time tokens",
    "kl/text": "KL, text tokens",
    "entropy": "Entropy (nats)",
    "response_tokens": "Response length (tokens)",
    "unfinished_fraction": "Responses cut at a limit",
    "episode/calls": "Calls per episode",
    "grad_norm": "Gradient norm",
    "clip_fraction": "Clipped ratios",
    "seconds/step": "A step (s)",
    "loss": "Loss",
    "lr": "Learning rate",
    "seconds/rollout": "Rollout (s)",
    "seconds/zoom": "Zoom pass (s)",
    "seconds/update": "Update (s)",
    "seconds/decode": "Decoding (s)",
    "ratio": "Policy over old policy",
    "approx_kl": "KL to the old policy (k3)",
    "kl/penalty": "KL penalty",
    "episode/turns": "Turns per episode",
    "episode/clips": "Calls that showed frames",
    "redrawn": "Groups drawn anew",
    "failed_videos": "Videos that cannot be read",
    "visual_tokens_per_second": "Visual tokens per second",
    "text_tokens_per_second": "Text tokens per second",
}
FAMILIES = {"applies/": "Samples with a reward for {}", "zero_variance/": "Groups alike in {}"}
PANELS = 12  # at most, unless keys are named


def title(key: str) -> str:
    """What a figure is called above its panel."""
    for start, words in FAMILIES.items():
        if key.startswith(start):
            return words.format(key.removeprefix(start))
    return TITLES.get(key, key)


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


def telling_keys(runs: Mapping[str, list[dict]], keys: Sequence[str]) -> list[str]:
    """The first `PANELS` keys whose figures are not the same at all steps of all runs; of all keys if none changes."""

    def changes(key: str) -> bool:
        values = np.concatenate([series(rows, key)[1] for rows in runs.values()])
        return len(np.unique(values[np.isfinite(values)])) > 1

    return ([key for key in keys if changes(key)] or list(keys))[:PANELS]


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
    """Draw logged figures, each in a panel of its own, the runs overlaid: a smoothed line over faint raw points.

    runs: {label: metrics.jsonl or run folder}, or a list of those. keys: panels to draw, in this order, or ["all"]; by
    default `telling_keys`. A single run also shows mean +- std where both are logged. Returns the keys of the panels,
    in order. Raises ReportError for an unreadable file and for a key that no run has. Source: Zoom-Zero, Figure 4.
    """
    if not runs:
        raise ReportError("no run to draw; name at least one")
    if not isinstance(runs, Mapping):
        runs = label_runs(runs)
    runs = {label: read_metrics(Path(p) / "metrics.jsonl" if Path(p).is_dir() else p) for label, p in runs.items()}
    logged = logged_keys(runs)
    if not logged:
        raise ReportError(f"{', '.join(runs)}: nothing but steps is logged")
    # A spread beside its mean is that panel's band.
    panels = [k for k in logged if not (k.endswith("_std") and k.removesuffix("_std") + "_mean" in logged)]
    if keys is None:
        keys = telling_keys(runs, panels)
    elif list(keys) == ["all"]:
        keys = panels
    for key in keys:
        if key not in logged:
            nearest = difflib.get_close_matches(key, logged, n=1, cutoff=0)[0]
            raise ReportError(f"no run has logged numbers as {key!r}; the nearest key is {nearest!r}")

    columns = len(keys) if len(keys) <= 3 else 2 if len(keys) == 4 else 3 if len(keys) <= 9 else 4
    n_rows = math.ceil(len(keys) / columns)
    figure = new_figure(3.3 * columns + 0.4, 2.2 * n_rows + 0.6)
    window = max(len(rows) for rows in runs.values()) // 20 // 2 * 2 + 1
    for position, key in enumerate(keys, start=1):
        draw_panel(figure.add_subplot(n_rows, columns, position), runs, key, window)
    add_legend(figure)
    note = "horizontal axis: step, from 0"
    if window > 1:
        note += f"; line: mean of {window} neighbouring rows; dots: single rows"
    if len(runs) == 1:
        note += "; band: ± standard deviation; number: end of the line"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=MUTED)
    drawing.save_figure(figure, out)
    return list(keys)


def draw_panel(axes, runs: Mapping[str, list[dict]], key: str, window: int) -> None:
    lowest, highest = math.inf, -math.inf
    for i, (label, rows) in enumerate(runs.items()):
        steps, values = series(rows, key)
        if not np.isfinite(values).any():
            continue
        (colour, style, marker), mean = line_look(i), smooth(values, window)
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
            linestyle=style,
            linewidth=1.5,
            marker=marker,
            markersize=4,
            markevery=(i / (8 * len(runs)), 1 / 8) if len(steps) > 8 else 1,
            label=named(label),
        )
        lowest, highest = min(lowest, np.nanmin(values)), max(highest, np.nanmax(values))
        if len(runs) == 1:
            last = mean[np.isfinite(mean)][-1]
            axes.set_title(f"{last:.3g}", loc="right", fontsize=8, color=MUTED)
    axes.set_title(title(key), loc="left", fontsize=9, color=INK, parse_math=False)
    if 0 <= lowest < math.inf:  # the axis starts at 0, so that a rise from 0.50 to 0.52 looks like one
        is_share = highest <= 1 and (key.startswith("reward/") or key == "zero_variance_fraction")
        top = 1 if is_share else highest or 1
        axes.set_ylim(-0.03 * top, 1.05 * top)
    tidy(axes)
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the training curves of one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or its metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="the picture to write (default: %(default)s)")
    parser.add_argument(
        "--keys", nargs="+", help=f"draw these keys, in this order, or: all (default: the first {PANELS} that change)"
    )
    options = parser.parse_args(arguments)
    try:
        keys = plot_curves(options.runs, options.out, options.keys)
    except ReportError as error:
        parser.error(str(error))
    print(f"{options.out}: {len(keys)} panels")


if __name__ == "__main__":
    main()
