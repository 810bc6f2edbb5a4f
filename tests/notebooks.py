"""Runs the notebooks of docs/notebooks. As a script (make notebooks) it writes their outputs into the files."""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run(notebook, folder):
    """Executes a notebook from top to bottom in a folder, in a new kernel with this interpreter and this octvideo."""
    commands, folder = Path(sys.executable).parent, str(folder)
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": folder,  # instead of a history in the home folder
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    how = {"kernel_name": "python3", "startup_timeout": 300, "timeout": 600, "record_timing": False}
    NotebookClient(notebook, **how, resources={"metadata": {"path": folder}}).execute(env=environment)


def tidied(outputs):
    """Outputs without colours, in which successive pieces of one stream are one, however the kernel cut them."""
    found = []
    for output in outputs:
        last = found[-1] if found else {}
        if output["output_type"] == "stream" and output["name"] == last.get("name"):
            last["text"] += output["text"]
        else:
            found.append(output)
    for output in found:
        if output["output_type"] == "stream":
            output["text"] = re.sub(r"\x1b\[[\d;]*m", "", output["text"])
    return found


def main():
    """Executes each notebook, or those that are named, and writes it with its outputs."""
    for path in NOTEBOOKS:
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, folder)
        notebook.metadata["language_info"] = {"name": "python"}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = tidied(cell.outputs)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size:.0f} kB")


if __name__ == "__main__":
    main()
