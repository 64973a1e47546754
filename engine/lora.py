"""LoRA: a linear layer W computes W x + alpha / rank * B A x, and A and B alone are trained.

In the language model these are the layers of some names; in a vision tower that is trained, all linear layers. With the
adapters off the policy is the model that it began as, so no second one is held as its reference. Source: Hu et al.,
"LoRA", 2021; the layers are those of `peft`, which only this needs.
"""

from __future__ import annotations

import contextlib
import copy
import re
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


def linear_names(part: nn.Module, words: int) -> list[str]:
    """The last words of the names of a part's linear layers."""
    linear = [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear)]
    return list(dict.fromkeys(".".join(name.split(".")[-words:]) for name in linear))


def add_adapters(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], vision: bool, seed: int
) -> None:
    """Freeze the model and put adapters, in float32, beside the language model's layers of these names, and with
    `vision` beside all linear layers of the vision tower. B is 0: nothing changes yet.

    Raises ModelError without peft, and for a name that no linear layer of the language model has.
    """
    known = linear_names(model.model.language_model, 1)
    if unknown := [name for name in targets if name not in known]:
        raise ModelError(f"lora_targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(known)}")
    layers = rf".*language_model\..*\.({'|'.join(targets)})"
    if vision:
        # Two words, since `proj` is also what the convolution of the patches is called.
        layers += rf"|.*visual\..*({'|'.join(map(re.escape, linear_names(model.model.visual, 2)))})"
    model.requires_grad_(False)
    config = _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(config, model)
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


def save_adapters(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, base: str) -> None:
    """Write the adapters of a model with these weights as peft reads them: PeftModel.from_pretrained(base, folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    adapters = {name: weight.contiguous() for name, weight in weights.items() if name.endswith((A, B))}
    named = {f"base_model.model.{name.replace('.default.', '.')}": weight for name, weight in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
