"""Octave features and the layers that make them; needs nothing but PyTorch."""

from octvideo.layers.calls import octave_class, restore  # which also teaches F.conv2d and its like octave features
from octvideo.layers.convolution import OctConv1d, OctConv2d, OctConv3d, OctConvTranspose2d, OctConvTranspose3d
from octvideo.layers.finishing import use_fused_passes
from octvideo.layers.normalization import normalize  # which also teaches nn.SyncBatchNorm octave features
from octvideo.layers.octaves import Octaves
from octvideo.layers.reshaping import Regrouped  # which also says what views, slices and joins of octaves are

__all__ = [
    "OctConv1d",
    "OctConv2d",
    "OctConv3d",
    "OctConvTranspose2d",
    "OctConvTranspose3d",
    "Octaves",
    "Regrouped",
    "normalize",
    "octave_class",
    "restore",
    "use_fused_passes",
]
