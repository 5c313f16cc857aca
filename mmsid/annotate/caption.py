"""Stage `caption` (CMSA): one caption per creative, written by a vision-language model from the picture alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from mmsid.annotate.generator import Generator
from mmsid.annotate.job import annotate
from mmsid.annotate.job_config import JobInput, ModelJobConfig, Task
from mmsid.annotate.prompts import evidence_json, load_prompt
from mmsid.annotate.records import Caption, Record, parse_caption
from mmsid.annotate.server import OpenAIGenerator
from mmsid.annotate.text_overlays import masked
from mmsid.artifacts import Draft, is_complete, read_manifest, writing
from mmsid.backbone.packaged_weights import DEMO
from mmsid.catalog import Item, PictureLimits, load_picture, read_catalog
from mmsid.progress import done, is_main_process
from mmsid.ray_pool import Engine

PICTURE = "picture_"  # prefix of the catalogue's problem codes that name a refused picture


class CaptionConfig(ModelJobConfig):
    """What to caption and with which model. Prompt: `caption_demo` for our own small models, else `caption`."""


def run(config: CaptionConfig, generator: Generator | None = None, engine: Engine = "local") -> Path:
    """Caption every creative of the catalogue into `config.out`; `generator` replaces the configured model (tests).

    `engine` says where: in this process (or the ranks of `accelerate launch`), or in the actors of a Ray cluster.

    Raises:
        AnnotationError: reason `gate`, when too many creatives failed (the rows stay in the draft, see `job`).
        ConfigError, CatalogError: model, prompt or catalogue cannot be used.
    """
    prompt = load_prompt(config.prompt or default_prompt("caption", config))
    task = Task("caption", prompt, Caption, parse_caption, picture_loader(config))
    with writing(config.out, stage="caption", config=config, inputs=input_paths(config), resume=True) as draft:
        catalog = read_catalog(config.catalog)
        total = sum(len(_units(item, with_text=False)) for item in catalog.items)
        units = (unit for item in catalog.items for unit in _units(item, prompt.wants_evidence))
        annotate(units, total, task, generator or model_of(config, Caption), config, draft, engine)
        draft.extra.update(catalog_sha256=catalog.sha256, prompt=prompt.name, prompt_sha256=prompt.sha256)
    if is_main_process():
        done(closing_line("caption", draft, config.out))
    return config.out


def _units(item: Item, with_text: bool) -> list[JobInput]:
    """A unit per usable creative, then one per creative that the catalogue refused; `no_picture` when there is neither."""
    evidence = evidence_json(title=item.title, description=item.description) if with_text else ""
    units = [JobInput(item.item_id, at, (path,), evidence) for at, path in enumerate(item.images)]
    refused = [problem for problem in item.problems if problem.startswith(PICTURE)]
    units += [JobInput(item.item_id, len(units) + at, reason=reason) for at, reason in enumerate(refused)]
    return units or [JobInput(item.item_id, reason="no_picture")]


def default_prompt(kind: str, config: ModelJobConfig) -> str:
    """The prompt that suits the model: a captioner of ours answers the one it was trained on, hub models need it spelled out."""
    if str(config.model) == DEMO:
        return f"{kind}_demo"
    if config.server is None and is_complete(Path(config.model)):
        return read_manifest(Path(config.model))["config"].get(f"{kind}_prompt") or f"{kind}_demo"
    return kind


def model_of(config: ModelJobConfig, record: type[Record]) -> Generator:
    """The configured model, in process or behind a server."""
    if config.server is not None:
        return OpenAIGenerator(
            str(config.model),
            config.server,
            revision=config.revision,
            max_new_tokens=config.max_new_tokens,
            schema=record.model_json_schema(),
            batch_size=config.batch_size,
        )
    from mmsid.annotate.huggingface import HuggingFaceGenerator  # seconds of imports, for those alone who need a model

    return HuggingFaceGenerator(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_new_tokens=config.max_new_tokens,
        picture_tokens=config.picture_tokens,
    )


def picture_loader(config: ModelJobConfig) -> partial[Image.Image]:
    """Reads a creative under the catalogue's limits, in whatever process and folder it is called; with `mask_overlays` shrunk and
    masked, so that what is looked at is what is fed."""
    load = partial(_load, config.catalog.pictures, config.catalog.root.absolute())
    return partial(_load_masked, load, config.max_side) if config.mask_overlays else load


def _load(limits: PictureLimits, root: Path, path: Path) -> Image.Image:
    return load_picture(path, limits, root=root)


def _load_masked(load: Callable[[Path], Image.Image], max_side: int | None, path: Path) -> Image.Image:
    picture = load(path)
    if max_side is not None:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return masked(picture)


def input_paths(config: ModelJobConfig) -> dict[str, Path]:
    """Files and finished folders that the rows are made from (for the manifest)."""
    paths = {"items": config.catalog.items, "sequences": config.catalog.sequences}
    model = Path(config.model) if config.server is None and is_complete(Path(config.model)) else None
    return {name: path for name, path in (paths | {"model": model}).items() if path is not None}


def closing_line(what: str, draft: Draft, out: Path) -> str:
    """What was written, for the last line of the stage."""
    counts, reasons = draft.counts, draft.extra["reasons"]
    why = f": {', '.join(f'{reason} {count:,}' for reason, count in list(reasons.items())[:3])}" if reasons else ""
    work = draft.extra["work"]
    return (
        f"{what}: wrote {counts['in']:,} rows ({counts['ok']:,} ok, {counts['quarantined']:,} quarantined{why}; "
        f"{work.get('generated', 0):,} generations, {work.get('cache_hits', 0):,} from the cache) to {out}"
    )
