"""Limit on free text: arithmetic by hand, and the stage `assign` on a tiny catalogue."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_tokenizer_train import settings
from tiny_backbones import tiny_bert
from tiny_catalog import write_annotations, write_catalog

from mmsid.artifacts import read_manifest, read_table
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.heads import ParallelHead
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import Encoded
from mmsid.tokenizer.text_trust import disagreement, limit_free_text, trusted_fields


def encoded(codes: list[list[int]], logits: list[list[float]]) -> Encoded:
    n = len(codes)
    scores = torch.tensor(logits)[:, None].expand(-1, 2, -1)
    return Encoded(torch.tensor(codes), torch.full((n, 2), float(codes[0][0])), torch.zeros(n), scores)


class FixedTokenizer:
    """A tokenizer with fixed encodings of the items without free text."""

    def __init__(self, trusted: Encoded) -> None:
        self.trusted, self.head = trusted, ParallelHead(2, 2, 3)

    def encode(self, items) -> Encoded:
        return self.trusted


def test_disagreement_by_hand_and_replaced_rows():
    # logits without free text: code 0 at 3 nats, code 1 at 2, code 2 at 0; gaps to the best: 0, 1, 3
    trusted = encoded([[0, 0]] * 4, [[3.0, 2.0, 0.0]] * 4)
    full = encoded([[0, 1], [1, 1], [2, 1], [2, 1]], [[0.0, 0.0, 9.0]] * 4)
    tokenizer = FixedTokenizer(trusted)
    assert disagreement(tokenizer.head, full.raw_codes, trusted).tolist() == pytest.approx([0, 1, 3, 3])
    items = [ItemInput("a"), ItemInput("a"), ItemInput("a"), ItemInput("")]  # the last is empty without its title
    limited, overruled = limit_free_text(tokenizer, full, items, 1.5)
    assert overruled.tolist() == [False, False, True, False]
    assert limited.raw_codes.tolist() == [[0, 1], [1, 1], [0, 0], [2, 1]]
    assert limited.scores[2].tolist() == trusted.scores[2].tolist() and limited.scores[1].tolist() == full.scores[1].tolist()
    assert limit_free_text(tokenizer, full, items, 0.0)[1].tolist() == [False, True, True, False]


def test_free_text_is_title_and_description():
    assert trusted_fields(("title", "caption", "description", "pictures")) == ("caption", "pictures")


def test_titles_do_not_change_the_first_code_at_zero_nats(tmp_path):
    catalog = write_catalog(tmp_path, items=32, users=8)
    captions, interests = write_annotations(tmp_path, catalog)
    world = {"catalog": catalog, "captions": captions, "interests": interests, "bert": tiny_bert(tmp_path / "bert")}
    tokenizer = train.run(settings(world, tmp_path / "tokenizer", steps=0, reconstruct="off"))
    config = assign.AssignConfig(
        out=tmp_path / "clean", tokenizer=tokenizer, catalog=catalog, captions=captions, interests=interests, behaviour="none"
    )
    rows = pq.read_table(catalog.items).to_pylist()
    for row in rows[:8]:
        row["title"] = "green garden lamp lamp lamp for summer"
    table = pq.read_table(catalog.items)
    attacked = catalog.model_copy(update={"items": tmp_path / "attacked.parquet"})
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), attacked.items)
    first = {}
    for name, where, nats in (("clean", catalog, 0.0), ("attacked", attacked, 0.0), ("as_is", attacked, None)):
        out = assign.run(config.model_copy(update={"out": tmp_path / name, "catalog": where, "free_text_nats": nats}))
        first[name] = SidTable.load(out).align([row["item_id"] for row in rows]).raw_codes[:, 0]
        if nats is not None:
            overruled = read_table(out / "overruled.parquet")["item_id"].to_pylist()
            assert read_manifest(out)["counts"]["overruled"] == len(overruled) > 0
    assert np.array_equal(first["attacked"], first["clean"])
    assert not np.array_equal(first["as_is"], first["clean"])
