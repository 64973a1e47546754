"""Every official score is reproduced from the raw predictions in realdata; the logic is also tested on small rows."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from annotations.rows import LETTERS, DataError, Sample
from annotations.samples import read_samples, read_with_report

REAL = Path(__file__).resolve().parents[2] / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real annotation files are not at {REAL}")
EXACT = {"rel": 1e-12, "abs": 1e-12}


def load_json(name):
    return json.loads((REAL / name).read_text())


def load_lines(name):
    return [json.loads(line) for line in (REAL / name).read_text().splitlines()]


def row(answer="A", predicted="A", glue=((2, 6),), spans=((2, 6),), id="q", video="v", kind="", duration=20.0):
    return {
        "id": id,
        "video": video,
        "kind": kind,
        "duration": duration,
        "answer": answer,
        "predicted_answer": predicted,
        "glue": [list(s) for s in glue],
        "spans": None if spans is None else [list(s) for s in spans],
    }


# ---------------------------------------------------------------- official scores, real files


@real
@pytest.mark.parametrize("split", ["val", "test"])
def test_nextgqa_reproduces_the_official_scores(split):
    samples = read_samples(REAL / f"nextgqa/{split}.csv", "nextgqa")
    spans, answers = load_json(f"nextgqa/preds/{split}_ground.json"), load_json(f"nextgqa/preds/{split}-res.json")
    rows = [
        metrics.row_of(s, LETTERS[answers[s.id]["prediction"]], [spans[s.id]] if s.id in spans else None)
        for s in samples
    ]
    assert all(s.answer == LETTERS[answers[s.id]["answer"]] for s in samples)
    expected = load_json(f"nextgqa/preds/{split}_expected.json")
    scores = metrics.official("nextgqa", rows)
    for name, value in expected["official_printed"].items():
        assert f"{scores[name]:.1f}" == value, name
    scores["Acc (all rows in the qa file)"] = scores.pop("Acc")
    assert scores == pytest.approx(expected["aggregate"], **EXACT)
    items = {r["id"]: metrics.nextgqa_iou_iop(r["spans"][0], r["glue"]) for r in rows if r["spans"]}
    assert items == {id: pytest.approx(pair, **EXACT) for id, pair in expected["per_item_max_iou_iop"].items()}


@real
def test_rextime_reproduces_the_official_scores():
    samples = read_samples(REAL / "rextime/rextime_val.jsonl", "rextime")
    submission = {line["qid"]: line for line in load_lines("rextime/preds/submission.jsonl")}
    rows = [metrics.row_of(s, submission[s.id]["ans"], submission[s.id]["pred_relevant_windows"]) for s in samples]
    assert metrics.official("rextime", rows) == load_json("rextime/preds/expected.json")


@real
def test_cgbench_reproduces_the_official_scores_from_texts():
    samples = read_samples(REAL / "cgbench/cgbench_mini.json", "cgbench")
    responses = {str(line["qid"]): line for line in load_lines("cgbench/preds/responses.jsonl")}
    rows = []
    for s in samples:
        answer = metrics.cgbench_answer(responses[s.id]["long_acc_response"], s.answer)
        spans = metrics.cgbench_spans(responses[s.id]["miou_response"])
        rows.append(metrics.row_of(s, answer, spans))
        assert metrics.cgbench_iou(spans, s.evidence) == pytest.approx(responses[s.id]["official_iou"], **EXACT)
        assert (answer == s.answer) == responses[s.id]["official_acc"]
    scores = metrics.official("cgbench", rows)
    totals = {key.split("_")[0]: value for key, value in load_json("cgbench/preds/expected.json").items()}
    for m in metrics.CGBENCH_THRESHOLDS:
        assert round(scores[f"rec@{m}"] * len(rows), 9) == totals["rec@iou"][f"iou_th_{m}"]
        assert round(scores[f"acc@{m}"] * len(rows), 9) == totals["acc@iou"][f"th_{m}"]
    assert scores["rec@IoU"] == pytest.approx(totals["rec@iou"]["Accuracy"], **EXACT)
    assert scores["acc@IoU"] == pytest.approx(totals["acc@iou"]["Accuracy"], **EXACT)
    assert scores["mIoU"] == pytest.approx(totals["miou"]["Accuracy"], **EXACT)
    assert scores["accuracy"] == pytest.approx(totals["long"]["Accuracy"], **EXACT)
    ours = metrics.summarise(rows)
    assert ours["rec@IoU"] == pytest.approx(scores["rec@IoU"], **EXACT)
    assert ours["acc@IoU"] == pytest.approx(scores["acc@IoU"], **EXACT)
    assert ours["mIoU"] == pytest.approx(scores["mIoU"], **EXACT)


@real
@pytest.mark.parametrize(
    "truths, predictions, expected",
    [
        ("highlight_val_release.jsonl", "sample_val_preds.jsonl", "sample_val_preds_metrics_raw.json"),
        ("edge_val_gt.jsonl", "edge_val_preds.jsonl", "edge_val_expected.json"),
    ],
)
def test_qvhighlights_reproduces_the_official_scores(truths, predictions, expected):
    scores = metrics.qvhighlights_files(load_lines(f"qvhighlights/{truths}"), load_lines(f"qvhighlights/{predictions}"))
    assert scores == load_json(f"qvhighlights/{expected}")


@real
def test_charades_sta_reproduces_both_conventions():
    samples = read_samples(REAL / "charades_sta/charades_sta_test.txt", "charades_sta")
    predictions = load_lines("charades_sta/preds/topn.jsonl")
    rows = [metrics.row_of(s, None, line["pred"]) for s, line in zip(samples, predictions, strict=True)]
    expected = load_json("charades_sta/preds/topn_expected.json")
    scores = metrics.official("charades_sta", rows)
    assert scores == pytest.approx(
        {**expected["recall_strict"], **expected["recall_ge"], "mIoU": expected["mIoU_top1"]}, **EXACT
    )
    for r, ious in zip(rows, expected["per_item_iou"], strict=True):
        assert [metrics.hull_iou(span, r["glue"][0]) for span in r["spans"]] == pytest.approx(ious, **EXACT)


@real
def test_charades_sta_reproduces_the_scores_of_free_text():
    samples = read_samples(REAL / "charades_sta/temporal_grounding_charades.json", "charades_sta")
    responses = load_json("charades_sta/preds/tvg_responses.json")
    keys = [f"{s.video}>>>{s.question}>>>{list(s.evidence[0])}" for s in samples]
    spans = [metrics.charades_span(responses[key]) for key in keys]
    rows = [metrics.row_of(s, None, [span] if span else None) for s, span in zip(samples, spans, strict=True)]
    scores = metrics.official("charades_sta", rows)
    expected = load_json("charades_sta/preds/tvg_expected.json")
    assert {f"IOU {m}": scores[f"R@1,IoU>={m}"] for m in (0.3, 0.5, 0.7)} | {"mIOU": scores["mIoU"]} == pytest.approx(
        expected, **EXACT
    )


@real
def test_ego4d_nlq_reproduces_the_official_scores():
    samples, report = read_with_report(REAL / "format_examples/ego4d_nlq_gt.json", "ego4d_nlq")
    results = load_json("format_examples/ego4d_nlq_preds.json")["results"]
    spans = {f"{r['clip_uid']}_{r['annotation_uid']}_{r['query_idx']}": r["predicted_times"] for r in results}
    scores = metrics.official("ego4d_nlq", [metrics.row_of(s, None, spans.get(s.id)) for s in samples])
    expected = load_json("format_examples/ego4d_nlq_expected.json")
    recalls = [[scores[f"R@{k},IoU>{m}"] for k in expected["topK"]] for m in expected["thresholds"]]
    assert recalls == expected["recall[threshold][topK]"]
    assert scores["mIoU"] == pytest.approx(expected["mIoU"], **EXACT)
    assert f"Evaluated: {scores['count']} / {report.kept + len(report.dropped)} instances" == expected["printed"]


# ---------------------------------------------------------------- ours


def test_scores_of_one_question_by_hand():
    # Evidence 2-6 and 10-12: 6 s. Prediction 4-8 and 7-11, together 4-11: 7 s. Overlap 4-6 and 10-11: 3 s. Union: 10 s.
    scores = metrics.score(row(glue=[(2, 6), (10, 12)], spans=[(4, 8), (7, 11)]))
    assert scores == pytest.approx(
        {
            "accuracy": 1,
            "mIoU": 0.3,
            "mIoP": 3 / 7,
            "mIoG": 0.5,
            "R@0.3": 0,
            "R@0.5": 0,
            "R@0.7": 0,
            "rec@IoU": 3 / 5,
            "Acc@GQA": 0,
            "acc@IoU": 3 / 5,
        }
    )


def test_an_iou_equal_to_the_threshold_is_a_hit_for_cgbench_but_not_for_recall():
    scores = metrics.score(row(glue=[(0, 4)], spans=[(0, 2)]))
    assert (scores["mIoU"], scores["R@0.3"], scores["R@0.5"], scores["rec@IoU"]) == (0.5, 1, 0, 1)
    assert scores["Acc@GQA"] == 1  # IoP is 1
    assert metrics.score(row(glue=[(0, 2)], spans=[(0, 4)]))["Acc@GQA"] == 1  # IoP is exactly 0.5
    assert metrics.score(row(glue=[(0, 2)], spans=[(0, 4.1)]))["Acc@GQA"] == 0


@pytest.mark.parametrize("spans", [None, []])
def test_unanswered_and_spanless_questions_score_zero(spans):
    scores = metrics.score(row(predicted=None, spans=spans))
    assert set(scores.values()) == {0}
    assert {"accuracy", "mIoU", "mIoP", "mIoG", "Acc@GQA", "acc@IoU"} <= set(scores)


def test_means_are_over_the_questions_that_have_the_score():
    rows = [
        row(id="1"),
        row(id="2", predicted="B", spans=None),
        row(id="3", glue=[], spans=None),  # an answer without evidence
        row(id="4", answer=None, predicted=None),  # evidence without an answer
    ]
    summary = metrics.summarise(rows)
    assert (summary["questions"], summary["unanswered"], summary["without_span"]) == (4, 0, 1)
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["mIoU"] == pytest.approx(2 / 3)
    assert summary["Acc@GQA"] == pytest.approx(1 / 2)
    assert metrics.summarise([]) == {"questions": 0, "unanswered": 0, "without_span": 0}


def test_breakdown_by_kind_length_and_portion():
    rows = [
        row(id="1", kind="fine", glue=[(0, 1), (0.5, 2)]),  # 2 s, a tenth
        row(id="2", kind="fine + blink", glue=[(0, 10)]),  # 10 s, a half
        row(id="3", kind="blink", glue=[(0, 50)], duration=None),
        row(id="4", kind="", glue=[]),
    ]

    def sizes(by):
        return {name: group["questions"] for name, group in metrics.breakdown(rows, by).items()}

    assert sizes("kind") == {"blink": 2, "fine": 2, "unknown": 1}
    assert sizes("clue_length") == {"2 to 5 s": 1, "10 to 20 s": 1, "from 40 s": 1, "unknown": 1}
    assert sizes("clue_portion") == {"0.1 to 0.2": 1, "0.4 to 0.7": 1, "unknown": 2}
    with pytest.raises(ValueError, match="colour"):
        metrics.breakdown(rows, "colour")


# ---------------------------------------------------------------- intervals and tests


def coin_rows(videos, questions, seed=0, share=0.5):
    """`questions` per video, all of a video right or all wrong."""
    right = np.random.default_rng(seed).random(videos) < share
    return [
        row(id=f"{v}_{q}", video=f"v{v}", predicted="A" if right[v] else "B")
        for v in range(videos)
        for q in range(questions)
    ]


@pytest.mark.parametrize("questions", [1, 5])
def test_bootstrap_interval_is_that_of_the_videos_however_many_questions_they_have(questions):
    rows = coin_rows(400, questions)
    mean = metrics.summarise(rows)["accuracy"]
    low, high = metrics.bootstrap(rows)["accuracy"]
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(mean * (1 - mean) / 400), rel=0.1)
    assert metrics.bootstrap(rows)["accuracy"] == (low, high)


def test_bootstrap_knows_nothing_from_one_video():
    assert metrics.bootstrap([row(id="1"), row(id="2", predicted="B")])["accuracy"] == (0.5, 0.5)


def test_bootstrap_of_nothing():
    assert metrics.bootstrap([]) == {}
    assert metrics.bootstrap([row(answer=None, glue=[])]) == {}


def test_bootstrap_of_a_score_that_few_questions_have():
    rows = [row(id=f"{i}", video=f"v{i}", glue=[(2, 6)] if i == 0 else []) for i in range(20)]
    assert metrics.bootstrap(rows)["mIoU"] == (1, 1)


def test_paired_test_agrees_with_all_exchanges():
    a, b = coin_rows(8, 2, seed=1, share=0.9), coin_rows(8, 2, seed=2, share=0.3)
    result = metrics.paired_test(a, b, "accuracy")
    right_a, right_b = ([r["predicted_answer"] == "A" for r in rows[::2]] for rows in (a, b))
    differences = np.array(right_a, float) - np.array(right_b, float)
    all_sums = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=8)]
    assert result["difference"] == pytest.approx(differences.mean())
    assert result["p_value"] == pytest.approx(np.mean(np.array(all_sums) >= abs(differences.sum()) - 1e-9), abs=0.02)
    assert result["low"] <= result["difference"] <= result["high"]
    assert (result["questions"], result["videos"]) == (16, 8)


def test_paired_test_of_equal_and_of_very_different_results():
    a, b = coin_rows(30, 1, share=1.1), coin_rows(30, 1, share=-0.1)
    assert metrics.paired_test(a, a, "accuracy")["p_value"] == 1
    assert metrics.paired_test(a, list(reversed(b)), "accuracy")["p_value"] < 0.001


def test_paired_test_refuses_different_questions_and_unknown_scores():
    with pytest.raises(DataError, match=r"different questions.*'0_0'"):
        metrics.paired_test(coin_rows(3, 1), coin_rows(3, 1)[1:], "accuracy")
    with pytest.raises(DataError, match="'speed'"):
        metrics.paired_test(coin_rows(3, 1), coin_rows(3, 1), "speed")


# ---------------------------------------------------------------- result files

SAMPLES = [
    Sample("1", "videos/a.mp4", "?", ("x", "y"), "A", ((2.0, 6.0),), 20.0, "fine"),
    Sample("2", "videos/b.mp4", "?", ("x", "y"), "B", ((3.0, 4.0),), 20.0, "blink"),
]


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_results_survive_a_file(tmp_path):
    rows = [metrics.row_of(SAMPLES[0], "A", [[2.5, 6.0]]), metrics.row_of(SAMPLES[1], None, None)]
    metrics.write_results(tmp_path / "r.jsonl", rows)
    assert metrics.read_results(tmp_path / "r.jsonl", SAMPLES) == rows


def test_questions_without_a_line_are_unanswered(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"id": "2", "predicted_answer": "B", "spans": [[3, 4]]}])
    rows = metrics.read_results(path, SAMPLES)
    assert [r["predicted_answer"] for r in rows] == [None, "B"]
    assert metrics.summarise(rows)["accuracy"] == 0.5


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"id": f"x{i}", "predicted_answer": "A", "spans": []} for i in range(9)], r"9 of 9 .*\['x0', 'x1', 'x2'\]"),
        ([{"id": "1", "predicted_answer": "A", "spans": []}] * 2, "row 2, field 'id': '1' comes twice"),
        ([{"id": "1", "predicted_answer": "A"}], "row 1, field 'spans': is missing"),
        ([{"id": "1", "predicted_answer": 3, "spans": []}], "row 1, field 'predicted_answer': expected str or null"),
        ([{"id": "1", "predicted_answer": "A", "spans": [[6, 2]]}], "row 1, field 'spans': expected .*start <= end"),
        ([{"id": "1", "predicted_answer": "A", "spans": [], "video": "c.mp4"}], "field 'video': .*another data set"),
        ([{"id": "1", "predicted_answer": "A", "spans": [], "answer": "B"}], "field 'answer': .*another data set"),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        metrics.read_results(write_lines(tmp_path / "r.jsonl", lines), SAMPLES)


def test_results_may_name_the_video_in_another_folder(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{"id": "1", "predicted_answer": "A", "spans": [], "video": "/x/a.mkv"}])
    assert metrics.read_results(path, SAMPLES)[0]["video"] == "videos/a.mp4"


# ---------------------------------------------------------------- official scores, small rows


def test_nextgqa_rules():
    assert metrics.nextgqa_iou_iop([3, 3], [[2, 6]]) == (0, 1)  # a point inside
    assert metrics.nextgqa_iou_iop([7, 7], [[2, 6]]) == (0, 0)
    assert metrics.nextgqa_iou_iop([6, 2], [[2, 6]]) == (0, 0)  # reversed
    assert metrics.nextgqa_iou_iop([0, 10], [[0, 4], [6, 10]]) == (0.4, 0.4)  # the best span, not their union
    rows = [row(id="1"), row(id="2", spans=None), row(id="3", predicted="B")]
    scores = metrics.nextgqa(rows)
    assert (scores["count"], scores["Acc@GQA"], scores["mIoU"]) == (2, 50, 100)
    assert scores["Acc"] == pytest.approx(200 / 3)


def test_recalls_strict_and_not():
    rows = [row(glue=[(0, 4)], spans=[(0, 2), (0, 4)])]
    scores = metrics.charades_sta(rows)
    assert (scores["R@1,IoU>0.5"], scores["R@1,IoU>=0.5"], scores["R@5,IoU>0.5"], scores["mIoU"]) == (0, 100, 100, 50)
    scores = metrics.ego4d_nlq([*rows, row(spans=None)])  # the one without a prediction is left out
    assert (scores["count"], scores["R@1,IoU>0.3"], scores["R@1,IoU>0.5"], scores["mIoU"]) == (1, 1, 0, 0.5)
    assert metrics.charades_sta([*rows, row(spans=None)])["mIoU"] == 25


def test_rextime_counts_a_zero_length_span_as_missed():
    scores = metrics.rextime([row(glue=[(1, 1)], spans=[(1, 1)]), row()])
    assert (scores["VQA"], scores["full"]["MR-mIoU"], scores["full"]["VQA,mIoU"]["VQA,mIoU@0.7"]) == (1, 50, 0.5)


def test_cgbench_merges_overlapping_spans_on_both_sides():
    assert metrics.cgbench_iou([[4, 12], [4, 12]], [[4, 12]]) == 1
    assert metrics.cgbench_iou([[0, 4], [2, 6]], [[5, 8], [0, 5]]) == 6 / 8
    assert metrics.cgbench_iou([], [[5, 8]]) == 0
    scores = metrics.cgbench([row(), row(predicted=None, spans=None)])
    assert (scores["accuracy"], scores["mIoU"], scores["rec@IoU"], scores["acc@IoU"]) == (0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "text, letter, spans",
    [
        ('```json\n{"result": "B"}\n```', "B", []),
        ('```json\n{"result": B}\n```', "B", []),
        ("It is A, or rather C.", "C", []),  # the right one is among them
        ("It is A, or rather B.", "A", []),
        ("I do not know", None, []),
        ('```json\n{"result": [[4, 12.5], [20, 21]]}\n```', None, [[4, 12.5], [20, 21]]),
        ("from 4 to 12.5", None, [[4, 12.5]]),
        ("at 4", None, None),
        ('```json\n{"result": [[4, 12]\n```', None, [[4, 12]]),  # not JSON
        ("", None, []),
    ],
)
def test_cgbench_parser(text, letter, spans):
    assert metrics.cgbench_answer(text, right="C") == letter
    assert metrics.cgbench_spans(text) == spans


@pytest.mark.parametrize(
    "text, span",
    [
        ("The event happens in the 3.9 - 12.2 seconds.", [3.9, 12.2]),
        ("The event happens in 12 to 3.5 seconds", [3.5, 12]),
        ("Starting time: 14.5 seconds\nEnding time: 17.4 seconds", [14.5, 17.4]),
        ("The start is 3.5 and the end is 7.", None),
        ("9.3 - 11.8", None),
        ("I cannot find the event.", None),
    ],
)
def test_charades_parser(text, span):
    assert metrics.charades_span(text) == span


def test_qvhighlights_perfect_predictions_and_lengths():
    rows = [row(glue=[(0, 8)], spans=[(0, 8)]), row(glue=[(0, 20), (30, 36)], spans=[(0, 20), (30, 36)])]
    scores = metrics.qvhighlights(rows)
    assert list(scores) == ["short", "middle", "full"]  # no evidence is longer than 30 s
    assert set(scores["full"]["MR-mAP"].values()) == set(scores["full"]["MR-R1"].values()) == {100}
    assert scores["short"]["MR-R1"]["0.5"] == 50  # the first span of the second question is a middle one
    assert scores["short"]["MR-mAP"]["average"] == 75  # its short span is found at rank 2


def test_qvhighlights_ranks_by_score_and_finds_each_span_once():
    truth = row(glue=[(0, 10)], spans=[(50, 60), (0, 10), (0, 10)])
    assert metrics.moment_precisions(truth)[0] == 1 / 2
    assert metrics.moment_precisions({**truth, "span_scores": [0.1, 0.9, 0.8]})[0] == 1
    assert metrics.moment_precisions(row(glue=[(0, 10)], spans=[(50, 60)] * 10 + [(0, 10)])).max() == 0  # rank 11


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 5))
def test_average_precision_is_the_area_under_the_envelope(hits, missed):
    positives = sum(hits) + missed
    precisions = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    recalls = [sum(hits[: k + 1]) for k in range(len(hits))]
    area = sum(
        max((p for p, r in zip(precisions, recalls, strict=True) if r >= n), default=0) for n in range(1, positives + 1)
    )
    assert metrics.average_precision(np.array(hits), positives) == pytest.approx(area / positives if positives else 0)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=10))
def test_clip_precision_on_every_threshold(clips):
    positive, scores = np.array([p for p, _ in clips]), np.array([s for _, s in clips], dtype=float)
    points = []  # (found, precision) of the clips with at least a score
    for threshold in sorted(set(scores), reverse=True):
        chosen = positive[scores >= threshold]
        points.append((chosen.sum(), chosen.mean()))
    grows = [found > (points[i - 1][0] if i else 0) for i, (found, _) in enumerate(points)]
    best = [max(precision for _, precision in points[i:]) for i in range(len(points)) if grows[i]]
    assert metrics.clip_precision(positive, scores) == pytest.approx(np.mean(best) if best else 0)


def test_highlights_pad_and_cut_the_predicted_scores():
    truth = {"qid": 1, "duration": 7, "relevant_clip_ids": [0, 1], "saliency_scores": [[4, 1, 1], [3, 3, 1]]}
    # Three clips. All three are scored 0 to 2 here; the fourth score lies beyond the video.
    scores = metrics.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [2, 1, 0, -1]}])
    assert scores["HL-min-Good"] == {"HL-mAP": 50.0, "HL-Hit1": 100.0}  # annotators: 1, 1/2, no positive
    scores = metrics.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [2, 1, 0, 9]}])
    assert scores["HL-min-Good"]["HL-Hit1"] == 0
    scores = metrics.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [1]}])
    assert scores["HL-min-Good"]["HL-mAP"] == pytest.approx(100 * (5 / 6 + 1 / 3) / 3, abs=0.01)
    with pytest.raises(DataError, match="only one of the two files"):
        metrics.qvhighlights_highlights([truth], [{"qid": 2, "pred_saliency_scores": [1]}])


def test_official_scores_need_evidence_and_a_known_name():
    with pytest.raises(DataError, match="no official scores for 'mlvu'"):
        metrics.official("mlvu", [row()])
    with pytest.raises(DataError, match=r"1 of 2 questions have no evidence, first .'x'"):
        metrics.official("rextime", [row(), row(id="x", glue=[])])
    for name in ("nextgqa", "ego4d_nlq"):
        with pytest.raises(DataError, match="no question has a predicted span"):
            metrics.official(name, [row(spans=None)])
