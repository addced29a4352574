"""DeepSpeed's configuration says what the recipe says, and nothing contradicts it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_training import fastkd

from fastkd.data.batching import plan_batches
from fastkd.errors import UserError
from fastkd.recipe import Recipe, parse_recipe
from fastkd.training.deepspeed_config import (
    check_packages,
    deepspeed_of_student,
    deepspeed_of_teacher,
)


def make_recipe(deepspeed: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    """A recipe with these sections over the smallest one."""
    base: dict[str, dict[str, Any]] = {
        "teacher": {"model": "teacher"},
        "student": {"layers": 2},
        "losses": {"hidden": {}},
        "data": {"train": "text.txt"},
        "train": {},
        "run": {"output": "run"},
    }
    tree = {name: {**given, **sections.get(name, {})} for name, given in base.items()}
    return parse_recipe({**tree, "deepspeed": deepspeed or {}})


def configure(deepspeed: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Any:
    recipe = make_recipe(deepspeed, **sections)
    return deepspeed_of_student(recipe, plan_batches(recipe, 1))


@pytest.mark.parametrize(
    ("batch", "micro", "ranks"),
    [(32, None, 1), (32, 8, 1), (32, 1, 4), (24, 2, 3), (6, None, 6), (30, 5, 2)],
)
def test_rows_cut_the_batch_into_equal_parts(batch: int, micro: int | None, ranks: int) -> None:
    recipe = make_recipe(train={"batch_size": batch, "micro_batch_size": micro})
    plan = plan_batches(recipe, ranks)
    assert plan.micro_batch_size == (micro or batch // ranks)
    slices = [plan.rows(rank) for rank in range(ranks)]
    assert {part.stop - part.start for part in slices} == {
        plan.micro_batch_size * plan.accumulation
    }
    assert sorted(row for part in slices for row in range(batch)[part]) == list(range(batch))


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (32, None, 3, "train.batch_size is 32, expected a multiple of the 3 ranks; try 33"),
        (2, None, 4, "train.batch_size is 2, expected a multiple of the 4 ranks; try 4"),
        (32, 5, 1, "train.micro_batch_size is 5, expected a divisor of the 32 rows"),
        (32, 16, 4, "train.micro_batch_size is 16, expected a divisor of the 8 rows"),
    ],
)
def test_batches_that_cannot_be_cut_say_why(
    batch: int, micro: int | None, ranks: int, expected: str
) -> None:
    recipe = make_recipe(train={"batch_size": batch, "micro_batch_size": micro})
    with pytest.raises(UserError, match=expected):
        plan_batches(recipe, ranks)


@pytest.mark.parametrize("norm", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_recipe_decides_is_always_written_out(
    norm: float, precision: str, stage: int
) -> None:
    train = {"max_grad_norm": norm, "precision": precision, "zero_stage": stage}
    config = configure(train={**train, "batch_size": 8, "micro_batch_size": 2})
    assert config["gradient_clipping"] == norm
    assert config["bf16"] == {"enabled": precision == "bf16"}
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4


def test_bf16_gradients_are_accumulated_in_fp32() -> None:
    assert configure(train={"precision": "bf16"})["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in configure(train={"precision": "fp32"})


def test_zero_3_gathers_the_weights_that_are_saved() -> None:
    key = "stage3_gather_16bit_weights_on_model_save"
    assert configure(train={"zero_stage": 3})["zero_optimization"][key] is True
    assert key not in configure(train={"zero_stage": 2})["zero_optimization"]


def test_zero_3_leaves_torchs_linear_alone_unless_it_is_asked_to() -> None:
    key = "memory_efficient_linear"
    assert configure(train={"zero_stage": 3})["zero_optimization"][key] is False
    given = {"zero_optimization": {key: True}}
    assert configure(given, train={"zero_stage": 3})["zero_optimization"][key] is True


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_old_names_of_offloading_are_refused(name: str) -> None:
    old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}[name]
    with pytest.raises(UserError, match=rf"{old} is given.* give {name}: {{device: cpu}}"):
        configure(deepspeed={"zero_optimization": {old: True}})


def test_what_a_checkpoint_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"offload_optimizer.device is nvme.*give cpu"):
        configure(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "nvme"}}})
    # it would read pickles
    with pytest.raises(UserError, match=r"deepspeed.checkpoint is given"):
        configure(deepspeed={"checkpoint": {"load_universal": True}})
    for key, value in (("zenflow", {"topk_ratio": 0.1}), ("mics_shard_size", 2)):
        with pytest.raises(UserError, match=rf"zero_optimization.{key} is given.*leave it out"):
            configure(deepspeed={"zero_optimization": {key: value}})
    for key, value in (("ratio", 0.5), ("super_offload", True)):
        offload = {"device": "cpu", key: value}
        with pytest.raises(UserError, match=rf"offload_optimizer.{key} is given.*leave it out"):
            configure(deepspeed={"zero_optimization": {"offload_optimizer": offload}})


@pytest.mark.parametrize("monitor", ["tensorboard", "wandb"])
def test_a_monitor_is_switched_on_by_name(monitor: str) -> None:
    assert configure(run={"monitor": monitor})[monitor]["enabled"] is True
    assert monitor not in configure()
    # of trackio DeepSpeed knows nothing
    assert configure(run={"monitor": "trackio"}) == configure()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gradient_clipping": 1.0}, "deepspeed.gradient_clipping .* train.max_grad_norm"),
        ({"train_batch_size": 8}, "deepspeed.train_batch_size .* train.batch_size"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "deepspeed.train_micro_batch_size_per_gpu .* train.micro_batch_size",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "deepspeed.gradient_accumulation_steps .* train.batch_size and train.micro_batch_size",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "deepspeed.zero_optimization.stage .* train.zero_stage",
        ),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization .* train.zero_stage"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "deepspeed.data_types.* train.precision"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "deepspeed.data_types.* train.precision"),
        ({"bf16": {"enabled": True}}, "deepspeed.bf16 .* train.precision"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "deepspeed.bf16 .* train.precision"),
        ({"bf16": True}, "deepspeed.bf16 .* train.precision"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16 .* train.precision"),
        ({"fp16": True}, "deepspeed.fp16 .* train.precision"),
        ({"torch_autocast": {"enabled": True}}, "deepspeed.torch_autocast .* train.precision"),
        ({"managed_gradient_accumulation": False}, "_accumulation .* train.micro_batch_size"),
        ({"gradient_allreduce_op": "sum"}, "deepspeed.gradient_allreduce_op .* train.batch_size"),
        ({"gradient_predivide_factor": 2}, "deepspeed.gradient_predivide.* train.batch_size"),
        ({"sequence_parallel_size": 2}, "deepspeed.sequence_parallel.* train.batch_size"),
        ({"data_parallel_size": 2}, "deepspeed.data_parallel.* train.batch_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "deepspeed.tensor_parallel.* train.batch_size"),
        ({"expert_parallel": {"enabled": True}}, "deepspeed.expert_parallel.* train.batch_size"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer.* train.learning_rate"),
        ({"optimizer": "Adam"}, "deepspeed.optimizer .* train.learning_rate"),
        ({"optimizer": {"params": {"lr": 1}}}, "deepspeed.optimizer.* train.learning_rate"),
        ({"scheduler": {"type": "OneCycle"}}, "deepspeed.scheduler.* train.schedule"),
        ({"zero_force_ds_cpu_optimizer": True}, "deepspeed.zero_force_ds_cpu_optimizer"),
    ],
)
def test_a_key_that_the_recipe_decides_is_refused_with_its_field(
    given: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        configure(given)


@pytest.mark.parametrize("monitor", ["none", "tensorboard", "wandb"])
@pytest.mark.parametrize("given", ["tensorboard", "wandb"])
def test_a_monitor_is_decided_by_the_recipe(given: str, monitor: str) -> None:
    with pytest.raises(UserError, match=rf"deepspeed\.{given}.* run\.monitor"):
        configure({given: {"enabled": False}}, run={"monitor": monitor})


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *at: None if name in packages else found(name)
    )


@pytest.mark.parametrize("monitor", ["tensorboard", "trackio", "wandb"])
@pytest.mark.parametrize("stages", [False, True])
def test_a_monitor_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    monitor: str,
    stages: bool,
) -> None:
    without(monkeypatch, monitor)
    recipe = make_recipe(run={"output": str(tmp_path / "run"), "monitor": monitor})
    tree = recipe.model_dump(mode="json", exclude_unset=True, exclude={"deepspeed"})
    if stages:
        tree["stages"] = [{"train": {"steps": 5}}, {"train": {"steps": 6}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert fastkd("distill", str(tmp_path / "recipe.yaml"), monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == (
        f"fastkd: run.monitor={monitor} needs {monitor}; "
        f"pip install 'fastkd[{monitor}]', or run.monitor=none\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_tracker_of_the_deepspeed_section_must_be_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_packages(make_recipe({"comet": {"enabled": False}}))
    without(monkeypatch, "comet_ml")
    with pytest.raises(UserError, match=r"deepspeed\.comet needs comet-ml; pip install comet-ml"):
        check_packages(make_recipe({"comet": {"enabled": True}}))


def test_the_folder_that_a_tracker_leaves_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if importlib.util.find_spec("wandb").origin is not None:  # type: ignore[union-attr]
        pytest.skip("wandb is installed")
    with pytest.raises(
        UserError, match=r"run.monitor=wandb needs wandb; pip install 'fastkd\[wandb\]'"
    ):
        check_packages(make_recipe(run={"monitor": "wandb"}))


def test_a_monitor_that_is_there_is_taken() -> None:
    check_packages(make_recipe(run={"monitor": "tensorboard"}))


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


FREE = {
    ("communication_data_type",),
    ("steps_per_print",),
    ("wandb", "project"),
    ("zero_optimization", "memory_efficient_linear"),
    ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"),
}


@pytest.mark.parametrize("monitor", ["tensorboard", "wandb"])
def test_no_key_that_fastkd_writes_can_be_changed_from_the_side(monitor: str) -> None:
    settings = {"train": {"precision": "bf16", "zero_stage": 3}, "run": {"monitor": monitor}}
    for path in set(leaves(configure(**settings))) - FREE:
        given: Any = "other"
        for key in reversed(path):
            given = {key: given}
        with pytest.raises(UserError, match=rf"deepspeed\.{path[0]}.* the recipe decides it by"):
            configure(given, **settings)


def test_further_keys_are_passed_through() -> None:
    given = {
        "zero_optimization": {"overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "communication_data_type": "fp32",
        "wandb": {"project": "mine"},
        "steps_per_print": 5,
    }
    config = configure(given, train={"zero_stage": 2}, run={"monitor": "wandb"})
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu"},
    }
    assert config["communication_data_type"] == "fp32"
    assert config["wandb"] == {"enabled": True, "project": "mine"}
    assert config["steps_per_print"] == 5


def test_the_recipe_is_not_changed_by_the_configuration() -> None:
    recipe = make_recipe({"zero_optimization": {"overlap_comm": True}})
    config = deepspeed_of_student(recipe, plan_batches(recipe, 1))
    config["zero_optimization"]["overlap_comm"] = False
    assert recipe.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [("float32", False, False), ("bfloat16", True, False), ("float16", False, True)],
)
@pytest.mark.parametrize("placement", ["shard", "offload"])
def test_a_sharded_teacher_keeps_its_dtype_and_has_no_optimiser(
    placement: str, dtype: str, bf16: bool, fp16: bool
) -> None:
    config = deepspeed_of_teacher(make_recipe(teacher={"placement": placement, "dtype": dtype}))
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["memory_efficient_linear"] is False
    assert zero.get("offload_param") == ({"device": "cpu"} if placement == "offload" else None)
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (bf16, fp16)
    assert not {"optimizer", "scheduler"} & config.keys()
    assert "gradient_clipping" in config
