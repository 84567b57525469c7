"""
The plumbing every train_*.py shares: settings, run folders, checkpoints that survive, steps that are guarded.
Nothing here knows what a model, a loss, a noise schedule or a data set is.

    override(globals())                       the command line over a script's constants: NAME=value
    run = start(__file__, globals())          seed, device, process group, lock, run folder, last checkpoint
    save_checkpoint, load_checkpoint, restore atomic, verified, plain types, never over the last good file
    guarded_step, Guard                       clip; skip non-finite and exploding steps; say when to go back
    roll_back                                 what a run does when the guard says that it is lost
    Muon, Optimizers                          for the matrices inside a network; several behind one step()
    ema_update, lr_at, autocast               averaged weights; warm-up + cosine; bf16 where it pays
    seed_of, generator_of, batch_order        every random draw is a function of its place in the run
    save_artifact, tile, save_metrics         NPY for programs and PNG for people; metrics.json
"""

import ast
import contextlib
import copy
import difflib
import hashlib
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: runs, without the lock on the run folder
    fcntl = None

PLAIN = (bool, int, float, str, tuple)
FORMAT = 1  # of checkpoints; raised when old files can no longer be read


def fail(message):
    """A user's mistake: one clear line, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---------------------------------------------------------------- settings
def settings(namespace):
    """The UPPER_CASE plain constants of a script, as a dict: what is printed and kept in checkpoints."""
    return {k: v for k, v in namespace.items() if k.isupper() and isinstance(v, PLAIN)}


def convert(name, text, default):
    """The value that `text` means for a setting with this default; ValueError when the types disagree."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, tuple) and not isinstance(value, tuple):
        value = (value,)
    if type(value) is not type(default):
        raise ValueError(f"{name} is {type(default).__name__} (default {default!r}), got {text!r}")
    if isinstance(default, tuple) and default and any(
            type(v) is not type(default[0]) and (type(v), type(default[0])) != (int, float) for v in value):
        raise ValueError(f"{name} is a tuple like {default!r}, got {text!r}")
    return value


def row_of(table, name):
    """A row of EXPERIMENTS, after the row that its LIKE names: dict of settings."""
    own = dict(table[name])
    return {**row_of(table, own.pop("LIKE")), **own} if "LIKE" in own else own


def override(namespace, args=None):
    """Replace a script's constants: `LR=1e-4 WIDTHS=32,64`, `--lr 1e-4`, `--lr=1e-4`, a bare `--flag` for
    True. A row of the script's table EXPERIMENTS (EXPERIMENT=name) comes first, so single
    settings win over it."""
    known, args, given = settings(namespace), list(sys.argv[1:] if args is None else args), {}
    listing = "\n".join(f"  {k} = {v!r}" for k, v in known.items())
    while args:
        arg = args.pop(0)
        if arg in ("-h", "--help"):
            print(namespace.get("__doc__") or "", "\nsettings\n" + listing)
            sys.exit(0)
        name, eq, text = arg.partition("=")
        if arg.startswith("--"):
            name = name[2:].replace("-", "_").upper()
            if not eq and isinstance(known.get(name), bool) and args[:1] not in (["True"], ["False"]):
                text = "True"
            elif not eq and name in known:
                text = args.pop(0) if args else fail(f"{arg} needs a value")
        elif not eq:
            fail(f"{arg!r} is not a setting: write NAME=value or --name value")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            fail(f"unknown setting {name!r}" + (f", did you mean {' or '.join(near)}?" if near else "")
                 + f" This script has\n{listing}")
        try:
            given[name] = convert(name, text, known[name])
        except ValueError as error:
            fail(error)
    chosen = given.get("EXPERIMENT", known.get("EXPERIMENT"))
    if chosen:
        table = namespace["EXPERIMENTS"]
        if chosen not in table:
            fail(f"unknown EXPERIMENT {chosen!r}: one of {', '.join(table)}")
        namespace.update(row_of(table, chosen))
    namespace.update(given)


# ---------------------------------------------------------------- a run
@dataclass
class Run:
    """What start() found out. `checkpoint` is the state to continue from, or None."""
    script: str
    settings: dict
    folder: Path
    device: torch.device
    rank: int
    world: int
    checkpoint: dict | None
    signal: int = 0              # the signal that asked us to stop
    returned_to: int = -1        # the step of the state that the last rollback went to
    interruptible: bool = False  # in an evaluation no state changes, so a signal may break it off at once
    keep: list = field(default_factory=list)  # open files that hold the lock

    def stopping(self):
        """True when a signal asked for an end, on any rank: all ranks leave the loop at the same step."""
        if self.world == 1:
            return bool(self.signal)
        flag = torch.tensor(float(self.signal), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.signal = int(flag)
        return bool(self.signal)

    @contextlib.contextmanager
    def evaluation(self):
        """Around code that reads the state but does not change it. The global RNG comes back as it was. A
        signal or a full disk breaks it off without an exception."""
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.interruptible = True
                try:
                    yield
                finally:
                    self.interruptible = False
        except Interrupted:
            pass  # the loop sees run.stopping() next
        except OSError as error:  # a full disk costs the report, never the run
            print(f"\nreport not written ({error}); training goes on", flush=True)


class Interrupted(BaseException):  # so that no `except Exception` on the way swallows it
    """Ctrl-C or SIGTERM while an evaluation ran."""


def catch_signals(run):
    """Ctrl-C and SIGTERM ask for a clean end: the step in progress is finished and saved. A second
    one ends at once."""
    def handler(number, frame):
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)
        run.signal = number
        if run.interruptible:
            raise Interrupted
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, handler)


class Unbreakable:
    """stdout or stderr, except that a full disk below `> train.txt` or a closed terminal cannot end a run."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def keep_memory():
    """Tell glibc to keep freed blocks: by default every large tensor is returned to the system and its pages
    are faulted in again at the next step (1.1 to 1.6 times slower steps on a CPU). Harmless where
    there is no glibc."""
    with contextlib.suppress(Exception):
        import ctypes
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for name, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
            libc.mallopt(name, value)


def finish(run):
    """All processes leave together: one that exits while its group still has threads may abort."""
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def pick_device():
    """cuda (this process's card under torchrun), mps or cpu, set up for speed."""
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    keep_memory()
    return torch.device("cpu")


def start(script, namespace, free=(), name=None):
    """Everything before the model: seed, device, process group, lock, run folder OUT/name (the script without
    train_), and the checkpoint to continue from. RESUME=True continues when the settings agree (those named
    in `free` may differ), RESUME=False moves an old folder aside. Exits with code 2 when the settings differ
    or another process runs here."""
    name = name or Path(script).stem.removeprefix("train_")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, now = pick_device(), settings(namespace)
    torch.manual_seed(namespace["SEED"])
    if world > 1 and not dist.is_initialized():
        # the others wait while rank 0 draws a report, however long; torchrun itself notices a dead rank
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    folder = Path(namespace["OUT"]) / name
    run = Run(Path(script).stem, now, folder, device, rank, world, None)
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    if rank == 0:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            take_lock(run, folder.with_name(f"{name}.lock"))
            if not namespace["RESUME"] and folder.exists():
                aside = folder.with_name(f"{name}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}")
                os.replace(folder, aside)
                print(f"the old run is now in {aside}")
            folder.mkdir(exist_ok=True)
        except OSError as error:
            fail(f"cannot write the run folder {folder}: {error.strerror}; give another OUT")
    if world > 1:
        dist.barrier()
    run.checkpoint = load_checkpoint(folder / "last.pt", device=device, missing_ok=True)
    if run.checkpoint is not None:
        old = run.checkpoint["settings"]
        differ = [k for k in sorted(old.keys() | now.keys())
                  if old.get(k) != now.get(k) and k not in (*free, "RESUME", "OUT")]
        if run.checkpoint["script"] != run.script:
            fail(f"{folder} holds a run of {run.checkpoint['script']}.py; give another OUT")
        if differ:
            fail(f"{folder} holds a run with other settings ("
                 + ", ".join(f"{k}: {old.get(k)!r} there, {now.get(k)!r} now" for k in differ)
                 + "); RESUME=False moves it aside and starts anew, OUT=... keeps both")
    if rank == 0:
        try:
            for stray in folder.glob("*.tmp"):  # a save that a kill interrupted
                stray.unlink()
            write_changes(run, folder)
            shutil.copy(script, folder / Path(script).name)
            (folder / "settings.json").write_text(json.dumps(now, indent=1))
            (folder / "environment.txt").write_text(
                f"python {platform.python_version()}\ntorch {torch.__version__}\nnumpy {np.__version__}\n"
                f"platform {platform.platform()}\ndevice {device}\nthreads {torch.get_num_threads()}\n"
                f"world {world}\n")
        except OSError as error:
            fail(f"cannot write the run folder {folder}: {error.strerror}; give another OUT")
        print(f"{run.script} on {device}" + (f" x {world}" if world > 1 else "") + ":",
              *(f"{k}={v!r}" for k, v in now.items()))
    catch_signals(run)
    return run


def take_lock(run, path):
    """Two processes never write one folder. The system drops the lock when its owner dies, also by kill -9,
    so a file that was left behind is simply taken over."""
    handle = open(path, "a+")
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            fail(f"another process ({owner}) writes {run.folder}; wait, or give another OUT")
    handle.truncate(0)
    handle.write(f"pid {os.getpid()}")
    handle.flush()
    run.keep.append(handle)


def write_changes(run, folder):
    """CHANGES.md, the lab book beside the runs: delta only, what differs from the run before."""
    book = folder.parent / f"{folder.name}.CHANGES.md"
    record = folder.parent / f"{folder.name}.settings.json"
    old = {}
    with contextlib.suppress(OSError, ValueError):
        old = json.loads(record.read_text())
    now = json.loads(json.dumps(run.settings))
    changed = [f"  - {k}: {old[k]!r} -> {v!r}" for k, v in now.items()
               if old.get(k, v) != v and k != "RESUME"]
    kind = "resumed" if run.checkpoint is not None else "new run"
    if kind == "new run" or changed:
        with open(book, "a") as f:
            f.write(f"- {time.strftime('%Y-%m-%d %H:%M')} ({kind})\n"
                    + ("  Changed:\n" if changed else "  repeat\n" if old else "  first run\n")
                    + "".join(line + "\n" for line in changed))
    record.write_text(json.dumps(now))


# ---------------------------------------------------------------- checkpoints
def all_finite(value):
    """False when any float tensor inside nested dicts and lists holds NaN or infinity."""
    if torch.is_tensor(value):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return all(map(all_finite, value)) if isinstance(value, (list, tuple)) else True


def verify(path):
    """Raises unless the file is a whole torch zip whose every byte matches its CRC: torch.load alone would
    accept a flipped bit and return a weight of 1e37."""
    with zipfile.ZipFile(path) as z:
        bad = z.testzip()
    if bad is not None:
        raise OSError(f"{bad} is damaged")


def intact(path):
    """True when the file is there and whole; says so when it is there and damaged."""
    try:
        if path.exists():
            verify(path)
        return path.exists()
    except Exception as error:  # a flipped bit in a header surfaces as any of a dozen exceptions
        print(f"\n{path} is damaged ({str(error)[:80]})", file=sys.stderr, flush=True)
        return False


def save_checkpoint(path, run, **state):
    """Write {script, settings, format, **state} so that a kill, a full disk or a bug can never cost the last
    good file: a temporary file beside it, flushed to the disk, read back, then renamed; the file before stays
    as *.prev.pt. Values: plain types, tensors and state_dicts. Returns False, after one line, when it could
    not be written or when the state is not finite: training goes on and the next save tries again."""
    path = Path(path)
    temporary, previous = path.with_suffix(".tmp"), path.with_suffix(".prev.pt")
    if not all_finite(state):
        print(f"\n{path.name} not written: the state holds NaN or infinity", flush=True)
        return False
    try:
        with open(temporary, "wb") as f:
            torch.save(dict(format=FORMAT, script=run.script, settings=run.settings, **state), f)
            f.flush()
            os.fsync(f.fileno())
        verify(temporary)
        torch.load(temporary, mmap=True, weights_only=True)  # reads no weights, refuses what cannot be loaded
        if intact(path):  # a damaged file must not push out the good one before it, nor the same step twice
            before = torch.load(path, mmap=True, weights_only=True).get("step")
            if before is None or before != state.get("step"):
                os.replace(path, previous)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the rename itself must reach the disk; not every system can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return True
    except Exception as error:  # torch reports a full disk as RuntimeError, a bad value as pickling errors
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        print(f"\n{path.name} not written ({type(error).__name__}: {' '.join(str(error).split())[:120]}); "
              "the last good file stays, training goes on", flush=True)
        return False


class Checkpoint(dict):
    """What was saved. A key that is not there is the user's mistake: the file comes from other code."""
    def __missing__(self, key):
        fail(f"the checkpoint of {self['script']} has no {key!r}: another version of the script saved it")


def load_checkpoint(path, device="cpu", missing_ok=False):
    """The newest intact one of last.pt and last.prev.pt, and says so when it is not the first. Only tensors
    and plain types are ever unpickled. Exits with code 2 when there is nothing intact to read."""
    path, found = Path(path), False
    for candidate in (path, path.with_suffix(".prev.pt")):
        if not candidate.exists():
            continue
        found = True
        if not intact(candidate):
            continue
        try:
            state = torch.load(candidate, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0][:80]
            fail(f"{candidate} refused: it holds more than tensors and plain values ({reason})")
        except (RuntimeError, ValueError, EOFError) as error:  # a damaged header that the CRC does not cover
            print(f"{candidate} is damaged ({str(error)[:80]})", file=sys.stderr, flush=True)
            continue
        if not isinstance(state, dict) or not {"format", "script", "settings"} <= state.keys():
            fail(f"{candidate} is not a checkpoint of these scripts")
        if state["format"] > FORMAT:
            fail(f"{candidate} has format {state['format']}, this code reads up to {FORMAT}: update the code")
        if candidate != path:
            print(f"continuing from {candidate}", file=sys.stderr, flush=True)
        return Checkpoint(state)
    if missing_ok and not found:
        return None
    fail(f"no intact checkpoint: {path} " + ("and its .prev.pt are damaged; RESUME=False starts anew" if found
                                            else "does not exist"))


def load_strictly(module, state, what):
    """load_state_dict, strict: a weight that is missing, left over or of another shape is one
    line and exit code 2."""
    own = module.state_dict()
    problems = ([f"missing {k}" for k in own if k not in state]
                + [f"left over {k}" for k in state if k not in own]
                + [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
                   for k in own if k in state and own[k].shape != state[k].shape])
    if problems:
        fail(f"{what} does not fit this network: {'; '.join(problems[:4])}"
             + (f" and {len(problems) - 4} more" if len(problems) > 4 else ""))
    module.load_state_dict(state)


def restore(saved, model, ema, optimizer, guard):
    """Put what last.pt saved back into the objects of a run; what does not fit is one line, exit code 2."""
    load_strictly(model, saved["model"], "last.pt")
    load_strictly(ema, saved["ema"], "last.pt (EMA)")
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, ValueError) as error:
        fail(f"last.pt: the optimizer state does not fit this network: {error}")
    vars(guard).update(saved["guard"])


# ---------------------------------------------------------------- training
def seed_of(*parts):
    """One 63-bit seed from any plain values, e.g. seed_of(SEED, "step", 17): every random draw of a run is a
    function of its place, so a resumed run needs no RNG state to repeat an unbroken one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator_of(*parts):
    """A CPU generator seeded by its place in the run, as seed_of() says."""
    return torch.Generator().manual_seed(seed_of(*parts))


def batch_order(seed, step, n, total, attempt=0):
    """The numbers below `total` of the n examples of optimizer step `step`, from one endless stream of
    permutations, so that every batch is full. attempt counts rollbacks: other permutations."""
    place, index = step * n, []
    while len(index) < n:
        order = torch.randperm(total, generator=generator_of(seed, "order", place // total + 10**9 * attempt))
        index += order[place % total:][:n - len(index)].tolist()
        place = step * n + len(index)
    return index


def autocast(device, precision):
    """bf16 inside the products where asked for ("bf16"), or with "auto" where the hardware has it; losses,
    norms and logits stay fp32."""
    if precision == "auto":
        on = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
              "cpu": torch.cpu._is_avx512_bf16_supported}.get(device.type, bool)()
    else:
        on = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def lr_at(step, steps, peak, warmup=0.05):
    """Learning rate of optimizer step `step` of `steps`: linear warm-up over the first share, then a cosine
    to zero. Counts optimizer steps, never micro-batches."""
    w = max(1, int(warmup * steps))
    if step < w:
        return peak * (step + 1) / w
    return peak / 2 * (1 + math.cos(math.pi * (step - w) / max(1, steps - w)))


@torch.no_grad()
def ema_update(ema, model, decay, step):
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)): a short memory at first, so
    that short runs sample sensibly. Matched by name; buffers are copied."""
    d = min(decay, (1 + step) / (10 + step))
    new, old = dict(model.named_parameters()), dict(ema.named_parameters())
    torch._foreach_lerp_([old[k] for k in old], [new[k] for k in old], 1 - d)
    buffers = dict(model.named_buffers())
    for k, b in ema.named_buffers():
        b.copy_(buffers[k])


def orthogonalise(g, steps=5):
    """The nearest matrix with all singular values near one, for a stack g (n, rows, columns): five rounds of
    the quintic Newton-Schulz iteration (Jordan 2024). fp32 where the hardware has no bf16 products."""
    x = g.to(torch.bfloat16) if torch.is_autocast_enabled(g.device.type) else g
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x - 4.7750 x x' x + 2.0315 (x x')^2 x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024): w <- w (1 - lr wd) - lr sqrt(max(1, rows/columns)) O, where O
    is the orthogonalised Nesterov momentum. All matrices of one shape in one batched product, in whatever
    group they are; torch.optim.Muon takes them one by one."""

    def __init__(self, groups, weight_decay, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        shapes = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    m = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    shapes.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"]), group))
        for (rows, columns), members in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update, _ in members]))
            for (p, _, group), update in zip(members, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


class Optimizers:
    """Several optimizers, each with its own parameters of a model, behind one step(). Their state goes by
    the parameters' names, so that a network that has grown inherits what it can."""

    def __init__(self, model, parts):
        self.names, self.parts = dict(model.named_parameters()), parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: dict(part.state[p]) for part in self.parts for name, p in self.names.items()
                if p in part.state}

    def load_state_dict(self, state):
        """Parameters without a saved state start afresh; a state of another shape is a ValueError."""
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name in self.names.keys() & state.keys():
            p = self.names[name]
            for key, value in state[name].items():
                if value.ndim and value.shape != p.shape:
                    raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {tuple(p.shape)}")
            owner[p].state[p] = {k: v.to(p.device).clone() for k, v in state[name].items()}


@dataclass
class Guard:
    """
    Decides whether a step is taken and when a run must go back. All of it is in the checkpoint (vars(guard)).

    Spikes: a gradient norm g is refused if it is not finite or, after the first 20, above `factor` x average.
    Refused or not, a finite g moves the average: average <- b average + (1 - b) min(g, factor x average); one
    that only accepted steps could move would freeze for ever after a lasting rise. A rise by R is accepted
    again after ln(R / factor) / ln(1 + (1 - b)(factor - 1)) steps. After more than `patience` refusals in a
    row the run goes back to its last good checkpoint with half the learning rate.
    Loss watchdog: the same when the loss average stays above `limit` x its lowest for longer than `patience`.
    """
    factor: float = 5.0
    b: float = 0.95
    patience: int = 50
    limit: float = 2.0
    average: float = 0.0    # of gradient norms; 0 until the first finite one
    loss: float = 0.0       # average of losses, for the watchdog
    lowest: float = math.inf
    seen: int = 0
    skipped: int = 0        # in total
    in_a_row: int = 0
    high: int = 0           # steps in a row with a high loss
    trial: int = 0          # steps to go after a rollback until a state may be good again
    rollbacks: int = 0
    lr_scale: float = 1.0

    def accepts(self, norm, loss):
        """Looks at one step: gradient norm and loss, floats. True if the optimizer may take it."""
        finite = math.isfinite(norm) and math.isfinite(loss)
        self.trial = max(0, self.trial - 1)
        ok = finite and (self.average == 0 or self.seen < 20 or norm <= self.factor * self.average)
        if math.isfinite(norm):
            capped = norm if self.average == 0 else min(norm, self.factor * self.average)
            self.average = capped if self.average == 0 else self.b * self.average + (1 - self.b) * capped
        if finite:
            self.seen += 1
            d = min(0.98, self.seen / (self.seen + 1))
            self.loss = d * self.loss + (1 - d) * min(loss, 10 * self.loss if self.seen > 1 else loss)
            if self.seen > 20:
                self.lowest = min(self.lowest, self.loss)
            self.high = self.high + 1 if self.loss > self.limit * self.lowest else 0
        self.in_a_row = 0 if ok else self.in_a_row + 1
        self.skipped += not ok
        return ok

    @property
    def healthy(self):
        """A state worth saving as the last good one."""
        return self.in_a_row == self.high == self.trial == 0

    @property
    def lost(self):
        """True when the run should go back to its last good checkpoint."""
        return self.in_a_row > self.patience or self.high > self.patience

    def after_rollback(self, broken):
        """Called on the guard of the good checkpoint: half the LR, another window of data (draw_batch)."""
        self.rollbacks, self.lr_scale = broken.rollbacks + 1, broken.lr_scale / 2
        self.skipped, self.in_a_row, self.high, self.trial = broken.skipped, 0, 0, self.patience


def guarded_step(optimizer, parameters, guard, loss, clip):
    """Clip the gradient norm, ask the guard, step, clear the gradients. loss: float, the mean over the whole
    step. Returns (gradient norm before clipping, taken). clip_grad_norm_ with one infinite gradient silently
    makes NaN of it and 0 of all others, so the norm decides before the optimizer sees anything."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    taken = guard.accepts(norm, loss)
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken


def roll_back(run, guard, restore, at, lr):
    """When guard.lost: back to the last good state, half the learning rate, another order of the data.
    restore puts a checkpoint into the run's objects, `at` (where it is) among them; the sixth time ends the
    run, with a line that names the peak learning rate lr. Twice to the same state without a good one between
    means that the state itself is broken, saved between the blow-up and the guard that saw it: the one before
    it takes its place."""
    log, last = run.folder / "log.csv", run.folder / "last.pt"
    if guard.rollbacks == 5:
        fail(f"the loss diverged for the sixth time, at step {at.step}: lower LR={lr:g}, see {log}")
    broken, previous = copy.copy(guard), last.with_suffix(".prev.pt")
    if load_checkpoint(last)["step"] == run.returned_to and intact(previous):
        if run.world > 1:
            dist.barrier()
        if run.rank == 0:
            os.replace(previous, last)
        if run.world > 1:
            dist.barrier()
    saved = load_checkpoint(last, run.device)
    run.returned_to = saved["step"]
    restore(saved)
    guard.after_rollback(broken)
    if run.rank == 0:
        open_log(log, at.step)
        tqdm.write(f"diverged: back to step {at.step}, learning rate x {guard.lr_scale:g}")


# ---------------------------------------------------------------- logs and artifacts
unwritten = set()  # logs whose last row was lost


def open_log(path, step):
    """log.csv ready to append: what a resumed run will write again (rows after `step`) and
    any half line go."""
    if path.exists():
        lines = path.read_text(errors="replace").split("\n")[:-1]  # after the last newline: half a line
        kept = [line for i, line in enumerate(lines) if i == 0 or line.split(",")[0].isdigit()
                and int(line.split(",")[0]) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)


def log_row(path, **row):
    """Append one line to a CSV in one write, so a kill never leaves half of it; the first call writes the
    header. A full disk costs the row, never the run; it is said once."""
    line = ",".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n"
    try:
        with open(path, "ab", buffering=0) as f:
            size = f.tell()
            text = ((",".join(row) + "\n" if size == 0 else "") + line).encode()
            if f.write(text) < len(text):
                f.truncate(size)
                raise OSError("the disk is full")
        unwritten.discard(path)
    except OSError as error:
        if path not in unwritten:
            print(f"\n{path} not written ({error}); training goes on", flush=True)
        unwritten.add(path)


def read_log(path):
    """log.csv as a dict of float arrays."""
    header, *rows = [line.split(",") for line in path.read_text().split()]
    table = np.array(rows, dtype=float).reshape(len(rows), len(header))
    return dict(zip(header, table.T))


def save_artifact(folder, name, array, figure=None):
    """<folder>/<name>.npy is the data, <name>.png what a person sees of it (a matplotlib
    figure, closed here)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.save(Path(folder) / f"{name}.npy", np.asarray(array))
    if figure is not None:
        figure.savefig(Path(folder) / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)


def tile(pictures, title="", titles=None, rows=None, columns=None, cell=1.0):
    """A matplotlib figure of a table of pictures: (R, N, H, W, 3) or (R, N, H, W), floats in [0, 1].
    titles: R x N strings above the tiles; rows, columns: names at the edges; cell: inches a tile."""
    r, n, h, w = pictures.shape[:4]
    gap = 0.2 if titles is not None else 0.04
    left, top = (0.95 if rows is not None else 0.1), 0.45 + (0.2 if columns is not None else 0)
    width, height = left + n * (cell + 0.06) + 0.1, top + r * (cell * h / w + gap) + 0.1
    figure = plt.figure(figsize=(width, height), facecolor="white")
    figure.text(0.1 / width, 1 - 0.25 / height, title, fontsize=9, va="center")
    for i in range(r):
        for j in range(n):
            x, y = left + j * (cell + 0.06), height - top - (i + 1) * (cell * h / w + gap)
            ax = figure.add_axes([x / width, y / height, cell / width, cell * h / w / height])
            ax.imshow(np.clip(pictures[i, j], 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.axis("off")
            if titles is not None:
                ax.set_title(titles[i][j], fontsize=6.5, pad=1.5)
            if i == 0 and columns is not None:
                figure.text((x + cell / 2) / width, 1 - (top - 0.1) / height, columns[j], size=7, ha="center")
        if rows is not None:
            middle = (y + cell * h / w / 2) / height
            figure.text((left - 0.08) / width, middle, rows[i], size=8, ha="right", va="center")
    return figure


def save_metrics(run, folder, metrics, **facts):
    """metrics.json in the epoch folder and, with facts of the whole run, in the run folder. metrics: name ->
    dict with value, floor (trivial predictor), ceiling (real held-out data), better, n; None where
    one does not apply or is not finite, for which JSON has no word."""
    def known(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    order = ("value", "floor", "ceiling", "better", "n")
    table = {k: {o: known(m.get(o)) for o in order} for k, m in metrics.items()}
    text = json.dumps(table, indent=1)
    (Path(folder) / "metrics.json").write_text(text)
    if run is not None:
        facts = {k: known(v) for k, v in facts.items()}
        facts |= dict(device=str(run.device), threads=torch.get_num_threads(), world=run.world)
        (run.folder / "metrics.json").write_text(json.dumps({**table, **facts}, indent=1))


def open_tensorboard(folder):
    """A SummaryWriter in <run folder>/tensorboard, or None after one line when the optional
    package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TENSORBOARD=True needs the optional package tensorboard (pip install tensorboard)")
        return None
    return SummaryWriter(folder / "tensorboard")
