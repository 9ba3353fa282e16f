"""Every shell command and every Python snippet of the documents runs.

`ladimo` commands run on a tiny model, in a directory that has the files which the documents speak of. `curl` and Python talk to
a live server. `ladimo-server` commands are read by the server's own settings.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ladimo.cli
from server.app import Access
from server.settings import read_settings
from tests.docs.snippets import Snippet, snippets
from tests.factories import make_dense, make_moe
from tests.server.real import model_served

ADDRESS = "http://127.0.0.1:8000"
# Blocks that need what a test has not: a fresh machine, docker, a cluster, Prometheus, task files, a GPU.
UNTESTED = [
    "make serve",
    "kubectl create",
    "serve run deploy.ray.app:build",  # needs a cluster with Ray Serve
    "make observe",
    "docker build",
    "make serve",
    "ray start",
    "python -c",
    "python -m loadtests.load_test",
    "ladimo export smol-moe",
    "python -m loadtests.burst",
    "python -m loadtests.simulate",
    "python -m loadtests.soak",
    "python -m loadtests.conversion_bench",
]
# Figures and files, not commands.
DATA = {"json", "toml", "yaml", ""}
CONVERT = ["convert", "path/to/llama", "out/llama-moe", "--text", "corpus.txt"]
# The documents' conversions in a fraction of the time.
QUICK = "[train]\nsteps = 2\n[tomoe]\nsteps = 4\n"
QUICK_ELASTIC = "scan_tokens = 512\nrouted_steps = 2\n"  # of the table elastic; it asks for this method
QUICK_TOKENS = "2000"

pytestmark = pytest.mark.slow


def runnable(language: str) -> list[Snippet]:
    return [snippet for snippet in snippets() if snippet.is_tested and snippet.language == language]


def ids(snippet: Snippet) -> str:
    return snippet.place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the commands run: a dense model, its conversion, a Mixtral, and texts."""
    directory = tmp_path_factory.mktemp("place")
    make_dense(directory / "path" / "to" / "llama", num_hidden_layers=2)
    make_dense(directory / "path" / "to" / "mixtral", model_type="mixtral", num_hidden_layers=2)
    text = "\n".join(f"The {number}th line says that {number * number} is a square." for number in range(400))
    for name in ("corpus.txt", "held-out.txt"):
        (directory / name).write_text(text)
    (directory / "keys.txt").write_text("a-key\n")
    (directory / "recipe.toml").write_text(next(snippet.code for snippet in snippets() if snippet.language == "toml"))
    with contextlib.chdir(directory):
        assert ladimo.cli.main(quick(CONVERT)) == 0
    return directory


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live server, as the documents start it."""
    model = make_moe(tmp_path_factory.mktemp("served") / "demo", num_experts=8, max_position_embeddings=1024)
    with model_served(model, "--served-model-name", "demo", access=Access(admin_key="secret")) as url:
        yield url


@pytest.mark.parametrize("snippet", runnable("bash"), ids=ids)
def test_shell(snippet: Snippet, place: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    commands = [shlex.split(command) for command in snippet.commands]
    if not any(command[0].startswith("ladimo") for command in commands):
        run_shell(snippet.code.replace(ADDRESS, address))
        return
    for program, *arguments in commands:
        if program == "ladimo":
            run_ladimo(arguments)
        else:
            assert program == "ladimo-server"
            assert Path(read_settings(arguments).model or "").is_dir()


def run_ladimo(arguments: list[str]) -> None:
    if arguments[0] == "convert":
        arguments = quick(arguments)
    assert ladimo.cli.main(arguments) == 0


def quick(arguments: list[str]) -> list[str]:
    """The same conversion with few tokens and steps. A recipe that it names keeps its other values."""
    recipe, text = Path("quick.toml"), ""
    if "--target-active" in arguments:
        text = f"[elastic]\nsteps = 2\n{QUICK_ELASTIC}"
    if "--recipe" in arguments:
        place = arguments.index("--recipe")
        text = re.sub(r"steps = \d+", "steps = 2", Path(arguments[place + 1]).read_text()) + QUICK_ELASTIC
        arguments = arguments[:place] + arguments[place + 2 :]
    recipe.write_text(text + QUICK)
    return [*arguments, "--recipe", str(recipe), "--tokens", QUICK_TOKENS]


def run_shell(commands: str) -> None:
    """Raises AssertionError with what was printed when a command, or an HTTP request of one, fails."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = f'set -euo pipefail; curl() {{ command curl -sS --fail-with-body "$@"; }}\n{commands}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("snippet", runnable("python"), ids=ids)
def test_python(snippet: Snippet, place: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    if "openai" in snippet.code:
        pytest.importorskip("openai", reason="the official client is an extra")
    exec(compile(snippet.code.replace(ADDRESS, address), snippet.place, "exec"), {})


def test_blocks_that_are_not_tested_are_few_and_known() -> None:
    untested = [snippet for snippet in snippets() if not snippet.is_tested]
    assert [snippet.code[: len(begin)] for snippet, begin in zip(untested, UNTESTED, strict=True)] == UNTESTED
    assert {snippet.language for snippet in snippets()} <= {"bash", "python"} | DATA
