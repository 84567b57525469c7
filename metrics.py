"""
The measures that several scripts share: how far generated data are from real, and one picture from another.

measure       | what it says                                     | paper              | trivial value
--------------|--------------------------------------------------|--------------------|----------------------
frechet       | mean and covariance of two feature clouds differ | Heusel 2017, eq. 6 | same 0, real-real > 0
kid           | moments up to the third differ; no bias from N   | Binkowski 2018     | 0 +- std, can be < 0
precision     | fidelity: share of fakes in the real manifold    | Kynkaanniemi 2019  | disjoint 0, real < 1
recall        | variety: share of reals in the fake manifold     | same               | disjoint 0, real < 1
density       | as precision, but one outlier cannot lift it     | Naeem 2020         | disjoint 0, real 1
coverage      | as recall, but with balls around reals only      | Naeem 2020         | disjoint 0, real .97
memorisation  | are samples copies of the training set?          | Alaa 2022          | memorised .01, z 0
psnr          | mean squared error as a logarithm; rewards blur  | -                  | offset .1: 20 dB
ssim, ms_ssim | local brightness, contrast and structure agree   | Wang 2004, 2003    | same 1, unrelated ~0
bootstrap     | how far a number moves when data are redrawn     | Efron 1979         | -

A number never stands alone: print real-vs-real beside it, with the same N. The bias of `frechet` is positive,
about 1/N; values from two different feature networks cannot be compared.

Features are (N, d) tensors or arrays; everything is computed in float64. Nothing here touches the global RNG.
Not here: the feature network (each script has its own), gradients, Inception FID.
"""

import torch
import torch.nn.functional as F

MS_WEIGHTS = (.0448, .2856, .3001, .2363, .1333)    # Wang 2003, finest scale first


def _double(x):
    x = torch.as_tensor(x).detach()
    return (x.cpu() if x.is_mps else x).double()            # Apple's GPUs have no float64


def _features(*sets, rows=2):
    """Float64 copies of (N, d) sets; ValueError unless they share d, hold `rows` rows each and are finite."""
    sets = [_double(s) for s in sets]
    if any(s.ndim != 2 or s.shape[1] != sets[0].shape[1] or s.shape[1] == 0 for s in sets):
        raise ValueError(f"features must be (N, d) with one d, got {[tuple(s.shape) for s in sets]}")
    if any(len(s) < rows for s in sets):
        raise ValueError(f"at least {rows} rows needed, got {[len(s) for s in sets]}")
    if not all(s.isfinite().all() for s in sets):
        raise ValueError("features hold NaN or infinity")
    return sets


# ------------------------------------------------------------------------------------------------------------
# Distance of two distributions

def frechet(x, y):
    """Frechet distance of Gaussians fitted to x (N, d) and y (M, d) -> float (Heusel 2017, eq. 6).

    Unit: features squared. Covariances divide by N - 1. ValueError: under 2 rows, different d, non-finite."""
    x, y = _features(x, y)
    return frechet_gaussian(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def frechet_gaussian(m1, S1, m2, S2):
    """Frechet distance of N(m1, S1) and N(m2, S2), m (d,), S (d, d) -> float (Dowson & Landau 1982).

    ValueError: shapes that do not agree, non-finite."""
    m1, S1, m2, S2 = args = [_double(a) for a in (m1, S1, m2, S2)]
    d = m1.numel()
    S1, S2 = (S.reshape(1, 1) if d == S.numel() == 1 else S for S in (S1, S2))     # d = 1: cov gives a scalar
    if m1.shape != (d,) or m2.shape != (d,) or S1.shape != (d, d) or S2.shape != (d, d):
        raise ValueError(f"want (d,), (d, d), (d,), (d, d), got {[tuple(a.shape) for a in args]}")
    if not all(a.isfinite().all() for a in args):
        raise ValueError("mean or covariance holds NaN or infinity")
    # S1^.5 S2 S1^.5 has the eigenvalues of S1 S2, and is symmetric: eigh stays accurate where sqrtm does not
    values, vectors = torch.linalg.eigh(S1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S2 @ root).clamp(min=0).sqrt().sum()    # rounding gives -1e-18
    return float((m1 - m2).square().sum() + S1.trace() + S2.trace() - 2 * cross)


def kid(x, y, subsets=100, size=1000, seed=0):
    """Kernel distance, unbiased MMD^2 with k(a, b) = (a.b/d + 1)^3 -> (mean, std) (Binkowski 2018, sec. 4).

    x (N, d), y (M, d). Each subset takes n = min(size, N, M) rows of both, without replacement; std is their
    spread. With n = N = M every subset is the whole set: it is computed once and std is 0; give size <= N/2
    for an error bar. ValueError: subsets < 1, size < 2, and as in `frechet`."""
    x, y = _features(x, y)
    n, d, generator, values = min(size, len(x), len(y)), x.shape[1], torch.Generator().manual_seed(seed), []
    if n < 2 or subsets < 1:
        raise ValueError(f"kid needs subsets >= 1 and size >= 2, got {subsets} and {size}")
    for _ in range(1 if n == len(x) == len(y) else subsets):
        a, b = (s[torch.randperm(len(s), generator=generator)[:n]] for s in (x, y))
        aa, bb, ab = ((p @ q.T / d + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))            # (n, n)
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))    # without k(a, a): no bias
        values.append(within - 2 * ab.mean())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


# ------------------------------------------------------------------------------------------------------------
# Neighbours: manifolds and copies

def _squared(x, y):
    """(N, d), (M, d) -> (N, M), squared distance / d, with an error of 1e-16 of the squared norms."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0) / x.shape[1]


def nearest(x, y, k=1, chunk=512):
    """The k rows of y (M, d) nearest to each row of x (N, d) -> distances (N, k) ascending, indices (N, k).

    Distance: Euclidean, root mean square per value (|a - b| / sqrt(d)): .1 means "off by .1 in every value".
    A row that is in both sets finds itself at 0. Memory: chunk x M.
    ValueError: k > M, different d, non-finite."""
    x, y = _features(x, y, rows=1)
    if not 1 <= k <= len(y):
        raise ValueError(f"k = {k} neighbours asked from {len(y)} rows")
    x, y = x - y.mean(0), y - y.mean(0)                     # a common offset would cost digits in _squared
    distances, indices = [], []
    for rows in x.split(chunk):
        index = _squared(rows, y).topk(k, largest=False).indices                              # (chunk, k)
        # the expanded square cancels for near copies: measure the k found again, by differences
        exact = torch.stack([(rows - y[i]).square().mean(1).sqrt() for i in index.T], dim=1)
        distance, order = exact.sort(dim=1, stable=True)
        distances.append(distance)
        indices.append(index.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def prdc(real, fake, chunk=512, seed=0):
    """Precision, recall (k = 3, Kynkaanniemi 2019, eq. 1-2), density, coverage (k = 5, Naeem 2020) -> dict.

    real (N, d), fake (M, d); all four depend on N, so the larger set is subsampled to the size of the other.
    Shares in [0, 1], density >= 0. Memory: chunk x N. ValueError: under 6 rows, different d, non-finite."""
    sets = _features(real, fake, rows=6)
    n = min(len(s) for s in sets)
    generator = torch.Generator().manual_seed(seed)
    real, fake = (s if len(s) == n else s[torch.randperm(len(s), generator=generator)[:n]] for s in sets)
    real, fake = real - real.mean(0), fake - real.mean(0)
    # Squared radii; neighbour 0 is the row itself. Balls are closed for precision and recall (eq. 1), open
    # for density and coverage (Naeem's code). Ties occur when fakes are copies of reals; the factors decide
    # them, not rounding
    near = nearest(real, real, 6, chunk)[0].square()
    real_3, real_5 = near[:, 3] * (1 + 1e-9), near[:, 5] * (1 - 1e-9)
    fake_3 = nearest(fake, fake, 4, chunk)[0][:, 3].square() * (1 + 1e-9)
    precise = dense = 0
    recalled = covered = torch.zeros(n, dtype=torch.bool, device=real.device)
    for rows, radius in zip(fake.split(chunk), fake_3.split(chunk)):
        sq = _squared(rows, real)                                                             # (chunk, N)
        precise += (sq <= real_3).any(1).sum().item()
        dense += (sq <= real_5).sum().item()
        recalled = recalled | (sq <= radius[:, None]).any(0)
        covered = covered | (sq <= real_5).any(0)
    return dict(precision=precise / n, recall=recalled.sum().item() / n,
                density=dense / (5 * n), coverage=covered.sum().item() / n)


def memorisation(samples, train, test, copies=1, chunk=512):
    """Four signs that samples (N, d) are copies of train (M, d), judged by held-out test (L, d) -> dict.

    memorised       share nearer to train than the 1st percentile of test->train distances; honest: .01
    ratio           share with nearest / second-nearest <= 1/3 (Yoon 2023); honest: 0
    authentic       AuthPct (Alaa 2022): share with d(n, nearest train row of n) < d(sample, n), n the row of
                    train nearest to the sample; honest: what test rows get, replayed training set: 0
    mann_whitney_z  nearest distances, samples against test (Meehan 2020); honest 0, copies << 0, far off >> 0

    Flip-invariant: train = cat([train, flipped]), copies=2: equal blocks, row i of each is one picture. Then
    its own flip is no neighbour of a picture; otherwise copies of symmetric pictures pass as authentic.
    ValueError: train not made of such blocks, under 2 rows, different d, non-finite."""
    samples, train, test = _features(samples, train, test)
    pictures = len(train) // max(copies, 1)
    if pictures * copies != len(train):
        raise ValueError(f"{len(train)} rows of train are not {copies} equal blocks")

    def nearest_other(x, own):
        """Distance (N,) of x to the nearest train row that shows another picture than row `own` does."""
        distance, index = nearest(x, train, copies + 1, chunk)
        other = index % pictures != own[:, None] % pictures
        return distance.gather(1, other.int().argmax(1, keepdim=True))[:, 0]              # argmax: the first

    near, n = (a[:, 0] for a in nearest(samples, train, 1, chunk))
    held_out = nearest(test, train, 1, chunk)[0][:, 0]
    return dict(memorised=float((near < held_out.quantile(.01)).double().mean()),
                ratio=float((3 * near <= nearest_other(samples, n)).double().mean()),   # <=: 0 / 0 is a copy
                authentic=float((nearest_other(train[n], n) < near).double().mean()),
                mann_whitney_z=mann_whitney(near, held_out))


def mann_whitney(a, b):
    """z of the rank-sum test, ties averaged (Mann & Whitney 1947): negative when a (n,) lies below b (m,)."""
    _, inverse, counts = torch.cat([a, b]).unique(return_inverse=True, return_counts=True)
    n, m, t = len(a), len(b), counts.double()
    rank = (t.cumsum(0) - (t - 1) / 2)[inverse]                                               # from 1
    u = rank[:n].sum() - n * (n + 1) / 2
    variance = n * m / 12 * (n + m + 1 - (t ** 3 - t).sum() / ((n + m) * (n + m - 1)))
    return float((u - n * m / 2) / variance.sqrt()) if variance > 0 else 0.


# ------------------------------------------------------------------------------------------------------------
# Distance of two pictures or volumes

def _pair(x, y, data_range):
    x, y = _double(x), _double(y)
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(f"want two (B, ...) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    return x / data_range, y / data_range


def psnr(x, y, data_range):
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / MSE), of pairs (B, ...) -> (B,) dB; identical: inf.

    Its mean over items is not the PSNR of the pooled MSE (never lower): say which one a number is."""
    x, y = _pair(x, y, data_range)
    return -10 * (x - y).square().flatten(1).mean(1).log10()


def _pictures(x, y, data_range, window, scales):
    x, y = _pair(x, y, data_range)
    if x.ndim not in (4, 5):
        raise ValueError(f"want (B, C, H, W) or (B, C, D, H, W), got {tuple(x.shape)}")
    side = min(x.shape[2:])
    if scales < 1 or side < window * 2 ** (scales - 1):
        fit = (side // window).bit_length()
        raise ValueError(f"side {side} is too small for {scales} scales with window {window}: {fit} fit")
    return x, y


def _blur(x, window):
    """Gaussian mean, sigma 1.5, of (B, C, *sides) along every side, without padding.

    Sums of shifted views: in float64 a 3D convolution is slower on CPUs."""
    taps = torch.exp(-(torch.arange(window, dtype=torch.float64) - (window - 1) / 2) ** 2 / (2 * 1.5 ** 2))
    taps = (taps / taps.sum()).tolist()
    for dim in range(2, x.ndim):
        x = sum(w * x.narrow(dim, i, x.shape[dim] - window + 1) for i, w in enumerate(taps))
    return x


def _ssim_and_cs(x, y, window):
    """(B, C, *sides) -> (B, C) twice: SSIM and its contrast-structure factor, means over valid windows."""
    C1, C2 = .01 ** 2, .03 ** 2
    mx, my = _blur(x, window), _blur(y, window)
    vx, vy = _blur(x * x, window) - mx * mx, _blur(y * y, window) - my * my
    cov = _blur(x * y, window) - mx * my
    cs = (2 * cov + C2) / (vx + vy + C2)                    # Wang 2004, eq. 9 x 10 with C3 = C2 / 2
    full = (2 * mx * my + C1) / (mx * mx + my * my + C1) * cs                                 # eq. 13
    return full.flatten(2).mean(2), cs.flatten(2).mean(2)


def ssim(x, y, data_range, window=11):
    """Structural similarity (Wang 2004, eq. 13), mean over valid windows, then channels -> (B,), at most 1.

    x, y: (B, C, H, W) or (B, C, D, H, W) from 0 to data_range (bring [-1, 1] to [0, 1] first: SSIM is not
    shift-invariant); fold the frames of a video into B. Gaussian window of 11 taps, sigma 1.5, K1 = .01,
    K2 = .03, population statistics. ValueError: a side smaller than the window, other shapes."""
    x, y = _pictures(x, y, data_range, window, scales=1)
    return _ssim_and_cs(x, y, window)[0].mean(1)


def ms_ssim(x, y, data_range, weights=MS_WEIGHTS, window=11):
    """Multi-scale SSIM (Wang 2003, eq. 7): structure at every halving, luminance at the last -> (B,), 0 to 1.

    x, y, window as in `ssim`; weights, rescaled to sum 1, one for each of L scales. L scales fit when the
    smallest side is at least window * 2^(L-1): for L = 1..5 that is 11, 22, 44, 88, 176 with window 11 and
    7, 14, 28, 56, 112 with window 7. So 32^3 takes weights=MS_WEIGHTS[:3], window=7: print both beside the
    number. Negative means count as 0. ValueError: a side too small (says what fits), other shapes."""
    L = len(weights)
    x, y = _pictures(x, y, data_range, window, scales=L)
    score = 1.
    for j, weight in enumerate(weights):
        full, cs = _ssim_and_cs(x, y, window)                                               # (B, C)
        score = score * (full if j == L - 1 else cs).clamp(min=0) ** (weight / sum(weights))
        if j < L - 1:
            x, y = ((F.avg_pool2d if s.ndim == 4 else F.avg_pool3d)(s, 2) for s in (x, y))
    return score.mean(1)


# ------------------------------------------------------------------------------------------------------------
# Error bars

def bootstrap(values, statistic, n=1000, seed=0, centred=False):
    """95 % percentile interval of statistic(values), rows of (N, ...) redrawn n times -> (low, high) (Efron).

    Rows must be independent: one per volume or episode, not per voxel or frame. ValueError: under 2 rows.
    centred: moved by as much as the draws lie off the value on average: for distances, which repeated rows
    make larger."""
    values, generator = torch.as_tensor(values), torch.Generator().manual_seed(seed)
    N = len(values)
    if N < 2:
        raise ValueError(f"at least 2 rows needed, got {N}")
    draws = [float(statistic(values[torch.randint(N, (N,), generator=generator)])) for _ in range(n)]
    draws = torch.tensor(draws).double()
    off = float(draws.mean()) - float(statistic(values)) if centred else 0.0
    return tuple((draws.quantile(torch.tensor([.025, .975]).double()) - off).tolist())
