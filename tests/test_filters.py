"""Filters of samples: their rules by hand, the command, resuming, two processes, and bad input."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import pay, run_in_two_processes
from runs import end_of

import filters
from annotations.rows import DataError
from annotations.samples import read_samples, write_samples
from config import ConfigError
from engine.loading import load
from filters import FILTERS, iou_delta, measure_clues, measure_responses, verdict
from harness.asking import Agent
from harness.batches import view_all
from harness.chat import ChatError, Reply, RequestError
from rollout import answer_clips, zoom_clips

ROOT = Path(__file__).resolve().parents[1]
SHORT = ROOT / "tests" / "facts" / "qvhighlights_short.json"


@pytest.fixture
def agent(talker, vocabulary, config):
    return Agent(load(str(talker))[0], vocabulary, config)


@pytest.fixture
def asking(recipe, tmp_path):
    """The command line of the Stage II filter on the small world's training file, without --out."""
    return ["stage2", "--config", str(recipe), "--rollout_batch", "2"]


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the rules


def test_equation_6_by_hand():
    assert iou_delta([0.0, 0.5, 0.4, 0.8, 0.2]) == pytest.approx(0.8 - 1.9 / 5)  # the IoUs of Table 8
    assert iou_delta([0.3] * 8) == 0 and iou_delta([1.0] + [0.0] * 7) == 0.875


LOW, LOW_RELEASED = "delta < 0.1", "delta <= 0.1 and an IoU of 0"


@pytest.mark.parametrize(
    ("ious", "delta"),
    [([0.3, 0.3, 0.1, 0.1], 0.09999999999999998), ([0.8, 0.6, 0.8, 0.6], 0.10000000000000009)],
)
def test_a_delta_of_a_tenth_is_a_tenth_in_floats_too(ious, delta):
    assert iou_delta(ious) == delta != 0.1
    row = {"accuracies": [0.0] * 4, "ious": [*ious, 0.0], "delta": iou_delta(ious)}
    assert verdict(row, FILTERS["stage2"], "paper", 0.1)["kept"]
    assert not verdict(row, FILTERS["stage2"], "released", 0.1)["kept"]


@pytest.mark.parametrize(
    ("correct", "ious", "paper", "released"),
    [
        (0, [0.8, 0, 0, 0, 0, 0, 0, 0], None, None),
        (7, [0.8, 0, 0, 0, 0, 0, 0, 0], None, None),
        (8, [0.8, 0, 0, 0, 0, 0, 0, 0], "all correct", "all correct"),
        (4, [0.5] * 8, LOW, None),  # no variance: worthless to the paper, but every span meets the evidence
        (4, [0.0] * 8, LOW, LOW_RELEASED),
        (4, [0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0], None, LOW_RELEASED),  # delta is 0.1: the paper drops what is below
        (8, [0.5] * 8, f"all correct, {LOW}", "all correct"),
        (8, [0.0] * 8, f"all correct, {LOW}", f"all correct, {LOW_RELEASED}"),
    ],
)
def test_stage_2_rules(correct, ious, paper, released):
    row = {"accuracies": [1.0] * correct + [0.0] * (8 - correct), "ious": ious, "delta": iou_delta(ious)}
    for rule, reason in (("paper", paper), ("released", released)):
        judged = verdict(row, FILTERS["stage2"], rule, 0.1)
        assert judged == {**row, "kept": reason is None, "reason": reason}


@pytest.mark.parametrize(
    ("whole", "clue", "paper", "sufficient"),
    [("B", "B", True, True), ("B", "A", True, False), ("A", "B", False, True), ("A", None, True, False)],
)
def test_plm_video_rules(whole, clue, paper, sufficient):
    row = {"answer": "B", "whole_answer": whole, "clue_answer": clue}
    assert verdict(row, FILTERS["plm_video"], "paper", None)["kept"] is paper
    assert verdict(row, FILTERS["plm_video"], "sufficient", None)["kept"] is sufficient


def test_qvhighlights_keeps_videos_above_120_seconds(tmp_path, capsys):
    """Of the rows of the published file whose video is shorter than 150 s, which are 39."""
    facts = json.loads(SHORT.read_text())
    short = [dict(zip(facts["columns"], row, strict=True)) | {"query": f"Event {row[0]}"} for row in facts["rows"]]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, short)))
    command = ["qvhighlights", "--data_format", "qvhighlights", "--train_data", str(tmp_path / "val.jsonl")]
    filters.main([*command, "--video_root", "videos", "--out", str(tmp_path)])
    verdicts = read_lines(tmp_path)
    assert [row["duration"] for row in verdicts if not row["kept"]] == [120]
    samples = read_samples(tmp_path / "val.jsonl", "qvhighlights")
    assert len(verdicts) == len(samples) == 39
    assert read_samples(tmp_path / "train.jsonl") == [sample for sample in samples if sample.duration != 120]
    assert "not above 120 s" in capsys.readouterr().out
    filters.main([*command, "--video_root", "videos", "--out", str(tmp_path), "--threshold", "140"])
    assert {row["kept"] for row in read_lines(tmp_path) if row["duration"] <= 140} == {False}


# ---------------------------------------------------------------- what is measured


def test_responses_are_scored_as_in_training(agent, samples, monkeypatch):
    groups = []
    roll_out = filters.roll_out
    monkeypatch.setattr(filters, "roll_out", lambda *a, **k: groups.extend(roll_out(*a, **k)) or groups)
    views, _ = view_all(samples[:3], agent.config)
    rows = measure_responses(agent, views)
    pay(groups, replace(agent.config, zoom_reward=False))
    assert [row["accuracies"] for row in rows] == [group.rewards["accuracy"] for group in groups]
    assert [row["ious"] for row in rows] == [group.rewards["iou"] for group in groups]
    assert all(row["delta"] == iou_delta(row["ious"]) for row in rows)
    assert len(rows) == 3 and any(len(set(row["ious"])) > 1 for row in rows)


def test_events_without_options_are_judged_by_their_spans(agent, samples, recipe, tmp_path):
    event = replace(samples[0], options=(), answer=None, question="red shows a pattern")
    agent = replace(agent, config=replace(agent.config, template="longvtg_r1"))
    [row] = measure_responses(agent, view_all([event], agent.config)[0])
    assert row["accuracies"] == [] and len(row["ious"]) == agent.config.group_size
    assert verdict({**row, "delta": 0.2}, FILTERS["stage2"], "paper", 0.1)["kept"]
    write_samples(tmp_path / "data.jsonl", [event])
    arguments = ["stage2", "--config", str(recipe), "--train_data", str(tmp_path / "data.jsonl")]
    with pytest.raises(DataError, match=r"row 1 .* options, answer needed"):
        filters.main(arguments)


def test_the_clue_and_the_whole_video_get_the_same_question(agent, samples):
    outside = replace(samples[1], evidence=((900.0, 901.0),))
    views, _ = view_all([samples[0], outside, samples[2]], agent.config)
    with torch.no_grad():
        rows = measure_clues(agent, views)
    assert list(rows[1]) == ["error"] and outside.video in rows[1]["error"]
    for row, view in ((rows[0], views[0]), (rows[2], views[2])):
        clue = zoom_clips(view, [list(view.sample.evidence)], agent.config)[0]
        jobs = [(view.sample, clip, None) for clip in (view.clip, clue)]
        whole, part = answer_clips(agent.model, jobs, agent.config, agent.vocabulary)
        assert row == {"answer": view.sample.answer, "whole_answer": whole.answer, "clue_answer": part.answer}


class Judge:
    """An endpoint's stand-in: it knows an answer from up to 12 frames, refuses one question, and breaks down once."""

    name = "judge"

    def __init__(self, samples, refused: str, breaks_after: int):
        self.right = {sample.question: sample.answer for sample in samples}
        self.refused, self.left, self.answered, self.lock = refused, breaks_after, [], threading.Lock()

    def reply(self, messages) -> Reply:
        [message] = messages
        frames, words = message.parts
        question, _, rest = words.partition("\n")
        if question == self.refused:
            raise RequestError("endpoint: status 400: too long")
        with self.lock:
            self.left -= 1
            if not self.left:
                raise ChatError("endpoint: status 500")
            self.answered.append((words, frames.clip.frames.numpy().tobytes()))
        assert message.role == "user" and rest.endswith("Respond with only the letter of the option.")
        return Reply(f"({self.right[question]})" if len(frames.clip.frames) <= 12 else "I cannot tell.")


def test_a_judge_answers_in_the_policys_place(samples, recipe, tmp_path, monkeypatch):
    single = [replace(s, question=f"{s.id}: {s.question}") for s in samples if len(s.evidence) == 1][:5]
    write_samples(tmp_path / "data.jsonl", single)
    judge = Judge(single, refused=single[-1].question, breaks_after=5)
    monkeypatch.setattr(filters, "connect", lambda endpoint, model: judge)
    monkeypatch.setattr(filters, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    command = ["plm_video", "--config", str(recipe), "--rollout_batch", "2", "--judge_model", "large"]
    command += ["--train_data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path), "--rule", "sufficient"]
    with pytest.raises(ChatError, match="status 500"):
        filters.main(command)
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2  # the first batch's
    filters.main(command)
    *rows, last = read_lines(tmp_path)
    assert [(row["whole_answer"], row["clue_answer"]) for row in rows] == [(None, s.answer) for s in single[:4]]
    assert all(row["kept"] for row in rows) and last["reason"] == "not measured" and "status 400" in last["error"]
    assert len(judge.answered) == len(set(judge.answered)) == 2 * len(rows)


# ---------------------------------------------------------------- the command


def test_another_rule_needs_no_model(asking, samples, small_world, tmp_path, monkeypatch, capsys):
    asking += ["--out", str(tmp_path / "out")]
    filters.main(asking)
    first, printed = read_lines(tmp_path / "out"), capsys.readouterr().out
    assert [row["id"] for row in first] == [sample.id for sample in samples]
    assert all(row["kept"] == (FILTERS["stage2"].rules["paper"](row, 0.1) is None) for row in first)
    kept = [sample for sample, row in zip(samples, first, strict=True) if row["kept"]]
    assert 0 < len(kept) < len(samples) and ["kept", str(len(kept))] in [
        line.split()[:2] for line in printed.splitlines()
    ]
    # The file names videos as the one before did, so that it is read with the same --video_root.
    written = read_samples(tmp_path / "out/train.jsonl", video_root=small_world["train"].parent)
    assert written == kept and not any(Path(row["video"]).is_absolute() for row in first)

    monkeypatch.setattr(filters, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    filters.main([*asking, "--threshold", "0", "--video_root", str(small_world["train"].parent)])
    assert [row["kept"] for row in read_lines(tmp_path / "out")] == [min(row["accuracies"]) < 1 for row in first]
    filters.main([*asking, "--rule", "released"])
    judged = [verdict(row, FILTERS["stage2"], "released", 0.1) for row in first]
    assert read_lines(tmp_path / "out") == judged
    filters.main(asking)
    assert read_lines(tmp_path / "out") == first


def test_an_interrupted_run_measures_only_the_unfinished_batches(asking, samples, tmp_path, monkeypatch):
    filters.main([*asking, "--out", str(tmp_path / "whole")])
    whole = (tmp_path / "whole/verdicts.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    # Lines of two processes: the first two batches' and one of the fourth; another was being written.
    (tmp_path / "cut/verdicts.jsonl").write_bytes(b"".join([*lines[:2], lines[7], *lines[2:4], lines[8][:50]]))
    asked = []
    roll_out = filters.roll_out
    monkeypatch.setattr(
        filters, "roll_out", lambda m, views, *r, **k: asked.extend(views) or roll_out(m, views, *r, **k)
    )
    filters.main([*asking, "--out", str(tmp_path / "cut")])
    assert [view.sample.id for view in asked] == [sample.id for sample in samples[4:]]
    for name in ("verdicts.jsonl", "train.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.processes
def test_two_processes_measure_what_one_does(asking, samples, tmp_path):
    filters.main([*asking, "--out", str(tmp_path / "one")])
    read = run_in_two_processes("filters", "view_all", [*asking, "--out", str(tmp_path / "two")], tmp_path)
    assert all(read) and sorted(read[0] + read[1]) == [sample.id for sample in samples]
    for name in ("verdicts.jsonl", "train.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.fixture
def damaged(samples, tmp_path):
    """The training file, in which the first two of the samples have a video that cannot be read."""
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    broken = [replace(sample, video=str(tmp_path / "broken.mp4")) for sample in samples[:2]]
    write_samples(tmp_path / "damaged.jsonl", [*broken, *samples[2:]])
    return str(tmp_path / "damaged.jsonl")


@pytest.mark.parametrize("name", ["stage2", "plm_video"])
def test_an_unreadable_video_is_a_counted_skip(name, asking, damaged, tmp_path, capsys):
    filters.main([name, *asking[1:], "--train_data", damaged, "--out", str(tmp_path / "out")])
    rows = read_lines(tmp_path / "out")
    assert [row["reason"] == "not measured" for row in rows] == [True] * 2 + [False] * (len(rows) - 2)
    assert "broken.mp4" in rows[0]["error"] and not rows[1]["kept"]
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["dropped:", "not", "measured", "2"] for line in printed)
    assert any(line.startswith("the first error: ") and "broken.mp4" in line for line in printed)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which filter.* stage2, plm_video, qvhighlights"),
        (["stage3"], "invalid choice: 'stage3'"),
        (["stage2", "--rule", "sufficient"], "--rule of stage2 is one of paper, released, not 'sufficient'"),
        (["plm_video", "--threshold", "0.1"], "stage2 and qvhighlights take one"),
        (["stage2", "--threshold", "-1"], "not negative"),
        (["stage2", "--threshold", "nan"], "not negative"),
        (["stage2", "--config", "recipes/videozoomer_rl.yaml"], "those of template = videozoomer have several"),
        (["stage2", "--judge_model", "m"], "--judge_model, at an --endpoint, is for plm_video"),
        (["plm_video", "--endpoint", "http://localhost"], "an endpoint needs a model's name"),
        (["stage2", "--thresold", "1"], "the nearest is 'threshold'"),
    ],
)
def test_command_lines_that_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        filters.main(arguments)


def test_what_is_refused_before_a_model_is_loaded(asking, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    asking += ["--train_data", str(path), "--out", str(out)]
    write_samples(path, [samples[0], replace(samples[1], evidence=())])
    with pytest.raises(DataError, match=r"data\.jsonl: row 2 \(.*\): evidence needed, but missing or empty"):
        filters.main(asking)
    write_samples(path, [samples[0], replace(samples[1], video="nowhere.mp4")])
    with pytest.raises(DataError, match=r"1 video files are missing: .*nowhere\.mp4"):
        filters.main(asking)


def test_verdicts_of_something_else_are_refused(asking, samples, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    write_samples(path, samples[:2])
    asking += ["--train_data", str(path), "--out", str(tmp_path / "out"), "--threshold", "0"]
    filters.main(asking)
    monkeypatch.setattr(filters, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(DataError, match=r"verdicts\.jsonl: row 1, .*temperature was 1\.0 and is 0\.5 now"):
        filters.main([*asking, "--temperature", "0.5"])
    with pytest.raises(DataError, match=r"filter was 'stage2' and is 'plm_video' now"):
        filters.main(["plm_video", *asking[1:-2]])
    write_samples(path, [samples[0], replace(samples[1], question="Who?")])
    with pytest.raises(DataError, match=r"row 2, field 'question': .* is not in .*data\.jsonl; give another --out"):
        filters.main(asking)
    write_samples(path, samples[:1])
    with pytest.raises(DataError, match=r"row 2, field 'id': .* is not in .*data\.jsonl"):
        filters.main(asking)


def test_without_any_kept_sample_there_is_no_training_file(asking, tmp_path):
    filters.main([*asking, "--out", str(tmp_path)])
    assert (tmp_path / "train.jsonl").exists()
    with pytest.raises(DataError, match=r"train\.jsonl: not written, since no sample is kept"):
        filters.main([*asking, "--out", str(tmp_path), "--threshold", "1"])
    assert not (tmp_path / "train.jsonl").exists()
    assert {row["reason"] for row in read_lines(tmp_path)} >= {"delta < 1"}


def test_an_error_is_one_line():
    end = end_of("filters.py")
    assert end.startswith("error: which filter?") and "\n" not in end
