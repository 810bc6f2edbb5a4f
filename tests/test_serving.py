"""experiments/serving.py: networks in both runtimes and dtypes, failures passed over, accuracy in classes."""

import argparse
import importlib.util

import numpy as np
import pytest
import serving
import torch
from torch import nn

from octvideo import OctConv3d
from octvideo.data.preprocessing import Preprocessing
from octvideo.models.checkpoint import Trained

NEEDS = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("onnxscript", "openvino", "nncf")}
RANDOM = np.random.default_rng(0)
CLIPS = [RANDOM.integers(0, 256, (2, 3, 4, 13, 14), np.uint8) for _ in range(3)]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = OctConv3d(3, 16, 3, padding=1, alpha=0.5), nn.BatchNorm3d(16)
        self.middle, self.head = OctConv3d(16, 16, (1, 3, 3), padding=(0, 1, 1), alpha=0), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.middle(torch.relu(self.norm(self.stem(x)))).mean((2, 3, 4)))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return Trained(Small().eval(), {}, [], Preprocessing())


@pytest.fixture(scope="module", params=serving.RUNTIMES)
def runtime(request):
    if missing := [name for name in NEEDS[request.param] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'octvideo[serving]'")
    return request.param


@torch.no_grad()
def test_octave_layers_run_in_both_dtypes(trained, runtime, tmp_path):
    path = tmp_path / "network.onnx"
    serving.write_onnx(trained, CLIPS[0], path, plain=runtime == "openvino")
    wanted = trained.network(trained.normalize(torch.from_numpy(CLIPS[0]))).numpy()
    for dtype, error in (("fp32", 1e-5), ("int8", 0.05)):
        run = serving.RUNTIMES[runtime](path, dtype, CLIPS, 1)
        np.testing.assert_allclose(run(CLIPS[0]), wanted, rtol=0, atol=error * np.abs(wanted).max())


def test_a_failure_is_noted_and_passed_over(monkeypatch):
    def opened(path, dtype, calibration, threads):
        if path == "broken":
            raise RuntimeError("no such operator")
        return lambda clips: None

    monkeypatch.setitem(serving.RUNTIMES, "onnxruntime", opened)
    files = {("vanilla", 0.0): "good", ("octvideo", 0.25): "broken", ("plain", 0.25): "good"}
    about = {"runtime": "onnxruntime", "dtype": "fp32"}
    rows = serving.group(about, files, {0.0: 4, 0.25: 3}, CLIPS, argparse.Namespace(threads=1, rounds=2))
    assert [row.get("error") for row in rows] == [None, "RuntimeError: no such operator", None]
    assert [row.get("mac_ratio") for row in rows] == [1, None, 0.75]
    assert rows[0]["time_ratio"] == 1


def test_classes_are_of_mean_probabilities():
    logits = np.array([[9, 0, 0], [0, 1, 0], [0, 1, 0]], np.float32)
    assert serving.classes(lambda clips: logits, CLIPS[:1]) == [0]
    assert serving.scores([0, 1, 2], [0, 1, 1], [0, 0, 1]) == {
        "top1": pytest.approx(100 / 3),
        "right": 1,
        "as_pytorch": 2,
    }
