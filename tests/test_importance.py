"""Students that start from a teacher's most active channels."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, VOCABULARY, tiny_batch, tiny_config, tiny_model
from tiny_runs import make_recipe, read_weights, run_variants
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastkd
from benchmarks.family_models import family_model
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, importance, pruning
from fastkd.models.importance import Activity, start_by_importance
from fastkd.models.pruning import Widths
from fastkd.recipe import Student, load_recipe
from fastkd.training.forecast import run_dry
from fastkd.training.precision import precision_on_gpus
from fastkd.types import Head, Inputs

NARROW: dict[str, Any] = {"hidden_size": 16, "heads": 2, "intermediate_size": 24}


def pruned(
    teacher: PreTrainedModel,
    ranks: Ranks,
    *,
    layers: int = LAYERS,
    head: Head = "none",
    batches: list[Inputs] | None = None,
    **sizes: Any,
) -> PreTrainedModel:
    kept = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    layer_map = make_layer_map("uniform", layers, LAYERS)
    section = Student(layers=layers, head=head, init="importance", **sizes)
    student, _ = build_student(teacher, section, layer_map)
    read = [dict(tiny_batch())] if batches is None else batches
    copied = start_by_importance(student, teacher, layer_map, read, ranks)
    assert copied == sum(p.numel() for p in student.parameters())
    assert all(kept[name].equal(weight) for name, weight in teacher.state_dict().items())
    return student.eval()


def output(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs)[0]
    return found[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", ["bert", "distilbert", "qwen3", "gpt2"])
def test_at_full_width_it_is_the_teacher(name: str, ranks: Ranks) -> None:
    teacher = tiny_model(name)
    student, inputs = pruned(teacher, ranks), tiny_batch()
    assert output(student, inputs).equal(output(teacher, inputs))


def of_zeros(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """A teacher in which half of the channels, neurons and heads do nothing, and the channels that
    do something."""
    torch.manual_seed(0)
    # the square roots of norms have nothing added
    eps = {"bert": "layer_norm_eps", "llama": "rms_norm_eps"}[name]
    model = tiny_model(name, **{eps: 1e-12})
    kept = torch.randperm(32)[:16].sort().values
    still = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            norm = "norm" in path.lower()
            writes = path.endswith(("o_proj.weight", "down_proj.weight", "output.dense.weight"))
            if writes or path.endswith("output.dense.bias"):
                weight[still] = 0
                # BERT's norms take means off, which must not change
                weight[kept] -= weight[kept].mean(dim=0)
            elif "embed" in path and not norm:
                weight[:, still] = 0
                weight[:, kept] -= weight[:, kept].mean(dim=1, keepdim=True)
            elif norm:
                weight.fill_(0.7 if path.endswith("weight") else 0.0)
            if ("up_proj" in path) or ("intermediate.dense" in path):
                weight[torch.randperm(48)[:24]] = 0
                if weight.ndim == 1:
                    weight.fill_(0)
            if "v_proj" in path:
                # of two key heads one, which two heads read
                weight[:8] = 0
            elif "self.value" in path:
                weight[8:24] = 0
    return model, kept


@pytest.mark.parametrize(("name", "base"), [("bert", 0), ("llama", 0), ("llama", 1)])
def test_channels_that_do_nothing_are_left_out_without_a_trace(
    name: str, base: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base:
        # as Gemma's norms multiply
        monkeypatch.setattr(LlamaRMSNorm, "forward", plus_one)
    teacher, kept = of_zeros(name)
    inputs = tiny_batch(seed=1)
    expected = output(teacher, inputs)[:, kept]
    student = pruned(teacher, ranks, **NARROW)
    # rounding of either model; what a wrong norm changes is a hundred times as much
    torch.testing.assert_close(output(student, inputs), expected, atol=1e-4, rtol=1e-4)
    # a norm of fewer channels has another mean square
    monkeypatch.setattr(importance, "norm_factors", lambda *_: {})
    other = output(pruned(teacher, ranks, **NARROW), inputs)
    assert (other - expected).abs().max() > 1e-2


def plus_one(norm: Any, states: torch.Tensor) -> torch.Tensor:
    """An RMS norm that multiplies by one and its weight."""
    size = states.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon
    return (1 + norm.weight) * states * size.rsqrt()


@pytest.fixture(scope="module")
def decoder() -> tuple[PreTrainedModel, torch.Tensor]:
    """A tiny decoder that knows which word follows two others, and text of that kind."""
    generator = torch.Generator().manual_seed(0)
    rows = 10 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    text = [torch.randint(5, VOCABULARY, (320,), generator=generator)]
    for _ in range(15):
        following = (rows[text[-1]] / 2).softmax(dim=-1)
        text.append(torch.multinomial(following, 1, generator=generator)[:, 0])
    texts = torch.stack(text, dim=1)
    torch.manual_seed(0)
    config = tiny_config("llama", initializer_range=0.1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(60):
        start = step * 32 % 256
        loss_of(model, texts[start : start + 32]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval().requires_grad_(False), texts


def loss_of(model: PreTrainedModel, texts: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=texts[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())


def test_a_pruned_decoder_predicts_better_than_a_random_one(
    decoder: tuple[PreTrainedModel, torch.Tensor], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, texts = decoder
    sizes = {"head": "causal_lm", "hidden_size": 24, "intermediate_size": 32}
    read: list[Inputs] = [{"input_ids": texts[:64]}]

    def held_out() -> float:
        student = pruned(teacher, ranks, batches=read, **sizes)
        with torch.no_grad():
            return float(loss_of(student, texts[256:]))

    found = held_out()
    layers = make_layer_map("uniform", LAYERS, LAYERS)
    drawn, _ = build_student(teacher, Student(layers=LAYERS, init="random", **sizes), layers)
    with torch.no_grad():
        random_start = float(loss_of(drawn.eval(), texts[256:]))
        best = float(loss_of(teacher, texts[256:]))
    choose = importance.choose
    generator = torch.Generator().manual_seed(0)

    def at_random(activity: Activity, *given: Any) -> Any:
        noise = {
            role: torch.rand(len(values), generator=generator)
            for role, values in activity.channels.items()
        }
        return choose(Activity(noise), *given)

    monkeypatch.setattr(importance, "choose", at_random)
    random_channels = [held_out() for _ in range(3)]
    assert best < found < min(random_channels), (best, found, random_channels)
    assert found < random_start - 0.3, (found, random_start)


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
def test_heads_are_chosen_with_their_key_heads(heads: tuple[int, int], ranks: Ranks) -> None:
    teacher = tiny_model("qwen3")
    with torch.no_grad():
        for block in teacher.layers:
            # the heads of the second key head say nothing
            block.self_attn.v_proj.weight[8:] = 0
    student = pruned(teacher, ranks, heads=heads[0], kv_heads=heads[1])
    for own, whole in zip(student.layers, teacher.layers, strict=True):
        chosen, given = own.self_attn, whole.self_attn
        assert chosen.k_proj.weight.equal(given.k_proj.weight[: 8 * heads[1]])
        for name, size in (("q_proj", 0), ("o_proj", 1)):
            parts = [getattr(at, name).weight.split(8, dim=size) for at in (chosen, given)]
            places = [next(n for n, w in enumerate(parts[1]) if w.equal(p)) for p in parts[0]]
            # one head of each key head, or both of the first
            assert places == [0, 1] if heads[1] == 1 else [n // 2 for n in places] == [0, 1]


@pytest.mark.parametrize(("wanted", "expected"), [(2, [2, 3]), (1, [0])])
def test_of_groups_of_heads_those_with_the_best_heads_that_stay_are_chosen(
    wanted: int, expected: list[int]
) -> None:
    """A group of two heads is worth as many of its heads as a student's group has."""
    small, large = Widths(8, 8, wanted, 1, 1), Widths(8, 8, 4, 2, 1)
    role = ("heads", 0)
    activity = Activity({role: torch.tensor([3.0, 0.0, 2.0, 2.0])})
    kept = importance.choose(activity, {role, ("keys", 0)}, [1], small, large)
    assert kept[role].tolist() == expected and kept["keys", 0].tolist() == [expected[0] // 2]


def test_batches_add_up_and_padding_counts_for_nothing(ranks: Ranks) -> None:
    padded = tiny_batch(seed=2)
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    rows = [
        {name: values[n : n + 1, :length] for name, values in padded.items()}
        for n, length in enumerate(lengths)
    ]
    made = [
        pruned(tiny_model("llama"), ranks, batches=batches, **NARROW).state_dict()
        for batches in ([dict(padded)], rows)
    ]
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, msg=name)


def test_heads_are_worth_the_lengths_of_their_outputs() -> None:
    teacher, role = tiny_model("llama"), ("heads", 0)
    heard: list[torch.Tensor] = []
    reader = teacher.layers[0].self_attn.o_proj
    handle = reader.register_forward_hook(lambda _, given, __: heard.append(given[0]))
    roles = {"layers.0.self_attn.o_proj.weight": (None, role)}
    widths = Widths.of(teacher.config, None)
    found = importance.measure(teacher, roles, widths, [dict(tiny_batch())]).channels[role]
    handle.remove()
    states = heard[0][tiny_batch()["attention_mask"].bool()].double()
    expected = states.unflatten(1, (widths.heads, -1)).norm(dim=2).sum(dim=0)
    torch.testing.assert_close(found, expected)


REFUSED = {
    "heads of another size": (
        "bert",
        {"hidden_size": 24},
        "heads of the student would be 6 wide, those of the teacher are 8, and heads are kept "
        "whole; give student.heads=3",
    ),
    "more key heads": ("llama", {"kv_heads": 4}, "student.kv_heads is 4, but the teacher has 2 to"),
    "wider": ("bert", {"intermediate_size": 64}, "student.intermediate_size is 64, but the teach"),
    "one matrix for three": ("modernbert", NARROW, "layers.0.attn.Wqkv.weight of ModernBertModel"),
    "a layer of its own kind": ("gpt2", NARROW, "no linear layer behind its attention"),
    "neurons that no layer reads": ("gpt2", {"intermediate_size": 24}, "no linear layer reads the"),
    "more heads on a key head": ("llama", {"kv_heads": 1}, "4 heads on 1 key heads are more on ea"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_cut_is_refused(name: str, ranks: Ranks) -> None:
    family, sizes, said = REFUSED[name]
    with pytest.raises(UserError) as refused:
        pruned(tiny_model(family), ranks, **sizes)
    assert str(refused.value).startswith("student.init importance: ") and said in str(refused.value)


def test_embeddings_that_are_scaled_by_the_width_are_refused(ranks: Ranks) -> None:
    teacher = family_model("gemma2")
    layers = make_layer_map("uniform", 2, teacher.config.num_hidden_layers)
    width = teacher.config.hidden_size
    section = {"layers": 2, "init": "importance", "attention": "eager"}
    for size in (width, width // 2):
        student, _ = build_student(teacher, Student(**section, hidden_size=size), layers)
        said = pytest.raises(UserError, match=r"Gemma2Model multiplies embeddings by [\d.]+, a stu")
        with nullcontext() if size == width else said:
            start_by_importance(student, teacher, layers, [], ranks)


def test_channels_that_are_taken_for_others_are_found_out(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = pruning.Projections(frozenset(), "")
    monkeypatch.setattr(pruning, "find_projections", lambda _: [nothing] * LAYERS)
    # heads are as wide as the hidden state, and are taken for it
    with pytest.raises(UserError, match="gives something else when its channels stand in another"):
        pruned(tiny_model("bert"), ranks, **NARROW)


def test_a_run_starts_the_same_on_any_ranks_and_goes_on_in_stages(tmp_path: Path) -> None:
    student = {"layers": 2, "hidden_size": 24, "intermediate_size": 32, "init": "importance"}
    path = make_recipe(tmp_path, "llama", student=student, train={"warmup_steps": 0})
    tree = {"stages": [{"train": {"steps": 1}}, {"train": {"steps": 1}}]}
    result = fastkd.distill(path, tree, quiet=True)
    run_variants(path, [[f"run.output={tmp_path / 'two'}", "train.steps=1"]], ranks=2)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["before"]["losses"] == pytest.approx(result.summary["before"]["losses"], 1e-5)
    assert result.student.config.head_dim == 8
    # a forecast from shapes alone counts the same
    dry = run_dry(precision_on_gpus(load_recipe(path)), 2)
    trained = read_weights(tmp_path / "two").values()
    assert dry.trained_numbers == sum(weight.numel() for weight in trained)
