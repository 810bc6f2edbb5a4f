"""The zoo: pytorchvideo's networks for video recognition, octavized."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from octvideo.errors import UserError

with warnings.catch_warnings():  # fvcore, below pytorchvideo, still calls torch.jit.script
    warnings.simplefilter("ignore")
    from pytorchvideo.models.csn import create_csn
    from pytorchvideo.models.net import MultiPathWayWithFuse, Net
    from pytorchvideo.models.r2plus1d import create_r2plus1d
    from pytorchvideo.models.resnet import ResBlock, ResStage, create_resnet
    from pytorchvideo.models.slowfast import PoolConcatPathway, create_slowfast
    from pytorchvideo.models.x3d import ProjectedPool, create_x3d
from octvideo.layers.octaves import Octaves
from octvideo.layers.shares import Shares, shares_of
from octvideo.layers.swapping import swap_class
from octvideo.layers.tracing import OneNode
from octvideo.models.octavize import octavize
from octvideo.models.published import published_folder
from octvideo.models.weights import load_weights

Alpha = float | Sequence[float | Sequence[float]] | Mapping[str, float | Sequence[float]]


class HeadPool(OneNode, nn.AvgPool3d):
    """A published head's average pooling, of any size of map: all frames, and a window or the smaller map it meets.

    (B, C, T, H, W) becomes (B, C, 1, max(1, H - window + 1), max(1, W - window + 1)), which the head averages. Octaves
    become (B, C, 1, 1, 1), and so do exported maps whose head is `linear`.
    """

    def __init__(self, window: int = 7, linear: bool = False) -> None:
        super().__init__(window, stride=1)
        self.window, self.linear = window, linear

    def forward(self, input: Tensor | Octaves) -> Tensor:
        if isinstance(input, Proxy):
            return self._node(input)
        frames, *extent = input.shape[2:]
        # In 32 bits at least: torch's avg_pool3d has no 16 bits on CPUs.
        precise: Any = input if input.dtype in (torch.float32, torch.float64) else input.float()
        if isinstance(input, Octaves):
            return F.adaptive_avg_pool3d(precise, 1).to(input.dtype)
        if torch.compiler.is_exporting():  # it fixes the windows of pools
            precise, frames = precise.mean(2, keepdim=True), 1
            if self.linear:
                return self._mean_of_windows(self._mean_of_windows(precise, 3), 4).to(input.dtype)
        window = [min(self.window, size) for size in extent]
        return F.avg_pool3d(precise, (frames, *window), 1).to(input.dtype)

    def _mean_of_windows(self, x: Tensor, dim: int) -> Tensor:
        """The mean over all windows of a dimension, which is all that a linear head makes of them."""
        position = torch.arange(x.shape[dim], device=x.device)
        windows = torch.minimum(position, position.flip(0)) + 1  # that hold a position, unless all windows are fewer
        windows = torch.minimum(windows, (position[-1:] + 2 - self.window).clamp(1, self.window))
        weights = (windows / windows.sum()).to(x.dtype)
        return (x * weights.view(-1, *(1,) * (4 - dim))).sum(dim, keepdim=True)


class NonLocalBlock(OneNode):
    """Adds to every position of (B, channels, T, H, W) what it finds at all others (Wang et al., CVPR 2018).

    The embedded Gaussian with half the channels; keys and values are max-pooled by 2 in space. The convolutions may be
    octave; positions are compared at full resolution. The last batch norm starts at 0, and the block as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.conv_theta, self.conv_phi, self.conv_g = (nn.Conv3d(channels, inner, 1) for _ in range(3))
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.norm = nn.BatchNorm3d(channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for convolution in (self.conv_theta, self.conv_phi, self.conv_g, self.conv_out):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        if isinstance(x, Proxy):
            return self._node(x)
        pooled = self.pool(x) if min(x.shape[3:]) > 1 else x
        projections = (self.conv_theta(x), self.conv_phi(pooled), self.conv_g(pooled))
        maps = [y.merge() if isinstance(y, Octaves) else y for y in projections]
        # (B, 1, T H W, C): one head, in ONNX's form.
        queries, keys, values = (y.flatten(2).transpose(1, 2).unsqueeze(1) for y in maps)
        found = F.scaled_dot_product_attention(queries, keys, values).squeeze(1)
        found = found.transpose(1, 2).unflatten(2, maps[0].shape[2:])
        output: Tensor | Octaves = x + self.norm(self.conv_out(found))
        return output


class NonLocalResBlock(ResBlock):
    """A residual block that was given a non-local block to follow it; its own weights keep their names."""

    def forward(self, x: Tensor | Octaves) -> Tensor | Octaves:
        output: Tensor | Octaves = self.non_local(super().forward(x))
        return output


class PooledPathways(PoolConcatPathway):
    """Pools and concatenates the pathways, and leaves the list of them as it was."""

    def forward(self, x: list[Tensor]) -> Tensor:
        output: Tensor = super().forward([x[pathway] for pathway in range(len(self.pool))])  # torch.fx cannot iterate x
        return output


@torch.fx.wrap  # one node of torch.fx's graphs
def slow_frames(x: Tensor, frame_ratio: int) -> Tensor:
    """One of `frame_ratio` frames of clips (B, C, T, H, W), from first to last."""
    frames = x.shape[2]
    if frames % frame_ratio:
        raise UserError(f"SlowFast takes clips of a multiple of {frame_ratio} frames, got {frames}")
    slow = frames // frame_ratio
    return x.index_select(2, torch.arange(slow, device=x.device) * (frames - 1) // max(slow - 1, 1))


class SlowFast(Net):
    """A SlowFast network of one clip, whose slow pathway sees one of `frame_ratio` frames, from first to last."""

    def __init__(self, blocks: nn.ModuleList, frame_ratio: int) -> None:
        super().__init__(blocks=blocks)
        self.frame_ratio = frame_ratio
        for block in blocks:  # those that overwrite the list they are given could not be computed again
            if isinstance(block, MultiPathWayWithFuse):
                block.inplace = False
            elif isinstance(block, PoolConcatPathway):
                swap_class(block, PooledPathways)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward([slow_frames(x, self.frame_ratio), x])
        return logits


def _resnet(*kernels: Sequence[int], non_local: bool = False, width: int = 64, depth: int = 50, **options: Any) -> Net:
    """A video ResNet; `kernels`: frames of the kernels of the stem and, in turn, of each stage's blocks."""
    network = create_resnet(
        model_depth=depth,
        stem_dim_out=width,
        stem_conv_kernel_size=(*kernels[0], 7, 7),
        stage_conv_a_kernel_size=tuple([(frames, 1, 1) for frames in stage] for stage in kernels[1:]),
        **options,
    )
    for stage, i in ((3, 1), (3, 3), (4, 1), (4, 3), (4, 5)) if non_local else ():  # in res3 and res4
        block = network.blocks[stage].res_blocks[i]
        block.non_local = NonLocalBlock(block.branch2.conv_c.out_channels)
        swap_class(block, NonLocalResBlock)
    return network


def _slowfast(*, frame_ratio: int, channel_ratio: int, width: int = 64, depth: int = 50, **options: Any) -> SlowFast:
    network = create_slowfast(
        slowfast_channel_reduction_ratio=(channel_ratio,),
        slowfast_fusion_conv_kernel_size=(7, 1, 1),
        slowfast_fusion_conv_stride=(frame_ratio, 1, 1),
        model_depth=depth,
        stem_dim_outs=(width, width // channel_ratio),
        **options,
    )
    return SlowFast(network.blocks, frame_ratio)


def _csn(*, width: int = 64, depth: int = 101, **options: Any) -> Net:
    return create_csn(model_depth=depth, stem_dim_out=width, stem_pool=nn.MaxPool3d, **options)


def _r2plus1d(*, width: int = 64, **options: Any) -> Net:
    return create_r2plus1d(stem_dim_out=width, head_activation=None, **options)  # by default it ends in a softmax


def _x3d(*, crop_size: int, width: int = 24, depth_factor: float = 2.2, **options: Any) -> Net:
    """An X3D that gives logits; pytorchvideo's ends in a softmax, which training must not see."""
    factors = {"width_factor": 2.0, "depth_factor": depth_factor}
    return create_x3d(stem_dim_in=width // 2, input_crop_size=crop_size, head_activation=None, **factors, **options)


_c2d = partial(_resnet, (1,), (1,), (1,), (1,), (1,), stage1_pool=nn.MaxPool3d)
_i3d = partial(_resnet, (5,), (3,), (3, 1), (3, 1), (1, 3), stage1_pool=nn.MaxPool3d)
# A builder takes `width`, which has a default, `model_num_class`, `dropout_rate` and, if there is a choice, `depth`;
# it hands other keywords to pytorchvideo. It returns a Net that gives logits and has four residual stages.
MODELS: dict[str, Callable[..., Net]] = {
    # C2D sees each frame by itself; I3D has temporal kernels of 3 in every second block (Wang et al., CVPR 2018).
    "c2d_r50": _c2d,
    "c2d_r50_nonlocal": partial(_c2d, non_local=True),
    "i3d_r50": _i3d,
    "i3d_r50_nonlocal": partial(_i3d, non_local=True),
    # A wide network on few frames, alone and joined by a thin one on many (Feichtenhofer et al., ICCV 2019).
    "slow_r50": partial(_resnet, (1,), (1,), (1,), (3,), (3,)),
    "slowfast_r50": _slowfast,
    # 3 x 3 x 3 convolutions factorised into 1 x 3 x 3 and 3 x 1 x 1, or depthwise (Tran et al., CVPR 2018, ICCV 2019).
    "r2plus1d_r50": _r2plus1d,
    "csn_r101": _csn,
    # For 4 and 13 frames of 160 x 160, 16 of 224 x 224 and 16 of 312 x 312 (Feichtenhofer, CVPR 2020).
    "x3d_xs": partial(_x3d, crop_size=160),
    "x3d_s": partial(_x3d, crop_size=160),
    "x3d_m": partial(_x3d, crop_size=224),
    "x3d_l": partial(_x3d, crop_size=312, depth_factor=5.0),
}


def create_model(
    name: str,
    *,
    alpha: Alpha | None = None,
    num_classes: int | None = None,
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
    """Builds a network from clips (B, 3, T, H, W) to logits (B, num_classes), octave where alpha is above 0.

    The layout is the paper's (section 4.3): res2, res3 and res4 are octave, with their shortcuts, non-local blocks and
    SlowFast's lateral connections after them; stem, res5 and classifier are vanilla. At alpha 0 it is pytorchvideo's
    network with its names, so published checkpoints load. Any crop size and, from 2 frames, any clip length works.

    Args:
        name: network: c2d_r50, c2d_r50_nonlocal, i3d_r50, i3d_r50_nonlocal, slow_r50, slowfast_r50, r2plus1d_r50,
            csn_r101, x3d_xs, x3d_s, x3d_m or x3d_l. Or a folder that `octvideo push` wrote, or a repository of the hub
            as "user/name": that network with its weights, in evaluation mode; of the options it takes alpha alone.
        alpha: share of channels at low resolution in res2, res3 and res4, from 0 to 1; or four shares, for res2 to
            res5; or {regex: share}, where the first regex found in a convolution's name decides; default: 0, or as
            published. Each of the four, and of the mapping's, may be several shares: at half the resolution, a quarter.
        num_classes: number of classes; default: 400, or as published.
        width: channels of the stem; default: as published, 24 for X3D and 64 for the others.
        depth: 50, 101 or 152 layers; default: as the name says. R(2+1)D and X3D have no choice.
        dropout: dropout probability before the classifier.
        frame_ratio: SlowFast only: frames of the fast pathway for each frame of the slow pathway.
        channel_ratio: SlowFast only: channels of the slow pathway for each channel of the fast pathway.
        downsample: what a spatial stride of 2 does in res2 to res5 at alpha 0: "conv" strides as published, "pool"
            averages first, as octave convolutions do: the fair baseline for an octave network.
        channels_last: use the channels_last memory format and run factorised convolutions as 2-D ones, which is faster
            and equal up to rounding; default: if any alpha is above 0.
        round_to: round each convolution's low channels to a multiple of this; 16 is faster at alphas such as 0.1.
        weights: a checkpoint of octvideo, pytorchvideo, PySlowFast or a 2-D ResNet; for other classes the head is new.

    Raises UserError for an unknown name, a number out of its range, or a checkpoint that does not fit.
    """
    given = {key for key, value in locals().items() if key not in ("name", "alpha") and value != DEFAULTS[key]}
    if name not in MODELS:
        if published_folder(name) is None:
            raise UserError(f"no model {name!r}; there are {', '.join(MODELS)}")
        if given:
            raise UserError(f"{name} is published: it takes no option but alpha, got {', '.join(sorted(given))}")
        from octvideo.models.checkpoint import load_trained  # which builds networks with this function

        return load_trained(name, alpha).network
    num_classes = 400 if num_classes is None else num_classes
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    known = inspect.signature(MODELS[name]).parameters
    if depth is not None and ("depth" not in known or depth not in (50, 101, 152)):
        allowed = "one of (50, 101, 152)" if "depth" in known else f"left out for {name}"
        raise UserError(f"depth must be {allowed}, got {depth}")
    if min(frame_ratio, channel_ratio) < 1:
        raise UserError(f"frame_ratio and channel_ratio must be at least 1, got {frame_ratio} and {channel_ratio}")
    width = known["width"].default if width is None else width
    multiple = channel_ratio if "channel_ratio" in known else 8 if name.startswith("x3d") else 1
    if width < 1 or width % multiple:
        kind = f"a multiple of {multiple} for {name}" if multiple > 1 else "at least 1"
        raise UserError(f"width must be {kind}, got {width}")
    options = {"width": width, "depth": depth, "frame_ratio": frame_ratio, "channel_ratio": channel_ratio}
    options = {key: value for key, value in options.items() if key in known and value is not None}
    network = MODELS[name](**options, model_num_class=num_classes, dropout_rate=dropout)
    for module in network.modules():
        for child_name, child in module.named_children():
            if type(child) is nn.AvgPool3d:
                window: Any = child.kernel_size
                setattr(module, child_name, HeadPool(int(window[-1]), linear=not isinstance(module, ProjectedPool)))
    if weights is not None:
        load_weights(network, weights)
    # Kept for set_alpha: a convolution at alpha 0 may be vanilla, and then knows no octave option.
    network.octave_options = {"downsample": downsample, "channels_last": channels_last, "round_to": round_to}
    return set_alpha(network, 0.0 if alpha is None else alpha)


DEFAULTS: Mapping[str, Any] = create_model.__kwdefaults__ or {}


def stage_alphas(alpha: float | Sequence[float | Sequence[float]]) -> tuple[Shares, ...]:
    """The alphas of res2 to res5, from those or from one for res2 to res4; UserError for others, or outside [0, 1]."""
    alphas = tuple(alpha) if isinstance(alpha, Sequence) else (alpha, alpha, alpha, 0.0)
    if len(alphas) != 4:
        raise UserError(f"alpha must be one number or four (res2, res3, res4, res5), got {len(alphas)}: {alphas}")
    return tuple(map(shares_of, alphas))


def set_alpha(network: nn.Module, alpha: Alpha) -> nn.Module:
    """Gives a network of `create_model` or `adapt` another alpha, in place; UserError, and no change, if impossible.

    One that was trained elastically (`octvideo.models.elastic`) gets the batch-norm statistics of that alpha too.
    """
    given = alpha
    options: Any = getattr(network, "octave_options", None)
    if options is None:
        raise UserError(f"set_alpha takes a network that create_model built, got {type(network).__name__}")
    if not isinstance(alpha, Mapping) and isinstance(network, Net):
        stages = zip(residual_stages(network), stage_alphas(alpha), strict=True)
        alpha = {f"^blocks\\.{block}\\.": value for block, value in stages}
    if isinstance(alpha, Sequence):
        raise UserError(f"four alphas, of res2 to res5, are for the zoo's networks, not for {type(network).__name__}")
    shares = map(shares_of, alpha.values() if isinstance(alpha, Mapping) else [alpha])
    fast = any(shares) if options["channels_last"] is None else options["channels_last"]
    octavize(network, alpha, **(options | {"channels_last": fast}))
    if (statistics := network.__dict__.get("alpha_statistics")) is not None:
        statistics.give(network, given)
    return network


def octave_stages(network: nn.Module) -> list[nn.Module]:
    """res2, res3 and res4 of a network of the zoo, which one alpha makes octave; nothing of another network."""
    return [network.blocks[i] for i in residual_stages(network)[:3]] if isinstance(network, Net) else []


def residual_stages(network: Net) -> list[int]:
    """The indices of res2 to res5 among the network's blocks; SlowFast's hold two pathways and what joins them."""
    stages = (ResStage, MultiPathWayWithFuse)
    return [i for i, block in enumerate(network.blocks) if i > 0 and isinstance(block, stages)]
