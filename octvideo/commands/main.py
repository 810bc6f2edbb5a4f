"""The `octvideo` command: finds the sub-command, sets up its process, and runs it."""

import importlib
import importlib.metadata
import os
import sys
import warnings

COMMANDS = {
    "motions": "make the videos of the quickstart",
    "prepare": "check, re-encode, list and index the videos of a data set",
    "train": "train a network from a YAML recipe, or resume a run",
    "test": "test a checkpoint on many views of each video",
    "predict": "predict the classes of videos, folders and lists, or of live video",
    "features": "write embeddings of videos, to search or cluster them",
    "report": "write one HTML page about one or several runs",
    "runs": "list runs with their accuracy, code and data",
    "cost": "multiply-adds, bytes, kernels and time at several alphas",
    "shrink": "make a trained network cheaper, and compare it with what it was",
    "export": "write a network as ONNX or torch.export, checked against PyTorch",
    "push": "publish a network in a folder or on the Hugging Face hub",
    "serve": "serve predictions over HTTP, as JSON",
    "demo": "serve a page that shows predictions and feature maps of your videos",
    "sweep": "train one recipe at several alphas and seeds, and compare",
    "tune": "search the options of a training for the best accuracy",
}
HELP = f"""usage: octvideo COMMAND [OPTIONS]

Video recognition with Octave Convolution. Commands:

{chr(10).join(f"  {name:9} {what}" for name, what in COMMANDS.items())}

In an empty folder:   octvideo motions && octvideo train --cfg quickstart
Options of a command: octvideo COMMAND --help
Version:              octvideo --version"""


def run(command: str, words: list[str] | None = None, *, program: str = "") -> int:
    """Runs one of COMMANDS on `words` (default: sys.argv) as `program` (default: the script); returns the status."""
    # OpenMP threads that spin while they wait take the cores from the decoding processes, and threads that sleep at
    # once are slow to wake. On 2 cores a step of the quickstart takes 0.27 s alone and 5.7 s beside another training
    # by default, 0.37 and 0.67 s with sleeping threads, and 0.28 and 0.68 s like this. PyTorch reads this on import.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
    warnings.formatwarning = _as_line
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where users' own networks may be, for model.network
    importlib.import_module("octvideo.commands.options").program = program  # type: ignore[attr-defined]
    main = importlib.import_module(f"octvideo.commands.{command}").main
    return main(sys.argv[1:] if words is None else words) or 0


def _as_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What a warning says, without the line of code that it came from."""
    return f"warning: {message}\n"


def main() -> int:
    """The console command."""
    command, *words = sys.argv[1:] or [""]
    if command == "--version":
        print(f"octvideo {importlib.metadata.version('octvideo')}")
        return 0
    if command in ("", "-h", "--help"):
        print(HELP)
        return 0 if command else 2
    if command not in COMMANDS:
        print(f"octvideo: error: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(command, words, program=f"octvideo {command}")
