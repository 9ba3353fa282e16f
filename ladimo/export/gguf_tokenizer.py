"""Writes a tokenizer into a GGUF file, if it is a byte-level BPE tokenizer that llama.cpp can split text for.

llama.cpp splits text into words by code of its own, which it finds by a name. So a tokenizer is written only if its way of
splitting is one of those known here. Other models take token ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_json

# Patterns of words, as LLaMA 3 and Qwen2 have them in tokenizer.json.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def find_splitting(directory: Path) -> str | None:
    """llama.cpp's name for how the tokenizer in `directory` splits text. None for any other tokenizer."""
    if not (directory / "tokenizer.json").exists():
        return None
    raw = read_json(directory / "tokenizer.json")
    model, outer = raw["model"], raw["pre_tokenizer"] or {}
    if (
        model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]
    ):  # llama.cpp reads no vocabulary without merges
        return None
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    normalizer = (raw.get("normalizer") or {}).get("type")
    by_regex = steps[-1].get("use_regex", True)
    if normalizer is None and by_regex and kinds == ["ByteLevel"]:
        return "gpt-2"
    if normalizer is None and by_regex and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if by_regex or kinds != ["Split", "ByteLevel"]:
        return None
    words = steps[0]["pattern"].get("Regex")
    return {(LLAMA3_WORDS, None): "llama-bpe", (QWEN2_WORDS, "NFC"): "qwen2"}.get((words, normalizer))


def add_tokenizer(writer: Any, directory: Path, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template. Without a known tokenizer the model has no vocabulary.

    Raises ValueError if the tokenizer has more tokens than the model.
    """
    import gguf

    splitting = find_splitting(directory)
    if splitting is None:
        writer.add_tokenizer_model("no_vocab")
        return
    raw = read_json(directory / "tokenizer.json")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, number, kind in _tokens(raw):
        if number >= vocab_size:
            raise ValueError(f"{directory / 'tokenizer.json'}: token {number} is not below vocab_size {vocab_size}")
        tokens[number], types[number] = text, gguf.TokenType[kind]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(raw: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Each token's text, number and type. Added tokens come last, because they may also be in the vocabulary."""
    learned = [(text, number, "NORMAL") for text, number in raw["model"]["vocab"].items()]
    added = [
        (token["content"], token["id"], "CONTROL" if token["special"] else "USER_DEFINED") for token in raw["added_tokens"]
    ]
    return learned + added
