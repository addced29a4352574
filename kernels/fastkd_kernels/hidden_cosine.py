"""Cosine distance and normalised squared error of projected hidden states.

Both are one op: the squared distance of two unit vectors is twice their cosine distance. That
distance is summed, not one minus the cosine, which loses its digits as the student nears the
teacher.
"""

from collections.abc import Sequence

from torch import Tensor

from .hidden_checks import check_hidden
from .hidden_rows import row_losses
from .types import Backend, Tokens


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of `1 - cos(student @ weight^T + bias, teacher)`, for each layer pair.

    Source: DistilBERT, arXiv 1910.01108, section 3 (cosine embedding loss of hidden states).

    A vector whose norm is 1e-12 or less counts as a zero vector and gets no gradient: a token is
    worth 1/2 where one of its two vectors is zero, and 0 where both are.

    Args:
        student: One `[batch, tokens, student_width]` a pair, in bf16, fp16, fp32 or fp64.
        teacher: One `[batch, tokens, teacher_width]` a pair.
        weight: `[teacher_width, student_width]` as in `nn.Linear`: one tensor for all pairs or a
            sequence with one a pair. None compares hidden states as they are.
        bias: `[teacher_width]`, one for all pairs or a sequence with one a pair; needs `weight`.
        mask: Bool `[batch, tokens]`, True at valid tokens, the others add nothing; None counts all.
        tokens: "all", or "cls" for the first token of every batch item alone.
        backend: "auto" runs Triton on CUDA, PyTorch on the CPU and for fp64.

    Returns:
        `[pairs]` in fp32 (fp64 where the student is fp64). Gradients reach student, weight and
        bias. Without any valid token the loss and its gradients are 0.

    Raises:
        ValueError: shapes, devices, modes that do not fit, or a teacher that requires grad.
        TypeError: something that is no float tensor or no bool mask.
    """
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    return row_losses("cosine", *checked)


def hidden_normalized_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    tokens: Tokens = "all",
    backend: Backend = "auto",
) -> Tensor:
    """Mean over tokens of `|u / |u| - v / |v||^2`, for each layer pair: twice `hidden_cosine`.

    `u` is `student @ weight^T + bias`, `v` the teacher. Source: PKD, arXiv 1908.09355, eq. 7, which
    compares the first token (`tokens="cls"`). Arguments, results and errors are those of
    `hidden_cosine`; a token is worth 1 where one of its two vectors is zero, and 0 where both are.
    """
    checked = check_hidden(student, teacher, weight, bias, mask, tokens, backend)
    return row_losses("normalized_mse", *checked)
