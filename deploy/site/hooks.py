"""What MkDocs calls while it builds the site: adds pages that are not files in docs/, and adapts the links of all pages."""

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from deploy.site.commands import ladimo_page, server_page
from deploy.site.http_api import http_page
from deploy.site.links import MOVED, ROOT, rewrite
from deploy.site.performance import performance_page, plots

GENERATED = {
    "reference/http.md": http_page,
    "reference/ladimo.md": ladimo_page,
    "reference/ladimo-server.md": server_page,
    "performance/records.md": performance_page,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List pages that the navigation does not name in a section of their own, so that a new page is never lost."""
    assert config.nav is not None
    missing = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in str(config.nav)]
    if missing:
        config.nav.append({"More": missing})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for document, page in MOVED.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    for page, make in GENERATED.items():
        files.append(File.generated(config, page, content=make()))
    for place, content in plots().items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    return markdown if page.file.src_uri in GENERATED else rewrite(markdown, page.file.src_uri)
