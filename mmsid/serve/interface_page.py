"""Page of the interface at /docs, made from the OpenAPI document without any external resource, and the examples in that document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mOUizrBgA0wMeAAg1MCAP3eAVCoNiQUAAAAAElFTkSuQmCC"
EXAMPLES: dict[str, dict[str, Any]] = {
    "encode": {
        "one ad": {"title": "Summer sandals", "categories": ["fashion", "shoes"], "image": PIXEL, "k": 3},
        "many ads": {"ads": [{"item_id": "a", "title": "Summer sandals"}, {"title": "Oak desk", "attributes": {"material": "oak"}}]},
    },
    "recommend": {
        "ids": {"histories": [["item_1", "item_2"]], "k": 5},
        "ids and a new ad": {"histories": [["item_1", {"title": "Oak desk"}]], "k": 5},
    },
    "items": {
        "one item": {"item_id": "new_1", "title": "Summer sandals", "image": PIXEL},
        "many items": {"items": [{"item_id": "new_2", "title": "Oak desk"}, {"item_id": "new_3", "title": "Tin mug"}]},
    },
}
_MODELS = {"encode": ("EncodeRequest", "AdWithId"), "recommend": ("RecommendRequest", None), "items": ("AppendRequest", "NewItem")}


def request_body(route: str) -> dict[str, Any]:
    """`openapi_extra` of a route: the schemas of its request, with examples."""
    many, one = _MODELS[route]
    schemas = [{"$ref": f"#/components/schemas/{name}"} for name in (many, one) if name]
    schema = schemas[0] if one is None else {"anyOf": schemas}
    content: dict[str, Any] = {
        "application/json": {"schema": schema, "examples": {name: {"value": value} for name, value in EXAMPLES[route].items()}}
    }
    if one is not None:
        texts = {name: {"type": "string"} for name in ("item_id", "title", "description", "caption", "categories", "attributes")}
        files = {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": texts | files}}
    return {"requestBody": {"required": True, "content": content}}


def interface_page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document."""
    schemas = document.get("components", {}).get("schemas", {})
    routes = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {})
            examples = content.get("application/json", {}).get("examples", {})
            named = [f"#/components/schemas/{name}" for name in schemas]
            text = json.dumps([route.get("requestBody", {}), route["responses"].get("200", {})])
            names = [name for name, reference in zip(schemas, named, strict=True) if f'"{reference}"' in text]
            routes.append(
                {
                    "method": method.upper(),
                    "path": path,
                    "about": route.get("description", ""),
                    "forms": "multipart/form-data" in content,
                    "examples": [(name, _curl(path, one["value"])) for name, one in examples.items()],
                    "answers": [(status, answer["description"]) for status, answer in sorted(route["responses"].items())],
                    "schemas": [(name, json.dumps(schemas[name], indent=1)) for name in names],
                }
            )
    template = Path(__file__).with_name("interface_page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(**document["info"], routes=routes)


def _curl(path: str, body: Any) -> str:
    data = json.dumps(body, ensure_ascii=False)
    return f"curl http://127.0.0.1:8765{path} -H 'Content-Type: application/json' -d '{data}'"
