"""Set what must be set before torch, triton or transformers are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# triton reads TRITON_INTERPRET once, when it is imported; transformers and deepspeed import it too
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiny tensors on few cores: threads would mostly wait for each other
torch.set_num_threads(1)
