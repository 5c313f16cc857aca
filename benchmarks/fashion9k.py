"""Do captions carry what a photo shows? fashion9k, held-out photos only, several seeds.

    OMP_NUM_THREADS=1 python benchmarks/fashion9k.py --seeds 0 1 2 --out runs/fashion9k_bench

Per seed: train a captioner on 80 % of the photos (split by picture hash, other photos held out per seed), caption all, then make
Semantic IDs without titles in four ways: our tokenizer reading the captions, our tokenizer reading the pixels through the captioner's
own network, and RQ-KMeans on each (caption embeddings; frozen tower features). Everything is measured on the held-out photos:

- caption field accuracy, against the majority class and a linear probe on the captioner's frozen tower (fitted on the 80 %);
- V-measure of the SID prefixes per category depth, colliding share of the raw codes, perplexity per level;
- retrieval of photos of the same full title (exact duplicate pictures are left out): R@10 by the longest common SID prefix (ties at
  expectation), and by the embedding.

Writes one JSON per seed as it comes, then results.json and results.md with mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import catalog_set
from mmsid.annotate.captioner.evaluate import field_accuracy, linear_probe, majority_accuracy, tower_features
from mmsid.annotate.readers import read_captions
from mmsid.artifacts import read_json, read_tensors, write_json
from mmsid.backbone.embed import embed_texts
from mmsid.catalog import read_catalog
from mmsid.catalog.tables import read_table_rows
from mmsid.config import StageConfig, load_yaml
from mmsid.quantize.rqkmeans import rq_kmeans
from mmsid.sids.folder import read_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.retrieval import prefix_recall, retrieval_recall
from mmsid.sids.table import SidTable
from mmsid.stages import run_stages, stage_configs

K = 10


def main() -> None:
    """Run every seed that has no result yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "fashion9k.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/fashion9k_bench"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    for seed in parsed.seeds:
        result = parsed.out / f"seed{seed}.json"
        if not result.exists():
            write_json(result, one_seed(parsed.config, seed, parsed.out, parsed.overrides))
    results = summarise([read_json(parsed.out / f"seed{seed}.json") for seed in parsed.seeds])
    write_json(parsed.out / "results.json", results)
    page = table(results)
    (parsed.out / "results.md").write_text(page, encoding="utf-8")
    print(page)


def one_seed(config: Path, seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, caption, make the SIDs four ways, measure on the held-out photos."""
    data = load_yaml(config, [*overrides, f"seed={seed}", f"name=seed{seed}", f"runs={out}"])
    data.pop("report", None), data.pop("baselines", None)
    # category labels are what V-measure asks for, so the tokenizers never see them: neither as input nor as contrast positives
    blind = {**data["catalog"], "fields": {**data["catalog"]["fields"], "categories": None}}
    data |= {stage: data[stage] | {"catalog": blind} for stage in ("train_tokenizer", "assign")}
    run_stages(stage_configs(data, str(config)))
    captioner = out / f"seed{seed}" / "train_captioner"
    pixels = data | {"name": f"seed{seed}_pixels"}
    for stage in ("train_captioner", "caption"):
        pixels.pop(stage)
    pixels["train_tokenizer"] = data["train_tokenizer"] | {
        "use": ["pictures"],
        "backbone": {"kind": "vlm", "path": str(captioner), **data["train_tokenizer"].get("backbone", {})},
    }
    pixel_configs = stage_configs(pixels, str(config))
    run_stages(pixel_configs)
    return measure(stage_configs(data, str(config)), pixel_configs, seed)


def measure(captioned: dict[str, StageConfig], pixels: dict[str, StageConfig], seed: int) -> dict[str, Any]:
    """All figures of one seed, on its held-out photos."""
    training: TrainCaptionerConfig = captioned["train_captioner"]  # type: ignore[assignment]
    catalog = read_catalog(training.catalog)
    side, folder = training.sizes.image_size, captioned["caption"].out.parent / "pictures"
    photos = catalog_set(training.catalog, training.targets, training.fields, training.caption_template, side, folder, seed)
    train, held = photos.rows(False), photos.rows(True)  # photos whose colour, kind or gender is not known are left out
    captions = read_captions(captioned["caption"].out)
    texts = [captions.get(item_id, "") for item_id in photos.item_ids]
    categories = [catalog.items[catalog.row_of[item_id]].categories for item_id in photos.item_ids]
    model = AutoModelForImageTextToText.from_pretrained(training.out)
    features = tower_features(model, photos.pictures)
    fields = photos.values
    learnt = {field: [fields[field][row] for row in train] for field in training.fields}
    truth = {field: [fields[field][row] for row in held] for field in training.fields}
    told = field_accuracy([texts[row] for row in held], truth, training.caption_template)
    figures: dict[str, Any] = {
        "photos": {"train": len(train), "held_out": len(held)},
        "caption": told.fields | {"all fields": told.exact},
        "linear probe": {
            field: linear_probe(features[train], [fields[field][row] for row in train], features[held], truth[field])
            for field in training.fields
        },
        "majority": {field: majority_accuracy(learnt[field], truth[field]) for field in training.fields},
    }
    spaces = {"captions": embed_texts(texts, what="caption embeddings"), "pixels": unit_variance(features)}
    tokenizer = captioned["train_tokenizer"]
    titles = title_of(training)
    pairs = same_title_pairs([titles[photos.item_ids[row]] for row in held], [photos.keys[row] for row in held])
    for name, configs in (("captions", captioned), ("pixels", pixels)):
        ours = read_sid_folder(configs["assign"].out)  # rows in the order of the catalogue without categories: not this one's
        of_photo = [ours.row_of[item_id] for item_id in photos.item_ids]
        embedding = read_tensors(configs["assign"].out / "embeddings.safetensors")["embeddings"].numpy()[of_photo]
        clustered = rq_kmeans(spaces[name], tokenizer.num_levels, tokenizer.codebook_size, seed).encode(spaces[name]).numpy()
        sizes = (tokenizer.codebook_size,) * tokenizer.num_levels
        figures[f"ours, {name}"] = sid_figures(ours.raw_codes[of_photo], sizes, embedding, categories, held, pairs)
        figures[f"RQ-KMeans, {name}"] = sid_figures(clustered, sizes, spaces[name], categories, held, pairs)
    return figures


def unit_variance(x: np.ndarray) -> np.ndarray:
    """Columns of (N, D) to mean 0 and deviation 1: the tower's widest feature should not decide alone."""
    return ((x - x.mean(0)) / np.maximum(x.std(0), 1e-6)).astype(np.float32)


def title_of(training: TrainCaptionerConfig) -> dict[str, str]:
    """Full titles by item id, for scoring only: the run's catalogue does not map them."""
    rows = read_table_rows(training.catalog.items, ["item_id", "title"], config_key="catalog.items").rows
    return {row["item_id"]: row["title"] for row in rows}


def same_title_pairs(titles: list[str], picture_keys: list[str]) -> np.ndarray:
    """(P, 2) positions among the held-out photos: ordered pairs with one full title and different picture bytes."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, title in enumerate(titles):
        groups[title].append(place)
    pairs = [(a, b) for members in groups.values() for a in members for b in members if picture_keys[a] != picture_keys[b]]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def sid_figures(
    codes: np.ndarray, sizes: tuple[int, ...], x: np.ndarray, categories: list[tuple[str, ...]], held: np.ndarray, pairs: np.ndarray
) -> dict[str, Any]:
    """Figures of one arm's raw codes (N, L) and space (N, D), on the held-out rows."""
    table = SidTable.from_codes([str(row) for row in held], codes[held], sizes)
    metrics = intrinsic_metrics(table, [categories[row] for row in held])
    matched = {record["depth"]: record["v_measure"] for record in metrics["categories"] if record["level"] == record["depth"]}
    return {
        **{f"V-measure {depth}": value for depth, value in matched.items()},
        "colliding share": metrics["published"]["colliding_share"],
        **{f"perplexity {level + 1}": record["perplexity"] for level, record in enumerate(metrics["levels"])},
        f"same title R@{K}, SID": prefix_recall(codes[held], pairs, ks=(K,))["full"][str(K)],
        f"same title R@{K}, embedding": retrieval_recall(x[held], pairs, ks=(K,))["full"][str(K)],
    }


def summarise(seeds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """row -> figure -> mean and deviation (ddof 1) over seeds."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for row in seeds[0]:
        for figure in seeds[0][row]:
            values = [seed[row][figure] for seed in seeds if figure in seed[row]]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary.setdefault(row, {})[figure] = {"mean": float(np.mean(values)), "std": deviation, "seeds": len(values)}
    return summary


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Two Markdown tables: what captions say, and what SIDs keep."""

    def cell(figure: dict[str, float] | None) -> str:
        if figure is None:
            return "-"
        digits = 1 if figure["mean"] > 1.5 else 3
        return f"{figure['mean']:.{digits}f} ± {figure['std']:.{digits}f}"

    lines = []
    for rows in (("caption", "linear probe", "majority"), tuple(row for row in results if row.startswith(("ours", "RQ")))):
        columns = list(dict.fromkeys(figure for row in rows for figure in results[row]))
        lines += ["| held-out photos | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        lines += [f"| {row} | " + " | ".join(cell(results[row].get(column)) for column in columns) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
