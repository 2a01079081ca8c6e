"""Compile the Triton kernels for GPUs that need not be there, at pairs of ranks; prints what each takes of a
multiprocessor, as JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapre_peft.kernels import triton_rows as triton_backend

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = ("n", "p", "q", "k_m", "k_v", "rows_per_split", "first_row")
OTHERS = {"keys": "*i64", "clamped": "*i32", "grads": "*i64", "thetas": "*i64"}


def compiled(kernel, constants: dict, capability: int) -> dict[str, int]:
    """Bytes of shared memory, registers of a thread and bytes that they spill, as the compiled kernel says."""
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: "i32" if name in INTEGERS else OTHERS.get(name, "*fp32") for name in names}
    types |= dict.fromkeys(constants.keys() & set(kernel.arg_names), "constexpr")
    values = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    source, target = ASTSource(kernel, types, values), GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_stages": 1, "num_warps": triton_backend.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"shared": made.metadata.shared, "registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}


def both_kernels(k_m: int, k_v: int, capability: int) -> list[dict[str, int]]:
    K_M, K_V, BP, BQ = triton_backend.block_sizes(4096, 4096, k_m, k_v)
    half = dict(K_M=K_M, K_V=K_V, BP=BP, BQ=BQ, GRAD=tl.bfloat16, ALIGNED=True)
    half |= {name: 1 for name, k in (("k_m", k_m), ("k_v", k_v)) if k == 1}
    update = dict(first_row=0, THETA=tl.bfloat16, CLAMP=True, STOCHASTIC=True, WIDE=False, METRICS=True)
    return [
        compiled(triton_backend._fit_rows, half, capability),
        compiled(triton_backend._update_block, half | update, capability),
    ]


def main() -> None:
    """Arguments are pairs of ranks, such as 8,1."""
    ranks = [tuple(map(int, pair.split(","))) for pair in sys.argv[1:]]
    found = {
        f"{capability} {k_m},{k_v}": both_kernels(k_m, k_v, capability)
        for capability in (80, 89, 90)
        for k_m, k_v in ranks
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
