"""The README's Python snippets run, and its table of costs is true."""

import re

import pytest
import torch
from conftest import ROOT

from octvideo import MODELS, create_model
from octvideo.models.cost import count_macs, count_parameters

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| (\d+) x (\d+) x (\d+) \| ([\d,]+) \| (.*) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("number", range(4))
def test_snippet_runs(number, tmp_path, monkeypatch):
    assert len(SNIPPETS) == 4
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


def test_every_network_has_its_row():
    assert [row[0] for row in ROWS] == list(MODELS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_of_costs_is_true(row):
    name, *clip, parameters, macs = row
    for alpha, giga_macs in zip((0, 0.125, 0.25, 0.5), macs.split(" | "), strict=True):
        with torch.device("meta"):
            network = create_model(name, alpha=alpha)
        assert f"{count_parameters(network):,}" == parameters
        assert f"{count_macs(network, (3, *map(int, clip))) / 1e9:.2f}" == giga_macs
