"""How a policy finds events in videos of one length or another, and where it looks instead.

    python -m benchmarks.lengths                                      # the built-in policy
    python -m benchmarks.lengths --model runs/cpu_world/checkpoint --durations 20 40

Scores are of greedy responses about the validation split. "Late by" is the median, over questions about one event, of
the middle of the first span that is written after `<think>COLOUR<time>` minus the middle of the evidence, in seconds:
0 is right. A policy that has only seen one length may read times off as the distance from the video's end: then it is
that length minus the duration. Writes benchmarks/results/lengths.md.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

import config as configuration
import evaluate
from annotations.rows import Sample
from annotations.samples import load_samples
from config import Config
from engine.loading import load
from engine.sampling import generate
from policy import Vocabulary, build_prompt
from report.scores import overall
from rollout import user_chat, view_video
from world import lessons

RESULTS = Path(__file__).resolve().parent / "results" / "lengths.md"
SPAN = re.compile(r"\((\d+\.\d),(\d+\.\d)\)")
COLUMNS = ("duration, s", "questions", "mIoU", "late by, s", "within 1 s of that", "zoom_accuracy", "format")


def late_by(model, vocabulary: Vocabulary, config: Config, samples: Sequence[Sample]) -> list[float]:
    """Seconds by which each event about which one question is asked is placed too late, where a span is written."""
    asked = [sample for sample in samples if len(sample.evidence) == 1]
    views = {video: view_video(sample, config) for video, sample in {s.video: s for s in asked}.items()}
    found = []
    for start in range(0, len(asked), config.eval_batch):
        part = asked[start : start + config.eval_batch]
        texts = [user_chat("", config) + f"<think>{lessons.asked_colour(sample)}<time>" for sample in part]
        prompts = [
            build_prompt(vocabulary.ids(text), [views[sample.video].video], model.config, vocabulary)
            for text, sample in zip(texts, part, strict=True)
        ]
        for sample, turn in zip(part, generate(model, prompts, 1, 16, vocabulary), strict=True):
            written = SPAN.match(vocabulary.tokenizer.decode(turn.ids))
            if written:
                found.append((float(written[1]) + float(written[2]) - sum(sample.evidence[0])) / 2)
    return found


def line(model, vocabulary: Vocabulary, config: Config, duration: int) -> list[str]:
    """The cells of one duration."""
    config = replace(config, world_duration=duration, world_min_duration=0, eval_controls=False)
    samples = load_samples("world", "val", config)
    late = late_by(model, vocabulary, config, samples)
    rows = evaluate.evaluate(model, samples, config, vocabulary, Accelerator(), "asked")
    scores = overall(rows)
    if late:
        middle = statistics.median(late)
        found = [f"{middle:+.1f}", f"{statistics.mean(abs(x - middle) <= 1 for x in late):.2f}"]
    else:
        found = ["-", "-"]
    miou, zoomed, form = (f"{scores[name]:.3f}" for name in ("mIoU", "zoom_accuracy", "format"))
    return [f"{duration}", f"{len(rows)}", miou, *found, zoomed, form]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(configuration.BUILT_IN))
    parser.add_argument("--durations", type=int, nargs="+", default=[15, 20, 40, 60, 90])
    parser.add_argument("--videos", type=int, default=30, help="per duration")
    parser.add_argument("--cache", default="cache")
    options = parser.parse_args()
    words = ["--model", options.model, "--cache", options.cache, "--world_test_videos", f"{options.videos}"]
    config = configuration.parse(
        [*words, "--budget", "400", "--v_max", "4", "--zoom_budget", "176", "--zoom_v_max", "16"]
    )
    model, tokenizer = load(options.model)
    vocabulary = Vocabulary.of(tokenizer, config.outer_tags)
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for duration in options.durations:
        lines.append(line(model.eval(), vocabulary, config, duration))
        print(" | ".join(lines[-1]), flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    command = " ".join(["python -m benchmarks.lengths", *sys.argv[1:]])
    RESULTS.write_text(f"# Videos of other lengths\n\n`{command}`\n\n{table}\n")


if __name__ == "__main__":
    main()
