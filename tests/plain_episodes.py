"""Episodes of several turns the plain way, with the interface of `engine.sampling.Sampler`: what the cache must agree
with, and what its saving is measured against. For every turn, [prompt, episode] is computed from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.sampling import Sampled, sample
from policy import Observation, Prompt, Video, build_prompt


class PlainEpisodes:
    """See `engine.sampling.Sampler`. `computed` counts the tokens that went through the language model."""

    def __init__(
        self,
        model,
        prompts: Sequence[Prompt],
        group_size: int,
        max_tokens: int,
        eos: Sequence[int],
        banned: Sequence[int],
        temperature: float = 1.0,
        seed: Callable[[int, int], int] | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        keep_hidden: bool = False,
    ):
        self.model, self.seed, self.stop, self.keep_hidden = model, seed, stop, keep_hidden
        self.sampling = (max_tokens, eos, banned, temperature)
        self.histories = [prompt for prompt in prompts for _ in range(group_size)]
        self.numbers, self.sampled = [0] * len(self.histories), [0] * len(self.histories)
        self.waiting = list(range(len(self.histories)))
        self.computed = 0

    def sample(self) -> list[Sampled]:
        rows, self.waiting = self.waiting, []
        if not rows:
            return []
        histories = [self.histories[row] for row in rows]
        seeds = None if self.seed is None else [[self.seed(row, self.numbers[row])] for row in rows]
        states: list[torch.Tensor] = []
        ids, mask = sample(self.model, histories, 1, *self.sampling, seeds, self.stop, states)
        turns = []
        for b, row in enumerate(rows):
            said = ids[b, 0][mask[b, 0]].cpu()
            hidden = torch.stack([state[b, 0] for state in states[: len(said)]]) if self.keep_hidden else None
            turns.append(Sampled(row, self.numbers[row], said, hidden))
            self.computed += len(histories[b]) + len(said) - 1
            self.histories[row] = extended(histories[b], said)
            self.sampled[row] += len(said)
        return turns

    def observe(self, observations: dict[int, tuple[Sequence[int], Sequence[Video]]]) -> dict[int, Observation]:
        shown = {}
        for row, (ids, videos) in observations.items():
            start = self.histories[row].next_position
            prompt = build_prompt(ids, videos, self.model.config, start)
            shown[row] = Observation(self.sampled[row], prompt)
            self.histories[row] = joined(self.histories[row], prompt)
            self.numbers[row] += 1
            self.waiting.append(row)
        return shown


def extended(prompt: Prompt, said: torch.Tensor) -> Prompt:
    """The prompt with text tokens after it."""
    positions = (prompt.next_position + torch.arange(len(said))).expand(3, -1)
    return joined(prompt, Prompt(said, positions, [], prompt.next_position + len(said)))


def joined(first: Prompt, second: Prompt) -> Prompt:
    ids, positions = torch.cat([first.ids, second.ids]), torch.cat([first.positions, second.positions], dim=1)
    return Prompt(ids, positions, first.videos + second.videos, second.next_position)
