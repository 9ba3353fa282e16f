import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that runs in this process leaves pytest's logging alone, because its handlers would outlive the test. What it
    has taken from the garbage collector goes back."""
    monkeypatch.setattr("server.logs.configure", lambda level: None)
    yield
    gc.unfreeze()
