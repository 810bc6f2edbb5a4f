"""The README's Python snippets run, it is short, its files are there, and the table of costs in the docs is true."""

import re

import pytest
import torch
from conftest import ROOT, long

from octvideo import MODELS, create_model
from octvideo.models.cost import count_macs, count_parameters

README = (ROOT / "README.md").read_text()
NETWORKS = (ROOT / "docs" / "networks.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ROWS = re.findall(r"^\| `(\w+)` \| (\d+) x (\d+) x (\d+) \| ([\d,]+) \| (.*) \|$", NETWORKS, re.MULTILINE)


@pytest.mark.parametrize("number", range(4))
def test_snippet_runs(number, tmp_path, monkeypatch):
    assert len(SNIPPETS) == 4
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


def test_every_network_has_its_row():
    assert [row[0] for row in ROWS] == list(MODELS)


QUICK = {"c2d_r50", "i3d_r50", "x3d_m"}


@pytest.mark.parametrize("row", [row if row[0] in QUICK else long(row) for row in ROWS], ids=lambda row: row[0])
def test_the_table_of_costs_is_true(row):
    name, *clip, parameters, macs = row
    for alpha, giga_macs in zip((0, 0.125, 0.25, 0.5), macs.split(" | "), strict=True):
        with torch.device("meta"):
            network = create_model(name, alpha=alpha)
        assert f"{count_parameters(network):,}" == parameters
        assert f"{count_macs(network, (3, *map(int, clip))) / 1e9:.2f}" == giga_macs


def test_it_is_short_and_what_it_links_to_exists():
    assert len(README.splitlines()) <= 160
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_reading_tour_takes_an_hour():
    tour = re.findall(r"^\d+\. \[.*?\]\((octvideo/.*?)\)", README, re.MULTILINE)
    assert len(tour) == 12
    assert sum(len((ROOT / path).read_text().splitlines()) for path in tour) <= 3200
