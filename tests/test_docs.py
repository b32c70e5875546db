"""What README and docs say is true: their Python runs, and what is derived from the code is up to date."""

import importlib.util
import os
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from omnilora.core.method import _entries, entries
from omnilora.core.parameterization import Parameterization

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of every block of a page that runs."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n"), m[2]) for m in BLOCK.finditer(text) if "no-run" not in m[1]]


@pytest.fixture
def clean():
    """What a page registers does not outlive it."""
    before, known = dict(entries()), dict(Parameterization.known)
    yield
    for table, old in ((_entries, before), (Parameterization.known, known)):
        table.clear()
        table.update(old)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_python_runs(page, clean, tmp_path, monkeypatch):
    """The blocks of a page are one module, run from top to bottom in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"docs_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for line, code in blocks(page):
                exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)
    finally:
        torch.set_num_threads(threads)


def test_few_blocks_do_not_run():
    skipped = [m[1] for p in PAGES for m in BLOCK.finditer(p.read_text(encoding="utf-8")) if "no-run" in m[1]]
    assert len(skipped) <= 6


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate):
    assert generate.stale() == [], "run: python docs/generate.py"


def test_every_method_has_a_page():
    pages = {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == set(entries())


def test_every_tag_is_explained():
    from omnilora.core.method import TAGS

    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    assert [t for t in sorted(TAGS) if f"`{t}`" not in text] == []


def test_every_role_is_explained():
    from omnilora.core.parameterization import ROLES

    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    assert [r for r in ROLES if f"| {r} |" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "methods").glob("*.md"))], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if not t.startswith("http")]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_readme_lists_every_method_and_command():
    from typer.main import get_command

    from omnilora.cli.main import app

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [k for k in entries() if f"`{k}`" not in text] == []
    assert [c for c in get_command(app).commands if f"`{c}" not in text and f"omnilora {c}" not in text] == []


COMMAND = re.compile(r"^omnilora (\w+)(.*)$", re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if COMMAND.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.stem)
def test_commands_have_the_options_that_pages_use(page):
    from typer.main import get_command

    from omnilora.cli.main import app

    known = get_command(app).commands
    for m in COMMAND.finditer(page.read_text(encoding="utf-8")):
        options = {name for p in known[m[1]].params for name in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"\s(--[\w-]+)", m[2].partition("#")[0])) <= options, m[0]


def test_pages_name_no_module_that_does_not_exist():
    """Every `omnilora.a.b` in a page can be imported, or is a name in a module that can."""
    wrong = []
    for page in PAGES:
        for name in set(re.findall(r"`(omnilora(?:\.\w+)+)`", page.read_text(encoding="utf-8"))):
            if name.rpartition(".")[2] in ("json", "safetensors"):
                continue
            path = ROOT / name.replace(".", os.sep)
            parent = ROOT / name.rpartition(".")[0].replace(".", os.sep)
            inside = parent.with_suffix(".py")
            last = name.rpartition(".")[2]
            if path.is_dir() or path.with_suffix(".py").is_file():
                continue
            if not inside.is_file() or not re.search(rf"\b{last}\b", inside.read_text(encoding="utf-8")):
                wrong.append(f"{page.name}: {name}")
    assert wrong == []
