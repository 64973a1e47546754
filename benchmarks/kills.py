"""Runs that are killed (kill -9) again and again, and go on: is the end that of a run that nothing has stopped?

    python -m benchmarks.kills                       # all modes, to benchmarks/results/kills.md
    python -m benchmarks.kills --modes one saves --kills 40 --folder /tmp/kills
    python -m benchmarks.kills --modes memory        # 2,000 short steps in one process

A mode is a program in small; its reference is never interrupted. Each trial is killed at random moments, in CPU
seconds, so that what else the machine does changes nothing, or before a file operation drawn at random. After a kill it
does what the program's own messages say (--resume, or --overwrite without a checkpoint), until it ends. Then everything
but times must be the reference's, to the bit, and no process may have printed a traceback. Every process is forked from
one that has done the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import deserialize

import curate
import infer
import train
from advantage import RewardError
from annotations.rows import DataError
from harness import commands
from harness.run import program
from media.file import VideoError
from policy import ModelError
from report import ReportError
from world import benchmark, films

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--steps 4 --prompts_per_step 2 --group_size 2 --max_tokens 40 --save_every 1 --n_episodes 1 --tracker none"
SMALL += " --threads 1 --eval_controls false --lr 1e-3 --warmup 1"
TIMES = ("seconds", "visual_tokens_per_second", "text_tokens_per_second")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2_5_VLDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}
EXPECTED = (DataError, ModelError, RewardError, VideoError, ReportError, curate.CurateError)
MEMORY_AT = (100, 500, 1000, 1500, 2000)  # steps


@dataclass(frozen=True)
class Mode:
    """What is killed: a program's main, its arguments, and what it leaves, compared. `at`: parts of the names of files
    before whose making, renaming or deletion it is killed; without any, at moments in CPU seconds.
    """

    main: Callable[[list[str]], None]
    arguments: Callable[[Path], list[str]]
    left: Callable[[Path], object]
    processes: int = 1
    sharded: bool = False
    at: tuple[str, ...] = ()
    resumes: bool = True


@dataclass
class Kill:
    """When the processes are killed: after CPU seconds, or before the n-th file operation on names with these parts."""

    seconds: float = 0.0
    operation: int = 0
    at: tuple[str, ...] = ()
    alone: bool = False  # one of several processes; the others end by themselves


# ---------------------------------------------------------------- one attempt


def attempt(mode: Mode, arguments: list[str], log: Path, kill: Kill | None = None, limit: int = 0) -> int:
    """Run the program in forked processes to its end or the kill's. Returns the main process' status: an exit code, or
    minus a signal. limit: bytes that a file may have, 0: any.
    """
    port = free_port()
    children = []
    for rank in range(mode.processes):
        child = os.fork()
        if child == 0:
            meet = kill if kill is None or rank == 0 or not kill.alone else None
            run_child(mode, arguments, log, rank, port, meet, limit)
        children.append(child)
    statuses = [wait(child) for child in children[:1]]
    for child in children[1:]:
        if kill is not None and not kill.alone:
            os.kill(child, signal.SIGKILL)
        statuses.append(wait(child))
    return statuses[0]


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_child(mode: Mode, arguments: list[str], log: Path, rank: int, port: int, kill: Kill | None, limit: int) -> None:
    """The forked process: the program, with what it prints in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if mode.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(mode.processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(mode.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if mode.sharded:  # accelerate shards on GPUs only, so it is told that it has some
        os.environ |= FSDP
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, commands.leave)
    if kill is not None:
        arm(kill)
    code = 0
    try:
        program(lambda: mode.main(arguments), *EXPECTED)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if not isinstance(end.code, int) and end.code:
            print(end.code, flush=True)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arm(kill: Kill) -> None:
    """Have this process killed: by SIGKILL, or by the timer's signal, which nothing handles either."""
    if not kill.at:
        signal.setitimer(signal.ITIMER_PROF, kill.seconds)
        return
    left = [kill.operation]

    def watch(event: str, arguments: tuple) -> None:
        if named(event, arguments, kill.at):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def named(event: str, arguments: tuple, parts: tuple[str, ...]) -> bool:
    """Whether an audit event changes a file with one of these parts in its name."""
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
    return bool(changes) and any(part in str(one) for one in arguments[:2] for part in parts)


# ---------------------------------------------------------------- a trial


def command(mode: Mode, out: Path, said: str) -> list[str]:
    """What continues the work: as before, or as the last attempt has said."""
    last = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "")
    more = []
    if mode.resumes and out.exists():
        more = ["--resume"]
        if "no checkpoint to resume from" in last:
            more = ["--overwrite"] if "--overwrite" in last else []
    return [*mode.arguments(out), *more]


def trial(mode: Mode, folder: Path, rng: random.Random, kills: int, extent: float) -> dict:
    """One run that is killed up to `kills` times. extent: CPU seconds or file operations of one that is not."""
    out, log = folder / "out", folder / "log"
    done, said = {"kills": 0, "attempts": 0, "refused": 0}, ""
    while True:
        kill = None
        if done["kills"] < kills and done["attempts"] < 4 * kills:
            alone = mode.processes > 1 and rng.random() < 0.5
            if mode.at:
                kill = Kill(operation=rng.randint(1, max(1, round(extent))), at=mode.at, alone=alone)
            else:
                kill = Kill(seconds=rng.uniform(0.05, 1) * extent, alone=alone)
        start = log.stat().st_size if log.exists() else 0
        status = attempt(mode, command(mode, out, said), log, kill)
        done["attempts"] += 1
        said = log.read_text(errors="replace")[start:]
        if status < 0:
            done["kills"] += 1
        elif status == 0:
            break
        elif "no checkpoint to resume from" not in said:
            done["refused"] += 1
            if done["refused"] > 3:
                break
    done["tracebacks"] = log.read_text(errors="replace").count("Traceback")
    done["left"] = mode.left(out)
    return done


def measured(mode: Mode, folder: Path) -> tuple[float, object]:
    """The extent of a run that is not killed, and what it leaves."""
    out, log, counts = folder / "out", folder / "log", folder / "operations"
    if mode.at:
        child = os.fork()
        if child == 0:
            sys.addaudithook(lambda event, args: named(event, args, mode.at) and os.write(counter, b".") and None) if (
                counter := os.open(counts, os.O_WRONLY | os.O_CREAT)
            ) else None
            run_child(mode, mode.arguments(out), log, 0, free_port(), None, 0)
        status = wait(child)
        extent = float(counts.stat().st_size)
    else:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        status = attempt(mode, mode.arguments(out), log)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        extent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / mode.processes
    if status:
        sys.exit(f"the reference ended with {status}: {log.read_text(errors='replace')[-2000:]}")
    return extent, mode.left(out)


# ---------------------------------------------------------------- the modes


def rows_of(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in lines]


def tensors(state: Path) -> list[tuple]:
    """All tensors of a run's state: each may be in any process' file, and in any order."""
    read = (one for path in state.glob("*.safetensors") for one in deserialize(path.read_bytes()))
    return sorted((name, tuple(one["shape"]), bytes(one["data"])) for name, one in read)


def training_left(out: Path) -> dict:
    """All that a training run leaves, without times and pictures of times."""
    left: dict[str, object] = {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}
    left["metrics"] = rows_of(out / "metrics.jsonl")
    left["tensors"] = tensors(out / "state")
    for path in sorted(out.rglob("*")):
        apart = path.name in ("metrics.jsonl", "curves.png", "config.yaml") or (out / "state") in path.parents
        if path.is_file() and (not apart or path.name == "step.json"):
            left[str(path.relative_to(out))] = path.read_bytes()
    return left


def infer_left(out: Path) -> list[dict]:
    return sorted(rows_of(out), key=lambda row: row["id"])


def curate_left(out: Path) -> dict:
    journals = {name: sorted(map(str, rows_of(out / f"{name}.jsonl"))) for name in ("shots", "scenes", "unique")}
    return journals | {name: (out / name).read_bytes() for name in ("train.jsonl", "statistics.txt")}


def modes(data: Path) -> dict[str, Mode]:
    """The modes, on a small world in the folder."""
    world = benchmark.build(data, "train", 2, workers=1)
    test = benchmark.build(data, "test", 1, workers=1)
    long = films.build_long(data / "long", "train", 3, 0)
    common = ["--config", str(ROOT / "recipes" / "cpu_world.yaml"), *SMALL.split(), "--train_data", str(world)]
    common += ["--video_root", str(world.parent), "--cache", str(data)]

    def training(*more: str) -> Callable[[Path], list[str]]:
        return lambda out: [*common, "--out", str(out), *more]

    loop, scored = training("--test_data", ""), training("--test_data", str(test), "--steps", "1")
    infer_options = ["--test_data", str(world), "--video_root", str(world.parent), "--threads", "1"]
    infer_options += ["--cache", str(data)]
    return {
        "one": Mode(train.main, loop, training_left),
        "two": Mode(train.main, loop, training_left, processes=2),
        "fsdp2": Mode(train.main, loop, training_left, processes=2, sharded=True),
        "saves": Mode(train.main, loop, training_left, at=("state", "checkpoint", "config.yaml", "metrics.jsonl")),
        "pages": Mode(
            train.main, scored, training_left, at=("results-", "evaluation", ".png", ".html", "metrics.jsonl")
        ),
        "infer": Mode(
            infer.main, lambda out: [*infer_options, "--out", str(out)], infer_left, at=("out",), resumes=False
        ),
        "curate": Mode(
            curate.main,
            lambda out: ["--oracle", str(long), "--out", str(out), "--threads", "1", "--cache", str(data)],
            curate_left,
            at=("out",),
            resumes=False,
        ),
    }


ABOUT = {
    "one": "train.py, one process, at random moments",
    "two": "train.py, two processes: both killed, or one, and the other ends by itself",
    "fsdp2": "the same, sharded (FSDP2)",
    "saves": "train.py, before file operations of its saves",
    "pages": "train.py, before file operations of its scores, curves and pages",
    "infer": "infer.py on a data set, before file operations in its folder",
    "curate": "curate.py, before file operations in its folder",
}


def kill_matrix(mode: Mode, folder: Path, kills: int, seed: int) -> dict:
    """Trials until there were as many kills."""
    rng = random.Random(seed)
    (folder / "reference").mkdir(parents=True)
    extent, reference = measured(mode, folder / "reference")
    total = {"kills": 0, "attempts": 0, "refused": 0, "tracebacks": 0, "trials": 0, "equal": 0, "different": []}
    while total["kills"] < kills:
        place = folder / f"trial-{total['trials']}"
        place.mkdir()
        done = trial(mode, place, rng, min(8, kills - total["kills"]), extent)
        for name in ("kills", "attempts", "refused", "tracebacks"):
            total[name] += done[name]
        total["trials"] += 1
        if done["left"] == reference:
            total["equal"] += 1
            shutil.rmtree(place)
        else:
            total["different"].append(place.name)
        print(f"{folder.name}: { ({**total}) }", flush=True)
        if done["kills"] == 0 and total["trials"] > 10:
            break
    return total


# ---------------------------------------------------------------- a full disk, and damage


def full_disk(mode: Mode, folder: Path, seed: int, count: int) -> list[str]:
    """A line per size of a file system on which a run ends before its last step, and goes on when there is room."""
    (folder / "reference").mkdir(parents=True)
    _, reference = measured(mode, folder / "reference")
    rng, lines = random.Random(seed), []
    for number in range(count):
        place = folder / f"disk-{number}"
        place.mkdir()
        kilobytes = rng.randint(100, 26_000)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
        try:
            log = folder / f"log-{number}"
            status = attempt(mode, mode.arguments(place / "out"), log)
            errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
            again, words = 1, ""
            for _ in range(3):  # --resume; what that advises
                start = log.stat().st_size
                again = attempt(mode, command(mode, place / "out", words), log)
                words = log.read_text(errors="replace")[start:]
                if not again:
                    break
            equal = mode.left(place / "out") == reference
            traces = log.read_text(errors="replace").count("Traceback")
            lines.append(f"| {kilobytes:,} | {status} | {errors[0] if errors else ''} | {again} | {equal} | {traces} |")
            print(lines[-1].replace(str(place), "DISK"), flush=True)
            lines[-1] = lines[-1].replace(str(place), "DISK")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
    return lines


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state cut": lambda out: cut(next((out / "state").glob("shard-*"))),
    "state empty": lambda out: next((out / "state").glob("shard-*")).write_bytes(b""),
    "a shard is gone": lambda out: next((out / "state").glob("shard-*")).unlink(),
    "step.json cut": lambda out: cut(out / "state" / "step.json"),
    "step.json gone": lambda out: (out / "state" / "step.json").unlink(),
    "state gone": lambda out: shutil.rmtree(out / "state"),
    "results-before.jsonl cut": lambda out: cut(out / "results-before.jsonl"),
    "results-before.jsonl gone": lambda out: (out / "results-before.jsonl").unlink(),
    "a binary line in metrics.jsonl": lambda out: spoil(out / "metrics.jsonl", b"\xff\x00\xfe\n"),
    "metrics.jsonl lacks its first line": lambda out: spoil(out / "metrics.jsonl", b""),
    "config.yaml gone": lambda out: (out / "config.yaml").unlink(),
    "config.yaml is not UTF-8": lambda out: (out / "config.yaml").write_bytes(b"\xff\xfe: 1\n"),
    "config.yaml cut": lambda out: cut(out / "config.yaml"),
    "pages gone": lambda out: [path.unlink() for path in (*out.glob("*.png"), *out.glob("evaluation*"))],
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path, first: bytes) -> None:
    """Another first line."""
    path.write_bytes(first + b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def damaged(mode: Mode, folder: Path) -> list[str]:
    """A line per damage to a finished run: what --resume does."""
    (folder / "reference").mkdir(parents=True)
    _, reference = measured(mode, folder / "reference")
    lines = []
    for name, harm in DAMAGE.items():
        place = folder / name.replace(" ", "-")  # whose run has the reference's name, which pages show
        place.mkdir()
        out, log = place / "out", place / "log"
        shutil.copytree(folder / "reference" / "out", out)
        harm(out)
        status = attempt(mode, [*mode.arguments(out), "--resume"], log)
        said = [line for line in log.read_text(errors="replace").splitlines() if str(out) in line and "/:" not in line]
        words = said[-1].replace(str(out), "RUN") if said else ""
        equal = status == 0 and mode.left(out) == reference
        lines.append(
            f"| {name} | {status} | {words} | {equal} | {log.read_text(errors='replace').count('Traceback')} |"
        )
        print(lines[-1], flush=True)
    return lines


# ---------------------------------------------------------------- memory


def memory(mode: Mode, folder: Path) -> str:
    """Resident megabytes of one process after some of 2,000 short steps."""
    out, log = folder / "out", folder / "log"
    folder.mkdir(parents=True)
    arguments = [*mode.arguments(out), "--steps", str(MEMORY_AT[-1]), "--save_every", "500", "--max_tokens", "4"]
    arguments += ["--prompts_per_step", "1", "--n_episodes", "0"]
    child = os.fork()
    if child == 0:
        run_child(mode, arguments, log, 0, free_port(), None, 0)
    figures: dict[int, float] = {}
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        path = out / "metrics.jsonl"
        steps = path.read_bytes().count(b"\n") if path.exists() else 0
        for step in MEMORY_AT:
            if steps >= step and step not in figures:
                status = Path(f"/proc/{child}/status").read_text()
                figures[step] = int(status.split("VmRSS:")[1].split()[0]) / 1024
                print(f"memory: {figures}", flush=True)
        time.sleep(0.5)
    head = "| steps | " + " | ".join(f"{step:,}" for step in figures) + " |\n|---|" + "---|" * len(figures)
    return head + "\n| resident, MB | " + " | ".join(f"{value:.0f}" for value in figures.values()) + " |"


# ---------------------------------------------------------------- the table


def report(folder: Path) -> str:
    """The tables of all modes that have a result in the folder."""
    parts = ["`python -m benchmarks.kills`\n", __doc__.split("\n\n")[2].replace("\n", " ") + "\n"]
    parts += ["| what is killed | runs | kills | attempts | other ends | equal to the bit | tracebacks |"]
    parts += ["|---|---|---|---|---|---|---|"]
    for name, about in ABOUT.items():
        path = folder / f"{name}.json"
        if path.exists():
            t = json.loads(path.read_text())
            row = [about, t["trials"], t["kills"], t["attempts"], t["refused"], f"{t['equal']} of {t['trials']}"]
            parts.append("| " + " | ".join(map(str, [*row, t["tracebacks"]])) + " |")
    for name in ("disk", "damage", "memory"):
        path = folder / f"{name}.json"
        if path.exists():
            parts.append("\n" + json.loads(path.read_text()))
    return "\n".join(parts) + "\n"


HEADS = {
    "disk": "A file system of so many kB; then there is room, and the run goes on:\n\n"
    "| kB | exit code | message | exit code then | equal to the bit | tracebacks |\n|---|---|---|---|---|---|\n",
    "damage": "A finished run is damaged, and resumed:\n\n"
    "| damage | exit code | message | equal to the bit | tracebacks |\n|---|---|---|---|---|\n",
    "memory": "2,000 short steps in one process (`--modes memory`):\n\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=[*ABOUT, *HEADS], choices=[*ABOUT, *HEADS])
    parser.add_argument("--kills", type=int, default=30, help="per mode [30]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/kills", help="where the runs are; emptied mode by mode [runs/kills]")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    known = modes(folder / "data")
    for name in options.modes:
        shutil.rmtree(folder / name, ignore_errors=True)
        if name in ABOUT:
            found: object = kill_matrix(known[name], folder / name, options.kills, options.seed)
        elif name == "disk":
            found = HEADS[name] + "\n".join(full_disk(known["one"], folder / name, options.seed, 6))
        elif name == "damage":
            found = HEADS[name] + "\n".join(damaged(known["pages"], folder / name))
        else:
            found = HEADS[name] + memory(known["one"], folder / name)
        (folder / f"{name}.json").write_text(json.dumps(found))
        (ROOT / "benchmarks" / "results" / "kills.md").write_text(report(folder))


if __name__ == "__main__":
    main()
