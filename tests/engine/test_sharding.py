"""Weights that come and go change nothing."""

from __future__ import annotations

import copy

import torch

from engine.sharding import stream_layers
from policy import group_hidden


def test_streamed_layers_are_there_one_at_a_time(model64, scene):
    prompts, responses, mask = scene
    model = copy.deepcopy(model64).requires_grad_(False)
    expected = group_hidden(model, prompts, responses, mask)
    stream_layers(model)
    layers = model.model.language_model.layers
    home = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]

    def away(module, *_) -> None:
        at_work.append([[w.data_ptr() for w in layer.parameters()] != h for layer, h in zip(layers, home, strict=True)])

    at_work: list[list[bool]] = []
    for layer in layers:
        layer.mlp.register_forward_hook(away)
    for _ in range(2):
        assert torch.equal(group_hidden(model, prompts, responses, mask), expected)
    assert at_work == 2 * [[i == k for i in range(len(layers))] for k in range(len(layers))]
    assert [[weight.data_ptr() for weight in layer.parameters()] for layer in layers] == home
