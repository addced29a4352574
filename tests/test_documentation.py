"""README and documentation: recipes are recipes, commands are commands, links lead somewhere."""

from __future__ import annotations

import copy
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from own_registries import registries_apart
from pages import (
    ROOT,
    Block,
    all_blocks,
    blocks_of,
    broken_links,
    commands_of,
    page_names,
    read_page,
)
from rich.console import Console
from torch.distributed.run import get_args_parser

from fastkd.cli import app
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.recipe import FinetuneRecipe, apply_overrides, parse_any_recipe
from fastkd.recipe.merge import laid_over
from fastkd.reporting.console import Reporter
from fastkd.reporting.report import print_summary
from fastkd.study.spec import parse_study

Tree = dict[str, Any]
TEXT: Tree = {
    "teacher": {"model": "teacher"},
    "student": {"layers": 3},
    "losses": {"hidden": {"weight": 1}},
    "data": {"train": "text.txt", "block_size": 128},
    "train": {"steps": 100, "batch_size": 32},
    "run": {"output": "runs/mine"},
}
TASK: Tree = {
    **{key: value for key, value in TEXT.items() if key != "data"},
    "task": {"name": "MRPC", "source": "glue/MRPC"},
}
# typer may bring a click of its own, so the class is found by what is made of it
(USAGE_ERROR,) = typer.BadParameter.__bases__
# what few blocks may say of themselves: each is one that no test runs
NOT_RUN = 1


def places(blocks: list[Block]) -> list[Any]:
    return [pytest.param(block, id=block.place) for block in blocks]


@pytest.mark.parametrize("name", page_names())
def test_every_block_is_one_that_is_tested(name: str) -> None:
    blocks = blocks_of(name)
    assert len(blocks) == len(re.findall(r"^\s*(?:```|~~~)\S", read_page(name), flags=re.MULTILINE))
    assert {block.language for block in blocks} <= {"yaml", "python", "sh", "text"}
    for block in blocks:
        assert block.notes.keys() <= {"not run", "ranks", "needs", "output"}, block.place


def test_few_blocks_are_not_run() -> None:
    blocks = [block for name in page_names() for block in blocks_of(name)]
    assert sum("not run" in block.notes for block in blocks) <= NOT_RUN


def whole_recipe(section: Tree) -> Tree:
    """A recipe or a part of one, with what it leaves out."""
    if "teacher" in section and "run" in section:
        return section
    base = {**(TASK if "task" in section else TEXT)}
    if section.keys() & {"losses", "preset"}:
        del base["losses"]
    return laid_over(base, section)


def study_parts(page: str) -> list[Tree]:
    trees = [yaml.safe_load(block.text) for block in blocks_of(page) if block.language == "yaml"]
    return [tree for tree in trees if tree.keys() & {"axes", "spaces", "chosen"}]


@pytest.fixture
def own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Block], None]]:
    """Lets the Python files of a block's page be imported, as plugins are, while a test runs."""

    def write(block: Block) -> None:
        for other in blocks_of(block.page):
            if other.title is not None and other.title.endswith(".py"):
                (tmp_path / other.title).write_text(other.text, encoding="utf-8")

    with registries_apart(monkeypatch, tmp_path):
        yield write


@pytest.mark.parametrize("block", places(all_blocks("yaml")))
def test_yaml_is_what_a_file_may_say(block: Block, own_files: Callable[[Block], None]) -> None:
    own_files(block)
    tree = yaml.safe_load(block.text)
    if tree in (studies := study_parts(block.page)):
        # a study that reports has the sections of the first one but for what it borrows
        first = {key: value for key, value in studies[0].items() if key not in ("shared",)}
        parse_study(tree if tree == studies[0] else {**first, **tree})
    else:
        assert parse_any_recipe(whole_recipe(tree))


def test_a_wrong_section_is_no_recipe() -> None:
    with pytest.raises(UserError, match=r"losses\.hidden"):
        parse_any_recipe(whole_recipe({"losses": {"hidden": {"weigth": 1}}}))


def test_readme_and_quick_start_have_the_same_recipe() -> None:
    (short,), long = (
        [yaml.safe_load(b.text) for b in blocks_of(page) if b.language == "yaml"]
        for page in ("README.md", "docs/quick-start.md")
    )
    recipe = parse_any_recipe(long[0])
    assert not isinstance(recipe, FinetuneRecipe)
    assert recipe.losses is not None and recipe.losses.terms["hidden"].weight == 10
    assert laid_over(long[0], short) == long[0]


def file_of(block: Block, path: str) -> Tree:
    """A recipe that a command names: of the repository, of its page, or any."""
    if (ROOT / path).is_file():
        return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert not path.startswith("recipes/"), f"{path} is not there"
    written = [b.text for b in blocks_of(block.page) if b.title == path]
    return yaml.safe_load(written[0]) if written else copy.deepcopy(TEXT)


def check_fastkd(arguments: list[str], block: Block) -> None:
    """See that options exist and are what they may be, and that overrides are fields."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    values = command.make_context(arguments[0], arguments[1:]).params
    overrides = list(values.get("overrides") or [])
    if arguments[0] == "evaluate":
        base = TASK if any(value.startswith("task.") for value in overrides) else TEXT
        tree = copy.deepcopy(base)
    elif values.get("recipe") is not None:
        tree = file_of(block, str(values["recipe"]))
    elif arguments[0] == "study":
        parse_study(file_of(block, str(values["path"])))
        return
    else:
        return
    apply_overrides(tree, overrides)
    parse_any_recipe(tree)


def check_launcher(arguments: list[str], block: Block) -> None:
    """See that torchrun or deepspeed are given fastkd, and fastkd what it takes."""
    if arguments[0] == "--module":
        module, *rest = arguments[1:]
    else:
        given = get_args_parser().parse_args(arguments)
        assert given.module
        module, rest = given.training_script, given.training_script_args
    assert module == "fastkd"
    check_fastkd(rest, block)


def check_python(arguments: list[str], block: Block) -> None:
    """See that a module or script is there and knows the options."""
    if arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if word.startswith("benchmarks")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    if arguments[0] == "-m":
        place, given = ROOT / arguments[1].replace(".", "/"), arguments[2:]
        files = [*place.glob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    else:
        files, given = [ROOT / arguments[0]], arguments[1:]
    assert files and all(path.is_file() for path in files), arguments
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for option in (word for word in given if word.startswith("--")):
        assert f'"{option.split("=")[0]}"' in source, option


def check_make(arguments: list[str], block: Block) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    # `NAME=value` sets a variable of the Makefile
    assert {given for given in arguments if "=" not in given} <= {*targets}


CHECKS: dict[str, Callable[[list[str], Block], None]] = {
    "fastkd": check_fastkd,
    ".venv/bin/fastkd": check_fastkd,
    "torchrun": check_launcher,
    "deepspeed": check_launcher,
    "python": check_python,
    ".venv-peers/bin/python": check_python,
    "make": check_make,
}


def check_command(words: list[str], block: Block) -> None:
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    CHECKS[words[0]](words[1:], block)


@pytest.mark.parametrize("block", places(all_blocks("sh")))
def test_commands_are_commands(block: Block, own_files: Callable[[Block], None]) -> None:
    own_files(block)
    commands = commands_of(block)
    assert commands
    for words in commands:
        check_command(words, block)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("fastkd distill recipe.yaml --resumed", "no such option: --resumed"),
        ("fastkd distill recipe.yaml train.stepz=1", "train.stepz"),
        ("fastkd distil recipe.yaml", "distil"),
        ("torchrun -m fastkd distill recipe.yaml teacher.placement=here", "teacher.placement"),
        ("python -m benchmarks.nothing", "benchmarks.nothing"),
        ("make everything", "everything"),
        ("curl example.org", "curl"),
    ],
)
def test_what_is_no_command_is_found(line: str, refused: str) -> None:
    with pytest.raises((UserError, USAGE_ERROR, KeyError, AssertionError), match=f"(?i){refused}"):
        check_command(shlex.split(line), blocks_of("README.md")[0])


@pytest.mark.parametrize("block", places(all_blocks("text")))
def test_output_is_that_of_a_committed_result(block: Block) -> None:
    reporter, said = Reporter(), io.StringIO()
    reporter.console = Console(file=said, width=120, highlight=False, soft_wrap=True)
    print_summary(json.loads((ROOT / block.notes["output"]).read_text()), reporter)
    shown = [line.rstrip() for line in said.getvalue().splitlines()]
    assert block.text.splitlines() == shown[: len(block.text.splitlines())]


def test_layer_maps_are_those_of_the_table() -> None:
    page = read_page("docs/guide/layers.md")
    rows = re.findall(r"^\| `(\w+|\[.*?\])` \|.*\| ([\d, -]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 5
    for kind, expected in rows:
        targets = make_layer_map(yaml.safe_load(kind), 3, 6).rows()
        assert [t for _, t in targets] == [
            None if t == "-" else int(t) for t in expected.split(", ")
        ]


@pytest.mark.parametrize("name", page_names())
def test_links_lead_somewhere(name: str) -> None:
    assert not broken_links(name, read_page(name))


def test_links_that_lead_nowhere_are_found() -> None:
    text = "[a](reference/losses/hidden.md#fields) [b](reference/losses/hiden.md) [c](index.md#no)"
    assert broken_links("docs/measured.md", text) == ["reference/losses/hiden.md", "index.md#no"]


def test_readme_is_short() -> None:
    assert len(read_page("README.md").splitlines()) <= 200
