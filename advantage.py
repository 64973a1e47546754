"""Who gets credit for what: from rewards of a group to one advantage per token.

Eq. 1 (GRPO) and Eq. 4 (the same, facet by facet) are `group_advantages`; Eq. 5 (TokenAdv) is a table {segment: {facet:
weight}} that `token_advantages` applies. Equation numbers are Zoom-Zero's. Sampled token ids come in, advantages per
token go out: nothing is tokenised again.

What the paper leaves open, and how it is settled:

* Deviation: the population's (divide by G), which its Table 8 needs; `unbiased=True` (divide by G - 1) is the released
  code's.
* A group without variance, or of one, gets exactly 0. "Without variance" means a deviation of at most `eps` times the
  largest reward (at least 1), so that float noise is not blown up to +-1. `eps` is not added to the deviation.
* Which tokens are glue: all that share a character with a `<glue>...</glue>` range (LongVTG-R1: `<timestamp>`). Tokens
  straddle tags (`><`, `<glue>(`), so a token that touches several segments belongs to the last of SEGMENTS among them:
  glue, then answer, then think. A tag that is missing claims nothing, repeated ones all count, an unclosed one reaches
  to the end.
* A facet that does not apply to a sample (no options, so no accuracy) takes no part: the weights of the others grow so
  that their sum stays the same. For Eq. 5 that is the mean over the facets that are present.

The released code differs from Eq. 5 in its table ("code": all tokens that are neither answer nor glue get all four
facets, divided by 3), and in finding segments by token counts (five tokens before `<glue` are the answer, all after it
is glue). Here segments are those of the text; the end token is "other". "time" is ours: Eq. 5 with times in `<think>`
as glue, since they are written first and fix the spans.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from prompts import tag_ranges
from rewards import FACETS

SEGMENTS = ("other", "think", "answer", "glue")
TAGS = {"think": "think", "answer": "answer", "glue": "glue", "timestamp": "glue"}  # tag: segment, the last one wins
TIME_TAGS = TAGS | {"time": "glue"}

_ANSWERING = {"format": 1 / 3, "zoom": 1 / 3, "accuracy": 1 / 3}
_GROUNDING = {"format": 1 / 3, "zoom": 1 / 3, "iou": 1 / 3}
_ALL_FOUR = {"format": 1 / 3, "zoom": 1 / 3, "accuracy": 1 / 3, "iou": 1 / 3}

# Eq. 5: glue tokens get mean(A^format, A^zoom, A^iou), all others mean(A^format, A^zoom, A^acc)
CREDIT = {
    "paper": {"other": _ANSWERING, "think": _ANSWERING, "answer": _ANSWERING, "glue": _GROUNDING},
    "code": {"other": _ALL_FOUR, "think": _ALL_FOUR, "answer": _ANSWERING, "glue": _GROUNDING},
    "off": None,  # every token gets the mean of all facets given; with the summed reward as the only one, this is Eq. 1
}


class RewardError(ValueError):
    """A reward that no advantage can be computed from: the message names the sample and the facet."""


def credit(group: Any, config: Any) -> Tensor:
    """One advantage per sampled token of a `rollout.Group` with rewards: [G, T], padded on the right.

    Raises RewardError for a reward that is NaN or infinite.
    """
    rewards = {name: torch.tensor(values) for name, values in group.rewards.items()}  # [G] each
    if config.tokenadv == "off":
        # Eq. 1: one reward, the weighted sum of all facets
        weights = {"accuracy": config.accuracy_weight, "format": config.format_weight, "tool": config.tool_weight}
        rewards = {"sum": torch.stack([weights.get(name, 1.0) * values for name, values in rewards.items()]).sum(0)}
    unbiased = config.std == "sample"
    try:
        advantages = {name: group_advantages(values, unbiased, facet=name) for name, values in rewards.items()}
    except ValueError as error:
        raise RewardError(f"sample {group.view.sample.id}: {error}") from None
    tags = TIME_TAGS if config.tokenadv == "time" else TAGS
    segments = [segment_ids(r.text, r.offsets, tags) for r in group.responses]
    padded = torch.nn.utils.rnn.pad_sequence(segments, batch_first=True)  # [G, T]
    return token_advantages(advantages, padded, credit_table(config.tokenadv, rewards))


def credit_table(name: str, facets: Collection[str]) -> dict[str, dict[str, float]] | None:
    """One of CREDIT for these facets: each stands where the facet that it is credited as does, R_tg where R_IoU does.

    A segment's weights add up to what they do in CREDIT.
    """
    table, chosen = {}, CREDIT["paper" if name == "time" else name]
    if chosen is None:
        return None
    for segment, printed in chosen.items():
        weights: dict[str, float] = {}
        for facet, weight in printed.items():
            alike = [other for other in facets if FACETS[other].credited_as == facet]
            weights |= dict.fromkeys(alike or [facet], weight)
        scale = sum(printed.values()) / sum(weights.values())
        table[segment] = {facet: weight * scale for facet, weight in weights.items()}
    return table


def group_advantages(rewards: Tensor, unbiased: bool = False, eps: float = 1e-6, facet: str = "reward") -> Tensor:
    """Rewards of a group, centred and scaled to deviation 1.

    rewards: [..., G], one group per row. Returns [..., G], floating point; exactly 0 for groups without variance and
    groups of one.
    facet: name for the error message. Raises ValueError for NaN or infinite rewards.
    Source: Zoom-Zero Eq. 1 (one facet), Eq. 4 (each facet apart).
    """
    if not torch.isfinite(rewards).all():
        raise ValueError(f"{facet}: rewards must be finite, got {rewards.tolist()}")
    r = rewards.double()  # [..., G]
    group = r.shape[-1]
    centred = r - r.mean(-1, keepdim=True)  # [..., G]
    variance = centred.square().sum(-1, keepdim=True) / max(group - 1 if unbiased else group, 1)  # [..., 1]
    std = variance.sqrt()  # [..., 1]
    noise = eps * r.abs().amax(-1, keepdim=True).clamp(min=1)  # [..., 1]
    # Eq. 1, Eq. 4: A_i^k = (r_i^k - mean_k) / std_k
    advantages = torch.where(std > noise, centred / std, torch.zeros_like(r))
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype())


def token_offsets(tokenizer, ids: list[int], skip_special_tokens: bool = True) -> tuple[str, list[tuple[int, int]]]:
    """The text of sampled ids, and which characters [start, end) of it each id wrote.

    The pieces text[start:end] joined are the text. A character whose bytes are spread over several ids belongs to the
    id that completes it; the ids before have an empty range at its place, as have skipped special tokens.
    """

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    text, offsets = "", []
    previous = start = 0  # ids[start:k + 1] is not yet in the text, ids[previous:start] is what came before it
    for k in range(len(ids)):
        piece = decode(ids[previous : k + 1])[len(decode(ids[previous:start])) :]
        if piece.endswith("\ufffd") and k + 1 < len(ids):
            piece = ""  # an incomplete character, or bytes that are none: wait for what follows
        else:
            previous, start = start, k + 1
        offsets.append((len(text), len(text) + len(piece)))
        text += piece
        writer = k
        while piece and writer and not decode(ids[writer : writer + 1]):  # skipped tokens wrote nothing of the piece
            writer -= 1
        offsets[writer:] = [offsets[k], *[(len(text), len(text))] * (k - writer)]
    return text, offsets


def segment_ids(text: str, offsets: list[tuple[int, int]], tags: dict[str, str] = TAGS) -> Tensor:
    """The segment of each token, as an index into SEGMENTS: long [T].

    A token belongs to the last of SEGMENTS that any of its characters lies in; one with an empty range counts as the
    character that follows it.
    """
    of_character = [0] * (len(text) + 1)  # one past the end: empty ranges there are "other"
    for tag, segment in tags.items():
        for start, end in tag_ranges(text, tag):
            of_character[start:end] = [SEGMENTS.index(segment)] * (end - start)
    return torch.tensor([max(of_character[start : max(end, start + 1)]) for start, end in offsets], dtype=torch.long)


def token_advantages(facets: dict[str, Tensor], segments: Tensor, credit: dict[str, dict[str, float]] | None) -> Tensor:
    """Each token's advantage: the facets that its segment is responsible for.

    facets: {name: [G]} advantages; facets that do not apply to this group are left out. segments: long [G, T] of
    indices into SEGMENTS. credit: one of CREDIT. Returns [G, T]. Raises ValueError if no facet of a segment is present,
    as its tokens would learn nothing, or if no segment is credited with a facet. Source: Zoom-Zero Eq. 5.
    """
    table = credit if credit is not None else {segment: dict.fromkeys(facets, 1 / len(facets)) for segment in SEGMENTS}
    credited = {name for weights in table.values() for name in weights}
    if unknown := set(facets) - credited:
        raise ValueError(f"no segment is credited with {sorted(unknown)}, only with {sorted(credited)}")
    rows = []
    for segment in SEGMENTS:
        weights = table[segment]
        present = {name: weight for name, weight in weights.items() if name in facets}
        if not present:
            raise ValueError(
                f"segment {segment!r} is credited with {sorted(weights)}, but only {sorted(facets)} are given"
            )
        total = sum(weights.values())
        # Eq. 5: A_{i,t} = sum_k w_k A_i^k over the facets k of the token's segment
        row = sum(weight * facets[name] for name, weight in present.items()) * (total / sum(present.values()))  # [G]
        rows.append(row)
    by_segment = torch.stack(rows, dim=-1)  # [G, len(SEGMENTS)]
    return by_segment.gather(-1, segments)  # [G, T]
