"""Networks whose clips are changed first: what of the accuracy is from the order of frames, from several of them, and
from fine detail. For `model.network`, such as

octvideo train --cfg configs/hard_motions.yaml --model.network controls.Shuffled
    --model.network.network octvideo.models.zoo.create_model --model.network.network.name i3d_r50 ...
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Changed(nn.Module):
    """A network on changed clips (B, 3, T, H, W), in training and in tests."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def change(self, clips: Tensor) -> Tensor:
        """The clips that the network gets."""
        raise NotImplementedError

    def forward(self, clips: Tensor) -> Tensor:
        """What the network gives."""
        found: Tensor = self.network(self.change(clips))
        return found


class Shuffled(Changed):
    """The frames of each clip in an order of its own."""

    def change(self, clips: Tensor) -> Tensor:
        """Draws orders from torch's generator in training; in tests they are always the same."""
        generator = None if self.training else torch.Generator().manual_seed(0)
        ranks = torch.rand(clips.shape[0], clips.shape[2], generator=generator)
        order = ranks.argsort(1).to(clips.device)[:, None, :, None, None]
        return clips.gather(2, order.expand_as(clips))


class Still(Changed):
    """The middle frame of each clip, as many times as there were frames."""

    def change(self, clips: Tensor) -> Tensor:
        """Repeats it."""
        middle = clips.shape[2] // 2
        return clips[:, :, middle : middle + 1].expand_as(clips)


class Blurred(Changed):
    """Clips of half the resolution, pooled and upsampled as the low maps of octaves are."""

    def change(self, clips: Tensor) -> Tensor:
        """Pools by two in height and width."""
        low = F.avg_pool3d(clips, (1, 2, 2), ceil_mode=True, count_include_pad=False)
        return F.interpolate(low, scale_factor=(1, 2, 2))[..., : clips.shape[3], : clips.shape[4]]
