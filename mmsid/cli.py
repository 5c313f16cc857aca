"""The `mmsid` command. It parses arguments and calls the stages; it computes nothing itself.

mmsid demo                                           draw ads and users, run everything, append new ads; explains what happens
mmsid run CONFIG [key=value ...] [--redo STAGE]      every stage of the configuration in order; a second call resumes
mmsid STAGE --config CONFIG [key=value ...] [--redo] one stage; also `accelerate launch scripts/STAGE.py --config CONFIG`
                                                     ingest, caption, interests, assign, recommend: `--engine ray`
mmsid assign --config CONFIG --append SIDS           Semantic IDs for new items; the published codes in SIDS stay unchanged
                                                     --refresh moves published items whose behaviour has become sure
mmsid recommend --config CONFIG [--users FILE] [--k K]   the best K items for every user, as parquet files
mmsid report RUN [catalog.key=value ...]             RUN/report.html; RUN is a run folder, its YAML, or benchmark results (.json)
mmsid catalog --config CONFIG                        read a catalogue and describe it, with examples of its problems
mmsid init SOURCE... [--out CONFIG] [--events FILE]   look at files, a folder or a hub data set, and write a configuration that runs
mmsid demo-catalog OUT --items N --users M --seed S  draw the demo catalogue
mmsid churn OLD NEW [--out REPORT.json]              compare two SID folders of one catalogue
mmsid quantize VECTORS [--codebook-size K] [--num-levels L] [--method M] [--out DIR]   Semantic IDs from ready-made vectors (parquet,
                                                     .npy, saved datasets); proposes K and L; --behaviour FILE fuses a second file
mmsid inspect FILE [--against OLD] [--out PAGE.html] look into a mapping of items to Semantic IDs, of mmsid or another project
mmsid export SIDS --format F --out OUT               Semantic IDs for FlashRec, NVIDIA, MiniOneRec, or a Hugging Face model
mmsid bundle OUT --run RUN                           one folder that turns a new ad into codes and recommendations, ready to upload;
                                                     or --tokenizer T --sids S
mmsid encode BUNDLE --image FILE --title TEXT        caption, interests, Semantic ID and nearest ads of a new ad; also a folder of
                                                     pictures, or --table FILE; --json
mmsid serve BUNDLE [--port P]                        HTTP service with a page: encode, recommend, append new ads (extra `serve`)
mmsid bench --dataset D --suite S [suite.key=value]  compare SID methods and recommenders in one table; a second call resumes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmsid._version import __version__
from mmsid.artifacts import is_complete, read_manifest, rewriting, write_json
from mmsid.config import build, load_yaml
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done, show
from mmsid.stages import INGEST, ON_RAY, STAGES, run_stages, run_unless_finished, stage_configs


def main_stage(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run one stage from the arguments `--config CONFIG [key=value ...]`. Entry point of the files in `scripts/`.

    Errors of mmsid are printed in one line and end the process with exit code 1.
    """
    _guarded(lambda: _one_stage(stage, list(sys.argv[1:] if arguments is None else arguments)))


def _one_stage(stage: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"mmsid {stage}", description=f"Run the stage {stage} of a configuration.")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run")
    parser.add_argument("--redo", action="store_true", help="write a finished folder again; the old one stays until then")
    if stage in ON_RAY:
        parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: run on a Ray cluster (extra `ray`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train_tokenizer.steps=50")
    if stage == "assign":
        parser.add_argument("--append", metavar="SIDS", help="SID folder whose published codes stay (assign.append)")
        parser.add_argument("--refresh", action="store_true", help="move published items whose behaviour has become sure (assign.refresh)")
    if stage == "recommend":
        parser.add_argument("--users", metavar="FILE", help="table of users and histories; default: all users of the catalogue")
        parser.add_argument("--k", type=int, help="items per user (recommend.k)")
    parsed = parser.parse_intermixed_args(arguments)
    options = {name: getattr(parsed, name, None) for name in ("append", "refresh", "users", "k")}
    given = [f"{stage}.{name}={value}" for name, value in options.items() if value is not None and value is not False]
    data = load_yaml(parsed.config, [*parsed.overrides, *given])
    data.setdefault(stage, data.get("refine", {}) if stage == "sid_reward" else {})
    configs = stage_configs(data, source=str(parsed.config))
    chosen = {name: configs[name] for name in dict.fromkeys((INGEST, stage)) if name in configs}
    run_stages(chosen, redo=[stage] if parsed.redo else [], engine=getattr(parsed, "engine", "local"))


def _run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid run", description="Run all stages in order. A second call resumes.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="run this stage and all later ones again")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=f"engine of the stages {', '.join(ON_RAY)}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    run_stages(stage_configs(load_yaml(parsed.config, parsed.overrides), source=str(parsed.config)), redo=parsed.redo, engine=parsed.engine)


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid report", description="Write an HTML report of a run or of benchmark results.")
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, YAML of a run, or results of a benchmark (.json)")
    parser.add_argument("overrides", nargs="*", metavar="catalog.key=value", help="new location of the catalogue, if it was moved")
    parsed = parser.parse_args(arguments)
    source: Path = parsed.source
    if source.suffix in (".yaml", ".yml"):
        _one_stage("report", ["--config", str(source), *parsed.overrides])
        return
    from mmsid.report.page import write_results_page, write_run_page
    from mmsid.report.run_folder import catalog_of_run

    if source.suffix == ".json":
        out = write_results_page(source, source.with_suffix(".html"))
    else:
        out = write_run_page(source, catalog_of_run(source, parsed.overrides), source / "report.html")
    done(f"report: wrote {out} ({out.stat().st_size / 1e6:.1f} MB), open it in a browser")


def _catalog(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid catalog", description="Read a catalogue and describe it.")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    from mmsid.catalog import describe, read_catalog, split_histories, summary
    from mmsid.catalog.ingest import problems

    config = _ingested(parsed.config, parsed.overrides)
    catalog = read_catalog(config)
    show(summary(describe(catalog, split_histories(catalog, config.split))))
    show(problems.text(problems.problems(config.ingested)).rstrip())


def _ingested(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Settings of the catalogue of a configuration, after its stage ingest."""
    configs = stage_configs({"name": path.stem, **load_yaml(path, overrides)}, source=str(path))
    run_stages({INGEST: configs[INGEST]})
    return configs[INGEST].catalog.model_copy(update={"ingested": configs[INGEST].out})


def _init(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid init", description="Look at a catalogue and write a configuration that runs.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder or pattern of tables, or hf:OWNER/NAME[:SPLIT]")
    parser.add_argument("--events", metavar="FILE", help="table of the user log, when it is not among the sources")
    parser.add_argument("--out", type=Path, help="configuration to write; default: NAME.yaml, by the name of the first source")
    parsed = parser.parse_args(arguments)
    from mmsid.catalog.proposal import config_text, proposal_table, propose

    name = Path(parsed.sources[0].removeprefix("hf:").partition(":")[0].rstrip("/")).name.partition(".")[0].strip("*") or "catalog"
    out: Path = parsed.out or Path(f"{name}.yaml")
    if out.exists():
        raise ConfigError(f"{out} exists; remove it, or name another file with --out")
    proposal = propose(parsed.sources, parsed.events)
    text = config_text(proposal, name)
    show(proposal_table(proposal))
    out.write_text(text, encoding="utf-8")
    stage_configs(load_yaml(out), source=str(out))
    done(f"init: wrote {out}; look at it, then `mmsid catalog --config {out}` and `mmsid run {out}`")


def _demo(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="mmsid demo", description="Draw ads and users in the working folder, run the whole pipeline, append new ads."
    )
    parser.add_argument("--items", type=int, help="ads (default 1200)")
    parser.add_argument("--users", type=int, help="users (default 1500)")
    parser.add_argument("--seed", type=int, help="of the drawn catalogue (default 0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of configs/demo.yaml")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    from mmsid.demo.run import run_demo

    run_demo(**given)


def _demo_catalog(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid demo-catalog", description="Draw ads and users with a known best achievable ranking.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=1200)
    parser.add_argument("--users", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    from mmsid.catalog.demo import write_demo_catalog

    if is_complete(parsed.out):
        extra = read_manifest(parsed.out, "demo_catalog")["config"]
        if all(extra.get(key) == getattr(parsed, key) for key in ("items", "users", "seed")):
            done(f"demo-catalog: finished earlier, kept ({parsed.out})")
            return
    write_demo_catalog(parsed.out, items=parsed.items, users=parsed.users, seed=parsed.seed)


def _churn(arguments: list[str]) -> None:
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


def _quantize(arguments: list[str]) -> None:
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


def _inspect(arguments: list[str]) -> None:
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
        catalog=None if parsed.config is None else _ingested(parsed.config, parsed.overrides),
        against=parsed.against,
        page=parsed.out,
    )
    show(json.dumps(audit, indent=1, ensure_ascii=False) if parsed.json else audit_text(audit).rstrip())
    if parsed.out is not None and not parsed.json:
        done(f"inspect: wrote {parsed.out}, open it in a browser")


def _export(arguments: list[str]) -> None:
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

    catalog = None if parsed.config is None else _ingested(parsed.config, parsed.overrides)
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


def _bundle(arguments: list[str]) -> None:
    description = "Copy everything that turns a new ad into codes and recommendations into one folder."
    parser = argparse.ArgumentParser(prog="mmsid bundle", description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", type=Path, help="folder of a run, for example runs/demo: its recommender, and the SIDs that fit it")
    parser.add_argument("--tokenizer", type=Path, help="runs/NAME/train_tokenizer, or runs/NAME/refine/tokenizer")
    parser.add_argument("--sids", type=Path, help="runs/NAME/assign, or runs/NAME/refine/sids")
    parser.add_argument("--recommender", type=Path, help="default: that of the run, if it fits the SIDs")
    parser.add_argument("--captions", type=Path, help="caption folder whose model and prompt are taken; default: that of the run")
    parser.add_argument("--interests", type=Path, help="interests folder whose model and prompt are taken; default: that of the run")
    parsed = vars(parser.parse_args(arguments))
    from mmsid.serve.bundling import bundle_run

    bundle_run(parsed.pop("out"), **parsed)


def _encode(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid encode", description="Caption, interests, Semantic ID and nearest ads of new ads.")
    parser.add_argument("bundle", type=Path, help="folder of `mmsid bundle`")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="PATH", help="a picture, or a folder of pictures")
    parser.add_argument("--title")
    parser.add_argument("--description")
    parser.add_argument("--category", action="append", dest="categories", metavar="NAME", help="from root to leaf; may be repeated")
    parser.add_argument("--attribute", action="append", default=[], metavar="NAME=LABEL", help="may be repeated")
    parser.add_argument("--caption", help="caption of the picture; without it the bundle's model writes one")
    parser.add_argument("--table", type=Path, metavar="FILE", help="ads: item_id, title, description, image, categories, attributes, ...")
    parser.add_argument("--k", type=int, default=5, help="number of nearest ads (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and ad")
    parser.add_argument("--no-caption", action="store_true", help="write no captions and interests; read the given texts only")
    parsed = parser.parse_args(arguments)
    if parsed.k < 0:
        raise ConfigError(f"--k is {parsed.k}, expected 0 or more")
    texts = {name: getattr(parsed, name) for name in ("title", "description", "categories", "caption") if getattr(parsed, name)}
    attributes: dict[str, list[str]] = {}
    for pair in parsed.attribute:
        name, sign, label = pair.partition("=")
        if not (name and sign and label):
            raise ConfigError(f"--attribute {pair!r} is not of the form NAME=LABEL, for example material=oak")
        attributes.setdefault(name, []).append(label)
    if attributes:
        texts["attributes"] = attributes
    from mmsid.serve.encode import run

    options = {"k": parsed.k, "captions": not parsed.no_caption, "as_json": parsed.json}
    counts = run(parsed.bundle, parsed.image, parsed.table, texts, **options)
    if not counts["ok"]:
        raise SystemExit(1)


def _serve(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="mmsid serve", description="Serve a bundle by HTTP, with a page at /. Needs the extra `serve`.")
    parser.add_argument("bundle", type=Path, help="folder of `mmsid bundle`")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; any but loopback needs a key in MMSID_API_KEY")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--state", type=Path, metavar="FILE", help="sqlite file of appended items; default: BUNDLE.items.sqlite beside it")
    parser.add_argument("--no-caption", action="store_true", help="write no captions and interests")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of ServeSettings, for example queue=128")
    parsed = parser.parse_args(arguments)
    from mmsid.serve.server import serve

    serve(parsed.bundle, parsed.host, parsed.port, parsed.state, captions=not parsed.no_caption, overrides=parsed.set)


def main_bench(
    arguments: Sequence[str],
    refiners: Mapping[str, Callable[[dict[str, Any]], Path]] | None = None,
    peers: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Run `mmsid bench` with methods from outside the package, all importable by name. Entry point of files in `benchmarks/`.

    Args:
        refiners: value of `refine.control` -> function from the keys of the stage refine to the SID folder written.
        peers: name -> further method of a new-item suite (`mmsid.recommend.bench.new_items.jobs.Peer`).
    """
    _guarded(lambda: _bench(list(arguments), refiners, peers))


def _bench(
    arguments: list[str],
    refiners: Mapping[str, Callable[[dict[str, Any]], Path]] | None = None,
    peers: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    parser = argparse.ArgumentParser(prog="mmsid bench", description="Compare the methods of a suite on a data set. A second call resumes.")
    parser.add_argument("--dataset", required=True, help="name of a shipped data set (configs/bench/datasets), or a YAML file")
    parser.add_argument("--suite", required=True, help="name of a shipped suite (configs/bench/suites), or a YAML file")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="run only these methods; the table lists all finished ones")
    parser.add_argument("--stage", choices=("screen", "full"), default="full", help="screen: the first seed (or draw) only")
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="valid: test ranks stay unread")
    parser.add_argument("--results", type=Path, help="folder of the table; default: the one named in the suite")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="jobs are stored below RUNS/bench/DATASET/SUITE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. suite.seeds=[0] dataset.name=mine")
    parsed = parser.parse_intermixed_args(arguments)
    from mmsid.recommend.bench.files import load_dataset, load_suite
    from mmsid.recommend.bench.new_items.config import NewItemsSuite
    from mmsid.recommend.bench.new_items.run import run_new_items
    from mmsid.recommend.bench.run import BenchOptions, run
    from mmsid.refine.ungated import refine_ungated

    overrides: dict[str, list[str]] = {"dataset": [], "suite": []}
    for override in parsed.overrides:
        whose, _, rest = override.partition(".")
        if whose not in overrides:
            raise ConfigError(f"override {override!r} begins with neither `dataset.` nor `suite.`; prefix the key with one of them")
        overrides[whose].append(rest)
    dataset, suite = load_dataset(parsed.dataset, overrides["dataset"]), load_suite(parsed.suite, overrides["suite"])
    only = tuple(name for name in parsed.only.split(",") if name)
    options = BenchOptions(
        suite_name=Path(parsed.suite).stem, only=only, stage=parsed.stage, part=parsed.part, results=parsed.results, runs=parsed.runs
    )
    if isinstance(suite, NewItemsSuite):
        run_new_items(dataset, suite, options, peers)
    else:
        run(dataset, suite, options, refine=refiners or {"ppo": refine_ungated})


def _guarded(action: Callable[[], None]) -> None:
    """Print errors of mmsid in one line and exit with code 1. Other exceptions are bugs and keep their traceback."""
    try:
        action()
    except MmsidError as error:
        print(f"mmsid: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ModuleNotFoundError as error:
        if "Could not import module" not in str(error) or find_spec("torchvision") is None:
            raise
        print(
            f"mmsid: transformers cannot load its models ({str(error).splitlines()[0]}); the installed torchvision probably does not fit "
            "the installed torch: pip uninstall torchvision (mmsid does not need it), or install the build that fits",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "catalog": _catalog,
    "init": _init,
    "demo": _demo,
    "demo-catalog": _demo_catalog,
    "churn": _churn,
    "quantize": _quantize,
    "inspect": _inspect,
    "export": _export,
    "bundle": _bundle,
    "encode": _encode,
    "serve": _serve,
    "bench": _bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mmsid` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in _COMMANDS:
        _guarded(lambda: _COMMANDS[command](rest))
    elif command == "report" and rest and not rest[0].startswith("-"):
        _guarded(lambda: _report(rest))
    elif command in STAGES:
        main_stage(command, rest)
    elif command in ("-V", "--version"):
        print(f"mmsid {__version__}")
    elif command in ("-h", "--help", "help"):
        print(f"{__doc__}\nstages: {', '.join(STAGES)}")
    else:
        print(f"mmsid: unknown command {command!r}; known: {', '.join([*_COMMANDS, *STAGES])}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
