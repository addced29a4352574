"""Mean squared error of projected hidden states (TinyBERT, arXiv 1909.10351, eq. 8).

The projection, the difference and all gradients are made chunk by chunk, so the projected hidden
states never exist as a whole. The road not taken: the Gram form used for attention scores, whose
terms cancel once the projected student is close to the teacher.
"""

from collections.abc import Sequence

from torch import Tensor

from .checks import check_reduction
from .hidden_checks import check_hidden
from .hidden_rows import row_losses
from .types import Backend, Reduction, Tokens


def hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    reduction: Reduction = "valid",
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared error of `student @ weight^T + bias` against the teacher, for each layer pair.

    Source: arXiv 1909.10351, eq. 8 (hidden states) and eq. 9 (embeddings).

    Args:
        student: One `[batch, tokens, student_width]` a pair, in bf16, fp16, fp32 or fp64.
        teacher: One `[batch, tokens, teacher_width]` a pair.
        weight: `[teacher_width, student_width]` as in `nn.Linear`: one tensor for all pairs or a
            sequence with one a pair. None compares hidden states as they are.
        bias: `[teacher_width]`, one for all pairs or a sequence with one a pair; needs `weight`.
        mask: Bool `[batch, tokens]`, True at valid tokens; None counts all. Not read by "tinybert".
        tokens: "all", or "cls" for the first token of every batch item alone.
        reduction: "valid" divides by valid tokens times `teacher_width`, and masked tokens add
            nothing. "tinybert" averages over all tokens, padding included, as the official code.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where the student is fp64). Gradients reach student, weight and
        bias. Without any valid token the loss and its gradients are 0.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    check_reduction(reduction)
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    if reduction == "tinybert":
        checked = checked._replace(mask=None)
    return row_losses("mse", *checked)
