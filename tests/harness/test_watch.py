"""Runs that can be watched: lines without a terminal, pages on the way and at any end, evaluations, what is kept."""

from __future__ import annotations

import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
from conftest import read_metrics

import config as configuration
import train
from annotations.samples import write_samples
from harness import checkpoints
from harness.run import Stopped
from harness.watch import PATIENCE, Watch, advice, useless

FIGURES = {"zero_variance_fraction": 1.0, "unfinished_fraction": 0.0, "reward/format_mean": 0.99}
FIGURES |= {"reward/accuracy_mean": 0.02, "reward/iou_mean": 0.0, "reward/zoom_mean": 0.9}


@pytest.fixture
def start(recipe, tmp_path):
    """Trains with further options; returns the run's folder."""

    def run(*options):
        train.main(["--config", str(recipe), "--prompts_per_step", "2", "--prompts_per_pass", "2", *options])
        return tmp_path / "run"

    return run


@pytest.fixture
def two_questions(samples, tmp_path):
    """A data set to evaluate on."""
    write_samples(tmp_path / "two.jsonl", samples[:2])
    return tmp_path / "two.jsonl"


def test_a_run_without_a_terminal_prints_a_line(start, capsys):
    out = start("--log_every", "2", "--steps", "3")
    lines = re.findall(r"^step (\d)/3  (.*)$", capsys.readouterr().out, re.M)
    assert [number for number, _ in lines] == ["2", "3"]
    figures = dict(re.findall(r"(\S+) (\S+?)(?:  |$)", lines[0][1]))
    assert {"format", "accuracy", "iou", "zoom", "kl", "s/step"} <= figures.keys()
    row = read_metrics(out)[1]
    assert figures["format"] == f"{row['reward/format_mean']:.2f}"


@pytest.mark.painted
def test_a_stopped_run_has_curves_and_the_first_and_last_groups(start, tmp_path, monkeypatch):
    note = Watch.note

    def stop_at(self, step, groups, figures):
        note(self, step, groups, figures)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watch, "note", stop_at)
    with pytest.raises(Stopped):
        start("--steps", "9")
    out = tmp_path / "run"
    assert (out / "curves.png").stat().st_size > 1000
    assert "groups of step 1" in (out / "episodes-first.html").read_text()
    assert "groups of step 2" in (out / "episodes.html").read_text()


def test_an_error_leaves_what_was_done_before_it(start, tmp_path, monkeypatch):
    update = train.update

    def break_at_second(run, groups):
        if (tmp_path / "run" / "episodes-first.html").exists():
            raise ZeroDivisionError
        return update(run, groups)

    monkeypatch.setattr(train, "update", break_at_second)
    with pytest.raises(ZeroDivisionError):
        start()
    assert "groups of step 1" in (tmp_path / "run" / "episodes.html").read_text()
    assert (tmp_path / "run" / "curves.png").exists()


def test_evaluations_on_the_way_and_the_best_checkpoint(start, two_questions, monkeypatch, capsys):
    scores = iter([0.5, 0.9, 0.7, 0.8])  # before, after 1, 2 and all 3 steps
    kept = []
    monkeypatch.setattr(checkpoints, "link_checkpoint", lambda out, name: kept.append(name))
    summary = train.evaluate.overall

    def scored(rows):
        return summary(rows) | {"mIoU": kept_score[0]}

    kept_score = [0.5]
    inner = train.evaluate.evaluate

    def evaluate(*arguments):
        kept_score[0] = next(scores)
        return inner(*arguments)

    monkeypatch.setattr(train.evaluate, "overall", scored)
    monkeypatch.setattr(train.evaluate, "evaluate", evaluate)
    test = ["--test_data", str(two_questions), "--eval_every", "1", "--keep_best", "mIoU", "--steps", "3"]
    out = start(*test)
    assert kept == ["checkpoint-best"]
    assert json.loads((out / "best.json").read_text()) == {"step": 1, "metric": "mIoU", "score": 0.9}
    assert sorted(path.name for path in out.glob("results-*.jsonl")) == [
        f"results-{name}.jsonl" for name in ("1", "2", "after", "before")
    ]
    assert "after 2 steps: mIoU 0.700" in capsys.readouterr().out


def test_the_last_checkpoints_are_kept(start):
    out = start("--save_every", "1", "--steps", "3", "--keep_checkpoints", "2")
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint", "checkpoint-2", "checkpoint-3"]
    last, before = ((out / name / "model.safetensors").read_bytes() for name in ("checkpoint", "checkpoint-2"))
    assert (out / "checkpoint-3" / "model.safetensors").read_bytes() == last != before


def test_overwriting_leaves_nothing_of_the_run_before(start):
    out = start("--save_every", "1", "--keep_checkpoints", "2")
    (out / "results-7.jsonl").write_text("")
    start("--overwrite", "--steps", "1")
    assert not list(out.glob("checkpoint-*")) and not list(out.glob("results-7*"))


def test_keeping_the_best_needs_something_to_compare(start):
    with pytest.raises(configuration.ConfigError, match="it needs eval_every and test_data"):
        start("--keep_best", "mIoU")


def test_the_score_of_the_best_checkpoint_is_saved_with_it(start, two_questions, tmp_path, monkeypatch):
    """So that a kill between the two loses nothing."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "link_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        start("--test_data", str(two_questions), "--eval_every", "1", "--keep_best", "mIoU", "--steps", "2")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "checkpoint-best").exists()
    saved = json.loads((tmp_path / "run" / "state" / "step.json").read_text())
    assert saved["step"] == 1 and 0 <= saved["mIoU"] <= 1
    out = start("--test_data", "", "--resume", "--keep_best", "")
    assert json.loads((out / "state" / "step.json").read_text()) == {"step": 2, "drawn": 4, "failures": 0, "updates": 2}


def test_a_finished_run_that_is_resumed_has_its_curves_again(start):
    out = start("--steps", "1")
    (out / "curves.png").unlink()
    start("--steps", "1", "--resume")
    assert (out / "curves.png").exists()


def test_a_group_of_one_is_refused(start):
    with pytest.raises(configuration.ConfigError, match="group_size = 1: advantages compare"):
        start("--group_size", "1")


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "accuracy, iou cannot be told apart: take easier questions"),
        ({"reward/format_mean": 0.1}, "do not have the form of template = world"),
        ({"reward/accuracy_mean": 1.0, "reward/iou_mean": 0.9}, "all are right: take harder questions"),
        ({"unfinished_fraction": 0.95}, "95% of the responses hit a limit. Raise max_tokens = 40"),
    ],
)
def test_the_advice_names_the_reward_and_what_to_try(recipe, figures, words):
    config = configuration.parse(["--config", str(recipe)])
    assert words in advice(FIGURES | figures, config)


def test_steps_that_teach_nothing_are_warned_of_once_in_ten(recipe, caplog):
    config = configuration.parse(["--config", str(recipe), "--n_episodes", "0"])
    watch = Watch(SimpleNamespace(config=config, accelerator=SimpleNamespace(is_main_process=True)))
    for step in range(2 * PATIENCE - 1):
        watch.note(step, [], FIGURES)
    assert caplog.text.count("taught nothing") == 1
    watch.note(19, [], FIGURES | {"zero_variance_fraction": 0.9})  # one group teaches something
    for step in range(20, 20 + PATIENCE - 1):
        watch.note(step, [], FIGURES)
    assert caplog.text.count("taught nothing") == 1
    assert useless(FIGURES) and not useless(FIGURES | {"zero_variance_fraction": 0.99})


def test_trackers_get_a_few_responses_as_text(start, monkeypatch):
    told = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, values, step: told.append((step, values)))
    start("--steps", "1")
    [text] = [values["responses"] for _, values in told if "responses" in values]
    assert "?**" in text and "format" in text and "<" in text
