"""
Draw samples from any checkpoint: it says which script made it, and with which settings.

    python sample.py --checkpoint runs/stl10/last.pt                    # a few of everything
    python sample.py --checkpoint runs/stl10/last.pt --prompt cat,ship --num-samples 8 --sampling-steps 50
    python sample.py --checkpoint runs/stl10/last.pt SOLVER=ddim ETA=1  # any setting of that script
    python sample.py --checkpoint runs/lm_stage3/last.pt --prompt "The with statement" TEMPERATURE=0.7
    python sample.py --checkpoint runs/voxel_d3pm/last.pt --prompt "tall oak tree" --size normal
    python sample.py --checkpoint runs/stl10/last.pt --full             # all diagnostics again, the same bits
    python sample.py --checkpoint runs/stl10/last.pt --export           # the EMA weights alone, to publish

The same seed gives the same sample here and in the run. What cannot work is one line and exit code 2.
"""

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace

from common import fail, load_checkpoint, override, save_checkpoint, settings

SCRIPTS = ("train_voxel_d3pm", "train_stl10", "train_3d_rflow", "train_world_model", "train_lm")


def parse():
    parser = argparse.ArgumentParser(description="Draw samples from a checkpoint of any of the five scripts.",
                                     epilog="NAME=value after the flags overrides any setting of the script.")
    parser.add_argument("--checkpoint", required=True, type=Path,
                        help="last.pt, best.pt or epoch_NNNN.pt of a run folder")
    parser.add_argument("--prompt", default="",
                        help="class names, separated by commas (empty: every class); what a tree should be, "
                             "such as 'tall oak'; or how a text begins")
    parser.add_argument("--size", default="",
                        help="pixels a side, where the network can draw others; trees: small, normal, large")
    parser.add_argument("--num-samples", type=int, default=8, help="for each prompt")
    parser.add_argument("--sampling-steps", type=int, help="instead of the STEPS of the run")
    parser.add_argument("--guidance", type=float, help="instead of the GUIDANCE of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; default: samples/ beside the checkpoint")
    parser.add_argument("--full", action="store_true", help="redraw every metric and diagnostic of the run")
    parser.add_argument("--export", action="store_true", help="write the averaged weights alone to ema.pt")
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    return parser.parse_args()


def load(path, overrides=()):
    """The script that made a checkpoint, as a module with the checkpoint's settings; and the checkpoint."""
    checkpoint = load_checkpoint(path)
    if checkpoint["script"] not in SCRIPTS:
        fail(f"{path} was made by {checkpoint['script']!r}, not by one of {', '.join(SCRIPTS)}")
    if importlib.util.find_spec(checkpoint["script"]) is None:
        fail(f"{path} was made by {checkpoint['script']}.py, which is not here")
    script = importlib.import_module(checkpoint["script"])  # definitions only: main() hides behind the guard
    unknown = sorted(checkpoint["settings"].keys() - settings(vars(script)).keys())
    if unknown:
        fail(f"{path} has settings this {checkpoint['script']}.py does not know ({', '.join(unknown)}): "
             "use the copy of the script in its run folder")
    vars(script).update(checkpoint["settings"])
    override(vars(script), overrides)
    return script, checkpoint


def main():
    args = parse()
    flags = dict(STEPS=args.sampling_steps, GUIDANCE=args.guidance, SIZE=args.size or None)
    overrides = [f"{name}={value}" for name, value in flags.items() if value is not None] + args.settings
    if args.num_samples < 1:
        fail(f"--num-samples {args.num_samples}: at least 1")
    script, checkpoint = load(args.checkpoint, overrides)
    folder = args.out or args.checkpoint.parent / ("full" if args.full else "samples")
    if args.export:
        whole = {"model", "optimizer", "guard", "script", "settings", "format"}  # sampling needs the rest
        target = args.out or args.checkpoint.parent / "ema.pt"
        run = SimpleNamespace(script=checkpoint["script"], settings=checkpoint["settings"])
        if not save_checkpoint(target, run, **{k: v for k, v in checkpoint.items() if k not in whole}):
            fail(f"cannot write {target}; give another --out")
        print(f"wrote {target}")
    elif args.full:
        script.inference_full(checkpoint, folder, args.checkpoint.parent / "log.csv")
        print(f"wrote {folder}")
    else:
        script.save_samples(checkpoint, folder, args.prompt, args.num_samples, args.seed)
        print(f"wrote {folder}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror}; give another --out")
