"""Seeds, Triton's interpreter, and NaN in every torch.empty so that an unwritten output fails."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
for name in ("COLUMNS", "FORCE_COLOR"):  # of whoever runs the tests: help and tables follow them
    os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def _compiler_first() -> Iterator[None]:
    """Let torch.compile note PyTorch's own functions before a test has others in their place."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:  # a process group would have them noted anew
        patch.setattr(torch._dynamo.trace_rules, "clear_lru_cache", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Poison ``torch.empty`` and ``torch.empty_like`` outside tracing."""

    def poisoned(create):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = create(*args, **kwargs)
            if torch.compiler.is_compiling() or out.device.type == "meta":
                return out
            if type(out) is torch.Tensor and not torch._C._dispatch_tls_is_dispatch_key_included(
                torch._C.DispatchKey.Python
            ):
                with torch.no_grad():
                    out.fill_(float("nan") if out.is_floating_point() else 85)
            return out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    yield
