"""Stage `text_quality`: pairs within their part, metrics by hand, the text model, labels of a judge and of the demo catalogue."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from mmsid.annotate.quality.calibration import accuracy_per_kind, fit_platt, item_quality, pair_accuracy, probability, reliability
from mmsid.annotate.quality.demo_examples import demo_examples, read_demo_facts, true_descriptors
from mmsid.annotate.quality.examples import Example, Pair, judged_examples, part_of, preference_pairs
from mmsid.annotate.quality.model import TextModelConfig, build_text_model, encode, score_ids
from mmsid.annotate.quality.stage import TextQualityConfig, evidence_text, run
from mmsid.annotate.readers import read_captions, read_text_quality
from mmsid.artifacts import is_complete, read_json, read_manifest, read_table, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.demo.facts import caption, interests, random_facts, texts
from mmsid.errors import ConfigError, MmsidError

QUICK = {"steps": 250, "batch": 32, "width": 48}


def write_drawn(folder, items: int = 150) -> CatalogConfig:
    """Facts, texts, captions and interests of demo ads without pictures. Every tenth ad has the interests of another."""
    rng = np.random.default_rng(0)
    facts = [random_facts(rng) for _ in range(items)]
    written = [texts(one, rng) for one in facts]
    ids = [f"ad{row}" for row in range(items)]
    pq.write_table(
        pa.table({"item_id": ids, "title": [one[0] for one in written], "description": [one[1] for one in written]}),
        folder / "items.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist([{"item_id": name, **dataclasses.asdict(one)} for name, one in zip(ids, facts)]), folder / "truth.parquet"
    )
    for stage in ("caption", "interests"):
        with writing(folder / stage, stage=stage, config={}) as draft:
            (draft.path / "shards").mkdir()
            rows = []
            for number, one in enumerate(facts):
                mined = interests(facts[number - 1] if number % 10 == 9 else one)
                record = {"descriptors": json.dumps(mined["descriptors"]), "summary": mined["summary"], "source": "llm"}
                row = {"item_id": ids[number], "creative": 0, "status": "ok", "flags": []}
                rows.append(row | (record if stage == "interests" else {"caption": caption(one)}))
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "shards" / "part-00000.parquet")
            draft.extra["source"] = "llm"
    return CatalogConfig(items=folder / "items.parquet")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, write_drawn(folder)


def config_for(drawn, out, **changes) -> TextQualityConfig:
    folder, catalog = drawn
    inputs = {"catalog": catalog, "interests": folder / "interests", "captions": folder / "caption", "truth": folder / "truth.parquet"}
    return TextQualityConfig(**{"out": out, **inputs, "model": QUICK} | changes)


# Arithmetic


def test_metrics_by_hand():
    assert pair_accuracy(np.array([1.0, -2.0, 0.0, 3.0])) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    pairs = [Pair(Example(0, "x", 1, "right"), Example(0, "y", 0, kind)) for kind in ("vague", "borrowed", "vague")]
    found = accuracy_per_kind(np.array([1.0, -1.0, -1.0]), pairs)
    assert found == {"borrowed": {"pairs": 1, "accuracy": 0.0}, "vague": {"pairs": 2, "accuracy": 0.5}}
    # two bins: mean q .1 with half of the labels good, mean q .95 with all labels good
    measured = reliability(np.array([0.05, 0.15, 0.9, 1.0]), np.array([0, 1, 1, 1]), bins=5)
    assert measured["calibration_error"] == pytest.approx(0.5 * abs(0.1 - 0.5) + 0.5 * abs(0.95 - 1))
    assert [row["size"] for row in measured["curve"]] == [2, 2]
    assert item_quality(np.array([0.9, 0.3]), np.array([1.0, 0.0])) == pytest.approx(0.75)
    assert item_quality(np.array([0.0, 0.0]), np.array([1.0, 0.0])) == pytest.approx(0.5)


def test_platt_scaling_recovers_its_coefficients():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=20_000)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-(2 * scores - 1)))).astype(int)
    a, b = fit_platt(scores, labels)
    assert a == pytest.approx(2, abs=0.1) and b == pytest.approx(-1, abs=0.1)
    assert probability(np.array([0.5]), (2.0, -1.0))[0] == pytest.approx(0.5)


def test_pairs_take_a_good_descriptor_of_the_item_or_else_of_another():
    good, bad = Example(0, "g0", 1, "accepted"), Example(0, "b0", 0, "refused")
    alone, spare = Example(1, "b1", 0, "refused"), Example(2, "g2", 1, "accepted")
    pairs = preference_pairs([good, bad, alone, spare], np.random.default_rng(0))
    assert pairs[0] == Pair(good, bad) and pairs[1].rejected == alone and pairs[1].chosen in (good, spare)
    assert preference_pairs([bad, alone], np.random.default_rng(0)) == []


def test_parts_depend_on_content_and_have_about_their_shares(drawn):
    items = read_catalog(drawn[1]).items
    parts = [part_of(item, 0, (0.1, 0.2)) for item in items]
    assert 0.1 < parts.count("held_out") / len(items) < 0.3 and parts.count("calibrate") > 4
    renamed = [dataclasses.replace(item, item_id=f"z{at}") for at, item in enumerate(items)]
    assert [part_of(item, 0, (0.1, 0.2)) for item in renamed] == parts


def test_bad_demo_examples_are_wrong_and_held_out_vague_phrases_are_new(drawn):
    folder, config = drawn
    facts = read_demo_facts(folder / "truth.parquet", read_catalog(config).items)
    rng = np.random.default_rng(0)
    fitted = demo_examples(facts, range(100), rng, held_out=False)
    tested = demo_examples(facts, range(100, 150), rng, held_out=True)
    for example in fitted + tested:
        assert (example.descriptor in true_descriptors(facts[example.row])) == bool(example.label), example
    assert {example.kind for example in fitted} == {"right", "vague", "contradicted", "borrowed"}
    phrases = [{example.descriptor for example in part if example.kind == "vague"} for part in (fitted, tested)]
    assert not phrases[0] & phrases[1]
    borrowed = {example.descriptor for example in tested if example.kind == "borrowed"}
    assert borrowed <= {text for row in range(100, 150) for text in true_descriptors(facts[row])}  # items of the held-out part only
    with pytest.raises(ConfigError, match="lacks 1 items"):
        missing = read_table(folder / "truth.parquet").slice(1)
        pq.write_table(missing, folder / "short.parquet")
        read_demo_facts(folder / "short.parquet", read_catalog(config).items)


# The model


def test_equal_inputs_get_equal_scores_in_any_batch():
    model, text_tokenizer = build_text_model(TextModelConfig(width=16), seed=0)
    torch.nn.init.normal_(model.together.weight)
    model.eval()
    ids = [encode(text_tokenizer, one, "a red striped shoe " * length, 64) for one, length in (("bold", 1), ("calm days", 9), ("bold", 1))]
    together = score_ids(model, ids)
    assert together[0] == together[2] != together[1]
    assert score_ids(model, ids[:1])[0] == pytest.approx(together[0], abs=1e-5)
    assert all(len(row) <= 64 for row in ids)
    again, _ = build_text_model(TextModelConfig(width=16), seed=0)
    assert torch.equal(again.descriptor.weight, model.descriptor.weight)


def test_any_encoder_or_causal_model_can_be_the_text_model(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    model, text_tokenizer = build_text_model(TextModelConfig(path=str(folder)), seed=0)
    assert np.isfinite(score_ids(model.eval(), [encode(text_tokenizer, "red shoe", "a red shoe", 32)])).all()
    causal = AutoTokenizer.from_pretrained(folder, sep_token=None, cls_token=None, eos_token="[SEP]")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(causal), **sizes)).save_pretrained(tmp_path / "causal")
    causal.save_pretrained(tmp_path / "causal")
    model, text_tokenizer = build_text_model(TextModelConfig(path=str(tmp_path / "causal")), seed=0)
    ids = encode(text_tokenizer, "red shoe", "a blue bag " * 30, 24)
    assert len(ids) == 24 and ids[-1] == text_tokenizer.eos_token_id and "red shoe" in text_tokenizer.decode(ids)
    assert np.isfinite(score_ids(model.eval(), [ids])).all()
    with pytest.raises(ConfigError, match=r"text_quality\.model\.path"):
        build_text_model(TextModelConfig(path=str(tmp_path / "none")), seed=0)


# The stage


@pytest.mark.slow
def test_training_on_demo_facts_scores_mined_descriptors(drawn, tmp_path):
    folder, catalog = drawn
    out = run(config_for(drawn, tmp_path / "text_quality", least_accuracy=0.75, most_calibration_error=0.3))
    extra = read_manifest(out, "text_quality")["extra"]
    assert extra["labels"] == "truth" and extra["accuracy"] >= 0.75 and extra["accuracy_per_kind"]["vague"]["accuracy"] > 0.8
    assert {"calibration_error", "curve", "least_accuracy"} <= extra.keys()
    rows = read_table(out / "descriptors.parquet").to_pylist()
    assert len(rows) == 450 and all(0 <= row["q"] <= 1 for row in rows)
    facts = dict(
        zip([item.item_id for item in read_catalog(catalog).items], read_demo_facts(folder / "truth.parquet", read_catalog(catalog).items))
    )
    right = np.array([row["descriptor"] in true_descriptors(facts[row["item_id"]]) for row in rows])
    q = np.array([row["q"] for row in rows])
    assert 0 < (~right).sum() < 60 and q[right].mean() > q[~right].mean() + 0.2  # descriptors of other ads get lower q
    ids = [item.item_id for item in read_catalog(catalog).items]
    by_item = read_text_quality(out, ids)
    own = [row for row in rows if row["item_id"] == ids[0]]
    expected = np.average([row["q"] for row in own], weights=[row["confidence"] for row in own])
    assert by_item[0] == pytest.approx(expected) and len(by_item) == 150
    item, captions = read_catalog(catalog).items[0], read_captions(folder / "caption")
    evidence = evidence_text(item, captions[item.item_id])
    text_tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    scores = score_ids(model, [encode(text_tokenizer, row["descriptor"], evidence, 128) for row in own])
    assert scores == pytest.approx([row["score"] for row in own], abs=1e-5)


def test_a_model_below_the_thresholds_is_not_published(drawn, tmp_path):
    with pytest.raises(MmsidError, match=r"of the held-out pairs correctly .*least_accuracy is 0\.8"):
        run(config_for(drawn, tmp_path / "text_quality", model=QUICK | {"steps": 1}))
    assert not is_complete(tmp_path / "text_quality")
    assert read_json(tmp_path / ".text_quality.draft" / "report.json")["accuracy"] < 0.8


def test_training_on_the_labels_of_a_judge(tmp_path):
    catalog = write_catalog(tmp_path, items=60)
    captions, mined = write_annotations(tmp_path, catalog)  # descriptors "cheap" and "likes <title>"
    with writing(tmp_path / "judge", stage="judge", config={}) as draft:
        (draft.path / "shards").mkdir()
        rows = [
            {"item_id": f"i{n}", "creative": place, "status": "ok", "flags": [], "label": str(place)} for n in range(60) for place in (0, 1)
        ]
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "shards" / "part-00000.parquet")
    inputs = {"catalog": catalog, "interests": mined, "captions": captions, "model": QUICK | {"steps": 60}}
    out = run(TextQualityConfig(out=tmp_path / "quality", judgements=tmp_path / "judge", **inputs))
    report = read_json(out / "report.json")
    assert report["accuracy"] > 0.95 and list(report["accuracy_per_kind"]) == ["refused"]
    rows = read_table(out / "descriptors.parquet").to_pylist()
    assert all((row["q"] > 0.5) == (row["descriptor"] != "cheap") for row in rows)
    ids = [item.item_id for item in read_catalog(catalog).items]
    known = {row["item_id"]: row["q"] for row in read_table(out / "items.parquet").to_pylist()}
    assert known["i0"] is None and known["i59"] is None  # flagged sensitive, quarantined
    quality = read_text_quality(out, ids)
    assert quality[ids.index("i0")] == pytest.approx(np.mean([q for q in known.values() if q is not None]))
    with pytest.raises(ConfigError, match=r"interests are given without labels; set text_quality\.judgements"):
        run(TextQualityConfig(out=tmp_path / "other", **inputs))
    assert judged_examples(read_catalog(catalog).items, {}, {}) == []


@pytest.mark.parametrize("source", [None, "coengagement"])
def test_quality_is_one_without_mined_interests(source, tmp_path):
    catalog = write_catalog(tmp_path, items=5, sequences=False)
    if source:
        with writing(tmp_path / "interests", stage="interests", config={}) as draft:
            draft.extra["source"] = source
    out = run(TextQualityConfig(out=tmp_path / "quality", catalog=catalog, interests=tmp_path / "interests" if source else None))
    assert read_text_quality(out, ["i3", "i1"]).tolist() == [1.0, 1.0]
    assert read_manifest(out)["extra"]["text_quality"].startswith("1 for every item: ")
