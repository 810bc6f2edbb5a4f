"""experiments/spectrum.py: power spectra of known waves, and the experiment as users run it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_tool

from experiments.spectrum import frequencies, low_share, on_one_grid, pooled, power, radial_average, stage_features
from octvideo import Octaves, create_model

SIZE = ["--size=64"]


def wave(rows, columns, size=16):
    """(1, 1, 1, size, size) a plane wave of so many periods in each direction."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.cos(2 * math.pi * (rows * y + columns * x) / size)[None, None, None]


def test_a_wave_has_its_power_at_its_frequency_whatever_its_contrast_and_mean():
    spectrum = power(torch.cat([wave(3, 1), 100 * wave(3, 1) + 7]))
    assert float(spectrum[3, 1] + spectrum[-3, -1]) == pytest.approx(1)
    assert float(spectrum.sum()) == pytest.approx(1)


def test_the_power_is_that_of_numpys_transform():
    maps = torch.randn(2, 3, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    wanted = np.abs(np.fft.fft2(maps.numpy().astype(np.float64))) ** 2
    wanted[..., 0, 0] = 0
    wanted = (wanted / wanted.sum((-2, -1), keepdims=True)).mean((0, 1, 2))
    np.testing.assert_allclose(power(maps).numpy(), wanted, rtol=1e-6)


def test_frames_without_a_pattern_do_not_count():
    flat = torch.full((1, 1, 1, 16, 16), 3.0)
    torch.testing.assert_close(power(torch.cat([wave(2, 0), flat])), power(wave(2, 0)))
    assert power(flat).sum() == 0
    assert math.isnan(low_share(power(flat)))


def test_the_low_share_is_what_half_the_resolution_can_hold():
    assert low_share(power(wave(3, 3))) == pytest.approx(1)
    assert low_share(power(wave(3, 5))) == pytest.approx(0)
    assert low_share(power(wave(3, 3) + wave(5, 0))) == pytest.approx(0.5)


def test_the_radial_average_has_the_wave_in_its_ring():
    middles, means = radial_average(power(wave(3, 0)), 8)
    torch.testing.assert_close(middles, torch.arange(0.03125, 0.5, 0.0625, dtype=torch.float64))
    assert means.nan_to_num().argmax() == 3  # 3 / 16 is the lower edge of [0.1875, 0.25)
    in_ring = (frequencies(16, 16) >= 0.1875) & (frequencies(16, 16) < 0.25)
    assert float(means[3]) == pytest.approx(1 / in_ring.sum().item())
    assert radial_average(power(wave(1, 0, size=4)), 8)[1].isnan().sum() == 6  # 4 x 4 cells have two


def test_pooled_maps_are_means_of_cells_at_odd_sizes_too():
    maps = torch.arange(15.0).view(1, 1, 1, 3, 5)
    rows = [[3.0, 3.0, 5.0, 5.0, 6.5], [3.0, 3.0, 5.0, 5.0, 6.5], [10.5, 10.5, 12.5, 12.5, 14.0]]
    assert pooled(maps)[0, 0, 0].tolist() == rows


def test_groups_are_on_the_grid_of_the_high_maps():
    high, low = torch.randn(2, 3, 4, 6, 5), torch.randn(2, 1, 4, 3, 3)
    groups = on_one_grid(Octaves(high, low))
    assert torch.equal(groups["high"], high)
    assert groups["low"].shape == (2, 1, 4, 6, 5)
    assert torch.equal(groups["low"][..., ::2, ::2], low)
    assert on_one_grid(high)["all"] is high


def test_features_are_those_of_the_named_parts():
    network = create_model("i3d_r50", alpha=0.25, num_classes=2, width=8).eval()
    clips = torch.randn(1, 3, 4, 32, 32)
    (features,) = stage_features(network, ["blocks.1"], [clips])
    with torch.no_grad():
        wanted = network.blocks[1](network.blocks[0](clips))
    assert torch.equal(features["blocks.1"].high, wanted.high)
    assert torch.equal(features["blocks.1"].low, wanted.low)
    assert not network.blocks[1]._forward_hooks
    with pytest.raises(ValueError, match=r"the network has no part blocks\.77"):
        next(iter(stage_features(network, ["blocks.77"], [clips])))


def test_the_tool_writes_rows_and_a_picture(motions, trained, tmp_path):
    videos = sorted((motions / "val").rglob("*.mp4"))[:2]
    checkpoint = trained / "checkpoints" / "last.ckpt"
    finished = run_tool(
        "spectrum.py", *map(str, videos), f"--ckpt={checkpoint}", "--clips=2", *SIZE, f"--output={tmp_path}"
    )
    assert finished.returncode == 0, finished.stderr
    assert "res4 is left out: its maps have 4 rows" in finished.stderr
    rows = json.loads((tmp_path / "spectrum.json").read_text())
    assert {row["stage"] for row in rows} == {"res2", "res3"}
    found = {row["maps"]: row["low_share"] for row in rows if row["stage"] == "res2"}
    assert set(found) == {
        *("octave, high", "octave, low", "vanilla, high", "vanilla, low", "vanilla, pooled, low"),
        *("random weights, high", "random weights, low", "white noise"),
    }
    assert found["white noise"] == pytest.approx((7 * 7 - 1) / (16 * 16 - 1), rel=0.02)  # res2 has 16 x 16 cells
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "octave, high" in finished.stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--clips=0"], ["argument --clips: ", "whole number from 1", "got '0'"]),
        (["--ckpt=missing.ckpt"], ["missing.ckpt"]),
        ([], ["bad.mp4"]),
        (["--size=0"], ["argument --size: ", "whole number from 1", "got '0'"]),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, options, parts):
    (tmp_path / "bad.mp4").touch()
    given = [f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path}", *options]
    finished = run_tool("spectrum.py", str(tmp_path / "bad.mp4"), *given)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("spectrum.py: error: ")
    assert all(part in finished.stderr.splitlines()[-1] for part in parts)


def test_maps_too_small_for_a_spectrum_are_refused(motions, trained, tmp_path):
    video = str(sorted((motions / "val").rglob("*.mp4"))[0])
    given = [f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path}", "--size=16", "--clips=1"]
    finished = run_tool("spectrum.py", video, *given)
    assert finished.returncode == 2
    assert "no stage has maps of at least 8 rows: raise --size, now 16" in finished.stderr


def test_networks_that_do_not_go_together_are_refused(motions, trained, tmp_path):
    """A vanilla checkpoint of another width, and a vanilla one in place of the octave one."""
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    other = create_model("i3d_r50", alpha=0, num_classes=8, width=4)
    checkpoint["hyper_parameters"] |= {"width": 4, "alpha": 0.0}
    checkpoint["state_dict"] = {f"network.{name}": value for name, value in other.state_dict().items()}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    video, output = str(sorted((motions / "val").rglob("*.mp4"))[0]), f"--output={tmp_path}"
    ours = str(trained / "checkpoints" / "last.ckpt")
    refused = run_tool("spectrum.py", video, f"--ckpt={ours}", f"--vanilla={tmp_path / 'other.ckpt'}", output)
    assert "must hold the same network, got width 8 and 4" in refused.stderr
    refused = run_tool("spectrum.py", video, f"--ckpt={tmp_path / 'other.ckpt'}", output)
    assert refused.returncode == 2
    assert "has no octave stages: its alpha is 0" in refused.stderr
