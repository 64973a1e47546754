"""The stand-in for the released tokenizer: its decoding by hand, and all facts against the released files, where they
are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from qwen import CHATS, QWEN, TOKENS, offset_cases
from transformers import AutoTokenizer

from advantage import token_offsets
from kl import time_token_ids

RELEASED = Path(__file__).resolve().parents[2] / "shared" / "realdata" / "tokenizer"
CASES = [*TOKENS["texts"].values(), *(ids for ids, _ in TOKENS["sampled"])]


@pytest.fixture(scope="module")
def released():
    if not RELEASED.is_dir():
        pytest.skip(f"the released tokenizer is not at {RELEASED}")
    return AutoTokenizer.from_pretrained(RELEASED)


def test_decoding_by_hand():
    assert QWEN.decode([17, 15, 13, 18]) == "20.3"
    assert QWEN.decode([27, 9217, 23465, 151645]) == "<answer>A<|im_end|>"
    assert QWEN.decode([27, 9217, 23465, 151645], skip_special_tokens=True) == "<answer>A"
    assert QWEN.decode([102]) == "\ufffd" and QWEN.decode([24918]) == "２"


def test_texts_come_back_and_others_are_refused():
    for text in TOKENS["texts"]:
        assert QWEN.decode(QWEN(text).input_ids) == text.replace("e\u0301", "é")  # composed: NFC
    with pytest.raises(KeyError, match="never committed"):
        QWEN("never committed")
    with pytest.raises(KeyError, match="151664"):
        QWEN.decode([151_664])


def test_the_hard_cases_are_among_the_facts():
    alone = [[QWEN.decode([i]) for i in ids] for ids in CASES]
    assert sum("\ufffd" in piece for pieces in alone for piece in pieces) > 100  # pieces of characters
    assert any(piece.endswith(")</") for pieces in alone for piece in pieces)  # a token over the edge of a tag
    assert any(token.startswith("<|") for token in QWEN.get_vocab())
    assert len(list(offset_cases())) == 23


def test_the_committed_tokens_are_the_released_ones(released):
    assert {i: released.convert_ids_to_tokens(i) for i in QWEN.tokens} == QWEN.tokens
    special = [i for i in released.all_special_ids if i < TOKENS["size"]]
    assert sorted(special) == TOKENS["special"] and max(released.added_tokens_decoder) >= TOKENS["size"] - 1
    for text, ids in TOKENS["texts"].items():
        assert released(text).input_ids == released(text, add_special_tokens=False).input_ids == ids
    for text, _, offsets in offset_cases():
        assert released(text, return_offsets_mapping=True).offset_mapping == offsets


def test_each_part_of_the_committed_ids_decodes_as_released(released):
    for ids in CASES:
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                part = ids[start:end]
                assert QWEN.decode(part) == released.decode(part)
                assert QWEN.decode(part, skip_special_tokens=True) == released.decode(part, skip_special_tokens=True)
    assert [released.decode(ids) for ids, _ in TOKENS["sampled"]] == [text for _, text in TOKENS["sampled"]]


def test_the_time_tokens_of_the_whole_vocabulary_are_committed(released):
    assert torch.equal(time_token_ids(released), time_token_ids(QWEN))


def test_any_sampled_ids_of_the_whole_vocabulary_have_offsets(released):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ids = torch.randint(0, 151_643, (40,), generator=generator).tolist()
        text, offsets = token_offsets(released, ids)
        assert text == released.decode(ids, clean_up_tokenization_spaces=False)
        assert [a for a, _ in offsets] + [len(text)] == [0] + [b for _, b in offsets]


def test_the_committed_chats_are_rendered_by_the_released_template(released):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(json.loads((RELEASED / "chat_template.json").read_text())["chat_template"])
    for n_videos, system, rendered in CHATS:
        content = [{"type": "video"}] * n_videos + [{"type": "text", "text": "Why?"}]
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": content})
        assert template.render(messages=messages, add_generation_prompt=True) == rendered
