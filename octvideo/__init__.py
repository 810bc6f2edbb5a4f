"""octvideo: efficient video recognition with Octave Convolution."""

from octvideo.conv import OctConv2d, OctConv3d
from octvideo.fuse import fuse
from octvideo.models import MODELS, create_model
from octvideo.octaves import Octaves
from octvideo.octavize import octavize

__all__ = ["MODELS", "OctConv2d", "OctConv3d", "Octaves", "create_model", "fuse", "octavize"]
