"""The documentation site: it builds without a warning, and its generated pages say what there is."""

import logging
import re
from pathlib import Path

import pytest

from deploy.site.commands import ladimo_page, server_page
from deploy.site.http_api import description, http_page
from deploy.site.links import ROOT, rewrite
from deploy.site.performance import RESULTS, performance_page
from tests.docs.test_documents import ladimo_flags, server_flags

build = pytest.importorskip("mkdocs.commands.build", reason="MkDocs is not installed (the extra `docs`)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    from mkdocs.config import load_config

    target = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target))
        warnings = list[str]()
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("mkdocs").addHandler(handler)
        try:
            build.build(config)
        finally:
            logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []
    return target


def test_every_document_is_a_page(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index.html", "metrics.html", "runbook.html", "benchmarks.html", "architecture.html", "changelog.html"} <= pages
    assert {"reference/http.html", "reference/ladimo.html", "reference/ladimo-server.html", "performance/records.html"} <= pages


def test_every_block_of_code_is_shown_as_one(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "```" not in text and "no-test" not in text, page.name


def test_links_and_pictures_lead_to_files_of_the_site(site: Path) -> None:
    found = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # its links start at the root of the site
        for target in re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"#]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                found += 1
    assert found > 500


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*?(?:src|href)="(https?:[^"]+)', page.read_text(encoding="utf-8"))
        assert loaded == [], page.name


def test_the_pages_of_commands_have_every_flag() -> None:
    ladimo, server = ladimo_page(), server_page()
    assert {flag for flag in ladimo_flags() - {"--help", "--version"} if not re.search(rf"`{flag}[ `]", ladimo)} == set()
    defaults_on = {f"--{flag.removeprefix('--no-')}" for flag in server_flags() if flag.startswith("--no-")}
    assert {flag for flag in server_flags() - defaults_on if f"`{flag}`" not in server} == set()
    assert "`LADIMO_MAX_NUM_SEQS`" in server and "None" not in server


def test_the_page_of_the_api_has_every_route_and_field() -> None:
    page, found = http_page(), description()
    for path, methods in found["paths"].items():
        for method in methods:
            assert f"\n## {method.upper()} {path}\n" in page
    for name, schema in found["components"]["schemas"].items():
        for field in schema.get("properties", {}):
            assert f"`{field}`" in page, f"{name}.{field}"
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= headings


def test_the_page_of_records_has_every_record() -> None:
    page = performance_page()
    for path in RESULTS.glob("*/*.json"):
        assert f"### {path.stem}\n" in page.partition(f"\n## {path.parent.name}\n")[2]
    assert "| transformers generate, dense | 38.391 |" in page.replace("| decode | 1 ", "")


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("index.md", "[a](docs/api.md#b) and [c](deploy/METRICS.md)", "[a](api.md#b) and [c](metrics.md)"),
        ("api.md", "[a](operating.md) [b](../README.md) [c](#d)", "[a](operating.md) [b](index.md) [c](#d)"),
        ("runbook.md", '<img src="../docs/images/page.png" alt="">', '<img src="images/page.png" alt="">'),
        ("api.md", "[the `Makefile`](../Makefile) [x](https://a.example/b.md)", "the `Makefile` [x](https://a.example/b.md)"),
        ("api.md", "```text\n[a](../README.md)\n```\n[a](../README.md)", "```text\n[a](../README.md)\n```\n[a](index.md)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, before: str, after: str) -> None:
    assert rewrite(before, page) == after


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/api.md links to nothing.md"):
        rewrite("[a](nothing.md)", "api.md")
