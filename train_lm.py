"""
A language model grown in stages, in one file: a small causal transformer that cannot see the future.

    L    = -mean log p(token_{i+1} | token_1..i)           bits per byte = sum of nats / (ln 2 * bytes)
    S_i  = W_sem [sigmoid(gate[tok_i, n]) rms(E[tok_i, n])]_n        stage 0, MU: 16 blocks a token
    S_i += W_tmp (E_t[tok_i] + W_phi phi(how often, how long ago tok_i was seen))     stage 1, TEMPORAL
    lr_g = lr (1 + r (m_g - 1)),  m_g ~ (credit_g / share of parameters)^K1_ALPHA     stage 2, K-1
    attention of half the heads along typed edges only, + beta[head, type]           stage 3, graph routing
    x <- x + W_o attention(rms(x));  x <- x + W_down relu(W_up rms(x))^2;  logits = 15 tanh(W rms(x) / 15)

Every stage starts as exactly the function of the stage below (logits unchanged at the switch) and is compared
with a plain transformer of as many parameters: the control. No perplexity is reported before a leak check.

    python train_lm.py                                  # control, stages 0 to 3: 11 min, 1.83 bits/byte
    python train_lm.py --stage 0 --epochs 3 --batch-size 16 --max-steps 1000       # the lab notes' command
    python train_lm.py DIAGNOSE=True                    # the pre-flight alone: 16 checks, about a minute
    python train_lm.py STAGE=1 DATA=my_texts/ TOKENIZER=byte CONTEXT=256
    python -m data.text prepare shakespeare; python train_lm.py EXPERIMENT=shakespeare STAGE=0
    python sample.py --checkpoint runs/lm_stage3/last.pt --prompt "The with statement"

Letters: B batch, T positions, V vocabulary, H heads, N = 16 blocks; ids (B, T) token numbers.
Not here: fused kernels, mixture of experts, fine-tuning on instructions, data that do not fit a disk.
Sources: Su 2021 (RoPE), Henry 2020 (QK-norm), So 2021 (relu^2), Zhou 2024 (value residual), Jordan 2024
(Muon), Gemma 2 2024 (soft cap). MU, TEMPORAL, K-1 and the graph are the lab notes' own, made causal.
"""

import codecs
import contextlib
import copy
import json
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
from einops import rearrange
from tqdm import tqdm

import common
from common import (Guard, Muon, Optimizers, autocast, ema_update, fail, generator_of, guarded_step, override,
                    save_artifact, seed_of, start)
from data import text
from model_dit import MLP, Attention, KVCache, attend, causal_mask, rms, rotation

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
STAGE = "ladder"     # 0 MU, 1 +TEMPORAL, 2 +K-1, 3 +graph; control: a plain one; ladder: control, 0, 1, 2, 3
INIT_FROM = "below"  # stages 1 to 3 grow from the stage below in OUT; or a checkpoint; or "scratch"
DATA = "pydoc"       # the Python installation's documentation; a text file or folder; shakespeare, wikitext2
TOKENIZER = "bpe"    # byte, bpe (learned here), gpt2 (needs MERGES)
VOCAB = 1024         # of bpe: 256 bytes, merges, end of text
MERGES = ""          # TOKENIZER=gpt2: where GPT-2's vocab.bpe lies; empty: OUT/cache/vocab.bpe
EPOCHS = 1           # of each stage; the ladder's control gets the epochs of all four. 0: MAX_STEPS alone
MAX_STEPS = 0        # optimizer steps in total; 0 = EPOCHS alone
BATCH_SIZE = 16      # windows in a forward pass, over all processes
ACCUM = 1            # forward passes in an optimizer step
CONTEXT = 128        # T, tokens in a window
DIM = 192            # width; 384 to 768 on a GPU
DEPTH = 4            # blocks
HEADS = 6            # stage 3 routes the first half of them
MLP_RATIO = 3        # hidden width of the MLP in units of DIM; 4 is usual
DROPOUT = 0.0        # on embeddings and branches; 0.2 and more when the corpus is seen more than four times
MU_MODE = "blocks"   # "blocks": 16 gated blocks a token; "plain": one vector ("simple MU first")
MU_DIM = 192         # all 16 blocks together
MU_GRAM = 0.0        # weight of |Gram - I|^2 of the blocks, 0.01 to push them apart
TAU = 32             # width of TEMPORAL's table, 128 in the lab notes
K1_ALPHA = 0.5       # how far credit moves learning rates; 0 = not at all
K1_KAPPA = 1.0       # temperature of the credit tree; towards 0 all credit goes down one path
K1_DELAY = 100       # steps before K-1 acts, and again until it acts fully
K1_EVERY = 5         # steps between looks at the gradients
GRAPH_WINDOW = 8     # edges to the last so many positions
GRAPH_K = 8          # semantic and successor edges a position
GRAPH_MIN = 0.05     # cosine a semantic edge needs
GRAPH_RAMP = 0.3     # share of the steps in which non-edges fade; then they are gone
MATCH = 3            # the control has as many parameters as this stage
LR = 0.02            # of Muon; embeddings 1, head 0.4, scalars 0.5 times this (AdamW). OPT=adamw: 3e-3
OPT = "muon"         # or "adamw" for the matrices too
WEIGHT_DECAY = 0.01  # of the matrices
WARMUP = 50          # optimizer steps
COOLDOWN = 0.6       # last share of the steps, in which the rate falls linearly to 0
CLIP = 1e9           # gradient norm; off with Muon, 1.0 with adamw
EMA_DECAY = 0.0      # of the weights evaluated; 0 = the last ones, which the falling rate averages already
POSITIONS = "rope"   # or "learned"
NORM = "rms"         # or "layer"
ACTIVATION = "relu2"  # or "gelu", "swiglu"
QK_NORM = True       # queries and keys of length one
VALUE_RESIDUAL = True  # every layer mixes in the values of the first
ZERO_INIT = True     # last matrices start at zero, so the first loss is exactly ln V
SOFT_CAP = 15.0      # of the logits; 0 = off
TEMPERATURE = 0.8    # 0 = the most likely token; higher when samples repeat themselves
TOP_K = 0            # draw among the k likeliest tokens; 0 = off
TOP_P = 1.0          # ... or the likeliest that hold this share
MIN_P = 0.1          # ... or those at least this likely, relative to the likeliest
REP_PENALTY = 1.0    # of the last 64 tokens' logits, 1.3 against loops; 1 = off
LENGTH = 100         # tokens a sample has at most
SAMPLES = 16         # texts for the quality card
PROMPTS = ("The capital of India is", "The with statement", "Return True if")  # of samples.txt
EVAL_EVERY = 1       # epochs between reports (numbers, samples and pictures in epoch_NNNN/)
PATIENCE = 0         # stop after so many reports without a better validation loss; 0 = never
SAVE_SECONDS = 60.0  # between saves of last.pt
PREFLIGHT = True     # the fast checks before every training
DIAGNOSE = False     # all checks, and no training
OVERRULE = False     # train although a check failed
CONVERT = 0.0        # print what a loss in nats a token means in bits per byte and perplexities, and stop
PRECISION = "auto"   # "bf16", "fp32"; auto = bf16 where the hardware multiplies it
COMPILE = False      # torch.compile: worth it for runs of an hour and more
TENSORBOARD = False  # needs the optional package tensorboard
EXPERIMENT = ""      # a row of EXPERIMENTS
SEED = 0
OUT = "runs"         # the runs go to OUT/lm_control, OUT/lm_stage0, ...
RESUME = True        # continue a run when its settings agree; False moves it aside

EXPERIMENTS = {
    # the sizes nanoGPT uses for Shakespeare's characters, on a CPU and on a GPU
    "nanogpt_cpu": dict(STAGE="0", DATA="shakespeare", TOKENIZER="byte", DIM=128, MU_DIM=128, DEPTH=4,
                        HEADS=4, MLP_RATIO=4, CONTEXT=64, BATCH_SIZE=12, EPOCHS=0, MAX_STEPS=2000),
    "shakespeare": dict(STAGE="0", DATA="shakespeare", TOKENIZER="byte", DIM=384, MU_DIM=384, DEPTH=6,
                        HEADS=6, MLP_RATIO=4, CONTEXT=256, BATCH_SIZE=64, EPOCHS=0, MAX_STEPS=5000,
                        DROPOUT=0.2, WEIGHT_DECAY=0.1),
    "wikitext2": dict(STAGE="0", DATA="wikitext2", VOCAB=8192, DIM=512, MU_DIM=512, DEPTH=8, HEADS=8,
                      MLP_RATIO=4, CONTEXT=512, BATCH_SIZE=32, EPOCHS=20, DROPOUT=0.3, WEIGHT_DECAY=0.4),
    # the shapes of the lab notes, in causal form, with GPT-2's tokens
    "seed_current": dict(STAGE="0", DATA="wikitext2", TOKENIZER="gpt2", DIM=256, MU_DIM=64, DEPTH=6, HEADS=4,
                         MLP_RATIO=4, CONTEXT=256, TAU=32),
    "seed_fixed": dict(STAGE="0", DATA="wikitext2", TOKENIZER="gpt2", DIM=1024, MU_DIM=512, DEPTH=6, HEADS=8,
                       MLP_RATIO=4, CONTEXT=256, TAU=128, MU_MODE="plain"),
}  # the command line wins over a row


# ---------------------------------------------------------------- data
def load_data(cache):
    """The corpus, its tokenizer and its tokens: arrays train, val, test."""
    try:
        corpus = text.load(DATA, cache)
        tokenizer = text.tokenizer(TOKENIZER, VOCAB, corpus.train, cache, MERGES or None)
        tokens = text.tokens(corpus, tokenizer, cache)
    except (ValueError, OSError) as error:
        fail(error)
    data = SimpleNamespace(corpus=corpus, tokenizer=tokenizer, **tokens, V=tokenizer.V, hash=corpus.sha)
    for split in ("train", "val"):
        if len(tokens[split]) < 2 * CONTEXT + 2:
            fail(f"DATA={DATA}: the {split} split has {len(tokens[split])} tokens, CONTEXT={CONTEXT} needs "
                 f"{2 * CONTEXT + 2}; give more text or a smaller CONTEXT")
    return data


def first_windows(data, device, count=2):
    """The first windows of the validation split, ids (count, CONTEXT): what checks and pictures look at."""
    some = np.asarray(data.val[:count * CONTEXT]).astype(np.int64)
    return torch.from_numpy(some).view(count, CONTEXT).to(device)


def windows_per_epoch(data):
    """One window less than fit, so that the windows of an epoch can start anywhere in the first one."""
    return (len(data.train) - 1) // CONTEXT - 1


def steps_per_epoch(data):
    return max(1, windows_per_epoch(data) // (BATCH_SIZE * ACCUM))


def total_steps(data):
    return min(EPOCHS * steps_per_epoch(data) or math.inf, MAX_STEPS or math.inf)


def draw_batch(data, step, attempt=0):
    """The windows of optimizer step `step`: ids (BATCH_SIZE ACCUM, CONTEXT + 1). A function of (SEED, step,
    attempt) alone, so a resumed run repeats an unbroken one. Every epoch cuts the text at another place and
    shuffles its windows anew; attempt counts rollbacks: another order."""
    n, total, starts = BATCH_SIZE * ACCUM, windows_per_epoch(data), []
    place = step * n
    while len(starts) < n:
        g = generator_of(SEED, "order", place // total + 10**9 * attempt)
        offset = int(torch.randint(CONTEXT, (), generator=g))
        order = torch.randperm(total, generator=g)[place % total:][:n - len(starts)]
        starts += (offset + CONTEXT * order).tolist()
        place = step * n + len(starts)
    return torch.from_numpy(np.stack([data.train[i:i + CONTEXT + 1] for i in starts]).astype(np.int64))


# ---------------------------------------------------------------- model
class RMS(nn.Module):
    def forward(self, x):
        return rms(x)


def build_norm():
    return nn.LayerNorm(DIM) if NORM == "layer" else RMS()


class MU(nn.Module):
    """Stage 0: a token is 16 blocks of MU_DIM/16 numbers, each normalised and gated, then joined by W_sem.
    The names the lab notes give the blocks are labels; nothing trains them to mean that."""
    names = "I S C1 C2 R1 R2 T K G M D F P E A X".split()

    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, MU_DIM)
        self.gate = nn.Embedding(vocabulary, 16) if MU_MODE == "blocks" else None
        self.join = nn.Linear(MU_DIM, DIM, bias=False)  # W_sem

    def blocks(self, ids):
        """ids (B, T) -> M (B, T, 16, MU_DIM/16)."""
        e = rearrange(self.table(ids), "b t (n k) -> b t n k", n=16)
        return e if self.gate is None else self.gate(ids).sigmoid()[..., None] * rms(e)

    def forward(self, ids):
        return self.join(rearrange(self.blocks(ids), "b t n k -> b t (n k)"))

    def key(self, ids):
        """What the graph compares: blocks I, R2, K (plain: everything), a unit vector (B, T, k), detached."""
        u = self.blocks(ids).detach()
        u = u if self.gate is None else u[:, :, [self.names.index(n) for n in ("I", "R2", "K")]]
        return F.normalize(u.flatten(2).float(), dim=-1)


def recency(ids, new):
    """phi (B, new, 8) of the last `new` positions of ids (B, T): for each token how often it occurred before
    in its own window and how long ago; from the past alone. Time2Vec-like waves of log2 of the distance."""
    i = torch.arange(ids.shape[1] - new, ids.shape[1], device=ids.device)
    j = torch.arange(ids.shape[1], device=ids.device)
    same = (ids[:, -new:, None] == ids[:, None]) & (j < i[:, None])  # (B, new, T)
    count = same.sum(-1)
    last = torch.where(same, j, -1).amax(-1)
    u = (count > 0).float()
    distance = u * torch.log2(1 + (i - last).float()) / 10
    wave = 2 * math.pi * distance
    place = (torch.log2(1 + i.float()) / 10).expand_as(u)
    waves = [u * wave.sin(), u * wave.cos(), u * (2 * wave).sin(), u * (2 * wave).cos()]
    return torch.stack([u, distance, *waves, torch.log2(1 + count.float()) / 10, place], -1)


class Temporal(nn.Module):
    """Stage 1: what a token means depends on when it was last seen. Table and W_phi start at zero, so the
    switch changes nothing; W_tmp does not, or two zero factors would never move."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, TAU)
        self.phi = nn.Linear(8, TAU, bias=False)
        self.join = nn.Linear(TAU, DIM, bias=False)  # W_tmp

    def forward(self, ids, new):
        return self.join(self.table(ids[:, -new:]) + self.phi(recency(ids, new)))


edge_types = ("none", "window", "fibonacci", "semantic", "successor")


def edges(u, new):
    """Stage 3: the types (B, new, T) uint8 of the edges of the last `new` positions i to all j <= i, from
    unit vectors u (B, T, k); first match wins. 1 the last GRAPH_WINDOW positions and itself; 2 Fibonacci
    distances; 3 the GRAPH_K most similar earlier positions; 4 what FOLLOWED the GRAPH_K most similar
    positions."""
    T = u.shape[1]
    back = torch.arange(T - new, T, device=u.device)[:, None] - torch.arange(T, device=u.device)
    # equal tokens have cosine 1: the nearest wins, the same one with and without a cache
    similar = u[:, -new:] @ u.transpose(1, 2) - 1e-4 * back

    def top(allowed):
        value, j = similar.masked_fill(~allowed, -math.inf).topk(min(GRAPH_K, T), dim=-1)
        return torch.zeros_like(similar, dtype=torch.bool).scatter(-1, j, value > GRAPH_MIN)

    fibonacci, a, b = torch.zeros_like(back, dtype=torch.bool), 13, 21
    while a < T:
        fibonacci |= back == a
        a, b = b, a + b
    window = (back >= 0) & (back <= GRAPH_WINDOW)
    semantic = top((back > GRAPH_WINDOW) & ~fibonacci)
    successor = F.pad(top(back > 0), (1, 0))[..., :-1]
    kind = torch.where(semantic, 3, torch.where(successor, 4, 0))
    return torch.where(window, 1, torch.where(fibonacci, 2, kind)).to(torch.uint8)


class Block(nn.Module):
    """x + attention, x + MLP. Later layers mix the first one's values into theirs (Zhou 2024)."""

    def __init__(self, hidden, first, routed):
        super().__init__()
        self.norm_1, self.norm_2 = build_norm(), build_norm()
        self.attn = Attention(DIM, HEADS, qk_norm=QK_NORM)
        self.mlp = MLP(DIM, hidden, ACTIVATION)
        self.mix = nn.Parameter(torch.tensor(0.5)) if VALUE_RESIDUAL and not first else None
        self.beta = nn.Parameter(torch.zeros(HEADS // 2, len(edge_types) - 1)) if routed else None
        self.drop = nn.Dropout(DROPOUT)

    def bias(self, mask, kinds, pressure):
        """What routed heads add to their scores, (B, H/2, Nq, Nk): beta[head, type] on an edge, - pressure
        elsewhere, and from pressure 30 on -inf. |q.k|/sqrt(d) is bounded by QK-norm, so that this last switch
        is invisible. mask (Nq, Nk) bool, kinds (B, Nq, Nk) edge types."""
        table = torch.cat([self.beta.new_full((len(self.beta), 1), -pressure), self.beta], 1)
        bias = (F.one_hot(kinds.long(), len(edge_types)).to(table) @ table.T).movedim(-1, 1)
        seen = mask & (kinds > 0)[:, None] if pressure >= 30 else mask
        return bias.masked_fill(~seen, -math.inf)

    def attention(self, q, k, v, mask, kinds, pressure):
        """(B, H, Nq, head_dim). With a graph the first half of the heads see its edges alone."""
        if kinds is None:
            return attend(q, k, v, mask)
        n = len(self.beta)
        bias = self.bias(mask, kinds, pressure).to(q.dtype)
        return torch.cat([attend(q[:, :n], k[:, :n], v[:, :n], bias),
                          attend(q[:, n:], k[:, n:], v[:, n:], mask)], 1)

    def forward(self, x, turn, mask, v_1=None, kinds=None, pressure=0.0, cache=None):
        """x (B, n, DIM), mask (n, T) bool. Returns x and the first layer's values."""
        q, k, v = self.attn.qkv(self.norm_1(x), turn)  # (B, H, n, head_dim)
        new = v if v_1 is None else v_1
        if self.mix is not None:
            v = torch.lerp(v_1, v, self.mix)
        if cache is not None:
            k, v = cache.append(k, v)
        x = x + self.drop(self.attn.merge(self.attention(q, k, v, mask, kinds, pressure)))
        return x + self.drop(self.mlp(self.norm_2(x))), new


class LM(nn.Module):
    """ids (B, T) -> logits (B, T, V). stage -1 is the control: no MU, and an MLP `hidden` wide."""

    def __init__(self, vocabulary, stage, hidden):
        super().__init__()
        self.stage, self.vocabulary = stage, vocabulary
        self.embed = MU(vocabulary) if stage >= 0 else nn.Embedding(vocabulary, DIM)
        self.temporal = Temporal(vocabulary) if stage >= 1 else None
        self.position = nn.Embedding(CONTEXT, DIM) if POSITIONS == "learned" else None
        self.norm_in, self.norm_out, self.drop = build_norm(), build_norm(), nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block(hidden, i == 0, stage >= 3) for i in range(DEPTH))
        self.head = nn.Linear(DIM, vocabulary, bias=False)
        self.register_buffer("pressure", torch.zeros(()))  # Lambda, on non-edges; the loop raises it
        self.init_weights()

    def init_weights(self):
        """Matrices 1/sqrt(inputs); head and last matrix of every branch zero: the first loss is ln V."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight)
        if ZERO_INIT:
            for w in (self.head, *(b.attn.out for b in self.blocks), *(b.mlp.down for b in self.blocks)):
                nn.init.zeros_(w.weight)
        if self.stage >= 0 and self.embed.gate is not None:
            nn.init.zeros_(self.embed.gate.weight)
        if self.temporal is not None:
            nn.init.zeros_(self.temporal.table.weight), nn.init.zeros_(self.temporal.phi.weight)

    def forward(self, ids, targets=None, memory=None):
        """Logits (B, T, V); or with targets (B, T) the mean loss. memory: a Memory of what came before ids;
        then the logits are those of the new positions alone."""
        new = ids.shape[1]
        if memory is not None:
            ids = memory.extend(ids)
        T, device = ids.shape[1], ids.device
        here = torch.arange(T - new, T, device=device)
        x = self.embed(ids[:, -new:])
        if self.temporal is not None:
            x = x + self.temporal(ids, new)
        if self.position is not None:
            x = x + self.position(here)
        x = self.drop(self.norm_in(x))
        turn = rotation(here, DIM // HEADS) if POSITIONS == "rope" else None
        mask = causal_mask(new, T, device=device)
        kinds = edges(self.embed.key(ids), new) if self.stage >= 3 else None
        pressure, v_1 = float(self.pressure), None
        for i, block in enumerate(self.blocks):
            x, v_1 = block(x, turn, mask, v_1, kinds, pressure, memory and memory.layers[i])
        x = self.norm_out(x)
        if targets is not None:
            return HeadLoss.apply(x, self.head.weight, targets)
        return soft_cap(self.head(x).float())


def soft_cap(logits):
    return SOFT_CAP * torch.tanh(logits / SOFT_CAP) if SOFT_CAP else logits


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of soft_cap(x W^T), a few rows at a time, with its gradient on the way: the logits
    of the whole batch, the largest tensor of a small model by far, never exist. x (B, T, DIM), weight (V,
    DIM), targets (B, T)."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        rows, w, y = x.flatten(0, 1), weight.to(low), targets.flatten()
        dx, dw, loss = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros((), device=x.device)
        size = max(16, 2**24 // len(weight))  # 64 MiB of logits at a time
        for i in range(0, len(rows), size):
            h, target = rows[i:i + size].to(low), y[i:i + size, None]
            z = (h @ w.T).float()
            if SOFT_CAP:
                z = z.mul_(1 / SOFT_CAP).tanh_()
            p = (z * SOFT_CAP if SOFT_CAP else z).log_softmax(1)
            loss -= p.gather(1, target).sum()
            p.exp_()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            if SOFT_CAP:  # the derivative of cap tanh(y / cap) is 1 - tanh^2
                p.addcmul_(p * z, z, value=-1)
            p = p.to(low)
            dx[i:i + size] = p @ w
            dw += p.T @ h
        ctx.save_for_backward(dx.view_as(x), dw)
        ctx.n = len(rows)
        return loss / len(rows)

    @staticmethod
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return dx * (g / ctx.n), dw * (g / ctx.n), None


class Memory:
    """What generation keeps: the tokens of the window and every layer's keys and values."""

    def __init__(self):
        self.ids, self.layers = None, [KVCache(CONTEXT) for _ in range(DEPTH)]

    def extend(self, ids):
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], 1)
        if self.ids.shape[1] > CONTEXT:
            raise ValueError(f"{self.ids.shape[1]} tokens do not fit a context of {CONTEXT}")
        return self.ids


def stage_number(stage=None):
    stage = STAGE if stage is None else stage
    return -1 if stage in ("control", "-1") else int(stage)


def count_parameters(vocabulary, stage, hidden):
    with torch.device("meta"):
        return sum(p.numel() for p in LM(vocabulary, stage, hidden).parameters())


def build_model(vocabulary, stage=None):
    """The model of STAGE. The control's MLP is as much wider as makes its parameters those of stage MATCH."""
    stage, hidden = stage_number(stage), MLP_RATIO * DIM
    if stage < 0:
        target, plain = count_parameters(vocabulary, MATCH, hidden), count_parameters(vocabulary, -1, hidden)
        a_unit = count_parameters(vocabulary, -1, hidden + 1) - plain
        hidden += round((target - plain) / a_unit)
    return LM(vocabulary, stage, hidden)


# ---------------------------------------------------------------- method: loss, optimizer, K-1
def loss_fn(model, ids):
    """Mean nats a token: ids (B, T + 1), every target once."""
    return model(ids[:, :-1], targets=ids[:, 1:])


def gram_penalty(mu):
    """|Gram - I|^2 of the cosines of the 16 block means: blocks that say the same thing cost."""
    mean = F.normalize(mu.blocks(torch.arange(mu.table.num_embeddings, device=mu.table.weight.device)[None])
                       .mean((0, 1)), dim=-1)
    return (mean @ mean.T - torch.eye(16, device=mean.device)).square().sum()


def build_optimizer(model):
    """Muon for the matrices inside, AdamW for embeddings, head and scalars. Groups are the leaves of K-1's
    tree; each knows its ratio to LR."""
    muon, adam = {}, {}
    for name, p in model.named_parameters():
        leaf = leaf_of(name)
        matrix = p.ndim == 2 and leaf.startswith("blocks") and not name.endswith("beta")
        inside = matrix or name == "embed.join.weight"
        if inside and OPT == "muon":
            muon.setdefault((leaf, 1.0), []).append(p)
        else:
            ratio = (1.0 if inside or OPT == "adamw" else 0.4 if leaf == "head"
                     else 1.0 if name.startswith("embed") else 0.5)
            adam.setdefault((leaf, ratio, WEIGHT_DECAY if inside else 0.0), []).append(p)
    groups = [dict(params=p, leaf=k[0], ratio=k[1], weight_decay=k[2]) for k, p in adam.items()]
    parts = [torch.optim.AdamW(groups, 0.0, (0.8, 0.95), 1e-10, fused=True)]
    if muon:
        groups = [dict(params=p, leaf=k[0], ratio=k[1]) for k, p in muon.items()]
        parts.append(Muon(groups, WEIGHT_DECAY))
    return Optimizers(model, parts)


def leaf_of(name):
    """The leaf of K-1's tree a parameter belongs to: embed, blocks/3/attn, blocks/3/mlp or head."""
    part = name.split(".")
    if part[0] == "blocks":
        return f"blocks/{part[1]}/{'mlp' if part[2] in ('mlp', 'norm_2') else 'attn'}"
    return "head" if part[0] in ("head", "norm_out") else "embed"


class Credit:
    """
    Stage 2, K-1: hierarchical credit, on the UPDATES (scaled gradients would be undone by Adam and Muon).

    Leaf score s = sum |grad| (|w| + 0.02), averaged over time; an inner node sums its children; going down
    the tree root > {embed, blocks, head}, blocks > layer > {attn, mlp} credit divides as S^(1/kappa), so that
    it sums to one. Density = credit / share of the parameters; multiplier = clip(z density^alpha, 0.1, 3)
    with z such that their parameter-weighted mean is 1: no hidden change of the learning rate.
    """

    def __init__(self, model):
        self.leaves = {}
        for name, p in model.named_parameters():
            self.leaves.setdefault(leaf_of(name), []).append(p)
        sizes = {leaf: sum(p.numel() for p in ps) for leaf, ps in self.leaves.items()}
        self.share = {leaf: size / sum(sizes.values()) for leaf, size in sizes.items()}
        self.scores, self.seen = {leaf: 0.0 for leaf in sizes}, 0

    @torch.no_grad()
    def observe(self):
        """Look at the gradients of one step; those that are not finite say nothing."""
        found = {leaf: float(sum((p.grad.abs() * (p.abs() + 0.02)).sum() for p in ps if p.grad is not None))
                 for leaf, ps in self.leaves.items()}
        if all(map(math.isfinite, found.values())):
            for leaf, score in found.items():
                self.scores[leaf] = 0.95 * self.scores[leaf] + 0.05 * score  # the bias is common and cancels
            self.seen += 1

    def credits(self):
        """leaf -> share of the credit; sums to one."""
        def divide(prefix, mass):
            children = {}
            for leaf, score in self.scores.items():
                if leaf.startswith(prefix):
                    child = leaf[len(prefix):].split("/")[0]
                    children[child] = children.get(child, 0.0) + score
            top = max(children.values())
            power = {c: (s / top) ** (1 / K1_KAPPA) if top > 0 else 1.0 for c, s in children.items()}
            for child, p in power.items():
                part = mass * p / sum(power.values())
                if prefix + child in self.scores:
                    found[prefix + child] = part
                else:
                    divide(f"{prefix}{child}/", part)
        found = {}
        divide("", 1.0)
        return found

    def multipliers(self):
        """leaf -> factor of its learning rate; the parameter-weighted mean is 1."""
        if self.seen == 0 or K1_ALPHA == 0:
            return {leaf: 1.0 for leaf in self.leaves}
        density = {leaf: (c / self.share[leaf]) ** K1_ALPHA for leaf, c in self.credits().items()}

        def clipped(z):
            return {leaf: min(3.0, max(0.1, z * d)) for leaf, d in density.items()}
        low, high = 1e-6, 1e6
        for _ in range(100):  # bisection: the mean grows with z
            z = math.sqrt(low * high)
            mean = sum(self.share[leaf] * m for leaf, m in clipped(z).items())
            low, high = (z, high) if mean < 1 else (low, z)
        return clipped(z)


def rate(step, total):
    """Share of the peak learning rate at optimizer step `step`: warm-up, constant, linear to zero."""
    warmup = max(1, min(WARMUP, total // 10))
    return min(1.0, (step + 1) / warmup, (total - step) / max(1.0, COOLDOWN * total))


def set_rates(optimizer, credit, step, total, scale=1.0):
    """Every group's learning rate: its ratio to LR, the schedule, and from stage 2 on K-1's multiplier, which
    comes in slowly: with a zero head only the head has a gradient at first and would take all the credit."""
    r = min(1.0, max(0.0, (step - K1_DELAY) / max(1, K1_DELAY))) if stage_number() >= 2 else 0.0
    m, lr = credit.multipliers() if r > 0 else {}, LR * rate(step, total) * scale
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"] * (1 + r * (m.get(group["leaf"], 1.0) - 1))
    return lr


def set_pressure(model, step, total):
    """Stage 3: non-edges fade out over the first GRAPH_RAMP of the steps."""
    model.pressure.fill_(min(30.0, 30 * step / max(1.0, GRAPH_RAMP * total)))


# ---------------------------------------------------------------- growing
def grow(model, parent, what):
    """Put the weights of a lower stage into `model`; what is new keeps its start, which changes no logit."""
    own = model.state_dict()
    allowed = [k for k in own if k.startswith("temporal.") or k.endswith(".beta") or k == "pressure"]
    new = {k: own[k] for k in allowed if k not in parent}
    if model.stage >= 3:
        new["pressure"] = own["pressure"]
    common.load_strictly(model, {**parent, **new}, what)


def parent_of():
    """The checkpoint STAGE grows from, or None."""
    stage = stage_number()
    if INIT_FROM == "scratch" or INIT_FROM == "below" and stage <= 0:
        return None
    path = Path(OUT) / f"lm_stage{stage - 1}" / "last.pt" if INIT_FROM == "below" else Path(INIT_FROM)
    if not path.exists():
        fail(f"STAGE={STAGE} grows from {path}, which does not exist: train that first, "
             "or give INIT_FROM=scratch or a checkpoint")
    return common.load_checkpoint(path)


def check_parent(parent, data):
    """One line for a checkpoint that this stage cannot grow from."""
    stage, before = stage_number(), parent["stage"]
    if before > stage or (before < 0) != (stage < 0):
        fail(f"INIT_FROM: {'the control' if before < 0 else f'stage {before}'} cannot become "
             f"{'the control' if stage < 0 else f'stage {stage}'}; a stage grows from one at or below it")
    if parent["vocabulary"] != data.V or parent["tokenizer"] != data.tokenizer.state():
        fail(f"INIT_FROM: the checkpoint has a vocabulary of {parent['vocabulary']} tokens "
             f"({parent['settings']['TOKENIZER']}), this run another one of {data.V} ({TOKENIZER}); give the "
             "DATA, TOKENIZER and VOCAB of the checkpoint")


# ---------------------------------------------------------------- sampling
def choose(logits, before, generator, temperature=None):
    """One token a row from logits (B, V), given the tokens before (B, n): repetition penalty (Keskar 2019)
    over the last 64, temperature, top-k, top-p (Holtzman 2020), min-p (2407.01082), then a draw."""
    temperature = TEMPERATURE if temperature is None else temperature
    z = logits.float().cpu().clone()
    if REP_PENALTY != 1 and before.shape[1]:
        recent = before[:, -64:].cpu()
        seen = z.gather(1, recent)
        z.scatter_(1, recent, torch.where(seen > 0, seen / REP_PENALTY, seen * REP_PENALTY))
    if temperature == 0:
        return z.argmax(1)
    p, order = (z / temperature).softmax(1).sort(1, descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if TOP_K:
        keep[:, TOP_K:] = False
    keep &= (p.cumsum(1) - p < TOP_P) | (torch.arange(p.shape[1]) == 0)  # the likeliest always stays
    keep &= p >= MIN_P * p[:, :1]
    drawn = torch.multinomial(p * keep, 1, generator=generator)
    return order.gather(1, drawn)[:, 0]


@torch.no_grad()
def sample(model, prompt, length, seed, end=None, cached=True, temperature=None, stream=None):
    """
    THE sampler: samples.txt, the quality card and sample.py come here.

    prompt  (B, P) int64 with 1 <= P <= CONTEXT; the rows may differ, their length may not
    end     token id at which a row stops (end of text); None = never
    cached  keep keys and values; False computes the whole window for every token (slow, equal)
    stream  called with the tokens (B,) as they come
    Returns ids (B, P + n), n <= length; after `end` a row is filled with it. A full window goes on from its
    last half. Raises ValueError for a prompt that is empty or longer than the context.
    """
    if not 1 <= prompt.shape[1] <= CONTEXT:
        raise ValueError(f"a prompt of {prompt.shape[1]} tokens: 1 to CONTEXT={CONTEXT} fit")
    device, generator = next(model.parameters()).device, generator_of(seed, "sample")
    ids, memory, fed = prompt.to(device), Memory(), 0
    done = torch.zeros(len(prompt), dtype=torch.bool, device=device)
    begin = 0  # of the window
    for _ in range(length):
        if ids.shape[1] - begin > CONTEXT:
            begin = ids.shape[1] - CONTEXT // 2
            memory, fed = Memory(), begin
        with autocast(device, PRECISION):
            if cached:
                logits = model(ids[:, max(begin, fed):], memory=memory)[:, -1]
            else:
                logits = model(ids[:, begin:])[:, -1]
        fed = ids.shape[1]
        token = choose(logits, ids, generator, temperature).to(device)
        if end is not None:
            token = torch.where(done, end, token)
            done |= token == end
        ids = torch.cat([ids, token[:, None]], 1)
        if stream is not None:
            stream(token)
        if bool(done.all()):
            break
    return ids


# ---------------------------------------------------------------- evaluation
def awake(model):
    """A copy whose all-zero tensors are N(0, 0.02): a zero head would hide every leak."""
    model = copy.deepcopy(model).eval()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            p.data.copy_(0.02 * torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def leak(model, ids, places=(1, 3, 7, 15, 31, 32)):
    """
    Does anything look ahead? Tokens from position p on are replaced; nothing before p may change. Returns
    (largest change of a logit before p, over all p and ids (B, T); name of the first module whose output
    changed, or "" when nothing did). `edges` and `recency` are named too: a leak through the choice of edges
    leaves no gradient.
    """
    names, seen = {}, []

    def note(module, inputs, output):
        seen.append((names[module], output[0] if isinstance(output, tuple) else output))

    def run(ids):
        seen.clear()
        if model.temporal is not None:
            seen.append(("recency", recency(ids, ids.shape[1])))
        if model.stage >= 3:
            seen.append(("edges", edges(model.embed.key(ids), ids.shape[1]).float()))
        logits = model(ids)
        return logits, list(seen)

    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()) or isinstance(module, Block):
            names[module] = name
            hooks.append(module.register_forward_hook(note))
    worst, culprit = 0.0, ""
    try:
        logits, before = run(ids)
        for p in (*(p for p in places if p < ids.shape[1]), ids.shape[1] - 1):
            other = ids.clone()
            shift = 1 + torch.arange(ids.shape[1] - p, device=ids.device) % 7
            other[:, p:] = (ids[:, p:] + shift) % model.vocabulary
            moved, after = run(other)
            worst = max(float((moved - logits)[:, :p].abs().nan_to_num(math.inf).max()), worst)
            for (name, a), (_, b) in zip(before, after):
                if not culprit and a.ndim == 3 and a.shape[:2] == ids.shape:
                    culprit = name if (a - b)[:, :p].abs().max() > 1e-5 else ""
    finally:
        for hook in hooks:
            hook.remove()
    return worst, culprit


@torch.no_grad()
def score(model, tokens, stride, batch=32):
    """nats (N - 1,) of the targets tokens[1:], each exactly once, and their positions in the window that
    scored them (N - 1,). Windows of CONTEXT every `stride` tokens; a window scores what none before it did,
    so stride = CONTEXT/2 gives every target at least half a window of context (but the first)."""
    device = next(model.parameters()).device
    N, nats, place = len(tokens), np.zeros(len(tokens) - 1), np.zeros(len(tokens) - 1, np.int64)
    starts = [*range(0, N - 1 - CONTEXT, stride), N - 1 - CONTEXT]  # the last one ends with the text
    done = 0
    for i in range(0, len(starts), batch):
        some = starts[i:i + batch]
        windows = np.stack([tokens[s:s + CONTEXT + 1] for s in some]).astype(np.int64)
        ids = torch.from_numpy(windows).to(device)
        with autocast(device, PRECISION):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for s, row in zip(some, loss.view(len(ids), CONTEXT).double().cpu().numpy()):
            nats[done:s + CONTEXT] = row[done - s:]
            place[done:s + CONTEXT] = np.arange(done - s, CONTEXT)
            done = s + CONTEXT
    return nats, place


def units(nats, targets, tokenizer, documents):
    """Sums over targets other than end-of-text, which has no bytes: dict of nats a token, bits a byte, token
    and word perplexity. Words are the blanks' and one for every end of line, as published for WikiText-2."""
    lengths = tokenizer.byte_lengths[targets]
    real, words = lengths > 0, sum(text.word_count(d) for d in documents)
    total = float(nats[real].sum())
    return dict(nats=total / int(real.sum()), bits_per_byte=total / math.log(2) / int(lengths.sum()),
                token_ppl=math.exp(min(700, total / int(real.sum()))),
                word_ppl=math.exp(min(700, total / words)))


def forecast(history):
    """Optimizer step at which the validation loss is expected to turn: the training loss falls as a - b
    log(step) and the gap to validation grows as c + d step, so their sum is least at b/d. nan before it can
    be said. history: rows of (step, train nats, val nats)."""
    rows = np.array([row for row in history if row[0] > 0 and math.isfinite(row[1])])
    if len(rows) < 3:
        return math.nan
    step, train, val = rows[-max(3, len(rows) // 2):, :3].T
    b, d = -np.polyfit(np.log(step), train, 1)[0], np.polyfit(step, val - train, 1)[0]
    return float(b / d) if b > 0 and d > 0 else math.nan


def continuations(model, data, count, seed):
    """Texts that continue held-out pieces, and human ones of the same number and length: what the quality
    card compares. Returns (samples, prompts, human)."""
    tokenizer, ids = data.tokenizer, data.val
    g = generator_of(seed, "quality")
    width = min(16, CONTEXT)
    starts = torch.randint(len(ids) - width, (count,), generator=g).tolist()
    prompt = torch.from_numpy(np.stack([ids[s:s + width] for s in starts]).astype(np.int64))
    out = sample(model, prompt, LENGTH, seed).cpu()
    samples = [tokenizer.decode(row[width:].tolist()) for row in out]
    prompts = [tokenizer.decode(row[:width].tolist()) for row in out]
    size = max(1, int(np.mean([len(text.text_bytes(s)) for s in samples])))
    try:
        human = text.human_samples(data.corpus.val, count, size)
    except ValueError:  # a small validation split holds fewer pieces
        human = []
    return samples, prompts, human


def reference(data):
    """What every report stands beside: floors of the validation split, lexicon, n-gram, all from the train
    split."""
    found = text.floors(data.corpus.train, data.corpus.val, Path(OUT) / "cache")
    train = text.joined(data.corpus.train)
    return SimpleNamespace(floors=found, index=text.Index(data.corpus.train),
                           ngram=text.NGram(train, int(found["ngram_order"])))


def evaluate(model, data, ref, so_far):
    """Every number of a report beside its floor and, where it exists, what human text gets. so_far: what
    report() is given. Returns (metrics, arrays for the pictures). Exits when the model sees the future: its
    perplexity would mean nothing."""
    change, culprit = leak(awake(model), first_windows(data, next(model.parameters()).device))
    if change > 1e-4 and not OVERRULE:
        fail(f"the model sees the future: changed tokens move earlier logits by {change:.2g}, first in "
             f"{culprit}; no perplexity is reported")
    nats, place = score(model, data.val, CONTEXT)
    unit = units(nats, data.val[1:], data.tokenizer, data.corpus.val)
    floors, n = ref.floors, int(sum(len(text.text_bytes(d)) for d in data.corpus.val))
    metrics = {}

    def add(name, value, better, floor=None, ceiling=None, n=n):
        metrics[name] = dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    add("bits_per_byte", unit["bits_per_byte"], "lower", floor=floors["xz"])
    for name in ("unigram", "ngram", "zlib", "bz2", "xz"):
        add(f"{name}_bits_per_byte", floors[name], "lower", floor=8.0)
    add("control_bits_per_byte", so_far.control, "lower", floor=floors["xz"])
    add("val_loss", unit["nats"], "lower", floor=math.log(data.V))
    add("token_ppl", unit["token_ppl"], "lower", floor=float(data.V))
    add("word_ppl", unit["word_ppl"], "lower")
    add("leak", change, "lower", floor=0.0)
    add("turning_step", forecast([*so_far.history, [so_far.step, so_far.train_loss, unit["nats"]]]), None)
    add("tokens_per_s", so_far.speed, "higher")
    if so_far.last:  # overlapping windows: every target has at least half a window before it
        for split in ("val", "test"):
            tokens, documents = getattr(data, split), getattr(data.corpus, split)
            if len(tokens) > CONTEXT + 1:
                long = units(score(model, tokens, CONTEXT // 2)[0], tokens[1:], data.tokenizer, documents)
                add(f"{split}_bits_per_byte_overlapping", long["bits_per_byte"], "lower",
                    floor=floors["xz"] if split == "val" else None)
                add(f"{split}_loss_overlapping", long["nats"], "lower", floor=math.log(data.V))
    samples, prompts, human = continuations(model, data, SAMPLES, SEED)
    card = text.quality(samples, ref.index, ref.ngram, prompts)
    target = text.quality(human, ref.index, ref.ngram) if human else {}
    for name, better in text.CARD:
        if name in card:
            add(name, card[name], better, ceiling=target.get(name), n=len(samples))
    return metrics, SimpleNamespace(nats=nats, place=place, card=card, human=target)


def summary(metrics):
    """The one line of a report: each number beside its floors."""
    m = {k: v["value"] for k, v in metrics.items()}
    beside = "".join(f", {name} {m[f'{name}_bits_per_byte']:.3f}" for name in ("ngram", "bz2", "xz"))
    control = f", control {m['control_bits_per_byte']:.3f}" if m["control_bits_per_byte"] is not None else ""
    return (f"bits/byte {m['bits_per_byte']:.3f} ({beside[2:]}{control}), token ppl {m['token_ppl']:.1f}, "
            f"word ppl {m['word_ppl']:.0f}, distinct-2 {m['distinct_2']:.2f}, "
            f"real words {m['real_words']:.2f}")


def report(folder, model, data, ref, so_far, board=None):
    """
    Every number, picture and array of one epoch folder; returns the metrics. so_far says where the run is:
    step, train_loss (nats, lately), history (rows of step, train nats, val nats), speed (tokens a second),
    control (its bits a byte or None), last (the run's last report), credit (rows of K-1), log (path of
    log.csv).
    """
    metrics, arrays = evaluate(model, data, ref, so_far)
    folder.mkdir(parents=True, exist_ok=True)
    history = np.array([*so_far.history, [so_far.step, so_far.train_loss, metrics["val_loss"]["value"]]],
                       float)
    draw_loss(folder, history, metrics, data, so_far)
    draw_floors(folder, metrics)
    draw_positions(folder, arrays, data)
    draw_quality(folder, arrays)
    draw_samples(folder, model, data)
    draw_embeddings(folder, model, data)
    if model.stage >= 0 and MU_MODE == "blocks":
        draw_mu(folder, model, data)
    if model.stage >= 1:
        draw_temporal(folder, model, data, arrays)
    if model.stage >= 2 and so_far.credit:
        draw_credit(folder, so_far.credit, list(Credit(model).leaves))
    if model.stage >= 3:
        draw_graph(folder, model, data)
    common.save_metrics(None, folder, metrics)
    if board is not None:
        for name, m in metrics.items():
            if m["value"] is not None:
                board.add_scalar(f"eval/{name}", m["value"], so_far.step)
    return metrics


# ---------------------------------------------------------------- pictures
def label(token):
    """How a token is written in a picture."""
    for sign, written in (("\n", "\\n"), ("\t", "\\t"), (" ", "\u2423"), ("$", r"\$")):
        token = token.replace(sign, written)
    return token or "(end)"


def bits_of(nats, data, split):
    """Nats a token -> bits a byte, by the bytes a token has in that split on average."""
    return nats / math.log(2) / max(1e-9, float(data.tokenizer.byte_lengths[getattr(data, split)].mean()))


def frequent_tokens(data, count):
    """Ids of the most frequent tokens of the validation split, most frequent first."""
    return np.argsort(-np.bincount(np.asarray(data.val, dtype=np.int64), minlength=data.V))[:count]


def draw_loss(folder, history, metrics, data, so_far):
    """Training and validation loss in bits a byte, with the floors as lines. history.npy: step, train nats,
    val nats, val bits a byte, learning rate, ms a step."""
    log = common.read_log(so_far.log) if so_far.log is not None and so_far.log.exists() else None
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = np.full((len(history), 6), np.nan)
    rows[:, :3], rows[:, 3] = history, bits_of(history[:, 2], data, "val")
    rows[-1, 3] = metrics["bits_per_byte"]["value"]
    if log is not None and len(log["step"]) > 1:
        n = max(1, len(log["step"]) // 60)
        smooth = np.convolve(log["loss"], np.ones(n) / n, "valid")
        ax.plot(log["step"][n - 1:], bits_of(smooth, data, "train"), color="0.6", lw=1,
                label=f"train, mean of {n} steps")
        place = np.searchsorted(log["step"], history[:, 0]).clip(0, len(log["step"]) - 1)
        rows[:, 4], rows[:, 5] = log["lr"][place], 1000 * log["seconds"][place] / log["step"][place]
    ax.plot(rows[:, 0], rows[:, 3], "o-", color="C3", ms=4, label="validation")
    for name, style in (("unigram", ":"), ("ngram", "--"), ("bz2", "-."), ("xz", "-")):
        value = metrics[f"{name}_bits_per_byte"]["value"]
        ax.axhline(value, color="k", lw=0.8, ls=style, label=f"{name} {value:.3f}")
    if so_far.control is not None:
        ax.axhline(so_far.control, color="C0", lw=1, label=f"control {so_far.control:.3f}")
    ax.set(xlabel="optimizer step", ylabel="bits a byte", ylim=(1, 5.2),
           title=f"validation {rows[-1, 3]:.3f} bits a byte after step {so_far.step}")
    ax.legend(fontsize=8, ncols=2)
    save_artifact(folder, "loss", rows, figure)
    np.save(folder / "history.npy", rows)


def draw_floors(folder, metrics):
    """What it is worth: the model beside everything that does not learn."""
    names = ["unigram", "zlib", "ngram", "bz2", "xz"]
    bars = [("uniform", 8.0)] + [(n, metrics[f"{n}_bits_per_byte"]["value"]) for n in names]
    if metrics["control_bits_per_byte"]["value"] is not None:
        bars.append(("control", metrics["control_bits_per_byte"]["value"]))
    bars.append(("model", metrics["bits_per_byte"]["value"]))
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    drawn = ax.barh([b[0] for b in bars], [b[1] for b in bars],
                    color=["C3" if b[0] == "model" else "C0" if b[0] == "control" else "0.7" for b in bars])
    ax.bar_label(drawn, fmt="%.3f", fontsize=8, padding=2)
    ax.invert_yaxis()
    ax.set(xlabel="bits a byte of held-out text (less is better)", xlim=(0, 8.8))
    save_artifact(folder, "floors", [b[1] for b in bars], figure)


def draw_positions(folder, arrays, data):
    """Mean nats by position in the window: what context is worth."""
    mean = np.array([arrays.nats[arrays.place == i].mean() if (arrays.place == i).any() else np.nan
                     for i in range(CONTEXT)])
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    ax.plot(np.arange(1, CONTEXT + 1), mean, lw=1.2)
    ax.set(xlabel="tokens of context", ylabel="nats a token", xscale="log",
           title=f"position 1: {mean[0]:.2f}; last quarter: {np.nanmean(mean[-CONTEXT // 4:]):.2f} nats")
    save_artifact(folder, "loss_by_position", mean, figure)


def draw_quality(folder, arrays):
    """The card of samples beside the same card of human text of the same amount, on a common scale."""
    names = [n for n, _ in text.CARD if n in arrays.card]
    table = np.array([[arrays.card[n], arrays.human.get(n, math.nan)] for n in names])
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    scale = np.maximum(np.nanmax(np.abs(table), 1), 1e-9)
    y = np.arange(len(names))
    ax.barh(y - 0.2, np.abs(table[:, 0]) / scale, 0.4, label="model", color="C3")
    ax.barh(y + 0.2, np.abs(table[:, 1]) / scale, 0.4, label="held-out human text", color="0.6")
    for i, (mine, human) in enumerate(table):
        ax.text(1.02, i, f"{mine:.3g}   human {human:.3g}" if human == human else f"{mine:.3g}", va="center",
                size=8)
    ax.set_yticks(y, names)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.45), xticks=[], title="quality card: the nearer to human text, the better")
    ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, 0))
    save_artifact(folder, "quality", table, figure)


@torch.no_grad()
def surprisal(model, ids):
    """Bits (n,) of each token of ids (n,) given those before it; the first has none. At most CONTEXT + 1."""
    ids = ids[None, :CONTEXT + 1].to(next(model.parameters()).device)
    logits = model(ids[:, :-1])
    bits = F.cross_entropy(logits[0], ids[0, 1:], reduction="none") / math.log(2)
    return np.concatenate([[0.0], bits.cpu().numpy()])


def draw_samples(folder, model, data):
    """samples.txt (greedy and drawn continuations of PROMPTS), samples.npy (their ids, padded with end of
    text), samples.html: each token coloured by how surprising the model found it."""
    tokenizer, rows, lines, html = data.tokenizer, [], [], []
    for k, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer.encode(prompt)[-CONTEXT:]])
        for temperature in (0.0, TEMPERATURE):
            out = sample(model, ids, LENGTH, seed_of(SEED, "samples", k), tokenizer.end,
                         temperature=temperature)[0].cpu()
            written = tokenizer.decode([i for i in out.tolist() if i != tokenizer.end])
            lines.append(f"--- temperature {temperature:g}\n{written}\n")
            rows.append(out.numpy())
            spans = []
            for token, bits in zip(out.tolist(), surprisal(model, out)):
                piece = tokenizer.decode([token]).replace("&", "&amp;").replace("<", "&lt;")
                spans.append(f'<span style="background:rgba(255,80,0,{min(1, bits / 12):.2f})" '
                             f'title="{bits:.1f} bits">{piece}</span>')
            html.append(f"<h4>temperature {temperature:g}</h4><pre>{''.join(spans)}</pre>")
    (folder / "samples.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "samples.html").write_text("<meta charset=utf-8><style>pre{white-space:pre-wrap}</style>\n"
                                         + "\n".join(html), encoding="utf-8")
    padded = np.full((len(rows), max(map(len, rows))), tokenizer.end)
    for row, ids in zip(padded, rows):
        row[:len(ids)] = ids
    np.save(folder / "samples.npy", padded)


def principal(x, k=2):
    """Coordinates (N, k) of rows x (N, d) along their main axes."""
    x = x - x.mean(0)
    return x @ np.linalg.svd(x, full_matrices=False)[2][:k].T


@torch.no_grad()
def draw_embeddings(folder, model, data, count=150):
    """The most frequent tokens as the network sees them at its entrance, on their two main axes."""
    frequent = frequent_tokens(data, count)
    ids = torch.from_numpy(frequent)[None].to(next(model.parameters()).device)
    vectors = rms(model.embed(ids))[0].float().cpu().numpy()
    xy = principal(vectors)
    figure, ax = plt.subplots(figsize=(8, 8), layout="constrained")
    for (x, y), token in zip(xy, frequent):
        word = data.tokenizer.decode([int(token)])
        bare = word.strip()
        colour = "C0" if bare.isalpha() else "C1" if bare.isdigit() else "C2" if bare else "C3"
        ax.text(x, y, label(word), fontsize=7, color=colour, ha="center", va="center")
    low, high = xy.min(0) - 0.3, xy.max(0) + 0.3
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[],
           title=f"embeddings of the {len(xy)} most frequent tokens: letters, digits, signs, blanks")
    save_artifact(folder, "embeddings", vectors, figure)


@torch.no_grad()
def block_cosines(mu):
    """(16, 16) mean cosine of the blocks of a token over the vocabulary, and their effective rank: exp of the
    entropy of the Gram matrix's eigenvalues, 16 when all blocks say different things."""
    unit = F.normalize(mu.blocks(torch.arange(mu.table.num_embeddings,
                                              device=mu.table.weight.device)[None])[0], dim=-1)
    gram = torch.einsum("vnk,vmk->nm", unit, unit).cpu().double() / len(unit)
    share = torch.linalg.eigvalsh(gram).clamp(min=1e-12) / 16
    return gram.numpy(), float((-(share * share.log()).sum()).exp())


@torch.no_grad()
def draw_mu(folder, model, data, count=40):
    """Do the 16 blocks say different things, and which tokens open which gates?"""
    gram, rank = block_cosines(model.embed)
    gate = model.embed.gate.weight.sigmoid().float().cpu().numpy()
    frequent = frequent_tokens(data, count)
    off = np.abs(gram - np.diag(np.diag(gram))).max()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", width_ratios=(1, 1.15))
    axes[0].imshow(gram, cmap="RdBu_r", vmin=-1, vmax=1)
    axes[0].set_title(f"cosine of blocks: up to {off:.2f} off the diagonal, effective rank {rank:.1f} of 16",
                      size=9)
    shown = axes[1].imshow(gate[frequent].T, cmap="viridis", vmin=0, vmax=1, aspect="auto",
                           interpolation="nearest")
    axes[1].set_title("gates of the most frequent tokens", size=9)
    axes[1].set_xticks(range(len(frequent)),
                       [label(data.tokenizer.decode([int(i)])) for i in frequent], rotation=90, size=6)
    axes[0].set_xticks(range(16), MU.names, size=7)
    for ax in axes:
        ax.set_yticks(range(16), MU.names, size=7)
    figure.colorbar(shown, ax=axes[1], shrink=0.7)
    save_artifact(folder, "mu_cosine", gram, figure)
    np.save(folder / "mu_gate.npy", gate)


@torch.no_grad()
def draw_temporal(folder, model, data, arrays):
    """Loss by how long ago the token at the input was last seen, with TEMPORAL and with it silenced: what the
    stage is worth, and where. temporal.npy: rows of (first distance, targets, nats with, nats without)."""
    silent = copy.deepcopy(model)
    silent.temporal.join.weight.zero_()
    part = np.asarray(data.val[:min(len(data.val), 40 * CONTEXT + 1)])
    nats, place = score(silent, part, CONTEXT)
    same, _ = score(model, part, CONTEXT)
    edge = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    rows, ago = [], np.zeros(len(nats), np.int64)
    for i in range(len(nats)):
        window = part[i - place[i]:i]
        found = np.flatnonzero(window == part[i])
        ago[i] = len(window) - found[-1] if len(found) else 0
    for low, high in zip(edge, [1, *edge[2:], 10**9]):
        here = (ago >= low) & (ago < high)
        if here.any():
            rows.append([low, here.sum(), same[here].mean(), nats[here].mean()])
    rows = np.array(rows)
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    x = np.arange(len(rows))
    ax.bar(x - 0.2, rows[:, 3], 0.4, color="0.7", label="TEMPORAL silenced")
    ax.bar(x + 0.2, rows[:, 2], 0.4, color="C3", label="as trained")
    ax.set_xticks(x, ["new"] + [f"{int(r)}+" for r in rows[1:, 0]])
    ax.set(xlabel="tokens since this token was last seen", ylabel="nats of the next token",
           title=f"silencing TEMPORAL costs {nats.mean() - same.mean():+.3f} nats a token",
           ylim=(0, 1.25 * rows[:, 2:].max()))
    ax.legend(fontsize=8, ncols=2)
    save_artifact(folder, "temporal", rows, figure)


def draw_credit(folder, credit, leaves):
    """K-1 over the run: share of the credit and the factor of the learning rate, a row for each leaf.
    credit.npy and multiplier.npy: (looks, leaves); credit.txt: the last look as a table."""
    table = np.array(credit, float)
    shares, factors = table[:, 1:1 + len(leaves)], table[:, 1 + len(leaves):]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    look = dict(aspect="auto", interpolation="nearest", extent=(0, table[-1, 0], len(leaves) - 0.5, -0.5))
    left = axes[0].imshow(shares.T, cmap="viridis", vmin=0, **look)
    right = axes[1].imshow(np.log2(factors).T, cmap="RdBu_r", vmin=-2, vmax=2, **look)
    for ax, shown, name in ((axes[0], left, "credit"), (axes[1], right, "log2 of the rate's factor")):
        ax.set(xlabel="optimizer step", title=name)
        ax.set_yticks(range(len(leaves)), leaves, size=7)
        figure.colorbar(shown, ax=ax)
    save_artifact(folder, "credit", shares, figure)
    np.save(folder / "multiplier.npy", factors)
    (folder / "credit.txt").write_text("leaf            credit  multiplier\n" + "".join(
        f"{leaf:15s} {c:6.3f}  {m:6.3f}\n" for leaf, c, m in zip(leaves, shares[-1], factors[-1])))


@torch.no_grad()
def attention_mass(model, ids):
    """Where routed heads look: share of attention by edge type, (DEPTH, H/2, 5), mean over positions."""
    found, hooks = [], []

    def look(block, inputs):
        x, turn, mask, _, kinds, pressure = inputs[:6]
        n = len(block.beta)
        q, k, _ = block.attn.qkv(block.norm_1(x), turn)
        weight = (q[:, :n] @ k[:, :n].mT / q.shape[-1] ** 0.5 + block.bias(mask, kinds, pressure)).softmax(-1)
        found.append(torch.stack([(weight * (kinds == kind)[:, None]).sum(-1).mean((0, 2))
                                  for kind in range(len(edge_types))], -1))
    for block in model.blocks:
        hooks.append(block.register_forward_pre_hook(look))
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).cpu().numpy()


@torch.no_grad()
def draw_graph(folder, model, data, count=48):
    """The edges of a held-out text by type, and how much attention of the routed heads each type gets."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.asarray(data.val[:CONTEXT]).astype(np.int64))[None].to(device)
    kinds = edges(model.embed.key(ids), CONTEXT)[0].cpu().numpy()
    mass, n = attention_mass(model, ids), min(count, CONTEXT)
    names = [label(data.tokenizer.decode([i])) for i in ids[0, :n].tolist()]
    colours = plt.matplotlib.colors.ListedColormap(["white", "0.75", "C0", "C3", "C2"])
    figure, axes = plt.subplots(1, 2, figsize=(13, 7.4), layout="constrained", width_ratios=(1.25, 1))
    axes[0].imshow(kinds[:n, :n], cmap=colours, vmin=-0.5, vmax=4.5, interpolation="nearest")
    axes[0].set_xticks(range(n), names, rotation=90, size=6)
    axes[0].set_yticks(range(n), names, size=6)
    share = np.bincount(kinds.ravel(), minlength=5)[1:] / kinds.shape[0]
    kind = ", ".join(f"{name} {s:.1f}" for name, s in zip(edge_types[1:], share))
    axes[0].set_title(f"a row may look at: {kind} edges a token", size=9)
    table = mass.reshape(-1, len(edge_types))
    left = np.zeros(len(table))
    for kind, colour in enumerate(("0.95", "0.75", "C0", "C3", "C2")):
        axes[1].barh(range(len(table)), table[:, kind], left=left, color=colour, label=edge_types[kind],
                     edgecolor="k", lw=.2)
        left += table[:, kind]
    axes[1].set_yticks(range(len(table)), [f"layer {i // mass.shape[1]} head {i % mass.shape[1]}"
                                           for i in range(len(table))], size=7)
    axes[1].invert_yaxis()
    axes[1].set(xlim=(0, 1), title="attention of the routed heads by edge type")
    axes[1].legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.04))
    save_artifact(folder, "graph", kinds, figure)
    np.save(folder / "adjacency.npy", kinds)
    np.save(folder / "edge_mass.npy", mass)


# ---------------------------------------------------------------- pre-flight
@contextlib.contextmanager
def changed(**values):
    """Other settings for a while, e.g. for a network small enough to train in seconds."""
    before = {k: globals()[k] for k in values}
    globals().update(values)
    try:
        yield
    finally:
        globals().update(before)


def quick_training(batch, steps, vocabulary, width=32, depth=2, heads=2, rate_of=0.02):
    """Losses of a small copy of STAGE trained for `steps`; batch(step) gives ids (B, T + 1)."""
    with changed(DIM=width, MU_DIM=width, HEADS=heads, DEPTH=depth, DROPOUT=0.0, LR=rate_of, WARMUP=5,
                 GRAPH_RAMP=0.3, K1_DELAY=20, CONTEXT=batch(0).shape[1] - 1,
                 MATCH=min(MATCH, max(0, stage_number()))):
        model = build_model(vocabulary)
        optimizer, credit, losses = build_optimizer(model), Credit(model), []
        for step in range(steps):
            if model.stage >= 3:
                set_pressure(model, step, steps)
            loss = loss_fn(model, batch(step))
            loss.backward()
            if model.stage >= 2 and step % K1_EVERY == 0:
                credit.observe()
            set_rates(optimizer, credit, step, steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def check_data(c):
    """1"""
    ids, V = np.concatenate([c.data.train, c.data.val]), c.data.V
    pieces = [*c.data.corpus.val[:3], "na\u00efve \U0001f642\t\r\n \u0301x", ""]
    exact = all(c.data.tokenizer.decode_bytes(c.data.tokenizer.encode(p)) == text.text_bytes(p)
                for p in pieces)
    shifted = draw_batch(c.data, 0)[0].numpy()
    follows = any((c.data.train[i:i + CONTEXT + 1] == shifted).all()
                  for i in np.flatnonzero(c.data.train[:-CONTEXT] == shifted[0]))
    shared = text.shared_shingles(c.data.corpus.train, c.data.corpus.val)
    ok = exact and follows and 0 <= ids.min() and ids.max() < V
    return ok and (shared < 0.02 or None), (
        f"{len(c.data.train):,} training tokens = {windows_per_epoch(c.data):,} windows of {CONTEXT}; "
        f"{100 * len(np.unique(ids)) / V:.0f} % of {V:,} tokens used; decode(encode(x)) "
        f"{'exact' if exact else 'WRONG'}; {100 * shared:.2f} % of validation is in train")


def check_start(c):
    """2"""
    with torch.no_grad():
        logits = c.fresh(c.ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), c.ids[:, 1:].flatten())
    off = float(loss) - math.log(c.data.V)
    return abs(off) <= 0.15, (f"first loss {float(loss):.4f}, ln V {math.log(c.data.V):.4f}; logits from "
                              f"{float(logits.min()):.2g} to {float(logits.max()):.2g}")


def check_future(c):
    """3"""
    change, culprit = leak(c.awake, c.ids)
    middle, kept = c.ids.shape[1] // 2, []
    hook = c.awake.drop.register_forward_hook(lambda module, inputs, output: kept.append(
        output.detach().requires_grad_()) or kept[-1])
    c.awake(c.ids)[:, middle].sum().backward()
    hook.remove()
    gradient = float(kept[0].grad[:, middle + 1:].abs().max())
    c.awake.zero_grad()
    return change <= 1e-5 and gradient == 0, (
        f"changing later tokens moves earlier logits by {change:.1g}, gradient to later inputs {gradient:.1g}"
        + (f"; FIRST LEAK IN {culprit}" if culprit else ""))


def check_noise(c):
    """4"""
    g = generator_of(0, "noise")
    noise = np.mean(quick_training(lambda step: torch.randint(64, (16, 33), generator=g), 240, 65)[-20:])
    period = torch.randint(64, (300, 16, 16), generator=g)
    copied = quick_training(lambda step: period[step].repeat(1, 3)[:, :33], 300, 65)[-20:]
    honest, learns = noise >= math.log(64) - 0.05, np.mean(copied) < 0.75 * math.log(64)
    return honest and (learns or None), (
        f"loss on random tokens {noise:.3f} (ln 64 = {math.log(64):.3f}); on text of which every "
        f"second half repeats the first {np.mean(copied):.2f}")


def check_order(c):
    """5"""
    order = torch.randperm(c.ids.shape[1], generator=generator_of(0, "order"))
    with torch.no_grad():
        error = float((c.awake(c.ids[:, order]) - c.awake(c.ids)[:, order]).abs().max())
    return error > 1e-3, f"shuffled input: outputs differ by {error:.2g} from shuffled outputs"


def check_batch(c):
    """6"""
    with torch.no_grad():
        both, twice, alone = c.awake(c.ids), c.awake(c.ids), c.awake(c.ids[1:2])
        c.awake.train()
        dropped = float((c.awake(c.ids) - both).abs().max())
        c.awake.eval()
    apart, again = float((alone - both[1:2]).abs().max()), float((twice - both).abs().max())
    return apart <= 1e-4 and again == 0 and (dropped > 0) == (DROPOUT > 0), (
        f"a text alone or in a batch differs by {apart:.1g}, two passes by {again:.1g}; dropout changes "
        f"{dropped:.1g}")


def check_memory(c):
    """7"""
    sentence = torch.tensor([c.data.tokenizer.encode("The capital of India is New Delhi.")])
    batch = torch.randint(64, (4, 33), generator=generator_of(0, "memory"))
    one = quick_training(lambda step: sentence, 100, c.data.V, 64, 3)
    many = quick_training(lambda step: batch, 100, 65, 64, 3)
    first = next((i for i, loss in enumerate(many) if loss < 0.1), None)
    return one[-1] < 0.1 and many[-1] < 0.1, (
        f"one sentence: loss {one[0]:.2f} -> {one[50]:.2f} -> {one[-1]:.3f}; a batch: {many[0]:.2f} -> "
        f"{many[-1]:.3f}" + (f", below 0.1 at step {first}" if first is not None else ""))


def check_gradients(c):
    """8"""
    loss_fn(c.trained, c.batch).backward()
    size = [math.sqrt(sum(p.grad.square().sum() for p in block.parameters() if p.grad is not None)
                      / sum(p.numel() for p in block.parameters())) for block in c.trained.blocks]
    missing = [n for n, p in c.trained.named_parameters() if p.grad is None]
    broken = [n for n, p in c.trained.named_parameters() if p.grad is not None
              and not torch.isfinite(p.grad).all()]
    ratio = size[0] / max(size[-1], 1e-30)
    return not missing and not broken and 1e-3 <= ratio <= 1e3, (
        f"gradient RMS {size[0]:.1e} in the first block, {size[-1]:.1e} in the last"
        + (f"; none in {', '.join(missing[:3])}" if missing else "")
        + (f"; NaN in {broken[0]}" if broken else ""))


def check_activations(c):
    """9"""
    rows, hooks, dead = [], [], []

    def stream(module, inputs, output):
        x = output[0]
        rows.append([float(x.square().mean().sqrt()), float((x - x.mean()).pow(4).mean() / x.var() ** 2)])

    def units(module, inputs, output):
        dead.append(float((output.flatten(0, 1) <= 0).all(0).float().mean()))

    for block in c.trained.blocks:
        hooks += [block.register_forward_hook(stream), block.mlp.up.register_forward_hook(units)]
    with torch.no_grad():
        c.trained(c.ids)
    for hook in hooks:
        hook.remove()
    c.activations = np.array(rows)
    cosine = ""
    worst = 0.0
    if c.trained.stage >= 0 and MU_MODE == "blocks":
        gram, rank = block_cosines(c.trained.embed)
        worst = float(np.abs(gram - np.diag(np.diag(gram))).max())
        cosine = f"; MU blocks: cosine up to {worst:.2f}, effective rank {rank:.1f} of 16"
    ok = worst <= 0.9 and max(dead) <= 0.5
    return ok or None, (f"RMS {rows[0][0]:.2f} -> {rows[-1][0]:.2f} through the blocks, kurtosis up to "
                        f"{max(r[1] for r in rows):.1f}, dead units {100 * max(dead):.0f} %{cosine}")


def check_updates(c):
    """10"""
    low, high = min(c.updates.values()), max(c.updates.values())
    factor = c.credit.multipliers()
    mean = sum(c.credit.share[leaf] * m for leaf, m in factor.items())
    k1 = (f"; K-1 multiplies by {min(factor.values()):.2f} to {max(factor.values()):.2f}, mean {mean:.3f}"
          if c.trained.stage >= 2 else "")
    return (1e-5 <= low and high <= 0.3 and abs(mean - 1) < 1e-3) or None, (
        f"a step moves weights by {low:.1e} to {high:.1e} of their size{k1}")


def check_graph(c):
    """11"""
    if c.trained.stage < 3:
        return True, "no graph at this stage"
    ids = c.ids[:1]
    kinds = edges(c.trained.embed.key(ids), ids.shape[1])[0].cpu()
    step, T = (kinds > 0).float(), len(kinds)
    reach, seen = step.clone(), [float(step.tril().sum()) / (T * (T + 1) / 2)]
    for _ in range(DEPTH - 1):
        reach = ((reach @ step) > 0).float()
        seen.append(float(reach.sum()) / (T * (T + 1) / 2))
    same = (ids[0, :, None] == ids[0]).tril(-1).cpu()
    pairs = F.pad(same, (1, 0))[:, :-1].tril()  # (i, j + 1) with token j = token i: where induction looks
    induction = float(step[pairs].mean()) if pairs.any() else math.nan
    isolated = int((step.sum(1) == 0).sum())
    kind = ", ".join(f"{name} {int((kinds == k + 1).sum()) / T:.1f}" for k, name in enumerate(edge_types[1:]))
    return isolated == 0, (
        f"edges a token: {kind}; {100 * seen[0]:.0f} % of the past in one layer, {100 * seen[-1]:.0f} % in "
        f"{DEPTH}; {100 * induction:.0f} % of induction pairs; isolated {isolated}")


def check_capacity(c):
    """12"""
    total = sum(p.numel() for p in c.model.parameters())
    tables = ("embed", "temporal", "head")
    table = sum(p.numel() for n, p in c.model.named_parameters() if n.startswith(tables))
    epochs = c.total / steps_per_epoch(c.data)
    memory = total * (12 if OPT == "muon" else 16) / 2**20
    return epochs <= 4 or DROPOUT > 0 or None, (
        f"{total:,} parameters ({100 * table / total:.0f} % tables and head), "
        f"{len(c.data.train) * min(1, epochs) / total:.2f} different tokens each (20 is ample), {epochs:.1f} "
        f"epochs planned, {memory:.0f} MiB with the optimizer")


def check_speed(c):
    """13"""
    speed = BATCH_SIZE * ACCUM * CONTEXT / c.seconds
    return True, (f"{1000 * c.seconds:.0f} ms a step = {speed:,.0f} tokens/s on {c.ids.device} with "
                  f"{torch.get_num_threads()} threads; {c.total:,} steps in about "
                  f"{c.total * c.seconds / 60:.1f} minutes")


def check_cache(c):
    """15"""
    memory, error = Memory(), 0.0
    with torch.no_grad():
        whole = c.awake(c.ids[:1])
        for start_at, stop in ((0, CONTEXT // 2), *((i, i + 1) for i in range(CONTEXT // 2, c.ids.shape[1]))):
            part = c.awake(c.ids[:1, start_at:stop], memory=memory)
            error = max(error, float((part - whole[:, start_at:stop]).abs().max()))
    return error <= 1e-4, f"logits with and without the cache differ by {error:.1g}"


def check_unigram(c):
    """16"""
    return True, (f"counting tokens alone gives {unigram_nats(c.data):.3f} nats; a run that is above it "
                  "after 200 steps says so")


def check_text(c):
    """17"""
    prompt = torch.tensor([c.data.tokenizer.encode("The capital of India is")[-CONTEXT:]])
    out = [c.data.tokenizer.decode(sample(c.trained, prompt, 12, 0, temperature=t)[0].tolist())
           for t in (0.0, 0.8)]
    return True, f"after 10 steps, greedy {out[0]!r}, drawn {out[1]!r}"


def preflight(model, data, total, fast):
    """
    The checks of the design, in its numbering: (number, what, check, in the fast subset, remedy). A check
    returns (True pass | None warn | False fail, what it measured). fast: those that take a moment; before
    every training. Returns the rows (number, status, line), and the activations (DEPTH, 2) of the slow ones.
    """
    table = (
        (1, "data", check_data, True, "look at DATA and TOKENIZER; split by document"),
        (2, "first loss is ln V", check_start, True, "ZERO_INIT=True, or a smaller start of the head"),
        (3, "cannot see the future", check_future, True, "a mask is missing in the module named"),
        (4, "learns nothing from noise", check_noise, False, "something shows the target to the input"),
        (5, "knows the order", check_order, True, "POSITIONS=rope"),
        (6, "texts are independent", check_batch, True,
         "no statistics over the batch, no randomness in eval"),
        (7, "can memorise", check_memory, False, "LR too low, or a path without gradient"),
        (8, "gradients flow", check_gradients, False, "QK_NORM=True, ZERO_INIT=True, a lower LR"),
        (9, "activations", check_activations, False,
         "MU_GRAM=0.01 pushes blocks apart; a lower LR revives units"),
        (10, "size of the updates", check_updates, False, "LR; K1_ALPHA=0 switches K-1 off"),
        (11, "graph", check_graph, False, "GRAPH_WINDOW at least 0 keeps the self edge; a larger GRAPH_K"),
        (12, "capacity", check_capacity, False, "more text, DROPOUT=0.2, fewer EPOCHS"),
        (13, "speed", check_speed, False, ""),
        (15, "cache equals no cache", check_cache, True,
         "positions must go on in the cache, values are kept mixed"),
        (16, "unigram baseline", check_unigram, False, ""),
        (17, "text", check_text, False, ""),
    )
    device = next(model.parameters()).device
    torch.manual_seed(SEED)
    c = SimpleNamespace(model=model, awake=awake(model), fresh=build_model(data.V).to(device).eval(),
                        data=data, ids=first_windows(data, device), total=total, activations=None)
    if not fast:  # some checks look at a network that has moved a little
        c.trained, c.batch = copy.deepcopy(model).train(), draw_batch(data, 0).to(device)
        optimizer, c.credit, clock = build_optimizer(c.trained), Credit(c.trained), None
        for step in range(10):
            if step == 3:
                clock = time.monotonic()
            loss_fn(c.trained, draw_batch(data, step)[:BATCH_SIZE].to(device)).backward()
            c.credit.observe()
            set_rates(optimizer, c.credit, step, 100)
            before = {n: p.detach().clone() for n, p in c.trained.named_parameters()} if step == 9 else {}
            optimizer.step()
            optimizer.zero_grad()
        c.seconds = (time.monotonic() - clock) / 7 * ACCUM
        with torch.no_grad():  # what started at zero grows by its own size: no measure
            began = {n for n, p in model.named_parameters() if p.ndim == 2 and p.any()}
            c.updates = {n: float((p - before[n]).norm() / p.norm())
                         for n, p in c.trained.named_parameters() if n in began}
        c.trained.eval()
    rows = []
    for number, what, check, quick, remedy in table:
        if fast and not quick:
            continue
        ok, found = check(c)
        status = {True: "PASS", None: "WARN", False: "FAIL"}[ok if ok is None else bool(ok)]
        rows.append((number, status, f"{status}  {number:2d} {what}: {found}"
                     + (f"  -> {remedy}" if status != "PASS" and remedy else "")))
        if not fast:
            print(rows[-1][2], flush=True)
    return rows, c.activations


def unigram_nats(data):
    """Nats a token of the best predictor that knows only how often a token occurs (add one)."""
    count = np.bincount(np.asarray(data.train, dtype=np.int64), minlength=data.V) + 1.0
    return float(-np.log(count / count.sum())[np.asarray(data.val[1:], dtype=np.int64)].mean())


def diagnose():
    """DIAGNOSE=True: every check on the model that STAGE would train (ladder: stage 3). Exit code 1 on a
    FAIL."""
    if STAGE == "ladder":
        globals().update(STAGE="3")
    clock, device = time.monotonic(), common.pick_device()
    data, _ = prepare()
    torch.manual_seed(SEED)
    model = build_model(data.V).to(device)
    rows, activations = preflight(model, data, total_steps(data), fast=False)
    folder = Path(OUT) / "lm_diagnose"
    save_artifact(folder, "activations", activations)
    (folder / "diagnose.txt").write_text("".join(row[2] + "\n" for row in rows))
    count = {s: sum(row[1] == s for row in rows) for s in ("PASS", "WARN", "FAIL")}
    print(f"stage {model.stage}: " + ", ".join(f"{n} {s}" for s, n in count.items())
          + f" in {time.monotonic() - clock:.0f} s; {folder / 'diagnose.txt'}")
    sys.exit(1 if count["FAIL"] else 0)


def convert():
    """CONVERT=12: what a token perplexity means in the other units on DATA, and whether to believe it."""
    if DATA == "wikitext2" and TOKENIZER == "gpt2":
        per_token, words = 4.554, 1.1542  # raw test split: 283,427 tokens for 1,290,694 bytes, 245,569 words
        data = None
    else:
        data = load_data(Path(OUT) / "cache")
        documents = data.corpus.val
        count = len(data.val) - len(documents)
        per_token = len(text.joined(documents)) / count
        words = count / sum(text.word_count(d) for d in documents)
    nats = math.log(CONVERT)
    bits, word_ppl = nats / math.log(2) / per_token, CONVERT ** words
    print(f"token perplexity {CONVERT:g} on {DATA} with {TOKENIZER} tokens = {nats:.3f} nats a token = "
          f"{bits:.3f} bits a byte = word perplexity {word_ppl:.1f}")
    if DATA == "wikitext2":
        known = ((18.34, "GPT-2 XL without training on it"), (44.3, "the best LSTM with dynamic evaluation"),
                 (55.0, "the best LSTM trained on it alone"), (94.3, "a plain LSTM"),
                 (180.0, "a fair small transformer"))
        below = [what for value, what in known if word_ppl < value]
        print(f"verdict: better than {below[0]}" + (": look for leakage" if word_ppl < 44.3 else "") if below
              else "verdict: worse than a fair small transformer; plausible")
    else:
        floors = text.floors(data.corpus.train, data.corpus.val, Path(OUT) / "cache")
        print(f"verdict: n-gram {floors['ngram']:.3f}, xz {floors['xz']:.3f} bits a byte; "
              + ("below half of both: look for leakage" if bits < 0.5 * min(floors["ngram"], floors["xz"])
                 else "plausible" if bits < 8 else "worse than guessing"))


# ---------------------------------------------------------------- training
def draw_ladder():
    """OUT/lm_ladder.md and .png (and .npy): every stage beside the control that saw as many tokens."""
    rows, lines, done = [], [], 0
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in ("lm_control", *(f"lm_stage{k}" for k in range(4))):
        folder = Path(OUT) / name
        m = json.loads((folder / "metrics.json").read_text())
        history = np.load(sorted(folder.glob("epoch_*/history.npy"))[-1])
        value = {k: v["value"] for k, v in m.items() if isinstance(v, dict)}
        start_at, colour = (0, "0.5") if name == "lm_control" else (done, f"C{name[-1]}")
        log = common.read_log(folder / "log.csv")
        n = min(20, len(log["step"]))
        bits = value["bits_per_byte"] / value["val_loss"] * log["loss"]  # with validation's bytes a token
        smooth = np.convolve(bits, np.ones(n) / n, "valid")
        ax.plot(start_at + log["step"][n - 1:], smooth, lw=0.7, alpha=0.6, color=colour)
        ax.plot(start_at + history[:, 0], history[:, 3], "o", ms=6, color=colour,
                label=f"{name[3:]} {value['bits_per_byte']:.3f}")
        done = 0 if name == "lm_control" else start_at + history[-1, 0]
        rows.append([start_at + history[-1, 0], value["bits_per_byte"], value["token_ppl"],
                     value["word_ppl"]])
        overlapping = value.get("val_bits_per_byte_overlapping", math.nan)  # a run that ended early has none
        lines.append(f"| {name[3:]} | {m['parameters']:,} | {int(rows[-1][0]):,} | "
                     f"{value['bits_per_byte']:.4f} | "
                     f"{overlapping:.4f} | {value['token_ppl']:.2f} | "
                     f"{value['word_ppl']:.0f} | {m['seconds']:.0f} |")
    floor = value["ngram_bits_per_byte"]
    for name, style in (("ngram", "--"), ("bz2", "-."), ("xz", "-")):
        ax.axhline(value[f"{name}_bits_per_byte"], color="k", lw=0.8, ls=style, label=name)
    ax.set(xlabel="optimizer steps in all", ylabel="bits a byte", ylim=(None, 1.2 * max(rows[0][1], floor)),
           title="the ladder: each stage grows from the one before (line: training, dot: validation)")
    ax.legend(fontsize=8, ncols=2)
    save_artifact(Path(OUT), "lm_ladder", rows, figure)
    head = "| run | parameters | steps in all | bits/byte | overlapping | token ppl | word ppl | seconds |\n"
    table = head + "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    (Path(OUT) / "lm_ladder.md").write_text(table)
    print(table)


def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    choices = dict(STAGE=("ladder", "control", "-1", "0", "1", "2", "3"), TOKENIZER=("byte", "bpe", "gpt2"),
                   MU_MODE=("blocks", "plain"), OPT=("muon", "adamw"), POSITIONS=("rope", "learned"),
                   NORM=("rms", "layer"), ACTIVATION=("relu2", "gelu", "swiglu"),
                   PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(allowed)}")
    for name in ("BATCH_SIZE ACCUM DIM DEPTH HEADS MLP_RATIO TAU K1_EVERY GRAPH_K LR LENGTH SAMPLES "
                 "EVAL_EVERY").split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(CONTEXT=(4, 2**20), DROPOUT=(0, 0.99), EMA_DECAY=(0, 1), WEIGHT_DECAY=(0, 10),
                  COOLDOWN=(0, 1), CLIP=(1e-9, math.inf), SEED=(0, 2**63 - 1), K1_ALPHA=(0, 10),
                  K1_KAPPA=(1e-3, 100), GRAPH_RAMP=(0, 1), GRAPH_WINDOW=(0, 2**20), MATCH=(0, 3),
                  TEMPERATURE=(0, 100), TOP_K=(0, 2**20), TOP_P=(1e-9, 1), MIN_P=(0, 1),
                  REP_PENALTY=(0.1, 10), SOFT_CAP=(0, 1000), EPOCHS=(0, 10**9), MAX_STEPS=(0, 10**12),
                  PATIENCE=(0, 10**9), WARMUP=(0, 10**9))
    for name, (low, high) in ranges.items():
        if not low <= globals()[name] <= high:
            fail(f"{name}={globals()[name]} must lie between {low:g} and {high:g}")
    if DIM % HEADS or DIM // HEADS % 2:
        fail(f"DIM={DIM} over HEADS={HEADS} must be a whole, even number, the width of a head")
    if stage_number("3" if STAGE == "ladder" else STAGE) >= 3 and HEADS < 2:
        fail(f"HEADS={HEADS}: stage 3 routes the first half of the heads and needs 2")
    if MU_DIM % 16:
        fail(f"MU_DIM={MU_DIM} does not divide into 16 blocks")
    if CONVERT and CONVERT < 1:
        fail(f"CONVERT={CONVERT:g}: a perplexity is 1 or more")
    if not PROMPTS or not all(PROMPTS):
        fail(f"PROMPTS={PROMPTS!r}: give at least one text, and none that is empty")
    if EPOCHS == 0 and MAX_STEPS == 0:
        fail("EPOCHS=0 and MAX_STEPS=0: give one of them")
    if PATIENCE and world > 1:
        fail(f"PATIENCE={PATIENCE} is for one process: the others would not know that the first one stopped")
    if BATCH_SIZE % world:
        fail(f"BATCH_SIZE={BATCH_SIZE} does not divide over {world} processes")


def prepare(rank=0, world=1):
    """Data and reference rows (the latter on rank 0 only). A mistake in the data ends here, in one line."""
    cache = Path(OUT) / "cache"
    if rank == 0:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot write {cache}: {error.strerror}; give another OUT")
        data = load_data(cache)
        ref = reference(data)
    if world > 1:
        torch.distributed.barrier()
    return (data, ref) if rank == 0 else (load_data(cache), None)


def build_ema(checkpoint, device):
    """The model of a checkpoint, ready to sample."""
    model = build_model(checkpoint["vocabulary"], str(checkpoint["stage"])).to(device)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint")
    return model.eval().requires_grad_(False)


def inference_full(checkpoint, folder, log):
    """Redraw every number and picture of a checkpoint's epoch into `folder`, the same bits as in the run.
    checkpoint: from common.load_checkpoint, its settings already put back (sample.py --full does both)."""
    check_settings()
    device = common.pick_device()
    data, ref = prepare()
    if checkpoint["data"] != data.hash or checkpoint["tokenizer"] != data.tokenizer.state():
        fail(f"the checkpoint was trained on another text or vocabulary than DATA={DATA} gives now")
    step, seconds = checkpoint["step"], checkpoint["seconds"]
    history = [row for row in checkpoint["history"] if row[0] < step]
    loss = next((row[1] for row in checkpoint["history"] if row[0] == step), math.nan)
    so_far = SimpleNamespace(step=step, train_loss=loss, history=history, credit=checkpoint["credit"],
                             log=log, control=control_bits(), last=step == total_steps(data),
                             speed=BATCH_SIZE * ACCUM * CONTEXT * step / seconds if seconds else math.nan)
    return report(folder, build_ema(checkpoint, device), data, ref, so_far)


def save_samples(checkpoint, folder, prompt, count, seed):
    """sample.py: `count` continuations of prompt (empty: a text from its beginning), the first one printed as
    it is written. samples.txt to read, samples.npy the ids, padded with end of text."""
    check_settings()
    device, tokenizer = common.pick_device(), text.Tokenizer.from_state(checkpoint["tokenizer"])
    ids = tokenizer.encode(prompt) or [tokenizer.end]
    if len(ids) > CONTEXT:
        fail(f"the prompt has {len(ids)} tokens, the context of this model CONTEXT={CONTEXT}: shorten it")
    model, decoder = build_ema(checkpoint, device), codecs.getincrementaldecoder("utf-8")("replace")

    def stream(tokens):
        print(decoder.decode(tokenizer.bytes_of[int(tokens[0])]), end="", flush=True)

    print(prompt, end="", flush=True)
    out = sample(model, torch.tensor([ids] * count), LENGTH, seed, tokenizer.end, stream=stream).cpu()
    written = [tokenizer.decode([i for i in row if i != tokenizer.end]) for row in out.tolist()]
    print("\n", *(f"---\n{one}\n" for one in written[1:]), sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.txt").write_text("\n---\n".join(written) + "\n", encoding="utf-8")
    np.save(folder / "samples.npy", out.numpy())


def train_step(handle, model, ema, optimizer, credit, guard, data, step, total, run):
    """One optimizer step on the effective batch: forward and backward ACCUM times, K-1's look at the
    gradients, guard, step, EMA. Returns the mean loss, the learning rate and the gradient norm."""
    batch = draw_batch(data, step, guard.rollbacks)
    torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
    model.train()
    if model.stage >= 3:
        set_pressure(model, step, total)
    lr = set_rates(optimizer, credit, step, total, guard.lr_scale)
    loss_sum = torch.zeros((), device=run.device)
    for micro in batch.chunk(ACCUM):
        mine = micro.chunk(run.world)[run.rank].to(run.device)  # each process takes its share
        with autocast(run.device, PRECISION):
            loss = loss_fn(handle, mine)
            if MU_GRAM and model.stage >= 0:
                loss = loss + MU_GRAM * gram_penalty(model.embed)
        (loss / ACCUM).backward()
        loss_sum += loss.detach()
    if run.world > 1:
        torch.distributed.all_reduce(loss_sum)
    loss = float(loss_sum) / (ACCUM * run.world)
    if model.stage >= 2 and step % K1_EVERY == 0:
        credit.observe()
    norm, taken = guarded_step(optimizer, list(model.parameters()), guard, loss, CLIP)
    if taken:
        ema_update(ema, model, EMA_DECAY, step)
    return loss, lr, norm


def control_bits():
    """Bits per byte of the control that ran beside this stage, or None."""
    if stage_number() < 0:
        return None
    try:
        table = json.loads((Path(OUT) / "lm_control" / "metrics.json").read_text())
        return table["bits_per_byte"]["value"]
    except (OSError, ValueError, KeyError):
        return None


def train(before=None):
    """One stage from its start, or from where it stopped, to its end. before: what this returned for the
    stage before, whose text and signal go on. Returns (run, data, ref)."""
    free = "EVAL_EVERY SAVE_SECONDS TENSORBOARD COMPILE PREFLIGHT DIAGNOSE OVERRULE CONVERT PATIENCE "
    free += "EXPERIMENT TEMPERATURE TOP_K TOP_P MIN_P REP_PENALTY LENGTH SAMPLES PROMPTS"  # not in training
    name = "lm_control" if stage_number() < 0 else f"lm_stage{STAGE}"
    run = start(__file__, globals(), free.split(), name)
    if before is not None:
        run.signal = before[0].signal  # it may have come between two stages
    data, ref = before[1:] if before is not None else prepare(run.rank, run.world)
    torch.manual_seed(SEED)
    model = build_model(data.V).to(run.device)
    parent = parent_of() if run.checkpoint is None else None
    optimizer, credit, guard = build_optimizer(model), Credit(model), Guard()
    if parent is not None:
        check_parent(parent, data)
        grow(model, parent["ema"], "INIT_FROM")
        optimizer.load_state_dict(parent["optimizer"])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    at = SimpleNamespace(step=0, reported=0, best=math.inf, best_step=0, seconds=0.0, history=[], credit=[])
    per_epoch, total = steps_per_epoch(data), total_steps(data)
    last, log = run.folder / "last.pt", run.folder / "log.csv"

    def save(path):
        return common.save_checkpoint(
            path, run, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            guard=dict(vars(guard)), scores=dict(credit.scores), seen=credit.seen, **vars(at),
            stage=model.stage, vocabulary=data.V, tokenizer=data.tokenizer.state(), data=data.hash)

    def save_last():
        return save(last) if guard.healthy or at.step >= total else True

    def restore(saved):
        common.restore(saved, model, ema, optimizer, guard)
        credit.scores, credit.seen = dict(saved["scores"]), saved["seen"]
        vars(at).update({k: copy.copy(saved[k]) for k in vars(at)})

    if run.checkpoint is not None:
        if run.checkpoint["data"] != data.hash or run.checkpoint["tokenizer"] != data.tokenizer.state():
            fail(f"{run.folder} was trained on another text or vocabulary; RESUME=False or another OUT")
        restore(run.checkpoint)
        run.checkpoint = None
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
        floors = ", ".join(f"{k} {ref.floors[k]:.3f}" for k in ("ngram", "bz2", "xz"))
        print(f"{data.corpus.facts}\n{data.tokenizer.facts}\n{name}: {parameters:,} parameters, {per_epoch} "
              f"steps an epoch, {total} in all; bits/byte of {floors}")
        unigram = unigram_nats(data)
        if at.step == 0:
            with run.evaluation():  # before hours are spent: checks, and how it writes untrained
                folder = run.folder / "epoch_0000"
                folder.mkdir(exist_ok=True)
                rows, _ = preflight(ema, data, total, fast=True) if PREFLIGHT else ((), None)
                (folder / "diagnose.txt").write_text("".join(line + "\n" for _, _, line in rows))
                print("pre-flight:", ", ".join(f"{number} {status}" for number, status, _ in rows) or "none")
                failed = [line for _, status, line in rows if status == "FAIL"]
                if failed and not OVERRULE:
                    fail(f"{failed[0]}; OVERRULE=True trains all the same")
                draw_samples(folder, ema, data)
        if parent is not None:
            with torch.no_grad():
                old = build_model(data.V, str(parent["stage"])).to(run.device).eval()
                old.load_state_dict(parent["ema"])
                ids = torch.from_numpy(np.asarray(data.val[:CONTEXT]).astype(np.int64))[None].to(run.device)
                moved = float((old(ids) - ema(ids)).abs().max())
            print(f"grown from stage {parent['stage']} (step {parent['step']}): logits moved by {moved:.1g}")
            if moved > 1e-4 and parent["stage"] < model.stage:
                fail(f"stage {model.stage} is not the same function as stage {parent['stage']} at the switch")
        save(last)
    bar = tqdm(total=total, initial=at.step, disable=True if run.rank else None, dynamic_ncols=True)
    losses, saved_at, clock, earlier, written = [], time.monotonic(), time.monotonic(), at.seconds, True

    while not run.stopping():
        epoch = -(-at.step // per_epoch)
        due = at.step == total or at.step % per_epoch == 0 and epoch % EVAL_EVERY == 0
        if due and at.step > at.reported:
            if run.rank == 0:
                save_last()
                folder, paused, metrics = run.folder / f"epoch_{epoch:04d}", time.monotonic(), None
                so_far = SimpleNamespace(
                    step=at.step, train_loss=float(common.read_log(log)["loss"][-100:].mean()), log=log,
                    history=at.history, credit=at.credit, control=control_bits(), last=at.step == total,
                    speed=BATCH_SIZE * ACCUM * CONTEXT * at.step / at.seconds)
                with run.evaluation():
                    metrics = report(folder, ema, data, ref, so_far, board)
                    facts = dict(seconds=round(at.seconds, 1), parameters=parameters)
                    common.save_metrics(run, folder, metrics, **facts)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue
                if metrics is not None:
                    at.history = [*at.history, [at.step, so_far.train_loss, metrics["val_loss"]["value"]]]
            at.reported = at.step
            if run.rank == 0 and metrics is not None:
                tqdm.write(f"epoch {epoch}: {summary(metrics)}")
                if metrics["val_loss"]["value"] < at.best:
                    at.best, at.best_step = float(metrics["val_loss"]["value"]), at.step
                    save(run.folder / "best.pt")
                written = save_last()
            continue
        if at.step >= total:
            break
        worse = (at.step - at.best_step) / per_epoch  # epochs
        if PATIENCE and at.reported == at.step and worse >= PATIENCE * EVAL_EVERY:
            tqdm.write(f"no better for {PATIENCE} reports: stopped; best.pt is step {at.best_step}")
            break

        loss, lr, norm = train_step(handle, model, ema, optimizer, credit, guard, data, at.step, total, run)
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
                       skipped=guard.skipped,
                       tokens_per_s=BATCH_SIZE * ACCUM * CONTEXT * at.step / at.seconds, seconds=at.seconds)
        if model.stage >= 2 and at.step % max(K1_EVERY, total // 200) == 0:
            at.credit = [*at.credit, [at.step, *credit.credits().values(), *credit.multipliers().values()]]
        if at.step == 200 and np.mean(losses[-20:]) > unigram:
            tqdm.write(f"WARN  16 loss {np.mean(losses[-20:]):.3f} after 200 steps: counting tokens alone "
                       f"gives {unigram:.3f}")
        bar.update(1)
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", lr=f"{lr:.1e}", refresh=False)
        if time.monotonic() - saved_at > SAVE_SECONDS:
            save_last()
            saved_at = time.monotonic()

    bar.close()
    del handle
    if run.rank == 0 and run.signal:
        save_last()
        print(f"stopped by signal {run.signal} after step {at.step}; start again to continue", flush=True)
    elif run.rank == 0 and not written:
        fail(f"the run is complete but its last checkpoint is not: make room and start again to write {last}")
    return run, data, ref


def main():
    check_settings(int(os.environ.get("WORLD_SIZE", 1)))
    if CONVERT:
        return convert()
    if DIAGNOSE:
        return diagnose()
    plan = [dict(STAGE=STAGE)]
    if STAGE == "ladder":  # the control sees as many tokens as all four stages together
        plan = [dict(STAGE="control", EPOCHS=4 * EPOCHS, MAX_STEPS=4 * MAX_STEPS, EVAL_EVERY=2 * EVAL_EVERY),
                *(dict(STAGE=stage) for stage in "0123")]
    before = None
    for stage in plan:
        with changed(**stage):
            before = train(before)
        run = before[0]
        if run.signal:
            break
    if STAGE == "ladder" and run.rank == 0 and not run.signal:
        draw_ladder()
    common.finish(run)
    if run.signal:
        sys.exit(128 + run.signal)


if __name__ == "__main__":
    override(globals())
    main()
