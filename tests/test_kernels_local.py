"""`kernels` loads what `tools/kernel_hub.py` lays out, alone or beside another copy."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from inspect import isfunction
from pathlib import Path

import pytest

from tools.kernel_hub import lay_out

pytestmark = pytest.mark.skipif(
    find_spec("kernels") is None or find_spec("kernels").origin is None,  # type: ignore[union-attr]
    reason="needs the PyPI package kernels",
)

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels" / "fastkd_kernels"
# what a child process runs before its own lines
LOAD = """
import json, sys
from pathlib import Path
import torch
from kernels import get_local_kernel

def ops(namespace):
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.split("::")[1] for name in names if name.startswith(namespace + "::"))

def result(package):
    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    key = torch.randn(1, 2, 5, 4, requires_grad=True)
    student = package.AttentionState(query, key, None, 0.5)
    teacher = package.AttentionState(torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 6), None, 0.4)
    hidden = torch.randn(1, 5, 3, requires_grad=True)
    loss = package.attention_score_mse([student], [teacher])
    loss = loss + package.hidden_mse([hidden], [torch.randn(1, 5, 3)])
    loss.sum().backward()
    return [loss.item(), *(leaf.grad.norm().item() for leaf in (query, key, hidden))]

def load():
    return get_local_kernel(Path(sys.argv[1]), backend="cpu")

def identifier():
    return json.loads((Path(sys.argv[1]) / "build/torch-cpu/metadata.json").read_text())["id"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, as the Hub would serve it."""
    root = tmp_path_factory.mktemp("repository")
    lay_out(root, "owner/fastkd-kernels")
    return root


def test_the_layout_is_what_kernels_reads(repository: Path) -> None:
    from kernels._rust import Build, Digest, Metadata

    Build.open(repository)  # refuses what is not of its format
    variants = {path.name: path for path in (repository / "build").iterdir()}
    assert set(variants) == {"torch-cpu", "torch-cuda"}
    metadata = {
        name: Metadata.read_from_file(at / "metadata.json") for name, at in variants.items()
    }
    assert len({one.id for one in metadata.values()}) == len(variants)
    for name, one in metadata.items():
        assert f"torch-{one.backend.backend_type}".lower() == name
        assert one.name.python_name == PACKAGE.name
        assert one.digest is not None
        found = Digest.hash_variant(one.digest.algorithm, variants[name])
        assert one.digest.files == found.files
    assert "{{" not in (repository / "README.md").read_text(encoding="utf-8")


def child(repository: Path, lines: str, *, paths: tuple[Path, ...] = ()) -> dict[str, object]:
    """What a fresh process prints as JSON; it sees `paths` but not this checkout's packages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # no site hooks: an editable install would bring both packages back
    hidden = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "from pathlib import Path\n"
        "names = 'fastkd', 'fastkd_kernels'\n"
        "ours = lambda path: any((Path(path) / name).is_dir() for name in names)\n"
        "sys.path = [path for path in sys.path if 'site-packages' in path or not ours(path)]\n"
        f"sys.path[:0] = {[str(path) for path in paths]!r}\n"
    )
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", hidden + LOAD + lines, str(repository)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_loads_and_runs_without_fastkd(repository: Path) -> None:
    found = child(
        repository,
        """
from importlib.util import find_spec
from inspect import isfunction
package = load()
print(json.dumps({
    "result": result(package),
    "all": sorted(package.__all__),
    "missing": [name for name in package.__all__ if not hasattr(package, name)],
    "name": package.__name__,
    "installed": [name for name in ("fastkd", "fastkd_kernels") if find_spec(name)],
    "id": identifier(),
    "ours": ops(identifier()),
    "plain": ops("fastkd_kernels"),
}))
""",
    )
    import fastkd_kernels

    assert found["name"] == found["id"]
    assert found["installed"] == []
    assert found["all"] == sorted(fastkd_kernels.__all__)
    assert found["missing"] == []
    # every op under the copy's own name, as the requirements ask, and none under another
    exported = (getattr(fastkd_kernels, name) for name in fastkd_kernels.__all__)
    folders = {op.__module__.split(".")[-2] for op in exported if isfunction(op)}
    longest_first = sorted(folders, key=len, reverse=True)
    named = [next((f for f in longest_first if op.startswith(f)), op) for op in found["ours"]]  # type: ignore[attr-defined]
    # the last is what ops share
    assert set(named) == {*folders, "rescaled"}
    assert found["plain"] == []
    assert all(value > 0 for value in found["result"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["plain", "loaded"])
def test_two_copies_in_one_process(repository: Path, first: str) -> None:
    order = ("import fastkd_kernels as plain", "package = load()")
    lines = order if first == "plain" else order[::-1]
    found = child(
        repository,
        "\n".join(lines)
        + """
assert plain is not package
print(json.dumps({
    "results": [result(plain), result(package), result(plain)],
    "ops": [ops("fastkd_kernels"), ops(identifier())],
}))
""",
        paths=(PACKAGE.parent,),
    )
    plain, package, again = found["results"]  # type: ignore[misc]
    assert plain == package == again
    own, other = found["ops"]  # type: ignore[misc]
    assert own == other
    assert own


def test_imports_are_relative() -> None:
    """`import fastkd_kernels` inside the package would find another copy, or none."""
    absolute = [
        f"{path.name}: {name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if name.split(".")[0] in ("fastkd", "fastkd_kernels", "kernels")
    ]
    assert not absolute
