"""The chunked KL's inputs, and what it yields as written with all logits and autograd."""

from __future__ import annotations

import torch


def random_inputs(n=7, h=5, v=11, seed=0, dtype=torch.float64):
    """Hidden states, projections and the rest for the chunked form; policy and reference have their own projection."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "hidden_p": normal(n, h).requires_grad_(),
        "hidden_q": normal(n, h),
        "lm_head": normal(v, h).requires_grad_(),
        "weights": torch.rand(v, generator=g, dtype=torch.float64),
        "targets": torch.randint(0, v, (n,), generator=g),
        "lm_head_q": normal(v, h),
        "temperature": 0.7,
        "time_tokens": torch.tensor([1, 4, 5]),
    }


def whole(hidden_p, hidden_q, lm_head, weights, targets, lm_head_q, temperature, time_tokens):
    """What the chunked form yields, written with all logits and autograd."""
    log_p = torch.log_softmax(hidden_p @ lm_head.t() / temperature, -1)
    log_q = torch.log_softmax(hidden_q @ lm_head_q.t() / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    divergence = q - p + p * (log_p - log_q)
    is_time = torch.zeros(lm_head.shape[0], dtype=torch.bool)
    is_time[time_tokens] = True
    return {
        "kl": (divergence * weights).sum(-1),
        "logp": log_p[torch.arange(len(targets)), targets],
        "ref_logp": log_q[torch.arange(len(targets)), targets],
        "entropy": -(p * log_p).sum(-1),
        "kl_time": divergence[:, is_time].sum(-1),
        "kl_text": divergence[:, ~is_time].sum(-1),
    }


def gradients(function, inputs, names=("hidden_p", "lm_head"), **coefficients):
    """Gradients of sum_name coefficient . output[name]."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    out = function(**{**inputs, **leaves})
    out = out if isinstance(out, dict) else out._asdict()
    sum((out[name] * coefficient).sum() for name, coefficient in coefficients.items()).backward()
    return [leaf.grad for leaf in leaves.values()]
