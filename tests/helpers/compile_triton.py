"""Compile the Triton kernels for a GPU that need not be there, at momentum ranks; prints their bytes of shared memory as JSON."""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapre_peft.kernels import triton_kernels as triton_backend

INTEGERS = ("n", "p", "q", "k", "rows_per_split", "first_row", "g_n", "g_r", "g_c", "t_n", "t_r", "t_c")
OTHERS = {"bound": "fp32", "keys": "*i64", "clamped": "*i32", "g_ptr": "*bf16", "theta_ptr": "*bf16"}


def shared_bytes(kernel, constants: dict[str, int]) -> int:
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: "i32" if name in INTEGERS else OTHERS.get(name, "*fp32") for name in names}
    types |= dict.fromkeys(constants.keys() & set(kernel.arg_names), "constexpr")
    values = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    made = triton.compile(
        ASTSource(kernel, types, values), target=GPUTarget("cuda", 89, 32), options={"num_stages": 1}
    )
    return made.metadata.shared


def both_kernels(k: int) -> list[int]:
    K, BP, BQ = triton_backend.block_sizes(4096, 4096, k)
    constants = dict(K=K, BP=BP, BQ=BQ) | ({"k": 1, "first_row": 1} if k == 1 else {})
    update = dict(CLAMP=True, STOCHASTIC=True, WIDE=False, METRICS=True)
    return [
        shared_bytes(triton_backend._fit_rows, {name: constants[name] for name in constants if name != "first_row"}),
        shared_bytes(triton_backend._update_block, constants | update),
    ]


def main() -> None:
    print(json.dumps([size for k in sys.argv[1:] for size in both_kernels(int(k))]))


if __name__ == "__main__":
    main()
