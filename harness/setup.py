"""What the steps of a training run share: policy and reference, optimiser and learning rate."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR

import kl
from config import Config, ConfigError
from engine.loading import load
from engine.lora import adapters_off, add_adapters
from engine.sharding import stream_layers
from policy import ModelError, Policy, Vocabulary


@dataclass
class Run:
    """What the steps of one run share."""

    config: Config
    accelerator: Accelerator
    policy: torch.nn.Module  # Policy, wrapped by accelerate
    reference: torch.nn.Module | None  # frozen; with LoRA the policy's model, which is its own with its adapters off
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    kl_weights: Tensor  # [V]
    time_tokens: Tensor  # ids

    @property
    def model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.policy).model

    @property
    def reference_head(self) -> Tensor | None:
        """The reference's output projection [V, H], None if it is the policy's."""
        return None if self.reference in (None, self.model) else self.reference.lm_head.weight

    @contextlib.contextmanager
    def judge(self) -> Iterator[torch.nn.Module]:
        """Who answers in the zoom pass."""
        if self.config.zoom_judge == "policy":
            yield self.model
        else:
            with adapters_off(self.reference):
                yield self.reference


def check_rewards(config: Config) -> None:
    """Raise ConfigError for rewards that the template's responses cannot have, or that cannot be compared."""
    if config.group_size == 1:
        raise ConfigError("group_size = 1: advantages compare the responses to a prompt; take 2 or more")
    if config.multi_turn and (config.tokenadv != "off" or config.zoom_reward):
        raise ConfigError(
            f"template = {config.template} sums its rewards and has no zoom pass: it needs tokenadv = off and "
            "zoom_reward = false"
        )


def learning_rate(config: Config, update_number: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0 or constant."""
    if update_number < config.warmup:
        return (update_number + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    total = config.steps * config.updates_per_rollout
    progress = (update_number - config.warmup) / max(1, total - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def new_scheduler(optimizer: torch.optim.Optimizer, config: Config, updates: int = 0) -> LambdaLR:
    """The scheduler after so many updates."""
    return LambdaLR(optimizer, partial(learning_rate, config), last_epoch=updates - 1)


def new_optimizer(policy: Policy, config: Config, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW for what is trained. Raises ModelError for 8 bits without a GPU, with shards, or without bitsandbytes."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    on_gpu = accelerator.device.type == "cuda"
    if config.optimizer == "adamw":
        # Not fused, a step on a GPU holds the square roots of all second moments, 4 bytes per parameter.
        return torch.optim.AdamW(trainable, **settings, fused=True if on_gpu else None)
    if not on_gpu or accelerator.is_fsdp2:
        raise ModelError("optimizer = adamw8bit needs whole weights on a GPU: with FSDP2 or on a CPU, use adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ModelError("optimizer = adamw8bit needs bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit(trainable, **settings)


def load_run(config: Config, accelerator: Accelerator) -> Run:
    """Load policy and reference, and hand them to accelerate. Raises ModelError."""
    reference, referred = None, config.kl != "none" or config.zoom_judge == "reference"
    frozen = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    model, tokenizer = load(config.model, frozen if config.lora_rank else torch.float32)
    if referred and not config.lora_rank:
        # Half precision is read, not cast: that would round the rotary frequencies too.
        reference = copy.deepcopy(model) if frozen == torch.float32 else load(config.model, frozen)[0]
        reference.requires_grad_(False).eval().to(accelerator.device)
        if config.reference_device == "cpu":
            stream_layers(reference)
    vocabulary = Vocabulary.of(tokenizer, config.outer_tags)
    model.model.visual.requires_grad_(config.train_vision)
    if config.lora_rank:
        targets = config.lora_targets.split(",")
        add_adapters(model, config.lora_rank, config.lora_alpha, targets, config.train_vision, config.seed)
    policy = Policy(model).train()  # no dropout: a tower that is left to transformers recomputes in this mode alone
    if config.gradient_checkpointing:
        policy.checkpoint_activations()
    optimizer = new_optimizer(policy, config, accelerator)
    scheduler = new_scheduler(optimizer, config)
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":
        # accelerate's choice would round the loss, its statistics and the sums of gradients to bfloat16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.is_fsdp2:
        # Not the vision blocks: their parts are called one by one, so they must be whole with the rest of the policy.
        layer = type(model.model.language_model.layers[0]).__name__
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [layer]
    policy, optimizer = accelerator.prepare(policy, optimizer)
    if referred and config.lora_rank:
        reference = accelerator.unwrap_model(policy).model

    time_tokens = kl.time_token_ids(tokenizer).to(accelerator.device)
    weights = torch.full((model.lm_head.weight.shape[0],), config.beta, device=accelerator.device)
    if config.beta_time >= 0:
        weights[time_tokens] = config.beta_time  # LongVTG-R1 Eq. 5
    return Run(config, accelerator, policy, reference, vocabulary, optimizer, scheduler, weights, time_tokens)
