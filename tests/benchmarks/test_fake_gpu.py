"""What benchmarks/fake_gpu.py counts, and that its backward pass is autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import loud_model

from benchmarks import fake_gpu
from kl import chunked_weighted_kl
from policy import Policy


@pytest.mark.parametrize("checkpointed", [False, True])
def test_walking_through_a_backward_pass_leaves_autograds_gradients(tokenizer, scene, monkeypatch, checkpointed):
    """Tree attention and the chunked KL are functions of ours, and tied weights get gradients from two sides."""
    model = loud_model(tokenizer)
    policy, targets = Policy(model).train(), scene[1][scene[2]]
    if checkpointed:
        policy.checkpoint_activations()

    def loss_of(hidden: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        weights = torch.linspace(0, 1, len(lm_head))
        tokens = chunked_weighted_kl(hidden, hidden.detach().roll(1, 0), lm_head, weights, 4, targets)
        return tokens.kl.sum() - tokens.logp.mean()

    def gradients(backward: Callable[[torch.Tensor], None]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        backward(policy(*scene, loss_of))
        return {name: weight.grad for name, weight in model.named_parameters()}

    passed: list[str] = []

    def walk(loss: torch.Tensor) -> None:
        walked = fake_gpu.Backward(loss.grad_fn, passed.append)
        one = torch.ones_like(loss)
        del loss
        walked.run(one)

    wanted = gradients(torch.Tensor.backward)
    monkeypatch.setattr("torch._C._current_graph_task_id", lambda: 1)  # by which checkpointing knows a backward pass
    found = gradients(walk)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert any(name.startswith("_ChunkedKL") for name in passed) and passed.count("AccumulateGrad") >= len(wanted)


def test_matrix_products_and_attention_are_counted():
    aten = torch.ops.aten
    a, b, bias = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(5)
    assert fake_gpu.operations(aten.mm, (a, b)) == fake_gpu.operations(aten.addmm, (bias, a, b)) == 2 * 3 * 4 * 5
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 10, 8)
    assert fake_gpu.operations(aten._scaled_dot_product_flash_attention, (q, k, k)) == 2 * 2 * 4 * 6 * 10 * 8
    backward = fake_gpu.operations(aten._scaled_dot_product_flash_attention_backward, (q, q, k, k))
    assert backward == 5 * 2 * 4 * 6 * 10 * 8
    assert fake_gpu.operations(aten.add, (a, a)) == 0


def test_bytes_are_counted_and_devices_do_not_mix():
    with fake_gpu.as_with_a_device(), fake_gpu.FakeGPU() as gpu:
        kept = torch.zeros(1000, device="cuda")  # 4,000 bytes, in multiples of 512
        gpu.begin()
        total = (kept + 1).sum()
        assert total.device.type == "cuda" and gpu.live == 4096 + 512 and gpu.peak == 2 * 4096 + 512
        assert not gpu.waits and not gpu.uploads
        with pytest.raises(RuntimeError, match="device"):
            kept + torch.arange(1000)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs PyTorch's CUDA build")
def test_what_the_host_waits_for_is_counted():
    with fake_gpu.as_with_a_device(), fake_gpu.FakeGPU() as gpu:
        kept = torch.zeros(3, device="cuda")
        float(kept.sum())
        kept[kept > 0]
        torch.arange(3).to("cuda")
        assert sum(gpu.waits.values()) == 2 and sum(gpu.uploads.values()) == 1
