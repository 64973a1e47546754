"""The training loop: gradients, options, bad input, signals and resuming, on a small world with a policy that talks at
random.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import statistics
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import pay, read_metrics
from runs import assert_same_run, end_of, in_two, launched, ranks, sharding, start, weights
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import config as configuration
import evaluate
import grpo
import harness.setup
import rewards
import train
from advantage import SEGMENTS, RewardError, segment_ids
from annotations.rows import DataError
from annotations.samples import DataSet, Epochs, load_training, write_samples
from engine.loading import load
from grpo import objective
from harness.batches import Reading, draw, generator, view_batches
from harness.log import keep_metrics
from harness.run import Stopped, TrainingError, finish, program
from harness.setup import learning_rate, load_run
from kl import Reference
from policy import ModelError, Vocabulary
from rollout import Group, Response, read_turn
from train import MicroBatch, main, policy_step, set_old_logp, update

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture
def parsed(recipe):
    return lambda *arguments: configuration.parse(["--config", str(recipe), *arguments])


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, talker, small_world):
    """A run of three steps in one process that nothing interrupted, with a table before and after."""
    from conftest import RECIPE

    folder = tmp_path_factory.mktemp("finished")
    values = {"model": talker, "out": folder / "run", "train": small_world["train"], "test": small_world["test"]}
    values["root"] = small_world["train"].parent
    (folder / "recipe.yaml").write_text(RECIPE.format(**values))
    main(["--config", str(folder / "recipe.yaml"), "--steps", "3", "--tracker", "tensorboard", "--eval_controls"])
    return folder


def test_what_a_run_leaves_behind(finished):
    out = finished / "run"
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert {"reward/iou_mean", "kl/time", "kl/text", "entropy", "clip_fraction", "seconds/zoom", "lr"} <= set(row)
        assert row["lr"] == pytest.approx(1e-3) and row["grad_norm"] > 0
    assert max(row["reward/iou_std"] for row in rows) > 0.1 and rows[0]["kl/text"] < 1e-9 < rows[2]["kl/text"]
    assert (out / "curves.png").stat().st_size > 1000 and "<html" in (out / "episodes.html").read_text()
    assert list((out / "zoomgrpo").glob("events*"))
    table = json.loads((out / "evaluation.json").read_text())
    assert set(table) == {"before", "after"} and table["after"]["all"]["questions"] >= 6
    assert not list(out.glob("*.part")) and not list(out.glob("*.old"))
    before = [json.loads(line) for line in (out / "results-before.jsonl").read_text().splitlines()]
    assert len(before) == table["before"]["all"]["questions"]


def test_the_start_is_not_evaluated_again_where_another_run_has_done_it(finished, tmp_path, monkeypatch):
    before, asked, real = finished / "run" / "results-before.jsonl", [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: asked.append(given[5]) or real(*given))
    words = ["--config", str(finished / "recipe.yaml"), "--steps", "1", "--out", str(tmp_path / "run"), "--overwrite"]
    main([*words, "--eval_before", str(before)])
    own = tmp_path / "run" / before.name
    assert asked == ["after training"] and own.read_text() == before.read_text()
    main([*words, "--eval_before", str(own)])  # read before the folder is emptied
    assert asked == 2 * ["after training"] and own.read_text() == before.read_text()
    rows = [json.loads(line) for line in before.read_text().splitlines()]
    for other in (rows[1:], [{**rows[0], "answer": "Z"}, *rows[1:]]):
        own.write_text("".join(json.dumps(row) + "\n" for row in other))
        with pytest.raises(DataError, match="is not about these questions"):
            main([*words, "--eval_before", str(own)])
    own.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "true_zoom_answer"}) + "\n" for row in rows)
    )
    with pytest.raises(DataError, match="has no true_zoom_answer"):
        main([*words, "--eval_controls", "--eval_before", str(own)])


def test_the_checkpoint_loads_silently_and_is_the_trained_policy(finished, talker, caplog):
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(finished / "run" / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(finished / "run" / "checkpoint")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(talker).get_vocab()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    state = load_file(finished / "run" / "state" / "shard-00001-model-00001-of-00001.safetensors")
    for name, weight in loaded.named_parameters():  # the tied one once
        assert torch.equal(weight, state[f"model.{name}"])
    start = load(str(talker))[0].state_dict()
    changed = [name for name, weight in loaded.state_dict().items() if not torch.equal(weight, start[name])]
    assert len(changed) == len(start)


def test_the_configuration_of_a_run_reads_back(finished):
    saved = configuration.parse(["--config", str(finished / "run" / "config.yaml")])
    given = configuration.parse(["--config", str(finished / "recipe.yaml"), "--steps", "3"])
    assert replace(saved, tracker="none", eval_controls=False) == given


def responses_of(parsed, samples, *options) -> list[tuple]:
    """Per group of a run's first step, the ids of its responses."""
    _, groups = rolled_out(parsed, samples, *options)
    return [tuple(tuple(response.ids.tolist()) for response in group.responses) for group in groups]


def test_a_sample_drawn_twice_in_a_step_is_answered_anew(parsed, samples):
    assert len(set(responses_of(parsed, samples[:1]))) == 4
    assert responses_of(parsed, samples[:1]) == responses_of(parsed, samples[:1], "--rollout_batch", "1")


def test_a_redraw_that_falls_back_on_a_tried_sample_is_answered_anew(recipe, samples, tmp_path, monkeypatch):
    """There is one sample, and no group is ever good enough."""
    seen = []
    roll_out = train.roll_out

    def noted(*arguments, **options):
        groups = roll_out(*arguments, **options)
        seen.extend(tuple(tuple(response.ids.tolist()) for response in group.responses) for group in groups)
        return groups

    monkeypatch.setattr(train, "roll_out", noted)
    monkeypatch.setattr(
        train, "facets", lambda group, config: dict.fromkeys(rewards.FACETS, [0.0] * len(group.responses))
    )
    write_samples(tmp_path / "one.jsonl", samples[:1])
    options = f"--train_data {tmp_path / 'one.jsonl'} --max_redraws 2 --steps 1 --prompts_per_step 2".split()
    main(["--config", str(recipe), *options])
    assert len(seen) == 6 and len(set(seen)) == 6


# ---------------------------------------------------------------- gradients and their independence


def micro_batches(groups, config) -> list[MicroBatch]:
    size = config.prompts_per_pass
    return [MicroBatch.of(groups[k : k + size], config) for k in range(0, len(groups), size)]


def rolled_out(parsed, samples, *arguments):
    """A prepared run and the groups of its first step, scored."""
    config = parsed(*arguments)
    run = load_run(config, Accelerator(cpu=True))
    epochs = Epochs([DataSet(samples)], partial(generator, config.seed))
    batches = view_batches(config, run.accelerator, epochs, Reading(), 0)
    views = [drawn.view for drawn in next(batches)]
    batches.close()
    groups = train.roll_out(run.model, views, config, run.vocabulary, 0)
    train.zoom_pass(run.model, groups, config, run.vocabulary)
    pay(groups, config)
    return run, groups


def gradients(run, groups, config) -> dict[str, torch.Tensor]:
    """The gradient of one update, before clipping."""
    kept = {}
    run.config = config
    step = run.optimizer.step
    run.optimizer.step = lambda: kept.update({n: p.grad.clone() for n, p in run.model.named_parameters()})
    policy_step(run, micro_batches(groups, config))
    run.optimizer.step = step
    return kept


def test_in_the_last_steps_each_question_is_asked_twice(recipe, tmp_path, monkeypatch):
    groups, updated, rolled, learn = [], [], train.collect, train.update

    def counted(*arguments):
        groups.append(rolled(*arguments))
        return groups[-1]

    def noted(*arguments):
        totals = learn(*arguments)
        updated.append(totals["tokens"])
        return totals

    monkeypatch.setattr(train, "collect", counted)
    monkeypatch.setattr(train, "update", noted)
    words = ["--steps", "3", "--prompts_per_step", "2", "--repeated_zoom", "0.4", "--n_episodes", "4"]
    main(["--config", str(recipe), *words])
    assert [len(found) for found in groups] == [2, 2, 4]
    tokens = [sum(len(r.ids) for group in found for r in group.responses) for found in groups]
    assert updated == tokens, "each response of both is learned from"
    assert [group.view.sample for group in groups[2][:2]] == [group.view.sample for group in groups[2][2:]]
    assert all(set(group.rewards) == {"format", "accuracy", "iou", "zoom"} for group in groups[2])
    for row, found in zip(read_metrics(tmp_path / "run"), groups, strict=True):  # figures of each kind are apart
        for first, of in (("", found[:2]), ("closer/", found[2:])):
            paid = [value for group in of for value in group.rewards["format"]]
            assert row.get(f"{first}reward/format_mean") == (pytest.approx(statistics.mean(paid)) if paid else None)
    page = (tmp_path / "run" / "episodes.html").read_text()
    assert page.count("<h4>Coarse frames</h4>") == page.count("<h4>Closer look: frames of what was claimed</h4>") == 2


@pytest.mark.parametrize("normalise", ["sequence", "token", "fixed"])
def test_gradients_do_not_depend_on_prompts_per_pass(parsed, samples, normalise):
    run, groups = rolled_out(parsed, samples, "--normalise", normalise, "--max_grad_norm", "1e9")
    assert sum(len({tuple(v) for v in zip(*g.rewards.values(), strict=True)}) > 1 for g in groups) > 1
    config = run.config
    whole = gradients(run, groups, replace(config, prompts_per_pass=4))
    for size in (1, 3):
        split = gradients(run, groups, replace(config, prompts_per_pass=size))
        for name, gradient in whole.items():
            assert (gradient - split[name]).abs().max() < 1e-4 * gradient.abs().max() + 1e-9, name
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3


def test_several_updates_use_the_log_probabilities_of_the_sampling_policy(parsed, samples, monkeypatch):
    """Before the first update the ratio is exactly 1; later ones are measured against the same policy."""
    run, groups = rolled_out(parsed, samples, "--updates_per_rollout", "4", "--clip_low", "0.2", "--clip_high", "0.28")
    ratios, old = [], []

    def noted(run, batches):
        totals = policy_step(run, batches)
        ratios.append(totals["ratio"] / totals["tokens"])
        old.append(batches[0].old_logp)
        return totals

    monkeypatch.setattr(train, "policy_step", noted)
    start = {name: p.clone() for name, p in run.model.named_parameters()}
    update(run, groups)
    assert len(ratios) == 4 and ratios[0] == pytest.approx(1, abs=1e-6)
    assert all(abs(ratio - 1) > 1e-5 for ratio in ratios[1:])
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(start[name])
    batches = [batch for group in groups for batch in micro_batches([group], run.config)]
    set_old_logp(run, batches)
    for batch, given in zip(batches, old, strict=True):
        torch.testing.assert_close(batch.old_logp, given, atol=1e-5, rtol=0)


def test_whatever_waits_for_the_group_s_threads_with_the_interpreter_s_lock_is_gone_before_the_group():
    """These may wait for the lock: then a program of several processes would not end."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    policy = DistributedDataParallel(nn.Linear(2, 2))
    holders = [weakref.ref(policy.reducer), weakref.ref(policy.logger)]
    held = []

    def end_training() -> None:
        held.extend(holder() for holder in holders)
        distributed.destroy_process_group()

    finish(SimpleNamespace(wait_for_everyone=distributed.barrier, end_training=end_training), policy)
    assert held == [None, None]


@pytest.mark.processes
@pytest.mark.parametrize("more", [["--updates_per_rollout", "2"], ["--repeated_zoom", "0.5"]], ids=" ".join)
def test_two_processes_train_like_one(recipe, tmp_path, more):
    """The same metrics and weights after two steps, of two updates each, or the second with a closer look and started
    as `torchrun` alone does, up to float noise.
    """
    common = ["--config", recipe, *more, "--beta", "0.05", "--train_vision", "false", "--group_size", "3"]
    main([*map(str, common), "--out", str(tmp_path / "one")])
    in_two(tmp_path / "errors", *common, "--out", tmp_path / "two", told="--repeated_zoom" not in more)
    assert len(list((tmp_path / "two" / "state").glob("shard-*"))) == 2  # each process has written its part
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=2e-4)
    start, after = weights_of_vision(recipe), weights(tmp_path / "one")
    for name, weight in start.items():
        assert torch.equal(after[name], weight)  # frozen


@pytest.mark.processes
def test_the_launcher_tells_its_processes_what_these_tests_tell_theirs(tmp_path):
    script = tmp_path / "told.py"
    script.write_text("import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))")
    launched(script, tmp_path / "told-")

    def read(told: dict[str, str]) -> dict[str, str]:
        return {name: told[name] for name in sorted(told) if name.startswith(("ACCELERATE_", "FSDP_", *PLACES))}

    for rank, ours in enumerate(ranks(sharding(1), 1)):
        assert read(json.loads((tmp_path / f"told-{rank}").read_text())) == read(ours)
        assert {"FSDP_VERSION", "RANK"} < read(ours).keys()


@pytest.mark.processes
def test_two_processes_with_sharded_weights_train_like_one(recipe, tmp_path):
    """FSDP2, resumed after the first step on two nodes: the metrics and weights of one process, up to float noise."""
    common = ["--config", recipe, "--updates_per_rollout", "2", "--beta", "0.05", "--prompts_per_step", "8"]
    common += ["--group_size", "2"]
    main([*map(str, common), "--out", str(tmp_path / "one")])
    two = tmp_path / "two"
    sharded = [*common, "--out", two, "--prompts_per_pass", "1", "--gradient_checkpointing"]
    in_two(tmp_path / "errors", *sharded, "--steps", "1", shards=True)
    in_two(tmp_path / "errors", *sharded, "--resume", shards=True, nodes=2)
    shards = [load_file(path) for path in (two / "state").glob("shard-*")]
    for kind in ("", "/exp_avg", "/exp_avg_sq"):
        sizes = [
            sum(part.numel() for name, part in shard.items() if name.endswith(f"weight{kind}")) for shard in shards
        ]
        assert len(sizes) == 2 and min(sizes) > 0.9 * max(sizes)  # each process has half
    assert_same_run(tmp_path / "one", two, tolerance=2e-4)
    saved = [load_file(tmp_path / out / "checkpoint" / "model.safetensors").keys() for out in ("one", "two")]
    assert saved[0] == saved[1]  # tied weights once


@pytest.mark.processes
def test_sharded_weights_in_bfloat16_leave_sums_unrounded(recipe, tmp_path, small_world):
    """With a frozen vision tower, and a table before and after training."""
    options = ["--mixed_precision", "bf16", "--train_vision", "false", "--test_data", small_world["test"]]
    options += ["--steps", "1", "--updates_per_rollout", "2", "--beta", "0.05", "--group_size", "2"]
    in_two(tmp_path / "errors", "--config", recipe, *options, shards=True)
    (row,) = read_metrics(tmp_path / "run")
    assert all(math.isfinite(value) for value in row.values())
    assert 0 < row["kl/penalty"] == pytest.approx(0.05 * (row["kl/time"] + row["kl/text"]), rel=1e-5)
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert table["before"]["all"]["questions"] == table["after"]["all"]["questions"] >= 6
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}


def test_a_reference_in_the_cpu_s_memory_changes_nothing(recipe, tmp_path):
    """In the KL and as the judge, in bfloat16: to the last bit."""
    common = ["--config", str(recipe), "--mixed_precision", "bf16", "--beta", "0.05", "--zoom_judge", "reference"]
    common += ["--prompts_per_step", "2", "--group_size", "2"]
    for place in ("same", "cpu"):
        main([*common, "--reference_device", place, "--out", str(tmp_path / place)])
    assert read_metrics(tmp_path / "same")[1]["kl/text"] > 0
    assert_same_run(tmp_path / "same", tmp_path / "cpu")


def weights_of_vision(recipe) -> dict[str, torch.Tensor]:
    model, _ = load(configuration.parse(["--config", str(recipe)]).model)
    return {name: weight for name, weight in model.state_dict().items() if ".visual." in name}


OPTIONS = [
    ["--tokenadv", "paper"],
    ["--tokenadv", "off", "--std", "sample"],
    ["--zoom_judge", "reference", "--kl", "none"],
    ["--zoom_reward", "false", "--reference_device", "cpu"],
    ["--zoom_sees_think", "--invalid_span", "uniform"],
    ["--zoom_answer", "decode", "--zoom_budget", "88"],
    ["--kl", "k1", "--normalise", "token"],
    ["--kl", "k2", "--normalise", "fixed"],
    ["--kl", "k3", "--kl_clamp", "10", "--clip_low", "0.2"],
    ["--beta_time", "0", "--clip_high", "0.28"],
    ["--paired_frames", "--schedule", "cosine"],
    ["--grounding", "giou", "--tokenadv", "paper"],
    ["--grounding", "tg", "--template", "longvtg_r1"],
    ["--grounding", "none", "--tokenadv", "time"],
    ["--repeated_zoom", "1", "--train_vision", "false"],
    ["--train_vision", "false", "--gradient_checkpointing", "--mixed_precision", "bf16"],
    ["--gradient_checkpointing", "--system_prompt", "You see a video.", "--temperature", "0.7"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_option_runs_a_step(recipe, tmp_path, options):
    main(["--config", str(recipe), "--steps", "1", "--prompts_per_step", "2", *options])
    (row,) = read_metrics(tmp_path / "run")
    assert all(math.isfinite(value) for value in row.values())
    assert ("reward/zoom_mean" in row) == (options[0] != "--zoom_reward")
    assert ("kl/text" in row) == (options[-2:] != ["--kl", "none"])
    if "kl/text" in row:
        assert row["kl/text"] < 1e-4  # policy and reference are the same, in bfloat16 too


def test_every_choice_is_tried():
    """Each choice of config.py is the default of the recipe or in OPTIONS above; templates, families and keep_best have
    tests of their own, and adamw8bit needs a GPU."""
    tried = {(o[i], o[i + 1]) for o in OPTIONS for i in range(len(o) - 1)}
    usual = {"--zoom_judge": "policy", "--invalid_span": "zero", "--zoom_answer": "letters", "--kl": "exact"}
    usual |= {"--tokenadv": "code", "--std": "population", "--normalise": "sequence", "--schedule": "constant"}
    usual |= {"--mixed_precision": "no", "--grounding": "iou", "--reference_device": "same", "--optimizer": "adamw"}
    apart = ("template", "family", "keep_best")
    for name, field in configuration.Config.__dataclass_fields__.items():
        for choice in field.metadata["choices"] or ():
            pair = (f"--{name}", choice)
            assert pair in tried or pair in usual.items() or name in apart or choice == "adamw8bit", pair


@pytest.mark.parametrize(("estimate", "clamp"), [("exact", 0), ("k1", 0), ("k2", 0), ("k3", 0), ("k3", 0.5)])
def test_the_penalty_is_beta_times_the_estimate_that_is_asked_for(estimate, clamp):
    g = torch.Generator().manual_seed(0)
    hidden_p, hidden_q, lm_head, lm_head_q = (torch.randn(n, 4, generator=g) for n in (6, 6, 9, 9))
    config = configuration.Config(kl=estimate, kl_clamp=clamp, beta=0.1)
    reference = Reference(hidden_q, lm_head_q, torch.full((9,), 0.1), torch.tensor([3]))
    ids = torch.randint(0, 9, (1, 2, 3), generator=g)
    batch = MicroBatch(["a"], [], ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, 2, 3), [[[], []]])
    _, stats = objective(batch, reference, torch.tensor(2.0), config, hidden_p, lm_head)
    logp, logq = torch.log_softmax(hidden_p @ lm_head.t(), -1), torch.log_softmax(hidden_q @ lm_head_q.t(), -1)
    a = (logp - logq)[torch.arange(6), ids.flatten()]  # log(p / q) of the sampled tokens
    values = {"exact": (logp.exp() * (logp - logq)).sum(-1), "k1": a, "k2": a**2 / 2, "k3": (-a).exp() - 1 + a}
    expected = values[estimate].clamp(max=clamp) if clamp else values[estimate]
    assert float(stats["penalty"]) == pytest.approx(0.1 * float(expected.sum()), rel=1e-5)
    assert not clamp or values[estimate].min() < clamp < values[estimate].max()


def test_the_paper_s_template_runs_a_step(recipe, tmp_path):
    main(["--config", str(recipe), "--steps", "1", "--prompts_per_step", "2", "--template", "zoom_zero"])
    assert read_metrics(tmp_path / "run")[0]["step"] == 0


def test_vision_trains_unless_told_otherwise(parsed, samples):
    run, groups = rolled_out(parsed, samples)
    grads = gradients(run, groups, run.config)
    assert all(grads[name].abs().max() > 0 for name in grads if ".visual." in name)


def test_learning_rate_warms_up_and_falls(parsed):
    config = parsed("--warmup", "4", "--steps", "12", "--schedule", "cosine")
    factors = [learning_rate(config, k) for k in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(replace(config, schedule="constant"), 11) == 1.0
    assert learning_rate(replace(config, warmup=0), 0) == 1.0
    assert learning_rate(replace(config, warmup=50), 11) == 12 / 50


# ---------------------------------------------------------------- the order of prompts


def ranked(rank: int, processes: int) -> SimpleNamespace:
    """What one process knows of the others."""
    return SimpleNamespace(process_index=rank, num_processes=processes)


def drawn_ids(config, samples, step, processes=1, sets=None) -> list[list[str]]:
    epochs = Epochs(sets or [DataSet(samples)], partial(generator, config.seed))
    return [[c[0].id for _, c in draw(config, ranked(rank, processes), epochs, step)] for rank in range(processes)]


def test_every_sample_comes_once_per_epoch(parsed, samples):
    config = parsed("--prompts_per_step", "1")
    n = len(samples)
    epochs = [[drawn_ids(config, samples, step)[0][0] for step in range(e * n, (e + 1) * n)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == {s.id for s in samples} and epochs[0] != epochs[1]
    assert drawn_ids(replace(config, seed=1), samples, 0) != drawn_ids(config, samples, 0)


def test_each_update_sees_the_same_prompts_on_any_number_of_processes(parsed, samples):
    config = parsed("--prompts_per_step", "8", "--updates_per_rollout", "2")
    (alone,) = drawn_ids(config, samples, 3)
    first, second = drawn_ids(config, samples, 3, processes=2)
    assert first[:2] + second[:2] == alone[:4] and first[2:] + second[2:] == alone[4:]


def test_a_prompt_has_the_same_place_on_any_number_of_processes(parsed, samples):
    config = parsed("--prompts_per_step", "8", "--updates_per_rollout", "2")
    epochs = Epochs([DataSet(samples[:3], 2.0)], partial(generator, config.seed))

    def places(processes: int) -> list[tuple[int, str]]:
        drawn = [pair for rank in range(processes) for pair in draw(config, ranked(rank, processes), epochs, 3)]
        return sorted((place, candidates[0].id) for place, candidates in drawn)

    assert places(1) == places(2) == places(4) and [place for place, _ in places(1)] == list(range(24, 32))


def test_samples_of_a_mixture_come_as_often_as_their_weight_says(parsed, samples):
    config = parsed("--prompts_per_step", "1")
    first, second = samples[:4], samples[4:9]
    sets = [DataSet(first, 2.0), DataSet(second, 0.4)]
    length = 4 * 2 + 2
    epochs = []
    for e in range(12):
        ids = [drawn_ids(config, samples, step, sets=sets)[0][0] for step in range(e * length, (e + 1) * length)]
        assert all(ids.count(s.id) == 2 for s in first)
        chosen = [name for name in ids if name in {s.id for s in second}]
        assert len(chosen) == len(set(chosen)) == 2
        epochs.append((ids, set(chosen)))
    assert set.union(*(chosen for _, chosen in epochs)) == {s.id for s in second}
    assert epochs[0][0] != epochs[1][0]
    assert {len(DataSet(samples, 1.3).once(torch.Generator().manual_seed(k))) for k in range(5)} == {
        len(DataSet(samples, 1.3))
    }


# ---------------------------------------------------------------- facets that do not apply


def bare_group(talker, sample, replies: Sequence[str]):
    """A group whose responses say this."""
    _, tokenizer = load(str(talker))
    vocabulary = Vocabulary.of(tokenizer)
    responses = [Response([read_turn(torch.tensor(vocabulary.ids(reply)), vocabulary)]) for reply in replies]
    return Group(SimpleNamespace(sample=sample, info=SimpleNamespace(duration=20.0)), None, responses)


REPLIES = [
    "<think>a</think><answer>B</answer><timestamp>2.0 to 6.0</timestamp>",
    "<think>a</think><answer>A</answer><timestamp>4.0 to 9.0</timestamp>",
    "<think>a</think><answer>B</answer><timestamp>15.0 to 18.0</timestamp>",
    "nothing",
]


def longvtg(parsed, *arguments: str):
    return parsed("--template", "longvtg_r1", "--zoom_reward", "false", "--tokenadv", "off", *arguments)


def test_rewards_of_spans_are_those_that_are_named(parsed, samples, talker):
    """Evidence [2, 6] of 20 s: hulls, unions and centres by hand."""
    group = bare_group(talker, replace(samples[0], answer="B", evidence=((2.0, 6.0),)), REPLIES)
    expected = {
        "iou": [1.0, 2 / 7, 0.0, 0.0],
        "giou": [1.0, 2 / 7, -9 / 16, -1.0],
        "tg": [1.0, 0.8 * 2 / 7 + 0.2 * (1 - 2.5 / 20), 0.2 * (1 - 12.5 / 20), 0.0],
    }
    for name, values in expected.items():
        pay([group], longvtg(parsed, "--grounding", name))
        assert list(group.rewards) == ["format", "accuracy", name]
        assert group.rewards[name] == pytest.approx(values), name
    pay([group], longvtg(parsed, "--grounding", "tg", "--alpha", "0.5"))
    assert group.rewards["tg"][2] == pytest.approx(0.5 * (1 - 12.5 / 20))


@pytest.mark.parametrize(
    ("options", "answer", "spans", "facets"),
    [
        (("a", "b"), "B", ((2.0, 6.0),), ["format", "accuracy", "tg"]),
        ((), None, ((2.0, 6.0),), ["format", "tg"]),
        ((), "B", ((2.0, 6.0),), ["format", "tg"]),  # a letter of no option
        (("a", "b"), "B", (), ["format", "accuracy"]),
    ],
)
def test_a_facet_that_does_not_apply_takes_no_part(parsed, samples, talker, options, answer, spans, facets):
    config = longvtg(parsed, "--grounding", "tg")
    group = bare_group(talker, replace(samples[0], options=options, answer=answer, evidence=spans), REPLIES)
    pay([group], config)
    assert list(group.rewards) == facets
    total = torch.tensor([group.rewards[name] for name in facets]).sum(0)
    found = group.advantages
    wanted = (total - total.mean()) / total.std(unbiased=False)
    torch.testing.assert_close(found[:, 0], wanted, atol=1e-6, rtol=0)
    assert found.std(0)[0] > 0.5


def test_eq_5_credits_any_reward_of_spans_to_the_tokens_that_write_them(parsed, samples, talker):
    """All responses of the group are right and well-formed, so that only spans earn anything."""
    group = bare_group(talker, replace(samples[0], answer="B", evidence=((2.0, 6.0),)), [REPLIES[0], REPLIES[2]])
    config = longvtg(parsed, "--grounding", "giou", "--tokenadv", "paper")
    pay([group], config)
    found = group.advantages
    glue = SEGMENTS.index("glue")
    for g, response in enumerate(group.responses):
        segments = segment_ids(response.text, response.offsets)
        sign = 1 if g == 0 else -1
        assert torch.equal(found[g, : len(segments)] * sign > 0, segments == glue)


def test_without_a_reward_of_spans_training_needs_no_evidence(parsed, samples, tmp_path):
    path, kept = tmp_path / "unlabelled.jsonl", replace(samples[0], video=str(Path(samples[0].video).resolve()))
    write_samples(path, [replace(kept, evidence=())])
    for template in ("world", "longvtg_r1"):
        config = parsed("--train_data", str(path), "--template", template, "--grounding", "none")
        [data] = load_training(config)
        assert len(data) == 1 and rewards.paid_facets(config) == ["format", "accuracy", "zoom"]
    with pytest.raises(DataError, match=r"row 1 \(.*\): evidence needed, but missing or empty"):
        load_training(parsed("--train_data", str(path)))
    write_samples(path, [replace(kept, options=(), answer=None)])
    with pytest.raises(DataError, match="neither evidence nor an answer to reward"):
        load_training(config)


def test_without_a_reward_of_spans_the_zoom_credits_the_tokens_that_write_them(parsed, samples, talker):
    group = bare_group(
        talker,
        replace(samples[0], answer="B", evidence=()),
        ["<think>a</think><answer>B</answer><glue>[(2.0,6.0)]</glue>"] * 2,
    )
    for response, answer in zip(group.responses, "BA", strict=True):
        response.zoom = SimpleNamespace(answer=answer)
    pay([group], parsed("--grounding", "none", "--tokenadv", "paper"))
    assert list(group.rewards) == ["format", "accuracy", "zoom"] and group.rewards["zoom"] == [1.0, 0.0]
    # Eq. 5 without R_IoU: the mean of the facets that are left. Only R_zoom differs, its A is +-1.
    segments = segment_ids(group.responses[0].text, group.responses[0].offsets)
    expected = torch.where(segments == SEGMENTS.index("glue"), 1 / 2, 1 / 3)
    torch.testing.assert_close(group.advantages, torch.stack([expected, -expected]).to(group.advantages))


def test_a_mixture_whose_weights_leave_no_sample_is_refused(parsed, samples, tmp_path):
    write_samples(tmp_path / "one.jsonl", samples[:1])
    (tmp_path / "mixture.yaml").write_text(f"- data: {tmp_path / 'one.jsonl'}\n  weight: 0.1\n")
    with pytest.raises(DataError, match="its weights leave no sample"):
        load_training(parsed("--train_data", str(tmp_path / "mixture.yaml")))


def test_a_mixture_with_and_without_options_trains(recipe, tmp_path, samples):
    closed = [replace(s, video=str(Path(s.video).resolve())) for s in samples[:2]]
    write_samples(tmp_path / "closed.jsonl", closed)
    write_samples(tmp_path / "open.jsonl", [replace(s, id=f"{s.id}-open", options=(), answer=None) for s in closed])
    (tmp_path / "mixture.yaml").write_text(
        f"- data: {tmp_path / 'closed.jsonl'}\n- {{data: {tmp_path / 'open.jsonl'}, weight: 3}}\n"
    )
    arguments = ["--template", "longvtg_r1", "--grounding", "tg", "--tokenadv", "off", "--beta", "0"]
    arguments += ["--train_data", str(tmp_path / "mixture.yaml"), "--prompts_per_step", "8", "--n_episodes", "8"]
    main(["--config", str(recipe), *arguments])
    first, second = read_metrics(tmp_path / "run")
    assert first["applies/accuracy"] == first["applies/zoom"] == 0.25 and first["applies/tg"] == 1
    assert second["kl/text"] > 0 and second["kl/penalty"] == 0
    assert "<html" in (tmp_path / "run" / "episodes.html").read_text()


def test_a_sample_with_nothing_to_reward_is_named(recipe, tmp_path, samples):
    write_samples(tmp_path / "a.jsonl", [replace(samples[0], options=(), answer=None, evidence=())])
    with pytest.raises(DataError, match=r"a\.jsonl: row 1 \(.*neither evidence nor an answer"):
        main(["--config", str(recipe), "--template", "longvtg_r1", "--train_data", str(tmp_path / "a.jsonl")])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--group_sise", "8"], "error: command line: there is no option 'group_sise'; the nearest is 'group_size'"),
        (["--train_data", "nowhere.jsonl"], "error: nowhere.jsonl"),
    ],
)
def test_mistakes_end_with_one_line_and_code_1(recipe, arguments, expected, capsys):
    end = end_of("train.py", "--config", recipe, *arguments)  # Python prints a text, and its code is 1
    assert isinstance(end, str) and end.startswith(expected) and "\n" not in end
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nowhere/at-all"], "error: model nowhere/at-all"),
        (["--tracker", "tensorbord"], "error: there is no tracker 'tensorbord'; there are none, "),
        (["--prompts_per_step", "4", "--updates_per_rollout", "3"], "error: updates_per_rollout = 3 must divide"),
    ],
)
def test_expected_errors_become_one_line(recipe, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        program(lambda: main(["--config", str(recipe), *arguments]), ModelError)
    assert str(stop.value).startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no rows|empty|none of the 0 rows"),
        ("not json\n", "row 1|line 1"),
        ('{"video": "train/00000.mp4", "question": "?", "options": ["a", "b"], "glue": [[0, 1]]}\n', "row 1.*answer"),
        (
            '{"video": "v.mp4", "question": "?", "options": ["a", "b"], "answer": "A", "glue": [], "duration": 9}\n',
            "evidence",
        ),
    ],
)
def test_broken_annotations_are_named_before_a_model_is_built(recipe, tmp_path, monkeypatch, content, expected):
    monkeypatch.setattr(harness.setup, "load", lambda *_: pytest.fail("a model was built"))
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    for name in ("train_data", "test_data"):
        if name == "test_data" and '"glue": []' in content:
            continue  # evaluation does without
        with pytest.raises(DataError, match=f"(?s)broken.jsonl.*({expected})"):
            main(["--config", str(recipe), f"--{name}", str(path)])
    assert not (tmp_path / "run").exists()


def broken_world(tmp_path: Path, samples, n_broken: int) -> Path:
    """Annotations of the small world in which some videos are no videos."""
    rows = []
    videos = sorted({sample.video for sample in samples})
    for sample in samples:
        video = sample.video
        if videos.index(video) < n_broken:
            video = str(tmp_path / f"broken-{videos.index(video)}.mp4")
            Path(video).write_bytes(b"this is no video")
        glue = [list(span) for span in sample.evidence]
        row = {"video": video, "question": sample.question, "options": list(sample.options), "id": sample.id}
        rows.append(row | {"answer": sample.answer, "glue": glue, "duration": sample.duration})
    path = tmp_path / "some-broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_unreadable_videos_are_skipped_counted_and_named_once(recipe, tmp_path, samples, caplog):
    path = broken_world(tmp_path, samples, 2)
    main(["--config", str(recipe), "--train_data", str(path), "--steps", "3", "--max_failed_videos", "0.5"])
    rows = read_metrics(tmp_path / "run")
    skipped = [record.getMessage() for record in caplog.records if "skipping" in record.getMessage()]
    assert 1 <= len(skipped) <= 2 and len(set(skipped)) == len(skipped) and "broken-" in skipped[0]
    counts = [row["failed_videos"] for row in rows]
    assert counts == sorted(counts) and counts[-1] >= len(skipped)


@pytest.mark.parametrize(
    ("n_broken", "expected"), [(6, "none of 65 videos drawn in a row"), (5, "max_failed_videos = 0.02")]
)
def test_too_many_unreadable_videos_stop_the_run(recipe, tmp_path, samples, n_broken, expected):
    path = broken_world(tmp_path, samples, n_broken)
    arguments = ["--train_data", str(path), "--steps", "30", "--max_failed_videos", "0.02"]
    with pytest.raises(TrainingError, match=f"{expected}.*broken-"):
        main(["--config", str(recipe), *arguments])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_video_that_fails_only_in_the_zoom_pass_is_counted(recipe, tmp_path, monkeypatch, caplog):
    from video import VideoError

    zoom = train.zoom_pass

    def failing(model, groups, *rest):
        zoom(model, groups[1:], *rest)
        return {groups[0].view.sample.id: VideoError("v.mp4", "damaged", "repair it")}

    monkeypatch.setattr(train, "zoom_pass", failing)
    main(["--config", str(recipe), "--steps", "1"])
    assert read_metrics(tmp_path / "run")[0]["failed_videos"] == 1 and "v.mp4: damaged" in caplog.text


def test_responses_that_say_nothing_are_no_exception(recipe, tmp_path, tokenizer):
    """A policy with random weights: no answer, no span, often no end."""
    from world import tiny

    tiny.build_model(tokenizer).save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    main(["--config", str(recipe), "--model", str(tmp_path / "mute"), "--max_tokens", "3", "--steps", "1"])
    (row,) = read_metrics(tmp_path / "run")
    assert row["reward/format_mean"] == row["reward/zoom_mean"] == 0 and row["zero_variance_fraction"] == 1
    assert row["unfinished_fraction"] > 0.5


def test_a_reward_that_is_not_finite_stops_the_run(recipe, monkeypatch):
    monkeypatch.setattr(rewards, "iou_reward", lambda *_: math.nan)
    with pytest.raises(RewardError, match=r"sample train-\d+-\d: iou: rewards must be finite"):
        main(["--config", str(recipe)])


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, monkeypatch):
    loss = grpo.grpo_loss

    def broken(**arguments):
        value, stats = loss(**arguments)
        return value * math.inf, stats

    monkeypatch.setattr(grpo, "grpo_loss", broken)
    with pytest.raises(TrainingError, match=r"the loss of samples train-\d+-\d, train-\d+-\d is (inf|-inf|nan)"):
        main(["--config", str(recipe)])
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_folder_with_a_run_is_not_overwritten_unasked(recipe, tmp_path):
    out = tmp_path / "run"
    main(["--config", str(recipe), "--steps", "1"])
    with pytest.raises(TrainingError, match=r"holds a run already.*--resume.*--overwrite"):
        main(["--config", str(recipe), "--steps", "2"])
    assert len(read_metrics(out)) == 1
    (out / "mine.txt").write_text("kept")
    main(["--config", str(recipe), "--steps", "2", "--overwrite"])
    assert len(read_metrics(out)) == 2 and (out / "mine.txt").exists()


# ---------------------------------------------------------------- signals and resuming


def test_resuming_without_a_checkpoint_is_an_error(recipe):
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        main(["--config", str(recipe), "--resume"])


def wait_for_metrics(process: BaseProcess, path: Path, lines: int) -> None:
    for _ in range(6000):
        if process.exitcode is not None or (path.exists() and path.read_text().count("\n") >= lines):
            return
        time.sleep(0.1)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_as_if_nothing_had_happened(finished, tmp_path, number):
    out = tmp_path / "stopped"
    arguments = ["--config", finished / "run" / "config.yaml", "--out", out, "--tracker", "none", "--test_data", ""]
    process = start(tmp_path / "errors", *arguments)
    wait_for_metrics(process, out / "metrics.jsonl", 1)
    os.kill(process.pid, number)
    process.join(600)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 128 + number, errors
    assert "Traceback" not in errors and "stopping soon" in errors and "--resume continues" in errors
    done = json.loads((out / "state" / "step.json").read_text())["step"]
    assert 1 <= done < 3 and (out / "checkpoint" / "config.json").exists()

    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "rew')  # as a crash would leave it
    main(["--config", str(out / "config.yaml"), "--resume"])
    assert_same_run(finished / "run", out)


def test_a_signal_outside_the_loop_is_python_s_own(recipe):
    before = signal.getsignal(signal.SIGINT)
    main(["--config", str(recipe), "--steps", "1"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stop_during_a_step_repeats_that_step(recipe, tmp_path, monkeypatch):
    """Stopped before the first update: the checkpoint is the start, and no thread is left behind."""
    roll_out = train.roll_out

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return roll_out(*arguments, **options)

    monkeypatch.setattr(train, "roll_out", interrupted)
    with pytest.raises(Stopped):
        main(["--config", str(recipe)])
    assert json.loads((tmp_path / "run" / "state" / "step.json").read_text())["step"] == 0
    assert read_metrics(tmp_path / "run") == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    monkeypatch.setattr(train, "roll_out", roll_out)
    main(["--config", str(recipe), "--resume"])
    main(["--config", str(recipe), "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once(recipe, monkeypatch):
    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(train, "roll_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--config", str(recipe)])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_finished_run_can_be_resumed_and_continued(recipe, tmp_path, small_world, caplog):
    out = tmp_path / "run"
    with_table = ["--test_data", str(small_world["test"])]
    main(["--config", str(recipe), "--steps", "1", *with_table])
    page, start = (out / "episodes.html").read_text(), (out / "results-before.jsonl").read_text()
    (out / "evaluation.json").unlink()
    main(["--config", str(recipe), "--steps", "1", "--resume", *with_table])  # only the table is made again
    assert len(read_metrics(out)) == 1 and (out / "episodes.html").read_text() == page
    assert (out / "evaluation.json").exists() and "another" not in caplog.text
    main(["--config", str(recipe), "--steps", "2", "--lr", "2e-3", "--resume", *with_table])
    assert "resuming with another lr: 0.002, before 0.001" in caplog.text
    assert "another steps" in caplog.text and caplog.text.count("another") == 2
    assert [row["step"] for row in read_metrics(out)] == [0, 1]
    assert (out / "results-before.jsonl").read_text() == start


def test_a_checkpoint_survives_a_kill_while_the_next_is_renamed(recipe, tmp_path):
    out = tmp_path / "run"
    main(["--config", str(recipe), "--steps", "1"])
    (out / "state").rename(out / "state.old")
    (out / "state.part").mkdir()
    (out / "state.part" / "stale").write_text("")
    main(["--config", str(recipe), "--steps", "2", "--resume"])
    assert len(read_metrics(out)) == 2
    assert (out / "state").exists() and not (out / "state.old").exists() and not (out / "state" / "stale").exists()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    accelerator = type("Main", (), {"is_main_process": True})
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    keep_metrics(path, 2, accelerator)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    keep_metrics(path, 0, accelerator)
    assert path.read_text() == ""
