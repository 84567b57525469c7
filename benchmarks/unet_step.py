"""
Speed of one training step of model_unet.UNet on a CPU, beside two well-known U-Nets of the same widths.

    step = forward, mean squared error, backward, gradient clipped to norm 1, optimizer update
    work = B pictures of 3 x SIZE x SIZE, width 64, channels x (1, 2, 4) on grids SIZE, SIZE/2, SIZE/4,
           attention on the last grid and in the middle, no dropout

    python benchmarks/unet_step.py                          every row, three rounds (about 15 quiet minutes)
    python benchmarks/unet_step.py --only ours              our rows
    python benchmarks/unet_step.py --size 32 --batch 4      small

The peers are optional: `pip install diffusers`, `pip install denoising-diffusion-pytorch`; a missing one is
named and skipped. Each row runs in a process of its own, since peak memory and the state of the allocator
leak from one network into the next. The rows take turns, round after round, so a busy machine disturbs all of
them; the ratios are medians over the rounds of ratios WITHIN a round. Pictures per second are wall time;
core-seconds (both threads added, waiting not counted) vary less where others use the cores too.

"plain" is what the peer's own training script does on a CPU: fp32, its own optimizer settings.
"tricks" is the same for everyone: bf16 autocast, fused Adam(W), an allocator that keeps large blocks, and
NCHW or channels_last, both measured; the summary compares with the faster one.

What is equal and what is not:
    diffusers   2 ResBlocks a level down, 3 up, attention after each of them on the last grid (6 with the
                middle), head dimension 32 as ours (its default is 8).
    ddp         (denoising-diffusion-pytorch) 2 down, 2 up and a last one, full attention once a level where
                it is asked for, and on the others linear attention, which cannot be switched off. Its blocks
                run at the width a level STARTS with (64, 64, 128, middle 256): fewer products. No labels.
    ours        2 blocks a level: 2 down, 2 up, attention after each on the last grid (5 with the middle).
                THE ROW TO COMPARE: widths and grids of diffusers, one ResBlock less a level on the way up.
    ours, 1 block / ours, stem    what one would choose for speed, NOT the same architecture: half of the
                blocks; or a pixel-unshuffle stem, channels x (1, 2, 4) on grids SIZE/2, SIZE/4 (attention),
                SIZE/8.

GFLOP counts the products of forward and backward (torch.utils.flop_counter) as they are computed: our
upsampling needs fewer of them for the same function, so judge by pictures per second.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model_unet import UNet

# glibc gives large freed blocks back to the system and faults them in again at every step; these keep them
KEEP_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "10000000000", "MALLOC_TRIM_THRESHOLD_": "10000000000",
               "MALLOC_TOP_PAD_": "67108864"}

# row: (network, tricks, channels_last, settings of our network)
ROWS = {
    "ddp, plain": ("ddp", False, False, {}),
    "ddp, tricks": ("ddp", True, False, {}),
    "ddp, tricks, channels_last": ("ddp", True, True, {}),
    "diffusers, plain": ("diffusers", False, False, {}),
    "diffusers, tricks": ("diffusers", True, False, {}),
    "diffusers, tricks, channels_last": ("diffusers", True, True, {}),
    "ours, plain": ("ours", False, False, dict(blocks=2)),
    "ours, tricks": ("ours", True, False, dict(blocks=2)),
    "ours, tricks, channels_last": ("ours", True, True, dict(blocks=2)),
    "ours, 1 block, tricks": ("ours", True, False, dict(blocks=1)),
    "ours, stem, tricks": ("ours", True, False, dict(blocks=2, patch=2, attention=(False, True, False))),
}
PEERS = {"ddp": "denoising_diffusion_pytorch", "diffusers": "diffusers"}


def build_ours(size, width, tricks, **kwargs):
    kwargs = dict(attention=(False, False, True)) | kwargs
    model = UNet(width=width, mults=(1, 2, 4), classes=10, dropout=0.0, **kwargs)
    return model, model, torch.optim.AdamW(model.parameters(), lr=2e-4, fused=tricks)


def build_diffusers(size, width, tricks):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=size, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), num_class_embeds=10,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=32)
    # examples/unconditional_image_generation/train_unconditional.py
    settings = dict(lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=tricks)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    return model, lambda x, t, label: model(x, 1000 * t, class_labels=label).sample, optimizer


class Absent(types.ModuleType):
    """Stands for torchvision: ddp's data set and picture grids import names from it, its network does not."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__, self.__path__ = ModuleSpec(name, None), []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)


def build_ddp(size, width, tricks):
    if find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
            sys.modules[name] = Absent(name)
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    model = Unet(width, dim_mults=(1, 2, 4), full_attn=(False, False, True))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=tricks)  # its Trainer
    return model, lambda x, t, label: model(x, 1000 * t), optimizer


def measure(row, size, batch, width, steps):
    """Runs in a process of its own: dict of images per second, GFLOP a step, parameters and peak memory."""
    network, tricks, channels_last, kwargs = ROWS[row]
    torch.manual_seed(0)
    model, call, optimizer = globals()[f"build_{network}"](size, width, tricks, **kwargs)
    x, t, label = torch.randn(batch, 3, size, size), torch.rand(batch), torch.randint(0, 10, (batch,))
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def step(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=tricks):
            v_hat = call(x[:count], t[:count], label[:count])
        F.mse_loss(v_hat.float(), x[:count]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # one picture is enough to count, for all is linear in the batch; the fused attention would not be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(1)
    step(batch)  # warm-up
    start, start_cores = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step(batch)
    return dict(images_per_s=steps * batch / (time.perf_counter() - start),
                core_s=(time.process_time() - start_cores) / (steps * batch),
                gflop=counter.get_total_flops() * batch / 1e9,
                parameters=sum(p.numel() for p in model.parameters()) / 1e6,
                peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def in_own_process(row, args):
    env = {k: v for k, v in os.environ.items() if k not in KEEP_BLOCKS}
    env |= KEEP_BLOCKS if ROWS[row][1] else {}
    command = [sys.executable, __file__, "--row", row]
    command += [f"--{k}={getattr(args, k)}" for k in ("size", "batch", "width", "steps")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the row '{row}' failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(results, a, b, key):
    """How many times b needs what a needs, the median over rounds of the ratio within a round."""
    sign = {"images_per_s": 1, "core_s": -1}[key]
    return median((x[key] / y[key]) ** sign for x, y in zip(results[a], results[b]))


def print_table(results):
    """results: row -> one dict a round."""
    print("| row | images/s | min .. max | 'ours, tricks' is | core-s an image | 'ours, tricks' is "
          "| GFLOP a step | GFLOP/s | parameters | peak GB |")
    print("|---" * 10 + "|")
    for row, rounds in results.items():
        speeds, last = [r["images_per_s"] for r in rounds], rounds[-1]
        faster = [f"{ratio(results, 'ours, tricks', row, key):.2f} x" if "ours, tricks" in results else "-"
                  for key in ("images_per_s", "core_s")]
        print(f"| {row} | {median(speeds):.2f} | {min(speeds):.2f} .. {max(speeds):.2f} | {faster[0]} "
              f"| {median(r['core_s'] for r in rounds):.2f} | {faster[1]} "
              f"| {last['gflop']:.0f} | {last['gflop'] * median(speeds) / last['batch']:.0f} "
              f"| {last['parameters']:.1f} M | {max(r['peak_gb'] for r in rounds):.2f} |")


def print_summary(results):
    """Each of our rows against each peer: as its trainer runs it, and with tricks in its faster layout."""
    def memory(row):
        return max(r["peak_gb"] for r in results[row])

    for peer in PEERS:
        tricks = [row for row in results if row.startswith(f"{peer}, tricks")]
        best = sorted(tricks, key=lambda row: median(r["images_per_s"] for r in results[row]))[-1:]
        for other in [row for row in results if row == f"{peer}, plain"] + best:
            for ours in (row for row in results if row.startswith("ours") and ROWS[row][1]):
                print(f"{ours}: {ratio(results, ours, other, 'images_per_s'):.2f} x the speed of {other} "
                      f"({ratio(results, ours, other, 'core_s'):.2f} x by core-seconds) "
                      f"at {memory(ours) / memory(other):.2f} x its memory")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="rows whose name contains this, or several with | between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the child process: measure this row and print JSON
    args = parser.parse_args()
    if args.row:
        result = measure(args.row, args.size, args.batch, args.width, args.steps)
        print(json.dumps(result | dict(batch=args.batch)))
        return
    rows = [row for row in ROWS if any(part in row for part in args.only.split("|"))]
    for peer, package in PEERS.items():
        if any(ROWS[row][0] == peer for row in rows) and find_spec(package) is None:
            print(f"{peer}: the package {package} is not installed, its rows are skipped")
            rows = [row for row in rows if ROWS[row][0] != peer]
    results = {row: [] for row in rows}
    for i in range(args.rounds):
        for row in rows:
            results[row].append(in_own_process(row, args))
            print(f"round {i + 1}, {row}: {json.dumps(results[row][-1])}", file=sys.stderr, flush=True)
    print(f"\n{args.batch} x 3 x {args.size} x {args.size}, width {args.width}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {args.rounds} rounds of {args.steps} steps\n")
    print_table(results)
    print()
    print_summary(results)


if __name__ == "__main__":
    main()
