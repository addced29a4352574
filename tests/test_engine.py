"""How a step is cut, sharded or placed must not matter: one baseline, many variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, keys, make_recipe, read_losses, read_weights, run_variants
from tiny_training import summary_of
from transformers import get_scheduler

from fastkd.data.factory import text_settings
from fastkd.data.text import prepare_corpus
from fastkd.layer_map import make_layer_map
from fastkd.models import build_student, load_teacher, load_tokenizer
from fastkd.recipe import Recipe, load_recipe
from fastkd.training.memory import memory_parts

# asks for DeepSpeed's engine where one process would have its own
DEEPSPEED = {"deepspeed.wall_clock_breakdown": False}
# tiny parameters would otherwise stay whole on every rank
SHARDED = {"deepspeed.zero_optimization": {"stage3_param_persistence_threshold": 0}}
# by number of ranks; ZeRO-3 changes the process that it runs in, so it has one of its own
PROCESSES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (
        1,
        {
            "baseline": {},
            "stage 0": {"train.zero_stage": 0, **DEEPSPEED},
            "stage 1": {"train.zero_stage": 1, **DEEPSPEED},
            "stage 2, 4 micro-batches": {
                "train.zero_stage": 2,
                "train.micro_batch_size": 2,
                **DEEPSPEED,
            },
            "bf16, stage 2": {"train.precision": "bf16", "train.zero_stage": 2, **DEEPSPEED},
            "4 micro-batches": {"train.micro_batch_size": 2},
            "gradient checkpointing": {"student.gradient_checkpointing": True},
            "shallow": {"layer_map": "first"},
        },
    ),
    "one rank, ZeRO-3": (
        1,
        {
            "stage 3": {"train.zero_stage": 3, **SHARDED},
            "bf16, stage 3": {"train.precision": "bf16", "train.zero_stage": 3, **SHARDED},
            "stage 1, offloaded teacher": {"teacher.placement": "offload"},
        },
    ),
    "two ranks": (
        2,
        {
            "2 ranks, stage 1, 2 micro-batches": {"train.micro_batch_size": 2},
            "2 ranks, stage 0": {"train.zero_stage": 0},
        },
    ),
    "two ranks, ZeRO-3": (
        2,
        {
            "2 ranks, stage 2, sharded teacher": {
                "train.zero_stage": 2,
                "teacher.placement": "shard",
                "train.profile": True,
            },
            # the teacher stops half-way while it trains, and runs whole when it is evaluated
            "shallow, 2 ranks, sharded teacher": {
                "layer_map": "first",
                "teacher.placement": "shard",
            },
            "2 ranks, stage 3, sharded teacher": {
                "train.zero_stage": 3,
                "teacher.placement": "shard",
                "train.profile": True,
                **SHARDED,
            },
        },
    ),
}
BASELINES = ("baseline", "shallow", "bf16, stage 2")
VARIANTS = [name for _, runs in PROCESSES.values() for name in runs if name not in BASELINES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of every variant, and the recipe under its own name."""
    folder = tmp_path_factory.mktemp("engine")
    recipe = make_recipe(folder)
    found = {"recipe": recipe}
    for ranks, variants in PROCESSES.values():
        batches = []
        for name, values in variants.items():
            found[name] = folder / name.replace(" ", "-").replace(",", "")
            batches.append(keys({"run.output": str(found[name]), **values}))
        run_variants(recipe, batches, ranks=ranks)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_baseline(runs: dict[str, Path], name: str) -> None:
    if name.startswith("bf16"):
        # what rounding leaves of sums in another order
        assert_same_run(runs[name], runs["bf16, stage 2"], losses=1e-3, weights=4e-3)
        return
    baseline = "shallow" if name.startswith("shallow") else "baseline"
    assert_same_run(runs[name], runs[baseline], losses=1e-6, weights=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_profiles_its_shards_and_names_the_slowest(
    runs: dict[str, Path], stage: int
) -> None:
    run = runs[f"2 ranks, stage {stage}, sharded teacher"]
    summary = summary_of(run)
    profile, phases = summary["profile"], summary["profile"]["phases"].values()
    assert sum(phase["share"] for phase in phases) == pytest.approx(1)
    assert all(phase["slowest_milliseconds"] >= phase["milliseconds"] > 0 for phase in phases)
    numbers = sum(weight.numel() for weight in read_weights(runs["baseline"]).values())
    teacher = summary["parameters"]["teacher"]
    parts = memory_parts(load_recipe(run / "recipe.yaml"), 4 * teacher, numbers, 2)
    for name, size in parts.items():
        assert profile["memory_bytes"][name] == pytest.approx(size, rel=0.05), name


def test_baseline_equals_plain_pytorch(runs: dict[str, Path]) -> None:
    """AdamW on losses written out with full attention maps, no DeepSpeed, no kernels, no hooks."""
    recipe = load_recipe(runs["recipe"])
    losses, weights = _plain_run(recipe)
    for ours, plain in zip(read_losses(runs["baseline"]), losses, strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)
    exported = read_weights(runs["baseline"])
    # Adam divides by the root of tiny second moments, which magnifies rounding
    for name, weight in weights.items():
        torch.testing.assert_close(exported[name], weight, atol=2e-5, rtol=0, msg=name)


def _plain_run(recipe: Recipe) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(recipe.train.seed)
    teacher = load_teacher(recipe.teacher.source)
    tokenizer = load_tokenizer(recipe.teacher.source, teacher.config.vocab_size)
    student, _ = build_student(teacher, recipe.student, make_layer_map("uniform", 2, 4))
    projection = torch.nn.Linear(24, 32)
    teacher.set_attn_implementation("eager")
    student.set_attn_implementation("eager")
    parameters = [*student.parameters(), *projection.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.train.learning_rate)
    scheduler = get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=recipe.train.warmup_steps,
        num_training_steps=recipe.train.steps,
    )
    settings = text_settings(recipe.data)
    stream = prepare_corpus(settings, tokenizer, progress=False).stream(8, recipe.train.seed)
    history = []
    for _ in range(recipe.train.steps):
        ids = stream.next_batch()
        with torch.no_grad():
            theirs, their_scores = _states_and_scores(teacher, ids)
        mine, my_scores = _states_and_scores(student, ids)
        losses = {}
        for s, t in ((1, 2), (2, 4)):
            difference = my_scores[s - 1] - their_scores[t - 1]
            losses[f"attention/{s}-{t}"] = difference.square().mean()
        for s, t in ((1, 2), (2, 4)):
            losses[f"hidden/{s}-{t}"] = (projection(mine[s]) - theirs[t]).square().mean()
        losses["embedding/0-0"] = (projection(mine[0]) - theirs[0]).square().mean()
        weights = {"attention": 1.0, "hidden": 2.0, "embedding": 0.5}
        total = sum(weights[label.split("/")[0]] * loss for label, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        history.append({label: loss.item() for label, loss in losses.items()})
    weights = {name: p.detach() for name, p in student.named_parameters()}
    weights["terms.1.weight_0"] = projection.weight.detach()
    weights["terms.1.bias_0"] = projection.bias.detach()
    return history, weights


def _states_and_scores(
    model: Any, ids: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Hidden states of all layers, and scores before the softmax from the layers' own weights."""
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    scores = []
    for state, block in zip(states, model.encoder.layer, strict=False):
        attention = block.attention.self
        shape = (*ids.shape, attention.num_attention_heads, -1)
        query = attention.query(state).view(shape).transpose(1, 2)
        key = attention.key(state).view(shape).transpose(1, 2)
        scores.append(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5)
    return states, scores
