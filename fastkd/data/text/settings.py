"""How text is read and cut: the plain counterpart of a recipe's `data` section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastkd.files.home import at_home
from fastkd.types import Unit


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What `prepare_corpus` is asked for; every field means what it means in `recipe.Data`,
    whose other fields are of `documents: row`."""

    train: tuple[str, ...]
    """Files, folders, globs, hub names, or `FORMAT:PLACE` of a reader from outside; empty where
    `heldout` alone is read."""
    heldout: tuple[str, ...] | None = None
    heldout_fraction: float = 0.02
    heldout_blocks: int = 256
    split: str = "train"
    text_column: str = "text"
    documents: Unit = "paragraph"
    block_size: int = 128
    streaming: bool = False
    shuffle_buffer: int = 1000
    workers: int | None = None
    """Not given, a corpus takes one a core to be built, and none to be streamed."""
    cache: str = "~/.cache/fastkd"

    def __post_init__(self) -> None:
        # its letters would be names, and the first one is the root of all files
        assert not isinstance(self.train, str) and not isinstance(self.heldout, str)

    @property
    def cache_root(self) -> Path:
        """The folder of all cached data.

        Raises:
            UserError: it is in a home folder, and there is none.
        """
        return at_home(self.cache, "data.cache")
