"""Estimate what a training step takes in memory before anything is allocated, and measure it while it runs.

The estimate is a dry run of the code that trains, on the meta device, where tensors have shapes and no data, with
every allocation counted: no formula that could drift away from the code. Peers and the command line are in
``peers.py``:

    lorapre-memory meta-llama/Llama-2-7b-hf --momentum-rank 8
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from ..integrations.create import create_lorapre_optimizer
from ..lowrank.experts import stack_of
from ..lowrank.layout import matrix_shape, tile_entries
from ..optim.base import Located, LoRAPreOptimizer
from .models import meta_model, training_batch


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of the storages that torch's operations make while it is active, on any device, meta included.

        with AllocationTracker() as tracker:
            optimizer.step()
        tracker.peak_bytes

    A storage counts from the operation that made it until nothing refers to it any more; what was there before does
    not count. Not seen: what a kernel allocates for itself and frees before it returns (workspaces), and the rounding
    of an allocator, in steps of 512 bytes on CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}  # address of a live storage: the number of the event that made it
        self._events: list[tuple[int, int]] = []  # number of the storage, bytes: above 0 made, below 0 freed
        self._left_out: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, tuple(kwargs.values())))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            address, size = storage._cdata, storage.nbytes()
            if address not in given and address not in self._numbers:
                number = self._numbers[address] = len(self._events)
                self._events.append((number, size))
                weakref.finalize(storage, self._free, address, size).atexit = False
        return out

    def _free(self, address: int, size: int) -> None:
        self._events.append((self._numbers.pop(address), -size))

    def leave_out(self, tensor: Tensor) -> None:
        """Take a tensor's storage out of the count, from when it was made; do nothing if it was not made here."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._left_out.add(number)

    def _curve(self) -> Iterator[int]:
        live = 0
        for number, size in self._events:
            if number not in self._left_out:
                live += size
                yield live

    @property
    def live_bytes(self) -> int:
        """The bytes that are alive now, of what was made while the tracker was active."""
        return sum(size for number, size in self._events if number not in self._left_out)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once."""
        return max(self._curve(), default=0)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of an operation's arguments or results, several times faster than torch's pytree."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _storages(part)


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes of each part of one training step, at its peak.

    weights: parameters and buffers. gradients: all, or the largest one where each is used and freed in the backward
    pass. state: the optimizer's. temporaries: of the optimizer's step, without its state; None where not counted.
    activations: of forward and backward pass, without the gradients of parameters.
    """

    weights: int
    gradients: int
    state: int
    temporaries: int | None
    activations: int

    @property
    def total(self) -> int:
        """The sum of the parts: an upper bound, as the peaks of activations and temporaries need not coincide."""
        return self.weights + self.gradients + self.state + (self.temporaries or 0) + self.activations


def estimate(
    model_or_config: nn.Module | PretrainedConfig | str | os.PathLike[str],
    optimizer: str = "adamw",
    *,
    momentum_rank: int | None = None,
    update_rule: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    in_backward: bool = True,
    batch: int = 1,
    seq_len: int = 512,
    checkpointing: bool = True,
    **options: Any,
) -> MemoryEstimate:
    """Return the peak memory of training with LoRA-Pre, by a dry run of its optimizer on the meta device.

    Nothing of the model's size is allocated. Weights, gradients, state and temporaries are what the eager backend
    makes on a CPU, and kernels make less; on CUDA, torch's AdamW for many tensors at once may take up to
    ``temporary_bytes``/8 more on the AdamW path. Not counted: workspaces of kernels, CUDA's context and the
    fragmentation of its allocator. Activations are those of text without padding, with logits at every position, as
    transformers' own loss makes them (of a model for images or sound: of inputs of the size in its config; of one for
    text and images: of text alone); ``scaled_dot_product_attention`` counts as a fused kernel (flash or
    memory-efficient), which keeps no matrix of scores, with grouped keys and values repeated.

    Args:
        model_or_config: a module on any device, also one with adapters, which is left as it is; a config, whose
            ``architectures`` say what is built, else the whole model that is trained; a folder or config.json; a
            built-in name (`models.SHAPES`); a name on the hub.
        optimizer, momentum_rank, update_rule, options: as in `create_lorapre_optimizer`, with the same defaults; but
            updates in the backward pass are asked for by ``in_backward``, and are the default here.
        dtype: of a model built from a config; a module keeps its own.
        in_backward: as ``update_in_backward=True`` of the optimizers: one gradient at a time.
        batch, seq_len: sequences per forward pass and tokens in each. batch=0 leaves the activations out.
        checkpointing: gradient checkpointing of every layer, non-reentrant.

    Raises:
        ValueError: a model that is not found, an invalid option, or nothing to compress.
        RuntimeError: a model whose forward pass does not run on the meta device.
    """
    for name, value, least in (("batch", batch, 0), ("seq_len", seq_len, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
    model = meta_model(model_or_config, dtype)
    options.setdefault("lr", 1e-4)  # adapters have no default; any number gives the same memory
    # Hooks of update_in_backward would read gradients' norms, which meta tensors do not have.
    built = create_lorapre_optimizer(
        model,
        optimizer,
        momentum_rank=momentum_rank,
        update_rule=update_rule,
        update_in_backward=False,
        verbose=False,
        **options,
    )
    trained = [(group, param) for group in built.param_groups for param in group["params"]]
    gradients = [param.nbytes for _, param in trained]
    return MemoryEstimate(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=max(gradients) if in_backward else sum(gradients),
        state=sum(built.param_state_bytes(param, group) for group, param in trained),
        temporaries=_temporaries(built, in_backward),
        activations=activation_bytes(model, batch, seq_len, checkpointing) if batch else 0,
    )


def _temporaries(optimizer: LoRAPreOptimizer, in_backward: bool) -> int:
    """Return the peak of the first two steps without the state: `als` starts its factors in the first."""
    peak = 0
    for located in _distinct_updates(optimizer, in_backward):
        for _, param, _ in located:
            param.grad = torch.empty_like(param)
        (part,) = optimizer._layout(located)
        members = part.members
        norms = torch.empty(len(part.matrices), dtype=torch.float64, device="meta")
        for step in range(2):
            with torch.no_grad(), AllocationTracker() as tracker:
                states = [optimizer._state_of(member) for member in members]
                for member, state in zip(members, states):
                    if step == 0 and not member.ranks:
                        state["step"] = torch.zeros(())  # torch's AdamW reads it
                grads = part.split(member.param.grad for member in members if member.param.grad is not None)
                optimizer._update_part(part, part.split_states(states), grads, norms, [True] * len(grads), None)
            for _, param, _ in located:
                for value in optimizer.state[param].values():
                    tracker.leave_out(value)
            peak = max(peak, tracker.peak_bytes)
        for _, param, _ in located:
            param.grad = None
            del optimizer.state[param]
    return peak


def _distinct_updates(optimizer: LoRAPreOptimizer, in_backward: bool) -> list[list[Located]]:
    """Return enough of the updates that happen at once to hold their peak: equal chunks take equal memory."""
    counts: Counter[tuple] = Counter()
    kept: list[Located] = []  # in the optimizer's order, on which the AdamW path's packing depends
    for group, param, position in optimizer._located():
        ranks = optimizer.ranks(param, group)
        stack = stack_of(group) if ranks else None
        shape = matrix_shape(param.shape, stack) if ranks else tuple(param.shape)
        key = (id(group), ranks, shape, param.dtype)
        if in_backward:
            most = 1
        elif ranks:
            most = max(1, tile_entries(group) // (sum(ranks) * sum(shape)))
        else:
            most = sys.maxsize  # the AdamW path packs parameters of all shapes together
        if param.numel() and counts[key] < most:
            counts[key] += 1 if stack is None else stack.experts
            kept.append((group, param, position))
    return [[located] for located in kept] if in_backward else [kept]


_unfused_attention = nn.functional.scaled_dot_product_attention


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `scaled_dot_product_attention` of meta tensors as a fused kernel; torch takes the unfused form for them.

    The CPU's flash attention makes and keeps what CUDA's do: the output and one float32 per query, no scores.
    """
    fusible = query.is_meta and query.ndim == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape
    if not fusible:
        return _unfused_attention(query, key, value, *args, **kwargs)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, kwargs.get("dropout_p", 0.0), True, scale=kwargs.get("scale"))[0]


def activation_bytes(model: nn.Module, batch: int, seq_len: int, checkpointing: bool) -> int:
    """Return the peak of a forward and backward pass of a meta model, in which each gradient is freed at once.

    It changes the model.
    """
    try:
        modules: Iterator[Any] = model.train().modules()  # with attributes of their own
        for module in modules:
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        if checkpointing:
            # The second name is deprecated; versions of transformers 5 before the first was added have it alone.
            enable: Any = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        tracker = AllocationTracker()

        def free_gradient(param: Tensor) -> None:
            assert param.grad is not None
            tracker.leave_out(param.grad)
            param.grad = None

        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(free_gradient)
        inputs = training_batch(model, batch, seq_len)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # as in training
        with tracker, patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention):
            model(**inputs).loss.backward()
    except Exception as error:
        raise RuntimeError(
            f"a training step of {type(model).__name__} does not run on the meta device ({type(error).__name__}: "
            f"{error}), so its activations cannot be counted. Use batch=0 to leave them out; transformers' models "
            "that take text, images or sound features, and labels, run with attn_implementation='sdpa' or 'eager'"
        ) from error
    return tracker.peak_bytes


@dataclass
class Measurement:
    """What `measure` found, once its block has ended. peak_bytes: bytes. what: what they are bytes of, in words."""

    peak_bytes: int = 0
    what: str = ""


@contextlib.contextmanager
def measure(device: torch.device | str | None = None) -> Iterator[Measurement]:
    """Measure the peak memory of a block, in bytes, with all that was there before it:

        with measure() as measured:
            trainer.train()
        print(measured.peak_bytes, measured.what)

    On CUDA: what tensors took on ``device`` (None: the current device), and PyTorch's peak statistics start anew.
    Else: the process's resident memory, on Linux since the start of the block; where the system cannot start its peak
    anew, the process's whole life, and ``what`` says so.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    measured = Measurement()
    if device.type == "cuda":
        torch.cuda.init()  # the statistics cannot be reset before that
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield measured
        finally:
            measured.peak_bytes = torch.cuda.max_memory_allocated(device)
            measured.what = f"tensors on {torch.cuda.get_device_name(device)}"
        return
    try:
        # proc(5): writing 5 sets the peak resident set size, VmHWM, to the current one.
        Path("/proc/self/clear_refs").write_text("5")
        restarted = True
    except OSError:
        restarted = False
    try:
        yield measured
    finally:
        if restarted:
            status = Path("/proc/self/status").read_text()
            measured.peak_bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024  # given in kB
            measured.what = "resident memory of the process"
        else:
            import resource  # not on Windows

            scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kB elsewhere
            measured.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
            measured.what = "resident memory of the process, the peak of its whole life so far"
