"""The chunked KL with what torch does around it: shards, checkpointing, and the operations that it is asked for. Apart
from test_kl.py, whose formulas are tested in seconds: this imports what takes as long.
"""

import pytest
import torch
from runs import forks
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from whole_kl import gradients, random_inputs, whole

from kl import chunked_weighted_kl


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(use_reentrant):
    inputs = random_inputs()

    def checkpointed(hidden_p, lm_head, **rest):
        def inner(hidden_p, lm_head):
            stats = chunked_weighted_kl(hidden_p=hidden_p, lm_head=lm_head, chunk=3, **rest)
            return stats.kl, stats.logp

        kl, logp = checkpoint(inner, hidden_p, lm_head, use_reentrant=use_reentrant)
        return {"kl": kl, "logp": logp}

    expected = gradients(lambda **x: chunked_weighted_kl(chunk=3, **x), inputs, kl=1, logp=1)
    found = gradients(checkpointed, inputs, kl=1, logp=1)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def sharded_worker(rank, processes, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    inputs = [random_inputs(n=5, seed=seed) for seed in range(processes)]  # each process has its own tokens
    lm_head = inputs[0]["lm_head"].detach()
    expected = [gradients(whole, {**x, "lm_head": lm_head}, kl=1, logp=-1) for x in inputs]
    mine = inputs[rank]
    mine["lm_head"] = distribute_tensor(lm_head, init_device_mesh("cpu", (processes,)), [Shard(0)]).requires_grad_()
    stats = chunked_weighted_kl(chunk=2, **mine)
    (stats.kl - stats.logp).sum().backward()
    assert (mine["hidden_p"].grad - expected[rank][0]).abs().max() < 1e-10
    mean = sum(head for _, head in expected) / processes
    assert (mine["lm_head"].grad.full_tensor() - mean).abs().max() < 1e-10
    frozen = chunked_weighted_kl(mine["hidden_p"], None, mine["lm_head"].detach(), None, 2, temperature=0.7)
    assert torch.equal(frozen.entropy, stats.entropy)
    distributed.barrier()  # Gloo's thread may still give back what was gathered: to leave at once could abort
    distributed.destroy_process_group()


def test_a_projection_in_one_shard(tmp_path):
    sharded_worker(0, 1, tmp_path)


@pytest.mark.processes
def test_a_sharded_projection_gets_the_average_gradient_of_its_processes(tmp_path):
    forks()
    multiprocessing.start_processes(sharded_worker, args=(2, tmp_path), nprocs=2, start_method="forkserver")


class Recorder(TorchDispatchMode):
    """Counts matrix products, and the entries of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function is torch.ops.aten.mm.default
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, x.numel() if torch.is_tensor(x) else 0)
        return out


@pytest.mark.parametrize(("outputs", "products"), [(("kl", "logp"), 4), (("kl",), 4), (("logp",), 3)])
def test_one_traversal_of_the_vocabulary_per_pass_and_never_more_than_a_chunk_of_logits(outputs, products):
    inputs = random_inputs(n=64, h=3, v=512)
    with Recorder() as forward:
        stats = chunked_weighted_kl(chunk=4, **inputs)
    assert forward.products == 16 * 2  # both logits, for each of 64 / 4 chunks
    assert forward.largest == 4 * 512
    loss = sum(stats._asdict()[name].sum() for name in outputs)
    with Recorder() as backward:
        loss.backward()
    assert backward.products == 16 * products  # logits again (the reference's only for kl), and two gradients
    assert backward.largest == 4 * 512
