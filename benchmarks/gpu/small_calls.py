"""Small calls of every op, forward and backward: `python -m benchmarks.gpu.small_calls DEVICE`.

Says the name of each op once its calls are done.
"""

import sys

import torch

from benchmarks.calls import MAKERS, make_call
from benchmarks.gpu.memcheck import CALLED

# heads of two sizes, a causal mask and shared key heads; with a projection and without
WORKLOADS = {
    "attention": ("bert-base-to-tinybert-4-128", "llama-like-2048"),
    "hidden": ("bert-base-to-tinybert-4", "minilm-6-to-3"),
    "indexer": ("indexer-gqa-2048", "indexer-mla-2048"),
    "logits": ("logits-32k-2048",),
    "relation": ("minilm-6-to-3-128",),
}


def call(op: str, device: str) -> None:
    """One op on each of its workloads and in each dtype."""
    on_cpu = device == "cpu"
    dtypes = [torch.float32] if on_cpu else [torch.float32, torch.bfloat16]
    # more than one block, the last one not full
    tokens = 10 if on_cpu else 150
    pairs = 1 if op == "logits_divergence" else 2
    for workload in WORKLOADS[op.split("_")[0]]:
        for dtype in dtypes:
            make_call(op, workload, pairs, device=device, dtype=dtype, tokens=tokens).step()
            if not on_cpu:
                torch.cuda.synchronize()


def main() -> None:
    (device,) = sys.argv[1:]
    for op in MAKERS:
        call(op, device)
        print(f"{CALLED}{op}", flush=True)


if __name__ == "__main__":
    main()
