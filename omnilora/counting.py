"""Counting without building: numbers, bytes and products of a base and of the tensors that an adapter would have."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from omnilora.core.parameterization import Leaf, is_still
from omnilora.core.site import Site, called_site, inner_reads
from omnilora.core.store import store_of

# numbers an optimizer keeps for each trainable one
OPTIMIZERS = {"adamw": 2, "paged_adamw": 2, "adam": 2, "adamax": 2, "nadam": 2, "radam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1,
              "momentum": 1, "sgd": 0}  # fmt: skip
HOW_ACTIVATIONS = (
    "batch_size · length tokens times what the adapter's own backward pass keeps at each site: the layer's input where "
    "A or an own copy learns, the rank where anything behind it learns, the output where a magnitude learns; in the "
    "layer's dtype, layers that read the same tensor counted apart. What the base keeps besides (norms, attention, "
    "nonlinearities, logits) is not counted."
)
HOW_FLOPS = "(base + adapter) / base for one token of a forward, from the sizes of the matrix products."


def shapes(model: nn.Module) -> Iterator[torch.Size]:
    """The shape of every base tensor, tied ones once, quantized ones as the layer sees them."""
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if ".adapters" in f".{path}":
            continue
        for name, p in layer._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield torch.Size(store_of(layer, name).shape())


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without its numbers: plain parameters and buffers on the meta device, tied ones tied."""
    memo: dict[int, Any] = {}
    for t in itertools.chain(model.parameters(), model.buffers()):
        plain = type(t.data) in (torch.Tensor, nn.Parameter)
        empty = torch.empty_like(t, device="meta") if plain else t
        memo[id(t)] = nn.Parameter(empty, t.requires_grad) if plain and isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def weights(model: nn.Module) -> dict[str, int]:
    """Bytes of the base by dtype, or by what its store calls them; buffers included."""
    out: dict[str, int] = {}
    seen: set[int] = set()
    for path, layer in model.named_modules():
        if ".adapters" in f".{path}":
            continue
        for name, p in layer._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            store = store_of(layer, name)
            for t in store.tensors().values():
                key = store.form or str(t.dtype).removeprefix("torch.")
                out[key] = out.get(key, 0) + t.numel() * t.element_size()
        for b in layer._buffers.values():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                key = str(b.dtype).removeprefix("torch.")
                out[key] = out.get(key, 0) + b.numel() * b.element_size()
    return out


def saved(site: Site, leaves: Mapping[str, Leaf], stuck: frozenset[str], rank: int, tokens: int) -> int:
    """Bytes of what the site's backward pass keeps (an estimate, see HOW_ACTIVATIONS)."""
    learning = {leaf.role for name, leaf in leaves.items() if not is_still(name, stuck)}
    numbers = 0
    if learning & {"input", "router", "own"} and site.kind != "embedding":
        numbers += site.fan_in
    if learning & {"output", "core", "gate"}:
        numbers += rank
    if "magnitude" in learning:
        numbers += site.fan_out
    per_number = site.store.dtype.itemsize if site.param else 4
    whole = site.fan_out * site.fan_in if learning and site.kind == "tensor" and site.fan_in > 1 else 0
    return (numbers * tokens + whole) * per_number


def base_macs(model: nn.Module) -> int:
    """Products of one token (one position of a convolution) with every matrix but embeddings."""
    count = 0
    read = {id(owner) for m in model.modules() for _, owner, _ in inner_reads(m) if owner is not m}
    for path, layer in model.named_modules():
        if ".adapters" in f".{path}" or isinstance(layer, nn.Embedding):
            continue
        if id(layer) in read:
            continue
        site = called_site(path, layer)
        if site is not None:
            count += site.fan_out * site.fan_in
            continue
        reads = {(id(owner), name) for _, owner, name in inner_reads(layer)}
        owned = {(id(layer), name) for name, p in layer._parameters.items() if p is not None and p.dim() >= 3}
        for owner, name in reads | owned:
            holder = next(m for m in layer.modules() if id(m) == owner)
            count += torch.Size(store_of(holder, name).shape()).numel()
    return count


def added_macs(site: Site, leaves: Mapping[str, Leaf], replaces: bool) -> int:
    """Products that the adapter adds for one token. ``replaces``: an own copy takes the base's place."""
    stack = torch.Size(site.batch).numel()
    count = 0
    for leaf in leaves.values():
        shape = leaf.value.shape
        if leaf.role == "input":
            count += 0 if site.kind == "embedding" else stack * shape[-2] * site.fan_in
        elif leaf.role == "output":
            count += stack * site.fan_out * shape[-1]
        elif leaf.role == "magnitude":
            count += site.fan_out
        elif not (leaf.role == "own" and replaces):
            count += leaf.value.numel()
    return count
