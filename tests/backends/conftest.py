"""What the tests of the backends share."""

import functools

import pytest

from lorapre_peft.kernels import choose as backends


@pytest.fixture
def fresh_backends(monkeypatch):
    """Backends are made once in a process; not for this test."""
    for name in ("_made", "choose"):
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))
