import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import fft
from scipy.ndimage import binary_fill_holes, gaussian_filter, label, rotate

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.contours import contours
from bonelib.evaluation.morphometry import measure
from bonelib.evaluation.thickness import local_thickness
from bonelib.scans.phantom import anatomy, make_cohort, make_radius, population, rendering
from bonelib.scans.phantom.population import sample_patient
from bonelib.scans.phantom.rendering import CORTICAL, OUTSIDE, TRABECULAR, ULNA, draw_visit
from bonelib.scans.phantom.scanner import NATIVE_MM, scan
from bonelib.scans.volumes import Volume, mirrored, read_volume

COARSE, LAPTOP, FINE = 0.2428, 0.1214, 0.09  # mm


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Waiting for a second thread costs more than it brings on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fine(one_thread):
    return draw_visit(3, 1, 1, FINE, sex="F", tb_bmd=140)


def test_same_key_gives_the_same_volume_whatever_the_threads():
    volumes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rendering._bone.cache_clear()
        volumes.append(make_radius(5, voxel_mm=0.5))
    torch.set_num_threads(1)
    (first, truth), (second, again) = volumes
    assert np.array_equal(first.voxels, second.voxels)
    assert truth == again


def test_process_count_does_not_matter_and_the_folder_appears_whole(tmp_path):
    size = {"seed": 4, "patients": 2, "visits": 2, "voxel_mm": 0.5}
    for workers in (1, 2):
        make_cohort(SimpleNamespace(**size, workers=workers), tmp_path / str(workers))
    rows = list(csv.DictReader((tmp_path / "1/scans.tsv").open(), delimiter="\t"))
    assert [row["scan"] for row in rows] == [f"sub-{p:03d}_ses-{v}" for p in (1, 2) for v in (1, 2)]
    assert {row["grade"] for row in rows} == {"1"}
    for row in rows:
        files = [(tmp_path / w / row["file"]).read_bytes() for w in "12"]
        assert files[0] == files[1]
    for table in ("scans.tsv", "participants.tsv"):
        assert (tmp_path / "1" / table).read_text() == (tmp_path / "2" / table).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    read = read_volume(tmp_path / "1" / rows[0]["file"], unit="mgHA")
    assert read.spacing == pytest.approx((0.5,) * 3)


def network_alone(drawn):
    """Trabecular bone with everything smooth taken out."""
    bone = np.where(drawn.compartments == TRABECULAR, drawn.bone, 0)
    inside = (drawn.compartments == TRABECULAR).astype(np.float32)
    local = gaussian_filter(bone, 4) / np.maximum(gaussian_filter(inside, 4), 0.05)
    return (bone - local) * inside


def likeness(first, second):
    """Largest correlation of two visits over all shifts, their rotation taken back."""
    turn = second.truth["rotation"] - first.truth["rotation"]
    a, b = network_alone(first), network_alone(second)
    b = max((rotate(b, s * turn, axes=(1, 2), reshape=False, order=1) for s in (-1, 1)), key=lambda c: _peak(a, c))
    return _peak(a, b)


def _peak(a, b):
    shape = [fft.next_fast_len(m + n, real=True) for m, n in zip(a.shape, b.shape, strict=True)]
    product = fft.irfftn(fft.rfftn(a, shape) * fft.rfftn(b, shape).conj(), shape)
    return product.max() / np.sqrt((a**2).sum() * (b**2).sum())


def test_visits_share_the_bone_and_patients_do_not():
    first, second = (draw_visit(8, 1, visit, 0.18) for visit in (1, 2))
    other = draw_visit(8, 2, 1, 0.18)
    assert likeness(first, second) > 0.6
    assert likeness(first, other) < 0.25
    assert first.truth["Tb.BMD"] == second.truth["Tb.BMD"]
    assert first.truth["true_Tb.BMD"] == pytest.approx(second.truth["true_Tb.BMD"], rel=0.06)
    assert first.truth["rotation"] != second.truth["rotation"]


def test_bone_is_one_piece_along_z(fine):
    for density in (None, 95):
        drawn = fine if density is None else draw_visit(3, 1, 1, FINE, sex="F", age=75, tb_bmd=density, ct_th=0.8)
        bone = (drawn.bone > 0.4) & np.isin(drawn.compartments, (TRABECULAR, CORTICAL))
        parts, _ = label(bone, np.ones((3, 3, 3)))
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        assert (parts == largest).sum() / bone.sum() > 0.99
        trabecular = bone & (drawn.compartments == TRABECULAR)
        assert ((parts == largest) & trabecular).any((1, 2)).all()


def test_cortex_is_a_closed_ring_even_in_the_scan(fine):
    middle = fine.compartments[fine.compartments.shape[0] // 2]
    ring = middle == CORTICAL
    assert label(ring)[1] == 1
    assert (binary_fill_holes(ring) & ~ring & (middle != TRABECULAR)).sum() == 0
    assert (middle == TRABECULAR).sum() > ring.sum()
    scanned = scan(fine.volume, numpy_rng(0, "noise"), noise_sd=fine.truth["noise_sd"])
    bone = gaussian_filter(scanned.voxels, 1.0)[fine.compartments.shape[0] // 2] > 320
    bone &= middle != ULNA
    assert binary_fill_holes(bone)[middle == TRABECULAR].mean() > 0.99
    assert (middle == ULNA).any()
    assert (middle == OUTSIDE).mean() > 0.25


BONES = [("F", 105, 870, 0.85), ("F", 145, 926, 1.06), ("M", 199, 887, 1.23)]


@pytest.mark.parametrize(("sex", "tb", "ct", "th"), BONES)
def test_densities_in_the_true_compartments_are_those_asked_for(sex, tb, ct, th):
    drawn = draw_visit(1, 1, 1, LAPTOP, sex=sex, age=35, tt_ar=300, tb_bmd=tb, ct_bmd=ct, ct_th=th)
    seen = scan(drawn.volume, numpy_rng(0, "noise"), noise_sd=0).voxels
    assert seen[drawn.compartments == TRABECULAR].mean() == pytest.approx(tb, rel=0.1)
    assert seen[drawn.compartments == CORTICAL].mean() == pytest.approx(ct, rel=0.08)
    assert drawn.truth["true_Tt.Ar"] == pytest.approx(300, rel=0.04)


@pytest.mark.parametrize(("sex", "tb", "ct", "th"), BONES[::2])
def test_a_scan_reads_the_cortex_that_was_asked_for(sex, tb, ct, th):
    drawn = draw_visit(2, 1, 1, LAPTOP, sex=sex, age=35, tb_bmd=tb, ct_bmd=ct, ct_th=th, ct_po=0.01)
    spacing, cortex = drawn.volume.spacing, drawn.compartments == CORTICAL
    true = local_thickness(cortex, spacing)[cortex].mean()
    assert drawn.truth["true_Ct.Th"] == pytest.approx(true, rel=0.05)
    seen = scan(drawn.volume, numpy_rng(0, "noise"), noise_sd=105)
    outer, inner = contours(seen)
    found = measure(seen, compartments=(outer, inner))
    assert found["Ct.Th"] == pytest.approx(th, rel=0.06)
    assert found["Ct.Th"] - true == pytest.approx(anatomy.CONTOUR_MM, abs=0.03)
    assert found["Ct.Po"] == pytest.approx(0.01, rel=0.5)
    assert found["Ct.BMD"] == pytest.approx(ct, rel=0.04) and found["Tb.BMD"] == pytest.approx(tb, rel=0.08)
    assert 1.4 < found["DA"] < 2.2


def test_bone_mass_does_not_depend_on_the_grid(fine):
    others = [draw_visit(3, 1, 1, mm, sex="F", tb_bmd=140) for mm in (LAPTOP, COARSE)]
    fractions = [drawn.truth["true_BV/TV"] for drawn in (fine, *others)]
    assert fractions == pytest.approx([fractions[0]] * 3, rel=0.035)


def noise_in(shape, spacing_mm):
    volume = Volume(np.zeros(shape, np.float32), (spacing_mm,) * 3)
    return scan(volume, numpy_rng(1, "noise", round(spacing_mm * 1e4)), noise_sd=105).voxels


def lags(noise, axis):
    ahead = [np.take(noise, range(k, noise.shape[axis]), axis) for k in range(4)]
    behind = [np.take(noise, range(noise.shape[axis] - k), axis) for k in range(4)]
    return np.array([(a * b).mean() for a, b in zip(ahead, behind, strict=True)]) / (noise**2).mean()


def test_native_noise_has_the_measured_spread_and_correlation():
    noise = noise_in((96, 96, 96), NATIVE_MM)
    assert noise.std() == pytest.approx(105, rel=0.02)
    for axis in range(3):
        assert lags(noise, axis)[1:] == pytest.approx([0.70, 0.24, 0.04], abs=0.03)


@pytest.mark.parametrize("factor", [2, 4])
def test_coarse_noise_is_that_of_block_averages(factor):
    n = 96 // factor
    native = noise_in((96, 96, 96), NATIVE_MM)
    averaged = native.reshape(n, factor, n, factor, n, factor).mean((1, 3, 5))
    coarse = noise_in((n, n, n), NATIVE_MM * factor)
    assert coarse.std() == pytest.approx(averaged.std(), rel=0.05)
    assert lags(coarse, 2)[1] == pytest.approx(lags(averaged, 2)[1], abs=0.04)


def test_coarse_point_spread_is_that_of_block_averages():
    slab = np.zeros((8, 8, 96), np.float32)
    slab[..., 41:59] = 1000
    blocks = slab.reshape(4, 2, 4, 2, 48, 2).mean((1, 3, 5))
    fine = scan(Volume(slab, (NATIVE_MM,) * 3), numpy_rng(0, "n"), noise_sd=0).voxels
    coarse = scan(Volume(blocks, (LAPTOP,) * 3), numpy_rng(0, "n"), noise_sd=0).voxels
    assert coarse[2, 2] == pytest.approx(fine.reshape(4, 2, 4, 2, 48, 2).mean((1, 3, 5))[2, 2], abs=30)


def test_unknown_traits_and_impossible_values_are_refused(tmp_path):
    with pytest.raises(InputError, match="nearest is 'Tb.BMD'"):
        make_radius(1, tb_bdm=120)
    with pytest.raises(InputError, match="accepted are F and M"):
        sample_patient(1, 1, sex="female")
    with pytest.raises(InputError, match="Ct.Th is -1"):
        sample_patient(1, 1, ct_th=-1)
    with pytest.raises(InputError, match="voxel_mm"):
        make_radius(1, voxel_mm=60.7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(InputError, match="other than a cohort"):
        make_cohort(SimpleNamespace(seed=1, patients=1, visits=1, voxel_mm=0.4), tmp_path / "mine")


def test_patients_follow_the_reference():
    people = [sample_patient(9, p) for p in range(1, 1500)]
    for sex, tb, ct in (("F", 145, 926), ("M", 199, 887)):
        young = [p for p in people if p["sex"] == sex and p["age"] <= 37]
        assert np.mean([p["Tb.BMD"] for p in young]) == pytest.approx(tb, abs=9)
        assert np.mean([p["Ct.BMD"] for p in young]) == pytest.approx(ct, abs=12)
        pairs = {("Tb.BMD", "Tb.Th"): 0.58, ("Tb.BMD", "Tb.N"): 0.65, ("Tb.Th", "Tb.N"): 0.31}
        for pair, r in pairs.items():
            assert np.corrcoef(*([p[name] for p in young] for name in pair))[0, 1] == pytest.approx(r, abs=0.15)
    old = [p["Ct.BMD"] for p in people if p["sex"] == "F" and 67 < p["age"] < 73]
    assert np.mean(old) == pytest.approx(852, abs=20)


def test_tb_n_sets_the_cells_and_the_size_of_the_bone_their_stretch():
    few, many, large = (
        rendering._bone(5, 1, tuple(sorted(({"sex": "F", "tb_bmd": 150, "tt_ar": 260} | own).items())))
        for own in ({"tb_n": 1.25}, {"tb_n": 1.6}, {"tb_n": 1.6, "tt_ar": 380})
    )
    assert len(many.network.seeds) > 1.3 * len(few.network.seeds)
    assert large.network.stretch[0] > many.network.stretch[0] + 0.2


def test_the_section_fills_three_quarters_of_its_box():
    fills = []
    for patient in range(1, 6):
        shape = anatomy.make_shape((1, patient), sample_patient(1, patient))
        for section in shape.contours[1:-1]:
            along = section - section.mean(0)
            along = along @ np.linalg.eigh(along.T @ along)[1]
            fills.append(anatomy._area(section) / np.prod(np.ptp(along, axis=0)))
    assert np.mean(fills) == pytest.approx(0.74, abs=0.02)


def test_a_left_bone_is_the_mirror_image_of_a_right_one():
    left, right = (draw_visit(2, 1, 1, 0.5, side=side) for side in ("left", "right"))
    assert left.volume.side == "left" and left.truth["side"] == "left"
    assert np.array_equal(left.volume.voxels[..., ::-1], right.volume.voxels)
    assert np.array_equal(left.compartments[..., ::-1], right.compartments)
    back = mirrored(left.volume)
    assert back.side == "right" and np.array_equal(back.voxels, right.volume.voxels)
    sides = [sample_patient(1, p)["side"] for p in range(200)]
    assert 70 < sides.count("left") < 130


def test_the_published_cohort_has_515_scans():
    visits = population.visits_of(1, 98, 6, 515)
    assert len(visits) == 98 and sum(map(len, visits.values())) == 515
    assert all(own[0] == 1 and own == sorted(set(own)) and own[-1] <= 6 for own in visits.values())
    assert population.visits_of(1, 98, 6, 515) == visits != population.visits_of(2, 98, 6, 515)
    with pytest.raises(InputError, match="accepted are 98 to 588"):
        population.visits_of(1, 98, 6, 600)


def test_motion_grades_follow_their_shares_and_the_age():
    shares = (0.02, 0.36, 0.42, 0.18, 0.02)
    people = [sample_patient(3, p)["age"] for p in range(1, 3000)]
    grades = np.array([population.motion_grade(3, p, 1, age, shares) for p, age in enumerate(people, 1)])
    found = np.bincount(grades, minlength=6)[1:] / len(grades)
    assert found == pytest.approx(shares, abs=0.03) and grades.mean() == pytest.approx(2.82, abs=0.06)
    old = np.array(people) >= population.MOTION_AGE
    ratio = (grades[old] >= 4).mean() / (grades[~old] >= 4).mean()
    assert ratio == pytest.approx(population.MOTION_RATIO, rel=0.25)


def test_the_cohort_carries_motion_and_can_be_of_one_side(tmp_path):
    size = {"seed": 4, "patients": 3, "visits": 2, "scans": 5, "voxel_mm": 0.5, "workers": 1}
    for name, more in (("still", {}), ("moved", {"grades": (0, 0, 0, 0, 1.0), "mirror_left": True})):
        make_cohort(SimpleNamespace(**size, **more), tmp_path / name)
    tables = {n: list(csv.DictReader((tmp_path / n / "scans.tsv").open(), delimiter="\t")) for n in ("still", "moved")}
    assert [len(rows) for rows in tables.values()] == [5, 5]
    assert {r["grade"] for r in tables["moved"]} == {"5"} and all(float(r["motion"]) > 0.2 for r in tables["moved"])
    assert {r["mirrored"] for r in tables["still"]} == {"no"}
    assert {r["side"] for r in tables["moved"]} == {"right"}  # as they lie there
    assert [r["mirrored"] == "yes" for r in tables["moved"]] == [r["side"] == "left" for r in tables["still"]]
    for still, moved in zip(tables["still"], tables["moved"], strict=True):
        first, second = (
            read_volume(tmp_path / n / r["file"], unit="mgHA").voxels for n, r in (("still", still), ("moved", moved))
        )
        second = second[..., ::-1] if moved["mirrored"] == "yes" else second
        likeness = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert 0.1 < likeness < 0.9


def test_the_ulna_lies_beside_the_radius_and_is_partly_shown():
    for patient in range(1, 5):
        shape = anatomy.make_shape((1, patient), sample_patient(1, patient))
        within = (shape.levels >= 0) & (shape.levels <= anatomy.HEIGHT_MM)
        heights = np.repeat(shape.levels[within], shape.contours.shape[1])
        border = torch.tensor(np.column_stack([heights, shape.contours[within].reshape(-1, 2)])).float()
        gap = float(anatomy._ulna_distance(shape.ulna, border).min())
        assert anatomy.ULNA_GAP_MM[0] - 0.02 <= gap <= anatomy.ULNA_GAP_MM[1] + 0.02
        drawn = draw_visit(1, patient, 1, 0.4)
        shown = (drawn.compartments == ULNA).sum() / len(drawn.compartments) * 0.4**2
        assert 0.05 < shown / (np.pi * shape.ulna["radius"] ** 2) < 0.45
