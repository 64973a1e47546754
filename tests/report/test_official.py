"""Every official score is reproduced from the raw predictions in realdata; the logic is also tested on small rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import row

from annotations.rows import DataError
from annotations.samples import read_samples, read_with_report
from prompts import LETTERS
from report import official
from report.results import row_of
from report.scores import CGBENCH_THRESHOLDS, summarise

REAL = Path(__file__).resolve().parents[3] / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real annotation files are not at {REAL}")
EXACT = {"rel": 1e-12, "abs": 1e-12}


def load_json(name):
    return json.loads((REAL / name).read_text())


def load_lines(name):
    return [json.loads(line) for line in (REAL / name).read_text().splitlines()]


# ---------------------------------------------------------------- official scores, real files


@real
@pytest.mark.parametrize("split", ["val", "test"])
def test_nextgqa_reproduces_the_official_scores(split):
    samples = read_samples(REAL / f"nextgqa/{split}.csv", "nextgqa")
    spans, answers = load_json(f"nextgqa/preds/{split}_ground.json"), load_json(f"nextgqa/preds/{split}-res.json")
    rows = [row_of(s, LETTERS[answers[s.id]["prediction"]], [spans[s.id]] if s.id in spans else None) for s in samples]
    assert all(s.answer == LETTERS[answers[s.id]["answer"]] for s in samples)
    expected = load_json(f"nextgqa/preds/{split}_expected.json")
    scores = official.scores("nextgqa", rows)
    for name, value in expected["official_printed"].items():
        assert f"{scores[name]:.1f}" == value, name
    scores["Acc (all rows in the qa file)"] = scores.pop("Acc")
    assert scores == pytest.approx(expected["aggregate"], **EXACT)
    items = {r["id"]: official.nextgqa_iou_iop(r["predicted"][0], r["evidence"]) for r in rows if r["predicted"]}
    assert items == {id: pytest.approx(pair, **EXACT) for id, pair in expected["per_item_max_iou_iop"].items()}


@real
def test_rextime_reproduces_the_official_scores():
    samples = read_samples(REAL / "rextime/rextime_val.jsonl", "rextime")
    submission = {line["qid"]: line for line in load_lines("rextime/preds/submission.jsonl")}
    rows = [row_of(s, submission[s.id]["ans"], submission[s.id]["pred_relevant_windows"]) for s in samples]
    assert official.scores("rextime", rows) == load_json("rextime/preds/expected.json")


@real
def test_cgbench_reproduces_the_official_scores_from_texts():
    samples = read_samples(REAL / "cgbench/cgbench_mini.json", "cgbench")
    responses = {str(line["qid"]): line for line in load_lines("cgbench/preds/responses.jsonl")}
    rows = []
    for s in samples:
        answer = official.cgbench_answer(responses[s.id]["long_acc_response"], s.answer)
        spans = official.cgbench_spans(responses[s.id]["miou_response"])
        rows.append(row_of(s, answer, spans))
        assert official.cgbench_iou(spans, s.evidence) == pytest.approx(responses[s.id]["official_iou"], **EXACT)
        assert (answer == s.answer) == responses[s.id]["official_acc"]
    scores = official.scores("cgbench", rows)
    totals = {key.split("_")[0]: value for key, value in load_json("cgbench/preds/expected.json").items()}
    for m in CGBENCH_THRESHOLDS:
        assert round(scores[f"rec@{m}"] * len(rows), 9) == totals["rec@iou"][f"iou_th_{m}"]
        assert round(scores[f"acc@{m}"] * len(rows), 9) == totals["acc@iou"][f"th_{m}"]
    assert scores["rec@IoU"] == pytest.approx(totals["rec@iou"]["Accuracy"], **EXACT)
    assert scores["acc@IoU"] == pytest.approx(totals["acc@iou"]["Accuracy"], **EXACT)
    assert scores["mIoU"] == pytest.approx(totals["miou"]["Accuracy"], **EXACT)
    assert scores["accuracy"] == pytest.approx(totals["long"]["Accuracy"], **EXACT)
    ours = summarise(rows)
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
    scores = official.qvhighlights_files(
        load_lines(f"qvhighlights/{truths}"), load_lines(f"qvhighlights/{predictions}")
    )
    assert scores == load_json(f"qvhighlights/{expected}")


@real
def test_charades_sta_reproduces_both_conventions():
    samples = read_samples(REAL / "charades_sta/charades_sta_test.txt", "charades_sta")
    predictions = load_lines("charades_sta/preds/topn.jsonl")
    rows = [row_of(s, None, line["pred"]) for s, line in zip(samples, predictions, strict=True)]
    expected = load_json("charades_sta/preds/topn_expected.json")
    scores = official.scores("charades_sta", rows)
    assert scores == pytest.approx(
        {**expected["recall_strict"], **expected["recall_ge"], "mIoU": expected["mIoU_top1"]}, **EXACT
    )
    for r, ious in zip(rows, expected["per_item_iou"], strict=True):
        assert [official.hull_iou(span, r["evidence"][0]) for span in r["predicted"]] == pytest.approx(ious, **EXACT)


@real
def test_charades_sta_reproduces_the_scores_of_free_text():
    samples = read_samples(REAL / "charades_sta/temporal_grounding_charades.json", "charades_sta")
    responses = load_json("charades_sta/preds/tvg_responses.json")
    keys = [f"{s.video}>>>{s.question}>>>{list(s.evidence[0])}" for s in samples]
    spans = [official.charades_span(responses[key]) for key in keys]
    rows = [row_of(s, None, [span] if span else None) for s, span in zip(samples, spans, strict=True)]
    scores = official.scores("charades_sta", rows)
    expected = load_json("charades_sta/preds/tvg_expected.json")
    assert {f"IOU {m}": scores[f"R@1,IoU>={m}"] for m in (0.3, 0.5, 0.7)} | {"mIOU": scores["mIoU"]} == pytest.approx(
        expected, **EXACT
    )


@real
def test_ego4d_nlq_reproduces_the_official_scores():
    samples, report = read_with_report(REAL / "format_examples/ego4d_nlq_gt.json", "ego4d_nlq")
    results = load_json("format_examples/ego4d_nlq_preds.json")["results"]
    spans = {f"{r['clip_uid']}_{r['annotation_uid']}_{r['query_idx']}": r["predicted_times"] for r in results}
    scores = official.scores("ego4d_nlq", [row_of(s, None, spans.get(s.id)) for s in samples])
    expected = load_json("format_examples/ego4d_nlq_expected.json")
    recalls = [[scores[f"R@{k},IoU>{m}"] for k in expected["topK"]] for m in expected["thresholds"]]
    assert recalls == expected["recall[threshold][topK]"]
    assert scores["mIoU"] == pytest.approx(expected["mIoU"], **EXACT)
    assert f"Evaluated: {scores['count']} / {report.kept + len(report.dropped)} instances" == expected["printed"]


# ---------------------------------------------------------------- official scores, small rows


def test_nextgqa_rules():
    assert official.nextgqa_iou_iop([3, 3], [[2, 6]]) == (0, 1)  # a point inside
    assert official.nextgqa_iou_iop([7, 7], [[2, 6]]) == (0, 0)
    assert official.nextgqa_iou_iop([6, 2], [[2, 6]]) == (0, 0)  # reversed
    assert official.nextgqa_iou_iop([0, 10], [[0, 4], [6, 10]]) == (0.4, 0.4)  # the best span, not their union
    rows = [row(id="1"), row(id="2", predicted=None), row(id="3", letter="B")]
    scores = official.nextgqa(rows)
    assert (scores["count"], scores["Acc@GQA"], scores["mIoU"]) == (2, 50, 100)
    assert scores["Acc"] == pytest.approx(200 / 3)


def test_recalls_strict_and_not():
    rows = [row(evidence=[(0, 4)], predicted=[(0, 2), (0, 4)])]
    scores = official.charades_sta(rows)
    assert (scores["R@1,IoU>0.5"], scores["R@1,IoU>=0.5"], scores["R@5,IoU>0.5"], scores["mIoU"]) == (0, 100, 100, 50)
    scores = official.ego4d_nlq([*rows, row(predicted=None)])  # the one without a prediction is left out
    assert (scores["count"], scores["R@1,IoU>0.3"], scores["R@1,IoU>0.5"], scores["mIoU"]) == (1, 1, 0, 0.5)
    assert official.charades_sta([*rows, row(predicted=None)])["mIoU"] == 25


def test_rextime_counts_a_zero_length_span_as_missed():
    scores = official.rextime([row(evidence=[(1, 1)], predicted=[(1, 1)]), row()])
    assert (scores["VQA"], scores["full"]["MR-mIoU"], scores["full"]["VQA,mIoU"]["VQA,mIoU@0.7"]) == (1, 50, 0.5)


def test_cgbench_merges_overlapping_spans_on_both_sides():
    assert official.cgbench_iou([[4, 12], [4, 12]], [[4, 12]]) == 1
    assert official.cgbench_iou([[0, 4], [2, 6]], [[5, 8], [0, 5]]) == 6 / 8
    assert official.cgbench_iou([], [[5, 8]]) == 0
    scores = official.cgbench([row(), row(letter=None, predicted=None)])
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
    assert official.cgbench_answer(text, right="C") == letter
    assert official.cgbench_spans(text) == spans


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
    assert official.charades_span(text) == span


def test_qvhighlights_perfect_predictions_and_lengths():
    rows = [
        row(evidence=[(0, 8)], predicted=[(0, 8)]),
        row(evidence=[(0, 20), (30, 36)], predicted=[(0, 20), (30, 36)]),
    ]
    scores = official.qvhighlights(rows)
    assert list(scores) == ["short", "middle", "full"]  # no evidence is longer than 30 s
    assert set(scores["full"]["MR-mAP"].values()) == set(scores["full"]["MR-R1"].values()) == {100}
    assert scores["short"]["MR-R1"]["0.5"] == 50  # the first span of the second question is a middle one
    assert scores["short"]["MR-mAP"]["average"] == 75  # its short span is found at rank 2


def test_qvhighlights_ranks_by_score_and_finds_each_span_once():
    truth = row(evidence=[(0, 10)], predicted=[(50, 60), (0, 10), (0, 10)])
    assert official.moment_precisions(truth)[0] == 1 / 2
    assert official.moment_precisions({**truth, "span_scores": [0.1, 0.9, 0.8]})[0] == 1
    assert (
        official.moment_precisions(row(evidence=[(0, 10)], predicted=[(50, 60)] * 10 + [(0, 10)])).max() == 0
    )  # rank 11


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 5))
def test_average_precision_is_the_area_under_the_envelope(hits, missed):
    positives = sum(hits) + missed
    precisions = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    recalls = [sum(hits[: k + 1]) for k in range(len(hits))]
    area = sum(
        max((p for p, r in zip(precisions, recalls, strict=True) if r >= n), default=0) for n in range(1, positives + 1)
    )
    assert official.average_precision(np.array(hits), positives) == pytest.approx(area / positives if positives else 0)


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
    assert official.clip_precision(positive, scores) == pytest.approx(np.mean(best) if best else 0)


def test_highlights_pad_and_cut_the_predicted_scores():
    truth = {"qid": 1, "duration": 7, "relevant_clip_ids": [0, 1], "saliency_scores": [[4, 1, 1], [3, 3, 1]]}
    # Three clips. All three are scored 0 to 2 here; the fourth score lies beyond the video.
    scores = official.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [2, 1, 0, -1]}])
    assert scores["HL-min-Good"] == {"HL-mAP": 50.0, "HL-Hit1": 100.0}  # annotators: 1, 1/2, no positive
    scores = official.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [2, 1, 0, 9]}])
    assert scores["HL-min-Good"]["HL-Hit1"] == 0
    scores = official.qvhighlights_highlights([truth], [{"qid": 1, "pred_saliency_scores": [1]}])
    assert scores["HL-min-Good"]["HL-mAP"] == pytest.approx(100 * (5 / 6 + 1 / 3) / 3, abs=0.01)
    with pytest.raises(DataError, match="only one of the two files"):
        official.qvhighlights_highlights([truth], [{"qid": 2, "pred_saliency_scores": [1]}])


def test_official_scores_need_evidence_and_a_known_name():
    with pytest.raises(DataError, match="no official scores for 'mlvu'"):
        official.scores("mlvu", [row()])
    with pytest.raises(DataError, match=r"1 of 2 questions have no evidence, first .'x'"):
        official.scores("rextime", [row(), row(id="x", evidence=[])])
    for name in ("nextgqa", "ego4d_nlq"):
        with pytest.raises(DataError, match="no question has a predicted span"):
            official.scores(name, [row(predicted=None)])
