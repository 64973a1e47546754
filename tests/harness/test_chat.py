"""An endpoint that fails in every way, the checkpoint's own prompt, and replies that are asked for once."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import completion
from PIL import Image

import policy
from engine.loading import load
from engine.sampling import generate
from harness import chat
from harness.chat import Cached, ChatError, Endpoint, Local, Message, Reply, RequestError, Shown, Usage
from harness.journal import JournalError
from policy import Video, Vocabulary
from video import Clip

ASKED = [Message("user", ("What is this?",))]


def clip(seed: int = 0, n: int = 2, size: int = 28, step: float = 0.5) -> Clip:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return Clip(frames, [k * step for k in range(n)], step)


def endpoint(server, slept: list[float] | None = None, **more) -> Endpoint:
    sleep = (slept if slept is not None else []).append
    return Endpoint(server.url, "judge", "secret", sleep=sleep, rng=random.Random(0), **more)


def test_what_is_sent(server):
    frames = clip(n=2, size=56)
    said = Message("assistant", ("Which?",))
    here = Message("user", (Shown("a.mp4", (0, 1), frames), "This one."))
    dialogue = [Message("system", ("Be brief.",)), *ASKED, said, here]
    assert endpoint(server).reply(dialogue) == Reply("fine", 7, 3)
    [body], [path], [key] = server.bodies, server.paths, server.keys
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "judge"
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][1]["content"] == "What is this?"
    *images, text = body["messages"][3]["content"]
    assert text == {"type": "text", "text": "This one."} and len(images) == 2
    for image, frame in zip(images, frames.frames.numpy(), strict=True):
        head, encoded = image["image_url"]["url"].split(",")
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).transpose(2, 0, 1)
        assert head == "data:image/jpeg;base64" and shown.shape == frame.shape
        assert np.abs(shown.astype(int) - frame).mean() < 12  # noise is the worst case for JPEG


PASSING = {
    "too many requests": (429, "slow down", {}),
    "a broken server": (500, "", {}),
    "an overloaded server": (503, "later", {}),
    "a timeout of its own": (408, "", {}),
    "a cut connection": (0, "", {}),
    "a cut body": (-1, completion("a"), {}),
    "no JSON": (200, "<html>", {}),
    "other JSON": (200, '{"choices": []}', {}),
    "a list": (200, "[1]", {}),
    "thousands of brackets": (200, "[" * 200_000, {}),
    "no text": (200, json.dumps({"choices": [{"message": {"content": [1]}}]}), {}),
}


@pytest.mark.parametrize("failure", PASSING.values(), ids=PASSING)
def test_what_passes_is_asked_again(server, failure):
    server.answers = [failure, failure]
    slept = []
    assert endpoint(server, slept).reply(ASKED).text == "fine"
    assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]
    assert 0.5 <= slept[0] <= 1 and 1 <= slept[1] <= 2 and slept[1] != 2 * slept[0]  # doubled, with jitter


def test_a_server_that_says_nothing_is_given_up_and_asked_again(server):
    server.answers = [(-2, "", {})]
    assert endpoint(server, timeout=2).reply(ASKED).text == "fine"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("headers", "least"),
    [
        ({"Retry-After": "17"}, 17),
        ({"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30),
        ({"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 07:00:00 GMT"}, 0.5),
        ({"Retry-After": "0"}, 0.5),
        ({"Retry-After": "nan"}, 0.5),
        ({"Retry-After": "soon"}, 0.5),
    ],
)
def test_the_server_says_how_long_to_wait(server, headers, least):
    server.answers = [(429, "", headers)]
    slept = []
    assert endpoint(server, slept).reply(ASKED).text == "fine"
    assert len(slept) == 1 and least <= slept[0] <= max(least, 1)


def test_a_wait_of_hours_ends_the_run(server):
    server.answers = [(429, "quota", {"Retry-After": "86400"})]
    with pytest.raises(ChatError, match=r"status 429: quota; it asks to wait for 86400 s"):
        endpoint(server).reply(ASKED)


def test_a_server_that_stays_broken_is_named(server):
    server.answers = [(500, "out of\nmemory", {})] * 9
    slept = []
    with pytest.raises(ChatError, match=r"127\.0\.0\.1.*status 500: out of memory, at the last of 9 tries") as caught:
        endpoint(server, slept).reply(ASKED)
    assert len(slept) == 8 and not isinstance(caught.value, RequestError)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RequestError), (413, RequestError), (401, ChatError), (404, ChatError)]
)
def test_what_will_not_pass_is_an_error_at_once(server, status, kind):
    server.answers = [(status, "the reason", {})]
    with pytest.raises(ChatError, match=f"model judge: status {status}: the reason") as caught:
        endpoint(server).reply(ASKED)
    assert type(caught.value) is kind and "secret" not in str(caught.value)
    assert len(server.bodies) == (2 if kind is RequestError else 1)  # with the tiny request that tells what is refused


def test_a_server_that_refuses_everything_ends_the_run_at_once(server):
    """No question is taken for refused, because a rerun would leave it out for ever."""
    server.answers = [(400, "no such deployment", {})] * 2
    with pytest.raises(ChatError, match="no such deployment; and a request of a word is refused too") as caught:
        endpoint(server).reply(ASKED)
    assert not isinstance(caught.value, RequestError)
    server.answers = [(400, "text only", {})] * 2
    with pytest.raises(ChatError, match="a request of one small picture and a word is refused too"):
        endpoint(server).reply(user(Shown("a.mp4", (0, 1), clip()), "What is this?"))
    assert [part["type"] for part in server.bodies[-1]["messages"][0]["content"]] == ["image_url", "text"]


def test_once_something_was_answered_a_refusal_is_the_requests_own(server):
    asked = endpoint(server)
    asked.reply(ASKED)
    server.answers = [(400, "too long", {})] * 2
    for _ in range(2):
        with pytest.raises(RequestError, match="too long"):
            asked.reply(ASKED)
    assert len(server.bodies) == 3


RENAMED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
FIXED = "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported."


def test_parameters_that_a_newer_model_does_not_know_are_renamed_or_left_out(server):
    server.answers = [(400, json.dumps({"error": {"message": message}}), {}) for message in (RENAMED, FIXED)]
    slept = []
    asked = endpoint(server, slept)
    assert asked.reply(ASKED).text == "fine" and asked.reply(ASKED).text == "fine" and not slept
    first, second, third, fourth = ({*body} - {"model", "messages"} for body in server.bodies)
    assert first == {"max_tokens", "temperature"} and second == {"max_completion_tokens", "temperature"}
    assert third == fourth == {"max_completion_tokens"} and server.bodies[3]["max_completion_tokens"] == 1024


def test_a_request_that_is_too_long_keeps_its_parameters(server):
    """vLLM's message names max_tokens too."""
    long = "'max_tokens' or 'max_completion_tokens' is too large: 1024. The maximum context length is 8 tokens."
    server.answers = [(200, completion("fine"), {}), (400, long, {})]
    asked = endpoint(server)
    asked.reply(ASKED)
    with pytest.raises(RequestError, match="is too large"):
        asked.reply(ASKED)
    asked.reply(ASKED)
    assert all(body["max_tokens"] == 1024 for body in server.bodies)


def test_a_key_that_a_server_repeats_is_not_shown(server):
    server.answers = [(401, f"{'x' * 190} Bearer secret is unknown", {})]
    with pytest.raises(ChatError) as caught:
        endpoint(server).reply(ASKED)
    assert "sec" not in str(caught.value)  # not half of it either, where the message is cut
    server.answers = [(200, f"{'x' * 190} Bearer secret is unknown", {})]  # with another status than it means
    with pytest.raises(ChatError, match="not a chat completion: 'xxx") as caught:
        endpoint(server, waits=[]).reply(ASKED)
    assert "sec" not in str(caught.value)
    server.answers = [(401, "EMPTY is no key", {})]
    with pytest.raises(ChatError, match="EMPTY is no key"):
        Endpoint(server.url, "judge", "EMPTY").reply(ASKED)


def test_a_terminal_obeys_no_servers_message(server):
    server.answers = [(401, "\x1b]0;owned\x07\x1b[2Jwrong\x9b31m key", {})]
    with pytest.raises(ChatError) as caught:
        endpoint(server).reply(ASKED)
    assert str(caught.value).isprintable() and "wrong" in str(caught.value)


@pytest.mark.parametrize("count", ["1e999", "-5", "NaN", '"many"', "[1]"])
def test_a_count_of_tokens_that_can_not_be_is_none(server, count):
    body = completion("fine").replace('"prompt_tokens": 7', f'"prompt_tokens": {count}')
    server.answers = [(200, body, {})]
    assert endpoint(server).reply(ASKED) == Reply("fine", 0, 3)


def test_a_reply_that_drips_in_for_ever_is_given_up(server):
    server.answers = [(-3, completion("fine"), {})]
    assert endpoint(server, deadline=0.5).reply(ASKED).text == "fine"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [-4, -5], ids=["header lines", "promises"])
def test_a_reply_that_never_begins_is_given_up(server, status):
    """Though a byte comes again and again, before the `timeout` without one is over."""
    server.answers = [(status, "", {})]
    asked = endpoint(server, timeout=0.3, deadline=0.2, waits=[])
    with pytest.raises(ChatError, match=r"the reply is not complete 0\.5 s after the request, at the last of 1 tries"):
        asked.reply(ASKED)


def test_the_key_does_not_follow_a_redirect(server):
    server.answers = [(302, "", {"Location": f"{server.url}/elsewhere"})]
    with pytest.raises(ChatError, match="status 302"):
        endpoint(server).reply(ASKED)
    assert server.paths == ["/v1/chat/completions"]


def test_a_refusal_is_a_reply(server):
    server.answers = [(200, completion(None, refusal="I cannot look at this."), {}), (200, completion(None), {})]
    assert endpoint(server).reply(ASKED).text == "I cannot look at this."
    assert endpoint(server).reply(ASKED).text == ""


def test_half_a_character_is_replaced(server):
    server.answers = [(200, completion("a\ud800 é"), {})]
    assert endpoint(server).reply(ASKED).text == "a? é"


def test_no_usage_is_no_tokens(server):
    server.answers = [(200, json.dumps({"choices": [{"message": {"content": "a"}}]}), {})]
    assert endpoint(server).reply(ASKED) == Reply("a", 0, 0)


def test_nobody_listens():
    slept = []
    with pytest.raises(ChatError, match=r"http://127\.0\.0\.1:9/v1: .*refused, at the last of 2 tries"):
        Endpoint("http://127.0.0.1:9/v1", "judge", "secret", waits=[3], sleep=slept.append).reply(ASKED)
    assert len(slept) == 1


def test_what_an_endpoint_needs(monkeypatch):
    for name in (chat.ADDRESS, chat.KEY):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ChatError, match="no endpoint: give --endpoint URL or set OPENAI_BASE_URL"):
        chat.connect(None, "judge")
    monkeypatch.setenv(chat.ADDRESS, "http://127.0.0.1:9/v1/chat/completions")
    with pytest.raises(ChatError, match="no key; set OPENAI_API_KEY"):
        chat.connect(None, "judge")
    monkeypatch.setenv(chat.KEY, "sec\nret")
    with pytest.raises(ChatError, match="the key in OPENAI_API_KEY has characters that no key has"):
        chat.connect(None, "judge")
    monkeypatch.setenv(chat.KEY, "secret\n")
    with pytest.raises(ChatError, match="which model"):
        chat.connect(None, None)
    with pytest.raises(ChatError, match="begins with http"):
        chat.connect("file:///etc/passwd", "judge")
    made = chat.connect(None, "judge")
    assert made.url == "http://127.0.0.1:9/v1" and made.key == "secret" and "secret" not in repr(made)


# ---------------------------------------------------------------- a checkpoint


def test_a_checkpoint_is_asked_in_its_own_format(talker):
    """The prompt, written out by hand, gives the same reply."""
    local = Local(str(talker), torch.device("cpu"), max_tokens=12)
    first, second = clip(1, n=2), clip(2, n=3, size=56, step=1.0)
    dialogue = [
        Message("system", ("Be brief.",)),
        Message("user", (Shown("a.mp4", (0, 1), first), "red?")),
        Message("assistant", ("B",)),
        Message("user", ("And here ", Shown("a.mp4", (4, 7), second), "?")),
    ]
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    text = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{video}red?<|im_end|>\n"
    text += (
        f"<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nAnd here {video}?<|im_end|>\n<|im_start|>assistant\n"
    )
    model, tokenizer = load(str(talker))
    vocabulary = Vocabulary.of(tokenizer)
    clips = [Video.from_frames(c.frames, c.step) for c in (first, second)]
    prompt = policy.build_prompt(vocabulary.ids(text), clips, model.config)
    (sampled,) = generate(model, [prompt], 1, 12, vocabulary)
    expected = tokenizer.decode(sampled.ids, skip_special_tokens=True)
    reply = local.reply(dialogue)
    assert expected and reply == Reply(expected, len(prompt), len(sampled.ids)) and local.reply(dialogue) == reply


# ---------------------------------------------------------------- replies that are kept


class Counting:
    def __init__(self, name: str = "a"):
        self.name, self.asked = name, []

    def reply(self, messages) -> Reply:
        self.asked.append(messages)
        return Reply(f"é {len(self.asked)}", 1000, 10)


def user(*parts) -> list[Message]:
    return [Message("user", parts)]


def test_nothing_is_asked_twice(tmp_path):
    inner = Counting()
    cached = Cached(inner, tmp_path)
    first = cached.reply(user("hm", Shown("a.mp4", (0, 1), clip(1))))
    assert cached.reply(user("hm", Shown("a.mp4", (0, 1), clip(1)))) == first
    assert Cached(inner, tmp_path).reply(user("hm", Shown("copy.mp4", (5, 6), clip(1)))) == first  # by content
    assert len(inner.asked) == 1
    assert cached.usage == Usage(asked=1, known=1, prompt_tokens=1000, completion_tokens=10)
    assert cached.usage.cost(2.0, 8.0) == pytest.approx(0.00208)
    assert cached.usage.describe() == "1 requests, 1 known already, 1000 prompt and 10 completion tokens"
    assert cached.usage.describe(2000, 0).endswith(", cost 2.00")


DAMAGED = ["", '{"text": "é', "[]", '{"said": "é"}', '{"text": 5}', '{"text": "\\ud800"}', "[" * 100_000]


@pytest.mark.parametrize("damage", [*DAMAGED, '{"text": "x", "prompt_tokens": "many"}'])
def test_a_damaged_file_is_asked_for_again(tmp_path, damage):
    inner = Counting()
    Cached(inner, tmp_path).reply(ASKED)
    [file] = tmp_path.rglob("*.json")
    file.write_text(damage)
    for _ in range(2):
        assert Cached(inner, tmp_path).reply(ASKED).text == "é 2"


def test_what_several_ask_at_once_is_asked_once(tmp_path):
    together = threading.Barrier(2)

    class Slow(Counting):
        def reply(self, messages) -> Reply:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(0.2)  # a second one would come in the meantime
            return super().reply(messages)

    inner = Slow()
    cached = Cached(inner, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(cached.reply, [ASKED] * 4))
    assert len(inner.asked) == 1 and len(set(replies)) == 1 and cached.usage.known == 3


def test_what_differs_is_asked():
    shown = Shown("a.mp4", (0, 1), clip(1))
    different = [
        ("a", user("hm", shown)),
        ("b", user("hm", shown)),  # another model
        ("a", user(shown, "hm")),
        ("a", user("hm?", shown)),
        ("a", user("h", "m", shown)),
        ("a", [Message("system", ("hm", shown))]),
        ("a", user("hm", Shown("a.mp4", (0, 1), clip(2)))),
        ("a", user("hm", Shown("a.mp4", (0, 1), clip(1, step=1.0)))),
        ("a", user("hm", shown, shown)),
        ("a", [*user("hm"), *user(shown)]),
    ]
    assert len({chat.content_hash(name, messages) for name, messages in different}) == len(different)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_keeps_no_half_reply(tmp_path, monkeypatch, broken):
    inner = Counting()
    with monkeypatch.context() as patch:
        patch.setattr(chat.os, broken, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(JournalError, match="No space left on device; the reply is not kept"):
            Cached(inner, tmp_path).reply(ASKED)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert Cached(inner, tmp_path).reply(ASKED).text == "é 2"
    assert Cached(inner, tmp_path).reply(ASKED).text == "é 2"
