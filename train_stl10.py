"""
Image diffusion on ten labelled classes, in one file: pixels, v-prediction, classifier-free guidance.

    x_t = a x_0 + s eps                          t = 0 is data, t = 1 is noise; a^2 = alpha_bar, a^2 + s^2 = 1
    v   = a eps - s x_0                          the network regresses v     L = E || v_hat(x_t, t, label) - v ||^2
    x_0_hat = a x_t - s v_hat                    (Salimans & Ho 2022, appendix D; eps_hat = s x_t + a v_hat)
    x_0_hat <- x_0_null + w (x_0_label - x_0_null)      guidance             (Ho & Salimans 2022, eq. 6)
    x_u = a_u x_0_hat + sqrt(s_u^2 - S^2) eps_hat + S z,  S = ETA s_u/s sqrt(1 - (a/a_u)^2)
                                                 one step t -> u; ETA=0: DDIM, ETA=1: DDPM (Song 2021, eq. 12 and 16)

    python train_stl10.py                                   # ten drawn classes, 32x32, two CPU cores: see README
    python train_stl10.py EPOCHS=400 OUT=runs_long          # the same for an hour
    python train_stl10.py OVERFIT_TINY=8 EPOCHS=2000        # can it memorise 8 pictures? The first thing to try
    python train_stl10.py DATA=folder SIZE=32               # your pictures: python -m data.stl10 import pictures/ folder
    python -m data.stl10 download stl10                     # the real STL-10, 2.6 GB; then, on one GPU:
    torchrun --nproc_per_node=1 train_stl10.py DATA=stl10 SIZE=96 PATCH=1 WIDTH=128 MULTS=1,2,2,3 BLOCKS=2 \
        ATTENTION=False,False,True,True SHIFT=1.5 BATCH_SIZE=128 LR=2e-4 EMA_DECAY=0.9999 EPOCHS=4000 EVAL_EVERY=200
    python sample.py --checkpoint runs/stl10/last.pt --prompt cat --num-samples 8
    python sample.py --checkpoint runs/stl10/last.pt --full # inference_full: every diagnostic again, the same bits

Letters: B pictures in a batch, C H W their shape, K classes, null = K the label that means "no label", w guidance.
Not here: latent space, text conditions, learned variances, likelihoods, Inception FID (no weights are downloaded:
a small classifier trained on the run's own training pictures, the judge, gives accuracy and features).
"""

import copy
import math
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
from common import Guard, ema_update, fail, guarded_step, lr_at, override, save_artifact, seed_of, start, tile
from data import stl10
from metrics import frechet, kid, memorisation, nearest, prdc, psnr
from model_unet import UNet

# ---------------------------------------------------------------- settings: edit here, or NAME=value on the command line
DATA = "embedded"    # ten drawn classes; or a folder made by `python -m data.stl10 download|import`
SIZE = 32            # side of the training pictures; must divide the stored side (96 for STL-10: 32, 48, 96)
OVERFIT_TINY = 0     # train on the first N pictures only, without flips (the lab notes: 128); 0 = all
EPOCHS = 90          # passes over the training pictures
BATCH_SIZE = 32      # pictures in a forward pass, over all processes
ACCUM = 1            # forward passes in an optimizer step: the lab notes' virtual batch multiplier
LR = 1e-3            # peak; 1e-3 for 2 M parameters and minutes, 2e-4 for 50 M and days
WARMUP = 0.05        # share of the optimizer steps
WEIGHT_DECAY = 1e-4
CLIP = 1.0           # gradient norm
EMA_DECAY = 0.999    # of the weights we sample from; half-life 693 steps. 0.9999 for long runs
WIDTH = 48           # channels of the first level; 64 to 256 at 96x96
MULTS = (1, 2, 2)    # channels of each level in units of WIDTH; each level halves the grid
BLOCKS = 1           # ResBlocks a level
ATTENTION = (False, True, True)  # self-attention at each level; the middle always has it
PATCH = 2            # space-to-depth stem: 2 quarters the cost; 1 looks at single pixels
FILM = True          # labels and time scale and shift the norms (AdaGN); False adds them, as in the lab notes
DROPOUT = 0.1
LABEL_DROP = 0.2     # share of labels replaced by null in training, for guidance
SCHEDULE = "cosine"  # or "linear" (DDPM's betas)
SHIFT = 1.0          # more noise for larger pictures: SIZE/64 above 64 px (Hoogeboom 2023), 1.5 at 96 px
MIN_SNR = 0.0        # weight min(SNR, this)/(SNR + 1) on the loss, 5 in Hang 2023; 0 = plain v-loss
SOLVER = "dpm++"     # "dpm++" (2M), "ddim" (with ETA), "heun"
STEPS = 20           # sampling steps; the lab notes: 500 with SOLVER=ddim ETA=1
ETA = 0.0            # ddim only: 0 deterministic, 1 DDPM
GUIDANCE = 2.0       # w: 1 = no guidance, 0 = no label. The sweep picture shows what more of it costs
GUIDANCE_INTERVAL = (0.2, 5.0)  # noise levels s/a where guidance acts (Kynkaanniemi 2024); saves passes elsewhere
RESCALE = 0.0        # share of x_0's own std restored after guidance (Lin 2023: 0.7)
CLIP_X0 = "clip"     # "clip" to [-1, 1], "dynamic" threshold (Saharia 2022), or "none"
SAMPLES = 1000       # pictures drawn for the numbers of the last report; the others use a fifth
SWEEP = (1.0, 1.5, 2.0, 3.0, 6.0)  # guidance scales of the sweep picture
EVAL_EVERY = 30      # epochs between reports (pictures and metrics in epoch_NNNN/)
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
    """Pictures as uint8 (N, 3, SIZE, SIZE) and labels (N,) on the device: x, y to train on, val held out of the
    training split by a fixed hash, test for Frechet and friends only. Raises ValueError or OSError."""
    x, y = stl10.load(folder, "train", SIZE)
    test_x, test_y = stl10.load(folder, "test", SIZE)
    held_out = stl10.validation_mask(y)
    data = SimpleNamespace(names=stl10.class_names(folder), hash=stl10.data_hash(folder))
    parts = dict(x=x[~held_out], y=y[~held_out], val_x=x[held_out], val_y=y[held_out], test_x=test_x, test_y=test_y)
    if OVERFIT_TINY:
        parts |= dict(x=x[:OVERFIT_TINY], y=y[:OVERFIT_TINY], val_x=x[:OVERFIT_TINY], val_y=y[:OVERFIT_TINY])
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
    """Everything random about optimizer step `step`, for the whole effective batch of BATCH_SIZE ACCUM pictures:
    x_0 (B, 3, H, W), labels (B,), t (B,), eps like x_0. A function of (SEED, step, attempt) alone, so a resumed run
    repeats an unbroken one, and two processes see what one would. attempt counts rollbacks: another window of data."""
    n, total, null = BATCH_SIZE * ACCUM, len(data.x), len(data.names)
    g = torch.Generator().manual_seed(seed_of(SEED, "step", step, attempt))
    # the data order is one endless stream of permutations, so that every batch is full
    place, index = step * n, []
    while len(index) < n:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed_of(SEED, "order", place // total)))
        index += order[place % total:][:n - len(index)].tolist()
        place = step * n + len(index)
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
    return UNet(channels=3, dims=2, width=WIDTH, mults=MULTS, blocks=BLOCKS, attention=ATTENTION, classes=classes + 1,
                patch=PATCH, dropout=DROPOUT, film=FILM)


def autocast(device):
    """bf16 inside the products where asked for, or where the hardware has it; losses and norms stay fp32."""
    if PRECISION == "auto":
        on = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    else:
        on = PRECISION == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


class Judge(nn.Module):
    """A small classifier: the only opinion on pictures in this file. x (B, 3, H, W) in [-1, 1] -> logits (B, K)."""

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
    """Train the judge on the training pictures (flips, shifts, label smoothing), or load it from the cache: once for
    each data set and size. Half a minute on two CPU cores."""
    judge, path = Judge(len(data.names)).to(device).eval(), folder / f"judge_{data.hash}_{SIZE}.pt"
    if path.exists():
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
            x, shift = to_float(data.x[index]), torch.randint(-SIZE // 16, SIZE // 16 + 1, (2,)).tolist()
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
    """a(t), s(t) in float64 for t in [0, 1], any shape. cosine: a = cos(pi t / 2), exactly no signal at t = 1 (Nichol
    & Dhariwal 2021 without the offset). linear: DDPM's betas 1e-4 .. 0.02 over 1000 steps in continuous time, log a =
    -(0.1 t + 9.95 t^2)/2 (Song 2021, eq. 33). SHIFT multiplies s/a (Hoogeboom 2023, eq. 3)."""
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


def loss_fn(model, x_0, labels, t, eps):
    """The v-loss of each picture, (B,): x_0, eps (B, C, H, W); labels (B,) with null for none; t (B,) in (0, 1]."""
    a, s = (c.to(x_0)[:, None, None, None] for c in schedule(t.cpu()))
    x_t = a * x_0 + s * eps
    v = a * eps - s * x_0
    loss = (model(x_t, t, labels).float() - v).square().flatten(1).mean(1)
    if MIN_SNR:  # clamped below, or t near 1 would not be trained at all (Hang 2023)
        snr = (a / s).square().flatten().clamp(min=0.05)
        loss = loss * snr.clamp(max=MIN_SNR) / (snr + 1)
    return loss


# ---------------------------------------------------------------- sampling
def guided_x_0(model, x, t, labels, w):
    """x_0_hat (B, C, H, W) of x at time t (float), guided and clipped. w (B,) guidance per picture."""
    a, s = (float(c) for c in schedule(t))
    times, (low, high) = torch.full((len(x),), t, device=x.device), GUIDANCE_INTERVAL
    with autocast(x.device):
        if not low < s / max(a, 1e-12) <= high or bool((w == 1).all()):
            x_0 = a * x - s * model(x, times, labels).float()
        else:
            null = torch.full_like(labels, model.null)
            v, v_null = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([labels, null])).float().chunk(2)
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

    labels  (N,) int64, null (= number of classes) for no label      seeds  N ints: one generator a picture, so a
    w       guidance, float or (N,); default GUIDANCE                       picture does not depend on its batch
    start   (x_t (N, C, H, W), t): begin there instead of pure noise at t = 1
    Returns x_0 (N, C, H, W) in [-1, 1]; with trajectory=True also lists of (t, x_t, x_0_hat) along the way.
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
        return x_0, [(s[0][0], torch.cat([p[1] for p in s]), torch.cat([p[2] for p in s])) for s in zip(*path)]
    return x_0


def solve(model, x, t_first, labels, w, noise):
    """Walk the uniform grid t_i = t_first (1 - i/STEPS); yields (t, x_t, x_0_hat), the last x_0_hat is the sample.
    ddim: the update of the head docstring; eps_hat comes from the clipped x_0_hat, so x_t stays consistent.
    dpm++: DPM-Solver++(2M) (Lu 2022, algorithm 2), l = log(a/s); at t = 1 l is -inf and the formulas fall back to
    first order by themselves."""
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
    """Heun's second-order steps of dy/dq = (y - x_0_hat)/q in y = x/a, q = s/a over STEPS noise levels, then 0
    (Karras 2022, algorithm 1 without churn, eq. 5 with rho = 7, q from 80 to 0.002): 2 STEPS - 1 evaluations."""
    a, s = (float(c) for c in schedule(t_first))
    top = min(80.0, s / a) if a > 0 else 80.0
    q = [(top ** (1 / 7) + i / max(1, STEPS - 1) * (0.002 ** (1 / 7) - top ** (1 / 7))) ** 7 for i in range(STEPS)] + [0.0]
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
def reference(data, judge):
    """What trivial predictors and real pictures get, computed once a run: rows that stand beside every number.
    Losses by t bucket of the zero predictor, E v^2 = a^2 + s^2 E x_0^2, and of the best linear predictor (the
    denoiser of a Gaussian with the training mean and covariance), both on held-out pictures; and pictures of one
    full-covariance Gaussian per class: shapeless, yet the judge calls most of them right."""
    x, val = (to_float(u[:2000]).flatten(1).double() for u in (data.x, data.val_x))
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean) @ (x - mean).T / len(x))  # Gram matrix: N x N, not pixels x pixels
    keep = values > 1e-6 * values.max()
    axes = (x - mean).T @ vectors[:, keep] / (values[keep] * len(x)).sqrt()  # (pixels, rank), orthonormal
    power = (val - mean).square().sum(1).mean() / x.shape[1]
    along = ((val - mean) @ axes).square().mean(0)  # held-out second moment along each axis
    rest = (power * x.shape[1] - along.sum()).clamp(min=0)
    lam, m = values[keep] + 2e-4, along
    zero, linear = [], []
    for t in (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000:
        a, s = schedule(t)
        a, s = float(a), float(s)
        zero.append(a**2 + s**2 * float(val.square().mean()))
        def error(lam):  # factors of E|x_0 - x_0_hat|^2: of the held-out second moment, and of the noise
            k = a * lam / (a**2 * lam + s**2)
            return (1 - a * k) ** 2, (k * s) ** 2
        (of_m, of_noise), (of_rest, noise_rest) = error(lam), error(2e-4)
        total = (of_m * m + of_noise).sum() + of_rest * rest + noise_rest * (x.shape[1] - len(m))
        linear.append(float(total) / x.shape[1] / s**2)
    zero, linear = (np.array(r).reshape(10, 100).mean(1) for r in (zero, linear))

    g = torch.Generator().manual_seed(0)
    labels = torch.arange(len(data.test_x)) % len(data.names)
    soup = torch.empty(len(labels), x.shape[1])
    for k in range(len(data.names)):
        own = to_float(data.x[data.y == k]).flatten(1).cpu()
        if len(own) < 2:
            own = to_float(data.x[:2]).flatten(1).cpu()
        z = torch.randn(int((labels == k).sum()), len(own), generator=g)
        soup[labels == k] = own.mean(0) + z @ (own - own.mean(0)) / math.sqrt(len(own) - 1)
    soup = soup.clamp(-1, 1).view(-1, *data.x.shape[1:]).to(data.x.device)
    real, probabilities = judged(judge, to_float(data.test_x))
    soup_features, soup_probabilities = judged(judge, soup)
    order = torch.randperm(len(data.x), generator=g)[:len(data.test_x)]
    return SimpleNamespace(
        zero=zero, linear=linear, soup=soup_features, test=real, train=judged(judge, to_float(data.x[order.to(data.x.device)]))[0],
        accuracy=float((probabilities.argmax(1) == data.test_y).float().mean()),
        soup_accuracy=float((soup_probabilities.argmax(1).cpu() == labels).float().mean()))


@torch.no_grad()
def losses_by_t(model, data, count=500):
    """v-loss on held-out pictures in 10 buckets of t, the same t and eps for three label choices: (3, 10) array of
    the right label, null, and a wrong label. Rows 2 - 1 and 3 - 1 say what a label is worth (label gain)."""
    g = torch.Generator().manual_seed(seed_of(SEED, "val"))
    x_0, y, K = to_float(data.val_x[:count]), data.val_y[:count], len(data.names)
    wrong = (y + 1 + torch.randint(K - 1, (len(y),), generator=g).to(y.device)) % K if K > 1 else y
    table = torch.zeros(3, 10, dtype=torch.float64)
    for bucket in range(10):
        t = (bucket + (torch.randperm(len(y), generator=g) + torch.rand(len(y), generator=g)) / len(y)) / 10
        t, eps = t.clamp(min=0.001).to(x_0.device), torch.randn(x_0.shape, generator=g).to(x_0.device)
        for row, labels in enumerate((y, torch.full_like(y, K), wrong)):
            with autocast(x_0.device):
                total = sum(loss_fn(model, x_0[i:i + 64], labels[i:i + 64], t[i:i + 64], eps[i:i + 64]).double().sum()
                            for i in range(0, len(y), 64))
            table[row, bucket] = total.cpu() / len(y)
    return table.numpy()


def flat(x, side=32):
    """Pictures as vectors for nearest neighbours, at most 32 px a side: a copy stays a copy."""
    return (F.interpolate(x, size=side, mode="area") if x.shape[-1] > side else x).flatten(1)


def sharpness(x):
    """Mean absolute difference of neighbouring pixels: blur lowers it, noise and over-guidance raise it."""
    return float((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean())


def evaluate(model, data, judge, ref, count):
    """Every number, beside its floor (trivial predictor) and ceiling (held-out real pictures), on `count` samples of
    the EMA model. Returns (metrics, arrays for the pictures)."""
    K, device = len(data.names), data.x.device
    table = losses_by_t(model, data)
    gain, wrong_gap = table[1] - table[0], table[2] - table[0]
    labels = torch.arange(count, device=device) % K
    x = sample(model, labels, [seed_of(SEED, "metrics", i) for i in range(count)])
    features, probabilities = judged(judge, x)
    confusion = torch.zeros(K, K, dtype=torch.int64).index_put_(
        (labels.cpu(), probabilities.argmax(1).cpu()), torch.tensor(1), accumulate=True)
    accuracy = float(confusion.diag().sum()) / count

    n = min(count, len(ref.test), len(ref.train))  # equal numbers on both sides: the bias of Frechet depends on them
    fake, real, train, soup = features[:n], ref.test[:n], ref.train[:n], ref.soup[:n]
    p, p_soup, p_real = prdc(real, fake), prdc(real, soup), prdc(real, train)
    kids = [kid(real, other) for other in (fake, soup, train)]
    pixels, train_pixels, test_pixels = flat(x), flat(to_float(data.x)), flat(to_float(data.test_x))
    both = torch.cat([train_pixels, flat(to_float(data.x).flip(-1))])
    copies = memorisation(pixels, both, test_pixels, copies=2)
    real_x = to_float(data.test_x)

    def row(value, floor, ceiling, better, n=n):
        return dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    metrics = dict(
        val_loss=row(table[0].mean(), ref.zero.mean(), None, "lower", len(data.val_x)),
        val_loss_linear=row(ref.linear.mean(), ref.zero.mean(), None, "lower", len(data.val_x)),
        class_accuracy=row(accuracy, 1 / K, ref.accuracy, "higher", count),
        class_accuracy_gaussian=row(ref.soup_accuracy, 1 / K, ref.accuracy, "higher", len(ref.soup)),
        frechet=row(frechet(real, fake), frechet(real, soup), frechet(real, train), "lower"),
        kid=row(kids[0][0], kids[1][0], kids[2][0], "lower"),
        **{k: row(p[k], p_soup[k], p_real[k], "higher") for k in ("precision", "recall", "density", "coverage")},
        label_gain=row(gain.mean(), 0.0, None, "higher", len(data.val_x)),
        label_gain_min=row(gain[3:].min(), 0.0, None, "higher", len(data.val_x)),
        wrong_label_gap=row(wrong_gap.mean(), 0.0, None, "higher", len(data.val_x)),
        memorised=row(copies["memorised"], 1.0, 0.01, "lower", count),
        memorised_ratio=row(copies["ratio"], 1.0, None, "lower", count),
        authentic=row(copies["authentic"], 0.0, None, "higher", count),
        mann_whitney_z=row(copies["mann_whitney_z"], None, 0.0, "higher", count),
        sharpness=row(sharpness(x) / sharpness(real_x), sharpness(to_float(data.x[:1]) * 0), 1.0, "near 1", count),
        saturation=row(float((x.abs() > 0.95).float().mean()), None, float((real_x.abs() > 0.95).float().mean()),
                       "near ceiling", count))
    return metrics, SimpleNamespace(x=x, labels=labels, table=table, confusion=confusion.numpy(), features=features,
                                    train_pixels=train_pixels)


# ---------------------------------------------------------------- pictures
def recipe(w=None, steps=True):
    """One line for every title: how these pictures were drawn."""
    eta = f" eta {ETA:g}" if SOLVER == "ddim" else ""
    return (f"EMA, {SIZE} px" + (f", {SOLVER}{eta} {STEPS} steps" if steps else "")
            + f", w {GUIDANCE if w is None else w:g} for s/a in ({GUIDANCE_INTERVAL[0]:g}, {GUIDANCE_INTERVAL[1]:g}]")


def report(folder, model, data, judge, ref, epoch, count, log=None, board=None):
    """All metrics and diagnostics of one epoch: PNG for people, NPY for programs. Deterministic, and the global RNG is
    not used: a report changes nothing in training, and inference_full repeats it bit for bit. Returns the metrics."""
    metrics, arrays = evaluate(model, data, judge, ref, count)
    folder.mkdir(parents=True, exist_ok=True)
    common.save_metrics(None, folder, metrics)
    np.save(folder / "samples_u8.npy", ((arrays.x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())
    draw_grid(folder, model, data, judge, epoch, metrics)
    draw_collage(folder, model, data, epoch)
    draw_reconstructions(folder, model, data, epoch)
    draw_one_step(folder, model, data, epoch)
    draw_loss_by_t(folder, arrays.table, ref, epoch)
    draw_sweep(folder, model, data, judge, ref, epoch, max(10, count // 5))
    draw_neighbours(folder, arrays, data, epoch)
    draw_labels(folder, model, data, epoch)
    draw_features(folder, arrays, ref, epoch)
    draw_confusion(folder, arrays.confusion, data, metrics, epoch)
    draw_schedule(folder)
    if log is not None and log.exists():
        draw_curves(folder, common.read_log(log), ref, epoch)
    if board is not None:
        for name, m in metrics.items():
            board.add_scalar(f"eval/{name}", m["value"], epoch)
        board.add_image("grid", plt.imread(folder / "grid.png")[..., :3], epoch, dataformats="HWC")
        board.add_embedding(model.label.weight, metadata=[*data.names, "null"], global_step=epoch, tag="labels")
        board.flush()
    return metrics


def draw_grid(folder, model, data, judge, epoch, metrics, seeds=8):
    """Class x seed matrix: the same noises in every row, so what differs down a column is the label alone. Titles:
    asked -> what the judge sees, and how sure it is. The last row has no label."""
    K, device = len(data.names), data.x.device
    labels = torch.arange(K + 1, device=device).repeat_interleave(seeds)
    x = sample(model, labels, [seed_of(SEED, "grid", i) for i in range(seeds)] * (K + 1))
    features, probabilities = judged(judge, x)
    best = probabilities.max(1)
    titles = [f"{data.names[k]} {p:.2f}" for p, k in zip(best.values.tolist(), best.indices.tolist())]
    by_label = features.view(K + 1, seeds, -1)[:K]
    ratio = float(by_label.var(0, correction=0).sum() / by_label.var(1, correction=0).sum().clamp(min=1e-12) / seeds * K)
    figure = tile(to_picture(x).reshape(K + 1, seeds, *x.shape[2:], 3), rows=[*data.names, "no label"],
                  titles=np.array(titles).reshape(K + 1, seeds), columns=[f"seed {i}" for i in range(seeds)],
                  title=f"epoch {epoch}: {recipe()}; class accuracy {metrics['class_accuracy']['value']:.2f}"
                        f" (real {metrics['class_accuracy']['ceiling']:.2f}); label/seed variance {ratio:.2f}")
    save_artifact(folder, "grid", x.cpu(), figure)


def draw_collage(folder, model, data, epoch, columns=10):
    """Denoising: a class a row, time runs from noise to data; upper lines x_t, lower lines the one-step guess x_0_hat."""
    K = len(data.names)
    labels = torch.arange(K, device=data.x.device)
    _, path = sample(model, labels, [seed_of(SEED, "collage", i) for i in range(K)], trajectory=True)
    chosen = [path[round(i * (len(path) - 1) / (columns - 1))] for i in range(columns)]
    stack = torch.stack([torch.stack([x_t, x_0]) for _, x_t, x_0 in chosen], dim=2)  # (2, K, columns, C, H, W)
    rows = stack.transpose(0, 1).flatten(0, 1)  # x_t and x_0_hat of a class below each other
    figure = tile(to_picture(rows / rows.abs().amax((-1, -2, -3), keepdim=True).clamp(min=1)), cell=0.7,
                  rows=[n for name in data.names for n in (f"{name}  x_t", "x_0_hat")],
                  columns=[f"t={t:.2f}" for t, _, _ in chosen], title=f"epoch {epoch}: denoising, {recipe()}")
    save_artifact(folder, "collage", stack.cpu(), figure)


def draw_reconstructions(folder, model, data, epoch, count=8, t_one=0.8, sweep=(0.2, 0.4, 0.6, 0.8, 0.9, 1.0)):
    """Noise a held-out picture to t, then denoise it. recon: at one t, with the one-step guess. recon_sweep: over t;
    at t = 1 nothing of the original is left, so that column is plain generation."""
    x_0, y = to_float(data.val_x[:count]), data.val_y[:count]
    seeds = [seed_of(SEED, "recon", i) for i in range(len(y))]
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]).to(x_0.device)
    results = {}
    for t in sorted({*sweep, t_one}):
        a, s = (float(c) for c in schedule(t))
        x_t = a * x_0 + s * eps
        out, path = sample(model, y, seeds, start=(x_t, t), trajectory=True)
        results[t] = (a, x_t, path[0][2], out)

    def correlation(x):
        pair = [z.flatten(1) - z.flatten(1).mean(1, keepdim=True) for z in (x_0, x)]
        return F.cosine_similarity(*pair, dim=1)

    a, x_t, guess, out = results[t_one]
    rows = torch.stack([x_0, x_t / x_t.abs().amax((1, 2, 3), keepdim=True), guess, out])
    titles = [[data.names[k] for k in y.tolist()], [""] * len(y)] + [
        [f"{p:.1f} dB r {c:.2f}" for p, c in zip(psnr(x, x_0, 2.0).tolist(), correlation(x).tolist())] for x in (guess, out)]
    save_artifact(folder, "recon", rows.cpu(), tile(
        to_picture(rows), titles=titles, rows=["original", f"x_t, t={t_one}", "one step", "sampled"],
        title=f"epoch {epoch}: reconstruction from t = {t_one}, a = {a:.3f}; {recipe()}"))
    rows = torch.stack([x_0] + [results[t][3] for t in sweep], dim=1)
    names = ["original"] + [f"t={t:g} r {correlation(results[t][3]).mean():.2f}" if t < 1 else "t=1: generation" for t in sweep]
    save_artifact(folder, "recon_sweep", rows.cpu(), tile(
        to_picture(rows), rows=[data.names[k] for k in y.tolist()], columns=names,
        title=f"epoch {epoch}: noised to t and sampled back; mean correlation r; {recipe()}"))


def draw_one_step(folder, model, data, epoch):
    """x_0_hat at t = 1 with each label beside the mean picture of that class, which is the right answer there: the
    quickest check that high noise is trained and labels are used."""
    K, device = len(data.names), data.x.device
    noise = torch.randn(3, *data.x.shape[2:], generator=torch.Generator().manual_seed(seed_of(SEED, "one step")))
    x = noise.to(device).expand(K, -1, -1, -1)
    with torch.no_grad():
        guess = guided_x_0(model, x, 1.0, torch.arange(K, device=device), torch.ones(K, device=device))
    mean = torch.stack([to_float(data.x[data.y == k]).mean(0) if bool((data.y == k).any()) else x[0] * 0 for k in range(K)])
    r = F.cosine_similarity(guess.flatten(1) - guess.mean(), mean.flatten(1) - mean.mean(), dim=1)
    rows = torch.stack([guess, mean])
    save_artifact(folder, "onestep", rows.cpu(), tile(
        to_picture(rows), rows=["x_0_hat at t=1", "class mean"], columns=[f"{n} r {c:.2f}" for n, c in zip(data.names, r.tolist())],
        title=f"epoch {epoch}: one step from pure noise beside the class mean picture, no guidance"))


def draw_loss_by_t(folder, table, ref, epoch):
    """Held-out loss in ten buckets of t beside the zero and the best linear predictor, and what a label is worth."""
    middle = (np.arange(10) + 0.5) / 10
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(middle, ref.zero, ":", color="gray", label=f"zero predictor {ref.zero.mean():.3f}")
    left.plot(middle, ref.linear, "--", color="tab:orange", label=f"best linear predictor {ref.linear.mean():.3f}")
    left.plot(middle, table[0], "o-", label=f"model {table[0].mean():.4f}")
    left.set(yscale="log", xlabel="t (0 data, 1 noise)", ylabel="held-out v-loss", title=f"epoch {epoch}: loss by t")
    right.axhline(0, color="gray", lw=0.8)
    right.plot(middle, table[1] - table[0], "o-", label="L(no label) - L(label)")
    right.plot(middle, table[2] - table[0], "s-", label="L(wrong label) - L(label)")
    right.set(xlabel="t", title="label gain: above 0 the label is used", yscale="symlog")
    right.set_yscale("symlog", linthresh=1e-3)
    left.legend(fontsize=8), right.legend(fontsize=8), figure.tight_layout()
    save_artifact(folder, "loss_by_t", np.concatenate([table, ref.zero[None], ref.linear[None]]), figure)


def draw_sweep(folder, model, data, judge, ref, epoch, count):
    """Guidance against quality: accuracy and precision keep rising with w while recall falls and colours saturate."""
    K, rows, pictures = len(data.names), [], []
    labels = torch.arange(count, device=data.x.device) % K
    seeds = [seed_of(SEED, "sweep", i) for i in range(count)]
    n = min(count, len(ref.test))
    for w in SWEEP:
        x = sample(model, labels, seeds, w=w)
        features, probabilities = judged(judge, x)
        p = prdc(ref.test[:n], features[:n])
        rows.append([w, float((probabilities.argmax(1) == labels).float().mean()), frechet(ref.test, features),
                     p["precision"], p["recall"], float((x.abs() > 0.95).float().mean()), sharpness(x)])
        pictures.append(x[:min(K, count)])
    rows = np.array(rows)
    real = to_float(data.test_x)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    axes[0].plot(rows[:, 0], rows[:, 1], "o-", label="class accuracy")
    axes[0].plot(rows[:, 0], rows[:, 3], "s-", label="precision")
    axes[0].plot(rows[:, 0], rows[:, 4], "^-", label="recall")
    axes[0].axhline(ref.accuracy, ls=":", color="gray", label="accuracy on real")
    axes[1].plot(rows[:, 0], rows[:, 2], "o-", label=f"Frechet, {count} samples")
    axes[1].axhline(frechet(ref.test, ref.train[:count]), ls=":", color="gray", label=f"{count} real training pictures")
    axes[1].axhline(frechet(ref.test, ref.soup[:count]), ls="--", color="tab:orange", label="a Gaussian per class")
    axes[2].plot(rows[:, 0], rows[:, 5], "o-", label="share of |x| > 0.95")
    axes[2].axhline(float((real.abs() > 0.95).float().mean()), ls=":", color="gray", label="real")
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
    """The samples most like a training picture (flips count) beside their nearest ones: copying would show here."""
    both = torch.cat([arrays.train_pixels, flat(to_float(data.x).flip(-1))])
    distance, index = nearest(flat(arrays.x), both, k=k)
    order = distance[:, 0].argsort()[:count].to(index.device)
    pictures = torch.cat([to_float(data.x), to_float(data.x).flip(-1)])[index[order].to(data.x.device)]  # (count, k, C, H, W)
    rows = torch.cat([arrays.x[order.to(arrays.x.device)][:, None], pictures], dim=1)
    titles = [[data.names[arrays.labels[i]]] + [f"{d:.3f}" for d in distance[i].tolist()] for i in order.tolist()]
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
            low, high = (beta, high) if -(p * np.log(p + 1e-300)).sum() > math.log(perplexity) else (low, beta)
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


def draw_labels(folder, model, data, epoch):
    """The label table: PCA and cosines, and the t-SNE of the lab notes, which of eleven points alone means little."""
    table = model.label.weight.detach().float().cpu().double().numpy()
    names = [*data.names, "null"]
    centred = table - table.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    flat_map, few = pca(table), min(3, (len(table) - 1) / 3)
    embedded = tsne(table, few)
    for ax, y, title in ((axes[0], flat_map, "PCA: read this one"),
                         (axes[1], embedded, f"t-SNE, perplexity {few:.2g}: {len(table)} points only, distances mean little")):
        ax.scatter(*y.T, c=np.arange(len(y)), cmap="tab20")
        for name, place in zip(names, y):
            ax.annotate(name, place, fontsize=8, xytext=(3, 3), textcoords="offset points")
        ax.set_title(title, fontsize=9), ax.set_xticks([]), ax.set_yticks([])
    shown = axes[2].imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
    axes[2].set_xticks(range(len(names)), names, rotation=90, fontsize=7), axes[2].set_yticks(range(len(names)), names, fontsize=7)
    axes[2].set_title("cosines of the centred rows", fontsize=9), figure.colorbar(shown, ax=axes[2], shrink=0.8)
    figure.suptitle(f"epoch {epoch}: label embeddings", fontsize=10), figure.tight_layout()
    save_artifact(folder, "labels", np.stack([flat_map, embedded]), figure)


def draw_features(folder, arrays, ref, epoch, count=300):
    """t-SNE of judge features, real beside generated: islands of one kind are missing or invented modes."""
    n = min(count, len(arrays.features), len(ref.test))
    if n < 20:
        return
    y = tsne(torch.cat([ref.test[:n], arrays.features[:n]]).double().cpu().numpy(), perplexity=min(30, n / 4), steps=300)
    figure, ax = plt.subplots(figsize=(5.5, 5))
    ax.scatter(*y[:n].T, s=8, color="gray", label="held-out real")
    ax.scatter(*y[n:].T, s=8, c=arrays.labels[:n].cpu(), cmap="tab10", label="generated, by label")
    ax.set_title(f"epoch {epoch}: t-SNE of judge features, perplexity {min(30, n / 4):.0f}", fontsize=9), ax.legend(fontsize=8)
    ax.set_xticks([]), ax.set_yticks([]), figure.tight_layout()
    save_artifact(folder, "features", y, figure)


def draw_confusion(folder, confusion, data, metrics, epoch):
    """Asked class against the judge's verdict."""
    figure, ax = plt.subplots(figsize=(5.2, 4.6))
    ax.imshow(confusion / confusion.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for i, line in enumerate(confusion):
        for j, n in enumerate(line):
            if n:
                ax.text(j, i, n, ha="center", va="center", fontsize=7, color="white" if n > confusion[i].sum() / 2 else "black")
    ax.set_xticks(range(len(data.names)), data.names, rotation=90, fontsize=8), ax.set_yticks(range(len(data.names)), data.names, fontsize=8)
    ax.set(xlabel="judged as", ylabel="asked for")
    ax.set_title(f"epoch {epoch}: accuracy {metrics['class_accuracy']['value']:.3f}, on real {metrics['class_accuracy']['ceiling']:.3f}", fontsize=9)
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
    ax.set(xlabel="t", title=f"{SCHEDULE} schedule, shift {SHIFT:g}"), ax.legend(fontsize=7), figure.tight_layout()
    save_artifact(folder, "schedule", np.stack([t, a, s]), figure)


def draw_curves(folder, log, ref, epoch):
    """Loss beside its trivial predictors, learning rate and gradient norm over the optimizer steps."""
    if not log:
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2))
    step, loss = log["step"], log["loss"]
    width = max(1, len(loss) // 100)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    left.plot(step, loss, color="lightgray", lw=0.5), left.plot(step[width - 1:], smooth, label=f"train, mean of {width}")
    left.axhline(ref.zero.mean(), ls=":", color="gray", label="zero predictor")
    left.axhline(ref.linear.mean(), ls="--", color="tab:orange", label="best linear predictor")
    left.set(yscale="log", xlabel="step", ylabel="v-loss", title=f"epoch {epoch}"), left.legend(fontsize=7)
    middle.plot(step, log["lr"]), middle.set(xlabel="step", title="learning rate")
    right.plot(step, log["grad_norm"], lw=0.5), right.set(xlabel="step", yscale="log", title="gradient norm before clipping")
    figure.tight_layout()
    save_artifact(folder, "curves", np.stack([step, loss, log["lr"], log["grad_norm"]]), figure)


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    factor = PATCH * 2 ** (len(MULTS) - 1)
    if SIZE % factor:
        fail(f"SIZE={SIZE} does not divide by {factor} (PATCH={PATCH} times 2 for each of the {len(MULTS) - 1} halvings of MULTS)")
    if len(ATTENTION) != len(MULTS):
        fail(f"ATTENTION={ATTENTION} needs one True or False for each of the {len(MULTS)} levels of MULTS={MULTS}")
    if any(WIDTH * m % 8 for m in MULTS):
        fail(f"WIDTH={WIDTH} times every one of MULTS={MULTS} must be divisible by 8, the groups of the norms")
    if BATCH_SIZE % world:
        fail(f"BATCH_SIZE={BATCH_SIZE} does not divide over {world} processes")
    for name, value, choices in (("SCHEDULE", SCHEDULE, ("cosine", "linear")), ("SOLVER", SOLVER, ("dpm++", "ddim", "heun")),
                                 ("CLIP_X0", CLIP_X0, ("clip", "dynamic", "none")), ("PRECISION", PRECISION, ("auto", "bf16", "fp32"))):
        if value not in choices:
            fail(f"{name}={value!r}: one of {', '.join(choices)}")
    for name, value in (("EPOCHS", EPOCHS), ("BATCH_SIZE", BATCH_SIZE), ("ACCUM", ACCUM), ("STEPS", STEPS), ("EVAL_EVERY", EVAL_EVERY),
                        ("SAMPLES", SAMPLES - 9), ("BLOCKS", BLOCKS), ("WIDTH", WIDTH), ("LR", LR), ("PATCH", PATCH)):
        if not value > 0:
            fail(f"{name} is too small" + (": at least 10" if name == "SAMPLES" else f", got {value}"))


def prepare(folder, device, rank=0, world=1):
    """Data, judge, reference rows: what training and inference_full both need. Data mistakes end here, in one line."""
    try:
        if rank == 0:
            data_folder()
        if world > 1:
            torch.distributed.barrier()
        data = load_data(data_folder(), device)
    except (ValueError, OSError) as error:
        fail(error)
    if rank > 0:
        return data, None, None
    cache = Path(OUT) / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    judge = train_judge(data, cache, device)
    return data, judge, reference(data, judge)


def inference_full(checkpoint, folder):
    """Redraw every metric and diagnostic of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: as common.load_checkpoint returns it, with its settings already put back (sample.py --full)."""
    device = common.pick_device()
    data, judge, ref = prepare(folder, device)
    model = build_ema(checkpoint, device)
    step = checkpoint["step"]
    log = folder.parent / "log.csv"
    return report(folder, model, data, judge, ref, step // steps_per_epoch(data), samples_at(step, data),
                  log=log if log.exists() else None)


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` pictures for each class named in prompt (commas; empty: all, and one row without a label).
    samples.png to look at, samples.npy floats (N, 3, H, W) in [-1, 1], samples.npz uint8 (N, H, W, 3) for evaluators."""
    check_settings()
    names = list(checkpoint["names"])
    asked = [word.strip() for word in prompt.split(",") if word.strip()] or [*names, "no label"]
    unknown = [word for word in asked if word not in (*names, "no label")]
    if unknown:
        fail(f"unknown class {unknown[0]!r}: one of {', '.join(names)} or 'no label'")
    device = common.pick_device()
    model = build_ema(checkpoint, device)
    labels = torch.tensor([names.index(word) if word in names else len(names) for word in asked], device=device)
    x = sample(model, labels.repeat_interleave(count), [seed_of(seed, "grid", i) for i in range(count)] * len(asked))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "samples.npz", (to_picture(x) * 255).round().astype(np.uint8))
    save_artifact(folder, "samples", x.cpu(), tile(to_picture(x).reshape(len(asked), count, *x.shape[2:], 3), rows=asked,
                                                  columns=[f"seed {i}" for i in range(count)], title=recipe()))


def steps_per_epoch(data):
    return max(1, len(data.x) // (BATCH_SIZE * ACCUM))


def samples_at(step, data):
    return SAMPLES if step >= EPOCHS * steps_per_epoch(data) else max(10, SAMPLES // 5)


def build_ema(checkpoint, device):
    """The averaged model of a checkpoint, ready to sample."""
    model = build_model(checkpoint["classes"]).to(device).eval().requires_grad_(False)
    model.null = checkpoint["classes"]
    common.load_strictly(model, checkpoint["ema"], "the checkpoint's EMA")
    return model


def main():
    check_settings(int(common.os.environ.get("WORLD_SIZE", 1)))
    run = start(__file__, globals(), free=("EPOCHS", "EVAL_EVERY", "KEEP_EVERY", "SAVE_SECONDS", "TENSORBOARD"))
    data, judge, ref = prepare(run.folder, run.device, run.rank, run.world)
    torch.manual_seed(SEED)
    model = build_model(len(data.names)).to(run.device)
    if INIT_FROM:
        common.load_strictly(model, common.load_checkpoint(INIT_FROM, run.device)["ema"], f"INIT_FROM={INIT_FROM}")
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema.null = len(data.names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True)
    guard, step, reported, best, seconds = Guard(), 0, -1, math.inf, 0.0

    def state():
        return dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), guard=dict(vars(guard)),
                    step=step, reported=reported, best=best, seconds=seconds, classes=len(data.names), names=tuple(data.names),
                    data=data.hash)

    def restore(saved):
        common.load_strictly(model, saved["model"], "last.pt")
        common.load_strictly(ema, saved["ema"], "last.pt (EMA)")
        optimizer.load_state_dict(saved["optimizer"])
        vars(guard).update(saved["guard"])
        return saved["step"], saved["reported"], saved["best"], saved["seconds"]

    per_epoch = steps_per_epoch(data)
    total = EPOCHS * per_epoch
    if run.checkpoint is not None:
        if run.checkpoint["data"] != data.hash:
            fail(f"{run.folder} was trained on other data than {DATA!r} holds now; RESUME=False or another OUT")
        step, reported, best, seconds = restore(run.checkpoint)
        print(f"continuing after step {step} of {total}" + (
            f"; learning rate now {lr_at(step, total, LR, WARMUP):.2g}, was {optimizer.param_groups[0]['lr']:.2g}" if step < total else ""))
    handle = torch.compile(model) if COMPILE else model  # a second handle: the state_dict keeps its names
    if run.world > 1:
        handle = nn.parallel.DistributedDataParallel(handle)
    log, board = run.folder / "log.csv", None
    if run.rank == 0:
        common.open_log(log, step)
        board = common.open_tensorboard(run.folder) if TENSORBOARD else None
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{len(data.x)} training pictures of {len(data.names)} classes, {parameters:,} parameters, {per_epoch} steps an epoch; "
              f"trivial losses: zero {ref.zero.mean():.3f}, best linear {ref.linear.mean():.3f}; judge on real {ref.accuracy:.3f}")
        with run.evaluation():  # once, small, before hours are spent: a broken evaluation shows now
            evaluate(ema, data, judge, ref, 10)
        common.save_checkpoint(run.folder / "last.pt", run, **state())
    bar = tqdm(total=total, initial=step, disable=True if run.rank else None, dynamic_ncols=True, smoothing=0.05)
    saved_at, epoch_losses, clock = time.time(), [], time.time()

    while not run.stopping():
        epoch = step // per_epoch
        if step % per_epoch == 0 and step > reported and step > 0 and (epoch % EVAL_EVERY == 0 or step == total):
            if run.rank == 0:
                common.save_checkpoint(run.folder / "last.pt", run, **state())
                seconds += time.time() - clock
                with run.evaluation():
                    folder = run.folder / f"epoch_{epoch:04d}"
                    metrics = report(folder, ema, data, judge, ref, epoch, samples_at(step, data), log, board)
                    tqdm.write(f"epoch {epoch}: " + ", ".join(
                        f"{k} {metrics[k]['value']:.3f}" + (f" (floor {metrics[k]['floor']:.3f}, real {metrics[k]['ceiling']:.3f})"
                                                           if metrics[k]["ceiling"] is not None else f" (floor {metrics[k]['floor']:.3f})")
                        for k in ("val_loss", "class_accuracy", "frechet", "recall", "label_gain", "memorised")))
                    common.save_metrics(run, folder, metrics, seconds=round(seconds, 1), parameters=parameters)
                    reported = step
                    if metrics["val_loss"]["value"] < best:
                        best = metrics["val_loss"]["value"]
                        common.save_checkpoint(run.folder / "best.pt", run, **state())
                    if KEEP_EVERY and epoch % KEEP_EVERY == 0:
                        common.save_checkpoint(run.folder / f"epoch_{epoch:04d}.pt", run, **state())
                    common.save_checkpoint(run.folder / "last.pt", run, **state())
                clock = saved_at = time.time()
            else:
                reported = step
            continue
        if step == total:
            break

        x_0, labels, t, eps = (part.chunk(ACCUM) for part in draw_batch(data, step, guard.rollbacks))
        torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
        model.train()
        lr = lr_at(step, total, LR, WARMUP) * guard.lr_scale
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = 0.0
        for micro in zip(x_0, labels, t, eps):
            micro = [part.chunk(run.world)[run.rank] for part in micro]  # each process takes its share
            with autocast(run.device):
                loss = loss_fn(handle, *micro).mean()
            (loss / ACCUM).backward()
            loss_sum += loss.detach()
        if run.world > 1:
            torch.distributed.all_reduce(loss_sum)
        loss = float(loss_sum) / ACCUM / run.world
        norm, taken = guarded_step(optimizer, list(model.parameters()), guard, loss, CLIP)
        if taken:
            ema_update(ema, model, EMA_DECAY, step)
        step += 1

        if guard.lost:  # back to the last good state with half the learning rate and another window of data
            if guard.rollbacks >= 5:
                fail(f"the loss diverged for the sixth time at step {step}; lower LR={LR:g} and look at log.csv")
            broken, good = copy.copy(guard), common.load_checkpoint(run.folder / "last.pt", run.device)
            step, reported, best, _ = restore(good)
            guard.after_rollback(broken)
            tqdm.write(f"diverged: back to step {step}, learning rate x {guard.lr_scale:g}")
            bar.n = step
            continue
        epoch_losses.append(loss)
        if run.rank == 0:
            now = time.time()
            elapsed = seconds + now - clock
            common.log_row(log, step=step, epoch=(step - 1) // per_epoch, loss=loss, lr=lr, grad_norm=norm, skipped=guard.skipped,
                           samples_per_s=round(step * BATCH_SIZE * ACCUM / max(elapsed, 1e-9), 1), seconds=round(elapsed, 2))
            if board is not None:
                board.add_scalar("train/loss", loss, step), board.add_scalar("train/lr", lr, step)
            bar.update(1)
            bar.set_postfix(loss=f"{np.mean(epoch_losses[-50:]):.4f}", lr=f"{lr:.1e}", refresh=False)
            if step % per_epoch == 0:
                mean = np.mean(epoch_losses)
                tqdm.write(f"epoch {step // per_epoch - 1:4d}  loss {mean:.4f} (zero {ref.zero.mean():.3f}, linear {ref.linear.mean():.3f})  lr {lr:.2e}"
                           f"  grad {guard.average:.2f}  skipped {guard.skipped}  {elapsed:.0f} s"
                           + ("  ALARM: no better than predicting zero" if step > 200 and mean > 0.9 * ref.zero.mean() else ""))
                epoch_losses = []
            if now - saved_at > SAVE_SECONDS and guard.healthy:
                seconds, clock = elapsed, now
                common.save_checkpoint(run.folder / "last.pt", run, **state())
                saved_at = time.time()

    bar.close()
    if run.signal:
        if run.rank == 0:
            seconds += time.time() - clock
            common.save_checkpoint(run.folder / "last.pt", run, **state())
            print(f"stopped by signal {run.signal} after step {step}; start again to continue", flush=True)
        sys.exit(128 + run.signal)


if __name__ == "__main__":
    override(globals())
    main()
