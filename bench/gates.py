"""What the benchmarks are to reach, and whether the median of several runs does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

PARTS = ("training", "serving", "overhead", "job")
Results = dict[str, dict[str, Any]]  # part → its results


class Gate(NamedTuple):
    """``ours`` and ``theirs`` read a figure from one run's results; smaller is better."""

    name: str
    must: float
    aim: float
    ours: Callable[[Results], float]
    theirs: Callable[[Results], float] | None = None
    unit: str = ""


def _training(table: str, row: str, over: str = "", key: str = "ratio") -> Callable[[Results], float]:
    """A figure of one row, or what it is above another row's."""

    def read(results: Results) -> float:
        rows = results["training"]["training"][table]
        return float(rows[row][key] - (rows[over][key] if over else 0.0))

    return read


def _serving(part: str, count: int, row: str = "omnilora") -> Callable[[Results], float]:
    return lambda results: float(results["serving"][part][str(count)][row]["ratio"])


def _bare_rows(results: Results) -> float:
    """The median over all batches."""
    found = [t["omnilora bare rows"]["ratio"] for part, tables in results["serving"].items() if part.startswith(("decode", "prefill"))
             for t in tables.values()]  # fmt: skip
    return statistics.median(found)


def _load(*path: str) -> Callable[[Results], float]:
    def read(results: Results) -> float:
        found = results["serving"]["load"]
        for name in path:
            found = found[name]
        return float(found)

    return read


def _largest_load(results: Results) -> float:
    """The worst median around any n-th load."""
    return max(float(v["median"]) for v in results["serving"]["load"]["omnilora load"].values())


def _job(job: str, key: str) -> Callable[[Results], float]:
    return lambda results: float(results["job"]["jobs"][job]["ratios"][key][0])


def _overhead(row: str) -> Callable[[Results], float]:
    return lambda results: float(results["overhead"]["sites"][row]["over"])


def _slowest_command(results: Results) -> float:
    return max(float(v["seconds"]) for v in results["overhead"]["commands"].values())


def _lora(name: str, table: str, must: float, aim: float) -> Gate:
    return Gate(f"training: {name}", must, aim, _training(table, "omnilora lora"), _training(table, "peft lora"))


def _over_lora(name: str, row: str, must: dict[str, float], aim: float, peer: str = "") -> list[Gate]:
    return [Gate(f"training: {name} over our LoRA, {d}", must[d], aim, _training(f"methods {d}", row, "omnilora lora"),
                 _training(f"methods {d}", peer, "omnilora lora") if peer else None) for d in must]  # fmt: skip


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count > 1)}"


def _decode(dtype: str, musts: tuple[float, ...], aims: tuple[float, ...]) -> list[Gate]:
    part = f"decode {dtype}"
    return [Gate(f"decode, 32 rows, {_adapters(k)}, {dtype}", must, aim, _serving(part, k), _serving(part, k, "peft"))
            for k, must, aim in zip((1, 8, 32), musts, aims)]  # fmt: skip


GATES = [
    _lora("Llama 30 M, r 16, fp32", "llama 30M fp32", 1.08, 1.00),
    _lora("Llama 30 M, r 16, bf16", "llama 30M bf16", 1.05, 0.92),
    _lora("SmolLM2-135M, r 8, bf16", "smollm 135M bf16", 0.93, 0.84),
    _lora("encoder", "encoder", 1.15, 1.10),
    _lora("conv net 16 × 16", "conv net 16 × 16", 1.15, 1.10),
    _lora("conv net 32 × 32", "conv net 32 × 32", 1.15, 1.10),
    *_over_lora("dropout", "omnilora lora + dropout", {"fp32": 0.12, "bf16": 0.20}, 0.04, "peft lora + dropout"),
    *(Gate(f"training: DoRA, {d}", must, aim, _training(f"methods {d}", "omnilora dora"), _training(f"methods {d}", "peft dora"))
      for d, must, aim in (("fp32", 1.28, 1.15), ("bf16", 1.45, 1.20))),
    Gate("training: VeRA r 64, fp32", 1.28, 1.20, _training("methods fp32", "omnilora vera"), _training("methods fp32", "peft vera")),
    *_over_lora("tensor train", "omnilora tensor train", {"fp32": 0.05}, 0.01),
    Gate("training: mixture of 4 × r 8, fp32", 1.30, 1.18, _training("methods fp32", "omnilora 4 experts")),
    Gate("kept by DoRA, fp32", 194.0, 130.0, _training("methods fp32", "omnilora dora", key="kept MiB"),
         _training("methods fp32", "peft dora", key="kept MiB"), "MiB"),
    Gate("kept with dropout, fp32", 162.0, 126.0, _training("methods fp32", "omnilora lora + dropout", key="kept MiB"),
         _training("methods fp32", "peft lora + dropout", key="kept MiB"), "MiB"),
    Gate("one site over nn.Linear", 8.0, 3.0, _overhead("omnilora lora"), _overhead("peft lora"), "µs"),
    *_decode("fp32", (1.06, 1.15, 1.45), (1.02, 1.07, 1.25)),
    *_decode("bf16", (1.15, 1.25, 1.55), (1.05, 1.10, 1.30)),
    *(Gate(f"prefill, 8 × 128, {_adapters(k)}, fp32", must, aim, _serving("prefill fp32", k), _serving("prefill fp32", k, "peft"))
      for k, must, aim in ((1, 1.08, 1.03), (8, 1.15, 1.07))),
    Gate("rows without an adapter", 1.02, 1.00, _bare_rows),
    Gate("first load with proof", 15.0, 5.0, _load("omnilora first, base fingerprinted", "median"), _load("peft first"), "ms"),
    Gate("n-th load of a proven file, n to 256", 1.5, 0.3, _largest_load, None, "ms"),
    Gate("switch", 0.010, 0.005, _load("omnilora switch", "median"), _load("peft switch", "median"), "ms"),
    Gate("a whole job: wall", 0.50, 0.29, _job("omnilora", "seconds")),
    Gate("a whole job: peak memory", 0.45, 0.35, _job("omnilora", "peak MiB")),
    Gate("slowest of --help, list, show", 0.3, 0.1, _slowest_command, None, "s"),
]  # fmt: skip


def judged(runs: list[Results]) -> list[dict[str, Any]]:
    """Every gate on the parts that ran: its figure in each run, their median, and whether that passes."""
    out = []
    for gate in GATES:
        try:
            ours = [gate.ours(run) for run in runs]
        except KeyError as missing:
            if missing.args[0] in PARTS:  # a part that did not run; a table or row that is not there is a mistake
                continue
            raise
        middle = statistics.median(ours)
        theirs = None if gate.theirs is None else statistics.median(gate.theirs(run) for run in runs)
        out.append({"name": gate.name, "unit": gate.unit, "must": gate.must, "aim": gate.aim, "runs": ours, "median": middle,
                    "peft": theirs, "passes": middle <= gate.must, "within the spread": min(ours) <= gate.must})  # fmt: skip
    return out


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':46s} {'must':>7s} {'aim':>7s} {'median':>7s} {'least':>7s} {'most':>7s} {'PEFT':>8s}")
    for r in rows:
        peer = "" if r["peft"] is None else f"{r['peft']:8.3f}"
        verdict = "" if r["passes"] else "missed, within the spread" if r["within the spread"] else "missed"
        print(f"{r['name']:46s} {r['must']:7.3f} {r['aim']:7.3f} {r['median']:7.3f} {min(r['runs']):7.3f} {max(r['runs']):7.3f} "
              f"{peer:8s} {r['unit']:3s} {verdict}")  # fmt: skip
