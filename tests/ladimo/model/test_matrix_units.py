"""Products on matrix units. Plain code emulates the units here, so that what surrounds them is tested on every processor."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import load_model, read_policies
from ladimo.model.cpu import build, native_step
from ladimo.model.cpu.cache import cache_directories
from ladimo.model.cpu.native_step import NativeStep
from tests.factories import PHI2, make_dense, make_moe, make_nested
from tests.ladimo.native import EMULATED_UNITS, Cached, prompts
from tests.ladimo.stepping import Row, Stepper, make_tables

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.compiled(cache_directories()[0], EMULATED_UNITS)))
    monkeypatch.setattr(native_step, "library", lambda: library)
    return library


def test_the_unit_has_the_bits_of_vector_instructions(emulated: ctypes.CDLL) -> None:
    """This is what the code itself tries before it uses a real unit: all kinds of weights, 1 to 21 tokens, 1 to 4 panels, more
    than one stretch of columns, a part of 32 columns."""
    assert emulated.ladimo_matrix_unit() == 1


def logits(path: Path, format: str, threads: int, chunks: tuple[int, ...], company: int) -> Tensor:
    """The logits of a prompt, computed in these chunks, with other prompts beside it."""
    model = load_model(path, torch.bfloat16, torch.device("cpu"))
    policies = list(read_policies(path, model.config).values())
    steps = Cached(model, NativeStep(model, format, threads, wake_threads_from=0), policies, 16)
    rows = [Row(list(tokens), 1 + index % len(policies)) for index, tokens in enumerate(prompts(1 + company))]
    return torch.cat([steps.step(prefill=[(row, count) for row in rows])[0] for count in chunks])


def products(emulated: ctypes.CDLL) -> int:
    """How many products the unit has computed."""
    return ctypes.c_int64.in_dll(emulated, "emulated_products").value


def check_company(emulated: ctypes.CDLL, path: Path, format: str) -> None:
    """A token has the same bits alone, computed by vector instructions, and with many others, on the unit."""
    assert emulated.ladimo_matrix_unit() == 1
    before = products(emulated)
    alone = logits(path, format, 1, (1,) * 40, 0)
    assert products(emulated) == before
    assert torch.equal(logits(path, format, 1, (40,), 0), alone)
    assert products(emulated) > before
    assert torch.equal(logits(path, format, 3, (9, 16, 15), 7), alone)


@pytest.mark.parametrize(("format", "width"), [("bfloat16", 48), ("bfloat16", 80), ("int8", 48), ("int4", 80)])
def test_a_token_has_the_same_bits_with_few_and_with_many(
    tmp_path: Path, emulated: ctypes.CDLL, format: str, width: int
) -> None:
    """Experts with whole and with partial products of 32 columns; tokens of an expert do not lie side by side in memory."""
    check_company(emulated, make_moe(tmp_path, intermediate_size=8 * width, num_experts=4), format)


@pytest.mark.parametrize("fields", [{}, {"top_bits": 8}, PHI2], ids=["whole", "planes_only", "no_gate"])
def test_nested_weights_have_the_same_bits_with_few_and_with_many(
    tmp_path: Path, emulated: ctypes.CDLL, fields: dict[str, Any]
) -> None:
    """Tokens that read 4 bits, 8 bits and whole weights in one step."""
    check_company(emulated, make_nested(tmp_path, intermediate_size=256, **fields), "bfloat16")


def test_logits_are_near_those_of_torch(tmp_path: Path) -> None:
    path = make_dense(tmp_path, hidden_size=96, intermediate_size=176)
    model = load_model(path, torch.float32, torch.device("cpu"))
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()}, assign=True)
    tables = make_tables(model, list(read_policies(path, model.config).values()))
    expected = Stepper(model, tables).step(prefill=[(Row(prompts(1)[0]), 50)])[0]
    close = F.cosine_similarity(logits(path, "bfloat16", 2, (50,), 0), expected, dim=-1)
    assert 0.999 < close.median() < 1
