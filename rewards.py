"""The rewards of the three systems, one function each, every one a float.

Zoom-Zero (section 4.2): format, answer accuracy, IoU, zoom accuracy. LongVTG-R1: CenDist (Eq. 6), R_tg (Eq. 7), GIoU
(ablation). VideoZoomer: the tool bonus. Weights and sums are the recipe's business; nothing here is weighted but Eq. 7.

Spans are measured on the union of a list, overlapping and touching ones merged, on both sides: order, splitting,
duplication and overlap change nothing. The papers write one interval each; for several, Eq. 6 takes the centre of the
hull (first start, last end). What the papers leave open: an unreadable prediction (None) scores the worst value of its
reward (0, or -1 for GIoU); a ratio whose denominator has length 0 is 0; CenDist is clamped to [0, 1], because spans
outside the video would make it unbounded below.
"""

from collections.abc import Sequence

from prompts import LETTERS, Span, format_ok, parse_tool_call

Spans = list[Span]


def format_reward(text: str, template: str, has_options: bool = True) -> float:
    """1 if the response follows the template to the letter, else 0 (Zoom-Zero, section 4.2)."""
    return float(format_ok(text, template, has_options))


def turns_format_reward(turns: Sequence[str], template: str) -> float:
    """1 if every turn of an episode follows the template to the letter and the last one is no call (VideoZoomer)."""
    return float(all(format_ok(turn, template) for turn in turns) and parse_tool_call(turns[-1]) is None)


def accuracy_reward(answer: str | None, gold: str) -> float:
    """1 if the letter is the right one, else 0; None is an answer that could not be read."""
    if len(gold) != 1 or gold not in LETTERS:
        raise ValueError(f"gold answer {gold!r} is not a capital letter: convert it when the data is read")
    return float(answer == gold)


def zoom_reward(zoom_answer: str | None, gold: str) -> float:
    """1 if the answer given from the zoomed frames alone is right, else 0 (Zoom-Zero, section 4.2).

    zoom_answer: None when nothing could be zoomed into (no readable span) or the reply could not be read. The released
    code then falls back to frames of the whole video, and counts an empty reply as right.
    """
    return accuracy_reward(zoom_answer, gold)


def tool_reward(answer: str | None, gold: str, clips: int) -> float:
    """1 if the final answer is right and at least one call returned frames, else 0 (VideoZoomer, section 3.3).

    clips: number of calls that returned frames. The released code counts failed calls too.
    """
    return accuracy_reward(answer, gold) * (clips > 0)


def merge(spans: Spans) -> Spans:
    """The union of the spans as disjoint, sorted ones; touching spans become one.

    Raises ValueError for a span that is reversed or not a number.
    """
    merged: Spans = []
    for start, end in sorted(spans):
        if not start <= end:
            raise ValueError(f"span ({start}, {end}): the start must not be after the end")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def union_length(spans: Spans) -> float:
    """Seconds covered by the union."""
    return sum((end - start for start, end in merge(spans)), 0.0)


def _overlap(pred: Spans, gt: Spans) -> float:
    """Seconds covered by both unions: one walk over the two sorted lists."""
    pred, gt = merge(pred), merge(gt)
    seconds, i, j = 0.0, 0, 0
    while i < len(pred) and j < len(gt):
        seconds += max(0.0, min(pred[i][1], gt[j][1]) - max(pred[i][0], gt[j][0]))
        if pred[i][1] < gt[j][1]:
            i += 1
        else:
            j += 1
    return seconds


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def interval_iou(pred: Spans, gt: Spans) -> float:
    """|pred ∩ gt| / |pred ∪ gt| on the merged unions, in [0, 1] (Zoom-Zero, section 4.2)."""
    return _ratio(_overlap(pred, gt), union_length(pred + gt))


def interval_iop(pred: Spans, gt: Spans) -> float:
    """|pred ∩ gt| / |pred|: how much of the prediction is evidence (NExT-GQA's IoP)."""
    return _ratio(_overlap(pred, gt), union_length(pred))


def interval_iog(pred: Spans, gt: Spans) -> float:
    """|pred ∩ gt| / |gt|: how much of the evidence is found (Zoom-Zero, Appendix D.1)."""
    return _ratio(_overlap(pred, gt), union_length(gt))


def giou(pred: Spans, gt: Spans) -> float:
    """IoU - |hull \\ union| / |hull|, in [-1, 1]; an empty side counts as infinitely far away, -1."""
    if not pred or not gt:
        return -1.0
    start, end = hull(pred + gt)
    return interval_iou(pred, gt) - _ratio(end - start - union_length(pred + gt), end - start)


def hull(spans: Spans) -> Span:
    """The shortest span that contains all of them (at least one is needed)."""
    return min(start for start, _ in spans), max(end for _, end in spans)


def center_distance(pred: Spans, gt: Spans, duration: float) -> float:
    """LongVTG-R1's CenDist, clamped to [0, 1]; 0 if either side is empty.

    duration: seconds of the video. Raises ValueError if it is not positive.
    """
    if not duration > 0:
        raise ValueError(f"duration {duration}: the centre distance needs a positive duration in seconds")
    if not pred or not gt:
        return 0.0
    (l_pred, r_pred), (l_gt, r_gt) = hull(pred), hull(gt)
    # Eq. 6: R_CenDist = 1 - |(l_gt + r_gt) / 2 - (l + r) / 2| / Duration
    return max(0.0, 1 - abs((l_gt + r_gt) / 2 - (l_pred + r_pred) / 2) / duration)


def iou_reward(pred: Spans | None, gt: Spans) -> float:
    """IoU of the predicted spans, 0 for an unreadable prediction."""
    return 0.0 if pred is None else interval_iou(pred, gt)


def giou_reward(pred: Spans | None, gt: Spans) -> float:
    """GIoU of the predicted spans, -1 for an unreadable prediction (LongVTG-R1, Table 4)."""
    return -1.0 if pred is None else giou(pred, gt)


def temporal_reward(pred: Spans | None, gt: Spans, duration: float, alpha: float) -> float:
    """LongVTG-R1's grounding reward, 0 for an unreadable or empty prediction; the paper has alpha = 0.8."""
    if pred is None:
        return 0.0
    # Eq. 7: R_tg = alpha * R_IoU + (1 - alpha) * R_CenDist
    return alpha * interval_iou(pred, gt) + (1 - alpha) * center_distance(pred, gt, duration)
