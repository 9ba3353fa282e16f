"""Links between documents, which are relative to the repository, become links between pages of the site."""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Documents outside docs/ and the pages that they become. A document in docs/ keeps its name.
MOVED = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/METRICS.md": "metrics.md",
    "deploy/RUNBOOK.md": "runbook.md",
    "loadtests/README.md": "benchmarks.md",
    "tests/README.md": "tests.md",
}
_ORIGINS = {page: document for document, page in MOVED.items()}
_FENCE = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
_FIRST_LINE = re.compile(r"\A(```\w+) .*")
_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_PICTURE = re.compile(r'(?<=<img src=")[^"]+')


def origin(page: str) -> str:
    """The document that a page shows, as a path from the repository's root."""
    return _ORIGINS.get(page, f"docs/{page}")


def rewrite(text: str, page: str) -> str:
    """The text of a document with its links as the page of the site needs them. Code blocks stay as they are, except that only
    the language stays in their first line: what follows it is for our tests, and MkDocs would not take it for a code block.

    A link to a file of the repository that is not on the site becomes plain text. Raises ValueError for a link to nothing.
    """
    directory = posixpath.dirname(origin(page))

    def place(target: str) -> str | None:
        """The target relative to the page; None if it is not on the site."""
        document = posixpath.normpath(posixpath.join(directory, target))
        if not (ROOT / document).exists():
            raise ValueError(f"{origin(page)} links to {target}, which does not exist")
        moved = MOVED.get(document) or (document.removeprefix("docs/") if document.startswith("docs/") else None)
        return None if moved is None else posixpath.relpath(moved, posixpath.dirname(page) or ".")

    def link(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", match["target"]):
            return match[0]
        found = place(match["target"])
        return match["text"] if found is None else f"[{match['text']}]({found}{match['anchor'] or ''})"

    def change(part: str) -> str:
        return _PICTURE.sub(lambda match: place(match[0]) or match[0], _LINK.sub(link, part))

    return _outside_fences(text, change)


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts, place = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[place : fence.start()]), _FIRST_LINE.sub(r"\1", fence[0], count=1)]
        place = fence.end()
    return "".join([*parts, change(text[place:])])
