"""octvideo: efficient video recognition with Octave Convolution."""

from typing import TYPE_CHECKING, Any

from octvideo.conv import OctConv2d, OctConv3d
from octvideo.fuse import fuse
from octvideo.models import MODELS, create_model
from octvideo.octaves import Octaves
from octvideo.octavize import octavize

if TYPE_CHECKING:
    from octvideo.prediction import predict

__all__ = ["MODELS", "OctConv2d", "OctConv3d", "Octaves", "create_model", "fuse", "octavize", "predict"]


def __getattr__(name: str) -> Any:
    """`predict` where it is first asked for: decoders and Lightning take another half second to import."""
    if name != "predict":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from octvideo.prediction import predict

    return predict
