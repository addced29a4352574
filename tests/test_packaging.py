"""The wheel holds both packages, typed, and they work from it alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_BOTH = """
import pathlib, sys
sys.path.insert(0, {folder!r})
import fastkd, fastkd_kernels
from fastkd.recipe import Recipe
from fastkd_kernels import attention_score_mse, hidden_mse
for package in (fastkd, fastkd_kernels):
    print(pathlib.Path(package.__file__).resolve())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("build") is None:
        pytest.skip("hatchling and build make the wheel; they are in the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("fastkd-*.whl")
    return built


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_of_both_packages(wheel: Path) -> None:
    expected = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "fastkd"), (ROOT / "kernels", "fastkd_kernels"))
        for path in (root / package).rglob("*.py")
    }
    assert expected <= contents(wheel)
    assert {"fastkd/py.typed", "fastkd_kernels/py.typed"} <= contents(wheel)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}
    (metadata,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {"fastkd", "fastkd_kernels", metadata}
    assert {f"{metadata}/entry_points.txt", f"{metadata}/licenses/LICENSE"} <= contents(wheel)


def test_both_packages_import_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    # -I: neither the working folder nor PYTHONPATH; the path in front outranks an editable install
    script = IMPORT_BOTH.format(folder=str(unpacked))
    result = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        str(unpacked.resolve() / package / "__init__.py")
        for package in ("fastkd", "fastkd_kernels")
    ]
