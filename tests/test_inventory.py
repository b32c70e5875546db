"""Every row of the list's section on foundations, and the rows that belong there by kind, has an entry that does its work."""

import pytest

from omnilora.core.method import entries
from omnilora.verify import selected

# rows 1–41 of the list, then 159, 163, 164 and 165
ROWS = ["adalora", "bilora", "loretta_adp", "loretta_rep", "lotr", "tt_lora", "dora", "sparse_adapter", "sora", "lora_asym", "lora_fa", "lora_drop", "vera", "tied_lora", "nola", "delta_lora", "qlora", "qa_lora", "qdylora", "loftq", "lq_lora", "lqer", "dylora", "prilora", "flora_opt", "cola", "relora", "prolora", "melora", "galore", "lora_plus", "hiddenkey", "rslora", "amal", "laplace_lora", "lora_construct", "lora_ntk", "rosa", "lte", "local_lora", "llm_adapters", "run_lora"]
RELATIVES = ["pissa", "olora", "eva", "corda", "lora_ga", "loha", "lokr", "ia3", "hira", "randlora", "fourierft", "oft", "boft", "ssf", "bitfit", "ln_tuning"]


@pytest.mark.parametrize("key", [*ROWS, *RELATIVES])
def test_has_an_entry(key):
    assert key in entries()
    found = entries()[key]
    assert found.card.section == "foundations"
    works = {"trains_lm", "applies"} & found.card.tags
    assert len(works) == 1, f"{key}: trained or applied?"
    assert ("applies" in found.card.tags) == (found.make().apply is not None)
    assert found.card.command or "applies" not in found.card.tags


@pytest.mark.parametrize("entry", selected(section="foundations"), ids=lambda e: e.card.key)
def test_card_is_whole(entry):
    card = entry.card
    assert card.title and card.equation and card.purpose
    assert card.arxiv or card.venue
    claims = entry.claims()
    assert claims and len({c.name for c in claims}) == len(claims)
    assert all(c.control and c.says for c in claims)
