"""Corruptions do what they are named for, more of it the stronger they are."""

import numpy as np
import pytest
from scipy import ndimage

from bonelib import InputError
from bonelib.core.random import numpy_rng
from bonelib.evaluation.contours import BONE
from bonelib.scans.volumes import Volume
from bonelib.studies import corruption
from bonelib.studies import metric_sensitivity as sensitivity

STRENGTHS = (0, 0.25, 0.5, 0.75, 1)


def bone():
    """A tube of cortex around a sponge, .2 mm voxels, and its interior."""
    _, y, x = np.indices((12, 80, 64))
    radius = np.hypot(y - 40, x - 32)
    sponge = ndimage.gaussian_filter(numpy_rng(0, "sponge").standard_normal(radius.shape), 1.2)
    density = np.where(radius < 26, np.where(sponge > 0.4 * sponge.std(), 600.0, 50.0), 0.0)
    density[(radius > 22) & (radius < 26)] = 1000
    return Volume(density.astype(np.float32), (0.2, 0.2, 0.2), "mgHA"), radius < 20


def damage(name, strength):
    volume, interior = bone()
    return corruption.VOLUMES[name](volume, strength, numpy_rng(1, "corruption", name), interior).voxels - volume.voxels


@pytest.mark.parametrize("name", corruption.VOLUMES)
def test_damage_grows_with_strength_from_none_and_comes_again(name):
    sizes = [float(np.square(damage(name, s)).mean()) for s in STRENGTHS]
    assert sizes[0] < 1e-6 and (np.diff(sizes) > 0).all()
    np.testing.assert_array_equal(damage(name, 0.5), damage(name, 0.5))


def test_noise_has_its_sd():
    assert damage("noise", 0.5).std() == pytest.approx(0.5 * corruption.NOISE_MG, rel=0.02)


@pytest.mark.parametrize("name", ["thinned trabeculae", "perforated plates"])
def test_trabecular_damage_takes_bone_and_leaves_the_cortex(name):
    volume, interior = bone()
    change = damage(name, 1)
    assert not change[~interior].any() and change.max() <= 0
    before, after = (interior & (v > BONE) for v in (volume.voxels, volume.voxels + change))
    assert 0 < after.sum() < 0.9 * before.sum()


def test_thinning_takes_the_voxels_at_the_surface():
    volume, interior = bone()
    core = ndimage.binary_erosion(volume.voxels > BONE)
    assert not damage("thinned trabeculae", 1)[core].any()


def test_weaker_perforation_is_part_of_the_stronger_one():
    weak, strong = damage("perforated plates", 0.25), damage("perforated plates", 1)
    assert (strong[weak < 0] < 0).all()


def test_sets_lose_patients_modes_and_privacy():
    chosen = np.arange(100, 124)
    kinds = [len(set(corruption.duplicated(chosen, s, numpy_rng(1, "sets")))) for s in STRENGTHS]
    assert kinds[0] == 24 and (np.diff(kinds) < 0).all() and kinds[-1] == corruption.REPEATED
    trait = numpy_rng(2, "trait").standard_normal(90)
    sets = [corruption.dropped(trait, 24, s, numpy_rng(1, "sets")) for s in STRENGTHS]
    assert all(len(set(s)) == 24 for s in sets)
    assert trait[sets[-1]].max() <= np.sort(trait)[29] and trait[sets[0]].max() > np.sort(trait)[60]
    copies = [corruption.copied(24, 80, s, numpy_rng(1, "sets")) for s in STRENGTHS]
    assert [len(c[0]) for c in copies] == [0, 3, 6, 9, 12] and set(copies[1][0]) < set(copies[2][0])
    assert all(len(set(source)) == len(source) for _, source in copies)


def test_the_stillest_and_first_stacks_are_taken_first():
    rows = [dict(scan=f"s{i}", start=start) for i in range(6) for start in (0, 16)]
    grade = {f"s{i}": 1 + i % 3 for i in range(6)}
    found = sensitivity.stillest(rows, grade, 1)
    keys = [(grade[row["scan"]], row["start"]) for row in found]
    assert keys == sorted(keys) and len(found) == 12 and found == sensitivity.stillest(rows, grade, 1)


def test_bad_strengths_and_sets_are_refused():
    with pytest.raises(InputError, match="strength is 1.5"):
        damage("noise", 1.5)
    with pytest.raises(InputError, match="3 values"):
        corruption.dropped(np.arange(3.0), 24, 0.5, numpy_rng(1, "sets"))


def features(n, name, scale=1.0):
    return scale * numpy_rng(0, "ladder features", name).standard_normal((n, 12))


def test_distances_rise_with_what_each_metric_is_meant_for():
    reference, fake, patients = features(60, "reference"), features(30, "fake"), [f"p{i // 2}" for i in range(60)]
    noise = features(30, "noise")
    worse = [sensitivity.set_distances(reference, fake + s * noise + s, patients) for s in (0, 0.5, 1, 2, 3)]
    for metric in ("FD", "kernel distance", "RBF-MMD", "- realism"):
        assert (np.diff([w[metric] for w in worse]) > 0).all(), metric
    assert worse[-1]["C2ST"] > 0.95 > 0.7 > worse[0]["C2ST"]
    copied = fake.copy()
    copied[:15] = reference[:15]
    assert sensitivity.set_distances(reference, copied, patients)["copies"] > worse[0]["copies"] + 0.2
    repeated = sensitivity.set_distances(reference, fake[np.arange(30) % 10], patients)["repeats"]
    assert repeated == 1 and worse[0]["repeats"] == 0


def steps(metric, name, values, noise=1.0):
    return [dict(metric=metric, corruption=name, strength=i, value=v, noise=noise) for i, v in enumerate(values)]


def test_a_metric_that_does_not_rise_where_it_was_claimed_to_fails():
    rows = []
    for name in sensitivity.CORRUPTIONS:
        rows += steps("random3d FD", name, [0, 1, 2, 3, 4, 5] if name == "blur" else [3, 1, 2, 3, 0, 1])
        rows += steps("random3d copies", name, [0, 0.1, 0.2, 0.3, 0.4, 0.5])  # follows, but less than sets differ
    found = {(r["metric"], r["corruption"]): r for r in sensitivity.verdicts(rows)}
    assert found["random3d FD", "blur"]["sensitive"] and found["random3d FD", "blur"]["holds"]
    assert found["random3d FD", "noise"]["claimed"] and not found["random3d FD", "noise"]["holds"]
    assert found["random3d FD", "dropped mode"]["holds"] and not found["random3d FD", "dropped mode"]["sensitive"]
    assert not found["random3d copies", "memorised copies"]["sensitive"]
    chart = {row["metric"]: row for row in sensitivity.chart(list(found.values()))}
    assert chart["random3d FD"]["blur"].startswith("sensitive") and chart["random3d FD"]["noise"].startswith("FAILS")
    assert chart["random3d FD"]["dropped mode"].startswith("no")


def test_connectivity_counts_loops():
    voxels = np.zeros((12, 12, 12), np.float32)
    voxels[3, 2:10, 2:10] = 900
    voxels[3, 4:8, 4:8] = 0
    volume = Volume(voxels, (1.0, 1.0, 1.0), "mgHA")
    assert sensitivity.connectivity(volume, np.ones(volume.shape, bool)) == pytest.approx(1 / 12**3)
