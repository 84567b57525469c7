"""data/volumes.py: phantom, lesion counter, cache, NIfTI-1 against bytes written here, own folders."""
import gzip
import itertools
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import volumes

REPOSITORY = Path(__file__).resolve().parent.parent
Z32 = dict(shape=(32, 32, 32), fov=volumes.CROP)
SMALL = dict(train=5, val=2, test=3, shape=(12, 14, 13))


# Phantom

@pytest.fixture(scope="module")
def heads():
    """64 heads at 32^3: images and masks."""
    return tuple(np.stack(part) for part in zip(*(volumes.phantom(seed) for seed in range(64))))


def test_phantom_is_its_seed():
    for arguments in (dict(), Z32, dict(Z32, counts=(0, 0, 2, 1, 0, 1, 0))):
        (a, m), (b, n), (c, _) = (volumes.phantom(seed, **arguments) for seed in (7, 7, 8))
        assert a.tobytes() == b.tobytes() and m.tobytes() == n.tobytes() and not np.array_equal(a, c)
        assert a.dtype == np.float32 and a.min() == 0 and a.max() == 1 and a.shape == (32, 32, 32)
        assert m.dtype == np.uint8 and set(np.unique(m)) == {0, 1}


def test_a_seed_is_the_same_head_at_every_resolution():
    large, small = volumes.phantom(3, (64, 64, 64))[0], volumes.phantom(3)[0]
    shrunk = large.reshape(32, 2, 32, 2, 32, 2).mean((1, 3, 5))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > .95
    assert np.corrcoef(shrunk.ravel(), volumes.phantom(4)[0].ravel())[0, 1] < .9
    # CROP is the middle of the same head: 96 mm of 160 and 200 mm
    middle = volumes.phantom(3, (80, 100, 100))[0][16:64, 26:74, 26:74]
    crop = volumes.phantom(3, (48, 48, 48), volumes.CROP)[0]
    assert np.corrcoef(middle.ravel(), crop.ravel())[0, 1] > .95


def test_statistics(heads):
    images, masks = heads
    assert abs(images.mean() - .21) < .01 and abs(images.std() - .284) < .005
    assert abs((images ** 2).mean() - .125) < .005 and .0007 < masks.mean() < .0014
    floor = np.pi / 2 * images.std(0).mean()  # of a linear predictor that knows the mean volume
    assert .085 < floor < .105
    assert abs(np.pi / 2 * images.std() - .446) < .01


def test_anatomy_and_direction_of_the_axes(heads):
    mean = heads[0].mean(0)
    z, y = (np.arange(32) - 15.5) * 5, (np.arange(32) - 15.5) * 6.25
    low = mean[(z > -45) & (z < -30)][:, :, abs(y) < 20].mean((0, 2))
    assert low[10] > low[21] + .05  # the white core of the cerebellum: below and behind
    middle = mean[16:18, 15:17].mean((0, 1))  # along x
    assert middle[13] < middle[11] - .15 and middle[18] < middle[20] - .15  # a dark ventricle on either side
    assert mean[0].max() < .2 and mean[:, 0].max() < .2 and mean[:, :, 0].max() < .2  # air around
    assert mean[16, 15, 3:8].max() > mean[16, 15, 5:9].min() + .1  # bright scalp, dark skull


def test_lesions_are_whole_apart_and_not_centred_in_a_ventricle(monkeypatch):
    add, place, seen = volumes._add_lesions, volumes._place_lesions, []

    def spy_add(rng, tissue, homes, *rest):
        before = tissue.copy()
        mask = add(rng, tissue, homes, *rest)
        seen[-1] += (before, homes, tissue, mask)
        return mask

    def spy_place(*arguments):
        seen.append((place(*arguments),))
        return seen[-1][0]
    monkeypatch.setattr(volumes, "_add_lesions", spy_add)
    monkeypatch.setattr(volumes, "_place_lesions", spy_place)
    for seed in range(60):
        volumes.phantom(seed, **Z32)
    for placed, before, homes, after, mask in seen:
        assert len(placed) == len(volumes.lesions(mask, 3)[1]) > 0
        assert not set(np.unique(before[tuple(homes.T)])) & {volumes.VENTRICLE, volumes.AIR, volumes.SKULL}
        inner = np.zeros_like(mask)
        inner[1:-1, 1:-1, 1:-1] = mask[1:-1, 1:-1, 1:-1]
        assert np.array_equal(inner, mask)  # nothing on the outermost layer: none is cut
        assert set(np.unique(after[mask > 0])) <= {volumes.RIM, volumes.NECROSIS}
        assert not np.isin(after[mask == 0], (volumes.RIM, volumes.NECROSIS)).any()
    assert any((after == volumes.OEDEMA).any() for *_, after, _ in seen)


@pytest.mark.parametrize("counts", [(0, 0, 3, 2, 1, 1, 0), (0, 0, 0, 0, 0, 0, 1), (0,) * 7,
                                    (0, 0, 5, 5, 5, 4, 0)])
def test_requested_lesions_are_those_that_are_counted(counts):
    for seed in range(4):
        mask = volumes.phantom(seed, **Z32, counts=counts)[1]
        assert volumes.count_lesions(mask, 3.0).tolist() == list(counts)


def test_representable_bins_can_be_requested_and_others_are_refused():
    assert volumes.representable((32, 32, 32)).tolist() == [False] * 3 + [True] * 4
    assert volumes.representable((32, 32, 32), volumes.CROP).tolist() == [False] * 2 + [True] * 5
    assert volumes.representable((160, 200, 200)).all()
    assert volumes.representable((32,) * 3, (32.0,) * 3).tolist() == [True] * 6 + [False]  # too small a field
    for shape, fov in (((32,) * 3, volumes.HEAD), ((32,) * 3, volumes.CROP), ((48,) * 3, volumes.CROP)):
        for k, possible in enumerate(volumes.representable(shape, fov)):
            counts = np.eye(7, dtype=int)[k]
            if possible:
                mask = volumes.phantom(1, shape, fov, counts)[1]
                assert np.array_equal(volumes.count_lesions(mask, np.divide(fov, shape)), counts)
            else:
                with pytest.raises(ValueError, match="expected lesions of .*30-inf mm.* can hold"):
                    volumes.phantom(1, shape, fov, counts)
    with pytest.raises(ValueError, match="expected room for .*ask for fewer"):
        volumes.phantom(0, **Z32, counts=(0, 0, 0, 0, 0, 0, 9))


# Lesions

def flood(mask):
    """Components by a plain flood fill over 26 neighbours: a list of int (n, 3)."""
    left, parts = set(map(tuple, np.argwhere(mask))), []
    while left:
        todo, part = [min(left)], []
        left.remove(todo[0])
        while todo:
            part.append(todo.pop())
            for step in itertools.product((-1, 0, 1), repeat=3):
                other = tuple(np.add(part[-1], step))
                if other in left:
                    left.remove(other)
                    todo.append(other)
        parts.append(np.array(part))
    return parts


def longest(points):
    return np.linalg.norm(points[:, None] - points, axis=-1).max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [.02, .08, .2])
def test_lesions_against_flood_fill_and_all_pairs(seed, density):
    rng = np.random.default_rng(seed)
    mask = rng.random((11, 9, 10)) < density
    spacing = rng.uniform(.5, 4, 3)
    labels, diameters = volumes.lesions(mask, spacing)
    parts = flood(mask)
    assert labels.max() == len(parts) == len(diameters) and np.array_equal(labels > 0, mask)
    for k, part in enumerate(parts, 1):  # in the order of their first voxels
        assert (labels[tuple(part.T)] == k).all()
        assert diameters[k - 1] == pytest.approx(longest(part * spacing), abs=1e-6)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (3, .9, .9), (.5, 2, 1)])
def test_diameter_of_large_blobs_against_all_pairs(spacing):
    """More than 64 points, so the shortcut is used; spiky, hollow, flat and triangular ones too."""
    z, y, x = np.indices((16, 16, 16)) - 7.5
    r, noise = z*z + y*y + x*x, volumes._upsample(np.random.default_rng(0).standard_normal((6, 6, 6)),
                                                  [np.linspace(-80, 80, 16)] * 3)
    for mask in (r < 49, (30 < r) & (r < 54), abs(z) + abs(y) + abs(x) < 9, (abs(z) < 1) & (y > x), x > 5,
                 r < 40 * (1 + .6 * noise), (y > 0) & (2 * y + abs(x) < 15)):
        for part, found in zip(flood(mask), volumes.lesions(mask, spacing)[1], strict=True):
            assert found == pytest.approx(longest(part * spacing), abs=1e-6)


def test_planted_spheres():
    """8, 12, 17 and 25 mm at 1 mm, on voxel centres and off them."""
    for off in (0, .3):
        mask = np.zeros((40, 60, 120), np.uint8)
        for d, x in ((8, 10), (12, 30), (17, 55), (25, 90)):
            r = np.indices(mask.shape) - np.array([20, 30, x])[:, None, None, None] - off
            mask |= (r ** 2).sum(0) <= (d / 2) ** 2
        diameters = volumes.lesions(mask, 1)[1]
        assert np.all(np.abs(np.sort(diameters) - (8, 12, 17, 25)) < 1.2)
        assert volumes.count_lesions(mask, 1).tolist() == ([0, 0, 1, 1, 1, 1, 0])
    assert volumes.count_lesions(mask[::2, ::2, ::2], 2).sum() == 4


def test_bins_and_connection():
    mask = np.zeros((5, 5, 40), int)
    for at in ((0, 0, 0), (1, 1, 1), (2, 0, 10), (2, 0, 11), (4, 4, 20), (4, 4, 22)):
        mask[at] = 1  # a diagonal pair, a pair, and two that touch no one
    assert volumes.lesions(mask, 1)[1].tolist() == [pytest.approx(3 ** .5), 1, 0, 0]
    assert volumes.count_lesions(mask, (1, 1, 3)).tolist() == [2, 2, 0, 0, 0, 0, 0]  # 3.0 mm is in 3-6
    for x in range(30):  # 5 x 1.2 mm is 6 mm wherever it lies, not 5.999999999999998
        mask = np.zeros((1, 1, 40), bool)
        mask[..., x:x + 6] = True
        assert volumes.count_lesions(mask, 1.2).tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert volumes.size_bin([0, 2.9, 3, 6, 10, 15, 20, 29, 30, 99]).tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 6]
    assert volumes.count_lesions(np.zeros((4, 4, 4), bool), 1).tolist() == [0] * 7
    with pytest.raises(ValueError, match="expected bool or integers"):
        volumes.lesions(np.full((4, 4, 4), .3), 1)
    with pytest.raises(ValueError, match=r"found uint8 \(4, 4\)"):
        volumes.lesions(np.zeros((4, 4), np.uint8), 1)


@pytest.mark.parametrize("density, limit", [(1, 60), (.5, 40)])
def test_memory_of_huge_lesions_is_bounded(density, limit):
    mask = np.random.default_rng(0).random((72, 72, 72)) < density
    tracemalloc.start()
    volumes.lesions(mask, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit * 2 ** 20


# The cached set

def test_phantoms(tmp_path, monkeypatch):
    data = volumes.phantoms(**SMALL, cache=tmp_path)
    spacing = np.divide(volumes.HEAD, SMALL["shape"])
    for split, first in volumes.SEEDS.items():
        part = getattr(data, split)
        assert part.images.shape == part.masks.shape == (SMALL[split], 12, 14, 13)
        assert part.images.dtype == np.float16 and part.masks.dtype == np.uint8
        assert isinstance(part.images, np.memmap) and not part.images.flags.writeable
        for i in range(SMALL[split]):
            image, mask = volumes.phantom(first + i, SMALL["shape"])
            assert np.array_equal(part.images[i], image.astype(np.float16))
            assert np.array_equal(part.masks[i], mask)
            assert part.counts[i].tolist() == volumes.count_lesions(part.masks[i], part.spacing[i]).tolist()
        assert np.allclose(part.spacing, spacing)
        assert part.names == [str(first + i) for i in range(SMALL[split])]
    names = data.train.names + data.val.names + data.test.names
    assert len(set(names)) == len(names) == 10
    assert "5/2/3 volumes 12x14x13 of 13.33x14.29x15.38 mm" in data.facts
    assert "not representable: lesions of 0-3, 3-6, 6-10, 10-15, 15-20, 20-30 mm" in data.facts
    more = volumes.phantoms(**dict(SMALL, train=7), cache=tmp_path)
    assert np.array_equal(more.train.images[:5], data.train.images)  # independent of N
    monkeypatch.setattr(volumes, "phantom", None)  # from here on it may not draw
    again = volumes.phantoms(**SMALL, cache=tmp_path)
    assert np.array_equal(again.test.images, data.test.images) and again.facts == data.facts
    for change in (dict(shape=(12, 14, 14)), dict(fov=volumes.CROP), dict(val=3)):
        with pytest.raises(TypeError):
            volumes.phantoms(**dict(SMALL, **change), cache=tmp_path)
    monkeypatch.setattr(volumes, "RECIPE", volumes.RECIPE + 1)
    with pytest.raises(TypeError):
        volumes.phantoms(**SMALL, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the two good sets, and nothing half done


@pytest.mark.parametrize("change", [dict(train=0), dict(train=1_000_001), dict(shape=(4, 32, 32))])
def test_phantoms_refuse(tmp_path, change):
    with pytest.raises(ValueError, match="expected 1 to 1,000,000 volumes"):
        volumes.phantoms(**dict(SMALL, **change), cache=tmp_path)


def test_a_kill_in_the_middle_leaves_no_half_set(tmp_path, monkeypatch):
    draw, calls = volumes.phantom, []

    def deadly(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(*arguments)
    monkeypatch.setattr(volumes, "phantom", deadly)
    child = os.fork()
    if child == 0:
        try:
            volumes.phantoms(**SMALL, cache=tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [p.name.endswith(".tmp") for p in left] == [True]  # hidden, and not taken for a set
    monkeypatch.setattr(volumes, "phantom", draw)
    os.utime(left[0], (1, 1))  # more than a day old: cleared away
    data = volumes.phantoms(**SMALL, cache=tmp_path)
    assert np.array_equal(data.val.images[1], draw(1_000_001, SMALL["shape"])[0].astype(np.float16))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["train_images.npy", "val_masks.npy", "test_counts.npy", "index.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, name, harm):
    volumes.phantoms(**SMALL, cache=tmp_path)
    path, = tmp_path.glob(f"*/{name}")
    good = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(good[:-5])
    volumes.phantoms(**SMALL, cache=tmp_path)
    assert path.read_bytes() == good and len(list(tmp_path.iterdir())) == 1


# NIfTI-1

CODES = dict(u1=2, i2=4, i4=8, f4=16, f8=64, i1=256, u2=512, u4=768, i8=1024, u8=1280)


def nifti(array, order="<", slope=1.0, inter=0.0, sform=None, qform=None, pixdim=(1, 1, 1, 1), start=352,
          code=None):
    """The bytes of a file, written field by field: array (X, Y, Z, ...), qform (b, c, d, x, y, z)."""
    head = bytearray(start)

    def put(offset, form, *values):
        struct.pack_into(order + form, head, offset, *values)
    put(0, "i", 348)
    put(40, "8h", array.ndim, *array.shape, *[1] * (7 - array.ndim))
    put(70, "2h", CODES[array.dtype.str[1:]] if code is None else code, 8 * array.itemsize)
    put(76, "8f", *pixdim, *[1] * (8 - len(pixdim)))
    put(108, "3f", start, slope, inter)
    put(123, "B", 2)
    put(252, "2h", qform is not None, 0 if sform is None else 2)
    if qform is not None:
        put(256, "6f", *qform)
    if sform is not None:
        put(280, "12f", *np.ravel(sform[:3]))
    put(344, "4s", b"n+1\0")
    return bytes(head) + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")


def ramp(kind="u1", shape=(3, 4, 5)):
    return np.arange(np.prod(shape)).reshape(shape).astype(kind)


RAS = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"])
def test_every_type_and_byte_order(tmp_path, kind, order):
    path, array = tmp_path / "a.nii", ramp(kind) + np.array(3, kind)
    path.write_bytes(nifti(array, order, sform=RAS, pixdim=(1, 2, 3, 4)))
    found, affine, spacing = volumes.read_nifti(path)
    assert found.dtype == np.dtype(kind) and found.dtype.isnative and np.array_equal(found, array.T)
    assert found.shape == (5, 4, 3) and spacing.tolist() == [4, 3, 2] and np.array_equal(affine, RAS)
    raw, _, zooms = volumes.read_nifti(path, raw=True)
    assert raw.dtype == np.float64 and np.array_equal(raw, array) and zooms.tolist() == [2, 3, 4]


@pytest.mark.parametrize("slope, inter, wanted", [(2, -1, "scaled"), (0, 5, "plain"), (np.nan, 5, "plain"),
                                                  (np.inf, 5, "plain"), (1, 0, "plain"), (1, 7, "scaled"),
                                                  (-.5, np.nan, "scaled")])
def test_scaling(tmp_path, slope, inter, wanted):
    path, array = tmp_path / "a.nii", ramp("i2")
    path.write_bytes(nifti(array, ">", slope, inter, sform=RAS))
    expected = array * slope + np.nan_to_num(inter) if wanted == "scaled" else array
    found = volumes.read_nifti(path)[0]
    assert np.array_equal(found, expected.T)
    assert np.array_equal(volumes.read_nifti(path, raw=True)[0], expected)
    assert found.dtype == (np.float32 if wanted == "scaled" else np.int16)


def test_gzip_is_told_by_content_and_the_data_may_begin_later(tmp_path):
    data = nifti(ramp("f4"), sform=RAS, start=480)
    packed = gzip.compress(data)
    for name, content in (("a.nii.gz", packed), ("b.nii", packed), ("c.nii.gz", data)):
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(volumes.read_nifti(tmp_path / name)[0], ramp("f4").T)


def test_qform(tmp_path):
    """90 degrees about z (b = c = 0, d = sin 45): x runs to +y, y to -x; then the other hand."""
    half = np.sqrt(.5)
    for qfac in (1, -1, 0):
        path = tmp_path / "a.nii"
        path.write_bytes(nifti(ramp("i2"), qform=(0, 0, half, 10, 20, 30), pixdim=(qfac, 2, 3, 4)))
        affine = volumes.read_nifti(path, raw=True)[1]
        hand = -4 if qfac < 0 else 4
        assert np.allclose(affine, [[0, -3, 0, 10], [2, 0, 0, 20], [0, 0, hand, 30], [0, 0, 0, 1]], atol=1e-6)
        found, turned, spacing = volumes.read_nifti(path)
        expected = ramp("i2").transpose(2, 0, 1)[:, :, ::-1]  # (z, x, y): +y grows with x, +x falls with y
        assert np.array_equal(found, expected[::-1] if qfac < 0 else expected)
        assert np.allclose(spacing, (4, 2, 3)) and (np.diag(turned) > 0).all()
    path.write_bytes(nifti(ramp("i2"), sform=RAS, qform=(0, 0, half, 10, 20, 30)))
    assert np.array_equal(volumes.read_nifti(path)[1], RAS)  # sform first
    path.write_bytes(nifti(ramp("i2"), pixdim=(1, 2, 3, 4)))
    affine = volumes.read_nifti(path, raw=True)[1]  # neither: x to the left, 0 in the middle
    assert np.allclose(affine, [[-2, 0, 0, 2], [0, 3, 0, -4.5], [0, 0, 4, -8], [0, 0, 0, 1]])


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_orientation_becomes_ras(tmp_path, axes, signs):
    """All 48, tilted a little: every voxel keeps its place in the world, and the axes run to R, A and S."""
    shape, steps = (3, 4, 5), (2.0, 3.0, 4.0)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for j in range(3):  # stored axis j runs along world axis axes[j]
        affine[axes[j], j] = signs[j] * steps[j]
    tilt = volumes._rotation((.3, -.2, .25))
    affine[:3, :3], affine[:3, 3] = tilt @ affine[:3, :3], (7, -5, 11)
    index = np.indices(shape).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    for component in range(3):
        path = tmp_path / "a.nii"
        path.write_bytes(nifti(world[component].reshape(shape), sform=affine))
        found, turned, spacing = volumes.read_nifti(path)
        z, y, x = np.indices(found.shape).reshape(3, -1)
        place = turned[:3, :3] @ np.stack([x, y, z]) + turned[:3, 3:]
        assert np.allclose(place[component], found.ravel(), atol=1e-4)
    assert (np.diag(turned)[:3] > 0).all() and found.flags.c_contiguous
    assert np.allclose(spacing[::-1], [steps[axes.index(k)] for k in range(3)])


@pytest.mark.parametrize("name", ["a.nii", "deep/er/a.nii.gz"])
@pytest.mark.parametrize("kind", [np.float32, np.uint8, np.int16, bool, np.float16, np.float64])
def test_write_and_read_again(tmp_path, name, kind):
    volume = (ramp("i2", (2, 3, 4)) % 2 if kind is bool else ramp("i2", (2, 3, 4))).astype(kind)
    affine = np.array([[.9, .1, 0, -8], [-.1, .9, 0, 4], [0, 0, 3, 2.5], [0, 0, 0, 1]])
    volumes.write_nifti(tmp_path / name, volume, affine=affine)
    found, turned, spacing = volumes.read_nifti(tmp_path / name)
    assert found.dtype == {bool: np.uint8, np.float16: np.float32, np.float64: np.float32}.get(kind, kind)
    assert np.array_equal(found, volume) and np.allclose(turned, affine, atol=1e-6)
    volumes.write_nifti(tmp_path / name, volume, (3, 2, 1))
    _, affine, spacing = volumes.read_nifti(tmp_path / name)
    assert spacing.tolist() == [3, 2, 1]
    assert np.array_equal(affine, [[1, 0, 0, -1.5], [0, 2, 0, -2], [0, 0, 3, -1.5], [0, 0, 0, 1]])
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == ["a.nii.gz" if "gz" in name else "a.nii"]


def test_write_refuses_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii"
    volumes.write_nifti(path, np.ones((2, 2, 2), np.uint8))
    before = path.read_bytes()
    for wrong in (np.ones((2, 2, 2), np.int64), np.ones((2, 2), np.uint8), np.ones((2, 2, 2), complex)):
        with pytest.raises(ValueError, match="a.nii: expected float32, uint8 or int16"):
            volumes.write_nifti(path, wrong)
    with pytest.raises(ValueError, match="a name in .nii or .nii.gz"):
        volumes.write_nifti(tmp_path / "a.img", np.ones((2, 2, 2), np.uint8))

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(volumes.os, "replace", full)
    with pytest.raises(OSError):
        volumes.write_nifti(path, np.zeros((2, 2, 2), np.uint8))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_against_nibabel(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    half, tilted = np.sqrt(.5), np.array([[-.9, .1, .2, 5], [.1, 1.1, 0, 6], [0, .2, 3, 7], [0, 0, 0, 1]])
    cases = [dict(order=order, slope=slope, inter=inter, **space)
             for order in "<>" for slope, inter in ((1, 0), (0, 0), (.37, -12.5))
             for space in (dict(sform=tilted), dict(qform=(.1, .2, half, 1, 2, 3), pixdim=(-1, .9, 1.1, 3)),
                           dict(pixdim=(1, 2, 3, 4)))]
    for kind, case in itertools.product(("u1", "i2", "f4", "u2"), cases):
        path = tmp_path / "a.nii"
        path.write_bytes(nifti(rng.integers(0, 200, (3, 4, 5)).astype(kind), **case))
        raw, affine, zooms = volumes.read_nifti(path, raw=True)
        theirs = nibabel.load(path)
        assert np.array_equal(raw, theirs.get_fdata()) and np.allclose(affine, theirs.affine, atol=1e-6)
        assert tuple(zooms) == tuple(map(float, theirs.header.get_zooms()))
        turned = nibabel.as_closest_canonical(theirs)
        found, affine, _ = volumes.read_nifti(path)
        assert np.allclose(found, turned.get_fdata().T, rtol=1e-6)
        assert np.allclose(affine, turned.affine, atol=1e-5)
    for kind in (np.uint8, np.int16, np.float32):
        volume = rng.integers(0, 200, (3, 4, 5)).astype(kind)
        volumes.write_nifti(tmp_path / "b.nii.gz", volume, (3, 2, 1))
        theirs = nibabel.load(tmp_path / "b.nii.gz")
        assert np.array_equal(np.asarray(theirs.dataobj), volume.T) and theirs.get_data_dtype() == kind
        assert theirs.header.get_zooms() == (1, 2, 3) and nibabel.aff2axcodes(theirs.affine) == tuple("RAS")


GOOD = nifti(ramp("f4"), sform=RAS)


@pytest.mark.parametrize("content, message", [
    (gzip.compress(np.random.default_rng(0).bytes(5000))[:2000], "a whole gzip file, found one that is cut"),
    (gzip.compress(GOOD)[:-12] + bytes(12), "expected a whole gzip file"),
    (b"", "expected a NIfTI-1 file, found 0 bytes"),
    (b"\x89PNG" + bytes(400), "expected a NIfTI-1 file, found 404 bytes that begin with 89504e47"),
    (GOOD[:200], "expected a NIfTI-1 file, found 200 bytes"),
    (GOOD[:344] + b"ni1\0" + GOOD[348:], "half of an .hdr/.img pair"),
    (struct.pack("<i", 540) + b"n+2\0" + bytes(540), "found NIfTI-2"),
    (GOOD[:-3], "expected 240 bytes of voxels .3x4x5 f4., found 237; the file is cut off"),
    (nifti(ramp("u1", (2, 2, 2, 6)), sform=RAS), r"expected one volume, found 6 \(2x2x2x6\)"),
    (nifti(ramp("u1", (4, 3)), sform=RAS), "expected three axes, found 4x3"),
    (nifti(ramp(), sform=RAS, code=128), "found NIfTI data type 128"),
    (GOOD[:40] + struct.pack("<h", 9) + GOOD[42:], "in 1 to 7 axes"),
    (GOOD[:42] + struct.pack("<h", -3) + GOOD[44:], "in 1 to 7 axes"),
    (nifti(ramp(), sform=np.zeros((4, 4))), "expected an affine that can be inverted"),
    (nifti(ramp(), sform=np.full((4, 4), np.nan)), "expected an affine that can be inverted"),
])
def test_nifti_refuses(tmp_path, content, message):
    path = tmp_path / "bad.nii.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.nii.gz: .*{message}") as error:
        volumes.read_nifti(path)
    assert "\n" not in str(error.value)


def test_a_fourth_axis_of_one_is_no_trouble(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti(ramp("u1", (3, 4, 5, 1)), sform=RAS))
    assert volumes.read_nifti(tmp_path / "a.nii")[0].shape == (5, 4, 3)
    with pytest.raises(FileNotFoundError):
        volumes.read_nifti(tmp_path / "none.nii")


# Own folders

def blob(seed, shape=(12, 14, 16)):
    """An image of noise and a mask of one box: (D, H, W)."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    mask[4:7, 5:9, 6:8] = 1
    return (100 * rng.random(shape) + 500.0 * mask).astype(np.float32), mask


NAMES = ("case{:03}.nii.gz", "case{:03}_mask.nii.gz")


def fill(root, n=12, spacing=(2, 1, 1), names=NAMES, shape=(12, 14, 16)):
    for i in range(n):
        for name, volume in zip(names, blob(i, shape)):
            path = root / name.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith(".npy"):
                np.save(path, volume)
            else:
                volumes.write_nifti(path, volume, spacing)
    return root


def everything(data):
    """name -> (image, mask or None, counts, spacing) over all splits."""
    return {name: (part.images[i], None if part.masks is None else part.masks[i],
                   None if part.counts is None else part.counts[i].tolist(), part.spacing[i].tolist())
            for part in (data.train, data.val, data.test) for i, name in enumerate(part.names)}


OPTIONS = dict(val=.3, test=.2)


@pytest.mark.parametrize("names", [NAMES, ("c{:03}.nii", "c{:03}-SEG.nii.gz"),
                                   ("images/c{:03}.nii", "masks/c{:03}.nii"),
                                   ("imagesTr/c_{:03}.nii", "labelsTr/c_{:03}.nii"),
                                   ("p{:03}/t1_image.npy", "p{:03}/t1_label.npy"),
                                   ("site{:03}/images/t1.nii", "site{:03}/labels/t1.nii")])
def test_names_of_images_and_masks(tmp_path, names):
    root = fill(tmp_path / "own", names=names)
    data = volumes.load_folder(root, (12, 14, 16), cache=tmp_path / "c", **OPTIONS)
    found = everything(data)
    assert len(found) == 12
    for name, (image, mask, counts, spacing) in found.items():
        raw, wanted = blob(int("".join(c for c in name.replace("t1", "") if c.isdigit())))
        low, high = np.percentile(raw, (.1, 99.9))
        assert np.abs(image - np.clip((raw - low) / (high - low), 0, 1)).max() < 1e-3  # float16
        assert np.array_equal(mask, wanted)
        steps = (1, 1, 1) if "npy" in names[0] else (2, 1, 1)
        assert spacing == list(steps) and counts == volumes.count_lesions(wanted, steps).tolist()
    assert "12x14x16 voxels of" in data.facts and "lost voxels" not in data.facts


def test_split_by_subject_is_stable(tmp_path):
    root = fill(tmp_path / "own", 24, names=("p{:03}_visit1.npy", "p{:03}_visit1_mask.npy"))
    fill(root, 24, names=("p{:03}_visit2.npy", "p{:03}_visit2_mask.npy"))
    def splits(**change):
        data = volumes.load_folder(root, (8, 8, 8), **dict(OPTIONS, cache=tmp_path / "c", **change))
        return {name: split for split in volumes.SPLITS for name in getattr(data, split).names}

    split = splits()
    assert len(split) == 48 and set(split.values()) == set(volumes.SPLITS)
    assert all(split[n] == split[n.replace("visit1", "visit2")] for n in split)  # a patient is in one split
    for path in sorted(root.glob("*"))[:40]:
        path.unlink()
    assert splits().items() <= split.items()  # fewer files, the same places
    # The literal pins the split: a checkpoint of today must not meet its train volumes in tomorrow's test.
    assert [n for n in range(40) if volumes._split(f"sub-{n:02}", .1, .1) == "val"] == [2, 12, 23, 25, 35]
    with pytest.raises(ValueError, match="for train and val, found 0 and 28; .*the same match of 'p' are one"):
        splits(subject="p", val=1, test=0)
    finer = splits(subject=r"p\d+_visit\d")
    assert any(finer[n] != finer[n.replace("visit1", "visit2")] for n in finer)


def test_factor_cuts_and_pads(tmp_path):
    root = fill(tmp_path / "own", spacing=(2, 1, 1))
    data = volumes.load_folder(root, (8, 5, 8), factor=2, cache=tmp_path / "c", **OPTIONS)
    for name, (image, mask, counts, spacing) in everything(data).items():
        raw, wanted = blob(int(name[-3:]))
        raw = volumes.to_unit_range(raw)
        # D 12 -> 16 with two voxels of air on both sides, H 14 -> 10 without two on both sides, W 16 as it is
        raw, wanted = (np.pad(v[:, 2:12], ((2, 2), (0, 0), (0, 0))) for v in (raw, wanted))
        parts = raw.reshape(8, 2, 5, 2, 8, 2)
        assert np.abs(image - parts.mean((1, 3, 5))).max() < 1e-3
        assert np.array_equal(mask, wanted.reshape(8, 2, 5, 2, 8, 2).max((1, 3, 5)))
        assert spacing == [4, 2, 2] and counts == volumes.count_lesions(mask, (4, 2, 2)).tolist()
    for text in ("found 12x14x16 voxels of 2.00x1.00x1.00 mm", "mean of 2^3 voxels (masks: largest label)",
                 "middle cut or padded to 8x5x8"):
        assert text in data.facts
    cut = volumes.load_folder(root, (2, 4, 4), cache=tmp_path / "c", **OPTIONS)
    assert "12 masks lost voxels at the border" in cut.facts


def test_npz(tmp_path):
    """The arrays point to R, A, S: (N, X, Y, Z). One file, several volumes, subjects and labels."""
    images, masks = (np.stack(v) for v in zip(*(blob(i) for i in range(12))))
    arrays = dict(volumes=images.transpose(0, 3, 2, 1), labels=2 * masks.transpose(0, 3, 2, 1),
                  subject=np.array([f"sub-{i // 2:02}" for i in range(12)]), spacing_mm=np.array([1, 2, 3.]))
    np.savez(tmp_path / "a.npz", **arrays, axes="RAS")
    data = volumes.load_folder(tmp_path / "a.npz", (12, 14, 16), labels=2, cache=tmp_path / "c", **OPTIONS)
    for name, (image, mask, counts, spacing) in everything(data).items():
        i = int(name.removeprefix("a/"))
        assert np.array_equal(mask, 2 * masks[i]) and spacing == [3, 2, 1]
        assert np.abs(image - volumes.to_unit_range(images[i])).max() < 1e-3
        assert f"a/{i ^ 1}" in next(s for s in (data.train, data.val, data.test) if name in s.names).names
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "set04.npz", volumes=images, labels=masks)  # no subject: each on its own
    assert volumes.load_folder(tmp_path / "in", (8, 8, 8), cache=tmp_path / "c", **OPTIONS).val.names
    np.savez(tmp_path / "in" / "set04.npz", volumes=images)
    volumes.write_nifti(tmp_path / "in" / "set04_mask.nii", masks[0])
    with pytest.raises(ValueError, match=r"expected a mask set04/0_mask.*\(12 of 12"):  # not one for all
        volumes.load_folder(tmp_path / "in", (8, 8, 8), cache=tmp_path / "c", **OPTIONS)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    np.savez(tmp_path / "in" / "b.npz", **arrays, axes="LPS")
    turned = volumes.read_volume(tmp_path / "in" / "b.npz", 3)[0]
    assert np.array_equal(turned, images[3][:, ::-1, ::-1])
    with pytest.raises(ValueError, match="b.npz: expected one volume .*found 12 volumes; give one"):
        volumes.read_volume(tmp_path / "in" / "b.npz")
    np.savez(tmp_path / "in" / "b.npz", **arrays, axes="RAX")
    with pytest.raises(ValueError, match="b.npz: expected axes like 'RAS'"):
        volumes.load_folder(tmp_path / "in", (8, 8, 8), labels=2, cache=tmp_path / "c", **OPTIONS)
    np.savez(tmp_path / "in" / "b.npz", **dict(arrays, labels=masks[:3]))
    with pytest.raises(ValueError, match="b.npz: expected 12 subjects and labels.*found 12 and 3"):
        volumes.load_folder(tmp_path / "in", (8, 8, 8), cache=tmp_path / "c")
    np.savez(tmp_path / "in" / "b.npz", pictures=images)
    with pytest.raises(ValueError, match="b.npz: expected an array called volumes or volume.*found pictures"):
        volumes.load_folder(tmp_path / "in", (8, 8, 8), cache=tmp_path / "c")


def test_without_masks_and_cached(tmp_path, monkeypatch):
    root = fill(tmp_path / "own")
    for path in list(root.glob("*_mask*"))[:3]:
        path.unlink()
    data = volumes.load_folder(root, (8, 8, 8), labels=0, cache=tmp_path / "c", **OPTIONS)
    assert data.train.masks is None and data.val.counts is None and len(everything(data)) == 12
    read, seen = volumes.read_volume, []
    monkeypatch.setattr(volumes, "read_volume", lambda *a, **k: seen.append(a) or read(*a, **k))
    again = volumes.load_folder(root, (8, 8, 8), labels=0, cache=tmp_path / "c", **OPTIONS)
    assert not seen and again.facts == data.facts and isinstance(again.train.images, np.memmap)
    volumes.write_nifti(root / "case003.nii.gz", blob(99)[0])  # another file under the old name
    volumes.load_folder(root, (8, 8, 8), labels=0, cache=tmp_path / "c", **OPTIONS)
    assert len(seen) == 12


def test_an_empty_test_split_is_no_trouble(tmp_path):
    data = volumes.load_folder(fill(tmp_path / "own"), (8, 8, 8), val=.4, test=0, cache=tmp_path / "c")
    assert data.test.images.shape == data.test.masks.shape == (0, 8, 8, 8) and data.test.names == []


def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path):
    peaks = []
    for n in (4, 40):
        root = fill(tmp_path / f"own{n}", n, names=("c{:03}.npy", "c{:03}_mask.npy"), shape=(32, 32, 32))
        volumes.load_folder(root, (32, 32, 32), val=.5, test=0, cache=tmp_path / "warm")
        tracemalloc.start()
        data = volumes.load_folder(root, (32, 32, 32), val=.5, test=0, cache=tmp_path / "c")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(everything(data)) == n
    # 40 volumes of float32 are 5.2 MB, one is 131 kB
    assert peaks[1] < 1.1 * peaks[0] + 100_000, peaks


def spoil(root, what):
    image, mask = blob(5)
    if what == "cut":
        (root / "case005.nii.gz").write_bytes((root / "case005.nii.gz").read_bytes()[:-100])
    elif what == "other":
        (root / "case005.nii.gz").write_bytes(b"DICM" + bytes(999))
    elif what == "shape":
        volumes.write_nifti(root / "case005_mask.nii.gz", mask[:, :-1])
    elif what == "nan":
        image[1, 2, 3:5] = np.nan, np.inf
        volumes.write_nifti(root / "case005.nii.gz", image)
    elif what == "4d":
        (root / "case005.nii.gz").write_bytes(nifti(ramp("u1", (4, 4, 4, 7)), sform=RAS))
    elif what == "label":
        volumes.write_nifti(root / "case005_mask.nii.gz", mask * 3)
    elif what == "negative":
        volumes.write_nifti(root / "case005_mask.nii.gz", -mask.astype(np.int16))
    elif what == "half":
        volumes.write_nifti(root / "case005_mask.nii.gz", mask * np.float32(.5))
    elif what == "unmasked":
        (root / "case005_mask.nii.gz").unlink()
    elif what == "alone":
        (root / "case005.nii.gz").unlink()
    elif what == "twice":
        np.save(root / "case005.npy", image)
    elif what == "constant":
        volumes.write_nifti(root / "case005.nii.gz", np.full_like(image, 4))
    elif what == "pickle":
        (root / "case005.nii.gz").unlink()
        np.save(root / "case005.npy", np.array([{}], object))
    elif what == "empty":
        for path in root.iterdir():
            path.rename(path.with_name(f".{path.name}"))  # hidden files do not count


@pytest.mark.parametrize("what, message", [
    ("cut", "case005.nii.gz: expected a whole gzip file"),
    ("other", "case005.nii.gz: expected a NIfTI-1 file"),
    ("shape", "case005_mask.nii.gz: expected a mask of 12x14x16 voxels like case005.nii.gz, found 12x13x16"),
    ("nan", "case005.nii.gz: expected finite values, found 2 NaN or infinite"),
    ("4d", "case005.nii.gz: expected one volume, found 7"),
    ("label", r"case005_mask.nii.gz: expected labels 0..1, found 3 .*24 voxels"),
    ("negative", "case005_mask.nii.gz: expected labels 0..1, found -1"),
    ("half", "case005_mask.nii.gz: expected labels 0..1, found 0.5"),
    ("unmasked", r"case005.nii.gz: expected a mask case005_mask beside it, found none \(1 of 12"),
    ("alone", "case005_mask.nii.gz: expected an image called case005"),
    ("twice", "case005.*: expected one file for case005"), ("constant", "case005.nii.gz: expected an image"),
    ("pickle", "case005.npy: expected plain arrays"),
    ("empty", "own: expected .nii, .nii.gz, .npy or .npz images")])
def test_folder_refuses(tmp_path, what, message):
    root = fill(tmp_path / "own")
    spoil(root, what)
    with pytest.raises(ValueError, match=message) as error:
        volumes.load_folder(root, (8, 8, 8), cache=tmp_path / "c", **OPTIONS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())  # nothing half done


def test_a_missing_folder_and_impossible_settings(tmp_path):
    for wrong in (dict(factor=0), dict(labels=300), dict(val=.7, test=.5), dict(val=-.1)):
        with pytest.raises(ValueError, match="expected factor >= 1, labels 0..255"):
            volumes.load_folder(tmp_path, (8, 8, 8), cache=tmp_path / "c", **wrong)
    with pytest.raises(FileNotFoundError, match="nowhere: not found; give a folder"):
        volumes.load_folder(tmp_path / "nowhere", (8, 8, 8), cache=tmp_path / "c")


# Commands

def test_check_prints_a_line_for_every_file(tmp_path, capsys):
    root = fill(tmp_path / "own", 2)
    np.savez(root / "many.npz", volumes=np.stack([blob(i)[0] for i in range(3)]))
    assert volumes.main(["check", str(root)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("case000.nii.gz: 12x14x16 of 2.00x1.00x1.00 mm, float32, values 0.")
    assert out[1].endswith("1.00 mm, uint8, labels 0, 1; components: 1, the largest 5.1 mm")
    assert "many.npz: 12x14x16 of 1.00x1.00x1.00 mm, float32, first of 3" in out[4]
    assert out[5] == "5 files, 0 bad"
    (root / "case000.nii.gz").write_bytes(b"nothing")
    assert volumes.main(["check", str(root)]) == 2
    out = capsys.readouterr().out
    assert "BAD " in out and "5 files, 1 bad" in out


def test_preview(tmp_path, capsys):
    assert volumes.preview(tmp_path / "deep" / "sheet.png", seeds=(12,)).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["nonsense"], ["check"], ["check", "nowhere"], ["preview", "a", "b"]])
def test_command_errors_are_one_line_and_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert volumes.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "data.volumes", "--help"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m data.volumes")
