"""Losses that are NaN or infinite, under Trainer: the run stops where it was still good, if it is asked to."""

from pathlib import Path

import pytest
import torch
from adapting import trainable
from trainers import arguments, assert_same_end, lorapre_trainer, training_logs

from lorapre_peft import LoRAPreCallback, last_complete_checkpoint


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
    assert all(p.isfinite().all() for p in trainable(resumed.model).values())
    assert not any(torch.equal(a, b) for a, b in zip(*(trainable(t.model).values() for t in (resumed, good))))


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


def test_losses_of_a_run_that_broke_off_are_forgotten(tmp_path, peft_model, tokens):
    trainer = watched_trainer(tmp_path, peft_model(), tokens, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.compute_loss.losses.append(torch.tensor(float("nan")))  # of a step that did not end
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_nan_loss_goes_on_unless_asked(tmp_path, peft_model, tokens):
    """Its gradients are skipped, as ever; Trainer logs the mean of the earlier losses."""
    model = peft_model()
    spoil(model, float("nan"), [3])
    trainer = lorapre_trainer(model, arguments(tmp_path, max_steps=5), tokens)
    with pytest.warns(UserWarning, match="a gradient has the norm nan"):
        trainer.train()
    assert len(training_logs(trainer)) == 5
    assert all(p.isfinite().all() for p in trainable(model).values())


def test_stop_on_nan_loss_says_so_where_it_sees_no_loss(tmp_path):
    """Trainers whose training_step computes its own loss, such as TRL's OnlineDPOTrainer."""
    callback = LoRAPreCallback(stop_on_nan_loss=True)
    with pytest.raises(RuntimeError, match="does not compute its losses through compute_loss"):
        callback.on_pre_optimizer_step(None, None, None)
