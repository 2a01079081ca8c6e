"""LoRA-Pre in transformers.Trainer and TRL's SFTTrainer: options, logs, checkpoints, and errors that name the mend."""

import copy
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, LoRAPreConfig, LoRAPreMuon, lorapre_optimizer
from lorapre_peft.adamw import update_bound
from lorapre_peft.optimizer import LoRAPreOptimizer

ALWAYS_LOGGED = {"lorapre/state_bytes", "lorapre/adamw_state_bytes", "lorapre/skipped_updates"}
ADAMW_LOGGED = ALWAYS_LOGGED | {"lorapre/captured_energy", "lorapre/largest_update", "lorapre/clamped_share"}
MUON_LOGGED = ALWAYS_LOGGED | {"lorapre/captured_energy"}


def arguments(tmp_path, config_class=TrainingArguments, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return config_class(**(defaults | options))


@pytest.fixture(scope="module")
def tokens() -> list[dict[str, list[int]]]:
    """24 sequences of 12 tokens, each with its labels."""
    ids = torch.randint(4, 64, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(scope="module")
def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{a} + {b} = {a + b}." for a in range(6) for b in range(4)]})


@pytest.fixture
def peft_model(make_llama):
    """peft_model(**options of LoRAPreConfig): a fresh tiny Llama with a LoRA-Pre adapter."""

    def build(autocast_adapter_dtype=True, dtype=torch.float32, **options):
        config = LoRAPreConfig(**({"r": 8, "target_modules": "all-linear"} | options))
        model = get_peft_model(make_llama(dtype=dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        # Trainer resumes with PEFT's default, which would turn a bf16 adapter into a float32 one.
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=autocast_adapter_dtype)
        return model

    return build


def lorapre_trainer(
    model, args, dataset, callbacks=(), kind="adamw", trainer_class=Trainer, eval_dataset=None, **options
):
    """A trainer with LoRA-Pre's optimizer, its callback after ``callbacks``; ``options`` go to the optimizer."""
    return trainer_class(
        model,
        args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        optimizer_cls_and_kwargs=lorapre_optimizer(kind, args, **options),
        callbacks=[*callbacks, LoRAPreCallback()],
    )


def inner(optimizer) -> LoRAPreOptimizer:
    """The optimizer inside accelerate's wrapper."""
    return optimizer if isinstance(optimizer, LoRAPreOptimizer) else inner(optimizer.optimizer)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Recorder(TrainerCallback):
    """Sees each log as a reporter does, and the optimizer just before and after each step."""

    def __init__(self):
        self.events = Counter()
        self.logs, self.recorded, self.rates, self.gradient_norms, self.weights = [], [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.events["train_begin"] += 1
        self.weights.append(weights(model))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradient_norms.append(torch.cat(gradients).norm().item())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.recorded.append(inner(optimizer).record_metrics)
        self.weights.append(weights(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events["log"] += 1
        self.logs.append(copy.deepcopy(logs))


# ---- lorapre_optimizer: what it reads from the training arguments --------------------------------------------------


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
def test_options_come_from_the_arguments(tmp_path, config_class, kind, prefix, changed, betas):
    """LoRA-Pre's own betas are (0.9, 0.95): Trainer's default of 0.999 must not replace them unasked."""
    args = arguments(tmp_path, config_class, learning_rate=3e-4, weight_decay=0.1, adam_epsilon=1e-6, **changed)
    _, options = lorapre_optimizer(kind, args)
    expected = {"optimizer": kind, "lr": 3e-4, "weight_decay": 0.1, f"{prefix}eps": 1e-6}
    assert options == expected | ({f"{prefix}betas": betas} if betas else {})


def test_overrides_win_over_the_arguments(tmp_path):
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8)
    _, options = lorapre_optimizer("adamw", args, lr=1e-3, betas=(0.9, 0.99), momentum_rank=3)
    assert options["lr"] == 1e-3
    assert options["betas"] == (0.9, 0.99)
    assert options["momentum_rank"] == 3
    assert options["weight_decay"] == 0.1


def test_learning_rate_alone_is_enough():
    assert lorapre_optimizer("muon", lr=1e-3)[1] == {"optimizer": "muon", "lr": 1e-3}


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
        ({"fsdp": "full_shard"}, {}, "fsdp='full_shard': LoRA-Pre needs whole matrices"),
        ({"deepspeed": "zero2.json"}, {}, "deepspeed='zero2.json': LoRA-Pre needs whole matrices"),
        ({"gradient_accumulation_steps": 2}, BACKWARD, "gradient_accumulation_steps=2 with update_in_backward=True"),
        ({"max_grad_norm": 1.0}, BACKWARD, "max_grad_norm=1.0 with update_in_backward=True"),
        ({"max_grad_norm": 0.0, "fp16": True}, BACKWARD, "fp16=True with update_in_backward=True"),
    ],
    ids=["fsdp", "deepspeed", "accumulation", "clipping", "fp16"],
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
    assert losses[-1] < losses[0] - 0.05


def test_two_lines_turn_a_lora_run_into_lora_pre(tmp_path, llama_path, texts):
    """The change as the README shows it, with TRL's own defaults: bf16 autocast, gradient checkpointing, the model's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(llama_path)
    args, ds = arguments(tmp_path, SFTConfig, max_steps=8, logging_steps=4), texts

    model = get_peft_model(model, LoRAPreConfig(r=8, target_modules="all-linear"))
    trainer = SFTTrainer(model, args, train_dataset=ds, optimizer_cls_and_kwargs=lorapre_optimizer("adamw", args), callbacks=[LoRAPreCallback()])  # fmt: skip

    trainer.train()
    logs = training_logs(trainer)
    assert logs[1]["loss"] < logs[0]["loss"] - 0.05
    assert logs[1].keys() >= ADAMW_LOGGED
    trainer.save_model()
    assert LoRAPreConfig.from_pretrained(tmp_path).update_rule == "als"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sft_trainer_wraps_the_model_itself(tmp_path, llama_path, texts, kind):
    """peft_config: the trainable parameters exist only once the trainer is built, and the optimizer must hold those."""
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
    runs = []
    for update_in_backward in (False, True):
        args = arguments(tmp_path, max_grad_norm=0.0, logging_steps=2, lr_scheduler_type="cosine", warmup_steps=1)
        trainer = lorapre_trainer(peft_model(), args, tokens, update_in_backward=update_in_backward)
        trainer.train()
        runs.append([{key: entry[key] for key in ("loss", *sorted(ADAMW_LOGGED))} for entry in training_logs(trainer)])
    assert len(runs[0]) == 2
    for expected, found in zip(*runs):
        assert found == pytest.approx(expected, rel=1e-4)


def test_gradient_accumulation_is_one_update_of_the_whole_batch(tmp_path, peft_model, tokens):
    runs = []
    for micro_batch, accumulation in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        trainer = lorapre_trainer(peft_model(), arguments(tmp_path, **options), tokens)
        trainer.train()
        assert {float(state["step"]) for state in inner(trainer.optimizer).state.values()} == {3.0, 4.0}
        runs.append(trainer)
    losses, accumulated = ([entry["loss"] for entry in training_logs(trainer)] for trainer in runs)
    assert accumulated == pytest.approx(losses, rel=1e-4)


def test_gradients_are_clipped_before_the_step(tmp_path, peft_model, tokens):
    recorder = Recorder()
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, max_grad_norm=1e-3), tokens, [recorder])
    trainer.train()
    assert recorder.gradient_norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert all(entry["grad_norm"] > 2e-3 for entry in training_logs(trainer))


def test_cosine_schedule_with_warmup_is_what_the_steps_apply(tmp_path, peft_model, tokens):
    """Logged rate, rate in the groups and size of the update agree: an update's entries are bounded by C·lr and reach lr."""
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
    assert {p.dtype for p in weights(resumed.model).values()} == {torch.bfloat16 if bf16 else torch.float32}
    assert {v.dtype for state in resumed.optimizer.state.values() for v in state.values()} == {torch.float32}
    checkpoint = LoRAPreConfig.from_pretrained(tmp_path / "checkpoint-3")
    assert checkpoint.update_rule == model_options.get("update_rule", "als")
    assert checkpoint.momentum_rank_pattern == model_options.get("momentum_rank_pattern", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_full_weight_run_equals_the_uninterrupted_one(tmp_path, make_llama, tokens, dtype):
    """Without an adapter: the weights themselves, in bf16 written with stochastic rounding."""
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    straight, resumed = (lorapre_trainer(make_llama(dtype=dtype), args, tokens) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal_runs(straight, resumed)
    assert {p.dtype for p in weights(resumed.model).values()} == {dtype}
    start = make_llama(dtype=dtype)
    assert not any(torch.equal(p, start.get_parameter(name)) for name, p in weights(resumed.model).items())


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
    expected, found = weights(straight.model), weights(resumed.model)
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


# ---- LoRAPreCallback: what it refuses ------------------------------------------------------------------------------


def test_callback_refuses_another_optimizer(tmp_path, peft_model, tokens):
    """The likeliest mistake: the callback is there, the optimizer argument is not."""
    trainer = Trainer(peft_model(), arguments(tmp_path), train_dataset=tokens, callbacks=[LoRAPreCallback()])
    with pytest.raises(
        RuntimeError, match="found the optimizer AdamW, expected LoRAPreAdamW or LoRAPreMuon: pass opt"
    ):
        trainer.train()


def test_callback_refuses_an_optimizer_built_before_the_model_was_wrapped(tmp_path, llama_path, texts):
    model = AutoModelForCausalLM.from_pretrained(llama_path)
    early = LoRAPreAdamW(model.parameters(), lr=1e-2)
    trainer = SFTTrainer(
        model,
        arguments(tmp_path, SFTConfig),
        train_dataset=texts,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
        optimizers=(early, None),
        callbacks=[LoRAPreCallback()],
    )
    with pytest.raises(
        RuntimeError, match=r"does not hold 28 of the model's 28 trainable parameters \(.*lora_A.*built before"
    ):
        trainer.train()


def test_callback_refuses_parameters_that_were_added_since(tmp_path, peft_model, tokens):
    model = peft_model()
    trainer = lorapre_trainer(model, arguments(tmp_path), tokens)
    trainer.create_optimizer()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"does not hold 1 of .* 29 .*embed_tokens.* or parameters were added since"
    ):
        trainer.train()


def test_callback_outside_a_trainer_says_that_reporters_may_miss_its_figures(tmp_path, peft_model, tokens):
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path), tokens)
    with pytest.warns(UserWarning, match="not called by a Trainer"):
        LoRAPreCallback().on_train_begin(
            trainer.args, TrainerState(), TrainerControl(), model=trainer.model, optimizer=trainer.create_optimizer()
        )


# ---- LoRAPreCallback: what it logs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "peft_options", "keys"),
    [("adamw", {}, ADAMW_LOGGED), ("adamw", {"update_rule": "newton"}, ADAMW_LOGGED), ("muon", {}, MUON_LOGGED)],
    ids=["als", "newton", "muon"],
)
def test_figures_reach_the_history_and_the_reporters(tmp_path, peft_model, tokens, kind, peft_options, keys):
    """Trainer calls its reporters (TensorBoard, W&B) before the user's callbacks; the recorder stands for one."""
    recorder = Recorder()
    trainer = lorapre_trainer(peft_model(**peft_options), arguments(tmp_path), tokens, [recorder], kind=kind)
    trainer.train()
    optimizer = inner(trainer.optimizer)
    logs = training_logs(trainer)
    assert len(logs) == 4
    for seen, entry in zip(recorder.logs, logs):
        assert {key: value for key, value in entry.items() if key != "step"} == seen
    ours = [{key: value for key, value in entry.items() if key.startswith("lorapre/")} for entry in logs]
    assert all(entry.keys() == keys for entry in ours[1:])
    state_bytes = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    for entry in ours[1:]:
        assert entry["lorapre/state_bytes"] == state_bytes < entry["lorapre/adamw_state_bytes"]
        assert entry["lorapre/adamw_state_bytes"] == sum(8 * p.numel() + 4 for p in optimizer.state)
        assert 0 < entry["lorapre/captured_energy"] <= 1.0001
        assert entry["lorapre/skipped_updates"] == 0
        if kind == "adamw":
            assert 0 <= entry["lorapre/clamped_share"] <= 1
            assert entry["lorapre/largest_update"] > 0


def test_the_callback_is_called_once_though_it_moves_to_the_front(tmp_path, peft_model, tokens):
    """It moves while Trainer walks through the list: nobody may be left out or called twice, in a second run either."""
    before, after = Recorder(), Recorder()
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, max_steps=2), tokens, [before])
    trainer.add_callback(after)
    for run in (1, 2):
        trainer.train()
        assert [type(c) for c in trainer.callback_handler.callbacks].count(LoRAPreCallback) == 1
        for recorder in (before, after):
            assert recorder.events == {"train_begin": run, "log": 3 * run}  # two steps and the summary
            assert recorder.logs[-2].keys() >= ADAMW_LOGGED


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.5}, [4]),  # a share of max_steps, rounded up
        ({"logging_steps": 100}, []),
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    ],
)
def test_metrics_are_recorded_on_logging_steps_only(tmp_path, peft_model, tokens, options, recorded):
    """They cost two passes over the gradients, which no other step should pay."""
    recorder = Recorder()
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, max_steps=7, **options), tokens, [recorder])
    trainer.train()
    assert [step for step, flag in enumerate(recorder.recorded, 1) if flag] == recorded
    assert [entry["step"] for entry in training_logs(trainer)] == recorded
    for entry in training_logs(trainer):
        # At the first step there is no momentum yet whose row space could have captured anything.
        assert entry.keys() >= (ADAMW_LOGGED if entry["step"] > 1 else ALWAYS_LOGGED)


def test_logging_by_epoch(tmp_path, peft_model, tokens):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy="epoch")
    trainer = lorapre_trainer(peft_model(), args, tokens)
    trainer.train()
    logs = training_logs(trainer)
    assert [entry["step"] for entry in logs] == [6, 12]
    assert all(entry.keys() >= ADAMW_LOGGED for entry in logs)


def test_evaluation_logs_and_the_summary_are_left_alone(tmp_path, peft_model, tokens):
    recorder = Recorder()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = lorapre_trainer(peft_model(), args, tokens, [recorder], eval_dataset=tokens[:4])
    trainer.train()
    trainer.evaluate()
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert ["eval_loss" in entry for entry in others] == [
        True,
        True,
        False,
        True,
    ]  # steps 2 and 4, summary, afterwards
    for entry in [*others, *(entry for entry in recorder.logs if "loss" not in entry)]:
        assert not [key for key in entry if key.startswith("lorapre/")]


# ---- non-finite gradients ------------------------------------------------------------------------------------------


class PoisonGradient(TrainerCallback):
    """Puts a NaN into the gradient of one parameter just before the second step, as an overflow would."""

    def __init__(self, name: str):
        self.name = name

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.get_parameter(self.name).grad.view(-1)[0] = float("nan")


POISONED = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def test_nonfinite_gradient_is_skipped_and_reported(tmp_path, peft_model, tokens):
    recorder = Recorder()
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path), tokens, [PoisonGradient(POISONED), recorder])
    with pytest.warns(UserWarning, match="a gradient has the norm nan: .* skipped"):
        trainer.train()
    assert [entry["lorapre/skipped_updates"] for entry in training_logs(trainer)] == [0, 1, 1, 1]
    moved = [not torch.equal(a[POISONED], b[POISONED]) for a, b in pairwise(recorder.weights)]
    assert moved == [True, False, True, True]
    assert all(p.isfinite().all() for p in weights(trainer.model).values())


def test_nonfinite_gradient_through_clipping_skips_the_whole_step(tmp_path, peft_model, tokens):
    """Clipping by a NaN norm makes every gradient NaN: nothing moves, and training goes on after it."""
    recorder, model = Recorder(), peft_model()
    calls = Counter()

    def poison(gradient):
        calls["backward"] += 1
        return gradient * float("nan") if calls["backward"] == 2 else gradient

    model.get_parameter(POISONED).register_hook(poison)
    trainer = lorapre_trainer(model, arguments(tmp_path, max_grad_norm=1.0), tokens, [recorder])
    with pytest.warns(UserWarning, match="a gradient has the norm nan"):
        trainer.train()
    matrices = len(weights(model))
    assert [entry["lorapre/skipped_updates"] for entry in training_logs(trainer)] == [0, *[matrices] * 3]
    _, first, second, third, _ = recorder.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(second[name], third[name]) for name in first if "lora_B" in name)
