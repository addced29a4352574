"""What MkDocs calls while it builds the site: pages of the reference, made from the code."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from reference import navigation, pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference where the navigation names it."""
    assert config.nav is not None, "mkdocs.yml has a navigation"
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
