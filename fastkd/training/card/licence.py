"""The licence of a model, as its own card says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastkd.models import locate_source, optional_file
from fastkd.recipe.yaml_text import read_yaml
from fastkd.types import ModelSource

# metadata of models that were scored on many tasks is a few hundred thousand characters long
_LARGEST = 1 << 20
_FENCE = "---"
# what the hub takes: an identifier, `other` with a name and a link
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LINK = re.compile(r"(https://[\w./%~#?&=+:-]{1,300}|LICENSE(\.\w{1,8})?)", re.ASCII)


@dataclass(frozen=True)
class Licence:
    """Licence of one model; all empty where nobody says."""

    identifier: str = ""
    """As the hub spells it: `apache-2.0`, `other`, ..."""
    name: str = ""
    link: str = ""

    def metadata(self) -> dict[str, str]:
        """For a card's metadata."""
        found = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def licence_of(source: ModelSource) -> Licence:
    """What the README.md of a model says in its metadata; a stranger's text, so bounded and
    checked, and nobody says what can't be read."""
    path = optional_file(locate_source(source.name), "README.md", source.revision)
    if path is None:
        return Licence()
    try:
        with path.open(encoding="utf-8") as file:
            found = _metadata(file.read(_LARGEST))
    # ValueError: no UTF-8, or no YAML as a recipe may be
    except (OSError, ValueError):
        return Licence()
    identifier = found.get("license")
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        return Licence()
    name, link = found.get("license_name"), found.get("license_link")
    return Licence(
        identifier,
        name if isinstance(name, str) and _IDENTIFIER.fullmatch(name) else "",
        link if isinstance(link, str) and _LINK.fullmatch(link) else "",
    )


def _metadata(text: str) -> dict[str, Any]:
    """What stands between the two fences that a card begins with; empty where there are none.

    huggingface_hub's `ModelCard` would read it without a bound on what its aliases stand for.

    Raises:
        YamlError: it is no YAML, or stands for more than `read_yaml` takes.
    """
    first, *lines = (line.rstrip() for line in text.lstrip().split("\n"))
    if first != _FENCE or _FENCE not in lines:
        return {}
    found = read_yaml("\n".join(lines[: lines.index(_FENCE)]))
    return found if isinstance(found, dict) else {}
