"""`mmsid recommend`: all users or a table of users, unusable rows, resumption, new items, and Ray, through the command line."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_recommender import NEW, grown, train, vectors_of

import mmsid
from mmsid import Recommender, SidTable
from mmsid.artifacts import read_manifest, verify_folder, write_tensors
from mmsid.catalog.tables import table_pieces
from mmsid.cli import main
from mmsid.recommend.recommend import SCHEMA
from mmsid.sids import write_sid_folder
from mmsid.stages import stage_configs

USERS = 90
RAY = {"actors": 2, "cpus_per_actor": 0.5, "rows_per_task": 16}


def write_sids(folder, table: SidTable, numbers: dict[str, int]):
    """A SID folder with embeddings. Ids that are not in `numbers` get the vector of item 40."""
    write_sid_folder(folder, table, {})
    vectors = vectors_of([numbers.get(item, 40) for item in table.item_ids])
    write_tensors(folder / "embeddings.safetensors", {"embeddings": torch.from_numpy(vectors)})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A catalogue in `data`, its SID folder in `sids`, and a recommender."""
    folder = tmp_path_factory.mktemp("recommend")
    recommender, _, numbers = train(folder / "data")
    recommender.save_pretrained(folder / "recommender")
    write_sids(folder / "sids", recommender._state.table, numbers)
    return folder, numbers


@pytest.fixture
def recommend(trained, tmp_path):
    """Function that runs the command in an own run folder and returns the folder of the stage."""
    folder, _ = trained

    def call(*arguments, name="run", catalog=None, **section):
        data = {
            "name": name,
            "runs": str(tmp_path / "runs"),
            "catalog": {"items": str(folder / "data/items.parquet"), "sequences": str(folder / "data/sequences.parquet")} | (catalog or {}),
            "recommend": {"recommender": str(folder / "recommender"), "sids": str(folder / "sids")} | section,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
        main(["recommend", "--config", str(tmp_path / f"{name}.yaml"), *map(str, arguments)])
        return tmp_path / "runs" / name / "recommend"

    return call


def rows_of(out) -> list[dict]:
    return [row for path in sorted((out / "recommendations").iterdir()) for row in pq.read_table(path).to_pylist()]


def counts_of(out) -> dict[str, int]:
    return read_manifest(out, "recommend")["counts"]


def histories_of(folder) -> tuple[list[str], list[list[str]]]:
    users = pq.read_table(folder / "data/sequences.parquet")
    return users["user_id"].to_pylist(), users["items"].to_pylist()


def test_all_users_of_the_catalogue_are_answered_from_their_whole_histories(trained, recommend, capsys):
    folder, _ = trained
    out = recommend("--k", "5")
    verify_folder(out)
    users, histories = histories_of(folder)
    expected = Recommender.from_pretrained(folder / "recommender").recommend(histories, k=5)
    rows = rows_of(out)
    assert pq.read_table(out / "recommendations/part-00000.parquet").schema.names == SCHEMA.names
    order = {row["user_id"]: place for place, row in enumerate(rows)}
    assert len(rows) == len(order) == len(users)
    rows = [rows[order[user]] for user in users]
    assert [row["item_ids"] for row in rows] == expected.item_ids
    assert np.allclose([row["scores"] for row in rows], expected.scores, atol=1e-5)
    assert [row["sources"] for row in rows] == [["|".join(names) for names in user] for user in expected.sources]
    assert not any(set(row["item_ids"]) & set(history) for row, history in zip(rows, histories, strict=True))
    counts = counts_of(out)
    assert counts["in"] == counts["ok"] == counts["personal"] == USERS and counts["quarantined"] == counts["added_items"] == 0
    assert pq.read_table(out / "problems.parquet").to_pylist() == []
    assert "recommendations for 90 users (90 personal" in capsys.readouterr().err


def bad_rows(known: list[str]) -> list[dict]:
    return [
        {"user_id": "good", "items": known},
        {"user_id": None, "items": known},
        {"user_id": "stranger", "items": ["who", "knows"]},
        {"user_id": "empty", "items": []},
        {"user_id": "good", "items": [*known, "who"]},
        {"user_id": "missing", "items": None},
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_unusable_rows_are_listed_and_the_others_answered(trained, recommend, tmp_path, suffix):
    _, (first, *_) = histories_of(trained[0])
    rows, path = bad_rows(first), tmp_path / f"users.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        rows += [{"user_id": "text", "items": "item001"}, {"user_id": ["a"], "items": first}, {"user_id": "nested", "items": [["x"]]}]
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [f"{row['user_id'] or ''},{'|'.join(row['items'] or [])}" for row in rows]
        path.write_text("\n".join(["user_id,items", *lines, 'broken,"[1, "']))
    out = recommend("--users", path, "--k", "3")
    found = rows_of(out)
    assert [row["user_id"] for row in found] == ["good", "stranger", "empty", "good", "missing"]
    assert [row["status"] for row in found] == ["personal", "unknown_history", "empty_history", "personal", "empty_history"]
    assert [row["unknown_ids"] for row in found] == [0, 2, 0, 1, 0]
    assert all(len(row["item_ids"]) == len(row["scores"]) == len(row["sources"]) == 3 for row in found)
    assert found[0]["item_ids"] == found[3]["item_ids"] and found[1]["sources"][0] == "popular"
    problems = pq.read_table(out / "problems.parquet").to_pylist()
    assert problems[0] == {"row": 2, "user_id": None, "reason": "field 'user_id': empty, expected an id"}
    more = {"parquet": [], "jsonl": [(7, "text"), (8, None), (9, "nested")], "csv": [(7, "broken")]}[suffix]
    assert [(row["row"], row["user_id"]) for row in problems[1:]] == more and str(path) not in str(problems)
    if suffix == "jsonl":
        assert problems[1]["reason"] == "field 'items': holds a str, expected a list of item ids"
    counts = counts_of(out)
    assert (counts["in"], counts["ok"], counts["quarantined"]) == (len(found) + len(problems), len(found), len(problems))
    assert (counts["personal"], counts["unknown_history"], counts["empty_history"], counts["unknown_ids"]) == (2, 1, 2, 3)


def test_a_file_of_unusable_rows_alone_gives_an_empty_shard(recommend, tmp_path):
    pq.write_table(pa.table({"user_id": [1.0, 2.0], "items": ["a", "b"]}), tmp_path / "users.parquet")
    out = recommend("--users", tmp_path / "users.parquet")
    assert rows_of(out) == [] and counts_of(out)["quarantined"] == 2
    assert pq.read_table(out / "problems.parquet")["user_id"].to_pylist() == ["1", "2"]


def test_histories_are_sorted_by_time_if_the_table_has_times(trained, recommend, tmp_path):
    _, histories = histories_of(trained[0])
    catalog = {"sequences": None, "fields": {"timestamps": "times"}}
    users = [f"u{place}" for place in range(5)]
    reverse = {"user_id": users, "items": [history[::-1] for history in histories[:5]]}
    times = [list(range(len(history)))[::-1] for history in histories[:5]]
    pq.write_table(pa.table(reverse | {"times": times}), tmp_path / "timed.parquet")
    pq.write_table(pa.table({"user_id": users, "items": histories[:5]}), tmp_path / "plain.parquet")
    pq.write_table(pa.table(reverse | {"times": [[1], *times[1:]]}), tmp_path / "wrong.parquet")
    found = {name: rows_of(recommend("--users", tmp_path / f"{name}.parquet", name=name, catalog=catalog)) for name in ("timed", "plain")}
    assert found["timed"] == found["plain"]
    out = recommend("--users", tmp_path / "wrong.parquet", name="wrong", catalog=catalog)
    assert rows_of(out)[0]["user_id"] == "u1" and "give one time per interaction" in str(pq.read_table(out / "problems.parquet")["reason"])


def test_users_of_an_event_log_are_answered(trained, recommend, tmp_path):
    users, histories = histories_of(trained[0])
    events = [(user, item, at) for user, history in zip(users, histories, strict=True) for at, item in enumerate(history)]
    events.append(("stranger", "who", 0))
    columns = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*events[::-1], strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    out = recommend("recommend.shard_rows=40", catalog={"sequences": None, "events": str(tmp_path / "events.parquet"), "max_users": 7})
    expected = {row["user_id"]: row["item_ids"] for row in rows_of(recommend(name="sequences"))}
    *rows, stranger = rows_of(out)
    assert {row["user_id"]: row["item_ids"] for row in rows} == expected and len(expected) == USERS
    assert (stranger["user_id"], stranger["status"], len(stranger["item_ids"])) == ("stranger", "empty_history", 40)
    assert counts_of(out)["empty_history"] == 1 and len(list((out / "recommendations").iterdir())) == 3


@pytest.mark.parametrize("text", [" ".join, json.dumps, ",".join])
def test_a_table_of_other_column_names_and_texts_is_read_by_every_stage_alike(trained, recommend, tmp_path, text):
    users, histories = histories_of(trained[0])
    rows = {"customer_id": users, "history": [text(history) for history in histories]}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    expected = {row["user_id"]: row["item_ids"] for row in rows_of(recommend(name="plain"))}
    out = recommend(name="catalogue", catalog={"sequences": str(tmp_path / "log.parquet")})
    assert {row["user_id"]: row["item_ids"] for row in rows_of(out)} == expected
    pa.csv.write_csv(pa.table(rows), tmp_path / "log.csv")
    out = recommend("--users", tmp_path / "log.csv", name="file")
    assert {row["user_id"]: row["item_ids"] for row in rows_of(out)} == expected and counts_of(out)["unknown_ids"] == 0


def test_the_users_of_an_ingested_catalogue_are_not_read_from_their_table_again(trained, recommend, tmp_path):
    folder, _ = trained
    log = tmp_path / "log.parquet"
    shutil.copy(folder / "data/sequences.parquet", log)
    catalog = {"items": str(folder / "data/items.parquet"), "sequences": str(log)}
    settings = {"name": "run", "runs": str(tmp_path / "runs"), "catalog": catalog}
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(settings | {"ingest": {}}))
    main(["ingest", "--config", str(tmp_path / "ingest.yaml")])
    expected = rows_of(recommend(name="other"))
    status = log.stat()
    log.write_bytes(b"x" * status.st_size)
    os.utime(log, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rows_of(recommend(catalog={"sequences": str(log)})) == expected


def test_only_and_seen_items(trained, recommend, tmp_path):
    folder, numbers = trained
    histories = dict(zip(*histories_of(folder), strict=True))
    pq.write_table(pa.table({"item_id": [*list(numbers)[:12], "unknown"]}), tmp_path / "only.parquet")
    rows = rows_of(recommend(f"recommend.only={tmp_path / 'only.parquet'}"))
    for row in rows:
        assert set(row["item_ids"]) == set(list(numbers)[:12]) - set(histories[row["user_id"]])
    with_seen = rows_of(recommend("recommend.exclude_seen=false", "recommend.k=40", name="seen"))
    assert len(rows) == len(with_seen) == USERS
    assert all(set(histories[row["user_id"]]) <= set(row["item_ids"]) for row in with_seen)


def files_of(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def test_a_killed_job_resumes_at_the_first_missing_shard_with_the_same_files(trained, recommend, tmp_path, monkeypatch):
    users, histories = histories_of(trained[0])
    rows = [
        {"user_id": user if place % 7 else None, "items": history}
        for place, (user, history) in enumerate(zip(users, histories, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "users.parquet", row_group_size=13)
    arguments = ("--users", tmp_path / "users.parquet", "--k", "4", "recommend.shard_rows=20")
    undisturbed = files_of(recommend(*arguments, name="undisturbed"))
    assert len(undisturbed) == 6  # five shards, one of ten rows, and the problems
    calls, original = [], Recommender.recommend

    def killed(self, histories, *rest, **settings):
        calls.append(len(histories))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, histories, *rest, **settings)

    monkeypatch.setattr(Recommender, "recommend", killed)
    with pytest.raises(KeyboardInterrupt):
        recommend(*arguments)
    draft = tmp_path / "runs" / "run" / ".recommend.draft" / "recommendations"
    assert sorted(path.name for path in draft.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    damaged = bytearray((draft / "part-00001.parquet").read_bytes())
    damaged[100] ^= 1
    (draft / "part-00001.parquet").write_bytes(damaged)
    out = recommend(*arguments)
    assert len(calls) == 3 + 4  # the damaged shard and the three missing ones
    assert files_of(out) == undisturbed
    assert counts_of(out) == counts_of(tmp_path / "runs" / "undisturbed" / "recommend") and counts_of(out)["quarantined"] == 13
    recommend(*arguments)
    assert len(calls) == 7  # a finished folder is kept


def test_appended_items_are_recommended_at_once(trained, recommend, tmp_path):
    folder, numbers = trained
    recommender = Recommender.from_pretrained(folder / "recommender")
    table, leaving = grown(recommender, ["fresh"]), recommender.item_ids[0]
    write_sids(tmp_path / "sids", table.align([item for item in table.item_ids if item != leaving]), numbers)
    items = [*pq.read_table(folder / "data/items.parquet").to_pylist(), NEW, NEW | {"item_id": "later"}]
    columns = ("item_id", "title", "description")
    pq.write_table(pa.Table.from_pylist([{name: item[name] for name in columns} for item in items]), tmp_path / "items.parquet")
    pq.write_table(pa.table({"user_id": ["a", "b"], "items": [[], histories_of(folder)[1][0]]}), tmp_path / "users.parquet")
    pq.write_table(pa.table({"item_id": ["fresh"]}), tmp_path / "only.parquet")
    catalog = {"items": str(tmp_path / "items.parquet")}
    settings = {"catalog": catalog, "sids": str(tmp_path / "sids"), "users": str(tmp_path / "users.parquet")}
    out = recommend(**settings)
    cold, warm = (row["item_ids"] for row in rows_of(out))
    assert "fresh" in cold and "fresh" in warm and leaving not in cold + warm
    counts = counts_of(out)
    assert (counts["added_items"], counts["items_without_sids"]) == (1, 2)  # `later`, and the item that left the SIDs
    assert [row["item_ids"] for row in rows_of(recommend(name="only", only=str(tmp_path / "only.parquet"), **settings))] == [["fresh"]] * 2


def test_mistakes_are_refused_with_their_remedy(trained, recommend, tmp_path, capsys):
    folder, numbers = trained
    table = Recommender.from_pretrained(folder / "recommender")._state.table
    moved = SidTable.from_codes(table.item_ids[::-1], table.codes, (8, 8), tokenizer_sha256=table.tokenizer_sha256)
    write_sids(tmp_path / "moved", moved, numbers)
    (tmp_path / "only.csv").write_text("item_id\nwho\n")
    pq.write_table(pa.table({"person": ["a"], "items": [["x"]]}), tmp_path / "users.parquet")
    for arguments, section, words in (
        ((), {"sids": str(tmp_path / "moved")}, "give known items other codes"),
        ((), {"recommender": str(tmp_path)}, "not a recommender folder"),
        ((), {"only": str(tmp_path / "only.csv")}, "knows none of the 1 ids (first: 'who'"),
        ((), {"catalog": {"sequences": None}}, "the catalogue has no users; name a table of users: --users FILE"),
        (("--users", tmp_path / "none.csv"), {}, "recommend.users: "),
        (("--users", tmp_path / "users.parquet"), {}, "no column 'user_id' (catalog.fields.user_id); found: person, items"),
        (("--k", "0"), {}, "recommend.k is 0"),
    ):
        with pytest.raises(SystemExit):
            recommend(*arguments, **section)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error, error
    assert not (tmp_path / "runs" / "run" / "recommend").exists()


def test_the_recommender_of_the_run_and_its_sids_are_the_defaults(tmp_path):
    data = {
        "name": "x",
        "runs": "/r",
        "catalog": {"items": "i"},
        "assign": {},
        "train_tokenizer": {},
        "train_recommender": {},
        "recommend": {},
    }
    plain = stage_configs(data, "x.yaml")["recommend"]
    assert (str(plain.recommender), str(plain.sids)) == ("/r/x/train_recommender/recommender", "/r/x/assign")
    assert str(stage_configs(data | {"refine": {}}, "x.yaml")["recommend"].sids) == "/r/x/refine/sids"
    chosen = data | {"refine": {}, "train_recommender": {"recommender": "ours"}, "recommend": {"k": 3}}
    assert str(stage_configs(chosen, "x.yaml")["recommend"].sids) == "/r/x/assign"
    with pytest.raises(mmsid.MmsidError, match=r"recommend\.recommender is missing"):
        stage_configs(data | {"train_recommender": {"recommender": False}}, "x.yaml")


def test_the_public_function_writes_the_same_files(trained, recommend, tmp_path):
    folder, _ = trained
    catalog = {"items": folder / "data/items.parquet", "sequences": folder / "data/sequences.parquet"}
    out = mmsid.write_recommendations(tmp_path / "out", catalog, folder / "recommender", folder / "sids", k=3)
    assert files_of(out) == files_of(recommend("--k", "3"))


def test_pieces_of_a_table_have_equal_size_whatever_its_row_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": list(range(25)), "b": ["x"] * 25}), path, row_group_size=7)
    total, pieces = table_pieces(path, ["a", "absent"], 10, config_key="users")
    pieces = list(pieces)
    assert total == 25 and [len(piece.rows) for piece in pieces] == [10, 10, 5]
    assert [row["a"] for piece in pieces for row in piece.rows] == list(range(25))
    assert pieces[2].place(0) == f"{path}, row 21" and pieces[0].columns == ["a", "b"]


@pytest.mark.slow
def test_ray_gives_the_recommendations_of_one_process(ray, trained, recommend, tmp_path):
    folder, numbers = trained
    recommender = Recommender.from_pretrained(folder / "recommender")
    write_sids(tmp_path / "sids", grown(recommender, ["fresh"]), numbers)
    items = [*pq.read_table(folder / "data/items.parquet").to_pylist(), {name: NEW[name] for name in ("item_id", "title", "description")}]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items.parquet")
    settings = {"catalog": {"items": str(tmp_path / "items.parquet")}, "sids": str(tmp_path / "sids"), "shard_rows": 40, "k": 12}
    local = recommend(name="local", **settings)
    on_ray = recommend("--engine", "ray", name="ray", ray=RAY, **settings)
    assert counts_of(local) == counts_of(on_ray) and counts_of(local)["added_items"] == 1
    assert "ray" not in read_manifest(on_ray)["config"]
    expected, found = rows_of(local), rows_of(on_ray)
    assert len(found) == USERS
    for one, other in zip(expected, found, strict=True):
        assert {name: one[name] for name in one if name != "scores"} == {name: other[name] for name in other if name != "scores"}
        assert np.allclose(one["scores"], other["scores"], atol=1e-4)
