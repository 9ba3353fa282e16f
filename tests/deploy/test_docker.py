"""The container image and the compose files. No engine can build an image here, so the parts are tried one by one."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from ladimo.model.cpu.build import COMPILERS, SHIPPED
from server.launch import CLOSE_SECONDS
from server.settings import ServerSettings, read_settings
from tests.deploy.queries import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = ("compose.yaml", "compose.gpu.yaml")


@dataclass(frozen=True)
class Instruction:
    """`stage` is the name of the stage, empty for the last one."""

    stage: str
    name: str
    text: str


def dockerfile() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    stage, found = "", list[Instruction]()
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, text = line.partition(" ")
        if name == "FROM":
            stage = text.partition(" AS ")[2]
        found.append(Instruction(stage, name, text))
    return found


def texts(name: str, stage: str = "") -> list[str]:
    """The instructions of a stage with this name; of the last stage if none is given."""
    return [each.text for each in dockerfile() if (each.name, each.stage) == (name, stage)]


def variables() -> dict[str, str]:
    """What the image sets."""
    (text,) = texts("ENV")
    return dict(part.split("=", 1) for part in text.split())


def test_hadolint_finds_no_fault() -> None:
    hadolint = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
    if not Path(hadolint).exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_path_that_is_copied_exists_and_nothing_else_is_sent() -> None:
    stages = {each.stage for each in dockerfile()}
    sources: set[str] = set()
    for instruction in dockerfile():
        if instruction.name == "COPY":
            *paths, _ = instruction.text.split()
            if paths[0].startswith("--from="):
                assert paths[0].removeprefix("--from=") in stages
            else:
                sources |= set(paths)
    assert sources and all((ROOT / source).exists() for source in sources)
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rest = [line for line in ignore if not line.startswith("#")]
    assert first == "*" and {line[1:] for line in rest if line.startswith("!")} == sources
    assert [line for line in rest if not line.startswith("!")] == ["**/__pycache__"]


def test_what_the_package_is_built_from_is_copied() -> None:
    copied = {source for text in texts("COPY", "build") for source in text.split()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in settings["packages"]["find"]["include"]}
    assert {PROJECT["readme"], *PROJECT["license-files"], *packages, "pyproject.toml"} <= copied


def test_there_is_an_image_for_each_kind_of_device() -> None:
    (default,) = [text.removeprefix("DEVICE=") for text in texts("ARG") if text.startswith("DEVICE=")]
    bases = {each.stage for each in dockerfile()} - {"", "requirements", "build"}
    assert default in bases and bases == {"cpu", "cuda"}
    assert texts("FROM") == ["${DEVICE}"]
    with_compiler = {stage for stage in bases if any(set(COMPILERS) & set(text.split()) for text in texts("RUN", stage))}
    assert with_compiler == {"cuda"}
    gpu = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yaml").read_text())["services"]["server"]
    assert gpu["build"]["args"]["DEVICE"] in bases


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    build = [(each.name, each.text) for each in dockerfile() if each.stage == "build"]
    install = next(place for place, (_, text) in enumerate(build) if "pip install" in text and "-r requirements.txt" in text)
    code = next(place for place, each in enumerate(build) if each == ("COPY", "ladimo ladimo"))
    before = {text for name, text in build[:code] if name == "COPY"}
    assert install < code and before == {"--from=requirements /src/requirements.txt ./", "pyproject.toml README.md LICENSE ./"}


def test_the_requirements_are_those_of_the_project(tmp_path: Path) -> None:
    (command,) = texts("RUN", "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = Path(sys.executable).parent
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, env={"PATH": f"{python}:{os.environ['PATH']}"}, check=True)
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["otel"]
    assert [line for line in lines if line.startswith("torch")] == PROJECT["dependencies"][:1]  # what grep finds


def test_the_step_is_compiled_where_there_is_a_compiler_and_the_package_is_installed() -> None:
    apt, _, _, _, install, compile_step = texts("RUN", "build")
    assert any(compiler in apt.split() for compiler in COMPILERS)
    assert "pip install" in install
    build = [each for each in dockerfile() if each.stage == "build"]
    assert [each.text for each in build if each.name == "WORKDIR"][-1] == "/"  # in /src the sources would be found first
    assert find_spec(f"{compile_step.rpartition('-m ')[2]}.__main__") is not None
    (copied,) = [text.split()[-1] for text in texts("COPY") if text.startswith("--from=build")]
    assert SHIPPED.is_relative_to(ROOT / "ladimo") and copied == "/opt/ladimo"  # the environment with the package in it


def test_the_image_starts_the_server_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = json.loads(texts("ENTRYPOINT")[0])
    assert entry in PROJECT["scripts"] and texts("CMD") == []
    (user,) = texts("USER")
    assert user.isdigit() and f"--uid {user} " in texts("RUN")[-1]
    for name, value in variables().items():
        if name.startswith("LADIMO_"):
            assert name.removeprefix("LADIMO_").lower() in ServerSettings.model_fields
            monkeypatch.setenv(name, value)
    settings = read_settings([])
    assert (settings.model, settings.host, [str(settings.port)]) == ("/model", "0.0.0.0", texts("EXPOSE"))


@pytest.fixture
def health() -> Iterator[HTTPServer]:
    """A server whose `status` attribute says what /health/live answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    status = [200]
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.status = status  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_health_check_asks_the_server(health: HTTPServer) -> None:
    command = json.loads(texts("HEALTHCHECK")[0].partition("CMD ")[2])
    command[0] = {"python": sys.executable}[command[0]]
    environment = {**variables(), "PATH": os.environ["PATH"], "LADIMO_PORT": str(health.server_port)}
    for status, code in ((200, 0), (503, 1)):
        health.status[0] = status  # type: ignore[attr-defined]
        assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == code


@pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="installs all dependencies: minutes; set LONG_TESTS")
def test_the_image_s_commands_build_an_environment_that_serves(tmp_path: Path) -> None:
    """The commands of the build run in order, in directories of the test, with pip's own index."""
    for source in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / source, tmp_path)
    for package in ("ladimo", "server"):
        shutil.copytree(ROOT / package, tmp_path / package)
    base = Path(sys.base_prefix) / "bin"
    environment = {
        "PATH": f"{tmp_path}/opt/bin:{base}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "DEVICE": "cpu",
        "CPU_TORCH": "",
    }
    directory = tmp_path
    for instruction in dockerfile():
        if instruction.name == "WORKDIR" and instruction.text == "/":
            directory = tmp_path / "root"
            directory.mkdir()
        if instruction.name == "RUN" and instruction.stage in ("requirements", "build") and "apt-get" not in instruction.text:
            command = instruction.text.replace("/opt/ladimo", str(tmp_path / "opt"))
            subprocess.run(["sh", "-ec", command], cwd=directory, env=environment, check=True)
    (entry,) = json.loads(texts("ENTRYPOINT")[0])
    done = subprocess.run([tmp_path / "opt/bin" / entry, "--help"], cwd=directory, capture_output=True, text=True, check=True)
    assert "--max-num-seqs" in done.stdout
    (installed,) = (tmp_path / "opt/lib").glob("python*/site-packages")
    assert list((installed / SHIPPED.relative_to(ROOT)).glob("*.so"))


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_follow_their_specification(name: str) -> None:
    compose = pytest.importorskip("compose_spec", reason="there is no compose-spec for this platform")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "deploy" / name).read_text())
    compose.PyCompose.from_yaml(text)
    with pytest.raises(ValueError, match="does not start with"):
        compose.PyCompose.from_yaml(text.replace("    build:\n", "    bild: ..\n    build:\n"))


def test_the_composed_server_has_time_to_drain_and_settings_that_exist() -> None:
    server = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["server"]
    drain = ServerSettings.model_fields["shutdown_timeout"].default
    assert int(server["stop_grace_period"].removesuffix("s")) > drain + CLOSE_SECONDS
    assert {name.removeprefix("LADIMO_").lower() for name in server["environment"]} <= set(ServerSettings.model_fields)
    assert (ROOT / "deploy" / server["build"]["context"] / "Dockerfile").exists()
    assert server["ports"][0].endswith(f":{variables()['LADIMO_PORT']}")
    (volume,) = server["volumes"]
    assert volume.endswith(f":{variables()['LADIMO_MODEL']}:ro")


def test_only_the_temporary_directory_is_written() -> None:
    server = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["server"]
    assert server["read_only"] and server["tmpfs"] == ["/tmp:exec"]
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert Path(variables()[name]).is_relative_to("/tmp")
