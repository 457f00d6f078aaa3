"""Imports point down only, and frameworks stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = """\
errors types needs spec registry records progress vision opacus_parts __version__
maths accounting claims config
measures attacks canaries defenses data models
training report kept_files
inference verification
audit
flower simulation
federation
studies offline
cli __main__ __init__
strategies clients"""
LEVEL = {part: level for level, parts in enumerate(LAYERS.splitlines()) for part in parts.split()}
APART = {LEVEL["measures"], LEVEL["strategies"]}  # layers whose parts never import each other
FLOWER = {"flower", "simulation", "strategies", "clients"}
ONLY_IN = {"flwr": FLOWER, "ray": FLOWER, "torchvision": {"vision"}, "strategies": set(), "clients": set()}
FILES = [path for top in ("fedaudit", "strategies", "clients") for path in sorted((ROOT / top).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    names = path.relative_to(ROOT).with_suffix("").parts
    here = names[1] if names[0] == "fedaudit" else names[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and here == names[0], "only the app imports relatively, and only siblings"
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        for top, *rest in (name.split(".") for name in imported):
            assert here in ONLY_IN.get(top, {here}), (
                f"{top} is imported in {ONLY_IN[top] or 'no module'} only"
            )
            there = rest[0] if top == "fedaudit" and rest else here
            below = LEVEL[there] < LEVEL[here] or (LEVEL[there] == LEVEL[here] and LEVEL[here] not in APART)
            assert there == here or below, f"{there} does not lie below {here}"
