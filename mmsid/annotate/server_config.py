"""Configuration of an OpenAI-compatible server: address, limits, and what is sent besides prompt and pictures."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from mmsid.config import Section


class ServerConfig(Section):
    """Address and limits of an OpenAI-compatible server.

    Only `json_schema` and `picture_format` influence the output. The other keys are not part of the manifest, so a draft can be resumed
    after they change.

    Attributes:
        base_url: address with the version, for example `http://127.0.0.1:8000/v1`.
        api_key_env: environment variable that contains the key. The key is never written. Leave the variable unset for servers
            without keys.
        concurrency: number of concurrent requests.
        timeout_seconds: time limit of one attempt.
        deadline_seconds: time limit of one request, including all attempts and pauses.
        json_schema: send the record's JSON schema as `response_format`. Some servers ignore it; the manifest counts the answers that
            fit it and those that do not.
        picture_format: encoding of the pictures in requests. `png` is lossless; `jpeg` (quality 90) takes a fifth to a tenth of the
            bytes.
    """

    base_url: str = Field(exclude=True)
    api_key_env: str = Field(default="OPENAI_API_KEY", exclude=True)
    concurrency: int = Field(default=16, ge=1, exclude=True)
    timeout_seconds: float = Field(default=120.0, gt=0.0, exclude=True)
    deadline_seconds: float = Field(default=600.0, gt=0.0, exclude=True)
    json_schema: bool = False
    picture_format: Literal["png", "jpeg"] = "png"

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError(
                "expected http(s)://host[:port]/path, without user, password or query; put a key into the variable named by api_key_env"
            )
        return value
