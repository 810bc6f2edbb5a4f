"""`octvideo tune`: what it draws, prunes, resumes, shares, reports and refuses; mostly with a stand-in for training."""

import csv
import json
import os
import shlex
import signal
import sys
from argparse import ArgumentTypeError
from multiprocessing.connection import wait

import optuna
import pytest
import yaml
from conftest import CONFIG, FORKS, run_tool, small
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from octvideo.commands import children, main, tune
from octvideo.models.checkpoint import load_trained

# Takes the options of octvideo train. An epoch's figure is the rate + epoch / 100, so that the last one is the best.
# The file `epochs` stands for the checkpoint, `begun` notes from which epoch each process went on. Trials hold after
# their first epoch while there is a file `hold` beside them, or until there are as many as `--together`.
STAND_IN = """
import csv, json, pathlib, signal, sys, time
def end(status, line):
    print(line, file=sys.stderr)
    sys.exit(status)
signal.signal(signal.SIGTERM, lambda *_: end(75, "stopped"))
options = dict(word[2:].split("=", 1) for word in sys.argv[2:] if "=" in word)
if "--print_config" in sys.argv:
    if options["rate"] == "text":
        end(2, "octvideo train: error: rate: expected float, got text")
    print(json.dumps({"loggers": options.get("loggers", "csv").split(), "trainer": {"logger": None}}))
    sys.exit()
folder, rate = pathlib.Path(options["trainer.default_root_dir"]), float(options["rate"])
number, behind = int(folder.name.removeprefix("trial_")), int(options.get("behind", 99))
done = int((folder / "epochs").read_text()) if (folder / "epochs").exists() else 0
with (folder / "begun").open("a") as begun:
    begun.write(f"{done} ")
if rate > float(options.get("bad_above", 9)):
    end(2, "octvideo train: error: rate is too high")
if (folder.parent / "preempt").exists():
    end(75, "stopped by SIGTERM or SIGUSR1")
table = folder / "csv" / f"version_{len(list(folder.glob('csv/*')))}" / "metrics.csv"
table.parent.mkdir(parents=True)
rows = [["epoch", "step", options.get("name", "val/top1"), "train/loss"], [done, 1, "", 2.0], [done, 2, "nan", ""]]
for epoch in range(done, int(options.get("epochs", 3))):
    rows.append([epoch, 10 * epoch, rate + epoch / 100 - (number >= behind), ""])
    with table.with_suffix(".new").open("w") as file:
        csv.writer(file).writerows(rows)
    table.with_suffix(".new").replace(table)
    (folder / "epochs").write_text(str(epoch + 1))
    while (
        (folder.parent / "hold").exists()
        or len(list(folder.parent.glob("trial_*/epochs"))) < int(options.get("together", 0))
        or number >= behind
    ):
        time.sleep(0.01)
print("trained")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a study is; what its trials run is the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "recipe.yaml").write_text("some: recipe\n")
    use_stand_in(tmp_path, monkeypatch.setattr)
    return tmp_path


def use_stand_in(folder, assign=setattr):
    assign(children, "COMMAND", [sys.executable, str(folder / "stand_in.py")])
    assign(children, "LOOK_SECONDS", 0.02)
    assign(sys, "argv", ["tune.py"])


def words(folder, *options):
    given = {"--trials": 3, "--search": "rate=0..1", "--output": folder / "out"}
    given.update({"--cfg": folder / "recipe.yaml"})
    mentioned = {str(option).split("=")[0] for option in options}
    return [str(w) for k, v in given.items() if k not in mentioned for w in (k, v)] + [str(o) for o in options]


@pytest.fixture
def tuned(folder, capsys):
    """Runs the command in this process; its status, what it printed, and the rows of trials.csv."""

    def run(*options):
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = tune.main(words(folder, *options))
        except SystemExit as error:
            status = error.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr(), rows_of(folder / "out")

    return run


def rows_of(out):
    path = out / "trials.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def begin(folder, *options):
    """Starts the command in a process of its own, with its messages in a file."""
    path = folder / f"stderr-{len(list(folder.glob('stderr-*')))}"
    path.touch()
    process = FORKS.Process(target=_tune, args=(folder, path, words(folder, *options)))
    process.start()
    return process, path


def _tune(folder, path, given):
    os.setpgrp()
    sys.stderr = path.open("w", buffering=1)
    use_stand_in(folder)
    sys.exit(tune.main(given))


def until(condition, process):
    """Waits for a process to bring something about."""
    while not condition():
        assert not wait([process.sentinel], timeout=0.01), "the process has ended"


def begun(folder):
    """From which epochs the processes of each trial went on."""
    return [path.read_text().split() for path in sorted(folder.glob("out/trial_*/begun"))]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0..1", FloatDistribution(0, 1)),
        (".1...5", FloatDistribution(0.1, 0.5)),
        ("-1e-1..2", FloatDistribution(-0.1, 2)),
        ("log:.005..0.5", FloatDistribution(0.005, 0.5, log=True)),
        ("int:8..32", IntDistribution(8, 32)),
        ("0,.125,null", CategoricalDistribution(["0", "0.125", "null"])),
        ("slow, slowfast_r50,true", CategoricalDistribution(["slow", "slowfast_r50", "true"])),
        ("[0,.5],[0,0]", CategoricalDistribution(["[0, 0.5]", "[0, 0]"])),
    ],
)
def test_values_to_search(text, values):
    assert tune.read_values(text) == values


def test_a_search_may_be_a_file(tmp_path):
    (tmp_path / "search.yaml").write_text("rate: log:.1..1\nmodel.alpha: [0, [0, .5], {res2: .25}]\nb: 1,2\n")
    assert tune.read_search(str(tmp_path / "search.yaml")) == {
        "rate": FloatDistribution(0.1, 1, log=True),
        "model.alpha": CategoricalDistribution(["0", "[0, 0.5]", '{"res2": 0.25}']),
        "b": CategoricalDistribution(["1", "2"]),
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a=1", "must be LOW..HIGH, log:LOW..HIGH, int:LOW..HIGH or A,B,..., got '1'"),
        ("a=2,2", "got '2,2'"),
        ("a=[1", "got '[1'"),
        ("a=log:1,2", "got 'log:1,2'"),
        ("a=0..inf", "got '0..inf'"),
        ("a=0..x", "'0..x' is no range of numbers: could not convert"),
        ("a=int:.5..2", "'int:.5..2' is no range of numbers: invalid literal"),
        ("a=2..1", "'2..1' is no range of numbers: "),
        ("a=log:0..1", "'log:0..1' is no range of numbers: "),
        ("nothing.yaml", "'nothing.yaml' is neither OPTION=VALUES nor a YAML file of them: "),
        (CONFIG, "got \"{'name': "),
    ],
)
def test_values_that_cannot_be_searched(text, reason):
    with pytest.raises(ArgumentTypeError) as error:
        tune.read_search(text)
    assert reason in str(error.value)


def test_a_file_that_is_no_mapping_is_no_search(tmp_path):
    (tmp_path / "search.yaml").write_text("- a\n")
    with pytest.raises(ArgumentTypeError, match="neither OPTION=VALUES nor a YAML file"):
        tune.read_search(str(tmp_path / "search.yaml"))


def test_trials_are_drawn_from_the_seed_trained_and_reported(tuned, folder):
    search = ["--search", "rate=log:.01..1", "batch=int:8..32", "kind=a,b", "--pruner=none", "--trials", 11]
    status, out, err, rows = tuned(*search, "--more", "thing")
    assert status == 0, err
    assert [row["state"] for row in rows] == ["complete"] * 11
    for number, row in enumerate(rows):
        assert row["number"] == str(number)
        assert 0.01 <= float(row["rate"]) <= 1
        assert 8 <= int(row["batch"]) <= 32
        assert float(row["value"]) == pytest.approx(float(row["rate"]) + 0.02)
        assert row["epochs"] == "3"
        log = (folder / "out" / f"trial_{number:04}" / "log.txt").read_text()
        assert log == "trained\n"
    assert {row["kind"] for row in rows} == {"a", "b"}
    assert len({row["rate"] for row in rows}) == 11
    best = rows[best_of(rows)]
    assert f"best: {folder / 'out'}/trial_{int(best['number']):04}, val/top1 {float(best['value']):.4g}\n" in out
    command = f"octvideo train --cfg={folder / 'recipe.yaml'} --more thing --rate={best['rate']}"
    assert out.splitlines()[-1] == f"{command} --batch={best['batch']} --kind={best['kind']}"
    importance = next(line for line in out.splitlines() if line.startswith("importance: rate "))
    assert importance.count(",") == 2
    assert (folder / "out" / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert "trial_0000 --rate=" in err
    assert "trial_0000: val/top1 " in err
    # The same seed draws the same, interrupted or not; another one does not.
    for output, trials, seed in (("again", 4, 0), ("again", 11, 0), ("other", 1, 1)):
        more = ["--more", "thing", "--output", folder / output, "--seed", seed]
        assert tuned(*search[:-1], trials, *more)[0] == 0
    drawn = [[row["rate"] for row in rows_of(folder / output)] for output in ("out", "again", "other")]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]


def test_a_metric_may_be_minimized_and_values_be_random(tuned):
    options = ["--metric", "val/loss", "--name=val/loss", "--direction", "minimize", "--sampler", "random"]
    status, out, _, rows = tuned(*options)
    assert status == 0
    assert all(float(row["value"]) == float(row["rate"]) for row in rows)
    assert f"val/loss {min(float(row['value']) for row in rows):.4g}\n" in out


def test_a_study_that_has_its_trials_only_reports_and_more_can_follow(tuned, folder):
    first, again, more = tuned(), tuned(), tuned("--trials", 4, "--pruner", "none")
    assert again[1] == first[1]
    assert first[3] == again[3] == more[3][:3]
    assert begun(folder) == [["0"]] * 4


def test_a_trial_that_is_behind_is_stopped_and_pruned(tuned, folder):
    # The first five are what the median is of. Those behind them hold until they are stopped.
    status, out, err, rows = tuned("--trials", 7, "--behind=5")
    assert status == 0
    assert [row["state"] for row in rows] == ["complete"] * 5 + ["pruned"] * 2
    assert [row["epochs"] for row in rows[5:]] == ["1", "1"]
    assert "trial_0006: pruned after epoch 1" in err
    assert (folder / "out" / "trial_0006" / "log.txt").read_text() == "stopped\n"
    assert "pruned" in out
    assert "best: " + str(folder / "out" / f"trial_{best_of(rows[:5]):04}") in out


def best_of(rows):
    return int(max(rows, key=lambda row: float(row["value"]))["number"])


def test_failed_trials_are_named_and_the_others_count(tuned, folder):
    status, out, err, rows = tuned("--trials", 6, "--bad_above=.5")
    assert status == 0
    for row in rows:
        failed = float(row["rate"]) > 0.5
        assert row["state"] == ("fail" if failed else "complete")
        assert row["reason"] == ("rate is too high" if failed else "")
        assert (f"trial_{int(row['number']):04}: failed: rate is too high" in err) == failed
    assert {row["state"] for row in rows} == {"fail", "complete"}
    assert "rate is too high" in out


def test_a_study_whose_first_trials_fail_alike_ends(tuned, folder):
    status, out, err, rows = tuned("--trials", 9, "--bad_above=-1")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "tune.py: error: the first 3 trials failed: rate is too high"
    assert [row["state"] for row in rows] == ["fail"] * 3


def test_without_any_result_the_status_says_so(tuned):
    status, _, err, _ = tuned("--trials", 2, "--name=val/loss")
    assert status == 1
    assert err.splitlines()[-1] == "no trial has a result"
    assert "trial_0001: failed: there is no val/top1 in its metrics.csv" in err


def test_a_training_that_a_signal_stopped_is_left_to_be_resumed(tuned, folder):
    (folder / "out").mkdir()
    (folder / "out" / "preempt").touch()
    status, _, err, _ = tuned()
    assert status == os.EX_TEMPFAIL
    assert err.splitlines()[-1] == "trial_0000 was stopped by a signal; the same command resumes"
    (folder / "out" / "preempt").unlink()
    assert tuned()[0] == 0
    assert begun(folder) == [["0", "0"], ["0"], ["0"]]


@pytest.mark.parametrize("how", ["killed", "killed with its training", "stopped"])
def test_a_study_that_was_killed_goes_on_where_it_was(tuned, folder, how):
    (folder / "out").mkdir()
    hold = folder / "out" / "hold"
    hold.touch()
    process, _ = begin(folder)
    until((folder / "out" / "trial_0000" / "epochs").exists, process)
    if how == "killed with its training":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGTERM if how == "stopped" else signal.SIGKILL)
    process.join()
    assert process.exitcode == (143 if how == "stopped" else -signal.SIGKILL)
    (state,) = [trial.state.name for trial in optuna.load_study(study_name="octvideo", storage=url(folder)).trials]
    assert state == "RUNNING"
    if how == "killed":  # its training is alive, and the next one must wait
        process, said = begin(folder)
        until(lambda: "trial_0000 " in said.read_text(), process)
        assert begun(folder) == [["0"]]
        hold.unlink()
        process.join()
        assert process.exitcode == 0
    else:
        hold.unlink()
        assert tuned()[0] == 0
    assert begun(folder) == [["0", "3" if how == "killed" else "1"], ["0"], ["0"]]
    for row in rows_of(folder / "out"):
        assert row["state"] == "complete"
        assert (row["epochs"], float(row["value"])) == ("3", pytest.approx(float(row["rate"]) + 0.02))


def url(folder):
    return f"sqlite:///{folder / 'out' / 'study.db'}"


@pytest.mark.parametrize("storage", ["", "elsewhere.db"])
def test_two_processes_share_a_study(folder, storage):
    more = ["--storage", f"sqlite:///{folder / storage}"] if storage else []
    processes = [begin(folder, "--trials", 6, "--pruner=none", "--together=2", *more) for _ in range(2)]
    for process, said in processes:
        process.join()
        assert process.exitcode == 0
        assert "trial_00" in said.read_text()
    assert begun(folder) == [["0"]] * 6
    assert [row["state"] for row in rows_of(folder / "out")] == ["complete"] * 6
    assert len({row["rate"] for row in rows_of(folder / "out")}) == 6
    assert (folder / "out" / "study.db").exists() != bool(storage)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--search", "rate"], "argument --search: 'rate' is neither OPTION=VALUES nor a YAML file"),
        (["--search", "rate=1"], "argument --search: must be LOW..HIGH, log:LOW..HIGH"),
        (["--search", "rate=0..1", "rate=2,3"], "--search has an option twice"),
        (["--search", "rate=0..1", "more=1,2", "--more=1"], "--search more: it is given, or set by the study itself"),
        (["--search", "rate=0..1", "ckpt_path=a,b"], "--search ckpt_path: it is given, or set by the study itself"),
        (["--search", "rate=text,1"], "rate: expected float, got text"),
        (["--trainer.default_root_dir=x"], "a study sets --trainer.default_root_dir itself: give --output"),
        (["--loggers=tensorboard"], "--metric is read from metrics.csv: let loggers have csv"),
        (["--trials", "0"], "argument --trials: must be a whole number from 1, got '0'"),
        (["--pruner", "best"], "argument --pruner: invalid choice: 'best'"),
        (["--cfg", "nothing"], "--cfg nothing: no such file"),
        (["--storage", "x"], "the study's database cannot be used: Could not parse SQLAlchemy URL"),
        (["--storage", "nosuch://x"], "the study's database cannot be used: Can't load plugin"),
    ],
)
def test_a_mistake_is_one_line(tuned, folder, options, line):
    status, out, err, rows = tuned(*options)
    assert (status, out, rows) == (2, "", [])
    assert err.startswith(f"tune.py: error: {line}")
    assert err.count("\n") == 1


def test_a_study_of_other_options_is_refused(tuned, folder):
    assert tuned()[0] == 0
    for options in (
        ["--search", "rate=0..2"],
        ["--search", "rate=0..1", "more=1,2"],
        ["--more=1"],
        ["--metric=val/loss"],
        ["--direction=minimize"],
    ):
        status, _, err, _ = tuned("--trials", 4, *options)
        assert status == 2
        assert err.startswith(f"tune.py: error: {folder / 'out'} holds a study of other options (")
        assert err.count("\n") == 1
    (folder / "recipe.yaml").write_text("another: recipe\n")
    assert "holds a study of other options" in tuned("--trials", 4)[2]
    (folder / "recipe.yaml").write_text("some: recipe\n")
    (folder / "out" / "study.db").unlink()
    status, _, err, _ = tuned("--seed=1")  # of another study, which is no more
    assert status == 2
    assert err.splitlines()[-1].startswith(f"tune.py: error: {folder / 'out' / 'trial_0000'} holds a run of other")


def test_a_damaged_study_is_one_line(tuned, folder):
    (folder / "out").mkdir()
    (folder / "out" / "study.db").write_text("no database")
    status, _, err, _ = tuned()
    assert status == 2
    assert "the study's database cannot be used: (sqlite3.DatabaseError) file is not a database" in err
    assert err.count("\n") == 1


def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "octvideo.commands.tune")
    with pytest.raises(SystemExit, match="2"):
        main.run("tune", ["--help"], program="octvideo tune")
    assert capsys.readouterr().err == "octvideo tune: error: tuning needs Optuna: pip install 'octvideo[tune]'\n"


@pytest.mark.parametrize("kind", ["median", "hyperband", "none"])
def test_pruners(folder, kind):
    study = tune.open_study(tune.read_arguments(words(folder, "--pruner", kind)))
    assert type(study.pruner).__name__ == {"median": "MedianPruner", "hyperband": "HyperbandPruner"}.get(
        kind, "NopPruner"
    )


@pytest.mark.long
@pytest.mark.slow
def test_real_trainings_are_tuned(motions, tmp_path):
    recipe = [word for word in small(motions, "unused") if not word.startswith("--trainer.default_root_dir")]
    quick = ["--trainer.limit_train_batches=2", "--model.warmup_epochs=0", "--trainer.max_epochs=2"]
    search = ["--search", "model.learning_rate=log:.01..0.1", "model.alpha=0,.25", f"--output={tmp_path}"]
    finished = run_tool("tune.py", *recipe, *quick, *search, "--trials=2")
    assert finished.returncode == 0, finished.stderr
    rows = rows_of(tmp_path)
    for row in rows:
        run = tmp_path / f"trial_{int(row['number']):04}"
        options = yaml.safe_load((run / "config.yaml").read_text())["model"]
        assert options["learning_rate"] == float(row["model.learning_rate"])
        trained = load_trained(run / "checkpoints" / "best.ckpt")
        assert trained.options["alpha"] == json.loads(row["model.alpha"])
        assert (row["state"], row["epochs"]) == ("complete", "2")
        logged = tune.read_metric(run, "val/top1")
        assert float(row["value"]) == max(logged.values())
        assert set(logged) == {0, 1}
    best = shlex.split(finished.stdout.splitlines()[-1])
    assert best[:2] == ["octvideo", "train"]
    again = run_tool("train_net.py", *best[2:], f"--trainer.default_root_dir={tmp_path / 'best'}", "--print_config")
    assert again.returncode == 0, again.stderr
