"""What a model's embeddings are worth: Spearman's correlation with scores of people, and MTEB."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.data.rows.tokenized import EncodedRows
from fastkd.data.sampler import evaluation_parts
from fastkd.data.sequences import sequences_of, tokenise, uses_token_types
from fastkd.data.tasks.metrics import measure
from fastkd.distributed import Ranks
from fastkd.losses.factory import compares_directions
from fastkd.models.sentence_folder import known_prompts, similarity_name
from fastkd.recipe import Recipe
from fastkd.training.session import kept_random_numbers
from fastkd.training.setup import Run
from fastkd.types import Side

# what distances are, in the library's words
_NORMS = {"euclidean": 2.0, "manhattan": 1.0}
# of `encode_query` and `encode_document`
_ASKED = {"query": ("query",), "document": ("document", "passage", "corpus")}


def judge_embeddings(run: Run, side: Side) -> dict[str, Any]:
    """Score a model's embeddings on everything that a recipe names; collective over the ranks.

    Returns:
        `pairs` and `mteb`, scores by name, where there are any; empty where a recipe names nothing.

    Raises:
        UserError: the model's embeddings can't be made.
    """
    found = {"pairs": {name: correlation(run, side, given) for name, given in run.pairs.items()}}
    if run.mteb_tasks:
        found["mteb"] = _main_scores(RunEncoder(run, side), run.mteb_tasks)
    return {kind: scores for kind, scores in found.items() if scores}


def correlation(run: Run, side: Side, pairs: EncodedRows) -> float:
    """Spearman's correlation of the cosines of pairs with their scores; each text is read once, by
    one rank."""
    assert pairs.scores is not None, "pairs have scores"

    def cosines(rows: Sequence[int]) -> Tensor:
        embeddings = run.embed(side, run.move(pairs.batch(rows))).double()
        return torch.nn.functional.cosine_similarity(embeddings[::2], embeddings[1::2], dim=-1)

    # two texts a pair
    size = max(1, run.plan.micro_batch_size // 2)
    found = _shared_out(run.ranks, pairs.lengths, size, cosines)
    return measure(["spearman"], found, pairs.scores[:, 0])["spearman"]


def _shared_out(
    ranks: Ranks, lengths: npt.NDArray[np.int64], size: int, made: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """What is made of rows, [rows, ...], each by one rank, `size` at a time; all ranks have all."""
    found: Tensor | None = None
    parts = evaluation_parts(lengths, size, rank=ranks.rank, world_size=ranks.world_size)
    for counted, rows, _ in parts:
        values = made(rows)
        if found is None:
            found = values.new_zeros(len(lengths), *values.shape[1:])
        found[counted.to(values.device)] = values[: len(counted)]
    assert found is not None, "every rank has a part of any rows"
    return ranks.sum(found).cpu()


def _main_scores(encoder: RunEncoder, tasks: Mapping[str, Any]) -> dict[str, float]:
    """The main score of each task of mteb; every rank goes through all of them."""
    import mteb

    quiet = {"batch_size": encoder.batch_size, "show_progress_bar": False}
    found = {}
    # its tasks draw numbers, and a run must not depend on whether it was evaluated
    with kept_random_numbers(), warnings.catch_warnings():
        # of classifiers that it fits, whose scores say as much
        warnings.simplefilter("ignore")
        for name, task in tasks.items():
            result = mteb.evaluate(
                encoder,
                task,
                cache=None,
                co2_tracker=False,
                encode_kwargs=quiet,
                show_progress_bar=False,
            )
            found[name] = float(result.task_results[0].get_score())
    return found


class RunEncoder:
    """An encoder as `mteb.EncoderProtocol` has it, of a model of a run: every rank is asked for the
    embeddings of the same texts, makes its share of them, and has all."""

    def __init__(self, run: Run, side: Side) -> None:
        self._run = run
        self._side = side
        recipe = run.recipe
        assert isinstance(recipe, Recipe) and recipe.data and recipe.evaluate, "it names tasks"
        self._max_length = recipe.data.block_size
        # as its exported folder has them, and so the library's own encoder of it
        self._prompts = {
            **_retrieval_prompts(known_prompts(run.source)),
            **_retrieval_prompts(run.prompts),
            **recipe.evaluate.mteb_prompts,
        }
        self._by = similarity_name(run.source)
        if side == "student" and compares_directions(recipe.losses, recipe.student.head):
            self._by = "cosine"

    @property
    def batch_size(self) -> int:
        """Texts of a forward pass of one rank."""
        return self._run.plan.micro_batch_size

    @property
    def mteb_model_meta(self) -> Any:
        """Description of the model for mteb: nothing is known of it."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty()

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_settings: Any,
    ) -> npt.NDArray[np.float32]:
        """Embeddings [texts, dim] of the `text` of batches; collective over the ranks.

        Args:
            inputs: batches, each with a list of texts.
            task_metadata: what the task is; all tasks are read alike.
            hf_split: its split.
            hf_subset: and subset.
            prompt_type: `query` or `document` of retrieval, which decides what is put before.
        """
        kind = getattr(prompt_type, "value", prompt_type)
        prompt = self._prompts.get(kind, self._run.default_prompt)
        return self.embed([prompt + text for batch in inputs for text in batch["text"]])

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings [texts, dim] of texts, cut to `data.block_size`; collective."""
        run = self._run
        tokenizer, config = run.tokenizer, run.module.student.config
        if self._side == "teacher" and run.teacher_tokenizer is not None:
            assert run.teacher_model is not None, "a tokenizer is a model's"
            tokenizer, config = run.teacher_tokenizer, run.teacher_model.config
        tokens = tokenise(texts, None, tokenizer, self._max_length, "data.block_size")
        sequences = sequences_of(
            tokens,
            tokenizer,
            token_types=uses_token_types(config, tokenizer),
            max_length=self._max_length,
        )

        def embeddings(rows: Sequence[int]) -> Tensor:
            return run.embed(self._side, run.move(sequences.batch(rows)))

        made = _shared_out(run.ranks, sequences.lengths, self.batch_size, embeddings)
        found: npt.NDArray[np.float32] = made.numpy()
        return found

    def similarity(self, one: npt.ArrayLike, other: npt.ArrayLike) -> Tensor:
        """Similarities of all pairs, [n, m]: cosines, or what the model's folder says."""
        ones, others = _rows(one), _rows(other)
        if self._by in _NORMS:
            return -torch.cdist(ones, others, p=_NORMS[self._by])
        return self._scaled(ones) @ self._scaled(others).T

    def similarity_pairwise(self, one: npt.ArrayLike, other: npt.ArrayLike) -> Tensor:
        """Similarities of the pairs at the same places, [n]."""
        ones, others = _rows(one), _rows(other)
        if self._by in _NORMS:
            away: Tensor = torch.linalg.vector_norm(ones - others, _NORMS[self._by], dim=-1)
            return -away
        return (self._scaled(ones) * self._scaled(others)).sum(dim=-1)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self._by == "dot" else torch.nn.functional.normalize(rows, dim=-1)


def _retrieval_prompts(known: Mapping[str, str]) -> dict[str, str]:
    """What stands before queries and documents, by the names that the library looks for."""
    found = {kind: [known[name] for name in _ASKED[kind] if name in known] for kind in _ASKED}
    return {kind: texts[0] for kind, texts in found.items() if texts}


def _rows(vectors: npt.ArrayLike) -> Tensor:
    # of one text it is a vector
    return torch.as_tensor(vectors).reshape(-1, np.shape(vectors)[-1])
