"""A hook of MkDocs: each notebook below docs/ is also a page, cell by cell.

Notebooks are stored without outputs, so a page is their text and code. A link to a notebook, which
shows it where the repository is read, leads to its page in the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        assert notebook.abs_src_path is not None, "a notebook is a file"
        page = notebook.src_uri.removesuffix(".ipynb") + ".md"
        text = _page(Path(notebook.abs_src_path).read_text(encoding="utf-8"))
        name = PurePosixPath(notebook.src_uri).name
        text += f'\n\n<a href="{name}" download>This page as a notebook</a>\n'
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to notebooks lead to their pages."""
    return re.sub(r"(\]\([^)\s:]+)\.ipynb\)", r"\1.md)", markdown)


def _page(notebook: str) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]
    return "\n\n".join(
        f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells
    )
