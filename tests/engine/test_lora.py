"""LoRA: adapters, the reference they leave, what is trained, kept and merged."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import loud_model, read_metrics
from runs import assert_same_run, in_two, weights
from safetensors.torch import load_file

import config as configuration
import train
from config import ConfigError
from engine import lora
from engine.loading import load
from harness.run import TrainingError
from harness.setup import load_run, new_optimizer
from policy import ModelError, Policy, group_hidden

peft = pytest.importorskip("peft")
LORA = ["--train_vision", "false", "--lora_rank", "4", "--lr", "0.01", "--beta", "0.05"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def adapted(tokenizer):
    """A model with adapters that have been trained a little, and the same without."""
    model = loud_model(tokenizer)
    lora.add_adapters(model, 3, 6.0, TARGETS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith(lora.B):
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model, loud_model(tokenizer)


def test_adapters_off_are_the_model_that_it_began_as_to_the_last_bit(adapted, scene):
    model, base = adapted
    with torch.no_grad():
        off, on = torch.zeros(0), group_hidden(model, *scene)
        with lora.adapters_off(model):
            off = group_hidden(model, *scene)
        assert torch.equal(off, group_hidden(base, *scene))
        assert (on - off).abs().max() > 0.1 and torch.equal(group_hidden(model, *scene), on)


def test_new_adapters_change_nothing_and_are_drawn_from_the_seed_alone(tokenizer, scene):
    models = [loud_model(tokenizer) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(seed + 1)
        lora.add_adapters(model, 3, 6.0, TARGETS, seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    name = next(name for name in one if name.endswith(lora.A))
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    with torch.no_grad():
        assert torch.equal(group_hidden(models[0], *scene), group_hidden(loud_model(tokenizer), *scene))


def test_merged_weights_are_a_model_without_adapters_that_computes_the_same(adapted, scene):
    model, base = adapted
    base.load_state_dict(lora.merged(dict(model.state_dict()), 6.0 / 3))
    with torch.no_grad():
        torch.testing.assert_close(group_hidden(base, *scene), group_hidden(model, *scene), atol=2e-4, rtol=1e-4)


def test_the_adapters_alone_are_trained(adapted, scene):
    model, _ = adapted
    Policy(model)(*scene, lambda hidden, lm_head: hidden.square().mean()).backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == set(TARGETS)
    assert not any("visual" in name for name in trained)


def test_a_run_leaves_merged_weights_and_adapters_that_peft_loads(recipe, tmp_path, talker):
    train.main(["--config", str(recipe), *LORA])
    out = tmp_path / "run"
    assert all(row["kl/text"] < 1e-9 for row in read_metrics(out)[:1]) and read_metrics(out)[1]["kl/text"] > 1e-9
    base, _ = load(str(talker))
    with_adapters = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().state_dict()
    changed = 0
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, with_adapters[name], atol=1e-6, rtol=0)
        changed += not torch.equal(weight, load(str(talker))[0].state_dict()[name])
    assert changed == 7 * base.config.text_config.num_hidden_layers
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
    kinds = {(".lora_" in name, weight.dtype) for name, weight in run.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
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
    with pytest.raises(ConfigError, match="needs train_vision = false"):
        configuration.parse(["--config", str(recipe), "--lora_rank", "4"])
    with pytest.raises(ModelError, match="no linear layer is called qproj, lm_head; there are q_proj, k_proj"):
        lora.add_adapters(loud_model(tokenizer), 4, 8.0, ["qproj", "v_proj", "lm_head"], 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        lora.add_adapters(loud_model(tokenizer), 4, 8.0, ["v_proj"], 0)


def test_eight_bits_need_a_gpu(recipe, tokenizer):
    config = replace(configuration.parse(["--config", str(recipe)]), optimizer="adamw8bit")
    with pytest.raises(ModelError, match="adamw8bit needs whole weights on a GPU"):
        new_optimizer(Policy(loud_model(tokenizer)), config, Accelerator(cpu=True))
