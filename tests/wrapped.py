"""A tokenizer with the calls that transformers wraps around it, without the seconds that importing transformers takes;
test_rollout.py compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


class Encoded(dict):
    """{"input_ids": ids}, which is an attribute too."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


class Wrapped:
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> Encoded:
        return Encoded(input_ids=self.tokenizer.encode(text).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens=False, clean_up_tokenization_spaces=False) -> str:
        assert not clean_up_tokenization_spaces
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def bytewise() -> Tokenizer:
    """Byte-level without merges: every byte is one token."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wordwise() -> Tokenizer:
    """Joins words by spaces when it decodes, so that no word is a piece of the text on its own."""
    words = ["<think>", "</think>", "<glue>", "</glue>", "red", "3", "8", ","]
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
