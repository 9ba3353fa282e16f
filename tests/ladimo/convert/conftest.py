"""One small conversion that many tests read: dense source, text, recipe, result."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import Recipe
from tests.factories import make_dense

WORDS = ("def", "return", "value", "if", "else", "for", "in", "range", "self", "None", "x", "y", "\n", "(", ")", ":", "=")


def make_text(path: Path, words: int = 4000, seed: int = 0) -> Path:
    """Words in random order: with the byte tokenizer about five tokens each."""
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)), encoding="utf-8")
    return path


def small_recipe(**flags: object) -> Recipe:
    """A conversion of about a second: 4 experts, 2 per token, all layers, 15 steps."""
    defaults = {
        "method": "ladimo",
        "layers": "all",
        "tokens": 3000,
        "split.experts": 4,
        "train.steps": 15,
        "train.batch_tokens": 256,
        "train.expert_lr": 3e-3,
        "train.gate_lr": 1e-2,
    }
    return Recipe().override({**defaults, **flags})


@dataclass(frozen=True)
class Made:
    dense: Path
    text: Path
    out: Path
    recipe: Recipe


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense LLaMA with blocks of 32 tokens whose FFN width is not a multiple of the experts."""
    return make_dense(tmp_path_factory.mktemp("source"), max_position_embeddings=32, intermediate_size=90)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def made(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read it, never change it."""
    out = tmp_path_factory.mktemp("made") / "moe"
    assert convert(str(source), out, small_recipe(), [text])
    return Made(source, text, out, small_recipe())


class Killer:
    """Stops a conversion as Ctrl-C would, at the moment when a certain file of its work directory is to get its name.

    Stages put every file in its place by a rename, which Python reports to audit hooks before it happens. A hook cannot be
    removed, so there is one for all tests.
    """

    def __init__(self) -> None:
        self._pattern: str | None = None
        self._left = 0
        sys.addaudithook(self._hook)

    @contextmanager
    def at(self, pattern: str, nth: int = 1) -> Iterator[None]:
        """The program stops inside, before the nth file whose path matches is in its place. "rmtree PATTERN": before a
        directory is removed."""
        self._pattern, self._left = pattern, nth
        try:
            with pytest.raises(KeyboardInterrupt):
                yield
        finally:
            self._pattern = None

    def _hook(self, event: str, details: tuple[object, ...]) -> None:
        if self._pattern is None or event not in ("os.rename", "shutil.rmtree"):
            return
        happens = str(details[1]) if event == "os.rename" else f"rmtree {details[0]}"
        if fnmatch(happens, self._pattern):
            self._left -= 1
            if not self._left:
                self._pattern = None
                raise KeyboardInterrupt


killed = Killer()
