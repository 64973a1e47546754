"""What the turns of an episode cost: with the cache across turns, without it, and in one turn; and in the update.

    python -m benchmarks.episodes            # benchmarks/results/episodes.md

The policy is the scaled-down one of benchmarks/engine.py, 19 million random parameters in float32. A glance has 64
frames of 112x112 pixels (512 visual tokens), a clip 16 of them, each after its time (256 visual tokens); every turn
writes 64 tokens, whatever they are, and all but the last one get a clip. 2 prompts with 4 episodes each. *Without the
cache* is tests/plain_episodes.py: for every turn, [prompt, episode] from its beginning, the way of engines that know
single turns only; its episodes share no prompt either, which is all the difference in one turn. The update is one
forward and backward pass over [prompt, episodes], with gradient checkpointing.

Tokens are those that the language model computes for one episode, if the prompt's share of a group counts whole.
Seconds are medians over repeats, both ways in turn, per episode.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.engine import ORDINARY, endless, engines
from engine.sampling import Sampler
from policy import Policy, Prompt, Video, build_prompt
from tests.plain_episodes import PlainEpisodes

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, GROUP, WRITTEN = 2, 4, 64
CLIP, WORDS, TIME = 16, 16, 6  # frames of a clip; tokens of a question, and of a frame's time
TURNS = (1, 2, 3, 5)


def video(pairs: int, generator: torch.Generator) -> Video:
    """Frames of 112x112 pixels: 16 visual tokens per pair."""
    return Video(torch.randint(0, 256, (pairs * 64, 1176), generator=generator, dtype=torch.uint8), (pairs, 8, 8), 1.0)


def words(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(*ORDINARY, (n,), generator=generator).tolist()


def clip(pad: int, generator: torch.Generator) -> tuple[list[int], list[Video]]:
    """What a call brings: each frame after its time."""
    frames = [video(1, generator) for _ in range(CLIP)]
    return [i for _ in frames for i in (*words(TIME, generator), pad)] + words(TIME, generator), frames


def play(kind: type, model, prompts: list[Prompt], turns: int):
    """Episodes of so many turns: the engine, and what the update needs (sampled ids [B, G, T], observations)."""
    generator = torch.Generator().manual_seed(1)
    shown = [clip(model.config.video_token_id, generator) for _ in range(turns - 1)]
    episodes = kind(model, prompts, GROUP, WRITTEN, endless(), seed=lambda row, number: 1000 * row + number)
    ids = [[] for _ in range(PROMPTS * GROUP)]
    observations = [[[] for _ in range(GROUP)] for _ in range(PROMPTS)]
    while said := episodes.sample():
        for turn in said:
            ids[turn.row].append(turn.ids)
        for row, seen in episodes.observe({t.row: shown[t.number] for t in said if t.number < turns - 1}).items():
            observations[row // GROUP][row % GROUP].append(seen)
    return episodes, torch.stack([torch.cat(row) for row in ids]).view(PROMPTS, GROUP, -1), observations


def update(policy: Policy, prompts: list[Prompt], ids: torch.Tensor, observations: list) -> None:
    """One forward and backward pass."""

    def log_likelihood(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ lm_head.T, ids.flatten())

    policy(prompts, ids, torch.ones_like(ids, dtype=torch.bool), log_likelihood, observations).backward()
    policy.zero_grad()


def seconds(job: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    job(*arguments)
    return time.perf_counter() - start


def lines(repeats: int, turns: tuple[int, ...] = TURNS) -> list[str]:
    """The table's lines."""
    _, ours = engines()
    model, policy = ours.model, Policy(ours.model)
    generator = torch.Generator().manual_seed(0)
    pad = model.config.video_token_id
    prompts = [build_prompt([*words(WORDS, generator), pad], [video(32, generator)], model.config)] * PROMPTS
    table = [
        "| turns | tokens, cache | tokens, no cache | s, cache | s, no cache | ratio | s, update | ms per token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in turns:
        _, ids, observations = play(Sampler, model, prompts, n)
        plain, other_ids, _ = play(PlainEpisodes, model, prompts, n)
        if not torch.equal(ids, other_ids):
            raise SystemExit("with and without the cache, other tokens were sampled")
        seen = sum(len(o.prompt) for o in observations[0][0])
        tokens = len(prompts[0]) + seen + n * WRITTEN - 1
        pairs = [[seconds(play, kind, model, prompts, n) for kind in (Sampler, PlainEpisodes)] for _ in range(repeats)]
        cached, without = (statistics.median(side) / (PROMPTS * GROUP) for side in zip(*pairs, strict=True))
        spent = statistics.median(seconds(update, policy, prompts, ids, observations) for _ in range(repeats))
        computed = PROMPTS * (len(prompts[0]) + GROUP * (tokens - len(prompts[0])))
        table.append(
            f"| {n} | {tokens} | {plain.computed // (PROMPTS * GROUP)} | {cached:.3f} | {without:.3f} | "
            f"{statistics.median(b / a for a, b in pairs):.2f} | {spent:.2f} | {1000 * spent / computed:.3f} |"
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "episodes.md"))
    given = parser.parse_args()
    table = "\n".join(lines(given.repeats))
    made = f"`python -m benchmarks.episodes --repeats {given.repeats}`, {datetime.date.today()}, "
    made += f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    Path(given.out).write_text(f"# Episodes of several turns\n\n{made}. {__doc__.split(chr(10) * 2, 2)[2]}\n{table}\n")


if __name__ == "__main__":
    main()
