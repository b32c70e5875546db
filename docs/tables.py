"""Tables that come from running: what PEFT can hold (docs/peft-table.md), what goes with what (docs/products.md), and the
benchmark (docs/benchmark.md).

    python docs/tables.py
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))


def _gap(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def peft_table() -> str:
    """Every case of tests/test_peft.py, run here: the relative difference of outputs, both ways, and the refusals."""
    import peft
    import test_peft as cases
    import test_peft_relatives as relatives

    import omnilora as ol
    from omnilora.core.method import Method
    from omnilora.errors import NotExpressible
    from omnilora.io.peft import noted, to_peft

    lines = ["# What PEFT can hold", "",
             f"Made by `python docs/tables.py` with PEFT {peft.__version__}: every row was run, with all tensors at random, "
             "in fp32.", "",
             "## Ours, loaded by PEFT", "", "| case | model | form | relative difference of outputs |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for name, (kind, how, options) in cases.OURS.items():
            model = cases.adapted(kind, how, **options)
            path = cases.folder(model, Path(scratch) / f"o-{name}")
            theirs = peft.PeftModel.from_pretrained(cases.make(kind), str(path)).eval()
            form = type(how).__name__ + (f" over {type(how.inner).__name__}" if hasattr(how, "inner") else "")
            lines.append(f"| {name} | {kind} | {form} | {_gap(cases.run(theirs), cases.run(model)):.1e} |")
        for name, (how, targets) in relatives.OURS.items():
            model = relatives.adapted(how, targets)
            path = ol.save(model, Path(scratch) / f"ro-{name}")
            theirs = peft.PeftModel.from_pretrained(relatives.Net(), str(path))
            gap = _gap(relatives.run(theirs), relatives.run(model))
            lines.append(f"| {name} | kinds | {type(how).__name__} | {gap:.1e} |")
        lines += ["", "## PEFT's, loaded here", "", "| case | model | type | relative difference of outputs |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for name, (kind, config) in cases.PEFTS.items():
            path = Path(scratch) / f"p-{name}"
            y = cases.peft_folder(kind, copy.deepcopy(config), path, prune=name == "adalora-pruned")
            model = cases.make(kind)
            ol.load(model, path)
            lines.append(f"| {name} | {kind} | {config.peft_type.value} | {_gap(cases.run(model), y):.1e} |")
        for name, config in relatives.CONFIGS.items():
            theirs = relatives.saved(config(), Path(scratch) / f"rp-{name}")
            model = relatives.Net()
            ol.load(model, Path(scratch) / f"rp-{name}")
            gap = _gap(relatives.run(model), relatives.run(theirs))
            lines.append(f"| {name} | kinds | {config().peft_type.value} | {gap:.1e} |")
    lines += ["", "## Refused, with the reason", "", "| case | reason |", "| --- | --- |"]
    for name, (how, options, _) in cases.REFUSED.items():
        model = cases.Net() if name == "svd-conv1d" else cases.Odd()
        ol.adapt(model, Method("own", how), **options)
        try:
            to_peft(noted(model, ol.state(model)))
        except NotExpressible as error:
            lines.append(f"| {name} | {error.message.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


RESULTS = HERE.parent / "bench" / "results"
PAGE = """# Against PEFT

`make bench` on {processor} ({threads} threads, bf16 in hardware: {half}), torch {torch}, PEFT {peft}, transformers {transformers}.
A ratio is the median, over the rounds of one interleaved run, of a variant's time to that of the first row in the same round, each
round in an order of its own; min and max are over rounds. Kept bytes are counted, not timed: unique storages kept for the backward
pass, parameters excluded.
Nothing was timed on a GPU.

Our steps run with the loss that `ol.fit` takes, which makes no logits. A part of our lead is the base model (norms, activations and
rotations in one pass, and that loss), which PEFT's users can also have by compiling each layer: that row stands beside.
Where a row's spread crosses 1.0, the machine was shared: read it as no difference.
"""


GOALS = """Figures are ratios to the frozen or bare model unless a unit stands beside; each is the median of whole runs, every section in
a process of its own, with the least and the largest run. "Within the spread": the median misses it, a run reaches it."""


def benchmark_table() -> str:
    """bench/results/*.json as a page."""
    found = {p: json.loads((RESULTS / f"{p}.json").read_text()) for p in ("training", "serving", "overhead", "job")
             if (RESULTS / f"{p}.json").exists()}  # fmt: skip
    m = next(f["machine"] for p, f in found.items() if p == "training")
    lines = [PAGE.format(half="yes" if m["bf16 in hardware"] else "no", **m)]
    if (RESULTS / "gates.json").exists():
        lines += _goals(json.loads((RESULTS / "gates.json").read_text())["gates"])
    for title, table in found["training"]["training"].items():
        rows = [(name, _ratio(r), f"{r['kept MiB']:.1f}") for name, r in table.items()]
        lines += [f"## A training step: {title}", "", *_table(("", "ratio", "kept MiB"), rows)]
    if "serving" in found:
        lines += _serving(found["serving"])
    if "overhead" in found:
        sites, commands = found["overhead"]["sites"], found["overhead"]["commands"]
        lines += ["## One site without gradients", "", "Width 64, one token, one thread, processor time above `nn.Linear`'s.", "",
                  *_table(("", "µs", "min", "max"),
                          [(n, *(f"{r[k]:.1f}" for k in ("over", "min", "max"))) for n, r in sites.items()]),
                  "## Starting a command", "",
                  *_table(("", "seconds", "min", "max"), [(f"omnilora {n}", *(f"{r[k]:.2f}" for k in ("seconds", "min", "max")))
                                                          for n, r in commands.items()])]  # fmt: skip
    if "job" in found:
        job = found["job"]
        rows = [(n, *(f"{v[0]:.2f} ({v[1]:.2f} – {v[2]:.2f})" for v in (r["ratios"][k] for k in ("seconds", "processor", "peak MiB"))),
                 f"{r['peak MiB']:.0f}") for n, r in job["jobs"].items()]  # fmt: skip
        lines += ["## A whole job", "", f"SmolLM2-135M, LoRA r 8 on all linear layers, {job['steps']} updates of 8 rows of log-normal "
                  "lengths, the first half of each masked. Every job is a process; ratios to PEFT with Trainer's defaults.", "",
                  *_table(("", "wall", "processor", "peak memory", "peak MiB"), rows)]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _goals(gates: list[dict[str, Any]]) -> list[str]:
    rows = []
    for g in gates:
        name = f"{g['name']} ({g['unit']})" if g["unit"] else g["name"]
        seen = f"{g['median']:.3f} ({min(g['runs']):.3f} – {max(g['runs']):.3f})"
        reached = "yes" if g["passes"] else "within the spread" if g["within the spread"] else "no"
        rows.append((name, f"{g['must']:g}", f"{g['aim']:g}", seen, "" if g["peft"] is None else f"{g['peft']:.3f}", reached))
    return ["## What is to be reached", "", GOALS, "", *_table(("", "must", "aim", "median of the runs", "PEFT", "reached"), rows)]


def _ratio(r: dict[str, float]) -> str:
    return f"{r['ratio']:.3f} ({r['min']:.3f} – {r['max']:.3f})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *(f"| {' | '.join(r)} |" for r in rows), ""]


def _flat(data: dict[str, Any], path: str = "") -> list[tuple[str, ...]]:
    """Numbers of nested tables, by path."""
    rows: list[tuple[str, ...]] = []
    for name, value in data.items():
        at = f"{path} {name}".strip()
        if not isinstance(value, dict):
            rows.append((at, f"{value:.3f}"))
        elif set(value) == {"median", "min", "max"}:
            rows.append((at, f"{value['median']:.3f} ({value['min']:.3f} – {value['max']:.3f})"))
        else:
            rows += _flat(value, at)
    return rows


def _serving(data: dict[str, Any]) -> list[str]:
    lines = ["## Many adapters in a batch", "",
             f"Ranks 4 to 64 in turn, {data['clock']}, {data['machine']['threads']} thread(s); to the bare model. "
             "Decoding: 32 rows, one token each, 96 cached. Prefill: 8 rows of 128 tokens.", ""]  # fmt: skip
    rows = [(part, count, name, _ratio(r)) for part, found in data.items() if part.startswith(("decode", "prefill"))
            for count, table in found.items() for name, r in table.items() if isinstance(r, dict)]  # fmt: skip
    lines += _table(("", "adapters", "", "ratio"), rows)
    if "load" in data:
        lines += ["## Loading and switching", "", *_table(("", "ms"), _flat(data["load"]))]
    return lines


TASKS = {
    "topics": "Docstring → chapter of the library reference, six classes, 540 texts to learn, 60 to choose rates, 240 to "
              "report (`omnilora.demo.topics`): accuracy with a new head.",
    "functions": "Docstring → signature of the function, 540 pairs to learn, 60 to choose rates, 240 to report "
                 "(`omnilora.demo.functions`): how often the right one of 240 is the nearest.",
}  # fmt: skip


def comparison_page() -> str:
    """bench/results/compare-*.json with what stands in docs/comparison_notes.md before and after the tables."""
    head, tail = (HERE / "comparison_notes.md").read_text().split("<!-- tables -->\n")
    parts = [head]
    for task, words in TASKS.items():
        path = HERE.parent / "bench" / "results" / f"compare-{task}.json"
        if not path.is_file():
            continue
        data = json.loads(path.read_text())
        parts.append(f"## {task.capitalize()}\n\n{words}\n\n"
                     "| method | parameters | rate × | accuracy | 95 % over seeds | to lora | 95 % seeds | 95 % rows | q | verdict |\n"
                     "| --- | ---: | ---: | ---: | --- | ---: | --- | --- | ---: | --- |\n")  # fmt: skip
        parts.append("".join("| " + " | ".join(_line(x)) + " |\n" for x in data["lines"]) + "\n")
    return "".join(parts) + tail


def _line(x: dict[str, Any]) -> list[str]:
    if x["test"] is None:
        return [x["label"], *["–"] * 8, "failed: " + "; ".join(x["errors"])[:120]]
    gap, q = x["difference"], x["q"]
    return [x["label"], f"{x['parameters']:,}", f"{x['rate']:.2g}{'*' if x['at_edge'] else ''}", f"{x['test']['mean']:.3f}",
            _span(x["test"]), "–" if gap is None else f"{gap['mean']:+.3f}", _span(gap), _span(x["rows"]),
            "–" if q is None else f"{q:.2f}", x["verdict"]]  # fmt: skip


def _span(interval: dict[str, Any] | None) -> str:
    return "–" if interval is None or interval["low"] is None else f"{interval['low']:.3f} … {interval['high']:.3f}"


def products_table() -> str:
    """Every method against kinds of layers, mixed batches, DoRA, merging, PEFT and compilation."""
    sys.path.insert(0, str(HERE))
    import products

    return str(products.page())


def main() -> None:
    warnings.simplefilter("ignore")
    (HERE / "benchmark.md").write_text(benchmark_table())
    (HERE / "peft-table.md").write_text(peft_table())
    (HERE / "comparison.md").write_text(comparison_page())
    (HERE / "products.md").write_text(products_table())
    print("docs/benchmark.md docs/peft-table.md docs/comparison.md docs/products.md")


if __name__ == "__main__":
    main()
