"""fastkd commands where the packages of no extra can be imported, one after the other.

Used as `python without_extras.py '[["distill", "recipe.yaml"], ...]'`; prints JSON: of each its
exit code, and which of those packages were imported after all.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from typing import Any

ABSENT = {
    *("accelerate", "cmaes", "matplotlib", "mteb", "onnx", "onnxruntime", "onnxscript"),
    *("optuna", "sklearn", "tensorboard", "trackio", "wandb"),
}


class _WithoutThem(importlib.machinery.PathFinder):
    """Finds what lies on the path, but for these."""

    @classmethod
    def find_spec(cls, fullname: str, *arguments: Any) -> Any:
        if fullname.split(".")[0] in ABSENT:
            return None
        return super().find_spec(fullname, *arguments)


def main() -> None:
    """Run the commands."""
    place = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[place] = _WithoutThem
    from fastkd import cli

    codes = []
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["fastkd", *arguments]
        try:
            cli.main()
            codes.append(0)
        except SystemExit as ended:
            codes.append(ended.code or 0)
    imported = sorted({name.split(".")[0] for name in sys.modules} & ABSENT)
    print(json.dumps([codes, imported]))


if __name__ == "__main__":
    main()
