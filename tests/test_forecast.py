"""What a recipe needs on GPUs that are not here: counted from shapes, and laid out otherwise."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, WINDOW, tiny_config, tiny_model
from tiny_runs import make_recipe
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig

from benchmarks import placement
from fastkd import cli, training
from fastkd.capture import capture, route_attention
from fastkd.errors import UserError
from fastkd.recipe import Recipe, load_recipe, parse_recipe
from fastkd.reporting.numbers import gib
from fastkd.training import doctor
from fastkd.training.chips import CHIPS, Chip
from fastkd.training.doctor import does_not_fit
from fastkd.training.dry_pass import bytes_of, dry_pass, tensors_of
from fastkd.training.forecast import EFFICIENCY, forecast, layouts, run_dry
from fastkd.training.precision import precision_on_gpus
from fastkd.training.session import quietened

ROWS, TOKENS = 3, 16
LAYERS: dict[str, Any] = {"attention": {2}, "hidden": {0, 3}}


# with dropout, torch's attention on CPUs makes maps
NO_MAPS = {"bert": {"attention_probs_dropout_prob": 0.0}, "llama": {}}


def _meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModel.from_config(tiny_config(name, **NO_MAPS.get(name, {})))


def _ids(device: str) -> Tensor:
    return torch.zeros(ROWS, TOKENS, dtype=torch.long, device=device)


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_products_are_those_of_the_weights_and_of_attention(name: str) -> None:
    model = _meta(name)
    found = dry_pass(model, {"input_ids": _ids("meta")}, LAYERS)
    blocks = model.encoder.layer if name == "bert" else model.layers
    matrices = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    if name == "bert":
        # of the pooler, the first token alone
        pooler = 2 * ROWS * model.pooler.dense.weight.numel()
        assert found.products == 2 * ROWS * TOKENS * matrices + pooler
        assert found.attention == 4 * 4 * ROWS * 4 * TOKENS * TOKENS * 8
    if name == "llama":
        assert found.products == 2 * ROWS * TOKENS * matrices
        assert found.attention == 4 * 4 * ROWS * 4 * TOKENS * TOKENS * 8 // 2
        assert found.traits.causal and found.traits.shapes[0].kv_heads == 2
    if name == "modernbert":
        # two of four layers see all keys, two as many on either side as the window is wide
        keys = 2 * TOKENS + 2 * (2 * WINDOW + 1)
        assert found.attention == 4 * ROWS * 4 * TOKENS * keys * 8
        assert 2 * WINDOW + 1 < TOKENS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bytes_are_those_of_a_real_pass(name: str, attention: str) -> None:
    """On CPUs torch's attention keeps for its backward pass what flash attention keeps."""
    inputs, eager = {"input_ids": _ids("meta")}, attention == "eager"
    found = dry_pass(_meta(name), inputs, LAYERS, train=True, eager=eager)
    model = tiny_model(name, **NO_MAPS[name]).train()
    route_attention(model, attention)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with capture(model, **LAYERS) as real, hooks:
        model(_ids("cpu"), use_cache=False) if name == "llama" else model(_ids("cpu"))
    size = sum(storage.nbytes() for storage in kept.values())
    assert abs(found.saved - size) <= 0.03 * size, (found.saved, size)
    assert bytes_of(tensors_of(found.captured)) == bytes_of(tensors_of(real))
    if eager:
        # of all pairs, in the teacher's passes as well; nothing else is multiplied than without
        plain = dry_pass(_meta(name), inputs, LAYERS)
        assert found.attention == 4 * 4 * ROWS * 4 * TOKENS * TOKENS * 8
        assert found.products == plain.products
        maps = dry_pass(_meta(name), inputs, LAYERS, eager=True)
        assert plain.largest < maps.largest == 4 * ROWS * 4 * TOKENS * TOKENS


def _save_start(folder: Path, name: str, **changes: Any) -> int:
    """Write a model to start from; its numbers, without a pooler."""
    kind = AutoModelForCausalLM if name in ("llama", "qwen3") else AutoModel
    model = kind.from_config(tiny_config(name, num_hidden_layers=2, **changes))
    model.save_pretrained(folder)
    named = model.named_parameters()
    return sum(p.numel() for key, p in named if not key.startswith("pooler."))


@pytest.mark.parametrize(
    ("name", "start", "changes"),
    [
        # another architecture, taken as it is
        ("bert", "roberta", {}),
        ("llama", "llama", {"tie_word_embeddings": False}),
        ("qwen3", "qwen3", {"head_dim": 8, "hidden_size": 24}),
    ],
)
def test_a_student_that_starts_from_a_model_is_that_model(
    tmp_path: Path, name: str, start: str, changes: dict[str, Any]
) -> None:
    decoder = name != "bert"
    numbers = _save_start(tmp_path / "start", start, **changes)
    width = changes.get("hidden_size", 32)
    sizes = {"layers": 2, "hidden_size": width, "intermediate_size": 48}
    path = make_recipe(
        tmp_path, name, student={**sizes, "head": "causal_lm" if decoder else "none"}
    )
    losses = "losses={logits: {}}" if decoder else "losses={hidden: {}}"
    given = ["train.precision=fp32", "teacher.dtype=float32", losses]
    given += [f"student.init={tmp_path / 'start'}"]
    if name == "llama":
        config = tiny_config(name, tie_word_embeddings=True)
        config.save_pretrained(tmp_path / "teacher")
    plain = run_dry(load_recipe(path, given), 4)
    assert (plain.trained_numbers, plain.frozen_numbers) == (numbers, 0)
    if not decoder:
        given += ["student.freeze_word_embeddings=true", "student.gradient_checkpointing=true"]
        found = run_dry(load_recipe(path, given), 4)
        table = VOCABULARY * width
        assert (found.trained_numbers, found.frozen_numbers) == (numbers - table, table)
        assert found.student.saved < 0.5 * plain.student.saved


def test_attention_with_maps_takes_their_memory_and_no_second_making(recipe: Recipe) -> None:
    chip = CHIPS["h100"]
    plain, maps = (
        recipe.model_copy(
            update={"student": recipe.student.model_copy(update={"attention": attention})}
        )
        for attention in ("flash_attention_2", "eager")
    )
    flash, eager = run_dry(plain, 8), run_dry(maps, 8)
    # two layers of 4 heads, each a map in fp32 where flash attention keeps a sum a row
    assert eager.student.saved - flash.student.saved >= 2 * 8 * 4 * 4 * (16 * 16 - 16)
    operations = eager.student.attention / chip.tf32 / EFFICIENCY
    found = [forecast(one, eager, chip, 1).computing for one in (plain, maps)]
    assert found[0] - found[1] == pytest.approx(0.5 * operations)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("forecast"))


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path, ["train.precision=fp32", "teacher.dtype=float32"])


def _laid_out(recipe: Recipe, *, teacher: Any = None, zero: Any = None, **train: Any) -> Recipe:
    return parse_recipe(
        {
            **(tree := recipe.model_dump(mode="json", exclude_none=True)),
            "teacher": {**tree["teacher"], **(teacher or {})},
            "train": {**tree["train"], **train},
            "deepspeed": {"zero_optimization": zero} if zero else {},
        }
    )


@pytest.mark.parametrize("how", ["linear", "checkpointing"])
def test_weights_stay_gathered_until_the_backward_pass_unless_they_are_let_go(
    recipe: Recipe, how: str
) -> None:
    chip, passes = CHIPS["h100"], run_dry(recipe, 4)
    alone = {"stage3_prefetch_bucket_size": 0}
    name, three = "weights gathered at a time", _laid_out(recipe, zero=alone, zero_stage=3)
    assert forecast(three, passes, chip, 2).parts[name] == 4 * passes.trained_numbers
    if how == "linear":
        less = _laid_out(recipe, zero={**alone, "memory_efficient_linear": True}, zero_stage=3)
    else:
        student = three.student.model_copy(update={"gradient_checkpointing": True})
        less = three.model_copy(update={"student": student})
    found = forecast(less, passes, chip, 2).parts[name]
    assert found == 4 * passes.student_block < 4 * passes.trained_numbers


def test_a_forecast_follows_the_layout(recipe: Recipe) -> None:
    chip, passes = CHIPS["h100"], run_dry(recipe, 4)
    weights = 4 * passes.trained_numbers
    plain = forecast(_laid_out(recipe, zero_stage=0), passes, chip, 2)
    assert plain.parts["teacher weights"] == 4 * passes.teacher_numbers
    assert plain.parts["student weights"] == plain.parts["gradients"] == weights
    assert plain.parts["optimiser"] == 2 * weights and "bucket of gradients" not in plain.parts
    assert plain.tokens == 8 * 16 and plain.machine == 0
    whole = forecast(
        _laid_out(recipe, zero_stage=3, teacher={"placement": "shard"}), passes, chip, 2
    )
    for name in ("teacher weights", "student weights", "gradients"):
        assert whole.parts[name] == plain.parts[name] // 2
    # of fp32 weights, too, DeepSpeed's stages keep another copy
    assert whole.parts["optimiser"] == 3 * weights // 2
    assert whole.parts["weights gathered at a time"] == weights + 4 * passes.teacher_numbers
    # what is gathered moves again for each micro-batch
    assert whole.moving > plain.moving and whole.computing == plain.computing
    away = forecast(
        _laid_out(
            recipe,
            zero_stage=2,
            teacher={"placement": "offload"},
            zero={"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
        ),
        *(passes, chip, 2),
    )
    assert not {"teacher weights", "optimiser"} & away.parts.keys()
    # whichever rank holds what of it in the end
    assert away.loading == plain.loading == 4 * passes.teacher_numbers
    # the optimiser's share of the gradients beside it
    assert away.machine == 2 * passes.teacher_numbers + (3 + 1) * weights // 2
    assert away.parts["bucket of gradients"] == 4000


@pytest.mark.parametrize(
    ("zero", "numbers"),
    [
        ({"reduce_bucket_size": "auto", "memory_efficient_linear": "auto"}, 500_000_000),
        ({"reduce_bucket_size": "3000"}, 3000),
        ({"offload_optimizer": {"device": "none"}}, 500_000_000),
        ({"offload_optimizer": None, "offload_param": {"device": "auto"}}, 500_000_000),
    ],
    ids=str,
)
def test_a_section_is_what_deepspeed_reads_in_it(
    recipe: Recipe, zero: dict[str, Any], numbers: int
) -> None:
    chip, passes = CHIPS["h100"], run_dry(recipe, 4)
    plain = forecast(_laid_out(recipe, zero_stage=3), passes, chip, 2)
    found = forecast(_laid_out(recipe, zero=zero, zero_stage=3), passes, chip, 2)
    assert found.parts["bucket of gradients"] == 4 * numbers
    # all that is offloaded is nothing
    assert found.machine == 0 and found.moving == plain.moving
    assert found.parts["optimiser"] == plain.parts["optimiser"]
    with pytest.raises(UserError, match="zero_optimization is given, but the recipe decides it"):
        null = recipe.model_copy(update={"deepspeed": {"zero_optimization": None}})
        forecast(null, passes, chip, 2)


def test_what_is_offloaded_is_read_from_the_machine_from_its_stage_on(recipe: Recipe) -> None:
    chip, passes = CHIPS["h100"], run_dry(recipe, 8)
    cpu = {"device": "cpu"}
    zero = {"offload_param": cpu, "offload_optimizer": cpu}
    weights, found = 4 * passes.trained_numbers, {}
    for stage in range(4):
        plain, away = (
            forecast(_laid_out(recipe, zero=given, zero_stage=stage), passes, chip, 1)
            for given in ({"round_robin_gradients": True}, zero)
        )
        found[stage] = away.machine, (away.moving - plain.moving) * chip.host
        # gradients are there twice: what adds up, at stages 1 and 3, and what the optimiser reads
        twice = weights if stage in (1, 3) else 0
        assert away.total + away.machine == plain.total + twice
    # fp32 weights of ZeRO's own and two moments; gradients go there and weights come back
    assert found[0] == (0, 0)
    assert found[1] == found[2] == (4 * weights, pytest.approx(2 * weights))
    # the weights as well, of which a forward and a backward pass read all; the sum of gradients
    # goes there, comes back and is copied
    assert found[3] == (6 * weights, pytest.approx(5 * weights))


@pytest.mark.parametrize(
    ("stage", "precision", "zero", "each"),
    [
        (1, "fp32", {}, 4),
        (1, "fp32", {"overlap_comm": True}, 8),
        (1, "bf16", {"overlap_comm": True}, 0),
        # another of DeepSpeed's optimisers, which adds up in fp32
        (1, "bf16", {"offload_optimizer": {"device": "cpu"}}, 4),
        (2, "bf16", {}, 2),
        (2, "bf16", {"overlap_comm": True}, 4),
        (2, "bf16", {"contiguous_gradients": False}, 0),
        # of the dtype that gradients are reduced in
        (3, "bf16", {"overlap_comm": True}, 4),
    ],
    ids=str,
)
def test_gradients_wait_in_a_bucket(
    recipe: Recipe, stage: int, precision: str, zero: dict[str, Any], each: int
) -> None:
    given = {"reduce_bucket_size": 1000, **zero}
    laid_out = _laid_out(recipe, zero=given, zero_stage=stage, precision=precision)
    found = forecast(laid_out, run_dry(laid_out, 4), CHIPS["h100"], 2)
    assert found.parts.get("bucket of gradients", 0) == each * 1000


def test_one_process_needs_no_bucket_but_gradients_of_a_micro_batch(recipe: Recipe) -> None:
    chip, passes = CHIPS["h100"], run_dry(_laid_out(recipe, precision="bf16"), 4)
    numbers = passes.trained_numbers
    name = "gradients of a micro-batch"
    for size, ranks, each in ((8, 1, 2), (2, 1, 6), (2, 2, 2)):
        laid_out = _laid_out(recipe, precision="bf16", micro_batch_size=size)
        found = forecast(laid_out, passes, chip, ranks)
        assert found.parts[name] == each * numbers and "bucket of gradients" not in found.parts
    wide = _laid_out(recipe, zero_stage=1)
    assert "bucket of gradients" not in forecast(wide, passes, chip, 1).parts
    assert "bucket of gradients" in forecast(wide, passes, chip, 2).parts


def test_a_precision_that_is_left_open_is_that_of_gpus(path: Path) -> None:
    found = precision_on_gpus(load_recipe(path, []))
    assert (found.teacher.dtype, found.train.precision) == ("bfloat16", "bf16")


def test_micro_batches_scale_memory_and_leave_time(recipe: Recipe) -> None:
    chip = CHIPS["a100"]
    large = forecast(recipe, run_dry(recipe, 8), chip, 1)
    small = forecast(_laid_out(recipe, micro_batch_size=2), run_dry(recipe, 8), chip, 1)
    again = forecast(_laid_out(recipe, micro_batch_size=2), run_dry(recipe, 2), chip, 1)
    assert small.parts["activations"] == large.parts["activations"] // 4
    assert small.computing == pytest.approx(large.computing)
    for name, size in small.parts.items():
        assert abs(again.parts[name] - size) <= 0.02 * size, name


def test_time_is_what_both_models_multiply(recipe: Recipe) -> None:
    chip, passes = CHIPS["h100"], run_dry(recipe, 8)
    teacher, student = passes.teacher, passes.student
    operations = teacher.products + teacher.attention + 3 * student.products
    operations += 3.5 * student.attention
    found = forecast(_laid_out(recipe, tf32=False), passes, chip, 1)
    assert found.computing == pytest.approx(operations / chip.single / EFFICIENCY)
    rounded = forecast(recipe, passes, chip, 1)
    assert rounded.computing == pytest.approx(2 * operations / chip.half / EFFICIENCY)
    assert found.moving == 0 and found.speed == pytest.approx(8 * 16 / found.computing)


def test_micro_batches_whose_rows_are_compared_are_read_twice(recipe: Recipe) -> None:
    chip, small = CHIPS["h100"], _laid_out(recipe, micro_batch_size=2, tf32=False)
    passes = run_dry(small, 2)
    compared = replace(passes, least_rows=2)
    found = [forecast(small, one, chip, 1).computing for one in (passes, compared)]
    again = passes.teacher.products + passes.teacher.attention
    again += passes.student.products + passes.student.attention
    assert found[1] - found[0] == pytest.approx(4 * again / chip.single / EFFICIENCY)
    whole = [forecast(recipe, one, chip, 1).computing for one in (passes, compared)]
    assert whole[0] == whole[1]
    sizes = {changed.train.micro_batch_size for _, changed in layouts(recipe, 2)}
    assert min(size for size in sizes if size is not None) == 1
    tree = recipe.model_dump(mode="json", exclude_none=True)
    angles = Recipe.model_validate({**tree, "losses": {"rkd": {"kind": "angle"}}})
    assert run_dry(angles, 4).least_rows == 3


def test_what_does_not_fit_is_one_line_with_a_layout_that_does(recipe: Recipe) -> None:
    passes = run_dry(recipe, 4)
    total = forecast(recipe, passes, CHIPS["l4"], 2).total
    tight = Chip(**{**vars(CHIPS["l4"]), "memory": total - 1})
    said = does_not_fit(recipe, passes, tight, 2)
    assert said.startswith("does not fit: ") and "\n" not in said
    overrides = said.split("give ")[1].split(" (")[0].split()
    changed = load_recipe(Path(recipe.teacher.model).parent / "recipe.yaml", overrides)
    assert forecast(changed, passes, tight, 2).total < total
    none = Chip(**{**vars(tight), "memory": 1})
    assert "more or larger GPUs" in does_not_fit(recipe, passes, none, 2)


@pytest.mark.parametrize(
    "given", ["train.optimizer=muon", "train.compile=true", "student.gradient_checkpointing=true"]
)
def test_what_is_advised_is_what_the_recipe_takes(path: Path, given: str) -> None:
    recipe = load_recipe(path, ["teacher.dtype=float32", "train.precision=fp32", given])
    advised = [said for said, _ in layouts(recipe, 2)]
    assert any("zero_stage=2" in said for said in advised)
    for said in advised:
        load_recipe(path, [given, *said.split()])
    assert any("zero_stage=3" in said for said in advised) == ("checkpointing" in given)
    none = Chip(**{**vars(CHIPS["l4"]), "memory": 1})
    said = does_not_fit(recipe, run_dry(recipe, 4), none, 2)
    assert ("student.gradient_checkpointing" in said) != ("checkpointing" in given)


def test_advice_says_how_often_gradients_are_reduced(recipe: Recipe) -> None:
    small = _laid_out(recipe, micro_batch_size=1, zero={"reduce_bucket_size": 1})
    passes = run_dry(small, 1)
    total = forecast(_laid_out(small, zero_stage=2), passes, CHIPS["l4"], 2).total
    room = Chip(**{**vars(CHIPS["l4"]), "memory": total})
    said = does_not_fit(small, passes, room, 2)
    assert said.endswith("GiB, reduces gradients 4 times a step)") and "zero_stage=2" in said
    whole = _laid_out(recipe, zero={"reduce_bucket_size": 1})
    room = Chip(**{**vars(room), "memory": forecast(whole, passes, room, 2).total - 1})
    assert "reduces" not in does_not_fit(whole, passes, room, 2)


def test_a_head_that_losses_multiply_in_fp32_takes_three_products_of_tf32(tmp_path: Path) -> None:
    student = {"layers": 2, "hidden_size": 32, "head": "causal_lm"}
    path = make_recipe(tmp_path, "llama", student=student)
    given = ["losses={logits: {}}"]
    chip = CHIPS["l4"]
    plain = load_recipe(path, [*given, "train.precision=fp32", "teacher.dtype=float32"])
    passes = run_dry(plain, 8)
    found = forecast(plain, passes, chip, 1).computing
    rounded = load_recipe(path, [*given, "train.precision=bf16", "teacher.dtype=bfloat16"])
    half = forecast(rounded, run_dry(rounded, 8), chip, 1).computing
    # all else is twice as slow in TF32; a pass of the teacher, and of the student three
    operations = (1 + 3) * 2 * 8 * 16 * VOCABULARY * 32
    others = half * EFFICIENCY - operations / chip.half
    expected = 2 * others + 3 * operations / chip.tf32
    assert found * EFFICIENCY == pytest.approx(expected)


def _doctor(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["fastkd", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_doctor_forecasts_without_weights(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = [
        str(path),
        f"teacher.model={tmp_path}",
        "student.heads=4",
        "student.kv_heads=4",
        "data.train=nowhere",
    ]
    given += ["losses={hidden: {}}", "teacher.dtype=float32", "train.batch_size=64"]
    given += ["--gpu", "l4"]
    assert _doctor(*given, "--ranks", "8", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "memory of each of 8 GPUs" in said and "tokens a second" in said
    # 32 blocks of 4096, in fp32
    assert "does not fit" in said and "teacher.placement=shard" in said


def test_what_is_small_is_not_said_to_be_nothing() -> None:
    mebibyte = 2**20
    said = [gib(size, 2) for size in (0, mebibyte, 40 * mebibyte, 2**31)]
    assert said == ["0.00 GiB", "0.00098 GiB", "0.04 GiB", "2.00 GiB"]
    seconds = (0.0, 0.0024, 0.31, 59.4, 60.0, 3599.0, 3600.0)
    assert [doctor._duration(one) for one in seconds] == [
        *("0.0 s", "0.0024 s", "0.3 s", "59.4 s", "1 min 0 s", "59 min 59 s", "1 h 0 min")
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed takes the GPU without a word")
def test_deepspeed_is_told_what_it_would_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with quietened():
        assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in os.environ


def test_each_stage_is_forecast_on_the_student_of_the_first(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = "stages=[{losses: {hidden: {}}}, {losses: {embedding: {}}, train: {steps: 3}}]"
    assert _doctor(str(path), stages, "--gpu", "h100", monkeypatch=monkeypatch) == 0
    first, second = capsys.readouterr().out.split("stage 2 of 2")
    assert first.startswith("stage 1 of 2")
    for said in (first, second):
        assert "memory of the GPU" in said and "tokens a second" in said


def test_the_committed_page_is_what_is_forecast() -> None:
    page = placement.page()
    assert placement.PAGE.read_text(encoding="utf-8") == page
    # what the advice quotes of it, differences left out
    advice = Path(training.__file__).with_name("README.md").read_text(encoding="utf-8")
    advice = advice.split("## A teacher of 7 B")[1]
    quoted = re.findall(r"\b(\d\d\.\d)(?: of (\d\d\.\d))? GiB", advice)
    assert len(quoted) == 5
    assert all(f"| {one}, {of} |" in page if of else f"| {one}, " in page for one, of in quoted)


EXPERTS = ("teacher.model=MIXTRAL", "teacher.dtype=bfloat16", "train.precision=bf16")
OF_ANOTHER = ("student.layers=null", "student.hidden_size=null", "student.intermediate_size=null")
STUDENT_OF_EXPERTS = ("student.init=MIXTRAL", *OF_ANOTHER, "losses={hidden: {}}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ranks", "2"], "--ranks 2 is given without --gpu"),
        (["--gpu", "h100"], "--gpu h100 is given without a recipe"),
        (["RECIPE", "--gpu", "h100", "--ranks", "3"], "expected a multiple of the 3 ranks"),
        (["RECIPE", "--gpu", "h100", "--ranks", "2", "train.cuda_graph=true"], "cuda_graph is on"),
        (["RECIPE", "--gpu", "h100", "teacher.overlap=true"], "a step is one micro-batch"),
        (["RECIPE", "--gpu", "h100", "deepspeed={zero_optimization: null}"], "by train.zero_stage"),
        (["RECIPE", "--gpu", "h100", *EXPERTS], "can't forecast a mixture of experts"),
        (["RECIPE", "--gpu", "h100", *STUDENT_OF_EXPERTS], "fastkd: student.init "),
    ],
)
def test_what_can_not_be_forecast_is_one_line(
    given: list[str],
    said: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 4
    config = MixtralConfig(**sizes, num_hidden_layers=4, vocab_size=VOCABULARY)
    config.save_pretrained(tmp_path / "mixtral")
    names = {"RECIPE": str(path), "MIXTRAL": str(tmp_path / "mixtral")}
    arguments = [re.sub("RECIPE|MIXTRAL", lambda name: names[name[0]], one) for one in given]
    assert _doctor(*arguments, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
