"""QLoRA's paged optimizer (arXiv:2305.14314) on any system with mmap: one parameter's moments are resident at a time."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(torch.optim.Optimizer):
    """Equal to torch.optim.AdamW. ``folder``: of the unnamed files behind the moments; None: the system's temporary one."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, folder: str | None = None) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.folder = folder
        self.pages: dict[Tensor, tuple[mmap.mmap, Tensor]] = {}  # parameter → (file, both moments (2, *shape))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p, group)
        return loss

    def _moments(self, p: Tensor) -> tuple[mmap.mmap, Tensor, Tensor]:
        state = self.state[p]  # moments are views of p's file: zero at the start, or copied from a loaded state
        if p not in self.pages:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.truncate(2 * p.numel() * p.element_size())
                pages = mmap.mmap(file.fileno(), 0)
            self.pages[p] = pages, torch.frombuffer(pages, dtype=p.dtype).view(2, *p.shape)
        pages, both = self.pages[p]
        for name, view in zip(MOMENTS, both):
            if name in state and state[name].data_ptr() != view.data_ptr():
                view.copy_(state[name])
            state[name] = view
        state.setdefault("step", torch.zeros(()))
        return pages, both[0], both[1]

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        pages, m, v = self._moments(p)
        g, (b1, b2), lr = p.grad, group["betas"], group["lr"]
        assert g is not None
        t = int(self.state[p]["step"].add_(1))
        p.mul_(1 - lr * group["weight_decay"])
        g = g.to(m.device)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (v.sqrt() / math.sqrt(1 - b2**t)).add_(group["eps"])
        p.addcdiv_(m.to(p.device), root.to(p.device), value=-lr / (1 - b1**t))
        pages.madvise(mmap.MADV_DONTNEED)  # a shared mapping: what was written stays in the file
