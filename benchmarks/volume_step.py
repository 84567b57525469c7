"""
Speed of one training step of model_unet.UNet on volumes on a CPU, beside monai's DiffusionModelUNet.

    step = noise, x_t, forward, mean squared error of v, backward, gradient clipped to norm 1, AdamW; no EMA
    work = B volumes of 1 x SIZE^3, channels WIDTH x (1, 2, 4) on grids SIZE, SIZE/2, SIZE/4, attention on the
           last grid and in the middle, 8 norm groups, head dimension 32, no dropout, no condition but t

    python benchmarks/volume_step.py                        every row, three rounds
    python benchmarks/volume_step.py --threads 2 --steps 4  for numbers to keep
    python benchmarks/volume_step.py --only ours --size 16  our rows, small

The peer is optional, `pip install monai`; without it its rows are skipped. Each row runs in a process of its
own, since peak memory and the state of the allocator leak from one network into the next. The rows take
turns, round after round, so a busy machine disturbs all of them; ratios are medians over the rounds of ratios
WITHIN a round. Milliseconds are wall time; core-ms (all threads added, waiting not counted) vary less where
others use the cores too. Peak memory is that of the process; "step GB" leaves out what it held before the
first step: imports, weights and the volumes (monai imports more than we do).

"plain" is each class under torch's defaults. "tricks" is the same for both: fused AdamW and an allocator that
keeps large blocks (common.keep_memory); ours then runs in channels_last_3d as in the script, monai in both
layouts. Everything is fp32; where the hardware multiplies bf16, the rows with tricks come a second time under
bf16 autocast.

What is equal and what is not:
    monai       num_res_blocks=1: one ResBlock a level down and two up, for it also keeps the output of the
                stem and of each stride-2 convolution as a skip; 11 with the middle. Attention after each
                block of the last grid and in the middle (4). Upsampling copies each number eight times, then
                convolves the large grid at the small grid's width. Time is added before the second norm.
    ours, monai's blocks    THE ROW TO COMPARE: our layers in monai's plan, 11 ResBlocks of the same output
                widths with the same skips into them, 4 attentions. Left as ours: upsampling and its
                convolution are one transposed convolution, straight to the large grid's width, so the first
                block after it takes in fewer channels (2 WIDTH for 3 WIDTH, 4 for 6); FiLM; attention of
                bias-free q, k, v; a time embedding of 256 numbers (monai: 4 WIDTH). No network of the
                scripts has this plan.
    ours        UNet(blocks=1), as the script builds it with PATCH=1: equal widths, one ResBlock (and on the
                last grid one attention) less a level on the way up; 8 ResBlocks, 3 attentions.
    ours, patch 2    a space-to-depth stem: channels x (1, 2, 4) on grids SIZE/2, SIZE/4 and SIZE/8. A cheaper
                network, not faster code.

GFLOP counts the products of forward and backward (torch.utils.flop_counter) as they are computed. Ours has
fewer, and that is most of its lead: narrower after upsampling (another network), and eight products a place
there instead of 27 (the same function).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from model_unet import Stage, UNet, time_embedding, upsample_conv

MULTS, ATTENTION, GROUPS, HEAD_DIM = (1, 2, 4), (False, False, True), 8, 32

# row: (network, tricks, channels_last_3d, patch)
ROWS = {
    "monai, plain": ("monai", False, False, 1),
    "monai, tricks": ("monai", True, False, 1),
    "monai, channels_last, tricks": ("monai", True, True, 1),
    "ours, monai's blocks, plain": ("planned", False, False, 1),
    "ours, monai's blocks, tricks": ("planned", True, True, 1),
    "ours, plain": ("ours", False, False, 1),
    "ours, tricks": ("ours", True, True, 1),
    "ours, patch 2, tricks": ("ours", True, True, 2),
}
if torch.cpu._is_avx512_bf16_supported():
    ROWS |= {f"{row}, bf16": (name, True, last and name == "monai", patch)
             for row, (name, tricks, last, patch) in ROWS.items() if tricks}


class MonaiPlan(UNet):
    """Our layers in monai's plan: the stem and the stride-2 convolutions leave skips too, and every level has
    one block more on the way up to take them."""

    def __init__(self, width, **kwargs):
        super().__init__(width=width, mults=MULTS, blocks=1, **kwargs)
        widths = [width * m for m in MULTS]
        for i, level in zip(reversed(range(len(MULTS))), self.up):
            extra = Stage(nn.Conv3d, widths[i] + widths[max(i - 1, 0)], widths[i], self.time_dim, GROUPS, 0.0,
                          True, ATTENTION[i], HEAD_DIM, 0)
            level["blocks"].append(extra)
        self.init_weights()

    def forward(self, x, t):
        emb = F.silu(self.time(time_embedding(t, self.time_dim)))
        h = self.stem(x)
        skips = [h]
        for level in self.down:
            for layer in (*level["blocks"], *([level["resize"]] if "resize" in level else [])):
                h = layer(h, emb, None, None) if isinstance(layer, Stage) else layer(h)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb, None, None)
        for level in self.up:
            if "resize" in level:
                h = upsample_conv(h, level["resize"])
            for block in level["blocks"]:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, None, None)
        return self.head(F.silu(self.norm(h))).to(x.dtype)


def build(network, width, patch):
    """The network and how it is called with x (B, 1, D, H, W) and t (B,) in [0, 1]."""
    if network == "monai":
        from monai.networks.nets import DiffusionModelUNet

        model = DiffusionModelUNet(
            spatial_dims=3, in_channels=1, out_channels=1, channels=[width * m for m in MULTS],
            num_res_blocks=1, attention_levels=ATTENTION, norm_num_groups=GROUPS, num_head_channels=HEAD_DIM)
        return model, lambda x, t: model(x, 1000 * t)
    same = dict(channels=1, dims=3, width=width, attention=ATTENTION, groups=GROUPS, head_dim=HEAD_DIM,
                dropout=0.0)
    model = MonaiPlan(**same) if network == "planned" else UNet(mults=MULTS, blocks=1, patch=patch, **same)
    return model, model


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(row, size, batch, width, steps, threads):
    """Runs in a process of its own: dict of ms and core-ms a step, GFLOP, parameters and peak memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network, tricks, channels_last, patch = ROWS[row]
    if tricks:
        common.keep_memory()
    model, call = build(network, width, patch)
    x_0, t = torch.rand(batch, 1, size, size, size), torch.rand(batch)
    if channels_last:  # ours as in the script: what goes in alone, and not under bf16
        model = model.to(memory_format=torch.channels_last_3d) if network == "monai" else model
        x_0 = x_0.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tricks)

    def step(count):
        s, eps = t[:count].view(-1, 1, 1, 1, 1), torch.randn_like(x_0[:count])
        x_t, v = (1 - s) * x_0[:count] + s * eps, eps - x_0[:count]
        with torch.autocast("cpu", torch.bfloat16, enabled=row.endswith("bf16")):
            v_hat = call(x_t, t[:count])
        F.mse_loss(v_hat.float(), v).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    before = peak_gb()
    # one volume is enough to count, for all is linear in the batch; the fused attention would not be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(1)
    step(batch)  # warm-up
    start, start_cores = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step(batch)
    return dict(ms=1000 * (time.perf_counter() - start) / steps,
                core_ms=1000 * (time.process_time() - start_cores) / steps,
                gflop=counter.get_total_flops() * batch / 1e9,
                parameters=sum(p.numel() for p in model.parameters()) / 1e6,
                peak_gb=peak_gb(), step_gb=peak_gb() - before)


def in_own_process(row, args):
    command = [sys.executable, __file__, "--row", row]
    command += [f"--{k}={getattr(args, k)}" for k in ("size", "batch", "width", "steps", "threads")]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the row '{row}' failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(results, a, b, key):
    """How many times of a's `key` b needs: the median over rounds of the ratio within a round."""
    return median(y[key] / x[key] for x, y in zip(results[a], results[b]))


def peak(results, row, key="peak_gb"):
    return max(r[key] for r in results[row])


def print_table(results):
    """results: row -> one dict a round."""
    first = next(iter(results))
    print(f"| row | ms a step | min .. max | '{first}' : it | core-ms | '{first}' : it | GFLOP a step "
          "| GFLOP/s | parameters | peak GB | step GB |")
    print("|---" * 11 + "|")
    for row, rounds in results.items():
        times, last = [r["ms"] for r in rounds], rounds[-1]
        print(f"| {row} | {median(times):.0f} | {min(times):.0f} .. {max(times):.0f} "
              f"| {ratio(results, row, first, 'ms'):.2f} x | {median(r['core_ms'] for r in rounds):.0f} "
              f"| {ratio(results, row, first, 'core_ms'):.2f} x | {last['gflop']:.0f} "
              f"| {1000 * last['gflop'] / median(times):.0f} | {last['parameters']:.2f} M "
              f"| {peak(results, row):.2f} | {peak(results, row, 'step_gb'):.2f} |")


def print_summary(results):
    """Each of our rows with tricks against monai's class as it is, and with tricks in its faster layout; bf16
    is compared with bf16."""
    for ours in (row for row in results if row.startswith("ours") and ROWS[row][1]):
        tricks = [row for row in results if row.startswith("monai") and ROWS[row][1]
                  and row.endswith("bf16") == ours.endswith("bf16")]
        best = sorted(tricks, key=lambda row: median(r["ms"] for r in results[row]))[:1]
        for other in [row for row in results if row == "monai, plain"] + best:
            print(f"{ours}: {ratio(results, ours, other, 'ms'):.2f} x the speed of {other} "
                  f"({ratio(results, ours, other, 'core_ms'):.2f} x by core-ms) at "
                  f"{peak(results, ours) / peak(results, other):.2f} x its memory")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="rows whose name contains this, or several with | between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the child process: measure this row and print JSON
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.size, args.batch, args.width, args.steps, args.threads)))
        return
    rows = [row for row in ROWS if any(part in row for part in args.only.split("|"))]
    if find_spec("monai") is None:
        print("monai is not installed (pip install monai): its rows are skipped")
        rows = [row for row in rows if ROWS[row][0] != "monai"]
    results = {row: [] for row in rows}
    for i in range(args.rounds):
        for row in rows:
            results[row].append(in_own_process(row, args))
            print(f"round {i + 1}, {row}: {json.dumps(results[row][-1])}", file=sys.stderr, flush=True)
    print(f"\n{args.batch} x 1 x {args.size}^3, width {args.width}, torch {torch.__version__}, "
          f"{args.threads} threads, {args.rounds} rounds of {args.steps} steps\n")
    print_table(results)
    print()
    print_summary(results)


if __name__ == "__main__":
    main()
