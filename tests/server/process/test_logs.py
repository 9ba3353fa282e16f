"""Log lines: JSON that machines read, with the id of the request they belong to."""

import json
import logging
from pathlib import Path

import pytest

from server import logs
from tests.server.serving import serving


class Lines(logging.Handler):
    """Formats at once, as a handler on stderr does."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
async def test_every_line_of_a_request_carries_its_id(
    tmp_path: Path, formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("what happened")

    async with serving(tmp_path) as server:
        handler, root = Lines(formatter), logging.getLogger("server")
        root.addHandler(handler)
        try:
            monkeypatch.setattr("server.api.routes.completions.make_generation", broken)
            headers = {"X-Request-Id": "mine-7", "Authorization": "Bearer secret"}
            await server.client.post("/v1/completions", json={"prompt": "private"}, headers=headers)
        finally:
            root.removeHandler(handler)
    failure = handler.lines[0]
    assert "mine-7" in failure
    assert "what happened" in failure
    assert "secret" not in failure
    assert "private" not in failure
    if isinstance(formatter, logs.JsonFormatter):
        entry = json.loads(failure)
        assert (entry["request_id"], entry["level"]) == ("mine-7", "error")
        assert "KeyError" in entry["traceback"]


def test_a_line_stays_one_line_whatever_is_quoted_in_it() -> None:
    record = logging.LogRecord("server", logging.INFO, __file__, 1, "a\nb\u2028c\u2029d\x85e\x1b[31m é", None, None)
    line = logs.TextFormatter().format(record)
    assert line.splitlines() == [line]
    assert line.endswith(r"a\nb\u2028c\u2029d\x85e\x1b[31m é")
    assert len(logs.JsonFormatter().format(record).splitlines()) == 1
