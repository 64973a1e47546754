"""What each program takes beside the options of config.py, and what it does before its imports, which take seconds.

Nothing here takes long to import, so that `--help` is answered at once and no signal meets a program unprepared.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import config

FILTER_NAMES = ("stage2", "plm_video", "qvhighlights")
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
PR_SET_PDEATHSIG = 1  # of Linux' prctl
ENDPOINT = "address of a chat endpoint [that of OPENAI_BASE_URL]; its key is in OPENAI_API_KEY"

Add = Callable[..., argparse.Action]


@dataclass(frozen=True)
class Settings:
    """What infer.py's strategies can be told."""

    window: int = 256  # frames of a window
    window_budget: int = 0  # visual tokens of a window; 0: as the coarse pass
    top: int = 4  # spans that are zoomed into together
    rank: str = "answer"  # windows are ranked by the confidence of the "answer", or of "answer_and_spans"
    compare_whole: bool = False  # a further pass over the whole video, whose answer wins if it is surer
    unparsable: str = ""  # the letter that stands for no answer
    max_zooms: int = 3
    stable: float = 0.9  # IoU from which two spans count as the same


def strategies() -> list[str]:
    """The names in the table of infer.py's docstring, read without importing it."""
    text = (Path(config.__file__).parent / "infer.py").read_text(encoding="utf-8")
    return re.findall(r"^\| ([a-z-]+) +\| (?!source)", text, re.MULTILINE)


def infer(add: Add) -> None:
    add("--video", help="a file of your own, a folder of them, or world; without it, --test_data is answered")
    add("--question", help="what is asked about it")
    add("--options", nargs="+", default=[], help="the answers to choose from, without letters; none: spans only")
    add("--strategy", help=f"{', '.join(strategies())} [coarse-to-fine, or one-stage without --options]")
    add("--model", help="checkpoint folder or hub name [the recipe's, or without --config the built-in policy]")
    add("--ground_model", help="ground-then-answer: the checkpoint that finds the spans, if it is another one")
    add("--out", help="page [the video's name with .html], folder of pages, or result file [runs/infer/STRATEGY.jsonl]")
    add("--embed", action="store_true", help="put the video into the page, instead of a reference to the file")
    add("--released", action="store_true", help="divide-and-conquer as in the released Zoom-Zero code")
    add("--window", type=int, help=f"frames of a window [{Settings.window}]")
    add("--window_budget", type=int, help="visual tokens of a window [--budget]")
    add("--top", type=int, help=f"spans zoomed into together [{Settings.top}]")
    add("--rank", choices=("answer", "answer_and_spans"), help="the confidence by which windows are ranked [answer]")
    add("--compare_whole", action="store_true", default=None, help="let the whole video's answer win if it is surer")
    add("--unparsable", help="the letter that stands for no answer [none]")
    add("--max_zooms", type=int, help=f"most repetitions of repeated-zoom [{Settings.max_zooms}]")
    add("--stable", type=float, help=f"IoU at which repeated-zoom stops [{Settings.stable}]")
    add("--skip_missing", action="store_true", help="--test_data: leave out questions whose video file is missing")


def evaluate(add: Add) -> None:
    add("--results", nargs="+", metavar="FILE", help="score these result files instead of a model")
    add("--out", help="folder of what is left behind [runs/evaluate]")
    add("--overwrite", action="store_true", help="write over the answers of a policy, or the scores of a run, in --out")
    add("--skip_missing", action="store_true", help="leave out questions whose video file is missing")


def filters(add: Add) -> None:
    add("filter", nargs="?", choices=FILTER_NAMES, help="which filter")
    add("--rule", help="the rule by which samples are dropped [paper]")
    add("--threshold", type=float, help="stage2: Eq. 6's delta [0.1]; qvhighlights: seconds [120]")
    add("--out", help="folder of what is left behind [runs/filters/FILTER]")
    add("--judge_model", help="plm_video: the model at --endpoint that answers, instead of --model")
    add("--endpoint", help=ENDPOINT)
    add("--skip_missing", action="store_true", help="leave out samples whose video file is missing")


def exemplars(add: Add) -> None:
    add("what", nargs="?", choices=("play", "reflect"), help="whole episodes, or ends of failed ones")
    add("--expert", choices=("oracle", "endpoint"), default="oracle", help="who plays [oracle]")
    add("--endpoint", help=ENDPOINT)
    add("--judge_model", help="name of the model at the endpoint")
    add("--workers", type=int, default=4, help="episodes that the expert plays at a time [4]")
    add("--exemplars", help="reflect: the train.jsonl that play has left")
    add("--share", type=float, default=0.3, help="reflect: their share of the training file [0.3]")
    add("--learn_failures", action="store_true", help="reflect: the failed turns are learned too")
    add("--out", help="folder of what is left behind [runs/play, runs/reflect]")
    add("--skip_missing", action="store_true", help="leave out samples whose video file is missing")


def curate(add: Add) -> None:
    add("--videos", help="folder of long videos, with folders in it")
    add("--out", default="runs/scenetg", help="folder of the journals, the training file and its statistics")
    add("--shots", help='JSON lines with "video" and "shots", perhaps "scenes" [found by PySceneDetect]')
    add("--detector", help="scene detector, made by scenes.py --train [scenes are known]")
    add("--tower", default=str(config.TOWER), help="the checkpoint whose vision tower the detector was made with")
    add("--endpoint", help=ENDPOINT)
    add("--judge_model", help="the model that the endpoint shall ask")
    add("--model", help="instead of an endpoint: a Qwen2.5-VL checkpoint")
    add("--oracle", help='instead of either, the truth: "world" or a file of its long videos; may tell scenes, too')
    add("--world_videos", type=int, default=12, help="videos of --oracle world [12]")
    add("--tries", type=int, default=3, help="replies to a question until it goes without [3]")
    add("--workers", type=int, default=8, help="requests to the endpoint at a time, per process [8]")
    add("--timeout", type=float, default=120.0, help="seconds without a word from the endpoint [120]")
    add("--prices", type=float, nargs=2, default=(0, 0), help="cost of a million prompt and completion tokens [0 0]")


def scenes(add: Add) -> None:
    add("--train", action="store_true", help="train a detector, write and evaluate it")
    add("--evaluate", action="store_true", help="evaluate --detector")
    add("--model", default=str(config.TOWER), help="policy whose vision tower looks at shots [tiny-qwen2_5_vl]")
    add("--train_data", default="world", help="JSON lines with shots and scenes [world: the built-in long videos]")
    add("--test_data", default="world", help="the same")
    add("--videos", type=int, nargs=2, default=(40, 20), help="built-in videos to train and to test on [40 20]")
    add("--cache", default="cache", help="folder of the built-in videos and of features [cache]")
    add("--out", default="runs/scenes", help="folder of the trained detector [runs/scenes]")
    add("--detector", help="saved detector [detector.safetensors in --out]")
    add("--overwrite", action="store_true", help="--train: replace a saved detector")
    add("--seed", type=int, default=0, help="of the built-in videos and of training [0]")


def walkthrough(add: Add) -> None:
    add("--agent", action="store_true", help="an episode of several turns (VideoZoomer), instead of one and a zoom")
    add("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"), help="clip_low and clip_high together")
    add("--out", help="file that is written beside what is printed, such as docs/walkthrough.md [none]")


EXTRA = {one.__name__: one for one in (infer, evaluate, filters, exemplars, curate, scenes, walkthrough)}


def extra(program: str, doc: str) -> argparse.ArgumentParser:
    """The options that only this program has; its description is the first line of its docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], add_help=False)
    if program in EXTRA:
        EXTRA[program](parser.add_argument)
    return parser


def begin(program: str, doc: str, bare: bool = False) -> None:
    """Answer --help, or be ready for signals: Ctrl-C, SIGTERM, and the death of the launcher.

    Garbage is not looked for among what is imported, until `run.program`, nor at the end: either takes a second.
    `bare`: see `answer_help`.
    """
    answer_help(program, doc, bare)
    gc.disable()
    atexit.register(gc.freeze)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    follow_launcher()


def answer_help(program: str, doc: str, bare: bool = False) -> None:
    """Print the help and leave, if the command line asks for it.

    `bare`: a command line without anything asks what the program does: its first lines, with commands, are the answer.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        config.build_parser(extra(program, doc), program).print_help()
        sys.exit()
    if bare and not sys.argv[1:]:
        what, examples, *_ = doc.split("\n\n")
        print(f"{what}\n\n{examples}\n\n--help lists all options.")
        sys.exit()


def leave(number: int, frame: object) -> None:
    """End the program at once, where nothing needs to be saved: while it loads, and between journal lines."""
    print(f"stopped by {signal.Signals(number).name}; what was finished is kept", file=sys.stderr)
    sys.exit(128 + number)


def follow_launcher() -> None:
    """Get SIGTERM when `accelerate launch` or torchrun, if that has started this process, ends.

    A signal to `accelerate launch` alone, or kill -9 of either, would leave training running without anybody above.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")[:4]
    except OSError:
        return  # not Linux
    if LAUNCHERS & {Path(word).name for word in words}:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended meanwhile
            leave(signal.SIGTERM, None)
