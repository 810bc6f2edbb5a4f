"""A network that octavize changed returns what it returned before."""

import copy
import dataclasses
import io
import pickle
import warnings
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from octvideo import Octaves, octavize
from octvideo.models.outputs import map_octaves, octaves_in

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Found:
    boxes: object
    classes: int = 3
    count: int = dataclasses.field(default=0, init=False)


class Pyramid(nn.Module):
    """Returns features of two layers, and keeps what its inner method gave."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.last = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward_features(self, x):
        return self.middle(torch.relu(self.stem(x)))

    def _forward_privately(self, x):
        return self.middle(x)

    def forward(self, x):
        features = self.forward_features(x)
        self.given = type(features)
        return {"features": features, "last": self.last(features)}


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, 8)


def test_outputs_are_tensors_and_inner_calls_keep_octaves(image):
    network = octavize(Pyramid(), 0.25)
    outputs = network(image)
    assert network.given is Octaves
    assert [type(x) for x in outputs.values()] == [torch.Tensor] * 2
    assert torch.equal(outputs["features"], network.forward_features(image))
    assert type(network._forward_privately(torch.zeros(1, 8, 4, 4))) is Octaves
    assert isinstance(network, Pyramid)
    assert type(network).__name__ == "Pyramid"


def test_an_error_leaves_the_network_usable(image):
    network = octavize(Pyramid(), 0.25)
    with pytest.raises(RuntimeError):
        network(image[:, :1])
    assert type(network.forward_features(image)) is torch.Tensor


def test_hooks_of_the_network_see_tensors_and_those_inside_octaves(image):
    network, seen = octavize(Pyramid(), 0.25), []
    for module in (network.middle, network):
        module.register_forward_hook(lambda module, args, output: seen.append(octaves_in(output)))
    network(image)
    assert [len(octaves) for octaves in seen] == [1, 0]


def test_alpha_zero_gives_the_class_back(image):
    network = Pyramid()
    wanted = network(image)
    octavize(octavize(network, 0.25), 0.5)
    assert type(network) is not Pyramid
    octavize(network, 0)
    assert type(network) is Pyramid
    assert vars(network).keys() - vars(Pyramid()).keys() == {"given"}
    assert torch.equal(network(image)["last"], wanted["last"])


@pytest.mark.parametrize("make", ["deepcopy", "pickle", "save"])
def test_a_copy_is_the_same_network(make, image):
    network = octavize(Pyramid(), 0.25)
    wanted = network(image)
    if make == "deepcopy":
        other = copy.deepcopy(network)
    elif make == "pickle":
        other = pickle.loads(pickle.dumps(network))
    else:
        torch.save(network, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(network)
    assert str(other.octave_report) == str(network.octave_report)
    assert all(torch.equal(x, wanted[key]) for key, x in other(image).items())
    assert type(octavize(other, 0)) is Pyramid


@pytest.mark.parametrize("how", ["compile", "export", "strict export", "trace"])
def test_compiled_and_exported_networks_return_tensors(how, image):
    network = octavize(Pyramid(), 0.25).eval()
    wanted = network(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "compile":
            made = torch.compile(network, fullgraph=True, backend="aot_eager")
        elif how == "trace":
            made = torch.jit.trace(network, (image,), strict=False)
        else:
            made = torch.export.export(network, (image,), strict=how == "strict export").module()
        outputs = made(image)
    torch.testing.assert_close(dict(outputs), wanted)


def test_a_parent_takes_the_merging_over_from_its_child(image):
    child = octavize(Pyramid(), 0.25)
    parent = octavize(nn.Sequential(child), 0.25)
    assert type(child) is Pyramid
    assert not hasattr(child, "octave_report")
    assert not octaves_in(parent(image))


def test_timms_feature_pyramids_are_tensors():
    network = octavize(timm.create_model("resnet18", features_only=True), 0.25).eval()
    assert [type(x) for x in network(torch.zeros(1, 3, 64, 64))] == [torch.Tensor] * 5


def test_nested_containers_keep_their_types():
    x = Octaves(torch.ones(1, 2, 4, 4), torch.ones(1, 1, 2, 2))
    found = Found([x, 1])
    values = [
        OrderedDict(a=x, b=1),
        Pair(x, [x]),
        (x, None),
        BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)),
        found,
    ]
    merged = map_octaves(Octaves.merge, values)
    assert [type(new) for new in merged] == [type(old) for old in values]
    assert not octaves_in(merged)
    assert len(octaves_in(values)) == 8
    assert merged[3].last_hidden_state is merged[3]["last_hidden_state"]
    assert merged[4].boxes[0].shape == (1, 3, 4, 4)
    assert isinstance(found.boxes[0], Octaves)


def test_what_holds_no_octaves_is_the_same_object():
    for value in ({"a": torch.ones(1)}, [1, (2,)], Pair(1, 2), BaseModelOutput(torch.ones(1)), Found(1), "ab", Found):
        assert map_octaves(Octaves.merge, value) is value


def test_octave_networks_compile_one_after_the_other():
    """In a thread of its own, where none has run before."""

    def compile_both():
        for _ in range(2):
            torch._dynamo.reset()
            network = octavize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), 0.5)
            torch.compile(network, fullgraph=True, backend="eager")(torch.zeros(1, 3, 4, 4))

    with ThreadPoolExecutor(1) as thread:
        thread.submit(compile_both).result()
