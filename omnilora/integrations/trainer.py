"""``integrate(Trainer)``: a Trainer of transformers or TRL that trains adapters with everything their methods ask for."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from omnilora.core.attach import find_hub, hub_of
from omnilora.core.files import load_file, save
from omnilora.core.run import Run, _the_adapter, param_groups, wrapped_optimizer
from omnilora.errors import AttachError, BadValue, RunError, need
from omnilora.integrations.reference import Reference
from omnilora.training import checkpoint
from omnilora.training.batches import two_parts
from omnilora.training.encode import MASKED
from omnilora.training.loop import freeze_others, optimizer_of
from omnilora.training.losses import CausalLM
from omnilora.training.recompute import recomputed_contexts
from omnilora.training.report import refuse_sharding

STATE = "trainer_state.json"  # transformers writes it last: a checkpoint without it was interrupted


def integrate(trainer: type, *, adapter: str | None = None, reference: str | None = None) -> type:
    """A subclass of ``trainer`` for models that carry an adapter.

        Trainer = ol.integrate(transformers.Trainer)
        SFTTrainer = ol.integrate(trl.SFTTrainer)

    It builds the optimizer from the method's groups (or the method's own optimizer), drives its rules by the trainer's
    clock, adds their losses, and lets quantized bases train. Checkpoints hold adapter, heads, optimizer and rule state
    and no base weight; resuming goes on exactly. Where the trainer wants a reference model (DPO, GRPO, KTO …), it gets
    a view of the same weights with the adapter off. With the loss of transformers.Trainer itself, language models train
    without padding and without logits where that is the same; ``trainer.declined`` says why not.

    Args:
        trainer: ``transformers.Trainer`` or a class derived from it.
        adapter: which one is trained, if the model has several.
        reference: name of an attached adapter that is the reference policy instead of the bare base (the SFT adapter
            that DPO starts from).
    """
    base = need("transformers", "train").Trainer
    if not (inspect.isclass(trainer) and issubclass(trainer, base)):
        raise BadValue(f"{trainer!r} is no transformers.Trainer.", "Use ol.fit, or ol.start in a loop of your own.")
    if issubclass(trainer, Integrated):
        raise BadValue(f"{trainer.__name__} is integrated already.", "Call ol.integrate on the original class.")
    return type(trainer.__name__, (Integrated, trainer), {
        "adapter": adapter, "reference": reference, "__module__": trainer.__module__, "__doc__": trainer.__doc__})


class Integrated:
    """What an integrated trainer does differently. Comes before the trainer in the order of resolution."""

    adapter: str | None = None
    reference: str | None = None
    run: Run | None = None
    declined: dict[str, str] = {}  # what a language model's training did not spare ("padding", "logits") → why

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, nn.Module) or find_hub(model) is None:
            what = "no model" if model is None else repr(model) if isinstance(model, str) else type(model).__name__
            raise AttachError(f"{type(self).__name__} was given {what} without an adapter.",
                              "Load the model, call ol.adapt(model, method), then pass it.")  # fmt: skip
        if kwargs.get("peft_config") is not None:
            raise BadValue("peft_config is given for a model that has an adapter.", "Leave it out.")
        self.adapter = _the_adapter(model, self.adapter)
        method = hub_of(model).values["methods"][self.adapter]
        self._steps, self._micro, self._whole = 0, list[Any](), False
        self._added: list[float] = []
        self._causal: CausalLM | None = None
        self._spared = ExitStack()
        share = max((rule.other_share for rule in method.rules), default=0.0)
        with _reference(self, model, kwargs), _trainable(model), recomputed_contexts(model):
            super().__init__(model, *args, **kwargs)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise BadValue("optimizers= is given, which would drop the method's groups and rules.",
                           "Leave it out; choose with args.optim, or optimizer_cls_and_kwargs=.")  # fmt: skip
        self._refuse(method)
        if share:
            self._set_apart(share)

    def _refuse(self, method: Any) -> None:
        """Launches that are not supported."""
        refuse_sharding(self.accelerator)
        alone = [type(r).__name__ for r in method.rules if r.one_process or r.own_gradients]
        if alone and self.args.world_size > 1:
            raise BadValue(f"{method.key!r} does not train in {self.args.world_size} processes here ({alone[0]}).",
                           "Start one process, or use ol.fit.")  # fmt: skip

    # -- optimizer and clock -----------------------------------------------------------------------------------------

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        values = super().set_initial_training_values(*args, **kwargs)
        self._steps = values[-1]
        return values

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            target = hub_of(self.model)
            self.run = Run(self.model, self.adapter, target.values["methods"][self.adapter], max(self._steps, 1))
            groups = param_groups(self.model, self.args.learning_rate, self.args.weight_decay, self.adapter)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            chosen, own = optimizer_of(self.run.method, kind)
            usual = {k: v for k, v in options.items() if k not in ("params", "model", "optimizer_dict")}
            given = {**usual, **own} if chosen is kind else own
            self.optimizer = wrapped_optimizer(self.run, groups, lambda p: chosen(p, **given))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made = super().create_scheduler(num_training_steps, optimizer)
        run = self.run
        if run is None:
            raise RunError("The optimizer was not made by the integrated trainer.", "Leave optimizers= out.")
        if run.optimizer is None:
            run.total_steps, run.scheduler = num_training_steps, made
            run.bind(getattr(self.optimizer, "optimizer", self.optimizer))
            if self._others is not None:
                run.others = self._others
        return made

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest(self.args.output_dir))
        elif isinstance(resume_from_checkpoint, (str, Path)) and not complete(Path(resume_from_checkpoint)):
            raise RunError(f"{resume_from_checkpoint} is no complete checkpoint.", "Pass True for the newest complete one.")
        self.optimizer = self.lr_scheduler = None
        thawed = freeze_others(self.model, str(self.adapter))
        try:
            with recomputed_contexts(self.model):
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.run is not None:
                self.run.finish()
        finally:
            self._spared.close()
            self._causal = None
            if self.run is not None:
                self.run.close()
            for p in thawed:
                p.requires_grad_(True)
        return result

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        made = None if return_outputs else self._cheap(model, inputs, num_items_in_batch)
        if made is None:
            made = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        run = self.run
        if run is None or hub_of(self.model).run is not run or not (self.model.training and torch.is_grad_enabled()):
            return made
        loss, outputs = made if isinstance(made, tuple) else (made, None)
        extra = run.loss(inputs, outputs)
        if isinstance(extra, Tensor):
            self._added.append(float(extra.detach()))
            loss = loss + extra / (self.current_gradient_accumulation_steps if self._scaled(num_items_in_batch) else 1)
        return (loss, outputs) if isinstance(made, tuple) else loss

    def _cheap(self, model: Any, inputs: Any, items: Any) -> Tensor | None:
        """The trainer's own loss of a language model in training, without padding and logits; None where that is another."""
        if not (self._plain_loss() and self.model.training and torch.is_grad_enabled()):
            return None
        if set(inputs) != {"input_ids", "attention_mask", "labels"}:
            self.declined = {"padding": f"the batch holds {sorted(inputs)}"}
            return None
        if self._causal is None:
            self._causal = CausalLM()
            self._spared.enter_context(self._causal.prepared(self.model, self.run.rules if self.run is not None else ()))
        assert self._causal.frugal is not None
        found = self._causal.frugal.total(model, inputs)
        self.declined = self._causal.declined()
        if found is None:
            return None
        shared = self.model_accepts_loss_kwargs and items is not None
        loss = found[0] / (items if shared else (inputs["labels"][:, 1:] != MASKED).sum())
        if shared and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss

    def _plain_loss(self) -> bool:
        """Whether the loss is the mean over learned tokens that transformers' causal models return."""
        base = need("transformers", "train").Trainer
        original = next(c for c in type(self).__mro__ if not issubclass(c, Integrated) and "compute_loss" in vars(c))
        return (original is base and self.label_smoother is None and self.compute_loss_func is None
                and self.accelerator.mixed_precision == "no" and self.args.n_gpu <= 1
                and getattr(self.accelerator, "parallelism_config", None) is None
                and getattr(self.model, "loss_type", None) == "ForCausalLM" and "_loss_function" not in vars(self.model))

    def _scaled(self, items: Any) -> bool:
        """Whether a loss is a share of the update already, which the trainer then does not divide again."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        run = self.run
        if run is None or run.owner is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._micro.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro = self._micro, []
        model.train()

        def loss_of(batch: Any) -> tuple[Tensor, Any]:
            with self.compute_loss_context_manager():
                made = super(Integrated, self).compute_loss(
                    model, self._prepare_inputs(batch), num_items_in_batch=num_items_in_batch,
                    return_outputs=run.owner.reads_outputs)  # fmt: skip
            loss, outputs = made if isinstance(made, tuple) else (made, None)
            return loss / (1 if self._scaled(num_items_in_batch) else len(batches)), outputs

        value = run.update(batches, loss_of)
        if value is not None:
            return torch.tensor(value, device=self.args.device)
        return sum(super(Integrated, self).training_step(model, b, num_items_in_batch) for b in batches)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._added and "loss" in logs:
            logs = {**logs, "method_loss": sum(self._added) / len(self._added)}
            self._added = []
        super().log(logs, *args, **kwargs)

    # -- a second part of the data -------------------------------------------------------------------------------------

    _others: Any = None

    def _set_apart(self, share: float) -> None:
        """The training data in two parts by the run's seed: what updates learn from, and what rules ask for."""
        data = self.train_dataset
        if not hasattr(data, "__len__"):
            raise BadValue("The method divides the training data, which a stream does not let it.", "Give a data set.")
        parts = [data.select(rows) if hasattr(data, "select") else torch.utils.data.Subset(data, rows)
                 for rows in two_parts(len(data), share, self.args.seed)]  # fmt: skip
        self.train_dataset, apart = parts

        def others(at: int) -> Iterator[Any]:
            whole, self.train_dataset = self.train_dataset, apart
            try:
                loader = self.get_train_dataloader()
            finally:
                self.train_dataset = whole
            seen = 0
            while True:
                for batch in loader:
                    seen += 1
                    if seen > at:
                        yield self._prepare_inputs(batch)

        self._others = others

    # -- saving and resuming -------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        home = Path(output_dir or self.args.output_dir)
        if self._whole and self.run is not None:
            checkpoint.write(home, self.run, {}, [])
        else:
            folders = home.is_dir() and any(p.is_dir() for p in home.iterdir())
            home = save(self.model, home / "adapter" if folders else home, self.adapter)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(home)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._whole = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._whole = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """They lie in the adapter's folder already."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Waits for the optimizer: everything is loaded together, or nothing."""

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)  # what TRL adds; there is no optimizer.pt to read
        if checkpoint_folder is not None:
            assert self.run is not None
            checkpoint.load(checkpoint_folder, self.run)

    def _load_best_model(self) -> None:
        assert self.run is not None
        value = load_file(self.state.best_model_checkpoint)
        checkpoint.load_adapter(self.run, value.flat(), value)


def complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if not (folder / checkpoint.TRAINER).is_file():
        return False
    try:
        return isinstance(json.loads((folder / STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def newest(home: str | Path) -> Path:
    """The newest complete checkpoint of a trainer's output folder."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in Path(home).glob("checkpoint-*")
                if p.name.rpartition("-")[2].isdigit() and complete(p)]  # fmt: skip
    if not numbered:
        raise RunError(f"{home} holds no complete checkpoint.", "Call train() without resume_from_checkpoint.")
    return max(numbered)[1]


# -- around the trainer's own code -------------------------------------------------------------------------------------


@contextmanager
def _reference(trainer: Integrated, model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """A trainer that would load a second copy of the base as its reference gets a view instead."""
    original = next(c for c in type(trainer).__mro__ if not issubclass(c, Integrated) and c is not object)
    view = Reference(model, trainer.reference)
    if "ref_model" in inspect.signature(original.__init__).parameters and kwargs.get("ref_model") is None:
        kwargs["ref_model"] = view
    home = sys.modules[original.__module__]
    if hasattr(home, "create_model_from_path"):
        with mock.patch.object(home, "create_model_from_path", lambda *args, **options: view):
            yield
    else:
        yield


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """transformers refuses a quantized model that has no adapter it knows of."""
    known = vars(model).get("_hf_peft_config_loaded")
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        if getattr(model, "is_quantized", False):
            if known is None:
                vars(model).pop("_hf_peft_config_loaded", None)
            else:
                model._hf_peft_config_loaded = known
