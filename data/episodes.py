"""
Episodes: videos with actions. Reads a user's own, and records gymnasium environments in the same format.

An episode is frames uint8 (T, H, W, 3) and, if known, actions int (T,), rewards float (T,), dones bool (T,).
actions[t] leads INTO frames[t], and rewards[t] and dones[t] come with it: so actions[0] = -1, as nothing led
to the first frame. An episode whose actions are all -1 is unlabelled. Read, in the order of their names (2
before 10), are:

    one .npz            arrays of these names; frames (N, T, H, W, 3), or (T, H, W, 3) with one episode after
                        the other: a new one begins after a done, where `is_first` is true, and where
                        `episode` changes. May hold the entries of meta.json too
    a folder of .npz    the same, of any lengths
    a folder of .npy    X/frames.npy and X/actions.npy, or X_frames.npy and X_actions.npy
    a folder of .png    without actions; every folder with pictures is an episode. To get them from a video:
                        ffmpeg -i video.mp4 -vf fps=20,scale=-1:64 FOLDER/video/%06d.png
    meta.json           in the folder, and so is each of its entries if you like: {"name": "maze", "fps": 20,
                        "n_actions": 3, "action_names": ["stay", "left", "right"]}

Frames of .npy and of np.savez stay in their files (memory-mapped); np.savez_compressed and .png fill memory.
Recordings whose actions[t] was taken IN frames[t], as most loops write them, are read with align="from".

    python -m data.episodes check PATH [--align from]      # what is in it, and runs/preview_episodes.png
    python -m data.episodes record ENV [--episodes 10] [--steps 500] [--policy random|sticky|human]
                                       [--size 64] [--out PATH]

ENV is crafter or a name of gymnasium, such as MiniGrid-FourRooms-v0, ALE/Pong-v5, CarRacing-v3. A folder gets
the episodes that it lacks. The longer side of a frame becomes --size pixels, the shorter one keeps the ratio.

Does not: read video files, continuous or several actions at once, sound.
"""
import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data import program

FPS = 20.0  # of recordings that do not say
MOST_ACTIONS = 1024  # more must be announced by n_actions: rather a code of something continuous
META = dict(name=str, fps=(int, float), n_actions=int, action_names=list)  # entries of meta.json
PARTS = ("actions", "rewards", "dones")
BROKEN = (ValueError, OSError, EOFError, KeyError, RuntimeError, SyntaxError, struct.error,
          zipfile.BadZipFile, zlib.error)  # what numpy, zipfile and Pillow raise on damaged files
HIDDEN = re.compile(r"(^|/)(\.|__)")  # what systems leave: ._frames.npy, __MACOSX


# ------------------------------------------------------------------------------------------------------------
# Reading

class Frames(Sequence):
    """A list of arrays uint8 (T, H, W, 3), each opened when it is asked for: a mapped file keeps a descriptor
    for as long as it is in use, and a program gets about a thousand. A slice is a list of the same kind.
    parts: pairs of a function that opens an array, and an index into it."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Frames(self.parts[i])
        opened, index = self.parts[i]
        return opened()[index]


def load(path, align="into"):
    """Read recordings.

    path: a file or folder as in the head of this module; align: "into" where actions[t] leads into frames[t],
    "from" where it was taken in frames[t]: actions, rewards and dones then move one frame on, the last go.
    Returns a namespace, with one entry an episode in the first four:
        frames      list of uint8 (T, H, W, 3), memory-mapped where possible
        actions     list of int64 (T,) in 0..n_actions-1, or -1: the first, and all of an unlabelled episode
        rewards     list of float32 (T,), or None where an episode has none; dones: of bool, likewise
        n_actions   int, 0 if none is known; names: list of str of the actions, or None
        fps         frames a second; name: str; size: (H, W) in pixels; facts: a line
    One or two episodes become more: the longest is cut into 80, 10 and 10 %, if it has 20 frames and more.
    Raises ValueError or OSError in one line that says what to do.
    """
    if align not in ("into", "from"):
        raise ValueError(f"align {align!r}: expected 'into' or 'from'")
    path = Path(path)
    files = _files(path)
    found, meta, size = [], {}, None
    for file in tqdm(files, desc="reading", unit="file", disable=None, leave=False):
        opened, arrays = _read(file)
        frames = opened()
        shape = frames.shape
        if frames.dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"{file}: expected frames uint8 (T, H, W, 3) or (N, T, H, W, 3), found "
                             f"{frames.dtype} {shape}; save them as RGB from 0 to 255, channels last")
        size = size or (shape[-3:-1], file)
        if shape[-3:-1] != size[0]:
            raise ValueError(f"{file}: expected frames of {_times(size[0])} pixels (height x width) like "
                             f"{size[1]}, found {_times(shape[-3:-1])}; bring all to one size")
        meta = meta or {key: arrays[key].tolist() for key in META if key in arrays}
        found += _episodes(file, opened, shape, arrays, align)
    meta = dict(name=path.resolve().name if path.is_dir() else path.stem) | _checked_meta(path, meta)
    names = meta.get("action_names")
    top, where = max((e.actions.max(), str(e.file)) for e in found)
    n_actions = meta.get("n_actions", len(names) if names else int(top) + 1)
    if top >= n_actions or n_actions > MOST_ACTIONS and "n_actions" not in meta:
        limit = f"below {n_actions}" if top >= n_actions else f"below {MOST_ACTIONS:,}"
        raise ValueError(f"{where}: expected actions {limit}, found {top}; change them, or n_actions and "
                         "action_names in meta.json")
    cut = ""
    if len(found) < 3 and max(len(e.actions) for e in found) >= 20:
        cut = f"; {len(found)} recorded, the longest cut into 80, 10 and 10 %"
        found = _cut(found)
    lengths = [len(e.actions) for e in found]
    labelled = sum(e.actions[-1] >= 0 for e in found)
    fps = float(meta.get("fps", FPS))
    facts = (f"{meta['name']}: {len(found)} episodes of {_span(lengths)} frames, "
             f"{sum(lengths):,} in all, {_times(size[0])} pixels, {fps:g} a second"
             f"{'' if 'fps' in meta else ' (assumed)'}, {n_actions} actions"
             f"{'' if labelled == len(found) else f', {len(found) - labelled} episodes without'}{cut}")
    columns = {key: [getattr(e, key) for e in found] for key in PARTS}
    columns.update((key, None) for key in ("rewards", "dones") if any(part is None for part in columns[key]))
    return SimpleNamespace(**columns, frames=Frames([e.frames for e in found]), n_actions=n_actions, fps=fps,
                           names=names, name=meta["name"], size=size[0], facts=facts)


def _files(path):
    """What a recording consists of, sorted: .npz files, files *frames.npy, or folders of .png files."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; give an .npz, or a folder of .npz, .npy or .png files")
    below = [path] if path.is_file() else [p for p in path.rglob("*")
                                           if not HIDDEN.search(p.relative_to(path).as_posix())]
    files = [p for p in below if p.suffix == ".npz" or p.name.endswith("frames.npy")]
    if len({p.suffix for p in files}) > 1:
        raise ValueError(f"{path}: expected .npz or .npy files, found both; move one kind elsewhere")
    if not files and path.is_dir():  # beside files of arrays, pictures are only pictures
        files = list({p.parent for p in below if p.suffix.lower() == ".png"})
    if not files:
        raise ValueError(f"{path}: expected .npz, frames.npy or .png files, found none; see the head of "
                         "data/episodes.py for the format, and for how to make .png files of a video")
    return sorted(files, key=_natural)


def _natural(path):
    """Sort key in which 9 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.as_posix()))]


def _read(file):
    """A function that opens the frames of a file or folder, and a dict of its other arrays."""
    if file.is_dir():
        frames = _pictures(file)
        return lambda: frames, {}
    try:
        if file.suffix == ".npy":
            stem = file.name.removesuffix("frames.npy")
            map_npy = functools.partial(np.lib.format.open_memmap, mode="r")  # np.load would take other kinds
            opened = functools.partial(map_npy, file)
            beside = {p.name[len(stem):-4]: p for p in file.parent.glob("*.npy") if p.name.startswith(stem)}
            arrays = {key: np.array(map_npy(p)) if key in PARTS else None for key, p in beside.items()}
        else:
            opened = _mapped(file)
            with np.load(file) as stored:
                wanted = (*PARTS, "is_first", "episode", *META, *(() if opened else ("frames",)))
                arrays = {key: stored[key] if key in wanted else None for key in stored.files}
            if not opened:
                frames = arrays.get("frames")
                opened = lambda: frames
            if "frames" not in arrays:
                raise ValueError(f"no array called frames, only {', '.join(arrays) or 'nothing'}")
        opened()
        if wrong := [key for key in PARTS if key not in arrays and key[:-1] in arrays]:
            raise ValueError(f"an array called {wrong[0][:-1]}, which should be called {wrong[0]}")
    except BROKEN as error:
        raise ValueError(f"{file}: expected plain arrays, found {_said(error)}; save it again with np.savez "
                         "or np.save") from None
    return opened, {key: array for key, array in arrays.items() if array is not None}


def _mapped(file):
    """A function that maps the frames of an .npz; None where they are missing, compressed or need a copy."""
    with zipfile.ZipFile(file) as archive:
        info = next((i for i in archive.infolist() if i.filename == "frames.npy"), None)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](stream)
            length = stream.tell()
    if fortran or dtype != np.uint8:
        return None
    if info.file_size != length + math.prod(shape):
        raise ValueError(f"frames {shape} of {info.file_size - length:,} bytes")
    with open(file, "rb") as stream:  # the header in front of the data may be longer than the one in the list
        stream.seek(info.header_offset + 26)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4))) + length
    opened = functools.partial(np.memmap, file, np.uint8, "r", offset, shape)
    opened()
    return opened


def _pictures(folder):
    """uint8 (T, H, W, 3): the .png files of a folder."""
    from PIL import Image
    files = sorted((p for p in folder.iterdir() if p.suffix.lower() == ".png" and not HIDDEN.match(p.name)),
                   key=_natural)
    frames = None
    for t, file in enumerate(files):
        try:
            with Image.open(file) as image:
                if image.mode.startswith("I"):
                    raise ValueError("16 bits a pixel")
                picture = np.asarray(image.convert("RGB"))
        except BROKEN as error:
            raise ValueError(f"{file}: expected a .png of 8 bits, found {_said(error)}; write it again, or "
                             "remove it") from None
        frames = np.empty((len(files), *picture.shape), np.uint8) if frames is None else frames
        if picture.shape != frames.shape[1:]:
            raise ValueError(f"{file}: expected {_times(frames.shape[1:3])} pixels (height x width) like "
                             f"{files[0].name}, found {_times(picture.shape[:2])}; bring all to one size")
        frames[t] = picture
    return frames


def _episodes(file, opened, shape, arrays, align):
    """The episodes of a file: namespaces of file, frames (as in Frames), actions, rewards and dones."""
    lead = shape[:-3]

    def rows(key, kinds, default=None):  # (N, T)
        array = arrays.get(key, default)
        if array is not None and (array.dtype.kind not in kinds or array.shape != lead):
            kind = {"i": "integers", "f": "numbers", "b": "bool"}[kinds[0]]
            hint = ("save np.append(-1, actions) if they lie between the frames"
                    if key == "actions" and array.shape == (lead[0] - 1,) else
                    f"save one for each frame, or leave {key} out")
            raise ValueError(f"{file}: expected {key}, {kind} of shape {lead}, found {array.dtype} "
                             f"{array.shape}; {hint}")
        return None if array is None else array.reshape(-1, shape[-4])

    actions = rows("actions", "iu", np.full(lead, -1))
    rewards, dones = rows("rewards", "fiub"), rows("dones", "biu")
    if rewards is not None and not np.isfinite(rewards).all():
        raise ValueError(f"{file}: expected finite rewards, found NaN or infinite ones; save 0 there")
    first = np.zeros(actions.shape, bool)
    first[:, 0] = True
    if dones is not None:
        first[:, 1:] |= dones[:, :-1] != 0
    for key, begins in (("is_first", lambda a: a[:, 1:] != 0), ("episode", lambda a: a[:, 1:] != a[:, :-1])):
        if (array := rows(key, "biu")) is not None:
            first[:, 1:] |= begins(array)
    for n, row in enumerate(first):
        for a, b in itertools.pairwise([*np.flatnonzero(row).tolist(), len(row)]):
            episode = SimpleNamespace(file=file, frames=(opened, (n, slice(a, b))[-len(lead):]))
            for key, array, dtype, none in zip(PARTS, (actions, rewards, dones), (np.int64, np.float32, bool),
                                               (-1, 0, False)):  # none: what comes with a first frame
                part = None if array is None else array[n, a:b].astype(dtype)
                if part is not None and align == "from":
                    part[1:], part[0] = part[:-1].copy(), none
                setattr(episode, key, part)
            _check_actions(file, f"{n}, {a}" if len(lead) == 2 else a, episode.actions, align)
            yield episode


def _check_actions(file, start, actions, align):
    if (actions == -1).all():
        return
    if actions[0] != -1:
        raise ValueError(f"{file}: expected actions[{start}] = -1, as actions[t] leads into frames[t] and "
                         f"nothing led to the first frame of an episode, found {actions[0]}; if actions[t] "
                         "was taken in frames[t], set ACTION_ALIGN=from (of load and check: align='from', "
                         "--align from)")
    if actions[1:].min() < 0:
        hint = ("set ACTION_ALIGN=into" if align == "from" and actions[1] == -1 else "an episode has all its "
                "actions or -1 everywhere; if a new one begins there, save is_first too")
        raise ValueError(f"{file}: expected actions of 0 and more after actions[{start}], found "
                         f"{actions[1:].min()}; {hint}")


def _checked_meta(path, meta):
    """dict: the entries of META in an .npz, and over them those of meta.json."""
    file = path
    if path.is_dir() and (path / "meta.json").exists():
        file = path / "meta.json"
        try:
            meta = {**meta, **json.loads(file.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:  # no JSON, no object
            raise ValueError(f"{file}: expected an object in JSON, found {_said(error)}; write it "
                             "again") from None
    meta = {key: meta[key] for key in META if meta.get(key) is not None}
    names = meta.get("action_names", [])
    count = meta.get("n_actions", len(names))
    wanted = dict(name="a text", fps="a positive number", n_actions="an integer of 0 and more",
                  action_names=f"{count} texts")
    for key, value in meta.items():
        right = isinstance(value, META[key]) and not isinstance(value, bool)
        if (not right or key == "fps" and not 0 < value < 1000 or key == "n_actions" and value < 0
                or key == "action_names" and [type(v) for v in value] != [str] * count):
            raise ValueError(f"{file}: expected {key} to be {wanted[key]}, found {value!r:.80}; change it")
    return meta


def _cut(found):
    """The episodes with the longest one last, in three consecutive parts: 80, 10 and 10 %."""
    *others, longest = sorted(found, key=lambda e: len(e.actions))
    opened, (*row, span) = longest.frames
    tenth, length = len(longest.actions) // 10, len(longest.actions)
    for a, b in itertools.pairwise((0, length - 2 * tenth, length - tenth, length)):
        part = SimpleNamespace(frames=(opened, (*row, slice(span.start + a, span.start + b))))
        for key in PARTS:
            array = getattr(longest, key)
            setattr(part, key, None if array is None else array[a:b].copy())
        part.actions[0] = -1  # its cause lies in the part before
        others.append(part)
    return others


def _said(error):
    """What an error says, on one line that is not too long: some quote the bytes of a file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else f"{text[:200]} ..."


def _times(sizes):
    return "x".join(map(str, sizes))


def _span(numbers):
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


# ------------------------------------------------------------------------------------------------------------
# Use: splits, windows, sides that fit patches

def split(n):
    """Which of n episodes are for what: three ranges, train, val and test. The last 10 % are the test, the
    10 % before them val, at least one each. Raises ValueError for fewer than three."""
    if n < 3:
        raise ValueError(f"expected 3 episodes or more, to train, validate and test, found {n}; record more")
    tenth = max(1, n // 10)
    return range(n - 2 * tenth), range(n - 2 * tenth, n - tenth), range(n - tenth, n)


def windows(lengths, T, stride=1):
    """int64 (M, 2): episode and first frame of every window of T frames, `stride` frames apart, in order.
    None crosses the end of an episode; shorter episodes have none. lengths: frames of each episode."""
    if T < 1 or stride < 1:
        raise ValueError(f"expected windows of 1 frame or more, 1 or more apart, found {T} and {stride}")
    starts = [np.arange(0, length - T + 1, stride) for length in lengths]
    return np.stack([np.repeat(np.arange(len(starts)), [len(s) for s in starts]),
                     np.concatenate([[], *starts])], 1).astype(np.int64)


def padded(frames, patch):
    """frames (..., H, W, 3) with their last row and column repeated until both sides divide by patch, in
    pixels; nothing is stretched. cropped() undoes it."""
    H, W = frames.shape[-3:-1]
    if H % patch == W % patch == 0:
        return frames
    return np.pad(frames, [(0, 0)] * (frames.ndim - 3) + [(0, -H % patch), (0, -W % patch), (0, 0)], "edge")


def cropped(frames, size):
    """The frames (..., H, W, 3) that padded() was given; size: (H, W)."""
    return frames[..., :size[0], :size[1], :]


def resize(frames, size):
    """frames (..., H, W, 3), uint8 or float, to size (height, width): every new pixel is the mean of the area
    that it covers, parts of old pixels counted as parts. Exact for any ratio; uint8 rounds half up."""
    weights = []
    for old, new in zip(frames.shape[-3:-1], size):  # in units of 1 / (old * new): all are integers
        edges, bounds = np.arange(new + 1) * old, np.arange(old + 1) * new
        overlap = np.minimum(edges[1:, None], bounds[1:]) - np.maximum(edges[:-1, None], bounds[:-1])
        weights.append(overlap.clip(0).astype(float))  # (new, old), rows sum to old
    area = math.prod(frames.shape[-3:-1])
    total = np.einsum("hi,...ijc,wj->...hwc", weights[0], frames.astype(float), weights[1], optimize=True)
    return ((2 * total + area) // (2 * area)).astype(np.uint8) if frames.dtype == np.uint8 else total / area


# ------------------------------------------------------------------------------------------------------------
# Recording

EXTRAS = {"MiniGrid-": "minigrid", "BabyAI-": "minigrid", "ALE/": "ale_py"}  # what registers such names


def record(env, folder, episodes=10, steps=500, policy="sticky", size=64):
    """Record an environment into a folder: ep_00000.npz and so on, and meta.json. Those that exist stay.

    env: "crafter", a name of gymnasium, or a function of a seed that makes an environment with discrete
    actions, of the old interface (step returns four things) or the new (five); episodes: how many the folder
    shall have; steps: frames of an episode that does not end before; policy: a name in POLICIES; size: pixels
    of the longer side of a frame. Episode k is played with the seed k. Returns the number of new episodes.
    A break (Ctrl-C) leaves whole files, and the same call goes on.
    """
    folder, name = Path(folder), env if isinstance(env, str) else getattr(env, "__name__", "environment")
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r}: expected one of {', '.join(POLICIES)}")
    if min(episodes, steps - 1, size) < 1:
        raise ValueError(f"expected 1 episode, 2 steps, 1 pixel or more, found {episodes}, {steps}, {size}")
    files = {k: folder / f"ep_{k:05}.npz" for k in range(episodes)}
    todo = {k: file for k, file in files.items() if not file.exists()}
    make = _maker(env) if isinstance(env, str) else env
    for k, file in tqdm(todo.items(), desc=name, unit="episode", disable=None):
        world = make(k)
        space = world.action_space
        if not _discrete(space):
            raise ValueError(f"{name}: expected discrete actions, found {space}; this is not supported")
        n, offset = int(space.n), int(getattr(space, "start", 0))
        frame = _small(_frame(world, _reset(world, k)), size)
        fps = (getattr(world, "metadata", None) or {}).get("render_fps")  # null: not known
        meta = dict(name=name, fps=fps, n_actions=n, action_names=_names(world, n),
                    size=list(frame.shape[:2]))
        _write_meta(folder, meta)
        played = dict(frames=[frame], actions=[-1], rewards=[0.0], dones=[False])
        with POLICIES[policy](np.random.default_rng(k), meta) as choose:
            while len(played["frames"]) < steps and not played["dones"][-1]:
                action = int(choose(frame))
                observation, reward, *ends, _ = world.step(action + offset)  # terminated, truncated; or done
                frame = _small(_frame(world, observation), size)
                for key, value in zip(played, (frame, action, float(reward), any(map(bool, ends)))):
                    played[key].append(value)
        _save(file, lambda stream: np.savez(stream, **{  # not compressed: load() maps it
            key: np.array(played[key], dtype)
            for key, dtype in zip(played, (np.uint8, np.int64, np.float32, bool))}))
    return len(todo)


def _maker(name):
    """A function of a seed that makes the environment called name."""
    extra = next((module for prefix, module in EXTRAS.items() if name.startswith(prefix)), None)
    if name == "crafter":
        module = _imported("crafter")
        return lambda seed: module.Env(seed=seed)
    gymnasium = _imported("gymnasium", extra)
    if extra:
        gymnasium.register_envs(_imported(extra, "gymnasium"))
    options = dict(render_mode="rgb_array", disable_env_checker=True)
    try:
        world = gymnasium.make(name, **options)
        if not _discrete(world.action_space):
            with contextlib.suppress(TypeError):  # CarRacing has the option; most others do not know it
                world = gymnasium.make(name, continuous=False, **options)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"{name}: cannot be made, {_said(error)}; give crafter, or a name of gymnasium, "
                         "such as MiniGrid-FourRooms-v0, ALE/Pong-v5, CarRacing-v3") from None
    return lambda seed: world


def _imported(module, also=None):
    try:
        return importlib.import_module(module)
    except ImportError:
        packages = " ".join(sorted({m.replace("_", "-") for m in (module, also) if m}))
        raise ValueError(f"{module} is not installed; pip install {packages}") from None


def _discrete(space):
    n = getattr(space, "n", None)  # MultiBinary has one too, and a shape
    return isinstance(n, (int, np.integer)) and not getattr(space, "shape", ())


def _names(world, n):
    """Names of the n actions where the environment knows them, else None."""
    world = getattr(world, "unwrapped", world)
    names = getattr(world, "action_names", None)  # crafter
    names = names or [action.name for action in getattr(world, "actions", ())]  # minigrid
    names = world.get_action_meanings() if hasattr(world, "get_action_meanings") else names  # ale_py
    return list(map(str, names)) if len(names) == n else None


def _reset(world, seed):
    known = "seed" in inspect.signature(world.reset).parameters  # not in old ones
    found = world.reset(seed=seed) if known else world.reset()
    return found[0] if isinstance(found, tuple) else found


def _frame(world, observation):
    """uint8 (H, W, 3): the observation if it is a picture, else what the environment renders."""
    def is_picture(x):
        return isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3
    frame = observation if is_picture(observation) else world.render()
    if not is_picture(frame):
        raise ValueError(f"expected a picture uint8 (H, W, 3) as observation or from render(), found "
                         f"{getattr(frame, 'dtype', type(frame).__name__)} {getattr(frame, 'shape', '')}; "
                         "wrap the environment")
    return frame


def _small(frame, size):
    H, W = frame.shape[:2]
    new = tuple(max(1, round(side * size / max(H, W))) for side in (H, W))
    return frame.copy() if new == (H, W) else resize(frame, new)


def _write_meta(folder, meta):
    """Write meta.json, or compare it with what the folder has."""
    file = folder / "meta.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return _save(file, lambda stream: stream.write(json.dumps(meta, indent=1).encode() + b"\n"))
    _checked_meta(folder, {})
    old = json.loads(file.read_text(encoding="utf-8"))
    for key in ("name", "size", "n_actions"):
        if old.get(key) != meta[key]:
            raise ValueError(f"{file}: expected {key} {meta[key]} of this recording, found {old.get(key)} of "
                             "an older one; give another --out")


def _save(file, write):
    """Let write(stream) make a file that is there whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            write(stream)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


# Policies: context managers over a function of a frame that returns an action, 0..n-1

@contextlib.contextmanager
def _random(rng, meta):
    yield lambda frame: rng.integers(meta["n_actions"])


@contextlib.contextmanager
def _sticky(rng, meta):
    """Every action is held for 3 to 9 frames: it goes further than chance."""
    held = (action for _ in itertools.count()
            for action in [rng.integers(meta["n_actions"])] * rng.integers(3, 10))
    yield lambda frame: next(held)


@contextlib.contextmanager
def _human(rng, meta):
    """A key is a step: 0 to 9, then a to z. The frame is drawn in the terminal, two pixels a character."""
    if os.name != "posix" or not sys.stdin.isatty():
        raise ValueError("policy human: expected a Unix terminal to read keys from, found none; give another")
    import termios
    import tty
    before = termios.tcgetattr(sys.stdin)
    keys = "0123456789abcdefghijklmnopqrstuvwxyz"[:meta["n_actions"]]
    legend = "  ".join(f"{key} {name}" for key, name in zip(keys, meta["action_names"] or [""] * len(keys)))

    def choose(frame):
        even = padded(frame, 2)
        colours = np.concatenate([even[::2], even[1::2]], -1)[:, :len(frame[0])]  # upper and lower half
        lines = ["".join("\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*pair) for pair in row) + "\x1b[0m"
                 for row in colours.tolist()]
        print("\x1b[H\x1b[2J" + "\n".join([*lines, legend, "Ctrl-C: stop, this episode is lost"]), flush=True)
        while (key := os.read(sys.stdin.fileno(), 1).decode("latin-1")) not in keys or not key:
            if not key:
                raise KeyboardInterrupt  # the terminal is gone
        return keys.index(key)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # keeps the keys that were pressed meanwhile
        yield choose
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


POLICIES = dict(random=_random, sticky=_sticky, human=_human)


# ------------------------------------------------------------------------------------------------------------
# Commands

def check(path, align="into"):
    """Read every byte of a recording, print what is in it, and draw a preview."""
    found = load(path, align)
    for file in _files(Path(path)):
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                if bad := archive.testzip():  # load() does not read all of the frames that it maps
                    raise ValueError(f"{file}: expected {bad} as saved, found other bytes; copy it again")
    print(found.facts)
    lengths = np.array([len(a) for a in found.actions])
    print(f"lengths: {', '.join(map(str, lengths[:12]))}{' ...' if len(lengths) > 12 else ''}; "
          f"windows of 16: {len(windows(lengths, 16)):,}, of 64: {len(windows(lengths, 64)):,}")
    counts = np.bincount(np.concatenate(found.actions) + 1, minlength=found.n_actions + 1)[1:]
    names = found.names or range(found.n_actions)
    print("actions:", ", ".join(f"{name} {count:,}" for name, count in zip(names, counts)) or "none")
    for key in ("rewards", "dones"):
        if (values := getattr(found, key)) is not None:
            print(f"{key}: {np.count_nonzero(np.concatenate(values)):,} not zero, in all "
                  f"{np.concatenate(values).sum(dtype=float):g}")
    if len(lengths) >= 3:
        print("train, val, test: episodes " + ", ".join(f"{r[0]} to {r[-1]}" for r in split(len(lengths))))
    print(f"wrote {preview(found)}")


def preview(found, path="runs/preview_episodes.png", rows=6, columns=10):
    """Write a PNG: from the middle of some episodes, consecutive frames, each under the action that led into
    it, so that one sees whether they belong together. found: what load() returned. Returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    chosen = np.unique(np.linspace(0, len(found.frames) - 1, rows).round().astype(int))
    H, W = found.size
    figure, panels = plt.subplots(len(chosen), columns, squeeze=False, layout="constrained",
                                  figsize=(1.3 * columns, len(chosen) * (1.3 * H / W + .35)))
    for i, line in zip(chosen.tolist(), panels):
        frames, actions = found.frames[i], found.actions[i]
        start = max(0, (len(frames) - columns) // 2)
        for t, panel in enumerate(line, start):
            panel.set_axis_off()
            if t < len(frames):
                a = actions[t]
                panel.imshow(frames[t])
                title = "-" if a < 0 else found.names[a] if found.names else str(a)
                title = f"episode {i}, frame {t}\n{title}" if t == start else title
                panel.set_title(title, fontsize=7, pad=2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


USAGE = ("usage: python -m data.episodes check PATH [--align from] | record ENV [--episodes N] [--steps T] "
         "[--policy random|sticky|human] [--size 64] [--out PATH]")


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr."""
    command, target, *rest = [*arguments, *[""] * (2 - len(arguments))]
    rest = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = dict(zip(rest[::2], rest[1::2]))
    known = {"check": {"--align"}, "record": {"--episodes", "--steps", "--policy", "--size", "--out"}}
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command not in known or not target or len(rest) % 2 or not options.keys() <= known[command]:
        raise ValueError(USAGE)
    options = {key[2:]: value for key, value in options.items()}
    if command == "check":
        return check(target, **options)
    for key in options.keys() - {"policy", "out"}:
        if not options[key].isdigit():
            raise ValueError(f"--{key} {options[key]!r}: expected a whole number; {USAGE}")
        options[key] = int(options[key])
    out = options.pop("out", f"runs/episodes_{re.sub(r'[^A-Za-z0-9]+', '_', target)}")
    new = record(target, out, **options)
    print(f"{out}: {new} new episodes; {load(out).facts}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
