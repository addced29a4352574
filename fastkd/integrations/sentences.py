"""The transformers inside a `SentenceTransformer`, and whether the rest fits what is compared."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastkd.errors import UserError
from fastkd.losses.factory import embedding_losses
from fastkd.losses.objective import Objective
from fastkd.losses.sequence_embeddings import SequenceEmbeddingConfig, SequenceEmbeddingGroup
from fastkd.models.embedding import check_on_vectors, pooling_modes
from fastkd.section import Section


def transformer_of(model: Any, field: str) -> PreTrainedModel:
    """The model of transformers that is distilled: itself, or that of a `SentenceTransformer`.

    Raises:
        UserError: neither.
    """
    if isinstance(model, PreTrainedModel):
        return model
    found = getattr(model[0], "auto_model", None) if isinstance(model, nn.Sequential) else None
    if not isinstance(found, PreTrainedModel):
        raise UserError(
            f"{field} is a {type(model).__name__}, expected a model of transformers, or a "
            "SentenceTransformer with one"
        )
    return found


class DistillationLoss(nn.Module):
    """What a trainer of sentence-transformers holds as its loss, so that its model card says what
    ran and its optimizer groups find the student. It is never called: the mixin makes the loss."""

    citation = (
        "@software{fastkd,\n    title = {fastkd: knowledge distillation of transformers from the "
        "inside},\n    license = {Apache-2.0}\n}"
    )

    def __init__(self, model: nn.Module, losses: Any, layer_map: Any) -> None:
        super().__init__()
        self.model = model
        self._config = {"losses": losses, "layer_map": layer_map}

    def get_config_dict(self) -> dict[str, Any]:
        """The losses by their names with what was given of them, and which layers they compare."""
        return {
            key: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for key, value in self._config.items()
        }

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
        """None.

        Raises:
            UserError: always.
        """
        raise UserError(
            "the loss of a distilling trainer is made by its compute_loss, with the teacher; call "
            "that"
        )


def check_rates(loss: nn.Module, args: Any) -> None:
    """See that each pattern of `learning_rate_mapping` finds a parameter.

    Raises:
        UserError: one finds none.
    """
    names = [name for name, _ in loss.named_parameters()]
    for pattern in args.learning_rate_mapping:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"learning_rate_mapping has {pattern!r}, which is in no name of a parameter, "
                f"such as {names[0]} or {names[-1]}; take it out, or give a part of a name"
            )


def check_tokenized(model: Any) -> None:
    """See that batches of a trainer are tokens.

    Raises:
        UserError: they are pairs of texts, as of a reranker.
    """
    if "CrossEncoder" in {kind.__name__ for kind in type(model).__mro__}:
        raise UserError(
            f"model is a {type(model).__name__}, whose trainer hands texts over where losses read "
            "tokens; write a loop with fastkd.Distiller(student.model, teacher.model, losses), or "
            "use fastkd.distill with student.head sequence_classification"
        )


def check_padded(features: Iterable[Mapping[str, Any]]) -> None:
    """See that texts were padded: flash attention makes a SentenceTransformer flatten them.

    Raises:
        UserError: they follow each other in one row.
    """
    if any("cu_seq_lens_q" in one for one in features):
        raise UserError(
            "the SentenceTransformer flattens texts into one row, which the losses would read as "
            "one text; set model[0].unpad_inputs = False"
        )


def check_embeddings(student: Any, teacher: Any, objective: Objective) -> None:
    """See that losses of embeddings compare what `encode` gives.

    Args:
        student: as it was given.
        teacher: likewise.
        objective: of the transformers inside, whose states it pools by what the losses say.

    Raises:
        UserError: a SentenceTransformer makes something else of its states.
    """
    for name, config in embedding_losses(objective.losses, objective.pair.head).items():
        for field, model in (("model", student), ("teacher", teacher)):
            reason = _strange(list(model)[1:], config) if isinstance(model, nn.Sequential) else ""
            if reason:
                raise UserError(
                    f"losses.{name} compares {config.pooling} pooling of the transformers' states, "
                    f"but of {field} {reason}; use fastkd.distill, which reads modules, or give "
                    "models whose `encode` is this pooling"
                )
    groups = [term for term in objective.each() if isinstance(term, SequenceEmbeddingGroup)]
    if isinstance(student, nn.Sequential) and any(g.projection is not None for g in groups):
        warnings.warn(
            "the student's embeddings are compared through a projection, which `encode` leaves "
            "out; use fastkd.distill, which exports it, or a loss that needs none (similarity)",
            stacklevel=3,
        )


def _strange(modules: Sequence[Any], config: SequenceEmbeddingConfig) -> str:
    """What makes embeddings of a transformer's states other than a loss does; empty: nothing."""
    pooling, *behind = modules or [nn.Identity()]
    if _kind(pooling) != "Pooling":
        return f"{_kind(pooling)} stands where Pooling is expected"
    # lengths are read where a loss says so, dropout is for training
    passed = {"Dropout"} if config.reads_lengths else {"Dropout", "Normalize"}
    try:
        modes = pooling_modes(pooling.get_config_dict())
        for module in behind:
            if _kind(module) not in passed:
                return f"{_kind(module)} stands behind the Pooling"
            check_on_vectors(_kind(module), module.get_config_dict())
    except ValueError as error:
        return str(error)
    return "" if modes == [config.pooling] else f"the Pooling is {' and '.join(modes)}"


def _kind(module: nn.Module) -> str:
    """The library's name of a module; of others the whole path."""
    kind = type(module)
    known = kind.__module__.split(".")[0] == "sentence_transformers"
    return kind.__name__ if known else f"{kind.__module__}.{kind.__name__}"
