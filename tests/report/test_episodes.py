"""The page of training episodes, parsed."""

import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagetree import HOSTILE, parse, place

from report import ReportError
from report.episodes import episodes_page, facet_record
from report.html import beside

deterministic = settings(derandomize=True, deadline=None, max_examples=60)


def episode(**fields):
    clip = {"times": [0.0, 1.0, 2.0, 3.0], "frames": np.zeros((4, 3, 56, 56), np.uint8)}
    response = {
        "tokens": ["<th", "ink", ">", "red\n", "</think>", "<answer>", "C", "</answer>"],
        "advantages": [1.5, 0.75, 0.0, -0.75, -1.5, 0.3, 0.6, 0.9],
        "segments": ["think"] * 5 + ["answer"] * 3,
        "answer": "C",
        "spans": [[1.0, 2.0]],
        "rewards": {"format": 1.0, "iou": 0.625},
        "zoom": {"times": [1.0], "frames": np.zeros((1, 3, 112, 112), np.uint8), "answer": "A"},
    }
    failed = response | {"answer": None, "spans": None, "zoom": None, "tokens": list("abcdefgh")}
    whole = {"id": "e1", "video": "v.mp4", "question": HOSTILE, "options": ["<b>one</b>", "two", "three"]}
    whole |= {"answer": "C", "duration": 4.0, "evidence": [[1.0, 3.0]], "coarse": clip, "responses": [response, failed]}
    return whole | fields


def episode_page(tmp_path, *episodes):
    episodes_page(episodes, tmp_path / "new" / "page.html", "Step 1 <now>")
    return parse(tmp_path / "new" / "page.html")


def test_an_episode_shows_everything_and_executes_nothing(tmp_path):
    root = episode_page(tmp_path, episode())
    assert root.all("h1")[0].text == root.all("title")[0].text == "Step 1 <now>"
    assert root.all("h2")[0].text == HOSTILE and not root.all("script") and not root.all("b")
    assert [n.text for n in root.all("li")] == ["A. <b>one</b>", "B. two", "C. three ✓"]
    assert [n.text for n in root.all("li", "right")] == ["C. three ✓"]
    article = root.all("article")[0]
    assert [place(n) for n in article.all(cls="true")] == [(25.0, 50.0)]
    assert [place(n) for n in article.all(cls="pred")] == [(25.0, 25.0)]
    assert len(article.all("img")) == 4 + 1
    first, second = article.all("section")
    assert "answered C ✓" in first.text and "Zoom pass: answered A ✗" in first.text
    assert "answered none ✗" in second.text and "no span" in second.text and "No zoom pass" in second.text
    rewards, means = ([[c.text for c in r.all()] for r in t.all("tr")] for t in first.all("table"))
    assert rewards == [["format", "iou"], ["1.00", "0.62"]]
    assert means == [["think", "answer"], ["+0.00", "+0.60"]]


def test_tokens_carry_their_advantage_in_colour_line_and_title(tmp_path):
    tokens = episode_page(tmp_path, episode()).all("section")[0].all(cls="tok")
    assert [t.text for t in tokens] == ["<th", "ink", ">", "red↵\n", "</think>", "<answer>", "C", "</answer>"]
    assert [t.attrs["class"].split()[1] for t in tokens[:5]] == ["pos", "pos", "zero", "neg", "neg"]
    assert tokens[0].attrs["title"] == "think: +1.500" and tokens[3].attrs["title"] == "think: -0.750"
    colours = [tuple(map(int, re.findall(r"\d+", t.attrs["style"]))) for t in tokens]
    assert colours[2] == (255, 255, 255)
    # Full colour is 60% of the hue on white, half the advantage half of that: 255 + 0.6 * (33 - 255) = 121.8.
    assert colours[0] == (122, 163, 205) and colours[1] == (188, 209, 230)
    assert colours[4] == (236, 169, 108) and colours[3] == (246, 212, 182)
    assert re.search(r"\.neg \{ text-decoration: underline", beside("episodes.css"))


def test_each_group_has_a_colour_scale_of_its_own_and_says_it(tmp_path):
    """Beside a group with large advantages, one with small ones stays legible."""
    weak = episode(id="e2")
    weak["responses"] = [{**weak["responses"][0], "advantages": [0.1, -0.05] * 4}]
    first, second = episode_page(tmp_path, episode(), weak).all("article")
    tokens = [article.all("section")[0].all(cls="tok") for article in (first, second)]
    assert tokens[0][0].attrs["style"] == tokens[1][0].attrs["style"] == "background:rgb(122,163,205)"
    assert tokens[1][1].attrs["style"] == "background:rgb(246,212,182)"
    assert "±1.50" in first.all(cls="legend")[0].text and "±0.10" in second.all(cls="legend")[0].text


def test_rewards_stand_beside_their_advantages_mean_and_deviation(tmp_path):
    iou = {"rewards": [0.25, 0.75], "advantages": [-1.0, 1.0], "mean": 0.5, "deviation": 0.25}
    answer = {"rewards": [1.0, 1.0], "advantages": None, "mean": 1.0, "deviation": 0.0}
    root = episode_page(tmp_path, episode(prompt=HOSTILE, facets={"iou": iou, "<b>": answer}))
    table = root.all("table", "facets")[0]
    assert [[cell.text for cell in line.children] for line in table.all("tr")] == [
        ["", "iou", "<b>"],
        ["response 1", "0.25 -1.00", "1.00"],
        ["response 2", "0.75 +1.00", "1.00"],
        ["mean", "0.50", "1.00"],
        ["deviation", "0.25", "0.00"],
    ]
    assert root.all("details")[0].all("pre")[0].text == HOSTILE
    assert not episode_page(tmp_path, episode()).all("details")


@pytest.mark.parametrize("std", ["population", "sample"])
def test_the_facets_of_a_group_are_those_that_credit_it(std):
    values = [0.0, 0.58, 0.65, 0.7, 0.9]
    found = facet_record(values, SimpleNamespace(std=std, tokenadv="paper"))
    mean, deviation = statistics.mean(values), (statistics.pstdev if std == "population" else statistics.stdev)(values)
    assert found["mean"] == pytest.approx(mean) and found["deviation"] == pytest.approx(deviation)
    assert found["advantages"] == pytest.approx([(value - mean) / deviation for value in values], abs=1e-5)
    assert facet_record(values, SimpleNamespace(std=std, tokenadv="off"))["advantages"] is None
    assert facet_record([0.5], SimpleNamespace(std=std, tokenadv="paper"))["deviation"] == 0.0


def test_segments_and_truth_may_be_absent_and_zero_advantages_stay_white(tmp_path):
    bare = episode(evidence=[], answer="a dog", options=[])
    bare["responses"] = [{**bare["responses"][1], "advantages": [0.0] * 8}]
    del bare["responses"][0]["segments"]
    root = episode_page(tmp_path, bare)
    assert {t.attrs["style"] for t in root.all("section")[0].all(cls="tok")} == {"background:rgb(255,255,255)"}
    assert root.all("section")[0].all(cls="tok")[0].attrs["title"] == "+0.000"
    assert [n.text for n in root.all("li")] == ["Answer: a dog"] and len(root.all("section")[0].all("table")) == 1


@deterministic
@given(st.text(max_size=30), st.lists(st.text(st.sampled_from("<>&\"'/ab\n -!="), max_size=8), min_size=1, max_size=8))
def test_no_text_breaks_out_of_its_place(tmp_path_factory, question, tokens):
    question = question.replace("\r", "").replace("\0", "")  # browsers and parsers normalise these two
    bold = episode(question=question, id=question, video=question, options=tokens)
    named = {**bold["responses"][0], "tokens": tokens, "advantages": [1.0] * len(tokens), "segments": tokens}
    bold["responses"] = [{**named, "rewards": {token: 1.0 for token in tokens}, "answer": tokens[0]}]
    root = episode_page(tmp_path_factory.mktemp("page"), bold)
    assert root.all("h2")[0].text == question and root.all("article")[0].attrs["id"] == question
    assert "".join(t.text for t in root.all("section")[0].all(cls="tok")).replace("↵", "") == "".join(tokens)


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    root = episode_page(tmp_path, episode(question="broken \ud83d here"))
    assert re.fullmatch("broken . here", root.all("h2")[0].text)


def test_the_same_episodes_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        episodes_page([episode()], tmp_path / name, "t")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": [1.0]}, "episode e1: response 1: 8 tokens, 1 advantages and 8 segments"),
        ({"segments": ["think"]}, "episode e1: response 1: 8 tokens, 8 advantages and 1 segments"),
        ({"advantages": [float("nan")] * 8}, "episode e1: response 1: an advantage is not finite"),
        ({"spans": [[0, float("inf")]]}, "episode e1: inf is not a time"),
    ],
)
def test_a_response_that_does_not_fit_is_named(tmp_path, change, message):
    wrong = episode()
    wrong["responses"][0] |= change
    with pytest.raises(ReportError, match=message):
        episode_page(tmp_path, wrong)


def test_a_missing_field_is_named(tmp_path):
    for field in ("evidence", "coarse", "responses", "question"):
        wrong = episode()
        del wrong[field]
        with pytest.raises(ReportError, match=f"episode e1: no field '{field}'"):
            episode_page(tmp_path, wrong)
    with pytest.raises(ReportError, match="episode e1: a time line needs"):
        episode_page(tmp_path, episode(duration=0))
