"""Ablated octave networks, controls and the plan of the study on the hard motions."""

import ablations
import controls
import evidence
import pytest
import torch
import yaml
from conftest import run_tool
from torch import nn

from octvideo import Octaves, create_model
from octvideo.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"name": "i3d_r50", "alpha": 0.25, "num_classes": 5, "width": 8, "downsample": "pool"}


def scores(network, clips):
    with torch.no_grad():
        return network.double().eval()(clips)


@pytest.fixture(scope="module")
def clips():
    return torch.rand(2, 3, 4, 37, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    network = create_model(**OPTIONS)
    for module in network.modules():  # else the last norms of blocks are zero, and with them what differs
        if isinstance(module, nn.BatchNorm3d):
            nn.init.ones_(module.weight)
    return network


def changed(plain, change):
    network = ablations.create(change, **OPTIONS)
    network.load_state_dict(plain.state_dict())
    return network


def test_without_a_change_it_is_the_octave_network(plain, clips):
    torch.testing.assert_close(scores(changed(plain, "none"), clips), scores(plain, clips), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", [name for name in ablations.CHANGES if name != "none"])
def test_each_change_computes_something_else_and_trains(plain, clips, change):
    network = changed(plain, change)
    assert (scores(network, clips) - scores(plain, clips)).abs().max() > 1e-4
    network.train()(clips).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_paths_that_are_removed_leave_the_maps_apart():
    layer = ablations.AblatedConv3d(8, 8, 1, bias=False, alpha=0.5)
    layer.change = "no_exchange"
    high, low = torch.rand(1, 4, 2, 6, 6), torch.rand(1, 4, 2, 3, 3)
    out = layer(Octaves(high, low))
    torch.testing.assert_close(layer(Octaves(high, 0 * low)).high, out.high)
    torch.testing.assert_close(layer(Octaves(0 * high, low)).low, out.low)
    layer.change = "no_high_to_low"
    assert not torch.equal(layer(Octaves(high, 0 * low)).high, layer(Octaves(high, low)).high)
    torch.testing.assert_close(layer(Octaves(0 * high, low)).low, layer(Octaves(high, low)).low)


def test_unknown_changes_are_refused():
    with pytest.raises(UserError, match="change must be one of none, strided"):
        ablations.create("all", **OPTIONS)


class Same(nn.Module):
    def forward(self, clips):
        return clips


def test_controls_change_what_their_names_say():
    clips = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.float32).reshape(2, 3, 4, 5, 6)
    shuffled = controls.Shuffled(Same())
    for network in (shuffled.train(), shuffled.eval()):
        torch.testing.assert_close(network(clips).sort(2).values, clips)
        assert not torch.equal(network(clips), clips)
    assert torch.equal(shuffled(clips), shuffled(clips))
    assert torch.equal(controls.Still(Same())(clips), clips[:, :, 2:3].expand_as(clips))
    blurred = controls.Blurred(Same())(clips)
    assert blurred.shape == clips.shape
    torch.testing.assert_close(blurred[0, 0, 0, 0, :2], clips[0, 0, 0, :2, :2].mean().expand(2))


def test_the_study_compares_networks_that_cost_the_same(tmp_path):
    recipe = evidence.STUDIES["hard"].recipe()
    known = evidence.variants(recipe)
    octave, smaller, narrower = (
        evidence.cost_of(known[f"{name} 0.25"], recipe)["macs"] for name in ("octave", "smaller", "narrower")
    )
    assert [smaller, narrower] == pytest.approx([octave, octave], rel=0.05)
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump(known["ablated: temporal"]))
    words = ["--cfg=hard_motions", f"--cfg={tmp_path / 'variant.yaml'}", "--print_config"]
    done = run_tool("train_net.py", *words, PYTHONPATH="experiments")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["network"]["init_args"]["change"] == "temporal"
    seeds = {name: evidence.seeds_of(name, evidence.STUDIES["few"]) for name in known}
    assert {name for name, count in seeds.items() if count == 1} == {"shuffled", "still", "blurred"}
    assert seeds["ablated: temporal"] == seeds["allocated"] == seeds["smaller 0.5"] == 5
    assert seeds["ablated: strided"] == seeds["res4 0.5"] == 2
    assert sum(evidence.seeds_of(name, evidence.STUDIES["hard"]) for name in known) == 7 * 5 + 3


def test_differences_are_paired_by_seed_and_of_networks_that_cost_the_same():
    top1 = {
        "pooled": (0.5, 0.7),
        "octave 0.25": (0.6, 0.75),
        "narrower 0.25": (0.5, 0.7),
        "ablated: bilinear": (0.625,),
    }
    cost = {"macs": 4, "bytes": 6, "time": 1.5}
    rows = [
        {"variant": name, "seed": seed, "top1": {"all": right, "fine": right}} | cost
        for name, column in reversed(top1.items())
        for seed, right in enumerate(column)
    ]
    cells = [list(column.cells) for column in evidence.table(rows).columns]
    assert cells[0] == ["pooled", "octave 0.25", "narrower 0.25", "ablated: bilinear"]
    assert cells[1:6] == [["2", "2", "2", "1"], ["1.00"] * 4, ["1.00"] * 4, ["1.50"] * 4, cells[8]]
    assert cells[6] == ["", "+7.5 ± 31.8", "+0.0 ± 0.0", "+12.5"]
    assert cells[7] == ["", "", "-7.5 ± 31.8", "+2.5"]
    assert cells[8] == ["60.0 ± 127.1", "67.5 ± 95.3", "60.0 ± 127.1", "62.5"]


def test_mistakes_in_the_study_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "variants", lambda recipe: {"pooled": {}, "allocated": {}})
    with pytest.raises(SystemExit, match="2"):
        evidence.main(["--study=few", "--variants=pooled,octave"])
    assert "no variant 'octave'; there are pooled, allocated" in capsys.readouterr().err
    options = evidence.parse(["--study=few", f"--folder={tmp_path}"])
    with pytest.raises(UserError, match="pooled of seed 0 is needed first"):
        next(evidence.measure("allocated", [0], options))
