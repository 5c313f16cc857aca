"""Semantic IDs, a catalogue and a language model for tests of exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny_backbones import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from mmsid.artifacts import write_tensors
from mmsid.sids.table import SidTable

CODES = np.array([[0, 1, 2], [0, 1, 2], [0, 0, 3], [2, 1, 0], [2, 1, 1]])
IDS = ["ant", "bee", "cat", "dog", "eel"]
SIZES = (3, 2, 4)


def sid_folder(folder, codes=CODES, ids=IDS, sizes=SIZES, embeddings=None, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    SidTable.from_codes(ids, codes, sizes, **columns).save(folder / "sids.parquet")
    if embeddings is not None:
        write_tensors(folder / "embeddings.safetensors", {"embeddings": torch.from_numpy(embeddings)})
    return folder


def tiny_language_model(folder: Path) -> Path:
    """A tiny causal model with tied embeddings and three spare rows, beside its tokenizer."""
    torch.manual_seed(0)
    text_tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(text_tokenizer) + 3, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return folder


def shop(folder):
    """A catalogue of five items, two of whose texts would break MiniOneRec's files, and three users."""
    titles = ["red\tshoe", "blue shoe", "lamp\nfor home", "", "Käse"]
    descriptions = ["['__import__(\"os\").abort()']", "plain", None, "a chair", ""]
    pq.write_table(pa.table({"item_id": IDS, "title": titles, "description": descriptions}), folder / "items.parquet")
    users = {"user_id": ["u0", "u1", "u2"], "items": [["ant", "bee", "cat", "dog", "eel"], ["eel", "dog", "cat"], ["bee", "ant"]]}
    pq.write_table(pa.table(users), folder / "sequences.parquet")
    config = {"items": str(folder / "items.parquet"), "sequences": str(folder / "sequences.parquet"), "fields": {"sequence": "items"}}
    (folder / "shop.yaml").write_text(f"name: shop\nruns: {folder / 'runs'}\ncatalog: {json.dumps(config)}\n")
    return folder / "shop.yaml"
