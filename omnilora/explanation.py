"""What a method would be on a model, before anything is built: layers, parameters, bytes, FLOPs, formats.

Works on a model on the meta device. Nothing is changed or allocated on the model: every site's tensors are made on
the meta device from shapes.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from omnilora import counting
from omnilora.core import method as methods
from omnilora.core.attach import Plan, TiedUse, plan
from omnilora.core.full import Full
from omnilora.core.method import Method
from omnilora.core.parameterization import Leaf, Parameterization, is_still, to_config
from omnilora.core.site import Site
from omnilora.core.state import AdapterState, SiteState, _on_meta
from omnilora.core.targets import Targets, targets_from
from omnilora.errors import BadValue, NotExpressible, UnknownName, nearest
from omnilora.plans.outlook import outlook


@dataclass(frozen=True)
class SitePlan:
    """One site. ``trainable`` and ``frozen`` count shared tensors at the first site that uses them."""

    name: str
    kind: str
    role: str
    how: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    trainable: int
    frozen: int
    plan: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Figures of a method on a model. Bytes are bytes; ``weights``: bytes of the base by dtype."""

    method: str
    hyper: Mapping[str, Any]
    model: str
    parameters: int
    trainable: int
    share: float
    frozen: int
    weights: Mapping[str, int]
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    flop_ratio: float
    plans: Mapping[str, int]
    formats: Mapping[str, Mapping[str, Any]]
    assumed: Mapping[str, Any]
    notes: tuple[str, ...]
    sites: tuple[SitePlan, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what ``omnilora explain --json`` prints."""
        return asdict(self)

    def text(self) -> str:
        """The same as a table for people."""
        from omnilora.cli.explaining import render

        return render(self)

    def __str__(self) -> str:
        return self.text()


def explain(
    model: nn.Module,
    method: Method | str,
    targets: Targets | str | Sequence[str] | None = None,
    *,
    batch_size: int = 1,
    length: int = 512,
    optimizer: str | None = None,
    store: Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """What ``ol.adapt(model, method, targets, **options)`` and training would take.

    Args:
        model: any nn.Module, also on the meta device.
        batch_size, length: rows and tokens a row of one forward, for activations.
        optimizer: name; default: the method's own, else "adamw".
        store: how the base will be held, as ``ol.quantize`` takes it ({"quant_type": "nf4"}); default: the method's.
        options: ``exclude``, ``overrides``, ``unfreeze``, ``bias``, ``tied`` of :class:`Targets`.

    Raises: the typed errors of ``ol.adapt`` for targets and hyper-parameters that do not fit.
    """
    made = methods.method(method) if isinstance(method, str) else method
    for name, value in (("batch_size", batch_size), ("length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadValue(f"{name} = {value!r}.", "Give an integer ≥ 1.")
    chosen = (optimizer or str(made.optimizer.get("name", "adamw"))).lower()
    if chosen not in counting.OPTIMIZERS:
        raise UnknownName(f"No optimizer {chosen!r} is known here.", nearest(chosen, counting.OPTIMIZERS))
    wanted = targets_from(targets if targets is not None else made.targets, **options)
    sites = plan(model, made, wanted)
    with torch.random.fork_rng(devices=[]):
        tensors = [_leaves(site, how) for site, how in sites]
    held, weights = _held(model, made, store, [s for s, _ in sites])
    with torch.random.fork_rng(devices=[]):
        told = outlook(model, sites, tensors, held)
    rows, learning, still = _counted(sites, tensors, told)
    tokens = batch_size * length
    kept = sum(counting.saved(s, t, how.frozen(), how.rank(), tokens) for (s, how), t in zip(sites, tensors))
    state = counting.OPTIMIZERS[chosen] * learning
    base, trainable = sum(p.numel() for p in counting.shapes(model)), sum(r.trainable for r in rows)
    macs = counting.base_macs(model)
    added = sum(counting.added_macs(s, t, isinstance(how, Full)) for (s, how), t in zip(sites, tensors))
    return Explanation(
        method=made.key, hyper={k: to_config(v) for k, v in made.hyper.items()}, model=type(model).__name__,
        parameters=base, trainable=trainable, share=trainable / max(base, 1), frozen=sum(r.frozen for r in rows),
        weights=weights, adapter=learning + still, gradients=learning, optimizer=state, activations=kept,
        total=sum(weights.values()) + 2 * learning + still + state + kept,
        flop_ratio=(macs + added) / macs if macs else float("nan"), plans=dict(Counter(r.plan for r in rows)),
        formats=_formats(model, made, sites, tensors),
        assumed={"batch_size": batch_size, "length": length, "optimizer": chosen,
                 "activations": counting.HOW_ACTIVATIONS, "flop_ratio": counting.HOW_FLOPS},
        notes=_notes(made, sites, held, told), sites=tuple(rows))  # fmt: skip


def _held(model: nn.Module, made: Method, store: Mapping[str, Any] | None, sites: Sequence[Site]) -> tuple[bool, dict[str, int]]:
    """(whether the base is brought into another form, its bytes then), on a copy without numbers."""
    if store is None and made.store is None:
        return False, counting.weights(model)
    bare = counting.skeleton(model)
    if store is not None:
        from omnilora.stores.nf4_layer import quantize

        quantize(bare, **store)
    elif made.store is not None:
        layers = dict(bare.named_modules())
        path = {id(m): n for n, m in model.named_modules()}
        made.store(bare, [dataclasses.replace(s, layer=layers[path[id(s.layer)]]) for s in sites])
    return True, counting.weights(bare)


def _counted(sites: Plan, tensors: Sequence[Mapping[str, Leaf]],
             told: Sequence[tuple[str, str]]) -> tuple[list[SitePlan], int, int]:  # fmt: skip
    """(sites, bytes of what learns, bytes of what does not); a shared tensor counts where it is met first."""
    rows, seen = [], set[str | None]()
    learning = still = 0
    for (site, how), leaves, (chosen, why) in zip(sites, tensors, told, strict=True):
        wide = bool(site.param) and site.store.dtype == torch.float64
        stuck, count = how.frozen(), {True: 0, False: 0}
        for name, leaf in leaves.items():
            if leaf.shared in seen:
                continue
            seen |= {leaf.shared} - {None}
            learns, numel = not is_still(name, stuck), leaf.value.numel()
            held = numel * (8 if wide else leaf.value.element_size())
            count[learns] += numel
            learning, still = (learning + held, still) if learns else (learning, still + held)
        rows.append(SitePlan(
            site.name or "(model)", site.kind, site.role, type(how).__name__, (site.fan_out, site.fan_in), how.rank(),
            count[True], count[False], chosen, why))  # fmt: skip
    return rows, learning, still


def _leaves(site: Site, how: Parameterization) -> dict[str, Leaf]:
    """The tensors of a site on the meta device. A tied use has none of its own."""
    if isinstance(how, TiedUse):
        return {}
    place = _on_meta(site) if site.param else site
    try:
        with torch.device("meta"):
            return dict(how.init(place).flat())
    except (NotImplementedError, RuntimeError) as error:
        raise NotExpressible(f"{site.name}: a {type(how).__name__} reads the weight's numbers to know its size "
                             f"({' '.join(str(error).split())[:120]}).",
                             "Adapt the model and count.") from error  # fmt: skip


def _notes(method: Method, sites: Plan, held: bool, told: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    out = []
    if method.prepare is not None:
        out.append("The method observes data first and may choose other ranks or sites than these.")
    if method.rules:
        out.append(f"Trains with rules ({', '.join(type(r).__name__ for r in method.rules)}): use ol.fit or ol.start.")
    if held:
        out.append("Weights of linear layers are counted as they will be held, quantized.")
    if any(site.kind == "conv" for site, _ in sites):
        out.append("The FLOP ratio takes one position of every convolution.")
    refused = Counter(why for chosen, why in told if chosen == "tree")
    out += [f"{count} site(s) run the operator's tree: {why}" for why, count in refused.most_common(3)]
    if any(isinstance(how, Full) for _, how in sites):
        out.append("Own copies replace the base's tensors in the forward; the base's stay in memory.")
    return tuple(out)


def _formats(model: nn.Module, method: Method, sites: Plan,
             tensors: Sequence[Mapping[str, Leaf]]) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{"peft" …: {"can": bool, "why": str}}, and {"sites": {name: why}} where not, by asking the writers with an adapter of
    zeros."""
    from omnilora.io import formats

    state, like = _zeros(model, method, sites, tensors)
    out: dict[str, dict[str, Any]] = {}
    for name, form in formats.FORMATS.items():
        why = formats.refusals(state, form, formats.Target(model))
        out[name] = {"can": not why, "why": next(iter(why.values()), "")}
        if why:
            out[name]["sites"] = {other: text.replace(site, other) for site, text in why.items() if site for other in like[site]}
    return out


def _zeros(model: nn.Module, method: Method, sites: Plan,
           tensors: Sequence[Mapping[str, Leaf]]) -> tuple[AdapterState, dict[str, list[str]]]:  # fmt: skip
    """(an adapter of zeros: all own copies, and the first site of each kind, name, shape and parameterization, which sites
    each stands for)."""
    from omnilora.io.peft_facts import STORED, facts

    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    paths = [n for n, _ in model.named_modules()]
    known, like, made, pool = {}, {}, {}, {}
    for (site, how), leaves in zip(sites, tensors, strict=True):
        kind = (repr(how), re.sub(r"\d+", "*", site.name), site.kind, site.fan_out, site.fan_in, site.region is None,
                type(site.layer))  # fmt: skip
        if kind in known and not isinstance(how, Full):
            like[known[kind]].append(site.name)
            continue
        known[kind], like[site.name] = site.name, [site.name]
        own = {n: torch.zeros(1).expand(f.value.shape) for n, f in leaves.items() if f.shared is None}
        pool |= {f.shared: torch.zeros(1).expand(f.value.shape) for f in leaves.values() if f.shared is not None}
        tied = uses[id(site.layer._parameters.get(site.param))] > 1
        made[site.name] = SiteState(
            how, site.kind, how.first_scale(site), own, {n: f.role for n, f in leaves.items()},
            {n: f.shared for n, f in leaves.items() if f.shared is not None}, site.region,
            {STORED: facts(site, paths=paths, tied=tied)} if site.param else {},
            (site.fan_out, site.fan_in))  # fmt: skip
    return AdapterState(method.key, dict(method.hyper), made, pool), like
