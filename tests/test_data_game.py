"""data/game.py: layout, motion, player, sets and their cache, the decoder, the scoreboard and its floors."""
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import game

REPOSITORY = Path(__file__).resolve().parent.parent
LEVELS = range(6)
NOOP, UP, DOWN, LEFT, RIGHT, ASK = range(6)
HORIZONS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT, N = 16, 24  # of the scoreboard's tests: given frames, episodes


def g(seed=0):
    return np.random.default_rng(seed)


def part(states, *index):
    return SimpleNamespace(**{name: value[index] for name, value in vars(states).items()})


def moved(states):
    """bool (N, T-1): steps on which the agent moves."""
    return ((states.cell[:, 1:] != states.cell[:, :-1]).any(-1)) | (states.room[:, 1:] != states.room[:, :-1])


@pytest.fixture(scope="module")
def played():
    """96 episodes of 128 frames of every level."""
    return [game.episodes(level, 96) for level in LEVELS]


@pytest.fixture(scope="module")
def games():
    """40 games of every level at frame 0."""
    return [[game.Game(level, seed) for seed in range(40)] for level in LEVELS]


# Layout

def fill(walls):
    """bool (7, 8): open cells that a flood from (3, 3) reaches within one room, told a second time."""
    wet = np.zeros_like(walls)
    wet[3, 3] = True
    for _ in range(40):
        grown = wet.copy()
        grown[1:] |= wet[:-1]
        grown[:-1] |= wet[1:]
        grown[:, 1:] |= wet[:, :-1]
        grown[:, :-1] |= wet[:, 1:]
        wet = grown & ~walls
    return wet


def test_a_seed_has_one_layout_at_all_levels(games):
    different = 0
    for seed in range(40):
        l0, l3, l4, l5 = (games[level][seed] for level in (0, 3, 4, 5))
        doors = np.zeros_like(l4.walls)
        doors[0, 3, 7] = doors[1, 3, 0] = True
        for level in LEVELS:
            assert games[level][seed].balls == l0.balls
            assert np.array_equal(games[level][seed].walls,
                                  l0.walls & ~(l3.cloud * (level >= 3)) & ~(doors * (level >= 4)))
            assert np.array_equal(games[level][seed].cloud, l3.cloud * (level >= 3))
        assert l4._place == l5._place and np.array_equal(l4.coins, l5.coins)
        different += (l0.walls & l3.cloud).any()
    assert different > 20  # else nothing was seen of the exception under the cloud
    assert len({l.walls.tobytes() for l in games[0]}) > 35


def test_layout_follows_the_note(games):
    walls = np.stack([l.walls for l in games[0]])
    assert walls[:, :, [0, 6]].all() and walls[..., [0, 7]].all() and not walls[:, :, 3, 1:7].any()
    assert not walls[:, :, 1:6, [1, 6]].any()
    inner = walls[:, :, 1:6, 2:6].sum((2, 3))
    assert inner.max() <= 6 and inner.mean() == pytest.approx(6 * .8 * .87, abs=.35)  # some drawn twice
    cloud = np.stack([l.cloud for l in games[3]])
    assert (cloud.sum((2, 3)) == 4).all() and (cloud[:, :, 1:3].sum((2, 3)) == 4).all()
    lefts = cloud[:, :, 1].argmax(-1)
    assert set(lefts.ravel()) == {1, 2, 3, 4} and (lefts[:, 0] != lefts[:, 1]).any()
    assert {y for l in games[0] for y, x, vy, vx in l.balls} == set(range(4, 23, 2))
    assert {x for l in games[0] for y, x, vy, vx in l.balls} == set(range(4, 27, 2))
    assert {ball[2:] for l in games[0] for ball in l.balls} == {(-2, -2), (-2, 2), (2, -2), (2, 2)}
    assert {l.cue for l in games[5]} == {0, 1, 2, 3} and {l.cue for l in games[4]} == {-1}
    assert {l.room for l in games[4]} == {0, 1} and {l.room for l in games[3]} == {0}


def test_agent_and_coins_start_on_cells_within_reach(games):
    for level in LEVELS:
        for one in games[level]:
            wet = np.stack([fill(walls) for walls in one.walls])
            if level < 4:
                wet[1] = False
            assert wet[one._place] and set(one.places) == set(map(tuple, np.argwhere(wet).tolist()))
            assert one.coins.sum() == (4 if level >= 2 else 0)
            assert not (one.coins & (one.cloud | ~wet)).any() and not one.coins[one._place]
    assert any(one.coins[1 - one.room].any() for one in games[4])


# Motion

def by_hand(states, n, t, action):
    """(room, y, x) after an action, told anew from the rules."""
    room, (y, x) = states.room[n, t], states.cell[n, t]
    dy, dx = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}.get(action, (0, 0))
    if room == 0 and (y, x) == (3, 7) and dx == 1:
        return 1, 3, 0
    if room == 1 and (y, x) == (3, 0) and dx == -1:
        return 0, 3, 7
    return (room, y, x) if states.walls[n, t, y + dy, x + dx] else (room, y + dy, x + dx)


@pytest.mark.parametrize("level", LEVELS)
def test_every_step_follows_the_rules(played, level):
    """Agent, coins, counter, rewards and cue of 20 episodes, against the note's words told a second time."""
    data = played[level]
    s, actions = data.states, data.actions
    for n in range(20):
        start = game.Game(level, n)
        left = start.coins.copy()
        assert actions[n, 0] == -1 and data.rewards[n, 0] == 0
        for t in range(1, 128):
            room, y, x = by_hand(s, n, t - 1, actions[n, t])
            assert (s.room[n, t], *s.cell[n, t]) == (room, y, x) and not s.walls[n, t, y, x]
            assert data.rewards[n, t] == left[room, y, x]
            left[room, y, x] = False
            assert np.array_equal(s.coins[n, t], left[room])
            assert s.score[n, t] == (4 - left.sum() if level >= 2 else -1)
            assert s.shown[n, t] == (level == 5 and (t < 4 or actions[n, t] == ASK))
        assert (s.cue[n] == start.cue).all() and s.shown[n, 0] == (level == 5)
    assert (s.room.max() == 1) == (level >= 4) and data.rewards.any() == (level >= 2)


def test_exits_lead_across_and_back():
    one = game.Game(4, 419)
    player = game.player(one)
    while one.cell != (3, 3):  # it comes by
        one.step(next(player))
    across, back = ([RIGHT] * 4, [LEFT]) if one.room == 0 else ([LEFT] * 3, [RIGHT])
    first = one.room
    for action in across:
        one.step(action)
    assert (first, one.cell) == (one.room, game.EXITS[first])
    assert not game.decode(one.frame()).exits.any()  # the agent stands on it
    one.step(across[0])
    assert (one.room, one.cell) == (1 - first, game.EXITS[1 - first])
    one.step(NOOP)
    one.step(UP)
    assert (one.room, one.cell) == (1 - first, game.EXITS[1 - first])
    one.step(back[0])
    assert (one.room, one.cell) == (first, game.EXITS[first])
    one.step(back[0])
    assert game.decode(one.frame()).exits.tolist() == [first == 1, first == 0]


def test_ball_periods():
    for seed in range(6):
        one, path = game.Game(1, seed), []
        for _ in range(400):
            path.append(one.balls)
            one.step(NOOP)
        path = np.array(path)  # (t, room, 4)
        for room in (0, 1):
            whole, y, x = path[:, room], path[:, room, 0], path[:, room, 1]
            for values, expected in ((y, 18), (x, 22), (whole, 198)):
                periods = [p for p in range(1, 200) if np.array_equal(values[p:], values[:-p])]
                assert periods[0] == expected
            assert set(y) == set(range(4, 23, 2)) and set(x) == set(range(4, 27, 2))
            assert (np.abs(np.diff(path[:, room, :2], axis=0)) == 2).all()


def test_balls_of_unseen_rooms_move_on(played):
    s = played[4].states
    for n in range(10):
        one = game.Game(4, n)
        for t in range(128):
            assert tuple(s.ball[n, t]) == one.balls[s.room[n, t]][:2]  # this one stays where it started
            one.step(NOOP)


def test_turns_of_a_stochastic_ball():
    data = game.episodes(1, 60, stochastic=True)
    v = np.diff(data.states.ball, axis=1)
    inside = data.states.ball[:, 1:-1]
    edge = (inside == 4) | (inside == (22, 26))  # it bounces there anyway
    turned = v[:, 1:] != v[:, :-1]
    assert turned[~edge].mean() == pytest.approx(.05 / 2, abs=.005)  # per axis
    assert not (turned & ~edge).all(-1).any()  # one axis at a time
    plain = game.episodes(1, 60)
    assert np.array_equal(plain.actions, data.actions)
    assert np.array_equal(plain.states.walls, data.states.walls)
    differ = (plain.states.ball != data.states.ball).any(-1)
    first = differ.argmax(1)[differ.any(1)]
    assert first.min() >= 2 and 12 < first.mean() < 30  # equal until the first turn, about 1 / .05 steps


@pytest.mark.parametrize("stochastic", [False, True])
def test_copies_go_their_own_way(stochastic):
    one = game.Game(5, 7, stochastic)
    for action in g().integers(0, 6, 20):
        one.step(action)
    before, book, future = one.frame(), one.copy(), g(1).integers(0, 6, 300)
    a = [(one.step(action), one.frame().tobytes(), one.balls) for action in future]
    assert np.array_equal(book.frame(), before) and book.t == 20 and one.t == 320
    again = book.copy()
    assert a == [(again.step(action), again.frame().tobytes(), again.balls) for action in future]
    assert np.array_equal(book.frame(), before) and again.score == one.score > book.score
    one.reset()
    fresh = game.Game(5, 7, stochastic)
    assert np.array_equal(one.frame(), fresh.frame()) and one.t == 0 and one.coins.sum() == 4


# The player

def lengths(row):
    """How long actions are held, int (n,), but for the last, which the end of the episode cuts."""
    return np.diff(np.flatnonzero(np.r_[True, row[2:] != row[1:-1]]))


def kinds(actions):
    """uniform, sticky or walker, int (N,) 0, 1, 2, told by the actions."""
    return np.array([1 if lengths(row).min() >= 3 else 0 if (row[1:] == NOOP).mean() > .1 else 2
                     for row in actions])


def test_the_player_mixes_three_ways(played):
    for level in LEVELS:
        assert .50 <= moved(played[level].states).mean() <= .65
    changes = (np.diff(played[4].states.room) != 0).sum(1)
    assert changes.mean() == pytest.approx(3.9, abs=.7)
    data = game.episodes(0, 200)
    kind, moves = kinds(data.actions), moved(data.states).mean(1)
    assert [(kind == k).mean() for k in range(3)] == pytest.approx([.25, .25, .5], abs=.08)
    assert moves[kind == 1].mean() == pytest.approx(.17, abs=.03)
    assert moves[kind == 2].mean() > .85
    shares = [(data.actions[kind == 0][:, 1:] == a).mean() for a in range(6)]
    assert shares == pytest.approx([1 / 6] * 6, abs=.02)
    runs = np.concatenate([lengths(row) for row in data.actions[kind == 1]])
    assert runs.min() == 3 and np.bincount(runs)[3:10].min() > 10  # two holds of an action make a longer one


def test_walkers_want_coins(played):
    kind, left = kinds(played[2].actions), played[2].states.coins[:, -1].sum((1, 2))
    assert left[kind == 2].mean() < .7 < 1.5 < left[kind == 1].mean()


# Sets

def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(
        [a.frames, a.actions, a.rewards, *vars(a.states).values()],
        [b.frames, b.actions, b.rewards, *vars(b.states).values()]))


def test_an_episode_is_its_level_and_seed(played):
    few = game.episodes(5, 3, 40)
    whole = played[5]
    assert few.frames.shape == (3, 40, 32, 32, 3) and few.frames.dtype == np.uint8
    assert few.actions.dtype == np.int64 and few.rewards.dtype == np.float32
    cut = SimpleNamespace(frames=whole.frames[:3, :40], actions=whole.actions[:3, :40],
                          rewards=whole.rewards[:3, :40], states=part(whole.states, slice(3), slice(40)))
    assert same(few, cut) and same(game.episodes(5, 1, 40, first_seed=2), SimpleNamespace(
        frames=few.frames[2:], actions=few.actions[2:], rewards=few.rewards[2:],
        states=part(few.states, slice(2, 3))))
    assert few.facts.startswith("3 episodes of 40 frames, L5 (cue), seeds 0..2; the agent moves on ")


def test_splits_share_no_episode():
    assert game.SEEDS == dict(train=0, val=1_000_000, test=2_000_000)
    starts = {game.Game(5, first + i).frame().tobytes() for first in game.SEEDS.values() for i in range(100)}
    assert len(starts) == 300


def test_replay_of_the_same_actions_is_the_same(played):
    again, data = game.replay(5, played[5].actions[:4]), played[5]
    assert same(again, SimpleNamespace(frames=data.frames[:4], actions=data.actions[:4],
                                       rewards=data.rewards[:4], states=part(data.states, slice(4))))
    held = game.replay(0, np.full((2, 9), RIGHT), first_seed=5)
    assert held.actions[:, 0].tolist() == [-1, -1] and (np.diff(held.states.cell[..., 1]) >= 0).all()
    assert moved(held.states).any()


def test_the_cache_keeps_a_set(tmp_path, monkeypatch, capsys):
    folder, wanted = tmp_path / "new", dict(level=5, count=6, length=30, cache=tmp_path / "new")
    plain = game.episodes(5, 6, 30)
    assert same(game.episodes(**wanted), plain)
    (path,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(game.Game, "step", None)
        second = game.episodes(**wanted)  # nothing is played
        assert same(second, plain) and second.facts == plain.facts
        for name, value in dict(level=4, count=5, length=29, first_seed=1, stochastic=True).items():
            with pytest.raises(TypeError):
                game.episodes(**{**wanted, name: value})
        patch.setattr(game, "RECIPE", game.RECIPE + 1)
        with pytest.raises(TypeError):
            game.episodes(**wanted)
    with monkeypatch.context() as patch:
        patch.setattr(game.os, "replace", None)
        with pytest.raises(TypeError):
            game.episodes(5, 7, 30, cache=folder)
    assert list(folder.iterdir()) == [path]  # a failure leaves no half of a file
    capsys.readouterr()

    whole = path.read_bytes()
    damages = [whole[:n] for n in (0, 3, 100, len(whole) // 2, len(whole) - 1)]
    for at in g().integers(0, len(whole), 12):
        damages.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
    noticed = 0
    for damage in damages:
        path.write_bytes(damage)
        assert same(game.episodes(**wanted), plain)
        said = capsys.readouterr().err
        if said:
            noticed += 1
            assert said.startswith(f"{path}: damaged (") and said.count("\n") == 1
            assert path.read_bytes() != damage and same(game.episodes(**wanted), plain)
            assert capsys.readouterr().err == ""  # once
    assert noticed >= 12  # a byte of a name or date may not matter


# Decoder

@pytest.mark.parametrize("level", LEVELS)
def test_decode_reads_what_is_drawn(played, level):
    n = slice(0, 20)  # 2,560 frames
    frames, s = played[level].frames[n], part(played[level].states, n)
    seen = game.decode(frames)
    assert (seen.agents == 1).all() and np.array_equal(seen.cell, s.cell)
    assert np.array_equal(seen.walls, s.walls) and np.array_equal(seen.coins, s.coins)
    assert np.array_equal(seen.ball, np.where(s.visible[..., None], s.ball, -1))
    assert np.array_equal(seen.hud, s.score.clip(0))
    assert np.array_equal(seen.cue, np.where(s.shown, s.cue, -1))
    out = np.zeros_like(seen.exits)
    if level >= 4:
        door = np.array(game.EXITS)[s.room]
        out[..., 1], out[..., 0] = s.room == 0, s.room == 1
        out &= (s.cell != door).any(-1, keepdims=True)
    assert np.array_equal(seen.exits, out)
    assert s.visible.mean() == pytest.approx((0, .97, .97, .84, .84, .84)[level], abs=.02)
    assert s.visible.any() == (level >= 1)


def test_decode_takes_any_leading_axes(played):
    frames = played[5].frames[:3, :70]
    whole, one = game.decode(frames), game.decode(frames[1, 66])
    assert whole.walls.shape == (3, 70, 7, 8) and whole.hud.shape == (3, 70) and one.cell.shape == (2,)
    assert one.hud.shape == () and game.decode(frames[:0]).cell.shape == (0, 70, 2)
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(whole, name)[1, 66])


def test_decode_by_hand():
    frame = np.full((32, 32, 3), game.PALETTE[game.FLOOR])
    agent, coin, ball, wall, exit_, floor = (game.PALETTE[i] for i in (
        game.AGENT, game.COIN, game.BALL, game.WALL, game.EXIT, game.FLOOR))
    frame[4 + 8:4 + 10, 12:16] = agent  # 8 of 16 px of cell (2, 3)
    frame[4 + 16:4 + 19, 4:8] = wall  # 12 px of cell (4, 1)
    frame[4 + 21, 21:23] = coin  # 2 of 4 inner px of cell (5, 5)
    frame[4 + 9:4 + 11, 24:26], frame[4 + 20, 9] = ball, ball  # and one lone px
    frame[4 + 12:4 + 14, 31] = exit_
    frame[1, 1:3], frame[1:3, 7], frame[2, 4] = coin, coin, coin  # markers 0 and 2, one px of marker 1
    frame[:2, 28:] = game.PALETTE[game.CUE + 2]
    seen = game.decode(frame)
    assert seen.cell.tolist() == [2, 3] and np.argwhere(seen.walls).tolist() == [[4, 1]]
    assert np.argwhere(seen.coins).tolist() == [[5, 5]] and seen.ball.tolist() == [9, 24]
    assert seen.exits.tolist() == [False, True] and (seen.hud, seen.cue, seen.agents) == (2, 2, 1)
    noisy = (frame + g().integers(-9, 10, frame.shape)).clip(0, 255).astype(np.uint8)
    for name, value in vars(game.decode(noisy)).items():
        assert np.array_equal(value, getattr(seen, name)), name
    frame[4 + 8, 12], frame[4 + 16:4 + 18, 4:8], frame[4 + 21, 21] = floor, floor, floor
    frame[4 + 9, 24], frame[4 + 12, 31], frame[0, 28] = floor, floor, floor
    less = game.decode(frame)  # one px fewer of each: 7, 4, 1, 3, 1 and 7
    assert less.cell.tolist() == [-1, -1] and less.agents == 0 and not less.walls.any()
    assert not less.coins.any() and less.hud == 2
    assert less.ball.tolist() == [-1, -1] and not less.exits.any() and less.cue == -1
    frame[4 + 4:4 + 8, 12:16] = frame[4 + 20:4 + 24, 4:8] = agent
    assert game.decode(frame).agents == 2 and game.decode(frame).cell.tolist() == [-1, -1]
    frame[4 + 8:4 + 11, 24:26] = ball  # 2x3 px: two squares
    assert game.decode(frame).ball.tolist() == [-1, -1]


def test_nearest_colour_is_the_nearest():
    pixels = g().integers(0, 256, (40, 32, 32, 3), np.uint8)
    distance = np.square(pixels[..., None, :].astype(int) - game.PALETTE).sum(-1)
    assert np.array_equal(game._nearest(pixels), distance.argmin(-1))  # the first of equals


def test_rule_by_hand():
    walls = np.ones((7, 8), bool)
    walls[3], walls[2, 4] = False, False
    for cell, action, expected in (
            ((3, 4), UP, (2, 4)), ((3, 4), DOWN, (3, 4)), ((3, 4), LEFT, (3, 3)), ((3, 4), RIGHT, (3, 5)),
            ((3, 4), NOOP, (3, 4)), ((3, 4), ASK, (3, 4)), ((2, 4), LEFT, (2, 4)), ((2, 4), DOWN, (3, 4)),
            ((3, 7), RIGHT, (3, 0)), ((3, 0), LEFT, (3, 7)), ((3, 7), UP, (3, 7)), ((-1, -1), DOWN, (-1, -1)),
            ((0, 2), UP, (0, 2))):  # in a wall already, as dreams may be
        assert tuple(game.rule(walls, cell, action)) == expected, (cell, action)
    many = game.rule(walls, np.array([(3, 4), (2, 4)])[:, None], np.arange(6))
    assert many.shape == (2, 6, 2) and many[1, DOWN].tolist() == [3, 4]


def test_thousands_of_frames_take_no_time(played):
    start = time.process_time()
    game.decode(played[5].frames[:32])
    assert time.process_time() - start < 1.5  # 4,096 frames
    start = time.process_time()
    game.episodes(5, 32)
    assert time.process_time() - start < 1.5


# Floors

NOTE = {  # copy-last PSNR by horizon, mean frame, changed pixels in %, copy-last on those at h=1
    0: ((21.9, 21.7, 21.0, 20.6, 20.2, 19.9, 19.8), 20.4, 1.8, 4.3),
    1: ((20.8, 20.6, 20.1, 19.8, 19.5, 19.2, 19.1), 20.1, 2.5, 4.8),
    2: ((20.8, 20.6, 20.0, 19.5, 19.1, 18.7, 18.2), 18.4, 2.5, 4.8),
    3: ((21.2, 21.0, 20.4, 19.9, 19.5, 19.0, 18.4), 17.3, 2.4, 5.1),
    4: ((20.9, 20.3, 19.4, 18.5, 17.8, 17.9, 17.4), 17.4, 2.9, 5.5),
    5: ((20.4, 19.8, 18.9, 18.0, 17.4, 17.5, 17.0), 17.2, 3.1, 5.2)}


def floors(frames):
    """Copy-last PSNR at HORIZONS over all pairs of frames so far apart, and that of the mean frame, dB."""
    rows = frames.reshape(*frames.shape[:2], -1).astype(np.float32) / 255
    square = np.einsum("ntd,ntd->nt", rows, rows)
    dots = rows @ rows.transpose(0, 2, 1)
    d = rows.shape[-1]
    errors = [np.mean(square[:, h:] + square[:, :-h] - 2 * np.diagonal(dots, h, 1, 2)) / d for h in HORIZONS]
    mean = square.mean() / d - np.square(rows.mean((0, 1), dtype=np.float64)).mean()
    return -10 * np.log10(errors), -10 * np.log10(mean)


@pytest.mark.parametrize("level", LEVELS)
def test_floors_are_those_of_the_note(played, level):
    frames = played[level].frames
    copied, mean = floors(frames)
    assert copied == pytest.approx(NOTE[level][0], abs=.3) and mean == pytest.approx(NOTE[level][1], abs=.3)
    few = frames[:32]
    changed = (few[:, 1:] != few[:, :-1]).any(-1)
    assert 100 * changed.mean() == pytest.approx(NOTE[level][2], abs=.25)
    a, b = few[:, 1:][changed].astype(int), few[:, :-1][changed].astype(int)
    assert -10 * np.log10(np.square(a - b).mean() / 255 ** 2) == pytest.approx(NOTE[level][3], abs=.3)


# Scoreboard

ALL = ("agent ball_found ball_error coins hud legal obey permanence return_walls return_coins return_ball "
       "cue").split()


def board(data, dream=None, n=N, actions=None, context=CONTEXT):
    return game.scores(data.frames[:n] if dream is None else dream, part(data.states, slice(n)),
                       data.actions[:n] if actions is None else actions, context)


def lacking(level):
    """Scores that a level has not."""
    since = dict(ball_found=1, ball_error=1, permanence=1, coins=2, hud=2, return_walls=4, return_coins=4,
                 return_ball=4, cue=5)
    return {name for name in since if level < since[name]}


def copied(frames):
    return frames[:, np.arange(128).clip(0, CONTEXT - 1)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_truth_scores_one(played, level):
    found = board(played[level])
    assert list(found.mean) == list(found.horizon) == ALL
    for name in ALL:
        if name in lacking(level):
            assert np.isnan(found.mean[name]) and np.isnan(found.horizon[name]).all()
        else:
            perfect = float(name != "ball_error")
            assert found.mean[name] == perfect
            known = found.horizon[name][~np.isnan(found.horizon[name])]
            assert (known == perfect).all() and len(found.horizon[name]) == 128 - CONTEXT and len(known) > 50
    for name in ("permanence", "return_ball", "cue"):
        gap, cases = found.gap[name], found.cases[name]
        assert gap.shape == cases.shape == (7,) and (np.isnan(gap) == (cases == 0)).all()
        assert (gap[cases > 0] == 1).all() and cases.any() == (name not in lacking(level))


@pytest.mark.parametrize("level", LEVELS)
def test_floors_of_the_scoreboard(played, level):
    """Nothing is given away: copies of the last frame, and frames drawn at random."""
    frames = played[level].frames[:N]
    copy, random = board(played[level], copied(frames)), board(
        played[level], frames.reshape(-1, 32, 32, 3)[g().permutation(N * 128)].reshape(frames.shape))
    assert copy.mean["legal"] == 1 and copy.mean["obey"] == pytest.approx(
        1 - moved(played[level].states)[:N, CONTEXT - 1:].mean(), abs=.2)
    assert copy.horizon["agent"][:4].mean() > .2 > .15 > copy.horizon["agent"][32:].mean()
    assert random.mean["agent"] < .07 and random.mean["obey"] < .07
    for found in (copy, random):
        assert set(name for name in ALL if np.isnan(found.mean[name])) == lacking(level)
        for name, most in dict(ball_found=.15, permanence=.2, coins=.85, hud=.6, return_walls=.75,
                               return_coins=.4, return_ball=.25, cue=.4).items():
            if name not in lacking(level):
                assert found.mean[name] < most, name
    if level:
        assert copy.mean["ball_error"] > 8 and random.mean["ball_error"] > 8


def test_copy_last_agent_is_that_of_the_note(played):
    cell = played[1].states.cell
    found = [(cell[:, h:] == cell[:, :-h]).all(-1).mean() for h in HORIZONS]
    assert found == pytest.approx([.44, .41, .31, .24, .18, .12, .09], abs=.03)


def test_actions_lead_into_their_frames(played):
    for level in (0, 5):
        data = played[level]
        actions = data.actions[:N]
        late, early = actions.copy(), actions.copy()
        late[:, 2:], early[:, 1:-1] = actions[:, 1:-1], actions[:, 2:]
        assert board(data, actions=actions).mean["obey"] == 1
        for wrong in (late, early):
            found = board(data, actions=wrong)
            assert found.mean["obey"] < .8 and found.mean["agent"] == 1


def drop_ball(frames, states, rng, p):
    red = frames[..., 0] == game.PALETTE[game.BALL][0]  # no other colour has as much
    frames[red & (rng.random(frames.shape[:2]) < p)[..., None, None]] = game.PALETTE[game.FLOOR]


def shift_agent(frames, states, rng, p):
    """One cell aside, to a cell where it covers nothing."""
    for n, t in np.argwhere(rng.random(frames.shape[:2]) < p):
        y, x = states.cell[n, t]
        ball = tuple(states.ball[n, t] // 4) if states.visible[n, t] else None
        for to in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if not states.walls[n, t][to] and not states.coins[n, t][to] and to != ball:
                for (i, j), colour in (((y, x), game.FLOOR), (to, game.AGENT)):
                    frames[n, t, 4 + 4 * i:8 + 4 * i, 4 * j:4 * j + 4] = game.PALETTE[colour]
                break


def drop_coin(frames, states, rng, p):
    for n, t in np.argwhere(rng.random(frames.shape[:2]) < p):
        for y, x in np.argwhere(states.coins[n, t])[:1]:
            cell = frames[n, t, 4 + 4 * y:8 + 4 * y, 4 * x:4 * x + 4]
            cell[(cell == game.PALETTE[game.COIN]).all(-1)] = game.PALETTE[game.FLOOR]  # not a ball above it


def drop_marker(frames, states, rng, p):
    frames[rng.random(frames.shape[:2]) < p, 1:3, 1:3] = 0


def wrong_cue(frames, states, rng, p):
    hit = states.shown & (rng.random(frames.shape[:2]) < p)
    frames[hit, :4, 28:] = game.PALETTE[game.CUE + (states.cue[hit] + 1) % 4][:, None, None]


@pytest.mark.parametrize("fault, level, falls", [
    (drop_ball, 3, "ball_found permanence"), (drop_ball, 5, "ball_found permanence return_ball"),
    (shift_agent, 3, "agent obey"), (drop_coin, 3, "coins"), (drop_coin, 5, "coins return_coins"),
    (drop_marker, 3, "hud"), (wrong_cue, 5, "cue")])
def test_the_corruption_ladder(played, fault, level, falls):
    """A fault in more frames costs more, and costs only what it should."""
    data, ladder = played[level], []
    states = part(data.states, slice(N))
    for p in (0, .15, .5):
        frames = data.frames[:N].copy()
        fault(frames, states, g(), p)
        ladder.append(board(data, frames).mean)
    for name in ALL:
        values = [found[name] for found in ladder]
        if name in falls.split():
            assert values[0] == 1 and (np.diff(values) < -.02).all() and values[-1] < .9, (name, values)
        elif name not in lacking(level):
            assert values == [float(name != "ball_error")] * 3, (name, values)
    (first, *_) = falls.split()
    if fault in (drop_ball, wrong_cue):
        assert [found[first] for found in ladder] == pytest.approx([1, .85, .5], abs=.05)


def test_blur_costs_the_small_things_first(played):
    data, ladder = played[5], []
    frames = data.frames[:12].astype(np.float32)
    blurred = frames
    for axis in (2, 3):  # a box of 3x3 px
        blurred = sum(np.roll(blurred, step, axis) for step in (-1, 0, 1)) / 3
    for p in (0, .5, .65, .9):
        ladder.append(board(data, np.rint(frames + p * (blurred - frames)).astype(np.uint8), 12).mean)
    hud, coins, ball, obey, agent = ([found[name] for found in ladder] for name in (
        "hud", "coins", "ball_found", "obey", "agent"))
    assert hud[:2] == [1, pytest.approx(.35, abs=.1)] and (np.diff(coins)[:2] < -.005).all() and coins[2] < .2
    assert ball[:2] == [1, 1] and (np.diff(ball)[1:] < -.03).all() and ball[-1] < .05
    assert obey[0] == 1 and .9 < obey[-1] < 1 and agent == [1] * 4


def test_ball_error_is_a_distance(played):
    data = played[1]
    frames, states = data.frames[:N].copy(), part(data.states, slice(N))
    drop_ball(frames, states, g(), 1)
    for n, t in np.argwhere(states.visible):
        y, x = states.ball[n, t] - (2, 0)  # one frame's motion too high: where it is found
        frames[n, t, 4 + y:6 + y, x:x + 2] = game.PALETTE[game.BALL]
    found = board(data, frames).mean
    assert found["ball_found"] == 1 and found["ball_error"] == 2
    frames, three = data.frames[:N].copy(), np.array((3, 4))
    drop_ball(frames, states, g(), 1)
    for n, t in np.argwhere(states.visible):
        y, x = np.where(states.ball[n, t] < 12, states.ball[n, t] + three, states.ball[n, t] - three)
        frames[n, t, 4 + y:6 + y, x:x + 2] = game.PALETTE[game.BALL]
    found = board(data, frames).mean
    assert found["ball_found"] == 0 and found["ball_error"] == pytest.approx(5)


def unseen(sight):
    """list of (t, frames unseen before t) where something is seen again: counted one frame at a time."""
    found, last = [], None
    for t, see in enumerate(sight):
        if see:
            if last is not None and t - last > 1:
                found.append((t, t - last - 1))
            last = t
    return found


def test_gaps_are_frames_out_of_sight(played):
    """Cases by hand: the fault is on single frames, and costs in their bin alone."""
    data = played[3]
    states = part(data.states, slice(N))
    gaps = {(n, t): gap for n in range(N) for t, gap in unseen(states.visible[n]) if t >= CONTEXT}
    bins = np.bincount(np.searchsorted(game.GAPS, list(gaps.values()), "right") - 1, minlength=7)
    frames = data.frames[:N].copy()
    for (n, t), gap in gaps.items():
        if 4 <= gap < 8:
            drop_ball(frames[n:n + 1, t:t + 1], None, g(), 1)
    found = board(data, frames)
    assert found.cases["permanence"].tolist() == bins.tolist() and bins[:3].min() > 30 and not bins[4:].any()
    assert found.gap["permanence"][:3].tolist() == [1, 1, 0] and found.mean["ball_found"] > .9
    assert found.mean["permanence"] == pytest.approx(1 - bins[2] / bins.sum())

    data = played[5]
    states = part(data.states, slice(N))
    gaps = {(n, t): gap for n in range(N) for t, gap in unseen(states.shown[n]) if t >= CONTEXT}
    bins = np.bincount(np.searchsorted(game.GAPS, list(gaps.values()), "right") - 1, minlength=7)
    frames = data.frames[:N].copy()
    for (n, t), gap in gaps.items():
        if gap >= 32:
            frames[n, t, :4, 28:] = 0
    found = board(data, frames)
    assert found.cases["cue"].tolist() == bins.tolist() and bins.min() > 1
    assert found.gap["cue"].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_returns_to_a_room(played):
    """The stays in a room seen before, told one frame at a time: only there it matters what is drawn."""
    data = played[4]
    states = part(data.states, slice(N))
    frames, kept, stays = data.frames[:N].copy(), data.frames[:N].copy(), 0
    for n in range(N):
        seen, counted = {states.room[n, 0]}, False
        for t in range(1, 128):
            if states.room[n, t] != states.room[n, t - 1]:
                counted = t >= CONTEXT and states.room[n, t] in seen
                seen.add(states.room[n, t])
                stays += counted
            target = frames if counted else kept
            if t >= CONTEXT:  # walls and coins go from the one or the other
                for colour in (game.WALL, game.COIN):
                    at = (target[n, t, 4:] == game.PALETTE[colour]).all(-1)
                    target[n, t, 4:][at] = game.PALETTE[game.FLOOR]
    assert stays > 30
    gone, elsewhere = board(data, frames).mean, board(data, kept).mean
    assert gone["return_walls"] == gone["return_coins"] == 0 and gone["agent"] == 1 and gone["coins"] > .3
    assert elsewhere["return_walls"] == elsewhere["return_coins"] == 1 and elsewhere["coins"] < gone["coins"]

    frames = data.frames[:N].copy()
    ball = {(n, t): gap for n in range(N) for r in (0, 1)
            for t, gap in unseen(states.visible[n] & (states.room[n] == r))
            if t >= CONTEXT and (states.room[n, t - gap:t] != r).any()}
    for n, t in ball:
        drop_ball(frames[n:n + 1, t:t + 1], None, g(), 1)
    found = board(data, frames)
    assert found.mean["return_ball"] == 0 and found.mean["permanence"] == 1 and found.mean["ball_found"] > .9
    assert found.cases["return_ball"].sum() == len(ball) > 30


def test_a_dream_of_another_world_obeys_its_own_frames(played):
    """The same actions in the layouts of other seeds: lawful, and wrong."""
    data = played[5]
    dream = game.replay(5, data.actions[:N], first_seed=500).frames
    dream[:, :CONTEXT] = data.frames[:N, :CONTEXT]
    found = board(data, dream)
    assert (found.horizon["obey"][1:] == 1).all() and found.horizon["obey"][0] < .4
    assert (found.horizon["legal"][1:] == 1).all() and found.mean["agent"] < .3


def test_an_agent_in_a_wall_is_illegal(played):
    data = played[0]
    frames, states = data.frames[:N].copy(), part(data.states, slice(N))
    frames[:N // 2, 50, 4:8, 12:16] = game.PALETTE[game.AGENT]  # a second one, in the border
    for n, (y, x) in enumerate(states.cell[N // 2:, 60], N // 2):
        frames[n, 60, 4 + 4 * y:8 + 4 * y, 4 * x:4 * x + 4] = game.PALETTE[game.FLOOR]
        frames[n, 60, 4:8, 12:16] = game.PALETTE[game.AGENT]  # the only one, in the border
    legal = board(data, frames).horizon["legal"]
    assert legal[50 - CONTEXT] == legal[60 - CONTEXT] == .5 and np.sort(legal)[2] == 1


# Errors, pictures and commands

@pytest.mark.parametrize("call, said", [
    (lambda: game.Game(6, 0), "level 0..5"), (lambda: game.Game(0, -1), "seed >= 0"),
    (lambda: game.Game(0, 0).step(6), "action 0..5, found 6"),
    (lambda: game.Game(0, 0).step(-1), "action 0..5, found -1"),
    (lambda: game.episodes(-1, 2), "level 0..5"), (lambda: game.episodes(0, 0), "count and length >= 1"),
    (lambda: game.replay(0, np.zeros(5, int)), r"int \(N, T\)"),
    (lambda: game.replay(0, np.full((1, 3), 7)), "action 0..5, found 7"),
    (lambda: game.decode(np.zeros((4, 32, 32), np.uint8)), r"\(\.\.\., 32, 32, 3\)"),
    (lambda: game.decode(np.zeros((32, 32, 3))), "uint8"),
    (lambda: board(game.episodes(0, 2, 4), context=4), "context in 1..T-1"),
    (lambda: board(game.episodes(0, 2, 4), actions=np.zeros((2, 3), int), context=1), r"\(2, 3\)")])
def test_errors_are_one_clear_line(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_commands(tmp_path, capsys):
    for arguments in (["draw"], ["preview", "a", "b"]):
        assert game.main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "data.game", "preview", str(tmp_path / "new" / "p.png")],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "new" / "p.png").stat().st_size > 20_000, done.stderr
