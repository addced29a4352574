"""The transformer blocks of a model: found, counted, cut."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastkd.errors import UserError

_SINGLE_STACK = "fastkd distils encoders and decoders with a single stack of blocks"


def check_single_stack(model: PreTrainedModel) -> int:
    """See that a model is one stack of equal blocks, as its configuration says; their number.

    Raises:
        UserError: it is an encoder-decoder, is made of several models, or has blocks of several
            shapes.
    """
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; {_SINGLE_STACK}, so give one of those")
    if getattr(config, "is_heterogeneous", False):
        raise UserError(
            f"{name} has blocks of several shapes (per_layer_config); {_SINGLE_STACK} of one shape"
        )
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        parts = ", ".join(getattr(config, "sub_configs", None) or ())
        made_of = f"is made of several models ({parts})" if parts else "has no num_hidden_layers"
        raise UserError(f"{name} {made_of}; {_SINGLE_STACK}, so give one of its models")
    return depth


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model, in order.

    Raises:
        UserError: no list, or more than one list, has as many blocks as the config has layers, a
            block stands in it more than once, or the model is no single stack.
    """
    cut = _CUT.get(model)
    if cut is not None:
        return cut
    depth = check_single_stack(model)
    # a step asks twice, and looking through a model takes a part of it
    with suppress(AttributeError):
        there = model.get_submodule(_PATHS.get(model, ""))
        if isinstance(there, nn.ModuleList) and len(set(there)) == depth:
            return there
    path, blocks = _search(model, depth)
    _PATHS[model] = path
    return blocks


def blocks_path(model: PreTrainedModel) -> str:
    """Path of the list of a model's blocks, which the names of their parameters begin with."""
    find_blocks(model)
    return _PATHS[model]


def holder_of_blocks(model: PreTrainedModel) -> nn.Module:
    """The module that runs the blocks one after another: an encoder, or the base model itself."""
    holder: nn.Module = model.get_submodule(blocks_path(model).rpartition(".")[0])
    return holder


_PATHS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Where the blocks of a model were found."""
_CUT: WeakKeyDictionary[nn.Module, nn.ModuleList] = WeakKeyDictionary()
"""The blocks that a model has while it is cut: not every configuration can be told their number
(Nemotron-H counts the kinds of its blocks)."""


def _search(model: PreTrainedModel, depth: int) -> tuple[str, nn.ModuleList]:
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    # what a block holds may be as many, whatever the number of blocks (ALBERT's groups of layers),
    # and so may what stands beside the blocks
    inner = {id(part) for blocks in lists.values() for block in blocks for part in block.modules()}
    found = {
        path: blocks
        for path, blocks in lists.items()
        if len(blocks) == depth and id(blocks) not in inner
    }
    if len(found) > 1:
        found = {
            path: blocks
            for path, blocks in found.items()
            if all(isinstance(m, GradientCheckpointingLayer) for m in blocks)
        }
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__}: found {len(found)} stacks of {depth} blocks, expected one; "
            f"{_SINGLE_STACK}"
        )
    path, blocks = next(iter(found.items()))
    numbers: dict[nn.Module, int] = {}
    for number, block in enumerate(blocks, start=1):
        first = numbers.setdefault(block, number)
        if first != number:
            raise UserError(
                f"{type(model).__name__}: blocks {first} and {number} are one module, which is "
                "called more than once in a forward pass, so neither can be captured; give a model "
                "whose blocks are modules of their own"
            )
    return path, blocks


def at_depth(model: PreTrainedModel, depth: int) -> Cut:
    """Let `model` stop after block `depth`: nothing above the last matched layer is computed."""
    return Cut(model, depth)


class Cut:
    """A context in which a model has its first blocks alone.

    It may be entered many times: looking for the blocks takes longer than putting them in place,
    and what is compiled knows the same list of blocks again.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        self._model = model
        self._config: Any = model.config
        self._blocks = find_blocks(model)
        self._before = _CUT.get(model)
        path = next(path for path, module in model.named_modules() if module is self._blocks)
        self._path, _, self._name = path.rpartition(".")
        self._parent = model.get_submodule(self._path)
        self._depth, self._full = depth, model.config.num_hidden_layers
        self._first = self._blocks[:depth]

    def __enter__(self) -> None:
        self._follow()
        setattr(self._parent, self._name, self._first)
        self._config.num_hidden_layers = self._depth
        _CUT[self._model] = self._first

    def _follow(self) -> None:
        """Take blocks that were exchanged since."""
        self._parent = self._model.get_submodule(self._path)
        blocks = getattr(self._parent, self._name)
        if blocks is self._first:
            return
        pairs = zip(self._first, blocks, strict=False)
        if blocks is not self._blocks or any(cut is not block for cut, block in pairs):
            self._blocks, self._first = blocks, blocks[: self._depth]

    def __exit__(self, *_raised: object) -> None:
        setattr(self._parent, self._name, self._blocks)
        self._config.num_hidden_layers = self._full
        if self._before is None:
            del _CUT[self._model]
        else:
            _CUT[self._model] = self._before


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module is called with: its input, under whatever name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def capture_keywords(model: PreTrainedModel) -> dict[str, bool]:
    """Keywords of a pass that is captured: a decoder builds no key-value cache, and a model that is
    configured to give tuples names what it gives."""
    config = model.config
    keywords = {"use_cache": False} if getattr(config, "use_cache", None) else {}
    return keywords if config.return_dict else {**keywords, "return_dict": True}
