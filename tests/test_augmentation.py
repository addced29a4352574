"""Augmentation is TinyBERT's: words in place, by the model or the list, the same every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tasks import (
    EXAMPLES,
    SENTENCES,
    SYNONYMS,
    augmented,
    masked_model,
    texts_of,
    word_tokenizer,
    write_lines,
)

from fastkd.data.augmentation import (
    Augmentation,
    augment,
    candidates,
)
from fastkd.data.augmentation.augment import Augmented
from fastkd.data.augmentation.masked_lm import MaskedWords
from fastkd.data.tasks import Examples, encode_examples
from fastkd.errors import UserError

PAIRS = Examples(
    "p",
    [("the dog runs", "the dog jumps"), ("a red house", "not a house")],
    np.asarray([0.5, 4.0], dtype=np.float32),
)


@pytest.fixture
def masked() -> MaskedWords:
    return MaskedWords(masked_model(), word_tokenizer())


@pytest.fixture
def synonyms(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "list.tsv.gz", *SYNONYMS)


def by_list(examples: Examples, cache: Path, synonyms: Path, **fields: Any) -> Augmented:
    fields = {"source": "neighbours", "synonyms": str(synonyms), **fields}
    return augmented(examples, cache, **fields)


def test_copies_differ_in_replaceable_words_alone(masked: MaskedWords, tmp_path: Path) -> None:
    source = augmented(EXAMPLES, tmp_path, masked, copies=30, probability=0.5, candidates=3)
    groups: dict[int | float, list[str]] = {}
    for (text,), label in source:
        groups.setdefault(label, []).append(text)
    assert list(groups) == [0, 1, 2, 3, 4]
    for original, (first, *copies) in zip(SENTENCES, groups.values(), strict=True):
        assert first == original
        assert 0 < len(copies) <= 30
        assert len({first, *copies}) == len(copies) + 1
        for copy in copies:
            old, new = original.split(" "), copy.split(" ")
            assert len(old) == len(new)
            stays = [word for word in old if word.lower() in ("the", "a", "5")]
            assert [new[at] for at, word in enumerate(old) if word in stays] == stays
            assert sum(map(copy.count, ",.:'")) == sum(map(original.count, ",.:'"))
    assert any("don't" in text for text in groups[2]) and all("don't" in text for text in groups[2])
    # capitals stay where they were
    assert all(text[0].isupper() for label in (0, 1, 2) for text in groups[label])


@pytest.mark.parametrize("probability", [0.1, 0.4, 1.0])
def test_words_are_replaced_with_the_probability_and_evenly(
    probability: float, synonyms: Path, tmp_path: Path
) -> None:
    """`jumps` has one paraphrase, so a replacement is seen; `dog` has two that are known."""
    examples = Examples("x", [("jumps dog hill",)] * 400, np.zeros(400, dtype=np.int64))
    source = by_list(examples, tmp_path, synonyms, copies=1, probability=probability)
    copies = Counter(texts for (texts,) in texts_of(source))
    copies["jumps dog hill"] -= 400
    # a copy that equals its example is left out, which is one draw as well
    copies["jumps dog hill"] += 400 - sum(copies.values())
    for at, word in enumerate(("jumps", "dog", "hill")):
        kept = sum(n for text, n in copies.items() if text.split()[at] == word)
        deviation = (400 * probability * (1 - probability)) ** 0.5
        assert abs(400 - kept - 400 * probability) <= 4 * deviation
    cats = sum(n for text, n in copies.items() if text.split()[1] == "cat")
    others = sum(n for text, n in copies.items() if text.split()[1] == "jumps")
    assert abs(cats - others) <= 4 * (cats + others) ** 0.5
    both = sum(n for text, n in copies.items() if text.split()[0::2] == ["dog", "tree"])
    # words are drawn one by one, not all or none
    assert abs(both - 400 * probability**2) <= 4 * 400**0.5 * probability + 1


def test_the_seed_decides(masked: MaskedWords, tmp_path: Path) -> None:
    def draw(**fields: Any) -> list[tuple[str, ...]]:
        return texts_of(augmented(EXAMPLES, tmp_path, masked, **{"copies": 4, **fields}))

    first = draw()
    assert draw() == first
    assert draw(seed=1) != first
    # neither the examples behind nor further copies change what is drawn
    fewer = replace(EXAMPLES, texts=EXAMPLES.texts[:3], labels=EXAMPLES.labels[:3])
    part = texts_of(augmented(fewer, tmp_path, masked, copies=4))
    assert first[: len(part)] == part
    assert set(first) < set(draw(copies=9))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_size_does_not_matter(
    batch_size: int, masked: MaskedWords, tmp_path: Path
) -> None:
    whole = augmented(EXAMPLES, tmp_path / "a", masked, batch_size=64)
    parts = augmented(EXAMPLES, tmp_path / "b", masked, batch_size=batch_size)
    assert texts_of(parts) == texts_of(whole)
    assert parts.digest == whole.digest


def test_candidates_are_asked_for_once(
    masked: MaskedWords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = augmented(EXAMPLES, tmp_path, masked)
    texts = texts_of(first)

    def never(*_: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(candidates, "_Finder", never)
    assert texts_of(augmented(EXAMPLES, tmp_path, masked)) == texts
    again = augmented(EXAMPLES, tmp_path, masked, seed=3, copies=2, probability=0.9)
    assert texts_of(again) != texts
    with pytest.raises(AssertionError):
        texts_of(augmented(EXAMPLES, tmp_path, masked, candidates=3))
    (damaged,) = tmp_path.iterdir()
    (damaged / "words.json").unlink()
    monkeypatch.undo()
    assert texts_of(augmented(EXAMPLES, tmp_path, masked)) == texts


def test_whatever_changes_the_copies_changes_the_digest(
    masked: MaskedWords, synonyms: Path, tmp_path: Path
) -> None:
    other = MaskedWords(masked_model(seed=1), word_tokenizer())
    more = write_lines(tmp_path / "more.tsv", *SYNONYMS, "bird\tfish")
    sources = [
        augmented(EXAMPLES, tmp_path, masked),
        augmented(EXAMPLES, tmp_path, masked, copies=3),
        augmented(EXAMPLES, tmp_path, masked, probability=0.3),
        augmented(EXAMPLES, tmp_path, masked, candidates=3),
        augmented(EXAMPLES, tmp_path, masked, seed=1),
        augmented(EXAMPLES, tmp_path, masked, synonyms=str(synonyms)),
        augmented(EXAMPLES, tmp_path, masked, synonyms=str(more)),
        augmented(EXAMPLES, tmp_path, other),
        augmented(replace(EXAMPLES, labels=EXAMPLES.labels[::-1]), tmp_path, masked),
        by_list(EXAMPLES, tmp_path, synonyms),
    ]
    digests = [source.digest for source in sources]
    assert len(set(digests)) == len(digests)
    assert EXAMPLES.digest not in digests
    assert not any(path.is_dir() for path in tmp_path.iterdir()), "a digest asks for nothing"


def test_both_texts_of_a_pair_and_their_label(synonyms: Path, tmp_path: Path) -> None:
    source = by_list(PAIRS, tmp_path, synonyms, copies=40, probability=0.5)
    assert source.regression
    found: dict[float, set[tuple[str, ...]]] = {0.5: set(), 4.0: set()}
    for texts, label in source:
        found[float(label)].add(texts)
    dog = {"dog", "cat", "jumps"}
    expected = {
        (f"the {a} runs", f"the {b} {c}") for a in dog for b in dog for c in ("jumps", "dog")
    }
    assert found[0.5] <= expected and len(found[0.5]) > 10
    # `red` has a number for its only paraphrase
    assert found[4.0] == {
        (f"a red {a}", f"not a {b}") for a in ("house", "tree") for b in ("house", "tree")
    }


def test_words_of_several_pieces_take_neighbours(masked: MaskedWords, tmp_path: Path) -> None:
    """`dogfish` is dog + ##fish to the model, `lynx` is unknown to it."""
    examples = Examples("n", [("Dogfish sees LYNX",)], np.zeros(1, dtype=np.int64))
    words = write_lines(tmp_path / "w.tsv", "fish\tdogfish", "lynx\tcat", "sees\thill")
    without = augmented(examples, tmp_path, masked, probability=1.0, candidates=2)
    assert {text.split()[0] for (text,) in texts_of(without)} == {"Dogfish"}
    source = augmented(
        examples, tmp_path, masked, probability=1.0, candidates=2, synonyms=str(words)
    )
    copies = [text.split() for (text,) in texts_of(source)[1:]]
    assert {copy[0] for copy in copies} == {"Fish"}
    assert {copy[2] for copy in copies} == {"CAT"}
    # the one-piece word asks the model, whatever the list has
    assert "hill" not in {copy[1] for copy in copies} or len({copy[1] for copy in copies}) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "masked_model: missing; name a masked language model, or set augmentation.source to"),
        ({"source": "neighbours"}, "source is neighbours, but no list is named; give"),
        ({"source": "neighbours", "synonyms": "x", "masked_model": "m"}, "which does without; lea"),
        ({"masked_model": "m", "glove": "x", "synonyms": "y"}, "are both given; give one of them"),
        ({"masked_model": "m", "copies": 0}, "copies: 0 given, expected 1 or more"),
        ({"masked_model": "m", "probability": 0}, "probability: 0 given, expected above 0 and up"),
        ({"masked_model": "m", "probability": 1.1}, "probability: 1.1 given"),
        ({"masked_model": "m", "candidates": 0}, "candidates: 0 given"),
        ({"masked_model": "m", "seed": -1}, "seed: -1 given, expected 0 or more"),
        ({"masked_model": "m", "batch_size": 0}, "batch_size: 0 given"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"augmentation.*{expected}"):
        Augmentation(**fields)


def test_defaults_are_those_of_the_paper() -> None:
    settings = Augmentation(masked_model="m")
    assert (settings.copies, settings.probability, settings.candidates) == (20, 0.4, 15)


def test_from_folders_to_batches(synonyms: Path, tmp_path: Path) -> None:
    masked_model().save_pretrained(tmp_path / "mlm")
    word_tokenizer().save_pretrained(tmp_path / "mlm")
    settings = Augmentation(
        masked_model=str(tmp_path / "mlm"), synonyms=str(synonyms), copies=3, seed=5
    )
    tokenizer = word_tokenizer()
    source = augment(EXAMPLES, settings, tokenizer, cache=tmp_path / "cache", progress=False)
    examples = list(source)
    assert examples == list(augmented(
        EXAMPLES,
        tmp_path / "cache",
        MaskedWords(masked_model(), word_tokenizer()),
        synonyms=str(synonyms),
        copies=3,
        seed=5,
    ))  # fmt: skip
    made = encode_examples(
        source,
        tokenizer,
        max_length=32,
        token_types=False,
        cache=tmp_path / "cache",
        progress=False,
    )
    assert len(made) == len(examples) > 10
    assert made.labels.tolist() == [label for _, label in examples]
    expected = tokenizer([text for (text,), _ in examples])["input_ids"]
    assert [made.batch([row], 1)["input_ids"][0].tolist() for row in range(len(made))] == expected
