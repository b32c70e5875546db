"""The paged optimizer: AdamW's arithmetic, bounded memory, exact resume."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch

import omnilora as ol
from omnilora.optim.paged import PagedAdamW


def run(cls, steps, state=None, **options):
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s)) for s in ((7, 5), (3,), (), (0, 4))]
    opt = cls([{"params": ps[:2]}, {"params": ps[2:], "lr": 1e-3}], lr=1e-2, **options)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in ps:
            p.grad = None if step == 1 and p.dim() == 1 else torch.randn(p.shape, generator=g)
        opt.step()
    return ps, opt


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}])
def test_equal_to_adamw(options):
    ours, _ = run(PagedAdamW, 20, **options)
    theirs, _ = run(torch.optim.AdamW, 20, **options, foreach=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_resumes_from_its_state():
    whole, _ = run(PagedAdamW, 10)
    ps, opt = run(PagedAdamW, 4)
    saved = {k: v for k, v in opt.state_dict().items()}
    other = PagedAdamW([{"params": ps[:2]}, {"params": ps[2:], "lr": 1e-3}], lr=1e-2)
    other.load_state_dict(saved)
    g = torch.Generator().manual_seed(1)
    for step in range(10):
        grads = [None if step == 1 and p.dim() == 1 else torch.randn(p.shape, generator=g) for p in ps]
        if step >= 4:
            for p, grad in zip(ps, grads, strict=True):
                p.grad = grad
            other.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, ps, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_resident_memory_is_bounded():
    """16 parameters with 4 MiB of moments each: between steps none of the 64 MiB is resident; without release all are."""
    code = textwrap.dedent("""
        import re, torch
        from omnilora.optim import paged

        def resident():
            text = open("/proc/self/smaps").read()
            blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
            mine = [b for b in blocks if "(deleted)" in b.partition("\\n")[0] and re.search(r"Size: +4096 kB", b)]
            return len(mine), sum(int(re.search(r"Rss: +(\\d+)", b)[1]) for b in mine)

        def steps(release):
            ps = [torch.nn.Parameter(torch.zeros(512, 1024)) for _ in range(16)]
            opt, top = paged.PagedAdamW(ps), 0
            update = opt._update
            def watched(p, group):
                nonlocal top
                update(p, group)
                top = max(top, resident()[1])
            opt._update = watched
            if not release:
                paged.mmap.MADV_DONTNEED = paged.mmap.MADV_NORMAL
            for _ in range(3):
                for p in ps:
                    p.grad = torch.ones_like(p)
                opt.step()
            print(*resident(), top, float(opt.state[ps[0]]["exp_avg"].mean()))
        steps(True)
        steps(False)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (line.split() for line in done.stdout.strip().splitlines())
    assert first[0] == "16" and int(first[1]) == 0 and int(first[2]) <= 4096
    assert float(first[3]) == pytest.approx(1 - 0.9**3, rel=1e-5)
    assert int(second[1]) >= 16 * 4096


def test_qlora_pages_its_optimizer(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
    ol.adapt(model, ol.method("qlora", r=2, paged=True))
    data = [(torch.randn(64), torch.randn(8)) for _ in range(32)]

    def loss(m, batch):
        return (m(batch[0]) - batch[1]).square().mean()

    seen = []
    update = PagedAdamW._update
    monkeypatch.setattr(PagedAdamW, "_update", lambda self, p, group: seen.append(p) or update(self, p, group))
    report = ol.fit(model, data, loss=loss, steps=6, batch_size=8, output=str(tmp_path))
    assert len(seen) == 6 * 4 and report.steps == len(report.losses) == 6
    assert re.search("step-0+6", str(report.checkpoint))
