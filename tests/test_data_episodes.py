"""data/episodes.py: formats, every fault in one line, splits, windows, resizing, the recorder."""
import fractions
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from data import episodes

ROOT = Path(__file__).resolve().parent.parent


def video(T, seed=0, H=6, W=5):
    return np.random.default_rng(seed).integers(0, 256, (T, H, W, 3), np.uint8)


def moves(T, seed=0, n=4):
    """Actions that lead into frames; the largest occurs."""
    return np.r_[-1, n - 1, np.random.default_rng(seed).integers(0, n, T)][:T]


def clips(lengths):
    return [(video(T, i), moves(T, i)) for i, T in enumerate(lengths)]


def one_line(error):
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 500, text
    return text


def refused(capsys, *arguments):
    """main() ends with code 2 and one line, which it returns."""
    assert episodes.main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == "", err
    return err


# ------------------------------------------------------------------------------------------------------------
# Formats: each writer stores the same clips

def write_npz_rows(path, data):
    np.savez(path / "all.npz", frames=np.stack([f for f, _ in data]), actions=np.stack([a for _, a in data]))
    return path / "all.npz"


def write_npz_concatenated(path, data, boundary="dones", save=np.savez):
    marks = dict(dones=[np.arange(len(a)) == len(a) - 1 for _, a in data],
                 is_first=[np.arange(len(a)) == 0 for _, a in data],
                 episode=[np.full(len(a), 7 - i) for i, (_, a) in enumerate(data)])
    save(path / "all.npz", frames=np.concatenate([f for f, _ in data]),
         actions=np.concatenate([a for _, a in data]), **{boundary: np.concatenate(marks[boundary])})
    return path / "all.npz"


def write_npz_folder(path, data, save=np.savez):
    for i, (frames, actions) in enumerate(data):
        save(path / f"ep{i + 8}.npz", frames=frames, actions=actions)  # 8, 9, 10, 11: numbers, not text
    return path


def write_npy_folders(path, data):
    for i, (frames, actions) in enumerate(data):
        (path / f"{i + 8}").mkdir()
        np.save(path / f"{i + 8}" / "frames.npy", frames)
        np.save(path / f"{i + 8}" / "actions.npy", actions)
    return path


def write_npy_prefixed(path, data):
    for i, (frames, actions) in enumerate(data):
        np.save(path / f"run{i + 8}_frames.npy", frames)
        np.save(path / f"run{i + 8}_actions.npy", actions)
    return path


def write_png(path, data):
    for i, (frames, _) in enumerate(data):
        (path / "videos" / f"{i + 8}").mkdir(parents=True)
        for t, frame in enumerate(frames):
            Image.fromarray(frame).save(path / "videos" / f"{i + 8}" / f"{t + 5}.png")
    return path


UNEQUAL, EQUAL = (12, 5, 9, 7), (6, 6, 6, 6)
FORMATS = {  # writer, lengths, mapped, labelled
    "rows": (write_npz_rows, EQUAL, True, True),
    "dones": (write_npz_concatenated, UNEQUAL, True, True),
    "is_first": (lambda p, d: write_npz_concatenated(p, d, "is_first"), UNEQUAL, True, True),
    "episode": (lambda p, d: write_npz_concatenated(p, d, "episode"), UNEQUAL, True, True),
    "compressed": (lambda p, d: write_npz_concatenated(p, d, save=np.savez_compressed), UNEQUAL, False, True),
    "npz folder": (write_npz_folder, UNEQUAL, True, True),
    "folder, compressed": (lambda p, d: write_npz_folder(p, d, np.savez_compressed), UNEQUAL, False, True),
    "npy folders": (write_npy_folders, UNEQUAL, True, True),
    "npy prefixed": (write_npy_prefixed, UNEQUAL, True, True),
    "png": (write_png, UNEQUAL, False, False)}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_back(kind, tmp_path):
    write, lengths, mapped, labelled = FORMATS[kind]
    data = clips(lengths)
    (tmp_path / "._ep0.npz").write_bytes(b"of another system")
    found = episodes.load(write(tmp_path, data))
    assert len(found.frames) == len(found.actions) == len(data)
    for i, (frames, actions) in enumerate(data):
        assert found.frames[i].dtype == np.uint8 and np.array_equal(found.frames[i], frames)
        assert isinstance(found.frames[i], np.memmap) == mapped
        assert found.actions[i].dtype == np.int64
        assert np.array_equal(found.actions[i], actions if labelled else np.full(len(frames), -1))
    assert len(list(found.frames)) == len(data) and found.frames[-1].shape == data[-1][0].shape
    assert [f.tolist() for f in found.frames[1:3]] == [f.tolist() for f, _ in data[1:3]]
    assert (found.n_actions, found.size, found.fps) == (4 if labelled else 0, (6, 5), 20.0)
    assert (found.dones is None) == ("dones" not in kind and kind != "compressed") and found.rewards is None
    assert f"4 episodes of {min(lengths)}" in found.facts and f"{sum(lengths)} in all" in found.facts
    assert ("4 episodes without" in found.facts) == (not labelled)


def test_fortran_order_is_read_back(tmp_path):
    frames = np.asfortranarray(video(24))
    np.savez(tmp_path / "a.npz", frames=frames, actions=moves(24))
    np.save(tmp_path / "frames.npy", frames)
    for file in ("a.npz", "frames.npy"):
        found = episodes.load(tmp_path / file)
        assert np.array_equal(np.concatenate(list(found.frames)), frames)


def test_a_done_within_a_row_begins_a_new_episode(tmp_path):
    frames, actions = video(12).reshape(2, 6, 6, 5, 3), np.array([[-1, 1, 2, -1, 0, 1], [-1, 0, 0, 0, 2, 2]])
    dones, rewards = np.zeros((2, 6), bool), np.arange(12.0).reshape(2, 6)
    dones[0, 2] = dones[1, 5] = True
    np.savez(tmp_path / "a.npz", frames=frames, actions=actions, dones=dones, rewards=rewards)
    found = episodes.load(tmp_path / "a.npz")
    assert [a.tolist() for a in found.actions] == [[-1, 1, 2], [-1, 0, 1], [-1, 0, 0, 0, 2, 2]]
    assert [d.tolist() for d in found.dones] == [[False, False, True], [False] * 3, [False] * 5 + [True]]
    assert [r.tolist() for r in found.rewards] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert np.array_equal(found.frames[1], frames[0, 3:]) and found.rewards[0].dtype == np.float32


def shared_format(path, first=8):
    """Rows as loops write them: the action taken in the frame, and the reward and done that it brought."""
    rows = dict(frames=video(9), actions=np.array([first, 1, 2, 3, 4, 5, 6, 7, 8], np.uint8),
                rewards=np.arange(9, dtype=np.float32), dones=np.isin(np.arange(9), (3, 5, 8)),
                is_first=np.isin(np.arange(9), (0, 4, 6)), episode=np.repeat([0, 1, 2], [4, 2, 3]),
                action_names=np.array([f"do {i}" for i in range(9)]))
    np.savez_compressed(path, **rows)
    return rows


def test_align_from_moves_actions_into_the_next_frame(tmp_path):
    rows = shared_format(tmp_path / "game.npz")
    with pytest.raises(ValueError, match="ACTION_ALIGN=from") as error:
        episodes.load(tmp_path / "game.npz")
    assert "game.npz" in one_line(error.value) and "found 8" in str(error.value)
    found = episodes.load(tmp_path / "game.npz", align="from")
    assert [a.tolist() for a in found.actions] == [[-1, 8, 1, 2], [-1, 4], [-1, 6, 7]]
    assert [r.tolist() for r in found.rewards] == [[0, 0, 1, 2], [0, 4], [0, 6, 7]]
    assert not any(d.any() for d in found.dones)  # the frames they lead into are not in the file
    assert np.array_equal(found.frames[2], rows["frames"][6:])
    assert (found.n_actions, found.names, found.name) == (9, [f"do {i}" for i in range(9)], "game")


def test_align_from_of_rows_keeps_them_apart(tmp_path):
    np.savez(tmp_path / "a.npz", frames=video(12).reshape(3, 4, 6, 5, 3), actions=np.arange(12).reshape(3, 4))
    found = episodes.load(tmp_path / "a.npz", "from")
    assert [a.tolist() for a in found.actions] == [[-1, 0, 1, 2], [-1, 4, 5, 6], [-1, 8, 9, 10]]


def test_unlabelled_episodes_among_labelled_ones(tmp_path):
    data = clips((6, 6, 6))
    data[1] = (data[1][0], np.full(6, -1))
    for align in ("into", "from"):
        labelled = [(f, a if align == "into" or a.max() < 0 else np.append(a[1:], 0)) for f, a in data]
        found = episodes.load(write_npz_rows(tmp_path, labelled), align)
        assert (found.actions[1] == -1).all() and np.array_equal(found.actions[2], data[2][1])
        assert "1 episodes without" in found.facts


def test_meta(tmp_path):
    write_npz_folder(tmp_path, clips((6, 7, 8)))
    names = ["stay", "up", "down", "left", "right"]
    (tmp_path / "meta.json").write_text(json.dumps(dict(name="maze", fps=12, action_names=names, more=[6])))
    found = episodes.load(tmp_path)
    assert (found.name, found.fps, found.n_actions, found.names) == ("maze", 12.0, 5, names)
    assert found.facts.startswith("maze: 3 episodes of 6 to 8 frames, 21 in all, 6x5 pixels, 12 a second, 5")
    np.savez(tmp_path / "one.npz", frames=video(9), actions=moves(9), fps=15, n_actions=7, name="inside")
    found = episodes.load(tmp_path / "one.npz")
    assert (found.name, found.fps, found.n_actions, found.names) == ("inside", 15.0, 7, None)


def test_many_files_need_few_descriptors(tmp_path):
    """A mapping holds a descriptor for as long as it lives: a list of them would end at about 1,000 files."""
    resource = pytest.importorskip("resource")
    for i in range(80):
        np.savez(tmp_path / f"{i}.npz", frames=video(3, i), actions=moves(3))
        np.save(tmp_path / f"{i}_frames.npy", video(3, i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, hard))
    try:
        with pytest.raises(OSError):
            _ = [open(tmp_path / f"{i}.npz") for i in range(80)]
        for file in tmp_path.glob("*.npy"):
            file.rename(file.with_suffix(".kept"))
        found = episodes.load(tmp_path)
        assert all(np.array_equal(found.frames[i], video(3, i)) for i in range(80))
        for file in [*tmp_path.glob("*.npz"), *tmp_path.glob("*.kept")]:
            file.unlink() if file.suffix == ".npz" else file.rename(file.with_suffix(".npy"))
        found = episodes.load(tmp_path)
        assert all(np.array_equal(found.frames[i], video(3, i)) for i in range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------------------------------------------------
# Faults: (what is done to a good folder of three .npz and a meta.json, words of the message)

def stored(**changes):
    """Save an episode with other arrays; None leaves one out."""
    def fault(root):
        good = dict(frames=video(6), actions=moves(6), rewards=np.zeros(6), dones=np.zeros(6, bool))
        np.savez(root / "ep9.npz", **{key: a for key, a in {**good, **changes}.items() if a is not None})
    return fault


def written(name, data):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda root: (root / name).write_bytes(data)


def damaged(change):
    def fault(root):
        data = bytearray((root / "ep9.npz").read_bytes())
        (root / "ep9.npz").write_bytes(change(data))
    return fault


def flipped_frames(root):
    """One byte of frames that are compressed."""
    np.savez_compressed(root / "ep9.npz", frames=video(6), actions=moves(6))
    with zipfile.ZipFile(root / "ep9.npz") as archive:
        at = archive.getinfo("frames.npy").header_offset + 300
    data = bytearray((root / "ep9.npz").read_bytes())
    data[at] ^= 255
    (root / "ep9.npz").write_bytes(data)


def only(*names):
    """Keep nothing but these new files."""
    def fault(root):
        for file in root.iterdir():
            file.unlink()
        for name in names:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"")
    return fault


def pngs(*sizes, mode="RGB"):
    def fault(root):
        only()(root)
        for t, size in enumerate(sizes):
            Image.new(mode, size).save(root / f"{t}.png")
    return fault


def npy(**arrays):
    def fault(root):
        only()(root)
        for key, array in arrays.items():
            np.save(root / f"{key}.npy", array, allow_pickle=True)
    return fault


def set_at(index, value, T=6):
    actions = moves(T)
    actions[index] = value
    return actions


FAULTS = {
    "floats": (stored(frames=video(6) / 255), "ep9.npz", "expected frames uint8", "float64", "0 to 255"),
    "one frame": (stored(frames=video(6)[0]), "ep9.npz", "(6, 5, 3)"),
    "channels first": (stored(frames=video(6).transpose(0, 3, 1, 2)), "(6, 3, 6, 5)", "channels last"),
    "grey": (stored(frames=video(6)[..., :1]), "(6, 6, 5, 1)"),
    "no frames": (stored(frames=video(6)[:0]), "(0, 6, 5, 3)"),
    "frames missing": (stored(frames=None), "ep9.npz", "no array called frames", "actions"),
    "another size": (stored(frames=video(6, H=7)), "ep9.npz", "6x5", "7x5", "ep7.npz"),
    "actions of floats": (stored(actions=moves(6) * 1.0), "ep9.npz", "actions, integers", "float64"),
    "actions too long": (stored(actions=moves(9)), "ep9.npz", "(6,)", "(9,)"),
    "actions too short": (stored(actions=moves(6)[1:]), "(5,)", "np.append(-1, actions)"),
    "actions of vectors": (stored(actions=np.zeros((6, 3), int)), "(6, 3)"),
    "actions[0]": (stored(actions=set_at(0, 2)), "ep9.npz", "actions[0] = -1", "found 2", "ALIGN=from"),
    "negative action": (stored(actions=set_at(3, -2)), "ep9.npz", "0 and more", "-2"),
    "half labelled": (stored(actions=set_at(3, -1)), "ep9.npz", "is_first", "-1 everywhere"),
    "action not announced": (stored(actions=set_at(3, 4)), "ep9.npz", "below 4", "found 4", "meta.json"),
    "codes": (lambda root: [(root / "meta.json").unlink(), stored(actions=set_at(3, 5000))(root)],
              "ep9.npz", "below 1,024", "5000"),
    "misnamed": (stored(actions=None, action=moves(6)), "ep9.npz", "called action,", "called actions"),
    "misnamed done": (stored(dones=None, done=np.zeros(6, bool)), "called done,", "called dones"),
    "new episode without -1": (stored(dones=np.arange(6) == 2), "actions[3] = -1"),
    "rewards": (stored(rewards=np.zeros(5)), "ep9.npz", "rewards, numbers", "(5,)"),
    "rewards NaN": (stored(rewards=np.full(6, np.nan)), "ep9.npz", "finite rewards"),
    "dones": (stored(dones=np.zeros(6)), "ep9.npz", "dones, bool", "float64"),
    "objects": (stored(actions=np.array([None] * 6)), "ep9.npz", "plain arrays"),
    "truncated": (damaged(lambda data: data[:-40]), "ep9.npz", "plain arrays", "save it again"),
    "empty file": (damaged(lambda data: b""), "ep9.npz", "plain arrays"),
    "not a zip": (damaged(lambda data: b"PK" + data[2000:]), "ep9.npz", "plain arrays"),
    "bytes changed": (flipped_frames, "ep9.npz", "plain arrays"),
    "empty folder": (only(), "expected .npz, frames.npy or .png files, found none"),
    "a video": (only("clip.mp4"), "found none", ".png files of a video"),
    "two kinds": (written("frames.npy", b""), ".npz or .npy files, found both"),
    "png of another size": (pngs((5, 6), (5, 6), (6, 6)), "2.png", "6x5", "6x6", "0.png"),
    "png damaged": (only("a/1.png"), "1.png", "expected a .png"),
    "png of 16 bits": (pngs((5, 6), mode="I;16"), "0.png", "16 bits"),
    "npy too short": (npy(frames=video(6), actions=moves(5)), "frames.npy", "(5,)"),
    "npy misnamed": (npy(frames=video(6), action=moves(6)), "frames.npy", "called action,"),
    "npy of objects": (npy(frames=np.array([None])), "frames.npy", "plain arrays"),
    "npy empty": (only("frames.npy"), "frames.npy", "plain arrays"),
    "npy that is npz": (lambda root: [npy()(root), stored()(root), (root / "ep9.npz").rename(
        root / "frames.npy")], "frames.npy", "plain arrays"),
    "npy actions that are npz": (lambda root: [npy(frames=video(6))(root), stored()(root), (
        root / "ep9.npz").rename(root / "actions.npy")], "frames.npy", "plain arrays"),
    "meta no JSON": (written("meta.json", b"{name:"), "meta.json", "in JSON", "write it again"),
    "meta a list": (written("meta.json", [[1, 2, 3]]), "meta.json", "expected an object"),
    "meta fps": (written("meta.json", dict(fps=0)), "meta.json", "fps", "positive", "found 0"),
    "meta fps text": (written("meta.json", dict(fps="20")), "meta.json", "fps", "'20'"),
    "meta n_actions": (written("meta.json", dict(n_actions=True)), "meta.json", "n_actions", "True"),
    "meta names": (written("meta.json", dict(n_actions=4, action_names=["a"])), "4 texts", "['a']"),
    "meta names of numbers": (written("meta.json", dict(action_names=[1, 2, 3, 4])), "4 texts")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(fault, tmp_path, capsys):
    change, *words = FAULTS[fault]
    for i in (7, 8, 9):
        stored()(tmp_path)
        (tmp_path / "ep9.npz").rename(tmp_path / f"ep{i}.npz")
    (tmp_path / "meta.json").write_text(json.dumps(dict(n_actions=4, fps=10)))
    assert episodes.load(tmp_path).facts.endswith("10 a second, 4 actions")
    change(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        episodes.load(tmp_path)
    assert all(word in one_line(error.value) for word in [str(tmp_path), *words]), str(error.value)
    assert refused(capsys, "check", tmp_path) == f"error: {error.value}\n"


def test_a_path_that_is_not_there(tmp_path, capsys):
    assert "not found; give an .npz" in refused(capsys, "check", tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    assert "found none" in refused(capsys, "check", tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="'into' or 'from'"):
        episodes.load(tmp_path, "onto")


def test_into_read_as_from_is_refused(tmp_path):
    path = write_npz_rows(tmp_path, clips(EQUAL))
    with pytest.raises(ValueError, match="found -1; set ACTION_ALIGN=into"):
        episodes.load(path, "from")


@pytest.mark.parametrize("save", (np.savez, np.savez_compressed))
def test_random_damage_is_one_line_or_harmless(save, tmp_path):
    save(tmp_path / "good.npz", frames=video(3, H=2, W=2), actions=moves(3), rewards=np.zeros(3))
    good, rng, refusals = (tmp_path / "good.npz").read_bytes(), np.random.default_rng(0), 0
    for trial in range(400):
        data = bytearray(good)
        data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "bad.npz").write_bytes(data[:rng.integers(len(data))] if trial % 4 == 0 else data)
        try:
            episodes.load(tmp_path / "bad.npz")
        except ValueError as error:
            refusals += "bad.npz" in one_line(error)
    assert 200 < refusals < 400


def test_check_finds_what_load_only_maps(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", frames=video(40, H=20, W=20), actions=moves(40))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[30_000] ^= 1  # inside the frames
    (tmp_path / "a.npz").write_bytes(data)
    episodes.load(tmp_path)
    assert "a.npz: expected frames.npy as saved, found other bytes" in refused(capsys, "check", tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Splits, windows, sides, sizes

def test_split_is_by_episode():
    for n in range(3, 120):
        train, val, test = episodes.split(n)
        assert [*train, *val, *test] == list(range(n)) and len(train) >= 1
        assert len(val) == len(test) == max(1, n // 10)
    for n in range(3):
        with pytest.raises(ValueError, match=f"expected 3 episodes or more.*found {n}"):
            episodes.split(n)


@pytest.mark.parametrize("lengths", [(50,), (50, 30), (30, 50)])
def test_one_or_two_episodes_are_cut(lengths, tmp_path):
    data = clips(lengths)
    for align in ("into", "from"):
        found = episodes.load(write_npz_concatenated(tmp_path, [
            (f, a if align == "into" else np.append(a[1:], 0)) for f, a in data]), align)
        assert f"{len(lengths)} recorded, the longest cut into 80, 10 and 10 %" in found.facts
        longest = data[lengths.index(50)]
        *others, a, b, c = range(len(lengths) + 2)
        assert [len(f) for f in found.frames] == [30] * len(others) + [40, 5, 5]
        assert np.array_equal(np.concatenate([found.frames[i] for i in (a, b, c)]), longest[0])
        assert np.array_equal(np.concatenate([found.actions[i][1:] for i in (a, b, c)]),
                              np.delete(longest[1], (0, 40, 45)))
        assert all(actions[0] == -1 for actions in found.actions)
        assert [len(part) for part in episodes.split(len(found.frames))] == [len(lengths), 1, 1]


def test_a_row_is_cut_and_a_short_one_is_not(tmp_path):
    np.savez(tmp_path / "a.npz", frames=video(20)[None], actions=moves(20)[None])
    found = episodes.load(tmp_path / "a.npz")
    assert np.array_equal(np.concatenate(list(found.frames)), video(20)) and len(found.frames) == 3
    np.savez(tmp_path / "b.npz", frames=video(19), actions=moves(19))
    assert len(episodes.load(tmp_path / "b.npz").frames) == 1


def test_windows_are_all_and_never_cross():
    cases = itertools.product([(5, 1, 0, 9, 4), (3,), (), (2, 2)], (1, 2, 4, 9, 10), (1, 2, 3))
    for lengths, T, stride in cases:
        found = episodes.windows(lengths, T, stride)
        assert found.dtype == np.int64 and found.shape == (len(found), 2)
        assert found.tolist() == [[i, a] for i, n in enumerate(lengths) for a in range(0, n, stride)
                                  if a + T <= n]
    for T, stride in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="1 frame or more"):
            episodes.windows((5,), T, stride)


@pytest.mark.parametrize("H, W, patch", [(6, 5, 4), (8, 8, 4), (7, 9, 8), (1, 3, 2), (6, 5, 1)])
def test_padding_repeats_the_edge_and_is_undone(H, W, patch):
    for frames in (video(3, H=H, W=W), video(1, H=H, W=W)[0], video(4, H=H, W=W).reshape(2, 2, H, W, 3)):
        wide = episodes.padded(frames, patch)
        height, width = wide.shape[-3:-1]
        assert height % patch == width % patch == 0 and height - H < patch and width - W < patch
        y, x = np.arange(height).clip(0, H - 1), np.arange(width).clip(0, W - 1)
        assert np.array_equal(wide, frames[..., y[:, None], x, :]) and wide.dtype == np.uint8
        assert np.array_equal(episodes.cropped(wide, (H, W)), frames)


@pytest.mark.parametrize("old, new", [
    ((6, 8), (3, 2)), ((210, 160), (64, 49)), ((7, 5), (3, 4)), ((5, 4), (8, 9)), ((9, 11), (1, 1)),
    ((6, 6), (6, 6)), ((96, 96), (64, 64))])
def test_resize_keeps_the_mean(old, new):
    frames = np.random.default_rng(0).random((2, *old, 3))
    small = episodes.resize(frames, new)
    assert small.shape == (2, *new, 3)
    assert np.abs(small.mean((1, 2)) - frames.mean((1, 2))).max() < 1e-12
    flat = episodes.resize(np.full((*old, 3), 201, np.uint8), new)
    assert flat.dtype == np.uint8 and (flat == 201).all()


def test_resize_is_exact():
    frames = video(3, H=12, W=18)
    for a, b in ((2, 3), (3, 2), (4, 6), (6, 9), (1, 1)):  # whole blocks: their mean, rounded half up
        blocks = frames.reshape(3, 12 // a, a, 18 // b, b, 3).sum((2, 4), dtype=int)
        mean = (2 * blocks + a * b) // (2 * a * b)
        assert np.array_equal(episodes.resize(frames, (12 // a, 18 // b)), mean)
    small = episodes.resize(frames, (5, 7))  # any ratio, against rational numbers
    for y, x in ((0, 0), (2, 3), (4, 6), (1, 5)):
        total = fractions.Fraction(0)
        for i, j in itertools.product(range(12), range(18)):
            tall = min((y + 1) * fractions.Fraction(12, 5), i + 1) - max(y * fractions.Fraction(12, 5), i)
            wide = min((x + 1) * fractions.Fraction(18, 7), j + 1) - max(x * fractions.Fraction(18, 7), j)
            total += max(tall, 0) * max(wide, 0) * int(frames[1, i, j, 2])
        mean = total / fractions.Fraction(12 * 18, 5 * 7)
        assert small[1, y, x, 2] == int(mean + fractions.Fraction(1, 2))


# ------------------------------------------------------------------------------------------------------------
# Recorder

class Old:
    """A game of the old interface whose frame shows the seed, the step and the action that led into it."""
    shape, n, ends = (8, 12), 5, 30

    def __init__(self, seed):
        self.seed, self.t = seed, 0
        self.action_space = SimpleNamespace(n=self.n)

    def picture(self, action):
        frame = np.zeros((*self.shape, 3), np.uint8)
        frame[:] = self.seed, self.t, action + 1
        return frame

    def reset(self):
        self.t = 0
        return self.picture(-1)

    def step(self, action):
        assert type(action) is int and 0 <= action < self.n
        self.t += 1
        return self.picture(action), .5 * action, self.t == self.ends, {}


class New(Old):
    """The new interface: seeds in reset, five things a step, a picture only from render(), numbers from 3."""
    metadata = dict(render_fps=15)

    def __init__(self, seed=None):
        super().__init__(99)
        self.action_space = SimpleNamespace(n=np.int64(self.n), start=np.int64(3), shape=())
        self.actions = [SimpleNamespace(name=f"go {i}") for i in range(self.n)]
        self.last = -1

    def reset(self, *, seed=None, options=None):
        self.seed, self.t, self.last = seed, 0, -1
        return dict(image=np.zeros((7, 7, 3), np.uint8)), {}  # symbols, no picture: as MiniGrid has them

    def step(self, action):
        self.last, self.t = action - 3, self.t + 1
        return np.zeros(4), .5 * self.last, False, self.t == self.ends, {}

    def render(self):
        return self.picture(self.last)


@pytest.mark.parametrize("world", [Old, New])
@pytest.mark.parametrize("policy", ["random", "sticky"])
def test_recordings_say_which_action_led_into_a_frame(world, policy, tmp_path):
    assert episodes.record(world, tmp_path / "new" / "folder", 4, 100, policy, 6) == 4
    found = episodes.load(tmp_path / "new" / "folder")
    assert found.size == (4, 6) and found.n_actions == 5 and found.name == world.__name__
    known = (15.0, [f"go {i}" for i in range(5)]) if world is New else (20.0, None)
    assert (found.fps, found.names) == known and ("assumed" in found.facts) == (world is Old)
    for k in range(4):
        frames, actions = np.asarray(found.frames[k]), found.actions[k]
        assert len(frames) == 31 and isinstance(found.frames[k], np.memmap)
        assert (frames == frames[:, :1, :1]).all() and (frames[:, 0, 0, 0] == k).all()
        assert frames[:, 0, 0, 1].tolist() == list(range(31))
        assert np.array_equal(frames[:, 0, 0, 2], actions + 1) and actions[0] == -1
        assert np.array_equal(found.rewards[k], np.r_[0, .5 * actions[1:]])
        assert np.flatnonzero(found.dones[k]).tolist() == [30]
        runs = [len(list(run)) for _, run in itertools.groupby(actions[1:].tolist())][:-1]
        assert min(runs) >= 3 if policy == "sticky" else min(runs) == 1
    assert len({tuple(a) for a in found.actions}) == 4


def test_steps_end_an_episode(tmp_path):
    episodes.record(Old, tmp_path, 3, 12, "random", 12)
    found = episodes.load(tmp_path)
    assert [len(f) for f in found.frames] == [12] * 3 and not np.any(found.dones) and found.size == (8, 12)


def contents(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_a_recording_goes_on_and_overwrites_nothing(tmp_path):
    episodes.record(Old, tmp_path / "whole", 5, 9, "random", 12)

    class Broken(Old):
        def step(self, action):
            if self.seed == 2 and self.t == 4:
                raise KeyboardInterrupt
            return super().step(action)

    Broken.__name__ = "Old"
    with pytest.raises(KeyboardInterrupt):
        episodes.record(Broken, tmp_path / "parts", 5, 9, "random", 12)
    first = contents(tmp_path / "parts")
    assert sorted(first) == ["ep_00000.npz", "ep_00001.npz", "meta.json"]
    assert episodes.record(Old, tmp_path / "parts", 5, 9, "random", 12) == 3
    assert episodes.record(Old, tmp_path / "parts", 4, 9, "random", 12) == 0
    after = contents(tmp_path / "parts")
    assert first.items() <= after.items()
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in contents(tmp_path / "whole").items()}


def test_a_break_while_saving_leaves_no_stump(tmp_path, monkeypatch):
    def broken(stream, **arrays):
        stream.write(b"PK")
        raise KeyboardInterrupt
    monkeypatch.setattr(episodes.np, "savez", broken)
    with pytest.raises(KeyboardInterrupt):
        episodes.record(Old, tmp_path, 2, 9, "random", 12)
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


class Big(Old):
    shape = (16, 12)


class Float(Old):
    def step(self, action):
        return (np.zeros(4), *super().step(action)[1:])

    def render(self):
        return None


def with_space(**space):
    def world(seed):
        env = Old(seed)
        env.action_space = SimpleNamespace(**space)
        return env
    return world


@pytest.mark.parametrize("world, words", [
    (Big, "expected name Big of this recording, found Small"), (Float, "found NoneType"),
    (with_space(shape=(3,)), "expected discrete actions"),
    (with_space(n=4, shape=(4,)), "expected discrete actions")])  # the last: MultiBinary
def test_what_cannot_be_recorded(world, words, tmp_path):
    name = "Small" if world is Big else world.__name__
    (tmp_path / "meta.json").write_text(json.dumps(dict(name=name, size=[8, 12], n_actions=5)))
    with pytest.raises(ValueError) as error:
        episodes.record(world, tmp_path, 1, 9, "random", 12)
    assert words in one_line(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


def fake_gymnasium(monkeypatch, made):
    """A module gymnasium with one environment, whose actions are continuous unless told otherwise."""
    class Error(Exception):
        pass

    def make(name, render_mode, disable_env_checker, **options):
        made.append(options)
        if name != "Car":
            raise Error(f"no environment\n{name}")
        env = New()
        if options.get("continuous", True):
            env.action_space = SimpleNamespace(shape=(3,))
        return env
    module = SimpleNamespace(make=make, error=SimpleNamespace(Error=Error))
    monkeypatch.setitem(sys.modules, "gymnasium", module)


def test_record_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake_gymnasium(monkeypatch, made := [])
    assert episodes.main("record Car --episodes 3 --steps=7 --policy random --size 6 --out here".split()) == 0
    assert made == [{}, dict(continuous=False)]  # discrete actions are asked for where they are an option
    assert "here: 3 new episodes; Car: 3 episodes of 7 frames, 21 in all, 4x6" in capsys.readouterr().out
    assert episodes.main("record Car --episodes 1".split()) == 0
    assert sum(map(len, episodes.load("runs/episodes_Car").actions)) == 31
    capsys.readouterr()
    assert "Bus: cannot be made, Error: no environment Bus; give crafter" in refused(capsys, "record", "Bus")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.setitem(sys.modules, "crafter", None)
    assert "pip install gymnasium\n" in refused(capsys, "record", "CartPole-v1")
    assert "pip install gymnasium minigrid\n" in refused(capsys, "record", "MiniGrid-Empty-5x5-v0")
    assert "pip install crafter\n" in refused(capsys, "record", "crafter")
    for words in ("record", "check", "", "draw it", "record Car --seeds 3", "record Car --size", "check a b"):
        assert refused(capsys, *words.split()) == f"error: {episodes.USAGE}\n"
    assert "--steps 'many': expected a whole number" in refused(capsys, "record", "Car", "--steps", "many")
    fake_gymnasium(monkeypatch, [])
    assert "expected one of random, sticky, human" in refused(capsys, "record", "Car", "--policy", "best")
    assert "found 1, 1, 64" in refused(capsys, "record", "Car", "--episodes", "1", "--steps", "1")
    assert episodes.main(["--help"]) == 0 and capsys.readouterr().out == f"{episodes.USAGE}\n"


def test_check_prints_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows, titles, title = shared_format(tmp_path / "game.npz"), [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda *a, **k: titles.append(a[1]) or title(*a, **k))
    assert episodes.main(["check", "game.npz", "--align", "from"]) == 0
    assert titles == ["episode 0, frame 0\n-", "do 8", "do 1", "do 2", "episode 1, frame 0\n-", "do 4",
                      "episode 2, frame 0\n-", "do 6", "do 7"]  # the actions that led into the frames
    out = capsys.readouterr().out
    assert "game: 3 episodes of 2 to 4 frames, 9 in all, 6x5 pixels, 20 a second (assumed), 9 actions" in out
    assert "lengths: 4, 2, 3; windows of 16: 0" in out and "do 3 0, do 4 1, do 5 0, do 6 1" in out
    assert "train, val, test: episodes 0 to 0, 1 to 1, 2 to 2" in out
    assert "rewards: 5 not zero, in all 20" in out
    with Image.open(tmp_path / "runs" / "preview_episodes.png") as picture:
        seen = {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert {tuple(colour) for colour in rows["frames"].reshape(-1, 3)} <= seen  # every pixel is drawn
    write_png(tmp_path / "silent", clips((3, 4, 5)))
    assert episodes.main(["check", "silent"]) == 0 and "actions: none" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "silent")
    assert episodes.load(".").name == "silent"


class Striped(New):
    def picture(self, action):
        frame = super().picture(action)
        frame[1::2] += 100
        return frame


def test_a_human_plays_with_keys(tmp_path, monkeypatch, capsys):
    pty = pytest.importorskip("pty")
    here, there = pty.openpty()
    os.write(here, b"2?40" + b"1" * 5)
    code = ("import sys; sys.path[:0] = sys.argv[1:3]\n"
            "from data import episodes\nfrom test_data_episodes import Striped\n"
            "episodes.record(Striped, sys.argv[3], 2, 5, 'human', 12)")
    done = subprocess.run([sys.executable, "-c", code, ROOT, ROOT / "tests", tmp_path], stdin=there,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [a.tolist() for a in episodes.load(tmp_path).actions] == [[-1, 2, 4, 0, 1], [-1, 1, 1, 1, 1]]
    # seed 1, step 3, action 1: a pair of pixels of an upper and a lower row
    assert "\x1b[38;2;1;3;2;48;2;101;103;102m\u2580" in done.stdout and "0 go 0  1 go 1" in done.stdout
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(ValueError, match="expected a Unix terminal"):
        episodes.record(New, tmp_path / "other", 1, 5, "human", 12)


@pytest.mark.parametrize("name, packages, size, n", [
    ("crafter", "crafter", (32, 32), 17), ("MiniGrid-Empty-5x5-v0", "gymnasium minigrid", (32, 32), 7),
    ("ALE/Pong-v5", "gymnasium ale_py", (32, 24), 6), ("CarRacing-v3", "gymnasium Box2D pygame", (32, 32), 5),
    ("CartPole-v1", "gymnasium pygame", (21, 32), 2)])
def test_real_environments(name, packages, size, n, tmp_path, monkeypatch):
    if not all(map(importlib.util.find_spec, packages.split())):
        pytest.skip(f"needs {packages}")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    episodes.record(name, tmp_path, 1, 9, "random", 32)
    found = episodes.load(tmp_path)
    assert (len(found.frames), found.size, found.n_actions) == (1, size, n)
    assert all(frames.std() > 5 for frames in found.frames)
    assert not np.array_equal(*found.frames[0][[0, -1]])
