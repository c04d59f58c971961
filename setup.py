"""A thin shim: setuptools asks, CMake and ninja build msvq_fast._C (see CMakeLists.txt).

The build never fails the install: without a working C++ compiler the package is pure Python and
says what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the one extension module with CMake in a fresh folder."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and copy ``_C``; on failure warn and leave the package pure Python."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A fresh folder: an isolated build's ninja is gone by the next one, and CMake caches paths.
        with tempfile.TemporaryDirectory(prefix="msvq_fast-build-") as build:
            configure = [
                "cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMSVQ_OUTPUT_DIR={target.parent}",
                f"-DMSVQ_OUTPUT_NAME={target.name}",
            ]  # fmt: skip
            jobs = str(self.parallel or os.cpu_count() or 1)
            try:
                subprocess.run(configure, check=True)
                subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                missing = [t for t in ("cmake", "ninja", "c++") if shutil.which(t) is None]
                reason = f"missing: {', '.join(missing)}" if missing else str(error)
                self.warn(
                    f"msvq_fast._C was not built ({reason}); the package works without it, with "
                    "the slower reference backend on CPU. Install a C++17 compiler and reinstall."
                )


setup(
    ext_modules=[Extension("msvq_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
