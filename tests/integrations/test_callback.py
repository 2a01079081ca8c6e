"""LoRAPreCallback: what it refuses and what it logs."""

import copy
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from adapting import trainable
from peft import LoraConfig
from trainers import ADAMW_LOGGED, ALWAYS_LOGGED, Recorder, arguments, inner, lorapre_trainer, training_logs
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from lorapre_peft import LoRAPreAdamW, LoRAPreCallback, create_lorapre_optimizer, lorapre_optimizer

MUON_LOGGED = ALWAYS_LOGGED | {"lorapre/captured_energy"}


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


def test_callback_checks_the_arguments_beside_a_finished_optimizer(tmp_path, peft_model, tokens):
    model = peft_model()
    ready = create_lorapre_optimizer(model, lr=1e-2, update_in_backward=True, verbose=False)
    args = arguments(tmp_path, max_grad_norm=1.0)
    trainer = Trainer(model, args, train_dataset=tokens, optimizers=(ready, None), callbacks=[LoRAPreCallback()])
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 with update_in_backward=True"):
        trainer.train()


def test_callback_refuses_parameters_that_were_added_since(tmp_path, peft_model, tokens):
    model = peft_model()
    trainer = lorapre_trainer(model, arguments(tmp_path), tokens)
    trainer.create_optimizer()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"does not hold 1 of .* 29 .*embed_tokens.* or parameters were added or loaded anew since"
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


def test_an_attached_callback_does_not_look_for_its_trainer(tmp_path, monkeypatch, peft_model, tokens):
    """`attach` instead of a search among the callers: the figures reach reporters, and NaN losses stop the run."""
    monkeypatch.setattr("lorapre_peft.integrations.callback._caller", lambda kind: None)
    recorder, args = Recorder(), arguments(tmp_path)
    trainer = Trainer(
        peft_model(),
        args,
        train_dataset=tokens,
        callbacks=[recorder],
        optimizer_cls_and_kwargs=lorapre_optimizer("adamw", args),
    )
    callback = LoRAPreCallback.attach(trainer, stop_on_nan_loss=True)
    assert isinstance(callback, LoRAPreCallback)
    trainer.train()
    assert recorder.logs[0].keys() >= ADAMW_LOGGED
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * float("nan")
    with pytest.warns(UserWarning, match="the loss of step 1 is NaN or infinite"):
        trainer.train()


def test_an_attached_callback_may_be_used_elsewhere(tmp_path, peft_model, tokens):
    """A second trainer, a copy, and a run inside another one's callback find their own trainer and optimizer."""

    def trainer(name, *callbacks):
        args = arguments(tmp_path / name)
        built = {"optimizer_cls_and_kwargs": lorapre_optimizer("adamw", args)}
        return Trainer(peft_model(), args, train_dataset=tokens, callbacks=list(callbacks), **built)

    first = trainer("first")
    callback = LoRAPreCallback.attach(first, stop_on_nan_loss=True)
    first.train()
    for number, other in enumerate([callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]):
        recorder = Recorder()
        trainer(f"other{number}", recorder, other).train()
        assert recorder.logs[0].keys() >= ADAMW_LOGGED

    class Nested(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer("inner", plain).train()

    plain, recorder = LoRAPreCallback(), Recorder()
    trainer("outer", recorder, plain, Nested()).train()
    assert recorder.logs[-2].keys() >= ADAMW_LOGGED


def test_the_callback_is_called_once_though_it_moves_to_the_front(tmp_path, peft_model, tokens):
    """It moves while Trainer walks through the list: nobody may be left out or called twice, in a second run
    either.
    """
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
    assert all(p.isfinite().all() for p in trainable(trainer.model).values())


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
    matrices = len(trainable(model))
    assert [entry["lorapre/skipped_updates"] for entry in training_logs(trainer)] == [0, *[matrices] * 3]
    _, first, second, third, _ = recorder.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(second[name], third[name]) for name in first if "lora_B" in name)
