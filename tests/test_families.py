"""Programs with a policy of another family: every one of them, with a checkpoint of random weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import read_metrics
from transformers import Qwen3VLForConditionalGeneration

import infer
import sft
import train
from engine.loading import patch_side
from world import lessons, tiny

CLIP = "<video>"
GROUP = ["--group_size", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Qwen3-VL with patches of 16 pixels."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = tiny.build_tokenizer(lessons.corpus("qwen3_vl"))
    tiny.build_model(tokenizer, 0, "qwen3_vl", patch_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def options(recipe, checkpoint, tmp_path):
    small = ["--max_tokens", "6", "--prompts_per_step", "2", "--steps", "1", "--overwrite"]
    return ["--config", str(recipe), "--model", str(checkpoint), *small]


def test_patches_are_the_checkpoints(checkpoint):
    assert patch_side(str(checkpoint)) == 16 and patch_side("") == 14


def test_a_run_trains_and_its_checkpoint_loads(options, tmp_path, small_world):
    """Rollout, zoom pass, streamed reference, update with checkpointing, scores before and after."""
    more = ["--invalid_span", "uniform", "--reference_device", "cpu", "--gradient_checkpointing", "--outer_tags"]
    train.main([*options, *GROUP, *more, "--test_data", str(small_world["test"])])
    (row,) = read_metrics(tmp_path / "run")
    assert all(math.isfinite(value) for value in row.values())
    assert row["kl/text"] < 1e-6 and "reward/zoom_mean" in row
    trained = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint")
    assert all(torch.isfinite(p).all() for p in trained.parameters())
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_an_agent_asks_and_is_trained(options, tmp_path):
    agent = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256", "--frames_per_call", "10"]
    train.main([*options, *GROUP, *agent, "--tokenadv", "off", "--zoom_reward", "false"])
    assert math.isfinite(read_metrics(tmp_path / "run")[0]["loss"])


def test_spans_are_taught_and_a_question_is_answered(options, checkpoint, samples, tmp_path, capsys):
    """The short supervised start: a question and a response that claims the evidence, as a trajectory."""
    rows = []
    for sample in samples[:2]:
        [(start, end)] = sample.evidence[:1]
        asked = {"role": "user", "content": f"{CLIP}{sample.question}"}
        said = {"role": "assistant", "content": f"<answer>A</answer><glue>[({start},{end})]</glue>"}
        rows.append({"messages": [asked, said], "videos": [sample.video]})
    path = tmp_path / "spans.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.main([*options, "--train_data", str(path), "--test_data", ""])
    assert read_metrics(tmp_path / "run")[0]["loss"] > 0
    command = ["--model", str(tmp_path / "run" / "checkpoint"), "--video", samples[0].video]
    question = ["--question", samples[0].question, "--options", *samples[0].options]
    infer.main([*command, *question, "--max_tokens", "6", "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
