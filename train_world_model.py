"""
A world model to play, in one file: past frames and actions in, the next frame out, in four network calls.

TAU HERE IS THE AMOUNT OF NOISE, 0 = clean, 1 = noise: the tau of the DreamerV4 paper is 1 - ours.

    z_tau = (1 - tau) z + tau eps        z: patches or latents of a frame; each frame has its own tau and eps
    z_hat = F(z_tau, tau, d, actions)    predicts z; a time layer sees `WINDOW` frames, never later ones
    L = (1 - 0.9 tau) |z_hat - z|^2      d = 1/K_MAX, the smallest step        (Hafner 2025, eq. 7, diffusion
                                                                               forcing: Chen 2024)
    L = (1 - 0.9 tau) |z_hat - sg(z*)|^2,   z* = ((tau - d) z_1 + tau z_2) / (2 tau - d)     for larger steps:
        z_1 = F(z_tau, tau, d/2),  z_2 = F(z', tau - d/2, d/2),  z' = z_tau + d/(2 tau) (z_1 - z_tau)
                                                      two half steps are one step  (Frans 2024, shortcut)
    z_(tau-d) = z_tau + d/tau (z_hat - z_tau)         the sampler: K steps of d = 1/K from tau = 1 to 0
    context: (1 - TAU_CTX) z + TAU_CTX eps, one eps a frame, and the network is told so

    python train_world_model.py                        # the drawn game, 2 CPU cores
    python train_world_model.py LEVEL=5 WINDOW=64 SEQ_LEN_LONG=96
    python train_world_model.py DATA=my_recordings/ TOKENIZER=mae OUT=runs_mine     # see data/episodes.py
    python train_world_model.py --dry-run              # what fits: memory of batches of each length
    python sample.py --checkpoint runs/world_model/last.pt --play         # in the terminal; --serve: a page

Letters: B rows of a batch, T frames, N tokens of a frame and c numbers in each, S tokens with action, noise
level and registers, K sampling steps. a[t] is the action that led INTO frame t; null: not known.
Not here: rewards, agents, imagination training, LPIPS (nothing is downloaded), video files.
"""

import copy
import hashlib
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import common
from common import (Guard, Muon, Optimizers, autocast, batch_order, ema_update, fail, generator_of,
                    guarded_step, lr_at, override, save_artifact, seed_of, start, tile)
from data import episodes, game
from metrics import frechet, ssim
from model_dit import Before, Layer, SpaceTime, grid_positions, near, rms

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
DATA = "game"        # the drawn game of data/game.py; or recordings, see data/episodes.py
LEVEL = 1            # of the game: 0 agent, 1 a ball, 2 coins, 3 a cloud, 4 a second room, 5 a question
STOCHASTIC = False   # the ball turns by chance, one step in 20
TRAIN = 432          # episodes of the game to train on, of 128 frames
TEST = 64            # episodes of the game for the numbers; of own data, the last tenth
ACTION_ALIGN = "into"  # of own data: a[t] led into frame t; "from": it was taken there
STRIDE = 8           # frames between the beginnings of short training windows
TOKENIZER = "none"   # patches of pixels; "mae": a masked autoencoder, trained first
PATCH = 4            # side of a patch in pixels
LATENTS = 0          # mae: latent tokens of a frame (the paper's way); 0: one in the place of each patch
CODE = 16            # mae: numbers in each, within -1 and 1
PACK = 1             # mae: latents in a token of the dynamics
TOK_DIM = 128        # mae: width
TOK_DEPTH = 3        # mae: layers of the encoder, and of the decoder
TOK_STEPS = 3000     # mae: optimizer steps
TOK_BATCH = 64       # mae: frames in a batch
TOK_LR = 3e-3        # mae: peak
MASK_MOST = 0.9      # mae: up to this share of the patches is hidden
EDGES = 0.2          # mae: weight of the error of edges beside that of pixels
DIM = 64             # width of the dynamics
DEPTH = 4            # layers, every TIME_EVERY-th of which looks into the past
HEADS = 4            # of attention
KV_HEADS = 2         # of keys and values: grouped queries
TIME_EVERY = 2       # 4 for 8 layers and more, as in the paper
WINDOW = 24          # frames that a time layer sees, this one among them
REGISTERS = 2        # tokens of a frame that carry nothing but what the network puts there
CAP = 0.0            # soft cap of attention scores (the paper's 50), without the fused kernel; 0 = off
K_MAX = 16           # smallest step is 1/K_MAX; a power of two
SHORTCUT = True      # learn larger steps too
BOOTSTRAP = 0.25     # share of rows that do
BOOT_FROM = 0.7      # share of the training before they begin
EMA_TEACHER = False  # the half steps by the averaged weights
NOISE = "iid"        # levels of the frames; the lab notes' "same", "context" (0.1, then rising); "pyramid"
SHIFT = 6.0          # of levels drawn, towards noise: with little of it a frame asks for no past
LOSS = "x"           # |z_hat - z|^2; "v": of velocities, which is that over tau^2
RAMP = "clean"       # weight 1 - 0.9 tau; the lab notes' "noise": 0.1 + 0.9 tau; "none"
IMAGE = 0.1          # share of rows whose frames are alone: the model can begin without a past
ROLL = 0.7           # share of the other rows as rollouts see them: a past of little noise, single new frames
TAU_CTX = 0.1        # noise of the past in rollouts, given or dreamt: the level nearest to it; 0 = clean
CTX_STATED = True    # tell the network so; False: the smallest level is stated
ACTION_DROP = 0.05   # share of rows without actions
SEQ_LEN_SHORT = 16   # frames of most windows
SEQ_LEN_LONG = 32    # frames of the others; more than WINDOW, so that the window slides
BATCH_SIZE = 4       # short windows in a forward pass, over all processes
BATCH_SIZE_LONG = 2  # long ones: as many frames
ACCUM = 1            # forward passes in an optimizer step
LONG_RATIO = 0.1     # share of batches that are long
EPOCHS = 3           # passes over the short windows
LR = 3e-3            # peak, of AdamW: embeddings, head, scalars. OPT=adamw: 1.5e-3
OPT = "muon"         # for the matrices inside; or "adamw" for them too
MUON_LR = 0.02       # peak, of Muon
WARMUP = 0.05        # share of the optimizer steps
WEIGHT_DECAY = 0.01  # of both
BETA2 = 0.99         # of AdamW
CLIP = 1.0           # gradient norm
EMA_DECAY = 0.9975   # of the weights we sample from
STEPS = 4            # K, network calls for a frame
UPDATE_SCALE = 1.0   # below 1: shorter steps of the sampler, more cautious
CONTEXT = 16         # true frames before a rollout of a report
HORIZON = 64         # dreamt frames of a report
SAMPLES = 64         # rollouts of a report
EVAL_EVERY = 3       # epochs between reports
KEEP_EVERY = 0       # also keep epoch_NNNN.pt every so many epochs, a multiple of EVAL_EVERY; 0 = never
SAVE_SECONDS = 60.0  # between saves of last.pt
PRECISION = "auto"   # "bf16", "fp32"; auto = bf16 where the hardware multiplies it
COMPILE = False      # torch.compile: worth it for runs of an hour and more
DRY_RUN = False      # print what a batch of each length takes, and stop
TENSORBOARD = False  # needs the optional package tensorboard
SEED = 0
OUT = "runs"         # the run goes to OUT/world_model
RESUME = True        # continue OUT/world_model when its settings agree; False moves it aside


# ---------------------------------------------------------------- data
def load_data():
    """
    data.train, .val, .test: namespaces of frames, uint8 (T, H, W, 3) an episode, and actions, int64 (T,) an
    episode, -1 where not known; of the game also states, see data/game.py. data.names of the actions, fps,
    facts, hash; size (H, W) of a frame and crop, what of it is not padding; mean, std of each colour in [-1,
    1] over training frames; windows[long], (M, 2) of episode and first frame, for both lengths. ValueError or
    OSError in one line.
    """
    if DATA == "game":
        cache, parts = Path(OUT) / "cache", {}
        for split, count in (("train", TRAIN), ("val", max(8, TRAIN // 16)), ("test", TEST)):
            parts[split] = game.episodes(LEVEL, count, 128, game.SEEDS[split], cache, STOCHASTIC)
        data = SimpleNamespace(**parts, names=list(game.ACTIONS), fps=10.0, facts=parts["train"].facts)
    else:
        found, parts = episodes.load(DATA, ACTION_ALIGN), {}
        for split, at in zip(("train", "val", "test"), episodes.split(len(found.actions))):
            parts[split] = SimpleNamespace(frames=found.frames[at.start:at.stop],
                                           actions=found.actions[at.start:at.stop])
        names = found.names or [str(k) for k in range(found.n_actions)] or ["next"]
        if not found.n_actions:  # nothing is known of the actions: there is one, the next frame
            for part in parts.values():
                part.actions = [np.zeros_like(actions) for actions in part.actions]
        data = SimpleNamespace(**parts, names=names, fps=found.fps, facts=found.facts)
    for part in (data.train, data.val, data.test):
        part.latents = None  # a tokenizer that learns fills them in
    data.crop = data.train.frames[0].shape[1:3]
    if min(data.crop) < 11:
        raise ValueError(f"DATA={DATA}: frames of {data.crop[0]} x {data.crop[1]} pixels, SSIM needs 11 x 11")
    data.size = tuple(-(-side // PATCH) * PATCH for side in data.crop)
    content = hashlib.blake2b(digest_size=8)
    for part in (data.train, data.test):
        for frames, actions in zip(part.frames, part.actions):
            content.update(np.ascontiguousarray(frames[::64]))
            content.update(np.ascontiguousarray(actions))
    data.hash = content.hexdigest()
    lengths = [len(frames) for frames in data.train.frames]
    data.windows = {long: episodes.windows(lengths, T, 1 if long else STRIDE)
                    for long, T in ((False, SEQ_LEN_SHORT), (True, SEQ_LEN_LONG)) if not long or LONG_RATIO}
    for long, found in data.windows.items():
        if not len(found):
            name = f"SEQ_LEN_{'LONG' if long else 'SHORT'}"
            raise ValueError(f"DATA={DATA}: no episode has {name}={globals()[name]} frames, the longest "
                             f"{max(lengths)}: lower {name}")
    some = np.concatenate([frames[:: max(1, sum(lengths) // 4096)] for frames in data.train.frames])
    data.mean, data.std = (f(some / 127.5 - 1, axis=(0, 1, 2)) for f in (np.mean, np.std))
    data.std = np.maximum(data.std, 1e-3)  # of a colour that never changes
    return data


def turn(step, data):
    """(long, number): whether optimizer step `step` takes a long batch, and its number among those of its
    kind. An epoch ends with the short windows; LONG_RATIO of its batches are long, at places drawn anew for
    each epoch, and go round on their own."""
    short, long = batches(data)
    epoch, place = divmod(step, short + long)
    kinds = torch.randperm(short + long, generator=generator_of(SEED, "long", epoch)) < long
    before = int(kinds[:place].sum())
    return (True, epoch * long + before) if kinds[place] else (False, epoch * short + place - before)


def batches(data):
    """Short and long batches of an epoch."""
    short = max(1, len(data.windows[False]) // (BATCH_SIZE * ACCUM))
    return short, round(short * LONG_RATIO / (1 - LONG_RATIO))


def spread(n, share, begin=0):
    """(n,) bool: true for a share of the rows begin, ..., begin + n - 1, evenly over all rows there are."""
    return torch.arange(begin, begin + n + 1, dtype=torch.float64).mul(share).add(1e-9).floor().diff() > 0


def draw_batch(data, tokenizer, step, total, attempt=0):
    """Everything random about optimizer step `step` of `total`: a dict of what loss_fn() takes. A function of
    (SEED, step, attempt) alone, so a resumed run repeats an unbroken one. attempt counts rollbacks."""
    long, number = turn(step, data)
    B, T = (BATCH_SIZE_LONG * ACCUM, SEQ_LEN_LONG) if long else (BATCH_SIZE * ACCUM, SEQ_LEN_SHORT)
    g = generator_of(SEED, "step", step, attempt)
    at = data.windows[long][batch_order(SEED, number, B, len(data.windows[long]), attempt)]
    z = read(data.train, tokenizer, at, T)
    actions = torch.from_numpy(np.stack([data.train.actions[e][s:s + T] for e, s in at]))
    actions[:, 0] = -1  # what led into a first frame came before it
    alone = torch.rand(B, generator=g) < IMAGE
    actions[alone | (torch.rand(B, generator=g) < ACTION_DROP)] = -1
    boot = spread(B, BOOTSTRAP if SHORTCUT and step >= BOOT_FROM * total else 0.0, number * B)
    i, e = draw_levels(boot, T, g)
    i, e = as_rollout(i, e, ~alone & (torch.rand(B, generator=g) < ROLL), g)
    return dict(z=z, eps=torch.randn(z.shape, generator=g), i=i, e=e, alone=alone,
                actions=torch.where(actions < 0, len(data.names), actions))


def read(part, tokenizer, at, T):
    """z (B, T, N, c) on the CPU of windows at (B, 2), from the latents on disk where there are any."""
    if part.latents is not None:
        codes = torch.from_numpy(np.stack([part.latents[e][s:s + T] for e, s in at])).float()
        return tokenizer.standard(codes.to(tokenizer.mean.device)).cpu()
    frames = np.stack([part.frames[e][s:s + T] for e, s in at])
    return tokenizer.encode(pictures(frames, tokenizer.mean.device)).cpu()


# ---------------------------------------------------------------- tokenizers: frames <-> latents
def pictures(frames, device="cpu"):
    """uint8 (..., h, w, 3) in numpy -> a tensor with sides that the patches divide, (..., H, W, 3)."""
    return torch.from_numpy(np.array(episodes.padded(frames, PATCH))).to(device)


class Balance(nn.Module):
    """Terms of a loss, each over its own running root mean square (Hafner 2025, sec. 3.1): none of them rules
    because of its unit. The squares are part of every checkpoint."""

    def __init__(self, terms):
        super().__init__()
        self.register_buffer("square", torch.zeros(terms))

    def forward(self, terms, weights, means=None):
        """Scalars of one step -> their weighted sum; a term of weight 0 does not occur in it. means: the same
        over all processes, where there are more."""
        means = torch.stack([term.detach().float() for term in terms]) if means is None else means
        now, weights = means.square(), weights.to(means)
        occurs = weights > 0
        if self.training:
            fresh = torch.where(self.square > 0, 0.99 * self.square + 0.01 * now, now)
            self.square = torch.where(occurs, fresh, self.square)
        root = self.square.sqrt().clamp(min=1e-6)
        return sum(w * term / r for term, w, r, on in zip(terms, weights, root, occurs.tolist()) if on)


class Pixels(nn.Module):
    """No tokenizer: z are the pixels of patches, standardised for each colour. It learns nothing."""

    def __init__(self, data):
        super().__init__()
        self.crop, self.size = data.crop, data.size
        self.grid = tuple(side // PATCH for side in data.size)  # where the tokens are; None: nowhere
        self.tokens, self.channels = math.prod(self.grid), 3 * PATCH**2
        self.register_buffer("mean", torch.as_tensor(data.mean).float())
        self.register_buffer("std", torch.as_tensor(data.std).float())

    def patches(self, frames):
        """uint8 (..., H, W, 3) -> float32 (..., N, c), standardised."""
        x = (frames.float() / 127.5 - 1 - self.mean) / self.std
        return rearrange(x, "... (h p) (w q) c -> ... (h w) (p q c)", p=PATCH, q=PATCH)

    def frames(self, patches):
        """The inverse: float (..., H, W, 3) in [0, 1], no padding."""
        x = rearrange(patches, "... (h w) (p q c) -> ... (h p) (w q) c", p=PATCH, q=PATCH,
                      h=self.size[0] // PATCH)
        x = ((x * self.std + self.mean + 1) / 2).clamp(0, 1)
        return episodes.cropped(x, self.crop)

    encode, decode = patches, frames


class MAE(Pixels):
    """
    A masked autoencoder of single frames with a narrow middle (Hafner 2025, sec. 3.1): LATENTS learned tokens
    look at the patches, some of which are hidden in training, and become CODE numbers each, through tanh; the
    decoder's patch tokens look at those alone. PACK of them make a token of the dynamics. LATENTS = 0: the
    patches' own tokens become the codes, which takes far fewer steps, and the dynamics know who stands where.
    """

    def __init__(self, data):
        super().__init__(data)
        pixels, self.pixels = self.channels, self.tokens
        self.tokens, self.channels = (LATENTS or self.pixels) // PACK, CODE * PACK
        self.embed, self.hidden = nn.Linear(pixels, TOK_DIM), nn.Parameter(torch.zeros(TOK_DIM))
        self.places, self.queries, self.latents, self.codes = (
            nn.Parameter(0.02 * torch.randn(n, TOK_DIM))
            for n in (self.pixels, self.pixels, LATENTS, LATENTS))
        self.encoder, self.decoder = (nn.ModuleList([Layer(TOK_DIM, TOK_DIM // 32) for _ in range(TOK_DEPTH)])
                                      for _ in range(2))
        self.down, self.up = nn.Linear(TOK_DIM, CODE), nn.Linear(CODE, TOK_DIM)
        self.head = nn.Linear(TOK_DIM, pixels)
        self.balance = Balance(2)  # pixels, edges
        self.register_buffer("code_mean", torch.zeros(CODE))
        self.register_buffer("code_std", torch.ones(CODE))
        sees = seen = turn = None
        if LATENTS:  # latents first: in the encoder they see all, in the decoder they are seen by all
            sees, seen = torch.ones(2, LATENTS + self.pixels, LATENTS + self.pixels, dtype=torch.bool)
            sees[LATENTS:, :LATENTS] = seen[:LATENTS, LATENTS:] = False
            self.grid = None
        else:
            turn = torch.stack(near(grid_positions(self.grid), 32))
        for name, tensor in dict(sees=sees, seen=seen, turn=turn).items():
            self.register_buffer(name, tensor, persistent=False)

    def codes_of(self, patches, hidden=None):
        """(B, pixels, .) -> (B, latents, CODE) within -1 and 1; hidden bool (B, pixels): not looked at."""
        x = self.embed(patches)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.hidden, x)
        x = torch.cat([self.latents.expand(len(x), -1, -1), x + self.places], 1)
        for layer in self.encoder:
            x = layer(x, self.sees, self.turn)
        return torch.tanh(self.down(rms(x[:, :LATENTS or None])))

    def patches_of(self, codes):
        """(B, latents, CODE) -> (B, pixels, .)."""
        x, queries = self.up(codes), self.queries.expand(len(codes), -1, -1)
        x = torch.cat([x + self.codes, queries], 1) if LATENTS else x + queries
        for layer in self.decoder:
            x = layer(x, self.seen, self.turn)
        return self.head(rms(x[:, LATENTS:])).float()

    def standard(self, codes):
        """Codes (..., latents, CODE) -> z (..., N, c), each number with mean 0 and spread 1 in training."""
        return ((codes - self.code_mean) / self.code_std).unflatten(-2, (self.tokens, PACK)).flatten(-2)

    def raw_codes(self, frames):
        """uint8 (..., H, W, 3) -> codes (..., latents, CODE)."""
        x = self.patches(frames)
        return self.codes_of(x.flatten(0, -3)).unflatten(0, x.shape[:-2])

    def encode(self, frames):
        return self.standard(self.raw_codes(frames))

    def decode(self, z):
        codes = z.unflatten(-1, (PACK, CODE)).flatten(-3, -2) * self.code_std + self.code_mean
        return self.frames(self.patches_of(codes.flatten(0, -3)).unflatten(0, codes.shape[:-2]))


def tokenizer_losses(tokenizer, frames, hidden):
    """Squared error of the whole frame, and absolute error of its edges at three scales (gradients of a
    pyramid of means), which punishes blur without a network that must be downloaded. Scalars."""
    x = tokenizer.patches(frames)
    x_hat = tokenizer.patches_of(tokenizer.codes_of(x, hidden))
    loss, edges = (x_hat - x).square().mean(), 0.0
    a, b = (rearrange(y, "b (h w) (p q c) -> b c (h p) (w q)", p=PATCH, q=PATCH, c=3,
                      h=tokenizer.size[0] // PATCH) for y in (x_hat, x))
    for scale in range(3):
        for axis in (2, 3):
            edges = edges + (a.diff(dim=axis) - b.diff(dim=axis)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss, edges


# ---------------------------------------------------------------- model
class Dynamics(nn.Module):
    """
    z_hat of all frames from noisy frames, their levels and step sizes, and the actions (Hafner 2025, 3.2).

    tokens, channels   N and c of a frame
    actions            how many there are; the table has one more row, null
    grid               rows and columns of the tokens, None where they have no place
    """

    def __init__(self, tokens, channels, actions, grid=None):
        super().__init__()
        self.null = actions
        self.action = nn.Embedding(actions + 1, DIM)
        self.level = nn.Embedding(K_MAX, DIM // 2)  # tau = (row + 1) / K_MAX
        self.step = nn.Embedding(K_MAX.bit_length(), DIM // 2)  # d = 2^row / K_MAX
        self.embed = nn.Linear(channels, DIM)
        self.told = nn.Linear(2 * DIM, DIM, bias=False)  # every token knows the action and the noise too
        self.slots = nn.Parameter(0.02 * torch.randn(tokens, DIM))
        self.registers = nn.Parameter(0.02 * torch.randn(REGISTERS, DIM))
        self.before = Before(DIM, grid)
        # action, noise and registers stand in the corner
        places = None if grid is None else F.pad(grid_positions(grid) + 1, (0, 0, 2, REGISTERS))
        self.body = SpaceTime(DIM, DEPTH, HEADS, KV_HEADS, TIME_EVERY, WINDOW, CAP, places)
        self.head = nn.Linear(DIM, channels)
        self.balance = Balance(2)  # the smallest step, larger ones

    def caches(self):
        """An empty memory for forward()."""
        return self.body.caches(), []

    def forward(self, z, i, actions, e=None, alone=None, caches=None, keep=True):
        """
        z (B, T, N, c) noisy; i (B, T) int64, tau = i / K_MAX, never 0; actions (B, T) int64; e (B, T) int64,
        d = 2^e / K_MAX, the smallest where None; alone (B,) bool: frames do not see each other; caches: with
        the frames before, T is 1 then; keep=False: this one leaves no trace there. Returns (B, T, N, c).
        """
        e = torch.zeros_like(i) if e is None else e
        about = torch.cat([self.level(i - 1), self.step(e)], -1)  # (B, T, DIM)
        more = self.registers.expand(*i.shape, -1, -1)
        action, about = self.action(actions)[:, :, None], about[:, :, None]
        x = self.embed(z) + self.slots + self.told(torch.cat([action, about], -1))
        past, memory = (None, None) if caches is None else caches
        x = x + self.before(x, alone, memory, keep)
        x = torch.cat([action, about, x, more], 2)
        x = self.body(x, alone, past, keep)  # (B, T, S, DIM)
        return self.head(rms(x[:, :, 2:2 + z.shape[2]])).float()


# ---------------------------------------------------------------- method: noise, losses
def draw_levels(boot, T, g):
    """
    Noise of a batch: i and e (B, T) int64, tau = i / K_MAX and d = 2^e / K_MAX with i a multiple of 2^e, so
    that tau is on the grid of its step. Rows where boot (B,) has steps of all sizes, the others the smallest.
    """
    B = len(boot)
    e = torch.randint(K_MAX.bit_length(), (B, T), generator=g) * boot[:, None]
    u = torch.rand(B, T, generator=g)
    if NOISE in ("iid", "same"):
        u = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(max=1 - 1e-6)
    if NOISE == "same":
        u = u[:, :1].expand(B, T)
    elif NOISE == "pyramid":  # later frames have more noise, as in a sampler that does many frames at once
        u = (2 * u[:, :1] - 1 + torch.linspace(0, 1, T)).clamp(0, 1 - 1e-6)
    elif NOISE == "context":  # the lab notes: 0.1 up to a frame, then rising to 1
        begin = (u[:, :1] * (T - 1)).floor()
        u = (0.1 + 0.9 * (torch.arange(T) - begin) / (T - 1 - begin)).clamp(0.1, 1) - 1e-6
    return (u * (K_MAX >> e)).long() * 2**e + 2**e, e


def as_rollout(i, e, rows, g):
    """The same levels, but where rows (B,) is true most frames have little noise and the smallest step, as
    the past in a rollout. Two new frames never follow each other: each is to be told by the one before."""
    new = (torch.rand(i.shape, generator=g) < 0.7) & (torch.arange(i.shape[1]) > 0)
    for t in range(1, i.shape[1]):
        new[:, t] &= ~new[:, t - 1]
    past = rows[:, None] & ~new
    return torch.where(past, (i - 1) % context_level() + 1, i), torch.where(past, 0, e)


def context_level():
    """i of TAU_CTX on the grid."""
    return max(1, round(TAU_CTX * K_MAX))


def add_noise(z, eps, tau):
    """z_tau; tau (...) of a frame, z and eps (..., N, c)."""
    tau = torch.as_tensor(tau, dtype=z.dtype, device=z.device)[..., None, None]
    return (1 - tau) * z + tau * eps


def shortcut_target(f, z_tau, i, e):
    """
    z* (B, T, N, c): where a step of size d must land so that it equals two of d/2 (Frans 2024, eq. 5; Hafner
    2025, eq. 7). f(z, i, e) -> z_hat. That eq. in velocities u = (z_tau - z_hat)/tau is
    (z_tau - tau (u_1 + u_2)/2), from which z_tau cancels: what is left is a mean of z_1 and z_2, weights over
    0, no small divisor. Where e is 0 there is no half step; what is returned there means nothing.
    """
    half = (e - 1).clamp(min=0)
    tau, d = (v[..., None, None] / K_MAX for v in (i.to(z_tau.dtype), 2.0**e.to(z_tau.dtype)))
    z_1 = f(z_tau, i, half)
    between = torch.where(e[..., None, None] > 0, z_tau + d / (2 * tau) * (z_1 - z_tau), z_tau)
    z_2 = f(between, torch.where(e > 0, i - 2**half, i), half)
    return ((tau - d) * z_1 + tau * z_2) / (2 * tau - d)


def weight(tau):
    """Of a frame's squared error."""
    if LOSS == "v":
        return tau**-2
    return {"clean": 1 - 0.9 * tau, "noise": 0.1 + 0.9 * tau, "none": torch.ones_like(tau)}[RAMP]


def loss_fn(model, teacher, z, eps, i, e, actions, alone):
    """
    Weighted squared error of each frame (B, T). z, eps (B, T, N, c); i, e, actions (B, T); alone (B,).
    teacher: gives the half steps; gradients flow through model alone.
    """
    z_tau, target = add_noise(z, eps, i / K_MAX), z
    boot = (e > 0).any(1)
    if boot.any():
        with torch.no_grad():
            def f(x, i, e):
                return teacher(x, i, actions[boot], e, alone[boot])
            z_star = shortcut_target(f, z_tau[boot], i[boot], e[boot])
        target = z.clone()
        target[boot] = torch.where(e[boot][..., None, None] > 0, z_star, z[boot])
    z_hat = model(z_tau, i, actions, e, alone)
    return weight(i / K_MAX) * (z_hat - target).square().mean((-2, -1))


# ---------------------------------------------------------------- sampling
def imagine(model, caches, action, eps, steps=None):
    """
    THE sampler: the next frame z (B, N, c) from noise eps, K = steps calls of the network, no new noise then.
    caches: the past, see Dynamics.caches(); action (B,) int64. It leaves no trace; remember() does.
    """
    K, z = steps or STEPS, eps
    e = (K_MAX // K).bit_length() - 1 if SHORTCUT else 0
    for k in range(K, 0, -1):  # tau = k/K, d = 1/K, d/tau = 1/k
        i = torch.full_like(action, round(k * K_MAX / K))[:, None]
        z_hat = model(z[:, None], i, action[:, None], torch.full_like(i, e), caches=caches, keep=False)[:, 0]
        z = z + UPDATE_SCALE / k * (z_hat - z)
    return z


def remember(model, caches, z, action, eps):
    """Frame z (B, N, c), true or dreamt, joins the past: noised by its own eps, once, and said to be so."""
    i = torch.full_like(action, context_level() if CTX_STATED and TAU_CTX else 1)[:, None]
    tau = context_level() / K_MAX if TAU_CTX else 0.0
    model(add_noise(z, eps, tau)[:, None], i, action[:, None], caches=caches)


@torch.no_grad()
def rollout(model, z, actions, seeds, steps=None, truth=None):
    """
    Dreams (B, H, N, c) after true frames z (B, C, N, c), under actions (B, C + H) int64; seeds (B), one each,
    its noise depends on nothing else. truth (B, H, N, c): what joins the past instead of the dream (teacher
    forcing: one step at a time).
    """
    caches, dreams = model.caches(), []
    generators = [generator_of(seed, "dream") for seed in seeds]

    def noise():
        return torch.stack([torch.randn(z.shape[2:], generator=g) for g in generators]).to(z)
    for t in range(actions.shape[1]):
        if t < z.shape[1]:
            frame = z[:, t]
        else:
            dreams.append(imagine(model, caches, actions[:, t], noise(), steps))
            frame = dreams[-1] if truth is None else truth[:, t - z.shape[1]]
        remember(model, caches, frame, actions[:, t], noise())
    return torch.stack(dreams, 1)


# ---------------------------------------------------------------- evaluation
horizons = (1, 2, 4, 8, 16, 32, 64)


def upto():
    """The horizons of a report."""
    return [h for h in horizons if h <= HORIZON]


def pooled_psnr(error):
    """dB of squared errors (B, H, ...) in [0, 1], pooled over all but H first; at most 60."""
    error = np.moveaxis(error, 1, 0).reshape(error.shape[1], -1).mean(1, dtype=np.float64)
    return -10 * np.log10(np.maximum(error, 1e-6))


def squared(a, b):
    """float32 squared differences of uint8 pictures, in [0, 1]."""
    return np.square((a.astype(np.float32) - b.astype(np.float32)) / 255)


def quality(truth, dream, last):
    """
    A dict of arrays (H,): how far frames uint8 (B, H, h, w, 3) are from the truth; last (B, h, w, 3): that
    before them. psnr, pooled over rows; psnr_mean, the mean of each row's; changed, PSNR of the pixels
    that differ from `last`; sharpness, variance of the Laplacian over that of the truth.
    """
    error = squared(dream, truth)
    differs = (truth != last[:, None]).any(-1)
    each = error.mean((2, 3, 4), dtype=np.float64)
    changed = [error[:, h][differs[:, h]].mean(dtype=np.float64) if differs[:, h].any() else np.nan
               for h in range(error.shape[1])]
    return dict(psnr=pooled_psnr(error), psnr_mean=-10 * np.log10(np.maximum(each, 1e-6)).mean(0),
                changed=-10 * np.log10(np.maximum(changed, 1e-6)),
                sharpness=edges_of(dream) / np.maximum(edges_of(truth), 1e-9))


def likeness(truth, dream):
    """Mean SSIM of pictures uint8 (B, h, w, 3)."""
    a, b = (torch.tensor(v).movedim(-1, 1).double() / 255 for v in (dream, truth))
    return float(ssim(a, b, 1.0).mean())


def edges_of(frames):
    """(H,): variance of the Laplacian of grey uint8 (B, H, h, w, 3)."""
    x = frames.astype(np.float32).mean(-1) / 255
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    laplacian = 4 * x[..., 1:-1, 1:-1] - around
    return np.moveaxis(laplacian, 1, 0).reshape(x.shape[1], -1).var(1)


def test_windows(data, count):
    """Where the rollouts of a report begin, (count, 2): one an episode at first, then further on in them."""
    T = CONTEXT + HORIZON
    places = [(start, e) for e, frames in enumerate(data.test.frames)
              for start in range(0, len(frames) - T + 1, T)]
    return np.array([(e, start) for start, e in sorted(places)[:count]])


def opposite(actions, names):
    """Actions the other way round: up for down, move_left for move_right; where there are none, the next."""
    other = {"up": "down", "down": "up", "left": "right", "right": "left"}
    turned = ["_".join(other.get(word, word) for word in name.split("_")) for name in names]
    table = [names.index(name) if name in names else k for k, name in enumerate(turned)]
    if table == list(range(len(names))):
        table = [(k + 1) % len(names) for k in range(len(names))]
    return torch.tensor([*table, len(names)])[actions]


def chunk_features(frames):
    """
    Of videos uint8 (B, H, h, w, 3), for every 16 frames, (n, 64): a random network of 3D convolutions, always
    the same. Distances in it rank damages; they have no meaning beside published ones (FVD).
    """
    T = 16 if frames.shape[1] >= 16 else frames.shape[1]
    x = torch.from_numpy(frames[:, :frames.shape[1] // T * T]).unflatten(1, (-1, T)).flatten(0, 1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv3d(3, 32, (3, 5, 5), (1, 2, 2), 1), nn.ReLU(),
                            nn.Conv3d(32, 64, 3, 2, 1), nn.ReLU())
    x = x.movedim(-1, 1)
    with torch.no_grad():
        parts = [net(part.float() / 127.5 - 1).flatten(2).mean(2) for part in x.split(16)]
    return torch.cat(parts)


def reference(data):
    """What every report compares with and no training changes: true frames, their actions, the rows that need
    no model. ref.rows: name -> uint8 (B, H, h, w, 3)."""
    at = test_windows(data, SAMPLES)
    if len(at) < 4:
        raise ValueError(f"{len(at)} test windows of CONTEXT + HORIZON = {CONTEXT + HORIZON} frames, at "
                         "least 4 are needed: lower HORIZON")
    T, ref = CONTEXT + HORIZON, SimpleNamespace(at=at)
    ref.frames = np.stack([data.test.frames[e][s:s + T] for e, s in at])
    actions = torch.from_numpy(np.stack([data.test.actions[e][s:s + T] for e, s in at]).astype(np.int64))
    actions[:, 0] = -1
    ref.actions = torch.where(actions < 0, len(data.names), actions)
    ref.last, ref.truth = ref.frames[:, CONTEXT - 1], ref.frames[:, CONTEXT:]
    some = [frames[:: max(1, len(frames) // 16)] for frames in data.train.frames]
    dice = np.random.default_rng(0)
    whole = np.concatenate(some)
    ref.rows = {"copy the last frame": np.repeat(ref.last[:, None], HORIZON, 1),
                "mean frame": np.broadcast_to(whole.mean(0).round().astype(np.uint8), ref.truth.shape).copy(),
                "random frame": whole[dice.integers(len(whole), size=ref.truth.shape[:2])]}
    return ref


def to_frames(tokenizer, z, batch=16):
    """z (B, T, N, c) -> uint8 (B, T, h, w, 3)."""
    return torch.cat([(tokenizer.decode(part) * 255).round().byte() for part in z.split(batch)]).cpu().numpy()


@torch.no_grad()
def to_latents(tokenizer, frames, device, batch=16):
    """uint8 (B, T, h, w, 3) -> z (B, T, N, c)."""
    return torch.cat([tokenizer.encode(pictures(part, device)) for part in
                      np.array_split(frames, -(-len(frames) // batch))])


@torch.no_grad()
def loss_table(model, z, actions, sizes=None):
    """Squared error of z_hat (levels, sizes) by noise i/K_MAX of the last frame and its step 2^e/K_MAX, past
    as in a rollout; NaN off the grid. sizes: so many of the steps, smallest first; None: all that are
    trained."""
    table, caches = np.full((K_MAX, K_MAX.bit_length()), np.nan), model.caches()
    eps = torch.randn(z.shape, generator=generator_of(0, "loss table")).to(z)
    for t in range(z.shape[1] - 1):
        remember(model, caches, z[:, t], actions[:, t], eps[:, t])
    z, eps, action = z[:, -1:], eps[:, -1:], actions[:, -1:]
    for e in range(sizes or (K_MAX.bit_length() if SHORTCUT else 1)):
        for level in range(2**e, K_MAX + 1, 2**e):
            i = torch.full_like(action, level)
            z_hat = model(add_noise(z, eps, i / K_MAX), i, action, torch.full_like(i, e), caches=caches,
                          keep=False)
            table[level - 1, e] = float((z_hat - z).square().mean())
    return table


@torch.no_grad()
def speed(model, tokenizer, frames=60):
    """Seconds (frames,) of each dreamt frame, alone in its batch, pixels and all, after a full window."""
    device, seconds = model.slots.device, []
    caches, g = model.caches(), torch.Generator().manual_seed(0)
    action = torch.zeros(1, dtype=torch.int64, device=device)
    shape = 1, tokenizer.tokens, tokenizer.channels
    for t in range(WINDOW + frames):
        clock, eps = time.perf_counter(), torch.randn(2, *shape, generator=g).to(device)
        z = imagine(model, caches, action, eps[0]) if t >= WINDOW else eps[0]
        remember(model, caches, z, action, eps[1])
        to_frames(tokenizer, z[:, None])
        seconds.append(time.perf_counter() - clock)
    return np.array(seconds[WINDOW:])


def evaluate(model, tokenizer, data, ref, count):
    """Every number of a report from `count` rollouts, controls from half of them, each beside its floor and
    ceiling; returns (metrics, arrays for the pictures)."""
    metrics, hs, count = {}, upto(), min(count, len(ref.at))
    device, truth, last = model.slots.device, ref.truth[:count], ref.last[:count]
    z = to_latents(tokenizer, ref.frames[:count], device)
    actions, seeds = ref.actions[:count].to(device), [seed_of(SEED, "dream", k) for k in range(count)]

    def add(name, value, better, floor=None, ceiling=None, n=count):
        metrics[name] = dict(value=float(value), floor=None if floor is None else float(floor),
                             ceiling=None if ceiling is None else float(ceiling), better=better, n=n)

    def dream(actions, H=None, noise=0, n=count, **more):
        dreamt = rollout(model, z[:n, :CONTEXT], actions[:n, :CONTEXT + (H or HORIZON)],
                         [seed_of(seed, noise) for seed in seeds[:n]], **more)
        return to_frames(tokenizer, dreamt)

    def future(other):
        return torch.cat([actions[:, :CONTEXT], other[:, CONTEXT:]], 1)
    some = max(4, count // 2)  # rollouts of the rows that are only beside the dream
    null, through = torch.full_like(actions, model.null), "through the tokenizer"
    rows = {"dream": dream(actions), "one step at a time": dream(actions, n=some, truth=z[:some, CONTEXT:]),
            "actions of others": dream(future(actions.roll(1, 0)), n=some),
            "no actions": dream(future(null), n=some),
            through: to_frames(tokenizer, z[:, CONTEXT:]),
            **{name: v[:count] for name, v in ref.rows.items()}}
    table = {name: quality(truth[:len(v)], v, last[:len(v)]) for name, v in rows.items()}
    own, copy_last, whole = table["dream"], table["copy the last frame"], table[through]
    beside = pooled_psnr(squared(rows["copy the last frame"][:some], truth[:some]))
    for h in hs:
        add(f"psnr_h{h}", own["psnr"][h - 1], "higher", copy_last["psnr"][h - 1], whole["psnr"][h - 1])
    for h in hs:
        if h in (1, 8, 32):
            add(f"changed_psnr_h{h}", own["changed"][h - 1], "higher", copy_last["changed"][h - 1],
                whole["changed"][h - 1])
            add(f"ssim_h{h}", likeness(truth[:, h - 1], rows["dream"][:, h - 1]), "higher",
                likeness(truth[:, h - 1], last), likeness(truth[:, h - 1], rows[through][:, h - 1]))
            for short, name in (("forced", "one step at a time"), ("shuffled", "actions of others"),
                                ("null", "no actions")):
                add(f"psnr_{short}_h{h}", table[name]["psnr"][h - 1], None, beside[h - 1], n=some)
    add("tokenizer_psnr", pooled_psnr(squared(rows[through], truth).reshape(1, 1, -1))[0],
        "higher", pooled_psnr(squared(rows["mean frame"], truth).reshape(1, 1, -1))[0], 60.0)
    gain = own["psnr"] - copy_last["psnr"]
    lost = np.flatnonzero(gain <= 0)
    add("break_even_horizon", lost[0] + 1 if len(lost) else HORIZON + 1, "higher", 1, HORIZON + 1)
    half = np.flatnonzero(gain < gain[0] / 2)
    add("half_life", half[0] + 1 if len(half) else HORIZON + 1, "higher", 1, HORIZON + 1)

    short, sweep = min(8, HORIZON), {}
    for K in [1 << k for k in range(K_MAX.bit_length())]:
        swept = rows["dream"][:some, :short] if K == STEPS else dream(actions, short, n=some, steps=K)
        sweep[K] = quality(truth[:some, :short], swept, last[:some])
    h = short - 1
    blurred = blur(truth[:some, :short])
    add("sharpness", sweep[STEPS]["sharpness"][h], "near ceiling",
        quality(truth[:some, :short], blurred, last[:some])["sharpness"][h], 1.0, some)
    add(f"psnr_most_steps_h{short}", sweep[max(sweep)]["psnr"][h], "higher", beside[h], n=some)
    add(f"psnr_few_steps_h{short}", sweep[STEPS]["psnr"][h], "higher", beside[h], n=some)
    add("latent_std_ratio", float(to_latents(tokenizer, rows["dream"], device).std() / z[:, CONTEXT:].std()),
        "near ceiling", None, 1.0)

    far = [h for h in hs if h <= 16]
    turned = dream(future(opposite(actions.cpu(), data.names).to(device)), max(far), n=some)
    again = dream(actions, max(far), noise=1, n=some)

    def apart(a, b, h):
        return float(squared(a[:, h - 1], b[:, h - 1]).mean())
    base = rows["dream"][:some]
    ratio = [math.sqrt(apart(turned, base, h) / max(apart(again, base, h), 1e-9)) for h in far]
    add("action_noise_ratio", ratio[far.index(min(8, max(far)))], "higher", 1.0, n=some)
    g = np.random.default_rng(0)
    chance = torch.from_numpy(g.integers(len(data.names), size=actions.shape)).to(device)
    four = min(4, HORIZON)
    add("delta_psnr", own["psnr"][four - 1]
        - pooled_psnr(squared(dream(future(chance), four), truth[:, :four]))[-1], "higher", 0.0)
    begin, then = z[:, :SEQ_LEN_SHORT], actions[:, :SEQ_LEN_SHORT]
    losses, mixed = loss_table(model, begin, then), loss_table(model, begin, then.roll(1, 0), sizes=1)
    add("val_loss", np.nanmean(losses[:, 0]), "lower", float(z.var()))
    add("shuffle_loss_ratio", np.nanmean(mixed[:, 0]) / np.nanmean(losses[:, 0]), "higher", 1.0)

    real = chunk_features(truth)
    far_off = [None if v is None else float(frechet(chunk_features(v), real))
               for v in (rows["dream"], rows["copy the last frame"], others(data, count))]
    add("frechet", far_off[0], "lower", *far_off[1:])

    exact = {}
    if DATA == "game":
        states = {k: np.stack([v[e, s:s + CONTEXT + HORIZON] for e, s in ref.at[:count]])
                  for k, v in vars(data.test.states).items()}
        for name, v in rows.items():
            n = len(v)
            seen = SimpleNamespace(**{k: state[:n] for k, state in states.items()})
            frames = np.concatenate([ref.frames[:n, :CONTEXT], v], 1)
            exact[name] = game.scores(frames, seen, ref.actions[:n].numpy(), CONTEXT)
        best = exact[through]
        for name, short in (("obedience", "obey"), ("legality", "legal"), ("cell_accuracy", "agent")):
            add(name, exact["dream"].mean[short], "higher", exact["copy the last frame"].mean[short],
                best.mean[short])
        if LEVEL:
            for h in hs:
                ball = {name: e.horizon["ball_found"][h - 1] for name, e in exact.items()}
                add(f"ball_found_h{h}", ball["dream"], "higher", ball["copy the last frame"],
                    ball[through])
    clock = speed(model, tokenizer)
    add("fps", 1 / np.median(clock), "higher", n=len(clock))
    add("fps_p95_ms", 1e3 * np.quantile(clock, 0.95), "lower", n=len(clock))
    return metrics, SimpleNamespace(rows=rows, table=table, sweep=sweep, losses=losses, exact=exact,
                                    ratio=dict(zip(far, ratio)), truth=truth, last=last)


def blur(frames):
    """uint8 frames (..., h, w, 3), each pixel the mean of 3x3."""
    x = np.pad(frames.astype(np.float32), [(0, 0)] * (frames.ndim - 3) + [(1, 1), (1, 1), (0, 0)], "edge")
    h, w = frames.shape[-3:-1]
    return (sum(x[..., y:y + h, u:u + w, :] for y in range(3) for u in range(3)) / 9).round().astype(np.uint8)


def others(data, count):
    """At most `count` videos of the validation part, uint8 (n, H, h, w, 3); None where all are too short."""
    places = [(start, e) for e, frames in enumerate(data.val.frames)
              for start in range(0, len(frames) - HORIZON + 1, HORIZON)]
    found = [data.val.frames[e][start:start + HORIZON] for start, e in sorted(places)[:count]]
    return np.stack(found) if found else None


def summary(metrics):
    """The one line of a report: each number beside its floor and ceiling."""
    def one(name):
        m = metrics[name]
        beside = [f"{k} {m[k]:.2f}" for k in ("floor", "ceiling") if m[k] is not None]
        return f"{name} {m['value']:.2f}" + (f" ({', '.join(beside)})" if beside else "")
    names = ("break_even_horizon psnr_h1 psnr_h8 psnr_h32 changed_psnr_h8 obedience ball_found_h8 sharpness "
             "action_noise_ratio fps fps_p95_ms")
    return ", ".join(one(name) for name in names.split() if name in metrics)


# ---------------------------------------------------------------- pictures
def shown(frames, most=8):
    """Columns of a picture: (row, horizon) -> the horizons of a report, at most so many rows."""
    return frames[:most][:, [h - 1 for h in upto()]] / 255


def draw_rollout(folder, arrays, actions):
    """rollout: truth, dream, error and copy-last for two videos; rollout.gif: real, dream, error in motion;
    dream.npy, truth.npy, actions.npy."""
    dream, truth = arrays.rows["dream"], arrays.truth
    error = np.abs(dream.astype(np.int16) - truth).astype(np.uint8)
    pick = [v for k in range(min(2, len(truth)))
            for v in (truth[k], dream[k], error[k], arrays.rows["copy the last frame"][k])]
    title = f"dreamt from {CONTEXT} true frames and the true actions, K = {STEPS}"
    figure = tile(shown(np.stack(pick)), title,
                  rows=["truth", "dream", "error", "copy last"] * min(2, len(truth)),
                  columns=[f"frame {h}" for h in upto()], cell=1.2)
    save_artifact(folder, "rollout", np.stack(pick), figure)
    for name, array in (("dream", dream), ("truth", truth), ("actions", actions)):
        np.save(folder / f"{name}.npy", array)
    write_gif(folder / "rollout.gif", side_by_side([truth[:3], dream[:3], error[:3]]))


def side_by_side(columns):
    """Videos (n, H, h, w, 3) of each column -> one video (H, n h, columns w, 3) with a gap of 2 pixels."""
    rows = [np.concatenate([np.pad(v[k], ((0, 0), (1, 1), (1, 1), (0, 0))) for v in columns], 2)
            for k in range(len(columns[0]))]
    return np.concatenate(rows, 1)


def write_gif(path, video, fps=10, scale=4):
    """uint8 (H, h, w, 3), enlarged without smoothing; Pillow comes with matplotlib."""
    from PIL import Image
    frames = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)) for frame in video]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def draw_horizon(folder, arrays, metrics):
    """horizon: PSNR by horizon of every row; horizon.npy (row, H)."""
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    horizon_axes(ax, arrays, metrics)
    save_artifact(folder, "horizon", np.stack([q["psnr"] for q in arrays.table.values()]), figure)


def horizon_axes(ax, arrays, metrics):
    """PSNR of the rows over the horizon, and where the dream falls below copying."""
    styles = {"dream": dict(color="C0", lw=2.5), "one step at a time": dict(color="C2", ls="--"),
              "copy the last frame": dict(color="k"), "through the tokenizer": dict(color="0.7")}
    for name, q in arrays.table.items():
        ax.plot(range(1, len(q["psnr"]) + 1), q["psnr"], label=name, **styles.get(name, dict(lw=1)))
    h = metrics["break_even_horizon"]["value"]
    if h <= HORIZON:
        ax.axvline(h, color="C3", lw=1, ls=":")
    ax.set(xscale="log", xlabel="frames after the last true one", ylabel="PSNR in dB", ylim=(10, 62))
    ax.set_xticks(upto(), [str(h) for h in upto()])
    ax.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(0, 0.37))


def draw_sweep(folder, arrays):
    """k_sweep: PSNR at each horizon and sharpness for each number of steps."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    sweep_axes(axes, arrays)
    save_artifact(folder, "k_sweep", np.stack([np.stack([q["psnr"], q["sharpness"]])
                                               for q in arrays.sweep.values()]), figure)


def sweep_axes(axes, arrays):
    for h in [h for h in (1, 4, 8) if h <= HORIZON]:
        psnr, sharp = ([q[name][h - 1] for q in arrays.sweep.values()] for name in ("psnr", "sharpness"))
        axes[0].plot(list(arrays.sweep), psnr, "o-", ms=4, label=f"frame {h}")
        axes[1].plot(list(arrays.sweep), [q["sharpness"][h - 1] for q in arrays.sweep.values()], "o-", ms=4)
    for ax in axes:
        ax.set(xscale="log", xlabel="sampling steps K")
        ax.set_xticks(list(arrays.sweep), [str(K) for K in arrays.sweep])
        ax.minorticks_off()
    axes[0].set_ylabel("PSNR in dB")
    axes[0].legend(fontsize=7)
    axes[1].axhline(1, color="k", lw=0.8, ls="--")
    axes[1].set(ylabel="sharpness, 1 = as the truth", ylim=(0, 1.5))


@torch.no_grad()
def draw_play(folder, model, tokenizer, data, ref):
    """actions: one past and one noise, each action held for 8 frames. spread: the same actions, 8 noises.
    starts: 16 frames dreamt from nothing."""
    device, H = model.slots.device, min(8, HORIZON)
    z = to_latents(tokenizer, ref.frames[:1, :CONTEXT], device)
    names = data.names[:8]

    def branch(actions, seeds):
        n = len(seeds)
        past = ref.actions[:1, :CONTEXT].expand(n, -1)
        actions = torch.cat([past, actions], 1).to(device)
        return to_frames(tokenizer, rollout(model, z.expand(n, -1, -1, -1), actions, seeds))
    held = branch(torch.arange(len(names))[:, None].expand(-1, H), [SEED] * len(names))
    first = np.repeat(ref.frames[:1, CONTEXT - 1:CONTEXT], len(names), 0)
    figure = tile(np.concatenate([first, held], 1) / 255, "one past, each action held", rows=names,
                  columns=["last true"] + [f"frame {h}" for h in range(1, H + 1)])
    save_artifact(folder, "actions", held, figure)
    seeds = [seed_of(SEED, "spread", k) for k in range(8)]
    far = [h for h in upto() if h <= 32]
    many = branch(ref.actions[:1, CONTEXT:CONTEXT + max(far)].expand(8, -1), seeds)[:, [h - 1 for h in far]]
    truth = ref.truth[:1, [h - 1 for h in far]]
    figure = tile(np.concatenate([truth, many]) / 255, "one past, the same actions, eight noises",
                  rows=["truth"] + [f"noise {k}" for k in range(8)], columns=[f"frame {h}" for h in far])
    save_artifact(folder, "spread", many, figure)
    if IMAGE:
        seeds = [seed_of(SEED, "start", k) for k in range(16)]
        starts = to_frames(tokenizer, invented(model, tokenizer, seeds))
        save_artifact(folder, "starts", starts[:, 0], tile(
            starts[:, 0].reshape(2, 8, *starts.shape[2:]) / 255, "frames dreamt from nothing"))


@torch.no_grad()
def invented(model, tokenizer, seeds):
    """First frames (B, 1, N, c) without any past, as image rows are trained."""
    shape = tokenizer.tokens, tokenizer.channels
    eps = torch.stack([torch.randn(shape, generator=generator_of(seed, "first"))
                       for seed in seeds]).to(model.slots)
    null = torch.full((len(seeds),), model.null, device=eps.device)
    return imagine(model, model.caches(), null, eps, K_MAX)[:, None]


@torch.no_grad()
def draw_tokenizer(folder, tokenizer, ref):
    """tokenizer: frames, what is left when half of the patches are hidden, and what comes back of all and of
    the rest. z_std.npy: spread of each number of z."""
    device = tokenizer.mean.device
    x = tokenizer.patches(pictures(ref.truth[:8, 0], device))
    hidden = torch.rand(x.shape[:2], generator=generator_of(0, "hidden")).to(device) < 0.5
    back = [tokenizer.frames(tokenizer.patches_of(tokenizer.codes_of(x, h))) for h in (None, hidden)]
    left = tokenizer.frames(x.masked_fill(hidden[..., None], 0.0))
    rows = torch.stack([tokenizer.frames(x), left, back[1], back[0]]).cpu().numpy()
    figure = tile(rows, "masked autoencoder", rows=["frame", "half hidden", "of the half", "of all"])
    save_artifact(folder, "tokenizer", rows, figure)
    np.save(folder / "z_std.npy", to_latents(tokenizer, ref.truth[:16], device).std((0, 1, 2)).cpu().numpy())


def draw_losses(folder, arrays):
    """loss_by_t: held-out squared error of z_hat by noise and step size, (K_MAX, sizes)."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    tau = np.arange(1, K_MAX + 1) / K_MAX
    for e in range(arrays.losses.shape[1]):
        on = np.isfinite(arrays.losses[:, e])
        if on.any():
            ax.plot(tau[on], arrays.losses[on, e], "o-", ms=3, label=f"d = {2**e}/{K_MAX}")
    ax.set(xlabel="tau, noise of the new frame", ylabel="squared error of z_hat", yscale="log")
    ax.legend(fontsize=7)
    save_artifact(folder, "loss_by_t", arrays.losses, figure)


def scoreboard(arrays):
    """The exact scores as text, rows beside each other."""
    if not arrays.exact:
        return "no scoreboard: the rules of these videos are not known\n"
    names = arrays.exact["dream"].mean
    order = ["through the tokenizer", "dream", "one step at a time", "actions of others", "no actions",
             "copy the last frame", "mean frame", "random frame"]
    lines = [f"{'':24s}" + "".join(f"{name[:15]:>17s}" for name in order),
             f"{'rollouts':24s}" + "".join(f"{len(arrays.rows[name]):17d}" for name in order)]
    for name in names:
        values = [arrays.exact[row].mean[name] for row in order]
        if any(np.isfinite(values)):
            lines.append(f"{name:24s}" + "".join(f"{v:17.3f}" for v in values))
    return "\n".join(lines) + "\n"


def draw_report(folder, arrays, metrics, epoch):
    """report: one page with the break-even horizon as its headline."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(1, 1.15, 1.1))
    h = metrics["break_even_horizon"]["value"]
    figure.suptitle(f"epoch {epoch}: better than copying the last frame "
                    + (f"for {h - 1:.0f} frames" if h <= HORIZON else f"for all {HORIZON} frames"), size=15)
    ax = figure.add_subplot(grid[0, :])
    hs, cell = upto(), arrays.truth.shape[2:4]
    rows = [arrays.truth[0], arrays.rows["dream"][0]]
    strip = np.concatenate([np.concatenate([np.pad(v[h - 1], ((1, 1), (1, 1), (0, 0)), constant_values=255)
                                            for h in hs], 1) for v in rows])
    ax.imshow(strip, interpolation="nearest")
    ax.set_xticks([(k + 0.5) * (cell[1] + 2) for k in range(len(hs))], [f"frame {h}" for h in hs])
    ax.set_yticks([(k + 0.5) * (cell[0] + 2) for k in range(2)], ["truth", "dream"])
    ax.tick_params(length=0)
    horizon_axes(figure.add_subplot(grid[1, :2]), arrays, metrics)
    sweep_axes([figure.add_subplot(grid[1, 2]), figure.add_subplot(grid[1, 3])], arrays)
    ax = figure.add_subplot(grid[2, :2])
    ax.plot(list(arrays.ratio), list(arrays.ratio.values()), "o-")
    ax.axhline(1, color="k", lw=0.8, ls="--")
    ax.set(xscale="log", yscale="log", xlabel="frame",
           ylabel="change by opposite actions\nover change by other noise")
    ax.set_xticks(list(arrays.ratio), [str(h) for h in arrays.ratio])
    ax.minorticks_off()
    ax = figure.add_subplot(grid[2, 2:])
    ax.axis("off")
    lines = []
    for name in ("psnr_h1 psnr_h8 psnr_h32 changed_psnr_h8 ssim_h8 obedience legality cell_accuracy "
                 "sharpness delta_psnr shuffle_loss_ratio frechet fps fps_p95_ms").split():
        if name in metrics and metrics[name]["value"] is not None:
            m = metrics[name]
            beside = [f"{k} {m[k]:.3g}" for k in ("floor", "ceiling") if m[k] is not None]
            lines.append(f"{name:20s}{m['value']:9.3g}   {', '.join(beside)}")
    ax.text(0, 1, "\n".join(lines), family="monospace", fontsize=8.5, va="top")
    save_artifact(folder, "report", np.stack([q["psnr"] for q in arrays.table.values()]), figure)


def draw_loss(folder, log, step):
    """loss: the training up to this step."""
    if log is None or not log.exists():
        return
    rows = common.read_log(log)
    rows = {k: v[rows["step"] <= step] for k, v in rows.items()}
    n = max(1, len(rows["step"]) // 80)
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    mean = np.convolve(rows["loss"], np.ones(n) / n, "valid")
    ax.plot(rows["step"][n - 1:], mean, lw=1, label=f"mean of {n} steps")
    ax.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    ax.legend(fontsize=8)
    save_artifact(folder, "loss", np.stack([rows[k] for k in ("step", "loss", "lr", "grad_norm")]), figure)


def report(folder, model, tokenizer, data, ref, step, log=None, board=None):
    """Every number, picture and array of one epoch folder; returns the metrics."""
    epoch = step // sum(batches(data))
    metrics, arrays = evaluate(model, tokenizer, data, ref, SAMPLES)
    folder.mkdir(parents=True, exist_ok=True)
    draw_rollout(folder, arrays, ref.actions.numpy())
    draw_horizon(folder, arrays, metrics)
    draw_sweep(folder, arrays)
    draw_play(folder, model, tokenizer, data, ref)
    draw_losses(folder, arrays)
    if TOKENIZER == "mae":
        draw_tokenizer(folder, tokenizer, ref)
    draw_report(folder, arrays, metrics, epoch)
    draw_loss(folder, log, step)
    (folder / "scoreboard.txt").write_text(scoreboard(arrays))
    common.save_metrics(None, folder, metrics)
    if board is not None:
        for name, m in metrics.items():
            if m["value"] is not None:
                board.add_scalar(f"eval/{name}", m["value"], epoch)
    return metrics


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    choices = dict(ACTION_ALIGN=("into", "from"), TOKENIZER=("none", "mae"), LOSS=("x", "v"),
                   OPT=("muon", "adamw"), NOISE=("iid", "same", "context", "pyramid"),
                   RAMP=("clean", "none", "noise"), PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(allowed)}")
    for name in ("EPOCHS BATCH_SIZE BATCH_SIZE_LONG ACCUM LR MUON_LR SHIFT TOK_LR STRIDE PATCH CODE "
                 "PACK TOK_DIM TOK_DEPTH TOK_STEPS TOK_BATCH DIM DEPTH HEADS KV_HEADS TIME_EVERY K_MAX STEPS "
                 "EVAL_EVERY CLIP").split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(LEVEL=(0, len(game.LEVELS) - 1), TRAIN=(1, 10**6), TEST=(4, 10**5), LATENTS=(0, 10**5),
                  MASK_MOST=(0, 0.99), WINDOW=(2, 10**5), REGISTERS=(0, 1000), CAP=(0, 1e6), BOOTSTRAP=(0, 1),
                  BOOT_FROM=(0, 1), IMAGE=(0, 1), ROLL=(0, 1), TAU_CTX=(0, 1), ACTION_DROP=(0, 1),
                  SEQ_LEN_SHORT=(2, 10**5), SEQ_LEN_LONG=(2, 10**5), LONG_RATIO=(0, 0.9), WARMUP=(0, 1),
                  WEIGHT_DECAY=(0, 10), BETA2=(0, 0.99999), EMA_DECAY=(0, 1), UPDATE_SCALE=(0.01, 2),
                  CONTEXT=(1, 10**5), HORIZON=(4, 10**5), SAMPLES=(4, 10**5), KEEP_EVERY=(0, 10**9),
                  SEED=(0, 2**63 - 1))
    for name, (low, high) in ranges.items():
        if not low <= globals()[name] <= high:
            fail(f"{name}={globals()[name]} must lie between {low:g} and {high:g}")
    if K_MAX & (K_MAX - 1) or STEPS & (STEPS - 1) or STEPS > K_MAX:
        fail(f"STEPS={STEPS}, K_MAX={K_MAX}: powers of two, STEPS at most K_MAX, the finest that is trained")
    if TAU_CTX and context_level() == K_MAX:
        fail(f"TAU_CTX={TAU_CTX}: 1 on the grid of K_MAX={K_MAX}, nothing is left of the past: raise K_MAX")
    if KEEP_EVERY % EVAL_EVERY:
        fail(f"KEEP_EVERY={KEEP_EVERY} must be a multiple of EVAL_EVERY={EVAL_EVERY}")
    if DIM % HEADS or DIM // HEADS % 2 or DIM // HEADS < 4 or HEADS % KV_HEADS:
        fail(f"DIM={DIM} over HEADS={HEADS} must be whole, even and at least 4, "
             f"HEADS over KV_HEADS={KV_HEADS} whole")
    if DEPTH < TIME_EVERY:
        fail(f"DEPTH={DEPTH}: no layer looks into the past, every TIME_EVERY={TIME_EVERY}-th does")
    if TOKENIZER == "mae" and (LATENTS % PACK or TOK_DIM % 32):
        fail(f"LATENTS={LATENTS} must divide by PACK={PACK}, TOK_DIM={TOK_DIM} by 32")
    if TOKENIZER == "mae" and not LATENTS and PACK > 1:
        fail(f"PACK={PACK}: 1 where LATENTS=0, each latent is the token of its patch then")
    if DATA == "game" and CONTEXT + HORIZON > 128:
        fail(f"CONTEXT={CONTEXT} and HORIZON={HORIZON}: episodes of the game have 128 frames")
    for name in ("BATCH_SIZE", "BATCH_SIZE_LONG"):
        if globals()[name] % world:
            fail(f"{name}={globals()[name]} does not divide over {world} processes")


def prepare(rank=0, world=1):
    """The data. A mistake in them ends here, in one line."""
    try:
        if rank == 0:
            data = load_data()
        if world > 1:
            torch.distributed.barrier()
        return data if rank == 0 else load_data()
    except (ValueError, OSError) as error:
        fail(error)


def build_tokenizer(data):
    return (MAE if TOKENIZER == "mae" else Pixels)(data)


def build_model(data, tokenizer):
    return Dynamics(tokenizer.tokens, tokenizer.channels, len(data.names), tokenizer.grid)


def build_optimizer(model, peak):
    """Muon for the matrices of the layers, AdamW for all others; a group knows its ratio to AdamW's peak."""
    names = dict(model.named_parameters())
    inside = [p for name, p in names.items() if OPT == "muon" and p.ndim == 2
              and name.startswith(("body.layers", "encoder", "decoder"))]
    chosen = {id(p) for p in inside}
    rest = dict(params=[p for p in names.values() if id(p) not in chosen], ratio=1.0)
    parts = [torch.optim.AdamW([rest], 0.0, (0.9, BETA2), weight_decay=WEIGHT_DECAY, fused=True)]
    if inside:
        parts.append(Muon([dict(params=inside, ratio=MUON_LR / peak)], WEIGHT_DECAY))
    return Optimizers(model, parts)


def train_tokenizer(run, data):
    """The trained tokenizer, frozen, and its latents on disk. It continues from tokenizer.pt where there is
    one; the first process trains it alone."""
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(data).to(run.device)
    path = run.folder / "tokenizer.pt"
    if TOKENIZER == "none":
        return tokenizer.eval()
    if run.rank == 0:
        fit_tokenizer(run, data, tokenizer, path)
    if run.world > 1:
        torch.distributed.barrier()
    if run.stopping():
        return tokenizer
    common.load_strictly(tokenizer, common.load_checkpoint(path, run.device)["model"], str(path))
    tokenizer.eval().requires_grad_(False)
    folder = latents_folder(run, tokenizer)
    if run.rank == 0:
        write_latents(folder, run.device, data, tokenizer)
    if run.world > 1:
        torch.distributed.barrier()
    for name in ("train", "val", "test"):
        files = [folder / f"{name}_{k}.npy" for k in range(len(getattr(data, name).frames))]
        getattr(data, name).latents = episodes.Frames([(partial(np.load, file, mmap_mode="r"), slice(None))
                                                       for file in files])
    return tokenizer


def fit_tokenizer(run, data, tokenizer, path):
    """Train, from where path left off, and write to it."""
    optimizer, guard, step = build_optimizer(tokenizer, TOK_LR), Guard(), 0
    saved = common.load_checkpoint(path, run.device, missing_ok=True)
    if saved is not None:
        names = [name for name in run.settings if name.startswith("TOK") or name in
                 ("DATA LEVEL TRAIN PATCH LATENTS CODE PACK MASK_MOST EDGES OPT MUON_LR WARMUP WEIGHT_DECAY "
                  "BETA2 CLIP PRECISION SEED").split()]
        differ = [name for name in names if saved["settings"].get(name) != run.settings[name]]
        if differ or saved["data"] != data.hash:
            fail(f"{path} was made with other {', '.join(differ) or 'data'}; RESUME=False or another OUT")
        common.restore(saved, tokenizer, copy.deepcopy(tokenizer), optimizer, guard)
        step = saved["step"]

    def save():
        common.save_checkpoint(path, run, model=tokenizer.state_dict(), ema=tokenizer.state_dict(), step=step,
                               optimizer=optimizer.state_dict(), guard=dict(vars(guard)), data=data.hash)
    lengths = np.array([len(frames) for frames in data.train.frames])
    ends, losses, saved_at = lengths.cumsum(), [], time.monotonic()
    bar = tqdm(total=TOK_STEPS, initial=step, desc="tokenizer", disable=None, dynamic_ncols=True)
    while step < TOK_STEPS and not run.signal:  # alone: the other processes wait
        g = generator_of(SEED, "tokenizer", step)
        index = np.array(batch_order(SEED, step, TOK_BATCH, int(ends[-1])))
        at = np.searchsorted(ends, index, side="right")
        frames = np.stack([data.train.frames[e][k - ends[e]] for e, k in zip(at, index)])
        most = MASK_MOST * torch.rand(TOK_BATCH, 1, generator=g)
        hidden = torch.rand(TOK_BATCH, tokenizer.pixels, generator=g) < most
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, TOK_STEPS, TOK_LR, WARMUP) * guard.lr_scale * group["ratio"]
        tokenizer.train()
        with autocast(run.device, PRECISION):
            loss, edges = tokenizer_losses(tokenizer, pictures(frames, run.device), hidden.to(run.device))
        tokenizer.balance((loss, edges), torch.tensor([1.0, EDGES])).backward()
        losses.append(float(loss.detach()))
        guarded_step(optimizer, list(tokenizer.parameters()), guard, losses[-1], CLIP)
        step += 1
        if guard.lost:
            fail(f"the tokenizer diverged at step {step}: lower TOK_LR={TOK_LR:g}; RESUME=False begins anew")
        bar.update(1)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        if step % max(1, TOK_STEPS // 10) == 0:
            tqdm.write(f"tokenizer  step {step:5d}  loss {np.mean(losses[-50:]):.4f}")
        if time.monotonic() - saved_at > SAVE_SECONDS and guard.healthy:
            save()
            saved_at = time.monotonic()
    bar.close()
    if step == TOK_STEPS and (tokenizer.code_std == 1).all():
        tokenizer.eval()
        with torch.no_grad():
            codes = torch.cat([tokenizer.raw_codes(pictures(frames[::max(8, len(frames) // 256)], run.device))
                               .flatten(0, 1) for frames in data.train.frames[:256]])
        tokenizer.code_mean.copy_(codes.mean(0))
        tokenizer.code_std.copy_(codes.std(0).clamp(min=1e-3))
    save()


def latents_folder(run, tokenizer):
    """Where the latents of this very tokenizer are."""
    content = hashlib.blake2b(digest_size=6)
    for tensor in tokenizer.state_dict().values():
        content.update(tensor.cpu().numpy().tobytes())
    return run.folder / f"latents_{content.hexdigest()}"


@torch.no_grad()
def write_latents(folder, device, data, tokenizer):
    """codes float16 (T, LATENTS, CODE) of every episode, a file each; those that are there stay."""
    folder.mkdir(exist_ok=True)
    todo = [(f"{name}_{k}.npy", frames) for name in ("train", "val", "test")
            for k, frames in enumerate(getattr(data, name).frames)]
    for name, frames in tqdm(todo, desc="latents", disable=None, dynamic_ncols=True):
        if not (folder / name).exists():
            codes = [tokenizer.raw_codes(pictures(frames[k:k + 256], device)).half().cpu()
                     for k in range(0, len(frames), 256)]
            with open(folder / "part.tmp", "wb") as file:
                np.save(file, torch.cat(codes).numpy())
            os.replace(folder / "part.tmp", folder / name)


def train_step(handle, model, ema, optimizer, guard, data, tokenizer, step, total, run):
    """One optimizer step: forward, backward, clip, guard, step, EMA. Returns the mean weighted error of the
    batch, before it is balanced, the learning rate, the gradient norm, and the batch."""
    batch = draw_batch(data, tokenizer, step, total, guard.rollbacks)
    model.train()
    lr = lr_at(step, total, LR, WARMUP) * guard.lr_scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    loss = torch.zeros((), device=run.device)
    for k in range(ACCUM):
        # each process takes its share of each part
        part = {name: v.chunk(ACCUM)[k].chunk(run.world)[run.rank] for name, v in batch.items()}
        part = {name: v.to(run.device) for name, v in part.items()}
        with autocast(run.device, PRECISION):
            losses = loss_fn(handle, ema if EMA_TEACHER else model, **part)
        large = part["e"] > 0
        sums = torch.stack([losses[~large].sum(), losses[large].sum()])
        whole = torch.stack([sums.detach(), torch.stack([(~large).sum(), large.sum()])])  # of all processes
        if run.world > 1:
            torch.distributed.all_reduce(whole)
        frames = whole[1].clamp(min=1)
        # DDP takes the mean of what the processes give
        (model.balance(sums * run.world / frames, whole[1] / whole[1].sum(), whole[0] / frames)
         / ACCUM).backward()
        loss += losses.detach().mean() / ACCUM
    if run.world > 1:
        torch.distributed.all_reduce(loss)
        loss /= run.world
    norm, taken = guarded_step(optimizer, list(model.parameters()), guard, float(loss), CLIP)
    if taken:
        ema_update(ema, model, EMA_DECAY, step)
    return float(loss), lr, norm, batch


def dry_run(data, tokenizer, device):
    """What a batch of each length keeps in memory for the backward pass, and its time."""
    model = build_model(data, tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    fixed = 20 * parameters / 2**20  # weights, their average, gradients and two moments, 4 bytes each
    print(f"{parameters:,} parameters; weights, average, gradients and optimizer {fixed:.0f} MiB")
    print(f"{'T':>5s} {'B':>4s} {'kept':>10s} {'together':>10s} {'a step':>9s}")
    for T, B in [(T, max(1, BATCH_SIZE * SEQ_LEN_SHORT // T))
                 for T in sorted({SEQ_LEN_SHORT, SEQ_LEN_LONG, 2 * SEQ_LEN_LONG, 4 * SEQ_LEN_LONG})]:
        z = torch.randn(B, T, tokenizer.tokens, tokenizer.channels, device=device)
        g = torch.Generator().manual_seed(0)
        i, e = (v.to(device) for v in draw_levels(spread(B, 0.0), T, g))
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        try:
            clock = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(device, PRECISION):
                loss_fn(model, model, z, torch.randn_like(z), i, e, torch.zeros_like(i),
                        torch.zeros(B, dtype=torch.bool, device=device)).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds, size = time.perf_counter() - clock, sum(kept.values()) / 2**20
            print(f"{T:5d} {B:4d} {size:6.0f} MiB {size + fixed:6.0f} MiB {seconds:7.2f} s")
        except torch.OutOfMemoryError:
            print(f"{T:5d} {B:4d}   does not fit")


def build_ema(checkpoint, data, device):
    """The averaged model and the tokenizer of a checkpoint. data: names, size, crop, mean, std."""
    tokenizer = build_tokenizer(data).to(device)
    common.load_strictly(tokenizer, checkpoint["tokenizer"], "the checkpoint's tokenizer")
    model = build_model(data, tokenizer).to(device)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint's EMA")
    return model.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False)


def inference_full(checkpoint, folder, log):
    """Redraw every number and picture of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: from common.load_checkpoint, its settings already put back (sample.py --full does both)."""
    check_settings()
    device, data = common.pick_device(), prepare()
    if checkpoint["data"] != data.hash:
        fail(f"the checkpoint was trained on other data than DATA={DATA} gives now")
    model, tokenizer = build_ema(checkpoint, data, device)
    try:
        return report(folder, model, tokenizer, data, reference(data), checkpoint["step"], log)
    except ValueError as error:
        fail(error)


def facts_of(checkpoint):
    """What build_ema() needs of the data, from the checkpoint alone."""
    facts = checkpoint["facts"]
    return SimpleNamespace(names=facts["names"], fps=facts["fps"], crop=tuple(facts["crop"]),
                           size=tuple(facts["size"]), mean=np.zeros(3), std=np.ones(3))


# ---------------------------------------------------------------- playing
class Dream:
    """
    A world to step through, as sample.py --play and --serve do. After reset() and act(): frame, uint8 (H, W,
    3), what the model dreams; real, what the game shows under the same actions, None where there is no game.

    names    of the actions; fps, frames a second of the recordings; steps, K; choices, the values it may have
    """

    def __init__(self, model, tokenizer, facts):
        self.model, self.tokenizer, self.names, self.fps = model, tokenizer, facts.names, facts.fps
        self.steps, self.choices = STEPS, [1 << k for k in range(K_MAX.bit_length())]
        self.test = None

    def reset(self, seed, start="test"):
        """Begin anew: after CONTEXT true frames of a test episode, or ("invented") from a frame of nothing.
        Returns the frame."""
        self.caches, self.world, self.real, self.played = self.model.caches(), None, None, []
        self.noise(seed)
        if start == "invented":
            with torch.no_grad():
                z = invented(self.model, self.tokenizer, [seed])[:, 0]
            self._show(z, -1)
            self._remember(z, self.model.null)
            return self.frame
        frames, actions = self._past(seed)
        for frame, action in zip(frames, [-1, *actions[1:]]):  # what led into the first came before it
            z = to_latents(self.tokenizer, frame[None, None], self.model.slots.device)[:, 0]
            self._remember(z, int(action) if action >= 0 else self.model.null)
        self.played = [(frame, int(action)) for frame, action in zip(frames, actions)]
        self.frame = frames[-1]
        return self.frame

    def _past(self, seed):
        """True frames and actions before a dream; of the game, which then goes on beside it."""
        if DATA == "game":
            self.world = game.Game(LEVEL, game.SEEDS["test"] + seed % 10**6, STOCHASTIC)
            player, frames, actions = game.player(self.world), [self.world.frame()], [-1]
            while len(frames) < CONTEXT:
                actions.append(next(player))
                self.world.step(actions[-1])
                frames.append(self.world.frame())
            self.real = frames[-1]
            return frames, actions
        self.test = self.test or prepare().test
        longest = [k for k, frames in enumerate(self.test.frames) if len(frames) >= CONTEXT]
        if not longest:
            fail(f"DATA={DATA}: no test episode has CONTEXT={CONTEXT} frames; lower CONTEXT")
        g = np.random.default_rng(seed)
        k = int(g.choice(longest))
        begin = int(g.integers(len(self.test.frames[k]) - CONTEXT + 1))
        return (list(np.array(self.test.frames[k][begin:begin + CONTEXT])),
                self.test.actions[k][begin:begin + CONTEXT])

    def act(self, action):
        """One frame on."""
        if not 0 <= action < len(self.names):
            raise ValueError(f"action {action}: expected 0 to {len(self.names) - 1}")
        device = self.model.slots.device
        with torch.no_grad():
            chosen = torch.tensor([action], device=device)
            z = imagine(self.model, self.caches, chosen, self._eps(), self.steps)
        self._show(z, action)
        self._remember(z, action)
        if self.world is not None:
            self.world.step(action)
            self.real = self.world.frame()

    def _eps(self):
        shape = 1, self.tokenizer.tokens, self.tokenizer.channels
        return torch.randn(shape, generator=self.generator).to(self.model.slots.device)

    def _show(self, z, action):
        self.frame = to_frames(self.tokenizer, z[:, None])[0, 0]
        self.played.append((self.frame, action))

    def _remember(self, z, action):
        with torch.no_grad():
            remember(self.model, self.caches, z, torch.tensor([action], device=z.device), self._eps())

    def noise(self, seed):
        """Other noise from here on."""
        self.generator = generator_of(seed, "play")

    def save(self):
        """A bookmark, for load()."""
        return dict(caches=copy.deepcopy(self.caches), generator=self.generator.get_state(), frame=self.frame,
                    real=self.real, world=self.world and self.world.copy(), played=list(self.played))

    def load(self, state):
        """Back to a bookmark, which stays good."""
        self.caches, self.world = copy.deepcopy(state["caches"]), state["world"] and state["world"].copy()
        self.frame, self.real, self.played = state["frame"], state["real"], list(state["played"])
        self.generator.set_state(state["generator"])

    def export(self, folder):
        """What was played: dream.npz, as data/episodes.py reads it, dream.gif, dream.png. The paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        frames, actions = (np.stack([np.asarray(row[k]) for row in self.played]) for k in (0, 1))
        np.savez_compressed(folder / "dream.npz", frames=frames[None],
                            actions=np.where(np.arange(len(actions)) > 0, actions, -1)[None])
        write_gif(folder / "dream.gif", frames, self.fps)
        show = frames[np.linspace(0, len(frames) - 1, min(16, len(frames))).astype(int)]
        figure = tile(show[None] / 255, f"{len(frames)} frames")
        figure.savefig(folder / "dream.png", dpi=100)
        plt.close(figure)
        return [folder / f"dream.{kind}" for kind in ("npz", "gif", "png")]


def open_dream(checkpoint, seed=0):
    """The Dream of a checkpoint, ready to play; its settings are put back already."""
    check_settings()
    facts = facts_of(checkpoint)
    dream = Dream(*build_ema(checkpoint, facts, common.pick_device()), facts)
    dream.reset(seed)
    return dream


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` dreams of HORIZON frames, each from another start. prompt: names of actions, taken
    in turn and over again ("right right up"); empty: as the player of the game acts, or by chance. dreams.npy
    uint8 (n, HORIZON, H, W, 3), dreams.png, dreams.gif; the game's own frames beside them."""
    check_settings()
    facts = facts_of(checkpoint)
    wish = prompt.replace(",", " ").split()
    for name in wish:
        if name not in facts.names:
            fail(f"--prompt {name!r}: no such action; there are {', '.join(facts.names)}")
    dream = Dream(*build_ema(checkpoint, facts, common.pick_device()), facts)
    videos, truths, g = [], [], np.random.default_rng(seed)
    for k in range(count):
        dream.reset(seed_of(seed, k) % 10**6)
        player = game.player(dream.world) if dream.world is not None else None
        video, truth = [], []
        for t in range(HORIZON):
            if wish:
                action = facts.names.index(wish[t % len(wish)])
            else:
                action = int(g.integers(len(facts.names))) if player is None else next(player)
            dream.act(action)
            video.append(dream.frame), truth.append(dream.real)
        videos.append(video), truths.append(truth)
    videos = np.array(videos)
    rows = [v for k in range(count) for v in ((videos[k], np.array(truths[k])) if dream.world is not None
                                              else (videos[k],))]
    kinds = ("dream", "game") if dream.world is not None else ("dream",)
    names = [f"{what} {k}" for k in range(count) for what in kinds]
    figure = tile(shown(np.stack(rows), len(rows)), f"K = {STEPS}" + (f", {' '.join(wish)}" if wish else ""),
                  rows=names, columns=[f"frame {h}" for h in upto()], cell=1.2)
    save_artifact(folder, "dreams", videos, figure)
    write_gif(Path(folder) / "dreams.gif", side_by_side([videos[:4]] + ([np.array(truths[:4])]
                                                        if dream.world is not None else [])), facts.fps)


def main():
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_settings(world)
    if DRY_RUN:
        data = prepare()
        dry_run(data, build_tokenizer(data), common.pick_device())
        return
    free = "EPOCHS EVAL_EVERY KEEP_EVERY SAVE_SECONDS TENSORBOARD COMPILE DRY_RUN STEPS UPDATE_SCALE CONTEXT "
    run = start(__file__, globals(), (free + "HORIZON SAMPLES CTX_STATED").split())
    data = prepare(run.rank, run.world)
    try:
        ref = reference(data) if run.rank == 0 else None
    except ValueError as error:
        fail(error)
    tokenizer = train_tokenizer(run, data)
    torch.manual_seed(SEED)
    model = build_model(data, tokenizer).to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, guard = build_optimizer(model, LR), Guard()
    at = SimpleNamespace(step=0, reported=0, best=-math.inf, seconds=0.0)  # where the run is
    per_epoch = sum(batches(data))
    total = EPOCHS * per_epoch
    last, log = run.folder / "last.pt", run.folder / "log.csv"
    facts = dict(names=data.names, fps=float(data.fps), crop=list(data.crop), size=list(data.size))

    def save(path):
        return common.save_checkpoint(
            path, run, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            guard=dict(vars(guard)), **vars(at), tokenizer=tokenizer.state_dict(), facts=facts,
            data=data.hash)

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
        handle = nn.parallel.DistributedDataParallel(handle, broadcast_buffers=False)
    board = None
    if run.rank == 0:
        common.open_log(log, at.step)
        board = common.open_tensorboard(run.folder) if TENSORBOARD else None
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{data.facts}\n{parameters:,} parameters, {tokenizer.tokens} tokens of {tokenizer.channels} "
              f"numbers a frame; {batches(data)[0]} short and {batches(data)[1]} long batches an epoch")
        save(last)
    bar = tqdm(total=total, initial=at.step, disable=True if run.rank else None, dynamic_ncols=True)
    losses, saved_at, clock, earlier, written = [], time.monotonic(), time.monotonic(), at.seconds, True
    seen = [1.0, 0.0]

    while not run.stopping():
        epoch = at.step // per_epoch
        due = at.step % per_epoch == 0 and (epoch % EVAL_EVERY == 0 or at.step == total)
        if due and at.step > at.reported:
            if run.rank == 0:
                save_last()
                folder, paused, metrics = run.folder / f"epoch_{epoch:04d}", time.monotonic(), None
                with run.evaluation():
                    metrics = report(folder, ema, tokenizer, data, ref, at.step, log, board)
                    more = dict(seconds=round(at.seconds, 1), parameters=parameters)
                    common.save_metrics(run, folder, metrics, **more)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue  # the loop ends; the next start draws this report again
            at.reported = at.step
            if run.rank == 0 and metrics is not None:
                tqdm.write(f"epoch {epoch}: {summary(metrics)}")
                if metrics["psnr_h1"]["value"] > at.best:
                    at.best = float(metrics["psnr_h1"]["value"])
                    save(run.folder / "best.pt")
                if KEEP_EVERY and epoch % KEEP_EVERY == 0:
                    save(run.folder / f"epoch_{epoch:04d}.pt")
                written = save_last()
            continue
        if at.step >= total:
            break

        loss, lr, norm, batch = train_step(handle, model, ema, optimizer, guard, data, tokenizer, at.step,
                                           total, run)
        at.step += 1
        at.seconds = earlier + time.monotonic() - clock
        losses.append(loss)

        if guard.lost:
            common.roll_back(run, guard, restore, at, LR)
            bar.n = at.step
            continue
        if run.rank > 0:
            continue
        B, T = batch["i"].shape
        level = batch["i"] / K_MAX
        seen = [min(seen[0], float(level.min())), max(seen[1], float(level.max()))]
        common.log_row(log, step=at.step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                       skipped=guard.skipped, samples_per_s=B * T * at.step / at.seconds, seconds=at.seconds,
                       T=T, B=B)
        bar.update(1)
        kind, speed_now = "S" if T == SEQ_LEN_SHORT else "L", at.step / at.seconds
        bar.set_postfix_str(f"{kind} T={T} loss {np.mean(losses[-50:]):.4f} "
                            f"tau [{seen[0]:.2f}-{seen[1]:.2f}] {speed_now:.1f} batch/s", refresh=False)
        if len(losses) == 20:
            minutes = (total - at.step) / speed_now / 60
            tqdm.write(f"{speed_now:.1f} batches a second: {minutes:.0f} minutes of training to go, and "
                       "reports")
        if at.step % per_epoch == 0:
            mean = float(np.mean(losses[-per_epoch:]))
            tqdm.write(f"epoch {epoch + 1:4d}  loss {mean:.4f}  tau [{seen[0]:.2f}-{seen[1]:.2f}]  "
                       f"lr {lr:.1e}  grad {guard.average:.2f}  skipped {guard.skipped}  {at.seconds:.0f} s")
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
