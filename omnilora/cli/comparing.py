"""What an adapter's folder holds, and how two of them differ, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnilora.core.files import MANIFEST, load_file, read_json
from omnilora.core.parameterization import is_additive, to_config
from omnilora.core.state import AdapterState, SiteState, delta
from omnilora.errors import FileRefused, OmniloraError
from omnilora.io.names import GGUF, NAMES


def about(path: Path) -> dict[str, Any]:
    """Figures of an adapter's folder, or of a run's folder with those of its adapter inside."""
    if path.is_file() or (path / MANIFEST).is_file() or (path / "adapter_config.json").is_file():
        return about_adapter(path)
    if (path / "config.yaml").is_file():
        return about_run(path)
    if not path.is_dir():
        raise FileRefused(f"{path} does not exist.", "Give the folder of an adapter or of a run.")
    raise FileRefused(f"{path} holds neither an adapter nor a run.",
                      f"Expected {MANIFEST}, adapter_config.json or config.yaml.")  # fmt: skip


def about_adapter(path: Path) -> dict[str, Any]:
    state = load_file(path)
    inside = [path] if path.is_file() else sorted(path.iterdir())
    files = {p.name: p.stat().st_size for p in inside if p.is_file()}
    native = (path / MANIFEST).is_file()
    ranks: dict[str, int] = {}
    for s in state.sites.values():
        ranks[str(s.how.rank())] = ranks.get(str(s.how.rank()), 0) + 1
    sites = {
        name: {"how": type(s.how).__name__, "kind": s.kind, "rank": s.how.rank(), "scale": s.scale,
               "parameters": sum(t.numel() for t in s.tensors.values()),
               "tensors": {n: list(s.tensor(n, state).shape) for n in s.roles if n in s.tensors or n in s.shared}}
        for name, s in state.sites.items()
    }  # fmt: skip
    return {
        "path": str(path), "what": "adapter", "format": kind_of(state, path), "method": state.method,
        "hyper": {k: to_config(v) for k, v in state.hyper.items()},
        "library": read_json(path / MANIFEST)["library"] if native else None,
        "sites": len(state.sites), "parameters": state.numel(), "ranks": ranks, "content": state.content(),
        "bytes": sum(files.values()), "files": files, "peft": (path / "adapter_config.json").is_file(),
        "bases": {n: {"shape": list(f.shape), "digest": f.digest, "norm": f.norm} for n, f in state.base.items()},
        "extra": dict(state.extra), "layers": sites,
    }  # fmt: skip


def kind_of(state: AdapterState, path: Path) -> str:
    """Whose file it is."""
    if (path / MANIFEST).is_file():
        return "omnilora"
    if state.extra.get(NAMES) == GGUF:
        return "llama.cpp"
    return "single file" if NAMES in state.extra else "peft"


def about_run(path: Path) -> dict[str, Any]:
    """A run's folder: its configuration, its report where it has finished, checkpoints, and its adapter."""
    from omnilora.training.checkpoint import found
    from omnilora.training.config import TrainConfig
    from omnilora.training.folder import command, step_of

    report = read_json(path / "report.json") if (path / "report.json").is_file() else None
    if report is not None:
        losses = report.pop("losses", [])
        report |= {"first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None}
    adapter = path / "adapter"
    home = path / "checkpoints"
    there = found(home)
    done = report is not None and adapter.is_dir() and report.get("stopped") != "stop_at"
    return {
        "path": str(path), "what": "run", "finished": done, "step": step_of(there[-1]) if there else 0,
        "resume": command(path) if there and not done else None,
        "config": json.loads(json.dumps(TrainConfig.from_yaml(path / "config.yaml").to_dict(), default=str)),
        "report": report, "checkpoints": sorted(p.name for p in home.iterdir() if p.is_dir() and p.name[0] != ".")
        if home.is_dir() else [],
        "adapter": about_adapter(adapter) if adapter.is_dir() else None,
    }  # fmt: skip


def difference(a: AdapterState, b: AdapterState) -> dict[str, Any]:
    """How B differs from A: settings, and for every site of both ‖ΔA − ΔB‖ / ‖ΔA‖, largest first.

    ``of`` says what was compared: "delta" is ΔW; "tensors" all of a site's tensors, where ΔW needs the base weight;
    "unlike": neither can be. ``relative`` is None there, and where A's is zero and B's is not.
    """
    both = [n for n in a.sites if n in b.sites]
    sites = sorted((_site(n, a, b) for n in both), key=lambda s: -_order(s["relative"]))
    return {
        "same": a.content() == b.content(), "settings": _settings(a, b, both),
        "only_a": [n for n in a.sites if n not in b.sites], "only_b": [n for n in b.sites if n not in a.sites],
        "bases": [n for n in a.base if n in b.base and a.base[n].digest != b.base[n].digest],
        "largest": sites[0]["relative"] if sites else None, "sites": sites,
    }  # fmt: skip


def _order(relative: float | None) -> float:
    return math.inf if relative is None else relative


def _settings(a: AdapterState, b: AdapterState, both: list[str]) -> list[dict[str, Any]]:
    """{"name", "a", "b", "sites"} of settings that differ; per-site ones once for all sites with the same change."""
    found = [{"name": "method", "a": a.method, "b": b.method, "sites": None}] if a.method != b.method else []
    for name in sorted(set(a.hyper) | set(b.hyper)):
        left, right = to_config(a.hyper.get(name)), to_config(b.hyper.get(name))
        if left != right:
            found.append({"name": f"hyper.{name}", "a": left, "b": right, "sites": None})
    grouped: dict[str, dict[str, Any]] = {}
    for site in both:
        left, right = _flat(a.sites[site]), _flat(b.sites[site])
        unlike = left["how.kind"] != right["how.kind"]
        for name in sorted({"scale", "region", "how.kind"} if unlike else set(left) | set(right)):
            if left.get(name) != right.get(name):
                key = json.dumps([name, left.get(name), right.get(name)], default=str)
                row = grouped.setdefault(key, {"name": name, "a": left.get(name), "b": right.get(name), "sites": []})
                row["sites"].append(site)
    return found + list(grouped.values())


def _flat(s: SiteState) -> dict[str, Any]:
    """Settings of a site by dotted name."""
    out: dict[str, Any] = {"scale": s.scale, "region": list(s.region) if s.region else None}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{name}.{key}")
        else:
            out[name] = value

    walk(to_config(s.how), "how")
    return out


def _site(name: str, a: AdapterState, b: AdapterState) -> dict[str, Any]:
    left, right = _delta(name, a), _delta(name, b)
    if left is not None and right is not None and _shape(left) == _shape(right):
        of, norm, gap = "delta", _norm([left]), _norm([left, right])
    else:
        of = "tensors"
        x, y = _tensors(name, a), _tensors(name, b)
        if {k: t.shape for k, t in x.items()} != {k: t.shape for k, t in y.items()}:
            return {"site": name, "of": "unlike", "relative": None, "norm_a": None, "difference": None}
        norm = math.sqrt(sum(float(t.square().sum()) for t in x.values()))
        gap = math.sqrt(sum(float((t - y[k]).square().sum()) for k, t in x.items()))
    relative = gap / norm if norm else (0.0 if gap == 0 else None)
    return {"site": name, "of": of, "relative": relative, "norm_a": norm, "difference": gap}


Delta = Tensor | tuple[Tensor, Tensor]


def _delta(name: str, state: AdapterState) -> Delta | None:
    """ΔW as (B, A) or as a matrix in fp64; None where it needs the base weight or the layer."""
    s = state.sites[name]
    if not is_additive(s.how):
        return None
    try:
        with torch.no_grad():
            op = delta(s, state)
            ba = op.factors()
            return (ba[0].double(), ba[1].double()) if ba is not None else op.dense().double()
    except (AttributeError, NotImplementedError, OmniloraError):
        return None


def _shape(d: Delta) -> tuple[int, ...]:
    return (*d[0].shape[:-1], d[1].shape[-1]) if isinstance(d, tuple) else tuple(d.shape)


def _norm(parts: list[Delta]) -> float:
    """‖D₀‖, or ‖D₀ − D₁‖; of factors by QR of [B₀ −B₁] and [A₀; A₁]ᵀ, which keeps small differences."""
    signs = [1.0, -1.0]
    if all(isinstance(d, tuple) for d in parts):
        b = torch.cat([sign * d[0] for sign, d in zip(signs, parts)], -1)
        a = torch.cat([d[1] for d in parts], -2)
        return float((torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT).norm())
    dense = [d[0] @ d[1] if isinstance(d, tuple) else d for d in parts]
    return float((dense[0] if len(dense) == 1 else dense[0] - dense[1]).norm())


def _tensors(name: str, state: AdapterState) -> dict[str, Tensor]:
    s = state.sites[name]
    return {n: s.tensor(n, state).double() for n in s.roles if n in s.tensors or n in s.shared}
