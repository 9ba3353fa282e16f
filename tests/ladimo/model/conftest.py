"""Fixtures of the compiled CPU step."""

import ctypes
import platform

import pytest

from ladimo.model.cpu import build, native_step
from ladimo.model.cpu.cache import cache_directories
from tests.ladimo.native import WIDTHS


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernel for vectors of this width."""
    flags = WIDTHS[request.param]
    if not flags:
        return
    if platform.machine() != "x86_64":
        pytest.skip("the flags are those of x86")
    narrow = ctypes.CDLL(str(build.compiled(cache_directories()[0], flags)))
    monkeypatch.setattr(native_step, "library", lambda: narrow)
