"""results.json, report.md and report.html of a comparison."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from omnilora.comparison import charts
from omnilora.comparison.results import Results
from omnilora.errors import FileRefused, need

HEADER = ("method", "parameters", "rate ×", "test", "95 % over seeds", "difference", "95 % seeds", "95 % rows", "q",
          "verdict", "s/update", "× baseline", "peak MiB")  # fmt: skip
RIGHT = (1, 2, 3, 5, 8, 10, 11, 12)


def number(x: float | None, digits: int = 4) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def span(interval: dict[str, Any] | None, sign: bool = False) -> str:
    if interval is None or interval["low"] is None:
        return "–"
    form = "{:+.4f}" if sign else "{:.4f}"
    return f"{form.format(interval['low'])} … {form.format(interval['high'])}"


def cells(line: dict[str, Any]) -> list[str]:
    """A line of the table, in the order of HEADER."""
    if line["test"] is None:
        return [line["label"], *["–"] * (len(HEADER) - 5), "failed", "–", "–", "–"]
    gap = line["difference"]
    mark = "*" if line["at_edge"] else ""
    return [line["label"], f"{line['parameters']:,}", f"{line['rate']:.3g}{mark}", number(line["test"]["mean"]),
            span(line["test"]), "–" if gap is None else f"{gap['mean']:+.4f}", span(gap, True),
            span(line["rows"], True), number(line["q"], 3), line["verdict"], number(line["step_seconds"], 3),
            number(line["time_ratio"], 2), "–" if line["memory"] is None else f"{line['memory'] / 2**20:,.0f}"]  # fmt: skip


def notes(results: Results) -> list[str]:
    """What a reader must know to believe the table."""
    plan = results.plan
    grid = plan.get("lrs") or plan["rates"]
    kind = "absolute rates" if plan.get("lrs") else "factors on each method's default rate"
    budget = f"{plan['steps']} updates" if plan.get("steps") else f"{plan['seconds']:g} seconds of training"
    out = [
        f"Every method got {results.trials} trials of {budget}: the grid {', '.join(f'{g:.3g}' for g in grid)} ({kind}) "
        f"with seed {plan['seeds'][0]}, then the rate with the best validation {results.metric} with seeds "
        f"{', '.join(map(str, plan['seeds'][1:])) or '(none)'}. A star marks a best rate at the edge of the grid: "
        "a wider grid might do better.",
        f"The metric is {results.metric} on the test rows ({'lower' if results.lower_is_better else 'higher'} is better); "
        "no choice was made by them. The seed moves initialization, order of the data and dropout; the rows are the same.",
        f"Differences are against {results.baseline}, paired: over seeds by the t-test (q: its p after Benjamini and "
        "Hochberg over all methods), over test rows by the bootstrap of the means over seeds. A verdict needs both.",
        "Seconds an update: the median of interleaved rounds, each method in a process of its own; the ratio is to the "
        "baseline in the same round. Peak MiB is the resident memory of that process, libraries and base included.",
    ]  # fmt: skip
    if results.base is not None:
        out.append(f"The model before training: {results.metric} {results.base:.4f}.")
    for line in results.lines:
        if line["errors"]:
            out.append(f"{line['label']}: {'; '.join(line['errors'])}")
    return out


def command(folder: Path) -> str:
    """What repeats the comparison."""
    return f"omnilora compare --plan {shlex.quote(str(folder / 'plan.yaml'))} --output {shlex.quote(str(folder) + '-again')}"


def markdown(results: Results) -> str:
    """The table and its notes."""
    rows = [HEADER, ["---:" if i in RIGHT else "---" for i in range(len(HEADER))], *map(cells, results.lines)]
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return body + "\n\n" + "\n".join(f"- {n}" for n in notes(results)) + "\n"


def write(results: Results, folder: Path) -> None:
    """All three files, each whole."""
    from omnilora.comparison.trial import write_json

    write_json(folder / "results.json", results.to_dict())
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    (folder / "report.html").write_text(html(results, command(folder)), encoding="utf-8")


def html(results: Results, again: str) -> str:
    """One page that needs nothing from anywhere."""
    jinja2 = need("jinja2", "compare")
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    made = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return made.render(results=results, header=HEADER, right=RIGHT, rows=[(x, cells(x)) for x in results.lines],
                       notes=notes(results), command=again, pareto=charts.pareto(results),
                       curves=charts.curves(results), rates=charts.rates(results))  # fmt: skip


def read(path: Path) -> Results:
    """Results from results.json, or from the folder that holds it."""
    file = path / "results.json" if path.is_dir() else path
    try:
        return Results(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FileRefused(f"{path} holds no results of a comparison: {error}.", "Give its folder.") from error
