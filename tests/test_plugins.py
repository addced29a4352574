"""Losses and layer maps from files outside of the package, named in a recipe."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_recipe import refusal, tree
from tiny_runs import make_recipe, read_losses, run_command, run_variants

from fastkd import plugins
from fastkd.cli import main
from fastkd.errors import Interrupted, LostRank, UserError
from fastkd.layer_map import make_layer_map
from fastkd.recipe import load_any_recipe, parse_any_recipe, parse_recipe

pytestmark = pytest.mark.usefixtures("own_registries")

LOSS = '''
from dataclasses import dataclass
from typing import ClassVar

from fastkd.layer_map import LayerMap, Link, MapConfig, register_layer_map
from fastkd.layer_map.sections import Layers
from fastkd.losses import Captures, Loss, LossConfig, register_loss


@register_loss("norms")
class NormsLoss(Loss):
    """Squared difference of the lengths of states."""

    class Config(LossConfig):
        power: float = 1.0
        layer_map: Layers | None = None

    captures = Captures(hidden=True)
    mean_over = "tokens"

    def forward(self, student, teacher, batch):
        values = []
        for link in self.links:
            lengths = (
                states.hidden[layer].float().norm(dim=-1)
                for states, layer in ((student, link.student), (teacher, link.teachers[0]))
            )
            own, target = (length**self.config.power for length in lengths)
            values.append((own - target).square().mean())
        return self.stack(values)

    @staticmethod
    def stack(values):
        import torch

        return torch.stack(values)


@register_layer_map("crossed")
@dataclass(frozen=True)
class CrossedMap(LayerMap):
    """The first layers from the last."""

    shift: int = 0

    class Config(MapConfig):
        shift: int = 0

    def links(self, moment):
        last = self.teacher_layers - self.shift
        return tuple(Link(s, (last + 1 - s,)) for s in range(1, self.student_layers + 1))
'''


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


def test_a_plugin_is_loaded_before_the_recipe_is_read(tmp_path: Path) -> None:
    given = tree(
        plugins=[write(tmp_path, "norms_plugin", LOSS)],
        losses={"norms": {"power": 2}, "second": {"loss": "norms"}},
        layer_map={"kind": "crossed", "shift": 1},
    )
    recipe = parse_recipe(given)
    assert list(recipe.losses.terms) == ["hidden", "norms", "second"]
    dumped = recipe.model_dump(mode="json")
    assert dumped["plugins"] == ["norms_plugin"]
    assert dumped["layer_map"] == {"kind": "crossed", "shift": 1}
    assert parse_any_recipe(dumped) == recipe
    assert make_layer_map(recipe.layer_map, 2, 4).pairs == ((1, 3), (2, 2))
    assert refusal({**given, "layer_map": {"kind": "crossed", "shft": 1}}).startswith(
        "layer_map.shft: unknown key; did you mean 'shift'?"
    )
    assert parse_recipe({**given, "layer_map": "crossed", "plugins": "norms_plugin"})


BROKEN = {
    "syntax": ("def :", "plugins: broken fails when it is imported (SyntaxError: "),
    "name": ("x = y", "plugins: broken fails when it is imported (NameError: name 'y' is not"),
    "an end": (
        "raise SystemExit(3)",
        "plugins: broken fails when it is imported (SystemExit: 3)",
    ),
    "a class of its own": (
        "class Unlicensed(Exception): pass\nraise Unlicensed('no licence')",
        "plugins: broken fails when it is imported (Unlicensed: no licence)",
    ),
    "a file": (
        "import sqlite3; sqlite3.connect('file:/nowhere/x?mode=ro', uri=True)",
        "plugins: broken fails when it is imported (OperationalError: unable to open database",
    ),
    "missing": (
        "import no_such_module_at_all",
        "plugins: broken fails when it is imported (ModuleNotFoundError: No module named 'no_su",
    ),
    "taken": (
        LOSS.replace('"norms"', '"hidden"'),
        "plugins: broken: a loss hidden is registered already (fastkd.losses.hidden.HiddenLoss)",
    ),
    "map taken": (
        LOSS.replace('"crossed"', '"uniform"'),
        "plugins: broken: a layer map can't be called 'uniform', which is taken",
    ),
    "no loss": (
        LOSS.replace("(Loss)", ""),
        "plugins: broken: the loss norms is <class 'broken.NormsLoss'>; give a subclass",
    ),
    "no option": (
        LOSS.replace("power: float", "power: Nowhere").replace(
            "from dataclasses", "from __future__ import annotations\nfrom dataclasses", 1
        ),
        "plugins: broken: broken.NormsLoss.Config: Nowhere is not known when Python runs; import",
    ),
    "no mean": (
        LOSS.replace('"tokens"', '"token"'),
        "plugins: broken: broken.NormsLoss.mean_over is 'token'; did you mean 'tokens'? expected",
    ),
    "no group": (
        LOSS.replace('mean_over = "tokens"', 'group = "tokens"'),
        "plugins: broken: broken.NormsLoss.group is 'tokens'; give a subclass of LossGroup",
    ),
    "no forward": (
        LOSS.replace("def forward", "def backward"),
        "plugins: broken: broken.NormsLoss has no forward; give it one",
    ),
    "a key of the section": (
        LOSS.replace('"norms"', '"balance"'),
        "plugins: broken: losses.balance is no loss; give broken.NormsLoss another name",
    ),
    "no section": (
        LOSS.replace("Config(LossConfig)", "Config"),
        "plugins: broken: broken.NormsLoss.Config is no subclass of LossConfig",
    ),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_plugin_that_fails_says_which_and_why(tmp_path: Path, text: str) -> None:
    write(tmp_path, "broken", BROKEN[text][0])
    for _ in range(2):
        assert refusal(tree(plugins=["broken"])).startswith(BROKEN[text][1])


def test_a_plugin_that_was_edited_since_its_import_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "edited_plugin"
    package.mkdir()
    write(package, "__init__", "from edited_plugin import losses")
    write(package, "losses", LOSS)
    given = tree(plugins=["edited_plugin"], losses={"norms": {}})
    parse_recipe(given)
    (package / "losses.py").touch()
    parse_recipe(given)
    for text in (LOSS.replace("square()", "abs()"), None):
        (package / "losses.py").unlink()
        if text is not None:
            write(package, "losses", text)
        assert refusal(given) == (
            f"plugins: edited_plugin: {package / 'losses.py'} was changed after this process had "
            "imported it, and its old code would run; start the process (of a notebook, its "
            "kernel) again"
        )
    write(package, "losses", LOSS.replace("square()", "abs()"))
    importlib.reload(sys.modules["edited_plugin.losses"])
    parse_recipe(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["nowhere_to_be_found"], "plugins: nowhere_to_be_found can't be imported, as there is no"),
        (["json.nowhere"], "plugins: json.nowhere can't be imported, as there is no module json.n"),
        (
            ["my_losses.py", "a b"],
            "plugins: my_losses.py can't be imported, as there is no module my_losses; name the "
            "module, my_losses, not its file",
        ),
        (["a b"], "plugins.0: expected the name of a module, as in `import my_losses` (given 'a b"),
        ([""], "plugins.0: string should have at least 1 character"),
        ([3], "plugins.0: input should be a valid string"),
        ({"a": 1}, "plugins: input should be a list"),
    ],
)
def test_what_names_no_module_is_refused(given: Any, expected: str) -> None:
    assert refusal(tree(plugins=given)).startswith(expected)


class Entry:
    """An entry point of an installed package."""

    name, value, dist = "losses", "their_losses", None

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.loaded = error, 0

    def load(self) -> None:
        self.loaded += 1
        if self.error is not None:
            raise self.error
        importlib.import_module(self.value)


def test_installed_packages_bring_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(group: str) -> list[Entry]:
        asked.append(group)
        return [entry]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    plugins._load_installed.cache_clear()
    entry = Entry()
    write(tmp_path, entry.value, LOSS)
    plugins.load_plugins()
    plugins.load_plugins()
    assert (asked, entry.loaded) == (["fastkd.plugins"], 1)
    write(tmp_path, entry.value, LOSS.replace("square()", "abs()"))
    with pytest.raises(UserError, match=r"^plugin losses \(their_losses\) of a package: .* was c"):
        plugins.load_plugins()
    plugins._load_installed.cache_clear()
    entry = Entry(ImportError("no"))
    with pytest.raises(UserError, match=r"^plugin losses \(their_losses\) of a package fails"):
        plugins.load_plugins()
    plugins._load_installed.cache_clear()


def test_fields_lists_what_installed_packages_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Entry()
    write(tmp_path, entry.value, LOSS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(sys, "argv", ["fastkd", "fields", "losses.norms"])
    plugins._load_installed.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main()
    plugins._load_installed.cache_clear()
    said = capsys.readouterr().out
    assert not ended.value.code and "losses.norms.power: a number; default 1.0\n" in said


def test_a_loss_from_outside_trains_resumes_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "norms_plugin", LOSS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    path = make_recipe(tmp_path, losses={"attention": None, "norms": {"power": 0.5}})
    whole = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**whole, "plugins": ["norms_plugin"], "layer_map": "crossed"}))
    options = ["train.schedule=constant", "train.checkpoint_every=1"]
    longer = [["train.steps=3", *options], ["train.steps=4", *options]]
    run_variants(path, longer)
    losses = read_losses(tmp_path / "run")
    assert len(losses) == 4
    assert {"norms/1-4", "norms/2-3"} <= losses[0].keys()
    assert losses[0]["norms/1-4"] > 0
    done = run_command("evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    assert "norms/1-4" in json.loads((tmp_path / "found.json").read_text())["losses"]
    (tmp_path / "norms_plugin.py").unlink()
    with pytest.raises(UserError, match="plugins: norms_plugin can't be imported, as"):
        load_any_recipe(tmp_path / "run" / "recipe.yaml")


RETURN = "return self.stack(values)"
BEGIN = "def __init__(self, *given):\n        super().__init__(*given)\n        "
LATER = """def at(self, moment, done=0.0):
        {}[moment.step] if moment.step else super().at(moment, done)"""
WRONG = {
    "another shape": (
        LOSS.replace(RETURN, f"{RETURN}[:1]"),
        "losses.norms: NormsLoss.forward gives a tensor of shape [1]; expected a tensor of shape "
        "[2], one value for each of its labels",
    ),
    "no mean over examples": (
        LOSS.replace("layer_map: Layers | None = None", "")
        .replace(RETURN, "return student.hidden[0].square().mean((1, 2))")
        .replace('mean_over = "tokens"', ""),
        "losses.norms: NormsLoss.forward gives a tensor of shape [2]; expected a tensor of shape "
        "[] or [1], one value for each of its labels",
    ),
    "a wrong name": (
        LOSS.replace(RETURN, "return values.stack()"),
        "losses.norms: wrong_plugin.NormsLoss fails (AttributeError: 'list' object has no "
        "attribute 'stack', line 30 of {folder}/wrong_plugin.py)",
    ),
    "a wrong word": (
        LOSS.replace(RETURN, "return self.stack(valeus)"),
        "losses.norms: wrong_plugin.NormsLoss fails (NameError: name 'valeus' is not defined, line "
        "30 of {folder}/wrong_plugin.py)",
    ),
    "no file": (
        LOSS.replace('mean_over = "tokens"', f"{BEGIN}open('/nowhere/weights.json')"),
        "losses.norms: wrong_plugin.NormsLoss fails (FileNotFoundError: [Errno 2] No such file or "
        "directory: '/nowhere/weights.json', line 21 of {folder}/wrong_plugin.py)",
    ),
    "a later moment": (
        LOSS.replace('mean_over = "tokens"', LATER),
        "losses.norms: wrong_plugin.NormsLoss fails (KeyError: 1, line 20 of "
        "{folder}/wrong_plugin.py)",
    ),
    "a refusal": (
        LOSS.replace(RETURN, "raise ValueError('too short')"),
        "losses.norms: wrong_plugin.NormsLoss fails (ValueError: too short, line 30 of "
        "{folder}/wrong_plugin.py)",
    ),
    "no beginning": (
        LOSS.replace('mean_over = "tokens"', f"{BEGIN}self.half = 1 / 0"),
        "losses.norms: wrong_plugin.NormsLoss fails (ZeroDivisionError: division by zero, line 21 "
        "of {folder}/wrong_plugin.py)",
    ),
    "no such parameter": (
        LOSS.replace('mean_over = "tokens"', "parameter_rates = lambda self: {'scal': 0.5}"),
        "losses.norms: NormsLoss.parameter_rates names scal, which is none of its parameters "
        "(none)",
    ),
    "a number for a parameter": (
        LOSS.replace(
            'mean_over = "tokens"',
            f"{BEGIN}import torch; self.scale = torch.nn.Parameter(torch.ones(()))",
        ),
        "objective.terms.1.scale: a parameter without dimensions; give it the shape [1]",
    ),
    "no gradient": (
        LOSS.replace(RETURN, f"{RETURN}.detach()"),
        "losses.norms: what NormsLoss gives has no gradient; compute it from states of the student "
        "that train (under gradient checkpointing with use_reentrant=False), or leave it out",
    ),
    "no such module": (
        LOSS.replace("hidden=True", "hidden=True, modules=('nowhere', 'nowhere')"),
        "losses.norms: BertModel has no module 'nowhere'; did you mean embeddings or "
        "embeddings.word_embeddings or embeddings.position_embeddings?",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_fails_is_one_line_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    text, expected = WRONG[name]
    write(tmp_path, "wrong_plugin", text)
    path = make_recipe(tmp_path, losses={"norms": {}, "attention": None})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "plugins": "wrong_plugin"}))
    monkeypatch.setattr(sys, "argv", ["fastkd", "distill", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"fastkd: {expected.format(folder=tmp_path)}"
    # only a step has gradients, and a moment
    assert (tmp_path / "run").exists() == (name in ("no gradient", "a later moment"))


SETTING = """
    @classmethod
    def check_setting(cls, name, config, setting):
        raise {}

    def forward"""
SECTION = """power: float = 1.0

        @field_validator("power")
        @classmethod
        def check(cls, given):
            raise {}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            LOSS.replace("    def forward", SETTING.format("OSError('no lexicon')")),
            "losses.norms: own_plugin.NormsLoss fails (OSError: no lexicon, line 24 of {file})",
        ),
        # what it is asked to raise
        (
            LOSS.replace("    def forward", SETTING.format("ValueError('losses.norms: no head')")),
            "losses.norms: no head",
        ),
        (
            "from pydantic import field_validator\n"
            + LOSS.replace("power: float = 1.0", SECTION.format("KeyError(given)")),
            "losses.norms: norms: own_plugin.NormsLoss.Config fails (KeyError: 2.0, line 21 of ",
        ),
        (
            "from pydantic import field_validator\n"
            + LOSS.replace("power: float = 1.0", SECTION.format("ValueError('no power')")),
            "losses.norms.power: no power",
        ),
    ],
)
def test_what_a_loss_says_of_a_recipe_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path, "own_plugin", text)
    said = refusal(tree(plugins=["own_plugin"], losses={"norms": {"power": 2}}))
    assert said.startswith(expected.format(file=tmp_path / "own_plugin.py"))


class Unlicensed(Exception):
    """A class that no list of ours has."""


def fails(error: BaseException, **more: Any) -> str:
    """What becomes of an error that a function of this file raises."""
    expected = type(error) if more.get("passes") else UserError
    kind, agreed = more.get("by", fails), more.get("agreed")
    with pytest.raises(expected) as found, plugins.plugin_errors("losses.x", kind, agreed=agreed):
        raise error
    assert (found.value is error) == bool(more.get("passes"))
    return str(found.value)


def test_whatever_a_plugin_raises_is_one_line() -> None:
    place = f"losses.x: {__name__}.fails fails ("
    for error in (Unlicensed("no"), NameError("no"), OSError("no"), StopIteration("no")):
        said = fails(error)
        assert said.startswith(f"{place}{type(error).__name__}: no, line ")
        assert said.endswith(f" of {__file__})")


def test_what_says_nothing_of_a_plugin_passes() -> None:
    import torch

    for error in (
        *(UserError("no"), Interrupted("stop"), LostRank("gone"), MemoryError(), KeyError("own")),
        *(torch.OutOfMemoryError("full"), torch.AcceleratorError("broken"), KeyboardInterrupt()),
        torch.distributed.DistBackendError("gone"),
    ):
        own = isinstance(error, KeyError)
        fails(error, passes=True, by=parse_recipe if own else fails)
    fails(KeyError("known"), passes=True, agreed=LookupError)
