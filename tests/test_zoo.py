"""The zoo: published sizes and costs, pytorchvideo's numbers, weights that mean the same at every alpha."""

import functools

import pytest
import torch
from conftest import settle
from pytorchvideo.layers.nonlocal_net import create_nonlocal
from pytorchvideo.models.csn import create_csn
from pytorchvideo.models.r2plus1d import create_r2plus1d
from pytorchvideo.models.resnet import create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from torch import nn

from octvideo import MODELS, Octaves, OctConv3d, create_model, octavize
from octvideo.layers.resampling import channels_last
from octvideo.models.cost import count_macs, count_parameters
from octvideo.models.zoo import HeadPool, NonLocalBlock, set_alpha

PAPERS = ("c2d_r50", "i3d_r50", "slow_r50", "slowfast_r50")
PARAMETERS = {"c2d_r50": 24_327_632, "i3d_r50": 28_043_472, "slow_r50": 32_454_096, "slowfast_r50": 34_566_488}
ALPHAS = (0, 0.1, 0.125, 0.2, 0.25, 0.5)
GIGA_MACS = {  # one 224 x 224 clip of 8 (SlowFast: 32) frames at these alphas
    "c2d_r50": (19.493, 17.506, 16.949, 15.650, 14.710, 11.150),
    "i3d_r50": (28.408, 25.781, 25.049, 23.333, 22.102, 17.444),
    "slow_r50": (41.741, 37.524, 36.383, 33.581, 31.659, 24.111),
    "slowfast_r50": (50.309, 45.504, 44.109, 40.916, 38.636, 29.867),
}


@functools.cache
def network_without_data(name):
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("column", range(len(ALPHAS)))
def test_parameters_and_macs_are_the_published_ones(name, column):
    network = set_alpha(network_without_data(name), ALPHAS[column])
    assert count_parameters(network) == PARAMETERS[name]
    frames = 32 if name == "slowfast_r50" else 8
    macs = count_macs(network, (3, frames, 224, 224)) / 1e9
    assert macs == pytest.approx(GIGA_MACS[name][column], rel=1e-3)


def test_slowfast_has_its_published_cost_at_256():
    network = set_alpha(network_without_data("slowfast_r50"), 0)
    assert count_macs(network, (3, 32, 256, 256)) / 1e9 == pytest.approx(65.71, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_runs_with_all_channels_low(name):
    network = create_model(name, width=16, alpha=(1, 1, 1, 1), num_classes=5)
    assert network(torch.randn(2, 3, 4, 40, 56)).shape == (2, 5)


def pytorchvideos_own(name, frames, width):
    """The network as pytorchvideo publishes it, its heads' windows set for the number of frames."""
    kernels = {
        "c2d_r50": ((1, 7, 7), ((1, 1, 1),) * 4),
        "i3d_r50": ((5, 7, 7), ((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)])),
        "slow_r50": ((1, 7, 7), ((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1))),
    }
    if name == "slowfast_r50":
        return create_slowfast(
            stem_dim_outs=(width, width // 8),
            slowfast_fusion_conv_kernel_size=(7, 1, 1),
            head_pool_kernel_sizes=((frames // 4, 7, 7), (frames, 7, 7)),
        )
    if name.startswith("x3d"):
        return create_x3d(
            input_clip_length=frames,
            input_crop_size={"x3d_xs": 160, "x3d_s": 160, "x3d_m": 224, "x3d_l": 312}[name],
            depth_factor=5.0 if name == "x3d_l" else 2.2,
            stem_dim_in=width // 2,
            head_activation=None,
        )
    if name == "csn_r101":
        return create_csn(
            model_depth=101, stem_dim_out=width, stem_pool=nn.MaxPool3d, head_pool_kernel_size=(frames // 8, 7, 7)
        )
    if name == "r2plus1d_r50":
        return create_r2plus1d(stem_dim_out=width, head_pool_kernel_size=(frames // 4, 7, 7), head_activation=None)
    stem, stages = kernels[name]
    return create_resnet(
        stem_dim_out=width,
        stem_conv_kernel_size=stem,
        stage1_pool=None if name == "slow_r50" else nn.MaxPool3d,
        stage_conv_a_kernel_size=stages,
        head_pool_kernel_size=(frames if name == "slow_r50" else frames // 2, 7, 7),
    )


@functools.cache
def ours_and_theirs(name):
    torch.manual_seed(0)
    ours = settle(create_model(name, width=16))
    theirs = pytorchvideos_own(name, 8, 16).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", MODELS)
def test_no_network_ends_in_a_softmax(name):
    with torch.device("meta"):
        assert not [module for module in create_model(name).modules() if isinstance(module, nn.Softmax)]


@pytest.mark.parametrize("crop", [224, 256])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("_nonlocal")])
def test_alpha_zero_gives_pytorchvideos_logits_bit_for_bit(name, crop):
    ours, theirs = ours_and_theirs(name)
    torch.manual_seed(0)
    crop += 96 if name == "x3d_l" else 0  # its head's window is 10 positions
    clip = torch.randn(1, 3, 8, crop, crop)
    pathways = [clip.index_select(2, torch.tensor([0, 7])), clip.clone()]
    with torch.no_grad():
        assert torch.equal(ours(clip), theirs(pathways if name == "slowfast_r50" else clip))


def test_a_non_local_block_is_pytorchvideos():
    torch.manual_seed(0)
    ours = settle(NonLocalBlock(16))
    theirs = create_nonlocal(dim_in=16, dim_inner=8, pool_size=(1, 2, 2)).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 3, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    line = torch.randn(2, 16, 3, 1, 5)  # too small to be pooled by 2
    theirs.pool = None
    torch.testing.assert_close(ours(line), theirs(line))


def test_non_local_blocks_stand_where_the_paper_has_them_and_start_as_the_identity():
    torch.manual_seed(0)
    network = create_model("i3d_r50_nonlocal", width=16).eval()
    names = [name.removesuffix(".non_local") for name, _ in network.named_modules() if name.endswith(".non_local")]
    assert names == [f"blocks.{stage}.res_blocks.{i}" for stage, i in ((3, 1), (3, 3), (4, 1), (4, 3), (4, 5))]
    plain = create_model("i3d_r50", width=16).eval()
    assert set(plain.state_dict()) == {name for name in network.state_dict() if ".non_local." not in name}
    plain.load_state_dict(network.state_dict(), strict=False)
    clip = torch.randn(1, 3, 4, 48, 48)
    assert torch.equal(network(clip), plain(clip))


@pytest.mark.parametrize("name", MODELS)
def test_one_state_dict_loads_strictly_at_any_alpha_and_alpha_zero_restores(name):
    torch.manual_seed(0)
    vanilla = settle(create_model(name, width=16, num_classes=5))
    clip = torch.randn(1, 3, 8, 48, 48)
    with torch.no_grad():
        wanted = vanilla(clip)
        for alpha in (0.125, (0.25, 0.25, 0.5, 0.5), 1.0):
            network = create_model(name, alpha=alpha, width=16, num_classes=5).eval()
            network.load_state_dict(vanilla.state_dict(), strict=True)
            logits = network(clip)
            assert logits.shape == wanted.shape
            assert not torch.equal(logits, wanted)
            octavize(network, 0)
            assert not any(isinstance(module, OctConv3d) for module in network.modules())
            assert torch.equal(network(clip), wanted)


@functools.cache
def network_in_circles(name):
    torch.manual_seed(0)
    network = settle(create_model(name, width=16, num_classes=7)).double()
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.padding_mode = "circular"
        if isinstance(module, nn.MaxPool3d):
            module.padding = 0  # torch's pools cannot pad in a circle; the first one must not halve unevenly either
            module.kernel_size = module.stride
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return network


@pytest.mark.parametrize("size", [32, 40], ids=["even maps", "odd maps"])
@pytest.mark.parametrize("name", MODELS)
def test_a_clip_constant_in_space_has_the_same_logits_at_every_alpha(name, size):
    """Without detail a lower resolution loses nothing: only a channel out of order changes logits."""
    network = octavize(network_in_circles(name), 0)
    torch.manual_seed(0)
    clip = torch.randn(2, 3, 4, 1, 1, dtype=torch.float64).expand(-1, -1, -1, size, size)
    with torch.no_grad():
        wanted = network(clip)
        for alpha in (0.125, 0.25, 0.5):
            stages = {r"^blocks\.[1-5]\.": alpha}
            torch.testing.assert_close(octavize(network, stages)(clip), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["i3d_r50", "slowfast_r50", "x3d_xs", "r2plus1d_r50"])
def test_channels_last_is_the_fast_form_of_the_published_network(name):
    torch.manual_seed(0)
    published = settle(create_model(name, num_classes=5, width=16))
    fast = create_model(name, num_classes=5, width=16, channels_last=True).eval()
    fast.load_state_dict(published.state_dict())
    lost = []

    def look(module, _, y):
        if not channels_last(y):
            lost.append(module)

    for module in fast.modules():
        if isinstance(module, nn.Conv3d):
            assert isinstance(module, OctConv3d)
            module.register_forward_hook(look)
    clip = torch.randn(2, 3, 8, 64, 64)
    torch.testing.assert_close(fast(clip), published(clip), rtol=1e-3, atol=1e-4)
    assert not lost


def test_octave_networks_are_channels_last_everywhere_by_default_and_vanilla_ones_nowhere():
    convolutions = [
        module for module in create_model("i3d_r50", alpha=0.25, width=8).modules() if _is_convolution(module)
    ]
    assert all(module.channels_last for module in convolutions)
    assert not any(type(module) is OctConv3d for module in create_model("i3d_r50", width=8).modules())
    plain = create_model("i3d_r50", alpha=0.25, width=8, channels_last=False)
    assert not any(module.channels_last for module in plain.modules() if _is_convolution(module))


def _is_convolution(module):
    return isinstance(module, nn.Conv3d)


def test_octave_features_flow_through_the_octave_stages_only():
    network = create_model("i3d_r50", alpha=0.25, width=16)
    x, kinds = torch.zeros(1, 3, 4, 32, 32), []
    for block in network.blocks:
        x = block(x)
        kinds.append(isinstance(x, Octaves))
    assert kinds == [False, True, True, True, True, False, False]


def test_initialisation_follows_the_recipe():
    torch.manual_seed(0)
    network = create_model("i3d_r50", alpha=0.25, num_classes=400)
    final = [module.norm_c.weight for module in network.modules() if hasattr(module, "norm_c")]
    assert len(final) == 16
    assert all(weight.abs().max() == 0 for weight in final)
    assert network.blocks[-1].proj.weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_head_pool_takes_any_size():
    pool = HeadPool()
    x = torch.randn(2, 4, 3, 5, 6)
    torch.testing.assert_close(pool(x), x.mean((2, 3, 4), keepdim=True))
    assert pool(torch.randn(2, 4, 3, 8, 9)).shape == (2, 4, 1, 2, 3)
    for size in (1, 6, 7, 8, 20):  # as exported
        x = torch.randn(2, 4, 1, size, 3)
        windows = torch.nn.functional.avg_pool3d(x, (1, min(size, 7), 1), 1)
        torch.testing.assert_close(pool._mean_of_windows(x, 3), windows.mean(3, keepdim=True))
    octaves = Octaves(torch.randn(2, 4, 3, 9, 9), torch.randn(2, 4, 3, 5, 5))
    torch.testing.assert_close(pool(octaves)[:, 4:], octaves.low.mean((2, 3, 4), keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "i3d_r5"}, "no model 'i3d_r5'; there are c2d_r50, c2d_r50_nonlocal"),
        ({"name": "i3d_r50", "alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"name": "i3d_r50", "alpha": (0.1, 0.1)}, "one number or four"),
        ({"name": "i3d_r50", "num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"name": "i3d_r50", "depth": 34}, r"depth must be one of \(50, 101, 152\), got 34"),
        ({"name": "x3d_s", "depth": 50}, "depth must be left out for x3d_s, got 50"),
        ({"name": "x3d_s", "width": 20}, "multiple of 8 for x3d_s, got 20"),
        ({"name": "i3d_r50", "downsample": "avg"}, 'downsample must be "conv" or "pool", got \'avg\''),
        ({"name": "slowfast_r50", "channel_ratio": 7}, "multiple of 7 for slowfast_r50, got 64"),
        ({"name": "slowfast_r50", "width": 12}, "multiple of 8 for slowfast_r50, got 12"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)


def test_slowfast_refuses_a_clip_it_cannot_divide():
    with pytest.raises(ValueError, match="multiple of 4 frames, got 6"):
        create_model("slowfast_r50", width=16)(torch.zeros(1, 3, 6, 32, 32))


@pytest.mark.parametrize("name", ["i3d_r50", "slowfast_r50", "x3d_s"])
@pytest.mark.parametrize("alpha", [0, 0.5, (0.25, 0, 0.125, 0.5)], ids=str)
def test_set_alpha_gives_the_network_that_create_model_builds_at_that_alpha(name, alpha):
    options = {"width": 16, "num_classes": 5, "downsample": "pool", "channels_last": True, "round_to": 4}
    wanted = settle(create_model(name, alpha=alpha, **options))
    network = create_model(name, alpha=0.25, **options)
    weights = wanted.state_dict()
    network.load_state_dict(weights)
    assert set_alpha(network, alpha) is network
    assert str(network.eval()) == str(wanted.eval())
    clips = torch.randn(1, 3, 4, 32, 32)
    torch.testing.assert_close(network(clips), wanted(clips), rtol=0, atol=0)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=0)


def test_set_alpha_0_makes_a_network_of_default_options_vanilla_again():
    network = set_alpha(create_model("i3d_r50", width=8, alpha=0.5, num_classes=5), 0)
    assert not any(isinstance(module, OctConv3d) for module in network.modules())
    assert any(isinstance(module, OctConv3d) and module.channels_last for module in set_alpha(network, 0.5).modules())


def test_set_alpha_refuses_what_create_model_refuses_and_leaves_the_network():
    network = create_model("i3d_r50", width=8, alpha=0.5, num_classes=5)
    before = str(network)
    for alpha in (1.5, (0.1, 0.2)):
        with pytest.raises(ValueError, match="alpha must"):
            set_alpha(network, alpha)
    assert str(network) == before


def test_set_alpha_refuses_a_network_of_others():
    with pytest.raises(ValueError, match="network that create_model built, got Net"):
        set_alpha(create_resnet(), 0.5)
    with pytest.raises(ValueError, match="got Conv3d"):
        set_alpha(nn.Conv3d(3, 4, 1), 0.5)
