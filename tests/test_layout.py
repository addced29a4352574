"""Imports go one way only, and no file stands where it would shadow or outgrow."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS: tuple[set[str], ...] = (
    {"fastkd_kernels"},
    {
        "errors",
        "layer_map",
        "recipe",
        "continuation",
        "sealed",
        "disk",
        "run_lock",
        "beginnings",
        "surroundings",
        "run_folder",
        "console",
        "metrics",
        "signals",
        "memory",
    },
    {
        "capture",
        "heads",
        "models",
        "data",
        "objective",
        "masking",
        "deepspeed_config",
        "tasks",
        "classifiers",
    },
    {"engine", "checkpoint", "export", "finite", "peers"},
    {
        "material",
        "assemble",
        "rehearsal",
        "evaluate",
        "introduction",
        "summary",
        "stages",
        "train",
        "window",
    },
    {"report", "figures", "pages", "study", "similarity", "doctor"},
    {"cli", "__main__"},
)
# what a level may import besides the standard library
PACKAGES: tuple[set[str], ...] = (
    {"torch", "triton"},
    {"torch", "numpy", "pydantic", "yaml", "rich", "scipy", "sklearn"},
    {
        "torch",
        "numpy",
        "transformers",
        "huggingface_hub",
        "datasets",
        "safetensors",
        "rich",
        "sklearn",
    },
    {"torch", "transformers", "safetensors", "deepspeed", "psutil"},
    {"torch", "transformers"},
    {"torch", "numpy", "pydantic", "rich", "scipy", "matplotlib", "psutil", "optuna"},
    {"typer", "transformers"},
)
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "ot": "pot"}
LINES = 600


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE_FILES = python_files("fastkd", "kernels")
ALL_FILES = python_files("fastkd", "kernels", "tests", "benchmarks")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """`fastkd.data.cache` of a file; a package's `__init__` is the package."""
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE_FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, by its full name."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def level(module: str) -> int:
    """The level of a module of ours; of the package `fastkd` itself, the lowest."""
    unit = module if module.startswith("fastkd_kernels") else module.removeprefix("fastkd")
    unit = unit.removeprefix(".").split(".")[0]
    if not unit:
        return 0
    found = [number for number, units in enumerate(LEVELS) if unit in units]
    assert found, f"{module} has no level yet: give it one in {named(Path(__file__))}"
    return found[0]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("fastkd", "fastkd_kernels")


def third_party(path: Path) -> set[str]:
    """The packages from elsewhere that a file imports."""
    local = {file.stem for file in path.parent.glob("*.py")}
    if not path.is_relative_to(ROOT / "fastkd") and not path.is_relative_to(ROOT / "kernels"):
        # benchmarks and the soak share the helpers of the tests, which try the soak
        local |= {file.stem for file in python_files("tests")}
    ours = {"fastkd", "fastkd_kernels", "benchmarks"}
    names = {module.split(".")[0] for module in imports(path)}
    return names - set(sys.stdlib_module_names) - local - ours


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=named)
def test_a_module_imports_from_its_own_level_or_below(path: Path) -> None:
    own = level(module_name(path))
    above = {module for module in imports(path) if is_ours(module) and level(module) > own}
    assert not above


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=named)
def test_a_level_knows_only_its_own_packages(path: Path) -> None:
    assert third_party(path) <= PACKAGES[level(module_name(path))]


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {
        module: {other for other in imports(path) if other in MODULES and other != module}
        for module, path in MODULES.items()
    }
    # raises CycleError with the modules of the circle
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_only_the_objective_calls_kernels() -> None:
    importers = {
        named(path)
        for path in python_files("fastkd")
        if any(module.startswith("fastkd_kernels") for module in imports(path))
    }
    assert {path for path in importers if not path.startswith("fastkd/objective/")} == {
        "fastkd/capture/recording.py",
        "fastkd/capture/routing.py",
        "fastkd/capture/attention_traits.py",
        "fastkd/heads.py",
    }
    types = {"AttentionState", "LogitsHead"}
    for name in (
        "capture/recording.py",
        "capture/routing.py",
        "capture/attention_traits.py",
        "heads.py",
    ):
        text = (ROOT / "fastkd" / name).read_text(encoding="utf-8")
        (imported,) = re.findall(r"fastkd_kernels import (.*)", text)
        assert set(imported.split(", ")) <= types


def test_packages_are_where_they_belong() -> None:
    found = {named(path) for path in ROOT.glob("*/**/__init__.py") if ".venv" not in path.parts}
    stray = {path for path in found if not path.startswith(("fastkd/", "kernels/fastkd_kernels/"))}
    assert not stray, "these would shadow packages or change how tests are imported"


def dependencies(*extras: str) -> set[str]:
    """Distributions that pyproject.toml declares, in lower case with hyphens."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in lines}


def undeclared(path: Path, declared: set[str]) -> set[str]:
    return {
        name
        for name in third_party(path)
        if DISTRIBUTIONS.get(name, name.replace("_", "-")) not in declared
    }


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=named)
def test_everything_imported_is_declared(path: Path) -> None:
    assert not undeclared(path, dependencies())


@pytest.mark.parametrize("path", python_files("tests", "benchmarks"), ids=named)
def test_everything_that_tests_import_is_declared(path: Path) -> None:
    assert not undeclared(path, dependencies("demo", "tensorboard", "dev"))


@pytest.mark.parametrize("path", ALL_FILES, ids=named)
def test_no_module_is_named_after_another_package(path: Path) -> None:
    # `torchrun fastkd/train.py` puts fastkd/ first on the path
    taken = {name.replace("-", "_") for name in dependencies("demo", "tensorboard", "dev")}
    assert path.stem not in taken | set(DISTRIBUTIONS) | {"kernels"}


@pytest.mark.parametrize("path", ALL_FILES, ids=named)
def test_no_file_outgrows_its_subject(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LINES
