"""What a forward pass costs: floating-point operations, counted from the shapes."""

from __future__ import annotations

import math

import torch

from engine.families import family_of
from video import Clip


def forward_flops(model, clip: Clip, n_prompt: int, n_written: int, n_past: int = 0, apart: bool = False) -> float:
    """Floating-point operations of one forward pass over a prompt of P tokens with a clip, and over T written tokens.

    `n_past`: S tokens before them, whose keys and values are cached. `apart`: see `patch_grids`.

    Two per weight and token (n_layers and n_blocks count the weights of the language layers and the vision blocks), and
    two products of 2 d operations for each pair of positions that attention compares (d: all heads together):

        vision    2 (n_embed + n_blocks) patches + 2 n_merger patches / 4 + sum over blocks and windows 4 d length^2
        language  2 n_layers (P + T - 1) + 2 n_head T + layers d (2 P^2 + sum over t < T of 4 (P + t) + 4 S (P + T - 1))
                  - 2 n_asked (P - 1) - d (2 P^2 - 4 P + 4 S (P - 1))

    The last token is chosen but not fed back, and only chosen tokens go through the output projection. The prompt's
    attention is causal: half of all pairs. Of the prompt's tokens but the last one, the last layer computes keys and
    values alone, not what its other n_asked weights are for.
    """
    visual, layers = model.model.visual, model.model.language_model.layers
    grids = patch_grids(clip, apart)
    patches = sum(map(math.prod, grids))
    compared = family_of(model.config).attention_flops(visual, grids) if patches else 0
    mergers = sum(weights(part) for name, part in visual.named_children() if "merger" in name)
    flops = 2 * (weights(visual.patch_embed) + weights(visual.blocks)) * patches
    flops += 2 * mergers * patches / 4 + compared
    P, T, d = n_prompt, n_written, layers[0].self_attn.q_proj.out_features
    flops += 2 * weights(layers) * (P + T - 1) + 2 * weights(model.lm_head) * T
    flops += len(layers) * d * (2 * P**2 + 4 * ((T - 1) * P + T * (T - 1) / 2) + 4 * n_past * (P + T - 1))
    flops -= 2 * asked_weights(layers[-1]) * (P - 1) + d * (2 * P**2 - 4 * P + 4 * n_past * (P - 1))
    return float(flops)


def asked_weights(layer: torch.nn.Module) -> int:
    """Weights of a layer but those of its products for keys and values."""
    attn = layer.self_attn
    return weights(layer) - weights(attn.k_proj) - weights(attn.v_proj)


def patch_grids(clip: Clip, apart: bool = False) -> list[tuple[int, int, int]]:
    """Pairs of frames, and rows and columns of patches, of a clip as the vision tower takes it; `apart`: of each of its
    frames, shown as a clip of its own.
    """
    n, _, height, width = clip.frames.shape
    rows, columns = height // clip.patch, width // clip.patch
    return [(1, rows, columns)] * n if apart else [((n + 1) // 2, rows, columns)]


def weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
