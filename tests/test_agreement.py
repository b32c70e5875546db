"""Against PEFT on the same tensors: forward, gradients, schedules. (Files are compared in test_peft.py.)"""

import copy
import warnings

import pytest
import torch
from torch import nn

import omnilora as ol

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 14), nn.Linear(14, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def pair(config, made):
    """The same base under both libraries."""
    torch.manual_seed(0)
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = ol.adapt(base, made)
    return theirs, ours


def copy_into_peft(theirs, ours, names):
    for slot in ol.slots(ours):
        layer = theirs.base_model.model.get_submodule(slot.site.name)
        for our, get in names.items():
            with torch.no_grad():
                value = slot.get_parameter(our)
                get(layer).copy_(value.reshape(get(layer).shape))


LORA = {"A": lambda m: m.lora_A["default"].weight, "B": lambda m: m.lora_B["default"].weight}


def randomize(ours):
    torch.manual_seed(1)
    with torch.no_grad():
        for slot in ol.slots(ours):
            for _, t in slot.tensors():
                t.add_(0.3 * torch.randn_like(t))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "vera"])
def test_forward_and_gradients(kind):
    names = dict(LORA)
    if kind == "vera":
        config = peft.VeraConfig(r=5, target_modules=["a", "b"], projection_prng_key=3)
        made = ol.method("vera", r=5, seed=3)
        names = {"b": lambda m: m.vera_lambda_b["default"], "d": lambda m: m.vera_lambda_d["default"]}
    else:
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"], use_rslora=kind == "rslora", use_dora=kind == "dora")
        made = ol.method(kind, r=3, alpha=5.0)
    if kind == "dora":
        made = ol.method("dora", r=3, alpha=5.0, dropout=0.0)
        names = {"inner.A": LORA["A"], "inner.B": LORA["B"], "m": lambda m: m.lora_magnitude_vector["default"].weight}
    theirs, ours = pair(config, made)
    if kind == "vera":
        with torch.no_grad():
            for s in ol.slots(ours):
                s.b.normal_()
                s.d.normal_()
    else:
        randomize(ours)
    copy_into_peft(theirs, ours, names)
    x = torch.randn(7, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for slot in ol.slots(ours):
        layer = theirs.base_model.model.get_submodule(slot.site.name)
        for our, get in names.items():
            grad = slot.get_parameter(our).grad
            torch.testing.assert_close(grad, get(layer).grad.reshape(grad.shape), rtol=2e-5, atol=2e-5)


def test_adalora_schedule_scores_and_regularizer():
    """Forty updates of SGD: the same budget, the same triplets cut, the same tensors.

    PEFT also cuts at step total − tfinal where that is no multiple of deltaT; the official code does not, nor do we.
    """
    total, r = 40, 4
    config = peft.AdaLoraConfig(init_r=r, target_r=2, lora_alpha=6, tinit=5, tfinal=16, deltaT=3, beta1=0.85, beta2=0.85,
                                orth_reg_weight=0.1, total_step=total, target_modules=["a", "b"])  # fmt: skip
    made = ol.method("adalora", r=r, target=2, alpha=6.0, t_init=5, t_final=16, every=3, orthogonal=0.1)
    theirs, ours = pair(config, made)
    names = {"P": lambda m: m.lora_B["default"], "lam": lambda m: m.lora_E["default"], "Q": lambda m: m.lora_A["default"]}
    randomize(ours)
    copy_into_peft(theirs, ours, names)
    ours.train()
    theirs.train()
    opt = torch.optim.SGD(ol.param_groups(ours, 0.02), lr=0.02)
    run = ol.start(ours, opt, total_steps=total)
    opt2 = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    g = torch.Generator().manual_seed(2)
    worst = 0.0
    for step in range(1, total + 1):
        x, y = torch.randn(16, 10, generator=g), torch.randn(16, 6, generator=g)
        opt.zero_grad()
        ((ours(x) - y).square().mean() + run.loss(None, None)).backward()
        opt.step()
        opt2.zero_grad()
        loss = (theirs(x) - y).square().mean()
        terms = [p for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        gram = [p.T @ p if "B" in n else p @ p.T for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        loss = loss + 0.1 * sum(torch.norm(m - torch.eye(len(m))) for m in gram) / len(terms)
        loss.backward()
        opt2.step()
        theirs.base_model.update_and_allocate(step)
        for slot in ol.slots(ours):
            layer = theirs.base_model.model.get_submodule(slot.site.name)
            for our, get in names.items():
                a, b = slot.get_parameter(our), get(layer)
                worst = max(worst, float((a - b.reshape(a.shape)).abs().max().detach()))
    run.finish()
    assert worst < 1e-5
    ranks = [int((s.lam != 0).sum()) for s in ol.slots(ours)]
    assert sum(ranks) == 4 == 2 * len(ranks)


def test_lora_plus_groups():
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = pair(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"]), ol.method("lora_plus", r=3, alpha=5.0, ratio=7.0))
    opt = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=7.0)
    rates = {id(p): g["lr"] for g in opt.param_groups for p in g["params"]}
    want = sorted((n.split(".")[-3], rates[id(p)]) for n, p in theirs.named_parameters() if p.requires_grad)
    groups = ol.param_groups(ours, 0.1)
    got = sorted(("lora_" + g["name"], g["lr"]) for g in groups for _ in g["params"])
    assert got == want


def test_lora_fa_corrected_step():
    from peft.optimizers import create_lorafa_optimizer

    theirs, ours = pair(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"]), ol.method("lora_fa", r=3, alpha=5.0, correction=True))
    randomize(ours)
    copy_into_peft(theirs, ours, LORA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt2 = create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    opt = torch.optim.AdamW(ol.param_groups(ours, 1e-2), lr=1e-2, eps=1e-6, weight_decay=0.0)
    run = ol.start(ours, opt, total_steps=1)
    x, y = torch.randn(16, 10), torch.randn(16, 6)
    (ours(x) - y).square().mean().backward()
    (theirs(x) - y).square().mean().backward()
    opt.step()
    opt2.step()
    run.finish()
    for slot in ol.slots(ours):
        layer = theirs.base_model.model.get_submodule(slot.site.name)
        torch.testing.assert_close(slot.B, LORA["B"](layer), rtol=1e-2, atol=2e-3)  # PEFT multiplies in bfloat16 here
