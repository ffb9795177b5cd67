"""What mkdocs.yml needs beyond plugins: pages and files from outside docs/, and doctests of docstrings as code.

`on_files` and `on_page_markdown` are mkdocs' hooks; `Doctests` is an extension of griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Pages that stand at the root of the repository, and their names on the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
#: Where the site has the files of the repository that its pages link to.
COPIES = "repository"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
DOCTEST = re.compile(r"^>>> .*\n(?:(?!\s*$).*\n?)*", re.MULTILINE)


def address(target: str, page: Path) -> str:
    """The link of `page`, a file of the repository, as the site has it.

    >>> address("../examples/cann", ROOT / "docs/ascend.md"), address("docs/json.md", ROOT / "CONTRIBUTING.md")
    ('repository/examples/cann', 'json.md')
    """
    path = normpath((page.parent / target).relative_to(ROOT).as_posix())
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{COPIES}/{path}")


def linked_files() -> set[Path]:
    """Files outside docs/ that a page links to; of a folder, all that it holds."""
    found = set()
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in LINK.findall(page.read_text("utf-8")):
            path = Path(normpath(page.parent / target))
            if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs") and path.name not in PAGES:
                found |= {path} if path.is_file() else {file for file in path.rglob("*") if file.is_file()}
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, name in PAGES.items():
        if name not in files.src_uris:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    for path in sorted(linked_files()):
        uri = f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    source = Path(str(page.file.abs_src_path))
    return LINK.sub(lambda found: address(found.group(1), source), markdown)


class Doctests(Extension):
    """Fences the doctests of a docstring, whose `>>>` Markdown would take for quotations in quotations."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The docstring with each doctest, up to the next empty line, in a fence.

    >>> fenced("Words.\\n\\n>>> one\\n1\\n\\nMore.").split("\\n")
    ['Words.', '', '```pycon', '>>> one', '1', '```', '', 'More.']
    """
    return DOCTEST.sub(lambda found: f"```pycon\n{found.group().rstrip()}\n```\n", text)
