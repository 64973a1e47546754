"""Weights that are not all on one device: sharded by FSDP2, or kept in the CPU's memory."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


@contextlib.contextmanager
def whole_weights(policy: nn.Module) -> Iterator[None]:
    """Within it, every process holds all weights of a policy that FSDP2 shards; nothing happens to other policies.

    Sampling would otherwise gather them anew for every token, and processes that write responses of different lengths
    would wait for each other forever. They are held in the compute precision (7B in bfloat16: 15 GB), and layers are
    called without FSDP2's hooks, which would run for every token and could not be captured in a CUDA graph.
    """
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if sharded:
        prime_root(policy)
    for module in sharded:
        module.unshard()
    try:
        with hooks_off(sharded):
            yield
    finally:
        for module in sharded:
            module.reshard()


@contextlib.contextmanager
def hooks_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, these modules are called without their hooks; those that FSDP2 shards have its own alone."""
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


def prime_root(policy: nn.Module) -> None:
    """Make FSDP2 take the policy for the root of its modules: it takes the one that is called first. Nothing is
    computed.
    """
    policy(prompts=[], responses=None, mask=None, objective=None)


def stream_layers(model: PreTrainedModel) -> None:
    """Keep the decoder layers of a frozen model in the CPU's memory; each is copied to the model's device for as long
    as it computes. Results do not change. Of 7B in bfloat16, 13 of 17 GB leave the device; one layer has 0.5 GB.
    """
    for layer in model.model.language_model.layers:
        _stream(layer)


def _stream(layer: nn.Module) -> None:
    weights = list(layer.parameters())
    device = weights[0].device
    home = torch.cat([weight.flatten() for weight in weights]).cpu()  # one copy per layer instead of one per weight
    if device.type == "cuda":
        home = home.pin_memory()

    def place(flat: Tensor) -> None:
        parts = flat.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view_as(weight)

    place(home)
    # Copying in the stream that computes: the memory of a layer that is done can be that of the next one.
    layer.register_forward_pre_hook(lambda *_: place(home.to(device, non_blocking=True, copy=True)))
    layer.register_forward_hook(lambda *_: place(home))
