"""
Files of block games: reads and writes trees, so that they stay alive in the game.

A tree is v[y, z, x], uint8: y grows upwards, x to the east, z to the south, as in the files. BLOCKS names
the classes: 0 is air, odd ones are logs, even ones leaves. 15, the model's MASK, is never in a file.

    file                           read   written             facts from
    .schem (Sponge 1, 2, 3)        yes    version 2           SpongePowered/Schematic-Specification
    .schematic (MCEdit)            yes                        block ids of Minecraft 1.12 and before
    .nbt (structure)               yes    without air         the game's structure blocks, /place template
    .litematic                     yes    version 6           the Litematica mod, as litemapy reads it
    .vox (MagicaVoxel)             yes    colours             ephtracy/voxel-model; z is up there

The content decides how a file is read, the name how it is written. All but .vox are NBT, mostly in gzip.

A leaf decays in the game when its `distance`, the steps through leaves to a log, is 7, and at first the game
trusts the file; so write() counts the steps. It also lays each log along its neighbours.

    python -m data.voxel_files FILE [FILE ...]                  # what is in them
    python -m data.voxel_files convert IN OUT [BLOCK=NAME ...]  # such as tfc:wood/log/aspen=birch_log

Does not: keep entities, contents of chests or biomes, write other blocks, read Bedrock's .mcstructure.
"""
import gzip
import math
import os
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data.trees import SPECIES

BLOCKS = ("air", *(f"{species}_{part}" for species in SPECIES for part in ("log", "leaves")))  # by class
EMPTY = {"air", "cave_air", "void_air", "structure_void", "barrier"}  # builders leave invisible barriers
VERSION, CHERRY_VERSION = 2975, 3463  # DataVersion of Minecraft 1.18.2; of 1.20, which brought cherries
FARTHEST = 7  # largest leaf distance: such a leaf decays
LONGEST = 256  # blocks along an axis that write() takes: .vox has one byte for a position
MAX_BLOCKS, MAX_BYTES, DEPTH = 256 ** 3, 1 << 28, 128  # of a file, of it unzipped, of NBT in NBT

OLD = {(17, 0): "oak", (17, 1): "spruce", (17, 2): "birch", (17, 3): "jungle",  # id and data & 3 of logs
       (162, 0): "acacia", (162, 1): "dark_oak"}
OLD_LEAVES = {18: 17, 161: 162}  # id of leaves -> id of the same trees' logs
OLD_EMPTY = {0: "air", 166: "barrier", 217: "structure_void"}
COLOURS = ("6b5130 4a8f28 d8d7ce 7fa64d 3f2a14 335b3a 5a4a1e 2f9e1c a85632 9aa52a 2e2013 2c5e14 4a2b36 "
           "f2b3d0").split()  # rgb of the classes 1 to 14 in .vox


# ------------------------------------------------------------------------------------------------------------
# A tree in the game

def leaf_distance(v):
    """The game's `distance` of every leaf: uint8 (..., y, z, x), 1 to 7, and 0 where there is no leaf.

    v: classes (..., y, z, x). A leaf has distance d <= 6 when d steps to one of 6 neighbours, through leaves
    of any species, lead to a log, else 7.
    """
    v = np.asarray(v)
    leaves = (v > 0) & (v % 2 == 0)
    reached = v % 2 == 1
    distance = leaves * np.uint8(FARTHEST)
    for d in range(1, FARTHEST):
        near = reached.copy()
        for axis in (-3, -2, -1):
            there, here = np.moveaxis(near, axis, 0), np.moveaxis(reached, axis, 0)  # views
            there[1:] |= here[:-1]
            there[:-1] |= here[1:]
        reached = near & (distance == FARTHEST)
        distance[reached] = d
    return distance


def log_axis(v):
    """Along which axis every log of v (y, z, x) lies: uint8, 0 = y (or no log), 1 = z, 2 = x. It is the one
    with most log neighbours; y unless another has more, x when x and z have as many."""
    logs = np.pad(np.asarray(v) % 2 == 1, 1).astype(np.uint8)
    y, z, x = (np.roll(logs, 1, axis) + np.roll(logs, -1, axis) for axis in range(3))
    return (np.where((x > y) & (x >= z), 2, z > y).astype(np.uint8) * logs)[1:-1, 1:-1, 1:-1]


def _states(v):
    """Block states of v (y, z, x): a list of names, air first, and indices int (y, z, x)."""
    key = v * np.uint8(8) + np.where(v % 2 == 1, log_axis(v), leaf_distance(v))
    used = np.bincount(key.ravel(), minlength=8 * len(BLOCKS)) > 0
    used[0] = True  # air, even if v has none
    names = ["minecraft:air"]
    for kind, detail in np.argwhere(used.reshape(-1, 8))[1:].tolist():
        state = f"axis={'yzx'[detail]}" if kind % 2 else f"distance={detail},persistent=false"
        names.append(f"minecraft:{BLOCKS[kind]}[{state}]")
    return names, (np.cumsum(used) - 1)[key]


def _class(state, rename):
    """Class of a block state, None if it has none; rename: {block: name in BLOCKS}."""
    block = state.partition("[")[0]
    if block in rename:
        return BLOCKS.index(rename[block])
    old = re.fullmatch(r"(?:minecraft:)?(log|leaves)2?\[(?:.*,)?variant=(\w+).*", state)  # 1.8 to 1.12
    name = re.sub(r"_wood$", "_log", block.removeprefix("minecraft:").removeprefix("stripped_"))
    name = f"{old[2]}_{old[1]}" if old else name
    return 0 if name in EMPTY else BLOCKS.index(name) if name in BLOCKS else None


def _trunk(v):
    """(z, x) of the trunk of v (y, z, x): in the lowest layer with logs, the one with most logs above it in a
    row, or the first corner of a 2x2 trunk. Without logs: the middle."""
    logs = v % 2 == 1
    if not logs.any():
        return v.shape[1] // 2, v.shape[2] // 2
    logs = logs[logs.any((1, 2)).argmax():]
    rows = np.cumprod(logs, 0).sum(0)
    z, x = map(int, np.unravel_index(rows.argmax(), rows.shape))
    for a, b in ((z, x), (z, x - 1), (z - 1, x), (z - 1, x - 1)):
        if min(a, b) >= 0 and logs[0, a:a + 2, b:b + 2].sum() == 4:
            return a, b
    return z, x


# ------------------------------------------------------------------------------------------------------------
# NBT: a tag is a byte for its type, a name and a value

NUMBERS = {tag: struct.Struct(">" + code) for tag, code in enumerate("bhiqfd", 1)}  # all big-endian
TEXT, LIST, COMPOUND = 8, 9, 10
ARRAYS = {7: 1, 11: 3, 12: 4}  # tag of an array -> tag of its numbers


def parse_nbt(data):
    """dict: the root of NBT bytes, not zipped. Compounds are dicts, arrays and lists of numbers numpy arrays,
    other lists lists. Raises ValueError in one line."""
    at = 0

    def take(size):  # where the next bytes begin
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise _bad(f"{size:,} bytes at offset {at:,} of its NBT", f"{len(data) - at:,}")
        at += size
        return at - size

    def number(tag):
        return NUMBERS[tag].unpack_from(data, take(NUMBERS[tag].size))[0]

    def text():
        start = take(number(2) & 0xffff)
        found = data[start:at].decode("utf-8", "backslashreplace")  # Java writes rare characters otherwise
        return found if found.isprintable() else ascii(found)[1:-1]  # names are printed, in one line

    def value(tag, depth):
        if tag in NUMBERS:
            return number(tag)
        if tag == TEXT:
            return text()
        if depth > DEPTH:  # the game allows 512, schematics need about 10, Python's stack is short
            raise _bad(f"NBT at most {DEPTH} deep", f"more at offset {at:,}")
        if tag == COMPOUND:
            found = {}
            while inner := number(1):
                name = text()
                found[name] = value(inner, depth + 1)
            return found
        if tag != LIST and tag not in ARRAYS:
            raise _bad(f"an NBT tag of 1 to 12 before offset {at:,}", tag)
        kind = number(1) if tag == LIST else ARRAYS[tag]
        count = number(3)
        if kind in NUMBERS:
            start = take(count * NUMBERS[kind].size)
            return np.frombuffer(data, NUMBERS[kind].format, count, start)
        found = []
        for _ in range(count):
            found.append(value(kind, depth + 1))
        return found
    if number(1) != COMPOUND:
        raise _bad("NBT, which begins with a compound (0a)", data[:4].hex())
    text()  # the root's name
    return value(COMPOUND, 0)


def nbt_bytes(root, name=""):
    """Zipped NBT of a dict. It may hold dict, list, str, int (written as 32 bits), and numpy integers and
    arrays, which keep their 8, 16, 32 or 64 bits (no 16 in arrays)."""
    def text(words):
        words = words.encode()
        return struct.pack(">H", len(words)) + words

    def value(v):  # tag, bytes
        if isinstance(v, dict):
            parts = [(text(key), *value(inner)) for key, inner in v.items()]
            return COMPOUND, b"".join(bytes([tag]) + key + inner for key, tag, inner in parts) + b"\0"
        if isinstance(v, list):
            parts = [value(inner) for inner in v]
            head = struct.pack(">bi", parts[0][0] if parts else 0, len(parts))
            return LIST, head + b"".join(inner for _, inner in parts)
        if isinstance(v, str):
            return TEXT, text(v)
        v = np.int32(v) if isinstance(v, int) else v
        tag = {1: 1, 2: 2, 4: 3, 8: 4}[v.itemsize]
        inner = np.asarray(v, NUMBERS[tag].format).tobytes()
        return ({1: 7, 3: 11, 4: 12}[tag], struct.pack(">i", v.size) + inner) if v.ndim else (tag, inner)
    return gzip.compress(bytes([COMPOUND]) + text(name) + value(root)[1], mtime=0)


# ------------------------------------------------------------------------------------------------------------
# What a file has to hold

KINDS = {int: "a number", str: "a text", list: "a list", dict: "a compound", "i1": "an array of bytes",
         ">i4": "32-bit numbers", ">i8": "64-bit numbers"}


def _bad(expected, found, advice="the file is cut off or damaged, copy it again"):
    return ValueError(f"expected {expected}, found {found}; {advice}")


def _field(nbt, key, kind):
    """The value of a key that must be there, of a kind in KINDS."""
    found = nbt.get(key) if isinstance(nbt, dict) else None
    if not (isinstance(found, kind) if isinstance(kind, type) else getattr(found, "dtype", None) == kind):
        raise _bad(f"{KINDS[kind]} under {key}", "nothing" if found is None else "something else",
                   "the file is damaged or of an unknown format, export it again")
    return found


def _count(what, found, expected):
    """Raise when a number of things is not the expected one."""
    if found != expected:
        raise _bad(f"{expected:,} {what}", f"{found:,}")


def _shape(sizes):
    """tuple (y, z, x), before anything of that size is allocated."""
    shape = tuple(sizes)
    if min(shape) < 1 or math.prod(shape) > MAX_BLOCKS:
        raise _bad(f"1 to {MAX_BLOCKS:,} blocks", f"{_times(shape)} (y, z, x)",
                   "the file is damaged or too large, export a smaller part")
    return shape


def _place(values, ids):
    """int array: the places of values in ids, both int, ids in any order."""
    order = np.argsort(ids, kind="stable")
    place = np.searchsorted(ids, values, sorter=order)
    lost = values[np.append(ids[order], values.min(initial=0) - 1)[place] != values]
    if len(lost):
        raise _bad(f"indices of its {len(ids):,} palette entries", lost[0])
    return order[place]


def _times(sizes):
    return "x".join(map(str, sizes))


# ------------------------------------------------------------------------------------------------------------
# Readers of the formats: content -> names of block states, indices int (y, z, x)

def _from_sponge(nbt, version):
    shape, new = _box(nbt), version == 3
    blocks = _field(nbt, "Blocks", dict) if new else nbt
    palette = _field(blocks, "Palette", dict)
    values = _varints(_field(blocks, "Data" if new else "BlockData", "i1").view(np.uint8))
    _count("blocks", len(values), math.prod(shape))
    ids = np.array([_field(palette, name, int) for name in palette], int)
    return list(palette), _place(values, ids).reshape(shape)


def _box(nbt):
    return _shape(_field(nbt, key, int) & 0xffff for key in ("Height", "Length", "Width"))  # unsigned shorts


def _varints(data):
    """int array: numbers in uint8 data, 7 bits a byte, low ones first; a high bit: one more byte follows."""
    ends = np.flatnonzero(data < 128)
    starts = np.append(0, ends + 1)
    longest = np.diff(starts).max(initial=0)
    if starts[-1] != len(data) or longest > 5:
        raise _bad("block data of numbers with 1 to 5 bytes", "one without end")
    values, starts = np.zeros(len(ends), int), starts[:-1]
    for k in range(longest):
        more = starts + k <= ends
        values[more] |= (data[starts[more] + k] & 127).astype(int) << 7 * k
    return values


def _from_mcedit(nbt):
    shape = _box(nbt)
    ids, data = (_field(nbt, key, "i1").view(np.uint8).astype(int) for key in ("Blocks", "Data"))
    _count("block ids", len(ids), math.prod(shape))
    _count("block data", len(data), len(ids))
    if "AddBlocks" in nbt:  # bits 8 to 11 of the ids, two blocks a byte
        add = _field(nbt, "AddBlocks", "i1").view(np.uint8).astype(int)
        _count("bytes in AddBlocks", len(add), (len(ids) + 1) // 2)
        ids |= np.stack([add & 15, add >> 4], 1).ravel()[:len(ids)] << 8
    keys, indices = np.unique(ids << 4 | data & 15, return_inverse=True)
    return [_old(key >> 4, key & 15) for key in keys.tolist()], indices.reshape(shape)


def _old(number, data):
    """Block state of an id and data (0 to 15) of Minecraft 1.12 and before; 'id:data' for all but trees."""
    species = OLD.get((OLD_LEAVES.get(number, number), data & 3))
    if number in OLD_EMPTY:
        return f"minecraft:{OLD_EMPTY[number]}"
    if species is None:
        return f"{number}:{data}"
    if number in OLD_LEAVES:
        return f"minecraft:{species}_leaves[persistent={'true' if data & 4 else 'false'}]"
    return f"minecraft:{species}_" + ("log[axis=y]", "log[axis=x]", "log[axis=z]", "wood")[data >> 2]


def _from_structure(nbt):
    shape = _shape(_three(nbt, "size"))
    if "palettes" in nbt:  # the game draws one of them: wrecks of several woods
        nbt = dict(nbt, palette=next(iter(_field(nbt, "palettes", list)), None))
    names, blocks = [_state(entry) for entry in _field(nbt, "palette", list)], _field(nbt, "blocks", list)
    at = np.array([_three(block, "pos") for block in blocks], int).reshape(-1, 3)
    if ((at < 0) | (at >= shape)).any():
        raise _bad(f"blocks inside {_times(shape)} (y, z, x)", "one outside")
    indices = np.zeros(shape, int)  # what is not listed is air
    states = np.array([_field(block, "state", int) for block in blocks], int)
    indices[tuple(at.T)] = 1 + _place(states, np.arange(len(names)))
    return ["minecraft:air", *names], indices


def _three(nbt, key):
    """[y, z, x] of a list of x, y, z."""
    found = _field(nbt, key, ">i4").tolist()
    _count(f"numbers under {key}", len(found), 3)
    return [found[k] for k in (1, 2, 0)]


def _state(entry):
    """Block state of a palette entry {Name, Properties}."""
    properties = _field(entry, "Properties", dict) if "Properties" in entry else {}
    inner = ",".join(f"{key}={_field(properties, key, str)}" for key in sorted(properties))
    return _field(entry, "Name", str) + (f"[{inner}]" if inner else "")


def _from_litematic(nbt):
    regions, parts = list(_field(nbt, "Regions", dict).values()), []
    for region in regions:
        size, corner = ([_field(_field(region, key, dict), axis, int) for axis in "yzx"]
                        for key in ("Size", "Position"))
        # A size of -3 reaches from its corner down to corner - 2; blocks count from the lowest all the same.
        parts.append(([c + min(n + 1, 0) for c, n in zip(corner, size)], _shape(map(abs, size))))
    if not parts:
        raise _bad("a region of blocks", "none", "export the file again")
    first = np.min([low for low, _ in parts], 0)
    indices = np.zeros(_shape((np.max([np.add(*part) for part in parts], 0) - first).tolist()), int)
    numbers = {"minecraft:air": 0}  # block state -> index, of all regions
    for region, (low, shape) in zip(regions, parts):
        names = [_state(entry) for entry in _field(region, "BlockStatePalette", list)]
        own = np.array([numbers.setdefault(name, len(numbers)) for name in names], int)
        longs, bits, count = _field(region, "BlockStates", ">i8"), _bits(len(names)), math.prod(shape)
        _count("longs of block states", len(longs), -(-count * bits // 64))
        cells = own[_place(_unpacked(longs, bits, count), np.arange(len(own)))].reshape(shape)
        box = indices[tuple(slice(a, a + n) for a, n in zip(low - first, shape))]  # a view
        box[cells > 0] = cells[cells > 0]  # regions may overlap: air hides nothing
    return list(numbers), indices


def _bits(entries):
    return max(2, (entries - 1).bit_length())


def _unpacked(longs, bits, count):
    """int array (count,): numbers of so many bits, low ones first, without gaps: one may span two longs."""
    stream = np.unpackbits(longs.astype("<i8").view(np.uint8), bitorder="little")
    stream, values = stream[:count * bits].reshape(count, bits), np.zeros(count, int)
    for k in range(bits):
        values |= stream[:, k].astype(int) << k
    return values


def _packed(values, bits):
    """int64 array: values (int, 1-d) the other way round."""
    stream = np.packbits(values[:, None] >> np.arange(bits) & 1, bitorder="little")
    return np.pad(stream, (0, -len(stream) % 8)).view("<i8")


def _from_vox(data):
    """The colours of COLOURS are their blocks; others are called vox:#rrggbb, or vox:c without a palette."""
    chunks, at = {}, 20  # after the heads of the file and of MAIN, which holds all other chunks
    if len(data) < 20 or at + struct.unpack_from("<I", data, 16)[0] != len(data):
        raise _bad("a whole .vox file", f"{len(data):,} bytes, which is not what its head says")
    while at + 12 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        at += 12 + size
        chunks.setdefault(kind, []).append(data[at - size:at])
    sizes, models, palettes = (chunks.get(kind, []) for kind in (b"SIZE", b"XYZI", b"RGBA"))
    if at != len(data) or {len(s) for s in sizes} - {12} or {len(p) for p in palettes} - {1024}:
        raise _bad("whole chunks of a .vox file", "one of a wrong length")
    if not len(sizes) == len(models) == 1:
        raise _bad("one model", len(models), "export the models one by one")
    x, z, y = struct.unpack("<3I", sizes[0])
    cells, indices = np.frombuffer(models[0], np.uint8), np.zeros(_shape((y, z, x)), int)
    _count("bytes of voxels", len(cells), 4 + 4 * int.from_bytes(models[0][:4], "little"))
    places = cells[4:].reshape(-1, 4)[:, [2, 1, 0]]
    if (places >= indices.shape).any():
        raise _bad(f"voxels inside {_times((x, z, y))}", "one outside")
    indices[tuple(places.T)] = cells[7::4]
    known = {f"vox:#{c}": f"minecraft:{block}" for c, block in zip(COLOURS, BLOCKS[1:])}
    names = [f"vox:#{palettes[0][4 * c:4 * c + 3].hex()}" if palettes else f"vox:{c + 1}" for c in range(255)]
    return ["minecraft:air", *(known.get(name, name) for name in names)], indices


# ------------------------------------------------------------------------------------------------------------
# Reading

def read_blocks(path):
    """Read all blocks of a file, as they are.

    Returns names (list of str: block states like 'minecraft:oak_log[axis=y]', or 'id:data' from MCEdit),
    indices int (y, z, x) into names, and facts: a namespace of format (str) and data_version (int or None).
    Raises OSError, or ValueError in one line that names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, found a folder; give the files in it")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return _blocks(_unzipped(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _unzipped(data):
    """bytes, unzipped if they begin like gzip; not more than MAX_BYTES, whatever a file promises."""
    whole = True
    if data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)  # 31: gzip, and its checksum
        try:
            data, whole = stream.decompress(data, MAX_BYTES + 1), stream.eof
        except zlib.error as error:
            raise _bad("a whole gzip file", f"a damaged one ({error})") from None
    if len(data) > MAX_BYTES:
        raise _bad(f"at most {MAX_BYTES:,} bytes", "more", "export a smaller part")
    if not whole:
        raise _bad("a whole gzip file", "one without end")
    return data


def _blocks(data):
    if data[:4] == b"VOX ":
        return *_from_vox(data), SimpleNamespace(format="MagicaVoxel", data_version=None)
    if data[:1] != bytes([COMPOUND]):
        raise _bad("a .schem, .schematic, .nbt, .litematic or .vox file",
                   f"{len(data):,} bytes that begin with {data[:4].hex() or 'nothing'}", "give another file")
    nbt = parse_nbt(data)
    nbt = nbt["Schematic"] if isinstance(nbt.get("Schematic"), dict) else nbt  # Sponge 3
    if "Regions" in nbt:
        kind, found = "Litematica", _from_litematic(nbt)
    elif "blocks" in nbt and "size" in nbt:
        kind, found = "structure", _from_structure(nbt)
    elif "Blocks" in nbt and "Data" in nbt:
        kind, found = "MCEdit", _from_mcedit(nbt)
    elif "Width" in nbt and "Version" in nbt:
        version = _field(nbt, "Version", int)
        if version not in (1, 2, 3):
            raise _bad("Sponge version 1, 2 or 3", version, "export it as version 2")
        kind, found = f"Sponge v{version}", _from_sponge(nbt, version)
    else:
        raise _bad("blocks of a known format", f"NBT of {', '.join(nbt)[:99]}", "export it as .schem")
    version = nbt.get("DataVersion", nbt.get("MinecraftDataVersion"))
    return *found, SimpleNamespace(format=kind, data_version=version if isinstance(version, int) else None)


def survey(names, indices, rename=()):
    """Sort out what read_blocks() returned: the class of each name (None: of none), and the blocks with a
    class and those with none, as Counters {block without its state: number}. rename: as in read()."""
    rename, known, unknown = dict(rename), Counter(), Counter()
    classes = [_class(name, rename) for name in names]
    for name, kind, n in zip(names, classes, np.bincount(indices.ravel(), minlength=len(names)).tolist()):
        if n:
            (unknown if kind is None else known)[name.partition("[")[0]] += n
    return classes, known, unknown


def read(path, size=None, rename=()):
    """Read the tree of a file.

    size: None for the tree's bounding box, or n for a cube of n^3 blocks with its lowest layer at y=0 and its
    trunk at z=x=n//2 (of a 2x2 trunk the first corner); rename: {block: name in BLOCKS} for blocks of other
    species. Returns v uint8 (y, z, x), and facts: those of read_blocks(), and known and unknown of survey().
    Unknown blocks are left out; *_wood and stripped_* are logs. Raises OSError, or ValueError in one line: a
    bad file, no tree in it, or one that does not fit.
    """
    for block, name in dict(rename).items():
        if name not in BLOCKS:
            raise _bad(f"a new name in {', '.join(BLOCKS)}", f"{block}={name}", "correct it")
    names, indices, facts = read_blocks(path)
    classes, facts.known, facts.unknown = survey(names, indices, rename)
    v = np.array([kind or 0 for kind in classes], np.uint8)[indices]
    places = np.argwhere(v)
    if not len(places):
        example = next(iter(facts.unknown), "a:block")
        raise ValueError(f"{path}: expected logs or leaves of {', '.join(SPECIES)}, found "
                         f"{_listed(facts.unknown, 5) or 'only air'}; rename blocks, as in "
                         f"{example}=oak_log, or give another file")
    v = v[tuple(map(slice, places.min(0), places.max(0) + 1))].copy()
    if size is None:
        return v, facts
    trunk = np.array([0, *_trunk(v)])
    first = np.array([0, size // 2, size // 2]) - trunk
    if (first < 0).any() or (first + v.shape > size).any():
        needed = max(v.shape[0], *(2 * np.maximum(trunk, v.shape - trunk)[1:]))
        raise ValueError(f"{path}: expected a tree that fits {_times([size] * 3)}, its trunk in the middle, "
                         f"found {_times(v.shape)} (y, z, x); ask for size {needed + needed % 2}")
    cube = np.zeros([size] * 3, np.uint8)
    cube[tuple(map(slice, first, first + v.shape))] = v
    return cube, facts


# ------------------------------------------------------------------------------------------------------------
# Writing

def write(path, v):
    """Write a tree; the name's suffix chooses the format: .schem, .nbt, .litematic or .vox.

    v: classes (y, z, x), integers 0 to 14, at most 256 an axis; the file has the same extent. Leaves get
    their distance, logs their axis (not in .vox, where a block lies at (x, z, y): seen there, a tree is its
    mirror image). The same tree and name give the same bytes. The file appears complete or not at all.
    Raises OSError, or ValueError in one line.
    """
    path, v = Path(path), np.asarray(v)
    pack = WRITERS.get(path.suffix.lower())
    if pack is None:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(WRITERS)}; rename it")
    if v.ndim != 3 or v.dtype.kind not in "ui" or not 1 <= min(v.shape) <= max(v.shape) <= LONGEST:
        raise ValueError(f"{path}: expected integers (y, z, x) with 1 to {LONGEST} an axis, found {v.dtype} "
                         f"{v.shape}; crop the array")
    if v.min() < 0 or v.max() >= len(BLOCKS):
        raise ValueError(f"{path}: expected classes 0 to {len(BLOCKS) - 1}, found {v.min()} to {v.max()}; 15 "
                         "is MASK, a sample that holds it is not finished")
    data = pack(v.astype(np.uint8), path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _version(v):
    return CHERRY_VERSION if (v >= BLOCKS.index("cherry_log")).any() else VERSION


def _entry(state):
    """Palette entry {Name, Properties} of a block state."""
    name, _, inner = state.rstrip("]").partition("[")
    properties = dict(pair.split("=") for pair in inner.split(",")) if inner else {}
    return dict(Name=name, **dict(Properties=properties) if properties else {})


def _sponge(v, _):
    names, indices = _states(v)  # at most 1 + 7 * 3 + 7 * 7 = 71 of them: a varint is always one byte
    height, length, width = map(np.int16, v.shape)
    about = {f"WEOffset{axis}": 0 for axis in "XYZ"}  # not in the specification, but some readers insist
    return nbt_bytes(dict(
        Version=2, DataVersion=_version(v), Width=width, Height=height, Length=length, PaletteMax=len(names),
        Palette={name: k for k, name in enumerate(names)}, BlockData=indices.ravel().astype(np.int8),
        Offset=np.zeros(3, np.int32), BlockEntities=[], Metadata=about), "Schematic")


def _structure(v, _):
    names, indices = _states(v)
    blocks = [dict(state=int(indices[y, z, x]) - 1, pos=[x, y, z]) for y, z, x in np.argwhere(v).tolist()]
    height, length, width = v.shape
    return nbt_bytes(dict(DataVersion=_version(v), size=[width, height, length], entities=[],
                        palette=[_entry(name) for name in names[1:]], blocks=blocks))


def _litematic(v, name):
    names, indices = _states(v)
    size, zero, never = dict(zip("yzx", v.shape)), dict.fromkeys("yzx", 0), np.int64(0)  # no date: same bytes
    region = dict(Position=zero, Size=size, BlockStatePalette=[_entry(state) for state in names],
                  BlockStates=_packed(indices.ravel(), _bits(len(names))), Entities=[], TileEntities=[],
                  PendingBlockTicks=[], PendingFluidTicks=[])
    about = dict(Name=name, Author="", Description="", RegionCount=1, TimeCreated=never, TimeModified=never,
                 TotalBlocks=int((v > 0).sum()), TotalVolume=v.size, EnclosingSize=size)
    return nbt_bytes(dict(Version=6, MinecraftDataVersion=_version(v), Metadata=about,
                          Regions={name: region}))


def _vox(v, _):
    y, z, x = np.nonzero(v)
    cells = np.stack([x, z, y, v[y, z, x]], 1).astype(np.uint8)
    palette = b"".join(bytes.fromhex(c) + b"\xff" for c in COLOURS)  # its first entry is colour 1
    height, length, width = v.shape
    chunks = b"".join(kind + struct.pack("<2i", len(inner), 0) + inner for kind, inner in (
        (b"SIZE", struct.pack("<3i", width, length, height)),
        (b"XYZI", struct.pack("<i", len(cells)) + cells.tobytes()), (b"RGBA", palette.ljust(1024, b"\0"))))
    return b"VOX " + struct.pack("<i4s2i", 150, b"MAIN", 0, len(chunks)) + chunks


WRITERS = {".schem": _sponge, ".nbt": _structure, ".litematic": _litematic, ".vox": _vox}


# ------------------------------------------------------------------------------------------------------------
# Commands

def _listed(counts, most=None):
    shown = counts.most_common(most)
    more = f" and {len(counts) - len(shown)} more" * (len(shown) < len(counts))
    return ", ".join(f"{block} {n:,}" for block, n in shown) + more


def describe(path):
    """One line about a file: its format, size, blocks, and those that read() would leave out."""
    names, indices, facts = read_blocks(path)
    _, known, unknown = survey(names, indices)
    version = f", DataVersion {facts.data_version}" if facts.data_version else ""
    return (f"{path}: {facts.format}{version}, {_times(indices.shape)} (y, z, x): "
            + "; unknown: ".join(_listed(counts) for counts in (known, unknown) if counts or counts is known))


def convert(source, target, *rename):
    """Read the tree of one file and write it as another; rename: BLOCK=NAME. Returns one line."""
    v, facts = read(source, rename=[word.rpartition("=")[::2] for word in rename])
    write(target, v)
    left_out = f"; left out: {_listed(facts.unknown)}" * bool(facts.unknown)
    return f"{target}: {_times(v.shape)} (y, z, x)" + left_out


USAGE = "usage: python -m data.voxel_files FILE [FILE ...] | convert IN OUT [BLOCK=NAME ...]"


def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr for each bad file."""
    command, *rest = arguments or ["convert"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    jobs, code = [(convert, rest)] if command == "convert" else [(describe, [file]) for file in arguments], 0
    for job, words in jobs:
        try:
            if job is convert and len(words) < 2:
                raise ValueError(USAGE)
            print(job(*words))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            return 130
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
