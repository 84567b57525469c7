"""train_voxel_d3pm.py against enumeration: three blocks, two voxels, every state; numbers that are known;
whole runs of a second, and the lab notes' faults, planted."""

import copy
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import metrics
import train_voxel_d3pm as vd
from conftest import AT_CALL, fork, log, refused, state
from data import trees, voxel_files

CPU = torch.device("cpu")
PROCESSES = ("absorbing", "uniform", "marginal")
SMALL = dict(GRID=8, SPECIES="oak,birch", TRAIN=24, TEST=24, BATCH_SIZE=8, WIDTH=8, MULTS=(1,), RES_BLOCKS=1,
             ATTN_LEVELS=(1,), EMBED=4, STEPS=3, SAMPLES=8, DRAWS=8, SAR_ROUNDS=1, SAR_STEPS=2,
             PRECISION="fp32", DIM=24, DEPTH=1, HEADS=2)
TINY = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SMALL.items()]
MARGINAL = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
JOINT = torch.tensor([[6, 1, 2], [1, 4, 0], [0, 2, 4]]).double() / 20  # of two voxels; some pairs never occur


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """OUT of this file, whose cache all runs share."""
    folder = tmp_path_factory.mktemp("voxel")
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def use(monkeypatch, home):
    """Put settings into the script, as override() does, until the end of the test; small ones at first."""
    def put(**chosen):
        for name, value in chosen.items():
            assert type(getattr(vd, name)) is type(value), name
            monkeypatch.setattr(vd, name, value)
    put(**SMALL, OUT=str(home))
    return put


def law(use, process):
    """pi (S,) of a process over three classes."""
    use(PROCESS=process)
    return vd.noise_law(MARGINAL)


class Exact:
    """The exact denoiser of two voxels: log p(x_0 of one | x_t of the other). Grid (1, 1, 2)."""

    def __init__(self, pi, joint=JOINT):
        self.pi, self.joint, self.K, self.asked = pi, joint, len(joint), []
        self.prior = torch.zeros(1, 1, 2, self.K)

    def __call__(self, x_t, t, words=None, before=None, plan=None):
        Z = vd.likelihood(x_t, t.double(), self.pi, self.K)[:, 0, 0]  # (B, 2, K)
        self.asked.append(x_t)
        seen = torch.stack([Z[:, 1] @ self.joint.T, Z[:, 0] @ self.joint], 1)
        return seen.clamp(min=1e-300).log()[:, None, None]  # finite, as a network's are


def tiny_model(use, seed=0, **settings):
    """A network with drawn weights, none of them zero."""
    use(**settings)
    data = vd.load_data()
    torch.manual_seed(seed)
    model = vd.build_model(data).eval().requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        if not p.any():
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model, data


# ---------------------------------------------------------------- the closed form
def matrices(pi, T=10):
    """One-step matrices Q[i] from step i-1 to i, and their products Q_bar (T+1, S, S), rows sum to 1."""
    a = [(1 - i / T) / (1 - (i - 1) / T) for i in range(1, T + 1)]
    one = torch.eye(len(pi), dtype=torch.float64)
    Q = [one] + [r * one + (1 - r) * pi.expand(len(pi), -1) for r in a]
    Q_bar = [Q[0]]
    for q in Q[1:]:
        Q_bar.append(Q_bar[-1] @ q)
    return Q, torch.stack(Q_bar)


@pytest.mark.parametrize("process", PROCESSES)
def test_closed_forms_equal_matrix_products(use, process):
    """q(x_t | x_0), and q(x_s | x_t, x_0) for every jump and every pair of states, to 1e-6 and far below."""
    pi, T, K = law(use, process), 10, 3
    times = torch.arange(T + 1, dtype=torch.float64) / T
    Q, Q_bar = matrices(pi, T)
    for i in range(1, T + 1):
        t = times[i:i + 1]
        for x_t in range(len(pi)):
            Z = vd.likelihood(torch.tensor([[x_t]]), t, pi, K)[0, 0]
            assert (Z - Q_bar[i][:K, x_t]).abs().max() < 1e-12
        for j in range(i):
            jump = torch.linalg.multi_dot([Q[0], *Q[j + 1:i + 1]])  # from step j to i
            for x_0 in range(K):
                for x_t in range(len(pi)):
                    if Q_bar[i][x_0, x_t] == 0:
                        continue
                    want = Q_bar[j][x_0] * jump[:, x_t] / Q_bar[i][x_0, x_t]
                    known = F.one_hot(torch.tensor([[x_0]]), K).double().log()
                    got = vd.reverse(known, torch.tensor([[x_t]]), t, times[j:j + 1], pi)[0, 0]
                    assert (got - want).abs().max() < 1e-10, (i, j, x_0, x_t)


def every_state(S):
    return torch.cartesian_prod(torch.arange(S), torch.arange(S)).view(-1, 1, 1, 2)


@pytest.mark.parametrize("process", PROCESSES)
def test_mixture_is_exact_and_plug_in_is_not(use, process):
    """p(x_s of a voxel | both x_t) by enumeration of x_0; a jump from .7 to .3."""
    pi = law(use, process)
    x_t, one = every_state(len(pi)), torch.ones(len(pi) ** 2, dtype=torch.float64)
    t, s = 0.7 * one, 0.3 * one
    log_p = vd.posterior(Exact(pi)(x_t, t), x_t, t, pi)
    Z = vd.likelihood(x_t, t, pi, 3)[:, 0, 0]
    p_0 = JOINT * Z[:, 0, :, None] * Z[:, 1, None]  # p(x_0 and x_t), (B, 3, 3)
    ok = p_0.sum((1, 2)) > 0
    p_0 = p_0 / p_0.sum((1, 2), keepdim=True)
    want = 0
    for x_0 in every_state(3):
        known = F.one_hot(x_0, 3).double().log().expand(len(x_t), -1, -1, -1, -1)
        weight = p_0[:, x_0[0, 0, 0], x_0[0, 0, 1]]
        part = vd.reverse(known, x_t, t, s, pi)
        weight = weight.view(-1, 1, 1, 1, 1)
        want = want + torch.where(weight > 0, weight * part, 0)
    off = [(vd.reverse(log_p, x_t, t, s, pi, plug) - want)[ok].abs().max() for plug in (False, True)]
    assert off[0] < 1e-12
    assert off[1] < 1e-12 if process == "absorbing" else off[1] > 0.01, off


ENTROPY = float(-torch.special.xlogy(JOINT, JOINT).sum())  # nats


@pytest.mark.parametrize("process", PROCESSES)
def test_an_exact_denoiser_has_the_entropy_as_its_elbo(use, process):
    """The integral over t by 100 Gauss-Legendre nodes, every x_0 and x_t with its probability."""
    pi = law(use, process)
    S, total = len(pi), 0.0
    x_0, x_t = every_state(3).repeat_interleave(S * S, 0), every_state(S).repeat(9, 1, 1, 1)
    for node, weight in zip(*np.polynomial.legendre.leggauss(100)):
        t = torch.full((len(x_0),), (node + 1) / 2, dtype=torch.float64)
        Z = vd.likelihood(x_t, t, pi, 3).gather(-1, x_0[..., None]).flatten(1).prod(1)  # q(x_t | x_0)
        p = Z * JOINT[x_0[:, 0, 0, 0], x_0[:, 0, 0, 1]]
        log_p = vd.posterior(Exact(pi)(x_t, t), x_t, t, pi)
        gap = vd.rate_gap(log_p, x_0, x_t, t, pi).flatten(1).sum(1)
        total += weight / 2 * float(torch.where(p > 0, p * gap, 0).sum())
    assert abs(total - ENTROPY) < 1e-3, (total, ENTROPY)


@pytest.mark.parametrize("process", PROCESSES)
def test_tree_bits(use, process):
    """The same, estimated as reports do it: from drawn x_t, in bits."""
    pi = law(use, process)
    counts = (20 * JOINT).round().long()
    voxels = np.array([(i, j) for i in range(3) for j in range(3) for _ in range(counts[i, j])], np.uint8)
    found = vd.tree_bits(Exact(pi), voxels.reshape(-1, 1, 1, 2), vd.tokens([""]), 16_000,
                         torch.Generator().manual_seed(0), batch=8000)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - ENTROPY / math.log(2)) < 4 * error
    assert error < (0.02 if process == "absorbing" else 0.3)


@pytest.mark.parametrize("process", PROCESSES)
def test_losses_agree_with_the_elbo(use, process):
    """LOSS=elbo and LOSS=hybrid without lambda, of the exact denoiser, are the entropy as well."""
    pi, entropy = law(use, process), ENTROPY
    n = 40_000
    u = (torch.arange(n).double() + 0.5) / n
    g = torch.Generator().manual_seed(0)
    x_0 = torch.multinomial(JOINT.flatten(), n, True, generator=g)
    x_0 = torch.stack([x_0 // 3, x_0 % 3], 1).view(-1, 1, 1, 2)
    for loss in ("elbo", "hybrid"):
        use(LOSS=loss, LAMBDA=0.0, VB_STEPS=200)
        t = torch.cos(math.pi / 2 * u)
        t = (t * 200).ceil().clamp(min=1) / 200 if loss == "hybrid" else t
        x_t = vd.q_sample(x_0, t, pi, g)
        values = vd.loss_fn(Exact(pi), x_0, x_t, t, None, pi, 1.0)
        error = 4 * float(values.std()) / n**0.5 + (0.02 if loss == "hybrid" else 0.002)  # 200 steps
        assert abs(float(values.mean()) - entropy) < error, (loss, float(values.mean()), entropy)


def test_cross_entropy_is_t_times_the_elbo(use):
    pi = law(use, "absorbing")
    use(LOSS="ce")
    x_0 = every_state(3)[JOINT.flatten() > 0]  # 7 of 9
    t = torch.full((7,), 0.4, dtype=torch.float64)
    x_t = torch.where(torch.arange(14).view_as(x_0) % 3 > 0, x_0, 3)
    log_p = vd.posterior(Exact(pi)(x_t, t), x_t, t, pi)
    gap = vd.rate_gap(log_p, x_0, x_t, t, pi).flatten(1).sum(1)
    assert torch.allclose(vd.loss_fn(Exact(pi), x_0, x_t, t, None, pi, 2.0), 0.4 * gap / 2) and gap.max() > 0
    assert gap[(x_t == x_0).flatten(1).all(1)].abs().max() == 0  # a revealed voxel costs nothing


# ---------------------------------------------------------------- leaks
def test_what_the_network_sees_does_not_give_x_0_away(use):
    """Row 14: at t = 1 x_t is the same whatever x_0 is; near it, argmax of the input finds x_0 by chance. The
    lab notes' input, a soft mixture of x_0 and 1/K, gives it away at every step but the last."""
    K, x_0 = 3, torch.randint(3, (1, 8, 8, 8), generator=torch.Generator().manual_seed(1))
    for process in PROCESSES:
        pi = law(use, process)
        for t, chance in ((1.0, 0.0), (0.98, 0.02)):
            x_t, other = (vd.q_sample(x, torch.tensor([t]), pi, torch.Generator().manual_seed(2))
                          for x in (x_0, (x_0 + 1) % K))
            assert x_t.dtype == torch.long and (t < 1 or torch.equal(x_t, other))
            seen = F.one_hot(x_t, len(pi))[..., :K].argmax(-1)
            assert float((seen == x_0).double().mean()) < chance + 0.45  # always 0 would get a third
    for t in (0.5, 0.98, 0.999):
        soft = (1 - t) * F.one_hot(x_0, K) + t / K
        assert torch.equal(soft.argmax(-1), x_0)  # 100 %: nothing is left to learn


def test_the_network_refuses_probabilities(use):
    model, data = tiny_model(use)
    x = torch.zeros(1, *data.box)
    with pytest.raises(AssertionError, match="drawn blocks"):
        model(x, torch.ones(1), vd.tokens(["oak"]))


def test_a_fresh_network_is_independent_voxels(use):
    """Its head starts at zero, so p is the frequency of each voxel's classes, times what x_t says."""
    use(PROCESS="uniform")
    data = vd.load_data()
    model = vd.build_model(data).eval()
    x_t = torch.from_numpy(vd.in_box(data.train.voxels[:2], data.box).astype(np.int64))
    t = torch.tensor([0.3, 0.9])
    got = vd.posterior(model(x_t, t, vd.tokens(["oak", ""])), x_t, t, model.pi).exp()
    want = torch.from_numpy(data.counts).float() * vd.likelihood(x_t, t, model.pi, data.K)
    assert torch.allclose(got, want / want.sum(-1, keepdim=True), atol=1e-5)
    assert data.K == 5 and abs(data.blocks - (data.train.voxels > 0).sum() / 24) < 1e-9


# ---------------------------------------------------------------- sampler
def test_cosine_grid_reveals_few_blocks_at_first():
    for steps, blocks in ((20, 0.59), (50, 0.09), (64, 0.06), (200, 0.01)):
        times = vd.cosine_grid(steps)
        assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
        assert abs(190 * (1 - times[1]) - blocks) < 0.006
    five = -np.diff(vd.cosine_grid(50)[:, 0])[:5] * 190
    assert np.allclose(five, (0.09, 0.28, 0.47, 0.65, 0.84), atol=0.006)
    part = vd.cosine_grid(5, 0.4)
    assert part[0] == 0.4 and part[-1] == 0 and all(a > b for a, b in zip(part, part[1:]))
    both = vd.cosine_grid(5, torch.tensor([0.4, 1.0]))  # each tree its own times
    assert torch.allclose(both, torch.cat([part, vd.cosine_grid(5)], 1))


def test_blind_pairs_cost_what_they_must(use):
    """One of two voxels is a log: invalid when both are decided in one step, 1/2 sum d_i^2."""
    use(PROCESS="absorbing")
    pair = torch.tensor([[0, 0.5], [0.5, 0]]).double()
    model = Exact(vd.noise_law(torch.tensor([0.5, 0.5])), pair)
    for steps, share in ((1, 0.5), (8, 0.0769), (50, 0.0123)):
        assert abs(0.5 * (np.diff(vd.cosine_grid(steps)[:, 0]) ** 2).sum() - share) < 1e-4
    x, info = vd.sample(model, range(1500), vd.tokens([""] * 1500), steps=8)
    assert abs(float((x.flatten(1).sum(1) != 1).double().mean()) - 0.0769) < 4 * (0.0769 / 1500) ** 0.5
    logs = float((x > 0).double().flatten(1).sum(1).mean())
    assert info.asked == 8 and abs(sum(info.revealed) - logs) < 1e-9


@pytest.mark.parametrize("process", PROCESSES)
def test_samples_have_the_law_of_the_data(use, process):
    """The exact denoiser in 40 steps, 1,000 trees of two voxels."""
    pi = law(use, process)
    x, _ = vd.sample(Exact(pi), range(1000), vd.tokens([""] * 1000), steps=40)
    found = torch.zeros(9).index_add(0, (3 * x[:, 0, 0, 0] + x[:, 0, 0, 1]), torch.ones(1000)) / 1000
    assert (found.view(3, 3) - JOINT).abs().max() < 0.05


def test_remdm_keeps_the_share_of_mask(use):
    """sigma = 0 is the plain step; for any sigma the shares after the step are those of the schedule."""
    pi, p = law(use, "absorbing"), torch.tensor([0.6, 0.3, 0.1])
    for t, s in ((1.0, 0.7), (0.7, 0.3), (0.3, 0.0), (0.1, 0.1)):
        x_t = torch.arange(4).view(4, 1)
        time_t, time_s = torch.full((4,), t), torch.full((4,), s)
        log_p = vd.posterior(p.log().expand(4, 1, 3), x_t, time_t, pi)
        if t < 1:
            plain = vd.reverse(log_p, x_t, time_t, time_s, pi)
            same = vd.remask(log_p, x_t, time_t, time_s, torch.zeros(4))
            assert torch.allclose(same, plain, atol=1e-6)
        before = torch.tensor([*((1 - t) * p), t])
        for sigma in (0.0, 0.1, min(1.0, s / max(1 - t, 1e-9))):
            if sigma > s / max(1 - t, 1e-9):
                continue
            step = vd.remask(log_p, x_t, time_t, time_s, torch.full((4,), sigma))[:, 0].nan_to_num()
            assert torch.allclose(step[before > 0].sum(1), torch.ones(int((before > 0).sum())), atol=1e-5)
            assert torch.allclose(before @ step, torch.tensor([*((1 - s) * p), s]), atol=1e-5), (t, s, sigma)
    loop = vd.schedule(40, kind="loop")
    assert len(loop) == 40 and sum(t == s for t, s, _ in loop) == 20 and loop[-1][1] == 0
    assert all(0 <= sigma <= min(1, s / max(1 - t, 1e-9)) + 1e-12 for t, s, sigma in loop)
    assert all(sigma == 0 for *_, sigma in vd.schedule(40))
    assert max(sigma for *_, sigma in vd.schedule(40, kind="cap")) == vd.ETA


class Says(Exact):
    """What it says depends on the caption and on nothing else."""

    def __call__(self, x_t, t, words=None, before=None, plan=None):
        told = torch.tensor([[2.0, 1, 0.5], [0, 1, 3]]).double().log_softmax(-1)
        return told[(words[:, 0] != vd.null).long()][:, None, None, None].expand(-1, 1, 1, 2, -1)


@pytest.mark.parametrize("process", ("absorbing", "uniform"))
def test_guidance(use, process):
    """w = 0 is no caption, w = 1 the caption; where blocks are revealed does not depend on w."""
    model = Says(law(use, process))
    oak, none = vd.tokens(["oak"] * 200), torch.full((200, 1), vd.null)

    def drawn(words, w):
        use(GUIDANCE=w)
        path = []
        x, info = vd.sample(model, range(200), words, steps=6, path=path)
        assert info.asked == (6 if w == 1 else 12)
        return x, torch.stack([p for _, p in path])
    assert torch.equal(drawn(oak, 0.0)[0], drawn(none, 1.0)[0])
    plain, strong = drawn(oak, 1.0), drawn(oak, 3.0)
    assert float((strong[0] == 2).double().mean()) > float((plain[0] == 2).double().mean()) + 0.05
    if process == "absorbing":
        assert torch.equal(plain[1] == 3, strong[1] == 3)


def test_seeds(use):
    model, data = tiny_model(use)
    words = vd.tokens(["oak"] * 3)
    a, b, alone = (vd.sample(model, seeds, words[:len(seeds)])[0] for seeds in ((0, 1, 2), (5, 1, 2), (1,)))
    assert torch.equal(a[1:], b[1:]) and not torch.equal(a[0], b[0]) and torch.equal(a[1:2], alone)
    assert a.max() < data.K  # no MASK is left


def test_known_blocks_stay(use):
    model, data = tiny_model(use)
    known = torch.full((2, *data.box), -1)
    known[:, :4, 3, 3] = 3
    path = []
    x, _ = vd.sample(model, (0, 1), vd.tokens(["birch"] * 2), known=known, path=path)
    assert (x[:, :4, 3, 3] == 3).all()
    assert all((step[:, :4, 3, 3] == 3).all() for _, step in path)
    assert path[0][0] == pytest.approx(1 - 4 / math.prod(data.box))  # t is the share of MASK
    use(ETA=1.0)
    for kind in ("loop", "cap", "rescale"):
        x, _ = vd.sample(model, (0, 1), vd.tokens(["birch"] * 2), 8, kind, known=known)
        assert (x[:, :4, 3, 3] == 3).all() and x.max() < data.K
    nothing, _ = vd.sample(model, (0, 1), vd.tokens(["birch"] * 2), known=torch.full_like(known, -1))
    assert torch.equal(nothing, vd.sample(model, (0, 1), vd.tokens(["birch"] * 2))[0])


def test_what_is_known_decides_the_rest(use):
    """One of two voxels is given: the other follows the exact conditional law."""
    model = Exact(law(use, "absorbing"))
    for given in range(3):
        known = torch.tensor([given, -1]).view(1, 1, 1, 2).expand(1000, -1, -1, -1)
        x, _ = vd.sample(model, range(1000), vd.tokens([""] * 1000), steps=20, known=known)
        found = x[:, 0, 0, 1].bincount(minlength=3) / 1000
        assert (found - JOINT[given] / JOINT[given].sum()).abs().max() < 0.06


def test_sar_leaves_whole_trees_and_never_lowers_the_score(use):
    model, data = tiny_model(use, SAR_ROUNDS=2)
    def boxed(v):
        return vd.to_states(v, data.box)
    whole = boxed(data.test.voxels[:4])
    same, asked = vd.structure_remask(model, whole, range(4), ["oak"] * 4)
    assert torch.equal(same, whole) and asked == 0
    g = np.random.default_rng(0)
    damaged = np.stack([trees.corrupt(data.test.voxels[0], kind, g)
                        for kind in ("cut trunk", "no ground logs", "noise 1e-2")])
    damaged = vd.to_voxels(boxed(damaged), model)  # noise outside the box is not the model's to mend
    x, asked = vd.structure_remask(model, boxed(damaged), range(3), ["oak"] * 3)
    assert (trees.scs(vd.to_voxels(x, model)).scs >= trees.scs(damaged).scs).all() and asked > 0
    near = F.max_pool3d(boxed(trees.broken(damaged)).float(), 3, 1, 1).bool()
    use(SAR_ROUNDS=1)
    once, _ = vd.structure_remask(model, boxed(damaged), range(3), ["oak"] * 3)
    assert torch.equal(once[~near], boxed(damaged)[~near])
    known = torch.where(near, boxed(damaged), -1)  # all that is broken must stay
    kept, asked = vd.structure_remask(model, boxed(damaged), range(3), ["oak"] * 3, known)
    assert torch.equal(kept, boxed(damaged)) and asked == 0


# ---------------------------------------------------------------- data, captions
def test_batches_are_a_function_of_the_step(use):
    use(BATCH_SIZE=16, SELF_CONDITION=True)
    data = vd.load_data()
    a, b, other, again = (vd.draw_batch(data, *at) for at in ((3,), (3,), (4,), (3, 1)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["t"], other["t"]) and not torch.equal(a["x_t"], again["x_t"])
    assert a["x_t"].dtype == torch.long and (a["x_t"] == a["x_0"]).any()
    u = torch.acos(a["t"].double()) * 2 / math.pi * 16
    assert sorted(u.long().tolist()) == list(range(16))  # one in each sixteenth


def test_captions(use):
    rows = [vd.rows_of(word)[0] for word in trees.words()]
    assert len(set(rows)) == len(rows) and max(rows) < vd.vocabulary  # no two words share a row
    assert vd.rows_of("oak") == [zlib.crc32(b"oak") % 1024]
    assert vd.rows_of("") == [vd.null]
    table = vd.tokens(["large spruce, 11 blocks", "oak", ""])
    assert table.shape == (3, 4) and table[1, 1:].tolist() == [vd.pad] * 3 and table[2, 0] == vd.null
    torch.manual_seed(0)
    words = vd.Words(16)
    assert torch.allclose(words(table)[1], words(vd.tokens(["oak"]))[0], atol=1e-6)  # padding is not read
    g = np.random.default_rng(0)
    empty = sum(trees.caption(dict(species="oak", height=6), g, 0.1) == "" for _ in range(10_000))
    assert 900 < empty < 1100


def test_plans():
    v = np.zeros((1, 4, 4, 4), np.uint8)
    v[0, 0, 0, 0], v[0, 0, 0, 1], v[0, 3, 3, 3] = 2, 1, 4
    plan = vd.pooled(v)
    assert plan.shape == (1, 2, 2, 2) and plan[0, 0, 0, 0] == 1 and plan[0, 1, 1, 1] == 4 and plan.sum() == 5


# ---------------------------------------------------------------- numbers
def test_neighbours():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 300, 3))
    same = vd.neighbours(a, b)
    assert 0.93 < same["coverage"] < 0.995 and 0.9 < same["density"] < 1.1 and same["precision"] > 0.95
    few = vd.neighbours(a, np.repeat(a[:1], 300, 0))
    assert few["precision"] == 1 and few["coverage"] < 0.05
    far = vd.neighbours(a, b + 100)
    assert far == dict(precision=0, recall=0, density=0, coverage=0)
    real = np.c_[a[:, :2], np.zeros(300)]  # with a statistic that never varies
    flat = np.c_[np.repeat(b[:60, :2], 5, 0), np.zeros(300)]
    wild = flat.copy()
    wild[0, 2] = 1  # and one stray block
    assert abs(vd.neighbours(real, wild)["recall"] - vd.neighbours(real, flat)["recall"]) < 0.03
    ties = np.repeat(np.arange(3.0), 100)[:, None]
    assert vd.neighbours(ties, ties)["coverage"] == 1


def test_distribution():
    """1 for new draws of any size, larger the further a law is off, and a stray block counts."""
    g = np.random.default_rng(0)
    test, fresh = g.normal(size=(100, 5)), g.normal(size=(1000, 5))
    ladder = [vd.distribution(g.normal(size=(100, 5)) + shift, test, fresh) for shift in (0, 0.3, 1.0)]
    assert 0.6 < ladder[0] < 1.5 < ladder[1] < ladder[2]
    test[:, 4] = fresh[:, 4] = 0
    assert vd.distribution(test, test, fresh) < 1e-6 < vd.distribution(test + [0, 0, 0, 0, 1], test, fresh)


def test_reference_rows(use):
    """New draws are whole and are what their captions say; nothing else is both, and each row is told apart."""
    use(GRID=16, TRAIN=200, TEST=80, SAMPLES=40)
    data = vd.load_data()
    ref = vd.reference(data)
    fresh = ref.rows["fresh draw"]
    assert fresh["scs"] == fresh["valid"] == fresh["faithfulness"] == 1 and fresh["coverage"] > 0.8
    assert ref.rows["always air"]["scs"] == ref.rows["always air"]["coverage"] == 0
    assert ref.rows["training copy"]["distance"] == 0 and ref.rows["training copy"]["valid"] == 1
    assert ref.rows["marginal argmax"]["unique"] < 0.1 and ref.rows["independent marginals"]["valid"] < 0.5
    assert vd.share(ref.shuffled) < 0.9
    use(SPECIES="oak,swamp_oak", TRAIN=200)
    both = vd.load_data()
    assert vd.marginal_bits(both.test, "oak", both) > ref.bits["oak"] + 20  # "oak" says less now


def test_wishes_are_read(capsys):
    seen = [dict(species="oak", height=6, size="small"), dict(species="spruce", height=10, size="large")]
    assert vd.understood("small oak tree", seen) == dict(species="oak", size="small")
    assert capsys.readouterr().out == ""
    assert vd.understood("large oak", seen) == dict(species="oak", size="large")
    assert capsys.readouterr().out == "note: no training tree was all of 'large oak'; size was small\n"
    with pytest.raises(SystemExit):
        vd.understood("birch", seen)
    assert "no training tree had species birch; there were oak, spruce" in capsys.readouterr().err


def test_copies_are_seen(use):
    use(GRID=16)
    drawn = trees.trees("oak", 40, 16, 1, cache=None).voxels
    memory = vd.memory_of(drawn)
    assert (vd.nearest_train(drawn[:3], memory) == 0).all()
    turned = np.stack([trees.augment(v, np.random.default_rng(3)) for v in drawn[:3]])
    assert (vd.nearest_train(turned, memory) == 0).all()
    moved = np.stack([trees.augment(v, np.random.default_rng(3), 4) for v in drawn[:3]])
    assert (vd.nearest_train(moved, memory) > 0.3).any()
    use(JITTER=4)  # then where a tree stands does not make it new
    assert (vd.nearest_train(moved, vd.memory_of(drawn)) == 0).all()
    use(JITTER=0)
    other = vd.nearest_train(trees.trees("oak", 6, 16, 3, cache=None).voxels, memory)
    assert (other >= 0).all() and other.max() > 0
    assert (vd.nearest_train(np.zeros((1, 16, 16, 16), np.uint8), memory) == 1).all()
    low, high = torch.zeros(50), torch.ones(50)
    assert metrics.mann_whitney(low, high) < -8 and abs(metrics.mann_whitney(high, high)) < 1e-9


def test_grid_bits_of_an_oak(use):
    """At t = 1 no network can beat the voxels' own entropies: 91.29 bits for oaks, of which 77.70 are
    what the voxels know of each other."""
    use(GRID=16, SPECIES="oak", TRAIN=1000, TEST=60)
    data = vd.load_data()
    assert abs(vd.marginal_bits(data.train, "oak", data) - 91.29) < 1.2
    assert abs(vd.kind_entropy("oak") - 13.585) < 1e-3
    use(SPECIES="oak,fancy_oak")
    assert abs(vd.kind_entropy("oak") - 14.585) < 1e-3  # a caption "oak" means both: one bit more
    assert vd.kind_entropy("fancy_oak") is None


def test_the_box_holds_every_tree_and_nothing_is_lost_on_the_way(use):
    """What the network does not see is air in every tree, with the trunk in the middle of what it sees."""
    for chosen, box in ((dict(GRID=16, SPECIES="oak,birch,spruce", MULTS=(1, 2)), (12, 8, 8)),
                        (dict(GRID=16, SPECIES="oak", MULTS=(1,)), (8, 6, 6)),
                        (dict(GRID=16, SPECIES="fancy_oak", MULTS=(1, 2)), (16, 16, 16)),
                        (dict(GRID=8, SPECIES="oak,birch", COARSE="detail", MULTS=(1,)), (8, 8, 8))):
        use(TRAIN=400, TEST=400, **chosen)
        data = vd.load_data()
        assert data.box == box
        for part in (data.train, data.test, data.fresh):
            x = torch.from_numpy(vd.in_box(part.voxels, data.box).astype(np.int64))
            assert np.array_equal(vd.to_voxels(x, SimpleNamespace(K=data.K)), part.voxels)
            assert (x[:, 0, box[1] // 2, box[2] // 2] % 2 == 1).all()  # the trunk
        use(COARSE="")
    use(GRID=16, SPECIES="dark_oak,acacia", TRAIN=60, TEST=60, MULTS=(1,))  # own trees are turned and moved
    own = vd.load_data().train.voxels
    for jitter in (0, 2):
        use(DATA="own.npz", JITTER=jitter)
        box = vd.box_of([SimpleNamespace(voxels=own), SimpleNamespace(voxels=own)])
        g = np.random.default_rng(0)
        turned = np.stack([trees.augment(v, g, jitter) for v in own for _ in range(8)])
        assert (vd.in_box(turned, box) > 0).sum() == (turned > 0).sum()


def test_training_beats_independent_voxels(use):
    """Seventy steps on 8^3: the loss and the bits a tree leave those of independent voxels well behind."""
    use(TRAIN=240, TEST=48, WIDTH=16, BATCH_SIZE=16, LR=4e-3)
    data = vd.load_data()
    torch.manual_seed(0)
    model = vd.build_model(data)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99))
    run, guard = SimpleNamespace(rank=0, world=1, device=CPU), common.Guard()
    losses = [vd.train_step(model, model, ema, optimizer, guard, data, i, 70, run)[0] for i in range(70)]
    oaks = data.test.voxels[::2]
    bits = vd.tree_bits(ema, oaks, vd.tokens(["oak"]), 64, torch.Generator().manual_seed(0)).mean()
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert vd.kind_entropy("oak") - 3 < bits < 0.8 * vd.marginal_bits(data.test, "oak", data)


# ---------------------------------------------------------------- whole runs
IMPORT = "import train_voxel_d3pm as script\n"
STUB = IMPORT + """
def stub(folder, *rest):
    folder.mkdir(parents=True, exist_ok=True)
    torch.rand(1)
    return {"bits": dict(value=1.0, floor=1.0, ceiling=None, better="lower", n=1)}
script.report, script.summary, script.evaluate = stub, str, lambda *a, **k: (None, None)
""" + AT_CALL
FLAT = IMPORT + """
import numpy as np
script.trees.render = lambda v, pixels=160, *a, **k: np.full((pixels, pixels, 3), 200, np.uint8)
"""  # the pictures are tested in test_data_trees.py


@pytest.fixture(scope="module")
def launch(zygote, home, tmp_path_factory):
    """launch(*settings, fault=STUB, out=None) runs train_voxel_d3pm.py on a few trees, or sample.py; out is
    OUT, by default a new one. Returns code, output, folder of the run."""
    def run(*settings, fault=STUB, out=None, program="train", limit=300, **environment):
        out = Path(out or tmp_path_factory.mktemp("runs"))
        arguments = list(settings)
        if program == "train":
            if not (out / "cache").exists():
                (out / "cache").symlink_to(home / "cache")
            arguments = [f"OUT={out}", *TINY, *settings]
        result = fork(zygote, tmp_path_factory.mktemp("job"), out / "voxel_d3pm", limit, arguments=arguments,
                      environment=environment, fault=fault, program=program, script="train_stl10")
        result.out = out
        return result
    return run


def test_killed_and_resumed_equals_unbroken(launch):
    """kill -9 in step 4 with the last save at step 3, then SIGTERM in step 5: the same bits as 6 steps."""
    from test_reliability import difference
    at = ["EPOCHS=2", "DROPOUT=0.1", "EVAL_EVERY=1000", "SELF_CONDITION=True", "ACCUM=2", "BATCH_SIZE=4"]
    whole = launch(*at)
    assert whole.code == 0 and len(log(whole.folder)) == 6, whole.output
    run = launch(*at, "SAVE_SECONDS=0", fault=STUB + "at_call('train_step', 4, kill())")
    assert run.code == -9 and state(run.folder)["step"] == 3, run.output
    run = launch(*at, fault=STUB + "at_call('train_step', 2, kill(signal.SIGTERM))", out=run.out)
    assert run.code == 143 and state(run.folder)["step"] == 5 and "Traceback" not in run.output, run.output
    assert "continuing after step 3 of 6" in run.output
    run = launch(*at, "STEPS=7", "GUIDANCE=2", out=run.out)  # how it samples may change
    assert run.code == 0, run.output
    assert difference(state(run.folder), state(whole.folder)) == "" and log(run.folder) == log(whole.folder)
    refused(launch(*at, "RES_BLOCKS=2", out=run.out), "RES_BLOCKS: 1 there, 2 now", "RESUME=False")


@pytest.mark.parametrize("settings", ("PROCESS=absorbing LOSS=hybrid", "PROCESS=uniform LOSS=hybrid", "PROCESS=marginal LOSS=elbo PRIOR=class",
                                      "BACKBONE=dit", "LOSS=elbo JITTER=1 SPECIES=oak"))
def test_every_kind_of_training_steps(launch, settings):
    run = launch("EPOCHS=1", *settings.split(), "EVAL_EVERY=1000")
    assert run.code == 0 and len(log(run.folder)) == 3, run.output
    assert all(math.isfinite(float(row["loss"])) and row["skipped"] == "0" for row in log(run.folder))


@pytest.fixture(scope="module")
def done(launch):
    run = launch("EPOCHS=1", fault=FLAT)
    assert run.code == 0, run.output
    return run


NUMBERS = ("scs valid coverage novelty faithfulness bits_gap_oak accuracy recall_non_air scs_sar valid_sar "
           "valid_remdm valid_rules").split()


def test_folder_and_metrics(done):
    folder = done.folder / "epoch_0001"
    names = {p.name for p in folder.iterdir()}
    pictures = ("samples", "samples_sar", "layers", "growth", "by_time", "table", "history", "loss")
    assert {f"{n}.{end}" for n in pictures for end in ("png", "npy")} <= names, names
    assert {"sample_00.schem", "sample_03.vox", "table.md", "captions.txt", "metrics.json"} <= names
    table = json.loads((folder / "metrics.json").read_text())
    assert set(NUMBERS) <= set(table)
    assert all({"value", "floor", "ceiling", "better", "n"} == set(row) for row in table.values())
    assert table["accuracy"]["floor"] > 0.5 and table["recall_non_air"]["floor"] == 0
    assert table["scs"]["ceiling"] == table["valid"]["ceiling"] == 1 and table["bits_gap_oak"]["ceiling"] == 0
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (8, 8, 8, 8) and samples.dtype == np.uint8
    text = (folder / "table.md").read_text()
    for row in ("always air", "marginal argmax", "independent marginals", "training copy", "fresh draw",
                "raw", "+ ReMDM", "+ SAR", "rules"):
        assert f"| {row} |" in text
    assert "blocks" in done.output and "epoch 1: scs" in done.output


def test_sample_py(launch, done, tmp_path):
    last = str(done.folder / "last.pt")

    def drawn(*settings):
        return launch("--checkpoint", last, "--out", str(tmp_path / "s"), *settings, program="sample",
                      fault=FLAT)
    command = ["--prompt", "tall oak tree", "--size", "normal", "--num-samples", "2", "--sampling-steps", "5"]
    run = drawn(*command)
    assert run.code == 0 and "blocks decided together" in run.output, run.output
    x = np.load(tmp_path / "s" / "samples.npy")
    assert x.shape == (2, 8, 8, 8) and x.max() < 5 and (tmp_path / "s" / "sample_01.schem").exists()
    assert "normal oak" in (tmp_path / "s" / "samples.txt").read_text()
    for more in (["REPAIR=sar"], ["REPAIR=rules"], ["REPAIR=remdm", "--guidance", "2"]):
        assert drawn(*command, *more).code == 0
    refused(drawn("--prompt", "tall oka"), "unknown word 'oka'", "birch")
    refused(drawn("--prompt", "acacia"), "species acacia", "birch, oak")
    refused(drawn("--prompt", "oak, 20 blocks"), "had height 20; there were 5, 6, 7")
    refused(drawn("--prompt", "oak", "--num-samples", "0"), "at least 1")
    refused(drawn("--size", "huge"), "SIZE='huge'")
    stray = np.zeros((8, 8, 8), np.uint8)
    stray[0, 4, 4], stray[1, 0, 0] = 3, 4
    voxel_files.write(tmp_path / "stray.schem", stray)
    refused(drawn(f"INPAINT={tmp_path / 'stray.schem'}"), "1 blocks stand outside")
    trunk = np.zeros((8, 8, 8), np.uint8)
    trunk[:4, 4, 4] = 3  # birch
    voxel_files.write(tmp_path / "trunk.schem", trunk)
    run = drawn("--num-samples", "2", f"INPAINT={tmp_path / 'trunk.schem'}", "FORMATS=vox")
    assert run.code == 0, run.output
    x = np.load(tmp_path / "s" / "samples.npy")
    assert x.shape == (2, 8, 8, 8) and (x[:, :4, 4, 4] == 3).all()
    voxel_files.write(tmp_path / "other.schem", np.where(trunk, 9, 0))
    refused(drawn(f"INPAINT={tmp_path / 'other.schem'}"), "acacia_log")
    refused(drawn("INPAINT=/none.schem"), "INPAINT=/none.schem: No such file")
    (tmp_path / "cut.schem").write_bytes((tmp_path / "trunk.schem").read_bytes()[:50])
    refused(drawn(f"INPAINT={tmp_path / 'cut.schem'}"), "cut.schem")


def test_full_repeats_the_report(launch, done, tmp_path):
    run = launch("--checkpoint", str(done.folder / "last.pt"), "--out", str(tmp_path), "--full",
                 program="sample", fault=FLAT)
    assert run.code == 0, run.output
    folder = done.folder / "epoch_0001"
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in tmp_path.iterdir()}
    for name in sorted(n for n in names if n.endswith((".npy", ".schem", ".vox", ".txt", ".md"))):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_plans_then_details(launch, tmp_path):
    """COARSE=plan learns 4^3 plans, COARSE=detail trees given them, and draws through PLAN_FROM."""
    plan = launch("EPOCHS=1", "COARSE=plan", "EVAL_EVERY=1000")
    assert plan.code == 0, plan.output
    at = f"PLAN_FROM={plan.folder / 'last.pt'}"
    detail = launch("EPOCHS=1", "COARSE=detail", at, "EVAL_EVERY=1000")
    assert detail.code == 0, detail.output
    run = launch("--checkpoint", str(detail.folder / "last.pt"), "--out", str(tmp_path), "--num-samples", "2",
                 "--prompt", "oak", program="sample", fault=FLAT)
    assert run.code == 0 and np.load(tmp_path / "samples.npy").shape == (2, 8, 8, 8), run.output
    refused(launch("--checkpoint", str(plan.folder / "last.pt"), "--out", str(tmp_path), program="sample",
                   fault=FLAT), "draws plans")


BAD = {
    "PROCESS=gauss": "one of absorbing", "LOSS=mse": "one of ce", "GRID=9": "must divide",
    "EPOCHS=0": "above 0", "WIDTH=9": "divisible by 8", "ATTN_LEVELS=2,3": "levels 1 to 1",
    "SAMPLES=4": "at least 8", "SEED=-1": "SEED", "PATCH=3": "must divide", "DROPOUT=1.5": "DROPOUT",
    "REPAIR=sar PROCESS=uniform": "no MASK", "INPAINT=a.schem PROCESS=marginal": "no MASK",
    "COARSE=plan JITTER=1": "in the middle", "COARSE=detail": "COARSE=plan", "GRID=40": "32",
    "SAMPLES=60": "TEST=120", "EVAL_EVERY=2 KEEP_EVERY=3": "multiple", "FORMATS=schem,obj": "litematic",
    "BACKBONE=dit DIM=26": "DIM=26", "SIZE=huge": "one of"}


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings(use, capsys, monkeypatch, setting):
    """Each mistake is one clear line and exit code 2."""
    for name in common.settings(vars(vd)):
        monkeypatch.setattr(vd, name, getattr(vd, name))
    with pytest.raises(SystemExit) as end:
        common.override(vars(vd), setting.split())
        vd.check_settings()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and BAD[setting] in said, said


def test_bad_data(launch, tmp_path):
    refused(launch("EPOCHS=1", "SPECIES=cherry"), "does not fit")
    refused(launch("EPOCHS=1", "SPECIES=fir"), "unknown")
    (tmp_path / "trees.npz").write_bytes(b"hello")
    refused(launch("EPOCHS=1", f"DATA={tmp_path / 'trees.npz'}"), "trees.npz")
    refused(launch("EPOCHS=1", "DATA=/nowhere.npz"), "nowhere")
    few = trees.trees("oak", 12, 8, 1, cache=None).voxels
    np.save(tmp_path / "few.npy", few)
    refused(launch("EPOCHS=1", f"DATA={tmp_path / 'few.npy'}"), "give more trees")
    np.save(tmp_path / "own.npy", trees.trees(("oak", "birch"), 80, 8, 1, cache=None).voxels)
    run = launch("EPOCHS=1", f"DATA={tmp_path / 'own.npy'}", "EVAL_EVERY=1000")
    assert run.code == 0, run.output
