"""Two wheels, of fastkd and of its kernels: what is in them, what they ask for, that they work."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# of each distribution: its folder, its package, and where that lies
PROJECTS = {
    "fastkd": (ROOT, "fastkd", ROOT),
    "fastkd-kernels": (ROOT / "kernels", "fastkd_kernels", ROOT / "kernels"),
}
# what a process begins with that is to see nothing but torch, triton and what these ask for
TORCH_ALONE = """
import importlib.metadata, json, re, sys
def closure(names):
    seen = set()
    while names:
        name = re.split(r"[^A-Za-z0-9._-]", names.pop())[0].lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            try:
                names += importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                pass
    return seen
allowed = closure(["torch", "triton"])
owners = importlib.metadata.packages_distributions()
class Absent:
    def find_spec(self, fullname, path=None, target=None):
        found = owners.get(fullname.split(".")[0])
        if found and not {name.lower().replace("_", "-") for name in found} & allowed:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
sys.meta_path.insert(0, Absent())
"""
IMPORT_KERNELS = """
sys.path.insert(0, sys.argv[1])
import torch
import fastkd_kernels
try:
    import pydantic
except ModuleNotFoundError:
    pass
else:
    sys.exit("more than torch and triton can be imported")
states = [torch.randn(1, 5, 3, requires_grad=True)]
loss = fastkd_kernels.hidden_mse(states, [torch.randn(1, 5, 3)])
loss.sum().backward()
print(json.dumps([fastkd_kernels.__file__, states[0].grad.norm().item() > 0]))
"""
IMPORT_BOTH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fastkd, fastkd_kernels
from fastkd.losses.hidden import HiddenLoss
from fastkd.recipe import Recipe
print(json.dumps([fastkd.__file__, fastkd_kernels.__file__]))
"""


def run(*command: str, cwd: Path) -> str:
    """What a process prints, away from the checkout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel of both, each wheel made from its sdist."""
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("build") is None:
        pytest.skip("hatchling and build make the wheels; they are in the dev extra")
    folder = tmp_path_factory.mktemp("built")
    for project, _, _ in PROJECTS.values():
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
        run(*build, str(project), cwd=folder)
    return folder


def wheel_of(name: str, folder: Path) -> Path:
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    (text,) = (data for name, data in contents(wheel).items() if name.endswith("/METADATA"))
    return Parser().parsestr(text.decode())


def project_of(folder: Path) -> dict[str, object]:
    return dict(tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"])


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_its_package_and_nothing_else(name: str, built: Path) -> None:
    _, package, root = PROJECTS[name]
    found = set(contents(wheel_of(name, built)))
    tops = {path.split("/")[0] for path in found}
    (described,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {package, described}
    assert {str(path.relative_to(root)) for path in (root / package).rglob("*.py")} <= found
    assert {f"{package}/py.typed", f"{described}/licenses/LICENSE"} <= found
    assert (f"{described}/entry_points.txt" in found) == (name == "fastkd")


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_is_the_same_from_the_tree_and_from_the_sdist(
    name: str, built: Path, tmp_path: Path
) -> None:
    project, _, _ = PROJECTS[name]
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path))
    run(*build, str(project), cwd=tmp_path)
    assert contents(wheel_of(name, tmp_path)) == contents(wheel_of(name, built))


def test_fastkd_asks_for_the_kernels_of_its_own_version(built: Path) -> None:
    whole, kernels = (metadata(wheel_of(name, built)) for name in PROJECTS)
    assert whole["Version"] == kernels["Version"]
    needed = whole.get_all("Requires-Dist", [])
    assert f"fastkd-kernels=={kernels['Version']}" in needed
    assert [re.split("[<>=;]", line)[0] for line in kernels.get_all("Requires-Dist", [])] == [
        "torch",
        "triton",
    ]


def test_both_projects_say_the_same_of_what_they_share() -> None:
    whole, kernels = (project_of(folder) for folder, _, _ in PROJECTS.values())
    for field in ("version", "authors", "license", "requires-python", "classifiers"):
        assert whole[field] == kernels[field], field
    assert {line for line in kernels["dependencies"] if line.startswith("torch")} <= set(  # type: ignore[attr-defined]
        whole["dependencies"]  # type: ignore[call-overload]
    )
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "kernels" / "LICENSE").read_bytes()


def test_an_editable_install_takes_the_kernels_of_the_clone(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling makes it; it is in the dev extra")
    lines = f"import hatchling.build; hatchling.build.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", lines, cwd=ROOT)
    wheel = wheel_of("fastkd", tmp_path)
    needed = metadata(wheel).get_all("Requires-Dist", [])
    assert not [line for line in needed if line.startswith("fastkd-kernels")]
    assert [line for line in needed if line.startswith("triton>=")]
    (path,) = (data.decode() for name, data in contents(wheel).items() if name.endswith(".pth"))
    assert path.split() == [str(ROOT), str(ROOT / "kernels")]


def test_what_is_tested_is_this_checkout() -> None:
    import fastkd_kernels

    import fastkd

    for package in (fastkd, fastkd_kernels):
        assert Path(str(package.__file__)).is_relative_to(ROOT), (
            f"{package.__name__} comes from {package.__file__}; pip uninstall fastkd-kernels: an "
            "installed wheel of the kernels hides those of the checkout"
        )


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where pip put each wheel, by itself."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip installs the wheels")
    folders = {name: tmp_path_factory.mktemp(name) for name in PROJECTS}
    for name, folder in folders.items():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
        run(*pip, "--target", str(folder), str(wheel_of(name, built)), cwd=built)
    return folders


def test_both_install_no_file_of_the_same_name(installed: dict[str, Path]) -> None:
    whole, kernels = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in installed.values()
    )
    assert whole and kernels and not whole & kernels


def test_the_kernels_work_with_torch_and_triton_alone(
    installed: dict[str, Path], tmp_path: Path
) -> None:
    # -I: neither the working folder nor PYTHONPATH; the path in front outranks an editable install
    folder = installed["fastkd-kernels"]
    lines = TORCH_ALONE + IMPORT_KERNELS
    printed = run(sys.executable, "-I", "-c", lines, str(folder), cwd=tmp_path)
    assert json.loads(printed) == [str(folder / "fastkd_kernels" / "__init__.py"), True]


def test_fastkd_works_from_both_wheels(built: Path, tmp_path: Path) -> None:
    for name in PROJECTS:
        with zipfile.ZipFile(wheel_of(name, built)) as archive:
            archive.extractall(tmp_path)
    printed = run(sys.executable, "-I", "-c", IMPORT_BOTH, str(tmp_path), cwd=tmp_path)
    assert json.loads(printed) == [
        str(tmp_path / package / "__init__.py") for package in ("fastkd", "fastkd_kernels")
    ]
