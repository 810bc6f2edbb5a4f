"""Checkpoints of other projects, written here in their form, loaded into ours: values, logits, reports, refusals."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import settle
from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from octvideo import create_model, octavize
from octvideo.models.weights import load_weights

WIDTH = 16
CROP = 64  # maps of 2 x 2 before the classifier


def floating(network):
    return [name for name, tensor in network.state_dict().items() if tensor.is_floating_point()]


def save(state, path, **others):
    torch.save({"model_state": state, **others} if others else state, path)
    return path


def in_pyslowfasts_form(network, path):
    """Saves a network of pytorchvideo as PySlowFast would, its names put together from the modules."""
    layers = {}
    blocks = [block for block in network.blocks if next(block.parameters(), None) is not None]
    for stage, block in enumerate(blocks, 1):
        for pathway, part in enumerate(getattr(block, "multipathway_blocks", [block])):
            place = f"s{stage}.pathway{pathway}"
            if stage == 1 and hasattr(part.conv, "conv_t"):
                layers[f"{place}_stem.conv_xy"], layers[f"{place}_stem.conv"] = part.conv.conv_t, part.conv.conv_xy
            elif stage == 1:
                layers[f"{place}_stem.conv"] = part.conv
            if stage == 1:
                layers[f"{place}_stem.bn"] = part.norm
            for i, unit in enumerate(getattr(part, "res_blocks", [])):
                name, branch = f"{place}_res{i}", unit.branch2
                layers[f"{name}.branch1"], layers[f"{name}.branch1_bn"] = unit.branch1_conv, unit.branch1_norm
                for letter in "abc":
                    layers[f"{name}.branch2.{letter}"] = getattr(branch, f"conv_{letter}")
                    layers[f"{name}.branch2.{letter}_bn"] = getattr(branch, f"norm_{letter}")
                if isinstance(branch.norm_b, nn.Sequential):
                    layers[f"{name}.branch2.b_bn"] = branch.norm_b[0]
                    if hasattr(branch.norm_b[1], "block"):
                        squeeze, _, excite, _ = branch.norm_b[1].block
                        layers[f"{name}.branch2.se.fc1"], layers[f"{name}.branch2.se.fc2"] = squeeze, excite
                if hasattr(unit, "non_local"):
                    for part_name in ("conv_theta", "conv_phi", "conv_g", "conv_out"):
                        layers[f"{place}_nonlocal{i}.{part_name}"] = getattr(unit.non_local, part_name)
                    layers[f"{place}_nonlocal{i}.bn"] = unit.non_local.norm
        if hasattr(getattr(block, "multipathway_fusion", None), "norm"):
            layers[f"s{stage}_fuse.conv_f2s"] = block.multipathway_fusion.conv_fast_to_slow
            layers[f"s{stage}_fuse.bn"] = block.multipathway_fusion.norm
    head = blocks[-1]
    layers["head.projection"] = head.proj
    if hasattr(head.pool, "pre_conv"):
        layers["head.conv_5"], layers["head.conv_5_bn"] = head.pool.pre_conv, head.pool.pre_norm
        layers["head.lin_5"] = head.pool.post_conv
    state = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        if layer is not None
        for key, tensor in layer.state_dict().items()
    }
    assert len(state) == len(network.state_dict())
    return save(state, path, epoch=195, cfg="MODEL:\n  ARCH: slowfast\n", optimizer_state={"state": {}})


@pytest.fixture
def pyslowfasts_slowfast(tmp_path):
    torch.manual_seed(0)
    network = create_slowfast(
        stem_dim_outs=(WIDTH, WIDTH // 8),
        slowfast_fusion_conv_kernel_size=(7, 1, 1),
        head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)),
    )
    return settle(network), in_pyslowfasts_form(network, tmp_path / "SLOWFAST_8x8_R50.pyth")


def test_pyslowfasts_slowfast_is_matched_whole_and_gives_its_logits(pyslowfasts_slowfast, capsys):
    theirs, path = pyslowfasts_slowfast
    ours = create_model("slowfast_r50", width=WIDTH, alpha=0.25).eval()
    report = load_weights(ours, path)
    assert sorted(report.matched) == sorted(floating(ours))
    assert (report.inflated, report.joined, report.skipped, report.missing) == ((), (), {}, ())
    assert report.source == "PySlowFast"
    assert capsys.readouterr().out == f"{report}\n"
    assert str(report) == (f"weights from {path} (PySlowFast): 552 of 552 tensors: 552 matched, 0 inflated, 0 joined")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    clip = torch.randn(1, 3, 8, CROP, CROP)
    with torch.no_grad():
        wanted = theirs([clip.index_select(2, torch.tensor([0, 7])), clip.clone()])
        assert torch.equal(octavize(ours, 0)(clip), wanted)


def test_another_number_of_classes_keeps_the_new_head(pyslowfasts_slowfast):
    ours = create_model("slowfast_r50", width=WIDTH, num_classes=5)
    head = {name: tensor.clone() for name, tensor in ours.blocks[-1].proj.state_dict().items()}
    report = load_weights(ours, pyslowfasts_slowfast[1])
    reason = "400 -> 5 classes: new head"
    assert report.skipped == {"blocks.6.proj.weight": reason, "blocks.6.proj.bias": reason}
    assert report.missing == ("blocks.6.proj.weight", "blocks.6.proj.bias")
    assert f"550 of 552 tensors: 550 matched, 0 inflated, 0 joined\n  skipped: blocks.6.proj.weight ({reason})" in str(
        report
    )
    assert all(torch.equal(tensor, head[name]) for name, tensor in ours.blocks[-1].proj.state_dict().items())


def test_pyslowfasts_i3d_gives_its_logits(tmp_path):
    torch.manual_seed(0)
    theirs = create_resnet(
        stem_dim_out=WIDTH,
        stem_conv_kernel_size=(5, 7, 7),
        stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)]),
        head_pool_kernel_size=(2, 2, 2),
    )
    ours = create_model("i3d_r50", width=WIDTH).eval()
    report = load_weights(ours, in_pyslowfasts_form(settle(theirs), tmp_path / "I3D_8x8_R50.pyth"))
    assert len(report.matched) == 53 * 5 + 2
    assert not report.skipped
    clip = torch.randn(1, 3, 4, CROP, CROP)
    with torch.no_grad():
        assert torch.equal(ours(clip), theirs(clip))


def test_pyslowfasts_non_local_blocks_are_known(tmp_path):
    torch.manual_seed(0)
    theirs, ours = (create_model("i3d_r50_nonlocal", width=WIDTH).eval() for _ in range(2))
    path = in_pyslowfasts_form(settle(theirs), tmp_path / "I3D_NLN_8x8_R50.pyth")
    names = torch.load(path)["model_state"].keys()
    assert {"s3.pathway0_nonlocal1.conv_theta.bias", "s4.pathway0_nonlocal5.bn.running_var"} <= names
    report = load_weights(ours, path)
    assert len(report.matched) == 53 * 5 + 2 + 5 * (4 * 2 + 4)
    assert not report.skipped
    assert not report.missing
    clip = torch.randn(1, 3, 4, CROP, CROP)
    with torch.no_grad():
        assert torch.equal(ours(clip), theirs(clip))


def test_a_network_may_call_its_blocks_by_name(image_resnet, tmp_path):
    model = nn.ModuleDict({"blocks": nn.ModuleDict({"first": nn.Linear(3, 4)})})
    path = save({name: tensor + 1 for name, tensor in model.state_dict().items()}, tmp_path / "x.pth")
    assert load_weights(model, path).matched == ("blocks.first.weight", "blocks.first.bias")
    with pytest.raises(ValueError, match="has values for 0 of 2"):
        load_weights(model, image_resnet[1])


def test_create_model_starts_from_weights_at_any_alpha(pyslowfasts_slowfast):
    theirs, path = pyslowfasts_slowfast
    network = create_model("slowfast_r50", width=WIDTH, alpha=0.25, weights=path)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_pyslowfasts_x3d_gives_its_logits_also_where_only_it_normalises_a_shortcut(tmp_path):
    torch.manual_seed(0)
    theirs = create_x3d(input_clip_length=4, input_crop_size=CROP, head_activation=None)
    theirs.blocks[1].res_blocks[0].branch1_norm = nn.BatchNorm3d(24)
    ours = create_model("x3d_xs").eval()
    path = in_pyslowfasts_form(settle(theirs), tmp_path / "X3D_M.pyth")
    assert torch.load(path)["model_state"]["s1.pathway0_stem.conv_xy.weight"].shape == (24, 3, 1, 3, 3)
    report = load_weights(ours, path)
    assert report.joined == ("blocks.1.res_blocks.0.branch1_conv.weight", "blocks.1.res_blocks.0.branch2.norm_c.bias")
    assert sorted(report.matched + report.joined) == sorted(floating(ours))
    assert not report.skipped
    clip = torch.randn(1, 3, 4, CROP, CROP)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(clip), rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def image_resnet(tmp_path_factory):
    """A 2-D ResNet-50, and its checkpoint."""
    torch.manual_seed(0)
    network = settle(ResNet(Bottleneck, [3, 4, 6, 3]))
    return network, save(network.state_dict(), tmp_path_factory.mktemp("image") / "resnet50.pth")


@pytest.mark.parametrize(("name", "inflate"), [("c2d_r50", "mean"), ("c2d_r50", "center"), ("i3d_r50", "center")])
def test_an_inflated_image_network_sees_in_a_still_clip_what_it_saw_in_the_image(image_resnet, name, inflate):
    image_network, path = image_resnet
    network = create_model(name).eval()
    report = load_weights(network, path, inflate=inflate)
    assert report.source == "2-D ResNet"
    assert len(report.inflated) == 53
    assert len(report.matched) == 53 * 4
    assert set(report.skipped.values()) == {"1000 -> 400 classes: new head"}
    image = torch.randn(1, 3, CROP, CROP)
    features = []
    for module in (image_network.fc, network.blocks[-1].proj):
        module.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].flatten()))
    with torch.no_grad():
        image_network(image)
        network(image.unsqueeze(2).expand(-1, -1, 8, -1, -1))
    image_network.fc._forward_pre_hooks.clear()
    torch.testing.assert_close(features[1], features[0], rtol=1e-4, atol=1e-5)


def test_mean_inflation_spreads_a_weight_evenly_over_the_frames(image_resnet):
    network = create_model("i3d_r50")
    load_weights(network, image_resnet[1])
    weight, flat = network.blocks[0].conv.weight, image_resnet[0].conv1.weight
    assert weight.shape == (64, 3, 5, 7, 7)
    torch.testing.assert_close(weight.sum(2), flat)
    assert torch.equal(weight[:, :, 0], weight[:, :, 4])


def test_slowfast_takes_an_image_network_as_its_slow_pathway(image_resnet):
    network = create_model("slowfast_r50")
    report = load_weights(network, image_resnet[1])
    shortcut = "blocks.1.multipathway_blocks.0.res_blocks.0.branch1_conv.weight"
    assert report.skipped[shortcut] == "shape (256, 64, 1, 1) does not fit (256, 80, 1, 1, 1)"
    assert report.skipped["blocks.6.proj.weight"] == "1000 -> 400 classes: new head"
    assert len(report.matched) + len(report.inflated) == 53 * 5 - 8  # two weights of each stage read the fast pathway
    assert len(report.matched) + len(report.inflated) + len(report.missing) == 552
    slow = network.blocks[4].multipathway_blocks[0].res_blocks[2].branch2.conv_b.weight
    assert torch.equal(slow[:, :, 0], image_resnet[0].layer4[2].conv2.weight)
    assert not any("multipathway_blocks.1" in name for name in report.matched + report.inflated)


def test_a_head_that_fits_only_in_its_classes_stays_out_whole(tmp_path):
    torch.save(ResNet(Bottleneck, [3, 4, 6, 3], num_classes=400).state_dict(), tmp_path / "x.pth")
    report = load_weights(create_model("slowfast_r50"), tmp_path / "x.pth")
    assert report.skipped["blocks.6.proj.weight"] == "shape (400, 2048) for (400, 2304): new head"
    assert report.skipped["blocks.6.proj.bias"].endswith("new head")


def test_timms_names_are_known(tmp_path):
    theirs = settle(timm.create_model("resnet50", num_classes=400))
    network = create_model("slow_r50")
    report = load_weights(network, save(theirs.state_dict(), tmp_path / "timm.pth"))
    assert len(report.inflated) == 53
    assert len(report.matched) == 53 * 4 + 2  # with the classifier: 400 classes
    assert not report.missing
    assert not report.skipped
    shortcut = network.blocks[2].res_blocks[0]
    assert torch.equal(shortcut.branch1_conv.weight[:, :, 0], theirs.layer2[0].downsample[0].weight)
    assert torch.equal(shortcut.branch1_norm.running_var, theirs.layer2[0].downsample[1].running_var)
    assert torch.equal(network.blocks[-1].proj.weight, theirs.fc.weight)


class FourBlocks(nn.Module):
    """An octave convolution as four convolutions, the way other projects write it; a map without channels is None."""

    def __init__(self, inputs, outputs, kernel, alpha_in, alpha_out, stride=1, bias=False, groups=1):
        super().__init__()
        sizes = {"h": (inputs - int(alpha_in * inputs), outputs - int(alpha_out * outputs))}
        sizes["l"] = (int(alpha_in * inputs), int(alpha_out * outputs))
        self.pooled = stride == 2
        for way in ("h2h", "h2l", "l2h", "l2l"):
            channels = sizes[way[0]][0], sizes[way[2]][1]
            if min(channels):
                convolution = nn.Conv2d(*channels, kernel, padding=kernel // 2, bias=bias, groups=groups)
                setattr(self, f"conv_{way}", convolution)

    def forward(self, x):
        high, low = x
        if self.pooled:
            high = F.avg_pool2d(high, 2)
        to_high = self.conv_h2h(high)
        to_low = self.conv_h2l(F.avg_pool2d(high, 2)) if hasattr(self, "conv_h2l") else None
        if low is not None:
            from_low = self.conv_l2h(low)
            to_high = to_high + (from_low if self.pooled else F.interpolate(from_low, scale_factor=2))
            if to_low is not None:
                to_low = to_low + self.conv_l2l(F.avg_pool2d(low, 2) if self.pooled else low)
        return to_high, to_low


class NormedFourBlocks(nn.Module):
    def __init__(self, inputs, outputs, kernel, alpha_in, alpha_out, stride=1, groups=1):
        super().__init__()
        self.conv = FourBlocks(inputs, outputs, kernel, alpha_in, alpha_out, stride, groups=groups)
        self.bn_h = nn.BatchNorm2d(outputs - int(alpha_out * outputs))
        self.bn_l = nn.BatchNorm2d(int(alpha_out * outputs)) if alpha_out else None

    def forward(self, x):
        high, low = self.conv(x)
        return self.bn_h(high), None if low is None else self.bn_l(low)


class FourBlockUnit(nn.Module):
    def __init__(self, inputs, width, outputs, alpha_in, alpha_out, stride, groups=1):
        super().__init__()
        self.conv1 = NormedFourBlocks(inputs, width, 1, alpha_in, alpha_out)
        self.conv2 = NormedFourBlocks(width, width, 3, alpha_out, alpha_out, stride, groups)
        self.conv3 = NormedFourBlocks(width, outputs, 1, alpha_out, alpha_out)
        self.downsample = None
        if stride == 2 or inputs != outputs:
            self.downsample = nn.Sequential(NormedFourBlocks(inputs, outputs, 1, alpha_in, alpha_out, stride))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for convolution in (self.conv1, self.conv2):
            x = [None if map is None else map.relu() for map in convolution(x)]
        return [None if a is None else (a + b).relu() for a, b in zip(self.conv3(x), shortcut, strict=True)]


class FourBlockResNet(nn.Module):
    """A ResNet with bottlenecks, octave in layer1 to layer3, of torchvision's sizes."""

    def __init__(self, depths, width, classes, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        channels, alpha = 64, 0
        for stage, depth in enumerate(depths):
            layer = nn.Sequential()
            for i in range(depth):
                alpha_in, alpha = alpha, 0.5 if stage < 3 else 0
                stride = 2 if stage and not i else 1
                layer.append(
                    FourBlockUnit(channels, width * groups * 2**stage, 256 * 2**stage, alpha_in, alpha, stride, groups)
                )
                channels = 256 * 2**stage
            setattr(self, f"layer{stage + 1}", layer)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = [F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1), None]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(x[0].mean((2, 3)))


def test_octave_layers_of_four_blocks_are_joined_and_compute_the_same(tmp_path):
    torch.manual_seed(0)
    theirs = settle(FourBlockResNet([2, 1, 2, 1], 8, 10)).double()
    ours = ResNet(Bottleneck, [2, 1, 2, 1], num_classes=10, width_per_group=8).double().eval()
    path = save(theirs.state_dict(), tmp_path / "oct_resnet.pth")
    octavize(ours, {"layer[123]": 0.5, "layer4": 0}, downsample="pool")  # theirs pools for every stride but the stem's
    report = load_weights(ours, path)
    assert report.source == "octave layers of four blocks"
    assert sorted(report.matched) == sorted(
        [
            "conv1.weight",
            "fc.weight",
            "fc.bias",
            *(f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        ]
    )
    assert not report.skipped
    assert not report.missing
    assert ours.layer1[0].downsample[1].weight.shape == (256,)
    images = torch.randn(2, 3, CROP, CROP, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-10, atol=1e-10)


def test_joined_blocks_are_inflated_too(tmp_path):
    theirs = FourBlockResNet([3, 4, 6, 3], 64, 10)
    network = create_model("c2d_r50", alpha=0.5)
    report = load_weights(network, save(theirs.state_dict(), tmp_path / "x.pth"))
    assert len(report.joined) == 52 * 5
    joined, blocks = network.blocks[1].res_blocks[1].branch2.conv_b.weight, theirs.layer1[1].conv2.conv
    for rows, columns, way in (
        (slice(32), slice(32), "h2h"),
        (slice(32), slice(32, 64), "l2h"),
        (slice(32, 64), slice(32), "h2l"),
        (slice(32, 64), slice(32, 64), "l2l"),
    ):
        assert torch.equal(joined[rows, columns, 0], getattr(blocks, f"conv_{way}").weight), way


def test_a_bare_layer_of_four_blocks_has_its_biases_added(tmp_path):
    torch.manual_seed(0)
    theirs = nn.Sequential(FourBlocks(3, 8, 3, 0, 0.5, bias=True), FourBlocks(8, 6, 3, 0.5, 0, bias=True)).double()
    ours = octavize(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)), {"0": 0.5}).double()
    report = load_weights(ours, save(theirs.state_dict(), tmp_path / "x.pth"))
    assert sorted(report.joined) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs((x, None))[0], rtol=1e-10, atol=1e-10)


def test_a_normed_layer_of_four_blocks_with_another_name_gives_its_weight_and_count_of_batches(tmp_path):
    theirs = nn.ModuleDict({"squeeze": NormedFourBlocks(8, 8, 1, 0.5, 0.5), "conv2": NormedFourBlocks(8, 8, 1, 0.5, 0)})
    theirs["conv2"].bn_h.num_batches_tracked.fill_(7)
    ours = nn.ModuleDict({"squeeze": nn.Conv2d(8, 8, 1, bias=False), "conv2": nn.Conv2d(8, 8, 1, bias=False)})
    ours["bn2"] = nn.BatchNorm2d(8)
    report = load_weights(ours, save({**theirs.state_dict(), 3: torch.zeros(1)}, tmp_path / "x.pth"))
    assert torch.equal(ours["squeeze"].weight[:4, 4:], theirs["squeeze"].conv.conv_l2h.weight)
    assert report.skipped.keys() == {f"squeeze.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert ours["bn2"].num_batches_tracked == 7


def test_four_blocks_of_a_grouped_layer_are_skipped_with_the_reason(tmp_path):
    theirs = FourBlockResNet([1, 1, 1, 1], 4, 10, groups=2)
    ours = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=2, width_per_group=4)
    report = load_weights(ours, save(theirs.state_dict(), tmp_path / "x.pth"))
    assert (
        report.skipped["layer1.0.conv2.weight"]
        == "the four blocks of a layer of 2 groups cannot be merged into one weight"
    )
    assert "layer1.0.conv1.weight" in report.joined


def test_one_process_on_each_machine_prints_the_report(tmp_path, monkeypatch, capsys):
    path = save(nn.Linear(3, 4).state_dict(), tmp_path / "x.pth")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        load_weights(nn.Linear(3, 4), path)
        assert capsys.readouterr().out.count("2 of 2 tensors") == lines


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model_state": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"network._orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "lightning", "ddp", "compiled", "all"],
)
def test_containers_and_prefixes_of_wrappers_are_removed(wrap, tmp_path):
    torch.manual_seed(0)
    trained = settle(create_model("c2d_r50", width=8, num_classes=3))
    torch.save(wrap(trained.state_dict()), tmp_path / "x.ckpt")
    network = create_model("c2d_r50", width=8, num_classes=3)
    report = load_weights(torch.compile(network), tmp_path / "x.ckpt")
    assert len(report.matched) == 53 * 5 + 2
    assert not report.skipped
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_wrappers_word_that_is_the_models_own_part_stays(tmp_path):
    model = nn.ModuleDict({"network": nn.Linear(2, 3)})
    torch.save(
        {f"network.{name}": tensor + 1 for name, tensor in model["network"].state_dict().items()}, tmp_path / "x"
    )
    before = model["network"].weight.detach().clone()
    load_weights(model, tmp_path / "x")
    assert torch.equal(model["network"].weight, before + 1)


def test_fewer_than_half_is_refused_and_changes_nothing(tmp_path):
    torch.manual_seed(0)
    network = create_model("c2d_r50", width=8, num_classes=3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    few = {name: tensor + 1 for name, tensor in list(before.items())[:60]}
    torch.save({**few, "unknown.weight": torch.zeros(3)}, tmp_path / "few.pth")
    with pytest.raises(
        ValueError, match=r"few.pth \(pytorchvideo\) has values for 50 of 267 tensors of Net, fewer than"
    ) as error:
        load_weights(network, tmp_path / "few.pth")
    assert "Left over in the file: unknown.weight (not in the model)" in str(error.value)
    assert "Without a value in the model: blocks." in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    torch.save(create_model("c2d_r50", width=16, num_classes=3).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        ValueError,
        match=r"half: its layers have other sizes, as with another model.name, model.width or depth; .*"
        r"blocks.0.conv.weight \(shape \(16, 3, 1, 7, 7\) does not fit \(8, 3, 1, 7, 7\)\)",
    ):
        load_weights(network, tmp_path / "wide.pth")


def test_parts_around_a_network_of_the_zoo_keep_their_names_and_values(pyslowfasts_slowfast):
    network = create_model("slowfast_r50", width=WIDTH)
    network.extra = nn.Linear(3, 4)
    report = load_weights(network, pyslowfasts_slowfast[1])
    assert len(report.matched) == 552
    assert report.missing == ("extra.weight", "extra.bias")


def test_another_networks_names_are_refused(image_resnet, pyslowfasts_slowfast):
    with pytest.raises(ValueError, match=r"\(PySlowFast\) has values for 0 of 2 tensors of ModuleDict"):
        load_weights(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(3, 4))}), pyslowfasts_slowfast[1])
    with pytest.raises(ValueError, match="has values for 0 of 0 tensors of ReLU"):
        load_weights(nn.ReLU(), image_resnet[1])
    with pytest.raises(ValueError, match=r"\(2-D ResNet\) has values for 0 of 2 tensors of Linear"):
        load_weights(nn.Linear(3, 4), image_resnet[1])
    with pytest.raises(ValueError, match=r"\(PySlowFast\) has values for 0 of 2 tensors of Linear"):
        load_weights(nn.Linear(3, 4), pyslowfasts_slowfast[1])


def test_files_without_tensors_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(ValueError, match=r"x.pth: no such file"):
        load_weights(nn.Linear(3, 4), path)
    with pytest.raises(ValueError, match=r"a folder without config\.json and model\.safetensors"):
        load_weights(nn.Linear(3, 4), tmp_path)
    for content in (b"", b"plain text", b"\x80\x02" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no checkpoint that torch.load.* reads: cut, damaged or of another kind"):
            load_weights(nn.Linear(3, 4), path)
    torch.save({"model_state": {"weight": [1.0]}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="no tensors in it; it holds model_state, epoch"):
        load_weights(nn.Linear(3, 4), path)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
        load_weights(nn.Linear(3, 4), path)


class Trainer:
    """What a checkpoint with whole objects in it may hold."""


@pytest.mark.parametrize("zip_file", [True, False])
def test_cut_files_and_files_with_objects_are_refused(zip_file, tmp_path):
    weights = nn.Linear(3, 4).state_dict()
    torch.save(weights, tmp_path / "whole.pth", _use_new_zipfile_serialization=zip_file)
    content = (tmp_path / "whole.pth").read_bytes()
    for length in range(1, len(content) - 40, len(content) // 20):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut.pth: no checkpoint that torch.load\(weights_only=True\) reads"):
            load_weights(nn.Linear(3, 4), tmp_path / "cut.pth")
    torch.save({"model": weights, "trainer": Trainer()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zip_file)
    with pytest.raises(ValueError, match=r"reads: it holds a test_weights.Trainer; save a state_dict"):
        load_weights(nn.Linear(3, 4), tmp_path / "x.pth")


def test_an_unknown_inflation_is_refused():
    with pytest.raises(ValueError, match="inflate must be 'mean' or 'center', got 'median'"):
        load_weights(nn.Linear(3, 4), "x.pth", inflate="median")


class TinyVideo(nn.Module):
    """Two parts with prefixes of their own."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)), nn.Linear(4, 2)


def below(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


AROUND = {"criterion.weight": torch.ones(2), "blocks.9.weight": torch.ones(3, 3), "n_averaged": torch.tensor(7)}


@pytest.mark.parametrize(
    ("wrap", "beside"),
    [
        (lambda state: {"state_dict": below("model.", state) | AROUND, "epoch": 1}, AROUND),
        (lambda state: below("net.", state) | AROUND, AROUND),
        (lambda state: {"n_averaged": AROUND["n_averaged"]} | below("module.", state), ["n_averaged"]),
        (lambda state: below("module.model._orig_mod.encoder.video.", state), ()),
        (lambda state: {"backbone": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}, ()),
        (lambda state: {"trainer": {"model_ema": {"module": below("network.", state)}}}, ()),
        (lambda state: {"module": below("module.", state), "global_steps": 3}, ()),  # DeepSpeed
        (lambda state: {"params": state | AROUND, "size": torch.tensor(9)}, [*AROUND, "size"]),
    ],
    ids=["lightning", "net", "averaged", "deep", "backbone", "nested", "deepspeed", "params"],
)
@pytest.mark.parametrize("new", [TinyVideo, lambda: create_model("c2d_r50", width=4, num_classes=2)])
def test_the_prefix_below_which_most_fits_is_found_and_the_rest_is_named(new, wrap, beside, tmp_path):
    torch.manual_seed(0)
    trained, model = settle(new()), new()
    torch.save(wrap(trained.state_dict()), tmp_path / "x.pth")
    report = load_weights(model, tmp_path / "x.pth")
    assert report.missing == ()
    assert report.skipped == dict.fromkeys(beside, "not in the model")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("model_ema", "model"), "model"),
        (("state_dict_ema", "state_dict"), "state_dict"),
        (("teacher", "student"), "teacher"),
        (("student", "teacher"), "student"),
    ],
)
def test_of_several_that_fit_the_weights_in_use_count_or_the_first(names, taken, tmp_path):
    states = {name: below("module.", settle(TinyVideo()).state_dict()) for name in names}
    torch.save(states, tmp_path / "x.pth")
    model = TinyVideo()
    assert not load_weights(model, tmp_path / "x.pth").skipped
    assert all(torch.equal(tensor, states[taken][f"module.{name}"]) for name, tensor in model.state_dict().items())


def test_of_several_the_one_whose_shapes_fit_counts(tmp_path):
    narrow, wide = (create_model("c2d_r50", width=width, num_classes=2).state_dict() for width in (4, 8))
    torch.save({"model": wide, "distilled": narrow}, tmp_path / "x.pth")
    model = create_model("c2d_r50", width=4, num_classes=2)
    load_weights(model, tmp_path / "x.pth")
    assert torch.equal(model.blocks[0].conv.weight, narrow["blocks.0.conv.weight"])
    torch.save({"student": below("net.", wide)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"blocks.0.conv.weight \(shape \(8, 3, 1, 7, 7\) does not fit \(4, 3, 1, 7"):
        load_weights(model, tmp_path / "x.pth")


@pytest.mark.parametrize("prefix", ["model.", "module.net."])
def test_other_projects_names_are_known_below_a_prefix_too(pyslowfasts_slowfast, image_resnet, prefix, tmp_path):
    theirs, path = pyslowfasts_slowfast
    state = below(prefix, torch.load(path)["model_state"])
    torch.save({"state_dict": state | {"loss.weight": torch.ones(2)}}, tmp_path / "x.pth")
    ours = create_model("slowfast_r50", width=WIDTH)
    report = load_weights(ours, tmp_path / "x.pth")
    assert (report.source, len(report.matched)) == ("PySlowFast", 552)
    assert report.skipped == {"loss.weight": "not in the model"}
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    torch.save({"backbone": below(prefix, image_resnet[0].state_dict()), "fc.bias": torch.ones(9)}, tmp_path / "x.pth")
    report = load_weights(create_model("slow_r50"), tmp_path / "x.pth")
    assert (report.source, len(report.inflated), report.skipped["fc.bias"]) == ("2-D ResNet", 53, "not in the model")
    blocks = below(prefix, FourBlockResNet([3, 4, 6, 3], 64, 10).state_dict())
    torch.save({"network": blocks | {"temperature": torch.ones(1)}}, tmp_path / "x.pth")
    report = load_weights(create_model("c2d_r50", alpha=0.5), tmp_path / "x.pth")
    assert (report.source, len(report.joined)) == ("octave layers of four blocks", 52 * 5)
    assert "temperature" in report.skipped
