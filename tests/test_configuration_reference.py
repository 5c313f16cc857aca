"""docs/configuration.md lists every configuration key with type, default and meaning, as the configuration classes have them."""

import importlib.util
import re
from pathlib import Path

import pytest

from mmsid.config import Section
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.stages import STAGES, config_class
from mmsid.tokenizer.quantize_vectors import QuantizeConfig

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("configuration_page", ROOT / "scripts" / "configuration_page.py")
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)
CLASSES = {**{stage: config_class(stage) for stage in STAGES}, "quantize": QuantizeConfig}
CLASSES |= {"dataset": DatasetConfig, "suite": SuiteConfig, "suite (new items)": NewItemsSuite}


class Inner(Section):
    """Rates of the work. A second sentence."""

    rate: float = 0.1


class Outer(Section):
    """Some work.

    Attributes:
        steps, rounds: how often it is done, with
            a second line.
    """

    steps: int = 3
    rounds: int | None = None
    inner: Inner = Inner()
    given: Inner | None = None


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_has_a_meaning(name):
    missing = reference.undescribed(CLASSES[name])
    assert not missing, f"describe these keys in the `Attributes:` of their class: {', '.join(missing)}"


def test_a_key_without_a_meaning_is_found():
    assert reference.undescribed(Outer) == [f"{__name__}.Inner.rate"]
    assert reference.meaning(Outer, "rounds") == "how often it is done, with a second line."
    assert reference.meaning(Outer, "inner") == "Rates of the work."


def test_the_page_is_that_of_the_code():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.page(), "docs/configuration.md is older than the code: run `python scripts/configuration_page.py`"


def tables() -> dict[str, dict[str, str]]:
    """Heading -> key -> rest of its row, as a reader of the page sees them."""
    found: dict[str, dict[str, str]] = {}
    for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ `(.+)`$", line):
            rows = found.setdefault(heading[1], {})
        elif row := re.match(r"\| `(\w+)`°? \| (.+)", line):
            rows[row[1]] = row[2]
    return found


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"sid_reward"}))
def test_every_key_of_the_schema_is_on_the_page(name):
    """The JSON schema lists the keys independently of the page."""
    found = tables()
    missing = set(CLASSES[name].model_json_schema()["properties"]) - set(found[name])
    assert missing <= {"out", "seed"}
    assert set(found["every stage"]) == {"out", "seed"}


def test_types_limits_and_defaults_are_those_of_the_classes():
    found = tables()
    assert found["train_tokenizer"]["num_levels"].startswith("whole number, ≥ 1, ≤ 8 | `3` | L, codes per item")
    assert found["train_tokenizer"]["captions"].startswith("path or null | set by the run |")
    assert found["caption"]["model"].startswith("text or path | `demo`, or set by the run |")
    assert "`balanced` \\| `random` | `balanced`" in found["train_tokenizer.start"]["mode"]
    assert "(#train_captionervision_warmup) | `{steps: 400" in found["train_captioner"]["joint"]
