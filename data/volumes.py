"""
Volumes of heads with lesion masks: a drawn phantom, a lesion counter, NIfTI-1, own folders, one cache.

Arrays are (D, H, W) = (z, y, x) in RAS order: z grows towards the top of the head, y towards the nose, x
towards the right ear. Spacing is mm per voxel in the same order; affines are 4x4, for voxels (x, y, z).

Phantom: a post-contrast T1 head with lesions (necrotic core, bright rim, oedema). It is laid out in mm, so a
seed is the same head at every resolution; only lesions and noise differ. Two fields of view:
    HEAD = 160x200x200 mm    the whole head; at 32^3 every lesion is drawn with 14 mm or more
    CROP = 96x96x96 mm       its middle, for masks: at 32^3 (3 mm) from 6.6 mm on, and none is cut

Lesions are the 26-connected components of a mask; their size is the largest distance of two voxel centres,
the Feret diameter in mm. A condition is the number of lesions in seven bins of size:
    0-3  3-6  6-10  10-15  15-20  20-30  30-inf
It is always counted from the mask. Drawn diameters are no condition: voxels round them.

Own data: a folder of .nii, .nii.gz, .npy or .npz files; load_folder says how they are named.

    python -m data.volumes                      # preview of the phantoms: runs/preview_volumes.png
    python -m data.volumes check FOLDER         # reads every file, prints one line for each

Does not: resample to a common spacing, register, strip skulls, correct bias, read DICOM, NIfTI-2 or .hdr/.img
pairs, or look at the NIfTI unit code (lengths are taken as mm).
"""
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data import program

HEAD, CROP = (160.0, 200.0, 200.0), (96.0, 96.0, 96.0)  # fields of view, mm
EDGES = (0, 3, 6, 10, 15, 20, 30, math.inf)  # of the bins of size, mm
SEEDS = dict(train=0, val=1_000_000, test=2_000_000)  # first phantom of each split
SPLITS = tuple(SEEDS)
CACHE = "runs/cache"
RECIPE = 1  # part of the cache's name: raise it whenever phantoms or conversions change

AIR, SCALP, SKULL, CSF, GREY, WHITE, VENTRICLE, NECROSIS, RIM, OEDEMA = range(10)
LEVELS = (0, .72, .06, .12, .42, .58, .10, .16, .95, .48)  # brightness of each tissue
SMALLEST, LARGEST = 2.2, 35.0  # lesion diameters: at least so many voxels, at most so many mm
THINNEST = .76  # smallest factor on f by a lesion's texture: it reaches d / 2 / .76 from its centre


# ------------------------------------------------------------------------------------------------------------
# Lesions: components, diameters, counts

def lesions(mask, spacing):
    """Find the lesions of a mask.

    mask: bool or int (D, H, W), non-zero is lesion; spacing: mm, three numbers or one.
    Returns labels int32 (D, H, W), 0 outside and 1..n in the order of their first voxels, and the diameters
    float64 (n,) in mm: the largest distance of two voxel centres, 0 for a single voxel, exact for any shape.
    Raises ValueError for floats: binarize them first, so that one place decides how.
    """
    mask = np.asarray(mask)
    if mask.ndim != 3 or mask.dtype.kind not in "bui":
        raise ValueError(f"mask: expected bool or integers (D, H, W), found {mask.dtype} {mask.shape}")
    spacing = np.broadcast_to(np.asarray(spacing, float), 3)
    places = np.argwhere(mask)
    number = np.full(np.add(mask.shape, 2), -1, np.int32)  # a frame of -1: no neighbour outside
    number[tuple((places + 1).T)] = np.arange(len(places))
    flat, at = number.ravel(), np.flatnonzero(number.ravel() >= 0)
    root = np.arange(len(places), dtype=np.int32)
    strides = (number.shape[1] * number.shape[2], number.shape[2], 1)
    for step in list(itertools.product((-1, 0, 1), repeat=3))[14:]:  # the 13 neighbours that come later
        other = flat[at + np.dot(step, strides)]
        a, b = np.flatnonzero(other >= 0), other[other >= 0]
        while len(a):  # hook the larger root of each pair on the smaller one, then flatten
            low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
            differ = low < high
            np.minimum.at(root, high[differ], low[differ])
            while (root != root[root]).any():
                root = root[root]
            a, b = a[differ], b[differ]
    first, which = np.unique(root, return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[tuple(places.T)] = which + 1
    order = np.argsort(which, kind="stable")  # stable: voxels of a lesion stay in the order of the array
    parts = np.split(places[order], np.cumsum(np.bincount(which))[:-1]) if len(first) else []
    return labels, np.array([_feret(part, spacing) for part in parts])


def _feret(voxels, spacing):
    """Largest distance in mm between voxel centres; voxels int (n, 3) in the order of the array.

    Exact, and fast without a convex hull: a voxel between two others of its row cannot be an end, and neither
    can one that is nearer to the middle than `best - radius`, because no voxel is further away than radius.
    """
    if len(voxels) == 1:
        return 0.0
    new_row = (voxels[1:, :2] != voxels[:-1, :2]).any(1)
    points = voxels[np.r_[True, new_row] | np.r_[new_row, True]] * spacing
    if len(points) > 64:
        along = points @ _DIRECTIONS.T
        best = np.linalg.norm(points[along.argmax(0)] - points[along.argmin(0)], axis=1).max()
        radii = np.linalg.norm(points - (points.max(0) + points.min(0)) / 2, axis=1)
        points = points[radii >= best - radii.max() - 1e-9]
    square = 0.0
    for part in np.array_split(points, len(points) // 256 + 1):  # bounds the memory
        square = max(square, ((part[:, None] - points) ** 2).sum(-1).max())
    return round(math.sqrt(square), 6)  # or 5 x 1.2 mm would be below or above 6 mm, depending on its place


_DIRECTIONS = np.array(list(itertools.product((-1, 0, 1), repeat=3))[14:], float)


def size_bin(diameters):
    """int array: the bin (0..6) of each Feret diameter in mm; an edge belongs to the bin above it."""
    return np.searchsorted(EDGES, diameters, side="right") - 1


def count_lesions(mask, spacing):
    """int64 (7,): the number of lesions of a mask (D, H, W) per bin of size. Arguments as in lesions()."""
    return np.bincount(size_bin(lesions(mask, spacing)[1]), minlength=len(EDGES) - 1)


def representable(shape, fov=HEAD):
    """bool (7,): which bins of size a phantom of this shape (voxels) and field of view (mm) can fill: those
    that diameters from 2.2 voxels to 35 mm reach, as far as the array holds them whole."""
    voxel = max(np.divide(fov, shape))
    smallest, largest = SMALLEST * voxel, min(LARGEST, THINNEST * (min(fov) - voxel))
    return np.array([low < largest and high > smallest for low, high in zip(EDGES, EDGES[1:])])


# ------------------------------------------------------------------------------------------------------------
# The phantom

def phantom(seed, shape=(32, 32, 32), fov=HEAD, counts=None):
    """Draw a head with lesions.

    seed: int >= 0; shape: (D, H, W) voxels; fov: field of view in mm around the middle of the head, HEAD or
    CROP or another; counts: (7,) lesions wanted per bin of size, as count_lesions() will find them (None: one
    plus a Poisson number with mean 2, of any size). Lesions are whole, apart from each other, and centred in
    the brain outside its ventricles. Returns image float32 (D, H, W) in [0, 1] and mask uint8 (D, H, W).
    Raises ValueError when the wanted lesions do not fit.
    """
    spacing = np.divide(fov, shape)
    if counts is not None and np.reshape(counts, len(EDGES) - 1)[~representable(shape, fov)].any():
        raise ValueError(f"phantom: expected lesions of {bin_names(representable(shape, fov))}, as "
                         f"{_times(shape)} voxels of {_times(spacing, 2)} mm can hold them, found the counts "
                         f"{list(counts)} for {bin_names()}")
    rng = np.random.default_rng(seed)
    grid = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(shape, spacing)]

    # Head: p are coordinates in which it is straight; each tissue is an ellipsoid f < 1 of them.
    axes = np.array([70, 88, 70]) * (1 + .06 * rng.standard_normal(3))
    p = _turned(grid, rng.normal(0, 2, 3), _rotation(rng.normal(0, .06, 3)))
    p = [q + 2.5 * _smooth(rng, 6, grid) for q in p]
    inside = _ellipsoid(p, 0, axes - 11)
    brain = inside * (1 + .05 * np.sin(.28 * p[1] + 3 * _smooth(rng, 5, grid))
                      * np.sin(.31 * p[2] + 3 * _smooth(rng, 5, grid)))  # gyri
    white = _ellipsoid(p, 0, axes - 25) * (1 + .10 * _smooth(rng, 8, grid))
    cerebellum = _ellipsoid(p, (-38, -34, 0), (22, 24, 38))
    size, tilt = 1 + .15 * rng.standard_normal(), rng.uniform(-.15, .15)
    tissue = np.full(shape, AIR, np.uint8)
    tissue[_ellipsoid(p, 0, axes) < 1] = SCALP
    tissue[_ellipsoid(p, 0, axes - 5) < 1] = SKULL
    tissue[inside < 1] = CSF
    tissue[brain < .96] = GREY
    tissue[(white < 1) & (brain < .96)] = WHITE
    tissue[(cerebellum < 1) & (brain < .96)] = GREY
    tissue[(cerebellum < .7) & (brain < .96)] = WHITE
    for side in (-1, 1):
        turned = _turned(p, (6, -2, side * 12), _rotation((side * tilt, 0, 0)))
        tissue[(_ellipsoid(turned, 0, (9, 26, 6)) / size < 1) & (brain < .96)] = VENTRICLE
    tissue[(np.abs(p[2]) < 1.2) & (p[0] > 12) & (inside < 1)] = CSF  # falx

    levels = np.array(LEVELS) * (1 + .04 * rng.standard_normal(len(LEVELS)))
    bias = 1 + .08 * _smooth(rng, 3, grid)  # before the lesions: the number of their draws varies
    homes = np.argwhere((brain < .85) & (tissue != VENTRICLE))
    mask = _add_lesions(rng, tissue, homes, grid, spacing, min(LARGEST, .45 * axes.min()), counts)

    # Scanner: partial volumes, bias field, Rician noise, robust range.
    image = levels[tissue].astype(np.float32)
    for axis in range(3):
        x = np.swapaxes(image, 0, axis)
        image = np.swapaxes((np.concatenate([x[:1], x[:-1]]) + 2 * x + np.concatenate([x[1:], x[-1:]])) / 4,
                            0, axis)
    noise = .015 * rng.standard_normal((2, *shape), dtype=np.float32)
    return to_unit_range(np.hypot(image * bias + noise[0], noise[1])), mask


def _add_lesions(rng, tissue, homes, grid, spacing, largest, counts):
    """Paint lesions into tissue (D, H, W) in place; returns their mask. Arguments as in _place_lesions."""
    for _ in range(20):
        placed = _place_lesions(rng, homes, grid, spacing, largest, counts)
        mask = np.zeros(tissue.shape, np.uint8)
        for _, box, f in placed:
            mask[box] |= f < 1
        if counts is None or np.array_equal(count_lesions(mask, spacing), counts):
            break
    else:
        raise ValueError(f"phantom: expected room for {list(counts)} lesions of {bin_names()}, found none in "
                         "20 layouts; ask for fewer")
    for d, box, f in placed:
        part = tissue[box]  # a view
        shell = 1 + 8 / d * rng.uniform(.3, 1.2)  # oedema of 1.2 to 4.8 mm
        part[(f < shell) & ((part == GREY) | (part == WHITE))] = OEDEMA
        part[f < 1] = RIM
        if d > 8:
            part[f < 1 - 2 * max(spacing[0], 1.8) / d] = NECROSIS
    return mask


def _place_lesions(rng, homes, grid, spacing, largest, counts):
    """Find places for lesions, largest first: a list of (diameter in mm, box, f inside the box).

    homes: int (n, 3), voxels that may be centres; largest: mm, of those of random size; counts: (7,) or None.
    A lesion that finds no place in 40 trials is left out.
    """
    smallest = SMALLEST * spacing.max()
    if counts is None:
        drawn = np.exp(rng.uniform(math.log(3), math.log(largest), 1 + rng.poisson(2)))
        layout = [(d, d, None) for d in np.sort(np.maximum(drawn, smallest))[::-1]]
    else:
        layout = [(max(EDGES[k], smallest), min(EDGES[k + 1], LARGEST), k)
                  for k in reversed(range(len(counts))) for _ in range(counts[k])]
    taken, placed = np.zeros([len(g) for g in grid], bool), []
    for low, high, wanted in layout if len(homes) else ():
        for _ in range(40):
            d = rng.uniform(low, high)
            centre = np.array([g[i] for g, i in zip(grid, rng.choice(homes))])
            semi_axes = d / 2 * np.array([1, rng.uniform(.75, 1), rng.uniform(.75, 1)])
            rotation, texture = _rotation(rng.uniform(0, 3, 3)), rng.standard_normal((7, 7, 7))
            reach = d / 2 / THINNEST
            if any(abs(c) + reach > g[-1] for c, g in zip(centre, grid)):
                continue  # the array would cut it
            far = reach * max(1.6, 1 + 9.6 / d)  # of everything that is painted or tested
            box = tuple(slice(*np.searchsorted(g, (c - far, c + far))) for c, g in zip(centre, grid))
            local = [g[b] for g, b in zip(grid, box)]
            f = _ellipsoid(_turned(local, centre, rotation), 0, semi_axes)
            f = f * (1 + .08 * _upsample(texture, local).clip(-3, 3))
            if taken[box][f < 1.6].any():
                continue
            if wanted is not None and size_bin(lesions(f < 1, spacing)[1]).tolist() != [wanted]:
                continue  # voxels rounded it into another bin
            taken[box] |= f < 1.3
            placed.append((d, box, f))
            break
    return placed


def _smooth(rng, c, grid):
    """Smooth noise of unit variance at its nodes: c^3 normal numbers over HEAD, interpolated at grid (mm)."""
    return _upsample(rng.standard_normal((c, c, c)), grid)


def _upsample(nodes, grid):
    """Trilinear: nodes (c, c, c) spread over HEAD, at three axes of positions in mm -> float32 (D, H, W)."""
    c = len(nodes)
    for position, length in zip(grid, HEAD):
        at = ((position / length + .5) * (c - 1)).clip(0, c - 1)
        weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(c)))  # (n, c)
        nodes = np.tensordot(nodes, weight, (0, 1))  # the axis done moves to the end, so all three take turns
    return nodes.astype(np.float32)


def _turned(grid, centre, rotation):
    """Three coordinate fields: rotation @ (r - centre). grid: three axes, or three fields."""
    z, y, x = (r - np.float32(c) for r, c in zip(np.ix_(*grid) if grid[0].ndim == 1 else grid, centre))
    return [np.float32(a) * z + np.float32(b) * y + np.float32(c) * x for a, b, c in rotation]


def _rotation(angles):
    """3x3: turns about z (in the plane of y and x), then y, then x, by angles in rad."""
    turn = np.eye(3)
    for angle, (i, j) in zip(angles, ((1, 2), (0, 2), (0, 1))):
        step = np.eye(3)
        step[i, i] = step[j, j] = math.cos(angle)
        step[i, j], step[j, i] = -math.sin(angle), math.sin(angle)
        turn = step @ turn
    return turn


def _ellipsoid(p, centre, semi_axes):
    """f = ||(p - centre) / semi_axes||, below 1 inside."""
    centre = np.broadcast_to(centre, 3)
    z, y, x = ((q - np.float32(c)) / np.float32(s) for q, c, s in zip(p, centre, semi_axes))
    return np.sqrt(z * z + y * y + x * x)


def to_unit_range(volume, name="volume"):
    """float32: the .1 and 99.9 percentiles go to 0 and 1, what is beyond is clipped. ValueError, beginning
    with name, when they are equal."""
    low, high = np.percentile(volume, (.1, 99.9))
    if not low < high:
        raise ValueError(f"{name}: expected an image, found the value {low:g} in 99.8 % of it; remove it")
    return ((volume - np.float32(low)) / np.float32(high - low)).clip(0, 1).astype(np.float32)


def bin_names(which=None):
    """'0-3, 3-6, ... mm': all bins of size, or those where `which` (7,) is true."""
    names = [f"{low}-{high}" for low, high in zip(EDGES, EDGES[1:])]
    return ", ".join(n for k, n in enumerate(names) if which is None or which[k]) + " mm"


def _times(numbers, digits=0):
    return "x".join(f"{n:.{digits}f}" for n in numbers)


# ------------------------------------------------------------------------------------------------------------
# Data sets: three splits in one folder of arrays

def phantoms(train=256, val=32, test=64, shape=(32, 32, 32), fov=HEAD, cache=CACHE):
    """The embedded set: phantom(SEEDS[split] + i) for i in 0..N-1, so a larger one begins with the smaller.

    Drawn at the first call, then kept below cache. Returns a namespace with train, val and test, each with
        images float16 (N, D, H, W) in [0, 1], masks uint8 (N, D, H, W): opened as memory maps, read on demand
        counts int64 (N, 7), counted from the masks; spacing float64 (N, 3) in mm; names, list of str
    and with facts, one line to print. Raises ValueError or OSError in one line that says what to do.
    """
    sizes = dict(train=train, val=val, test=test)
    if min(sizes.values()) < 1 or max(sizes.values()) > SEEDS["val"] or min(shape) < 8:
        raise ValueError(f"phantoms: expected 1 to {SEEDS['val']:,} volumes a split and 8 voxels or more a "
                         f"side, found {sizes} and {_times(shape)}")
    spacing = np.divide(fov, shape)

    def volumes(split):
        for i in range(sizes[split]):
            yield *phantom(SEEDS[split] + i, shape, fov), spacing

    missing = ~representable(shape, fov)
    facts = (f"phantoms: {train:,}/{val:,}/{test:,} volumes {_times(shape)} of {_times(spacing, 2)} mm"
             + (f"; not representable: lesions of {bin_names(missing)}" if missing.any() else ""))
    names = {split: [str(SEEDS[split] + i) for i in range(n)] for split, n in sizes.items()}
    record = dict(kind="phantoms", shape=list(map(int, shape)), fov=list(map(float, fov)))
    return _stored(cache, record, names, shape, volumes, True, lambda: facts)


def _stored(cache, record, names, shape, volumes, masked, facts):
    """The data set that belongs to record, from the cache, or made there.

    names: split -> list of str; volumes(split) yields as many (image, mask or None, spacing), one at a time,
    so memory does not grow with the set; masked: whether masks are kept; facts() -> str, called last. Written
    into a folder that gets its name when everything in it is complete: a kill leaves no half of a set.
    """
    record = dict(record, recipe=RECIPE, names=names)
    tag = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
    root = Path(cache).resolve() / f"volumes_{record['kind']}_{tag}"
    if (found := _opened(root, shape, masked)) is not None:
        return found
    root.parent.mkdir(parents=True, exist_ok=True)
    for left in root.parent.glob(".volumes_*.tmp"):  # by a killed process, unless it is still at work
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    folder = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with tqdm(total=sum(map(len, names.values())), desc="volumes", unit="volume", disable=None) as bar:
            for split in SPLITS:
                _write_split(folder, split, len(names[split]), shape, volumes(split), masked, bar)
        (folder / "index.json").write_text(json.dumps(dict(record, facts=facts())))
        shutil.rmtree(root, ignore_errors=True)  # damaged, or it would have been opened
        try:
            os.replace(folder, root)
        except OSError:  # another process made the same set in the meantime
            if _opened(root, shape, masked) is None:
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _opened(root, shape, masked)


def _write_split(folder, split, n, shape, volumes, masked, bar):
    """Plain writes, not a writable memory map: there a full disk ends the process without a word."""
    counts, spacings = np.zeros((n, len(EDGES) - 1), np.int64), np.zeros((n, 3))
    head, files = dict(fortran_order=False, shape=(n, *map(int, shape))), {}
    with contextlib.ExitStack() as stack:
        for name, kind in (("images", "<f2"), ("masks", "|u1"))[:1 + masked]:
            files[name] = stack.enter_context(open(folder / f"{split}_{name}.npy", "wb"))
            np.lib.format.write_array_header_1_0(files[name], dict(head, descr=kind))
        for i, (image, mask, spacing) in enumerate(volumes):
            files["images"].write(image.astype("<f2").tobytes())
            spacings[i] = spacing
            if masked:
                files["masks"].write(mask.tobytes())
                counts[i] = count_lesions(mask, spacing)
            bar.update()
    np.save(folder / f"{split}_counts.npy", counts)
    np.save(folder / f"{split}_spacing.npy", spacings)


def _opened(root, shape, masked):
    """The data set in root, or None when it is not there or damaged."""
    try:
        index = json.loads((root / "index.json").read_text())
        found = SimpleNamespace(facts=index["facts"])
        for split in SPLITS:
            part = SimpleNamespace(names=index["names"][split], masks=None, counts=None)
            for name in ("images", "masks", "counts") if masked else ("images",):
                big = name != "counts" and part.names  # an empty file cannot be mapped
                setattr(part, name, np.load(root / f"{split}_{name}.npy", mmap_mode="r" if big else None))
            part.spacing = np.load(root / f"{split}_spacing.npy")
            if part.images.shape != (len(part.names), *shape):
                return None
            setattr(found, split, part)
        return found
    except (OSError, ValueError, KeyError, EOFError):
        return None


# ------------------------------------------------------------------------------------------------------------
# NIfTI-1

FIELDS = dict(sizeof_hdr=("i4", 0), dim=("8i2", 40), datatype=("i2", 70), bitpix=("i2", 72),
              pixdim=("8f4", 76), vox_offset=("f4", 108), slope=("f4", 112), inter=("f4", 116),
              units=("u1", 123), qform_code=("i2", 252), sform_code=("i2", 254), quaternion=("3f4", 256),
              offset=("3f4", 268), srow=("(3,4)f4", 280), magic=("S4", 344))  # the other bytes stay unused
HEADER = np.dtype(dict(names=list(FIELDS), formats=[f for f, _ in FIELDS.values()],
                       offsets=[o for _, o in FIELDS.values()], itemsize=348))
DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8",
             1280: "u8"}


def read_nifti(path, raw=False):
    """Read a .nii or .nii.gz file (NIfTI-1, either byte order).

    Returns array (D, H, W), affine and spacing (3,) in mm: turned by flips and transposes into the order
    nearest to RAS, in the stored type, or float32 where the file scales its values. affine (4, 4) maps voxel
    indices (x, y, z) of the turned array to mm.
    raw=True: as stored: float64 (X, Y, Z, ...), affine, and the header's voxel sizes (one per axis).
    Raises FileNotFoundError or ValueError in one line.
    """
    data = _unpacked(Path(path))
    order = next((o for o in "<>" if data[:4] == np.array(348, o + "i4").tobytes()), None)
    if order is None or len(data) < 348 or data[344:347] != b"n+1":
        what = ("NIfTI-2" if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else
                "half of an .hdr/.img pair" if data[344:347] == b"ni1" else
                f"{len(data):,} bytes that begin with {data[:4].hex() or 'nothing'}")
        raise ValueError(f"{path}: expected a NIfTI-1 file, found {what}; convert it to .nii.gz")
    head = np.frombuffer(data, HEADER.newbyteorder(order), 1)[0]
    shape = tuple(map(int, head["dim"][1:1 + max(0, head["dim"][0])]))
    kind = DATATYPES.get(int(head["datatype"]))
    if kind is None or not 1 <= head["dim"][0] <= 7 or min(shape) < 1:
        raise ValueError(f"{path}: expected numbers in 1 to 7 axes, found NIfTI data type {head['datatype']} "
                         f"and dim {head['dim'].tolist()}; the header is damaged, or these are colours")
    start = max(352, int(np.nan_to_num(head["vox_offset"])))
    needed = math.prod(shape) * np.dtype(kind).itemsize
    if len(data) < start + needed:
        raise ValueError(f"{path}: expected {needed:,} bytes of voxels ({_times(shape)} {kind}), found "
                         f"{max(0, len(data) - start):,}; the file is cut off, copy it again")
    array = np.frombuffer(data, order + kind, math.prod(shape), start).reshape(shape, order="F")
    slope, inter = float(head["slope"]), float(head["inter"])
    scaled = math.isfinite(slope) and slope != 0 and (slope, inter) != (1, 0)
    inter = inter if math.isfinite(inter) else 0.0
    affine, zooms = _affine(path, head, shape), np.abs(head["pixdim"][1:1 + len(shape)]).astype(float)
    if scaled or raw:
        array = array.astype(np.float64)
    if scaled:
        array = array * slope + inter
    if raw:
        return array, affine, zooms
    if any(n > 1 for n in shape[3:]):
        raise ValueError(f"{path}: expected one volume, found {math.prod(shape[3:])} ({_times(shape)}); "
                         "split the file and give one")
    if len(shape) < 3:
        raise ValueError(f"{path}: expected three axes, found {_times(shape)}; this is no volume, remove it")
    return to_ras(array.reshape(shape[:3]).astype(np.float32 if scaled else kind), affine)  # in native order


def _unpacked(path):
    """bytes of a file, unzipped if its first bytes say gzip, whatever its name."""
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, found one that is cut off or damaged "
                         f"({error}); copy it again") from None


def _affine(path, head, shape):
    """float64 (4, 4): sform, else qform, else voxel sizes, 0 in the middle and x to the left (as nibabel)."""
    affine, size = np.eye(4), np.abs(head["pixdim"][1:4]).astype(float)
    if head["sform_code"] > 0:
        affine[:3] = head["srow"]
    elif head["qform_code"] > 0:
        b, c, d = map(float, head["quaternion"])
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        affine[:3, :3] = np.array([
            (a*a + b*b - c*c - d*d, 2*b*c - 2*a*d, 2*b*d + 2*a*c),
            (2*b*c + 2*a*d, a*a + c*c - b*b - d*d, 2*c*d - 2*a*b),
            (2*b*d - 2*a*c, 2*c*d + 2*a*b, a*a + d*d - b*b - c*c)]) * size
        affine[:3, 2] *= -1 if head["pixdim"][0] < 0 else 1
        affine[:3, 3] = head["offset"]
    else:
        size[0] *= -1
        affine[:3, :3] = np.diag(size)
        affine[:3, 3] = -size * (np.array((*shape, 1, 1)[:3]) - 1) / 2
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError(f"{path}: expected an affine that can be inverted, found {affine[:3].tolist()}; "
                         "repair the sform or qform of its header")
    return affine


def to_ras(array, affine):
    """array (X, Y, Z) with its affine -> array (D, H, W), affine, spacing (3,): axes permuted and flipped
    into the order nearest to RAS, no value changed."""
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # axes[k]: the stored axis nearest to world axis k; the best of six orders, so none is taken twice
    axes = max(itertools.permutations(range(3)), key=lambda axes: sum(np.abs(unit[range(3), axes])))
    turn = np.zeros((4, 4))  # indices of the result -> indices as stored
    turn[3, 3] = 1
    for k, j in enumerate(axes):
        flip = unit[k, j] < 0
        turn[j, k], turn[j, 3] = (-1, array.shape[j] - 1) if flip else (1, 0)
        array = np.flip(array, j) if flip else array
    affine = affine @ turn
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    return np.ascontiguousarray(array.transpose(axes[::-1])), affine, spacing


def write_nifti(path, volume, spacing=1.0, affine=None):
    """Write a volume (D, H, W) as NIfTI-1, gzipped when the name ends in .gz.

    volume: float32, uint8 or int16 (bool is written as uint8, other floats as float32); spacing: mm; affine:
    (4, 4) for voxel indices (x, y, z), as read_nifti gives it (None: RAS axes, millimetre 0 in the middle).
    The file appears complete or not at all. Raises ValueError for other types or shapes.
    """
    path, volume = Path(path), np.asarray(volume)
    kind = {"b": "u1", "f": "f4"}.get(volume.dtype.kind, volume.dtype.str[1:])
    if volume.ndim != 3 or kind not in ("u1", "i2", "f4") or not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected float32, uint8 or int16 (D, H, W) and a name in .nii or .nii.gz, "
                         f"found {volume.dtype} {volume.shape}")
    size = volume.shape[::-1]
    if affine is None:
        affine = np.diag([*np.broadcast_to(spacing, 3)[::-1], 1.0])
        affine[:3, 3] = -affine.diagonal()[:3] * (np.array(size) - 1) / 2
    affine = np.asarray(affine, float)
    head = np.zeros((), HEADER.newbyteorder("<"))
    head["sizeof_hdr"], head["magic"], head["vox_offset"], head["units"] = 348, b"n+1", 352, 2  # 2: mm
    head["dim"] = (3, *size, 1, 1, 1, 1)
    head["datatype"] = next(code for code, name in DATATYPES.items() if name == kind)
    head["bitpix"] = 8 * np.dtype(kind).itemsize
    head["pixdim"] = (1, *np.linalg.norm(affine[:3, :3], axis=0), 1, 1, 1, 1)
    head["slope"], head["sform_code"], head["srow"] = 1, 1, affine[:3]  # 1: scanner coordinates
    data = head.tobytes() + bytes(4) + volume.astype("<" + kind).tobytes()  # x runs fastest in both
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(gzip.compress(data, 6, mtime=0) if path.name.endswith(".gz") else data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------
# Own folders

SUFFIX = re.compile(r"\.(nii\.gz|nii|npy|npz)$", re.I)
ROLE = re.compile(r"[_-](mask|seg|label|image|img)s?$", re.I)  # at the end of a name
FOLDER = re.compile(r"(image|img|mask|seg|label)s?(tr)?$", re.I)  # images/, labelsTr/, ...
IMAGE_KEYS, MASK_KEYS = ("volumes", "volume", "images", "image"), ("labels", "label", "masks", "mask")
SUBJECT = r"\D*\d+"


def load_folder(path, shape, factor=1, labels=1, subject=SUBJECT, val=0.1, test=0.1, cache=CACHE):
    """Convert a folder of volumes (or one .npz) once, and open it like phantoms().

    path: .nii, .nii.gz, .npy (D, H, W), or .npz: volume (D, H, W) or volumes (N, D, H, W), and if wanted
        labels of the same shape, subject (N,), spacing_mm (3,), and axes such as 'RAS': where each axis of
        the arrays and of spacing_mm points to ('SAR', that is (D, H, W), when it is missing; 1 mm likewise).
        A mask is called like its image plus _mask, _seg or _label (or -mask, ...), or lies under the same
        name in masks/, labels/ or labelsTr/ beside images/ or imagesTr/. _image at the end is ignored.
    shape: (D, H, W) of the result: what is larger is cut around the middle, what is smaller is padded with 0.
    factor: before that, factor^3 voxels become one: their mean; in masks the largest label, since a mean or a
        majority would lose small lesions (in return diameters may grow by up to factor - 1 voxels).
    labels: the largest label of a mask, 1 for plain masks; 0: there are no masks, or they are not wanted.
    subject: all volumes whose names (with folders) begin with the same match of this regular expression go to
        the same split: by default everything up to the end of the first number. For an .npz with several
        volumes its array subject decides.
    val, test: shares of the subjects, chosen by a hash of the subject alone, so adding files moves no other.
    Images are scaled by .1 and 99.9 percentiles to [0, 1]. Returns a namespace as phantoms() does; masks and
    counts are None when labels is 0. Raises ValueError or OSError in one line that names the file.
    """
    if factor < 1 or not 0 <= labels <= 255 or min(val, test) < 0 or val + test > 1:
        raise ValueError(f"{path}: expected factor >= 1, labels 0..255 and shares of 0 to 1, found factor "
                         f"{factor}, labels {labels}, val {val}, test {test}")
    path, cases = Path(path), _cases(Path(path), labels > 0)
    for case in cases:
        begin = re.match(subject, case.subject) if case.index is None else None
        case.split = _split(begin[0] if begin else case.subject, val, test)
    names = {split: [case.name for case in cases if case.split == split] for split in SPLITS}
    if not (names["train"] and names["val"]):
        raise ValueError(f"{path}: expected volumes for train and val, found {len(names['train'])} and "
                         f"{len(names['val'])}; give more subjects (names that begin with the same match of "
                         f"{subject!r} are one)")
    seen = SimpleNamespace(shapes=[], spacings=[], cut=0)

    def volumes(split):
        for case in (case for case in cases if case.split == split):
            image, spacing = read_volume(case.image, case.index)
            seen.shapes.append(image.shape)
            seen.spacings.append(spacing)
            mask = None
            if labels:
                mask = _checked_mask(case, image.shape, labels)
                inside = _fitted(mask, shape, factor)
                seen.cut += np.count_nonzero(inside) < np.count_nonzero(mask)
                mask = inside.max((1, 3, 5))
            image = _fitted(_checked_image(case.image, image), shape, factor)
            yield image.mean((1, 3, 5), dtype=np.float32), mask, spacing * factor

    def facts():
        _npz.cache_clear()
        change = f"mean of {factor}^3 voxels (masks: largest label), " if factor > 1 else ""
        cut = f"; {seen.cut} masks lost voxels at the border" if seen.cut else ""
        return (f"{path}: {'/'.join(str(len(names[s])) for s in SPLITS)} volumes by subject; found "
                f"{_span(seen.shapes, 0)} voxels of {_span(seen.spacings, 2)} mm; .1 and 99.9 percentiles to "
                f"[0, 1], {change}middle cut or padded to {_times(shape)}, not resampled{cut}")

    files = sorted({file for case in cases for file in (case.image, case.mask) if file})
    record = dict(kind="folder", path=str(path.resolve()), shape=list(map(int, shape)), factor=factor,
                  labels=labels, files=[(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return _stored(cache, record, names, shape, volumes, labels > 0, facts)


def read_volume(path, index=None, mask=False):
    """One volume of a file in any of the formats of load_folder: array (D, H, W) and spacing (3,) in mm.
    index: which one of an .npz with several; mask: its labels instead of the image."""
    path = Path(path)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        array, _, spacing = read_nifti(path)
        return array, spacing
    arrays = _npz(path, path.stat().st_mtime_ns)
    array = _pick(path, arrays, MASK_KEYS if mask and _has(arrays, MASK_KEYS) else IMAGE_KEYS)
    array = array if index is None else array[index]
    if array.ndim != 3 or not array.size or array.dtype.kind not in "buif":
        found = f"{len(array)} volumes" if array.ndim == 4 else f"{array.dtype} {array.shape}"
        raise ValueError(f"{path}: expected one volume of numbers (D, H, W), found {found}; give one")
    axes = str(arrays.get("axes", "SAR")).upper()
    steps = np.ravel(arrays.get("spacing_mm", 1.0)).astype(float)
    world = ["RLAPSI".find(letter) // 2 for letter in axes]
    if sorted(world) != [0, 1, 2] or steps.size not in (1, 3) or not (steps > 0).all():
        raise ValueError(f"{path}: expected axes like 'RAS' and a positive spacing_mm (3,), found {axes!r} "
                         f"and {steps.tolist()}; save it again with those")
    affine = np.zeros((4, 4))
    affine[world, range(3)] = np.where([a in "RAS" for a in axes], steps, -steps)
    affine[3, 3] = 1
    array, _, spacing = to_ras(array, affine)
    return array, spacing


@functools.lru_cache(maxsize=1)  # the volumes of an .npz are asked for in a row
def _npz(path, _):
    """dict of the arrays of an .npz, or of an .npy as {"image": array}; _: its time of change."""
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            return {"image": stored}
        with stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected plain arrays, found {type(error).__name__}: "
                         f"{' '.join(str(error).split())}; save it again with np.save or np.savez") from None


def _has(arrays, keys):
    return next((key for key in keys if key in arrays), None)


def _pick(path, arrays, keys):
    key = _has(arrays, keys)
    if key is None:
        raise ValueError(f"{path}: expected an array called {' or '.join(keys)}, found "
                         f"{', '.join(arrays) or 'nothing'}; save it again under that name")
    return arrays[key]


def _cases(root, masked):
    """The volumes below root, sorted: namespaces of name, subject, image, mask and, in an .npz, index."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: not found; give a folder of .nii, .nii.gz, .npy or .npz files")
    images, masks = {}, {}
    for file in volume_files(root):
        name = SUFFIX.sub("", file.relative_to(root if root.is_dir() else root.parent).as_posix())
        *folders, stem = name.split("/")
        role = [found[1].lower() for found in (*map(FOLDER.fullmatch, folders), ROLE.search(stem)) if found]
        key = "/".join([*(f for f in folders if not FOLDER.fullmatch(f)), ROLE.sub("", stem)])
        kind = masks if role and role[-1] not in ("image", "img") else images
        if key in kind:
            raise ValueError(f"{file}: expected one file for {key}, found {kind[key]} too; remove one")
        kind[key] = file
    if not images:
        raise ValueError(f"{root}: expected .nii, .nii.gz, .npy or .npz images, found none; give another "
                         "folder")
    if masked and (alone := sorted(masks.keys() - images.keys())):
        raise ValueError(f"{masks[alone[0]]}: expected an image called {alone[0]} for this mask, found none; "
                         "name both alike")
    cases = []
    for key, file in sorted(images.items()):
        mask, several, subjects = masks.get(key), False, [key]
        if file.suffix.lower() == ".npz":
            arrays = _npz(file, file.stat().st_mtime_ns)
            shape, own = _pick(file, arrays, IMAGE_KEYS).shape, _has(arrays, MASK_KEYS)
            several = len(shape) == 4
            mask = file if own else None if several else mask  # a mask file holds one volume
            if several:
                subjects = arrays.get("subject", [f"{key}/{i}" for i in range(shape[0])])
                if len(subjects) != shape[0] or (own and len(arrays[own]) != shape[0]):
                    raise ValueError(f"{file}: expected {shape[0]} subjects and labels, one for each volume, "
                                     f"found {len(subjects)} and {len(arrays[own]) if own else 0}")
        cases += [SimpleNamespace(image=file, mask=mask, subject=str(who), index=i if several else None,
                                  name=f"{key}/{i}" if several else key) for i, who in enumerate(subjects)]
    if masked and (bare := [case for case in cases if case.mask is None]):
        raise ValueError(f"{bare[0].image}: expected a mask {bare[0].name}_mask beside it, found none "
                         f"({len(bare)} of {len(cases)} images lack one); add it, or set labels=0")
    return cases


def volume_files(root):
    """Sorted paths of the volume files below a folder, hidden ones left out; a file stands for itself."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and not any(
        part.startswith(".") for part in p.relative_to(root).parts))
    return [file for file in files if SUFFIX.search(file.name)]


def _split(subject, val, test):
    digest = hashlib.blake2b(f"split {subject}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "val" if place < val else "test" if place < val + test else "train"


def _checked_image(path, image):
    image = image.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(image)):
        raise ValueError(f"{path}: expected finite values, found {bad:,} NaN or infinite ones; set them to "
                         "the background's value and save it again")
    return to_unit_range(image, path)


def _checked_mask(case, shape, labels):
    """uint8 of the shape of its image, labels 0..labels; the file may store them as floats."""
    mask, _ = read_volume(case.mask, case.index, mask=True)
    if mask.shape != shape:
        raise ValueError(f"{case.mask}: expected a mask of {_times(shape)} voxels like {case.image.name}, "
                         f"found {_times(mask.shape)}; draw it on that image")
    wrong = mask[~np.isin(mask, np.arange(labels + 1))]
    if wrong.size:
        raise ValueError(f"{case.mask}: expected labels 0..{labels}, found {wrong[0]:g} and the like in "
                         f"{wrong.size:,} voxels; change the mask, or the number of labels")
    return mask.astype(np.uint8)


def _fitted(volume, shape, factor):
    """Cut or zero-pad around the middle to shape * factor -> (D, factor, H, factor, W, factor)."""
    for axis, n in enumerate(shape):
        extra = n * factor - volume.shape[axis]
        before = abs(extra) // 2
        if extra < 0:
            volume = np.take(volume, range(before, before + n * factor), axis)
        elif extra:
            volume = np.pad(volume, [(before, extra - before) if a == axis else (0, 0) for a in range(3)])
    return volume.reshape([k for n in shape for k in (n, factor)])


def _span(rows, digits):
    """'96x96x96', or 'AxBxC to DxExF', smallest and largest of each axis."""
    low, high = _times(np.min(rows, 0), digits), _times(np.max(rows, 0), digits)
    return low if low == high else f"{low} to {high}"


# ------------------------------------------------------------------------------------------------------------
# Commands

def check(root):
    """Read every volume file below root and print one line for each; returns the number of bad ones."""
    root, bad = Path(root), 0
    files = volume_files(root) if root.exists() else []
    if not files:
        raise ValueError(f"{root}: expected .nii, .nii.gz, .npy or .npz files, found none; give another "
                         "folder")
    for file in files:
        try:
            print(f"{file.relative_to(root) if root.is_dir() else file.name}: {_described(file)}")
        except (ValueError, OSError) as error:
            bad += 1
            print(f"BAD {error}")
    print(f"{len(files)} files, {bad} bad")
    return bad


def _described(file):
    note, index, mask = "", None, False
    if file.suffix.lower() == ".npz":
        arrays = _npz(file, file.stat().st_mtime_ns)
        mask = not _has(arrays, IMAGE_KEYS)
        shape = _pick(file, arrays, MASK_KEYS if mask else IMAGE_KEYS).shape
        index, note = (0, f", first of {shape[0]}") if len(shape) == 4 else (None, "")
    array, spacing = read_volume(file, index, mask)
    if not np.isfinite(array).all():
        raise ValueError(f"{file}: expected finite values, found NaN or infinite ones; replace them")
    text = f"{_times(array.shape)} of {_times(spacing, 2)} mm, {array.dtype}{note}, "
    values = np.unique(array)
    if len(values) > 10:
        return text + f"values {values[0]:g} to {values[-1]:g}"
    sizes = lesions(array > 0, spacing)[1]
    return text + (f"labels {', '.join(f'{v:g}' for v in values)}; components: {len(sizes)}, the largest "
                   f"{max(sizes, default=0):.1f} mm")


def preview(path="runs/preview_volumes.png", seeds=(17, 18, 50)):
    """Write a PNG: three planes through the largest lesion of each phantom. Returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = (((128, 160, 160), HEAD), ((96, 96, 96), CROP), ((32, 32, 32), HEAD), ((32, 32, 32), CROP))
    figure, panels = plt.subplots(len(rows), 3 * len(seeds), facecolor="black", gridspec_kw=dict(
        left=.005, right=.995, bottom=.005, top=.965, wspace=.03, hspace=.14), figsize=(18, 8.7))
    for (shape, fov), line in zip(rows, panels):
        for seed, three in zip(seeds, line.reshape(-1, 3)):
            image, mask = phantom(seed, shape, fov)
            spacing = np.divide(fov, shape)
            labels, sizes = lesions(mask, spacing)
            middle = np.argwhere(labels == sizes.argmax() + 1).mean(0).round().astype(int)
            for axis, panel in enumerate(three):
                tall, wide = (fov[a] / 2 for a in range(3) if a != axis)  # mm
                window, outline = (-wide, wide, -tall, tall), np.take(mask, middle[axis], axis)
                panel.imshow(np.take(image, middle[axis], axis), "gray", vmin=0, vmax=1, extent=window,
                             origin="lower")  # z or y grows upwards, x or y to the right
                panel.contour(outline, [.5], extent=window, colors="#ff4848", linewidths=1)
                panel.set(xlim=(-max(fov) / 2, max(fov) / 2), ylim=(-max(fov) / 2, max(fov) / 2))
                panel.set_axis_off()
            sizes = ", ".join(f"{d:.0f}" for d in sorted(sizes, reverse=True))
            three[1].set_title(f"voxels {_times(spacing, 2)} mm, lesions {sizes} mm", color="white")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="black")
    plt.close(figure)
    return path


USAGE = "usage: python -m data.volumes [preview [PNG]] | check FOLDER"


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr or with a bad file."""
    command, *rest = arguments or ["preview"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "preview" and len(rest) <= 1:
        print(f"wrote {preview(*rest)}")
    elif command == "check" and len(rest) == 1:
        return 2 if check(rest[0]) else 0
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
