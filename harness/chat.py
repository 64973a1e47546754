"""Asking a vision-language model: one small interface, whoever answers.

    model = Cached(connect("https://api.example.com/v1", "some-model"), "runs/replies")
    reply = model.reply([Message("user", (Shown("a.mp4", (3.0, 8.0), clip), "What happens here?"))])

A `Chat` turns a list of messages, of texts and frames, into a `Reply`. There are two here, and a wrapper around any:

- `Endpoint`: an address that speaks the protocol of OpenAI's chat completions, as hosted services, vLLM and others do.
  Each frame is sent as an image. What may pass (a cut or slow connection, status 408, 429 or 5xx, a reply that is not
  JSON) is tried again, after a wait that doubles, has jitter, and is as long as the server asks for (Retry-After). What
  will not pass (another 4xx) is a ChatError at once; but a parameter that the server's models do not know is left out
  or named as they know it. Before a first refused request counts as such, a tiny one is sent: if that is refused too,
  the run ends, because every request would be.
- `Local`: a Qwen2.5-VL checkpoint, greedily. Each clip is shown as a video.
- `Cached`: replies on disk by the content of the messages, so that nothing is asked twice, also after a restart; and
  the count of tokens. Only requests that were under way when a process was killed are asked again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

import prompts
from engine.loading import load
from engine.sampling import generate
from harness.journal import JournalError
from policy import Video, Vocabulary, build_prompt
from video import Clip

ADDRESS, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"  # environment variables, as other clients name them
MAX_REPLY = 16 * 2**20  # bytes
REFUSED = (400, 413, 422)  # the status of a request that is itself the problem, not the key or the address
# What to send instead of a parameter that a server refuses by name; None: nothing.
INSTEAD = {"max_tokens": "max_completion_tokens", "max_completion_tokens": None, "temperature": None}
UNKNOWN = re.compile("unsupported|not support|unrecogni|unknown|not permitted|not allowed|deprecated", re.IGNORECASE)
SHORTEST_KEY = 6  # characters; shorter ones are words for servers that ask for none, and may stand in any message


class ChatError(Exception):
    """A reply that cannot be had: the message names address or model, the cause and what to do."""


class RequestError(ChatError):
    """A reply that cannot be had to this request: it is too long, or its content is not accepted. `reason`: what the
    server says, in full.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Shown:
    """Frames of a part of a video, [start, end) in seconds. Models see the frames alone."""

    video: str
    span: tuple[float, float]
    clip: Clip


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue. `role`: "system", "user" or "assistant"."""

    role: str
    parts: tuple[str | Shown, ...]


@dataclass(frozen=True)
class Reply:
    """What was said, and the tokens it took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat(Protocol):
    """Whoever can be asked. `name` tells apart what may answer differently: model and options, not the address."""

    name: str

    def reply(self, messages: Sequence[Message]) -> Reply:
        """The next turn of a dialogue. Raises ChatError."""
        ...


# ---------------------------------------------------------------- an endpoint


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key must not follow a redirect to another host."""

    def redirect_request(self, *_):
        return None


@dataclass
class Endpoint:
    """A chat endpoint at `url`, such as https://api.openai.com/v1. It can be asked by several threads at once.

    `timeout`: seconds without a byte from the server; `deadline`: seconds from a reply's beginning to its end, and with
    `timeout` those from the request to there;
    `waits`: the seconds before the second, third, ... try, each shortened by up to a half at random; `patience`: the
    longest wait that a server may ask for, in seconds.
    """

    url: str
    model: str
    key: str = field(repr=False)
    max_tokens: int = 1024
    temperature: float = 0.0
    timeout: float = 120.0
    deadline: float = 300.0
    waits: Sequence[float] = (1, 2, 4, 8, 16, 32, 60, 60)
    patience: float = 600.0
    sleep: Callable[[float], None] = time.sleep
    rng: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ChatError(f"endpoint {self.url!r}: an address begins with http:// or https://")
        if not self.key:
            raise ChatError(f"endpoint {self.url}: no key; set {KEY} (to any word for a server that asks for none)")
        if not self.key.isascii() or not self.key.isprintable():
            raise ChatError(f"endpoint {self.url}: the key in {KEY} has characters that no key has")
        if not self.model:
            raise ChatError(f"endpoint {self.url}: which model? Give --judge_model NAME")
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        self.name = f"{self.model} {self.max_tokens} {self.temperature}"
        self.parameters = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        self.accepted = False  # whether the server has ever answered a request

    def reply(self, messages: Sequence[Message]) -> Reply:
        """Ask, and ask again where that may help. Raises RequestError, and ChatError for all other failures."""
        try:
            reply = self.ask(messages)
        except RequestError as refusal:
            if not self.accepted:
                self.try_tiny_request(messages, refusal)
            raise
        self.accepted = True
        return reply

    def ask(self, messages: Sequence[Message]) -> Reply:
        content = [{"role": message.role, "content": as_content(message)} for message in messages]
        tries = 0
        while True:
            sent = dict(self.parameters)
            try:
                return read_completion(self.post({"model": self.model, "messages": content, **sent}))
            except _PassingError as error:
                tries += 1
                self.wait_after(error, tries)
            except RequestError as refusal:
                if not self.renamed(refusal.reason, sent):
                    raise

    def renamed(self, refusal: str, sent: dict) -> bool:
        """Whether a refusal says that one of the parameters sent is unknown; from now on what is `INSTEAD` is sent."""
        for name in sent:
            if name in refusal and UNKNOWN.search(refusal):
                value, other = self.parameters.pop(name, None), INSTEAD[name]
                if other and value is not None:  # another thread may have been here
                    self.parameters[other] = value
                return True
        return False

    def try_tiny_request(self, messages: Sequence[Message], refusal: RequestError) -> None:
        """Raise ChatError if the server also refuses a request of one word, and one small frame if there were any."""
        grey = Shown("grey.mp4", (0.0, 1.0), Clip(torch.full((1, 3, 56, 56), 128, dtype=torch.uint8), [0.0], 1.0))
        with_frames = any(isinstance(part, Shown) for message in messages for part in message.parts)
        try:
            self.ask([Message("user", (grey, "Hello") if with_frames else ("Hello",))])
        except RequestError:
            what = "one small picture and a word" if with_frames else "a word"
            raise ChatError(f"{refusal}; and a request of {what} is refused too: is it the right model?") from None
        self.accepted = True

    def wait_after(self, error: _PassingError, tries: int) -> None:
        """Wait for the next try. Raises ChatError if there is none, or not soon."""
        if tries > len(self.waits):
            raise ChatError(f"endpoint {self.url}: {error}, at the last of {tries} tries; run again later") from None
        if error.wait > self.patience:
            raise ChatError(f"endpoint {self.url}: {error}; it asks to wait for {error.wait:.0f} s") from None
        self.sleep(max(error.wait, self.waits[tries - 1] * (1 - self.rng.random() / 2)))

    def post(self, fields: dict) -> bytes:
        """One request. Raises _PassingError, or ChatError for what will not pass."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(fields).encode(), headers)
        try:
            with cut_after(self.timeout + self.deadline) as watched:
                try:
                    answer = urllib.request.build_opener(_NoRedirect, *watched).open(request, timeout=self.timeout)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    content = self.read(answer, MAX_REPLY if answer.status == 200 else 2000)
                    if answer.status == 200 and answer.length and len(content) < MAX_REPLY:
                        raise _PassingError("the connection was cut in the middle of the reply")
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = self.without_key(str(getattr(error, "reason", error)).encode(errors="replace")).decode()
            raise _PassingError(one_line(reason) or type(error).__name__) from None
        content = self.without_key(content)
        if answer.status != 200:
            raise self.failure(answer.status, answer.headers, content)
        return content

    def without_key(self, content: bytes) -> bytes:
        """What a server says, without the key, which it may repeat."""
        return content.replace(self.key.encode(), b"[key]") if len(self.key) >= SHORTEST_KEY else content

    def failure(self, status: int, headers: http.client.HTTPMessage, content: bytes) -> Exception:
        """What an answer with this status means."""
        reason = content.decode(errors="replace")
        what = f"status {status}{': ' if reason.strip() else ''}{one_line(reason)}"
        if status in (408, 429) or status >= 500:
            return _PassingError(what, asked_wait(headers))
        what = f"endpoint {self.url}, model {self.model}: {what}"
        return RequestError(what, reason) if status in REFUSED else ChatError(what)

    def read(self, answer: http.client.HTTPResponse, most: int) -> bytes:
        """At most so many bytes of an answer. Raises _PassingError if they drip in for longer than the deadline."""
        end, content = time.monotonic() + self.deadline, b""
        while len(content) < most and (part := answer.read1(most - len(content))):
            content += part
            if time.monotonic() > end:
                raise _PassingError(f"the reply is not complete {self.deadline:g} s after it began")
        return content


class _Watching:
    """A handler that notes the sockets of its connections."""

    def __init__(self, sockets: list[socket.socket]):
        super().__init__()
        self.sockets = sockets

    def do_open(self, connection: type, *arguments, **options):
        noted = self.sockets

        class Watched(connection):
            def connect(self):
                super().connect()
                noted.append(self.sock)

        return super().do_open(Watched, *arguments, **options)


class _WatchingHTTP(_Watching, urllib.request.HTTPHandler):
    pass


class _WatchingHTTPS(_Watching, urllib.request.HTTPSHandler):
    pass


@contextlib.contextmanager
def cut_after(seconds: float) -> Iterator[tuple[_Watching, ...]]:
    """Within, whatever these handlers connect to is cut after so many seconds: a server may drip header lines, or say
    again and again that a reply is coming. Raises _PassingError then.
    """
    sockets: list[socket.socket] = []
    late = threading.Event()

    def cut() -> None:
        late.set()
        for one in sockets:
            with contextlib.suppress(OSError):  # closed already
                one.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield _WatchingHTTP(sockets), _WatchingHTTPS(sockets)
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise _PassingError(f"the reply is not complete {seconds:g} s after the request")


class _PassingError(Exception):
    """A failure that another try may not meet, after `wait` seconds or more."""

    def __init__(self, problem: str, wait: float = 0.0):
        super().__init__(problem)
        self.wait = wait


def as_content(message: Message) -> str | list[dict]:
    """A message's parts as the protocol has them: texts and images."""
    if all(isinstance(part, str) for part in message.parts):
        return "".join(message.parts)
    content: list[dict] = []
    for part in message.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content += [
                {"type": "image_url", "image_url": {"url": jpeg_uri(frame)}} for frame in part.clip.frames.numpy()
            ]
    return content


def jpeg_uri(frame: np.ndarray) -> str:
    """One frame, uint8 [3, H, W], as a data URI."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def read_completion(body: bytes) -> Reply:
    """The reply in a chat completion; what it lacks is an empty text or no tokens. Raises _PassingError."""
    try:
        value = json.loads(body)
        message = value["choices"][0]["message"]
        text = message.get("content") or message.get("refusal") or ""
        usage = value.get("usage") or {}
        counts = [token_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # the last: thousands of brackets
        start = one_line(body[:200].decode(errors="replace"))
        raise _PassingError(f"not a chat completion: {start!r}") from None
    if not isinstance(text, str):
        raise _PassingError(f"the reply is not a text but {one_line(repr(text))}")
    return Reply(text.encode(errors="replace").decode(), *counts)  # JSON can hold halves of characters


def token_count(value: object) -> int:
    """A number of tokens, 0 where a server says none that can be."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0


def asked_wait(headers: http.client.HTTPMessage) -> float:
    """The seconds of a Retry-After, which may also be a time: then counted from the server's own Date."""
    text = headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("Date", ""))
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, wait.total_seconds())


def one_line(text: str, most: int = 200) -> str:
    """The beginning of a text, on one line, without what a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


# ---------------------------------------------------------------- a checkpoint


class Local:
    """A Qwen2.5-VL checkpoint that answers greedily, at most `max_tokens` tokens. Raises ModelError."""

    def __init__(self, path: str, device: torch.device, max_tokens: int = 1024):
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, tokenizer = load(path, half)
        self.model, self.vocabulary, self.max_tokens = model.to(device).eval(), Vocabulary.of(tokenizer), max_tokens
        weights = Path(path).glob("*.safetensors")  # a checkpoint may be trained on in its place
        self.name = f"{path} {max_tokens} {sorted(file.stat().st_mtime_ns for file in weights)}"
        self.lock = threading.Lock()

    def reply(self, messages: Sequence[Message]) -> Reply:
        """The frames of each `Shown` must have sides that are multiples of 2 patches, as `plan_clip` makes them."""
        text, clips = "", []
        for message in messages:
            clips += [part.clip for part in message.parts if not isinstance(part, str)]
            marks = [p if isinstance(p, str) else prompts.VIDEO for p in message.parts]
            text += f"<|im_start|>{message.role}\n{''.join(marks)}<|im_end|>\n"
        ids = self.vocabulary.ids(f"{text}<|im_start|>assistant\n")
        prompt = build_prompt(ids, list(map(Video.of, clips)), self.model.config, self.vocabulary)
        with self.lock:
            (sampled,) = generate(self.model, [prompt], 1, self.max_tokens, self.vocabulary)
        words = self.vocabulary.tokenizer.decode(sampled.ids, skip_special_tokens=True)
        return Reply(words, len(prompt), len(sampled.ids))


# ---------------------------------------------------------------- replies that are kept


@dataclass(frozen=True)
class Usage:
    """What was asked and what was known already: requests and tokens. Prices are per million tokens."""

    asked: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def cost(self, prompt_price: float, completion_price: float) -> float:
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6

    def describe(self, prompt_price: float = 0.0, completion_price: float = 0.0) -> str:
        tokens = f"{self.prompt_tokens} prompt and {self.completion_tokens} completion tokens"
        cost = self.cost(prompt_price, completion_price)
        return f"{self.asked} requests, {self.known} known already, {tokens}" + (f", cost {cost:.2f}" if cost else "")


class Cached:
    """A chat whose replies are kept in a folder, a file each, named by a hash of what was asked and of whom."""

    def __init__(self, chat: Chat, folder: str | Path):
        self.chat, self.folder, self.name = chat, Path(folder), chat.name
        self.usage, self.lock = Usage(), threading.Lock()
        self.under_way: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()

    def reply(self, messages: Sequence[Message]) -> Reply:
        """Raises ChatError, and JournalError if the reply cannot be kept."""
        key = content_hash(self.name, messages)
        path = self.folder / key[:2] / f"{key}.json"
        with self.lock:
            asking = self.under_way.setdefault(key, threading.Lock())
        with asking:  # who asks the same at the same time waits for the reply
            known = kept(path)
            reply = known or self.chat.reply(messages)
            if known is None:
                keep(path, reply)
        with self.lock:
            self.usage += Usage(known=1) if known else Usage(1, 0, reply.prompt_tokens, reply.completion_tokens)
        return reply


def content_hash(name: str, messages: Sequence[Message]) -> str:
    """A hash of all that a reply depends on: who is asked, roles, texts, frames and the seconds between them."""
    parts: list[object] = [name]
    for message in messages:
        parts.append(message.role)
        for part in message.parts:
            if isinstance(part, str):
                parts.append(part)
            else:
                frames = part.clip.frames.contiguous().numpy()
                parts += [frames.shape, round(part.clip.step, 6), hashlib.sha256(frames).hexdigest()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def kept(path: Path) -> Reply | None:
    """The reply in a file; None if there is none, or none that can be read."""
    try:
        reply = Reply(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    whole = isinstance(reply.text, str) and not prompts.half_character(reply.text)
    return reply if whole and all(type(n) is int for n in (reply.prompt_tokens, reply.completion_tokens)) else None


def keep(path: Path, reply: Reply) -> None:
    """Write a reply's file, whole or not at all. Raises JournalError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", encoding="utf-8", delete=False) as file:
            try:
                json.dump(vars(reply), file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; the reply is not kept") from error


# ---------------------------------------------------------------- who is asked


def connect(
    endpoint: str | None, judge_model: str | None, max_tokens: int = 1024, timeout: float = Endpoint.timeout
) -> Endpoint:
    """The endpoint at an address, by default the environment's OPENAI_BASE_URL, with the environment's key. Raises
    ChatError naming what is missing.
    """
    url = endpoint or os.environ.get(ADDRESS, "")
    if not url:
        raise ChatError(f"no endpoint: give --endpoint URL or set {ADDRESS}")
    return Endpoint(url, judge_model or "", os.environ.get(KEY, "").strip(), max_tokens, timeout=timeout)
