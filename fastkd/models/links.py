"""Files in a model's folder: what is read of it may be, and no link leads out of it to what a
student is handed on with.

A folder from a stranger may hold links to anything that its reader may read. Configuration,
tokenizer, chat templates and modules are written into a student's folder, which may be published;
weights are read as tensors alone, so that big ones may lie on another disk.
"""

from __future__ import annotations

import errno
import os
from fnmatch import fnmatch
from pathlib import Path

from fastkd.errors import UserError

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"),
)
READ = (
    "config.json",
    "*_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""Patterns of what transformers and sentence-transformers read of a model's folder."""
# of transformers, beside chat_template.jinja
_TEMPLATES = "additional_chat_templates"


def check_links(folder: Path, root: Path) -> None:
    """See that of the files in a model's folder none but weights lies elsewhere, and that those
    which are read may be: safetensors calls others missing, and transformers goes on without them.

    Args:
        folder: what transformers reads.
        root: the whole model's folder, the same or one above it.

    Raises:
        UserError: naming the first that does, or a folder or a file that can't be read.
    """
    for place in (folder, folder / _TEMPLATES):
        try:
            for path in sorted(place.iterdir()) if place.is_dir() else []:
                read = any(fnmatch(path.name, pattern) for pattern in READ)
                # transformers says of a link to nothing that the file is missing
                if read and path.exists() and not os.access(path, os.R_OK):
                    raise UserError(
                        f"{path}: may not be read ({os.strerror(errno.EACCES)}); get the "
                        "permission to read it, or give another model"
                    )
                if path.suffix not in _WEIGHTS and path.is_file():
                    require_inside(path, root)
        except OSError as error:
            raise UserError(
                f"{error.filename or place}: cannot be read: {error.strerror or error}"
            ) from error


def require_inside(path: Path, root: Path) -> None:
    """See that a file of a model's folder lies in it, or in the hub cache that the folder is of.

    Raises:
        UserError: it is a link to another place.
    """
    home, found = root.resolve(), path.resolve()
    # models--NAME/snapshots/COMMIT/FILE is a link to models--NAME/blobs/DIGEST
    caches = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if not any(found.is_relative_to(place) for place in (home, *caches)):
        raise UserError(
            f"{path}: a link to {found}, outside of its model's folder; a student is handed on "
            "with it, so put a copy there if that is meant (weights of the model may be links)"
        )
