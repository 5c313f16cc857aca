"""`mmsid quantize`, `inspect`, `churn` and `export`."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from mmsid.artifacts import rewriting, write_json
from mmsid.cli.stages import ingested_catalog
from mmsid.config import build
from mmsid.errors import ConfigError
from mmsid.progress import done, show
from mmsid.stages import run_unless_finished


def churn(arguments: list[str]) -> None:
    """Compare two SID folders."""
    parser = argparse.ArgumentParser(prog="mmsid churn", description="Compare two SID folders of one catalogue.")
    parser.add_argument("old", type=Path, help="earlier SID folder, or its sids.parquet")
    parser.add_argument("new", type=Path, help="later SID folder, or its sids.parquet")
    parser.add_argument("--out", type=Path, help="also write the comparison as JSON")
    parsed = parser.parse_args(arguments)
    from mmsid.sids import SidTable
    from mmsid.sids.churn import churn_report, churn_table

    report = churn_report(SidTable.load(parsed.old), SidTable.load(parsed.new))
    show(churn_table(report).rstrip())
    if parsed.out is not None:
        write_json(parsed.out, report)


def quantize(arguments: list[str]) -> None:
    """SIDs from ready-made vectors."""
    parser = argparse.ArgumentParser(prog="mmsid quantize", description="Make Semantic IDs of ready-made vectors.")
    parser.add_argument("vectors", type=Path, nargs="+", help=".parquet or .npy files, folders of parquet files, saved datasets")
    parser.add_argument("--ids", type=Path, metavar="FILE", help="ids of the rows: .parquet, .csv, .jsonl, .txt or .npy")
    parser.add_argument("--id-column", metavar="NAME", help="default: item_id")
    parser.add_argument("--vector-column", metavar="NAME", help="default: vector, or the only column with lists of numbers")
    parser.add_argument("--behaviour", type=Path, metavar="FILE", help="item_id and vector, fused with the vectors")
    parser.add_argument("--behaviour-weight", type=float, help="weight of the behaviour vectors beside the others; default 1")
    parser.add_argument("--method", help="balanced_rq (default), rq_kmeans or rq_vae")
    parser.add_argument("--codebook-size", type=int, metavar="K", help="codes per level; default: proposed from the number of items")
    parser.add_argument("--num-levels", type=int, metavar="L", help="codes per item; default: proposed from the number of items")
    parser.add_argument("--collisions", help="relocate (default), suffix or none")
    parser.add_argument("--fit-rows", type=int, metavar="N", help="vectors to fit on; default: 256 per code, at least 100,000")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/NAME/quantize, NAME from the first file of vectors")
    parser.add_argument("--redo", action="store_true", help="write a finished folder again; the old one stays until then")
    parsed = vars(parser.parse_args(arguments))
    redo = parsed.pop("redo")
    from mmsid.tokenizer.quantize_report import REPORT
    from mmsid.tokenizer.quantize_vectors import QuantizeConfig, run

    parsed["out"] = parsed["out"] or Path("runs") / parsed["vectors"][0].resolve().stem / "quantize"
    given = {name: value for name, value in parsed.items() if value is not None}
    config = build(QuantizeConfig, given, source="mmsid quantize", section="quantize")
    if redo:
        with rewriting(config.out):
            run(config)
    else:
        run_unless_finished("quantize", config, run)
    show((config.out / REPORT).read_text(encoding="utf-8").rstrip())


def inspect(arguments: list[str]) -> None:
    """Audit a mapping of items to SIDs."""
    parser = argparse.ArgumentParser(prog="mmsid inspect", description="Look into a mapping of items to Semantic IDs.")
    parser.add_argument("file", type=Path, help="SID folder, sids.parquet, index.json, table with ids and codes, or .npy")
    parser.add_argument("--against", type=Path, metavar="OLD", help="older mapping of the same items: what changed")
    parser.add_argument("--histories", type=Path, metavar="FILE", help="user_id and items, or user_id, item_id and timestamp")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="item_id and vector (parquet), or a matrix (.npy)")
    parser.add_argument("--config", type=Path, help="YAML with the catalogue: histories, categories, equal contents")
    parser.add_argument("--id-column", metavar="NAME", help="default: item_id, or another usual name")
    parser.add_argument("--code-columns", metavar="NAME,NAME", help="default: codes or another usual name, or numbered columns")
    parser.add_argument("--codebook-size", metavar="K[,K]", help="codes per level; default: 1 + the largest code")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="also write a page")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    from mmsid.inspection import inspect_sids
    from mmsid.inspection.tables import audit_text

    sizes = None
    if parsed.codebook_size is not None:
        try:
            sizes = [int(size) for size in parsed.codebook_size.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"--codebook-size is {parsed.codebook_size!r}; give a number, or one per level such as 256,256,256"
            ) from error
    audit = inspect_sids(
        parsed.file,
        id_column=parsed.id_column,
        code_columns=parsed.code_columns.split(",") if parsed.code_columns else None,
        codebook_sizes=sizes,
        histories=parsed.histories,
        vectors=parsed.vectors,
        catalog=None if parsed.config is None else ingested_catalog(parsed.config, parsed.overrides),
        against=parsed.against,
        page=parsed.out,
    )
    show(json.dumps(audit, indent=1, ensure_ascii=False) if parsed.json else audit_text(audit).rstrip())
    if parsed.out is not None and not parsed.json:
        done(f"inspect: wrote {parsed.out}, open it in a browser")


def export(arguments: list[str]) -> None:
    """SIDs in the format of another program."""
    parser = argparse.ArgumentParser(prog="mmsid export", description="Write Semantic IDs in the format of one consumer.")
    parser.add_argument("sids", type=Path, help="SID folder, or its sids.parquet")
    parser.add_argument("--format", required=True, help="flashrec, nvidia, minionerec or huggingface")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", metavar="MODEL", help="Hugging Face model that gets the SID tokens; written to OUT")
    parser.add_argument("--tokenizer", metavar="TOKENIZER", help="text tokenizer that gets the SID tokens; default: that of the model")
    parser.add_argument("--config", type=Path, help="YAML with the catalogue: texts and histories for minionerec")
    parser.add_argument("--name", help="minionerec: name of the data set; default: the name of OUT")
    parser.add_argument("--redo", action="store_true", help="write a finished folder again; the old one stays until then")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    from mmsid.export.export import export_sids

    catalog = None if parsed.config is None else ingested_catalog(parsed.config, parsed.overrides)
    with rewriting(parsed.out) if parsed.redo else contextlib.nullcontext():
        export_sids(
            parsed.sids,
            parsed.out,
            parsed.format,
            model=parsed.model,
            tokenizer=parsed.tokenizer,
            catalog=catalog,
            name=parsed.name,
        )
