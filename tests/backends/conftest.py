"""What the tests of the backends share."""

import functools

import numpy as np
import pytest
import torch

from lorapre_peft.kernels import choose as backends


@pytest.fixture
def fresh_backends(monkeypatch):
    """Backends are made once in a process; not for this test."""
    for name in ("_made", "choose"):
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Triton's interpreter keeps bfloat16 numbers as their bits, and would multiply those; a GPU needs nothing."""
    if torch.cuda.is_available():
        return
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        return (
            (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == bfloat16 else handle.data
        )

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
