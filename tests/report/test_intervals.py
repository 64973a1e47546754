"""Intervals, and a test of two results, against all exchanges and the binomial's deviation."""

import itertools

import numpy as np
import pytest
from scored import row

from annotations.rows import DataError
from report.intervals import bootstrap, paired_test
from report.scores import summarise
from report.tables import p_text


def coin_rows(videos, questions, seed=0, share=0.5):
    """`questions` per video, all of a video right or all wrong."""
    right = np.random.default_rng(seed).random(videos) < share
    return [
        row(id=f"{v}_{q}", video=f"v{v}", letter="A" if right[v] else "B")
        for v in range(videos)
        for q in range(questions)
    ]


@pytest.mark.parametrize("questions", [1, 5])
def test_bootstrap_interval_is_that_of_the_videos_however_many_questions_they_have(questions):
    rows = coin_rows(400, questions)
    mean = summarise(rows)["accuracy"]
    low, high = bootstrap(rows)["accuracy"]
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(mean * (1 - mean) / 400), rel=0.1)
    assert bootstrap(rows)["accuracy"] == (low, high)


def test_bootstrap_knows_nothing_from_one_video():
    assert bootstrap([row(id="1"), row(id="2", letter="B")])["accuracy"] == (0.5, 0.5)


def test_bootstrap_of_nothing():
    assert bootstrap([]) == {}
    assert bootstrap([row(answer=None, evidence=[])]) == {}


def test_bootstrap_of_a_score_that_few_questions_have():
    rows = [row(id=f"{i}", video=f"v{i}", evidence=[(2, 6)] if i == 0 else []) for i in range(20)]
    assert bootstrap(rows)["mIoU"] == (1, 1)


def test_paired_test_agrees_with_all_exchanges():
    a, b = coin_rows(8, 2, seed=1, share=0.9), coin_rows(8, 2, seed=2, share=0.3)
    result = paired_test(a, b, "accuracy")
    right_a, right_b = ([r["predicted_answer"] == "A" for r in rows[::2]] for rows in (a, b))
    differences = np.array(right_a, float) - np.array(right_b, float)
    all_sums = [abs(np.dot(signs, differences)) for signs in itertools.product([-1, 1], repeat=8)]
    assert result["difference"] == pytest.approx(differences.mean())
    assert result["p_value"] == pytest.approx(np.mean(np.array(all_sums) >= abs(differences.sum()) - 1e-9), abs=0.02)
    assert result["low"] <= result["difference"] <= result["high"]
    assert (result["questions"], result["videos"]) == (16, 8)


def test_paired_test_of_equal_and_of_very_different_results():
    a, b = coin_rows(30, 1, share=1.1), coin_rows(30, 1, share=-0.1)
    assert paired_test(a, a, "accuracy")["p_value"] == 1
    assert paired_test(a, list(reversed(b)), "accuracy")["p_value"] < 0.001


def test_paired_test_refuses_different_questions_and_unknown_scores():
    with pytest.raises(DataError, match=r"different questions.*'0_0'"):
        paired_test(coin_rows(3, 1), coin_rows(3, 1)[1:], "accuracy")
    with pytest.raises(DataError, match="'speed'"):
        paired_test(coin_rows(3, 1), coin_rows(3, 1), "speed")


def test_a_p_value_at_the_floor_of_the_test_is_printed_as_a_bound():
    never, rarely = (coin_rows(40, 1, share=share) for share in (-0.1, 0.05))
    floor = paired_test(never, coin_rows(40, 1, share=1.1), "accuracy", samples=999)
    assert floor["p_value"] == floor["least_p"] == 0.001 and p_text(floor) == "<= 0.0010"
    above = paired_test(never, rarely, "accuracy", samples=999)
    assert above["p_value"] > 0.001 and p_text(above) == f"= {above['p_value']:.4f}"
