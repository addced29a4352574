"""What a folder holds is read whole or refused in one line: weights, settings, storage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    HEADS,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    save_teacher,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from fastkd.data.tasks import Columns, Task
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, load_student, load_teacher, load_tokenizer
from fastkd.models.classifier import load_tuned
from fastkd.recipe import Student
from fastkd.types import ModelSource

TASK = Task(name="t", columns=Columns(texts=("a",), label="y"), labels=("no", "yes"))
DISTANCES = {
    f"encoder.layer.{n}.attention.self.distance_embedding.weight": torch.ones(
        2 * POSITIONS - 1, WIDTH // HEADS
    )
    for n in range(LAYERS)
}


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    return folder


def add_weights(folder: Path, added: dict[str, Tensor], prefix: str = "") -> Path:
    return edit_weights(folder, lambda w: {**w, **{prefix + k: v for k, v in added.items()}})


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def save_masked(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def start_from(folder: Path) -> object:
    student = Student(layers=LAYERS, init=str(folder))
    return build_student(tiny_model("bert"), student, make_layer_map("uniform", LAYERS, LAYERS))


LOADS: dict[str, Callable[[Path], object]] = {
    "teacher.model": lambda folder: load_teacher(ModelSource(str(folder))),
    "student": load_student,
    "student.init": start_from,
    "model": lambda folder: load_tuned(ModelSource(str(folder)), TASK),
}
EVERY_LOAD = pytest.mark.parametrize("given", LOADS)


def refusal(folder: Path, given: str = "teacher.model") -> str:
    with pytest.raises(UserError) as refused:
        LOADS[given](folder)
    message = str(refused.value)
    assert message.startswith(f"{given} {folder}")
    assert "\n" not in message
    return message.removeprefix(f"{given} {folder}").lstrip(": ")


@EVERY_LOAD
@pytest.mark.parametrize("masked", [False, True])
def test_distance_embeddings_that_transformers_dropped_are_refused(
    tmp_path: Path, given: str, masked: bool
) -> None:
    folder = save_masked(tmp_path / "m") if masked else save_teacher(tmp_path / "m")
    prefix = "bert." if masked else ""
    first = f"{prefix}encoder.layer.0.attention.self.distance_embedding.weight"
    add_weights(folder, DISTANCES, prefix)
    expected = rf"{LAYERS} weights are read by nothing, {first} among them; Bert\w+ of transformers"
    assert re.match(expected, refusal(folder, given))


@EVERY_LOAD
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "alibi"])
def test_positions_that_no_class_reads_are_refused(tmp_path: Path, given: str, kind: str) -> None:
    folder = edit_config(save_teacher(tmp_path / "m"), position_embedding_type=kind)
    assert f"position_embedding_type {kind!r}, but Bert" in refusal(folder, given)


def test_absolute_positions_are_read(tmp_path: Path) -> None:
    load_teacher(
        ModelSource(str(edit_config(save_teacher(tmp_path), position_embedding_type="absolute")))
    )


@pytest.mark.parametrize(
    ("added", "count"),
    [
        ({"encoder.layer.0.adapter.down.weight": torch.ones(2, 2)}, 1),
        ({"embeddings.extra.weight": torch.ones(2), "embeddings.more": torch.ones(2)}, 2),
        ({"relative_attention_bias.weight": torch.ones(2, 2)}, 1),
    ],
)
def test_a_weight_below_the_head_that_has_no_place_is_refused(
    tmp_path: Path, added: dict[str, Tensor], count: int
) -> None:
    folder = add_weights(save_teacher(tmp_path / "m"), added)
    first = min(added)
    assert refusal(folder).startswith(f"{count} weights are read by nothing, {first} among them")


def test_blocks_beyond_the_configurations_depth_are_refused(tmp_path: Path) -> None:
    folder = edit_config(save_teacher(tmp_path / "m"), num_hidden_layers=LAYERS - 1)
    expected = f"16 weights are read by nothing, encoder.layer.{LAYERS - 1}.attention.output.La"
    assert refusal(folder).startswith(expected)


def agree(mine: PreTrainedModel, theirs: PreTrainedModel) -> bool:
    batch = tiny_batch()
    with torch.no_grad():
        states = [m.base_model.eval()(**batch).last_hidden_state for m in (mine, theirs)]
    return torch.equal(*states)


def test_heads_and_poolers_above_the_base_model_may_stay_behind(tmp_path: Path) -> None:
    masked = save_masked(tmp_path / "masked")
    whole = AutoModelForMaskedLM.from_pretrained(masked)
    assert agree(load_teacher(ModelSource(str(masked))), whole)
    add_weights(
        masked,
        {
            "cls.seq_relationship.weight": torch.ones(2, WIDTH),
            "bert.pooler.dense.weight": torch.ones(WIDTH, WIDTH),
            "bert.pooler.dense.bias": torch.ones(WIDTH),
            "linear.weight": torch.ones(8, WIDTH),
        },
    )
    for head in ("none", "masked_lm"):
        assert agree(load_teacher(ModelSource(str(masked)), head=head), whole)
    load_tuned(ModelSource(str(masked)), TASK)


@pytest.mark.parametrize("head", ["none", "causal_lm"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_an_old_gpt2_with_its_masks_is_read(tmp_path: Path, prefix: str, head: Any) -> None:
    folder = tmp_path / "m"
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    whole.save_pretrained(folder)
    mask = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    buffers = {f"h.{n}.attn.bias": mask.clone() for n in range(LAYERS)}
    buffers |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(LAYERS)}
    edit_weights(
        folder,
        lambda w: {
            prefix + key.removeprefix("transformer."): value
            for key, value in {**w, **buffers}.items()
        },
    )
    assert agree(load_teacher(ModelSource(str(folder)), head=head), whole)


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("bert", {"embeddings.position_ids": torch.arange(POSITIONS)[None]}),
        ("roberta", {"embeddings.token_type_ids": torch.zeros(1, POSITIONS)}),
        ("distilbert", {"embeddings.position_ids": torch.arange(POSITIONS)[None]}),
        ("llama", {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ],
)
def test_buffers_of_older_releases_are_no_weights(
    tmp_path: Path, name: str, buffers: dict[str, Tensor]
) -> None:
    folder = add_weights(save_teacher(tmp_path, name), buffers)
    assert agree(load_teacher(ModelSource(str(folder))), tiny_model(name))


QUANTISED: list[dict[str, Any]] = [
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    {"quant_method": "unheard-of"},
]


@EVERY_LOAD
@pytest.mark.parametrize("settings", QUANTISED, ids=lambda settings: settings["quant_method"])
def test_quantised_weights_are_refused(
    tmp_path: Path, given: str, settings: dict[str, Any]
) -> None:
    folder = edit_config(save_teacher(tmp_path / "m"), quantization_config=settings)
    method = settings["quant_method"]
    assert refusal(folder, given).startswith(f"its weights are quantised ({method}), but fastkd")


@EVERY_LOAD
def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path, given: str) -> None:
    folder = save_teacher(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert refusal(folder, given).startswith("holds an adapter (adapter_config.json)")


@EVERY_LOAD
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[1, 2]", "not loadable"),
        ("null", "not loadable"),
        ('"bert"', "not loadable"),
        ("", "not loadable"),
        ('{"model_type": ["bert"]}', "not loadable"),
        ({"hidden_size": "wide"}, "not loadable"),
        ({"num_attention_heads": 0}, "(not loadable|has num_attention_heads 0)"),
        ({"num_hidden_layers": None}, "not loadable"),
        ({"hidden_act": "unheard-of"}, "(not loadable|has hidden_act)"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M"}},
            "needs code of its own, which fastkd doesn't run",
        ),
    ],
)
def test_configurations_of_no_model_are_refused(
    tmp_path: Path, given: str, config: Any, expected: str
) -> None:
    folder = save_teacher(tmp_path / "m")
    if isinstance(config, str):
        (folder / "config.json").write_text(config)
    else:
        edit_config(folder, **config)
    assert re.match(expected, refusal(folder, given).lstrip())


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act"),
        ("bert", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_param"),
    ],
)
def test_a_model_to_start_from_computes_as_the_student_will(
    tmp_path: Path, name: str, changes: dict[str, Any], field: str
) -> None:
    whole, student = make_layer_map("uniform", LAYERS, LAYERS), save_teacher(tmp_path / "m", name)
    teacher = tiny_model(name, seed=1)
    section = Student(layers=LAYERS, init=str(student), dropout=0.3)
    assert agree(build_student(teacher, section, whole)[0], tiny_model(name))
    edit_config(student, **changes)
    with pytest.raises(UserError, match=rf"^student\.init {student} has {field}.*start from"):
        build_student(teacher, section, whole)


def test_a_model_to_start_from_keeps_its_own_kinds_of_layers(tmp_path: Path) -> None:
    """It was trained with them, whatever teacher layers it learns from now."""
    full, sliding = "full_attention", "sliding_attention"
    student = save_teacher(
        tmp_path / "m", "modernbert", num_hidden_layers=2, layer_types=[full, full]
    )
    mapped = make_layer_map("last", 2, LAYERS)
    teacher = tiny_model("modernbert", layer_types=[full, full, full, sliding])
    section = Student(layers=2, init=str(student))
    built = build_student(teacher, section, mapped)[0]
    assert built.config.layer_types == [full, full]
    expected = tiny_model("modernbert", num_hidden_layers=2, layer_types=[full, full])
    assert agree(built, expected)


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


@EVERY_LOAD
def test_a_pickle_is_read_as_tensors_or_not_at_all(tmp_path: Path, given: str) -> None:
    folder = save_teacher(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    LOADS[given](folder)
    torch.save({**weights, "trap": _Trap(tmp_path / "made")}, folder / "pytorch_model.bin")
    assert refusal(folder, given).startswith("its weights are a pickle of more than tensors")
    assert not (tmp_path / "made").exists()
    for content in (b"", b"no pickle"):
        (folder / "pytorch_model.bin").write_bytes(content)
        assert re.match(r"not loadable \(|its weights are a pickle", refusal(folder, given))


@pytest.mark.parametrize("kind", ["CpmTokenizer", "BertJapaneseTokenizer", "RoFormerTokenizer"])
def test_a_tokenizer_whose_package_is_missing_is_refused(tmp_path: Path, kind: str) -> None:
    folder = save_teacher(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(UserError, match=f"tokenizer of {folder}: not loadable") as refused:
        load_tokenizer(ModelSource(str(folder)), VOCABULARY)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}', '{"version": "1.0", "model": {}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    folder = save_teacher(tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=f"tokenizer of {folder}: not loadable") as refused:
        load_tokenizer(ModelSource(str(folder)), VOCABULARY)
    assert "\n" not in str(refused.value)
