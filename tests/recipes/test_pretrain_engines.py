"""The pre-training recipe in two processes, under DDP and FSDP2: each reads its own rows, and goes on behind them."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import run
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from recipes import pretrain
from recipes.arguments import CONFIGS
from recipes.corpus import train_tokenizer

SMALL = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": 300, "max_length": 16, "shuffle_documents": 7, "eval_tokens": 0, "eval_strategy": "no"},
    **{
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    },
    **{"per_device_train_batch_size": 1, "total_batch_size": 4, "learning_rate": 0.01},
    **{"method_options": "{momentum_rank: 2}", "dtype": "float32", "bf16": "false"},
}
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": "FULL_STATE_DICT"}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def straight_and_resumed(folder, engine):
    """One process's weights, state, losses and rows after four steps, and after two of them, resumed, and two more."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29401"}
    given = SMALL | {"dataset_name": folder / "corpus.jsonl", "output_dir": folder / engine}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    recipe = pretrain.parse(["--config", str(CONFIGS / "pretrain" / "llama_1m_local.yaml"), "--use_cpu", *words])
    if engine == "fsdp2":
        recipe.training.fsdp, recipe.training.fsdp_config = True, dict(FSDP2)
        recipe.training.__post_init__()
        # accelerate looks at its FSDP options only on accelerators, and goes on as DDP on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    results = []
    for checkpoint in (None, str(folder / engine / "checkpoint-2")):
        trainer = pretrain.build_trainer(recipe, tokenizer, [])
        rows = []
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest, step=step, rows=rows: (
            rows.append(inputs["input_ids"].tolist()) or step(model, inputs, *rest)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        held = [param for group in trainer.optimizer.param_groups for param in group["params"]]
        results.append(
            {
                "params": [whole(param) for param in held],
                "state": [
                    {name: whole(value) for name, value in trainer.optimizer.state[param].items()} for param in held
                ],
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "rows": rows,
                "sharded": all(isinstance(param, DTensor) for param in held),
            }
        )
    return results


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_read_rows_of_their_own_and_go_on_bit_for_bit(tmp_path, engine):
    texts = [f"Document {n} says that {n} and {n + 1} are {2 * n + 1}, and nothing else." for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    ranks = run(2, tmp_path / "run", straight_and_resumed, tmp_path, engine)
    for straight, resumed in ranks:
        assert straight["sharded"] == resumed["sharded"] == (engine == "fsdp2")
        assert len(straight["rows"]) == 4 * 2  # two rows of each process a step
        assert resumed["rows"] == straight["rows"][4:]
        assert resumed["losses"] == straight["losses"]
        for name in ("params", "state"):
            torch.testing.assert_close(resumed[name], straight[name], rtol=0, atol=0)
    first, second = (straight["rows"] for straight, _ in ranks)
    assert not any(row in second for row in first)
