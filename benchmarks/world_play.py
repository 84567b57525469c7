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


def forgetful(model, past, actions):
    """For imagine(): the network without a cache, each call reads the noised frames `past` (1, T, N, c) and
    what led into them (1, T) again."""
    i = torch.full_like(actions, wm.context_level())

    def forward(z, level, action, e, caches, keep):
        return model(torch.cat([past, z], 1), torch.cat([i, level], 1), torch.cat([actions, action], 1),
                     torch.cat([torch.zeros_like(i), e], 1))[:, -1:]
    return forward


@torch.no_grad()
def measure(model, tokenizer, context, steps, frames):
    """Seconds a frame (2, frames), cached and uncached, and how far their frames are apart."""
    g, shape = torch.Generator().manual_seed(0), (1, tokenizer.tokens, tokenizer.channels)
    seconds, apart = np.zeros((2, frames)), 0.0
    caches, past, actions = model.caches(), [], torch.zeros(1, 0, dtype=torch.int64)
    for t in range(context + frames):
        eps, noise = (torch.randn(shape, generator=g) for _ in range(2))
        action, z = torch.randint(model.null, (1,), generator=g), 0.5 * eps
        if t >= context:
            clock = time.perf_counter()
            whole = forgetful(model, torch.stack(past[-context:], 1), actions[:, -context:])
            other = wm.imagine(whole, None, action, eps, steps)
            wm.to_frames(tokenizer, other[:, None])
            middle = time.perf_counter()
            z = wm.imagine(model, caches, action, eps, steps)
            wm.to_frames(tokenizer, z[:, None])
        wm.remember(model, caches, z, action, noise)
        if t >= context:
            seconds[:, t - context] = time.perf_counter() - middle, middle - clock
            if t == context:  # later the caches still know what `past` has dropped
                apart = float((other - z).abs().max())
        past.append(wm.add_noise(z, noise, wm.context_level() / wm.K_MAX))
        actions = torch.cat([actions, action[:, None]], 1)
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
