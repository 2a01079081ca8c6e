"""This module chooses the backend that computes a step, or its row part.

All backends have the interface of `eager.Eager`, and give the same results to float32 round-off.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch.torch_version import TorchVersion

from . import build
from .cpp import Cpp
from .eager import Compiled, Eager

_COMPILER = "a C++ compiler (g++ or clang++) on the PATH"
_TRITON = "the package triton, 3.4 or later (pip install 'triton>=3.4')"


def _compiled_needs(device: torch.device) -> str | None:
    if device.type == "mps":
        return "float64 inside its graphs, which Apple's MPS does not have"
    if device.type == "cpu" and build.compiler() is None:
        return _COMPILER
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None


def _cpp_needs(device: torch.device) -> str | None:
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return f"a CPU under Linux, found {device} under {sys.platform}"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if build.compiler() or build.find(capability) else _COMPILER


def _triton_needs(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None or TorchVersion(version("triton")) < "3.4":
        return _TRITON
    if torch.version.hip:
        return "CUDA: Triton has no tf32x3 products on AMD GPUs"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"a CUDA device, found {device} (TRITON_INTERPRET=1 runs its kernels on a CPU, for tests)"
    return None


def _load_triton() -> Eager:
    from .gpu.backend import Triton

    return Triton()


# Each name has two functions. One returns what the backend lacks on a device, or None. The other makes the backend.
# "auto" takes the first backend that lacks nothing.
_BACKENDS: dict[str, tuple[Callable[[torch.device], str | None], Callable[[], Eager]]] = {
    "cpp": (_cpp_needs, Cpp),
    "triton": (_triton_needs, _load_triton),
    "eager": (lambda device: None, Eager),  # Float64 work goes to the CPU where the device has no float64.
    "compiled": (_compiled_needs, Compiled),
}
NAMES = ("auto", *_BACKENDS)
# "auto" warns if a device's fastest backend lacks only what can be installed.
_FASTEST = {"cpu": ("cpp", _COMPILER), "cuda": ("triton", _TRITON)}


def available(device: torch.device | str) -> list[str]:
    """Return the names of the backends that can run on a device, with the one that "auto" takes there first."""
    device = torch.device(device)
    return [name for name, (lacks, _) in _BACKENDS.items() if lacks(device) is None]


@functools.cache
def _made(name: str) -> Eager:
    return _BACKENDS[name][1]()


def _automatic(device: torch.device, names: tuple[str, ...]) -> Eager:
    """Return the first of the named backends that starts. The eager one runs everywhere and is always among them."""
    fastest, installable = _FASTEST.get(device.type, ("eager", ""))
    if fastest in names and _BACKENDS[fastest][0](device) == installable:
        warnings.warn(f"backend {fastest!r} needs {installable}, so a slower one is used", stacklevel=2)
    for name in available(device):
        if name in names and (name != "triton" or device.type == "cuda"):  # "auto" leaves out its interpreter.
            try:
                return _made(name)
            except RuntimeError as error:
                warnings.warn(f"backend {name!r} does not start, so a slower one is used: {error}", stacklevel=2)
    raise RuntimeError(f"none of the backends {names} runs on {device}")


@functools.cache
def choose(name: str, device: torch.device, names: tuple[str, ...] = NAMES) -> Eager:
    """Return the backend for tensors on a device. "auto" takes the first of `available` that is in ``names``.

    Raises ValueError if the backend ``name`` cannot run there.
    """
    if name == "auto":
        return _automatic(device, names)
    missing = _BACKENDS[name][0](device)
    if missing is not None:
        raise ValueError(f"backend={name!r} needs {missing}. Use backend='auto', or one of {available(device)}")
    return _made(name)
