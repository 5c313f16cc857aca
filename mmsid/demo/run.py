"""The demo in chapters. Every file that it needs is drawn, so it works in an empty folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmsid.artifacts import is_complete, read_manifest, write_text
from mmsid.catalog.demo import write_demo_catalog
from mmsid.catalog.demo.new_ads import write_new_ads
from mmsid.config import StageConfig, load_yaml
from mmsid.demo.facts import Facts, collect
from mmsid.demo.page import write_page
from mmsid.demo.text import story
from mmsid.errors import ConfigError
from mmsid.progress import done, show
from mmsid.stages import run_stages, stage_configs

ITEMS, USERS, SEED = 1200, 1500, 0
CATALOG, KNOWN = Path("demo/catalog"), Path("demo/known")  # the paths of the two configurations
CONFIGS = (Path("configs/demo.yaml"), Path("configs/demo_new_ads.yaml"))
PAGE, TEXT = Path("demo/story.html"), Path("demo/story.md")
_CHAPTERS = (
    ("A catalogue of ads, of which a tenth has not arrived yet", ("ingest",)),
    ("A vision-language model writes captions, then the interests behind each ad", ("caption", "interests")),
    ("An item tokenizer reads content and gives Semantic IDs", ("train_tokenizer", "assign", "baselines")),
    ("User logs arrive: reinforcement learning moves the codes, behind an acceptance gate", ("refine",)),
    ("A recommender learns the Semantic IDs, beside classical baselines", ("train_recommender", "report")),
)
_NEW_ADS = "New ads arrive: captions, interests, Semantic IDs beside the published ones, recommendations. Nothing is trained"


def run_demo(items: int = ITEMS, users: int = USERS, seed: int = SEED, overrides: Sequence[str] = ()) -> Facts:
    """Run the demo in the working folder. A second call resumes.

    Writes the drawn catalogue to demo/catalog and demo/known, the runs to runs/demo and runs/demo_new_ads, and the story to
    demo/story.md and demo/story.html.

    Args:
        items, users, seed: of the drawn catalogue.
        overrides: dotted overrides of configs/demo.yaml, such as `train_tokenizer.steps=200`.

    Raises:
        ConfigError: demo/catalog was drawn with other numbers.
    """
    started = time.monotonic()
    configs, new = (
        stage_configs(load_yaml(path, changes), source=str(path)) for path, changes in zip(CONFIGS, (overrides, ()), strict=True)
    )
    _chapter(1, _CHAPTERS[0][0])
    _draw({"items": items, "users": users, "seed": seed})
    for number, (title, stages) in enumerate(_CHAPTERS, start=1):
        if number > 1:
            _chapter(number, title)
        _run(configs, stages)
    _chapter(len(_CHAPTERS) + 1, _NEW_ADS)
    run_stages(new)
    facts = collect(configs, new, CATALOG, KNOWN)
    write_text(TEXT, text := story(facts))
    write_page(facts, new["assign"].catalog, configs["report"].out / "report.html", PAGE)
    show(f"\n{text}")
    done(f"demo: {(time.monotonic() - started) / 60:.1f} minutes; open {PAGE} and {configs['report'].out / 'report.html'} in a browser")
    return facts


def _draw(numbers: Mapping[str, int]) -> None:
    if is_complete(CATALOG):
        drawn = read_manifest(CATALOG, "demo_catalog")["config"]
        for name, value in numbers.items():
            if drawn[name] != value:
                raise ConfigError(
                    f"demo: {CATALOG} was drawn with {drawn[name]} {name}, not {value}; use another folder, or remove demo/ and runs/"
                )
        done(f"demo: the catalogue was drawn earlier, kept ({CATALOG})")
    else:
        write_demo_catalog(CATALOG, **numbers)
    if not is_complete(KNOWN):
        write_new_ads(CATALOG, KNOWN)


def _run(configs: Mapping[str, StageConfig], stages: tuple[str, ...]) -> None:
    run_stages({name: config for name, config in configs.items() if name in stages})


def _chapter(number: int, title: str) -> None:
    show(f"\n{number}/{len(_CHAPTERS) + 1}  {title}")
