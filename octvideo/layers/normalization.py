"""Batch norms of other kinds (synchronised, of sub-batches, frozen), in place, and nn.SyncBatchNorm on octaves."""

from typing import Any, Literal, Self, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.errors import UserError
from octvideo.layers.functions import normalize_maps
from octvideo.layers.octaves import Octaves
from octvideo.layers.resampling import keep_layout
from octvideo.layers.swapping import original_class, swap_class

Kind = Literal["batch", "sync", "sub", "frozen"]
Network = TypeVar("Network", bound=nn.Module)
_plain_sync_forward: Any = nn.SyncBatchNorm.forward


def _sync_forward(self: Any, input: Tensor | Octaves) -> Any:
    """nn.SyncBatchNorm's forward, also on CPUs and octave features: torch's own refuses both."""
    syncs = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not syncs or (isinstance(input, Tensor) and input.device.type != "cpu"):
        return _plain_sync_forward(self, input)
    momentum, statistics = self.momentum, (None, None)
    if self.track_running_stats:
        statistics = (self.running_mean, self.running_var)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if momentum is None else momentum
    numbers = (self.eps, momentum or 0.0, self.process_group or torch.distributed.group.WORLD)
    arguments: Any = (input, *statistics, self.weight, self.bias, *numbers)
    return normalize_maps(_synced_norm, *arguments) if isinstance(input, Octaves) else _synced_norm(*arguments)


def _synced_norm(
    x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float, momentum: float, group: Any
) -> Any:
    """Batch norm with the statistics of all processes' batches; on CPUs in differentiable steps."""
    if x.device.type != "cpu":
        world_size = torch.distributed.get_world_size(group)
        return FusedSyncBatchNorm.apply(x, weight, bias, mean, var, eps, momentum, group, world_size)
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    positions = [dim for dim in range(x.dim()) if dim != 1]
    per_channel = (1, -1, *(1,) * (x.dim() - 2))
    count = values.new_full((1,), x.numel() // x.shape[1])
    *_, count = totals = all_reduce(torch.cat((values.sum(positions), count)), group=group)
    batch_mean = totals[:-1] / count
    centred = values - batch_mean.view(per_channel)
    batch_var = all_reduce(centred.square().sum(positions), group=group) / count
    y = centred * (batch_var + eps).rsqrt().view(per_channel)
    if mean is not None:
        with torch.no_grad():
            mean.lerp_(batch_mean.to(mean.dtype), momentum)
            var.lerp_((batch_var * count / (count - 1)).to(var.dtype), momentum)
    y = y if weight is None else y * weight.view(per_channel)
    y = y if bias is None else y + bias.view(per_channel)
    return y.to(x.dtype)


nn.SyncBatchNorm.forward = _sync_forward  # type: ignore[method-assign]


class SyncedBatchNorm(_BatchNorm):
    """Batch norm of (B, C, ...) or Octaves with all processes' statistics; the plain one outside of a process group.

    It is no instance of nn.SyncBatchNorm, whose forward it has: DistributedDataParallel refuses those on CPUs.
    """

    process_group: Any = None
    forward = nn.SyncBatchNorm.forward
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels


class SubBatchNorm(_BatchNorm):
    """Batch norm of (B, C, ...) or Octaves that, in training, normalises parts of a batch by their own statistics.

    Short or small clips let more of them into a batch; parts keep the noise of the statistics, which regularises, as it
    is (Wu et al., "A Multigrid Method for Efficiently Training Video Models", CVPR 2020). The running statistics move
    as if the parts were successive batches.
    """

    splits: int  # number of parts, which may change at any time; torch.chunk cuts a batch that it does not divide
    clips_per_part: int | None  # replaces `splits` by len(input) // clips_per_part, or 1
    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, input: Any) -> Any:
        normalize_part: Any = super().forward
        splits = max(1, input.shape[0] // self.clips_per_part) if self.clips_per_part else self.splits
        if not self.training or splits == 1:
            return normalize_part(input)
        if not isinstance(input, Octaves):
            return keep_layout(torch.cat([normalize_part(part) for part in input.chunk(splits)]), input)
        pairs = zip(input.high.chunk(splits), input.low.chunk(splits), strict=True)
        parts = [normalize_part(Octaves(high, low, input.parts)) for high, low in pairs]
        whole: Any = torch.cat(parts)
        high, low = (keep_layout(y, x) for y, x in zip(whole, input, strict=True))
        return whole.of(high, low)


class FrozenBatchNorm(_BatchNorm):
    """Batch norm of (B, C, ...) that never trains: in evaluation mode, its weight and bias without gradients."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def train(self, mode: bool = True) -> Self:
        self._thawed_mode = mode
        return super().train(False)


def normalize(model: Network, kind: Kind, splits: int = 1, clips_per_part: int | None = None) -> Network:
    """Replaces every batch norm of a network, in place, as often as you like; names, weights and statistics stay.

    The kinds: "batch" for the batch norms that the network came with, "sync" for statistics of all processes' batches,
    "sub" for those of parts of a batch (see `SubBatchNorm`: `splits`, `clips_per_part`), "frozen" for no training.
    Raises UserError for arguments that do not fit each other, or a batch norm that the kind cannot replace.
    """
    if kind not in get_args(Kind):
        raise UserError(f"the normalization must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    for name, value in (("splits", splits), ("clips_per_part", clips_per_part)):
        if value is not None and (value < 1 or (value > 1 and kind != "sub")):
            raise UserError(f'{name} must be at least 1, and 1 for another kind than "sub", got {value} for "{kind}"')
    norms = [(name or "the model", norm) for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)]
    for name, norm in norms:  # before anything changes
        if kind != "batch" and type(norm).forward not in (
            _BatchNorm.forward,
            nn.SyncBatchNorm.forward,
            SubBatchNorm.forward,
        ):
            what = f"{name} is a {type(norm).__name__}"
            raise UserError(f"{what}, which normalises in its own way and cannot be replaced")
        if kind == "frozen" and norm.running_mean is None:
            raise UserError(f"{name} has no running statistics, so it cannot be frozen")
    kinds = {"sync": SyncedBatchNorm, "sub": SubBatchNorm, "frozen": FrozenBatchNorm}
    for _, norm in norms:
        state: dict[str, Any] = norm.__dict__
        for attribute in ("splits", "clips_per_part"):
            state.pop(attribute, None)
        if kind == "frozen" and not isinstance(norm, FrozenBatchNorm):
            state["_trained"] = [parameter.requires_grad for parameter in norm.parameters()]
            state["_thawed_mode"], norm.training = norm.training, False
            norm.requires_grad_(False)
        elif kind != "frozen" and isinstance(norm, FrozenBatchNorm):
            norm.training = state.pop("_thawed_mode")
            for parameter, trained in zip(norm.parameters(), state.pop("_trained"), strict=True):
                parameter.requires_grad = trained
        swap_class(norm, kinds.get(kind, original_class(norm)))
        if isinstance(norm, SubBatchNorm):
            norm.splits, norm.clips_per_part = splits, clips_per_part
    return model
