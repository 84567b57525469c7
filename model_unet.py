"""
One U-Net for pictures and volumes: x (B, C, *grid), t (B,) -> same grid, C_out channels.

    stem      patch x patch pixels -> channels (space-to-depth), then a 3x3 convolution
    down      per level: BLOCKS x [ResBlock -> self-attention -> cross-attention], then a stride-2 convolution
    middle    ResBlock -> self-attention -> cross-attention -> ResBlock
    up        per level: nearest upsampling + convolution, then BLOCKS x [concat skip, ResBlock, attentions]
    head      norm, SiLU, 3x3 convolution that starts at zero, depth-to-space

    ResBlock  h = conv1(SiLU(GN(x)));  h = GN(h) (1 + g) + b;  out = skip(x) + conv2(dropout(SiLU(h)))
              (g, b) = Linear(SiLU(emb)): FiLM / AdaGN (Perez 2018; Dhariwal & Nichol 2021, sec. 3).
              film=False is the older form: emb is added to h before its norm.
    emb       MLP(sinusoids(1000 t)) + label table row + a vector of the script's own
    attention every one is residual, x + out(attend(norm(x))): self-attention over the grid, cross-attention
              to context tokens (B, L, context_dim) with a mask

Letters: B batch, C channels, H W (D) grid, N grid positions, L context tokens, K classes (the label table has
a row for each, and one more for "no label" where the script trains with guidance).

Not here: the loss, the schedule, the sampler (they are in the scripts), anisotropic striding, 1D signals.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint


def time_embedding(t, dim):
    """Sinusoids of t in [0, 1] at dim/2 frequencies: (B,) -> (B, dim). The only place that knows of 1000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = 1000 * t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=1)


def space_to_depth(x, patch):
    """(B, C, H, W[, D]) -> (B, C patch^dims, H/patch, ...): no information is lost, no arithmetic is done."""
    if x.ndim == 4:
        return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch)
    return rearrange(x, "b c (d o) (h p) (w q) -> b (c o p q) d h w", o=patch, p=patch, q=patch)


def depth_to_space(x, patch):
    """The inverse of space_to_depth."""
    if x.ndim == 4:
        return rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch)
    return rearrange(x, "b (c o p q) d h w -> b c (d o) (h p) (w q)", o=patch, p=patch, q=patch)


def modulated_group_norm(x, groups, scale, shift):
    """GN(x) (1 + scale) + shift with scale, shift (B, C), as ONE kernel: with the batch folded into the
    channels every (sample, channel) pair has an affine pair of its own, as FiLM needs. x (B, C, *grid).
    Volumes with their channels last, which cannot be folded without a copy, take two."""
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.addcmul(shift[:, :, None, None, None], F.group_norm(x, groups),
                             1 + scale[:, :, None, None, None])
    folded = x.reshape(1, -1, *x.shape[2:])  # (1, B C, *grid)
    dtype = x.dtype if x.is_cuda else scale.dtype
    weight, bias = (1 + scale).flatten().to(dtype), shift.flatten().to(dtype)
    return F.group_norm(folded, groups * len(x), weight, bias).view_as(x)


def upsample_conv(x, conv):
    """conv(nearest upsampling of x by 2), as ONE transposed convolution of the small grid. Each 2 x 2 of the
    large grid holds one number four times, so the taps that meet it are added beforehand: 4 products a place
    instead of 9 (8 instead of 27 in 3D), and the large grid never exists at the wide channel count."""
    dims = x.ndim - 2
    kernel = conv.weight.flip(tuple(range(2, x.ndim)))  # a transposed convolution reads its kernel backwards
    for axis in range(dims):
        here = [0, 0] * axis
        kernel = F.pad(kernel, here + [0, 1]) + F.pad(kernel, here + [1, 0])  # 3 taps -> 4 sums of neighbours
    transposed = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    return transposed(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)


class Dropout(nn.Dropout):
    """nn.Dropout at half its time on a CPU, where drawing the mask is what costs: each 64-bit random integer
    is read as four of 16 bits. p is rounded to a multiple of 2^-16; the mean stays exact."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        drop = round(self.p * 2**16)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= drop - 2**15
        return x * keep.to(x.dtype) * (2**16 / (2**16 - drop))  # scaled last: bf16 would round 1 / (1 - p)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v, (B, heads, N, d). PyTorch's kernel for CPUs is made for long sequences: at
    a few hundred positions in bf16 the two products written out are 2 to 4 times faster."""
    if q.device.type != "cpu" or max(q.shape[2], k.shape[2]) > (1024 if q.dtype == torch.bfloat16 else 256):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


class Conv1x1x1(nn.Conv3d):
    """A 1x1x1 convolution; with the channels last a matrix product, whose backward is three times faster on a
    CPU."""

    def forward(self, x):
        if not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class ResBlock(nn.Module):
    def __init__(self, conv, c_in, c_out, c_emb, groups, dropout, film):
        super().__init__()
        self.film, self.groups = film, groups
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), conv(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out if film else c_out)
        self.norm2 = nn.Identity() if film else nn.GroupNorm(groups, c_out)  # FiLM brings its own
        self.dropout, self.conv2 = Dropout(dropout), conv(c_out, c_out, 3, padding=1)
        point = Conv1x1x1 if conv is nn.Conv3d else conv
        self.skip = point(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        """x (B, c_in, *grid), emb (B, c_emb), already through SiLU -> (B, c_out, *grid)."""
        h, emb = self.conv1(F.silu(self.norm1(x))), self.emb(emb)
        if self.film:
            h = modulated_group_norm(h, self.groups, *emb.chunk(2, dim=1))
        else:
            h = self.norm2(h + emb.view(*emb.shape, *[1] * (h.ndim - 2)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """x + out(attend(norm(x))) over the grid positions; keys and values from x, or from context tokens."""

    def __init__(self, channels, groups, head_dim, context_dim=0):
        super().__init__()
        wanted = max(1, channels // head_dim)
        self.heads = next(h for h in range(wanted, 0, -1) if channels % h == 0)
        self.norm = nn.GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context_dim or channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x, context=None, mask=None):
        """x (B, C, *grid), context (B, L, context_dim), mask (B, L) bool with True = attend -> like x."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        keys = h if context is None else context
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads)
                   for y in (self.to_q(h), *self.to_kv(keys).chunk(2, dim=-1)))
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, L)
        h = attend(q, k, v, mask)
        h = self.out(rearrange(h, "b h n d -> b n (h d)"))
        return x + h.transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """ResBlock, then self- and cross-attention where this level has them."""

    def __init__(self, conv, c_in, c_out, c_emb, groups, dropout, film, attend, head_dim, context_dim):
        super().__init__()
        self.res = ResBlock(conv, c_in, c_out, c_emb, groups, dropout, film)
        self.self_attention = Attention(c_out, groups, head_dim) if attend else None
        cross = attend and context_dim
        self.cross_attention = Attention(c_out, groups, head_dim, context_dim) if cross else None

    def forward(self, x, emb, context, mask):
        x = self.res(x, emb)
        if self.self_attention is not None:
            x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, mask)
        return x


class UNet(nn.Module):
    """
    channels     channels of x, or a pair (in, out) where they differ
    dims         2: x is (B, C, H, W); 3: x is (B, C, D, H, W)
    width, mults channels of level i are width * mults[i]; each level halves the grid
    blocks       ResBlocks per level on the way down, and as many on the way up; or one number a level
    attention    one bool a level; the middle always attends
    classes      rows of the label table (0: no labels). A label-conditional network refuses to run without
    context_dim  width of the context tokens (0: no cross-attention). Same refusal
    patch        side of the space-to-depth stem: 2 makes every convolution see a quarter of the pixels in 2D
    checkpoint   compute what is inside a block again on the way back instead of keeping it: a third more time
                 for a fraction of the memory (Chen 2016), for volumes that do not fit otherwise
    """

    def __init__(self, channels=3, dims=2, width=64, mults=(1, 2, 4), blocks=1, attention=(False, True, True),
                 classes=0, context_dim=0, patch=1, dropout=0.1, film=True, groups=8, head_dim=32,
                 time_dim=256, checkpoint=False):
        super().__init__()
        c_in, c_out = channels if isinstance(channels, tuple) else (channels, channels)
        blocks = (blocks,) * len(mults) if isinstance(blocks, int) else tuple(blocks)
        for name, value in (("attention", attention), ("blocks", blocks)):
            if len(value) != len(mults):
                raise ValueError(f"{name} has {len(value)} entries, mults {len(mults)}: give one a level")
        if any(width * m % groups for m in mults):
            raise ValueError(f"width {width} times mults {tuple(mults)} must divide by {groups} norm groups")
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        widths = [width * m for m in mults]

        def stage(a, b, attend):
            return Stage(conv, a, b, time_dim, groups, dropout, film, attend, head_dim, context_dim)

        self.patch, self.factor, self.time_dim = patch, patch * 2 ** (len(mults) - 1), time_dim
        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.label = nn.Embedding(classes, time_dim) if classes else None
        self.null = classes - 1  # the last row of the table means "no label"
        self.context_dim, self.checkpoint = context_dim, checkpoint
        self.stem = conv(c_in * patch**dims, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c = width
        for i, w in enumerate(widths):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(blocks[i]):
                level["blocks"].append(stage(c, w, attention[i]))
                c = w
            if i < len(widths) - 1:
                level["resize"] = conv(w, w, 3, stride=2, padding=1)
            self.down.append(level)
        self.middle = nn.ModuleList([stage(c, c, True), stage(c, c, False)])
        for i, w in reversed(list(enumerate(widths))):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            if i < len(widths) - 1:
                level["resize"] = conv(c, w, 3, padding=1)  # to w at once: the larger grid sees fewer
                c = w
            for _ in range(blocks[i]):
                level["blocks"].append(stage(c + w, w, attention[i]))
                c = w
            self.up.append(level)
        self.norm = nn.GroupNorm(groups, c)
        self.head = conv(c, c_out * patch**dims, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """The last layer of every residual branch starts at zero, so the network starts as its skip path and
        the first loss is exactly the power of the target; FiLM too, so no label matters at the start."""
        zero = [self.head]
        for m in self.modules():
            if isinstance(m, ResBlock):
                zero += [m.conv2] + ([m.emb] if m.film else [])
            elif isinstance(m, Attention):
                zero.append(m.out)
        for m in zero:
            nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.5)  # comparable with the time embedding it is added to

    def forward(self, x, t, label=None, context=None, mask=None, vector=None):
        """
        x (B, C, *grid), t (B,) in [0, 1], label (B,) int64, context (B, L, context_dim), mask (B, L) bool,
        True = attend (a row without one would be NaN: leave one), vector (B, time_dim): any other condition,
        added to the time's. Returns (B, C_out, *grid) in x's type.
        Raises ValueError on a missing condition and on a grid that does not divide by patch * 2^(levels - 1).
        """
        if (self.label is None) != (label is None):
            raise ValueError("this network was built " + ("without labels" if self.label is None else
                             "with a label table: give label (B,), the last row for no label"))
        if (self.context_dim == 0) != (context is None):
            raise ValueError(f"this network was built with context_dim={self.context_dim}: "
                             + ("give context (B, L, context_dim)" if context is None else "it takes none"))
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(f"grid {tuple(x.shape[2:])} does not divide by {self.factor}, "
                             f"patch {self.patch} times 2 for each of the {len(self.down) - 1} halvings")
        emb = self.time(time_embedding(t, self.time_dim))
        if label is not None:
            emb = emb + self.label(label)
        emb = F.silu(emb if vector is None else emb + vector)

        def run(block, h):
            if self.checkpoint and torch.is_grad_enabled():
                return checkpoint(block, h, emb, context, mask, use_reentrant=False)
            return block(h, emb, context, mask)

        h, skips = self.stem(space_to_depth(x, self.patch)), []
        for level in self.down:
            for block in level["blocks"]:
                h = run(block, h)
                skips.append(h)
            if "resize" in level:
                h = level["resize"](h)
        for block in self.middle:
            h = run(block, h)
        for level in self.up:
            if "resize" in level:
                h = upsample_conv(h, level["resize"])
            for block in level["blocks"]:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
        h = self.head(F.silu(self.norm(h)))
        return depth_to_space(h, self.patch).to(x.dtype)
