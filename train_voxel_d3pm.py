"""
Discrete diffusion of block trees (D3PM), in one file: from a prompt to a tree that stands in the game.

    q(x_t = k | x_0) = alpha_bar 1(k = x_0) + (1 - alpha_bar) pi(k)     alpha_bar = 1 - t;  t = 0 is data
        absorbing: pi = 1 at MASK;  uniform: pi = 1/K;  marginal: pi = frequencies   (Austin 2021, appendix A)
    p(k) = p(x_0 = k | x_t)  ~  exp(F(x_t, t, prompt)) prior(k) Z(k),   Z(k) = q(x_t | x_0 = k)
    L = 1/t sum over (masked) voxels of -log p(x_0) / N_ref: the ELBO; or its t-fold; or L_vb + lambda CE
    p(x_s = k | x_t) = [a 1(k = x_t) + (1-a) pi(x_t)] [alpha_bar_s r(k) + (1-alpha_bar_s) pi(k) sum(r)]
        r = p / Z,  a = alpha_bar_t / alpha_bar_s:  exact for any jump from t to s < t when p is exact
    t_i = cos(pi i / 2N), i = 0 .. N: late steps reveal many voxels, the early and decisive ones few

    python train_voxel_d3pm.py                         # oak, birch, spruce on 16^3; 2 CPU cores, 10 minutes
    python train_voxel_d3pm.py SPECIES=all TRAIN=65536 EMA_DECAY=0.999 EPOCHS=6 EVAL_EVERY=3 OUT=runs_all
    python train_voxel_d3pm.py PROCESS=uniform OUT=runs_uniform
    python train_voxel_d3pm.py --lr 2e-5 --res-blocks 3 --attn-levels 1,2 --dropout 0.15 OUT=runs_slow
    python train_voxel_d3pm.py DATA=my_trees.npz OUT=runs_mine           # own trees, see data/trees.py
    python train_voxel_d3pm.py GRID=32 SPECIES=all TRAIN=65536 WIDTH=64 MULTS=1,2,4 \
        RES_BLOCKS=2 ATTN_LEVELS=2,3 BATCH_SIZE=256 LR=3e-4 EMA_DECAY=0.9995 EPOCHS=400 EVAL_EVERY=40
    python sample.py --checkpoint runs/voxel_d3pm/last.pt --prompt "tall oak tree" --size normal \
        --num-samples 5 --sampling-steps 100           # pictures, .schem for the game, .vox; REPAIR=sar is a
                                                       # setting, INPAINT=trunk.schem grows a crown on yours

Letters: B trees in a batch, n the grid's side, K classes of blocks (0 is air), S = K states and MASK (= K)
where the process absorbs, L words of a caption, N sampling steps. A grid is [y, z, x], y up. What is noised
and drawn is the box of the grid that trees of the data reach, (h, w, w); the rest is air.
Not here: per-class loss weights, confidence order, top-p, argmax, which change the law that is drawn; species
swap, larger worlds, blocks of other things. A plan first and its detail then is COARSE.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
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
from data import trees, voxel_files
from metrics import mann_whitney
from model_dit import DiT
from model_unet import UNet

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
DATA = "trees"       # drawn trees; or a file of own ones, .npz or .npy (see data/trees.py)
GRID = 16            # blocks a side: 16 or 32; every kind fits 32
SPECIES = "oak,birch,spruce"  # kinds of drawn trees, which take turns; "all" that fit the grid
JITTER = 0           # the trunk stands up to so many blocks off the middle: the hard mode, try 4
TRAIN = 16384        # drawn trees to train on; 65536 for all kinds
TEST = 1024          # drawn trees of another stream: half to compare with, half as the reference "fresh"
EPOCHS = 14          # passes over the training trees; the lab notes: 300, 400
BATCH_SIZE = 32      # trees in a forward pass, over all processes
ACCUM = 1            # forward passes in an optimizer step
LR = 1e-3            # peak; 2e-3 for WIDTH=16, 3e-4 for WIDTH=64. The lab notes: 5e-5, 2e-5
WARMUP = 0.05        # share of the optimizer steps
WEIGHT_DECAY = 0.01  # of AdamW
BETA2 = 0.99         # of AdamW
CLIP = 1.0           # gradient norm
EMA_DECAY = 0.998    # of the weights we sample from; 0.999 to 0.9999 for long runs
PROCESS = "absorbing"  # "uniform", "marginal": what a block turns into
LOSS = "elbo"        # "ce": plain cross-entropy, other weights in time; "hybrid": L_vb + LAMBDA cross-entropy
LAMBDA = 0.01        # LOSS=hybrid: 0.001 for pictures and 0.01 for text in the paper
VB_STEPS = 1000      # LOSS=hybrid: T of L_vb
REVERSE = "mixture"  # "plug-in" (D3PM, UDLM): wrong for uniform and marginal after LOSS=ce
PRIOR = "voxel"      # F starts from the frequencies of each voxel; "class": those of the whole grid
BACKBONE = "unet"    # or "dit"
PATCH = 2            # side of the blocks' cube that becomes one position: 16^3 -> 8^3; dit: 4 at 32^3
EMBED = 8            # numbers that a block becomes before the network
WIDTH = 32           # unet: channels of the first level
MULTS = (1, 2)       # unet: channels of each level in units of WIDTH; each level halves the grid
RES_BLOCKS = 1       # unet: ResBlocks a level; the lab notes: 2, 3
ATTN_LEVELS = (2,)   # unet: levels with self-attention; 1 is what PATCH leaves, 8^3. The middle has it
DIM = 192            # dit: width
DEPTH = 6            # dit: blocks
HEADS = 6            # dit: heads
DROPOUT = 0.0        # inside the blocks; the lab notes: 0.1, 0.15. Drawn trees never run out
PROMPT_DROP = 0.1    # share of captions left out in training, for guidance
SELF_CONDITION = False  # also feed the estimate of the step before (Chen 2022): half as fast in training
COARSE = ""          # "plan": learn grids of half the side; "detail": learn trees given their plan
PLAN_FROM = ""       # COARSE=detail: last.pt of the plans' run, for sampling
STEPS = 64           # sampling steps; the lab notes: 100, 200
GUIDANCE = 1.0       # w: 1 = none; 1.5 to 2.5 follows the prompt more and varies less
AIR_BIAS = 0.0       # added to air's log-probability when sampling; 0 is what the data say
REPAIR = "none"      # sample.py: "remdm" remasks on the way, "sar" remasks what is broken, "rules" deletes it
REMASK = "loop"      # of ReMDM: "cap", "rescale", "loop"
ETA = 0.1            # of ReMDM: share of revealed voxels that are hidden again, see sigma_of()
SAR_ROUNDS = 8       # structure-aware remasking: at most so many rounds
SAR_STEPS = 16       # and so many steps in each
SIZE = ""            # sample.py --size: "small", "normal", "large"; it wins over the prompt's word
INPAINT = ""         # sample.py: a file with blocks to keep: .schem, .schematic, .nbt, .litematic, .vox
FORMATS = "schem,vox"  # files of samples: some of schem, nbt, litematic, vox
SAMPLES = 192        # trees of a report
DRAWS = 1024         # of each kind, for its bits per tree: +- 0.5 bits at 1024
EVAL_EVERY = 7       # epochs between reports
KEEP_EVERY = 0       # also keep epoch_NNNN.pt every so many epochs, a multiple of EVAL_EVERY; 0 = never
SAVE_SECONDS = 60.0  # between saves of last.pt
PRECISION = "auto"   # "bf16", "fp32"; auto = bf16 where the hardware multiplies it
COMPILE = False      # torch.compile: worth it for runs of an hour and more
TENSORBOARD = False  # needs the optional package tensorboard
SEED = 0
OUT = "runs"         # the run goes to OUT/voxel_d3pm
RESUME = True        # continue OUT/voxel_d3pm when its settings agree; False moves it aside


# ---------------------------------------------------------------- data
def kinds():
    """Names of the drawn kinds."""
    if SPECIES == "all":
        return tuple(trees.fitting(GRID, JITTER))
    return tuple(name.strip() for name in SPECIES.split(",") if name.strip())


def load_data():
    """
    data.train, .test, .fresh: namespaces of voxels uint8 (N, n, n, n), slots (list of N dicts) and kind (list
    of N names). data.K classes; box (h, w, w), see box_of(); counts of the training trees, (h, w, w, K) or,
    for PRIOR=class, (K,), no class impossible; blocks, their mean number in a tree; names, the kinds; seen,
    the different slots of training trees, a list of dicts; pi, the noise law. Raises ValueError or OSError in
    one line.
    """
    if DATA == "trees":
        cache = Path(OUT) / "cache"
        parts = [trees.trees(kinds(), count, GRID, trees.SEEDS[split], JITTER, cache)
                 for split, count in (("train", TRAIN), ("test", TEST))]
        facts = "; ".join(part.facts for part in parts)
        train, test = (SimpleNamespace(voxels=part.voxels, slots=part.slots,
                                       kind=[list(trees.KINDS)[k] for k in part.species]) for part in parts)
        half = TEST // 2
    else:
        found = trees.load(DATA, GRID)
        facts, order = found.facts, np.random.default_rng(0).permutation(len(found.voxels))
        half = len(order) // 10
        train, test = (SimpleNamespace(voxels=found.voxels[at], slots=[found.slots[i] for i in at],
                                       kind=[found.slots[i]["species"] for i in at])
                       for at in (order[2 * half:], order[:2 * half]))
    if half < 6 or len(train.voxels) < 6:
        raise ValueError(f"DATA={DATA}: {len(train.voxels)} trees to train on and {half} to compare with, "
                         "expected 6 or more: give more trees")
    if COARSE == "plan":
        train.voxels, test.voxels = pooled(train.voxels), pooled(test.voxels)
    data, content = SimpleNamespace(train=train, facts=facts), hashlib.blake2b(digest_size=8)
    data.test, data.fresh = (SimpleNamespace(**{k: v[i * half:(i + 1) * half] for k, v in vars(test).items()})
                             for i in (0, 1))
    for part in (train, test):
        content.update(np.ascontiguousarray(part.voxels))
    data.hash, data.names = content.hexdigest(), sorted(
        set(train.kind) & set(data.test.kind), key=list(trees.KINDS).index)
    data.K = 1 + max(int(part.voxels.max()) for part in (train, test))
    g, voxels = np.random.default_rng(0), train.voxels
    if DATA != "trees":  # as draw_batch() turns them
        voxels = np.stack([trees.augment(v, g, JITTER) for v in train.voxels for _ in range(8)])
    data.box = box_of([train, test])
    voxels = in_box(voxels, data.box)
    counts = np.stack([(voxels == k).sum(0) for k in range(data.K)], -1).astype(np.float64)
    share = (counts.sum((0, 1, 2)) + 1) / (counts.sum() + data.K)  # no class is impossible
    data.counts = (counts.sum((0, 1, 2)) + 1) if PRIOR == "class" else counts + 0.01 * share
    data.frequencies, data.blocks = share, float(counts[..., 1:].sum() / len(voxels))
    data.seen = [dict(said) for said in sorted({tuple(slots.items()) for slots in train.slots}, key=str)]
    data.pi = noise_law(share)
    return data


def divisor():
    """What a side of the network's grid must divide by."""
    return PATCH * (2 ** (len(MULTS) - 1) if BACKBONE == "unet" else 1)


def box_of(parts):
    """(h, w, w): the smallest box about the trunk that holds every tree, and that the network can halve. The
    air around it would cost the network most of its time."""
    side = parts[0].voxels.shape[1]
    if COARSE:  # a plan and its detail must have one frame
        return (side,) * 3
    y, *across = np.logical_or(*(part.voxels.any(0) for part in parts)).nonzero()
    reach = max(np.abs(a + 0.5 - side // 2).max() + 0.5 for a in across)
    reach += 0 if DATA == "trees" else 2 + JITTER  # turned about the axis of a 2x2 trunk, and moved

    def upto(n, step):
        return min(-(-int(n) // step) * step, side)
    h, w = upto(y.max() + 1, divisor()), upto(2 * reach, math.lcm(2, divisor()))
    return h, w, w


def in_box(v, box):
    """The box (h, w, w) of grids (N, n, n, n), without a copy."""
    low = (v.shape[-1] - box[-1]) // 2
    return v[:, :box[0], low:low + box[1], low:low + box[2]]


def to_states(v, box):
    """uint8 classes (N, n, n, n) -> int64 states in the box, (N, h, w, w)."""
    return torch.from_numpy(in_box(v, box).astype(np.int64))


def to_voxels(x, model):
    """int64 states in the model's box (N, h, w, w) -> uint8 classes (N, n, n, n) as data.trees has them, with
    MASK 15."""
    n = GRID // 2 if COARSE == "plan" else GRID
    v = np.zeros((len(x), n, n, n), np.uint8)
    x = x.cpu().numpy()
    in_box(v, x.shape[1:])[:] = np.where(x == model.K, trees.MASK, x)
    return v


def pooled(v):
    """Plans: uint8 (N, n, n, n) -> (N, n/2, n/2, n/2), of eight blocks a log if there is one, else
    leaves, else air."""
    N, n = len(v), v.shape[1] // 2
    rank = np.where(trees.is_log(v), v + 100, v).reshape(N, n, 2, n, 2, n, 2)
    return (rank.max((2, 4, 6)) % 100).astype(np.uint8)


# ---- captions: words become rows of a table, by a hash that is the same everywhere and always
vocabulary = 1024
null, pad = vocabulary, vocabulary + 1  # rows for "no caption" and for "no word"


@functools.lru_cache(100_000)
def rows_of(caption):
    """Rows of a caption's words; [null] for an empty one."""
    return [zlib.crc32(word.encode()) % vocabulary for word in re.findall("[a-z0-9]+", caption)] or [null]


def tokens(captions):
    """(B, L) int64 of B captions, padded."""
    rows = [rows_of(caption) for caption in captions]
    return torch.tensor([row + [pad] * (max(map(len, rows)) - len(row)) for row in rows])


def species_only(kind):
    """The caption that says nothing but the species of a kind."""
    return trees.phrase(dict(species=trees.KINDS[kind].species))


def draw_batch(data, step, attempt=0):
    """Everything random about optimizer step `step`, for the whole effective batch of BATCH_SIZE ACCUM trees:
    a dict of what loss_fn() takes. A function of (SEED, step, attempt) alone, so a resumed run repeats an
    unbroken one. attempt counts rollbacks: another order."""
    n, g = BATCH_SIZE * ACCUM, generator_of(SEED, "step", step, attempt)
    dice = np.random.default_rng(seed_of(SEED, "words", step, attempt))
    index = batch_order(SEED, step, n, len(data.train.kind), attempt)
    voxels = data.train.voxels[index]
    if DATA != "trees":  # drawn trees look in all directions already
        voxels = np.stack([trees.augment(v, dice, JITTER) for v in voxels])
    x_0 = to_states(voxels, data.box)
    # stratified, and dense where the sampler's steps are; in random order, as processes share the batch
    u = (torch.randperm(n, generator=g) + torch.rand((), generator=g)) / n
    t = torch.cos(math.pi / 2 * u)
    if LOSS == "hybrid":
        t = (t * VB_STEPS).ceil().clamp(min=1) / VB_STEPS
    captions = [trees.caption(data.train.slots[i], dice, PROMPT_DROP) for i in index]
    batch = dict(x_0=x_0, x_t=q_sample(x_0, t, data.pi, g), t=t, words=tokens(captions))
    if SELF_CONDITION:
        batch["again"] = torch.rand(n, generator=g) < 0.5
    if COARSE == "detail":
        hidden = torch.rand(n, generator=g) < 0.15
        plan = torch.from_numpy(pooled(voxels)).long()
        batch["plan"] = torch.where(wide(hidden, plan), data.K, plan)
    return batch


# ---------------------------------------------------------------- model
class Words(nn.Module):
    """Captions (B, L) -> (B, width): rows of a table, four learned questions that pool them, an MLP."""

    def __init__(self, width, size=64, questions=4):
        super().__init__()
        self.table = nn.Embedding(vocabulary + 2, size)
        self.questions = nn.Linear(size, questions, bias=False)
        self.out = nn.Sequential(nn.Linear(questions * size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, words):
        rows = self.table(words)  # (B, L, size)
        scores = self.questions(rows).masked_fill((words == pad)[..., None], -math.inf)
        return self.out((scores.softmax(1).mT @ rows).flatten(1))  # (B, questions, size) before flatten


class Denoiser(nn.Module):
    """
    Logits of p(x_0 | the other voxels of x_t, t, prompt): what posterior() makes p(x_0 | x_t) of.

    prior   (h, w, w, K) log-frequencies that F is added to: the network starts as independent voxels
    pi      (S,) the noise law, part of every checkpoint
    """

    def __init__(self, prior, pi):
        super().__init__()
        self.K, extra = prior.shape[-1], 0
        self.block = nn.Embedding(len(pi), EMBED)
        if SELF_CONDITION:
            self.before, extra = nn.Linear(self.K, EMBED, bias=False), extra + EMBED
        if COARSE == "detail":
            self.plan, extra = nn.Embedding(self.K + 1, EMBED), extra + EMBED
        channels = (EMBED + 3 + extra, self.K)
        if BACKBONE == "unet":
            levels = tuple(level + 1 in ATTN_LEVELS for level in range(len(MULTS)))
            self.net = UNet(channels=channels, dims=3, width=WIDTH, mults=MULTS, blocks=RES_BLOCKS,
                            attention=levels, patch=PATCH, dropout=DROPOUT)
            width = self.net.time_dim
        else:
            self.net = DiT(channels=channels, dims=3, patch=PATCH, dim=DIM, depth=DEPTH, heads=HEADS,
                           dropout=DROPOUT)
            width = self.net.dim
        self.words = Words(width)
        y, z, x = torch.meshgrid(*(torch.arange(n) / 16 for n in prior.shape[:3]), indexing="ij")
        middle = prior.shape[1] // 2 / 16
        place = torch.stack([y, (z - middle).abs(), (x - middle).abs()], -1)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("prior", prior.float())
        self.register_buffer("pi", pi.double())

    def forward(self, x_t, t, words, before=None, plan=None):
        """x_t int64 (B, h, w, w), t (B,), words (B, L); before: p of the step before (B, h, w, w, K); plan
        int64 (B, n/2, n/2, n/2), K where there is none. Returns float32 (B, h, w, w, K)."""
        assert x_t.dtype == torch.long, "x_t are drawn blocks, never probabilities: those would give x_0 away"
        parts = [self.block(x_t)]
        if SELF_CONDITION:
            parts.append(self.before(before) if before is not None else torch.zeros_like(parts[0]))
        if COARSE == "detail":
            if plan is None:
                plan = x_t.new_full([len(x_t)] + [s // 2 for s in x_t.shape[1:]], self.K)
            for axis in (1, 2, 3):
                plan = plan.repeat_interleave(2, axis)
            parts.append(self.plan(plan))
        inputs = torch.cat([*parts, self.place.expand(len(x_t), -1, -1, -1, -1)], -1).movedim(-1, 1)
        if x_t.device.type != "cpu" or torch.is_autocast_enabled("cpu"):  # channels last: faster in fp32
            inputs = inputs.contiguous()
        return self.net(inputs, t, vector=self.words(words)).float().movedim(1, -1) + self.prior


def build_model(data):
    """The network for the data at hand."""
    log = torch.from_numpy(np.log(data.counts / data.counts.sum(-1, keepdims=True)))
    return Denoiser(log.expand(*data.box, data.K), data.pi)


# ---------------------------------------------------------------- method: noise, posteriors, losses
def alpha_bar(t):
    """Probability that a block is still its own at time t."""
    return 1 - t


def noise_law(frequencies):
    """pi (S,) float64 of PROCESS; frequencies (K,)."""
    K = len(frequencies)
    if PROCESS == "absorbing":
        return F.one_hot(torch.tensor(K), K + 1).double()
    even = torch.ones(K, dtype=torch.float64) / K
    return even if PROCESS == "uniform" else torch.as_tensor(frequencies, dtype=torch.float64)


def wide(t, x):
    """t (B,) with as many axes as x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def draw(law, u):
    """int64 (...): one state each, from law (..., S) or (S,), by u (...) in [0, 1). Never one of probability
    0."""
    c = law.double().cumsum(-1)
    if law.ndim == 1:  # one law for all: what follows, faster
        return torch.searchsorted(c, u * c[-1], right=True).clamp(max=len(c) - 1)
    return (c <= u[..., None] * c[..., -1:]).sum(-1).clamp(max=law.shape[-1] - 1)


def q_sample(x_0, t, pi, g):
    """x_t ~ q(x_t | x_0): keep a block with probability alpha_bar, else draw from pi. x_0 int64 (B, ...)."""
    u = torch.rand((2, *x_0.shape), generator=g, dtype=torch.float64).to(x_0.device)
    return torch.where(u[0] < wide(alpha_bar(t.double()), x_0), x_0, draw(pi.to(u), u[1]))


def likelihood(x_t, t, pi, K):
    """Z(k) = q(x_t | x_0 = k), (B, ..., K)."""
    a, same = wide(alpha_bar(t), x_t)[..., None], x_t[..., None] == torch.arange(K, device=x_t.device)
    return a * same + (1 - a) * pi.to(t.dtype)[x_t][..., None]


def posterior(logits, x_t, t, pi):
    """log p(x_0 = k | x_t), (B, ..., K): what the other voxels say, times what this one says (Bayes). Where
    the process absorbs, Z keeps a revealed voxel and changes nothing elsewhere (Sahoo 2024, SUBS)."""
    return (logits + likelihood(x_t, t, pi, logits.shape[-1]).log()).log_softmax(-1)


def reverse(log_p, x_t, t, s, pi, plug_in=False):
    """
    p(x_s | x_t), (B, ..., S), for s < t (B,): the mean of q(x_s | x_t, x_0) over x_0 ~ p, closed. With p at
    one x_0 it is that posterior itself (D3PM, eq. 3). plug_in: p in the place of x_0 there (UDLM): right only
    for a p learned in that form, and where the process absorbs.
    """
    S, K, pi = len(pi), log_p.shape[-1], pi.to(log_p.dtype)
    a_t, a_s = (wide(alpha_bar(time), x_t)[..., None] for time in (t, s))
    same, pi_here, a = x_t[..., None] == torch.arange(S, device=x_t.device), pi[x_t][..., None], a_t / a_s
    r = F.pad(log_p.exp(), (0, S - K))
    if not plug_in:
        Z = a_t * same + (1 - a_t) * pi_here
        r = r / torch.where(Z > 0, Z, 1)  # r is 0 where Z is; a where() around the quotient has NaN gradients
    law = (a * same + (1 - a) * pi_here) * (a_s * r + (1 - a_s) * pi * r.sum(-1, keepdim=True))
    return law / law.sum(-1, keepdim=True)  # it sums to 1 but for rounding, and for the plug-in


def rate_gap(log_p, x_0, x_t, t, pi):
    """The ELBO's integrand at time t, nats of each voxel (B, ...). MASK: -log p(x_0) / t (Shi 2024); else the
    sum over k != x_t of R_hat - R + R log(R / R_hat): rates of jumps to k, R knows x_0 and R_hat does not."""
    K, S = log_p.shape[-1], len(pi)
    if S > K:
        return -log_p.gather(-1, x_0[..., None])[..., 0] / wide(t, x_t)
    pi, a = pi.to(log_p.dtype), wide(alpha_bar(t), x_t)[..., None]
    states = torch.arange(K, device=x_t.device)
    q = a * (x_0[..., None] == states) + (1 - a) * pi
    rate = pi[x_t][..., None] / a * q / q.gather(-1, x_t[..., None])  # beta = -alpha_bar' / alpha_bar = 1 / a
    r = log_p.exp() / likelihood(x_t, t, pi, K)
    ratio = pi[x_t][..., None] / a * (a * r + (1 - a) * pi * r.sum(-1, keepdim=True)) / rate
    return (rate * (ratio - 1 - ratio.log()) * (x_t[..., None] != states)).sum(-1)


def loss_fn(model, x_0, x_t, t, words, pi, blocks, again=None, plan=None):
    """
    Loss of each tree (B,), in nats a block. x_0, x_t int64 (B, h, w, w), t (B,) = cos(pi u / 2) of uniform u,
    words (B, L), pi (S,), blocks = N_ref; again (B,) bool: who sees a first estimate; plan: as forward.

    elbo: rate_gap() with the density of t undone: its mean is the ELBO. ce: -log p(x_0) summed over voxels,
    the ELBO times t; it looks less at the last blocks, which make a tree whole. hybrid: as in D3PM, eq. 5.
    """
    before = None
    if again is not None:
        with torch.no_grad():
            first = posterior(model(x_t, t, words, plan=plan), x_t, t, pi).exp()
            before = first * wide(again, x_t)[..., None]
    log_p = posterior(model(x_t, t, words, before, plan), x_t, t, pi)
    ce = -log_p.gather(-1, x_0[..., None])[..., 0]  # (B, h, w, w)
    if LOSS == "elbo":
        density = wide(math.pi / 2 * (1 - t.square()).clamp(min=0).sqrt(), x_t)  # dt/du
        ce = density * rate_gap(log_p, x_0, x_t, t.clamp(1e-4, 1 - 1e-4), pi)
    elif LOSS == "hybrid":
        late = t.double()
        chance = ((late - 1 / VB_STEPS).clamp(min=0).acos() - late.acos()) * 2 / math.pi  # of this t
        exact = F.one_hot(x_0, log_p.shape[-1]).to(log_p.dtype).log()
        q, p = (reverse(law, x_t, t, (t - 1 / VB_STEPS).clamp(min=0), pi, plug) for law, plug in (
            (exact, False), (log_p, REVERSE == "plug-in")))
        KL = (torch.special.xlogy(q, q) - torch.special.xlogy(q, p.clamp(min=1e-30))).sum(-1)
        ce = KL / wide(chance.to(KL.dtype), x_t) + LAMBDA * ce
    return ce.flatten(1).sum(1) / blocks


# ---------------------------------------------------------------- sampling
def cosine_grid(steps, begin=1.0):
    """Times from begin down to 0, (steps + 1, B): t_i = cos(pi u_i / 2), u evenly spaced. begin (B,), or one
    number for all (B = 1)."""
    begin = torch.as_tensor(begin, dtype=torch.float64).reshape(-1)
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    times = torch.cos(math.pi / 2 * u + (1 - u) * begin.acos())
    times[0], times[-1] = begin, 0.0
    return times


def sigma_of(kind, t, s):
    """ReMDM's share of revealed voxels that become MASK again in the step from t to s (Wang 2025, sec. 4)."""
    most = ((1 - alpha_bar(s)) / alpha_bar(t).clamp(min=1e-12)).clamp(max=1.0)
    return most.clamp(max=ETA) if kind == "cap" else ETA * most


def schedule(steps, begin=1.0, kind=""):
    """The sampler's steps, a list of (t, s, sigma), each (B,) as begin. kind "": sigma is 0; "cap" and
    "rescale": see sigma_of(); "loop": down to t = 0.1, half of the steps there, hiding as much as they
    reveal, then down to 0."""
    stay = steps // 2 if kind == "loop" and steps > 3 else 0
    times = cosine_grid(steps - stay, begin)
    plan = [(t, s, sigma_of(kind, t, s) if kind in ("cap", "rescale") else torch.zeros_like(t))
            for t, s in zip(times, times[1:])]
    if stay:
        near = 1 + int((times[1:-1].mean(1) - 0.1).abs().argmin())
        t = times[near]
        plan[near:near] = [(t, t, (t / (1 - t)).clamp(max=ETA))] * stay
    return plan


def remask(log_p, x_t, t, s, sigma):
    """ReMDM's step, (B, ..., S): as reverse() where sigma (B,) is 0; a revealed voxel becomes MASK with
    probability sigma, and so much more is revealed that the share of MASK is the same (Wang 2025, eq. 5)."""
    a_t, a_s, sigma = (wide(v, x_t)[..., None] for v in (alpha_bar(t), alpha_bar(s), sigma))
    hidden, masked = (x_t == log_p.shape[-1])[..., None], (1 - a_t).clamp(min=1e-12)
    reveal = log_p.exp() * torch.where(hidden, (a_s - (1 - sigma) * a_t) / masked, 1 - sigma)
    stay = torch.where(hidden, (1 - a_s - sigma * a_t) / masked, sigma)
    return torch.cat([reveal, stay.expand_as(reveal[..., :1])], -1).clamp(min=0)


@torch.no_grad()
def sample(model, seeds, words, steps=None, kind="", begin=1.0, x=None, known=None, plan=None, path=None):
    """
    THE sampler: reports and sample.py come here.

    seeds   one for each tree: its random numbers depend on nothing else
    words   (B, L) captions
    steps   STEPS where None
    kind    of ReMDM: "" for none, "cap", "rescale", "loop"
    begin   the time to start from, a number or (B,), with x int64 (B, h, w, w); else pure noise, drawn here
    known   int64 (B, h, w, w), -1 where nothing is known: blocks that are never MASK (PROCESS=absorbing)
    plan    int64 (B, n/2, n/2, n/2) for COARSE=detail
    path    a list that gets (t, x on the CPU) before every step, and the result
    Returns x_0 int64 (B, h, w, w) and a namespace: asked, evaluations of the network a tree; revealed, the
    mean number of blocks that each step decided together, blind to each other.
    """
    K, pi, device = model.K, model.pi, model.pi.device
    absorbing, shape = len(pi) > K, model.prior.shape[:3]
    generators, words = [generator_of(seed, "x") for seed in seeds], words.to(device)
    nothing = torch.full_like(words[:, :1], null)

    def uniform():
        u = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(u).to(device)

    x = draw(pi, uniform()) if x is None else x.to(device)
    if known is not None:
        known = known.to(device)
        x = torch.where(known >= 0, known, x)
        begin = (known < 0).double().mean((1, 2, 3)).cpu()  # t is the share of MASK
    before, info = None, SimpleNamespace(asked=0, revealed=[])
    for step in schedule(steps or STEPS, begin, kind if absorbing else ""):
        t, s, sigma = (v.expand(len(x)).to(device) for v in step)
        if path is not None:
            path.append((float(t[0]), x.cpu().clone()))
        guesses = []
        for caption in [words, nothing][:2 if GUIDANCE != 1 else 1]:
            with autocast(device, PRECISION):
                logits = model(x, t.float(), caption, before, plan)
            air = torch.arange(K, device=device) == 0
            guesses.append((logits + AIR_BIAS * air).log_softmax(-1))
        info.asked += len(guesses)
        if absorbing:  # guidance on p(x_0): the share that is revealed stays what the schedule says
            mixed = GUIDANCE * guesses[0] + (1 - GUIDANCE) * guesses[-1]
            log_p = posterior(mixed, x, t.float(), pi)
            law = remask(log_p, x, t, s, sigma) if kind else reverse(log_p, x, t, s, pi)
        else:  # on p(x_s | x_t), never on p(x_0) (Schiff 2024, D-CFG)
            estimates = [posterior(guess, x, t.float(), pi) for guess in guesses]
            logs = [reverse(p, x, t, s, pi, REVERSE == "plug-in").clamp(min=1e-30).log() for p in estimates]
            law = (GUIDANCE * logs[0] + (1 - GUIDANCE) * logs[-1]).softmax(-1)
            log_p = estimates[0]
        new = draw(law, uniform())
        new = new if known is None else torch.where(known >= 0, known, new)  # ReMDM would hide them too
        decided = (new != x) & (new > 0) & (new < K)
        info.revealed.append(float(decided.flatten(1).sum(1).double().mean()))
        x, before = new, log_p.exp() if SELF_CONDITION else None
    if path is not None:
        path.append((0.0, x.cpu().clone()))
    return x, info


@torch.no_grad()
def structure_remask(model, x, seeds, captions, known=None):
    """
    Structure-aware remasking (SAR): what trees.broken() finds, and the blocks around it, air too, become MASK
    and are drawn again, from t = their share down to 0; kept where SCS does not drop. It grows parts anew
    where rules only delete. x int64 (N, h, w, w), known alike with -1 where nothing must stay. Returns x and
    evaluations of the network a tree.
    """
    x, asked = x.clone(), 0
    for round_ in range(SAR_ROUNDS):
        voxels = to_voxels(x, model)
        bad = torch.from_numpy(in_box(trees.broken(voxels), x.shape[1:]).astype(np.float32))
        hidden = F.max_pool3d(bad[:, None], 3, 1, 1)[:, 0].bool().to(x.device)
        if known is not None:
            hidden &= known.to(x.device) < 0
        again = hidden.flatten(1).any(1).nonzero()[:, 0].tolist()
        if not again:
            break
        share = hidden[again].double().mean((1, 2, 3)).cpu()  # each has its own times
        new, info = sample_set(model, [seed_of(seeds[i], "sar", round_) for i in again],
                               [captions[i] for i in again], SAR_STEPS, begin=share,
                               x=x[again].masked_fill(hidden[again], model.K),
                               plan_seeds=[seeds[i] for i in again])
        asked += info.asked * len(again)
        kept = torch.from_numpy(trees.scs(to_voxels(new, model)).scs >= trees.scs(voxels[again]).scs)
        x[torch.tensor(again)[kept]] = new[kept].to(x.device)
    return x, asked / len(x)


def sample_set(model, seeds, captions, steps=None, kind="", known=None, begin=None, x=None, plan_seeds=None,
               batch=32):
    """sample() for any number of trees, with their plans where there are any (drawn with plan_seeds, or else
    seeds). Returns x_0 (N, h, w, w) on the CPU, and the namespace, averaged."""
    parts, infos = [], []
    for i in range(0, len(seeds), batch):
        now = slice(i, i + batch)
        more = {k: v[now] for k, v in dict(known=known, begin=begin, x=x).items() if v is not None}
        plan = plans((plan_seeds or seeds)[now], captions[now], model)
        drawn, info = sample(model, seeds[now], tokens(captions[now]), steps, kind, plan=plan, **more)
        parts.append(drawn.cpu()), infos.append((len(drawn), info))
    n = sum(k for k, _ in infos)
    mean = SimpleNamespace(asked=sum(k * info.asked for k, info in infos) / n,
                           revealed=sum(k * np.array(info.revealed) for k, info in infos) / n)
    return torch.cat(parts), mean


@functools.cache
def planner_of(path, device):
    """The averaged model and the settings of the run of plans at path."""
    checkpoint = common.load_checkpoint(path)
    theirs = checkpoint["settings"]
    if checkpoint["script"] != "train_voxel_d3pm" or theirs["COARSE"] != "plan" or theirs["GRID"] != GRID:
        fail(f"PLAN_FROM={path}: expected a run of this script with COARSE=plan GRID={GRID}")
    return under(theirs, build_ema, checkpoint, device), theirs


def under(settings, f, *arguments):
    """f(*arguments) under the settings of another run."""
    mine = common.settings(globals())
    try:
        globals().update(settings)
        return f(*arguments)
    finally:
        globals().update(mine)


def plans(seeds, captions, model):
    """COARSE=detail: plans (B, n/2, n/2, n/2) drawn by the run in PLAN_FROM for these captions, else None."""
    if COARSE != "detail":
        return None
    planner, theirs = planner_of(PLAN_FROM, model.pi.device)
    if planner.K != model.K:
        fail(f"PLAN_FROM={PLAN_FROM} knows {planner.K} classes of blocks, this run {model.K}")
    return under(theirs, sample, planner, [seed_of(seed, "plan") for seed in seeds], tokens(captions))[0]


# ---------------------------------------------------------------- evaluation
def neighbours(real, fake, k=5):
    """Precision, recall, density, coverage of statistics (N, d): a tree's ball reaches to the k-th other of
    its set, and is closed, since whole trees repeat (Naeem 2020; Kynkaanniemi 2019). Floats in a dict."""
    real, fake = (torch.as_tensor(a, dtype=torch.float64) for a in (real, fake))
    scale = torch.where(real.std(0) > 0, real.std(0), 1.0)  # what never varies must not rule the distance
    real, fake = (real - real.mean(0)) / scale, (fake - real.mean(0)) / scale
    k = min(k, len(real) - 1, len(fake) - 1)

    def distance(a, b):  # by differences: equal rows are at exactly 0
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    r_real, r_fake = (distance(a, a).kthvalue(k + 1, 1).values + 1e-9 for a in (real, fake))  # 1st: itself
    d = distance(fake, real)
    inside = d <= r_real
    return dict(precision=float(inside.any(1).double().mean()), density=float(inside.sum() / (k * len(fake))),
                recall=float((d <= r_fake[:, None]).any(0).double().mean()),
                coverage=float(inside.any(0).double().mean()))


def memory_of(train):
    """What nearest_train() needs of the training trees uint8 (M, n, n, n): their codes, and how to code."""
    flat = upright(train).reshape(len(train), -1)
    used, classes = np.flatnonzero(flat.any(0)), range(1, int(flat.max()) + 1)

    def code(a):  # (N, n, n, n) -> (N, used voxels x classes)
        a = a.reshape(len(a), -1)[:, used]
        return torch.from_numpy(np.concatenate([a == k for k in classes], 1)).float()
    return SimpleNamespace(code=code, codes=code(flat), size=torch.from_numpy((flat > 0).sum(1)))


def upright(v):
    """Trees (N, n, n, n) with their trunks in the middle again, which JITTER moves: else a copy looks new."""
    if not JITTER:
        return v
    n = v.shape[1]
    return np.stack([np.roll(tree, tuple((n - trees.trunk_axis(tree)) // 2), (1, 2)) for tree in v])


def nearest_train(v, memory):
    """1 - IoU of trees uint8 (N, n, n, n) with the nearest of memory_of(train), best over the symmetries
    about the trunk: float (N,). IoU: voxels of one class, not air / voxels filled in either."""
    best = []
    for tree in upright(v):
        same = memory.code(trees.symmetries(tree)) @ memory.codes.T
        best.append(1 - float((same / ((tree > 0).sum() + memory.size - same).clamp(min=1)).max()))
    return np.array(best)


def distribution(phi, test, fresh):
    """Mean over statistics of W1(samples, test) / W1(fresh, test): 1 is as near as new draws. W1 of samples
    of equal size: the mean gap of sorted values. phi, test (N, d); fresh (M, d): every N make one."""
    n = min(map(len, (phi, test, fresh)))
    scale = fresh.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    test = np.sort(test[:n], 0)

    def gap(a):
        return float((np.abs(np.sort(a, 0) - test).mean(0) / scale).mean())
    new = np.mean([gap(fresh[i:i + n]) for i in range(0, len(fresh) - n + 1, n)])
    return (gap(phi[:n]) + 1e-9) / (new + 1e-9)


def faithfulness(voxels, slots):
    """Shares of wishes that trees fulfil, measured on them: (N, number of slots), NaN: not asked."""
    table = np.full((len(voxels), len(trees.SLOTS)), np.nan)
    if COARSE == "plan":  # half as high as what captions say
        return table
    for i, (v, asked) in enumerate(zip(voxels, slots)):
        for slot, good in trees.faithful(v, asked).items():
            table[i, trees.SLOTS.index(slot)] = good
    return table


times_shown = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)


@torch.no_grad()
def by_time(model, part, count=64):
    """At each of times_shown, on `count` trees with species-only captions: cross-entropy in nats, accuracy,
    accuracy of always-air, recall of blocks that are not air; then cross-entropy of each class. (7, 4 + K).
    Over MASK where the process absorbs, over all voxels else: what is revealed is no merit."""
    device, K, rows = model.pi.device, model.K, []
    count = min(count, len(part.kind))  # the first: kinds take turns, own trees are shuffled
    for t in times_shown:
        total = np.zeros((3 + 2 * K,))
        for j in range(0, count, 32):
            now = range(j, min(j + 32, count))
            x_0 = to_states(part.voxels[now], model.prior.shape[:3])
            time_t = torch.full((len(now),), t)
            x_t = q_sample(x_0, time_t, model.pi.cpu(), generator_of(SEED, "by_time", t, j)).to(device)
            x_0, time_t = x_0.to(device), time_t.to(device)
            words = tokens([species_only(part.kind[i]) for i in now]).to(device)
            log_p = posterior(model(x_t, time_t, words), x_t, time_t, model.pi)
            asked = x_t == K if len(model.pi) > K else torch.ones_like(x_t, dtype=torch.bool)
            truth, ce = x_0[asked], -log_p.gather(-1, x_0[..., None])[..., 0][asked]
            right = log_p.argmax(-1)[asked] == truth
            sums = torch.stack([right.sum(), (truth == 0).sum(), (right & (truth > 0)).sum()]).double()
            truth, ce = truth.cpu(), ce.double().cpu()  # sums that are the same bits every time
            total += torch.cat([sums.cpu(), torch.zeros(K).double().index_add(0, truth, ce),
                                truth.bincount(minlength=K).double()]).numpy()
        right, air, found, ce, n = *total[:3], total[3:3 + K], total[3 + K:]
        all_ = max(n.sum(), 1)
        rows.append([ce.sum() / all_, right / all_, air / all_, found / max(n[1:].sum(), 1),
                     *(ce / np.maximum(n, 1))])
    return np.array(rows)


@torch.no_grad()
def tree_bits(model, voxels, words, draws, g, batch=32):
    """
    The ELBO: bits of each of `draws` estimates, (draws,), on trees uint8 (N, n, n, n) in turn; their mean is
    an upper bound of -log2 p(tree | caption). words (N, L).

    absorbing: n ~ U{1..D} of the D voxels of the box are MASK, weight D / n: the integral over t of
    Binomial(n; D, t) / t is 1 / n. n, else t, is stratified over the draws.
    """
    box = model.prior.shape[:3]
    device, K, D, found = model.pi.device, model.K, math.prod(box), []
    u = (torch.randperm(draws, generator=g) + torch.rand(draws, generator=g, dtype=torch.float64)) / draws
    for j in range(0, draws, batch):
        at = torch.arange(j, min(j + batch, draws))
        x_0 = to_states(voxels[at.numpy() % len(voxels)], box)
        if len(model.pi) > K:
            n = 1 + (u[at] * D).long()
            rank = torch.rand(len(at), D, generator=g, dtype=torch.float64).argsort(1).argsort(1)
            x_t, t = torch.where((rank < n[:, None]).view_as(x_0), K, x_0), (n / D).float()
        else:
            t = u[at].clamp(1e-4, 1 - 1e-4)
            x_t = q_sample(x_0, t, model.pi.cpu(), g)
        x_0, x_t, t = x_0.to(device), x_t.to(device), t.to(device)
        log_p = posterior(model(x_t, t.float(), words[at % len(words)].to(device)).double(), x_t, t.double(),
                          model.pi)
        found.append(rate_gap(log_p, x_0, x_t, t.double(), model.pi).flatten(1).sum(1).cpu())
    return torch.cat(found).numpy() / math.log(2)


def marginal_bits(part, kind, data):
    """Bits of a kind's trees of a part under independent voxels with the frequencies of its species' training
    trees: what knows each voxel and no tree, and of the caption as much as the model."""
    species = trees.KINDS[kind].species
    law = kind_law(data, *(name for name in trees.KINDS if trees.KINDS[name].species == species))
    x = in_box(np.stack([v for v, name in zip(part.voxels, part.kind) if name == kind]), data.box)
    p = np.take_along_axis(law[None], x[..., None].astype(np.int64), -1)
    return float(-np.log2(p).sum((1, 2, 3, 4)).mean())


def kind_law(data, *kinds):
    """Frequencies (h, w, w, K) of some kinds' training trees, no class impossible."""
    at = [i for i, name in enumerate(data.train.kind) if name in kinds]
    voxels = in_box(data.train.voxels[at], data.box)
    counts = np.stack([(voxels == k).sum(0) for k in range(data.K)], -1) + data.frequencies
    return counts / counts.sum(-1, keepdims=True)


def kind_entropy(kind):
    """Bits of a kind's trees given the species alone, which may be that of several kinds; None where that is
    not known: kinds with angles, own trees, plans."""
    if DATA != "trees" or COARSE == "plan" or kind not in trees.ENUMERABLE:
        return None
    species = trees.KINDS[kind].species
    return trees.entropy_bits(kind, JITTER, tuple(k for k in kinds() if trees.KINDS[k].species == species))


def rows_for(v, slots, ref):
    """One row of the table: what trees uint8 (N, n, n, n) get, drawn for captions that say `slots`."""
    parts, phi = trees.scs(v), trees.statistics(v)
    far = nearest_train(v, ref.memory)
    asked = faithfulness(v, slots)
    row = {name: getattr(parts, name).mean() for name in ("scs", "valid", *trees.PARTS, "species")}
    row |= dict(blocks=(v > 0).reshape(len(v), -1).sum(1).mean(),
                symmetry=phi[:, trees.STATISTICS.index("symmetry")].mean(),
                **neighbours(ref.phi, phi), unique=len({tree.tobytes() for tree in v}) / len(v),
                distribution=distribution(phi, ref.phi, ref.fresh_phi), distance=np.median(far),
                faithfulness=share(asked))
    return {k: float(x) for k, x in row.items()}, SimpleNamespace(parts=parts, phi=phi, far=far, asked=asked)


def share(asked):
    """Of wishes (..., NaN: not asked), how many were fulfilled."""
    return float(np.nanmean(asked)) if np.isfinite(asked).any() else math.nan


def reference(data):
    """What every report stands beside: five kinds of trees that need no training, as rows of its table. All
    are compared with test trees, and made for the captions of the fresh ones: a sample knows no more of the
    test trees than a new draw does."""
    ref, n = SimpleNamespace(), min(SAMPLES, len(data.test.kind), len(data.fresh.kind))
    g, dice = np.random.default_rng(0), np.random.default_rng(1)
    near = data.train.voxels[:2048]  # neighbours are looked for among these
    ref.memory = memory_of(near)
    kind = data.fresh.kind[:n]  # kinds take turns, and own trees are shuffled
    ref.captions = [trees.caption(slots, dice, 0.0) for slots in data.fresh.slots[:n]]  # none empty
    ref.slots = [trees.parse(caption) for caption in ref.captions]
    ref.phi, ref.fresh_phi = trees.statistics(data.test.voxels[:n]), trees.statistics(data.fresh.voxels)
    laws = {name: kind_law(data, name) for name in set(kind)}
    guess = np.stack([laws[name].argmax(-1) for name in kind])
    free = np.stack([(g.random(law.shape[:3] + (1,)) > law.cumsum(-1)[..., :-1]).sum(-1)
                     for law in (laws[name] for name in kind)])
    copies = data.train.voxels[[g.choice([i for i, k in enumerate(data.train.kind) if k == name] or [0])
                                for name in kind]]
    fresh, model = data.fresh.voxels[:n], SimpleNamespace(K=data.K)
    sets = {"always air": np.zeros_like(fresh), "marginal argmax": to_voxels(torch.from_numpy(guess), model),
            "independent marginals": to_voxels(torch.from_numpy(free), model), "training copy": copies,
            "fresh draw": fresh}
    ref.rows, kept = {}, {}
    for name, v in sets.items():
        ref.rows[name], kept[name] = rows_for(v, ref.slots, ref)
    ref.far, ref.shuffled = kept["fresh draw"].far, faithfulness(fresh[g.permutation(n)], ref.slots)
    ref.entropy = {name: kind_entropy(name) for name in data.names}
    ref.bits = {name: marginal_bits(data.test, name, data) for name in data.names}
    law = data.counts / data.counts.sum(-1, keepdims=True) * np.ones((*data.box, 1))
    x = to_states(near, data.box)[..., None]
    ce = -torch.from_numpy(np.log(law)).expand(len(x), -1, -1, -1, -1).gather(-1, x).sum((1, 2, 3, 4)).mean()
    # of MASK: the ELBO of independent voxels is their entropy, and LOSS=ce has E t = 2 / pi of it
    weight = {"elbo": 1.0, "ce": 2 / math.pi}.get(LOSS, math.nan) if PROCESS == "absorbing" else math.nan
    ref.start = float(ce) * weight / data.blocks
    return ref


def evaluate(model, data, ref, count, steps=None):
    """Every number of a report from `count` samples, beside its floor and ceiling; returns (metrics, arrays
    for the pictures)."""
    metrics, whole = {}, count >= len(ref.captions)  # or a trial of the evaluation
    count = min(count, len(ref.captions))

    def add(name, value, better, floor=None, ceiling=None, n=count):
        metrics[name] = dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    bits, draws = {}, DRAWS if whole else 8
    for name in data.names:
        at = [i for i, kind in enumerate(data.test.kind) if kind == name]
        bits[name] = tree_bits(model, data.test.voxels[at], tokens([species_only(name)]), draws,
                               generator_of(SEED, "bits", name))
    add("bits", float(np.mean([b.mean() for b in bits.values()])), "lower",
        floor=float(np.mean(list(ref.bits.values()))), n=draws * len(bits))
    for name, entropy in ref.entropy.items():
        if entropy is not None:
            add(f"bits_gap_{name}", float(bits[name].mean()) - entropy, "lower",
                floor=ref.bits[name] - entropy, ceiling=0.0, n=draws)
    looked = min(64 if whole else 8, len(data.test.kind))
    table = by_time(model, data.test, looked)
    half = table[times_shown.index(0.5)]
    add("accuracy", half[1], "higher", floor=half[2], ceiling=None, n=looked)
    add("recall_non_air", half[3], "higher", floor=0.0, ceiling=None, n=looked)

    seeds = [seed_of(SEED, "sample", i) for i in range(count)]
    captions, slots = ref.captions[:count], ref.slots[:count]
    clock = time.monotonic()
    x, info = sample_set(model, seeds, captions, steps)
    seconds = (time.monotonic() - clock) / count
    sets = {"raw": to_voxels(x, model)}
    sar_asked = 0.0
    if len(model.pi) > model.K:
        hidden, _ = sample_set(model, seeds, captions, steps, kind=REMASK)
        mended, sar_asked = structure_remask(model, x, seeds, captions)
        sets |= {"+ ReMDM": to_voxels(hidden, model), "+ SAR": to_voxels(mended, model)}
    sets["rules"] = trees.repair(sets["raw"])
    rows, kept = {}, {}
    for name, v in sets.items():
        rows[name], kept[name] = rows_for(v, slots, ref)
    trivial, oracle = ref.rows["independent marginals"], ref.rows["fresh draw"]
    for name in ("scs", "valid", "coverage", "precision", "recall", "density", "unique"):
        add(name, rows["raw"][name], "higher", floor=trivial[name], ceiling=oracle[name])
    near, fresh = rows["raw"]["distance"], oracle["distance"]
    add("novelty", near / fresh if fresh > 0 else float(kept["raw"].far.mean() / max(ref.far.mean(), 1e-9)),
        None, floor=0.0, ceiling=1.0)  # 0: copies of training trees; 1: as far from them as new draws
    far = map(torch.from_numpy, (kept["raw"].far, ref.far))
    add("novelty_z", mann_whitney(*far), None, floor=None, ceiling=0.0)
    asked = kept["raw"].asked
    add("faithfulness", share(asked), "higher", floor=share(ref.shuffled), ceiling=1.0)
    for i, slot in enumerate(trees.SLOTS):
        if np.isfinite(asked[:, i]).any():
            add(f"faithful_{slot}", share(asked[:, i]), "higher", floor=share(ref.shuffled[:, i]),
                ceiling=1.0, n=int(np.isfinite(asked[:, i]).sum()))
    add("distribution", rows["raw"]["distribution"], "lower", floor=trivial["distribution"], ceiling=1.0)
    add("symmetry", rows["raw"]["symmetry"], None, floor=trivial["symmetry"], ceiling=oracle["symmetry"])
    for short, name in (("remdm", "+ ReMDM"), ("sar", "+ SAR"), ("rules", "rules")):
        for what in ("scs", "valid", "coverage"):
            value = rows[name][what] if name in rows else math.nan
            add(f"{what}_{short}", value, "higher", floor=rows["raw"][what], ceiling=oracle[what])
    add("deleted_by_rules", rows["raw"]["blocks"] - rows["rules"]["blocks"], None, floor=0.0)
    add("revealed_first", float(info.revealed[0]), "lower", floor=rows["raw"]["blocks"])
    add("revealed_most", float(max(info.revealed)), "lower", floor=rows["raw"]["blocks"])
    add("seconds_per_sample", seconds, "lower")
    add("evaluations", float(info.asked), "lower")
    add("evaluations_sar", float(sar_asked), "lower")
    return metrics, SimpleNamespace(sets=sets, rows={**ref.rows, **rows}, kept=kept, by_time=table,
                                    captions=captions)


def summary(metrics):
    """The one line of a report: each number beside its floor and ceiling."""
    def one(name):
        m = metrics[name]
        beside = [f"{k} {m[k]:.3f}" for k in ("floor", "ceiling") if m[k] is not None]
        return f"{name} {m['value']:.3f}" + (f" ({', '.join(beside)})" if beside else "")
    names = "scs valid coverage faithfulness bits bits_gap_oak accuracy valid_remdm valid_sar valid_rules"
    return ", ".join(one(name) for name in names.split() if name in metrics)


# ---------------------------------------------------------------- pictures
def contact_sheet(v, lines, title, columns=8, most=48):
    """A figure of rendered trees uint8 (N, n, n, n), all at one scale, a line of text under each."""
    v, lines = v[:most], lines[:most]
    columns = min(columns, len(v))
    rows = -(-len(v) // columns)
    frame = frame_of(v)
    edges = dict(left=0.01, right=0.99, bottom=0.12 / rows, top=1 - 0.2 / rows, wspace=0.03, hspace=0.16)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.0 * rows + 0.4), squeeze=False,
                                facecolor="#faf8f3", gridspec_kw=edges)
    figure.suptitle(title, fontsize=9, color="#444444")
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, tree, line in zip(axes.flat, v, lines):
        ax.imshow(trees.render(tree, 170, frame))
        ax.text(0.5, -0.01, line, transform=ax.transAxes, ha="center", va="top", size=6.2, color="#666666")
    return figure


def frame_of(v):
    """Blocks, corner to corner, that a picture must hold to show nine of ten of these trees: one stray block
    must not make all others small."""
    needed = [float(v.shape[1])]
    for tree in v:
        if len(cells := np.argwhere((tree > 0) & (tree < trees.MASK))):
            y, z, x = (cells - (0, tree.shape[1] // 2, tree.shape[2] // 2)).T
            needed.append(float(max(np.abs(x - z).max() + 3, (trees.RISE * y - (x + z) / 2).max() / 1.4 + 3)))
    return float(np.quantile(needed[1:] or needed, 0.9))


def told(captions, parts, most=30):
    """A line for each tree: its caption, cut, and its SCS."""
    cut = [c if len(c) <= most else c[:most - 3] + "..." for c in captions]
    return [f"{caption}\nSCS {score:.2f}" for caption, score in zip(cut, parts.scs)]


def draw_samples(folder, arrays):
    """samples.png and .npy: the raw ones; samples_sar: mended; layers: horizontal slices; files for games."""
    for stem, name in (("samples", "raw"), ("samples_sar", "+ SAR")):
        if name in arrays.sets:
            v, row = arrays.sets[name], arrays.rows[name]
            numbers = ", ".join(f"{what} {row[what]:.2f}" for what in ("scs", "valid", "coverage"))
            title = (f"{name}: {numbers} "
                     f"({PROCESS}, {STEPS} steps, guidance {GUIDANCE:g})")
            lines = told(arrays.captions, arrays.kept[name].parts)
            save_artifact(folder, stem, v, contact_sheet(v, lines, title))
    v = arrays.sets["raw"][:6]
    top = max(2, int((v > 0).any((0, 2, 3)).nonzero()[0].max(initial=0)) + 1)
    colours = np.where(np.arange(16)[:, None] == 0, 250, trees.COLOURS) / 255
    figure = tile(colours[v[:, :top]], "layers, from the ground up",
                  rows=[f"sample {i}" for i in range(len(v))], columns=[f"y = {y}" for y in range(top)],
                  cell=0.7)
    save_artifact(folder, "layers", v[:, :top], figure)
    write_files(folder, arrays.sets["raw"][:4])
    raw = arrays.kept["raw"]
    np.save(folder / "scs_parts.npy", np.stack([getattr(raw.parts, p) for p in (*trees.PARTS, "species")], 1))
    np.save(folder / "statistics.npy", raw.phi)
    (folder / "captions.txt").write_text("\n".join(arrays.captions) + "\n")


def write_files(folder, v):
    """sample_00.schem and so on: FORMATS of each tree."""
    for i, tree in enumerate(v):
        for suffix in FORMATS.split(","):
            blocks = np.where(tree == trees.MASK, trees.AIR, tree)
            voxel_files.write(folder / f"sample_{i:02d}.{suffix.strip()}", blocks)


def draw_strip(folder, model, ref):
    """growth.png: three trees over the sampling steps, what is not decided as glass."""
    captions, seeds, path = ref.captions[:3], [seed_of(SEED, "sample", i) for i in range(3)], []
    _, info = sample(model, seeds, tokens(captions), path=path, plan=plans(seeds, captions, model))
    at = np.linspace(0, len(path) - 1, 9).round().astype(int)
    frames = np.stack([to_voxels(path[i][1], model) for i in at], 1)  # (3, 9, n, n, n)
    frame = frame_of(frames[:, -1])
    pictures = np.array([[trees.render(v, 150, frame, 0.03) for v in row] for row in frames]) / 255
    step = [f"t = {path[i][0]:.2f}: {(frames[:, j] % 15 > 0).sum() / 3:.0f} blocks" for j, i in enumerate(at)]
    title = (f"{len(info.revealed)} steps; blocks decided together: {info.revealed[0]:.2f} in the first, "
             f"{info.revealed[-1]:.1f} in the last")
    figure = tile(pictures, title, columns=step, cell=1.4)
    save_artifact(folder, "growth", frames, figure)


def draw_by_time(folder, arrays):
    """by_time: cross-entropy and accuracy at each t, beside always-air: averages over t hide broken trees."""
    table, t = arrays.by_time, np.array(times_shown)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    axes[0].plot(t, table[:, 0], "o-", ms=3)
    axes[0].set(xlabel="t (0 = data, 1 = noise)", ylabel="-log p(x_0), nats a voxel", yscale="log")
    for column, name, style in ((1, "accuracy", "o-"), (2, "accuracy of always-air", "k--"),
                                (3, "recall of blocks", "s-")):
        axes[1].plot(t, table[:, column], style, ms=3, label=name)
    axes[1].set(xlabel="t", ylim=(0, 1.02))
    axes[1].legend(fontsize=8)
    save_artifact(folder, "by_time", np.c_[t, table], figure)


def draw_table(folder, arrays):
    """table.md and .npy: the samples raw and mended, beside five kinds of trees that need no training."""
    columns = ("scs valid coverage precision recall density unique faithfulness distribution symmetry "
               "blocks").split()
    lines = ["| trees | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |"
              for name, row in arrays.rows.items()]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    place = np.arange(len(arrays.rows))
    for i, c in enumerate(("scs", "valid", "coverage")):
        ax.bar(place + 0.27 * (i - 1), [row[c] for row in arrays.rows.values()], 0.25, label=c)
    ax.set_xticks(place, [name.replace(" ", "\n", 1) for name in arrays.rows], fontsize=8)
    ax.legend(fontsize=8)
    numbers = np.array([[row[c] for c in columns] for row in arrays.rows.values()])
    save_artifact(folder, "table", numbers, figure)


def draw_history(folder, run_folder, epoch, metrics, arrays):
    """history: SCS, valid, coverage and bits over the epochs so far, the reference rows as lines."""
    names, table = ("scs", "valid", "coverage", "scs_sar", "valid_sar", "bits"), {}
    for path in sorted(Path(run_folder).glob("epoch_*/metrics.json")):
        with contextlib.suppress(ValueError, KeyError, OSError):
            found = json.loads(path.read_text())
            table[int(path.parent.name[6:])] = [found[name]["value"] for name in names]
    table = {e: row for e, row in table.items() if e < epoch}
    table[epoch] = [metrics[name]["value"] for name in names]
    history = np.array([[e, *row] for e, row in sorted(table.items())], dtype=float)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, name in enumerate(names[:5], 1):
        axes[0].plot(history[:, 0], history[:, i], "o-" if i < 4 else "s:", ms=4, label=name)
    for i, (name, row) in enumerate(list(arrays.rows.items())[:5]):
        axes[0].axhline(row["scs"], color=f"{0.15 * i + 0.1:.2f}", lw=0.8, ls="--", label=f"SCS of {name}")
    axes[0].axhline(0.8, color="C3", lw=0.6, label="wish of the lab notes")
    axes[0].set(xlabel="epoch", ylim=(-0.02, 1.04))
    axes[0].legend(fontsize=6, ncols=2)
    axes[1].plot(history[:, 0], history[:, 6], "o-", ms=4, label="bits a tree")
    axes[1].axhline(metrics["bits"]["floor"], color="k", ls="--", lw=1, label="independent voxels")
    axes[1].set(xlabel="epoch", yscale="log")
    axes[1].legend(fontsize=8)
    save_artifact(folder, "history", history, figure)


def draw_loss(folder, ref, log, epoch, data):
    """loss: the training up to this epoch."""
    if log is None or not log.exists():
        return
    rows = common.read_log(log)
    keep = rows["step"] <= epoch * steps_per_epoch(data)
    rows = {k: v[keep] for k, v in rows.items()}
    n = max(1, len(rows["step"]) // 80)
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.plot(rows["step"][n - 1:], np.convolve(rows["loss"], np.ones(n) / n, "valid"), lw=1,
            label=f"mean of {n} steps")
    if math.isfinite(ref.start):
        ax.axhline(ref.start, color="k", ls="--", lw=1, label="independent voxels")
    ax.set(xlabel="optimizer step", ylabel=f"loss ({LOSS}), nats a block", yscale="log")
    ax.legend(fontsize=8)
    kept = np.stack([rows[name] for name in ("step", "loss", "lr", "grad_norm")])
    save_artifact(folder, "loss", kept, figure)


def report(folder, model, data, ref, epoch, log=None, board=None):
    """Every number, picture and array of one epoch folder; returns the metrics."""
    metrics, arrays = evaluate(model, data, ref, SAMPLES)
    folder.mkdir(parents=True, exist_ok=True)
    draw_samples(folder, arrays)
    draw_strip(folder, model, ref)
    draw_by_time(folder, arrays)
    draw_table(folder, arrays)
    draw_history(folder, log.parent if log is not None else folder.parent, epoch, metrics, arrays)
    draw_loss(folder, ref, log, epoch, data)
    common.save_metrics(None, folder, metrics)
    if board is not None:
        for name, m in metrics.items():
            if m["value"] is not None:
                board.add_scalar(f"eval/{name}", m["value"], epoch)
    return metrics


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    choices = dict(PROCESS=("absorbing", "uniform", "marginal"), LOSS=("ce", "elbo", "hybrid"),
                   REVERSE=("mixture", "plug-in"), PRIOR=("voxel", "class"), BACKBONE=("unet", "dit"),
                   COARSE=("", "plan", "detail"), REPAIR=("none", "remdm", "sar", "rules"),
                   REMASK=("cap", "rescale", "loop"), SIZE=("", *trees.SAY["size"]),
                   PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(a or repr(a) for a in allowed)}")
    for name in ("EPOCHS BATCH_SIZE ACCUM LR WIDTH PATCH EMBED DIM DEPTH HEADS RES_BLOCKS STEPS EVAL_EVERY "
                 "CLIP SAR_STEPS VB_STEPS DRAWS").split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(GRID=(8, trees.HIGHEST), TRAIN=(6, 10**7), TEST=(12, 10**7), DROPOUT=(0, 0.99),
                  PROMPT_DROP=(0, 1), EMA_DECAY=(0, 1), BETA2=(0, 0.99999), WARMUP=(0, 1),
                  WEIGHT_DECAY=(0, 10), LAMBDA=(0, 1e6),
                  GUIDANCE=(0, 100), AIR_BIAS=(-100, 100), ETA=(0, 1), SAR_ROUNDS=(0, 1000), JITTER=(0, 32),
                  KEEP_EVERY=(0, 10**9), SEED=(0, 2**63 - 1))
    for name, (low, high) in ranges.items():
        if not low <= globals()[name] <= high:
            fail(f"{name}={globals()[name]} must lie between {low:g} and {high:g}")
    if SAMPLES < 8:
        fail(f"SAMPLES={SAMPLES}: the numbers of a report need at least 8 trees")
    if PROCESS != "absorbing" and (REPAIR in ("remdm", "sar") or INPAINT):
        fail(f"PROCESS={PROCESS} has no MASK, which REPAIR=remdm, REPAIR=sar and INPAINT need; use absorbing")
    if COARSE and (JITTER or DATA != "trees"):
        fail(f"COARSE={COARSE}: plans are for drawn trees in the middle, DATA=trees and JITTER=0")
    if (COARSE == "detail") != bool(PLAN_FROM):
        fail(f"COARSE={COARSE!r} with PLAN_FROM={PLAN_FROM!r}: COARSE=detail, and nothing else, needs the "
             "last.pt of a run that draws plans; train that first, with COARSE=plan")
    if DATA == "trees" and SAMPLES > TEST // 2:
        fail(f"SAMPLES={SAMPLES}: they are compared with half of TEST={TEST} trees; give TEST={2 * SAMPLES}")
    if KEEP_EVERY % EVAL_EVERY:
        fail(f"KEEP_EVERY={KEEP_EVERY} must be a multiple of EVAL_EVERY={EVAL_EVERY}")
    formats = {name.strip() for name in FORMATS.split(",")}
    known = {suffix[1:] for suffix in voxel_files.WRITERS}
    if not formats <= known:
        fail(f"FORMATS={FORMATS!r}: some of {', '.join(sorted(known))}")
    side = GRID // 2 if COARSE == "plan" else GRID
    if GRID % 2 or side % divisor():
        fail(f"GRID={GRID}: {side} blocks a side must divide by {divisor()}: PATCH={PATCH}"
             + (f", {len(MULTS) - 1} halvings in MULTS={MULTS}" if BACKBONE == "unet" else ""))
    if BACKBONE == "unet":
        if not MULTS or any(m < 1 or WIDTH * m % 8 for m in MULTS):
            fail(f"WIDTH={WIDTH} times each of MULTS={MULTS} must be divisible by 8, the groups of the norms")
        if any(not 1 <= level <= len(MULTS) for level in ATTN_LEVELS):
            fail(f"ATTN_LEVELS={ATTN_LEVELS}: MULTS={MULTS} has the levels 1 to {len(MULTS)}")
    elif DIM % HEADS or DIM // HEADS < 6 or DIM // HEADS % 2:
        fail(f"DIM={DIM} over HEADS={HEADS} must be a whole, even number of at least 6, a pair for each axis")
    if BATCH_SIZE % world:
        fail(f"BATCH_SIZE={BATCH_SIZE} does not divide over {world} processes")


def double_device(device):
    """The CPU for an Apple GPU, which has no float64: blocks are drawn in it."""
    return torch.device("cpu") if device.type == "mps" else device


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
    return data, reference(data) if rank == 0 else None


def steps_per_epoch(data):
    return max(1, len(data.train.kind) // (BATCH_SIZE * ACCUM))


def build_ema(checkpoint, device):
    """The averaged model of a checkpoint, ready to sample."""
    model = Denoiser(*(checkpoint["ema"][k].cpu() for k in ("prior", "pi"))).to(device)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint's EMA")
    return model.eval().requires_grad_(False)


def inference_full(checkpoint, folder, log):
    """Redraw every number and picture of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: from common.load_checkpoint, its settings already put back (sample.py --full does both)."""
    check_settings()
    device = double_device(common.pick_device())
    data, ref = prepare(device)
    if checkpoint["data"] != data.hash:
        fail(f"the checkpoint was trained on other data than DATA={DATA} gives now")
    epoch = checkpoint["step"] // steps_per_epoch(data)
    return report(folder, build_ema(checkpoint, device), data, ref, epoch, log)


def understood(prompt, seen):
    """What one prompt asks for: a dict of slots. A word that is not known, or that no training tree was, ends
    in one line; words that no tree was all at once get one."""
    try:
        asked = trees.parse(prompt)
    except ValueError as error:
        fail(error)
    asked |= dict(size=SIZE) if SIZE else {}  # --size wins: "tall oak tree" --size normal
    for slot, value in asked.items():
        known = {slots[slot] for slots in seen if slot in slots}
        if value not in known:
            fail(f"--prompt {prompt!r}: no training tree had {slot} {value}; there were "
                 f"{', '.join(map(str, sorted(known)))}")
    if not any(asked.items() <= slots.items() for slots in seen):
        same = [slots for slots in seen if slots["species"] == asked.get("species", slots["species"])]
        others = {slot: sorted({slots[slot] for slots in same}) for slot in asked if slot != "species"}
        print(f"note: no training tree was all of {prompt or 'this'!r}"
              + (f" at size {SIZE}" if SIZE else "") + "; "
              + "; ".join(f"{slot} was {', '.join(map(str, values))}" for slot, values in others.items()))
    return asked


def read_known(model, path, count):
    """INPAINT: the blocks of a file, as (count, h, w, w) with -1 where the network decides."""
    try:
        v, facts = voxel_files.read(path, GRID)
    except (ValueError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        fail(said if str(path) in str(said) else f"INPAINT={path}: {said}")
    if v.max() >= model.K:
        fail(f"INPAINT={path}: {voxel_files.BLOCKS[v.max()]} is not among the blocks of this run: "
             f"{', '.join(voxel_files.BLOCKS[1:model.K])}")
    inside = to_states(v[None], model.prior.shape[:3])[0]
    if (inside > 0).sum() < (v > 0).sum():
        fail(f"INPAINT={path}: {(v > 0).sum() - int((inside > 0).sum())} blocks stand outside what trees of "
             f"this run reach, {' x '.join(map(str, inside.shape))} blocks (y, z, x)")
    return torch.where(inside > 0, inside, -1).expand(count, -1, -1, -1)


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` trees for each prompt, which semicolons separate; empty: every species there is.
    samples.png, samples.npy uint8 (N, n, n, n), samples.txt and files of FORMATS. Where a prompt names no
    species, each tree draws its own; with INPAINT, the file says it."""
    check_settings()
    if COARSE == "plan":
        fail("this run draws plans, not trees; give it as PLAN_FROM to a run with COARSE=detail")
    device, seen = double_device(common.pick_device()), checkpoint["seen"]
    model = build_ema(checkpoint, device)
    known = None
    prompts = [part.strip() for part in prompt.split(";") if part.strip()]
    species = sorted({slots["species"] for slots in seen}, key=trees.SPECIES.index)
    if INPAINT:
        known = read_known(model, INPAINT, count)
        species = [trees.describe(to_voxels(known[:1].clamp(min=0), model)[0])["species"]]
    asked = [understood(part, seen) for part in prompts]
    asked = asked or [understood(name.replace("_", " "), seen) for name in species]
    seeds, captions, slots = [], [], []
    for wish in asked:
        for i in range(count):
            seeds.append(seed_of(seed, "sample", i))
            slots.append({"species": species[seeds[-1] % len(species)], **wish})
            captions.append(trees.phrase(slots[-1]))
    known = None if known is None else known.repeat(len(asked), 1, 1, 1)
    x, info = sample_set(model, seeds, captions, kind=REMASK if REPAIR == "remdm" else "", known=known)
    if REPAIR == "sar":
        x, more = structure_remask(model, x, seeds, captions, known)
        info.asked += more
    v = to_voxels(x, model)
    if REPAIR == "rules":
        before, v = v, trees.repair(v)
        if known is not None:
            v = np.where(to_voxels(known.clamp(min=0), model) > 0, before, v)
        print(f"rules deleted {(before > 0).sum() - (v > 0).sum()} of {(before > 0).sum()} blocks")
    parts, told_true = trees.scs(v), faithfulness(v, slots)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{PROCESS}, {len(info.revealed)} steps, guidance {GUIDANCE:g}, repair {REPAIR}"
    sheet = contact_sheet(v, told(captions, parts), title, min(8, max(count, 4)))
    save_artifact(folder, "samples", v, sheet)
    write_files(folder, v)
    text = [f"{i:02d}: {caption}; SCS {score:.3f}{', valid' if ok else ''}; {(tree > 0).sum()} blocks"
            for i, (caption, score, ok, tree) in enumerate(zip(captions, parts.scs, parts.valid, v))]
    (folder / "samples.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    print(f"SCS {parts.scs.mean():.3f}, valid {parts.valid.mean():.2f}, wishes fulfilled "
          f"{np.nanmean(told_true):.2f}; {info.asked:.0f} evaluations a tree; blocks decided together: "
          f"{info.revealed[0]:.2f} in the first step, {max(info.revealed):.1f} at most")


def train_step(handle, model, ema, optimizer, guard, data, step, total, run):
    """One optimizer step on the effective batch: forward and backward ACCUM times, clip, guard, step, EMA.
    Returns the mean loss of the batch, the learning rate and the gradient norm."""
    batch = draw_batch(data, step, guard.rollbacks)
    torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
    model.train()
    lr = lr_at(step, total, LR, WARMUP) * guard.lr_scale
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=run.device)
    for i in range(ACCUM):
        # each process takes its share of each part
        part = {k: v.chunk(ACCUM)[i].chunk(run.world)[run.rank].to(run.device) for k, v in batch.items()}
        with autocast(run.device, PRECISION):
            loss = loss_fn(handle, pi=model.pi, blocks=data.blocks, **part).mean()
        (loss / ACCUM).backward()
        loss_sum += loss.detach()
    if run.world > 1:
        torch.distributed.all_reduce(loss_sum)
    loss = float(loss_sum) / (ACCUM * run.world)
    norm, taken = guarded_step(optimizer, list(model.parameters()), guard, loss, CLIP)
    if taken:
        ema_update(ema, model, EMA_DECAY, step)
    return loss, lr, norm


def main():
    check_settings(int(os.environ.get("WORLD_SIZE", 1)))
    free = "EPOCHS EVAL_EVERY KEEP_EVERY SAVE_SECONDS TENSORBOARD COMPILE SIZE INPAINT FORMATS "  # may change
    free += "STEPS GUIDANCE AIR_BIAS REVERSE REPAIR REMASK ETA SAR_ROUNDS SAR_STEPS SAMPLES DRAWS PLAN_FROM"
    run = start(__file__, globals(), [name for name in free.split() if (name, LOSS) != ("REVERSE", "hybrid")])
    run.device = double_device(run.device)
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
            guard=dict(vars(guard)), **vars(at), seen=data.seen, data=data.hash)

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
        entropy = ", ".join(f"{name} {e:.2f}" for name, e in ref.entropy.items() if e is not None)
        print(f"{data.facts}\n{parameters:,} parameters, {data.K} classes, {data.blocks:.0f} blocks "
              f"a tree; {per_epoch} steps an epoch; bits a tree of independent voxels "
              f"{np.mean(list(ref.bits.values())):.1f}, at the least {entropy or 'unknown'}")
        with run.evaluation():  # once, small, before hours are spent: a broken evaluation shows now
            evaluate(ema, data, ref, 8, steps=2)
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
                    metrics = report(folder, ema, data, ref, epoch, log, board)
                    facts = dict(seconds=round(at.seconds, 1), parameters=parameters)
                    common.save_metrics(run, folder, metrics, **facts)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue  # the loop ends; the next start draws this report again
            at.reported = at.step
            if run.rank == 0 and metrics is not None:
                tqdm.write(f"epoch {epoch}: {summary(metrics)}")
                if metrics["bits"]["value"] < at.best:
                    at.best = float(metrics["bits"]["value"])
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
            continue
        if run.rank > 0:
            continue
        speed = BATCH_SIZE * ACCUM * at.step / at.seconds
        common.log_row(log, step=at.step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                       skipped=guard.skipped, samples_per_s=speed, seconds=at.seconds)
        bar.update(1)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", lr=f"{lr:.1e}", refresh=False)
        if len(losses) == 20:
            minutes = (total - at.step) * BATCH_SIZE * ACCUM / speed / 60
            tqdm.write(f"{speed:.0f} trees a second: {minutes:.0f} minutes of training to go, and reports")
        if at.step % per_epoch == 0:
            mean = float(np.mean(losses[-per_epoch:]))
            idle = at.step > max(200, 2 * WARMUP * total) and mean > 0.95 * ref.start
            tqdm.write(f"epoch {epoch + 1:4d}  loss {mean:.4f} (independent voxels {ref.start:.3f})  "
                       f"lr {lr:.1e}  grad {guard.average:.2f}  skipped {guard.skipped}  {at.seconds:.0f} s"
                       + ("  ALARM: no better than independent voxels" if idle else ""))
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
