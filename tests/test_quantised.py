"""A teacher whose linear layers are in eight bits: codes, products, what stays, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from device_marks import on_cpu
from tiny_models import tiny_batch, tiny_config, tiny_model
from tiny_runs import make_recipe, read_losses
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

import fastkd
from fastkd.capture import (
    CompiledCapture,
    capture,
    compiled,
    reading,
    route_attention,
    try_packed,
)
from fastkd.capture.packed_trial import in_one_row
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.models import quantised
from fastkd.models.quantised import (
    CODES,
    STATES,
    QuantisedLinear,
    multiplies_int8,
    quantise,
    quantise_rows,
    replace_linear,
)
from fastkd.recipe import load_recipe
from fastkd.training import parts, precision
from fastkd.training.chips import CHIPS
from fastkd.training.forecast import EFFICIENCY, forecast, layouts, run_dry
from fastkd.training.precision import check_eight_bits
from fastkd.training.setup import Run, set_up
from fastkd.training.teacher_cache.plan import Form, plan_cache
from fastkd.types import EightBits, Inputs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KINDS: tuple[EightBits, ...] = ("float8", "int8")
needs_vnni = pytest.mark.skipif(
    not multiplies_int8(), reason="products of int8 overflow on this processor (no VNNI)"
)
MULTIPLIED = ["float8", pytest.param("int8", marks=needs_vnni)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
            reason="needs a CUDA device that multiplies float8",
        ),
    ),
]


def grid(kind: EightBits) -> Tensor:
    """Every number that a code stands for, fp64 in order; of int8 -128 is left out."""
    if kind == "int8":
        return torch.arange(-127, 128, dtype=torch.float64)
    # a sign, four bits of exponent with a bias of 7, three of mantissa; without exponent no leading
    # one; the largest of all is not a number
    numbers = [
        sign * ((exponent > 0) + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
        for sign in (-1, 1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ]
    return torch.tensor(numbers, dtype=torch.float64).unique()


def rounded(rows: Tensor, kind: EightBits) -> Tensor:
    """Rows as what they become stands for, fp64."""
    codes, scales = quantise_rows(rows, CODES[kind])
    return codes.double() * scales.double()


def drawn(*shape: int, kind: EightBits, spread: float = 1.0) -> Tensor:
    """Numbers of which few are large, in the dtype of a kind."""
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = torch.randn(shape, generator=generator)
    return (numbers * torch.exp(spread * torch.randn(shape, generator=generator))).to(STATES[kind])


def layer(kind: EightBits, rows: int = 32, columns: int = 48, bias: bool = True) -> QuantisedLinear:
    given = nn.Parameter(drawn(rows, kind=kind), requires_grad=False) if bias else None
    return QuantisedLinear(drawn(rows, columns, kind=kind), given, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_becomes_the_nearest_codes_of_its_own_scale(kind: EightBits) -> None:
    rows = drawn(40, 64, kind=kind, spread=2.0)
    rows[3] = 0
    rows[4, 5] = 1e4
    codes, scales = quantise_rows(rows, CODES[kind])
    numbers, exact = grid(kind), rows.double()
    expected = exact.abs().amax(-1, keepdim=True) / numbers.max()
    torch.testing.assert_close(scales.double(), expected, rtol=1e-6, atol=1e-37)
    scaled = exact / expected.clamp(min=1e-37)
    distances = (scaled.unsqueeze(-1) - numbers).abs().amin(-1)
    assert codes.dtype == CODES[kind] and torch.isin(codes.double(), numbers).all()
    # halfway between two, either is the nearest
    assert ((codes.double() - scaled).abs() <= distances + 1e-6 * scaled.abs()).all()
    # whatever outliers other rows have, each uses all codes; one of zeros stays zero
    most = codes.double().abs().amax(-1)
    assert most[3] == 0 and (most == numbers.max()).sum() == 39


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_in_its_row(kind: EightBits, broken: float) -> None:
    states = drawn(3, 48, kind=kind)
    states[1, 7] = broken
    made = layer(kind)(states)
    assert not made[1].isfinite().any() and made[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MULTIPLIED)
def test_a_layer_multiplies_codes_exactly(kind: EightBits, bias: bool, device: str) -> None:
    """But for rounding the sum: half a unit of bf16, or fp32's sums."""
    if device == "cuda" and kind == "int8":
        pytest.skip("int8 is for CPUs")
    linear, states = layer(kind, bias=bias), drawn(2, 5, 48, kind=kind)
    left, right = rounded(states, kind), rounded(drawn(32, 48, kind=kind), kind)
    expected, size = left @ right.T, left.abs() @ right.abs().T
    if bias:
        expected = expected + drawn(32, kind=kind).double()
        size = size + drawn(32, kind=kind).double().abs()
    found = linear.to(device)(states.to(device))
    assert found.dtype == STATES[kind] and found.shape == (2, 5, 32)
    unit = torch.finfo(STATES[kind]).eps / 2
    # tensor cores keep 13 bits of a partial sum
    sums = 2.0**-13 if device == "cuda" else 2.0**-20
    error = (found.cpu().double() - expected).abs()
    assert (error <= 1.01 * unit * expected.abs() + sums * size).all()


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("sizes", [(768, 3072), (3072, 768), (9216, 3072)])
@pytest.mark.parametrize("rows", [1, 8, 12, 16, 127, 257])
def test_a_gpu_multiplies_any_number_of_rows(
    rows: int, sizes: tuple[int, int], device: str
) -> None:
    width, outputs = sizes
    weight, states = drawn(outputs, width, kind="float8"), drawn(rows, width, kind="float8")
    bias = nn.Parameter(drawn(outputs, kind="float8"), requires_grad=False)
    linear = QuantisedLinear(weight, bias, "float8")
    expected = linear.to(device)(states.to(device).repeat(512 // rows, 1))[:rows]
    found = linear(states.to(device))
    # other blocks add up in another order
    assert (found - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_a_layer_is_the_plain_one_up_to_its_bits(kind: EightBits) -> None:
    """Three bits of mantissa are wrong by a 16th at most, or, next to zero, by half of 2^-9 codes;
    eight bits in even steps by half a step."""
    states, weight = drawn(20, 48, kind=kind).double(), drawn(32, 48, kind=kind).double()
    found = QuantisedLinear(weight.to(STATES[kind]), None, kind)(states.to(STATES[kind])).double()

    def wrong_by(rows: Tensor) -> Tensor:
        step = rows.abs().amax(-1, keepdim=True) / grid(kind).max()
        return torch.maximum(rows.abs() / 16, step * 2**-10) if kind == "float8" else step / 2

    one, other = wrong_by(states).expand_as(states), wrong_by(weight).expand_as(weight)
    bound = one @ weight.abs().T + states.abs() @ other.T + one @ other.T
    plain = states @ weight.T
    error = (found - plain).abs()
    assert (error <= bound + 2**-7 * plain.abs()).all()
    # and by a good part of that
    assert error.max() > 0.02 * bound.max()


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_states_may_lie_anyhow(kind: EightBits) -> None:
    linear, states = layer(kind), drawn(6, 4, 48, kind=kind)
    expected = linear(states)
    assert torch.equal(linear(states.transpose(0, 1)), expected.transpose(0, 1))
    turned = states[0].T.contiguous().T
    assert torch.equal(linear(turned), expected[0])
    # tensor cores read rows of codes
    assert quantise_rows(turned, CODES[kind])[0].is_contiguous()


class Parts(PreTrainedModel):
    """Layers of every kind that stays, and two that don't."""

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.plain = self.same = nn.Linear(32, 48)
        self.turned = Conv1D(64, 32)
        self.labels = nn.Linear(32, 3)
        self.narrow = nn.Linear(24, 32)
        self.exact = nn.Linear(32, 32).double()
        self.subclass = type("Other", (nn.Linear,), {})(32, 32)
        self.table = nn.Embedding(64, 32)
        self.tied = nn.Linear(32, 64, bias=False)
        self.tied.weight = self.table.weight


@needs_vnni
def test_what_is_no_large_product_stays() -> None:
    model = Parts()
    turned = model.turned
    assert replace_linear(model, "int8") == (2, 6)
    assert isinstance(model.plain, QuantisedLinear) and model.same is model.plain
    for name in ("labels", "narrow", "exact", "subclass", "tied"):
        assert isinstance(getattr(model, name), nn.Linear), name
    states = drawn(5, 32, kind="int8")
    torch.testing.assert_close(model.turned(states), turned(states), atol=2e-2, rtol=0)


@needs_vnni
def test_the_head_of_a_language_model_stays_for_the_losses() -> None:
    config = tiny_config("llama", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    route_attention(model)
    found = quantise(model, "int8", CPU)
    assert found.layers == found.linear == 28 and isinstance(model.lm_head, nn.Linear)
    with capture(model, logits=True) as states:
        model(**tiny_batch((8, 5)), use_cache=False)
    assert states.logits is not None and states.logits.weight is model.lm_head.weight


def test_experts_that_are_stacked_stay_with_a_word() -> None:
    config = Qwen3MoeConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
        **{"moe_intermediate_size": 48, "num_experts_per_tok": 2},
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    route_attention(model)
    before = [layer.mlp.experts.gate_up_proj for layer in model.layers]
    found = quantise(model, "int8", CPU)
    assert [layer.mlp.experts.gate_up_proj for layer in model.layers] == before
    attention, experts, router = 4 * 32 * 32, 8 * 3 * 32 * 48, 8 * 32
    norms = 2 * 32 + 2 * 8
    whole = 64 * 32 + 2 * (attention + experts + router + norms) + 32
    assert found.share == pytest.approx(2 * attention / whole)
    said = f"int8 in 8 of 8 linear layers ({2 * attention / whole:.0%} of its weights; stacked"
    assert str(found).startswith(f"{said} experts stay), which moves the last state of ")


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
@pytest.mark.parametrize("kind", MULTIPLIED)
def test_states_of_a_model_stay_near(kind: EightBits, name: str) -> None:
    model = tiny_model(name).to(STATES[kind]).eval().requires_grad_(False)
    route_attention(model)
    batch = tiny_batch((12, 7))
    mask = batch["attention_mask"].bool()
    with capture(model, attention={1}, hidden={0, 4}) as before:
        model(**batch)
    found = quantise(model, kind, CPU)
    assert f"{kind} in {found.layers} of {found.linear} linear layers (" in str(found)
    assert "experts" not in str(found)
    with capture(model, attention={1}, hidden={0, 4}) as after:
        model(**batch)
    assert torch.equal(after.hidden[0], before.hidden[0])
    pairs = [(after.hidden[4], before.hidden[4]), (after.attention[1].query, None)]
    assert all(state.dtype == STATES[kind] for state, _ in pairs)
    moved = (after.hidden[4] - before.hidden[4])[mask].norm() / before.hidden[4][mask].norm()
    # weights of these models are drawn wide
    assert 0.002 < moved < (0.2 if kind == "float8" else 0.04)
    assert 0.3 * found.difference < moved < 3 * found.difference


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_a_compiled_teacher_gives_the_same(
    kind: EightBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    model = tiny_model("bert", num_hidden_layers=1).to(STATES[kind]).eval().requires_grad_(False)
    route_attention(model)
    quantise(model, kind, CPU)
    with torch.no_grad(), CompiledCapture(model, {"hidden": {1}}) as recorded:
        for lengths in ((8, 5), (12, 7, 3)):
            batch = tiny_batch(lengths)
            with capture(model, hidden={1}) as expected:
                model(**batch)
            torch.testing.assert_close(recorded(batch).hidden[1], expected.hidden[1])
    torch._dynamo.reset()


@needs_vnni
@on_cpu
@pytest.mark.parametrize("name", ["bert", "llama", "modernbert", "gpt2"])
def test_a_packed_row_is_multiplied_as_a_padded_batch(name: str) -> None:
    model = tiny_model(name).float().eval().requires_grad_(False)
    route_attention(model)
    padded, packed = copy.deepcopy(model), copy.deepcopy(model)
    try_packed(packed)
    for one in (padded, packed):
        assert quantise(one, "int8", CPU).layers
    batch = tiny_batch((12, 7, 3))
    row, mask = in_one_row(batch), batch["attention_mask"].bool()

    def last_state(model: PreTrainedModel, inputs: Inputs) -> Tensor:
        with torch.no_grad(), reading(model, inputs) as read, capture(model, outputs=True) as seen:
            model(**read)
        assert seen.outputs is not None
        return seen.outputs[mask]

    ours, theirs, exact = (
        last_state(packed, row),
        last_state(padded, batch),
        last_state(model, batch),
    )
    # a number on the edge of two codes may become either
    assert (ours - theirs).norm() <= 0.1 * (theirs - exact).norm()


class Reader(nn.Module):
    """A block's part that reads a weight beside its layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.dense = inner.dense

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.gelu(nn.functional.linear(states, self.dense.weight, self.dense.bias))


@needs_vnni
def test_a_model_that_can_not_run_in_eight_bits_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("bert").eval()
    model.encoder.layer[1].intermediate = Reader(model.encoder.layer[1].intermediate)
    route_attention(model)
    with pytest.raises(
        UserError,
        match=r"^teacher.dtype is int8, but BertModel can't run in it \(AttributeError: .*weight"
        r"'\); give teacher.dtype float32$",
    ):
        quantise(model, "int8", CPU)
    model = tiny_model("bert").eval()
    route_attention(model)
    model.encoder.layer[1].output.dense.bias.data[3] = torch.nan
    with pytest.raises(UserError, match=r"last state of BertModel on random tokens by nan of its"):
        quantise(model, "int8", CPU)
    model = tiny_model("bert").eval()
    route_attention(model)
    monkeypatch.setattr(quantised, "MOST_MOVED", 1e-3)
    with pytest.raises(UserError, match=r"by 0.0\d+ of its norm, expected less than 0.001; give"):
        quantise(model, "int8", CPU)
    odd = tiny_model("bert", hidden_size=24, intermediate_size=36).eval()
    route_attention(odd)
    with pytest.raises(UserError, match="none of the 25 linear layers of BertModel has a width"):
        quantise(odd, "int8", CPU)


def test_products_that_overflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a processor without VNNI: two in sixteen bits, one of the sides moved by 128."""

    def pairs(left: Tensor, right: Tensor) -> Tensor:
        products = (left.int() + 128)[:, :, None] * right.int()
        sums = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return sums.sum(1).int() - 128 * right.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", pairs)
    with pytest.raises(UserError, match=r"overflow on this processor, .* no VNNI; give float32$"):
        check_eight_bits("int8", CPU)


@on_cpu
def test_where_eight_bits_are_not_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = r"expected a GPU of compute capability 8.9 or more \(L4, H100, H200\); give"
    recipe = make_recipe(tmp_path)
    with pytest.raises(
        UserError, match=f"is float8, but this run is on a CPU, {expected} int8 or float32$"
    ):
        fastkd.distill(recipe, {"teacher.dtype": "float8"}, quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is int8, which CPUs multiply, but this run is on a GPU"):
        check_eight_bits("int8", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with pytest.raises(
        UserError, match=f"but NVIDIA A100 has compute capability 8.0, {expected} bfloat16$"
    ):
        check_eight_bits("float8", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (12, 0))
    check_eight_bits("float8", GPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UserError, match=f"but this torch is of ROCm 6.4, {expected} bfloat16$"):
        check_eight_bits("float8", GPU)
    with pytest.raises(UserError, match="dtype is int8, but placement is shard, which shards"):
        load_recipe(recipe, ["teacher.dtype=int8", "teacher.placement=shard"])


def opened(path: Path, *overrides: str) -> Run:
    with joined_ranks() as ranks:
        return set_up(load_recipe(path, list(overrides)), ranks, progress=False)


@needs_vnni
@on_cpu
def test_a_run_whose_teacher_is_in_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(tmp_path)
    # a CPU multiplies float8 too, slowly
    monkeypatch.setattr(parts, "check_eight_bits", lambda *_: None)
    losses = {}
    matrices = 4 * (4 * 32 * 32 + 2 * 32 * 48)
    share = matrices / opened(path).teacher_parameters
    for dtype in ("float32", "int8", "bfloat16", "float8"):
        output = tmp_path / dtype
        fastkd.distill(path, {"teacher.dtype": dtype, "run.output": output})
        losses[dtype] = read_losses(output)
        said = f"teacher: {dtype} in 24 of 24 linear layers ({share:.0%} of its weights), which"
        assert (said in capsys.readouterr().out) == (dtype in KINDS)
        assert load_recipe(output / "recipe.yaml").teacher.dtype == dtype
    for dtype, plain, near in (("int8", "float32", 0.05), ("float8", "bfloat16", 0.15)):
        for found, expected in zip(losses[dtype], losses[plain], strict=True):
            assert found != expected
            assert found == pytest.approx(expected, rel=near), (dtype, found, expected)


@needs_vnni
@on_cpu
def test_states_of_eight_bits_are_stored_and_recomputed(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    losses = {}
    for attention in ("none", "stored", "recomputed"):
        given = {"teacher.dtype": "int8", "run.output": tmp_path / attention}
        if attention != "none":
            given |= {"teacher.cache": "exact", "teacher.cache_attention": attention}
        fastkd.distill(path, {**given, "teacher.cache_folder": tmp_path / "states"}, quiet=True)
        losses[attention] = read_losses(tmp_path / attention)
    for attention in ("stored", "recomputed"):
        # a state that rounds otherwise in another batch may be another code
        for found, expected in zip(losses[attention], losses["none"], strict=True):
            assert found == pytest.approx(expected, rel=5e-3), attention


@needs_vnni
@on_cpu
def test_memory_and_stored_states_are_those_of_eight_bits(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    plain, found = (opened(path, f"teacher.dtype={dtype}") for dtype in ("float32", "int8"))
    assert found.teacher_parameters == plain.teacher_parameters
    assert plain.teacher_bytes == 4 * plain.teacher_parameters
    rounded = sum(
        module.codes.numel()
        for module in found.teacher_model.modules()  # type: ignore[union-attr]
        if isinstance(module, QuantisedLinear)
    )
    assert rounded == 4 * (4 * 32 * 32 + 2 * 32 * 48)
    assert found.teacher_bytes == plain.teacher_bytes - 3 * rounded
    # a student starts from the weights as they were
    mine, theirs = (dict(run.module.student.named_parameters()) for run in (plain, found))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    plans = [plan_cache(run, Form("exact", "stored")) for run in (plain, found)]
    assert plans[0].folder != plans[1].folder and plans[0].layout.fields == plans[1].layout.fields


def test_a_forecast_knows_eight_bits(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    recipes = [
        load_recipe(path, ["train.precision=bf16", f"teacher.dtype={dtype}"])
        for dtype in ("bfloat16", "float8")
    ]
    plain, rounded = (run_dry(recipe, 4) for recipe in recipes)
    matrices = 4 * (4 * 32 * 32 + 2 * 32 * 48)
    assert rounded.teacher_numbers == plain.teacher_numbers
    assert rounded.teacher_bytes == plain.teacher_bytes - matrices
    assert plain.teacher.float8 == 0
    assert rounded.teacher.float8 == rounded.teacher.products == plain.teacher.products
    chip = CHIPS["h100"]
    assert chip.float8 is not None
    before, after = (
        forecast(recipe, passes, chip, 1)
        for recipe, passes in zip(recipes, (plain, rounded), strict=True)
    )
    assert after.parts["teacher weights"] == rounded.teacher_bytes
    saved = plain.teacher.products * (1 / chip.half - 1 / chip.float8) / EFFICIENCY
    times = recipes[0].train.batch_size / 4
    assert before.computing - after.computing == pytest.approx(saved * times)
    assert after.parts["the teacher at work"] > before.parts["the teacher at work"]
    # what would be refused is not advised
    for recipe, advised in zip(recipes, (True, False), strict=True):
        tried = " ".join(overrides for overrides, _ in layouts(recipe, 2))
        assert ("placement" in tried) == advised and "zero_stage" in tried
    with pytest.raises(UserError, match="float8, which an A100 80 GB SXM does not multiply; give"):
        forecast(recipes[1], rounded, CHIPS["a100"], 1)
    with pytest.raises(UserError, match="is int8, which CPUs multiply; give float8 or bfloat16"):
        forecast(load_recipe(path, ["teacher.dtype=int8"]), rounded, chip, 1)
    assert precision.precision_on_gpus(recipes[1]).teacher.dtype == "float8"
