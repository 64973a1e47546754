"""What a run keeps: nothing of it is code, and no kill, damage or leftover makes another run of it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import config as configuration
import scenes
import sft
import train
from config import Config
from engine.loading import load
from evaluate import stored_before
from harness import checkpoints
from harness.checkpoints import OWNED, prepare_folder, read_progress, save_checkpoint, settle
from harness.log import keep_metrics
from harness.run import TrainingError
from harness.setup import load_run, new_scheduler
from policy import ModelError
from report.results import write_results
from world import lessons

MAIN = SimpleNamespace(is_main_process=True)


def save_of(out: Path, step: int, end: str = "") -> None:
    """The two folders of a complete save, in little."""
    for name in ("checkpoint", "state"):
        (out / f"{name}{end}").mkdir(parents=True)
        (out / f"{name}{end}" / "weights").write_text(str(step))
    progress = {"step": step, "drawn": 0, "failures": 0, "updates": step}
    (out / f"state{end}" / "step.json").write_text(json.dumps(progress))


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    pass


@contextmanager
def killed_before(number: int):
    """Renaming and deleting are ended before the operation of this number."""
    left = [number]
    rename, rmtree = Path.rename, shutil.rmtree

    def counted(operation, *arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return operation(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", lambda *a: counted(rename, *a))
        patched.setattr(shutil, "rmtree", lambda *a: counted(rmtree, *a))
        with suppress(Killed):
            yield


def test_a_complete_save_survives_any_two_kills_while_it_is_put_in_its_place(tmp_path):
    for first, second in product(range(7), repeat=2):
        out = tmp_path / f"{first}-{second}"
        save_of(out, 1)
        save_of(out, 2, ".part")
        for number in (first, second):
            with killed_before(number):
                settle(out)
        settle(out)
        assert read_progress(out)["step"] == 2
        assert (out / "checkpoint" / "weights").read_text() == "2"
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "state"]


def test_the_first_save_survives_them_too_and_half_a_save_never_counts(tmp_path):
    for number in range(4):
        out = tmp_path / str(number)
        save_of(out, 2, ".part")
        with killed_before(number):
            settle(out)
        settle(out)
        assert read_progress(out)["step"] == 2
    out = tmp_path / "half"
    save_of(out, 1)
    save_of(out, 2, ".part")
    (out / "state.part" / "step.json").unlink()
    settle(out)
    assert read_progress(out)["step"] == 1 and (out / "checkpoint" / "weights").read_text() == "1"


# ---------------------------------------------------------------- replacing and resuming


@pytest.mark.parametrize("left", ["state", "state.old", "state.part"])
def test_nothing_of_a_replaced_run_can_be_resumed(recipe, tmp_path, monkeypatch, left):
    """End to end: a run, killed where its state has this name; --overwrite, which fails before it saves; --resume."""
    out = tmp_path / "run"
    save_of(out, 1)
    (out / "state").rename(out / left)
    for name in ("metrics.jsonl", "episodes.html", "evaluation.json", "results-before.jsonl", "curves.png"):
        (out / name).write_text("of the run before")
    (out / "mine.txt").write_text("kept")

    def failing(*_):
        raise TrainingError("no model today")

    monkeypatch.setattr(train, "load_run", failing)
    with pytest.raises(TrainingError, match="no model today"):
        train.main(["--config", str(recipe), "--overwrite"])
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "mine.txt"]
    with pytest.raises(TrainingError, match="no checkpoint to resume from; run without --resume to begin"):
        train.main(["--config", str(recipe), "--resume"])


def test_the_advice_of_a_folder_without_a_checkpoint_does_not_lead_in_a_circle(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    config = Config(out=str(out))
    with pytest.raises(TrainingError, match="holds a run that has no checkpoint yet: replace it with --overwrite"):
        prepare_folder(config, out)
    with pytest.raises(TrainingError, match="no checkpoint to resume from; begin it anew with --overwrite"):
        prepare_folder(replace(config, resume=True), out)
    prepare_folder(replace(config, overwrite=True), out)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_scores_of_fewer_steps_do_not_stay_beside_more(tmp_path):
    save_of(tmp_path, 2)
    (tmp_path / "evaluation.json").write_text("of 2 steps")
    for steps, there in ((2, True), (3, False)):
        prepare_folder(Config(out=str(tmp_path), steps=steps, resume=True), tmp_path)
        assert (tmp_path / "evaluation.json").exists() == there


def test_lessons_do_not_write_over_a_checkpoint_unasked(tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(lessons, "teach", lambda config, _: taught.append(config))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"has config\.json: write over it with --overwrite"):
        sft.main(["--steps", "2", "--out", str(tmp_path)])
    assert not taught
    sft.main(["--steps", "2", "--out", str(tmp_path), "--overwrite"])
    assert len(taught) == 1


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"step": 1, "dra', "Unterminated string"),
        (b"\xff\xfe", "decode"),
        (b"[1]", "list"),
        (b'{"step": "one"}', "invalid literal"),
        (b'{"step": 1, "drawn": 4, "failures": 0}', "does not tell updates"),  # as versions before had it
        (b'{"step": -5, "drawn": 4, "failures": 0, "updates": 1}', "step = -5 cannot be"),
        (b'{"step": 1, "drawn": 1e999, "failures": 0, "updates": 1}', "infinity"),
        (b"[" * 100_000, "recursion"),
        (None, "No such file"),
    ],
)
def test_a_damaged_state_is_one_line_with_a_way_on(tmp_path, content, words):
    save_of(tmp_path, 1)
    if content is None:
        (tmp_path / "state" / "step.json").unlink()
    else:
        (tmp_path / "state" / "step.json").write_bytes(content)
    with pytest.raises(TrainingError) as found:
        prepare_folder(Config(out=str(tmp_path), resume=True), tmp_path)
    said = str(found.value)
    assert words in said and said.count("\n") == 0
    assert f"begin anew with --overwrite, or from its weights with --model {tmp_path}/checkpoint" in said


@pytest.mark.parametrize("content", [None, b"\xff\xfe: 1\n", b"out: runs/x\nstep", b""])
def test_without_a_readable_config_yaml_the_command_line_counts(tmp_path, caplog, content):
    save_of(tmp_path, 1)
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    prepare_folder(Config(out=str(tmp_path), lr=0.5, resume=True), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the options of this command line count, and are written there anew" in line
    assert configuration.read_recipe(tmp_path / "config.yaml")["lr"] == 0.5


def test_lines_of_metrics_are_kept_by_their_step_and_lost_ones_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 0}', b"\xff\x00\xfe", b'{"step": 3}', b"[3]", b'{"step": 3, "again": 1}', b'{"step": 4}']
    lines.insert(1, b"[" * 100_000)
    path.write_bytes(b"\n".join(lines))
    keep_metrics(path, 4, MAIN)
    assert path.read_bytes() == b'{"step": 0}\n{"step": 3, "again": 1}\n'
    assert "no line that can be read for steps [1, 2]" in caplog.text


@pytest.mark.parametrize("kept", [0, 0.5, 1, None])
def test_rows_before_training_that_are_not_whole_are_asked_anew(tmp_path, samples, caplog, kept):
    path = tmp_path / "results-before.jsonl"
    rows = [
        {"id": s.id, "video": s.video, "question": s.question, "answer": "A", "predicted": None, "spans": None}
        for s in samples
    ]
    write_results(path, rows)
    if kept is None:
        path.unlink()
    elif kept < 1:
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    found = stored_before(path, samples)
    assert (found is not None) == (kept == 1)
    assert ("the model before training is evaluated anew" in caplog.text) == (kept != 1)


# ---------------------------------------------------------------- further names


@pytest.fixture
def kept(tmp_path):
    """A run evaluated at step 2, which was killed after its save and before anything was kept."""
    save_of(tmp_path, 2)
    step = tmp_path / "state" / "step.json"
    step.write_text(json.dumps(json.loads(step.read_text()) | {"mIoU": 0.5}))
    return Config(out=str(tmp_path), resume=True, keep_best="mIoU", keep_checkpoints=1)


def test_a_resumed_run_keeps_what_a_kill_after_the_save_has_left_out(kept, tmp_path):
    for _ in range(2):
        prepare_folder(kept, tmp_path)
        for name in ("checkpoint-2", "checkpoint-best"):
            assert (tmp_path / name / "weights").read_text() == "2"
        assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "metric": "mIoU", "score": 0.5}


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ('{"step": 1, "metric": "mIoU", "score": 0.6}', 1),
        ('{"step": 1, "metric": "mIoU", "score": 0.4}', 2),
        ('{"step": 1, "metric": "accuracy", "score": 0.6}', 2),  # of another metric, which a resumed run may name
        ('{"step": 1, "metric": "mIoU", "sc', 2),
        ('{"step": 1, "metric": "mIoU"}', 2),
        ('{"step": 1, "metric": "mIoU", "score": null}', 2),
        ("[1]", 2),
        ("", 2),
    ],
)
def test_a_best_checkpoint_that_is_not_known_to_be_better_is_replaced(kept, tmp_path, caplog, content, step):
    (tmp_path / "best.json").write_text(content)
    prepare_folder(kept, tmp_path)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == step
    damaged = "score" not in content or "null" in content
    assert ("best.json: cannot be read" in caplog.text) == damaged


def test_only_the_run_s_own_checkpoints_are_deleted(kept, tmp_path):
    names = {"checkpoint-1": False, "checkpoint-best": False, "checkpoint-3.part": False, "checkpoint-mine": True}
    for name in (*names, "checkpoint-²"):
        (tmp_path / name).mkdir()
    prepare_folder(kept, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-[0-9²]")) == ["checkpoint-2", "checkpoint-²"]
    prepare_folder(replace(kept, resume=False, overwrite=True), tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


# ---------------------------------------------------------------- a run


@pytest.fixture
def run(recipe, tmp_path):
    """A run before its first step, without a reference."""
    (tmp_path / "run").mkdir()
    config = configuration.parse(["--config", str(recipe), "--kl", "none", "--out", str(tmp_path / "run")])
    return load_run(config, Accelerator(cpu=True))


def updated(run) -> None:
    """An update on some loss."""
    sum(weight.square().sum() for weight in run.policy.parameters()).backward()
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()


def test_weights_moments_and_learning_rate_come_back_to_the_bit(run):
    run.config.warmup = 8
    for _ in range(3):
        updated(run)
    save_checkpoint(run, {"step": 3, "drawn": 12, "failures": 1})
    saved = {name: value.clone() for name, value in checkpoints.held_tensors(run).items()}
    rate = run.scheduler.get_last_lr()
    updated(run)
    after = {name: value.clone() for name, value in checkpoints.held_tensors(run).items()}
    run.optimizer.state.clear()
    assert checkpoints.resume(run) == {"step": 3, "drawn": 12, "failures": 1, "updates": 3}
    found = checkpoints.held_tensors(run)
    assert saved.keys() == found.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert run.scheduler.get_last_lr() == rate and run.optimizer.param_groups[0]["lr"] == rate[0]
    updated(run)
    assert all(torch.equal(value, after[name]) for name, value in checkpoints.held_tensors(run).items())


def test_moments_of_any_shape_and_steps_that_are_integers_come_back(run):
    """As an optimiser in 8 bits has them."""
    first = next(run.policy.parameters())
    absmax = torch.arange(5, dtype=torch.float32)
    run.optimizer.state[first] = {"step": 7, "state1": torch.ones_like(first, dtype=torch.uint8), "absmax1": absmax}
    save_checkpoint(run, {"step": 1, "drawn": 4, "failures": 0})
    run.optimizer.state.clear()
    checkpoints.resume(run)
    (found,) = run.optimizer.state.values()
    assert found["step"] == 7 and isinstance(found["step"], int) and torch.equal(found["absmax1"], absmax)
    assert found["state1"].dtype == torch.uint8 and found["state1"].shape == first.shape and found["state1"].all()


def test_a_full_disk_ends_a_save_with_one_line_and_what_was_saved_stays(run, tmp_path):
    updated(run)
    save_checkpoint(run, {"step": 1, "drawn": 4, "failures": 0})
    whole = max(file.stat().st_size for file in (tmp_path / "run" / "state").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (1000, 2 * whole // 5, whole - 1000):  # the state has three times as many bytes as the checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(TrainingError, match=r"state\.part: cannot be written: .*File too large") as found:
                save_checkpoint(run, {"step": 2, "drawn": 8, "failures": 0})
            assert "\n" not in str(found.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    settle(tmp_path / "run")
    assert checkpoints.resume(run)["step"] == 1


# ---------------------------------------------------------------- strangers


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def hostile_files(mark: Path, folder: Path) -> list[bytes]:
    """A pickle that makes the folder `mark`: alone, as torch.save has it, and in an array."""
    torch.save({"a": Hostile(mark)}, folder / "one")
    np.save(folder / "two", np.array([Hostile(mark)], dtype=object))
    return [pickle.dumps(Hostile(mark)), (folder / "one").read_bytes(), (folder / "two.npy").read_bytes()]


def test_a_pickle_in_the_state_is_never_run(run, tmp_path):
    """In each of its files, and under each name that accelerate and torch would unpickle."""
    updated(run)
    save_checkpoint(run, {"step": 1, "drawn": 4, "failures": 0})
    state = tmp_path / "run" / "state"
    names = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin", "scheduler.bin"]
    names += [".metadata", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "sampler.bin", "scaler.pt"]
    own = [path.name for path in state.iterdir()]
    for content in hostile_files(tmp_path / "mark", tmp_path):
        for name in names:
            (state / name).parent.mkdir(exist_ok=True)
            (state / name).write_bytes(content)
        assert checkpoints.resume(run)["step"] == 1
        for name in own:
            before = (state / name).read_bytes()
            (state / name).write_bytes(content)
            with pytest.raises(TrainingError, match="cannot be read") as found:
                checkpoints.resume(run)
            assert "\n" not in str(found.value)
            (state / name).write_bytes(before)
    assert len(own) == 2 and not (tmp_path / "mark").exists()


def test_a_pickle_in_a_checkpoint_is_never_run(run, tmp_path, talker):
    for content in hostile_files(tmp_path / "mark", tmp_path):
        for path in talker.iterdir():
            copied = tmp_path / "copy"
            shutil.copytree(talker, copied)
            (copied / path.name).write_bytes(content)
            if path.name not in ("generation_config.json", "chat_template.jinja"):
                with pytest.raises(ModelError):
                    load(str(copied))
            if path.suffix == ".safetensors":  # the same under the name that is unpickled
                (copied / path.name).rename(copied / "pytorch_model.bin")
                with pytest.raises(ModelError):
                    load(str(copied))
            shutil.rmtree(copied)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_a_run_s_other_files_and_in_the_cache_is_never_run(tmp_path, samples, model64):
    shots, kept = [(0.0, 2.0), (2.0, 4.0)], tmp_path / "shots"
    video = samples[0].video
    features = scenes.shot_features(model64, video, shots, 4, kept)
    (file,) = kept.iterdir()
    for content in hostile_files(tmp_path / "mark", tmp_path):
        file.write_bytes(content)
        assert torch.equal(scenes.shot_features(model64, video, shots, 4, kept), features)
        save_of(tmp_path / "run", 1)
        for name in ("config.yaml", "metrics.jsonl", "results-before.jsonl"):
            (tmp_path / "run" / name).write_bytes(content)
        keep_metrics(tmp_path / "run" / "metrics.jsonl", 1, MAIN)
        assert stored_before(tmp_path / "run" / "results-before.jsonl", samples) is None
        prepare_folder(Config(out=str(tmp_path / "run"), resume=True), tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "mark").exists()


def test_code_that_a_checkpoint_brings_is_never_run(tmp_path, talker):
    copied, mark = tmp_path / "copy", tmp_path / "mark"
    shutil.copytree(talker, copied)
    (copied / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    for name, classes in (("config.json", ("AutoConfig",)), ("tokenizer_config.json", ("AutoTokenizer",))):
        fields = json.loads((copied / name).read_text()) | {"auto_map": {one: "evil.Evil" for one in classes}}
        (copied / name).write_text(json.dumps(fields))
        with suppress(ModelError):
            load(str(copied))
        fields |= {"model_type": "evil", "tokenizer_class": "Evil"}  # no class of this name is known
        (copied / name).write_text(json.dumps(fields))
        with pytest.raises(ModelError):
            load(str(copied))
    assert not mark.exists()


def test_all_that_save_checkpoint_writes_is_owned_and_is_tensors_and_text(run, tmp_path):
    save_checkpoint(run, {"step": 0, "drawn": 0, "failures": 0})
    assert {path.name for path in (tmp_path / "run").iterdir()} <= set(OWNED)
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".yaml", ".md"}
    (shard,) = (tmp_path / "run" / "state").glob("*.safetensors")
    assert not [name for name in load_file(shard) if "/" in name]  # there are no moments before the first update


# ---------------------------------------------------------------- moments in 8 bits


class Moments8bit(torch.optim.Optimizer):
    """AdamW as bitsandbytes keeps its moments: those of large weights in bytes that stand for the values of a table all
    weights share, one scale per 256; a Python integer counts the steps.
    """

    def __init__(self, weights, lr: float, weight_decay: float):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999)})
        self.tables = [torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256) ** 2]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, self.state[weight], group)

    def move(self, weight, state, group):
        state["step"] = count = state.get("step", 0) + 1
        moments = []
        for k, (beta, value) in enumerate(zip(group["betas"], (weight.grad, weight.grad**2), strict=True), 1):
            moment = beta * self.read(state, k, weight) + (1 - beta) * value
            moments.append(moment / (1 - beta**count))
            self.write(state, k, moment)
        weight -= group["lr"] * (moments[0] / (moments[1].sqrt() + 1e-8) + group["weight_decay"] * weight)

    def read(self, state, k, weight):
        if f"state{k}" not in state:
            return torch.zeros_like(weight)
        if weight.numel() < 4096:
            return state[f"state{k}"]
        values = state[f"qmap{k}"][state[f"state{k}"].long()].flatten().split(256)
        return torch.cat([v * s for v, s in zip(values, state[f"absmax{k}"], strict=True)]).view_as(weight)

    def write(self, state, k, moment):
        if moment.numel() < 4096:
            state[f"state{k}"] = moment
            return
        blocks = moment.flatten().split(256)
        state[f"absmax{k}"] = torch.stack([block.abs().max() for block in blocks])
        scaled = torch.cat([b / s.clamp(min=1e-30) for b, s in zip(blocks, state[f"absmax{k}"], strict=True)])
        state[f"qmap{k}"] = table = self.tables[k - 1]
        state[f"state{k}"] = torch.bucketize(scaled, table).clamp(max=255).to(torch.uint8).view_as(moment)


def of_bitsandbytes():
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit


@pytest.mark.parametrize("kind", [lambda: Moments8bit, of_bitsandbytes], ids=["stand-in", "bitsandbytes"])
def test_an_optimizer_in_8_bits_goes_on_to_the_bit(run, kind):
    eight_bits = kind()

    def begin() -> None:
        weights = [weight for weight in run.policy.parameters() if weight.requires_grad]
        run.optimizer = run.accelerator.prepare_optimizer(eight_bits(weights, lr=0.01, weight_decay=0.01))
        run.scheduler = new_scheduler(run.optimizer.optimizer, run.config)

    begin()
    for _ in range(2):
        updated(run)
    save_checkpoint(run, {"step": 2, "drawn": 8, "failures": 0})
    saved = {name: value.clone() for name, value in checkpoints.held_tensors(run).items()}
    updated(run)
    after = {name: value.clone() for name, value in checkpoints.held_tensors(run).items()}
    begin()
    checkpoints.resume(run)
    found = checkpoints.held_tensors(run)
    assert saved.keys() == found.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    kinds = {name.rpartition("/")[2]: value.dtype for name, value in sorted(found.items()) if "/" in name}
    assert kinds.keys() == {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}
    assert torch.uint8 in {value.dtype for value in found.values()} and kinds["step"] == torch.int64
    updated(run)
    assert all(torch.equal(value, after[name]) for name, value in checkpoints.held_tensors(run).items())
