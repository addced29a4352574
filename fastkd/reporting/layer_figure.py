"""Which teacher layers each student layer learned from, drawn: two stacks with lines between."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastkd.reporting.html import html_table
from fastkd.reporting.numbers import number
from fastkd.reporting.svg import WIDTH, figure, picture, text, tooltip

_STUDENT, _TEACHER = 70.0, WIDTH - 70.0
_RADIUS, _PITCH, _NARROW_PITCH = 9.0, 24.0, 15.0
_NARROW = 24
# what is compared, in the label of a loss: 2-6, 2-4..6, 2-* where it is drawn anew
_LABEL = re.compile(r"(\d+)-(?:(\d+)(?:\.\.(\d+))?|\*)")
_THICKEST = 4.0


@dataclass(frozen=True)
class Drawn:
    """A student layer, and what one loss compares it with."""

    student: int
    teachers: tuple[int, ...]
    """Empty where they are drawn anew over the run."""


_EMBEDDINGS = Drawn(0, (0,))


def layer_figures(
    labels: Sequence[str], weights: Mapping[str, float], depths: tuple[int, int] | None
) -> list[str]:
    """The mappings of a run as HTML, one figure for all terms that compare the same layers.

    Args:
        labels: of the losses; those that are not of pairs of layers are left out.
        weights: what each loss counted, by label, where it is known.
        depths: blocks of student and teacher; `None`: as deep as is compared.
    """
    terms: dict[str, dict[str, Drawn]] = {}
    for label in labels:
        term, _, pair = label.partition("/")
        if matched := _LABEL.fullmatch(pair):
            terms.setdefault(term, {})[label] = _drawn(matched)
    same: dict[tuple[Drawn, ...], list[str]] = {}
    for term, found in terms.items():
        same.setdefault(tuple(found.values()), []).append(term)
    # two stacks for this one line would say no more
    if len(same) > 1 and (alone := same.pop((_EMBEDDINGS,), None)):
        links, names = next(iter(same.items()))
        same = {(_EMBEDDINGS, *links): [*alone, *names], **dict(list(same.items())[1:])}
    return [
        part
        for links, names in same.items()
        for part in _figures(names, links, terms, weights, depths)
    ]


def _drawn(found: re.Match[str]) -> Drawn:
    student, first, last = found.groups()
    if first is None:
        return Drawn(int(student), ())
    return Drawn(int(student), tuple(range(int(first), int(last or first) + 1)))


def _figures(
    names: Sequence[str],
    links: Sequence[Drawn],
    terms: Mapping[str, Mapping[str, Drawn]],
    weights: Mapping[str, float],
    depths: tuple[int, int] | None,
) -> list[str]:
    """The figure of some terms that compare the same layers, and their weights where one layer
    learns from several."""
    of = {
        name: {link: weights[label] for label, link in terms[name].items() if label in weights}
        for name in names
    }
    student = max(link.student for link in links)
    teacher = max((t for link in links for t in link.teachers), default=student)
    deep = depths or (student, teacher)
    title = ", ".join(names)
    drawn = figure(title, _picture(title, links, of, deep))
    several = len({link.student for link in links}) < len(links)
    tables = [_weights(name, found) for name, found in of.items() if several and found]
    return [drawn, *tables]


def _picture(
    title: str,
    links: Sequence[Drawn],
    weights: Mapping[str, Mapping[Drawn, float]],
    depths: tuple[int, int],
) -> str:
    lowest = min((0, *depths)) if any(link.student == 0 for link in links) else 1
    pitch = _PITCH if max(depths) <= _NARROW else _NARROW_PITCH
    height = (max(depths) - lowest) * pitch + 62

    def up(layer: int, depth: int) -> float:
        # both stacks begin and end at the same heights
        share = (layer - lowest) / max(depth - lowest, 1)
        return height - 40 - share * (height - 62)

    largest = {name: max(found.values()) or 1.0 for name, found in weights.items() if found}
    parts, said = [], []
    for link in links:
        known = {name: found[link] for name, found in weights.items() if link in found}
        told = _told(link, known)
        said.append(told)
        # by what the pair counts among those of its term
        share = max((w / largest[name] for name, w in known.items()), default=1.0)
        thickness = max(1.0, share / max(len(link.teachers), 1) * _THICKEST)
        for teacher in link.teachers:
            parts.append(
                f'<path class="link" d="M{_STUDENT:g} {up(link.student, depths[0]):.1f}'
                f'L{_TEACHER:g} {up(teacher, depths[1]):.1f}" '
                f'stroke-width="{thickness:.2f}">{tooltip(told)}</path>'
            )
    matched = {link.student for link in links}, {t for link in links for t in link.teachers}
    for x, depth, used, side in zip(
        (_STUDENT, _TEACHER), depths, matched, ("student", "teacher"), strict=True
    ):
        outside = (x - 20, "end") if x == _STUDENT else (x + 20, "start")
        for layer in range(lowest, depth + 1):
            kind = "node" if layer in used else "unused"
            at = up(layer, depth)
            parts.append(
                f'<circle class="{kind}" cx="{x:g}" cy="{at:.1f}" '
                f'r="{min(_RADIUS, pitch / 2 - 2):g}">{tooltip(f"{side} layer {layer}")}</circle>'
            )
            parts.append(text(outside[0], at + 4, str(layer) if layer else "emb.", outside[1]))
        parts.append(text(x, height - 6, side, "middle", "strong"))
    return picture(height, parts, f"{title}: {'; '.join(dict.fromkeys(said))}")


def _told(link: Drawn, weights: Mapping[str, float]) -> str:
    first = f"student layer {link.student}"
    if not link.teachers:
        return f"{first} learns from a teacher layer that is drawn anew over the run"
    ends = dict.fromkeys((link.teachers[0], link.teachers[-1]))
    several = "s together" if len(link.teachers) > 1 else ""
    found = f"{first} from teacher layer{several} {' to '.join(map(str, ends))}"
    return found + "".join(f", weight in {n} {number(w)}" for n, w in weights.items())


def _weights(term: str, weights: Mapping[Drawn, float]) -> str:
    """What each pair counts, a row a student layer and a column a teacher layer."""
    columns = sorted({link.teachers[0] for link in weights if link.teachers})
    rows = []
    for student in sorted({link.student for link in weights}):
        of = {link.teachers[0]: w for link, w in weights.items() if link.student == student}
        cells = (f"{of[column]:.3g}" if column in of else "" for column in columns)
        rows.append((f"student {student}", *cells))
    heads = (f"{term}: weights", *(f"{column}" for column in columns))
    return html_table(heads, rows, f"weights of {term} by student and teacher layer")
