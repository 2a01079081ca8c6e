"""Write a tiny random Llama, its byte-level tokenizer and a few problems into a folder, for tools to read.

python tests/external/tiny.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"


def write(folder: Path) -> None:
    """Write ``folder``/model (weights and tokenizer) and ``folder``/data.jsonl (instruction, input, output).

    Beside the data lie its descriptions for LLaMA-Factory: ``dataset_info.json`` in version 0, ``data.yaml`` in
    version 1.
    """
    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=256, **SPECIAL)
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {
        name.replace("token", "token_id"): tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()
    }
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), max_position_embeddings=256, **sizes, **ids))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = (
        {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"It is {a + b}."}
        for a in range(16)
        for b in range(8)
    )
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    (folder / "dataset_info.json").write_text(json.dumps({"problems": {"file_name": data.name}}))
    (folder / "data.yaml").write_text(f"problems: {{path: {data}, source: local, converter: alpaca}}\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
