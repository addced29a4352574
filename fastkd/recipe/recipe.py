"""All sections together, and what must agree between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from fastkd.head_spec import HEADS, head_of_task
from fastkd.layer_map.sections import Layers, PairsSection
from fastkd.plugins import plugin_errors
from fastkd.recipe.data import Data
from fastkd.recipe.evaluate import Evaluate
from fastkd.recipe.losses import Losses
from fastkd.recipe.models import Student, Teacher
from fastkd.recipe.presets import Preset
from fastkd.recipe.task import TaskData, check_padding, check_predictions
from fastkd.recipe.train import RunOutput, Train, check_steering, check_train
from fastkd.row_form import RowForm
from fastkd.section import Extras, Plugins, Section


class Recipe(Section):
    """Everything about a run."""

    preset: Preset | None = None
    """Published method whose settings stand where this recipe gives none."""
    plugins: Plugins = ()
    """Modules that register losses or layer maps; imported before the rest is read."""
    teacher: Teacher
    """The model to learn from."""
    student: Student
    """The model to make."""
    layer_map: Layers = "uniform"
    """Which teacher layer each student layer learns from: a word, a section for a mapping with
    options, a list that names one teacher layer for each student layer, 0 for none, or a list of
    pairs, [student layer, teacher layer]."""
    losses: Losses
    """What is matched; of the first stage where not given."""
    data: Data | None = None
    """Text that both models read."""
    task: TaskData | None = None
    """Examples with labels that both models read, in place of text."""
    evaluate: Evaluate | None = None
    """What else both models' embeddings are scored on, at every evaluation."""
    train: Train = Train()
    """How it is trained."""
    run: RunOutput
    """Where it is written."""
    stages: tuple[Extras, ...] = ()
    """Stages of the run, one after the other. What a stage says of `losses` or `layer_map` stands
    in place of all that the recipe says there, of `train` and `task` key by key. Stages after the
    first read the data in orders of their own, unless they give a seed."""
    deepspeed: Extras = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration; those that the recipe sets itself are refused."""

    @model_validator(mode="before")
    @classmethod
    def _first_losses(cls, tree: Any) -> Any:
        stages = tree.get("stages") if isinstance(tree, Mapping) else None
        if not isinstance(stages, list | tuple) or not stages or "losses" in tree:
            return tree
        first = stages[0]
        given = isinstance(first, Mapping) and "losses" in first
        return {**tree, "losses": first["losses"]} if given else tree

    @model_validator(mode="before")
    @classmethod
    def _head_of_a_task(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or tree.get("task") is None:
            return tree
        student, task = tree.get("student"), tree["task"]
        if not isinstance(student, Mapping) or "head" in student:
            return tree
        return {**tree, "student": {**student, "head": head_of_task(task)}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data is None and self.task is None:
            raise ValueError("data: missing; give data (text) or task (examples with labels)")
        if self.data is not None and self.task is not None:
            raise ValueError(
                "data and task are both given; give data (text) or task (examples with labels)"
            )
        if self.teacher.others and self.task is not None:
            raise ValueError(
                "teacher.others are given, but a task is learned from one teacher; leave others "
                "out, or give data"
            )
        self._check_maps()
        self._check_head()
        reason = self.why_not_cached()
        if self.teacher.cache != "none" and reason is not None:
            raise ValueError(
                f"teacher.cache is {self.teacher.cache}, but {reason}; leave teacher.cache out"
            )
        check_train(self.train)
        check_steering(self.train, self.run)
        self._check_rows()
        self._check_evaluate()
        check_padding(
            self.task,
            self.train,
            {
                "student.attention": self.student.attention,
                "teacher.attention": self.teacher.attention,
            },
        )
        self._check_task()
        if self.train.compile and self.teacher.placement != "replicate":
            raise ValueError(
                f"train.compile is on and teacher.placement {self.teacher.placement}, which "
                "gathers weights between the layers of a graph; use replicate, or leave compile out"
            )
        if self.train.cuda_graph and self.teacher.overlap:
            raise ValueError(
                "train.cuda_graph and teacher.overlap are on, but a graph holds both models in "
                "turn; leave one of them out"
            )
        return self

    def _check_task(self) -> None:
        check_predictions(self.task, self.run)
        if (
            self.task is not None
            and self.task.class_weights is not None
            and not self.losses.of("labels")
        ):
            raise ValueError(
                "task.class_weights is given, which losses.labels alone reads, but that is off; "
                "switch it on, or leave class_weights out"
            )
        if self._is_packed and self.losses.reduction == "tinybert":
            raise ValueError(
                "losses.reduction is tinybert, which counts padding, but task.padding is none; "
                "leave one of them out"
            )

    @property
    def row_form(self) -> RowForm | None:
        """What a row of the data is; `None` where blocks or examples of a task are read."""
        if self.data is None or not self.data.by_rows:
            return None
        return self.data.form(paired=HEADS[self.student.head].labels == "example")

    @property
    def row_tokens(self) -> int | None:
        """Tokens that a row of the data takes at most; `None` where blocks or examples are read."""
        if self.row_form is None or self.data is None:
            return None
        return len(self.row_form.sequences) * self.data.block_size

    def _check_rows(self) -> None:
        largest = self.row_tokens
        if largest is None or self.data is None:
            return
        if any(config.loss == "mlm" for config in self.losses.terms.values()):
            raise ValueError(
                "losses.mlm masks blocks of text, but data.documents is "
                f"{self.data.documents}; set it to paragraph or line, or leave losses.mlm out"
            )
        budget = self.data.batch_tokens
        if budget is None:
            return
        if budget < largest:
            raise ValueError(
                f"data.batch_tokens is {budget}, but a row may take {largest} (data.block_size "
                f"{self.data.block_size} for each of its sequences); raise it"
            )
        if self.train.micro_batch_size is not None:
            raise ValueError(
                f"data.batch_tokens is {budget} and train.micro_batch_size "
                f"{self.train.micro_batch_size}; give one of them"
            )
        if self.losses.balance.kind == "uncertainty":
            raise ValueError(
                "losses.balance is uncertainty, which counts micro-batches, but with "
                "data.batch_tokens each step has another number of them; set "
                "train.micro_batch_size in its place"
            )

    @property
    def _is_packed(self) -> bool:
        return self.task is not None and self.task.padding == "none"

    def why_not_cached(self) -> str | None:
        """Why what the losses read of the teacher can't be stored by row; `None` where it can."""
        if self.data is not None and self.data.streaming:
            return "data.streaming is on, whose blocks have no numbers to be found by"
        if self.train.cuda_graph:
            return "train.cuda_graph is on, whose graph can't read from a disk"
        if any(config.loss == "mlm" for config in self.losses.terms.values()):
            return "losses.mlm masks other tokens in every step, so no states come again"
        padded = self.task is not None or self.row_form is not None
        if padded and self.losses.reduction == "tinybert":
            return (
                "losses.reduction is tinybert, which reads the teacher's states of padding, and "
                "examples and rows are stored without any"
            )
        return None

    def _check_evaluate(self) -> None:
        if self.evaluate is None:
            return
        if HEADS[self.student.head].data == "task":
            raise ValueError(
                f"evaluate scores embeddings, but student.head is {self.student.head}, which gives "
                "predictions; leave evaluate out"
            )
        for name in self.evaluate.names:
            if name in self.losses.terms:
                raise ValueError(
                    f"evaluate has pairs or a task called {name!r}, as is losses.{name}; give the "
                    "pairs another name"
                )

    def _check_maps(self) -> None:
        depth = self.student.layers
        if depth is None:
            # of a model to start from, which says it once it is read
            return
        maps: dict[str, object] = {"layer_map": self.layer_map}
        for name, term in self.losses.terms.items():
            maps[f"losses.{name}.layer_map"] = getattr(term, "layer_map", None)
        for field, layers in maps.items():
            if isinstance(layers, tuple) and len(layers) != depth:
                raise ValueError(
                    f"{field} names {len(layers)} teacher layers, but student.layers is "
                    f"{depth}; give one for each student layer, 0 for none"
                )
            if isinstance(layers, PairsSection):
                deepest = max(pair.student for pair in layers.pairs)
                if deepest > depth:
                    raise ValueError(
                        f"{field} names student layer {deepest}, but student.layers is "
                        f"{depth}; give layers from 1 to that"
                    )

    def _check_head(self) -> None:
        # with the losses, which load torch
        from fastkd.losses.base import Setting
        from fastkd.losses.registry import loss_class

        head = self.student.head
        if self.task is not None and head != self.task.kind:
            raise ValueError(
                f"student.head is {head}, but a task is learned by {self.task.kind}; leave "
                "student.head out, or change task.kind"
            )
        if self.task is None and HEADS[head].labels in ("token", "span"):
            raise ValueError(
                f"student.head is {head}, whose labels a task has; give task in place of data"
            )
        losses = frozenset(config.loss for config in self.losses.terms.values())
        setting = Setting(head, self.task is not None, losses, rows=self.row_form)
        terms = {name: (loss_class(c.loss), c) for name, c in self.losses.terms.items()}
        for name, (kind, config) in terms.items():
            with plugin_errors(f"losses.{name}", kind, agreed=ValueError):
                kind.check_setting(name, config, setting)
        scored = setting.rows is not None and bool(setting.rows.scores)
        if scored and not any(kind.reads_scores(config) for kind, config in terms.values()):
            raise ValueError(
                "data.scores is given, but no loss reads scores of a file; set target to file in "
                "losses.score, or leave data.scores out"
            )
