"""This module compiles ``kernels.cpp`` into a library, for the wheel (``setup.py``) or on first use (`cpp`).

The library needs no header of PyTorch's. This module needs neither torch nor the rest of the package, as ``setup.py``
loads it by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
# Without errno and traps the compiler may use vector instructions for √ and comparisons. Sums keep the order in which
# they are written.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_X86 = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DLANES=16"),
    "AVX2": ("-mavx2", "-mfma", "-DLANES=8"),
}
# These are the flags of each library, by PyTorch's name for a CPU's capability. Other CPUs get the compiler's default.
VARIANTS: dict[str, tuple[str, ...]] = {"DEFAULT": (), **(_X86 if platform.machine() == "x86_64" else {})}


def compiler() -> str | None:
    """Return the C++ compiler, ``$CXX``, g++ or clang++, or None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def cache() -> Path:
    """Return the folder for libraries that are compiled on first use.

    It is ``$XDG_CACHE_HOME/lorapre_peft``, and by default ``~/.cache/lorapre_peft``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorapre_peft"


def file_name(capability: str) -> str:
    """Return the library's file name, which depends on the sources, the flags and the kind of machine."""
    made_of = [*map(Path.read_bytes, SOURCES), *map(str.encode, (*_flags(capability), platform.machine()))]
    return f"kernels-{hashlib.sha256(b' '.join(made_of)).hexdigest()[:16]}.so"


def find(capability: str) -> Path | None:
    """Return the library from the wheel, or one that was compiled before, or None if there is neither."""
    name = file_name(capability)
    if (FOLDER / name).exists():
        return FOLDER / name
    try:
        made = cache() / name
        return made if made.exists() else None
    except (OSError, RuntimeError):  # The cache cannot be read, or there is no home.
        return None


def compile_library(capability: str, folder: Path) -> Path:
    """Compile the library into a folder and return its path.

    Raises RuntimeError with the command and the compiler's message.
    """
    path = folder / file_name(capability)
    command = [str(compiler()), *_flags(capability), str(FOLDER / "kernels.cpp")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # It is renamed when whole: others may compile too.
            made = Path(temporary) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
            with made.open("rb") as library:
                os.fsync(library.fileno())  # The name must not reach the disk before the content.
            made.replace(path)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise RuntimeError(
            f"the C++ kernels could not be compiled to {path} with {' '.join(command)}: {said[-2000:]}"
        ) from error
    return path


def _flags(capability: str) -> tuple[str, ...]:
    return *_FLAGS, *VARIANTS.get(capability, ())
