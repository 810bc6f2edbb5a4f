"""octavize on networks that nobody here wrote."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from pytorchvideo.layers.swish import Swish
from torch import nn
from torchvision.models import resnet18, vit_b_16
from torchvision.models.video import mvit_v1_b, r3d_18, swin3d_t

from octvideo import Octaves, OctConv2d, OctConv3d, octavize
from octvideo.errors import UserError
from octvideo.models.cost import count_macs


def small_network():
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool3d(1),
    )


def test_the_network_stays_the_same_object_with_the_same_weights():
    network = small_network()
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    assert octavize(network, 0.5) is network
    for name, parameter in network.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_the_convolution_that_reads_the_input_stays_vanilla():
    network = octavize(small_network(), 0.5)
    assert network[0].alpha == 0
    assert network[3].alpha == 0.5
    assert network(torch.zeros(1, 3, 2, 8, 8)).shape == (1, 8, 1, 1, 1)


def test_first_matching_regex_decides_and_others_keep_alpha_zero():
    network = octavize(resnet18(), {r"layer1\.0": 0.25, r"layer[12]": 0.5}, skip=["downsample"])
    alphas = {name: module.alpha for name, module in network.named_modules() if isinstance(module, OctConv2d)}
    assert alphas["layer1.0.conv1"] == 0.25
    assert alphas["layer1.1.conv1"] == 0.5
    assert alphas["layer2.0.downsample.0"] == 0
    assert alphas["layer3.0.conv1"] == 0


def test_a_subclass_that_convolves_as_its_base_is_changed_and_restored():
    network = r3d_18()
    kinds = [type(module) for module in network.modules()]
    octavize(network, {r"layer[1-3]": 0.25})
    assert isinstance(network.layer1[0].conv1[0], OctConv3d)
    assert network(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 400)
    octavize(network, 0)
    assert [type(module) for module in network.modules()] == kinds


def test_a_convolution_with_a_forward_of_its_own_is_octave_too():
    class Doubled(nn.Conv3d):
        def forward(self, input):
            return 2 * super().forward(input)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, 4, 1), Doubled(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 1))
    )
    clip = torch.randn(1, 3, 2, 4, 4)
    wanted, kinds = network(clip), [type(module) for module in network]
    octavize(network, 0.5)
    assert [module.alpha for module in network] == [0, 0.5, 0.5]
    constant = clip[..., :1, :1].expand(-1, -1, -1, 4, 4)
    given = network(constant)
    octavize(network, 0)
    assert [type(module) for module in network] == kinds
    assert torch.equal(network(clip), wanted)
    torch.testing.assert_close(given, network(constant))


def test_restoring_leaves_a_subclass_with_an_alpha_of_its_own_alone():
    class Scaled(nn.Conv3d):
        alpha = 3

    network = octavize(nn.Sequential(nn.Conv3d(3, 4, 1), Scaled(4, 4, 1)), 0)
    assert type(network[1]) is Scaled
    assert network[1].alpha == 3


def test_a_torchvision_network_runs_and_gets_cheaper():
    vanilla = resnet18().eval()
    macs = count_macs(vanilla, (3, 64, 64))
    network = octavize(vanilla, {r"layer[1-3]": 0.5})
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert count_macs(network, (3, 64, 64)) < 0.7 * macs


def test_reassigning_and_restoring():
    torch.manual_seed(0)
    network = small_network().eval()
    clip = torch.randn(1, 3, 2, 8, 8)
    vanilla = network(clip)
    octavize(network, 0.25, temporal=True)
    assert network[3].alpha == 0.25
    assert network[3].temporal
    octavize(network, 0.5)
    assert network[3].alpha == 0.5
    assert not network[3].temporal
    octavize(network, 0)
    assert type(network[3]) is nn.Conv3d
    assert not hasattr(network[3], "alpha")
    assert torch.equal(network(clip), vanilla)


@pytest.mark.parametrize(
    ("alpha", "skip", "message"),
    [
        (1.5, (), r"alpha must lie in \[0, 1\], got 1.5"),
        ({"layer9": 0.5}, (), "no convolution of Sequential has a name that matches 'layer9'"),
        (0.5, ("head",), "matches 'head'"),
        (
            0.5,
            ("3",),
            r"no convolution that could become octave: 0 is left: it reads the network's input; 3 is left: skip",
        ),
    ],
)
def test_mistakes_are_errors_that_change_nothing(alpha, skip, message):
    network = small_network()
    with pytest.raises(ValueError, match=message):
        octavize(network, alpha, skip=skip)
    assert not any(isinstance(module, OctConv3d) for module in network.modules())


def test_the_report_says_what_every_convolution_became_and_why():
    network = nn.Sequential(
        nn.Conv3d(3, 8, 1),
        nn.Conv3d(8, 8, 1),
        nn.Conv3d(8, 2, 1),
        nn.Conv3d(2, 8, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv3d(8, 8, 1)),
        nn.ConvTranspose1d(8, 8, 1),
        Swish(),
    )
    octavize(network, 0.25, skip=["3"])
    assert str(network.octave_report).splitlines() == [
        "Sequential: 2 of 6 convolutions are octave",
        "  0  left: it reads the network's input",
        "  1  alpha 0.25: 6 high + 2 low channels",
        "  2  left: 2 channels have no low one at alpha 0.25",
        "  3  left: skip matches its name",
        "  4  alpha 0.25: 6 high + 2 low channels",
        "  5  left: ConvTranspose1d has no octave form",
        "  6  replaced by nn.SiLU, the same function",
        "pass sample= (a clip, or the forward's arguments) to know multiply-adds, bytes and merges",
    ]
    octavize(network, {"1": 0.25, "2": 0.0})
    assert [line.split("  ")[-1] for line in str(network.octave_report).splitlines()[1:5]] == [
        "left: no regex of alpha matches its name",
        "alpha 0.25: 6 high + 2 low channels",
        "left: alpha 0",
        "left: no regex of alpha matches its name",
    ]
    octavize(network, 0)
    assert not hasattr(network, "octave_report")


def test_pytorchvideos_swish_is_replaced_and_restored():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(3, 8, 1), Swish(), nn.Conv3d(8, 8, 1), Swish())
    clip = torch.randn(1, 3, 2, 4, 4)
    wanted = network(clip)
    octavize(network, 0.25)
    assert isinstance(network[1](network[2](clip[:, :1].expand(-1, 8, -1, -1, -1))), Octaves)
    octavize(network, 0)
    assert type(network[1]) is type(network[3]) is Swish
    assert torch.equal(network(clip), wanted)


@pytest.mark.parametrize("build", [vit_b_16, lambda: timm.create_model("vit_tiny_patch16_224"), mvit_v1_b, swin3d_t])
def test_a_transformer_is_told_that_octaves_are_for_convolutional_networks(build):
    with torch.device("meta"):
        network = build()
    with pytest.raises(ValueError, match=r"a transformer \(\d+ attention layers.*reads the network's input"):
        octavize(network, 0.25)


def test_pooled_downsampling_is_the_control_at_alpha_zero():
    torch.manual_seed(0)
    network = resnet18().eval()
    image = torch.randn(1, 3, 64, 64)
    wanted = network(image)
    octavize(network, {"layer": 0.0}, downsample="pool")
    strided = [module for module in network.modules() if isinstance(module, OctConv2d) and module.stride == (2, 2)]
    assert [module.downsample for module in strided] == ["conv"] + ["pool"] * 6
    control = network(image)
    assert not torch.equal(control, wanted)
    layer = network.layer2[0].conv1
    pooled = F.conv2d(torch.ones(1, 64, 4, 4), layer.weight, padding=1)
    torch.testing.assert_close(layer(image.new_ones(1, 64, 8, 8)), pooled)
    assert torch.equal(octavize(network, 0)(image), wanted)


def test_channels_last_is_the_fast_form_at_alpha_zero_and_is_restored():
    torch.manual_seed(0)
    network = small_network().eval()
    clip = torch.randn(1, 3, 2, 8, 8)
    wanted = network(clip)
    octavize(network, 0, channels_last=True)
    assert isinstance(network[0], OctConv3d)
    assert "channels_last=True" in str(network[0])
    assert network[0](clip).is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(network(clip), wanted)
    torch.testing.assert_close(network[0](clip[0]), network[0](clip)[0])  # a clip without a batch
    octavize(network, 0)
    assert type(network[0]) is nn.Conv3d
    assert "channels_last" not in network[0].__dict__
    assert torch.equal(network(clip), wanted)


class Flat(nn.Module):
    """As the C3D of many repositories: the classifier reads every value of the last map, by a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.last = nn.Conv3d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8 * 2 * 6 * 6, 5)

    def forward(self, x):
        x = F.max_pool3d(self.last(self.second(self.first(x))), (1, 2, 2))
        return self.classifier(x.view(x.size(0), -1))


@pytest.mark.parametrize("options", [{"sample": torch.zeros(1, 3, 2, 12, 12)}, {"skip": "last"}])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_view_behind_a_layer_that_is_vanilla_again_works(options, gradients):
    network = octavize(Flat(), 0.25, **options)
    assert (network.second.alpha, network.last.alpha) == (0.25, 0)
    with torch.set_grad_enabled(gradients):
        assert network(torch.randn(2, 3, 2, 12, 12)).shape == (2, 5)


def test_a_layer_that_is_vanilla_again_keeps_the_memory_format_of_the_network():
    x = OctConv3d(3, 8, 3, padding=1, alpha=0.25)(torch.randn(1, 3, 2, 8, 8))
    layer = OctConv3d(8, 8, 3, padding=1, alpha=0)
    assert layer(x).is_contiguous()
    assert layer.to(memory_format=torch.channels_last_3d)(x).is_contiguous(memory_format=torch.channels_last_3d)
    layer = OctConv3d(8, 8, 3, padding=1, alpha=0, channels_last=True)
    assert layer(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("kind", [nn.Conv3d, OctConv3d])
def test_nothing_octave_stays_in_a_restored_layer(kind):
    network = nn.Sequential(nn.Conv3d(3, 4, 1), kind(4, 4, 1), Swish())
    before = [set(vars(nn.Conv3d(3, 4, 1)))] * 2 + [set(vars(Swish()))]
    octavize(network, {"1": 0.5}, temporal=True, channels_last=True)(torch.zeros(1, 3, 2, 4, 4))
    octavize(network, 0)
    assert [set(vars(module)) for module in network] == before
    assert [type(module) for module in network] == [nn.Conv3d, nn.Conv3d, Swish]


def test_an_invalid_regex_is_named():
    with pytest.raises(ValueError, match=r"invalid regex '\(': missing \)"):
        octavize(small_network(), {"(": 0.5})


def test_rounding_reaches_every_layer_and_the_report():
    network = octavize(resnet18().eval(), {"layer": 0.1}, round_to=16)
    assert "48 high + 16 low channels" in str(network.octave_report)
    assert [assignment.low for assignment in network.octave_report.assignments][:3] == [0, 16, 16]
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    octavize(network, 0)
    assert "round_to" not in network.layer1[0].conv1.__dict__


def test_groups_that_cannot_be_split_name_the_layer():
    network = nn.Sequential(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1, groups=4))
    with pytest.raises(ValueError, match=r"^1: alpha 0\.25 splits 8 output channels into 6 high and 2 low.*skip it"):
        octavize(network, {"1": 0.25})
    with pytest.raises(ValueError, match=r"no convolution that could .* 1 is left: alpha 0\.25 splits 8 output"):
        octavize(network, 0.25)
    assert type(network[1]) is nn.Conv3d
    network.append(nn.Conv3d(8, 8, 1))
    assert "groups 4 must divide both" in octavize(network, 0.25).octave_report.assignments[1].reason


def test_a_convolution_that_would_part_the_maps_is_left_and_takes_the_merged_features():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, 4)
    ).eval()
    image = torch.randn(1, 3, 1, 1).expand(1, 3, 16, 16)
    network[1].padding_mode = "circular"
    wanted = network(image)
    octavize(network, 0.5)
    assert [layer.alpha for layer in network] == [0, 0.5, 0, 0]
    assert "need a padding that keeps the size: kernel (2, 2)" in network.octave_report.assignments[2].reason
    assert "take a spatial stride of 1 or 2, got stride (4, 4)" in network.octave_report.assignments[3].reason
    torch.testing.assert_close(network(image), wanted)
    with pytest.raises(ValueError, match=r"2: octave features need a padding that keeps the size.*; skip it"):
        octavize(network, {"[12]": 0.5})


def test_kept_strides_stay_vanilla():
    network = octavize(resnet18(), 0.25, strided="keep")
    reasons = {assignment.name: assignment.reason for assignment in network.octave_report.assignments}
    assert (
        reasons["layer2.0.conv1"]
        == reasons["layer2.0.downsample.0"]
        == 'left: strided="keep" leaves its stride of (2, 2)'
    )
    assert network.layer2[0].conv2.alpha == 0.25
    assert network.layer2[0].conv1.strided == "keep"
    assert type(octavize(network, 0).layer2[0].conv1) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LazyConv2d(8, 1), "not initialised yet"),
        (lambda: torch.jit.script(nn.Conv2d(8, 8, 1)), "a ScriptModule"),
        (lambda: torch.ao.nn.quantized.Linear(4, 4), "quantized: octavize first"),
    ],
)
def test_modules_that_nothing_can_change_are_refused(build, message):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), build(), nn.Conv2d(8, 8, 1))
    with pytest.raises(UserError, match=f"Sequential cannot become octave: 1 is {message}"):
        octavize(network, 0.5)
    assert type(network[0]) is nn.Conv2d


def test_without_a_sample_a_convolution_of_other_dimensions_is_left():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv3d(8, 8, 1))
    reason = octavize(network, 0.5).octave_report.assignments[2].reason
    assert "3-D and the network's first convolution is not: sample= would tell" in reason


class Fused(nn.Module):
    """Two branches that can become one convolution, as RepVGG's do, and a method that only sounds like it."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

    def fuse_features(self, x, y):
        return x + y

    def forward(self, x):
        return self.fuse_features(*(branch(x) for branch in self.branches))

    def reparameterize(self):
        self.branches = nn.ModuleList([nn.Conv2d(8, 8, 1)])


def test_a_network_is_reparameterized_before_it_is_octavized():
    network = octavize(nn.Sequential(nn.Conv2d(3, 8, 1), Fused()), 0.5)
    assert network(torch.zeros(1, 3, 4, 4)).shape == (1, 8, 4, 4)
    for block in (network[1], copy.deepcopy(network)[1]):
        with pytest.raises(UserError, match="reparameterize first, then octavize"):
            block.reparameterize()
    octavize(network, 0)[1].reparameterize()
    assert len(network[1].branches) == 1


def test_timms_reparameterization_is_an_error():
    network = octavize(timm.create_model("mobileone_s0"), 0.5)
    with pytest.raises(UserError, match="reparameterize first, then octavize"):
        timm.utils.reparameterize_model(network)


def test_an_unknown_way_to_downsample_is_refused():
    with pytest.raises(ValueError, match=r'downsample must be "conv" or "pool", got \'avg\''):
        octavize(small_network(), 0.5, downsample="avg")


def test_a_network_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="Linear has no nn"):
        octavize(nn.Linear(3, 4))
