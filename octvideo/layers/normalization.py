"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from octvideo.errors import UserError
from octvideo.layers.octaves import Octaves, normalize_maps
from octvideo.layers.resampling import keep_layout

_plain_sync_forward = nn.SyncBatchNorm.forward


def _sync_forward(self: nn.SyncBatchNorm, input: Tensor | Octaves) -> Tensor | Octaves:
    """nn.SyncBatchNorm's forward, on octave features too, and on CPUs, which torch's own refuses.

    Its autograd function takes plain Tensors only and bypasses __torch_function__, hence this door.
    """
    syncs = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not syncs or (isinstance(input, Tensor) and input.device.type != "cpu"):
        return _plain_sync_forward(self, input)  # type: ignore[arg-type]
    momentum = self.momentum
    if self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if momentum is None else momentum
    group = self.process_group or torch.distributed.group.WORLD

    def norm(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Any,
    ) -> Tensor:
        if x.device.type != "cpu":
            world_size = torch.distributed.get_world_size(group)
            return FusedSyncBatchNorm.apply(  # type: ignore[no-any-return]
                x, weight, bias, running_mean, running_var, self.eps, momentum, group, world_size
            )
        return _synced_norm(x, running_mean, running_var, weight, bias, momentum or 0.0, self.eps, group)

    statistics = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
    arguments = (*statistics, self.weight, self.bias)
    return normalize_maps(norm, input, *arguments) if isinstance(input, Octaves) else norm(input, *arguments)


def _synced_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """Batch norm with the statistics of all processes' batches, in differentiable steps."""
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    cells = [dim for dim in range(x.dim()) if dim != 1]
    per_channel = (1, -1, *(1,) * (x.dim() - 2))
    count = values.new_full((1,), x.numel() // x.shape[1])
    *_, count = totals = all_reduce(torch.cat((values.sum(cells), count)), group=group)
    mean = totals[:-1] / count
    centred = values - mean.view(per_channel)
    var = all_reduce(centred.square().sum(cells), group=group) / count
    y = centred * (var + eps).rsqrt().view(per_channel)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype)


nn.SyncBatchNorm.forward = _sync_forward  # type: ignore[method-assign, assignment]
Kind = Literal["batch", "sync", "sub", "frozen"]
Network = TypeVar("Network", bound=nn.Module)


class SyncedBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all processes' batches; outside of a process group it is the plain one.

    It has the forward pass of nn.SyncBatchNorm (fused on GPUs, our own on CPUs), but is no instance of it:
    DistributedDataParallel refuses those on CPUs.

    Shape:
        Input and output: (B, C, ...) or Octaves of that shape.
    """

    process_group: Any = None
    forward = nn.SyncBatchNorm.forward
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels


class SubBatchNorm(_BatchNorm):
    """Batch norm that, in training, normalises equal parts of a batch by their own statistics.

    Long or small clips let more of them into a batch; parts keep the noise of the statistics, which regularises, as it
    is (Wu et al., "A Multigrid Method for Efficiently Training Video Models", CVPR 2020). The running statistics move
    as if the parts were batches that come one after the other.

    Attributes:
        splits: number of parts; torch.chunk cuts a batch that it does not divide. It may change at any time.

    Shape:
        Input and output: (B, C, ...) or Octaves of that shape.
    """

    splits: int
    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, input: Tensor | Octaves) -> Tensor | Octaves:  # type: ignore[override]
        """Normalises."""
        normalize_part: Callable[[Any], Any] = super().forward
        if not self.training or self.splits == 1:
            return normalize_part(input)  # type: ignore[no-any-return]
        if not isinstance(input, Octaves):
            return keep_layout(torch.cat([normalize_part(part) for part in input.chunk(self.splits)]), input)
        pairs = zip(input.high.chunk(self.splits), input.low.chunk(self.splits), strict=True)
        parts = [normalize_part(Octaves(high, low, input.parts)) for high, low in pairs]
        high = keep_layout(torch.cat([part.high for part in parts]), input.high)
        low = keep_layout(torch.cat([part.low for part in parts]), input.low)
        return Octaves(high, low, input.parts)


class FrozenBatchNorm(_BatchNorm):
    """Batch norm that stays as it is: never in training mode, its weight and bias without gradients.

    Shape:
        Input and output: (B, C, ...) or Octaves of that shape.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stays in evaluation mode, and notes the mode for a later thaw."""
        self._thawed_mode = mode
        return super().train(False)


_KINDS: dict[str, type[_BatchNorm] | None] = {
    "batch": None,
    "sync": SyncedBatchNorm,
    "sub": SubBatchNorm,
    "frozen": FrozenBatchNorm,
}


def normalize(model: Network, kind: Kind, splits: int = 1) -> Network:
    """Exchanges every batch norm of a network, in place; names, weights, statistics and state_dict stay.

    Calling it again with another kind exchanges them again.

    Args:
        model: any network; a batch norm is an nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm.
        kind: "batch" for the batch norms that the network came with; "sync" for statistics of all processes' batches;
            "sub" for those of parts of a batch (`SubBatchNorm`); "frozen" for no training at all.
        splits: of a batch, for "sub"; to change it later, set the modules' attribute.

    Returns:
        The same network.

    Raises:
        ValueError: an unknown kind; splits below 1, or above 1 for another kind than "sub"; a batch norm that
            normalises in its own way, or one to be frozen that has no running statistics.
    """
    if kind not in _KINDS:
        raise UserError(f"the normalization must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if splits < 1 or (splits > 1 and kind != "sub"):
        raise UserError(f'splits must be at least 1, and 1 for another kind than "sub", got {splits} for "{kind}"')
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    own = (SyncedBatchNorm, SubBatchNorm, FrozenBatchNorm)
    for name, module in norms.items():  # before anything changes
        known = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if not isinstance(module, own) and type(module).forward not in known:
            raise UserError(
                f"{name or 'the model'} is a {type(module).__name__}, which normalises in its own way and cannot be "
                "exchanged"
            )
        if kind == "frozen" and module.running_mean is None:
            raise UserError(f"{name or 'the model'} has no running statistics, so it cannot be frozen")
    for module in norms.values():
        _exchange(module, _KINDS[kind], splits)
    return model


def _exchange(module: Any, kind: type[_BatchNorm] | None, splits: int) -> None:
    if isinstance(module, FrozenBatchNorm) and kind is not FrozenBatchNorm:
        module.training = module.__dict__.pop("_thawed_mode")
        for parameter, trained in zip(module.parameters(), module.__dict__.pop("_trained"), strict=True):
            parameter.requires_grad = trained
    elif kind is FrozenBatchNorm and not isinstance(module, FrozenBatchNorm):
        module._trained = [parameter.requires_grad for parameter in module.parameters()]
        module._thawed_mode = module.training
        module.requires_grad_(False)
        module.training = False
    module.__dict__.pop("splits", None)
    vanilla = module.__dict__.pop("_vanilla_norm", type(module))
    if kind is not None:
        module._vanilla_norm = vanilla
    if kind is SubBatchNorm:
        module.splits = splits
    module.__class__ = kind or vanilla
