"""What Qwen2.5-VL's tokenizer does with the texts of the tests, from committed facts; test_qwen.py compares them with
its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import decoders
from wrapped import Encoded

FACTS = Path(__file__).resolve().parent / "facts"
TOKENS = json.loads((FACTS / "qwen_tokens.json").read_text(encoding="utf-8"))
CHATS = json.loads((FACTS / "qwen_chats.json").read_text(encoding="utf-8"))["rows"]  # videos, system prompt, rendered


class CommittedTokenizer:
    """The tokenizer as far as it is committed: any text or id that is not is a KeyError."""

    def __init__(self):
        self.tokens = {int(i): token for i, token in TOKENS["tokens"].items()}
        self.decoder = decoders.ByteLevel()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Encoded:
        return Encoded(input_ids=self.encode(text))  # this tokenizer adds no special tokens

    def __len__(self) -> int:
        return TOKENS["size"]

    def encode(self, text: str) -> list[int]:
        return list(TOKENS["texts"][text])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces=False) -> str:
        assert not clean_up_tokenization_spaces
        skipped = TOKENS["special"] if skip_special_tokens else ()
        return self.decoder.decode([self.tokens[i] for i in ids if i not in skipped])

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in self.tokens.items()}


QWEN = CommittedTokenizer()


def offset_cases() -> Iterator[tuple[str, list[int], list[tuple[int, int]]]]:
    """Texts, their ids, and the offsets that the tokenizer itself reports."""
    for text, offsets in TOKENS["offsets"].items():
        yield text, TOKENS["texts"][text], [(start, end) for start, end in offsets]
