"""Scores side by side, as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from annotations.rows import DataError
from report import official
from report.calibration import calibration, calibration_text
from report.intervals import bootstrap, paired_test
from report.scores import COSTS, bin_names, bin_of, by_kind, evidence_edges, evidence_size, overall, summarise

# What each score means, in the order of the table.
HEADLINE = {
    "mIoU": "overlap of the claimed and the true spans, over their union",
    "mIoP": "share of the claimed time that is evidence",
    "mIoG": "share of the evidence that is claimed",
    **{f"R@{m}": f"questions with an IoU above {m}" for m in (0.3, 0.5, 0.7)},
    "rec@IoU": "CG-Bench's mean of R over IoU from 0.1 to 0.5",
    "accuracy": "right answers of the response itself, from what the coarse pass shows",
    "zoom_accuracy": "right answers from the frames of the claimed spans",
    "Acc@GQA": "right answers of the response whose claimed time is at least half evidence",
    "acc@IoU": "rec@IoU of right answers, 0 for wrong ones",
    "format": "responses in the template's format",
    **dict(zip(COSTS, ("calls per question", "frames per question", "visual tokens per question"), strict=True)),
}
ONE_ANSWER = {  # of results without another answer from zoomed frames, such as those of a strategy
    "accuracy": "right answers",
    "Acc@GQA": "right answers whose claimed time is at least half evidence",
}
CONTROLS = {
    "true_zoom_accuracy": "control: right answers from the frames of the true spans",
    "shuffled mIoU": "control: spans claimed for the question of another video",
    "chance mIoU": "control: the evidence of a random question about the same video",
}


@dataclass(frozen=True)
class Line:
    """One score of each result, with 95% intervals where there are any, and the change between two results."""

    name: str
    means: list[float | None]
    intervals: list[tuple[float, float] | None]
    change: dict | None = None  # of `paired_test`, or the difference alone


def compare(results: Mapping[str, list[dict]]) -> list[Line]:
    """The scores of all questions, with intervals, then those by kind of question, in the order of the table.

    Between two results, the change is that of `paired_test`.
    """
    found = [overall(rows) for rows in results.values()]
    intervals = [bootstrap(rows) for rows in results.values()]
    lines = []
    for name in (*HEADLINE, *CONTROLS):
        if name in found[0]:
            between = [interval.get(name) for interval in intervals]
            change = paired_change(*results.values(), name) if len(results) == 2 and None not in between else None
            lines.append(Line(name, [means.get(name) for means in found], between, change))
    kinds = [by_kind(rows) for rows in results.values()]
    for kind, first in kinds[0].items():
        for name in ("mIoU", "accuracy", "zoom_accuracy", "true_zoom_accuracy", *COSTS):
            if name in first:
                means = [found[kind].get(name) for found in kinds]
                change = {"difference": means[1] - means[0]} if len(means) == 2 and None not in means else None
                lines.append(Line(f"{kind} ({first['questions']}): {name}", means, [None] * len(means), change))
    return lines


def paired_change(before: list[dict], after: list[dict], name: str) -> dict:
    """`paired_test` of a score; of a cost, on the questions that have one in both results: those with a readable
    video.
    """
    if name in COSTS:
        ids = set.intersection(*({row["id"] for row in rows if name in row} for rows in (before, after)))
        before, after = ([row for row in rows if row["id"] in ids] for rows in (before, after))
    return paired_test(after, before, name)


def table(results: Mapping[str, list[dict]]) -> str:
    """`compare` as text, and how many questions each result has, and of which kinds of failure."""
    lines = [("score", *results, *(["change"] if len(results) == 2 else []))]
    for line in compare(results):
        cells = [figure(mean, interval) for mean, interval in zip(line.means, line.intervals, strict=True)]
        lines.append((line.name, *cells, *([change_text(line.change)] if line.change else [])))
    text = aligned(lines)
    for label, rows in results.items():
        found = overall(rows)
        text += f"\n{label}: {found['questions']} questions, {found['unanswered']} unanswered"
        text += f", {found['without_span']} without a span"
        if found["unreadable"]:
            text += f"; {found['unreadable']} of them count as unanswered because their videos are unreadable"
    return text


def change_text(change: dict) -> str:
    """+0.120 [+0.05, +0.19] p = 0.0021"""
    if "p_value" not in change:
        return figure(change["difference"], sign="+")
    return f"{figure(change['difference'], (change['low'], change['high']), '+')} p {p_text(change)}"


def p_text(test: dict) -> str:
    """The p-value of `paired_test`; at the least that its number of exchanges can tell, it may be lower."""
    return f"{'<=' if test['p_value'] <= test['least_p'] else '='} {test['p_value']:.4f}"


def figure(value: float | None, interval: tuple[float, float] | None = None, sign: str = "") -> str:
    """0.971 [0.96, 0.98]"""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f" [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]" if interval else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, in columns."""
    n = max(map(len, lines))
    full = [[*line, *[""] * (n - len(line))] for line in lines]
    widths = [max(len(line[k]) for line in full) for k in range(n)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in full
    )


def clue_table(results: Mapping[str, list[dict]]) -> str:
    """mIoU and accuracy by the length of the evidence and by its portion of the video (Zoom-Zero, Figure 3).

    Bins are those of plots.plot_by_clue; "unknown" are questions without evidence or duration.
    """
    lines = [("evidence", "questions", *(f"{label}: {name}" for label in results for name in ("mIoU", "accuracy")))]
    first = next(iter(results.values()))
    for by, unit in (("clue_length", " s"), ("clue_portion", "% of the video")):
        edges = evidence_edges(first, by)
        names = [name + unit for name in bin_names(edges)] + ["unknown"]
        for number, name in enumerate(names):
            groups = [[row for row in rows if bin_number(row, by, edges) == number] for rows in results.values()]
            if groups[0]:
                means = [summarise(group) for group in groups]
                cells = [figure(one.get(score)) for one in means for score in ("mIoU", "accuracy")]
                lines.append((name, str(len(groups[0])), *cells))
    return aligned(lines)


def bin_number(row: dict, by: str, edges: np.ndarray) -> int:
    """The number of a question's bin; the one after the last if its evidence is unknown."""
    size = evidence_size(row, by)
    return max(0, len(edges) - 1) if size is None else bin_of(size, edges)


def official_scores(rows: list[dict], benchmark: str) -> dict:
    """The benchmark's own scores; {} if it has none, and the reason if it cannot score these rows."""
    if benchmark not in official.OFFICIAL:
        return {}
    try:
        return official.scores(benchmark, rows)
    except DataError as error:
        return {"not scored": str(error)}


def official_text(found: dict, path: str = "") -> str:
    """Nested scores as lines: one for each innermost dict."""
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    figures = ", ".join(f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in flat.items())
    nested = [official_text(value, f"{path} {name}") for name, value in found.items() if isinstance(value, dict)]
    return "\n".join([*([f"{path}  {figures}"] if flat else []), *nested])


def meanings(results: Mapping[str, list[dict]]) -> str:
    """What each score of the table means, a line each."""
    found = overall(next(iter(results.values())))
    told = HEADLINE | CONTROLS | ({} if "zoom_accuracy" in found else ONE_ANSWER)
    return aligned([(name, text) for name, text in told.items() if name in found])


def describe(results: Mapping[str, list[dict]], benchmark: str) -> str:
    """All tables as text."""
    parts = [table(results), meanings(results)]
    if any(row["evidence"] for rows in results.values() for row in rows):
        parts.append(clue_table(results))
    parts += [calibration_text(label, found) for label, rows in results.items() if (found := calibration(rows))]
    for label, rows in results.items():
        found = official_scores(rows, benchmark)
        if found:
            parts.append(f"{benchmark}'s official scores of {label}\n{official_text(found)}")
    return "\n\n".join(parts)


def cost(rows: Sequence[dict]) -> dict[str, float]:
    """Means per question of what answering cost: frames, visual tokens, forward GFLOP, seconds, passes of the model."""
    read = [row for row in rows if row["error"] is None]
    means = {
        name: sum(row[name] for row in read) / max(1, len(read))
        for name in ("frames", "visual_tokens", "flops", "seconds", "passes")
    }
    return {**means, "gflop": means.pop("flops") / 1e9}


def cost_text(rows: list[dict], strategy: str) -> str:
    """The cost, as text, and the first unreadable video."""
    spent = cost(rows)
    lines = [
        f"{strategy}: {spent['passes']:.1f} passes of the model, {spent['frames']:.1f} frames, "
        f"{spent['visual_tokens']:.0f} visual tokens, {spent['gflop']:.2f} GFLOP, {spent['seconds']:.2f} s per question"
    ]
    lines += [f"the first unreadable video: {row['error']}" for row in rows if row["error"]][:1]
    return "\n".join(lines)
