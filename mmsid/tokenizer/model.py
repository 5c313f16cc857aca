"""`ItemTokenizer`: one backbone that reads an item and answers with its Semantic ID and its embedding.

`encode` is the product's promise: an item alone, in a batch, in another order, after saving and loading gets the same raw
codes. It runs in fp32. Matrix products of other shapes still round differently in the last bits, so a code whose lead over the
second best is of that size would be a coin toss: such items are read again alone and unpadded, which is one fixed computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import Field
from torch import Tensor, nn

from mmsid.artifacts import read_json, read_weights, sha256, verify_file, write_json, write_tensors
from mmsid.backbone.lora import LoraSettings, add_lora, load_lora, save_lora
from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryBackbone
from mmsid.backbone.text import TextBackbone
from mmsid.backbone.vlm import INSTRUCTION, VlmBackbone, open_as_is
from mmsid.config import Section
from mmsid.errors import ArtifactError, MmsidError
from mmsid.tokenizer.behaviour_regression import BehaviourRegression
from mmsid.tokenizer.heads import CodeHead, make_head
from mmsid.tokenizer.inputs import FieldName

FORMAT = 1
DOUBTFUL = 1e-4  # relative lead under which rounding could decide; fp32 noise of a whole forward is about 1e-6


class BackboneSettings(Section):
    """Which backbone.

    `path`: "minilm", "demo" (with `kind: vlm`), a folder or a hub id; saved tokenizers keep this reference, not the weights.
    `states`: what the heads read, a state per query token, or for all of them the mean content state (a control: what do the tokens
    add?).
    """

    kind: Literal["text", "vlm"] = "text"
    path: str = "minilm"
    max_length: int = Field(96, ge=1)
    max_pictures: int = Field(1, ge=0)
    instruction: str = INSTRUCTION
    states: Literal["tokens", "pooled"] = "tokens"
    train_queries: bool = True
    lora: LoraSettings = LoraSettings()


class TokenizerSettings(Section):
    """All that shapes a tokenizer. `code_dim` is the size of the code space, `memory` the rows of the residual head's memory of
    behaviour (training sets it); `use` names the fields it reads, so that whoever encodes new items feeds it what it was trained on."""

    backbone: BackboneSettings = BackboneSettings()
    head: Literal["residual", "parallel"] = "residual"
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    code_dim: int = Field(448, ge=1)
    embedding_dim: int = Field(448, ge=1)
    behaviour_rows: int = Field(0, ge=0)
    use: tuple[FieldName, ...] = ()
    seed: int = 0


class Encoded(NamedTuple):
    """`raw_codes` (N, L) int64; `embedding` (N, embedding_dim) unit rows, fp32; `margin` (N,) smallest lead over the second-best code, in
    nats; `scores` (N, L, D) what the head scores the levels with (`head.level_logits`)."""

    raw_codes: Tensor
    embedding: Tensor
    margin: Tensor
    scores: Tensor


class ItemTokenizer(nn.Module, ModelHubMixin, library_name="mmsid", tags=["semantic-ids", "recommendation"]):
    """Backbone with query tokens, the quantizer policy on the SID states, a linear embedding head on the EMB state."""

    def __init__(self, settings: TokenizerSettings, open_picture: Callable[[Any], Any] = open_as_is, *, saved: Path | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = _build_backbone(settings, open_picture)
        self.backbone_sha256 = fingerprint(self.backbone.model)
        if saved is not None:
            self._check_body(saved)
        if saved is not None and (saved / "adapter").is_dir():
            load_lora(self.backbone, saved / "adapter", trainable=True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                add_lora(self.backbone, settings.backbone.lora)
        self.backbone.queries.requires_grad_(settings.backbone.train_queries)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.head: CodeHead = make_head(
                settings.head,
                self.backbone.hidden_size,
                settings.num_levels,
                settings.codebook_size,
                settings.code_dim,
                settings.behaviour_rows,
            )
            self.emb_head = nn.Linear(self.backbone.hidden_size, settings.embedding_dim)

    def _check_body(self, saved: Path) -> None:
        trained_on = read_json(saved / "config.json")["backbone_sha256"]
        if self.backbone_sha256 != trained_on:
            raise ArtifactError(
                f"{saved} was trained on other weights of {self.settings.backbone.path!r} ({trained_on[:12]}, found "
                f"{self.backbone_sha256[:12]}); point backbone.path at the model it was trained on"
            )

    @property
    def num_levels(self) -> int:
        """L."""
        return self.settings.num_levels

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.settings.codebook_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.queries.device

    def add_behaviour(self, regression: BehaviourRegression) -> None:
        """Give the residual head a fitted memory; the settings follow, so that a saved tokenizer is loaded with it."""
        self.head.behaviour = regression.to(self.device)
        self.settings = self.settings.model_copy(update={"behaviour_rows": len(regression.keys)})

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of the SID tokens (B, L, H) and of the EMB token (B, H), the mean content state folded in; with gradient."""
        reading = self.backbone.read(batch)
        states = reading.states
        if self.settings.backbone.states == "pooled":
            states = reading.pooled[:, None].expand_as(states)
        return states[:, :-1], states[:, -1]

    def embed(self, e: Tensor) -> Tensor:
        """The item embedding: EMB states (B, H) -> (B, embedding_dim), rows of unit length."""
        return nn.functional.normalize(self.emb_head(e), dim=-1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`hidden`, for wrappers that only call modules."""
        return self.hidden(batch)

    @torch.no_grad()
    def encode(self, items: Sequence[BackboneInput], batch_size: int = 32) -> Encoded:
        """Raw codes and embedding of `items` in their order; fp32, the same for an item alone, in a batch, in any order."""
        parts = list(self.stream(items, batch_size))
        place = torch.cat([rows for rows, _ in parts]).argsort() if parts else torch.zeros(0, dtype=torch.int64)
        if not parts:
            size, width = self.num_levels, self.codebook_size if self.settings.head == "parallel" else self.settings.code_dim
            return Encoded(
                torch.zeros(0, size, dtype=torch.int64),
                torch.zeros(0, self.settings.embedding_dim),
                torch.zeros(0),
                torch.zeros(0, size, width),
            )
        return Encoded(*(torch.cat(column)[place] for column in zip(*(encoded for _, encoded in parts), strict=True)))

    def windows(self, items: Sequence[BackboneInput], batch_size: int) -> list[list[int]]:
        """Rows of `items` by text length, cut where `stream` cuts them: no batch crosses a window."""
        order = sorted(range(len(items)), key=lambda row: (len(items[row].text), len(items[row].pictures)))
        window = batch_size * self.backbone.look_ahead
        return [order[first : first + window] for first in range(0, len(order), window)]

    @torch.no_grad()
    def stream(self, items: Sequence[BackboneInput], batch_size: int = 32) -> Iterator[tuple[Tensor, Encoded]]:
        """Encode batch by batch: yields (rows (b,), their `Encoded`), results on the CPU.

        Items of like text length come together, and within what the backbone can look ahead, items of like token count: a batch
        is padded to its longest row, and padding costs what tokens cost.
        """
        was_training = self.training
        self.eval()
        try:
            for ahead in self.windows(items, batch_size):
                tokens = self.backbone.tokens_of([items[row] for row in ahead])
                by_count = sorted(range(len(ahead)), key=lambda place: tokens[place]["input_ids"].shape[1])
                for start in range(0, len(ahead), batch_size):
                    places = by_count[start : start + batch_size]
                    yield torch.tensor([ahead[place] for place in places]), self._encode_tokens([tokens[place] for place in places])
        finally:
            self.train(was_training)

    def _encode_tokens(self, tokens: Sequence[Batch]) -> Encoded:
        """A batch; those whose lead is within rounding are read again, each alone and unpadded."""
        *encoded, relative = self._read(tokens)
        for i in (relative < DOUBTFUL).nonzero().flatten().tolist() if len(tokens) > 1 else ():
            for column, value in zip(encoded, self._read([tokens[i]]), strict=False):
                column[i] = value[0]
        return Encoded(*encoded)

    def _read(self, tokens: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch = {key: value.to(self.device) for key, value in self.backbone.stack(tokens, 1).items()}
        with torch.autocast(self.device.type, enabled=False):
            h, e = self.hidden(batch)
            s = self.head.project(h.float())
            greedy = self.head.greedy(s)
            embedding = self.embed(e.float())
        if not torch.isfinite(embedding).all() or not torch.isfinite(s).all():
            raise MmsidError(
                f"the tokenizer computes NaN or infinite states; its weights or those of {self.settings.backbone.path!r} are damaged: "
                "restore them or train again"
            )
        return tuple(x.cpu() for x in (greedy.codes, embedding, greedy.margin, s, greedy.relative))  # type: ignore[return-value]

    # --- disk

    def trained_state(self) -> dict[str, Tensor]:
        """All weights that are not the body's and not the adapter's: queries, head, embedding head."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.model.")}

    def sha256(self) -> str:
        """Hash of settings, body and weights: what a SID table names as its tokenizer. Settings at their defaults are left out, so that
        a new setting does not rename every tokenizer there is."""
        weights = {name: sha256(value.detach().cpu().contiguous().numpy().tobytes()) for name, value in self._all_trained().items()}
        return sha256(
            {"settings": self.settings.model_dump(mode="json", exclude_defaults=True), "backbone": self.backbone_sha256, "weights": weights}
        )

    def _all_trained(self) -> dict[str, Tensor]:
        adapter = {name: value for name, value in self.state_dict().items() if "lora_" in name}
        return self.trained_state() | adapter

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        save_lora(self.backbone, folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # peft's empty template
        write_tensors(folder / "model.safetensors", self.trained_state())
        card = folder / "README.md"
        if not card.exists():
            card.write_text(f"# Item tokenizer (mmsid)\n\n{self.describe()}\n", encoding="utf-8")
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                "settings": self.settings.model_dump(mode="json"),
                "backbone_sha256": self.backbone_sha256,
                "tokenizer_sha256": self.sha256(),
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, open_picture: Callable[[Any], Any] = open_as_is, **hub: Any) -> ItemTokenizer:
        """Load a tokenizer folder, or a hub id (`revision`, `token`, ... go to the download).

        Raises:
            ArtifactError: not a tokenizer folder, another format, damaged or NaN weights, or a body whose weights are not
            those it was trained on.
        """
        folder = Path(folder)
        if not folder.is_dir() and hub.pop("local_files_only", None) is not True and len(folder.parts) == 2 and not folder.is_absolute():
            folder = Path(snapshot_download(str(folder), **hub))
        if not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder} holds no config.json, so it is no tokenizer folder; run `mmsid train_tokenizer` first")
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
            verify_file(path)
        config = read_json(folder / "config.json")
        if config.get("format") != FORMAT:
            raise ArtifactError(f"{folder}: tokenizer format {config.get('format')!r}, this mmsid reads {FORMAT}; train it again")
        settings = TokenizerSettings.model_validate(config["settings"])
        tokenizer = cls(settings, open_picture, saved=folder)
        problems = tokenizer.load_state_dict(read_weights(folder / "model.safetensors"), strict=False)
        missing = [name for name in problems.missing_keys if not name.startswith("backbone.model.")]
        if missing or problems.unexpected_keys:
            raise ArtifactError(f"{folder}: weights do not fit (missing {missing}, unexpected {problems.unexpected_keys}); train it again")
        return tokenizer.eval()

    def describe(self) -> str:
        """One paragraph: backbone, head, sizes, fields read."""
        s = self.settings
        fields = ", ".join(s.use) or "whatever text it is given"
        return (
            f"Backbone {s.backbone.path} ({s.backbone.kind}, at most {s.backbone.max_length} text tokens, "
            f"LoRA rank {s.backbone.lora.r}), "
            f"{s.head} head, {s.num_levels} levels of {s.codebook_size} codes, "
            f"code space of size {s.code_dim}, embedding of size {s.embedding_dim}. "
            f"Reads: {fields}. `ItemTokenizer.from_pretrained(folder).encode(items)` gives raw codes and embedding."
        )


def fingerprint(model: nn.Module) -> str:
    """A quick hash of a body: names, shapes and some values of every weight (not all bytes, a body may be gigabytes)."""
    found = []
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 8)][:9].float().cpu().tolist()
        found.append([name, list(weight.shape), [f"{value:.6e}" for value in some]])
    return sha256(found)


def _build_backbone(settings: TokenizerSettings, open_picture: Callable[[Any], Any]) -> QueryBackbone:
    chosen = settings.backbone
    if chosen.kind == "vlm":
        return VlmBackbone(
            chosen.path,
            num_levels=settings.num_levels,
            max_length=chosen.max_length,
            max_pictures=chosen.max_pictures,
            open_picture=open_picture,
            instruction=chosen.instruction,
            seed=settings.seed,
        )
    return TextBackbone(chosen.path, num_levels=settings.num_levels, max_length=chosen.max_length, seed=settings.seed)
