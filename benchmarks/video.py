"""Time, memory and exactness of `media/` and `video.py` against other readers, on videos made here with a number in
every frame.

    python -m benchmarks.video --out benchmarks/results/video.md

Every figure comes from processes of its own, which have imported the reader and read one small file before the clock
starts. Readers take turns; time is the median of `--repeats` processes, memory the largest. Memory is the peak of the
resident set during the task, above what was resident before it (interpreter, libraries); the peak of the whole process
stands beside it. All readers return the same frames (by number) at the same size, by the same bicubic
rule; end to end they return `pixel_values_videos`. Exactness is judged one frame per request and all at once, by time,
or by the frame's number in presentation order where a reader takes only numbers.

Readers that are not installed are skipped by name. To have them all, in an environment of their own:

    pip install --no-deps decord torchcodec==0.13.0 opencv-python-headless qwen-vl-utils torchvision requests packaging

torchcodec needs FFmpeg's shared libraries (4 to 8) on LD_LIBRARY_PATH; of torchvision only Python code is used.

The last table alone, beside what another checkout of this project reads (`before`):

    python -m benchmarks.video --right-frames --before ../older --out right.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as F

import video
from tests.kinds import KINDS
from tests.numbered import FILES, edited, read_number, sequential, times_of, write_video

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))
READERS = ("ours", "decord", "torchcodec", "opencv")
TIMEOUT = 240  # seconds for all requests of an exactness test, 10 times that for a task

X264 = {"preset": "veryfast", "crf": "26"}  # with B-frames
VIDEOS = {
    "warm.mp4": {"n": 50, "size": (320, 180)},
    "60s_360p.mp4": {"n": 1500, "size": (640, 360)},
    "10min_720p.mp4": {"n": 15000, "size": (1280, 720)},
    "60min_360p.mp4": {"n": 90000, "size": (640, 360)},
    "60min_360p_flat.mp4": {"n": 90000, "size": (640, 360), "options": {**X264, "bf": "0"}},
}
ZOOM = [2700 + 0.625 * k for k in range(16)]
ANYWHERE = [59 * random.Random(k).random() for k in range(10)]
SPANS = [start + k for start in (300, 1200, 2100, 3300) for k in range(4)]
# name: file, times in seconds, (height, width)
TASKS = {
    "60 s of 360p, 1 fps": ("60s_360p.mp4", [float(k) for k in range(60)], (252, 448)),
    "10 min of 720p, 1 fps": ("10min_720p.mp4", [float(k) for k in range(600)], (112, 196)),
    "60 min, 256 frames": ("60min_360p.mp4", [k * 3600 / 256 for k in range(256)], (140, 252)),
    "zoom: 16 frames of 10 s at minute 45": ("60min_360p.mp4", ZOOM, (336, 588)),
    "zoom: 4 spans of 4 s": ("60min_360p.mp4", [float(t) for t in SPANS], (336, 588)),
    "60 min without B-frames, 256 frames": ("60min_360p_flat.mp4", [k * 3600 / 256 for k in range(256)], (140, 252)),
    "60 s of 360p, 10 frames anywhere, in 10 calls": ("60s_360p.mp4", ANYWHERE, (252, 448)),
}
IN_CALLS = ("60 s of 360p, 10 frames anywhere, in 10 calls",)  # one frame each
END_TO_END = ("60 s of 360p, 1 fps", "10 min of 720p, 1 fps", "60 min, 256 frames")
EXACT = {
    "CFR, mp4": "cfr.mp4",
    "B-frames, mp4": "b.mp4",
    "open GOP, H.264": "open.mp4",
    "open GOP, HEVC": "hevc.mp4",
    "VFR, mp4": "vfr.mp4",
    "VFR, Matroska": "vfr.mkv",
    "VP9, WebM": "vp9.webm",
    "MPEG-TS, H.264": "b.ts",
    "MPEG-TS, open GOP": "open.ts",
    "MPEG-TS, HEVC": "hevc.ts",
    "edit list": "edited.mp4",
    "MPEG-4 with B-frames, AVI": "mpeg4.avi",
}


def load_torchvision() -> None:
    """Import torchvision for its Python code, which is all that is used here, also where its compiled part does not
    load."""
    register = torch.library.register_fake
    torch.library.register_fake = lambda *args, **kwargs: lambda function: function
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


# ---------------------------------------------------------------- readers: frames at times, uint8 [N, 3, H, W]


def bicubic(frames: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """The rule of Qwen's utilities, on the whole batch."""
    if size is None:
        return frames
    smooth = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
    return smooth.clamp_(0, 255).round_().to(torch.uint8)


def read_ours(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    return video.decode(path, times, size)[0]


def read_before(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    return read_ours(path, times, numbers, size)  # its process imports another checkout


def read_decord(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=CORES)
    return bicubic(torch.from_numpy(reader.get_batch(numbers).asnumpy()).permute(0, 3, 1, 2), size)


def read_torchcodec(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=CORES, seek_mode="approximate" if size else "exact")
    begin = decoder.metadata.begin_stream_seconds or 0.0
    return bicubic(decoder.get_frames_played_at([t + begin for t in times]).data, size)


def read_opencv(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    import cv2

    capture, frames, position = cv2.VideoCapture(path), {}, -1
    for number in sorted(set(numbers)):
        if not 0 < number - position <= 300:  # seeking costs more than reading on for a while
            capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            position = number - 1
        while position < number:
            capture.grab()
            position += 1
        found, frame = capture.retrieve()
        if not found:
            raise RuntimeError(f"no frame {number}")
        frame = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None]
        frames[number] = bicubic(frame, size)[0]  # one at a time, to its credit
    capture.release()
    return torch.stack([frames[number] for number in numbers])


def read_ours_to_patches(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    return video.normalise_patches(video.patchify_uint8(video.decode(path, times, size)[0])[0])


def read_qwen_to_patches(path: str, times: list[float], numbers: list[int], size) -> torch.Tensor:
    """qwen-vl-utils with its default reader, then the transformers processor: its own (linspace) frames, as many of
    them."""
    from qwen_vl_utils.vision_process import fetch_video
    from transformers import Qwen2VLVideoProcessor

    request = {"video": path, "nframes": len(numbers), "resized_height": size[0], "resized_width": size[1]}
    frames = fetch_video(request)
    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    return processor(videos=[frames], do_resize=False, return_tensors="pt")["pixel_values_videos"]


READ = {
    "ours": read_ours,
    "before": read_before,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
    "opencv": read_opencv,
    "ours, to patches": read_ours_to_patches,
    "qwen-vl-utils + transformers": read_qwen_to_patches,
}


def why_not(reader: str) -> str | None:
    """Import a reader; the reason for which it cannot be used, or None."""
    try:
        if reader == "decord":
            import decord  # noqa: F401
        elif reader == "torchcodec":
            from torchcodec.decoders import VideoDecoder  # noqa: F401
        elif reader == "opencv":
            import cv2  # noqa: F401
        elif reader.startswith("qwen"):
            load_torchvision()
            import qwen_vl_utils  # noqa: F401
            from transformers import Qwen2VLVideoProcessor  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


# ---------------------------------------------------------------- a measurement in its own process


def resident(field: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most since the peak was last reset ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(job: dict) -> dict:
    """Run one job: {"reader", "path", "times", "numbers", "size", "warm", "calls"} -> {"seconds", "bytes",
    "process", "seen"}."""
    why_not(job["reader"])
    read, size = READ[job["reader"]], tuple(job["size"])
    read(job["warm"], [0.0, 0.5], [0, 12], (28, 56))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = resident("VmRSS")
    began = time.perf_counter()
    if job["calls"]:
        asked = zip(job["times"], job["numbers"], strict=True)
        frames = torch.cat([read(job["path"], [time], [number], size) for time, number in asked])
    else:
        frames = read(job["path"], job["times"], job["numbers"], size)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM")
    seen = [read_number(frame) for frame in frames] if frames.ndim == 4 else None
    return {"seconds": seconds, "bytes": peak - base, "process": peak, "seen": seen}


def ask(job: dict) -> None:
    """Run one request after another, "rows" of "times", and print the numbers seen on the frames of each."""
    why_not(job["reader"])
    for rows in job["requests"]:
        try:
            frames = READ[job["reader"]](job["path"], [job["times"][k] for k in rows], rows, None)
            seen = [read_number(frame) for frame in frames]
        except Exception as error:  # of any kind, by the rules of any reader
            seen = [type(error).__name__] * len(rows)
        print(json.dumps({"seen": seen}), flush=True)


def combine(checkout: Path, folder: Path) -> None:
    """Link the code of another checkout into an empty folder, and the benchmarks and tests of this one."""
    for path in checkout.resolve().iterdir():
        if path.name not in ("benchmarks", "tests"):
            (folder / path.name).symlink_to(path)
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)


def in_process(job: dict, timeout: float, root: Path = ROOT) -> tuple[list[dict], str]:
    """What a fresh process prints for a job, and in words what went wrong; `root` is where it imports from."""
    command = [sys.executable, "-m", "benchmarks.video", "--job"]
    words = ""
    try:
        run = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=timeout, cwd=root)
        output = run.stdout
        if run.returncode:
            words = f"exit {run.returncode}: {(run.stderr.decode().strip().splitlines() or ['no message'])[-1][:200]}"
    except subprocess.TimeoutExpired as error:
        output, words = error.stdout or b"", f"no end after {timeout:.0f} s"
    return [json.loads(line) for line in output.decode().splitlines() if line.startswith("{")], words


# ---------------------------------------------------------------- the tables


def make_videos(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            part = folder / f"part_{name}"
            if name == "edited.mp4":
                write_video(folder / "part_whole.mp4", **FILES["b.mp4"])
                edited(folder / "part_whole.mp4", part, 7 * 512)
            else:
                write_video(part, **({"options": X264, **VIDEOS[name]} if name in VIDEOS else FILES[name]))
            part.rename(folder / name)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compare(folder: Path, readers: list[str], tasks, repeats: int) -> dict[str, dict[str, dict]]:
    """{task: {reader: {"seconds": median, "bytes": largest, "process": largest, "wrong": number of frames}}}, or
    {"failed": text}."""
    found: dict = {task: {reader: [] for reader in readers} for task in tasks}
    for task in tasks:
        name, times, size = TASKS[task]
        numbers = [int(t * 25 + 1e-6) for t in times]
        for _ in range(repeats):
            for reader, results in found[task].items():
                if results and "failed" in results[-1]:
                    continue
                job = {"reader": reader, "path": str(folder / name), "times": times, "numbers": numbers, "size": size}
                job |= {"warm": str(folder / "warm.mp4"), "calls": task in IN_CALLS}
                printed, words = in_process(job, 10 * TIMEOUT)
                results.append(printed[-1] if printed else {"failed": words})
        for reader, results in found[task].items():
            if "failed" in results[-1]:
                found[task][reader] = results[-1]
            else:
                seen = results[0]["seen"] or numbers
                found[task][reader] = {
                    "seconds": statistics.median(r["seconds"] for r in results),
                    "bytes": max(r["bytes"] for r in results),
                    "process": max(r["process"] for r in results),
                    "wrong": sum(a != b for a, b in zip(seen, numbers, strict=True)),
                }
            print(f"{task}: {reader}: {found[task][reader]}", flush=True)
    return found


def comparison(folder: Path, readers: list[str], tasks, repeats: int) -> str:
    """The table of `compare`; `readers[0]` is ours, set against the best of the others."""

    def cell(result: dict) -> str:
        if "failed" in result:
            return result["failed"]
        memory, process = (f"{result[key] / 2**20:.0f} MiB" for key in ("bytes", "process"))
        wrong = f", {result['wrong']} frames wrong" if result["wrong"] else ""
        return f"{result['seconds']:.2f} s, {memory} ({process}){wrong}"

    rows = []
    for task, results in compare(folder, readers, tasks, repeats).items():
        row, (ours, *others) = [task, *map(cell, results.values())], results.values()
        for key in ("seconds", "bytes"):
            best = min((other[key] for other in others if key in other), default=math.nan)
            own = ours.get(key, math.nan)
            ratio = best / own if key == "seconds" else own / best
            row.append(f"{ratio:.2f}")
        rows.append(row)
    return table(["task", *readers, "time, best other / ours", "memory, ours / least other"], rows)


def truth_of(folder: Path, kind: str) -> tuple[Path, list[float], list[int]]:
    """A file, the time and the number of each of its frames."""
    if kind in KINDS:
        return KINDS[kind](folder)
    name = EXACT[kind]
    if name == "edited.mp4":
        return folder / name, [k / 25 for k in range(53)], list(range(7, 60))
    return folder / name, times_of(name), [read_number(frame) for frame in sequential(folder / name)]


def exactness(folder: Path, readers: list[str], before: Path) -> list[list[str]]:
    """For every kind of file and reader: right frames one at a time in random order, and right frames of one request
    for all."""
    rows = []
    for kind in (*EXACT, *KINDS):
        path, times, truth = truth_of(folder, kind)
        order = random.Random(0).sample(range(len(times)), 20)
        ends = [*times[1:], times[-1] + 0.04]
        middles = [(t + end) / 2 for t, end in zip(times, ends, strict=True)]  # so that rounding cannot matter
        row = [kind]
        for reader in readers:
            requests = [*([k] for k in order), list(range(len(times)))]
            job = {"reader": reader, "path": str(path), "times": middles, "requests": requests}
            printed, words = in_process(job, TIMEOUT, before if reader == "before" else ROOT)
            answers = [line["seen"] for line in printed] + [[words] * len(rows) for rows in requests[len(printed) :]]
            right = sum(seen == [truth[k]] for k, seen in zip(order, answers, strict=False))
            all_right = sum(seen == number for seen, number in zip(answers[-1], truth, strict=True))
            failed = any(isinstance(seen, str) for seen in itertools.chain.from_iterable(answers))
            note = " (no end)" if words.startswith("no end") else " (errors)" if failed else ""
            row.append(f"{right}/{len(order)}, {all_right}/{len(truth)}{note}")
            print(kind, reader, row[-1], flush=True)
        rows.append(row)
    return rows


def report(args) -> str:
    skipped = {reader: reason for reader in READ if (reason := why_not(reader))}
    readers = [reader for reader in READERS if reader not in skipped]
    chains = [reader for reader in ("ours, to patches", "qwen-vl-utils + transformers") if reader not in skipped]
    right = [
        "## Right frames",
        "Of 20 frames asked for one at a time, in random order; then of all frames asked for at once. Below, "
        "the kinds that readers get wrong.",
    ]
    if args.right_frames:
        make_videos(args.folder, EXACT.values())
        readers[1:1] = ["before"] if args.before else []
        with tempfile.TemporaryDirectory() as before:
            if args.before:
                combine(args.before, Path(before))
            rows = exactness(args.folder, readers, Path(before))
        return "\n\n".join([*right, f"`{args.command}`.", table(["file", *readers], rows)]) + "\n"
    files = [*VIDEOS, *EXACT.values()] if args.tasks is None else ["warm.mp4", *(TASKS[task][0] for task in args.tasks)]
    make_videos(args.folder, files)
    parts = [
        "# Reading videos",
        f"`{args.command}`, {args.date}, {args.hardware}.",
        versions(readers, chains),
        *(f"Skipped: {reader} ({reason})." for reader, reason in skipped.items()),
        "## Frames: median time, peak memory",
        f"Medians of {args.repeats} processes each, which return the same frames at the same size by the same bicubic "
        "rule. Memory is the peak above what was resident before the task; in brackets, the peak of the whole process.",
        comparison(args.folder, readers, args.tasks or TASKS, args.repeats),
    ]
    if args.tasks:
        return "\n\n".join(parts) + "\n"
    parts += [
        "## End to end: from file to `pixel_values_videos`",
        comparison(args.folder, chains, END_TO_END, args.repeats),
        *right,
        table(["file", *readers], exactness(args.folder, readers, ROOT)),
    ]
    return "\n\n".join(parts) + "\n"


def versions(readers: list[str], chains: list[str]) -> str:
    from importlib.metadata import version

    ours = f"Python {sys.version.split()[0]}, torch {torch.__version__}, av {av.__version__}"
    packages = {"decord": "decord", "torchcodec": "torchcodec", "opencv": "opencv-python-headless"}
    names = [packages[reader] for reader in readers if reader in packages]
    if any(chain.startswith("qwen") for chain in chains):
        names += ["qwen-vl-utils", "transformers", "torchvision"]
    return ", ".join([ours, *(f"{name} {version(name)}" for name in names)]) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "cache" / "video-benchmark", help="where the videos are kept"
    )
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these rows of the first table [all tables]")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--hardware", default=f"{CORES} CPU cores, load average {os.getloadavg()[0]:.1f} at the start")
    parser.add_argument("--right-frames", action="store_true", help="only the table of right frames")
    parser.add_argument("--before", type=Path, help="another checkout, whose reader stands beside in that table")
    parser.add_argument("--make-only", action="store_true", help="only write the videos")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder.resolve()  # for processes elsewhere
    if args.job:
        job = json.load(sys.stdin)
        if "requests" in job:
            ask(job)
        else:
            print(json.dumps(measure(job)))
        return
    args.command = "python -m " + " ".join(["benchmarks.video", *sys.argv[1:]])
    if args.make_only:
        make_videos(args.folder, [*VIDEOS, *EXACT.values()])
        return
    text = report(args)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
