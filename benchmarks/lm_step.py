"""
Speed of train_lm.py on a CPU beside nanoGPT: a training step, generation, and on request what both learn.

    step     = batch drawn, forward, loss, backward, gradient norm, optimizer update
    work     = 16 windows of 256 random tokens, 6 layers, 6 heads, 384 wide, no dropout
    generate = 512 tokens after one, one text, vocabulary 256, a window that holds them all
    quality  = nanoGPT's run for a CPU: tinyshakespeare, 2,000 steps of 12 x 64 characters, 4 layers, 128 wide

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/lm_step.py --nanogpt nanoGPT                   training steps and generation, two rounds
    python benchmarks/lm_step.py --nanogpt nanoGPT --only fp32 --vocabularies 256
    python benchmarks/lm_step.py --nanogpt nanoGPT --quality --text input.txt --seeds 3      what both learn

Without --nanogpt its rows are left out. Each row runs in a process of its own, since peak memory and the
state of the allocator leak from one into the next. The rows take turns, round after round, so a busy machine
disturbs all of them; ratios are medians over the rounds of ratios WITHIN a round. Tokens per second are wall
time; core-ms (all threads added, waiting not counted) vary less where others use the cores too.

"as its train.py" is nanoGPT on a CPU: fp32, no autocast, AdamW as its configure_optimizers builds it, the
gradient clipped to norm 1. "tricks" gives it what our script gives itself: fused AdamW, an allocator that
keeps large blocks and, in the rows that say so, bf16 autocast. torch.compile is off everywhere. bf16 pays
where the processor multiplies it, which the line above the tables says; elsewhere it is emulated.

What is equal and what is not:
    work      a step of ours is train_step() of the script: besides forward, backward and update it draws its
              windows from (seed, step), asks the guard, copies the EMA and, from stage 2 on, looks at the
              gradients (in one of the three timed steps here, in one of five of a training).
    control   the same plain transformer, matrices of the same shapes: relu^2 for GELU, RMS without a gain for
              LayerNorm, RoPE for learned positions, QK-norm, mixed values, capped logits. Head and embedding
              are two tables (nanoGPT ties them: 19.3 M parameters less at 50,304), the logits never exist as
              a whole. THE ROW TO COMPARE; its hidden width is 4 x, as nanoGPT's.
    stage 3   MU and TEMPORAL tokens, K-1 learning rates, half of the heads along typed edges.
    Muon      the optimizer of the script; its products are in GFLOP a step. adamw: nanoGPT's kind.
    generate  the rows draw other tokens from other random weights; the work does not depend on them. Ours
              filters by min-p, nanoGPT does not. Uncached, ours computes the head for the whole window,
              nanoGPT for its last position.
    quality   the same text, split, windows and number of steps; nanoGPT with its published settings, ours
              with the script's (EXPERIMENT=nanogpt_cpu): another optimizer, other batches, 257 tokens for 65,
              MU tokens or, in the control, an MLP as much wider as stage 3 is larger. All are scored on the
              whole validation split in adjacent windows of 64.

GFLOP counts the products of forward, backward and update (torch.utils.flop_counter); attention as full
squares.
"""

import argparse
import copy
import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import train_lm

SHAPE = dict(DIM=384, MU_DIM=384, DEPTH=6, HEADS=6, MLP_RATIO=4, DROPOUT=0.0, BATCH_SIZE=16, CONTEXT=256)
ADAMW = dict(OPT="adamw", LR=3e-3, CLIP=1.0)

# row: (network, bf16, tricks, settings of our script)
ROWS = {
    "nanoGPT as its train.py, fp32": ("nanogpt", False, False, {}),
    "nanoGPT, tricks, fp32": ("nanogpt", False, True, {}),
    "nanoGPT, tricks, bf16": ("nanogpt", True, True, {}),
    "ours, control, fp32": ("ours", False, True, dict(STAGE="control")),
    "ours, control, bf16": ("ours", True, True, dict(STAGE="control")),
    "ours, control, adamw, fp32": ("ours", False, True, dict(STAGE="control") | ADAMW),
    "ours, control, adamw, bf16": ("ours", True, True, dict(STAGE="control") | ADAMW),
    "ours, stage 3, fp32": ("ours", False, True, dict(STAGE="3")),
    "ours, stage 3, bf16": ("ours", True, True, dict(STAGE="3")),
    "ours, stage 3, adamw, fp32": ("ours", False, True, dict(STAGE="3") | ADAMW),
    "ours, stage 3, adamw, bf16": ("ours", True, True, dict(STAGE="3") | ADAMW),
}
BASE = "nanoGPT as its train.py, fp32"
# row: (network, cached, settings of our script)
GENERATE = {
    "generate, nanoGPT": ("nanogpt", False, {}),
    "generate, ours, control, uncached": ("ours", False, dict(STAGE="control")),
    "generate, ours, control, cached": ("ours", True, dict(STAGE="control")),
    "generate, ours, stage 3, uncached": ("ours", False, dict(STAGE="3")),
    "generate, ours, stage 3, cached": ("ours", True, dict(STAGE="3")),
}


def load_nanogpt(folder):
    """The module model.py of a clone of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_nanogpt(folder, **shape):
    """Its network and its optimizer, with the defaults of its train.py and train_shakespeare_char.py."""
    nanogpt = load_nanogpt(folder)
    model = nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, bias=False, **shape))
    return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def nanogpt_batch(data, size, context):
    """What get_batch() of its train.py gives: windows from anywhere, and the same one token later."""
    starts = torch.randint(len(data) - context, (size,)).tolist()
    ids = torch.from_numpy(np.stack([data[i:i + context + 1] for i in starts]).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def nanogpt_update(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- rows: each runs in a process of its own
def nanogpt_step(args, bf16, tricks):
    """model, loss of so many windows, its optimizer, step(i)."""
    if tricks:
        common.pick_device()
    context, data = SHAPE["CONTEXT"], np.random.default_rng(0).integers(args.vocabulary, size=100_000)
    model, optimizer = build_nanogpt(args.nanogpt, n_layer=SHAPE["DEPTH"], n_head=SHAPE["HEADS"],
                                     n_embd=SHAPE["DIM"], block_size=context, vocab_size=args.vocabulary)
    if tricks:
        groups = [{k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def loss_of(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(*nanogpt_batch(data, count, context))[1]

    return model, loss_of, optimizer, lambda i: nanogpt_update(model, optimizer, loss_of(SHAPE["BATCH_SIZE"]))


def settings_of(bf16, settings):
    """Our script as if started with these settings."""
    vars(train_lm).update(SHAPE | dict(PRECISION="bf16" if bf16 else "fp32") | settings)
    return common.pick_device()


def our_model(vocabulary):
    """The model of STAGE; the control's MLP is not widened to match stage 3."""
    return train_lm.LM(vocabulary, train_lm.stage_number(), train_lm.MLP_RATIO * train_lm.DIM)


def our_step(args, bf16, settings):
    device = settings_of(bf16, settings)
    data = SimpleNamespace(train=np.random.default_rng(0).integers(args.vocabulary, size=100_000))
    model = our_model(args.vocabulary)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer, credit, guard = train_lm.build_optimizer(model), train_lm.Credit(model), common.Guard()
    run = SimpleNamespace(device=device, rank=0, world=1)

    def loss_of(count):
        with common.autocast(device, train_lm.PRECISION):
            return train_lm.loss_fn(model, train_lm.draw_batch(data, 0)[:count])

    def step(i):
        # around step 500 of 1,000: K-1 and the graph act fully, and 500 is one that looks at the gradients
        train_lm.train_step(model, model, ema, optimizer, credit, guard, data, 498 + i, 1000, run)
        if guard.skipped:
            raise SystemExit("the guard refused a step: its time would not be the time of a step")

    return model, loss_of, optimizer, step


def measure_step(args):
    """dict of tokens per second, core-ms a token, GFLOP a step, parameters and peak memory."""
    network, bf16, tricks, settings = ROWS[args.row]
    model, loss_of, optimizer, step = (our_step(args, bf16, settings) if network == "ours"
                                       else nanogpt_step(args, bf16, tricks))
    # one window is enough, for all but the update is linear in them; fused attention would not be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(1).backward()
    with FlopCounterMode(display=False) as update:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for i in range(2):  # warm-up: the allocator has all its blocks after the second
        step(i)
    start, start_cores = time.perf_counter(), time.process_time()
    for i in range(args.steps):
        step(2 + i)
    seconds, cores = time.perf_counter() - start, time.process_time() - start_cores
    batch, tokens = SHAPE["BATCH_SIZE"], args.steps * SHAPE["BATCH_SIZE"] * SHAPE["CONTEXT"]
    gflop = (batch * counter.get_total_flops() + update.get_total_flops()) / 1e9
    return dict(tokens_per_s=tokens / seconds, core_ms=1000 * cores / tokens,
                gflop=gflop, gflops=args.steps * gflop / seconds,
                parameters=sum(p.numel() for p in model.parameters()) / 1e6)


def measure_generate(args):
    network, cached, settings = GENERATE[args.row]
    prompt, shape = torch.zeros(1, 1, dtype=torch.int64), dict(CONTEXT=args.length + 1)
    if network == "nanogpt":
        model, _ = build_nanogpt(args.nanogpt, n_layer=SHAPE["DEPTH"], n_head=SHAPE["HEADS"],
                                 n_embd=SHAPE["DIM"], block_size=args.length + 1, vocab_size=256)
        call = model.eval().generate
    else:
        settings_of(False, settings | shape)
        model = train_lm.awake(our_model(256))  # no zero matrices

        def call(ids, length):
            return train_lm.sample(model, ids, length, seed=0, cached=cached)

    call(prompt, 8)  # warm-up
    start, start_cores = time.perf_counter(), time.process_time()
    assert call(prompt, args.length).shape == (1, 1 + args.length)
    return dict(tokens_per_s=args.length / (time.perf_counter() - start),
                core_ms=1000 * (time.process_time() - start_cores) / args.length,
                parameters=sum(p.numel() for p in model.parameters()) / 1e6)


class Logits(torch.nn.Module):
    """nanoGPT as train_lm.score() calls a model: it gives the logits of all positions with targets alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids.contiguous(), ids.contiguous())[0]


def nanogpt_quality(args):
    """nanoGPT's run for a CPU: nats a character on the whole validation split, and seconds of training."""
    text = args.text.read_text(encoding="utf-8")
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    ids, cut = np.array([number[c] for c in text]), int(0.9 * len(text))
    vars(train_lm).update(CONTEXT=64, PRECISION="fp32")
    common.pick_device()
    torch.manual_seed(1337 + args.seed)
    model, optimizer = build_nanogpt(args.nanogpt, n_layer=4, n_head=4, n_embd=128, block_size=64,
                                     vocab_size=len(number))
    start = time.perf_counter()
    for i in range(args.iterations):
        share = (i - 100) / (args.iterations - 100)
        lr = 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + 9e-4 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        nanogpt_update(model, optimizer, model(*nanogpt_batch(ids[:cut], 12, 64))[1])
    seconds = time.perf_counter() - start
    nats, _ = train_lm.score(Logits(model.eval()), ids[cut:], 64)
    return dict(val_loss=float(nats.mean()), seconds=seconds, characters=len(nats),
                parameters=sum(p.numel() for p in model.parameters()) / 1e6)


def our_quality(args, stage):
    """The script itself, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as out:
        cache = f"{out}/cache"
        prepare = ["-m", "data.text", "prepare", "shakespeare", "--cache", cache]
        for command in ([*prepare, "--from", str(args.text.resolve())],
                        ["train_lm.py", "EXPERIMENT=nanogpt_cpu", f"STAGE={stage}", f"SEED={args.seed}",
                         f"MAX_STEPS={args.iterations}", "PRECISION=fp32", f"OUT={out}"]):
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        name = "lm_control" if stage == "control" else f"lm_stage{stage}"
        table = json.loads((Path(out) / name / "metrics.json").read_text())
    return dict(val_loss=table["val_loss"]["value"], seconds=table["seconds"],
                characters=table["val_loss"]["n"], parameters=table["parameters"] / 1e6)


QUALITY = {
    "nanoGPT": nanogpt_quality,
    "ours, control": lambda args: our_quality(args, "control"),
    "ours, stage 0": lambda args: our_quality(args, "0"),
}


# ---------------------------------------------------------------- tables
def in_own_process(row, args, **more):
    command = [sys.executable, __file__, "--row", row]
    given = {k: getattr(args, k) for k in ("steps", "length", "nanogpt", "text", "iterations")} | more
    command += [f"--{k}={v}" for k, v in given.items() if v is not None]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the row '{row}' failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{row} {more}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def ratio(results, a, b):
    """How many times the tokens of b row a does in a second, and its inverse in core-ms a token."""
    pairs = list(zip(results[a], results[b]))
    return [median(x["tokens_per_s"] / y["tokens_per_s"] for x, y in pairs),
            median(y["core_ms"] / x["core_ms"] for x, y in pairs)]


def print_steps(results, vocabulary):
    """results: row -> one dict a round."""
    print(f"\nV = {vocabulary:,}\n\n| row | tokens/s | min .. max | x nanoGPT's train.py | core-ms a token "
          "| x nanoGPT's | GFLOP a step | GFLOP/s | parameters | peak GB |\n" + "|---" * 10 + "|")
    for row, rounds in results.items():
        speeds = [r["tokens_per_s"] for r in rounds]
        faster = [f"{x:.2f}" for x in ratio(results, row, BASE)] if BASE in results else "--"
        print(f"| {row} | {median(speeds):,.0f} | {min(speeds):,.0f} .. {max(speeds):,.0f} | {faster[0]} "
              f"| {median(r['core_ms'] for r in rounds):.3f} | {faster[1]} | {rounds[-1]['gflop']:.0f} "
              f"| {median(r['gflops'] for r in rounds):.0f} | {rounds[-1]['parameters']:.1f} M "
              f"| {max(r['peak_gb'] for r in rounds):.2f} |")
    print()
    for row in (r for r in results if r.startswith("ours")):
        precision = row.rsplit(", ", 1)[1]
        for other in (r for r in results if r.startswith("nanoGPT") and r.endswith(precision)):
            wall, cores = ratio(results, row, other)
            memory = [max(r["peak_gb"] for r in results[name]) for name in (row, other)]
            print(f"{row}: {wall:.2f} x the speed of {other} ({cores:.2f} x by core-ms) "
                  f"at {memory[0] / memory[1]:.2f} x its memory")


def print_generate(results, args):
    print(f"\n{args.length} tokens, one text, V = 256, fp32\n\n| row | tokens/s | min .. max "
          "| core-ms a token | parameters | peak GB |\n" + "|---" * 6 + "|")
    for row, rounds in results.items():
        speeds = [r["tokens_per_s"] for r in rounds]
        print(f"| {row} | {median(speeds):.1f} | {min(speeds):.1f} .. {max(speeds):.1f} "
              f"| {median(r['core_ms'] for r in rounds):.1f} | {rounds[-1]['parameters']:.1f} M "
              f"| {max(r['peak_gb'] for r in rounds):.2f} |")
    print()
    for row in (r for r in results if r.endswith(", cached")):
        for other in (row.replace(", cached", ", uncached"), "generate, nanoGPT"):
            if other in results:
                print(f"{row}: {ratio(results, row, other)[0]:.1f} x the speed of {other}")


def print_quality(results, args):
    print(f"\ntinyshakespeare, {args.iterations:,} steps of 12 x 64 characters, {args.seeds} seeds: nats a "
          "character of the whole validation split\n\n| row | nats | min .. max | seconds of training "
          "| parameters |\n" + "|---" * 5 + "|")
    for row, runs in results.items():
        losses = [r["val_loss"] for r in runs]
        print(f"| {row} | {mean(losses):.4f} | {min(losses):.4f} .. {max(losses):.4f} "
              f"| {median(r['seconds'] for r in runs):.0f} | {runs[-1]['parameters']:.2f} M |")


def child(args):
    """One row, its numbers as the last line of stdout."""
    measure = (QUALITY[args.row] if args.row in QUALITY
               else measure_generate if args.row in GENERATE else measure_step)
    torch.manual_seed(0)
    result = measure(args)
    print(json.dumps(result | dict(peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)))


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--nanogpt", type=Path, help="folder of a clone of nanoGPT")
    parser.add_argument("--only", default="", help="rows whose name contains this, or several with | between")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed training steps a round")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[256, 50_304])
    parser.add_argument("--length", type=int, default=512, help="tokens to generate")
    parser.add_argument("--quality", action="store_true", help="train both and compare; nothing else")
    parser.add_argument("--text", type=Path, help="tinyshakespeare, for --quality")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=2000, help="of --quality")
    for name, kind in (("--row", str), ("--vocabulary", int), ("--seed", int)):  # of the child process
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nanogpt is not None and not (args.nanogpt / "model.py").exists():
        parser.error(f"--nanogpt {args.nanogpt}: no model.py there")
    if args.quality and (args.text is None or not args.text.exists()):
        parser.error("--quality needs --text, the file input.txt of tinyshakespeare")
    return args


def main():
    args = parse()
    if args.row:
        return child(args)
    if args.nanogpt is None:
        print("nanoGPT's rows are left out: git clone https://github.com/karpathy/nanoGPT and give --nanogpt")

    def chosen(table):
        return [row for row in table if any(part in row for part in args.only.split("|"))
                and (args.nanogpt is not None or "nanoGPT" not in row)]

    jobs = [(row, dict(vocabulary=v)) for v in args.vocabularies for row in chosen(ROWS)]
    jobs += [(row, {}) for row in chosen(GENERATE)]
    if args.quality:
        jobs = [(row, {}) for row in chosen(QUALITY)]
    results = {}
    for i in range(args.seeds if args.quality else args.rounds):
        for row, more in jobs:
            found = in_own_process(row, args, **more, **(dict(seed=i) if args.quality else {}))
            results.setdefault(more.get("vocabulary"), {}).setdefault(row, []).append(found)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds of "
          f"{args.steps} steps; bf16 in hardware: {torch.cpu._is_avx512_bf16_supported()}")
    for vocabulary, found in results.items():
        if vocabulary is not None:
            print_steps(found, vocabulary)
        else:
            (print_quality if args.quality else print_generate)(found, args)


if __name__ == "__main__":
    main()
