"""curate.py: replies that cannot be used, uniqueness against the world's truth, and runs from mp4 files to a training
file beside a server that fails, processes that die and disks that fill up."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import exit_codes, loud_model, run_in_two_processes, serving
from PIL import Image

import config as configuration
import curate
import scenes
from annotations.rows import DataError
from annotations.samples import read_samples
from config import ConfigError
from curate import CurateError, NothingToAskError, ReplyError, Task, Viewer, ask, read_question, read_verdict
from harness import chat, journal
from harness.chat import ChatError, Message, Reply, RequestError
from harness.journal import JournalError
from scenes import SceneError
from world import films

ROOT = Path(__file__).resolve().parents[1]
GOOD = {"question": "What falls?", "options": ["a cup", "a hat"], "answer": "B", "clues": ["something falls"]}


@pytest.fixture(scope="session")
def long_world(tmp_path_factory) -> Path:
    """The rows of two long videos of seven scenes each."""
    return films.build_long(tmp_path_factory.mktemp("long"), "train", 2, n_scenes=7, workers=1)


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    for name in (chat.ADDRESS, chat.KEY):
        monkeypatch.delenv(name, raising=False)


def rows_of(path: Path) -> list[dict]:
    return [row.fields for row in journal.read(path)]


def without_order(path: Path) -> list[str]:
    return sorted(json.dumps(row) for row in rows_of(path))


class Script:
    """Says one thing after the other."""

    name = "script"

    def __init__(self, *says: str | Exception):
        self.says, self.asked = list(says), []

    def reply(self, messages) -> Reply:
        self.asked.append(messages)
        said = self.says.pop(0)
        if isinstance(said, Exception):
            raise said
        return Reply(said)


# ---------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (GOOD, GOOD),
        ({**GOOD, "answer": "(B)", "options": ["A. a cup", "B. a hat"]}, GOOD),
        ({**GOOD, "answer": "a hat", "question": " What falls? "}, GOOD),
    ],
)
def test_questions_that_can_be_used(reply, expected):
    for text in (json.dumps(reply), f"  {json.dumps(reply)}\n", f"```json\n{json.dumps(reply, indent=1)}\n```"):
        assert read_question(text) == expected


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "not a JSON object: ''"),
        ("I'm sorry, but I can't help with that.", "it refuses: \"I'm sorry"),
        ("Here you are: " + json.dumps(GOOD), "not a JSON object"),
        (json.dumps(GOOD)[:-1], "not a JSON object"),
        (json.dumps([GOOD]), "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        (curate.QUESTION, "repeats the request"),
        (curate.QUESTION[50:200].upper(), "repeats the request"),
        (json.dumps({**GOOD, "question": "..."}), "repeats the request"),
        (json.dumps({**GOOD, "question": "Ask for something discriminative"}), "repeats the request"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "clues"}), "has no 'clues'"),
        (json.dumps({**GOOD, "why": "because"}), "has 'why', which was not asked for"),
        (json.dumps({**GOOD, "question": " "}), "question is not a text"),
        (json.dumps({**GOOD, "question": ["What?"]}), "question is not a text"),
        (json.dumps({**GOOD, "options": "a cup"}), "options are not texts"),
        (json.dumps({**GOOD, "options": ["a cup", 2]}), "options are not texts"),
        (json.dumps({**GOOD, "options": ["a cup", ""]}), "options are not texts"),
        (json.dumps({**GOOD, "options": ["a cup"]}), "1 options, not 2 to 8"),
        (json.dumps({**GOOD, "options": list("abcdefghi")}), "9 options, not 2 to 8"),
        (json.dumps({**GOOD, "options": ["a hat", "A  hat"]}), "options repeat"),
        (json.dumps({**GOOD, "answer": "C"}), "answer is not the letter"),
        (json.dumps({**GOOD, "answer": 1}), "answer is not the letter"),
        (json.dumps({**GOOD, "answer": None}), "answer is not the letter"),
        (json.dumps({**GOOD, "clues": []}), "0 clues, not 1 to 8"),
        (json.dumps({**GOOD, "clues": [True]}), "clues are not texts"),
        (json.dumps({**GOOD, "question": "What <|im_end|>?"}), "has the special token <|im_end|>"),
        (json.dumps({**GOOD, "options": ["a cup", "<|video_pad|>"]}), "has the special token <|video_pad|>"),
        (json.dumps({**GOOD, "question": "What\ud800?"}), "half a character"),
        (json.dumps({**GOOD, "ans\ud800wer": "A"}), "half a character"),
    ],
)
def test_questions_that_cannot_be_used(reply, problem):
    with pytest.raises(ReplyError, match=problem) as caught:
        read_question(reply)
    assert len(str(caught.value)) < 150 and "\n" not in str(caught.value)


def test_nothing_to_ask():
    with pytest.raises(NothingToAskError):
        read_question('{"question": null}')


def test_verdicts():
    assert read_verdict('{"clues": [true, true], "answer": false}', 2) == {"clues": True, "answer": False}
    assert read_verdict('{"clues": [true, false], "answer": true}', 2) == {"clues": False, "answer": True}
    for text, problem in {
        '{"clues": [true], "answer": false}': "true or false 2 times",
        '{"clues": [1, 0], "answer": false}': "true or false 2 times",
        '{"clues": true, "answer": false}': "true or false 2 times",
        '{"clues": [true, true], "answer": "no"}': "answer is not true or false",
        '{"clues": [true, true]}': "has no 'answer'",
        "No.": "not a JSON object",
    }.items():
        with pytest.raises(ReplyError, match=problem):
            read_verdict(text, 2)


def test_a_reply_that_cannot_be_used_is_answered_with_the_reason():
    script = Script("Sorry, I cannot.", "", json.dumps(GOOD))
    request = [Message("user", ("Ask!",))]
    assert ask(script, request, read_question, 3) == GOOD
    first, second, third = script.asked
    assert first == request and second[:1] == request and third[:3] == second
    assert second[1] == Message("assistant", ("Sorry, I cannot.",)) and "it refuses" in second[2].parts[0]
    assert third[3].parts == ("(nothing)",)


def test_there_is_an_end_to_asking():
    script = Script(*["Sorry, I cannot."] * 3)
    with pytest.raises(ReplyError, match="it refuses"):
        ask(script, [Message("user", ("Ask!",))], read_question, 3)
    script = Script('{"question": null}')
    with pytest.raises(NothingToAskError):  # which is an answer
        ask(script, [Message("user", ("Ask!",))], read_question, 3)


# ---------------------------------------------------------------- uniqueness


def test_five_scenes_before_and_five_after():
    assert curate.neighbours(0, 1) == []
    assert sorted(curate.neighbours(0, 20)) == [1, 2, 3, 4, 5]
    assert sorted(curate.neighbours(8, 20)) == [3, 4, 5, 6, 7, 9, 10, 11, 12, 13]
    assert sorted(curate.neighbours(19, 20)) == [14, 15, 16, 17, 18]
    assert curate.neighbours(2, 4) == [1, 3, 0]  # nearest first


@pytest.fixture(scope="module")
def one(long_world):
    """Of the first long video: how it is shown, and its scenes."""
    row = rows_of(long_world)[0]
    config = configuration.parse(["--budget", "20"])
    return Viewer(long_world.parent, config), row["video"], [tuple(scene) for scene in row["scenes"]]


def verdict(clues: bool = False, answer: bool = False) -> str:
    return json.dumps({"clues": [True, clues], "answer": answer})


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ([verdict()] * 6, ""),
        ([verdict()] * 5 + [verdict(clues=True)], "another scene has all clues: scene 6"),
        ([verdict(), verdict(answer=True)], "another scene has the answer: scene 4"),
        ([verdict(), "hm", "Sorry, no."], "no verdict: scene 4: it refuses: 'Sorry, no.'"),
        ([RequestError("too long")], "no verdict: scene 2: too long"),
    ],
)
def test_a_question_is_kept_if_no_neighbour_has_its_clues_or_its_answer(one, says, reason):
    viewer, video, spans = one
    question = {**GOOD, "clues": ["a", "b"], "duration": 100.0, "number": 3, "scene": list(spans[3]), "skipped": None}
    task = Task(f"{video}:3", video, {"id": f"{video}:3", "video": video, **question})
    script = Script(*says)
    row = curate.unique_row(task, {video: spans}, viewer, script, tries=2)
    assert row["kept"] is (reason == "") and row["reason"] == reason and not script.says
    shown = [messages[0].parts[0].span for messages in script.asked]
    assert shown[:3] == [spans[k] for k in (2, 4, 4 if "Sorry" in str(says) else 1)][: len(shown)]
    asked = json.loads(script.asked[0][0].parts[1].splitlines()[-1])
    assert asked == {"question": "What falls?", "clues": ["a", "b"], "answer": "a hat"}


def test_an_endpoint_that_rejects_the_key_ends_the_run(one):
    viewer, video, spans = one
    task = Task(video, video, {"duration": 100.0, "number": 3, "scene": spans[3]})
    with pytest.raises(ChatError):
        curate.question_row(task, viewer, Script(ChatError("status 401")), tries=2)
    refused = curate.question_row(task, viewer, Script(RequestError("status 400: too long")), tries=2)
    assert refused["skipped"] == "request refused: status 400: too long"


def test_what_is_shown(one):
    viewer, video, spans = one
    shown = viewer.show(video, spans[1])
    assert shown.span == spans[1] and all(spans[1][0] <= time < spans[1][1] for time in shown.clip.times)
    assert len(shown.clip.times) == min(5, round(spans[1][1] - spans[1][0]))  # budget 20, 4 tokens a frame or more


# ---------------------------------------------------------------- whole runs with the truth


OPTIONS = ["--threads", "1", "--mixed_precision", "no", "--budget", "40", "--v_min", "4"]


def run(out: Path, *arguments: object) -> None:
    curate.main(["--out", str(out), *OPTIONS, *map(str, arguments)])


@pytest.fixture(scope="module")
def told(long_world, tmp_path_factory) -> Path:
    """The output of a run with the truth."""
    out = tmp_path_factory.mktemp("told")
    run(out, "--oracle", long_world)
    return out


def test_from_videos_to_a_training_file(told, long_world):
    truth = {row["video"]: row for row in rows_of(long_world)}
    assert {row["video"]: row["shots"] for row in rows_of(told / "shots.jsonl")} == {
        video: row["shots"] for video, row in truth.items()
    }
    for row in rows_of(told / "scenes.jsonl"):
        assert row["scenes"] == truth[row["video"]]["scenes"] and row["skipped"] is None
        begins = {start for start, _ in row["scenes"][1:]}
        assert {one["time"] for one in row["boundaries"] if one["probability"] > 0.3} == begins
    # By the world's own rows: the first question of each scene, unless a neighbour has it or its answer.
    expected = {}
    for video, row in truth.items():
        by_scene = [[q for q in row["questions"] if q["scene"] == n] for n in range(len(row["scenes"]))]
        for n, here in enumerate(by_scene):
            if here:
                near = [q for m in range(max(0, n - 5), min(7, n + 6)) if m != n for q in by_scene[m]]
                right = here[0]["options"]["ABCD".index(here[0]["answer"][1])]
                answers = {q["options"]["ABCD".index(q["answer"][1])] for q in near}
                kept = here[0]["question"] not in {q["question"] for q in near} and right not in answers
                expected[f"{video}:{n}"] = (here[0]["question"], kept)
    unique = rows_of(told / "unique.jsonl")
    assert {row["id"]: (row["question"], row["kept"]) for row in unique} == expected
    assert len({kept for _, kept in expected.values()}) == 2 and all(row["kept"] or row["reason"] for row in unique)
    nothing = [row["id"] for row in rows_of(told / "questions.jsonl") if row["skipped"] == "nothing distinctive"]
    assert set(nothing) | set(expected) == {f"{video}:{n}" for video in truth for n in range(7)}
    samples = read_samples(told / "train.jsonl", video_root=long_world.parent)
    assert [sample.id for sample in samples] == [key for key, (_, kept) in expected.items() if kept]
    for sample in samples:
        video, n = sample.id.rsplit(":", 1)
        assert list(sample.evidence[0]) == truth[video]["scenes"][int(n)] and Path(sample.video).is_file()
        assert sample.duration == pytest.approx(truth[video]["duration"]) and sample.meta["clues"] == [sample.question]
    assert Image.open(told / "statistics.png").size[0] > 500


def test_a_finished_run_asks_nothing_again(told, long_world, monkeypatch, capsys):
    before = (told / "train.jsonl").read_bytes()
    monkeypatch.setattr(curate.Truth, "reply", lambda *_: pytest.fail("asked"))
    run(told, "--oracle", long_world)
    assert (told / "train.jsonl").read_bytes() == before
    assert "asked      0 requests, 0 known already" in capsys.readouterr().out


def test_other_options_need_another_folder(told, long_world):
    with pytest.raises(DataError, match=r"questions\.jsonl: row 1, .*budget was 40 and is 44 now; give another --out"):
        run(told, "--oracle", long_world, "--budget", "44")


@pytest.mark.processes
def test_two_processes_share_the_videos(told, long_world, tmp_path):
    options = ["--out", str(tmp_path / "two"), *OPTIONS, "--oracle", str(long_world)]
    asked = run_in_two_processes("curate", "question_row", options, tmp_path)
    assert all(asked) and not {one.split(":")[0] for one in asked[0]} & {one.split(":")[0] for one in asked[1]}
    for name in ("shots", "scenes", "questions", "unique"):
        assert without_order(tmp_path / "two" / f"{name}.jsonl") == without_order(told / f"{name}.jsonl")
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == (told / "train.jsonl").read_bytes()


# ---------------------------------------------------------------- a server that fails


class Judge(ThreadingHTTPServer):
    """An endpoint whose replies follow from what it is asked, and which fails the first time it is asked something: by
    429, 500, a cut connection, broken JSON; or not. At its first request it is silent. `answered` counts what it has
    answered.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.answered, self.failed, self.kinds = Counter(), set(), Counter()
        self.lock, self.closing = threading.Lock(), threading.Event()

    def handle_error(self, *_):
        """Clients hang up here."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = hashlib.sha256(body).hexdigest()
        first = int(key[:8], 16)
        with self.server.lock:
            fails = key not in self.server.failed
            self.server.failed.add(key)
            kind = 4 if not self.server.kinds else (0, 1, 2, 3, 5)[first % 5] if fails else 5
            self.server.kinds[kind] += 1
        if kind == 0:
            return self.say(429, b"slow down", {"Retry-After": "2"})
        if kind == 1:
            return self.say(500, b"")
        if kind == 2:
            self.close_connection = True
            return None
        if kind == 3:
            return self.say(200, b'{"choices": [{"mess')
        if kind == 4:
            self.server.closing.wait(20)
            return None
        with self.server.lock:
            self.server.answered[key] += 1
        said = self.reply(json.loads(body)["messages"], first)
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return self.say(200, json.dumps({"choices": [{"message": {"content": said}}], "usage": usage}).encode())

    @staticmethod
    def reply(messages: list[dict], number: int) -> str:
        words = messages[0]["content"][-1]["text"]
        images = [part["image_url"]["url"] for part in messages[0]["content"][:-1]]
        assert images and all(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in images)
        if words == curate.QUESTION:
            if number % 5 == 0:
                return "I'm sorry, I can't." if len(messages) == 1 or number % 2 else json.dumps(GOOD)
            return json.dumps({**GOOD, "question": f"What falls on {number}?"})
        return json.dumps({"clues": [number % 11 == 0], "answer": number % 13 == 0})

    def say(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = Judge()
    with serving(server, server.closing):
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """The seconds that were waited, without waiting."""
    slept, connect = [], chat.connect

    def quick(*arguments):
        return replace(connect(*arguments), sleep=slept.append, rng=random.Random(0))

    monkeypatch.setattr(chat, "connect", quick)
    monkeypatch.setenv(chat.KEY, "secret")
    return slept


def asking(judge: Judge, long_world: Path) -> list[object]:
    known = ["--videos", long_world.parent, "--shots", long_world]
    return [*known, "--endpoint", judge.url, "--judge_model", "judge", "--timeout", "4"]


def test_a_run_beside_a_failing_server_ends_complete(judge, impatient, long_world, tmp_path, capsys):
    run(tmp_path, *asking(judge, long_world), "--workers", "4", "--prices", "2", "8")
    assert set(judge.kinds) == {0, 1, 2, 3, 4, 5} and judge.kinds[4] == 1  # it has failed in every way
    assert max(judge.answered.values()) == 1 and max(impatient) >= 2
    questions, unique = rows_of(tmp_path / "questions.jsonl"), rows_of(tmp_path / "unique.jsonl")
    assert len(questions) == 14 and {row["skipped"] for row in questions} <= {
        None,
        "it refuses: \"I'm sorry, I can't.\"",
    }
    assert [row["id"] for row in questions if row["skipped"] is None] and len(unique) == len(
        [row for row in questions if row["skipped"] is None]
    )
    n, printed = sum(judge.answered.values()), capsys.readouterr().out
    cost = f"{n} requests, 0 known already, {100 * n} prompt and {10 * n} completion tokens, cost {n * 280e-6:.2f}"
    assert f"asked      {cost}" in printed
    assert len(read_samples(tmp_path / "train.jsonl")) == sum(row["kept"] for row in unique) > 0


@pytest.mark.processes
def test_nothing_is_lost_or_asked_twice_after_kill_9(judge, impatient, long_world, tmp_path):
    """Killed among the questions and, after a restart, among the verdicts."""
    out, options, left = tmp_path / "killed", [*OPTIONS, *asking(judge, long_world), "--workers", 1], {}

    def killed_at(line: int) -> list[int]:
        append, lines = journal.append, itertools.count(1)

        def interrupted(path, row):
            if next(lines) == line:
                with open(path, "ab") as file:
                    file.write(b'{"id": "half a li')
                os.kill(os.getpid(), signal.SIGKILL)
            append(path, row)

        def work(_):
            journal.append = interrupted
            curate.main(list(map(str, ["--out", out, *options])))

        return exit_codes(work)

    for lines, name in ((9, "questions"), (15, "unique")):  # after 2 + 2 + 4, and after 10 + 4 more
        assert killed_at(lines) == [-signal.SIGKILL]
        left[name] = (out / f"{name}.jsonl").read_bytes()
        assert left[name].count(b"\n") == 4 and left[name].endswith(b"half a li")
    assert not (out / "train.jsonl").exists()
    run(out, *options)
    for name, text in left.items():
        assert (out / f"{name}.jsonl").read_bytes().startswith(text[: text.rfind(b"\n") + 1])
    assert max(judge.answered.values()) == 1
    n = sum(judge.answered.values())
    run(tmp_path / "whole", *options)
    assert sum(judge.answered.values()) == 2 * n  # the whole run, with replies of its own, asks the same
    for name in ("shots", "scenes", "questions", "unique"):
        assert rows_of(out / f"{name}.jsonl") == rows_of(tmp_path / "whole" / f"{name}.jsonl")
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()


def test_a_disk_that_fills_up_ends_the_run_and_a_restart_goes_on(told, long_world, tmp_path, monkeypatch):
    out, sync, calls = tmp_path / "full", os.fsync, []

    def full(number: int):
        calls.append(number)
        if len(calls) > 20:
            raise OSError(28, os.strerror(28))
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(JournalError, match="No space left on device"):
            run(out, "--oracle", long_world)
    assert not (out / "train.jsonl").exists()
    for file in out.glob("*.jsonl"):
        assert file.read_bytes().endswith(b"\n") or not file.stat().st_size
    run(out, "--oracle", long_world)
    assert (out / "train.jsonl").read_bytes() == (told / "train.jsonl").read_bytes()


# ---------------------------------------------------------------- bad input


def test_what_has_no_videos_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(chat.KEY, "secret")
    (tmp_path / "notes.txt").write_text("no video")
    for arguments, problem in {
        ("--videos", str(tmp_path)): "there are no videos in it",
        ("--videos", str(tmp_path / "nowhere")): "no such folder",
        ("--videos", str(tmp_path / "notes.txt")): "a file, not a folder",
        (): "which videos",
    }.items():
        with pytest.raises(CurateError, match=problem):
            run(tmp_path / "out", *arguments, "--endpoint", "http://127.0.0.1:9", "--judge_model", "judge")
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_named_before_the_first_shot(long_world, tmp_path, monkeypatch):
    videos, out = ["--videos", long_world.parent], tmp_path / "out"
    with pytest.raises(ChatError, match="no key; set OPENAI_API_KEY"):
        run(out, *videos, "--shots", long_world, "--endpoint", "http://127.0.0.1:9", "--judge_model", "judge")
    with pytest.raises(CurateError, match="what are the scenes"):
        monkeypatch.setenv(chat.KEY, "secret")
        run(out, *videos, "--endpoint", "http://127.0.0.1:9", "--judge_model", "judge")
    with pytest.raises(ConfigError, match="--endpoint and --oracle: one of them"):
        run(out, "--oracle", long_world, "--endpoint", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="--judge_model is for --endpoint, not for --oracle"):
        run(out, "--oracle", long_world, "--judge_model", "judge")
    with pytest.raises(ConfigError, match="tries must be positive, not 0"):
        run(out, "--oracle", long_world, "--tries", "0")
    with pytest.raises(SceneError, match="not a scene detector"):
        run(out, "--oracle", long_world, "--shots", long_world, "--detector", tmp_path / "none.safetensors")
    assert not list(out.glob("*.jsonl"))


def test_videos_that_give_nothing_are_counted(long_world, tmp_path, capsys):
    """Unreadable, of a single shot, not known, with too short a scene, with a name that cannot be written."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"not a video")
    first = rows_of(long_world)[0]
    for name in ("whole.mp4", "single.mp4", "unknown.mp4", "brief.mp4"):
        (folder / name).symlink_to(long_world.parent / first["video"])
    os.symlink(long_world.parent / first["video"], os.fsencode(folder) + b"/caf\xe9.mp4")
    whole, end = [[0.0, first["duration"]]], first["duration"]
    brief = [[0.0, 10.0], [10.0, 10.01], [10.01, end]]
    rows = [
        {**first, "video": "whole.mp4"},
        {**first, "video": "broken.mp4"},
        {"video": "single.mp4", "shots": whole, "scenes": whole, "questions": []},
        {"video": "brief.mp4", "shots": brief, "scenes": brief, "questions": []},
    ]
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "out", "--videos", folder, "--oracle", known)
    skipped = {row["video"]: row["skipped"] for row in rows_of(tmp_path / "out" / "shots.jsonl")}
    assert (
        skipped.pop("broken.mp4").startswith("unreadable: ") and skipped.pop("unknown.mp4") == "its shots are not known"
    )
    assert skipped.pop(os.fsdecode(b"caf\xe9.mp4")) == "its name is not UTF-8"
    assert set(skipped.values()) == {None}
    skipped = {row["video"]: row["skipped"] for row in rows_of(tmp_path / "out" / "scenes.jsonl")}
    assert skipped == {"brief.mp4": None, "single.mp4": "one scene: there is nothing to find in it", "whole.mp4": None}
    questions = {row["id"]: row["skipped"] for row in rows_of(tmp_path / "out" / "questions.jsonl")}
    assert questions["brief.mp4:1"] == "shorter than a frame"
    assert {sample.video for sample in read_samples(tmp_path / "out" / "train.jsonl")} == {"whole.mp4"}
    printed = capsys.readouterr().out
    assert "videos     6, " in printed and "\n  1 x unreadable\n" in printed and "  1 x one scene\n" in printed
    assert "  1 x shorter than a frame\n" in printed


def test_pyscenedetect_is_asked_for_by_name(long_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    detector = tmp_path / "detector.safetensors"
    tower = scenes.load_tower(str(configuration.TOWER))
    random_detector(tower).save(detector)
    run_it = ["--videos", long_world.parent, "--model", configuration.BUILT_IN, "--detector", detector]
    with pytest.raises(SceneError, match="PySceneDetect, which is not installed: pip install"):
        run(tmp_path / "out", *run_it)


def random_detector(tower) -> scenes.Detector:
    torch.manual_seed(0)
    encoder = scenes.Encoder(scenes.shot_features(tower, "", [], 4).shape[1])
    n = scenes.window_similarities(torch.zeros(2, 64), 2).shape[1]
    head = torch.nn.Sequential(torch.nn.Linear(n, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    return scenes.Detector(encoder, head, 2, scenes.tower_name(tower), 4)


def test_scenes_of_a_detector(long_world, tmp_path, tokenizer, monkeypatch):
    tower = loud_model(tokenizer)
    random_detector(tower).save(tmp_path / "detector.safetensors")
    monkeypatch.setattr(scenes, "load_tower", lambda _: tower)
    row = rows_of(long_world)[0]
    options = ["--detector", str(tmp_path / "detector.safetensors"), "--cache", str(tmp_path), "--threads", "1"]
    given, config = curate.parse_curate([*options, "--oracle", str(long_world)])
    find = curate.scene_finder(given, Viewer(long_world.parent, config), None)
    found = curate.task_scenes(Task(row["video"], row["video"], row), find)
    shots = [tuple(shot) for shot in row["shots"]]
    detector = scenes.Detector.load(tmp_path / "detector.safetensors", tower)
    expected = detector(scenes.shot_features(tower, long_world.parent / row["video"], shots, 4))
    assert [one["probability"] for one in found["boundaries"]] == pytest.approx(expected, abs=1e-4)
    assert found["scenes"] == scenes.merge_shots(shots, expected) and len(set(expected)) > 1


def test_a_checkpoint_that_talks_of_other_things_leaves_no_question(talker, long_world, tmp_path):
    truth = rows_of(long_world)[0]
    known = tmp_path / "known.jsonl"
    end = truth["duration"]
    halves = [[0.0, 50.0], [50.0, end]]
    known.write_text(json.dumps({"video": truth["video"], "shots": halves, "scenes": halves}) + "\n")
    options = ["--shots", known, "--videos", long_world.parent, "--model", talker, "--v_max", "8"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("of an earlier run")
    with pytest.raises(CurateError, match="no question is left"):
        run(tmp_path / "out", *options, "--max_tokens", "40", "--tries", "2")
    assert not (tmp_path / "out" / "train.jsonl").exists()
    rows = rows_of(tmp_path / "out" / "questions.jsonl")
    replies = [json.loads(path.read_text()) for path in (tmp_path / "out" / "replies").rglob("*.json")]
    assert len(rows) == 2 and len(replies) == 4  # each was asked again
    reasons = {f"it is not a JSON object: {reply['text']!r}" for reply in replies}
    assert {row["skipped"] for row in rows} <= reasons


# ---------------------------------------------------------------- statistics


def test_statistics_are_those_of_a_plain_count(capsys):
    text = curate.statistics_text([30.0, 60.0, 110.0, 450.0], [0.011, 0.03, 0.04, 0.19])
    lines = [line.split() for line in text.splitlines()]
    counted = {(line[0], line[2]): int(line[3]) for line in lines if len(line) > 3 and line[1] == "to"}
    assert counted == {
        ("20", "50"): 1,
        ("50", "100"): 1,
        ("100", "200"): 1,
        ("200", "500"): 1,
        ("1", "2"): 1,
        ("2", "5"): 2,
        ("5", "10"): 0,
        ("10", "20"): 1,
    }
    assert "min 30.0, median 85.0, max 450.0" in text and "min 1.1, median 3.5, max 19.0" in text
