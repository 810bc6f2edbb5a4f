"""octvideo cost: its table, its file, its configuration, and its mistakes."""

import json
from functools import partial

import pytest
import torch
import yaml
from pytorchvideo.models import resnet

from octvideo import create_model
from octvideo.commands import cost
from octvideo.commands import options as command_options
from octvideo.models.choose_alpha import Choice
from octvideo.models.cost import count_cost, count_parameters, total

SMALL = ["--model=i3d_r50", "--size=4x32x32", "--batch=2"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(resnet._MODEL_STAGE_DEPTH, 50, (1, 1, 1, 1))
    monkeypatch.setattr(command_options, "program", "octvideo cost")


def test_the_table_and_the_file_say_what_was_counted(capsys, tmp_path):
    cost.main([*SMALL, "--alpha=0,.5", "--layers", f"--json={tmp_path / 'cost.json'}"])
    out = capsys.readouterr().out
    assert out.startswith("i3d_r50, 2 x 4x32x32, bf16, inference, h100\n")
    saved = json.loads((tmp_path / "cost.json").read_text())
    assert saved["size"] == [3, 4, 32, 32]
    assert saved["machine"] == {"name": "h100", "flops": 600e12, "bandwidth": 2.8e12, "launch": 4e-6}
    for row, alpha in zip(saved["rows"], (0, 0.5), strict=True):
        with torch.device("meta"):
            network = create_model("i3d_r50", alpha=alpha)
        wanted = total(count_cost(network, (3, 4, 32, 32), batch=2, dtype=torch.bfloat16))
        assert (row["macs"], row["bytes"], row["kernels"]) == (wanted.macs, wanted.bytes_moved, wanted.kernels)
        assert row["parameters"] == count_parameters(network)
        assert sum(layer["bytes"] for layer in row["layers"].values()) == row["bytes"]
        assert sum(layer["predicted_seconds"] for layer in row["layers"].values()) == pytest.approx(
            row["predicted_seconds"]
        )
        assert row["measured_seconds"] is row["compiled_kernels"] is None
        cells = [f"{alpha:g}", f"{row['macs'] / 1e9:.2f}", str(row["kernels"]), f"{row['predicted_ratio']:.2f}"]
        assert any(all(cell in line.split() for cell in cells) for line in out.splitlines())
    assert any("blocks.1.res_blocks.0.branch2.conv_b" in line for line in out.splitlines())


def test_training_costs_more_and_measured_time_stands_beside(capsys, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(cost, "create_model", partial(create_model, width=8))
    figures = []
    for mode in ([], ["--train"]):
        words = [
            *SMALL,
            *mode,
            "--dtype=fp32",
            "--alpha=.5",
            "--measure",
            "--rounds=1",
            f"--json={tmp_path / 'c.json'}",
        ]
        cost.main(words)
        (row,) = json.loads((tmp_path / "c.json").read_text())["rows"]
        assert row["measured_seconds"] > 0
        assert row["measured_ratio"] == row["predicted_ratio"] == 1
        figures.append(row)
    assert "here" in capsys.readouterr().out
    assert figures[1]["macs"] > 2 * figures[0]["macs"]
    assert figures[1]["kernels"] > 2 * figures[0]["kernels"]


def test_auto_prints_a_configuration(capsys, monkeypatch):
    chosen = Choice({r"^blocks\.1\.": 0.25}, 0.003, 0.004)
    monkeypatch.setattr(cost, "choose_alpha", lambda *_, budget, **__: chosen if budget == 0.8 else Choice({}, 1, 1))
    cost.main([*SMALL, "--auto", "--budget=.8"])
    out = capsys.readouterr().out
    first, rest = out.split("\n", 1)
    assert first == "# i3d_r50, 2 x 4x32x32, bf16, inference, h100: predicted 3.00 ms, 0.750 of the 4.00 ms at alpha 0"
    assert yaml.safe_load(rest) == {"model": {"name": "i3d_r50", "alpha": chosen.alpha}}
    create_model(**yaml.safe_load(rest)["model"])
    cost.main([*SMALL, "--auto"])
    assert yaml.safe_load(capsys.readouterr().out) == {"model": {"name": "i3d_r50", "alpha": 0.0}}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give --model NAME or --ckpt FILE"),
        (["--model=i3d_r51"], "argument --model: invalid choice: 'i3d_r51'"),
        ([*SMALL, "--alpha=0,2"], "argument --alpha: must be numbers in [0, 1] with commas between them, got '2'"),
        ([*SMALL, "--budget=.8"], "--budget needs --auto"),
        ([*SMALL, "--auto", "--measure"], "--auto prints a configuration only: leave --measure out"),
        ([*SMALL, "--machine=t4"], "machine t4 has no torch.bfloat16: choose fp32, fp16"),
        ([*SMALL, "--machine=h200"], "machine must be h100, a100, t4, laptop-cpu, here, or FLOPS,BANDWIDTH,LAUNCH"),
        (["--model=i3d_r50", "--size=1x4x4"], "the network does not take clips of 1 x 4 x 4: "),
        (["--ckpt=missing.ckpt"], "missing.ckpt"),
        ([*SMALL, "--alpha=0", "--json=/dev/null/cost.json"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cost.main(words)
    message = capsys.readouterr().err
    assert message.startswith("octvideo cost: error: ")
    assert line in message
    assert message.count("\n") == 1
