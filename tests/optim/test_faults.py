"""What goes wrong in long runs: killed processes, broken files, NaN losses, overflows, spikes, and models that change
under way.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from adapting import adapted, train
from killed_saves import FILES, killed_trainer
from roundoff import assert_same_steps, undisturbed
from stepping import both_optimizers, both_rules
from torch import nn
from trainers import arguments, inner, lorapre_trainer, training_logs, weights
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lorapre_peft import (
    LoRAPreAdamW,
    LoRAPreCallback,
    LoRAPreConfig,
    create_lorapre_optimizer,
    last_complete_checkpoint,
)

# ---- killed while saving --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder for each file of FILES, of a run that was killed while it wrote that file."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).parents[1] / "helpers" / "killed_saves.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (script.parents[2], script.parents[1])))}
    subprocess.run([sys.executable, script, folder], check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = killed_trainer(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train()
    return trainer


def assert_same_end(trainer, other):
    for ours, theirs in (
        (weights(trainer.model), weights(other.model)),
        *zip(*(inner(t.optimizer).state_dict()["state"].values() for t in (trainer, other))),
    ):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.filterwarnings("ignore:.*is not complete")
@pytest.mark.parametrize("name", FILES)
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(killed, uninterrupted, name):
    folder = killed / name
    assert Path(get_last_checkpoint(folder)).name == "checkpoint-4"  # what resume_from_checkpoint=True takes
    checkpoint = last_complete_checkpoint(folder)
    assert Path(checkpoint).name == ("checkpoint-4" if name == "rotation" else "checkpoint-2")
    resumed = killed_trainer(folder)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_end(resumed, uninterrupted)
    assert Path(last_complete_checkpoint(folder)).name == "checkpoint-6"


def test_a_checkpoint_that_is_written_anew_may_be_broken_with_its_last_file_in_place(uninterrupted, tmp_path):
    """A resumed run passes the step of an older checkpoint and writes into its folder."""
    saved = Path(uninterrupted.args.output_dir)
    names = {path.name for path in (saved / "checkpoint-4").iterdir()} - {"README.md"}
    assert names > {*FILES} - {"rotation"}
    for name in names:
        folder = tmp_path / name
        for step in (2, 4):
            shutil.copytree(saved / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        os.truncate(folder / "checkpoint-4" / name, 10)
        with pytest.warns(
            UserWarning, match=rf"checkpoint-4 is not complete \({re.escape(name)}\): it is passed over"
        ):
            assert Path(last_complete_checkpoint(folder)).name == "checkpoint-2"


def test_checkpoints_are_ordered_by_number_and_others_are_no_checkpoints(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "old-checkpoint-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-10"


# ---- broken and foreign files ---------------------------------------------------------------------------------------


def foreign_state(folder):
    """What another optimizer would have left under the same name."""
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    params[0].grad = torch.ones(3, 2)
    other = torch.optim.AdamW(params)
    other.step()
    torch.save(other.state_dict(), folder / "optimizer.pt")


def another_rank(folder):
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for group in saved["param_groups"]:
        group["momentum_rank"] = 3
    torch.save(saved, folder / "optimizer.pt")


BROKEN = {
    "truncated": (lambda folder: os.truncate(folder / "optimizer.pt", 1000), RuntimeError, "PytorchStreamReader"),
    "empty": (lambda folder: os.truncate(folder / "optimizer.pt", 0), EOFError, ""),
    "of another optimizer": (foreign_state, ValueError, "another optimizer's, expected LoRAPreAdamW's"),
    "of another rank": (another_rank, ValueError, "saved with momentum_rank=3, .* has momentum_rank=2, .* Build"),
}


@pytest.mark.parametrize(("break_it", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_optimizer_file_is_refused_before_a_step(uninterrupted, tmp_path, break_it, error, message):
    shutil.copytree(Path(uninterrupted.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    break_it(tmp_path / "checkpoint-4")
    trainer = killed_trainer(tmp_path)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step in (0, 4)
    assert not inner(trainer.optimizer).state


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_resuming_without_optimizer_state_is_said(uninterrupted, tmp_path, name):
    """Trainer starts the momenta and the schedule anew without a word if either file is missing."""
    shutil.copytree(Path(uninterrupted.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / name).unlink()
    with pytest.warns(UserWarning, match="resumes at step 4 without optimizer state: the momenta start anew"):
        killed_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ---- NaN losses -----------------------------------------------------------------------------------------------------


def spoil(model, value, calls):
    """Add ``value`` to the loss of these forward passes, counted from 1; an infinite one leaves the gradients as they
    are.
    """
    count = iter(range(1, 10_000))

    def hook(module, inputs, output):
        if torch.is_grad_enabled() and next(count) in calls:
            output.loss = output.loss * value if value != value else output.loss + value
        return output

    return model.register_forward_hook(hook)


def watched_trainer(folder, model, tokens, **options):
    args = arguments(folder, **({"max_steps": 5, "save_strategy": "steps", "save_steps": 100} | options))
    return lorapre_trainer(model, args, tokens, callback=LoRAPreCallback(stop_on_nan_loss=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_loss_stops_the_run_at_the_last_good_step(tmp_path, peft_model, tokens, value, accumulation):
    """An infinite loss may have finite gradients, and one bad micro-batch is enough."""
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    good = watched_trainer(tmp_path / "good", peft_model(), tokens, max_steps=2, **options)
    good.train()
    model = peft_model()
    spoil(model, value, [2 * accumulation + 1])
    trainer = watched_trainer(tmp_path / "bad", model, tokens, **options)
    with pytest.warns(
        UserWarning, match=r"the loss of step 3 is NaN or infinite: .* saved as checkpoint-3\. Lower the"
    ):
        trainer.train()
    assert trainer.state.global_step == 3
    assert_same_end(trainer, good)
    checkpoint = last_complete_checkpoint(tmp_path / "bad")
    assert Path(checkpoint).name == "checkpoint-3"
    resumed = watched_trainer(tmp_path / "bad", peft_model(), tokens, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 5
    assert all(p.isfinite().all() for p in weights(resumed.model).values())
    assert not any(torch.equal(a, b) for a, b in zip(*(weights(t.model).values() for t in (resumed, good))))


def test_a_nan_loss_stops_updates_in_the_backward_pass(tmp_path, peft_model, tokens):
    runs = []
    for steps, calls in ((2, []), (5, [3])):
        model = peft_model()
        spoil(model, float("nan"), calls)
        args = arguments(tmp_path, max_steps=steps, max_grad_norm=0)
        callback = LoRAPreCallback(stop_on_nan_loss=True)
        runs.append(lorapre_trainer(model, args, tokens, callback=callback, update_in_backward=True))
        runs[-1].train()
    assert runs[1].state.global_step == 3
    assert_same_end(*runs)
    assert not list(tmp_path.glob("checkpoint-*"))  # save_strategy="no"


def test_nan_losses_are_watched_in_every_run_and_not_in_evaluation(tmp_path, peft_model, tokens):
    model = peft_model()
    trainer = watched_trainer(tmp_path, model, tokens, max_steps=3, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 3
    handle = spoil(model, float("nan"), [2])
    trainer.train()
    assert trainer.state.global_step == 2
    handle.remove()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert torch.tensor(trainer.evaluate(tokens[:4])["eval_loss"]).isnan()
    assert trainer.compute_loss.losses == []


def test_a_nan_loss_goes_on_unless_asked(tmp_path, peft_model, tokens):
    """Its gradients are skipped, as ever; Trainer logs the mean of the earlier losses."""
    model = peft_model()
    spoil(model, float("nan"), [3])
    trainer = lorapre_trainer(model, arguments(tmp_path, max_steps=5), tokens)
    with pytest.warns(UserWarning, match="a gradient has the norm nan"):
        trainer.train()
    assert len(training_logs(trainer)) == 5
    assert all(p.isfinite().all() for p in weights(model).values())


# ---- fp16, spikes ---------------------------------------------------------------------------------------------------


def test_stop_on_nan_loss_says_so_where_it_sees_no_loss(tmp_path):
    """Trainers whose training_step computes its own loss, such as TRL's OnlineDPOTrainer."""
    callback = LoRAPreCallback(stop_on_nan_loss=True)
    with pytest.raises(RuntimeError, match="does not compute its losses through compute_loss"):
        callback.on_pre_optimizer_step(None, None, None)


def regression(cls, steps, spike=(), dtype=None, scaler=None, lr=0.02, freeze=(), prepare=undisturbed, **options):
    """A small net taught x → sin x: its losses, net and optimizer. ``spike``: steps whose gradient is a million times
    as large.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    optimizer = prepare(cls(model.parameters(), lr=lr, momentum_rank=2, **options))
    losses = []
    for step in range(steps):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step % 20))
        for i, layer in enumerate(model):
            layer.requires_grad_(not (i == 2 and step in freeze))
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = (model(x).float() - x.sin()).square().mean()
        factor = 1e6 if step in spike else 1.0
        (loss * factor if scaler is None else scaler.scale(loss * factor)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model, optimizer


@both_optimizers
def test_fp16_with_a_grad_scaler_that_settles(cls):
    """The first steps overflow at a scale of 2**30: the scaler halves it and skips them, and the optimizer never sees
    them.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=25)
    losses, model, optimizer = regression(cls, 120, dtype=torch.float16, scaler=scaler)
    taken = {int(optimizer.state[param]["step"]) for param in model.parameters()}
    assert len(taken) == 1
    assert 80 <= taken.pop() < 120
    assert optimizer.skipped_updates == 0
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert scaler.get_scale() < 2.0**30


class TorchAdamW(torch.optim.AdamW):
    def __init__(self, params, lr, momentum_rank):
        super().__init__(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def test_a_gradient_spike_of_a_million_costs_no_more_than_in_adamw():
    """Adam's m points along the spike for some 20 steps, and its v keeps later steps small for some 500: a factor of 2
    for the rest.
    """
    ours, theirs = (regression(cls, 120, spike=[60])[0] for cls in (LoRAPreAdamW, TorchAdamW))
    assert max(ours[60:]) < 2 * max(theirs[60:])


@both_optimizers
def test_max_param_grad_norm_takes_a_gradient_spike_away(cls):
    spiked, plain = (regression(cls, 120, spike=spike, max_param_grad_norm=1.0)[0] for spike in ([60], []))
    assert max(spiked[60:]) < 2 * max(plain[50:])
    assert sum(spiked[-10:]) < 1.5 * sum(plain[-10:])


# ---- models that change under way -----------------------------------------------------------------------------------


@both_optimizers
@both_rules
@pytest.mark.parametrize("update_in_backward", [False, True])
def test_a_parameter_frozen_and_thawed_takes_up_where_it_stopped(cls, rule, update_in_backward):
    """Frozen, neither it nor its state moves, and its own count of steps stands; the others do not notice."""
    options = {"update_rule": rule, "update_in_backward": update_in_backward, "weight_decay": 0.1}
    _, model, optimizer = regression(cls, 20, freeze=range(8, 15), **options)
    frozen = list(model[2].parameters())
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {13, 20}
    assert {int(optimizer.state[p]["step"]) for p in frozen} == {13}
    before, during = (regression(cls, steps, freeze=range(8, 15), **options)[1] for steps in (8, 15))
    assert all(torch.equal(a, b) for a, b in zip(before[2].parameters(), during[2].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(frozen, before[2].parameters()))


@both_optimizers
def test_a_parameter_frozen_from_the_start_and_thawed_is_updated_in_the_backward_pass_too(cls):
    def trained(in_backward, prepare=undisturbed):
        return regression(cls, 20, freeze=range(6), prepare=prepare, update_in_backward=in_backward)[1].parameters()

    assert_same_steps(trained(True), partial(trained, False))


def adapter_parameters(model, adapter) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if f".{adapter}." in name]


@both_optimizers
def test_an_adapter_added_and_switched_to_while_the_optimizer_lives(make_llama, batch, cls):
    """As in torch, a parameter that was not given is not trained; `add_param_group` gives it. The first adapter takes
    up in every bit.
    """

    def run(switch):
        model = adapted(make_llama(), momentum_rank=2)
        kind = "adamw" if cls is LoRAPreAdamW else "muon"
        optimizer = create_lorapre_optimizer(model, kind, lr=1e-2)
        train(optimizer, lambda: model(**batch).loss, 3)
        if switch:
            torch.manual_seed(1)
            model.add_adapter("second", LoRAPreConfig(r=16, target_modules=["q_proj"]))
            model.set_adapter("second")
            second = adapter_parameters(model, "second")
            before = [p.detach().clone() for p in second]
            train(optimizer, lambda: model(**batch).loss, 2)
            assert all(torch.equal(a, b) for a, b in zip(second, before))
            names = [(name, param) for name, param in model.named_parameters() if ".second." in name]
            optimizer.add_param_group({"params": names, "momentum_rank": 4})
            train(optimizer, lambda: model(**batch).loss, 3)
            assert not any(torch.equal(a, b) for a, b in zip(second, before))
            assert {optimizer.state[p]["m_A"].shape[0] for p in second} == {4}
            model.set_adapter("default")
        train(optimizer, lambda: model(**batch).loss, 3)
        return adapter_parameters(model, "default")

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True)))


def test_an_adapter_deleted_while_the_optimizer_lives(two_adapters, batch):
    """Its parameters stay in the groups, without gradients: nothing happens to them. Its state fits no optimizer of
    the smaller model.
    """
    model = two_adapters
    model.base_model.set_adapter(["default", "second"])
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    train(optimizer, lambda: model(**batch).loss, 2)
    gone = adapter_parameters(model, "second")
    before = [p.detach().clone() for p in gone]
    model.delete_adapter("second")
    model.set_adapter("default")
    losses = train(optimizer, lambda: model(**batch).loss, 5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(gone, before))
    optimizer.load_state_dict(optimizer.state_dict())
    smaller = create_lorapre_optimizer(model, lr=1e-2)
    with pytest.raises(ValueError, match="parameter group"):
        smaller.load_state_dict(optimizer.state_dict())
    assert not smaller.state


class ReplaceAdapter(TrainerCallback):
    """Deletes the adapter after the second step and adds another one of the same name."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            config = model.peft_config["default"]
            model.delete_adapter("default")
            model.add_adapter("default", config)
            model.set_adapter("default")


def test_an_adapter_replaced_under_the_trainer_is_an_error_at_the_next_log(tmp_path, peft_model, tokens):
    """Otherwise the run would go on to its end and train nothing."""
    trainer = lorapre_trainer(peft_model(), arguments(tmp_path, logging_steps=2), tokens, [ReplaceAdapter()])
    with pytest.raises(RuntimeError, match=r"does not hold 28 of the model's 28 .* or parameters were added since"):
        trainer.train()
    assert trainer.state.global_step == 3
