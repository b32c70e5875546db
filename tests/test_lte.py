"""LTE over real processes: two of them with one head each end where one process with two heads ends."""

import os

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

import omnilora as ol
from omnilora import proofs
from omnilora.core.run import param_groups, start


def _train(model, x, y, steps=6):
    ol.adapt(model, ol.method("lte", heads=2, r=2, alpha=4.0, every=3))
    run = start(model, total_steps=steps)
    opt = torch.optim.Adam(param_groups(model, 1e-2))
    run.bind(opt)
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
    run.finish()
    return proofs.learned(model, "layers.0")


def _data():
    torch.manual_seed(0)
    return proofs.Stack(6, 5), torch.randn(8, 6), torch.randn(8, 5)


def _worker(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, x, y = _data()
    rows = slice(4 * rank, 4 * rank + 4)
    made = _train(model, x[rows], y[rows])
    torch.save(made, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{k}.pt") for k in (0, 1))
    assert torch.equal(one, two)
    model, x, y = _data()
    alone = _train(model, x, y)
    # the mean over eight rows is half of the mean over four: Adam does not see a factor of the loss
    assert float((alone - one).norm() / one.norm()) < 1e-4


def test_evaluation_uses_the_merge_and_not_a_head():
    model, x, y = _data()
    ol.adapt(model, ol.method("lte", heads=2, r=2, alpha=4.0, every=100))
    run = start(model, total_steps=10)
    opt = torch.optim.Adam(param_groups(model, 1e-2))
    run.bind(opt)
    model.train()
    (model(x) - y).square().mean().backward()
    opt.step()
    apart = model(x).detach()
    model.eval()
    merged = model(x).detach()
    run.finish()
    assert torch.equal(model(x), merged)
    assert not torch.allclose(apart, merged)
