"""The trainers of TRL and transformers that `docs/tools.md` shows, each run for two steps as it is shown there."""

import pytest
import torch
from adapting import trainable
from datasets import Dataset
from peft import TaskType
from trainers import ADAMW_LOGGED, arguments, inner, training_logs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, LoRAPreConfig, lorapre_optimizer

ADAPTER = LoRAPreConfig(r=8, target_modules="all-linear")
PAIRS = Dataset.from_list([{"prompt": f"{a} + 1 = ", "chosen": str(a + 1), "rejected": str(a)} for a in range(8)])
LABELLED = Dataset.from_list(
    [{"prompt": f"{a} + 1 = ", "completion": str(a + b), "label": b == 1} for a in range(4) for b in range(2)]
)


def dpo(folder, path):
    args = arguments(folder, DPOConfig, max_steps=2, max_length=32)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        args=args,
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=ADAPTER,
        callbacks=[LoRAPreCallback()],
    )
    trainer.optimizer_cls_and_kwargs = lorapre_optimizer("adamw", args)
    return trainer


def kto(folder, path):
    args = arguments(folder, KTOConfig, max_steps=2, max_length=32)
    trainer = KTOTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        args=args,
        train_dataset=LABELLED,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=ADAPTER,
        callbacks=[LoRAPreCallback()],
    )
    trainer.optimizer_cls_and_kwargs = lorapre_optimizer("adamw", args)
    return trainer


def grpo(folder, path):
    # temperature 3 and a reward of every character: groups whose rewards are all equal would have no gradient
    args = arguments(folder, GRPOConfig, max_steps=2, num_generations=4, max_completion_length=6, temperature=3.0)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text))) for text in completions],
        args=args,
        train_dataset=PAIRS.select_columns("prompt"),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=ADAPTER,
        callbacks=[LoRAPreCallback()],
    )
    trainer.optimizer_cls_and_kwargs = lorapre_optimizer("adamw", args)
    return trainer


def reward(folder, path):
    args = arguments(folder, RewardConfig, max_steps=2, max_length=32)
    return RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1),
        args=args,
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoRAPreConfig(r=8, target_modules="all-linear", task_type=TaskType.SEQ_CLS),
        optimizer_cls_and_kwargs=lorapre_optimizer("adamw", args),
        callbacks=[LoRAPreCallback()],
    )


def seq2seq(folder, path):
    """Without an adapter: the attention and MLP weights of encoder and decoder."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ids = torch.randint(4, 64, (8, 12), generator=torch.Generator().manual_seed(1)).tolist()
    args = arguments(folder, Seq2SeqTrainingArguments, max_steps=2)
    trainer = Seq2SeqTrainer(
        T5ForConditionalGeneration(T5Config(**sizes)),
        args,
        train_dataset=[{"input_ids": row, "labels": row[::-1]} for row in ids],
        callbacks=[LoRAPreCallback()],
    )
    trainer.optimizer_cls_and_kwargs = lorapre_optimizer("adamw", args)
    return trainer


@pytest.mark.parametrize("build", [dpo, kto, grpo, reward, seq2seq])
def test_trainer_trains_with_lorapre(tmp_path, llama_path, build):
    trainer = build(tmp_path, llama_path)
    before = trainable(trainer.model)
    trainer.train()
    optimizer = inner(trainer.optimizer)
    assert type(optimizer) is LoRAPreAdamW
    assert any("m_A" in state for state in optimizer.state.values())
    assert training_logs(trainer)[1].keys() >= ADAMW_LOGGED
    after = trainable(trainer.model)
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name in after)
