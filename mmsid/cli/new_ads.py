"""`mmsid bundle`, `encode` and `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmsid.errors import ConfigError


def bundle(arguments: list[str]) -> None:
    """Write a bundle."""
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


def encode(arguments: list[str]) -> None:
    """Read new ads with a bundle."""
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


def serve(arguments: list[str]) -> None:
    """Serve a bundle by HTTP."""
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
