"""The most probable words at a masked place of a text, by a masked language model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastkd.capture import vocabulary_size
from fastkd.data.known_ids import check_ids, limit_ids
from fastkd.data.text.cache import tokenizer_digest
from fastkd.errors import UserError
from fastkd.models import LOADING_ERRORS, not_loadable, read_model


class Place(NamedTuple):
    """A word of a text: its characters, and its one token, if the model knows it as one."""

    start: int
    end: int
    token: int | None


class Masked(NamedTuple):
    """A text as the model reads it."""

    ids: list[int]
    types: list[int]
    places: list[Place]


class MaskedWords:
    """A masked language model with its tokenizer, in eval mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        show_original: bool = False,
    ) -> None:
        """Look up which tokens are words.

        Args:
            model: a `...ForMaskedLM`.
            tokenizer: a fast one with a mask token.
            device: where the model runs.
            show_original: whether the model reads the text itself behind the masked one.

        Raises:
            UserError: the tokenizer is not fast, has no mask token, or knows no whole word.
        """
        name = type(tokenizer).__name__
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            raise UserError(
                f"augmentation.masked_model: its tokenizer ({name}) is not fast or has no mask "
                "token; give a masked language model with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.show_original = show_original
        self.vocabulary = whole_words(tokenizer)
        self._model = model.to(device).eval()
        self._device = device
        self._typed = int(getattr(model.config, "type_vocab_size", None) or 0) > 1
        # RoBERTa's first position is 2
        self._limit = int(getattr(model.config, "max_position_embeddings", 0) or 514) - 2
        size = model.get_output_embeddings().weight.shape[0]
        whole = torch.zeros(size, dtype=torch.bool)
        whole[[number for number in self.vocabulary if number < size]] = True
        if not whole.any():
            raise UserError(
                f"augmentation.masked_model: its tokenizer ({name}) has no token that is a word "
                "of letters; give a masked language model of words"
            )
        self._whole = whole.to(device)

    @classmethod
    def load(
        cls, name: str, *, device: torch.device | str = "cpu", show_original: bool = False
    ) -> MaskedWords:
        """The model of a folder or hub name.

        Raises:
            UserError: it can't be loaded, or has no head that predicts masked tokens.
        """
        given = f"augmentation.masked_model {name}"
        # transformers would draw a head and go on
        model, missing = read_model(name, given, torch.float32, None, "masked_lm")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except LOADING_ERRORS as error:
            raise UserError(not_loadable(given, error)) from error
        if missing:
            raise UserError(
                f"{given}: {len(missing)} weights are missing, {missing[0]} among them, so it "
                "predicts no words; give a masked language model, or set augmentation.source to "
                "neighbours and name a list"
            )
        limit_ids(tokenizer, vocabulary_size(model), given)
        return cls(model, tokenizer, device=device, show_original=show_original)

    @cached_property
    def digest(self) -> str:
        """Key of weights, tokenizer and how the model is asked."""
        content = hashlib.sha256(tokenizer_digest(self.tokenizer).encode())
        for name, tensor in self._model.state_dict().items():
            content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            content.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return f"masked {self.show_original} {content.hexdigest()}"

    def read(self, text: str) -> Masked:
        """Tokenise a text and find its words; what is too long for the model is left out."""
        encoding = self.tokenizer(
            text,
            text if self.show_original else None,
            truncation=True,
            max_length=self._limit,
            return_token_type_ids=True,
            verbose=False,
        )
        (tokens,) = encoding.encodings
        words: dict[int, list[int]] = {}
        for number, word in enumerate(tokens.word_ids):
            if word is not None and tokens.sequence_ids[number] == 0:
                words.setdefault(word, []).append(number)
        places = []
        for numbers in words.values():
            start, end = tokens.offsets[numbers[0]][0], tokens.offsets[numbers[-1]][1]
            # byte-level tokens may take the blank before a word along
            start += len(text[start:end]) - len(text[start:end].lstrip())
            known = len(numbers) == 1 and tokens.ids[numbers[0]] != self.tokenizer.unk_token_id
            places.append(Place(start, end, numbers[0] if known else None))
        check_ids(np.asarray(tokens.ids), self.tokenizer)
        return Masked(tokens.ids, tokens.type_ids, places)

    @torch.no_grad()
    def most_probable(self, jobs: Sequence[tuple[Masked, int]], count: int) -> Tensor:
        """The most probable words at one masked token of each text.

        Args:
            jobs: texts with the number of the token to mask.
            count: words wanted.

        Returns:
            int64 [jobs, count] on the CPU, or fewer columns where the vocabulary has fewer words:
            keys of `vocabulary`, sorted, so that rounding changes at most who is last.
        """
        width = max(len(text.ids) for text, _ in jobs)
        ids = torch.full((len(jobs), width), self.tokenizer.pad_token_id or 0)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (text, _) in enumerate(jobs):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            types[row, : len(text.ids)] = torch.tensor(text.types)
            mask[row, : len(text.ids)] = 1
        places = torch.tensor([token for _, token in jobs])
        ids[torch.arange(len(jobs)), places] = self.tokenizer.mask_token_id
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._typed:
            inputs["token_type_ids"] = types
        with _only_at(self._model, places.to(self._device)):
            moved = {k: v.to(self._device) for k, v in inputs.items()}
            logits = self._model(**moved, return_dict=True).logits
        scores = logits[:, 0].float().masked_fill(~self._whole, -torch.inf)
        found: Tensor = scores.topk(min(count, int(self._whole.sum())), dim=1).indices
        return found.sort(dim=1).values.cpu()


@contextmanager
def _only_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Let the model's head see one token of each text: [tokens, vocabulary] is never computed."""

    def gather(_module: Any, _args: Any, output: Any) -> Any:
        state = output.last_hidden_state
        rows = torch.arange(len(state), device=state.device)
        output.last_hidden_state = state[rows, places][:, None]
        return output

    handle = model.base_model.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Spelling of every token that is a whole word of letters, and that its spelling becomes."""
    numbers = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    decoded = tokenizer.backend_tokenizer.decode_batch([[number] for number in numbers])
    spelled = {number: word.strip() for number, word in zip(numbers, decoded, strict=True)}
    words = {number: word for number, word in spelled.items() if word.isalpha()}
    if not words:
        return {}
    # a piece from inside a word comes back as other tokens
    encoded = tokenizer([f" {word}" for word in words.values()], add_special_tokens=False)
    return {
        number: word
        for (number, word), ids in zip(words.items(), encoded["input_ids"], strict=True)
        if ids == [number]
    }
