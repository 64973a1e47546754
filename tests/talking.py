"""A policy that has learned the form of a response, and nothing about videos."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import prompts
from policy import Policy, Video, Vocabulary, build_prompt
from world import benchmark, lessons, tiny


def teach(folder: Path, tokenizer, vocabulary: Vocabulary) -> Path:
    """Save a checkpoint that writes random letters and spans in the world's form."""
    model = shallow(tokenizer)
    generator = torch.Generator().manual_seed(0)

    def batch(step: int) -> lessons.Batch:
        grey = torch.randint(0, 256, (1, 3, 1, 1), generator=generator, dtype=torch.uint8)
        clip = Video.from_frames(grey.expand(2 + step % 3 * 9, 3, 28, 28), 1.0)
        chat = prompts.chat_text(f"Which pattern does {draw(benchmark.COLOURS, generator)} show? A B C D", system=None)
        prompt = build_prompt(vocabulary.ids(chat), [clip], model.config)
        return lessons.Batch.of([prompt], [[vocabulary.ids(random_response(generator)) for _ in range(12)]])

    assert learn(model, batch, 120) < 0.6  # nats per token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shallow(tokenizer, seed: int = 0, family: str = "qwen2_5_vl", **options):
    """A tiny policy of two layers instead of four, three where the tower adds to the second one's states: whatever is
    done with it takes half the time.
    """
    with mock.patch.dict(tiny.TEXT, num_hidden_layers=3 if family == "qwen3_vl" else 2):
        return tiny.build_model(tokenizer, seed, family, **options)


def learn(model: torch.nn.Module, batch: Callable[[int], lessons.Batch], steps: int) -> float:
    """Train a model, but for its tower, since there is nothing to see, on the batch of each step; the last loss."""
    model.train().model.visual.requires_grad_(False)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        shown = batch(step)
        loss = policy(shown.prompts, shown.ids, shown.mask, partial(lessons.cross_entropy, shown))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def draw(names, generator: torch.Generator) -> str:
    return list(names)[int(torch.randint(len(names), (1,), generator=generator))]


def random_response(generator: torch.Generator) -> str:
    start, end = sorted(torch.randint(0, 20, (2,), generator=generator).tolist())
    times = lessons.written_spans([(start, end + 1)])
    think = f"<think>{draw(benchmark.COLOURS, generator)}<time>{times}</time></think>"
    return f"{think}<answer>{draw('ABCD', generator)}</answer><glue>[{times}]</glue>{lessons.END}"
