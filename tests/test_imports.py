"""Imports between packages run one way, and no two files of the package import each other, directly or through others."""

import ast
from pathlib import Path

import mmsid

PACKAGE = Path(mmsid.__file__).parent
LEVEL = {"cli": 7, "api": 7, "demo": 6, "stages": 5, "inspection": 5, "serve": 5, "report": 4, "export": 4, "recommend": 4, "refine": 4}
LEVEL |= {"tokenizer": 3, "annotate": 3}
LEVEL |= {"unchanged": 3, "sids": 2, "quantize": 2, "backbone": 2, "catalog": 2}
LEVEL |= {
    "artifacts": 1,
    "annotation_coverage": 1,
    "config": 1,
    "identity": 1,
    "id_columns": 1,
    "disk": 1,
    "progress": 1,
    "progress_bar": 1,
    "accelerator": 1,
    "trl_training": 1,
    "ray_pool": 1,
    "errors": 0,
    "_version": 0,
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}


def imported_modules(module: str) -> set[str]:
    """Modules of the package that any import in the file names, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write it from mmsid"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES} - {module}


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_run_one_way():
    wrong = []
    for module in MODULES:
        if module == "mmsid":  # the public API imports lazily, from everywhere
            continue
        package = package_of(module)
        assert package in LEVEL, f"{module}: package {package} has no level; add it to LEVEL"
        for other in imported_modules(module) - {"mmsid"}:
            imported = package_of(other)
            same_foundation = LEVEL[package] == LEVEL[imported] == 1
            if imported != package and LEVEL[imported] >= LEVEL[package] and not same_foundation:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other():
    dependencies = {module: imported_modules(module) - {"mmsid"} for module in MODULES if module != "mmsid"}
    removed = True
    while removed:  # peel off what imports nothing that is left: what stays is a circle, or imports one
        free = {module for module, others in dependencies.items() if not others & dependencies.keys()}
        removed = bool(free)
        dependencies = {module: others for module, others in dependencies.items() if module not in free}
    circles = [f"{module} -> {', '.join(sorted(others & dependencies.keys()))}" for module, others in sorted(dependencies.items())]
    assert not circles, "import circle among:\n" + "\n".join(circles)


def test_torchvision_is_never_imported_at_the_top():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(name.startswith("torchvision") for name in names), f"{path} imports torchvision"
