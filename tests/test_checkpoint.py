import copy

import pytest
import torch

from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import DamagedCheckpointError
from octvideo.models.checkpoint import load_trained
from octvideo.training.recognizer import Recognizer

PREPROCESSING = {"clip_frames": 4, "frame_stride": 2, "test_crop_size": 32}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Recognizer("i3d_r50", alpha=0.25, num_classes=3, width=8, mean=0.4, std=0.2).eval()


@pytest.fixture
def checkpoint(module):
    data = {"labels": ["run", "jump", "sit"], "preprocessing": PREPROCESSING}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"hyper_parameters": dict(module.hparams), "VideoData": data, "state_dict": state}


def opened(checkpoint, tmp_path, **options):
    torch.save(checkpoint, tmp_path / "some.ckpt")
    return load_trained(tmp_path / "some.ckpt", **options)


def test_the_network_gives_the_logits_of_the_module_that_was_trained(module, checkpoint, tmp_path):
    trained = opened(checkpoint, tmp_path)
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(trained.network(trained.normalize(clips)), module(clips))
    assert not trained.network.training
    assert trained.labels == ["run", "jump", "sit"]
    assert trained.preprocessing == Preprocessing.from_mapping(PREPROCESSING | {"mean": 0.4, "std": 0.2})
    assert (trained.options["name"], trained.options["alpha"]) == ("i3d_r50", 0.25)


def test_another_alpha_is_that_networks(module, checkpoint, tmp_path):
    trained = opened(checkpoint, tmp_path, alpha=0.5)
    other = Recognizer("i3d_r50", alpha=0.5, num_classes=3, width=8, mean=0.4, std=0.2).eval()
    other.load_state_dict(module.state_dict())
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(trained.network(trained.normalize(clips)), other(clips))
    assert trained.options["alpha"] == 0.5


def test_classes_without_names_have_numbers(checkpoint, tmp_path):
    checkpoint["VideoData"]["labels"] = None
    assert opened(checkpoint, tmp_path).labels == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("key", ["hyper_parameters", "VideoData", "state_dict"])
def test_a_file_of_another_kind_is_named(checkpoint, tmp_path, key):
    del checkpoint[key]
    with pytest.raises(ValueError, match=f"some.ckpt: not a checkpoint of train_net.py: it has no '{key}'"):
        opened(checkpoint, tmp_path)


def test_weights_of_another_network_are_refused(checkpoint, tmp_path):
    checkpoint = copy.deepcopy(checkpoint)
    checkpoint["hyper_parameters"]["width"] = 16
    with pytest.raises(ValueError, match="do not fit the i3d_r50 that it describes"):
        opened(checkpoint, tmp_path)


def test_a_torn_or_missing_file_is_named(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "some.ckpt")
    content = (tmp_path / "some.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedCheckpointError, match=r"torn\.ckpt"):
        load_trained(tmp_path / "torn.ckpt")
    with pytest.raises(FileNotFoundError):
        load_trained(tmp_path / "missing.ckpt")
