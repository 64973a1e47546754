"""Episodes of several turns the plain way, with the interface of `engine.sampling.Sampler`: what the cache must agree
with, and what its saving is measured against. For every turn, [prompt, episode] is computed from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.sampling import Sampled, generate
from policy import Observation, Prompt, Video, Vocabulary, build_prompt


class PlainEpisodes:
    """See `engine.sampling.Sampler`. `computed` counts the tokens that went through the language model."""

    def __init__(
        self,
        model,
        prompts: Sequence[Prompt],
        group_size: int,
        max_tokens: int,
        vocabulary: Vocabulary,
        *,
        temperature: float = 1.0,
        seed: Callable[[int, int], int] | None = None,
        stop: Callable[[list[int]], bool] | None = None,
        keep_hidden: bool = False,
    ):
        self.model, self.seed, self.stop, self.keep_hidden = model, seed, stop, keep_hidden
        self.max_tokens, self.vocabulary, self.temperature = max_tokens, vocabulary, temperature
        self.histories = [prompt for prompt in prompts for _ in range(group_size)]
        self.numbers, self.sampled = [0] * len(self.histories), [0] * len(self.histories)
        self.waiting = list(range(len(self.histories)))
        self.computed = 0

    def sample(self) -> list[Sampled]:
        rows, self.waiting = self.waiting, []
        if not rows:
            return []
        histories = [self.histories[row] for row in rows]
        turns = generate(
            self.model,
            histories,
            1,
            self.max_tokens,
            self.vocabulary,
            temperature=self.temperature,
            seed=None if self.seed is None else lambda b, _: self.seed(rows[b], self.numbers[rows[b]]),
            stop=self.stop,
            keep_hidden=self.keep_hidden,
        )
        for row, history, turn in zip(rows, histories, turns, strict=True):
            turn.row, turn.number = row, self.numbers[row]
            self.computed += len(history) + len(turn.ids) - 1
            self.histories[row] = extended(history, turn.ids)
            self.sampled[row] += len(turn.ids)
        return turns

    def observe(self, observations: dict[int, tuple[Sequence[int], Sequence[Video]]]) -> dict[int, Observation]:
        shown = {}
        for row, (ids, videos) in observations.items():
            start = self.histories[row].next_position
            prompt = build_prompt(ids, videos, self.model.config, start=start)
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
