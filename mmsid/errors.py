"""Exceptions of mmsid. Every message names the fault, the place (file, row, field), both values and the remedy."""


class MmsidError(Exception):
    """Base class of all mmsid errors. The command line prints them without a traceback."""


class ConfigError(MmsidError):
    """A configuration file or override is invalid. The message names the key, the file and the remedy."""


class CatalogError(MmsidError):
    """A catalogue cannot be read. The message names file, rows, field and the remedy."""


class PictureError(MmsidError):
    """One picture cannot be used. `reason` is a fixed code, never the decoder's own text, which may leak memory addresses.

    `detail` is '' or a fact that helps a person, such as `HTTP 404`.
    """

    def __init__(self, reason: str, message: str = "", detail: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.detail = detail


class ArtifactError(MmsidError):
    """An artefact folder is unfinished, damaged, of another schema version, or was made by another configuration."""


class AnnotationError(MmsidError):
    """Generated text violates its schema, or the error rate of a job exceeds its limit. `reason` is a fixed code."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
