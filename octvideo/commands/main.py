"""The `octvideo` command: finds the sub-command, sets up its process, and runs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys

COMMANDS = {
    "train": "train a network from a YAML recipe; resume a run",
    "test": "test a checkpoint on many views of each video",
    "predict": "predict the classes of videos, folders and lists",
    "prepare": "check, re-encode, list and index the videos of a data set",
    "export": "write a network as ONNX or torch.export, checked against PyTorch",
    "report": "write the report of one or several runs: one HTML file",
    "demo": "serve a page that shows predictions and feature maps of dropped videos",
    "sweep": "train one recipe at several alphas and seeds, and compare",
    "motions": "make the videos of the quickstart",
}


def run(command: str, arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """Runs a sub-command.

    Args:
        command: one of COMMANDS.
        arguments: what follows it; default: all of sys.argv.
        program: what error messages call it; default: the script's name.

    Returns:
        The exit status.
    """
    # OpenMP threads that spin while they wait take the cores from the decoding processes, and threads that sleep at
    # once are slow to wake. On 2 cores a step of the quickstart takes 0.27 s alone and 5.7 s beside another training
    # by default, 0.37 and 0.67 s with sleeping threads, and 0.28 and 0.68 s like this. PyTorch reads this on import.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    options = importlib.import_module("octvideo.commands.options")
    options.program = program or os.path.basename(sys.argv[0])
    module = importlib.import_module(f"octvideo.commands.{command}")
    return int(module.main(sys.argv[1:] if arguments is None else arguments) or 0)


def main() -> int:
    """The console command."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"octvideo {importlib.metadata.version('octvideo')}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:9} {what}" for name, what in COMMANDS.items()]
        print("usage: octvideo COMMAND [OPTIONS]\n")
        print("Video recognition with Octave Convolution.\n\n" + "\n".join(lines))
        print("\noctvideo COMMAND --help explains a command; octvideo --version prints the version.")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"octvideo: error: no command {words[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(words[0], words[1:], program=f"octvideo {words[0]}")


if __name__ == "__main__":
    sys.exit(main())
