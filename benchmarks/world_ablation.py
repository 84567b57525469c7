"""
What makes the dreams of train_world_model.py hold: each choice of the method taken back, on the drawn game.

    Each row changes one thing and trains a small network for the same number of steps, with three seeds; then
    48 rollouts of 32 frames from 16 true ones, four calls of the network a frame. The rows are what the lab
    notes did or asked, and what the paper (Hafner 2025) credits.

    python benchmarks/world_ablation.py
    python benchmarks/world_ablation.py --steps 600 --only "as it is,noise" --seeds 0 --out runs/quick

What a row and a seed gave is kept in --out, so the same command goes on where it was stopped, and two with
other --seeds can share the work. Delete that folder to begin anew.

Columns, means over the seeds +- their standard deviation: PSNR of frames 1 and 8 beside that of copying the
last true frame (the line above the table), of the pixels that changed, share of frames whose agent obeys,
of balls found at frame 8, and sharpness (variance of the Laplacian, 1 = as the truth). Writes table.md,
table.npy (rows, seeds, numbers) and table.png when all of its rows and seeds are there.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import train_world_model as wm
from data import game

SMALL = dict(DIM=48, TRAIN=256, TEST=48, HORIZON=32, SAMPLES=48)
ROWS = {
    "as it is": {},
    "same noise for all frames (notes, first)": dict(NOISE="same", ROLL=0.0),
    "noise 0.1, then rising (notes, mended)": dict(NOISE="context", ROLL=0.0),
    "noise rising with time": dict(NOISE="pyramid", ROLL=0.0),
    "independent noise alone": dict(ROLL=0.0),
    "ramp towards noise (notes)": dict(RAMP="noise"),
    "no ramp": dict(RAMP="none"),
    "loss of velocities": dict(LOSS="v"),
    "no shortcut": dict(SHORTCUT=False),
    "short windows alone": dict(LONG_RATIO=0.0),
    "context clean": dict(TAU_CTX=0.0),
    "context noised, not stated": dict(CTX_STATED=False),
}
SAME_NETWORK = {"context clean", "context noised, not stated"}  # "as it is", asked in another way
NUMBERS = ("psnr_h1", "psnr_h8", "changed_h8", "obey", "ball_h8", "sharpness")


def train(data, tokenizer, steps):
    """The averaged network after so many steps under the settings of now."""
    torch.manual_seed(wm.SEED)
    model = wm.build_model(data, tokenizer)
    ema, guard = copy.deepcopy(model).eval().requires_grad_(False), common.Guard()
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"))
    optimizer = wm.build_optimizer(model, wm.LR)
    for step in range(steps):
        wm.train_step(model, model, ema, optimizer, guard, data, tokenizer, step, steps, run)
    return ema


def measure(model, data, tokenizer, ref):
    """NUMBERS of rollouts under the settings of now."""
    n, C = len(ref.at), wm.CONTEXT
    z = wm.to_latents(tokenizer, ref.frames[:, :C], "cpu")
    dream = wm.to_frames(tokenizer, wm.rollout(model, z, ref.actions, list(range(n))))
    quality = wm.quality(ref.truth, dream, ref.last)
    states = SimpleNamespace(**{k: v[:n, :C + wm.HORIZON] for k, v in vars(data.test.states).items()})
    exact = game.scores(np.concatenate([ref.frames[:, :C], dream], 1), states, ref.actions.numpy(), C)
    return [quality["psnr"][0], quality["psnr"][7], quality["changed"][7], exact.mean["obey"],
            exact.horizon["ball_found"][7], quality["sharpness"][7]]


def table(rows):
    """Rows, a dict of arrays (seeds, numbers), in markdown."""
    lines = ["| row | PSNR h=1 | h=8 | changed pixels h=8 | obeys | ball found h=8 | sharpness |",
             "|---|---|---|---|---|---|---|"]
    for name, found in rows.items():
        mean, std = np.mean(found, 0), np.std(found, 0, ddof=1 if len(found) > 1 else 0)
        cells = [f"{m:.{d}f} +- {s:.{d}f}" for m, s, d in zip(mean, std, (1, 1, 1, 2, 2, 2))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(rows):
    """PSNR at frame 8, obedience and balls found of each row as bars."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.32 * len(rows) + 1), layout="constrained", sharey=True)
    place = np.arange(len(rows))
    for ax, k, title in zip(axes, (1, 3, 4), ("PSNR of frame 8, dB", "agent obeys", "ball found at frame 8")):
        values = np.array([np.asarray(found)[:, k] for found in rows.values()])
        ax.barh(place, values.mean(1), xerr=values.std(1), color="0.7")
        ax.plot(values, np.repeat(place[:, None], values.shape[1], 1), "k.", ms=3)
        ax.set_title(title, fontsize=9)
    axes[0].set(yticks=place, yticklabels=rows)
    axes[0].invert_yaxis()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of every row")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--only", default="", help="beginnings of rows' names, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/world_ablation"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("settings", nargs="*", metavar="NAME=value", help="of the script, for every row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vars(wm).update(SMALL)
    common.override(vars(wm), arguments.settings)
    wm.check_settings()
    wanted = tuple(part.strip() for part in arguments.only.split(","))
    chosen = {name: changed for name, changed in ROWS.items() if name.startswith(wanted)}
    if not chosen:
        parser.error(f"--only {arguments.only!r}: no row begins so; there are {', '.join(ROWS)}")
    default, seeds = common.settings(vars(wm)), [int(part) for part in arguments.seeds.split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    same_work(arguments.out / "work.json", dict(default, steps=arguments.steps))
    data = wm.load_data()
    tokenizer, ref = wm.build_tokenizer(data).eval(), wm.reference(data)
    still = wm.quality(ref.truth, ref.rows["copy the last frame"], ref.last)
    print(f"copying the last frame: PSNR {still['psnr'][0]:.1f} (h=1), {still['psnr'][7]:.1f} (h=8), changed "
          f"{still['changed'][7]:.1f}", flush=True)

    def path(name, seed):
        return arguments.out / f"row_{list(ROWS).index(name):02d}_seed_{seed}.npy"
    for seed in seeds:
        networks = {}
        for name, changed in chosen.items():
            if not path(name, seed).exists():
                key = "as it is" if name in SAME_NETWORK else name
                if key not in networks:
                    vars(wm).update({**default, "SEED": seed, **ROWS[key]})
                    networks[key] = train(data, tokenizer, arguments.steps)
                vars(wm).update({**default, "SEED": seed, **changed})
                np.save(path(name, seed), measure(networks[key], data, tokenizer, ref))
            print(f"seed {seed} " + table({name: [np.load(path(name, seed))]}).splitlines()[-1], flush=True)
    rows = {name: [np.load(path(name, seed)) for seed in seeds] for name in chosen}
    (arguments.out / "table.md").write_text(table(rows) + "\n")
    common.save_artifact(arguments.out, "table", np.array(list(rows.values())), drawn(rows))
    print(table(rows))


def same_work(path, work):
    """Rows of other settings must not meet in one table."""
    work = json.loads(json.dumps(work))
    if path.exists() and json.loads(path.read_text()) != work:
        common.fail(f"{path.parent} holds rows of other settings: give another --out, or delete it")
    path.write_text(json.dumps(work))


if __name__ == "__main__":
    main()
