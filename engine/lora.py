"""LoRA: a linear layer W of the language model computes W x + alpha / rank * B A x, and A and B alone are trained.

With the adapters off the policy is the model that it began as, so no second one is held as its reference. Source: Hu et
al., "LoRA", 2021; the layers are those of `peft`, which only this needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy import ModelError

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # how peft names them, after the layer's name


def _peft():
    """The package. Raises ModelError without it."""
    try:
        import peft
    except ImportError:
        raise ModelError("lora_rank > 0 needs peft: pip install peft") from None
    return peft


def adapter_config(rank: int, alpha: float, targets: Sequence[str]):
    """What peft is told: the language model's layers of these names."""
    layers = rf".*language_model\..*\.({'|'.join(targets)})"
    return _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM")


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze the model and put adapters, in float32, beside these layers. B is 0: nothing changes yet.

    Raises ModelError without peft, and for a name that no linear layer of the language model has.
    """
    modules = model.model.language_model.named_modules()
    linear = dict.fromkeys(name.rpartition(".")[2] for name, layer in modules if isinstance(layer, nn.Linear))
    if unknown := [name for name in targets if name not in linear]:
        raise ModelError(f"lora_targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(linear)}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(adapter_config(rank, alpha, targets), model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it, the model is what it was before it got adapters, if it has any."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters(False) would freeze them too, which shards do not survive
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights W + scale * B A under the names that they had without adapters, in float32; others as they are."""
    found = {}
    for name, weight in weights.items():
        layer, base, kind = name.rpartition(".base_layer.")
        if base and kind == "weight":
            weight = weight.float() + scale * (weights[layer + B].float() @ weights[layer + A].float())
        if ".lora_" not in name:
            found[f"{layer}.{kind}" if base else name] = weight.float()
    return found


def save_adapters(
    weights: Mapping[str, Tensor], folder: Path, base: str, rank: int, alpha: float, targets: Sequence[str]
) -> None:
    """Write the adapters as peft reads them: PeftModel.from_pretrained(base model, folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config(rank, alpha, targets)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    adapters = {name: weight.contiguous() for name, weight in weights.items() if name.endswith((A, B))}
    named = {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
