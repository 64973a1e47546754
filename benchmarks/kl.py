"""Chunked KL against materialised logits: time and peak memory of one forward and backward pass, side by side.

    python -m benchmarks.kl [--tokens 2048] [--hidden 896] [--vocab 152064] [--chunk 256] [--repeats 3]

Both compute, for every token, the weighted KL to a reference with its own projection, the sampled token's
log-probability under both, and the entropy, and take the gradient of (kl - logp).sum() for hidden states and
projection. "materialised" is what one would write with autograd: logits of all tokens, log_softmax, sums; what needs no
gradient is under no_grad. Memory is the peak above inputs and weights; the gradients themselves (hidden states and
projection) are part of it in both, and are also given apart. Times are medians, taken in turn: wall-clock on a GPU,
processor seconds of all threads on a CPU (other processes disturb them less).
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

import kl


def materialised(hidden_p, hidden_q, lm_head, weights, targets, lm_head_q):
    """The same quantities from whole logits, differentiated by autograd."""
    logp = torch.log_softmax((hidden_p @ lm_head.t()).float(), -1)
    with torch.no_grad():
        logq = torch.log_softmax((hidden_q @ lm_head_q.t()).float(), -1)
        entropy = torch.special.entr(logp.exp()).sum(-1)
    p = logp.exp()
    divergence = ((logq.exp() - p + p * (logp - logq)) * weights).sum(-1)
    logp_target = logp.gather(-1, targets[:, None])[:, 0]
    return divergence, logp_target, logq.gather(-1, targets[:, None])[:, 0], entropy


def chunked(hidden_p, hidden_q, lm_head, weights, targets, lm_head_q, chunk):
    stats = kl.chunked_weighted_kl(hidden_p, hidden_q, lm_head, weights, chunk, targets, lm_head_q=lm_head_q)
    return stats.kl, stats.logp, stats.ref_logp, stats.entropy


def peak_reset(device: str) -> int:
    """Start a new peak; returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return status("VmHWM")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(function, inputs, device: str) -> tuple[float, int, dict]:
    """Seconds, bytes of peak memory above the start, and results of one forward and backward pass."""
    hidden_p, lm_head = inputs["hidden_p"], inputs["lm_head"]
    hidden_p.grad = lm_head.grad = None
    before = peak_reset(device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    divergence, logp, _, entropy = function(**inputs)
    (divergence - logp).sum().backward()
    memory = peak(device) - before
    seconds = clock() - start
    results = {"kl": divergence.detach(), "logp": logp.detach(), "entropy": entropy, "grad": hidden_p.grad.clone()}
    return seconds, memory, results


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    n, h, v = arguments.tokens, arguments.hidden, arguments.vocab
    torch.manual_seed(0)
    lm_head = (torch.randn(v, h, device=device) * h**-0.5).to(dtype)
    hidden_p = torch.randn(n, h, device=device).to(dtype)
    inputs = {
        "hidden_p": hidden_p.clone().requires_grad_(),
        "hidden_q": hidden_p + 0.1 * torch.randn_like(hidden_p),
        "lm_head": lm_head.clone().requires_grad_(),
        "weights": torch.full((v,), 0.04, device=device),
        "targets": torch.randint(0, v, (n,), device=device),
        "lm_head_q": lm_head,  # another tensor, as in training, with the values that training starts from
    }
    forms = {
        "materialised": materialised,
        "chunked": lambda **kwargs: chunked(**kwargs, chunk=arguments.chunk),
    }
    seconds = {name: [] for name in forms}
    memory, results = {}, {}
    for _ in range(arguments.repeats):
        for name, function in forms.items():
            t, memory[name], results[name] = measure(function, inputs, device)
            seconds[name].append(t)

    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {dtype}: {n} tokens, hidden {h}, vocabulary {v}, chunk {arguments.chunk}"
    )
    gradients = sum(inputs[x].grad.nbytes for x in ("hidden_p", "lm_head"))
    print(f"gradients of hidden states and projection: {gradients / 2**30:.2f} GiB")
    print("| form | seconds (median) | peak GiB | peak without gradients, GiB |\n|---|---|---|---|")
    for form in forms:
        gib = memory[form] / 2**30
        print(f"| {form} | {statistics.median(seconds[form]):.2f} | {gib:.2f} | {gib - gradients / 2**30:.2f} |")
    slower = statistics.median(c / m for m, c in zip(seconds["materialised"], seconds["chunked"], strict=True))
    smaller = memory["materialised"] / memory["chunked"]
    print(f"chunked takes {slower:.2f} times the time and 1/{smaller:.1f} of the memory")
    for key in results["chunked"]:
        difference = results["chunked"][key].detach().float() - results["materialised"][key].detach().float()
        print(f"largest difference in {key}: {float(difference.abs().max()):.1e}")


if __name__ == "__main__":
    main()
