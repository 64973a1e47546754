"""How far the policy may go: token-aware KL, exact over the vocabulary, without ever holding all logits.

LongVTG-R1 Eq. 4 restricts the KL divergence to a subset S of the vocabulary,

    D^S(p || q) = q(S) - p(S) + sum_{o in S} p(o) log(p(o) / q(o)),

which is >= 0 and 0 only if p = q on S (the naive masked sum is neither). Being a sum over single entries, any mixture
of subsets such as Eq. 5 (beta_text on text, beta_time on time tokens) is one weight vector w over the vocabulary, and
one pass:

    D = sum_o w_o (q_o - p_o + p_o a_o),   a = log p - log q,   dD/dz_j = p_j (w_j a_j - sum_o w_o p_o a_o)

for the policy's logits z. w = beta everywhere is the ordinary KL penalty (Eq. 3).

`subset_kl` is Eq. 4 as written, `weighted_kl` the weighted form with that gradient, `chunked_weighted_kl` the one to
train with: from hidden states and the output projection, a few rows at a time, computing the logits again in the
backward pass. No gradient ever goes to the reference q. Inside everything is float32 (float64 for float64 inputs).

`k1`, `k2`, `k3` are the usual estimates from one sampled token; what matters when they are used as a loss is what their
gradient estimates, and it is stated for each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


def subset_kl(logp: Tensor, logq: Tensor, subset: Tensor) -> Tensor:
    """D^S(p || q) as the paper writes it, from log-probabilities, differentiable by autograd.

    logp, logq: [..., V]. subset: ids, or bool [V]. Returns [...].
    Source: LongVTG-R1 Eq. 4; q(S) = 0 as in its Appendix B: infinite if p(S) > 0, else 0.
    """
    logp, logq = logp[..., subset], logq[..., subset]
    p, q = logp.exp(), logq.exp()
    a = torch.where(p > 0, logp - logq, 0)  # 0 log 0 = 0
    # Eq. 4: D^S(p || q) = q(S) - p(S) + sum_{o in S} p(o) log(p(o) / q(o))
    return q.sum(-1) - p.sum(-1) + (p * a).sum(-1)


def _divergence(logp: Tensor, logq: Tensor, p: Tensor) -> Tensor:
    """q - p + p log(p / q) for every entry of the vocabulary; q if p = 0, infinite if only q = 0.

    Written as p (e^b - 1 - b) with b = log(q / p), which keeps its digits where p and q nearly agree: otherwise float32
    would lose a divergence below 1e-7 to rounding. From b = 40 on, it is q to the last digit, also where p underflows.
    """
    b = logq - logp
    divergence = torch.expm1(b).sub_(b).mul_(p)
    usual = b < 40
    if usual.is_cuda or not usual.all():  # a look at what is on a GPU would make the host wait
        torch.where(usual, divergence, torch.exp(logq, out=b), out=divergence)
    return divergence


class _WeightedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_p, logits_q, weights, temperature):
        logp, logq = torch.log_softmax(logits_p / temperature, -1), torch.log_softmax(logits_q / temperature, -1)
        ctx.save_for_backward(logp, logq, weights)
        ctx.temperature = temperature
        return torch.where(weights == 0, 0, weights * _divergence(logp, logq, logp.exp())).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        logp, logq, weights = ctx.saved_tensors
        p = logp.exp()
        wpa = torch.where((weights == 0) | (p == 0), 0, weights * p * (logp - logq))
        # dD/dz_j = p_j (w_j a_j - sum_o w_o p_o a_o)
        dz = wpa - p * wpa.sum(-1, keepdim=True)
        return grad.unsqueeze(-1) * dz / ctx.temperature, None, None, None


def weighted_kl(logits_p: Tensor, logits_q: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_o w_o (q_o - p_o + p_o log(p_o / q_o)), with its closed-form gradient for logits_p and none for logits_q.

    logits_p, logits_q: [..., V]; -inf is allowed. weights: [V]. temperature: divides both logits.
    Returns [...] in float32 (float64 for float64 logits).
    Source: LongVTG-R1 Eq. 5, with w = beta_time on time tokens and beta_text on all others.
    """
    dtype = _inner(logits_p.dtype)
    return _WeightedKL.apply(logits_p.to(dtype), logits_q.detach().to(dtype), weights.to(dtype), temperature)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class TokenStats(NamedTuple):
    """What one traversal of the vocabulary yields per token, all [N]; None where it was not asked for."""

    kl: Tensor | None  # weighted; differentiable
    logp: Tensor | None  # of the targets under the policy; differentiable
    ref_logp: Tensor | None  # of the targets under the reference
    entropy: Tensor  # of the policy, in nats; differentiable
    kl_time: Tensor | None  # D^S of the time tokens, unweighted
    kl_text: Tensor | None  # D^S of all other tokens, unweighted


class Reference(NamedTuple):
    """What the policy is held to: the reference's hidden states [N, H] of the same tokens and its output projection
    [V, H] (None without a reference), the weights [V] of its KL, and the ids of time tokens.
    """

    hidden: Tensor | None
    lm_head: Tensor | None
    weights: Tensor
    time_tokens: Tensor


LARGEST = 80.0  # a log ratio that is cut to: e^89 is infinite in float32, and 0 times that, a gradient too, is NaN
CHUNK = 1024  # rows of logits that training holds at a time
HALF = (torch.bfloat16, torch.float16)


def _operand(x: Tensor) -> Tensor:
    """As it goes into matrix products: half precision only where the product can come out in float32 (CUDA)."""
    return x if x.is_cuda and x.dtype in HALF else x.to(_inner(x.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or float64, of half-precision operands too: a logit of 20 in bfloat16 is off by up to 0.06."""
    wide = {"out_dtype": torch.float32} if a.dtype in HALF else {}
    return torch.mm(a, b, **wide)


def _log_softmax(hidden: Tensor, lm_head: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, V] and normalisers [n], the logarithms of the sums."""
    logits = _product(hidden, lm_head.t()).div_(temperature)  # [n, V]
    logp = torch.log_softmax(logits, -1)  # [n, V]
    return logp, logits.amax(-1) - logp.amax(-1)


class _ChunkedKL(torch.autograd.Function):
    """Three differentiable outputs (kl, logp, entropy), then the ones for the log.

    Forward walks over the tokens, `chunk` at a time, with the whole vocabulary. Backward knows the normalisers and
    walks over the vocabulary, with all tokens: each row of the projection is read once, and its gradient written once.
    """

    @staticmethod
    def forward(ctx, hidden_p, lm_head, hidden_q, lm_head_q, weights, is_time, targets, chunk, temperature):
        n, with_q, with_targets = hidden_p.shape[0], hidden_q is not None, targets is not None

        def per_token(wanted: bool) -> Tensor | None:
            return hidden_p.new_empty(n, dtype=_inner(hidden_p.dtype)) if wanted else None

        lse_p, entropy, logp_target = per_token(True), per_token(True), per_token(with_targets)
        lse_q, wpa, kl, kl_time, kl_text = (per_token(with_q) for _ in range(5))
        logq_target = per_token(with_q and with_targets)
        head_p, head_q = _operand(lm_head), _operand(lm_head_q) if with_q else None
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            logp, lse_p[rows] = _log_softmax(_operand(hidden_p[rows]), head_p, temperature)
            p = logp.exp()
            entropy[rows] = -torch.linalg.vecdot(p, logp)
            if with_targets:
                logp_target[rows] = logp.gather(-1, targets[rows, None])[:, 0]
            if with_q:
                logq, lse_q[rows] = _log_softmax(_operand(hidden_q[rows]), head_q, temperature)
                divergence = _divergence(logp, logq, p)  # [chunk, V]
                kl[rows] = divergence @ weights
                kl_time[rows] = divergence @ is_time
                kl_text[rows] = divergence @ (1 - is_time)
                if with_targets:
                    logq_target[rows] = logq.gather(-1, targets[rows, None])[:, 0]
                wpa[rows] = p.mul_(logp.sub_(logq)) @ weights

        ctx.save_for_backward(hidden_p, lm_head, hidden_q, lm_head_q, weights, targets, lse_p, lse_q, wpa, entropy)
        ctx.chunk, ctx.temperature = chunk, temperature
        ctx.set_materialize_grads(False)
        logged = (logq_target, kl_time, kl_text)
        ctx.mark_non_differentiable(*(x for x in logged if x is not None))
        return kl, logp_target, entropy, *logged

    @staticmethod
    def backward(ctx, grad_kl, grad_logp, grad_entropy, *_):
        hidden_p, lm_head, hidden_q, lm_head_q, weights, targets, lse_p, lse_q, wpa, entropy = ctx.saved_tensors
        n, vocabulary = hidden_p.shape[0], lm_head.shape[0]
        grad_hidden = torch.zeros_like(hidden_p, dtype=lse_p.dtype) if ctx.needs_input_grad[0] else None
        grad_head = torch.empty_like(lm_head) if ctx.needs_input_grad[1] else None
        block = max(ctx.chunk * vocabulary // max(n, 1), 1)  # as many logits at a time as in forward
        with torch.autocast(hidden_p.device.type, enabled=False):
            hidden, hidden_q = _operand(hidden_p), None if grad_kl is None else _operand(hidden_q)
            for start in range(0, vocabulary, block):
                rows = slice(start, start + block)
                head = _operand(lm_head[rows])
                logp = _product(hidden, head.t()).div_(ctx.temperature).sub_(lse_p[:, None])  # [N, block]
                p = logp.exp()
                dz = torch.zeros_like(p)
                if grad_entropy is not None:
                    # dH/dz_j = -p_j (log p_j + H)
                    dz -= (logp + entropy[:, None]).mul_(grad_entropy[:, None])
                if grad_kl is not None:
                    # dD/dz_j = p_j (w_j a_j - sum_o w_o p_o a_o)
                    logq = _product(hidden_q, _operand(lm_head_q[rows]).t()).div_(ctx.temperature).sub_(lse_q[:, None])
                    dz += logp.sub_(logq).mul_(weights[rows]).sub_(wpa[:, None]).mul_(grad_kl[:, None])
                if grad_logp is not None:
                    # d log p_t / dz_j = [j = t] - p_j
                    dz.sub_(grad_logp[:, None])
                dz.mul_(p)
                if grad_logp is not None:
                    # Every row adds something somewhere: to choose rows would make the host wait for the GPU.
                    hit = (targets >= start) & (targets < start + block)
                    place = (targets - start).clamp(0, len(head) - 1)[:, None]
                    dz.scatter_add_(1, place, torch.where(hit, grad_logp, 0)[:, None])
                dz = dz.div_(ctx.temperature).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden += _product(dz, head)
                if grad_head is not None:
                    grad_head[rows] = torch.mm(dz.t(), hidden)
        return grad_hidden, grad_head, *[None] * 7  # autograd casts them to the inputs' types


def same_dtype(hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype, or without autocast in the wider one; a sharded projection as a whole."""
    if hasattr(lm_head, "full_tensor"):  # a DTensor, whose package takes a second to import
        from torch.distributed.tensor import Partial

        mesh = lm_head.device_mesh
        lm_head = lm_head.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if lm_head.requires_grad:
            lm_head.register_hook(lambda grad: grad / mesh.size())  # averaged over processes, as DDP and FSDP do
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, lm_head.dtype)
    return hidden.to(dtype), lm_head.to(dtype)


def logits(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """hidden [N, H] and projection [V, H] of one type (see `same_dtype`) -> [N, V] in float32 or better."""
    return _product(_operand(hidden), _operand(lm_head).t()).to(_inner(hidden.dtype))  # autocast on a CPU rounds it


def chunked_weighted_kl(
    hidden_p: Tensor,
    hidden_q: Tensor | None,
    lm_head: Tensor,
    weights: Tensor | None,
    chunk: int,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    lm_head_q: Tensor | None = None,
    time_tokens: Tensor | None = None,
) -> TokenStats:
    """`weighted_kl`, log-probabilities and entropy from hidden states, with the logits of `chunk` tokens at a time.

    hidden_p, hidden_q: [N, H], last hidden states of policy and reference; without a reference (None) there is no KL,
    and weights may be None. lm_head: [V, H], also tied or sharded (DTensor: its gradient is averaged over the shards'
    processes); lm_head_q: the reference's, if it is not the same. weights: [V]. targets: long [N], the sampled tokens.
    temperature: that of sampling. time_tokens: long ids, to log the KL on time and on text apart; all is text without
    them.

    Gradients go to hidden_p and lm_head through kl, logp and entropy. Memory beyond inputs and gradients is about five
    times chunk * V floats.
    """
    hidden_p, lm_head_p = same_dtype(hidden_p, lm_head)
    is_time = None
    if hidden_q is not None:
        hidden_q, lm_head_q = same_dtype(hidden_q.detach(), (lm_head if lm_head_q is None else lm_head_q).detach())
        weights = weights.to(_inner(hidden_p.dtype))  # [V]
        is_time = torch.zeros_like(weights)  # [V]
        if time_tokens is not None:
            is_time[time_tokens] = 1
    with torch.autocast(hidden_p.device.type, enabled=False):
        kl, logp, entropy, ref_logp, kl_time, kl_text = _ChunkedKL.apply(
            hidden_p, lm_head_p, hidden_q, lm_head_q, weights, is_time, targets, chunk, temperature
        )
    return TokenStats(kl, logp, ref_logp, entropy, kl_time, kl_text)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log q of sampled tokens: unbiased for KL(p || q), but its gradient is 0 on average: no penalty at all."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 of sampled tokens: biased, but its gradient is unbiased for that of KL(p || q)."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor, clamp: float = 0.0) -> Tensor:
    """q / p - 1 - log(q / p) of sampled tokens: unbiased for KL(p || q), but its gradient is that of KL(q || p).

    clamp: values above it are cut to it, and get no gradient: biased then; 0 for none. The released Zoom-Zero code
    clamps to [-10, 10]; the lower end is never reached.
    """
    b = (ref_logp - logp).clamp(max=LARGEST)  # log(q / p)
    estimate = torch.expm1(b) - b
    return estimate.clamp(max=clamp) if clamp else estimate


def penalty(tokens: TokenStats, config: Any) -> Tensor | None:
    """What each token pays for its distance from the reference, [N], beta included: exact, or an estimate."""
    if config.kl == "none":
        return None
    if config.kl == "exact":
        return tokens.kl  # the weights are the betas
    if config.kl == "k3":
        return config.beta * k3(tokens.logp, tokens.ref_logp, config.kl_clamp)
    return config.beta * {"k1": k1, "k2": k2}[config.kl](tokens.logp, tokens.ref_logp)


TIME_SEPARATORS = (".", ",", ":", "-")


def time_token_ids(tokenizer, separators: tuple[str, ...] = TIME_SEPARATORS) -> Tensor:
    """Ids of the tokens that times are written with: long [n], sorted.

    A token counts if its text, without spaces around it, consists of ASCII digits only, or is exactly one of the
    separators. What else stands around times is left to the text: the lone space (it decides that a number begins, not
    which), brackets, "s", and " to", which is first of all an English word. Timestamp tokens of other vocabularies can
    be given as separators. Source: LongVTG-R1 section 3.2, which names digits, time separators and timestamp tokens but
    lists none.
    """
    ids = []
    for token, index in tokenizer.get_vocab().items():
        text = token.strip("Ġ▁ ")  # Ġ and ▁ are the space of byte-level BPE and SentencePiece
        if (text.isascii() and text.isdigit()) or text in separators:
            ids.append(index)
    return torch.tensor(sorted(ids), dtype=torch.long)
