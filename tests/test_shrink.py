"""A trained network made cheaper, in Python and by the command: what is chosen, learnt, kept, written and refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_tool, small
from torch import nn

from octvideo.commands import children
from octvideo.commands import shrink as command
from octvideo.errors import DoesNotPayError, UserError
from octvideo.evaluation.report import points_of, read_run
from octvideo.models.allocation import Trial, uniform
from octvideo.models.checkpoint import load_trained, read_training_checkpoint
from octvideo.models.octavize import octavize
from octvideo.models.roofline import Machine
from octvideo.training import shrink as module
from octvideo.training.precise_bn import estimate_statistics
from octvideo.training.shrink import choose, compare, decisions, distance_of, distil, shrink

pytestmark = pytest.mark.usefixtures("one_thread")
ARITHMETIC = Machine("arithmetic", {torch.float32: 1e9}, 1e18, 0)  # on which time is multiply-adds
LAUNCHES = Machine("launches", {torch.float32: 1e18}, 1e18, 1)  # on which it is the number of kernels


class Tiny(nn.Module):
    """Three convolutions with batch norms, of which the second may have a stride, and three classes."""

    def __init__(self, stride=1):
        super().__init__()
        torch.manual_seed(0)
        how = {"padding": (0, 1, 1), "bias": False}
        self.stem = nn.Conv3d(3, 8, (1, 3, 3), **how)
        self.body = nn.Sequential(
            nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, (1, 3, 3), stride=(1, stride, stride), **how),
            nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, (1, 3, 3), **how), nn.BatchNorm3d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3, 4)))


class Frames(nn.Module):
    """Images in uint8 and a scale to a map and a number, without batch norms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, images, scale):
        x = self.conv(self.stem(images.float() / 255).relu()).relu()
        return {"map": self.last(x) * scale, "mean": x.mean((1, 2, 3)), "size": images.shape[2]}


def clips(number=3, size=16):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 2, size, size, generator=draw) for _ in range(number)]


def test_a_cheaper_network_that_learns_what_it_was():
    network, batches = Tiny(), clips(4)
    estimate_statistics(network, batches, network)  # so that its layers have something to say
    weights = {name: x.clone() for name, x in network.state_dict().items()}
    found = shrink(network, batches[:3], budget=0.7, steps=30, learning_rate=3e-3, held_out=batches[3:])
    before, after = found.costs
    assert 0.3 * before.macs < after.macs <= 0.7 * before.macs
    assert found.likeness[1].distance < found.likeness[0].distance
    assert all(0 <= like.agreement <= 1 for like in found.likeness)
    assert "octave_report" not in vars(network)
    assert all(torch.equal(x, weights[name]) for name, x in network.state_dict().items())
    again = octavize(Tiny(), found.alpha).eval()
    again.load_state_dict(found.network.state_dict())
    assert torch.equal(again(batches[0]), found.network(batches[0]))
    assert [line.split()[0] for line in str(found).splitlines()] == [found.way.split()[0], "time", "agreement"]
    assert {candidate.name for candidate in found.candidates} == {"an alpha for each layer", "one alpha for all layers"}
    distances = [candidate.likeness.distance for candidate in found.candidates]
    assert distances == sorted(distances)


def test_any_inputs_and_outputs():
    batches = [(torch.randint(256, (2, 3, 12, 12), dtype=torch.uint8), torch.tensor(2.0)) for _ in range(2)]
    found = shrink(Frames(), batches, budget=0.8, alphas=(0.5,), steps=2)
    wanted, got = Frames()(*batches[0]), found.network(*batches[0])
    assert got["map"].shape == wanted["map"].shape
    assert got["size"] == 12
    assert found.costs[1].macs <= 0.8 * found.costs[0].macs


def test_work_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    how = {"alphas": (0.5,), "steps": 3, "folder": tmp_path / "new"}
    first = shrink(Tiny(), clips(), **how)

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(module, "distil", never)
    monkeypatch.setattr(module, "measure_sensitivities", never)
    second = shrink(Tiny(), clips(), **how)
    assert second.alpha == first.alpha
    assert all(torch.equal(*pair) for pair in zip(first.network.parameters(), second.network.parameters(), strict=True))
    with pytest.raises(UserError, match=r"sensitivities\.json holds sensitivities of another checkpoint or of other"):
        shrink(Tiny(stride=2), clips(), **how)
    (tmp_path / "new" / "sensitivities.json").write_text("{")
    with pytest.raises(UserError, match=r"sensitivities\.json is not a file of this kind"):
        shrink(Tiny(), clips(), **how)


def test_what_has_a_stride_or_is_read_by_one_may_stay_as_it_is():
    network = Tiny(stride=2).eval()
    assert Trial(network, clips()[0]).groups_at_strides() == [("body.2",)]
    assert Trial(Tiny(), clips()[0]).groups_at_strides() == []
    vanilla, candidates = choose(network, clips(1), budget=0.9, alphas=(0.75,))
    kept = next(one for one in candidates if one.name.endswith("strides kept"))
    assert kept.alpha[r"^body\.2$"] == 0 < kept.alpha[r"^body\.5$"]
    assert kept.cost.macs <= 0.9 * vanilla.macs
    pooled = {"downsample": "pool"}
    _, candidates = choose(octavize(network, 0, **pooled), clips(1), budget=0.9, alphas=(0.75,), options=pooled)
    assert not any(one.name.endswith("strides kept") for one in candidates)


def test_one_alpha_for_all_is_the_lowest_that_meets_the_budget():
    trial = Trial(network := Tiny(), sample := clips()[0])
    groups = trial.groups()
    alpha = uniform(network, groups, groups, 0.7, sample)
    (share,) = set(alpha.values())
    vanilla = trial.cost(dict.fromkeys(alpha, 0.0)).macs
    assert trial.cost(alpha).macs <= 0.7 * vanilla < trial.cost(dict.fromkeys(alpha, share - 0.001)).macs
    with pytest.raises(UserError, match=r"0\.1 of the multiply-adds is out of reach: at alpha 1 these"):
        uniform(network, groups, groups, 0.1, sample)


def test_by_time_the_budget_is_that_of_a_machine(monkeypatch):
    network = Tiny().eval()
    how = {"budget": 0.7, "alphas": (0.75,)}
    by_macs = choose(network, clips(1), **how)
    by_time = choose(network, clips(1), **how, by="time", machine=ARITHMETIC)
    assert [one.alpha for one in by_time[1]] == [one.alpha for one in by_macs[1]]
    with pytest.raises(DoesNotPayError, match=r"0\.7 of the time is out of reach: on launches the fastest choice is"):
        choose(network, clips(1), **how, by="time", machine=LAUNCHES)
    monkeypatch.setattr(module, "measure_machine", lambda dtype, device: ARITHMETIC)
    monkeypatch.setattr(module, "measure_seconds", lambda networks, batch: (0.001, 0.002))
    monkeypatch.setattr(module, "distil", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(DoesNotPayError, match=r"the chosen network takes 2\.0 ms a clip here, the vanilla one 1\.0 ms"):
        shrink(network, clips(1), by="time", alphas=(0.75,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, r"budget must lie in \(0, 1\), got 1"),
        ({"budget": 0}, r"budget must lie in \(0, 1\), got 0"),
        ({"by": "bytes"}, "by must be macs or time, got 'bytes'"),
        ({"alphas": ()}, r"alphas must lie in \(0, 1\], got \[\]"),
        ({"alphas": (0.5, 2)}, r"alphas must lie in \(0, 1\], got \[0.5, 2\]"),
        ({"calibration": 0}, "calibration must be positive, got 0"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_options_out_of_their_range(options, message):
    with pytest.raises(UserError, match=message):
        shrink(Tiny(), clips(), **options)


def test_without_clips_there_is_nothing_to_go_by():
    with pytest.raises(UserError, match="shrink needs at least one batch of clips"):
        shrink(Tiny(), [])


def test_where_it_cannot_pay_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(module, "measure_sensitivities", lambda *args: pytest.fail("measured"))
    with pytest.raises(DoesNotPayError, match=r"0\.1 of the multiply-adds is out of reach: alpha 0\.75 every"):
        shrink(Tiny(), clips(), budget=0.1)
    linear = nn.Sequential(nn.Conv3d(3, 4, 1), nn.Conv3d(4, 4, 1), nn.Flatten(), nn.Linear(2048, 256))
    with pytest.raises(DoesNotPayError, match=r"leaves 0\.9\d\d .*of the vanilla MACs 9\d% in Linear modules"):
        shrink(linear, clips(), budget=0.7)
    transformer = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(DoesNotPayError, match=r"has no nn\.Conv1d"):
        shrink(transformer, [torch.randn(2, 3, 8)])


def test_channels_that_cannot_be_followed_stay_in_place(monkeypatch):
    def refuse(network, batches):
        raise UserError("no idea")

    monkeypatch.setattr(module, "choose_low", refuse)
    found = shrink(Tiny(), clips(), alphas=(0.5,), steps=0)
    assert found.notes == ["channels stay in the order in which they were trained: no idea"]


def test_distances_and_decisions():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    assert float(distance_of(logits, logits)) == 0
    assert float(distance_of(logits + 5, logits)) == pytest.approx(0, abs=1e-6)  # softmax does not see it
    maps = torch.tensor([[[1.0, -1.0]]])
    assert float(distance_of({"a": maps + 1, "n": 3}, {"a": maps, "n": 4})) == pytest.approx(1)  # of the variance
    assert decisions(logits).tolist() == [0, 1]
    assert decisions([maps]).tolist() == [[[True, False]]]
    assert compare([logits, maps], [logits, -maps], distance_of).agreement == pytest.approx(0.5)
    with pytest.raises(UserError, match="the network returns no Tensor of floating-point numbers"):
        distance_of({"n": 3}, {"n": 3})


def test_distilling_that_diverges_is_named_and_modes_are_kept():
    teacher, student = Tiny().eval(), octavize(Tiny(), 0.5).eval()
    with pytest.raises(UserError, match=r"distilling diverged at step 0: lower the learning rate of 0\.0001"):
        distil(student, teacher, clips(), steps=2, distance=lambda found, wanted: found.sum() * torch.nan)
    student = octavize(Tiny(), 0.5).eval()
    student.body[0].train()
    modes = [part.training for part in student.modules()]
    distil(student, teacher, clips(), steps=4, progress=False)
    assert [part.training for part in student.modules()] == modes


# ---- The command


@pytest.fixture(scope="module")
def vanilla(motions, built_once):
    """The folder of a run at alpha 0, pooled."""

    def train(run):
        options = [*small(motions, run), "--model.alpha=0", "--model.downsample=pool", "--trainer.max_epochs=1"]
        assert run_tool("train_net.py", *options).returncode == 0

    return built_once("vanilla", train)


@pytest.fixture
def run_here(monkeypatch, capsys, vanilla, tmp_path):
    """Runs the command in this process, and those that it calls as other tests do: its status, output, and calls."""
    calls = []

    def call(name, options, log):
        calls.append(name)
        script = {"train": "train_net.py", "test": "test_net.py", "export": "export.py"}[name]
        finished = run_tool(script, *options, *(["--rounds=1", "--free=none"] if name == "export" else []))
        if finished.returncode:
            raise children.RunFailedError(finished.stderr.strip().splitlines()[-1])

    def run(*options, ckpt=vanilla / "checkpoints" / "last.ckpt"):
        calls.clear()
        monkeypatch.setattr(children, "call", call)
        monkeypatch.setattr(sys, "argv", ["shrink.py"])
        output = [] if any(str(word).startswith("--output") for word in options) else [f"--output={tmp_path / 'out'}"]
        try:
            status = command.main([*([f"--ckpt={ckpt}"] if ckpt else []), *output, *map(str, options)])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr(), list(calls)

    return run


QUICK = ["--budget=.85", "--alphas=.5", "--batches=1", "--trainer.limit_train_batches=1", "--data.num_workers=0"]


@pytest.mark.long
def test_a_checkpoint_becomes_cheaper_and_is_compared_with_what_it_was(run_here, tmp_path, vanilla):
    status, out, err, calls = run_here(*QUICK, "--max-drop=100")
    assert (status, calls) == (0, ["test", "test", "train", "test", "export"]), err
    output = tmp_path / "out"
    found = json.loads((output / "shrink.json").read_text())
    assert found["macs"][2] <= 0.85 * found["macs"][0]
    assert found["macs"][1] == found["macs"][2]
    assert found["agreement"][0] is None
    assert 0 <= found["agreement"][2] <= 1
    assert found["way"] in {name for name, *_ in found["candidates"]}
    assert "video top-1" in out
    trained = load_trained(output / "training" / "checkpoints" / "last.ckpt")
    assert trained.options["alpha"] == found["alpha"]
    assert trained.options["downsample"] == "pool"
    page = (output / "report.html").read_text()
    assert page.count("<h2>") >= 4
    assert "As the first run" in page
    assert any(output.glob("network.*"))
    before, chosen = (read_run(output / name, results=output / name) for name in ("before", "chosen"))
    (point,) = points_of(chosen, before)
    assert point.agreement == found["agreement"][1]
    (point,) = points_of(before, before)
    assert point.agreement is None

    # The same command does nothing again; another one is refused; a strict one says that it does not pay.
    assert run_here(*QUICK, "--max-drop=100")[3] == []
    status, _, err, calls = run_here(*QUICK, "--budget=.9")
    assert (status, calls) == (2, [])
    assert "holds what shrinking with other options wrote" in err
    videos = json.loads((output / "before" / "predictions.json").read_text())
    for video in videos["videos"]:
        video["scores"] = [float(number == video["label"]) for number in range(8)]
    (output / "before" / "predictions.json").write_text(json.dumps(videos))
    status, _, err, calls = run_here(*QUICK, "--max-drop=1")
    assert (status, calls) == (3, [])
    assert err.splitlines()[-1].startswith("shrink.py: error: shrinking does not pay: accuracy falls by")


def test_a_budget_out_of_reach_does_not_pay(run_here, tmp_path):
    status, _, err, calls = run_here("--budget=.1", "--batches=1", "--data.num_workers=0")
    assert (status, calls) == (3, [])
    assert "shrinking does not pay: 0.1 of the multiply-adds is out of reach: alpha 0.75 everywhere leaves 0." in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget=1.5"], "budget must lie in (0, 1), got 1.5"),
        (["--by=bytes"], "by must be macs or time, got 'bytes'"),
        (["--alphas=2"], "argument --alphas: must be numbers in [0, 1]"),
        (["--alphas=0"], "alphas must lie in (0, 1], got [0.0]"),
        (["--max-drop=-1"], "argument --max-drop/--max_drop: must be a positive number"),
        (["--model.alpha=.5"], "--model.alpha is what shrink sets itself"),
        (["--data.train_list=missing.csv", "--batches=1"], "missing.csv"),
        (["--typo=1"], "unrecognized arguments: --typo"),
    ],
)
def test_a_mistake_is_one_line(run_here, options, message):
    status, _, err, calls = run_here(*options)
    assert (status, calls) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_checkpoints_that_it_cannot_take(run_here, trained, tmp_path):
    status, _, err, _ = run_here(ckpt=trained / "checkpoints" / "last.ckpt")
    assert (status, "is octave already, at alpha 0.5: shrink takes a network of alpha 0" in err) == (2, True)
    status, _, err, _ = run_here("--cfg=quickstart", ckpt=tmp_path / "missing.ckpt")
    assert (status, "missing.ckpt: no such file" in err) == (2, True)
    status, _, err, _ = run_here(ckpt=tmp_path / "missing.ckpt")
    assert (status, "--cfg is needed: " in err) == (2, True)


def test_a_network_with_weights_from_elsewhere(run_here, tmp_path, vanilla, monkeypatch):
    taken = []

    def decide(arguments, found):
        taken.append((arguments.ckpt, arguments.recipe))
        raise DoesNotPayError("that is all")

    monkeypatch.setattr(command, "decide", decide)
    config, weights = f"--cfg={vanilla / 'config.yaml'}", vanilla / "checkpoints" / "last.ckpt"
    for _ in range(2):  # the second time it is there
        status, _, err, _ = run_here("--model=i3d_r50", f"--weights={weights}", config, ckpt=None)
        assert (status, "does not pay: that is all" in err) == (3, True)
    (original, _), _ = taken
    found, known = load_trained(original), load_trained(weights)
    assert (found.options, found.preprocessing) == (known.options, known.preprocessing)
    for (name, x), y in zip(found.network.state_dict().items(), known.network.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert read_training_checkpoint(original).content["epoch"] == 0

    own = ["--model=own_examples.Tiny", "--model.network.width", "4", "--model.width=null", "--model.dropout=.5"]
    status, _, err, _ = run_here(*own, config, f"--output={tmp_path / 'own'}", ckpt=None)
    assert (status, "does not pay: that is all" in err) == (3, True), err
    assert load_trained(taken[-1][0]).options["network"]["init_args"]["width"] == 4
    assert taken[-1][1] == [config, *own[-2:]]  # the network's own options come from the checkpoint


def test_what_to_shrink_is_said_once(run_here, vanilla):
    for options, message in (
        ([], "either --ckpt FILE or --model NAME says what to shrink"),
        (["--model=c2d_r50", f"--ckpt={vanilla / 'checkpoints' / 'last.ckpt'}"], "either --ckpt FILE or --model NAME"),
        ([f"--ckpt={vanilla / 'checkpoints' / 'last.ckpt'}", "--weights=w.pth"], "--weights are those of --model NAME"),
        (["--model=c2d_r50", "--cfg=quickstart"], "--model c2d_r50 needs --weights FILE"),
        (["--model=c2d_r50", "--weights=w.pth"], "--model needs --cfg to say where the videos are"),
        (["--model=c2d", "--weights=w.pth", "--cfg=quickstart"], "c2d"),
        (["--model=c2d_r50", "--weights=w.pth", "--cfg=quickstart"], "w.pth"),
    ):
        status, _, err, _ = run_here(*options, ckpt=None)
        assert (status, message in err, err.count("\n")) == (2, True, 1), err


def test_a_step_that_fails_is_named(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "decide", lambda arguments, found: None)  # and so there is no choice.ckpt
    status, _, err, calls = run_here(*QUICK)
    assert (status, calls) == (1, ["test", "test"])
    assert "choice.ckpt: no such file: see " in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_tests_of_other_videos_do_not_agree_or_differ(vanilla, run_here, tmp_path):
    run = read_run(vanilla)
    assert points_of(run, replace(run, name="other")) == points_of(run)
