"""Supervised training on trajectories: what the loss is of, which trajectory comes when, and whole runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_run, in_two

import config as configuration
import policy
import sft
from annotations import trajectories
from annotations.rows import DataError
from annotations.trajectories import Example
from engine.loading import load
from episodes import ClipEnvironment, messages, replay
from harness.run import Stopped, StopSignal
from rollout import view_video

AGENT = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256"]
CALL = '<think>closer</think><video_zoom>{"segment": [3, 5], "fps": 2}</video_zoom>'
ANSWER = "<think>seen</think><answer>B</answer>"


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), *AGENT])


@pytest.fixture
def rows(samples, config, vocabulary) -> list[dict]:
    """Trajectories of one, two and three turns; the first turn of the last is not to be learned."""
    found = []
    told = [ANSWER], [CALL, ANSWER], [CALL, CALL.replace("3,", "4,"), ANSWER]
    for sample, said in zip(samples, told, strict=False):
        view = view_video(sample, config)
        found.append({"messages": messages(replay(ClipEnvironment(view, config), said, vocabulary), view, config)})
    found[2]["messages"][1]["weight"] = 0
    return found


@pytest.fixture
def examples(rows, config, vocabulary, model64, tmp_path) -> list[Example]:
    trajectories.save_rows(tmp_path / "t.jsonl", rows)
    found = trajectories.load_trajectories(tmp_path / "t.jsonl")
    return [trajectories.build_example(row, config, vocabulary, model64.config) for row in found]


def batch_loss(model, some: list[Example]) -> torch.Tensor:
    ids, mask, weight = sft.padded(some)
    hidden = policy.group_hidden(model, [e.prompt for e in some], ids, mask, [[e.observations] for e in some])
    return sft.negative_log_likelihood(hidden, model.lm_head.weight, ids[mask], weight[mask])


def in_a_row(example: Example) -> tuple[policy.Prompt, torch.Tensor]:
    """Prompt, turns and observations as one prompt, and where its learned tokens are."""
    pieces, learned, said = [example.prompt], [torch.zeros(len(example.prompt), dtype=torch.bool)], 0
    position = example.prompt.next_position
    ends = [*(seen.after for seen in example.observations), len(example.ids)]
    for k, end in enumerate(ends):
        ids = example.ids[said:end]
        positions = (position + torch.arange(len(ids))).expand(3, -1)
        pieces.append(policy.Prompt(ids, positions, [], position + len(ids)))
        learned.append(example.weight[said:end] > 0)
        if k < len(example.observations):
            pieces.append(example.observations[k].prompt)
            learned.append(torch.zeros(len(pieces[-1]), dtype=torch.bool))
        said, position = end, pieces[-1].next_position
    ids = torch.cat([piece.ids for piece in pieces])
    positions = torch.cat([piece.positions for piece in pieces], 1)
    videos = [video for piece in pieces for video in piece.videos]
    return policy.Prompt(ids, positions, videos, position), torch.cat(learned)


def test_the_loss_is_that_of_the_learned_turns_in_a_plain_forward_pass(examples, model64):
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples:
        whole, learned = in_a_row(example)
        embeds, positions = policy.embed_prompts(model64, [whole])
        causal = torch.ones(1, 1, len(whole), len(whole), dtype=torch.bool).tril()
        logits = model64(inputs_embeds=embeds[None], position_ids=positions[:, None], attention_mask=causal).logits[0]
        nll = F.cross_entropy(logits[:-1], whole.ids[1:], reduction="none")
        expected = expected + nll[learned[1:]].sum()
    assert torch.allclose(batch_loss(model64, examples), expected, rtol=1e-9)


def test_states_before_other_tokens_have_no_influence(examples, model64, monkeypatch):
    plain = policy.row_hidden
    for example in examples:
        after = in_a_row(example)[1][len(example.prompt) :, None]

        def poisoned(*arguments, after=after):
            states = plain(*arguments)
            return states.masked_fill(~after[: len(states)], float("nan"))

        model64.zero_grad()
        batch_loss(model64, [example]).backward()
        clean = model64.lm_head.weight.grad.clone()
        monkeypatch.setattr(policy, "row_hidden", poisoned)
        model64.zero_grad()
        loss = batch_loss(model64, [example])
        loss.backward()
        monkeypatch.setattr(policy, "row_hidden", plain)
        assert torch.isfinite(loss) and torch.equal(loss, batch_loss(model64, [example]))
        assert torch.allclose(model64.lm_head.weight.grad, clean, rtol=1e-12)
    model64.zero_grad()


def test_every_trajectory_comes_once_per_epoch():
    def drawn(processes: int, step: int) -> list[int]:
        config = SimpleNamespace(prompts_per_step=4, seed=1)
        runs = [
            SimpleNamespace(config=config, accelerator=SimpleNamespace(num_processes=processes, process_index=rank))
            for rank in range(processes)
        ]
        return [row for run in runs for row in sft.draw_trajectories(run, list(range(6)), step)]

    order = [row for step in range(3) for row in drawn(1, step)]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    assert order == [row for step in range(3) for row in drawn(2, step)]


# ---------------------------------------------------------------- whole runs


def as_words(name: str, value: object) -> tuple[str, str]:
    return f"--{name}", str(value)


@pytest.fixture
def arguments(rows, recipe, tmp_path) -> list[str]:
    trajectories.save_rows(tmp_path / "t.jsonl", rows)
    options = {"train_data": tmp_path / "t.jsonl", "video_root": "", "steps": 3, "prompts_per_step": 2}
    return ["--config", str(recipe), *AGENT, *(word for item in options.items() for word in as_words(*item))]


def figures(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def test_a_run_learns_and_a_stopped_one_goes_on_as_if_nothing_had_happened(arguments, tmp_path, monkeypatch, talker):
    sft.main([*arguments, "--out", str(tmp_path / "whole"), "--train_vision", "false", "--prompts_per_pass", "1"])
    lines = figures(tmp_path / "whole")
    assert len(lines) == 3 and lines[-1]["loss"] < lines[0]["loss"]

    stopped = [*arguments, "--out", str(tmp_path / "part"), "--train_vision", "false", "--prompts_per_pass", "1"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StopSignal, "check", lambda self: (_ for _ in ()).throw(Stopped(15)))
        sft.main(stopped)
    assert len(figures(tmp_path / "part")) == 1
    sft.main([*stopped, "--resume"])
    assert figures(tmp_path / "part") == lines

    before, _ = load(str(talker))
    one, _ = load(str(tmp_path / "whole" / "checkpoint"))
    two, _ = load(str(tmp_path / "part" / "checkpoint"))
    for (name, w), u, v in zip(before.named_parameters(), one.parameters(), two.parameters(), strict=True):
        assert torch.equal(u, v)
        assert torch.equal(u, w) == ("visual" in name), name  # frozen, and nothing else is


def test_an_epoch_sets_the_steps_and_micro_batches_change_nothing(arguments, tmp_path):
    losses = []
    for size in ("1", "2"):
        out = tmp_path / size
        sft.main([*arguments, "--out", str(out), "--epochs", "1.4", "--prompts_per_pass", size])
        losses.append([line["loss"] for line in figures(out)])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.processes
def test_two_processes_with_shards_are_one_run(arguments, tmp_path, monkeypatch):
    given = [*arguments, "--train_vision", "false"]
    sft.main([*given, "--out", str(tmp_path / "one")])
    monkeypatch.setenv("SCRIPT", "sft")
    in_two(tmp_path / "errors", *given, "--out", tmp_path / "two", shards=True)
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=1e-3)


@pytest.mark.processes
@pytest.mark.parametrize("how", ["shards", "shards of adapters", "copies"])
def test_a_process_with_text_alone_keeps_step_with_one_that_sees_a_video(arguments, tmp_path, monkeypatch, how):
    """The vision tower is trained, and a process whose rows have no video has no gradient for it. With frozen
    embeddings, such a process has none for the first layer's inputs either.
    """
    if how == "shards of adapters":
        pytest.importorskip("peft")
        arguments = [*arguments, "--lora_rank", "4"]
    words = [{"role": "user", "content": "red ?"}, {"role": "assistant", "content": ANSWER}]
    lines = [json.dumps({"messages": words}), (tmp_path / "t.jsonl").read_text().splitlines()[0]]
    (tmp_path / "t.jsonl").write_text("".join(f"{line}\n" for line in lines))
    sft.main([*arguments, "--out", str(tmp_path / "one")])
    monkeypatch.setenv("SCRIPT", "sft")
    in_two(tmp_path / "errors", *arguments, "--out", tmp_path / "two", script="sft.py", shards=how != "copies")
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=1e-3)


def test_a_bad_file_is_one_sentence(arguments, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match="row 1, field 'messages': user and assistant must take turns"):
        sft.main([*arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
