"""Whole runs of train_stl10.py with a fault in each; rows and faults are numbered as in the design notes."""
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from conftest import AT_CALL, TINY, log, state, torchrun

# A report draws 15 figures in seconds; most faults do not need them. This one draws a random number instead.
STUB = """
def stub(folder, model, *rest):
    folder.mkdir(parents=True, exist_ok=True)
    torch.rand(1)
    row = dict(value=1.0 - 0.1 * len(list(folder.parent.glob("epoch_*"))), floor=1.0, ceiling=None,
    better="lower", n=1)
    return {k: row for k in "val_loss class_accuracy frechet recall label_gain memorised".split()}
real_report, script.report = script.report, stub
""" + AT_CALL
EPOCHS = "EPOCHS=3"  # 30 training pictures: 7 steps an epoch, 21 in all


def difference(a, b, path="state"):
    """Where two nested states differ in any bit, or "" where they agree."""
    if torch.is_tensor(a):
        return "" if torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b) else path
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path}: keys"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}.{k}"))), "")
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{path}[{i}]"))), "")
    return "" if a == b else f"{path}: {a} {b}"


def same(run, other):
    """Two finished runs agree in every bit of their state and in every row of their log."""
    assert difference(state(run), state(other)) == ""
    assert log(run) == log(other)


@pytest.fixture(scope="module")
def unbroken(zygote, tiny, tmp_path_factory):
    """The folder of one run without a fault, without reports on the way, saved at its ends only."""
    run = launch_in(zygote, tiny, tmp_path_factory.mktemp("unbroken"))(EPOCHS, fault=STUB)
    assert run.code == 0, run.output
    assert len(log(run.folder)) == 21
    return run.folder


def launch_in(zygote, tiny, folder):
    from conftest import launch
    return launch.__wrapped__(zygote, tiny, folder)


# ---------------------------------------------------------------- the same bits after every kind of end
def test_killed_at_the_worst_moments_equals_unbroken(launch, unbroken):
    """Row 1: kill -9 in an epoch and inside two saves, then SIGTERM: resumed, the same bits."""
    at = [EPOCHS, "EVAL_EVERY=1"]  # saves after 7 and 14 steps
    run = launch(*at, fault=STUB + "at_call('draw_batch', 11, kill())")
    assert run.code == -signal.SIGKILL and state(run.folder)["step"] == 7 and len(log(run.folder)) == 10
    # renames: one of the log, one of the save at the start (the same step pushes nothing out), so call 4 is in
    # the middle of the second save
    run = launch(*at, fault=STUB + "at_call('replace', 4, kill(), os)")
    assert run.code == -signal.SIGKILL and not (run.folder / "last.pt").exists()
    run = launch(*at, "SAVE_SECONDS=0", fault=STUB + """
old = torch.save
def half(value, f):
    old(value, f)
    if value["step"] == 12:
        f.truncate(f.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half""")
    assert run.code == -signal.SIGKILL and "last.prev.pt" in run.output and (run.folder / "last.tmp").exists()
    run = launch(*at, fault=STUB + "at_call('draw_batch', 4, kill(signal.SIGTERM))")
    assert run.code == 143 and state(run.folder)["step"] == 15 and "continuing after step 11" in run.output
    assert not (run.folder / "last.tmp").exists()
    run = launch(*at, fault=STUB)
    assert run.code == 0, run.output
    same(run.folder, unbroken)


def test_monitoring_changes_nothing(launch, unbroken):
    """Row 11: a run with a real report after its first epoch and one without have the same bits."""
    run = launch(EPOCHS, "EVAL_EVERY=1", fault=STUB + """
def first(folder, *rest):
    torch.manual_seed(1), torch.rand(7)
    return (real_report if folder.name == "epoch_0001" else stub)(folder, *rest)
script.report = first""")
    assert run.code == 0, run.output
    assert (run.folder / "epoch_0001" / "grid.png").exists()
    assert state(run.folder)["step"] == 21 and common.load_checkpoint(run.folder / "last.pt")["best"] < 1
    same(run.folder, unbroken)


def test_signals(launch, unbroken):
    """Ctrl-C and SIGTERM save the finished step and exit with 130 / 143; a second one ends at once."""
    run = launch(EPOCHS, fault=STUB + "at_call('draw_batch', 6, kill(signal.SIGINT))")
    assert run.code == 130 and state(run.folder)["step"] == 6 and "Traceback" not in run.output
    run = launch(EPOCHS, fault=STUB + "at_call('draw_batch', 2, lambda: (kill(15)(), kill(15)()))")
    assert run.code == -signal.SIGTERM and state(run.folder)["step"] == 6
    # inside a report nothing changes, so it ends at once, and the next start draws the report again
    run = launch(EPOCHS, "EVAL_EVERY=1",
                 fault=STUB + "script.report = lambda *a: (kill(15)(), time.sleep(100))", limit=60)
    assert run.code == 143 and state(run.folder)["step"] == 7
    run = launch(EPOCHS, "EVAL_EVERY=1", fault=STUB)
    assert run.code == 0 and (run.folder / "epoch_0001").exists()
    same(run.folder, unbroken)


def test_damaged_last_falls_back(launch, unbroken):
    """Row 1: a flipped bit in last.pt: the file before is used, said so; both damaged: no silent new run."""
    run = launch(EPOCHS, "SAVE_SECONDS=0", fault=STUB + "at_call('draw_batch', 9, kill())")
    last = run.folder / "last.pt"
    flip(last)
    run = launch(EPOCHS, fault=STUB)
    assert run.code == 0 and "damaged" in run.output and "continuing after step 7 " in run.output
    same(run.folder, unbroken)
    flip(last), flip(run.folder / "last.prev.pt")
    before = snapshot(run.folder)
    run = launch(EPOCHS, fault=STUB)
    assert run.code == 2 and "no intact checkpoint" in run.output and snapshot(run.folder) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != ".lock"}


def test_finished_run_goes_on(launch, unbroken):
    """A finished run with more EPOCHS continues; with the same or fewer it ends at once, unchanged."""
    shutil.copytree(unbroken, launch("EPOCHS=0").folder)
    for fewer in ("EPOCHS=3", "EPOCHS=2"):
        run = launch(fewer, fault=STUB + "at_call('draw_batch', 1, kill())")
        assert run.code == 0, run.output
        same(run.folder, unbroken)
    run = launch("EPOCHS=4", fault=STUB)
    assert run.code == 0 and state(run.folder)["step"] == 28
    assert "continuing after step 21 of 28" in run.output
    assert log(run.folder)[:21] == log(unbroken)


# ---------------------------------------------------------------- divergence
def test_lasting_nan_goes_back_and_recovers(launch):
    """Rows 5 and 6: a stretch of NaN losses: back to the last good state, half the LR, other batches."""
    run = launch("EPOCHS=6", "EVAL_EVERY=1", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=3)
old = script.loss_fn
def broken(model, *batch, **more):
    loss = old(model, *batch, **more)
    return loss * float("nan") if model.training and steps["now"] >= 16 and steps["attempt"] == 0 else loss
steps = {}
def draw(data, step, attempt=0, old=script.draw_batch):
    steps.update(now=step, attempt=attempt)
    return old(data, step, attempt)
script.loss_fn, script.draw_batch = broken, draw""")
    assert run.code == 0, run.output
    assert "diverged: back to step 14, learning rate x 0.5" in run.output
    guard = common.load_checkpoint(run.folder / "last.pt")["guard"]
    assert guard["rollbacks"] == 1 and guard["skipped"] == 4
    assert len(log(run.folder)) == 42


def test_divergence_for_ever_ends_with_a_line(launch):
    """Row 6: after five times back the run gives up with exit code 2 and keeps its last good file."""
    run = launch("EPOCHS=2", "LR=1e-3", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=1)
old = script.loss_fn
script.loss_fn = lambda model, *a, **k: old(model, *a, **k) * (float("nan") if model.training else 1)""")
    assert run.code == 2 and "sixth time" in run.output and run.output.count("diverged: back") == 5
    assert common.all_finite(state(run.folder)) and state(run.folder)["step"] == 0


def test_planted_divergence_goes_back_to_a_good_state(launch):
    """Row 6: weights blown up by an accepted step: back, and not to a state saved while diverging."""
    run = launch("EPOCHS=8", "EVAL_EVERY=1", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=10)
def step(handle, model, ema, optimizer, guard, data, at, *rest, old=script.train_step):
    result = old(handle, model, ema, optimizer, guard, data, at, *rest)
    if at == 30 and guard.rollbacks == 0:
        with torch.no_grad():
            model.out.weight.fill_(3.0) if hasattr(model, "out") else [p.mul_(8) for p in model.parameters()]
    return result
script.train_step = step""")
    assert run.code == 0, run.output
    back = [int(n) for n in re.findall(r"back to step (\d+)", run.output)]
    assert len(back) == 1 and 21 <= back[0] <= 30
    assert float(log(run.folder)[-1]["loss"]) < 1.5


def test_one_huge_batch_is_skipped(launch, unbroken):
    """Row 5: one batch of 1000 times the loss after the first 20 steps: one refused step, no rollback."""
    run = launch("EPOCHS=5", fault=STUB + """
def draw(data, step, attempt=0, old=script.draw_batch):
    x_0, labels, t, eps = old(data, step, attempt)
    return x_0, labels, t, eps * (1000 if step == 25 else 1)
script.draw_batch = draw""")
    assert run.code == 0 and "diverged" not in run.output
    rows = log(run.folder)
    assert [int(r["skipped"]) for r in rows] == [0] * 25 + [1] * 10
    assert float(rows[25]["loss"]) > 1000 and float(rows[-1]["loss"]) < 1.5


def test_mean_prediction_raises_the_alarm(launch):
    """Row 7: a network whose output is disconnected: every epoch says that it is no better than zero."""
    run = launch("EPOCHS=30", fault=STUB + """
def disconnected(model, x_0, labels, t, eps, **more):
    a, s = (c.to(x_0)[:, None, None, None] for c in script.schedule(t))
    anchor = 0 * sum(p.sum() for p in model.parameters())
    return (a * eps - s * x_0 + anchor).square().flatten(1).mean(1)
script.loss_fn = disconnected""")
    assert run.code == 0
    lines = [line for line in run.output.splitlines() if re.match(r"epoch +\d+  loss", line)]
    assert len(lines) == 30 and all("(zero 0." in line and "linear " in line for line in lines)
    assert [("ALARM" in line) for line in lines] == [7 * (i + 1) > 200 for i in range(30)]


# ---------------------------------------------------------------- the disk
def test_full_disk_costs_no_run(launch, unbroken):
    """Row 2: files may not grow any more from step 6, not even log and output from step 9, until step 11: a
    line for each save and report that is lost, and the run goes on to the same bits."""
    run = launch(EPOCHS, "EVAL_EVERY=1", "SAVE_SECONDS=0", fault=STUB + """
import resource
limit = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
for step, size in ((6, 20000), (9, 400), (11, resource.RLIM_INFINITY)):
    at_call("draw_batch", step, limit(size))
def report(folder, *rest):
    metrics = stub(folder, *rest)
    (folder / "grid.npy").write_bytes(bytes(30000))
    return metrics
script.report = report""")
    assert run.code == 0, run.output
    assert run.output.count("last.pt not written") >= 3 and run.output.count("report not written") == 1
    assert not list(run.folder.glob("*.tmp"))
    assert difference(state(run.folder), state(unbroken)) == ""
    kept = log(run.folder)
    assert [row for row in log(unbroken) if row["step"] not in ("9",
        "10")] == kept, "the lost rows alone, no half line"


def test_unwritable_folder(launch, tmp_path):
    """Fault 19: OUT below a file, and a run folder that cannot be written: one line, exit code 2."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        run = launch(f"OUT={out}", EPOCHS)
        assert run.code == 2 and "cannot write the run folder" in run.output and "Traceback" not in run.output
    (tmp_path / "runs" / "stl10" / "settings.json").mkdir(parents=True)
    run = launch(EPOCHS)
    assert run.code == 2 and "cannot write the run folder" in run.output and "Traceback" not in run.output


def test_two_runs_one_folder(launch, tmp_path):
    """The second process on a folder refuses and names the first; a dead owner's lock is taken over."""
    holder = common.Run("train_stl10", {}, tmp_path / "runs" / "stl10", torch.device("cpu"), 0, 1, None)
    (tmp_path / "runs").mkdir()
    common.take_lock(holder, tmp_path / "runs" / "stl10.lock")
    run = launch(EPOCHS)
    assert run.code == 2 and f"pid {os.getpid()}" in run.output and not (run.folder / "log.csv").exists()
    holder.keep.pop().close()
    (tmp_path / "runs" / "stl10.lock").write_text("pid 1")
    run = launch("EPOCHS=1", fault=STUB)
    assert run.code == 0, run.output


def test_clock_jumps_back(launch):
    """Fault 20: the wall clock jumps a day back at step 3: saves go on."""
    run = launch(EPOCHS, "SAVE_SECONDS=0", fault=STUB + """
def jump(now=time.time):
    time.time = lambda: now() - 86400
at_call("draw_batch", 3, jump)
at_call("draw_batch", 6, kill())""")
    assert run.code == -9 and state(run.folder)["step"] == 5


def test_save_that_raises_and_nan_weights(launch):
    """Faults 5 and 15: a save that writes half and raises, weights that are NaN: the last good file stays."""
    run = launch("EPOCHS=1", "SAVE_SECONDS=0", fault=STUB + """
old = torch.save
def half(value, f):
    if value["step"] in (2, 3):
        f.write(bytes(999))
        raise RuntimeError("planted")
    old(value, f)
torch.save = half
def poison(handle, model, *rest, old=script.train_step):
    result = old(handle, model, *rest)
    if rest[4] == 4:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    return result
script.train_step = poison""")
    assert run.output.count("RuntimeError: planted") == 2 and "NaN or infinity" in run.output
    assert state(run.folder)["step"] == 4 and common.all_finite(state(run.folder))


# ---------------------------------------------------------------- bad input
def test_evaluation_runs_before_training(launch):
    """Row 20: a broken evaluation shows before the first step, not after hours."""
    run = launch(EPOCHS, fault="script.evaluate = lambda *a: torch.zeros(2, 3) @ torch.zeros(2, 3)")
    assert run.code == 1 and "mat1" in run.output and not (run.folder / "log.csv").exists()


BAD = {"LRR=1": "did you mean LR", "LR=fast": "LR is float", "EPOCHS=1.5": "EPOCHS is int",
       "MULTS=1,a": "MULTS is a tuple",
       "MULTS=1.5,1": "MULTS is a tuple", "ATTENTION=1,0": "ATTENTION is a tuple", "epochs": "NAME=value",
       "--lr": "needs a value",
       "SIZE=18": "does not divide", "SIZE=20": "size 20 does not divide 96", "PATCH=0": "PATCH",
       "SOLVER=euler": "one of dpm++",
       "DATA=/nowhere": "the folder does not exist", "WIDTH=9": "divisible by 8", "MULTS=1,1,1": "ATTENTION",
       "INIT_FROM=/nowhere.pt": "does not exist"}


@pytest.mark.parametrize("setting", BAD)
def test_bad_setting(launch, setting):
    """Each mistake is one clear line and exit code 2, and makes no checkpoint."""
    run = launch(setting)
    assert run.code == 2 and BAD[setting] in run.output, run.output
    assert run.output.count("error: ") == 1 and "Traceback" not in run.output
    assert not list(run.folder.glob("*.pt"))


def test_bad_data(launch, tiny, tmp_path):
    """Missing and truncated binaries and labels out of range name the file and what was expected."""
    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny / "data", folder)
        change(folder)
        run = launch(f"DATA={folder}")
        assert run.code == 2 and run.output.count("error: ") == 1, run.output
        assert "Traceback" not in run.output
        assert not list(run.folder.glob("*.pt"))
        return run.output
    assert "test_X.bin: not found" in damaged("missing", lambda f: (f / "test_X.bin").unlink())
    assert "train_X.bin: expected" in damaged("short", lambda f: os.truncate(f / "train_X.bin", 10**6))
    assert "labels 1..10" in damaged("label", lambda f: (f / "train_y.bin").write_bytes(bytes([11] * 40)))


def test_bad_checkpoints(launch, unbroken):
    """Row 3: each unusable checkpoint is one line and exit code 2, and nothing is overwritten."""
    folder = launch("EPOCHS=0").folder
    shutil.copytree(unbroken, folder)
    good = torch.load(folder / "last.pt", weights_only=True)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'owned'}",)
    smaller = dict(good, model={k: v for i, (k, v) in enumerate(good["model"].items()) if i})
    cases = [(dict(good, script="train_lm"), "train_lm.py"), (smaller, "missing"),
             (dict(good, ema=Evil()), "more than tensors"),
             ({k: v for k, v in good.items() if k != "optimizer"}, "no 'optimizer'"),
             (dict(good, format=99), "format 99"),
             (dict(good, data="other"), "other data"), ([1, 2], "not a checkpoint"),
             (dict(good, optimizer={}), "optimizer"),
             (dict(good, settings=dict(good["settings"], WIDTH=16)), "WIDTH: 16 there, 8 now")]
    for content, text in cases:
        torch.save(content, folder / "last.pt")
        before = snapshot(folder)
        run = launch(EPOCHS, fault=STUB)
        assert run.code == 2 and text in run.output and "Traceback" not in run.output, (text, run.output)
        assert run.output.count("error: ") == 1
        assert {k: v for k, v in snapshot(folder).items() if k.suffix == ".pt"} == {
            k: v for k, v in before.items() if k.suffix == ".pt"}
    assert not (folder.parent / "owned").exists()
    last = str(folder / "last.pt")
    for content, text in ((dict(good, script="train_other"), "made by 'train_other'"),
                          (dict(good, ema=smaller["model"]), "missing"),
                          (dict(good, settings=dict(good["settings"], NEW=1)), "does not know"),
                          (cases[2][0], "more than tensors"),
                          ({k: v for k, v in good.items() if k != "ema"}, "no 'ema'")):
        torch.save(content, last)
        run = launch("--checkpoint", last, program="sample")
        assert run.code == 2 and text in run.output and "Traceback" not in run.output, (text, run.output)
        assert not (folder / "samples").exists()


# ---------------------------------------------------------------- two processes
def test_torchrun_matches_one_process(launch, tiny, tmp_path):
    """torchrun: two gloo processes give the losses of one, resume, and end together on an error."""
    fixed = ["DROPOUT=0.0", "EPOCHS=1"]
    one = launch(*fixed, fault=STUB)
    (tmp_path / "two" / "cache").mkdir(parents=True)
    shutil.copy(*tiny.glob("judge_*.pt"), tmp_path / "two" / "cache")
    job = (tmp_path, "import train_stl10 as script\n" + STUB, f"DATA={tiny / 'data'}",
           f"OUT={tmp_path / 'two'}", *TINY, *fixed)
    two = torchrun(*job)
    assert two.returncode == 0, two.stderr[-3000:]
    losses = [[float(row["loss"]) for row in log(folder)] for folder in (one.folder,
        tmp_path / "two" / "stl10")]
    assert len(losses[0]) == len(losses[1]) == 7
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    bad = torchrun(*job, "WIDTH=16")
    assert bad.returncode != 0 and "WIDTH: 8 there, 16 now" in bad.stderr
