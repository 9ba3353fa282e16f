"""The command itself: settings, exit codes, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.__main__ import main
from server.policies.targets import AtAccuracy, Named
from server.settings import ServerSettings, read_settings
from tests.factories import make_dense, make_moe
from tests.server.real import model_served


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADIMO_PORT", "9001")
    monkeypatch.setenv("LADIMO_API_KEY", "a,b")
    monkeypatch.setenv("LADIMO_ACCURACY", "0.5")
    settings = read_settings(["model"])
    assert (settings.model, settings.port, settings.default_target) == ("model", 9001, AtAccuracy(0.5))
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    assert "a" not in repr(settings.api_key)
    monkeypatch.delenv("LADIMO_ACCURACY")
    flags = ["model", "--port", "9002", "--api-key", "c", "--api-key", "d", "--policy", "fast", "--insecure-admin"]
    settings = read_settings(flags)
    assert (settings.port, settings.default_target, settings.insecure_admin) == (9002, Named("fast"), True)
    assert [key.get_secret_value() for key in settings.api_key] == ["c", "d"]
    assert settings.is_loopback
    assert not read_settings(["model", "--host", "0.0.0.0"]).is_loopback


def test_a_config_file_gives_way_to_environment_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'model = "from-file"\nport = 9100\nmax-queue = 7\nmax_num_seqs = 3\napi-key = ["a", "b"]\nstrict-fields = true\n'
    )
    settings = read_settings(["--config", str(file)])
    assert (settings.model, settings.port, settings.max_queue, settings.max_num_seqs) == ("from-file", 9100, 7, 3)
    assert settings.strict_fields
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    monkeypatch.setenv("LADIMO_PORT", "9200")
    monkeypatch.setenv("LADIMO_MAX_QUEUE", "8")
    settings = read_settings(["model", "--config", str(file), "--port", "9300"])
    assert (settings.model, settings.port, settings.max_queue, settings.max_num_seqs) == ("model", 9300, 8, 3)
    monkeypatch.setenv("LADIMO_CONFIG", str(file))
    assert read_settings([]).max_num_seqs == 3


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_variables_of_a_kubernetes_service_named_ladimo_are_no_settings(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = f"LADIMO_PORT_80_{protocol.upper()}"
    address = {f"{port}_ADDR": "10.0.0.1", f"{port}_PORT": "80", f"{port}_PROTO": protocol, port: f"{protocol}://10.0.0.1:80"}
    service = {"LADIMO_SERVICE_HOST": "10.0.0.1", "LADIMO_SERVICE_PORT": "80", "LADIMO_SERVICE_PORT_HTTP": "80"}
    for name, value in {"LADIMO_PORT": f"{protocol}://10.0.0.1:80", **address, **service}.items():
        monkeypatch.setenv(name, value)
    settings = read_settings(["model"])
    assert settings.port == ServerSettings.model_fields["port"].default
    assert settings.model_fields_set == {"model"}
    file = tmp_path / "server.toml"
    file.write_text("port = 9100\n")
    assert read_settings(["model", "--config", str(file)]).port == 9100
    assert read_settings(["model", "--port", "9300"]).port == 9300


@pytest.mark.parametrize("key", ["schlüssel", "\u2028", "a\tb", " a", "a ", "\udc80"])
def test_keys_that_no_client_can_send(tmp_path: Path, key: str) -> None:
    for flag in ("--api-key", "--admin-key"):
        with pytest.raises(ValueError, match="a key must be of printable ASCII"):
            read_settings(["model", flag, key])
    if key == "schlüssel":
        (tmp_path / "keys").write_text(f"good\n{key}\n")
        with pytest.raises(ValueError, match="a key must be of printable ASCII"):
            read_settings(["model", "--api-key-file", str(tmp_path / "keys")])


def test_connections_and_proxies() -> None:
    settings = read_settings(["model", "--trusted-proxies", "10.0.0.0/8,127.0.0.1", "--trusted-proxies", "::1"])
    assert settings.trusted_proxies == ["10.0.0.0/8", "127.0.0.1", "::1"]
    assert read_settings(["model"]).trusted_proxies == []
    assert read_settings(["model"]).keep_alive_timeout > 90
    for wrong in ("proxy.example", "*", "10.0.0.1/8"):
        with pytest.raises(ValueError, match="trusted-proxies"):
            read_settings(["model", "--trusted-proxies", wrong])


def test_keys_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api, admin = tmp_path / "keys", tmp_path / "admin"
    api.write_text("one   # the first\n\n# nobody\ntwo\n")
    admin.write_text("boss\n")
    settings = read_settings(["m", "--api-key", "zero", "--api-key-file", str(api), "--admin-key-file", str(admin)])
    assert [key.get_secret_value() for key in settings.api_key] == ["zero", "one", "two"]
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "boss"
    assert not any(key in repr(settings) for key in ("zero", "one'", "two", "boss"))
    monkeypatch.setenv("LADIMO_API_KEY_FILE", str(api))
    assert len(read_settings(["m"]).api_key) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("port = 'x'", "--port"), ("nonsense = 1", "nonsense"), ("port = ", "cannot be read"), ("config = 'x'", "config")],
)
def test_a_broken_config_file_is_one_line_and_exit_2(
    tmp_path: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.toml").write_text(text)
    assert main(["m", "--config", str(tmp_path / "server.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ladimo-server: ")
    assert complaint in line


def test_an_unknown_integer_format_is_one_line_and_exit_1(moe_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Formats are a registry, so their names are no choices of the command line's parser."""
    assert main([str(moe_dir), "--port", "0", "--quantize", "int3"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ladimo-server: quantize 'int3': supported: int8, int4"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "MODEL"),
        (["m", "--config", "nowhere.toml"], "nowhere.toml"),
        (["m", "--api-key-file", "nowhere"], "nowhere"),
        (["m", "--admin-key-file", __file__, "--admin-key", "x"], "one admin key"),
        (["m", "--request-timeout", "0"], "--request-timeout"),
        (["m", "--max-queue-tokens", "0"], "--max-queue-tokens"),
        (["m", "--port", "x"], "--port"),
        (["m", "--port", "70000"], "--port"),
        (["m", "--accuracy", "2"], "--accuracy"),
        (["m", "--accuracy", "nan"], "--accuracy"),
        (["m", "--policy", "a", "--accuracy", "0.5"], "exclude"),
        (["m", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["m", "--shutdown-timeout", "inf"], "--shutdown-timeout"),
        (["m", "--header-timeout", "0"], "--header-timeout"),
        (["m", "--body-timeout", "nan"], "--body-timeout"),
        (["m", "--send-timeout", "-1"], "--send-timeout"),
        (["m", "--stall-timeout", "inf"], "--stall-timeout"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ladimo-server: ")
    assert complaint in line


def test_unknown_flags_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["model", "--no-such-flag"])
    assert wrong.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["--help"])
    assert helped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: ladimo-server MODEL [flags]" in text
    assert "--frontier-batch N|prefill" in text
    assert "--api-key KEY" in text
    assert "None)" not in text
    assert max(map(len, text.splitlines())) <= 112


def broken_policy(moe: Path) -> None:
    (moe / "routing/policies/fast.json").write_text('{"name": "fast", "layers": [{"top_k": 0}, null, null]}')


def truncated_weights(moe: Path) -> None:
    weights = moe / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def other_architecture(moe: Path) -> None:
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


def no_tokenizer(moe: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (moe / name).unlink()


def arguments(model: Path, *flags: str) -> list[str]:
    return [str(model), "--port", "0", "--device", "cpu", *flags]


@pytest.mark.parametrize(
    ("spoil", "flags", "complaint"),
    [
        (broken_policy, (), "fast.json"),
        (truncated_weights, (), "model.safetensors"),
        (other_architecture, (), "gpt2"),
        (no_tokenizer, (), "tokenizer"),
        (lambda moe: None, ("--policy", "nope"), "nope"),
        (lambda moe: None, ("--frontier-batch", "7"), "batch 7"),
        (lambda moe: None, ("--max-model-len", "100000"), "max_model_len"),
    ],
)
def test_models_that_cannot_be_served_are_one_line_and_exit_1(
    tmp_path: Path,
    dense_dir: Path,
    spoil: Callable[[Path], None],
    flags: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moe = make_moe(tmp_path / "moe", dense=dense_dir)
    spoil(moe)
    capsys.readouterr()
    assert main(arguments(moe, *flags)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("ladimo-server: ")
    assert complaint in line


def test_a_failed_step_ends_the_process_with_1(
    moe_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("server.engine.model_runner.ModelRunner.launch", fail)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    replies: list[httpx.Response] = []

    def ask() -> None:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                time.sleep(0.01)
        replies.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}))

    client = threading.Thread(target=ask)
    client.start()
    assert main([str(moe_dir), "--port", str(port), "--device", "cpu"]) == 1
    client.join()
    assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "engine_dead")


@contextmanager
def running_server(model: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command, once it has printed its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "server", *arguments(model, *flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if line.strip().startswith("page"):
                    break
            else:
                raise AssertionError(server.communicate()[1])
            yield server, line.split()[-1]
        finally:
            server.kill()


@pytest.mark.slow
def test_sigterm_lets_a_stream_finish_and_exits_0(moe_dir: Path) -> None:
    # Two choices in turn, so that the stream outlives the question after it, on a busy machine too.
    with running_server(moe_dir, "--shutdown-timeout", "60", "--max-num-seqs", "1") as (server, url):
        body = {"prompt": "a", "n": 2, "max_tokens": 240, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while (ready := httpx.get(f"{url}health/ready")).status_code == 200:
                assert time.monotonic() < deadline
            assert ready.json()["error"]["code"] == "draining"
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["usage"]["completion_tokens"] == 2 * 240
        assert server.wait(30) == 0


def test_a_dense_model_is_served_under_its_one_policy(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    with model_served(dense, "--served-model-name", "dense-one") as url, httpx.Client(base_url=url) as client:
        body = {"prompt": "a", "max_tokens": 3, "model": "dense-one:full"}
        routing = client.post("/v1/completions", json=body).json()["routing"]
        assert (routing["policy"], routing["experts_per_token"], routing["active_parameters_ratio"]) == ("full", None, 1.0)
        refused = client.post("/v1/completions", json={"prompt": "a", "routing": {"accuracy": 0.5}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_frontier")
        assert client.get("/metrics").status_code == 200
        assert client.put("/admin/routing/default", json={"policy": "full"}).status_code == 403
