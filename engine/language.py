"""The language model of every family in our own traversal: rotary positions, decoder layers, DeepStack.

Weights and results are transformers'. The traversal is ours because a row of prompts and responses is a tree, because
the last layer owes its output only to what is asked for (the tokens that predict one, which are few beside a video's),
and because a step of decoding is nothing but some hundred small operations, to which transformers adds as many again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from engine.attention import GroupCache, Stretch, Tree, asked_of, tree_attention
from engine.qwen2_5_vl import rotate


@dataclass(frozen=True)
class Row:
    """What the layers share of a row of N tokens: cosines and sines [N, 1, d], and who sees whom (`tree_attention`)."""

    cos: Tensor
    sin: Tensor
    tree: Tree | Sequence[Stretch] | None
    cache: GroupCache | None


def row_hidden(
    model: PreTrainedModel,
    embeds: Tensor,
    positions: Tensor,
    tree: Tree | Sequence[Stretch] | None,
    cache: GroupCache | None = None,
) -> Tensor:
    """Hidden states of a row, from embeddings [N, W] and positions int64 [3, N]; see `tree_attention`.

    Of a `Tree` with B prompts, [B + R, H]: those after each prompt, and those of the R response tokens. Of stretches,
    one each, after their last tokens; of a token per response, [N, H]. W is the hidden size H, or a multiple of it,
    with what DeepStack adds after the first, second, ... layer.
    """
    language = model.model.language_model
    x, *deep = embeds.split(language.config.hidden_size, dim=-1)
    cos, sin = language.rotary_emb(x, positions[:, None])  # [1, N, d]: each frequency turns with time, row or column
    row = Row(cos.transpose(0, 1), sin.transpose(0, 1), tree, cache)
    for i, layer in enumerate(language.layers):
        asked = asked_of(tree, x.device) if i == len(language.layers) - 1 else None
        x = call_layer(layer, x, row, asked, language.gradient_checkpointing)
        if i < len(deep):
            x = x + (deep[i] if asked is None else deep[i][asked])
    return language.norm(x)


def call_layer(layer: nn.Module, x: Tensor, row: Row, asked: Tensor | None, recompute: bool) -> Tensor:
    """`decoder_layer`, called as the module that it is: FSDP2 gathers a layer's weights in its hooks. `recompute`: its
    activations in the backward pass.
    """
    compute = partial(decoder_layer, layer)
    if recompute and torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False)
    layer.forward = compute
    try:
        return layer(x, row, asked)
    finally:
        del layer.forward


def decoder_layer(layer: nn.Module, x: Tensor, row: Row, asked: Tensor | None = None) -> Tensor:
    """One layer: x [N, H] -> [N, H], or of the tokens `asked` int64 [M] alone, [M, H]: others give keys and values."""
    attn, cos, sin = layer.self_attn, row.cos, row.sin
    normed = layer.input_layernorm(x)
    k, v = (project(normed).unflatten(-1, (-1, attn.head_dim)) for project in (attn.k_proj, attn.v_proj))
    k = rotate(attn.k_norm(k) if hasattr(attn, "k_norm") else k, cos, sin)
    if asked is not None:
        x, normed, cos, sin = (z.index_select(0, asked) for z in (x, normed, cos, sin))
    q = attn.q_proj(normed).unflatten(-1, (-1, attn.head_dim))
    q = rotate(attn.q_norm(q) if hasattr(attn, "q_norm") else q, cos, sin)
    q, k, v = (z.transpose(0, 1).to(v.dtype) for z in (q, k, v))  # [heads, tokens, d]
    seen = tree_attention(attn.layer_idx, q, k, v, attn.scaling, row.tree, row.cache)
    x = x + attn.o_proj(seen.transpose(0, 1).flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))
