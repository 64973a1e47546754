"""Scores side by side: what stands below them."""

import re

from report import tables
from report.scores import COSTS, score


def question(k: int, **more) -> dict:
    """A question about video k, with everything that a table can be about."""
    return {
        "id": f"{k}",
        "video": f"{k}.mp4",
        "kind": "fine",
        "duration": 20.0,
        "answer": "A",
        "predicted_answer": "AB"[k % 2],
        "zoom_answer": "A",
        "true_zoom_answer": "A",
        "evidence": [[2.0, 6.0]],
        "predicted": [[2.0, 5.0 + k]],
        "shuffled_spans": [[3.0, 4.0]],
        "format": 1.0,
        "error": None,
        **more,
    }


def test_every_score_of_a_table_has_its_meaning_below_under_the_same_name():
    results = {
        "before": [question(k) for k in range(4)],
        "after": [question(k, predicted_answer="A") for k in range(4)],
    }
    table, below, *_ = tables.describe(results, "records").split("\n\n")
    shown = [
        re.split("  +", line)[0] for line in table.splitlines()[1:] if not line.startswith(("fine", "before", "after"))
    ]
    meant = dict(re.split("  +", line, maxsplit=1) for line in below.splitlines())
    assert shown == list(meant) and {"accuracy", "Acc@GQA", "zoom_accuracy", "chance mIoU"} <= set(shown)
    assert len(set(meant.values())) == len(meant)


def test_what_an_accuracy_is_said_to_be_depends_on_whether_there_is_another_answer():
    two, one = {"policy": [question(0)]}, {"strategy": [question(0)]}
    del one["strategy"][0]["zoom_answer"]
    told = [dict(re.split("  +", line, maxsplit=1) for line in tables.meanings(r).splitlines()) for r in (two, one)]
    assert told[0]["accuracy"].endswith("from what the coarse pass shows")
    assert told[1]["accuracy"] == "right answers" and list(told[1]) == [n for n in told[0] if n != "zoom_accuracy"]


def test_every_score_of_a_question_is_in_a_table():
    row = question(0, **dict.fromkeys(COSTS, 1))
    assert set(score(row)) == {*tables.HEADLINE, *tables.CONTROLS} - {
        "chance mIoU"
    }  # that is of all questions together
