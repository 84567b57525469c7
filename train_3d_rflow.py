"""
Rectified flow on medical volumes, in one file: heads with lesions, lesion masks, nine ODE solvers.

    x_t = (1 - t) x_0 + t eps                          t = 0 is data, t = 1 is noise
    v   = eps - x_0                                    L = E |v_hat(x_t, t, condition) - v|^2
    x_0_hat = x_t - t v_hat                            MSE(x_0_hat) = t^2 MSE(v_hat)
    dx/dt = v_hat(x, t)  from 1 down to T_END, then  x_0 = x - T_END v_hat         (Liu 2022; Lipman 2023)
    v_lin = -mu + (t - (1-t) sigma^2) / Q (x_t - (1-t) mu),   Q = (1-t)^2 sigma^2 + t^2
                                                       best linear guess of a voxel; its loss is sigma^2 / Q
    v_hat = v_lin + sigma / sqrt(Q) F((x_t - (1-t) mu) / sqrt(Q), t)     PREDICTION="residual", sigma >= 0.2

    python train_3d_rflow.py                           # drawn heads, image given its mask, 2 CPU cores
    python train_3d_rflow.py EXPERIMENT=masks OUT=runs_seg         # masks with so many lesions of each size
    python train_3d_rflow.py DATA=brains/ SHAPE=96,96,96 MODE=image OUT=runs_brains     # your NIfTI files
    python train_3d_rflow.py SWEEP=all                 # 33 solver settings on the run in OUT: table, picture
    python train_3d_rflow.py SWEEP=euler,heun2 T_END=0 # some of them, to the very end as in the lab notes
    python train_3d_rflow.py EXPERIMENT=exp5_1_cpu OUT=runs_exp5_1   # a row of the lab notes, for a laptop
    python sample.py --checkpoint runs/3d_rflow/last.pt --num-samples 4        # .nii.gz for any viewer

Letters: B volumes in a batch, C channels, D H W = z y x, M mask channels; mu, sigma: of each voxel, over the
training volumes. Masks are 0 and 1, images 0 to 1.
Not here, for a later version: latents, space-to-depth, wavelets, ControlNet, DiffRS, Restart.
"""

import copy
import hashlib
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
from data import volumes
from metrics import bootstrap, frechet, kid, memorisation, ms_ssim, psnr
from model_dit import DiT
from model_unet import UNet

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
DATA = "phantom"     # drawn heads; or a folder of .nii, .nii.gz, .npy, .npz; or one .npz: 70, 10, 20 % of the
#                      subjects, by a hash of their names, train, validate, test
MODE = "bravo"       # image given a mask; "image": no mask; "bravo_seg_cond": given a mask of each label;
#                      "seg": masks; "seg_conditioned", "seg_conditioned_input", "seg_conditioned_improved":
#                      masks given how many lesions of each size (as vectors, input maps, deeper vectors)
SHAPE = (32, 32, 32)  # D, H, W of the volumes; own data are cut or padded around their middle
FIELD = "auto"       # of phantoms: "head" 160x200x200 mm, "crop" 96^3 mm; auto: head for images, else crop
FACTOR = 1           # own data: so many voxels a side become one
LABELS = 1           # own data: the largest label of a mask; 0: there are none
TRAIN = 1024         # phantoms to train on; 32 with EPOCHS=200 to see memorisation
VAL = 32             # phantoms for the loss
TEST = 64            # phantoms for distances
EPOCHS = 6           # passes over the training volumes
BATCH_SIZE = 4       # volumes in a forward pass, over all processes
ACCUM = 1            # forward passes in an optimizer step
LR = 1e-3            # peak; 1e-4 for images and 5e-5 for masks at 128^3 and above
WARMUP = 0.05        # share of the optimizer steps; a thousand of them in long runs
WEIGHT_DECAY = 0.01  # of AdamW
BETA2 = 0.99         # of AdamW; 0.999 lets a burst after quiet times move weights 3 to 7 times too far
CLIP = 0.5           # gradient norm
EMA_DECAY = 0.995    # of the weights we sample from; 0.9999 for long runs
BACKBONE = "unet"    # or "dit", "sit" (the same network; a dit has a second half for a variance, unused here)
WIDTH = 16           # unet: channels of the first level
MULTS = (1, 2, 4)    # unet: channels of each level in units of WIDTH; each level halves the grid
BLOCKS = (1, 1, 1)   # unet: ResBlocks of each level
ATTENTION = (False, False, True)  # unet: self-attention at each level, below 1,000 voxels; the middle has it
PATCH = 1            # unet: 2 lets every convolution see an eighth of the voxels. dit: side of a token, 4
DIM = 192            # dit: width; 384, 768, 1024 are S, B, L
DEPTH = 6            # dit: blocks; 12, 12, 24
HEADS = 6            # dit: 6, 12, 16
DROPOUT = 0.0        # inside the blocks; 0.1 for a hundred volumes and many epochs
CHECKPOINT = False   # unet: less memory for more time, see UNet
PREDICTION = "residual"  # "velocity"; "x0"; residual: velocity as the best linear guess and what it lacks
TIME = "mixture"     # of t in training: "uniform", "logit-normal", or 1/5 and 4/5 of them
SHIFT = 1.0          # t <- SHIFT t / (1 + (SHIFT - 1) t): more noise for larger volumes; try 2 from 64^3 on
T_CLIP = 0.05        # PREDICTION=x0: v is (x_t - x_0_hat) / max(t, this)
COUNT_DROP = 0.15    # share of counts hidden in training, for guidance
AUGMENT = "none"     # "scoreaug": turn, shift, cut x_t and target, and say how (2508.07926); "sda": noisier
SOLVER = "euler"     # euler, midpoint, heun2, heun3, rk4 in STEPS; fehlberg2, bosh3, dopri5, dopri8 adaptive
STEPS = 25           # of a fixed solver
TOLERANCE = 1e-3     # of an adaptive one, absolute and relative
TOGETHER = False     # adaptive: one error norm for the whole batch, as torchdiffeq has it
T_END = 0.02         # where the solver stops: nearer to 0 hardly anything was trained. 0 as in the lab notes
GUIDANCE = 1.0       # w on counts: 1 = none
TRIES = 4            # draws of a mask at most, until its lesions, counted, are those asked for
SAMPLES = 32         # volumes of a report
TSTR = 0             # volumes drawn to train a segmenter on, which is tested on real ones; 0: not measured
EVAL_EVERY = 6       # epochs between reports
SAVE_SECONDS = 60.0  # between saves of last.pt
SWEEP = ""           # no training, solvers compared on the finished run: "all" (33 settings), or names
PRECISION = "auto"   # "bf16", "fp32"; auto = bf16 where the hardware multiplies it
COMPILE = False      # torch.compile: worth it for runs of an hour and more
TENSORBOARD = False  # needs the optional package tensorboard
EXPERIMENT = ""      # a row of EXPERIMENTS
LATER = ""           # what a row needs that is not here yet
SEED = 0
OUT = "runs"         # the run goes to OUT/3d_rflow
RESUME = True        # continue OUT/3d_rflow when its settings agree; False moves it aside

# The lab notes' runs, in pixel space. A row begins as the row LIKE names. Without _cpu they are for real data
# (give DATA) and one GPU of 24 to 80 GB; with _cpu they change the same thing on phantoms, in minutes.
# LATER: what a row needs that this version does not have.
EXPERIMENTS = {
    "128": dict(SHAPE=(160, 128, 128), PATCH=1, WIDTH=16, MULTS=(1, 2, 4, 16, 32, 32),
                BLOCKS=(1, 1, 1, 2, 2, 2), ATTENTION=(False, False, False, False, True, True), BATCH_SIZE=1,
                LR=1e-4, WARMUP=0.02, EMA_DECAY=0.0, TIME="mixture", EPOCHS=500, EVAL_EVERY=25, SAMPLES=25,
                CHECKPOINT=True, T_END=0.01),
    "256": dict(LIKE="128", SHAPE=(160, 256, 256)),
    "cpu": dict(SHAPE=(24, 24, 24), PATCH=1, WIDTH=16, TRAIN=105, VAL=16, TEST=51, EPOCHS=30, EVAL_EVERY=30,
                EMA_DECAY=0.0),
    "cpu_masks": dict(LIKE="cpu", SHAPE=(32, 32, 32), PATCH=2, WIDTH=32, MULTS=(1, 2), BLOCKS=(1, 1),
                      ATTENTION=(False, True)),
    "masks": dict(MODE="seg_conditioned", PREDICTION="x0", T_CLIP=0.2, TRAIN=8192, TEST=256, EPOCHS=1,
                  EVAL_EVERY=1, SAMPLES=64),  # not of the notes; what it gives is in the README

    "exp1": dict(LIKE="128", MODE="bravo"),
    "exp1_1": dict(LIKE="256", MODE="bravo"),
    "exp1_chained": dict(LIKE="128", MODE="bravo", EPOCHS=600),  # run it again and again: RESUME continues
    "exp2": dict(LIKE="128", MODE="seg_conditioned"),
    "exp2_1": dict(LIKE="256", MODE="seg_conditioned", LR=5e-5),
    "exp2b": dict(LIKE="128", MODE="seg_conditioned_input"),
    "exp2b_1": dict(LIKE="256", MODE="seg_conditioned_input", LR=5e-5, GUIDANCE=2.0),
    "exp2c": dict(LIKE="128", MODE="seg_conditioned_improved", COUNT_DROP=0.25),
    "exp2c_1": dict(LIKE="256", MODE="seg_conditioned_improved", COUNT_DROP=0.25),
    "exp4": dict(LIKE="128", MODE="bravo", AUGMENT="sda"),
    "exp5_1": dict(LIKE="128", MODE="bravo", AUGMENT="scoreaug"),
    "exp7": dict(LIKE="128", MODE="bravo", BACKBONE="dit", PATCH=8, DIM=768, DEPTH=12, HEADS=12, EPOCHS=2000),
    "exp8": dict(LIKE="128", MODE="bravo", EMA_DECAY=0.9999),
    "exp14_1": dict(LIKE="256", MODE="seg", LR=5e-5, WARMUP=0.1),

    "exp1_cpu": dict(LIKE="cpu", MODE="bravo"),
    "exp1_1_cpu": dict(LIKE="cpu", MODE="bravo", SHAPE=(32, 32, 32)),
    "exp1_chained_cpu": dict(LIKE="cpu", MODE="bravo", EPOCHS=36),
    "exp2_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned"),
    "exp2_1_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned", LR=2.5e-4),
    "exp2b_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned_input"),
    "exp2b_1_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned_input", LR=2.5e-4, GUIDANCE=2.0),
    "exp2c_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned_improved", COUNT_DROP=0.25),
    "exp2c_1_cpu": dict(LIKE="cpu_masks", MODE="seg_conditioned_improved", COUNT_DROP=0.25, LR=2.5e-4),
    "exp4_cpu": dict(LIKE="cpu", MODE="bravo", AUGMENT="sda"),
    "exp5_1_cpu": dict(LIKE="cpu", MODE="bravo", AUGMENT="scoreaug"),
    "exp7_cpu": dict(LIKE="cpu", MODE="bravo", SHAPE=(32, 32, 32), BACKBONE="dit", PATCH=4),
    "exp8_cpu": dict(LIKE="cpu", MODE="bravo", EMA_DECAY=0.995),
    "exp14_1_cpu": dict(LIKE="cpu_masks", MODE="seg", LR=2.5e-4),

    "exp6a": dict(LATER="ControlNet"),
    "exp6b": dict(LATER="ControlNet"),
    "exp9": dict(LATER="latents (VQ-VAE)"),
    "exp9_0": dict(LATER="latents (VQ-VAE)"),
    "exp9_1": dict(LATER="latents (VQ-VAE)"),
    "exp9_ldm_8x": dict(LATER="latents (VQ-VAE)"),
    "exp10_1": dict(LATER="latents (DC-AE)"),
    "exp10_2": dict(LATER="latents (DC-AE)"),
    "exp10_3": dict(LATER="latents (DC-AE)"),
    "exp11": dict(LATER="space-to-depth"),
    "exp11_1": dict(LATER="space-to-depth"),
    "exp12": dict(LATER="wavelets"),
    "exp12_1": dict(LATER="wavelets"),
    "exp12_2": dict(LATER="wavelets"),
    "exp12_3": dict(LATER="wavelets"),
    "exp12_4": dict(LATER="wavelets"),
    "exp13": dict(LATER="latents (VQ-VAE)"),
}  # the command line wins over a row


# ---------------------------------------------------------------- data
bins, cap, omega_size = 7, 10, 10  # sizes of lesions; counts above cap are cap; numbers that name a transform


def imaging():
    """True where the network draws images; else it draws masks."""
    return not MODE.startswith("seg")


def counting():
    """True where it is told how many lesions of each size."""
    return MODE.startswith("seg_conditioned")


def mask_channels():
    """Channels of the mask that goes in beside a noisy image."""
    return {"bravo": 1, "bravo_seg_cond": LABELS}.get(MODE, 0)


def load_data():
    """The volumes, read on demand: data.train, .val, .test with images, masks, counts, spacing (see
    data/volumes.py), and from the training volumes mu, sigma (C, D, H, W) and counts_seen (N, 7)."""
    cache = Path(OUT) / "cache"
    if DATA == "phantom":
        head = imaging() if FIELD == "auto" else FIELD == "head"
        data = volumes.phantoms(TRAIN, VAL, TEST, SHAPE, volumes.HEAD if head else volumes.CROP, cache)
    else:
        data = volumes.load_folder(DATA, SHAPE, FACTOR, LABELS if MODE != "image" else 0, test=0.2,
                                   cache=cache)
    for split in ("train", "val", "test"):
        if len(getattr(data, split).names) < 2:
            raise ValueError(f"DATA={DATA}: {len(getattr(data, split).names)} volumes in {split}, expected 2 "
                             "or more: give more volumes")
    n, total, square, content = len(data.train.names), 0.0, 0.0, hashlib.blake2b(data.facts.encode(),
                                                                                 digest_size=8)
    for part in (data.train, data.val, data.test):
        for i in range(len(part.names)):  # one at a time: memory does not grow with the data set
            for array in (part.images, part.masks):
                content.update(array[i].tobytes() if array is not None else b"")
            if part is data.train:
                x = target(part, [i])[0].double()
                total, square = total + x, square + x.square()
    data.mu, data.sigma = total / n, (square / n - (total / n).square()).clamp(min=0).sqrt()
    data.hash = content.hexdigest()
    return data


def labels_of(part, index, channels):
    """Masks (n, channels, D, H, W) in {0, 1}: one channel for each label, or a single one for any."""
    masks = torch.from_numpy(np.stack([part.masks[i] for i in index]))[:, None]
    if channels == 1:
        return (masks > 0).float()
    return (masks == torch.arange(1, channels + 1).view(-1, 1, 1, 1)).float()


def target(part, index):
    """x_0 (n, C, D, H, W) of the volumes `index` of a split: images, or masks."""
    if not imaging():
        return labels_of(part, index, LABELS)
    return torch.from_numpy(np.stack([part.images[i] for i in index])).float()[:, None]


def condition_of(part, index):
    """What Flow.forward is told about these volumes: dict of mask, counts, or nothing."""
    if mask_channels():
        return dict(mask=labels_of(part, index, mask_channels()))
    return dict(counts=torch.from_numpy(np.asarray(part.counts)[index])) if counting() else {}


def binarize(x):
    """Masks out of what the network drew: THE threshold, for every number, picture and file."""
    return x.clamp(0, 1) > 0.5


def draw_transform(g, shape, noisier):
    """
    One random transform of (C, D, H, W) and the numbers (omega_size,) that name it, all zero for none: turns
    by 90 degrees and a flip in the plane H W, a shift by up to 40 % of W and 20 % of H, or a box of 10 to
    30 % of each side set to 0 (its size is told, its place is not). noisier: turns and flips, and one bit.
    """
    omega, kind = torch.zeros(omega_size), int(torch.randint(1 if noisier else 0, 2 if noisier else 4, (),
                                                             generator=g))
    D, H, W = shape
    u = torch.rand(6, generator=g).tolist()
    if kind == 1:
        turns = int(4 * u[0]) if H == W else 2 * int(2 * u[0])
        flips = [3] if u[1] < 0.5 else []  # four turns and one flip are all eight symmetries
        if turns:
            omega[turns - 1] = 1
        omega[3] = len(flips)
        if noisier:
            omega = F.one_hot(torch.tensor(omega_size - 1), omega_size).float()
        return lambda x: x.rot90(turns, (2, 3)).flip(flips), omega
    if kind == 2:
        right, down = round((2 * u[0] - 1) * 0.4 * W), round((2 * u[1] - 1) * 0.2 * H)
        omega[4], omega[5] = right / W, down / H

        def shift(x):
            x = F.pad(x, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
            return x[:, :, max(-down, 0):max(-down, 0) + H, max(-right, 0):max(-right, 0) + W]
        return shift, omega
    if kind == 3:
        sizes = [max(1, round((0.1 + 0.2 * c) * n)) for c, n in zip(u, shape)]
        omega[6:9] = torch.tensor([s / n for s, n in zip(sizes, shape)])
        corner = [int(c * (n - s + 1)) for c, n, s in zip(u[3:], shape, sizes)]
        box = (slice(None), *(slice(a, a + s) for a, s in zip(corner, sizes)))

        def cut(x):
            x = x.clone()
            x[box] = 0
            return x
        return cut, omega
    return lambda x: x, omega


def regional_weight(masks, spacing):
    """(n, 1, D, H, W): 1 outside of lesions, more inside of small ones (seg_conditioned_improved)."""
    weight = torch.ones(len(masks), 1, *masks.shape[2:])
    for i, mask in enumerate(masks.amax(1).numpy() > 0):
        places, size = volumes.lesions(mask, spacing[i])
        factor = np.select([size < 10, size < 20, size < 30], [2.5, 1.8, 1.4], 1.2)
        weight[i, 0] = torch.from_numpy(np.r_[1.0, factor][places]).float()
    return weight


def draw_batch(data, step, attempt=0):
    """Everything random about optimizer step `step`, for the whole effective batch of BATCH_SIZE ACCUM
    volumes: a list of dicts of what loss_fn() takes, whose losses are added (one; with AUGMENT=sda sometimes
    two). A function of (SEED, step, attempt) alone, so a resumed run repeats an unbroken one. attempt counts
    rollbacks: another order."""
    n, g = BATCH_SIZE * ACCUM, generator_of(SEED, "step", step, attempt)
    index = batch_order(SEED, step, n, len(data.train.names), attempt)
    x_0, condition = target(data.train, index), condition_of(data.train, index)
    eps = torch.randn(x_0.shape, generator=g)
    # stratified over the batch: one uniform number in each n-th of (0, 1), in random order
    t = time_of((torch.randperm(n, generator=g) + torch.rand(n, generator=g)) / n)
    if counting():
        hidden = torch.rand(n, generator=g) < COUNT_DROP
        condition["counts"] = torch.where(hidden[:, None], -1, condition["counts"])
    if MODE == "seg_conditioned_improved":
        condition["weight"] = regional_weight(x_0, data.train.spacing[index])
    batch = dict(x_0=x_0, t=t, eps=eps, **condition)
    if AUGMENT == "scoreaug":  # T(x_t) and T(v) are what T(x_0) and T(eps) give
        return [transformed(batch, g, False)]
    if AUGMENT == "sda" and float(torch.rand((), generator=g)) < 0.5:
        return [batch, transformed(dict(batch, t=(t + 0.1).clamp(max=1)), g, True)]
    return [batch]


def transformed(batch, g, noisier):
    """Every volume of a batch turned, shifted or cut in its own way, with the omega that says how."""
    drawn = [draw_transform(g, batch["x_0"].shape[2:], noisier) for _ in batch["t"]]
    moved = {k: torch.stack([T(x) for (T, _), x in zip(drawn, v)]) for k, v in batch.items() if v.ndim == 5}
    return {**batch, **moved, "omega": torch.stack([omega for _, omega in drawn])}


# ---------------------------------------------------------------- model
class Flow(nn.Module):
    """
    v_hat(x_t, t, condition): a backbone with what the volumes' statistics and the conditions add to it.

    channels   of x_0: 1 for an image, M for masks; masks: channels of the mask that goes in beside x_t
    mu, sigma  (C, D, H, W) mean and std of every voxel over the training volumes, for PREDICTION=residual
    """

    def __init__(self, channels, masks, mu, sigma):
        super().__init__()
        counted, vectors = MODE.startswith("seg_cond"), {}
        maps = bins if MODE == "seg_conditioned_input" else 0
        pair = (channels + masks + maps, channels)
        if BACKBONE == "unet":
            self.net = UNet(channels=pair, dims=3, width=WIDTH, mults=MULTS, blocks=BLOCKS,
                            attention=ATTENTION, patch=PATCH, dropout=DROPOUT, checkpoint=CHECKPOINT)
            width = self.net.time_dim
        else:
            out = channels * (2 if BACKBONE == "dit" else 1)  # dit: a half for a variance, thrown away
            self.net = DiT(channels=(pair[0], out), dims=3, patch=PATCH, dim=DIM, depth=DEPTH, heads=HEADS,
                           dropout=DROPOUT)
            width = self.net.dim
        self.channels = channels
        # Never below 0.2: F's target is noise times a factor that follows sigma, and no convolution follows
        # a sigma that jumps from voxel to voxel. The price: the first loss lies above the linear guess
        if AUGMENT != "none":  # a transform moves voxels, but not the statistics of the whole volume
            mean, square = ((mu, sigma.square() + mu.square())[i].mean((1, 2, 3), True) for i in (0, 1))
            mu, sigma = mean.expand_as(mu), (square - mean.square()).sqrt().expand_as(mu)
        self.register_buffer("mu", mu[None].float().contiguous())
        self.register_buffer("sigma", sigma[None].float().clamp(min=0.2))
        if counted and not maps:  # rows 0..cap of every size bin's table, the last one for "not given"
            deep = MODE == "seg_conditioned_improved"
            size, hidden, layers = (64, 512, 4) if deep else (32, width, 2)
            self.tables = nn.ModuleList(nn.Embedding(cap + 2, size) for _ in range(bins))
            vectors["counts"] = mlp(bins * size, hidden, width, layers)
        if AUGMENT != "none":
            vectors["omega"] = mlp(omega_size, width, width, 2)
        self.vectors = nn.ModuleDict(vectors)

    def forward(self, x, t, mask=None, counts=None, omega=None):
        """
        x (B, C, D, H, W), t (B,), mask (B, M, D, H, W), counts (B, 7) int64 with -1 for "not given", omega
        (B, omega_size) the transform that x has gone through (None: none). Returns v_hat like x.
        """
        s = t.view(-1, 1, 1, 1, 1)
        inputs, vector = x, 0.0
        if PREDICTION == "residual":
            Q = (1 - s).square() * self.sigma.square() + s.square()
            centred = x - (1 - s) * self.mu
            inputs = centred / Q.sqrt()
        if mask is not None:
            inputs = torch.cat([inputs, mask], 1)
        if MODE == "seg_conditioned_input":
            maps = counts.clamp(max=cap).float() / cap
            inputs = torch.cat([inputs, maps.view(*maps.shape, 1, 1, 1).expand(-1, -1, *x.shape[2:])], 1)
        elif counts is not None:
            row = torch.where(counts < 0, cap + 1, counts.clamp(max=cap))
            rows = torch.cat([table(row[:, i]) for i, table in enumerate(self.tables)], 1)
            vector = vector + self.vectors["counts"](rows)
        if "omega" in self.vectors:
            omega = x.new_zeros(len(x), omega_size) if omega is None else omega
            vector = vector + self.vectors["omega"](omega)
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):  # 1.1 x faster in fp32
            inputs = inputs.contiguous(memory_format=torch.channels_last_3d)
        out = self.net(inputs, t, vector=vector if torch.is_tensor(vector) else None)[:, :self.channels]
        out = out.float()
        if PREDICTION == "velocity":
            return out
        if PREDICTION == "x0":
            return (x - out) / s.clamp(min=T_CLIP)
        return ((s - (1 - s) * self.sigma.square()) / Q * centred - self.mu
                + self.sigma / Q.sqrt() * out)


def mlp(a, hidden, b, layers):
    """Linear layers with SiLU between; the last starts at zero, so what goes in matters not at first."""
    sizes = [a, *[hidden] * (layers - 1), b]
    parts = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), nn.SiLU())]
    net = nn.Sequential(*parts[:-1])
    nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    return net


# ---------------------------------------------------------------- method: time, loss
def time_of(u):
    """Times t of uniform numbers u in (0, 1): uniform; logit-normal(0, 1) (Esser 2024), which hardly ever
    looks at either end; or a mixture of 4/5 of it with 1/5 uniform. SHIFT > 1 moves all towards noise."""
    normal = torch.special.ndtri(((u / 0.8) if TIME == "mixture" else u).clamp(1e-6, 1 - 1e-6)).sigmoid()
    t = {"uniform": u, "logit-normal": normal,
         "mixture": torch.where(u < 0.8, normal, (u - 0.8) / 0.2)}[TIME]
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def loss_fn(model, x_0, t, eps, weight=None, **condition):
    """Mean over voxels of (v_hat - v)^2 for each volume, (B,). x_0, eps (B, C, D, H, W), t (B,), weight like
    x_0 (regional, or None), condition as Flow.forward takes it."""
    s = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - s) * x_0 + s * eps
    v = (x_t - x_0) / s.clamp(min=T_CLIP) if PREDICTION == "x0" else eps - x_0  # the same number above T_CLIP
    error = (model(x_t, t, **condition) - v).square()
    return (error if weight is None else weight * error).flatten(1).mean(1)


def linear_floor(mu, sigma, t):
    """Mean loss of the best linear guess of every voxel at times t (n,): sigma^2 / Q, (n,). With uniform t
    its mean is (pi / 2) sigma."""
    s = t.view(-1, *[1] * sigma.ndim)
    return (sigma.square() / ((1 - s).square() * sigma.square() + s.square())).flatten(1).mean(1)


# ---------------------------------------------------------------- solvers: dx/dt = f(x, t, rows), t downwards
class Method:
    """A Runge-Kutta method: stage i looks at x - h sum_j rows[i][j] k_j and t - c_i h; b joins the stages.
    lower: weights of a method inside, of a lower order, whose difference from b estimates the error."""

    def __init__(self, order, rows, b, lower=(), error=()):
        self.order, self.rows, self.b = order, [[], *rows], b
        self.c = [sum(row) for row in self.rows]
        self.error = list(error) or [x - y for x, y in zip(b, lower)]
        self.same_last = self.rows[-1] == list(b)[:-1]  # the last stage is the next step's first


methods = {
    "euler": Method(1, [], [1]),
    "midpoint": Method(2, [[1 / 2]], [0, 1]),
    "heun2": Method(2, [[1]], [1 / 2, 1 / 2]),
    "heun3": Method(3, [[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "rk4": Method(4, [[1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),  # Kutta's 3/8 rule
    "fehlberg2": Method(2, [[1 / 2], [1 / 256, 255 / 256]], [1 / 512, 255 / 256, 1 / 512],
                        error=[-1 / 512, 0, 1 / 512]),
    "bosh3": Method(3, [[1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]], [2 / 9, 1 / 3, 4 / 9, 0],
                    [7 / 24, 1 / 4, 1 / 3, 1 / 8]),
    "dopri5": Method(
        5, [[1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
            [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
            [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
            [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
        [1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60]),
    "dopri8": Method(
        8, [[1 / 18], [1 / 48, 1 / 16], [1 / 32, 0, 3 / 32], [5 / 16, 0, -75 / 64, 75 / 64],
            [3 / 80, 0, 0, 3 / 16, 3 / 20],
            [29443841 / 614563906, 0, 0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000],
            [16016141 / 946692911, 0, 0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229,
             -180193667 / 1043307555],
            [39632708 / 573591083, 0, 0, -433636366 / 683701615, -421739975 / 2616292301,
             100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287],
            [246121993 / 1340847787, 0, 0, -37695042795 / 15268766246, -309121744 / 1061227803,
             -12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789],
            [-1028468189 / 846180014, 0, 0, 8478235783 / 508512852, 1311729495 / 1432422823,
             -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649,
             -45442868181 / 3398467696, 3065993473 / 597172653],
            [185892177 / 718116043, 0, 0, -3185094517 / 667107341, -477755414 / 1098053517,
             -703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563,
             -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083],
            [403863854 / 491063109, 0, 0, -5068492393 / 434740067, -411421997 / 543043805,
             652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034,
             3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0]],
        [14005451 / 335480064, 0, 0, 0, 0, -59238493 / 1068277825, 181606767 / 758867731,
         561292985 / 797845732, -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087,
         -528747749 / 2220607170, 1 / 4],
        [13451932 / 455176623, 0, 0, 0, 0, -808719846 / 976000145, 1757004468 / 5645159321,
         656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719,
         2 / 45, 0]),
}
fixed_steps = ("euler", "midpoint", "heun2", "heun3", "rk4")
adaptive = ("fehlberg2", "bosh3", "dopri5", "dopri8")


def rk_step(f, x, t, h, rows, method, first=None):
    """One step of samples x (n, ...) from t (n,) to t - h; rows (n,): which samples of the batch they are.
    first: f(x, t) where it is known. Returns x at t - h, the estimated error (or None), the last slope."""
    m, k, wide = methods[method], [], h.view(-1, *[1] * (x.ndim - 1))
    for row, c in zip(m.rows, m.c):
        if not row:
            k.append(f(x, t, rows) if first is None else first)
        else:
            k.append(f(x - wide * sum(a * slope for a, slope in zip(row, k) if a), t - c * h, rows))
    new = x - wide * sum(b * slope for b, slope in zip(m.b, k) if b)
    return new, wide * sum(e * slope for e, slope in zip(m.error, k) if e) if m.error else None, k[-1]


def solve_fixed(f, x, method, steps, end=0.0, begin=1.0):
    """x (B, ...) carried from t = begin to end in equal steps. f(x, t, rows): the slope of samples `rows`."""
    times, rows = torch.linspace(begin, end, steps + 1, dtype=torch.float64).tolist(), torch.arange(len(x))
    for a, b in zip(times, times[1:]):
        x = rk_step(f, x, x.new_full((len(x),), a), x.new_full((len(x),), a - b), rows, method)[0]
    return x


def solve_adaptive(f, x, method, tolerance, end=0.0, begin=1.0, together=False, limit=10_000):
    """
    x (B, ...) carried from t = begin to end in steps as large as the tolerance (absolute and relative) lets.

    Every sample has its own clock: a batch gives what its samples give alone. together=True shares one error
    norm over the batch. The last step is clipped, so f is never asked below `end`. Controller: h <- h
    clip(0.9 r^(-1/order), 0.2, 10), r = RMS(error / (tol + tol max |x|)), accepted when r <= 1; first step as
    in Hairer, Norsett & Wanner, sec. II.4. RuntimeError after `limit` steps.
    """
    m, x, t, rows = methods[method], x.clone(), x.new_full((len(x),), begin), torch.arange(len(x))

    def norm(y):
        square = y.flatten(1).square().mean(1)
        return (square.mean().expand(len(y)) if together else square).sqrt()

    slope = f(x, t, rows)
    scale = tolerance * (1 + x.abs())
    d0, d1 = norm(x / scale), norm(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=begin - end)
    euler = x - h0.view(-1, *[1] * (x.ndim - 1)) * slope
    d2 = norm((f(euler, t - h0, rows) - slope) / scale) / h0
    h = (0.01 / d1.maximum(d2).clamp(min=1e-15)) ** (1 / m.order)
    h = h.minimum(100 * h0)
    for _ in range(limit):
        here = rows[(t > end).cpu()]
        if len(here) == 0:
            return x
        step = h[here].minimum(t[here] - end)
        new, error, last = rk_step(f, x[here], t[here], step, here, method, slope[here])
        r = norm(error / (tolerance * (1 + x[here].abs().maximum(new.abs()))))
        if not r.isfinite().all():
            raise RuntimeError(f"{method}: a slope is not finite near t = {float(t[here].min()):.3g}")
        h[here] = step * (0.9 * r.clamp(min=1e-10) ** (-1 / m.order)).clamp(0.2, 10)
        fine = (r <= 1).cpu()
        moved, landed = here[fine], step[fine] == t[here[fine]] - end
        x[moved], t[moved] = new[fine], torch.where(landed, end, t[moved] - step[fine])
        if m.same_last:
            slope[moved] = last[fine]
        elif len(moved := moved[(t[moved] > end).cpu()]):
            slope[moved] = f(x[moved], t[moved], moved)
    raise RuntimeError(f"{method} with tolerance {tolerance:g} takes more than {limit} steps")


# ---------------------------------------------------------------- sampling
@torch.no_grad()
def sample(model, seeds, condition, solver=None, steps=None, tolerance=None, path=None):
    """
    THE sampler: reports, sweep and sample.py come here.

    seeds      one for each volume: its noise depends on nothing else
    condition  dict as condition_of() gives it, for as many volumes
    solver, steps, tolerance: SOLVER, STEPS, TOLERANCE where None
    path       a list that gets (t of the first volume, x on the CPU) of every evaluation
    Returns x_0 (B, C, D, H, W), clamped to [0, 1] for images and binary for masks, and how many evaluations
    of the network a volume took on average, rejected steps and guidance included.
    """
    solver, steps, tolerance = solver or SOLVER, steps or STEPS, tolerance or TOLERANCE
    device, shape, asked = model.mu.device, model.mu.shape[1:], 0
    x = torch.stack([torch.randn(shape, generator=generator_of(seed, "x_1")) for seed in seeds]).to(device)
    condition = {k: v.to(device) for k, v in condition.items()}
    guided = "counts" in condition and GUIDANCE != 1

    def v_hat(x, t, rows):
        nonlocal asked
        asked += len(x) * (2 if guided else 1)
        now = {k: v[rows] for k, v in condition.items()}
        with autocast(device, PRECISION):
            v = model(x, t, **now)
            if guided:
                null = model(x, t, **dict(now, counts=torch.full_like(now["counts"], -1)))
                v = null + GUIDANCE * (v - null)
        if path is not None:
            path.append((float(t[0]), (x - t.view(-1, 1, 1, 1, 1) * v).cpu(), x.cpu().clone()))
        return v

    if solver in fixed_steps:
        x = solve_fixed(v_hat, x, solver, steps, T_END)
    else:
        x = solve_adaptive(v_hat, x, solver, tolerance, T_END, together=TOGETHER)
    if T_END > 0:  # what is left of the way, in one straight step
        x = x - T_END * v_hat(x, x.new_full((len(x),), T_END), torch.arange(len(x)))
    return (x.clamp(0, 1) if imaging() else binarize(x).float()), asked / len(x)


# ---------------------------------------------------------------- evaluation
class Encoder(nn.Module):
    """Features from fixed random weights: x (B, C, D, H, W) -> (B, 128), mean and std of 64 channels. Nothing
    is learned, so nothing is known about heads; a distance in it says that distributions differ."""

    def __init__(self, channels):
        super().__init__()
        sizes = (channels, 16, 32, 64, 64)
        self.layers = nn.ModuleList(nn.Conv3d(a, b, 3, 2, 1) for a, b in zip(sizes, sizes[1:]))
        g = torch.Generator().manual_seed(0)
        for layer in self.layers:
            layer.weight.data = torch.randn(layer.weight.shape, generator=g) / layer.weight[0].numel() ** 0.5
            layer.bias.data.zero_()

    def forward(self, x):
        for layer in self.layers:
            x = F.silu(F.group_norm(layer(x), 8))
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4), correction=0)], 1)


@torch.no_grad()
def features_of(encoder, x, device):
    """Encoder features (N, 128) of volumes x (N, C, D, H, W), on the CPU."""
    return torch.cat([encoder(part.to(device)).cpu() for part in x.split(16)])


def wavelet_packets(x, side=4, most=64):
    """The full tree of Haar packets of x (N, C, D, H, W) down to about side^3 numbers: (packets, N, <= most).
    k levels of Haar steps on all bands are one Walsh-Hadamard transform of blocks of 2^k voxels a side, which
    keeps lengths. More than `most` numbers in a packet are projected on as many fixed orthonormal ones."""
    k = max(1, int(math.log2(min(x.shape[2:]) / side)))
    n, H = 2**k, torch.ones(1, 1, dtype=torch.float64)
    for _ in range(k):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    D, h, w = (s // n for s in x.shape[2:])
    blocks = x[:, :, :D * n, :h * n, :w * n].double().reshape(*x.shape[:2], D, n, h, n, w, n)
    bands = torch.einsum("ncdihjwk,ai,bj,ek->cabendhw", blocks, H, H, H)
    packets = bands.flatten(0, 3).flatten(2)  # (C n^3, N, D h w)
    if packets.shape[2] > most:
        g = torch.Generator().manual_seed(0)
        packets = packets @ torch.linalg.qr(torch.randn(packets.shape[2], most, generator=g).double())[0]
    return packets


def frechet_wavelet(x, y):
    """Frechet wavelet distance of volumes x and y (N, C, D, H, W): the mean Frechet distance of their packets
    (2312.15289, there in 2D; the projection of long packets is ours). Needs no network."""
    found, n, m = [], len(x) - 1, len(y) - 1
    for a, b in zip(wavelet_packets(x).split(512), wavelet_packets(y).split(512)):
        means = a.mean(1), b.mean(1)
        a, b = a - means[0][:, None], b - means[1][:, None]
        # Tr (S1^1/2 S2 S1^1/2)^1/2 is the sum of the singular values of a b' (n m)^-1/2
        cross = torch.linalg.svdvals(a @ b.mT).sum(1) / (n * m) ** 0.5
        spread = a.square().sum((1, 2)) / n + b.square().sum((1, 2)) / m
        found.append((means[0] - means[1]).square().sum(1) + spread - 2 * cross)
    return float(torch.cat(found).mean())


def reduced(real, *sets):
    """Feature sets on the main axes of `real`, as many as its number of rows can carry: min(32, N / 4)."""
    mean = real.double().mean(0)
    axes = torch.linalg.svd(real.double() - mean, full_matrices=False)[2][:max(2, min(32, len(real) // 4))]
    return [(s.double() - mean) @ axes.T for s in (real, *sets)]


def small(x):
    """Volumes at 32 voxels a side at most, flat: what neighbours are looked for in, (N, C d h w)."""
    return F.adaptive_avg_pool3d(x, [min(s, 32) for s in x.shape[2:]]).flatten(1)


def similarity(x, pairs=200):
    """Mean 3D MS-SSIM of pairs of volumes (window 7, as many scales as fit, three at most): variety. The
    target is that of real pairs, neither more nor less."""
    scales = min(3, (min(x.shape[2:]) // 7).bit_length())
    if scales < 1 or len(x) < 2:
        return math.nan
    g = torch.Generator().manual_seed(0)
    every = torch.combinations(torch.arange(len(x)))
    i, j = every[torch.randperm(len(every), generator=g)[:pairs]].T
    weights = (.0448, .2856, .3001)[:scales]
    return float(torch.cat([ms_ssim(a, b, 1.0, weights, 7)
                            for a, b in zip(x[i].split(16), x[j].split(16))]).mean())


def build_segmenter(channels):
    """Finds lesions in images: the opinion behind `dice`. A U-Net of its own at half the resolution."""
    side = 2 if all(s % 4 == 0 for s in SHAPE) else 1
    return UNet(channels=(1, channels), dims=3, width=16, mults=(1, 2), attention=(False, False), patch=side,
                dropout=0.0)


def segment(net, images):
    """Probability maps (N, M, D, H, W) of images (N, 1, D, H, W)."""
    with torch.no_grad():
        return torch.cat([net(x, x.new_zeros(len(x))) for x in images.split(8)]).sigmoid()


def train_segmenter(images, masks, count, device, steps=250, batch=8, lr=3e-3):
    """A segmenter of images(index) (n, 1, D, H, W) and masks(index) (n, M, D, H, W), asked for lists of
    numbers below count: cross-entropy and soft Dice, flips left-right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_segmenter(masks([0]).shape[1]).to(device).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.99), weight_decay=0.01)
        g = torch.Generator().manual_seed(0)
        for step in tqdm(range(steps), desc="segmenter", leave=False, disable=None):
            index = torch.randint(count, (batch,), generator=g).tolist()
            x, y = images(index).to(device), masks(index).to(device)
            if torch.rand((), generator=g) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            z = net(x, x.new_zeros(batch)).float()
            p, axes = z.sigmoid(), (0, 2, 3, 4)
            overlap = (2 * (p * y).sum(axes) + 1) / (p.sum(axes) + y.sum(axes) + 1)
            loss = F.binary_cross_entropy_with_logits(z, y) + 1 - overlap.mean()
            optimizer.param_groups[0]["lr"] = lr_at(step, steps, lr)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def dice(a, b):
    """Mean Dice coefficient of binary masks (N, M, ...) over those volumes and channels where b is not
    empty."""
    a, b = a.flatten(2).float(), b.flatten(2).float()
    score = 2 * (a * b).sum(2) / (a.sum(2) + b.sum(2)).clamp(min=1)
    return float(score[b.sum(2) > 0].mean()) if (b.sum(2) > 0).any() else math.nan


def spread(n, count):
    """`count` of the numbers below n, evenly; all of them where there are fewer."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


def reference(data, device):
    """What every report stands beside: floors of the loss, feature network, real sets, segmenter."""
    t = (torch.arange(16) + 0.5) / 16
    ref = SimpleNamespace(t=t, encoder=Encoder(data.mu.shape[0]).to(device).eval())
    x = target(data.val, spread(len(data.val.names), 32))
    ref.zero = 1 + float(x.square().mean())  # E v^2 of noise and data
    ref.linear = linear_floor(data.mu, data.sigma, t).numpy()
    drawn = time_of((torch.arange(64) + 0.5) / 64)  # t as training draws it
    ref.linear_training = float(linear_floor(data.mu, data.sigma, drawn).mean())
    n = min(SAMPLES, len(data.test.names), len(data.train.names))
    ref.test, ref.train = (target(part, spread(len(part.names), n)) for part in (data.test, data.train))
    ref.features = {name: features_of(ref.encoder, getattr(ref, name), device) for name in ("test", "train")}
    ref.segmenter = segmenter_of(data, device) if mask_channels() else None
    return ref


def segmenter_of(data, device):
    """The segmenter of the training volumes: once for each data set, then from the cache."""
    path, M = Path(OUT) / "cache" / f"segmenter_{data.hash}_{mask_channels()}.pt", mask_channels()
    if common.intact(path):
        net = build_segmenter(M).to(device)
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return net.eval().requires_grad_(False)
    net = train_segmenter(lambda i: target(data.train, i), lambda i: labels_of(data.train, i, M),
                          len(data.train.names), device)
    temporary = path.with_suffix(".tmp")
    torch.save(net.state_dict(), temporary)
    temporary.replace(path)
    return net


@torch.no_grad()
def loss_by_time(model, data, ref, count=32):
    """Error of v_hat, as (x_0_hat - x_0)^2 / t^2, for each of `count` validation volumes at the 16 times
    (k + 1/2)/16, fixed noise: (n, 16)."""
    device, index = model.mu.device, spread(len(data.val.names), count)
    table = np.zeros((len(index), len(ref.t)))
    for row, i in enumerate(index):
        x_0, n = target(data.val, [i]), len(ref.t)
        eps = torch.randn((n, *x_0.shape[1:]), generator=generator_of(SEED, "val", i))
        now = {k: v.expand(n, *v.shape[1:]).to(device) for k, v in condition_of(data.val, [i]).items()}
        x_0 = x_0.expand_as(eps).to(device)
        losses = [loss_fn(model, x_0=x_0[j:j + 8], t=ref.t[j:j + 8].to(device), eps=eps[j:j + 8].to(device),
                          **{k: v[j:j + 8] for k, v in now.items()}) for j in range(0, n, 8)]
        table[row] = torch.cat(losses).cpu()
    if PREDICTION == "x0":  # below T_CLIP loss_fn divides by less than t; the floor beside it does not
        table *= (ref.t.clamp(min=T_CLIP) / ref.t).square().numpy()
    return table


def sample_many(model, seeds, condition, **how):
    """sample() for each of the seeds, eight at a time: x_0 on the CPU, and evaluations a sample."""
    parts, evaluations = [], 0.0
    for i in range(0, len(seeds), 8):
        x, asked = sample(model, seeds[i:i + 8], {k: v[i:i + 8] for k, v in condition.items()}, **how)
        parts.append(x.cpu())
        evaluations += asked * len(x) / len(seeds)
    return torch.cat(parts), evaluations


def draw_set(model, part, count, **how):
    """`count` samples under the conditions of a split's volumes: x_0 (count, C, D, H, W), the numbers of the
    volumes, and evaluations of the network a sample."""
    index = [i % len(part.names) for i in spread(max(count, len(part.names)), count)]
    seeds = [seed_of(SEED, "sample", i) for i in range(count)]
    x, evaluations = sample_many(model, seeds, condition_of(part, index), **how)
    return x, index, evaluations


def count_masks(masks, spacing):
    """Lesions of each size, of any label, in binary masks (N, M, D, H, W): int64 (N, bins)."""
    return np.array([volumes.count_lesions(m.amax(0).numpy() > 0, mm) for m, mm in zip(masks, spacing)])


def misfit(got, asked):
    """How far counts (..., bins) are from those asked for: lesions too many or too few in all, and of each
    size. One that is missing costs 2, and so does one of a wrong size."""
    extra = got - asked
    return abs(extra.sum(-1)) + abs(extra).sum(-1)


def redraw(model, seed, x, condition, spacing):
    """
    Masks x (N, M, D, H, W) from sample_many() whose lesions are not those in condition["counts"], drawn anew
    until they are, TRIES - 1 times at most; then the draw that fits best stays. One that fits is a fair draw
    of the network's masks with these counts, by rejection. Search with a verifier as in 2501.09732, whose
    verifiers are networks; ours is exact. Returns the masks, and further evaluations of the network a mask.
    """
    asked, x, more = condition["counts"].numpy(), x.clone(), 0.0
    miss = misfit(count_masks(x, spacing), asked)
    for attempt in range(1, TRIES):
        rows = np.flatnonzero(miss)
        if len(rows) == 0:
            break
        again, evaluations = sample_many(model, [seed_of(seed, "sample", int(i), attempt) for i in rows],
                                         {k: v[rows] for k, v in condition.items()})
        more += evaluations * len(rows) / len(x)
        new = misfit(count_masks(again, spacing[rows]), asked[rows])
        better = new < miss[rows]
        x[rows[better]], miss[rows[better]] = again[better], new[better]
    return x, more


def usual_mask(part):
    """The one mask that fits a split's masks best, (M, D, H, W): voxels set in more than a share of them, for
    the share with the best Dice. What knowing nothing else gets."""
    index = range(len(part.names))
    mean = sum(labels_of(part, [i], mask_channels())[0] for i in index) / len(index)
    some = labels_of(part, spread(len(index), 32), mask_channels())
    return max((mean > share for share in (0.2, 0.3, 0.4, 0.5)), key=lambda m: dice(m.expand_as(some), some))


def train_on_samples(model, data, index):
    """Train-synthetic, test-real: masks of the test volumes `index` by a segmenter trained on TSTR samples
    alone, drawn under the masks of training volumes. Its ceiling is the segmenter of the real volumes."""
    x, under, _ = draw_set(model, data.train, TSTR)
    device = model.mu.device
    net = train_segmenter(lambda i: x[i], lambda i: labels_of(data.train, [under[j] for j in i],
                                                              mask_channels()), TSTR, device)
    return binarize(segment(net, target(data.test, index).to(device)).cpu())


def compare_masks(model, data, ref, x, first, index, add):
    """
    The numbers about masks, each given to add(): Dice of what the segmenter sees in images drawn under masks;
    lesions asked for and counted. The ceiling is what real volumes get in the place of samples; the floor of
    counts what training masks get that are picked blindly, as many tries each, or "always the mean" if that
    is more. x: samples under the conditions of the test volumes `index`; first: before redraw().

    Returns, for the pictures, the lesions of each size that were asked for and counted, (N, 2, bins); zeros
    where none were asked for, or where the segmenter does not find half of them in real images either.
    """
    truth = best = labels_of(data.test, index, max(1, mask_channels()) if imaging() else LABELS)
    masks = x if not imaging() else None
    if ref.segmenter is not None:
        device = model.mu.device
        masks = binarize(segment(ref.segmenter, x.to(device)).cpu()).float()
        best = binarize(segment(ref.segmenter, target(data.test, index).to(device)).cpu()).float()
        add("dice", dice(masks, truth), "higher", floor=dice(masks.roll(1, 0), truth),
            ceiling=dice(best, truth))
        if TSTR and len(x) >= SAMPLES:
            add("dice_trained_on_samples", dice(train_on_samples(model, data, index), truth), "higher",
                floor=dice(usual_mask(data.train).expand_as(truth), truth), ceiling=dice(best, truth))
    if masks is None or not (counting() or imaging()):
        return np.zeros((len(x), 2, bins), int)
    spacing = data.test.spacing[index]
    asked, got, real = (count_masks(m, spacing) for m in (truth, masks, best))
    learned = np.asarray(data.train.counts)
    typical = round(float(learned.sum(1).mean()))

    def within_1(numbers):
        return float((abs(numbers - asked.sum(1)) <= 1).mean())

    def exact(counts):
        return float((counts == asked).all(-1).mean())

    def blindly(tries):
        """Counts (100, N, bins) of the best of so many training masks, a hundred times."""
        picked = learned[np.random.default_rng(0).integers(len(learned), size=(100, tries, len(asked)))]
        chosen = misfit(picked, asked).argmin(1)[:, None, :, None]
        return np.take_along_axis(picked, chosen, 1)[:, 0]

    def add_counts(suffix, counts, tries):
        blind = blindly(tries)
        add("lesions_within_1" + suffix, within_1(counts.sum(1)), "higher",
            floor=max(within_1(typical), within_1(blind.sum(-1))), ceiling=within_1(real.sum(1)))
        add("counts_exact" + suffix, exact(counts), "higher", floor=exact(blind), ceiling=exact(real))
    add_counts("", got, TRIES if counting() else 1)
    if counting() and TRIES > 1:
        add_counts("_first", count_masks(first, spacing), 1)
    add("lesions_bias", float((got - asked).sum(1).mean()), None, floor=0.0,
        ceiling=float((real - asked).sum(1).mean()))
    return np.stack([asked, got], 1) * (not imaging() or 2 * real.sum() >= asked.sum())


def evaluate(model, data, ref, count):
    """Every number of a report from `count` samples, beside its floor and ceiling; returns (metrics, arrays
    for the pictures)."""
    device, metrics = model.mu.device, {}

    def add(name, value, better, floor=None, ceiling=None, n=count):
        metrics[name] = dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    table = loss_by_time(model, data, ref)
    add("val_loss", float(table.mean()), "lower", floor=float(ref.linear.mean()), n=len(table))
    add("zero_loss", ref.zero, "lower", n=len(table))
    clock = time.monotonic()
    first, index, asked = draw_set(model, data.test, count)
    x, more = first, 0.0
    if counting():
        x, more = redraw(model, SEED, first, condition_of(data.test, index), data.test.spacing[index])
    seconds = (time.monotonic() - clock) / count
    n = min(count, len(ref.test))
    noise = torch.rand(ref.test.shape, generator=generator_of(0, "floor"))
    mean = data.mu.float().expand_as(ref.test)
    add("frechet_wavelet", frechet_wavelet(x[:n], ref.test), "lower",
        floor=frechet_wavelet(mean + data.sigma.float() * torch.randn(
            mean.shape, generator=generator_of(0, "floor")), ref.test),
        ceiling=frechet_wavelet(ref.train, ref.test), n=n)
    own, wrong = features_of(ref.encoder, x, device), features_of(ref.encoder, noise, device)
    real, own_pc, train_pc, wrong_pc = reduced(ref.features["test"], own[:n], ref.features["train"], wrong)
    add("frechet_features", frechet(own_pc, real), "lower", floor=frechet(wrong_pc, real),
        ceiling=frechet(train_pc, real), n=n)
    add("kid_features", kid(own_pc, real)[0], "lower", floor=kid(wrong_pc, real)[0],
        ceiling=kid(train_pc, real)[0], n=n)
    add("ms_ssim_diversity", similarity(x), None, floor=1.0, ceiling=similarity(ref.test))
    every = torch.cat([small(target(data.train, [i])) for i in range(len(data.train.names))])
    signs = memorisation(small(x), every, small(ref.test))
    add("memorised", signs["memorised"], "lower", floor=1.0, ceiling=0.01)
    add("authentic", signs["authentic"], "higher", floor=0.0)
    counts = np.zeros((count, 2, bins), int)
    if data.test.masks is not None:
        counts = compare_masks(model, data, ref, x, first, index, add)
    add("seconds_per_sample", seconds, "lower")
    add("evaluations", asked + more, "lower")
    return metrics, SimpleNamespace(x=x, index=index, table=table, counts=counts, features=own)


def summary(metrics):
    """The one line of a report: each number beside its floor and ceiling."""
    def one(name):
        m = metrics[name]
        beside = [f"{k} {m[k]:.3f}" for k in ("floor", "ceiling") if m[k] is not None]
        return f"{name} {m['value']:.3f} ({', '.join(beside)})"
    names = ("val_loss", "frechet_wavelet", "ms_ssim_diversity", "dice", "dice_trained_on_samples",
             "lesions_within_1", "lesions_within_1_first", "counts_exact", "memorised")
    return ", ".join(one(name) for name in names if name in metrics)


# ---------------------------------------------------------------- pictures
def planes(volume, mask=None):
    """Axial, coronal and sagittal slice of (D, H, W) through the most lesion voxels (else the middle), as a
    viewer turns them: nose and top of the head up. RGB pictures, a voxel several pixels wide, so that the
    orange line around the mask, one pixel, hides nothing."""
    where = mask if mask is not None and mask.any() else None
    pictures, zoom = [], max(1, 160 // max(volume.shape))
    for axis, middle in enumerate(volume.shape):
        others = tuple(a for a in range(3) if a != axis)
        i = middle // 2 if where is None else int(where.sum(others).argmax())
        picture = np.clip(np.take(volume, i, axis)[::-1], 0, 1)[..., None]
        picture = picture.repeat(zoom, 0).repeat(zoom, 1).repeat(3, 2)
        if where is not None:
            inside = np.take(where, i, axis)[::-1].astype(bool).repeat(zoom, 0).repeat(zoom, 1)
            padded = np.pad(inside, 1)
            near = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
            picture[near & ~inside] = (1, 0.55, 0)
        pictures.append(picture)
    return pictures


def shadows(mask):
    """The same three views of a mask, as the share of lesion voxels behind each point."""
    return [np.repeat((1 - (1 - 0.45) ** mask.sum(axis)[::-1])[..., None], 3, -1) for axis in range(3)]


def sheet(rows, titles, columns, title):
    """A figure of rows of pictures (of any shapes: padded to one square)."""
    side = max(max(p.shape[:2]) for row in rows for p in row)

    def square(p):
        up, left = (side - p.shape[0]) // 2, (side - p.shape[1]) // 2
        return np.pad(p, ((up, side - p.shape[0] - up), (left, side - p.shape[1] - left), (0, 0)))
    return tile(np.stack([np.stack([square(p) for p in row]) for row in rows]), title, rows=titles,
                columns=columns, cell=max(1.6, side / 100))  # no pixel is lost


def views(x, mask=None):
    """Three pictures of x_0 (C, D, H, W): slices of an image, or shadows of masks."""
    return planes(x[0], mask) if imaging() else shadows(x.max(0))


def written(counts):
    """Counts of lesions by size, for a title: '1x10-15, 2x15-20 mm'."""
    parts = [f"{n} x {name}" for n, name in zip(counts, size_names) if n]
    return (", ".join(parts) + " mm") if parts else "none"


size_names = ("0-3", "3-6", "6-10", "10-15", "15-20", "20-30", "30+")


def draw_samples(folder, data, arrays, recipe):
    """samples.png: the real test volume whose condition was asked for, and what the network drew.
    samples.npy: all of them, float16; NIfTI files of the first four."""
    rows, titles, asked = [], [], None
    for i in range(min(6, len(arrays.x))):
        k = arrays.index[i]
        real, mine = target(data.test, [k])[0].numpy(), arrays.x[i].numpy()
        if mask_channels():
            asked = labels_of(data.test, [k], mask_channels())[0].amax(0).numpy()
        rows.append([*views(real, asked), *views(mine, asked)])
        said, got = (written(c) for c in arrays.counts[i])
        titles.append(f"asked {said}\ngot {got}" if arrays.counts.any() else f"sample {i}")
    names = ["axial", "coronal", "sagittal"]
    lesions = [f"asked {a}\ngot {b}" if arrays.counts.any() else "" for a, b in arrays.counts.sum(2)]
    figure = sheet(rows, lesions[:len(rows)], [f"real, {n}" for n in names] + [f"drawn, {n}" for n in names],
                   recipe)
    save_artifact(folder, "samples", arrays.x.half(), figure)
    (folder / "samples.txt").write_text("\n".join(t.replace("\n", "; ") for t in titles) + "\n")
    write_volumes(folder, arrays.x[:4], data.test, arrays.index[:4])
    np.save(folder / "counts.npy", arrays.counts)
    np.save(folder / "features.npy", arrays.features)


def write_volumes(folder, x, part, index):
    """sample_00.nii.gz and so on, with the spacing of the volume whose condition was asked for, and that mask
    as sample_00_mask.nii.gz."""
    for i, (volume, k) in enumerate(zip(x.numpy(), index)):
        one = volume[0] if imaging() else sum((c + 1) * m for c, m in enumerate(volume)).astype(np.uint8)
        volumes.write_nifti(folder / f"sample_{i:02d}.nii.gz", one, part.spacing[k])
        if mask_channels():
            volumes.write_nifti(folder / f"sample_{i:02d}_mask.nii.gz", np.array(part.masks[k]),
                                part.spacing[k])


def draw_loss(folder, arrays, ref, log):
    """loss_by_t: validation loss beside the best linear guess of every voxel; loss: the training so far."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    t, mean = ref.t.numpy(), arrays.table.mean(0)
    ax.plot(t, ref.linear, "k--", lw=1, label=f"linear guess, mean {ref.linear.mean():.4f}")
    ax.plot(t, mean, "o-", ms=3, color="C3", label=f"network, mean {mean.mean():.4f}")
    ax.fill_between(t, *np.quantile(arrays.table, [0.1, 0.9], 0), color="C3", alpha=0.2, lw=0)
    ax.set(xlabel="t (0 = data, 1 = noise)", ylabel="(v_hat - v)^2 a voxel", yscale="log")
    ax.legend(fontsize=8)
    save_artifact(folder, "loss_by_t", np.stack([t, mean, ref.linear]), figure)
    if log is None or not log.exists():
        return
    rows = common.read_log(log)
    n = max(1, len(rows["step"]) // 80)
    smooth = np.convolve(rows["loss"], np.ones(n) / n, "valid")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    axes[0].plot(rows["step"][n - 1:], smooth, lw=1, label=f"training, mean of {n} steps")
    axes[0].axhline(ref.zero, color="0.6", ls=":", lw=1, label=f"predicting zero {ref.zero:.3f}")
    axes[0].axhline(ref.linear_training, color="k", ls="--", lw=1,
                    label=f"linear guess {ref.linear_training:.3f}")
    axes[0].set(xlabel="optimizer step", ylabel="loss", yscale="log", title=f"t in training: {TIME}")
    axes[0].legend(fontsize=8)
    axes[1].plot(rows["step"], rows["grad_norm"], lw=0.6)
    axes[1].set(xlabel="optimizer step", ylabel="gradient norm before clipping", yscale="log",
                title=f"{int(rows['skipped'][-1])} steps skipped by the guard")
    kept = np.stack([rows[name] for name in ("step", "loss", "lr", "grad_norm")])
    save_artifact(folder, "loss", kept, figure)


def draw_strip(folder, model, data):
    """strip.png: from noise to a volume, with the one-step guess below each x_t."""
    path = []
    sample(model, [seed_of(SEED, "sample", 0)], condition_of(data.test, [0]), path=path)
    shown = [path[i] for i in np.linspace(0, len(path) - 1, 9).astype(int)]
    slices = [[x[0, 0, x.shape[2] // 2].numpy()[::-1] for x in (x_t, x_0_hat)] for _, x_0_hat, x_t in shown]
    top, bottom = zip(*slices)
    figure = tile(np.array([[(p + 1) / 3 for p in top], bottom]), "from noise to data",
                  rows=["x_t", "x_0_hat"], columns=[f"t = {t:.2f}" for t, _, _ in shown], cell=1.2)
    save_artifact(folder, "strip", np.array(slices), figure)


@torch.no_grad()
def draw_guesses(folder, model, data):
    """x0hat_by_t.png: one test volume noised to t, and the guess of x_0 in one step: what each t can know."""
    times, device = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), model.mu.device
    x_0 = target(data.test, [0])
    eps = torch.randn(x_0.shape, generator=generator_of(SEED, "guess"))
    s = times.view(-1, 1, 1, 1, 1)
    x_t = (1 - s) * x_0 + s * eps
    now = {k: v.expand(len(times), *v.shape[1:]).to(device) for k, v in condition_of(data.test, [0]).items()}
    guess = (x_t.to(device) - s.to(device) * model(x_t.to(device), times.to(device), **now)).cpu()
    noise = psnr(guess, x_0.expand_as(guess), 1.0)
    middle = x_0.shape[2] // 2
    rows = [[x[0, middle].numpy()[::-1] for x in part] for part in (x_t, guess)]
    figure = tile(np.array([[(p + 1) / 3 for p in rows[0]], rows[1]]), "one step from t to the data",
                  rows=["x_t", "guess"], cell=1.4,
                  columns=[f"t {t:.1f}: {d:.1f} dB" for t, d in zip(times.tolist(), noise.tolist())])
    save_artifact(folder, "x0hat_by_t", noise, figure)


def draw_neighbours(folder, data, arrays):
    """neighbours.png: the samples nearest to a training volume, that volume, and the difference."""
    mine = small(arrays.x)
    best, which = torch.full((len(mine),), math.inf), torch.zeros(len(mine), dtype=torch.long)
    for i in range(len(data.train.names)):
        d = (mine - small(target(data.train, [i]))).norm(dim=1)
        which[d < best], best = i, best.minimum(d)
    rows = []
    for i in best.argsort()[:4].tolist():
        x, near = arrays.x[i].numpy(), target(data.train, [int(which[i])])[0].numpy()
        rows.append([views(x)[0], views(near)[0], views(np.abs(x - near))[0]])
    figure = sheet(rows, [""] * len(rows), ["sample", "nearest training", "difference"],
                   "the samples nearest to a training volume: copies would show")
    save_artifact(folder, "neighbours", torch.stack([best, which.float()], 1), figure)


def draw_counts(folder, arrays):
    """counts.png: lesions asked for and counted, of each size."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    said, got = arrays.counts.sum(2).T
    jitter = np.random.default_rng(0).uniform(-0.15, 0.15, (2, len(said)))
    top = max(said.max(), got.max()) + 1
    axes[0].plot([0, top], [0, top], color="0.7", lw=1)
    axes[0].plot(said + jitter[0], got + jitter[1], "o", ms=4, alpha=0.6)
    axes[0].set(xlabel="lesions asked for", ylabel="lesions counted", xlim=(-0.5, top), ylim=(-0.5, top),
                title=f"within 1: {(abs(got - said) <= 1).mean():.2f}, exact: {(got == said).mean():.2f}")
    place = np.arange(bins)
    axes[1].bar(place - 0.2, arrays.counts[:, 0].mean(0), 0.4, color="0.6", label="asked for")
    axes[1].bar(place + 0.2, arrays.counts[:, 1].mean(0), 0.4, color="C3", label="counted")
    axes[1].set_xticks(place, size_names)
    axes[1].set(xlabel="size, mm", ylabel="lesions a volume")
    axes[1].legend(fontsize=8)
    save_artifact(folder, "counts_by_size", arrays.counts, figure)


def report(folder, model, data, ref, log=None, board=None, step=0):
    """Every number, picture and array of one epoch folder; returns the metrics."""
    metrics, arrays = evaluate(model, data, ref, SAMPLES)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = f"{MODE}: {SOLVER}, {metrics['evaluations']['value']:.0f} evaluations a volume"
    draw_samples(folder, data, arrays, recipe)
    draw_loss(folder, arrays, ref, log)
    draw_strip(folder, model, data)
    draw_guesses(folder, model, data)
    draw_neighbours(folder, data, arrays)
    if arrays.counts.any():
        draw_counts(folder, arrays)
    common.save_metrics(None, folder, metrics)
    if board is not None:
        for name, m in metrics.items():
            if m["value"] is not None:
                board.add_scalar(f"eval/{name}", m["value"], step)
    return metrics


# ---------------------------------------------------------------- solver sweep
def sweep():
    """SWEEP=all: 5 fixed solvers x 5 numbers of steps and 4 adaptive ones x 2 tolerances on the finished run
    in OUT, all from the same noise: evaluations, distance to real volumes with its bootstrap interval, and
    how far the samples are from the exact solution. SWEEP=euler,heun2: those alone. T_END, GUIDANCE,
    TOGETHER, SAMPLES, PRECISION are this command's or the defaults, all else is the run's. Writes
    solver_sweep_all_0.02.png, .npy and .md (0.02: T_END) into OUT/3d_rflow."""
    chosen = (*fixed_steps, *adaptive) if SWEEP == "all" else tuple(name.strip() for name in SWEEP.split(","))
    if not set(chosen) <= set(methods):
        fail(f"SWEEP={SWEEP!r}: all, or some of {', '.join(methods)}")
    stem = f"solver_sweep_{SWEEP.replace(',', '_').replace(' ', '')}_{T_END:g}"
    device, folder = common.pick_device(), Path(OUT) / "3d_rflow"
    checkpoint = common.load_checkpoint(folder / "last.pt")
    kept = "OUT SWEEP SAMPLES T_END TOGETHER GUIDANCE PRECISION".split()
    globals().update({k: v for k, v in checkpoint["settings"].items() if k not in kept})
    data, ref = prepare(device)
    model, n = build_ema(checkpoint, data, device), len(ref.test)
    exact = draw_set(model, data.test, n, solver="dopri5", tolerance=1e-5)[0]
    plan = [(s, dict(steps=k), k) for s in chosen if s in fixed_steps for k in (5, 10, 25, 50, 100)]
    plan += [(s, dict(tolerance=tol), tol) for s in chosen if s in adaptive for tol in (1e-2, 1e-3)]
    rows = []
    for solver, how, given in tqdm(plan, desc="sweep", disable=None):
        clock = time.monotonic()
        x, _, asked = draw_set(model, data.test, n, solver=solver, **how)
        seconds = (time.monotonic() - clock) / n
        real, own = reduced(ref.features["test"], features_of(ref.encoder, x, device))
        low, high = bootstrap(own, lambda f: frechet(f, real), 100, centred=True)
        rows.append([given, asked, frechet(own, real), low, high, frechet_wavelet(x, ref.test),
                     float((x - exact).square().mean().sqrt()), seconds])
    rows = np.array(rows)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for i, solver in enumerate(chosen):
        at = [j for j, p in enumerate(plan) if p[0] == solver]
        for ax, column in zip(axes, (2, 5, 6)):
            ax.plot(rows[at, 1], rows[at, column], "o-" if solver in fixed_steps else "s--", ms=4, lw=1,
                    label=solver, color=f"C{i}")
    at = [j for j, p in enumerate(plan) if p[0] == chosen[0]]
    axes[0].fill_between(rows[at, 1], rows[at, 3], rows[at, 4], color="C0", alpha=0.15, lw=0)
    for ax, name in zip(axes, (f"Frechet distance of features ({chosen[0]}: 95 %)",
                               "Frechet wavelet distance", "distance to the exact solution, RMS")):
        ax.set(xlabel="evaluations a volume", ylabel=name, xscale="log", yscale="log")
    axes[0].legend(fontsize=7, ncols=2)
    save_artifact(folder, stem, rows, figure)
    lines = ["| solver | steps or tolerance | evaluations | Frechet (95 %) | wavelet | to exact | seconds |",
             "|---|---|---|---|---|---|---|"]
    for (solver, _, given), r in zip(plan, rows):
        lines.append(f"| {solver} | {given:g} | {r[1]:.0f} | {r[2]:.4f} ({r[3]:.4f} .. {r[4]:.4f}) | "
                     f"{r[5]:.4f} | {r[6]:.5f} | {r[7]:.2f} |")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    if LATER:
        fail(f"EXPERIMENT={EXPERIMENT} needs {LATER}, which this version does not have yet")
    modes = ("bravo", "image", "bravo_seg_cond", "seg", "seg_conditioned", "seg_conditioned_input",
             "seg_conditioned_improved")
    choices = dict(MODE=modes, FIELD=("auto", "head", "crop"), BACKBONE=("unet", "dit", "sit"),
                   PREDICTION=("residual", "velocity", "x0"), TIME=("mixture", "logit-normal", "uniform"),
                   AUGMENT=("none", "scoreaug", "sda"), SOLVER=(*fixed_steps, *adaptive),
                   PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(allowed)}")
    for name in ("EPOCHS BATCH_SIZE ACCUM LR WIDTH PATCH DIM DEPTH HEADS FACTOR SHIFT STEPS TOLERANCE "
                 "EVAL_EVERY CLIP T_CLIP").split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(TRAIN=(2, 10**6), VAL=(2, 10**6), TEST=(2, 10**6), DROPOUT=(0, 0.99), EMA_DECAY=(0, 1),
                  BETA2=(0, 0.99999), WARMUP=(0, 1), WEIGHT_DECAY=(0, 10), T_END=(0, 0.5), T_CLIP=(0, 0.5),
                  COUNT_DROP=(0, 1), GUIDANCE=(0, 100), TRIES=(1, 1000), LABELS=(0, 255), TSTR=(0, 10**6),
                  SEED=(0, 2**63 - 1))
    for name, (low, high) in ranges.items():
        if not low <= globals()[name] <= high:
            fail(f"{name}={globals()[name]} must lie between {low:g} and {high:g}")
    if SAMPLES < 8:
        fail(f"SAMPLES={SAMPLES}: the numbers of a report need at least 8 volumes")
    if len(SHAPE) != 3 or min(SHAPE) < 8:
        fail(f"SHAPE={SHAPE}: three sides D,H,W of at least 8 voxels")
    if MODE != "image" and DATA != "phantom" and LABELS == 0:
        fail(f"LABELS=0: MODE={MODE} needs masks; MODE=image does not")
    if DATA == "phantom" and LABELS != 1:
        fail(f"LABELS={LABELS}: the phantoms' masks have the label 1 alone")
    if TSTR and not mask_channels():
        fail(f"TSTR={TSTR}: MODE={MODE} draws no images under masks to train a segmenter on")
    if SWEEP and world > 1:
        fail("SWEEP compares solvers in one process: start it without torchrun")
    if BACKBONE == "unet":
        factor = PATCH * 2 ** (len(MULTS) - 1)
        if any(s % factor for s in SHAPE):
            fail(f"SHAPE={SHAPE} does not divide by {factor}: PATCH={PATCH}, {len(MULTS) - 1} halvings in "
                 f"MULTS={MULTS}")
        for name in ("BLOCKS", "ATTENTION"):
            if len(globals()[name]) != len(MULTS):
                fail(f"{name}={globals()[name]} needs one entry for each level of MULTS={MULTS}")
        if any(m < 1 or WIDTH * m % 8 for m in MULTS):
            fail(f"WIDTH={WIDTH} times each of MULTS={MULTS} must be divisible by 8, the groups of the norms")
    elif DIM % HEADS or DIM // HEADS < 6 or DIM // HEADS % 2:
        fail(f"DIM={DIM} over HEADS={HEADS} must be a whole, even number of at least 6, a pair for each axis")
    elif (tokens := math.prod(-(-s // PATCH) for s in SHAPE)) > 16_384:
        fail(f"PATCH={PATCH} makes {tokens:,} tokens of SHAPE={SHAPE}, more than 16,384: raise it")
    if BATCH_SIZE % world:
        fail(f"BATCH_SIZE={BATCH_SIZE} does not divide over {world} processes")


def prepare(device, rank=0, world=1):
    """Data and reference rows (the latter on rank 0 only). A mistake in the data ends here, in one line."""
    try:
        if rank == 0:
            data = load_data()
        if world > 1:
            torch.distributed.barrier()
        data = data if rank == 0 else load_data()
    except (ValueError, OSError) as error:
        fail(error)
    return data, reference(data, device) if rank == 0 else None


def build_model(data):
    """The network for the data at hand: shapes come from the volumes, never from a table."""
    return Flow(data.mu.shape[0], mask_channels(), data.mu, data.sigma)


def build_ema(checkpoint, data, device):
    """The averaged model of a checkpoint, ready to sample; one line when it was trained on other data."""
    if checkpoint["data"] != data.hash:
        fail(f"the checkpoint was trained on other data than DATA={DATA} gives now")
    model = Flow(*checkpoint["channels"], *(checkpoint["ema"][k][0] for k in ("mu", "sigma"))).to(device)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint's EMA")
    return model.eval().requires_grad_(False)


def inference_full(checkpoint, folder, log):
    """Redraw every number and picture of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: from common.load_checkpoint, its settings already put back (sample.py --full does both)."""
    check_settings()
    device = common.pick_device()
    data, ref = prepare(device)
    return report(folder, build_ema(checkpoint, data, device), data, ref, log)


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` volumes under the conditions of test volumes; prompt, where lesions are counted: how
    many of each size, as in "0,0,0,1,0,2,0". sample_00.nii.gz and so on, samples.npy, samples.png."""
    check_settings()
    device = common.pick_device()
    try:
        data = load_data()
    except (ValueError, OSError) as error:
        fail(error)
    model, index = build_ema(checkpoint, data, device), [i % len(data.test.names) for i in range(count)]
    condition = condition_of(data.test, index)
    if prompt:
        words = [word.strip() for word in prompt.split(",")]
        numbers = [int(word) for word in words if word.isdecimal()]
        if not counting() or not len(numbers) == len(words) == bins or max(numbers) > cap:
            fail(f"--prompt {prompt!r}: " + (
                f"{bins} counts up to {cap}, for lesions of {', '.join(size_names)} mm, such as 0,0,0,1,0,2,0"
                if counting() else f"MODE={MODE} takes none; conditions come from test volumes"))
        condition = dict(counts=torch.tensor([numbers] * count))
    x, _ = sample_many(model, [seed_of(seed, "sample", i) for i in range(count)], condition)
    titles, spacing = [f"seed {i}" for i in range(count)], data.test.spacing[index]
    if counting():
        x, _ = redraw(model, seed, x, condition, spacing)
        asked, got = condition["counts"].numpy(), count_masks(x, spacing)
        titles = [f"asked {a}\ngot {b}" for a, b in zip(asked.sum(1), got.sum(1))]
        print(f"number and sizes of the lesions as asked for in {(got == asked).all(1).sum()} of {count} "
              f"masks (TRIES={TRIES})")
    folder.mkdir(parents=True, exist_ok=True)
    masks = condition["mask"].amax(1).numpy() if "mask" in condition else [None] * count
    figure = sheet([views(v.numpy(), m) for v, m in zip(x, masks)], titles,
                   ["axial", "coronal", "sagittal"], f"{MODE}: {SOLVER}")
    save_artifact(folder, "samples", x, figure)
    write_volumes(folder, x, data.test, index)


def steps_per_epoch(data):
    return max(1, len(data.train.names) // (BATCH_SIZE * ACCUM))


def train_step(handle, model, ema, optimizer, guard, data, step, total, run):
    """One optimizer step on the effective batch: forward and backward ACCUM times, clip, guard, step, EMA.
    Returns the mean loss of the batch, the learning rate and the gradient norm."""
    batches = draw_batch(data, step, guard.rollbacks)
    torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
    model.train()
    lr = lr_at(step, total, LR, WARMUP) * guard.lr_scale
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=run.device)
    for i in range(ACCUM):
        for batch in batches:
            # each process takes its share of each part
            part = {k: v.chunk(ACCUM)[i].chunk(run.world)[run.rank].to(run.device) for k, v in batch.items()}
            with autocast(run.device, PRECISION):
                loss = loss_fn(handle, **part).mean()
            (loss / ACCUM).backward()
            loss_sum += loss.detach() / len(batches)
    if run.world > 1:
        torch.distributed.all_reduce(loss_sum)
    loss = float(loss_sum) / (ACCUM * run.world)
    norm, taken = guarded_step(optimizer, list(model.parameters()), guard, loss, CLIP)
    if taken:
        ema_update(ema, model, EMA_DECAY, step)
    return loss, lr, norm


def main():
    check_settings(int(os.environ.get("WORLD_SIZE", 1)))
    if SWEEP:
        return sweep()
    free = "EPOCHS EVAL_EVERY SAVE_SECONDS TENSORBOARD COMPILE EXPERIMENT SWEEP "  # may differ later on:
    free += "SOLVER STEPS TOLERANCE TOGETHER T_END GUIDANCE TRIES SAMPLES TSTR"  # no part in training
    run = start(__file__, globals(), free.split())
    data, ref = prepare(run.device, run.rank, run.world)
    torch.manual_seed(SEED)
    model = build_model(data).to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, BETA2), weight_decay=WEIGHT_DECAY, fused=True)
    guard = Guard()
    at = SimpleNamespace(step=0, reported=0, best=math.inf, seconds=0.0)  # where the run is
    per_epoch = steps_per_epoch(data)
    total = EPOCHS * per_epoch
    last, log = run.folder / "last.pt", run.folder / "log.csv"

    def save(path):
        return common.save_checkpoint(
            path, run, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            guard=dict(vars(guard)), **vars(at), channels=[data.mu.shape[0], mask_channels()], data=data.hash)

    def save_last():
        """last.pt is also where a rollback goes, so a state that may be diverging is not worth keeping."""
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
            print(f"continuing after step {at.step} of {total}")
    handle = torch.compile(model) if COMPILE else model  # a second handle: the state_dict keeps its names
    if run.world > 1:
        handle = nn.parallel.DistributedDataParallel(handle)
    board = None
    if run.rank == 0:
        common.open_log(log, at.step)
        board = common.open_tensorboard(run.folder) if TENSORBOARD else None
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{data.facts}\n{parameters:,} parameters, {16 * parameters / 2**20:.0f} MiB with EMA and "
              f"optimizer; {per_epoch} steps an epoch; loss of the zero predictor {ref.zero:.3f}, of the "
              f"linear guess of each voxel {ref.linear.mean():.4f}")
        with run.evaluation():  # once, small, before hours are spent: a broken evaluation shows now
            evaluate(ema, data, ref, 8)
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
                with run.evaluation():
                    metrics = report(folder, ema, data, ref, log, board, at.step)
                    facts = dict(seconds=round(at.seconds, 1), parameters=parameters)
                    common.save_metrics(run, folder, metrics, **facts)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue  # the loop ends; the next start draws this report again
            at.reported = at.step
            if run.rank == 0 and metrics is not None:
                idle = at.step > max(200, 2 * WARMUP * total) and (
                    metrics["val_loss"]["value"] > 0.98 * metrics["val_loss"]["floor"])
                tqdm.write(f"epoch {epoch}: {summary(metrics)}"
                           + ("  ALARM: no better than a linear guess of each voxel" if idle else ""))
                if metrics["val_loss"]["value"] < at.best:
                    at.best = float(metrics["val_loss"]["value"])
                    save(run.folder / "best.pt")
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
        bar.update(1)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", lr=f"{lr:.1e}", refresh=False)
        if at.step % per_epoch == 0:
            mean = float(np.mean(losses[-per_epoch:]))
            idle = at.step > max(200, 2 * WARMUP * total) and mean > 0.95 * ref.zero
            tqdm.write(f"epoch {epoch + 1:4d}  loss {mean:.4f} (linear guess {ref.linear_training:.4f}, zero "
                       f"{ref.zero:.3f})  lr {lr:.1e}  grad {guard.average:.2f}  skipped {guard.skipped}  "
                       f"{at.seconds:.0f} s" + ("  ALARM: no better than predicting zero" if idle else ""))
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
