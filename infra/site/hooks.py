"""The hooks of MkDocs: generated pages, navigation, formulas, diagrams and links to the code.

MkDocs loads this file by the entry `hooks` of `mkdocs.yml` and calls the functions named `on_...`.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

from infra import reference
from infra.site import code_links, diagrams, formulas, tour

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
"""Documents beside `docs/`, and the pages that links to them lead to; README.md has the contents of the index."""
API = "reference/api"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation with what lies in `docs/`."""
    docs = Path(config.docs_dir)
    nav = [entry for item in config.nav or [] if (entry := _expanded(item, docs)) is not None]
    named = set(_named(nav))
    more = [path.name for path in sorted(docs.glob("*.md")) if path.name not in named]
    config.nav = [*nav, {"More": more}] if more else nav
    return config


def _expanded(item: Any, docs: Path) -> Any:
    """Replace patterns in an entry of the navigation by the pages that match; None if there are none."""
    if isinstance(item, str):
        return item
    (title, value), *_ = item.items()
    if isinstance(value, list):
        return {title: [entry for inner in value if (entry := _expanded(inner, docs)) is not None]}
    if not value.endswith("*"):
        return item
    if value.startswith(API):
        return {title: [f"{API}/{package}.md" for package in packages()]}
    found = sorted(path.relative_to(docs).as_posix() for path in docs.glob(value) if path.suffix == ".md")
    if not found:
        return None
    return {title: found if value.endswith("/*") else found[0]}


def _named(nav: list[Any]) -> list[str]:
    """Return every page that a navigation names."""
    names: list[str] = []
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        names += _named(value) if isinstance(value, list) else [value]
    return names


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made = {"reference/parameters.md": reference.page()}
    made |= {f"{API}/{package}.md": api_page(package) for package in packages()}
    for name, page in ROOT_PAGES.items():
        if name != "README.md":
            made[page] = (code_links.ROOT / name).read_text(encoding="utf-8")
    for name, content in _tour().items():
        if isinstance(content, bytes):
            files.append(File.generated(config, name, content=content))
        else:
            made[name] = content
    texts = made | {
        file.src_uri: file.content_string for file in files.documentation_pages() if file.src_uri not in made
    }
    for name, text in texts.items():
        for path, _ in code_links.targets(text, _base(name)):
            if path not in ROOT_PAGES and (code_links.ROOT / path).is_file():
                made[code_links.source_page(path)] = code_links.source_markdown(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    if tour_script := files.get_file_from_path("tour.py"):
        files.remove(tour_script)
    return files


def _tour() -> dict[str, str | bytes]:
    try:
        return tour.pages(code_links.ROOT)
    except ValueError as error:
        raise PluginError(str(error)) from None


def packages() -> list[str]:
    """Return the packages of `models`, the layer itself first."""
    root = code_links.ROOT / "models"
    return ["models", *(f"models.{path.parent.name}" for path in sorted(root.glob("*/__init__.py")))]


def api_page(package: str) -> str:
    """Return the Markdown that makes mkdocstrings document every module of a package."""
    folder = code_links.ROOT / package.replace(".", "/")
    modules = [path.stem for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    return "\n\n".join([f"# {package}", *(f"::: {package}.{name}" for name in modules)]) + "\n"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Resolve links to the repository, and replace diagrams by tables."""
    name = page.file.src_uri
    if name.startswith(("source/", f"{API}/")):
        return markdown
    try:
        base = _base(name)
        resolved = code_links.resolved(markdown, base, ROOT_PAGES) if base == name else _moved(markdown, base, name)
        return diagrams.as_tables(resolved)
    except code_links.DeadLinkError as error:
        raise PluginError(str(error)) from None


def _base(name: str) -> str:
    """Return the place that the relative links of a page refer to: that of its source, seen from `docs/`."""
    originals = {page: f"../{path}" for path, page in ROOT_PAGES.items() if path != "README.md"}
    return originals.get(name, name)


def _moved(markdown: str, base: str, name: str) -> str:
    """Resolve the links of a document that lies beside `docs/`: its links to `docs/` lose that folder."""
    resolved = code_links.resolved(markdown, base, ROOT_PAGES)
    return resolved.replace("](docs/", "](").replace("](../docs/", "](") if name in ROOT_PAGES.values() else resolved


def on_page_content(content: str, *, page: Page, files: Files, **_: Any) -> str:
    """Draw formulas, and turn links to code into links to the pages that show it."""
    try:
        content = formulas.drawn(content)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None

    def link(found: Any) -> str:
        file = files.get_file_from_path(code_links.source_page(html.unescape(found[1])))
        if file is None:
            raise PluginError(f"{page.file.src_uri} links to {found[1]}, which has no page")
        anchor = f"#{code_links.LINES}{found[2]}" if found[2] else ""
        return f'class="code-link" href="{get_relative_url(file.url, page.url)}{anchor}"'

    return code_links.HREF.sub(link, content)
