"""Prompts of the annotation stages: plain files whose sha256 is stored with every row. Untrusted text is inserted as escaped JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmsid.artifacts import sha256
from mmsid.catalog import Item
from mmsid.catalog.prompt_injection import visible
from mmsid.errors import ConfigError

PLACEHOLDER = "{{evidence}}"
_ESCAPED = "<>`|＜＞｀｜\u2028\u2029"
_MAX_FIELD_CHARS = 4_000


@dataclass(frozen=True)
class Prompt:
    """A prompt's text (without outer whitespace), its sha256, and the name or path that it was loaded by."""

    text: str
    sha256: str
    name: str

    @property
    def wants_evidence(self) -> bool:
        """True if the prompt contains the placeholder for the item's text."""
        return PLACEHOLDER in self.text

    def render(self, evidence: str) -> str:
        """The prompt with `evidence` (from `evidence_json`) in place of the placeholder; unchanged if it has none."""
        return self.text.replace(PLACEHOLDER, evidence)


def prompt_folder() -> Path:
    """Folder of the shipped prompts: inside the installed package, or at the top of a checkout.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "prompts", package.parent / "prompts"):
        if (folder / "caption.md").is_file():
            return folder
    raise ConfigError(f"no prompts beside {package}; install mmsid again or give the prompt as a path")


def load_prompt(name: str | Path) -> Prompt:
    """Load a shipped prompt by its name (`caption_demo`), or any file by its path (`my/prompt.md`).

    Raises:
        ConfigError: the prompt does not exist, is empty, or has a placeholder other than `{{evidence}}`.
    """
    path = Path(name)
    if path.suffix == "" and len(path.parts) == 1:
        path = prompt_folder() / f"{name}.md"
    if not path.is_file():
        shipped = ", ".join(sorted(found.stem for found in prompt_folder().glob("*.md")))
        raise ConfigError(f"prompt {str(name)!r}: no file {path}; use the name of a shipped prompt ({shipped}) or the path of a file")
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ConfigError(f"prompt {path} is empty; write the instruction into it")
    if "{{" in text.replace(PLACEHOLDER, ""):
        raise ConfigError(f"prompt {path} has a placeholder other than {PLACEHOLDER}; only {PLACEHOLDER} is supported")
    return Prompt(text=text, sha256=sha256(text), name=str(name))


def item_evidence(item: Item, caption: str = "") -> dict[str, str]:
    """What is written about an item: title, description, caption, categories from root to leaf, attributes. Absent parts are empty."""
    attributes = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in sorted(item.attributes.items()) if labels)
    texts = {"title": item.title, "description": item.description, "caption": caption}
    return texts | {"categories": " > ".join(item.categories), "attributes": attributes}


def evidence_json(
    *, title: str = "", description: str = "", caption: str = "", categories: str = "", attributes: str = "", descriptor: str | None = None
) -> str:
    """One item's text as a JSON object with sorted keys and fields of at most 4,000 characters; `descriptor` only for the judge.

    Angle brackets, backticks and bars (also full-width ones) and invisible characters are written as JSON escapes. An advertiser's
    text therefore cannot close the marker lines around it, open a chat role, contain a special token such as `<image>`, or carry
    hidden instructions.
    """
    fields = {"title": title, "description": description, "caption": caption, "categories": categories, "attributes": attributes}
    if descriptor is not None:
        fields["descriptor"] = descriptor
    text = json.dumps({name: value[:_MAX_FIELD_CHARS] for name, value in fields.items()}, sort_keys=True, ensure_ascii=False)
    for character in {*_ESCAPED, *(character for character in set(text) if visible(character) != character)}:
        text = text.replace(character, "".join(f"\\u{unit:04x}" for unit in _utf16(character)))
    return text.encode("utf-8", "replace").decode("utf-8")


def _utf16(character: str) -> tuple[int, ...]:
    """UTF-16 code units of a character, because JSON escapes have four digits."""
    data = character.encode("utf-16-be", "surrogatepass")
    return tuple(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
