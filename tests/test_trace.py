"""octavize with a sample: what it costs, what merges, what is no space, decided before anything changes."""

import warnings

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from octvideo import OctConv2d, octavize
from octvideo.errors import UserError
from octvideo.models.cost import count_macs

IMAGE = torch.zeros(1, 3, 16, 16)


class Merges(nn.Flatten):
    def __init__(self):
        super().__init__(2)


def chain(*more):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)), *more)


def reasons(network):
    return {assignment.name: assignment.reason for assignment in network.octave_report.assignments}


def test_the_report_has_multiply_adds_of_the_network_and_of_its_layers():
    network = resnet18()
    before = count_macs(network, (3, 64, 64))
    report = octavize(network, 0.25, sample=torch.zeros(1, 3, 64, 64)).octave_report
    assert report.macs == (before, count_macs(network, (3, 64, 64)))
    assert sum(part.macs[0] for part in report.assignments) + 512 * 1000 == before
    assert report.elsewhere["Linear"] == 512 * 1000
    assert report.kernels[0] < report.kernels[1]
    line = str(report).splitlines()[-1]
    assert line.startswith("MACs 0.15 -> 0.11 G (0.72), bytes ")
    assert line.endswith(", parameters 11.7 M, 0 merges")


def test_bytes_are_those_of_the_inputs_and_outputs():
    network = octavize(
        nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)),
        0.5,
        sample=torch.zeros(2, 3, 4, 4),
    )
    first = network.octave_report.assignments[0]
    assert first.bytes_moved == (4 * 2 * 16 * 3 + 4 * 24 + 4 * 2 * 16 * 8,) * 2


def test_the_model_is_neither_run_nor_changed():
    network = chain()
    network.register_forward_hook(lambda *_: pytest.fail("run") if not network.training else None)
    tensors = {name: (x, x.clone()) for name, x in network.state_dict(keep_vars=True).items()}
    octavize(network, 0.25, sample=IMAGE)
    assert network.training
    for name, x in network.state_dict(keep_vars=True).items():
        assert x is tensors[name][0]
        assert torch.equal(x, tensors[name][1])
        assert x.requires_grad


def test_convolutions_whose_low_map_would_only_be_merged_stay_vanilla():
    network = octavize(chain(Merges()), 0.25, sample=IMAGE)
    assert [module.alpha for module in network[:4]] == [0, 0.25, 0.25, 0]
    assert reasons(network)["3"] == "left: a merge in 4.flatten would follow"
    assert not network.octave_report.merges
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(IMAGE)


def test_convolutions_that_others_read_too_keep_their_alpha_and_the_merge_is_reported():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last, self.merges = chain(), nn.Conv2d(8, 8, 1), Merges()

        def forward(self, x):
            x = self.body(x)
            return self.last(x), self.merges(x)

    network = octavize(Two(), 0.25, sample=IMAGE)
    assert [module.alpha for module in network.body] == [0, 0.25, 0.25, 0.25]
    assert reasons(network)["last"] == "left: a merge in the network's output would follow"
    assert network.octave_report.merges == {("merges", "flatten"): 1}
    assert "merges in flatten, 1 time" in str(network.octave_report)
    assert str(network.octave_report).endswith("1 merge")
    vanilla = Two()
    with pytest.raises(TypeError, match="flatten of merges would merge octave features, and strict=True allows none"):
        octavize(vanilla, 0.25, sample=IMAGE, strict=True)
    assert not any(isinstance(module, OctConv2d) for module in vanilla.modules())


def test_without_a_sample_merges_are_counted_and_warned_of_once():
    network = octavize(chain(Merges()), 0.25)
    with pytest.warns(UserWarning, match=r"flatten of 4 acts on the merged tensor.*octave_report\) lists"):
        network(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(IMAGE)
        network(IMAGE)
    assert network.octave_report.merges == {("4", "flatten"): 3}
    with pytest.raises(TypeError, match=r"flatten of 4 would merge octave features of shape \(1, 8, 16, 16\)"):
        octavize(network, 0.25, strict=True)(IMAGE)


def test_merges_without_a_network_are_warned_of_once_a_class_and_function():
    layer = nn.Sequential(OctConv2d(3, 8, 1), Merges())
    with pytest.warns(UserWarning, match=r"Merges.flatten merges octave features of shape \(1, 8, 16, 16\)"):
        layer(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(IMAGE)


class Values(nn.Module):
    """A 3-D convolution over (H, W, values), as timm's lambda layers have."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.values = nn.Conv3d(1, 4, (3, 3, 1), padding=(1, 1, 0))

    def forward(self, x):
        x = self.stem(x)
        return self.values(x.movedim(1, -1).unsqueeze(1)).sum((1, 4)), self.body(x).mean((2, 3))


def test_a_convolution_over_anything_but_space_stays_vanilla():
    network = octavize(Values(), 0.25, sample=IMAGE)
    assert "its input of 16 x 16 x 8 becomes 32 x 32 x 8" in reasons(network)["values"]
    assert network.body.alpha == 0.25


def test_gates_stay_vanilla():
    network = octavize(timm.create_model("seresnet18"), 0.25, sample=torch.zeros(1, 3, 64, 64))
    assert "its input of 1 x 1 stays" in reasons(network)["layer1.0.se.fc1"]
    assert network.layer1[0].conv1.alpha == 0.25


def test_a_network_of_one_size_is_judged_by_the_proportions_of_the_sample():
    class Fixed(Values):
        def forward(self, x):
            assert x.shape[-1] == 32
            return super().forward(x)

    network = octavize(Fixed(), 0.25, sample=torch.zeros(1, 3, 32, 32))
    assert "it convolves over 32 x 32 x 8, not in the proportions" in reasons(network)["values"]
    assert network.body.alpha == 0.25
    assert "could not be known: which axes are space" in str(network.octave_report)


def test_a_network_that_reads_values_is_computed():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x):
            return self.body(x[: 1 + int(x.sum() > 0)])

    report = octavize(Reads(), 0.25, sample=torch.ones(2, 3, 16, 16)).octave_report
    assert report.macs[0] == 2 * 256 * (27 * 8 + 3 * 72 * 8)


@pytest.mark.parametrize("sample", [(IMAGE, 2), {"x": IMAGE, "times": 2}])
def test_a_sample_may_be_the_arguments_of_forward(sample):
    class Times(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain()

        def forward(self, x, times):
            return self.body(x) * times

    assert octavize(Times(), 0.25, sample=sample).octave_report.macs


def test_nothing_gained_is_said_with_what_ate_it():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mix, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4096, 64), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.mix(x.flatten(1)), self.last(x)

    network = octavize(Mixes(), 0.25, sample=torch.zeros(1, 3, 32, 32))
    line = str(network.octave_report).splitlines()[-1]
    assert line.startswith("nothing is gained: MACs 0.29 -> 0.29 M (1.00), bytes ")
    assert line.endswith(
        "of the vanilla MACs 90% in Linear modules, 6% in convolutions left: a merge in the network's output would "
        "follow, 4% in convolutions left: it reads the network's input"
    )
    assert type(network.last) is nn.Conv2d


class Stops(nn.Module):
    def forward(self, x):
        return x.no_such_attribute if hasattr(x, "low") else x


def test_what_fails_with_octaves_names_the_module_and_the_line_and_changes_nothing():
    network = chain(Stops())
    with pytest.raises(UserError, match=r"stops at 4 \(Stops\), in forward: 'return x.no_such_attribute.*skip="):
        octavize(network, 0.25, sample=IMAGE)
    assert [type(module) for module in network[:4]] == [nn.Conv2d] * 4
    assert not hasattr(network, "octave_report")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(1, 4, 16, 16), r"does not take the sample, of shapes \[\(1, 4, 16, 16\)\]: .*4 channels"),
        ([IMAGE], "sample must be a Tensor, or a tuple or dict of the forward's arguments, got list"),
    ],
)
def test_a_sample_that_the_network_does_not_take_is_an_error(sample, message):
    with pytest.raises(UserError, match=message):
        octavize(chain(), 0.25, sample=sample)
