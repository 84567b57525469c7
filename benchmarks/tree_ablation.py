"""
What makes the trees of train_voxel_d3pm.py whole: the lab notes' explanations, each given the same compute.

    The notes saw a second trunk and floating leaves at 99.8 % accuracy, and blamed a learning rate that was
    not slow enough, two residual blocks that "see 7 blocks", attention missing at one level, and too little
    dropout. Each row here changes one of these (or what we think matters) and trains for the same time: a
    network whose step takes twice as long gets half the steps. Schedule, warm-up, EMA are the script's own.

    python benchmarks/tree_ablation.py                          every row: half an hour on one core
    python benchmarks/tree_ablation.py --steps 300 --only "tuned,LR"    rows whose names begin so
    python benchmarks/tree_ablation.py --out runs/tree_ablation --samples 256

Columns: steps taken; loss, of held-out trees, the same draws of noise for all (blank where the task is
another); bits, of an oak given "oak" beyond its entropy of 13.585; SCS, valid and coverage of raw samples,
with the standard error of SCS. The last rows need no training: independent voxels, new draws of trees.
Writes table.md, table.npy and table.png. One seed, one run each: differences below three standard errors, and
whatever "tuned, another seed" differs by, are nothing.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import train_voxel_d3pm as d3pm
from data import trees

ROWS = {
    "tuned": {},
    "tuned, another seed": dict(SEED=1),
    "LR 2e-5 (notes, new)": dict(LR=2e-5),
    "LR 5e-5 (notes, old)": dict(LR=5e-5),
    "LR 3e-4": dict(LR=3e-4),
    "LR 3e-3": dict(LR=3e-3),
    "2 ResBlocks a level (notes, old)": dict(RES_BLOCKS=2),
    "3 ResBlocks a level (notes, new)": dict(RES_BLOCKS=3),
    "attention in the middle only": dict(ATTN_LEVELS=()),
    "attention at every level (notes, new)": dict(ATTN_LEVELS=(1, 2)),
    "dropout 0.1 (notes, old)": dict(DROPOUT=0.1),
    "dropout 0.15 (notes, new)": dict(DROPOUT=0.15),
    "all of the notes, old": dict(LR=5e-5, RES_BLOCKS=2, ATTN_LEVELS=(2,), DROPOUT=0.1),
    "all of the notes, new": dict(LR=2e-5, RES_BLOCKS=3, ATTN_LEVELS=(1, 2), DROPOUT=0.15),
    "trunk anywhere (jitter 4)": dict(JITTER=4),
    "no prior of each voxel": dict(PRIOR="class"),
    "loss: cross-entropy": dict(LOSS="ce"),
    "cross-entropy, another seed": dict(LOSS="ce", SEED=1),
    "uniform noise": dict(PROCESS="uniform"),
    "uniform noise, cross-entropy": dict(PROCESS="uniform", LOSS="ce"),
    "8 sampling steps": dict(STEPS=8),
    "a quarter of the time": dict(),
    "three times the time": dict(),
}
SHARE = {"a quarter of the time": 0.25, "three times the time": 3.0}


def stepper(data):
    """Of a new network: what takes optimizer step `step` of `total`, and the averaged weights."""
    d3pm.check_settings()
    torch.manual_seed(d3pm.SEED)
    model = d3pm.build_model(data)
    ema, guard = copy.deepcopy(model).eval().requires_grad_(False), common.Guard()
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), d3pm.LR, (0.9, d3pm.BETA2),
                                  weight_decay=d3pm.WEIGHT_DECAY, fused=True)

    def take(step, total):
        d3pm.train_step(model, model, ema, optimizer, guard, data, step, total, run)
    return take, ema


def speed(changed, rounds=5):
    """Steps that a row takes in the time of one tuned step: both take turns, the fastest of each counts."""
    if not changed.keys() - {"LR", "SEED", "STEPS"}:
        return 1.0
    times, takes = [[], []], [d3pm.under(c, lambda: stepper(d3pm.load_data())[0]) for c in ({}, changed)]
    for i in range(rounds):
        for take, settings, found in zip(takes, ({}, changed), times):
            clock = time.process_time()
            for step in range(3):
                d3pm.under(settings, take, 3 * i + step, 1000)
            found.append(time.process_time() - clock)
    return min(times[0]) / min(times[1])


@torch.no_grad()
def held_out(model, data, count=256):
    """Mean loss of test trees under LOSS=ce in nats a block, t and noise the same for every row."""
    total, g, words = 0.0, common.generator_of(0, "held out"), np.random.default_rng(0)
    part = data.test
    for i in range(0, count, 32):
        x_0 = d3pm.to_states(part.voxels[i:i + 32], data.box)
        t = torch.cos(math.pi / 2 * (torch.arange(len(x_0)) + 0.5) / len(x_0))
        x_t = d3pm.q_sample(x_0, t, data.pi, g)
        captions = d3pm.tokens([trees.caption(s, words) for s in part.slots[i:i + 32]])
        log_p = d3pm.posterior(model(x_t, t, captions), x_t, t, data.pi)
        total += float(-log_p.gather(-1, x_0[..., None]).sum()) / data.blocks
    return total / count


def row_of(voxels, test):
    """[scs, its standard error, valid, coverage] of trees (N, n, n, n) beside test trees."""
    parts, n = trees.scs(voxels), len(voxels)
    near = d3pm.neighbours(trees.statistics(test[:n]), trees.statistics(voxels))
    return [parts.scs.mean(), parts.scs.std() / n**0.5, parts.valid.mean(), near["coverage"]]


def measure(steps, samples):
    """[steps, loss, bits, scs, error, valid, coverage] after so many steps under the settings of now."""
    data = d3pm.load_data()
    take, model = stepper(data)
    for step in range(steps):
        take(step, steps)
    comparable = d3pm.PROCESS == "absorbing" and not d3pm.JITTER
    oaks = data.test.voxels[[i for i, kind in enumerate(data.test.kind) if kind == "oak"]]
    bits = d3pm.tree_bits(model, oaks, d3pm.tokens(["oak"]), 512, common.generator_of(0, "bits"))
    words = np.random.default_rng(1)
    captions = [trees.caption(s, words, 0.0) for s in data.fresh.slots[:samples]]
    x, _ = d3pm.sample_set(model, [common.seed_of(0, "sample", i) for i in range(samples)], captions)
    loss = held_out(model, data) if comparable else math.nan
    return [steps, loss, bits.mean() - d3pm.kind_entropy("oak"),
            *row_of(d3pm.to_voxels(x, model), data.test.voxels)]


def table(rows):
    """The rows, a dict of what measure() returns, in markdown."""
    lines = ["| row | steps | loss | oak: bits beyond its entropy | SCS | valid | coverage |",
             "|---|---|---|---|---|---|---|"]
    for name, (count, loss, bits, scs, error, valid, coverage) in rows.items():
        numbers = [f"{count:.0f}", f"{loss:.3f}", f"{bits:.2f}"]
        lines.append(f"| {name} | {' | '.join('' if n == 'nan' else n for n in numbers)} "
                     f"| {scs:.3f} +- {error:.3f} | {valid:.3f} | {coverage:.2f} |")
    return "\n".join(lines)


def drawn(rows):
    """SCS and valid of each row as bars."""
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    numbers, place = np.array(list(rows.values())), np.arange(len(rows))
    ax.barh(place + 0.2, numbers[:, 3], 0.38, xerr=numbers[:, 4], label="SCS", color="0.6")
    ax.barh(place - 0.2, numbers[:, 5], 0.38, label="valid", color="C2")
    ax.set(yticks=place, yticklabels=rows, xlim=(0, 1.02))
    ax.invert_yaxis()
    ax.legend(loc="lower right", fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the tuned row; others get its time")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--only", default="", help="beginnings of rows' names, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/tree_ablation"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("settings", nargs="*", metavar="NAME=value", help="of the script, for every row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common.override(vars(d3pm), arguments.settings)
    if "oak" not in d3pm.kinds() or not 8 <= arguments.samples <= d3pm.TEST // 2:
        common.fail(f"SPECIES={d3pm.SPECIES}: oak must be there; --samples {arguments.samples}: 8 to "
                    f"{d3pm.TEST // 2}, half of TEST")
    wanted = tuple(part.strip() for part in arguments.only.split(","))
    rows = {}
    for name, changed in ROWS.items():
        if name.startswith(wanted):
            steps = round(arguments.steps * speed(changed) * SHARE.get(name, 1))
            rows[name] = d3pm.under(changed, measure, steps, arguments.samples)
            print(table({name: rows[name]}).splitlines()[-1], flush=True)
    if not rows:
        parser.error(f"--only {arguments.only!r}: no row begins so; there are {', '.join(ROWS)}")
    d3pm.SAMPLES = arguments.samples
    reference = d3pm.reference(d3pm.load_data()).rows
    for name, known in (("independent voxels", "independent marginals"), ("new draws", "fresh draw")):
        found = reference[known]
        rows[name] = [0, math.nan, math.nan, found["scs"], 0, found["valid"], found["coverage"]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table(rows) + "\n")
    common.save_artifact(arguments.out, "table", np.array(list(rows.values())), drawn(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
