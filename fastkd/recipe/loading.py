"""Read a recipe from YAML, and say in one line what is wrong with it.

Dotted overrides (`train.steps=1000`) are applied to the YAML before validation: the command line
can say nothing that a file could not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from fastkd.errors import UserError, one_line
from fastkd.layer_map.sections import MAP_SECTIONS
from fastkd.plugins import load_plugins
from fastkd.recipe.fields import place_of
from fastkd.recipe.finetune import FinetuneRecipe
from fastkd.recipe.losses import Losses
from fastkd.recipe.presets import expand
from fastkd.recipe.recipe import Recipe
from fastkd.recipe.stages import stage_trees
from fastkd.recipe.yaml_text import LONGEST, YamlError, read_yaml, write_yaml
from fastkd.section import did_you_mean, short

AnyRecipe = Recipe | FinetuneRecipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of a distillation and apply overrides.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is not what a recipe takes.
    """
    return parse_recipe(_overridden(path, overrides), str(path))


def load_finetune_recipe(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Read a recipe of a fine-tuning run, as `load_recipe` reads one of a distillation."""
    return parse_finetune_recipe(_overridden(path, overrides), str(path))


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe of either kind: one of a fine-tuning run has a `model`.

    Raises:
        UserError: as `load_recipe`.
    """
    return parse_any_recipe(_overridden(path, overrides), str(path))


def _overridden(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = read_tree(path)
    apply_overrides(tree, overrides)
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Replace values of a mapping of sections, in place.

    Args:
        tree: as a file holds it.
        overrides: `dotted.key=value` strings; the value is read as YAML.

    Raises:
        UserError: an override that is none, or takes back what another said.
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, text = _parted(override)
        _check_new(given, key, text)
        given[key] = text
        _apply(tree, key, text)


def read_tree(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """Read a YAML file of sections; `what` is what the user thinks it is.

    Raises:
        UserError: the file is missing, not YAML, says a thing twice, or is not a mapping.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            # one more than is taken: a device has no end
            tree = read_yaml(file.read(LONGEST + 1))
    except YamlError as error:
        raise UserError(f"{path}: {error}") from error
    # ValueError: no UTF-8, or a NUL in the path
    except (OSError, ValueError) as error:
        said = f"not a readable {what} ({one_line(error)}); give a YAML file"
        raise UserError(f"{str(path)[:300]}: {said}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def parse_recipe(tree: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; `name` stands before every complaint.

    Raises:
        UserError: with the field, what was given and what was expected.
    """
    try:
        _check_kind(tree, "distill")
        load_plugins(tree.get("plugins"))
        recipe = Recipe.model_validate(expand(tree))
        stage_recipes(recipe)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except ValidationError as error:
        raise UserError(f"{name}: {complain(error, Recipe)}") from error
    return recipe


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage, in order; none of a recipe without stages.

    Raises:
        UserError: naming the stage, its field, what was given and what was expected.
    """
    found = []
    for number, tree in enumerate(stage_trees(recipe.model_dump(mode="json")), start=1):
        try:
            found.append(Recipe.model_validate(tree))
        except ValidationError as error:
            raise UserError(f"stages.{number}: {complain(error, Recipe)}") from error
    return found


def sequence_limit(recipe: AnyRecipe) -> int:
    """Tokens that a sequence of a recipe's data is cut at."""
    if isinstance(recipe, Recipe) and recipe.data is not None:
        return recipe.data.block_size
    assert recipe.task is not None, "a recipe has data or a task"
    return recipe.task.max_length


def each_stage(recipe: AnyRecipe) -> list[AnyRecipe]:
    """The recipe of each stage, in order; the recipe itself where it has none.

    Raises:
        UserError: as `stage_recipes`.
    """
    stages: list[AnyRecipe] = list(stage_recipes(recipe)) if isinstance(recipe, Recipe) else []
    return stages or [recipe]


def parse_finetune_recipe(tree: Mapping[str, Any], name: str = "recipe") -> FinetuneRecipe:
    """Validate a mapping as a recipe of a fine-tuning run, as `parse_recipe` does one of a
    distillation."""
    try:
        _check_kind(tree, "finetune")
        load_plugins(tree.get("plugins"))
        return FinetuneRecipe.model_validate(tree)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except ValidationError as error:
        raise UserError(f"{name}: {complain(error, FinetuneRecipe)}") from error


def parse_any_recipe(tree: Mapping[str, Any], name: str = "recipe") -> AnyRecipe:
    """Validate a mapping as a recipe of either kind, as `parse_recipe` does one of a
    distillation."""
    return parse_finetune_recipe(tree, name) if "model" in tree else parse_recipe(tree, name)


def _check_kind(tree: Mapping[str, Any], command: str) -> None:
    """Refuse the file of another command, of which no field would fit."""
    others = {
        "study": "recipe" in tree and ("axes" in tree or "spaces" in tree),
        "finetune": "model" in tree and not {"teacher", "student", "preset"} & tree.keys(),
        "distill": {"teacher", "student"} <= tree.keys() and "model" not in tree,
    }
    for other, found in others.items():
        if found and other != command:
            raise UserError(f"this is a file of fastkd {other}, not of fastkd {command}")


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every default written out.

    Raises:
        UserError: it is longer so than a recipe that can be read.
    """
    try:
        return write_yaml(recipe.model_dump(mode="json"))
    except YamlError as error:
        raise UserError(
            f"the recipe has, with every default written out, {error}; give shorter lists or names"
        ) from error


def _parted(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value, as in train.steps=1000")
    return key, text


def _check_new(given: Mapping[str, str], key: str, text: str) -> None:
    """Refuse an override that takes back what an earlier one said."""
    for before, said in given.items():
        if (before == key and said != text) or before.startswith(key + "."):
            raise UserError(
                f"override {key}={text} would undo {before}={said}, which is given too; give one "
                "of them"
            )


def _apply(tree: dict[str, Any], key: str, text: str) -> None:
    override = f"{key}={text}"
    try:
        value = read_yaml(text)
    except YamlError as error:
        raise UserError(f"override {override!r}: {error}") from error
    if _ends_in_comment(text, value):
        raise UserError(
            f"override {override!r}: YAML takes what follows # for a comment; put quotes around "
            f"the value, as in \"{key}='...'\""
        )
    replace_value(tree, key, value)


def _ends_in_comment(line: str, value: object) -> bool:
    """Whether a line means the same without what follows a #."""
    for found in re.finditer(r"(^|[ \t])#", "" if "\n" in line else line):
        # inside of quotes the rest is no YAML
        with suppress(YamlError):
            if read_yaml(line[: found.start()]) == value:
                return True
    return False


def replace_value(tree: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key, in place; sections on the way are made where there are none.

    Raises:
        UserError: a part of the key that is no section.
    """
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        if not isinstance(node, dict):
            break
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
    if not isinstance(node, dict):
        raise UserError(f"override {key!r}: {'.'.join(parents)} is not a section")
    before = node.get(leaf)
    if value is None and parents == ["losses"] and isinstance(before, dict) and "loss" in before:
        # under a name of its own: without what names its loss, null would say nothing
        del node[leaf]
    else:
        node[leaf] = value


def complain(error: ValidationError, root: type[BaseModel]) -> str:
    """What was given and what was expected, in one line, for a file that is read into `root`."""
    first, *rest = error.errors(include_url=False)
    field = _field(first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = list(_section(root, first["loc"][:-1]).model_fields)
        leaf = str(first["loc"][-1])
        hint = place_of(leaf, root) or did_you_mean(leaf, allowed)
        text = f"{field}: unknown key; {hint}expected one of {', '.join(allowed)}"
    elif first["type"] == "missing":
        text = f"{field}: missing; it has no default, so give a value"
    elif first["type"] == "model_type":
        section = _section(root, first["loc"])
        known = Losses.keys_of_a_file() if section is Losses else section.model_fields
        keys = ", ".join(known)
        text = f"{field}: expected a section with keys {keys} (given {short(first['input'])})"
    else:
        where = f"{field}: " if field else ""
        # what is a tuple here is a list in a file
        message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        given = "" if first["type"] == "value_error" else f" (given {short(first['input'])})"
        if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
            message += "; put quotes around a word that YAML reads otherwise, such as 'true' or '1'"
        text = f"{where}{message[:1].lower()}{message[1:]}{given}"
    return text + (f" (and {len(rest)} more)" if rest else "")


def _section(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    from fastkd.losses.registry import loss_class

    model, parts = root, iter(location)
    for part in parts:
        if part == "layer_map":
            model = MAP_SECTIONS[str(next(parts))]
        elif model is Losses and part == "terms":
            # the key under which the section stands, then the loss that it was read as
            next(parts)
            model = loss_class(str(next(parts))).Config
        else:
            annotation = model.model_fields[str(part)].annotation
            candidates = getattr(annotation, "__args__", (annotation,))
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
            if get_origin(annotation) in (dict, tuple):
                # the key or the place under which the section stands
                next(parts, None)
    return model


def _field(location: Sequence[int | str]) -> str:
    """Where a file has what pydantic found at a place of the models."""
    parts = list(location)
    start = 1 if parts[:1] == ["losses"] else 0
    if parts[start : start + 1] == ["terms"]:
        # the losses stand beside the other keys, and each is read as the section of its loss
        parts[start : start + 3] = parts[start + 1 : start + 2]
    # a layer map is read as one of several forms
    named = [p for i, p in enumerate(parts) if i == 0 or parts[i - 1] != "layer_map"]
    return ".".join(map(str, named))
