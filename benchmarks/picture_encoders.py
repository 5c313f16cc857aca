"""Picture encoders without a language model on product photos (fashion9k): linear probes, retrieval, and Semantic IDs from pictures alone.

    OMP_NUM_THREADS=1 python benchmarks/picture_encoders.py --seeds 0 1 2 --out runs/picture_encoders

The split of each seed is that of benchmarks/fashion9k.py (80 % of the photos, by picture hash), so the rows compare with those of its
trained tower. Rows of part `probe`: the features of each encoder, and the vectors that the tokenizer makes of them, which are fitted
on the training photos only. Metrics on held-out photos: accuracy of a linear probe per field, and R@10 of photos with the same full
title but other bytes, by cosine of the standardised features. Rows of part `sids`: tokenizers that read pictures alone, trained on all
photos without their categories, with V-measure of the prefixes and R@10. Needs MMSID_DATA and the extra `pictures`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion9k import linear_probe, same_title_pairs, sid_figures, summarise, title_of, unit_variance

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, catalog_set
from mmsid.artifacts import read_json, read_tensors, write_json
from mmsid.catalog import read_catalog
from mmsid.catalog.picture_opener import PictureOpener
from mmsid.config import load_yaml
from mmsid.progress import track
from mmsid.sids.retrieval import retrieval_recall
from mmsid.sids.table import SidTable
from mmsid.stages import run_stages, stage_configs
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.picture_input import PictureInput, PictureSettings

ENCODERS = {"colours": ("colours",), "efficientnet": ("efficientnet",), "both": ("colours", "efficientnet")}
CONFIG = Path(__file__).parents[1] / "configs" / "fashion9k.yaml"
K = 10


def main() -> None:
    """Run the parts of every seed without result, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="+", choices=["probe", "sids"], default=["probe", "sids"])
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128, 256], help="dimensions of the tokenizer's picture vectors")
    parser.add_argument("--out", type=Path, default=Path("runs/picture_encoders"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    for part in parsed.parts:
        measure = probes if part == "probe" else semantic_ids
        for seed in parsed.seeds:
            path = parsed.out / f"{part}-{seed}.json"
            if not path.exists():
                write_json(path, measure(seed, parsed))
        results = summarise([read_json(parsed.out / f"{part}-{seed}.json") for seed in parsed.seeds])
        write_json(parsed.out / f"{part}.json", results)
        page = table(results)
        (parsed.out / f"{part}.md").write_text(page, encoding="utf-8")
        print(page)


def photos_of(seed: int, parsed: argparse.Namespace) -> tuple[dict[str, Any], TrainCaptionerConfig, PictureSet]:
    """Configuration, and the photos of fashion9k with the split of benchmarks/fashion9k.py."""
    data = load_yaml(CONFIG, [*parsed.overrides, f"seed={seed}", f"name=seed{seed}", f"runs={parsed.out}"])
    kept = ("runs", "name", "seed", "catalog", "train_captioner")
    training = stage_configs({key: data[key] for key in kept}, str(CONFIG))["train_captioner"]
    side, folder = 32, parsed.out / f"photos{seed}"  # pixels of the set are not used here
    photos = catalog_set(training.catalog, training.targets, training.fields, training.caption_template, side, folder, seed)
    return data, training, photos


def probes(seed: int, parsed: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Row -> figure -> value, on the held-out photos of one seed."""
    _, training, photos = photos_of(seed, parsed)
    catalog = read_catalog(training.catalog)
    train, held = photos.rows(False), photos.rows(True)
    items = [ItemInput("", catalog.items[catalog.row_of[item_id]].images) for item_id in photos.item_ids]
    titles = title_of(training)
    pairs = same_title_pairs([titles[photos.item_ids[row]] for row in held], [photos.keys[row] for row in held])
    found: dict[str, dict[str, float]] = {}

    def add(row: str, x: np.ndarray, distances: np.ndarray) -> None:
        values = {field: np.array(photos.values[field]) for field in training.fields}
        found[row] = {field: linear_probe(x[train], labels[train], x[held], labels[held]) for field, labels in values.items()}
        found[row][f"R@{K}"] = retrieval_recall(distances[held], pairs, ks=(K,))["full"][str(K)]
        print(row, found[row], flush=True)

    for name, encoders in ENCODERS.items():
        for dim in parsed.dims:
            pictures = PictureInput(PictureSettings(encoders=encoders, dim=dim), PictureOpener.of(training.catalog))
            pictures.encoder.load_pretrained()
            pictures.fit([items[row] for row in train], 1.0, seed)
            vectors = pictures.vectors(items).numpy()
            add(f"{name}, {dim} components", vectors, vectors)
        x = np.stack([pictures.features(item.pictures) for item in track(items, name, unit="photos")])
        add(name, x, unit_variance(x))
    return found


def semantic_ids(seed: int, parsed: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Row -> figure -> value of tokenizers that read pictures alone, on the held-out photos of one seed."""
    data, training, photos = photos_of(seed, parsed)
    uncategorised = {**data["catalog"], "fields": {**data["catalog"]["fields"], "categories": None}}
    catalog, held, titles = read_catalog(training.catalog), photos.rows(True), title_of(training)
    categories = [catalog.items[catalog.row_of[item_id]].categories for item_id in photos.item_ids]
    pairs = same_title_pairs([titles[photos.item_ids[row]] for row in held], [photos.keys[row] for row in held])
    found = {}
    for name, encoders in ENCODERS.items():
        settings = data["train_tokenizer"] | {"use": ["pictures"], "pictures": list(encoders), "catalog": uncategorised}
        run = {"runs": str(parsed.out), "name": f"sids{seed}_{name}", "seed": seed, "catalog": data["catalog"], "train_tokenizer": settings}
        configs = stage_configs(run | {"assign": data["assign"] | {"catalog": uncategorised}}, str(CONFIG))
        run_stages(configs)
        sids, sizes = SidTable.load(configs["assign"].out), (settings["codebook_size"],) * settings["num_levels"]
        rows = [sids.row_of[item_id] for item_id in photos.item_ids]
        embedding = read_tensors(configs["assign"].out / "embeddings.safetensors")["embeddings"].numpy()[rows]
        found[f"mmsid (ours), {name}"] = sid_figures(sids.raw_codes[rows], sizes, embedding, categories, held, pairs)
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of means and deviations over seeds."""
    columns = list(dict.fromkeys(figure for row in results.values() for figure in row))
    lines = ["| held-out photos | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row, figures in results.items():
        cells = [f"{figures[column]['mean']:.3f} ± {figures[column]['std']:.3f}" for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
