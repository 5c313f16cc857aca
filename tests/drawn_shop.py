"""One small catalogue, and the facts in which every other form of it must agree with its plain reading."""

from __future__ import annotations

import base64
import csv
import functools
import http.server
import io
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw

import mmsid
from mmsid.catalog import Catalog
from mmsid.cli import main

START = 1_700_000_000
ITEMS, PICTURES, USERS, EVENTS = 20, 21, 12, 60  # item 0 has two pictures, item 1 three; the last two items have none
_THINGS = [("home", "lighting", "lamp"), ("home", "furniture", "chair"), ("fashion", "footwear", "boot"), ("fashion", "clothing", "coat")]
_COLOURS, _BRANDS = ("red", "blue", "green"), ("Acme", "Lux", "Nord", "Zest")


class Shop:
    """20 items in `items.parquet`, 21 pictures of 16 x 12 in `images/`, 12 users with 5 interactions each in `sequences.parquet`.

    Attributes:
        rows: item_id, title, description (once ''), image (list of paths), categories (list), brand, color.
        users: user_id, items, timestamps in seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        self.rows = [self._draw(number) for number in range(ITEMS)]
        self.users = [
            {
                "user_id": f"u{user}",
                "items": [f"ad{(3 * user + 7 * step) % ITEMS}" for step in range(EVENTS // USERS)],
                "timestamps": [START + 86_400 * user + 3_600 * step for step in range(EVENTS // USERS)],
            }
            for user in range(USERS)
        ]
        pq.write_table(pa.Table.from_pylist(self.rows), folder / "items.parquet")
        pq.write_table(pa.Table.from_pylist(self.users), folder / "sequences.parquet")
        self.plain = functools.cache(self._plain)

    def _draw(self, number: int) -> dict[str, Any]:
        path, colour = _THINGS[number % 4], _COLOURS[number % 3]
        names = [f"images/ad{number}_{side}.png" for side in range({0: 2, 1: 3, 18: 0, 19: 0}.get(number, 1))]
        for side, name in enumerate(names):
            picture = Image.new("RGB", (16, 12), colour)
            ImageDraw.Draw(picture).rectangle((number % 8, 2, number % 8 + 4, 8), (7 * number, 99, 60 * side))
            picture.save(self.folder / name)
        return {
            "item_id": f"ad{number}",
            "title": f"{colour.title()} {path[-1]}, model {number}",
            "description": f"A {path[-1]} for people who like {colour}." if number else "",
            "image": names,
            "categories": [*path],
            "brand": _BRANDS[number % 4],
            "color": colour,
        }

    def picture(self, name: str) -> bytes:
        """Bytes of a picture by its path."""
        return (self.folder / name).read_bytes()

    def base64(self, name: str) -> str:
        """A picture as base64 text."""
        return base64.b64encode(self.picture(name)).decode()

    def events(self) -> list[dict[str, Any]]:
        """user_id, item_id, timestamp of every interaction, the last ones first."""
        return [
            {"user_id": user["user_id"], "item_id": item, "timestamp": time}
            for user in self.users
            for item, time in zip(user["items"], user["timestamps"])
        ][::-1]

    def keys(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """Keys of a `catalog:` section that reads the shop. Downloads and bytes are kept below `folder`. A field None is not set."""
        fields = {"attributes": ["brand", "color"]} | ({} if "events" in changes else {"timestamps": "timestamps"})
        keys = {"items": self.folder / "items.parquet", "image_root": self.folder, "picture_cache": folder / "pictures"}
        keys |= {} if "events" in changes else {"sequences": self.folder / "sequences.parquet"}
        fields |= changes.get("fields", {})
        return {**keys, **changes, "fields": {name: value for name, value in fields.items() if value is not None}}

    def read(self, folder: Path, keys: dict[str, Any]) -> Catalog:
        """The catalogue, ingested into `folder`/ingest."""
        return Catalog.read(mmsid.ingest(folder / "ingest", keys))

    def _plain(self, attributes: tuple[str, ...] = ("brand", "color"), images: int = 9, users: bool = True) -> Catalog:
        """The plain reading, with some attributes, and with the first pictures of each item."""
        rows = [row | {"image": row["image"][:images]} for row in self.rows]
        folder = self.folder / f"plain-{'-'.join(attributes)}-{images}-{users}"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
        keys = self.keys(folder, items=folder / "items.parquet", fields={"attributes": [*attributes]})
        return self.read(folder, keys if users else keys | {"sequences": None, "fields": {"attributes": [*attributes]}})


def facts(catalog: Catalog, same_times: bool = True) -> dict[str, Any]:
    """Counts, content hashes by item, histories with their times; `sha256` covers ids, contents, histories and times."""
    return {
        "items": len(catalog.items),
        "pictures": sum(len(item.images) for item in catalog.items),
        "users": len(catalog.histories),
        "interactions": len(catalog.histories.rows),
        "contents": dict(zip(catalog.item_ids, catalog.content_hashes)),
        "histories": [(user.user_id, [catalog.item_ids[row] for row in user.rows], user.timestamps.tolist()) for user in catalog.histories],
        **({"sha256": catalog.sha256} if same_times else {}),
    }


def problems(catalog: Catalog) -> Counter[str]:
    """Problems that the plain catalogue does not have: two items without a picture, one without a description."""
    return Counter(catalog.problems) - Counter({"no_picture": 2, "no_description": 1})


def delimited(rows: list[dict[str, Any]], separator: str = ",", lists: str = "|", **options: Any) -> str:
    """Rows as csv text, with lists as joined texts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator="\n", **options)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: lists.join(map(str, value)) if isinstance(value, list) else value for name, value in row.items()})
    return text.getvalue()


def write(path: Path, data: str | bytes | list[dict[str, Any]] | pa.Table) -> Path:
    """Write a text, bytes, or a parquet table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, (list, pa.Table)):
        pq.write_table(data if isinstance(data, pa.Table) else pa.Table.from_pylist(data), path)
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def command(folder: Path, keys: dict[str, Any], *arguments: str) -> None:
    """`mmsid catalog` of a configuration with these keys."""
    catalog = {name: str(value) if isinstance(value, Path) else value for name, value in keys.items()}
    write(folder / "c.yaml", yaml.safe_dump({"name": "c", "runs": str(folder / "runs"), "catalog": catalog}))
    main(["catalog", "--config", str(folder / "c.yaml"), *arguments])


class FileServer:
    """A web server on loopback for the files below a folder. Any other path answers 404."""

    def __init__(self, folder: Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        self.server.shutdown()
        self.server.server_close()
