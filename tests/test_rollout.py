"""Groups of responses and the zoom pass, on real files of the built-in world."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import loud_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from wrapped import Wrapped, bytewise, wordwise
from written import group_of, response_with

import config as configuration
import prompts
import rollout
from advantage import token_offsets
from annotations.rows import DataError
from annotations.samples import check_samples
from engine.loading import load
from media.decode import VideoInfo
from rollout import (
    Zoom,
    answer_clips,
    coarse_plan,
    coarse_prompt,
    read_turn,
    response_seed,
    roll_out,
    view_video,
    visible_spans,
    zoom_clips,
    zoom_pass,
)
from video import VideoError

# ---------------------------------------------------------------- the coarse pass


def test_the_coarse_view_is_eq_3(samples, config):
    view = view_video(samples[0], config)
    assert view.clip.frames.shape == (20, 3, 56, 56)  # 1 frame per second, 176 / 20 = 8.8 tokens: 2 x 2 fit
    assert view.video.grid == (10, 4, 4) and view.video.n_tokens == 40 and view.video.step == 1.0


def test_a_short_video_gets_a_higher_rate_on_request(samples, config):
    view = view_video(samples[0], replace(config, min_frames=40))
    assert len(view.clip.times) == 40 and view.video.step == 0.5
    assert len(view_video(samples[0], replace(config, min_frames=10)).clip.times) == 20  # it is a least number


def test_the_prompt_states_the_duration_on_request(samples, config, vocabulary, model):
    view = view_video(samples[0], config)
    for asked in (False, True):
        prompt = coarse_prompt(view, replace(config, state_duration=asked), vocabulary, model.config)
        assert ("20.0 seconds" in vocabulary.tokenizer.decode(prompt.ids)) == asked


def test_a_response_is_read_from_its_ids(vocabulary):
    ids = torch.tensor(vocabulary.ids(response_with("(3.0,8.0)")))
    response = read_turn(ids, vocabulary)
    assert response.answer == "B" and response.spans == [(3.0, 8.0)] and response.finished
    assert "".join(response.text[a:b] for a, b in response.offsets) == response.text
    assert len(response.offsets) == len(ids) and response.offsets[-1] == (len(response.text), len(response.text))


@pytest.mark.parametrize("text", ["", "red", "<answer>", "<glue>[(5.0,3.0)]</glue>", "<glue>[", "</think><answer>Z9"])
def test_a_response_without_answer_span_or_end_is_no_exception(vocabulary, text):
    ids = torch.tensor([*vocabulary.ids(text), *vocabulary.ids("0")])
    response = read_turn(ids, vocabulary)
    assert response.answer is None and response.spans is None and not response.finished


@pytest.mark.parametrize("build", [bytewise, wordwise])
def test_a_tokenizer_decodes_as_transformers_wraps_it(build):
    """Any ids, with special tokens and without: so the tests of offsets do without transformers."""
    plain = build()
    plain.add_special_tokens(["<|im_end|>"])
    ours, theirs = Wrapped(plain), PreTrainedTokenizerFast(tokenizer_object=plain)
    random = torch.Generator().manual_seed(0)
    for skipped in (False, True):
        for _ in range(50):
            ids = torch.randint(plain.get_vocab_size(), (8,), generator=random).tolist()
            told = {"skip_special_tokens": skipped, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, **told) == theirs.decode(ids, **told)
            assert token_offsets(ours, ids, skipped) == token_offsets(theirs, ids, skipped)
    assert ours("red").input_ids == theirs("red").input_ids


def test_spaces_are_not_tidied_up():
    tidy = PreTrainedTokenizerFast(tokenizer_object=wordwise(), clean_up_tokenization_spaces=True)
    text, offsets = token_offsets(tidy, [5, 7, 6])
    assert text == "3 , 8" and offsets == [(0, 1), (1, 3), (3, 5)]


def test_a_response_that_ends_at_once(vocabulary):
    response = read_turn(torch.tensor([vocabulary.eos[0]]), vocabulary)
    assert response.finished and response.text == "" and response.answer is None


def test_groups_do_not_depend_on_how_prompts_are_batched(samples, config, vocabulary, model):
    views = [view_video(sample, config) for sample in samples[:3]]
    together = roll_out(model, views, replace(config, rollout_batch=3), vocabulary, step=5)
    apart = roll_out(model, views, replace(config, rollout_batch=1), vocabulary, step=5)
    other_step = roll_out(model, views, config, vocabulary, step=6)
    for one, two, other in zip(together, apart, other_step, strict=True):
        assert [r.ids.tolist() for r in one.responses] == [r.ids.tolist() for r in two.responses]
        assert [r.ids.tolist() for r in one.responses] != [r.ids.tolist() for r in other.responses]
        assert len(one.responses) == config.group_size
        assert len({tuple(r.ids.tolist()) for r in one.responses}) > 1


def test_without_a_step_there_is_one_greedy_response(samples, config, vocabulary, model):
    groups = [roll_out(model, [view_video(samples[0], config)], config, vocabulary, step=None) for _ in range(2)]
    assert [len(group.responses) for (group,) in groups] == [1, 1]
    assert torch.equal(groups[0][0].responses[0].ids, groups[1][0].responses[0].ids)


def test_padded_ids_and_mask(samples, config, vocabulary, model):
    group = group_of([response_with("(3.0,8.0)"), "red"], view_video(samples[0], config), vocabulary, config, model)
    ids, mask = group.padded()
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [len(r.ids) for r in group.responses]
    for row, real, response in zip(ids, mask, group.responses, strict=True):
        assert torch.equal(row[real], response.ids) and (row[~real] == 0).all()


def test_seeds_differ_for_every_part():
    seeds = [response_seed(run, step, "id", g) for run in range(2) for step in range(2) for g in range(3)]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(0, 1, "a", 2) == response_seed(0, 1, "a", 2)


# ---------------------------------------------------------------- the zoom pass


def test_visible_parts_of_spans():
    assert visible_spans([(-2.0, 3.0), (18.0, 99.0)], 20.0) == [(0.0, 3.0), (18.0, 20.0)]
    assert visible_spans([(5.0, 5.0), (20.0, 30.0), (-5.0, 0.0)], 20.0) == []
    assert visible_spans(None, 20.0) == visible_spans([], 20.0) == []


def test_zooming_gives_more_pixels_and_a_higher_rate(samples, config):
    view = view_video(samples[0], config)
    short, whole = zoom_clips(view, [[(3.0, 8.0)], []], config)
    assert short.frames.shape[2:] == (112, 112) and short.step == 0.5
    assert min(short.times) >= 3.0 and max(short.times) < 8.0 and len(short.times) == 10
    assert len(whole.times) == 40 and whole.frames.shape[2] == 56
    (half,) = zoom_clips(view, [[(3.0, 8.0)]], replace(config, zoom_budget=40))
    assert half.frames.shape == (10, 3, 56, 56)
    few = replace(config, v_max=4, zoom_v_max=9)
    (larger,) = zoom_clips(view, [[(3.0, 8.0)]], few)
    assert larger.frames.shape == (10, 3, 84, 84)
    assert view_video(samples[0], few).clip.frames.shape[2:] == (56, 56)


def test_equal_spans_share_one_zoom(samples, config, vocabulary, model, monkeypatch):
    view = view_video(samples[0], config)
    texts = [response_with(spans) for spans in ("(3.0,8.0)", "(3.0,8.0)", "(4.0,8.0)", "(3.00,8.00)")]
    group = group_of(texts, view, vocabulary, config, model)
    shown = []

    def counted(model, jobs, *rest):
        jobs = list(jobs)
        shown.append(len(jobs))
        return answer_clips(model, jobs, *rest)

    monkeypatch.setattr(rollout, "answer_clips", counted)
    assert zoom_pass(model, [group], config, vocabulary) == {}
    a, b, c, d = (response.zoom.clip for response in group.responses)
    assert a is b is d and a is not c and shown == [2]


@pytest.mark.parametrize("spans", ["", "(8.0,3.0)", "(25.0,30.0)", "(5.0,5.0)"])
def test_an_unusable_span_under_both_rules(samples, config, vocabulary, model, spans):
    view = view_video(samples[0], config)
    group = group_of([response_with(spans)], view, vocabulary, config, model)
    zoom_pass(model, [group], config, vocabulary)
    assert group.responses[0].zoom is None
    zoom_pass(model, [group], replace(config, invalid_span="uniform"), vocabulary)
    clip = group.responses[0].zoom.clip
    assert len(clip.times) == 40 and clip.times[0] == 0 and clip.times[-1] > 19


def test_the_answer_is_the_likeliest_letter(samples, config, vocabulary, model):
    view = view_video(samples[0], config)
    clips = zoom_clips(view, [[(3.0, 8.0)], [(1.0, 2.0)], [(0.0, 20.0)]], config)
    jobs = [(sample, clip, None) for sample, clip in zip(samples, clips, strict=False)]
    zooms = answer_clips(model, jobs, config, vocabulary)
    assert [zoom.clip for zoom in zooms] == clips
    for zoom in zooms:
        assert zoom.answer == zoom.text == max(zoom.letters, key=zoom.letters.get)
        assert list(zoom.letters) == list("ABCD") and sum(zoom.letters.values()) < 1 and zoom.n_written == 1
    for batch in (1, 2):
        again = answer_clips(model, jobs, replace(config, zoom_batch=batch), vocabulary)
        for one, other in zip(again, zooms, strict=True):
            assert one.answer == other.answer and one.n_prompt == other.n_prompt
            assert one.letters == pytest.approx(other.letters, abs=1e-4)


def test_only_the_sample_s_letters_are_compared(samples, config, vocabulary, model):
    sample = replace(samples[0], options=samples[0].options[:2], answer="A")
    clips = zoom_clips(view_video(sample, config), [[(float(k), k + 2.0)] for k in range(12)], config)
    zooms = answer_clips(model, [(sample, clip, None) for clip in clips], config, vocabulary)
    assert {zoom.answer for zoom in zooms} <= {"A", "B"} and all(list(zoom.letters) == ["A", "B"] for zoom in zooms)


def test_a_decoded_zoom_answer(samples, config, vocabulary, talker):
    """The talker writes a whole response whatever it sees, and its answer is read from it."""
    talking, _ = load(str(talker))
    decode = replace(config, zoom_answer="decode")
    (clip,) = zoom_clips(view_video(samples[0], config), [[(3.0, 8.0)]], config)
    (zoom,) = answer_clips(talking, [(samples[0], clip, None)], decode, vocabulary)
    assert zoom.answer == prompts.parse_answer(zoom.text) and set(zoom.letters) == set("ABCD")
    assert zoom.n_written > 1 and 0 < zoom.letters[zoom.answer] < 1
    (zoom,) = answer_clips(loud_model(vocabulary.tokenizer), [(samples[0], clip, None)], decode, vocabulary)
    assert zoom.answer is None and zoom.letters == {}  # a random model writes no answer


def test_the_zoom_prompt_can_carry_the_reasoning(samples, config, vocabulary, model, monkeypatch):
    """Then responses with equal spans but other reasoning do not share a zoom."""
    seen = []
    zoom_text = rollout.prompts.zoom_text
    monkeypatch.setattr(
        rollout.prompts, "zoom_text", lambda t, q, o, think=None: seen.append(think) or zoom_text(t, q, o, think)
    )
    view = view_video(samples[0], config)
    texts = [response_with("(3.0,8.0)"), response_with("(3.0,8.0)").replace("red", "blue")]
    group = group_of(texts, view, vocabulary, config, model)
    zoom_pass(model, [group], replace(config, zoom_sees_think=True), vocabulary)
    assert [think[:4] for think in seen] == ["red<", "blue"]
    seen.clear()
    zoom_pass(model, [group], config, vocabulary)
    assert seen == [None]


def test_a_video_that_fails_in_the_zoom_pass_is_reported(samples, config, vocabulary, model, tmp_path):
    """Its responses have no zoom; other groups keep theirs."""
    copied = tmp_path / "v.mp4"
    with open(samples[0].video, "rb") as file:
        copied.write_bytes(file.read())
    lost = group_of(
        [response_with("(3.0,8.0)")],
        view_video(replace(samples[0], video=str(copied)), config),
        vocabulary,
        config,
        model,
    )
    kept = group_of([response_with("(3.0,8.0)")], view_video(samples[1], config), vocabulary, config, model)
    copied.unlink()
    lost.responses[0].zoom = Zoom(None, "A", {}, "A", 1, 1)  # of an earlier pass
    failed = zoom_pass(model, [lost, kept], config, vocabulary)
    assert list(failed) == [samples[0].id] and isinstance(failed[samples[0].id], VideoError)
    assert lost.responses[0].zoom is None and kept.responses[0].zoom is not None


# ---------------------------------------------------------------- what is needed of the data


def test_samples_without_a_needed_field_are_named(samples):
    check_samples(samples, ("options", "answer", "evidence"), "train.jsonl")
    broken = [samples[0], replace(samples[1], answer=None, evidence=())]
    with pytest.raises(DataError, match=f"train.jsonl: row 2 .{samples[1].id}.: answer, evidence"):
        check_samples(broken, ("options", "answer", "evidence"), "train.jsonl")
    many = [replace(samples[0], options=tuple(map(str, range(30))))]
    with pytest.raises(DataError, match="30 options"):
        check_samples(many, ("options",), "train.jsonl")


def test_a_question_without_options_is_asked_as_one_where_the_data_say_so(samples, config):
    config = replace(config, template="longvtg_r1")
    event = replace(samples[0], question="Where is my cup?", options=(), answer=None)
    asked = replace(event, meta={"wording": "question"})
    words = [rollout.coarse_words(view_video(sample, config), config) for sample in (event, asked)]
    assert 'pinpoint the event "Where is my cup?" in' in words[0]
    assert words[1].startswith('Locate the video clip that is relevant to the question: "Where is my cup?"\n')


@pytest.mark.parametrize("recipe_name", ["zoom_zero_stage1", "zoom_zero_stage2", "union", "long_video"])
@settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), max_examples=200)
@given(st.floats(3, 8000), st.floats(0, 1), st.floats(0.02, 0.95))
@example(duration=2386.0, place=0.3, share=136 / 2386)
@example(duration=44.0, place=0.0, share=0.6)
def test_a_zoom_shows_more_than_the_coarse_pass_and_nothing_less(recipe_name, duration, place, share):
    """By the papers' recipes: tokens per frame and frames per second, where the coarse pass leaves any to gain."""
    model = ["--model", str(configuration.BUILT_IN)]  # the recipe's has patches of the same size
    config = configuration.parse(["--config", f"recipes/{recipe_name}.yaml", *model])
    info = VideoInfo("x.mp4", duration, 25.0, 1280, 720)
    coarse = coarse_plan(info, config)
    start = place * (1 - share) * duration
    spans = [(start, start + share * duration)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "load_clips", lambda video, plans, cache: plans)
        view = SimpleNamespace(info=info, clip=coarse, sample=SimpleNamespace(video="x.mp4"))
        [zoom] = zoom_clips(view, [spans], config)

    def tokens(plan) -> float:
        return min(config.v_max, config.budget / len(plan.times))  # Eq. 3

    rates = 1 / zoom.step, 1 / coarse.step
    assert tokens(zoom) >= tokens(coarse) and rates[0] >= rates[1] * (1 - 1e-9)
    assert zoom.height * zoom.width >= coarse.height * coarse.width
    if len(zoom.times) < len(coarse.times) and tokens(coarse) < config.v_max:
        assert tokens(zoom) > tokens(coarse)
    elif len(zoom.times) >= len(coarse.times) and share * duration < duration - coarse.step:
        assert rates[0] > rates[1]
