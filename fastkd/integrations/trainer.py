"""transformers' `Trainer` with a teacher.

The script of a `Trainer` stays as it is but for three lines: the import, the teacher, the losses.

    trainer = DistillationTrainer(model=student, args=args, train_dataset=...,
                                  teacher=teacher, losses={"hidden": {}, "labels": {}})

What is exact: every loss is a mean over the whole optimiser step, whatever its micro-batches
(`gradient_accumulation_steps`) and ranks (DDP) are; the Trainer hands a step's batches over before
the first of them is run, and they are counted then. `loss` in the logs is that mean. What is not:
`eval_loss` is the Trainer's own mean over evaluation batches, weighed by their size; it has the
losses' constant weights and first temperatures, without schedules and learned variances, so that
checkpoints can be told apart by it. And losses that compare rows with each other (`rkd`,
`similarity`, ...) see those of one batch of one rank.

The projections train with the student while `train` runs: they are in the optimiser and, as
`projections.safetensors`, in every checkpoint. What is saved as the model is the student alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from fastkd.distiller import Distiller
from fastkd.errors import UserError, one_line
from fastkd.integrations.beside import Beside, attached
from fastkd.integrations.projections import read_projections, save_projections
from fastkd.integrations.sentences import (
    DistillationLoss,
    check_embeddings,
    check_padded,
    check_rates,
    check_tokenized,
    transformer_of,
)
from fastkd.layer_map import Progress
from fastkd.models.checking import LOADING_ERRORS
from fastkd.types import Inputs


class DistillationMixin:
    """What makes a distilling trainer of a `Trainer`: put it before that in the bases.

        class SentenceDistillation(DistillationMixin, SentenceTransformerTrainer): ...

    Of a `SentenceTransformer` the transformer inside is distilled, on every text column; a `loss`
    of the trainer's own is refused. Losses of embeddings compare what their `pooling` makes of its
    states, so both models must pool likewise, with a Normalize at most behind it.
    """

    # set by the trainer
    model: nn.Module
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    loss: nn.Module
    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        model: Any = None,
        *arguments: Any,
        teacher: Any = None,
        losses: Any = None,
        layer_map: Any = "uniform",
        tokens: int = 8,
        **keywords: Any,
    ) -> None:
        """Set a trainer up; all but these goes to its own class.

        Args:
            model: the student.
            teacher: a model as the student is, frozen by `requires_grad_(False)`.
            losses: as the section `losses` of a recipe.
            layer_map: as in a recipe.
            tokens: as of a Distiller.

        Raises:
            UserError: models and losses that don't fit, or a setting of the trainer that would
                change or bypass the losses.
        """
        if teacher is None or losses is None:
            missing = "teacher" if teacher is None else "losses"
            raise UserError(f"{type(self).__name__}: {missing} is not given; see fastkd.Distiller")
        if isinstance(model, nn.Sequential):
            if keywords.get("loss") is not None:
                raise UserError(
                    f"{type(self).__name__}: loss is given, which would never be called; leave it "
                    "out, and say in losses what is learned"
                )
            keywords["loss"] = DistillationLoss(model, losses, layer_map)
        super().__init__(model, *arguments, **keywords)  # type: ignore[call-arg]
        _check_arguments(self)
        check_tokenized(self.model)
        student = transformer_of(self.model, "model")
        seed = self.args.seed
        self.distiller = Distiller(
            student,
            transformer_of(teacher, "teacher"),
            losses,
            layer_map,
            tokens=tokens,
            seed=seed,
        )
        check_embeddings(self.model, teacher, self.distiller.objective)
        # the counts of a step are handed down as its number of items: it is not divided again
        self.model_accepts_loss_kwargs = True
        self._beside = Beside(self.distiller.objective)
        # accelerate's own states of a run have the student's weights without these
        self.accelerator.register_for_checkpointing(self.distiller.objective)
        self._depth = 0
        # whether DDP's first gradients are still to be looked at
        self._unreduced = False

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As the trainer's own."""
        self._unreduced = self.accelerator.num_processes > 1
        if self._unreduced:
            # an evaluation marks the model as prepared, which then would never be wrapped
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        with self._distilling():
            return super().train(*arguments, **keywords)  # type: ignore[misc]

    def evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        """As the trainer's own; `eval_loss` is the distillation loss, by the constant weights."""
        with self._distilling():
            return super().evaluate(*arguments, **keywords)  # type: ignore[misc]

    def predict(self, *arguments: Any, **keywords: Any) -> Any:
        """As the trainer's own; without labels there is no loss where one reads them."""
        with self._distilling():
            return super().predict(*arguments, **keywords)  # type: ignore[misc]

    def hyperparameter_search(self, *_arguments: Any, **_keywords: Any) -> Any:
        """None: it makes a new student for each trial.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{type(self).__name__}: hyperparameter_search makes a new student for each trial, but "
            "the losses are of one student; make a trainer for each trial, or use fastkd study"
        )

    def create_accelerator_and_postprocess(self) -> None:
        """As the trainer's own; DDP looks for weights that no loss reads, as those above the last
        mapped layer, also where blocks are recomputed: transformers would leave it out there."""
        if self.args.world_size > 1 and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and what all of them on all ranks hold of what losses are means
        over."""
        batches, _ = super().get_batch_samples(*arguments, **keywords)  # type: ignore[misc]
        if not batches:
            return batches, None
        self.distiller.at(self.state.global_step, self.state.max_steps, int(self.state.epoch or 0))
        found = [self.distiller.count(part) for batch in batches for part in self._parts(batch)]
        counts = torch.stack(found).sum(dim=0).to(self.args.device)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(counts)
        return batches, counts

    def _get_num_items_in_batch(self, *_arguments: Any) -> None:
        # of an evaluation: its loss is a mean over the batch at hand
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The distillation loss of a batch; in an evaluation also what the student gives."""
        parts = self._parts(inputs)
        with self._distilling():
            if torch.is_grad_enabled() and not return_outputs:
                self._check_wrapped(model)
                # through the model as it is wrapped, so that DDP sees the pass
                self._beside.asked = partial(self._step_loss, parts, num_items_in_batch)
                return model(inputs)
            of = self._loss if torch.is_grad_enabled() else self._held_out_loss
            loss = of(parts)
        if not return_outputs:
            return loss
        sentences = isinstance(self.model, nn.Sequential)
        return loss, {} if sentences else model(**inputs)

    def training_step(self, model: nn.Module, *arguments: Any, **keywords: Any) -> Tensor:
        """As the trainer's own."""
        loss: Tensor = super().training_step(model, *arguments, **keywords)  # type: ignore[misc]
        if self._unreduced:
            _check_reduced(model, type(self).__name__)
            self._unreduced = False
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As the trainer's own; there is a loss without labels too, unless one reads them."""
        prepared = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        if prediction_loss_only:
            with torch.no_grad():
                return self.compute_loss(model, prepared).detach(), None, None
        loss, logits, labels = super().prediction_step(  # type: ignore[misc]
            model, prepared, prediction_loss_only, ignore_keys
        )
        lacks = self.distiller.needs_labels and prepared.get("labels") is None
        if loss is None and not lacks:
            with torch.no_grad():
                loss = self.compute_loss(model, prepared).detach()
        return loss, logits, labels

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        """As the trainer's own, of the student and what trains beside it, also before `train`."""
        given = self.optimizer is not None
        with self._distilling():
            if isinstance(self.model, nn.Sequential):
                check_rates(self.loss, self.args)
            optimizer = super().create_optimizer(*arguments, **keywords)  # type: ignore[misc]
        if not given:
            _give_rates(optimizer, self.distiller)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the trainer's own, of an optimizer that trains all that it must."""
        given = self.optimizer if optimizer is None else optimizer
        _check_optimizer(given, self.distiller, type(self).__name__)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of what weight decay pulls at: no learned weight of a loss."""
        found = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in found if not name.endswith("log_variances")]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # every rank comes by here, and one writes
        if self.args.should_save:
            save_projections(Path(folder), self.distiller.objective)

    def _load_from_checkpoint(self, checkpoint: str, *arguments: Any, **keywords: Any) -> None:
        # what doesn't fit is refused before the student's weights are others
        kept = read_projections(Path(checkpoint), self.distiller.objective)
        super()._load_from_checkpoint(checkpoint, *arguments, **keywords)  # type: ignore[misc]
        self.distiller.objective.load_state_dict(kept)

    def _load_best_model(self) -> None:
        # those of the libraries log what they can't read, and keep the last student beside the
        # best projections
        best = self.state.best_model_checkpoint
        try:
            self._load_from_checkpoint(best)
        except UserError:
            raise
        except LOADING_ERRORS as error:
            raise UserError(
                f"load_best_model_at_end: the student of {best} can't be read "
                f"({one_line(error, None)}); the student of the last step is in the trainer's model"
            ) from error
        if isinstance(self.model, nn.Sequential):
            card: Any = self.model.model_card_data
            card.set_best_model_step(int(best.rpartition("-")[2]))

    def _check_wrapped(self, model: nn.Module) -> None:
        """See that the gradients of a step are averaged over ranks.

        Raises:
            UserError: they would stay apart.
        """
        ranks = self.accelerator.num_processes
        if ranks > 1 and not isinstance(model, DistributedDataParallel):
            raise UserError(
                f"{type(self).__name__}: the model of a step is a {type(model).__name__}, expected "
                f"DistributedDataParallel, as each of {ranks} ranks would train apart; call train, "
                "or give compute_loss the trainer's model_wrapped"
            )

    def _parts(self, inputs: dict[str, Any]) -> list[Inputs]:
        """The batches of tokens in one of the trainer's: one, or one a text column."""
        if not isinstance(self.model, nn.Sequential):
            return [inputs]
        known = ("input_ids", "attention_mask", "token_type_ids")
        features, _ = self.collect_features(inputs)  # type: ignore[attr-defined]
        check_padded(features)
        return [{key: f[key] for key in known if key in f} for f in features]

    def _counts(self, parts: list[Inputs]) -> Tensor:
        return torch.stack([self.distiller.count(part) for part in parts]).sum(dim=0)

    def _step_loss(self, parts: list[Inputs], counts: Tensor | None) -> Tensor:
        # a model that another trainer prepared has its autocast around other passes alone
        with self.accelerator.autocast():
            return self._loss(parts, counts, self.accelerator.num_processes)

    def _loss(self, parts: list[Inputs], counts: Tensor | None = None, pieces: int = 1) -> Tensor:
        counts = self._counts(parts) if counts is None else counts
        losses = [self.distiller(part, counts=counts, pieces=pieces)[0] for part in parts]
        return torch.stack(losses).sum()

    def _held_out_loss(self, parts: list[Inputs]) -> Tensor:
        """The loss of a batch that can be compared over a run, see `StepWeights.total`: by the same
        layers, temperatures and weights at any step."""
        objective, counts = self.distiller.objective, self._counts(parts)
        moment = objective.moment
        objective.at(Progress())
        try:
            found = [self.distiller(part, counts=counts)[1].values() for part in parts]
            raw = torch.stack([torch.stack(list(values)) for values in found]).sum(dim=0)
            total = objective.weights.total(dict(zip(objective.labels, raw.tolist(), strict=True)))
        finally:
            objective.at(moment)
        return torch.tensor(total, device=raw.device)

    @contextmanager
    def _distilling(self) -> Iterator[None]:
        """Let what trains beside the student be found, and its forward make the loss when asked."""
        with ExitStack() as stack:
            # a step within `train` finds all of it open
            if self._depth == 0:
                stack.enter_context(self.distiller)
                stack.enter_context(attached(self.model, self.distiller.student, self._beside))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """A `Trainer` whose loss is what the student loses against a teacher."""


def _check_reduced(model: nn.Module, trainer: str) -> None:
    """See that DDP found every weight that it waits for: buckets with others stay apart.

    Raises:
        UserError: it was told not to look for those without a gradient.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model.find_unused_parameters or model.static_graph:
        return
    named = model.module.named_parameters()
    unread = [name for name, p in named if p.requires_grad and p.grad is None]
    if unread:
        raise UserError(
            f"{trainer}: ddp_find_unused_parameters is False, but no loss reads {len(unread)} "
            f"weights of the student, such as {unread[0]}, so that ranks would train apart; leave "
            "it out, or freeze these weights by requires_grad_(False)"
        )


def _give_rates(optimizer: Any, distiller: Distiller) -> None:
    """Let parameters that have a learning rate of their own stand in groups apart."""
    for own in distiller.parameter_groups()[1:]:
        apart = set(own["params"])
        for group in list(optimizer.param_groups):
            same = [p for p in group["params"] if p in apart]
            if same:
                group["params"] = [p for p in group["params"] if p not in apart]
                optimizer.add_param_group({**group, "params": same, "lr": own["lr"]})


def _check_optimizer(optimizer: Any, distiller: Distiller, trainer: str) -> None:
    """See that an optimizer trains what stands beside the student, each at its learning rate.

    Raises:
        UserError: one that was made of the student's parameters alone, or knows no such rate.
    """
    # a scheduler moves `lr`, and keeps what it was
    rates = {
        parameter: group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    said = f"{trainer}: the optimizer"
    use = "give optimizer_cls_and_kwargs in place of optimizers"
    missing = [n for n, p in distiller.objective.named_parameters() if p not in rates]
    if missing:
        raise UserError(
            f"{said} lacks {len(missing)} parameters of the losses, such as {missing[0]}, which "
            f"would never train; {use}, or set trainer.optimizer to one made from "
            "trainer.distiller.parameters()"
        )
    for own in distiller.parameter_groups()[1:]:
        if any(rates[parameter] != own["lr"] for parameter in own["params"]):
            raise UserError(
                f"{said} doesn't have the projection_learning_rate {own['lr']:g}; {use}, or set "
                "trainer.optimizer to one made from trainer.distiller.parameter_groups()"
            )


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    refused = {
        "label_smoothing_factor": args.label_smoothing_factor,
        "compute_loss_func": trainer.compute_loss_func,
        "deepspeed": trainer.is_deepspeed_enabled,
        "fsdp": trainer.is_fsdp_enabled,
        "torch_compile": args.torch_compile,
        "auto_find_batch_size": args.auto_find_batch_size,
    }
    found = [name for name, value in refused.items() if value]
    if found:
        raise UserError(
            f"{type(trainer).__name__}: {', '.join(found)} is set, which the losses don't pass "
            "through; leave it out, or use fastkd.distill"
        )
    if trainer.model_init is not None:
        raise UserError(
            f"{type(trainer).__name__}: model_init is given, which makes a new student at every "
            "train, but the losses are of one student; give model"
        )
    half = {p.dtype for p in trainer.model.parameters() if p.requires_grad and p.itemsize < 4}
    if half:
        warnings.warn(
            f"{type(trainer).__name__}: the student's weights are {half.pop()}, which round most "
            "updates away; load it with dtype=torch.float32 and set bf16=True",
            stacklevel=3,
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{type(trainer).__name__}: {args.n_gpu} GPUs in one process would split batches over "
            "threads; start one process a GPU with torchrun"
        )
