"""`mmsid quantize` and `mmsid.quantize_vectors`: Semantic IDs from ready-made vectors, every input, every fault, sizes by hand."""

import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

import mmsid
from mmsid.artifacts import read_json, read_manifest, read_table, read_tensors, verify_folder
from mmsid.catalog.vectors import unit_rows
from mmsid.cli import main
from mmsid.errors import ArtifactError, CatalogError, ConfigError
from mmsid.quantize import ResidualCodebooks, fit_quantizer, fuse, rq_vae
from mmsid.quantize.sizes import alternatives, propose
from mmsid.sids import SidTable, Trie

N, D = 300, 6
IDS = [f"ad{n}" for n in range(N)]
SMALL = {"codebook_size": 8, "num_levels": 3}
METHODS = ("balanced_rq", "rq_kmeans", "rq_vae")


def clustered(rows: int = N, dim: int = D, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, dim))[np.arange(rows) % 20] + 0.3 * rng.normal(size=(rows, dim))
    return (x * rng.uniform(1, 5, (rows, 1))).astype(np.float32)


def write_parquet(path, x, ids=IDS, kind=None, name="vector", id_name="item_id"):
    pq.write_table(
        pa.table({id_name: ids, name: pa.array([None if row is None else list(row) for row in x], pa.list_(kind or pa.float32()))}), path
    )


def write_vectors(folder):
    """The files that docs/quantize.md names."""
    (folder / "vectors").mkdir()
    write_parquet(folder / "vectors" / "items.parquet", clustered())
    write_parquet(folder / "vectors" / "two_tower.parquet", clustered(N, 4, 5)[: N // 2], IDS[: N // 2])
    np.save(folder / "vectors" / "items.npy", clustered())
    (folder / "vectors" / "ids.txt").write_text("\n".join(IDS))
    saved = datasets.Dataset.from_dict({"asin": IDS, "embedding": clustered().tolist()})
    saved.save_to_disk(folder / "vectors" / "saved_dataset")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("mmsid.quantize.fit.rq_vae", lambda *args: rq_vae(*args, steps=20, latent_dim=4, hidden=8))


def same(one, two) -> bool:
    one, two = SidTable.load(one), SidTable.load(two)
    return one.item_ids == two.item_ids and np.array_equal(one.codes, two.codes) and np.array_equal(one.raw_codes, two.raw_codes)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_writes_a_sid_folder(tmp_path, monkeypatch, capsys, quick, method):
    monkeypatch.chdir(tmp_path)
    x = clustered()
    write_parquet(tmp_path / "mine.parquet", x)
    main(["quantize", "mine.parquet", "--codebook-size", "8", "--num-levels", "3", "--method", method, "--seed", "3"])
    folder = tmp_path / "runs" / "mine" / "quantize"
    verify_folder(folder)
    table, metrics = SidTable.load(folder), read_json(folder / "intrinsic.json")
    assert table.item_ids == IDS and table.codebook_sizes == (8, 8, 8) and len(np.unique(table.codes, axis=0)) == N
    quantizer = fit_quantizer(method, unit_rows(x), 3, 8, 3)  # the method as `baselines` uses it, on the same vectors
    assert np.array_equal(table.raw_codes, quantizer.codes.numpy())
    assert torch.allclose(ResidualCodebooks.load(folder / "codebooks.safetensors").vectors, quantizer.codebooks.vectors)
    assert (folder / "encoder.safetensors").exists() == (method == "rq_vae")
    assert np.allclose(read_tensors(folder / "embeddings.safetensors")["embeddings"], unit_rows(x), atol=1e-6)
    assert Trie.load(folder / "trie.safetensors").num_nodes(3) == N and len(json.loads((folder / "index.json").read_text())) == N
    assert metrics["collisions"]["moved"] == int((table.codes != table.raw_codes).any(1).sum()) and {"fidelity", "neighbour_lcp"} <= set(
        metrics
    )
    manifest = read_manifest(folder, "quantize")
    assert manifest["counts"] == {"in": N, "ok": N, "quarantined": 0, "exact_duplicates": 0} and list(manifest["inputs"]) == ["vectors 1"]
    report = (folder / "report.md").read_text()
    assert capsys.readouterr().out == report and "Given: K = 8 codes at L = 3 levels for 300 items" in report
    main(["quantize", "mine.parquet", "--codebook-size", "8", "--num-levels", "3", "--method", method, "--seed", "3"])  # is kept
    with pytest.raises(SystemExit):
        main(["quantize", "mine.parquet", "--codebook-size", "16", "--num-levels", "3"])
    assert "codebook_size was 8, is 16" in capsys.readouterr().err


def test_codes_equal_those_of_baselines_on_catalogue_vectors(tmp_path):
    write_parquet(tmp_path / "vectors.parquet", clustered())
    pq.write_table(pa.table({"item_id": IDS}), tmp_path / "items.parquet")
    catalog = {"items": tmp_path / "items.parquet", "vectors": [tmp_path / "vectors.parquet"]}
    mmsid.baselines(tmp_path / "baselines", catalog, methods=["balanced_rq_text"], **SMALL)
    theirs = SidTable.load(tmp_path / "baselines" / "balanced_rq_text")
    ours = SidTable.load(mmsid.quantize_vectors(tmp_path / "vectors.parquet", tmp_path / "sids", **SMALL)).align(theirs.item_ids)
    assert np.array_equal(ours.raw_codes, theirs.raw_codes) and np.allclose(ours.margin, theirs.margin, rtol=1e-5)


def test_every_format_gives_the_same_codes(tmp_path):
    x = clustered()
    write_parquet(tmp_path / "list.parquet", x)
    reference = mmsid.quantize_vectors(tmp_path / "list.parquet", tmp_path / "reference", **SMALL)

    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel().astype(np.float64)), D)
    (tmp_path / "parts").mkdir()
    for number, start in enumerate(range(0, N, 130)):
        part = pa.table({"item_id": pa.array(IDS[start : start + 130]), "vector": fixed.slice(start, 130)})
        pq.write_table(part, tmp_path / "parts" / f"part-{number}.parquet", row_group_size=50)
    pq.write_table(part.slice(0, 0), tmp_path / "parts" / "part-9.parquet")  # as Spark writes where a partition is empty
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "ids.npy", np.array(IDS))
    (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"item_id": one, "n": 1}) + "\n" for one in IDS))
    pyarrow.csv.write_csv(pa.table({"asin": IDS}), tmp_path / "ids.csv")
    rows = datasets.Dataset.from_dict({"asin": IDS[::-1], "emb": x[::-1].tolist(), "title": IDS})
    rows.select(range(N - 1, -1, -1)).save_to_disk(tmp_path / "hf")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"item_id": IDS, "vector": x.tolist()})}).save_to_disk(tmp_path / "split")

    given = {
        "parts": ([tmp_path / "parts"], {}),
        "files": (sorted((tmp_path / "parts").glob("*.parquet")), {}),
        "npy with npy": (tmp_path / "x.npy", {"ids": tmp_path / "ids.npy"}),
        "npy with txt": (tmp_path / "x.npy", {"ids": tmp_path / "ids.txt"}),
        "npy with jsonl": (tmp_path / "x.npy", {"ids": tmp_path / "ids.jsonl"}),
        "npy with csv": (tmp_path / "x.npy", {"ids": tmp_path / "ids.csv"}),
        "npy with parquet": (tmp_path / "x.npy", {"ids": tmp_path / "list.parquet"}),
        "saved dataset": (tmp_path / "hf", {"id_column": "asin"}),
        "one split": (tmp_path / "split", {}),
        "array": (x, {"ids": IDS}),
    }
    for name, (vectors, settings) in given.items():
        assert same(mmsid.quantize_vectors(vectors, tmp_path / f"sids of {name}", **settings, **SMALL), reference), name


def test_without_ids_the_row_number_is_the_id_and_this_is_said(tmp_path, capsys):
    np.save(tmp_path / "x.npy", clustered().astype(np.float16))
    main(["quantize", str(tmp_path / "x.npy"), "--codebook-size", "8", "--num-levels", "3", "--out", str(tmp_path / "out")])
    assert SidTable.load(tmp_path / "out").item_ids == [str(n) for n in range(N)]
    assert "no ids were given, so the row numbers 0 to 299 are the item ids" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_the_codes_of_an_item_do_not_depend_on_rows_ids_or_memory_map(tmp_path, quick, method):
    """Also where the codebooks are fitted on a sample, which is drawn by content."""
    x, order = clustered(), np.random.default_rng(1).permutation(N)
    settings = {**SMALL, "method": method, "fit_rows": 120}
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    mapped = mmsid.quantize_vectors(tmp_path / "x.npy", tmp_path / "mapped", ids=tmp_path / "ids.txt", **settings)
    assert same(mapped, mmsid.quantize_vectors(x, tmp_path / "array", ids=IDS, **settings))
    shuffled = SidTable.load(mmsid.quantize_vectors(x[order], tmp_path / "shuffled", ids=[IDS[n] for n in order], **settings))
    table = SidTable.load(mapped)
    assert np.array_equal(shuffled.align(IDS).codes, table.codes) and len(np.unique(table.codes, axis=0)) == N
    assert read_json(mapped / "intrinsic.json")["fit_rows"] == 120
    other = SidTable.load(mmsid.quantize_vectors(x, tmp_path / "seed", ids=IDS, **settings, seed=1))
    assert not np.array_equal(other.raw_codes, table.raw_codes)


def test_a_sample_gives_the_nearest_codes_and_all_vectors_the_codes_of_the_fit(tmp_path):
    x = clustered()
    folder = mmsid.quantize_vectors(x, tmp_path / "sample", fit_rows=200, **SMALL)
    codebooks = ResidualCodebooks.load(folder / "codebooks.safetensors")
    assert np.array_equal(SidTable.load(folder).raw_codes, codebooks.encode(read_tensors(folder / "embeddings.safetensors")["embeddings"]))


def test_behaviour_is_fused_and_items_without_it_are_read_by_content(tmp_path, capsys):
    x, behaviour = clustered(), clustered(N, 4, seed=5)
    write_parquet(tmp_path / "x.parquet", x)
    known = list(range(0, N, 2))
    rows = [behaviour[n] for n in known] + [np.ones(4), [np.nan, 0, 0, 0]]
    write_parquet(tmp_path / "towers.parquet", rows, [IDS[n] for n in known] + ["unknown", IDS[1]])
    arguments = ["--behaviour", str(tmp_path / "towers.parquet"), "--behaviour-weight", "2", "--codebook-size", "8", "--num-levels", "3"]
    main(["quantize", str(tmp_path / "x.parquet"), *arguments, "--out", str(tmp_path / "out")])
    table = SidTable.load(tmp_path / "out")
    assert [source == "behaviour" for source in table.source] == [n % 2 == 0 for n in range(N)]
    vectors = np.where(np.arange(N)[:, None] % 2 == 0, unit_rows(behaviour), 0)
    fused = fuse(unit_rows(x), vectors, 2.0)
    assert np.allclose(read_tensors(tmp_path / "out" / "embeddings.safetensors")["embeddings"], fused, atol=1e-6)
    assert np.array_equal(table.raw_codes, fit_quantizer("balanced_rq", fused, 3, 8, 0).codes)
    report = capsys.readouterr().out
    assert "150 of 300 items have a vector" in report and "1 rows belong to no item; unusable rows: 1 not_finite" in report
    assert read_manifest(tmp_path / "out")["counts"]["behaviour"] == 150
    write_parquet(tmp_path / "others.parquet", behaviour, [f"other{n}" for n in range(N)])
    with pytest.raises(CatalogError, match="none of its ids is an item"):
        mmsid.quantize_vectors(tmp_path / "x.parquet", tmp_path / "none", behaviour=tmp_path / "others.parquet")


def test_unusable_vectors_are_listed_with_their_rows_and_nothing_is_lost(tmp_path, capsys):
    x: list = list(clustered())
    x[3], x[10], x[11], x[12], x[13] = None, np.zeros(D), [1.0] * 5, [np.nan] * D, []
    x[14] = [1e39] + [0.0] * (D - 1)  # infinite as float32
    x[20] = x[21]
    write_parquet(tmp_path / "x.parquet", x, kind=pa.float64())
    main(["quantize", str(tmp_path / "x.parquet"), "--codebook-size", "8", "--num-levels", "3", "--out", str(tmp_path / "out")])
    problems = read_table(tmp_path / "out" / "problems.parquet").to_pylist()
    found = [(one["item_id"], one["row"], one["reason"], one["length"]) for one in problems]
    assert found == [
        ("ad3", 4, "missing", 0),
        ("ad10", 11, "zero", 6),
        ("ad11", 12, "wrong_length", 5),
        ("ad12", 13, "not_finite", 6),
        ("ad13", 14, "missing", 0),
        ("ad14", 15, "not_finite", 6),
    ]
    table = SidTable.load(tmp_path / "out")
    assert table.item_ids == [one for one in IDS if one not in {problem["item_id"] for problem in problems}]
    assert read_manifest(tmp_path / "out")["counts"] == {"in": N, "ok": N - 6, "quarantined": 6, "exact_duplicates": 1}
    assert table.sid("ad20") == table.sid("ad21") and len(np.unique(table.codes, axis=0)) == N - 7
    assert "wrong_length: 1" in (report := capsys.readouterr().out) and "row 12 (5 numbers, expected 6)" in report


def test_more_than_half_unusable_is_an_error(tmp_path):
    x = clustered()
    x[: N // 2 + 1] = 0
    with pytest.raises(CatalogError, match=r"151 of 300 vectors cannot be used: 151 zero \(vectors row 1, vectors row 2"):
        mmsid.quantize_vectors(x, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_sizes_by_hand():
    # the smallest power of two K with K^3 >= 10 N: 16^3 = 4,096 >= 3,000; 256^3 = 16.8 million >= 10 million; 512^3 = 134 million
    assert [(s.codebook_size, s.num_levels) for s in map(propose, (300, 10**6, 10**7))] == [(16, 3), (256, 3), (512, 3)]
    # 1.3e8 items: three levels would need 2,048 codes (1,024^3 = 1.07e9 < 1.3e9); 256^4 = 4.3e9, 128^4 = 2.7e8
    assert (propose(13 * 10**7).codebook_size, propose(13 * 10**7).num_levels) == (256, 4)
    assert propose(10**6, codebook_size=100).num_levels == 4  # 100^3 = 10^6 < 10^7 <= 100^4
    assert propose(10**6, num_levels=2).codebook_size == 4096  # 2,048^2 = 4.2e6 < 10^7 <= 4,096^2 = 1.7e7
    sizes = propose(3, codebook_size=2, num_levels=2)
    # 4 paths, 3 items: each shares its path with probability 1 - (3/4)^2 = 7/16; 3 x 7/16 = 1.3125
    assert sizes.capacity == 4 and sizes.load == 0.75 and sizes.expected_collisions == pytest.approx(1.3125)
    listed = [(name, s.codebook_size, s.num_levels) for name, s in alternatives(propose(10**6))]
    assert listed == [
        ("chosen", 256, 3),
        ("half the codes", 128, 3),
        ("twice the codes", 512, 3),
        ("one level less", 4096, 2),  # 2,048^2 < 10^7
        ("one level more", 64, 4),  # 32^4 = 1.0e6 < 10^7 <= 64^4 = 1.7e7
    ]
    drawn = np.random.default_rng(0).integers(4096, size=(200, 300))
    sharing = np.mean([(np.bincount(row, minlength=4096)[row] > 1).sum() for row in drawn])
    assert propose(300).expected_collisions == pytest.approx(sharing, rel=0.05)


def test_the_proposal_is_printed_before_the_work_and_used(tmp_path, capsys):
    np.save(tmp_path / "x.npy", clustered())
    main(["quantize", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")])
    assert SidTable.load(tmp_path / "out").codebook_sizes == (16, 16, 16)
    printed = capsys.readouterr()
    early = printed.err[: printed.err.index("fitting")]
    # 300 items in 4,096 paths: 300 (1 - (4095/4096)^299) = 21.1
    assert "Proposed: K = 16 codes at L = 3 levels for 300 items. That is 4,096 paths, 0.0732 items per path." in early
    assert "| chosen | 16 | 3 | 4,096 | 0.0732 | 21 | 7 % | 48 |" in early and early.count("\n| ") == 6
    assert early[early.index("| chosen") :].split("\n")[0] in printed.out


def test_more_items_than_sids_is_an_error_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"300 items, but 2 levels of 16 codes give 256 SIDs; .*3 levels of 16"):
        mmsid.quantize_vectors(clustered(), tmp_path / "out", codebook_size=16, num_levels=2)
    assert list(tmp_path.iterdir()) == []
    folder = mmsid.quantize_vectors(clustered(), tmp_path / "out", codebook_size=16, num_levels=2, collisions="none")
    assert len(SidTable.load(folder)) == N  # collisions are kept, so that there may be fewer SIDs than items


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f / "absent.parquet", "does not exist"),
        (lambda f: (f / "x.bin").write_bytes(b"1") and f / "x.bin", r"ends in '\.bin'; name a \.parquet or \.npy file"),
        (lambda f: (f / "x.npy").write_bytes(b"no numpy") and f / "x.npy", r"cannot be read as \.npy"),
        (lambda f: (f / "x.parquet").write_bytes(b"no parquet") and f / "x.parquet", "cannot be read as parquet"),
        (lambda f: np.save(f / "x.npy", np.zeros(3)) or f / "x.npy", r"float64 of shape \(3,\), expected a matrix"),
        (lambda f: np.save(f / "x.npy", np.array(["a"])) or f / "x.npy", "expected a matrix of numbers"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "holds no parquet file and no saved dataset"),
        (lambda f: write_parquet(f / "x.parquet", clustered(), name="v", id_name="asin") or f / "x.parquet", "no column 'item_id'.*asin"),
        (
            lambda f: write_parquet(f / "x.parquet", clustered(), ["a", *IDS[1:-1], "a"]) or f / "x.parquet",
            "row 1; .*row 300: item id 'a' occ",
        ),
        (lambda f: write_parquet(f / "x.parquet", clustered(), ["", *IDS[1:]]) or f / "x.parquet", "row 1: the item id is empty"),
        (lambda f: write_parquet(f / "x.parquet", [None] * N) or f / "x.parquet", "no row has a vector"),
    ],
)
def test_errors_name_file_and_remedy(tmp_path, make, words):
    with pytest.raises(CatalogError, match=words):
        mmsid.quantize_vectors(make(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_errors_of_columns_ids_and_dimensions(tmp_path):
    x = clustered()
    pq.write_table(pa.table({"item_id": IDS, "a": list(x), "b": list(x), "title": IDS}), tmp_path / "two.parquet")
    with pytest.raises(CatalogError, match=r"no single column of vectors; columns with lists of numbers: a, b; .*--vector-column"):
        mmsid.quantize_vectors(tmp_path / "two.parquet", tmp_path / "out")
    with pytest.raises(CatalogError, match="no column 'title' of vectors"):
        mmsid.quantize_vectors(tmp_path / "two.parquet", tmp_path / "out", vector_column="title")
    assert len(SidTable.load(mmsid.quantize_vectors(tmp_path / "two.parquet", tmp_path / "b", vector_column="b", **SMALL))) == N
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x[:, :5])
    with pytest.raises(CatalogError, match=r"y\.npy: vectors have 5 numbers, those of .*x\.npy have 6"):
        mmsid.quantize_vectors([tmp_path / "x.npy", tmp_path / "y.npy"], tmp_path / "out")
    (tmp_path / "ids.txt").write_text("\n".join(IDS[1:]))
    with pytest.raises(CatalogError, match=r"ids\.txt: 299 ids, but 300 vectors"):
        mmsid.quantize_vectors(tmp_path / "x.npy", tmp_path / "out", ids=tmp_path / "ids.txt")
    with pytest.raises(CatalogError, match=r"id 1; .*id 2: item id 'a' occurs 2 times"):
        mmsid.quantize_vectors(x, tmp_path / "out", ids=["a", "a", *IDS[2:]])
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"item_id": IDS, "vector": x.tolist()}) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(CatalogError, match=r"holds the splits train, test; name the folder of one of them"):
        mmsid.quantize_vectors(tmp_path / "splits", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"quantize\.method is 'opq'"):
        mmsid.quantize_vectors(x, tmp_path / "out", method="opq")


def test_arrays_that_changed_are_noticed(tmp_path):
    x = clustered()
    folder = mmsid.quantize_vectors(x, tmp_path / "out", ids=IDS, **SMALL)
    before = (folder / "sids.parquet").stat().st_mtime_ns
    assert mmsid.quantize_vectors(x, tmp_path / "out", ids=IDS, **SMALL) == folder
    assert (folder / "sids.parquet").stat().st_mtime_ns == before
    x[5] += 1
    with pytest.raises(ArtifactError, match="array_sha256 was"):
        mmsid.quantize_vectors(x, tmp_path / "out", ids=IDS, **SMALL)
    with pytest.raises(ArtifactError, match="array_sha256 was"):
        mmsid.quantize_vectors(clustered(), tmp_path / "out", ids=IDS[::-1], **SMALL)


def test_a_kill_publishes_nothing_and_the_next_run_starts_again(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmsid.tokenizer.quantize_vectors.write_sid_folder", killed)
        mmsid.quantize_vectors(clustered(), tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    folder = mmsid.quantize_vectors(clustered(), tmp_path / "out", **SMALL)
    verify_folder(folder)
    assert not list(folder.glob("*.scratch")) and not (tmp_path / ".out.draft").exists()


@pytest.mark.slow
def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "quantize.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    commands = [shlex.split(line.split("  #")[0]) for line in lines if line.startswith("mmsid quantize")]
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    write_vectors(tmp_path)
    for command in commands:
        main([*command[1:], "--out", f"out{commands.index(command)}"] if "--out" not in command else command[1:])
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(snippet, {})
    assert len(list(tmp_path.rglob("sids.parquet"))) == len(commands) + 1
