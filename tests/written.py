"""Responses that were not sampled: groups of given texts."""

from __future__ import annotations

import torch

from rollout import Group, Response, coarse_prompt, read_turn
from world import lessons


def group_of(texts: list[str], view, vocabulary, config, model) -> Group:
    """A group with these responses."""
    responses = [Response([read_turn(torch.tensor(vocabulary.ids(text)), vocabulary)]) for text in texts]
    return Group(view, coarse_prompt(view, config, vocabulary, model.config), responses)


def response_with(spans: str) -> str:
    return f"<think>red<time>{spans}</time></think><answer>B</answer><glue>[{spans}]</glue>{lessons.END}"
