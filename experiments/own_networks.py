"""Networks, tasks and recipes that are not octvideo's, trained by its commands on made videos.

python experiments/own_networks.py networks|octave|labels|distillation [--folder runs/own_networks] [--json FILE]

networks      eight networks that octvideo does not know, at alpha 0 and .25: one epoch, and once more, killed in the
              middle and resumed; tested, predicted and exported from the checkpoint alone
octave        torchvision's r3d_18 at alpha 0, pooled, and .25, three seeds each
labels        two movements in one video, learned from a network of single ones: mAP, and average precision beside
              scikit-learn's
distillation  a trained vanilla network made octave at .5 and trained for two epochs, with and without its teacher

Runs that are there already are not repeated. Results are added to the JSON file as they come.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import one_of
from rich.console import Console

from octvideo.commands.options import Parser
from octvideo.data.motions import CLASSES, FPS, draw, make_data_set, movement, write_video
from octvideo.files import appearing

HERE = Path(__file__).parent
PARTS = ("networks", "octave", "labels", "distillation")
SMALL = ["--cfg", "quickstart", "--data.crop_size=32", "--data.short_side=[32, 36]", "--data.test_crop_size=32"]
OWN = [*SMALL, "--model.width=null", "--model.dropout=0.5"]
MONAI = ["--model.network.spatial_dims=3", "--model.network.n_input_channels=3", "--model.network.conv1_t_stride=1"]
NETWORKS: dict[str, list[str]] = {
    "Tiny": ["--model.network=own_examples.Tiny", "--model.network.width=16"],
    "TwoHeads": ["--model.network=own_examples.TwoHeads", "--model.output=logits", '--model.auxiliary={"early": 0.3}'],
    "torchvision r3d_18": ["--model.network=torchvision.models.video.r3d_18"],
    "torchvision mc3_18": ["--model.network=torchvision.models.video.mc3_18"],
    **{
        f"timm {name}, frames averaged": [
            "--model.network=octvideo.models.own_network.FrameAverage",
            "--model.network.network=timm.create_model",
            f"--model.network.network.model_name={name}",
        ]
        for name in ("resnet10t", "mobilenetv3_small_050")
    },
    "MONAI ResNet": [
        *("--model.network=monai.networks.nets.ResNet", "--model.network.block=basic"),
        *("--model.network.layers=[1, 1, 1, 1]", "--model.network.block_inplanes=[8, 16, 32, 64]", *MONAI),
    ],
    "MONAI DenseNet": [
        *("--model.network=monai.networks.nets.DenseNet", "--model.network.spatial_dims=3"),
        *("--model.network.in_channels=3", "--model.network.out_channels=8", "--model.network.init_features=16"),
        *("--model.network.growth_rate=8", "--model.network.block_config=[2, 2]"),
        "--model.classes_argument=out_channels",
    ],
}


def octvideo(command: str, *words: str | Path, log: Path) -> str:
    """Runs a command; returns what it printed, which is also added to `log`. RuntimeError where it fails."""
    done = subprocess.run(process(command, *words), capture_output=True, text=True, cwd=HERE)
    with log.open("a") as file:
        file.write(f"{done.args}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def process(command: str, *words: str | Path) -> list[str]:
    """The words that start a command from this folder, whose modules it may import."""
    return [sys.executable, "-m", "octvideo", command, *map(str, words)]


def train(run: Path, *words: str, kill: bool = False) -> Path:
    """The last checkpoint of a training, which is killed in the middle and resumed if `kill`."""
    last = run / "checkpoints" / "last.ckpt"
    if (run / "done").exists():
        return last
    run.mkdir(parents=True, exist_ok=True)
    words = (*words, f"--trainer.default_root_dir={run}")
    if kill:
        words = (*words, "--save_every_n_steps=3", "--keep_checkpoints=99")
    if kill and not last.exists():
        with (run / "log.txt").open("a") as log:
            killed = subprocess.Popen(process("train", *words), stdout=log, stderr=log, cwd=HERE)
        while killed.poll() is None and not (run / "checkpoints" / "step_00000003.ckpt").exists():
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    octvideo("train", *words, "--ckpt_path=auto", log=run / "log.txt")
    (run / "done").touch()
    return last


def data_words(folder: Path, train_list: str = "train.csv", val_list: str = "val.csv") -> list[str]:
    """Options that name a data set."""
    lists = [f"--data.train_list={folder / train_list}", f"--data.val_list={folder / val_list}"]
    return [*lists, f"--data.root={folder}", "--data.num_workers=1"]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's network."""
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def networks(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each network and alpha."""
    data = folder / "motions"
    make_data_set(data, 96, 32)
    video = next((data / "val").glob("*.mp4"))
    for name, chosen in NETWORKS.items():
        for alpha in (0, 0.25):
            run = folder / re.sub(r"\W+", "_", f"{name}_{alpha}")
            words = [*OWN, *data_words(data), *chosen, f"--model.alpha={alpha}", "--trainer.max_epochs=1"]
            whole, resumed = train(run / "whole", *words), train(run / "killed", *words, kill=True)
            pairs = zip(weights(whole).values(), weights(resumed).values(), strict=True)
            log = run / "log.txt"
            alone = [*SMALL, *data_words(data), "--model.width=null", "--model.dropout=0.5", f"--ckpt={whole}"]
            octvideo("test", *alone, f"--output={run / 'test'}", log=log)
            octvideo("predict", video, f"--ckpt={whole}", f"--json={run / 'p.json'}", log=log)
            exported = octvideo("export", f"--ckpt={whole}", f"--output={run / 'n.onnx'}", log=log)
            yield {
                "network": name,
                "alpha": alpha,
                "resumed equal": all(torch.equal(a, b) for a, b in pairs),
                "top1": json.loads((run / "test" / "predictions.json").read_text())["top1"],
                "predicted": json.loads((run / "p.json").read_text())["videos"][0]["status"],
                "onnx difference": float(re.findall(r"differ by (\S+)", exported)[0]),
            }


def octave(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each alpha and seed of r3d_18."""
    data = folder / "quickstart"
    make_data_set(data)
    for seed in range(3):
        for alpha in (0, 0.25):
            words = [*OWN, *data_words(data), *NETWORKS["torchvision r3d_18"], f"--model.alpha={alpha}"]
            words += ["--model.downsample=pool", "--trainer.max_epochs=20", f"--seed_everything={seed}"]
            words += ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=3e-4"]
            words += ["--model.optimizer.weight_decay=0.05"]  # SGD starts to learn too late in so few steps
            run = folder / f"r3d_{alpha}_{seed}"
            yield {"alpha": alpha, "seed": seed, "top1": tested(train(run, *words), run, data_words(data))["top1"]}


def tested(checkpoint: Path, run: Path, data: Sequence[str]) -> dict[str, Any]:
    """The predictions.json of a checkpoint."""
    words = [*OWN, *data, f"--ckpt={checkpoint}", f"--output={run / 'test'}"]
    octvideo("test", *words, log=run / "log.txt")
    found: dict[str, Any] = json.loads((run / "test" / "predictions.json").read_text())
    return found


def make_pairs(folder: Path, num_train: int = 480, num_val: int = 160) -> None:
    """Videos of two movements, one after the other, in lists `path 3,6`."""
    if (folder / "val.csv").exists():
        return
    for split, count in (("train", num_train), ("val", num_val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(count):
            rng = np.random.default_rng((7, len(split), index))
            labels = sorted(rng.choice(len(CLASSES), 2, replace=False).tolist())
            halves = [draw(movement(CLASSES[label], rng)[:18], rng) for label in rng.permutation(labels)]
            write_video(folder / split / f"{index:05d}.mp4", np.concatenate(halves), FPS)
            lines.append(f"{split}/{index:05d}.mp4 {','.join(map(str, labels))}\n")
        with appearing(folder / f"{split}.csv") as partial:
            partial.write_text("".join(lines))


def labels(folder: Path) -> Iterator[dict[str, Any]]:
    """A row with the mean average precision, and its largest difference from scikit-learn's."""
    from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

    data, run = folder / "pairs", folder / "labels"
    make_pairs(data)
    words = ["--cfg", "quickstart", *data_words(data), "--model.task=multi", "--trainer.max_epochs=15"]
    words += ["--data.clip_frames=16"]  # 32 of a video's 36 frames: some of both movements
    words += [f"--model.weights={single_label(folder)}", "--model.learning_rate=0.02"]
    checkpoint = train(run, *words)
    octvideo("test", *words, f"--ckpt={checkpoint}", f"--output={run / 'test'}", log=run / "log.txt")
    found = json.loads((run / "test" / "predictions.json").read_text())
    truth = np.zeros((len(found["videos"]), len(CLASSES)))
    for row, video in zip(truth, found["videos"], strict=True):
        row[video["label"]] = 1
    scores = np.array([video["scores"] for video in found["videos"]])
    other = [average_precision_score(truth[:, number], scores[:, number]) for number in range(len(CLASSES))]
    difference = float(np.abs(np.array(other) - np.array(found["ap"])).max())
    yield {"mAP": found["map"], "ap": found["ap"], "largest difference from scikit-learn": difference}


def single_label(folder: Path) -> Path:
    """The checkpoint of the quickstart's network, vanilla, on single movements."""
    make_data_set(folder / "quickstart")
    basic = ["--cfg", "quickstart", *data_words(folder / "quickstart"), "--model.downsample=pool"]
    return train(folder / "teacher", *basic, "--model.alpha=0")


def distillation(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for the teacher, and for each way and seed of its octave student."""
    basic = ["--cfg", "quickstart", *data_words(folder / "quickstart"), "--model.downsample=pool"]
    teacher = single_label(folder)
    yield {"network": "teacher", "top1": tested_zoo(teacher, folder / "teacher", basic)}
    for name, more in (("labels alone", []), ("teacher", [f"--model.teacher={teacher}", "--model.teacher_weight=0.9"])):
        for seed in range(3):
            words = [*basic, *more, "--model.alpha=0.5", f"--model.weights={teacher}", "--trainer.max_epochs=2"]
            words += ["--model.learning_rate=0.01", "--model.warmup_epochs=0", f"--seed_everything={seed}"]
            run = folder / f"student_{name.replace(' ', '_')}_{seed}"
            yield {"network": name, "seed": seed, "top1": tested_zoo(train(run, *words), run, basic)}


def tested_zoo(checkpoint: Path, run: Path, words: Sequence[str]) -> float:
    """The top-1 accuracy of a checkpoint of the zoo."""
    octvideo("test", *words, f"--ckpt={checkpoint}", f"--output={run / 'test'}", log=run / "log.txt")
    top1: float = json.loads((run / "test" / "predictions.json").read_text())["top1"]
    return top1


def main(arguments: Sequence[str]) -> None:
    """Runs the parts that are named."""
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="+", type=one_of(PARTS, "part"))
    parser.add_argument("--folder", type=Path, default=Path("runs/own_networks"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "own_networks.json")
    options = parser.parse_args(arguments)
    folder, console = options.folder.absolute(), Console()
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for part in options.parts:
        rows: list[dict[str, Any]] = []
        for row in globals()[part](folder):
            rows.append(row)
            console.print(part, row)
            with appearing(options.json) as partial:
                partial.write_text(json.dumps(results | {part: rows}, indent=1))
        results[part] = rows


if __name__ == "__main__":
    main(sys.argv[1:])
