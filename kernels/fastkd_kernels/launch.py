"""Launch parameters: data and pure functions, so that a test can read them without a GPU."""

from importlib.util import find_spec


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
