"""Packages that only a part of fastkd needs: its extra installs them, and a missing one is named
before anything is loaded."""

from __future__ import annotations

import importlib.util
from typing import Literal

from fastkd.errors import UserError

Extra = Literal["mteb", "onnx", "study", "tasks", "tensorboard", "trackio", "trainer", "wandb"]
# what is imported, and what installs it
PACKAGES: dict[Extra, dict[str, str]] = {
    "mteb": {"mteb": "mteb"},
    "study": {"optuna": "optuna", "cmaes": "cmaes", "matplotlib": "matplotlib"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    "tasks": {"sklearn": "scikit-learn"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "trackio": {"trackio": "trackio"},
    "trainer": {"accelerate": "accelerate"},
    "wandb": {"wandb": "wandb"},
}


def need(who: str, extra: Extra, *packages: str, instead: str = "") -> None:
    """See that what somebody needs is installed.

    Args:
        who: needs it, as the user knows it.
        extra: of fastkd that installs it.
        packages: by the names that they are imported by; all of the extra where none is given.
        instead: what else the user can do.

    Raises:
        UserError: naming what is missing and how to install it.
    """
    known = PACKAGES[extra]
    missing = [known[name] for name in packages or known if not is_installed(name)]
    if missing:
        install = f"pip install 'fastkd[{extra}]'{', or ' if instead else ''}{instead}"
        raise UserError(f"{who} needs {' and '.join(missing)}; {install}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it isn't."""
    spec = importlib.util.find_spec(package)
    # the folder that wandb leaves where it runs looks like a package without code
    return spec is not None and spec.origin is not None
