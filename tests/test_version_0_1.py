"""A checkpoint that version 0.1 wrote still opens everywhere, and means the same.

tests/version_0_1 holds what a run of two epochs on a motions data set of 16 + 8 videos saved after the first one, and
the logits that 0.1 gave for a random clip: at this checkpoint's own alpha, at others, and after the second epoch.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_tool

from octvideo.data.motions import CLASSES, make_data_set
from octvideo.models.checkpoint import load_trained

pytestmark = pytest.mark.usefixtures("one_thread")  # as the logits were recorded
FOLDER = ROOT / "tests" / "version_0_1"
CHECKPOINT = FOLDER / "step_00000004.ckpt"
LOGITS = json.loads((FOLDER / "logits.json").read_text())


def logits_of(path, alpha=None):
    """What a checkpoint's network gives for the clip."""
    clips = torch.randint(256, (2, 3, 4, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trained = load_trained(path, alpha)
    with torch.inference_mode():
        return trained.network(trained.normalize(clips))


def recorded(name):
    return torch.tensor([[float.fromhex(value) for value in row] for row in LOGITS[name]])


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motions_0_1")
    make_data_set(folder, 16, 8)
    return folder


def options(motions, run):
    lists = [f"--data.{split}_list={motions / f'{split}.csv'}" for split in ("train", "val")]
    return [
        *("--cfg=configs/quickstart.yaml", *lists, f"--data.root={motions}", f"--trainer.default_root_dir={run}"),
        *("--model.name=c2d_r50", "--model.width=4", "--model.alpha=.5", "--data.clip_frames=4", "--data.batch_size=4"),
        *("--data.num_workers=1", "--trainer.accelerator=cpu", "--loggers=[]"),
    ]


@pytest.mark.parametrize("alpha", [None, 0.0, 0.25])
def test_its_logits_are_the_same(alpha):
    assert CHECKPOINT.stat().st_size < 1_000_000
    logits, wanted = logits_of(CHECKPOINT, alpha), recorded(str(alpha))
    torch.testing.assert_close(logits, wanted)
    same = (torch.backends.cpu.get_cpu_capability(), torch.__version__) == (LOGITS["cpu"], LOGITS["torch"])
    if same and alpha == 0:  # octave layers, other processors and versions of torch add in another order
        assert torch.equal(logits, wanted)


def test_it_is_tested_predicted_and_exported(motions, tmp_path):
    finished = run_tool("test_net.py", *options(motions, tmp_path), f"--ckpt={CHECKPOINT}", f"--output={tmp_path}")
    assert finished.returncode == 0, finished.stderr
    tested = json.loads((tmp_path / "predictions.json").read_text())
    assert (len(tested["videos"]), tested["labels"]) == (8, list(CLASSES))
    results = tmp_path / "results.json"
    views = ("--clips", 3, "--crops", 1, "--json", results)
    finished = run_tool("predict.py", motions / "val", "--ckpt", CHECKPOINT, *views)
    assert finished.returncode == 0, finished.stderr
    predicted = {video["path"].split("/")[-1]: video["scores"] for video in json.loads(results.read_text())["videos"]}
    for video in tested["videos"]:
        np.testing.assert_allclose(predicted[video["path"].split("/")[-1]], video["scores"], atol=1e-5)
    exported = tmp_path / "network.pt2"
    finished = run_tool("export.py", "--ckpt", CHECKPOINT, "--output", exported, "--free=none", "--rounds=1")
    assert finished.returncode == 0, finished.stderr
    assert "logits differ by" in finished.stdout


def test_a_run_of_0_1_goes_on_to_the_weights_that_it_would_have_had(motions, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "checkpoints")
    finished = run_tool("train_net.py", *options(motions, tmp_path), "--trainer.max_epochs=2", "--ckpt_path=last")
    assert finished.returncode == 0, finished.stderr
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    torch.testing.assert_close(logits_of(tmp_path / "checkpoints" / "last.ckpt"), recorded("resumed"))
