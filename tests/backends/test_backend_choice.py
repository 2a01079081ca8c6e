"""How a backend is chosen."""

import copy
import importlib.util
import pickle
import shutil

import pytest
import torch
from backend_runs import cpp_, parameters, run
from stepping import both_optimizers

from lorapre_peft.kernels import build
from lorapre_peft.kernels import choose as backends


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "triton" else find(name, *args)
    )


@cpp_
def test_auto_is_the_fastest(monkeypatch, fresh_backends):
    assert backends.choose("auto", torch.device("cpu")) is backends.choose("cpp", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(backends, "version", lambda name: "3.4.0")
    assert backends.available("cuda") == ["triton", "eager", "compiled"]


@cpp_
def test_without_a_compiler_the_kernels_must_be_there(monkeypatch, fresh_backends, tmp_path):
    """Those of the wheel, or compiled before; else the eager backend, with a warning that says what is missing."""
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert backends.available("cpu")[0] == "cpp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match=r"backend 'cpp' needs a C\+\+ compiler .*, so a slower one is used"):
        assert backends.choose("auto", torch.device("cpu")) is backends.choose("eager", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"backend='cpp' needs a C\+\+ compiler"):
        backends.choose("cpp", torch.device("cpu"))


@pytest.mark.parametrize("error", [PermissionError("denied"), RuntimeError("Could not determine home directory.")])
def test_a_cache_out_of_reach_is_as_an_empty_one(monkeypatch, tmp_path, error):
    def unreadable():
        raise error

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "cache", unreadable)
    assert build.find("DEFAULT") is None
    (tmp_path / build.file_name("DEFAULT")).touch()
    assert build.find("DEFAULT") == tmp_path / build.file_name("DEFAULT")


@cpp_
@pytest.mark.parametrize("place", ["package", "cache"])
def test_kernels_are_known_by_sources_and_flags(monkeypatch, tmp_path, place):
    """Those of other sources or flags are not taken, wherever they lie."""
    monkeypatch.setattr(build, "FOLDER", tmp_path / "package")
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "cache")
    path = tmp_path / place / build.file_name("AVX2")
    path.parent.mkdir()
    path.touch()
    assert build.find("AVX2") == path
    assert build.find("DEFAULT") is None
    (tmp_path / "kernels.cpp").write_text("other source")
    monkeypatch.setattr(build, "SOURCES", [*build.SOURCES, tmp_path / "kernels.cpp"])
    assert build.find("AVX2") is None


def test_cpp_needs_a_cpu():
    with pytest.raises(ValueError, match=r"backend='cpp' needs a CPU under Linux, found cuda"):
        backends.choose("cpp", torch.device("cuda"))


def test_without_triton_auto_is_eager(without_triton, fresh_backends):
    """A missing package costs speed only, and that is said."""
    assert backends.available("cuda:0") == ["eager"]
    with pytest.warns(UserWarning, match=r"'triton' needs the package triton, 3\.4 or later .*, so a slower one is"):
        assert type(backends.choose("auto", torch.device("cuda:0"))) is backends.Eager
    for name in ("triton", "compiled"):
        with pytest.raises(
            ValueError, match=rf"backend='{name}' needs the package triton.*Use backend='auto'.*\['eager'\]"
        ):
            backends.choose(name, torch.device("cuda:0"))


def test_an_old_triton_is_as_none(monkeypatch, fresh_backends):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(backends, "version", lambda name: "3.3.1")
    with pytest.raises(ValueError, match=r"backend='triton' needs the package triton, 3\.4 or later"):
        backends.choose("triton", torch.device("cuda:0"))


def test_triton_needs_a_cuda_device(monkeypatch, fresh_backends):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(backends, "version", lambda name: "3.4.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' needs a CUDA device, found cpu"):
        backends.choose("triton", torch.device("cpu"))


def test_compiled_needs_a_compiler(monkeypatch, fresh_backends):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert "compiled" not in backends.available("cpu")
    with pytest.raises(ValueError, match=r"backend='compiled' needs a C\+\+ compiler"):
        backends.choose("compiled", torch.device("cpu"))


@both_optimizers
def test_unknown_backend(cls):
    with pytest.raises(ValueError, match=r"backend='cuda': expected one of 'auto', .*'eager', 'compiled'"):
        cls(parameters((19, 17)), backend="cuda")


@both_optimizers
def test_backend_travels_with_copies_but_not_in_checkpoints(cls):
    """A run may resume on another machine."""
    _, optimizer = run("eager", (19, 17), 5, cls=cls)
    saved = optimizer.state_dict()
    assert all("backend" not in group for group in saved["param_groups"])
    assert set(saved) == {"state", "param_groups"}
    other = cls(parameters((19, 17)), momentum_rank=5, backend="compiled")
    other.load_state_dict(saved)
    assert other.backend == "compiled"
    assert copy.deepcopy(other).backend == "compiled"
    assert pickle.loads(pickle.dumps(other)).backend == "compiled"
