"""Trainer and SFTTrainer: the arguments that are read, whole runs, checkpoints."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapting import trainable
from peft import get_peft_model
from roundoff import assert_same_steps, gamma, undisturbed
from trainers import ADAMW_LOGGED, Recorder, arguments, inner, lorapre_trainer, training_logs
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, LoRAPreConfig, LoRAPreMuon, lorapre_optimizer
from lorapre_peft.optim.adamw import update_bound

# ---- lorapre_optimizer: what it reads from the training arguments --------------------------------------------------


def built(model, *args, **overrides):
    """The optimizer as Trainer builds it."""
    factory, options = lorapre_optimizer(*args, **overrides)
    return factory()(model, **options)


@pytest.mark.parametrize(
    ("changed", "betas"),
    [
        ({}, None),
        ({"adam_beta1": 0.8}, (0.8, 0.95)),
        ({"adam_beta2": 0.98}, (0.9, 0.98)),
        ({"adam_beta1": 0.85, "adam_beta2": 0.97}, (0.85, 0.97)),
    ],
)
@pytest.mark.parametrize(("kind", "prefix"), [("adamw", ""), ("muon", "adamw_")])
@pytest.mark.parametrize("config_class", [TrainingArguments, SFTConfig])
def test_options_come_from_the_arguments(tmp_path, peft_model, config_class, kind, prefix, changed, betas):
    """LoRA-Pre's own betas are (0.9, 0.95): Trainer's default of 0.999 must not replace them unasked."""
    args = arguments(tmp_path, config_class, learning_rate=3e-4, weight_decay=0.1, adam_epsilon=1e-6, **changed)
    (group,) = built(peft_model(), kind, args).param_groups
    expected = {"lr": 3e-4, "weight_decay": 0.1, f"{prefix}eps": 1e-6, f"{prefix}betas": betas or (0.9, 0.95)}
    assert {name: group[name] for name in expected} == expected


def test_overrides_win_over_the_arguments(tmp_path, peft_model):
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8)
    (group,) = built(peft_model(), "adamw", args, lr=1e-3, betas=(0.9, 0.99), momentum_rank=3).param_groups
    expected = {"lr": 1e-3, "betas": (0.9, 0.99), "momentum_rank": 3, "weight_decay": 0.1}
    assert {name: group[name] for name in expected} == expected


def test_learning_rate_alone_is_enough(peft_model):
    (group,) = built(peft_model(), "muon", lr=1e-3).param_groups
    assert group["lr"] == 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("adamw",), r"no learning rate: .*lorapre_optimizer\('adamw', args\)"),
        (("adam",), "optimizer='adam': expected one of 'adamw', 'muon'"),
    ],
)
def test_lorapre_optimizer_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        lorapre_optimizer(*call)


BACKWARD = {"update_in_backward": True}


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({"fsdp_plugin_args": {"fsdp_version": 1}}, {}, "version 1: .* FSDP1 .* flattened shards. Use FSDP2"),
        ({"deepspeed": "zero2.json"}, {}, "deepspeed='zero2.json': .* flattened shards. Use FSDP2, DDP"),
        ({"gradient_accumulation_steps": 2}, BACKWARD, "gradient_accumulation_steps=2 with update_in_backward=True"),
        ({"max_grad_norm": 1.0}, BACKWARD, "max_grad_norm=1.0 with update_in_backward=True"),
        ({"max_grad_norm": 0.0, "fp16": True}, BACKWARD, "fp16=True with update_in_backward=True"),
    ],
    ids=["fsdp1", "deepspeed", "accumulation", "clipping", "fp16"],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, changed, overrides, message):
    args = arguments(tmp_path)
    for name, value in changed.items():  # afterwards: constructing with them would need the engine, or a GPU
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        lorapre_optimizer("adamw", args, **overrides)


@pytest.mark.parametrize(("kind", "optimizer_class"), [("adamw", LoRAPreAdamW), ("muon", LoRAPreMuon)])
def test_trainer_builds_the_optimizer_with_these_options(tmp_path, peft_model, tokens, kind, optimizer_class):
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.1, adam_beta2=0.98)
    model = peft_model(modules_to_save=["norm"])
    trainer = lorapre_trainer(model, args, tokens, kind=kind, momentum_rank=3)
    optimizer = inner(trainer.create_optimizer())
    assert type(optimizer) is optimizer_class
    assert {(g["momentum_rank"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups} == {
        (3, 0.1, 3e-4),
        (0, 0.0, 3e-4),  # the norm
    }
    assert {g.get("adamw_betas", g.get("betas")) for g in optimizer.param_groups} == {(0.9, 0.98)}


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "peft_options"),
    [
        ("adamw", {}, {}),
        ("adamw", {"weight_decay": 0.1}, {"use_dora": True, "momentum_rank": 3}),
        ("adamw", {}, {"update_rule": "newton"}),
        ("muon", {"lr": 0.1}, {"modules_to_save": ["norm"]}),
    ],
    ids=["adamw", "dora", "newton", "muon"],
)
def test_trainer_lowers_the_loss(tmp_path, peft_model, tokens, kind, options, peft_options):
    args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=24)
    trainer = lorapre_trainer(peft_model(**peft_options), args, tokens, kind=kind, **options)
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert len(losses) == 6
    assert min(losses) < losses[0] - 0.05  # the last of `newton`, whose updates have no bound, may have risen again


def test_two_lines_turn_a_lora_run_into_lora_pre(tmp_path, llama_path, texts):
    """The change as the README shows it, with TRL's own defaults: bf16 autocast, gradient checkpointing, the model's
    tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(llama_path)
    args, ds = arguments(tmp_path, SFTConfig, max_steps=8, logging_steps=4), texts

    model = get_peft_model(model, LoRAPreConfig(r=8, target_modules="all-linear"))
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=ds,
        optimizer_cls_and_kwargs=lorapre_optimizer("adamw", args),
        callbacks=[LoRAPreCallback()],
    )

    trainer.train()
    logs = training_logs(trainer)
    assert logs[1]["loss"] < logs[0]["loss"] - 0.05
    assert logs[1].keys() >= ADAMW_LOGGED
    trainer.save_model()
    assert LoRAPreConfig.from_pretrained(tmp_path).update_rule == "als"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sft_trainer_wraps_the_model_itself(tmp_path, llama_path, texts, kind):
    """peft_config: the trainable parameters exist only once the trainer is built, and the optimizer must hold
    those.
    """
    args = arguments(tmp_path, SFTConfig, max_steps=8, logging_steps=4, learning_rate=1e-2 if kind == "adamw" else 0.1)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(llama_path),
        args,
        train_dataset=texts,
        peft_config=LoRAPreConfig(r=8, target_modules="all-linear", momentum_rank=3),
        optimizer_cls_and_kwargs=lorapre_optimizer(kind, args),
        callbacks=[LoRAPreCallback()],
    )
    trainer.train()
    logs = training_logs(trainer)
    assert logs[1]["loss"] < logs[0]["loss"] - 0.05
    optimizer = inner(trainer.optimizer)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {optimizer.state[p]["m_A"].shape[0] for p in held} == {3}


def test_updating_in_the_backward_pass_gives_the_same_run(tmp_path, peft_model, tokens):
    """Losses and figures too, which are then recorded while Trainer still walks through the backward pass."""

    def logged(update_in_backward, prepare=undisturbed):
        args = arguments(tmp_path, max_grad_norm=0.0, logging_steps=2, lr_scheduler_type="cosine", warmup_steps=1)
        trainer = lorapre_trainer(peft_model(), args, tokens, update_in_backward=update_in_backward)
        prepare(inner(trainer.create_optimizer()))
        trainer.train()
        entries = training_logs(trainer)
        assert len(entries) == 2
        return [torch.tensor(entry[key]) for entry in entries for key in ("loss", *sorted(ADAMW_LOGGED))]

    assert_same_steps(logged(True), partial(logged, False))


def test_gradient_accumulation_is_one_update_of_the_whole_batch(tmp_path, peft_model, tokens):
    def losses(micro_batch, accumulation, prepare=undisturbed):
        options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        trainer = lorapre_trainer(peft_model(), arguments(tmp_path, **options), tokens)
        prepare(inner(trainer.create_optimizer()))
        trainer.train()
        assert {float(state["step"]) for state in inner(trainer.optimizer).state.values()} == {3.0, 4.0}
        return [torch.tensor(entry["loss"]) for entry in training_logs(trainer)]

    # Of the same weights too, as the first one is, losses differ: a mean over the batch, of half of it at a time.
    assert_same_steps(losses(2, 2), partial(losses, 4, 1), rtol=2 * gamma(4 * 12 + 2 * 64))


def test_gradients_are_clipped_before_the_step(tmp_path, peft_model, tokens):
    recorder = Recorder()
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, max_grad_norm=1e-3), tokens, [recorder])
    trainer.train()
    assert recorder.gradient_norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert all(entry["grad_norm"] > 2e-3 for entry in training_logs(trainer))


def test_cosine_schedule_with_warmup_is_what_the_steps_apply(tmp_path, peft_model, tokens):
    """Logged rate, rate in the groups and size of the update agree: an update's entries are bounded by C·lr and reach
    lr.
    """
    recorder = Recorder()
    args = arguments(tmp_path, max_steps=8, lr_scheduler_type="cosine", warmup_steps=3)
    trainer = lorapre_trainer(peft_model(), args, tokens, [recorder])
    trainer.train()
    logged = [entry["learning_rate"] for entry in training_logs(trainer)]
    assert logged == recorder.rates
    assert logged[:4] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, 1e-2])
    assert all(a > b for a, b in pairwise(logged[3:]))
    for lr, (before, after) in zip(logged, pairwise(recorder.weights)):
        largest = max((after[name] - before[name]).abs().max().item() for name in before)
        assert 0.5 * lr <= largest <= update_bound(0.9, 0.95) * lr * (1 + 1e-3)


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model_options"),
    [
        ("adamw", {}),
        ("adamw", {"dtype": torch.bfloat16}),
        ("adamw", {"dtype": torch.bfloat16, "autocast_adapter_dtype": False}),
        ("adamw", {"update_rule": "newton", "use_dora": True, "momentum_rank_pattern": {"q_proj": 3}}),
        ("muon", {"modules_to_save": ["lm_head"]}),
        ("muon", {"dtype": torch.bfloat16, "autocast_adapter_dtype": False}),
    ],
    ids=["adamw", "adamw-bf16-base", "adamw-bf16", "newton-dora", "muon", "muon-bf16"],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, peft_model, tokens, kind, model_options):
    """Bit for bit, with dropout, shuffling and a schedule: weights, optimizer state and logs."""
    args = arguments(tmp_path, max_steps=5, lr_scheduler_type="cosine", save_strategy="steps", save_steps=3)

    def build():
        return lorapre_trainer(peft_model(lora_dropout=0.1, **model_options), args, tokens, kind=kind)

    straight = build()
    straight.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    check_equal_runs(straight, resumed)
    assert [entry["step"] for entry in training_logs(resumed)] == [1, 2, 3, 4, 5]
    bf16 = not model_options.get("autocast_adapter_dtype", True)
    assert {p.dtype for p in trainable(resumed.model).values()} == {torch.bfloat16 if bf16 else torch.float32}
    assert {v.dtype for state in resumed.optimizer.state.values() for v in state.values()} == {torch.float32}
    checkpoint = LoRAPreConfig.from_pretrained(tmp_path / "checkpoint-3")
    assert checkpoint.update_rule == model_options.get("update_rule", "als")
    assert checkpoint.momentum_rank_pattern == model_options.get("momentum_rank_pattern", {})


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [("default", {}, str), ("default", {}, Path), ("policy", {}, str), ("default", {"use_dora": True}, str)],
    ids=["default", "path", "another-name", "dora"],
)
def test_an_adapter_resumes_in_the_precision_in_which_it_was_saved(tmp_path, make_llama, tokens, name, options, kind):
    """PEFT makes float32 of bfloat16 as it loads an adapter, as SFTTrainer makes bfloat16 of QLoRA's."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)

    def build():
        config = LoRAPreConfig(r=8, target_modules="all-linear", **options)
        return lorapre_trainer(get_peft_model(make_llama(), config, adapter_name=name).bfloat16(), args, tokens)

    straight, resumed = build(), build()
    straight.train()
    resumed.train(resume_from_checkpoint=kind(tmp_path / "checkpoint-2"))
    check_equal_runs(straight, resumed)
    assert {param.dtype for param in trainable(resumed.model).values()} == {torch.bfloat16}


def test_a_resumed_run_may_have_another_weight_decay(tmp_path, peft_model, tokens):
    """The groups do not depend on its value, and the checkpoint's holds, as in torch."""

    def build(weight_decay):
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, weight_decay=weight_decay)
        return lorapre_trainer(peft_model(modules_to_save=["lm_head", "norm"]), args, tokens)

    straight, resumed = build(0.0), build(0.1)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal_runs(straight, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_full_weight_run_equals_the_uninterrupted_one(tmp_path, make_llama, tokens, dtype):
    """Without an adapter: the weights themselves, in bf16 written with stochastic rounding."""
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    straight, resumed = (lorapre_trainer(make_llama(dtype=dtype), args, tokens) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal_runs(straight, resumed)
    assert {p.dtype for p in trainable(resumed.model).values()} == {dtype}
    start = make_llama(dtype=dtype)
    assert not any(torch.equal(p, start.get_parameter(name)) for name, p in trainable(resumed.model).items())


def test_resumed_sft_run_equals_the_uninterrupted_one(tmp_path, llama_path, texts):
    args = arguments(tmp_path, SFTConfig, max_steps=4, save_strategy="steps", save_steps=2)

    def build():
        model = AutoModelForCausalLM.from_pretrained(llama_path)
        torch.manual_seed(0)
        model = get_peft_model(model, LoRAPreConfig(r=8, target_modules="all-linear", lora_dropout=0.1))
        return lorapre_trainer(model, args, texts, trainer_class=SFTTrainer)

    straight = build()
    straight.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal_runs(straight, resumed)


def check_equal_runs(straight, resumed):
    expected, found = trainable(straight.model), trainable(resumed.model)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    expected, found = (inner(trainer.optimizer).state_dict() for trainer in (straight, resumed))
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        assert found["state"][i].keys() == state.keys()
        assert all(torch.equal(found["state"][i][name], value) for name, value in state.items()), i
    # Not TRL's own counts, of tokens for one, which start anew.
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", *ADAMW_LOGGED)
    expected, found = (
        [{key: entry.get(key) for key in kept} for entry in training_logs(trainer)] for trainer in (straight, resumed)
    )
    assert found == expected


def test_arguments_changed_later_are_read_when_an_optimizer_is_built(tmp_path, peft_model, tokens):
    """As a hyperparameter search changes them from trial to trial; what was given to `lorapre_optimizer`
    itself stays.
    """
    args = arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1)
    trainer = lorapre_trainer(peft_model(), args, tokens, weight_decay=0.2)
    for lr, given, beta2 in (1e-3, 0.96, 0.96), (5e-3, 0.98, 0.98), (1e-3, 0.999, 0.95):  # 0.999: Trainer's default
        args.learning_rate, args.adam_beta2, trainer.optimizer = lr, given, None
        (group,) = inner(trainer.create_optimizer()).param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (lr, (0.9, beta2), 0.2)
