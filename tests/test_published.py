"""Weights in the repository: what is published can be fetched by a clone that has nothing else, and is checked."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bonelib import InputError, published, store
from bonelib.core.config import section
from bonelib.latent.config import EncoderTraining
from bonelib.latent.encoder_training import known_encoder
from bonelib.latent.models import load_model
from bonelib.networks.encoder import build_encoder
from bonelib.networks.registry import build_critic, build_generator
from bonelib.params import check_file
from bonelib.training import checkpoint, loop
from bonelib.training.config import Grading, Train
from bonelib.training.grading import build_grader, load_grader

ROOT = Path(__file__).parents[1]
HOW = dict(
    generator=dict(kind="progan", widths=[4, 4], latent=8),
    critic=dict(widths=[4, 4]),
    schedule=dict(samples=[8], fade=[0], batch=[4]),
    n_critic=1,
    rate=4e-3,
)
DATA = dict(spacing_mm=[0.1, 0.1, 0.1], intensity=[-500, 1500], shape=[2, 18, 14], stack_slices=2, data_hash="0")


def write_model(folder):
    how = section(Train, HOW, "train")
    at = loop.Progress(8, seen=8, curves=[[8]])
    parts = dict(average=build_generator(how.generator), critic=build_critic(how.critic), at=at)
    growth = {"0000000008": torch.zeros(1)}
    loop.write_model(folder, how, DATA, **parts, growth=growth, candidates=[], run="0", began={}, superres=None)


def audit(folder, **values):
    """What the stage `privacy` would have written of the weights in a folder, beside it."""
    weights = json.loads((folder / "config.json").read_text())["sha256"]
    known = {f"{folder.name}.verdict": "released"} | {f"{folder.name}.sha256.{k}": v for k, v in weights.items()}
    file = folder.with_name(f"{folder.name}.json")
    file.write_text(json.dumps(known | {f"{folder.name}.{key}": value for key, value in values.items()}))
    return file


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository in which a tiny model is published, and the hash that its publication gave."""
    place = tmp_path_factory.mktemp("published")
    for name in (".dvc/config", ".gitignore", "params.yaml", "bonelib/scans/phantom/cohort.py"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    params = place / "params.yaml"
    params.write_text(re.sub(r"(?m)^profile: \w+", "profile: tiny", params.read_text()))
    write_model(place / "model")
    audit(place / "model")
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        found = published.publish("model", "mine", "model.json")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["add", "-A"], [*who, "commit", "-q", "-m", "published"]):
        subprocess.run(["git", *command], cwd=place, check=True)
    return place, found


@pytest.fixture
def inside(repository, monkeypatch):
    monkeypatch.chdir(repository[0])
    return repository[1]


def test_a_clone_fetches_what_was_published(inside, monkeypatch, tmp_path):
    sources = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    subprocess.run(["git", "clone", "-q", ".", tmp_path / "clone"], check=True)
    monkeypatch.chdir(tmp_path / "clone")
    assert not Path("published/mine").exists() and not Path(".dvc/cache").exists()
    given = check_file()["profiles"]["published"]["train"]["mine"]
    assert given == {"published": inside} and section(Train, HOW, "train") == published.fetch(
        "mine", given, "out", DATA
    )
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == sources
    done = subprocess.run(["dvc", "pull", "-q", "published/mine.dvc"], capture_output=True, text=True)
    assert done.returncode == 0 and Path("published/mine/generator.safetensors").is_file(), done.stderr


def test_another_model_than_the_one_named_or_another_grid_is_refused(inside, tmp_path):
    wrong = {"published": "0" * 32 + ".dir"}
    with pytest.raises(InputError, match=f"train.mine.published: found {wrong['published']}, but .*holds {inside}"):
        published.fetch("mine", wrong, tmp_path / "out", DATA)
    with pytest.raises(InputError, match="published/yours.dvc: no published model"):
        published.fetch("yours", wrong, tmp_path / "out", DATA)
    other = {**DATA, "spacing_mm": [0.2, 0.2, 0.2]}
    with pytest.raises(InputError, match=r"trained on spacing_mm \[0.1, 0.1, 0.1\], but that of the stacks is \[0.2"):
        published.fetch("mine", {"published": inside}, tmp_path / "out", other)


def test_what_is_no_whole_model_or_too_large_is_not_published(inside, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_model(folder)
    said = audit(folder)
    (folder / "notes.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="notes.pkl: not a part of a published model"):
        published.publish(folder, "mine", said)
    (folder / "notes.pkl").unlink()
    monkeypatch.setattr(published, "LARGEST", 1000)
    with pytest.raises(InputError, match="config.json: 0.0 MB; accepted are at most 0 MB"):
        published.publish(folder, "mine", said)
    checkpoint.save_tensors(folder / "generator.safetensors", {"a": torch.ones(1)})
    with pytest.raises(InputError, match="generator.safetensors: not the weights whose hash config.json holds"):
        published.publish(folder, "mine", said)
    with pytest.raises(InputError, match="not a whole model folder"):
        published.publish(tmp_path, "mine", said)


def test_weights_are_published_only_if_the_audit_lets_them_pass(inside, tmp_path, capsys):
    folder = tmp_path / "model"
    write_model(folder)
    before = {path: path.stat().st_mtime_ns for path in published.STORE.glob("*/*")}
    with pytest.raises(InputError, match="model.json: not the metrics of the stage `privacy`"):
        published.publish(folder, "mine", tmp_path / "model.json")
    for verdict in ("blocked", "undecided", "audit failed"):
        with pytest.raises(InputError, match=f"audit says '{verdict}'"):
            published.publish(folder, "mine", audit(folder, verdict=verdict))
    with pytest.raises(InputError, match="not those that were audited"):
        published.publish(folder, "mine", audit(folder, **{"sha256.generator": "0"}))
    assert {path: path.stat().st_mtime_ns for path in published.STORE.glob("*/*")} == before
    published.publish(folder, "mine", audit(folder, verdict="blocked", **{"phantoms only": True}))
    assert "holds no person" in capsys.readouterr().out


def test_the_profile_names_the_models_that_the_repository_holds(monkeypatch):
    monkeypatch.chdir(ROOT)
    named = check_file()["profiles"]["published"]["train"]
    held = {}
    for name in sorted(path.stem for path in Path("published").glob("*.dvc")):
        if published.is_model(name):
            held[name] = {"published": store.published_hash(name)}
        assert all(path.stat().st_size <= published.LARGEST for path in store.listed(name).values())
    assert named == held


def run_of_phantoms(place, nobody=True):
    """A run with a tiny grader and a tiny encoder, beside what belongs to its scans, and its audit."""
    write_model(place / "models/mine")
    model = load_model(place / "models/mine")
    grading = Grading(widths=[4], blocks=[1])
    (place / "grading").mkdir(parents=True)
    net = build_grader(grading, DATA["intensity"])
    checkpoint.save_tensors(place / "grading/grader.safetensors", net.state_dict())
    sha256 = {"grader": checkpoint.digest(place / "grading/grader.safetensors")}
    content = {"grading": json.loads(grading.model_dump_json()), "data": DATA, "sha256": sha256}
    checkpoint.write_json(place / "grading/config.json", content)
    (place / "grading/grades.csv").write_text("scan,grade\n")

    how = EncoderTraining(prior="normal")
    codes = place / "codes/mine"
    codes.mkdir(parents=True)
    encoder = build_encoder(
        section(Train, HOW, "train").generator, dense=0, norm="none", haar=False, precision="float32"
    )
    checkpoint.save_tensors(codes / "encoder.safetensors", checkpoint.pack(encoder=encoder))
    content = {"encoder": json.loads(how.model_dump_json()), "model": model.config["sha256"]}
    checkpoint.write_json(codes / "encoder.json", content)
    (codes / "encoder-curves.csv").write_text("seen,dist\n8,0.5\n")
    (codes / "codes.csv").write_text("scan\n")
    (place / "metrics").mkdir()
    (place / "metrics/S5_privacy.json").write_text(json.dumps({"mine.phantoms only": nobody}))
    return place / "metrics/S5_privacy.json", model


@pytest.mark.parametrize("part, name", [("grading", "grader"), ("codes/mine", "encoder-mine")])
def test_a_grader_and_an_encoder_are_fetched_as_they_were(inside, tmp_path, capsys, part, name):
    audit_file, model = run_of_phantoms(tmp_path / "out")
    found = published.publish(tmp_path / "out" / part, name, audit_file)
    assert f"write `published: {found}` into " in capsys.readouterr().out
    to = store.fetch_files(name, found, tmp_path / "fetched", "key")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {
        path.name: path.read_bytes()
        for path in (tmp_path / "out" / part).iterdir()
        if path.name in published.PARTS[name.split("-")[0]]
    }
    assert not (to / "grades.csv").exists() and not (to / "codes.csv").exists()
    if name == "grader":
        assert load_grader(to)[0] is not None
    else:
        inverter, curves = known_encoder(to, model)
        assert inverter.encoder is not None and curves == [{"seen": 8, "dist": 0.5}]
    with pytest.raises(
        InputError, match=f"params.yaml: key: found {'0' * 32}.dir, but published/{name}.dvc holds {found}"
    ):
        store.fetch_files(name, "0" * 32 + ".dir", tmp_path / "fetched", "key")


def test_a_grader_of_people_or_of_another_run_is_not_published(inside, tmp_path):
    people, _ = run_of_phantoms(tmp_path / "people", nobody=False)
    with pytest.raises(InputError, match="only what learned from phantoms passes"):
        published.publish(tmp_path / "people/grading", "grader", people)
    other, _ = run_of_phantoms(tmp_path / "other")
    with pytest.raises(InputError, match="of another run than"):
        published.publish(tmp_path / "people/grading", "grader", other)


def test_a_hash_that_params_names_follows_a_new_publication(inside, tmp_path):
    audit_file, _ = run_of_phantoms(tmp_path / "out")
    before = published.publish(tmp_path / "out/grading", "grader", audit_file)
    params = Path("params.yaml")
    params.write_text(params.read_text() + f"# {before}\n")
    config = json.loads((tmp_path / "out/grading/config.json").read_text())
    checkpoint.write_json(tmp_path / "out/grading/config.json", config | {"scans": 2})
    after = published.publish(tmp_path / "out/grading", "grader", audit_file)
    assert after != before and before not in params.read_text() and f"# {after}" in params.read_text()


def test_a_model_that_is_replaced_leaves_nothing(inside, tmp_path):
    before = {path for path in published.STORE.glob("*/*")}
    torch.manual_seed(1)  # other weights
    write_model(tmp_path / "other")
    assert published.publish(tmp_path / "other", "mine", audit(tmp_path / "other")) != inside
    after = set(published.STORE.glob("*/*"))
    names = [one.stem for one in Path("published").glob("*.dvc")]
    kept = {p for one in names for p in (store.stored(store.published_hash(one)), *store.listed(one).values())}
    assert after == kept and len(after) == len(before) and after != before


def test_slices_are_published_with_their_encoder_if_they_are_of_phantoms(inside, tmp_path, capsys):
    run_of_phantoms(tmp_path / "out")
    folder = tmp_path / "slices"
    shutil.copytree(tmp_path / "out/models/mine", folder)
    for name in ("encoder.safetensors", "encoder.json", "encoder-curves.csv"):
        shutil.copy(tmp_path / "out/codes/mine" / name, folder / name)
    with pytest.raises(InputError, match="config.json: data: not of phantoms"):
        published.publish(folder, "slices")
    config = json.loads((folder / "config.json").read_text())
    checkpoint.write_json(folder / "config.json", config | {"data": config["data"] | {"phantoms": True}})
    found = published.publish(folder, "slices")
    assert f"write `published: {found}` into two_contrasts" in capsys.readouterr().out
    to = store.fetch_files("slices", found, tmp_path / "fetched", "two_contrasts.published")
    assert known_encoder(to, load_model(to))[0].encoder is not None
    assert published.kind_of(to) == "slices" and not published.is_model("slices")


def test_whole_scans_are_published_if_their_super_resolution_is_that_of_a_published_model(inside, tmp_path):
    folder = tmp_path / "native"
    write_model(folder)
    for name in ("superres", "finer"):
        checkpoint.save_tensors(folder / f"{name}.safetensors", {"a": torch.ones(1)})
    config = json.loads((folder / "config.json").read_text())
    hashes = {name: checkpoint.digest(folder / f"{name}.safetensors") for name in ("superres", "finer")}
    changes = {"data": config["data"] | {"phantoms": True}, "sha256": config["sha256"] | hashes}
    checkpoint.write_json(folder / "config.json", config | changes)
    with pytest.raises(InputError, match="superres.safetensors: the network is that of no published model"):
        published.publish(folder, "native")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "finer.safetensors").unlink()
    kept = {key: value for key, value in changes["sha256"].items() if key != "finer"}
    checkpoint.write_json(other / "config.json", config | changes | {"sha256": kept})
    published.publish(other, "other", audit(other))
    assert published.publish(folder, "native") == store.published_hash("native")


def test_a_conditional_model_is_published_of_phantoms_and_is_no_model_of_train(inside, tmp_path, capsys):
    folder = tmp_path / "out/conditional/grades"
    people, _ = run_of_phantoms(tmp_path / "people", nobody=False)
    for place in (folder, tmp_path / "people/conditional/grades"):
        write_model(place)
        (place / "classes.json").write_text('{"by": "motion grade", "edges": [1.5, 2.5, 3.5, 4.5]}')
    with pytest.raises(InputError, match="only what learned from phantoms passes"):
        published.publish(place, "hagan-grades", people)
    audit_file, _ = run_of_phantoms(tmp_path / "out")
    found = published.publish(folder, "hagan-grades", audit_file)
    assert "into hagan_uses.conditional.CLASSES of" in capsys.readouterr().out
    assert not published.is_model("hagan-grades") and published.is_model("mine")
    fetched = store.fetch_files("hagan-grades", found, tmp_path / "fetched", "key")
    assert (fetched / "classes.json").read_bytes() == (folder / "classes.json").read_bytes()


@pytest.mark.parametrize("what", ["config.json", None])
def test_what_the_store_has_lost_or_spoiled_is_named(inside, tmp_path, what):
    found = store.published_hash("mine")
    file = store.listed("mine")[what] if what else store.stored(found)
    says = f"{what} of mine" if what else "the list of files of mine"
    content = file.read_bytes()
    file.chmod(0o644)
    try:
        file.write_bytes(content + b" ")
        with pytest.raises(InputError, match=f"{file}: damaged, {says}"):
            store.fetch_files("mine", found, tmp_path / "fetched", "key")
        file.unlink()
        with pytest.raises(InputError, match=f"{file}: no such file, {says}"):
            store.fetch_files("mine", found, tmp_path / "fetched", "key")
        assert not (tmp_path / "fetched").exists()
    finally:
        file.write_bytes(content)
