"""Octave features and the layers that make them; needs nothing but PyTorch."""

from octvideo.layers.convolution import OctConv2d, OctConv3d
from octvideo.layers.normalization import normalize  # which also teaches nn.SyncBatchNorm octave features
from octvideo.layers.octaves import Octaves
from octvideo.layers.reshaping import Regrouped  # which also says what views, slices and joins of octaves are

__all__ = ["OctConv2d", "OctConv3d", "Octaves", "Regrouped", "normalize"]
