"""Which sites: patterns over the paths of a model's layers, first match wins, nothing matched in vain.

A pattern is a suffix of dotted path components (``q_proj``, ``mlp.down_proj``), a regular expression on the whole
path (``re:layers\\.[0-3]\\..*``), a role (``attention``, ``mlp``, ``head``, ``router``, ``embedding``, ``norm``,
``all-linear``), a place (``attention-layer``, ``attention-output``, ``mlp-input``, ``mlp-output``), any of them with a
block of a fused projection (``c_attn[0/3]``: the first of three equal blocks; ``c_attn[0:768]``: rows), or ``block:``
and a pattern for a whole layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from omnilora.core.site import PLACES, Site, called_site, inner_reads, is_linear, read_site, reader_of, role_of
from omnilora.errors import BadValue, TargetError, UnknownName, nearest

ROLE_WORDS = ("attention", "mlp", "head", "router", "embedding", "norm", "other")
DEFAULT = ("all-linear",)
_BLOCK = re.compile(r"^(?P<name>.*)\[(?P<a>\d+)(?P<sep>[:/])(?P<b>\d+)\]$")


@dataclass(frozen=True)
class Targets:
    """What is adapted and how each match departs from the method's own hyper-parameters.

    ``overrides``: pattern → changes ({"r": 4, "alpha": 8}, {"method": parameterization}); the first match wins.
    ``unfreeze``: patterns of layers or parameters that train as the adapter's own copies.
    ``bias``: "none", "all" (every bias of the model) or "lora_only" (those of adapted layers).
    ``tied``: a weight used by embedding and head is adapted at the "embedding" only, or for "both".
    """

    include: tuple[str, ...] = DEFAULT
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unfreeze: tuple[str, ...] = ()
    bias: str = "none"
    tied: str = "embedding"
    optional: tuple[str, ...] = ()  # sites that a forward may legitimately skip


def check_patterns(patterns: Any, name: str = "targets") -> None:
    """Raises for what no model could match: patterns that are no text, or no regular expression."""
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise BadValue(f"{name} holds {pattern!r}, a {type(pattern).__name__}.", "Give patterns of layers' names as text.")
        bare = pattern.removeprefix("block:")
        if bare.startswith("re:"):
            try:
                re.compile(bare[3:])
            except re.error as error:
                raise TargetError(f"Pattern {pattern!r} is no regular expression: {error}.",
                                  "Correct it; a pattern without 're:' is a suffix of the layer's path.") from error  # fmt: skip


def targets_from(value: Targets | str | Sequence[str] | None, **changes: Any) -> Targets:
    if value is None:
        made = Targets()
    elif isinstance(value, Targets):
        made = value
    else:
        made = Targets(include=(value,) if isinstance(value, str) else tuple(value))
    known = {f.name for f in fields(Targets)}
    for key in changes:
        if key not in known:
            raise UnknownName(f"No option {key!r} of targets.", nearest(key, known))
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items() if v is not None}
    made = replace(made, **given)
    for name in ("include", "exclude", "overrides", "unfreeze", "optional"):
        check_patterns(getattr(made, name), "targets" if name == "include" else name)
    if made.bias not in ("none", "all", "lora_only"):
        raise BadValue(f"bias = {made.bias!r}.", "Give 'none', 'all' or 'lora_only'.")
    if made.tied not in ("embedding", "both"):
        raise BadValue(f"tied = {made.tied!r}.", "Give 'embedding' or 'both'.")
    return made


def split_block(pattern: str) -> tuple[str, tuple[int, str, int] | None]:
    m = None if pattern.startswith("re:") else _BLOCK.match(pattern)
    return (pattern, None) if m is None else (m["name"], (int(m["a"]), m["sep"], int(m["b"])))


def matches(pattern: str, name: str, layer: nn.Module) -> bool:
    """Whether a pattern (without a block) names the layer at path ``name``."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(f"Pattern {pattern!r} is no regular expression: {error}.") from error
    if pattern == "all-linear":
        return is_linear(layer) and role_of(name, layer) not in ("head", "router")
    if pattern in ROLE_WORDS and role_of(name, layer) == pattern:
        return True
    if pattern in PLACES and PLACES[pattern](name, layer):
        return True
    return name == pattern or name.endswith("." + pattern)


def _adaptable(name: str, layer: nn.Module) -> bool:
    return is_linear(layer) or called_site(name, layer) is not None or bool(inner_reads(layer))


def _sites_at(name: str, layer: nn.Module, block: tuple[int, str, int] | None, pattern: str) -> list[Site]:
    site = called_site(name, layer)
    if site is not None:
        if block is None:
            return [site]
        a, sep, b = block
        if sep == "/":
            if b == 0 or site.fan_out % b or a >= b:
                raise TargetError(f"{name} has {site.fan_out} outputs; {pattern!r} is no block of it.")
            size = site.fan_out // b
            a, b = a * size, (a + 1) * size
        if not 0 <= a < b <= site.fan_out:
            raise TargetError(f"{name} has {site.fan_out} outputs; rows {a}:{b} are outside.")
        site.fan_out, site.region, site.name = b - a, (a, b), f"{name}[{a}:{b}]"
        return [site]
    reads = []
    for path, owner, param in inner_reads(layer):
        made = read_site(f"{name}.{path}".removesuffix(f".{param}"), owner, param)
        made.host, made.role = layer, "attention" if isinstance(layer, nn.MultiheadAttention) else made.role
        reads.append(made)
    return reads


def _children_read(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight a parent reads without calling them."""
    return {owner for m in model.modules() for _, owner, _ in inner_reads(m) if owner is not m}


def find_sites(model: nn.Module, targets: Targets) -> list[tuple[Site, str]]:
    """(site, the pattern that chose it) in the order of the model. Raises on patterns that match in vain."""
    layers = dict(model.named_modules())
    read = _children_read(model)
    chosen: dict[str, tuple[Site, str]] = {}
    hits: dict[str, int] = dict.fromkeys((*targets.include, *targets.exclude), 0)
    owner_of: dict[str, str] = {}
    for name, layer in layers.items():
        if layer in read or name.startswith("adapters.") or ".adapters." in name or name.endswith(".adapters"):
            continue
        excluded = [p for p in targets.exclude if matches(p, name, layer)]
        for pattern in targets.include:
            if pattern.startswith("block:"):
                if matches(pattern[6:], name, layer):
                    hits[pattern] += 1
                    site = called_site(name, layer, block=True)
                    if site is not None and not excluded:
                        chosen.setdefault(f"block:{name}", (site, pattern))
                continue
            bare, block = split_block(pattern)
            reads_linear = bare == "all-linear" and isinstance(layer, nn.MultiheadAttention)
            if not (reads_linear or matches(bare, name, layer)) or not _adaptable(name, layer):
                continue
            hits[pattern] += 1
            for p in excluded:
                hits[p] += 1
            if excluded:
                continue
            for site in _sites_at(name, layer, block, pattern):
                if site.name in chosen:
                    owner_of[pattern] = chosen[site.name][1]
                    continue
                chosen[site.name] = (site, pattern)
    _parameters(model, targets, chosen, hits)
    _check_hits(model, targets, chosen, hits, owner_of)
    return list(chosen.values())


def _parameters(model: nn.Module, targets: Targets, chosen: dict[str, tuple[Site, str]], hits: dict[str, int]) -> None:
    """Raw parameters named by suffix or expression (fused expert stacks): read sites."""
    wanted = [p for p in targets.include if not hits.get(p) and p not in ROLE_WORDS and p != "all-linear"]
    if not wanted:
        return
    for name, layer in model.named_modules():
        for param in dict(layer.named_parameters(recurse=False)):
            path = f"{name}.{param}" if name else param
            for pattern in wanted:
                if not pattern.startswith(("block:",)) and matches(pattern, path, layer) and path not in chosen:
                    if any(matches(p, path, layer) for p in targets.exclude):
                        continue
                    transposed = bool(vars(layer).get("is_transposed", False))
                    chosen[path] = (read_site(name, layer, param, transposed), pattern)
                    hits[pattern] += 1


def _check_hits(model: nn.Module, targets: Targets, chosen: dict[str, tuple[Site, str]], hits: dict[str, int],
                owner_of: dict[str, str]) -> None:  # fmt: skip
    names = [n for n, m in model.named_modules() if n and _adaptable(n, m)]
    used = {pattern for _, pattern in chosen.values()}
    for pattern in targets.include:
        if pattern in used:
            continue
        if hits[pattern] and pattern in owner_of:
            raise TargetError(f"Target {pattern!r} is wholly shadowed by {owner_of[pattern]!r}.",
                              "Put the narrower pattern first, or remove it.")  # fmt: skip
        if hits[pattern]:
            raise TargetError(f"Everything that target {pattern!r} matches is excluded.", "Remove one of the two.")
        if pattern == "all-linear":
            raise TargetError("The model has no linear layer outside its head and routers.",
                              f"Name the layers to adapt, for instance {names[:3]}." if names else
                              "It has no layer that can be adapted; is it the model you meant?")  # fmt: skip
        leaves = {n.split(".")[-1] for n in names} | set(names)
        raise TargetError(f"Target {pattern!r} matches no layer.", nearest(pattern, leaves))
    for pattern in targets.exclude:
        if not hits[pattern]:
            leaves = {n.split(".")[-1] for n in names} | set(names)
            raise TargetError(f"Exclusion {pattern!r} matches nothing that is targeted.", nearest(pattern, leaves))


def own_sites(model: nn.Module, patterns: Sequence[str]) -> list[tuple[Site, str]]:
    """Sites of everything under the layers (or of the parameters) that ``patterns`` name, for own copies."""
    found: dict[str, tuple[Site, str]] = {}
    for pattern in patterns:
        count = len(found)
        named = [(n, m) for n, m in model.named_modules() if n and matches(pattern, n, m) and ".adapters" not in n]
        for name, top in named:
            for sub, layer in top.named_modules():
                path = f"{name}.{sub}" if sub else name
                if ".adapters" in path:
                    continue
                for param, value in layer.named_parameters(recurse=False):
                    if value.is_floating_point():
                        site = _own_site(model, path, layer, param)
                        found.setdefault(site.name, (site, pattern))
        for name, layer in model.named_modules():
            for param in dict(layer.named_parameters(recurse=False)):
                path = f"{name}.{param}" if name else param
                if matches(pattern, path, layer) and pattern not in ROLE_WORDS and ".adapters" not in path:
                    site = _own_site(model, name, layer, param)
                    found.setdefault(site.name, (site, pattern))
        if len(found) == count:
            every = [n for n, _ in model.named_modules() if n] + [n for n, _ in model.named_parameters()]
            raise TargetError(f"unfreeze pattern {pattern!r} matches nothing new.",
                              nearest(pattern, {n.split(".")[-1] for n in every} | set(every)))  # fmt: skip
    return list(found.values())


def _own_site(model: nn.Module, name: str, layer: nn.Module, param: str) -> Site:
    host = reader_of(layer, model.get_submodule(name.rpartition(".")[0])) if name else None
    called = called_site(name, layer) if param == "weight" and host is None else None
    if called is not None:
        return called
    made = read_site(name, layer, param)
    made.host = host
    return made


def override_for(targets: Targets, site: Site) -> tuple[str, Mapping[str, Any]] | None:
    path = site.name.partition("[")[0]
    for pattern, changes in targets.overrides.items():
        if matches(split_block(pattern)[0], path, site.layer):
            return pattern, changes
    return None


def check_overrides(targets: Targets, sites: Sequence[Site]) -> None:
    """Every override is the first match of at least one site."""
    for pattern in targets.overrides:
        first = [override_for(targets, s) for s in sites]
        if any(hit and hit[0] == pattern for hit in first):
            continue
        hidden = [hit[0] for s, hit in zip(sites, first)
                  if hit and matches(split_block(pattern)[0], s.name.partition("[")[0], s.layer)]  # fmt: skip
        if hidden:
            raise TargetError(f"Override {pattern!r} is wholly shadowed by {hidden[0]!r}.", "Put it first.")
        raise TargetError(f"Override {pattern!r} matches no targeted layer.", nearest(pattern, [s.name for s in sites]))
