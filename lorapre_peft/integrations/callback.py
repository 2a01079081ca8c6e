"""This module holds the callback that checks a trainer's run and adds LoRA-Pre's figures to its logs."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..lowrank.sharding import world_size
from ..optim.base import LoRAPreOptimizer
from .loaded import calls_of, complete_loaded, resumed_from
from .summary import adamw_state_bytes
from .trainer import check_arguments


class LoRAPreCallback(TrainerCallback):
    """Checks that a trainer really trains the model's parameters with LoRA-Pre, and adds its figures to the logs.

    At every logging step the logs get these figures of that step under ``lorapre/``: ``state_bytes`` and
    ``adamw_state_bytes`` (float32 moments of the same parameters), ``captured_energy`` (share of ‖g‖² in the
    momentum's row space, 0 to 1), ``largest_update`` (largest entry of the normalised update before the clamp) and
    ``clamped_share`` (both with AdamW only), and ``skipped_updates`` (so far). At other steps nothing is read from the
    device, except the losses with ``stop_on_nan_loss``.

    Args:
        stop_on_nan_loss: whether to stop at the first step with a loss that is NaN or infinite. Nothing of that step
            reaches the weights or the optimizer. Unless ``save_strategy="no"``, they are saved as checkpoint-N of that
            step N. A run resumed from there goes on with the next batch. Trainer itself would go on, and by default
            log the mean of the earlier losses in place of that loss. (With ``update_in_backward``, finite gradients of
            that step have already been applied.)

    Raises RuntimeError at the start of training if the optimizer is not LoRA-Pre's or does not hold the model's
    trainable parameters. Raises it at a logging step if the optimizer no longer holds them, because adapters were
    added or replaced during training. Raises ValueError for training arguments that `lorapre_optimizer` would refuse.
    Warns of a run that was resumed from a checkpoint without optimizer state.
    """

    def __init__(self, stop_on_nan_loss: bool = False) -> None:
        self.stop_on_nan_loss = stop_on_nan_loss
        self._trainer: weakref.ref[Any] | None = None  # the trainer to which it is attached
        self._losses: list[Tensor] = []  # the losses of this step's micro-batches
        self._nan_loss = False

    @classmethod
    def attach(cls, trainer: Any, stop_on_nan_loss: bool = False) -> LoRAPreCallback:
        """Add a callback to a trainer, before its other callbacks, so that reporters see its figures, and return it.

        A callback that is given to the trainer as ``callbacks=[LoRAPreCallback()]`` does the same. It looks for the
        trainer among its callers when training begins.
        """
        callback = cls(stop_on_nan_loss)
        callback._trainer = weakref.ref(trainer)
        trainer.add_callback(callback)
        return callback

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None}  # A copy is attached to no trainer, and finds the one that calls.

    def _attached_to(self, model: nn.Module) -> Any:
        """Return the trainer to which the callback is attached, or None if it is another one that trains the model."""
        trainer = None if self._trainer is None else self._trainer()
        handler = getattr(trainer, "callback_handler", None)
        return trainer if handler is not None and handler.model is model and self in handler.callbacks else None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        found = _checked_optimizer(model, optimizer)
        checkpoint = resumed_from()
        if checkpoint is not None:  # `lorapre_optimizer` has not done so if the optimizer was there before.
            complete_loaded(model, checkpoint)
        check_arguments(args, found.defaults["update_in_backward"])
        # An earlier run may have broken off in a backward pass, as the attempts of auto_find_batch_size do.
        found.zero_grad()
        if state.global_step and not found.state:
            warnings.warn(
                f"the run resumes at step {state.global_step} without optimizer state: the momenta start anew, and "
                "so does the schedule. Trainer says nothing when optimizer.pt or scheduler.pt is missing from a "
                "checkpoint (save_only_model=True writes neither)",
                stacklevel=2,
            )
        trainer = self._attached_to(model)
        _log_before_reporters(self, _caller(CallbackHandler) if trainer is None else trainer.callback_handler)
        if self.stop_on_nan_loss:
            self._losses = _watched_losses(trainer)
            self._losses.clear()  # A run that broke off may have left some.

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # Trainer decides after the step whether to log (DefaultFlowCallback.on_step_end). The step must know before.
        step = state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
        by_epoch = args.logging_strategy == IntervalStrategy.EPOCH  # Any step may be the last of the epoch.
        logs = by_steps or by_epoch or (step == 1 and args.logging_first_step)
        found = _checked_optimizer(model, optimizer) if by_steps or by_epoch else _lorapre(optimizer)
        if found is not None:
            found.record_metrics = logs

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.stop_on_nan_loss:
            return
        if not self._losses:
            raise RuntimeError(
                "stop_on_nan_loss=True found no loss of this step: the trainer does not compute its losses through "
                "compute_loss. Use stop_on_nan_loss=False with it"
            )
        bad = torch.stack([~loss.isfinite().all() for loss in self._losses]).any().int()
        self._losses.clear()
        if world_size() > 1:  # All ranks have to stop. Otherwise the rest would wait for ever.
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        self._nan_loss = bool(bad)
        if self._nan_loss:
            for param in model.parameters():
                if param.grad is not None:
                    param.grad.fill_(float("nan"))  # The optimizer and a GradScaler both skip NaN.

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._nan_loss:
            return
        self._nan_loss = False
        control.should_training_stop = True
        control.should_save = args.save_strategy != SaveStrategy.NO
        saved = f"saved as checkpoint-{state.global_step}" if control.should_save else "not saved (save_strategy='no')"
        warnings.warn(
            f"the loss of step {state.global_step} is NaN or infinite: training stops. Weights and optimizer state "
            f"are those before that step, {saved}. Lower the learning rate or look at that batch, then resume",
            stacklevel=2,
        )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            complete_loaded(model, state.best_model_checkpoint)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        found = _lorapre(optimizer)
        # Logs without a loss are those of an evaluation, or the closing summary.
        if found is None or logs is None or "loss" not in logs:
            return
        held = [(param, group) for group in found.param_groups for param in group["params"]]
        values = {
            "state_bytes": sum(found.param_state_bytes(param, group) for param, group in held),
            "adamw_state_bytes": sum(adamw_state_bytes(param) for param, _ in held),
            **found.metrics(),
            "skipped_updates": found.skipped_updates,
        }
        values = {f"lorapre/{name}": value for name, value in values.items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)  # Trainer has already copied the logs there.


def _checked_optimizer(model: nn.Module, optimizer: Any) -> LoRAPreOptimizer:
    """Return the LoRA-Pre optimizer inside accelerate's wrapper, where other optimizers may lie beside it.

    Raises RuntimeError if there is none, or if the optimizers together do not hold all trainable parameters.
    """
    parts = list(_parts(optimizer))
    found = _lorapre(optimizer)
    if found is None:
        raise RuntimeError(
            f"LoRAPreCallback found the optimizer {type(parts[-1]).__name__}, expected LoRAPreAdamW or LoRAPreMuon: "
            "pass optimizer_cls_and_kwargs=lorapre_optimizer('adamw', args) to the trainer, or remove the callback"
        )
    held = {id(param) for part in parts for group in part.param_groups for param in group["params"]}
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    missing = [name for name, param in trainable.items() if id(param) not in held]
    if missing or not trainable:
        raise RuntimeError(
            f"the optimizer does not hold {len(missing)} of the model's {len(trainable)} trainable parameters"
            + (f" ({', '.join(missing[:3])}, …)" if missing else "")
            + ": it was built before the model was wrapped, or parameters were added or loaded anew since, and "
            "training would leave them as they are. Let the trainer build it, "
            "optimizer_cls_and_kwargs=lorapre_optimizer('adamw', args), and to train a second time or to resume make "
            "a new trainer"
        )
    return found


def _lorapre(optimizer: Any) -> LoRAPreOptimizer | None:
    """Return the LoRA-Pre optimizer inside the wrappers of others, or None if there is none."""
    return next((part for part in _parts(optimizer) if isinstance(part, LoRAPreOptimizer)), None)


def _parts(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those inside it, which are accelerate's ``optimizer`` or a chain's ``optimizers``."""
    yield optimizer
    inside = [optimizer.optimizer] if hasattr(optimizer, "optimizer") else getattr(optimizer, "optimizers", ())
    for part in inside:
        yield from _parts(part)


def _log_before_reporters(callback: LoRAPreCallback, handler: CallbackHandler | None) -> None:
    """Move the callback to the front of its trainer's list.

    Trainer puts its reporters (TensorBoard, W&B, trackio) before the user's callbacks, so that what a user's callback
    adds to the logs comes too late for them. A callback is not given its handler. Without `LoRAPreCallback.attach` the
    handler is found as the caller.
    """
    if handler is None:
        warnings.warn(
            "LoRAPreCallback was not called by a Trainer: its figures may not reach TensorBoard or W&B", stacklevel=3
        )
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def _watched_losses(trainer: Any) -> list[Tensor]:
    """Return a list to which each training loss of a trainer is added from now on. None: the trainer that calls."""
    from transformers import Trainer  # It is imported here because it brings in datasets.

    if trainer is None:
        trainer = _caller(Trainer)
    if trainer is None:
        raise RuntimeError("stop_on_nan_loss=True: LoRAPreCallback was not called by a Trainer, whose loss it watches")
    compute_loss = trainer.compute_loss
    if not hasattr(compute_loss, "losses"):  # An earlier call of train() may have wrapped it.
        losses: list[Tensor] = []

        @functools.wraps(compute_loss)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            if torch.is_grad_enabled():  # Losses of an evaluation are left out.
                losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

        trainer.compute_loss = watched
        trainer.compute_loss.losses = losses
    return trainer.compute_loss.losses


def _caller(kind: type) -> Any:
    """Return the nearest object of a class among the callers' ``self``, or None, as callbacks are given no trainer."""
    return next((variables["self"] for variables in calls_of(kind)), None)
