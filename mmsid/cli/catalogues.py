"""`mmsid catalog`, `init`, `demo` and `demo-catalog`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmsid.artifacts import is_complete, read_manifest
from mmsid.cli.stages import ingested_catalog
from mmsid.config import load_yaml
from mmsid.errors import ConfigError
from mmsid.progress import done, show
from mmsid.stages import stage_configs


def catalog(arguments: list[str]) -> None:
    """Read and describe a catalogue."""
    parser = argparse.ArgumentParser(prog="mmsid catalog", description="Read a catalogue and describe it.")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(arguments)
    from mmsid.catalog import describe, read_catalog, split_histories, summary
    from mmsid.catalog.ingest import problems

    config = ingested_catalog(parsed.config, parsed.overrides)
    catalog = read_catalog(config)
    show(summary(describe(catalog, split_histories(catalog, config.split))))
    show(problems.text(problems.problems(config.ingested)).rstrip())


def init(arguments: list[str]) -> None:
    """Write a configuration for a catalogue."""
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


def demo(arguments: list[str]) -> None:
    """The whole demo."""
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


def demo_catalog(arguments: list[str]) -> None:
    """Draw the demo catalogue."""
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
