"""`octvideo sweep` and experiments/allocation.py: what they train, keep, write and refuse."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CONFIG, run_tool, small
from test_command_line import assert_one_line

from octvideo.commands import children, sweep
from octvideo.models.checkpoint import load_trained
from octvideo.models.octavize import octavize

pytestmark = pytest.mark.usefixtures("one_thread")  # for what a sweep times in this process
QUICK = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.warmup_epochs=0"]


@pytest.fixture(scope="module")
def recipe(motions, tmp_path_factory):
    """A YAML file of a training of seconds."""
    options = [option for option in small(motions, "unused") if not option.startswith(("--trainer.default", "--cfg"))]
    printed = run_tool("train_net.py", f"--cfg={CONFIG}", *options, *QUICK, "--print_config").stdout
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(printed)
    return path


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs the sweep in this process, and the tools that it calls as the other tests do; what it printed, its calls."""
    calls = []

    def call(name, options, log):
        calls.append((name, options))
        finished = run_tool({"train": "train_net.py", "test": "test_net.py"}[name], *options)
        log.write_text(finished.stdout + finished.stderr)
        if finished.returncode:
            raise children.RunFailedError(finished.stderr.strip().splitlines()[-1])

    def run(*options):
        calls.clear()
        monkeypatch.setattr(children, "call", call)
        monkeypatch.setattr(children, "resolve", lambda *_: {})  # has a test of its own
        monkeypatch.setattr(sys, "argv", ["sweep.py"])
        try:
            status = sweep.main([str(option) for option in options])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr(), [name for name, _ in calls]

    return run


@pytest.fixture(scope="module")
def allocation(trained, motions, built_once):
    """The folder of an allocation of res2's convolutions."""

    def write(folder):
        finished = allocate(motions, trained, folder, "--budget=.97")
        assert finished.returncode == 0, finished.stderr
        (folder / "printed.txt").write_text(finished.stdout)

    return built_once("allocation", write)


def allocate(data, run, folder, *options):
    common = [*small(data, folder), f"--ckpt={run / 'checkpoints' / 'last.ckpt'}", f"--output={folder / 'a.yaml'}"]
    return run_tool("allocation.py", *common, "--alphas=.5", "--batches=2", r"--skip=['blocks\.[345]']", *options)


def test_an_allocation_meets_its_budget_and_is_kept_for_training(allocation, trained):
    chosen, uniform = (
        yaml.safe_load((allocation / name).read_text())["model"] for name in ("a.yaml", "a.uniform.yaml")
    )
    kept = json.loads((allocation / "a.json").read_text())["sensitivities"]
    names = [name for row in kept for name in row["names"]]
    assert len(kept) == 7
    assert len(names) == 10  # of three blocks and a shortcut
    assert set(chosen["alpha"].values()) == {0.0, 0.5}
    same = set(uniform["alpha"].values()) - {0.0}
    assert len(same) == 1
    assert len(chosen["alpha"]) == len(uniform["alpha"]) == 52  # those that are skipped have alpha 0
    assert [key.replace("\\", "").strip("^$") for key, alpha in uniform["alpha"].items() if alpha] == names
    assert chosen["downsample"] == "conv"
    network = load_trained(trained / "checkpoints" / "last.ckpt").network
    report = octavize(network, chosen["alpha"]).octave_report
    assert {entry.name for entry in report.assignments if not entry.reason} < set(names)
    told = [
        line.rpartition(": ")[2] for line in (allocation / "printed.txt").read_text().splitlines() if ".yaml:" in line
    ]
    cost, same_cost = (float(line.split(" of the multiply-adds")[0].split()[-1]) for line in told)
    assert 0.9 < cost <= 0.97
    assert cost <= same_cost < cost + 0.02


@pytest.mark.long
def test_what_was_measured_serves_another_budget_and_no_other_checkpoint(allocation, trained, motions, tmp_path):
    shutil.copytree(allocation, tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "a.json").read_text())
    del kept["sensitivities"][-1]
    (tmp_path / "copy" / "a.json").write_text(json.dumps(kept))
    finished = allocate(motions, trained, tmp_path / "copy", "--budget=.99")
    assert finished.returncode == 0, finished.stderr
    again = json.loads((tmp_path / "copy" / "a.json").read_text())
    assert again["sensitivities"][:-1] == kept["sensitivities"]
    assert len(again["sensitivities"]) == 7
    for option in ("--seed_everything=5", "--data.mirror=true", "--model.downsample=pool", "--batches=1"):
        finished = allocate(motions, trained, tmp_path / "copy", "--budget=.99", option)
        assert_one_line(finished, "a.json holds sensitivities of another checkpoint or of other clips")
    for text in ("[]", "{"):
        (tmp_path / "copy" / "a.json").write_text(text)
        assert_one_line(allocate(motions, trained, tmp_path / "copy", "--budget=.99"), "a.json ")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--budget=.2"], "0.2 of the multiply-adds is out of reach"),
        (["--budget=0"], "--budget must lie in (0, 1], got 0"),
        (["--alphas=0,.5"], "--alphas must lie in (0, 1], got 0,.5"),
        (["--alphas=many"], "--alphas must be numbers"),
        (["--batches=0"], "--batches must be at least 1, got 0"),
        (["--skip=[res9]"], "--skip: no convolution has a name that matches 'res9'"),
        (["--skip=[blocks]"], "--skip leaves no convolution"),
        (["--output=nowhere/a.yaml"], "--output must be a .yaml file in a folder that exists, got nowhere/a.yaml"),
        (["--ckpt=nothing.ckpt"], "--ckpt nothing.ckpt: no such file"),
    ],
)
def test_a_mistake_of_an_allocation_is_one_line(allocation, trained, motions, options, part):
    assert_one_line(allocate(motions, trained, allocation, *options), part)


def test_a_sweep_trains_each_alpha_with_each_seed_and_goes_on_where_it_was(run_here, recipe, allocation, tmp_path):
    variants = f"0:pool,{allocation / 'a.yaml'}"
    common = ["--cfg", recipe, "--output", tmp_path, "--alphas", variants, "--rounds", 3]
    status, _, errors, calls = run_here(*common, "--seeds", 0)
    assert status == 0, errors
    assert calls == ["train", "test"] * 2
    status, _, errors, calls = run_here(*common, "--seeds", "0,1")
    assert status == 0, errors
    assert calls == ["train", "test"] * 2  # those of seed 0 are there
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["alpha"], row["downsample"], row["seeds"]) for row in rows] == [
        ("0", "pool", 2),
        (str(allocation / "a.yaml"), "conv", 2),
    ]
    for row, folder in zip(rows, ("alpha-0-pool", "a"), strict=True):
        tops = []
        for seed, run in enumerate(row["runs"]):
            found = json.loads((tmp_path / folder / f"seed-{seed}" / "test" / "predictions.json").read_text())
            assert (run["top1"], run["clip_top1"]) == (found["top1"], found["clip_top1"])
            tops.append(found["top1"])
            options = load_trained(run["checkpoint"]).options
            assert options["downsample"] == row["downsample"]
            assert (tmp_path / folder / f"seed-{seed}" / "config.yaml").read_text().count(f"seed_everything: {seed}\n")
        assert row["top1"] == pytest.approx(sum(tops) / 2)
        assert row["top1_deviation"] == pytest.approx(abs(tops[0] - tops[1]) / 2**0.5)
        assert row["milliseconds"] > 0
    assert options["alpha"] == yaml.safe_load((allocation / "a.yaml").read_text())["model"]["alpha"]
    assert rows[0]["mac_ratio"] == rows[0]["time_ratio"] == 1
    assert 0.9 < rows[1]["mac_ratio"] <= 0.97
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 4
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for folder in (tmp_path, tmp_path / "a"):
        noted = folder / ("recipe.json" if folder == tmp_path else "alpha.json")
        kept = noted.read_text()
        noted.write_text(kept.replace('"downsample": "conv"', '"downsample": "pool"').replace("width", "w"))
        status, _, errors, calls = run_here(*common, "--seeds", 0)
        assert (status, calls) == (2, [])
        assert f"{folder} holds a sweep of another recipe or alpha" in errors
        noted.write_text(kept)


def test_a_run_that_fails_is_named_and_the_others_count(run_here, recipe, tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {alpha: {res9: .5}}")
    common = ["--cfg", recipe, "--output", tmp_path / "out", "--seeds", 0, "--rounds", 1]
    status, _, errors, _ = run_here(*common, "--alphas", f"{tmp_path / 'bad.yaml'},.5")
    assert status == 1
    assert (
        "bad.yaml, seed 0 failed: train_net.py: error: no convolution of Net has a name that matches 'res9'" in errors
    )
    (row,) = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (row["alpha"], row["top1_deviation"]) == (".5", None)


@pytest.mark.long
def test_checkpoints_are_tested_at_other_alphas_with_new_statistics(run_here, recipe, trained, tmp_path):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    common = ["--cfg", recipe, "--output", tmp_path, "--ckpt", checkpoint, "--statistics_batches", 2, "--rounds", 1]
    status, _, errors, calls = run_here(*common, "--alphas", "0:pool,.5")
    assert status == 0, errors
    assert calls == ["test", "test"]
    rows = json.loads((tmp_path / "sweep.json").read_text())
    for row, folder in zip(rows, ("alpha-0-pool", "alpha-0.5"), strict=True):
        (path,) = (tmp_path / folder).glob("*/alphas.json")
        (_, estimated) = json.loads(path.read_text())
        assert estimated["statistics"] == "re-estimated"
        assert row["top1"] == estimated["top1"]
        assert row["gmacs"] == estimated["gmacs"]
    path.write_text(json.dumps([estimated | {"statistics": "checkpoint"}]))  # as if it had been killed in between
    status, _, errors, calls = run_here(*common, "--alphas", "0:pool,.5")
    assert status == 0, errors
    assert calls == ["test"]
    assert json.loads((tmp_path / "sweep.json").read_text())[1]["top1"] == estimated["top1"]
    status, _, errors, calls = run_here(*common, "--alphas", ".5", "--data.train_list", "nothing.csv")
    assert (status, calls) == (2, [])
    assert "holds a sweep of another recipe" in errors
    apart = ["--output", tmp_path / "apart", "--alphas", ".5", "--data.train_list", "nothing.csv"]
    status, _, errors, calls = run_here(*common, *apart)
    assert status == 1
    assert "failed: there are no training videos to estimate batch-norm statistics on" in errors
    shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "other.ckpt")
    with (tmp_path / "other.ckpt").open("ab") as file:
        file.write(b"more")  # another file
    status, _, errors, calls = run_here(*common, "--alphas", ".5", "--ckpt", tmp_path / "other.ckpt")
    assert status == 1
    assert calls == ["test"]


def test_a_test_without_a_good_video_is_a_failed_run(run_here, recipe, trained, tmp_path):
    common = ["--cfg", recipe, "--alphas", ".5", "--rounds", 1]
    folder = tmp_path / "trains" / "alpha-0.5" / "seed-0" / "test"
    folder.mkdir(parents=True)
    (folder / "predictions.json").write_text(json.dumps({"videos": [], "bad": [{}]}))
    status, _, errors, calls = run_here(*common, "--output", tmp_path / "trains", "--seeds", 0)
    assert (status, calls) == (1, [])
    assert "seed 0 failed: none of the videos to test on can be decoded" in errors
    checkpoint = trained / "checkpoints" / "last.ckpt"
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    folder = tmp_path / "tests" / "alpha-0.5" / digest[:16]
    folder.mkdir(parents=True)
    (folder / "alphas.json").write_text(json.dumps([{"statistics": "re-estimated", "videos": 0}]))
    status, _, errors, calls = run_here(*common, "--output", tmp_path / "tests", "--ckpt", checkpoint)
    assert (status, calls) == (1, [])
    assert "last.ckpt failed: none of the videos to test on can be decoded" in errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--alphas", "much"], ["an alpha is a number or a FILE.yaml, got 'much'"]),
        (["--alphas", "2"], ["alpha must lie in [0, 1], got 2"]),
        (["--alphas", "0:max"], ["only :pool may follow an alpha, got '0:max'"]),
        (["--alphas", "nothing.yaml"], ["nothing.yaml has no model.alpha"]),
        (["--alphas", ".5,0.50"], ["--alphas has two of the same name: alpha-0.5, alpha-0.5"]),
        (["--seeds", "one"], ["--seeds: must be whole numbers with commas between them, got 'one'"]),
        (["--rounds", "0"], ["argument --rounds: ", "whole number from 1", "got '0'"]),
        (["--statistics_batches", "0"], ["argument --statistics_batches: ", "whole number from 1", "got '0'"]),
        (["--ckpt", "nothing.ckpt"], ["--ckpt nothing.ckpt: no such file"]),
        (["--ckpt", str(CONFIG), "--alphas", str(CONFIG)], ["--ckpt tests at numbers"]),
        (["--model.alpha=.5"], ["a sweep sets --model.alpha itself: give --alphas, --seeds and --output"]),
        (["more"], ["unrecognized arguments: more"]),
        (["--cfg", "nothing.yaml"], ["--cfg nothing.yaml: no such file"]),
    ],
)
def test_a_mistake_of_a_sweep_is_one_line(run_here, tmp_path, options, parts):
    status, _, errors, calls = run_here("--cfg", CONFIG, "--output", tmp_path / "out", *options)
    assert (status, calls) == (2, [])
    assert errors.startswith("sweep.py: error: ")
    assert all(part in errors for part in parts)
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_may_be_the_name_of_an_installed_one(tmp_path):
    (path,) = sweep.read_arguments(["--cfg", "quickstart", "--output", str(tmp_path)]).cfg
    assert yaml.safe_load(Path(path).read_text()) == yaml.safe_load(Path(CONFIG).read_text())


def test_a_misspelt_option_is_refused_before_anything_runs(tmp_path):
    finished = run_tool("sweep.py", "--cfg", CONFIG, "--output", tmp_path / "out", "--alhpas", 0)
    assert finished.returncode == 2
    assert finished.stderr == "sweep.py: error: unrecognized arguments: --alhpas 0\n"
    assert not (tmp_path / "out").exists()
