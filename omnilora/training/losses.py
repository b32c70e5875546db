"""What each task minimizes, as sums with their weights, so that accumulation and processes change nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnilora.core.rule import Rule
from omnilora.errors import BadValue, RunError
from omnilora.training.batches import Feed, to_device
from omnilora.training.encode import MASKED
from omnilora.training.frugal import Frugal, unwrapped

Batch = Mapping[str, Tensor]
TEXTS = 32  # that are embedded at a time when pairs are judged

Scores = dict[str, tuple[Tensor, Tensor]]


class Task:
    """``weight`` of a batch is known before its forward; ``total`` is the loss summed over that weight.

    ``by_row``: whether that sum is one over rows, so that a batch can be taken apart.
    """

    by_row = True

    def weight(self, batch: Any) -> float:
        """How much the batch counts: learned tokens, rows or pairs."""
        raise NotImplementedError

    def total(self, model: nn.Module, batch: Any, figures: Figures | None = None) -> tuple[Tensor, Any]:
        """(summed loss, the model's outputs). ``figures`` collects what metrics need."""
        raise NotImplementedError

    def scores(self, model: nn.Module, batch: Any) -> Scores:
        """metric → (sum, weight) of every row: the metric over some rows is Σ sums / Σ weights."""
        total, _ = self.total(model, batch)
        return {"loss": (total.reshape(1), total.new_tensor([self.weight(batch)]))}

    @contextmanager
    def prepared(self, model: nn.Module, rules: Sequence[Rule] = ()) -> Iterator[None]:
        """Around many calls of :meth:`total` with one model; ``rules``: of the run that asks."""
        yield

    @property
    def joins(self) -> bool:
        """Inside :meth:`prepared`: whether such a model's rows are joined, so that their lengths need not be alike. The same
        for all methods, which a comparison shows the same batches."""
        return False

    def declined(self) -> dict[str, str]:
        """Inside :meth:`prepared`: what could have been spared and was not → why."""
        return {}


class Figures:
    """Sums of an evaluation. ``metrics`` gives loss and, by task, perplexity, accuracy and macro-F1."""

    def __init__(self) -> None:
        self.loss = self.weight = 0.0
        self.seen: list[tuple[int, int]] = []  # (predicted, true) class of every row
        self.hits = 0

    def metrics(self, task: Task) -> dict[str, float]:
        mean = self.loss / max(self.weight, 1e-12)
        out = {"loss": mean}
        if isinstance(task, CausalLM):
            out["perplexity"] = math.exp(min(mean, 700.0))
        if isinstance(task, Classification):
            right = sum(p == t for p, t in self.seen)
            out |= {"accuracy": right / max(len(self.seen), 1), "macro_f1": macro_f1(self.seen)}
        if isinstance(task, Embedding):
            out["accuracy"] = self.hits / max(self.weight, 1e-12)
        return out


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """The mean F1 over classes that occur among predictions or truths."""
    scores = []
    for c in sorted({c for pair in pairs for c in pair}):
        hit = sum(p == c and t == c for p, t in pairs)
        scores.append(2 * hit / max(sum(p == c for p, _ in pairs) + sum(t == c for _, t in pairs), 1))
    return sum(scores) / max(len(scores), 1)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(unwrapped(model).forward).parameters


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the forward gets. Packed rows: position ids that restart and no mask; the model derives the blocks."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
        if "blocks" in batch:
            inputs["attention_mask"] = batch["blocks"]
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    if _accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


class CausalLM(Task):
    """Cross-entropy over learned tokens. Logits are computed only at positions that some row learns from; inside
    :meth:`prepared` not at all, and rows are joined without ``padding``, where that changes nothing (:class:`Frugal`)."""

    def __init__(self, padding: bool = False) -> None:
        self.padding = padding
        self.frugal: Frugal | None = None

    @contextmanager
    def prepared(self, model: nn.Module, rules: Sequence[Rule] = ()) -> Iterator[None]:
        if self.frugal is not None:
            yield
            return
        try:
            with Frugal(unwrapped(model), rules, self._usual, self.padding) as self.frugal:
                yield
        finally:
            self.frugal = None

    @property
    def joins(self) -> bool:
        return self.frugal is not None and self.frugal.known

    def declined(self) -> dict[str, str]:
        return {} if self.frugal is None else {k: v for k, v in self.frugal.report.items() if v}

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float((batch["labels"][:, 1:] != MASKED).sum())

    def total(self, model: nn.Module, batch: Batch, figures: Figures | None = None) -> tuple[Tensor, Any]:
        made = None if self.frugal is None else self.frugal.total(model, batch)
        return self._usual(model, batch) if made is None else made

    def _usual(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        inputs = model_inputs(model, batch)
        target = batch["labels"][:, 1:]
        where = (target != MASKED).any(0).nonzero().flatten()
        few = _accepts(model, "logits_to_keep")
        if few:
            inputs["logits_to_keep"] = where
        outputs = model(**inputs)
        logits = outputs.logits if few else outputs.logits[:, where]
        flat, truth = logits.float().flatten(0, 1), target[:, where].flatten()
        return F.cross_entropy(flat, truth, ignore_index=MASKED, reduction="sum"), outputs

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        logits, target = model(**model_inputs(model, batch)).logits[:, :-1].float(), batch["labels"][:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=MASKED, reduction="none")
        return {"loss": (each.view(target.shape).sum(1), (target != MASKED).sum(1).float())}


class Classification(Task):
    """Cross-entropy over classes."""

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(batch["labels"].numel())

    def total(self, model: nn.Module, batch: Batch, figures: Figures | None = None) -> tuple[Tensor, Any]:
        outputs = model(**model_inputs(model, batch))
        logits = outputs.logits.float()
        if figures is not None:
            figures.seen += list(zip(logits.argmax(-1).tolist(), batch["labels"].tolist(), strict=True))
        return F.cross_entropy(logits, batch["labels"], reduction="sum"), outputs

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        logits, truth = model(**model_inputs(model, batch)).logits.float(), batch["labels"]
        one = torch.ones(len(truth))
        return {"accuracy": ((logits.argmax(-1) == truth).float(), one),
                "loss": (F.cross_entropy(logits, truth, reduction="none"), one)}  # fmt: skip


class Embedding(Task):
    """Pairs: the other rows' positives are the negatives; with scores, squared error of the cosine."""

    by_row = False

    def __init__(self, temperature: float = 0.05) -> None:
        self.temperature = temperature

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(batch["input_ids"].shape[0] // 2)

    def total(self, model: nn.Module, batch: Batch, figures: Figures | None = None) -> tuple[Tensor, Any]:
        near, truth, outputs = self._nearness(model, batch)
        if figures is not None:
            figures.hits += int((near.argmax(-1) == truth).sum())
        logits = near / self.temperature
        if isinstance(outputs, MutableMapping):
            outputs["logits"] = logits  # of each row over the pairs: what added losses compare
        if "score" in batch:
            return F.mse_loss(near.diagonal(), batch["score"], reduction="sum"), outputs
        return F.cross_entropy(logits, truth, reduction="sum"), outputs

    def _embedded(self, model: nn.Module, batch: Batch) -> Tensor:
        """The embedding of every text (texts, dim), TEXTS of like length at a time: little padding, little memory."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(1)
        made: list[Tensor] = []
        order = lengths.argsort(stable=True)
        for some in order.split(TEXTS):
            n = int(mask[some].any(0).nonzero().max()) + 1  # what lies behind is padding in every row
            inputs = {"input_ids": ids[some, :n], "attention_mask": mask[some, :n]}
            made.append(mean_pooled(model(**model_inputs(model, inputs)).last_hidden_state, inputs["attention_mask"]))
        return torch.cat(made)[order.argsort()]

    def _nearness(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """(cosines (pairs, pairs), the index of each row's own, outputs)."""
        outputs = model(**model_inputs(model, batch))
        a, b = mean_pooled(outputs.last_hidden_state, batch["attention_mask"]).chunk(2)
        return a @ b.mT, torch.arange(a.shape[0], device=a.device), outputs

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        a, b = self._embedded(model, batch).chunk(2)
        near, truth = a @ b.mT, torch.arange(a.shape[0], device=a.device)
        one = torch.ones(len(truth))
        if "score" in batch:
            return {"loss": ((near.diagonal() - batch["score"]).square(), one)}
        return {"accuracy": ((near.argmax(-1) == truth).float(), one),
                "loss": (F.cross_entropy(near / self.temperature, truth, reduction="none"), one)}  # fmt: skip


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings of length 1: (rows, dim) from (rows, length, dim) and a 0/1 mask."""
    weights = mask.unsqueeze(-1).float()
    return F.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


class Custom(Task):
    """``loss(model, batch)`` of your own: a mean, or (mean, outputs). Every batch counts alike."""

    def __init__(self, loss: Callable[[nn.Module, Any], Any]) -> None:
        self.loss = loss

    def weight(self, batch: Any) -> float:
        return 1.0

    def total(self, model: nn.Module, batch: Any, figures: Figures | None = None) -> tuple[Tensor, Any]:
        made = self.loss(model, batch)
        value, outputs = made if isinstance(made, tuple) else (made, None)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise RunError(f"loss(model, batch) gave {type(value).__name__}.", "Return one number as a tensor.")
        return value.reshape(()), outputs


class OwnLoss(Custom):
    """A model that returns its loss, as those of transformers do when labels are in the batch."""

    def __init__(self) -> None:
        super().__init__(self._own)

    @staticmethod
    def _own(model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, (Mapping, Tensor)):
            raise BadValue(f"Without a tokenizer and without loss= a batch must be what the model takes; it is a "
                           f"{type(batch).__name__}.", "Pass loss= a function of (model, batch).")  # fmt: skip
        outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
        value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if value is None:
            raise BadValue(f"{type(model).__name__} returned no loss.", "Pass loss= a function of (model, batch).")
        return value, outputs


def task_of(task: str, temperature: float = 0.05, padding: bool = False) -> Task:
    """The task of a configuration's name."""
    if task == "embedding":
        return Embedding(temperature)
    return CausalLM(padding) if task == "causal-lm" else Classification()


def block_mask(position_ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A causal mask in blocks for packed rows: (batch, 1, length, length), True (or 0) where a token may look."""
    piece = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    n = position_ids.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=position_ids.device).tril()
    allowed = (piece[:, :, None] == piece[:, None, :]) & causal
    if dtype is None:
        return allowed[:, None]
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def packing_mode(model: nn.Module, vocabulary: int) -> str:
    """How this model keeps packed rows apart: "positions" alone, or a "blocks" mask. Measured, not assumed.

    Raises:
        BadValue: with neither do the logits of a packed row equal those of its pieces.
    """
    from omnilora.core.attach import disabled, find_hub

    if find_hub(model) is not None:
        with disabled(model):
            return _packing_mode(model, vocabulary)
    return _packing_mode(model, vocabulary)


def _packing_mode(model: nn.Module, vocabulary: int) -> str:
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.randint(0, vocabulary, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device)
    extra = {"use_cache": False} if _accepts(model, "use_cache") else {}
    try:
        apart = torch.cat([model(input_ids=i, **extra).logits for i in (ids[:, :4], ids[:, 4:])], 1).float()
        tried = []
        for mode in ("positions", "blocks"):
            mask = {} if mode == "positions" else {"attention_mask": block_mask(positions, model.dtype)}
            packed = model(input_ids=ids, position_ids=positions, **mask, **extra).logits.float()
            gap = float((packed - apart).norm() / apart.norm())
            tried.append(gap)
            if gap < (1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2):
                return mode
    finally:
        model.train(training)
    raise BadValue(f"{type(model).__name__} mixes packed rows (relative change of logits {min(tried):.3g}).",
                   "Use packing = False, or attn_implementation='sdpa'.")  # fmt: skip


@torch.no_grad()
def evaluate_feed(model: nn.Module, feed: Feed, task: Task) -> dict[str, float]:
    """Metrics of ``model`` in eval mode over all batches of ``feed``. Every process evaluates all rows."""
    device, figures = next(model.parameters()).device, Figures()
    learning = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with task.prepared(model):
            for batch in feed.epoch(0):
                moved = to_device(batch, device)
                total, _ = task.total(model, moved, figures)
                figures.loss += float(total)
                figures.weight += task.weight(moved)
    finally:
        for module in learning:
            module.training = True
    return figures.metrics(task)


@torch.no_grad()
def row_scores(model: nn.Module, feed: Feed, task: Task) -> dict[str, dict[str, list[float]]]:
    """metric → {"sum": […], "weight": […]}, a number for every row in the order of ``feed``; in eval mode."""
    device, found = next(model.parameters()).device, dict[str, dict[str, list[float]]]()
    learning = [m for m in model.modules() if m.training]
    model.eval()
    try:
        for batch in feed.epoch(0):
            for metric, (total, weight) in task.scores(model, to_device(batch, device)).items():
                kept = found.setdefault(metric, {"sum": [], "weight": []})
                kept["sum"] += total.tolist()
                kept["weight"] += weight.tolist()
    finally:
        for module in learning:
            module.training = True
    return found


def quiet_norms(model: nn.Module) -> None:
    """Running statistics belong to the base, which never changes."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            layer.eval()
