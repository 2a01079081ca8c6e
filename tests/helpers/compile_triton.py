"""This module compiles the Triton kernels, as a step launches them, for GPUs that need not be there.

It prints as JSON what each kernel takes of a multiprocessor:

    python tests/helpers/compile_triton.py 4096x4096:8,1:bfloat16
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.kernels.gpu import backend as triton_backend
from lorapre_peft.kernels.gpu import factors, numbers, passes, rows

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


class Recorder:
    """Stands in for a kernel. It appends (kernel, arguments, options) to ``launches`` in place of a launch."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches_of_a_step(
    shape: tuple[int, int], ranks: tuple[int, int], dtype: torch.dtype, capability: int
) -> list[tuple]:
    """Return (kernel, arguments, options) of all launches of one step, without launching any.

    shape: p and q of the matrix. ranks: ranks of its first and second moment. capability: as in `compiled`.
    """
    launches: list[tuple] = []
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.grad = torch.zeros_like(param)
    backend = triton_backend.Triton()
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(LoRAPreAdamW, "_backend", return_value=backend))
        patches.enter_context(mock.patch.object(triton_backend, "_capability", return_value=divmod(capability, 10)))
        for module in (factors, numbers, passes, rows):
            for name, kernel in vars(module).items():
                if isinstance(kernel, triton.JITFunction):
                    patches.enter_context(mock.patch.object(module, name, Recorder(kernel, launches)))
        LoRAPreAdamW([param], momentum_rank=ranks[0], second_momentum_rank=ranks[1]).step()
    return launches


def compiled(kernel, args: tuple, options: dict, capability: int) -> dict[str, int]:
    """Compile a launch, and return bytes of shared memory, registers of a thread and bytes that these spill.

    capability: compute capability of the GPU, such as 90 for 9.0.
    """
    options = dict(options)
    launched = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip(kernel.arg_names, args)) | options
    constants = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor | int)}
    constants |= {
        name: value for name, value in values.items() if name in options or (isinstance(value, int) and value == 1)
    }
    types = {
        name: "constexpr" if name in constants else POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        for name, value in values.items()
    }
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {
        at[name]: [["tt.divisibility", 16]]
        for name, value in values.items()
        if name not in constants and (isinstance(value, torch.Tensor) or value % 16 == 0)
    }
    source = ASTSource(kernel, types, {at[name]: value for name, value in constants.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launched)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"shared": made.metadata.shared, "registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}


def main() -> None:
    """Print the usage of each kernel. Arguments are shape, ranks and dtype, such as 4096x4096:8,1:bfloat16.

    A compute capability may follow, as in 4096x4096:8,1:bfloat16:80. Without it there are three.
    """
    found = {}
    for text in sys.argv[1:]:
        sizes, counts, dtype, *alone = text.split(":")
        shape, ranks = (tuple(map(int, part.split(by))) for part, by in ((sizes, "x"), (counts, ",")))
        for capability in map(int, alone or (80, 89, 90)):
            for kernel, args, options in launches_of_a_step(shape, ranks, getattr(torch, dtype), capability):
                usage = compiled(kernel, args, options, capability)
                found[f"{text} {capability} {kernel.fn.__name__}"] = usage
    print(json.dumps(found))


if __name__ == "__main__":
    main()
