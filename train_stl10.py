"""
Image diffusion on ten labelled classes, in one file: pixels, v-prediction, classifier-free guidance.

    x_t = a x_0 + s eps                          t = 0 is data, t = 1 is noise; a^2 = alpha_bar, a^2 + s^2 = 1
    v   = a eps - s x_0                          the network regresses v: L = E |v_hat(x_t, t, label) - v|^2
    x_0_hat = a x_t - s v_hat                    (Salimans & Ho 2022, appendix D; eps_hat = s x_t + a v_hat)
    x_0_hat <- x_0_null + w (x_0_label - x_0_null)      guidance             (Ho & Salimans 2022, eq. 6)
    x_u = a_u x_0_hat + sqrt(s_u^2 - S^2) eps_hat + S z,  S = ETA s_u/s sqrt(1 - (a/a_u)^2)
                                          one step t -> u; ETA=0 DDIM, ETA=1 DDPM (Song 2021, eq. 12, 16)

    python train_stl10.py                               # drawn classes, 2 CPU cores: 11 min, accuracy 0.85
    python train_stl10.py OVERFIT_TINY=8 EPOCHS=2000 EVAL_EVERY=1000 OUT=runs_tiny  # can it memorise?
    python -m data.stl10 import pictures/ mine          # your own pictures, a folder for each class; then
    python train_stl10.py DATA=mine SIZE=32 OUT=runs_mine
    python -m data.stl10 download stl10                 # the real STL-10, 2.6 GB; then, on one GPU:
    torchrun --nproc_per_node=1 train_stl10.py DATA=stl10 SIZE=96 PATCH=1 WIDTH=128 MULTS=1,2,2,3 BLOCKS=2 \
        ATTENTION=False,False,True,True SHIFT=1.5 BATCH_SIZE=128 LR=2e-4 EMA_DECAY=0.9999 EPOCHS=4000 \
        EVAL_EVERY=200
    python sample.py --checkpoint runs/stl10/last.pt --prompt cat --num-samples 8
    python sample.py --checkpoint runs/stl10/last.pt --full  # inference_full: every diagnostic, the same bits

Letters: B pictures in a batch, C H W their shape, K classes, null = K the label for "no label", w guidance.
Not here: latent space, text conditions, learned variances, likelihoods, Inception FID (nothing is downloaded:
the judge, a small classifier trained on the run's own training pictures, gives accuracy and features).
"""

import copy
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import (Guard, autocast, batch_order, ema_update, fail, generator_of, guarded_step, lr_at,
                    override, save_artifact, seed_of, start, tile)
from data import stl10
from metrics import frechet, kid, memorisation, nearest, prdc, psnr
from model_unet import UNet

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
DATA = "embedded"    # ten drawn classes; or a folder made by `python -m data.stl10 download|import`
SIZE = 32            # side of the training pictures; must divide the stored side (96 for STL-10: 32, 48, 96)
OVERFIT_TINY = 0     # train on the first N pictures only, without flips (the lab notes: 128); 0 = all
EPOCHS = 80          # passes over the training pictures
BATCH_SIZE = 32      # pictures in a forward pass, over all processes
ACCUM = 1            # forward passes in an optimizer step: the lab notes' virtual batch multiplier
LR = 1e-3            # peak; 1e-3 for 2 M parameters and minutes, 2e-4 for 50 M and days
WARMUP = 0.05        # share of the optimizer steps
WEIGHT_DECAY = 1e-4  # of AdamW
CLIP = 1.0           # gradient norm
EMA_DECAY = 0.999    # of the weights we sample from; half-life 693 steps. 0.9999 for long runs
WIDTH = 48           # channels of the first level; 64 to 256 at 96x96
MULTS = (1, 2, 2)    # channels of each level in units of WIDTH; each level halves the grid
BLOCKS = 1           # ResBlocks a level
ATTENTION = (False, True, True)  # self-attention at each level; the middle always has it
PATCH = 2            # space-to-depth stem: 2 quarters the cost; 1 looks at single pixels
FILM = True          # labels and time scale and shift the norms (AdaGN); False adds them, as in the lab notes
DROPOUT = 0.1        # inside the ResBlocks; 0 when it should memorise
LABEL_DROP = 0.2     # share of labels replaced by null in training, for guidance
SCHEDULE = "cosine"  # or "linear" (DDPM's betas)
SHIFT = 1.0          # more noise for larger pictures: SIZE/64 above 64 px (Hoogeboom 2023), 1.5 at 96 px
MIN_SNR = 0.0        # weight min(SNR, this)/(SNR + 1) on the loss, 5 in Hang 2023; 0 = plain v-loss
SOLVER = "ddim"      # "ddim" (with ETA), "dpm++" (2M: half the steps, a little worse here), "heun"
STEPS = 50           # sampling steps; the lab notes: 500
ETA = 1.0            # ddim only: 1 DDPM, 0 deterministic
GUIDANCE = 3.0       # w: 1 = no guidance. The sweep picture shows what more of it buys and costs
GUIDANCE_INTERVAL = (0.2, 5.0)  # noise levels s/a where guidance acts (Kynkaanniemi 2024); saves passes
RESCALE = 0.0        # share of x_0's own std restored after guidance (Lin 2023: 0.7)
CLIP_X0 = "clip"     # "clip" to [-1, 1], "dynamic" threshold (Saharia 2022), or "none"
SAMPLES = 1000       # pictures drawn for the numbers of the last report; the others use a fifth
SWEEP = (1.0, 2.0, 3.0, 6.0)  # guidance scales of the sweep picture
EVAL_EVERY = 40      # epochs between reports (pictures and metrics in epoch_NNNN/)
KEEP_EVERY = 0       # also keep epoch_NNNN.pt every so many epochs, a multiple of EVAL_EVERY; 0 = never
SAVE_SECONDS = 60.0  # between saves of last.pt
PRECISION = "auto"   # "bf16", "fp32"; auto = bf16 where the hardware multiplies it
COMPILE = False      # torch.compile: worth it for runs of an hour and more
INIT_FROM = ""       # fine-tune: start from this checkpoint's EMA weights with a fresh optimizer (then LR/10)
TENSORBOARD = False  # needs the optional package tensorboard
SEED = 0
OUT = "runs"         # the run goes to OUT/stl10
RESUME = True        # continue OUT/stl10 when its settings agree; False moves it aside


# ---------------------------------------------------------------- data
def load_data(folder, device):
    """Pictures as uint8 (N, 3, SIZE, SIZE) and labels (N,) on the device: x, y to train on, val held out of
    the training split by a fixed hash, test for Frechet and friends only. Raises ValueError or OSError."""
    (x, y), (test_x, test_y) = (stl10.load(folder, split, SIZE) for split in ("train", "test"))
    held_out = stl10.validation_mask(y)
    # shuffled once: a data set stored class by class must not make "the first N pictures" mean one class
    order, test_order = (np.random.default_rng(0).permutation(len(labels)) for labels in (y, test_y))
    x, y, held_out = x[order], y[order], held_out[order]
    test_x, test_y = test_x[test_order], test_y[test_order]
    data = SimpleNamespace(names=stl10.class_names(folder), hash=stl10.data_hash(folder))
    parts = dict(x=x[~held_out], y=y[~held_out], val_x=x[held_out][:500], val_y=y[held_out][:500],
                 test_x=test_x, test_y=test_y)
    if OVERFIT_TINY:
        few_x, few_y = x[:OVERFIT_TINY], y[:OVERFIT_TINY]
        parts |= dict(x=few_x, y=few_y, val_x=few_x, val_y=few_y)  # "held-out" then means "memorised"
    vars(data).update({k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in parts.items()})
    return data


def data_folder():
    """Where DATA lies; the embedded set is drawn on first use."""
    if DATA != "embedded":
        return Path(DATA)
    folder = Path(OUT) / "cache" / "stl10_embedded"
    stl10.make(folder)
    return folder


def to_float(u8):
    """uint8 pictures -> floats in [-1, 1]."""
    return u8.float() / 127.5 - 1


def to_picture(x):
    """(..., 3, H, W) in [-1, 1] -> numpy (..., H, W, 3) in [0, 1]."""
    return ((x.float().clamp(-1, 1) + 1) / 2).movedim(-3, -1).cpu().numpy()


def draw_batch(data, step, attempt=0):
    """Everything random about optimizer step `step`, for the whole effective batch of BATCH_SIZE ACCUM
    pictures: x_0 (B, 3, H, W), labels (B,), t (B,), eps like x_0. A function of (SEED, step, attempt) alone,
    so a resumed run repeats an unbroken one, and two processes see what one would. attempt counts rollbacks:
    another window of data."""
    n, null = BATCH_SIZE * ACCUM, len(data.names)
    g = generator_of(SEED, "step", step, attempt)
    index = batch_order(SEED, step, n, len(data.x), attempt)
    x_0, labels = to_float(data.x[index]), data.y[index]
    if not OVERFIT_TINY:
        flip = torch.rand(n, generator=g) < 0.5
        x_0 = torch.where(flip.to(x_0.device)[:, None, None, None], x_0.flip(-1), x_0)
    dropped = torch.rand(n, generator=g) < LABEL_DROP
    labels = torch.where(dropped.to(labels.device), null, labels)
    # stratified over the batch: one t in each n-th of [0.001, 1], in random order
    t = 0.001 + 0.999 * (torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n
    eps = torch.randn(x_0.shape, generator=g)
    return x_0, labels, t.to(x_0.device), eps.to(x_0.device)


# ---------------------------------------------------------------- model
def build_model(classes):
    """The U-Net with a label table of classes + 1 rows; the last row is null."""
    return UNet(channels=3, dims=2, width=WIDTH, mults=MULTS, blocks=BLOCKS, attention=ATTENTION,
                classes=classes + 1, patch=PATCH, dropout=DROPOUT, film=FILM)


class Judge(nn.Module):
    """A small classifier: the only opinion on pictures in this file.
    x (B, 3, H, W) in [-1, 1] -> logits (B, K)."""

    def __init__(self, classes):
        super().__init__()
        def conv(a, b, stride=1):
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.body = nn.Sequential(conv(3, 32), conv(32, 48, 2), conv(48, 64), conv(64, 96, 2), conv(96, 64))
        self.head = nn.Linear(64, classes)

    def features(self, x):
        """(B, 64): what the Frechet distance and its relatives compare."""
        if x.shape[-1] > 48:
            x = F.interpolate(x, size=48, mode="area")
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def train_judge(data, folder, device, steps=600, batch=64, lr=4e-3):
    """Train the judge on the training pictures (flips, shifts, label smoothing), or load it from the cache:
    once for each data set and size. Half a minute on two CPU cores."""
    few = f"_{OVERFIT_TINY}" if OVERFIT_TINY else ""  # its judge must not stay for the run on all pictures
    judge, path = Judge(len(data.names)).to(device).eval(), folder / f"judge_{data.hash}_{SIZE}{few}.pt"
    if common.intact(path):
        judge.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return judge
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for m in judge.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        judge.train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
        for step in tqdm(range(steps), desc="judge", leave=False, disable=None):
            index = torch.randint(len(data.x), (batch,)).to(device)
            x, shift = to_float(data.x[index]), torch.randint(-(SIZE // 16), SIZE // 16 + 1, (2,)).tolist()
            x = torch.where((torch.rand(batch) < 0.5).to(device)[:, None, None, None], x.flip(-1), x)
            x = F.pad(x, [SIZE // 16] * 4, mode="replicate").roll(shift, (2, 3))[
                ..., SIZE // 16:SIZE // 16 + SIZE, SIZE // 16:SIZE // 16 + SIZE]
            loss = F.cross_entropy(judge(x), data.y[index], label_smoothing=0.05)
            optimizer.param_groups[0]["lr"] = lr_at(step, steps, lr)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    temporary = path.with_suffix(".tmp")
    torch.save(judge.state_dict(), temporary)
    temporary.replace(path)
    return judge.eval()


@torch.no_grad()
def judged(judge, x):
    """Features (N, 64) and class probabilities (N, K) of pictures in [-1, 1]."""
    features = torch.cat([judge.features(part) for part in x.split(256)])
    return features, judge.head(features).softmax(1)


# ---------------------------------------------------------------- method: schedule and loss
def schedule(t):
    """a(t), s(t) in float64 for t in [0, 1], any shape. cosine: a = cos(pi t / 2), exactly no signal at t = 1
    (Nichol & Dhariwal 2021 without the offset). linear: DDPM's betas 1e-4 .. 0.02 over 1000 steps in
    continuous time, log a = -(0.1 t + 9.95 t^2)/2 (Song 2021, eq. 33). SHIFT multiplies s/a (Hoogeboom
    2023, eq. 3)."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if SCHEDULE == "cosine":
        a, s = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        a = torch.where(t == 1, torch.zeros_like(a), a)
    else:
        log_a2 = -(0.1 * t + 9.95 * t**2)
        a, s = torch.exp(log_a2 / 2), torch.sqrt(-torch.expm1(log_a2))
    norm = torch.sqrt(a**2 + (SHIFT * s) ** 2)
    return a / norm, SHIFT * s / norm


def time_of(q):
    """The inverse: t where s/a = q."""
    q = torch.as_tensor(q, dtype=torch.float64) / SHIFT
    if SCHEDULE == "cosine":
        return 2 / math.pi * torch.atan(q)
    return (-0.1 + torch.sqrt(0.01 + 4 * 9.95 * torch.log1p(q**2))) / (2 * 9.95)


def loss_fn(model, x_0, labels, t, eps, weighted=True):
    """The v-loss of each picture, (B,): x_0, eps (B, C, H, W); labels (B,) with null for none; t (B,) in
    (0, 1]. weighted=False leaves MIN_SNR out: what is measured stands beside floors that have no weights."""
    a, s = (c.to(x_0)[:, None, None, None] for c in schedule(t.cpu()))
    x_t = a * x_0 + s * eps
    v = a * eps - s * x_0
    loss = (model(x_t, t, labels).float() - v).square().flatten(1).mean(1)
    if MIN_SNR and weighted:  # clamped below, or t near 1 would not be trained at all (Hang 2023)
        snr = (a / s).square().flatten().clamp(min=0.05)
        loss = loss * snr.clamp(max=MIN_SNR) / (snr + 1)
    return loss


# ---------------------------------------------------------------- sampling
def guided_x_0(model, x, t, labels, w):
    """x_0_hat (B, C, H, W) of x at time t (float), guided and clipped. w (B,) guidance per picture."""
    a, s = (float(c) for c in schedule(t))
    times, (low, high) = torch.full((len(x),), t, device=x.device), GUIDANCE_INTERVAL
    with autocast(x.device, PRECISION):
        if not low < s / max(a, 1e-12) <= high or bool((w == 1).all()):
            x_0 = a * x - s * model(x, times, labels).float()
        else:
            null = torch.full_like(labels, model.null)
            both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, null]))
            v, v_null = both.float().chunk(2)
            x_0, x_0_null = a * x - s * v, a * x - s * v_null
            guided = x_0_null + w[:, None, None, None] * (x_0 - x_0_null)
            ratio = x_0.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            x_0 = RESCALE * guided * ratio + (1 - RESCALE) * guided if RESCALE else guided
    if CLIP_X0 == "clip":
        return x_0.clamp(-1, 1)
    if CLIP_X0 == "dynamic":
        m = x_0.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
        return x_0.clamp(-m, m) / m
    return x_0


@torch.no_grad()
def sample(model, labels, seeds, w=None, start=None, trajectory=False, chunk=64):
    """
    THE sampler: the loop, the metrics, every picture and sample.py come here.

    labels  (N,) int64, null (= number of classes) for no label
    seeds   N ints: one generator a picture, so a picture does not depend on its batch
    w       guidance, float or (N,): one scale for each picture; default GUIDANCE
    start   (x_t (N, C, H, W), t): begin there instead of pure noise at t = 1
    Returns x_0 (N, C, H, W), in [-1, 1] unless CLIP_X0="none"; with trajectory=True also the list of
    (t, x_t, x_0_hat) along the way.
    Raises ValueError for t outside (0, 1].
    """
    t_first = 1.0 if start is None else float(start[1])
    if not 0 < t_first <= 1:
        raise ValueError(f"t must lie in (0, 1], got {t_first}")
    w = torch.as_tensor(GUIDANCE if w is None else w, dtype=torch.float32).expand(len(labels))
    pieces, path = [], []
    for i in range(0, len(labels), chunk):
        part = slice(i, i + chunk)
        shape = (3, SIZE, SIZE) if start is None else start[0].shape[1:]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[part]]
        device = labels.device

        def noise():
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        x = noise() if start is None else start[0][part].clone()
        walk = solve_heun if SOLVER == "heun" else solve
        steps = list(walk(model, x, t_first, labels[part], w[part].to(device), noise))
        pieces.append(steps[-1][2])
        if trajectory:
            path.append(steps)
    x_0 = torch.cat(pieces)
    if trajectory:  # join the chunks: one list of (t, x_t, x_0_hat)
        return x_0, [(same[0][0], *(torch.cat([p[k] for p in same]) for k in (1, 2))) for same in zip(*path)]
    return x_0


def solve(model, x, t_first, labels, w, noise):
    """Walk the uniform grid t_i = t_first (1 - i/STEPS); yields (t, x_t, x_0_hat), the last x_0_hat is the
    sample. ddim: the update of the head docstring; eps_hat comes from the clipped x_0_hat, so x_t stays
    consistent. dpm++: DPM-Solver++(2M) (Lu 2022, algorithm 2), l = log(a/s); at t = 1 l is -inf and the
    formulas fall back to first order by themselves."""
    grid = [t_first * (1 - i / STEPS) for i in range(STEPS + 1)]
    x_0_before, h_before = None, None
    for t, u in zip(grid, grid[1:]):
        (a, s), (a_u, s_u) = ([float(c) for c in schedule(p)] for p in (t, u))
        x_0 = guided_x_0(model, x, t, labels, w)
        yield t, x, x_0
        if u == 0:
            return
        if SOLVER == "ddim":
            S = ETA * s_u / s * math.sqrt(max(0.0, 1 - (a / a_u) ** 2))
            x = a_u * x_0 + math.sqrt(max(0.0, s_u**2 - S**2)) * (x - a * x_0) / s
            if S > 0:
                x = x + S * noise()
        else:
            h = math.log(a_u / s_u) - (math.log(a / s) if a > 0 else -math.inf)
            D = x_0
            if x_0_before is not None:
                c = h / (2 * h_before)  # 1/(2p) with p = h_before/h; 0 after the infinite first step
                D = (1 + c) * x_0 - c * x_0_before
            x = s_u / s * x - a_u * math.expm1(-h) * D
            x_0_before, h_before = x_0, h


def solve_heun(model, x, t_first, labels, w, noise):
    """Heun's second-order steps of dy/dq = (y - x_0_hat)/q in y = x/a, q = s/a over STEPS noise levels, then
    0 (Karras 2022, algorithm 1 without churn, eq. 5 with rho = 7, q from 80 to 0.002): 2 STEPS - 1 model
    evaluations, where the last one is the sample."""
    a, s = (float(c) for c in schedule(t_first))
    top = min(80.0, s / a) if a > 0 else 80.0
    ramp = [i / max(1, STEPS - 1) for i in range(STEPS)]
    q = [((1 - r) * top ** (1 / 7) + r * 0.002 ** (1 / 7)) ** 7 for r in ramp] + [0.0]
    y = x * math.sqrt(1 + q[0] ** 2) if a == 0 or s / a > 80 else x / a

    def x_0_hat(y, q):
        return guided_x_0(model, y / math.sqrt(1 + q**2), float(time_of(q)), labels, w)

    for q_t, q_u in zip(q, q[1:]):
        x_0 = x_0_hat(y, q_t)
        yield float(time_of(q_t)), y / math.sqrt(1 + q_t**2), x_0
        slope = (y - x_0) / q_t
        step = y + (q_u - q_t) * slope
        if q_u > 0:
            slope = (slope + (step - x_0_hat(step, q_u)) / q_u) / 2
            step = y + (q_u - q_t) * slope
        y = step
    yield 0.0, y, y  # the last Euler step lands on x_0_hat itself


# ---------------------------------------------------------------- evaluation
def trivial_losses(data):
    """Held-out v-loss in 10 buckets of t of predictors without a network. Zero: E v^2 = a^2 + s^2 E x_0^2.
    Linear: the denoiser of a Gaussian with the training mean and covariance; along a principal axis of
    variance lam it is x_0_hat = mean + k (x_t - a mean), k = a lam / (a^2 lam + s^2)."""
    x, val = (to_float(u.cpu()).flatten(1).double() for u in (data.x[:2000], data.val_x))
    mean, pixels = x.mean(0), x.shape[1]
    values, vectors = torch.linalg.eigh((x - mean) @ (x - mean).T / len(x))  # N x N, not pixels x pixels
    keep = values > 1e-6 * values.max()
    axes = (x - mean).T @ vectors[:, keep] / (values[keep] * len(x)).sqrt()  # (pixels, rank), orthonormal
    seen = ((val - mean) @ axes).square().mean(0)  # held-out power along each axis; the rest is spread evenly
    missed = ((val - mean).square().sum(1).mean() - seen.sum()).clamp(min=0) / max(1, pixels - len(seen))
    power = torch.cat([seen, missed.expand(pixels - len(seen))])
    lam = torch.cat([values[keep], torch.zeros(pixels - len(seen))]) + 2e-4  # a floor for the rest
    t = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    a, s = (c[:, None] for c in schedule(t))
    k = a * lam / (a**2 * lam + s**2)  # (200, pixels)
    linear = ((1 - a * k) ** 2 * power + (k * s) ** 2).mean(1) / s[:, 0] ** 2  # |v error| = |x_0 error| / s
    zero = a[:, 0] ** 2 + s[:, 0] ** 2 * val.square().mean()
    return (row.view(10, 20).mean(1).numpy() for row in (zero, linear))


def gaussian_pictures(data, count):
    """Draws from one Gaussian with full covariance per class, and their labels. No shapes, yet the judge
    calls most of them right: class accuracy alone proves nothing."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(data.names)
    x = torch.empty(count, *data.x.shape[1:])
    for k in range(len(data.names)):
        own = to_float(data.x[data.y == k if int((data.y == k).sum()) > 1 else slice(2)]).cpu()
        z = torch.randn(int((labels == k).sum()), len(own), generator=g)  # mixes the class's own deviations
        x[labels == k] = own.mean(0) + torch.tensordot(z, own - own.mean(0), 1) / math.sqrt(len(own) - 1)
    return x.clamp(-1, 1).to(data.x.device), labels.to(data.x.device)


def reference(data, judge):
    """The rows that stand beside every number, computed once a run: losses of the trivial predictors, and the
    judge's features and accuracy on held-out real, training and Gaussian pictures."""
    def accuracy(probabilities, labels):
        return float((probabilities.argmax(1) == labels).float().mean())

    zero, linear = trivial_losses(data)
    count = len(data.test_x)
    soup, soup_labels = gaussian_pictures(data, count)
    test, on_test = judged(judge, to_float(data.test_x))
    gaussian, on_gaussian = judged(judge, soup)
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))[:count]
    train, _ = judged(judge, to_float(data.x[order.to(data.x.device)]))
    return SimpleNamespace(zero=zero, linear=linear, test=test, train=train, soup=gaussian,
                           accuracy=accuracy(on_test, data.test_y),
                           soup_accuracy=accuracy(on_gaussian, soup_labels))


@torch.no_grad()
def losses_by_t(model, data, count=500):
    """v-loss on held-out pictures in 10 buckets of t, the same t and eps for three label choices: (3, 10)
    array of the right label, null, and a wrong label. Rows 2 - 1 and 3 - 1 say what a label is worth."""
    g = generator_of(SEED, "val")
    x_0, y, K = to_float(data.val_x[:count]), data.val_y[:count], len(data.names)
    wrong = (y + 1 + torch.randint(K - 1, (len(y),), generator=g).to(y.device)) % K if K > 1 else y
    table = torch.zeros(3, 10, dtype=torch.float64)
    for bucket in range(10):
        t = (bucket + (torch.randperm(len(y), generator=g) + torch.rand(len(y), generator=g)) / len(y)) / 10
        t, eps = t.clamp(min=0.001).to(x_0.device), torch.randn(x_0.shape, generator=g).to(x_0.device)
        for row, labels in enumerate((y, torch.full_like(y, K), wrong)):
            with autocast(x_0.device, PRECISION):
                parts = zip(*(z.split(64) for z in (x_0, labels, t, eps)))
                losses = [loss_fn(model, *part, weighted=False) for part in parts]
            table[row, bucket] = torch.cat(losses).double().mean().cpu()
    return table.numpy()


def flat(x, side=32):
    """Pictures as vectors for nearest neighbours, at most 32 px a side: a copy stays a copy."""
    return (F.interpolate(x, size=side, mode="area") if x.shape[-1] > side else x).flatten(1)


def sharpness(x):
    """Mean absolute difference of neighbouring pixels: blur lowers it, noise and over-guidance raise it."""
    return float((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean())


def saturation(x):
    """Share of values at the end of the range: too much guidance drives colours there."""
    return float((x.abs() > 0.95).float().mean())


def evaluate(model, data, judge, ref, count):
    """Every number on `count` samples of the EMA model, beside its floor (trivial predictor) and ceiling
    (real pictures: training against test, the judge on test). Returns (metrics, arrays for the pictures)."""
    K, device = len(data.names), data.x.device
    table = losses_by_t(model, data)
    gain, wrong_gap = table[1] - table[0], table[2] - table[0]
    labels = torch.arange(count, device=device) % K
    x = sample(model, labels, [seed_of(SEED, "metrics", i) for i in range(count)])
    features, probabilities = judged(judge, x)
    confusion = torch.zeros(K, K, dtype=torch.int64).index_put_(
        (labels.cpu(), probabilities.argmax(1).cpu()), torch.tensor(1), accumulate=True)
    accuracy = float(confusion.diag().sum()) / count

    n = min(count, len(ref.test), len(ref.train))  # equal on both sides: the bias of Frechet depends on it
    fake, real, train, soup = features[:n], ref.test[:n], ref.train[:n], ref.soup[:n]
    p, p_soup, p_real = prdc(real, fake), prdc(real, soup), prdc(real, train)
    kids = [kid(real, other) for other in (fake, soup, train)]
    train_x, real_x = to_float(data.x), to_float(data.test_x)
    both = torch.cat([flat(train_x), flat(train_x.flip(-1))])  # a mirrored copy is a copy
    copies = memorisation(flat(x), both, flat(real_x), copies=2)

    def row(value, floor, ceiling, better, n=n):
        return dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    metrics = dict(
        val_loss=row(table[0].mean(), ref.zero.mean(), None, "lower", len(data.val_x)),
        val_loss_linear=row(ref.linear.mean(), ref.zero.mean(), None, "lower", len(data.val_x)),
        class_accuracy=row(accuracy, 1 / K, ref.accuracy, "higher", count),
        class_accuracy_gaussian=row(ref.soup_accuracy, 1 / K, ref.accuracy, "higher", len(ref.soup)),
        frechet=row(frechet(real, fake), frechet(real, soup), frechet(real, train), "lower"),
        kid=row(kids[0][0], kids[1][0], kids[2][0], "lower"),
        **{k: row(p[k], p_soup[k], p_real[k], "higher") for k in p},
        label_gain=row(gain.mean(), 0.0, None, "higher", len(data.val_x)),
        label_gain_min=row(gain[3:].min(), 0.0, None, "higher", len(data.val_x)),
        wrong_label_gap=row(wrong_gap.mean(), 0.0, None, "higher", len(data.val_x)),
        memorised=row(copies["memorised"], 1.0, 0.01, "lower", count),
        memorised_ratio=row(copies["ratio"], 1.0, None, "lower", count),
        authentic=row(copies["authentic"], 0.0, None, "higher", count),
        mann_whitney_z=row(copies["mann_whitney_z"], None, 0.0, "higher", count),
        sharpness=row(sharpness(x) / sharpness(real_x), 0.0, 1.0, "near ceiling", count),
        saturation=row(saturation(x), None, saturation(real_x), "near ceiling", count))
    return metrics, SimpleNamespace(x=x, labels=labels, table=table, confusion=confusion.numpy(),
                                    features=features)


# ---------------------------------------------------------------- pictures
def recipe():
    """One line for every title: how these pictures were drawn."""
    eta = f" eta {ETA:g}" if SOLVER == "ddim" else ""
    low, high = GUIDANCE_INTERVAL
    return f"EMA, {SIZE} px, {SOLVER}{eta} {STEPS} steps, w {GUIDANCE:g} for s/a in ({low:g}, {high:g}]"


def report(folder, model, data, judge, ref, epoch, count, log=None, board=None):
    """All metrics and diagnostics of one epoch: PNG for people, NPY for programs. Deterministic, and the
    global RNG is not used: a report changes nothing in training, and inference_full repeats it bit for bit.
    Returns the metrics."""
    metrics, arrays = evaluate(model, data, judge, ref, count)
    folder.mkdir(parents=True, exist_ok=True)
    common.save_metrics(None, folder, metrics)
    np.save(folder / "samples_u8.npy", ((arrays.x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())
    draw_grid(folder, model, data, judge, epoch, metrics)
    draw_collage(folder, model, data, epoch)
    draw_reconstructions(folder, model, data, epoch)
    draw_one_step(folder, model, data, epoch)
    draw_loss_by_t(folder, arrays.table, ref, epoch)
    draw_sweep(folder, model, data, judge, ref, epoch, max(10, count // 10))
    draw_neighbours(folder, arrays, data, epoch)
    draw_labels(folder, model, data, epoch)
    draw_features(folder, arrays, ref, epoch)
    draw_confusion(folder, arrays.confusion, data, metrics, epoch)
    draw_schedule(folder)
    if log is not None and log.exists() and log.stat().st_size:
        rows = common.read_log(log)
        seen = rows["step"] <= epoch * steps_per_epoch(data)  # an older checkpoint: the curves up to there
        draw_curves(folder, {k: v[seen] for k, v in rows.items()}, ref, epoch)
    if board is not None:
        for name, m in metrics.items():
            board.add_scalar(f"eval/{name}", m["value"], epoch)
        board.add_image("grid", plt.imread(folder / "grid.png")[..., :3], epoch, dataformats="HWC")
        board.add_embedding(model.label.weight, [*data.names, "null"], global_step=epoch, tag="labels")
        board.flush()
    return metrics


def draw_grid(folder, model, data, judge, epoch, metrics, seeds=8):
    """Class x seed matrix: the same noises in every row, so what differs down a column is the label alone.
    Titles: what the judge sees, and how sure it is. The last row has no label."""
    K, device = len(data.names), data.x.device
    labels = torch.arange(K + 1, device=device).repeat_interleave(seeds)
    x = sample(model, labels, [seed_of(SEED, "grid", i) for i in range(seeds)] * (K + 1))
    features, probabilities = judged(judge, x)
    best = probabilities.max(1)
    titles = [f"{data.names[k]} {p:.2f}" for p, k in zip(best.values.tolist(), best.indices.tolist())]
    by_label = features.view(K + 1, seeds, -1)[:K]
    across_labels, across_seeds = (by_label.var(d, correction=0).mean() for d in (0, 1))
    ratio = across_labels.sum() / across_seeds.sum().clamp(min=1e-12)
    figure = tile(to_picture(x).reshape(K + 1, seeds, *x.shape[2:], 3), rows=[*data.names, "no label"],
                  titles=np.array(titles).reshape(K + 1, seeds), columns=[f"seed {i}" for i in range(seeds)],
                  title=f"epoch {epoch}: {recipe()}; class accuracy {metrics['class_accuracy']['value']:.2f}"
                        f"; variance over labels / over seeds {ratio:.2f}")
    save_artifact(folder, "grid", x.cpu(), figure)


def draw_collage(folder, model, data, epoch, columns=10):
    """Denoising: a class a row, time runs from noise to data; upper lines x_t, lower lines
    the one-step guess x_0_hat."""
    K = len(data.names)
    labels = torch.arange(K, device=data.x.device)
    _, path = sample(model, labels, [seed_of(SEED, "collage", i) for i in range(K)], trajectory=True)
    chosen = [path[round(i * (len(path) - 1) / (columns - 1))] for i in range(columns)]
    stack = torch.stack([torch.stack(step[1:]) for step in chosen], dim=2)  # (2, K, columns, C, H, W)
    rows = stack.transpose(0, 1).flatten(0, 1)  # x_t and x_0_hat of a class below each other
    figure = tile(to_picture(rows), cell=0.7,
                  rows=[n for name in data.names for n in (f"{name}  x_t", "x_0_hat")],
                  columns=[f"t={t:.2f}" for t, _, _ in chosen], title=f"epoch {epoch}: denoising, {recipe()}")
    save_artifact(folder, "collage", stack.cpu(), figure)


def draw_reconstructions(folder, model, data, epoch, count=8, t_one=0.8, sweep=(.2, .4, .6, .8, .9, 1.)):
    """Noise a held-out picture to t, then denoise it. recon: at one t, with the one-step guess. recon_sweep:
    over t; at t = 1 nothing of the original is left, so that column is plain generation."""
    x_0, y = to_float(data.val_x[:count]), data.val_y[:count]
    seeds = [seed_of(SEED, "recon", i) for i in range(len(y))]
    g = generator_of(SEED, "recon noise")
    eps = torch.randn(x_0.shape, generator=g).to(x_0.device)
    results = {}
    for t in sorted({*sweep, t_one}):
        a, s = (float(c) for c in schedule(t))
        x_t = a * x_0 + s * eps
        out, path = sample(model, y, seeds, start=(x_t, t), trajectory=True)
        results[t] = (a, x_t, path[0][2], out)

    def correlation(x):
        pair = [z.flatten(1) - z.flatten(1).mean(1, keepdim=True) for z in (x_0, x)]
        return F.cosine_similarity(*pair, dim=1)

    def quality(x):
        return [f"{p:.1f} dB r {c:.2f}" for p, c in zip(psnr(x, x_0, 2.0).tolist(), correlation(x).tolist())]

    a, x_t, guess, out = results[t_one]
    rows = torch.stack([x_0, x_t, guess, out])
    titles = [[data.names[k] for k in y.tolist()], [""] * len(y), quality(guess), quality(out)]
    save_artifact(folder, "recon", rows.cpu(), tile(
        to_picture(rows), titles=titles, rows=["original", f"x_t, t={t_one}", "one step", "sampled"],
        title=f"epoch {epoch}: reconstruction from t = {t_one}, a = {a:.3f}; {recipe()}"))
    rows = torch.stack([x_0] + [results[t][3] for t in sweep], dim=1)
    kept = {t: correlation(results[t][3]).mean() for t in sweep}
    names = ["original"] + [f"t={t:g} r {kept[t]:.2f}" if t < 1 else "t=1: generation" for t in sweep]
    save_artifact(folder, "recon_sweep", rows.cpu(), tile(
        to_picture(rows), rows=[data.names[k] for k in y.tolist()], columns=names,
        title=f"epoch {epoch}: noised to t and sampled back; mean correlation r; {recipe()}"))


def draw_one_step(folder, model, data, epoch):
    """x_0_hat at t = 1 with each label beside the mean picture of that class, which is the right answer
    there: the quickest check that high noise is trained and labels are used."""
    K, device = len(data.names), data.x.device
    noise = torch.randn(data.x.shape[1:], generator=generator_of(SEED, "one step"))
    x = noise.to(device).expand(K, -1, -1, -1)
    with torch.no_grad():
        guess = guided_x_0(model, x, 1.0, torch.arange(K, device=device), torch.ones(K, device=device))
    mean = torch.stack([to_float(data.x[data.y == k]).mean(0).nan_to_num() for k in range(K)])
    r = F.cosine_similarity(guess.flatten(1) - guess.mean(), mean.flatten(1) - mean.mean(), dim=1)
    rows = torch.stack([guess, mean])
    save_artifact(folder, "onestep", rows.cpu(), tile(
        to_picture(rows), rows=["x_0_hat at t=1", "class mean"],
        columns=[f"{name} r {c:.2f}" for name, c in zip(data.names, r.tolist())],
        title=f"epoch {epoch}: one step from pure noise beside the class mean picture, no guidance"))


def draw_loss_by_t(folder, table, ref, epoch):
    """Held-out loss in ten buckets of t beside the zero and the linear predictor, and what a
    label is worth."""
    middle = (np.arange(10) + 0.5) / 10
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(middle, ref.zero, ":", color="gray", label=f"zero predictor {ref.zero.mean():.3f}")
    left.plot(middle, ref.linear, "--", color="tab:orange", label=f"linear {ref.linear.mean():.3f}")
    left.plot(middle, table[0], "o-", label=f"model {table[0].mean():.4f}")
    left.set(yscale="log", xlabel="t (0 data, 1 noise)", ylabel="held-out v-loss", title=f"epoch {epoch}")
    right.axhline(0, color="gray", lw=0.8)
    right.plot(middle, table[1] - table[0], "o-", label="L(no label) - L(label)")
    right.plot(middle, table[2] - table[0], "s-", label="L(wrong label) - L(label)")
    right.set(xlabel="t", title="label gain: above 0 the label is used")
    right.set_yscale("symlog", linthresh=1e-3)
    left.legend(fontsize=8), right.legend(fontsize=8), figure.tight_layout()
    save_artifact(folder, "loss_by_t", np.concatenate([table, ref.zero[None], ref.linear[None]]), figure)


def draw_sweep(folder, model, data, judge, ref, epoch, count):
    """Guidance against quality: accuracy and precision keep rising with w while recall falls and
    colours saturate."""
    K, rows, pictures = len(data.names), [], []
    labels = torch.arange(count, device=data.x.device) % K
    seeds = [seed_of(SEED, "sweep", i) for i in range(count)]
    n = min(count, len(ref.test))
    for w in SWEEP:
        x = sample(model, labels, seeds, w=w)
        features, probabilities = judged(judge, x)
        p = prdc(ref.test[:n], features[:n])
        accuracy = float((probabilities.argmax(1) == labels).float().mean())
        rows.append([w, accuracy, frechet(ref.test, features), p["precision"], p["recall"], saturation(x)])
        pictures.append(x[:min(K, count)])
    rows = np.array(rows)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    axes[0].plot(rows[:, 0], rows[:, 1], "o-", label="class accuracy")
    axes[0].plot(rows[:, 0], rows[:, 3], "s-", label="precision")
    axes[0].plot(rows[:, 0], rows[:, 4], "^-", label="recall")
    axes[0].axhline(ref.accuracy, ls=":", color="gray", label="accuracy on real")
    axes[1].plot(rows[:, 0], rows[:, 2], "o-", label=f"Frechet, {count} samples")
    real, soup = (frechet(ref.test, other[:count]) for other in (ref.train, ref.soup))
    axes[1].axhline(real, ls=":", color="gray", label=f"{count} real pictures")
    axes[1].axhline(soup, ls="--", color="tab:orange", label="Gaussian per class")
    axes[2].plot(rows[:, 0], rows[:, 5], "o-", label="share of |x| > 0.95")
    axes[2].axhline(saturation(to_float(data.test_x)), ls=":", color="gray", label="real")
    for ax in axes:
        ax.set(xlabel="guidance w", xscale="log", xticks=list(SWEEP), xticklabels=[f"{w:g}" for w in SWEEP])
        ax.minorticks_off()
        ax.legend(fontsize=7)
    axes[1].set(yscale="log")
    figure.suptitle(f"epoch {epoch}: guidance sweep, {recipe().split(', w')[0]}", fontsize=9)
    figure.tight_layout()
    save_artifact(folder, "sweep", rows, figure)
    stack = torch.stack(pictures)
    save_artifact(folder, "sweep_pictures", stack.cpu(), tile(
        to_picture(stack), rows=[f"w {w:g}" for w in SWEEP], columns=list(data.names)[:stack.shape[1]],
        title=f"epoch {epoch}: the same noises under growing guidance"))


def draw_neighbours(folder, arrays, data, epoch, count=8, k=3):
    """The samples most like a training picture beside their nearest ones: copying would show here."""
    both = torch.cat([to_float(data.x), to_float(data.x).flip(-1)])
    distance, index = (z.cpu() for z in nearest(flat(arrays.x), flat(both), k=min(2 * k, len(both))))
    order, pictures, titles = distance[:, 0].argsort()[:count].tolist(), [], []
    for i in order:
        found = {}
        for d, n in zip(distance[i].tolist(), index[i].tolist()):
            found.setdefault(n % len(data.x), (d, n))  # a picture and its mirror image count once
        found = list(found.values())[:k]
        pictures.append(torch.stack([arrays.x[i], *(both[n] for _, n in found)]))
        titles.append([data.names[arrays.labels[i]], *(f"{d:.3f}" for d, _ in found)])
    rows = torch.stack(pictures)  # (count, 1 + k, C, H, W)
    save_artifact(folder, "neighbours", rows.cpu(), tile(
        to_picture(rows), titles=titles, columns=["sample"] + [f"train {i + 1}" for i in range(k)],
        title=f"epoch {epoch}: closest of {len(arrays.x)}; rms distance"))


def tsne(x, perplexity, steps=500, rate=None):
    """Exact t-SNE (van der Maaten & Hinton 2008) of x (N, d) -> (N, 2), deterministic: starts from PCA."""
    n = len(x)
    square = ((x[:, None] - x[None]) ** 2).sum(-1)
    conditional = np.zeros((n, n))
    for i in range(n):
        low, high, others = 1e-12, 1e12, np.delete(square[i], i)
        for _ in range(60):  # bisection on the precision until the entropy is log(perplexity)
            beta = math.sqrt(low * high)
            p = np.exp(-(others - others.min()) * beta)
            p /= p.sum()
            entropy = -(p * np.log(p + 1e-300)).sum()
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
        conditional[i, np.arange(n) != i] = p
    p = np.maximum((conditional + conditional.T) / (2 * n), 1e-12)
    y = pca(x)
    y, speed = 1e-2 * y / max(y.std(), 1e-12), 0
    for step in range(steps):
        weights = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(-1))
        np.fill_diagonal(weights, 0)
        force = ((4 if step < 100 else 1) * p - weights / weights.sum()) * weights
        gradient = 4 * (force.sum(1)[:, None] * y - force @ y)
        speed = (0.5 if step < 100 else 0.8) * speed - (rate or max(2.0, n / 12)) * gradient
        y = y + speed
    return y


def pca(x):
    """(N, d) -> (N, 2), the first two principal components; the largest entry of each is positive."""
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    y = (u * s)[:, :2]
    return y * np.sign(y[np.abs(y).argmax(0), [0, 1]])


def name_axes(ax, names):
    """Class names along both axes of a matrix picture."""
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)


def draw_labels(folder, model, data, epoch):
    """The label table: PCA and cosines, and the t-SNE of the lab notes, which of eleven points
    alone means little."""
    table = model.label.weight.detach().float().cpu().double().numpy()
    names = [*data.names, "null"]
    centred = table - table.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4))
    flat_map, few = pca(table), min(3, (len(table) - 1) / 3)
    embedded = tsne(table, few)
    for ax, y, title in ((axes[0], flat_map, "PCA: read this one"),
                         (axes[1], embedded, f"t-SNE of only {len(table)} points: distances mean little")):
        ax.scatter(*y.T, c=np.arange(len(y)), cmap="tab20")
        for name, place in zip(names, y):
            ax.annotate(name, place, fontsize=8, xytext=(3, 3), textcoords="offset points")
        ax.set_title(title, fontsize=9), ax.set_xticks([]), ax.set_yticks([]), ax.margins(0.15)
    shown = axes[2].imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
    name_axes(axes[2], names)
    axes[2].set_title("cosines of the centred rows", fontsize=9)
    figure.colorbar(shown, ax=axes[2], shrink=0.8)
    figure.suptitle(f"epoch {epoch}: label embeddings", fontsize=10), figure.tight_layout()
    save_artifact(folder, "labels", np.stack([flat_map, embedded]), figure)


def draw_features(folder, arrays, ref, epoch, count=300):
    """t-SNE of judge features, real beside generated: islands of one kind are missing or invented modes."""
    n = min(count, len(arrays.features), len(ref.test))
    if n < 20:
        return
    both, few = torch.cat([ref.test[:n], arrays.features[:n]]).double().cpu().numpy(), min(30, n / 4)
    y = tsne(both, few, steps=300)
    figure, ax = plt.subplots(figsize=(5.5, 5))
    ax.scatter(*y[:n].T, s=8, color="gray", label="held-out real")
    ax.scatter(*y[n:].T, s=8, c=arrays.labels[:n].cpu(), cmap="tab10", label="generated, by label")
    ax.set_title(f"epoch {epoch}: t-SNE of judge features, perplexity {few:.0f}", fontsize=9)
    ax.set_xticks([]), ax.set_yticks([]), ax.legend(fontsize=8), figure.tight_layout()
    save_artifact(folder, "features", y, figure)


def draw_confusion(folder, confusion, data, metrics, epoch):
    """Asked class against the judge's verdict."""
    figure, ax = plt.subplots(figsize=(5.2, 4.6))
    ax.imshow(confusion / confusion.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for i, line in enumerate(confusion):
        for j, n in enumerate(line):
            if n:
                dark = n > line.sum() / 2
                ax.text(j, i, n, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    name_axes(ax, data.names)
    accuracy = metrics["class_accuracy"]
    ax.set(xlabel="judged as", ylabel="asked for")
    ax.set_title(f"epoch {epoch}: accuracy {accuracy['value']:.3f}, real {accuracy['ceiling']:.3f}", size=9)
    figure.tight_layout()
    save_artifact(folder, "confusion", confusion, figure)


def draw_schedule(folder):
    """a, s and log SNR over t, and where guidance acts."""
    t = np.linspace(0.001, 0.999, 500)
    a, s = (c.numpy() for c in schedule(t))
    figure, ax = plt.subplots(figsize=(5, 3))
    ax.plot(t, a, label="a (signal)"), ax.plot(t, s, label="s (noise)")
    inside = (s / a > GUIDANCE_INTERVAL[0]) & (s / a <= GUIDANCE_INTERVAL[1])
    ax.fill_between(t, 0, 1, where=inside, color="gray", alpha=0.15, label="guidance acts")
    right = ax.twinx()
    right.plot(t, 2 * np.log(a / s), ":", color="gray")
    right.set_ylabel("log SNR (dotted)")
    ax.set(xlabel="t", title=f"{SCHEDULE} schedule, shift {SHIFT:g}")
    ax.legend(fontsize=7), figure.tight_layout()
    save_artifact(folder, "schedule", np.stack([t, a, s]), figure)


def draw_curves(folder, log, ref, epoch):
    """Loss beside its trivial predictors, learning rate and gradient norm over the optimizer steps."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2))
    step, loss = log["step"], log["loss"]
    width = max(1, len(loss) // 100)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    left.plot(step, loss, color="lightgray", lw=0.5)
    left.plot(step[width - 1:], smooth, label=f"train, mean of {width}")
    left.axhline(ref.zero.mean(), ls=":", color="gray", label="zero predictor")
    left.axhline(ref.linear.mean(), ls="--", color="tab:orange", label="linear predictor")
    left.set(yscale="log", xlabel="step", ylabel="v-loss", title=f"epoch {epoch}"), left.legend(fontsize=7)
    middle.plot(step, log["lr"]), middle.set(xlabel="step", title="learning rate")
    right.plot(step, log["grad_norm"], lw=0.5)
    right.set(xlabel="step", yscale="log", title="gradient norm before clipping")
    figure.tight_layout()
    save_artifact(folder, "curves", np.stack([step, loss, log["lr"], log["grad_norm"]]), figure)


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    levels, factor = len(MULTS), PATCH * 2 ** (len(MULTS) - 1)
    choices = dict(SCHEDULE=("cosine", "linear"), SOLVER=("dpm++", "ddim", "heun"),
                   CLIP_X0=("clip", "dynamic", "none"), PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(allowed)}")
    for name in "SIZE EPOCHS BATCH_SIZE ACCUM LR WIDTH BLOCKS PATCH STEPS EVAL_EVERY".split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(MULTS=(1, 64), DROPOUT=(0, 0.99), LABEL_DROP=(0, 1), ETA=(0, 1), EMA_DECAY=(0, 1),
                  WARMUP=(0, 1), WEIGHT_DECAY=(0, 10), CLIP=(1e-9, math.inf), SHIFT=(1e-3, 1e3),
                  SEED=(0, 2**63 - 1), RESCALE=(0, 1))
    for name, (low, high) in ranges.items():
        values = globals()[name]
        if any(not low <= v <= high for v in (values if isinstance(values, tuple) else (values,))):
            fail(f"{name}={values} must lie between {low:g} and {high:g}")
    if not SWEEP or not MULTS or len(GUIDANCE_INTERVAL) != 2:
        fail(f"{SWEEP=} and {MULTS=} need an entry or more, {GUIDANCE_INTERVAL=} needs two")
    if SAMPLES < 10:
        fail(f"SAMPLES={SAMPLES}: the numbers of a report need at least 10 pictures")
    if OVERFIT_TINY and OVERFIT_TINY < 6:
        fail(f"OVERFIT_TINY={OVERFIT_TINY}: the numbers of a report need at least 6 pictures; 0 takes all")
    if SIZE % factor:
        fail(f"SIZE={SIZE} does not divide by {factor}: PATCH={PATCH}, {levels - 1} halvings in {MULTS=}")
    if len(ATTENTION) != levels:
        fail(f"ATTENTION={ATTENTION} needs one True or False for each level of MULTS={MULTS}")
    if any(WIDTH * m % 8 for m in MULTS):
        fail(f"WIDTH={WIDTH} times each of MULTS={MULTS} must be divisible by 8, the groups of the norms")
    if BATCH_SIZE % world:
        fail(f"BATCH_SIZE={BATCH_SIZE} does not divide over {world} processes")


def prepare(device, rank=0, world=1):
    """Data, judge and reference rows: what training and inference_full need (the last two on rank 0 only).
    A mistake in the data ends here, in one line."""
    try:
        if rank == 0:
            data_folder()
        if world > 1:
            torch.distributed.barrier()
        data = load_data(data_folder(), device)
    except (ValueError, OSError) as error:
        fail(error)
    if min(len(data.x), len(data.test_x)) < 6:
        fail(f"DATA={DATA} has {len(data.x)} training and {len(data.test_x)} test pictures, expected 6")
    if rank > 0:
        return data, None, None
    cache = Path(OUT) / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    judge = train_judge(data, cache, device)
    return data, judge, reference(data, judge)


def steps_per_epoch(data):
    return max(1, len(data.x) // (BATCH_SIZE * ACCUM))


def samples_at(step, data):
    """How many pictures a report draws: SAMPLES at the end of the run, a fifth before."""
    return SAMPLES if step >= EPOCHS * steps_per_epoch(data) else max(10, SAMPLES // 5)


def build_ema(checkpoint, device):
    """The averaged model of a checkpoint, ready to sample."""
    model = build_model(checkpoint["classes"]).to(device).eval().requires_grad_(False)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint's EMA")
    return model


def inference_full(checkpoint, folder, log):
    """Redraw every metric and diagnostic of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: from common.load_checkpoint, its settings already put back (sample.py --full does both)."""
    check_settings()
    device = common.pick_device()
    data, judge, ref = prepare(device)
    if checkpoint["data"] != data.hash:
        fail(f"the checkpoint was trained on other data than DATA={DATA} holds now")
    step = checkpoint["step"]
    return report(folder, build_ema(checkpoint, device), data, judge, ref, step // steps_per_epoch(data),
                  samples_at(step, data), log)


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` pictures for each class named in prompt (commas; empty: all and one unlabelled row).
    samples.png to look at, samples.npy floats (N, 3, H, W) in [-1, 1], samples.npz uint8 (N, H, W, 3)."""
    check_settings()
    names, none = list(checkpoint["names"]), "no label"
    asked = [word.strip() for word in prompt.split(",") if word.strip()] or [*names, none]
    unknown = [word for word in asked if word not in (*names, none)]
    if unknown:
        fail(f"unknown class {unknown[0]!r}: one of {', '.join(names)} or '{none}'")
    device = common.pick_device()
    model = build_ema(checkpoint, device)
    labels = torch.tensor([[*names, none].index(word) for word in asked], device=device)
    seeds = [seed_of(seed, "grid", i) for i in range(count)]
    x = sample(model, labels.repeat_interleave(count), seeds * len(asked))
    figure = tile(to_picture(x).reshape(len(asked), count, *x.shape[2:], 3), rows=asked, title=recipe(),
                  columns=[f"seed {i}" for i in range(count)])
    save_artifact(folder, "samples", x.cpu(), figure)
    np.savez_compressed(folder / "samples.npz", (to_picture(x) * 255).round().astype(np.uint8))


def train_step(handle, model, ema, optimizer, guard, data, step, total, run):
    """One optimizer step on the effective batch: forward and backward ACCUM times, clip, guard, step, EMA.
    Returns the mean loss over all pictures of the step, the learning rate and the gradient norm."""
    batch = draw_batch(data, step, guard.rollbacks)
    torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
    model.train()
    lr = lr_at(step, total, LR, WARMUP) * guard.lr_scale
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=run.device)
    for micro in zip(*(part.chunk(ACCUM) for part in batch)):
        with autocast(run.device, PRECISION):
            mine = (part.chunk(run.world)[run.rank] for part in micro)  # each process takes its share
            loss = loss_fn(handle, *mine).mean()
        (loss / ACCUM).backward()
        loss_sum += loss.detach()
    if run.world > 1:
        torch.distributed.all_reduce(loss_sum)
    loss = float(loss_sum) / (ACCUM * run.world)
    norm, taken = guarded_step(optimizer, list(model.parameters()), guard, loss, CLIP)
    if taken:
        ema_update(ema, model, EMA_DECAY, step)
    return loss, lr, norm


def summary(metrics):
    """The one line of a report: each number beside its floor and ceiling."""
    def one(name):
        m = metrics[name]
        beside = [f"{k} {m[k]:.3f}" for k in ("floor", "ceiling") if m[k] is not None]
        return f"{name} {m['value']:.3f} ({', '.join(beside)})"
    return ", ".join(map(one, ("val_loss", "class_accuracy", "frechet", "recall", "label_gain", "memorised")))


def main():
    check_settings(int(os.environ.get("WORLD_SIZE", 1)))
    free = "EPOCHS EVAL_EVERY KEEP_EVERY SAVE_SECONDS TENSORBOARD COMPILE "  # may differ when a run goes on:
    free += "SOLVER STEPS ETA GUIDANCE GUIDANCE_INTERVAL RESCALE CLIP_X0 SAMPLES SWEEP"  # no part in training
    run = start(__file__, globals(), free.split())
    data, judge, ref = prepare(run.device, run.rank, run.world)
    torch.manual_seed(SEED)
    model = build_model(len(data.names)).to(run.device)
    if INIT_FROM and run.checkpoint is None:
        parent = common.load_checkpoint(INIT_FROM, run.device)
        common.load_strictly(model, parent["ema"], f"INIT_FROM={INIT_FROM}")
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True)
    guard = Guard()
    at = SimpleNamespace(step=0, reported=0, best=math.inf, seconds=0.0)  # where the run is
    per_epoch = steps_per_epoch(data)
    total = EPOCHS * per_epoch
    last, log = run.folder / "last.pt", run.folder / "log.csv"

    def save(path):
        return common.save_checkpoint(
            path, run, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            guard=dict(vars(guard)), **vars(at), classes=len(data.names), names=data.names, data=data.hash)

    def save_last():
        """last.pt is also where a rollback goes, so a state that may be diverging is not worth keeping; a
        resumed run comes to the same bits from an older file."""
        return save(last) if guard.healthy or at.step >= total else True

    def restore(saved):
        common.restore(saved, model, ema, optimizer, guard)
        vars(at).update({k: saved[k] for k in vars(at)})

    if run.checkpoint is not None:
        if run.checkpoint["data"] != data.hash:
            fail(f"{run.folder} was trained on other data than DATA={DATA} now; RESUME=False or another OUT")
        restore(run.checkpoint)
        run.checkpoint = None  # frees its copy of the weights
        if run.rank == 0:
            before, now = optimizer.param_groups[0]["lr"], lr_at(at.step, total, LR, WARMUP)
            print(f"continuing after step {at.step} of {total}; learning rate {before:.2g} -> {now:.2g}")
    handle = torch.compile(model) if COMPILE else model  # a second handle: the state_dict keeps its names
    if run.world > 1:
        handle = nn.parallel.DistributedDataParallel(handle)
    board = None
    if run.rank == 0:
        common.open_log(log, at.step)
        board = common.open_tensorboard(run.folder) if TENSORBOARD else None
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{len(data.x)} training pictures of {len(data.names)} classes, {parameters:,} parameters, "
              f"{per_epoch} steps an epoch; loss of the zero predictor {ref.zero.mean():.3f}, of the "
              f"linear one {ref.linear.mean():.3f}; judge's accuracy on held-out pictures {ref.accuracy:.3f}")
        with run.evaluation():  # once, small, before hours are spent: a broken evaluation shows now
            evaluate(ema, data, judge, ref, 10)
        save(last)
    bar = tqdm(total=total, initial=at.step, disable=True if run.rank else None, dynamic_ncols=True)
    losses, saved_at, clock, earlier, written = [], time.monotonic(), time.monotonic(), at.seconds, True

    while not run.stopping():
        epoch = at.step // per_epoch
        due = at.step % per_epoch == 0 and (epoch % EVAL_EVERY == 0 or at.step == total)
        if due and at.step > at.reported:
            if run.rank == 0:
                save_last()
                folder, paused, metrics = run.folder / f"epoch_{epoch:04d}", time.monotonic(), None
                count = samples_at(at.step, data)
                with run.evaluation():
                    metrics = report(folder, ema, data, judge, ref, epoch, count, log, board)
                    facts = dict(seconds=round(at.seconds, 1), parameters=parameters)
                    common.save_metrics(run, folder, metrics, **facts)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue  # the loop ends; the next start draws this report again
            at.reported = at.step
            if run.rank == 0 and metrics is not None:
                tqdm.write(f"epoch {epoch}: {summary(metrics)}")
                if metrics["val_loss"]["value"] < at.best:
                    at.best = float(metrics["val_loss"]["value"])
                    save(run.folder / "best.pt")
                if KEEP_EVERY and epoch % KEEP_EVERY == 0:
                    save(run.folder / f"epoch_{epoch:04d}.pt")
                written = save_last()
            continue
        if at.step >= total:
            break

        loss, lr, norm = train_step(handle, model, ema, optimizer, guard, data, at.step, total, run)
        at.step += 1
        at.seconds = earlier + time.monotonic() - clock
        losses.append(loss)

        if guard.lost:
            common.roll_back(run, guard, restore, at, LR)
            bar.n = at.step
            losses.clear()
            continue
        if run.rank > 0:
            continue
        common.log_row(log, step=at.step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                       skipped=guard.skipped, samples_per_s=BATCH_SIZE * ACCUM * at.step / at.seconds,
                       seconds=at.seconds)
        if board is not None:
            board.add_scalar("train/loss", loss, at.step)
            board.add_scalar("train/lr", lr, at.step)
        bar.update(1)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", lr=f"{lr:.1e}", refresh=False)
        if at.step % per_epoch == 0:
            mean = float(np.mean(losses[-per_epoch:]))
            idle = at.step > 200 and mean > 0.9 * ref.zero.mean() and not MIN_SNR  # that loss is weighted
            tqdm.write(f"epoch {epoch + 1:4d}  loss {mean:.4f} (zero {ref.zero.mean():.3f}, linear "
                       f"{ref.linear.mean():.3f})  lr {lr:.1e}  grad {guard.average:.2f}  "
                       f"skipped {guard.skipped}  {at.seconds:.0f} s"
                       + ("  ALARM: no better than predicting zero" if idle else ""))
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save_last()
            saved_at = time.monotonic()

    bar.close()
    del handle  # a DistributedDataParallel wrapper must not outlive its process group
    common.finish(run)
    if run.signal:
        if run.rank == 0:
            save_last()
            print(f"stopped by signal {run.signal} after step {at.step}; start again to continue", flush=True)
        sys.exit(128 + run.signal)
    if run.rank == 0 and not written:
        fail(f"the run is complete but its last checkpoint is not: make room and start again to write {last}")


if __name__ == "__main__":
    override(globals())
    main()
