"""
Transformer blocks the scripts share: attention with rotary positions, masks, a KV cache; a DiT for any grid.

    rms(x)      x / sqrt(mean(x^2) + 1e-6)                                     (Zhang & Sennrich 2019)
    attention   softmax(q k^T / sqrt(head_dim) + mask) v,  q, k <- RoPE(rms(W_q h)), RoPE(rms(W_k h))
    RoPE        (a, b) -> (a cos - b sin, a sin + b cos) on the two halves of a head, angle position theta_m,
                theta_m = 10000^(-m / pairs): q.k then depends on the distance alone   (Su 2021)
    KV cache    what a causal layer computed for earlier positions never changes, so it is kept
    DiT         patches -> Linear + sin-cos positions -> blocks -> LN, Linear that starts at zero -> patches
    block       x <- x + g1 attention((1 + s1) LN(x) + b1);  x <- x + g2 mlp((1 + s2) LN(x) + b2)
                (b, s, g) = Linear(SiLU(emb)), which starts at zero: adaLN-Zero    (Peebles & Xie 2023)
    emb         MLP(sinusoids(1000 t)) + label table row

SiT (Ma 2024) is this network with the velocity of an interpolant as its target: the script's choice.

Letters: B batch, N tokens, H heads, C channels, L context tokens, d head_dim, D H W a grid. A mask says True
where a query may look at a key.
Not here: losses, schedules, samplers, text (all in the scripts).
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from model_unet import Dropout, time_embedding


# ---------------------------------------------------------------- norm, positions, masks
def inverse_rms(x):
    """(..., 1), with one pass over x."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(1e-6).rsqrt_()


class RMS(torch.autograd.Function):
    """rms() on a CPU with its gradient written out: PyTorch puts both together from small steps there, each
    of which goes over the whole tensor."""

    @staticmethod
    def forward(ctx, x):
        r = inverse_rms(x)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        y, r = ctx.saved_tensors
        return torch.addcmul(g, y, (g * y).mean(-1, keepdim=True), value=-1).mul_(r)


def rms(x):
    """x over its root mean square along the last axis; no parameters."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return RMS.apply(x) if torch.is_grad_enabled() else x * inverse_rms(x)
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):
    """rms(x) times a learned gain, (..., dim)."""

    def __init__(self, dim, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x):
        return rms(x) * self.gain.to(x.dtype)


def grid_positions(shape, device=None):
    """Integer coordinates of every place of a grid, last axis fastest: (N, axes)."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in shape), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)


def angles(positions, pairs, base=10_000.0):
    """position * base^(-m / share), m < share = pairs // axes: (N, axes) or (N,) -> (N, axes share), one axis
    after the other. float32, or float64 where the positions are."""
    positions = positions.reshape(len(positions), -1)
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
    share = pairs // positions.shape[1]
    theta = base ** (-torch.arange(share, device=positions.device, dtype=positions.dtype) / max(share, 1))
    return (positions[:, :, None] * theta).flatten(1)


def sincos(positions, dim):
    """Fixed position table (N, dim) of a grid's (N, axes) (Vaswani 2017, one part of the columns an axis);
    columns left over where dim does not divide by 2 axes are zero."""
    angle = angles(positions, dim // 2)
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim - 2 * angle.shape[1]))


def rotation(positions, head_dim, base=10_000.0):
    """cos and sin (N, head_dim) for positions (N,), or (N, axes) for a grid: every axis then turns its equal
    share of the head_dim/2 pairs (axial RoPE), and pairs left over do not turn. ValueError where an axis has
    no pair."""
    angle = angles(positions, head_dim // 2, base)
    if head_dim % 2 or angle.shape[1] == 0:
        axes = positions.numel() // len(positions)
        raise ValueError(f"head_dim {head_dim} must be even and hold a pair for each of {axes} axes")
    angle = F.pad(angle, (0, head_dim // 2 - angle.shape[1]))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)


def rotate(x, cos, sin):
    """RoPE: x (..., N, head_dim) with cos, sin from rotation(); a roll by half a head brings b to a."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


def causal_mask(queries, keys, window=0, device=None):
    """(queries, keys) bool. The last query stands at the last key, so that it fits a cache; window > 0 hides
    keys `window` or more positions back."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)
    return (j <= i) & (i - j < window) if window else j <= i


def attend(q, k, v, mask=None, causal=False, cap=0.0):
    """
    softmax(q k^T / sqrt(d) + mask) v. q (B, H, Nq, d); k, v (B, Hk, Nk, d), where Hk divides H (grouped
    queries, Ainslie 2023).

    mask     bool, True = may look, or floats that are added; broadcasts to (B, H, Nq, Nk)
    causal   stands for causal_mask(Nq, Nk); ValueError with a mask beside it
    cap      > 0: the scores are cap tanh(score / cap) (Gemma 2, 2024), at the price of PyTorch's fused kernel
    """
    if causal and mask is not None:
        raise ValueError("give causal or a mask, not both: causal_mask() & mask is a mask")
    if causal and (cap or q.shape[2] != k.shape[2]):  # the kernel aligns the first positions, not the last
        mask, causal = causal_mask(q.shape[2], k.shape[2], device=q.device), False
    if not cap:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(-2, -1) / (cap * q.shape[-1] ** 0.5))  # (B, H, Nq, Nk)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


class KVCache:
    """Keys and values of the last `capacity` positions of one layer, oldest first. It has room for twice as
    many, so that reading is one contiguous slice and old rows move only once in `capacity` positions. With
    window w and n positions at a time, capacity must be w + n - 1: the first of the n looks furthest back."""

    def __init__(self, capacity):
        self.capacity, self.seen = capacity, 0  # seen: positions ever appended
        self.begin = self.end = 0
        self.k = self.v = None

    def append(self, k, v, keep=True):
        """k, v (B, Hk, n, d) of n <= capacity new positions -> all that are kept, the new ones last; with
        keep=False they are forgotten then."""
        n = k.shape[2]
        if n > self.capacity:
            raise ValueError(f"{n} new positions do not fit a cache of {self.capacity}")
        if self.k is None:
            self.k, self.v = (x.new_empty(*x.shape[:2], 2 * self.capacity, x.shape[3]) for x in (k, v))
        if self.end + n > 2 * self.capacity:
            for buffer in (self.k, self.v):
                buffer[:, :, :self.end - self.begin] = buffer[:, :, self.begin:self.end].clone()
            self.begin, self.end = 0, self.end - self.begin
        end = self.end + n
        begin = max(self.begin, end - self.capacity)
        self.k[:, :, self.end:end], self.v[:, :, self.end:end] = k, v
        if keep:
            self.begin, self.end, self.seen = begin, end, self.seen + n
        return self.k[:, :, begin:end], self.v[:, :, begin:end]


# ---------------------------------------------------------------- layers
class Attention(nn.Module):
    """
    Attention of tokens x (B, N, dim) to each other, or to a context (B, L, context_dim) of other tokens.
    Three matrices instead of one, because Muon must see them one at a time.

    kv_heads     fewer than heads: grouped queries
    qk_norm      q <- rms(q), k <- rms(k) before RoPE: bounds |q.k| / sqrt(d) by sqrt(d), whatever the weights
                 do (Henry 2020). gain: with a learned gain for each of the d dimensions that begins there;
                 the bound is gain^2 sqrt(d) then. 0 = none
    cap          soft cap on the scores, see attend()
    """

    def __init__(self, dim, heads, kv_heads=None, qk_norm=True, gain=0.0, context_dim=0, cap=0.0):
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise ValueError(f"dim {dim} must divide by heads {heads}, and heads by kv_heads {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qk_norm, self.cap = qk_norm or gain > 0, cap
        self.q = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k = nn.Linear(context_dim or dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(context_dim or dim, kv_heads * self.head_dim, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, gain) if gain else rms for _ in range(2))
        self.out = nn.Linear(heads * self.head_dim, dim, bias=False)

    def qkv(self, x, turn=None, context=None):
        """q (B, H, N, d), k and v (B, Hk, N or L, d); q and k normalised, then turned by `turn` = rotation().
        Without turn they can be kept as they are, and turned when they are read."""
        keys = x if context is None else context
        q, k, v = (layer(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for layer, y in ((self.q, x), (self.k, keys), (self.v, keys)))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        return q, k, v

    def merge(self, y):
        """Heads (B, H, N, d) -> (B, N, dim)."""
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, turn=None, mask=None, causal=False, cache=None, context=None):
        """x (B, N, dim) -> (B, N, dim). cache: a KVCache, which these N positions join; mask and causal then
        cover what it keeps."""
        q, k, v = self.qkv(x, turn, context)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.merge(attend(q, k, v, mask, causal, self.cap))


class ReLU2(torch.autograd.Function):
    """relu(x)^2 with the gradient 2 relu(x) written out: square() alone would copy the widest tensor of the
    network twice more on its way back."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @torch.autograd.function.once_differentiable  # r has no graph, so a second one would be wrong
    def backward(ctx, g):
        r, = ctx.saved_tensors
        return (2 * r).mul_(g)


class MLP(nn.Module):
    """up, activation, down: "gelu" (exact), "relu2" = relu^2 (So 2021), or "swiglu" (Shazeer 2020). Its gate
    is a matrix of its own: Muon must see it alone, and half of a wider one would be copied on the way back.
    """

    def __init__(self, dim, hidden, activation="gelu", bias=False):
        super().__init__()
        if activation not in ("gelu", "relu2", "swiglu"):
            raise ValueError(f"activation {activation!r}: one of gelu, relu2, swiglu")
        self.activation = activation
        self.gate = nn.Linear(dim, hidden, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        h = self.up(x)
        if self.activation == "relu2":
            return self.down(ReLU2.apply(h))
        if self.activation == "gelu":
            return self.down(F.gelu(h))
        return self.down(F.silu(self.gate(x)) * h)


def modulate(x, shift, scale):
    """(1 + scale) LN(x) + shift, where the condition takes the place of a learned affine pair."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Attention, cross-attention where there is a context, MLP; each residual. The condition shifts and
    scales what attention and MLP read and gates what they write (adaLN-Zero); cross-attention is not
    modulated, its output matrix starts at zero."""

    def __init__(self, dim, heads, mlp=4, context_dim=0, dropout=0.0, qk_norm=True):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention = Attention(dim, heads, qk_norm=qk_norm)
        self.cross = Attention(dim, heads, qk_norm=qk_norm, context_dim=context_dim) if context_dim else None
        self.mlp = MLP(dim, mlp * dim, bias=True)
        self.dropout = Dropout(dropout)

    def forward(self, x, emb, turn=None, context=None, mask=None):
        """x (B, N, dim), emb (B, 1, dim) or one a token (B, N, dim), already through SiLU, turn = rotation(),
        context (B, L, context_dim) with mask (B, 1, 1, L) -> (B, N, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, -1)
        x = x + gate1 * self.dropout(self.attention(modulate(x, shift1, scale1), turn))
        if self.cross is not None:
            h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            x = x + self.dropout(self.cross(h, context=context, mask=mask))
        return x + gate2 * self.dropout(self.mlp(modulate(x, shift2, scale2)))


# ---------------------------------------------------------------- space and time
class Layer(nn.Module):
    """Attention and a SwiGLU MLP, each after rms(), each residual; no condition. The norms have no gain: the
    matrices that follow them hold it. Scores may become large from the beginning: heads as narrow as ours
    could not look at one token alone."""

    def __init__(self, dim, heads, kv_heads=None, cap=0.0):
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads, gain=1.8, cap=cap)
        self.mlp = MLP(dim, -(-8 * dim // 24) * 8, "swiglu")  # 8/3 dim, in eights

    def forward(self, x, mask=None, turn=None):
        """x (B, N, dim), turn = rotation() -> (B, N, dim)."""
        return self.feed(x + self.attention(rms(x), turn, mask=mask))

    def feed(self, x):
        return x + self.mlp(rms(x))


def near(positions, head_dim):
    """rotation() for tens of positions, not thousands: two radians from a neighbour to the next, slowest
    pairs a hundred times slower. With the usual frequencies neighbours look almost alike."""
    return rotation(2 * positions, head_dim, base=100.0)


@functools.lru_cache(8)
def line(n, head_dim, device):
    """near() for n frames."""
    return near(torch.arange(n, device=device), head_dim)


class Before(nn.Module):
    """
    What stood around each token in the last frames, through a 3x3 convolution for each of them: a causal
    tubelet embedding (Arnab 2021) whose tubes overlap. Attention could fetch it too, but would have to find
    these neighbours first. What moves by itself asks for two frames and their surroundings.

    grid     rows and columns of the tokens; None: they have no neighbours, only themselves
    frames   how far back
    """

    def __init__(self, dim, grid=None, frames=2):
        super().__init__()
        self.grid, self.frames = grid, frames
        self.map = (nn.Linear(dim, frames * dim) if grid is None
                    else nn.Conv2d(dim, frames * dim, 3, padding=1))

    def forward(self, x, alone=None, memory=None, keep=True):
        """
        x (B, T, N, dim) -> what to add to it, (B, T, N, dim), zeros where there is no earlier frame.

        alone    (B,) bool: rows whose frames do not see each other
        memory   a list, empty at first, with the frames before; T is 1 then. keep=False: no trace of this one
        """
        if self.grid is None:
            y = self.map(x)
        else:
            y = x.flatten(0, 1).unflatten(1, self.grid).permute(0, 3, 1, 2)  # (B T, dim, h, w), channels last
            y = self.map(y).permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, x.shape[:2])
        parts = y.chunk(self.frames, -1)  # for the next frame, for that after it, and so on
        before = torch.zeros_like(x)
        if memory is not None:
            for k, frame in enumerate(memory):
                before = before + frame[k]
            if keep:
                memory.insert(0, parts)
                del memory[self.frames:]
            return before
        for k, part in enumerate(parts[:x.shape[1] - 1], 1):
            before = before + F.pad(part[:, :-k], (0, 0, 0, 0, k, 0))
        return before if alone is None else before.masked_fill(alone[:, None, None, None], 0.0)


class SpaceTime(nn.Module):
    """
    A causal transformer of T frames of S tokens each, factorised: a space layer lets the tokens of a frame
    see each other, a time layer lets a token see those in its own place of the last `window` frames, itself
    among them (Hafner 2025, sec. 3.4). RoPE turns time layers by the frame, space layers by `places`: only
    distances count.

    time_every   every so many layers, the last of them, is a time layer
    places       (S, axes) where the tokens of a frame are; None: their layers do not turn
    """

    def __init__(self, dim, depth, heads, kv_heads=None, time_every=2, window=24, cap=0.0, places=None):
        super().__init__()
        self.turn = places is not None
        if self.turn:
            for name, part in zip(("cos", "sin"), near(places, dim // heads)):
                self.register_buffer(name, part, persistent=False)
        self.window, self.time_every, self.head_dim = window, time_every, dim // heads
        self.layers = nn.ModuleList([Layer(dim, heads, kv_heads, cap) for _ in range(depth)])

    def is_time(self, layer):
        return (layer + 1) % self.time_every == 0

    def caches(self):
        """An empty memory for forward(): a KVCache for each time layer."""
        return [KVCache(self.window) if self.is_time(i) else None for i in range(len(self.layers))]

    def forward(self, x, alone=None, caches=None, keep=True):
        """
        x (B, T, S, dim) -> (B, T, S, dim).

        alone    (B,) bool: rows whose frames do not see each other, T pictures
        caches   caches(), with the frames before; T is 1 then. keep=False: the frame leaves no trace there
        """
        B, T, S, _ = x.shape
        if caches is not None and T != 1:
            raise ValueError(f"{T} frames at once: with caches, one frame after the other")
        turn = (self.cos, self.sin) if self.turn else None
        mask = None  # what is in the caches is what the window shows
        if caches is None:
            mask = causal_mask(T, T, self.window, x.device)
            if alone is not None:
                together = ~alone.repeat_interleave(S)[:, None, None, None]
                mask = mask & (together | torch.eye(T, dtype=torch.bool, device=x.device))
        for i, layer in enumerate(self.layers):
            if not self.is_time(i):
                x = layer(x.flatten(0, 1), turn=turn).unflatten(0, (B, T))  # (B T, S, dim) inside
            else:
                h = rms(x).transpose(1, 2).flatten(0, 1)  # (B S, T, dim)
                q, k, v = layer.attention.qkv(h)
                if caches is not None:  # kept as they are, turned when read: positions count from the oldest
                    k, v = caches[i].append(k, v, keep)
                past = line(k.shape[2], self.head_dim, x.device)
                q, k = rotate(q, *(part[-T:] for part in past)), rotate(k, *past)
                h = layer.attention.merge(attend(q, k, v, mask, cap=layer.attention.cap))
                x = layer.feed(x + h.unflatten(0, (B, S)).transpose(1, 2))
        return x


# ---------------------------------------------------------------- patches and the network
GRID = {2: "b c (h p) (w q)", 3: "b c (d o) (h p) (w q)"}
TOKENS = {2: "b (h w) (c p q)", 3: "b (d h w) (c o p q)"}


def patchify(x, patch):
    """
    (B, C, *grid) -> tokens (B, N, C prod(patch)), one a patch, last axis fastest. An axis that its patch does
    not divide is padded with zeros at its end. Zeros multiply no weight, so the last patch is simply embedded
    with fewer of them, and a side below its patch acts as a network of patch = side would.
    """
    dims = len(patch)
    # F.pad reads the last axis first
    pad = [n for side, p in zip(x.shape[:1:-1], patch[::-1]) for n in (0, -side % p)]
    return rearrange(F.pad(x, pad) if any(pad) else x, f"{GRID[dims]} -> {TOKENS[dims]}",
                     **dict(zip("opq"[-dims:], patch)))


def unpatchify(tokens, patch, grid):
    """The inverse of patchify: (B, N, C prod(patch)) -> (B, C, *grid), what lies outside of grid cut off."""
    dims = len(patch)
    counts = [-(-side // p) for side, p in zip(grid, patch)]
    x = rearrange(tokens, f"{TOKENS[dims]} -> {GRID[dims]}",
                  **dict(zip("opq"[-dims:], patch)), **dict(zip("dhw"[-dims:], counts)))
    return x[(..., *map(slice, grid))]


SIZES = {  # Peebles & Xie 2023, table 1: DiT(**SIZES["S"], patch=2) is their DiT-S/2
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "XL": {"dim": 1152, "depth": 28, "heads": 16},
}


class DiT(nn.Module):
    """
    channels     channels of x, or a pair (in, out) where they differ
    dims         2: x is (B, C, H, W); 3: x is (B, C, D, H, W); sides of any size, see patchify()
    patch        side of a token in pixels, or one an axis. Tokens are what costs: half the side, 2^dims times
    dim, depth   width of a token, number of blocks. SIZES has the paper's
    heads        attention heads of dim / heads each
    mlp          width of the MLPs over dim
    classes      rows of the label table (0: no labels). A label-conditional network refuses to run without
    context_dim  width of the context tokens (0: no cross-attention). Same refusal
    dropout      on what a branch adds to the residual stream
    qk_norm      keeps the attention scores bounded at any learning rate; not in the paper
    rope         axial RoPE on top of the added sin-cos positions; not in the paper
    """

    def __init__(self, channels=4, dims=2, patch=2, dim=384, depth=12, heads=6, mlp=4, classes=0,
                 context_dim=0, dropout=0.0, qk_norm=True, rope=True, time_dim=256):
        super().__init__()
        c_in, c_out = channels if isinstance(channels, tuple) else (channels, channels)
        self.patch = (patch,) * dims if isinstance(patch, int) else tuple(patch)
        if len(self.patch) != dims:
            raise ValueError(f"patch {self.patch} has {len(self.patch)} entries for {dims} axes")
        if rope:
            rotation(grid_positions([1] * dims), dim // heads)  # refuses a head too narrow now, not in a run
        pixels = torch.Size(self.patch).numel()
        self.dim, self.head_dim, self.rope = dim, dim // heads, rope
        self.time_dim, self.context_dim = time_dim, context_dim
        self.time = nn.Sequential(nn.Linear(time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes, dim) if classes else None
        self.null = classes - 1  # the last row of the table means "no label"
        self.embed = nn.Linear(c_in * pixels, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, mlp, context_dim, dropout, qk_norm)
                                     for _ in range(depth)])
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, c_out * pixels)
        self.init_weights()

    def init_weights(self):
        """Gates, cross-attention and head start at zero: each block as the identity, the network as exactly
        0, so the first loss is the power of the target. Shifts and scales too, so no label matters yet."""
        zero = [self.head, self.modulation] + [b.modulation for b in self.blocks]
        zero += [b.cross.out for b in self.blocks if b.cross is not None]
        for p in (p for m in zero for p in m.parameters()):
            nn.init.zeros_(p)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.2)  # comparable with the time embedding it is added to

    def forward(self, x, t, label=None, context=None, mask=None, vector=None):
        """
        x (B, C, *grid), t (B,) in [0, 1], label (B,) int64, context (B, L, context_dim), mask (B, L) bool,
        True = attend (a row without one would be NaN: leave one), vector (B, dim) of any other condition,
        added to the time's. Returns (B, C_out, *grid) in x's type.
        Raises ValueError on a missing or needless condition and on a grid of other dims.
        """
        if (self.label is None) != (label is None):
            raise ValueError("this network was built " + ("without labels" if self.label is None else
                             "with a label table: give label (B,), the last row for no label"))
        if (self.context_dim == 0) != (context is None):
            raise ValueError(f"this network was built with context_dim={self.context_dim}: "
                             + ("give context (B, L, context_dim)" if context is None else "it takes none"))
        if x.ndim != 2 + len(self.patch):
            raise ValueError(f"x {tuple(x.shape)} is not (B, C, and {len(self.patch)} sides)")
        grid = x.shape[2:]
        emb = self.time(time_embedding(t, self.time_dim))
        if label is not None:
            emb = emb + self.label(label)
        emb = F.silu(emb if vector is None else emb + vector)[:, None]  # (B, 1, dim)
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, L)

        # positions come from the grid at hand: a table of a fixed length would tie the network to one size
        positions = grid_positions([-(-side // p) for side, p in zip(grid, self.patch)], x.device)
        turn = rotation(positions, self.head_dim) if self.rope else None
        h = self.embed(patchify(x, self.patch)) + sincos(positions, self.dim)
        for block in self.blocks:
            h = block(h, emb, turn, context, mask)
        h = self.head(modulate(h, *self.modulation(emb).chunk(2, -1)))
        return unpatchify(h, self.patch, grid).to(x.dtype)
