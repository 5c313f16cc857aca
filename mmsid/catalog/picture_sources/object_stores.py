"""Pictures of object stores and other file systems of fsspec: `s3://`, `gs://`, `az://`, `hf://`, `memory://` and more."""

from __future__ import annotations

import re

import fsspec
from fsspec.registry import known_implementations

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.http_client import DownloadError

_SAFE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf", "memory"})
"""Stores whose host is set by the user's own settings. The URL of any other kind names the host, which may be private."""
_LOCAL = frozenset({"file", "local"})


def read_store(url: str, limits: PictureLimits) -> bytes:
    """The bytes of a file of an object store, read with the user's own credentials for it.

    Raises:
        DownloadError: `scheme` for chained URLs (`zip::`), local files, and kinds that may name a private host unless
            `allow_private_hosts` is set; `driver` if a package is missing, which is named in the detail; `missing`, `http_403`,
            `too_many_bytes`, `timeout` or `connection`.
    """
    scheme = re.split(r"::|://", url, maxsplit=1)[0].lower()
    if "::" in url or scheme in _LOCAL or (scheme not in _SAFE and not limits.allow_private_hosts):
        raise DownloadError("scheme", url, scheme)
    if scheme not in fsspec.available_protocols():
        raise DownloadError("scheme", url, scheme)
    try:
        system, path = fsspec.core.url_to_fs(url)
        data = system.cat_file(path, start=0, end=limits.max_bytes + 1)
    except ImportError as error:
        raise DownloadError("driver", url, known_implementations.get(scheme, {}).get("err") or str(error)[:100]) from None
    except (FileNotFoundError, IsADirectoryError):
        raise DownloadError("missing", url) from None
    except PermissionError:
        raise DownloadError("http_403", url) from None
    except TimeoutError:
        raise DownloadError("timeout", url, again=True) from None
    except ValueError:
        raise DownloadError("bad_url", url) from None
    except Exception as error:  # drivers raise types of their own
        raise DownloadError("connection", url, type(error).__name__, again=True) from None
    if len(data) > limits.max_bytes:
        raise DownloadError("too_many_bytes", url)
    return data
