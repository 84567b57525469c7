"""
How fast train_world_model.py dreams: one frame after the other, alone in its batch, as in play.

    cached      K calls of the network on the new frame, beside the keys and values of the past; one more call
                puts the frame, a little noised, among them
    uncached    the same frame from the same numbers: each of the K calls reads the whole past again

    python benchmarks/world_play.py                                    the default network, random weights
    python benchmarks/world_play.py --context 96 WINDOW=64 DIM=256     any setting of the script
    python benchmarks/world_play.py --threads 1

Speed does not depend on what the weights say. Frames of both ways are compared; they must agree to 1e-4, or
the rows would not be of the same work. Pixels are decoded in both. Milliseconds are medians and 95th
percentiles over the frames of a row; the two ways of each K take turns.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import train_world_model as wm


@torch.no_grad()
def cached(model, past, actions, eps, steps):
    """The next frame z (1, N, c) from filled caches."""
    return wm.imagine(model, past, actions[:, -1], eps, steps)


@torch.no_grad()
def uncached(model, past, actions, eps, steps):
    """The next frame from noised frames `past` (1, T, N, c), with nothing kept from call to call."""
    i = torch.full((1, past.shape[1] + 1), wm.context_level())
    e, z = torch.zeros_like(i), eps
    for k in range(steps, 0, -1):
        i[:, -1], e[:, -1] = round(k * wm.K_MAX / steps), (wm.K_MAX // steps).bit_length() - 1
        z_hat = model(torch.cat([past, z[:, None]], 1), i, actions, e)[:, -1]
        z = z + wm.UPDATE_SCALE / k * (z_hat - z)
    return z


def measure(model, tokenizer, context, steps, frames):
    """Seconds a frame (2, frames), cached and uncached, and how far their frames are apart."""
    g, shape = torch.Generator().manual_seed(0), (1, tokenizer.tokens, tokenizer.channels)
    seconds, apart = np.zeros((2, frames)), 0.0
    caches, past, actions = model.caches(), [], torch.zeros(1, 0, dtype=torch.int64)
    for t in range(context + frames):
        eps, noise = (torch.randn(shape, generator=g) for _ in range(2))
        action = torch.randint(model.null, (1, 1), generator=g)
        actions, z = torch.cat([actions, action], 1), 0.5 * eps
        if t >= context:
            clock = time.perf_counter()
            other = uncached(model, torch.stack(past[-context:], 1), actions[:, -context - 1:], eps, steps)
            wm.to_frames(tokenizer, other[:, None])
            middle = time.perf_counter()
            z = cached(model, caches, actions, eps, steps)
            wm.to_frames(tokenizer, z[:, None])
        with torch.no_grad():
            wm.remember(model, caches, z, action[:, 0], noise)
        if t >= context:
            seconds[:, t - context] = time.perf_counter() - middle, middle - clock
            if t == context:  # later the caches still know what `past` has dropped
                apart = float((other - z).abs().max())
        past.append(wm.add_noise(z, noise, wm.context_level() / wm.K_MAX))
    return seconds, apart


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=48, help="frames of the past")
    parser.add_argument("--frames", type=int, default=200, help="dreamt for each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="NAME=value", help="of the script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common.override(vars(wm), ["TRAIN=8", "TEST=4", *arguments.settings])
    wm.check_settings()
    data = wm.load_data()
    torch.manual_seed(0)
    tokenizer = wm.build_tokenizer(data).eval()
    model = wm.build_model(data, tokenizer).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {tokenizer.tokens} tokens, {arguments.context} frames before, "
          f"{arguments.threads} threads\n")
    print("| K | frames a second | ms a frame (p95) | uncached ms (p95) | uncached / cached |")
    print("|---|---|---|---|---|")
    for steps in (1, 2, 4, 8, 16):
        if steps > wm.K_MAX:
            break
        seconds, apart = measure(model, tokenizer, arguments.context, steps, arguments.frames)
        if apart > 1e-4:
            sys.exit(f"K={steps}: cached and uncached frames differ by {apart:.1e}")
        (fast, slow), (p95, q95) = 1e3 * np.median(seconds, 1), 1e3 * np.quantile(seconds, 0.95, axis=1)
        print(f"| {steps} | {1e3 / fast:.0f} | {fast:.1f} ({p95:.1f}) | {slow:.0f} ({q95:.0f}) "
              f"| {slow / fast:.1f} |", flush=True)


if __name__ == "__main__":
    main()
