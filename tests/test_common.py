"""common.py with toy states: settings, checkpoints under every fault, the guard, logs. Rows and faults are
numbered as in the design notes. SLOW=1 adds a checkpoint of more than 4 GB."""
import argparse
import copy
import gc
import json
import math
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import Guard, guarded_step

RUN = SimpleNamespace(script="train_toy", settings={"LR": 0.1, "MULTS": (1, 2), "NAME": "a"})
CPU = torch.device("cpu")


def toy(step=0, size=4):
    return dict(step=step, w=torch.full((size, size), float(step)),
                nested=dict(a=[torch.arange(3), None], b="text"))


def forked(work):
    """Run work() in a child that never returns here; its process id."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        signal.alarm(20)
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return child


def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(capsys, call):
    """The one line of a call that must exit with code 2."""
    with pytest.raises(SystemExit) as end:
        call()
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("error: ") == 1
    return text


# ---------------------------------------------------------------- settings
def script(**more):
    return dict(__doc__="doc", LR=1e-3, EPOCHS=5, FILM=True, NAME="x", MULTS=(1, 2), RANGE=(0.2, 5.0),
                FLAGS=(True,), EXPERIMENT="", helper=print, EXPERIMENTS={
                    "big": dict(LR=0.5, EPOCHS=9), "like": dict(LIKE="big", EPOCHS=7)}, **more)


@pytest.mark.parametrize("args, name, value", [
    ("LR=1e-4", "LR", 1e-4), ("LR=2", "LR", 2.0), ("--lr 1e-4", "LR", 1e-4), ("--lr=1e-4", "LR", 1e-4),
    ("--lr -1", "LR", -1.0), ("--film", "FILM", True), ("--film False", "FILM", False),
    ("FILM=False", "FILM", False), ("MULTS=3", "MULTS", (3,)), ("MULTS=1,2,3", "MULTS", (1, 2, 3)),
    ("RANGE=0,1", "RANGE", (0, 1)), ("NAME=1e-4", "NAME", "1e-4"), ("NAME=", "NAME", ""),
    ("EXPERIMENT=big LR=0.1", "LR", 0.1), ("LR=0.1 EXPERIMENT=big", "LR", 0.1),
    ("EXPERIMENT=big", "EPOCHS", 9), ("EXPERIMENT=like", "EPOCHS", 7), ("EXPERIMENT=like", "LR", 0.5),
    ("EXPERIMENT=like LR=0.1", "LR", 0.1)])
def test_override(args, name, value):
    """Every spelling people type; single settings win over a row of EXPERIMENTS wherever they stand."""
    namespace = script()
    common.override(namespace, args.split())
    assert namespace[name] == value and type(namespace[name]) is type(value)


@pytest.mark.parametrize("args, text", [
    ("LRR=1", "did you mean LR"), ("lr=1", "unknown setting 'lr'"), ("EPOCHS=1.5", "EPOCHS is int"),
    ("EPOCHS=True", "EPOCHS is int"), ("EPOCHS=", "EPOCHS is int"), ("LR=fast", "LR is float"),
    ("LR=__import__('os')", "LR is float"), ("FILM=1", "FILM is bool"), ("MULTS=1,a", "MULTS is a tuple"),
    ("MULTS=1.5,2", "MULTS is a tuple"), ("FLAGS=1", "FLAGS is a tuple"), ("LR", "NAME=value"),
    ("--lr", "needs a value"), ("EXPERIMENT=none", "one of big, like"), ("helper=1", "unknown setting"),
    ("__doc__=1", "unknown setting")])
def test_override_refuses(args, text, capsys):
    """A wrong name lists every setting, a wrong type names the right one; no code runs; exit code 2."""
    namespace = script()
    before = dict(namespace)
    message = refused(capsys, lambda: common.override(namespace, args.split()))
    assert text in message and namespace == before
    assert "unknown setting" not in message or "  EPOCHS = 5" in message


# ---------------------------------------------------------------- checkpoints
def test_killed_saves_keep_an_acknowledged_file(tmp_path):
    """Row 1: kill -9 at 50 random moments of endless saves: what was reported as saved always loads."""
    random.seed(0)
    path, start = tmp_path / "last.pt", 0
    for _ in range(50):
        read, write = os.pipe()

        def work():
            os.close(read)
            for step in range(start + 1, start + 10**6):
                if common.save_checkpoint(path, RUN, **toy(step, 128)):
                    os.write(write, f"{step} ".encode())
        child = forked(work)
        os.close(write)
        acknowledged = os.read(read, 100)
        time.sleep(random.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        end_of(child)
        while more := os.read(read, 65536):
            acknowledged += more
        os.close(read)
        saved = common.load_checkpoint(path)
        assert saved["step"] >= int(acknowledged.split()[-1]) > start
        assert bool((saved["w"] == saved["step"]).all())
        start = saved["step"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("name, call", [("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 2)])
def test_killed_between_any_two_steps_of_a_save(tmp_path, name, call, damaged):
    """Row 1: a kill before each system call of a save, also over a damaged last.pt: an intact file stays."""
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, RUN, **toy(1))
    common.save_checkpoint(path, RUN, **toy(2))
    if damaged:
        path.write_bytes(path.read_bytes()[:-50])

    def work():
        old, count = getattr(os, name), iter(range(1, 100))
        setattr(os, name, lambda *a: os.kill(os.getpid(), 9) if next(count) == call else old(*a))
        common.save_checkpoint(path, RUN, **toy(3))
    code = end_of(forked(work))
    assert code == -9 or damaged and (name, call) == ("replace",
                                                      2)  # a damaged file is not kept: one rename less
    assert common.load_checkpoint(path)["step"] >= (1 if damaged else 2)


def test_damaged_file_never_replaces_the_good_one(tmp_path):
    """Row 1: last.pt goes bad on the disk; the next save leaves last.prev.pt alone."""
    path = tmp_path / "last.pt"
    for step in (1, 2):
        common.save_checkpoint(path, RUN, **toy(step))
    path.write_bytes(b"")
    common.save_checkpoint(path, RUN, **toy(3))
    assert common.load_checkpoint(path)["step"] == 3
    assert common.load_checkpoint(tmp_path / "last.prev.pt")["step"] == 1


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_flipped_bit_is_found(tmp_path, capsys):
    """Row 1: a flipped bit anywhere is found, or harmless, and said; torch.load alone would not notice."""
    path = tmp_path / "last.pt"
    for step in (1, 2):
        common.save_checkpoint(path, RUN, **toy(step))
    good, fallbacks = path.read_bytes(), 0
    silent = 0
    for place in range(0, len(good), 5):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        found = common.load_checkpoint(path)
        said = capsys.readouterr().err
        assert bool((found["w"] == found["step"]).all())
        assert found["step"] == 2 or "damaged" in said and "continuing from" in said
        fallbacks += found["step"] == 1
        try:
            raw = torch.load(path, weights_only=True)
            silent += not bool((raw["w"] == 2).all())
        except Exception:
            pass
    assert fallbacks > 100 and silent > 0


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path, keep, capsys):
    """Row 1: last.pt cut short or empty: the file before; with none left exit code 2, no silent new run."""
    path = tmp_path / "last.pt"
    for step in (1, 2):
        common.save_checkpoint(path, RUN, **toy(step))
    for file in (path, tmp_path / "last.prev.pt"):
        content = file.read_bytes()
        file.write_bytes(content[:keep if isinstance(keep, int) else int(keep * len(content))])
        if file == path:
            assert common.load_checkpoint(path)["step"] == 1
            assert "last.pt is damaged" in capsys.readouterr().err
    assert "no intact checkpoint" in refused(capsys, lambda: common.load_checkpoint(path, missing_ok=True))
    (tmp_path / "last.prev.pt").unlink(), path.unlink()
    assert common.load_checkpoint(path, missing_ok=True) is None
    assert "does not exist" in refused(capsys, lambda: common.load_checkpoint(path))


def bad_saves():
    def short(value, f, old=torch.save):
        old(value, f)
        f.truncate(f.tell() // 2)

    def flipped(value, f, old=torch.save):  # what torch.load would not notice
        old(value, f)
        f.flush()
        with open(f.name, "r+b") as again:
            content = again.read()
            again.seek(content.index(np.float32([2, 2, 2]).tobytes()) + 1)
            again.write(b"\x7f")

    def breaks(value, f):
        f.write(b"half")
        raise RuntimeError("")

    def full(value, f):
        raise OSError(28, "No space left on device")
    return dict(short=short, flipped=flipped, breaks=breaks, full=full)


@pytest.mark.parametrize("kind", bad_saves())
def test_a_failing_save_keeps_the_last_file(tmp_path, kind, monkeypatch, capsys):
    """Rows 1 and 2: a write that stops half way, lies, raises, meets a full disk: one line, no stump."""
    path = tmp_path / "last.pt"
    assert common.save_checkpoint(path, RUN, **toy(1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", bad_saves()[kind])
        assert not common.save_checkpoint(path, RUN, **toy(2))
    assert "last.pt not written" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and common.load_checkpoint(path)["step"] == 1
    assert common.save_checkpoint(path, RUN, **toy(3)) and common.load_checkpoint(path)["step"] == 3


def test_file_size_limit(tmp_path):
    """Row 2: the real EFBIG of the system; the next save after the limit is gone works."""
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, RUN, **toy(1))

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
        assert not common.save_checkpoint(path, RUN, **toy(2, 200))
        assert not (tmp_path / "last.tmp").exists() and common.load_checkpoint(path)["step"] == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert common.save_checkpoint(path, RUN, **toy(3, 200))
    assert end_of(forked(work)) == 0
    assert common.load_checkpoint(path)["step"] == 3


@pytest.mark.parametrize("value",
                         [np.float64(1), np.random.get_state(), Path("x"), argparse.Namespace(a=1), print,
                                   lambda: 0, torch.tensor(math.nan), [{"a": torch.tensor([1.0, math.inf])}]])
def test_only_finite_tensors_and_plain_values_are_saved(tmp_path, value):
    """Row 3 and fault 15: what could not be loaded again, or holds NaN, is never written over a good file."""
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, RUN, **toy(1))
    assert not common.save_checkpoint(path, RUN, **toy(2), extra=value)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and common.load_checkpoint(path)["step"] == 1


def test_pickle_that_runs_code_is_refused(tmp_path, capsys):
    """Row 3: refused with exit code 2, its code does not run; and no fallback hides it."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    path = tmp_path / "last.pt"
    common.save_checkpoint(tmp_path / "last.prev.pt", RUN, **toy(1))
    torch.save(dict(format=1, script="train_toy", settings={}, w=Evil()), path)
    assert "more than tensors" in refused(capsys, lambda: common.load_checkpoint(path))
    assert not (tmp_path / "owned").exists()


def test_foreign_files_are_refused(tmp_path, capsys):
    """Row 3: a bare state_dict, another format, a missing key: one line and exit code 2."""
    path = tmp_path / "last.pt"
    torch.save(toy(), path)
    assert "not a checkpoint" in refused(capsys, lambda: common.load_checkpoint(path))
    torch.save(dict(format=common.FORMAT + 1, script="s", settings={}), path)
    assert "update the code" in refused(capsys, lambda: common.load_checkpoint(path))
    torch.save(dict(format=common.FORMAT, script="s", settings={}), path)
    assert "no 'model'" in refused(capsys, lambda: common.load_checkpoint(path)["model"])


def test_load_strictly(capsys):
    """Row 8: a weight that is missing, left over or of another shape is named; the module stays as it was."""
    net = torch.nn.Linear(2, 3)
    state = net.state_dict()
    before = copy.deepcopy(state)
    for bad, text in ((dict(bias=state["bias"]), "missing weight"),
                      (dict(state, more=torch.zeros(1)), "left over more"),
                      (dict(state, bias=torch.zeros(4)), "bias is (4,), expected (3,)")):
        assert text in refused(capsys, lambda: common.load_strictly(net, bad, "file"))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="writes 4.3 GB; SLOW=1 runs it")
def test_more_than_four_gigabytes(tmp_path):
    """Row 1: Linux write(2) stops at 2,147,479,552 bytes; a larger file comes back whole."""
    w = torch.zeros(4_300_000_000, dtype=torch.uint8)
    w[-1] = 7
    assert common.save_checkpoint(tmp_path / "last.pt", RUN, w=w)
    assert torch.equal(common.load_checkpoint(tmp_path / "last.pt")["w"], w)


# ---------------------------------------------------------------- run folders
def begin(tmp_path, monkeypatch, **more):
    """start() of a toy script, on the CPU, without touching the signals of the tests."""
    monkeypatch.setattr(common, "catch_signals", lambda run: None)
    monkeypatch.setattr(common, "pick_device", lambda: CPU)
    monkeypatch.setattr(sys, "stdout", sys.stdout), monkeypatch.setattr(sys, "stderr", sys.stderr)
    file = tmp_path / "train_toy.py"
    file.write_text("LR = 0.1")
    return common.start(str(file),
                        dict(LR=0.1, EPOCHS=2, SEED=0, OUT=str(tmp_path / "runs"), RESUME=True) | more,
                        free=("EPOCHS",))


def end(run):
    run.keep.pop().close()


def test_run_folder(tmp_path, monkeypatch, capsys):
    """Faults 8 and 10: stray files go, a free setting may differ, another is named, nothing written."""
    run = begin(tmp_path, monkeypatch)
    assert run.checkpoint is None
    common.save_checkpoint(run.folder / "last.pt", run, **toy(1))
    (run.folder / "last.tmp").write_text("half")
    end(run)
    run = begin(tmp_path, monkeypatch, EPOCHS=3)
    assert run.checkpoint["step"] == 1 and not (run.folder / "last.tmp").exists()
    end(run)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.iterdir()}
    capsys.readouterr()
    assert "LR: 0.1 there, 0.2 now" in refused(capsys, lambda: begin(tmp_path, monkeypatch, LR=0.2))
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.iterdir()}
    gc.collect()  # the traceback held the frames of the start() that failed, and with them its lock
    run = begin(tmp_path, monkeypatch, LR=0.2, RESUME=False)
    assert run.checkpoint is None and [p.name for p in run.folder.glob("*.pt")] == []
    aside = [p for p in run.folder.parent.iterdir() if p.is_dir() and p != run.folder]
    assert len(aside) == 1 and (aside[0] / "last.pt").exists()
    book = (run.folder.parent / "toy.CHANGES.md").read_text()
    assert "LR: 0.1 -> 0.2" in book and "EPOCHS: 2 -> 3" in book
    end(run)


def test_lock(tmp_path):
    """Fault 18: the second process is refused; kill -9 of the owner frees the folder."""
    read, write = os.pipe()

    def work():
        common.take_lock(run, tmp_path / "lock")
        os.write(write, b"x")
        time.sleep(60)
    run = SimpleNamespace(folder="f", keep=[])
    child = forked(work)
    os.read(read, 1)
    with pytest.raises(SystemExit):
        common.take_lock(run, tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == f"pid {child}" and not run.keep
    os.kill(child, 9)
    end_of(child)
    common.take_lock(run, tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == f"pid {os.getpid()}"


def test_evaluation_leaves_no_trace():
    """Row 11: whatever an evaluation seeds, the global generator comes back; a full disk ends no run."""
    run = common.Run("s", {}, Path(), CPU, 0, 1, None)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with run.evaluation():
        torch.manual_seed(0), torch.rand(5)
        assert run.interruptible
        raise OSError(28, "No space left on device")
    assert torch.equal(torch.rand(2), expected) and not run.interruptible
    with pytest.raises(ValueError):
        with run.evaluation():
            raise ValueError("a bug is not hidden")
    with run.evaluation():
        try:
            raise common.Interrupted
        except Exception:
            pytest.fail("a broad except must not swallow a signal")


def test_a_full_disk_below_stdout_ends_nothing(tmp_path):
    """Row 2: `python train_x.py > train.txt` on a full disk: printing is lost, the run goes on."""
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        unbreakable = common.Unbreakable(open(tmp_path / "train.txt", "w"))
        print("a line of more than ten bytes", file=unbreakable, flush=True)
        assert not unbreakable.isatty()
    assert end_of(forked(work)) == 0


# ---------------------------------------------------------------- training
def test_lr_at():
    """Row 12: linear warm-up to the peak, cosine to zero at the last optimizer step."""
    lr = [common.lr_at(i, 100, 2.0, warmup=0.1) for i in range(101)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == lr[10] == 2.0 and lr[55] == pytest.approx(1.0)
    assert lr[100] == pytest.approx(0) and lr[99] < 0.001 and all(a >= b for a, b in zip(lr[10:], lr[11:]))
    assert common.lr_at(0, 1, 2.0) == 2.0


def test_ema_update():
    """After n updates towards 1: 1 - prod d_i, d_i = min(decay, (1 + i)/(10 + i)); buffers are copied."""
    model, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(ema.weight)
    model.running_mean.fill_(5)
    left = 1.0
    for i in range(200):
        common.ema_update(ema, model, 0.9, i)
        left *= min(0.9, (1 + i) / (10 + i))
        torch.testing.assert_close(ema.weight.detach(), torch.full((2,), 1 - left))
    assert ema.running_mean[0] == 5


def test_seed_of():
    """The same number on every machine and version: resumed runs depend on it."""
    assert common.seed_of(0, "step", 17) == common.seed_of(0, "step", 17) != common.seed_of(0, "step", 18)
    assert common.seed_of(0, "step", 17) == 9168107782540815465
    assert 0 <= common.seed_of("a") < 2**63


def quadratic(seed=0):
    """A network of one layer, its optimizer after some steps, and a function that gives it gradients."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99))

    def backward(scale=1.0):
        x = torch.randn(16, 8)
        loss = scale * (net(x) - x).square().mean()
        loss.backward()
        return float(loss.detach())
    return net, optimizer, backward


@pytest.mark.parametrize("fault", ["nan loss", "inf in one gradient", "1000 times the batch"])
def test_bad_step_changes_nothing(fault):
    """Faults 11 to 13, row 5: weights and optimizer keep every bit, the step is counted, the next goes on."""
    net, optimizer, backward = quadratic()
    guard = Guard()
    for _ in range(40):
        loss = backward()
        assert guarded_step(optimizer, net.parameters(), guard, loss, 1.0)[1]
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    average = guard.average
    loss = backward(1000.0 if "1000" in fault else math.nan if "loss" in fault else 1.0)
    if "inf" in fault:
        net.bias.grad[0] = math.inf
    norm, taken = guarded_step(optimizer, net.parameters(), guard, loss, 1.0)
    assert not taken and guard.skipped == guard.in_a_row == 1 and not guard.healthy
    after = [net.state_dict(), optimizer.state_dict()]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    for k, slot in before[1]["state"].items():
        assert all(torch.equal(slot[name], after[1]["state"][k][name]) for name in slot)
    assert math.isfinite(guard.average) and guard.average <= (0.95 + 0.05 * 5) * average * 1.0001
    assert all(p.grad is None for p in net.parameters())
    assert guarded_step(optimizer, net.parameters(), guard, backward(), 1.0)[1] and guard.in_a_row == 0


def test_without_the_guard_one_inf_destroys_the_weights():
    """Fault 12, the old behaviour: clipping turns one infinite gradient into NaN, and the weight with it."""
    net, optimizer, backward = quadratic()
    backward()
    net.bias.grad[0] = math.inf
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    assert not common.all_finite(net.state_dict())


@pytest.mark.parametrize("rise", [6, 30, 1000])
def test_lasting_rise_is_accepted_in_the_computed_time(rise):
    """Row 5: after a lasting R-fold rise of the norm, steps resume after ln(R/factor)/ln(1+(1-b)(factor-1))
    refusals; an average moved by accepted steps alone would refuse for ever."""
    guard = Guard(patience=100)
    for _ in range(100):
        assert guard.accepts(1.0, 1.0)
    refusals = 0
    while refusals < 300 and not guard.accepts(float(rise), 1.0):
        refusals += 1
    assert refusals == math.ceil(math.log(rise / 5) / math.log(1 + 0.05 * 4))
    assert all(guard.accepts(float(rise), 1.0) for _ in range(100)) and not guard.lost


def test_guard_starts_with_any_norm_and_never_holds_nan():
    """Row 5: NaN first, a large norm among the first steps, NaN now and then: no NaN enters the averages."""
    guard = Guard()
    for norm, loss in ((math.nan, 1.0), (math.inf, math.nan), (50.0, 9.0), (1.0, 1.0), (1.0, math.nan),
                       (math.nan, 1.0), (1.0, 1.0)):
        guard.accepts(norm, loss)
        assert all(math.isfinite(v) for k, v in vars(guard).items() if k != "lowest")
    assert guard.skipped == 4 and guard.in_a_row == 0 and guard.seen == 3
    assert common.all_finite(vars(guard)) and Guard(**vars(guard)) == guard


@pytest.mark.parametrize("loss, norm, lost",
                         [(math.nan, 1.0, True), (1.0, math.nan, True), (3.0, 1.0, True), (1.5, 1.0, False)])
def test_lasting_damage_is_noticed(loss, norm, lost):
    """Row 6, fault 14: a lasting NaN, or a loss of twice its lowest average, means going back; noise not."""
    random.seed(0)
    guard = Guard()
    for _ in range(300):
        guard.accepts(1.0, random.uniform(0.6, 1.4))
        assert not guard.lost
    good, steps = copy.copy(guard), 0
    while not guard.lost and steps < 300:
        guard.accepts(norm, loss)
        steps += 1
    assert guard.lost == lost and (not lost or 50 < steps < 200)
    if lost:
        good.after_rollback(guard)
        assert good.rollbacks == 1 and good.lr_scale == 0.5 and good.skipped == guard.skipped
        for _ in range(50):
            assert not good.healthy  # nothing is saved until the state has shown that it was good
            good.accepts(1.0, 1.0)
        assert good.healthy
        again = copy.copy(good)
        again.after_rollback(good)
        assert again.rollbacks == 2 and again.lr_scale == 0.25


def test_rollback_leaves_a_broken_state(tmp_path, monkeypatch):
    """A state saved between a blow-up and the guard that sees it: the second rollback goes one save further,
    and the broken state is gone; a rollback after a new save trusts the newest again."""
    run = begin(tmp_path, monkeypatch)
    at, guard, weight = SimpleNamespace(step=0), Guard(), torch.zeros(1)

    def save(step, value):
        common.save_checkpoint(run.folder / "last.pt", run, step=step, weight=torch.tensor([value]))

    def restore(saved):
        at.step = saved["step"]
        weight.copy_(saved["weight"])

    save(10, 1.0)
    save(20, 1e30)
    save(20, 1e30)  # as around a report: the same step twice pushes nothing out
    common.roll_back(run, guard, restore, at, 1e-3)
    assert at.step == 20 and guard.rollbacks == 1
    common.roll_back(run, guard, restore, at, 1e-3)
    assert at.step == 10 and float(weight) == 1 and guard.lr_scale == 0.25
    assert common.load_checkpoint(run.folder / "last.pt")["step"] == 10
    save(30, 3.0)
    common.roll_back(run, guard, restore, at, 1e-3)
    assert at.step == 30 and float(weight) == 3
    end(run)


# ---------------------------------------------------------------- Muon
def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_orthogonalise_brings_singular_values_near_one():
    for shape in ((512, 128), (128, 512), (64, 64)):
        for seed in range(3):
            g = randn(*shape, seed=seed) * (1e-4 if seed else 1.0)
            s = torch.linalg.svdvals(common.orthogonalise(g[None])[0])
            low = 0.6 if shape[0] != shape[1] else 0.0  # a square Gaussian matrix has singular values near 0
            assert low <= float(s.min()) and float(s.max()) <= 1.2, (shape, s.min(), s.max())
            u, _, v = torch.linalg.svd(g, full_matrices=False)
            assert float((common.orthogonalise(g[None])[0] * (u @ v)).sum() / min(shape)) > 0.8
    assert not common.orthogonalise(torch.zeros(2, 4, 4)).any()


def walk(optimizer, shapes, steps=6):
    """Parameters after some steps on the same drawn gradients."""
    params = [torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    opt = optimizer(params)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=100 * step + i)
        opt.step()
    return [p.detach() for p in params]


SHAPES = ((96, 32), (32, 96), (96, 32), (48, 48), (96, 32))


def test_muon_is_torchs():
    start = [randn(*s, seed=i) for i, s in enumerate(SHAPES)]
    ours = walk(lambda ps: common.Muon([dict(params=ps, lr=0.02)], 0.1), SHAPES)
    theirs = walk(lambda ps: torch.optim.Muon(ps, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True), SHAPES)
    for a, b, c in zip(start, ours, theirs):
        assert float((b - c).norm() / (c - a).norm()) < 0.03  # theirs rounds to bf16
        assert float((b - a).norm()) > 0.1
    wrong = walk(lambda ps: common.Muon([dict(params=ps, lr=0.02)], 0.1, momentum=0.5), SHAPES)
    assert max(float((b - c).norm() / (c - a).norm()) for a, b, c in zip(start, wrong, theirs)) > 0.1


def test_muon_batched_is_muon_one_by_one():
    """Matrices of a shape go through one product; every group keeps its own learning rate."""
    rates = (0.02, 0.01, 0.005, 0.02, 0.04)
    together = walk(lambda ps: common.Muon([dict(params=[p], lr=r) for p, r in zip(ps, rates)], 0.1), SHAPES)

    class Alone:
        def __init__(self, ps):
            self.each = [common.Muon([dict(params=[p], lr=r)], 0.1) for p, r in zip(ps, rates)]

        def step(self):
            for opt in self.each:
                opt.step()
    for a, b in zip(together, walk(Alone, SHAPES)):
        assert (a - b).abs().max() < 1e-5
    mixed = walk(lambda ps: common.Muon([dict(params=ps, lr=0.02)], 0.1), SHAPES)
    assert (mixed[2] - together[2]).abs().max() > 1e-3


# ---------------------------------------------------------------- logs
def test_log(tmp_path):
    """Fault 19: rows after the checkpoint, half lines, what a power cut leaves: gone; the rest stays."""
    path = tmp_path / "log.csv"
    common.open_log(path, 0)
    for step in range(1, 6):
        common.log_row(path, step=step, loss=1 / step)
    whole = path.read_text()
    assert whole.startswith("step,loss\n1,1\n2,0.5\n3,0.33333333\n")
    with open(path, "ab") as f:
        f.write(b"\0\0\0\xff\n6,0.1")
    common.open_log(path, 3)
    assert path.read_text() == "".join(line + "\n" for line in whole.split("\n")[:4])
    common.log_row(path, step=4, loss=0.25)
    assert common.read_log(path)["step"].tolist() == [1, 2, 3, 4]


def test_log_on_a_full_disk(tmp_path):
    """Row 2: rows that do not fit are lost with one line, never halved, and the run goes on."""
    path = tmp_path / "log.csv"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (61, resource.RLIM_INFINITY))
        for step in range(1, 30):
            common.log_row(path, step=step, loss=0.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        common.log_row(path, step=30, loss=0.5)
    assert end_of(forked(work)) == 0
    steps = common.read_log(path)["step"].tolist()
    assert steps == [*range(1, len(steps)), 30] and len(steps) > 5


def test_metrics_json(tmp_path):
    """No number stands alone: value, floor, ceiling, direction and count, and facts of the run."""
    run = common.Run("s", {}, tmp_path, CPU, 0, 1, None)
    (tmp_path / "epoch").mkdir()
    common.save_metrics(run, tmp_path / "epoch", {"a": dict(value=1.0, floor=0.0, better="higher")},
                        seconds=3.0)
    row = dict(value=1.0, floor=0.0, ceiling=None, better="higher", n=None)
    assert json.loads((tmp_path / "epoch" / "metrics.json").read_text()) == {"a": row}
    assert json.loads((tmp_path / "metrics.json").read_text())["a"] == row
