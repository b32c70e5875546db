"""Loops of other people's: Lightning, and a plain one with gradient checkpointing."""

import pytest
import torch
import transformers
from torch import nn

import omnilora as ol
from omnilora import errors


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=40))  # fmt: skip


def batches(count):
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, (4, 8), generator=gen) for _ in range(count)]


def weights(model):
    return {f"{s.site.name}::{n}": t.detach().clone() for s in ol.slots(model) for n, t in s.tensors()}


def plain(key, steps=6, checkpointing=False):
    """What a loop of one's own gives."""
    model = llama()
    torch.manual_seed(1)
    ol.adapt(model, ol.method(key))
    if checkpointing:
        ol.gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(ol.param_groups(model, 1e-2), weight_decay=0.0)
    run = ol.start(model, optimizer, total_steps=steps)
    model.train()
    torch.manual_seed(2)
    for ids in batches(steps):
        out = model(input_ids=ids, labels=ids)
        (out.loss + run.loss({"input_ids": ids}, out)).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    if checkpointing:
        ol.gradient_checkpointing(model, False)
    return weights(model)


@pytest.mark.parametrize("key", ["lora", "adalora", "dylora"])
def test_checkpointing_in_one_line_changes_nothing(key):
    first, second = plain(key), plain(key, checkpointing=True)
    assert all(torch.allclose(first[k], second[k], rtol=1e-5, atol=1e-7) for k in first)


def test_other_models_are_told_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4))
    ol.adapt(model, ol.method("lora", r=2))
    with pytest.raises(errors.BadValue, match="checkpoint_context"):
        ol.gradient_checkpointing(model)


def lit(key, steps):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama()
            torch.manual_seed(1)
            ol.adapt(self.model, ol.method(key))
            self.run = None

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(ol.param_groups(self.model, 1e-2), weight_decay=0.0)
            self.run = ol.start(self.model, optimizer, total_steps=self.trainer.estimated_stepping_batches)
            return optimizer

        def training_step(self, batch, batch_idx):
            out = self.model(input_ids=batch, labels=batch)
            return out.loss + self.run.loss({"input_ids": batch}, out)

        def on_fit_end(self):
            self.run.finish()

    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, accelerator="cpu")  # fmt: skip
    return lightning, Lit(), trainer


@pytest.mark.parametrize("key", ["adalora", "dylora"])
def test_lightning_equals_a_plain_loop(key):
    _, module, trainer = lit(key, 6)
    torch.manual_seed(2)
    trainer.fit(module, torch.utils.data.DataLoader(batches(6), batch_size=None, generator=torch.Generator()))
    want = plain(key)
    assert all(torch.allclose(t, want[k], rtol=1e-5, atol=1e-7) for k, t in weights(module.model).items())


def test_lightning_without_the_run_raises():
    lightning, module, trainer = lit("adalora", 2)
    module.configure_optimizers = lambda: torch.optim.AdamW(ol.param_groups(module.model, 1e-2))
    module.training_step = lambda batch, batch_idx: module.model(input_ids=batch, labels=batch).loss
    with pytest.raises(errors.RunError, match="adalora"):
        trainer.fit(module, torch.utils.data.DataLoader(batches(2), batch_size=None))
