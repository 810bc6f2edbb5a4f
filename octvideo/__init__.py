"""octvideo: efficient video recognition with Octave Convolution."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octvideo.evaluation.prediction import predict
    from octvideo.layers.convolution import OctConv2d, OctConv3d
    from octvideo.layers.octaves import Octaves
    from octvideo.models.fuse import fuse
    from octvideo.models.octavize import octavize
    from octvideo.models.zoo import MODELS, create_model

__all__ = ["MODELS", "OctConv2d", "OctConv3d", "Octaves", "create_model", "fuse", "octavize", "predict"]

_HOMES = {
    "MODELS": "octvideo.models.zoo",
    "OctConv2d": "octvideo.layers.convolution",
    "OctConv3d": "octvideo.layers.convolution",
    "Octaves": "octvideo.layers.octaves",
    "create_model": "octvideo.models.zoo",
    "fuse": "octvideo.models.fuse",
    "octavize": "octvideo.models.octavize",
    "predict": "octvideo.evaluation.prediction",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: the command line must set up its process before PyTorch starts."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
