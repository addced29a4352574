"""The command line and the Python API, from typer and from docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_args

import fastkd_kernels
import typer
from markup import code, line, page, prose, section, table
from typer.core import TyperGroup

import fastkd
from fastkd.cli import app

FOLDER = "reference/python"
_ABOUT: dict[ModuleType, str] = {
    fastkd: "What `import fastkd` has; its names are loaded when they are first used.",
    fastkd_kernels: "The kernels, a package of their own that needs torch and triton only.",
}


def command_pages() -> Iterator[tuple[str, str]]:
    """The page of the command line: an index, then every command's arguments and options."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup), "fastkd has several commands"
    rows = [(f"[`fastkd {n}`](#fastkd-{n})", line(c.help or "")) for n, c in group.commands.items()]
    about = (
        "Exit codes: 0 finished, 2 something to mend (one line says what), 130 stopped by a "
        "signal, 1 another rank was lost."
    )
    parts = [_command(name, command) for name, command in group.commands.items()]
    yield (
        "reference/commands.md",
        page("Command line", about, table(("command", "what it does"), rows), *parts),
    )


def _command(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"fastkd {name}")
    usage = " ".join([f"fastkd {name}", *command.collect_usage_pieces(context)])
    # of what is hidden there is none
    records = [one.get_help_record(context) for one in command.get_params(context)]
    rows = [(code(shown), said) for shown, said in filter(None, records)]
    said = f"{command.help}\n\n{code(usage)}"
    return section(f"`fastkd {name}`", f"{said}\n\n{table(('argument', 'what it is'), rows)}")


def api_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of the page of each package."""
    parts = []
    for package, about in _ABOUT.items():
        name = package.__name__
        rows = [
            (f"[`{one}`]({name}.md#{name}.{one})", _line(getattr(package, one)))
            for one in _documented(package)
        ]
        parts += [f"## [{name}]({name}.md)", about, table(("name", "what it is"), rows)]
        names = "\n\n".join(f"::: {name}.{one}" for one in _documented(package))
        yield f"{FOLDER}/{name}.md", page(code(name), about, names)
    yield f"{FOLDER}/index.md", page("Python", *parts)


def _documented(package: ModuleType) -> list[str]:
    return [name for name in package.__all__ if not name.startswith("_")]


def _line(value: Any) -> str:
    """What a name is, in a line: of an alias of words these."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return line(prose(value))
    return ", ".join(code(word) for word in get_args(value))
