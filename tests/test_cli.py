"""The command line: what it prints, its exit codes, and that reading cards needs no torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import omnilora as ol
from omnilora.cli import cards
from omnilora.cli.common import settings
from omnilora.cli.main import app, main
from omnilora.core import method as methods
from omnilora.core.method import Card, Claim, Method
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA
from omnilora.verify import verify

ROOT = Path(__file__).parents[1]
COMMANDS = ("list", "show", "verify", "explain", "train", "eval", "generate", "chat", "merge", "export", "convert", "push", "pull", "info", "diff")
WORDS = [f"w{i}" for i in range(40)]


def run(*args, input=None):
    return CliRunner().invoke(app, [str(a) for a in args], input=input)


def ok(*args, input=None):
    """The JSON that a command prints."""
    done = run(*args, "--json", input=input)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*args, code, exit_code=2):
    """A command fails with one line and, for programs, an object."""
    done = run(*args)
    assert done.exit_code == exit_code, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error ")]
    assert len(lines) == 1 and lines[0].startswith(f"error [{code}] "), done.stderr
    return lines[0]


def python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


# -- cards, without torch ----------------------------------------------------------------------------------------------


def test_cards_are_read_without_torch():
    code = """
import sys
from omnilora.cli.main import app
for args in (["list", "--json"], ["show", "lora", "--json"], ["--help"], ["list"], ["train", "--help"]):
    try:
        app(args)
    except SystemExit as done:
        assert done.code in (0, None), done.code
    assert "torch" not in sys.modules, args
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    listed, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert {"key", "title", "section", "kind", "tags"} <= set(listed[0])
    assert [c["key"] for c in listed] == [c.key for c in ol.cards()]


@pytest.mark.parametrize("line,most", [("--help", 120), ("list", 120), ("show dora", 120), ("list --tag low_rank --json", 120)])
def test_a_command_starts_with_few_modules(line, most):
    """Start-up is imports: what a command does not need is not imported. Counted, for time depends on the machine."""
    done = python(f"""
import sys
before = set(sys.modules)
sys.argv = ["omnilora", *{line.split()!r}]
from omnilora.cli.main import main
try:
    main()
except SystemExit as done:
    assert done.code in (0, None)
new = set(sys.modules) - before
assert not new & {{"torch", "rich", "yaml", "numpy", "transformers"}}, new
own = sorted(m for m in new if m.startswith("omnilora.cli."))
assert {line!r} == "--help" or own == ["omnilora.cli.cards", "omnilora.cli.common", "omnilora.cli.main", "omnilora.cli.methods"], own
print(len(new), file=sys.stderr)
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) <= most


@pytest.mark.parametrize("line", [
    "list", "list --section foundations --tag low_rank --tag additive", "list --json --kind schedule", "list --section nothing",
    "list --tag", "list --json x", "show dora", "show dora --json", "show", "show nothing --json", "show a b", "show --help",
    "list --section=foundations", "list --section foundations --section foundations", "show -h"])  # fmt: skip
def test_the_short_way_of_list_and_show_is_the_long_one(line, monkeypatch, capsys):
    said = []
    for way in (main, lambda: app(line.split())):
        monkeypatch.setattr(sys, "argv", ["omnilora", *line.split()])
        with pytest.raises(SystemExit) as done:
            way()
        said.append((done.value.code, *capsys.readouterr()))
    assert said[0] == said[1]


def test_cards_are_parsed_from_assignments_alone(monkeypatch):
    """Of the library's own entries no function body is parsed, and reading whole files gives the same."""
    parsed, parse = [], cards.ast.parse
    monkeypatch.setattr(cards.ast, "parse", lambda text, *a: parsed.append(len(text)) or parse(text, *a))
    found = cards.read()
    homes = Path(cards.__file__).parent.parent / "methods"
    assert sum(parsed) < 0.5 * sum(p.stat().st_size for p in homes.rglob("*.py"))
    monkeypatch.setattr(cards, "_heads", lambda text: (None, set()))
    assert cards.read() == found


def test_parsed_cards_equal_the_imported_ones():
    imported = {c.key: {f: cards.plain(getattr(c, f)) for f in cards.EMPTY} for c in ol.cards()}
    assert {c["key"]: c for c in cards.read()} == imported
    assert list(cards.EMPTY) == list(Card.__dataclass_fields__)


def test_cards_of_several_spellings(tmp_path):
    (tmp_path / "one.py").write_text(
        'TAGS = frozenset({"low_rank"}) | {"additive"}\nSECTION = "s"\n'
        'CARD = Card("one", "T" "itle", SECTION, kind="routing", equation=r"\\x", purpose="p" + "q", tags=TAGS,\n'
        '            defaults={"r": -1}, cases=({"r": (1, 2)},), limits=tuple(["a"]))\n'
        'OTHER = Card(key="gone", title="", section="", kind="", equation="", purpose="")\n'
        "def one(): ...\n")  # fmt: skip
    (card,) = cards.read(tmp_path)
    assert card["key"] == "one" and card["title"] == "Title" and card["section"] == "s" and card["purpose"] == "pq"
    assert card["tags"] == ["additive", "low_rank"] and card["cases"] == [{"r": [1, 2]}] and card["limits"] == ["a"]
    assert card["defaults"] == {"r": -1} and card["arxiv"] == ""


def test_list_filters_and_show():
    found = ok("list", "--section", "foundations", "--tag", "scheduled")
    assert {"adalora", "relora"} <= {c["key"] for c in found}
    assert all(c["section"] == "foundations" and "scheduled" in c["tags"] for c in found)
    card = ok("show", "adalora")
    assert card["arxiv"] == "2303.10512" and {"name": "r", "type": "int", "default": "12"} in card["hyper"]
    assert [c["name"] for c in card["claims"]] == [c.name for c in methods.entry("adalora").claims()]
    text = run("show", "dora").stdout
    assert "DoRA" in text and "equation" in text and "differs" in text
    assert "lora" in run("list").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and f"omnilora {command}" in done.stdout.split("Examples:")[1]


def test_bad_input():
    assert "Nearest" in refused("show", "dorra", code="unknown-name")
    assert "--help" in refused("lst", code="usage")
    refused("list", "--nothing", code="usage")
    refused("list", "--section", "foundation", code="unknown-name")
    refused("info", "no/such/folder", code="file-refused")
    refused("explain", "--model", "./none", "--method", "lora", code="bad-value")
    refused("explain", "--set", "hyper.rank=3", "--method", "lora", code="unknown-name")
    refused("train", "--set", "learning_rate=3", code="unknown-name")
    refused("generate", "--prompt", "x", code="bad-value")
    refused("eval", "--data", "x.jsonl", code="bad-value")
    error = json.loads(run("show", "dorra", "--json").stdout)["error"]
    assert set(error) == {"code", "message", "remedy"} and error["code"] == "unknown-name"
    assert json.loads(run("show", "--json").stdout)["error"]["code"] == "usage"


def test_settings():
    made = settings(["lr=1e-3", "hyper.r=16", "hyper.train=AB", "targets=[a, b]", "packing=true", "steps=null"])
    assert made == {"lr": 1e-3, "hyper": {"r": 16, "train": "AB"}, "targets": ["a", "b"], "packing": True, "steps": None}
    for wrong in (["lr"], ["=3"], ["hyper=1", "hyper.r=2"], ["x=[1"]):
        with pytest.raises(BadValue):
            settings(wrong)


# -- verify --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(monkeypatch):
    """Registers a method with the given claims, for one test."""
    methods.entries()
    monkeypatch.setattr(methods, "_entries", dict(methods._entries))

    def add(key, claims):
        card = Card(key=key, title=key, section="tests", kind="parameterization", equation="", purpose="")
        methods.add_entry(card, lambda r=2: Method(key, LoRA(r)), claims)

    return add


def claim(name, measure, holds=lambda f: f < 1, slow=False):
    return Claim(name, "says", measure, holds, "broken", slow)


def test_verify_runs_claims_and_controls(entry):
    entry("good", lambda: [claim("small", lambda broken: 5.0 if broken else 0.5), claim("slow", lambda b: 0.0, slow=True)])
    rows = ok("verify", "good", "--controls")
    assert [(r["key"], r["check"], r["passed"], r["figure"]) for r in rows] == [
        ("good", "small", True, 0.5), ("good", "control: small", True, 5.0)]  # fmt: skip
    assert all(r["seconds"] >= 0 and r["threads"] == torch.get_num_threads() for r in rows)
    assert len(ok("verify", "good", "--slow")) == 2
    assert "--slow" in run("verify", "good").stderr


def test_verify_fails_where_it_must(entry):
    def raises(broken):
        raise ValueError("no\nluck")

    entry("blunt", lambda: [claim("any", lambda broken: 0.5)])
    entry("none", None)
    entry("broken", lambda: [claim("raises", raises), claim("nan", lambda b: float("nan"), holds=lambda f: f < 1)])
    done = run("verify", "--section", "tests", "--controls", "--json")
    assert done.exit_code == 1
    rows = {(r["key"], r["check"]): r for r in json.loads(done.stdout)}
    assert not rows["blunt", "control: any"]["passed"] and rows["blunt", "any"]["passed"]
    assert not rows["none", "has claims"]["passed"]
    assert rows["broken", "raises"]["message"] == "ValueError: no luck" and rows["broken", "raises"]["figure"] is None
    assert not rows["broken", "control: raises"]["passed"] and not rows["broken", "nan"]["passed"]
    assert run("verify", "blunt").exit_code == 0 and run("verify", "blunt", "--controls").exit_code == 1


def test_verify_is_seeded_and_leaves_random_state_alone(entry):
    entry("drawn", lambda: [claim(n, lambda b: float(torch.rand(()))) for n in ("a", "b")])
    before = torch.get_rng_state()
    first, second = verify(["drawn"])
    assert first.figure == second.figure == verify(["drawn"])[0].figure
    assert torch.equal(before, torch.get_rng_state())


def test_verify_of_a_real_method():
    rows = ok("verify", "dora")
    assert rows and all(r["passed"] for r in rows)


# -- adapters in folders -------------------------------------------------------------------------------------------------


def adapter(path, method, fill=0.1, seed=0, targets=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    ol.adapt(model, method, targets)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for slot in ol.slots(model):
            for _, t in slot.tensors():
                t.add_(fill * torch.randn(t.shape, generator=g))
    ol.save(model, path)
    return model


def test_info_of_an_adapter(tmp_path):
    model = adapter(tmp_path / "a", ol.method("lora", r=3))
    found = ok("info", tmp_path / "a")
    assert found["method"] == "lora" and found["hyper"]["r"] == 3 and found["sites"] == 2 and found["ranks"] == {"3": 2}
    assert found["parameters"] == 3 * (8 + 12) + 3 * (12 + 6)
    assert found["content"] == ol.state(model).content() and set(found["bases"]) == {"0", "2"}
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir()) == sum(found["files"].values())
    assert found["layers"]["0"]["tensors"] == {"A": [3, 8], "B": [12, 3]}
    assert found["content"] in run("info", tmp_path / "a").stdout
    (tmp_path / "a" / "omnilora.json").write_text("{")
    refused("info", tmp_path / "a", code="file-refused")


def test_diff_is_the_relative_change_of_delta(tmp_path):
    a = adapter(tmp_path / "a", ol.method("lora", r=3))
    b = adapter(tmp_path / "b", ol.method("lora", r=3), seed=5)
    found = ok("diff", tmp_path / "a", tmp_path / "b")
    want = {}
    for x, y in zip(ol.slots(a), ol.slots(b)):
        d, e = (s.scale * (s.B @ s.A).detach().double() for s in (x, y))
        want[x.site.name] = float((d - e).norm() / d.norm())
    assert {s["site"]: pytest.approx(s["relative"], rel=1e-4) for s in found["sites"]} == want
    assert [s["relative"] for s in found["sites"]] == sorted((s["relative"] for s in found["sites"]), reverse=True)
    assert found["largest"] == found["sites"][0]["relative"] and not found["same"] and found["settings"] == []
    assert set(found["bases"]) == {"0", "2"}
    same = ok("diff", tmp_path / "a", tmp_path / "a")
    assert same["same"] and same["largest"] < 1e-12


def test_diff_names_settings_and_sites(tmp_path):
    adapter(tmp_path / "a", ol.method("lora", r=3))
    adapter(tmp_path / "b", ol.method("lora", r=2, alpha=8.0), targets=["0"])
    found = ok("diff", tmp_path / "a", tmp_path / "b")
    changed = {row["name"]: (row["a"], row["b"]) for row in found["settings"]}
    assert changed["hyper.r"] == (3, 2) and changed["how.alpha"] == (16.0, 8.0) and "scale" in changed
    assert found["only_a"] == ["2"] and found["only_b"] == []
    assert found["sites"][0]["of"] == "delta"
    adapter(tmp_path / "c", ol.method("dora", r=3))
    adapter(tmp_path / "d", ol.method("dora", r=3), seed=1)
    assert {s["of"] for s in ok("diff", tmp_path / "c", tmp_path / "d")["sites"]} == {"tensors"}
    unlike = ok("diff", tmp_path / "a", tmp_path / "c")
    assert {s["of"] for s in unlike["sites"]} == {"unlike"} and unlike["sites"][0]["relative"] is None
    assert "how.kind" in run("diff", tmp_path / "a", tmp_path / "c").stdout


def test_export_of_a_folder(tmp_path):
    adapter(tmp_path / "a", ol.method("lora", r=3))
    made = ok("export", "--adapter", tmp_path / "a", "--output", tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file() and made["worst"] == 0.0
    lowered = ok("export", "--adapter", tmp_path / "a", "--output", tmp_path / "low", "--rank", "2", "--for", "vllm")
    assert 0 < lowered["worst"] < 1 and set(lowered["errors"]) == {"0", "2"}
    refused("export", "--adapter", tmp_path / "a", "--output", tmp_path / "x", "--for", "vlm", code="unknown-name")


def test_convert_reads_and_writes_single_files(tmp_path):
    a = adapter(tmp_path / "a", ol.method("lora", r=3))
    made = ok("convert", tmp_path / "a", tmp_path / "k.safetensors", "--for", "kohya")
    assert made["from"] == "omnilora" and made["worst"] == 0.0 and (tmp_path / "k.safetensors").is_file()
    found = ok("info", tmp_path / "k.safetensors")
    assert found["format"] == "single file" and set(found["layers"]) == {"lora_unet_0", "lora_unet_2"}
    assert "under its own names" in run("info", tmp_path / "k.safetensors").stdout
    state = ol.load_file(tmp_path / "k.safetensors")
    b = next(s for s in ol.slots(a) if s.site.name == "2")
    assert torch.equal(state.sites["lora_unet_2"].tensors["B"], b.B)
    refused("convert", tmp_path / "k.safetensors", tmp_path / "p", "--for", "peft", code="not-expressible")
    low = ok("convert", tmp_path / "k.safetensors", tmp_path / "low.safetensors", "--for", "kohya", "--rank", "1")
    assert 0 < low["worst"] < 1
    refused("convert", tmp_path / "none", tmp_path / "p", code="file-refused")
    refused("convert", tmp_path / "a", tmp_path / "p", "--for", "kohia", code="unknown-name")


def test_export_lists_what_holds_it(tmp_path):
    adapter(tmp_path / "a", ol.method("loha", r=2))
    found = ok("export", "--adapter", tmp_path / "a", "--formats")
    assert found["lycoris"]["can"] and found["peft"]["can"] and found["omnilora"]["can"] and not found["llama.cpp"]["can"]
    assert "Give the model" in found["llama.cpp"]["why"]
    assert "yes" in run("export", "--adapter", tmp_path / "a", "--formats").stdout
    refused("export", "--adapter", tmp_path / "a", code="bad-value")


# -- a tiny language model, end to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama, its WordLevel tokenizer, and data, in folders."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    home = tmp_path_factory.mktemp("tiny")
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>",
                                                bos_token="<s>", eos_token="</s>")  # fmt: skip
    fast.save_pretrained(home / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(home / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(16)]
    for name, part in (("train", rows), ("test", rows[:4])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return home


@pytest.fixture(scope="module")
def trained(tiny):
    return ok("train", "--model", tiny / "model", "--method", "lora", "--data", tiny / "train.jsonl", "--steps", 12,
              "--batch-size", 8, "--lr", "1e-2", "--dtype", "fp32", "--output", tiny / "run", "--set", "hyper.r=2",
              "--eval-data", tiny / "test.jsonl", "--set", "save_every=6", "--threads", 1)  # fmt: skip


def test_ranks_and_alphas_by_pattern(tiny, tmp_path):
    """The middle of an override's key is a pattern; what is trained with it is PEFT's rank_pattern and alpha_pattern."""
    sets = ["overrides.q_proj.r=4", "overrides.q_proj.alpha=6", "overrides.mlp.down_proj.r=2", r"overrides.re:layers\.1\..*.r=5"]
    assert settings(sets)["overrides"] == {
        "q_proj": {"r": 4, "alpha": 6}, "mlp.down_proj": {"r": 2}, r"re:layers\.1\..*": {"r": 5}}  # fmt: skip
    sets = [a for s in ("hyper.r=3", *sets[:3], "targets=[q_proj, down_proj, up_proj]") for a in ("--set", s)]
    ok("train", "--model", tiny / "model", "--method", "lora", "--data", tiny / "train.jsonl", "--output", tmp_path / "run",
       "--steps", 1, "--threads", 1, *sets)  # fmt: skip
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())

    def of(field, default):
        return {n.rpartition(".")[2]: written[field].get("^" + re.escape(n), written[default]) for n in written["target_modules"]}

    assert of("rank_pattern", "r") == {"q_proj": 4, "down_proj": 2, "up_proj": 3}
    assert of("alpha_pattern", "lora_alpha") == {"q_proj": 6, "down_proj": 16, "up_proj": 16}


@pytest.mark.parametrize("key", ["pissa", "olora", "eva", "corda", "lora_ga", "run_lora"])
def test_explain_starts(tiny, key):
    """No weights are read and no data is seen, so nothing is decomposed."""
    assert ok("explain", "--model", tiny / "model", "--method", key, "--set", "hyper.r=3")["trainable"] > 0


def test_explain_reads_only_the_configuration(tiny):
    found = ok("explain", "--model", tiny / "model", "--method", "dora", "--set", "hyper.r=3", "--length", "10",
               "--target", "attention")  # fmt: skip
    assert found["hyper"]["r"] == 3 and len(found["sites"]) == 8 and found["assumed"]["length"] == 10
    assert found["formats"]["peft"]["can"] and found["flop_ratio"] > 1
    assert "q_proj" in run("explain", "--model", tiny / "model", "--method", "lora").stdout
    assert len(found["formats"]["llama.cpp"]["sites"]) == len(found["sites"])
    dora = run("explain", "--model", tiny / "model", "--method", "dora", "--for", "llama.cpp")
    assert "refuses 14 of 14 sites" in dora.stdout and "model.layers.*.self_attn.q_proj (2): llama.cpp takes LoRA" in dora.stdout
    assert "takes lora on all 14 sites" in run("explain", "--model", tiny / "model", "--method", "lora", "--for", "gguf").stdout
    refused("explain", "--model", tiny / "model", "--method", "lora", "--for", "ggml", code="unknown-name")


def test_train_writes_a_run(tiny, trained):
    assert trained["steps"] == trained["total_steps"] == 12 and trained["stopped"] == "done"
    assert trained["last_loss"] < trained["first_loss"] and trained["metrics"]["loss"] > 0
    found = ok("info", tiny / "run")
    assert found["what"] == "run" and found["finished"] and found["config"]["hyper"]["r"] == 2
    assert found["adapter"]["method"] == "lora" and found["adapter"]["parameters"] == trained["trainable"]
    assert found["report"]["last_loss"] == trained["last_loss"] and found["checkpoints"]
    assert "finished" in run("info", tiny / "run").stdout


def test_train_resumes_and_reads_yaml(tiny):
    (tiny / "run.yaml").write_text(f"model: {tiny / 'model'}\nmethod: lora\nhyper: {{r: 2, alpha: 4}}\ndtype: fp32\n"
                                   f"data: {tiny / 'train.jsonl'}\nsteps: 6\nbatch_size: 8\nlr: 1e-2\nthreads: 1\n")  # fmt: skip
    first = ok("train", "--config", tiny / "run.yaml", "--output", tiny / "two", "--set", "stop_at=3", "--set", "hyper.alpha=8")
    assert first["stopped"] == "stop_at" and first["steps"] == 3
    rest = ok("train", "--output", tiny / "two", "--resume", "--set", "stop_at=null")
    assert rest["steps"] == 6 and rest["stopped"] == "done"
    hyper = ok("info", tiny / "two")["config"]["hyper"]
    assert (hyper["r"], hyper["alpha"]) == (2, 8)
    whole = ok("train", "--config", tiny / "run.yaml", "--output", tiny / "one", "--set", "hyper.alpha=8")
    assert whole["last_loss"] == rest["last_loss"]
    assert ok("diff", tiny / "one", tiny / "two")["same"]


def test_eval_without_and_with_the_adapter(tiny, trained):
    found = ok("eval", "--adapter", tiny / "run", "--data", tiny / "test.jsonl")
    assert found["adapter"]["loss"] < found["base"]["loss"] and found["task"] == "causal-lm"
    assert found["change"]["loss"] == pytest.approx(found["adapter"]["loss"] - found["base"]["loss"])
    assert found["adapter"]["loss"] == pytest.approx(trained["metrics"]["loss"], rel=1e-4)
    bare = ok("eval", "--model", tiny / "model", "--data", tiny / "test.jsonl", "--set", "dtype=fp32")
    assert bare["adapter"] is None and bare["base"]["loss"] == pytest.approx(found["base"]["loss"], rel=1e-4)
    (tiny / "bad.jsonl").write_text('{"prompt": "w1"\n')
    assert "bad.jsonl, line 1" in refused("eval", "--adapter", tiny / "run", "--data", tiny / "bad.jsonl", code="data")


def test_generate_from_options_files_and_stdin(tiny, trained):
    one = ok("generate", "--adapter", tiny / "run", "--prompt", "w1 w2", "--max-new-tokens", 4)
    assert one["answers"][0]["prompt"] == "w1 w2" and one["seconds"] > 0
    many = ok("generate", "--adapter", tiny / "run", "--prompts", tiny / "test.jsonl", "--max-new-tokens", 4)
    assert [a["prompt"] for a in many["answers"]] == [f"w{i} w{i + 1}" for i in range(4)]
    assert many["answers"][1]["answer"] == one["answers"][0]["answer"]
    (tiny / "prompts.txt").write_text("w1 w2\n\n")
    args = ("generate", "--adapter", tiny / "run", "--max-new-tokens", 4)
    assert ok(*args, "--prompts", tiny / "prompts.txt")["answers"] == one["answers"]
    assert ok(*args, "--prompt", "-", input="w1 w2")["answers"] == one["answers"]
    assert run(*args, "--prompt", "w1 w2", "--stream").stdout.strip() == one["answers"][0]["answer"]
    refused(*args, "--prompt", "w1", "--stream", "--json", code="bad-value")
    refused(*args, "--prompt", " ".join(["w1"] * 70), code="data")


def test_chat_reads_lines_until_quit(tiny, trained):
    done = run("chat", "--adapter", tiny / "run", "--max-new-tokens", 3, input="w1 w2\n\n/reset\nw3 w4\n/quit\nw5\n")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2, done.output


def test_merge_writes_a_plain_model(tiny, trained):
    report = ok("merge", "--adapter", tiny / "run", "--output", tiny / "merged", "--probe", "w1 w2 w3")
    assert report["largest"] <= report["bound"] and report["probed"] == "the probe batch" and len(report["layers"]) == 14
    args = ("--data", tiny / "test.jsonl", "--set", "dtype=fp32")
    after = ok("eval", "--model", tiny / "merged", *args)
    assert after["base"]["loss"] == pytest.approx(trained["metrics"]["loss"], rel=1e-4)
    refused("merge", "--adapter", tiny / "run", "--output", tiny / "merged", code="bad-value")
    refused("merge", "--adapter", tiny / "run", "--output", tiny / "no", "--dtype", "bf16", "--bound", "1e-9",
            code="merge-refused", exit_code=1)  # fmt: skip
    assert not (tiny / "no").exists()
    refused("eval", "--model", tiny / "merged", "--adapter", tiny / "run", *args, code="base-mismatch")
