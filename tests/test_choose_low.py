"""choose_low: the vanilla function stays, and the channels that lose least at half resolution come last."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from octvideo import choose_low, create_model, octavize
from octvideo.errors import UserError


def random_norms(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.double().eval()


def moved(before, network):
    """The share of convolutions of which some output channel has another filter than before."""
    found = []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            old, new = before[f"{name}.weight"], module.weight
            found.append(not torch.allclose(old.flatten(1).norm(dim=1), new.flatten(1).norm(dim=1)))
    return sum(found) / len(found)


class Odd(nn.Module):
    """Channels that are cut, shuffled, gated, grouped and treated unlike their neighbours, and a sum in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm, self.slope = nn.GroupNorm(4, 16), nn.PReLU(16)
        self.gate, self.depthwise = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up, self.layer_norm = nn.ConvTranspose2d(16, 12, 2, 2), nn.LayerNorm(12)
        self.scale, self.head = nn.Parameter(torch.rand(12, 1, 1)), nn.Linear(12 * 4, 5)
        self.shared = nn.Conv2d(12, 12, 1)

    def forward(self, x):
        x = self.slope(self.norm(self.grouped(self.stem(x).relu())))
        shortcut = x
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() + self.depthwise(x)
        x = x.relu()
        x += shortcut
        x = x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        one, other = x.chunk(2, 1)
        x = torch.cat(
            (
                one.relu(),
                other.tanh(),
            ),
            1,
        )
        x = self.layer_norm(self.up(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale
        x = self.shared(self.shared(nn.functional.pad(x, (1, 1, 1, 1)))) + x.amax((2, 3), keepdim=True)
        return {"scores": self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))}


NETWORKS = {
    "odd": (Odd, (2, 3, 16, 16), 0.8),
    "mobilenet_v3": (torchvision.models.mobilenet_v3_small, (2, 3, 64, 64), 0.8),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, (2, 3, 64, 64), 1),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), (2, 3, 64, 64), 1),
    "slowfast": (lambda: create_model("slowfast_r50", num_classes=3, width=8), (1, 3, 8, 32, 32), 0.6),
    "x3d": (lambda: create_model("x3d_s", num_classes=3, width=8), (1, 3, 4, 32, 32), 0.6),
    "nonlocal": (lambda: create_model("i3d_r50_nonlocal", num_classes=3, width=8), (1, 3, 4, 32, 32), 0.7),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_vanilla_function_stays(name):
    build, shape, share = NETWORKS[name]
    network, clips = random_norms(build()), torch.randn(shape, dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        wanted = network(clips)
        assert choose_low(network, clips) is network
        found = network(torch.cat((clips, clips.flip(-1))))
    wanted, found = (x["scores"] if isinstance(x, dict) else x for x in (wanted, found))
    assert (found[: len(clips)] - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    assert moved(before, network) >= share
    assert not network.training


class Scene(nn.Module):
    """A residual trunk of 8 channels: `smooth` of them copy a smooth picture, the others white noise."""

    def __init__(self, smooth, dims=2):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.stem, self.wide, self.back = conv(2, 8, 1, bias=False), conv(8, 8, 1), conv(8, 8, 1)
        self.read = conv(8, 4, 1)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.1 if name.startswith(("wide", "back")) else 1)
        with torch.no_grad():
            for channel in range(8):
                self.stem.weight[channel].zero_()[0 if channel in smooth else 1] = 1

    def forward(self, x):
        x = self.stem(x)
        return self.read(x + self.back(self.wide(x).relu()))


def scenes(batch, *size):
    torch.manual_seed(1)
    rows = torch.linspace(0, 3, size[-1])
    smooth = (rows[:, None] + rows).sin().expand(batch, 1, *size)
    return torch.cat((smooth, torch.randn(batch, 1, *size)), 1)


@pytest.mark.parametrize("size", [(16, 16), (4, 16, 16)])
def test_channels_of_low_frequency_come_last(size):
    network, clips = Scene({0, 1, 5}, len(size)), scenes(4, *size)
    with torch.no_grad():
        before = network(clips)
        choose_low(network, clips)
        after, octave = network(clips), octavize(copy.deepcopy(network), {"stem": 3 / 8})(clips)
        worse = octavize(Scene({0, 1, 5}, len(size)), {"stem": 3 / 8})(clips)
    assert torch.allclose(after, before, atol=1e-5)
    assert network.stem.weight.flatten(1)[:, 0].tolist() == [0] * 5 + [1] * 3
    assert (octave - before).norm() < 0.1 * before.norm() < (worse - before).norm()


def test_halving_the_last_channels_changes_outputs_less_than_before():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) * 2]
    network = nn.Sequential(*layers, nn.Conv2d(32, 5, 1))
    with torch.no_grad():
        for layer in network[:4:2]:  # filters between blur and difference
            layer.weight.add_(torch.linspace(-0.3, 0.3, 32)[torch.randperm(32)].view(-1, 1, 1, 1))
    clips, unseen = torch.randn(2, 4, 3, 24, 24)
    errors = []
    for _ in range(2):
        with torch.no_grad():
            octave = octavize(copy.deepcopy(network), {r"^[24]$": 0.25})
            errors.append(float((octave(unseen) - network(unseen)).norm()))
        choose_low(network, [clips[:2], (clips[2:],)])
    assert errors[1] < 0.8 * errors[0]


def test_what_is_measured_with_time_halved_is_another_order():
    torch.manual_seed(0)
    networks = [Scene({0, 1, 2, 3}, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    clips = scenes(2, 1, 16, 16).expand(-1, -1, 4, -1, -1).clone()
    clips[:, 0] *= torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1) * 4  # smooth in space, not in time
    for network, temporal in zip(networks, (False, True), strict=True):
        choose_low(network, clips, temporal=temporal)
    smooth = [network.stem.weight.flatten(1)[:, 0].tolist() for network in networks]
    assert smooth[0][4:] == [1] * 4 != smooth[1][4:]


class Reversed(nn.Module):
    """Reads its channels in an order that no run can tell: numpy's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.last(x) + torch.from_numpy(x.detach().numpy()[:, :4].copy())


@pytest.mark.parametrize(
    ("network", "clips", "message"),
    [
        (Reversed(), torch.randn(2, 3, 8, 8), "does not understand how Reversed"),
        (octavize(Scene({1}), {"wide": 0.5}), scenes(1, 8, 8), "takes a vanilla network"),
        (Scene({1}), [], "at least one batch"),
        (nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3), "2-D or 3-D convolutions"),
        (nn.ModuleDict({"used": nn.Conv2d(3, 4, 1), "spare": nn.Conv2d(3, 4, 1)}), None, "spare.weight, spare.bias"),
    ],
)
def test_refusals_leave_the_weights(network, clips, message):
    if clips is None:
        network.forward, clips = lambda x: network["used"](x), torch.randn(2, 3, 8, 8)
    network.train()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=message):
        choose_low(network, clips)
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
