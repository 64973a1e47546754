"""Evaluation: rows, scores worked out by hand, controls, unreadable videos, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import config as configuration
import data
import evaluate
from evaluate import by_kind, chance_iou, main, save_and_print, scores, table, unanswered
from policy import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), "--eval_controls", "--eval_batch", "3"])


@pytest.fixture(scope="module")
def samples(small_world):
    return data.load(small_world["test"], video_root=small_world["test"].parent)


@pytest.fixture(scope="module")
def model(talker):
    return load(str(talker))[0]


def row(**changes) -> dict:
    """A row of a question about 4 to 8 s that was answered and grounded perfectly."""
    values = {"id": "0", "video": "v.mp4", "kind": "fine", "duration": 20.0, "answer": "B", "predicted_answer": "B"}
    values |= {"glue": [[4.0, 8.0]], "spans": [[4.0, 8.0]], "zoom_answer": "B", "format": 1.0, "response": "..."}
    values |= {"error": None, "shuffled_spans": [(6.0, 10.0)], "true_zoom_answer": "B"}
    return values | changes


# ---------------------------------------------------------------- scores


def test_scores_by_hand():
    rows = [
        row(),
        row(spans=[[6.0, 8.0]], predicted_answer="A", zoom_answer="C", format=0.0),  # IoU 0.5, IoP 1
        row(
            glue=[[10.0, 12.0]], spans=None, predicted_answer=None, zoom_answer=None, true_zoom_answer=None, format=0.0
        ),
    ]
    result = scores(rows)
    assert result["questions"] == 3 and result["unanswered"] == 1 and result["unreadable"] == 0
    assert result["mIoU"] == pytest.approx((1 + 0.5 + 0) / 3) and result["mIoP"] == pytest.approx(2 / 3)
    assert result["accuracy"] == result["zoom_accuracy"] == result["format"] == pytest.approx(1 / 3)
    assert result["Acc@GQA"] == pytest.approx(1 / 3) and result["true_zoom_accuracy"] == pytest.approx(2 / 3)
    # the span claimed for other videos' questions shares 2 of 6 seconds with (4, 8), and none with (10, 12)
    assert result["shuffled mIoU"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    # a random question's evidence: (4, 8) for two of three
    assert chance_iou(rows[0], rows) == pytest.approx(2 / 3) and chance_iou(rows[2], rows) == pytest.approx(1 / 3)
    assert result["chance mIoU"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_chance_is_about_the_same_video():
    rows = [row(), row(video="w.mp4", glue=[[0.0, 1.0]])]
    assert chance_iou(rows[0], rows) == 1.0


def test_no_zoom_counts_as_wrong():
    assert scores([row(zoom_answer=None), row()])["zoom_accuracy"] == 0.5


def test_an_unreadable_video_counts_as_unanswered(samples):
    rows = [row(), unanswered(samples[0], "v.mp4: broken")]
    result = scores(rows)
    assert result["unreadable"] == 1 and result["unanswered"] == 1 and result["questions"] == 2
    assert all(result[name] == 0.5 for name in ("mIoU", "accuracy", "zoom_accuracy", "format", "true_zoom_accuracy"))
    text = table({"policy": rows})
    assert "policy: 1 questions count as unanswered, their videos are unreadable" in text
    assert "unreadable" not in table({"policy": [row()]})


def test_scores_by_kind():
    rows = [row(), row(kind="blink", predicted_answer="A"), row(kind="")]
    result = by_kind(rows)
    assert list(result) == ["blink", "fine"] and result["blink"]["accuracy"] == 0 and result["fine"]["questions"] == 1


def test_the_table_of_two_results(tmp_path, capsys):
    results = {"before": [row(spans=None)], "after": [row()]}
    save_and_print(results, tmp_path / "new")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("mIoU ")]
    assert line.split() == ["mIoU", "0.000", "1.000", "+1.000"]
    assert lines[0].split() == ["score", "before", "after", "change"]
    assert len({len(line) for line in lines}) == 1  # columns are aligned
    numbers = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert numbers["after"]["all"]["mIoU"] == 1 and numbers["before"]["by_kind"]["fine"]["mIoU"] == 0
    assert len((tmp_path / "new" / "results-after.jsonl").read_text().splitlines()) == 1


def test_without_controls_there_are_no_control_rows():
    bare = {name: value for name, value in row().items() if name not in ("shuffled_spans", "true_zoom_answer")}
    assert "shuffled" not in table({"policy": [bare]}) and "shuffled mIoU" in table({"policy": [row()]})


# ---------------------------------------------------------------- rows


def test_rows_of_a_policy(model, samples, config, vocabulary):
    rows = evaluate.evaluate(model, samples, config, vocabulary, Accelerator(cpu=True), "test")
    assert [r["id"] for r in rows] == [s.id for s in samples]
    for r, sample in zip(rows, samples, strict=True):
        assert r["answer"] == sample.answer and r["kind"] == sample.kind and r["error"] is None
        assert r["true_zoom_answer"] in "ABCD" and "response" in r and "shuffled_spans" in r
    one_by_one = evaluate.evaluate(
        model, samples, replace(config, eval_batch=1, rollout_batch=1), vocabulary, Accelerator(cpu=True), "test"
    )
    assert [r["response"] for r in one_by_one] == [r["response"] for r in rows]


def test_controls_ask_other_questions_and_zoom_on_the_true_spans(model, samples, config, vocabulary, monkeypatch):
    asked, zoomed = [], []
    roll_out, answer_clips = evaluate.roll_out, evaluate.answer_clips
    monkeypatch.setattr(
        evaluate, "roll_out", lambda m, views, *rest, **o: asked.append(views) or roll_out(m, views, *rest, **o)
    )
    monkeypatch.setattr(
        evaluate, "answer_clips", lambda m, jobs, *rest: zoomed.append(jobs) or answer_clips(m, jobs, *rest)
    )
    evaluate.evaluate(model, samples, replace(config, eval_batch=64), vocabulary, Accelerator(cpu=True), "test")
    plain, control = asked
    shift = len(samples) // 2
    for i, (own, other) in enumerate(zip(plain, control, strict=True)):
        assert own.sample == samples[i] and other.sample.video == samples[i].video
        assert other.sample.question == samples[(i + shift) % len(samples)].question
    for sample, (asked_about, clip, think) in zip(samples, zoomed[-1], strict=True):
        assert asked_about == sample and think is None
        inside = [any(s <= t < e for s, e in sample.spans) for t in clip.times]
        assert all(inside) or min(e - s for s, e in sample.spans) < 1


def test_an_unreadable_video_is_named_once_and_the_rest_goes_on(model, samples, config, vocabulary, tmp_path, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    video = samples[0].video
    mixed = [replace(s, video=str(tmp_path / "broken.mp4")) if s.video == video else s for s in samples]
    rows = evaluate.evaluate(model, mixed, replace(config, eval_batch=64), vocabulary, Accelerator(cpu=True), "test")
    broken = [r for r in rows if r["error"]]
    assert len(broken) == sum(s.video == video for s in samples) and "broken.mp4" in broken[0]["error"]
    assert caplog.text.count("counts as unanswered") == 1
    good = evaluate.evaluate(model, samples, config, vocabulary, Accelerator(cpu=True), "test")
    assert [r["response"] for r in rows if not r["error"]] == [
        r["response"] for r, s in zip(good, samples, strict=True) if s.video != video
    ]


def test_a_test_set_without_any_readable_video(model, samples, config, vocabulary, tmp_path):
    lost = [replace(s, video=str(tmp_path / "nowhere.mp4")) for s in samples]
    with pytest.raises(
        data.DataError, match=f"none of the {len(samples)} videos can be read; the first: .*nowhere.mp4"
    ):
        evaluate.evaluate(model, lost, config, vocabulary, Accelerator(cpu=True), "test")


def test_a_policy_in_training_mode_is_evaluated_the_same(model, samples, config, vocabulary):
    plain = evaluate.evaluate(model.eval(), samples, config, vocabulary, Accelerator(cpu=True), "test")
    model.train()
    again = evaluate.evaluate(model, samples, config, vocabulary, Accelerator(cpu=True), "test")
    model.eval()
    assert plain == again


# ---------------------------------------------------------------- the command


def test_the_command(recipe, tmp_path, small_world, capsys):
    main(["--config", str(recipe), "--test_data", str(small_world["test"])])
    out = capsys.readouterr().out
    assert "zoom_accuracy" in out and "change" not in out
    assert (tmp_path / "run" / "evaluation.json").exists() and (tmp_path / "run" / "results-policy.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--test_data", "nowhere.jsonl"], "error: nowhere.jsonl"),
        ([], "error: nothing to evaluate on: give --test_data"),
    ],
)
def test_mistakes_end_with_one_line(recipe, arguments, expected):
    command = [sys.executable, "evaluate.py", "--config", str(recipe), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr and expected in done.stderr


def test_questions_without_options_are_refused(recipe, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text('{"video": "v.mp4", "question": "What?", "options": [], "answer": "A", "glue": [[0, 1]]}\n')
    with pytest.raises(data.DataError, match=r"open.jsonl.*row 1.*options"):
        main(["--config", str(recipe), "--test_data", str(path)])


def test_torch_gradients_are_not_recorded(model, samples, config, vocabulary, monkeypatch):
    seen = []
    roll_out = evaluate.roll_out
    monkeypatch.setattr(evaluate, "roll_out", lambda *a, **o: seen.append(torch.is_grad_enabled()) or roll_out(*a, **o))
    evaluate.evaluate(model, samples[:2], config, vocabulary, Accelerator(cpu=True), "test")
    assert seen and not any(seen)
