"""data/trees.py: fourteen kinds, sets and their cache, own files, structure, entropy, prompts, pictures."""
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest

from data import trees

REPOSITORY = Path(__file__).resolve().parent.parent
ROLES = np.array(["air", "wood", "leaves", "plant"])
LADDER_KINDS = ("oak", "fancy_oak", "birch", "spruce", "acacia", "dark_oak", "cherry")


def g(seed=0):
    return np.random.default_rng(seed)


def drawn(kind, count, size=32, seed=1, **options):
    return trees.trees(kind, count, size, seed, cache=None, **options).voxels


@pytest.fixture(scope="module")
def ladder():
    """140 trees at 32^3, 20 of each of seven kinds."""
    return drawn(LADDER_KINDS, 140)


@pytest.fixture(scope="module")
def forest():
    """kind -> 200 trees at 32^3 as they were grown: leaves are not pruned."""
    return {kind: np.stack([trees._placed(kind, 32, 0, 1, i) for i in range(200)]) for kind in trees.KINDS}


def post(height=4, size=16, x=8, z=8, log=1):
    """A column of logs under a 3x3x2 block of leaves: a small valid tree."""
    v = np.zeros((size, size, size), np.uint8)
    v[height - 1:height + 1, z - 1:z + 2, x - 1:x + 2] = log + 1
    v[:height, z, x] = log
    return v


# Kinds

@pytest.mark.parametrize("kind, logs, leaves, height", [
    ("oak", (4, 6), (49, 61), (5, 7)), ("birch", (5, 7), (49, 61), (6, 8)),
    ("super_birch", (5, 13), (49, 61), (6, 14)), ("jungle", (4, 12), (49, 61), (5, 13)),
    ("swamp_oak", (5, 8), (129, 141), (6, 9)), ("fancy_oak", (4, 34), (72, 440), (8, 15)),
    ("spruce", (5, 8), (29, 167), (6, 11)), ("pine", (6, 10), (10, 90), (8, 12)),
    ("mega_spruce", (49, 113), (180, 380), (14, 30)), ("mega_pine", (49, 113), (70, 210), (14, 30)),
    ("mega_jungle", (37, 137), (195, 410), (11, 32)), ("acacia", (5, 12), (57, 86), (6, 10)),
    ("dark_oak", (24, 61), (104, 143), (7, 11)), ("cherry", (8, 25), (125, 400), (9, 11))])
def test_kind(forest, kind, logs, leaves, height):
    """Ranges of the game's rules (an earlier reading of the same table, 400 draws), reach and blocks."""
    v = forest[kind]
    log = 2 * trees.SPECIES.index(trees.KINDS[kind].species) + 1
    assert set(np.unique(v)) == {0, log, log + 1}
    for found, (low, high), slack in (((v == log).sum((1, 2, 3)), logs, .35),
                                      ((v == log + 1).sum((1, 2, 3)), leaves, .35),
                                      (np.array([np.argwhere(t)[:, 0].max() + 1 for t in v]), height, .2)):
        assert low <= found.min() and found.max() <= high
        if high - low > 12:
            assert found.max() - found.min() >= (1 - slack) * (high - low)
    away = np.abs(np.argwhere(v)[:, 2:] - 16).max()
    assert trees.KINDS[kind].reach - 2 <= away <= trees.KINDS[kind].reach
    assert height[1] == trees.KINDS[kind].top and (v[:, 0, 16, 16] == log).all()


def test_oaks_follow_their_law(forest):
    v = np.concatenate([forest["oak"], np.stack([trees._placed("oak", 32, 0, 2, i) for i in range(700)])])
    logs, leaves = (v == 1).sum((1, 2, 3)), (v == 2).sum((1, 2, 3))
    assert set(logs) == {4, 5, 6} and (abs(np.bincount(logs)[4:] / 900 - 1 / 3) < .05).all()
    assert abs(leaves.mean() - 55) < .3 and abs(leaves.var() - 3) < .5  # 61 less 12 coins
    tree = v[0]
    top = logs[0]
    layers = [np.argwhere(tree[top - k])[:, 1] for k in range(4)]
    assert [int(np.abs(layer - 16).max()) for layer in layers] == [1, 1, 2, 2]
    assert (tree[top] > 0).sum() == 5  # the top layer has no corners


def test_conifers_have_66_and_25_shapes():
    for kind, shapes in (("spruce", 66), ("pine", 25)):
        found = {trees._placed(kind, 16, 0, 1, i).tobytes() for i in range(1500)}
        assert len(found) <= shapes and len(found) > .9 * shapes
        assert len(outcomes(kind)) == shapes


def test_wood_is_whole_and_only_cherries_lose_leaves(forest):
    for kind, v in forest.items():
        v = v if kind == "cherry" else v[:100]
        score = trees.scs(v)
        assert (score.trunk == 1).all() and (score.wood == 1).all() and (score.species == 1).all(), kind
        assert (score.leaf < 1).mean() == pytest.approx(.16 if kind == "cherry" else 0, abs=.07), kind
        pruned = trees.repair(v)
        assert trees.scs(pruned).valid.all() and (pruned[pruned != v] == 0).all()
        assert all(max(reference(tree)["distances"]) <= 6 for tree in pruned[:2])


def test_26_neighbours_are_needed_for_wood(forest):
    def by_six(v):
        return np.mean([len(parts(trees.is_log(tree), SIX)) > 1 for tree in v[:60]])
    found = {kind: by_six(forest[kind]) for kind in ("oak", "acacia", "mega_jungle", "fancy_oak", "dark_oak")}
    assert found["oak"] == 0 and found["acacia"] == 1 and found["mega_jungle"] > .9
    assert .4 < found["fancy_oak"] < .8 and .25 < found["dark_oak"] < .65


# Sets

def test_a_tree_is_its_kind_seed_and_index():
    few, many = drawn("oak", 5, 16), drawn("oak", 300, 16)
    assert few.dtype == np.uint8 and few.shape == (5, 16, 16, 16)
    assert np.array_equal(few, many[:5]) and np.array_equal(many, drawn("oak", 300, 16))
    mixed = trees.trees(("spruce", "oak"), 6, 16, cache=None)
    assert np.array_equal(mixed.voxels[1::2], many[1:6:2])  # whatever else is drawn
    assert [list(trees.KINDS)[k] for k in mixed.species] == ["spruce", "oak"] * 3
    assert np.array_equal(drawn("oak", 1, 32)[0, :16, 8:24, 8:24], few[0])
    assert mixed.slots == [trees.describe(v) for v in mixed.voxels]


def test_splits_share_no_stream():
    assert trees.SEEDS == dict(train=1, val=2, test=3)
    first = {(seed, kind, i): trees.Dice(seed, kind, i).random()
             for seed in trees.SEEDS.values() for kind in range(14) for i in range(100)}
    assert len(set(first.values())) == len(first)
    shapes = [set(map(bytes, drawn("oak", 600, 16, seed))) for seed in trees.SEEDS.values()]
    for a, b in itertools.combinations(shapes, 2):  # equal only by chance: 600 * 600 / 12,288
        assert 10 < len(a & b) < 55


def test_the_grids_that_fit():
    small = "oak birch super_birch jungle swamp_oak fancy_oak spruce pine acacia dark_oak".split()
    assert trees.fitting(16) == small
    assert trees.fitting(16, 4) == "oak birch super_birch jungle swamp_oak spruce pine".split()
    assert trees.fitting(32) == trees.fitting(32, 4) == list(trees.KINDS)
    assert trees.fitting(8) == ["oak", "birch"]
    for kind in small:  # nothing wraps around the border
        here, there = drawn(kind, 20, 16), drawn(kind, 20, 32)
        assert np.array_equal((here > 0).sum((1, 2, 3)), (there > 0).sum((1, 2, 3)))


@pytest.mark.parametrize("arguments, parts", [
    (("cherry", 1, 16), ("cherry", "16^3", "oak, birch, super_birch")),
    (("acacia", 1, 16, 1, 4), ("acacia", "16^3 with jitter 4", "spruce, pine")),
    (("oka", 1, 16), ("oka", "unknown", "oak")), (((), 1, 16), ("unknown", "oak")),
    (("oak", 0, 16), ("count",)), (("oak", 1, 15), ("even", "15")), (("oak", 1, 16, -1), ("seed",))])
def test_one_line_says_what_fits(arguments, parts):
    with pytest.raises(ValueError) as error:
        trees.trees(*arguments, cache=None)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_jitter_moves_the_whole_tree():
    here, there = drawn("birch", 80, 16), drawn("birch", 80, 16, jitter=4)
    moves = set()
    for a, b in zip(here, there):
        dz, dx = (np.argwhere(b[0] == 3) - np.argwhere(a[0] == 3))[0]
        assert np.array_equal(np.roll(a, (dz, dx), (1, 2)), b)
        moves.add((dz, dx))
    assert np.abs(np.array(list(moves))).max() == 4 and len(moves) > 40


def test_a_break_leaves_no_half_of_a_set(tmp_path, monkeypatch):
    grow, calls = trees.grow, []

    def breaks(*arguments):
        calls.append(arguments)
        if len(calls) == 150:
            raise KeyboardInterrupt
        return grow(*arguments)
    monkeypatch.setattr(trees, "grow", breaks)
    with pytest.raises(KeyboardInterrupt):
        trees.trees("oak", 200, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(trees.trees("oak", 200, cache=tmp_path).voxels) == 200


def test_the_cache_keeps_a_set(tmp_path, monkeypatch):
    first = trees.trees(("oak", "pine"), 300, cache=tmp_path)
    plain = trees.trees(("oak", "pine"), 300, cache=None)
    assert isinstance(first.voxels, np.memmap) and np.array_equal(first.voxels, plain.voxels)
    assert first.slots == plain.slots and first.facts == plain.facts
    (folder,) = tmp_path.iterdir()  # and nothing half done beside it
    with monkeypatch.context() as patch:
        patch.setattr(trees, "grow", None)
        assert np.array_equal(trees.trees(("oak", "pine"), 300, cache=tmp_path).voxels, plain.voxels)
        with pytest.raises(TypeError):
            trees.trees(("oak", "pine"), 299, cache=tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    for name, fault in (("voxels.npy", lambda data: data[:-9]), ("index.json", lambda data: data[:50])):
        (folder / name).write_bytes(fault((folder / name).read_bytes()))
        assert np.array_equal(trees.trees(("oak", "pine"), 300, cache=tmp_path).voxels, plain.voxels)
    trees.trees("oak", 2, seed=2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


# Own files

def roles(tmp_path, **change):
    """An .npz as people make them from game files: two good trees and three that must be left out."""
    names = np.array(["minecraft:air", "minecraft:birch_wood", "minecraft:birch_leaves", "minecraft:stone",
                      "minecraft:stripped_cherry_log", "minecraft:mangrove_leaves", "minecraft:mangrove_log"])
    role, block = (np.zeros((5, 20, 20, 20), np.int64) for _ in range(2))  # x, y, z

    def put(i, x, y, z, r, b):
        role[i, x, y, z], block[i, x, y, z] = r, b
    put(0, 5, slice(2, 7), 9, 1, 1)  # stands on stone at y = 2
    put(0, slice(4, 7), slice(7, 9), slice(8, 11), 2, 2)
    put(0, slice(6, 8), 7, 9, 2, 5)  # mangrove leaves among birch, one of them further out in x
    put(0, 0, 0, 0, 3, 3)
    put(1, slice(10, 12), slice(0, 4), slice(3, 5), 1, 4)  # 2x2
    put(1, slice(9, 13), 4, slice(2, 6), 2, 5)
    put(2, 0, slice(0, 3), 0, 1, 6)  # mangrove only
    put(3, 0, slice(0, 20), 0, 1, 1)  # 20 high
    put(4, 3, slice(1, 5), 3, 1, 1)
    put(4, 4, 0, 3, 2, 2)  # a leaf is the lowest block
    arrays = dict(role=role, block=block, role_names=ROLES, block_names=names, name=np.array(list("abcde")))
    np.savez(tmp_path / "own.npz", **{k: a for k, a in {**arrays, **change}.items() if a is not None})
    return tmp_path / "own.npz"


def test_roles_and_names_become_classes(tmp_path):
    found = trees.load(roles(tmp_path))
    assert found.voxels.shape == (2, 16, 16, 16) and found.voxels.dtype == np.uint8
    first = np.zeros((16, 16, 16), np.uint8)
    first[:5, 8, 8], first[5:7, 7:10, 7:10], first[5, 8, 10] = 3, 4, 4
    second = np.zeros((16, 16, 16), np.uint8)
    second[:4, 8:10, 8:10], second[4, 7:11, 7:11] = 13, 14
    assert np.array_equal(found.voxels[0], first) and np.array_equal(found.voxels[1], second)
    assert [list(trees.KINDS)[k] for k in found.species] == ["birch", "cherry"]
    assert found.left_out == ["c: no block of a known species", "d: does not fit",
                              "e: no log on its lowest layer"]
    assert "2 of 5 trees on 16^3, 2 of them valid" in found.facts
    assert "1 left out: does not fit" in found.facts
    assert len(trees.load(roles(tmp_path), 32).voxels) == 3  # the high one fits now


def test_own_arrays(tmp_path):
    small, large = post(5, 8, 2, 5), post(5, 24, 20, 3)
    for v in (small, large):
        np.save(tmp_path / "a.npy", v)
        assert np.array_equal(trees.load(tmp_path / "a.npy").voxels, [post(5)])
    np.savez(tmp_path / "b.npz", voxels=np.stack([post(4, 16, 3, 3), post(6)]))
    expected = [post(4, 32, 16, 16), post(6, 32, 16, 16)]
    assert np.array_equal(trees.load(tmp_path / "b.npz", 32).voxels, expected)
    ours = drawn(tuple(trees.KINDS), 28)
    np.save(tmp_path / "c.npy", ours)
    assert np.array_equal(trees.load(tmp_path / "c.npy", 32).voxels, ours)


@pytest.mark.parametrize("array, part", [
    (np.zeros((2, 3, 3)), "classes 0..14"), (np.full((4, 4, 4), 15, np.uint8), "classes 0..14"),
    (np.full((4, 4, 4), -1), "classes 0..14"), (np.zeros((1, 4, 4, 4), int), "none of 1"),
    (np.zeros((4, 4, 4)), "float64"), (np.array([None]), "plain arrays")])
def test_files_that_are_no_trees(tmp_path, array, part):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError) as error:
        trees.load(tmp_path / "a.npy")
    assert part in str(error.value) and "a.npy" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected voxels, or role"):
        trees.load(roles(tmp_path, block_names=None))


@pytest.mark.skipif(not os.environ.get("TREES_FILE"), reason="TREES_FILE names no .npz of real trees")
def test_a_real_file():
    for size in (16, 32):
        found = trees.load(os.environ["TREES_FILE"], size)
        with np.load(os.environ["TREES_FILE"]) as stored:
            assert len(found.voxels) + len(found.left_out) == len(stored["role"])
        score = trees.scs(found.voxels)
        assert (found.voxels[:, 0, size // 2 - 1:size // 2 + 2] > 0).any((1, 2)).all()
        assert len(found.voxels) > 100 and score.valid.sum() > 50
        for i in range(0, len(found.voxels), 40):
            expected = reference(found.voxels[i])
            assert all(getattr(score, name)[i] == pytest.approx(expected[name]) for name in trees.PARTS)
            turned = trees.augment(found.voxels[i], g(i))
            assert np.array_equal(np.bincount(turned.ravel()), np.bincount(found.voxels[i].ravel()))


# Symmetries

def test_augment_turns_about_the_trunk():
    v = post(5)
    v[3, 8, 11:14], v[2, 6, 8] = 2, 1  # arms of different length
    seen = set()
    for seed in range(60):
        turned = trees.augment(v, g(seed))
        assert (turned[:, 8, 8] == v[:, 8, 8]).all() and np.bincount(turned.ravel()).tolist() == np.bincount(
            v.ravel()).tolist()
        seen.add(turned.tobytes())
    assert len(seen) == 8
    assert trees.augment(v, g(3)).tobytes() == trees.augment(v, g(3)).tobytes()
    centred = {np.rot90(v, k, (1, 2)).tobytes() for k in (1, 2, 3)}
    assert not centred & seen  # about the grid's middle the trunk would move


def test_augment_keeps_a_wide_trunk_and_every_block():
    for kind, size in (("dark_oak", 16), ("mega_jungle", 32), ("fancy_oak", 16), ("acacia", 16)):
        for i, v in enumerate(drawn(kind, 12, size)):
            turned = trees.augment(v, g(i))
            assert np.array_equal(turned[0] > 0, v[0] > 0) or kind == "mega_jungle"
            assert np.array_equal(np.bincount(turned.ravel()), np.bincount(v.ravel()))
            assert trees.scs(turned).scs == 1 and trees.describe(turned) == trees.describe(v)
    edge = post()
    edge[3, 8, :8] = 2  # column 0 has no mirror image on an even grid
    assert all((trees.augment(edge, g(k)) == 2).sum() == (edge == 2).sum() for k in range(20))


def test_augment_moves_by_the_jitter():
    v, places = post(), set()
    for seed in range(400):
        moved = trees.augment(v, g(seed), jitter=4)
        ((z, x),) = np.argwhere(moved[0])
        assert np.array_equal(np.roll(v, (z - 8, x - 8), (1, 2)), moved)
        places.add((z - 8, x - 8))
    assert len(places) == 81 and np.abs(list(places)).max() == 4


# Structure: against a search in plain Python

SIX = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
ALL = [s for s in itertools.product((-1, 0, 1), repeat=3) if any(s)]
FLAT = [s for s in ALL if s[0] == 0]


def parts(mask, steps):
    """Connected sets of the cells of mask, as sets of tuples."""
    rest, found = set(map(tuple, np.argwhere(mask).tolist())), []
    for cell in sorted(rest):
        if cell in rest:
            rest.remove(cell)
            part, queue = {cell}, [cell]
            while queue:
                y, z, x = queue.pop()
                near = {(y + a, z + b, x + c) for a, b, c in steps} & rest
                rest -= near
                part |= near
                queue += near
            found.append(part)
    return found


def reference(v):
    """The parts of the score, and the set of broken cells, one tree, as they are defined."""
    wood, leaf = trees.is_log(v), trees.is_leaf(v)
    ground = wood & (np.arange(len(v))[:, None, None] == 0)
    standing = [p for p in parts(wood, ALL) if any(y == 0 for y, _, _ in p)]
    main = max(standing, key=len, default=set())

    def distances(sources):
        leaves, found, queue = set(map(tuple, np.argwhere(leaf).tolist())), {}, deque((c, 0) for c in sources)
        while queue:
            (y, z, x), d = queue.popleft()
            for a, b, c in SIX:
                cell = (y + a, z + b, x + c)
                if cell in leaves and cell not in found:
                    found[cell] = d + 1
                    queue.append((cell, d + 1))
        return {cell: found.get(cell, 99) for cell in leaves}
    feet, far = parts(ground, FLAT), distances(main)
    result = dict.fromkeys(trees.PARTS, 0.0)
    if wood.sum() >= 3 and leaf.sum() >= 8:
        result = dict(trunk=1 / len(feet) if feet else 0, wood=len(main) / wood.sum(),
                      leaf=np.mean([d <= 6 for d in far.values()]),
                      solid=max(map(len, parts(wood | leaf, ALL))) / (wood | leaf).sum())
    own = [p for p in feet if p <= main]
    extra = set().union(*own) - max(own, key=len) if own else set()
    bad = set(map(tuple, np.argwhere(wood).tolist())) - (main - extra)
    bad |= {cell for cell, d in distances(main - extra).items() if d > 6}
    return dict(result, distances=far.values(), broken=bad)


def test_scs_equals_a_plain_search(ladder):
    kinds = itertools.cycle(trees.LADDER)
    bad = [trees.corrupt(v, next(kinds), g(i)) for i, v in enumerate(ladder[::2])]
    crowd = [g(i).choice(3, (9, 9, 9), p=(.8, .1, .1)).astype(np.uint8) for i in range(40)]
    for group in (np.stack(bad), np.stack(crowd), ladder[:40]):
        score, broken = trees.scs(group), trees.broken(group)
        for i, v in enumerate(group):
            expected = reference(v)
            for name in trees.PARTS:
                assert getattr(score, name)[i] == pytest.approx(expected[name], abs=1e-12), (name, i)
            assert set(map(tuple, np.argwhere(broken[i]).tolist())) == expected["broken"]
    one = trees.scs(ladder[0])
    assert one.scs == 1 and one.valid and np.ndim(one.scs) == 0
    assert trees.scs(ladder[:6].reshape(2, 3, 32, 32, 32)).scs.shape == (2, 3)


def test_scs_by_hand():
    assert trees.scs(post()).valid and not trees.scs(np.zeros((8, 8, 8), np.uint8)).scs
    assert trees.scs(np.full((8, 8, 8), trees.MASK, np.uint8)).scs == 0
    wide = post(5)
    wide[:4, 8:10, 8:10] = 1
    assert trees.scs(wide).trunk == 1
    v = post(6)
    v[0, 8, 12] = 1
    assert (trees.scs(v).trunk, trees.scs(v).wood) == (.5, 6 / 7)
    v = post(6)
    v[3, 9, 9] = v[4, 10, 10] = 1  # an arm that touches by its corners only
    assert trees.scs(v).wood == 1
    v = post(4, 32)
    v[3, 8, 10:18] = 2  # leaves 2, 3, ... 9 steps from the log
    assert trees.scs(v).leaf == (17 + 5) / (17 + 8)
    v = post(3)
    v[1] = 0  # two logs are no tree
    assert trees.scs(v).scs == 0


@pytest.mark.parametrize("kind, expected, valid, share", [
    ("second trunk", .292, 0, 99.99), ("floating leaves", .711, 0, 99.95), ("cut trunk", .092, .02, 99.99),
    ("no ground logs", 0, 0, 100), ("noise 1e-4", .832, .07, 99.99), ("noise 1e-3", .294, 0, 99.93),
    ("noise 1e-2", .006, 0, 99.33)])
def test_the_ladder(ladder, kind, expected, valid, share):
    """The table of an independent implementation; at 140 trees the standard errors are .01 to .02."""
    bad = np.stack([trees.corrupt(v, kind, g([5, i])) for i, v in enumerate(ladder)])
    score = trees.scs(bad)
    assert score.scs.mean() == pytest.approx(expected, abs=.03)
    assert score.valid.mean() == pytest.approx(valid, abs=.07)
    assert 100 * (bad == ladder).mean() == pytest.approx(share, abs=.01)  # accuracy sees nothing
    assert trees.scs(ladder).valid.all()
    fixed = trees.repair(bad)
    logs, leaves = (f(fixed).sum((1, 2, 3)) for f in (trees.is_log, trees.is_leaf))
    after, enough = trees.scs(fixed), (logs >= 3) & (leaves >= 8)  # a cut trunk may leave less than a tree
    assert ((fixed == bad) | (fixed == 0)).all() and after.valid[enough].sum() >= .97 * enough.sum()
    assert (after.scs >= score.scs)[enough].all() and not after.scs[~enough].any()


def test_each_corruption_does_what_it_says(ladder):
    v = ladder[0]
    for seed in range(20):
        second = trees.corrupt(v, "second trunk", g(seed))
        new = np.argwhere(second != v)
        assert 3 <= len(new) <= 6 and (np.abs(new[:, 1:] - 16).max(1) == 7).all() and new[0, 0] == 0
        cubes = trees.corrupt(v, "floating leaves", g(seed))
        assert (cubes != v).sum() == 16 and len(parts(cubes > 0, ALL)) == 3
        cut = trees.corrupt(v, "cut trunk", g(seed))
        assert len(set(np.argwhere(cut != v)[:, 0])) == 1 and 1 <= np.argwhere(cut != v)[0, 0] <= 3
    assert np.array_equal(np.argwhere(trees.corrupt(v, "no ground logs", g()) != v), [[0, 16, 16]])
    hit = np.mean([(trees.corrupt(v, "noise 1e-2", g(k)) != v).mean() for k in range(20)])
    assert hit == pytest.approx(.0067, abs=.0005)
    with pytest.raises(ValueError, match="second trunk"):
        trees.corrupt(v, "storm", g())


def test_broken_finds_exactly_what_was_added(ladder):
    for kind in ("second trunk", "floating leaves"):
        for i, v in enumerate(ladder[:35]):
            bad = trees.corrupt(v, kind, g(i))
            if trees.scs(bad).leaf > .5:  # else the new trunk has more logs and counts as the main wood
                assert np.array_equal(trees.repair(bad), v), (kind, i)
    assert not trees.broken(ladder).any()
    v = post(6)
    v[1, 8, 9:12] = v[0, 8, 11] = 1  # a second foot of the main wood
    assert np.argwhere(trees.broken(v)).tolist() == [[0, 8, 11]]


def test_a_thousand_scores_take_no_time():
    v = drawn(("oak", "birch", "spruce"), 1000, 16)
    start = time.process_time()
    trees.scs(v)
    assert time.process_time() - start < 2


# Statistics and entropy

def test_statistics_by_hand():
    v = post(5)
    v[3, 8, 10], v[2, 8, 9:11] = 2, 1
    names, phi = trees.statistic_names(16), trees.statistics(v[None])[0]
    assert len(names) == len(phi) == 26 and phi.dtype == float
    found = dict(zip(names, phi))
    expected = {"height": 6, "logs": 7, "leaves": 18, "crown x": 4, "crown z": 3, "crown base": 3,
                "off axis": 2, "nodes": 2, "leaves y=0": 0, "leaves y=3": 1, "leaves y=4": 8, "leaves y=5": 9}
    assert {k: found[k] for k in expected} == expected
    assert found["offset"] == pytest.approx((1 + 2 + 2) / 25)
    # 25 blocks: the arm of three has no partner under six of the seven symmetries
    assert found["symmetry"] == pytest.approx((1 + 6 * 22 / 28) / 7)
    masked = v.copy()
    masked[9:] = trees.MASK
    assert np.array_equal(trees.statistics(masked[None])[0], phi)
    assert not trees.statistics(np.zeros((1, 16, 16, 16), np.uint8)).any()


def test_statistics_of_the_kinds(forest):
    symmetry = {k: trees.statistics(trees.repair(v[:100]))[:, 7].mean() for k, v in forest.items()}
    for kind, expected in dict(oak=.92, spruce=1, pine=1, fancy_oak=.61, acacia=.41, cherry=.36).items():
        assert symmetry[kind] == pytest.approx(expected, abs=.06), kind
    assert symmetry["spruce"] == symmetry["pine"] == 1
    jitter = trees.statistics(drawn("oak", 30, 16, jitter=4))
    assert np.allclose(jitter, trees.statistics(drawn("oak", 30, 16)))  # about the trunk, wherever it stands
    assert (trees.statistics(forest["oak"])[:, 9] == 1).all()


def test_symmetries(forest):
    for kind in ("acacia", "dark_oak"):  # a 1x1 and a 2x2 trunk
        v = forest[kind][0]
        copies = trees.symmetries(v)
        assert np.array_equal(copies[0], v) and all((c > 0).sum() == (v > 0).sum() for c in copies)
        assert len({c.tobytes() for c in copies}) == 8
        assert {trees.augment(v, np.random.default_rng(i)).tobytes() for i in range(80)} == {
            c.tobytes() for c in copies}


def outcomes(kind):
    """Every tree of a kind with its probability, coins included."""
    class Dice(trees._Path):
        def coin(self):
            return self.uniform(0, 1) == 1
    chance, todo = Counter(), [[]]
    while todo:
        dice = Dice(start := todo.pop())
        tree = tuple(map(frozenset, trees.grow(kind, dice)))
        chance[tree] += 1 / np.prod(dice.options)
        for i in range(len(start), len(dice.options)):
            todo += [dice.choices[:i] + [k] for k in range(1, dice.options[i])]
    return chance


@pytest.mark.parametrize("kind, bits", [
    ("oak", np.log2(3) + 12), ("birch", 13.585), ("super_birch", 15.070), ("jungle", 15.170),
    ("swamp_oak", 14.0), ("spruce", 5.850), ("pine", 4.339), ("acacia", 10.952), ("mega_spruce", 6.351),
    ("mega_pine", 6.351)])
def test_entropy(kind, bits):
    assert trees.entropy_bits(kind) == pytest.approx(bits, abs=.0006)
    assert trees.entropy_bits(kind, jitter=4) == pytest.approx(bits + 6.340, abs=.001)


def test_entropy_of_a_kind_among_others():
    """'oak' may mean three kinds that share no tree, log2 3 bits more; 'birch' two that share three heights."""
    three = trees.entropy_bits("oak", among=("oak", "swamp_oak", "fancy_oak"))
    assert three == pytest.approx(13.585 + np.log2(3), abs=.001)
    birch, super_birch = outcomes("birch"), outcomes("super_birch")
    want = -sum(p * np.log2((p + super_birch[v]) / 2) for v, p in birch.items())
    assert trees.entropy_bits("birch", among=("super_birch",)) == pytest.approx(want)
    assert 13.585 < want < 14.585
    fancy = drawn("fancy_oak", 200, 16)
    assert not {v.tobytes() for v in fancy} & {v.tobytes() for v in drawn("oak", 4000, 16)}


def test_entropy_by_listing_every_oak():
    chance = outcomes("oak")
    assert len(chance) == 12288 and np.allclose(list(chance.values()), 1 / 12288)
    found = Counter(v.tobytes() for v in drawn("spruce", 4000, 16))
    p = np.array(list(found.values())) / 4000
    assert -(p * np.log2(p)).sum() == pytest.approx(5.850, abs=.03)  # of what is drawn
    for kind in ("fancy_oak", "cherry", "elm"):
        with pytest.raises(ValueError, match="oak, birch"):
            trees.entropy_bits(kind)


# Prompts

def test_slots_are_measured():
    assert trees.describe(post()) == dict(size="small", species="oak", height=5, trunk="1x1", crown="narrow",
                                          branches=False)
    v = post(9, log=11)
    v[:9, 8:10, 8:10], v[9, 8, 3:13] = 11, 12
    v[6, 8, 11] = 11
    assert trees.describe(v) == dict(size="large", species="dark_oak", height=10, trunk="2x2", crown="wide",
                                     branches=True)
    assert [trees.describe(post(h))["size"] for h in (5, 6, 8, 9)] == ["small", "normal", "normal", "large"]
    for width, crown in ((5, "narrow"), (6, "medium"), (9, "medium"), (10, "wide")):
        v = post()
        v[4, 6:6 + width, 8] = 2
        assert trees.describe(v)["crown"] == crown
    v = post()
    v[:4, 8, 9] = 1  # a wall, not a wide trunk
    assert trees.describe(v)["trunk"] == "1x1"
    assert trees.describe(np.zeros((8, 8, 8), np.uint8)) == {}
    assert json.loads(json.dumps(trees.describe(post()))) == trees.describe(post())  # plain types


def test_what_is_said_can_be_asked(forest):
    for kind, group in forest.items():
        for i, v in enumerate(group[:15]):
            slots = trees.describe(v)
            assert slots["species"] == trees.KINDS[kind].species and all(trees.faithful(v, slots).values())
            said = {slot: value for slot, value in slots.items() if value is not False}
            assert trees.parse(trees.phrase(slots)) == said
            for seed in range(4):
                text = trees.caption(slots, g([i, seed]))
                assert trees.parse(text).items() <= said.items()
                assert set(filter(None, text.replace(",", "").split())) <= set(trees.words())
    assert trees.phrase(dict(species="dark_oak")) == "dark oak"
    assert set(trees.words()) >= set("dark oak tall 2x2 32 branches crown".split())
    slots = dict(size="large", species="spruce", height=9, trunk="2x2", crown="wide", branches=True)
    assert trees.phrase(slots) == "large spruce, 9 blocks, 2x2 trunk, wide crown, with branches"


def test_captions_drop_slots_as_often_as_they_should():
    slots = dict(size="large", species="spruce", height=9, trunk="2x2", crown="wide", branches=True)
    rng = g()
    asked = [trees.parse(trees.caption(slots, rng)) for _ in range(20000)]
    said = [a for a in asked if a]
    assert 1 - len(said) / 20000 == pytest.approx(.1, abs=.01)
    assert all("species" in a for a in said)
    alone = np.mean([len(a) == 1 for a in said])
    assert alone == pytest.approx(.3 + .7 / 32, abs=.015)
    for slot in set(slots) - {"species"}:
        assert np.mean([slot in a for a in said]) == pytest.approx(.35, abs=.015)
    assert not any(trees.caption(slots, rng, empty=0) == "" for _ in range(500))
    texts = [trees.caption(slots, rng, empty=0) for _ in range(400)]
    heads = {text.replace(",", "").split()[0] for text in texts}
    assert heads == {"large", "tall", "big", "spruce"}


@pytest.mark.parametrize("prompt, slots", [
    ("oak tree", dict(species="oak")), ("dark_oak", dict(species="dark_oak")), ("", {}), ("tree", {}),
    ("a TALL dark oak, 11 blocks", dict(size="large", species="dark_oak", height=11)),
    ("Spruce with branches.", dict(species="spruce", branches=True)),
    ("little birch with a slim crown and 1x1 trunk", dict(size="small", species="birch", crown="narrow",
                                                          trunk="1x1"))])
def test_prompts(prompt, slots):
    assert trees.parse(prompt) == slots


@pytest.mark.parametrize("prompt, parts", [
    ("oka tree", ("'oka'", " cherry,", " dark oak,", " tall,", "2x2,", "1 to 32")),
    ("oak 99", ("'99'", "1 to 32")), ("dark birch", ("'dark'",)), ("tall small oak", ("one size",)),
    ("oak birch", ("one species", "oak", "birch"))])
def test_prompts_that_make_no_sense(prompt, parts):
    with pytest.raises(ValueError) as error:
        trees.parse(prompt)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_faithful():
    v = post()
    assert trees.faithful(v, trees.parse("tall oak, 5 blocks, wide crown with branches")) == dict(
        size=False, species=True, height=True, crown=False, branches=False)
    assert trees.faithful(np.zeros_like(v), dict(species="oak", height=3)) == dict.fromkeys(
        ("species", "height"), False)
    assert trees.faithful(v, {}) == {}


# Pictures and commands

def test_pictures():
    v = drawn("oak", 1, 16)[0]
    picture = trees.render(v)
    assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, trees.render(v)) and (picture[0] == trees.PAPER).all()
    green = (picture[..., 1] > picture[..., 0].astype(int) + 20).mean()
    assert green > .1
    empty = trees.render(np.zeros_like(v), 64, 16)
    assert (empty == trees.PAPER).all()
    masked = np.full_like(v, trees.MASK)
    assert (trees.render(masked, 64, 16) == trees.PAPER).all()
    assert (trees.render(masked, 64, 16, glass=.1)[32] != trees.PAPER).any()
    near, far = (trees.render(v, frame=frame) for frame in (10, 20))
    assert (near != trees.PAPER).any(-1).sum() > 2.5 * (far != trees.PAPER).any(-1).sum()
    start = time.process_time()
    for _ in range(10):
        trees.render(v, frame=16)
    assert (time.process_time() - start) / 10 < .1


def test_nearer_blocks_hide_others_and_faces_have_their_light():
    """One cube in the middle: its top is brightest, the left side darker, the right side darkest."""
    v = np.zeros((16, 16, 16), np.uint8)
    v[0, 8, 8] = 2
    picture = trees.render(v, 200, 4).astype(int).sum(-1)
    a = 200 / 8  # half a block's width
    place = {"top": (160 - 1.22 * a, 100), "left": (160 + a / 4 - .6 * a, 100 - a / 2),
             "right": (160 + a / 4 - .6 * a, 100 + a / 2)}
    light = {name: picture[int(row), int(col)] for name, (row, col) in place.items()}
    assert light["top"] > light["left"] > light["right"]
    for near, far in ((14, 6), (6, 14)):  # pink before green, and the other way round
        v[0, 8, 8], v[1, 9, 9] = far, near  # a step towards the eye, so .22 a higher on the picture
        pixel = trees.render(v, 200, 4)[int(160 + a / 4 - .83 * a), int(100 - a / 2)]
        assert (pixel[0] > pixel[1]) == (near == 14)
    hidden = np.zeros_like(v)
    hidden[:3, 7:10, 7:10] = 2
    filled = hidden.copy()
    filled[1, 8, 8] = 5
    assert np.array_equal(trees.render(hidden), trees.render(filled))


def test_commands(tmp_path, capsys):
    assert trees.main(["check", str(roles(tmp_path))]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["c: no block of a known species", "d: does not fit"]
    for arguments in (["draw"], ["check"], ["check", str(tmp_path / "none.npz")], ["check", "a", "17"]):
        assert trees.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "data.trees", "preview", str(tmp_path / "new" / "p.png")],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "new" / "p.png").stat().st_size > 50_000, done.stderr
