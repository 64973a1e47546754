"""Damaged video files: each is read or refused by name. No hang, no crash, no other error, no row without a picture.

    python -m benchmarks.fuzz_video --out benchmarks/results/fuzz_video.md

Every file that the tests of reading know is cut, zeroed, spliced and bit-flipped at `--places` places in all. Each
damaged copy is probed, then asked for pictures between its first and last second, in a process of its own (a fork) that
may take `--seconds` of processor time and of the clock, and `--megabytes` more memory than there was. Same seed, same
damage: `--only FILE:PLACE` repeats one with its traceback, `--only FILE` all of a file.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import torch

import media.decode
import video
from media.file import VideoError
from tests.kinds import KINDS
from tests.numbered import FILES, get, read_number

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = ("read", "refused", "another error", "crash", "no end", "no memory")


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file, damaged at one place in one of four ways."""
    place, way = rng.randrange(len(data)), rng.choice(("cut", "zero", "splice", "flip"))
    if way == "cut":
        return data[:place]
    if way == "zero":
        n = min(rng.choice((1, 16, 188, 1000, 4096)), len(data) - place)
        return data[:place] + bytes(n) + data[place + n :]
    if way == "splice":  # what follows comes from elsewhere in the file
        return data[:place] + data[rng.randrange(len(data)) :]
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        at = min(len(data) - 1, place + rng.randrange(64))
        broken[at] ^= 1 << rng.randrange(8)
    return bytes(broken)


def read(path: Path, rng: random.Random) -> str:
    """Probe a file and look at some of its pictures: "read" or "refused"."""
    try:
        info = video.probe(path)
        times = [0.0, info.duration / 2, *(rng.uniform(0, info.duration) for _ in range(2))]
        frames, at = video.decode(path, times, threads=rng.choice((1, 2)))
    except VideoError as error:
        assert str(error).startswith(f"{path}: ") and "; " in str(error), f"no cause or advice: {error}"
        return "refused"
    assert len(frames) == len(at) == len(times) and all(moment <= t + 1e-3 for moment, t in zip(at, times, strict=True))
    for frame in frames:
        read_number(frame)
    return "read"


def attempt(path: Path, rng: random.Random, args: argparse.Namespace) -> str:
    """How reading a file ends, in a process of its own."""
    child = os.fork()
    if child == 0:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + args.megabytes * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (args.seconds, args.seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not args.only:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ending = 2
        try:
            ending = ("read", "refused").index(read(path, rng))
        except MemoryError:
            ending = 5
        except BaseException:
            if args.only:
                import traceback

                traceback.print_exc()
        os._exit(ending)
    deadline = time.monotonic() + 10 * args.seconds  # the machine may be busy
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "no end"
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return "no end" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return ENDINGS[os.WEXITSTATUS(status)]


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file of the tests: of FILES by its name, of KINDS by what is odd about it."""
    for name in FILES:
        yield name, get(folder, name)
    for kind, make in KINDS.items():
        yield kind, make(folder)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "cache" / "fuzz-video", help="where the files are kept")
    parser.add_argument("--out", type=Path, help="write the counts to this file")
    parser.add_argument("--places", type=int, default=1000, help="of each file")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--only", nargs="+", metavar="FILE[:PLACE]", help="these files or places alone")
    args = parser.parse_args()
    av.logging.set_level(av.logging.PANIC)
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows, total = [], Counter()
    for name, path in files(args.folder):
        only = [place for file, _, place in (one.partition(":") for one in args.only or [name]) if file == name]
        if not only:
            continue
        data, counts = path.read_bytes(), Counter()
        for place in range(args.places) if "" in only else map(int, only):
            rng = random.Random(f"{name}:{place}")
            broken = args.folder / f"broken{path.suffix}"
            broken.write_bytes(damage(data, rng))
            media.decode.TABLES.items.clear()
            counts[ending := attempt(broken, rng, args)] += 1
            if ending not in ("read", "refused"):
                print(f"{name}:{place}: {ending}", flush=True)
        rows.append((name, counts))
        total.update(counts)
        print(name, dict(counts), flush=True)
    command = "python -m " + " ".join(["benchmarks.fuzz_video", *sys.argv[1:]])
    lines = [f"| {' | '.join(['file', *ENDINGS])} |", "| --- " * (len(ENDINGS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(str(c[e]) for e in ENDINGS)} |" for name, c in [*rows, ("all", total)]]
    text = f"# Damaged videos\n\n`{command}`, {args.places} damaged copies of each file, av {av.__version__}.\n\n"
    text += "How reading ended.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
