"""The documentation builds as a site without a broken link, and its navigation holds every page."""

import logging
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
mkdocs = pytest.importorskip("mkdocs")


def test_it_builds(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    logging.getLogger("mkdocs").setLevel(logging.WARNING)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert (tmp_path / "index.html").is_file() and (tmp_path / "methods" / "lora" / "index.html").is_file()


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = str(yaml.safe_load(text)["nav"])
    pages = [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "comparison_notes.md"]
    assert not [p for p in pages if p not in nav]
