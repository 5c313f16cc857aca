"""README and docs agree with the code: links, anchors, YAML, keys, messages, names of the API, and the site that `make docs` builds."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import mmsid
from mmsid import errors
from mmsid.catalog import CatalogConfig
from mmsid.config import build
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.stages import STAGES, RunHeader, config_class, stage_configs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOT_PAGES = [path for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (path := ROOT / name).exists()]
PAGES = [*ROOT_PAGES, *sorted(DOCS.rglob("*.md"))]
GUIDE = [page for page in PAGES if page.parent != DOCS / "experiments"]  # experiments record what was run at their time
LANGUAGES = {"bash", "python", "yaml", "text", "json", "dockerfile"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
CATALOG = {"items": "data/items.parquet", "sequences": "data/sequences.parquet"}
EXTERNAL = re.compile(r"https?://[\w.-]+\.[a-z]{2,}(/[\w./%#?=&~:@+-]*)?")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without code blocks and code in backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, and of the names that mkdocstrings documents on it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = {re.sub(r"[^\w-]", "", heading.strip().lower().replace(" ", "-")) for heading in re.findall(r"(?m)^#+ (.+)$", text)}
    return headings | set(re.findall(r"(?m)^::: (\S+)$", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_is_dead(page):
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            assert EXTERNAL.fullmatch(link), f"{link} is no address"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        if DOCS in page.parents:
            assert DOCS in target.parents, f"{link} leads out of docs/, where the site has no page"
        assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading; it has {sorted(anchors(target))}"


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_code_blocks_have_a_known_language(page):
    """`bash` and `python` run in test_readme.py, `yaml` is checked here; an unknown language would escape both."""
    fences = re.findall(r"(?m)^ *```(.*)$", page.read_text(encoding="utf-8"))
    assert len(fences) % 2 == 0 and set(fences[::2]) <= LANGUAGES and set(fences[1::2]) <= {""}


def yaml_blocks() -> list[tuple[str, str]]:
    return [(name_of(page), block) for page in GUIDE for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]


@pytest.mark.parametrize(("page", "block"), yaml_blocks(), ids=lambda value: value if value.endswith(".md") else "")
def test_yaml_has_only_known_keys_and_valid_values(page, block):
    """A whole configuration, some sections of one, or a file of `mmsid bench`."""
    data = yaml.safe_load(block)
    if "arms" in data:
        build(SuiteConfig, data, source=page, section="suite")
    elif "catalog" in data and not set(data) - set(DatasetConfig.model_fields):
        build(DatasetConfig, data, source=page, section="dataset")
    else:
        stages = set(data) & set(STAGES)
        assert stages <= set(stage_configs({"name": "mine", "catalog": CATALOG, **data}, page))


def keys_in_prose() -> list[tuple[str, str]]:
    """`stage.key` in backticks, with or without a value."""
    sections = "|".join(["catalog", *STAGES])
    found = {
        (name_of(page), key)
        for page in GUIDE
        if page.name != "CHANGELOG.md"  # names removed keys, too
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
        for key in re.findall(rf"(?:^|\s)((?:{sections})(?:\.[a-z_]+)+)(?=$|[=:\s])", code)
        if key.rpartition(".")[2] not in ("html", "json", "jsonl", "md", "parquet", "py")
    }
    return sorted(found)


@pytest.mark.parametrize(("page", "key"), keys_in_prose(), ids=lambda value: str(value))
def test_a_key_that_the_prose_names_exists(page, key):
    section, *path = key.split(".")
    cls: type[BaseModel] | None = CatalogConfig if section == "catalog" else config_class(section)
    for part in path:
        assert cls is not None and part in cls.model_fields, f"{page}: {key} is no key of the configuration"
        inner = [cls.model_fields[part].annotation, *getattr(cls.model_fields[part].annotation, "__args__", ())]
        cls = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), None)


def texts_of_the_code() -> str:
    """All text constants of the package, each f-string joined at its gaps by `...`."""
    found = []
    for path in Path(mmsid.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_has_every_error_class_and_quotes_real_messages():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.MmsidError)}
    assert classes <= set(re.findall(r"(?m)^## (\w+)$", page))
    code, quoted = texts_of_the_code(), []
    for table in re.findall(r"(?m)^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page):
        for row in table.splitlines():
            quoted += re.findall(r"`([^`]+)`", row.split("|")[1])
    assert len(quoted) >= 30
    assert not [text for text in quoted if text not in code]


def test_reasons_of_pictures_in_troubleshooting_exist():
    from mmsid.catalog.picture_sources.reasons import REASONS

    part = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").split("## PictureError")[1].split("## ")[0]
    rows = [row.split("|")[1] for row in part.splitlines() if row.startswith("| `")]
    named = {reason for row in rows for reason in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 15 and named <= set(REASONS)


def test_the_api_page_has_every_public_name():
    documented = re.findall(r"(?m)^::: mmsid\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"))
    assert sorted(documented) == sorted(set(mmsid.__all__) - {"__version__"})


def test_every_key_of_a_run_is_a_section_of_the_reference():
    reference = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for section in (*STAGES, "catalog"):
        assert f"\n## `{section}`\n" in reference
    assert all(f"| `{key}` |" in reference for key in RunHeader.model_fields)


def test_every_page_stands_in_the_navigation():
    """A page that no menu leads to is not found. Experiments are listed by their own index."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"(?m)^ +- [^#\n]*: (\S+\.md)$", text))
    assert {str(page.relative_to(DOCS)) for page in DOCS.glob("*.md")} | {"experiments/README.md"} == named
    index = (DOCS / "experiments" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (DOCS / "experiments").glob("*.md")} - {"README.md"} <= set(LINK.findall(index))


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Building documentation" in done.stderr  # with --quiet, a warning would not end a strict build
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    loaded = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["'](?:https?:)?//([^"']+)""")
    found = {(page.name, match) for page in pages for match in loaded.findall(page.read_text(encoding="utf-8"))}
    assert not found
    styles = "\n".join(style.read_text(encoding="utf-8") for style in (tmp_path / "site").rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles)
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="mmsid.{name}"' in api for name in mmsid.__all__ if name != "__version__")
    assert "neighbours" in api and "exclude_seen" in api  # methods and arguments, not names alone


def test_the_citation_is_that_of_this_version():
    """The keys that CFF 1.2.0 requires, and the values that the package has."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert all(set(author) <= {"name", "website"} for author in citation["authors"])
    assert citation["version"] == mmsid.__version__ and citation["license"] == "Apache-2.0"
    assert f"## {mmsid.__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
