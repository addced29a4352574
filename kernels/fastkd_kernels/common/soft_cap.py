"""The soft cap of scores and logits (Gemma 2, arXiv 2408.00118, section 2), in PyTorch."""

from torch import Tensor


def cap_scores(scores: Tensor, softcap: float, *, need_slope: bool) -> Tensor | None:
    """`softcap * tanh(scores / softcap)` in place of the scores; its derivative if needed."""
    scores.div_(softcap)
    # 1 / cosh^2, because 1 - tanh^2 has no digits left where the cap is reached
    slope = scores.cosh().square_().reciprocal_() if need_slope else None
    scores.tanh_().mul_(softcap)
    return slope
