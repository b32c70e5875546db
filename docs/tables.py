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


def benchmark_table() -> str:
    """bench/results/peft.json as a page."""
    data = json.loads((HERE.parent / "bench" / "results" / "peft.json").read_text())
    m = data["machine"]
    lines = ["# Against PEFT", "",
             f"`make bench`: one interleaved run, {m['threads']} threads of a CPU, torch {m['torch']}, PEFT {m['peft']}, "
             f"transformers {m['transformers']}, fp32. A ratio is the median over rounds of the time against the first row "
             "of its table in the same round; min and max are over rounds. Saved activations are counted, not timed.", "",
             "A training step of a Llama of 8 layers of width 512, batch 4 × 128, rank 16 on all linear layers, to the frozen "
             "model:", "", "| | ratio | min | max | saved MiB |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in data["training"].items():
        lines.append(f"| {name} | {row['ratio']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {row['saved MiB']:.1f} |")
    lines += ["", "One forward of 8 rows × 16 tokens, each row with an adapter of its own, to the bare base; switching and "
              "loading, to PEFT's:", "", "| | ratio | min | max | ms |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in data["serving"].items():
        ms = 1000 * row["seconds"]
        lines.append(f"| {name} | {row['ratio']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {ms:.1f} |")
    lines += ["", "No fused plans exist yet: these are the operator trees. Nothing was timed on a GPU."]
    return "\n".join(lines) + "\n"


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
