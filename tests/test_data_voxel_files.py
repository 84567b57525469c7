"""data/voxel_files.py: every format against bytes and readers that are not its own, and what it refuses."""
import gzip
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from data import voxel_files as files

REPOSITORY = Path(__file__).resolve().parent.parent
SUFFIXES = (".schem", ".nbt", ".litematic", ".vox")
NBT_SUFFIXES = SUFFIXES[:3]


def tree(seed, shape=(9, 7, 8)):
    """Classes (y, z, x) without order: logs and leaves of all species, touching the borders in places."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 15, shape) * (rng.random(shape) < .4)).astype(np.uint8)


def oak(size=16, height=5, at=None):
    """A straight trunk at (z, x) with two layers of 3x3 leaves around its top."""
    v, (z, x) = np.zeros((size,) * 3, np.uint8), at or (size // 2,) * 2
    v[height - 2:height, z - 1:z + 2, x - 1:x + 2] = 2
    v[:height, z, x] = 1
    return v


def states(path):
    """Every block of a file but air: {(x, y, z): block state}."""
    names, indices, _ = files.read_blocks(path)
    return {(x, y, z): names[n] for (y, z, x), n in np.ndenumerate(indices) if names[n] != "minecraft:air"}


def back(path):
    """Classes of a whole file, not only of the box around its tree."""
    names, indices, _ = files.read_blocks(path)
    classes, _, unknown = files.survey(names, indices)
    assert not unknown
    return np.array([kind or 0 for kind in classes], np.uint8)[indices]


# The game's rules

def plain_distance(v):
    """Distances from logs by a queue, block by block."""
    distance, queue = np.full(v.shape, 7), deque()
    for at in map(tuple, np.argwhere(v % 2 == 1)):
        queue.append((at, 0))
    while queue:
        at, d = queue.popleft()
        for axis, step in itertools.product(range(3), (-1, 1)):
            near = tuple(n + step * (k == axis) for k, n in enumerate(at))
            inside = all(0 <= n < size for n, size in zip(near, v.shape))
            if inside and v[near] and v[near] % 2 == 0 and d + 1 < distance[near]:
                distance[near] = d + 1
                queue.append((near, d + 1))
    return np.where((v > 0) & (v % 2 == 0), distance, 0)


@pytest.mark.parametrize("density", (.02, .1, .5))
def test_leaf_distance_is_that_of_a_plain_search(density):
    rng = np.random.default_rng(0)
    for shape in ((9, 8, 7), (1, 12, 3), (16, 16, 16)):
        leaves = rng.choice((2, 4, 14), shape) * (rng.random(shape) < .8)
        v = np.where(rng.random(shape) < density * .2, 1, leaves).astype(np.uint8)
        assert np.array_equal(files.leaf_distance(v), plain_distance(v))
        assert files.leaf_distance(v).dtype == np.uint8
    batch = np.stack([tree(seed) for seed in range(3)])
    assert np.array_equal(files.leaf_distance(batch), [files.leaf_distance(v) for v in batch])


def test_leaf_distance_of_a_row():
    row = np.array([1, 2, 2, 4, 2, 2, 2, 2, 2, 0, 2], np.uint8).reshape(1, 1, -1)
    assert files.leaf_distance(row).tolist() == [[[0, 1, 2, 3, 4, 5, 6, 7, 7, 0, 7]]]
    diagonal = np.zeros((1, 2, 2), np.uint8)
    diagonal[0, 0, 0], diagonal[0, 1, 1] = 1, 2
    assert files.leaf_distance(diagonal)[0, 1, 1] == 7


def test_logs_lie_along_their_neighbours():
    v = np.zeros((6, 7, 7), np.uint8)
    v[:5, 3, 3] = 1  # trunk
    v[3, 3, 4:6] = 1  # a branch to the east
    v[2, :3, 3] = 3  # one to the north, of another species
    v[5, 6, 6] = 1  # a lonely log
    axis = files.log_axis(v)
    assert not axis[:5, 3, 3].any() and axis[5, 6, 6] == 0  # y
    assert axis[3, 3, 4:6].tolist() == [2, 2] and axis[2, :3, 3].tolist() == [1, 1, 1]
    giant = np.zeros((4, 4, 4), np.uint8)
    giant[:, 1:3, 1:3] = 1
    assert not files.log_axis(giant).any()  # a 2x2 trunk stands, also at its ends
    assert files.log_axis(np.ones((1, 1, 3), np.uint8)).tolist() == [[[2, 2, 2]]]  # no wrapping around
    assert files.log_axis(np.ones((1, 2, 2), np.uint8)).max() == 2


@pytest.mark.parametrize("suffix", NBT_SUFFIXES)
def test_files_keep_trees_alive(tmp_path, suffix):
    v = oak(16)
    v[4, 8, 9:11] = 1
    v[5, 8, 2:9] = 2  # a row of leaves along x over the trunk
    files.write(tmp_path / f"a{suffix}", v)
    found = states(tmp_path / f"a{suffix}")
    assert found[8, 0, 8] == "minecraft:oak_log[axis=y]" and found[10, 4, 8] == "minecraft:oak_log[axis=x]"
    assert found[9, 3, 8] == "minecraft:oak_leaves[distance=1,persistent=false]"
    row = [found[x, 5, 8] for x in range(8, 1, -1)]
    assert row == [f"minecraft:oak_leaves[distance={d},persistent=false]" for d in range(1, 8)]
    distance = files.leaf_distance(v)
    for (x, y, z), state in found.items():
        assert ("leaves" in state) == (v[y, z, x] == 2)
        assert f"[distance={distance[y, z, x]}," in state or "_log[axis=" in state


# Round trips

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_is_bit_for_bit(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    for seed, shape in enumerate([(9, 7, 8), (1, 1, 1), (3, 1, 20), (16, 16, 16), (2, 5, 3)]):
        v = tree(seed, shape)
        v[0, 0, 0], v[-1, -1, -1] = 1, 14
        files.write(path, v)
        assert np.array_equal(back(path), v)
        found, facts = files.read(path)
        assert found.dtype == np.uint8 and np.array_equal(found, v) and not facts.unknown
        first = path.read_bytes()
        files.write(path, v.astype(np.int64))
        assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == [path.name]
        wanted = None if suffix == ".vox" else 3463  # cherry_leaves came with Minecraft 1.20
        assert facts.data_version == wanted
    files.write(path, oak())
    assert files.read(path)[1].data_version == (None if suffix == ".vox" else 2975)
    files.write(path, np.zeros((3, 4, 5), np.uint8))  # an empty sample is a file too
    assert back(path).shape == (3, 4, 5) and not back(path).any()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_corner_stays_in_its_corner(tmp_path, suffix):
    v = np.zeros((5, 6, 7), np.uint8)
    v[2, 3, 1] = 5
    files.write(tmp_path / f"a{suffix}", v)
    ((place, state),) = states(tmp_path / f"a{suffix}").items()
    assert place == (1, 2, 3) and state.startswith("minecraft:spruce_log")


def test_a_cube_has_its_trunk_in_the_middle(tmp_path):
    path = tmp_path / "a.schem"
    for trunk in ((8, 8), (3, 11), (13, 2)):
        files.write(path, np.roll(oak(16, at=trunk), 2, 0))  # two layers of air below
        for size in (6, 7, 16, 32):
            v, _ = files.read(path, size)
            assert np.array_equal(v, oak(size)) and v.dtype == np.uint8
    giant = np.zeros((20, 9, 9), np.uint8)
    giant[:, 4:6, 4:6] = 5
    giant[17:, 4:6, 4:6] = 6
    giant[17:, 5, 5] = 5  # its highest column is not the first
    files.write(path, giant)
    v, _ = files.read(path, 32)
    assert v[0].nonzero()[0].tolist() == [16, 16, 17, 17] and v[0, 16:18, 16:18].all() and v[19, 17, 17] == 5
    files.write(path, np.full((2, 3, 3), 2, np.uint8))  # leaves alone: their middle
    assert files.read(path, 4)[0][0, 1:4, 1:4].all()


@pytest.mark.parametrize("height, at, needed", [(17, (8, 8), 18), (5, (8, 8), 6)])
def test_a_tree_that_does_not_fit_says_what_would(tmp_path, height, at, needed):
    path = tmp_path / "a.nbt"
    files.write(path, oak(20, height, at))
    with pytest.raises(ValueError, match=f"a.nbt: expected a tree that fits .*ask for size {needed}$"):
        files.read(path, needed - 2)
    assert np.array_equal(files.read(path, needed)[0], oak(needed, height))


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.schem"
    files.write(path, oak())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, tree(0))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Bits and bytes, written here by hand

def tag(kind, name, payload):
    return bytes([kind]) + struct.pack(">H", len(name)) + name.encode() + payload


def compound(*tags):
    return b"".join(tags) + b"\0"


def text(words):
    return struct.pack(">H", len(words)) + words.encode()


def array(kind, values):
    return struct.pack(f">i{len(values)}{kind}", len(values), *values)


def root(*tags, name=""):
    return tag(10, name, compound(*tags))


def short(name, n):
    return tag(2, name, struct.pack(">H", n))


def number(name, n):
    return tag(3, name, struct.pack(">i", n))


def sizes(y, z, x):
    return short("Height", y) + short("Length", z) + short("Width", x)


def palette(*names):
    return tag(10, "Palette", compound(*(number(name, k) for k, name in enumerate(names))))


def sponge(version, shape, names, data):
    """Sponge 1, 2 or 3."""
    head = [number("Version", version), number("DataVersion", 2975), sizes(*shape)]
    if version < 3:
        return root(*head, palette(*names), tag(7, "BlockData", array("B", data)), name="Schematic")
    blocks = compound(palette(*names), tag(7, "Data", array("B", data)))
    return root(tag(10, "Schematic", compound(*head, tag(10, "Blocks", blocks))))


def mcedit(shape, ids, data, *more):
    return root(sizes(*shape), tag(8, "Materials", text("Alpha")), tag(7, "Blocks", array("B", ids)),
                tag(7, "Data", array("B", data)), *more, name="Schematic")


def entries(*names):
    """A palette of compounds, for names without properties."""
    return struct.pack(">bi", 10, len(names)) + b"".join(compound(tag(8, "Name", text(n))) for n in names)


def three(name, x, y, z):
    return tag(10, name, compound(number("y", y), number("z", z), number("x", x)))


def region(corner, size, names, longs):
    return compound(three("Position", *corner), three("Size", *size),
                    tag(9, "BlockStatePalette", entries(*names)), tag(12, "BlockStates", array("q", longs)))


def litematic(**regions):
    return root(number("MinecraftDataVersion", 2975),
                tag(10, "Regions", compound(*(tag(10, name, r) for name, r in regions.items()))))


def structure(size, names, blocks):
    """blocks: (state, x, y, z)."""
    rows = [compound(number("state", s), tag(9, "pos", b"\3" + array("i", at))) for s, *at in blocks]
    return root(tag(9, "size", b"\3" + array("i", size)), tag(9, "palette", entries(*names)),
                tag(9, "blocks", struct.pack(">bi", 10, len(rows)) + b"".join(rows)))


def chunk(name, content):
    return name + struct.pack("<2i", len(content), 0) + content


def vox(size, cells, *more, models=1):
    cells = struct.pack("<i", len(cells)) + bytes(sum(cells, ()))
    inner = (chunk(b"SIZE", struct.pack("<3i", *size)) + chunk(b"XYZI", cells)) * models + b"".join(more)
    return b"VOX " + struct.pack("<i4s2i", 150, b"MAIN", 0, len(inner)) + inner


LOG, LEAVES = "minecraft:oak_log[axis=y]", "minecraft:oak_leaves[distance=1,persistent=false]"
NAMES = ["minecraft:air", LOG, LEAVES]


def test_bytes_that_are_written(tmp_path):
    """An oak log, air and a cherry leaf beside it along x, in every format, byte for byte."""
    v = np.array([[[1, 0, 14]]], np.uint8)
    leaf = "minecraft:cherry_leaves[distance=7,persistent=false]"

    def entry(name, **properties):
        inner = compound(*(tag(8, key, text(value)) for key, value in properties.items()))
        return compound(tag(8, "Name", text(name)), *[tag(10, "Properties", inner)] * bool(properties))
    air, log = entry("minecraft:air"), entry("minecraft:oak_log", axis="y")
    leaves = entry("minecraft:cherry_leaves", distance="7", persistent="false")
    blocks = [compound(number("state", k), tag(9, "pos", b"\3" + array("i", (x, 0, 0))))
              for k, x in ((0, 0), (1, 2))]
    empty, box, never = struct.pack(">bi", 0, 0), {"x": 3, "y": 1, "z": 1}, struct.pack(">q", 0)
    expected = {
        ".schem": root(
            number("Version", 2), number("DataVersion", 3463), short("Width", 3), short("Height", 1),
            short("Length", 1), number("PaletteMax", 3), palette("minecraft:air", LOG, leaf),
            tag(7, "BlockData", array("b", [1, 0, 2])), tag(11, "Offset", array("i", [0, 0, 0])),
            tag(9, "BlockEntities", empty), tag(10, "Metadata", compound(
                *(number(f"WEOffset{axis}", 0) for axis in "XYZ"))), name="Schematic"),
        ".nbt": root(
            number("DataVersion", 3463), tag(9, "size", b"\3" + array("i", (3, 1, 1))),
            tag(9, "entities", empty), tag(9, "palette", struct.pack(">bi", 10, 2) + log + leaves),
            tag(9, "blocks", struct.pack(">bi", 10, 2) + b"".join(blocks))),
        ".litematic": root(
            number("Version", 6), number("MinecraftDataVersion", 3463), tag(10, "Metadata", compound(
                tag(8, "Name", text("a")), tag(8, "Author", text("")), tag(8, "Description", text("")),
                number("RegionCount", 1), tag(4, "TimeCreated", never), tag(4, "TimeModified", never),
                number("TotalBlocks", 2), number("TotalVolume", 3), three("EnclosingSize", **box))),
            tag(10, "Regions", compound(tag(10, "a", compound(
                three("Position", 0, 0, 0), three("Size", **box),
                tag(9, "BlockStatePalette", struct.pack(">bi", 10, 3) + air + log + leaves),
                tag(12, "BlockStates", array("q", [0b10_00_01])),
                *(tag(9, key, empty) for key in ("Entities", "TileEntities", "PendingBlockTicks",
                                                 "PendingFluidTicks"))))))),
        ".vox": vox((3, 1, 1), [(0, 0, 0, 1), (2, 0, 0, 14)], chunk(b"RGBA", b"".join(
            bytes.fromhex(c + "ff") for c in files.COLOURS).ljust(1024, b"\0"))),
    }
    for suffix, data in expected.items():
        files.write(tmp_path / f"a{suffix}", v)
        found = (tmp_path / f"a{suffix}").read_bytes()
        assert (found if suffix == ".vox" else gzip.decompress(found)) == data, suffix
        assert suffix == ".vox" or found[4:8] == bytes(4)  # no time: the same tree is the same file


@pytest.mark.parametrize("zipped", (False, True))
def test_three_versions_of_sponge_read_equal(tmp_path, zipped):
    for version in (1, 2, 3):
        data = sponge(version, (2, 3, 4), NAMES, [1] + [0] * 22 + [2])
        path = tmp_path / "any.name"
        path.write_bytes(gzip.compress(data) if zipped else data)
        names, indices, facts = files.read_blocks(path)
        assert names == NAMES and facts.format == f"Sponge v{version}" and facts.data_version == 2975
        assert indices.shape == (2, 3, 4) and indices[0, 0, 0] == 1 and indices[1, 2, 3] == 2
        assert indices.sum() == 3


def test_varints(tmp_path):
    data = bytes.fromhex("00 7f 8001 ff7f 808001 ffffff7f")
    assert files._varints(np.frombuffer(data, np.uint8)).tolist() == [0, 127, 128, 16383, 16384, 2 ** 28 - 1]
    names = ["minecraft:air", *(f"a:b{k}" for k in range(1, 200)), LOG]  # index 200 takes two bytes
    (tmp_path / "a.schem").write_bytes(sponge(2, (1, 1, 2), names, [0xc8, 1, 5]))
    assert states(tmp_path / "a.schem") == {(0, 0, 0): LOG, (1, 0, 0): "a:b5"}


def test_palettes_need_no_order(tmp_path):
    ids = compound(number(LOG, 7), number("minecraft:air", 3))
    (tmp_path / "a").write_bytes(root(number("Version", 2), sizes(1, 1, 3), tag(10, "Palette", ids),
                                      tag(7, "BlockData", array("B", [7, 3, 7]))))
    assert set(states(tmp_path / "a")) == {(0, 0, 0), (2, 0, 0)}


def test_litematic_bits():
    assert [files._bits(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [2, 2, 2, 2, 3, 4, 5]
    rng = np.random.default_rng(0)
    for bits in (2, 3, 5, 7, 13):
        values = rng.integers(0, 1 << bits, 4096)
        longs = files._packed(values, bits)
        assert len(longs) == 64 * bits  # 320 of 5 bits; 342 if no entry spanned two
        whole = sum(int(n) << bits * k for k, n in enumerate(values))
        assert int.from_bytes(longs.astype("<i8").tobytes(), "little") == whole
        assert np.array_equal(files._unpacked(longs.astype(">i8"), bits, 4096), values)


def test_litematic_regions_with_negative_sizes(tmp_path):
    one = region((0, 0, 0), (2, 1, 1), ["minecraft:air", "a:x", "a:y"], [0b10_01])
    two = region((-1, 2, 0), (-2, -2, 1), ["minecraft:air", "a:y", "a:z"], [0b00_10_01_01])
    (tmp_path / "a").write_bytes(litematic(one=one, two=two))
    names, indices, facts = files.read_blocks(tmp_path / "a")
    assert facts.format == "Litematica" and indices.shape == (3, 1, 4)  # x from -2 to 1, y from 0 to 2
    assert states(tmp_path / "a") == {(2, 0, 0): "a:x", (3, 0, 0): "a:y", (0, 1, 0): "a:y", (1, 1, 0): "a:y",
                                      (0, 2, 0): "a:z"}
    over = region((0, 0, 0), (2, 1, 1), ["minecraft:air", "a:z"], [0b01_00])
    (tmp_path / "a").write_bytes(litematic(one=one, over=over))
    assert states(tmp_path / "a") == {(0, 0, 0): "a:x", (1, 0, 0): "a:z"}  # its air hides nothing


def test_structure_palettes(tmp_path):
    blocks = [(0, 0, 0, 0), (1, 2, 1, 0)]
    data = structure((3, 2, 1), ["minecraft:oak_log", "a:x"], blocks)
    (tmp_path / "a").write_bytes(data)
    assert states(tmp_path / "a") == {(0, 0, 0): "minecraft:oak_log", (2, 1, 0): "a:x"}
    several = struct.pack(">bi", 9, 2) + entries("minecraft:oak_log", "a:x") + entries("a:1", "a:2")
    head, rest = data.index(b"\x09\0\7palette"), data.index(b"\x09\0\6blocks")
    (tmp_path / "b").write_bytes(data[:head] + tag(9, "palettes", several) + data[rest:])
    assert states(tmp_path / "b") == states(tmp_path / "a")


def test_numeric_ids(tmp_path):
    wood = [(17, 0, 1), (17, 1, 5), (17, 2, 3), (17, 3, 7), (162, 0, 9), (162, 1, 11)]  # id, data, class
    leaves = [(18, 0, 2), (18, 1, 6), (18, 2, 4), (18, 3, 8), (161, 0, 10), (161, 1, 12)]
    cells = [(i, d | turn << 2, c) for i, d, c in wood + leaves for turn in range(4)]
    cells += [(0, 0, 0), (166, 0, 0), (217, 0, 0)]  # air, barrier, structure void
    (tmp_path / "a").write_bytes(mcedit((3, 17, 1), [i for i, _, _ in cells], [d for _, d, _ in cells]))
    v, facts = files.read(tmp_path / "a")
    assert v.ravel().tolist()[:48] == [c for _, _, c in cells][:48] and not facts.unknown
    assert facts.format == "MCEdit" and facts.data_version is None and v.shape == (3, 17, 1)
    found = states(tmp_path / "a")
    assert [found[0, 0, z] for z in range(4)] == [f"minecraft:oak_{s}" for s in (
        "log[axis=y]", "log[axis=x]", "log[axis=z]", "wood")]
    # 161:2 is no tree, 85 a fence, and AddBlocks lifts the second 17 to 273 and the third to 17 + 2 * 256
    (tmp_path / "b").write_bytes(mcedit((1, 1, 5), [17, 17, 17, 161, 85], [0, 0, 0, 2, 1],
                                        tag(7, "AddBlocks", array("B", [0x10, 0x02, 0]))))
    v, facts = files.read(tmp_path / "b")
    assert v.tolist() == [[[1]]] and facts.unknown == {"273:0": 1, "529:0": 1, "161:2": 1, "85:1": 1}


def test_names(tmp_path):
    names = {
        "minecraft:oak_log": 1, "oak_leaves[distance=3]": 2, "minecraft:dark_oak_wood[axis=x]": 11,
        "minecraft:stripped_birch_log[axis=y]": 3, "minecraft:stripped_spruce_wood": 5, "cherry_leaves": 14,
        "minecraft:log[axis=y,variant=jungle]": 7, "minecraft:leaves2[variant=acacia,decayable=true]": 10,
        "minecraft:cave_air": 0, "minecraft:barrier[waterlogged=false]": 0, "minecraft:structure_void": 0}
    others = ("minecraft:pale_oak_log", "minecraft:mushroom_stem", "mod:oak_log", "minecraft:oak_planks",
              "17:4", "minecraft:log[variant=other]", "minecraft:mangrove_leaves", "minecraft:oak_log_wall")
    every = [*names, *others]
    (tmp_path / "a").write_bytes(sponge(2, (len(every), 1, 1), every, range(len(every))))
    v, facts = files.read(tmp_path / "a")
    assert v.ravel().tolist() == list(names.values())[:8]
    assert set(facts.unknown) == {name.partition("[")[0] for name in others}
    assert facts.known["oak_leaves"] == 1
    v, facts = files.read(tmp_path / "a", rename={"mod:oak_log": "cherry_log", "minecraft:oak_log": "air"})
    assert v.max() == 14 and v[0] == 2 and 13 in v and "mod:oak_log" not in facts.unknown
    with pytest.raises(ValueError, match="expected a new name in air, oak_log, .*, found mod:oak_log=oak;"):
        files.read(tmp_path / "a", rename={"mod:oak_log": "oak"})
    assert len(files.BLOCKS) == 15 and files.BLOCKS[12] == "dark_oak_leaves"


def test_strange_text_stays_printable(tmp_path):
    nbt = files.parse_nbt(root(tag(8, "Name", b"\0\4\xc0\x80\n\x1b"), number("Version", 2)))  # Java's zero
    assert nbt["Name"].isprintable() and nbt["Version"] == 2
    (tmp_path / "a").write_bytes(sponge(2, (1, 1, 2), ["evil\nname\x1b[2J", LOG], [0, 1]))
    line = files.describe(tmp_path / "a")
    assert "evil\\nname" in line and line.isprintable()


def test_vox_of_others(tmp_path):
    colours = bytes.fromhex(files.COLOURS[2] + "ff" "010203ff").ljust(1024, b"\0")
    (tmp_path / "a").write_bytes(vox((4, 3, 2), [(3, 2, 1, 1), (0, 0, 0, 2)], chunk(b"nTRN", b"abc"),
                                     chunk(b"RGBA", colours)))
    assert states(tmp_path / "a") == {(3, 1, 2): "minecraft:birch_log", (0, 0, 0): "vox:#010203"}
    (tmp_path / "b").write_bytes(vox((4, 3, 2), [(3, 2, 1, 255)]))  # the program's own colours
    assert states(tmp_path / "b") == {(3, 1, 2): "vox:255"}
    assert files.read(tmp_path / "b", rename={"vox:255": "oak_log"})[0].tolist() == [[[1]]]


# Other readers and writers, where they are installed

def blocks_of(v):
    """{(x, y, z): (name, {property: value})} of a tree, said without the module's tables of states."""
    distance, axis = plain_distance(v), files.log_axis(v)
    species = "oak birch spruce jungle acacia dark_oak cherry".split()
    return {(x, y, z): (f"minecraft:{species[(v[y, z, x] - 1) // 2]}_{'log' if v[y, z, x] % 2 else 'leaves'}",
                        dict(axis="yzx"[axis[y, z, x]]) if v[y, z, x] % 2 else
                        dict(distance=str(distance[y, z, x]), persistent="false"))
            for y, z, x in np.argwhere(v).tolist()}


def state(name, properties):
    return f"{name}[{','.join(f'{k}={v}' for k, v in properties.items())}]"


TREES = [oak(), tree(1), tree(2, (5, 17, 3)), tree(3, (16, 16, 16))]


@pytest.mark.parametrize("v", TREES, ids=lambda v: str(v.shape))
def test_nbtlib_reads_the_same(tmp_path, v):
    nbtlib = pytest.importorskip("nbtlib")
    for suffix in NBT_SUFFIXES:
        files.write(tmp_path / f"a{suffix}", v)
    expected, (height, length, width) = blocks_of(v), v.shape
    schem = nbtlib.load(tmp_path / "a.schem")
    assert schem.gzipped and schem.root_name == "Schematic" and schem["Version"] == 2
    assert (schem["Width"], schem["Height"], schem["Length"]) == (width, height, length)
    assert isinstance(schem["Width"], nbtlib.Short) and schem["PaletteMax"] == len(schem["Palette"])
    name = {int(k): str(n) for n, k in schem["Palette"].items()}
    found = {(k % width, k // (width * length), k // width % length): name[int(n)]
             for k, n in enumerate(schem["BlockData"]) if name[int(n)] != "minecraft:air"}
    assert found == {at: state(*block) for at, block in expected.items()}
    nbt = nbtlib.load(tmp_path / "a.nbt")
    assert nbt.root_name == "" and list(nbt["size"]) == [width, height, length]
    entry = [(str(e["Name"]), {str(k): str(p) for k, p in e["Properties"].items()}) for e in nbt["palette"]]
    assert {tuple(map(int, b["pos"])): entry[b["state"]] for b in nbt["blocks"]} == expected
    lite = nbtlib.load(tmp_path / "a.litematic")
    assert lite["Version"] == 6 and lite["Metadata"]["TotalBlocks"] == len(expected)
    assert lite["Regions"]["a"]["BlockStatePalette"][0]["Name"] == "minecraft:air"
    assert isinstance(lite["Metadata"]["TimeCreated"], nbtlib.Long)


@pytest.mark.parametrize("v", TREES, ids=lambda v: str(v.shape))
def test_litemapy_reads_the_same(tmp_path, v):
    litemapy, nbtlib = pytest.importorskip("litemapy"), pytest.importorskip("nbtlib")
    for suffix in NBT_SUFFIXES:
        files.write(tmp_path / f"a{suffix}", v)
    schematic = litemapy.Schematic.load(tmp_path / "a.litematic")
    schem, structure = (nbtlib.load(tmp_path / f"a{suffix}") for suffix in (".schem", ".nbt"))
    schem["Entities"] = nbtlib.List()  # litemapy insists on them
    regions = (schematic.regions["a"], litemapy.Region.from_sponge_nbt(schem)[0],
               litemapy.Region.from_structure_nbt(structure)[0])
    assert schematic.mc_version == (3463 if (v > 12).any() else 2975)
    for found in regions:
        assert (found.height, found.length, found.width) == v.shape
        assert {at: (found[at].id, dict(found[at].properties())) for at in found.block_positions()
                if found[at].id != "minecraft:air"} == blocks_of(v)


def test_what_litemapy_writes_is_read(tmp_path):
    litemapy = pytest.importorskip("litemapy")
    rng = np.random.default_rng(0)
    for corner, size in (((0, 0, 0), (3, 4, 5)), ((1, -2, 9), (-3, 4, -5)), ((4, 5, 6), (-3, -6, 2))):
        region, expected = litemapy.Region(*corner, *size), {}
        low = [min(n + 1, 0) for n in size]
        for x, y, z in itertools.product(*(range(abs(n)) for n in size)):
            block = litemapy.BlockState(f"minecraft:b{rng.integers(40)}", axis="xyz"[rng.integers(3)])
            region[x + low[0], y + low[1], z + low[2]] = block
            expected[x, y, z] = block.to_block_state_identifier()
        region.as_schematic(name="a").save(str(tmp_path / "a.litematic"))
        region.to_sponge_nbt().save(tmp_path / "a.schem")
        region.to_structure_nbt().save(tmp_path / "a.nbt")
        for suffix in NBT_SUFFIXES:
            assert states(tmp_path / f"a{suffix}") == expected, (suffix, size)


@pytest.mark.parametrize("v", TREES, ids=lambda v: str(v.shape))
def test_mcschematic_reads_the_same_and_back(tmp_path, v):
    mcschematic = pytest.importorskip("mcschematic")
    files.write(tmp_path / "a.schem", v)
    found = mcschematic.MCSchematic(str(tmp_path / "a.schem"))
    expected = {at: state(*block) for at, block in blocks_of(v).items()}
    height, length, width = v.shape
    everywhere = itertools.product(range(width), range(height), range(length))
    blocks = {at: found.getBlockStateAt(at) for at in everywhere}
    assert {at: block for at, block in blocks.items() if block != "minecraft:air"} == expected
    found.save(str(tmp_path), "b", mcschematic.Version.JE_1_18_2)
    assert np.array_equal(files.read(tmp_path / "b.schem")[0], files.read(tmp_path / "a.schem")[0])
    many = mcschematic.MCSchematic()
    for k in range(300):  # varints of two bytes
        many.setBlock((k, 0, 0), f"minecraft:b{k}")
    many.save(str(tmp_path), "c", mcschematic.Version.JE_1_18_2)
    assert states(tmp_path / "c.schem") == {(k, 0, 0): f"minecraft:b{k}" for k in range(300)}


@pytest.mark.parametrize("v", TREES, ids=lambda v: str(v.shape))
def test_py_vox_io_reads_the_same_and_back(tmp_path, v):
    parser, writer = pytest.importorskip("pyvox.parser"), pytest.importorskip("pyvox.writer")
    files.write(tmp_path / "a.vox", v)
    found = parser.VoxParser(tmp_path / "a.vox").parse()
    (model,) = found.models
    assert tuple(model.size) == (v.shape[2], v.shape[1], v.shape[0])  # z is up
    assert {(c.x, c.z, c.y): c.c for c in model.voxels} == {
        (x, y, z): v[y, z, x] for y, z, x in np.argwhere(v).tolist()}
    colours = {found.palette[c - 1][:3] for c in range(1, 15)}
    assert len(colours) == 14 and found.palette[0].a == 255
    writer.VoxWriter(tmp_path / "b.vox", found).write()
    if len(found.palette) == 256:
        assert np.array_equal(back(tmp_path / "b.vox"), v)


SHARED = os.environ.get("MINECRAFT_FILES", "")


@pytest.mark.skipif(not SHARED, reason="MINECRAFT_FILES=FOLDER reads every file of a folder")
def test_files_of_others_are_read():
    suffixes = (".schem", ".schematic", ".nbt", ".litematic")
    paths = [path for path in sorted(Path(SHARED).rglob("*")) if path.suffix in suffixes]
    assert paths
    for path in paths:
        names, indices, facts = files.read_blocks(path)
        _, known, unknown = files.survey(names, indices)
        assert sum((known + unknown).values()) == indices.size
        woods = {block: "oak_log" for block in unknown}  # whatever they are: there is something in each file
        v, facts = files.read(path, rename=woods)
        assert v.any() and not facts.unknown


# What is refused

GOOD = sponge(2, (2, 1, 2), NAMES, [0, 1, 2, 0])
LITE = region((0, 0, 0), (2, 1, 1), ["minecraft:air", LOG], [1])
DEEP = b"\x0a\0\0" + b"\x0a\0\1a" * 400


def nested_lists(depth):
    return root(tag(9, "a", struct.pack(">bi", 9, 1) * depth))


REFUSED = {
    "empty": (b"", "found 0 bytes that begin with nothing"),
    "picture": (b"\x89PNG" + bytes(9), "expected a .schem, .* found 13 bytes that begin with 89504e47; give"),
    "text": (b"hello", "found 5 bytes that begin with 68656c6c"),
    "zipped text": (gzip.compress(b"hello"), "found 5 bytes that begin with 68656c6c"),
    "cut gzip": (gzip.compress(GOOD)[:-9], "expected a whole gzip file, found one without end"),
    "gzip head": (gzip.compress(GOOD)[:5], "expected a whole gzip file, found one without end"),
    "gzip checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "expected a whole gzip file, found a damaged one"),
    "cut NBT": (GOOD[:40], "bytes at offset .* of its NBT, found .*; the file is cut off or damaged"),
    "deep NBT": (DEEP, "expected NBT at most 128 deep"),
    "deep lists": (nested_lists(5000), "expected NBT at most 128 deep"),
    "negative length": (root(tag(12, "a", struct.pack(">i", -3))), "expected -24 bytes"),
    "huge array": (root(tag(11, "a", struct.pack(">i", 2 ** 31 - 1))), "expected 8,589,934,588 bytes"),
    "huge empty list": (root(tag(9, "a", struct.pack(">bi", 0, 2 ** 31 - 1))), "tag of 1 to 12 .*, found 0"),
    "unknown tag": (root(tag(13, "a", b"")), "an NBT tag of 1 to 12 before offset .*, found 13"),
    "other NBT": (root(number("LevelName", 3)), "expected blocks of a known format, found NBT of LevelName"),
    "version": (sponge(4, (1, 1, 1), NAMES, [1]), "expected Sponge version 1, 2 or 3, found 4"),
    "no palette": (root(number("Version", 2), sizes(1, 1, 1)), "a compound under Palette, found nothing"),
    "wrong type": (root(number("Version", 2), sizes(1, 1, 1), tag(8, "Palette", text("oak"))),
                   "expected a compound under Palette, found something else"),
    "too few blocks": (sponge(2, (2, 1, 2), NAMES, [0, 1, 2]), "expected 4 blocks, found 3; the file is cut"),
    "too many blocks": (sponge(3, (2, 1, 2), NAMES, [0, 1, 2, 0, 0]), "expected 4 blocks, found 5"),
    "palette index": (sponge(2, (2, 1, 2), NAMES, [0, 1, 3, 0]), "indices of its 3 palette entries, found 3"),
    "endless varint": (sponge(2, (1, 1, 1), NAMES, [0x80]), "with 1 to 5 bytes, found one without end"),
    "long varint": (sponge(2, (1, 1, 1), NAMES, [0x80] * 5 + [1]), "numbers with 1 to 5 bytes"),
    "no size": (sponge(2, (0, 1, 1), NAMES, []), r"expected 1 to 16,777,216 blocks, found 0x1x1 \(y, z, x\)"),
    "huge size": (sponge(2, (65535, 65535, 65535), NAMES, [1]), "found 65535x65535x65535"),
    "ids": (mcedit((1, 1, 3), [17, 17], [0, 0]), "expected 3 block ids, found 2"),
    "data": (mcedit((1, 1, 2), [17, 17], [0]), "expected 2 block data, found 1"),
    "add": (mcedit((1, 1, 2), [17, 17], [0, 0], tag(7, "AddBlocks", array("B", []))),
            "expected 1 bytes in AddBlocks, found 0"),
    "outside": (structure((1, 1, 1), ["a:x"], [(0, 0, 1, 0)]), r"blocks inside 1x1x1 \(y, z, x\), found one"),
    "before": (structure((1, 1, 1), ["a:x"], [(0, 0, 0, -1)]), "expected blocks inside 1x1x1"),
    "state": (structure((1, 1, 1), ["a:x"], [(1, 0, 0, 0)]), "indices of its 1 palette entries, found 1"),
    "size of two": (structure((1, 1), ["a:x"], []), "expected 3 numbers under size, found 2"),
    "negative structure": (structure((1, -1, 1), ["a:x"], []), "found -1x1x1"),
    "huge structure": (structure((2 ** 31 - 1,) * 3, ["a:x"], []), "expected 1 to 16,777,216 blocks"),
    "no regions": (litematic(), "expected a region of blocks, found none"),
    "longs": (litematic(a=region((0, 0, 0), (5, 5, 5), ["a:x"], [0] * 3)), "4 longs of block states, found"),
    "litematic index": (litematic(a=region((0, 0, 0), (2, 1, 1), ["a:x"], [0b01_00])), "1 palette entries"),
    "no entries": (litematic(a=region((0, 0, 0), (2, 1, 1), [], [0])), "its 0 palette entries, found 0"),
    "far regions": (litematic(a=LITE, b=region((10 ** 9, 0, 0), (2, 1, 1), ["a:x"], [0])), "1x1x1000000002"),
    "flat region": (litematic(a=region((0, 0, 0), (2, 0, 1), ["a:x"], [])), "found 0x1x2"),
    "vox head": (b"VOX 1", "expected a whole .vox file, found 5 bytes"),
    "cut vox": (vox((2, 2, 2), [(0, 0, 0, 1)])[:-2], "expected a whole .vox file"),
    "vox chunk": (vox((2, 2, 2), [], b"RGBA" + struct.pack("<2i", 999, 0)), "one of a wrong length"),
    "negative chunk": (vox((2, 2, 2), [], b"nTRN" + struct.pack("<2i", -12, 0)), "one of a wrong length"),
    "two models": (vox((2, 2, 2), [(0, 0, 0, 1)], models=2), "expected one model, found 2; export"),
    "voxel outside": (vox((2, 2, 2), [(0, 2, 0, 1)]), "expected voxels inside 2x2x2, found one outside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_get_one_line(tmp_path, case):
    content, message = REFUSED[case]
    path = tmp_path / "bad.schem"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        files.read(path)
    line = str(error.value)
    assert line.startswith(f"{path}: expected ") and "; " in line and "\n" not in line


def test_no_file_folder_or_tree(tmp_path):
    with pytest.raises(ValueError, match="expected a file, found a folder; give the files in it"):
        files.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none.nbt")
    (tmp_path / "a").write_bytes(sponge(2, (1, 1, 3), ["a:x", "a:y", "minecraft:air"], [0, 0, 1]))
    with pytest.raises(ValueError, match="expected logs or leaves .*, found a:x 2, a:y 1; .* a:x=oak_log"):
        files.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(sponge(2, (1, 1, 1), ["minecraft:air"], [0]))
    with pytest.raises(ValueError, match="found only air"):
        files.read(tmp_path / "a")


def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10 ** 6)
    (tmp_path / "a").write_bytes(gzip.compress(bytes([10]) + bytes(10 ** 8), 1))
    (tmp_path / "b").write_bytes(bytes(10 ** 6 + 1))
    tracemalloc.start()
    for name in "ab":
        with pytest.raises(ValueError, match="at most 1,000,000 bytes, found more; export a smaller"):
            files.read(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2 * 10 ** 7
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_anywhere_gives_one_line_or_a_tree(tmp_path, suffix):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    files.write(path, oak(8))
    data = path.read_bytes()
    data = bytearray(data if suffix == ".vox" else gzip.decompress(data))
    refused = 0
    for _ in range(400):
        damaged = data.copy()
        for at in rng.integers(0, min(len(data), 600), rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[:rng.integers(len(data))] if rng.random() < .2 else damaged)
        try:
            files.read(path, 8)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: expected ") and str(error).isprintable()
    assert 100 < refused


@pytest.mark.parametrize("v, message", [
    (oak() * 15, "expected classes 0 to 14, found 0 to 30; 15 is MASK"),
    (-oak().astype(int), "found -2 to 0"),
    (oak()[0], r"expected integers \(y, z, x\) .* found uint8 \(16, 16\)"), (oak() / 2, "found float64"),
    (oak()[:0], r"with 1 to 256 an axis, found uint8 \(0, 16, 16\)"),
    (np.zeros((1, 1, 257), int), r"found int64 \(1, 1, 257\)")])
def test_write_refuses(tmp_path, v, message):
    with pytest.raises(ValueError, match=message):
        files.write(tmp_path / "a.schem", v)
    with pytest.raises(ValueError, match="a.png: expected a name that ends in .schem, .nbt, "):
        files.write(tmp_path / "a.png", oak())
    assert not list(tmp_path.iterdir())


# Command line

def test_command_line(tmp_path, capsys):
    files.write(tmp_path / "a.schem", oak())
    (tmp_path / "bad.nbt").write_bytes(b"")
    (tmp_path / "m.schem").write_bytes(sponge(2, (2, 1, 1), [LOG, "a:x"], [0, 1]))
    assert files.main([str(tmp_path / "a.schem")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.schem: Sponge v2, DataVersion 2975, 16x16x16 (y, z, x): minecraft:air 4,075, "
        "minecraft:oak_leaves 16, minecraft:oak_log 5\n")
    assert files.main([str(tmp_path / name) for name in ("bad.nbt", "none.nbt", "m.schem")]) == 2
    out, errors = capsys.readouterr()
    assert out.endswith("2x1x1 (y, z, x): minecraft:oak_log 1; unknown: a:x 1\n") and out.count("\n") == 1
    assert [line.startswith("error: ") for line in errors.splitlines()] == [True, True]
    assert files.main(["convert", str(tmp_path / "m.schem"), str(tmp_path / "m.litematic")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/m.litematic: 1x1x1 (y, z, x); left out: a:x 1\n"
    words = ["convert", str(tmp_path / "m.schem"), str(tmp_path / "m.vox"), "a:x=oak_leaves"]
    assert files.main(words) == 0 and "left out" not in capsys.readouterr().out
    assert files.read(tmp_path / "m.vox")[0].tolist() == [[[1]], [[2]]]
    for words in ([], ["convert"], ["convert", "a"], [*words[:3], "a:x"]):
        assert files.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert files.main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: ")


def test_module_runs(tmp_path):
    (tmp_path / "bad.nbt").write_bytes(gzip.compress(GOOD)[:30])
    done = subprocess.run([sys.executable, "-m", "data.voxel_files", tmp_path / "bad.nbt"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and "bad.nbt: expected a whole gzip file" in done.stderr
