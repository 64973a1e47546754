"""Every official score is reproduced on real spans, as the released evaluators score them (tests/facts); the rules are
also tested on small rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import row

from annotations.rows import DataError
from report import official
from report.scores import CGBENCH_THRESHOLDS, summarise

FACTS = Path(__file__).resolve().parents[1] / "facts"
EXACT = {"rel": 1e-12, "abs": 1e-12}


def load(benchmark):
    return json.loads((FACTS / f"{benchmark}.json").read_text())


# ---------------------------------------------------------------- official scores, real spans


def test_nextgqa_reproduces_the_official_scores():
    facts = load("nextgqa")
    rows = [
        row(answer, letter, evidence, predicted and [predicted], id=id)
        for id, _, answer, letter, evidence, predicted, _ in facts["rows"]
    ]
    scores = official.scores("nextgqa", rows)
    for name, value in facts["expected"]["printed"].items():
        assert f"{scores[name]:.1f}" == value, name
    scores["Acc (all rows in the qa file)"] = scores.pop("Acc")
    assert scores == pytest.approx(facts["expected"]["aggregate"], **EXACT)
    items = [official.nextgqa_iou_iop(r["predicted"][0], r["evidence"]) for r in rows if r["predicted"]]
    assert items == [pytest.approx(best, **EXACT) for *_, best in facts["rows"] if best]
    assert len(items) == 293


def test_rextime_reproduces_the_official_scores():
    facts = load("rextime")
    assert official.scores("rextime", [row(*columns) for columns in facts["rows"]]) == facts["expected"]


def test_cgbench_reproduces_the_official_scores():
    facts = load("cgbench")
    rows = [row(*columns) for *columns, _ in facts["rows"]]
    for r, (*_, iou) in zip(rows, facts["rows"], strict=True):
        assert official.cgbench_iou(r["predicted"], r["evidence"]) == pytest.approx(iou, **EXACT)
    scores, totals = official.scores("cgbench", rows), facts["expected"]
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


def test_qvhighlights_reproduces_the_official_scores():
    facts = load("qvhighlights")
    rows = [
        row(evidence=evidence, predicted=[w[:2] for w in windows]) | {"span_scores": [w[2] for w in windows]}
        for evidence, windows in facts["rows"]
    ]
    assert official.scores("qvhighlights", rows) == facts["expected"]


def test_charades_sta_reproduces_both_conventions():
    facts = load("charades_sta")
    rows = [row(evidence=evidence, predicted=predicted) for evidence, predicted in facts["rows"]]
    expected = facts["expected"]
    assert official.scores("charades_sta", rows) == pytest.approx(
        {**expected["recall_strict"], **expected["recall_ge"], "mIoU": expected["mIoU_top1"]}, **EXACT
    )
    for r, ious in zip(rows, facts["first_iou"], strict=False):
        assert [official.hull_iou(span, r["evidence"][0]) for span in r["predicted"]] == pytest.approx(ious, **EXACT)


def test_ego4d_nlq_reproduces_the_official_scores():
    facts = load("ego4d_nlq")
    scores = official.scores(
        "ego4d_nlq", [row(evidence=evidence, predicted=predicted) for evidence, predicted in facts["rows"]]
    )
    expected = facts["expected"]
    recalls = [[scores[f"R@{k},IoU>{m}"] for k in expected["topK"]] for m in expected["thresholds"]]
    assert recalls == expected["recall[threshold][topK]"]
    assert scores["mIoU"] == pytest.approx(expected["mIoU"], **EXACT)
    assert f"Evaluated: {scores['count']} / {facts['read']} instances" == expected["printed"]


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
    assert official.interpolated_precision(np.array(hits), positives) == pytest.approx(
        area / positives if positives else 0
    )


def test_official_scores_need_evidence_and_a_known_name():
    with pytest.raises(DataError, match="no official scores for 'mlvu'"):
        official.scores("mlvu", [row()])
    with pytest.raises(DataError, match=r"1 of 2 questions have no evidence, first .'x'"):
        official.scores("rextime", [row(), row(id="x", evidence=[])])
    for name in ("nextgqa", "ego4d_nlq"):
        with pytest.raises(DataError, match="no question has a predicted span"):
            official.scores(name, [row(predicted=None)])
