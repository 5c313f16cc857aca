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

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmsid._version import __version__
from mmsid.cli import catalogues, comparisons, new_ads, sids
from mmsid.cli import stages as stage_commands
from mmsid.errors import MmsidError
from mmsid.stages import STAGES

_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": stage_commands.run,
    "catalog": catalogues.catalog,
    "init": catalogues.init,
    "demo": catalogues.demo,
    "demo-catalog": catalogues.demo_catalog,
    "churn": sids.churn,
    "quantize": sids.quantize,
    "inspect": sids.inspect,
    "export": sids.export,
    "bundle": new_ads.bundle,
    "encode": new_ads.encode,
    "serve": new_ads.serve,
    "bench": comparisons.bench,
}


def main_stage(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run one stage from the arguments `--config CONFIG [key=value ...]`. Entry point of the files in `scripts/`.

    Errors of mmsid are printed in one line and end the process with exit code 1.
    """
    _guarded(lambda: stage_commands.one_stage(stage, list(sys.argv[1:] if arguments is None else arguments)))


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
    _guarded(lambda: comparisons.bench(list(arguments), refiners, peers))


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mmsid` command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in _COMMANDS:
        _guarded(lambda: _COMMANDS[command](rest))
    elif command == "report" and rest and not rest[0].startswith("-"):
        _guarded(lambda: stage_commands.report(rest))
    elif command in STAGES:
        main_stage(command, rest)
    elif command in ("-V", "--version"):
        print(f"mmsid {__version__}")
    elif command in ("-h", "--help", "help"):
        print(f"{__doc__}\nstages: {', '.join(STAGES)}")
    else:
        print(f"mmsid: unknown command {command!r}; known: {', '.join([*_COMMANDS, *STAGES])}", file=sys.stderr)
        raise SystemExit(2)
