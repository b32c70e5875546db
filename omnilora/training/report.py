"""What a run tells: a progress bar on a terminal, a line now and then elsewhere, trackers, and the final report."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnilora.errors import BadValue, NeedsExtra, UnknownName, nearest, need


@dataclass
class FitReport:
    """What a run did. ``losses``: one an update; ``evaluations``: {"step", "loss", …} each."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0  # median time of an update, evaluations and checkpoints left out
    tokens: int = 0  # input tokens without padding (rows, where the batches have no mask)
    trainable: int = 0
    truncated: int = 0
    stopped: str = "done"  # "done", "patience" or "stop_at"
    best: str | None = None  # folder of the best checkpoint
    best_value: float | None = None
    checkpoint: str | None = None  # folder of the last checkpoint
    output: str | None = None
    method: str = ""
    declined: dict[str, str] = field(default_factory=dict)  # "padding", "logits": why a language model's were not spared

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation."""
        return dict(self.evaluations[-1]) if self.evaluations else {}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def make_accelerator(trackers: list[Any], output: str | None, cpu: bool) -> Any:
    """Accelerate's Accelerator. Raises for trackers that are unknown or not installed instead of dropping them."""
    accelerate = need("accelerate", "train")
    known = [str(t) for t in accelerate.utils.LoggerType.list()] if trackers else []
    for name in (t for t in trackers if isinstance(t, str)):
        if name not in known:
            raise UnknownName(f"No tracker {name!r}.", nearest(name, known))
    made = accelerate.Accelerator(cpu=cpu, mixed_precision="no", log_with=list(trackers) or None, project_dir=output,
                                  device_placement=False)  # fmt: skip
    if len(made.log_with) < len(trackers):
        raise NeedsExtra(f"Of trackers {trackers!r} only {[str(t) for t in made.log_with]} can be used.",
                         "Install their packages: pip install 'omnilora[track]'.")  # fmt: skip
    refuse_sharding(made)
    return made


def refuse_sharding(accelerator: Any) -> None:
    """FSDP, DeepSpeed and Megatron shard parameters, which layers here read whole."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise BadValue(f"accelerate is configured for {kind}, which shards parameters.",
                       "Use DDP: accelerate launch --multi_gpu, or --num_processes N on CPUs.")  # fmt: skip


class Progress:
    """Shows updates. ``total``: of the run; ``done``: where a resumed run begins."""

    def __init__(self, total: int, done: int, every: int, show: bool) -> None:
        from rich.console import Console

        self.total, self.every, self.show = total, every, show
        self.console = Console(stderr=True)
        self.began, self.first, self.tokens = time.monotonic(), done, 0
        self.bar: Any = None
        if show and self.console.is_terminal:
            from rich import progress as rich

            self.bar = rich.Progress(
                rich.TextColumn("{task.completed}/{task.total}"),
                rich.BarColumn(),
                rich.TextColumn("{task.description}"),
                rich.TimeElapsedColumn(),
                rich.TextColumn("left"),
                rich.TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def update(self, step: int, loss: float, lr: float, tokens: int) -> None:
        self.tokens += tokens
        if not self.show:
            return
        spent = max(time.monotonic() - self.began, 1e-9)
        text = f"loss {loss:.4f}  lr {lr:.2e}  {self.tokens / spent:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif step % self.every == 0 or step in (self.first + 1, self.total):
            left = spent / max(step - self.first, 1) * (self.total - step)
            self.say(f"step {step}/{self.total}  {text}  {left:,.0f} s left")

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if self.show:
            self.say(f"step {step}/{self.total}  eval " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def note(self, text: str) -> None:
        """A line for the reader, whatever ``log_every`` is."""
        if self.show:
            self.say(text)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as trackers take it."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in values.items() if v is not None}


def shown(items: Sequence[Any], text: str) -> Iterator[Any]:
    """``items`` with a bar on a terminal's error stream."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, text, console=console, disable=not console.is_terminal, transient=True)
