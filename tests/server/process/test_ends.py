"""How the process ends: at every moment of its life, with an exit code, and with nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.__main__ import main
from server.listening import listen
from tests.server.process.test_launch import arguments, running_server

WITHIN_SECONDS = 60  # generous: the machine may be busy
# A thread of the engine that never comes back from a native library, in the place of a large model or a device that hangs.
HANGS = """
import runpy, sys, torch

def hang(*_):
    print("hanging", flush=True)
    numbers = torch.randn(300, 300, requires_grad=True)
    while True:
        (numbers @ numbers).sum().backward()

import {module}
{module}.{name} = hang
sys.argv[1:] = {arguments}
runpy.run_module("server", run_name="__main__")
"""


def start(*command: str, **environment: str) -> "subprocess.Popen[str]":
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=env)


def handles_signals(process: "subprocess.Popen[str]") -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def check_end(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """What it wrote to stderr."""
    _, errors = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_at_any_moment_of_the_start_exits_0(moe_dir: Path) -> None:
    delays = (0.0, 0.3, 1.0, 2.5, 4.0) if os.environ.get("LONG_TESTS") else (0.3, 2.5)
    processes = [start("-m", "server", *arguments(moe_dir)) for _ in delays]
    for process in processes:
        wait_for(lambda: handles_signals(process), process)  # noqa: B023
    begun = time.monotonic()
    for index, (delay, process) in enumerate(zip(delays, processes, strict=True)):
        time.sleep(max(0.0, begun + delay - time.monotonic()))
        process.send_signal((signal.SIGTERM, signal.SIGINT)[index % 2])
    for process in processes:
        check_end(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "signals"),
    [
        pytest.param("server.launch", "build_core", 1, marks=pytest.mark.long),
        ("server.engine.model_runner", "ModelRunner.launch", 2),
    ],
)
def test_an_engine_that_hangs_in_native_code_does_not_hold_the_process(
    moe_dir: Path, module: str, name: str, signals: int
) -> None:
    flags = arguments(moe_dir, "--shutdown-timeout", "0.2")
    process = start("-c", HANGS.format(module=module, name=name, arguments=flags))
    assert process.stdout is not None
    if name == "ModelRunner.launch":  # wait until it is ready, then ask for something
        address = next(line.split()[-1] for line in process.stdout if line.strip().startswith("page"))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}v1/completions", json={"prompt": "a"}, timeout=1)
    for line in process.stdout:
        if line == "hanging\n":
            break
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    check_end(process)


@pytest.mark.long
def test_a_signal_while_the_step_is_compiled_leaves_no_file_and_no_compiler(moe_dir: Path, tmp_path: Path) -> None:
    cache = tmp_path / "ladimo"
    process = start("-m", "server", *arguments(moe_dir), XDG_CACHE_HOME=str(tmp_path))
    wait_for(lambda: cache.is_dir() and any(cache.glob("partial-*")), process)
    process.send_signal(signal.SIGTERM)
    check_end(process)
    assert list(cache.iterdir()) == []
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in running if str(cache).encode() in line]


@pytest.mark.long
def test_a_second_signal_ends_a_drain(moe_dir: Path) -> None:
    with running_server(moe_dir, "--shutdown-timeout", "3600") as (server, url):
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8}
        with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=60) as reply:
            assert next(reply.iter_lines()).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.send_signal(signal.SIGINT)
            assert server.wait(WITHIN_SECONDS) == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("127.0.0.1", "Address already in use"),
        ("192.0.2.1", "Cannot assign requested address"),
        ("no such.example", "cannot listen on host 'no such.example'"),
        ("x" * 70, "cannot listen on host"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line_before_anything_is_loaded(
    host: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["no-such-model", "--host", host, "--port", str(taken.getsockname()[1])]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("ladimo-server: ")
    assert complaint in line


def test_a_port_is_taken_from_the_moment_it_is_bound() -> None:
    port = free_port()
    (first,) = listen("127.0.0.1", port)
    with first, pytest.raises(ValueError, match="already in use"):
        listen("127.0.0.1", port)


def test_all_addresses_of_a_name_share_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        missing = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))
        return [v4, v4, missing, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", port))]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    sockets = listen("several.example", 0)
    names = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
    assert len({name[1] for name in names}) == 1
