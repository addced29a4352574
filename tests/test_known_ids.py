"""Tokenizers whose last ids no row of their model's table stands for: taken or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, save_teacher, tiny_tokenizer, write_text
from tiny_rows import COLUMNS, random_rows, row_recipe, write_rows
from tiny_runs import make_recipe
from tiny_training import fastkd
from transformers import AutoModel, AutoTokenizer, Gemma3TextConfig, PreTrainedTokenizerFast

from fastkd import distill
from fastkd.data.known_ids import check_ids, drawn_below, limit_ids
from fastkd.data.pairs import encode_pairs
from fastkd.data.rows import RowSettings, prepare_rows
from fastkd.data.rows.read import TextRow
from fastkd.data.tasks import Columns, Task, encode_examples, read_examples
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.mlm import Masking
from fastkd.errors import UserError
from fastkd.layer_similarity import inspect_layers
from fastkd.models import load_tokenizer
from fastkd.row_form import RowForm
from fastkd.types import ModelSource

IMAGE = "<image_soft_token>"
REFUSED = f"a text holds the token '{IMAGE}', whose id {VOCABULARY} is behind the {VOCABULARY} tok"


def with_image() -> PreTrainedTokenizerFast:
    """A tokenizer with a special token behind the words, as the text models of Gemma 3 have it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    assert tokenizer.convert_tokens_to_ids(IMAGE) == VOCABULARY
    return tokenizer


def limited() -> PreTrainedTokenizerFast:
    tokenizer = with_image()
    limit_ids(tokenizer, VOCABULARY, "a model")
    return tokenizer


def renumbered(number: int, word: str = f"w{VOCABULARY - 1}") -> PreTrainedTokenizerFast:
    """A tokenizer of as many words, one of which has another id."""
    tokenizer = tiny_tokenizer()
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["model"]["vocab"][word] = number
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(tree))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_text_models_of_gemma_3_are_distilled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "teacher")
    with_image().save_pretrained(tmp_path / "teacher")
    done = distill(str(row_recipe(tmp_path, losses={"embedding_output": {}})), quiet=True)
    student = AutoTokenizer.from_pretrained(done.folder / "student")
    assert student(f"w7 {IMAGE}").input_ids == [2, 7, VOCABULARY, 3]


def of_named(token: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({token: "<late>"})
    return tokenizer


NEEDED: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "more words": (lambda: tiny_tokenizer(VOCABULARY + 2), f"'w65' the id {VOCABULARY + 1}"),
    "a gap": (lambda: renumbered(70), "'w63' the id 70"),
    "what pads": (lambda: of_named("pad_token"), f"'<late>' the id {VOCABULARY}"),
    "what hides": (lambda: of_named("mask_token"), f"'<late>' the id {VOCABULARY}"),
}


@pytest.mark.parametrize("case", NEEDED)
def test_what_text_or_data_may_always_hold_must_have_a_row(tmp_path: Path, case: str) -> None:
    make, message = NEEDED[case]
    folder = save_teacher(tmp_path / "teacher")
    make().save_pretrained(folder)
    expected = f"the model embeds {VOCABULARY} tokens, but its tokenizer gives {message}; give the"
    with pytest.raises(UserError, match=expected) as refused:
        load_tokenizer(ModelSource(str(folder)), VOCABULARY)
    assert "\n" not in str(refused.value)


def test_the_smallest_table_counts() -> None:
    tokenizer = with_image()
    limit_ids(tokenizer, VOCABULARY + 1, "a large model")
    ids = np.array([5, VOCABULARY, 7], dtype=np.int32)
    check_ids(ids, tokenizer)
    limit_ids(tokenizer, VOCABULARY, "a small one")
    limit_ids(tokenizer, VOCABULARY + 1, "a large one")
    for each in (tokenizer, copy.deepcopy(tokenizer)):
        check_ids(ids[:1], each)
        check_ids(ids[:0], each)
        with pytest.raises(UserError, match=REFUSED):
            check_ids(ids, each)


def lines_with_one(folder: Path) -> Path:
    """Text, one document of which holds the token."""
    path = write_text(folder / "text.txt")
    path.write_text(f"w5 w6 {IMAGE} w7\n\n{path.read_text()}", encoding="utf-8")
    return path


def corpus(folder: Path, **settings: Any) -> TextSettings:
    return TextSettings(
        train=(str(lines_with_one(folder)),),
        heldout_fraction=0.3,
        block_size=8,
        cache=str(folder / "cache"),
        **settings,
    )


def blocks(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    prepare_corpus(corpus(folder, workers=0), tokenizer, progress=False)


def streamed(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    settings = corpus(folder, workers=1, streaming=True, shuffle_buffer=4)
    with closing(prepare_corpus(settings, tokenizer, progress=False).stream(4, 0)) as stream:
        for _ in range(60):
            stream.next_batch()


def rows(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    given = random_rows(40)
    given[-1]["positive"] += f" {IMAGE}"
    text = TextSettings(
        train=(str(write_rows(folder / "rows.jsonl", given)),),
        heldout_fraction=0.3,
        block_size=64,
        cache=str(folder / "cache"),
        documents="row",
        workers=0,
    )
    settings = RowSettings(text=text, form=RowForm(columns=COLUMNS, named=True), token_types=False)
    prepare_rows(settings, tokenizer, progress=False)


def pairs(tokenizer: PreTrainedTokenizerFast, _folder: Path) -> None:
    form = RowForm(columns=("one", "other"), named=True, scores=("score",))
    given = [TextRow(("w5", f"w6 {IMAGE}"), (0.5,))]
    encode_pairs(given, form, tokenizer, Gemma3TextConfig(), max_length=16, name="p")


def examples(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    path = folder / "task" / "train.jsonl"
    labelled = [{"text": "w5 w6", "label": "a"}, {"text": f"w7 {IMAGE}", "label": "b"}]
    write_rows(path, labelled)
    task = Task(
        name="t",
        columns=Columns(texts=("text",), label="label"),
        kind="sequence_classification",
        labels=("a", "b"),
        metrics=("accuracy",),
    )
    cache = folder / "cache"
    read = read_examples(task, path.parent, "train", cache)
    encode_examples(read, tokenizer, max_length=16, token_types=False, cache=cache, progress=False)


@pytest.mark.parametrize("read", [blocks, streamed, rows, pairs, examples])
def test_a_text_with_such_a_token_is_refused_by_whoever_reads(
    tmp_path: Path, read: Callable[[PreTrainedTokenizerFast, Path], None]
) -> None:
    """Also where a model with a larger table has stored what it read of the same text."""
    read(with_image(), tmp_path)
    with pytest.raises(UserError, match=REFUSED) as refused:
        read(limited(), tmp_path)
    assert "\n" not in str(refused.value)


def test_masks_are_drawn_from_the_table() -> None:
    tokenizer = limited()
    assert len(tokenizer) == VOCABULARY + 1 and drawn_below(tokenizer) == VOCABULARY
    ids = torch.full((64, 512), 7)
    drawn = Masking(tokenizer, 1.0, seed=0)(ids, 0)["input_ids"]
    assert drawn.max() == VOCABULARY - 1
    assert Masking(with_image(), 1.0, seed=0)(ids, 0)["input_ids"].max() == VOCABULARY
    assert drawn_below(tiny_tokenizer()) == VOCABULARY


def test_a_student_to_start_from_embeds_what_its_tokenizer_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = save_teacher(tmp_path / "start", vocab_size=60, num_hidden_layers=2)
    own = {"hidden_size": None, "intermediate_size": None, "init": str(start)}
    recipe = make_recipe(tmp_path, student=own, losses={"hidden": {}})
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastkd: student.init {start}: the model embeds 60 tokens, but its tokenizer gives 'w63' "
        "the id 63; give the folder the tokenizer that the model was trained with"
    )
    assert not (tmp_path / "run").exists()


def test_layers_of_models_with_unlike_tables_are_compared(tmp_path: Path) -> None:
    """As Qwen2.5's: 151,936 and 152,064 rows, and fewer words than either."""
    teacher = save_teacher(tmp_path / "teacher", vocab_size=72)
    student = save_teacher(tmp_path / "student", seed=1, num_hidden_layers=2)
    text = str(write_text(tmp_path / "text.txt"))
    found = inspect_layers(teacher, student, text, blocks=2, block_size=16)
    assert found.tokens == 32
    with_image().save_pretrained(teacher)
    with_image().save_pretrained(student)
    text = str(lines_with_one(tmp_path))
    inspect_layers(teacher, teacher, text, blocks=80, block_size=16)
    with pytest.raises(UserError, match=REFUSED):
        inspect_layers(teacher, student, text, blocks=80, block_size=16)
