"""Attention in which the G responses of a group share the keys and values of their prompt.

Prompts and responses lie in one row without padding: first all prompts, then all responses in the order of their
prompts. `Tree` says where they are. A prompt's tokens see those before them in the prompt; a response's tokens see the
whole prompt, and those before them in the response: a tree with the prompt as its stem.

Softmax over two sets of keys can be computed apart and joined. With o_i = softmax(s_i) v_i and l_i = logsumexp(s_i),

    l = log(exp(l_1) + exp(l_2))        o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

so a response's attention to its prompt is one dense product of all queries of the group with the prompt's keys, where
nothing is masked, and its attention to itself is an ordinary causal one. Neither needs a mask of size tokens x tokens,
and no key is copied per response. In the backward pass exp(s_i - l) are the final probabilities, so each set's
gradients follow from the joint o and l alone, with the same fast kernels.

A model's last layer owes its output to few of a row: the last token of each prompt, and the responses (`Tree.ends`).
There are then fewer queries than keys.

`GroupCache` is the same tree while it grows: by one token per response and step, or by what a response is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

# In a step of decoding, a stem with so many scores (queries of its group times its tokens) is attended to by a flash
# kernel of its own: the unfused softmax writes and reads each score ten times. Fewer cost less than one more launch.
# float("inf") switches it off.
FLASH_STEM = 2**18


@dataclass(frozen=True)
class Tree:
    """The lengths of the prompts in a row, and of the responses that follow them, grouped by prompt."""

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...] = ()
    _copies: dict[tuple[torch.device, str], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def ends(self) -> Tree:
        """The row of what is asked for: the last token of each prompt, and all of the responses."""
        return Tree((1,) * len(self.prompts), self.responses)

    @cached_property
    def stems(self) -> list[slice]:
        """Where each prompt is."""
        return _slices(self.prompts, 0)

    @cached_property
    def groups(self) -> list[slice]:
        """Where the responses of each prompt are, all together."""
        return _slices([sum(lengths) for lengths in self.responses], sum(self.prompts))

    @cached_property
    def lengths(self) -> Tensor:
        """The length of each response, int64 [R]."""
        return torch.tensor([n for lengths in self.responses for n in lengths], dtype=torch.long)

    @cached_property
    def slots(self) -> Tensor:
        """Where each response token goes when the responses are padded on the right to [R * longest]."""
        longest = int(self.lengths.max())
        return (torch.arange(longest) < self.lengths[:, None]).flatten().nonzero().flatten()

    @cached_property
    def asked(self) -> Tensor:
        """Where the tokens of `ends` are in this row, int64 [B + R]."""
        start, lengths = sum(self.prompts), sum(map(sum, self.responses))
        return torch.cat([torch.tensor(self.prompts).cumsum(0) - 1, torch.arange(start, start + lengths)])

    def on(self, device: torch.device, name: str) -> Tensor:
        """`slots` or `asked`, copied to a device once, not for every layer: the host waits for such a copy."""
        if (device, name) not in self._copies:
            self._copies[device, name] = getattr(self, name).to(device)
        return self._copies[device, name]


def _slices(lengths: Sequence[int], start: int) -> list[slice]:
    slices = []
    for n in lengths:
        slices.append(slice(start, start + n))
        start += n
    return slices


# ---------------------------------------------------------------- one set of keys


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of its scores.

    q [n, heads, L, d], k and v [n, key heads, S, d] -> [n, heads, L, d], [n, heads, L].
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if _flash(q):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return attend_plainly(q, k, v, causal, scale)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v from these keys, which may be a part of all keys that `out` and `lse` are about."""
    lse = lse.contiguous()  # CUDA's kernel reads it as dense, whatever its strides
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    if _flash(q):
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that does not happen
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
        )
    return attend_backward_plainly(grad, q, k, v, out, lse, causal, scale)


def _flash(q: Tensor) -> bool:
    """Whether the GPU's flash kernels take these."""
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and fits


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [..., L, S] in float32 or better, of half-precision operands too: in bfloat16, a score of 60 is off by up
    to 0.13.
    """
    wide = _wide(a.dtype)
    if a.is_cuda and a.dtype != wide:  # only there can it come out wider than it went in
        return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=wide).unflatten(0, a.shape[:-2])
    return (a.to(wide) @ b.to(wide)).to(wide)  # autocast on a CPU rounds it


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[n, key heads, heads per key head, L, S] in float32 or better."""
    n, _, length, d = q.shape
    grouped = q.view(n, k.shape[1], -1, length, d)
    wide = _wide(q.dtype)
    scores = (grouped.to(wide) @ k[:, :, None].to(wide).transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` as it is defined, for devices and types without a fast kernel."""
    scores = _scores(q, k, causal, scale)
    out = scores.softmax(-1).to(v.dtype) @ v[:, :, None]
    return out.view(q.shape), scores.logsumexp(-1).view(q.shape[:3])


def attend_backward_plainly(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` as it is defined."""
    scores = _scores(q, k, causal, scale)
    grouped = scores.shape[:4]
    p = (scores - lse.view(grouped)[..., None]).exp()  # [n, key heads, heads per key head, L, S]
    g, queries = grad.view(*grouped, -1).to(p.dtype), q.view(*grouped, -1).to(p.dtype)
    shift = (g * out.view(g.shape)).sum(-1, keepdim=True)
    ds = p * (g @ v[:, :, None].to(p.dtype).transpose(-1, -2) - shift) * scale
    dq = ds @ k[:, :, None].to(p.dtype)
    dk, dv = (ds.transpose(-1, -2) @ queries).sum(2), (p.transpose(-1, -2) @ g).sum(2)
    return dq.view(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention [..., d] to two sets of keys, and the log-sum-exp [...] of all scores, from those of each set."""
    lse = torch.logaddexp(one[1], other[1])
    return (one[1] - lse).exp()[..., None] * one[0] + (other[1] - lse).exp()[..., None] * other[0], lse


# ---------------------------------------------------------------- the tree


class TreeAttention(torch.autograd.Function):
    """q [heads, M, d], k and v [key heads, N, d] of a row -> [heads, M, d]; M is N, or that of the row's `ends`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float) -> Tensor:
        asking = tree if q.shape[1] == k.shape[1] else tree.ends
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=_wide(q.dtype), device=q.device)
        for end, stem in zip(asking.stems, tree.stems, strict=True):
            o, log = attend(*_part((q,), end), *_part((k, v), stem), asking is tree, scale)
            out[:, end], lse[:, end] = o[0], log[0]
        if tree.responses and tree.lengths.any():
            slots = tree.on(q.device, "slots")
            own, own_lse = attend(*_padded((q,), asking, slots), *_padded((k, v), tree, slots), True, scale)
            own, own_lse = _packed(own, slots), _packed(own_lse, slots)
            start = sum(asking.prompts)
            for stem, group in zip(tree.stems, asking.groups, strict=True):
                if group.start == group.stop:
                    continue
                o, log = attend(q[None, :, group], k[None, :, stem], v[None, :, stem], False, scale)
                here = slice(group.start - start, group.stop - start)
                joint, lse[:, group] = join((o[0], log[0]), (own[:, here], own_lse[:, here]))
                out[:, group] = joint.to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.asking, ctx.scale = tree, asking, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tree, asking, scale = ctx.tree, ctx.asking, ctx.scale
        grad = grad.contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for end, stem in zip(asking.stems, tree.stems, strict=True):
            (g, queries), (keys, values) = _part((grad, q), end), _part((k, v), stem)
            grads = attend_backward(g, queries, keys, values, *_part((out, lse), end), asking is tree, scale)
            dq[:, end], dk[:, stem], dv[:, stem] = (x[0] for x in grads)
        if tree.responses and tree.lengths.any():
            slots = tree.on(q.device, "slots")
            g, queries, o, log = _padded((grad, q, out, lse), asking, slots)
            grads = attend_backward(g, queries, *_padded((k, v), tree, slots), o, log, True, scale)
            for total, row, own in zip((dq, dk, dv), (asking, tree, tree), grads, strict=True):
                total[:, sum(row.prompts) :] = _packed(own, slots)
            for stem, group in zip(tree.stems, asking.groups, strict=True):
                if group.start == group.stop:
                    continue
                (g, queries), (keys, values) = _part((grad, q), group), _part((k, v), stem)
                grads = attend_backward(g, queries, keys, values, *_part((out, lse), group), False, scale)
                for total, where, x in zip((dq, dk, dv), (group, stem, stem), grads, strict=True):
                    total[:, where] += x[0]
        return dq, dk, dv, None, None


def _part(row: Sequence[Tensor], where: slice) -> list[Tensor]:
    """A stretch of each of these [heads, N, ...] as a batch of one."""
    return [x[None, :, where] for x in row]


def _padded(row: Sequence[Tensor], tree: Tree, slots: Tensor) -> list[Tensor]:
    """The responses in each of these rows [heads, N, ...] -> [R, heads, longest, ...], padded with zeros."""
    count, longest, start = len(tree.lengths), int(tree.lengths.max()), sum(tree.prompts)
    found = []
    for x in row:
        padded = x.new_zeros(x.shape[0], count * longest, *x.shape[2:])
        padded[:, slots] = x[:, start:]
        found.append(padded.view(x.shape[0], count, longest, *x.shape[2:]).transpose(0, 1).contiguous())
    return found


def _packed(x: Tensor, slots: Tensor) -> Tensor:
    """The reverse of `_padded`."""
    return x.transpose(0, 1).flatten(1, 2)[:, slots]


# ---------------------------------------------------------------- token by token


@dataclass(frozen=True)
class Stretch:
    """Tokens of one response that are computed together: response `g` of prompt `b`, which has `stem` tokens, has
    `start` tokens itself and gets `length` more.
    """

    b: int
    g: int
    stem: int
    start: int
    length: int


def asked_of(row: Tree | Sequence[Stretch] | None, device: torch.device) -> Tensor | None:
    """The tokens of a row that predict one: those of a tree's `ends`, the last of each stretch; None: all of them."""
    if isinstance(row, Tree):
        return row.on(device, "asked")
    return row if row is None else torch.tensor([s.length for s in row], device=device).cumsum(0) - 1


class GroupCache:
    """Keys and values of B prompts, once each, and of their G responses, in static buffers.

    Per layer: those of the prompts [B, key heads, P, d], and of the responses [B, key heads, G, `capacity`, d], both
    padded on the right; `stems` are the prompts' lengths. Before each step, `place` says where the next token of each
    response goes, so that responses may differ in length. `attend` reads and writes these tensors and asks the host
    nothing: it can be captured in a CUDA graph. `extend` adds many tokens to some responses. Rows of responses that
    have ended can be dropped (`keep`).
    """

    def __init__(self, tree: Tree, group_size: int, capacity: int):
        self.tree, self.group_size, self.capacity = tree, group_size, capacity
        self.layers: dict[int, list[Tensor]] = {}  # prompt keys, prompt values, response keys, response values
        self.stems = list(tree.prompts)
        lengths = torch.tensor(self.stems)
        self.padding = torch.arange(int(lengths.max())) >= lengths[:, None]  # [B, P]

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take over a row of prompts: k and v [key heads, N, d]."""
        heads, _, d = k.shape
        batch, longest = self.padding.shape
        prompts = [x.new_zeros(batch, heads, longest, d) for x in (k, v)]
        for stored, x in zip(prompts, (k, v), strict=True):
            for b, stem in enumerate(self.tree.stems):
                stored[b, :, : stem.stop - stem.start] = x[:, stem]
        own = [k.new_zeros(batch, heads, self.group_size, self.capacity, d) for _ in range(2)]
        self.layers[layer] = prompts + own
        self.padding = self.padding.to(k.device)

    def place(self, slots: Tensor, window: int) -> None:
        """The next token of each response goes to `slots` int64 [B, G], and sees what is before it in its first
        `window` slots.
        """
        later = torch.arange(window, device=slots.device) > slots[..., None]
        padding = self.padding[:, None].expand(*slots.shape, -1)
        unseen = torch.cat([padding, later], dim=-1)[:, None, :, None]  # [B, 1, G, 1, P + window]
        self.mask = torch.zeros(unseen.shape, device=slots.device).masked_fill_(unseen, -torch.inf)  # added to scores
        self.slots, self.window = slots[:, None, :, None, None], window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One more token per response: q [heads, B * G, d], k and v [key heads, B * G, d] -> [heads, B * G, d]."""
        prompt_k, prompt_v, own_k, own_v = self.layers[layer]
        batch, heads, size, _, d = own_k.shape
        for own, x in ((own_k, k), (own_v, v)):
            own.scatter_(3, self.slots.expand(-1, heads, -1, -1, d), x.view(heads, batch, size, 1, d).transpose(0, 1))
        own_k, own_v = own_k[:, :, :, : self.window], own_v[:, :, :, : self.window]
        grouped = q.view(heads, -1, batch, size, d).permute(2, 0, 3, 1, 4)  # [B, key heads, G, heads per key head, d]
        if _flash(q) and len(q) * size * prompt_k.shape[2] >= FLASH_STEM:
            out = self._attend_by_stem(grouped, prompt_k, prompt_v, own_k, own_v, scale)
        else:
            out = self._attend_at_once(grouped, prompt_k, prompt_v, own_k, own_v, scale)
        return out.permute(1, 3, 0, 2, 4).reshape(q.shape).to(q.dtype)

    def _attend_at_once(
        self, grouped: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, scale: float
    ) -> Tensor:
        """One softmax over stems and own keys: grouped [B, key heads, G, heads per key head, d] -> the same shape."""
        to_prompt = _product(grouped.flatten(2, 3), prompt_k.transpose(-1, -2)).view(*grouped.shape[:4], -1)
        to_itself = _product(grouped, own_k.transpose(-1, -2))
        scores = torch.cat([to_prompt, to_itself], dim=-1)
        p = torch.add(self.mask, scores, alpha=scale).softmax(-1).to(own_v.dtype)
        from_prompt, from_itself = p.split([prompt_k.shape[2], self.window], dim=-1)
        return _product(from_prompt.flatten(2, 3), prompt_v).view(grouped.shape) + _product(from_itself, own_v)

    def _attend_by_stem(
        self, grouped: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, scale: float
    ) -> Tensor:
        """The same with a fused kernel per stem, in which all queries of the group that share a key head are rows of
        one head: nothing is masked, padding is left out, and each key of the stem is read once.

        With output o and log-sum-exp l, a stem is one more key for the own softmax, with score l and value o.
        """
        queries, found = grouped.flatten(2, 3), []
        for b, n in enumerate(self.stems):
            here = slice(b, b + 1)
            found.append(attend(queries[here], prompt_k[here, :, :n], prompt_v[here, :, :n], False, scale))
        out, lse = (torch.cat(parts).view(*grouped.shape[:4], -1) for parts in zip(*found, strict=True))
        to_itself = torch.add(self.mask[..., -self.window :], _product(grouped, own_k.transpose(-1, -2)), alpha=scale)
        own, stem = torch.cat([to_itself, lse.to(to_itself)], dim=-1).softmax(-1).split([self.window, 1], dim=-1)
        return _product(own.to(own_v.dtype), own_v) + stem * out

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, stretches: Sequence[Stretch], scale: float) -> Tensor:
        """More tokens of some responses, one stretch after the other in a row: q [heads, M, d], k and v [key heads, N,
        d] -> [heads, M, d]; M is N, or the number of stretches, of whose last tokens the queries are.
        """
        prompt_k, prompt_v, own_k, own_v = self.layers[layer]
        out, first, whole = torch.empty_like(q), 0, q.shape[1] == k.shape[1]
        for n, s in enumerate(stretches):
            here = slice(first, first + s.length)
            asking = here if whole else slice(n, n + 1)
            (queries,), (keys, values) = _part((q,), asking), _part((k, v), here)
            past = []
            for stem, own, x in ((prompt_k, own_k, keys), (prompt_v, own_v, values)):
                past.append(torch.cat([stem[s.b, :, : s.stem], own[s.b, :, s.g, : s.start]], dim=1)[None])
                own[s.b, :, s.g, s.start : s.start + s.length] = x[0]
            joint, _ = join(attend(queries, *past, False, scale), attend(queries, keys, values, whole, scale))
            out[:, asking] = joint[0].to(out.dtype)
            first = here.stop
        return out

    def reserve(self, capacity: int) -> None:
        """Make room for so many tokens per response."""
        for tensors in self.layers.values():
            tensors[2:] = [nn.functional.pad(own, (0, 0, 0, capacity - self.capacity)) for own in tensors[2:]]
        self.capacity = capacity

    def keep(self, prompts: Tensor, responses: Tensor) -> None:
        """Keep these of the prompts [b] and, for each, these of its responses [b, g]; indices into the current ones, on
        the CPU.
        """
        self.stems = [self.stems[b] for b in prompts.tolist()]
        prompts, responses = prompts.to(self.padding.device), responses.to(self.padding.device)
        self.padding = self.padding[prompts]
        for tensors in self.layers.values():
            for i in range(2):
                tensors[i] = tensors[i][prompts] if len(prompts) < len(tensors[i]) else tensors[i]
                tensors[2 + i] = tensors[2 + i][prompts[:, None], :, responses].transpose(1, 2).contiguous()


def tree_attention(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tree: Tree | Sequence[Stretch] | None,
    cache: GroupCache | None,
) -> Tensor:
    """What layer number `layer` calls: q [heads, M, d], k and v [key heads, N, d] of a row -> [heads, M, d].

    With a `Tree` the row is attended to as one, and kept if there is a `cache`. With a cache, the row can be stretches
    of some of its responses or, with None, one more token of each. M is N, or how many are `asked` for.
    """
    if tree is None:
        return cache.attend(layer, q, k, v, scale)
    if not isinstance(tree, Tree):
        return cache.extend(layer, q, k, v, tree, scale)
    if cache is not None:
        cache.prefill(layer, k, v)
    return TreeAttention.apply(q, k, v, tree, scale)
