"""Model directories that mean harm: refused with one line, before memory is taken for what they claim to hold."""

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest

from ladimo.cli import main as converter_main
from server.__main__ import main as server_main

HUGE = 2**62


def header(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    return json.dumps({"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


ABSURD_HEADERS: dict[str, bytes] = {
    "longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "four gigabytes of it": struct.pack("<Q", 2**32) + b"{}",
    "of no length": struct.pack("<Q", 0),
    **{
        name: struct.pack("<Q", len(text)) + text + b"\0" * 64
        for name, text in {
            "no JSON": b"[" * 10_000,
            "a shape whose size overflows": header([HUGE, 16], [0, 64]),
            "a shape larger than the file": header([HUGE], [0, 4 * HUGE]),
            "a negative shape": header([-4, -4], [0, 64]),
            "a shape that is not what the bytes are": header([1000, 1000], [0, 64]),
            "bytes that end before they begin": header([4, 4], [64, 0]),
            "bytes past the end": header([4, 4], [10**15, 10**15 + 64]),
            "a type nobody knows": header([4, 4], [0, 64], "F3"),
            "numbers of a thousand digits": header([10**1000], [0, 64]),
        }.items()
    },
}


@pytest.mark.parametrize("name", ABSURD_HEADERS)
@pytest.mark.parametrize("command", ["ladimo-server", "ladimo convert"])
def test_weights_with_absurd_headers_are_one_line_and_no_memory(
    tmp_path: Path,
    dense_dir: Path,
    name: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(dense_dir, tmp_path / "model")
    (model / "model.safetensors").write_bytes(ABSURD_HEADERS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if command == "ladimo-server":
        assert server_main([str(model), "--port", "0", "--device", "cpu"]) == 1
    else:
        (tmp_path / "text.txt").write_text("some text " * 1000)
        assert converter_main(["convert", str(model), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line]
    assert line.startswith(f"{command.partition(' ')[0]}: ")
    assert "model.safetensors" in line
    assert len(line) < 1000
