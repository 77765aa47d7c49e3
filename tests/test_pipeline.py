"""The whole pipeline at its smallest size: what it makes, and what a second, a failed and a killed run do."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split("\n")[:-1]


def copy_of_the_repository(folder):
    for name in TRACKED:
        if (ROOT / name).is_file() and not name.startswith("dvc-store/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    (folder / "dvc.lock").unlink(missing_ok=True)
    params = folder / "params.yaml"
    params.write_text(re.sub(r"^profile: \w+", "profile: tiny", params.read_text(), flags=re.M))
    for command in ("init", "-q"), ("add", "-A"):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def set_value(params, path, value):
    """Set `a__b__c` of params.yaml; anchors are written out, so that nothing else follows it."""
    values = yaml.safe_load(params.read_text())
    *parents, last = path.split("__")
    part = values = json.loads(json.dumps(values))
    for key in parents:
        part = part[key]
    part[last] = value
    params.write_text(yaml.safe_dump(values, sort_keys=False))


@contextlib.contextmanager
def edited(folder, **values):
    """The folder with other values in its params.yaml, for as long as the block lasts."""
    params = folder / "params.yaml"
    before = params.read_text()
    try:
        for path, value in values.items():
            set_value(params, path, value)
        yield
    finally:
        params.write_text(before)


def environment(folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # /bin/sh stays between DVC and a stage, as bash does not, and DVC takes it where $SHELL is not set. Some fifty
    # processes import the same modules: their byte code may lie in the copy.
    given = {"PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "SHELL": "/bin/sh"}
    return {**os.environ, **given, "PYTHONDONTWRITEBYTECODE": ""}


def repro(folder, **options):
    return subprocess.run(
        [sys.executable, "-m", "bonelib.repro", "--all"],
        cwd=folder,
        env=environment(folder),
        text=True,
        capture_output=True,
        **options,
    )


@pytest.mark.pipeline
def test_the_pipeline_makes_what_it_promises(pipeline):
    out = pipeline / "out/tiny"
    metrics = json.loads((out / "metrics/04_image_quality.json").read_text())
    for family in ("vgs", "random3d", "spectrum"):
        for name in ("FD", "kernel distance", "precision", "recall", "density", "coverage", "C2ST"):
            keys = ("value", "low", "high", "real_against_real", "n_real", "n_fake", "d")
            assert all(isinstance(metrics[f"stylegan 0.8.{family}.{name}.{key}"], (int, float)) for key in keys)
    for picture in (
        "01_preprocess/figure1_bones",
        "01_preprocess/figure2_steps",
        "03_train/stylegan/figure3_growth",
        "S3_superres/same_bones",
        "03_train/stylegan/curves",
        "05_inversion/stylegan/reconstructions",
        "05_inversion/stylegan/full_size",
        "S4_metric_sensitivity/sensitivity",
        "S5_privacy/scores_stylegan",
        "S7_hagan/samples_coronal",
        "S7_hagan/full_size_axial",
        "S7_hagan/seams",
        "S7_hagan/map",
        "S7_hagan/memory",
        "S8_hagan_uses/encoded",
        "S8_hagan_uses/explained",
        "S8_hagan_uses/walks",
        "S8_hagan_uses/walked",
        "S9_two_contrasts/pairs",
        "S9_two_contrasts/transfer",
        "S9_two_contrasts/walk",
        "S9_two_contrasts/injection",
        "S9_two_contrasts/volume",
        "S13_native/axial",
        "S13_native/coronal",
        "04_image_quality/mds",
        "04_image_quality/spectra",
        "06_image_transition/stylegan/figure5",
        "06_image_transition/stylegan/film_strip",
        "06_image_transition/stylegan/densities",
        "06_image_transition/stylegan/geodesic",
        "08_attribute_editing/stylegan/surrogate",
        "08_attribute_editing/stylegan/figure7",
        "08_attribute_editing/stylegan/figure7_differences",
        "08_attribute_editing/stylegan/effects",
        "08_attribute_editing/stylegan/ranks",
        "08_attribute_editing/stylegan/atlases",
        "04_image_quality/figure4_axial",
        "04_image_quality/figure4_coronal",
    ):
        assert (out / f"figures/{picture}.png").stat().st_size > 5000
        assert (out / f"figures/{picture}.csv").is_file()
    for path in (out / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert not any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))
        assert "widgets" not in notebook.metadata


@pytest.mark.pipeline
def test_the_pipeline_gives_held_out_bones_their_codes(pipeline):
    from bonelib.latent.codes import load_codes
    from bonelib.latent.encoder_training import load_inverter
    from bonelib.latent.models import load_model

    folder = pipeline / "out/tiny/codes/stylegan"
    (encoded, _), (refined, rows) = load_codes(folder, "encoded"), load_codes(folder)
    assert refined.shape == encoded.shape and len(refined) == len(rows) and not refined.equal(encoded)
    assert refined.shape[-1] == 16 + 5  # a style and the texture code
    assert {r["split"] for r in rows} == {"train", "held-out"} and [int(r["index"]) for r in rows] == [
        *range(len(rows))
    ]
    assert load_inverter(folder, load_model(pipeline / "out/tiny/models/stylegan")).encoder
    metrics = json.loads((pipeline / "out/tiny/metrics/05_inversion_stylegan.json").read_text())
    for way in ("mean bone", "encoder", "optimisation", "hybrid"):
        assert all(metrics[f"{way}.PSNR, dB.{key}"] > 0 for key in ("value", "low", "high", "N", "patients"))


@pytest.mark.pipeline
def test_the_pipeline_compares_hagan_with_what_it_is_without_its_parts(pipeline):
    metrics = json.loads((pipeline / "out/tiny/metrics/S7_hagan.json").read_text())
    for one in ("as they are.HA-GAN", "as they are.no coarse branch, seed 1", "empty slices.empty slices, seed 1"):
        assert all(isinstance(metrics[f"{one}.{key}"], float) for key in ("FD", "RBF-MMD", "jump low", "jump high"))
        assert 0 <= metrics[f"{one}.ellipse overlap"] <= 1
    for name in ("hagan", "progan"):
        assert metrics[f"slope.{name}.MB at the largest"] > metrics[f"slope.{name}.MB at the smallest"] > 0
    assert metrics["iteration.plain.GFLOP"] > metrics["iteration.here.GFLOP"] > 0


@pytest.mark.pipeline
def test_the_pipeline_reads_attributes_off_codes_and_walks_to_what_is_asked(pipeline):
    metrics = json.loads((pipeline / "out/tiny/metrics/S8_hagan_uses.json").read_text())
    for name in ("Tt.Ar", "Tb.BMD", "BV/TV", "Ct.Th"):
        assert metrics[f"explained.{name}.patients"] <= metrics["patients"] == 8
    assert metrics["explained.Tt.Ar.R2 low"] <= metrics["explained.Tt.Ar.R2"] <= metrics["explained.Tt.Ar.R2 high"]
    assert metrics["walk.Tt.Ar.N"] <= 2 and "walk.Tt.Ar.slope" in metrics


@pytest.mark.pipeline
def test_the_pipeline_asks_for_bones_that_can_be_measured_and_no_others(pipeline):
    from bonelib.latent.attribute_model import load_attribute_model
    from bonelib.latent.models import load_model

    model = load_model(pipeline / "out/tiny/models/stylegan")
    file = pipeline / "out/tiny/editing/stylegan/instrument.safetensors"
    tool = load_attribute_model(file, model.generator, model.config["data"])
    metrics = json.loads((pipeline / "out/tiny/metrics/08_attribute_editing_stylegan.json").read_text())
    read = metrics["samples that can be read"]
    # Where no sample is like the scans that the surrogate was fitted to, there is no range
    assert metrics["samples"] == 40 and (read >= 4 or not tool.calibrated)
    assert metrics["infeasible targets"] == metrics["infeasible targets refused"] == 4 * tool.calibrated
    assert metrics["target.all.N"] == 4 * (read >= 20 and tool.calibrated)
    assert metrics["rank.Tb.BMD.directions"] == 16  # of a style, without those of the texture code
    assert (pipeline / "out/tiny/figures/08_attribute_editing/stylegan/explorer.html").stat().st_size > 5000


@pytest.mark.pipeline
def test_a_model_of_the_pipeline_makes_calibrated_volumes(pipeline, tmp_path):
    from bonelib.scans.volumes import read_volume

    command = [sys.executable, "-m", "bonelib.latent.sampling", "out/tiny/models/stylegan", "-n", "2", "--to", tmp_path]
    done = subprocess.run(command, cwd=pipeline, env=environment(pipeline), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    volume = read_volume(tmp_path / "sample-1-0001.nii.gz", unit="mgHA")
    assert volume.shape == (16, 144, 112) and volume.spacing == pytest.approx((0.2428,) * 3, abs=1e-4)
    assert volume.voxels.min() >= -500 and volume.voxels.max() <= 1500
    assert len((tmp_path / "morphometry.tsv").read_text().splitlines()) == 3


@pytest.mark.pipeline
def test_a_changed_key_runs_only_what_depends_on_it(pipeline, monkeypatch):
    from bonelib.repro import plan

    monkeypatch.chdir(pipeline)

    def would_run():
        return {name for name, needs in plan([]).items() if not needs}  # what follows is decided by what comes out

    assert would_run() == set()
    with edited(pipeline, profiles__tiny__quality__samples=13):
        assert would_run() == {"image_quality"}
    with edited(pipeline, profiles__tiny__train__stylegan__generator__latent=16):
        assert would_run() == {"train@stylegan"}
    with edited(pipeline, profiles__laptop__train__stylegan__schedule__samples=[9, 9, 9]):
        assert would_run() == set()


@pytest.mark.pipeline
def test_a_bad_scan_ends_with_2_and_another_run_finds_the_earlier_outputs_and_does_nothing(pipeline, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in "abcdef":
        (scans / f"sub-{name}_ses-1.nii.gz").write_bytes(f"not scan {name}".encode())
    with edited(pipeline, cohort__source=str(scans)):
        done = repro(pipeline)
    assert done.returncode == 2
    assert (
        f"{scans / 'sub-a_ses-1.nii.gz'}: not a readable NIfTI file" in done.stderr and "Traceback" not in done.stderr
    )
    assert (pipeline / "out/tiny/cohort/scans.tsv").is_file() and (
        pipeline / "out/tiny/models/stylegan/config.json"
    ).is_file()
    again = repro(pipeline)
    assert again.returncode == 0 and "up to date" in again.stdout and "Running stage" not in again.stdout


@pytest.mark.pipeline
def test_published_weights_take_the_place_of_a_training(pipeline):
    model, weights = "out/tiny/models/stylegan", "out/tiny/models/stylegan/generator.safetensors"
    before = {name: (pipeline / name).read_bytes() for name in ("params.yaml", "dvc.lock", weights)}
    params = pipeline / "params.yaml"
    shutil.rmtree(pipeline / "published", ignore_errors=True)

    def run(*command):
        done = subprocess.run(command, cwd=pipeline, env=environment(pipeline), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    try:
        audit = "out/tiny/metrics/S5_privacy.json"
        said = run(sys.executable, "-m", "bonelib.published", model, "stylegan", "--audit", audit)
        found = yaml.safe_load(params.read_text())["profiles"]["published"]["train"]["stylegan"]["published"]
        assert found in said
        values = yaml.safe_load(before["params.yaml"])
        values["profiles"]["tiny"]["train"]["stylegan"] = {"published": found}
        params.write_text(yaml.safe_dump(values, sort_keys=False))
        assert "samples |" not in run("dvc", "repro", "--single-item", "train@stylegan", "select@stylegan")
        assert (pipeline / weights).read_bytes() == before[weights]
        assert (pipeline / "out/tiny/figures/03_train/stylegan/figure3_growth.png").stat().st_size > 5000
    finally:
        for name in ("params.yaml", "dvc.lock"):
            (pipeline / name).write_bytes(before[name])
        subprocess.run(["dvc", "checkout", "-q", "--force"], cwd=pipeline, env=environment(pipeline))


def processes_below(folder):
    """Process ids whose working folder is `folder` (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def exists(pid):
    """Whether the process is there, also as one that is dead and not yet collected, which DVC takes for alive."""
    return Path(f"/proc/{pid}").exists()


@pytest.mark.pipeline
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_run_leaves_no_process_and_goes_on(pipeline):
    params = pipeline / "params.yaml"
    before = params.read_text()
    # For minutes, with a state every few seconds
    set_value(params, "profiles__tiny__train__stylegan__schedule__samples", [8000, 96])
    try:
        run = subprocess.Popen(
            [sys.executable, "-m", "bonelib.repro"],
            cwd=pipeline,
            env=environment(pipeline),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        state = pipeline / "scratch/state/tiny/train/stylegan"
        known = {*state.glob("state-*.json"), state / "state-0000000000.json"}  # its start is saved at once
        deadline = time.time() + 120
        while not set(state.glob("state-*.json")) - known and time.time() < deadline:
            time.sleep(0.5)
        assert set(state.glob("state-*.json")) - known, "no state was saved"
        descendants = set(processes_below(pipeline)) - {run.pid}
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        deadline = time.time() + 30
        while any(map(exists, descendants)) and time.time() < deadline:
            time.sleep(0.5)
        assert descendants and not processes_below(pipeline)

        again = subprocess.Popen(
            [sys.executable, "-m", "bonelib.repro"],
            cwd=pipeline,
            env=environment(pipeline),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        says = ""
        for line in again.stdout:
            says += line
            if "continues at" in line or "samples |" in line:
                break
        again.kill()
        again.communicate()
        assert "continues at" in says, says
    finally:
        params.write_text(before)
        for process in processes_below(pipeline):  # a failure must not leave a training on the machine
            os.kill(process, signal.SIGKILL)
        deadline = time.time() + 15
        while processes_below(pipeline) and time.time() < deadline:
            time.sleep(0.5)
        subprocess.run(["dvc", "checkout", "-q", "--force"], cwd=pipeline, env=environment(pipeline))
