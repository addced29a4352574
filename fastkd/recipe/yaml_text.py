"""YAML that says each thing once, in numbers that everyone reads alike.

PyYAML's safe loader keeps the last of two equal keys and reads `010` as 8 and `1:30` as 90, all
without a word. Here they are refused; merge keys and anchors work as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import yaml

from fastkd.errors import one_line


class YamlError(ValueError):
    """Text that is no YAML, or says a thing twice; the message is one line."""


def read_yaml(text: str) -> Any:
    """What a YAML text says, in plain values; `None` where it says nothing.

    Raises:
        YamlError: with the lines where the text has several.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for key, first, second in _repeated(loader, node, "", {}):
            raise YamlError(f"{key} is given twice, {_places(first, second)}; give it once")
        return loader.construct_document(node)
    # ValueError: a date or a number that only looks like one
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML ({one_line(error, None)})") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """The safe loader, without numbers that only YAML 1.1 reads so."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(node.value)
    digits = text.lstrip("+-")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567_"
    whole = node.tag.endswith(":int")
    read = loader.construct_yaml_int if whole else loader.construct_yaml_float
    found: int | float = read(node)
    if ":" in text or (whole and octal):
        raise YamlError(
            f"line {node.start_mark.line + 1}: {text} would be read as {found}; write the number "
            "in decimal digits, or put quotes around what is none"
        )
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _repeated(
    loader: _Loader, node: yaml.Node, path: str, seen: dict[int, bool]
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Keys that stand twice in one mapping, by dotted name, with both nodes."""
    # an anchor is looked at where it stands; whether it is open still
    if id(node) in seen:
        if seen[id(node)]:
            raise YamlError(f"{path} holds itself, by an anchor; write it out")
        return
    seen[id(node)] = True
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _repeated(loader, item, f"{path}.{number}".lstrip("."), seen)
    if isinstance(node, yaml.MappingNode):
        met: dict[Hashable, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            named = f"{path}.{key.value}".lstrip(".")
            merges = key.tag == "tag:yaml.org,2002:merge"
            known = "<<" if merges else loader.construct_object(key)
            if known in met:
                yield named, met[known], key
            met[known] = key
            yield from _repeated(loader, value, named, seen)
    seen[id(node)] = False


def _places(first: yaml.Node, second: yaml.Node) -> str:
    lines = first.start_mark.line + 1, second.start_mark.line + 1
    return f"in line {lines[0]}" if lines[0] == lines[1] else f"in lines {lines[0]} and {lines[1]}"
