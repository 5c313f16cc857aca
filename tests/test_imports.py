"""Imports run one way: from the command down to the foundation; rooms of one storey do not know each other."""

import ast
from pathlib import Path

import mmsid

PACKAGE = Path(mmsid.__file__).parent
STOREY = {"cli": 5, "report": 4, "recommend": 4, "refine": 4, "tokenizer": 3, "annotate": 3}
STOREY |= {"sids": 2, "quantize": 2, "backbone": 2, "catalog": 2}
STOREY |= {"artifacts": 1, "config": 1, "disk": 1, "progress": 1, "precision": 1, "trainers": 1, "on_ray": 1, "errors": 0}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "mmsid" and len(parts) > 1 else None


def imported_rooms(path: Path) -> set[str]:
    """Rooms named by any import in the file, at the top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it from mmsid"
            rooms |= {
                room_of(f"{node.module}.{alias.name}") if node.module == "mmsid" else room_of(node.module or "") for alias in node.names
            }
    return rooms - {None, "__version__"}


def test_imports_never_turn_back():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in STOREY, f"{path}: a room that the house does not know"
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imported_rooms(path) - {room}
            if STOREY[other] >= STOREY[room] and not (STOREY[room] == STOREY[other] == 1)
        ]
    assert not wrong, "\n".join(wrong)


def test_torchvision_is_never_imported_at_the_top():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(name.startswith("torchvision") for name in names), f"{path} imports torchvision"
