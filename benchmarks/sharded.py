"""Decoding from weights that FSDP2 shards over two CPU processes: with its hooks, without them, and unsharded.

    python -m benchmarks.sharded [--tokens 64] [--repeats 7]

The built-in architecture with random weights, two prompts of text, 8 responses each, none of which ends early. A step
is a token of each of the 16. Before, as after, weights were gathered once for all steps; only layers were called with
their hooks. Seconds are those of the processor, of a process' threads together; the three take turns, and ratios are of
neighbours. What a CPU cannot show: on a GPU a step without hooks is a CUDA graph, as without FSDP2.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine import sharding
from engine.sampling import generate
from policy import Policy, Vocabulary, build_prompt
from world import lessons, tiny

HOW = ("with hooks", "without hooks", "unsharded")


@contextlib.contextmanager
def hooks_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """In place of `sharding.hooks_off`: hooks run, and leave weights whole."""
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in modules[1:]:
        module.set_reshard_after_forward(True, recurse=False)


def sharded(policy: Policy) -> Policy:
    """As recipes/accelerate_fsdp2.yaml has it."""
    mesh = init_device_mesh(policy.model.device.type, (distributed.get_world_size(),))
    for layer in policy.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


def measure(tokens: int, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of a step, each way, as often as asked."""
    tokenizer = tiny.build_tokenizer(lessons.corpus())
    vocabulary = replace(Vocabulary.of(tokenizer), eos=())
    plain, shards = (Policy(tiny.build_model(tokenizer, 0)) for _ in range(2))
    ways = dict(zip(HOW, (sharded(shards), shards, plain), strict=True))
    prompts = [build_prompt(vocabulary.ids("red ? A rows B dots " * n), [], plain.model.config) for n in (4, 6)]
    seconds: dict[str, list[float]] = {how: [] for how in HOW}
    for _ in range(1 + repeats):  # the first one is to warm up
        for how, policy in ways.items():
            hooks = hooks_kept if how == "with hooks" else sharding.hooks_off
            with mock.patch.object(sharding, "hooks_off", hooks), torch.no_grad(), sharding.whole_weights(policy):
                start = time.process_time()
                turns = generate(policy.model, prompts, 8, tokens, vocabulary, seed=lambda row, _: row)
                seconds[how].append((time.process_time() - start) / tokens)
            assert all(len(turn.ids) == tokens for turn in turns)
    return {how: values[1:] for how, values in seconds.items()}


def process(rank: int, folder: str, tokens: int, repeats: int, found: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found.put(measure(tokens, repeats))
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        found = fork.Queue()
        rest = (folder, given.tokens, given.repeats, found)
        processes = [fork.Process(target=process, args=(rank, *rest)) for rank in range(2)]
        for one in processes:
            one.start()
        both = [found.get() for _ in processes]
        for one in processes:
            one.join()
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {given.tokens} steps, {given.repeats} times\n")
    print("| decoding | processor ms per step, median (least to most) | against without hooks |\n|---|---|---|")
    for how in HOW:
        values = [1000 * value for one in both for value in one[how]]
        ratios = [a / b for one in both for a, b in zip(one[how], one["without hooks"], strict=True)]
        spread = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {how} | {spread} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
