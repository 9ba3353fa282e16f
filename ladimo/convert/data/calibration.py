"""Turns text into token blocks: the fit, holdout and evaluation splits of a conversion, and the blocks of an evaluation.

Perplexity is measured in one way everywhere in the project. The text is one stream of tokens without special tokens, cut into
windows. Each window is prefixed with BOS if the tokenizer has one. Each token of a window is scored given BOS and the tokens
before it in the window. An incomplete last window is dropped.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.auto import load_tokenizer
from ladimo.demo.corpus import is_held_out, library_sources
from ladimo.model.config import ModelConfig

MAX_BLOCK = 2048
PIECE_CHARACTERS = 1 << 16  # long files are cut into pieces, so that a small sample comes from all parts of them
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROTOCOL = (
    "One token stream without special tokens, cut into windows of {window} tokens, each prefixed with BOS where the "
    "tokenizer has one; every token is scored given BOS and the tokens before it in its window."
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token blocks [B, S] int64 of the three splits. note: a line for the user, or empty."""

    fit: Tensor
    holdout: Tensor
    evaluation: Tensor
    note: str = ""


class Encoder:
    """A checkpoint's tokenizer, and the shape of its token blocks. Raises ValueError if there is no usable tokenizer."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        if not any((directory / name).exists() for name in VOCABULARY_FILES):  # transformers would make an empty one
            raise ValueError(f"{directory}: has no tokenizer; one of {', '.join(VOCABULARY_FILES)} is needed")
        try:
            self.tokenizer: Any = load_tokenizer(directory)
        except Exception as error:  # transformers and tokenizers raise many unrelated types here
            first_line = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{directory}: cannot read the tokenizer ({type(error).__name__}: {first_line})") from error
        # Embeddings are often padded, and a token that was added for padding may be beyond them. Any other difference means
        # that the tokenizer belongs to another model.
        if self.tokenizer.vocab_size > config.vocab_size or 2 * len(self.tokenizer) < config.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer has {len(self.tokenizer)} tokens, the model's vocab_size is {config.vocab_size}: "
                f"it is another model's"
            )
        self.directory = directory
        self.vocab_size = config.vocab_size
        self.block = min(MAX_BLOCK, config.max_position_embeddings)
        self.bos: int | None = self.tokenizer.bos_token_id
        if self.bos is not None:
            self._check(self.bos)

    @property
    def window(self) -> int:
        """The number of text tokens in one block."""
        return self.block - 1

    @property
    def protocol(self) -> str:
        return PROTOCOL.format(window=self.window)

    def encode(self, texts: Iterable[str], limit: float = math.inf) -> Tensor:
        """The token ids of the texts in order, as one stream. It ends after the text with which it reaches `limit` tokens."""
        ids: list[int] = []
        for text in texts:
            ids += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= limit:
                break
        if ids:
            self._check(max(ids))
        return torch.tensor(ids, dtype=torch.int64)

    def blocks(self, stream: Tensor) -> Tensor:
        """The complete windows of a stream, each with BOS: [B, S]."""
        windows = stream[: len(stream) // self.window * self.window].view(-1, self.window)
        if self.bos is None:
            return windows
        return torch.cat((torch.full((len(windows), 1), self.bos), windows), dim=1)

    def _check(self, token: int) -> None:
        if token >= self.vocab_size:
            raise ValueError(f"{self.directory}: the tokenizer gives id {token}, the model's vocab_size is {self.vocab_size}")


def calibrate(encoder: Encoder, tokens: int, seed: int, files: Sequence[Path] | None) -> Calibration:
    """About 0.9 * tokens to fit, 0.1 * tokens held out, and 0.2 * tokens to evaluate. A short text gives less of all three.

    Without files the text is Python's standard library. Its held-out modules, which the demo model has not seen, are used to
    evaluate. Raises ValueError if the text does not fill one block per split.
    """
    order = random.Random(seed)
    if files is None:
        sources = library_sources()
        pools = [[text for name, text in sources.items() if is_held_out(name) == held_out] for held_out in (False, True)]
    else:
        pools = [[piece for text in map(read_text, files) for piece in pieces(text)]]
    wanted = [encoder.window * _count(tokens * share, encoder) for share in (0.9, 0.1, 0.2)]
    needs = [sum(wanted)] if len(pools) == 1 else [wanted[0] + wanted[1], wanted[2]]
    generator = torch.Generator().manual_seed(seed)
    pooled, found = [], 0
    for pool, need in zip(pools, needs, strict=True):
        order.shuffle(pool)
        stream = encoder.encode(pool, limit=need)
        found += len(stream)
        blocks = encoder.blocks(stream)
        pooled.append(blocks[torch.randperm(len(blocks), generator=generator)[: need // encoder.window]])
    total = sum(map(len, pooled))
    if any(len(blocks) < least for blocks, least in zip(pooled, (3,) if len(pools) == 1 else (2, 1), strict=True)):
        needed = 3 * encoder.window
        raise ValueError(f"the text has {found} tokens; at least {needed} are needed (a block of {encoder.window} per split)")
    note = ""
    if total < sum(needs) // encoder.window:
        have, asked = total * encoder.window, sum(needs)
        note = f"the text has {found:,} tokens: using {have:,} of the {asked:,} asked for, in the same proportions"
    if len(pools) == 1:
        evaluation = min(max(1, round(total / 6)), total - 2)
        pooled = [pooled[0][evaluation:], pooled[0][:evaluation]]
    fitting, evaluating = pooled
    holdout = max(1, round(len(fitting) / 10))
    return Calibration(fitting[holdout:], fitting[:holdout], evaluating, note)


def evaluation_blocks(encoder: Encoder, file: Path, tokens: int | None) -> Tensor:
    """The first `tokens` tokens of a file, rounded up to whole blocks [B, S]; None: all whole blocks.

    Raises ValueError if the text does not fill one block.
    """
    stream = encoder.encode([read_text(file)])
    blocks = encoder.blocks(stream)
    if not len(blocks):
        raise ValueError(f"{file}: has {len(stream)} tokens; at least {encoder.window} are needed (one block)")
    return blocks if tokens is None else blocks[: math.ceil(tokens / encoder.window)]


def read_text(file: Path) -> str:
    """Raises ValueError with the file's name if it is missing or is not UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def pieces(text: str) -> list[str]:
    """The text, cut at line ends into pieces of about PIECE_CHARACTERS. Joined, they are the text."""
    cut: list[str] = []
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        cut.append(text[start:end])
        start = end
    return cut


def _count(tokens: float, encoder: Encoder) -> int:
    return max(1, round(tokens / encoder.window))
