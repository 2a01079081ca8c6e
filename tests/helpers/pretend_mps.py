"""A pretended Apple GPU, for machines without one: tensors that say that they are on MPS, hold their values on the
CPU, and raise for what MPS refuses. That is

* float64, however it comes about;
* operands on two devices, and a copy to another device that changes the dtype on the way, which on MPS fails for
    float64;
* operations for which torch's own table of kernels names none for MPS. Operations inside a composite one are not seen.

Inside `pretended()` also factory functions with ``device=MPS`` make such tensors.
"""

import functools
import re
from importlib.resources import files

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")  # with its number, which torch would otherwise ask a missing driver for
aten = torch.ops.aten


class MpsTensor(Tensor):
    """A tensor on the pretended GPU; ``held`` has its values. To torch's own C++ it is a meta tensor, as a device that
    this build of torch does not have could not be made the current one.
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

    def tolist(self):  # torch refuses it for subclasses
        return self.held.tolist()


class pretended(TorchDispatchMode):
    """Has factory functions that name the pretended GPU make their tensors there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
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
    own = {id(x.held): x for x in there}  # what was written in place
    return tree_map(lambda x: (own.get(id(x)) if id(x) in own else MpsTensor(x)) if isinstance(x, Tensor) else x, made)


@functools.cache
def mps_kernels() -> set[str]:
    """Names of the operations that run on MPS by torch's table: with a kernel of their own, or composed of others."""
    table = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    found = set()
    for entry in re.split(r"^- func: ", table, flags=re.MULTILINE)[1:]:
        composed = "  dispatch:" not in entry and "  structured_delegate:" not in entry
        if composed or re.search(r"^    (.*\bMPS\b|Composite).*:", entry, flags=re.MULTILINE):
            found.add(_base(re.match(r"\w+", entry)[0]))
    return found


def _base(name: str) -> str:
    """An operation's name without the mark of its in-place form; all forms of one share its kernel."""
    return name if name.startswith("__") else name.removesuffix("_")
