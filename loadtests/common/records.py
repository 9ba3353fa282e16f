"""The record of a measurement: the command that made it, one line of JSON at the end of the output and, if asked for, files."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ladimo.checkpoint import write_text


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command of the module `loadtests.<name>`. `argv`: its arguments; None: those of the process."""
    return shlex.join(["python", "-m", f"loadtests.{name}", *(sys.argv[1:] if argv is None else argv)])


def finish(
    record: Mapping[str, Any],
    json_file: Path | None,
    html_file: Path | None = None,
    page: Callable[[], str] = lambda: "",
) -> None:
    """Write the files that were asked for, and print the record as the last line."""
    if html_file is not None:
        write_text(html_file, page())
    line = json.dumps(record)
    if json_file is not None:
        write_text(json_file, line)
    print(line)
