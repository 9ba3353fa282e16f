"""The command line: exit codes, one-line errors, what is printed. Runs in process; the work itself is tested elsewhere."""

import json
import shutil
from pathlib import Path

import pytest

import ladimo
from ladimo.checkpoint import read_config, read_json, read_policies
from ladimo.cli import main
from tests.factories import make_dense
from tests.ladimo.convert.conftest import make_text


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), max_position_embeddings=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt", words=600)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        "tokens = 1000\nlayers = 'all'\n[split]\nexperts = 8\n[train]\nsteps = 5\nbatch_tokens = 64\n[elastic]\nsteps = 4\n"
    )
    return path


@pytest.fixture(scope="module")
def moe(dense: Path, text: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe") / "out"
    flags = ["--text", str(text), "--recipe", str(recipe), "--experts", "4", "--seed", "3", "--device", "cpu"]
    assert main(["convert", str(dense), str(out), *flags]) == 0
    return out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, which must be the error and no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_flags_override_the_recipe(moe: Path) -> None:
    recipe = read_json(moe / "provenance.json")["arguments"]["recipe"]
    assert (recipe["split"]["experts"], recipe["seed"], recipe["train"]["steps"]) == (4, 3, 5)


def test_convert_twice_changes_nothing(
    dense: Path, text: Path, recipe: Path, moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "convert",
        str(dense),
        str(moe),
        "--text",
        str(text),
        "--recipe",
        str(recipe),
        "--experts",
        "4",
        "--device",
        "cpu",
    ]
    assert main([*command, "--seed", "3"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*command, "--seed", "4"]) == 1
    assert "recipe.seed was 3, now 4" in one_line(capsys)


def test_evaluate_prints_the_contracts_object(moe: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(moe), "--text", str(text), "--tokens", "100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["model", "text", "tokens", "dense", "policies"]
    assert (printed["model"], printed["text"], printed["tokens"]) == (str(moe), str(text), 124)
    assert main(["evaluate", str(moe), "--text", str(text), "--tokens", "100", "--policy", "fast"]) == 0
    table = capsys.readouterr().out
    assert "fast" in table
    assert "quality" not in table


def test_policies_lists_versions_and_figures(
    moe: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policies", str(moe), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    policies = read_policies(moe, read_config(moe))
    assert {entry["name"]: entry["version"] for entry in printed["policies"]} == {
        name: policy.version for name, policy in policies.items()
    }
    assert all(entry["figures"]["version"] == entry["version"] for entry in printed["policies"])
    assert printed["frontier"]
    edited = tmp_path / "edited"
    shutil.copytree(moe, edited)
    file = edited / "routing/policies/fast.json"
    file.write_text(file.read_text().replace('"description": "', '"description": "my '))
    assert main(["policies", str(edited)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not measured" in lines["fast"]
    assert "perplexity" in lines["full"]
    assert main(["policies", str(dense)]) == 0
    assert capsys.readouterr().out.startswith("full")


def test_report_and_profile(moe: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "moe"
    shutil.copytree(moe, copy)
    (copy / "report.md").unlink()
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.md").read_bytes() == (moe / "report.md").read_bytes()
    assert main(["profile", str(copy), "--text", str(text)]) == 0
    assert "balanced" in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["convert", "--help"], ["evaluate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "convert" in printed
    assert "--target-active" in printed
    assert f"ladimo {ladimo.__version__}" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["convert", "dense"],
        ["convert", "dense", "out", "--method", "magic"],
        ["convert", "dense", "out", "--layers", "some"],
        ["convert", "dense", "out", "--tokens", "many"],
        ["convert", "dense", "out", "--jobs", "0"],
        ["evaluate", "model"],
        ["evaluate", "model", "--text", "file", "--tokens", "0"],
        ["evaluate", "model", "--text", "file", "--items", "-1"],
    ],
)
def test_bad_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: ladimo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0,3"], "out of range"),
        (["--experts", "1"], "split.top_k: must be at most the 1 experts"),
        (["--tokens", "0"], "tokens: must be at least 1"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--recipe", "none.toml"], "none.toml: no such file"),
        (["--text", "none.txt"], "none.txt: no such file"),
    ],
)
def test_bad_values_fail_with_one_line(
    dense: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), *flags]) == 1
    error = one_line(capsys)
    assert error.startswith("ladimo: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_target_fails_with_one_line(
    dense: Path, text: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    command = ["convert", str(dense), str(tmp_path / "file/out"), "--text", str(text), "--recipe", str(recipe)]
    assert main(command) == 1
    assert "Not a directory" in one_line(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_short_text_fails_with_one_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("too short")
    assert main(["convert", str(dense), str(tmp_path / "out"), "--text", str(tmp_path / "short.txt")]) == 1
    assert "9 tokens; at least 93 are needed" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    assert main(["evaluate", str(dense), "--text", str(tmp_path / "short.txt")]) == 1
    assert "9 tokens; at least 31 are needed" in one_line(capsys)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        main(["report", str(tmp_path / "none"), "--debug"])
