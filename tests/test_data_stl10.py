"""data/stl10.py: the binary format, the embedded set, own pictures, the download (from a local server)."""
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from data import stl10

REPOSITORY = Path(__file__).resolve().parent.parent


def write_set(root, images, labels, names=("a", "b"), split="train"):
    """Write a split byte by byte, without the module's own writer: images (N, 3, S, S), labels from 1."""
    root.mkdir(exist_ok=True)
    data = bytearray()
    for image in images:
        for plane in image:
            for col in range(plane.shape[1]):
                data += bytes(plane[:, col].tolist())
    (root / f"{split}_X.bin").write_bytes(data)
    (root / f"{split}_y.bin").write_bytes(bytes(int(k) for k in labels))
    (root / "class_names.txt").write_text("\n".join(names) + "\n")
    return root


def ramp(side=12, count=4):
    """R = row, G = column, B = index of the picture."""
    row, col = np.mgrid[:side, :side]
    return np.stack([np.stack([row, col, np.full_like(row, i)]) for i in range(count)]).astype(np.uint8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("stl10") / "drawn"
    stl10.make(root, seed=3, train=320, test=50, unlabeled=60)
    return root


# Reading

def test_orientation_and_labels(tmp_path):
    root = write_set(tmp_path / "s", ramp(), [1, 2, 2, 1])
    images, labels = stl10.load(root, "train")
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(images, ramp())  # not its transpose
    assert labels.tolist() == [0, 1, 1, 0]
    assert stl10.class_names(root) == ("a", "b")


def test_area_mean_rounds_and_keeps_orientation(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 12, 12)).astype(np.uint8)
    root = write_set(tmp_path / "s", images, [1, 1, 2])
    small, _ = stl10.load(root, "train", 4)
    wanted = np.floor(images.reshape(3, 3, 4, 3, 4, 3).mean((3, 5)) + 0.5)
    assert small.shape == (3, 3, 4, 4) and np.array_equal(small, wanted)


def test_more_pictures_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(stl10, "CHUNK", 3)
    root = write_set(tmp_path / "s", ramp(4, 8), [1] * 8)
    assert np.array_equal(stl10.load(root, "train")[0], ramp(4, 8))


def test_size_that_does_not_divide_names_those_that_do(tmp_path):
    root = write_set(tmp_path / "s", ramp(), [1, 1, 2, 2])
    with pytest.raises(ValueError, match="sizes that work: 1, 2, 3, 4, 6, 12"):
        stl10.load(root, "train", 5)
    with pytest.raises(ValueError, match="sizes that work"):
        stl10.load(root, "train", 24)


@pytest.mark.parametrize("split", ["train", "test", "unlabeled"])
def test_truncated_pictures(tmp_path, split):
    root = write_set(tmp_path / "s", ramp(), [1, 1, 2, 2])
    if split != "train":
        write_set(root, ramp(), [1, 1, 2, 2], split=split)
    path = root / f"{split}_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{split}_X.bin.*cut off"):
        stl10.load(root, split)


def test_one_test_picture_missing(tmp_path):
    root = write_set(tmp_path / "s", ramp(), [1, 1, 2, 2])
    write_set(root, ramp()[:3], [1, 1, 2, 2], split="test")
    with pytest.raises(ValueError, match="test_X.bin: expected 4 pictures"):
        stl10.load(root, "test")


@pytest.mark.parametrize("bad", [0, 3, 255])
def test_label_out_of_range(tmp_path, bad):
    root = write_set(tmp_path / "s", ramp(), [1, 2, bad, 1])
    with pytest.raises(ValueError, match=f"labels 1..2.*found {bad} at index 2"):
        stl10.load(root, "train")


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin", "class_names.txt"])
def test_missing_and_empty_files(tmp_path, name):
    root = write_set(tmp_path / "s", ramp(), [1, 2, 2, 1])
    (root / name).write_bytes(b"")
    with pytest.raises(ValueError, match=name):
        stl10.load(root, "train")
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        stl10.load(root, "train")


def test_unknown_folder_and_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        stl10.load(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="expected one of train, test, unlabeled"):
        stl10.load(tmp_path, "valid")


# Validation and identity

PINNED = [9, 12, 16, 23, 31, 35]  # of 60 pictures in three classes


def test_validation_mask_is_stable_and_per_class():
    labels = np.arange(5000) % 10
    mask = stl10.validation_mask(labels)
    assert mask.dtype == bool and np.bincount(labels[mask]).tolist() == [50] * 10
    # The literal pins the split: a checkpoint of today must not see other validation pictures tomorrow.
    assert np.flatnonzero(stl10.validation_mask(np.arange(60) % 3, 0.1)).tolist() == PINNED
    assert stl10.validation_mask(labels, 0).sum() == 0
    assert np.bincount(labels[stl10.validation_mask(labels, 0.25)]).tolist() == [125] * 10


def test_validation_mask_of_small_classes():
    mask = stl10.validation_mask(np.array([0, 0, 1, 2, 2, 2]), 0.1)
    assert mask[:2].sum() == 1 and not mask[2] and mask[3:].sum() == 1  # at least one, never the whole class


def test_data_hash_follows_the_bytes(tmp_path):
    root = write_set(tmp_path / "s", ramp(), [1, 2, 2, 1])
    before = stl10.data_hash(root)
    assert before == stl10.data_hash(root) and len(before) == 16
    (root / "train_y.bin").write_bytes(bytes([1, 2, 1, 1]))
    labels_changed = stl10.data_hash(root)
    seen = {before, labels_changed}
    for at in (0, 777, -1):  # the file is small enough to be hashed whole
        data = bytearray((root / "train_X.bin").read_bytes())
        data[at] ^= 1
        (root / "train_X.bin").write_bytes(data)
        seen.add(stl10.data_hash(root))
    assert len(seen) == 5


def test_data_hash_looks_at_the_whole_length(drawn, tmp_path):
    root = tmp_path / "s"
    shutil.copytree(drawn, root)
    seen = {stl10.data_hash(root)}
    for place in (0.0, 0.25, 0.5, 1.0):  # a changed stretch of 2 % is found wherever it lies
        data = np.fromfile(root / "train_X.bin", np.uint8)
        start = int(place * (len(data) - len(data) // 50))
        data[start:start + len(data) // 50] ^= 1
        data.tofile(root / "train_X.bin")
        seen.add(stl10.data_hash(root))
    assert len(seen) == 5


# The embedded set

def test_drawn_set_has_the_official_layout(drawn):
    picture = 3 * 96 * 96
    sizes = {p.name: p.stat().st_size for p in drawn.iterdir() if p.suffix == ".bin"}
    assert sizes == {"train_X.bin": 320 * picture, "train_y.bin": 320, "test_X.bin": 50 * picture,
                     "test_y.bin": 50, "unlabeled_X.bin": 60 * picture}
    assert stl10.class_names(drawn) == stl10.CLASSES
    folds = [list(map(int, line.split())) for line in (drawn / "fold_indices.txt").read_text().splitlines()]
    assert len(folds) == 10 and all(len(set(fold)) == 64 and max(fold) < 320 for fold in folds)
    labels = stl10.load(drawn, "train", 32)[1]
    assert np.bincount(labels).tolist() == [32] * 10
    assert stl10.load(drawn, "unlabeled", 32)[1] is None


def test_stored_pictures_are_upright_and_match_their_labels(drawn):
    """What is stored is what draw() gives, whichever process drew it."""
    for j, split in enumerate(stl10.SPLITS):
        images, labels = stl10.load(drawn, split)
        for i in (0, 1, 49):
            kind = stl10.kind_of(3, j, i)
            assert np.array_equal(images[i], stl10.draw(kind, np.random.default_rng([3, j, i])))
            assert labels is None or labels[i] == kind


def test_drawing_is_independent_of_the_number_of_pictures(drawn, tmp_path):
    stl10.make(tmp_path / "few", seed=3, train=30, test=20, unlabeled=25)  # one process, drawn had several
    for split in stl10.SPLITS:
        few, few_labels = stl10.load(tmp_path / "few", split)
        many, labels = stl10.load(drawn, split)
        assert np.array_equal(few, many[:len(few)])
        assert few_labels is None or np.array_equal(few_labels, labels[:len(few)])
    labels_of_seed_3 = stl10.load(tmp_path / "few", "train")[1]
    stl10.make(tmp_path / "other", seed=4, train=30, test=20, unlabeled=25)
    assert not np.array_equal(few, stl10.load(tmp_path / "other", "unlabeled")[0])
    assert not np.array_equal(stl10.load(tmp_path / "other", "train")[1], labels_of_seed_3)


def test_make_is_repeatable_and_overwrites_nothing(tmp_path):
    arguments = dict(seed=0, train=20, test=10, unlabeled=12)
    stl10.make(tmp_path / "a", **arguments)
    stl10.make(tmp_path / "b", **arguments)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    before = (tmp_path / "a" / "train_X.bin").stat().st_mtime_ns
    stl10.make(tmp_path / "a", **arguments)
    assert (tmp_path / "a" / "train_X.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="found something else"):
        stl10.make(tmp_path / "a", **{**arguments, "train": 30})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no temporary folder stays behind


def test_make_leaves_nothing_half_done(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no")
    monkeypatch.setattr(stl10, "draw", broken)
    with pytest.raises(ValueError):
        stl10.make(tmp_path / "a", train=10, test=10, unlabeled=12)
    assert not list(tmp_path.iterdir())


def test_make_names_the_trouble_of_its_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(stl10, "SPLITS", ("train", "test", "renamed"))  # unknown to the workers' own import
    monkeypatch.setattr(stl10.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(ValueError, match=r"exit codes \[2, 2\] \(error: .*unlabeled_X.bin"):
        stl10.make(tmp_path / "a", train=200, test=100, unlabeled=100)
    assert not list(tmp_path.iterdir())


def test_every_class_can_be_told_from_the_background(drawn):
    """Nearest class mean beats chance (10 %) clearly, but is no solution: the drawings vary."""
    images, labels = stl10.load(drawn, "train", 16)
    flat = images.reshape(len(images), -1).astype(float)
    means = np.stack([flat[labels == k].mean(0) for k in range(10)])
    tests, wanted = stl10.load(drawn, "test", 16)
    guess = ((tests.reshape(len(tests), 1, -1) - means) ** 2).sum(-1).argmin(1)
    assert 0.2 < (guess == wanted).mean() < 0.9


# Own pictures

def test_import_npz_round_trip(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 8, 8)).astype(np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "own.npz", images=images, labels=labels, class_names=np.array(["w", "x", "y", "z"]))
    stl10.import_pictures(tmp_path / "own.npz", tmp_path / "set", size=None)
    train, train_labels = stl10.load(tmp_path / "set", "train")
    test, test_labels = stl10.load(tmp_path / "set", "test")
    assert stl10.class_names(tmp_path / "set") == ("w", "x", "y", "z")
    assert np.bincount(test_labels).tolist() == [2] * 4 and np.bincount(train_labels).tolist() == [8] * 4
    found = {image.tobytes(): label for image, label in zip([*train, *test], [*train_labels, *test_labels])}
    assert found == {image.tobytes(): label for image, label in zip(images, labels)}  # each once, upright


def test_import_npz_layouts_and_sizes(tmp_path):
    images, labels = ramp(8, 10), np.arange(10) % 2
    np.savez(tmp_path / "last.npz", pictures=images.transpose(0, 2, 3, 1), targets=labels[:, None])
    stl10.import_pictures(tmp_path / "last.npz", tmp_path / "same", size=None, test_share=0)
    assert np.array_equal(stl10.load(tmp_path / "same", "train")[0], images)
    assert stl10.class_names(tmp_path / "same") == ("0", "1")
    stl10.import_pictures(tmp_path / "last.npz", tmp_path / "half", size=4, test_share=0)
    half = stl10.load(tmp_path / "half", "train")[0]
    assert np.array_equal(half, stl10.load(tmp_path / "same", "train", 4)[0])
    stl10.import_pictures(tmp_path / "last.npz", tmp_path / "large", size=12, test_share=0)
    large = stl10.load(tmp_path / "large", "train")[0]
    assert large.shape == (10, 3, 12, 12)
    assert large[0, 0, -1, 0] >= 6 and large[0, 0, 0, -1] <= 1  # R still counts the rows


@pytest.mark.parametrize("arrays, message", [
    (dict(images=np.zeros((4, 3, 8, 8)), labels=np.zeros(4, int)), "expected square pictures, uint8"),
    (dict(images=np.zeros((4, 3, 8, 6), np.uint8), labels=np.zeros(4, int)), "expected square pictures"),
    (dict(images=np.zeros((4, 3, 8, 8), np.uint8), labels=np.zeros(3, int)), "one integer label"),
    (dict(images=np.zeros((4, 3, 8, 8), np.uint8), labels=np.arange(1, 5), classes=np.array(list("abcd"))),
     "expected labels 0..3"),
    (dict(images=np.array([{}], object)), "plain arrays"),
])
def test_import_npz_refuses(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        stl10.import_pictures(tmp_path / "bad.npz", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def picture_folder(root):
    """Two classes of 5 pictures 20x12 with a black left margin: centre crop must remove it."""
    from PIL import Image
    for k, name in enumerate(("red", "blue")):
        (root / name).mkdir(parents=True)
        for n in range(5):
            image = np.zeros((12, 20, 3), np.uint8)
            image[:, 4:16, 2 * k] = 200
            image[6:, 4:16, 1] = 10 * n
            Image.fromarray(image).save(root / name / f"{n}.png")
    return root


def test_import_folder(tmp_path):
    source = picture_folder(tmp_path / "pictures")
    stl10.import_pictures(source, tmp_path / "set", size=12)
    assert stl10.class_names(tmp_path / "set") == ("blue", "red")
    images, labels = stl10.load(tmp_path / "set", "train")
    test_images, test_labels = stl10.load(tmp_path / "set", "test")
    assert sorted(test_labels) == [0, 1] and sorted(labels) == [0] * 4 + [1] * 4
    assert (images[labels == 1][:, 0] == 200).all() and (images[labels == 0][:, 2] == 200).all()
    greens = np.concatenate([images, test_images])[:, 1]
    assert (greens[:, :6] == 0).all()  # upright, and no picture lost or doubled
    assert sorted(greens[:, 6:].max((1, 2))) == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]


def test_import_folder_refuses(tmp_path):
    source = picture_folder(tmp_path / "pictures")
    (source / "red" / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="broken.jpg: expected a readable picture"):
        stl10.import_pictures(source, tmp_path / "set", size=12)
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match="needs a size"):
        stl10.import_pictures(source, tmp_path / "set", size=None)
    (tmp_path / "splits" / "train" / "red").mkdir(parents=True)
    with pytest.raises(ValueError, match="splits.train"):
        stl10.import_pictures(tmp_path / "splits", tmp_path / "set")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="found no folders"):
        stl10.import_pictures(tmp_path / "none", tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        stl10.import_pictures(tmp_path / "nothing_here", tmp_path / "set")


def test_import_overwrites_nothing(tmp_path):
    np.savez(tmp_path / "own.npz", images=ramp(), labels=np.array([0, 1, 0, 1]))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="found a filled one"):
        stl10.import_pictures(tmp_path / "own.npz", tmp_path / "set", size=None)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["thesis.txt"]


# Download

@pytest.fixture
def server(tmp_path):
    """A small archive on a local server: its bytes, the arguments of download, requests seen, switches."""
    picture = bytes(range(48)) * 4
    files = {"train_X.bin": picture, "train_y.bin": bytes([1, 2, 1, 2]), "class_names.txt": b"a\nb\n"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in {**{f"stl10_binary/{n}": d for n, d in files.items()}, "../escaped.txt": b"!",
                           "stl10_binary/extra.txt": b"!"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    state = dict(archive=packed.getvalue(), seen=[], ranges=True, cut=None, status=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state["seen"].append(wanted)
            if state["status"]:
                self.send_error(state["status"])
                return
            start = int(wanted.split("=")[1].rstrip("-")) if wanted and state["ranges"] else 0
            if start >= len(state["archive"]):
                self.send_error(416)
                return
            body = state["archive"][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:state["cut"]])

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
    thread.start()
    state["arguments"] = dict(url=f"http://127.0.0.1:{http.server_port}/stl10.tar.gz",
                              archive_md5=hashlib.md5(state["archive"]).hexdigest(),
                              file_md5={n: hashlib.md5(d).hexdigest() for n, d in files.items()})
    yield state
    http.shutdown()
    http.server_close()


def test_download(server, tmp_path):
    root = tmp_path / "deep" / "stl10"
    stl10.download(root, **server["arguments"])
    assert stl10.load(root, "train")[0].shape == (4, 3, 4, 4)
    assert sorted(p.name for p in root.iterdir()) == ["class_names.txt", "train_X.bin", "train_y.bin"]
    assert [p.name for p in tmp_path.rglob("*.*") if "escaped" in p.name or "part" in p.name] == []
    stl10.download(root, **server["arguments"])
    assert server["seen"] == [None]  # the second call asked for nothing


def test_download_goes_on_after_a_break(server, tmp_path):
    root, part = tmp_path / "stl10", tmp_path / "stl10.tar.gz.part"
    server["cut"] = 100
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        stl10.download(root, **server["arguments"])
    assert part.stat().st_size == 100 and not root.exists()
    server["cut"] = None
    stl10.download(root, **server["arguments"])
    assert server["seen"] == [None, "bytes=100-"] and len(stl10.load(root, "train")[0]) == 4


@pytest.mark.parametrize("have", ["part", "all"])
def test_download_from_a_server_without_ranges_and_of_a_complete_part(server, tmp_path, have):
    server["ranges"] = have == "all"
    part = tmp_path / "stl10.tar.gz.part"
    part.write_bytes(server["archive"] if have == "all" else b"stale bytes")
    stl10.download(tmp_path / "stl10", **server["arguments"])
    assert len(stl10.load(tmp_path / "stl10", "train")[0]) == 4


def test_download_corrupted(server, tmp_path):
    root, good = tmp_path / "stl10", server["archive"]
    server["archive"] = good[:50] + bytes([good[50] ^ 255]) + good[51:]
    with pytest.raises(ValueError, match="expected md5"):
        stl10.download(root, **server["arguments"])
    assert not list(tmp_path.iterdir())  # neither root nor a part that could never become right
    server["archive"] = good
    files = {**server["arguments"]["file_md5"], "train_y.bin": "0" * 32}
    with pytest.raises(ValueError, match="train_y.bin expected md5 0000"):
        stl10.download(root, **{**server["arguments"], "file_md5": files})
    with pytest.raises(ValueError, match="expected test_X.bin inside"):
        stl10.download(root, **{**server["arguments"], "file_md5": {**files, "test_X.bin": None,
                                                                    "train_y.bin": None}})
    assert not root.exists()


def test_download_network_errors(server, tmp_path):
    server["status"] = 503
    with pytest.raises(FileNotFoundError, match="answered 503"):
        stl10.download(tmp_path / "stl10", **server["arguments"])
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        stl10.download(tmp_path / "stl10", url="http://127.0.0.1:9/x.tar.gz")  # port 9: nobody listens
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="found other files"):
        stl10.download(tmp_path / "full", **server["arguments"])


# Commands

def test_commands(tmp_path, capsys, drawn):
    np.savez(tmp_path / "own.npz", images=ramp(), labels=np.array([0, 1, 0, 1]))
    assert stl10.main(["import", str(tmp_path / "own.npz"), str(tmp_path / "set"), "6"]) == 0
    assert stl10.load(tmp_path / "set", "train")[0].shape[-1] == 6
    assert stl10.main(["check", str(drawn)]) == 0
    out = capsys.readouterr().out
    assert "train: 320 pictures; airplane 32, bird 32" in out and "upright" in out and "unlabeled: 60" in out
    assert stl10.main(["preview", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "sheet.png" in capsys.readouterr().out


def test_check_sees_transposed_pictures(tmp_path, capsys, drawn):
    images, labels = stl10.load(drawn, "train", 12)
    write_set(tmp_path / "s", images.transpose(0, 1, 3, 2), labels + 1, stl10.CLASSES)
    write_set(tmp_path / "s", images, labels + 1, stl10.CLASSES, split="test")
    stl10.check(tmp_path / "s")
    assert "TRANSPOSED" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["make"], ["check", "nowhere"],
                                       ["import", "nowhere", "x"], ["import", "a", "b", "big"],
                                       ["make", "/dev/null/x"]])
def test_command_errors_are_one_line_and_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stl10.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and captured.out == ""


def test_command_line_exit_code(tmp_path):
    done = subprocess.run([sys.executable, "-m", "data.stl10", "check", str(tmp_path / "nowhere")],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
