"""The documents name what there is: flags, routes, error codes, files; and operators and users find every flag."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ladimo.cli import build_parser
from server.errors import statuses
from server.settings import ServerSettings
from tests.docs.snippets import DOCUMENTS, ROOT, snippets
from tests.server.serving import Parts, serving

# Flags of other programs that the documents call.
FOREIGN_FLAGS = {
    "--model",
    "--model_args",
    "--tasks",
    "--gpus",
    "--include_path",
    "--from-file",
    "--head",
    "--address",
    "--working-dir",
    "--values",
    "--read-only",
    "--tmpfs",
    "--build-arg",
}
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def spans(path: Path) -> Iterator[str]:
    """What is set as code within sentences and tables."""
    yield from CODE.findall(re.sub(r"^```.*?^```", "", text(path), flags=re.DOTALL | re.MULTILINE))


def server_flags() -> set[str]:
    names = {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields if name != "model"}
    switches = {
        f"--no-{name.replace('_', '-')}" for name, field in ServerSettings.model_fields.items() if field.default is True
    }
    return names | switches


def ladimo_flags() -> set[str]:
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parsers = [parser, *commands.choices.values()]
    return {flag for each in parsers for action in each._actions for flag in action.option_strings if flag.startswith("--")}


def benchmark_flags() -> set[str]:
    """Those that the benchmarks' sources declare."""
    return {flag for path in (ROOT / "loadtests").rglob("*.py") for flag in re.findall(r'"(--[a-z][a-z-]*)"', text(path))}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_that_is_named_exists(path: Path) -> None:
    code = [*spans(path), *(snippet.code for snippet in snippets() if snippet.document == path.relative_to(ROOT).as_posix())]
    named = {flag for each in code if "curl" not in each for flag in FLAG.findall(each)}
    assert named - server_flags() - ladimo_flags() - benchmark_flags() - FOREIGN_FLAGS - {"--help"} == set()


def test_operators_find_every_flag_of_the_server() -> None:
    page = text(ROOT / "docs" / "operating.md")
    missing = {flag for flag in server_flags() if not flag.startswith("--no-") and not re.search(rf"{flag}\b(?!-)", page)}
    # What is on by default is named by the flag that turns it off.
    assert {flag for flag in missing if f"--no-{flag[2:]}" not in page} == set()


def test_users_find_every_flag_of_the_conversion() -> None:
    page = text(ROOT / "docs" / "user-guide.md")
    assert {flag for flag in ladimo_flags() - {"--help"} if flag not in page} == set()


async def test_the_api_page_names_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts()) as server:
        schema = (await server.client.get("/openapi.json")).json()
    page = text(ROOT / "docs" / "api.md")
    for path, methods in schema["paths"].items():
        shape = re.escape(re.sub(r"\{[^}]+\}", "{}", path)).replace(r"\{\}", r"\{\w+\}")
        for method in methods:
            assert re.search(rf"`{method.upper()} {shape}`|`GET /health`, `GET {shape}`", page), f"{method} {path}"


def test_the_api_page_names_every_error_code() -> None:
    page = text(ROOT / "docs" / "api.md")
    assert {code for code in statuses() if f"`{code}`" not in page} == set()
    for line in page.splitlines():
        if row := re.match(r"\| ([\d, ]+) \| (.*) \|$", line):
            known = set(statuses())
            numbers = {int(number) for number in row[1].split(",")}
            assert {statuses()[code] for code in CODE.findall(row[2]) if code in known} == numbers


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    pictures = [(source, "") for source in re.findall(r'<img src="([^"]+)"', text(path))]
    for target, anchor in [*LINK.findall(text(path)), *pictures]:
        if target.startswith(("http:", "https:")):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text(file), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_module_that_is_named_exists(path: Path) -> None:
    """A path from the root, or a module's dotted name, perhaps with something that is in it."""
    for span in spans(path):
        for name in _expanded(span):
            if re.fullmatch(r"(ladimo|server|deploy|loadtests|tests|docs)/[\w./-]*", name):
                assert (ROOT / name).exists(), f"{path.name}: {name}"
            elif re.fullmatch(r"(ladimo|server|deploy|loadtests|tests)(\.\w+)+", name):
                parts = name.split(".")
                found = [ROOT.joinpath(*parts[:end]) for end in (len(parts), len(parts) - 1)]
                assert any(each.is_dir() or each.with_suffix(".py").exists() for each in found), f"{path.name}: {name}"


def _expanded(span: str) -> list[str]:
    """`a/{b,c}` is a/b and a/c."""
    braces = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", span)
    return [f"{braces[1]}{part}{braces[3]}" for part in braces[2].split(",")] if braces else [span]
