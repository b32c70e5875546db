"""Trainers of transformers and TRL through ``ol.integrate``: rules run, losses are added, references are views,
checkpoints hold no base weight and resume exactly."""

import contextlib
import gc
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import transformers
from tiny import text
from torch import nn

import omnilora as ol
from omnilora import errors
from omnilora.core.attach import base_state_dict, hub_of
from omnilora.core.rule import Rule
from omnilora.integrations import trainer as trainer_module
from omnilora.optim.paged import PagedAdamW
from omnilora.rules.structured_dropout import learned_logits
from omnilora.training import frugal

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "bf16": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def load(folder, key="lora", **hyper):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    ol.adapt(model, ol.method(key, **hyper))
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def sft_data(count=32):
    return datasets.Dataset.from_list([{"prompt": text(4, i), "completion": " " + text(3, i % 4)} for i in range(count)])


def pairs(count=16):
    return datasets.Dataset.from_list([{"prompt": text(4, i), "chosen": " " + text(3, i % 4), "rejected": " " + text(3, 99)}
                                       for i in range(count)])  # fmt: skip


HYPER = {"molora": {"balance": 0.01}, "hiddenkey": {"beta": 0.1}, "qlora": {"r": 4, "paged": True}}  # what they add is off by default


def sft(folder, out, key="adalora", steps=8, integrate=True, model=None, **options):
    model, tok = (model, transformers.AutoTokenizer.from_pretrained(folder)) if model else load(folder, key, **HYPER.get(key, {}))
    kind = ol.integrate(trl.SFTTrainer) if integrate else trl.SFTTrainer
    args = trl.SFTConfig(output_dir=str(out), max_steps=steps, **{
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": False, "save_strategy": "no",
        **QUIET, **options})  # fmt: skip
    return kind(model, args=args, train_dataset=sft_data(), processing_class=tok)


def weights(model):
    return {f"{s.site.name}::{n}": t.detach().clone() for s in ol.slots(model) for n, t in s.tensors()}


# -- rules and losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["adalora", "molora"])
def test_sft_adds_the_method_s_loss_and_runs_its_rules(folder, tmp_path, key):
    trainer = sft(folder, tmp_path, key)
    base = {k: v.clone() for k, v in base_state_dict(trainer.model).items()}
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == 8 and all(x["method_loss"] > 0 for x in logs)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert all(torch.equal(v, base[k]) for k, v in base_state_dict(trainer.model).items())
    if key == "adalora":
        ranks = [int((s.lam != 0).sum()) for s in ol.slots(trainer.model)]
        assert sum(ranks) == 8 * len(ranks) and max(ranks) > min(ranks)  # the budget was spent where it pays


def test_the_added_loss_has_the_gradient_it_should(folder, tmp_path):
    """One update of SGD without clipping: weights move by lr times the gradient of (loss + γ · orthogonality)."""
    trainer = sft(folder, tmp_path, "adalora", steps=1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    model = trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    start = weights(model)
    run = ol.start(model, total_steps=1)
    model.train()
    out = model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")})
    extra = run.loss(batch, out)
    (out.loss + extra).backward()
    want = {f"{s.site.name}::{n}": start[f"{s.site.name}::{n}"] - 1e-2 * t.grad
            for s in ol.slots(model) for n, t in s.tensors() if t.requires_grad}  # fmt: skip
    model.zero_grad()
    run.close()
    ol.slots(model)
    trainer.args.learning_rate = 1e-2
    torch.manual_seed(trainer.args.seed)
    trainer.train()
    moved = weights(model)
    pruned = {k for k in want if k.endswith("::lam")}  # the budget masks λ after the step
    assert float(extra) > 0
    for k in want.keys() - pruned:
        assert torch.allclose(moved[k], want[k], rtol=1e-4, atol=1e-6), k


def test_accumulation_counts_the_added_loss_once(folder, tmp_path):
    """Half batches twice move every tensor as the whole batch does. At the first update P and Q move by the added loss
    alone, for λ is 0."""
    found = []
    for accumulate in (1, 2):
        trainer = sft(folder, tmp_path / str(accumulate), "adalora", steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0,
                      gradient_accumulation_steps=accumulate, per_device_train_batch_size=8 // accumulate)  # fmt: skip
        start = weights(trainer.model)
        trainer.train()
        found.append({k: t - start[k] for k, t in weights(trainer.model).items()})
    whole, halves = found
    assert sum(float(t.norm()) > 1e-5 for t in whole.values()) >= 28
    assert all(float((halves[k] - t).norm()) <= 1e-2 * float(t.norm()) + 1e-7 for k, t in whole.items())


def test_a_method_s_own_optimizer_is_used(folder, tmp_path):
    trainer = sft(folder, tmp_path, "qlora", steps=1)
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), PagedAdamW)


def test_rules_groups_become_the_optimizer_s(folder, tmp_path):
    trainer = sft(folder, tmp_path, "lora_plus", steps=1)
    trainer.train()
    rates = sorted({g["initial_lr"] for g in trainer.optimizer.param_groups})
    assert rates == [1e-2, pytest.approx(1.6e-1)]


@pytest.mark.parametrize("key", ["galore", "relora", "hiddenkey", "bilora", "lte", "dylora", "sora"])
def test_methods_with_loops_of_their_own(folder, tmp_path, key):
    trainer = sft(folder, tmp_path, key, steps=6, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert trainer.state.global_step == 6
    assert any(k not in after or not torch.equal(after[k], v) for k, v in before.items())
    assert hub_of(trainer.model).run is None


def test_logits_that_a_trainer_does_not_give_are_named():
    with pytest.raises(errors.RunError, match="logits"):
        learned_logits({}, None)


# -- without the line --------------------------------------------------------------------------------------------------


def trainers(folder, tmp_path, integrate, key="adalora", steps=2, **options):
    def made(kind):
        return ol.integrate(kind) if integrate else kind

    model, tok = load(folder, key, **HYPER.get(key, {}))
    rewards = transformers.LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    common = {"max_steps": steps, "per_device_train_batch_size": 4, "save_strategy": "no", "gradient_checkpointing": False,
              "learning_rate": 1e-2, **QUIET, **options}  # fmt: skip

    def plain():
        rows = [{"input_ids": list(range(4, 12)), "labels": list(range(4, 12))}] * 8
        args = transformers.TrainingArguments(str(tmp_path / "t"), **common)
        return made(transformers.Trainer)(model, args, train_dataset=rows)

    def dpo():
        args = trl.DPOConfig(str(tmp_path / "d"), **common)
        return made(trl.DPOTrainer)(model, args=args, train_dataset=pairs(), processing_class=tok)

    def grpo():
        args = trl.GRPOConfig(str(tmp_path / "g"), num_generations=4, max_completion_length=6, beta=0.1, **common)
        data = datasets.Dataset.from_list([{"prompt": text(4, i)} for i in range(8)])
        return made(trl.GRPOTrainer)(model, args=args, train_dataset=data, processing_class=tok,
                                     reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions])  # fmt: skip

    def reward():
        ol.adapt(rewards, ol.method("adalora"), unfreeze=["score"])
        args = trl.RewardConfig(str(tmp_path / "r"), **common)
        return made(trl.RewardTrainer)(rewards, args=args, train_dataset=pairs(), processing_class=tok)

    return {"Trainer": plain, "SFT": lambda: sft(folder, tmp_path / "s", key, steps, integrate, model, **options),
            "DPO": dpo, "GRPO": grpo, "Reward": reward}  # fmt: skip


@pytest.mark.parametrize("name", ["Trainer", "SFT", "DPO", "GRPO", "Reward"])
def test_each_trainer_with_the_line_and_without(folder, tmp_path, name):
    with pytest.raises(errors.RunError, match="adalora"):
        trainers(folder, tmp_path / "without", False)[name]().train()
    trainer = trainers(folder, tmp_path / "with", True)[name]()
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(v, before[k]) for k, v in weights(trainer.model).items())
    assert all(x["method_loss"] > 0 for x in trainer.state.log_history if "loss" in x)


# -- the reference -----------------------------------------------------------------------------------------------------


def test_the_reference_is_a_view(folder, tmp_path):
    trainer = trainers(folder, tmp_path, True)["DPO"]()
    reference = trainer.ref_model
    assert isinstance(reference, ol.Reference) and not list(reference.parameters())
    trainer.train()
    bare = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(4, 12)[None]
    trainer.model.train()
    with torch.no_grad():
        assert torch.equal(reference(input_ids=ids).logits, bare(input_ids=ids).logits)
        assert not torch.equal(trainer.model.eval()(input_ids=ids).logits, bare(input_ids=ids).logits)


def test_the_first_dpo_loss_is_log_two(folder, tmp_path):
    """Policy and reference agree at the start, so −log σ(0) = log 2."""
    trainer = trainers(folder, tmp_path, True)["DPO"]()
    trainer.train()
    first = next(x for x in trainer.state.log_history if "loss" in x)
    assert first["loss"] - first["method_loss"] == pytest.approx(0.6931, abs=2e-3)


def test_no_second_copy_of_the_base(folder, tmp_path):
    """Parameters of the vocabulary's shape that exist beside those of the models that were there before."""
    made = trainers(folder, tmp_path, True)

    def tables():
        gc.collect()
        return sum(isinstance(o, nn.Parameter) and o.shape == (48, 32) for o in gc.get_objects())

    before = tables()
    trainer = made["DPO"]()
    trainer.train()
    assert tables() == before
    with mock.patch.object(trainer_module, "_reference", lambda *_: contextlib.nullcontext()):
        second = made["DPO"]()  # what TRL does by itself
    assert second.ref_model is not None and tables() == before + 2


def test_another_adapter_is_the_reference(folder, tmp_path):
    model, tok = load(folder, "lora")
    with torch.no_grad():
        for s in ol.slots(model):
            s.B.normal_(0, 0.1)
    path = ol.save(model, tmp_path / "sft")
    ol.load(model, path, "start")
    ol.activate(model, "default")
    args = trl.DPOConfig(str(tmp_path / "d"), max_steps=2, per_device_train_batch_size=4, save_strategy="no",
                         gradient_checkpointing=False, learning_rate=1e-2, **QUIET)  # fmt: skip
    trainer = ol.integrate(trl.DPOTrainer, adapter="default", reference="start")(
        model, args=args, train_dataset=pairs(), processing_class=tok)  # fmt: skip
    learning = {n: t.requires_grad for s in ol.slots(model, "start") for n, t in s.tensors()}
    trainer.train()
    first = next(x for x in trainer.state.log_history if "loss" in x)
    assert first["loss"] == pytest.approx(0.6931, abs=2e-3)
    kept, trained = (ol.state(model, name).content() for name in ("start", "default"))
    assert kept == ol.load_file(path).content() != trained
    assert learning == {n: t.requires_grad for s in ol.slots(model, "start") for n, t in s.tensors()}


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["adalora", "molora"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path, name, key):
    def trainer(home):
        return trainers(folder, home, True, key, 8, save_strategy="steps", save_steps=4)[name]()

    whole = trainer(tmp_path / "whole")
    whole.train()
    want = weights(whole.model)
    home = Path(whole.args.output_dir)
    names = {p.name for p in (home / "checkpoint-4").iterdir()}
    assert "optimizer.safetensors" in names and "trainer.json" in names
    assert not {"model.safetensors", "pytorch_model.bin", "optimizer.pt"} & names
    size = sum(t.numel() for t in weights(whole.model).values()) * 4
    assert sum(p.stat().st_size for p in (home / "checkpoint-4").glob("*.safetensors")) < 6 * size + 20_000  # two moments, and the rule's two means
    again = tmp_path / "again" / home.name
    again.mkdir(parents=True)
    shutil.copytree(home / "checkpoint-4", again / "checkpoint-4")
    shutil.copytree(home / "checkpoint-8", again / "checkpoint-8")
    state = again / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:-40])  # the process died while it wrote
    second = trainer(tmp_path / "again")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    found = weights(second.model)
    assert found.keys() == want.keys() and all(torch.equal(found[k], v) for k, v in want.items())


def test_a_checkpoint_is_an_adapter(folder, tmp_path):
    trainer = sft(folder, tmp_path, steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    model, _ = load(folder)
    ol.detach(model)
    ol.load(model, tmp_path / "checkpoint-4")
    ids = torch.arange(4, 12)[None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-6)


def test_save_model_keeps_checkpoints(folder, tmp_path):
    trainer = sft(folder, tmp_path, steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-1" / "omnilora.json").is_file() and (tmp_path / "adapter" / "omnilora.json").is_file()
    model, _ = load(folder)
    ol.detach(model)
    ol.load(model, tmp_path)


def test_the_best_model_comes_back(folder, tmp_path):
    model, tok = load(folder, "lora")
    args = trl.SFTConfig(str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=5e-2, eval_strategy="steps",
                         eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
                         metric_for_best_model="loss", greater_is_better=False, gradient_checkpointing=False, **QUIET)  # fmt: skip
    trainer = ol.integrate(trl.SFTTrainer)(model, args=args, train_dataset=sft_data(8), eval_dataset=sft_data(8),
                                           processing_class=tok)  # fmt: skip
    trainer.train()
    best = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_metric"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_no_checkpoint_is_said(folder, tmp_path):
    with pytest.raises(errors.RunError, match="no complete checkpoint"):
        sft(folder, tmp_path).train(resume_from_checkpoint=True)


TRAINING = """
import sys
sys.path.insert(0, {tests!r})
import test_integrate as T, omnilora as ol, torch
from pathlib import Path
torch.set_num_threads(1)
out = Path({out!r})
trainer = T.trainers(Path({folder!r}), out, True, {key!r}, 10, save_strategy="steps", save_steps=1)[{name!r}]()
print("ready", flush=True)
trainer.train(resume_from_checkpoint=any(T.trainer_module.complete(p) for p in out.glob("*/checkpoint-*")))
ol.save(trainer.model, {out!r} + "-final")
"""


def in_process(folder, out, name, key, seconds=None):
    """Train in a process of its own, killed after ``seconds``; whether it came to its end."""
    code = TRAINING.format(tests=str(Path(__file__).parent), folder=str(folder), out=str(out), name=name, key=key)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().strip() == "ready"
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    process.stdout.close()
    assert process.returncode in (0, -9)
    return process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), [("SFT", "adalora"), ("SFT", "molora"), ("DPO", "adalora"), ("GRPO", "molora")])
def test_a_trainer_that_dies_at_random_moments(folder, tmp_path, name, key):
    assert in_process(folder, tmp_path / "whole", name, key)
    draw, deaths = random.Random(0), 0
    while deaths < 8 and not in_process(folder, tmp_path / "torn", name, key, draw.random() * 1.5):
        deaths += 1
    while not in_process(folder, tmp_path / "torn", name, key):
        pass
    assert deaths >= 2
    assert ol.load_file(tmp_path / "torn-final").content() == ol.load_file(tmp_path / "whole-final").content()


DDP = """
import sys
sys.path.insert(0, {tests!r})
import test_integrate as T, omnilora as ol, torch
from pathlib import Path
torch.set_num_threads(1)
model, _ = T.load(Path({folder!r}), "adalora")
rows = [{{"input_ids": [4 + (i * 7 + j) % 40 for j in range(8)], "labels": [4 + (i * 7 + j) % 40 for j in range(8)]}} for i in range(32)]
import transformers
args = transformers.TrainingArguments({out!r}, max_steps=4, per_device_train_batch_size={batch}, learning_rate=1e-2,
                                      save_strategy="no", train_sampling_strategy="sequential", **T.QUIET)
trainer = ol.integrate(transformers.Trainer)(model, args, train_dataset=rows)
trainer.train()
if trainer.is_world_process_zero():
    ol.save(model, {out!r})
"""


def test_two_processes_learn_as_one(folder, tmp_path):
    """DDP over gloo: two processes of batch 2 end where one of batch 4 does."""
    for count in (1, 2):
        script, out = tmp_path / f"{count}.py", tmp_path / f"out{count}"
        script.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(folder), out=str(out), batch=4 // count))
        run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=29577", str(script)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (ol.load_file(tmp_path / f"out{c}").flat() for c in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-6) for k in one)


# -- bases and memory --------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(folder, tmp_path):
    found = []
    for on in (False, True):
        trainer = sft(folder, tmp_path / str(on), "adalora", steps=3, gradient_checkpointing=on)
        trainer.train()
        found.append(weights(trainer.model))
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-5, atol=1e-7) for k in found[0])


def test_a_quantized_base_trains(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ol.quantize(model)
    ol.adapt(model, ol.method("qlora", r=4))
    model.is_quantized = True  # what transformers' own loaders set
    trainer = sft(folder, tmp_path, model=model, steps=4)
    trainer.train()
    logs = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert logs[-1] < logs[0] and "_hf_peft_config_loaded" not in vars(model)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(errors.AttachError, match="without an adapter"):
        ol.integrate(trl.SFTTrainer)(model, args=None, train_dataset=sft_data())
    with pytest.raises(errors.AttachError, match="without an adapter"):
        ol.integrate(trl.SFTTrainer)(str(folder), train_dataset=sft_data())
    model, _ = load(folder)
    own = torch.optim.SGD(ol.param_groups(model, 1e-2))
    args = transformers.TrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(errors.BadValue, match="optimizers="):
        ol.integrate(transformers.Trainer)(model, args, optimizers=(own, None))
    with pytest.raises(errors.BadValue, match="Trainer"):
        ol.integrate(Rule)
    with pytest.raises(errors.BadValue, match="already"):
        ol.integrate(ol.integrate(trl.SFTTrainer))


def test_sharding_is_refused():
    from types import SimpleNamespace

    from omnilora.training.report import refuse_sharding

    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(errors.BadValue, match="DDP"):
            refuse_sharding(SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))
    refuse_sharding(SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_CPU")))


# -- without padding and logits ----------------------------------------------------------------------------------------


def language_rows(count=12):
    draw = random.Random(5)
    rows = [[draw.randrange(4, 40) for _ in range(draw.randrange(4, 16))] for _ in range(count)]
    return [{"input_ids": r, "labels": [-100] * (len(r) // 2) + r[len(r) // 2 :]} for r in rows]


def padded(batch):
    fill = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([torch.tensor(r[k]) for r in batch] for k in ("input_ids", "labels"))
    return {"input_ids": fill(ids, True, 0), "labels": fill(labels, True, -100),
            "attention_mask": fill([torch.ones_like(i) for i in ids], True, 0)}  # fmt: skip


def plain_trainer(folder, out, **options):
    model, _ = load(folder, "lora", r=4)
    args = transformers.TrainingArguments(str(out), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, save_strategy="no",
                                          **{**QUIET, **options})  # fmt: skip
    return ol.integrate(transformers.Trainer)(model, args, train_dataset=language_rows(), data_collator=padded)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_a_plain_trainer_spares_padding_and_logits_and_learns_the_same(folder, tmp_path, options, monkeypatch):
    cheap, most = plain_trainer(folder, tmp_path, **options), []
    made = frugal.Head.loss
    monkeypatch.setattr(frugal.Head, "loss", lambda self, h, y: most.append(h.shape) or made(self, h, y))
    cheap.train()
    usual = plain_trainer(folder, tmp_path, **options)
    monkeypatch.setattr(type(usual), "_cheap", lambda *_: None)
    usual.train()
    a, b = ([x["loss"] for x in t.state.log_history if "loss" in x] for t in (cheap, usual))
    assert most and all(s[0] == 1 for s in most)
    assert cheap.declined == {} and a == pytest.approx(b, rel=1e-5) and len(a) == 3
    left, right = weights(cheap.model), weights(usual.model)
    assert all((left[k] - right[k]).norm() <= 1e-4 * right[k].norm() + 1e-7 for k in left)
    assert cheap.model.config._attn_implementation == "sdpa"


def test_another_loss_is_left_to_its_trainer(folder, tmp_path):
    smooth = plain_trainer(folder, tmp_path, label_smoothing_factor=0.1)
    assert not smooth._plain_loss() and plain_trainer(folder, tmp_path)._plain_loss()
    assert not sft(folder, tmp_path, "lora")._plain_loss()
