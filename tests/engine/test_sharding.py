"""Weights that come and go change nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from engine.sampling import generate
from engine.sharding import stream_layers, whole_weights
from policy import Policy, group_hidden


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


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is a group of one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model) -> Policy:
    """A policy as recipes/accelerate_fsdp2.yaml shards it."""
    policy, mesh = Policy(model), init_device_mesh("cpu", (1,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def gradients(policy: Policy, scene) -> dict[str, Tensor]:
    policy(*scene, lambda hidden, lm_head: (hidden @ lm_head.t()).square().mean()).backward()
    found = {name: weight.grad for name, weight in policy.named_parameters()}
    policy.zero_grad()
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def test_whole_weights_write_the_same_without_a_hook_and_then_train_as_before(alone, model64, scene, vocabulary):
    plain = copy.deepcopy(model64)
    policy = sharded(copy.deepcopy(model64))
    layers = policy.model.model.language_model.layers
    calls: list[str] = []
    for layer in layers:
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key, hook in hooks.items():
                hooks[key] = lambda *a, hook=hook, **named: (calls.append("hook"), hook(*a, **named))[1]

    def written(model) -> list[list[int]]:
        turns = generate(model, scene[0], 3, 9, vocabulary, seed=lambda row, number: row)
        return [turn.ids.tolist() for turn in turns]

    expected = gradients(Policy(plain), scene)
    for _ in range(2):  # between rollouts there are updates
        with torch.no_grad(), whole_weights(policy):
            assert not any(isinstance(weight, DTensor) for weight in policy.parameters())
            assert written(policy.model) == written(plain)
        assert calls == []
        assert all(isinstance(weight, DTensor) for weight in policy.parameters())
        found = gradients(policy, scene)
        assert len(calls) == 2 * len(layers) and expected.keys() == found.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
        calls.clear()


def test_an_error_leaves_no_whole_weights(alone, model64):
    policy = sharded(copy.deepcopy(model64))
    with pytest.raises(ValueError, match="no video"), whole_weights(policy):
        raise ValueError("no video")
    assert all(isinstance(weight, DTensor) for weight in policy.parameters())
    assert all(layer._forward_hooks for layer in policy.model.model.language_model.layers)
