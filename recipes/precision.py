"""This module finds out which dtype this machine multiplies fast.

``auto`` stands for that dtype wherever recipes, suites and evaluations name a dtype.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

AUTO = "auto"

# These are the sizes of a layer of SmolLM2-135M on 512 tokens. Its product [tokens, inputs] × [inputs, outputs] takes
# a few milliseconds.
TOKENS, INPUTS, OUTPUTS = 512, 576, 1536
# The fastest of this many products counts. The dtypes take turns, so that another process slows both.
REPEATS = 8
# bfloat16 is taken if it is more than this many times as fast as float32. Where it gains less, float32 is taken, which
# rounds less. A Xeon with bfloat16 units was 4 to 8 times as fast in bfloat16. With the units switched off it took 4
# to 9 times as long. Both held whether it was busy or not.
GAIN = 1.5


@dataclass(frozen=True)
class Precision:
    """Holds the dtypes of a run, under the names that the options have.

    Attributes:
        dtype: dtype of the weights or, under an adapter, of the base model's weights.
        bf16: whether products are in bfloat16, by autocast.
        reason: why these two were chosen.
    """

    dtype: str
    bf16: bool
    reason: str

    def __str__(self) -> str:
        return f"dtype {self.dtype}, bf16 {str(self.bf16).lower()}: {self.reason}"

    @property
    def options(self) -> list[str]:
        """Return the same choice as options of a recipe's command line."""
        return ["--dtype", self.dtype, "--bf16", str(self.bf16).lower()]


def choose(
    device: str,
    dtype: str = AUTO,
    bf16: bool | str | None = AUTO,
    fp16: bool = False,
    earlier: Precision | None = None,
) -> Precision:
    """Return the dtypes of a run. What is not given is what the device multiplies fast.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        dtype: dtype of the weights, or ``"auto"`` if it is not given.
        bf16: whether products are in bfloat16. ``"auto"`` and None stand for not given.
        fp16: whether products are in float16, with scaled losses. They exclude bfloat16, and weights are float32 then
            unless their dtype is given.
        earlier: choice with which a resumed run began. It takes the place of the device's.
    """
    if fp16:
        dtype, bf16 = "float32" if dtype == AUTO else dtype, False
    follows = bf16 in (AUTO, None)
    if dtype != AUTO and not follows:
        return Precision(dtype, bf16, "as given")
    if earlier is None:
        fast, reason = fast_dtype(device)
        earlier = Precision(fast, fast == "bfloat16", reason)
    return Precision(earlier.dtype if dtype == AUTO else dtype, earlier.bf16 if follows else bf16, earlier.reason)


def accelerator() -> str:
    """Return the device on which Trainer trains unless told to use the CPU: ``"cuda"``, ``"mps"`` or ``"cpu"``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@cache
def fast_dtype(device: str) -> tuple[str, str]:
    """Return ``"bfloat16"`` or ``"float32"``, and the reason as text.

    CUDA is asked for its compute capability. CPUs and Apple's GPUs are timed. What a CPU says of its units does not
    tell whether the kernels use them, because ONEDNN_MAX_CPU_ISA and other settings switch them off. MPS does not say
    whether it has them. device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
    """
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        name = "bfloat16" if capability >= (8, 0) else "float32"
        return name, "compute capability {}.{}, and bfloat16 units come with 8.0".format(*capability)
    try:
        seconds = _seconds(device)
    except (RuntimeError, TypeError) as error:  # MPS has no bfloat16 before macOS 14.
        return "float32", f"bfloat16 does not run on {device} ({str(error).partition(chr(10))[0]})"
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    times = ", ".join(f"{1000 * taken:.1f} ms in {str(dtype)[6:]}" for dtype, taken in seconds.items())
    reason = f"a product of {TOKENS}×{INPUTS} by {INPUTS}×{OUTPUTS} takes this {device.upper()} {times}"
    return "bfloat16" if gain > GAIN else "float32", reason


def _seconds(device: str) -> dict[torch.dtype, float]:
    """Return by dtype the seconds that the same product takes.

    One thread is used. On a busy machine two threads would wait for each other, and hide the ratio.
    """
    pairs: dict[torch.dtype, tuple[Tensor, Tensor]] = {
        dtype: (
            torch.ones(TOKENS, INPUTS, dtype=dtype, device=device),
            torch.ones(OUTPUTS, INPUTS, dtype=dtype, device=device).T,
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(pairs, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(REPEATS + 1):
            for dtype, (left, right) in pairs.items():
                _wait(device)
                start = time.perf_counter()
                left @ right
                _wait(device)
                if turn:  # The first turn prepares kernels.
                    best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
