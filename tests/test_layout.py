"""Which folder may import which, and how long modules and functions are."""

import ast
import importlib
import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UPWARD = {
    "scans": {"networks", "training", "evaluation", "latent", "studies", "views"},
    "networks": {"training", "evaluation", "latent", "studies", "views"},
    "evaluation": {"latent", "studies", "views"},
    "latent": {"studies", "views"},
    "studies": {"views"},
}
TOOLS = {"config", "corruption", "cost", "crops", "hagan_config"}  # used by several studies, and none themselves
TOOLS |= {"ablation", "hagan_cost", "image_quality"}  # studies, whose trials and tables that of HA-GAN takes up


def imported(path):
    """Names of bonelib modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("bonelib.")}


@pytest.mark.parametrize("folder", UPWARD)
def test_imports_point_up_the_list_of_folders(folder):
    for path in (ROOT / "bonelib" / folder).rglob("*.py"):
        assert not {name.split(".")[1] for name in imported(path)} & UPWARD[folder], path.name


def test_studies_do_not_import_one_another():
    studies = {path.stem: path for path in (ROOT / "bonelib/studies").glob("*.py")}
    for name, path in studies.items():
        others = {part for found in imported(path) for a, part in pairwise(found.split(".")) if a == "studies"}
        assert not others & studies.keys() - TOOLS - {name}, name


@pytest.mark.parametrize("folder", ["evaluation", "studies", "views"])
def test_modules_and_functions_are_short(folder):
    for path in (ROOT / "bonelib" / folder).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_every_name_that_is_imported_exists_also_inside_of_functions():
    missing = []
    for path in (ROOT / "bonelib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bonelib"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names if not hasattr(module, alias.name)):
                    if importlib.util.find_spec(f"{node.module}.{name}") is None:
                        missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
