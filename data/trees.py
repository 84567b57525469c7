"""
Block trees on small grids: fourteen kinds, prompts measured on the tree, and a score of its structure.

A tree is v[y, z, x], uint8, n blocks a side: y grows upwards, the trunk stands on y = 0 at x = z = n/2 (a 2x2
trunk on n/2 and n/2 + 1). Classes: 0 is air, 15 is MASK (a block not decided yet), and of the seven species
    oak 1, 2   birch 3, 4   spruce 5, 6   jungle 7, 8   acacia 9, 10   dark_oak 11, 12   cherry 13, 14
the odd number is the log and the even one its leaves. A kind is a way to grow ("pine" is made of spruce
blocks); a tree depends on nothing but its kind, seed and index, so a larger set begins with the smaller one.

Leaves further than 6 steps from a log would decay in the game; they are removed here at generation: some in
every sixth cherry, none elsewhere. What a prompt says is measured on the finished tree, not on how it grew.

    python -m data.trees                        # a picture of every kind: runs/preview_trees.png
    python -m data.trees check FILE [SIZE]      # own trees (.npy, .npz): what fits the grid, what is whole

Does not: read game files, draw vines, cocoa, roots or bees, or look at terrain.
The rules of growth are facts of the game (Java edition), written anew from a table of them.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import program, written

SPECIES = ("oak", "birch", "spruce", "jungle", "acacia", "dark_oak", "cherry")
AIR, MASK = 0, 15
SEEDS = dict(train=1, val=2, test=3)  # the streams of the splits
FAR = 6  # steps from a log through leaves; leaves further away decay
CACHE = "runs/cache"
RECIPE = 1  # part of the cache's name: raise it whenever a kind changes
CHUNK = 64  # trees handled at once: their arrays stay in the processor's cache


def is_log(v):
    """bool like v: blocks of wood."""
    return (v % 2 == 1) & (v < MASK)


def is_leaf(v):
    """bool like v: blocks of leaves."""
    return (v % 2 == 0) & (v > AIR)


# ------------------------------------------------------------------------------------------------------------
# Growing: each rule gets dice and a height h, and returns logs and leaves, sets of (x, y, z) from the base of
# the trunk. Leaves hang in layers around nodes; where both want a cell the log has it. In the conditions that
# leave a cell out, a and b are |dx| and |dz|; around a 2x2 trunk they count from the nearer of its columns.

class Dice:
    """The random choices of one tree: a stream of its own."""

    def __init__(self, *seed):
        self.random = np.random.default_rng(seed).random

    def uniform(self, low, high):
        """An integer in low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def coin(self):
        return self.uniform(0, 1) == 1


NORTH_EAST_SOUTH_WEST = ((0, -1), (1, 0), (0, 1), (-1, 0))  # (dx, dz)


def _layer(node, y, R, bad=lambda a, b: False, giant=False):
    """The cells of a square layer of leaves, radius R, y above its node, but for the bad ones."""
    span = [(d, min(abs(d), abs(d - 1)) if giant else abs(d)) for d in range(-R, R + 1 + giant)]
    return {(node[0] + dx, node[1] + y, node[2] + dz) for dx, a in span for dz, b in span if not bad(a, b)}


def _column(h):
    return {(0, y, 0) for y in range(h)}


def _giant_column(h):
    return {(x, y, z) for x in (0, 1) for z in (0, 1) for y in range(h - 1)} | {(0, h - 1, 0)}


def _blob(dice, h, r):
    """Oak, birch, jungle (r = 2) and swamp oak (r = 3): two small layers over two large ones."""
    leaves = set()
    for y in (0, -1, -2, -3):
        R = r - 1 - int(y / 2)
        leaves |= _layer((0, h, 0), y, R, lambda a, b: a == b == R and (y == 0 or dice.coin()))
    return _column(h), leaves


def _fancy(dice, h):
    """Fancy oak: branches at every height of a ball, each with a ball of leaves at its tip."""
    H = h + 2
    top = math.floor(.618 * H)
    logs, nodes, f = _column(top + 1), [(0, top, 0)], H / 2
    for y in range(H - 5, -1, -1):
        if y < .3 * H:
            break
        reach = .5 * math.sqrt(max(0, f * f - (f - y) ** 2))
        rho, angle = reach * (dice.random() + .328), 2 * math.pi * dice.random()
        tip = math.floor(rho * math.sin(angle) + .5), y - 1, math.floor(rho * math.cos(angle) + .5)
        slope = tip[1] - .381 * math.hypot(tip[0], tip[2])
        base = top if slope > top else int(slope)
        if base >= .2 * H:
            n = max(abs(tip[0]), abs(tip[1] - base), abs(tip[2])) or 1
            start, way = (0, base, 0), (tip[0], tip[1] - base, tip[2])
            logs |= {tuple(math.floor(.5 + p + j * d / n) for p, d in zip(start, way)) for j in range(n + 1)}
            nodes.append(tip)
    leaves = set()
    for node in nodes:
        for y, R in zip((4, 3, 2, 1, 0), (2, 3, 3, 3, 2)):
            leaves |= _layer(node, y, R, lambda a, b: (a + .5) ** 2 + (b + .5) ** 2 > R * R)
    return logs, leaves


def _spruce(dice, h):
    """Layers that grow and start again, each time a little wider."""
    low, R = max(4, h - dice.uniform(1, 2)), dice.uniform(2, 3)
    y, now, widest, again, leaves = dice.uniform(0, 2), dice.uniform(0, 1), 1, 0, set()
    for y in range(y, -low - 1, -1):
        leaves |= _layer((0, h, 0), y, now, lambda a, b: a == b == now > 0)
        if now >= widest:
            now, again, widest = again, 1, min(widest + 1, R)
        else:
            now += 1
    return _column(h), leaves


def _pine(dice, h):
    """A bare trunk with a tip of a few layers."""
    depth = dice.uniform(3, 4)
    R, now, leaves = 1 + dice.uniform(0, h - depth), 0, set()
    for y in range(1, -depth, -1):
        leaves |= _layer((0, h, 0), y, now, lambda a, b: a == b == now > 0)
        if now >= 1 and y == 2 - depth:
            now -= 1
        elif now < R:
            now += 1
    return _column(h), leaves


def _mega_conifer(dice, h, shallow, deep):
    """Mega spruce and mega pine: a cone around a 2x2 trunk, its crown shallow..deep blocks deep."""
    crown, before, leaves = dice.uniform(shallow, deep), 0, set()
    for y in range(h - crown, h + 1):
        d = h - y
        R = math.floor(3.5 * d / crown)
        r = R + 1 if d > 0 and R == before and y % 2 == 0 else R
        leaves |= _layer((0, 0, 0), y, r, lambda a, b: a + b >= 7 or a * a + b * b > r * r, giant=True)
        before = R
    return _giant_column(h), leaves


def _mega_jungle(dice, h):
    """A 2x2 trunk with a wide top and short branches down to half its height."""
    logs, nodes = _giant_column(h), [((0, h, 0), True, 2, 2)]  # node, giant, R at its top, layers below that
    i = h - 2 - dice.uniform(0, 3)
    while i > h // 2:
        angle = 2 * math.pi * dice.random()
        for step in range(5):
            x, z = (int(1.5 + step * f(angle)) for f in (math.cos, math.sin))
            logs.add((x, i - 3 + step // 2, z))
        nodes.append(((x, i, z), False, 0, 1 + dice.uniform(0, 1)))
        i -= 2 + dice.uniform(0, 3)
    leaves = set()
    for node, giant, top, depth in nodes:
        for y in range(0, -depth - 1, -1):
            R = top + 1 - y
            leaves |= _layer(node, y, R, lambda a, b: a + b >= 7 or a * a + b * b > R * R, giant)
    return logs, leaves


def _acacia(dice, h):
    """A trunk that leans one way, often a second arm another way, and a flat crown on each."""
    logs, leaves, x, z = set(), set(), 0, 0
    way, bend, steps = dice.uniform(0, 3), h - dice.uniform(0, 3) - 1, 3 - dice.uniform(0, 2)
    dx, dz = NORTH_EAST_SOUTH_WEST[way]
    for y in range(h):
        if y >= bend and steps > 0:
            x, z, steps = x + dx, z + dz, steps - 1
        logs.add((x, y, z))
    nodes, other = [((x, h, z), 1)], dice.uniform(0, 3)
    if other != way:
        dx, dz = NORTH_EAST_SOUTH_WEST[other]
        x, z, top = 0, 0, None
        start, steps = bend - dice.uniform(0, 1) - 1, 1 + dice.uniform(0, 2)
        for y in range(start, min(start + steps, h)):
            if y >= 1:
                x, z, top = x + dx, z + dz, y
                logs.add((x, y, z))
        if top is not None:
            nodes.append(((x, top + 1, z), 0))
    for node, e in nodes:
        leaves |= _layer(node, -1, 2 + e, lambda a, b: a == b == 2 + e) | _layer(node, 0, 1)
        leaves |= _layer(node, 0, 1 + e, lambda a, b: (a > 1 or b > 1) and a != 0 and b != 0)
    return logs, leaves


def _dark_oak(dice, h):
    """A 2x2 trunk that may lean, short pillars around its top, and a low roof of leaves."""
    dx, dz = NORTH_EAST_SOUTH_WEST[dice.uniform(0, 3)]
    bend, steps, x, z, logs = h - dice.uniform(0, 3), 2 - dice.uniform(0, 2), 0, 0, set()
    for y in range(h):
        if y >= bend and steps > 0:
            x, z, steps = x + dx, z + dz, steps - 1
        logs |= {(x + i, y, z + j) for i in (0, 1) for j in (0, 1)}
    top = (x, h - 1, z)
    leaves = _layer(top, -1, 2, giant=True) | _layer(top, 1, 2, lambda a, b: a + b > 2, giant=True)
    edge = (-3, 3, 4)
    leaves |= {(x + i, h - 1, z + j) for i in range(-3, 5) for j in range(-3, 5)
               if not (i in edge and j in edge)}
    if dice.coin():
        leaves |= _layer(top, 2, 0, giant=True)
    for i, j in itertools.product(range(-1, 3), repeat=2):
        if not (i in (0, 1) and j in (0, 1)) and dice.uniform(0, 2) == 0:
            logs |= {(i, h - 2 - k, j) for k in range(2 + dice.uniform(0, 2))}
            leaves |= _layer((i, h - 1, j), -1, 2, lambda a, b: a == b == 2) | _layer((i, h - 1, j), 0, 1)
    return logs, leaves


def _cherry(dice, h):
    """One or two long arms, a third of the trees with a top as well, and leaves that hang from the edge."""
    first, second = max(0, h - 1 - dice.uniform(3, 4)), max(0, h - 5)
    second += second >= first
    n = dice.uniform(1, 3)
    trunk = {1: first + 1, 2: max(first, second) + 1, 3: h}[n]
    logs, nodes, (dx, dz) = _column(trunk), [(0, h, 0)] * (n == 3), NORTH_EAST_SOUTH_WEST[dice.uniform(0, 3)]
    for start, sign in ((first, 1), (second, -1))[:min(n, 2)]:
        end_y = h - 1 - dice.uniform(0, 1)
        longer = start < trunk - 1 or end_y < start
        length, out, y = dice.uniform(2, 4) + longer, 0, start
        for _ in range(1 + longer):
            out += 1
            logs.add((sign * out * dx, y, sign * out * dz))
        while (distance := abs(length - out) + abs(end_y - y)) > 0:
            if dice.random() < abs(end_y - y) / distance:
                y += 1 if end_y > y else -1
            else:
                out += 1 if length > out else -1
            logs.add((sign * out * dx, y, sign * out * dz))
        nodes.append((sign * length * dx, end_y + 1, sign * length * dz))
    leaves = set()
    for node in nodes:
        for y, R in ((2, 1), (1, 2), (0, 3), (-1, 3), (-2, 2)):
            def bad(a, b):
                hole = y == -1 and max(a, b) == R and dice.random() < .25
                if R < 3:
                    return hole or a == b == R and dice.random() < .25
                return hole or a == b == R or a + b > 2 * R - 2 and dice.random() < .25
            layer = _layer(node, y, R, bad)
            leaves |= layer
            for x, level, z in sorted(layer) if y < 0 else ():
                if max(abs(x - node[0]), abs(z - node[2])) == R and dice.random() < 1 / 6:
                    leaves |= {(x, level - 1, z)} | ({(x, level - 2, z)} if dice.random() < 1 / 3 else set())
    return logs, leaves


class Kind(NamedTuple):
    species: str  # whose blocks it is made of
    height: tuple  # base, a, b: h is base + U{0..a} + U{0..b}
    rule: object
    reach: int  # of the widest tree: blocks from the trunk, in x or z
    top: int  # of the highest tree: blocks from the ground


KINDS = {
    "oak": Kind("oak", (4, 2, 0), functools.partial(_blob, r=2), 2, 7),
    "birch": Kind("birch", (5, 2, 0), functools.partial(_blob, r=2), 2, 8),
    "super_birch": Kind("birch", (5, 2, 6), functools.partial(_blob, r=2), 2, 14),
    "jungle": Kind("jungle", (4, 8, 0), functools.partial(_blob, r=2), 2, 13),
    "swamp_oak": Kind("oak", (5, 3, 0), functools.partial(_blob, r=3), 3, 9),
    "fancy_oak": Kind("oak", (3, 11, 0), _fancy, 7, 15),
    "spruce": Kind("spruce", (5, 2, 1), _spruce, 3, 11),
    "pine": Kind("spruce", (6, 4, 0), _pine, 3, 12),
    "mega_spruce": Kind("spruce", (13, 2, 14), functools.partial(_mega_conifer, shallow=13, deep=17), 5, 30),
    "mega_pine": Kind("spruce", (13, 2, 14), functools.partial(_mega_conifer, shallow=3, deep=7), 5, 30),
    "mega_jungle": Kind("jungle", (10, 2, 19), _mega_jungle, 8, 32),
    "acacia": Kind("acacia", (5, 2, 2), _acacia, 6, 10),
    "dark_oak": Kind("dark_oak", (6, 2, 1), _dark_oak, 6, 11),
    "cherry": Kind("cherry", (7, 1, 0), _cherry, 8, 11),
}


def grow(kind, dice):
    """Logs and leaves of one tree, unpruned: two sets of (x, y, z), the trunk's base at (0, 0, 0)."""
    base, a, b = KINDS[kind].height
    logs, leaves = KINDS[kind].rule(dice, base + dice.uniform(0, a) + dice.uniform(0, b))
    return logs, {cell for cell in leaves - logs if cell[1] >= 0}  # the ground is no air


def fitting(size, jitter=0):
    """Names of the kinds that a grid of this size holds with the trunk up to jitter blocks off the middle.

    Every tree of theirs: a kind of which some trees would leave the grid is refused as a whole, because
    drawing those again would change its law and its entropy.
    """
    return [name for name, kind in KINDS.items()
            if kind.reach + jitter <= size // 2 - 1 and kind.top <= size]


def _placed(kind, size, jitter, seed, i):
    """uint8 (n, n, n): tree i of a seed, unpruned, of a kind that fits."""
    dice, log = Dice(seed, list(KINDS).index(kind), i), 2 * SPECIES.index(KINDS[kind].species) + 1
    parts = grow(kind, dice)
    foot = np.array((size // 2 + dice.uniform(-jitter, jitter), 0, size // 2 + dice.uniform(-jitter, jitter)))
    v = np.zeros((size, size, size), np.uint8)
    for block, cells in zip((log, log + 1), parts):
        x, y, z = (np.array(list(cells)) + foot).T
        v[y, z, x] = block
    return v


# ------------------------------------------------------------------------------------------------------------
# Sets of trees

def trees(species, count, size=16, seed=SEEDS["train"], jitter=0, cache=CACHE):
    """A set of drawn trees.

    species: a name of KINDS, or several, which then take turns; count: trees; size: blocks a side, even;
    seed: int >= 0, see SEEDS; jitter: the trunk stands up to so many blocks off the middle, in x and z;
    cache: folder that keeps the set (None: nowhere).
    Returns a namespace: voxels uint8 (N, n, n, n), a memory map where there is a cache; species int64 (N,),
    positions in KINDS; slots, list of N dicts as describe() gives them; facts, one line to print.
    Raises ValueError in one line, for example when a kind does not fit the grid.
    """
    names = (species,) if isinstance(species, str) else tuple(species)
    if count < 1 or size < 8 or size % 2 or seed < 0 or jitter < 0:
        raise ValueError(f"trees: expected count >= 1, an even size >= 8, seed >= 0 and jitter >= 0, found "
                         f"{count}, {size}, {seed} and {jitter}")
    fits = fitting(size, jitter)
    for name in names or ("",):
        if name not in fits:
            why = "does not fit" if name in KINDS else "is unknown"
            place = f"{size}^3" + f" with jitter {jitter}" * (jitter > 0)
            raise ValueError(f"trees: species {name!r} {why}; what fits {place}: {', '.join(fits) or 'none'}")
    record = dict(names=names, count=count, size=size, seed=seed, jitter=jitter, recipe=RECIPE)
    found = SimpleNamespace(
        species=np.array([list(KINDS).index(names[i % len(names)]) for i in range(count)]),
        facts=f"{count:,} trees on {size}^3 ({', '.join(names)}), seed {seed}, jitter {jitter}")
    if cache is None:
        chunks = list(_chunks(record))
        found.voxels, found.slots = np.concatenate(chunks), [describe(v) for part in chunks for v in part]
        return found
    tag = hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()
    root = Path(cache).resolve() / f"trees_{tag}"
    if not _opened(root, found):
        _write(root, record)
        if not _opened(root, found):
            raise OSError(f"{root}: cannot be read back; delete it and try again")
    return found


def _chunks(record):
    """The trees of a record, pruned: uint8 (up to CHUNK, n, n, n) at a time."""
    names, count = record["names"], record["count"]
    with tqdm(total=count, desc="trees", unit="tree", disable=None) as bar:
        for i in range(0, count, CHUNK):
            part = [_placed(names[j % len(names)], record["size"], record["jitter"], record["seed"], j)
                    for j in range(i, min(i + CHUNK, count))]
            bar.update(len(part))
            yield repair(np.stack(part))  # a grown tree is whole but for leaves too far from a log


def _write(root, record):
    """Into a folder that gets its name when it is complete: a kill leaves no half of a set."""
    folder = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        slots, shape = [], (record["count"],) + 3 * (record["size"],)
        with open(folder / "voxels.npy", "wb") as file:  # no writable map: a full disk must raise
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            for part in _chunks(record):
                file.write(part.tobytes())
                slots += [describe(v) for v in part]
        (folder / "index.json").write_text(json.dumps(dict(record, slots=slots)))
        shutil.rmtree(root, ignore_errors=True)  # damaged, or it would have been opened
        try:
            os.replace(folder, root)
        except OSError:  # another process made the same set in the meantime
            if not root.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _opened(root, found):
    """Fill in voxels and slots; False when the folder is not there or damaged."""
    try:
        found.slots = json.loads((root / "index.json").read_text())["slots"]
        found.voxels = np.load(root / "voxels.npy", mmap_mode="r")
        return len(found.voxels) == len(found.slots) == len(found.species)  # np.load notices missing bytes
    except (OSError, ValueError, KeyError, EOFError):
        return False


def load(path, size=16):
    """Own trees, brought onto the grid: the lowest layer on y = 0, the middle of the trunk at n/2.

    path: .npy, uint8 (N, y, z, x) or (y, z, x) in the classes above; or .npz with such an array `voxels`, or
        with role and block, integers (N, x, y, z) that index role_names and block_names: what has the role
        wood or leaves is kept. Its species is read from the block's name; mangrove and others that are none
        of the seven take the commonest species of their tree. name (N,) is used when it is there.
    size: blocks a side of the result: around the trunk more air is added or cut away, never a block.
    Returns a namespace as trees() does, and left_out, a list of "name: reason" for each tree that has no log
    on its lowest layer, no known species, or does not fit; facts counts them. Raises ValueError in one line.
    """
    path = Path(path)
    try:
        stored = np.load(path, allow_pickle=False)
        arrays = dict(voxels=stored) if isinstance(stored, np.ndarray) else dict(stored)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected plain arrays, found {type(error).__name__}: "
                         f"{' '.join(str(error).split())}; save it again with np.save or np.savez") from None
    if "voxels" in arrays:
        blocks = arrays["voxels"]
        blocks = blocks[None] if blocks.ndim == 3 else blocks
    elif {"role", "block", "role_names", "block_names"} <= set(arrays):
        blocks = _from_roles(arrays)
    else:
        raise ValueError(f"{path}: expected voxels, or role, block, role_names and block_names, found "
                         f"{', '.join(arrays) or 'nothing'}; save it again under those names")
    if blocks.ndim != 4 or blocks.dtype.kind not in "ui" or not blocks.size or not (
            0 <= blocks.min() and blocks.max() < MASK):
        raise ValueError(f"{path}: expected trees (N, y, z, x) of classes 0..{MASK - 1}, found "
                         f"{blocks.dtype} {blocks.shape} with {np.unique(blocks)[-3:].tolist()}")
    names = arrays.get("name", [f"tree {i}" for i in range(len(blocks))])
    voxels, left_out, reasons = [], [], Counter()
    for name, tree in zip(names, blocks.astype(np.uint8)):
        v, reason = _centred(tree, size)
        if reason:
            left_out.append(f"{name}: {reason}")
            reasons[reason] += 1
        else:
            voxels.append(v)
    if not voxels:
        raise ValueError(f"{path}: expected trees that fit {size}^3, found none of {len(blocks)}: "
                         f"{', '.join(f'{n} {reason}' for reason, n in reasons.most_common())}")
    found = SimpleNamespace(voxels=np.stack(voxels), left_out=left_out)
    found.slots = [describe(v) for v in found.voxels]
    found.species = np.array([list(KINDS).index(s["species"]) for s in found.slots])
    found.facts = (f"{path}: {len(voxels)} of {len(blocks)} trees on {size}^3, "
                   f"{scs(found.voxels).valid.sum()} of them valid"
                   + "".join(f"; {n} left out: {why}" for why, n in reasons.most_common()))
    return found


def _from_roles(arrays):
    """role, block int (N, x, y, z) and their names -> int8 (N, y, z, x); a tree of unknown species is air."""
    roles = [("wood", "leaves").index(r) + 1 if r in ("wood", "leaves") else 0 for r in arrays["role_names"]]
    names = [re.sub("^minecraft:(stripped_)?|_(log|wood|leaves)$", "", b) for b in arrays["block_names"]]
    names = ["dark_oak" if name == "pale_oak" else name for name in names]  # grows by the same rule
    known = [SPECIES.index(name) if name in SPECIES else -1 for name in names]
    role, species = np.array(roles, np.int8)[arrays["role"]], np.array(known, np.int8)[arrays["block"]]
    for part, kind in zip(role, species):
        count = np.bincount(kind[(part > 0) & (kind >= 0)], minlength=len(SPECIES))
        kind[kind < 0] = count.argmax()
        part *= count.any()
    return np.where(role > 0, 2 * species + role, AIR).transpose(0, 2, 3, 1)


def _centred(tree, size):
    """uint8 (y, z, x) -> (n, n, n) with the trunk in the middle, and why not (None: it fits)."""
    cells = np.argwhere(tree > 0)
    if not len(cells):
        return None, "no block of a known species"
    low = cells[:, 0].min()
    foot = _footprint(tree[low:])
    if not len(foot):
        return None, "no log on its lowest layer"
    middle = (foot.min(0) + foot.max(0)) // 2  # z, x
    moved = cells - (low, *middle) + (0, size // 2, size // 2)
    if moved.min() < 0 or moved.max() >= size:
        return None, "does not fit"
    v = np.zeros((size, size, size), np.uint8)
    v[tuple(moved.T)] = tree[tuple(cells.T)]
    return v, None


# ------------------------------------------------------------------------------------------------------------
# The trunk and the symmetries about it

def _footprint(v):
    """int (k, 2): cells (z, x) of the largest 8-connected set of logs on y = 0; k = 0 where there is none."""
    rest, best = set(map(tuple, np.argwhere(is_log(v[0])).tolist())), []
    while rest:
        part = [min(rest)]
        rest -= set(part)
        for z, x in part:  # grows while it is gone through
            near = rest & {(z + dz, x + dx) for dz in (-1, 0, 1) for dx in (-1, 0, 1)}
            part += near
            rest -= near
        best = max(best, part, key=len)
    return np.array(best, int).reshape(-1, 2)


def trunk_axis(v):
    """Twice the (z, x) of the trunk's axis: a block's middle for a 1x1 trunk, a corner of four for a 2x2."""
    foot = _footprint(v)
    if not len(foot):
        return np.full(2, len(v) // 2 * 2)
    twice = foot.min(0) + foot.max(0)
    return twice if (twice % 2).all() else twice // 2 * 2


D4 = np.array([turn for a in (1, -1) for b in (1, -1)
               for turn in ([[a, 0], [0, b]], [[0, a], [b, 0]])])  # (8, 2, 2), the first changes nothing


def _turned(v):
    """The blocks under each of the eight symmetries about the trunk's axis: cells int (M, 3), and (8, M, 2)
    for their z and x after it. Never about the grid's middle: that would give eight places for the trunk."""
    cells, axis = np.argwhere(v > AIR), trunk_axis(v)
    return cells, ((2 * cells[:, 1:] - axis) @ D4.transpose(0, 2, 1) + axis) // 2


def symmetries(v):
    """uint8 (8, n, n, n): a tree (n, n, n) under the eight symmetries about its trunk, itself first. What
    they move out of the grid is cut off."""
    cells, turned = _turned(v)
    copies = np.zeros((8, *v.shape), np.uint8)
    for copy, (z, x) in zip(copies, turned.transpose(0, 2, 1)):
        inside = (np.minimum(z, x) >= 0) & (np.maximum(z, x) < len(v))
        copy[cells[inside, 0], z[inside], x[inside]] = v[tuple(cells[inside].T)]
    return copies


def augment(v, g, jitter=0):
    """Turn or mirror a tree (n, n, n) about its trunk, and move it by up to jitter blocks in x and z; g: a
    numpy Generator. Drawn evenly among what keeps every block inside the grid."""
    n, (cells, turned) = len(v), _turned(v)
    if not len(cells):
        return v.copy()
    inside = [k for k in range(8) if turned[k].min() >= 0 and turned[k].max() < n]
    places = turned[g.choice(inside)]
    low, high = np.maximum(-jitter, -places.min(0)), np.minimum(jitter, n - 1 - places.max(0))
    places = places + g.integers(low, high + 1)
    result = np.zeros_like(v)
    result[cells[:, 0], places[:, 0], places[:, 1]] = v[tuple(cells.T)]
    return result


# ------------------------------------------------------------------------------------------------------------
# Structure: one trunk, connected wood, leaves near wood, one solid body

AROUND = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)])  # 26 neighbours


def _components(at, size, steps):
    """Label connected cells: each gets the position in `at` of the first cell of its component.

    at: int (M,), flat positions, ascending; size: cells in all; steps: flat distances to the neighbours.
    Every component hooks onto the smallest label around it, then labels are followed to their end: the
    number of rounds grows with the logarithm of the longest path.
    """
    number = np.full(size, len(at), np.int32)  # len(at): nobody
    number[at] = np.arange(len(at))
    near, root = number[at[:, None] + steps], np.arange(len(at) + 1)
    while True:
        low, new = root[near].min(1), root.copy()
        np.minimum.at(new, root[:-1], low)
        new = new[new]
        if np.array_equal(new, root):
            return root[:-1]
        root = new


def _largest(root, tree, trees, allowed=True):
    """bool (M,): the cells of the largest component of each tree, the first of several; allowed bool (M,)."""
    score = np.where(allowed, np.bincount(root, minlength=1)[root] * (len(root) + 1) - root, 0)
    best = np.zeros(trees, np.int64)
    np.maximum.at(best, tree, score)
    return (score > 0) & (score == best[tree])


class _Anatomy:
    """What scs() and broken() need to know of trees (N, n, n, n), in cells of a grid with a frame of air."""

    def __init__(self, v):
        self.trees, self.side = len(v), v.shape[1] + 2
        self.block = np.zeros((len(v),) + 3 * (self.side,), np.uint8)
        self.block[:, 1:-1, 1:-1, 1:-1] = np.where(v == MASK, AIR, v)
        self.block = self.block.ravel()
        self.near26 = AROUND @ (self.side ** 2, self.side, 1)
        self.near8 = self.near26[AROUND[:, 0] == 0]
        self.near6 = self.near26[np.abs(AROUND).sum(1) == 1]
        self.blocks = np.flatnonzero(self.block)
        wood = is_log(self.block[self.blocks])
        self.logs, self.leaves = self.blocks[wood], self.blocks[~wood]
        root = _components(self.logs, self.block.size, self.near26)
        ground = self.logs // self.side ** 2 % self.side == 1
        standing = np.isin(root, root[ground])
        self.main = self.logs[_largest(root, self.tree(self.logs), self.trees, standing)]
        self.ground = self.logs[ground]
        self.feet = _components(self.ground, self.block.size, self.near8)

    def tree(self, cells):
        """Which tree each cell belongs to."""
        return cells // self.side ** 3

    def count(self, cells):
        """int (N,): how many of the cells each tree has."""
        return np.bincount(self.tree(cells), minlength=self.trees)

    def distance(self, wood):
        """uint8 (number of leaves,): steps through leaves to one of these logs; 7 stands for more than 6."""
        steps = np.full(self.block.size, FAR + 1, np.uint8)
        steps[wood] = 0
        for d in range(1, FAR + 1):
            rest = self.leaves[steps[self.leaves] > FAR]
            steps[rest[(steps[rest[:, None] + self.near6] == d - 1).any(1)]] = d
        return steps[self.leaves]


def _in_chunks(f, v):
    """f on (N, n, n, n) for any leading axes of v, CHUNK trees at a time."""
    v = np.asarray(v)
    flat = v.reshape(-1, *v.shape[-3:])
    parts = [f(flat[i:i + CHUNK]) for i in range(0, len(flat), CHUNK)]
    return np.concatenate(parts).reshape(*v.shape[:-3], *parts[0].shape[1:])[()]


PARTS = ("trunk", "wood", "leaf", "solid")


def scs(v):
    """Structural Consistency Score of trees uint8 (..., n, n, n). MASK counts as air.

    Returns a namespace of floats or arrays (...), all 0 for fewer than 3 logs or 8 leaves:
        trunk    1 / number of 8-connected sets of logs on y = 0 (0: none)
        wood     share of logs in the main wood: the largest 26-connected part that stands on y = 0
        leaf     share of leaves within 6 steps of the main wood, 6-connected, through leaves of any kind
        solid    share of blocks in the largest 26-connected part of all
        species  share of blocks of the commonest species; only reported
        scs      trunk * wood * leaf * solid; valid: whether all four are 1
    Wood must be 26-connected: by 6 every acacia and most mega jungles would be broken.
    """
    parts = _in_chunks(_scs, v)
    result = SimpleNamespace(**{name: parts[..., k] for k, name in enumerate(PARTS + ("species",))})
    result.scs = parts[..., :4].prod(-1)
    result.valid = (parts[..., :4] == 1).all(-1)
    return result


def _scs(v):
    """float64 (N, 5): trunk, wood, leaf, solid, species."""
    a = _Anatomy(v)
    logs, leaves = a.count(a.logs), a.count(a.leaves)
    body = a.blocks[_largest(_components(a.blocks, a.block.size, a.near26), a.tree(a.blocks), a.trees)]
    feet = a.count(a.ground[np.unique(a.feet)])
    species = [a.count(a.blocks[(a.block[a.blocks] + 1) // 2 == k]) for k in range(1, 8)]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.stack([np.where(feet, 1 / feet, 0), a.count(a.main) / logs,
                          a.count(a.leaves[a.distance(a.main) <= FAR]) / leaves,
                          a.count(body) / (logs + leaves), np.max(species, 0) / (logs + leaves)], 1)
    return np.where(((logs >= 3) & (leaves >= 8))[:, None], parts, 0)


def broken(v):
    """bool like v (..., n, n, n): logs outside the main wood, the main wood's footprints other than its
    largest, and leaves more than 6 steps from the wood that is left."""
    return _in_chunks(_broken, v)


def _broken(v):
    a = _Anatomy(v)
    largest = _largest(a.feet, a.tree(a.ground), a.trees, np.isin(a.ground, a.main))
    good = np.setdiff1d(a.main, a.ground[~largest])
    bad = np.zeros(a.block.size, bool)
    bad[a.logs] = True
    bad[good] = False
    bad[a.leaves] = a.distance(good) > FAR
    return bad.reshape((a.trees,) + 3 * (a.side,))[:, 1:-1, 1:-1, 1:-1]


def repair(v):
    """v without its broken blocks: nearly always valid, so this score alone says nothing. Where the trunk is
    cut, or a false one has more logs than the true one, less than a tree is left, and the score is 0."""
    return np.where(broken(v), np.uint8(AIR), v)


LADDER = ("second trunk", "floating leaves", "cut trunk", "no ground logs", "noise 1e-4", "noise 1e-3",
          "noise 1e-2")


def corrupt(v, kind, g):
    """A damaged copy of one tree (n, n, n), to see what a score notices; g: a numpy Generator.

    kind: 'second trunk' (3 to 6 logs, 7 blocks off along x or z), 'floating leaves' (two 2^3 cubes that touch
    nothing), 'cut trunk' (no logs in one of the layers 1..3), 'no ground logs' (none on y = 0), or 'noise R'
    (each block becomes air, log or leaves with probability R).
    """
    v, n, wood = v.copy(), len(v), is_log(v)
    log = 2 * SPECIES.index(describe(v)["species"]) + 1
    if kind == "second trunk":
        feet = trunk_axis(v) // 2 + 7 * np.array(NORTH_EAST_SOUTH_WEST)
        z, x = g.choice(feet[((feet >= 0) & (feet < n)).all(1)])
        v[:g.integers(3, 7), z, x] = log
    elif kind == "floating leaves":
        for _ in range(2):
            near = np.ones(3 * (n - 1,), bool)
            while near.any():  # until a cube and the blocks around it are air
                at = g.integers(0, n - 1, 3)
                near = v[tuple(slice(max(p - 1, 0), p + 3) for p in at)] > AIR
            v[tuple(slice(p, p + 2) for p in at)] = log + 1
    elif kind == "cut trunk":
        y = g.integers(1, 4)
        v[y][wood[y]] = AIR
    elif kind == "no ground logs":
        v[0][wood[0]] = AIR
    elif kind.startswith("noise "):
        hit = g.random(v.shape) < float(kind[6:])
        v[hit] = g.choice(np.array((AIR, log, log + 1), np.uint8), hit.sum())
    else:
        raise ValueError(f"corrupt: expected one of {', '.join(LADDER)}, found {kind!r}")
    return v


# ------------------------------------------------------------------------------------------------------------
# Statistics of a tree, and the entropy of a kind

STATISTICS = ("height", "logs", "leaves", "crown x", "crown z", "crown base", "offset", "symmetry",
              "off axis", "nodes")


def statistic_names(size):
    """Names of the columns of statistics(): those of STATISTICS, then the leaves of each layer."""
    return STATISTICS + tuple(f"leaves y={y}" for y in range(size))


def statistics(v):
    """phi of trees (N, n, n, n): float64 (N, 10 + n), in the order of statistic_names(n).

    height, logs, leaves; crown x and z: how far leaves spread, in blocks; crown base: lowest y with leaves;
    offset: of the centre of mass from the trunk's axis, in blocks; symmetry: mean IoU with the seven turned
    and mirrored copies about the trunk (equal blocks / cells filled in either); off axis: logs outside the
    trunk's columns; nodes: tops of wood, 26-connected groups of logs with no log in the nine cells above.
    """
    return np.array([_phi(tree) for tree in v]).reshape(len(v), len(STATISTICS) + np.shape(v)[-1])


def _phi(v):
    v = np.where(v == MASK, AIR, v)
    logs, leaves = is_log(v), is_leaf(v)
    cells, turned = _turned(v)
    if not len(cells):
        return np.zeros(len(STATISTICS) + len(v))
    crown = np.argwhere(leaves)
    base, *spread = (crown.min(0)[0], *np.ptp(crown, 0)[:0:-1] + 1) if len(crown) else (0, 0, 0)
    offset = np.hypot(*(cells[:, 1:].mean(0) - trunk_axis(v) / 2))
    inside = ((turned >= 0) & (turned < len(v))).all(-1)  # (8, M)
    there = np.where(inside, v[(cells[:, 0], *turned.clip(0, len(v) - 1).transpose(2, 0, 1))], AIR)
    iou = (there == v[tuple(cells.T)]).sum(1) / (2 * len(cells) - (there > AIR).sum(1))
    return np.r_[cells[:, 0].max() + 1, logs.sum(), leaves.sum(), spread, base, offset, iou[1:].mean(),
                 logs.sum() - logs[:, *_footprint(v).T].sum(), _tops(logs), leaves.sum((1, 2))]


def _tops(logs):
    """How many 26-connected groups there are of logs (n, n, n) with no log in the nine cells above."""
    wood, side = np.pad(logs, 1).ravel(), len(logs) + 2
    at, near = np.flatnonzero(wood), AROUND @ (side * side, side, 1)
    tops = at[~wood[at[:, None] + near[AROUND[:, 0] == 1]].any(1)]
    return len(np.unique(_components(tops, wood.size, near)))


class _Path(Dice):
    """Dice that repeat a list of choices, then take the first of each; they keep the number of options."""

    def __init__(self, choices):
        self.choices, self.options, self.coins = list(choices), [], 0

    def uniform(self, low, high):
        self.options.append(high - low + 1)
        if len(self.options) > len(self.choices):
            self.choices.append(0)
        return low + self.choices[len(self.options) - 1]

    def coin(self):
        self.coins += 1
        return False


ENUMERABLE = tuple(name for name in KINDS if name not in ("fancy_oak", "mega_jungle", "dark_oak", "cherry"))


@functools.cache
def _law(kind):
    """Every tree of a kind and its probability, a dict, with all coins at False; and the mean number of its
    coins, each of which decides one corner of leaves that nothing else decides."""
    chance, coins, todo = defaultdict(float), 0.0, [[]]
    while todo:
        path = _Path(start := todo.pop())
        tree = tuple(map(frozenset, grow(kind, path)))
        p = 1 / math.prod(path.options)
        chance[tree] += p
        coins += p * path.coins
        for i in range(len(start), len(path.options)):  # the other options of each choice that is new
            todo += [path.choices[:i] + [k] for k in range(1, path.options[i])]
    return chance, coins


def entropy_bits(kind, jitter=0, among=()):
    """Exact bits of the trees of a kind, -E log2 p(tree): no model's bits per tree can be lower.

    among: the kinds that a caption may mean, each as likely, this one with them: 'oak' means three. p is then
    their mean, and choosing the kind costs bits as well, up to log2 of their number. (A training caption
    that says 'oak' alone is 6 % rarer for trees with branches, worth .03 bits that are neglected.) Kinds with
    angles cannot be gone through, but none of their trees is one of the others'. Raises ValueError for such
    a kind.
    Counts trees that fit any grid; jitter adds log2((2 jitter + 1)^2).
    """
    if kind not in ENUMERABLE:
        raise ValueError(f"entropy_bits: expected one of {', '.join(ENUMERABLE)}, found {kind!r}")
    (chance, coins), kinds = _law(kind), {kind, *among}
    laws = [_law(name)[0] for name in kinds if name in ENUMERABLE]
    mean = {tree: sum(law.get(tree, 0.0) for law in laws) / len(kinds) for tree in chance}
    bits = -sum(p * math.log2(mean[tree]) for tree, p in chance.items())
    return bits + coins + 2 * math.log2(2 * jitter + 1)


# ------------------------------------------------------------------------------------------------------------
# Prompts

SLOTS = ("size", "species", "height", "trunk", "crown", "branches")
SAY = dict(  # every word for a value; the first is the usual one
    size=dict(small=("small", "short", "little"), normal=("normal", "average"),
              large=("large", "tall", "big")),
    trunk={"1x1": ("1x1",), "2x2": ("2x2",)},
    crown=dict(narrow=("narrow", "slim"), medium=("medium",), wide=("wide", "broad")),
    branches={True: ("branches",)},
    species={name: (name,) for name in SPECIES})
FILLERS = "a an the tree with and block blocks high trunk crown".split()
MEANING = {word: (slot, value) for slot, values in SAY.items() for value, said in values.items()
           for word in said}
HIGHEST = 32  # blocks: the largest number a prompt may say


def describe(v):
    """What can be said of a tree (n, n, n), measured on it: a dict of SLOTS.

    species: of most blocks; height: blocks; size: small up to 6 high, normal up to 9, large; trunk: '1x1' or
    '2x2' (its footprint is two or more wide both ways); crown: the wider spread of its leaves, narrow up to
    5, medium up to 9, wide; branches: whether logs stand off the trunk's columns. {} for an empty grid.
    """
    filled = np.argwhere((v > AIR) & (v < MASK))
    if not len(filled):
        return {}
    height, foot, logs = int(filled[:, 0].max()) + 1, _footprint(v), is_log(v)
    crown = np.argwhere(is_leaf(v))
    width = int(np.ptp(crown, 0)[1:].max()) + 1 if len(crown) else 0
    return dict(
        size="small" if height <= 6 else "normal" if height <= 9 else "large",
        species=SPECIES[np.bincount((v[tuple(filled.T)] - 1) // 2).argmax()],
        height=height,
        trunk="2x2" if len(foot) and np.ptp(foot, 0).min() >= 1 else "1x1",
        crown="narrow" if width <= 5 else "medium" if width <= 9 else "wide",
        branches=bool(logs.sum() > logs[:, *foot.T].sum()))


def phrase(slots, g=None):
    """The caption that says all of these slots: 'large spruce, 11 blocks, 1x1 trunk, medium crown'. With g, a
    numpy Generator, words are drawn among those of SAY, and half of the time 'tree' follows the species."""
    def word(slot):
        words = SAY[slot][slots[slot]]
        return words[0] if g is None else words[g.integers(len(words))]
    head = [word("size")] if "size" in slots else []
    head += [word("species").replace("_", " ")] if "species" in slots else []
    head += ["tree"] if head and g is not None and g.random() < .5 else []
    parts = [" ".join(head)] if head else []
    parts += [f"{slots['height']} blocks"] if "height" in slots else []
    parts += [f"{word(slot)} {slot}" for slot in ("trunk", "crown") if slot in slots]
    return ", ".join(parts + (["with branches"] if slots.get("branches") else []))


def caption(slots, g, empty=.1):
    """A training caption: '' with probability empty; else with .3 the species alone, or every other slot kept
    with probability one half. The empty ones teach a model what guidance compares with; 0 when evaluating."""
    if g.random() < empty:
        return ""
    keep = .5 * (g.random() >= .3)
    return phrase({s: value for s, value in slots.items() if s == "species" or g.random() < keep}, g)


def words():
    """The known vocabulary: every word ([a-z0-9]+) that a caption or a prompt may hold, sorted."""
    return sorted({part for word in (*MEANING, *FILLERS) for part in word.split("_")}
                  | set(map(str, range(1, HIGHEST + 1))))


def parse(prompt):
    """What a prompt asks for, a dict of some SLOTS: 'tall oak tree' is {'size': 'large', 'species': 'oak'}.

    A number is the height in blocks. Raises ValueError in one line for an unknown word, with all known ones,
    and for two wishes that exclude each other.
    """
    slots = {}
    for word in " ".join(re.findall("[a-z0-9]+", prompt.lower())).replace("dark oak", "dark_oak").split():
        if word in FILLERS:
            continue
        if re.fullmatch("[0-9]+", word) and 1 <= int(word) <= HIGHEST:
            slot, value = "height", int(word)
        elif word in MEANING:
            slot, value = MEANING[word]
        else:
            known = ", ".join(sorted((*MEANING, *FILLERS))).replace("_", " ")
            raise ValueError(f"prompt {prompt!r}: unknown word {word!r}; known: {known}, 1 to {HIGHEST}")
        if slots.setdefault(slot, value) != value:
            raise ValueError(f"prompt {prompt!r}: expected one {slot}, found {slots[slot]} and {value}")
    return slots


def faithful(v, slots):
    """dict slot -> bool: whether a tree (n, n, n) has what was asked, measured on it."""
    found = describe(v)
    return {slot: found.get(slot) == value for slot, value in slots.items()}


# ------------------------------------------------------------------------------------------------------------
# Pictures

COLOURS = np.array([  # by class, RGB
    (0, 0, 0), (125, 98, 58), (96, 153, 52), (222, 219, 208), (141, 180, 84), (96, 68, 40), (62, 106, 72),
    (112, 88, 44), (58, 150, 42), (128, 112, 100), (134, 158, 50), (76, 58, 34), (70, 116, 38), (88, 48, 56),
    (242, 178, 203), (150, 170, 200)], np.float32)
WOOD, PAPER = np.array((205, 170, 120)), np.array((250, 248, 243))  # inside a log; behind all
FACES = ((1, 0, 0), 1.06), ((0, 1, 0), .84), ((0, 0, 1), .66)  # top, left, right: outward (y, z, x), light
RISE = 1.22  # height of a block over half its width, as one sees it
SMOOTH = 3  # drawn so many times larger, then averaged


@functools.cache
def _stamp(a, b):
    """A cube in pixels: face int8 (H, W), 0 none, 1 top, 2 left, 3 right; edge bool, where a face begins."""
    rows, cols = np.mgrid[:a + b, :2 * a] + .5
    slant = np.abs(cols - a) / 2  # rows, by which an edge towards a side corner has risen or fallen: 2:1
    side = np.where(cols < a, 2, 3) * (rows <= a + b - slant)
    face = np.where(rows > a - slant, side, rows >= slant).astype(np.int8)
    return face, (face > 0) & ((face != np.roll(face, 1, 0)) | (face != np.roll(face, 1, 1)))


def render(v, pixels=160, frame=None, glass=0.0):
    """A shaded picture of one grid (n, n, n), seen from above a corner: uint8 (pixels, pixels, 3).

    frame: how many blocks, corner to corner, are as wide as the picture: give it for one scale in several
    pictures, with the middle of the grid's floor at 4/5 of the height; None: as few as hold the tree.
    glass: opacity of MASK blocks, 0 leaves them out; .04 shows a cloud, and takes a few tenths of a second.
    Painter's algorithm: cubes from back to front, three faces each, those behind another block left out.
    """
    solid = np.pad((v > AIR) & (v < MASK), 1)
    shown = solid | np.pad((v == MASK) & (glass > 0), 1)
    cells = np.argwhere(shown) - 1
    cells = cells[np.argsort(cells.sum(1), kind="stable")]  # from back to front
    y, z, x = (cells - (0, len(v) // 2, len(v) // 2)).T
    floor = .8
    if frame is None:  # all in half widths of a block, with some room for the shadow
        front, top = ((x + z) / 2 + 2.5).max(initial=1), (RISE * y - (x + z) / 2 + 2.5).max(initial=1)
        frame = max(np.abs(x - z).max(initial=1) + 2.5, (front + top) / 2)
        floor = .5 + (top - front) / (4 * frame)
    large = SMOOTH * pixels
    a = max(2, int(large / (4 * frame)) * 2)  # half a block's width, in pixels: even, to be halved once more
    b = round(RISE * a)
    tops, lefts = int(floor * large) + (x + z - 1) * a // 2 - (y + 1) * b, large // 2 + (x - z - 1) * a

    blocks, inner = v[tuple(cells.T)], tuple((cells + 1).T)
    crowd = sum(np.roll(solid, step, (0, 1, 2)).astype(int) for step in AROUND) + solid
    grain = np.sin((cells * (37.1, 57.3, 91.7)).sum(1) ** 2)  # of each block, the same in every picture
    colours = np.zeros((len(cells), 4, 4), np.float32)  # by face: RGB, opacity 0 where another block hides it
    for face, (step, light) in enumerate(FACES, 1):
        beyond = tuple((cells + 1 + step).T)
        light = light * (1 + .06 * grain) * (1 - .035 * (crowd[beyond] - 9).clip(0))  # 9: before a flat wall
        colours[:, face, :3] = (COLOURS[blocks] * light[:, None]).clip(0, 255)
        colours[:, face, 3] = ~np.where(solid[inner], solid[beyond], shown[beyond])
    colours[is_log(blocks), 1, :3] += .5 * (WOOD - colours[is_log(blocks), 1, :3])  # the cut end is lighter
    face, edge = _stamp(a, b)
    canvas = np.zeros((large, large, 4), np.float32)  # opacity, and RGB times opacity
    for i in np.flatnonzero(colours[..., 3].any(1)):
        top, left = max(tops[i], 0), max(lefts[i], 0)
        part = canvas[top:max(tops[i] + a + b, 0), left:max(lefts[i] + 2 * a, 0)]
        cut = tuple(slice(k, k + m) for k, m in zip((top - tops[i], left - lefts[i]), part.shape))
        paint = colours[i][face[cut]]
        paint[edge[cut], :3] *= .86
        seen = paint[..., 3] > 0
        part[seen] += (glass if blocks[i] == MASK else 1) * (paint[seen] - part[seen])
    small = canvas.reshape(pixels, SMOOTH, pixels, SMOOTH, 4).mean((1, 3))
    behind = _shadow(solid[1:-1, 1:-1, 1:-1], pixels, a / SMOOTH, floor)[..., None] * PAPER
    return (small[..., :3] + (1 - small[..., 3:]) * behind).clip(0, 255).astype(np.uint8)


def _shadow(solid, pixels, a, floor):
    """float (pixels, pixels): how bright the floor is under a tree, .75..1.

    solid: bool (n, n, n); a: half a block's width in pixels; floor: its middle, in heights of the picture.

    Every block casts a Gaussian. On the picture x - z runs along a row and x + z down a column, so each is a
    product of two factors, and their sum a product of two matrices.
    """
    y, z, x = np.argwhere(solid).T - np.array([[0], [len(solid) // 2], [len(solid) // 2]])
    x, z = x + .15 * y, z - .05 * y  # the light comes from the left
    across, down = (np.arange(pixels) - pixels / 2) / a, (np.arange(pixels) - floor * pixels) / a * 2
    rows, cols = (np.exp(-((p[:, None] - q) / 1.6) ** 2) for p, q in ((down, x + z), (across, x - z)))
    return .75 + .25 * np.exp(-.12 * rows @ cols.T)


# ------------------------------------------------------------------------------------------------------------
# Commands

def preview(path="runs/preview_trees.png", seed=SEEDS["train"]):
    """Write a PNG: two trees of every kind over their captions. Returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = len(KINDS) // 2
    figure, panels = plt.subplots(4, columns, figsize=(17.5, 13), facecolor="#faf8f3", gridspec_kw=dict(
        left=.005, right=.995, bottom=.04, top=.97, wspace=.02, hspace=.27))
    for k, kind in enumerate(KINDS):
        voxels = trees(kind, 2, 32, seed, cache=None).voxels
        for j, v in enumerate(voxels):
            panel = panels[2 * (k // columns) + j, k % columns]
            panel.imshow(render(v, 400))
            panel.set_axis_off()
            panel.text(.5, -.02, textwrap.fill(phrase(describe(v)), 32), transform=panel.transAxes,
                       ha="center", va="top", fontsize=10, color="#666666")
            if j == 0:
                panel.set_title(kind.replace("_", " "), fontsize=14, color="#333333")
    return written(figure, path)


USAGE = "usage: python -m data.trees [preview [PNG]] | check FILE [SIZE]"


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr."""
    command, *rest = arguments or ["preview"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "preview" and len(rest) <= 1:
        print(f"wrote {preview(*rest)}")
    elif command == "check" and 1 <= len(rest) <= 2 and rest[1:] in ([], ["16"], ["32"]):
        found = load(rest[0], *map(int, rest[1:]))
        print("\n".join([*found.left_out, found.facts]))
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
