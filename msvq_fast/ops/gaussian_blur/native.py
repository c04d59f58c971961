"""The Gaussian blur of csrc/gaussian_blur: C++ on CPU tensors, CUDA C++ on CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msvq_fast import _C
from msvq_fast.ops.backend import kernel_op

# ImageType and Border in C++, of the multi-scale loss too.
IMAGE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
BORDERS = {"reflect": 0, "symmetric": 1, "replicate": 2, "circular": 3, "constant": 4}
_CUDA_MAX_TAPS = 129
# Whether Hopper GPUs blur on their tensor cores where that is quicker: one blur of float16 or
# bfloat16 (gaussian_blur_hopper.h), two of float32 in one pass (multiscale_loss_hopper.h).
TENSOR_CORES = True
CPU_MAX_TAPS = 8191  # a thread keeps as many rows, each as much wider than the image


def unsupported(
    x: Tensor, taps_y: Sequence[float], taps_x: Sequence[float], border: str
) -> str | None:
    """Why this call cannot run here, or None."""
    if x.device.type not in ("cpu", "cuda"):
        return f"the kernels run on CPU and CUDA tensors, x is on {x.device}"
    if x.dtype not in IMAGE_TYPES:
        return f"the kernels take float32, float16, bfloat16 or uint8, x is {x.dtype}"
    if x.device.type == "cpu":
        few = max(len(taps_y), len(taps_x)) <= CPU_MAX_TAPS
        return None if few else f"the CPU kernel takes up to {CPU_MAX_TAPS} taps"
    if not hasattr(_C, "gaussian_blur_cuda"):
        return "msvq_fast._C was built without CUDA (no nvcc was found)"
    if max(len(taps_y), len(taps_x)) > _CUDA_MAX_TAPS:
        return f"the CUDA kernel takes up to {_CUDA_MAX_TAPS} taps"
    if max(x.shape[1] * x.shape[3], x.shape[2]) > 2**31 - 2049:
        return "the CUDA kernel takes fewer than 2**31 - 2048 rows, of as many values"
    return None


def gaussian_blur(
    x: Tensor, taps_y: Sequence[float], taps_x: Sequence[float], border: str, adjoint: bool
) -> Tensor:
    """Blur ``x (B, C, H, W)``, or apply the adjoint of the blur; keeps dtype and memory format."""
    return _gaussian_blur(x, list(taps_y), list(taps_x), border, adjoint)


@kernel_op("gaussian_blur_native", "cpu", "cuda")
def _gaussian_blur(
    x: Tensor, taps_y: list[float], taps_x: list[float], border: str, adjoint: bool
) -> Tensor:
    x = _dense(x)
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    planes, inner = (batch * channels, 1) if x.is_contiguous() else (batch, channels)
    arguments = (
        x.data_ptr(),
        out.data_ptr(),
        IMAGE_TYPES[x.dtype],
        (planes, height, width, inner),
        taps_y,
        taps_x,
        BORDERS[border],
        adjoint,
    )
    if x.device.type == "cpu":
        _C.gaussian_blur_cpu(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C.gaussian_blur_cuda(*arguments, x.device.index, stream, _on_tensor_cores())
    return out


torch.library.register_fake(_gaussian_blur, lambda x, *_: torch.empty_like(_dense(x)))


def blur_twice(x: Tensor, taps: Sequence[float], border: str) -> tuple[Tensor, Tensor]:
    """``x (B, C, H, W)`` on a GPU blurred once and twice, in one pass where there is a kernel."""
    once, twice = _blur_twice(x, list(taps), border)
    return once, twice


def levels_of(x: Tensor, taps: list[float], border: str) -> tuple[Tensor, Tensor]:
    """As `blur_twice`, for the op that it calls."""
    one_pass = x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0
    if one_pass and _on_tensor_cores(x.device):
        once, twice = torch.empty_like(x), torch.empty_like(x)
        with torch.cuda.device(x.device):
            if _C.gaussian_pyramid_hopper(
                x.data_ptr(),
                once.data_ptr(),
                twice.data_ptr(),
                IMAGE_TYPES[x.dtype],
                (x.shape[0] * x.shape[1], *x.shape[2:]),
                taps,
                BORDERS[border],
                x.device.index,
                torch.cuda.current_stream().cuda_stream,
            ):
                return once, twice
        del once, twice  # they are made anew
    once = _gaussian_blur(x, taps, taps, border, False)
    return once, _gaussian_blur(once, taps, taps, border, False)


_blur_twice = kernel_op("gaussian_blur_twice_native", "cuda")(levels_of)
torch.library.register_fake(
    _blur_twice, lambda x, *_: (torch.empty_like(_dense(x)), torch.empty_like(_dense(x)))
)


def _on_tensor_cores(device: torch.device | None = None) -> bool:
    built = hasattr(_C, "gaussian_pyramid_hopper")
    return TENSOR_CORES and built and torch.cuda.get_device_capability(device) == (9, 0)


def _dense(x: Tensor) -> Tensor:
    """``x`` itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
