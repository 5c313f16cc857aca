"""Bundles: a tokenizer and the Semantic IDs that it published, in one folder that can be uploaded as a model repository.

`ItemTokenizer.from_pretrained(folder)` loads it, its model card gives the quality of the SIDs, and `sids/` contains them. The manifest
lists a version and the hash of every file, so that files of different versions are never mixed. It contains no path of the machine.
Further parts, such as a recommender, are written by `mmsid.serve.bundling`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmsid.artifacts import file_sha256, read_json, read_manifest, read_tensors, sha256, write_text, writing
from mmsid.errors import ArtifactError
from mmsid.progress import done
from mmsid.sids import SidTable
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.table import FILE_NAME
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.model_card import published_card
from mmsid.tokenizer.published_sids import RETIRED
from mmsid.tokenizer.trained_annotations import RECORD, trained_annotations

FORMAT = 2
_QUERIES = 256  # embeddings compared at once: limits memory
SIDS = "sids"
CARD = "README.md"
_PARTS = (FILE_NAME, INTRINSIC, "index.json", "trie.safetensors", "embeddings.safetensors")


@dataclass(frozen=True)
class Bundle:
    """A tokenizer and the Semantic IDs that it published.

    Attributes:
        tokenizer: encodes new items.
        table: published codes of N items.
        embeddings: (N, D) item embeddings, rows of unit length, in the order of `table`.
        version: 12 hex digits that identify the contents.
        folder: of the bundle.
        parts: names of the further parts in it, out of "recommender", "annotation" and "items".
    """

    tokenizer: ItemTokenizer
    table: SidTable
    embeddings: Tensor
    version: str
    folder: Path = field(default=Path(), compare=False)
    parts: tuple[str, ...] = ()

    def neighbours(self, embedding: Tensor, k: int = 10) -> list[list[tuple[str, float]]]:
        """The k nearest published items of each embedding by cosine: (n, D) -> n lists of (item id, similarity), nearest first."""
        queries = torch.nn.functional.normalize(embedding.to(self.embeddings), dim=-1)
        found = []
        for block in queries.split(_QUERIES):
            similarity, rows = (block @ self.embeddings.T).topk(min(k, len(self.table)))
            found += [
                [(self.table.item_ids[row], value) for row, value in zip(*pair, strict=True)]
                for pair in zip(rows.tolist(), similarity.tolist(), strict=True)
            ]
        return found


@dataclass(frozen=True)
class BundlePart:
    """A further part of a bundle.

    Attributes:
        name: of the part.
        sha256: hash of what the part is made from.
        write: writes the files of the part into a folder.
        described: one line for the model card.
    """

    name: str
    sha256: str
    write: Callable[[Path], None]
    described: str


def write_bundle(tokenizer: Path, sids: Path, out: Path, parts: Sequence[BundlePart] = ()) -> Path:
    """Combine a tokenizer folder, a SID folder and further parts into the bundle `out`.

    Raises:
        ArtifactError: the SIDs were made by another tokenizer, or a file is missing.
    """
    tokenizer, sids = Path(tokenizer), Path(sids)
    model, table = ItemTokenizer.from_pretrained(tokenizer), SidTable.load(sids)
    _check_pair(model.sha256(), table, str(tokenizer), str(sids))
    version = sha256([FORMAT, model.sha256(), file_sha256(sids / FILE_NAME), [[part.name, part.sha256] for part in parts]])[:12]
    with writing(out, stage="bundle", config={"format": FORMAT, "version": version}) as draft:
        (draft.path / SIDS).mkdir()
        for name in _PARTS:
            if not (sids / name).is_file():
                raise ArtifactError(f"{sids}: file {name} is missing; run `mmsid assign` again")
            shutil.copyfile(sids / name, draft.path / SIDS / name)
        if (sids / RETIRED).is_file():
            shutil.copyfile(sids / RETIRED, draft.path / SIDS / RETIRED)
        has_card = (tokenizer / CARD).is_file()
        card = (tokenizer / CARD).read_text(encoding="utf-8") if has_card else f"# Item tokenizer\n\n{model.describe()}\n"
        contents = "".join(f"- {part.described}\n" for part in parts)
        contents = f"\n## Further contents\n\n{contents}" if contents else ""
        write_text(draft.path / CARD, card.rstrip() + "\n\n" + published_card(version, table, read_json(sids / INTRINSIC)) + contents)
        model.save_pretrained(draft.path)
        for part in parts:
            part.write(draft.path)
        files = [path for path in sorted(draft.path.rglob("*")) if path.is_file() and path.name != "draft.json"]
        draft.extra.update(
            {
                "version": version,
                "tokenizer_sha256": model.sha256(),
                "catalog_sha256": table.catalog_sha256,
                "parts": [part.name for part in parts],
                RECORD: trained_annotations(tokenizer, model.settings.use),
                "files": {path.relative_to(draft.path).as_posix(): file_sha256(path) for path in files},
            }
        )
        draft.counts.update({"items": len(table)})
    more = "".join(f", {part.name}" for part in parts)
    done(f"bundle: wrote version {version}, {len(table):,} Semantic IDs and their tokenizer{more}, to {out}")
    return Path(out)


def load_bundle(folder: str | Path) -> Bundle:
    """Read a bundle and verify the hash of every file in it.

    Raises:
        ArtifactError: the folder is not a bundle, a file is missing or differs from the bundled one, or the SIDs are those of another
            tokenizer.
    """
    folder = Path(folder)
    extra = read_manifest(folder, "bundle")["extra"]
    for name, expected in extra["files"].items():
        found = file_sha256(folder / name) if (folder / name).is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"is another file (sha256 {found[:12]}, expected {expected[:12]})"
            raise ArtifactError(f"{folder}, version {extra['version']}: {name} {state}; copy the whole bundle again")
    tokenizer, table = ItemTokenizer.from_pretrained(folder), SidTable.load(folder / SIDS)
    _check_pair(tokenizer.sha256(), table, str(folder), str(folder / SIDS))
    embeddings = read_tensors(folder / SIDS / "embeddings.safetensors")["embeddings"]
    return Bundle(tokenizer, table, embeddings, extra["version"], folder, tuple(extra.get("parts", ())))


def _check_pair(tokenizer_sha256: str, table: SidTable, tokenizer: str, sids: str) -> None:
    if table.tokenizer_sha256 != tokenizer_sha256:
        raise ArtifactError(
            f"{sids} was made by tokenizer {table.tokenizer_sha256[:12] or 'unknown'}, but {tokenizer} is {tokenizer_sha256[:12]}; "
            "use the SIDs that this tokenizer assigned, or the tokenizer that assigned these"
        )
