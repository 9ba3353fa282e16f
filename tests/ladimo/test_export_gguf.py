"""GGUF files with a tokenizer: llama.cpp reads text as the model's own tokenizer does."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ladimo import export
from ladimo.checkpoint import read_json, write_json
from ladimo.export.gguf_tokenizer import LLAMA3_WORDS, QWEN2_WORDS, find_splitting
from tests.factories import BOS, CHAT_TEMPLATE, EOS, make_dense

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
VOCAB = 320
TEXT = [
    "the model of the words and the numbers 12 345 6789 in the file",
    "def read(lines):\n    return the model's lines\n",
] * 40


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTINGS: dict[str, tuple[Any, Any]] = {
    "gpt-2": (BYTES, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), None),
    "llama-bpe": (split_by(LLAMA3_WORDS), None),
    "qwen2": (split_by(QWEN2_WORDS), normalizers.NFC()),
}


def save_bpe(path: Path, splitting: Any, normalizer: Any) -> None:
    """A byte-level tokenizer that has learned some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(path)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "dense", vocab_size=VOCAB, num_hidden_layers=1)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_the_file_has_the_tokenizer(name: str, dense: Path, tmp_path: Path) -> None:
    """Where llama.cpp is installed, `export` has it read a text, and compares the tokens."""
    from gguf import GGUFReader

    save_bpe(dense, *SPLITTINGS[name])
    assert find_splitting(dense) == name
    export.export(dense, tmp_path / "out", "gguf", "full")
    fields = GGUFReader(tmp_path / "out/model.gguf").fields
    raw = read_json(dense / "tokenizer.json")
    assert fields["tokenizer.ggml.pre"].contents() == name
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert {tokens[number] for number in raw["model"]["vocab"].values()} == set(raw["model"]["vocab"])
    assert (len(tokens), tokens[-1], types[-1]) == (VOCAB, f"[PAD{VOCAB - 1}]", 5)  # 5: no token of the tokenizer
    assert types[fields["tokenizer.ggml.eos_token_id"].contents()] == 3  # 3: never written as text
    assert len(fields["tokenizer.ggml.merges"].contents()) == len(raw["model"]["merges"])
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE


def test_a_tokenizer_that_llama_cpp_would_split_differently_is_left_out(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gguf import GGUFReader

    save_bpe(dense, split_by(r"\p{L}+"), None)
    assert find_splitting(dense) is None
    export.export(dense, tmp_path / "out", "gguf", "full")
    assert GGUFReader(tmp_path / "out/model.gguf").fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert "so the file takes token ids" in caplog.text


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(dense: Path, tmp_path: Path) -> None:
    save_bpe(dense, *SPLITTINGS["gpt-2"])
    raw = read_json(dense / "tokenizer.json")
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": VOCAB, "content": "<|more|>"})
    write_json(dense / "tokenizer.json", raw)
    with pytest.raises(ValueError, match=f"token {VOCAB} is not below vocab_size {VOCAB}"):
        export.export(dense, tmp_path / "out", "gguf", "full")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [{"byte_fallback": True}, {"type": "Unigram"}, {"merges": []}])
def test_other_kinds_of_tokenizers_are_left_out(field: dict[str, Any], dense: Path) -> None:
    save_bpe(dense, *SPLITTINGS["gpt-2"])
    raw = read_json(dense / "tokenizer.json")
    write_json(dense / "tokenizer.json", {**raw, "model": {**raw["model"], **field}})
    assert find_splitting(dense) is None


def test_a_qwen3_has_the_tensors_that_llama_cpp_reads(tmp_path: Path) -> None:
    """By the list of the package gguf, which llama.cpp's own converter uses."""
    from gguf import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES, GGUFReader

    dense = make_dense(tmp_path / "dense", model_type="qwen3", head_dim=16, num_hidden_layers=1)
    export.export(dense, tmp_path / "out", "gguf", "full")
    file = GGUFReader(tmp_path / "out/model.gguf")
    assert file.fields["general.architecture"].contents() == "qwen3"
    known = {TENSOR_NAMES[tensor].format(bid=0) + ".weight" for tensor in MODEL_TENSORS[MODEL_ARCH.QWEN3]}
    written = {tensor.name for tensor in file.tensors}
    assert {"blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"} < written <= known
    biased = make_dense(tmp_path / "biased", model_type="qwen3", head_dim=16, num_hidden_layers=1, attention_bias=True)
    with pytest.raises(ValueError, match="llama.cpp reads no biases in the attention"):
        export.export(biased, tmp_path / "none", "gguf", "full")
