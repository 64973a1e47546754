"""infer.py: strategies against the passes they are made of, probabilities and cost against independent computations,
resuming, splitting, the page and its player, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    drop_video_token,
    drop_weights,
    exit_codes,
    loud_model,
    page_in_browser,
    read_nearly,
    run_in_two_processes,
)
from pagetree import Tree
from qwen import QWEN
from runs import end_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config as configuration
import evaluate
import infer
import prompts
import train
import video
from annotations.rows import DataError, Sample
from annotations.samples import write_samples
from config import ConfigError
from engine import attention
from engine.confidence import letter_probabilities, span_probability
from engine.flops import forward_flops
from harness import commands
from harness.asking import FRAME_BYTES, Agent, side_by_side
from harness.folder import claimed, claimed_file
from harness.run import TrainingError
from infer import RELEASED, STRATEGIES, Look, Settings, load_agent
from media.decode import VideoInfo
from media.file import VideoError
from media.frames import FrameCache
from policy import ModelError, Video, Vocabulary, group_hidden, last_hidden
from report.answer import answer_page, answer_record, play_source
from report.html import clock
from report.results import read_results, row_of
from report.tables import cost, cost_text
from rollout import answer_clips, coarse_prompt, read_turn, roll_out, view_video, zoom_clips
from tests.numbered import write_video
from video import Budget, Clip, plan_clip

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = Settings()


@pytest.fixture(scope="module")
def policy(talker):
    """The talker with its vocabulary."""
    return evaluate.load_policy(configuration.Config(model=str(talker)), torch.device("cpu"))


@pytest.fixture
def agent(config, policy):
    """The talker's."""
    return Agent(*policy, config)


def results_of(questions):
    """What the steps of each question return, taken together. Raises VideoError."""
    found = {k: result for k, result, _ in side_by_side(enumerate(questions), 64)}
    for result in found.values():
        if isinstance(result, VideoError):
            raise result
    return [found[k] for k in range(len(found))]


def result_of(steps):
    """The same of one question."""
    [result] = results_of([steps])
    return result


def clip_of(times: list[float], step: float) -> Clip:
    return Clip(torch.zeros(len(times), 3, 28, 28, dtype=torch.uint8), times, step)


# ---------------------------------------------------------------- times


def test_windows_cover_the_video_once_with_the_coarse_passes_frames(agent, samples):
    settings, whole = Settings(window=8, window_budget=64), view_video(samples[0], agent.config)
    parts = infer.windows(whole.info, agent.config, settings)
    assert parts == [[(0.0, 8.0)], [(8.0, 16.0)], [(16.0, 20.0)]]
    views = [request.view for request in infer.window_requests(agent, samples[0], whole.info, parts, settings)]
    assert [len(view.clip.times) for view in views] == [8, 8, 4]
    assert [t for view in views for t in view.clip.times] == pytest.approx(whole.clip.times)
    assert torch.equal(views[0].clip.frames, whole.clip.frames[:8])  # as coarse: 64 tokens for 8 frames
    for window in (20, 256):
        assert infer.windows(whole.info, agent.config, Settings(window=window)) == [[(0.0, 20.0)]]


def test_a_window_is_256_frames_of_a_long_video():
    """LVBench's mean duration, Zoom-Zero's Table 13; the paper's rate of one frame per second."""
    info, config = VideoInfo("long.mp4", 4101.0, 25.0, 1280, 720), configuration.Config(fps=1.0)
    parts = infer.windows(info, config, DEFAULT)
    assert len(parts) == 17 and parts[0] == [(0.0, 256.0)] and parts[-1] == [(4096.0, 4101.0)]
    plan = plan_clip(info, parts[3], config.fps, Budget(16384, 64, 768))
    assert len(plan.times) == 256 and plan.times[0] == 768.0
    assert infer.windows(info, replace(config, fps=60.0), DEFAULT)[0] == [(0.0, 256 / 25)]  # the file's own rate


def test_a_video_is_read_once_for_all_windows_and_passes(agent, samples, monkeypatch):
    """Its frames at most once, and the table of its packets at most once, for all questions about it."""
    decoded = []
    resize = video._resize
    monkeypatch.setattr(video, "_resize", lambda *a: decoded.append(a) or resize(*a))
    settings = Settings(window=10, window_budget=88, compare_whole=True, top=1)
    first = result_of(infer.divide_and_conquer(agent, samples[0], settings))
    n = len(decoded)
    assert n >= 20
    result_of(infer.divide_and_conquer(agent, samples[0], settings))
    assert len(decoded) == n
    fresh = replace(agent, frames=FrameCache(FRAME_BYTES))
    again = result_of(infer.divide_and_conquer(fresh, samples[0], settings))
    assert len(decoded) == 2 * n and again.answer == first.answer and again.spans == first.spans


def test_a_window_is_shown_as_a_video_of_its_own_length(agent, samples, monkeypatch):
    said = []
    asking = prompts.coarse_text
    monkeypatch.setattr(prompts, "coarse_text", lambda *a, **k: said.append(asking(*a, **k)) or said[-1])
    telling = replace(agent, config=replace(agent.config, state_duration=True))
    result_of(infer.divide_and_conquer(telling, samples[0], Settings(window=8, window_budget=64)))
    result_of(infer.one_stage(telling, samples[0], DEFAULT))
    assert [re.findall(r"in total has (.*) seconds\.", words) for words in said] == [
        ["8.0"],
        ["8.0"],
        ["4.0"],
        ["20.0"],
    ]


# ---------------------------------------------------------------- probabilities


def test_letter_and_span_probabilities_are_those_of_a_forward_pass(agent, samples):
    looks = results_of(infer.look_once(infer.coarse_request(agent, sample)) for sample in samples)
    assert all(look.span_confidence == 0 for look in looks if not look.spans)
    seen, sample = next((look, sample) for look, sample in zip(looks, samples, strict=True) if look.spans)
    [group] = roll_out(agent.model, [view_video(sample, agent.config)], agent.config, agent.vocabulary, step=None)
    ids = group.responses[0].ids
    assert group.responses[0].turns[0].hidden is None  # not asked for
    with torch.no_grad():
        mask = torch.ones(1, 1, len(ids), dtype=torch.bool)
        hidden = group_hidden(agent.model, [group.prompt], ids[None, None], mask)
        p = agent.model.lm_head(hidden).softmax(-1)
    pieces = [agent.vocabulary.tokenizer.decode([i]) for i in ids.tolist()]
    reply = len(pieces) - pieces[::-1].index("</think>")  # after the last of them

    token = pieces.index("<answer>", reply) + 1
    letters = [agent.vocabulary.ids(letter)[0] for letter in "ABCD"]
    assert pieces[token] == seen.answer
    assert [seen.letters[letter] for letter in "ABCD"] == pytest.approx(p[token, letters].tolist(), abs=1e-4)
    assert seen.confidence == pytest.approx(float(p[token, ids[token]]), abs=1e-4)

    claim = range(pieces.index("<glue>", reply), pieces.index("</glue>", reply) + 1)
    mean = torch.stack([p[t, ids[t]].log() for t in claim]).mean().exp()
    assert seen.span_confidence == pytest.approx(float(mean), abs=1e-4)


@pytest.mark.parametrize("reply", ["<answer>B</answer>", "<answer>(b)</answer>", "<answer> B. text</answer>", "(B)"])
def test_the_answers_token_is_found_where_tags_and_letters_are_fused(reply):
    vocabulary = Vocabulary.of(QWEN)
    ids = vocabulary.ids(f"<think>Bad B <time>3.0</time></think>{reply}")
    response = read_turn(torch.tensor(ids), vocabulary)
    response.answer = response.answer or prompts.parse_answer(response.text, bare=True)
    # A model whose hidden state says which token comes, with 3 nats over all others.
    size = len(vocabulary.tokenizer)
    weight = 3.0 * nn.functional.one_hot(torch.tensor(ids), size).T.float()  # [V, H], a dimension for each token
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    response.hidden = torch.eye(len(ids))
    odds, others = math.exp(3), size - 1  # of the answer's token against each other one
    expected = {letter: (odds if letter == "B" else 1) / (odds + others) for letter in "ABCD"}
    assert letter_probabilities(model, response, 4, vocabulary) == pytest.approx(expected, rel=1e-3)
    assert letter_probabilities(model, response, 1, vocabulary) == pytest.approx(
        {letter: expected[letter] for letter in "AB"}, rel=1e-3
    )  # an answer that is no option is there too


def test_without_an_answer_there_is_no_confidence(agent):
    response = read_turn(torch.tensor(agent.vocabulary.ids("<think>red</think>")), agent.vocabulary)
    response.hidden = torch.zeros(len(response.ids), 128)
    assert letter_probabilities(agent.model, response, 4, agent.vocabulary) == {}
    assert span_probability(agent.model, response) == 0.0


# ---------------------------------------------------------------- cost


def test_the_formula_counts_what_torch_counts(tokenizer, vocabulary, config, samples, monkeypatch):
    monkeypatch.setattr(attention, "attend", attention.attend_plainly)  # torch counts matrix products only
    model = loud_model(tokenizer)
    prompt = coarse_prompt(view_video(samples[0], config), config, vocabulary, model.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.lm_head(last_hidden(model, [prompt]))
    layers = model.model.language_model.layers
    # Torch counts the square of attention, the formula the causal half of it; in the last layer it is one row for both.
    half = 2 * (len(layers) - 1) * layers[0].self_attn.q_proj.out_features * len(prompt) ** 2
    ours = forward_flops(model, view_video(samples[0], config).clip, len(prompt), 1)
    assert ours + half == pytest.approx(counter.get_total_flops(), rel=0.01)  # norms and biases


def test_each_written_token_adds_a_row_of_attention(tokenizer, vocabulary, config, samples):
    model = loud_model(tokenizer)
    clip = view_video(samples[0], config).clip
    one, two, three = (forward_flops(model, clip, 100, n) for n in (1, 2, 3))
    layers = model.model.language_model.layers
    assert (three - two) - (two - one) == 4 * len(layers) * layers[0].self_attn.q_proj.out_features


# ---------------------------------------------------------------- strategies


def test_one_stage_and_coarse_to_fine_are_the_evaluations_passes(agent, samples):
    rows = results_of(evaluate.two_pass_row(agent, sample) for sample in samples)
    assert any(row["predicted"] for row in rows)
    one_stage, coarse_to_fine = (
        results_of(STRATEGIES[name](agent, sample, DEFAULT) for sample in samples)
        for name in ("one-stage", "coarse-to-fine")
    )
    for row, coarse, fine in zip(rows, one_stage, coarse_to_fine, strict=True):
        assert coarse.answer == row["predicted_answer"]
        assert [list(span) for span in coarse.spans or []] == (row["predicted"] or [])
        assert fine.spans == coarse.spans
        assert fine.answer == (row["zoom_answer"] or row["predicted_answer"])
        assert fine.visual_tokens >= coarse.visual_tokens and fine.flops >= coarse.flops


@pytest.mark.parametrize(
    "changes",
    [{}, {"question_first": True}, {"system_prompt": "Look!"}, {"zoom_sees_think": True}, {"zoom_budget": 90}],
)
def test_the_zoom_is_the_rollouts(agent, samples, tokenizer, changes):
    agent = Agent(loud_model(tokenizer), agent.vocabulary, replace(agent.config, **changes))
    view, spans = view_video(samples[0], agent.config), [(2.0, 4.0), (7.0, 8.5)]
    whole = infer.coarse_request(agent, samples[0])
    seen = result_of(infer.zoom(agent, whole, spans, "<think>red<time>(2.0,4.0)</time></think>"))
    think = "red<time>(2.0,4.0)</time>" if agent.config.zoom_sees_think else None
    jobs = [(samples[0], zoom_clips(view, [spans], agent.config)[0], think)]
    [zoomed] = answer_clips(agent.model, jobs, agent.config, agent.vocabulary)
    assert seen.answer == zoomed.answer and seen.letters == pytest.approx(zoomed.letters, abs=1e-5)
    assert seen.confidence == seen.letters[seen.answer] == max(seen.letters.values())
    assert seen.part == spans and seen.visual_tokens == Video.from_frames(zoomed.clip.frames, 0.5).n_tokens


def fake_look(answer, confidence, spans, kind="window", span_confidence=1.0):
    """A look at one frame: one visual token, one operation."""
    return Look(kind, None, clip_of([0.0], 1.0), answer, {}, confidence, spans, span_confidence, "", 1.0)


def blank_agent(config):
    return Agent(SimpleNamespace(device=torch.device("cpu")), None, config)


@pytest.fixture
def script(monkeypatch):
    """Replace the model: `looks` come back in turn, zooms are noted and answered with Z."""
    zoomed, looks = [], []

    def look(requests, kind="coarse", parts=()):
        return [looks.pop(0) for _ in requests]
        yield  # makes it a generator

    def zoom(agent, whole, spans, response=""):
        zoomed.append(spans)
        return fake_look("Z", 0.6, None, "zoom")
        yield

    monkeypatch.setattr(infer, "look", look)
    monkeypatch.setattr(infer, "zoom", zoom)
    return looks, zoomed


FOUR = [
    ("A", 0.5, [(1.0, 2.0)], 0.9),
    ("B", 0.9, [(6.0, 7.0), (8.0, 9.0)], 0.1),
    (None, 0.0, [(11.0, 12.0)], 0.9),
    ("D", 0.7, None, 0.0),
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top": 2}, [(6.0, 7.0), (8.0, 9.0)]),
        ({"top": 4}, [(1.0, 2.0), (6.0, 7.0), (8.0, 9.0), (11.0, 12.0)]),
        ({"top": 3}, [(1.0, 2.0), (6.0, 7.0), (8.0, 9.0)]),
        ({"top": 1, "rank": "answer_and_spans"}, [(1.0, 2.0)]),
    ],
)
def test_divide_and_conquer_zooms_on_the_surest_windows(script, samples, config, options, expected):
    looks, zoomed = script
    looks += [fake_look(answer, sure, spans, "window", spanning) for answer, sure, spans, spanning in FOUR]
    result = result_of(infer.divide_and_conquer(blank_agent(config), samples[0], Settings(window=5, **options)))
    assert zoomed == [expected] and result.spans == expected and result.answer == "Z"
    assert len(result.looks) == result.visual_tokens == result.flops == 5


def test_divide_and_conquer_without_spans_takes_the_surest_answer(script, samples, config):
    looks, zoomed = script
    looks += [fake_look("A", 0.2, None), fake_look("B", 0.8, [])]
    result = result_of(infer.divide_and_conquer(blank_agent(config), samples[0], Settings(window=10)))
    assert (result.answer, result.spans, zoomed) == ("B", None, [])


@pytest.mark.parametrize(("sure", "answer"), [(0.5, "Z"), (0.7, "W")])
def test_the_released_code_compares_with_the_whole_video(script, samples, config, sure, answer):
    looks, _ = script
    looks += [fake_look("A", 0.5, [(1.0, 2.0)]), fake_look("W", sure, [(3.0, 4.0)], "coarse")]
    result = result_of(infer.divide_and_conquer(blank_agent(config), samples[0], Settings(**RELEASED)))
    assert (result.answer, result.spans, len(result.looks)) == (answer, [(1.0, 2.0)], 3)


def test_without_options_the_surest_spans_are_the_answer(script, samples, config):
    looks, zoomed = script
    looks += [fake_look(None, 0.2, [(1.0, 2.0)]), fake_look(None, 0.8, [(11.0, 12.0)])]
    settings = Settings(window=10, top=1, compare_whole=True)
    result = result_of(infer.divide_and_conquer(blank_agent(config), replace(samples[0], options=()), settings))
    assert (result.spans, result.confidence, zoomed, len(result.looks)) == ([(11.0, 12.0)], 0.8, [], 2)


def test_an_answer_that_cannot_be_read_can_stand_for_a_letter(script, samples, config):
    looks, _ = script
    agent = blank_agent(config)
    for letter in ("", "C"):
        looks.append(fake_look(None, 0.0, None, "coarse"))
        settings = Settings(unparsable=letter)
        row = infer.answer_row(samples[0], result_of(infer.one_stage(agent, samples[0], settings)), 0.0, settings)
        assert row["predicted_answer"] == (letter or None)
    looks.append(fake_look(None, 0.0, None, "coarse"))
    sample = replace(samples[0], options=())
    row = infer.answer_row(sample, result_of(infer.one_stage(agent, sample, settings)), 0.0, settings)
    assert row["predicted_answer"] is None


@pytest.mark.parametrize(
    ("found", "passes", "last"),
    [
        ([[(5.0, 7.0)]], 2, [(5.0, 7.0)]),  # stays at once
        ([[(5.0, 6.0)], [(5.0, 6.0)]], 3, [(5.0, 6.0)]),  # moves, then stays
        ([[(5.0, 6.0)], [(4.0, 5.0)], [(3.0, 4.0)], [(2.0, 3.0)]], 4, [(3.0, 4.0)]),  # the limit
        ([None], 2, [(5.0, 7.0)]),  # nothing found inside: what was found before
    ],
)
def test_repeated_zoom_stops(script, samples, config, found, passes, last):
    looks, zoomed = script
    looks += [fake_look("A", 0.5, [(5.0, 7.0)], "coarse"), *(fake_look("B", 0.5, spans, "closer") for spans in found)]
    result = result_of(infer.repeated_zoom(blank_agent(config), samples[0], Settings(max_zooms=3)))
    assert result.spans == last and zoomed == [last] and result.answer == "Z"
    assert len(result.looks) == passes + 1


def test_without_a_span_nothing_is_zoomed_except_for_a_model_that_has_not_looked(script, samples, config):
    looks, zoomed = script
    agent = blank_agent(config)
    for strategy in ("coarse-to-fine", "repeated-zoom", "ground-then-answer"):
        looks.append(fake_look("A", 0.5, [(50.0, 60.0)], "coarse"))  # after the video's end
        result = result_of(STRATEGIES[strategy](agent, samples[0], DEFAULT))
        assert result.answer == ("Z" if strategy == "ground-then-answer" else "A")
    assert zoomed == [[]]


@pytest.mark.parametrize("strategy", [n for n in STRATEGIES if n not in ("one-stage", "agent")])  # test_episodes.py
def test_answers_do_not_depend_on_what_is_asked_beside_them(config, samples, strategy):
    """One at a time, and 3 or 64 looks in a pass, of questions that go different ways."""
    agent = load_agent(replace(config, model=str(configuration.BUILT_IN)), torch.device("cpu"))
    settings, rows = Settings(window=10, window_budget=88, top=2, compare_whole=True), {}
    ways = [infer.one_stage if k % 3 == 0 else STRATEGIES[strategy] for k in range(5)]
    for batch in (1, 3, 64):
        questions = ((s.id, ask(agent, s, settings)) for s, ask in zip(samples, ways, strict=False))
        found = {id: result for id, result, _ in side_by_side(questions, batch)}
        rows[batch] = [found[sample.id] for sample in samples[:5]]
    assert {len(result.looks) for result in rows[1]} > {1}
    for one, *others in zip(*rows.values(), strict=True):
        for two in others:
            assert (one.answer, one.spans) == (two.answer, two.spans)
            assert [look.text for look in one.looks] == [look.text for look in two.looks]
            assert [look.flops for look in one.looks] == [look.flops for look in two.looks]
            assert one.letters == pytest.approx(two.letters, abs=1e-5)


def test_two_models_find_and_answer(agent, samples, tokenizer, vocabulary):
    other = Agent(loud_model(tokenizer), vocabulary, agent.config)
    result = result_of(infer.ground_then_answer(other, samples[0], DEFAULT, grounder=agent))
    whole = infer.coarse_request(agent, samples[0])
    coarse = result_of(infer.look_once(whole))
    assert result.looks[0].text == coarse.text and result.spans == coarse.spans
    spans = infer.visible_spans(coarse.spans, whole.view.info.duration)
    assert result.letters == pytest.approx(result_of(infer.zoom(other, whole, spans)).letters)


def test_options_hold_for_both_models(talker):
    command = ["--strategy", "ground-then-answer", "--ground_model", str(talker), "--max_tokens", "9"]
    *_, config, grounding = infer.parse_infer(command)
    assert (config.model, grounding.model) == (str(configuration.BUILT_IN), str(talker))
    assert (config.template, grounding.template) == ("world", "zoom_zero")  # each as it suits its model
    assert config.max_tokens == grounding.max_tokens == 9
    assert infer.parse_infer([])[3] is None


def test_zoom_that_writes_its_answer(agent, samples):
    decoding = replace(agent, config=replace(agent.config, zoom_answer="decode"))
    seen = result_of(infer.zoom(decoding, infer.coarse_request(agent, samples[0]), [(2.0, 4.0)]))
    assert seen.answer == prompts.parse_answer(seen.text) and 0 < seen.confidence <= 1
    assert set(seen.letters) == set("ABCD") and len(seen.text) > 1


def test_every_strategy_answers_with_half_precision_weights(agent, samples):
    half = replace(agent, model=loud_model(agent.vocabulary.tokenizer).bfloat16())
    for strategy in STRATEGIES.values():
        result = result_of(strategy(half, samples[0], Settings(window=10)))
        assert result.looks and result.flops > 0


# ---------------------------------------------------------------- a data set


def run_all(agent, samples, path, made_with=None, ask=infer.coarse_to_fine):
    made_with = made_with or {"strategy": "coarse-to-fine"}
    accelerator = Accelerator(cpu=True)
    return infer.answer_all(agent, ask, samples, DEFAULT, path=path, made_with=made_with, accelerator=accelerator)


@pytest.fixture
def asking(recipe, talker, small_world):
    """The command line's options for a small data set."""
    common = ["--config", str(recipe), "--model", str(talker), "--threads", "1", "--strategy", "one-stage"]
    return [*common, "--test_data", str(small_world["train"]), "--eval_batch", "1"]  # else last digits may differ


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture
def single(agent):
    """The agent, one look in a pass: what a run has left undone then leaves no trace in the last digits."""
    return replace(agent, config=replace(agent.config, eval_batch=1))


def test_an_interrupted_run_does_only_the_rest(single, samples, tmp_path):
    agent, samples = single, samples[:6]
    rows = run_all(agent, samples, tmp_path / "once.jsonl")
    path = tmp_path / "twice.jsonl"
    lines = (tmp_path / "once.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # the third line was being written
    asked = []

    def counting(agent, sample, settings):
        asked.append(sample.id)
        return infer.coarse_to_fine(agent, sample, settings)

    again = run_all(agent, samples, path, ask=counting)
    assert asked == [sample.id for sample in samples[2:]]
    assert without_seconds(again) == without_seconds(rows)
    assert run_all(agent, samples, path, ask=counting) == again and len(asked) == len(samples) - 2
    kept = (*row_of(samples[0], None, None), "confidence")
    assert read_results(path, samples) == [{name: row[name] for name in kept} for row in rows]


def test_results_of_something_else_are_refused(agent, samples, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_all(agent, samples[:2], path, {"strategy": "one-stage", "window": 256})
    with pytest.raises(DataError, match="window was 256 and is 128 now"):
        run_all(agent, samples[:2], path, {"strategy": "one-stage", "window": 128})
    others = [replace(sample, id=f"other-{k}") for k, sample in enumerate(samples)]
    with pytest.raises(DataError, match=r"2 of 2 question ids are unknown.* give another --out"):
        run_all(agent, others, path, {"strategy": "one-stage", "window": 256})


@pytest.mark.parametrize("change", [{"question": "Which pattern does it show?"}, {"options": ("a", "b", "c", "d")}])
def test_an_answer_to_other_words_is_not_taken_for_one(agent, samples, tmp_path, change):
    """A line of a questions file that was edited keeps its id."""
    path = tmp_path / "rows.jsonl"
    run_all(agent, samples[:1], path)
    with pytest.raises(DataError, match=rf"row 1, field '{next(iter(change))}': was .* now; give another --out"):
        run_all(agent, [replace(samples[0], **change)], path)


def test_an_unreadable_video_is_an_unanswered_question(agent, samples, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    rows = run_all(agent, [samples[0], replace(samples[1], video=str(broken))], tmp_path / "rows.jsonl")
    assert rows[0]["error"] is None and rows[1]["predicted_answer"] is None and str(broken) in rows[1]["error"]
    assert f"the first unreadable video: {broken}" in cost_text(rows, "one-stage")
    assert cost(rows)["passes"] == rows[0]["passes"] > 0  # of the readable one


def test_an_unreadable_video_is_asked_about_again(single, samples, tmp_path):
    """A file server that was away for a while leaves no wrong scores behind."""
    agent = single
    path, video = tmp_path / "rows.jsonl", tmp_path / "late.mp4"
    late = [replace(samples[0], video=str(video)), samples[-1]]
    asked = []

    def counting(agent, sample, settings):
        asked.append(sample.id)
        return infer.coarse_to_fine(agent, sample, settings)

    assert [bool(row["error"]) for row in run_all(agent, late, path, ask=counting)] == [True, False]
    shutil.copy(samples[0].video, video)
    again = run_all(agent, late, path, ask=counting)
    assert asked == [samples[0].id, samples[-1].id, samples[0].id]
    expected = run_all(agent, [samples[0], samples[-1]], tmp_path / "whole.jsonl")
    assert without_seconds(again) == without_seconds([{**expected[0], "video": str(video)}, expected[1]])
    assert [row["predicted"] for row in read_results(path, late)] == [row["predicted"] for row in expected]
    assert run_all(agent, late, path, ask=counting) == again and len(asked) == 3


@pytest.mark.processes
def test_two_processes_share_a_data_set(asking, samples, tmp_path, capsys):
    """Each answers some videos' questions, both append to one file, and the rows are those of one process."""
    infer.main([*asking, "--out", str(tmp_path / "one.jsonl")])
    asked = run_in_two_processes("infer", "answer_row", [*asking, "--out", str(tmp_path / "two.jsonl")], tmp_path)
    assert all(asked) and sorted(asked[0] + asked[1]) == [sample.id for sample in samples]
    videos = [{sample.video for sample in samples if sample.id in ids} for ids in asked]
    assert not videos[0] & videos[1]
    one, two = read_nearly(tmp_path / "one.jsonl"), read_lines(tmp_path / "two.jsonl")
    assert without_seconds(one) == without_seconds(sorted(two, key=lambda row: row["id"]))


@pytest.mark.processes
def test_a_process_killed_while_it_writes_a_line_loses_only_that_line(asking, small_world, tmp_path):
    path, append, written = tmp_path / "killed.jsonl", infer.journal.append, []
    asking = [*asking, "--test_data", str(small_world["test"])]

    def interrupted(path, row):
        if len(written) == 2:
            with open(path, "ab") as file:
                file.write(json.dumps(row).encode()[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(row)
        append(path, row)

    def work(_):
        infer.journal.append = interrupted
        infer.main([*asking, "--out", str(path)])

    assert exit_codes(work) == [-signal.SIGKILL]
    left = path.read_bytes()
    assert left.count(b"\n") == 2 and len(left.splitlines()) == 3
    infer.main([*asking, "--out", str(path)])
    infer.main([*asking, "--out", str(tmp_path / "whole.jsonl")])
    assert path.read_bytes().startswith(left[: left.rindex(b"\n") + 1])  # the two finished ones are not asked again
    assert without_seconds(read_lines(path)) == without_seconds(read_lines(tmp_path / "whole.jsonl"))


def test_missing_videos_are_named_before_a_model_is_loaded(asking, samples, tmp_path, monkeypatch, capsys):
    path = tmp_path / "data.jsonl"
    write_samples(path, [*samples[:2], replace(samples[2], video="nowhere.mp4")])
    arguments = [*asking, "--test_data", str(path), "--out", str(tmp_path / "rows.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr(infer, "load_agent", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(DataError, match=r"1 video files are missing: .*nowhere\.mp4"):
            infer.main(arguments)
    infer.main([*arguments, "--skip_missing"])
    assert [row["id"] for row in read_lines(tmp_path / "rows.jsonl")] == [sample.id for sample in samples[:2]]
    assert "2 questions" in capsys.readouterr().out


# ---------------------------------------------------------------- a video of your own


@pytest.fixture
def own(small_world, recipe, talker):
    video = next(small_world["train"].parent.glob("train/*.mp4"))
    return ["--config", str(recipe), "--model", str(talker), "--threads", "1", "--video", str(video)]


ASKED = ["--question", "Which pattern does <red> show?", "--options", "rows", "columns", "checks", "dots"]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "agent"])  # which test_episodes.py has
def test_own_video(own, strategy, tmp_path, capsys):
    page = tmp_path / "pages" / "answer.html"
    infer.main([*own, *ASKED, "--strategy", strategy, "--window", "10", "--out", str(page)])
    printed = capsys.readouterr().out
    assert re.search(r"^answer      [ABCD] (rows|columns|checks|dots)$", printed, re.M)
    assert re.search(r"^confidence  \d+\.\d%$", printed, re.M)
    assert re.search(r"^spans       (\d\d:\d\d\.\d–\d\d:\d\d\.\d|no span|empty)", printed, re.M)
    tree = Tree(page.read_text()).root
    [player] = tree.all("video")
    assert (page.parent / player.attrs["src"]).resolve() == Path(own[-1]).resolve()
    claimed = re.search(r"^spans +(.*)$", printed, re.M)[1]
    jumps = [(float(b.attrs["data-start"]), float(b.attrs["data-end"])) for b in tree.all("button")]
    assert ", ".join(f"{clock(a)}–{clock(b)}" for a, b in jumps) == (claimed if jumps else "")
    assert len(tree.all("section")) >= 2 and tree.all("img") and "<red>" in tree.all("h1")[0].text


def test_every_file_of_a_folder_has_a_page(own, tmp_path, capsys, caplog):
    folder, pages = tmp_path / "films", tmp_path / "pages"
    (folder / "more").mkdir(parents=True)
    for name in ("a.mp4", "more/b.mp4"):
        shutil.copy(own[-1], folder / name)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not a video")
    infer.main([*own[:-1], str(folder), *ASKED, "--strategy", "one-stage", "--out", str(pages)])
    assert sorted(str(page.relative_to(pages)) for page in pages.rglob("*.html")) == ["a.mp4.html", "more/b.mp4.html"]
    printed = capsys.readouterr().out
    assert [Path(v).name for v in re.findall(r"^video +(.*)$", printed, re.M)] == ["a.mp4", "b.mp4"]
    assert len(re.findall(r"^answer +", printed, re.M)) == 2 and "broken.mp4" in caplog.text
    [player] = Tree((pages / "more/b.mp4.html").read_text()).root.all("video")
    assert (pages / "more" / player.attrs["src"]).resolve() == (folder / "more/b.mp4").resolve()


@pytest.mark.parametrize("folder", [False, True])
def test_pages_are_written_by_one_program_at_a_time(own, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(infer, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    out = tmp_path / ("pages" if folder else "answer.html")
    if folder:
        for name in ("a.mp4", "b.mp4"):
            (tmp_path / "films").mkdir(exist_ok=True)
            shutil.copy(own[-1], tmp_path / "films" / name)
        own = [*own[:-1], str(tmp_path / "films")]
    held = claimed(out, None) if folder else claimed_file(out, None)
    with held, pytest.raises(TrainingError, match="is being written to by process"):
        infer.main([*own, *ASKED, "--out", str(out)])


def test_a_folder_without_videos_is_an_error(own, tmp_path):
    with pytest.raises(ConfigError, match=r"no video files \(\.mp4, .* in this folder"):
        infer.main([*own[:-1], str(tmp_path), *ASKED])


def test_a_built_in_video_has_its_own_question(own, small_world, tmp_path, capsys):
    cache = small_world["test"].parents[1]
    infer.main([*own[:-1], "world", "--cache", str(cache), "--out", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    first = read_lines(small_world["test"])[0]
    assert re.search(r"^question +(.*)$", printed, re.M)[1] == first["question"]
    assert first["question"] in Tree((tmp_path / "page.html").read_text()).root.all("h1")[0].text


def test_without_arguments_it_says_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py"])
    with pytest.raises(SystemExit) as end:
        commands.answer_help("infer", infer.__doc__, bare=True)
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "python infer.py --video world" in printed and "| strategy" not in printed


def test_a_page_with_the_video_inside(own, tmp_path):
    page = tmp_path / "answer.html"
    infer.main([*own, *ASKED, "--embed", "--out", str(page)])
    tree = Tree(page.read_text()).root
    assert tree.all("video")[0].attrs["src"].startswith("data:video/mp4;base64,")
    policy = next(m.attrs["content"] for m in tree.all("meta") if "http-equiv" in m.attrs)
    assert policy.endswith("media-src data:") and "default-src 'none'" in policy


def test_names_with_spaces_and_signs_are_quoted(tmp_path):
    video = tmp_path / "a b#1?.mp4"
    assert play_source(video, tmp_path / "pages" / "x.html", False) == "../a%20b%231%3F.mp4"


def test_without_options_the_spans_of_an_event(own, tmp_path, capsys, monkeypatch):
    said = []
    asking = prompts.coarse_text
    monkeypatch.setattr(prompts, "coarse_text", lambda *a, **k: said.append(asking(*a, **k)) or said[-1])
    page = tmp_path / "answer.html"
    infer.main([*own, "--template", "zoom_zero", "--question", "a dog jumps", "--out", str(page)])
    printed = capsys.readouterr().out
    assert 'pinpoint the event "a dog jumps"' in said[0]
    assert "answer " not in printed and re.search(r"^spans ", printed, re.M)
    assert not Tree(page.read_text()).root.all("ul", "letters")


# Clicks each place, with the player back at the beginning before.
CLICK = """
const player = document.querySelector("video");
let played = false;
player.play = () => { played = true; return Promise.resolve(); };  // stay where the click led, however slow the machine
const read = () => `at ${player.seeking ? "no" : player.currentTime} ${played}`;
(async () => {
  const found = [];
  await settled(() => player.readyState >= 2 && !player.seeking, true);
  for (const [where, expected] of PLACES) {
    [player.currentTime, played] = [0, false];
    await settled(read, "at 0 false");
    document.querySelector(where).click();
    found.push(await settled(read, expected));
  }
  document.title = found.join(", ");
})();
"""
# A span plays, a frame is shown.
PLACES = [(".jumps button", "at 5 true"), (".track .span", "at 5 true"), ("figure:nth-of-type(4)", "at 3 false")]


@pytest.mark.parametrize("embed", [False, True])
def test_a_click_seeks_the_video_in_a_browser(own, tmp_path, embed):
    page = tmp_path / "answer.html"
    sample = Sample("x", own[-1], "?", ("a", "b"), None, (), 20.0)
    look = fake_look("A", 0.9, [(5.0, 8.5)], "coarse")
    look.clip = clip_of([float(k) for k in range(20)], 1.0)
    result = infer.Result("A", {"A": 0.9, "B": 0.1}, 0.9, [(5.0, 8.5)], [look])
    answer_page(answer_record(result, "A", sample, "one-stage"), page, play_source(own[-1], page, embed))
    found = page_in_browser(page, CLICK.replace("PLACES", json.dumps(PLACES)))
    assert found == ", ".join(expected for _, expected in PLACES)


# Seeks to a frame of the page, and reads the time and the number in the picture that is then shown.
READ = """
const player = document.querySelector("video"), canvas = document.createElement("canvas");
canvas.width = 160; canvas.height = 96;
const read = () => {
  const context = canvas.getContext("2d");
  context.drawImage(player, 0, 0, 160, 96);
  const row = context.getImageData(0, 6, 160, 1).data;
  let number = 0;
  for (let bit = 0; bit < 20; bit++) if (row[4 * (8 * bit + 4)] > 128) number += 2 ** bit;
  return `${player.seeking ? "seeking" : "at"} ${player.currentTime}, frame ${number}`;
};
(async () => {
  await settled(() => player.readyState >= 2 && !player.seeking, true);
  document.querySelector("figure:nth-of-type(3)").click();
  document.title = await settled(read, EXPECTED);
})();
"""


@pytest.mark.parametrize("first", [0, 75])
def test_the_player_counts_from_the_first_frame_in_a_browser(tmp_path, first):
    """Whatever the file's clock shows there."""
    clock, page = Fraction(1, 25), tmp_path / "answer.html"
    path = write_video(tmp_path / "late.mp4", pts=[first + k for k in range(60)], clock=clock)
    info = video.probe(path)
    assert info.begin == pytest.approx(first / 25) and info.duration == pytest.approx(2.4)
    sample = Sample("x", str(path), "?", ("a", "b"), None, (), info.duration)
    look = fake_look("A", 0.9, [], "coarse")
    look.clip = clip_of([0.5 * k + 0.01 for k in range(4)], 0.5)
    result = infer.Result("A", {"A": 0.9, "B": 0.1}, 0.9, [], [look])
    answer_page(answer_record(result, "A", sample, "one-stage", info.begin), page, play_source(path, page, True))
    expected = f"at {first / 25 + 1.01:g}, frame 25"
    assert page_in_browser(page, READ.replace("EXPECTED", json.dumps(expected))) == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "a.mp4"], "needs a --question"),
        (["--video", "a.mp4", "--question", "  "], "needs a --question"),
        (["--question", "what?"], "about a --video of your own"),
        (["--vidoe", "a.mp4"], "no option 'vidoe'; the nearest is 'video'"),
        (["--bugdet", "4"], "no option 'bugdet'; the nearest is 'budget'"),
        (["--budget", "x"], "budget takes a int"),
        (["--window", "0"], "window must be at least 1"),
        (["--stable", "1.5"], "stable is above 0 and at most 1"),
        (["--unparsable", "c"], "one capital letter"),
        (["--ground_model", "x", "--strategy", "one-stage"], "is for --strategy ground-then-answer"),
        (["--video", "a.mp4", "--question", "?", "--options", "a", " "], "one of them is empty"),
        (["--video", "a.mp4", "--question", "a <|video_pad|>?"], r"--question has the special token <\|video_pad\|>"),
        (["--video", "a.mp4", "--question", "?", "--options", "a", "\udcff"], "--options has half a character"),
    ],
)
def test_command_lines_that_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        infer.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the built-in policy answers by letters only; give --options"),
        (["--strategy", "coarse-to-fine"], "coarse-to-fine ends with the letter of an option"),
        (["--options", *map(str, range(27))], "27 options, but only 26 letters"),
        (["--options", "a", "b", "--out", "page.pdf"], "ends with .html"),
    ],
)
def test_questions_that_are_refused_before_a_model_is_loaded(own, arguments, message, monkeypatch):
    monkeypatch.setattr(infer, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        infer.main([*own, "--question", "when?", *arguments])


def test_an_unreadable_video_is_refused_before_a_model_is_loaded(own, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "load_agent", lambda *_: pytest.fail("a model was loaded"))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    for path in (broken, tmp_path / "missing.mp4"):
        with pytest.raises(VideoError, match=path.name):
            infer.main([*own[:-1], str(path), *ASKED])


def test_a_data_set_with_a_question_without_options_is_refused(own, samples, tmp_path):
    path = tmp_path / "data.jsonl"
    write_samples(path, [samples[0], replace(samples[1], options=(), answer=None)])
    with pytest.raises(ConfigError, match=r"data.jsonl: row 2 \(.*\): coarse-to-fine ends with the letter"):
        infer.main([*own[:-2], "--test_data", str(path)])


@pytest.mark.parametrize("program", [infer, evaluate, train])
@pytest.mark.parametrize(
    ("lacks", "message"),
    [(partial(drop_weights, part="visual."), "without vision weights"), (drop_video_token, "has no")],
)
def test_every_program_refuses_a_checkpoint_that_cannot_see(program, lacks, message, talker, recipe, tmp_path):
    shutil.copytree(talker, tmp_path / "blind")
    lacks(tmp_path / "blind")
    arguments = ["--config", str(recipe), "--model", str(tmp_path / "blind"), "--out", str(tmp_path / "new")]
    data_set = re.search("train_data: (.*)", recipe.read_text())[1]
    with pytest.raises(ModelError, match=f"blind: .*{message}"):
        program.main([*arguments, "--test_data", data_set])


def test_an_error_is_one_line(own, tmp_path):
    end = end_of("infer.py", *own[:-1], tmp_path / "missing.mp4", *ASKED)
    assert end.startswith("error: ") and "\n" not in end


def test_a_runs_checkpoint_is_asked_as_the_run_was(tmp_path):
    (tmp_path / "config.yaml").write_text("fps: 3\n")
    given, settings, config, _ = infer.parse_infer(
        ["--model", str(tmp_path / "checkpoint"), "--top", "2", "--released"]
    )
    assert config.fps == 3 and config.model == given.model
    assert settings == Settings(**{**RELEASED, "top": 2})
