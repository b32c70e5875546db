"""The training loop: updates, evaluation, early stopping, checkpoints, exact resume."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnilora.core.attach import hub_of, slots
from omnilora.core.method import Method
from omnilora.core.run import Run, _the_adapter, param_groups, start, trainable, wrapped_optimizer
from omnilora.errors import BadValue, FileRefused, RunError, UnknownName, nearest, need
from omnilora.optim.paged import PagedAdamW
from omnilora.training import checkpoint, folder
from omnilora.training.batches import Feed, to_device, token_count
from omnilora.training.config import LOWER_IS_BETTER, TrainConfig
from omnilora.training.losses import Task, evaluate_feed, quiet_norms
from omnilora.training.recompute import gradient_checkpointing
from omnilora.training.report import FitReport, Progress, flat, make_accelerator

SMALL = 500_000_000
PROGRESS = ("fixed", "epoch", "batch", "bad", "epoch_random", "losses", "seconds", "evaluations", "tokens", "best", "best_value")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "paged_adamw": PagedAdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
              "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}  # fmt: skip


def learning_rate(model: nn.Module, config: TrainConfig, factor: float = 1.0) -> float:
    """The configured rate, else 1e-3 for models below 500 M parameters and 2e-4 above, times the method's ``factor``."""
    if config.lr is not None:
        return config.lr
    return factor * (1e-3 if sum(p.numel() for p in model.parameters()) < SMALL else 2e-4)


def optimizer_of(method: Method, usual: Any) -> tuple[Any, dict[str, Any]]:
    """(class, arguments) of a method's own optimizer, else of the ``usual`` one with what the method sets."""
    options = dict(method.optimizer)
    name = options.pop("name", None)
    if name is not None and name not in OPTIMIZERS:
        raise UnknownName(f"No optimizer {name!r}.", nearest(name, OPTIMIZERS))
    return usual if name is None else OPTIMIZERS[name], options


def freeze_others(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Tensors of other adapters stop learning; returns them, to be let go again."""
    mine = {id(p) for p in trainable(model, adapter)}
    others = {id(t): t for s in slots(model) if s.adapter != adapter for _, t in s.tensors()
              if t.requires_grad and id(t) not in mine}  # fmt: skip
    for p in others.values():
        p.requires_grad_(False)
    return list(others.values())


def _plain(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters whose equality can be judged from a file."""
    return {k: v for k, v in hyper.items() if v is None or isinstance(v, (bool, int, float, str))}


class Loop:
    """One run of one adapter. ``feed`` gives the micro-batches of this process."""

    def __init__(self, model: nn.Module, feed: Any, task: Task, config: TrainConfig, adapter: str | None = None,
                 eval_feed: Feed | None = None, other: Any = None, began: Callable[[], Any] | None = None) -> None:  # fmt: skip
        """``began``: called by the main process once nothing can refuse the run any more."""
        self.other, self.began = other, began
        self.model, self.task, self.config, self.eval_feed = model, task, config, eval_feed
        self.adapter = _the_adapter(model, adapter)
        self.method: Method = hub_of(model).values["methods"][self.adapter]
        self.lr = learning_rate(model, config, self.method.rate)
        self.device = next(model.parameters()).device
        self.accelerator = make_accelerator(config.trackers, config.output, self.device.type == "cpu")
        self.world = self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.feed: Feed = feed(self.accelerator.process_index, self.world)
        self.per_epoch = math.ceil(len(self.feed) / config.accumulate)
        self.total = config.steps or max(1, math.ceil(config.epochs * self.per_epoch))
        self.end = min(self.total, config.stop_at or self.total)
        self.eval_every = config.eval_every or max(1, self.total // 5)
        self.output = None if config.output is None else Path(config.output)
        self.home = None if self.output is None else self.output / folder.CHECKPOINTS
        self.report = FitReport(total_steps=self.total, output=config.output,
                                trainable=sum(p.numel() for p in trainable(model, self.adapter)),
                                method=self.method.key)  # fmt: skip
        self.times: list[float] = []
        self.at_epoch = self.at_batch = self.bad = 0
        self.epoch_random: dict[str, Any] | None = None

    def go(self) -> FitReport:
        """Train to the end, or to ``stop_at``."""
        began = time.monotonic()
        thawed = freeze_others(self.model, self.adapter)
        was_training = self.model.training
        self._recompute(True)
        run = start(self.model, None, total_steps=self.total, adapter=self.adapter)
        shown = None
        try:
            self._wire(run)
            with self.task.prepared(self.model, run.rules):
                self.feed.grouped = self.world > 1 or not self.task.joins
                spent, resumed = self._resume(run)
                self._begin(resumed is not None)
                alone = self.world == 1 or any(r.own_gradients for r in run.rules)
                wrapped = self.model if alone else self.accelerator.prepare_model(self.model)
                if self.config.trackers:
                    self.accelerator.init_trackers("omnilora", config=flat(self.config.to_dict()))
                shown = Progress(self.total, run.step, self.config.log_every, self.main)
                if self.end <= run.step < self.total and self.report.stopped == "done":
                    shown.note(f"stop_at = {self.end} is reached already (step {run.step}): nothing is left to train. "
                               "Raise it, or leave it out.")  # fmt: skip
                if resumed is None and self.eval_feed is not None:
                    self._evaluate(run, shown, spent, began)
                self._epochs(run, wrapped, shown, spent, began, resumed)
                self.report.declined = self.task.declined()
            self._save(run, spent + time.monotonic() - began)
            self._finish(run)
        except KeyboardInterrupt as stop:
            for line in folder.interrupted(self.output, run.step):
                stop.add_note(line)
            raise
        finally:
            if shown is not None:
                shown.close()
            run.close()
            self._recompute(False)
            self.model.train(was_training)
            for p in thawed:
                p.requires_grad_(True)
            if self.config.trackers:
                self.accelerator.end_training()
        self.report.steps, self.report.seconds = run.step, spent + time.monotonic() - began
        self.report.step_seconds = statistics.median(self.times) if self.times else 0.0
        return self.report

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _recompute(self, on: bool) -> None:
        if self.config.gradient_checkpointing:
            gradient_checkpointing(self.model, on)

    def _wire(self, run: Run) -> None:
        config = self.config
        groups = param_groups(self.model, self.lr, config.weight_decay, self.adapter)
        kind, options = optimizer_of(run.method, OPTIMIZERS[config.optimizer])
        optimizer = wrapped_optimizer(run, groups, lambda p: kind(p, **options))
        transformers = need("transformers", "train")
        warmup = config.warmup if config.warmup >= 1 else int(config.warmup * self.total)
        run.scheduler = transformers.get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            optimizer, num_warmup_steps=int(warmup), num_training_steps=self.total)  # fmt: skip
        if self.world > 1 and (alone := [type(r).__name__ for r in run.rules if r.one_process]):
            raise BadValue(f"{run.method.key!r} trains in one process ({alone[0]}), not in {self.world}.", "Start one.")
        if self.other is not None:
            feed: Feed = self.other(self.accelerator.process_index, self.world)
            run.others = lambda at: (to_device(b, self.device) for b in feed.endless(at))
        run.bind(optimizer)

    def _resume(self, run: Run) -> tuple[float, dict[str, Any] | None]:
        """(seconds spent before, the random state to go on with or None for a new run)."""
        wanted = self.config.resume
        path = None
        if wanted == "auto" or wanted is True:
            there = checkpoint.found(self.home) if self.home is not None else []
            path = there[-1] if there else None
            if path is None and wanted is True:
                assert self.output is not None
                raise folder.nothing_to_resume(self.output)
        elif wanted:
            path = Path(str(wanted))
        if path is None:
            need("accelerate.utils", "train").set_seed(self.config.seed)
            return 0.0, None
        progress, randoms = checkpoint.load(path, run)
        if missing := [k for k in PROGRESS if k not in progress] or not 0 <= self.accelerator.process_index < len(randoms):
            raise FileRefused(f"{path.name} lacks {missing if missing is not True else 'a random state'}.", "It is damaged.")
        if progress["fixed"] != self._fixed():
            changed = [f"{k}: {progress['fixed'].get(k)!r} → {v!r}" for k, v in self._fixed().items()
                       if progress["fixed"].get(k) != v]  # fmt: skip
            raise RunError(f"{path.name} is of another run ({'; '.join(changed)}).",
                           "Resume with the same configuration.")  # fmt: skip
        self.at_epoch, self.at_batch, self.bad = progress["epoch"], progress["batch"], progress["bad"]
        self.epoch_random = progress["epoch_random"]
        self.report.losses, self.report.evaluations = progress["losses"], progress["evaluations"]
        self.report.tokens, self.report.best_value = progress["tokens"], progress["best_value"]
        self.report.best, self.report.checkpoint = progress["best"], str(path)
        if self.config.patience is not None and self.bad >= self.config.patience:
            self.report.stopped = "patience"
        return progress["seconds"], randoms[self.accelerator.process_index]

    def _begin(self, resumed: bool) -> None:
        if self.main and self.output is not None:
            folder.begin(self.config, resumed)
            if self.began is not None:
                self.began()

    def _fixed(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        c = self.config
        return {"batches": len(self.feed), "batch_size": c.batch_size, "accumulate": c.accumulate, "seed": c.seed,
                "total": self.total, "world": self.world, "schedule": c.schedule, "warmup": c.warmup, "clip": c.clip,
                "lr": self.lr, "weight_decay": c.weight_decay, "packing": c.packing,
                "grouped": self.feed.grouped, "method": self.report.method, "hyper": _plain(self.method.hyper)}  # fmt: skip

    # -- updates ---------------------------------------------------------------------------------------------------

    def _epochs(self, run: Run, wrapped: nn.Module, shown: Progress, spent: float, began: float,
                resumed: dict[str, Any] | None) -> None:  # fmt: skip
        self.model.train()
        quiet_norms(self.model)
        while run.step < self.end and self.report.stopped != "patience":
            if resumed is not None and self.epoch_random is not None:
                checkpoint.set_random_state(self.epoch_random)
            elif self.feed.own:
                self.epoch_random = checkpoint.random_state()
            batches = self.feed.epoch(self.at_epoch, 0 if self.feed.own else self.at_batch)
            if self.feed.own:
                for _ in itertools.islice(batches, self.at_batch):
                    pass
            if resumed is not None:
                checkpoint.set_random_state(resumed)
                resumed = None
            while run.step < self.end and self.report.stopped != "patience":
                micro = list(itertools.islice(batches, self.config.accumulate))
                if not micro:
                    self.at_epoch, self.at_batch = self.at_epoch + 1, 0
                    break
                self.at_batch += len(micro)
                self._update(run, wrapped, [to_device(b, self.device) for b in micro], shown)
                if self.eval_feed is not None and (run.step % self.eval_every == 0 or run.step == self.total):
                    self._evaluate(run, shown, spent, began)
                if self.config.save_every and run.step % self.config.save_every == 0:
                    self._save(run, spent + time.monotonic() - began)
        if run.step < self.total and self.report.stopped == "done":
            self.report.stopped = "stop_at"

    def _gradients(self, run: Run, wrapped: nn.Module, micro: list[Any]) -> float:
        """The gradients of one update, and its loss."""
        weight = self._sum(sum(self.task.weight(b) for b in micro))

        def loss_of(batch: Any) -> tuple[torch.Tensor, Any]:
            own = weight if any(batch is b for b in micro) else self.task.weight(batch)
            total, outputs = self.task.total(wrapped, batch)
            return total / max(own, 1.0), outputs

        made = run.update(micro, loss_of)
        if made is not None:
            return made
        values = []
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last or self.world == 1 else self.accelerator.no_sync(wrapped):
                loss, outputs = loss_of(batch)
                values.append(loss.detach())
                extra = run.loss(batch, outputs)
                loss = loss * self.world + extra / len(micro)
                self.accelerator.backward(loss)
        return sum(v.item() for v in values)

    def _update(self, run: Run, wrapped: nn.Module, micro: list[Any], shown: Progress) -> None:
        began = time.perf_counter()
        value = self._sum(self._gradients(run, wrapped, micro))
        if not math.isfinite(value):
            raise RunError(f"The loss is {value} at update {run.step + 1}.", "Lower lr, or use dtype = 'fp32'.")
        optimizer, tokens = run.optimizer, int(self._sum(sum(map(token_count, micro))))
        assert optimizer is not None
        if self.config.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None], self.config.clip)
            if not torch.isfinite(norm):
                raise RunError(f"The gradient's norm is {float(norm)} at update {run.step + 1}.", "Lower lr.")
        optimizer.step()
        run.scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        self.times.append(time.perf_counter() - began)
        self.report.losses.append(value)
        self.report.tokens += tokens
        rate = run.rate
        shown.update(run.step, value, rate, tokens)
        if self.config.trackers:
            self.accelerator.log({"loss": value, "lr": rate}, step=run.step)

    def _sum(self, value: float) -> float:
        if self.world == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device, dtype=torch.float64), "sum"))

    # -- evaluation and checkpoints --------------------------------------------------------------------------------

    def _evaluate(self, run: Run, shown: Progress, spent: float, began: float) -> None:
        assert self.eval_feed is not None
        metrics = evaluate_feed(self.model, self.eval_feed, self.task)
        self.report.evaluations.append({"step": run.step, **metrics})
        shown.evaluated(run.step, metrics)
        if self.config.trackers:
            self.accelerator.log({f"eval_{k}": v for k, v in metrics.items()}, step=run.step)
        name = self.config.best or "loss"
        value, before = metrics[name], self.report.best_value
        better = before is None or (value < before if name in LOWER_IS_BETTER else value > before)
        if better:
            self.report.best_value, self.bad = value, 0
            if self.config.best is not None and run.step:
                assert self.home is not None
                self.report.best = str(self.home / f"step-{run.step:06d}")
                self._save(run, spent + time.monotonic() - began)
        else:
            self.bad += 1
            if self.config.patience is not None and self.bad >= self.config.patience:
                self.report.stopped = "patience"

    def _save(self, run: Run, seconds: float) -> None:
        if self.home is None or run.step == 0:
            return
        randoms = [checkpoint.random_state()]
        if self.world > 1:
            randoms = need("accelerate.utils", "train").gather_object(randoms)
        progress = {"fixed": self._fixed(), "epoch": self.at_epoch, "batch": self.at_batch, "bad": self.bad,
                    "epoch_random": self.epoch_random, "losses": self.report.losses, "seconds": seconds,
                    "evaluations": self.report.evaluations, "tokens": self.report.tokens,
                    "best": self.report.best, "best_value": self.report.best_value}  # fmt: skip
        path = self.home / f"step-{run.step:06d}"
        if self.main:
            if self.report.checkpoint is None:
                for old in checkpoint.found(self.home):
                    checkpoint.remove(old)
            checkpoint.save(self.home, run, progress, randoms)
            checkpoint.prune(self.home, self.config.keep, Path(self.report.best) if self.report.best else None)
        self.report.checkpoint = str(path)
        self.accelerator.wait_for_everyone()

    def _finish(self, run: Run) -> None:
        if self.report.stopped == "stop_at":
            return
        if self.report.best is not None and Path(self.report.best).name != f"step-{run.step:06d}":
            done = run.step
            checkpoint.load(self.report.best, run)
            run.finish()
            run.step = done
        else:
            run.finish()
