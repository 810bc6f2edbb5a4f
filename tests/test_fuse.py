"""The form for inference: batch norm folded into the convolutions before it."""

from dataclasses import dataclass

import pytest
import timm
import torch
from conftest import settle
from torch import nn
from torchvision.models import densenet121, resnet18, vit_b_16

from octvideo import OctConv3d, create_model, fuse, octavize

NAMES = ["i3d_r50", "c2d_r50_nonlocal", "slowfast_r50", "r2plus1d_r50", "csn_r101", "x3d_xs"]


def norms(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("alpha", [0, 0.25])
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_network_has_no_batch_norm_behind_convolutions_and_gives_the_same_logits(name, alpha):
    torch.manual_seed(0)
    network = settle(create_model(name, alpha=alpha, num_classes=5, width=16))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    fused = fuse(network)
    clip = torch.randn(2, 3, 8, 64, 64)
    torch.testing.assert_close(fused(clip), network(clip), rtol=1e-3, atol=1e-3)
    assert norms(network)
    assert not norms(fused)
    assert not fused.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_folded_weight_serves_every_alpha():
    torch.manual_seed(0)
    network = settle(create_model("i3d_r50", alpha=0.25, num_classes=5, width=16))
    fused = fuse(network)
    clip = torch.randn(2, 3, 8, 32, 32)
    for alpha in (0.5, 0.125, 0):
        for model in (network, fused):
            octavize(model, {r"^blocks\.[134]\.": alpha})
        torch.testing.assert_close(fused(clip), network(clip), rtol=1e-3, atol=1e-3)


def test_batch_norms_that_read_something_else_stay():
    torch.manual_seed(0)
    network = octavize(settle(densenet121(num_classes=5)), {"denseblock": 0.25})
    fused = fuse(network)
    assert [name for name in norms(fused) if name.endswith("norm2")] == []  # behind a convolution
    assert len([name for name in norms(fused) if name.endswith("norm1")]) == 58  # behind a concatenation
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fused(image), network(image), rtol=1e-3, atol=1e-3)


class Branches(nn.Module):
    """A convolution whose output is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class Twice(Branches):
    """A convolution that runs twice, once without its batch norm."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x)


def test_what_cannot_be_folded_is_an_error_and_nothing_changes():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"used elsewhere than in the batch norm behind it"):
        fuse(settle(Branches()))
    with pytest.raises(ValueError, match="Twice has no batch norm with statistics that follows a convolution"):
        fuse(Twice())
    with pytest.raises(ValueError, match="Linear has no convolution"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"does not take an example of shape \(1, 3, 64, 64\); give fuse one"):
        fuse(vit_b_16())


@dataclass
class Answer:
    logits: torch.Tensor


class Answers(Branches):
    """A network whose output nobody can look into."""

    def forward(self, x):
        return Answer(super().forward(x))


class Keyword(Branches):
    """A batch norm that is called by keyword, and an output of class numbers too."""

    def forward(self, x):
        x = self.norm(input=self.conv(x))
        return x, x.flatten(1).argmax(1)


def test_a_wrong_fold_shows_in_16_bits_too_and_an_output_without_tensors_is_refused():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="used elsewhere than in the batch norm behind it"):
            fuse(settle(Branches()).to(dtype))
    with pytest.raises(ValueError, match="Answers gives no floating-point Tensor"):
        fuse(settle(Answers()))
    assert not norms(fuse(settle(Keyword())))


def test_batch_norms_with_a_forward_pass_of_their_own_stay():
    torch.manual_seed(0)
    network = settle(timm.create_model("efficientnet_b0"))
    fused = fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), network).eval())
    assert len(norms(fused)) == len(norms(network))


def test_other_random_numbers_stay_as_they_were():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.set_rng_state(state)
    fuse(network)
    assert torch.equal(torch.rand(1), wanted)


def test_an_example_can_be_given():
    torch.manual_seed(0)
    network = settle(nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (6, 6)), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="give fuse one that it takes"):
        fuse(network)
    example = torch.randn(2, 3, 36)
    torch.testing.assert_close(fuse(network, example)(example), network(example))


def test_bfloat16_networks_can_be_fused():
    torch.manual_seed(0)
    network = settle(resnet18(num_classes=5)).to(torch.bfloat16)
    fused = fuse(network)
    assert not norms(fused)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}


@pytest.mark.long
def test_a_fused_network_compiles_with_frozen_weights():
    torch.manual_seed(0)
    network = settle(
        nn.Sequential(
            OctConv3d(3, 16, (1, 3, 3), padding=(0, 1, 1), alpha=0.25),
            nn.BatchNorm3d(16),
            nn.ReLU(),
            OctConv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), alpha=0),
            nn.BatchNorm3d(16),
        )
    )
    fused = fuse(network)
    clip = torch.randn(1, 3, 4, 8, 8)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        logits = torch.compile(fused, fullgraph=True)(clip)
    torch.testing.assert_close(logits, network(clip), rtol=1e-4, atol=1e-4)
