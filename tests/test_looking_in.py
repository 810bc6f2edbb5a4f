"""Tools that look into networks see octave features as they would see the vanilla tensor."""

import gc
import weakref

import numpy as np
import pytest
import timm
import torch
from pytorchvideo.models import resnet
from torch import nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from octvideo import Octaves, OctConv2d, OctConv3d, create_model, octavize
from octvideo.layers.resampling import average_pool
from octvideo.models.cost import count_macs, count_macs_of

SIZE = (3, 8, 32, 32)


def small(name, alpha):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet._MODEL_STAGE_DEPTH, 50, (3, 4, 6, 3) if "nonlocal" in name else (1, 1, 1, 1))
        patch.setitem(resnet._MODEL_STAGE_DEPTH, 101, (1, 1, 1, 1))
        return create_model(name, alpha=alpha, num_classes=5, width=8).eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return small("i3d_r50", 0.25)


@pytest.fixture(scope="module")
def clip():
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


class Merged(nn.Module):
    """Merges the features and splits them again, which changes nothing; `tensor` is a layer between."""

    def __init__(self):
        super().__init__()
        self.tensor = nn.Identity()

    def forward(self, x):
        merged = self.tensor(x.merge())
        index = torch.arange(merged.shape[1]).split([n for part in x.parts for n in part])
        high, low = (merged[:, torch.cat(index[kind::2])] for kind in (0, 1))
        return Octaves(high, average_pool(low, x.factors), x.parts)


def five_layers(alpha, temporal=False, groups=1):
    torch.manual_seed(0)
    layers = (3, 8), (8, 16), (16, 8)
    convolutions = [nn.Conv3d(*layer, 3, padding=1, groups=groups if n else 1) for n, layer in enumerate(layers)]
    network = nn.Sequential(*convolutions[:2], nn.ReLU(), convolutions[2], nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return octavize(network, {"0|1": alpha}, temporal=temporal)


@pytest.mark.parametrize(
    "kind",
    [{"alpha": 0.25}, {"alpha": 0.5, "temporal": True}, {"alpha": 0.5, "groups": 2}, {"alpha": 1}, {"alpha": 0.001}],
)
def test_a_hook_on_features_gets_the_gradient_of_a_merged_tensor(kind):
    network, x = five_layers(**kind), torch.randn(2, 3, 5, 7, 6)
    seen, outputs = [], []

    def look(module, args, y):
        y.register_hook(seen.append)
        y.retain_grad()
        outputs.append(y)

    network[1].register_forward_hook(look)
    network(x)[:, 1].sum().backward()
    if kind["alpha"] < 0.01:  # no low channel: a Tensor
        assert torch.equal(seen[0], outputs[0].grad)
        return
    network[1]._forward_hooks.clear()
    merging = nn.Sequential(*network[:2], Merged(), *network[2:])
    merging[2].tensor.register_forward_hook(look)
    merging(x)[:, 1].sum().backward()
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(outputs[0].grad, seen[1])
    assert np.array_equal(outputs[0].data.cpu().numpy(), outputs[1].data.cpu().numpy())


def test_a_hook_comes_off_and_cannot_replace_the_gradient():
    x = OctConv2d(3, 8, 1)(torch.randn(1, 3, 4, 4))
    seen = []
    handle = x.register_hook(seen.append)
    handle.remove()
    x.high.sum().backward(retain_graph=True)
    assert not seen
    x.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match=r"cannot replace the gradient.*\.high and \.low"):
        x.low.sum().backward()


def test_a_hook_hears_of_a_map_that_nothing_used():
    x = OctConv2d(3, 8, 1)(torch.randn(1, 3, 4, 4))
    seen = []
    x.register_hook(seen.append)
    x.high.sum().backward()
    torch.testing.assert_close(seen[0], Octaves(torch.ones(1, 6, 4, 4), torch.zeros(1, 2, 2, 2)).merge())


def test_features_without_gradients_take_no_hook_and_have_no_gradient():
    x = Octaves(torch.randn(1, 3, 4, 4), torch.randn(1, 1, 2, 2))
    with pytest.raises(RuntimeError, match="require no gradient"):
        x.register_hook(print)
    x.retain_grad()
    assert x.grad is None


def test_a_hook_does_not_keep_features_alive():
    gc.collect()
    gc.disable()
    try:
        x = OctConv2d(3, 8, 1)(torch.randn(1, 3, 4, 4))
        x.register_hook(lambda gradient: None)
        high = weakref.ref(x.high)
        del x
        assert high() is None
    finally:
        gc.enable()


def test_backward_hooks_of_modules_see_both_maps(network, clip):
    block, seen = network.blocks[1].res_blocks[0].branch2.norm_a, []
    hooks = (
        block.register_full_backward_pre_hook(lambda module, gradients: seen.append(gradients)),
        block.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs)),
    )
    wanted = network(clip)
    wanted.sum().backward()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(wanted, network(clip))
    for high, low in seen:
        assert (high.shape[1], low.shape[1]) == (6, 2)
    assert len(seen) == 2


def test_features_answer_as_the_vanilla_tensor():
    x = Octaves(torch.randn(2, 3, 5, 4), torch.randn(2, 1, 3, 2), ((1, 1), (2, 0)))
    vanilla = x.merge()
    for question in ("numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device", "tolist"):
        assert getattr(x, question)() == getattr(vanilla, question)()
    for attribute in ("layout", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"):
        assert getattr(x, attribute) == getattr(vanilla, attribute)
    assert torch.numel(x) == 160
    assert torch.is_floating_point(x)
    assert torch.equal(x[0].merge(), vanilla[0])
    arrays = (x.numpy(), np.asarray(x), np.array(x), x.detach().cpu().numpy(), x.data.numpy())
    for array in arrays:
        assert np.array_equal(array, vanilla.numpy())
    assert np.asarray(x, dtype=np.float64).dtype == np.float64
    assert not Octaves(x.high.requires_grad_(), x.low).data.requires_grad


# One network of each kind of module that torch.fx could not follow; SlowFast has lists of pathways.
@pytest.mark.parametrize("name", ["i3d_r50", "c2d_r50_nonlocal", "slowfast_r50", "x3d_xs", "csn_r101"])
@pytest.mark.parametrize("alpha", [0, 0.25])
def test_fx_traces_networks_of_the_zoo(name, alpha, clip, one_thread):
    network = small(name, alpha)
    graph = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        assert torch.equal(graph(clip), network(clip))
    leaves = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    octave = {name for name, module in network.named_modules() if isinstance(module, OctConv3d)}
    assert bool(octave) == (alpha > 0)
    assert all(name in leaves or "non_local" in name for name in octave)


def test_octave_layers_are_leaves_for_a_tracer_that_has_none():
    class Everything(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    network = nn.Sequential(OctConv2d(3, 8, 3, padding=1, alpha=0), nn.ReLU(), OctConv2d(8, 4, 1))
    nodes = Everything().trace(network).nodes
    assert [str(node.target) for node in nodes if node.op == "call_module"] == ["0", "2"]


@pytest.fixture(scope="module")
def image_network():
    torch.manual_seed(0)
    return octavize(resnet18().eval(), {"layer[1-3]": 0.25})


def wanted_features(network, names, x):
    features = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: features.update({name: y.clone()})
        )
        for name in names
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return features


def test_feature_extractors_give_the_features_of_layers(image_network):
    x, names = torch.randn(1, 3, 40, 40), ("layer1", "layer3", "layer4")
    with torch.no_grad():
        wanted = wanted_features(image_network, names, x)
        for extractor in (
            create_feature_extractor(image_network, {name: name for name in names}),
            IntermediateLayerGetter(image_network, {name: name for name in names}),
        ):
            found = extractor(x)
            assert isinstance(found["layer1"], Octaves)
            for name in names:
                torch.testing.assert_close(np.asarray(found[name]), np.asarray(wanted[name]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["list", "hook", "getter", "fx"])
def test_timm_gives_all_channels_of_features(kind):
    torch.manual_seed(0)
    network = timm.create_model("resnet18", features_only=True, feature_cls=kind, out_indices=(1, 2)).eval()
    x = torch.randn(1, 3, 40, 40)
    torch.manual_seed(0)
    whole = octavize(timm.create_model("resnet18").eval(), {"layer": 0.25})
    octavize(network, {"layer": 0.25})
    with torch.no_grad():
        for found, y in zip(network(x), wanted_features(whole, ("layer1", "layer2"), x).values(), strict=True):
            assert np.array_equal(np.asarray(found), np.asarray(y))


@pytest.mark.parametrize(
    "make", [lambda: small("i3d_r50", 0), lambda: small("i3d_r50", 0.25), lambda: octavize(resnet18())]
)
@pytest.mark.filterwarnings("ignore")
def test_script_names_what_compiles_instead(make):
    with pytest.raises(ValueError, match=r"cannot compile \w+, .*: use torch\.jit\.trace or torch\.export"):
        torch.jit.script(make())


def test_fvcore_and_the_summary_of_lightning_count_the_multiply_adds(network, clip):
    from fvcore.nn import FlopCountAnalysis
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.example_input_array = network, clip[:1]

        def forward(self, x):
            return self.network(x)

    wanted = count_macs(network, SIZE)
    counted = FlopCountAnalysis(network, clip[:1]).unsupported_ops_warnings(False).by_operator()
    assert counted["conv"] + counted["linear"] == wanted
    summary = ModelSummary(Module(), max_depth=6)
    assert summary.total_flops == 2 * wanted
    assert [1, 8, 8, 8, 8] in summary.out_sizes  # of a convolution of six high channels and two low ones


def test_torchinfo_shows_vanilla_multiply_adds(network, clip):
    torchinfo = pytest.importorskip("torchinfo")
    totals = [torchinfo.summary(net, input_data=clip, verbose=0) for net in (network, small("i3d_r50", 0))]
    assert totals[0].total_mult_adds == totals[1].total_mult_adds
    assert totals[0].total_params == totals[1].total_params


def octave_macs(layer, inputs, output):
    layer.total_ops += count_macs_of(lambda: layer.forward(*inputs))


def test_thop_counts_octave_layers_by_a_rule(network, clip):
    thop = pytest.importorskip("thop")
    counts = []
    for alpha, rules in ((0, {}), (0.25, {OctConv3d: octave_macs})):
        net = small("i3d_r50", alpha)
        macs, _ = thop.profile(net, inputs=(clip[:1],), verbose=False, custom_ops=rules)
        counts.append(macs - count_macs(net, SIZE))
    assert counts[0] == counts[1] > 0  # norms and pools, by their vanilla sizes


def test_ptflops_counts_by_the_aten_backend(network):
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    macs, _ = ptflops.get_model_complexity_info(network, SIZE, backend="aten", **options)
    assert macs == pytest.approx(count_macs(network, SIZE), rel=1e-5)


@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM", "LayerCAM", "GradCAMPlusPlus", "EigenCAM"])
def test_pytorch_grad_cam_maps_octave_layers_as_merged_ones(method):
    library = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network, x, targets = five_layers(0.25), torch.randn(2, 3, 8, 8, 8), [ClassifierOutputTarget(1)] * 2
    merging = nn.Sequential(*network[:2], Merged(), *network[2:])
    with getattr(library, method)(network, [network[1]]) as cam:
        found = cam(x, targets)
    with getattr(library, method)(merging, [merging[2].tensor]) as cam:
        wanted = cam(x, targets)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.any()
