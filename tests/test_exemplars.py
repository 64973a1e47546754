"""Exemplars and reflection: who plays, what is kept, and runs that go on where they were."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import completion, run_in_two_processes

import config as configuration
import exemplars
import prompts
from annotations import trajectories
from annotations.rows import DataError, Row
from config import ConfigError
from episodes import ClipEnvironment, replay
from exemplars import Dialogue, finish_episode, mixed, reflect
from harness.chat import ChatError, Reply, RequestError
from harness.chat import Shown as Frames
from rollout import Response, view_video
from world import benchmark, lessons
from world.oracle import Oracle

AGENT = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256", "--frames_per_call", "10"]
ANSWER = "<think>seen</think><answer>{}</answer>"


def call(start: float, end: float, fps: float) -> str:
    return f'<think>closer</think><video_zoom>{{"segment": [{start}, {end}], "fps": {fps}}}</video_zoom>'


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), *AGENT])


@pytest.fixture
def scenes(samples, config) -> dict[str, ClipEnvironment]:
    """A scene of each kind of question."""
    return {sample.kind: ClipEnvironment(view_video(sample, config), config) for sample in samples}


class Scripted:
    """A chat that says these texts, or raises these errors, and notes what it was asked."""

    def __init__(self, *replies: str | Exception):
        self.replies, self.asked, self.name = list(replies), [], "scripted"

    def reply(self, messages) -> Reply:
        self.asked.append(messages)
        said = self.replies.pop(0)
        if isinstance(said, Exception):
            raise said
        return Reply(said)


# ---------------------------------------------------------------- the oracle


def test_the_oracle_sees_all_of_the_evidence_and_no_more_then_answers(scenes):
    assert set(scenes) == set(benchmark.KINDS)
    for kind, scene in scenes.items():
        episode, sample = Response(), scene.view.sample
        assert finish_episode(Oracle(), scene, episode) is None
        assert episode.answer == sample.answer and len(episode.clips) == episode.calls
        assert (episode.calls == 0) == (kind == "coarse")
        shown = [time for clip in episode.clips for time in clip.times]
        if kind in ("blink", "pair"):
            for start, end in sample.evidence:
                assert set(torch.arange(start, end, 0.5).tolist()) <= set(shown)
        if len(episode.clips) == len(sample.evidence):
            assert all(any(start <= time < end for start, end in sample.evidence) for time in shown)


def test_the_oracle_makes_one_call_for_two_events_where_its_frames_are_enough(scenes):
    scene = scenes["pair"]
    sample = scene.view.sample
    (first, _), (_, last) = sample.evidence[0], sample.evidence[-1]
    for most, calls in (((last - first) * 2, 1), ((last - first) * 2 - 1, 2)):
        limited = ClipEnvironment(
            scene.view, replace(scene.config, frames_per_call=int(most), total_frames=200, zoom_budget=9999)
        )
        episode = Response()
        assert finish_episode(Oracle(), limited, episode) is None and episode.calls == calls
    tight = ClipEnvironment(scene.view, replace(scene.config, frames_per_call=2))
    assert finish_episode(Oracle(), tight, Response()) == "no calls or frames left for the evidence"


def test_the_oracle_says_what_each_frame_shows(scenes, vocabulary):
    def said(kind: str, *calls: str, wrong: str | None = "A") -> str:
        return Oracle().turn(scenes[kind], replay(scenes[kind], list(calls), vocabulary), wrong)

    def colour(kind: str) -> str:
        return lessons.asked_colour(scenes[kind].view.sample)

    glimpses = {kind: colour(kind) for kind in ("blink", "pair")}
    glimpses |= {"coarse": lessons.asked_pattern(scenes["coarse"].view.sample), "fine": "none"}
    for kind, glimpse in glimpses.items():
        times = lessons.written_spans(scenes[kind].view.sample.evidence)
        assert said(kind, wrong=None).startswith(f"<think>{colour(kind)}<time>{times}</time> {glimpse}</think>")

    (start, end), name = scenes["blink"].view.sample.evidence[0], colour("blink")
    elsewhere = start - 2 if start >= 2 else end + 1
    missed = said("blink", call(elsewhere, elsewhere + 1, 1))
    assert missed.startswith(f"<think>{name} none<time>({start:.1f},{end:.1f})</time></think><video_zoom>")
    grazed = said("blink", call(start, start + 0.25, 1))
    assert grazed.startswith(f"<think>{name} {name}<time>({start:.1f},{end:.1f})</time></think><video_zoom>")
    assert said("blink", call(0, 99, 1)).startswith(f"<think>{name}<time>")  # no clip
    for fps in (2, 4):  # however often a second is shown
        halves = [(start, start + 1), (start + 1, end)]
        turns = [said("blink", *(call(*half, fps) for half in halves[:n])) for n in (1, 2)]
        words = " ".join(prompts.parse_think(turn).split("<time>")[0].split(maxsplit=1)[1] for turn in turns).split()
        assert len(words) == (end - start) * fps and set(words) <= {name, *benchmark.COUNTS}
        most = max((benchmark.COUNTS.index(word) for word in words if word != name), default=0)
        assert "ABCD"[most] == scenes["blink"].view.sample.answer

    coarse = scenes["coarse"].view.sample
    assert prompts.parse_answer(said("coarse", wrong=None)) == coarse.answer
    start, end = coarse.evidence[0]
    assert f'{{"segment": [{start}, {end}], "fps": 1}}' in said("coarse")  # what was wrong at once needs a closer look
    words = " ".join([colour("coarse"), *int(end - start) * [glimpses["coarse"]]])
    assert said("coarse", call(start, end, 1)) == f"<think>{words}</think><answer>{coarse.answer}</answer>"


# ---------------------------------------------------------------- a chat model


def test_a_chat_model_plays_by_the_policys_prompt_and_sees_frames_with_their_times(scenes):
    scene = scenes["fine"]
    right = ANSWER.format(scene.view.sample.answer)
    chat = Scripted(call(3, 4, 2) + " and then ...", f"\n{right}\n")
    episode = Response()
    assert finish_episode(Dialogue(chat), scene, episode) is None
    assert [turn.text for turn in episode.turns] == [call(3, 4, 2), right]
    system, prompt, said, shown = chat.asked[1]
    assert [m.role for m in chat.asked[1]] == ["system", "user", "assistant", "user"]
    assert "wrong" not in system.parts[0] and said.parts == (call(3, 4, 2),)
    glance = [part for part in prompt.parts if isinstance(part, Frames)]
    assert [frames.clip.times for frames in glance] == [[time] for time in scene.view.clip.times]
    assert torch.equal(torch.cat([frames.clip.frames for frames in glance]), scene.view.clip.frames)
    texts = [part for part in prompt.parts if isinstance(part, str)]
    assert texts[:2] == ["0s", "1s"] and scene.view.sample.question in texts[-1]
    assert [part if isinstance(part, str) else part.clip.times for part in shown.parts] == ["3s", [3.0], "3.5s", [3.5]]


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([ANSWER.format("Z")], "wrong answer: Z"),
        (["I do not know."], "no answer"),
        (["<answer>{}</answer>"], "not the template's format"),
        (["<think>a</think><answer>{}</answer><|im_end|>"], "a special token in the text"),
        ([call(0, 99, 1), ANSWER], None),
        ([call(1, 2, 1)] * 5, "no answer"),
        ([RequestError("too long")], "request refused: too long"),
    ],
)
def test_what_is_not_right_is_dropped_with_a_reason(scenes, replies, reason):
    scene = scenes["fine"]
    said = [r.replace("{}", scene.view.sample.answer) if isinstance(r, str) else r for r in replies]
    assert finish_episode(Dialogue(Scripted(*said)), scene, Response()) == reason


def test_an_endpoint_plays_a_data_set(arguments, samples, server, tmp_path, monkeypatch):
    """It looks at 1 to 2 s, then says A; so those questions are kept whose answer that is."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    looks, knows = (completion(words) for words in (call(1, 2, 1), ANSWER.format("A")))
    server.answers += [(200, body, {}) for _ in samples for body in (looks, knows)]
    asked = ["--expert", "endpoint", "--endpoint", server.url, "--judge_model", "m", "--workers", "1"]
    exemplars.main(["play", *arguments, *asked, "--out", str(tmp_path)])
    right = [sample.id for sample in samples if sample.answer == "A"]
    kept = lines(tmp_path / "train.jsonl")
    assert [row["id"] for row in kept] == right and 0 < len(right) < len(samples)
    assert all([m["text"] for m in row["messages"][1::2]] == [call(1, 2, 1), ANSWER.format("A")] for row in kept)
    assert len(server.bodies) == 2 * len(samples)
    assert {body["max_tokens"] for body in server.bodies} == {configuration.parse(arguments).max_tokens}
    server.bodies.clear()
    exemplars.main(["play", *arguments, *asked, "--out", str(tmp_path)])
    assert not server.bodies  # what has a line is not played again


# ---------------------------------------------------------------- reflection


def test_reflection_keeps_the_failed_turns_without_their_last_message(scenes, vocabulary):
    scene = scenes["fine"]
    sample = scene.view.sample
    wrong = "A" if sample.answer != "A" else "B"
    right = replay(scene, [call(1, 2, 1), ANSWER.format(sample.answer)], vocabulary)
    short = replay(scene, [ANSWER.format(wrong)], vocabulary)
    long = replay(scene, [call(1, 2, 1), call(0, 99, 1), ANSWER.format(wrong)], vocabulary)
    chat = Scripted(call(5, 6, 1), ANSWER.format(sample.answer))
    episode, n, reason = reflect(Dialogue(chat), scene, [right, long, short])
    assert reason is None and n == 2
    expected = [call(1, 2, 1), call(0, 99, 1), call(5, 6, 1), ANSWER.format(sample.answer)]
    assert [turn.text for turn in episode.turns] == expected and len(long.turns) == 3
    assert f"(wrong answer: {wrong})" in chat.asked[0][0].parts[0]
    for learn, weights in ((False, [0, 0, 1, 1]), (True, [1, 1, 1, 1])):
        line = exemplars.episode_row(episode, n, reason, scene.view, scene.config, learn)
        found = trajectories.read_trajectory(Row("x", "row 1", json.loads(json.dumps(line))))
        assert [message.weight for message in found.messages[1::2]] == weights
        assert line["failed_turns"] == 2 and line["clips"] == 2 and line["calls"] == 3
    assert reflect(Dialogue(chat), scene, [right])[2] == "no attempt failed"
    chat = Scripted(ANSWER.format(sample.answer))
    episode, n, reason = reflect(Dialogue(chat), scene, [right, short])
    assert (n, reason, len(episode.turns)) == (0, None, 1)
    chat = Scripted(ANSWER.format(sample.answer))
    assert reflect(Dialogue(chat), scene, [short, right, long])[1] == 2  # of which there are turns to keep
    thoughtless = replay(scene, [f"<answer>{sample.answer}</answer>"], vocabulary)
    endless = replay(ClipEnvironment(scene.view, replace(scene.config, max_turns=1)), [call(1, 2, 1)], vocabulary)
    for attempt, told in ((thoughtless, "(not the template's format)"), (endless, "(no answer)")):
        chat = Scripted(ANSWER.format(sample.answer))
        assert reflect(Dialogue(chat), scene, [attempt])[2] is None
        assert told in chat.asked[0][0].parts[0] and "wrong" not in chat.asked[0][0].parts[0]


def test_reflections_are_the_stated_share():
    many, few = [{"id": k} for k in range(60)], [{"id": -k} for k in range(1, 101)]
    for share, n in ((0.25, 20), (0.5, 60), (0.9, 100)):
        rows = mixed(many, few, share, seed=0)
        assert rows[:60] == many and len(rows) == 60 + n == len({row["id"] for row in rows})
    assert mixed(many, few, 0.25, 0) == mixed(many, few, 0.25, 0) != mixed(many, few, 0.25, 1)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def arguments(recipe, small_world) -> list[str]:
    return ["--config", str(recipe), *AGENT, "--train_data", str(small_world["train"])]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_episodes_are_a_training_file_and_a_stopped_run_goes_on(arguments, samples, config, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    exemplars.main(["play", *arguments, "--out", str(whole)])
    assert [line["id"] for line in lines(whole / "train.jsonl")] == [sample.id for sample in samples]
    found = trajectories.load_trajectories(whole / "train.jsonl", config.video_root)
    trajectories.check_files(found)
    shown = [
        clip for row in lines(whole / "train.jsonl") for said in row["messages"] for clip in said.get("videos", [])
    ]
    assert {clip["video"] for clip in shown} == {f"train/{k:05d}.mp4" for k in range(6)}  # without video_root

    turn, played = Oracle.turn, []

    def noted(self, scene, episode, wrong):
        if not episode.turns:
            played.append(scene.view.sample.id)
        if len(played) > limit:
            raise ChatError("the endpoint is gone")
        return turn(self, scene, episode, wrong)

    monkeypatch.setattr(Oracle, "turn", noted)
    limit = 7
    with pytest.raises(ChatError):
        exemplars.main(["play", *arguments, "--out", str(part), "--workers", "1"])
    done = [line["id"] for line in lines(part / "episodes.jsonl")]
    assert 0 < len(done) < len(samples) and not (part / "train.jsonl").exists()
    with open(part / "episodes.jsonl", "a") as file:
        file.write('{"id": "half a li')
    limit, played[:] = 1000, []
    exemplars.main(["play", *arguments, "--out", str(part)])
    assert set(played) == {sample.id for sample in samples} - set(done)
    assert (part / "train.jsonl").read_text() == (whole / "train.jsonl").read_text()
    with pytest.raises(DataError, match=r"row 1, field 'made_with': max_calls was 4 and is 3 now; give another --out"):
        exemplars.main(["play", *arguments, "--max_calls", "3", "--out", str(part)])


def test_reflection_from_the_command_line(arguments, samples, tmp_path, monkeypatch):
    """The talker answers at once and badly; so what it rolls out is replaced by calls that lead nowhere."""
    exemplars.main(["play", *arguments, "--out", str(tmp_path / "play")])
    rolled = exemplars.roll_out

    def astray(model, views, config, words, step, **options):
        groups = rolled(model, views, config, words, step, **options)
        for group in groups:
            wrong = "ABCD"[("ABCD".index(group.view.sample.answer) + 1) % 4]
            group.responses = [
                replay(ClipEnvironment(group.view, config), [call(0, 99, 1), ANSWER.format(wrong)], words)
            ]
        return groups

    monkeypatch.setattr(exemplars, "roll_out", astray)
    given = ["--exemplars", str(tmp_path / "play" / "train.jsonl"), "--out", str(tmp_path / "reflect")]
    exemplars.main(["reflect", *arguments, *given, "--share", "0.25"])
    rows = lines(tmp_path / "reflect" / "train.jsonl")
    with pytest.raises(DataError, match="learn_failures was False and is True now"):
        exemplars.main(["reflect", *arguments, *given, "--learn_failures"])
    own = [row for row in rows if row["messages"][1].get("weight") == 0]
    assert len(rows) == len(samples) + len(own) and len(own) == round(len(samples) / 3)
    for row in own:
        assert "The video ends at 20.0 seconds." in row["messages"][2]["text"]
        assert "".join(m["text"] for m in row["messages"]).count("<answer>") == 1


@pytest.mark.processes
def test_two_processes_share_the_questions(arguments, samples, tmp_path):
    given = ["play", *arguments, "--out", str(tmp_path / "out")]
    asked = run_in_two_processes("exemplars", "identity", given, tmp_path)
    assert sorted(line["id"] for line in lines(tmp_path / "out" / "episodes.jsonl")) == sorted(s.id for s in samples)
    assert all(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "play or reflect?"),
        (["play", "--template", "world"], "template = world has no episodes; there are videozoomer, world_zoomer"),
        (["play", "--workers", "0"], "--workers 0 must be positive"),
        (["reflect"], "needs --exemplars"),
        (["play", "--exemplars", "x"], "needs --exemplars"),
        (["reflect", "--exemplars", "x", "--share", "1"], "--share 1.0 between 0 and 1"),
    ],
)
def test_commands_that_cannot_work_are_named(arguments, changes, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        exemplars.main([*changes[:1], *arguments, *changes[1:]])


def test_what_an_expert_needs_is_named(arguments, small_world, tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    for changes, message in (
        ({"kind": "other"}, "the oracle knows the questions of the built-in world only"),
        ({"question": "What is a <video>?"}, "<video> in the question would stand for a clip in a trajectory"),
    ):
        rows = [{**row, **changes} for row in lines(small_world["train"])]
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=rf"row 1 \(train-00000-0\): {message}"):
            exemplars.main(["play", *arguments, "--train_data", str(other), "--out", str(tmp_path / "a")])
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ChatError, match="no endpoint: give --endpoint URL"):
        exemplars.main(["play", *arguments, "--expert", "endpoint", "--out", str(tmp_path / "b")])
    with pytest.raises(DataError, match=r"gone.jsonl"):
        exemplars.main(["reflect", *arguments, "--exemplars", "gone.jsonl", "--out", str(tmp_path / "c")])
