"""Networks for video recognition: pytorchvideo's builders, octavized."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

with warnings.catch_warnings():  # fvcore, below pytorchvideo, still calls torch.jit.script
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from pytorchvideo.models.net import MultiPathWayWithFuse, Net
    from pytorchvideo.models.resnet import ResStage, create_resnet
    from pytorchvideo.models.slowfast import create_slowfast

from octvideo.octaves import Octaves
from octvideo.octavize import octavize

DEPTHS = (50, 101, 152)


class HeadPool(nn.AvgPool3d):
    """Average pooling before the classifier: a published head's 7 x 7 window, or the whole map where that is smaller.

    A published head fails on maps below 7 x 7 and on shorter clips. This one averages all frames, and equals the
    published head for clips of the published length; a larger map (a 256 crop) keeps several windows, whose logits
    the head averages. Octaves are averaged as a whole.

    Shape:
        Input: (B, C, T, H, W) or Octaves of that shape.
        Output: a Tensor (B, C, 1, max(1, H - 6), max(1, W - 6)); (B, C, 1, 1, 1) for Octaves.
    """

    def __init__(self, window: int = 7) -> None:
        super().__init__(window, stride=1)
        self.window = window

    def forward(self, input: Tensor | Octaves) -> Tensor:
        frames, *extent = input.shape[2:]
        window = extent if isinstance(input, Octaves) else [min(self.window, size) for size in extent]
        return F.avg_pool3d(input, (frames, *window), 1)  # type: ignore[arg-type]


class SlowFast(Net):
    """A SlowFast network that takes one clip and makes its slow pathway's input itself.

    The slow pathway sees every `frame_ratio`-th frame, spread over the clip from its first to its last frame as in
    the published networks (Feichtenhofer et al., ICCV 2019).

    Args:
        blocks: stem, stages and head of pytorchvideo's SlowFast network.
        frame_ratio: frames of the fast pathway for each one of the slow pathway.

    Shape:
        Input: (B, 3, T, H, W), T a multiple of frame_ratio.
        Output: (B, num_classes).
    """

    def __init__(self, blocks: nn.ModuleList, frame_ratio: int) -> None:
        super().__init__(blocks=blocks)
        self.frame_ratio = frame_ratio

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        if frames % self.frame_ratio:
            raise ValueError(f"SlowFast takes clips of a multiple of {self.frame_ratio} frames, got {frames}")
        slow = torch.linspace(0, frames - 1, frames // self.frame_ratio, device=x.device).long()
        # A new list every time: pytorchvideo's blocks write their results into it.
        return super().forward([x.index_select(2, slow), x])  # type: ignore[no-any-return]


def c2d_r50(num_classes: int = 400, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> Net:
    """C2D: a ResNet that sees each frame by itself and pools over time (Wang et al., CVPR 2018)."""
    return _resnet(
        num_classes, width, depth, dropout, stem=1, pool_frames=True, temporal_kernels=((1,), (1,), (1,), (1,))
    )


def i3d_r50(num_classes: int = 400, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> Net:
    """I3D: temporal kernels of 3 in every second block (Wang et al., CVPR 2018, after Carreira and Zisserman)."""
    return _resnet(
        num_classes, width, depth, dropout, stem=5, pool_frames=True, temporal_kernels=((3,), (3, 1), (3, 1), (1, 3))
    )


def slow_r50(num_classes: int = 400, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> Net:
    """Slow: SlowFast's slow pathway alone; temporal kernels only in the last two stages."""
    return _resnet(
        num_classes, width, depth, dropout, stem=1, pool_frames=False, temporal_kernels=((1,), (1,), (3,), (3,))
    )


def slowfast_r50(
    num_classes: int = 400,
    *,
    width: int = 64,
    depth: int = 50,
    dropout: float = 0.5,
    frame_ratio: int = 4,
    channel_ratio: int = 8,
) -> SlowFast:
    """SlowFast: a wide network on few frames, joined by a thin one on many (Feichtenhofer et al., ICCV 2019).

    Args:
        frame_ratio: frames of the fast pathway for each one of the slow pathway.
        channel_ratio: channels of the slow pathway for each one of the fast pathway.
    """
    network = create_slowfast(
        slowfast_channel_reduction_ratio=(channel_ratio,),
        slowfast_fusion_conv_kernel_size=(7, 1, 1),
        slowfast_fusion_conv_stride=(frame_ratio, 1, 1),
        model_depth=depth,
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_dim_outs=(width, width // channel_ratio),
    )
    return SlowFast(network.blocks, frame_ratio)


def _resnet(
    num_classes: int,
    width: int,
    depth: int,
    dropout: float,
    *,
    stem: int,
    pool_frames: bool,
    temporal_kernels: tuple[tuple[int, ...], ...],
) -> Net:
    """A video ResNet; `stem` and `temporal_kernels` (a tuple a stage, repeated over its blocks) are sizes in frames."""
    return create_resnet(
        model_depth=depth,
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_dim_out=width,
        stem_conv_kernel_size=(stem, 7, 7),
        stage1_pool=nn.MaxPool3d if pool_frames else None,
        stage_conv_a_kernel_size=tuple([(size, 1, 1) for size in stage] for stage in temporal_kernels),
    )


MODELS = {"c2d_r50": c2d_r50, "i3d_r50": i3d_r50, "slow_r50": slow_r50, "slowfast_r50": slowfast_r50}


def create_model(
    name: str,
    *,
    alpha: float | Sequence[float] = 0.0,
    num_classes: int = 400,
    width: int = 64,
    depth: int = 50,
    dropout: float = 0.5,
    frame_ratio: int = 4,
    channel_ratio: int = 8,
) -> nn.Module:
    """Builds a network of the zoo, with octave convolutions where alpha is above 0.

    The octave layers follow the paper's layout (section 4.3): stages res2, res3 and res4 with their shortcuts (and
    SlowFast's lateral connections after them); stem, res5 and classifier stay vanilla. At alpha 0 it is
    pytorchvideo's network with its names, so published checkpoints load. Any crop size
    and, from 2 frames, any clip length works; the last batch norm of a block starts at 0 and the classifier at a
    standard deviation of 0.01.

    Args:
        name: one of `MODELS`.
        alpha: share of low channels in [0, 1], or four of them for res2, res3, res4, res5.
        num_classes: size of the output.
        width: channels of the stem; 64 as published.
        depth: 50, 101 or 152 layers.
        dropout: probability before the classifier.
        frame_ratio: SlowFast only; frames of the fast pathway for each one of the slow pathway.
        channel_ratio: SlowFast only; channels of the slow pathway for each one of the fast pathway.

    Returns:
        A network from clips (B, 3, T, H, W) to logits (B, num_classes).

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    alphas = (alpha, alpha, alpha, 0.0) if isinstance(alpha, (int, float)) else tuple(alpha)
    if len(alphas) != 4:
        raise ValueError(f"alpha must be one number or four (res2, res3, res4, res5), got {len(alphas)}: {alphas}")
    if any(not 0 <= value <= 1 for value in alphas):
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {DEPTHS}, got {depth}")
    if frame_ratio < 1 or channel_ratio < 1:
        raise ValueError(f"frame_ratio and channel_ratio must be at least 1, got {frame_ratio} and {channel_ratio}")
    if width < 1 or (name.startswith("slowfast") and width % channel_ratio):
        raise ValueError(
            f"width must be positive, and for SlowFast a multiple of channel_ratio {channel_ratio}, got {width}"
        )
    pathways = {"frame_ratio": frame_ratio, "channel_ratio": channel_ratio} if MODELS[name] is slowfast_r50 else {}
    network = MODELS[name](num_classes, width=width, depth=depth, dropout=dropout, **pathways)
    for module in network.modules():
        for child_name, child in module.named_children():
            if type(child) is nn.AvgPool3d:
                setattr(module, child_name, HeadPool())
    return octavize(
        network, {f"^blocks\\.{block}\\.": alpha for block, alpha in zip(_stages(network), alphas, strict=True)}
    )


def _stages(network: Net) -> list[int]:
    """Where res2 to res5 are among the network's blocks: SlowFast's hold two pathways and the lateral connection."""
    return [
        i for i, block in enumerate(network.blocks) if i > 0 and isinstance(block, (ResStage, MultiPathWayWithFuse))
    ]
