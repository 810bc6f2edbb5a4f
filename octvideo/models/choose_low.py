"""Order a trained network's channels, so that those which lose least at half resolution come last."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from octvideo.errors import UserError
from octvideo.layers.convolution import Octave
from octvideo.layers.resampling import average_pool, upsample
from octvideo.models.channels import Channels
from octvideo.models.octavize import Network

Clips = Tensor | tuple[Any, ...]
PROBES = 4  # random directions along which the change of the outputs is measured
ROUNDING = 2e4  # times the epsilon of the dtype: relative change that other orders of summation may make


def choose_low(network: Network, clips: Tensor | Iterable[Clips], *, temporal: bool = False) -> Network:
    """Permutes the channels of a trained vanilla network in place, so that the last ones are the best to halve.

    Octave layers hold the last channels of a feature map at half resolution, but training leaves channels in any
    order. Here they are sorted by how much the outputs change, to first order and on these clips, where the channel is
    average-pooled and upsampled again. What writes, normalizes and reads a channel is permuted alike, so the network
    computes what it did, up to rounding. Call it once, then `octavize` at any alpha.

    Channels tied by sums, gates or depthwise convolutions move together. Those of inputs and outputs, those that a
    grouped convolution reads, and those in functions that may not treat channels alike stay in place.

    Args:
        network: trained and vanilla, or pooled at alpha 0; run in eval mode, and left in its own.
        clips: one batch, or an iterable of batches; a batch that is a tuple holds several arguments. 50 samples are
            plenty. All activations of a batch are kept for the gradient, so small batches save memory.
        temporal: for `octavize(..., temporal=True)`: halve time too.

    Raises UserError, with the weights as they were, for octave networks, no clips, outputs without a gradient,
    parameters that eval mode does not use (they might read channels that move), and if the outputs do change.
    """
    if any(isinstance(module, Octave) and module.alpha for module in network.modules()):
        raise UserError("choose_low takes a vanilla network: call it before octavize, or after octavize(network, 0)")
    batches = iter((clips,) if isinstance(clips, Tensor) else clips)
    if (first := next(batches, None)) is None:
        raise UserError("choose_low needs at least one batch of clips")
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        channels = Channels(network)
        with torch.no_grad(), channels:
            before = _outputs(network, first)
            for output in before:
                channels.pin(output)
        channels.check_all_used()
        costs = [cost for batch in (first, *batches) for cost in _costs(network, batch, temporal)]
        undo = channels.permute(channels.permutation(costs))
        with torch.no_grad():
            after = _outputs(network, first)
        if not all(_same(*pair) for pair in zip(before, after, strict=True)):
            undo()
            raise UserError(f"choose_low does not understand how {type(network).__name__} uses its channels: unchanged")
    finally:
        for module in training:
            module.training = True
    return network


def _outputs(network: nn.Module, clips: Clips) -> list[Tensor]:
    output = network(*clips) if isinstance(clips, tuple) else network(clips)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _same(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or not before.is_floating_point():
        return torch.equal(before, after)
    bound = ROUNDING * torch.finfo(before.dtype).eps * before.abs().max() if before.numel() else 0
    return bool(((after - before).abs() <= bound).all())


def _costs(network: nn.Module, clips: Clips, temporal: bool) -> list[tuple[Tensor, int, Tensor]]:
    """Weights of convolutions, each with the dimension of its output channels and their effects on the outputs.

    The effect is the mean square, over random projections of the outputs, of the derivative in the direction of a
    channel's pooling error: the trace of a Gauss-Newton matrix.
    """
    strengths: list[tuple[Any, Tensor]] = []

    def weaken(module: Any, inputs: Any, output: Tensor) -> Tensor:
        factors = (2,) * (output.dim() - 2) if temporal or output.dim() == 4 else (1, 2, 2)
        with torch.no_grad():
            lost = output - upsample(average_pool(output, factors), output.shape[2:])
        strength = torch.zeros((*output.shape[:2], *(1,) * len(factors)), dtype=output.dtype, device=output.device)
        strengths.append((module, strength.requires_grad_()))
        return output + strength * lost

    convolutions = [m for m in network.modules() if isinstance(m, _ConvNd) and "weight" in m._parameters]
    hooks = [m.register_forward_hook(weaken) for m in convolutions if len(m.kernel_size) > 1]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    with torch.enable_grad(), allow_mutation_on_saved_tensors():  # networks for inference alone write where they like
        try:
            outputs = [output for output in _outputs(network, clips) if output.requires_grad]
        finally:
            for hook in hooks:
                hook.remove()
        if not outputs or not strengths:
            raise UserError("choose_low needs 2-D or 3-D convolutions and outputs with a gradient")
        effects = [torch.zeros(strength.shape[1], dtype=torch.float64) for _, strength in strengths]
        for _ in range(PROBES):
            directions = [draw(output.shape).to(output) for output in outputs]
            found = torch.autograd.grad(outputs, [s for _, s in strengths], directions, True, allow_unused=True)
            for effect, gradient in zip(effects, found, strict=True):
                if gradient is not None:
                    effect += gradient.flatten(1).square().sum(0).cpu().double()
    modules = (module for module, _ in strengths)
    return [(m.weight, int(isinstance(m, _ConvTransposeNd)), e) for m, e in zip(modules, effects, strict=True)]
