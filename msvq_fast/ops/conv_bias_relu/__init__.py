"""Convolution, bias, residual and ReLU in as few passes over memory as there can be."""

from msvq_fast.ops.conv_bias_relu.op import ConvBiasReluOutput, conv_bias_relu

__all__ = ["ConvBiasReluOutput", "conv_bias_relu"]
