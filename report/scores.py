"""Our scores of questions, and their means over a data set.

A row is what is known about one question, a dict with "id", "video", "kind", "duration" (seconds or None), "answer"
(letter or None), "predicted_answer" (letter or None: unanswered), "evidence" (its spans, seconds) and "predicted" (the
predicted spans, best first, or None: no readable one). A row may have more: "zoom_answer" and "true_zoom_answer"
(letters from the predicted and the true spans' frames), "format" (0 or 1) and "shuffled_spans" (predicted for the
question of another video).

Spans are measured on merged unions (rewards.py), and an unanswered question counts as wrong. R@m is IoU > m and
Acc@GQA is a right answer with IoP >= 0.5, as in Zoom-Zero section 5. rec@IoU and acc@IoU are CG-Bench's: the mean over
the thresholds 0.1 to 0.5 of IoU >= threshold, without and with the right answer.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from annotations.formats import KIND_SEPARATOR
from rewards import interval_iog, interval_iop, interval_iou, union_length

CGBENCH_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
CLUE_LENGTHS = (0, 2, 5, 10, 20, 40)  # seconds of evidence: borders of Figure 3's left half
CLUE_PORTIONS = (0, 0.05, 0.1, 0.2, 0.4, 0.7)  # evidence / duration: borders of its right half
DURATIONS = (0, 20, 30, 45, 60, 180, 600, 1800)  # seconds of the video
BORDERS = {"clue_length": (CLUE_LENGTHS, " s"), "clue_portion": (CLUE_PORTIONS, ""), "duration": (DURATIONS, " s")}

COSTS = ("calls", "frames", "visual_tokens")
ACCURACIES = {"accuracy": "predicted_answer", "zoom_accuracy": "zoom_answer", "true_zoom_accuracy": "true_zoom_answer"}


def score(row: dict) -> dict[str, float]:
    """One question's scores, 0 to 1: accuracies only where there is an answer, IoU and others only where there is
    evidence. Beside them, what the answer took (COSTS)."""
    scores = {}
    if row["answer"] is not None:
        scores = {name: float(row[key] == row["answer"]) for name, key in ACCURACIES.items() if key in row}
    if "format" in row:
        scores["format"] = row["format"]
    if row["evidence"]:
        pred, gt = as_spans(row["predicted"]), as_spans(row["evidence"])
        iou, iop, iog = (formula(pred, gt) for formula in (interval_iou, interval_iop, interval_iog))
        scores |= {"mIoU": iou, "mIoP": iop, "mIoG": iog}
        scores |= {f"R@{m}": float(iou > m) for m in (0.3, 0.5, 0.7)}
        scores["rec@IoU"] = sum(iou >= m for m in CGBENCH_THRESHOLDS) / len(CGBENCH_THRESHOLDS)
        if "accuracy" in scores:
            scores["Acc@GQA"] = scores["accuracy"] * (iop >= 0.5)
            scores["acc@IoU"] = scores["accuracy"] * scores["rec@IoU"]
        if "shuffled_spans" in row:
            scores["shuffled mIoU"] = interval_iou(as_spans(row["shuffled_spans"]), gt)
    return scores | {name: float(row[name]) for name in COSTS if name in row}


def as_spans(pairs: Iterable[Iterable[float]] | None) -> list[tuple[float, float]]:
    return [(start, end) for start, end in pairs or []]


def summarise(rows: list[dict]) -> dict[str, float]:
    """Means of the scores over the questions that have them; with the numbers of questions, unanswered and spanless."""
    scores = [score(row) for row in rows]
    names = dict.fromkeys(name for s in scores for name in s)
    return {
        "questions": len(rows),
        "unanswered": sum(row["answer"] is not None and row["predicted_answer"] is None for row in rows),
        "without_span": sum(bool(row["evidence"]) and not row["predicted"] for row in rows),
        **{name: float(np.mean([s[name] for s in scores if name in s])) for name in names},
    }


def breakdown(rows: list[dict], by: str) -> dict[str, dict]:
    """`summarise` of each group, by "kind", "clue_length" (seconds of evidence), "clue_portion" (of the duration) or
    "duration".

    A question of several kinds counts under each. The group "unknown" has the questions without a kind, without
    evidence, or without a duration, as it matters. Empty groups are left out.
    """
    groups: dict[str, list[dict]] = {name: [] for name in group_names(rows, by)}
    for row in rows:
        for name in groups_of(row, by):
            groups[name].append(row)
    return {name: summarise(group) for name, group in groups.items() if group}


def group_names(rows: list[dict], by: str) -> list[str]:
    """All groups that `groups_of` can give, in order."""
    if by == "kind":
        return sorted({name for row in rows for name in groups_of(row, by)})
    if by not in BORDERS:
        raise ValueError(f"breakdown by '{by}': expected kind, {', '.join(BORDERS)}")
    borders, unit = BORDERS[by]
    between = [f"{low} to {high}{unit}" for low, high in itertools.pairwise(borders)]
    return [*between, f"from {borders[-1]}{unit}", "unknown"]


def groups_of(row: dict, by: str) -> list[str]:
    if by == "kind":
        return row["kind"].split(KIND_SEPARATOR) if row["kind"] else ["unknown"]
    length, duration = union_length(as_spans(row["evidence"])), row["duration"]
    value = {"clue_length": length, "clue_portion": duration and length / duration, "duration": duration}[by]
    if value is None or not (row["evidence"] or by == "duration"):
        return ["unknown"]
    return [group_names([], by)[bisect.bisect_right(BORDERS[by][0], value) - 1]]


def evidence_edges(rows: Sequence[dict], by: str, bins: int = 5) -> np.ndarray:
    """Edges of at most `bins` bins of the evidence, in the unit of `evidence_size`, with about equally many questions
    each; none without evidence.

    Equal numbers keep every bin filled, on any data set, and error bars comparable. `breakdown` has fixed borders.
    """
    sizes = [size for row in rows if (size := evidence_size(row, by)) is not None]
    return bin_edges(np.array(sizes), bins) if sizes else np.array([])


def evidence_size(row: dict, by: str) -> float | None:
    """How much evidence a question has, by "clue_length" (seconds) or "clue_portion" (per cent of the video)."""
    if not row["evidence"] or (by == "clue_portion" and row["duration"] is None):
        return None
    length = union_length(as_spans(row["evidence"]))
    return length if by == "clue_length" else 100 * length / row["duration"]


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges, taken from the values so that no bin is empty, of at most `bins` bins with about equally many values."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1), method="nearest"))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def bin_of(value: float, edges: np.ndarray) -> int:
    """The number of a value's bin: bins are [low, high), the last one [low, high]."""
    return int(np.digitize(value, edges[1:-1]))


def bin_names(edges: np.ndarray) -> list[str]:
    """1.0–3.0"""
    return [f"{bound_text(low)}–{bound_text(high)}" for low, high in itertools.pairwise(edges)]


def bound_text(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def overall(rows: Sequence[dict]) -> dict[str, float]:
    """`summarise`, with the number of unreadable videos' questions and, with controls, "chance mIoU".

    "shuffled mIoU" is the policy's, asked other videos' questions; "chance mIoU" is that of the evidence of a random
    question about the same video, which a policy that finds events but ignores the question would get.
    """
    result = summarise(list(rows))
    result["unreadable"] = sum(row.get("error") is not None for row in rows)
    if "shuffled mIoU" in result:
        result["chance mIoU"] = mean(chance_iou(row, rows) for row in rows if row["evidence"])
    return result


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def chance_iou(row: dict, rows: Sequence[dict]) -> float:
    """Expected IoU of the evidence of a random question about this row's video."""
    return mean(
        interval_iou(as_spans(o["evidence"]), as_spans(row["evidence"])) for o in rows if o["video"] == row["video"]
    )


def by_kind(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The same scores for each kind of question; one of several kinds counts under each."""
    kinds = sorted({kind for row in rows if row["kind"] for kind in groups_of(row, "kind")})
    return {kind: overall([row for row in rows if kind in groups_of(row, "kind")]) for kind in kinds}
