"""experiments/speed.py as users and other programs run it; no speeds are asserted."""

import copy
import json
import re
import sys
import time

import gpu_suite
import numpy as np
import operations
import pytest
import speed
import timing
import torch
from conftest import ROOT, run_tool, settle
from matplotlib import image
from textbook import NoTextbookError, TextbookConv3d, TextbookNorm, textbook
from torch import nn

from octvideo import MODELS, Octaves, OctConv3d, create_model
from octvideo.models.cost import count_macs, count_parameters

pytestmark = pytest.mark.usefixtures("one_thread")  # --threads sets what other tests would keep
SIZE = (4, 32, 32)
SMALL = ("--width=8", "--size=4x32x32", "--rounds=2", "--warmup=1", "--threads=1", "--device=cpu")
CONTRACT = {"model", "form", "alpha", "batch", "mode", "dtype", "compiled", "params", "macs", "seconds", "saved_bytes"}
CONTRACT |= {"time_ratio", "mac_ratio"}


@pytest.fixture
def run_here(tmp_path):
    """Runs the tool in this process; gives the rows of its JSON file."""

    def run(*options):
        speed.main([*SMALL, f"--json={tmp_path / 'rows.json'}", *options])
        return json.loads((tmp_path / "rows.json").read_text())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run with every output: the process, and the folder with rows.json, layers.json and plot.png."""
    folder = tmp_path_factory.mktemp("speed")
    files = (f"--json={folder / 'rows.json'}", f"--plot={folder / 'plot.png'}")
    layers = ("--layers", f"--layers-json={folder / 'layers.json'}")
    process = run_tool("speed.py", *SMALL, "--alphas=.5", "--mode=inference,train", *files, *layers)
    assert process.returncode == 0, process.stderr
    return process, folder


@pytest.fixture(scope="session")
def rows(finished):
    return json.loads((finished[1] / "rows.json").read_text())


def test_rows_have_the_keys_and_values_of_the_contract(rows):
    networks = [(row["mode"], row["form"], row["alpha"]) for row in rows]
    forms = [("octvideo", 0), ("octvideo", 0.5), ("shipped", 0), ("channels_last", 0), ("textbook", 0.5)]
    assert networks == [(mode, *form) for mode in ("inference", "train") for form in forms]
    for row in rows:
        assert row.keys() >= CONTRACT
        network = create_model("i3d_r50", alpha=row["alpha"], width=8)
        assert row["params"] == count_parameters(network)
        assert row["macs"] == count_macs(network, (3, *SIZE))
        assert (row["model"], row["batch"], row["dtype"], row["compiled"]) == ("i3d_r50", 1, "fp32", False)
        assert (row["size"], row["device"], row["threads"]) == ("4x32x32", "cpu", 1)
        assert (row["torch"], row["rounds"], row["fused"]) == (torch.__version__, 2, False)
        assert row["peak_bytes"] is None
        assert (row["saved_bytes"] is None) == (row["mode"] == "inference")


def test_ratios_are_against_the_fastest_vanilla_form_of_the_same_group(rows):
    for group in (rows[:5], rows[5:]):
        vanilla = min((row for row in group if row["alpha"] == 0), key=lambda row: row["seconds"])
        assert (vanilla["time_ratio"], vanilla["mac_ratio"]) == (1, 1)
        for row in group:
            assert row["normalised_against"] == f"{vanilla['form']}, alpha 0"
            assert row["mac_ratio"] == row["macs"] / vanilla["macs"]
            assert row["time_over_mac"] == row["time_ratio"] / row["mac_ratio"]
            assert 0 < row["seconds_min"] <= row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
            assert row["clips_per_second"] == pytest.approx(1 / row["seconds"])


def test_octave_networks_save_fewer_bytes_for_backward(rows):
    vanilla, octave, shipped, channels_last, textbook = (row["saved_bytes"] for row in rows[5:])
    assert octave < vanilla
    assert textbook < shipped == channels_last


def test_output_names_hardware_versions_and_command_and_shows_no_bar_without_a_terminal(finished):
    process, _ = finished
    first, second, *_ = process.stdout.splitlines()
    assert re.search(rf"\d+ cores, 1 threads, torch {re.escape(torch.__version__)}", first)
    assert second.startswith("experiments/speed.py --width=8 --size=4x32x32")
    assert "model i3d_r50, batch 1, clip 4x32x32, dtype fp32, params 539,128" in " ".join(process.stdout.split())
    assert "textbook" in process.stdout
    assert process.stderr == ""


def test_the_plot_is_a_picture_with_content(finished):
    pixels = image.imread(finished[1] / "plot.png", format="png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_layers_are_compared_with_their_vanilla_counterparts(finished):
    process, folder = finished
    layers = json.loads((folder / "layers.json").read_text())
    assert {layer["mode"] for layer in layers} == {"inference", "train"}
    inference = [layer for layer in layers if layer["mode"] == "inference"]
    # res2 to res4 have 3 * (3 + 4 + 6) convolutions and 3 shortcuts, and two of res5 read octaves
    assert sum(len(layer["layers"]) for layer in inference) == 42 + 2
    names = {name: layer for layer in inference for name in layer["layers"]}
    middle = names["blocks.1.res_blocks.1.branch2.conv_b"]
    assert (middle["kernel"], middle["in_channels"], middle["out_channels"]) == ("1x3x3", 8, 8)
    assert middle["input"] == "4x4x8x8 + 4x4x4x4"
    assert middle["mac_ratio"] == pytest.approx(1 - 3 / 4 * 0.5 * (2 - 0.5))  # section 3.2 of the paper
    assert middle["macs"] == round(8 * 8 * 9 * 4 * 8 * 8 * middle["mac_ratio"])
    assert names["blocks.1.res_blocks.0.branch1_conv"]["input"] == "8x4x8x8"
    for layer in layers:
        assert layer["time_over_mac"] == pytest.approx(layer["time_ratio"] / layer["mac_ratio"])
    tables = process.stdout.split("layers, by time / MAC")[1:]
    worst = [re.findall(r"^ +blocks.* ([\d.]+) *$", table, re.MULTILINE) for table in tables]
    assert [len(column) for column in worst] == [20, 20]
    assert all(column == sorted(column, key=float, reverse=True) for column in worst)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--models=i3d"], ["no model 'i3d'; there are c2d_r50, c2d_r50_nonlocal, i3d_r50"]),
        (["--alphas=0,1.5"], ["alpha must lie in [0, 1], got '1.5'"]),
        (["--alphas=0,half"], ["alpha must lie in [0, 1], got 'half'"]),
        (["--alphas=nan"], ["alpha must lie in [0, 1], got 'nan'"]),
        (["--size=8x224"], ["TxHxW", "such as 8x224x224, got '8x224'"]),
        (["--size=8x0x224"], ["got '8x0x224'"]),
        (["--batch=0"], ["a whole number from 1", "got '0'"]),
        (["--dtype=fp16"], ["no dtype 'fp16'; there are fp32, bf16"]),
        (["--mode=test"], ["no mode 'test'; there are inference, train"]),
        (["--forms=mine"], ["no form 'mine'; there are octvideo, shipped, channels_last, textbook"]),
        (["--alhpas=0"], ["unrecognized arguments: --alhpas=0"]),
        (["--json=nowhere/rows.json"], ["--json nowhere/rows.json: No such file or directory"]),
        (["--plot=tests"], ["--plot tests: this is a folder"]),
        (["--layers-json=rows.json"], ["--layers-json needs --layers"]),
        (["--compile-mode=max-autotune"], ["--compile-mode needs --compile"]),
        (["--layers", "--alphas=0"], ["--layers needs an alpha above 0"]),
        (["--fuse", "--mode=inference,train"], ["--fuse folds batch norm in, which training cannot"]),
        (["--size=1x32x32"], ["i3d_r50 does not take clips of 1x32x32"]),
        (["--models=slowfast_r50", "--size=6x32x32"], ["multiple of 4 frames, got 6"]),
        (["--models=x3d_s", "--width=9"], ["width must be a multiple of 8 for x3d_s, got 9"]),
        (["--mode=train", "--size=2x32x32", "--forms=octvideo", "--alphas=0"], ["more than 1 value"]),
    ],
    ids=str,
)
def test_a_mistake_ends_the_tool_with_one_clear_line(monkeypatch, capsys, options, parts):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    with pytest.raises(SystemExit) as ended:
        speed.main([*SMALL, *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("speed.py: error: ")
    for part in parts:
        assert part in line


def test_a_mistake_ends_the_process_too():
    process = run_tool("speed.py", "--models=i3d")
    assert process.returncode == 2
    assert process.stderr.startswith("speed.py: error: argument --models: no model 'i3d'")
    assert process.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_mistake(capsys):
    with pytest.raises(SystemExit):
        speed.parse(["--device=cuda"])
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_help_explains_the_forms_and_the_step(capsys):
    with pytest.raises(SystemExit) as ended:
        speed.parse(["--help"])
    assert ended.value.code == 0
    assert "no step of an optimiser" in " ".join(capsys.readouterr().out.split())


def test_quick_gives_way_to_other_options():
    quick = speed.parse(["--quick"])
    assert (quick.models, quick.alphas, quick.size) == (("i3d_r50",), (0, 0.25, 0.5), (8, 112, 112))
    other = speed.parse(["--quick", "--alphas=.125,.125", "--models=c2d_r50,slow_r50"])
    assert (other.models, other.alphas, other.size) == (("c2d_r50", "slow_r50"), (0.125,), (8, 112, 112))


def test_clips_are_those_of_the_documentation():
    table = re.findall(
        r"^\| `(\w+)` \| (\d+) x (\d+) x (\d+) \|", (ROOT / "docs/networks.md").read_text(), re.MULTILINE
    )
    assert len(table) == len(MODELS)
    for name, *size in table:
        assert speed.CLIPS.get(name, speed.CLIP) == tuple(map(int, size))


def test_the_plan_is_every_combination_and_always_starts_with_vanilla():
    options = ["--models=c2d_r50,x3d_xs", "--width=8", "--alphas=.5,.25", "--forms=textbook", "--batch=2,1"]
    told = []
    groups = speed.plan(speed.parse([*options, "--mode=train", "--dtype=fp32,bf16"]), told.append)
    sizes = {"c2d_r50": (8, 224, 224), "x3d_xs": (4, 160, 160)}
    assert [(group.model, group.size, group.dtype, group.batch) for group in groups] == [
        (name, size, dtype, batch) for name, size in sizes.items() for dtype in ("fp32", "bf16") for batch in (2, 1)
    ]
    for group in groups:
        textbook = [] if group.model == "x3d_xs" else [("textbook", 0.5), ("textbook", 0.25)]
        assert [(variant.form, variant.alpha) for variant in group.variants] == [("octvideo", 0), *textbook]
    assert len(told) == 2


def test_a_ratio_is_the_median_of_the_ratios_within_a_round():
    vanilla, octave = speed.Variant("octvideo", 0, 10, 100), speed.Variant("octvideo", 0.5, 10, 50)
    group = speed.Group("i3d_r50", SIZE, 2, "train", "fp32", (vanilla, octave))
    row = speed.row_of(group, octave, speed.parse([]), [1, 4, 9], [1, 1, 3])
    assert row["seconds"] == 4
    assert row["time_ratio"] == 3  # of 1, 4 and 3; the ratio of the medians would be 4
    assert (row["mac_ratio"], row["time_over_mac"], row["clips_per_second"]) == (0.5, 6, 0.5)


def test_every_finished_group_is_in_the_json_file(monkeypatch, run_here, tmp_path):
    def measure(group, options, tick):
        if group.batch == 3:
            raise KeyboardInterrupt
        return [{"batch": group.batch}]

    monkeypatch.setattr(speed, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run_here("--batch=1,2,3", "--forms=shipped")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"batch": 1}, {"batch": 2}]


def test_a_json_file_that_cannot_be_finished_stays_as_it_was(tmp_path):
    speed.write_json([{"alpha": 0.5}], tmp_path / "rows.json")
    with pytest.raises(TypeError):
        speed.write_json([{"alpha": object()}], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"alpha": 0.5}]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("i3d_r50", (4, 32, 32)),
        ("i3d_r50", (4, 72, 88)),
        ("slowfast_r50", (8, 48, 48)),
        ("r2plus1d_r50", (8, 40, 40)),
        ("c2d_r50_nonlocal", (4, 64, 64)),
    ],
)
@pytest.mark.parametrize("alpha", [0.125, 0.5])
def test_textbook_networks_have_octvideos_logits(name, size, alpha):
    torch.manual_seed(0)
    vanilla = settle(create_model(name, width=16, num_classes=5))
    octave = create_model(name, alpha=alpha, width=16, num_classes=5).eval()
    octave.load_state_dict(vanilla.state_dict())
    network = textbook(vanilla, copy.deepcopy(octave).to("meta"), size).eval()
    clip = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = octave(clip)
        torch.testing.assert_close(network(clip), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
    assert not any(isinstance(module, OctConv3d) for module in network.modules())
    assert count_macs(network, (3, *size)) == count_macs(octave, (3, *size))


def test_a_textbook_layer_is_four_convolutions_and_a_norm_for_each_map():
    layer = TextbookConv3d(nn.Conv3d(8, 12, 3, padding=1), 0.25, ((6, 2),))
    shapes = [tuple(module.weight.shape[:2]) for module in layer.children() if isinstance(module, nn.Conv3d)]
    assert shapes == [(9, 6), (9, 2), (3, 6), (3, 2)]
    norm = TextbookNorm(nn.BatchNorm3d(12), ((9, 3),))
    assert (norm.high.num_features, norm.low.num_features) == (9, 3)
    output = norm(layer(Octaves(torch.randn(1, 6, 2, 7, 7), torch.randn(1, 2, 2, 4, 4))))
    assert (output.high.shape, output.low.shape) == ((1, 9, 2, 7, 7), (1, 3, 2, 4, 4))


@pytest.mark.parametrize(
    ("layer", "alpha", "parts", "reason"),
    [
        (nn.Conv3d(8, 8, 1, groups=8), 0.5, ((4, 4),), "a convolution of 8 groups"),
        (nn.Conv3d(8, 8, 1), 1, ((4, 4),), "a convolution without high channels"),
        (nn.Conv3d(8, 8, 1), 0.5, ((0, 8),), "a convolution without high channels"),
    ],
)
def test_layers_without_a_textbook_form_are_refused(layer, alpha, parts, reason):
    with pytest.raises(NoTextbookError, match=reason):
        TextbookConv3d(layer, alpha, parts)


def test_networks_without_a_textbook_form_are_measured_without_it(run_here, capsys):
    rows = run_here("--models=x3d_xs", "--alphas=.25")
    forms = [("octvideo", 0), ("octvideo", 0.25), ("shipped", 0), ("channels_last", 0)]
    assert [(row["form"], row["alpha"]) for row in rows] == forms
    assert "x3d_xs: no textbook form at alpha 0.25: blocks.1.res_blocks.0.branch2.conv_b" in capsys.readouterr().err


def test_bf16_is_measured_and_a_textbook_form_that_torch_lacks_is_named(run_here, capsys):
    rows = run_here("--alphas=.25", "--dtype=bf16", "--batch=2")
    has_textbook = speed.has_average_pool(torch.bfloat16, "cpu")
    assert [row["form"] for row in rows] == [
        "octvideo",
        "octvideo",
        "shipped",
        "channels_last",
        *["textbook"] * has_textbook,
    ]
    assert ("no textbook form in bf16" in capsys.readouterr().err) != has_textbook
    assert {(row["dtype"], row["batch"]) for row in rows} == {("bf16", 2)}


def test_all_forms_start_from_the_same_weights():
    options = speed.parse([*SMALL, "--alphas=.25"])
    (group,) = speed.plan(options, pytest.fail)
    clip, _ = speed.random_clips(group, "cpu")
    with torch.inference_mode():
        vanilla, octave, shipped, channels_last, textbook = (
            speed.prepare(group, variant, options)(clip) for variant in group.variants
        )
    assert vanilla.isfinite().all()
    torch.testing.assert_close(vanilla, shipped, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vanilla, channels_last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(octave, textbook, atol=1e-4, rtol=1e-4)
    assert (octave - vanilla).abs().max() > 1e-3


def test_layers_are_timed_under_autocast_too(run_here, tmp_path):
    layers = tmp_path / "layers.json"
    options = ("--alphas=.5", "--forms=octvideo", "--rounds=1", "--layers", f"--layers-json={layers}")
    run_here("--mode=train", "--dtype=bf16", *options)
    assert {(layer["mode"], layer["dtype"], layer["alpha"]) for layer in json.loads(layers.read_text())} == {
        ("train", "bf16", 0.5)
    }


def test_a_layers_input_has_the_layout_that_it_has_in_the_network():
    options = speed.parse([*SMALL, "--alphas=.25"])
    (group,) = speed.plan(options, pytest.fail)
    seen = speed.seen_in(group, 0.25, options)["blocks.1.res_blocks.1.branch2.conv_b"]
    x = speed.random_like(seen.input, "cpu")
    assert (x.high.shape, x.low.shape) == ((1, 6, 4, 8, 8), (1, 2, 4, 4, 4))
    for part in x:
        assert part.is_contiguous(memory_format=torch.channels_last_3d)
        assert part.std() > 0.5


def test_fused_networks_are_octvideos_only(run_here):
    rows = run_here("--alphas=.25", "--fuse")
    assert [row["form"] for row in rows if row["fused"]] == ["octvideo", "octvideo"]
    assert len(rows) == 5


def test_a_block_drops_its_first_calls(monkeypatch):
    clock = iter([0, 9, 18, 19, 21, 24])  # five calls of 9, 9, 1, 2 and 3 seconds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.time_block(lambda: None, "cpu", 5, 2) == 2


GROUPS = [
    gpu_suite.Group("eager", "i3d_r50", 2, dtype="fp32", alphas=(0.5,)),
    gpu_suite.Group("eager", "i3d_r50", 2, "train", "tf32", alphas=(0.5,), forms=("shipped",)),
    gpu_suite.Group("graphs", "i3d_r50", 2, dtype="fp32", folded=True, alphas=(), forms=("octvideo",)),
    gpu_suite.Group("graphs", "i3d_r50", 1, compiled="graph"),  # GPUs only
]


@pytest.fixture
def run_suite(monkeypatch, capsys, tmp_path):
    """Runs the suite for GPUs on the CPU; gives what it wrote, and what it printed."""

    def run(*options):
        monkeypatch.setattr(gpu_suite, "groups", lambda: iter(GROUPS))
        small = ("--device=cpu", "--size=4x32x32", "--width=8", "--rounds=1", "--steps=3", "--warmup=1", "--workers=0")
        speed.main(["--suite=gpu", *small, f"--json={tmp_path / 'suite.json'}", *options])
        return json.loads((tmp_path / "suite.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.long
def test_the_suite_for_gpus_measures_its_groups_and_passes_failures_over(monkeypatch, run_suite):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory\nfor it")

    monkeypatch.setitem(gpu_suite.FORMS, "channels_last", fail)
    found, printed = run_suite()
    assert found["failures"] == [
        {"what": "i3d_r50 batch 2 inference fp32: channels_last 0", "error": "OutOfMemoryError: no memory"}
    ]
    assert found["left_out"] == []
    names = [(row["mode"], row["form"], row["alpha"], row["passes"]) for row in found["rows"] if row["passes"] == "off"]
    assert names == [
        *[
            ("inference", "octvideo", 0, "off"),
            ("inference", "shipped", 0, "off"),
            ("inference", "octvideo", 0.5, "off"),
        ],
        *[("train", "shipped", 0, "off"), ("train", "octvideo", 0.5, "off"), ("inference", "octvideo", 0, "off")],
    ]
    for row in found["rows"]:
        group = [other for other in found["rows"] if other["group"] == row["group"]]
        (reference,) = (other for other in group if other["is_reference"])
        assert row["normalised_against"] == reference["form"]
        assert reference["seconds"] == min(other["seconds"] for other in group if other["alpha"] == 0)
        for key, ratio in (("macs", "mac_ratio"), ("bytes_moved", "byte_ratio"), ("kernels", "kernel_ratio")):
            assert row[ratio] == row[key] / reference[key]
    network = create_model("i3d_r50", alpha=0.5, width=8)
    assert {row["macs"] for row in found["rows"] if row["alpha"] == 0.5} == {count_macs(network, (3, *SIZE))}
    assert found["ceilings"].keys() == {"flops_per_second", "bytes_per_second", "seconds_per_launch"}
    checks = {(row["network"], row["mode"], row["dtype"]) for row in found["checks"]}
    assert len(checks) == len(found["checks"]) == 12
    assert max(row["output_off"] for row in found["checks"] if row["dtype"] == "fp32") < 0.01
    table = printed.split("i3d_r50 batch 2 train tf32")[-1]
    assert re.search(r"^shipped 0 \* +[\d.]+ .* 1\.000 ", table, re.MULTILINE)


def test_the_suite_for_gpus_ends_in_time(monkeypatch, run_suite):
    # The alarm strikes here, in Python, and not in torch's C++, which some exceptions would end.
    monkeypatch.setattr(gpu_suite, "measure_ceilings", lambda *arguments, **options: time.sleep(30))
    found, printed = run_suite("--minutes=.001", "--sections=eager,graphs")
    assert found["rows"] == []
    for group in GROUPS:  # or each form of the first ones
        assert any(name.startswith(str(group)) for name in found["left_out"])
    assert "left_out: i3d_r50 batch 1 inference bf16, compiled: graph" in printed


class TinyNetwork(nn.Sequential):
    """Compiles in seconds."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 400)
        )


@pytest.mark.long
@pytest.mark.slow
def test_compiled_networks_are_measured(monkeypatch, run_here):
    monkeypatch.setattr(speed, "FORMS", {"octvideo": lambda *arguments: TinyNetwork()})
    rows = run_here("--alphas=.25,.5", "--forms=octvideo", "--compile", "--mode=inference,train")
    assert [(row["mode"], row["compiled"], row["fused"]) for row in rows] == [
        *[("inference", True, True)] * 3,
        *[("train", True, False)] * 3,
    ]
    assert all(row["saved_bytes"] > 0 for row in rows[3:])


def test_the_parts_of_a_forward_pass_are_timed(capsys):
    operations.main(["--model=x3d_xs", "--alphas=.25", "--rounds=1"])
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    vanilla, octave = ([float(cell) for cell in row] for row in rows)
    assert (vanilla[0], vanilla[1], *vanilla[-2:]) == (0, 1, 1, 1)
    assert octave[0] == 0.25
    assert 0.7 < octave[1] < 0.9
    for row in (vanilla, octave):
        assert all(cell > 0 for cell in row[2:7])
        assert sum(row[2:8]) == pytest.approx(row[8], rel=0.05)
