"""What ``omnilora apply --method laplace_lora`` fits, reports and writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import slots
from omnilora.core.parameterization import Slot
from omnilora.core.state import state
from omnilora.errors import BadValue
from omnilora.posthoc.calibration import diagram, reliability, scores
from omnilora.posthoc.laplace import Logits, Posterior, chosen, fit, predict, predictions, probabilities
from omnilora.posthoc.posterior_file import save_posterior
from omnilora.training.encode import MASKED
from omnilora.training.losses import model_inputs
from omnilora.training.report import shown


def posterior_of(job: Any, kfac_rank: int | None, prior: float | str, predictive: Sequence[str], samples: int, layers: str | None,
                 answers: Sequence[str] | None, bins: int) -> Mapping[str, Any]:  # fmt: skip
    """Fit the posterior on the job's rows, save it, and compare MAP and posterior on the held-out rows."""
    if job.adapter is None:
        raise BadValue("There is no adapter.", "Pass --adapter, the folder of a finished run.")
    logits, labels = _reading(job, answers)
    pattern = re.compile(layers or "")
    train = job.batches()
    model, mine = job.model, slots(job.model)
    theta = chosen(mine, lambda name: bool(pattern.search(name)))
    found = fit(model, mine, shown(train, "curvature"), logits, labels, kfac_rank, theta.__contains__)
    held = None if job.rows[1] is None else job.batches(held=True)
    if isinstance(prior, str):
        posterior = found.best()
    else:
        posterior = found.at(prior)
    if prior == "validation":
        if held is None or len(held) < 4:
            raise BadValue("prior = 'validation' without held-out data.", "Give --eval-data of four batches at least.")
        apart, held = held[: len(held) // 4], held[len(held) // 4 :]
        posterior = validated(posterior, model, mine, shown(apart, "validation"), logits, labels)
    content = state(model).content()
    report: dict[str, Any] = {
        "rows": posterior.rows, "matrices": len(posterior.blocks), "parameters": posterior.size,
        "prior_precision": posterior.lam, "log_evidence": posterior.evidence(posterior.lam),
        "posterior": str(save_posterior(posterior, job.home / "posterior", content))}  # fmt: skip
    if held is None:
        return report
    f, S = predict(model, mine, posterior, shown(held, "predictions"), logits)
    y = torch.cat([labels(b) for b in held])
    ways = {"map": torch.softmax(f, -1)}
    ways |= {way: probabilities(f, S, way, samples, job.config.seed) for way in predictive}
    for name, p in ways.items():
        report |= {f"{name}_{k}": v for k, v in scores(p, y, bins).items()}
    report["mean_variance"] = float(S.diagonal(dim1=-2, dim2=-1).mean())
    curves = {n: reliability(p, y, bins) for n, p in ways.items()}
    return {**report, "diagram": diagram(curves, Path(job.home) / "reliability.png")}


def validated(posterior: Posterior, model: nn.Module, mine: Sequence[Slot], batches: Iterable[Any], logits: Logits,
              labels: Callable[[Any], Tensor]) -> Posterior:  # fmt: skip
    """The posterior at that of eight λ, the given one times 1 to 1000, whose joint NLL on ``batches`` is least."""
    options = [posterior.at(posterior.lam * 10 ** (3 * i / 7)) for i in range(8)]
    nll = [0.0] * len(options)
    for batch in batches:
        f, spreads = predictions(model, mine, options, [batch], logits)
        for i, S in enumerate(spreads):
            nll[i] += scores(probabilities(f, S, samples=5_000), labels(batch))["nll"] * len(f)
    return options[min(range(len(options)), key=nll.__getitem__)]


def _reading(job: Any, answers: Sequence[str] | None) -> tuple[Logits, Callable[[Any], Tensor]]:
    """(logits, labels) of a batch: classes, or the answers' tokens at the first learned position."""
    if job.config.task == "classification":

        def classes(model: nn.Module, batch: Any) -> Tensor:
            return model(**model_inputs(model, batch)).logits

        return classes, lambda batch: batch["labels"]
    if job.config.task != "causal-lm" or not answers or len(answers) < 2:
        raise BadValue(f"task = {job.config.task!r}, hyper.answers = {answers!r}.",
                       "Use --task classification, or name a language model's answers: --set 'hyper.answers=[A, B, C, D]'.")  # fmt: skip
    tokens = answer_tokens(job.batches(), job.parts.tokenizer, answers)
    ids = torch.tensor(tokens, device=job.device)

    def restricted(model: nn.Module, batch: Any) -> Tensor:
        first = (batch["labels"] != MASKED).int().argmax(-1)
        out = model(**model_inputs(model, batch)).logits
        return out[torch.arange(len(first), device=out.device), first - 1][:, ids]

    def which(batch: Any) -> Tensor:
        first = (batch["labels"] != MASKED).int().argmax(-1, keepdim=True)
        hit = batch["labels"].gather(1, first) == ids
        if not bool(hit.any(-1).all()):
            raise BadValue("A row's answer is none of hyper.answers.", f"They are {list(answers)}.")
        return hit.int().argmax(-1)

    return restricted, which


def answer_tokens(batches: Sequence[Any], tokenizer: Any, answers: Sequence[str]) -> list[int]:
    """The first token of each answer as the rows write it. Raises :class:`BadValue` for one that no row has."""
    found: dict[str, int] = {}
    for batch in batches:
        for row in batch["labels"]:
            token = int(row[row != MASKED][0])
            text = tokenizer.decode([token]).strip()
            fits = [a for a in answers if text and a.startswith(text)]
            if len(fits) != 1:
                raise BadValue(f"A row's answer begins with {text!r}.", f"Expected exactly one of {list(answers)}.")
            found[fits[0]] = token
    missing = [a for a in answers if a not in found]
    if missing:
        raise BadValue(f"No row answers {missing}.", "Name the answers that occur in the training data.")
    return [found[a] for a in answers]
