"""Imports go one way only, and no file stands where it would shadow or outgrow."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# from the ground up; the longest name that begins a module's decides
LEVELS: tuple[set[str], ...] = (
    {"fastkd_kernels"},
    {
        "errors",
        "extras",
        "head_spec",
        "launcher",
        "limits",
        "types",
        "packed_row",
        "row_form",
        "section",
        "plugins",
        "seeds",
        "signals",
        "own_session",
        "variables",
        "files",
        "layer_map",
        "group_errors",
        "rank_timeout",
        "distributed",
        "rank_errors",
    },
    {"capture", "losses", "recipe", "training.flat_weights"},
    {"reporting", "data.tasks.metrics", "data.batching", "training.deepspeed_config"},
    {
        *("models", "data", "training.memory", "training.local_engine", "training.muon"),
        *("training.sharded", "training.teacher"),
    },
    {"training.engine", "training.finite", "training.checkpoint", "training.optimizer"},
    {
        *("training.run_folder", "training.beginnings", "training.continuation"),
        *("training.environment", "training.metric_lines", "training.metrics_file"),
        "training.started_paths",
    },
    {"training.export"},
    {
        "training",
        "reporting.report",
        "reporting.curves",
        "reporting.side_by_side",
        "layer_similarity",
    },
    {"study", "api", "batch_check", "distiller", "publishing", "starter"},
    {"integrations"},
    {"cli", "__main__"},
)
# what a level may import besides the standard library
PACKAGES: tuple[set[str], ...] = (
    {"torch", "triton"},
    {"torch", "numpy", "pydantic", "scipy", "psutil", "safetensors"},
    {"torch", "numpy", "pydantic", "yaml", "transformers"},
    {"rich", "matplotlib", "numpy", "sklearn", "scipy"},
    {
        "torch",
        "numpy",
        "transformers",
        "huggingface_hub",
        "datasets",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "rich",
        "sklearn",
        "mteb",
    },
    {"torch", "transformers", "safetensors", "deepspeed"},
    {"torch"},
    {"torch", "transformers", "safetensors", "deepspeed"},
    {
        "torch",
        "numpy",
        "transformers",
        "huggingface_hub",
        "yaml",
        "psutil",
        "matplotlib",
        "mteb",
        "trackio",
    },
    {
        *("torch", "numpy", "pydantic", "scipy", "matplotlib", "optuna", "rich", "transformers"),
        *("huggingface_hub", "onnxruntime", "psutil"),
    },
    {"torch", "transformers", "safetensors"},
    {"typer"},
)
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "ot": "pot", "cpuinfo": "py-cpuinfo"}
EXTRAS = (
    *("demo", "docs", "mteb", "onnx", "peers", "study", "tasks", "tensorboard", "trackio"),
    *("trainer", "dev"),
)
LINES = 600


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE_FILES = python_files("fastkd", "kernels")
ALL_FILES = python_files("fastkd", "kernels", "tests", "benchmarks", "docs", "tools")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    """`fastkd.data.text.cache` of a file; a package's `__init__` is the package."""
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
    name = module if module.startswith("fastkd_kernels") else module.removeprefix("fastkd")
    name = name.removeprefix(".")
    while name:
        found = [number for number, units in enumerate(LEVELS) if name in units]
        if found:
            return found[0]
        name = name.rpartition(".")[0]
    assert module == "fastkd", f"{module} has no level yet: give it one in {named(Path(__file__))}"
    return 0


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("fastkd", "fastkd_kernels")


def third_party(path: Path) -> set[str]:
    """The packages from elsewhere that a file imports."""
    local = {file.stem for file in path.parent.glob("*.py")}
    if not path.is_relative_to(ROOT / "fastkd") and not path.is_relative_to(ROOT / "kernels"):
        # benchmarks and the soak share the helpers of the tests, which try the soak and the pages
        local |= {file.stem for file in python_files("tests", "docs")}
    ours = {"fastkd", "fastkd_kernels", "benchmarks", "tools"}
    names = {module.split(".")[0] for module in imports(path)}
    return names - set(sys.stdlib_module_names) - local - ours


def test_a_module_imports_from_its_own_level_or_below() -> None:
    above = {
        module_name(path): found
        for path in PACKAGE_FILES
        # the package names what others hold, and loads none of it (`test_api.py`)
        if module_name(path) != "fastkd"
        and (
            found := {
                module
                for module in imports(path)
                if is_ours(module) and level(module) > level(module_name(path))
            }
        )
    }
    assert not above


def test_a_level_knows_only_its_own_packages() -> None:
    foreign = {
        module_name(path): found
        for path in PACKAGE_FILES
        if (found := third_party(path) - PACKAGES[level(module_name(path))])
    }
    assert not foreign


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {
        module: {other for other in imports(path) if other in MODULES and other != module}
        for module, path in MODULES.items()
    }
    # raises CycleError with the modules of the circle
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_only_losses_call_kernels() -> None:
    importers = {
        named(path).removeprefix("fastkd/"): path
        for path in python_files("fastkd")
        if any(module.startswith("fastkd_kernels") for module in imports(path))
    }
    others = {name for name in importers if not name.startswith("losses/")}
    names = ("states", "routing", "recompute", "attention_traits", "lm_head")
    types = {f"capture/{name}.py" for name in names}
    assert others == {*types, "layer_similarity/attention.py"}
    for name in types:
        (imported,) = re.findall(r"fastkd_kernels import (.*)", importers[name].read_text("utf-8"))
        assert set(imported.split(", ")) <= {"AttentionState", "LogitsHead"}


def test_packages_are_where_they_belong() -> None:
    found = {named(path) for path in ROOT.glob("[!.]*/**/__init__.py")}
    stray = {path for path in found if not path.startswith(("fastkd/", "kernels/fastkd_kernels/"))}
    assert not stray, "these would shadow packages or change how tests are imported"


def dependencies(*extras: str, of: Path = ROOT) -> set[str]:
    """Distributions that a folder's pyproject.toml declares, in lower case with hyphens."""
    project = tomllib.loads((of / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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


def test_everything_imported_is_declared() -> None:
    kernels = dependencies(of=ROOT / "kernels")
    declared = {
        "fastkd": dependencies("mteb", "onnx", "study", "tasks", "trackio"),
        "kernels": kernels,
        **dict.fromkeys(("tests", "benchmarks", "docs"), dependencies(*EXTRAS) | kernels),
    }
    found = {
        named(path): undeclared(path, names)
        for folder, names in declared.items()
        for path in python_files(folder)
    }
    assert not {name: names for name, names in found.items() if names}


def test_no_module_is_named_after_another_package() -> None:
    # `torchrun fastkd/cli.py` puts fastkd/ first on the path
    taken = {name.replace("-", "_") for name in dependencies(*EXTRAS)} - {"fastkd_kernels"}
    taken |= {"kernels", "triton", *DISTRIBUTIONS}
    assert not {named(path) for path in ALL_FILES if path.stem in taken}


def test_no_file_outgrows_its_subject() -> None:
    assert not {
        named(path)
        for path in ALL_FILES
        if len(path.read_text(encoding="utf-8").splitlines()) >= LINES
    }
