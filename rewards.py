"""The rewards of the three systems, one function each, every one a float, and what a response is paid: `facets`.

Zoom-Zero (section 4.2): format, answer accuracy, IoU, zoom accuracy. LongVTG-R1: CenDist (Eq. 6), R_tg (Eq. 7), GIoU
(ablation). VideoZoomer: the tool bonus. Weights and sums are the recipe's business; nothing here is weighted but Eq. 7.
FACETS says of each when a run pays it, to which samples it applies, and what Eq. 5 credits it as.

Spans are measured on the union of a list, overlapping and touching ones merged, on both sides: order, splitting,
duplication and overlap change nothing. The papers write one interval each; for several, Eq. 6 takes the centre of the
hull (first start, last end). What the papers leave open: an unreadable prediction (None) scores the worst value of its
reward (0, or -1 for GIoU); a ratio whose denominator has length 0 is 0; CenDist is clamped to [0, 1], because spans
outside the video would make it unbounded below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prompts import LETTERS, Span, Spans, format_ok, parse_tool_call


def format_reward(turns: Sequence[str], template: str, has_options: bool = True) -> float:
    """1 if every turn of the response follows the template to the letter, else 0 (Zoom-Zero, section 4.2).

    The last turn of an episode must not be a call (VideoZoomer).
    """
    return float(all(format_ok(turn, template, has_options) for turn in turns) and parse_tool_call(turns[-1]) is None)


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

    Raises ValueError for a span that is reversed, infinite or not a number.
    """
    merged: Spans = []
    for start, end in sorted(spans):
        if not 0 <= end - start < float("inf"):
            raise ValueError(f"span ({start}, {end}): the start must not be after the end, and both finite")
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


# --- what a response is paid -----------------------------------------------------------------------------------------


def _has_letter(sample: Any) -> bool:
    return bool(sample.options) and sample.answer is not None


@dataclass(frozen=True)
class Facet:
    """A reward as training pays it. Adding one is an entry in FACETS.

    reward: of a `rollout.Response` to a sample, given the seconds of its video and the configuration. credited_as: the
    facet of Eq. 5 whose tokens are responsible for it. applies: to which samples; the others have nothing to be right
    or wrong about, and a reward of 0 would be a judgement. paid: by which configurations.
    """

    reward: Callable[[Any, Any, float, Any], float]
    credited_as: str
    applies: Callable[[Any], bool] = lambda sample: True
    paid: Callable[[Any], bool] = lambda config: True


def _grounding(name: str, reward: Callable[[Spans | None, Spans, float, Any], float]) -> Facet:
    """One of the rewards of claimed spans that `grounding` chooses from."""
    return Facet(
        lambda r, sample, seconds, config: reward(r.spans, list(sample.evidence), seconds, config),
        credited_as="iou",
        applies=lambda sample: bool(sample.evidence),
        paid=lambda config: config.grounding == name and not config.multi_turn,
    )


FACETS = {
    "format": Facet(
        lambda r, sample, _, config: format_reward([t.text for t in r.turns], config.template, bool(sample.options)),
        credited_as="format",
    ),
    "accuracy": Facet(
        lambda r, sample, *_: accuracy_reward(r.answer, sample.answer),
        credited_as="accuracy",
        applies=_has_letter,
    ),
    "iou": _grounding("iou", lambda spans, gt, *_: iou_reward(spans, gt)),
    "giou": _grounding("giou", lambda spans, gt, *_: giou_reward(spans, gt)),
    "tg": _grounding("tg", lambda spans, gt, seconds, config: temporal_reward(spans, gt, seconds, config.alpha)),
    "zoom": Facet(
        lambda r, sample, *_: zoom_reward(r.zoom.answer if r.zoom else None, sample.answer),
        credited_as="zoom",
        applies=_has_letter,
        paid=lambda config: config.zoom_reward,
    ),
    "tool": Facet(
        lambda r, sample, *_: tool_reward(r.answer, sample.answer, len(r.clips)),
        credited_as="accuracy",
        applies=_has_letter,
        paid=lambda config: config.multi_turn,
    ),
}


GROUNDING = tuple(name for name, facet in FACETS.items() if facet.credited_as == "iou")


def paid_facets(config: Any) -> list[str]:
    """Names of the rewards that a run with this configuration pays."""
    return [name for name, facet in FACETS.items() if facet.paid(config)]


def facets(group: Any, config: Any) -> dict[str, list[float]]:
    """What each response of a `rollout.Group` is paid, facet by facet: {name: [G]}; only what applies to its sample.

    Source: Zoom-Zero section 4.2, LongVTG-R1 Eq. 1 and 7, VideoZoomer section 3.3.
    """
    sample, seconds = group.view.sample, group.view.info.duration
    return {
        name: [FACETS[name].reward(response, sample, seconds, config) for response in group.responses]
        for name in paid_facets(config)
        if FACETS[name].applies(sample)
    }
