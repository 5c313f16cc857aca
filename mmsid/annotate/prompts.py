"""Prompts: plain files, versioned by the hash that every row carries; untrusted text enters as delimited JSON, never raw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmsid.artifacts import sha256
from mmsid.catalog.prompt_injection import visible
from mmsid.errors import ConfigError

PLACEHOLDER = "{{evidence}}"
_ESCAPED = "<>`|＜＞｀｜\u2028\u2029"


@dataclass(frozen=True)
class Prompt:
    """A prompt's text (outer whitespace stripped), its sha256 and the name it was asked for by."""

    text: str
    sha256: str
    name: str

    @property
    def wants_evidence(self) -> bool:
        """True when the item's own text is part of this prompt."""
        return PLACEHOLDER in self.text

    def render(self, evidence: str) -> str:
        """The prompt with `evidence` (from `evidence_json`) in its place; unchanged when it has no place for it."""
        return self.text.replace(PLACEHOLDER, evidence)


def prompt_folder() -> Path:
    """Where the shipped prompts lie: inside the installed package, or at the top of a checkout.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "prompts", package.parent / "prompts"):
        if (folder / "caption.md").is_file():
            return folder
    raise ConfigError(f"no prompts beside {package}; install mmsid again or give the prompt as a path")


def load_prompt(name: str | Path) -> Prompt:
    """A shipped prompt by name (`caption_demo`), or any file by path (`my/prompt.md`).

    Raises:
        ConfigError: no such prompt, or it is empty or names a placeholder other than `{{evidence}}`.
    """
    path = Path(name)
    if path.suffix == "" and len(path.parts) == 1:
        path = prompt_folder() / f"{name}.md"
    if not path.is_file():
        shipped = ", ".join(sorted(found.stem for found in prompt_folder().glob("*.md")))
        raise ConfigError(f"prompt {str(name)!r}: no file {path}; name a shipped one ({shipped}) or the path of a file")
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ConfigError(f"prompt {path} is empty; write the instruction into it")
    if "{{" in text.replace(PLACEHOLDER, ""):
        raise ConfigError(f"prompt {path} has a placeholder other than {PLACEHOLDER}; only that one is filled in")
    return Prompt(text=text, sha256=sha256(text), name=str(name))


def evidence_json(*, title: str = "", description: str = "", caption: str = "", descriptor: str | None = None, longest: int = 4_000) -> str:
    """One item's text as a JSON object with sorted keys, each field cut at `longest` characters; the `descriptor` only where one is judged.

    Angle brackets, backticks and bars (full-width ones too) and every character that no reader sees are written as escapes, so no
    text of an advertiser can close the marker lines around it, open a chat role, name a special token such as `<image>`, or
    whisper to the model. Quotes and line ends are JSON's own escapes.
    """
    fields = {"title": title[:longest], "description": description[:longest], "caption": caption[:longest]}
    if descriptor is not None:
        fields["descriptor"] = descriptor[:longest]
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    for character in {*_ESCAPED, *(character for character in set(text) if visible(character) != character)}:
        text = text.replace(character, "".join(f"\\u{unit:04x}" for unit in _utf16(character)))
    return text.encode("utf-8", "replace").decode("utf-8")


def _utf16(character: str) -> tuple[int, ...]:
    """Code units of a character: JSON escapes have four digits."""
    data = character.encode("utf-16-be", "surrogatepass")
    return tuple(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
