"""Rules that make an update's gradients themselves, data set apart, sites arranged as a whole, what stores saw."""

import dataclasses

import pytest
import torch
from torch import nn

import omnilora as ol
from omnilora import proofs
from omnilora.core.method import Method
from omnilora.core.rule import Rule
from omnilora.core.run import param_groups, start
from omnilora.errors import BadValue, RunError
from omnilora.parameterizations.lora import LoRA


class TwoSets(Rule):
    """Learns from the mean of a batch of each set; ``seen`` holds what was asked of the second."""

    other_share = 0.25

    def __init__(self):
        self.seen = []

    def update(self, run, batches, loss):
        other = run.other()
        self.seen.append(other)
        value = (loss(batches[0])[0] + loss(other)[0]) / 2
        value.backward()
        return float(value.detach())


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def squares(net, batch):
    return net(batch).square().mean()


def adapted():
    net, rule = model(), TwoSets()
    ol.adapt(net, Method("two", LoRA(2), (rule,)))
    return net, rule


def test_fit_sets_data_apart():
    net, rule = adapted()
    data = list(torch.arange(32.0).view(8, 4))
    ol.fit(net, data, loss=squares, steps=6, batch_size=2, lr=1e-2)
    rows = {tuple(r.tolist()) for b in rule.seen for r in b}
    assert len(rule.seen) == 6 and len(rows) == 2


def test_resuming_goes_on_with_the_other_data(tmp_path):
    data = list(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))

    def go(folder, **options):
        net, rule = adapted()
        report = ol.fit(net, data, loss=squares, steps=8, batch_size=3, lr=1e-2, output=str(folder), **options)
        return report.losses, rule

    whole, _ = go(tmp_path / "whole")
    go(tmp_path / "parts", stop_at=3)
    rest, _ = go(tmp_path / "parts", resume="auto")
    assert rest == whole


def test_a_loop_of_your_own_must_ask_the_rule():
    net, rule = adapted()
    run = start(net, total_steps=4, other=[torch.ones(2, 4)])
    opt = torch.optim.SGD(param_groups(net, 1e-2))
    run.bind(opt)
    net.train()
    squares(net, torch.ones(2, 4)).backward()
    with pytest.raises(RunError, match="makes the gradients"):
        opt.step()
    assert run.update([torch.ones(2, 4)], lambda b: (squares(net, b), None)) is not None
    opt.step()
    assert run.step == 1 and len(rule.seen) == 1
    run.close()


def test_without_a_second_part_it_says_so():
    net, _ = adapted()
    run = start(net, total_steps=4)
    with pytest.raises(RunError, match="second part"):
        run.update([torch.ones(2, 4)], lambda b: (squares(net, b), None))
    run.close()


def test_data_that_cannot_be_divided():
    from torch.utils.data import DataLoader

    net, _ = adapted()
    with pytest.raises(BadValue, match="divide"):
        ol.fit(net, DataLoader(list(torch.randn(8, 4)), batch_size=2), loss=squares, steps=2)
    net, _ = adapted()
    with pytest.raises(BadValue, match="divided"):
        ol.fit(net, [torch.randn(4)], loss=squares, steps=2)


def test_arrange_gives_each_site_its_own():
    net = proofs.Stack(4, 4, 4, 4)

    def arrange(sites, how):
        return [None if k == 1 else dataclasses.replace(how, r=k + 1) for k, _ in enumerate(sites)]

    ol.adapt(net, Method("own", LoRA(8, 4.0), arrange=arrange))
    assert {s.site.name: s.how.r for s in ol.slots(net)} == {"layers.0": 1, "layers.2": 3}


def test_an_override_wins_over_arrange():
    net = proofs.Stack(4, 4, 4)
    ol.adapt(net, Method("own", LoRA(2, 4.0), arrange=lambda sites, how: [how] * len(sites)), overrides={"layers.1": {"r": 1}})
    assert [s.how.r for s in ol.slots(net)] == [2, 1]


def test_what_a_store_saw_reaches_init_and_fill():
    net, got = model(), {}

    def store(net, sites):
        return {s.name: torch.full((2, 4), 7.0) for s in sites}

    def fill(slot, seen):
        got[slot.site.name] = seen
        slot.A.copy_(seen)

    ol.adapt(net, Method("own", LoRA(2), store=store, fill=fill))
    assert torch.equal(ol.slots(net)[0].A.detach(), got["0"])


def test_places():
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    from omnilora.core.targets import Targets, find_sites

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama, bert = LlamaForCausalLM(LlamaConfig(**sizes)), BertModel(BertConfig(**sizes))

    def names(net, *patterns):
        return [s.name for s, _ in find_sites(net, Targets(include=patterns))]

    assert names(llama, "attention-output", "mlp-output") == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert names(llama, "mlp-input") == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert names(llama, "block:attention-layer") == ["model.layers.0.self_attn"]
    assert names(bert, "attention-output") == ["encoder.layer.0.attention.output.dense"]
    assert names(bert, "mlp-output") == ["encoder.layer.0.output.dense"]
    assert names(bert, "mlp-input") == ["encoder.layer.0.intermediate.dense"]
