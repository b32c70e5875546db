"""Every method that claims to train a language model does, from the command line, with nothing but its defaults and what the
command on its card sets."""

from __future__ import annotations

import json

import pytest
import torch

from omnilora.cli import cards

CARDS = {c["key"]: c for c in cards.read() if "trains_lm" in c["tags"]}
KEYS = list(CARDS)
NEEDS = {"xlora"}  # is made of adapters that are trained before it


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from omnilora.demo import sql

    folder = tmp_path_factory.mktemp("sql")
    return sql.write_jsonl(folder)


def sequence_losses(model, tokenizer, rows):
    """The mean loss of each row, in eval mode."""
    from omnilora.training.batches import Collate
    from omnilora.training.config import TrainConfig
    from omnilora.training.encode import encode
    from omnilora.training.losses import CausalLM

    made = encode(rows, tokenizer, TrainConfig(), 160).examples
    task, collate, out = CausalLM(), Collate(tokenizer.pad_token_id), []
    model.eval()
    with torch.no_grad():
        for example in made:
            batch = collate([example])
            out.append(float(task.total(model, batch)[0]) / task.weight(batch))
    return torch.tensor(out)


def falls(key, data, folder):
    """(mean fall of the loss over 24 fixed sequences, its standard error) after 20 updates from the command line."""
    from typer.testing import CliRunner

    from omnilora.cli.main import app
    from omnilora.training.data import read_rows
    from omnilora.training.models import load_trained

    words = CARDS[key]["command"].split()
    sets = [w for flag, pair in zip(words, words[1:]) if flag == "--set" for w in (flag, pair)]
    run = CliRunner().invoke(app, [
        "train", "--model", "package:smollm2", "--method", key, "--data", str(data[0]), "--steps", "20",
        "--batch-size", "4", "--max-length", "160", "--output", str(folder), "--json", *sets])  # fmt: skip
    assert run.exit_code == 0, run.output[-2000:]
    assert json.loads(run.stdout)["steps"] == 20
    model, tokenizer = load_trained(folder)
    rows = read_rows(str(data[0]))[:24]
    after = sequence_losses(model, tokenizer, rows)
    bare, _ = load_trained(folder, adapter=False)  # the original, not the remainder of a split that an adapter repairs
    before = sequence_losses(bare, tokenizer, rows)
    fall = before - after
    return float(fall.mean()), float(fall.std() / len(fall) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k in KEYS if k not in NEEDS])
def test_loss_falls(key, data, tmp_path):
    mean, error = falls(key, data, tmp_path / "run")
    print(f"{key}: the loss falls by {mean:.3f} ± {error:.3f}")
    assert mean > 2 * error
