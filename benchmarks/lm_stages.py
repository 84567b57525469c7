"""
Is a stage of train_lm.py worth its parameters? Every stage beside a plain transformer of as many parameters.

    python benchmarks/lm_stages.py                      # stages 0 to 3 and their controls, 3 seeds
    python benchmarks/lm_stages.py --seeds 1 --rows "STAGE=0" "STAGE=0 OPT=adamw LR=3e-3 CLIP=1.0"
    python benchmarks/lm_stages.py DATA=shakespeare TOKENIZER=byte CONTEXT=64 BATCH_SIZE=12 MAX_STEPS=2000

All runs start from scratch (INIT_FROM=scratch) and see the same number of tokens of the same corpus, in the
same order for the same seed; the size is smaller than the default. A difference is claimed only beyond two
standard errors of the difference of the means. Arguments NAME=value go to every run. A finished run is not
repeated, so the command can be interrupted and given again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZE = "DIM=128 MU_DIM=128 HEADS=4 MLP_RATIO=4 BATCH_SIZE=8 EPOCHS=0 MAX_STEPS=800".split()
SIZE += "EVAL_EVERY=1000 SAMPLES=4".split()
ROWS = ("STAGE=control MATCH=0", "STAGE=0", "STAGE=control MATCH=3", "STAGE=1", "STAGE=2", "STAGE=3")
NUMBERS = ("bits_per_byte", "val_bits_per_byte_overlapping", "token_ppl")


def run(row, seed, settings, out, cores):
    """One training in a process of its own; returns its metrics.json."""
    folder = out / (row.replace(" ", "_").replace("=", "-") + f"_{seed}")
    name = "lm_control" if "STAGE=control" in row else "lm_stage" + row.split("STAGE=")[1][0]
    found = folder / name / "metrics.json"
    if not (folder / name / "done").exists():
        command = [sys.executable, "train_lm.py", *SIZE, "PREFLIGHT=False", "INIT_FROM=scratch", *settings,
                   *row.split(),
                   f"SEED={seed}", f"OUT={folder}"]
        environment = dict(os.environ)
        if cores > 1:  # two processes with two threads each would crawl
            environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-800:]}")
        (folder / name / "done").touch()
    metrics = json.loads(found.read_text())
    bits = metrics["bits_per_byte"]["value"]
    print(f"{row}, seed {seed}: {bits:.4f} bits/byte, {metrics['seconds']:.0f} s", flush=True)
    return metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/lm_stages"))
    parser.add_argument("--rows", nargs="+", default=ROWS, help="settings of each row of the table")
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = [(row, seed) for seed in range(args.seeds) for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda w: run(*w, args.settings, out, args.jobs), work))
    table = {row: np.array([[m[n]["value"] for n in NUMBERS] for (r, _), m in zip(work, found) if r == row])
             for row in args.rows}
    size = {row: next(m["parameters"] for (r, _), m in zip(work, found) if r == row) for row in args.rows}
    print(f"\n| row | parameters | {' | '.join(NUMBERS)} | beside its control |")
    print("|---" * (len(NUMBERS) + 3) + "|")
    control = None
    for row, values in table.items():
        mean, std = values.mean(0), values.std(0, ddof=1 if len(values) > 1 else 0)
        beside = ""
        if "control" in row:
            control = values[:, 0]
        elif control is not None and len(control) > 1:
            error = np.sqrt((control.var(ddof=1) + values[:, 0].var(ddof=1)) / len(control))
            sigma = (values[:, 0].mean() - control.mean()) / error
            beside = (f"{values[:, 0].mean() - control.mean():+.4f} ({sigma:+.1f} sigma)"
                      + ("" if abs(sigma) > 2 else ", nothing"))
        print(f"| {row} | {size[row]:,} | " + " | ".join(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, std))
              + f" | {beside} |")


if __name__ == "__main__":
    main()
