"""Requests and answers of the service as typed models. They are checked strictly, and shown on the page of the interface."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmsid.serve.ads import LONGEST_CAPTION, LONGEST_ID, MAX_PICTURES

Text = Annotated[str, Field(max_length=100_000)]
ItemId = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
PICTURE = "Base64 text or data URL of a JPEG, PNG, WebP or another allowed picture file. URLs are not downloaded."


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Ad(_Request):
    """A new ad. It needs a picture, a title, a description or a caption."""

    title: Text | None = None
    description: Text | None = None
    categories: list[str] | str | None = Field(None, description="Names from root to leaf.")
    attributes: dict[str, str | list[str]] | None = None
    caption: str | None = Field(None, max_length=LONGEST_CAPTION, description="Without it, the bundle's model captions the picture.")
    interests: list[str] | None = Field(None, description="Without them, the bundle's model names them.")
    image: str | None = Field(None, description=PICTURE)
    images: list[str] | None = Field(None, max_length=MAX_PICTURES, description="Several pictures, as `image`.")


class NewItem(Ad):
    """A new ad with its id."""

    item_id: ItemId


class AdWithId(Ad):
    """A new ad; an id is returned as it was given."""

    item_id: ItemId | None = None


class EncodeRequest(_Request):
    """Several ads. A single ad may also be sent as the body itself, or as a form with the field `image`."""

    ads: list[AdWithId] = Field(min_length=1)
    k: int = Field(8, ge=0, le=100, description="Number of nearest ads.")
    pictures: bool = Field(False, description="Return thumbnails as data URLs.")


class RecommendRequest(_Request):
    """Histories, oldest first: ids of items, and new ads by their content."""

    histories: list[list[ItemId | Ad]] = Field(min_length=1)
    k: int = Field(10, ge=1, le=200, description="Items per history.")
    exclude_seen: bool = Field(True, description="Do not recommend items of the own history.")
    only: list[ItemId] | None = Field(None, max_length=100_000, description="Ids that may be recommended; all by default.")
    pictures: bool = False


class AppendRequest(_Request):
    """Several items. A single item may also be sent as the body itself, or as a form with the field `image`."""

    items: list[NewItem] = Field(min_length=1)


class Item(BaseModel):
    """A known item."""

    item_id: str
    title: str
    sid: list[str]
    caption: str
    interests: list[str]
    appended: bool
    picture: str | None


class Neighbour(Item):
    similarity: float = Field(description="Cosine of the embeddings.")


class Recommended(Item):
    score: float = Field(description="Comparable within one history only.")
    sources: list[str] = Field(
        description="Which sources proposed the item: semantic_id, embedding, co_engagement, words, labels; popular or new without history."
    )


class Interest(BaseModel):
    descriptor: str
    confidence: float


class Step(BaseModel):
    token: str
    items: int = Field(description="Items that share the SID up to this token.")
    examples: list[Item] = Field(description="The nearest of them.")


class Encoded(BaseModel):
    """An encoded ad."""

    status: Literal["ok"]
    item_id: str | None
    title: str
    caption: str | None
    interests: list[Interest]
    summary: str | None
    sid: list[str] = Field(description="Before collision handling; `POST /items` assigns the final codes.")
    codes: list[int]
    margin: float = Field(description="Smallest lead of a code over the second best, in nats.")
    path: list[Step]
    nearest: list[Neighbour]
    notes: list[str]


class Quarantined(BaseModel):
    """An ad that cannot be used."""

    status: Literal["quarantined"]
    item_id: str | None
    reason: str


class EncodeAnswer(BaseModel):
    """One result per ad, in their order; in = ok + quarantined. The status is 422 if no ad is usable."""

    results: list[Encoded | Quarantined]
    counts: dict[str, int]


class Recommendations(BaseModel):
    status: Literal["personal", "unknown_history", "empty_history"]
    unknown_ids: int
    items: list[Recommended]


class RecommendAnswer(BaseModel):
    """One result per history, in their order."""

    results: list[Recommendations]


class AppendedItem(BaseModel):
    status: Literal["added", "known", "conflict", "failed", "quarantined"] = Field(
        description="added; known: the same id and content were there; conflict: the id has other content; failed: no codes are left; "
        "quarantined: the item cannot be used."
    )
    item_id: str | None
    sid: list[str] | None
    reason: str | None


class AppendAnswer(BaseModel):
    """One result per item. The items that are `added` or `known` are on the disk. 409: all are in conflict; 422: none could be used."""

    results: list[AppendedItem]
    counts: dict[str, int]


class Problem(BaseModel):
    """What was wrong."""

    error: str
    detail: str


class About(BaseModel):
    """What is served."""

    version: str
    items: int
    appended: int
    num_levels: int
    codebook_size: int
    recommends: bool
    appends: bool
    notes: list[str]
    examples: list[Item]


def components() -> dict[str, Any]:
    """JSON schemas of the requests, by name, for the OpenAPI document."""
    found: dict[str, Any] = {}
    for model in (EncodeRequest, RecommendRequest, AppendRequest, AdWithId, NewItem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[model.__name__] = schema
    return found
