"""The house rules of environment, notebooks and stages."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from test_pipeline import ROOT, TRACKED

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PINS = (ROOT / "requirements.txt").read_text()


def test_lint():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "bonelib", "tests", "notebooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_pins_can_be_installed_anywhere():
    assert not re.search(r"\+|://|@|--hash", PINS) and "torch==2.13.0\n" in PINS
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in PINS.splitlines())


def test_pins_hold_every_direct_dependency():
    names = {line.split("==")[0].lower().replace("_", "-") for line in PINS.splitlines()}
    direct = [line for line in (ROOT / "requirements.in").read_text().splitlines() if line and not line.startswith("#")]
    assert {d.split("==")[0].lower() for d in direct} <= names


def test_conda_and_project_agree_with_the_pins():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip", {"pip": ["-r requirements.txt", "-e ."]}]
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_torchvision_is_absent_or_works():
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("torchvision")  # raises where its build does not fit torch's, and then breaks others


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stripped_and_in_shape(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code), "run `make strip`"
    assert set(notebook.metadata) == {"kernelspec"} and notebook.metadata.kernelspec.language == "python"
    lengths = sorted(
        sum(bool(x.strip()) and not x.strip().startswith("#") for x in c.source.splitlines()) for c in code
    )
    assert lengths[-1] <= 25 and sum(lengths) <= 170
    assert len([c for c in notebook.cells if c.cell_type == "markdown"]) >= len(code) - 3
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    assert sum(bool(re.search(r"^(from|import) ", c.source, re.M)) for c in code) == 1
    assert not re.search(r"^class |^!|sys\.path|\.backward\(", "\n".join(c.source for c in code), re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_run_by_hand_writes_to_scratch_only(path):
    cell = next(c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
    values = {
        n.targets[0].id: ast.literal_eval(n.value)
        for n in ast.parse(cell.source).body
        if isinstance(n.value, ast.Constant)
    }
    places = {k: v for k, v in values.items() if k in ("to", "state_dir", "figure_dir", "metrics_file")}
    assert {"figure_dir", "metrics_file"} <= set(places) and all(v.startswith("scratch/") for v in places.values())


def imports(source):
    """The bonelib modules that a source imports, as file paths, followed through what they import."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    found = set()
    for name in names:
        base = ROOT / name.replace(".", "/")
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if name.split(".")[0] == "bonelib" and file.is_file():
                found.add(file)
    return found


def reached(files):
    done = set()
    while files:
        file = files.pop()
        if file not in done:
            done.add(file)
            files |= imports(file.read_text())
    return {str(f.relative_to(ROOT)) for f in done}


# Running a stage, and being a package, changes no result
FREE = {
    "bonelib/__init__.py",
    "bonelib/nb.py",
    "bonelib/core/parallel.py",
    "bonelib/scans/__init__.py",
    "bonelib/latent/__init__.py",
    "bonelib/views/__init__.py",
}


def stage_deps():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    source = yaml.safe_load((ROOT / "params.yaml").read_text())["cohort"]["source"]
    return {
        name: (stage["cmd"], [d.replace("${cohort.source}", source) for d in stage["deps"]])
        for name, stage in stages.items()
    }


@pytest.mark.parametrize("name", stage_deps())
def test_a_stage_depends_on_all_the_code_it_runs(name):
    command, deps = stage_deps()[name]
    notebook = re.search(r"notebooks/\w+\.ipynb", command)
    if notebook:
        assert notebook.group() in deps
        cells = [c.source for c in nbformat.read(ROOT / notebook.group(), 4).cells if c.cell_type == "code"]
        code = reached(imports("\n".join(cells)))
    else:
        code = reached({ROOT / (re.search(r"-m ([\w.]+)", command)[1].replace(".", "/") + ".py")})
    said = {f for f in code - FREE if (ROOT / f).read_text().strip()}  # an empty __init__.py says nothing
    uncovered = {f for f in said if not any(f == d or f.startswith(d + "/") for d in deps)}
    assert not uncovered


def test_no_metric_and_no_figure_retrains_a_model():
    _, deps = stage_deps()["train"]
    assert not [d for d in deps if d.startswith(("bonelib/evaluation", "bonelib/views", "notebooks"))]


def test_byte_code_is_no_dependency():
    assert {"__pycache__/", "*.pyc", ".ipynb_checkpoints/"} <= set((ROOT / ".dvcignore").read_text().split())


def test_nothing_tracked_names_a_machine_or_loads_unsafely():
    unsafe = re.compile(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|pickle\.load|yaml\.load\(|shell\s*=\s*True")
    for name in TRACKED:
        path = ROOT / name
        if path.suffix == ".py" and path != Path(__file__):
            assert not unsafe.search(path.read_text()), name
        if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".txt"):
            assert not re.search(r"(?<![\w.])/(?:home|root|Users)/\w", path.read_text()) or path == Path(__file__), name
