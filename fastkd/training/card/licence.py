"""The licence of a model, as its own card says."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCard

from fastkd.models import locate_source, optional_file
from fastkd.types import ModelSource

_LARGEST = 1 << 20
# what the hub takes: an identifier, `other` with a name and a link
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LINK = re.compile(r"(https://[\w./%~#?&=+:-]{1,300}|LICENSE(\.\w{1,8})?)", re.ASCII)

# metadata that is no mapping, or whose keys are no names
_UNREADABLE = (OSError, ValueError, TypeError, RecursionError)


@dataclass(frozen=True)
class Licence:
    """Of one model; all empty where nobody says."""

    identifier: str = ""
    """As the hub spells it: `apache-2.0`, `other`, ..."""
    name: str = ""
    link: str = ""

    def metadata(self) -> dict[str, str]:
        """For a card's metadata."""
        found = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def licence_of(source: ModelSource) -> Licence:
    """What the README.md of a model says in its metadata; a stranger's text, so checked."""
    path = optional_file(locate_source(source.name), "README.md", source.revision)
    if path is None:
        return Licence()
    try:
        with path.open(encoding="utf-8") as file:
            found = ModelCard(file.read(_LARGEST), ignore_metadata_errors=True).data
    except (*_UNREADABLE, yaml.YAMLError):
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
