"""Octave features and the layers that make them; needs nothing but PyTorch."""

from octvideo.layers.convolution import OctConv2d, OctConv3d
from octvideo.layers.normalization import normalize  # which also teaches nn.SyncBatchNorm octave features
from octvideo.layers.octaves import Octaves

__all__ = ["OctConv2d", "OctConv3d", "Octaves", "normalize"]
