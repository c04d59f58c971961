"""The last layer of a decoder: a transposed convolution to an image of twice the size."""

from msvq_fast.ops.upsample_image.op import upsample_image

__all__ = ["upsample_image"]
