"""A thin shim: setuptools asks, CMake and ninja build msvq_fast._C (see CMakeLists.txt).

The build never fails the install: where the CUDA kernels do not compile the C++ ones are built
alone, and without a working C++ compiler the package is pure Python; both say what is missing.
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
            compile_ = ["cmake", "--build", build, "--parallel", jobs]
            target.unlink(missing_ok=True)  # a failed build must not ship the one before
            compiler = os.environ.get("CXX", "c++")
            reason = f"missing: a working C++17 compiler ({compiler}), see above"
            for cuda in (True, False):
                try:
                    # CUDA off starts afresh: the failed try's cache names its CUDA compiler
                    options = [] if cuda else ["-DMSVQ_CUDA=OFF", "--fresh"]
                    subprocess.run([*configure, *options], check=True)
                    reason = "compilation failed, see above"
                    subprocess.run(compile_, check=True)
                    return
                except (subprocess.CalledProcessError, FileNotFoundError):
                    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
                    if missing:
                        reason = f"missing: {', '.join(missing)}"
                        break
                    if not cuda or not self._finds_nvcc():
                        break
                    self.warn(
                        "the build with CUDA failed, see above; trying again for the CPU only: "
                        "CUDA tensors will not have the C++ kernels"
                    )
            self.warn(
                f"msvq_fast._C was not built, {reason}; the package works without it, with "
                "the slower reference backend on CPU. Install what is missing and reinstall."
            )

    def _finds_nvcc(self) -> bool:
        """Whether CMake may have found a CUDA compiler, the only part that can be left out."""
        return (
            bool(shutil.which(os.environ.get("CUDACXX", "nvcc")))
            or Path("/usr/local/cuda/bin/nvcc").exists()
        )


setup(
    ext_modules=[Extension("msvq_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
