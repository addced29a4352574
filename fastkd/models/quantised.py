"""Linear layers of a frozen model in eight bits: weights by output row, activations by token.

Every row is divided by its largest number, so that one outlier costs its own row and no other, and
what is rounded is multiplied in eight bits: `float8` by `torch._scaled_mm` on GPUs, `int8` by
`torch._int_mm` on CPUs. Sums are formed in fp32 and int32. Nothing is calibrated: activations are
looked at as they come. What is no large linear layer (embeddings, norms, attention, experts stacked
in one parameter, small heads) stays as it was, and so does the dtype of what the layers give.
torch's `quantize_dynamic` has one scale for all tokens, and torchao, its successor, brings a
package for these few lines.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastkd.capture import reading
from fastkd.capture.lm_head import last_hidden_state, last_layer
from fastkd.capture.packed_attention import pack_attention
from fastkd.capture.packed_pass import reads_rows
from fastkd.capture.packed_trial import trial_batch
from fastkd.capture.routing import runnable
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.packed_row import valid_tokens
from fastkd.types import LENGTHS, EightBits, Inputs

CODES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
STATES = {"float8": torch.bfloat16, "int8": torch.float32}
"""What the layers of a kind take and give."""
MULTIPLE = 16
"""What rows and columns of a weight have to be multiples of, as `torch._scaled_mm` asks."""
MOST_MOVED = 0.5
"""How far the last state of random tokens may move, as a part of its norm."""
_TRIAL_TOKENS = 8


def quantise_rows(rows: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divide each row by its largest number and round it to eight bits.

    Args:
        rows: [rows, columns].
        codes: `torch.float8_e4m3fn`, whose largest number is 448, or `torch.int8`, of which 127 is
            used on either side of 0.

    Returns:
        The codes [rows, columns], and the fp32 scales [rows, 1] that they are to be multiplied by.
        A row that holds what is not finite has a scale that isn't either.
    """
    most = 448.0 if codes.is_floating_point else 127.0
    # faster than the maximum of absolute values, which are another tensor
    largest = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))
    # a product, as GPUs divide by a number; a row of zeros stays one
    scales = (largest.float() * (1 / most)).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = rows / scales
    if not codes.is_floating_point:
        scaled.round_()
    return scaled.to(codes, memory_format=torch.contiguous_format), scales


class QuantisedLinear(nn.Module):
    """A linear layer of eight bits: [..., columns] to [..., rows], in the dtype of its bias."""

    codes: Tensor
    """[rows, columns], of the weight."""
    scales: Tensor
    """fp32 [1, rows]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: EightBits) -> None:
        """Round a layer.

        Args:
            weight: [rows, columns].
            bias: [rows].
            kind: of eight bits.
        """
        super().__init__()
        codes, scales = quantise_rows(weight.detach(), CODES[kind])
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales.t().contiguous(), persistent=False)
        self.bias = bias
        self._multiply = _float8_product if kind == "float8" else _int8_product

    def forward(self, states: Tensor) -> Tensor:
        rows, scales = quantise_rows(states.reshape(-1, states.shape[-1]), self.codes.dtype)
        made = self._multiply(rows, scales, self.codes, self.scales, self.bias)
        return made.view(*states.shape[:-1], -1)


def _float8_product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """bf16 [rows, columns] of `left right^T`, both scaled."""
    # tensor cores add up in their own precision, far above that of three bits
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scales,
        scale_b=right_scales,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _int8_product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Product of int8 matrices with their scales, in fp32."""
    made = torch._int_mm(left, right.t()).float().mul_(left_scales).mul_(right_scales)
    return made if bias is None else made.add_(bias)


def multiplies_int8() -> bool:
    """Whether this CPU's products of int8 are exact.

    Without VNNI oneDNN adds two of them up in sixteen bits, where they overflow (its developer
    guide, "Nuances of int8 computations").
    """
    ends = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(8)
    left, right = ends[:, None].repeat(1, 64), ends.repeat(64, 1)
    return torch.equal(torch._int_mm(left, right), left.int() @ right.int())


@dataclass(frozen=True)
class Quantised:
    """What of a model is in eight bits."""

    kind: EightBits
    layers: int
    linear: int
    """Linear layers of all sizes, the last one of a language model left out."""
    share: float
    """Of the model's weights, what is rounded."""
    stacked: bool
    """Whether it has experts that are stacked in parameters, which stay."""
    difference: float
    """How far that moves the last state of a few random tokens, as a part of its norm."""

    def __str__(self) -> str:
        stay = "; stacked experts stay" if self.stacked else ""
        return (
            f"{self.kind} in {self.layers} of {self.linear} linear layers ({self.share:.0%} of its "
            f"weights{stay}), which moves the last state of random tokens by "
            f"{self.difference:.2g} of its norm"
        )


def quantise(model: PreTrainedModel, kind: EightBits, device: torch.device) -> Quantised:
    """Round the linear layers of a model to eight bits, move it to a device, and try it there.

    Args:
        model: frozen, in eval mode, on the CPU, loaded in `STATES[kind]`.
        kind: of eight bits.
        device: where it will run.

    Raises:
        UserError: it has no layer to round, reads weights of layers in ways of its own, or comes to
            other states.
    """
    name, remedy = type(model).__name__, f"give teacher.dtype {str(STATES[kind]).split('.')[1]}"
    inputs = trial_batch(model, _TRIAL_TOKENS)
    with runnable(model):
        if reads_rows(model):
            # also what runs in the place of flash attention
            pack_attention(model)
        before = _last_state(model, inputs)
    layers, linear = replace_linear(model, kind)
    if not layers:
        raise UserError(
            f"teacher.dtype is {kind}, but none of the {linear} linear layers of {name} has a "
            f"width and a number of outputs that are multiples of {MULTIPLE}; {remedy}"
        )
    model.to(device)
    try:
        after = _last_state(
            model, {k: t if k == LENGTHS else t.to(device) for k, t in inputs.items()}
        )
    except FOREIGN_ERRORS as error:
        raise UserError(
            f"teacher.dtype is {kind}, but {name} can't run in it ({type(error).__name__}: "
            f"{one_line(error)}); {remedy}"
        ) from error
    difference = float((after - before).norm() / before.norm())
    # also where it is not a number
    if not difference < MOST_MOVED:
        raise UserError(
            f"teacher.dtype is {kind}, which moves the last state of {name} on random tokens by "
            f"{difference:.2g} of its norm, expected less than {MOST_MOVED}; {remedy}"
        )
    return Quantised(kind, layers, linear, _share(model, kind), _has_stacked(model), difference)


def replace_linear(model: PreTrainedModel, kind: EightBits) -> tuple[int, int]:
    """Put layers of eight bits in the place of those that are large products of matrices.

    Those stay whose widths are no multiples of `MULTIPLE` or whose weight others share, and those
    that a model keeps in another precision; of language models also the last layer, whose weight
    the losses multiply by.

    Args:
        model: on any device, meta among them.
        kind: of eight bits.

    Returns:
        How many layers were replaced, and of how many.
    """
    head = last_layer(model)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    made: dict[nn.Module, QuantisedLinear | None] = {}
    for parent in list(model.modules()):
        for place, layer in parent._modules.items():
            # of a subclass nobody knows what it does
            if layer is None or layer is head or type(layer) not in (nn.Linear, Conv1D):
                continue
            if layer not in made:
                weight = layer.weight
                fits = not any(size % MULTIPLE for size in weight.shape)
                fits = fits and users[id(weight)] == 1 and weight.dtype == STATES[kind]
                made[layer] = _quantised(layer, kind) if fits else None
            parent._modules[place] = made[layer] or layer
    return sum(layer is not None for layer in made.values()), len(made)


def _quantised(layer: nn.Module, kind: EightBits) -> QuantisedLinear:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, nn.Parameter))
    # Conv1D, of GPT-2, keeps a column for each output
    return QuantisedLinear(weight.t() if isinstance(layer, Conv1D) else weight, bias, kind)


def _share(model: PreTrainedModel, kind: EightBits) -> float:
    weights: list[Tensor] = list(model.parameters())
    coded = sum(weight.numel() for weight in weights if weight.dtype == CODES[kind])
    return coded / sum(weight.numel() for weight in weights)


def _has_stacked(model: PreTrainedModel) -> bool:
    return any(
        "expert" in f"{path} {type(module).__name__}".lower()
        and not isinstance(module, nn.Linear | Conv1D | QuantisedLinear)
        and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        for path, module in model.named_modules()
    )


@torch.no_grad()
def _last_state(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """fp32 [tokens, width] on the CPU, of what is no padding."""
    with reading(model, inputs) as read:
        state = last_hidden_state(model, model, read).float().cpu()
    valid = valid_tokens(inputs)
    return state if valid is None else state[valid.cpu()]
