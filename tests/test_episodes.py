"""VideoZoomer's episodes: every limit, what a call shows, and a policy that tries everything."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, pay, read_metrics, roll_out_episodes
from runs import in_two
from talking import learn, shallow

import config as configuration
import episodes
import infer
import policy
import prompts
import rollout
import train
from advantage import credit
from annotations.samples import DataSet, Epochs
from config import Config, ConfigError
from engine.flops import asked_weights, forward_flops, weights
from engine.loading import load
from episodes import ClipEnvironment, lay_out, messages, replay
from harness.asking import Agent, side_by_side
from harness.batches import generator
from harness.run import Stopped
from harness.setup import load_run
from media.decode import VideoInfo
from media.file import VideoError
from policy import Prompt, Video, Vocabulary, build_prompt
from rollout import Group, Response, Turn, coarse_plan, coarse_prompt, read_turn, view_video
from tests.plain_episodes import PlainEpisodes
from train import MicroBatch
from video import decode
from world import benchmark, lessons, tiny

AGENT = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256"]
AGENT += ["--tokenadv", "off", "--zoom_reward", "false"]
CONFIG = tiny.build_model(tiny.build_tokenizer([])).config


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), *AGENT])


@pytest.fixture
def scene(samples, config):
    return ClipEnvironment(view_video(samples[0], config), config)


def call(start, end, fps) -> str:
    return f'<think>closer</think><video_zoom>{{"segment": [{start}, {end}], "fps": {fps}}}</video_zoom>'


def answer(letter: str = "B") -> str:
    return f"<think>seen</think><answer>{letter}</answer>"


def limited(scene: ClipEnvironment, **limits: int) -> ClipEnvironment:
    return ClipEnvironment(scene.view, replace(scene.config, **limits))


def seen(episode: Response) -> str:
    """What the last turn got back, without the frames."""
    return episode.turns[-1].reply.text.replace(prompts.VIDEO, "#")


# ---------------------------------------------------------------- what is shown


def test_two_seconds_at_eight_frames_per_second_are_sixteen_frames(scene, vocabulary):
    episode = replay(scene, [call(3, 5, 8)], vocabulary)
    shown = episode.turns[0].reply
    assert shown.clip.times == pytest.approx([3 + k / 8 for k in range(16)])
    frames, _ = decode(scene.view.sample.video, shown.clip.times, tuple(shown.clip.frames.shape[2:]))
    assert torch.equal(shown.clip.frames, frames) and frames.shape[2:] == (112, 112)
    assert [video.grid for video in shown.videos] == [(1, 8, 8)] * 16
    for video, frame in zip(shown.videos, frames, strict=True):
        assert torch.equal(video.patches, Video.from_frames(frame[None], 1.0).patches)


def test_every_frame_follows_its_time(scene, vocabulary):
    assert seen(replay(scene, [call(3.5, 5, 2)], vocabulary)) == "3.5s#4s#4.5s#"
    assert seen(replay(scene, [call(1, 1.25, 8)], vocabulary)) == "1s#1.12s#"
    scene.config.template = "videozoomer"
    assert seen(replay(scene, [call(3, 4, 1)], vocabulary)) == "3s#\nYou may make 3 more calls for 107 frames in all."


def test_the_glance_has_at_most_so_many_frames(samples, config):
    assert len(view_video(samples[0], replace(config, fps=0.5, max_frames=64)).clip.times) == 10
    view = view_video(samples[0], replace(config, max_frames=7))
    assert len(view.clip.times) == 7 and view.clip.step == pytest.approx(20 / 7)


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
    assert one.turns[0].reply.videos[0] is two.turns[0].reply.videos[0] is three.turns[1].reply.videos[0]


def test_a_clip_that_a_group_asks_for_is_decoded_once(samples, small, loaded, monkeypatch):
    """All responses of a group make one call in all of their turns."""
    plans, load = [], episodes.load_clip
    monkeypatch.setattr(episodes, "load_clip", lambda plan, *rest, **_: plans.append(plan) or load(plan, *rest))
    monkeypatch.setattr(rollout, "read_turn", lambda ids, *_: Turn.of(call(3, 5, 4), True, ids, []))
    model, vocabulary = loaded
    groups = roll_out_episodes(model, views_of(samples, small, 2), small, vocabulary, 0)
    assert [len(episode.clips) for group in groups for episode in group.responses] == [3] * 2 * small.group_size
    assert len(plans) == 2  # one for each group


def test_a_clip_is_decoded_while_the_one_before_is_encoded(samples, small, loaded, monkeypatch):
    """Two groups whose turns end together: the first clip's encoding waits for the second one's decoding to begin."""
    begun, waited, plans = threading.Event(), [], []
    load, keep = episodes.load_clip, rollout.keep_tokens

    def load_and_note(plan, *rest, **options):
        plans.append(plan)
        if len(plans) == 2:
            begun.set()
        return load(plan, *rest, **options)

    def keep_and_wait(model, videos):
        if videos and not waited:
            waited.append(begun.wait(10))
        keep(model, videos)

    monkeypatch.setattr(episodes, "load_clip", load_and_note)
    monkeypatch.setattr(rollout, "keep_tokens", keep_and_wait)
    monkeypatch.setattr(rollout, "read_turn", lambda ids, *_: Turn.of(call(3, 5, 4), True, ids, []))
    model, vocabulary = loaded
    short = replace(small, max_tokens=1, max_turns=2, group_size=2)
    groups = roll_out_episodes(model, views_of(samples, short, 2), short, vocabulary, 0)
    assert waited == [True] and [len(episode.clips) for group in groups for episode in group.responses] == [1] * 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_recipe_has_the_papers_limits_and_the_released_weights():
    recipe = configuration.parse(["--config", "recipes/videozoomer_rl.yaml"])
    limits = recipe.max_frames, recipe.frames_per_call, recipe.max_turns, recipe.max_calls, recipe.total_frames
    assert limits == (64, 16, 5, 4, 128)
    assert (recipe.accuracy_weight, recipe.format_weight, recipe.tool_weight) == (0.9, 0.1, 0.5)
    assert (recipe.clip_low, recipe.clip_high, recipe.group_size) == (0.2, 0.27, 16)
    recipe = replace(recipe, model=str(configuration.BUILT_IN))  # which is here, and has patches of the same size
    for seconds, frames in ((60.0, 30), (128.0, 64), (3600.0, 64)):
        assert len(coarse_plan(VideoInfo("x.mp4", seconds, 25.0, 320, 240), recipe).times) == frames


# ---------------------------------------------------------------- limits and illegal calls


@pytest.mark.parametrize("per_call", [1, 7, 10, 16])
def test_every_example_of_a_call_is_legal(scene, per_call):
    view = replace(scene.view, info=replace(scene.view.info, duration=60.0))
    environment = ClipEnvironment(view, replace(scene.config, frames_per_call=per_call))
    prompt = prompts.coarse_text("videozoomer", "Why?", ["rain", "sun"], limits=environment.limits)
    texts = [prompt, prompts.parse_tool_call("<video_zoom>{</video_zoom>")]
    if per_call == Config().frames_per_call:
        texts.append((ROOT / "docs/videozoomer.md").read_text())
    for text in texts:
        examples = re.findall(r'{"segment".*?}', text)
        assert examples
        for example in examples:
            asked = prompts.parse_tool_call(f"<video_zoom>{example}</video_zoom>")
            assert environment.refusal(asked, Response()) == "", example


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("<video_zoom>{segment}</video_zoom>", "not one JSON object"),
        (call(1, 2, 1)[:-13] + '{"segment": [1, 2], "fps": 1}</video_zoom>', "not one JSON object"),
        (call(1, 2, 1).replace("<video_zoom>", "<video_zoom>" * 2), "not one JSON object"),
        ("<think>closer</think></video_zoom>", "exactly one call"),
        (call(1, 2, 1).replace("</think>", "").replace("</video", "</think></video"), "after thinking"),
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
    shown = episode.turns[0].reply
    assert sentence in shown.text and shown.clip is None and shown.call is None and not shown.videos
    assert not episode.over and scene.left(episode) == (4, 108)
    assert replay(scene, [reply, answer("C")], vocabulary).answer == "C"


def test_the_edges_of_what_is_legal(scene, vocabulary):
    rare = [(call(*span, fps), 1) for span in ((0, 20), (3, 3.001)) for fps in (1e-8, 1e-308, 5e-324)]
    for legal, n in ((call(18, 20, 8), 16), (call(4, 20, 1), 16), (call(3, 3.001, 8), 1), *rare):
        [clip] = replay(scene, [legal], vocabulary).clips
        assert len(clip.times) == n and 0 < clip.step <= 20
    scene.view.info = replace(scene.view.info, duration=19.97)  # stated as 20.0
    assert len(replay(scene, [call(18, 20, 8)], vocabulary).clips[0].times) == 16


def test_the_last_turn_is_told_to_answer_and_a_call_in_it_ends_the_episode(scene, vocabulary):
    for limit in (2, 5):
        small = limited(scene, max_turns=limit, max_calls=9)
        played = replay(small, [call(k, k + 1, 1) for k in range(limit - 1)], vocabulary)
        told = [turn.reply.text.endswith(" answer") for turn in played.turns]
        assert told == [False] * (limit - 2) + [True]
        ended = replay(small, [call(k, k + 1, 1) for k in range(limit)], vocabulary)
        assert ended.over and ended.answer is None and not ended.finished and len(ended.clips) == limit - 1
        with pytest.raises(ValueError, match=f"turn {limit + 1} of {limit + 1}: the episode ended"):
            replay(small, [call(k, k + 1, 1) for k in range(limit)] + [answer()], vocabulary)
    single = replay(limited(scene, max_turns=1), [call(0, 1, 1)], vocabulary)
    assert single.over and not single.finished


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
    assert right.finished and silent.finished


def test_a_turn_cut_short_ends_the_episode(scene, vocabulary):
    episode = Response([read_turn(torch.tensor(vocabulary.ids("<video_zoom>")), vocabulary, may_call=True)])
    scene.respond(episode)
    assert episode.over and not episode.finished and episode.answer is None


def test_frames_that_cannot_be_decoded_are_a_sentence(samples, config, vocabulary, tmp_path):
    copied = tmp_path / "v.mp4"
    with open(samples[0].video, "rb") as file:
        copied.write_bytes(file.read())
    scene = ClipEnvironment(view_video(replace(samples[0], video=str(copied)), config), config)
    copied.unlink()
    episode = replay(scene, [call(3, 5, 2), answer("A")], vocabulary)
    assert "cannot be read" in episode.turns[0].reply.text and not episode.clips and episode.answer == "A"
    assert isinstance(episode.turns[0].reply.error, VideoError)


# ---------------------------------------------------------------- a policy that tries everything

HUGE = [
    "1e308",
    "-1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "9" * 180,
    "1e-308",
    "5e-324",
    "-1",
    "0",
    "null",
    "true",
    '"3"',
    "[]",
    "{}",
]
USUAL = ["0", "1.5", "3", "7", "12.25", "19", "20", "8", "2"]


def mischief(rng: random.Random) -> str:
    """One turn, random and malicious."""
    number = lambda: rng.choice(HUGE if rng.random() < 0.3 else USUAL)  # noqa: E731
    body = f'{{"segment": [{number()}, {number()}], "fps": {number()}}}'
    kind = rng.randrange(12)
    if kind == 0:
        body = rng.choice(['{"a":', "[", '"', " ", "{}", "9"]) * rng.choice([10**2, 10**4, 10**6])
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


def test_ten_thousand_malicious_turns(scene, vocabulary):
    prompt = Prompt(torch.zeros(3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long), [], 3)
    rng = random.Random(0)
    turns, sentences, clips = 0, set(), 0
    while turns < 10_000:
        limits = {"max_turns": rng.choice([5, 30]), "max_calls": rng.choice([4, 30])}
        strict = limited(scene, **limits)
        strict.loaded = scene.loaded
        episode = Response()
        while not episode.turns or not episode.over:
            episode.turns.append(Turn.of(mischief(rng), True, torch.tensor([0]), []))
            strict.respond(episode)
            turns += 1
        frames = sum(len(clip.times) for clip in episode.clips)
        assert (
            frames <= 128 - 20
            and len(episode.clips) <= limits["max_calls"]
            and len(episode.turns) <= limits["max_turns"]
        )
        assert all(len(clip.times) <= 16 for clip in episode.clips)
        lay_out(episode, prompt, vocabulary, CONFIG)
        ends = [observation.prompt.next_position for observation in episode.observations]
        assert ends == sorted(ends) and all(end < 3 + 100 * len(episode.turns) * 16 for end in ends)
        for turn in episode.turns[:-1]:
            shown = turn.reply
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
    again = replay(ClipEnvironment(scene.view, scene.config), [m["text"] for m in history[1::2]], vocabulary)
    for one, two in zip(episode.turns, again.turns, strict=True):
        assert torch.equal(one.ids, two.ids) and one.text == two.text
        assert one.reply is two.reply is None or one.reply.text == two.reply.text
    assert torch.equal(episode.clips[0].frames, again.clips[0].frames)


def test_special_tokens_in_a_replayed_turn_are_refused(scene, vocabulary):
    with pytest.raises(ValueError, match=r"turn 2 of 2: the text has the special token <\|video_pad\|>"):
        replay(scene, [call(1, 2, 1), "<|video_pad|>"], vocabulary)


# ---------------------------------------------------------------- rollout


def random_turn(rng: random.Random) -> str:
    """An answer, or a call."""
    if rng.random() < 0.4:
        return answer(rng.choice("ABCD"))
    return call(rng.choice([1, 3, 5]), rng.choice([7, 8, 9]), rng.choice([1, 2]))


@pytest.fixture(scope="module")
def player(tmp_path_factory) -> Path:
    """A checkpoint that writes calls and answers at random, in any turn."""
    folder = tmp_path_factory.mktemp("player")
    rng = random.Random(0)
    sentences = [prompts.chat_text(""), *(random_turn(rng) for _ in range(300)), *(f"{k}s" for k in range(10))]
    tokenizer = tiny.build_tokenizer(lessons.corpus() + sentences)
    vocabulary = Vocabulary.of(tokenizer)
    model = shallow(tokenizer)
    generator = torch.Generator().manual_seed(0)

    def batch(step: int) -> lessons.Batch:
        chat = prompts.chat_text(f"Which pattern does {rng.choice(list(benchmark.COLOURS))} show? A B C D", system=None)
        for _ in range(step % 3):  # turns before the one that is learned
            chat += random_turn(rng) + prompts.next_turn(f"3s{prompts.VIDEO}" * rng.randrange(3), False)
        ids = vocabulary.ids(chat)
        grey = torch.randint(0, 256, (1, 3, 1, 1), generator=generator, dtype=torch.uint8).expand(2, 3, 28, 28)
        clips = [Video.from_frames(grey, 1.0)] * ids.count(model.config.video_token_id)
        said = [vocabulary.ids(random_turn(rng) + lessons.END) for _ in range(8)]
        return lessons.Batch.of([build_prompt(ids, clips, model.config)], [said])

    learn(model, batch, 100)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(player):
    model, tokenizer = load(str(player))
    return model.eval(), Vocabulary.of(tokenizer)


@pytest.fixture
def small(config):
    return replace(config, group_size=6, max_tokens=40, frames_per_call=12, max_turns=4, max_frames=5, budget=40)


def views_of(samples, config, n: int = 3):
    return [view_video(sample, config) for sample in samples[:n]]


def test_rollouts_are_those_of_the_plain_way(samples, small, loaded, monkeypatch):
    """With the cache across turns or without: the same turns, frames and observations."""
    model, vocabulary = loaded
    ours = roll_out_episodes(model, views_of(samples, small), small, vocabulary, 4)
    monkeypatch.setattr(rollout, "Sampler", PlainEpisodes)
    plain = roll_out_episodes(model, views_of(samples, small), small, vocabulary, 4)
    turns, shown = set(), 0
    for one, two in zip(ours, plain, strict=True):
        assert len(one.responses) == 6
        for a, b in zip(one.responses, two.responses, strict=True):
            assert a.over and a.ids.tolist() == b.ids.tolist() and a.text == b.text
            for x, y in zip(a.observations, b.observations, strict=True):
                assert x.after == y.after and torch.equal(x.prompt.ids, y.prompt.ids)
                assert torch.equal(x.prompt.positions, y.prompt.positions)
            turns.add(len(a.turns))
            shown += len(a.clips)
    assert turns >= {1, 2, 3} and shown >= 3


def test_episodes_do_not_depend_on_how_they_are_batched(samples, small, loaded):
    model, vocabulary = loaded
    together, apart, other = (
        roll_out_episodes(model, views_of(samples, c), c, vocabulary, step)
        for c, step in ((small, 3), (replace(small, rollout_batch=1), 3), (small, 4))
    )
    for one, two, three in zip(together, apart, other, strict=True):
        assert [e.ids.tolist() for e in one.responses] == [e.ids.tolist() for e in two.responses]
        assert [e.ids.tolist() for e in one.responses] != [e.ids.tolist() for e in three.responses]
        assert len({tuple(e.ids.tolist()) for e in one.responses}) > 3


def test_an_episode_is_a_response_and_its_replay_the_same(samples, small, loaded):
    model, vocabulary = loaded
    groups = roll_out_episodes(model, views_of(samples, small), small, vocabulary, 3)
    replayed = 0
    for group in groups:
        ids, mask = group.padded()
        for row, real, episode in zip(ids, mask, group.responses, strict=True):
            assert torch.equal(row[real], episode.ids) and len(episode.offsets) == len(episode.ids)
            assert "".join(episode.text[a:b] for a, b in episode.offsets) == episode.text
            if not episode.finished or any(turn.text.endswith("\ufffd") for turn in episode.turns):
                continue
            again = replay(ClipEnvironment(group.view, small), [turn.text for turn in episode.turns], vocabulary)
            lay_out(again, group.prompt, vocabulary, model.config)
            if again.ids.tolist() != episode.ids.tolist():  # a random policy may cut its words otherwise
                continue
            replayed += 1
            for x, y in zip(episode.observations, again.observations, strict=True):
                assert x.after == y.after and torch.equal(x.prompt.positions, y.prompt.positions)
                for v, w in zip(x.prompt.videos, y.prompt.videos, strict=True):
                    assert torch.equal(v.patches, w.patches)
    assert replayed > 4


def test_without_a_step_there_is_one_greedy_episode(samples, small, loaded):
    model, vocabulary = loaded
    one, two = (roll_out_episodes(model, views_of(samples, small, 1), small, vocabulary, None) for _ in range(2))
    assert len(one[0].responses) == 1 and torch.equal(one[0].responses[0].ids, two[0].responses[0].ids)


def test_a_trained_tower_encodes_anew_in_the_update(samples, small, loaded):
    model, vocabulary = loaded
    for trained in (True, False):
        given = replace(small, train_vision=trained)
        groups = roll_out_episodes(model, views_of(samples, given), given, vocabulary, 3)
        videos = [v for g in groups for e in g.responses for o in e.observations for v in o.prompt.videos]
        assert videos and all((video.tokens is None) == trained for video in videos)


# ---------------------------------------------------------------- rewards and training


def played(scene, vocabulary, *replies: str) -> Response:
    return replay(scene, replies, vocabulary)


def test_rewards_of_episodes(scene, vocabulary):
    right = scene.view.sample.answer
    wrong = "ABCD".replace(right, "")[0]
    group = Group(
        scene.view,
        None,
        [
            played(scene, vocabulary, answer(right)),
            played(scene, vocabulary, call(3, 5, 2), answer(right)),
            played(scene, vocabulary, call(3, 5, 2), answer(wrong)),
            played(scene, vocabulary, call(3, 99, 2), answer(right)),  # a call, but no frames
            played(scene, vocabulary, call(3, 5, 2).replace("closer", ""), answer(right)),  # no thought
            played(scene, vocabulary, "<video_zoom>", answer(right)),
            played(limited(scene, max_turns=1), vocabulary, call(3, 5, 2)),
        ],
    )
    pay([group], scene.config)
    assert group.rewards == {
        "format": [1, 1, 1, 1, 0, 0, 0],
        "accuracy": [1, 1, 0, 1, 1, 1, 0],
        "tool": [0, 1, 0, 0, 1, 0, 0],
    }
    weights = replace(scene.config, accuracy_weight=0.9, format_weight=0.1, tool_weight=0.5)
    total = torch.tensor([1.0, 1.5, 0.1, 1.0, 1.4, 0.9, 0.0])
    expected = (total - total.mean()) / total.std(unbiased=False)
    torch.testing.assert_close(credit(group, weights)[:, 0], expected)


def test_truncated_episodes_can_be_masked(scene, vocabulary):
    short = limited(scene, max_turns=2)
    responses = [played(short, vocabulary, call(3, 5, 2), turn) for turn in (answer(), call(3, 5, 1))]
    group = Group(scene.view, Prompt(torch.zeros(0), torch.zeros(3, 0), [], 0), responses)
    for episode in responses:
        lay_out(episode, group.prompt, vocabulary, CONFIG)
    pay([group], scene.config)
    batch = MicroBatch.of([group], scene.config)
    assert batch.mask.any(-1).tolist() == [[True, True]] and [len(o) for o in batch.observations[0]] == [1, 1]
    batch = MicroBatch.of([group], replace(scene.config, mask_truncated=True))
    assert batch.mask.any(-1).tolist() == [[True, False]] and [len(o) for o in batch.observations[0]] == [1, 0]


@pytest.fixture
def small_recipe(recipe, player):
    """A recipe for two small steps of episodes."""
    values = yaml.safe_load(recipe.read_text())
    values |= {"model": str(player), "template": "world_zoomer", "max_frames": 5, "zoom_budget": 256, "budget": 40}
    values |= {"max_turns": 3, "frames_per_call": 12, "tokenadv": "off", "zoom_reward": False, "tool_weight": 0.5}
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def test_a_run_trains_on_episodes(small_recipe, small_world, tmp_path):
    train.main(["--config", str(small_recipe), "--test_data", str(small_world["test"]), "--max_redraws", "1"])
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows:
        assert 1 <= row["episode/turns"] <= 3 and row["episode/calls"] >= row["episode/clips"]
        assert row["episode/calls"] >= row["episode/turns"] - 1 and 0 <= row["redrawn"] <= 0.5
        assert row["ratio"] == pytest.approx(1, abs=1e-3)
        assert "reward/tool_mean" in row and "reward/iou_mean" not in row
    assert rows[0]["kl/text"] < 1e-3 < rows[1]["kl/text"]  # the second step is no longer the reference
    assert any(row["grad_norm"] > 0 for row in rows) and any(row["episode/clips"] > 0 for row in rows)
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["all"]
    assert table["frames"] >= 5 and 0 <= table["accuracy"] <= 1 and "zoom_accuracy" not in table
    assert "Call" in (tmp_path / "run" / "episodes.html").read_text()


def test_what_is_shown_is_never_a_target(small_recipe, samples, monkeypatch):
    """States from which no sampled token follows may be NaN: loss, KL, statistics and gradients stay as they are."""
    config = configuration.parse(["--config", str(small_recipe), "--beta", "0.05", "--max_grad_norm", "1e9"])
    run = load_run(config, Accelerator(cpu=True))
    groups = roll_out_episodes(run.model, views_of(samples, config, 2), config, run.vocabulary, 3)
    assert any(episode.observations for group in groups for episode in group.responses)
    for group in groups:
        group.rewards = {"accuracy": [float(k % 2) for k in range(len(group.responses))]}
        group.advantages = credit(group, config)
    with torch.no_grad():
        run.model.model.language_model.norm.weight.mul_(1.2)  # no longer the reference
    batches = [MicroBatch.of([group], config) for group in groups]
    unused = [~predicting(group) for group in groups]
    plain, kept = policy.row_hidden, []

    def poisoned(*arguments):
        states = plain(*arguments)
        (dead,) = (dead for dead in unused if len(dead) == len(states))
        return states.masked_fill(dead[:, None], math.nan)

    run.optimizer.step = lambda: kept.append({n: p.grad.clone() for n, p in run.model.named_parameters()})
    totals = [train.policy_step(run, batches)]
    monkeypatch.setattr(policy, "row_hidden", poisoned)
    totals.append(train.policy_step(run, batches))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6) and totals[0]["kl_text"] > 0
    for name, gradient in kept[0].items():
        assert (gradient - kept[1][name]).abs().max() <= 1e-6 * gradient.abs().max(), name


def predicting(group: Group) -> torch.Tensor:
    """Of a group alone in a row: the states from which a sampled token follows, bool [1 + R]."""
    found = [torch.ones(1, dtype=torch.bool)]
    for episode in group.responses:
        sampled = []
        for turn in episode.turns:
            sampled += [True] * len(turn.ids) + [False] * (len(turn.observation.prompt) if turn.reply else 0)
        found.append(torch.tensor(sampled[1:], dtype=torch.bool))
    return torch.cat(found)


OPTIONS = [
    ["--train_vision", "false", "--kl", "none", "--mask_truncated", "--max_tokens", "12"],
    ["--updates_per_rollout", "2", "--clip_low", "0.2", "--clip_high", "0.27", "--normalise", "token"],
    ["--gradient_checkpointing", "--mixed_precision=bf16", "--template=videozoomer", "--state_duration"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_with_episodes(small_recipe, tmp_path, options):
    train.main(["--config", str(small_recipe), "--steps", "1", "--group_size", "2", *options])
    (row,) = read_metrics(tmp_path / "run")
    assert all(math.isfinite(value) for value in row.values())


def session(view: Callable) -> SimpleNamespace:
    """One that reads videos like this."""
    return SimpleNamespace(reading=SimpleNamespace(view=view), phase=lambda name: contextlib.nullcontext())


def epochs(sets: list[DataSet]) -> Epochs:
    return Epochs(sets, partial(generator, 0))


def test_groups_without_variance_are_redrawn_within_a_bound(samples, config, monkeypatch):
    """Rewards by sample: those of "flat" ones are equal, all others differ."""
    config = replace(config, max_redraws=2, group_size=2)
    run = SimpleNamespace(config=config, accelerator=Accelerator(cpu=True))
    flat = {sample.id for sample in samples[:6]}
    asked = []

    def collect(run, session, step, drawn):
        asked.append([d.view.sample.id for d in drawn])
        return [group_of(d.view.sample) for d in drawn]

    def group_of(sample):
        turn = SimpleNamespace(text="", offsets=[(0, 0)], ids=torch.tensor([1]), observations=[])
        return Group(SimpleNamespace(sample=sample, draw=(0, 0)), None, [turn, turn])

    def facets(group, config):
        return {"accuracy": [0.0, float(group.view.sample.id not in flat)]}

    def score(groups):
        for group in groups:
            group.rewards = facets(group, config)
            group.advantages = credit(group, config)

    monkeypatch.setattr(train, "collect", collect)
    monkeypatch.setattr(train, "facets", facets)
    reader = session(lambda candidates, *_: SimpleNamespace(view=SimpleNamespace(sample=candidates[0])))
    for first in (samples[:3] + samples[8:10], samples[8:10]):
        groups = list(map(group_of, first))
        score(groups)
        asked.clear()
        count = train.redraw(run, reader, epochs([DataSet(samples)]), 0, groups)
        assert count == sum(map(len, asked)) and len(asked) <= 2
        assert [g.view.sample.id for g in groups[-2:]] == [s.id for s in samples[8:10]]  # those with variance stay
        assert len({i for ids in asked for i in ids} | {s.id for s in first}) == len(first) + count  # nobody twice
        if not asked:
            assert first == samples[8:10]
    flat |= {sample.id for sample in samples}
    groups = list(map(group_of, samples[:2]))
    score(groups)
    asked.clear()
    assert train.redraw(run, reader, epochs([DataSet(samples)]), 0, groups) == 4 and len(asked) == 2
    left = groups[0]
    assert not MicroBatch.of([left], run.config).mask.any()  # no part in the loss
    assert MicroBatch.of([left], replace(run.config, max_redraws=0)).mask.all()


def flat_group(sample) -> SimpleNamespace:
    return SimpleNamespace(view=SimpleNamespace(sample=sample, draw=(7, 0)), advantages=torch.zeros(1))


def test_two_processes_redraw_different_samples(samples, config, monkeypatch):
    """Each knows what the other has; none of that is drawn, nor by both the same."""
    asked = []

    def collect(run, session, step, drawn):
        asked.append({sample.id for sample in drawn})
        raise StopIteration  # seen enough

    monkeypatch.setattr(train, "collect", collect)
    reader = session(lambda candidates, *_: candidates[0])
    all_names = [(sample.video, sample.id) for sample in samples[:6]]
    monkeypatch.setattr(train, "gather_object", lambda names: all_names)
    for rank in (0, 1):
        groups = [flat_group(sample) for sample in samples[3 * rank :][:3]]
        alone = SimpleNamespace(process_index=rank, num_processes=2, device="cpu", reduce=lambda found, how: found)
        run = SimpleNamespace(config=replace(config, max_redraws=1), accelerator=alone)
        with pytest.raises(StopIteration):
            train.redraw(run, reader, epochs([DataSet(samples)]), 0, groups)
    one, other = asked
    assert len(one) == len(other) == 3 and not one & other and not (one | other) & {id for _, id in all_names}


def test_redraws_follow_the_weights_of_a_mixture_and_have_spares(samples, config, monkeypatch):
    redrawn, ids = [], [sample.id for sample in samples[:2]]

    def collect(run, session, step, drawn):
        redrawn.extend(candidates[0] for candidates in drawn)
        raise StopIteration

    def view(candidates, draw, config):
        assert draw == (7, 1)  # the place of what is replaced, and the attempt
        assert set(ids) <= {sample.id for sample in candidates}  # should it come to that
        return candidates

    monkeypatch.setattr(train, "collect", collect)
    reader = session(view)
    groups = [flat_group(samples[0])]
    run = SimpleNamespace(config=replace(config, max_redraws=1), accelerator=Accelerator(cpu=True))
    sets = [DataSet(samples[:2], weight=4), DataSet(samples[2:], weight=1 / len(samples[2:]))]
    for step in range(60):
        with pytest.raises(StopIteration):
            train.redraw(run, reader, epochs(sets), step, groups)
    often = sum(sample.id == samples[1].id for sample in redrawn)  # 4 of 5 that are left
    assert samples[0] not in redrawn and 40 < often < 58


def test_a_step_stopped_while_it_redraws_counts_once(small_recipe, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped(15)

    monkeypatch.setattr(train, "redraw", stopped)
    with pytest.raises(Stopped):
        train.main(["--config", str(small_recipe), "--max_redraws", "1"])
    progress = json.loads((tmp_path / "run" / "state" / "step.json").read_text())
    assert progress == {"step": 0, "drawn": 0, "failures": 0, "updates": 0}


ONE_FLAT = """
import os
import train

def facets(group, config):
    varied = float(os.environ["RANK"])
    return dict.fromkeys(("format", "accuracy", "tool"), [varied] + [0.0] * (config.group_size - 1))

train.facets = facets
main = train.main
"""


@pytest.mark.processes
def test_a_process_with_nothing_to_redraw_waits_for_the_other(small_recipe, tmp_path, monkeypatch):
    """With shards, whose weights both must gather: every group of process 0 is flat, none of process 1."""
    (tmp_path / "one_flat.py").write_text(ONE_FLAT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SCRIPT", "one_flat")
    options = ["--max_redraws", "2", "--updates_per_rollout", "2", "--group_size", "2"]
    in_two(tmp_path / "errors", "--config", small_recipe, *options, shards=True)
    rows = read_metrics(tmp_path / "run")
    assert [row["redrawn"] for row in rows] == [0.5, 0.5]  # 2 of 4 groups, twice
    assert [row["zero_variance_fraction"] for row in rows] == [0.5, 0.5]


# ---------------------------------------------------------------- the agent


def test_the_agents_result_is_its_episode(samples, small, loaded):
    model, vocabulary = loaded
    agent = Agent(model, vocabulary, small)
    asked = ((sample.id, infer.STRATEGIES["agent"](agent, sample, infer.Settings())) for sample in samples[:6])
    results = {name: result for name, result, _ in side_by_side(asked, 8)}
    for group in roll_out_episodes(model, views_of(samples, small, 6), small, vocabulary, None):
        result, [episode] = results[group.view.sample.id], group.responses
        assert result.answer == episode.answer and [look.text for look in result.looks] == [
            t.text for t in episode.turns
        ]
        assert result.spans == ([look.part[0] for look in result.looks if look.part] or None)
        assert result.frames == len(group.view.clip.times) + sum(len(clip.times) for clip in episode.clips)
        videos = group.prompt.videos + [v for o in episode.observations for v in o.prompt.videos]
        assert result.visual_tokens == sum(video.n_tokens for video in videos)
        asked = [turn.reply.call and [turn.reply.call.span] for turn in episode.turns[:-1]]
        assert [look.part for look in result.looks] == [None, *asked]
        assert result.confidence == 0 or set(result.letters) >= {result.answer}
        assert result.flops > 0 and all(bool(look.refusal) == (look.part is None) for look in result.looks[1:])


def test_a_turn_costs_what_is_new(loaded, samples, small):
    """Turns that go on from a cache add up to one pass over everything, and the last layer's output where one ended."""
    model, _ = loaded
    clip = view_video(samples[0], small).clip
    none = replace(clip, frames=clip.frames[:0], times=[])
    whole = forward_flops(model, none, 100, 20)
    parts = forward_flops(model, none, 60, 1) + forward_flops(model, none, 40, 20, 60)
    last = model.model.language_model.layers[-1]
    end = 2 * (weights(model.lm_head) + asked_weights(last)) + 4 * 60 * last.self_attn.q_proj.out_features
    assert parts - end == pytest.approx(whole, rel=1e-9)
    apart = forward_flops(model, clip, 100, 1, 0, apart=True) - forward_flops(model, none, 100, 1)
    single = forward_flops(model, replace(clip, frames=clip.frames[:1]), 100, 1)
    assert apart == pytest.approx(len(clip.times) * (single - forward_flops(model, none, 100, 1)))


def test_the_agent_answers_a_data_set_and_a_video(small_recipe, small_world, samples, player, tmp_path, capsys):
    common = ["--config", str(small_recipe), "--model", str(player), "--strategy", "agent"]
    infer.main([*common, "--test_data", str(small_world["test"]), "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["frames"] >= 5 and row["visual_tokens"] > 0 and row["passes"] >= 1 for row in rows)
    out = capsys.readouterr().out
    assert "frames," in out and "visual_tokens" in out and "accuracy" in out
    page = tmp_path / "page.html"
    own = ["--video", samples[0].video, "--question", samples[0].question, "--options", *samples[0].options]
    infer.main([*common, *own, "--out", str(page)])
    assert "The whole video, at a glance" in page.read_text() and "frames," in capsys.readouterr().out


def test_the_agent_needs_its_protocol(recipe, small_world):
    with pytest.raises(ConfigError, match="agent needs a template of several turns, videozoomer or world_zoomer, not"):
        infer.main(["--config", str(recipe), "--strategy", "agent", "--test_data", str(small_world["test"])])


def test_its_protocol_needs_the_agent(small_recipe, small_world):
    with pytest.raises(ConfigError, match="world_zoomer is the template of --strategy agent, not of coarse-to-fine"):
        infer.main(["--config", str(small_recipe), "--test_data", str(small_world["test"])])


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frames": 0}, "needs max_frames"),
        ({"max_frames": 128}, "leave some of total_frames = 128"),
        ({"frames_per_call": 65}, "frames_per_call = 65 of at least v_min = 4"),
        ({"min_frames": 30}, "min_frames = 30 must be at most max_frames = 20"),
        ({"max_turns": 0}, "max_turns must be positive"),
        ({"eval_controls": True}, "it needs eval_controls = false"),
        ({"template": "world", "tokenadv": "code", "tool_weight": 0.5}, "weights of rewards need tokenadv = off"),
    ],
)
def test_limits_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        configuration.check(replace(config, **changes))


@pytest.mark.parametrize(
    "option", [["--tokenadv", "paper", "--tool_weight", "1"], ["--zoom_reward", "true"]], ids=" ".join
)
def test_rewards_that_episodes_cannot_have_are_refused(small_recipe, option):
    with pytest.raises(ConfigError, match="it needs tokenadv = off and zoom_reward = false"):
        train.main(["--config", str(small_recipe), *option])
