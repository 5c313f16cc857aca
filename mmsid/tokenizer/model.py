"""`ItemTokenizer`: a backbone with SID and EMB query tokens that maps an item to its Semantic ID and its embedding.

Raw codes do not depend on the batch, the order of items, or saving and loading. `encode` runs in fp32; items whose best code leads
by no more than rounding error (matrix products of other shapes round differently) are encoded again, alone and unpadded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import Field
from torch import Tensor, nn

from mmsid.artifacts import read_json, read_weights, sha256, verify_file, write_json, write_tensors
from mmsid.backbone.lora import add_lora, load_lora, save_lora
from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryBackbone, QueryStates
from mmsid.backbone.vlm import open_as_is
from mmsid.catalog import Item
from mmsid.config import Section
from mmsid.errors import ArtifactError, ConfigError, MmsidError
from mmsid.tokenizer.backbones import BackboneSettings, build_backbone
from mmsid.tokenizer.behaviour import FULL_TRUST, BehaviourInput, BehaviourSettings, ItemBehaviour
from mmsid.tokenizer.heads import CodeHead, make_head
from mmsid.tokenizer.inputs import ALL_FIELDS, FieldName, ItemInput, record_input
from mmsid.tokenizer.picture_input import PictureInput, PictureSettings

FORMAT = 2
_BEHAVIOUR, _PICTURES = "behaviour", "item_pictures"  # keys of a batch that the backbone does not read
ROUNDING_MARGIN = 1e-4  # relative margin below which rounding could decide; fp32 noise of a whole forward pass is about 1e-6
ROUNDING_MARGIN_16_BIT = 1e-2  # the same for a backbone in bf16 or fp16, whose states have three digits


class TokenizerSettings(Section):
    """Architecture of a tokenizer.

    Attributes:
        code_dim: dimension of the code space of the residual head.
        behaviour: behaviour input of the head, set by training or refinement; None for none.
        pictures: picture input beside the backbone (`picture_input`); None for none.
        use: the item fields that the tokenizer was trained on; new items are encoded from the same fields.
    """

    backbone: BackboneSettings = BackboneSettings()
    head: Literal["residual", "parallel"] = "residual"
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    code_dim: int = Field(448, ge=1)
    embedding_dim: int = Field(448, ge=1)
    behaviour: BehaviourSettings | None = None
    pictures: PictureSettings | None = None
    use: tuple[FieldName, ...] = ()
    seed: int = 0


class Encoded(NamedTuple):
    """Encoded items.

    Attributes:
        raw_codes: (N, L) int64.
        embedding: (N, embedding_dim) fp32, rows of unit length.
        margin: (N,) smallest margin of the chosen code over the second best, over all levels, in nats.
        scores: (N, L, D) projected states, the input of `head.level_logits`.
    """

    raw_codes: Tensor
    embedding: Tensor
    margin: Tensor
    scores: Tensor


class ItemTokenizer(nn.Module, ModelHubMixin, library_name="mmsid", tags=["semantic-ids", "recommendation"]):
    """Item tokenizer: a backbone with query tokens, the SID head (quantizer policy) on the SID states, and a linear embedding head on the
    EMB state."""

    def __init__(self, settings: TokenizerSettings, open_picture: Callable[[Any], Any] = open_as_is, *, saved: Path | None = None) -> None:
        super().__init__()
        self.settings = settings
        self._warned_of_unread = 0
        self.backbone = build_backbone(settings.backbone, settings.num_levels, settings.seed, open_picture)
        self.backbone_sha256 = fingerprint(self.backbone.model)
        self.pictures = None if settings.pictures is None else PictureInput(settings.pictures, open_picture)
        if saved is not None:
            self._check_backbone(saved)
        if saved is not None and (saved / "adapter").is_dir():
            load_lora(self.backbone, saved / "adapter", trainable=True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                if isinstance(self.backbone, QueryBackbone):
                    add_lora(self.backbone, settings.backbone.lora)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.head: CodeHead = make_head(
                settings.head,
                self.content_size,
                settings.num_levels,
                settings.codebook_size,
                settings.code_dim,
                settings.behaviour,
            )
            self.emb_head = nn.Linear(self.content_size, settings.embedding_dim)

    def _check_backbone(self, saved: Path) -> None:
        trained_on = read_json(saved / "config.json")["backbone_sha256"]
        if self.backbone_sha256 != trained_on:
            raise ArtifactError(
                f"{saved} was trained on other weights of {self.settings.backbone.path!r} (expected {trained_on[:12]}, found "
                f"{self.backbone_sha256[:12]}); set backbone.path to the model it was trained on"
            )

    @property
    def num_levels(self) -> int:
        """L, the number of codes per item."""
        return self.settings.num_levels

    @property
    def codebook_size(self) -> int:
        """K, the number of codes per level."""
        return self.settings.codebook_size

    @property
    def score_width(self) -> int:
        """D, the last dimension of `Encoded.scores`."""
        if self.settings.head == "residual":
            return self.settings.code_dim
        return self.codebook_size + (0 if self.settings.behaviour is None else self.settings.behaviour.dim)

    @property
    def content_size(self) -> int:
        """H, the size of a state: that of the backbone, and of the picture input if there is one."""
        return self.backbone.hidden_size + (0 if self.settings.pictures is None else self.settings.pictures.dim)

    @property
    def reads_pictures(self) -> bool:
        """Whether pictures are an input."""
        fields = self.settings.use or ALL_FIELDS
        return (self.settings.backbone.kind == "vlm" or self.pictures is not None) and "pictures" in fields

    @property
    def behaviour(self) -> BehaviourInput | None:
        """The behaviour input of the head, if there is one."""
        return getattr(self.head, "behaviour", None)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.queries.device

    def tokens_of(self, items: Sequence[ItemInput]) -> list[Batch]:
        """Model inputs of each item without query tokens; with the rows `behaviour` (1, M + 1) and `item_pictures` (1, dim) of a tokenizer
        that has such inputs."""
        tokens = self.backbone.tokens_of(items)
        if self.pictures is not None:
            for row, vector in zip(tokens, self.pictures.vectors(items), strict=True):
                row[_PICTURES] = vector[None]
        if self.settings.behaviour is not None:
            for row, item in zip(tokens, items, strict=True):
                known = item.behaviour if item.behaviour is not None else np.zeros(self.settings.behaviour.dim + 1, np.float32)
                row[_BEHAVIOUR] = torch.from_numpy(known)[None]
        return tokens

    def collate(self, items: Sequence[ItemInput], pad_to: int | None = None) -> Batch:
        """Batch of model inputs for `hidden`; see `QueryBackbone.collate`."""
        return self.backbone.stack(self.tokens_of(items), pad_to)

    def content(self, batch: Batch) -> QueryStates:
        """States of the query tokens (B, L + 1, H), and the mean content state (B, H), both with the pictures of the picture input."""
        output = self.backbone.read({key: value for key, value in batch.items() if key not in (_BEHAVIOUR, _PICTURES)})
        return output if self.pictures is None else self.pictures.beside(output, batch[_PICTURES])

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of the SID tokens (B, L, H) and of the EMB token (B, H), each plus the mean content state; with gradient.

        With a behaviour input, the item's behaviour follows every SID state: (B, L, H + M + 1).
        """
        output = self.content(batch)
        states = output.states
        if self.settings.backbone.states == "pooled":
            states = output.pooled[:, None].expand_as(states)
        h = states[:, :-1]
        if self.settings.behaviour is not None:
            h = torch.cat([h, batch[_BEHAVIOUR].to(h)[:, None].expand(-1, self.num_levels, -1)], -1)
        return h, states[:, -1]

    def embed(self, e: Tensor) -> Tensor:
        """Item embedding of EMB states: (B, H) -> (B, embedding_dim), rows of unit length."""
        return nn.functional.normalize(self.emb_head(e), dim=-1)

    @torch.no_grad()
    def encode(
        self,
        items: Sequence[Mapping[str, Any] | Item | ItemInput],
        batch_size: int = 32,
        *,
        behaviour: np.ndarray | None = None,
        interactions: np.ndarray | None = None,
    ) -> Encoded:
        """Raw codes and embeddings of items in their order, in fp32. An item's codes do not depend on the other items or the order.

        Args:
            items: dictionaries with the keys `title`, `description`, `categories`, `attributes`, `caption`, `interests`, `image` or
                `images` (PIL images, paths, bytes), `vectors`, rows of a Hugging Face dataset, or `Item` objects. The tokenizer reads the
                fields that it was trained on (`settings.use`).
            behaviour: (N, M) behaviour vectors, for a tokenizer that was trained with them. Without them, items are read by their
                content alone.
            interactions: (N,) number of interactions behind each vector; 0 reads the content alone. By default vectors are trusted fully.

        Raises:
            CatalogError: an unknown key or a value of the wrong type.
            PictureError: a picture that cannot be decoded.
            MmsidError: the weights give NaN or infinite states.
        """
        fields = self.settings.use or ALL_FIELDS
        inputs = [record_input(item, fields, self.reads_pictures, f"item {row}") for row, item in enumerate(items)]
        if behaviour is not None:
            inputs = self._given_behaviour(behaviour, interactions, len(inputs)).added_to(inputs)
        parts = list(self.stream(inputs, batch_size))
        if not parts:
            return Encoded(
                torch.zeros(0, self.num_levels, dtype=torch.int64),
                torch.zeros(0, self.settings.embedding_dim),
                torch.zeros(0),
                torch.zeros(0, self.num_levels, self.score_width),
            )
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return Encoded(*(torch.cat(column)[order] for column in zip(*(encoded for _, encoded in parts), strict=True)))

    def _given_behaviour(self, vectors: np.ndarray, interactions: np.ndarray | None, count: int) -> ItemBehaviour:
        """Check the behaviour given to `encode`."""
        if self.settings.behaviour is None:
            raise ConfigError("this tokenizer has no behaviour input; train it with `behaviour: coengagement`, or encode without behaviour")
        vectors = np.asarray(vectors, dtype=np.float32)
        interactions = np.full(count, FULL_TRUST) if interactions is None else np.asarray(interactions, dtype=np.float64)
        expected = (count, self.settings.behaviour.dim)
        if vectors.shape != expected or interactions.shape != (count,):
            raise ConfigError(
                f"encode: behaviour {vectors.shape} and interactions {interactions.shape}, expected {expected} and ({count},)"
            )
        return ItemBehaviour(vectors, np.where(vectors.any(1), interactions, 0))

    def windows(self, items: Sequence[BackboneInput], batch_size: int) -> list[list[int]]:
        """Row numbers of `items`, sorted by text length and cut into the windows of `stream`: no batch spans two windows."""
        order = sorted(range(len(items)), key=lambda row: (len(items[row].text), len(items[row].pictures)))
        window = batch_size * self.backbone.look_ahead
        return [order[first : first + window] for first in range(0, len(order), window)]

    @torch.no_grad()
    def stream(self, items: Sequence[ItemInput], batch_size: int = 32) -> Iterator[tuple[Tensor, Encoded]]:
        """Encode batch by batch: yields row numbers (b,) and their `Encoded`, on the CPU.

        Batches are formed from items of similar text length and, within a window, of similar token count, which saves padding.
        """
        was_training = self.training
        self.eval()
        try:
            for window in self.windows(items, batch_size):
                tokens = self.tokens_of([items[row] for row in window])
                by_count = sorted(range(len(window)), key=lambda index: tokens[index]["input_ids"].shape[1])
                for start in range(0, len(window), batch_size):
                    indices = by_count[start : start + batch_size]
                    yield torch.tensor([window[index] for index in indices]), self._encode_tokens([tokens[index] for index in indices])
        finally:
            self.train(was_training)
            self.warn_of_unread_pictures()

    @property
    def rounding_margin(self) -> float:
        """Relative margin below which rounding in the backbone's number format could decide a code."""
        return ROUNDING_MARGIN if self.backbone.number_format == torch.float32 else ROUNDING_MARGIN_16_BIT

    def warn_of_unread_pictures(self) -> None:
        """Warn of the items that a vision-language backbone or the picture input has read without their pictures since the last warning."""
        unread: dict[tuple[str, ...], str] = getattr(self.backbone, "unread", {})
        if self.pictures is not None:
            unread = unread | {("", *pictures): reason for pictures, reason in self.pictures.unread.items()}
        new = list(unread.items())[self._warned_of_unread :]
        self._warned_of_unread = len(unread)
        if new:
            (_, *pictures), reason = new[0]
            which = "" if pictures[0].startswith("<") else f" of {pictures[0]}"  # the repr of a picture in memory
            warnings.warn(f"{len(new):,} items are read without their pictures; the reason{which}: {reason}", stacklevel=3)

    def _encode_tokens(self, tokens: Sequence[Batch]) -> Encoded:
        """Encode a batch. Items whose margin is within rounding error are encoded again, alone and unpadded."""
        *encoded, relative_margin = self._encode_batch(tokens)
        for i in (relative_margin < self.rounding_margin).nonzero().flatten().tolist() if len(tokens) > 1 else ():
            for column, value in zip(encoded, self._encode_batch([tokens[i]]), strict=False):
                column[i] = value[0]
        return Encoded(*encoded)

    def _encode_batch(self, tokens: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        return tuple(x.cpu() for x in (greedy.codes, embedding, greedy.margin, s, greedy.relative_margin))  # type: ignore[return-value]

    # --- saving and loading

    def trained_state(self) -> dict[str, Tensor]:
        """All weights outside the backbone model and its adapter: query tokens, head, embedding head."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.model.")}

    def sha256(self) -> str:
        """Hash of settings, backbone and trained weights; SID tables refer to their tokenizer by it.

        Settings at their defaults are left out of the hash, so that a new setting does not change the hash of existing tokenizers.
        """
        trained = self.trained_state() | {name: value for name, value in self.state_dict().items() if "lora_" in name}
        weights = {name: sha256(value.detach().cpu().contiguous().numpy().tobytes()) for name, value in trained.items()}
        if self.behaviour is not None and self.behaviour.item_ids:
            weights["behaviour_items"] = sha256(self.behaviour.item_ids)
        return sha256(
            {"settings": self.settings.model_dump(mode="json", exclude_defaults=True), "backbone": self.backbone_sha256, "weights": weights}
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        save_lora(self.backbone, folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)  # the empty template of peft
        write_tensors(folder / "model.safetensors", self.trained_state())
        if self.behaviour is not None:
            self.behaviour.save_items(folder)
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
        """Load a tokenizer from a folder or a hub id.

        Args:
            open_picture: opens the pictures of an item, for a tokenizer that reads pictures.
            hub: options of the download (`revision`, `token`, ...).

        Raises:
            ArtifactError: not a tokenizer folder, an unknown format, damaged or NaN weights, or a backbone whose weights are not
                those that the tokenizer was trained on.
        """
        folder = Path(folder)
        if not folder.is_dir() and hub.pop("local_files_only", None) is not True and len(folder.parts) == 2 and not folder.is_absolute():
            folder = Path(snapshot_download(str(folder), **hub))
        if not (folder / "config.json").is_file():
            raise ArtifactError(f"{folder} is not a tokenizer folder: it has no config.json; run `mmsid train_tokenizer` first")
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")):
            verify_file(path)
        config = read_json(folder / "config.json")
        if config.get("format") != FORMAT:
            raise ArtifactError(f"{folder}: tokenizer format {config.get('format')!r}, this version reads {FORMAT}; train it again")
        settings = TokenizerSettings.model_validate(config["settings"])
        tokenizer = cls(settings, open_picture, saved=folder)
        problems = tokenizer.load_state_dict(read_weights(folder / "model.safetensors"), strict=False)
        missing = [name for name in problems.missing_keys if not name.startswith("backbone.model.")]
        if missing or problems.unexpected_keys:
            raise ArtifactError(
                f"{folder}: weights do not match the settings (missing {missing}, unexpected {problems.unexpected_keys}); train it again"
            )
        if tokenizer.behaviour is not None:
            tokenizer.behaviour.load_items(folder)
        return tokenizer.eval()

    def describe(self) -> str:
        """One paragraph for the model card: backbone, head, sizes, input fields."""
        s = self.settings
        fields = ", ".join(s.use) or "any text"
        behaviour = "none" if s.behaviour is None else f"{s.behaviour.source}, {s.behaviour.dim} dimensions"
        pictures = "" if s.pictures is None else f" Picture input: {' and '.join(s.pictures.encoders)}, {s.pictures.dim} dimensions."
        return (
            f"Backbone {s.backbone.describe()}, "
            f"{s.head} head, {s.num_levels} levels of {s.codebook_size} codes, "
            f"code space of size {s.code_dim}, embedding of size {s.embedding_dim}. "
            f"Input fields: {fields}. Behaviour input: {behaviour}.{pictures} "
            f"`ItemTokenizer.from_pretrained(folder).encode(items)` gives raw codes and embedding."
        )


def fingerprint(model: nn.Module) -> str:
    """Fast hash of a model: names, shapes and up to nine values of every weight (hashing all bytes of a large model takes minutes)."""
    entries = []
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 8)][:9].float().cpu().tolist()
        entries.append([name, list(weight.shape), [f"{value:.6e}" for value in sample]])
    return sha256(entries)
