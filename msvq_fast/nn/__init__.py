"""Modules that hold parameters and buffers and call the ops."""

from msvq_fast.nn.attention import LocalAttention
from msvq_fast.nn.attention_cache import AttentionCache, fronts
from msvq_fast.nn.blocks import Encoder, Residual
from msvq_fast.nn.losses import GaussianPyramid, MultiScaleLoss
from msvq_fast.nn.quantizer import GRADIENTS, VectorQuantizer

__all__ = [
    "GRADIENTS",
    "AttentionCache",
    "Encoder",
    "GaussianPyramid",
    "LocalAttention",
    "MultiScaleLoss",
    "Residual",
    "VectorQuantizer",
    "fronts",
]
