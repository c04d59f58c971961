"""Which implementation runs: one ordered table per device, decided from the tensors of the call.

Every op folder may hold ``native.py`` (C++ on CPU tensors, CUDA C++ on CUDA tensors) and
``triton_kernels.py`` beside its ``reference.py``. Each of the two has a function
``unsupported(...) -> str | None`` that says why it cannot run a call. The same reasons feed
``msvq info``, the error of an explicit ``backend=`` and the tests' skips.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from msvq_fast.ops.checks import InputError, is_in_onnx_export, is_transformed

Backend = Literal["reference", "native", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "native", "triton")
ORDER: dict[str, tuple[Backend, ...]] = {
    "cuda": ("native", "triton", "reference"),
    "cpu": ("native", "reference"),
}
NOT_BUILT = (
    "the C++ extension was not built; install again with a C++17 compiler "
    "(pip install -v says what is missing)"
)
_MODULES = {"native": "native", "triton": "triton_kernels"}
_LIBRARY = torch.library.Library("msvq_fast", "FRAGMENT")


def is_built() -> bool:
    """Whether there is a C++ extension, working or not."""
    return importlib.util.find_spec("msvq_fast._C") is not None


class KernelVariant(NamedTuple):
    """One configuration of a Triton kernel, compiled ahead of time by ``make kernels-check``.

    ``triton_kernels.variants()`` of an op lists them all: ``signature`` gives the type of every
    argument in order (``"*fp32"``, ``"i32"``, ``"constexpr"``), ``constants`` the constexprs.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False  # its SASS must hold tensor-core instructions
    barrier: bool = False  # and a barrier of the block: it writes what several warps read
    fp_fusion: bool = True  # whether a product may be contracted with the addition after it
    max_registers: int | None = None  # of a thread, from sm_90 on; 255 everywhere


def kernel_op(
    name: str, *devices: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a raw kernel call the PyTorch op ``msvq_fast::name``, which torch.compile leaves whole.

    As `torch.library.custom_op`, whose first call loads all of torch.compile and whose every call
    takes longer than many a kernel; but who calls the op has to care for gradients: it has none.

    Args:
        name: Of the op.
        *devices: The device types it runs on; any if none is named.
        mutates: The arguments that it changes in place.
    """

    def register(call: Callable[..., Any]) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(call, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        changed = [
            i for i, argument in enumerate(signature(call).parameters) if argument in mutates
        ]

        untraced: Callable[..., Any] | None = None

        def run(*args: Any) -> Any:
            # torch.compile, once loaded, may look at any frame; what a kernel does is not for it.
            nonlocal untraced
            kernel = call
            if "torch._dynamo" in sys.modules:
                kernel = untraced = untraced or torch.compiler.disable(call)
            out = kernel(*args)
            for i in changed:  # autograd may have saved what a kernel writes
                torch.autograd.graph.increment_version(args[i])
            return out

        for key in [d.upper() for d in devices] or ["CompositeExplicitAutograd"]:
            _LIBRARY.impl(name, run, key)
        return getattr(torch.ops.msvq_fast, name).default

    return register


class Op:
    """The backends of one op and the choice among them."""

    def __init__(self, package: str, *, slow_reference: bool = True) -> None:
        """Load the kernel modules of the op folder ``package``, or note why one is missing.

        Without ``slow_reference`` the reference is PyTorch's own kernels: on CUDA it runs without
        a warning.
        """
        self.name = package.rpartition(".")[2]
        self.slow_reference = slow_reference
        self.kernels: dict[str, ModuleType] = {}
        self.missing: dict[str, str] = {}
        for backend, module in _MODULES.items():
            path = f"{package}.{module}"
            if importlib.util.find_spec(path) is None:
                self.missing[backend] = f"{self.name} has no {backend} kernel"
                continue
            try:
                self.kernels[backend] = importlib.import_module(path)
            except ImportError as error:
                built = backend != "native" or is_built()
                self.missing[backend] = (
                    f"{backend} is not available: {error if built else NOT_BUILT}"
                )

    def why_not(self, backend: str, *args: Any, **kwargs: Any) -> str | None:
        """Return why ``backend`` cannot run this call, or None if it can."""
        if backend == "reference":
            return None
        if backend in self.missing:
            return self.missing[backend]
        if is_transformed():
            return "torch.func and forward-mode differentiation see through the reference alone"
        return self.kernels[backend].unsupported(*args, **kwargs)

    def pick(self, *args: Any, backend: str | None = None, **kwargs: Any) -> str:
        """Choose the backend for a call with the tensors ``args``.

        Args:
            *args: What the kernels' ``unsupported`` takes; the first is a tensor.
            backend: Asked for explicitly: it runs or raises, and never falls back.
            **kwargs: What the kernels' ``unsupported`` takes.

        Returns:
            ``"reference"``, ``"native"`` or ``"triton"``.

        Raises:
            InputError: If ``backend`` is unknown or cannot run this call; the reason is said.
        """
        if backend is not None and backend not in BACKENDS:
            raise InputError(f"backend={backend!r}; expected None or one of {BACKENDS}")
        if is_in_onnx_export():  # nothing runs: the definition becomes the graph
            return "reference"
        if backend is not None:
            reason = self.why_not(backend, *args, **kwargs)
            if reason is not None:
                raise InputError(f"backend={backend!r} cannot run {self.name}: {reason}")
            return backend
        device = _first_tensor(args).device.type
        reasons: list[str] = []
        for candidate in ORDER.get(device, ("reference",)):
            reason = self.why_not(candidate, *args, **kwargs)
            if reason is None:
                if candidate == "reference" and device == "cuda" and self.slow_reference:
                    _warn_reference(self.name, "; ".join(reasons))
                return candidate
            reasons.append(reason)
        return "reference"


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise TypeError("pick needs a tensor to read the device from")


_warned: set[tuple[str, str]] = set()


def _warn_reference(name: str, reasons: str) -> None:
    """Say once per op and reason that a CUDA call runs the slow reference."""
    if torch.compiler.is_compiling() or (name, reasons) in _warned:
        return
    _warned.add((name, reasons))
    warnings.warn(f"{name} runs its slow reference on CUDA: {reasons}", stacklevel=4)
