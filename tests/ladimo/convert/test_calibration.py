import dataclasses
from pathlib import Path

import pytest
import torch

from ladimo.checkpoint import read_config
from ladimo.convert.data.calibration import PIECE_CHARACTERS, Encoder, calibrate, evaluation_blocks, pieces
from tests.factories import BOS_ID, EOS
from tests.ladimo.convert.conftest import make_text


@pytest.fixture(scope="module")
def encoder(source: Path) -> Encoder:
    return Encoder(source, read_config(source))


def rows(blocks: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in blocks.tolist()}


def test_splits_are_disjoint_seeded_and_of_the_asked_size(encoder: Encoder, text: Path) -> None:
    made, again, other = (calibrate(encoder, 3100, seed, [text]) for seed in (0, 0, 1))
    assert [len(made.fit), len(made.holdout), len(made.evaluation)] == [90, 10, 20]
    assert made.fit.shape[1] == 32
    assert (made.fit[:, 0] == BOS_ID).all()
    assert not rows(made.fit) & rows(made.holdout)
    assert not (rows(made.fit) | rows(made.holdout)) & rows(made.evaluation)
    assert torch.equal(made.fit, again.fit)
    assert rows(made.fit) != rows(other.fit)
    assert made.note == ""


def test_short_text_is_used_in_proportion_with_a_note(encoder: Encoder, tmp_path: Path) -> None:
    short = make_text(tmp_path / "short.txt", words=400)
    made = calibrate(encoder, 100_000, 0, [short])
    total = len(made.fit) + len(made.holdout) + len(made.evaluation)
    assert total == len(encoder.encode([short.read_text()])) // 31
    assert len(made.evaluation) == pytest.approx(total / 6, abs=1)
    assert "in the same proportions" in made.note


def test_text_that_does_not_fill_three_blocks_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("x" * 92)
    with pytest.raises(ValueError, match="92 tokens; at least 93 are needed"):
        calibrate(encoder, 1000, 0, [path])
    path.write_text("x" * 93)
    assert [len(part) for part in dataclasses.astuple(calibrate(encoder, 1000, 0, [path]))[:3]] == [1, 1, 1]


def test_the_default_text_is_the_standard_library(encoder: Encoder) -> None:
    made = calibrate(encoder, 1000, 0, None)
    assert len(made.fit) + len(made.holdout) == 32
    assert len(made.evaluation) == 6


def test_evaluation_takes_the_first_tokens_in_whole_blocks(encoder: Encoder, text: Path, tmp_path: Path) -> None:
    blocks = evaluation_blocks(encoder, text, 40)
    assert blocks.shape == (2, 32)
    assert encoder.tokenizer.decode(blocks[:, 1:].flatten()) == text.read_text()[:62]
    assert len(evaluation_blocks(encoder, text, None)) == len(text.read_text()) // 31
    (tmp_path / "tiny.txt").write_text("x" * 30)
    with pytest.raises(ValueError, match="has 30 tokens; at least 31 are needed"):
        evaluation_blocks(encoder, tmp_path / "tiny.txt", None)


def test_text_must_be_there_and_utf8(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(ValueError, match="latin.txt: not UTF-8"):
        evaluation_blocks(encoder, tmp_path / "latin.txt", None)
    with pytest.raises(ValueError, match="no such file"):
        calibrate(encoder, 1000, 0, [tmp_path / "none.txt"])


def test_a_tokenizer_beyond_the_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    """256 bytes and two special tokens: a model of 257 lacks EOS, one of 256 BOS too, and one of 600 is another model."""
    config = read_config(source)
    encoder = Encoder(source, dataclasses.replace(config, vocab_size=257))
    with pytest.raises(ValueError, match="gives id 257, the model's vocab_size is 257"):
        encoder.encode([EOS])
    with pytest.raises(ValueError, match="gives id 256, the model's vocab_size is 256"):
        Encoder(source, dataclasses.replace(config, vocab_size=256))
    for size in (200, 600):
        with pytest.raises(ValueError, match=f"the tokenizer has 258 tokens, the model's vocab_size is {size}"):
            Encoder(source, dataclasses.replace(config, vocab_size=size))


def test_a_missing_or_broken_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    for model_type in ("llama", "mistral", "qwen2"):  # for some of these transformers would make up a tokenizer of one token
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        with pytest.raises(ValueError, match="has no tokenizer; one of tokenizer.json"):
            Encoder(tmp_path, read_config(source))
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        Encoder(tmp_path, read_config(source))


def test_pieces_join_to_the_text() -> None:
    text = "line\n" * PIECE_CHARACTERS
    cut = pieces(text)
    assert len(cut) > 3
    assert "".join(cut) == text
    assert all(piece.endswith("\n") for piece in cut)
