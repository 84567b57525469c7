"""What all tests share: one thread, the repository on the path, tiny data, and runs of a whole script."""
import csv
import json
import os
import random
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # two processes with two threads each crawl
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)

TINY = ("SIZE=16 WIDTH=8 MULTS=1,1 ATTENTION=False,True BATCH_SIZE=4 STEPS=2 SAMPLES=10 SWEEP=1.0,2.0 "
        "PRECISION=fp32").split()  # an optimizer step in hundredths of a second, with dropout

TINY_LM = ("TOKENIZER=byte DIM=32 MU_DIM=32 HEADS=2 DEPTH=2 CONTEXT=16 BATCH_SIZE=4 TAU=8 GRAPH_WINDOW=2 GRAPH_K=2 "
           "SAMPLES=2 LENGTH=8 PRECISION=fp32").split()  # 200 optimizer steps a second

# The end of a fault: at_call(name, number, action) breaks off a run, kill() is an action.
AT_CALL = '''
def at_call(name, number, action, of=script):
    "Run `action` just before call `number` (from 1) of a function."
    old, count = getattr(of, name), iter(range(1, 10**9))
    def new(*a, **k):
        if next(count) == number:
            action()
        return old(*a, **k)
    setattr(of, name, new)
kill = lambda number=signal.SIGKILL: lambda: os.kill(os.getpid(), number)
'''

# One warm process imports the scripts; every run is a fork of it that may be killed, and costs no imports.
# Reads one job a line: script, settings, environment, output file, and code to run before main(): the fault.
ZYGOTE = """
import functools, json, os, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
import common, sample, train_lm, train_stl10
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # the first one imports half of torch
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.environ.update(job["environment"])
        code, sys.argv, script = 0, ["program", *job["arguments"]], sys.modules[job["script"]]
        try:
            exec(job["fault"], globals())
            if job["program"] == "sample":
                sample.main()
            else:
                common.override(vars(script))
                script.main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with data/ (40 + 20 drawn pictures) and the judge for them at 16 px, trained for 20 steps."""
    import train_stl10
    from data import stl10
    folder = tmp_path_factory.mktemp("tiny")
    stl10.make(folder / "data", train=40, test=20, unlabeled=2)
    pictures, labels = (torch.from_numpy(part) for part in stl10.load(folder / "data", "train", 16))
    data = SimpleNamespace(x=pictures, y=labels, names=stl10.class_names(folder / "data"),
                           hash=stl10.data_hash(folder / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stl10, "SIZE", 16)
        train_stl10.train_judge(data, folder, torch.device("cpu"), steps=20)
    return folder


@pytest.fixture(scope="session")
def zygote():
    """The warm process."""
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE,
                               env=dict(os.environ, CUDA_VISIBLE_DEVICES=""), bufsize=0)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def launch(zygote, tiny, tmp_path):
    """launch(*settings, fault="", out="runs") runs train_stl10.py on the tiny data and returns its code
    (negative: the signal that killed it), its output, and the folder of the run."""
    def run(*settings, fault="", out="runs", program="train", limit=120, **environment):
        home = tmp_path / out
        arguments = list(settings)
        if program == "train":
            (home / "cache").mkdir(parents=True, exist_ok=True)
            for judge in tiny.glob("judge_*.pt"):
                if not (home / "cache" / judge.name).exists():
                    os.link(judge, home / "cache" / judge.name)
            arguments = [f"DATA={tiny / 'data'}", f"OUT={home}", *TINY, *settings]
        return fork(zygote, tmp_path, home / "stl10", limit, arguments=arguments, environment=environment,
                    fault=fault, program=program, script="train_stl10")
    return run


def fork(zygote, tmp_path, folder, limit, **job):
    """One job of the warm process: its code, its output, and `folder`."""
    output = tmp_path / "output.txt"
    zygote.stdin.write(json.dumps(dict(job, output=str(output))).encode() + b"\n")
    child = int(zygote.stdout.readline())
    if not select.select([zygote.stdout], [], [], limit)[0]:
        os.kill(child, 9)
        zygote.stdout.readline()
        pytest.fail(f"no end after {limit} s:\n" + output.read_text()[-2000:])
    code = int(zygote.stdout.readline())
    return SimpleNamespace(code=code, folder=folder, output=output.read_text())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of train.txt, valid.txt and test.txt: 1,400, 800 and 400 characters of made-up sentences."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = "the a cat dog bird sees takes finds red old small tree house river and then when it".split()
    for name, size in (("train", 1400), ("valid", 800), ("test", 400)):
        lines = (" ".join(rng.choices(words, k=rng.randint(4, 9))).capitalize() + "." for _ in range(99))
        (folder / f"{name}.txt").write_text("\n".join(lines)[:size])
    return folder


@pytest.fixture
def launch_lm(zygote, corpus, tmp_path):
    """launch_lm(*settings, fault="", out="runs") runs train_lm.py on the tiny corpus, as launch does; folder is
    that of all its runs."""
    def run(*settings, fault="", out="runs", program="train", limit=120, **environment):
        home, arguments = tmp_path / out, list(settings)
        if program == "train":
            arguments = [f"DATA={corpus}", f"OUT={home}", *TINY_LM, *settings]
        return fork(zygote, tmp_path, home, limit, arguments=arguments, environment=environment, fault=fault,
                    program=program, script="train_lm")
    return run


def torchrun(tmp_path, code, *arguments):
    """Two gloo processes of one thread each run `code`, which imports a training script as `script`, and then
    its main() under these settings. The CompletedProcess."""
    runner = tmp_path / "runner.py"
    runner.write_text(f"import os, sys, signal, time\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, common\n"
                      f"torch.set_num_threads(1)\n{code}common.override(vars(script))\nscript.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*command, str(runner), *arguments], capture_output=True, text=True, timeout=180,
                          env=dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"))


def state(folder, name="last.pt"):
    """What a run holds, less the clock and what the reports said."""
    found = torch.load(folder / name, weights_only=True)
    return {k: v for k, v in found.items() if k not in ("seconds", "settings", "reported", "best", "best_step")}


def log(folder):
    """log.csv as rows of text, less the clock."""
    with open(folder / "log.csv") as f:
        clock = ("seconds", "samples_per_s", "tokens_per_s")
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(f)]


def refused(run, *parts):
    """A run ended in one clear line and exit code 2."""
    assert run.code == 2 and "Traceback" not in run.output and run.output.count("error: ") == 1, run.output
    assert all(part in run.output for part in parts), run.output
