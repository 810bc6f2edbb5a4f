"""octvideo: efficient video recognition with Octave Convolution."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octvideo.evaluation.features import features
    from octvideo.evaluation.prediction import predict
    from octvideo.layers.convolution import (
        OctConv1d,
        OctConv2d,
        OctConv3d,
        OctConvTranspose2d,
        OctConvTranspose3d,
    )
    from octvideo.layers.octaves import Octaves
    from octvideo.models.choose_low import choose_low
    from octvideo.models.fuse import fuse
    from octvideo.models.octavize import octavize
    from octvideo.models.own_network import build_network
    from octvideo.models.zoo import MODELS, create_model

__all__ = [
    "MODELS",
    "OctConv1d",
    "OctConv2d",
    "OctConv3d",
    "OctConvTranspose2d",
    "OctConvTranspose3d",
    "Octaves",
    "build_network",
    "choose_low",
    "create_model",
    "features",
    "fuse",
    "octavize",
    "predict",
]

_HOMES = (
    *("layers.convolution", "models.octavize", "models.choose_low", "models.fuse", "models.zoo"),
    *("models.own_network", "evaluation.prediction", "evaluation.features"),
)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: the command line must set up its process before PyTorch starts."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    modules = (importlib.import_module(f"octvideo.{home}") for home in _HOMES)  # up to the first that has it
    return next(getattr(module, name) for module in modules if hasattr(module, name))
