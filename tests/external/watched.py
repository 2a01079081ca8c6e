"""Run a module as ``python -m`` does, and say at its end what LoRA-Pre optimizers have done in it.

    python tests/external/watched.py MODULE [ARGUMENT …]

The last line is ``LoRA-Pre: N steps, M matrices compressed``, whichever tool built the optimizer.
"""

import atexit
import os
import runpy
import sys

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lorapre_peft.optim.base import LoRAPreOptimizer

steps = 0
compressed = 0


def count(optimizer: Optimizer, *_: object) -> None:
    """After each step of any optimizer: count those of LoRA-Pre."""
    global steps, compressed
    if isinstance(optimizer, LoRAPreOptimizer):
        steps += 1
        compressed = sum("m_A" in state for state in optimizer.state.values())


if __name__ == "__main__":
    register_optimizer_step_post_hook(count)
    atexit.register(lambda: print(f"LoRA-Pre: {steps} steps, {compressed} matrices compressed", flush=True))
    del sys.argv[0]  # what is left is the module's own command line
    sys.path[0] = os.getcwd()  # as with -m
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
