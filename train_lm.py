"""
A language model grown in stages, in one file: a small causal transformer that cannot see the future.

    L    = -mean log p(token_{i+1} | token_1..i)           bits per byte = sum of nats / (ln 2 * bytes)
    S_i  = W_sem [sigmoid(gate[tok_i, n]) rms(E[tok_i, n])]_n        stage 0, MU: 16 blocks a token
    S_i += W_tmp (E_t[tok_i] + W_phi phi(how often, how long ago tok_i was seen))     stage 1, TEMPORAL
    lr_g = lr (1 + r (m_g - 1)),  m_g ~ (credit_g / share of parameters)^K1_ALPHA     stage 2, K-1
    attention of half the heads along typed edges only, + beta[head, type]           stage 3, graph routing
    x <- x + W_o attention(rms(x));  x <- x + W_down relu(W_up rms(x))^2;  logits = 15 tanh(W_head rms(x) / 15)

Every stage starts as exactly the function of the stage below (logits unchanged at the switch) and is compared
with a plain transformer of as many parameters: the control. No perplexity is reported before a leak check.

    python train_lm.py                                  # control, then stages 0 to 3, from the Python docs
    python train_lm.py --stage 0 --epochs 3 --batch-size 16 --max-steps 1000       # the lab notes' command
    python train_lm.py DIAGNOSE=True                    # the pre-flight alone: 17 checks, about a minute
    python train_lm.py STAGE=1 DATA=my_texts/ TOKENIZER=byte CONTEXT=256
    python -m data.text prepare shakespeare; python train_lm.py EXPERIMENT=shakespeare STAGE=0
    python sample.py --checkpoint runs/lm_stage3/last.pt --prompt "The with statement"

Letters: B batch, T positions, V vocabulary, H heads, N = 16 blocks; ids (B, T) token numbers.
Not here: fused kernels, mixture of experts, fine-tuning on instructions, data that do not fit a disk.
Sources: Su 2021 (RoPE), Henry 2020 (QK-norm), So 2021 (relu^2), Zhou 2024 (value residual), Jordan 2024
(Muon), Gemma 2 2024 (soft cap). MU, TEMPORAL, K-1 and the graph are the lab notes' own, made causal.
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
from einops import rearrange
from tqdm import tqdm

import common
from common import Guard, ema_update, fail, guarded_step, override, save_artifact, seed_of, start
from data import text
from model_dit import MLP, Attention, KVCache, attend, causal_mask, rms, rotation

# ---------------------------------------------------------------- settings: edit here, or give NAME=value
STAGE = "ladder"     # 0 MU, 1 +TEMPORAL, 2 +K-1, 3 +graph; control (or -1): plain; ladder: control, then 0 to 3
INIT_FROM = "below"  # stages 1 to 3 grow from the stage below in OUT; or a checkpoint; or "scratch"
DATA = "pydoc"       # the Python installation's own documentation; a text file or folder; shakespeare, wikitext2
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
MLP_RATIO = 4        # hidden width of the MLP in units of DIM
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

EXPERIMENTS = {  # then the command line wins over the row
    "nanogpt_cpu": dict(DATA="shakespeare", TOKENIZER="byte", DIM=128, MU_DIM=128, DEPTH=4, HEADS=4, CONTEXT=64,
                        BATCH_SIZE=12, EPOCHS=0, MAX_STEPS=2000, STAGE="0"),
    "shakespeare": dict(DATA="shakespeare", TOKENIZER="byte", DIM=384, MU_DIM=384, DEPTH=6, HEADS=6, CONTEXT=256,
                        BATCH_SIZE=64, EPOCHS=0, MAX_STEPS=5000, DROPOUT=0.2, WEIGHT_DECAY=0.1, STAGE="0"),
    "wikitext2": dict(DATA="wikitext2", VOCAB=8192, DIM=512, MU_DIM=512, DEPTH=8, HEADS=8, CONTEXT=512,
                      BATCH_SIZE=32, EPOCHS=20, DROPOUT=0.3, WEIGHT_DECAY=0.4, STAGE="0"),
    # the shapes of the lab notes, in causal form; on WikiText-2 with GPT-2's tokens
    "seed_current": dict(DATA="wikitext2", TOKENIZER="gpt2", DIM=256, MU_DIM=64, DEPTH=6, HEADS=4, CONTEXT=256,
                         TAU=32, STAGE="0"),
    "seed_fixed": dict(DATA="wikitext2", TOKENIZER="gpt2", DIM=1024, MU_DIM=512, DEPTH=6, HEADS=8, CONTEXT=256,
                       TAU=128, MU_MODE="plain", STAGE="0"),
}


# ---------------------------------------------------------------- data
def load_data(cache):
    """The corpus, its tokenizer, its tokens (train, val, test: arrays) and what trivial predictors achieve."""
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


def windows_per_epoch(data):
    """One window less than fit, so that the windows of an epoch can start anywhere in the first one."""
    return (len(data.train) - 1) // CONTEXT - 1


def steps_per_epoch(data):
    return max(1, windows_per_epoch(data) // (BATCH_SIZE * ACCUM))


def total_steps(data):
    return min(EPOCHS * steps_per_epoch(data) or math.inf, MAX_STEPS or math.inf)


def generator_of(*parts):
    """A CPU generator seeded by its place in the run."""
    return torch.Generator().manual_seed(seed_of(*parts))


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
    """Stage 0: a token is 16 blocks of MU_DIM/16 numbers, each normalised and gated, then joined by W_sem. The
    names the lab notes give the blocks are labels; nothing trains them to mean that."""
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
        """What the graph compares: blocks I, R2, K (plain: everything) as a unit vector, (B, T, k), detached."""
        u = self.blocks(ids).detach()
        u = u if self.gate is None else u[:, :, [self.names.index(n) for n in ("I", "R2", "K")]]
        return F.normalize(u.flatten(2).float(), dim=-1)


def recency(ids, new):
    """phi (B, new, 8) of the last `new` positions of ids (B, T): for each token how often it occurred before in
    its own window and how long ago; from the past alone. Time2Vec-like waves of log2 of the distance."""
    i = torch.arange(ids.shape[1] - new, ids.shape[1], device=ids.device)
    j = torch.arange(ids.shape[1], device=ids.device)
    same = (ids[:, -new:, None] == ids[:, None]) & (j < i[:, None])  # (B, new, T)
    count = same.sum(-1)
    last = torch.where(same, j, -1).amax(-1)
    u = (count > 0).float()
    distance = u * torch.log2(1 + (i - last).float()) / 10
    wave = 2 * math.pi * distance
    place = (torch.log2(1 + i.float()) / 10).expand_as(u)
    return torch.stack([u, distance, u * wave.sin(), u * wave.cos(), u * (2 * wave).sin(), u * (2 * wave).cos(),
                        torch.log2(1 + count.float()) / 10, place], -1)


class Temporal(nn.Module):
    """Stage 1: what a token means depends on when it was last seen. Table and W_phi start at zero, so the switch
    changes nothing; W_tmp does not, or two zero factors would never move."""

    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, TAU)
        self.phi = nn.Linear(8, TAU, bias=False)
        self.join = nn.Linear(TAU, DIM, bias=False)  # W_tmp

    def forward(self, ids, new):
        return self.join(self.table(ids[:, -new:]) + self.phi(recency(ids, new)))


EDGES = "none window fibonacci semantic successor".split()  # edge types of the graph


def edges(u, new):
    """Stage 3: the types (B, new, T) uint8 of the edges of the last `new` positions i to all j <= i, from unit
    vectors u (B, T, k); first match wins. 1 the last GRAPH_WINDOW positions and itself; 2 Fibonacci distances;
    3 the GRAPH_K most similar earlier positions; 4 what FOLLOWED the GRAPH_K most similar positions."""
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
    """x + attention, x + MLP. From the second layer on, values are mixed with the first layer's (Zhou 2024)."""

    def __init__(self, hidden, first, routed):
        super().__init__()
        self.norm_1, self.norm_2 = build_norm(), build_norm()
        self.attn = Attention(DIM, HEADS, qk_norm=QK_NORM)
        self.mlp = MLP(DIM, hidden, ACTIVATION)
        self.mix = nn.Parameter(torch.tensor(0.5)) if VALUE_RESIDUAL and not first else None
        self.beta = nn.Parameter(torch.zeros(HEADS // 2, len(EDGES) - 1)) if routed else None
        self.drop = nn.Dropout(DROPOUT)

    def route(self, q, k, v, mask, kinds, pressure):
        """The first half of the heads along edges: + beta[head, type] on one, - pressure elsewhere, and from
        pressure 30 on nothing else at all. |q.k|/sqrt(d) is bounded by QK-norm, so that this last switch is
        invisible. kinds (B, Nq, Nk) types."""
        half = HEADS // 2
        table = torch.cat([self.beta.new_full((half, 1), -pressure), self.beta], 1)
        bias = (F.one_hot(kinds.long(), len(EDGES)).to(table) @ table.T).movedim(-1, 1)  # (B, H/2, Nq, Nk)
        seen = (mask if pressure < 30 else mask & (kinds > 0))[:, None] if mask.ndim == 3 or pressure >= 30 else mask
        bias = bias.masked_fill(~seen, -math.inf)
        return torch.cat([attend(q[:, :half], k[:, :half], v[:, :half], bias.to(q.dtype)),
                          attend(q[:, half:], k[:, half:], v[:, half:], mask)], 1)

    def forward(self, x, turn, mask, v_1=None, kinds=None, pressure=0.0, cache=None):
        """x (B, n, DIM), mask (n, T) bool. Returns x and the first layer's values."""
        q, k, v = self.attn.qkv(self.norm_1(x), turn)  # (B, H, n, head_dim)
        new = v if v_1 is None else v_1
        if self.mix is not None:
            v = self.mix * v + (1 - self.mix) * v_1
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask) if kinds is None else self.route(q, k, v, mask, kinds, pressure)
        x = x + self.drop(self.attn.merge(y))
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
        """Matrices 1/sqrt(inputs); the last one of every branch and the head zero, so the first loss is ln V."""
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
        """Logits (B, T, V); or with targets (B, T) the mean loss. memory: a Memory of what came before ids; then
        the logits are those of the new positions alone."""
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
    """Mean cross-entropy of soft_cap(x W^T), a few rows at a time, with its gradient on the way: the logits of the
    whole batch, the largest tensor of a small model by far, never exist. x (B, T, DIM), weight (V, DIM), targets
    (B, T)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, x, weight, targets):
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        rows, w, y = x.flatten(0, 1), weight.to(low), targets.flatten()
        dx, dw, loss = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros((), device=x.device)
        size = max(16, 2**20 // len(weight))
        for i in range(0, len(rows), size):
            h, target = rows[i:i + size].to(low), y[i:i + size, None]
            z = (h @ w.T).float()
            if SOFT_CAP:
                z = z.div_(SOFT_CAP).tanh_().mul_(SOFT_CAP)
            loss += (z.logsumexp(1) - z.gather(1, target)[:, 0]).sum()
            p = z.softmax(1)
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            if SOFT_CAP:
                p.mul_(1 - (z / SOFT_CAP).square_())
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


def autocast(device):
    """bf16 inside the products where asked for, or where the hardware has it; losses and logits stay fp32."""
    if PRECISION == "auto":
        on = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
              "cpu": torch.cpu._is_avx512_bf16_supported}.get(device.type, bool)()
    else:
        on = PRECISION == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


# ---------------------------------------------------------------- method: loss, Muon, K-1
def loss_fn(model, ids):
    """Mean nats a token: ids (B, T + 1), every target once."""
    return model(ids[:, :-1], targets=ids[:, 1:])


def gram_penalty(mu):
    """|Gram - I|^2 of the cosines of the 16 block means: blocks that say the same thing cost."""
    mean = F.normalize(mu.blocks(torch.arange(mu.table.num_embeddings, device=mu.table.weight.device)[None])
                       .mean((0, 1)), dim=-1)
    return (mean @ mean.T - torch.eye(16, device=mean.device)).square().sum()


def orthogonalise(g, steps=5):
    """The nearest matrix with all singular values near one, for a stack g (n, rows, columns): five rounds of the
    quintic Newton-Schulz iteration (Jordan 2024). fp32 where the hardware has no bf16 products."""
    x = g.to(torch.bfloat16) if torch.is_autocast_enabled(g.device.type) else g
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024): w <- w (1 - lr wd) - lr sqrt(max(1, rows/columns)) O, where O is
    the orthogonalised Nesterov momentum. All matrices of one shape in one batched product, in whatever group
    they are; torch.optim.Muon takes them one by one."""

    def __init__(self, groups, weight_decay, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        shapes = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    shapes.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"]), group))
        for (rows, columns), members in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update, _ in members]))
            for (p, _, group), update in zip(members, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


class Optimizers:
    """Muon for the matrices inside, AdamW for embeddings, head and scalars, behind one step(). Groups are the
    leaves of K-1's tree; each knows its ratio to LR. State by parameter name, so that a stage can inherit it."""

    def __init__(self, model):
        self.names = dict(model.named_parameters())
        muon, adam = {}, {}
        for name, p in self.names.items():
            leaf = leaf_of(name)
            inside = p.ndim == 2 and leaf.startswith("blocks") and not name.endswith("beta") or name == "embed.join.weight"
            if inside and OPT == "muon":
                muon.setdefault((leaf, 1.0), []).append(p)
            else:
                ratio = (1.0 if inside or OPT == "adamw" else 0.4 if leaf == "head"
                         else 1.0 if name.startswith("embed") else 0.5)
                adam.setdefault((leaf, ratio, WEIGHT_DECAY if inside else 0.0), []).append(p)
        self.parts = [torch.optim.AdamW([dict(params=p, leaf=k[0], ratio=k[1], weight_decay=k[2])
                                         for k, p in adam.items()], 0.0, (0.8, 0.95), 1e-10, fused=True)]
        if muon:
            self.parts.append(Muon([dict(params=p, leaf=k[0], ratio=k[1]) for k, p in muon.items()], WEIGHT_DECAY))

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: dict(part.state[p]) for part in self.parts for name, p in self.names.items() if p in part.state}

    def load_state_dict(self, state):
        """Parameters without a saved state start afresh; a state of another shape is a ValueError."""
        for part in self.parts:
            mine = {p for group in part.param_groups for p in group["params"]}
            for name, p in self.names.items():
                if p in mine and name in state:
                    for key, value in state[name].items():
                        if value.ndim and value.shape != p.shape:
                            raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {tuple(p.shape)}")
                    part.state[p] = {k: v.to(p.device).clone() for k, v in state[name].items()}


def leaf_of(name):
    """The leaf of K-1's tree a parameter belongs to: embed, blocks/3/attn, blocks/3/mlp or head."""
    part = name.split(".")
    if part[0] == "blocks":
        return f"blocks/{part[1]}/{'mlp' if part[2] in ('mlp', 'norm_2') else 'attn'}"
    return "head" if part[0] in ("head", "norm_out") else "embed"


class Credit:
    """
    Stage 2, K-1: hierarchical credit, on the UPDATES (scaled gradients would be undone by Adam and Muon).

    Leaf score s = sum |grad| (|w| + 0.02), averaged over time; an inner node sums its children; going down the
    tree root > {embed, blocks, head}, blocks > layer > {attn, mlp} credit divides as S^(1/kappa), so that it
    sums to one. Density = credit / share of the parameters; multiplier = clip(z density^alpha, 0.1, 3) with z
    such that their parameter-weighted mean is 1: no hidden change of the learning rate.
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
        """Look at the gradients of one step."""
        for leaf, ps in self.leaves.items():
            score = float(sum((p.grad.abs() * (p.abs() + 0.02)).sum() for p in ps if p.grad is not None))
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
    warmup = min(WARMUP, max(1, total // 10))
    return min(1.0, (step + 1) / warmup, (total - step) / max(1.0, COOLDOWN * total))


def set_rates(optimizer, credit, step, total, scale=1.0):
    """Every group's learning rate: its ratio to LR, the schedule, and from stage 2 on K-1's multiplier, which
    comes in slowly: with a zero head only the head has a gradient at first and would take all the credit."""
    r = min(1.0, max(0.0, (step - K1_DELAY) / max(1, K1_DELAY))) if stage_number() >= 2 else 0.0
    m = credit.multipliers() if r > 0 else {}
    for group in optimizer.param_groups:
        group["lr"] = LR * group["ratio"] * rate(step, total) * scale * (1 + r * (m.get(group["leaf"], 1.0) - 1))
    return LR * rate(step, total) * scale


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
        fail(f"INIT_FROM: the checkpoint has {parent['vocabulary']} tokens of {parent['settings']['TOKENIZER']} "
             f"(VOCAB={parent['settings']['VOCAB']}), this run {data.V} of {TOKENIZER}; they must be the same")


# ---------------------------------------------------------------- sampling
def choose(logits, before, generator, temperature=None):
    """One token a row from logits (B, V), given the tokens before (B, n): repetition penalty (Keskar 2019) over
    the last 64, temperature, top-k, top-p (Holtzman 2020), min-p (2407.01082), then a draw."""
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
    Returns ids (B, P + n), n <= length; after `end` a row is filled with it. A full window goes on from its last
    half. Raises ValueError for a prompt that is empty or longer than the context.
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
        with autocast(device):
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
    Does anything look ahead? Tokens from position p on are replaced; nothing before p may change.
    Returns (largest change of a logit before p, over all p and ids (B, T); name of the first module whose output
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
            other[:, p:] = (ids[:, p:] + 1 + torch.arange(ids.shape[1] - p, device=ids.device) % 7) % model.vocabulary
            changed, after = run(other)
            worst = max(worst, float((changed - logits)[:, :p].abs().max()))
            for (name, a), (_, b) in zip(before, after):
                if not culprit and a.ndim == 3 and a.shape[:2] == ids.shape and (a - b)[:, :p].abs().max() > 1e-5:
                    culprit = name
    finally:
        for hook in hooks:
            hook.remove()
    return worst, culprit


@torch.no_grad()
def score(model, tokens, stride, batch=32):
    """nats (N - 1,) of the targets tokens[1:], each exactly once, and their positions in the window that scored
    them (N - 1,). Windows of CONTEXT every `stride` tokens; a window scores what none before it did, so stride =
    CONTEXT/2 gives every target at least half a window of context (but the first)."""
    device = next(model.parameters()).device
    N, nats, place = len(tokens), np.zeros(len(tokens) - 1), np.zeros(len(tokens) - 1, np.int64)
    starts = [*range(0, N - 1 - CONTEXT, stride), N - 1 - CONTEXT]  # the last one ends with the text
    done = 0
    for i in range(0, len(starts), batch):
        some = starts[i:i + batch]
        ids = torch.from_numpy(np.stack([tokens[s:s + CONTEXT + 1] for s in some]).astype(np.int64)).to(device)
        with autocast(device):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(some), -1)
        for s, row in zip(some, loss.double().cpu().numpy()):
            nats[done:s + CONTEXT] = row[done - s:]
            place[done:s + CONTEXT] = np.arange(done - s, CONTEXT)
            done = s + CONTEXT
    return nats, place


def units(nats, targets, tokenizer, documents):
    """Sums over targets other than end-of-text, which has no bytes: dict of nats a token, bits a byte, token and
    word perplexity. Words are the blanks' and one for every end of line, as published for WikiText-2."""
    lengths = tokenizer.byte_lengths[targets]
    real, words = lengths > 0, sum(text.word_count(d) for d in documents)
    total = float(nats[real].sum())
    return dict(nats=total / int(real.sum()), bits_per_byte=total / math.log(2) / int(lengths.sum()),
                token_ppl=math.exp(min(700, total / int(real.sum()))), word_ppl=math.exp(min(700, total / words)))


def forecast(history):
    """Optimizer step at which the validation loss is expected to turn: the training loss falls as a - b log(step)
    and the gap to validation grows as c + d step, so their sum is least at b/d. nan before it can be said.
    history: rows of (step, train nats, val nats)."""
    rows = np.array([row for row in history if row[0] > 0 and math.isfinite(row[1])])
    if len(rows) < 3:
        return math.nan
    step, train, val = rows[-max(3, len(rows) // 2):, :3].T
    b, d = -np.polyfit(np.log(step), train, 1)[0], np.polyfit(step, val - train, 1)[0]
    return float(b / d) if b > 0 and d > 0 else math.nan


def continuations(model, data, count, seed):
    """Texts that continue held-out pieces, and human ones of the same number and length: what the quality card
    compares. Returns (samples, prompts, human)."""
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
    """What every report stands beside: floors of the validation split, lexicon, n-gram, all from the train split."""
    found = text.floors(data.corpus.train, data.corpus.val, Path(OUT) / "cache")
    train = text.joined(data.corpus.train)
    return SimpleNamespace(floors=found, index=text.Index(data.corpus.train),
                           ngram=text.NGram(train, int(found["ngram_order"])))


def evaluate(model, data, ref, history=(), control=None, speed=math.nan, last=False):
    """Every number of a report beside its floor and, where it exists, what human text gets. Returns (metrics,
    arrays for the pictures). Exits when the model sees the future: its perplexity would mean nothing."""
    ids = torch.from_numpy(data.val[:4 * CONTEXT].astype(np.int64)).view(4, CONTEXT).to(next(model.parameters()).device)
    change, culprit = leak(awake(model), ids)
    if change > 1e-4 and not OVERRULE:
        fail(f"the model sees the future: changed tokens move earlier logits by {change:.2g}, first in {culprit}; "
             "no perplexity is reported")
    nats, place = score(model, data.val, CONTEXT)
    unit = units(nats, data.val[1:], data.tokenizer, data.corpus.val)
    floors, n = ref.floors, int(sum(len(text.text_bytes(d)) for d in data.corpus.val))
    metrics = {}

    def add(name, value, better, floor=None, ceiling=None, n=n):
        metrics[name] = dict(value=value, floor=floor, ceiling=ceiling, better=better, n=n)

    add("bits_per_byte", unit["bits_per_byte"], "lower", floor=floors["xz"])
    for name in ("unigram", "ngram", "zlib", "bz2", "xz"):
        add(f"{name}_bits_per_byte", floors[name], "lower", floor=8.0)
    add("control_bits_per_byte", control, "lower", floor=floors["xz"])
    add("val_loss", unit["nats"], "lower", floor=math.log(data.V))
    add("token_ppl", unit["token_ppl"], "lower", floor=float(data.V))
    add("word_ppl", unit["word_ppl"], "lower")
    add("leak", change, "lower", floor=0.0)
    add("turning_step", forecast(history), None)
    add("tokens_per_s", speed, "higher")
    if last:  # overlapping windows: every target has at least half a window before it
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
            f"word ppl {m['word_ppl']:.0f}, distinct-2 {m['distinct_2']:.2f}, real words {m['real_words']:.2f}")


def report(folder, model, data, ref, history, log=None, board=None, control=None, speed=math.nan, last=False,
           credit=()):
    """Every number, picture and array of one epoch folder. Returns the metrics."""
    metrics, arrays = evaluate(model, data, ref, history, control, speed, last)
    folder.mkdir(parents=True, exist_ok=True)
    draw_samples(folder, model, data)
    draw_loss(folder, history, metrics, log)
    common.save_metrics(None, folder, metrics)
    if board is not None:
        for name, m in metrics.items():
            if m["value"] is not None:
                board.add_scalar(f"eval/{name}", m["value"], int(folder.name[6:]))
    return metrics


def draw_samples(folder, model, data):
    pass


def draw_loss(folder, history, metrics, log):
    pass


# ---------------------------------------------------------------- training
def check_settings(world=1):
    """One line for a value that cannot work, before anything is written."""
    choices = dict(STAGE=("ladder", "control", "-1", "0", "1", "2", "3"), TOKENIZER=("byte", "bpe", "gpt2"),
                   MU_MODE=("blocks", "plain"), OPT=("muon", "adamw"), POSITIONS=("rope", "learned"),
                   NORM=("rms", "layer"), ACTIVATION=("relu2", "gelu", "swiglu"), PRECISION=("auto", "bf16", "fp32"))
    for name, allowed in choices.items():
        if globals()[name] not in allowed:
            fail(f"{name}={globals()[name]!r}: one of {', '.join(allowed)}")
    for name in "BATCH_SIZE ACCUM DIM DEPTH HEADS MLP_RATIO TAU K1_EVERY GRAPH_K LR LENGTH SAMPLES EVAL_EVERY".split():
        if globals()[name] <= 0:
            fail(f"{name}={globals()[name]} must be above 0")
    ranges = dict(CONTEXT=(4, 2**20), DROPOUT=(0, 0.99), EMA_DECAY=(0, 1), WEIGHT_DECAY=(0, 10), COOLDOWN=(0, 1),
                  CLIP=(1e-9, math.inf), SEED=(0, 2**63 - 1), K1_ALPHA=(0, 10), K1_KAPPA=(1e-3, 100),
                  GRAPH_RAMP=(0, 1), GRAPH_WINDOW=(0, 2**20), MATCH=(0, 3), TEMPERATURE=(0, 100), TOP_K=(0, 2**20),
                  TOP_P=(1e-9, 1), MIN_P=(0, 1), REP_PENALTY=(0.1, 10), SOFT_CAP=(0, 1000), EPOCHS=(0, 10**9),
                  MAX_STEPS=(0, 10**12), PATIENCE=(0, 10**9))
    for name, (low, high) in ranges.items():
        if not low <= globals()[name] <= high:
            fail(f"{name}={globals()[name]} must lie between {low:g} and {high:g}")
    if DIM % HEADS or DIM // HEADS % 2:
        fail(f"DIM={DIM} over HEADS={HEADS} must be a whole, even number, the width of a head")
    if stage_number("3" if STAGE == "ladder" else STAGE) >= 3 and HEADS < 2:
        fail(f"HEADS={HEADS}: stage 3 routes the first half of the heads and needs 2")
    if MU_DIM % 16:
        fail(f"MU_DIM={MU_DIM} does not divide into 16 blocks")
    if EPOCHS == 0 and MAX_STEPS == 0:
        fail("EPOCHS=0 and MAX_STEPS=0: give one of them")
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
    model = build_model(checkpoint["vocabulary"], str(checkpoint["stage"])).to(device).eval().requires_grad_(False)
    common.load_strictly(model, checkpoint["ema"], "the checkpoint")
    return model


def train_step(handle, model, ema, optimizer, credit, guard, data, step, total, run):
    """One optimizer step on the effective batch: forward and backward ACCUM times, K-1's look at the gradients,
    guard, step, EMA. Returns the mean loss, the learning rate and the gradient norm."""
    batch = draw_batch(data, step, guard.rollbacks)
    torch.manual_seed(seed_of(SEED, "dropout", step, guard.rollbacks, run.rank))
    model.train()
    if model.stage >= 3:
        set_pressure(model, step, total)
    lr = set_rates(optimizer, credit, step, total, guard.lr_scale)
    loss_sum = torch.zeros((), device=run.device)
    for micro in batch.chunk(ACCUM):
        mine = micro.chunk(run.world)[run.rank].to(run.device)  # each process takes its share
        with autocast(run.device):
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
        table = common.json.loads((Path(OUT) / "lm_control" / "metrics.json").read_text())
        return table["bits_per_byte"]["value"]
    except (OSError, ValueError, KeyError):
        return None


def train():
    """One stage from its start, or from where it stopped, to its end. Returns the run."""
    free = ("EVAL_EVERY SAVE_SECONDS TENSORBOARD COMPILE PREFLIGHT DIAGNOSE OVERRULE CONVERT TEMPERATURE TOP_K TOP_P "
            "MIN_P REP_PENALTY LENGTH SAMPLES PROMPTS PATIENCE EXPERIMENT").split()  # no part in training
    name = "lm_control" if stage_number() < 0 else f"lm_stage{STAGE}"
    run = start(__file__, globals(), free, name)
    data, ref = prepare(run.rank, run.world)
    torch.manual_seed(SEED)
    model = build_model(data.V).to(run.device)
    parent = parent_of() if run.checkpoint is None else None
    optimizer, credit, guard = Optimizers(model), Credit(model), Guard()
    if parent is not None:
        check_parent(parent, data)
        grow(model, parent["ema"], "INIT_FROM")
        optimizer.load_state_dict(parent["optimizer"])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    at = SimpleNamespace(step=0, reported=-1, best=math.inf, best_step=0, seconds=0.0, history=[], multipliers=[])
    per_epoch, total = steps_per_epoch(data), total_steps(data)
    last, log = run.folder / "last.pt", run.folder / "log.csv"

    def save(path):
        return common.save_checkpoint(
            path, run, model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            guard=dict(vars(guard)), credit=[credit.scores, credit.seen], **vars(at), stage=model.stage,
            vocabulary=data.V, tokenizer=data.tokenizer.state(), data=data.hash)

    def save_last():
        return save(last) if guard.healthy or at.step >= total else True

    def restore(saved):
        common.load_strictly(model, saved["model"], "last.pt")
        common.load_strictly(ema, saved["ema"], "last.pt (EMA)")
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, ValueError) as error:
            fail(f"last.pt: the optimizer state does not fit this network: {error}")
        vars(guard).update(saved["guard"])
        credit.scores, credit.seen = dict(saved["credit"][0]), saved["credit"][1]
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
        print(f"{data.corpus.facts}\n{data.tokenizer.facts}\n{name}: {parameters:,} parameters, {per_epoch} steps an "
              f"epoch, {total} in all; bits/byte of n-gram {ref.floors['ngram']:.3f}, bz2 {ref.floors['bz2']:.3f}, "
              f"xz {ref.floors['xz']:.3f}")
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
                with run.evaluation():
                    speed = BATCH_SIZE * ACCUM * CONTEXT * at.step / at.seconds if at.seconds else math.nan
                    recent = float(np.mean(losses[-100:])) if losses else math.nan
                    metrics = report(folder, ema, data, ref, at.history, log, board, control_bits(), speed,
                                     at.step == total, at.multipliers)
                    common.save_metrics(run, folder, metrics, seconds=round(at.seconds, 1), parameters=parameters)
                clock += time.monotonic() - paused  # `seconds` counts training alone
                if run.signal:
                    continue
                if metrics is not None:
                    at.history = [*at.history, [at.step, recent, metrics["val_loss"]["value"]]]
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

        loss, lr, norm = train_step(handle, model, ema, optimizer, credit, guard, data, at.step, total, run)
        at.step += 1
        at.seconds = earlier + time.monotonic() - clock
        losses.append(loss)
        if guard.lost:  # back to the last good state, half the learning rate, another order of the data
            if guard.rollbacks == 5:
                fail(f"the loss diverged for the sixth time, at step {at.step}: lower LR={LR:g}, see {log}")
            broken = copy.copy(guard)
            restore(common.load_checkpoint(last, run.device))
            guard.after_rollback(broken)
            if run.rank == 0:
                common.open_log(log, at.step)
                tqdm.write(f"diverged: back to step {at.step}, learning rate x {guard.lr_scale:g}")
            bar.n = at.step
            continue
        if run.rank > 0:
            continue
        common.log_row(log, step=at.step, epoch=epoch, loss=loss, lr=lr, grad_norm=norm, skipped=guard.skipped,
                       tokens_per_s=BATCH_SIZE * ACCUM * CONTEXT * at.step / at.seconds, seconds=at.seconds)
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
    return run


def main():
    check_settings(int(os.environ.get("WORLD_SIZE", 1)))
    if STAGE == "ladder":
        stages = [dict(STAGE="control", EPOCHS=4 * EPOCHS, MAX_STEPS=4 * MAX_STEPS), *(dict(STAGE=s) for s in "0123")]
    else:
        stages = [dict(STAGE=STAGE)]
    for stage in stages:
        with_settings = {**dict(EPOCHS=EPOCHS, MAX_STEPS=MAX_STEPS), **stage}
        before = dict(EPOCHS=EPOCHS, MAX_STEPS=MAX_STEPS)
        globals().update(with_settings)
        run = train()
        globals().update(before)
        if run.signal:
            break
    common.finish(run)
    if run.signal:
        sys.exit(128 + run.signal)


if __name__ == "__main__":
    override(globals())
    main()
