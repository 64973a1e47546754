"""Our scores of questions, by hand."""

import pytest
from scored import row

from report.scores import breakdown, score, summarise


def test_scores_of_one_question_by_hand():
    # Evidence 2-6 and 10-12: 6 s. Prediction 4-8 and 7-11, together 4-11: 7 s. Overlap 4-6 and 10-11: 3 s. Union: 10 s.
    scores = score(row(evidence=[(2, 6), (10, 12)], predicted=[(4, 8), (7, 11)]))
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
    scores = score(row(evidence=[(0, 4)], predicted=[(0, 2)]))
    assert (scores["mIoU"], scores["R@0.3"], scores["R@0.5"], scores["rec@IoU"]) == (0.5, 1, 0, 1)
    assert scores["Acc@GQA"] == 1  # IoP is 1
    assert score(row(evidence=[(0, 2)], predicted=[(0, 4)]))["Acc@GQA"] == 1  # IoP is exactly 0.5
    assert score(row(evidence=[(0, 2)], predicted=[(0, 4.1)]))["Acc@GQA"] == 0


@pytest.mark.parametrize("spans", [None, []])
def test_unanswered_and_spanless_questions_score_zero(spans):
    scores = score(row(letter=None, predicted=spans))
    assert set(scores.values()) == {0}
    assert {"accuracy", "mIoU", "mIoP", "mIoG", "Acc@GQA", "acc@IoU"} <= set(scores)


def test_means_are_over_the_questions_that_have_the_score():
    rows = [
        row(id="1"),
        row(id="2", letter="B", predicted=None),
        row(id="3", evidence=[], predicted=None),  # an answer without evidence
        row(id="4", answer=None, letter=None),  # evidence without an answer
    ]
    summary = summarise(rows)
    assert (summary["questions"], summary["unanswered"], summary["without_span"]) == (4, 0, 1)
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["mIoU"] == pytest.approx(2 / 3)
    assert summary["Acc@GQA"] == pytest.approx(1 / 2)
    assert summarise([]) == {"questions": 0, "unanswered": 0, "without_span": 0}


def test_breakdown_by_kind_length_and_portion():
    rows = [
        row(id="1", kind="fine", evidence=[(0, 1), (0.5, 2)]),  # 2 s, a tenth
        row(id="2", kind="fine + blink", evidence=[(0, 10)]),  # 10 s, a half
        row(id="3", kind="blink", evidence=[(0, 50)], duration=None),
        row(id="4", kind="", evidence=[]),
    ]

    def sizes(by):
        return {name: group["questions"] for name, group in breakdown(rows, by).items()}

    assert sizes("kind") == {"blink": 2, "fine": 2, "unknown": 1}
    assert sizes("clue_length") == {"2 to 5 s": 1, "10 to 20 s": 1, "from 40 s": 1, "unknown": 1}
    assert sizes("clue_portion") == {"0.1 to 0.2": 1, "0.4 to 0.7": 1, "unknown": 2}
    assert sizes("duration") == {"20 to 30 s": 3, "unknown": 1}
    with pytest.raises(ValueError, match="colour"):
        breakdown(rows, "colour")
