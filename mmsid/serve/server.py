"""`mmsid serve`: the service in uvicorn, until SIGTERM or SIGINT."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.artifacts import read_manifest
from mmsid.config import apply_override, build
from mmsid.errors import ConfigError
from mmsid.progress import done
from mmsid.serve.settings import KEY_VARIABLE, ServeSettings


def serve(bundle: Path, host: str, port: int, state: Path | None = None, *, captions: bool = True, overrides: Sequence[str] = ()) -> None:
    """Serve a bundle. SIGTERM ends it after the requests that are being answered.

    Args:
        state: sqlite file of appended items. Default: beside the bundle.
        overrides: settings as `queue=128`.

    Raises:
        ConfigError: the extra `serve` is not installed, a setting is wrong, or the address is not loopback and there is no key.
        ArtifactError: the bundle or the file of appended items cannot be used.
    """
    try:
        import uvicorn

        from mmsid.serve.app import create_app
        from mmsid.serve.guard import is_loopback_host
    except ModuleNotFoundError as error:
        raise ConfigError(f"mmsid serve needs {error.name}; install the extra: pip install 'mmsid[serve]'") from error
    bundle = Path(bundle)
    read_manifest(bundle, "bundle")
    if not os.environ.get(KEY_VARIABLE) and not is_loopback_host(host):
        raise ConfigError(
            f"{host} is not loopback, so others can reach it: set a key in the environment variable {KEY_VARIABLE} (16 characters or "
            "more), or bind 127.0.0.1"
        )
    settings = serve_settings(state or bundle.parent / f"{bundle.name}.items.sqlite", captions=captions, overrides=overrides)
    app = create_app(bundle, settings)
    app.state.service.start()  # before uvicorn, which would print a traceback
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.seconds) + 5,
        h11_max_incomplete_event_size=64_000,
        lifespan="on",
        ws="none",
    )
    server = _server(config, bundle)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn handles it, and raises it once more when it has stopped
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        raise SystemExit(1)


def serve_settings(state: Path, *, captions: bool = True, overrides: Sequence[str] = ()) -> ServeSettings:
    """Settings from overrides such as `queue=128`, with the key of the environment.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    data: dict[str, Any] = {"state": state, "captions": captions, "pictures": ServeSettings().pictures.model_dump()}
    for override in overrides:
        name = override.partition("=")[0]
        if name in ("state", "captions", "api_key"):
            raise ConfigError(f"--set {name}: use --state, --no-caption, or the variable {KEY_VARIABLE}")
        apply_override(data, override, source="--set")
    return build(ServeSettings, data | {"api_key": os.environ.get(KEY_VARIABLE) or None}, source="mmsid serve", section="serve")


def _server(config: Any, bundle: Path) -> Any:
    """A uvicorn server that prints its address when it answers requests."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                done(f"serve: http://{f'[{host}]' if ':' in host else host}:{port} serves {bundle}; Ctrl-C ends it")

    return Server(config)
