"""This module trains a tiny Llama with the README's two lines where only the wheel is installed.

`make test-wheel` runs it. There is neither a compiler on the PATH nor a kernel in the cache, so under Linux the
wheel's own kernels must suffice.
"""

import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorapre_peft
from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer

# Without this, kernels that the wheel lacks would only give a warning and slower steps.
warnings.filterwarnings("error", message=".* a slower one is used")

assert Path(lorapre_peft.__file__).is_relative_to(sys.prefix), f"not the wheel's: {lorapre_peft.__file__}"
extras = [name for name in ("trl", "datasets", "eval", "recipes") if importlib.util.find_spec(name)]
assert not extras, f"found {extras}, which the wheel alone does not bring"

assert not shutil.which("g++"), "the kernels are to be the wheel's own"

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**sizes))
tokens = torch.arange(32).view(2, 16)
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(folder)
    model = get_peft_model(base, LoRAPreConfig(r=8, target_modules="all-linear"))
    optimizer = create_lorapre_optimizer(model, "adamw", lr=2e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(f"{folder}/adapter")
    opened = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), f"{folder}/adapter")
assert losses[-1] < losses[0], losses
torch.testing.assert_close(opened(input_ids=tokens).logits, model(input_ids=tokens).logits)
version = importlib.metadata.version("lorapre-peft")
print(f"lorapre-peft {version} alone, torch {torch.__version__}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
