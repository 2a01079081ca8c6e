"""This module provides a pretended Apple GPU for machines without one.

Its tensors say that they are on MPS, hold their values on the CPU, and raise an error for what MPS refuses:

* float64, however it comes about;
* operands on two devices, and a copy to another device that changes the dtype, which on MPS fails for float64;
* operations for which torch's own table of kernels names none for MPS. Operations inside a composite one are not seen.

Inside `pretended()`, factory functions with ``device=MPS`` make such tensors too.
"""

import functools
import re
from importlib.resources import files

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")  # Without the number torch would ask a driver that is missing.
aten = torch.ops.aten


class MpsTensor(Tensor):
    """Holds a tensor on the pretended GPU, whose values are in ``held`` on the CPU.

    To torch's own C++ it is a meta tensor, as a device that this build of torch does not have could not be made the
    current one.

    Raises:
        TypeError: ``held`` is float64.
    """

    device = MPS
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> "MpsTensor":
        if held.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        strides = dict(strides=held.stride(), storage_offset=held.storage_offset())
        return Tensor._make_wrapper_subclass(cls, held.shape, **strides, dtype=held.dtype, device="meta")

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    def __repr__(self):
        return f"MpsTensor({self.held})"

    def tolist(self):
        """Return the values as a list, which torch refuses for subclasses."""
        return self.held.tolist()


class pretended(TorchDispatchMode):
    """Lets factory functions that name the pretended GPU make their tensors there, inside a ``with`` block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    """Return what ``func`` makes on the pretended GPU or on the CPU. Raise an error for what MPS refuses."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, MpsTensor)]
    device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
    if device.type == "meta":
        device = MPS
    copied = {aten._to_copy.default: 0, aten.copy_.default: 1}.get(func)
    if copied is not None:
        source, dtype = args[copied], args[0].dtype if copied else kwargs.get("dtype") or args[0].dtype
        if source.device != device and source.dtype != dtype:
            raise TypeError(f"a copy from {source.device} to {device} makes {dtype} of {source.dtype} on the way")
    elif there and len(there) < len(tensors):
        raise RuntimeError(f"{func} has operands on MPS and on the CPU")
    elif device == MPS and _base(func._schema.name.removeprefix("aten::")) not in mps_kernels():
        raise NotImplementedError(f"torch has no MPS kernel of {func}")
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, MpsTensor) else x, (args, kwargs))
    made = func(*args, **kwargs)
    if device != MPS:
        return made
    own = {id(x.held): x for x in there}  # These may have been written in place.
    return tree_map(lambda x: (own.get(id(x)) if id(x) in own else MpsTensor(x)) if isinstance(x, Tensor) else x, made)


@functools.cache
def mps_kernels() -> set[str]:
    """Return the names of the operations that run on MPS by torch's table, by a kernel of their own or composed."""
    table = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    found = set()
    for entry in re.split(r"^- func: ", table, flags=re.MULTILINE)[1:]:
        composed = "  dispatch:" not in entry and "  structured_delegate:" not in entry
        if composed or re.search(r"^    (.*\bMPS\b|Composite).*:", entry, flags=re.MULTILINE):
            found.add(_base(re.match(r"\w+", entry)[0]))
    return found


def _base(name: str) -> str:
    """Return an operation's name without the mark of its in-place form, as all its forms share one kernel."""
    return name if name.startswith("__") else name.removesuffix("_")
