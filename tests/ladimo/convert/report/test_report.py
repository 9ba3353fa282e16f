"""The report: what it says of each method, that it is whole in itself, and how it refuses a broken record."""

import copy
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ladimo.checkpoint import read_json, write_json
from ladimo.cli import main
from ladimo.convert.pipeline import convert
from ladimo.convert.report.markdown import to_markdown
from ladimo.convert.report.page import to_page
from ladimo.convert.report_files import render_report
from ladimo.convert.report_files import report_document as document
from tests.ladimo.convert.conftest import small_recipe

COMPARISON = [
    {"method": method, "tokens": tokens, "target": target, "active_parameters_ratio": target - 0.01}
    | {"perplexity_ratio": ratio, "spread": 0.01, "seeds": 3}
    for method, ratio in (("elastic", 1.02), ("static", 1.04))
    for tokens in (100_000, 1_000_000)
    for target in (0.9, 0.8)
]
EXTRAS: dict[str, Any] = {
    "comparison": COMPARISON,
    "throughput": {
        "conditions": {"device": "a made-up device"},
        "results": [
            {"policy": policy, "batch": batch, "tokens_per_second": speed}
            for batch in (1, 8)
            for policy, speed in (("dense", 100.0), ("fast", 140.0), ("of somebody else", 90.0))
        ],
    },
    "tasks": [
        {
            "task": "pairs",
            "items": 1200,
            "dense": {"accuracy": 0.75, "stderr": 0.01},
            "policies": [{"policy": "full", "accuracy": 0.7, "stderr": 0.02}],
        }
    ],
    "depth": [
        {"converted": n, "layers": list(range(n)), "perplexity": 9.0 + n, "perplexity_ratio": 1 + n / 9}
        | {"next_token_agreement": 1 - n / 10, "active_parameters_ratio": 1 - n / 8}
        for n in range(4)
    ],
    "initialisation": {
        "layer": 1,
        "steps": 50,
        "curves": {
            "split": [{"step": 0, "holdout": 0.5}, {"step": 50, "holdout": 0.1}],
            "random": [{"step": 0, "holdout": 2.0}],
        },
    },
}
SECTIONS = {
    "comparison": "Against other methods",
    "throughput": "Speed",
    "tasks": "Tasks",
    "depth": "How many layers",
    "initialisation": "What the source's weights are worth",
}


@pytest.fixture(scope="module")
def directories(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One conversion by a method with routers, one by the method of nested widths; read them, never change them."""
    made = {}
    for method, flags in {"ladimo": {}, "elastic": {"elastic.steps": 10}}.items():
        made[method] = tmp_path_factory.mktemp("report") / method
        assert convert(str(source), made[method], small_recipe(method=method, **flags), [text])
    return made


@pytest.fixture(params=["ladimo", "elastic"])
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]


class Page(HTMLParser):
    """Checks that tags are closed in order and keeps what the tests ask about."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, name: str) -> list[str]:
        return [found for _, attributes in self.attributes if (found := attributes.get(name)) is not None]


def test_reports_are_rendered_from_the_record_alone(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "report.json", tmp_path)
    render_report(tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_reports_show_the_figures(directory: Path) -> None:
    report = read_json(directory / "report.json")
    markdown, html = ((directory / name).read_text() for name in ("report.md", "report.html"))
    for entry in report["policies"]:
        for page in (markdown, html):
            assert f"{entry['perplexity']:.3f}" in page
            assert f"{100 * entry['active_parameters_ratio']:.1f}%" in page
    assert "given BOS" in markdown
    assert report["method"]["description"] in markdown


def test_each_method_has_the_sections_of_its_data(directories: dict[str, Path]) -> None:
    pages = {method: (directory / "report.html").read_text() for method, directory in directories.items()}
    own = {
        "ladimo": ("Loss of each layer", "weight of the best expert", "Load of each expert", "Sensitivity", "Rule per layer"),
        "elastic": (
            "Experts kept per layer and budget",
            "Damage of one narrower layer",
            "Could routing pay?",
            "End-to-end distillation",
        ),
    }
    for method, other in (("ladimo", "elastic"), ("elastic", "ladimo")):
        for text in own[method]:
            assert text in pages[method]
            assert text not in pages[other]
        for key, text in SECTIONS.items():
            measured = method == "ladimo" and key in ("depth", "initialisation")
            assert (text in pages[method].replace("&#x27;", "'")) == measured


@pytest.mark.parametrize("key", EXTRAS)
def test_optional_sections_come_with_their_data(directory: Path, key: str) -> None:
    report = {name: value for name, value in read_json(directory / "report.json").items() if name != key}
    without, having = document(report), document({**report, key: EXTRAS[key]})
    for print_out in (to_page, to_markdown):
        assert SECTIONS[key] not in print_out(without)
        assert SECTIONS[key] in print_out(having)


def test_numbers_of_optional_sections(directory: Path) -> None:
    markdown = to_markdown(document({**read_json(directory / "report.json"), **EXTRAS}))
    assert "| elastic | 100,000 | 1.0200 ± 0.0100 | 1.0200 ± 0.0100 |" in markdown
    assert "| pairs | 1,200 | 75.0% ± 1.0% | 70.0% ± 2.0% |" in markdown
    assert "| 2 | 75.0% | 1.2222 | 80.0% | 0, 1 |" in markdown
    assert "| fast | 8 | 140.0 |" in markdown
    assert "of somebody else" not in markdown


def test_the_page_is_whole_in_itself(directory: Path) -> None:
    html = to_page(document({**read_json(directory / "report.json"), **EXTRAS}))
    page = Page(html)
    assert not re.search(r"https?://|@import|url\(", html)
    assert page.all("src") == []
    anchors = page.all("href")
    assert anchors
    assert set(anchors) <= {f"#{name}" for name in page.all("id")}
    assert len(page.all("id")) == len(set(page.all("id")))
    policies = [content for content in page.all("content") if "default-src" in content]
    assert policies[0].startswith("default-src 'none'")


def test_charts_and_tables_are_accessible(directory: Path) -> None:
    html = to_page(document({**read_json(directory / "report.json"), **EXTRAS}))
    charts = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(charts) >= 8
    for chart in charts:
        assert chart.get("role") == "img"
        assert chart.get("aria-label")
        assert all(point.findtext("title") for point in chart.iter("path") if point.get("class") == "point")
    page = Page(html)
    headers = [attributes for tag, attributes in page.attributes if tag == "th"]
    assert headers
    assert all(attributes.get("scope") == "col" for attributes in headers)


def test_the_guard_is_the_cheapest_policy_within_its_limit(directories: dict[str, Path]) -> None:
    report = read_json(directories["ladimo"] / "report.json")
    first = report["policies"][0]
    report["policies"] = [
        {**first, "policy": name, "active_parameters_ratio": active, "perplexity_ratio": ratio}
        for name, active, ratio in (("full", 1.0, 1.0), ("good", 0.8, 1.029), ("bad", 0.7, 1.06), ("worse", 0.75, 1.09))
    ]
    report["frontier"] = {"points": []}
    report["recipe"]["max_perplexity_ratio"] = 1.08
    markdown = to_markdown(document(report))
    found = dict(re.findall(r"^\| (1\.\d+(?: \(asked for\))?) \| (\w+) \|", markdown, re.MULTILINE))
    assert found == {"1.01": "full", "1.03": "good", "1.05": "good", "1.08 (asked for)": "bad", "1.1": "bad", "1.2": "bad"}
    assert "Within 8% of the dense perplexity the cheapest measured policy is bad, which saves 30.0%" in markdown
    report["recipe"]["max_perplexity_ratio"] = 0.0
    for entry in report["policies"]:
        entry["perplexity_ratio"] = 1.5
    assert "No measured policy stays within 3% of the dense perplexity." in to_markdown(document(report))


def test_both_frontiers_are_shown(directories: dict[str, Path]) -> None:
    report = read_json(directories["ladimo"] / "report.json")
    assert {point["batch"] for point in report["frontier"]["points"]} == {1, 32}
    report["frontier"]["points"] = [point for point in report["frontier"]["points"] if point["batch"] == 1]
    assert "Frontier at batch 32" in (directories["ladimo"] / "report.html").read_text()
    assert "Frontier at batch 32" not in to_page(document(report))


def test_names_from_outside_are_escaped(directory: Path) -> None:
    report = read_json(directory / "report.json")
    report["policies"][0]["description"] = "<script>alert(1)</script> | & more"
    report["model"] = "</title><b>"
    html = to_page(document(report))
    Page(html)
    assert "<script>alert" not in html
    assert "<b>conversion" not in html
    assert "<script>alert(1)</script> \\| & more |" in to_markdown(document(report))


def test_the_path_of_the_source_is_not_published(directory: Path, source: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (directory / name).read_text()
        assert source.name in text
        assert str(source.parent) not in text


def test_outside_keys_go_into_the_record(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "report.json", tmp_path)
    render_report(tmp_path, {"comparison": COMPARISON})
    assert read_json(tmp_path / "report.json")["comparison"] == COMPARISON
    with pytest.raises(ValueError, match=r"report\.json: throughput\.results: is missing"):
        render_report(tmp_path, {"throughput": {"conditions": {}}})
    assert "throughput" not in read_json(tmp_path / "report.json")


def test_the_command_takes_measurements_from_files(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(directory, tmp_path / "model")
    comparison, throughput = tmp_path / "comparison.json", tmp_path / "engine_bench.json"
    write_json(comparison, COMPARISON)
    write_json(throughput, {"results": EXTRAS["throughput"]["results"]})
    command = ["report", str(tmp_path / "model"), "--comparison", str(comparison), "--throughput"]
    assert main([*command, str(tmp_path / "none.json")]) == 1
    assert "none.json: no such file" in capsys.readouterr().err
    assert main([*command, str(throughput)]) == 0
    page = (tmp_path / "model/report.html").read_text()
    assert SECTIONS["comparison"] in page
    assert SECTIONS["throughput"] in page


@pytest.mark.parametrize("path", [("conditions",), ("policies", 0, "perplexity"), ("source", "sha256"), ("frontier", "points")])
def test_a_broken_record_is_refused(directory: Path, path: tuple[str | int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report.json: no such file"):
        render_report(tmp_path)
    report = copy.deepcopy(read_json(directory / "report.json"))
    holder = report
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    write_json(tmp_path / "report.json", report)
    where = re.escape("".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix("."))
    with pytest.raises(ValueError, match=rf"report\.json: {where}: is missing"):
        render_report(tmp_path)
    write_json(tmp_path / "report.json", {**report, path[0]: None})
    with pytest.raises(ValueError, match=rf"report\.json: {path[0]}: must be "):
        render_report(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
