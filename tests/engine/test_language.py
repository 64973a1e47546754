"""Tests of the language model's traversal: what is asked of the last layer, hooks, recomputation. That its results are
transformers' is tested with whole groups (tests/test_policy.py, tests/engine/test_qwen3_vl.py).
"""

from __future__ import annotations

import copy

import pytest
import torch
from passes import group_logp, separate_logp

from engine import language
from engine.attention import Tree
from engine.language import row_hidden
from policy import Policy, embed_prompts, group_hidden


def test_a_tree_gives_what_predicts_a_token(model64, scene):
    """The states after each prompt, and those of all response tokens, as in a row that is asked for whole."""
    prompts, _, _ = scene
    embeds, positions = embed_prompts(model64, prompts[:1])
    n, said = len(prompts[0]), 3
    whole = row_hidden(model64, embeds, positions, Tree((1,), ((n - 1,),)))
    assert len(whole) == n
    states = row_hidden(model64, embeds, positions, Tree((n - said,), ((said,),)))
    torch.testing.assert_close(states, whole[-said - 1 :], atol=1e-9, rtol=0)


def test_features_are_added_after_the_last_layer_too(model64, scene):
    """DeepStack's, of as many inner layers of the tower as the language model has; W is then a multiple of H."""
    prompts, _, _ = scene
    embeds, positions = embed_prompts(model64, prompts)
    deep = torch.linspace(-1, 1, embeds.numel() * 2, dtype=torch.float64).view(len(embeds), -1)
    tree = Tree(tuple(map(len, prompts)))
    states = row_hidden(model64, torch.cat([embeds, deep], dim=-1), positions, tree)
    layers, norm = model64.model.language_model.layers, model64.model.language_model.norm
    assert len(layers) == 2
    x = embeds
    for layer, features in zip(layers, deep.chunk(2, dim=-1), strict=True):
        cos, sin = model64.model.language_model.rotary_emb(x, positions[:, None])
        row = language.Row(cos.transpose(0, 1), sin.transpose(0, 1), tree, None)
        x = language.decoder_layer(layer, x, row) + features
    torch.testing.assert_close(states, norm(x)[tree.asked], atol=1e-9, rtol=0)


def test_layers_are_called_with_their_hooks_and_stay_transformers_own(model64, scene):
    prompts, ids, mask = scene
    model = copy.deepcopy(model64)
    alone = separate_logp(model, prompts[0], ids[0, 0][mask[0, 0]])
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda layer, given: seen.append(("before", layer.self_attn.layer_idx)))
        layer.register_forward_hook(lambda layer, given, out: seen.append(("after", layer.self_attn.layer_idx)))
    group_hidden(model, prompts, ids, mask)
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert torch.equal(separate_logp(model, prompts[0], ids[0, 0][mask[0, 0]]), alone)


def test_a_layer_that_fails_stays_transformers_own(model64, scene, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(language, "decoder_layer", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        group_hidden(model64, *scene)
    assert not any("forward" in vars(layer) for layer in model64.model.language_model.layers)


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_computed_twice_where_that_is_asked_for(model64, scene, monkeypatch, recompute):
    prompts, ids, mask = scene
    model, called, compute = copy.deepcopy(model64), [], language.decoder_layer
    monkeypatch.setattr(language, "decoder_layer", lambda layer, *rest: called.append(layer) or compute(layer, *rest))
    if recompute:
        Policy(model).checkpoint_activations()
    group_logp(model, prompts, ids, mask).sum().backward()
    assert len(called) == (4 if recompute else 2)
    with torch.no_grad():  # nothing to recompute for
        group_hidden(model, prompts, ids, mask)
    assert len(called) == (6 if recompute else 4)
