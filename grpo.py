"""The objective: what is maximised once every token has an advantage.

GRPO's clipped surrogate with a KL penalty: Zoom-Zero Eq. 2 (no clip), LongVTG-R1 Eq. 2 (clip), VideoZoomer (asymmetric
clip). The probability ratio is policy / old policy; LongVTG-R1's text calls the denominator the reference model, which
would make the ratio a second penalty.

Three normalisations: "sequence" (mean over the tokens of each response, then over responses: the papers'), "token"
(mean over all tokens), "fixed" (every token counts 1 / max_tokens of a response, so that long responses are not
diluted). Each is a sum over tokens divided by one count, and the count is of the whole batch: sum `loss_count` over all
micro-batches and processes before the first backward pass, give the sum to `grpo_loss`, and add gradients up. Then the
gradient does not depend on how the batch was split. (DDP averages over processes: multiply the loss by their number.)
"""

from typing import Any

import torch
from torch import Tensor

import kl
from kl import LARGEST, Reference, chunked_weighted_kl

NORMALISE = ("sequence", "token", "fixed")


def loss_count(mask: Tensor, normalise: str, max_tokens: int | None = None) -> Tensor:
    """What the loss of these responses is divided by; add it up over micro-batches and processes.

    mask: bool [N, T], True on sampled tokens. max_tokens: length limit of a response, for "fixed". Returns a scalar.
    """
    if normalise not in NORMALISE:
        raise ValueError(f"unknown normalisation {normalise!r}: choose one of {', '.join(NORMALISE)}")
    if normalise == "token":
        return mask.sum()
    sequences = mask.any(-1).sum()  # rows without any token are padding
    if normalise == "sequence":
        return sequences
    if max_tokens is None:
        raise ValueError('normalise="fixed" needs max_tokens, the length limit of a response')
    return sequences * max_tokens


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kl: Tensor | None,
    clip_low: float | None,
    clip_high: float | None,
    normalise: str,
    count: Tensor | float | None = None,
    max_tokens: int | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch of responses, and its statistics.

    logp, old_logp, advantages: [N, T], of the sampled tokens under the policy, under the policy that sampled them, and
    from `advantage.credit`. mask: bool [N, T], True on sampled tokens; what else there is has no influence. kl: [N, T]
    penalty per token, already multiplied by beta, or None. clip_low, clip_high: the ratio is clipped to [1 - clip_low,
    1 + clip_high]; None leaves that side open. count: the whole batch's `loss_count`; None means this is all. bonus:
    [N, T] what is added to the objective per token, the entropy times its weight, or None.

    Returns the loss (scalar) and sums over real tokens, to be added over micro-batches and processes.
    Source: Zoom-Zero Eq. 2, LongVTG-R1 Eq. 2.
    """
    if count is None:
        count = loss_count(mask, normalise, max_tokens)
    count = torch.as_tensor(count).clamp(min=1)  # a batch without any token has loss 0
    mask = mask.bool()

    def real(x: Tensor) -> Tensor:
        return torch.where(mask, x, torch.zeros_like(x))  # before any arithmetic: padding may hold NaN

    logp, old_logp, advantages = real(logp), real(old_logp), real(advantages)  # [N, T]
    log_ratio = logp - old_logp  # [N, T]
    ratio = log_ratio.clamp(max=LARGEST).exp()  # [N, T]
    low = 0.0 if clip_low is None else 1 - clip_low
    high = float("inf") if clip_high is None else 1 + clip_high
    # Eq. 2: min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta D_KL
    gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)  # [N, T]
    penalty = torch.zeros_like(gain) if kl is None else real(kl)  # [N, T]
    per_token = penalty - gain  # [N, T], to be minimised; 0 on padding
    if bonus is not None:  # VideoZoomer's released scripts: + 0.001 H
        per_token = per_token - real(bonus)

    # Eq. 2: 1/G sum_i 1/|o_i| sum_t
    lengths = mask.sum(-1, keepdim=True).clamp(min=1) if normalise == "sequence" else 1  # [N, 1]
    loss = (per_token / lengths).sum() / count

    with torch.no_grad():
        sums = {
            "tokens": mask,
            "ratio": real(ratio),
            "clipped_low": (ratio < low) & (advantages < 0),
            "clipped_high": (ratio > high) & (advantages > 0),
            "approx_kl": ratio - 1 - log_ratio,  # KL(old || policy), k3 of the sampled tokens
            "penalty": penalty,
            "advantage": advantages,
        }
        stats = {name: value.sum(dtype=torch.float64) for name, value in sums.items()}
    return loss, stats


def objective(
    batch: Any, reference: Reference, count: Tensor, config: Any, hidden: Tensor, lm_head: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a `train.MicroBatch` from the hidden states [N, H] before its real tokens, and sums of statistics.

    lm_head: [V, H], the policy's output projection. count: the whole batch's `loss_count`.
    """
    mask = batch.mask.to(hidden.device)  # [b, G, T]
    targets = batch.responses.to(hidden.device)[mask]  # [N]
    tokens = chunked_weighted_kl(
        hidden,
        reference.hidden,
        lm_head,
        reference.weights,
        kl.CHUNK,
        targets,
        config.temperature,
        reference.lm_head,
        reference.time_tokens,
    )
    paid = kl.penalty(tokens, config)  # [N]
    old = tokens.logp.detach() if batch.old_logp is None else batch.old_logp  # [N]

    def grid(values: Tensor) -> Tensor:
        """[N] values of the real tokens -> [b * G, T]."""
        return values.new_zeros(mask.shape).masked_scatter(mask, values).flatten(0, 1)

    clips = (config.clip_low, config.clip_high) if config.clip_low or config.clip_high else (None, None)
    loss, stats = grpo_loss(
        logp=grid(tokens.logp),
        old_logp=grid(old),
        advantages=batch.advantages.to(hidden.device).flatten(0, 1),
        mask=mask.flatten(0, 1),
        kl=None if paid is None else grid(paid),
        clip_low=clips[0],
        clip_high=clips[1],
        normalise=config.normalise,
        count=count,
        max_tokens=config.max_tokens,
        bonus=grid(config.entropy_bonus * tokens.entropy) if config.entropy_bonus else None,
    )
    stats["loss"] = loss.detach()
    stats["entropy"] = tokens.entropy.detach().sum()
    if config.kl != "none":
        stats["kl_time"], stats["kl_text"] = tokens.kl_time.sum(), tokens.kl_text.sum()
    return loss, stats
