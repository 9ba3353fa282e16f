import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ladimo.checkpoint import read_json, write_json
from ladimo.convert.charts import bar_chart, line_chart
from ladimo.convert.report import render_report
from tests.ladimo.convert.conftest import Made


def test_reports_are_rendered_from_the_record_alone(made: Made, tmp_path: Path) -> None:
    shutil.copy(made.out / "report.json", tmp_path)
    render_report(tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (made.out / name).read_bytes()


def test_reports_show_the_figures(made: Made) -> None:
    report = read_json(made.out / "report.json")
    markdown, html = ((made.out / name).read_text() for name in ("report.md", "report.html"))
    for entry in report["policies"]:
        for page in (markdown, html):
            assert f"{entry['perplexity']:.3f}" in page
            assert f"{100 * entry['active_parameters_ratio']:.1f}%" in page
    assert "given BOS" in markdown


def test_html_is_well_formed_and_self_contained(made: Made) -> None:
    html = (made.out / "report.html").read_text()
    HTMLParser().feed(html)
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 2 + 2 * 3
    for chart in charts:
        ElementTree.fromstring(chart)
    assert not re.search(r"(src|href)=|https?://|@import", html)


def test_charts_hold_every_point_and_escape_names() -> None:
    chart = line_chart("a < b", {"x & y": [(0, 1), (1, 1)], "z": [(2, 3)]}, "x", "y", ["first", "second"])
    root = ElementTree.fromstring(chart)
    assert len(root.findall(".//circle")) == 3
    assert "x & y" in "".join(root.itertext())
    assert len(ElementTree.fromstring(bar_chart("bars", [0, 1, 2], ("0", "2"), "n")).findall(".//rect")) == 3


def test_a_broken_record_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report.json: no such file"):
        render_report(tmp_path)
    report = read_json(made.out / "report.json")
    del report["conditions"]
    write_json(tmp_path / "report.json", report)
    with pytest.raises(ValueError, match="missing or wrong field: 'conditions'"):
        render_report(tmp_path)
