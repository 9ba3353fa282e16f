import pytest


@pytest.fixture(autouse=True)
def untouched_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that runs in this process leaves pytest's logging alone. Its handlers would outlive the test."""
    monkeypatch.setattr("server.logs.configure", lambda level: None)
