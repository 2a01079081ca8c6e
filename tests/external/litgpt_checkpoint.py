"""Write a tiny random model in litgpt's own format, with the tokenizer and data of ``tiny``, a folder by `tiny.py`."""

import json
import shutil
from pathlib import Path

import torch
from litgpt import GPT, Config
from litgpt.utils import save_config

folder = Path("litgpt_tiny")
folder.mkdir(exist_ok=True)
vocab_size = json.loads(Path("tiny/model/config.json").read_text())["vocab_size"]
sizes = dict(block_size=256, n_layer=2, n_embd=64, n_head=4, vocab_size=vocab_size, padded_vocab_size=vocab_size)
torch.manual_seed(0)
config = Config(name="tiny", **sizes)
torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
save_config(config, folder)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(Path("tiny/model") / name, folder)
lines = Path("tiny/data.jsonl").read_text().splitlines()
Path("tiny/data.json").write_text(json.dumps([json.loads(line) for line in lines]))
