"""How sure the model is: the probability of the letter that it answered, and of the spans that it claimed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kl
import prompts
from policy import Vocabulary


def token_probabilities(model, hidden: Tensor) -> Tensor:
    """Hidden states [N, H] -> probabilities [N, V] of the next token."""
    return kl.logits(*kl.same_dtype(hidden, model.lm_head.weight)).softmax(-1)


def letter_probabilities(model, turn: Any, n_options: int, vocabulary: Vocabulary) -> dict[str, float]:
    """The probability, among all tokens, of the options' letters in the place of the turn's answer.

    Zoom-Zero section 5.5: c = p(t) for the token t between <answer> and </answer>. A tokenizer may fuse it with a
    bracket; where it would not write another letter as one token there, only the answer is measured. {} without an
    answer. Needs `turn.hidden`.
    """
    if turn.answer is None:
        return {}
    place = answer_position(turn.text)
    token = next(k for k, (start, end) in enumerate(turn.offsets) if start <= place < end)
    probabilities = token_probabilities(model, turn.hidden[token][None])[0]
    start, end = turn.offsets[token]
    before, after = turn.text[start:place], turn.text[place + 1 : end]
    letters = prompts.LETTERS[:n_options]
    written = letters if turn.text[place].isupper() else letters.lower()
    candidates = [vocabulary.ids(before + letter + after) for letter in written]
    answered = {turn.answer: float(probabilities[turn.ids[token]])}
    if any(len(ids) != 1 for ids in candidates):
        return answered
    others = probabilities[[ids[0] for ids in candidates]].tolist()
    return dict(zip(letters, others, strict=True)) | answered  # an answer that is no option comes last


def reply_start(response: str) -> int:
    """The character after the last `</think>`, where answer and spans begin to be read."""
    return len(response) - len(response.rpartition("</think>")[2])


def answer_position(response: str) -> int:
    """The character at which the letter stands that `parse_answer` reads: the first one after the tag."""
    start = reply_start(response)
    tag = response.find("<answer>", start)
    start = start if tag < 0 else tag + len("<answer>")
    return next(k for k in range(start, len(response)) if response[k].isalpha())


def span_probability(model, turn: Any) -> float:
    """The geometric mean of the probabilities of the tokens that write the claimed spans; 0 without any.

    Needs `turn.hidden`.
    """
    if not turn.spans:
        return 0.0
    start = reply_start(turn.text)
    reply = turn.text[start:]
    closed = [
        r for tag in ("glue", "timestamp") for r in prompts.tag_ranges(reply, tag) if reply[: r[1]].endswith(tag + ">")
    ]
    first, last = (start + edge for edge in closed[0])
    tokens = [k for k, (low, high) in enumerate(turn.offsets) if low < last and high > first]
    chosen = token_probabilities(model, turn.hidden[tokens])[torch.arange(len(tokens)), turn.ids[tokens]]
    return float(chosen.log().mean().exp())
