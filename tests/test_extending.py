"""What docs/extending.md adds works as it says: its added lines are read from the page and put into the modules."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from passes import CLIP, random_video, separate_logp
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import config as configuration
import infer
import prompts
import rewards
from advantage import credit
from annotations import formats
from annotations.samples import read_samples
from engine.loading import load
from policy import ModelError, build_prompt, group_hidden
from rollout import Group, Response, read_turn
from world import tiny

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"```diff\n--- (\S+)\n(.*?)```", PAGE, re.DOTALL))
TABLES = {
    "rewards.py": "FACETS",
    "prompts.py": "TEMPLATES",
    "annotations/formats.py": "FORMATS",
    "infer.py": "STRATEGIES",
    "engine/families.py": "FAMILIES",
}


@pytest.fixture
def extended(monkeypatch):
    """Adds a page's lines to a module, for as long as the test runs."""

    def add(file: str) -> None:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        before, _, after = re.split(rf"^( {TABLES[file]}\b.*= \{{\n)", DIFFS[file], maxsplit=1, flags=re.MULTILINE)
        code, entries = (re.sub(r"^\+", "", part, flags=re.MULTILINE) for part in (before, after))
        names: dict = {}
        exec(code, module.__dict__, names)
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=False)
        table = eval("{" + entries + "}", module.__dict__)
        for name, value in table.items():
            monkeypatch.setitem(getattr(module, TABLES[file]), name, value)

    return add


def test_each_is_one_entry_of_few_lines():
    assert DIFFS.keys() == TABLES.keys()
    for file, diff in DIFFS.items():
        assert 0 < sum(line.startswith("+") for line in diff.splitlines()) < 15, file


def test_a_reward_is_paid_and_credited(extended, recipe, samples, vocabulary):
    extended("rewards.py")
    config = configuration.parse(["--config", str(recipe), "--tokenadv", "paper"])
    replies = ["<think>red</think><answer>A</answer>", "<answer>A</answer>" + "red" * 200]
    responses = [Response([read_turn(torch.tensor(vocabulary.ids(reply)), vocabulary)]) for reply in replies]
    view = SimpleNamespace(sample=samples[0], info=SimpleNamespace(duration=20.0))
    group = Group(view, None, responses)
    group.rewards = rewards.facets(group, config)
    assert group.rewards["brief"] == [1.0, 0.0]
    assert all(len(set(values)) == 1 for name, values in group.rewards.items() if name != "brief")
    advantages = credit(group, config)
    # Of the four facets of a token, one has an advantage of 1 and -1; Eq. 5's weights still add up to 1.
    for g, response in enumerate(responses):
        torch.testing.assert_close(advantages[g, : len(response.ids)].abs(), torch.full((len(response.ids),), 0.25))


def test_a_template_is_asked_and_judged(extended, recipe):
    extended("prompts.py")
    config = configuration.parse(["--config", str(recipe), "--template", "terse"])
    assert config.template == "terse" and not config.multi_turn
    assert prompts.coarse_text("terse", "Why?", ["rain", "sun"]).startswith("Why? (A) rain (B) sun Think, answer")
    reply = "<think>It rains.</think><answer>A</answer><timestamp>2.0 to 6.0</timestamp>"
    assert prompts.format_ok(reply, "terse") and prompts.parse_spans(reply) == [(2.0, 6.0)]
    with pytest.raises(ValueError, match="'terse' needs options"):
        prompts.coarse_text("terse", "Why?", [])


def test_a_format_is_read_and_recognised(extended, tmp_path):
    extended("annotations/formats.py")
    assert "pairs" in formats.FORMATS
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"clip": "a.mp4", "from": 2, "to": 6.5, "what": "a dog jumps"}) + "\n")
    [sample] = read_samples(path, "pairs")
    assert (sample.video, sample.question, sample.evidence) == ("a.mp4", "a dog jumps", ((2.0, 6.5),))
    with pytest.raises(Exception, match="pairs"):
        read_samples(path, "nextgqa")


def test_a_strategy_answers_from_the_command_line(extended, recipe, talker, samples, tmp_path, capsys):
    extended("infer.py")
    question = ["--question", samples[0].question, "--options", *samples[0].options, "--video", samples[0].video]
    command = ["--config", str(recipe), "--model", str(talker), "--strategy", "middle-third", *question]
    infer.main([*command, "--out", str(tmp_path / "page.html")])
    assert "0:06" in capsys.readouterr().out and (tmp_path / "page.html").exists()


def test_a_family_is_loaded_and_equals_transformers(extended, vocabulary, tmp_path):
    with pytest.raises(ModelError, match="needs one of qwen2_5_vl, qwen3_vl"):
        config = tiny.qwen2_5_vl_config(vocabulary.tokenizer).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
        load(str(tmp_path))
    extended("engine/families.py")
    of_text, of_all = tiny.special_ids(vocabulary.tokenizer)
    text = tiny.TEXT | of_text | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 4, 4]}}
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 128}
    torch.manual_seed(0)
    built = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **of_all))
    built.save_pretrained(tmp_path)
    vocabulary.tokenizer.save_pretrained(tmp_path)
    model, _ = load(str(tmp_path))

    video = random_video(0, 4, 56, 84)
    prompt = build_prompt(vocabulary.ids(f"a{CLIP} red"), [video], model.config, vocabulary)
    assert prompt.positions[0].tolist() == [0, 1, *[2] * 6, *[3] * 6, 5, 6]
    ids = torch.tensor(vocabulary.ids(" blue green"))
    with torch.no_grad():
        theirs = separate_logp(built.double(), prompt, ids)
        hidden = group_hidden(model.double(), [prompt], ids[None, None], torch.ones(1, 1, len(ids), dtype=torch.bool))
    ours = model.lm_head(hidden).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
