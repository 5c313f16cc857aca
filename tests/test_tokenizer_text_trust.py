"""Free text may not decide alone where a Semantic ID begins: arithmetic by hand, and the stage on a tiny catalogue."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_tokenizer_train import settings
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog

from mmsid.artifacts import read_manifest, read_table
from mmsid.sids.folder import read_sid_folder
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.heads import ParallelHead
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import Encoded
from mmsid.tokenizer.text_trust import disagreement, evidence_fields, held_to_evidence


def encoded(codes: list[list[int]], logits: list[list[float]]) -> Encoded:
    n = len(codes)
    scores = torch.tensor(logits)[:, None].expand(-1, 2, -1)
    return Encoded(torch.tensor(codes), torch.full((n, 2), float(codes[0][0])), torch.zeros(n), scores)


class Answers:
    """A tokenizer whose answer to the evidence is known."""

    def __init__(self, evidence: Encoded) -> None:
        self.evidence, self.head = evidence, ParallelHead(2, 2, 3)

    def encode(self, items, batch_size: int) -> Encoded:
        return self.evidence


def test_nats_by_hand_and_who_is_overruled():
    # evidence of all: code 0 at 3 nats, code 1 at 2, code 2 at 0; relative to the best: 0, 1, 3
    evidence = encoded([[0, 0]] * 4, [[3.0, 2.0, 0.0]] * 4)
    full = encoded([[0, 1], [1, 1], [2, 1], [2, 1]], [[0.0, 0.0, 9.0]] * 4)
    tokenizer = Answers(evidence)
    assert disagreement(tokenizer.head, full.raw_codes, evidence).tolist() == pytest.approx([0, 1, 3, 3])
    items = [ItemInput("a"), ItemInput("a"), ItemInput("a"), ItemInput("")]  # the last has nothing but its title
    held, overruled = held_to_evidence(tokenizer, full, items, 1.5)
    assert overruled.tolist() == [False, False, True, False]
    assert held.raw_codes.tolist() == [[0, 1], [1, 1], [0, 0], [2, 1]]
    assert held.scores[2].tolist() == evidence.scores[2].tolist() and held.scores[1].tolist() == full.scores[1].tolist()
    assert held_to_evidence(tokenizer, full, items, 0.0)[1].tolist() == [False, True, True, False]


def test_free_text_is_title_and_description():
    assert evidence_fields(("title", "caption", "description", "pictures")) == ("caption", "pictures")


def test_the_stage_names_whom_it_overruled_and_a_title_changes_no_beginning(tmp_path):
    catalog = write_catalog(tmp_path, items=32, users=8)
    captions, interests = write_annotations(tmp_path, catalog)
    world = {"catalog": catalog, "captions": captions, "interests": interests, "bert": tiny_bert(tmp_path / "bert")}
    tokenizer = train.run(settings(world, tmp_path / "tokenizer", steps=0, reconstruct="off"))
    config = assign.AssignConfig(out=tmp_path / "clean", tokenizer=tokenizer, catalog=catalog, captions=captions, interests=interests)
    rows = pq.read_table(catalog.items).to_pylist()
    for row in rows[:8]:
        row["title"] = "green garden lamp lamp lamp for summer"
    table = pq.read_table(catalog.items)
    spoilt = catalog.model_copy(update={"items": tmp_path / "spoilt.parquet"})
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), spoilt.items)
    first = {}
    for name, where, nats in (("clean", catalog, 0.0), ("spoilt", spoilt, 0.0), ("as_is", spoilt, None)):
        out = assign.run(config.model_copy(update={"out": tmp_path / name, "catalog": where, "free_text_nats": nats}))
        first[name] = read_sid_folder(out).align([row["item_id"] for row in rows]).raw_codes[:, 0]
        if nats is not None:
            overruled = read_table(out / "overruled.parquet")["item_id"].to_pylist()
            assert read_manifest(out)["counts"]["overruled"] == len(overruled) > 0
    assert np.array_equal(first["spoilt"], first["clean"])
    assert not np.array_equal(first["as_is"], first["clean"])
