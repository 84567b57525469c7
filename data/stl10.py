"""
STL-10: reader, an embedded set of ten drawn classes in the same format, import of own pictures, download.

The format (all files in one folder; uint8, no headers):
    train_X.bin test_X.bin unlabeled_X.bin    3*S*S bytes a picture: planes R, G, B, each COLUMN-major, S = 96
    train_y.bin test_y.bin                    one byte a picture, labels 1..K
    class_names.txt fold_indices.txt          K lines; 10 lines of train indices (for others, unused here)
A reader that forgets "column-major" gets pictures flipped about the diagonal, and training still "works".
Here S is derived from the file sizes, so the same format holds pictures of any size.

Splits: validation is cut out of train by a fixed hash of the index (validation_mask); test is for the final
report; unlabeled also holds other animals and vehicles (embedded set: bear and bus), so it has no labels.

    python -m data.stl10                                # preview of the drawn classes: runs/preview_stl10.png
    python -m data.stl10 make FOLDER                    # the embedded set: 5,000 pictures, 138 MB, about 5 s
    python -m data.stl10 download FOLDER                # the real one, 2.6 GB; run again after a break
    python -m data.stl10 import SOURCE FOLDER [SIZE]    # a folder of class folders, or an .npz
    python -m data.stl10 check FOLDER                   # sizes, labels, orientation, md5 of the real one

Licence: the authors of STL-10 (Coates, Ng, Lee 2011) publish none; its pictures come from ImageNet, whose
terms (non-commercial research and education) apply. Do not redistribute them. The embedded set is drawn here.
"""
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import program

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
KINDS = CLASSES + ("bear", "bus")  # the last two only appear in the unlabelled split
SPLITS = ("train", "test", "unlabeled")  # the position is the j of default_rng([seed, j, i])
SIDE = 96
DRAWING = 1  # part of the record of a drawn set: raise it whenever a drawing changes
CHUNK = 500  # pictures handled at once: 14 MB at 96 px

URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
ARCHIVE_MD5 = "91f7769df0f17e558f3565bffb0c7dfb"  # 2,640,397,119 bytes
FILE_MD5 = {  # None: published without one
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f", "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82", "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    "unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4", "class_names.txt": None, "fold_indices.txt": None}
OFFICIAL_BYTES = {"train_X.bin": 138_240_000, "train_y.bin": 5_000, "test_X.bin": 221_184_000,
                  "test_y.bin": 8_000, "unlabeled_X.bin": 2_764_800_000}


# ------------------------------------------------------------------------------------------------------------
# Reading

def class_names(root):
    """Names of the K classes, in label order: tuple of str."""
    path = Path(root) / "class_names.txt"
    _expect(path)
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{path}: expected one class name per line, found none; write the names into it")
    return names


def load(root, split, size=None):
    """Read one split.

    root: folder in the format above; split: 'train' | 'test' | 'unlabeled'; size: side of the returned
    pictures in pixels, None or a divisor of the stored side S (an output pixel is the mean of a square).
    Returns images uint8 (N, 3, size, size) in rows and columns, and labels int64 (N,) in 0..K-1 (None for
    unlabeled). Raises FileNotFoundError or ValueError in one line that says what to do.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    root = Path(root)
    side = _stored_side(root)
    size = side if size is None else int(size)
    if size < 1 or side % size:
        fits = ", ".join(str(s) for s in range(1, side + 1) if side % s == 0)
        raise ValueError(f"{root}: stores {side}x{side} pictures, size {size} does not divide {side}; sizes "
                         f"that work: {fits}")
    path = root / f"{split}_X.bin"
    _expect(path)
    labels = None if split == "unlabeled" else _labels(root, split)
    picture, length = 3 * side * side, path.stat().st_size  # bytes
    count, rest = divmod(length, picture)
    if rest or (labels is not None and count != len(labels)) or count == 0:
        wanted = (f"a multiple of {picture:,} bytes" if labels is None else
                  f"{len(labels):,} pictures of {picture:,} bytes ({len(labels) * picture:,})")
        raise ValueError(f"{path}: expected {wanted}, found {length:,} bytes; the file is empty or cut off, "
                         "copy or make it again")
    stored = np.memmap(path, np.uint8, "r", shape=(count, 3, side, side))
    images = np.empty((count, 3, size, size), np.uint8)
    for i in range(0, count, CHUNK):  # in pieces: the unlabelled split alone is 2.8 GB
        block = area_mean(stored[i:i + CHUNK], side // size)
        images[i:i + CHUNK] = block.transpose(0, 1, 3, 2)  # stored column by column
    return images, labels


def area_mean(images, factor):
    """uint8 (..., H, W) -> uint8 (..., H/factor, W/factor): rounded mean over squares of factor^2 pixels."""
    if factor == 1:
        return images
    total = np.full(images[..., ::factor, ::factor].shape, factor * factor // 2, np.uint32)
    for row in range(factor):
        for col in range(factor):
            total += images[..., row::factor, col::factor]
    return (total // (factor * factor)).astype(np.uint8)


def validation_mask(labels, share=0.1):
    """Which train pictures are held out for validation.

    labels: int (N,). Returns bool (N,): in every class the `share` of its indices with the smallest hash (at
    least one, and never the whole class). A hash, not a generator: the same on every version of NumPy.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share {share}: expected 0 <= share < 1")
    labels = np.asarray(labels)
    return _smallest_hashes([str(i) for i in range(len(labels))], labels, share, "validation")


def data_hash(root):
    """Short hex string that identifies the stored data.

    Hashes sizes, label and name files, and 64 evenly spaced parts of each X: instant for 2.8 GB, at the price
    of missing a change of single pictures between the parts.
    """
    root, digest = Path(root), hashlib.blake2b(digest_size=8)
    _expect(root / "train_X.bin")
    for name in FILE_MD5:
        path = root / name
        if not path.is_file() or name == "fold_indices.txt":  # folds are not used here
            continue
        length = path.stat().st_size
        digest.update(f"{name} {length}\n".encode())
        with open(path, "rb") as file:
            if not name.endswith("_X.bin"):
                digest.update(file.read())
                continue
            for k in range(64):
                file.seek(max(0, length - 16384) * k // 63)
                digest.update(file.read(16384))
    return digest.hexdigest()


def _expect(path):
    if not path.is_file():
        where = "" if path.parent.is_dir() else " (the folder does not exist)"
        raise FileNotFoundError(f"{path}: not found{where}; give a folder in STL-10's binary format, or fill "
                                f"one: python -m data.stl10 make|download|import ... {path.parent}")


def _labels(root, split):
    path = root / f"{split}_y.bin"
    _expect(path)
    count = len(class_names(root))
    labels = np.fromfile(path, np.uint8).astype(np.int64)
    if not len(labels):
        raise ValueError(f"{path}: expected one byte per picture, found an empty file; make or copy it again")
    if labels.min() < 1 or labels.max() > count:
        at = int(np.argmax((labels < 1) | (labels > count)))
        raise ValueError(f"{path}: expected labels 1..{count} (the lines of class_names.txt), found "
                         f"{labels[at]} at index {at}; the file is damaged or counts from 0, copy it again")
    return labels - 1


def _stored_side(root):
    """Side of the square pictures: sqrt(bytes / (3 * number of train labels))."""
    _expect(root / "train_X.bin")
    path, count = root / "train_X.bin", len(_labels(root, "train"))
    length = path.stat().st_size
    side = math.isqrt(length // (3 * count))
    if side == 0 or 3 * side * side * count != length:
        raise ValueError(f"{path}: expected 3*S*S bytes for each of the {count:,} labels of train_y.bin "
                         f"(S = 96 in STL-10: {3 * SIDE * SIDE * count:,}), found {length:,}; the file is "
                         "empty or cut off, copy or make it again")
    return side


def _smallest_hashes(keys, groups, share, salt):
    """bool (N,): per group, the share of members whose key has the smallest hash."""
    rank = np.array([int.from_bytes(hashlib.blake2b(f"{salt} {key}".encode(), digest_size=8).digest(), "big")
                     for key in keys], np.uint64)
    mask = np.zeros(len(rank), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        take = min(max(int(share * len(members) + 0.5), 1), len(members) - 1) if share > 0 else 0
        mask[members[np.argsort(rank[members], kind="stable")[:take]]] = True
    return mask


# ------------------------------------------------------------------------------------------------------------
# Writing

def _to_bytes(images):
    """uint8 (n, 3, S, S) -> the stored bytes (column-major planes)."""
    return np.ascontiguousarray(np.asarray(images).transpose(0, 1, 3, 2)).tobytes()


def _write_text(folder, names, train, rng):
    (folder / "class_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    folds = [" ".join(map(str, rng.permutation(train)[:max(1, train // 5)])) for _ in range(10)]
    (folder / "fold_indices.txt").write_text("\n".join(folds) + "\n")


def _is_filled(root):
    return root.is_file() or (root.is_dir() and any(root.iterdir()))


def _workplace(root):
    """A fresh folder beside root: root itself appears only when everything in it is complete."""
    folder = root.parent / f".{root.name}.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _publish(folder, root):
    if root.is_dir():
        root.rmdir()  # empty here; os.replace cannot do it on every system
    os.replace(folder, root)


# ------------------------------------------------------------------------------------------------------------
# The embedded set

def make(root, seed=0, train=2000, test=1000, unlabeled=2000):
    """Draw the embedded set into root, in STL-10's format at 96x96. About 28 kB a picture.

    Picture i of split j depends only on (seed, j, i), so neither on the sizes nor on the number of processes.
    Drawn in a folder beside root that is renamed at the end. Returns at once when root already holds this
    very set; raises ValueError when it holds anything else.
    """
    root, counts = Path(root).resolve(), (train, test, unlabeled)
    if min(counts) < 1 or seed < 0:
        raise ValueError(f"{root}: expected seed >= 0 and at least one picture per split, found seed {seed} "
                         f"and {counts}")
    record = dict(seed=int(seed), train=int(train), test=int(test), unlabeled=int(unlabeled), drawing=DRAWING)
    if _already_made(root, record):
        return
    if _is_filled(root):
        raise ValueError(f"{root}: expected a new or empty folder or the set {record}, found something else; "
                         "give another folder or delete this one")
    folder = _workplace(root)
    try:
        for j, (split, count) in enumerate(zip(SPLITS, counts)):
            with open(folder / f"{split}_X.bin", "wb") as file:
                file.truncate(count * 3 * SIDE * SIDE)
            if split != "unlabeled":
                (np.array([kind_of(seed, j, i) for i in range(count)]) + 1).astype(np.uint8).tofile(
                    folder / f"{split}_y.bin")
        _write_text(folder, CLASSES, train, np.random.default_rng([seed, 3]))
        _draw_all(folder, seed, counts)
        (folder / "make.json").write_text(json.dumps(record) + "\n")
        try:
            _publish(folder, root)
        except OSError:  # another process made the same set in the meantime
            if not _already_made(root, record):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _already_made(root, record):
    try:
        found = json.loads((root / "make.json").read_text())
        return found == record and all(
            (root / f"{split}_X.bin").stat().st_size == record[split] * 3 * SIDE * SIDE for split in SPLITS)
    except (OSError, ValueError):
        return False


def _jobs(counts, step=50):
    return [(j, i, min(i + step, count)) for j, count in enumerate(counts) for i in range(0, count, step)]


def _draw_part(folder, seed, counts, worker, workers):
    """Draw every workers-th job into the files; yields the number of pictures after each job."""
    for j, start, stop in _jobs(counts)[worker::workers]:
        images = np.stack([draw(kind_of(seed, j, i), np.random.default_rng([seed, j, i]))
                           for i in range(start, stop)])
        with open(Path(folder) / f"{SPLITS[j]}_X.bin", "r+b") as file:
            file.seek(start * 3 * SIDE * SIDE)
            file.write(_to_bytes(images))
        yield stop - start


def _draw_all(folder, seed, counts):
    """Fill the X files with one process per core, all of them reporting through one pipe.

    Fresh interpreters instead of multiprocessing: fork can hang where torch has threads, and spawn imports
    the caller's script (with torch) again in every worker.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(cores, 16, sum(counts) // 200))
    with tqdm(total=sum(counts), desc="drawing", unit="picture", disable=None) as bar:
        if workers == 1:
            for done in _draw_part(folder, seed, counts, 0, 1):
                bar.update(done)
            return
        read_end, write_end = os.pipe()
        arguments = [str(folder), str(seed), ",".join(map(str, counts))]
        repository = str(Path(__file__).resolve().parent.parent)
        processes, trouble = [], ""
        try:
            for worker in range(workers):
                processes.append(subprocess.Popen(
                    [sys.executable, "-m", "data.stl10", "draw", *arguments, str(worker), str(workers)],
                    cwd=repository, stdin=subprocess.DEVNULL, stdout=write_end, stderr=write_end))
            os.close(write_end)  # now the pipe ends when the last worker does
            write_end = None
            with os.fdopen(read_end) as lines:
                for line in lines:
                    if line.strip().isdigit():
                        bar.update(int(line))
                    else:
                        trouble = line.strip() or trouble
            codes = [process.wait() for process in processes]
        finally:
            if write_end is not None:
                os.close(write_end)
            for process in processes:
                process.kill()
                process.wait()
    if any(codes):
        raise ValueError(f"{folder}: expected every drawing process to succeed, found exit codes {codes} "
                         f"({trouble}); nothing was made, remove the cause and run it again")


def kind_of(seed, split, i):
    """Class 0..9 of picture i, in the unlabelled split (2) 0..11.

    Every block of 10 (12) pictures holds each kind once: balanced, and independent of the number of pictures.
    """
    kinds = 12 if split == 2 else 10
    block, place = divmod(i, kinds)
    return int(np.random.default_rng([seed, split, block, 1]).permutation(kinds)[place])


# Shapes in their own coordinates (u, v): a bounding box (u0, v0, u1, v1) and a signed distance, < 0 inside.

def E(x, y, rx, ry, deg=0.0):
    """Ellipse; the distance is exact only near the edge, where it is needed."""
    c, s = math.cos(math.radians(deg)), math.sin(math.radians(deg))
    hx, hy = math.hypot(rx * c, ry * s), math.hypot(rx * s, ry * c)

    def distance(u, v):
        u, v = u - x, v - y
        return (np.hypot((u * c + v * s) / rx, (v * c - u * s) / ry) - 1) * min(rx, ry)
    return (x - hx, y - hy, x + hx, y + hy), distance


def R(x0, y0, x1, y1):
    """Rectangle with corners of radius .02 (less where it is thinner than that)."""
    cx, cy, hx, hy = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    r = min(0.02, hx, hy)

    def distance(u, v):
        a, b = abs(u - cx) - (hx - r), abs(v - cy) - (hy - r)
        return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - r
    return (x0, y0, x1, y1), distance


def L(points, r0, r1=None):
    """Chain of capsules whose radius runs from r0 to r1 along the chain."""
    r1 = r0 if r1 is None else r1
    lengths = [math.dist(a, b) for a, b in zip(points, points[1:])]

    def distance(u, v):
        best, walked = None, 0.0
        for (ax, ay), (bx, by), length in zip(points, points[1:], lengths):
            t = np.clip(((u - ax) * (bx - ax) + (v - ay) * (by - ay)) / length ** 2, 0, 1)
            radius = r0 + (r1 - r0) * (walked + t * length) / sum(lengths)
            d = np.hypot(u - ax - t * (bx - ax), v - ay - t * (by - ay)) - radius
            best, walked = (d if best is None else np.minimum(best, d)), walked + length
        return best
    xs, ys, r = [p[0] for p in points], [p[1] for p in points], max(r0, r1)
    return (min(xs) - r, min(ys) - r, max(xs) + r, max(ys) + r), distance


def P(*points):
    """Convex polygon: the largest signed distance to its edges."""
    edges = list(zip(points, points[1:] + points[:1]))
    sign = math.copysign(1.0, sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges))  # shoelace: orientation

    def distance(u, v):
        best = None
        for (ax, ay), (bx, by) in edges:
            d = ((u - ax) * (by - ay) - (v - ay) * (bx - ax)) * (sign / math.dist((ax, ay), (bx, by)))
            best = d if best is None else np.maximum(best, d)
        return best
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return (min(xs), min(ys), max(xs), max(ys)), distance


X_AXIS = ((np.arange(SIDE) + 0.5) / (SIDE / 2) - 1).astype(np.float32)  # pixel centres in (-1, 1)
Y_AXIS = -X_AXIS[:, None]  # Y points up
WHOLE = (0.0, 0.0, 1.0, 0.0, 1)  # pose of the background: the canvas itself
BLACK, WHITE, GLASS, LAMP = (0.06,) * 3, (0.95,) * 3, (0.55, 0.75, 0.9), (1.0, 0.95, 0.6)


def _paint(img, pose, shape, colour):
    """Lay a shape over img, float32 (3, 96, 96), in place. pose: x, y, scale z, degrees, flip f = +-1.

    Only the bounding box is touched: most shapes are a few hundred pixels.
    """
    (u0, v0, u1, v1), distance = shape
    x, y, z, deg, f = pose
    c, s = math.cos(math.radians(deg)), math.sin(math.radians(deg))
    mu, mv, hu, hv = (u0 + u1) / 2, (v0 + v1) / 2, (u1 - u0) / 2, (v1 - v0) / 2
    mx, my = x + f * z * (mu * c - mv * s), y + z * (mu * s + mv * c)
    hx, hy = z * (abs(c) * hu + abs(s) * hv), z * (abs(s) * hu + abs(c) * hv)
    half = SIDE / 2
    col0, col1 = max(0, int((mx - hx + 1) * half - 1)), min(SIDE, int((mx + hx + 1) * half + 2))
    row0, row1 = max(0, int((1 - my - hy) * half - 1)), min(SIDE, int((1 - my + hy) * half + 2))
    if col0 >= col1 or row0 >= row1:
        return
    p, q = (X_AXIS[col0:col1] - x) * f, Y_AXIS[row0:row1] - y
    u, v = (p * c + q * s) / z, (q * c - p * s) / z
    cover = np.clip(0.5 - distance(u, v) * (z * half), 0, 1)  # one pixel of soft edge
    part = img[:, row0:row1, col0:col1]
    shade = np.asarray(colour, np.float32)[:, None, None] * (1 + 0.15 * v)  # light from above
    part += cover * (np.clip(shade, 0, 1) - part)


def _hue(rng, lo=0.25, hi=0.95):
    """A saturated colour of random hue."""
    h = rng.uniform(0, 6)
    return lo + (hi - lo) * np.clip([abs(h - 3) - 1, 2 - abs(h - 2), 2 - abs(h - 4)], 0, 1)


def _jit(rng, *colour):
    return np.clip(np.array(colour) + rng.normal(0, 0.05, 3), 0, 1)


FURS = ((.16, .13, .12), (.35, .22, .13), (.55, .36, .20), (.75, .58, .36), (.88, .82, .72), (.5, .5, .52))


def _fur(rng):
    return np.array(FURS[rng.integers(len(FURS))]) * rng.uniform(.85, 1.15)


SCENES = {  # equal parts; they overlap on purpose: the background must not give the class away
    "airplane": ("sky", "sky", "sky", "grass"), "bird": ("sky", "forest", "studio"),
    "car": ("road", "road", "desert", "snow", "studio"), "cat": ("room", "room", "grass", "studio"),
    "deer": ("forest", "forest", "grass", "snow"), "dog": ("grass", "room", "snow", "studio"),
    "horse": ("grass", "grass", "desert", "forest"), "monkey": ("forest", "forest", "grass", "studio"),
    "ship": ("sea",), "truck": ("road", "road", "road", "desert", "snow"),
    "bear": ("forest", "snow", "grass"), "bus": ("road",)}
GROUND = {"grass": (.36, .58, .24), "sea": (.1, .32, .52), "road": (.4, .41, .42), "snow": (.93, .95, .97),
          "desert": (.82, .7, .48), "room": (.55, .4, .28), "forest": (.22, .36, .14)}


def _background(rng, scene, hz):
    """Sky or wall, clouds, trees, ground below the horizon hz: float32 (3, 96, 96)."""
    U = rng.uniform
    if scene == "studio":
        top, low = _hue(rng, .35, .85), _hue(rng, .35, .85)
    elif scene == "room":
        top = low = _hue(rng, .6, .9)
    elif scene == "forest":
        top, low = _jit(rng, .2, .38, .2), _jit(rng, .12, .25, .12)
    elif U() < .15:  # sunset
        top, low = _jit(rng, .95, .55, .35), _jit(rng, 1, .85, .6)
    else:
        top, low = _jit(rng, .35, .6, .92), _jit(rng, .8, .9, 1)
    low, top = (c[:, None, None].astype(np.float32) for c in (low, top))
    height = (Y_AXIS + 1) / 2  # (96, 1): 0 below, 1 above
    img = np.repeat(low * (1 - height) + top * height, SIDE, axis=2)  # (3, 96, 96)

    def add(shape, colour):
        _paint(img, WHOLE, shape, colour)

    if scene not in ("studio", "room", "forest"):
        for _ in range(rng.integers(4)):  # clouds
            x, y, rx, ry = U(-.9, .9), U(.25, .9), U(.1, .22), U(.05, .1)
            for k in (-1, 0, 1):
                add(E(x + .16 * k, y, rx, ry), WHITE)
    if scene == "forest":
        for _ in range(5):
            x, w = U(-1, 1), U(.06, .14)
            add(R(x - w / 2, -1, x + w / 2, 1), _jit(rng, .28, .2, .13))
        for _ in range(8):
            add(E(U(-1, 1), U(.2, 1), U(.15, .35), U(.1, .25)), _jit(rng, .16, .36, .14))
    if scene in GROUND:
        if scene in ("grass", "road") and U() < .6:
            for _ in range(rng.integers(2, 6)):  # bushes, half hidden by the ground
                add(E(U(-1, 1), hz, U(.1, .3), U(.08, .2)), _jit(rng, .2, .42, .18))
        add(R(-1.1, -1.1, 1.1, hz), _jit(rng, *GROUND[scene]))
    if scene == "sea":
        for _ in range(8):
            x, y, w = U(-1, 1), U(-.98, hz - .03), U(.08, .25)
            add(R(x - w, y - .008, x + w, y + .008), (.45, .62, .78))
    if scene == "road":
        for k in range(-3, 3):
            x = .5 * k + .1
            add(R(x, hz - .38, x + .25, hz - .34), (.9, .88, .75))
    if scene == "room":
        x, y, w, h = U(-.7, .7), U(.45, .7), U(.12, .25), U(.12, .2)
        add(R(x - w, y - h, x + w, y + h), _hue(rng))
    return img


def draw(kind, rng):
    """One picture of KINDS[kind]: uint8 (3, 96, 96). All randomness comes from rng."""
    U, name = rng.uniform, KINDS[kind]
    hz = U(-.55, -.1)
    scene = SCENES[name][rng.integers(len(SCENES[name]))]
    img = _background(rng, scene, hz)
    y = {"airplane": U(-.1, .4), "bird": U(-.15, .25), "ship": hz + U(-.02, .15), "car": hz + U(0, .2),
         "truck": hz + U(0, .2), "bus": hz + U(0, .2)}.get(name, U(-.1, .12))
    deg = U(-6, 6) * (4 if name == "airplane" else 1)
    pose = (U(-.18, .18), y, U(.62, .95), deg, 1 if U() < .5 else -1)

    def add(shape, colour):
        _paint(img, pose, shape, colour)

    if name == "monkey" or (name in ("cat", "dog") and U() < .45):
        _frontal(rng, add, name)
    elif name in BODY:
        _quadruped(rng, add, name)
    else:
        {"airplane": _airplane, "bird": _bird, "car": _car, "ship": _ship, "truck": _truck,
         "bus": _bus}[name](rng, add)
    img = img * np.float32(U(.8, 1.1)) + rng.normal(0, .03, (3, 1, 1)).astype(np.float32)
    img += np.float32(.02) * rng.standard_normal(img.shape, np.float32)
    return np.rint(np.clip(img, 0, 1) * 255).astype(np.uint8)


def _wheels(add, places, v, r):
    for x in places:
        add(E(x, v, r, r), BLACK)
        add(E(x, v, r / 2, r / 2), (.6,) * 3)


def _airplane(rng, add):
    k, w = _hue(rng), np.array(WHITE) * rng.uniform(.75, 1)
    add(P((.05, .05), (-.25, .42), (-.4, .42), (-.2, .05)), .75 * w)  # far wing
    add(L([(-.75, .06), (.65, 0)], .1, .13), w)
    add(R(-.7, -.04, .72, 0), k)
    add(P((-.6, .1), (-.85, .45), (-.98, .45), (-.86, .08)), k)  # fin
    add(P((-.62, .08), (-.8, -.06), (-.98, -.06), (-.85, .08)), .8 * w)
    add(E(.05, -.25, .13, .055), (.25,) * 3)  # engine
    add(P((.18, -.02), (-.3, -.5), (-.5, -.5), (-.2, -.02)), .88 * w)  # near wing
    for n in range(8):
        x = -.45 + .11 * n
        add(R(x - .025, .015, x + .025, .065), (.2, .25, .35))
    add(P((.6, .1), (.72, .08), (.74, .02), (.6, .03)), (.15, .18, .25))  # cockpit


def _bird(rng, add):
    U = rng.uniform
    b = _hue(rng) if U() < .7 else _fur(rng)
    flying = U() < .5
    if flying:
        add(P((.12, .1), (-.05, .75), (-.45, .62), (-.25, .05)), .6 * b)
    else:
        add(L([(-1.5, -.5), (1.5, -.44)], .05), (.36, .25, .16))  # branch
        for x in (-.05, .1):
            add(L([(x, -.2), (x, -.46)], .02), (.8, .5, .2))
    add(P((-.3, .05), (-.85, -.1), (-.8, -.3), (-.25, -.12)), .7 * b)  # tail
    add(E(0, 0, .4, .25, 18), b)
    add(E(.08, -.08, .28, .16, 18), .4 * b + .5)
    add(E(.36, .24, .18, .17), b)
    add(P((.5, .3), (.74, .22), (.5, .16)), (.95, .6, .15))  # beak
    add(E(.42, .28, .035, .04), BLACK)
    if flying:
        add(P((.15, .08), (-.2, U(.6, .85)), (-.65, U(.4, .6)), (-.28, -.05)), .8 * b)
    else:
        add(E(-.1, .02, .3, .13, 20), .7 * b)


def _car(rng, add):
    U = rng.uniform
    b = _hue(rng, .1, .9) if U() < .75 else np.full(3, U(.2, .9))
    j = U(-.1, .15)
    add(P((-.55, .05), (-.35 + j, .38), (.2 + j, .38), (.5, .05)), .9 * b)
    add(P((-.42, .07), (-.29 + j, .32), (-.06 + j, .32), (-.06 + j, .07)), GLASS)
    add(P((j, .07), (j, .32), (.16 + j, .32), (.36, .07)), GLASS)
    add(R(-.82, -.22, .82, .08), b)
    add(R(-.82, -.2, .82, -.14), .6 * b)
    add(E(.77, -.01, .05, .05), LAMP)
    add(E(-.78, 0, .035, .05), (.85, .1, .1))
    _wheels(add, (-.48, .48), -.22, .16)


def _truck(rng, add):
    U = rng.uniform
    b, height = _hue(rng), U(.45, .62)
    cab = _hue(rng) if U() < .6 else b
    add(R(-.92, -.2, .9, -.1), (.15,) * 3)
    add(R(-.92, -.12, .36, height), b)
    for n in range(6):
        x = -.8 + .2 * n
        add(R(x - .0075, -.1, x + .0075, height - .02), .8 * b)
    add(P((.42, -.14), (.42, .36), (.7, .36), (.84, .08), (.88, -.14)), cab)
    add(P((.52, .1), (.52, .3), (.67, .3), (.77, .1)), GLASS)
    add(E(.85, -.08, .04, .04), LAMP)
    _wheels(add, (-.68, -.36, .62), -.2, .15)


def _bus(rng, add):
    add(R(-.95, -.18, .92, .4), _hue(rng))
    for n in range(8):
        x = -.85 + .24 * n
        if x < .9:
            add(R(x - .085 + .02, -.03, x + .085 + .02, .19), GLASS)
    add(R(-.95, -.05, .92, 0), WHITE)
    _wheels(add, (-.6, .55), -.2, .14)


def _ship(rng, add):
    U = rng.uniform
    b = np.array(((.75, .15, .12), (.12, .12, .13), (.12, .18, .4), (.92, .92, .92), (.42, .26, .15))[
        rng.integers(5)])
    if U() < .35:  # sails
        add(L([(0, -.1), (0, .95)], .018), (.35, .22, .12))
        add(P((.04, -.02), (.04, .9), (.6, -.02)), WHITE)
        add(P((-.04, .02), (-.04, .75), (-.5, .02)), _hue(rng, .5, .95))
    else:
        k = _hue(rng)
        add(R(-.55, -.1, .35, .16), WHITE)
        add(R(-.4, .14, .12, .34), WHITE)
        add(R(-.2, .32, -.02, .62), k)
        add(R(-.2, .52, -.02, .58), BLACK)
        add(L([(.25, .1), (.25, .6)], .015), (.3,) * 3)
        for n in range(6):
            add(E(-.45 + .14 * n, .04, .03, .03), (.2, .25, .35))
    add(P((-.8, -.08), (.95, -.08), (.68, -.36), (-.68, -.36)), b)
    add(R(-.72, -.34, .74, -.28), .6 * b)
    add(R(-1.1, -.4, 1.1, -.34), (.5, .67, .82))  # wake


# rx, ry | leg length, r | neck dx, dy, r | head rx, ry, tilt | muzzle length, r | tail r0, r1, points
BODY = {
    "horse": (.46, .20, .50, .050, .26, .34, .12, .20, .10, -40, .10, .070,
              .045, .07, [(.04, .10), (-.12, 0), (-.14, -.35)]),
    "deer": (.38, .15, .50, .030, .16, .36, .06, .14, .08, -25, .08, .045, .05, .03, [(0, .06), (-.08, .12)]),
    "dog": (.40, .17, .30, .050, .14, .16, .10, .17, .14, 0, .16, .075,
            .035, .02, [(.03, .06), (-.14, .2), (-.12, .36)]),
    "cat": (.36, .15, .22, .042, .10, .10, .09, .17, .15, 0, .04, .050,
            .035, .025, [(.03, .04), (-.2, .06), (-.26, .3), (-.16, .44)]),
    "bear": (.50, .30, .28, .095, .12, .08, .20, .20, .18, 0, .12, .090, .06, .05, [(0, .05), (-.05, .04)])}


def _quadruped(rng, add, name):
    """Horse, deer, dog, cat or bear from the side: one plan, the proportions of BODY. +u is forward."""
    U = rng.uniform
    rx, ry, leg, leg_r, dx, dy, neck_r, hx, hy, tilt, muz, muz_r, tail0, tail1, tail = BODY[name]
    c = np.array((.62, .42, .24)) * U(.8, 1.1) if name == "deer" else _fur(rng)
    dark, pale = .45 * c, .5 * c + .48
    X, Y = rx - .08 + dx, dy + .03  # neck end, where the head sits
    ct, st = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    add(L([(-rx + a, b) for a, b in tail], tail0, tail1), dark if name == "horse" else
        WHITE if name == "deer" else c)
    g, e = U(-.12, .12), rx - .1
    for x, h, colour in ((-e, -g, .75 * c), (e, g, .75 * c), (-e, g, c), (e, -g, c)):  # far pair, near pair
        add(L([(x, -.02), (x + .6 * h, -ry - leg / 2), (x + h, -ry - leg)], 1.5 * leg_r, leg_r), colour)
        add(E(x + h + .02, -ry - leg, 1.3 * leg_r, .8 * leg_r), dark)
    add(E(0, 0, rx, ry), c)
    if name == "deer":
        add(E(0, -.07, .7 * rx, .45 * ry), pale)
    if name != "bear" and U() < .5:  # coat markings
        for _ in range(7):
            u, v = U(-.65, .65) * rx, U(-.5, .6) * ry
            if name == "cat":
                add(L([(u, .75 * ry), (u + .02, .1 * ry)], .018), dark)
            elif name == "deer":
                add(E(u, abs(v), .018, .018), WHITE)
            else:
                add(E(u, v, U(.04, .11), U(.03, .07)), pale if c.mean() < .4 else dark)
    add(L([(rx - .12, .02), (X, Y)], 1.35 * neck_r, neck_r), c)
    if name == "horse":
        add(L([(rx - .12, .2), (X - .1, Y + .02), (X + .02, Y + .12)], .05), dark)  # mane
        add(E(X - .06, Y + .09, .03, .08), .85 * c)
    if name == "deer":
        add(E(X - .08, Y + .06, .09, .035, -25), .85 * c)
        if U() < .75:
            for d in (-.05, .08):
                add(L([(X + d / 2, Y + .05), (X + d, Y + .26), (X + d - .12, Y + .42), (X + d, Y + .26),
                       (X + d + .12, Y + .4)], .018), (.8, .7, .52))
    if name == "bear":
        for side in (-.1, .1):
            add(E(X + side, Y + .15, .07, .07), .85 * c)
    if name == "cat":
        for side in (-1, 1):
            add(P((X + side * .15, Y + .02), (X + side * .13, Y + .24), (X + side * .02, Y + .12)), .85 * c)
    add(E(X, Y, hx, hy, tilt), c)
    drop = .04 if tilt == 0 else 0.0
    mx, my = X + (hx + .4 * muz) * ct, Y + (hx + .4 * muz) * st - drop
    add(L([(X + .5 * hx * ct, Y + .5 * hx * st - .03), (mx, my)], 1.2 * muz_r, muz_r),
        pale if tilt == 0 else c)
    add(E(mx + .6 * muz_r, my + .4 * muz_r, .03, .025), BLACK)
    add(E(X + .25 * hx, Y + .35 * hy, .028, .032), BLACK)
    if name == "dog":
        add(E(X - .09, Y - .04, .06, .15, 12), .6 * c)
    if name == "cat":
        for end in ((.16, -.06), (.16, .04)):
            add(L([(mx, my), (mx + end[0], my + end[1])], .006), WHITE)


def _frontal(rng, add, name):
    """Monkey, cat or dog sitting and facing the viewer."""
    U, y = rng.uniform, .28
    t = U(.35, .5)
    monkey, cat, dog = (name == n for n in ("monkey", "cat", "dog"))
    c = np.array((.38, .25, .15)) * U(.7, 1.3) if monkey else _fur(rng)
    pale = np.array((.87, .7, .52)) if monkey else .4 * c + np.array((.55, .48, .4))
    pink = (.85, .5, .5)
    if not dog:
        tail = [(.2, -.57), (t + .12, -.57), (t + .16, -.2)] + ([(t, 0), (t - .08, -.14)] if monkey else [])
        add(L(tail, .045, .03), c)
    add(E(0, -.38, .33, .4), c)
    add(E(0, -.4, .19, .3), pale)
    if monkey:
        for side in (-1, 1):
            h = -.35 + (U(-.3, .55) if side == 1 else 0)  # one arm may be raised
            add(L([(side * .26, -.15), (side * .5, (h - .2) / 2 - .05), (side * .52, h)], .07, .055), c)
            add(E(side * .52, h, .06, .06), pale)
            add(E(side * .3, -.74, .17, .09), pale)
            add(E(side * .34, y, .13, .13), .9 * c)
            add(E(side * .34, y, .075, .075), pale)
    for side in (-1, 1) if not monkey else ():
        add(L([(side * .13, -.3), (side * .15, -.74)], .07, .065), .92 * c)
        add(E(side * .17, -.76, .1, .06), pale)
        if cat:
            add(P((side * .33, y + .05), (side * .31, y + .44), (side * .04, y + .27)), .9 * c)
            add(P((side * .28, y + .14), (side * .28, y + .35), (side * .12, y + .25)), pink)
    add(E(0, y, .32, .3), c)
    add(E(0, y - .11, *((.21, .16) if monkey else (.15, .11))), pale)
    for side in (-1, 1):
        if monkey:
            add(E(side * .1, y + .06, .13, .15), pale)
        if dog:
            add(E(side * .3, y - .02, .1, .26, side * 10), .6 * c)
        if cat:
            add(E(side * .13, y + .06, .065, .075), (.75, .8, .3))
            for d in (-.05, 0, .05):
                add(L([(side * .1, y - .1), (side * .4, y - .1 + d)], .007), WHITE)
        add(E(side * (.13 if cat else .12), y + .06, *((.02, .07) if cat else (.045, .05))), BLACK)
    add(E(0, y - .07, *((.06, .04) if dog else (.035, .04))), BLACK if dog else pink)
    add(L([(-.07, y - .17), (0, y - .2), (.07, y - .17)], .012), .3 * c)
    if dog:
        add(L([(0, y - .19), (0, y - .2 - U(.02, .1))], .045), (.85, .3, .32))


# ------------------------------------------------------------------------------------------------------------
# Own pictures

def import_pictures(source, root, size=96, test_share=0.2):
    """Write own pictures in the same format.

    source: a folder with one folder of pictures per class (centre crop, then Lanczos to size), or an .npz
    with uint8 pictures (N, 3, S, S) or (N, S, S, 3), integer labels (N,) from 0, and if wanted class_names
    (K,); such pictures are averaged over squares where size divides S, otherwise resized by Lanczos.
    size=None keeps the pictures of an .npz as they are. A fixed hash sends test_share of each class to test.
    root must be new or empty. Raises FileNotFoundError or ValueError naming the file.
    """
    source, root = Path(source), Path(root).resolve()
    if not source.exists():
        raise FileNotFoundError(f"{source}: not found; give a folder of class folders, or an .npz file")
    if _is_filled(root):
        raise ValueError(f"{root}: expected a new or empty folder, found a filled one; nothing was written, "
                         "give another folder")
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share {test_share}: expected 0 <= test_share < 1")
    if size is not None and size < 1:
        raise ValueError(f"size {size}: expected at least 1 pixel")
    read = _from_folder if source.is_dir() else _from_npz
    picture, labels, names, keys = read(source, size)
    if len(names) > 255:
        raise ValueError(f"{source}: {len(names)} classes, but a label is one byte; at most 255 classes work")
    is_test = _smallest_hashes(keys, labels, test_share, "test")
    folder = _workplace(root)
    try:
        with tqdm(total=len(labels), desc="importing", unit="picture", disable=None) as bar:
            for split, chosen in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
                (labels[chosen] + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
                with open(folder / f"{split}_X.bin", "wb") as file:
                    for i in chosen:
                        file.write(_to_bytes(picture(i)[None]))
                        bar.update()
        _write_text(folder, names, int((~is_test).sum()), np.random.default_rng(0))
        _publish(folder, root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_folder(source, size):
    """-> picture(i) giving uint8 (3, size, size), labels (N,), class names, one key per picture."""
    if size is None:
        raise ValueError(f"{source}: a folder of pictures needs a size (for instance 96)")
    names = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if names and set(names) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(f"{source}: expected one folder per class, found {', '.join(names)}; give one of "
                         f"those, for instance {source / names[0]}")
    found = [(path, k) for k, name in enumerate(names) for path in sorted((source / name).rglob("*"))
             if path.is_file() and not path.name.startswith(".")]
    missing = set(range(len(names))) - {k for _, k in found}
    if not names or missing:
        what = f"no pictures in {names[min(missing)]}" if missing else "no folders"
        raise ValueError(f"{source}: expected one folder of pictures per class, found {what}")
    # Sorted by hash: the first 128 pictures then hold every class.
    keys = {path: path.relative_to(source).as_posix() for path, _ in found}
    found.sort(key=lambda item: hashlib.blake2b(keys[item[0]].encode()).digest())

    def picture(i):
        from PIL import Image, ImageOps
        try:
            with Image.open(found[i][0]) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # pillow has a dozen kinds of "cannot read this"
            raise ValueError(f"{found[i][0]}: expected a readable picture, found {type(error).__name__}: "
                             f"{error}; repair or remove it") from None
        return np.asarray(_square(image, size)).transpose(2, 0, 1)
    return picture, np.array([k for _, k in found], np.int64), tuple(names), [keys[path] for path, _ in found]


def _square(image, size):
    """Largest centred square of a pillow picture, resized."""
    from PIL import Image
    side = min(image.size)
    x, y = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


def _from_npz(source, size):
    try:
        with np.load(source, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{source}: expected an .npz of plain arrays, found {type(error).__name__}: "
                         f"{' '.join(str(error).split())}; save it again with np.savez") from None
    seen = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items()) or "nothing"

    def pick(wanted, fits, text):
        """The fitting array of a usual name, otherwise the only one that fits."""
        fitting = [name for name, a in arrays.items() if fits(a)]
        usual = [name for name in wanted if name in fitting]
        if not usual and len(fitting) != 1:
            raise ValueError(f"{source}: expected {text}, found {seen}; name the array {wanted[0]}")
        return arrays[(usual or fitting)[0]]

    images = pick(("images", "x", "X", "arr_0"), lambda a: a.dtype == np.uint8 and a.ndim == 4 and (
        a.shape[1] == 3 and a.shape[2] == a.shape[3] or a.shape[3] == 3 and a.shape[1] == a.shape[2]),
        "square pictures, uint8 (N, 3, S, S) or (N, S, S, 3)")
    if not images.size:
        raise ValueError(f"{source}: expected pictures, found an empty array {images.shape}")
    if images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    labels = pick(("labels", "y", "arr_1"), lambda a: a.dtype.kind in "iu" and a.shape in (
        (len(images),), (len(images), 1)), f"one integer label for each of the {len(images):,} pictures")
    labels = labels.reshape(-1).astype(np.int64)
    named = [arrays[n] for n in ("class_names", "classes") if n in arrays and arrays[n].dtype.kind in "US"]
    names = named[0].astype(str).tolist() if named else [""] * (int(labels.max()) + 1)
    names = tuple(" ".join(name.split()) or str(k) for k, name in enumerate(names))  # one line each
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{source}: expected labels 0..{len(names) - 1} ({len(names)} class names), found "
                         f"{labels.min()}..{labels.max()}; subtract 1 if they count from 1")
    side = images.shape[2]
    size = side if size is None else size

    def picture(i):
        if side % size == 0:
            return area_mean(images[i], side // size)
        from PIL import Image
        image = Image.fromarray(np.ascontiguousarray(images[i].transpose(1, 2, 0)))
        return np.asarray(_square(image, size)).transpose(2, 0, 1)
    return picture, labels, names, [str(i) for i in range(len(labels))]


# ------------------------------------------------------------------------------------------------------------
# The real STL-10

def download(root, url=URL, archive_md5=ARCHIVE_MD5, file_md5=FILE_MD5):
    """Fetch, verify and unpack the official archive into root; needs about 6 GB while it works.

    The archive grows in `<root>.tar.gz.part`; a second call goes on where the first one stopped. Only the
    files named in file_md5 are unpacked, and root appears when all of them agree. Returns at once when root
    already has files of these names. Raises FileNotFoundError when the network fails, ValueError when bytes
    differ or the disk is too small.
    """
    root = Path(root).resolve()
    if all((root / name).is_file() for name in file_md5):
        return
    if _is_filled(root):
        raise ValueError(f"{root}: expected a new or empty folder, found other files; give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    part = root.parent / f"{root.name}.tar.gz.part"
    _fetch(url, part)
    found = _md5(part)
    if found != archive_md5:
        part.unlink()  # going on with it could never work
        raise ValueError(f"{part}: expected md5 {archive_md5}, found {found}; the damaged archive was "
                         "deleted, run the command again")
    folder = _workplace(root)
    try:
        _unpack(part, folder, file_md5)
        _publish(folder, root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    part.unlink()


def _fetch(url, part):
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    again = f"what arrived is kept in {part}; run the same command again to go on"
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if have and answer.status != 206:
                have = 0  # the server ignores Range and sends everything
            total = have + int(answer.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(part.parent).free
            need = 2.3 * total - have  # rest of the archive + its files unpacked
            if free < need:
                raise ValueError(f"{part.parent}: expected {need / 1e9:.1f} GB of free space, found "
                                 f"{free / 1e9:.1f} GB; make room or give another folder")
            bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc="downloading",
                       disable=None)
            with bar, open(part, "ab" if have else "wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing left to send: the md5 decides
            return
        raise FileNotFoundError(f"{url}: the server answered {error.code} {error.reason}; {again}") from None
    except (urllib.error.URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(f"{url}: cannot be fetched ({reason}); {again}") from None
    if part.stat().st_size < total:
        raise FileNotFoundError(f"{url}: broke off after {part.stat().st_size:,} of {total:,} bytes; {again}")


def _md5(path):
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive, folder, file_md5):
    """Copy the expected files and nothing else: names in an archive are not to be trusted."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tqdm(tar, desc="unpacking", unit="file", disable=None):
                name = member.name.removeprefix("stl10_binary/")
                if not member.isfile() or name not in file_md5:
                    continue
                with tar.extractfile(member) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: expected a tar.gz, found {type(error).__name__}: {error}; delete it "
                         "and run the command again") from None
    for name, wanted in file_md5.items():
        if not (folder / name).is_file():
            raise ValueError(f"{archive}: expected {name} inside, found none; is this the STL-10 archive?")
        found = _md5(folder / name) if wanted else None
        if found != wanted:
            raise ValueError(f"{archive}: {name} expected md5 {wanted}, found {found}; delete the archive "
                             "and run the command again")


# ------------------------------------------------------------------------------------------------------------
# Commands

def check(root):
    """Print sizes, label counts and orientation of a folder; md5 when it has the sizes of the real STL-10."""
    root = Path(root)
    side, names = _stored_side(root), class_names(root)
    print(f"{root}: {side}x{side} pixels, {len(names)} classes, data hash {data_hash(root)}")
    for split in ("train", "test"):
        images, labels = load(root, split)
        counts = np.bincount(labels, minlength=len(names))
        print(f"  {split}: {len(images):,} pictures; " + ", ".join(f"{n} {c}" for n, c in zip(names, counts)))
        if split == "train" and side > 1:
            # Photographs are lighter above (sky, lamps), and left and right look alike on average.
            mean, half = images.mean((0, 1)), side // 2
            tall = mean[:half].mean() - mean[-half:].mean()
            wide = mean[:, :half].mean() - mean[:, -half:].mean()
            verdict = "upright" if abs(tall) >= abs(wide) else "TRANSPOSED? The planes are column-major"
            print(f"  orientation: top minus bottom {tall:+.1f}, left minus right {wide:+.1f}: {verdict}")
    if (root / "unlabeled_X.bin").is_file():  # by size alone: reading 2.8 GB would only take time
        count, rest = divmod((root / "unlabeled_X.bin").stat().st_size, 3 * side * side)
        if rest or not count:
            load(root, "unlabeled")  # says what is wrong
        print(f"  unlabeled: {count:,} pictures")
    if all((root / n).is_file() and (root / n).stat().st_size == b for n, b in OFFICIAL_BYTES.items()):
        for name, wanted in FILE_MD5.items():
            if wanted and (found := _md5(root / name)) != wanted:
                raise ValueError(f"{root / name}: expected md5 {wanted}, found {found}; download it again")
        print("  md5: all files are those of the real STL-10")


def preview(path="runs/preview_stl10.png", seed=0, columns=10):
    """Write a PNG: one row per kind, `columns` pictures at 96 px. Returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    path, gap, left = Path(path), 4, 110
    height, width = len(KINDS) * (SIDE + gap) + gap, left + columns * (SIDE + gap)
    sheet = np.full((height, width, 3), 255, np.uint8)
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    for k, name in enumerate(KINDS):
        row = gap + k * (SIDE + gap)
        for n in range(columns):
            image = draw(k, np.random.default_rng([seed, 9, k, n + 1]))  # 9: no split, so never training data
            col = left + n * (SIDE + gap)
            sheet[row:row + SIDE, col:col + SIDE] = image.transpose(1, 2, 0)
        text = name if k < len(CLASSES) else f"{name}\n(unlabelled\nsplit only)"
        figure.text(.008, 1 - (row + SIDE / 2) / height, text, va="center", fontsize=11)
    figure.figimage(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


USAGE = ("usage: python -m data.stl10 [preview [PNG]] | make FOLDER | download FOLDER | "
         "import SOURCE FOLDER [SIZE] | check FOLDER")


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr."""
    command, *rest = arguments or ["preview"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "preview" and len(rest) <= 1:
        print(f"wrote {preview(*rest)}")
    elif command in ("make", "download") and len(rest) == 1:
        (make if command == "make" else download)(rest[0])
        print(f"{rest[0]}: ready")
    elif command == "import" and len(rest) in (2, 3):
        if len(rest) == 3 and not rest[2].isdigit():
            raise ValueError(f"SIZE {rest[2]!r}: expected a number of pixels; {USAGE}")
        import_pictures(rest[0], rest[1], *map(int, rest[2:]))
        print(f"{rest[1]}: ready")
    elif command == "check" and len(rest) == 1:
        check(rest[0])
    elif command == "draw" and len(rest) == 5:  # a worker of make: fills its part, reports to stdout
        counts = tuple(map(int, rest[2].split(",")))
        for done in _draw_part(rest[0], int(rest[1]), counts, int(rest[3]), int(rest[4])):
            os.write(1, f"{done}\n".encode())  # in one piece: all workers share the pipe
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
