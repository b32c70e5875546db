"""Few-shot text classification: N-way K-shot episodes, a head from prototypes, what ``omnilora apply --method amal`` does.

    c_k = mean of the support's features of class k,   logits = W f + b  with  W_k = 2 c_k/τ, b_k = −‖c_k‖²/τ at the start
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnilora.core.attach import adapt, disabled
from omnilora.core.files import save
from omnilora.core.method import Method
from omnilora.core.parameterization import Parameterization
from omnilora.core.run import trainable
from omnilora.errors import BadValue
from omnilora.procedures.meta import Learner, Values, by_roles, check_episodes, meta_train
from omnilora.training.batches import Collate, to_device
from omnilora.training.data import label_set
from omnilora.training.encode import Example, encode, room
from omnilora.training.losses import mean_pooled, model_inputs
from omnilora.training.report import shown

HEAD = ("head.W", "head.b")
Task = tuple[Any, Any]


class Encoder:
    """Features, head and loss of an encoder; ``tau``: the temperature of prototypes."""

    def __init__(self, model: nn.Module, ways: int, tau: float = 0.1) -> None:
        self.model, self.ways, self.tau = model, ways, tau

    def features(self, values: Mapping[str, Tensor], batch: Any) -> Tensor:
        """(n, d), of length 1."""
        out = functional_call(self.model, dict(values), (), model_inputs(self.model, batch))
        return mean_pooled(out.last_hidden_state, batch["attention_mask"])

    def start(self, support: Any) -> Values:
        """The head from the class means of the support."""
        f = self.features({}, support)
        hot = torch.nn.functional.one_hot(support["labels"], self.ways).to(f.dtype)
        c = hot.mT @ f / hot.sum(0).unsqueeze(-1)
        return {"head.W": 2 * c / self.tau, "head.b": -c.square().sum(-1) / self.tau}

    def logits(self, values: Values, batch: Any) -> Tensor:
        body = {k: v for k, v in values.items() if k not in HEAD}
        return self.features(body, batch) @ values["head.W"].mT + values["head.b"]

    def loss(self, values: Values, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(self.logits(values, batch), batch["labels"])

    @torch.no_grad()
    def accuracy(self, values: Values, batch: Any) -> float:
        return float((self.logits(values, batch).argmax(-1) == batch["labels"]).float().mean())


class Episodes:
    """Tasks of ``ways`` classes with ``shots`` support and ``queries`` query texts each."""

    def __init__(self, examples: Sequence[Example], pad: int, ways: int, shots: int, queries: int, device: Any = None) -> None:
        check_episodes(ways, shots, queries)
        pools: dict[Any, list[Example]] = {}
        for e in examples:
            pools.setdefault(e.target, []).append(e)
        self.pools = {c: p for c, p in pools.items() if len(p) >= shots + queries}
        self.ways, self.shots, self.queries, self.collate, self.device = ways, shots, queries, Collate(pad), device
        if len(self.pools) < ways:
            raise BadValue(f"{len(self.pools)} of {len(pools)} classes have {shots} + {queries} texts, an episode has {ways} classes.",
                           "Give more texts, or lower hyper.ways, hyper.shots or hyper.queries.")  # fmt: skip

    def draw(self, seed: int) -> Iterator[Task]:
        chance = random.Random(seed)
        while True:
            sides: tuple[list[Example], list[Example]] = ([], [])
            for k, c in enumerate(chance.sample(sorted(self.pools), self.ways)):
                for i, e in enumerate(chance.sample(self.pools[c], self.shots + self.queries)):
                    sides[i >= self.shots].append(Example(e.ids, target=k))
            yield tuple(to_device(self.collate(s), self.device) for s in sides)  # type: ignore[misc]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    t = torch.tensor(values, dtype=torch.float64)
    return float(t.mean()), 1.96 * float(t.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def few_shot(job: Any, form: Parameterization, roles: Sequence[str], ways: int, shots: int, queries: int, inner_steps: int,
             inner_rate: float, second_order: bool, updates: int, tasks: int, test_episodes: int,
             lr: float) -> Mapping[str, Any]:  # fmt: skip
    """Meta-train on the training classes, adapt on unseen classes of the held-out rows, report, save."""
    from omnilora.training.applying import write_json
    from omnilora.training.models import load_parts

    if job.config.task != "classification":
        raise BadValue(f"task = {job.config.task!r}.", "Episodes are made of labelled text: use --task classification.")
    if job.rows[1] is None:
        raise BadValue("There is no held-out data.", "Give --eval-data: rows of other classes than the training rows.")
    names = [label_set(rows, job.config.replace(labels=None)) for rows in job.rows]
    unseen = [n for n in names[1] if n not in names[0]]
    if len(unseen) < ways:
        raise BadValue(f"{len(unseen)} labels of --eval-data are not in --data; an episode has {ways}.", "Give rows of new classes.")
    everything = [*names[0], *unseen]
    parts = load_parts(job.config.replace(task="embedding"))
    model, pad, limit = parts.model, parts.tokenizer.pad_token_id, room(parts.model.config, job.config)
    first, second = (encode(rows, parts.tokenizer, job.config, limit, everything).examples for rows in job.rows)
    new = [e for e in second if everything[int(e.target or 0)] in unseen]
    device = next(model.parameters()).device
    train, test = (Episodes(e, pad, ways, shots, queries, device) for e in (first, new))
    adapt(model, Method("amal", form), job.targets)
    model.eval()
    encoder = Encoder(model, ways)
    learner = Learner(model, by_roles(model, *roles), encoder.loss, encoder.start, HEAD, inner_rate, inner_steps, second_order)

    def measured(text: str) -> tuple[list[float], list[float]]:
        """Accuracy before and after adaptation, on the same episodes each time."""
        before, after = [], []
        for _, (support, query) in zip(shown(range(test_episodes), text), test.draw(job.config.seed + 1)):
            with torch.no_grad():
                before.append(encoder.accuracy(encoder.start(support), query))
            after.append(encoder.accuracy(learner.adapt(support), query))
        return before, after

    with disabled(model):
        baseline = [encoder.accuracy(encoder.start(s), q)
                    for _, (s, q) in zip(range(test_episodes), test.draw(job.config.seed + 1))]  # fmt: skip
    _, fresh = measured("before")
    draw = train.draw(job.config.seed)
    losses = meta_train(learner, ([next(draw) for _ in range(tasks)] for _ in shown(range(updates), "episodes")), lr)
    prototypes, adapted = measured("after")
    figures: dict[str, Any] = {"training_classes": len(train.pools), "unseen_classes": len(test.pools), "episodes": test_episodes}
    for name, values in (("prototypes_of_the_base", baseline), ("pool_without_meta_training", fresh),
                         ("meta_prototypes", prototypes), ("meta_adapted", adapted)):  # fmt: skip
        figures[f"{name}_accuracy"], figures[f"{name}_interval"] = interval(values)
    gain = interval([a - b for a, b in zip(adapted, baseline)])
    figures |= {"gain": gain[0], "gain_interval": gain[1], "first_outer_loss": losses[0], "last_outer_loss": losses[-1],
                "meta_parameters": sum(t.numel() for t in trainable(model)),
                "task_parameters": sum(p.numel() for p in learner.fast.values()),
                "adapter": str(save(model, job.home / "adapter"))}  # fmt: skip
    write_json(job.home / "rates.json", {n: r.detach().tolist() for n, r in learner.rates.items()})
    return figures
