"""Compile the C++ kernels into the wheel, where there is a C++ compiler; `setup.cfg` says all else."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# By its path: the package itself needs torch, which is not there while a wheel is built.
spec = importlib.util.spec_from_file_location("build", Path(__file__).parent / "lorapre_peft" / "kernels" / "build.py")
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


class Library(Extension):
    """The kernels for CPUs of one capability. Where they do not compile, the build warns and goes on without them."""

    def __init__(self, capability: str):
        name = Path(kernels.file_name(capability)).stem
        sources = [str(path.relative_to(Path(__file__).parent)) for path in kernels.SOURCES]
        super().__init__(f"lorapre_peft.kernels.{name}", sources, optional=True)
        self.capability = capability


class BuildLibraries(build_ext):
    """Compile as on first use. An editable installation leaves it to the first use, as its sources change."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True  # one compiler for each library

    def run(self) -> None:
        if not (self.editable_mode or self.inplace):
            super().run()

    def build_extension(self, ext: Library) -> None:
        try:
            kernels.compile_library(ext.capability, Path(self.get_ext_fullpath(ext.name)).parent)
        except RuntimeError as error:
            raise CompileError(str(error)) from error

    def get_ext_filename(self, fullname: str) -> str:
        return f"{Path(*fullname.split('.'))}.so"  # of no Python: ctypes loads it


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, where = super().get_tag()
        return (python, abi, where) if self.root_is_pure else ("py3", "none", where)


compiles = sys.platform.startswith("linux") and kernels.compiler() is not None
if sys.platform.startswith("linux") and not compiles:
    print("no C++ compiler (g++ or clang++) found: built without the C++ kernels, which the first use will compile")
setup(
    ext_modules=[Library(capability) for capability in kernels.VARIANTS] if compiles else [],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
