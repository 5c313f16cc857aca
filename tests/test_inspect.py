"""`mmsid inspect`: mappings of any form, rows that cannot be used, and the figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from export_parts import shop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmsid.cli import main
from mmsid.errors import ArtifactError, CatalogError, MmsidError
from mmsid.inspection import inspect_sids, read_mapping
from mmsid.sids.churn import churn_report
from mmsid.sids.folder import write_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.popularity import popularity_allocation
from mmsid.sids.table import SidTable
from mmsid.sids.tree_shape import shared_paths, tree_shape

CODES = np.array([[0, 1, 2], [0, 1, 2], [10, 0, 3], [2, 1, 0], [2, 11, 1]])
IDS = ["ant", "bee", "cat", "dog", "eel"]


def tokens(form="<{letter}_{code}>"):
    return [[form.format(letter=letter, code=code) for letter, code in zip("abc", row)] for row in CODES.tolist()]


def write(path, form):
    """The mapping in one of its forms."""
    rows = CODES.tolist()
    if form == "folder":
        write_sid_folder(path, SidTable.from_codes(IDS, CODES, (12, 12, 12)), {})
    elif form == "index_tokens":
        path.write_text(json.dumps(dict(zip(IDS, tokens()))))
    elif form == "index_numbers":
        path.write_text(json.dumps(dict(zip(IDS, rows))))
    elif form == "index_texts":
        path.write_text(json.dumps({item: "".join(row) for item, row in zip(IDS, tokens())}))
    elif form == "index_mixed":
        path.write_text(json.dumps({item: row if item != "cat" else "<a_10><b_0><c_3>" for item, row in zip(IDS, tokens())}))
    elif form == "csv_columns":
        path.write_text("item_id;sid_0;sid_1;sid_2\n" + "".join(f"{item};{';'.join(map(str, row))}\n" for item, row in zip(IDS, rows)))
    elif form == "csv_dashes":
        path.write_text("asin,title,semantic_id\n" + "".join(f"{item},x,{'-'.join(map(str, row))}\n" for item, row in zip(IDS, rows)))
    elif form == "csv_lists":
        path.write_text("id,codes\n" + "".join(f'{item},"{row}"\n' for item, row in zip(IDS, rows)))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"item_id": item, "codes": row}) + "\n" for item, row in zip(IDS, rows)))
    elif form == "json_rows":
        path.write_text(json.dumps([{"item_id": item, "sid": "".join(row)} for item, row in zip(IDS, tokens())]))
    elif form == "parquet_numbers":
        pq.write_table(pa.table({"item_id": IDS, "codes": pa.array(rows, pa.list_(pa.uint16()))}), path)
    elif form == "parquet_floats":
        columns = {f"code_{level}": pa.array(CODES[:, level].astype(float)) for level in range(3)}
        pq.write_table(pa.table({"item_id": IDS, **columns}), path)
    elif form == "parquet_onerec":
        texts = ["<|sid_begin|>" + "".join(row) + "<|sid_end|>" for row in tokens("<s_{letter}_{code}>")]
        pq.write_table(pa.table({"pid": IDS, "sid": texts}), path)
    elif form == "npy":
        np.save(path, CODES)
    return path


FORMS = {
    **{"folder": "sids", "npy": "c.npy", "jsonl": "c.jsonl", "json_rows": "c.json", "csv_columns": "c.csv", "csv_dashes": "c.csv"},
    **{"csv_lists": "c.csv", "parquet_numbers": "c.parquet", "parquet_floats": "c.parquet", "parquet_onerec": "c.parquet"},
    **{"index_tokens": "i.json", "index_numbers": "i.json", "index_texts": "i.json", "index_mixed": "i.json"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_items_and_codes(form, tmp_path):
    mapping = read_mapping(write(tmp_path / FORMS[form], form))
    assert mapping.table.codes.tolist() == CODES.tolist() and mapping.problems == [] and mapping.rows == 5
    assert mapping.table.item_ids == (IDS if form != "npy" else list("01234"))
    assert mapping.table.codebook_sizes == (12, 12, 12) and mapping.table.suffix is None


def test_rows_that_cannot_be_used_are_listed_with_their_reasons(tmp_path):
    path = tmp_path / "codes.csv"
    good = [f"ok{n},<a_{n}><b_{n}><c_{n}>" for n in range(20)]
    bad = [
        ",<a_1><b_1><c_1>",
        "ok3,<a_1><b_1><c_1>",
        "empty,",
        "short,<a_1>",
        "long,<a_1><b_1><c_1><d_1><e_1>",
        "letters,<a_1><b_x><c_1>",
        "order,<b_1><a_1><c_1>",
        "huge,<a_1><b_99999999999><c_1>",
    ]
    path.write_text("\n".join(["item_id,sid", *good, *bad]) + "\n")
    mapping = read_mapping(path)
    assert mapping.rows == 28 and len(mapping.table) == 20 and mapping.rows == len(mapping.table) + len(mapping.problems)
    found = {one["item_id"]: (one["row"], one["reason"]) for one in mapping.problems}
    assert found == {
        None: (21, "no item id"),
        "ok3": (22, "item id occurs before"),
        "empty": (23, "no codes"),
        "short": (24, "other number of levels"),
        "long": (25, "other number of levels"),
        "letters": (26, "code is missing or no number"),
        "order": (27, "token of another form"),
        "huge": (28, "code is negative or too large"),
    }
    (order,) = [one for one in mapping.problems if one["item_id"] == "order"]
    assert "<b_1> <a_1> <c_1>, expected <a_…> <b_…> <c_…>" in order["detail"]
    assert mapping.reasons["other number of levels"] == 2


def test_broken_json_entries_and_repeated_keys_are_listed(tmp_path):
    path = tmp_path / "index.json"
    entries = [f'"i{n}": [{n}, {n}]' for n in range(12)]
    path.write_text(
        "{" + ", ".join([*entries, '"i1": [9, 9]', '"null": null', '"deep": [[1], 2]', '"gap": [1, null]', '"no": [-1, 2]']) + "}"
    )
    mapping = read_mapping(path)
    assert len(mapping.table) == 12 and mapping.table.codes[1].tolist() == [1, 1]
    assert {one["item_id"]: one["reason"] for one in mapping.problems} == {
        "i1": "item id occurs before",
        "null": "no codes",
        "deep": "cell is no list of codes",
        "gap": "code is missing or no number",
        "no": "code is negative or too large",
    }


def test_fractions_and_very_long_texts_are_no_codes(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"a": [1, 2.0], "b": [1.5, 2], "c": [3, 4], "d": [-2.0, 1]}))
    mapping = read_mapping(path)
    assert mapping.table.codes.tolist() == [[1, 2], [3, 4]]
    assert [one["reason"] for one in mapping.problems] == ["code is missing or no number", "code is negative or too large"]
    path.write_text(json.dumps({"a": ["<a_1>"], "b": ["1a" * 200_000]}))
    assert [one["reason"] for one in read_mapping(path).problems] == ["code is missing or no number"]


def test_matrix_with_negative_codes_and_fractions(tmp_path):
    np.save(tmp_path / "codes.npy", np.array([[0, 1.0], [1, -1], [0.5, 1], [1, 1], [np.nan, 0]]))
    mapping = read_mapping(tmp_path / "codes.npy")
    assert mapping.table.item_ids == ["0", "3"] and [one["row"] for one in mapping.problems] == [2, 3, 5]


def test_suffix_is_recognised_when_some_items_have_one_code_more(tmp_path):
    path = tmp_path / "index.json"
    rows = {f"u{n}": [f"<a_{n}>", "<b_0>"] for n in range(8)} | {f"s{n}": ["<a_9>", "<b_1>", f"<c_{n}>"] for n in range(3)}
    path.write_text(json.dumps(rows))
    mapping = read_mapping(path)
    assert mapping.table.num_levels == 2 and mapping.table.suffix.tolist() == [-1] * 8 + [0, 1, 2]
    audit = inspect_sids(path)
    assert audit["intrinsic"]["with_suffix"]["colliding_share"] == 0 and audit["intrinsic"]["published"]["colliding_share"] == 3 / 11
    rows |= {f"s{n}": ["<a_9>", "<b_1>", f"<c_{n}>"] for n in range(3, 30)}  # now most items have one
    path.write_text(json.dumps(rows))
    assert read_mapping(path).table.num_levels == 2


def test_levels_that_are_numbered_through(tmp_path):
    np.save(tmp_path / "codes.npy", CODES + np.array([0, 100, 200]))
    assert any("--codebook-size" in note for note in read_mapping(tmp_path / "codes.npy").notes)
    mapping = read_mapping(tmp_path / "codes.npy", codebook_sizes=[100])
    assert mapping.table.codes.tolist() == CODES.tolist() and mapping.table.codebook_sizes == (100, 100, 100) and mapping.sizes_given
    np.save(tmp_path / "plain.npy", CODES)
    plain = read_mapping(tmp_path / "plain.npy", codebook_sizes=[12, 4, 4])
    assert [one["reason"] for one in plain.problems] == ["code is outside the codebook"] and len(plain.table) == 4
    with pytest.raises(ArtifactError, match="2 codebook sizes are given, the codes have 3 levels"):
        read_mapping(tmp_path / "plain.npy", codebook_sizes=[12, 4])


def test_figures_are_those_of_a_sid_folder_and_the_page_is_self_contained(tmp_path, capsys):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (300, 3))
    ids = [f"<b>ad {n}</b>" for n in range(300)]
    table = SidTable.from_codes(ids, codes, (8, 8, 8))
    write_sid_folder(tmp_path / "sids", table, {})
    page = tmp_path / "page.html"
    main(["inspect", str(tmp_path / "sids"), "--out", str(page)])
    text = capsys.readouterr().out
    assert "300 rows = 300 usable + 0 that cannot be used" in text and "| level 3 | 8 of 8 | 100.0% |" in text
    main(["inspect", str(tmp_path / "sids" / "index.json"), "--json"])
    audit = json.loads(capsys.readouterr().out)
    assert audit["intrinsic"] == json.loads(json.dumps(intrinsic_metrics(table))) and audit["counts"] == {
        "in": 300,
        "ok": 300,
        "quarantined": 0,
    }
    html = page.read_text()
    assert "<b>ad" not in html and "&lt;b&gt;ad" in html and "<script" not in html
    assert not re.search(r"(src|href)=\"(?!#|data:)", html) and "style-src 'sha256-" in html
    assert html.count("<polyline") == 3 and 'id="table-4"' in html


def clustered(tmp_path):
    """Items in 8 clusters whose first code is the cluster, vectors of the clusters, and users who stay in a cluster."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(8), 25)
    codes = np.stack([cluster, rng.integers(0, 8, 200)], axis=1)
    np.save(tmp_path / "good.npy", codes)
    np.save(tmp_path / "bad.npy", np.stack([rng.permutation(cluster), codes[:, 1]], axis=1))
    np.save(tmp_path / "vectors.npy", np.eye(8)[cluster] + 0.1 * rng.normal(size=(200, 8)))
    users = [rng.choice(np.flatnonzero(cluster == user % 8), 6).astype(str).tolist() for user in range(60)]
    pq.write_table(pa.table({"user_id": [f"u{n}" for n in range(60)], "items": users}), tmp_path / "histories.parquet")
    rows = [f"u{user},{item},{at}" for user, items in enumerate(users) for at, item in enumerate(items)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return users


def test_evidence_tells_good_codes_from_bad_ones(tmp_path):
    users = clustered(tmp_path)
    found = {}
    for name in ("good", "bad"):
        audit = inspect_sids(tmp_path / f"{name}.npy", histories=tmp_path / "histories.parquet", vectors=tmp_path / "vectors.npy")
        found[name] = audit["neighbours"]["shared_codes"] / audit["neighbours"]["chance"], audit["intrinsic"]["coengagement"]["lift"][0]
        assert audit["popularity"]["interactions"] == 360 and audit["neighbours"]["items"] == 200
    assert min(found["good"]) > 5 and max(found["bad"]) < 2
    events = inspect_sids(tmp_path / "good.npy", histories=tmp_path / "events.csv")
    histories = inspect_sids(tmp_path / "good.npy", histories=tmp_path / "histories.parquet")
    assert events["popularity"] == histories["popularity"]
    assert histories["popularity"]["items_without"] == 200 - len({item for items in users for item in items})


def test_popularity_by_hand():
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    found = popularity_allocation(codes, np.array([6, 2, 0, 0]), (2, 2))
    first, second = found["levels"]
    assert first["perplexity"] == pytest.approx(1) and first["idle"] == 1 and first["busiest_share"] == 1
    assert first["busiest_share_of_items"] == 0.75 and second["idle"] == 1 and first["correlation"] is None
    assert found["shared_interactions"] == 1 and found["items_without"] == 2 and found["idle_prefixes"] == [0.5, 2 / 3]
    assert found["head"] == {"items": 1, "interactions": 0.75, "shared": 1.0}
    with pytest.raises(ValueError, match="no interaction"):
        popularity_allocation(codes, np.zeros(4), (2, 2))


def test_tree_and_groups_by_hand():
    table = SidTable.from_codes(IDS, np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1]]), (2, 3))
    first, second = tree_shape(table)
    assert first == {"nodes": 2, "largest_share": 0.6, "children": 1.5, "max_children": 2, "single_child": 0.5}
    assert second["nodes"] == 3 and second["children"] == 0
    groups = shared_paths(table, examples=1)
    assert groups["sizes"] == {"2": 2}
    assert groups["largest"][0] == {"sid": "<a_0><b_0>", "items": 2, "examples": ["ant"]} and len(groups["largest"]) == 2


def test_churn_against_an_older_file_of_another_form(tmp_path, capsys):
    old = write(tmp_path / "old.json", "index_tokens")
    codes = CODES.copy()
    codes[1] = [10, 0, 2]  # of smaller codes only: the inferred sizes of both files differ
    codes[4, 1] = 1
    pq.write_table(pa.table({"item_id": IDS, "codes": codes.tolist()}), tmp_path / "new.parquet")
    audit = inspect_sids(tmp_path / "new.parquet", against=old)
    expected = churn_report(SidTable.from_codes(IDS, CODES, (12,) * 3), SidTable.from_codes(IDS, codes, (12,) * 3))
    assert audit["churn"]["changed"] == expected["changed"] and audit["churn"]["kept_together"] == expected["kept_together"]
    main(["inspect", str(tmp_path / "new.parquet"), "--against", str(old)])
    assert "40.0% of the shared items changed" in " ".join(capsys.readouterr().out.split())


def test_catalogue_gives_histories_and_categories(tmp_path, capsys):
    config = shop(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(dict(zip([*IDS[:4], "stranger"], tokens()))))
    main(["inspect", str(path), "--config", str(config), "--json"])
    out = capsys.readouterr().out
    audit = json.loads(out[out.index("{") :])
    assert any("1 items of the mapping are not in the catalogue" in note for note in audit["notes"])
    assert any("1 items of the catalogue have no Semantic ID" in note for note in audit["notes"])
    assert audit["popularity"]["interactions"] > 0 and audit["intrinsic"]["published"]["items"] == 4
    assert audit["intrinsic"]["published"]["exact_duplicates"] == 0


def test_mistakes_are_named(tmp_path, capsys):
    (tmp_path / "two.csv").write_text("item_id,a_0,a_1,b_0,b_1\nx,1,2,3,4\ny,1,2,3,4\n")
    (tmp_path / "none.csv").write_text("title,codes\nx,1-2\ny,1-2\n")
    (tmp_path / "words.csv").write_text("item_id,codes\nx,red\ny,blue\n")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"a": [1')
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "codes.npy", CODES)
    for name, message in (
        ("two.csv", "2 families of numbered columns"),
        ("none.csv", "no column has a usual name of ids, found title, codes; name it with --id-column"),
        ("words.csv", "none of the 2 rows can be used (row 1: code is missing or no number: red"),
        ("empty.json", "the file contains no items"),
        ("broken.json", "cannot be read as JSON"),
        ("cube.npy", "expected codes (items, levels)"),
        ("absent.csv", "does not exist"),
    ):
        with pytest.raises(ArtifactError, match=re.escape(message)):
            inspect_sids(tmp_path / name)
    main(["inspect", str(tmp_path / "two.csv"), "--code-columns", "b_0,b_1", "--codebook-size", "5"])
    assert "| level 1 | 1 of 5 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "two.csv"), "--codebook-size", "many"])
    assert "give a number, or one per level" in capsys.readouterr().err
    (tmp_path / "log.csv").write_text("user,thing\na,b\n")
    with pytest.raises(CatalogError, match="expected user_id and items"):
        inspect_sids(tmp_path / "codes.npy", histories=tmp_path / "log.csv")
    with pytest.raises(ArtifactError, match="leave one out"):
        inspect_sids(tmp_path / "codes.npy", histories=tmp_path / "log.csv", catalog=object())


def test_public_functions_take_a_catalogue_as_a_mapping(tmp_path):
    import mmsid

    shop(tmp_path)
    catalog = {"items": tmp_path / "items.parquet", "sequences": tmp_path / "sequences.parquet"}
    folder = write(tmp_path / "sids", "folder")
    assert mmsid.inspect_sids(folder, catalog=catalog)["popularity"]["interactions"] == 6  # train interactions of three users
    out = mmsid.export_sids(folder, tmp_path / "Ads", "minionerec", catalog=catalog)
    assert (out / "Ads.index.json").is_file()


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["<a_1>", "<b_2>", "1-2", "3", "-1"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.dictionaries(st.text(max_size=4), VALUES, max_size=6) | VALUES)
def test_any_json_is_read_or_refused_in_words(found, tmp_path):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(found))
    checked(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(
        st.tuples(st.text(max_size=6), st.text(max_size=12) | st.from_regex(r"(<[ab]_\d{1,3}>){1,3}", fullmatch=True)), max_size=6
    )
)
def test_any_table_is_read_or_refused_in_words(cells, tmp_path):
    path = tmp_path / "any.parquet"
    pq.write_table(pa.table({"item_id": [item for item, _ in cells], "sid": [sid for _, sid in cells]}), path)
    checked(path)


def checked(path):
    """Every row of the file is usable or listed, or the file is refused with a message."""
    try:
        mapping = read_mapping(path)
    except MmsidError as error:
        assert len(str(error)) > 20
        return
    assert mapping.rows == len(mapping.table) + len(mapping.problems) and len(mapping.table)
    assert sum(mapping.reasons.values()) == len(mapping.problems)
    inspect_sids(path)


@pytest.mark.slow
def test_a_million_items_take_less_than_a_minute(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (1_000_000, 3))
    path = tmp_path / "index.json"
    path.write_text(json.dumps({f"ad{n:07d}": [f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"] for n, (a, b, c) in enumerate(codes.tolist())}))
    code = "import sys, resource; from mmsid.cli import main; main(sys.argv[1:]); used = resource.getrusage(resource.RUSAGE_SELF); "
    code += "print('CPU', used.ru_utime + used.ru_stime)"
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(path)], capture_output=True, text=True, check=True)
    assert "1,000,000 rows = 1,000,000 usable" in done.stdout
    assert float(done.stdout.split("CPU ")[-1]) < 60
