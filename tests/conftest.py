"""What several tests share: a small world, random models, and a policy that has learned the form of a response.

transformers and accelerate, which take seconds to import, are imported where they are needed: the formulas do without.
"""

# ruff: noqa: E402 (some things are set before the imports that they are for)

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

# Before they are read: no test asks the hub for a name that is no folder, or lets OpenMP's threads wait at full speed.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
gc.disable()  # until all is imported, of which nothing is garbage

import pytest
import torch
from processes import exit_codes_of, meeting_place, tell_when_stopped

import config as configuration
from report import drawing

if TYPE_CHECKING:
    from annotations.rows import Sample
    from rollout import Group

ROOT = Path(__file__).resolve().parents[1]
# What a program reads without effect: greedy answers have no temperature; supervised training has no reference, and
# one mini-batch per step.
WITHOUT_EFFECT = {
    "sft": (
        "kl",
        "zoom_judge",
        "beta",
        "beta_time",
        "reference_device",
        "updates_per_rollout",
        "temperature",
        "grounding",
        "zoom_reward",
    ),
    "evaluate": ("temperature", "train_vision"),
    "infer": ("temperature", "train_vision"),
    "filters": ("train_vision",),
    "exemplars": ("train_vision",),
}
RECIPE = """
model: {model}
out: {out}
train_data: {train}
test_data: {test}
video_root: {root}
template: world
system_prompt: ""
fps: 1
zoom_fps: 2
budget: 176
v_min: 4
v_max: 16
steps: 2
prompts_per_step: 4
prompts_per_pass: 2
group_size: 4
max_tokens: 40
tokenadv: code
lr: 1.0e-3
warmup: 1
schedule: constant
mixed_precision: "no"
gradient_checkpointing: false
tracker: none
n_episodes: 1
threads: 1
"""


def pytest_collection_finish() -> None:
    """From here on garbage is collected, and not looked for among what was imported; least of all at the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _short_names():
    """transformers spells out the configuration of every model that it loads for its log, which nobody sees here."""
    with pytest.MonkeyPatch.context() as patch:
        if loaded := sys.modules.get("transformers.configuration_utils"):
            patch.setattr(loaded.PreTrainedConfig, "__repr__", object.__repr__)
        yield


@pytest.fixture(autouse=True)
def _unpainted(request, monkeypatch):
    """Pictures are painted only where a test is about them, and curves of the same figures are composed once: a run
    would take a second or two for them.
    """
    if "report" not in request.path.parts and not request.node.get_closest_marker("painted"):
        monkeypatch.setattr(drawing, "save_figure", left_out)
        if watch := sys.modules.get("harness.watch"):
            monkeypatch.setattr(watch, "plot_curves", composed_once(watch.plot_curves))


def left_out(drawn: object, out: str | Path) -> None:
    """In place of a picture: an empty file."""
    Path(out).touch()


COMPOSED: set[tuple] = set()  # how many rows, of which figures


def composed_once(plot: Callable) -> Callable:
    """The function that draws a run's curves, which a run with the same figures leaves out."""
    from report.curves import read_metrics

    def compose(runs: list[Path], out: Path) -> None:
        rows = read_metrics(runs[0] / "metrics.jsonl")
        figures = len(rows), *sorted({name for row in rows for name in row})
        if figures in COMPOSED:
            Path(out).touch()
        else:
            plot(runs, out)
            COMPOSED.add(figures)

    return compose


@pytest.fixture(autouse=True)
def _programs_read_what_they_offer(monkeypatch):
    """A program whose code reads an option that it does not offer fails the test that runs it."""
    reader: list[str | None] = [None]
    parse_with = configuration.parse_with

    def parse_and_note(extra, arguments=None, *recipe_and_program, **named):
        reader[0] = named.get("program") or (recipe_and_program[1:] or [None])[0]
        return parse_with(extra, arguments, *recipe_and_program, **named)

    def read(config, name):
        about = configuration.OPTIONS.get(name)
        if about and reader[0] and reader[0] not in about["used_by"] and name not in WITHOUT_EFFECT.get(reader[0], ()):
            file = Path(sys._getframe(1).f_code.co_filename)
            ours = file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests") and file.name != "config.py"
            assert not ours, f"{reader[0]}.py reads {name} in {file.name}, and config.py does not say so"
        return object.__getattribute__(config, name)

    monkeypatch.setattr(configuration, "parse_with", parse_and_note)
    monkeypatch.setattr(configuration.Config, "__getattribute__", read)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Runs in one process may differ in precision."""
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    """Forget which process this is and how it computes."""
    if state := sys.modules.get("accelerate.state"):
        for kept in (state.AcceleratorState, state.GradientState, state.PartialState):
            kept._reset_state()


@pytest.fixture(scope="session")
def tokenizer():
    from world import lessons, tiny

    return tiny.build_tokenizer(lessons.corpus())


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    from policy import Vocabulary

    return Vocabulary.of(tokenizer)


def loud_model(tokenizer, seed: int = 0, family: str = "qwen2_5_vl", **options):
    """A tiny model whose random weights are as large as trained ones, so that attention matters."""
    from talking import shallow

    model = shallow(tokenizer, seed, family, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_((1.0 if "norm" in name or "ln_q" in name else 0.0) + 0.3 * noise)
            else:
                p.copy_(noise * (2.0 / p[0].numel() ** 0.5 if "embed_tokens" not in name else 1.0))
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny policy whose choices are clear."""
    return loud_model(tokenizer)


@pytest.fixture(scope="session")
def model64(tokenizer):
    return loud_model(tokenizer).double()


@pytest.fixture
def scene(vocabulary, model64):
    """Two prompts of different length with clips, and three responses of different lengths each."""
    from passes import CLIP, random_responses, random_video

    from policy import build_prompt

    prompts = [
        build_prompt(vocabulary.ids(f"{CLIP} red <think>"), [random_video(0, 4, 56, 84)], model64.config),
        build_prompt(vocabulary.ids(f"a b c {CLIP} blue"), [random_video(1, 2, 28, 56)], model64.config),
    ]
    ids, mask = random_responses(2, [[5, 1, 7], [3, 7, 2]], len(vocabulary.tokenizer))
    return prompts, ids, mask


@pytest.fixture
def exact_norm(monkeypatch):
    """transformers computes this norm in float32 whatever the type, which rounds states and gradients too."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", norm)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this name that `make` fills, in whichever of the processes that run the tests needs it first."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own in that of the run
        base = base.parent
    with (base / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            (part := base / f"{name}.part").mkdir()
            make(part)
            part.rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> dict[str, Path]:
    """The annotation files of a small built-in world: {"train": path, "test": path}."""
    from world import benchmark

    def build(root: Path) -> dict[str, Path]:
        return {s: benchmark.build(root, s, n, workers=1) for s, n in (("train", 6), ("test", 3))}

    return build(made_once(tmp_path_factory, "world", build))


@pytest.fixture(scope="module")
def samples(small_world) -> list[Sample]:
    """The small world's training samples."""
    from annotations.samples import read_samples

    return read_samples(small_world["train"], video_root=small_world["train"].parent)


@pytest.fixture(scope="session")
def talker(tmp_path_factory, tokenizer, vocabulary) -> Path:
    """A checkpoint that writes well-formed responses with arbitrary letters and spans, whatever it sees: its rewards
    vary.
    """
    from talking import teach

    return made_once(tmp_path_factory, "talker", lambda folder: teach(folder, tokenizer, vocabulary))


@pytest.fixture
def recipe(tmp_path, talker, small_world) -> Path:
    """A recipe for a run of two small steps on one core; its output goes to `tmp_path / "run"`."""
    path = tmp_path / "recipe.yaml"
    values = {"model": talker, "out": tmp_path / "run", "train": small_world["train"], "test": '""'}
    values["root"] = small_world["train"].parent
    path.write_text(RECIPE.format(**values))
    return path


@pytest.fixture
def config(recipe):
    """What `recipe` says; modules that want more have a fixture of this name."""
    return configuration.parse(["--config", str(recipe)])


def roll_out_episodes(model, views, config, vocabulary, step: int | None) -> list[Group]:
    """Groups of episodes in the environment that the template has."""
    from episodes import environments
    from rollout import roll_out

    return roll_out(model, views, config, vocabulary, step, environments=environments(views, config))


def pay(groups, config) -> None:
    """Rewards and advantages, as the loop has them."""
    from advantage import credit
    from rewards import facets

    for group in groups:
        group.rewards = facets(group, config)
        group.advantages = credit(group, config)


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read_nearly(path: Path) -> list[dict]:
    """JSON lines whose numbers equal others up to 2e-6: in another process, sums are rounded otherwise."""

    def near(number: str):
        return pytest.approx(float(number), abs=2e-6)

    return [json.loads(line, parse_float=near) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where `numbered.get` writes its videos, each once."""
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def plain(folder) -> Path:
    """A file of 60 frames at 25 fps with B-frames."""
    from tests.numbered import get

    return get(folder, "b.mp4")


def drop_weights(folder: Path, part: str) -> None:
    """Delete the weights with `part` in their name from a checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if part not in k}, folder / "model.safetensors", {"format": "pt"})


def drop_video_token(folder: Path) -> None:
    """Rename `<|video_pad|>` in a checkpoint's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|video_pad|>", "<|something|>"))


def exit_codes(work: Callable[[int], None], count: int = 1) -> list[int]:
    """How `count` forks of this process end that do work(rank), negative for a signal; they have imported all that they
    need. For programs that train nothing: autograd's threads do not survive a fork.
    """

    def begin(rank: int) -> None:
        tell_when_stopped()
        reset_accelerate()
        work(rank)

    forks = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(count)]
    for fork in forks:
        fork.start()
    return exit_codes_of(forks)


def run_in_two_processes(script: str, function: str, arguments: list[str], folder: Path) -> list[list[str]]:
    """Run a script in two processes; the ids of what each of them has passed to the function."""
    module = importlib.import_module(script)
    call = getattr(module, function)

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= place

        def noted(*arguments, **options):
            passed = [one for a in arguments for one in (a if isinstance(a, list) else [a]) if hasattr(one, "id")]
            with open(folder / f"asked-{rank}", "a") as file:
                file.writelines(f"{one.id}\n" for one in passed)
            return call(*arguments, **options)

        setattr(module, function, noted)
        module.main([*arguments, "--threads", "1"])

    with meeting_place() as place:
        assert exit_codes(work, 2) == [0, 0]
    return [(folder / f"asked-{rank}").read_text().split() for rank in range(2)]


# The browser's clock jumps ahead when the page is idle, also while a video is being decoded; this keeps it busy.
SPIN = """
const untitled = document.title;
let work = 0;
const spin = setInterval(() => {
  for (let k = 0; k < 1e6; k++) work += Math.sqrt(k);
  if (document.title !== untitled) clearInterval(spin);
}, 1);
// A player seeks and presents pictures when it can, so one look proves nothing: what `read` returns, once it has been
// as `expected` eight looks in a row, or after 12 s whatever it is then.
const settled = async (read, expected) => {
  let found, row = 0;
  for (const end = performance.now() + 12000; row < 8 && performance.now() < end;) {
    await new Promise(done => setTimeout(done, 20));
    found = read();
    row = found === expected ? row + 1 : 0;
  }
  return found;
};
"""


def page_in_browser(page: Path, script: str) -> str:
    """What a script at the page's end has written into document.title, after at most 20 s of the page's clock."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page in")
    page.write_text(page.read_text().replace("</body>", f"<script>{SPIN}{script}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=20000"
    command = [browser, *flags.split(), f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    title = re.search("<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr
    return title[1]


# ---------------------------------------------------------------- a chat endpoint


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer, closing: threading.Event) -> Iterator[ThreadingHTTPServer]:
    """A server at work in a thread of its own; `closing` frees requests that it keeps waiting, at the end."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def completion(text: str | None, **more) -> str:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text, **more}}], "usage": usage})


@pytest.fixture
def server():
    """A server that goes through a list of (status, body, headers); status 0 cuts the connection, -1 cuts the body,
    -2 says nothing until the client has given up, -3 sends the body byte by byte, -4 header lines and -5 promises of a
    reply without end. What it was sent is in `bodies`, `paths` and `keys`.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            here.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            here.paths.append(self.path)
            here.keys.append(self.headers["Authorization"])
            status, body, headers = here.answers.pop(0) if here.answers else (200, completion("fine"), {})
            if status == -2:
                here.given_up.wait(20)
            if status in (0, -2):
                self.close_connection = True
                return
            if status in (-4, -5):
                begin, more = (
                    (b"HTTP/1.1 200 OK\r\n", b"a") if status == -4 else (b"", b"HTTP/1.1 100 Continue\r\n\r\n")
                )
                with contextlib.suppress(OSError):
                    self.wfile.write(begin)
                    while not here.given_up.wait(0.02):
                        self.wfile.write(more)
                        self.wfile.flush()
                return
            sent = body.encode()
            self.send_response_only(abs(status) if status > 0 else 200)
            for name, value in {"Content-Length": len(sent), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if status == -3:
                with contextlib.suppress(OSError):  # the client has given up
                    for k in range(len(sent)):
                        self.wfile.write(sent[k : k + 1])
                        self.wfile.flush()
                        here.given_up.wait(0.2)
                return
            self.wfile.write(sent[: len(sent) // 2] if status == -1 else sent)

        def log_message(self, *_):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.answers, here.bodies, here.paths, here.keys = [], [], [], []
    here.given_up = threading.Event()
    here.url = f"http://127.0.0.1:{here.server_port}/v1"
    with serving(here, here.given_up):
        yield here
