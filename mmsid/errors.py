"""Errors for people. Every message says what was wrong, where (file, row, field), both values and the remedy."""


class MmsidError(Exception):
    """Base of all errors that mmsid raises on purpose; the command line prints the message without a traceback."""


class ConfigError(MmsidError):
    """A configuration file or override is wrong: names the key, the file and the remedy."""


class CatalogError(MmsidError):
    """A catalogue cannot be read: names file, rows, field and the remedy."""


class PictureError(MmsidError):
    """One picture cannot be used. `reason` is a short fixed code, never the decoder's own text (it may leak memory)."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class ArtifactError(MmsidError):
    """A folder on disk is unfinished, of another schema version, or was made by another configuration."""


class AnnotationError(MmsidError):
    """Generated text breaks its schema, or a job's error rate is above its gate. `reason` is a short code."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
