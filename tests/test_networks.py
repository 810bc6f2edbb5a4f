"""octavize on networks that nobody here wrote: their meaning stays at every alpha, and their cost is the paper's."""

import functools
import json
import os
import time

import pytest
import torch
import torchvision.models as images
from conftest import long, run_tool, settle
from families import Family
from networks import IMAGE_NETWORKS, OTHERS, VIDEO_NETWORKS
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn

from experiments.networks import SAME, examine, main, sweep
from octvideo import MODELS, OctConv2d, OctConv3d, create_model, octavize
from octvideo.layers.octaves import Octaves
from octvideo.models.cost import count_macs, count_parameters

# Deeper networks of the same blocks, which only their multiply-adds are tested of.
DEEPER = {"resnet101", "resnet152", "resnext101_32x4d", "timm_resnet200", "slowfast_r101", "x3d_l"}
IMAGES, CLIPS = ([name for name in names if name not in DEEPER] for names in (IMAGE_NETWORKS, VIDEO_NETWORKS))
# 40 x 56 and 72 x 72 have odd maps in most stages: 10 x 14, 5 x 7, 3 x 4, 2 x 2 and 9, 5, 3.
IMAGE_SIZES = [(64, 64), (40, 56)]
SMALL = dict.fromkeys(CLIPS, IMAGE_SIZES) | {
    "s3d": [(224, 224)],  # the least that its head takes; 28, 14, 7
    "i3d": [(64, 64), (120, 152)],
    **{name: [(64, 64), (72, 72)] for name in ("x3d_xs", "x3d_s", "x3d_m")},
}


# Of the networks of other libraries, those that take seconds and are unlike each other; besides timm's own for tests.
QUICK = {
    *(
        f"timm/{name}"
        for name in ("cs3darknet_focus_s", "dla46_c", "ese_vovnet19b_slim_dw", "resnest14d", "resnetblur18")
    ),
    *(f"timm/{name}" for name in ("skresnet18", "tf_efficientnetv2_b0")),
    *("torchvision/shufflenet_v2_x0_5", "smp/unet-resnet18", "monai/UNet"),
}


def in_circles(network):
    """The network in float64 with circular padding, where a field constant in space stays constant."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.padding_mode = "circular"
    return settle(network).double()


def assert_same_logits_at_every_alpha(network, clip, temporal=False):
    """A lower resolution loses nothing of a constant field: only a channel out of order changes logits."""
    with torch.no_grad():
        wanted = network(clip)
        for alpha in (0.125, 0.25, 0.5):
            octavize(network, alpha, temporal=temporal)
            if alpha == 0.125 and getattr(network, "groups", 1) == 32:
                # No eighth of the four channels that a group of ResNeXt has; the paper's table has no such row either.
                assert "112 high and 16 low ones: groups 32 must divide both" in str(network.octave_report)
            assert any(isinstance(module, (OctConv2d, OctConv3d)) and module.alpha for module in network.modules())
            torch.testing.assert_close(network(clip), wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
        assert torch.equal(octavize(network, 0)(clip), wanted)


@functools.lru_cache(maxsize=1)  # the sizes of a network follow each other
def image_network(name):
    return in_circles(IMAGE_NETWORKS[name]())


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=["even", "odd"])
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_constant_in_space_has_the_same_logits_at_every_alpha(name, size):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(1, 3, *size)
    assert_same_logits_at_every_alpha(octavize(image_network(name), 0), image)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in SMALL.items() for size in sizes], ids=str)
def test_a_clip_constant_in_space_has_the_same_logits_at_every_alpha(name, size):
    torch.manual_seed(0)
    build, frames = VIDEO_NETWORKS[name]
    if name.endswith("_18"):  # their heads take any number of frames; octaves in space do not mix them
        frames = 4
    clip = torch.randn(1, 3, frames, 1, 1, dtype=torch.float64).expand(1, 3, frames, *size)
    assert_same_logits_at_every_alpha(in_circles(build(size)), clip)


@pytest.mark.long
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_constant_in_space_and_time_has_the_same_logits_with_temporal(name):
    torch.manual_seed(0)
    build, frames = VIDEO_NETWORKS[name]
    size = SMALL[name][-1] if name.startswith(("x3d", "s3d")) else (40, 56)
    clip = torch.randn(1, 3, 1, 1, 1, dtype=torch.float64).expand(1, 3, frames, *size)
    assert_same_logits_at_every_alpha(in_circles(build(size)), clip, temporal=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_zoo_keeps_its_logits_on_constant_clips_in_the_papers_layout(name):
    torch.manual_seed(0)
    network = in_circles(create_model(name, width=16, num_classes=7))
    clip = torch.randn(2, 3, 4, 1, 1, dtype=torch.float64).expand(2, 3, 4, 40, 56)
    with torch.no_grad():
        wanted = network(clip)
        for alpha in (0.125, (0.25, 0.25, 0.5, 0.5)):
            octave = in_circles(create_model(name, width=16, num_classes=7, alpha=alpha, downsample="pool"))
            octave.load_state_dict(network.state_dict())
            torch.testing.assert_close(octave(clip), wanted, rtol=1e-9, atol=1e-9)


def test_the_constant_clip_finds_a_channel_out_of_order():
    torch.manual_seed(0)
    network = in_circles(images.resnet18())
    image = torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = network(image)
        octavize(network, 0.5)
        network.layer1[0].bn1.register_forward_hook(lambda module, args, out: Octaves(out.high.flip(1), out.low))
        assert (network(image) - wanted).abs().max() > 1e-3 * wanted.abs().max()


PAPERS_LAYOUT = r"layer[123]"  # the last stage, stem and classifier vanilla
DENSENET_LAYOUT = r"denseblock[123]|transition[12]"  # the last block and what leads to it vanilla
GIGA_MACS = {  # at 224 x 224, alpha: 10^9 multiply-adds
    "timm_resnet26": (PAPERS_LAYOUT, {0: 2.34, 0.125: 2.09, 0.25: 1.86, 0.5: 1.48, 0.75: 1.21}),
    "resnet50": (PAPERS_LAYOUT, {0: 4.09, 0.125: 3.57, 0.25: 3.10, 0.5: 2.37, 0.75: 1.88}),
    "resnet101": (PAPERS_LAYOUT, {0: 7.80, 0.125: 6.63, 0.25: 5.60, 0.5: 3.99, 0.75: 2.98}),
    "resnet152": (PAPERS_LAYOUT, {0: 11.51, 0.125: 9.69, 0.25: 8.09, 0.5: 5.62, 0.75: 4.08}),
    "timm_resnet200": (PAPERS_LAYOUT, {0: 15.01, 0.125: 12.56, 0.25: 10.44, 0.5: 7.14, 0.75: 5.12}),
    "resnext50_32x4d": (PAPERS_LAYOUT, {0: 4.23, 0.25: 3.17, 0.5: 2.39, 0.75: 1.88}),
    "resnext101_32x4d": (PAPERS_LAYOUT, {0: 7.97, 0.25: 5.68, 0.5: 4.02}),
    "densenet121": (DENSENET_LAYOUT, {0: 2.83, 0.125: 2.40, 0.25: 2.02}),
}


@pytest.mark.parametrize(
    ("name", "alpha"), [(name, alpha) for name, (_, table) in GIGA_MACS.items() for alpha in table], ids=str
)
def test_multiply_adds_of_image_networks_are_the_papers(name, alpha):
    layout, table = GIGA_MACS[name]
    with torch.device("meta"):
        network = octavize(IMAGE_NETWORKS[name](), {layout: alpha})
    assert count_macs(network, (3, 224, 224)) / 1e9 == pytest.approx(table[alpha], rel=5e-3)


@pytest.mark.parametrize(
    ("build", "alphas", "mega_macs"),
    [
        # From the first pointwise convolution to stage 3; the last pointwise one there gives a plain Tensor.
        (lambda: _gen_mobilenet_v1("mobilenetv1_100", 0.75), {}, 325),
        (
            lambda: _gen_mobilenet_v1("mobilenetv1_100", 0.75),
            {r"blocks\.3\.5\.conv_pw": 0, r"blocks\.0\.0\.conv_pw|blocks\.[123]\.": 0.375},
            211,
        ),
        (
            lambda: _gen_mobilenet_v1("mobilenetv1_100", 1.0),
            {r"blocks\.3\.5\.conv_pw": 0, r"blocks\.0\.0\.conv_pw|blocks\.[123]\.": 0.5},
            318,
        ),
        (images.mobilenet_v2, {}, 301),
        # Inside bottlenecks 2 to 12: expansion and depthwise octave, projection to a plain Tensor.
        (images.mobilenet_v2, {r"features\.([2-9]|1[0-2])\.conv\.[01]\.0": 0.375}, 254),
    ],
)
def test_multiply_adds_of_mobilenets_are_the_papers(build, alphas, mega_macs):
    network = build()
    if alphas:
        octavize(network, alphas)
    assert count_macs(network, (3, 224, 224)) / 1e6 == pytest.approx(mega_macs, rel=5e-3)


def test_x3d_has_its_published_size():
    with torch.device("meta"):
        network = create_model("x3d_s")
    assert count_parameters(network) == 3_794_274
    assert count_macs(network, (3, 13, 160, 160)) / 1e9 == pytest.approx(1.963, rel=5e-4)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "densenet121", "mobilenet_v2", "timm_seresnet50"])
def test_octavized_networks_train(name):
    torch.manual_seed(0)
    network = octavize(IMAGE_NETWORKS[name](), 0.25).train()
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", [name if name in QUICK or "/test_" in name else long(name) for name in OTHERS])
@pytest.mark.filterwarnings("ignore")
def test_octavize_needs_no_option_on_networks_of_other_libraries(name, one_thread):
    facts = examine(*name.split("/"))
    assert (facts["errors"], facts["refused"]) == ({}, "")
    assert (facts["constancy"] is not None) == OTHERS[name], facts["uneven"]
    assert (facts["constancy"] or 0) < SAME
    assert facts["ratio"] < 0.9 or "% in Linear modules" in facts["says"]  # of a detector's heads
    assert facts["sampled"] < facts["ratio"] + 0.05  # what would only be merged stays vanilla


def test_a_sweep_survives_networks_that_crash_hang_or_fail(one_thread, monkeypatch):
    work = {"crashes": lambda: os._exit(7), "hangs": lambda: time.sleep(60), "fails": lambda: 1 / 0, "works": dict}
    monkeypatch.setattr("experiments.networks.examine", lambda library, name, tell: tell("train") or work[name]())
    rows = sweep([Family("timm", name, (name,)) for name in work], jobs=4, timeout=2)
    errors = {row["network"]: row["errors"] for row in rows}
    assert errors["crashes"] == {"train": "Killed: exit status 7"}
    assert errors["hangs"] == {"train": "Timeout: 2 s"}
    assert "ZeroDivisionError" in errors["fails"]["vanilla"]
    assert errors["works"] == {}


@pytest.mark.long
def test_a_sweep_resumes_and_writes_its_table(one_thread, tmp_path, capsys, monkeypatch):
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    words = ["--json", str(file), "--only", "timm/convit|torchvision/squeezenet", "--table", str(page)]
    # In a process of its own: the sweep forks, after which PyTorch has no gradients where others had started threads.
    finished = run_tool("networks.py", *words)
    assert finished.returncode == 0, finished.stderr
    assert "1 refused" in finished.stdout
    assert "Refused, as no convolution in them could become octave: convit_tiny." in page.read_text()
    rows = {row["network"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert rows.keys() == {"convit_tiny", "squeezenet1_1"}
    assert f"| squeezenet1_1 | torchvision | yes | 0 | {rows['squeezenet1_1']['ratio']:.2f} |" in page.read_text()
    monkeypatch.setattr("experiments.networks.examine", lambda *args: pytest.fail("ran again"))
    main(words)
    assert "run: 1 of 1 (100.0%)" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 2


def test_a_mistake_in_the_sweeps_options_is_one_line(capsys, tmp_path):
    for words, message in ((["--only", "("], "missing )"), (["--only", "no such"], "no family")):
        with pytest.raises(SystemExit):
            main(["--json", str(tmp_path / "rows"), *words])
        assert message in capsys.readouterr().err
