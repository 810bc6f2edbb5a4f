"""The console command: what it says of itself, how it finds commands and configurations, and the scripts in tools/."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import octvideo
from octvideo.commands.main import COMMANDS, HELP, main
from octvideo.commands.options import config_file, one_line_errors, with_config_files
from octvideo.errors import DecodeError, UserError

SCRIPTS = {
    **{"train_net": "train", "test_net": "test", "predict": "predict", "prepare_data": "prepare", "export": "export"},
    **{
        "report": "report",
        "cost": "cost",
        "demo": "demo",
        "sweep": "sweep",
        "tune": "tune",
        "serve": "serve",
        "runs": "runs",
    },
    **{"features": "features", "push": "push", "shrink": "shrink"},
}


def called(monkeypatch, capsys, *words):
    """The exit status of the command, and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["octvideo", *words])
    status = main()
    return status, *capsys.readouterr()


def test_a_warning_is_a_line_without_the_code_it_came_from(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name: c2d_r50, alpha: 0}\ntrainer: {max_epochs: 1}\n")
    run = f"run('runs', {[str(tmp_path)]})"
    code = f"import warnings; from octvideo.commands.main import run; {run}; warnings.warn('a merge')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stderr == "warning: a merge\n"


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_fits_a_screen_and_says_what_each_command_is_for(monkeypatch, capsys, word):
    status, out, _ = called(monkeypatch, capsys, word)
    assert status == 0
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80
    assert all(f"  {name:9} {what}" in out for name, what in COMMANDS.items())


def test_without_a_command_it_says_how_to_use_it_and_fails(monkeypatch, capsys):
    assert called(monkeypatch, capsys) == (2, f"{HELP}\n", "")


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    status, out, err = called(monkeypatch, capsys, "trian")
    assert (status, out) == (2, "")
    assert err.startswith("octvideo: error: no command 'trian'; there are motions, prepare, train")
    assert err.count("\n") == 1


def test_it_knows_its_version(monkeypatch, capsys):
    assert called(monkeypatch, capsys, "--version") == (0, f"octvideo {importlib.metadata.version('octvideo')}\n", "")
    assert octvideo.__version__ == importlib.metadata.version("octvideo")


def test_python_m_is_the_same_and_errors_name_the_command():
    command = [sys.executable, "-m", "octvideo", "predict", "--clips", "0", "x.mp4", "--ckpt", "x.ckpt"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("octvideo predict: error: argument --clips: must be a whole number from 1")


def test_every_command_has_a_module_and_a_script_of_a_few_lines():
    commands = {path.stem for path in (ROOT / "octvideo" / "commands").glob("*.py")}
    assert set(COMMANDS) == commands - {"__init__", "main", "options", "command_line", "children", "stream"}
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == set(SCRIPTS)
    for script, command in SCRIPTS.items():
        lines = (ROOT / "tools" / f"{script}.py").read_text().splitlines()
        assert len(lines) <= 8
        assert f'    sys.exit(run("{command}"))' in lines


def test_configurations_are_found_by_name_and_files_by_path(tmp_path, monkeypatch):
    assert config_file("quickstart") == config_file("quickstart.yaml") == str(ROOT / "configs" / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("model: {}\n")
    assert config_file("quickstart") == "quickstart"  # a file goes first
    with pytest.raises(
        UserError, match=r"--cfg nothing: no such file, and no configuration of that name; there are c2d"
    ):
        config_file("nothing")
    os.mkfifo("pipe")
    assert config_file("pipe") == "pipe"
    with pytest.raises(UserError, match=r"--cfg configs/i3d.yaml: no such file"):
        config_file("configs/i3d.yaml")


def test_all_spellings_of_cfg_take_names():
    i3d, finetune = (str(ROOT / "configs" / f"{name}.yaml") for name in ("i3d", "finetune"))
    words = ["--cfg", "i3d", "--model.name", "i3d", "--cfg=finetune", "-c", "i3d"]
    assert with_config_files(words) == ["--cfg", i3d, "--model.name", "i3d", f"--cfg={finetune}", "-c", i3d]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            UserError("last.ckpt: its weights do not fit:\n  size mismatch"),
            "last.ckpt: its weights do not fit: size mismatch",
        ),
        (UserError("Caught UserError in worker 0.\nTraceback\noctvideo.errors.UserError: no decord"), "no decord"),
        (DecodeError("a.mp4", "broken"), "a.mp4: broken"),
        (OSError("the disk is full"), "the disk is full"),
    ],
)
def test_errors_that_a_user_can_put_right_are_one_whole_line(error, line, capsys):
    with pytest.raises(SystemExit, match="2"), one_line_errors():
        raise error
    assert capsys.readouterr().err.endswith(f": error: {line}\n")
