"""train_world_model.py: closed forms of shortcut forcing, causality, cache, batches, the report, playing."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import AT_CALL, fork, log, state, torchrun

import common
import train_world_model as wm
from data import game

SMALL = dict(DIM=32, DEPTH=2, HEADS=2, KV_HEADS=1, WINDOW=6, K_MAX=8, SEQ_LEN_SHORT=8, SEQ_LEN_LONG=12,
             BATCH_SIZE=8, BATCH_SIZE_LONG=4, TRAIN=8, TEST=8, LEVEL=0, CONTEXT=4, HORIZON=8, SAMPLES=8)


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Put settings into the script, as override() does, until the end of the test; small ones at first."""
    def put(**chosen):
        for name, value in chosen.items():
            assert type(getattr(wm, name)) is type(value), name
            monkeypatch.setattr(wm, name, value)
    put(**SMALL, OUT=str(tmp_path))
    return put


def dynamics(seed=0, tokens=3, channels=5, actions=4, dtype=torch.float64):
    """A network that does something: every weight random."""
    torch.manual_seed(seed)
    model = wm.Dynamics(tokens, channels, actions, (1, tokens)).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(B=3, T=9, tokens=3, channels=5, actions=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, T, tokens, channels, generator=g, dtype=dtype)
    i = torch.randint(1, wm.K_MAX + 1, (B, T), generator=g)
    return z, i, torch.randint(actions, (B, T), generator=g)


# ---------------------------------------------------------------- closed forms
class Gaussian:
    """The network that has learned one number x ~ N(0, 1) exactly: z_hat = a(i, e) z, the smallest step by
    E[x | z], the others by the rule of `target`."""

    def __init__(self, target):
        K, self.a = wm.K_MAX, torch.full((wm.K_MAX + 1, wm.K_MAX.bit_length()), math.nan, dtype=torch.float64)
        tau = torch.arange(1, K + 1, dtype=torch.float64) / K
        self.a[1:, 0] = (1 - tau) / ((1 - tau)**2 + tau**2)
        for e in range(1, K.bit_length()):
            i = torch.arange(2**e, K + 1, 2**e)[None]
            self.a[i[0], e] = target(self.look, torch.ones(1, i.shape[1], 1, 1, dtype=torch.float64), i,
                                     torch.full_like(i, e)).flatten()

    def look(self, z, i, e):
        return self.a[i, e][..., None, None] * z

    def __call__(self, z, i, actions, e=None, alone=None, caches=None, keep=True):
        return self.look(z, i, torch.zeros_like(i) if e is None else e)


def spread_of(model, K):
    """Standard deviation of what imagine() makes of N(0, 1); the network is linear, so one number tells."""
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    return abs(float(wm.imagine(model, None, torch.zeros(1, dtype=torch.int64), start, K)))


def test_shortcut_forcing_has_the_closed_form_of_a_gaussian(use):
    """Row 17: loss and sampler together; 64 Euler steps of the exact flow give 0.980, and so must any K."""
    use(K_MAX=64)
    model = Gaussian(wm.shortcut_target)
    for K in (1, 2, 4, 8, 16, 64):
        assert abs(spread_of(model, K) - 0.9801) < 1e-3, (K, spread_of(model, K))


def test_it_minimises_the_loss(use):
    use(K_MAX=64)
    model, n = Gaussian(wm.shortcut_target), 20_000
    g = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 4, 1, 1, generator=g, dtype=torch.float64) for _ in range(2))
    boot = torch.arange(n) % 2 == 0
    i, e = wm.draw_levels(boot, 4, g)

    def loss(scale, rows):
        class Scaled(Gaussian):
            def __init__(self):
                self.a = model.a * scale
        alone = torch.zeros(n, dtype=torch.bool)
        found = wm.loss_fn(Scaled(), model, z, eps, i, e, torch.zeros_like(i), alone)
        return float(found[rows].mean())
    assert loss(1.0, e > 0) < 1e-20 < 1e-6 < min(loss(0.98, e > 0), loss(1.02, e > 0))
    assert loss(1.0, e == 0) < min(loss(0.95, e == 0), loss(1.05, e == 0))


def notes_target(average):
    """The lab notes' bootstrap target: z_2 alone, from a middle noised anew with the training noise; or the
    mean of both velocities, from that middle. z_tau = 1 here, and eps its mean given z_tau."""
    def target(f, z_tau, i, e):
        tau, d = i / wm.K_MAX, 2.0**e / wm.K_MAX
        z_1, a_2 = (f(z_tau, k, e - 1)[..., 0, 0] for k in (i, i - 2**(e - 1)))
        eps, later = tau / ((1 - tau)**2 + tau**2), tau - d / 2
        middle = (1 - later) * z_1 + later * eps
        z_2 = a_2 * middle
        u = ((1 - z_1) / tau + (middle - z_2) / later) / 2
        return (1 - tau * u if average else z_2)[..., None, None]
    return target


@pytest.mark.parametrize("average, expected", [(False, {1: 1.72, 2: 1.72, 4: 1.40, 8: 1.17, 16: 1.05}),
                                               (True, {1: 0.995, 2: 0.995, 4: 0.984})])
def test_the_targets_of_the_lab_notes_fail(use, average, expected):
    use(K_MAX=64)
    model = Gaussian(notes_target(average))
    for K, std in expected.items():
        assert abs(spread_of(model, K) - std) < 0.005, (K, spread_of(model, K))


@pytest.mark.parametrize("fresh, expected", [(True, {4: 0.56, 16: 0.66, 64: 0.69}),
                                             (False, {4: 0.89, 16: 1.83, 64: 3.24})])
def test_the_sampler_of_the_lab_notes_fails(use, fresh, expected):
    """(1 - t') z_hat + t' noise is not an Euler step: with new noise, and with the first noise again."""
    use(K_MAX=64)
    model = Gaussian(wm.shortcut_target)
    for K, std in expected.items():
        start, new = 1.0, 0.0  # what the start is multiplied by, and the variance that is added on the way
        for k in range(K, 0, -1):
            a, left = float(model.a[k * 64 // K, 0]), (k - 1) / K
            start = (1 - left) * a * start + (0 if fresh else left)
            new = ((1 - left) * a)**2 * new + (left**2 if fresh else 0)
        assert abs(math.sqrt(start**2 + new) - std) < 0.01, (K, math.sqrt(start**2 + new))


def test_the_target_is_that_of_velocities_and_of_the_paper(use):
    """Ours, the mean of velocities (Frans 2024), and the paper's with its tau = 1 - ours: the same numbers. A
    step of size d to z* lands where the two half steps do."""
    use(K_MAX=16)
    g = torch.Generator().manual_seed(0)
    boot = torch.ones(50, dtype=torch.bool)
    i, e = wm.draw_levels(boot, 7, g)
    z = torch.randn(50, 7, 2, 3, generator=g, dtype=torch.float64)

    def f(z, i, e):  # any function of all three
        return torch.sin(z * (1 + i[..., None, None]) + e[..., None, None]) + 0.3 * z
    z_star = wm.shortcut_target(f, z, i, e)
    tau, d = (v[..., None, None].double() for v in (i / 16, 2.0**e / 16))
    half = (e - 1).clamp(min=0)
    u_1 = (z - f(z, i, half)) / tau
    middle = z - d / 2 * u_1
    u_2 = (middle - f(middle, i - 2**half, half)) / (tau - d / 2)
    by_velocity = z - tau * (u_1 + u_2) / 2
    sigma = 1 - tau  # the paper's tau
    b_1 = (f(z, i, half) - z) / (1 - sigma)
    after = z + b_1 * d / 2
    b_2 = (f(after, i - 2**half, half) - after) / (1 - (sigma + d / 2))
    by_paper = z + (1 - sigma) * (b_1 + b_2) / 2
    for other in (by_velocity, by_paper):
        assert (z_star - other)[e > 0].abs().max() < 1e-12
    landed = z + d / tau * (z_star - z)
    assert (landed - (middle - d / 2 * u_2))[e > 0].abs().max() < 1e-12


def test_no_gradient_through_the_teacher(use):
    model, teacher = (dynamics(k, dtype=torch.float32) for k in (0, 1))
    z, i, actions = batch(dtype=torch.float32)
    i, e = wm.draw_levels(torch.ones(3, dtype=torch.bool), 9, torch.Generator().manual_seed(0))
    loss = wm.loss_fn(model, teacher, z, torch.randn_like(z), i, e, actions, torch.zeros(3, dtype=torch.bool))
    loss.mean().backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.head.weight.grad.abs().max() > 0


# ---------------------------------------------------------------- noise
@pytest.mark.parametrize("rows", (1, 2, 4, 6))
def test_a_quarter_of_the_rows_is_bootstrapped(rows):
    """Over the run, however few there are in a batch."""
    found = torch.cat([wm.spread(rows, 0.25, k * rows) for k in range(40)])
    assert found.sum() == 10 * rows and found.view(-1, 4).sum(1).eq(1).all()
    assert not wm.spread(7, 0.0).any() and wm.spread(7, 1.0, 10**7).all()


def test_levels_lie_on_the_grid_of_their_step(use):
    use(K_MAX=16)
    i, e = wm.draw_levels(torch.ones(4000, dtype=torch.bool), 5, torch.Generator().manual_seed(0))
    assert (i % 2**e == 0).all() and i.min() == 1 and i.max() == 16
    for size in range(5):
        assert len(i[e == size].unique()) == 16 >> size
        assert abs((e == size).double().mean() - 0.2) < 0.02  # all sizes alike (the notes: 1/d)


def test_every_frame_has_its_own_noise(use):
    """Row 16: levels of neighbours have nothing to do with each other, unlike the lab notes' one for all."""
    use(K_MAX=64)

    def correlation():
        i, e = wm.draw_levels(torch.zeros(20_000, dtype=torch.bool), 8, torch.Generator().manual_seed(0))
        assert (e == 0).all()
        return float(torch.corrcoef(torch.stack([i[:, 3], i[:, 4]]).double())[0, 1]), float((i / 64).mean())
    for shift, expected in ((1.0, 0.5), (6.0, 6 / 5 * (1 - math.log(6) / 5))):  # means of u, 6 u / (1 + 5 u)
        use(SHIFT=shift)
        r, mean = correlation()
        assert abs(r) < 0.03 and abs(mean - expected - 0.5 / 64) < 0.005
    use(NOISE="same")
    assert correlation()[0] > 0.99
    use(NOISE="context")  # the notes' mend: the past clean, the rest of it rising
    assert correlation()[0] > 0.5


def test_the_ramp_looks_at_clean_frames(use):
    tau = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(wm.weight(tau), torch.tensor([1.0, 0.55, 0.1]))
    use(RAMP="noise")  # the lab notes' code
    assert wm.weight(tau)[2] > wm.weight(tau)[0]


# ---------------------------------------------------------------- the network
def test_the_future_does_not_change_the_past(use):
    model, (z, i, actions) = dynamics(), batch()
    alone = torch.zeros(3, dtype=torch.bool)
    before = model(z, i, actions, alone=alone)
    for t in (4, 8):
        other = [v.clone() for v in (z, i, actions)]
        other[0][:, t] += 1
        other[1][:, t] = other[1][:, t] % wm.K_MAX + 1
        other[2][:, t] = (other[2][:, t] + 1) % 4
        change = (model(*other, alone=alone) - before).abs().amax((0, 2, 3))
        assert change[:t].max() == 0 and change[t] > 0
    other = actions.clone()
    other[:, 4] = (other[:, 4] + 1) % 4
    assert (model(z, i, other) - before)[:, 4].abs().max() > 1e-3  # the action into frame 4 is seen there


def test_frames_of_image_rows_are_alone(use):
    model, (z, i, actions) = dynamics(), batch()
    alone = torch.tensor([True, False, True])
    before, z2 = model(z, i, actions, alone=alone), z.clone()
    z2[:, 2] += 1
    change = (model(z2, i, actions, alone=alone) - before).abs().amax((2, 3))
    assert change[alone][:, [0, 1, 3, 4, 5]].max() == 0 and change[1, 3] > 0
    assert torch.equal(before[1], model(z, i, actions)[1])


def test_the_window_ends(use):
    use(DEPTH=2, TIME_EVERY=2, WINDOW=4)  # one time layer
    model, (z, i, actions) = dynamics(), batch()
    before, z2 = model(z, i, actions), z.clone()
    z2[:, 0] += 1
    change = (model(z2, i, actions) - before).abs().amax((0, 2, 3))
    assert change[1 + wm.WINDOW] > 0 and change[2 + wm.WINDOW] == 0  # Before reaches two frames further


@pytest.mark.parametrize("depth", (2, 6))
def test_the_cache_gives_what_the_full_history_does(use, depth):
    """Three windows of frames one by one, as playing does, equal one forward pass over all of them."""
    use(DEPTH=depth)
    T = 3 * wm.WINDOW
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model, (z, i, actions) = dynamics(dtype=dtype), batch(T=T, dtype=dtype)
        for p in model.parameters():
            p.data /= 3
        caches, found = model.caches(), []
        with torch.no_grad():
            for t in range(T):
                at = (v[:, t:t + 1] for v in (z, i, actions))
                trial = model(*at, caches=caches, keep=False)  # leaves no trace
                found.append(model(*(v[:, t:t + 1] for v in (z, i, actions)), caches=caches))
                assert torch.equal(trial, found[-1])
            assert (torch.cat(found, 1) - model(z, i, actions)).abs().max() < tolerance


def test_a_frame_costs_k_and_one_passes_and_states_its_noise(use):
    """Row 15: what the network is told in a rollout: the past at TAU_CTX and with that much noise, the new
    frame at k/K with step 1/K."""
    use(K_MAX=16, TAU_CTX=0.1)
    model, calls = dynamics(), []
    (z, _, actions), inner = batch(B=2, T=5), model.forward

    def spy(z, i, actions, e=None, **more):
        calls.append((int(i[0, 0]), int(e[0, 0]) if e is not None else 0, more.get("keep", True), z))
        return inner(z, i, actions, e, **more)
    model.forward = spy
    wm.rollout(model, z[:, :3], actions, [1, 2], steps=4)
    assert [c[:3] for c in calls] == [(2, 0, True)] * 3 + ([(16, 2, False), (12, 2, False), (8, 2, False),
                                                            (4, 2, False), (2, 0, True)]) * 2
    left = calls[0][3][:, 0] - (1 - 2 / 16) * z[:, 0]
    assert abs(float(left.std()) / (2 / 16) - 1) < 0.4  # noised as stated, and once:
    again = wm.rollout(model, z[:, :3], actions, [1, 2], steps=4)
    assert torch.equal(again, wm.rollout(model, z[:, :3], actions, [1, 2], steps=4))
    alone = wm.rollout(model, z[1:, :3], actions[1:], [2], steps=4)
    assert torch.allclose(alone[0], again[1], atol=1e-12)  # a row's noise depends on its seed alone


def test_the_loss_table_is_that_of_whole_windows(use):
    use(K_MAX=8)
    model, (z, _, actions) = dynamics(), batch(T=6)
    table = wm.loss_table(model, z, actions)
    eps = torch.randn(z.shape, generator=common.generator_of(0, "loss table"))
    for level, e in ((3, 0), (8, 0), (6, 1), (8, 3)):
        i = torch.full_like(actions, wm.context_level())
        steps = torch.zeros_like(i)
        i[:, -1], steps[:, -1] = level, e
        z_hat = model(wm.add_noise(z, eps, i / 8), i, actions, steps)
        assert table[level - 1, e] == pytest.approx((z_hat - z)[:, -1].square().mean().item(), rel=1e-4)
    assert np.isfinite(table).sum() == 8 + 4 + 2 + 1
    assert np.isfinite(wm.loss_table(model, z, actions, sizes=1)).sum() == 8


def test_rollout_rows_look_like_rollouts(use):
    """Single new frames after a past of little noise; rows that are none stay as they were."""
    use(K_MAX=16, TAU_CTX=0.1)
    i, e, rows = torch.full((400, 9), 11), torch.full((400, 9), 3), torch.arange(400) % 2 == 0
    level, size = wm.as_rollout(i, e, rows, torch.Generator().manual_seed(0))
    assert torch.equal(level[~rows], i[~rows]) and torch.equal(size[~rows], e[~rows])
    new = level[rows] == 11
    assert torch.equal(new, size[rows] == 3) and not (new[:, 1:] & new[:, :-1]).any()
    assert wm.context_level() == 2 and (level[rows][~new] <= 2).all() and (size[rows][~new] == 0).all()
    assert not new[:, 0].any() and new[:, 1:].any(0).all() and 0.35 < new[:, 1:].double().mean() < 0.5


def test_what_the_sampler_asks_for_was_trained(use):
    """Every row of the tables that a rollout reads has had a gradient after a few batches."""
    use(K_MAX=16)
    model, g = dynamics(dtype=torch.float32), torch.Generator().manual_seed(0)
    for _ in range(8):
        z = torch.randn(16, 8, 3, 5, generator=g)
        i, e = wm.draw_levels(wm.spread(16, 0.25), 8, g)
        actions = torch.randint(5, (16, 8), generator=g)
        alone = torch.zeros(16, dtype=torch.bool)
        wm.loss_fn(model, model, z, torch.randn_like(z), i, e, actions, alone).mean().backward()
    moved = {name: getattr(model, name).weight.grad.abs().amax(1) > 0 for name in ("level", "step", "action")}
    assert all(v.all() for v in moved.values()), moved


# ---------------------------------------------------------------- batches and tokenizers
def test_one_batch_in_ten_is_long_and_an_epoch_ends_with_the_short_ones(use):
    use(LONG_RATIO=0.1, BATCH_SIZE=2)
    data = SimpleNamespace(windows={False: np.zeros((190, 2)), True: np.zeros((33, 2))})
    short, long = wm.batches(data)
    assert (short, long) == (95, 11)
    turns = [wm.turn(step, data) for step in range(100 * (short + long))]
    assert abs(sum(kind for kind, _ in turns) / len(turns) - 0.1) < 0.005
    for kind in (False, True):  # each loader gives its batches in order and loses none
        assert [number for k, number in turns if k == kind] == list(range(100 * (long if kind else short)))
    first, second = ([k for k, _ in turns[e * 106:][:106]] for e in (0, 1))
    assert first != second  # other places in another epoch


def test_who_is_stepped_by_what(use):
    """Matrices of the layers by Muon, all others by AdamW, each once and at its ratio to LR."""
    model = dynamics(dtype=torch.float32)
    optimizer = wm.build_optimizer(model, wm.LR)
    found = {}
    for part in optimizer.parts:
        for group in part.param_groups:
            for p in group["params"]:
                assert id(p) not in found
                found[id(p)] = type(part).__name__, group["ratio"]
    for name, p in model.named_parameters():
        inside = name.startswith("body.layers") and p.ndim == 2
        assert found.pop(id(p)) == (("Muon", wm.MUON_LR / wm.LR) if inside else ("AdamW", 1.0)), name
    assert not found
    use(OPT="adamw")
    assert [type(part).__name__ for part in wm.build_optimizer(model, wm.LR).parts] == ["AdamW"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


def test_a_batch_is_a_function_of_its_step(use, home):
    use(OUT=str(home), IMAGE=0.5, ACTION_DROP=0.0, BOOTSTRAP=0.25, BOOT_FROM=0.5, K_MAX=8, LONG_RATIO=0.5)
    data = wm.load_data()
    tokenizer, null = wm.Pixels(data), len(data.names)
    a, b = (wm.draw_batch(data, tokenizer, 3, 10) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["eps"], wm.draw_batch(data, tokenizer, 3, 10, attempt=1)["eps"])
    sizes = set()
    for step in range(10):
        one = wm.draw_batch(data, tokenizer, step, 10)
        sizes.add(one["i"].shape)
        assert (one["actions"][:, 0] == null).all() and (one["actions"][one["alone"]] == null).all()
        assert (one["actions"][~one["alone"], 1:] < null).all()
        rows = (one["e"] > 0).any(1)
        others = rows[torch.arange(len(rows)) % 4 < 3]
        assert not rows.any() if step < 5 else rows[3::4].any() and not others.any()
    assert sizes == {(8, 8), (4, 12)}


def test_actions_lead_into_their_frame(use, home):
    """Row: the action that left a frame instead of the one that entered it. What the network is given at t
    explains the step from t - 1 to t by the rules of the game."""
    use(OUT=str(home), IMAGE=0.0, ACTION_DROP=0.0)
    data = wm.load_data()
    tokenizer = wm.Pixels(data)
    one = wm.draw_batch(data, tokenizer, 0, 10)
    seen = game.decode(wm.to_frames(tokenizer, one["z"]))
    for shift, least, most in ((0, 1.0, 1.0), (1, 0.0, 0.8)):
        actions = one["actions"].numpy()[:, 1:].clip(0, 5)
        given = np.roll(actions, -shift, 1)
        right = (game.rule(seen.walls[:, :-1], seen.cell[:, :-1], given) == seen.cell[:, 1:]).all(-1).mean()
        assert least <= right <= most, (shift, right)


def test_pixels_come_back(use):
    use(PATCH=8)
    facts = SimpleNamespace(crop=(20, 30), size=(24, 32), mean=(-0.5, 0.1, 0.3), std=(0.4, 0.5, 0.6))
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 30, 3), dtype=np.uint8)
    tokenizer = wm.Pixels(facts)
    z = wm.to_latents(tokenizer, frames, "cpu")
    assert z.shape == (2, 3, 12, 192) and np.array_equal(wm.to_frames(tokenizer, z), frames)


def small_mae(use, latents):
    use(PATCH=4, LATENTS=latents, CODE=6, PACK=2 if latents else 1, TOK_DIM=32, TOK_DEPTH=2, TOKENIZER="mae")
    torch.manual_seed(0)
    facts = SimpleNamespace(crop=(8, 12), size=(8, 12), mean=np.zeros(3), std=np.ones(3))
    tokenizer = wm.MAE(facts).eval()
    for p in tokenizer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return tokenizer


@pytest.mark.parametrize("latents", (4, 0))
def test_the_masked_autoencoder_sees_what_it_may(use, latents):
    tokenizer = small_mae(use, latents)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 48, generator=g)
    hidden = torch.arange(6)[None].expand(2, 6) == 4
    codes, x2 = tokenizer.codes_of(x, hidden), x.clone()
    x2[:, 4] += 1
    assert codes.abs().max() < 1 and torch.equal(codes, tokenizer.codes_of(x2, hidden))
    x2[:, 3] += 1
    assert (codes - tokenizer.codes_of(x2, hidden)).abs().max() > 1e-4
    tokenizer.queries.data[2] += 5
    before = tokenizer.patches_of(codes)
    tokenizer.queries.data[2] -= 5
    assert (before - tokenizer.patches_of(codes)).abs().max() > 1e-4
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), dtype=np.uint8)
    assert wm.to_latents(tokenizer, frames, "cpu").shape == ((2, 3, 2, 12) if latents else (2, 3, 6, 6))
    assert tokenizer.grid == (None if latents else (2, 3))
    assert wm.to_frames(tokenizer, wm.to_latents(tokenizer, frames, "cpu")).shape == frames.shape


def test_balance_makes_terms_alike():
    balance = wm.Balance(2).train()
    for _ in range(5):
        loss = balance((torch.tensor(100.0), torch.tensor(0.01)), torch.tensor([0.5, 0.5]))
    assert abs(float(loss) - 1) < 1e-4
    assert float(balance((torch.tensor(50.0), torch.tensor(7.0)), torch.tensor([1.0, 0.0]))) < 0.6
    assert abs(float(balance.square[1]) - 1e-4) < 1e-7  # a term that did not occur is not remembered


# ---------------------------------------------------------------- the report
def test_psnr_and_its_two_means():
    truth = np.full((2, 1, 16, 16, 3), 100, np.uint8)
    dream = truth.copy()
    dream[0] += 51  # 0.2
    dream[1] += 5
    q = wm.quality(truth, dream, truth[:, 0] * 0)
    each = [-20 * math.log10(k / 255) for k in (51, 5)]
    assert abs(q["psnr"][0] + 10 * math.log10((0.2**2 + (5 / 255)**2) / 2)) < 1e-4
    assert abs(q["psnr_mean"][0] - np.mean(each)) < 1e-4 and q["psnr"][0] < q["psnr_mean"][0]
    same = wm.quality(truth, truth, truth[:, 0] * 0)
    assert same["psnr"][0] == same["changed"][0] == 60


def test_a_ladder_of_damages(use, home):
    """The worse a video, the worse its numbers; true videos of other episodes are the nearest in Frechet
    distance."""
    use(OUT=str(home), LEVEL=1, HORIZON=16, TRAIN=96, TEST=24, SAMPLES=24)
    data = wm.load_data()
    ref = wm.reference(data)
    once, rng = wm.blur(ref.truth), np.random.default_rng(0)
    noisy = (ref.truth + rng.normal(0, 30, ref.truth.shape)).clip(0, 255).astype(np.uint8)
    blurred = ref.truth, once, wm.blur(wm.blur(once))
    likeness = [wm.likeness(ref.truth[:, 3], v[:, 3]) for v in blurred]
    assert abs(likeness[0] - 1) < 1e-9 and 0.99 > likeness[1] > likeness[2] + 0.01, likeness
    found = [wm.quality(ref.truth, v, ref.last) for v in blurred]
    for name in ("psnr", "sharpness", "changed"):
        means = [q[name].mean() for q in found]
        assert means == sorted(means, reverse=True) and len(set(means)) == 3, (name, means)
    assert wm.quality(ref.truth, noisy, ref.last)["sharpness"].mean() > 1.3
    real = wm.chunk_features(ref.truth)
    other = float(wm.frechet(wm.chunk_features(wm.others(data, 24)), real))
    still = float(wm.frechet(wm.chunk_features(ref.rows["copy the last frame"]), real))
    blurred = float(wm.frechet(wm.chunk_features(once), real))
    assert other < still and other < blurred, (other, still, blurred)


def test_a_perfect_model_gets_perfect_numbers(use, home, monkeypatch):
    use(OUT=str(home), LEVEL=1)
    data = wm.load_data()
    ref, tokenizer = wm.reference(data), wm.Pixels(data)
    torch.manual_seed(0)
    model = wm.build_model(data, tokenizer).eval()
    z = wm.to_latents(tokenizer, ref.truth, "cpu")

    def oracle(model, past, actions, seeds, steps=None, truth=None):
        return z[:len(past), :actions.shape[1] - past.shape[1]]
    monkeypatch.setattr(wm, "rollout", oracle)
    metrics, arrays = wm.evaluate(model, tokenizer, data, ref, 8)
    perfect = dict(psnr_h1=60, psnr_h8=60, changed_psnr_h8=60, break_even_horizon=9, obedience=1, legality=1,
                   cell_accuracy=1, ball_found_h8=1, sharpness=1, latent_std_ratio=1)
    for name, want in perfect.items():
        assert abs(metrics[name]["value"] - want) < 1e-6, (name, metrics[name])
    assert metrics["psnr_h8"]["floor"] < 30 and "obey" in wm.scoreboard(arrays)


def test_opposite_actions():
    names = ["noop", "up", "down", "left", "right", "ask"]
    assert wm.opposite(torch.arange(7), names).tolist() == [0, 2, 1, 4, 3, 5, 6]
    assert wm.opposite(torch.arange(4), ["0", "1", "2"]).tolist() == [1, 2, 0, 3]
    assert wm.opposite(torch.arange(4), ["noop", "move_up", "move_down"]).tolist() == [0, 2, 1, 3]


# ---------------------------------------------------------------- whole runs
TINY = ("LEVEL=1 TRAIN=8 TEST=8 DIM=32 DEPTH=2 HEADS=2 KV_HEADS=1 WINDOW=6 K_MAX=8 SEQ_LEN_SHORT=8 "
        "SEQ_LEN_LONG=12 STRIDE=60 BATCH_SIZE=4 BATCH_SIZE_LONG=2 LONG_RATIO=0.3 CONTEXT=4 HORIZON=8 "
        "SAMPLES=4 EVAL_EVERY=1 PRECISION=fp32").split()
IMPORT = "import signal, torch\nimport train_world_model as script\n"
STUB = IMPORT + """
def stub(folder, *rest):
    folder.mkdir(parents=True, exist_ok=True)
    torch.rand(1)
    return {"psnr_h1": dict(value=1.0, floor=1.0, ceiling=None, better="higher", n=1)}
script.report, script.summary = stub, str
""" + AT_CALL


@pytest.fixture(scope="module")
def launch(zygote, home, tmp_path_factory):
    """launch(*settings, fault=STUB, out=None) runs train_world_model.py on a few episodes, or sample.py; out
    is OUT, by default a new one. Returns code, output, folder of the run."""
    def run(*settings, fault=STUB, out=None, program="train", limit=300, **environment):
        out = Path(out or tmp_path_factory.mktemp("runs"))
        arguments = list(settings)
        if program == "train":
            if not (out / "cache").exists():
                (home / "cache").mkdir(exist_ok=True)
                (out / "cache").symlink_to(home / "cache")
            arguments = [f"OUT={out}", *TINY, *settings]
        result = fork(zygote, tmp_path_factory.mktemp("job"), out / "world_model", limit, arguments=arguments,
                      environment=environment, fault=fault, program=program, script="train_stl10")
        result.out = out
        return result
    return run


def refused(run, *words):
    """One clear line, exit code 2, no traceback."""
    assert run.code == 2 and "Traceback" not in run.output, run.output
    last = run.output.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), run.output


@pytest.mark.parametrize("more", ([], ["TOKENIZER=mae", "PATCH=8", "LATENTS=4", "CODE=8", "TOK_DIM=32",
                                       "TOK_DEPTH=1", "TOK_STEPS=4", "TOK_BATCH=8"]))
def test_killed_and_resumed_equals_unbroken(launch, more):
    """kill -9 in step 4 with the last save at step 3, then SIGTERM in step 5: the same bits as unbroken. With
    a tokenizer, a kill -9 in its training first."""
    from test_reliability import difference
    at = ["EPOCHS=1", "EVAL_EVERY=1000", "BOOT_FROM=0.3", *more]
    whole = launch(*at)
    assert whole.code == 0, whole.output
    steps = len(log(whole.folder))
    out = None
    if more:
        run = launch(*at, "SAVE_SECONDS=0", fault=STUB + "at_call('tokenizer_losses', 3, kill())")
        assert run.code == -9 and not (run.folder / "last.pt").exists(), run.output
        out = run.out
    run = launch(*at, "SAVE_SECONDS=0", fault=STUB + "at_call('train_step', 4, kill())", out=out)
    assert run.code == -9 and state(run.folder)["step"] == 3, run.output
    run = launch(*at, fault=STUB + "at_call('train_step', 2, kill(signal.SIGTERM))", out=run.out)
    assert run.code == 143 and state(run.folder)["step"] == 5 and "Traceback" not in run.output, run.output
    assert f"continuing after step 3 of {steps}" in run.output
    run = launch(*at, "STEPS=2", "CONTEXT=5", out=run.out)  # how it dreams may change
    assert run.code == 0, run.output
    assert difference(state(run.folder), state(whole.folder)) == "" and log(run.folder) == log(whole.folder)
    refused(launch(*at, "DEPTH=4", out=run.out), "DEPTH: 2 there, 4 now", "RESUME=False")


@pytest.mark.parametrize("settings", ("SHORTCUT=False", "NOISE=same LOSS=v",
                                      "NOISE=context EMA_TEACHER=True LEVEL=5",
                                      "NOISE=pyramid RAMP=noise ACCUM=2", "CAP=50.0 IMAGE=0.0"))
def test_every_kind_of_training_steps(launch, settings):
    run = launch("EPOCHS=1", *settings.split(), "EVAL_EVERY=1000")
    assert run.code == 0 and len(log(run.folder)) >= 2, run.output
    assert all(math.isfinite(float(row["loss"])) and row["skipped"] == "0" for row in log(run.folder))


def test_a_run_and_what_sample_makes_of_it(launch, tmp_path):
    """The whole report of a run, again by sample.py --full with the same bits, and dreams of a prompt."""
    run = launch("EPOCHS=1", fault=IMPORT)
    assert run.code == 0, run.output
    folder = run.folder / "epoch_0001"
    names = ("rollout horizon k_sweep actions spread starts loss_by_t report loss".split())
    assert all((folder / f"{name}.{kind}").stat().st_size > 100 for name in names for kind in ("png", "npy"))
    assert (folder / "rollout.gif").exists() and "obey" in (folder / "scoreboard.txt").read_text()
    metrics = json.loads((run.folder / "metrics.json").read_text())
    for name in ("psnr_h1 psnr_h8 changed_psnr_h8 break_even_horizon obedience ball_found_h8 sharpness "
                 "action_noise_ratio fps fps_p95_ms").split():
        assert metrics[name]["value"] is not None or name == "ball_found_h8", name
    last = str(run.folder / "last.pt")
    full, some = tmp_path / "full", tmp_path / "some"
    again = launch("--checkpoint", last, "--full", "--out", str(full), program="sample", fault=IMPORT)
    assert again.code == 0, again.output
    for name in ("dream", "spread", "starts", "loss_by_t"):
        a, b = (np.load(at / f"{name}.npy").astype(float) for at in (full, folder))
        assert np.array_equal(a, b, equal_nan=True), name
    drawn = launch("--checkpoint", last, "--num-samples", "2", "--prompt", "right,right up",
                   "--out", str(some), program="sample", fault=IMPORT)
    assert drawn.code == 0 and np.load(some / "dreams.npy").shape == (2, 8, 32, 32, 3), drawn.output
    bad = launch("--checkpoint", last, "--prompt", "jump", program="sample", fault=IMPORT)
    refused(bad, "jump", "noop, up")


def test_a_tokenizer_that_diverges_is_one_line(launch):
    nan = "script.tokenizer_losses = lambda tokenizer, *_: (tokenizer.head.bias.sum() * torch.nan,) * 2\n"
    run = launch(*"TOKENIZER=mae PATCH=8 CODE=8 TOK_DIM=32 TOK_DEPTH=1 TOK_STEPS=99 TOK_BATCH=4".split(),
                 fault=IMPORT + nan)
    refused(run, "diverged at step 5", "TOK_LR")


def test_own_recordings(launch, tmp_path):
    rng = np.random.default_rng(0)
    frames, actions = rng.integers(0, 256, (10, 20, 20, 28, 3), dtype=np.uint8), rng.integers(0, 3, (10, 20))
    actions[:, 0] = -1
    np.savez(tmp_path / "own.npz", frames=frames, actions=actions)
    at = ["EPOCHS=1", "CONTEXT=3", "HORIZON=4", "STRIDE=6", f"DATA={tmp_path / 'own.npz'}"]
    refused(launch(*at, fault=IMPORT), "test windows")  # the last tenth is one episode: 2 windows
    np.savez(tmp_path / "own.npz", frames=np.concatenate([frames] * 3), actions=np.concatenate([actions] * 3))
    run = launch(*at, fault=IMPORT)
    assert run.code == 0, run.output
    assert "no scoreboard" in (run.folder / "epoch_0001" / "scoreboard.txt").read_text()
    frames[..., 2] = 0  # a colour that never changes; no actions at all
    np.savez(tmp_path / "own.npz", frames=np.concatenate([frames] * 4))
    run = launch(*at, "HORIZON=12", fault=IMPORT)
    assert run.code == 0, run.output
    last = str(run.folder / "last.pt")
    dreamt = launch("--checkpoint", last, "--num-samples", "1", program="sample", fault=IMPORT)
    assert dreamt.code == 0, dreamt.output
    np.savez(tmp_path / "own.npz", frames=frames[:, :, :8], actions=actions)
    refused(launch(*at, fault=IMPORT), "8 x 28", "11 x 11")
    np.savez(tmp_path / "own.npz", frames=frames, actions=np.abs(actions))
    refused(launch(*at, fault=IMPORT), "own.npz", "ACTION_ALIGN=from")
    np.savez(tmp_path / "own.npz", frames=frames[..., 0], actions=actions)
    refused(launch(*at, fault=IMPORT), "own.npz", "expected frames")
    refused(launch(*at, "DATA=/nowhere", fault=IMPORT), "nowhere")


def test_torchrun_matches_one_process(launch, home, tmp_path):
    """Two gloo processes give the losses of one, though only the second has rows of larger steps; the first
    trains the tokenizer alone."""
    fixed = ("EPOCHS=1 EVAL_EVERY=1000 BOOT_FROM=0.3 TOKENIZER=mae PATCH=8 CODE=8 TOK_DIM=32 TOK_DEPTH=1 "
             "TOK_STEPS=3 TOK_BATCH=4").split()
    one = launch(*fixed)
    assert one.code == 0, one.output
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "cache").symlink_to(home / "cache")
    two = torchrun(tmp_path, STUB, f"OUT={tmp_path / 'two'}", *TINY, *fixed)
    assert two.returncode == 0, two.stderr[-3000:]
    folders = (one.folder, tmp_path / "two" / "world_model")
    losses = [[float(row["loss"]) for row in log(folder)] for folder in folders]
    assert len(losses[0]) == len(losses[1]) >= 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    squares = [state(folder)["model"]["balance.square"] for folder in folders]
    assert (squares[0] > 0).all() and torch.allclose(*squares, rtol=1e-4)


def test_a_dry_run_says_what_fits(launch):
    run = launch("DRY_RUN=True", fault=IMPORT)
    assert run.code == 0 and run.output.count("MiB") >= 9, run.output
    assert not (run.folder / "last.pt").exists()


BAD = {
    "TOKENIZER=vae": "one of none", "NOISE=white": "one of iid", "LEVEL=6": "LEVEL",
    "K_MAX=12": "powers of two", "STEPS=32": "at most K_MAX", "DIM=30": "DIM=30", "HEADS=3": "HEADS",
    "HEADS=16": "at least 4", "TIME_EVERY=9": "no layer looks",
    "EPOCHS=0": "above 0", "LONG_RATIO=1.0": "LONG_RATIO", "CONTEXT=125": "128 frames",
    "SAMPLES=2": "SAMPLES",
    "EVAL_EVERY=2 KEEP_EVERY=3": "multiple", "TOKENIZER=mae LATENTS=4 PACK=3": "divide",
    "TOKENIZER=mae PACK=2": "1 where LATENTS=0", "K_MAX=1 STEPS=1": "raise K_MAX",
    "TAU_CTX=2": "TAU_CTX"}


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings(use, capsys, monkeypatch, setting):
    """Each mistake is one clear line and exit code 2."""
    for name in common.settings(vars(wm)):
        monkeypatch.setattr(wm, name, getattr(wm, name))
    with pytest.raises(SystemExit) as end:
        common.override(vars(wm), setting.split())
        wm.check_settings()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and BAD[setting] in said, said


def test_a_dream_can_be_played_marked_and_taken_back(use, home):
    use(OUT=str(home), LEVEL=1)
    data = wm.load_data()
    tokenizer = wm.Pixels(data)
    torch.manual_seed(0)
    dream = wm.Dream(wm.build_model(data, tokenizer).eval(), tokenizer, data)
    first = dream.reset(3)
    assert np.array_equal(first, dream.real) and dream.names[1] == "up"
    dream.act(1)
    mark, one = dream.save(), dream.frame
    dream.act(2)
    two, real = dream.frame, dream.real
    dream.load(mark)
    assert np.array_equal(dream.frame, one)
    dream.act(2)
    assert np.array_equal(dream.frame, two) and np.array_equal(dream.real, real)
    dream.load(mark)
    dream.noise(9)
    dream.act(2)
    assert not np.array_equal(dream.frame, two) and np.array_equal(dream.real, real)
    files = dream.export(home / "export")
    with np.load(files[0]) as kept:
        assert kept["frames"].shape[:2] == kept["actions"].shape == (1, wm.CONTEXT + 2)
        assert kept["actions"][0, 0] == -1
    dream.reset(1, "invented")
    dream.act(0)
    assert dream.real is None and dream.frame.shape == (32, 32, 3)
