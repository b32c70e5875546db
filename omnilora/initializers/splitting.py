"""Put split weights on a model: every linear site holds Q, and the pair (B, A) waits for the site's slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import find_hub
from omnilora.core.fingerprint import fingerprint
from omnilora.core.parameterization import Slot
from omnilora.core.site import Site
from omnilora.errors import AttachError, NotExpressible
from omnilora.initializers.split import Split
from omnilora.stores.codecs import Codec
from omnilora.stores.coded import CodedLinear, put


@dataclass(frozen=True, eq=False)
class Pair:
    """B (out, r), A (r, in) of a split and its errors by iteration."""

    B: Tensor
    A: Tensor
    errors: tuple[float, ...]


def split_layers(model: nn.Module, sites: Sequence[Site], codec_of: Callable[[Site], Codec],
                 work: Callable[[Site, Codec], Split]) -> dict[str, Pair]:  # fmt: skip
    """Split every low-rank linear site and hold its Q; all are computed before the first layer changes.

    Sites without a rank (own copies) stay dense. On the meta device only shapes are held.

    Raises: :class:`AttachError` where a layer is quantized, adapted or tied already, :class:`NotExpressible` for other
    kinds of layers.
    """
    chosen = [s for s in sites if s.how is not None and s.how.rank() > 0]
    if find_hub(model) is not None:
        raise AttachError("The model has adapters: splitting would change the weights under them.", "Split first.")
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for site in chosen:
        if isinstance(site.layer, CodedLinear) or not site.called or site.kind != "linear" or site.region is not None:
            raise NotExpressible(f"{site.name} ({site.kind}) cannot be split into codes and a pair.",
                                 "Target whole, dense linear layers.")  # fmt: skip
        if type(site.layer) is not nn.Linear or id(site.layer.weight) in embedded:
            raise AttachError(f"{site.name}: its {type(site.layer).__name__} is quantized, tied or no plain linear layer.",
                              "Load the base dense; the method quantizes it.")  # fmt: skip
    made: list[tuple[Site, Codec, dict[str, Tensor], Any, Pair | None]] = []
    for site in chosen:
        codec = codec_of(site)
        if site.layer.weight.is_meta:
            made.append((site, codec, codec.encode(site.layer.weight), None, None))  # type: ignore[arg-type]
            continue
        with torch.no_grad():
            done = work(site, codec)
        pair = Pair(done.B, done.A, done.errors)
        made.append((site, codec, done.held, fingerprint(site), pair))
    for site, codec, held, origin, _ in made:
        put(site.layer, codec, held, carried=True, origin=origin)
    return {site.name: pair for site, _, _, _, pair in made if pair is not None}


def fill_pair(slot: Slot, seen: Any) -> None:
    """The slot's factors from the split; a site that was not split keeps its own start."""
    if isinstance(seen, Pair):
        slot.A.copy_(seen.A)
        slot.B.copy_(seen.B)
