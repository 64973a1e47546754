"""LoRA: adapters, the reference they leave, what is trained, kept and merged."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import loud_model, read_metrics
from passes import CLIP, random_responses, random_video
from runs import assert_same_run, in_two, weights
from safetensors.torch import load_file
from torch import nn

import config as configuration
import train
from config import ConfigError
from engine import lora
from engine.loading import load
from harness.run import TrainingError
from harness.setup import load_run, new_optimizer
from policy import ModelError, Policy, build_prompt, encode_videos, group_hidden
from train import reference_hidden

peft = pytest.importorskip("peft")
LORA = ["--lora_rank", "4", "--lr", "0.01", "--beta", "0.05"]
FROZEN = ["--train_vision", "false"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=[("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", True)], ids=["text", "all", "qwen3"])
def kind(request) -> tuple[str, bool]:
    """A family, and whether its vision tower has adapters too."""
    return request.param


def with_adapters(tokenizer, kind, seed: int = 0):
    family, vision = kind
    model = loud_model(tokenizer, family=family)
    lora.add_adapters(model, 3, 6.0, TARGETS, vision, seed)
    return model


@pytest.fixture
def adapted(tokenizer, kind):
    """A model with adapters that have been trained a little, and the same without."""
    model = with_adapters(tokenizer, kind)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith(lora.B):
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model, loud_model(tokenizer, family=kind[0])


@pytest.fixture
def scene(vocabulary, adapted):
    """Two prompts with clips, as the family is shown them, and three responses each."""
    texts, clips = (
        (f"{CLIP} red <think>", f"a b c {CLIP} blue"),
        (random_video(0, 4, 56, 84), random_video(1, 2, 28, 56)),
    )
    prompts = [
        build_prompt(vocabulary.ids(text), [clip], adapted[1].config, vocabulary)
        for text, clip in zip(texts, clips, strict=True)
    ]
    return prompts, *random_responses(2, [[5, 1, 7], [3, 7, 2]], len(vocabulary.tokenizer))


def test_adapters_off_are_the_model_that_it_began_as_to_the_last_bit(adapted, scene, kind):
    model, base = adapted
    with torch.no_grad():
        off, on = torch.zeros(0), group_hidden(model, *scene)
        with lora.adapters_off(model):
            off, seen = group_hidden(model, *scene), encode_videos(model, scene[0][0].videos)[0]
        assert torch.equal(off, group_hidden(base, *scene))
        assert torch.equal(seen, encode_videos(base, scene[0][0].videos)[0])
        assert torch.equal(seen, encode_videos(model, scene[0][0].videos)[0]) != kind[1]
        assert (on - off).abs().max() > 0.1 and torch.equal(group_hidden(model, *scene), on)


def test_new_adapters_change_nothing_and_are_drawn_from_the_seed_alone(tokenizer, scene, kind):
    models = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)
        models.append(with_adapters(tokenizer, kind, seed))
    one, same, other = (dict(model.named_parameters()) for model in models)
    name = next(name for name in one if name.endswith(lora.A))
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    with torch.no_grad():
        base = loud_model(tokenizer, family=kind[0])
        assert torch.equal(group_hidden(models[0], *scene), group_hidden(base, *scene))


def test_merged_weights_are_a_model_without_adapters_that_computes_the_same(adapted, scene):
    model, base = adapted
    base.load_state_dict(lora.merged(dict(model.state_dict()), 6.0 / 3))
    with torch.no_grad():
        torch.testing.assert_close(group_hidden(base, *scene), group_hidden(model, *scene), atol=2e-4, rtol=1e-4)


def test_the_adapters_alone_have_gradients_those_of_merged_weights_by_the_chain_rule(adapted, scene, kind):
    """Of W + s B A: the gradient of A is s B' dW, that of B s dW A'. Activations are computed again, or kept."""
    model, base = adapted[0].double(), adapted[1].double()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = [name.removesuffix(lora.A) for name in adapters if name.endswith(lora.A)]
    linear = {name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    assert set(layers) == {
        name for name in linear if (kind[1] if "visual" in name else name.rpartition(".")[2] in TARGETS)
    }
    with torch.no_grad():
        for layer in layers:
            base.get_submodule(layer).weight += 2 * adapters[layer + lora.B] @ adapters[layer + lora.A]
    recomputing = Policy(model).train()
    recomputing.checkpoint_activations()
    for policy in (recomputing, Policy(base)):
        policy(*scene, lambda hidden, lm_head: (hidden * torch.linspace(-1, 1, hidden.shape[1])).sum()).backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == adapters.keys()
    for layer in layers:
        whole, (a, b) = base.get_submodule(layer).weight.grad, (adapters[layer + end] for end in (lora.A, lora.B))
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(a.grad, 2 * b.detach().T @ whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(b.grad, 2 * whole @ a.detach().T, atol=1e-4, rtol=1e-4)


def test_without_a_clip_every_adapter_takes_part(adapted, vocabulary):
    """As collectives of several processes need it."""
    model, _ = adapted
    prompt = build_prompt(vocabulary.ids("red"), [], model.config)
    Policy(model)(
        [prompt], *random_responses(0, [[3]], len(vocabulary.tokenizer)), lambda hidden, _: hidden.sum()
    ).backward()
    assert all((weight.grad is not None) == (".lora_" in name) for name, weight in model.named_parameters())


@pytest.mark.parametrize("vision", [[], FROZEN], ids=["all", "text"])
def test_a_run_leaves_merged_weights_and_adapters_that_peft_loads(recipe, tmp_path, talker, monkeypatch, vision):
    """On the way, its reference is the model that it began from, whatever the vision tower has learned."""
    base, _ = load(str(talker))
    same = []

    def noted(run, batch):
        states = reference_hidden(run, batch)
        with torch.no_grad():
            known = group_hidden(base, batch.prompts, batch.responses, batch.mask, batch.observations)
        same.append(torch.equal(states, known))
        return states

    monkeypatch.setattr(train, "reference_hidden", noted)
    train.main(["--config", str(recipe), *LORA, *vision])
    assert len(same) == 4 and all(same)
    out = tmp_path / "run"
    assert all(row["kl/text"] < 1e-9 for row in read_metrics(out)[:1]) and read_metrics(out)[1]["kl/text"] > 1e-9
    parts = [base.model.language_model] if vision else [base.model]
    adapted = sum(isinstance(layer, nn.Linear) for part in parts for layer in part.modules())
    with_adapters = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().state_dict()
    start, changed = load(str(talker))[0].state_dict(), 0
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, with_adapters[name], atol=1e-6, rtol=0)
        changed += not torch.equal(weight, start[name])
    assert changed == adapted
    saved = {name for path in (out / "state").glob("*.safetensors") for name in load_file(path)}
    assert saved and all(".lora_" in name for name in saved)  # and their moments


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(recipe, tmp_path):
    common = ["--config", str(recipe), *LORA, "--gradient_checkpointing", "--zoom_judge", "reference"]
    train.main([*common, "--out", str(tmp_path / "whole")])
    train.main([*common, "--steps", "1"])
    train.main([*common, "--steps", "2", "--resume"])
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(TrainingError, match="state"):
        train.main([*common, "--lora_rank", "2", "--steps", "3", "--resume"])


def test_frozen_weights_are_in_half_precision_and_trained_ones_are_not(recipe):
    config = configuration.parse(["--config", str(recipe), *LORA, "--mixed_precision", "bf16"])
    run = load_run(config, Accelerator(cpu=True, mixed_precision="bf16"))
    kinds = {(".lora_" in name, weight.dtype) for name, weight in run.model.model.visual.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert kinds == {(".lora_" in name, weight.dtype) for name, weight in run.model.named_parameters()}
    assert run.reference is run.model


@pytest.mark.processes
@pytest.mark.parametrize("shards", [False, True], ids=["copies", "shards"])
def test_two_processes_train_adapters_like_one(recipe, tmp_path, shards):
    common = ["--config", recipe, *LORA, "--prompts_per_step", "4"]
    train.main([*map(str, common), "--out", str(tmp_path / "one")])
    for more in (["--steps", "1"], ["--resume"]):
        in_two(tmp_path / "errors", *common, "--out", tmp_path / "two", *more, shards=shards)
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=2e-4)
    saved = [load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()


def test_what_cannot_be_adapted_is_refused_by_name(recipe, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="its own reference: it needs reference_device = same"):
        configuration.parse(["--config", str(recipe), *LORA, "--reference_device", "cpu"])
    with pytest.raises(ModelError, match="no linear layer is called qproj, lm_head; there are q_proj, k_proj"):
        lora.add_adapters(loud_model(tokenizer), 4, 8.0, ["qproj", "v_proj", "lm_head"], True, 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        lora.add_adapters(loud_model(tokenizer), 4, 8.0, ["v_proj"], True, 0)


def test_eight_bits_need_a_gpu(recipe, tokenizer):
    config = replace(configuration.parse(["--config", str(recipe)]), optimizer="adamw8bit")
    with pytest.raises(ModelError, match="adamw8bit needs whole weights on a GPU"):
        new_optimizer(Policy(loud_model(tokenizer)), config, Accelerator(cpu=True))
