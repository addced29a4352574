"""YAML that says each thing once and reads as everyone reads it: by the core rules of YAML 1.2.

PyYAML reads by YAML 1.1: `010` is 8, `1:30` is 90, `no` is a switch and `2024-01-31` a date, and it
keeps the last of two equal keys, all without a word. Its scanner and parser are used here; what a
scalar means is decided by the core schema of YAML 1.2 (section 10.3.2), merge keys being the one
thing kept of 1.1. The road not taken is ruamel.yaml, a second parser for the sake of seven regular
expressions.

A file may come from a stranger: its size, its depth and what its aliases add up to are bounded,
keys are text, and no tag makes anything but plain values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from fastkd.errors import is_text, one_line
from fastkd.section import LARGEST

LONGEST = 1 << 20
"""Characters of a document."""
MOST_VALUES = 100_000
"""Values of a document, sections and lists among them, its aliases written out."""
DEEPEST = 50
"""Sections and lists inside each other."""
_TAG = "tag:yaml.org,2002:"
# of scalars, each with the characters that it may start with
_CORE = (
    ("null", "~nN", r"~|null|Null|NULL|"),
    ("bool", "tTfF", r"true|True|TRUE|false|False|FALSE"),
    ("int", "-+0123456789", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    (
        "float",
        "-+.0123456789",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
)
_PATTERNS = {kind: re.compile(pattern) for kind, _, pattern in _CORE}
_MERGE = f"{_TAG}merge"


class YamlError(ValueError):
    """Text that is no YAML, or says a thing twice; the message is one line."""


def read_yaml(text: str) -> Any:
    """What a YAML text says, in plain values; `None` where it says nothing.

    Raises:
        YamlError: with the lines where the text has several.
    """
    if len(text) > LONGEST:
        raise YamlError(f"more than {LONGEST:,} characters, which no such file has")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise YamlError(f"not YAML ({one_line(error)})") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for key, first, second in _repeated(node, "", {}):
            raise YamlError(f"{key} is given twice, {_places(first, second)}; give it once")
        _check_size(node, {})
        return loader.construct_document(node)
    # ValueError: a character that an escape can't make
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML ({one_line(error)})") from error
    finally:
        loader.dispose()


def write_yaml(tree: Any) -> str:
    """Plain values as YAML that `read_yaml` and readers of YAML 1.1 read back as they were.

    Raises:
        YamlError: they are more than `read_yaml` takes.
    """
    text = str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    for found, most, what in (
        (len(text), LONGEST, "characters"),
        (_values(tree), MOST_VALUES, "values"),
    ):
        if found > most:
            raise YamlError(f"{found:,} {what}, expected at most {most:,}")
    return text


def quoted(text: str) -> str:
    """Text as `read_yaml` reads it back wherever a value may stand: in quotes, on one line."""
    return str(yaml.dump(text, Dumper=_Dumper, default_style='"', allow_unicode=True)).rstrip("\n")


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser with the scalars of YAML 1.2."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise YamlError(f"line {self.line + 1}: more than {DEEPEST} sections inside each other")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever YAML 1.1 or 1.2 would take it for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        # PyYAML escapes all of a script or leaves what turns a terminal's writing around
        inner = "".join(
            sign if sign.isprintable() and sign not in '"\\' else self._escaped(sign)
            for sign in text
        )
        self.write_indicator(f'"{inner}"', True)

    def _escaped(self, sign: str) -> str:
        if sign in self.ESCAPE_REPLACEMENTS:
            return f"\\{self.ESCAPE_REPLACEMENTS[sign]}"
        code = ord(sign)
        for letter, digits in (("x", 2), ("u", 4)):
            if code < 16**digits:
                return f"\\{letter}{code:0{digits}X}"
        return f"\\U{code:08X}"


# none of YAML 1.1's; the dumper keeps those beside its own
_Loader.yaml_implicit_resolvers = {}
for _kind, _first, _pattern in _CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _kind,
            re.compile(f"(?:{_pattern})\\Z"),
            [*_first, ""] if _kind == "null" else list(_first),
        )
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<\Z"), ["<"])


def _write_text(dumper: _Dumper, text: str) -> yaml.Node:
    # folded in other styles, such text loses spaces and line ends
    style = None if text.isprintable() and text == text.strip() else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _write_text)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _refusal(node, f"a section or list can't be {_short(node.tag)}")
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind in _PATTERNS and not _PATTERNS[kind].fullmatch(text):
        raise _refusal(
            node, f"{text[:40]!r} is not of the kind {_short(node.tag)} that it is given"
        )
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        return _number(node, kind, text)
    if not is_text(text):
        raise _refusal(node, "half a surrogate pair is no text")
    return text


def _number(node: yaml.Node, kind: str, text: str) -> int | float:
    if kind == "float":
        found = float(re.sub(r"\.(?=[inIN])", "", text))
        if math.isinf(found) and "inf" not in text.lower():
            raise _refusal(node, f"{text[:40]} is more than a number can hold")
        return found
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    # Python refuses to read thousands of digits, with another message
    if len(text.lstrip("+-0ox")) > 64 or abs(int(text, base)) > LARGEST:
        raise _refusal(node, f"{text[:20]}... is a number of {len(text)} digits, expected 64 bits")
    return int(text, base)


def _unknown(loader: _Loader, node: yaml.Node) -> Any:
    raise _refusal(node, f"unknown tag {_short(node.tag)}; leave it out, values here are plain")


for _known in (*_PATTERNS, "str"):
    _Loader.add_constructor(_TAG + _known, _scalar)
for _other in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(_TAG + _other, _unknown)
_Loader.add_constructor(None, _unknown)


def _repeated(
    node: yaml.Node, path: str, seen: dict[int, bool]
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
            yield from _repeated(item, f"{path}.{number}".lstrip("."), seen)
    if isinstance(node, yaml.MappingNode):
        met: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str", _MERGE):
                given = repr(str(key.value)[:40]) if isinstance(key, yaml.ScalarNode) else "a list"
                raise _refusal(key, f"the key {given} is no text; put quotes around it")
            named = f"{path}.{key.value}".lstrip(".")
            if key.value in met:
                yield named, met[key.value], key
            met[key.value] = key
            yield from _repeated(value, named, seen)
    seen[id(node)] = False


def _check_size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and how many are inside each other, its aliases written
    out.

    Raises:
        YamlError: more than a file may have.
    """
    if id(node) in known:
        return known[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [value for _, value in node.value]
    sizes = [_check_size(child, known) for child in inner]
    total = 1 + sum(count for count, _ in sizes)
    depth = 1 + max((depth for _, depth in sizes), default=0)
    if total > MOST_VALUES:
        # those of the file alone are as many as its nodes
        stand = "its aliases stand for " if total > 1 + len(known) else ""
        raise _refusal(node, f"{stand}more than {MOST_VALUES:,} values")
    if depth > DEEPEST:
        more = f"more than {DEEPEST} sections inside each other"
        raise _refusal(node, f"its aliases stand for {more}")
    known[id(node)] = total, depth
    return total, depth


def _values(tree: Any) -> int:
    """How many values plain ones are written as."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    return 1 + sum(map(_values, tree)) if isinstance(tree, list | tuple) else 1


def _refusal(node: yaml.Node, text: str) -> YamlError:
    return YamlError(f"line {node.start_mark.line + 1}: {text}")


def _short(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}"[:60] if tag.startswith(_TAG) else repr(tag)[:60]


def _places(first: yaml.Node, second: yaml.Node) -> str:
    lines = first.start_mark.line + 1, second.start_mark.line + 1
    return f"in line {lines[0]}" if lines[0] == lines[1] else f"in lines {lines[0]} and {lines[1]}"
