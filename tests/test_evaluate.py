"""Evaluation: rows, scores worked out by hand, controls, unreadable videos, and the command."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import read_nearly, run_in_two_processes
from pagetree import Tree
from runs import end_of

import config as configuration
import evaluate
from annotations.rows import DataError
from annotations.samples import read_samples, write_samples
from engine.loading import load
from evaluate import main, save_and_print, share, unanswered
from harness import asking
from report.results import row_of
from report.scores import by_kind, chance_iou, overall
from report.tables import aligned, clue_table, official_scores, official_text, table

ROOT = Path(__file__).resolve().parents[1]
FACTS = Path(__file__).resolve().parent / "facts"


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), "--eval_controls", "--eval_batch", "3"])


@pytest.fixture(scope="module")
def samples(small_world):
    return read_samples(small_world["test"], video_root=small_world["test"].parent)


@pytest.fixture(scope="module")
def model(talker):
    return load(str(talker))[0]


def row(**changes) -> dict:
    """A row of a question about 4 to 8 s that was answered and grounded perfectly."""
    values = {"id": "0", "video": "v.mp4", "kind": "fine", "duration": 20.0, "answer": "B", "predicted_answer": "B"}
    values |= {
        "evidence": [[4.0, 8.0]],
        "predicted": [[4.0, 8.0]],
        "zoom_answer": "B",
        "format": 1.0,
        "response": "...",
    }
    values |= {"error": None, "shuffled_spans": [(6.0, 10.0)], "true_zoom_answer": "B"}
    return values | changes


# ---------------------------------------------------------------- scores


def test_scores_by_hand():
    rows = [
        row(),
        row(predicted=[[6.0, 8.0]], predicted_answer="A", zoom_answer="C", format=0.0),  # IoU 0.5, IoP 1
        row(
            evidence=[[10.0, 12.0]],
            predicted=None,
            predicted_answer=None,
            zoom_answer=None,
            true_zoom_answer=None,
            format=0.0,
        ),
    ]
    result = overall(rows)
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
    rows = [row(), row(video="w.mp4", evidence=[[0.0, 1.0]])]
    assert chance_iou(rows[0], rows) == 1.0


def test_no_zoom_counts_as_wrong():
    assert overall([row(zoom_answer=None), row()])["zoom_accuracy"] == 0.5


def test_an_unreadable_video_counts_as_unanswered(samples):
    rows = [row(), unanswered(samples[0], "v.mp4: broken", "world")]
    result = overall(rows)
    assert result["unreadable"] == 1 and result["unanswered"] == 1 and result["questions"] == 2
    assert all(result[name] == 0.5 for name in ("mIoU", "accuracy", "zoom_accuracy", "format", "true_zoom_accuracy"))
    text = table({"policy": rows})
    assert "policy: 2 questions, 1 unanswered, 1 without a span; 1 of them count as unanswered" in text
    assert "unreadable" not in table({"policy": [row()]})


def test_what_an_answer_took_is_counted_where_there_was_one(samples):
    """An unreadable video has no frames, and not 0 of them; the test is about the questions that both results have."""
    seen = [row(id=f"{k}", video=f"{k}.mp4", calls=1, frames=30 + k, visual_tokens=60) for k in range(4)]
    for r, name in itertools.product(seen, ("zoom_answer", "true_zoom_answer", "shuffled_spans")):
        r.pop(name, None)  # an episode has no zoom pass
    sample = replace(samples[0], id="3", video="3.mp4", kind=seen[0]["kind"])
    lost = unanswered(sample, "3.mp4: broken", "world_zoomer")
    assert overall([*seen[:3], lost])["frames"] == 31
    lines = table({"one": [*seen[:3], lost], "two": [{**r, "frames": r["frames"] + 2} for r in seen]}).splitlines()
    (line,) = [line for line in lines if line.startswith("frames ")]
    found = line.split()
    assert found[1] == "31.000" and found[4] == "33.500" and found[7] == "+2.000"


def test_scores_by_kind():
    rows = [row(), row(kind="blink", predicted_answer="A"), row(kind=""), row(kind="fine + blink")]
    result = by_kind(rows)
    assert list(result) == ["blink", "fine"]
    assert result["blink"]["accuracy"] == 0.5 and result["fine"]["questions"] == 2  # one question counts under both


def test_the_table_of_two_results():
    """With intervals over the videos, and the paired test."""
    before = [row(id=f"{k}", video=f"{k}.mp4", predicted=None) for k in range(20)]
    after = [{**r, "predicted": [[4.0, 8.0]]} for r in before]
    lines = table({"before": before, "after": after}).splitlines()
    assert lines[0].split() == ["score", "before", "after", "change"]
    (line,) = [line for line in lines if line.startswith("mIoU ")]
    assert " ".join(line.split()) == "mIoU 0.000 [0.00, 0.00] 1.000 [1.00, 1.00] +1.000 [+1.00, +1.00] p <= 0.0001"
    (line,) = [line for line in lines if line.startswith("accuracy ")]
    assert line.endswith("+0.000 [+0.00, +0.00] p = 1.0000")
    (line,) = [line for line in lines if line.startswith("fine (20): mIoU")]
    assert line.split()[-3:] == ["0.000", "1.000", "+1.000"]


def test_the_columns_of_a_table_are_aligned():
    assert aligned([("a", "bb"), ("cc", "d", "e")]) == "a   bb\ncc  d   e"


def test_scores_that_a_data_set_does_not_have_are_left_out():
    text = table({"policy": [row(answer=None, predicted_answer=None, kind="")]})
    assert "mIoU" in text and "accuracy" not in text and "Acc@GQA" not in text
    bare = {name: value for name, value in row().items() if name not in ("shuffled_spans", "true_zoom_answer")}
    assert "shuffled" not in table({"policy": [bare]}) and "shuffled mIoU" in table({"policy": [row()]})


def test_scores_by_length_and_portion_of_the_evidence():
    rows = [row(), row(evidence=[[0.0, 1.0]], predicted=None), row(evidence=[], predicted=None)]
    rows += [row(evidence=[[0.0, 2.0]], predicted=None), row(evidence=[[4.0, 9.0]], duration=None)]
    other = [{**r, "predicted_answer": "A"} for r in rows]
    lines = [line.split("  ") for line in clue_table({"a": rows, "b": other}).splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["evidence", "questions", "a: mIoU", "a: accuracy", "b: mIoU", "b: accuracy"],
        ["1.0–2.0 s", "1", "0.000", "1.000", "0.000", "0.000"],
        ["2.0–4.0 s", "1", "0.000", "1.000", "0.000", "0.000"],
        ["4.0–5.0 s", "2", "0.900", "1.000", "0.900", "0.000"],
        ["unknown", "1", "-", "1.000", "-", "0.000"],
        ["5.0–10.0% of the video", "1", "0.000", "1.000", "0.000", "0.000"],
        ["10.0–20.0% of the video", "2", "0.500", "1.000", "0.500", "0.000"],
        ["unknown", "2", "0.800", "1.000", "0.800", "0.000"],
    ]


@pytest.mark.painted
def test_what_an_evaluation_leaves_behind(samples, tmp_path, capsys):
    results = {
        label: [{**row(), **row_of(sample, answer, [[0.0, 5.0]])} for sample in samples]
        for label, answer in (("before", None), ("after", "A"))
    }
    save_and_print(results, tmp_path / "new", samples)
    assert table(results) in capsys.readouterr().out
    out = tmp_path / "new"
    numbers = json.loads((out / "evaluation.json").read_text())
    assert numbers["before"]["all"]["accuracy"] == 0 and numbers["before"]["official"] == {}
    low, high = numbers["after"]["intervals"]["mIoU"]
    assert low <= numbers["after"]["all"]["mIoU"] <= high and "fine" in numbers["after"]["by_kind"]
    assert sum(group["questions"] for group in numbers["after"]["by_clue_length"].values()) == len(samples)
    assert len((out / "results-after.jsonl").read_text().splitlines()) == len(samples)
    page = Tree((out / "evaluation.html").read_text()).root
    assert len(page.all("tbody")[1].all("tr")) == len(samples) and samples[0].question in page.text
    assert [r.all("th")[0].text for r in page.all("table", "summary")[0].all("tr")[1:]] == ["before", "after"]
    assert (out / "clue.png").stat().st_size > 1000


# ---------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def evaluated() -> list[list[dict]]:
    """The rows below, once they are there."""
    return []


@pytest.fixture
def rows(evaluated, model, samples, config, vocabulary) -> list[dict]:
    """Those of all samples, which several tests compare with others."""
    if not evaluated:
        evaluated.append(evaluate.evaluate(model, samples, config, vocabulary, Accelerator(cpu=True), "test"))
    return evaluated[0]


def test_rows_of_a_policy(model, samples, config, vocabulary, rows):
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
    roll_out, answer_clips = asking.roll_out_batch, asking.answer_clips
    monkeypatch.setattr(
        asking, "roll_out_batch", lambda m, views, *rest, **o: asked.append(views) or roll_out(m, views, *rest, **o)
    )
    monkeypatch.setattr(
        asking, "answer_clips", lambda m, jobs, *rest: zoomed.extend(jobs) or answer_clips(m, jobs, *rest)
    )
    evaluate.evaluate(model, samples, replace(config, eval_batch=64), vocabulary, Accelerator(cpu=True), "test")
    [views] = asked
    plain, control = views[::2], views[1::2]
    shift = len(samples) // 2
    for i, (own, other) in enumerate(zip(plain, control, strict=True)):
        assert own.sample == samples[i] and other.sample.video == samples[i].video
        assert other.sample.question == samples[(i + shift) % len(samples)].question
    last = {about.id: (about, clip, think) for about, clip, think in zoomed}  # of a question's zooms
    for sample in samples:
        asked_about, clip, think = last[sample.id]
        assert asked_about == sample and think is None
        inside = [any(s <= t < e for s, e in sample.evidence) for t in clip.times]
        assert all(inside) or min(e - s for s, e in sample.evidence) < 1


def test_an_unreadable_video_is_named_once_and_the_rest_goes_on(
    model, samples, config, vocabulary, rows, tmp_path, caplog
):
    good = rows
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    video = samples[0].video
    mixed = [replace(s, video=str(tmp_path / "broken.mp4")) if s.video == video else s for s in samples]
    rows = evaluate.evaluate(model, mixed, replace(config, eval_batch=64), vocabulary, Accelerator(cpu=True), "test")
    broken = [r for r in rows if r["error"]]
    assert len(broken) == sum(s.video == video for s in samples) and "broken.mp4" in broken[0]["error"]
    assert caplog.text.count("counts as unanswered") == 1
    assert [r["response"] for r in rows if not r["error"]] == [
        r["response"] for r, s in zip(good, samples, strict=True) if s.video != video
    ]


def test_a_test_set_without_any_readable_video(model, samples, config, vocabulary, tmp_path):
    lost = [replace(s, video=str(tmp_path / "nowhere.mp4")) for s in samples]
    with pytest.raises(DataError, match=f"none of the {len(samples)} videos can be read; the first: .*nowhere.mp4"):
        evaluate.evaluate(model, lost, config, vocabulary, Accelerator(cpu=True), "test")


def test_a_policy_in_training_mode_is_evaluated_the_same(model, samples, config, vocabulary, rows):
    model.train()
    again = evaluate.evaluate(model, samples, config, vocabulary, Accelerator(cpu=True), "test")
    model.eval()
    assert rows == again


# ---------------------------------------------------------------- the command


def test_the_command(recipe, tmp_path, small_world, capsys):
    out = tmp_path / "new"
    main(["--config", str(recipe), "--test_data", str(small_world["test"]), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "zoom_accuracy" in printed and "change" not in printed
    assert (out / "evaluation.json").exists() and (out / "results-policy.jsonl").exists()
    assert not (tmp_path / "run").exists()  # the recipe's folder is the run's


@pytest.mark.processes
def test_two_processes_evaluate_like_one(recipe, tmp_path, small_world, samples, capsys):
    common = ["--config", str(recipe), "--test_data", str(small_world["test"]), "--eval_batch", "2"]
    main([*common, "--out", str(tmp_path / "one")])
    asked = run_in_two_processes("evaluate", "two_pass_row", [*common, "--out", str(tmp_path / "two")], tmp_path)
    assert all(asked) and sorted(asked[0] + asked[1]) == [sample.id for sample in samples]
    one, two = (tmp_path / name / "results-policy.jsonl" for name in ("one", "two"))
    assert read_nearly(one) == [json.loads(row) for row in two.read_text().splitlines()]


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_every_question_is_answered_by_one_process_and_a_video_s_by_the_same(samples, n):
    shares = [share(samples, SimpleNamespace(process_index=k, num_processes=n)) for k in range(n)]
    assert sorted(i for mine in shares for i in mine) == list(range(len(samples)))
    videos = [{samples[i].video for i in mine} for mine in shares]
    assert sum(map(len, videos)) == len(set().union(*videos)) == 3
    assert max(map(len, videos)) - min(map(len, videos)) <= 1


# ---------------------------------------------------------------- result files


def scored(capsys, *arguments: object) -> str:
    main([str(a) for a in arguments])
    return capsys.readouterr().out


@pytest.fixture
def written(samples, tmp_path):
    """A data set and two result files about it: one always says A and names the first 5 s, the other knows all."""
    write_samples(tmp_path / "data.jsonl", samples)
    for name, known in (("guess", False), ("oracle", True)):
        rows = [
            {"id": s.id, "predicted_answer": s.answer if known else "A", "spans": s.evidence if known else [[0, 5]]}
            for s in samples
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_result_files_are_scored_and_compared_without_a_model(written, samples, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    files, out = [written / "guess.jsonl", written / "oracle.jsonl"], written / "out"
    printed = scored(capsys, "--test_data", written / "data.jsonl", "--results", *files, "--out", out)
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["score", "guess", "oracle", "change"]
    accuracy, _ = [line for line in lines if line[:1] == ["accuracy"]]  # and what it means, below the table
    share_of_a = sum(s.answer == "A" for s in samples) / len(samples)
    assert accuracy[1] == f"{share_of_a:.3f}" and accuracy[4] == "1.000" and accuracy[-3:-1] == ["p", "="]
    assert (out / "evaluation.html").exists() and (out / "clue.png").exists()


def test_the_official_scores_of_a_result_file_are_printed(tmp_path, capsys):
    """NExT-GQA's, from files in its format with real spans."""
    facts = json.loads((FACTS / "nextgqa.json").read_text())
    lines, evidence, rows = ["video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"], {}, []
    for id, duration, answer, letter, spans, predicted, _ in facts["rows"]:
        video, number = id.split("_")
        lines.append(f"{video},99,320,240,why,option {answer},{number},CW,{','.join(f'option {c}' for c in 'ABCDE')}")
        found = evidence.setdefault(video, {"duration": duration, "location": {}, "fps": 29.97})
        found["location"][number] = spans
        start, end = predicted or (None, None)
        # A result file has no reversed spans. They score 0; so do spans after the video.
        claimed = None if start is None else [[start, end] if start <= end else [9e9, 9e9 + 1]]
        rows.append({"id": id, "predicted_answer": letter, "spans": claimed})
    truth = tmp_path / "val.csv"
    truth.write_text("\n".join(lines))
    (tmp_path / "gsub_val.json").write_text(json.dumps(evidence))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ["--data_format", "nextgqa", "--test_data", truth, "--results", tmp_path / "r.jsonl"]
    printed = scored(capsys, *arguments, "--out", tmp_path / "out")
    (line,) = [line for line in printed.splitlines() if line.startswith("  count")]
    expected = facts["expected"]["aggregate"]
    expected["Acc"] = expected.pop("Acc (all rows in the qa file)")
    assert f"TIoU@0.5 {round(expected['TIoU@0.5'], 4)}," in line
    official = json.loads((tmp_path / "out" / "evaluation.json").read_text())["r"]["official"]
    assert official == pytest.approx(expected, rel=1e-9)


def test_a_score_for_the_best_checkpoint_that_these_questions_lack_is_named():
    config = configuration.Config(keep_best="Acc@GQA")
    with pytest.raises(configuration.ConfigError, match="keep_best = Acc@GQA: these questions have mIoU, format"):
        evaluate.score_of_best({"mIoU": 0.5, "format": 1.0}, config)
    assert evaluate.score_of_best({"Acc@GQA": 0.25}, config) == 0.25
    assert evaluate.score_of_best({"mIoU": 0.5}, configuration.Config()) is None


def test_an_evaluator_that_cannot_score_says_why(samples):
    rows = [row_of(sample, None, None) for sample in samples]
    found = official_scores(rows, "nextgqa")
    assert official_text(found) == "  not scored NExT-GQA: no question has a predicted span"
    assert official_scores(rows, "mlvu") == {}
    assert official_text({"a": {"b": {"x": 1.23456, "y": 2}, "c": 3}}) == " a  c 3\n a b  x 1.2346, y 2"


def test_files_are_named_by_as_many_folders_as_needed(tmp_path):
    a, b = tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"
    assert evaluate.labelled([str(a)]) == {"rows": a}
    assert evaluate.labelled([str(a), str(b)]) == {"a-rows": a, "b-rows": b}
    with pytest.raises(configuration.ConfigError, match="twice"):
        evaluate.labelled([str(a), str(a)])


def test_missing_videos_are_named_before_a_model_is_loaded(recipe, samples, tmp_path, monkeypatch, capsys):
    path = tmp_path / "data.jsonl"
    write_samples(path, [samples[0], replace(samples[1], video="nowhere.mp4")])
    arguments = ["--config", str(recipe), "--test_data", str(path), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(DataError, match=r"1 video files are missing: .*nowhere\.mp4"):
            main(arguments)
    main([*arguments, "--skip_missing"])
    assert "policy: 1 questions" in capsys.readouterr().out
    main([*arguments, "--skip_missing", "--results", str(tmp_path / "out" / "results-policy.jsonl")])
    assert "results-policy: 1 questions" in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--test_data", "nowhere.jsonl"], "error: nowhere.jsonl"),
        ([], "error: nothing to evaluate on: give --test_data"),
    ],
)
def test_mistakes_end_with_one_line(recipe, arguments, expected):
    end = end_of("evaluate.py", "--config", recipe, *arguments)
    assert end.startswith(expected) and "\n" not in end


def test_questions_without_options_are_refused(recipe, tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text('{"video": "v.mp4", "question": "What?", "options": [], "answer": "A", "glue": [[0, 1]]}\n')
    with pytest.raises(DataError, match=r"open.jsonl.*row 1.*options"):
        main(["--config", str(recipe), "--test_data", str(path)])


def test_torch_gradients_are_not_recorded(model, samples, config, vocabulary, monkeypatch):
    seen = []
    write = asking.roll_out_batch
    monkeypatch.setattr(
        asking, "roll_out_batch", lambda *a, **o: seen.append(torch.is_grad_enabled()) or write(*a, **o)
    )
    evaluate.evaluate(model, samples[:2], config, vocabulary, Accelerator(cpu=True), "test")
    assert seen and not any(seen)
