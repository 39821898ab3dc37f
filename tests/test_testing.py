"""The pytest fixture and the strategy that Picotron ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import given

from picotron.planner.faults import check_faults
from picotron.testing import fault_scripts

TEST = """
import torch

def test_sum(simulated_ranks):
    def add(backend):
        tensor = torch.ones(1) * backend.rank
        backend.all_reduce(tensor, backend.new_group(range(4))).wait()
        return tensor.item()
    assert simulated_ranks(add, 4) == [6.0] * 4

def test_hang(simulated_ranks):
    simulated_ranks(lambda backend: backend.rank or backend.barrier(), 2)
"""


def test_the_fixture_runs_ranks(simulated_ranks: Any) -> None:
    """Under pytest, with nothing imported."""

    def add(backend: Any) -> float:
        tensor = torch.ones(1) * backend.rank
        backend.all_reduce(tensor, backend.new_group(range(4))).wait()
        return tensor.item()

    assert simulated_ranks(add, 4) == [6.0] * 4


def test_the_seed_is_an_option_and_is_printed_on_failure(tmp_path: Path) -> None:
    """In a project of somebody else's: the plugin is found, the hanging test is told with its seed."""
    (tmp_path / "test_mine.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--picotron-seed", "7", "."]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "1 failed, 1 passed" in found.stdout, found.stdout + found.stderr
    assert "rank 1, which has returned" in found.stdout
    assert "seed=7 repeats this" in found.stdout


@given(fault_scripts(3))
def test_fault_scripts_are_valid(script: tuple[Any, ...]) -> None:
    """Whatever is drawn is a script for the world it was drawn for."""
    assert check_faults(script, 3) == script
