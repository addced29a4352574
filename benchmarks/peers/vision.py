"""torchvision beside a torch that it wasn't built for: its names without its compiled operators.

PyPI's wheels of torchvision are made for torch's CUDA build and don't load beside the CPU one; then
`import torchvision` fails, and with it transformers, which imports it where it is installed.
torchdistill wants it for data sets and pictures, of which nothing runs here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

# the operators that torchvision's Python describes as it is imported
OPERATORS = ("nms", "qnms")
_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def declare_operators() -> None:
    """Make torchvision importable, before anything imports transformers; its operators stay absent
    and raise when called."""
    found = find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(name + _ARGUMENTS)
        # what is declared goes with the object
        _declared.append(library)
