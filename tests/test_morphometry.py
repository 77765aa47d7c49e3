from pathlib import Path

import numpy as np
import pytest

from bonelib import InputError
from bonelib.evaluation.morphometry import contours, measure
from bonelib.randomness import numpy_rng
from bonelib.scans.volumes import Volume, read_volume

SPACINGS = (0.0607, 0.1214, 0.2428)
CROP = Path(__file__).parents[2] / "shared/data/trab_1237_mgHAccm.nii.gz"
CORTEX, MARROW = 1000.0, 150.0


def grid(spacing, width=24.0, height=20.0):
    """In-plane positions in mm about a centre that is no voxel's."""
    y, x = (np.arange(round(edge / spacing)) * spacing - edge / 2 for edge in (height, width))
    return np.meshgrid(y + 0.31 * spacing, x + 0.17 * spacing, indexing="ij")


def cylinder(spacing, radius=8.0, wall=1.6, at=(0.0, 0.0)):
    y, x = grid(spacing)
    distance = np.hypot(y - at[0], x - at[1])
    return np.where(distance < radius, np.where(distance < radius - wall, MARROW, CORTEX), 0.0)


def stack(section, spacing, slices=5):
    return Volume(np.repeat(section[None].astype(np.float32), slices, axis=0), (spacing,) * 3)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_hollow_cylinder(spacing):
    radius, wall = 8.0, 1.6
    found = measure(stack(cylinder(spacing, radius, wall), spacing))
    share = (1 - wall / radius) ** 2
    assert found["Tt.Ar"] == pytest.approx(np.pi * radius**2, rel=0.02)
    assert found["Tb.BMD"] == pytest.approx(MARROW, rel=0.02)
    assert found["Ct.BMD"] == pytest.approx(CORTEX, rel=0.02)
    assert found["Tt.BMD"] == pytest.approx(share * MARROW + (1 - share) * CORTEX, rel=0.02)
    assert found["Ct.Th"] == pytest.approx(wall, abs=spacing / 2)
    assert found["BV/TV"] < 0.02
    assert list(found) == ["Tt.Ar", "Tt.BMD", "Tb.BMD", "BV/TV", "Ct.BMD", "Ct.Th"]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_hollow_box(spacing):
    y, x = grid(spacing)
    depth = np.minimum(7.0 - np.abs(y), 9.0 - np.abs(x))
    section = np.where(depth > 0, np.where(depth > 1.2, MARROW, CORTEX), 0.0)
    found = measure(stack(section, spacing))
    assert found["Tt.Ar"] == pytest.approx(14 * 18, rel=0.02)
    assert found["Tt.BMD"] == pytest.approx(section[section > 0].mean(), rel=0.02)
    assert found["Tb.BMD"] == pytest.approx(MARROW, rel=0.02)
    assert found["Ct.BMD"] == pytest.approx(CORTEX, rel=0.02)
    assert found["Ct.Th"] == pytest.approx(1.2, abs=spacing / 2)


@pytest.mark.parametrize("spacing", SPACINGS[1:])
def test_partial_volume_keeps_mass_and_lowers_cortical_density(spacing):
    fine = spacing / 4
    section = cylinder(fine, wall=0.8)
    coarse = section[: section.shape[0] // 4 * 4, : section.shape[1] // 4 * 4]
    coarse = coarse.reshape(coarse.shape[0] // 4, 4, -1, 4).mean(axis=(1, 3))
    found = measure(stack(coarse, spacing))
    assert found["Tt.Ar"] * found["Tt.BMD"] == pytest.approx(section.sum() * fine**2, rel=0.015)
    assert found["Ct.Th"] == pytest.approx(0.8, abs=spacing / 2)
    assert 0.85 * CORTEX < found["Ct.BMD"] < CORTEX


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("gap", [0.0, 0.3, 2.0])
def test_the_neighbouring_bone_is_not_the_radius(spacing, gap):
    """A second ring, cut by the image border, at or near the first."""
    y, x = grid(spacing)
    ulna_distance = np.hypot(y, x - (8 + gap + 6))
    ulna = ulna_distance < 6
    section = cylinder(spacing)
    section[ulna] = np.where(ulna_distance < 5.2, MARROW, CORTEX)[ulna]
    outer, inner = contours(stack(section, spacing))
    alone = contours(stack(cylinder(spacing), spacing))
    assert (outer & ulna).sum() < 0.03 * ulna.sum() * len(outer)
    assert not (inner & ulna).any()
    assert outer.sum() == pytest.approx(alone[0].sum(), rel=0.01)
    if gap == 2.0:
        np.testing.assert_array_equal(outer, alone[0])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_gap_in_the_cortex_does_not_let_the_outside_in(spacing):
    y, x = grid(spacing)
    section = cylinder(spacing)
    volume = stack(section, spacing)
    volume.voxels[2:4, (np.abs(y) < 1.0) & (x > 0) & (section == CORTEX)] = 0  # 2 mm wide, two of five slices
    outer, inner = contours(volume)
    per_slice = outer.sum(axis=(1, 2))
    assert per_slice.min() > 0.95 * per_slice.max()
    assert inner.sum(axis=(1, 2)).min() > 0.9 * inner[0].sum()


def test_trabeculae_and_pores_move_no_contour():
    spacing = 0.0607
    volume = stack(cylinder(spacing), spacing, slices=9)
    plain = contours(volume)
    y, x = grid(spacing)
    within, pore = np.hypot(y, x) < 6.4, np.hypot(y, x - 7.2) < 0.15
    volume.voxels[:4, (y % 0.9 < 0.3) & within] = 900  # beams along x, and below them along y
    volume.voxels[5:, (x % 0.9 < 0.3) & within] = 900
    volume.voxels[:, np.hypot(y, x) < 0.5] = 900  # a thick strut, an island in every slice
    volume.voxels[:, pore] = 0
    outer, inner = contours(volume)
    np.testing.assert_array_equal(outer, plain[0])
    assert not (inner & pore).any() and inner[:, np.hypot(y, x) < 5.5].all()
    assert np.mean(inner != plain[1]) < 0.01


@pytest.mark.parametrize("spacing", SPACINGS)
def test_scanner_noise_moves_no_contour(spacing):
    clean = stack(cylinder(spacing), spacing)
    noise = numpy_rng(0, "test noise").standard_normal(clean.shape, dtype=np.float32)
    sd = {0.0607: 110, 0.1214: 60, 0.2428: 30}[spacing]
    noisy, plain = measure(clean.with_voxels(clean.voxels + sd * noise)), measure(clean)
    for key in ("Tt.Ar", "Tt.BMD", "Tb.BMD", "Ct.BMD", "Ct.Th"):
        assert noisy[key] == pytest.approx(plain[key], rel=0.02), key


def test_bone_volume_fraction_of_plates():
    spacing = 0.1214
    voxels = np.zeros((10, 40, 40), np.float32)
    voxels[:, :, ::10] = voxels[:, :, 1::10] = 1000  # plates of two voxels, one voxel in five
    found = measure(Volume(voxels, (spacing,) * 3), compartments="trabecular")
    assert found == {"Tb.BMD": pytest.approx(200), "BV/TV": pytest.approx(0.2)}


def test_given_masks_are_measured_as_they_are():
    volume = stack(cylinder(0.2428), 0.2428)
    outer, inner = volume.voxels > 10, volume.voxels == MARROW
    found = measure(volume, compartments=(outer, inner))
    assert found["Tt.Ar"] == pytest.approx(outer[0].sum() * 0.2428**2)
    assert found["Ct.BMD"] == pytest.approx(CORTEX) and found["Tb.BMD"] == pytest.approx(MARROW)


def test_slices_without_bone_lower_the_mean_area():
    volume = stack(cylinder(0.2428), 0.2428, slices=20)
    whole = measure(volume)["Tt.Ar"]
    volume.voxels[0] = 0
    assert measure(volume)["Tt.Ar"] == pytest.approx(whole * 19 / 20, rel=0.005)


def test_anisotropic_spacing():
    volume = stack(cylinder(0.1214), 0.1214, slices=4)
    thick = Volume(volume.voxels, (0.5, 0.1214, 0.1214))
    found = measure(thick)
    assert found["Tt.Ar"] == pytest.approx(np.pi * 64, rel=0.02)
    assert found["Ct.Th"] == pytest.approx(1.6, abs=0.06)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("unit", "mgHA"),
        ("nothing", "no bone"),
        ("nan", "NaN"),
        ("solid", "no closed cortex"),
        ("half a ring", "no closed cortex"),
    ],
)
def test_what_cannot_be_measured_is_refused(kind, text):
    volume = stack(cylinder(0.2428), 0.2428)
    _, x = grid(0.2428)
    voxels = {
        "unit": volume.voxels,
        "nothing": 0.1 * volume.voxels,
        "nan": volume.voxels * np.nan,
        "solid": np.full_like(volume.voxels, 1000),
        "half a ring": volume.voxels * (x < 0),
    }[kind]
    with pytest.raises(InputError, match=text):
        measure(Volume(voxels, volume.spacing, "HU" if kind == "unit" else "mgHA"))


def test_bad_compartments_are_refused():
    volume = stack(cylinder(0.2428), 0.2428)
    outer, inner = volume.voxels > 10, volume.voxels == MARROW
    for masks in (
        (outer[:2], inner),
        (outer, inner.astype(int)),
        (inner, outer),
        (outer, outer),
        (outer, inner & False),
        "cortical",
    ):
        with pytest.raises(InputError):
            measure(volume, compartments=masks)


@pytest.mark.skipif(not CROP.exists(), reason="the genuine scanner crop is not here")
def test_genuine_trabecular_crop():
    volume = read_volume(CROP, unit="mgHA")
    found = measure(volume, compartments="trabecular")
    assert found == {"Tb.BMD": pytest.approx(112.1, abs=0.1), "BV/TV": pytest.approx(0.125, abs=0.001)}
    with pytest.raises(InputError, match="compartments='trabecular'"):
        measure(volume)
