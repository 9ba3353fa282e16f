"""Writes a report as Markdown, with tables of numbers in place of charts."""

from collections.abc import Iterator

from ladimo.convert.report.document import Document, Figure, Fold, Table


def to_markdown(document: Document) -> str:
    parts = [f"# {document.title}", *document.lead]
    for section in document.sections:
        parts += [f"## {section.title}", *section.text]
        for block in section.blocks:
            parts += _markdown_block(block)
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Table | Figure | Fold) -> Iterator[str]:
    if isinstance(block, Table):
        if block.caption:
            yield block.caption
        lines = [block.header, ["---", *["---:"] * (len(block.header) - 1)], *block.rows]
        yield "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    elif isinstance(block, Fold):
        for inner in block.blocks:
            yield from _markdown_block(inner)
    elif block.numbers is not None:
        yield f"**{block.chart.get('aria-label')}.** {block.caption}".strip()
        yield from _markdown_block(block.numbers)
