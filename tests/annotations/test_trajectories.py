"""Trajectories: the layouts that are read, the rows that are refused, and what the policy gets to see and to learn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import config as configuration
from annotations import trajectories
from annotations.rows import DataError, Row
from episodes import ClipEnvironment, messages, replay
from media.file import VideoError
from policy import build_prompt
from prompts import next_turn
from rollout import coarse_prompt, view_video
from tests.numbered import get

AGENT = ["--template", "world_zoomer", "--max_frames", "20", "--zoom_budget", "256"]
CALL = '<think>closer</think><video_zoom>{"segment": [3, 5], "fps": 2}</video_zoom>'
ANSWER = "<think>seen</think><answer>B</answer>"


@pytest.fixture
def config(recipe):
    return configuration.parse(["--config", str(recipe), *AGENT])


def row(**fields) -> Row:
    return Row("x.jsonl", "row 3", json.loads(json.dumps(fields)))


def same(one, other) -> bool:
    """Two prompts with the same ids, positions and pixels."""
    pixels = [torch.equal(a.patches, b.patches) for a, b in zip(one.videos, other.videos, strict=True)]
    return torch.equal(one.ids, other.ids) and torch.equal(one.positions, other.positions) and all(pixels)


# ---------------------------------------------------------------- as the policy sees them


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_frames": 7, "question_first": True}, {"system_prompt": "Be brief."}, {"paired_frames": True}],
    ids=str,
)
def test_an_episode_written_as_messages_gives_what_the_rollout_gave(samples, config, vocabulary, model64, changes):
    for name, value in changes.items():
        setattr(config, name, value)
    view = view_video(samples[0], config)
    said = [CALL, CALL.replace("5]", "50]"), CALL.replace("3,", "2,"), ANSWER]
    episode = replay(ClipEnvironment(view, config), said, vocabulary)
    prompt = coarse_prompt(view, config, vocabulary, model64.config)
    given = row(messages=messages(episode, view, config))
    example = trajectories.build_example(trajectories.read_trajectory(given), config, vocabulary, model64.config)
    assert same(example.prompt, prompt) and example.prompt.next_position == prompt.next_position
    assert torch.equal(example.ids, torch.cat([turn.ids for turn in episode.turns])) and example.weight.all()
    after, position = 0, prompt.next_position
    for ours, turn in zip(example.observations, episode.turns, strict=False):
        after, position = after + len(turn.ids), position + len(turn.ids)
        ids = vocabulary.ids(next_turn(turn.reply.text, "video_zoom" not in turn.text))
        theirs = build_prompt(ids, turn.reply.videos, model64.config, start=position)
        assert ours.after == after and same(ours.prompt, theirs)
        position = theirs.next_position
    assert len(example.observations) == 3


def test_frames_of_a_file_that_holds_fewer_keep_their_size(folder, samples, config, vocabulary, model64):
    config.zoom_budget, config.zoom_v_max, config.frames_per_call = 600, 64, 60
    view = view_video(replace(samples[0], video=str(get(folder, "vfr.mp4"))), config)
    asked = json.dumps({"segment": [0, view.info.duration], "fps": view.info.fps})
    episode = replay(ClipEnvironment(view, config), [f"<video_zoom>{asked}</video_zoom>", ANSWER], vocabulary)
    shown, said = episode.turns[0].reply, messages(episode, view, config)
    assert len(shown.videos) < shown.planned == said[2]["planned"]
    found = trajectories.read_trajectory(row(messages=said))
    _, frames = trajectories.load_shown(found, config)
    assert [video.patches.shape for video in frames] == [video.patches.shape for video in shown.videos]
    crowded = replace(found.messages[2], planned=4 * shown.planned)
    _, smaller = trajectories.load_shown(replace(found, messages=(*found.messages[:2], crowded)), config)
    assert len(smaller[0].patches) < len(frames[0].patches)


def test_turns_of_weight_0_are_read_only(samples, config, vocabulary, model64):
    view = view_video(samples[0], config)
    history = messages(replay(ClipEnvironment(view, config), [CALL, ANSWER], vocabulary), view, config)
    history[1]["weight"] = 0
    example = trajectories.build_example(
        trajectories.read_trajectory(row(messages=history)), config, vocabulary, model64.config
    )
    n = len(vocabulary.ids(CALL))
    assert not example.weight[:n].any() and example.weight[n:].all()
    assert vocabulary.tokenizer.decode(example.ids[n:]) == ANSWER + "<|im_end|>"


def test_whole_files_are_shown_as_the_coarse_pass_and_as_a_call(samples, config, vocabulary, model64):
    video = samples[0].video
    told = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": CALL}]
    told += [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": ANSWER}]
    found = trajectories.read_trajectory(row(conversations=told, videos=[video, video], system="Look."))
    example = trajectories.build_example(found, config, vocabulary, model64.config)
    view = view_video(samples[0], config)
    assert torch.equal(example.prompt.videos[0].patches, view.video.patches)
    assert vocabulary.tokenizer.decode(example.prompt.ids).startswith("<|im_start|>system\nLook.<|im_end|>\n")
    [clip] = example.observations[0].prompt.videos
    assert clip.grid[0] == config.frames_per_call // 2 and clip.step == pytest.approx(20 / config.frames_per_call)


# ---------------------------------------------------------------- layouts


def test_the_layouts_mean_the_same(tmp_path):
    said = ["<video>Q", CALL, "3s<video>4s<video>", ANSWER]
    clips = [{"video": "a.mp4", "times": times, "step": 1} for times in ([0, 1], [3], [4])]
    roles = ["user", "assistant"] * 2
    ours = [{"role": r, "text": t} for r, t in zip(roles, said, strict=True)]
    ours[0]["videos"], ours[2]["videos"] = clips[:1], clips[1:]
    llama = {"messages": [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)], "videos": clips}
    llama["messages"].insert(0, {"role": "system", "content": "Look."})
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": names[r], "value": t} for r, t in zip(roles, said, strict=True)]}
    sharegpt |= {"videos": clips, "system": "Look."}
    lines = [{"messages": ours, "system": "Look."}, llama, sharegpt]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "a.json").write_text(json.dumps(lines))
    for name in ("a.jsonl", "a.json"):
        one, two, three = trajectories.load_trajectories(tmp_path / name, "root")
        assert one.messages == two.messages == three.messages and one.system == two.system == three.system == "Look."
        assert one.messages[2].videos[1] == trajectories.TrajectoryClip("root/a.mp4", (4.0,), 1.0)


def test_lists_of_contents_and_qwens_layout_mean_the_same(tmp_path):
    words = ["<video>Q", CALL, "<video>3s", ANSWER]
    roles = ["user", "assistant"] * 2
    plain = {"messages": [{"role": r, "content": t} for r, t in zip(roles, words, strict=True)]}
    plain |= {"videos": ["a.mp4", "b.mp4"], "images": [], "system": None, "tools": None}
    contents = [
        [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Q"}],
        [{"type": "text", "text": CALL}],
        [{"type": "video_url", "video_url": {"url": "file://b.mp4"}}, {"type": "text", "text": "3s"}],
        ANSWER,
    ]
    listed = {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}
    listed |= {"images": None, "videos": []}
    names = {"user": "human", "assistant": "gpt"}
    qwen = {"conversations": [{"from": names[r], "value": t} for r, t in zip(roles, words, strict=True)]}
    qwen |= {"id": "1", "video": ["a.mp4", "b.mp4"]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [plain, listed, qwen]}))
    one, two, three = trajectories.load_trajectories(path, "root")
    assert one.messages == two.messages == three.messages and one.system is two.system is three.system is None
    assert [clip.video for message in one.messages for clip in message.videos] == ["root/a.mp4", "root/b.mp4"]
    single = row(video="a.mp4", conversations=[{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}])
    assert trajectories.read_trajectory(single).messages[0].videos == (trajectories.TrajectoryClip("a.mp4"),)


def test_a_loss_of_false_is_a_weight_of_0():
    def weights(*fields: dict) -> list[float]:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}] * len(fields)
        messages = [turn | (fields[k // 2] if k % 2 else {}) for k, turn in enumerate(turns)]
        found = trajectories.read_trajectory(row(messages=messages))
        return [message.weight for message in found.messages[1::2]]

    fields = [{"loss": False}, {"loss": True}, {"loss": None}, {"weight": None}, {}, {"loss": True, "weight": 0}]
    assert weights(*fields) == [0, 1, 1, 1, 1, 0]
    with pytest.raises(DataError, match="every turn of the assistant has weight 0"):
        weights({"loss": False})


GOOD = [{"role": "user", "text": "Q"}, {"role": "assistant", "text": "A"}]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "row 3, field 'messages': is missing"),
        ({"messages": []}, "row 3, field 'messages': user and assistant must take turns"),
        ({"messages": GOOD[:1]}, "must take turns, and the assistant ends: user"),
        ({"messages": GOOD + GOOD[:1]}, "must take turns"),
        ({"messages": [GOOD[1], GOOD[0]]}, "must take turns"),
        ({"messages": [GOOD[0], {"role": "tool", "text": "A"}]}, "messages[1], field 'role': 'tool' is none of"),
        ({"messages": [GOOD[0], {"role": "assistant"}]}, "messages[1], field 'text': is missing"),
        ({"messages": [GOOD[0], "A"]}, "messages[1]: expected a JSON object"),
        ({"messages": [GOOD[0], {**GOOD[1], "weight": 2}]}, "messages[1], field 'weight': expected 0 or 1"),
        ({"messages": [GOOD[0], {**GOOD[1], "weight": 0}]}, "every turn of the assistant has weight 0"),
        ({"messages": [{"role": "user", "text": "<video>Q"}, GOOD[1]]}, "1 <video> in the text, but 0 clips"),
        ({"messages": GOOD, "videos": ["a.mp4"]}, "row 3, field 'videos': 1 clips more than <video>"),
        ({"messages": GOOD, "images": ["a.jpg"]}, "row 3, field 'images': frames as images are not read"),
        ({"messages": GOOD, "videos": [{"video": "a.mp4", "times": [2, 1]}]}, "field 'times': expected rising seconds"),
        ({"messages": GOOD, "videos": [{"video": "a.mp4", "times": []}]}, "videos[0], field 'times': expected rising"),
        ({"messages": GOOD, "videos": [{"video": "a", "times": [1], "step": 1e300}]}, "'step': expected at most 86400"),
        ({"messages": GOOD, "videos": [{"times": [1]}]}, "videos[0], field 'video': is missing"),
        ({"messages": GOOD, "videos": [{"video": "a", "times": [10**400]}]}, "field 'times': expected rising seconds"),
        ({"messages": GOOD, "videos": ["http://x/a.mp4"]}, "videos[0], field 'video': expected the path of a video"),
        ({"messages": GOOD, "videos": [""]}, "videos[0], field 'video': expected the path of a video"),
        ({"messages": [GOOD[0], {**GOOD[1], "loss": 0}]}, "messages[1], field 'loss': expected true or false, got 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, GOOD[1]]}, "content[0], field 'type'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, GOOD[1]]}, "content[0], field 'text'"),
        ({"messages": [{"role": "user", "content": ["Q"]}, GOOD[1]]}, "content[0]: expected a JSON object, got str"),
        ({"messages": [{"role": "user", "text": "<|video_pad|>"}, GOOD[1]]}, "the user's text has the special token"),
        ({"messages": [GOOD[0], {"role": "assistant", "text": "\ud800"}]}, "the assistant's text has half a character"),
        ({"messages": GOOD * 9999 + GOOD[:1]}, "must take turns, and the assistant ends: user, assistant"),
        ({"messages": [{"role": "x" * 9999, "text": "Q"}, GOOD[1]]}, "messages[0], field 'role': 'xxx"),
        ({"messages": GOOD, "videos": [{"video": "a.mp4", "times": [2, 1] * 9999}]}, "'times': expected rising seco"),
        ({"messages": [{**GOOD[0], "planned": -5}, GOOD[1]]}, "'planned': expected 0 to 10000 frames, got -5"),
        ({"messages": [{**GOOD[0], "planned": 10**400}, GOOD[1]]}, "'planned': expected 0 to 10000 frames, got 1000"),
        ({"messages": GOOD, "system": "<|im_start|>"}, "field 'system': has the special token <|im_start|>"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(fields, problem):
    with pytest.raises(DataError) as error:
        trajectories.read_trajectory(row(**fields))
    assert str(error.value).startswith("x.jsonl: row 3") and problem in str(error.value)
    assert len(str(error.value)) < 400


def test_bad_files_are_named(tmp_path, samples, config, vocabulary, model64):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [}\n')
    with pytest.raises(DataError, match="row 1: not JSON"):
        trajectories.load_trajectories(path)

    def one(words: str, times: list[float], video: str = samples[0].video) -> trajectories.Trajectory:
        shown = [{"video": video, "times": times}]
        said = [{"role": "user", "text": "<video>Q", "videos": shown}, {"role": "assistant", "text": words}]
        path.write_text(json.dumps({"messages": said}) + "\n")
        return trajectories.load_trajectories(path)[0]

    with pytest.raises(DataError, match=r"row 1: the assistant's text has the special token <\|im_end\|>"):
        trajectories.build_example(one("A<|im_end|>", [1.0]), config, vocabulary, model64.config)
    with pytest.raises(DataError, match=r"row 1: a turn ends with </video_zoom>, but here 'and so on' follows"):
        trajectories.build_example(one(CALL + " and so on", [1.0]), config, vocabulary, model64.config)
    with pytest.raises(VideoError, match="the trajectory shows 21 s of a video of 20"):
        trajectories.build_example(one("A", [21.0]), config, vocabulary, model64.config)
    with pytest.raises(DataError, match=r"row 1: there is no video gone.mp4; check video_root"):
        trajectories.check_files([one("A", [1.0], "gone.mp4")])
