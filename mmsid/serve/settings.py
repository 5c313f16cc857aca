"""Limits of the service. `mmsid serve --set KEY=VALUE` sets one."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mmsid.catalog import PictureLimits
from mmsid.config import Section

KEY_VARIABLE = "MMSID_API_KEY"


class ServeSettings(Section):
    """Settings of `mmsid.serve.app.create_app`.

    Attributes:
        state: sqlite file of the appended items. None: `POST /items` is refused.
        api_key: key that requests carry as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None: none is asked for, and only requests
            to a loopback name and of the service's own page are answered.
        captions: write captions and interests.
        queue: requests that wait or are worked on; a further one is answered 429.
        batch: requests that are worked on together at most.
        ads: ads, or histories, of one request.
        body_bytes: longest body of a request.
        seconds: time limit of one request, waiting included.
        decoders: pictures that are decoded at the same time.
        pictures: limits on pictures. Pictures are decoded in child processes.
    """

    state: Path | None = None
    api_key: str | None = Field(None, min_length=16, repr=False)
    captions: bool = True
    queue: int = Field(64, ge=1)
    batch: int = Field(8, ge=1)
    ads: int = Field(64, ge=1)
    body_bytes: int = Field(16_000_000, ge=1_000)
    seconds: float = Field(30.0, gt=0)
    decoders: int = Field(2, ge=1)
    pictures: PictureLimits = PictureLimits(isolate=True, max_bytes=10_000_000)
