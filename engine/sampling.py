"""Sampling: B prompts with G responses each, decoded together, token by token.

A prompt's keys and values are computed once and shared by its G responses; a response can be shown more text and clips
after each of its turns.

Shapes: B prompts, G responses per prompt, T response tokens, N tokens in a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

import kl
from engine.attention import GroupCache, Stretch, Tree
from policy import Observation, Prompt, Video, build_prompt, embed_prompts, last_tokens, row_hidden, text_piece


def choose_tokens(logits: Tensor, uniform: Tensor | None, temperature: float, banned: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution at `uniform` [N]; None takes the most probable.
    logits [N, V] -> [N].
    """
    logits = logits.float().index_fill(-1, banned, float("-inf"))
    if uniform is None:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, dim=-1, dtype=torch.float64).cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]  # float sums may end below 1
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def stops_at(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the last of some ids completes one of these strings, however they are cut into tokens."""
    # Every token has at least one byte, so so many tokens at the end are enough.
    longest = max(len(string.encode()) for string in strings)

    def stop(ids: list[int]) -> bool:
        end, before = tokenizer.decode(ids[-longest:]), tokenizer.decode(ids[-longest:-1])
        return any(string in end and string not in before for string in strings)

    return stop


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """For as long as a cache is in use: in training mode with checkpointing, transformers' layers would ignore it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Pace:
    """Decoding is looked at every `check` tokens, to see which responses have ended. In between, attention is over a
    multiple of `window` of a response's own slots, and steps are CUDA graphs if `capture`.
    """

    check: int
    window: int
    capture: bool


def decoding_pace(model: nn.Module) -> Pace:
    """On the CPU, responses leave as soon as they can. A GPU would wait for the host at each look, and for the launch
    of each kernel. FSDP2's hooks cannot be captured.
    """
    if model.get_input_embeddings().weight.device.type != "cuda":
        return Pace(1, 1, False)
    return Pace(16, 64, not any(isinstance(module, FSDPModule) for module in model.modules()))


class Graphs:
    """Functions that touch static tensors alone, and ask the host nothing, as CUDA graphs.

    The first call with a key is an ordinary one, on the stream of the capture: it sets up what a capture cannot
    (cuBLAS's workspace, autocast's copies of the weights, which must stay: so graphs live within one autocast context).
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.clear()

    def clear(self) -> None:
        """Forget all graphs: the tensors have been replaced by others."""
        self.captured: dict[object, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after the other, so they share memory

    def run(self, key: object, function: Callable[[], None]) -> None:
        if key in self.captured:
            self.captured[key].replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            function()  # recorded, not executed
        self.captured[key] = graph


@dataclass
class Sampled:
    """What a response has said until it stopped: `row` is b * G + g, `number` counts its turns from 0, `ids` int64 [t]
    on the CPU, `hidden` [t, H] what each was chosen from, if it was to be kept.
    """

    row: int
    number: int
    ids: Tensor
    hidden: Tensor | None = None


class Sampler:
    """B prompts with G responses each, decoded together; a response can be shown something after each of its turns.

        sampler = Sampler(...)
        while turns := sampler.sample():
            sampler.observe({turn.row: (ids, clips), ...})  # for those that go on

    The state of all B * G rows is in tensors that are written in place: a row's `ids` [max_tokens] in this turn, of
    which `count` are there, and whether it has `ended`. What `_step` computes follows from them: a row's last token
    stands at the position `start` + `count` - 1, and has `held` + `count` - 1 tokens before it beside the prompt's; a
    row that has ended says its last token again. `rows` [b, g] are those that are still computed.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
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
        """Compute the prompts, once each, and the first token of each response; arguments are those of `sample`.

        max_tokens: of a turn; seed(row, number of the turn): None decodes greedily.
        """
        self.model, self.max_tokens, self.temperature, self.stop = model, max_tokens, temperature, stop
        self.seed, self.pace = seed, decoding_pace(model)
        embeds, positions = embed_prompts(model, prompts)
        device, count = embeds.device, len(prompts) * group_size
        self.eos = torch.tensor(eos, device=device, dtype=torch.long)
        self.banned = torch.tensor(banned, device=device, dtype=torch.long)
        self.ids = torch.zeros(count, max_tokens, dtype=torch.long, device=device)
        self.count, self.held = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(2))
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        starts = [prompt.next_position for prompt in prompts for _ in range(group_size)]
        self.start = torch.tensor(starts, device=device)
        self.stems = [len(prompt) for prompt in prompts for _ in range(group_size)]
        self.rows = torch.arange(count).view(len(prompts), group_size)
        self.index = self.rows.flatten().to(device)
        self.speaking, self.listening = set(range(count)), set()  # in a turn; having just ended one
        self.number = [0] * count  # of the turn
        self.said = [0] * count  # tokens, in earlier turns
        self.heard = [0] * count  # tokens of this turn that `stop` has seen
        self.uniform = None if seed is None else torch.stack(list(map(self._draws, range(count)))).to(device)

        tree = Tree(tuple(map(len, prompts)))
        self.cache = GroupCache(tree, group_size, self._rounded(max_tokens))
        self.graphs = Graphs() if self.pace.capture else None
        with _evaluation_mode(model):
            hidden = row_hidden(model, embeds, positions, tree, self.cache)[last_tokens(prompts)]
        self.states = hidden.new_zeros(count, max_tokens, hidden.shape[-1]) if keep_hidden else None
        _, self.lm_head = kl.aligned(hidden, model.lm_head.weight)  # cast once, not for every token
        self._choose(hidden.repeat_interleave(group_size, 0), self.index)

    @torch.no_grad()
    def sample(self) -> list[Sampled]:
        """Decode until at least one turn has ended; returns those that have, [] if none was left. A response that is
        shown nothing before the next call is over.
        """
        self.listening.clear()
        with _evaluation_mode(self.model):
            while self.speaking:
                count, held = self.count.tolist(), self.held.tolist()
                turns = self._ended(count)
                if turns:
                    self.listening.update(turn.row for turn in turns)
                    return turns
                self._leave()
                steps = min(self.pace.check, self.max_tokens - min(count[row] for row in self.speaking))
                furthest = max(held[row] + count[row] for row in self.speaking) + steps - 1
                window = min(self._rounded(furthest), self.cache.capacity)
                for _ in range(steps):
                    if self.graphs is None:
                        self._step(window)
                    else:
                        self.graphs.run(window, partial(self._step, window))
        return []

    @torch.no_grad()
    def observe(self, observations: dict[int, tuple[Sequence[int], Sequence[Video]]]) -> dict[int, Observation]:
        """Show something to rows whose turn has just ended: ids with one `<|video_pad|>` per clip, and the clips. Their
        next turn begins.

        Only these tokens are computed, in one pass; each sees its prompt, and all of its response before it. Returns,
        per row, what `group_hidden` needs. Raises ValueError for another row.
        """
        if not observations:
            return {}
        for row in observations.keys() - self.listening:
            raise ValueError(f"row {row} cannot be shown anything: its turn has not just ended")
        rows, shown, pieces, stretches = sorted(observations), {}, [], []
        count, start, held = (x.tolist() for x in (self.count, self.start, self.held))
        for row in rows:
            ids, videos = observations[row]
            position = start[row] + count[row]
            prompt = build_prompt(ids, videos, self.model.config, position)
            shown[row] = Observation(self.said[row] + count[row], prompt)
            # The turn's last token has been chosen, but not computed.
            last = text_piece(self.ids[row, count[row] - 1 : count[row]].cpu(), position - 1)
            pieces += [last, prompt]
            ((b, g),) = (self.rows == row).nonzero().tolist()
            stretches.append(Stretch(b, g, self.stems[row], held[row] + count[row] - 1, 1 + len(prompt)))
        self._begin(shown, {row: s.start + s.length for row, s in zip(rows, stretches, strict=True)})
        embeds, positions = embed_prompts(self.model, pieces)
        with _evaluation_mode(self.model):
            hidden = row_hidden(self.model, embeds, positions, stretches, self.cache)
        ends = [end - 1 for end in itertools.accumulate(s.length for s in stretches)]
        self._choose(hidden[ends], torch.tensor(rows, device=self.index.device))
        return shown

    def _begin(self, shown: dict[int, Observation], held: dict[int, int]) -> None:
        """The next turn of these rows, after what they are shown; `held`: tokens that they have then."""
        capacity = max(held.values()) + self.max_tokens
        if capacity > self.cache.capacity:  # by a quarter at least, so that it is not done for each row
            self.cache.reserve(self._rounded(max(capacity, self.cache.capacity * 5 // 4)))
            if self.graphs is not None:
                self.graphs.clear()
        for row, observation in shown.items():
            self.number[row], self.said[row], self.heard[row] = self.number[row] + 1, observation.after, 0
            self.start[row], self.held[row] = observation.prompt.next_position, held[row]
            self.count[row], self.ended[row] = 0, False
            if self.uniform is not None:
                self.uniform[row] = self._draws(row)
        self.speaking.update(shown)
        self.listening.difference_update(shown)

    def _draws(self, row: int) -> Tensor:
        """A row's random numbers for a turn, [max_tokens]."""
        generator = torch.Generator().manual_seed(self.seed(row, self.number[row]))
        return torch.rand(self.max_tokens, generator=generator).double()

    def _rounded(self, length: int) -> int:
        """Up to a multiple of a window."""
        return -(-length // self.pace.window) * self.pace.window

    def _step(self, window: int) -> None:
        """The next token of every row."""
        rows, fed = self.index, self.count[self.index] - 1
        self.cache.place((self.held[rows] + fed).view(self.rows.shape), window)
        embeds = self.model.get_input_embeddings()(self.ids[rows, fed])
        positions = (self.start[rows] + fed).expand(3, -1)
        self._choose(row_hidden(self.model, embeds, positions, None, self.cache), rows)

    def _choose(self, hidden: Tensor, rows: Tensor) -> None:
        """Write the token that follows these states [n, H] of these rows [n]."""
        ended = self.ended[rows]
        place = self.count[rows] - ended.long()
        uniform = None if self.uniform is None else self.uniform[rows, place]
        logits = kl.logits(hidden.to(self.lm_head.dtype), self.lm_head)
        chosen = choose_tokens(logits, uniform, self.temperature, self.banned)
        self.ids[rows, place] = torch.where(ended, self.ids[rows, place], chosen)
        if self.states is not None:
            self.states[rows, place] = torch.where(ended[:, None], self.states[rows, place], hidden)
        self.count[rows] = place + 1
        self.ended[rows] = ended | (chosen[:, None] == self.eos).any(1) | (place + 1 == self.max_tokens)

    def _ended(self, count: list[int]) -> list[Sampled]:
        """The turns that have ended, after cutting off what was said beyond a stop string; corrects `count`."""
        ended = self.ended.tolist()
        if self.stop is not None:
            ids = self.ids[:, : max(count)].tolist()
            for row in self.speaking:
                for n in range(self.heard[row] + 1, count[row] + 1):
                    if self.stop(ids[row][:n]):
                        count[row], ended[row] = n, True
                        break
                self.heard[row] = count[row]
            self.count.copy_(torch.tensor(count))
            self.ended.copy_(torch.tensor(ended))
        rows = [row for row in sorted(self.speaking) if ended[row]]
        self.speaking.difference_update(rows)
        hidden = [None if self.states is None else self.states[row, : count[row]].clone() for row in rows]
        ids = [self.ids[row, : count[row]].to("cpu", copy=True) for row in rows]
        numbers = [self.number[row] for row in rows]
        return [Sampled(*turn) for turn in zip(rows, numbers, ids, hidden, strict=True)]

    def _leave(self) -> None:
        """Stop computing rows that have ended, if that makes the batch smaller by a quarter: of each prompt, the same
        number stays.
        """
        going = torch.tensor([[row in self.speaking for row in group] for group in self.rows.tolist()])
        prompts = going.any(1).nonzero().flatten()
        widest = int(going.sum(1).max())
        if len(prompts) * widest > 0.75 * going.numel():
            return
        left = (~going)[prompts].int().argsort(dim=1, stable=True)[:, :widest]  # those that go on come first
        self.cache.keep(prompts.to(self.index.device), left.to(self.index.device))
        self.rows = self.rows[prompts].gather(1, left)
        self.index = self.rows.flatten().to(self.index.device)
        if self.graphs is not None:
            self.graphs.clear()


def sample(
    model: Qwen2_5_VLForConditionalGeneration,
    prompts: Sequence[Prompt],
    group_size: int,
    max_tokens: int,
    eos: Sequence[int],
    banned: Sequence[int],
    temperature: float = 1.0,
    seeds: Sequence[Sequence[int]] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    states: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample G responses per prompt; all prompts and responses are decoded together, the prompt's cache is shared by
    its group, and responses that have ended leave the batch.

    seeds [B][G]: one per response, so that a response does not depend on the batch it is in; None decodes greedily.
    `banned` ids are never sampled (vision tokens). A response ends with, and includes, its first `eos` token, or the
    first token after which `stop` (see `stops_at`) says so of its ids. `states`: a list that gets, for each of the T
    steps, the hidden states [B, G, H] that its tokens were chosen from (where `mask` is True). Returns ids int64
    [B, G, T] and mask bool [B, G, T].
    """
    shape = (len(prompts), group_size, -1)
    seed = None if seeds is None else lambda row, _: seeds[row // group_size][row % group_size]
    keep = states is not None
    sampler = Sampler(model, prompts, group_size, max_tokens, eos, banned, temperature, seed, stop, keep)
    while sampler.sample():
        pass  # none goes on
    longest = int(sampler.count.max())
    mask = torch.arange(longest, device=sampler.ids.device) < sampler.count[:, None]
    if states is not None:
        states += [state.view(shape) for state in sampler.states[:, :longest].unbind(1)]
    return sampler.ids[:, :longest].masked_fill(~mask, 0).view(shape), mask.view(shape)
