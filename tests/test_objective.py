"""Losses of both tasks, class weights, teachers, and the optimisers that follow them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_tool, small
from own_examples import Tiny
from sklearn.metrics import average_precision_score
from torch import nn

from octvideo import build_network
from octvideo.data.clips import Draw
from octvideo.data.lists import read_list
from octvideo.data.loading import EpochSampler
from octvideo.data.module import VideoData
from octvideo.errors import ListError, UserError
from octvideo.models.scoring import average_precisions, probabilities
from octvideo.training.objective import FocalLoss, Objective, Teacher
from octvideo.training.optimizers import build_optimizer, parameter_groups
from octvideo.training.recognizer import Recognizer

pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])
SEVERAL = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]]).float()


def test_the_default_losses_are_torchs():
    assert torch.equal(Objective("single", 4)(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))
    assert torch.equal(Objective("multi", 4)(LOGITS, SEVERAL), F.binary_cross_entropy_with_logits(LOGITS, SEVERAL))
    smoothed = Objective("single", 4, label_smoothing=0.1)(LOGITS, CLASSES)
    assert torch.equal(smoothed, F.cross_entropy(LOGITS, CLASSES, label_smoothing=0.1))
    weighted = Objective("single", 4, class_weights=[1.0, 2.0, 0.0, 1.0])(LOGITS, CLASSES)
    assert torch.equal(weighted, F.cross_entropy(LOGITS, CLASSES, torch.tensor([1.0, 2, 0, 1])))
    shares = LOGITS.softmax(1)
    assert torch.equal(Objective("single", 4)(LOGITS, shares), F.cross_entropy(LOGITS, shares))


def test_balanced_weights_make_classes_count_alike():
    objective = Objective("single", 4, class_weights="balanced")
    objective.balance(np.array([30.0, 10.0, 0.0, 20.0]), 60)
    assert objective.weights.tolist() == pytest.approx([0.5, 1.5, 0, 0.75])
    several = Objective("multi", 4, class_weights="balanced")
    several.balance(np.array([30.0, 10.0, 0.0, 20.0]), 60)
    assert several.weights.tolist() == pytest.approx([1, 5, 0, 2])
    expected = F.binary_cross_entropy_with_logits(LOGITS, SEVERAL, pos_weight=several.weights)
    assert torch.equal(several(LOGITS, SEVERAL), expected)
    assert not objective.state_dict()


def test_focal_loss_is_cross_entropy_at_gamma_0():
    assert torch.allclose(FocalLoss(0)(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))
    assert torch.allclose(FocalLoss(0)(LOGITS, SEVERAL), F.binary_cross_entropy_with_logits(LOGITS, SEVERAL))
    truth = LOGITS.softmax(1)[torch.arange(6), CLASSES]
    assert torch.allclose(FocalLoss(2)(LOGITS, CLASSES), (-((1 - truth) ** 2) * truth.log()).mean())
    with pytest.raises(UserError, match="gamma must be at least 0"):
        FocalLoss(-1)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("single", {"class_weights": [1.0]}, r"class_weights must be 4 numbers from 0, got \[1.0\]"),
        ("single", {"class_weights": [1.0, 1.0, 1.0, -1.0]}, "class_weights must be 4 numbers"),
        ("single", {"class_weights": "balance"}, "must be numbers or 'balanced'"),
        ("single", {"loss": nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "of the default loss"),
        ("single", {"loss": nn.CrossEntropyLoss(), "class_weights": "balanced"}, "of the default loss"),
        ("multi", {"class_weights": None, "label_smoothing": 0.1}, "label_smoothing is for task single"),
    ],
)
def test_losses_that_do_not_fit_are_refused(task, options, message):
    with pytest.raises(UserError, match=message):
        Objective(task, 4, **options)


def test_a_single_class_is_refused():
    with pytest.raises(UserError, match=r"model.num_classes must be at least 2, got 1"):
        Objective("single", 1)


def test_a_loss_that_needs_other_labels_is_named():
    with pytest.raises(UserError, match=r"model.loss NLLLoss does not take logits \(6, 4\) and labels \(6, 4\)"):
        Objective("multi", 4, loss=nn.NLLLoss())(LOGITS, SEVERAL)
    with pytest.raises(UserError, match=r"model.loss CrossEntropyLoss must give one number"):
        Objective("single", 4, loss=nn.CrossEntropyLoss(reduction="none"))(LOGITS, CLASSES)
    assert Objective("single", 4, loss=nn.CrossEntropyLoss())(LOGITS, CLASSES).dim() == 0


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, scores = rng.random((200, 5)) < 0.3, rng.random((200, 5))
    truth[:, 4] = False
    videos = [
        {"scores": row.tolist(), "label": np.flatnonzero(t).tolist()} for row, t in zip(scores, truth, strict=True)
    ]
    found = average_precisions(videos)
    expected = [average_precision_score(truth[:, k], scores[:, k]) for k in range(4)]
    assert found["ap"][:4] == pytest.approx(expected, abs=1e-6)
    assert found["ap"][4] is None
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert average_precisions([]) == {"map": None, "ap": []}
    assert average_precisions([{"scores": [0.5], "label": []}])["map"] is None


def test_probabilities_follow_the_task():
    assert torch.equal(probabilities(LOGITS, "multi"), LOGITS.sigmoid())
    assert torch.equal(probabilities(LOGITS, "single"), LOGITS.softmax(1))


def test_lists_have_several_classes_or_shares(tmp_path):
    (tmp_path / "a.csv").write_text("a.mp4 3,1\nb c.mp4 0\nd.mp4 -\n")
    paths, labels = read_list(tmp_path / "a.csv", num_classes=4, task="multi")
    assert list(paths) == ["a.mp4", "b c.mp4", "d.mp4"]
    assert labels.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    (tmp_path / "b.csv").write_text("a.mp4 3:0.75,1:.25\nb.mp4 0\n")
    assert read_list(tmp_path / "b.csv", num_classes=4).labels.tolist() == [[0, 0.25, 0, 0.75], [1, 0, 0, 0]]
    for text, task, classes, message in (
        ("a.mp4 3,x", "multi", 4, r"a.csv:1: expected 'path class numbers with commas between them', got 'a.mp4 3,x'"),
        ("a.mp4 3,4", "multi", 4, r"class number must be 0 to 3 \(num_classes is 4\), got 4"),
        ("a.mp4 3,1", "single", 4, "expected 'path class number'"),
        ("a.mp4 3:.5,1:.2", "single", 4, "shares of the classes must add up to 1"),
        ("a.mp4 3,1", "multi", None, "videos of several classes need num_classes"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ListError, match=message):
            read_list(tmp_path / "a.csv", num_classes=classes, task=task)


def test_balanced_drawing_makes_classes_as_frequent(tmp_path):
    (tmp_path / "train.csv").write_text("".join(f"{i}.mp4 {int(i >= 900)}\n" for i in range(1000)))
    data = VideoData(str(tmp_path / "train.csv"), num_classes=3, balanced=True, seed=1)
    assert data.read("train_list").class_counts(3).tolist() == [900, 100, 0]
    draws = list(data._sampler("train_list", shuffle=True))
    assert len(draws) == 1000
    assert 0.45 < np.mean([draw.video >= 900 for draw in draws]) < 0.55
    assert draws == list(data._sampler("train_list", shuffle=True))
    halves = [list(EpochSampler(1000, 1, True, rank, 2, chances=data.read("train_list").chances(3))) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(draws)
    assert isinstance(draws[0], Draw)
    assert data._dealt(0)["balanced"]
    assert "balanced" not in VideoData(str(tmp_path / "train.csv"), num_classes=3)._dealt(0)
    (tmp_path / "train.csv").write_text("a.mp4 0,1\nb.mp4 0\nc.mp4 0\nd.mp4 -\n")
    several = VideoData(str(tmp_path / "train.csv"), num_classes=3, task="multi", balanced=True)
    found = several.read("train_list").chances(several.num_classes).tolist()
    assert found == pytest.approx(np.array([1, 1 / 3, 1 / 3, 1 / 4]) / (1 + 2 / 3 + 1 / 4))


def trained_file(path, **options):
    recognizer = Recognizer(network=build_network("own_examples.Tiny"), num_classes=4, alpha=0, **options)
    content = {"state_dict": recognizer.state_dict(), "hyper_parameters": dict(recognizer.hparams), "VideoData": {}}
    torch.save(content, path)
    return recognizer.eval()


def test_a_teacher_pulls_the_logits_towards_its_own(tmp_path):
    recognizer = trained_file(tmp_path / "t.ckpt")
    clips = torch.randint(256, (3, 3, 2, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted = recognizer(clips)
    teacher = Teacher(tmp_path / "t.ckpt", 0.25, 2.0, "single", 4)
    assert teacher(clips, wanted, torch.tensor(8.0)).item() == pytest.approx(6)  # no distance is left
    other = LOGITS[:3]
    distance = F.kl_div((other / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean")
    assert teacher(clips, other, torch.tensor(8.0)).item() == pytest.approx(6 + 0.25 * 4 * distance.item(), rel=1e-5)
    with pytest.raises(UserError, match="has 4 classes of task single, not 5 of task single"):
        Teacher(tmp_path / "t.ckpt", 0.5, 2.0, "single", 5)
    with pytest.raises(UserError, match="not 4 of task multi"):
        Teacher(tmp_path / "t.ckpt", 0.5, 2.0, "multi", 4)
    for weight, temperature in ((0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(UserError, match="teacher_weight must lie in"):
            Teacher(tmp_path / "t.ckpt", weight, temperature, "single", 4)
    with pytest.raises(UserError, match=r"nope.ckpt: no such file"):
        Teacher(tmp_path / "nope.ckpt", 0.5, 1, "single", 4)
    trained_file(tmp_path / "m.ckpt", task="multi")
    several = Teacher(tmp_path / "m.ckpt", 1, 1, "multi", 4)
    target = several.trained.network(several.trained.normalize(clips)).sigmoid()
    expected = F.binary_cross_entropy_with_logits(other, target).item()
    assert several(clips, other, torch.tensor(8.0)).item() == pytest.approx(expected, rel=1e-5)
    student = Recognizer(network=Tiny(), num_classes=4, alpha=0.5, teacher=str(tmp_path / "t.ckpt"))
    assert not any("teacher" in name for name in student.state_dict())


def test_parameters_are_grouped_by_decay_and_layer():
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 1))
    weights, others = parameter_groups(nn.ModuleDict({"a": network}), 0.1)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert [len(group["params"]) for group in (weights, others)] == [4, 4]
    groups = parameter_groups(nn.ModuleDict({"a": network}), None, ["1.0.weight"], layer_decay=0.5)
    scales = [group["lr_scale"] for group in groups]
    assert scales == [0.25, 0.25, 0.5, 0.5, 1, 1]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 3, 1, 1]
    assert "weight_decay" not in groups[0]
    with pytest.raises(UserError, match=r"no_decay.*invalid regex"):
        parameter_groups(network, 0.1, ["("])
    with pytest.raises(UserError, match=r"layer_decay must lie in \(0, 1\], got 0"):
        parameter_groups(network, 0.1, layer_decay=0)
    with pytest.raises(UserError, match=r"model.optimizer: Invalid learning rate: -1"):
        build_optimizer(lambda groups: torch.optim.AdamW(groups, lr=-1), groups)


def test_another_optimiser_has_its_own_rate_and_schedule():
    def make(groups):
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)

    recognizer = Recognizer(network=Tiny(), num_classes=4, alpha=0, optimizer=make, layer_decay=0.5)
    optimizer = recognizer.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert recognizer.recipe.peak == pytest.approx(1e-3)
    assert recognizer.recipe.warmup_start == pytest.approx(1e-4)  # .01 of .1 before
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0, 0.05}
    recognizer.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)
    found = recognizer.configure_optimizers()
    assert min(group["lr"] for group in found["optimizer"].param_groups) < 1e-4
    recognizer.optimizer = None
    with pytest.raises(UserError, match=r"lr_scheduler is for model.optimizer"):
        recognizer.configure_optimizers()


@pytest.mark.long
@pytest.mark.slow
def test_several_labels_from_training_to_the_report(motions, tmp_path):
    for split in ("train", "val"):
        lines = (motions / f"{split}.csv").read_text().splitlines()
        rows = [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in lines]
        text = "".join(f"{path} {label},{(label + 1) % 8}\n" for path, label in rows)
        (tmp_path / f"{split}.csv").write_text(text)
    words = [*small(motions, tmp_path / "run"), "--model.task=multi", "--trainer.max_epochs=1"]
    words += [f"--data.train_list={tmp_path / 'train.csv'}", f"--data.val_list={tmp_path / 'val.csv'}"]
    words += ["--data.test_clips=1"]
    done = run_tool("train_net.py", *words, "--model.class_weights=balanced", "--data.balanced=true")
    assert done.returncode == 0, done.stderr
    assert "mAP" in done.stdout
    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    done = run_tool("test_net.py", *words, f"--ckpt={checkpoint}", f"--output={tmp_path / 'test'}", "--report")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "test" / "predictions.json").read_text())
    assert found["task"] == "multi"
    assert len(found["ap"]) == 8
    assert all(len(video["label"]) == 2 for video in found["videos"])
    assert found["map"] == pytest.approx(np.mean([ap for ap in found["ap"] if ap is not None]))
    assert any(sum(video["scores"]) > 1.05 for video in found["videos"])  # sigmoid, not softmax
    assert "Mean average precision" in (tmp_path / "test" / "report.html").read_text()
    views = ["--clips=1", "--crops=1"]
    done = run_tool("predict.py", tmp_path / "val.csv", f"--root={motions}", f"--ckpt={checkpoint}", *views)
    assert done.returncode == 0, done.stderr
    assert "16 videos predicted, 0 bad" in done.stdout
    assert "with a given class" not in done.stdout
    exported = [f"--ckpt={checkpoint}", f"--output={tmp_path / 'n.onnx'}", "--softmax", "--free=batch"]
    assert run_tool("export.py", *exported).returncode == 0
    swept = [
        f"--ckpt={checkpoint}",
        "--alphas=.25",
        "--report",
        "--statistics_batches=0",
        f"--output={tmp_path / 'alphas'}",
    ]
    done = run_tool("test_net.py", *words, *swept)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "alphas" / "alphas.json").read_text())
    assert row["map"] == pytest.approx(found["map"])
    assert "top1" not in row


@pytest.mark.slow
def test_a_schedule_free_run_saves_the_weights_to_use_and_resumes_bit_for_bit(motions, tmp_path):
    pytest.importorskip("schedulefree")
    chosen = ["--model.network=experiments.own_examples.Tiny", "--model.width=null", "--model.dropout=0.5"]
    chosen += ["--model.optimizer=schedulefree.AdamWScheduleFree", "--model.optimizer.lr=0.01", "--model.alpha=0"]
    chosen += ["--save_every_n_steps=3", "--keep_checkpoints=9", "--trainer.max_epochs=2"]
    assert run_tool("train_net.py", *small(motions, tmp_path / "a"), *chosen).returncode == 0
    middle = tmp_path / "a" / "checkpoints" / "step_00000003.ckpt"
    done = run_tool("train_net.py", *small(motions, tmp_path / "b"), *chosen, f"--ckpt_path={middle}")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / run / "checkpoints" / "last.ckpt") for run in "ab")
    for kind in ("state_dict", "training_weights"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    done = run_tool("train_net.py", *small(motions, tmp_path / "c"), *chosen, "--ema_decay=0.9")
    assert "ema_decay: a schedule-free optimiser averages weights itself" in done.stderr
    name = "network.conv2.weight"
    assert not torch.equal(first["state_dict"][name], first["training_weights"][name])
