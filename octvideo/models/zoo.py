"""Networks for video recognition: pytorchvideo's builders, octavized."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octvideo.errors import UserError

with warnings.catch_warnings():  # fvcore, below pytorchvideo, still calls torch.jit.script
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from pytorchvideo.models.csn import create_csn
    from pytorchvideo.models.net import MultiPathWayWithFuse, Net
    from pytorchvideo.models.r2plus1d import create_r2plus1d
    from pytorchvideo.models.resnet import ResBlock, ResStage, create_resnet
    from pytorchvideo.models.slowfast import PoolConcatPathway, create_slowfast
    from pytorchvideo.models.x3d import create_x3d
from octvideo.layers.octaves import Octaves
from octvideo.models.octavize import octavize
from octvideo.models.weights import load_weights

DEPTHS = (50, 101, 152)
Alpha = float | Sequence[float] | Mapping[str, float]


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
        # In 32 bits at least: torch's avg_pool3d has no 16 bits on CPUs.
        precise = input if input.dtype in (torch.float32, torch.float64) else input.float()
        return F.avg_pool3d(precise, (frames, *window), 1).to(input.dtype)  # type: ignore[arg-type]


class NonLocalBlock(nn.Module):
    """Adds to every cell what it finds in all others: the embedded Gaussian of Wang et al., CVPR 2018.

    Half the channels; keys and values are max-pooled by 2 in space; the last batch norm starts at 0, so that the block
    starts as the identity. The convolutions may be octave; cells are compared at full resolution.

    Args:
        channels: of the input and the output.

    Shape:
        Input and output: (B, channels, T, H, W) or Octaves of that shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.conv_theta = nn.Conv3d(channels, inner, 1)
        self.conv_phi = nn.Conv3d(channels, inner, 1)
        self.conv_g = nn.Conv3d(channels, inner, 1)
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.norm = nn.BatchNorm3d(channels)
        for convolution in (self.conv_theta, self.conv_phi, self.conv_g, self.conv_out):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        pooled = self.pool(x) if min(x.shape[3:]) > 1 else x
        projections = (self.conv_theta(x), self.conv_phi(pooled), self.conv_g(pooled))
        maps = [y.merge() if isinstance(y, Octaves) else y for y in projections]
        # (B, 1, T H W, C): one head, as ONNX wants to have them.
        queries, keys, values = (y.flatten(2).transpose(1, 2).unsqueeze(1) for y in maps)
        found = F.scaled_dot_product_attention(queries, keys, values).squeeze(1)
        found = found.transpose(1, 2).unflatten(2, maps[0].shape[2:])
        return x + self.norm(self.conv_out(found))  # type: ignore[no-any-return]


class NonLocalResBlock(ResBlock):
    """A residual block with a non-local block behind it, whose own weights keep their names.

    Shape:
        Input and output: (B, C, T, H, W) or Octaves of that shape.
    """

    def __init__(self, block: ResBlock) -> None:
        super().__init__(
            branch1_conv=block.branch1_conv,
            branch1_norm=block.branch1_norm,
            branch2=block.branch2,
            activation=block.activation,
            branch_fusion=block.branch_fusion,
        )
        self.__class__ = NonLocalResBlock  # ResBlock's constructor sets all its local names, __class__ among them
        self.non_local = NonLocalBlock(block.branch2.conv_c.out_channels)

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        return self.non_local(super().forward(x))  # type: ignore[no-any-return]


class PooledPathways(PoolConcatPathway):
    """Pools and concatenates the pathways, and leaves the list of them as it was.

    Shape:
        Input: a list of (B, C_i, T_i, H, W).
        Output: (B, sum of C_i, 1, H', W').
    """

    def __init__(self, retain_list: bool, pool: nn.ModuleList, dim: int) -> None:
        super().__init__(retain_list, pool, dim)
        self.__class__ = PooledPathways  # as NonLocalResBlock

    def forward(self, x: list[Tensor]) -> Tensor:
        return super().forward(list(x))  # type: ignore[no-any-return]


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
        # Blocks that overwrite the list they are given could not be computed again by checkpointing.
        for i, block in enumerate(blocks):
            if isinstance(block, MultiPathWayWithFuse):
                block.inplace = False
            elif isinstance(block, PoolConcatPathway):
                blocks[i] = PooledPathways(block.retain_list, block.pool, block.dim)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        if frames % self.frame_ratio:
            raise UserError(f"SlowFast takes clips of a multiple of {self.frame_ratio} frames, got {frames}")
        slow = torch.linspace(0, frames - 1, frames // self.frame_ratio, device=x.device).long()
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


def c2d_r50_nonlocal(num_classes: int = 400, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> Net:
    """C2D with non-local blocks after res3 blocks 1, 3 and res4 blocks 1, 3, 5 (Wang et al., CVPR 2018)."""
    return _with_non_local(c2d_r50(num_classes, width=width, depth=depth, dropout=dropout))


def i3d_r50_nonlocal(num_classes: int = 400, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> Net:
    """I3D with non-local blocks after res3 blocks 1, 3 and res4 blocks 1, 3, 5 (Wang et al., CVPR 2018)."""
    return _with_non_local(i3d_r50(num_classes, width=width, depth=depth, dropout=dropout))


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


def _with_non_local(network: Net) -> Net:
    """Puts non-local blocks where the paper has them."""
    for stage, after in zip(residual_stages(network)[1:3], ((1, 3), (1, 3, 5)), strict=True):
        blocks = network.blocks[stage].res_blocks
        for i in after:
            blocks[i] = NonLocalResBlock(blocks[i])
    return network


def csn_r101(num_classes: int = 400, *, width: int = 64, depth: int = 101, dropout: float = 0.5) -> Net:
    """CSN, channel-separated: every 3 x 3 x 3 convolution is depthwise (Tran et al., ICCV 2019)."""
    return create_csn(
        model_depth=depth,
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_dim_out=width,
        stem_pool=nn.MaxPool3d,
    )


def r2plus1d_r50(num_classes: int = 400, *, width: int = 64, dropout: float = 0.5) -> Net:
    """R(2+1)D: 3 x 3 x 3 convolutions taken apart into 1 x 3 x 3 and 3 x 1 x 1 (Tran et al., CVPR 2018)."""
    return create_r2plus1d(model_num_class=num_classes, dropout_rate=dropout, stem_dim_out=width)


def x3d_xs(num_classes: int = 400, *, width: int = 24, dropout: float = 0.5) -> Net:
    """X3D-XS for 4 frames of 160 x 160 (Feichtenhofer, CVPR 2020)."""
    return _x3d(num_classes, width, dropout, crop_size=160)


def x3d_s(num_classes: int = 400, *, width: int = 24, dropout: float = 0.5) -> Net:
    """X3D-S for 13 frames of 160 x 160; X3D-XS's network."""
    return _x3d(num_classes, width, dropout, crop_size=160)


def x3d_m(num_classes: int = 400, *, width: int = 24, dropout: float = 0.5) -> Net:
    """X3D-M for 16 frames of 224 x 224; X3D-S's network with a larger window in the head."""
    return _x3d(num_classes, width, dropout, crop_size=224)


def x3d_l(num_classes: int = 400, *, width: int = 24, dropout: float = 0.5) -> Net:
    """X3D-L for 16 frames of 312 x 312; deeper than X3D-M."""
    return _x3d(num_classes, width, dropout, crop_size=312, depth_factor=5.0)


def _x3d(num_classes: int, width: int, dropout: float, *, crop_size: int, depth_factor: float = 2.2) -> Net:
    """An X3D that gives logits; pytorchvideo's ends in a softmax, which training must not see."""
    return create_x3d(
        model_num_class=num_classes,
        dropout_rate=dropout,
        stem_dim_in=width // 2,
        width_factor=2.0,
        depth_factor=depth_factor,
        input_crop_size=crop_size,
        head_activation=None,
    )


MODELS: dict[str, Callable[..., Net]] = {
    "c2d_r50": c2d_r50,
    "c2d_r50_nonlocal": c2d_r50_nonlocal,
    "i3d_r50": i3d_r50,
    "i3d_r50_nonlocal": i3d_r50_nonlocal,
    "slow_r50": slow_r50,
    "slowfast_r50": slowfast_r50,
    "r2plus1d_r50": r2plus1d_r50,
    "csn_r101": csn_r101,
    "x3d_xs": x3d_xs,
    "x3d_s": x3d_s,
    "x3d_m": x3d_m,
    "x3d_l": x3d_l,
}


def create_model(
    name: str,
    *,
    alpha: Alpha = 0.0,
    num_classes: int = 400,
    width: int | None = None,
    depth: int | None = None,
    dropout: float = 0.5,
    frame_ratio: int = 4,
    channel_ratio: int = 8,
    downsample: Literal["conv", "pool"] = "conv",
    channels_last: bool | None = None,
    round_to: int = 1,
    weights: str | Path | None = None,
) -> nn.Module:
    """Builds a network of the zoo, with octave convolutions where alpha is above 0.

    The octave layers follow the paper's layout (section 4.3): stages res2, res3 and res4 with their shortcuts (and
    SlowFast's lateral connections after them, and non-local blocks); stem, res5 and classifier stay vanilla. At alpha 0
    it is pytorchvideo's network with its names, so published checkpoints load. Any crop size and, from 2 frames, any
    clip length works; the last batch norm of a block starts at 0 and the classifier at a standard deviation of 0.01.

    Args:
        name: one of `MODELS`.
        alpha: share of low channels in [0, 1]; or four of them, for res2, res3, res4, res5; or {regex: number} of
            convolutions' names, as `octvideo.models.octavize` takes it, in place of the paper's layout.
        num_classes: size of the output.
        width: channels of the stem. Default: as published, 64 (X3D 24).
        depth: 50, 101 or 152 layers. Default: as the name says; R(2+1)D and X3D have no other.
        dropout: probability before the classifier.
        frame_ratio: SlowFast only; frames of the fast pathway for each one of the slow pathway.
        channel_ratio: SlowFast only; channels of the slow pathway for each one of the fast pathway.
        downsample: "pool" makes res2 to res5 average-pool for a spatial stride at alpha 0 too, as octave networks do:
            the fair control for them; "conv" strides there as published.
        channels_last: lay channels last in memory and run factorised convolutions as 2-D ones: the fast form of any of
            these networks. Default: where an alpha is above 0; else it is bit for bit the published network.
        round_to: rounds the number of low channels of each convolution to a multiple; 16 is faster at alphas such as
            .1, but changes how much is low. See `octvideo.layers.convolution.split_channels`.
        weights: checkpoint to start from, of any kind that `octvideo.models.weights.load_weights` reads.

    Returns:
        A network from clips (B, 3, T, H, W) to logits (B, num_classes).

    Raises:
        ValueError: an unknown name, a number out of its range, or a checkpoint that does not fit.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r}; there are {', '.join(MODELS)}")
    if not isinstance(alpha, Mapping):
        stage_alphas(alpha)  # refuses what is none, before anything is built
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    published = inspect.signature(MODELS[name]).parameters
    if depth is not None and ("depth" not in published or depth not in DEPTHS):
        allowed = f"one of {DEPTHS}" if "depth" in published else f"left out for {name}"
        raise UserError(f"depth must be {allowed}, got {depth}")
    if frame_ratio < 1 or channel_ratio < 1:
        raise UserError(f"frame_ratio and channel_ratio must be at least 1, got {frame_ratio} and {channel_ratio}")
    multiple = channel_ratio if "channel_ratio" in published else 8 if name.startswith("x3d") else 1
    stem = published["width"].default if width is None else width
    if stem < 1 or stem % multiple:
        kind = f"a multiple of {multiple} for {name}" if multiple > 1 else "at least 1"
        raise UserError(f"width must be {kind}, got {stem}")
    options: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "dropout": dropout,
        "frame_ratio": frame_ratio,
        "channel_ratio": channel_ratio,
    }
    given = {key: value for key, value in options.items() if value is not None and key in published}
    network = MODELS[name](num_classes, **given)
    for module in network.modules():
        for child_name, child in module.named_children():
            if type(child) is nn.AvgPool3d:
                setattr(module, child_name, HeadPool(int(child.kernel_size[-1])))  # type: ignore[index]
    if weights is not None:
        load_weights(network, weights)
    # Kept for set_alpha: a convolution at alpha 0 may be vanilla, and then knows no octave option.
    network.octave_options = {"downsample": downsample, "channels_last": channels_last, "round_to": round_to}
    return set_alpha(network, alpha)


def stage_alphas(alpha: float | Sequence[float]) -> tuple[float, float, float, float]:
    """The alphas of res2, res3, res4 and res5: one number is the first three's, and leaves res5 vanilla.

    Raises:
        ValueError: neither one nor four, or one outside [0, 1].
    """
    alphas = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha, alpha, 0.0)
    if len(alphas) != 4:
        raise UserError(f"alpha must be one number or four (res2, res3, res4, res5), got {len(alphas)}: {alphas}")
    if any(not 0 <= value <= 1 for value in alphas):
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")
    return alphas


def set_alpha(network: nn.Module, alpha: Alpha) -> nn.Module:
    """Gives a network another alpha, in place; weights and the other options of `create_model` stay.

    Args:
        network: of `create_model`.
        alpha: as there.

    Returns:
        The same network.

    Raises:
        ValueError: an alpha out of its range or that groups cannot be split at, with the network as it was; a network
            that `create_model` did not build.
    """
    options: Any = getattr(network, "octave_options", None)
    if not isinstance(network, Net) or options is None:
        raise UserError(f"set_alpha takes a network that create_model built, got {type(network).__name__}")
    if isinstance(alpha, Mapping):
        patterns = dict(alpha)
    else:
        stages = zip(residual_stages(network), stage_alphas(alpha), strict=True)
        patterns = {f"^blocks\\.{block}\\.": value for block, value in stages}
    fast = any(patterns.values()) if options["channels_last"] is None else options["channels_last"]
    return octavize(network, patterns, **(options | {"channels_last": fast}))


def residual_stages(network: Net) -> list[int]:
    """Where res2 to res5 are among the network's blocks: SlowFast's hold two pathways and the lateral connection."""
    return [
        i for i, block in enumerate(network.blocks) if i > 0 and isinstance(block, (ResStage, MultiPathWayWithFuse))
    ]
