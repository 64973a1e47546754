"""Sampling: B prompts with G responses each, decoded together, token by token.

A prompt's keys and values are computed once and shared by its G responses; a response can be shown more text and clips
after each of its turns.

Shapes: B prompts, G responses per prompt, T response tokens, N tokens in a row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kl
from engine.attention import GroupCache, Stretch, Tree
from engine.language import row_hidden
from policy import (
    Observation,
    Prompt,
    Video,
    Vocabulary,
    build_prompt,
    embed_prompts,
    text_piece,
)


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


@dataclass(frozen=True)
class Pace:
    """Decoding is looked at every `check` tokens, to see which responses have ended; these leave if the batch is then
    at most `leave` times as large. In between, attention is over a multiple of `window` of a response's own slots, and
    steps are CUDA graphs if `capture`.
    """

    check: int
    window: int
    capture: bool
    leave: float = 0.75


def decoding_pace(model: nn.Module) -> Pace:
    """On the CPU, responses leave as soon as they can. A GPU would wait for the host at each look, and for the launch
    of each kernel.

    A capture takes as long as eight steps of 7B, and each window and each size of the batch needs one, while weights
    and prompts are what a step reads: so there are few of either.
    """
    if model.get_input_embeddings().weight.device.type != "cuda":
        return Pace(1, 1, False)
    return Pace(16, 256, True, leave=0.5)


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
    """A turn of a response: `row` is b * G + g, `number` counts its turns from 0, `ids` int64 [T] on the CPU, `hidden`
    [T, H] what each was chosen from, if that is kept.
    """

    row: int
    number: int
    ids: Tensor
    hidden: Tensor | None = None


@dataclass
class Rows:
    """What the device knows of all n = B * G rows, in tensors that are written in place: a step can be captured.

    `ids` int64 [n, T]: the turn's tokens, of which `count` int64 [n] are there; `ended` bool [n]. `start` int64 [n]:
    the position of the turn's first token; `held` int64 [n]: how many tokens the response had before it, observations
    included. `uniform` float64 [n, T]: the turn's random numbers; None decodes greedily. `hidden` [n, T, H]: what each
    token was chosen from, if that is kept.

    So the last token of a row stands at the position start + count - 1, and has held + count - 1 tokens before it
    beside the prompt's. A row that has ended repeats its last token.
    """

    ids: Tensor
    count: Tensor
    ended: Tensor
    start: Tensor
    held: Tensor
    uniform: Tensor | None
    hidden: Tensor | None


@dataclass
class Progress:
    """What the host knows of a row: how many tokens its prompt has, the number of its turn, and how many of its tokens
    are of earlier turns; how many of this turn's have been `checked` for a stop string.
    """

    prompt: int
    number: int = 0
    earlier: int = 0
    checked: int = 0


class Sampler:
    """B prompts with G responses each, decoded together; a response can be shown something after each of its turns.

        sampler = Sampler(...)
        while turns := sampler.sample():
            sampler.observe({turn.row: (ids, clips), ...})  # for those that go on

    A response that has ended leaves the batch. `computed` [b, g] are the rows that are still in it, `index` the same on
    the device; `active` those in a turn, `paused` those that have just ended one.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
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
        """Compute the prompts, once each, and the first token of each response.

        A turn has up to `max_tokens`; it ends with, and includes, its first end token, or the first token after which
        `stop` (see `stops_at`) says so of its ids. seed(row, number of the turn): one per turn, so that a response does
        not depend on the batch it is in; None decodes greedily. `keep_hidden`: what each token was chosen from.
        """
        self.model, self.vocabulary, self.max_tokens, self.temperature = model, vocabulary, max_tokens, temperature
        self.seed, self.stop, self.pace = seed, stop, decoding_pace(model)
        embeds, positions = embed_prompts(model, prompts)
        device, count = embeds.device, len(prompts) * group_size
        self.eos = torch.tensor(vocabulary.eos, device=device, dtype=torch.long)
        self.banned = torch.tensor(vocabulary.banned, device=device, dtype=torch.long)
        self.progress = [Progress(len(prompt)) for prompt in prompts for _ in range(group_size)]
        self.active, self.paused = set(range(count)), set()
        self.computed = torch.arange(count).view(len(prompts), group_size)
        self.index = self.computed.flatten().to(device)

        tree = Tree(tuple(map(len, prompts)))
        self.cache = GroupCache(tree, group_size, self._rounded(max_tokens))
        self.graphs = Graphs() if self.pace.capture else None
        hidden = row_hidden(model, embeds, positions, tree, self.cache)
        starts = [prompt.next_position for prompt in prompts for _ in range(group_size)]
        self.rows = Rows(
            ids=torch.zeros(count, max_tokens, dtype=torch.long, device=device),
            count=torch.zeros(count, dtype=torch.long, device=device),
            ended=torch.zeros(count, dtype=torch.bool, device=device),
            start=torch.tensor(starts, device=device),
            held=torch.zeros(count, dtype=torch.long, device=device),
            uniform=None if seed is None else torch.stack(list(map(self._draws, range(count)))).to(device),
            hidden=hidden.new_zeros(count, max_tokens, hidden.shape[-1]) if keep_hidden else None,
        )
        _, self.lm_head = kl.same_dtype(hidden, model.lm_head.weight)  # cast once, not for every token
        self._choose(hidden.repeat_interleave(group_size, 0), self.index)

    @torch.no_grad()
    def sample(self) -> list[Sampled]:
        """Decode until at least one turn has ended; returns those that have, [] if none was left. A response that is
        shown nothing before the next call is over.
        """
        self.paused.clear()
        while self.active:
            count, held = self.rows.count.tolist(), self.rows.held.tolist()
            turns = self._ended(count)
            if turns:
                self.paused.update(turn.row for turn in turns)
                return turns
            self._leave()
            steps = min(self.pace.check, self.max_tokens - min(count[row] for row in self.active))
            furthest = max(held[row] + count[row] for row in self.active) + steps - 1
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
        for row in observations.keys() - self.paused:
            raise ValueError(f"row {row} cannot be shown anything: its turn has not just ended")
        rows, observed, pieces, stretches = sorted(observations), {}, [], []
        count, start, held = (x.tolist() for x in (self.rows.count, self.rows.start, self.rows.held))
        for row in rows:
            ids, videos = observations[row]
            position = start[row] + count[row]
            prompt = build_prompt(ids, videos, self.model.config, self.vocabulary, position)
            observed[row] = Observation(self.progress[row].earlier + count[row], prompt)
            # The turn's last token has been chosen, but not computed.
            last = text_piece(self.rows.ids[row, count[row] - 1 : count[row]].cpu(), position - 1)
            pieces += [last, prompt]
            ((b, g),) = (self.computed == row).nonzero().tolist()
            stretches.append(Stretch(b, g, self.progress[row].prompt, held[row] + count[row] - 1, 1 + len(prompt)))
        self._begin(observed, {row: s.start + s.length for row, s in zip(rows, stretches, strict=True)})
        embeds, positions = embed_prompts(self.model, pieces)
        hidden = row_hidden(self.model, embeds, positions, stretches, self.cache)
        self._choose(hidden, torch.tensor(rows, device=self.index.device))
        return observed

    def _begin(self, observed: dict[int, Observation], held: dict[int, int]) -> None:
        """The next turn of these rows, after what they are shown; `held`: tokens that they have then."""
        capacity = max(held.values()) + self.max_tokens
        if capacity > self.cache.capacity:  # by a quarter at least, so that it is not done for each row
            self.cache.reserve(self._rounded(max(capacity, self.cache.capacity * 5 // 4)))
            if self.graphs is not None:
                self.graphs.clear()
        for row, observation in observed.items():
            progress = self.progress[row]
            progress.number, progress.earlier, progress.checked = progress.number + 1, observation.after, 0
            self.rows.start[row], self.rows.held[row] = observation.prompt.next_position, held[row]
            self.rows.count[row], self.rows.ended[row] = 0, False
            if self.rows.uniform is not None:
                self.rows.uniform[row] = self._draws(row)
        self.active.update(observed)
        self.paused.difference_update(observed)

    def _draws(self, row: int) -> Tensor:
        """A row's random numbers for a turn, [max_tokens]."""
        generator = torch.Generator().manual_seed(self.seed(row, self.progress[row].number))
        return torch.rand(self.max_tokens, generator=generator, dtype=torch.float64)

    def _rounded(self, length: int) -> int:
        """Up to a multiple of a window."""
        return -(-length // self.pace.window) * self.pace.window

    def _step(self, window: int) -> None:
        """The next token of every row that is computed."""
        rows, index = self.rows, self.index
        last = rows.count[index] - 1  # the token that is fed
        self.cache.place((rows.held[index] + last).view(self.computed.shape), window)
        embeds = self.model.get_input_embeddings()(rows.ids[index, last])
        positions = (rows.start[index] + last).expand(3, -1)
        self._choose(row_hidden(self.model, embeds, positions, None, self.cache), index)

    def _choose(self, hidden: Tensor, index: Tensor) -> None:
        """Write the token that follows these states [m, H] of the rows `index` [m]."""
        rows = self.rows
        ended = rows.ended[index]
        place = rows.count[index] - ended.long()
        uniform = None if rows.uniform is None else rows.uniform[index, place]
        logits = kl.logits(hidden.to(self.lm_head.dtype), self.lm_head)
        chosen = choose_tokens(logits, uniform, self.temperature, self.banned)
        rows.ids[index, place] = torch.where(ended, rows.ids[index, place], chosen)
        if rows.hidden is not None:
            rows.hidden[index, place] = torch.where(ended[:, None], rows.hidden[index, place], hidden)
        rows.count[index] = place + 1
        rows.ended[index] = ended | (chosen[:, None] == self.eos).any(1) | (place + 1 == self.max_tokens)

    def _ended(self, count: list[int]) -> list[Sampled]:
        """The turns that have ended, after cutting off what was written beyond a stop string; corrects `count`."""
        rows = self.rows
        ended = rows.ended.tolist()
        if self.stop is not None:
            ids = rows.ids[:, : max(count)].tolist()
            for row in self.active:
                for n in range(self.progress[row].checked + 1, count[row] + 1):
                    if self.stop(ids[row][:n]):
                        count[row], ended[row] = n, True
                        break
                self.progress[row].checked = count[row]
            rows.count.copy_(torch.tensor(count))
            rows.ended.copy_(torch.tensor(ended))
        turns = []
        for row in (row for row in sorted(self.active) if ended[row]):
            ids = rows.ids[row, : count[row]].to("cpu", copy=True)
            hidden = None if rows.hidden is None else rows.hidden[row, : count[row]].clone()
            turns.append(Sampled(row, self.progress[row].number, ids, hidden))
        self.active.difference_update(turn.row for turn in turns)
        return turns

    def _leave(self) -> None:
        """Stop computing rows that have ended, if that makes the batch small enough (see `Pace`): of each prompt, the
        same number stays.
        """
        going = torch.tensor([[row in self.active for row in group] for group in self.computed.tolist()])
        prompts = going.any(1).nonzero().flatten()
        widest = int(going.sum(1).max())
        if len(prompts) * widest > self.pace.leave * going.numel():
            return
        left = (~going)[prompts].int().argsort(dim=1, stable=True)[:, :widest]  # those that go on come first
        self.cache.keep(prompts, left)
        self.computed = self.computed[prompts].gather(1, left)
        self.index = self.computed.flatten().to(self.index.device)
        if self.graphs is not None:
            self.graphs.clear()


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    group_size: int,
    max_tokens: int,
    vocabulary: Vocabulary,
    *,
    temperature: float = 1.0,
    seed: Callable[[int, int], int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    keep_hidden: bool = False,
) -> list[Sampled]:
    """G responses of one turn to each of B prompts, in the order of their rows b * G + g; arguments as of `Sampler`."""
    sampler = Sampler(
        model,
        prompts,
        group_size,
        max_tokens,
        vocabulary,
        temperature=temperature,
        seed=seed,
        stop=stop,
        keep_hidden=keep_hidden,
    )
    turns: list[Sampled] = []
    while ended := sampler.sample():
        turns += ended
    return sorted(turns, key=lambda turn: turn.row)
