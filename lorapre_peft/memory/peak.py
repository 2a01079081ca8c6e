"""This module estimates the memory of a training step before anything is allocated, and measures it while it runs.

The estimate is a dry run of the training code on the meta device, where tensors have shapes and no data. It counts
every allocation, and uses no formula that could drift away from the code. Peers and the command line are in
``peers.py``. This prints an estimate:

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
from ..lowrank.batch import Batch
from ..lowrank.experts import stack_of
from ..lowrank.layout import matrix_shape, tile_entries
from ..optim.base import Located, LoRAPreOptimizer
from ..optim.options import is_whole
from .models import meta_model, quantization_bytes, training_batch


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of the storages that torch's operations make while it is active, on any device, even on meta:

        with AllocationTracker() as tracker:
            optimizer.step()
        tracker.peak_bytes

    A storage counts from the operation that made it until nothing refers to it any more. What was there before does
    not count. The tracker sees neither what a kernel allocates for itself and frees before it returns (workspaces),
    nor the rounding of an allocator, which on CUDA is to steps of 512 bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        # This maps the address of a live storage to the number of the event that made it.
        self._numbers: dict[int, int] = {}
        # An event is the number of a storage, and its bytes: positive when it is made, negative when it is freed.
        self._events: list[tuple[int, int]] = []
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
        """Take a tensor's storage out of the count from the start, or do nothing if it was not made here."""
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
        """Return how many bytes of what was made while the tracker was active are alive now."""
        return sum(size for number, size in self._events if number not in self._left_out)

    @property
    def peak_bytes(self) -> int:
        """Return the largest number of bytes that were alive at once."""
        return max(self._curve(), default=0)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of an operation's arguments or results, several times as fast as torch's pytree."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _storages(part)


@dataclass(frozen=True)
class MemoryEstimate:
    """Holds the bytes of each part of one training step, at the part's peak.

    weights: parameters, buffers, and the scales of 4-bit weights. gradients: all gradients, or the largest one if each
    is used and freed in the backward pass. state: the optimizer's state. temporaries: those of the optimizer's step,
    without its state, or None if they are not counted. activations: those of forward and backward pass, without the
    gradients of parameters.
    """

    weights: int
    gradients: int
    state: int
    temporaries: int | None
    activations: int

    @property
    def total(self) -> int:
        """Return the sum of the parts, an upper bound, as peaks of activations and temporaries need not coincide."""
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
    makes on a CPU. Kernels make less. On CUDA, batches may take 512 MB where a CPU's take 64 (``temporary_bytes``),
    and torch's AdamW for many tensors at once up to an eighth of that more on the AdamW path. Workspaces of kernels,
    CUDA's context and the fragmentation of its allocator are not counted.

    Activations are those of text without padding, with logits at every position, as transformers' own loss makes them.
    For a model of images or sound, inputs have the size in its config. A model of text and images gets only text.
    ``scaled_dot_product_attention`` counts as a fused kernel (flash or memory-efficient), which keeps no matrix of
    scores, with grouped keys and values repeated, and values as wide as keys where they are narrower.

    Args:
        model_or_config: a module on any device, with or without adapters, which is not changed; a config, whose
            ``architectures`` say what is built, else the whole model that is trained; a folder or config.json; a
            built-in name (`models.SHAPES`); or a name on the hub.
        optimizer, momentum_rank, update_rule, options: as in `create_lorapre_optimizer`, with the same defaults. Only
            updates in the backward pass are chosen by ``in_backward`` instead, and are the default here.
        dtype: dtype of a model built from a config. A module keeps its own.
        in_backward: whether gradients are counted one at a time, as with ``update_in_backward=True``.
        batch, seq_len: number of sequences in a forward pass, and of tokens in each. batch=0 leaves activations out.
        checkpointing: whether every layer uses gradient checkpointing, which is non-reentrant.

    Raises:
        ValueError: a model that is not found, an invalid option, or nothing to compress.
        TypeError: an option that there is not for the optimizer, or ``update_in_backward``.
        RuntimeError: a model whose forward pass does not run on the meta device.
    """
    for name, value, least in (("batch", batch, 0), ("seq_len", seq_len, 1)):
        if not is_whole(value, least):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
    if "update_in_backward" in options:
        raise TypeError("found update_in_backward among the options; expected in_backward, which stands for it here")
    model = meta_model(model_or_config, dtype)
    options.setdefault("lr", 1e-4)  # Adapters have no default. Any number gives the same memory.
    # The hooks of update_in_backward would read the norms of gradients, which meta tensors do not have.
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
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        + (quantization_bytes(model_or_config) if isinstance(model_or_config, nn.Module) else 0),
        gradients=max(gradients) if in_backward else sum(gradients),
        state=sum(built.param_state_bytes(param, group) for group, param in trained),
        temporaries=_temporaries(built, in_backward),
        activations=activation_bytes(model, batch, seq_len, checkpointing) if batch else 0,
    )


def _temporaries(optimizer: LoRAPreOptimizer, in_backward: bool) -> int:
    """Return the peak of the first two steps without the state. In the first step `als` starts its factors."""
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
                        state["step"] = torch.zeros(())  # Torch's AdamW reads it.
                grads = part.split(member.param.grad for member in members if member.param.grad is not None)
                with patch.object(Batch, "tiles", _distinct_tiles):
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
    """Return enough of the updates that happen at once to include their peak, as equal chunks take equal memory."""
    counts: Counter[tuple] = Counter()
    kept: list[Located] = []  # These stay in the optimizer's order, on which the AdamW path's packing depends.
    for group, param, position in optimizer._located():
        ranks = optimizer.ranks(param, group)
        stack = stack_of(group) if ranks else None
        shape = matrix_shape(param.shape, stack) if ranks else tuple(param.shape)
        key = (id(group), ranks, shape, param.dtype)
        if in_backward:
            most = 1
        elif ranks:
            most = max(1, tile_entries(group, param.device) // (sum(ranks) * sum(shape)))
        else:
            most = sys.maxsize  # The AdamW path packs parameters of all shapes together.
        if param.numel() and counts[key] < most:
            counts[key] += 1 if stack is None else stack.experts
            kept.append((group, param, position))
    return [[located] for located in kept] if in_backward else [kept]


_all_tiles = Batch.tiles


def _distinct_tiles(batch: Batch) -> Iterator[tuple[slice, slice]]:
    """Yield enough of a batch's tiles to include the peak, as equal tiles take equal memory.

    These are the first, the second, during which what is left of another tile is still alive, and the last.
    """
    tiles = list(_all_tiles(batch))
    yield from tiles[:2] + tiles[2:][-1:]


_unfused_attention = nn.functional.scaled_dot_product_attention


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `scaled_dot_product_attention` of meta tensors as a fused kernel, where torch would take the unfused form.

    The CPU's flash attention makes and keeps the same as CUDA's kernels: the output and a float32 for each query, and
    no matrix of scores.
    """
    same_heads = query.shape[:2] == key.shape[:2] and key.shape[:3] == value.shape[:3]
    narrower = key.shape[-1] - value.shape[-1]  # as in multi-head latent attention
    if not (query.is_meta and query.ndim == 4 and same_heads and narrower >= 0):
        return _unfused_attention(query, key, value, *args, **kwargs)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    value = nn.functional.pad(value, (0, narrower)) if narrower else value
    found = kernel(query, key, value, kwargs.get("dropout_p", 0.0), True, scale=kwargs.get("scale"))[0]
    return found[..., : found.shape[-1] - narrower]


def activation_bytes(model: nn.Module, batch: int, seq_len: int, checkpointing: bool) -> int:
    """Return the peak of a forward and backward pass of a meta model, in which each gradient is freed at once.

    This changes the model.
    """
    try:
        modules: Iterator[Any] = model.train().modules()  # They have attributes of their own.
        for module in modules:
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        if checkpointing:
            # The second name is deprecated, but early versions of transformers 5 have no other.
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
            config.use_cache = False  # Training uses no cache.
        with tracker, patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention):
            model(**inputs).loss.backward()
    except Exception as error:
        raise RuntimeError(
            f"a training step of {type(model).__name__} does not run on the meta device ({type(error).__name__}: "
            f"{error}), so its activations cannot be counted. Use batch=0 to leave them out; transformers' models "
            "that take text, images or sound features, and labels, run with attn_implementation='sdpa' or 'eager', "
            "mixtures of experts in bfloat16"
        ) from error
    return tracker.peak_bytes


@dataclass
class Measurement:
    """Holds what `measure` found, once its block has ended. what: a text that says of what peak_bytes are bytes."""

    peak_bytes: int = 0
    what: str = ""


@contextlib.contextmanager
def measure(device: torch.device | str | None = None) -> Iterator[Measurement]:
    """Measure the peak memory of a block in bytes, including all memory that was in use before:

        with measure() as measured:
            trainer.train()
        print(measured.peak_bytes, measured.what)

    On CUDA this is the memory of tensors on ``device`` (None: the current device), and PyTorch's peak statistics are
    reset. Otherwise it is the process's resident memory. On Linux its peak is taken since the start of the block.
    Where the system cannot reset its peak, it is that of the process's whole life, and ``what`` says so. Windows tells
    neither, and ModuleNotFoundError is raised before the block runs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    measured = Measurement()
    if device.type == "cuda":
        torch.cuda.init()  # The statistics cannot be reset before that.
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield measured
        finally:
            measured.peak_bytes = torch.cuda.max_memory_allocated(device)
            measured.what = f"tensors on {torch.cuda.get_device_name(device)}"
        return
    try:
        # Writing 5 sets the peak resident set size, VmHWM, to the current one (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        restarted = True
    except OSError:
        import resource  # Windows has no such module, which is an error here, before the block has run.

        restarted = False
    try:
        yield measured
    finally:
        if restarted:
            status = Path("/proc/self/status").read_text()
            measured.peak_bytes = int(status.partition("VmHWM:")[2].split()[0]) * 1024  # The file gives kB.
            measured.what = "resident memory of the process"
        else:
            scale = 1 if sys.platform == "darwin" else 1024  # getrusage(2) gives bytes on macOS and kB elsewhere.
            measured.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
            measured.what = "resident memory of the process, the peak of its whole life so far"
