"""A language model's loss at less cost, where that is exact: rows joined without padding, and no logits.

Nothing is assumed of a model: before the first batch, loss and gradients of a few tokens are compared with those that the
model's own padded batches and logits give, and what differs is not used. :attr:`Frugal.report` says what is used and why not.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import find_hub, slots
from omnilora.core.layer import Adapted
from omnilora.core.rule import Rule
from omnilora.errors import RunError
from omnilora.plans.cross_entropy import cross_entropy
from omnilora.training.encode import MASKED
from omnilora.training.joined import join, joined_attention, joined_call, known, refusal

LENGTHS = (12, 9, 6)  # tokens of the rows that are compared
PROBED = 2_000_000  # numbers of gradients that are compared
OWN_HOOKS = ("omnilora.core.attach", "omnilora.core.observe", "transformers.")  # they look at tokens, not at rows
DIFFERS = "loss or gradients would change by more than rounding"


@dataclass(frozen=True)
class Head:
    """The head of a causal language model and what the model does to its logits."""

    decoder: nn.Module
    layer: nn.Linear
    softcap: float | None = None
    scale: float = 1.0

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of hidden states (..., d) against the labels (...) that they predict."""
        return cross_entropy(hidden, self.layer.weight, labels, self.layer.bias, reduction="sum", softcap=self.softcap,
                             scale=self.scale)  # fmt: skip

    @contextmanager
    def caught(self) -> Iterator[list[Tensor]]:
        """The decoder's last hidden states of forwards inside, in this thread."""
        seen: list[Tensor] = []
        thread = threading.get_ident()

        def catch(layer: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        handle = self.decoder.register_forward_hook(catch)
        try:
            yield seen
        finally:
            handle.remove()


def head_of(model: Any) -> Head | str:
    """The head of a model of transformers, or why its logits cannot be done without."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "get_decoder")):
        return f"{type(model).__name__} is no language model of transformers"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} cannot leave logits out"
    layer, decoder = model.get_output_embeddings(), model.get_decoder()
    if isinstance(layer, Adapted):
        return "the head is adapted"
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return f"the head is a {type(layer).__name__}, no plain linear layer"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "the head has hooks"
    if not layer.weight.is_floating_point() or layer.weight.is_meta:
        return f"the head's weight is {layer.weight.dtype}"
    if decoder is None or decoder is model or getattr(model, "_compiled_call_impl", None) is not None:
        return "the decoder cannot be watched"
    config = model.config
    scale = getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return Head(decoder, layer, getattr(config, "final_logit_softcapping", None), float(scale) / float(scaling))


def unwrapped(model: nn.Module) -> Any:
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


class Frugal:
    """The cheaper loss of one model. Enter it, then ask for :meth:`total`; leaving puts the model's attention back.

    Args:
        model: a causal language model, adapted or not, not wrapped.
        rules: of the run; one that reads outputs needs logits.
        plain: (model, batch) → (summed loss, outputs), what the cheaper loss must equal.
        padding: keep the rows padded.
    """

    def __init__(self, model: Any, rules: Sequence[Rule], plain: Any, padding: bool = False) -> None:
        self.model, self.plain = model, plain
        head = head_of(model)
        if any(r.reads_outputs for r in rules):
            head = "a rule reads the logits"
        why = "padding = True" if padding else _rows_matter(model) or refusal(model)
        self.head = None if isinstance(head, str) else head
        self.joined = not why
        self.known = not padding and known(model)
        self.report = {"logits": head if isinstance(head, str) else "", "padding": why}
        self._checked = False
        self._stack = ExitStack()

    def __enter__(self) -> Frugal:
        if self.joined:
            self._stack.enter_context(joined_attention(self.model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def total(self, wrapped: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any] | None:
        """(summed loss, the model's outputs, without logits where none were made); None: take the usual way.

        ``wrapped``: the model, or what it is wrapped in for several processes.
        """
        if not self._checked and not torch.compiler.is_compiling():
            self._check(batch)
        if not (self.joined or self.head is not None):
            return None
        return self._total(wrapped, batch, self.joined, self.head)

    def _total(self, wrapped: nn.Module, batch: Mapping[str, Tensor], joined: bool,
               head: Head | None) -> tuple[Tensor, Any] | None:  # fmt: skip
        from omnilora.training.losses import model_inputs

        made = join(batch) if joined and not self._rowed() else None
        if made is not None:
            inputs, labels = made
            inputs["use_cache"] = False
        elif head is None:
            return None
        else:
            inputs, labels = model_inputs(self.model, batch), batch["labels"]
            labels = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), MASKED)), 1)
        with ExitStack() as stack:
            if made is not None:
                stack.enter_context(joined_call())
            if head is None:
                where = (labels[0] != MASKED).nonzero().flatten()
                outputs = wrapped(**inputs, logits_to_keep=where)
                return nn.functional.cross_entropy(outputs.logits[0].float(), labels[0, where], reduction="sum"), outputs
            seen = stack.enter_context(head.caught())
            outputs = wrapped(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long, device=labels.device))
        if len(seen) != 1:
            raise RunError(f"The decoder ran {len(seen)} times in a forward of {type(self.model).__name__}.",
                           "Give fit a loss of your own.")  # fmt: skip
        outputs.logits = None  # a reader fails instead of finding nothing
        return head.loss(seen[0], labels), outputs

    def _rowed(self) -> bool:
        """Whether the caller has given adapters by row, which joined rows would lose."""
        hub = find_hub(self.model)
        return hub is not None and hub.current().rows is not None

    # -- is it the same? ---------------------------------------------------------------------------------------------

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        self._checked = True
        if not (self.joined or self.head is not None):
            return
        probe = _probe(batch)
        reference = self._measured(probe, False, None)
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters())
        for joined, head in dict.fromkeys([(self.joined, self.head), (False, self.head), (self.joined, None)]):
            if (joined or head is not None) and _same(reference, self._measured(probe, joined, head), low):
                break
        else:
            joined, head = False, None
        if self.joined and not joined:
            self.report["padding"] = DIFFERS
            self._stack.close()
        if self.head is not None and head is None:
            self.report["logits"] = DIFFERS
        self.joined, self.head = joined, head

    def _measured(self, probe: Mapping[str, Tensor], joined: bool, head: Head | None) -> list[Tensor]:
        """Loss and some gradients of the probe, in eval mode; draws of the run's generators are put back."""
        model = self.model
        learning = [m for m in model.modules() if m.training]
        device = probe["input_ids"].device
        params = _some([p for p in model.parameters() if p.requires_grad])
        model.eval()
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device]), torch.enable_grad():
                made = self._total(model, probe, joined, head) or self.plain(model, probe)
                loss = made[0]
                grads = torch.autograd.grad(loss, params, allow_unused=True) if params and loss.requires_grad else ()
        finally:
            for module in learning:
                module.training = True
        return [loss.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(params, grads))]


def _rows_matter(model: nn.Module) -> str:
    """Why a model's rows must stay rows: what looks at the batch's dimension. "" where nothing is known to."""
    if any(s.site.kind == "source" for s in slots(model)):
        return "the method makes context from rows"
    for name, layer in model.named_modules():
        if layer is model or not (layer._forward_hooks or layer._forward_pre_hooks):
            continue
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        if any(not str(getattr(h, "__module__", "")).startswith(OWN_HOOKS) for h in hooks):
            return f"{name} has hooks"
    return ""


def _probe(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch of three short rows, made of the batch's tokens."""
    ids = batch["input_ids"].flatten()
    ids = ids.repeat(-(-sum(LENGTHS) // max(len(ids), 1)))[: sum(LENGTHS)].split(LENGTHS)
    pad = nn.utils.rnn.pad_sequence
    rows, ones = pad(list(ids), batch_first=True), pad([torch.ones_like(i) for i in ids], batch_first=True)
    return {"input_ids": rows, "attention_mask": ones, "labels": rows.masked_fill(ones == 0, MASKED)}


def _some(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters spread over the model, of not too many numbers together."""
    found, count = [], 0
    for p in params[:: max(1, len(params) // 48)]:
        if count + p.numel() <= PROBED:
            found.append(p)
            count += p.numel()
    return found


def _same(a: list[Tensor], b: list[Tensor], low: bool) -> bool:
    """Whether two losses with their gradients differ by rounding only; ``low``: that of 16-bit numbers."""
    if len(a) != len(b):
        return False
    (loss, *left), (other, *right) = a, b
    if not float((loss - other).abs()) <= (3e-2 if low else 1e-4) * float(loss.abs()):
        return False
    if not left:
        return True
    x, y = (torch.cat([t.flatten().float() for t in ts]) for ts in (left, right))
    return float((x - y).norm()) <= (0.2 if low else 2e-3) * float(x.norm())
