"""The policy: prompts with clips, their positions, and one computation of a prompt for its whole group.

- `mrope_positions`: the released checkpoints' rule for time, row and column positions, whatever version of transformers
  is installed.
- `group_hidden`: prompts and their responses are one row without padding; each response sees its prompt and itself
  (`engine/attention.py`), at the positions it would have alone. Log-probabilities and gradients are those of G passes.

What a model family does its own way is in `engine/families.py`, sampling in `engine/sampling.py`.

Shapes: B prompts, G responses per prompt, T response tokens, N tokens in a row, H hidden size, W that of visual tokens:
H, or a multiple with what inner layers add. Responses come padded on the right; masks say what is real.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor, prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.attention import Tree
from engine.families import BANNED_TOKENS, EOS_TOKENS, family_of
from engine.language import row_hidden
from prompts import LETTERS
from video import PATCH, Clip, normalise_patches, patchify_uint8

VISION_CHUNK = 32768  # patches that the vision tower takes at a time: 8,192 visual tokens


class ModelError(ValueError):
    """A checkpoint that is not there, of no family, or not all there."""


# ---------------------------------------------------------------- prompts and positions


@dataclass
class Video:
    """The pixels of one clip as the vision tower takes them.

    `patches`: uint8 [t * h * w, 6 * side^2]; `grid`: (t, h, w) in pairs of frames and in patches; `step`: seconds
    between frames, which are of these `times`; `tokens`: [n, W] if a vision tower that does not change has encoded it.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    step: float
    times: Sequence[float] = ()
    tokens: Tensor | None = None

    @classmethod
    def of(cls, clip: Clip) -> Video:
        return cls(*patchify_uint8(clip.frames, clip.patch), clip.step, clip.times)

    @classmethod
    def from_frames(cls, frames: Tensor, step: float, patch: int = PATCH) -> Video:
        """frames uint8 [N, 3, H, W], `step` seconds apart from 0 on."""
        return cls.of(Clip(frames, [k * step for k in range(len(frames))], step, patch))

    @property
    def n_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // 4


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with the ids that sampling needs: `eos` ends a response, `banned` are never sampled (vision
    tokens). `outer_tags`: see engine/qwen3_vl.py.
    """

    tokenizer: PreTrainedTokenizerBase
    eos: tuple[int, ...]
    banned: tuple[int, ...]
    outer_tags: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, outer_tags: bool = False) -> Vocabulary:
        """Raises ModelError if the tokenizer lacks one of Qwen's special tokens."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (*EOS_TOKENS, *BANNED_TOKENS) if token not in vocabulary]
        if missing:
            raise ModelError(f"this is not a Qwen2.5-VL tokenizer: it has no {', '.join(missing)}")
        eos, banned = (tuple(vocabulary[token] for token in tokens) for tokens in (EOS_TOKENS, BANNED_TOKENS))
        return cls(tokenizer, eos, banned, outer_tags)

    def ids(self, text: str) -> list[int]:
        return list(tokenised(self.tokenizer, text))

    def forced_letter(self, text: str, n_options: int) -> tuple[list[int], list[int]]:
        """Prompt ids that end where the letter of `{text}<answer>A` is decided, and the token that decides for each.

        Tokenizers may fuse the letter with the tag (`>A`): the continuations' shared beginning is found, not assumed.
        """
        continued = [self.ids(f"{text}<answer>{letter}") for letter in LETTERS[:n_options]]
        shared = len(continued[0]) - 1
        if any(len(ids) != shared + 1 or ids[:shared] != continued[0][:shared] for ids in continued):
            raise ValueError("this tokenizer does not write an answer letter as one token")
        return continued[0][:shared], [ids[shared] for ids in continued]


@lru_cache(maxsize=1024)
def tokenised(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """A text's ids, remembered: the times of a video's frames and its questions come again and again."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Prompt:
    """A tokenised prompt: `ids` int64 [P], `positions` int64 [3, P], its clips, and the position of what follows."""

    ids: Tensor
    positions: Tensor
    videos: list[Video]
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Observation:
    """What a response is shown after `after` of its own tokens: ids, clips, and positions that go on where it was."""

    after: int
    prompt: Prompt


def mrope_positions(
    segments: Sequence[int | tuple[int, int, int, float]], tokens_per_second: float, start: int = 0
) -> tuple[Tensor, int]:
    """Time, row and column positions of a prompt, by the rule the released checkpoints were trained with.

    `segments`: in order, either a number of text tokens or a video as (t, rows, columns, seconds per temporal grid),
    rows and columns in visual tokens. Text advances by 1 on all three axes. A video that starts at p has time
    p + floor(k * tokens_per_second * seconds per grid), row p + i, column p + j; what follows it starts at the largest
    of its positions + 1. Returns (int64 [3, L], next position).
    """
    parts, p = [], start
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(p, p + segment).expand(3, -1))
            p += segment
            continue
        positions, extent = grid_positions(*segment[:3], tokens_per_second * segment[3])
        parts.append(positions + p)
        p += extent
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long), p


@lru_cache(maxsize=256)
def grid_positions(t: int, h: int, w: int, step: float) -> tuple[Tensor, int]:
    """Positions of a grid of visual tokens that starts at 0, `step` apart in time: int64 [3, t * h * w]; shared. And
    the largest of them + 1.
    """
    # The sampling interval is exact, its product may fall short of a whole number by a rounding error: so 1e-6.
    time = torch.tensor([floor(k * step + 1e-6) for k in range(t)])
    positions = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1)
    return positions, int(positions.max()) + 1


def build_prompt(
    ids: Sequence[int], videos: Sequence[Video], config, vocabulary: Vocabulary | None = None, start: int = 0
) -> Prompt:
    """A prompt from token ids in which each `<|video_pad|>` stands for one of the clips, in order, and becomes what its
    family shows of it, with a token per 2x2 patches; positions begin at `start`. Qwen3-VL needs a vocabulary.
    """
    pad = config.video_token_id
    if ids.count(pad) != len(videos):
        raise ValueError(f"the prompt has {ids.count(pad)} <|video_pad|> for {len(videos)} clips")
    items = family_of(config).lay_out(ids, videos, config, vocabulary)
    full = [token for item in items for token in ([item] if isinstance(item, int) else [pad] * prod(item[:3]))]
    runs = itertools.groupby(items, type)  # of text tokens, and of grids
    segments = [segment for kind, run in runs for segment in ([len(list(run))] if kind is int else run)]
    positions, end = mrope_positions(segments, 1, start)
    return Prompt(torch.tensor(full, dtype=torch.long), positions, list(videos), end)


# ---------------------------------------------------------------- the language model


def encode_videos(model: PreTrainedModel, videos: Sequence[Video]) -> list[Tensor]:
    """The visual tokens [n, W] of each clip; a clip object that is there twice is encoded once.

    The tower works on chunks of at most `VISION_CHUNK` patches (whole temporal grids), which bounds its memory.
    """
    distinct = list({id(video): video for video in videos if video.tokens is None}.values())
    chunks: list[list[tuple[Tensor, tuple[int, int, int]]]] = [[]]
    room = VISION_CHUNK
    for video in distinct:
        t, h, w = video.grid
        first = 0
        while first < t:
            if room < h * w and chunks[-1]:
                chunks.append([])
                room = VISION_CHUNK
            n = min(t - first, max(1, room // (h * w)))
            chunks[-1].append((video.patches[first * h * w : (first + n) * h * w], (n, h, w)))
            first, room = first + n, room - n * h * w
    encoded = []
    family, device = family_of(model.config), model.get_input_embeddings().weight.device
    for chunk in filter(None, chunks):
        patches = normalise_patches(torch.cat([patches for patches, _ in chunk]).to(device), family.pixels)
        encoded.append(family.encode_clips(model.model.visual, patches, [grid for _, grid in chunk]))
    by_clip = {}
    if distinct:
        tokens = torch.cat(encoded).split([video.n_tokens for video in distinct])
        by_clip = dict(zip(map(id, distinct), tokens, strict=True))
    return [by_clip[id(video)] if video.tokens is None else video.tokens for video in videos]


@torch.no_grad()
def keep_tokens(model: PreTrainedModel, videos: Sequence[Video]) -> None:
    """Encode these clips once and for all; only for a vision tower that is not trained."""
    for video, tokens in zip(videos, encode_videos(model, videos), strict=True):
        video.tokens = tokens


def embed_prompts(
    model: PreTrainedModel, prompts: Sequence[Prompt], following: Sequence[Prompt] = ()
) -> tuple[Tensor, Tensor]:
    """All prompts, and pieces of text and clips that follow, in one row: embeddings [N, W], positions int64 [3, N]."""
    table = model.get_input_embeddings()
    pieces = [*prompts, *following]
    rows = [torch.cat([p.ids for p in part]).to(table.weight.device) for part in (prompts, following) if part]
    embeds, ids = torch.cat([table(row) for row in rows]), torch.cat(rows)
    videos = [video for piece in pieces for video in piece.videos]
    if videos:
        features = torch.cat(encode_videos(model, videos)).to(embeds)
        embeds = nn.functional.pad(embeds, (0, features.shape[1] - embeds.shape[1]))
        embeds = embeds.masked_scatter((ids == model.config.video_token_id)[:, None], features)
    elif torch.is_grad_enabled() and any(weight.requires_grad for weight in model.model.visual.parameters()):
        embeds = embeds + nothing_seen(model)
    return embeds, torch.cat([piece.positions for piece in pieces], dim=1).to(ids.device)


def nothing_seen(model: PreTrainedModel) -> Tensor:
    """0, by way of the vision tower, added where visual tokens would be: a process whose prompts have no video takes
    part in its collectives too, in the same order. FSDP2 leaves a layer whose inputs have no gradient to the end.
    """
    side = model.config.vision_config.patch_size
    blank = Video.from_frames(torch.zeros(1, 3, 4 * side, 4 * side, dtype=torch.uint8), 1.0, side)
    return 0 * encode_videos(model, [blank])[0].sum()


def last_hidden(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Tensor:
    """The hidden state after each prompt, [B, H]: its projection is the distribution of the first response token."""
    return row_hidden(model, *embed_prompts(model, prompts), Tree(tuple(map(len, prompts))))


def text_piece(ids: Tensor, start: int) -> Prompt:
    """Tokens of text from a position on."""
    return Prompt(ids, (start + torch.arange(len(ids))).expand(3, -1), [], start + len(ids))


def _response_pieces(prompt: Prompt, ids: Tensor, observations: Sequence[Observation]) -> tuple[list[Prompt], Tensor]:
    """What is computed of a response with these ids [T], in pieces, and the place, in these, of the token that predicts
    each id: int64 [T], -1 for the prompt's last one.

    Five tokens a to e, with x and y shown after three of them. Nothing is predicted from e, so it is not computed, nor
    would be what is shown after it:

        computed     a  b  c  x  y  d
                     0  1  2  3  4  5
        ids          a  b  c  d  e
        places      -1  0  1  4  5
    """
    pieces, places = [], torch.arange(-1, len(ids) - 1)
    first, position = 0, prompt.next_position
    for observation in observations:
        if observation.after < len(ids):
            pieces += [text_piece(ids[first : observation.after], position), observation.prompt]
            places[observation.after :] += len(observation.prompt)
            first, position = observation.after, observation.prompt.next_position
    return [*pieces, text_piece(ids[first:-1], position)], places


def group_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    responses: Tensor,
    mask: Tensor,
    observations: Sequence[Sequence[Sequence[Observation]]] | None = None,
) -> Tensor:
    """The hidden states that predict each response token, with each prompt computed once for its G responses.

    prompts: B of them; responses: int64 [B, G, T] padded on the right; mask: bool [B, G, T], real tokens. In episodes
    of several turns, responses are the sampled tokens alone, and `observations` [B][G] say, in order, what stood
    between them. Returns the states before the real tokens, [N, H], in the order of `responses[mask]` (before a first
    token: the state after the prompt, or after the observation).
    """
    rows, real = responses.cpu(), mask.cpu()
    computed, lengths, places = [], [], []
    offset = len(prompts)  # where the states of responses begin
    for b, prompt in enumerate(prompts):
        lengths.append([])
        for g in range(mask.shape[1]):
            between = () if observations is None else observations[b][g]
            pieces, inside = _response_pieces(prompt, rows[b, g][real[b, g]], between)
            computed += pieces
            places.append(torch.where(inside < 0, b, offset + inside))
            lengths[-1].append(sum(map(len, pieces)))
            offset += lengths[-1][-1]
    embeds, positions = embed_prompts(model, prompts, computed)
    hidden = row_hidden(model, embeds, positions, Tree(tuple(map(len, prompts)), tuple(map(tuple, lengths))))
    return hidden[torch.cat(places).to(hidden.device)]


class Policy(nn.Module):
    """The module that accelerate wraps: one forward pass goes from groups to their loss, so that a wrapper sees every
    use of a weight.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass."""
        # The newer name; up to transformers 5.22 there is only the older one.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        for layer in self.model.model.language_model.layers:
            layer.gradient_checkpointing = False  # `call_layer` does it

    def forward(
        self,
        prompts: Sequence[Prompt],
        responses: Tensor,
        mask: Tensor,
        objective: Callable[[Tensor, Tensor], object],
        observations: Sequence[Sequence[Sequence[Observation]]] | None = None,
    ) -> object:
        """`objective(hidden [N, H] of the real response tokens, output projection [V, H])`; None without prompts."""
        if not prompts:
            return None
        hidden = group_hidden(self.model, prompts, responses, mask, observations)
        return objective(hidden, self.model.lm_head.weight)
