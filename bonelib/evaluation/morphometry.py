"""Bone morphometry of a calibrated scan of the distal radius, by the names and definitions usual in HR-pQCT.

Contours after Buie et al. 2007, thickness after Hildebrand and Rueegsegger 1997, porosity after Burghardt et al. 2010,
anisotropy after Harrigan and Mann 1984, connectivity after Odgaard and Gundersen 1993. Every size is in mm, so that
one rule holds from the scanner's own grid (0.0607 mm) to a fourfold coarser one.

Trabecular bone is told from marrow by one of `SEGMENTATIONS`. `gaussian`, the default, smooths by 0.8 voxels of the
scanner and takes what exceeds 320 mg HA/cm3, as the manufacturer's standard evaluation of XtremeCT II does.
`laplace-hamming` sharpens instead (Laib and Rueegsegger 1999, Bone 24:35; for XtremeCT II Sadoughi et al. 2023, J Bone
Miner Res 38:1006): thin trabeculae that smoothing loses are kept.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import fft, ndimage
from skimage.measure import euler_number

from bonelib import InputError
from bonelib.evaluation.contours import BONE, bounding_box, contours_in, smoothed
from bonelib.evaluation.neighbours import gradient_at
from bonelib.evaluation.thickness import local_thickness, thickness_and_axes
from bonelib.scans.grids import Calibration
from bonelib.scans.plausibility import FLAGS, flags, largest
from bonelib.scans.volumes import Volume

SEGMENTATIONS = ("gaussian", "laplace-hamming")
LAPLACE, CUTOFF_MM = 0.45, 0.0607 / 0.3  # weight of the Laplacian; period from which on nothing is kept, 4.94 per mm
# 475 permille of the manufacturer's scale, in native units before the gain that a uniform scan gets
LAPLACE_NATIVE = 0.475 * 200_000 / ((2 * np.pi) ** 2 * (1 - LAPLACE))
XTREMECT_II = Calibration(mu_scaling=8192, mu_water=0.2366, slope=1662.524, intercept=-398.609)
SPECK_MM3 = 70 * 0.0607**3  # sharpening brings out noise, too: pieces below this are dropped
SURROUNDINGS_MM = 1.0  # about a mask, that the sharpening filter sees

CORTICAL_BONE = 450.0  # mg HA/cm3: what is less, within the cortex, may be a pore
PORE_MM3 = 5 * 0.0607**3  # smaller ones are not told from noise
SAMPLED_MM = 0.13  # thickness is averaged over points no further apart, of all voxels if these are larger
LINES = 200  # directions along which intercepts are counted
FACES = 100_000  # of the bone surface that are looked at for anisotropy, evenly taken from all
FEW = 4096  # of them at a time, whose products with all lines stay near the processor
CORNERS = np.ones((3, 3, 3), bool)  # bone is joined by faces, edges and corners


def measure(
    volume: Volume, *, compartments=None, segmentation: str = "gaussian", anisotropy: bool = True
) -> dict[str, float]:
    """Morphometry of one scan: area in mm2, densities in mg HA/cm3, sizes in mm, per mm or mm3, and shares.

    `compartments` is None for `contours`, a pair of such masks, or 'trabecular' for a volume wholly inside trabecular
    bone, which has no Tt and no Ct. In this order:

    Tt.Ar: mean area within the outer contour. Tt.BMD, Tb.BMD, Ct.BMD: mean unsmoothed density of a compartment,
    pores included. BV/TV: share of the trabecular compartment that is bone, by default where smoothed density exceeds
    `BONE`. Tb.Th, Tb.Sp: local thickness of the bone, and of the marrow, in it. Tb.N: 1 / local thickness of what
    lies between the medial axes of the bone, which is not 1 / (Tb.Th + Tb.Sp). DA: longest over shortest axis of the
    ellipsoid of mean intercept lengths. Conn.D: loops of the largest piece of bone per volume of the compartment.
    Ct.Th: local thickness of the cortical compartment, pores filled. Ct.Po: enclosed pores over the volume of the
    cortical compartment. `segmentation`, one of `SEGMENTATIONS`, is for BV/TV, Tb.Th, Tb.Sp, Tb.N, DA and Conn.D;
    contours and pores have thresholds of their own. Without `anisotropy` there is no DA, which takes a fifth of the
    time.

    What does not exist is NaN, such as Tb.Th where no voxel is bone. Raises `InputError` as `contours`, for a bone that
    the field cuts, a cast or metal (`scans.plausibility.flags`), and for masks that do not fit or a segmentation that
    is not known.
    """
    if isinstance(compartments, str) and compartments != "trabecular":
        raise InputError(f"compartments is {compartments!r}; accepted is 'trabecular', or two masks")
    _known(segmentation)
    density = smoothed(volume)
    with ThreadPoolExecutor(2) as pool:  # arrays are worked on at the same time, and the longest work is begun early
        if isinstance(compartments, str):
            return _trabecular(volume, density, np.ones(volume.shape, bool), segmentation, pool, anisotropy)
        found = contours_in(density, volume.spacing) if compartments is None else compartments
        outer, inner = _fitting(found, volume)
        if compartments is None and (wrong := flags(density, outer, volume.spacing)):
            raise InputError(f"{' and '.join(FLAGS[w] for w in wrong)}: its morphometry would not be that of a radius")
        cortical = pool.submit(_cortical, volume, density, outer & ~inner)
        inside = _trabecular(volume, density, inner, segmentation, pool, anisotropy)
        return {
            "Tt.Ar": float(outer.sum() / volume.shape[0] * volume.spacing[1] * volume.spacing[2]),
            "Tt.BMD": _mean(volume.voxels, outer),
            **inside,
            **cortical.result(),
        }


def measure_or_none(volume: Volume, **how) -> dict[str, float] | None:
    """`measure`, or None where no contours are found."""
    try:
        return measure(volume, **how)
    except InputError:
        return None


def trabecular(
    volume: Volume, mask: np.ndarray, *, segmentation: str = "gaussian", anisotropy: bool = True
) -> dict[str, float]:
    """What `measure` tells of a trabecular compartment alone, the boolean `mask` (z, y, x); raises as it does."""
    _known(segmentation)
    _fits(mask, volume, "trabecular")
    with ThreadPoolExecutor(2) as pool:
        return _trabecular(volume, smoothed(volume), mask, segmentation, pool, anisotropy)


def segment(volume: Volume, *, compartments=None, segmentation: str = "gaussian") -> np.ndarray:
    """Boolean mask (z, y, x) of bone, by one of `SEGMENTATIONS`: by default smoothed density above 320 mg HA/cm3.

    With `compartments`, a pair of masks as of `measure`, only within the outer one, and in the cortex smoothed density
    above 450.
    """
    _known(segmentation)
    density = smoothed(volume)
    bone = density > BONE if segmentation == "gaussian" else _sharpened(volume) > 0
    if compartments is None:
        return bone
    outer, inner = _fitting(compartments, volume)
    return outer & np.where(inner, bone, density > CORTICAL_BONE)


def fabric(volume: Volume, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean intercept lengths along the axes of their ellipsoid, in falling order and of sum 1, and the axes (3, 3).

    Row i is the unit axis (z, y, x) of length i; the bone of `mask` (z, y, x), of everything if None, is looked at.
    How often a line in direction n meets a surface is the integral of |n . normal| over it, so that the lengths come
    from the normals of the surface; the ellipsoid is fitted after Harrigan and Mann 1984. NaN without a surface.
    """
    return _fabric(smoothed(volume), BONE, np.ones(volume.shape, bool) if mask is None else mask, volume.spacing)


def connectivity(bone: np.ndarray) -> float:
    """Number of loops of the largest piece of a mask (z, y, x): 1 + cavities - Euler number (Odgaard and Gundersen)."""
    if not bone.any():
        return np.nan
    part = np.pad(largest(bone, CORNERS), 1)
    _, outsides = ndimage.label(~part)
    return float(outsides - euler_number(part, connectivity=3))


def _known(segmentation):
    if segmentation not in SEGMENTATIONS:
        raise InputError(f"segmentation is {segmentation!r}; accepted are {', '.join(SEGMENTATIONS)}")


def _sharpened(volume, box=(slice(None),) * 3):
    """Within a box of slices, density after the Laplace-Hamming filter less its threshold; bone is above 0.

    The filter multiplies the frequency k (per mm) by 1 + e / (1 - e) k^2 and by a window that falls to 0 at the
    cut-off. Its threshold is in native units: those of the scan's own calibration, or else of `XTREMECT_II`.
    """
    reach = [int(np.ceil(SURROUNDINGS_MM / s)) for s in volume.spacing]
    ends = [s.indices(n)[:2] for s, n in zip(box, volume.shape, strict=True)]
    wide = tuple(slice(max(a - r, 0), b + r) for (a, b), r in zip(ends, reach, strict=True))
    core = tuple(slice(a - w.start, b - w.start) for (a, b), w in zip(ends, wide, strict=True))
    voxels = volume.voxels[wide].astype(np.float32, copy=False)
    sizes = [fft.next_fast_len(n + r, real=True) for n, r in zip(voxels.shape, reach, strict=True)]
    padded = np.pad(voxels, [(0, m - n) for m, n in zip(sizes, voxels.shape, strict=True)], mode="symmetric")
    z, y, x = (fft.fftfreq(n, s).astype(np.float32) for n, s in zip(sizes, volume.spacing, strict=True))
    square = z[:, None, None] ** 2 + y[:, None] ** 2 + x[: sizes[2] // 2 + 1] ** 2
    gain = (1 + LAPLACE / (1 - LAPLACE) * square) * (1 + np.cos(np.pi * np.minimum(np.sqrt(square) * CUTOFF_MM, 1))) / 2
    known = volume.calibration or XTREMECT_II
    if None in (known.slope, known.intercept, known.mu_scaling):
        known = XTREMECT_II
    bone = known.slope * LAPLACE_NATIVE / known.mu_scaling + known.intercept
    level = fft.irfftn(fft.rfftn(padded) * gain, sizes)[core] - np.float32(bone)
    labels, _ = ndimage.label(level > 0)
    specks = np.bincount(labels.ravel()) * np.prod(volume.spacing) < SPECK_MM3
    specks[0] = False
    return np.where(specks[labels], -np.abs(level), level)


def _trabecular(volume, density, mask, segmentation, pool, anisotropy=True):
    box, spacing, stride = _walled(mask), volume.spacing, _stride(volume.spacing)
    found = {"Tb.BMD": _mean(volume.voxels, mask)}
    gaussian = segmentation == "gaussian"
    level = density[box] - np.float32(BONE) if gaussian else _sharpened(volume, box)
    values, threshold, mask = (density[box], BONE, mask[box]) if gaussian else (level, 0, mask[box])
    bone = (level > 0) & mask
    sizes = pool.submit(thickness_and_axes, bone, mask, spacing, level=level, stride=stride)
    separation = pool.submit(local_thickness, mask & ~bone, spacing, level=-level, stride=stride)
    fabric = pool.submit(_fabric, values, threshold, mask, spacing) if anisotropy else None
    found["BV/TV"] = float(bone.sum() / mask.sum())
    density_of_loops = connectivity(bone) / (float(mask.sum()) * float(np.prod(spacing)))
    thickness, between = sizes.result()
    found |= {"Tb.Th": _mean_size(thickness), "Tb.Sp": _mean_size(separation.result()), "Tb.N": 1 / _mean_size(between)}
    if fabric is not None:
        lengths, _ = fabric.result()
        found["DA"] = float(lengths[0] / lengths[2])
    return found | {"Conn.D": density_of_loops}


def _cortical(volume, density, cortex):
    box, spacing = _walled(cortex), volume.spacing
    return {
        "Ct.BMD": _mean(volume.voxels, cortex),
        "Ct.Th": _mean_size(local_thickness(cortex[box], spacing, stride=_stride(spacing))),
        "Ct.Po": _porosity(density[box], cortex[box], spacing),
    }


def _walled(mask):
    """Slices about a mask with one voxel more to each side where the scan goes on, so that this side is a wall."""
    return tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in bounding_box(mask))


def _stride(spacing):
    return max(1, int(SAMPLED_MM / min(spacing)))


def _porosity(density, cortex, spacing):
    """Share of the cortex in pores: enclosed by bone within their slice, so that marrow and outside are no pores."""
    in_slice = np.zeros((3, 3, 3), bool)
    in_slice[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(cortex & (density <= CORTICAL_BONE), in_slice)
    border = cortex & ~ndimage.binary_erosion(cortex, CORNERS[:1], border_value=1)
    is_open = np.zeros(count + 1, bool)
    is_open[labels[border]] = True
    is_open[0] = True
    pores, _ = ndimage.label(~is_open[labels])
    sizes = np.bincount(pores.ravel())[1:]
    return float(sizes[sizes * np.prod(spacing) >= PORE_MM3].sum() / cortex.sum())


def _fabric(density, threshold, mask, spacing):
    axes = np.full(3, np.nan), np.full((3, 3), np.nan)
    bone, inner = density > threshold, np.pad(mask[1:-1, 1:-1, 1:-1], 1)
    normals, areas = [], []
    places, steps = [], (density.shape[1] * density.shape[2], density.shape[2], 1)
    for axis in range(3):
        a, b = ([slice(None)] * 3 for _ in range(2))
        a[axis], b[axis] = slice(None, -1), slice(1, None)
        a, b = tuple(a), tuple(b)
        crossed = np.zeros_like(mask)
        crossed[a] = (bone[a] != bone[b]) & inner[a] & inner[b]
        places.append(np.flatnonzero(crossed))
    every = max(1, -(-sum(map(len, places)) // FACES))
    for axis, place in enumerate(places):
        place = place[::every]
        normal = gradient_at(density, place, spacing) + gradient_at(density, place + steps[axis], spacing)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        # a face of the grid that is crossed stands for |normal| / |its own area| of surface, seen along three axes
        normals.append(normal)
        areas.append(np.abs(normal[:, axis]) * np.float32(np.prod(spacing) / spacing[axis]))
    normals, areas = np.concatenate(normals), np.concatenate(areas)
    if not areas.sum() > 0:
        return axes
    turn = np.arange(LINES) * np.pi * (3 - np.sqrt(5))
    z = (np.arange(LINES) + 0.5) / LINES
    lines = np.stack([z, np.sqrt(1 - z**2) * np.sin(turn), np.sqrt(1 - z**2) * np.cos(turn)], 1)
    met, across = np.zeros(LINES), lines.T.astype(np.float32)
    for start in range(0, len(areas), FEW):
        part = slice(start, start + FEW)
        met += areas[part] @ np.abs(normals[part] @ across)
    met /= met.mean()
    pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
    design = np.stack([lines[:, i] * lines[:, j] * (1 if i == j else 2) for i, j in pairs], 1)
    # met^2 = n A n; weighed so that every direction counts by its relative error
    solution = np.linalg.lstsq(design / met[:, None] ** 2, np.ones(LINES), rcond=None)[0]
    tensor = np.zeros((3, 3))
    for (i, j), value in zip(pairs, solution, strict=True):
        tensor[i, j] = tensor[j, i] = value
    squares, vectors = np.linalg.eigh(tensor)
    lengths = 1 / np.sqrt(np.maximum(squares, 1e-6))
    return lengths / lengths.sum(), vectors.T


def _mean_size(sizes):
    sizes = sizes[sizes != 0]
    return float(sizes.mean(dtype=np.float64)) if len(sizes) else float("nan")


def _mean(voxels, mask):
    return float(voxels[mask].mean(dtype=np.float64))


def _fitting(masks, volume):
    outer, inner = (np.asarray(m) for m in masks)
    _fits(outer, volume, "periosteal")
    _fits(inner, volume, "endosteal")
    if (inner & ~outer).any() or not inner.any() or not (outer & ~inner).any():
        raise InputError("the endosteal mask must lie in the periosteal one, and both hold voxels")
    return outer, inner


def _fits(mask, volume, name):
    if mask.shape != volume.shape or mask.dtype != bool or not mask.any():
        raise InputError(f"the {name} mask is {mask.dtype} {mask.shape}; accepted is bool {volume.shape}, not empty")
