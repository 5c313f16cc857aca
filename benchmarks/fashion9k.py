"""Captions and Semantic IDs of product photos (fashion9k), measured on held-out photos over several seeds.

    OMP_NUM_THREADS=1 python benchmarks/fashion9k.py --seeds 0 1 2 --out runs/fashion9k_bench

Per seed: a captioner is trained on 80 % of the photos (split by picture hash, a different split per seed) and captions all of them.
Semantic IDs without titles are made in four ways: by mmsid from the captions, by mmsid from the pixels with the captioner as backbone, and
by RQ-KMeans on caption embeddings and on features of the frozen vision tower. Metrics:

- accuracy of the captions per field, beside the majority class and linear probes that are fitted on the 80 %: on the frozen tower, and on
  264 colour numbers;
- V-measure of the SID prefixes per category depth, colliding share of the raw codes, perplexity per level;
- R@10 of photos with the same full title but other bytes, by the longest common SID prefix (expectation over ties) and by the embedding.

Writes one JSON per finished seed, and results.json and results.md with mean and deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageTextToText

from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import catalog_set
from mmsid.annotate.captioner.evaluate import field_accuracy, majority_accuracy
from mmsid.annotate.captioner.model import tower
from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.annotate.captioner.training import tower_states
from mmsid.annotate.readers import read_captions
from mmsid.artifacts import read_json, read_tensors, write_json
from mmsid.backbone.embed import embed_texts
from mmsid.backbone.picture_features import colour_numbers
from mmsid.catalog import read_catalog
from mmsid.catalog.tables import read_table_rows
from mmsid.config import StageConfig, load_yaml
from mmsid.progress import track
from mmsid.quantize.rqkmeans import rq_kmeans
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.retrieval import prefix_recall, retrieval_recall
from mmsid.sids.table import SidTable
from mmsid.stages import run_stages, stage_configs

K = 10


def main() -> None:
    """Run every seed without result, then write the tables."""
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
    """Metrics of one seed: train, caption, make Semantic IDs, evaluate."""
    data = load_yaml(config, [*overrides, f"seed={seed}", f"name=seed{seed}", f"runs={out}"])
    data.pop("report", None), data.pop("baselines", None)
    # V-measure compares with the categories, so the tokenizers get none, neither as input nor as contrast positives.
    uncategorised = {**data["catalog"], "fields": {**data["catalog"]["fields"], "categories": None}}
    data |= {stage: data[stage] | {"catalog": uncategorised} for stage in ("train_tokenizer", "assign")}
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
    """All metrics of one seed, on its held-out photos."""
    training: TrainCaptionerConfig = captioned["train_captioner"]  # type: ignore[assignment]
    catalog = read_catalog(training.catalog)
    side, folder = training.sizes.image_size, captioned["caption"].out.parent / "pictures"
    photos = catalog_set(training.catalog, training.targets, training.fields, training.caption_template, side, folder, seed)
    train, held = photos.rows(False), photos.rows(True)  # photos without colour, kind or gender are left out
    captions = read_captions(captioned["caption"].out)
    texts = [captions.get(item_id, "") for item_id in photos.item_ids]
    categories = [catalog.items[catalog.row_of[item_id]].categories for item_id in photos.item_ids]
    model = AutoModelForImageTextToText.from_pretrained(training.out)
    features = tower_features(model, photos.pictures)
    fields = photos.values
    train_values = {field: [fields[field][row] for row in train] for field in training.fields}
    truth = {field: [fields[field][row] for row in held] for field in training.fields}
    template = CaptionTemplate(training.caption_template, {field: sorted(set(values) - {""}) for field, values in truth.items()})
    scored = field_accuracy([texts[row] for row in held], truth, template)
    figures: dict[str, Any] = {
        "photos": {"train": len(train), "held_out": len(held)},
        "caption": scored.fields | {"all fields": scored.exact},
        "linear probe": {
            field: linear_probe(features[train], train_values[field], features[held], truth[field]) for field in training.fields
        },
        "majority": {field: majority_accuracy(train_values[field], truth[field]) for field in training.fields},
    }
    colours = np.stack([colour_numbers(Image.fromarray(np.array(picture))) for picture in photos.pictures])
    figures["linear probe on colour numbers"] = {
        field: linear_probe(colours[train], train_values[field], colours[held], truth[field]) for field in training.fields
    }
    spaces = {"captions": embed_texts(texts, what="caption embeddings"), "pixels": unit_variance(features)}
    tokenizer = captioned["train_tokenizer"]
    titles = title_of(training)
    pairs = same_title_pairs([titles[photos.item_ids[row]] for row in held], [photos.keys[row] for row in held])
    for name, configs in (("captions", captioned), ("pixels", pixels)):
        sids = SidTable.load(configs["assign"].out)  # the catalogue without categories has another order of rows
        of_photo = [sids.row_of[item_id] for item_id in photos.item_ids]
        embedding = read_tensors(configs["assign"].out / "embeddings.safetensors")["embeddings"].numpy()[of_photo]
        clustered = rq_kmeans(spaces[name], tokenizer.num_levels, tokenizer.codebook_size, seed).encode(spaces[name]).numpy()
        sizes = (tokenizer.codebook_size,) * tokenizer.num_levels
        figures[f"mmsid (ours), {name}"] = sid_figures(sids.raw_codes[of_photo], sizes, embedding, categories, held, pairs)
        figures[f"RQ-KMeans, {name}"] = sid_figures(clustered, sizes, spaces[name], categories, held, pairs)
    return figures


@torch.inference_mode()
def tower_features(model: torch.nn.Module, pictures: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Mean and maximum over patches of the frozen tower's states: uint8 (N, S, S, 3) -> float32 (N, 2 * tower_hidden)."""
    vision = tower(model).eval()
    features = []
    for start in track(range(0, len(pictures), batch_size), "tower features", unit="batches"):
        pixels = torch.from_numpy(np.array(pictures[start : start + batch_size])).permute(0, 3, 1, 2).float() / 127.5 - 1
        states = tower_states(vision, pixels.to(model.device)).float()
        features.append(torch.cat([states.mean(1), states.amax(1)], dim=1).cpu().numpy())
    return np.concatenate(features).astype(np.float32)


def linear_probe(train_x: np.ndarray, train_y: Sequence[str], test_x: np.ndarray, test_y: Sequence[str]) -> float:
    """Test accuracy of logistic regression on standardised features (N, D). Classes absent from train count as wrong."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    probe.fit(train_x, np.asarray(train_y, dtype=str))
    return float((probe.predict(test_x) == np.asarray(test_y, dtype=str)).mean())


def unit_variance(x: np.ndarray) -> np.ndarray:
    """Columns of (N, D) standardised to mean 0 and deviation 1, so that no feature of the tower dominates the distances."""
    return ((x - x.mean(0)) / np.maximum(x.std(0), 1e-6)).astype(np.float32)


def title_of(training: TrainCaptionerConfig) -> dict[str, str]:
    """item_id -> full title, which is used for evaluation only."""
    rows = read_table_rows(training.catalog.items, ["item_id", "title"], config_key="catalog.items").rows
    return {row["item_id"]: row["title"] for row in rows}


def same_title_pairs(titles: list[str], picture_keys: list[str]) -> np.ndarray:
    """(P, 2) positions among the held-out photos: ordered pairs with equal full titles and different picture bytes."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, title in enumerate(titles):
        groups[title].append(place)
    pairs = [(a, b) for members in groups.values() for a in members for b in members if picture_keys[a] != picture_keys[b]]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def sid_figures(
    codes: np.ndarray, sizes: tuple[int, ...], x: np.ndarray, categories: list[tuple[str, ...]], held: np.ndarray, pairs: np.ndarray
) -> dict[str, Any]:
    """Metrics of one method's raw codes (N, L) and embeddings (N, D), on the held-out rows."""
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
    """Two Markdown tables: accuracy of the captions, and metrics of the Semantic IDs."""

    def cell(figure: dict[str, float] | None) -> str:
        if figure is None:
            return "-"
        digits = 1 if figure["mean"] > 1.5 else 3
        return f"{figure['mean']:.{digits}f} ± {figure['std']:.{digits}f}"

    lines = []
    for rows in (
        ("caption", "linear probe", "linear probe on colour numbers", "majority"),
        tuple(row for row in results if row.startswith(("mmsid", "RQ"))),
    ):
        columns = list(dict.fromkeys(figure for row in rows for figure in results[row]))
        lines += ["| held-out photos | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        lines += [f"| {row} | " + " | ".join(cell(results[row].get(column)) for column in columns) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
