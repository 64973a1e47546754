"""VideoZoomer's episodes: every limit, what a call shows, and a policy that tries everything."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

import config as configuration
import data
import episodes
import prompts
from config import ConfigError
from decode import VideoError, VideoInfo
from episodes import Episode, Scene, messages, read_turn, replay
from rollout import coarse_prompt, view_video
from video import decode, plan_clip

AGENT = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256"]


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), *AGENT])


@pytest.fixture(scope="module")
def samples(small_world):
    return data.load(small_world["train"], video_root=small_world["train"].parent)


@pytest.fixture
def scene(samples, config):
    return Scene(view_video(samples[0], config), config)


def call(start, end, fps) -> str:
    return f'<think>closer</think><video_zoom>{{"segment": [{start}, {end}], "fps": {fps}}}</video_zoom>'


def answer(letter: str = "B") -> str:
    return f"<think>seen</think><answer>{letter}</answer>"


def limited(scene: Scene, **limits: int) -> Scene:
    return Scene(scene.view, replace(scene.config, **limits))


def seen(episode: Episode) -> str:
    """What the last turn got back, without the frames."""
    return episode.turns[-1].shown.text.replace(prompts.VIDEO, "#")


# ---------------------------------------------------------------- what is shown


def test_two_seconds_at_eight_frames_per_second_are_sixteen_frames(scene, vocabulary):
    episode = replay(scene, [call(3, 5, 8)], vocabulary)
    shown = episode.turns[0].shown
    assert shown.clip.times == pytest.approx([3 + k / 8 for k in range(16)])
    frames, _ = decode(scene.view.sample.video, shown.clip.times, tuple(shown.clip.frames.shape[2:]))
    assert torch.equal(shown.clip.frames, frames) and frames.shape[2:] == (112, 112)
    assert [video.grid for video in shown.videos] == [(1, 8, 8)] * 16
    for video, frame in zip(shown.videos, frames, strict=True):
        assert torch.equal(video.patches, episodes.Video.from_frames(frame[None], 1.0).patches)


def test_every_frame_follows_its_time(scene, vocabulary):
    assert seen(replay(scene, [call(3.5, 5, 2)], vocabulary)) == "3.5s#4s#4.5s#"
    assert seen(replay(scene, [call(1, 1.25, 8)], vocabulary)) == "1s#1.12s#"
    scene.config.template = "videozoomer"
    assert seen(replay(scene, [call(3, 4, 1)], vocabulary)) == "3s#\nYou may make 3 more calls for 107 frames in all."


def test_the_glance_has_at_most_so_many_frames(samples, config):
    assert len(view_video(samples[0], replace(config, fps=0.5, max_frames=64)).clip.times) == 10
    view = view_video(samples[0], replace(config, max_frames=7))
    assert len(view.clip.times) == 7 and view.clip.step == pytest.approx(20 / 7)
    hour = VideoInfo("x.mp4", 3600.0, 25.0, 320, 240)
    assert len(plan_clip(hour, None, min(0.5, 64 / hour.duration), 8192, 16, 768).times) == 64


def test_the_prompt_states_the_limits(scene, vocabulary, model64):
    prompt = coarse_prompt(scene.view, replace(scene.config, max_turns=3), vocabulary, model64.config)
    assert "turns 3 calls 4 frames 16 of 128" in vocabulary.tokenizer.decode(prompt.ids)


def test_equal_clips_are_decoded_once(scene, vocabulary, monkeypatch):
    loaded = []
    load = episodes.load_clip
    monkeypatch.setattr(episodes, "load_clip", lambda plan, *rest, **options: loaded.append(plan) or load(plan, *rest))
    asked = [[call(3, 5, 4)], [call(3.0, 5.0, 4.0), call(3, 5, 2)], [call(0, 1, 1), call(3, 5, 4)]]
    one, two, three = (replay(scene, replies, vocabulary) for replies in asked)
    assert len(loaded) == 3
    assert one.turns[0].shown.videos[0] is two.turns[0].shown.videos[0] is three.turns[1].shown.videos[0]


# ---------------------------------------------------------------- limits and illegal calls


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("<video_zoom>{segment}</video_zoom>", "not one JSON object"),
        (call(1, 2, 1)[:-13] + '{"segment": [1, 2], "fps": 1}</video_zoom>', "not one JSON object"),
        (call(1, 2, 1) + "<video_zoom>{}</video_zoom>", "exactly one call"),
        ("<video_zoom>", "closed by </video_zoom>"),
        (answer() + call(1, 2, 1).removeprefix("<think>closer</think>"), "not both"),
        (call(-1, 2, 1), "0 <= start < end"),
        (call(5, 3, 1), "0 <= start < end"),
        (call(20, 21, 1), "The video ends at 20.0 seconds."),
        (call(19, 20.1, 1), "The video ends at 20.0 seconds."),
        (call(0, 20, 1), "A call returns at most 16 frames, you asked for 20."),
        (call(3, 5.01, 8), "A call returns at most 16 frames, you asked for 17."),
        (call(1, 2, 0), "above 0"),
        (call(1, 2, -3), "above 0"),
        (call(1, 2, 8.5), "The video has only 8 frames per second."),
    ],
)
def test_illegal_calls_get_one_sentence_and_cost_a_turn_only(scene, vocabulary, reply, sentence):
    episode = replay(scene, [reply], vocabulary)
    shown = episode.turns[0].shown
    assert sentence in shown.text and shown.clip is None and shown.call is None and not shown.videos
    assert not episode.over and scene.left(episode) == (4, 108)
    assert replay(scene, [reply, answer("C")], vocabulary).answer == "C"


def test_the_edges_of_what_is_legal(scene, vocabulary):
    for legal, n in ((call(18, 20, 8), 16), (call(4, 20, 1), 16), (call(3, 3.001, 8), 1), (call(0, 20, 1e-8), 1)):
        assert len(replay(scene, [legal], vocabulary).clips[0].times) == n
    scene.view.info = replace(scene.view.info, duration=19.97)  # stated as 20.0
    assert len(replay(scene, [call(18, 20, 8)], vocabulary).clips[0].times) == 16


def test_the_last_turn_is_told_to_answer_and_a_call_in_it_ends_the_episode(scene, vocabulary):
    for limit in (2, 5):
        small = limited(scene, max_turns=limit, max_calls=9)
        played = replay(small, [call(k, k + 1, 1) for k in range(limit - 1)], vocabulary)
        told = [turn.shown.text.endswith(" answer") for turn in played.turns]
        assert told == [False] * (limit - 2) + [True]
        ended = replay(small, [call(k, k + 1, 1) for k in range(limit)], vocabulary)
        assert ended.over and ended.answer is None and ended.truncated and len(ended.clips) == limit - 1
        with pytest.raises(ValueError, match=f"turn {limit + 1} of {limit + 1}: the episode ended"):
            replay(small, [call(k, k + 1, 1) for k in range(limit)] + [answer()], vocabulary)
    single = replay(limited(scene, max_turns=1), [call(0, 1, 1)], vocabulary)
    assert single.over and single.truncated


def test_calls_run_out(scene, vocabulary):
    small = limited(scene, max_calls=2, max_turns=9)
    episode = replay(small, [call(0, 1, 1), call(0, 99, 1), call(1, 2, 1)], vocabulary)
    assert seen(episode) == "1s# answer" and len(episode.clips) == 2  # the illegal one does not count
    episode = replay(small, [call(0, 1, 1), call(1, 2, 1), call(2, 3, 1)], vocabulary)
    assert seen(episode) == "You have no calls left. answer" and len(episode.clips) == 2


def test_frames_run_out(scene, vocabulary):
    small = limited(scene, total_frames=30)
    episode = replay(small, [call(0, 8, 1), call(0, 3, 1)], vocabulary)
    assert seen(episode) == "You have only 2 frames left, you asked for 3."
    episode = replay(small, [call(0, 8, 1), call(0, 2, 1)], vocabulary)
    assert seen(episode) == "0s#1s# answer" and small.left(episode) == (2, 0)
    assert seen(replay(small, [call(0, 8, 1), call(0, 2, 1), call(0, 1, 1)], vocabulary)) == (
        "You have no frames left. answer"
    )
    full = replay(scene, [call(0, 2, 8)] * 4 + [answer("A")], vocabulary)
    assert sum(len(clip.times) for clip in full.clips) == 64 and full.answer == "A"


def test_a_turn_without_a_call_ends_the_episode(scene, vocabulary):
    right, silent = replay(scene, [answer("D")], vocabulary), replay(scene, ["red"], vocabulary)
    assert right.over and right.answer == "D" and silent.over and silent.answer is None
    assert not right.truncated and not silent.truncated


def test_a_turn_cut_short_ends_the_episode(scene, vocabulary):
    episode = Episode([read_turn(torch.tensor(vocabulary.ids("<video_zoom>")), vocabulary)])
    scene.respond(episode)
    assert episode.over and episode.truncated and episode.answer is None


def test_frames_that_cannot_be_decoded_are_a_sentence(samples, config, vocabulary, tmp_path):
    copied = tmp_path / "v.mp4"
    with open(samples[0].video, "rb") as file:
        copied.write_bytes(file.read())
    scene = Scene(view_video(replace(samples[0], video=str(copied)), config), config)
    copied.unlink()
    episode = replay(scene, [call(3, 5, 2), answer("A")], vocabulary)
    assert "cannot be read" in episode.turns[0].shown.text and not episode.clips and episode.answer == "A"
    assert isinstance(scene.error, VideoError)


# ---------------------------------------------------------------- a policy that tries everything

HUGE = ["1e308", "-1e308", "1e999", "NaN", "-Infinity", "9" * 180, "-1", "0", "null", "true", '"3"', "[]", "{}"]
USUAL = ["0", "1.5", "3", "7", "12.25", "19", "20", "8", "2"]


def mischief(rng: random.Random) -> str:
    """One turn, random and malicious."""
    number = lambda: rng.choice(HUGE if rng.random() < 0.3 else USUAL)  # noqa: E731
    body = f'{{"segment": [{number()}, {number()}], "fps": {number()}}}'
    kind = rng.randrange(12)
    if kind == 0:
        body = rng.choice(['{"a":', "[", '"', " ", "{}", "9"]) * 10**6
    elif kind == 1:
        body = f"<video_zoom>{body}</video_zoom>" * rng.randrange(1, 4)
    elif kind == 2:
        body = "".join(rng.choice('{}[]":,0123456789.eE-+ \\u0000<>/segmntfp') for _ in range(rng.randrange(200)))
    elif kind == 3:
        body = body.replace(
            *rng.choice([("segment", "fps"), ("]", ""), ("}", '}{"fps": 1}'), ('"', "'"), (",", ", 1,")])
        )
    wrap = rng.choice(["{}", "<think>{}</think>", "{}<answer>A</answer>", "<answer>{}</answer>", "</think>{}<think>"])
    return (
        wrap.replace("{}", f"<video_zoom>{body}</video_zoom>")
        if rng.random() < 0.5
        else (f"<think></think><video_zoom>{body}</video_zoom>")
    )


def test_ten_thousand_malicious_turns(scene):
    rng = random.Random(0)
    turns, sentences, clips = 0, set(), 0
    while turns < 10_000:
        limits = {"max_turns": rng.choice([5, 30]), "max_calls": rng.choice([4, 30])}
        strict = limited(scene, **limits)
        strict.shown = scene.shown
        episode = Episode()
        while not episode.turns or not episode.over:
            episode.turns.append(episodes.Turn(torch.tensor([0]), mischief(rng), []))
            strict.respond(episode)
            turns += 1
        frames = sum(len(clip.times) for clip in episode.clips)
        assert (
            frames <= 128 - 20
            and len(episode.clips) <= limits["max_calls"]
            and len(episode.turns) <= limits["max_turns"]
        )
        assert all(len(clip.times) <= 16 for clip in episode.clips)
        for turn in episode.turns[:-1]:
            shown = turn.shown
            assert len(shown.videos) == shown.text.count(prompts.VIDEO) == (len(shown.clip.times) if shown.clip else 0)
            assert len(shown.text) < 1500
            if not shown.clip:
                sentences.add(shown.text.split(".")[0])
            clips += bool(shown.clip)
    assert clips > 100 and len(sentences) > 12  # it does get frames, and every kind of refusal


# ---------------------------------------------------------------- as messages


def test_messages_tell_all_and_replay(scene, vocabulary):
    replies = [call(3, 4, 2), call(3, 99, 2), answer("C")]
    episode = replay(scene, replies, vocabulary)
    history = json.loads(json.dumps(messages(episode, scene.view, scene.config)))
    assert [message["role"] for message in history] == ["user", "assistant"] * 3
    assert [message["text"] for message in history[1::2]] == replies
    assert history[0]["videos"] == [{"video": scene.view.sample.video, "times": scene.view.clip.times, "step": 1.0}]
    assert history[0]["text"].startswith("<video>") and scene.view.sample.question in history[0]["text"]
    assert history[2]["text"] == "3s<video>3.5s<video>" and [v["times"] for v in history[2]["videos"]] == [[3.0], [3.5]]
    assert history[4]["text"] == "The video ends at 20.0 seconds." and "videos" not in history[4]
    again = replay(Scene(scene.view, scene.config), [m["text"] for m in history[1::2]], vocabulary)
    for one, two in zip(episode.turns, again.turns, strict=True):
        assert torch.equal(one.ids, two.ids) and one.text == two.text
        assert one.shown is two.shown is None or one.shown.text == two.shown.text
    assert torch.equal(episode.clips[0].frames, again.clips[0].frames)


def test_special_tokens_in_a_replayed_turn_are_refused(scene, vocabulary):
    with pytest.raises(ValueError, match=r"turn 2 of 2: the text has the special token <\|video_pad\|>"):
        replay(scene, [call(1, 2, 1), "<|video_pad|>"], vocabulary)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frames": 0}, "needs max_frames"),
        ({"max_frames": 128}, "leave some of total_frames = 128"),
        ({"frames_per_call": 65}, "frames_per_call = 65 of at least v_min = 4"),
        ({"min_frames": 30}, "min_frames = 30 must be at most max_frames = 20"),
        ({"max_turns": 0}, "max_turns must be positive"),
    ],
)
def test_limits_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        configuration.check(replace(config, **changes))
