"""Writes a report as one self-contained HTML page.

It has its own style. A few lines of script make tables sortable; the page also works without them. Its content security policy
forbids loading anything.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.etree.ElementTree import Element

from ladimo.convert.report.charts import WIDTH
from ladimo.convert.report.document import Document, Figure, Fold, Section, Table, Tile
from ladimo.convert.report.markup import element, to_html

PROSE = 24  # characters; a column with a longer cell is text, which is aligned left and may wrap


STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --card: #fff; --text: #1c1e21; --muted: #5b626b; --line: #d9dde2; --accent: #2459c4;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #14161a; --card: #1d2025; --text: #e6e8eb; --muted: #a3abb6; --line: #363c45; --accent: #7aa5ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; text-wrap: balance; }
h2 { font-size: 20px; margin: 0 0 8px; }
p { max-width: 75ch; margin: 0 0 10px; overflow-wrap: anywhere; }
header p { font-size: 17px; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 20px; font-size: 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; margin-bottom: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 30px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span, figcaption, caption, summary { color: var(--muted); font-size: 14px; }
.tile span { display: block; }
.figures { display: flex; flex-wrap: wrap; gap: 24px 32px; margin: 16px 0; }
figure { margin: 0; min-width: 0; max-width: 100%; }
.fluid { flex: 1 1 420px; max-width: 520px; }
.small { flex-basis: 300px; max-width: 340px; }
.fluid svg { width: 100%; height: auto; }
.chart { overflow-x: auto; }
.chart svg { display: block; }
figcaption { width: 0; min-width: 100%; margin-top: 2px; line-height: 1.4; }
.point { cursor: crosshair; }
.scroll { overflow-x: auto; margin: 12px 0; }
details { margin-top: 4px; }
figure details { width: 0; min-width: 100%; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
caption { text-align: left; padding-bottom: 6px; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words, .prose { text-align: left; }
td.prose { min-width: 20em; white-space: normal; }
tbody tr:hover { background: var(--bg); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-align: inherit; }
th button::after { content: " ↕"; color: var(--muted); opacity: .5; }
th[aria-sort=ascending] button::after { content: " ↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: " ↓"; opacity: 1; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 640px) {
  header, main { padding: 0 12px; } header { padding-top: 20px; } section { padding: 14px; } h1 { font-size: 23px; }
}
@media print {
  :root { color-scheme: light; } .fluid { flex-basis: 290px; }
  body { background: none; font-size: 11pt; } nav { display: none; } th button::after { content: none; }
  section { border: 0; padding: 0; } figure, tr, .tile { break-inside: avoid; } h2 { break-after: avoid; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const text = (row) => row.cells[column].textContent;
    const number = (row) => { const found = parseFloat(text(row).replace(/,/g, "")); return isNaN(found) ? Infinity : found; };
    button.onclick = () => {
      const rising = head.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => number(a) - number(b) || text(a).localeCompare(text(b)));
      table.tBodies[0].append(...(rising ? rows : rows.reverse()));
    };
  });
}
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
"""


def to_page(document: Document) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", document.title),
        element("style", STYLE),
    )
    names = {section.title: f"section-{number}" for number, section in enumerate(document.sections)}
    contents = [element("a", title, href=f"#{name}") for title, name in names.items()]
    header = element("header", element("h1", document.title), *_paragraphs(document.lead))
    header.append(element("div", *map(_tile, document.tiles), class_="tiles"))
    header.append(element("nav", *contents, aria_label="Contents"))
    main = element("main", *(_section(section, names[section.title]) for section in document.sections))
    return to_html(element("html", head, element("body", header, main, element("script", SCRIPT)), lang="en"))


def _section(section: Section, name: str) -> Element:
    made = element("section", element("h2", section.title, id=f"{name}-title"), id=name, aria_labelledby=f"{name}-title")
    made.extend([*_paragraphs(section.text), *_blocks(section.blocks)])
    return made


def _blocks(blocks: Sequence[Table | Figure | Fold]) -> Iterator[Element]:
    """The elements of blocks. Neighbouring figures share a row."""
    for is_figure, group in groupby(blocks, lambda block: isinstance(block, Figure)):
        elements = [_block(block) for block in group]
        yield from [element("div", *elements, class_="figures")] if is_figure else elements


def _block(block: Table | Figure | Fold) -> Element:
    if isinstance(block, Fold):
        return element("details", element("summary", block.summary), *_blocks(block.blocks))
    return _table(block) if isinstance(block, Table) else _figure(block)


def _paragraphs(lines: Sequence[str]) -> list[Element]:
    return [element("p", line) for line in lines]


def _tile(tile: Tile) -> Element:
    notes = [element("span", note) for note in tile.notes]
    return element("div", element("span", tile.label), element("b", tile.value), *notes, class_="tile")


def _figure(figure: Figure) -> Element:
    fluid = float(figure.chart.get("width", 0)) == WIDTH  # other charts keep their size, and scroll on a narrow page
    made = element("figure", element("div", figure.chart, class_="chart", tabindex=None if fluid else 0))
    if fluid:
        made.set("class", "fluid small" if figure.small else "fluid")
    if figure.caption:
        made.append(element("figcaption", figure.caption))
    if figure.numbers is not None:
        made.append(element("details", element("summary", "Numbers"), _table(figure.numbers)))
    return made


def _table(table: Table) -> Element:
    columns = [[row[number] for row in table.rows] for number in range(len(table.header))]
    classes = [_column_class(cells) for cells in columns]
    head = element(
        "tr", *(element("th", name, scope="col", class_=css) for name, css in zip(table.header, classes, strict=True))
    )
    body = [
        element("tr", *(element("td", cell, class_=css) for cell, css in zip(row, classes, strict=True))) for row in table.rows
    ]
    caption = [element("caption", table.caption)] if table.caption else []
    made = element("table", *caption, element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll", tabindex=0)


def _column_class(cells: Sequence[str]) -> str | None:
    if any(len(cell) > PROSE for cell in cells):
        return "prose"
    return None if any(cell[:1].isdigit() or cell[:1] in "+-" for cell in cells if cell) else "words"
