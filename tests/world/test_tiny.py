"""The built-in policy: a tokenizer of Qwen2.5's kind, a model of its architecture, and the shipped checkpoint."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.families import FAMILIES
from policy import Vocabulary
from world import benchmark, lessons, tiny

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer(lessons.corpus())


@pytest.mark.parametrize(
    "text", ["<think>red<time>(3.0,8.0)</time></think>", "häß 漢字 🎬 \t\n  x", "", "12345.67", "<glue>[]"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_words_and_tags_are_single_tokens(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<glue>[(12.5,8.0)]</glue>")["input_ids"])
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["1", "2", "5", "8", "0"]
    assert pieces[0] == "<glue>" and pieces[-1] == "</glue>"
    for word in (*benchmark.COLOURS, *benchmark.PATTERNS, *benchmark.COUNTS):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1


def test_the_tokenizer_has_the_real_ones_special_tokens(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    assert [tokenizer.convert_ids_to_tokens(i) for i in vocabulary.eos] == ["<|im_end|>", "<|endoftext|>"]
    ids = tokenizer("<|vision_start|><|video_pad|><|vision_end|>")["input_ids"]
    assert len(ids) == 3 and set(ids) <= set(vocabulary.banned)


def test_the_same_corpus_gives_the_same_tokenizer(tokenizer):
    assert tiny.build_tokenizer(lessons.corpus()).get_vocab() == tokenizer.get_vocab()


def test_the_model_is_small_and_ties_its_embeddings(tokenizer):
    model = tiny.build_model(tokenizer)
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 1_300_000
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vision_config.tokens_per_second == 2


@pytest.mark.parametrize(
    "name, family", [("tiny", "qwen3_vl"), ("tiny-zoomer", "qwen3_vl"), ("tiny-qwen2_5_vl", "qwen2_5_vl")]
)
def test_the_shipped_checkpoints_load_and_are_small(name, family):
    checkpoint = CHECKPOINTS / name
    assert sum(f.stat().st_size for f in checkpoint.iterdir()) < 5e6
    model, info = FAMILIES[family].model.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    shipped = AutoTokenizer.from_pretrained(checkpoint)
    assert shipped.get_vocab() == tiny.build_tokenizer(lessons.corpus(family)).get_vocab()  # as sft.py builds it
    assert model.config.text_config.vocab_size == len(shipped)
