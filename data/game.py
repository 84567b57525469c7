"""
A fully known 32x32 game for a world model: six levels, exact states, a decoder of frames, a scoreboard.

A frame is uint8 (32, 32, 3). Rows 0..3 are the HUD; below lie 7x8 cells of 4x4 px, and "body" px count from
row 4. Actions: 0 noop, 1 up, 2 down, 3 left, 4 right, 5 ask. Every level adds one thing:

    L0  agent, walls, one closed room    a frame follows its action
    L1  a ball                           motion of its own: two frames tell where it goes
    L2  4 coins, a counter in the HUD    events, permanent changes, counting
    L3  a cloud that hides the ball      object permanence
    L4  a second room, two exits         memory of places; what is out of sight moves on
    L5  a cue, shown again by ask        long recall: one of four colours, chance 1/4

An episode depends on nothing but level and seed: layout from default_rng([seed, 0]), turns of the ball (only
when stochastic) from [seed, 1], the player from [seed, 2]. Layouts are drawn in one order at all levels, so a
seed has the same balls and the same walls at all levels, but for walls under clouds and at exits.
actions[t] LEADS INTO frames[t]; actions[0] is -1. The ball covers a 2x2 quarter of one cell, always on even
px, so a frame shows all of it or nothing.

    python -m data.game                         # a picture of the six levels: runs/preview_game.png

512 episodes of 128 frames are played in seconds and kept as a file of 2 MB.
Not here: playing by hand, other people's videos, windows and batches of episodes.
"""
import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from data import program, written

LEVELS = ("one room", "ball", "coins", "cloud", "two rooms", "cue")  # what each adds
ACTIONS = ("noop", "up", "down", "left", "right", "ask")
ASK = 5
SIDE, HUD, CELL = 32, 4, 4  # px: of a frame, of the HUD (rows), of a cell
ROWS, COLS = 7, 8  # cells
EXITS = ((3, 7), (3, 0))  # the cell that leads out of room 0, and of room 1
COINS, CUES = 4, 4
LOW, HIGH = 4, (22, 26)  # range of the ball's top left, body px; HIGH is (y, x)
SPEED = 2  # px per axis and frame
FLIP = .05  # chance per step of a stochastic ball to turn on one axis
CUE_FRAMES = 4  # at the start of an episode

FLOOR, WALL, AGENT, COIN, BALL, CLOUD, EXIT, BLACK, CUE = range(9)  # CUE: the first of four
PALETTE = np.array([
    (20, 20, 30), (90, 90, 110), (60, 160, 255), (250, 210, 40), (240, 70, 70), (150, 150, 150),
    (40, 200, 90), (0, 0, 0), (255, 0, 255), (0, 255, 255), (255, 128, 0), (128, 255, 0)], np.uint8)
STEPS = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])  # (y, x) of each action

SEEDS = dict(train=0, val=1_000_000, test=2_000_000)  # first episode of each split
CACHE = "runs/cache"
RECIPE = 1  # part of the cache's name: raise it whenever the game or its player changes
CHUNK = 64  # frames decoded at once: their arrays stay in the processor's cache

FOUND = 2  # px: a ball is found when it is no further off than this on either axis, one frame of its motion
GAPS = (1, 2, 4, 8, 16, 32, 64)  # lower edges of the bins of frames out of sight


# ------------------------------------------------------------------------------------------------------------
# The game

def rule(walls, cell, action):
    """The agent's next cell: before a wall it stays, and over the left or right edge it comes back opposite.

    walls: bool (..., 7, 8); cell: int (..., 2), (y, x), or -1 for unknown; action: int (...); leading axes
    broadcast. Returns int (..., 2), -1 where the cell is unknown. Nothing else of a frame matters.
    """
    walls, cell, action = np.asarray(walls), np.asarray(cell), np.asarray(action)
    lead = np.broadcast_shapes(walls.shape[:-2], cell.shape[:-1], action.shape)
    y, x = np.moveaxis(np.broadcast_to(cell + STEPS[action], (*lead, 2)), -1, 0)
    y, over = y.clip(0, ROWS - 1), (x < 0) | (x >= COLS)
    x = x % COLS
    flat = np.broadcast_to(walls, (*lead, ROWS, COLS)).reshape(*lead, ROWS * COLS)
    blocked = np.take_along_axis(flat, (y * COLS + x)[..., None], -1) & ~over[..., None]
    return np.where((cell < 0).any(-1, keepdims=True), -1, np.where(blocked, cell, np.stack([y, x], -1)))


class Game:
    """One episode, to be stepped through.

    level: 0..5; seed: int >= 0; stochastic: balls turn at random. The exact state:
        room     0 or 1                           cell     (y, x) of the agent
        walls    bool (2, 7, 8), per room         coins    bool (2, 7, 8), those left
        cloud    bool (2, 7, 8)                   places   all (room, y, x) that the agent can reach
        balls    per room (y, x, vy, vx)          ball     (y, x) of the visible room, body px; (-1, -1) in L0
        visible  is the ball to be seen?          score    coins taken; -1 below L2
        cue      0..3; -1 below L5                shown    is the cue to be seen?         t   frame, from 0
    A step replaces arrays and tuples and never writes into them, so that copy() may share them.
    """

    def __init__(self, level, seed, stochastic=False):
        if level not in range(len(LEVELS)) or seed < 0:
            raise ValueError(f"game: expected a level 0..{len(LEVELS) - 1} and a seed >= 0, "
                             f"found {level} and {seed}")
        self.level, self.seed, self.stochastic = level, seed, stochastic
        self.reset()

    def reset(self):
        """Back to frame 0."""
        rng = np.random.default_rng([self.seed, 0])  # what a level has not is drawn all the same: see above
        cloud = np.zeros((2, ROWS, COLS), bool)
        for room, left in enumerate(rng.integers(1, 5, 2)):
            cloud[room, 1:3, left:left + 2] = self.level >= 3
        walls = np.ones((2, ROWS, COLS), bool)
        walls[:, 1:-1, 1:-1] = False
        y, x = rng.integers(1, 6, (2, 6)), rng.integers(2, 6, (2, 6))
        for room in (0, 1):
            walls[room, y[room], x[room]] = True
        walls[:, 3, 1:-1] = False  # a corridor
        start = LOW + SPEED * rng.integers(0, [(high - LOW) // SPEED + 1 for high in HIGH], (2, 2))
        self.balls = tuple(map(tuple, np.hstack([start, SPEED * rng.choice((-1, 1), (2, 2))]).tolist()))
        cue, room = int(rng.integers(CUES)), int(rng.integers(2))
        walls &= ~cloud
        if self.level >= 4:
            for r, (y, x) in enumerate(EXITS):
                walls[r, y, x] = False
        self.walls, self.cloud, self._moves = walls, cloud, _moves(walls)
        self.places = sorted(_distances(self._moves, (0, 3, 3)))
        own = [place for place in self.places if place[0] == (room if self.level >= 4 else 0)]
        self._place = own[rng.integers(len(own))]
        self.coins = np.zeros_like(walls)
        if self.level >= 2:
            free = np.zeros_like(walls)
            free[tuple(np.transpose(self.places))] = True
            free[self._place] = False
            self.coins.flat[rng.choice(np.flatnonzero(free & ~cloud), COINS, replace=False)] = True
        self.score = 0 if self.level >= 2 else -1
        self.cue, self.shown, self.t = (cue, True, 0) if self.level >= 5 else (-1, False, 0)
        # What turns the ball at t depends on t alone, so copies share the list: who is first adds to it
        self._turns, self._turn_rng = [], np.random.default_rng([self.seed, 1])
        self._rooms = [self._paint(r) for r in (0, 1)]

    room = property(lambda self: self._place[0])
    cell = property(lambda self: self._place[1:])
    ball = property(lambda self: self.balls[self.room][:2] if self.level >= 1 else (-1, -1))

    @property
    def visible(self):
        y, x = self.ball
        below = self.room, y // CELL, x // CELL
        return self.level >= 1 and below != self._place and not self.cloud[below]

    def step(self, action):
        """One frame on; returns the reward, 1.0 for a coin and else 0.0."""
        if action not in range(len(ACTIONS)):
            raise ValueError(f"game: expected an action 0..{len(ACTIONS) - 1}, found {action}")
        self._place = self._moves[self._place][action]
        reward = float(self.coins[self._place])
        if reward:
            self.coins = self.coins.copy()
            self.coins[self._place] = False
            self.score += 1
            self._rooms = [self._paint(r) for r in (0, 1)]
        self.balls = tuple(map(_bounced, self.balls))
        if self.stochastic:
            while len(self._turns) <= self.t:
                rng = self._turn_rng
                self._turns.append(int(rng.integers(2)) if rng.random() < FLIP else None)
            axis = self._turns[self.t]
            if axis is not None:
                ball = list(self.balls[self.room])
                ball[2 + axis] *= -1
                self.balls = (*self.balls[:self.room], tuple(ball), *self.balls[self.room + 1:])
        self.t += 1
        self.shown = self.level >= 5 and (action == ASK or self.t < CUE_FRAMES)
        return reward

    def copy(self):
        """A game of its own in the same state; costs microseconds."""
        return copy.copy(self)

    def frame(self):
        """uint8 (32, 32, 3)."""
        return PALETTE[self._picture()]

    def _paint(self, room):
        """Positions in PALETTE, uint8 (32, 32): what stays in a room from frame to frame."""
        picture = np.full((SIDE, SIDE), BLACK, np.uint8)
        body = picture[HUD:].reshape(ROWS, CELL, COLS, CELL)
        body[:] = np.where(self.walls[room], WALL, FLOOR)[:, None, :, None]
        for y, x in np.argwhere(self.coins[room]):
            body[y, 1:3, x, 1:3] = COIN
        if self.level >= 4:
            y, x = EXITS[room]
            body[y, :, x, -1 if x else 0] = EXIT
        for y, x in np.argwhere(self.cloud[room]):
            body[y, :, x] = CLOUD
        return picture

    def _picture(self):
        """Positions in PALETTE, uint8 (32, 32). A hidden ball is left out instead of painted over."""
        picture = self._rooms[self.room].copy()
        if self.visible:
            y, x = self.ball
            picture[HUD + y:HUD + y + 2, x:x + 2] = BALL
        y, x = self.cell
        picture[HUD + CELL * y:HUD + CELL * (y + 1), CELL * x:CELL * (x + 1)] = AGENT
        for i in range(self.score):
            picture[1:3, 1 + 3 * i:3 + 3 * i] = COIN
        if self.shown:
            picture[:HUD, SIDE - CELL:] = CUE + self.cue
        return picture


def _moves(walls):
    """(room, y, x) of every open cell -> where each of the six actions leads, as (room, y, x)."""
    grid = np.moveaxis(np.indices((ROWS, COLS)), 0, -1)[:, :, None]
    cells = rule(walls[:, None, None, None], grid, np.arange(len(ACTIONS)))  # (room, y, x, action, 2)
    crossed = np.abs(cells[..., 1] - grid[..., 1]) > 1
    rooms = crossed ^ np.arange(2)[:, None, None, None]
    to = np.concatenate([rooms[..., None], cells], -1).tolist()
    return {(r, y, x): [tuple(place) for place in to[r][y][x]] for r, y, x in np.argwhere(~walls).tolist()}


def _distances(moves, goal):
    """(room, y, x) -> steps to the goal, for every place that it can be reached from."""
    steps, line = {goal: 0}, [goal]
    for place in line:  # grows while it is gone through; every way can be gone back
        for to in moves[place]:
            if to not in steps:
                steps[to] = steps[place] + 1
                line.append(to)
    return steps


def _bounced(ball):
    """The ball one frame later: an axis whose next position is out of range turns first."""
    y, x, vy, vx = ball
    vy = vy if LOW <= y + vy <= HIGH[0] else -vy
    vx = vx if LOW <= x + vx <= HIGH[1] else -vx
    return y + vy, x + vx, vy, vx


def player(game):
    """The actions of the policy mix, one each time it is asked: look at game, which the caller steps.

    A quarter of the seeds draw every action anew, a quarter hold each for 3..9 frames, and half walk: on a
    shortest path to a coin that is left (every other time) or to any place, with 10 % random actions.
    """
    rng = np.random.default_rng([game.seed, 2]).random

    def pick(options):
        return options[int(len(options) * rng())]
    actions, kind, known = range(len(ACTIONS)), rng(), {}
    while kind < .25:
        yield pick(actions)
    while kind < .5:
        action = pick(actions)
        for _ in range(pick(range(3, 10))):
            yield action
    while True:
        coins = list(map(tuple, np.argwhere(game.coins).tolist())) if rng() < .5 else []
        goal = pick(coins or game.places)
        if goal not in known:
            known[goal] = _distances(game._moves, goal)
        steps = known[goal]
        while game._place != goal:
            to = game._moves[game._place]
            yield pick(actions) if rng() < .1 else min(actions, key=lambda action: steps[to[action]])


# ------------------------------------------------------------------------------------------------------------
# Sets of episodes

def episodes(level, count, length=128, first_seed=SEEDS["train"], cache=None, stochastic=False):
    """Episodes of the policy mix; those of a larger count begin with those of a smaller one.

    level: 0..5; count: N episodes, of the seeds first_seed, first_seed + 1, ..; length: T frames each;
    cache: folder that keeps the set (None: nowhere), as one small file; stochastic: balls turn at random.
    Returns a namespace:
        frames   uint8 (N, T, 32, 32, 3)
        actions  int64 (N, T): actions[n, t] leads into frames[n, t]; actions[:, 0] = -1
        rewards  float32 (N, T): 1 on a frame that shows a coin just taken
        states   a namespace of the truth on each frame; -1 where the level has no such thing
            room (N, T)    cell (N, T, 2)    ball (N, T, 2): of the visible room, top left, body px
            visible (N, T) bool: is the ball seen?    walls, coins (N, T, 7, 8) bool: of the visible room
            score (N, T): coins taken    cue (N, T): its colour    shown (N, T) bool: is it seen?
        facts    one line to print
    """
    if level not in range(len(LEVELS)) or count < 1 or length < 1 or first_seed < 0:
        raise ValueError(f"episodes: expected a level 0..{len(LEVELS) - 1}, count and length >= 1 and "
                         f"first_seed >= 0, found {level}, {count}, {length} and {first_seed}")
    record = dict(level=level, count=count, length=length, first_seed=first_seed, stochastic=bool(stochastic))
    if cache is None:
        return _unpacked(_played(record), record)
    tag = hashlib.blake2b(json.dumps(dict(record, recipe=RECIPE)).encode(), digest_size=16).hexdigest()
    path = Path(cache).resolve() / f"game_{tag}.npz"
    try:
        with np.load(path) as file:  # a zip: it knows when a byte has changed
            played = {name: file[name] for name in ("pictures", "table", "walls", "coins")}
        return _unpacked(played, record)
    except FileNotFoundError:
        pass
    except Exception as error:  # a changed byte of a header makes numpy raise nearly anything
        print(f"{path}: damaged ({type(error).__name__}), made again", file=sys.stderr)
    played = _played(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:  # the name appears with the whole file
        with open(part, "wb") as file:
            np.savez_compressed(file, **played)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return _unpacked(played, record)


def replay(level, actions, first_seed=SEEDS["train"], stochastic=False):
    """Episodes of given actions, as episodes() returns them; actions: int (N, T), [:, 0] is not used."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or not actions.size or actions.dtype.kind not in "iu":
        raise ValueError(f"replay: expected actions int (N, T), found {actions.dtype} {actions.shape}")
    record = dict(level=level, count=len(actions), length=actions.shape[1], first_seed=first_seed,
                  stochastic=bool(stochastic))
    return _unpacked(_played(record, actions.tolist()), record)


def _played(record, actions=None):
    """Play what a record says, with its player or given actions: a dict of arrays (N, T, ...)."""
    shape = (record["count"], record["length"])
    pictures, table = np.empty((*shape, SIDE, SIDE), np.uint8), np.empty((*shape, 11), np.int8)
    walls, coins = np.empty((2, *shape, ROWS, COLS), bool)
    for n in tqdm(range(shape[0]), "game", unit="episode", disable=None):
        game = Game(record["level"], record["first_seed"] + n, record["stochastic"])
        hand = player(game) if actions is None else iter(actions[n][1:])
        action, reward, rows = -1, 0, []
        for t in range(shape[1]):
            if t:
                action = next(hand)
                reward = game.step(action)
            pictures[n, t] = game._picture()
            walls[n, t], coins[n, t] = game.walls[game.room], game.coins[game.room]
            rows.append((action, reward, game.room, *game.cell, *game.ball, game.visible, game.score,
                         game.cue, game.shown))
        table[n] = rows
    return dict(pictures=pictures, table=table, walls=walls, coins=coins)


def _unpacked(played, record):
    """What episodes() returns, from the arrays of _played()."""
    pictures, table = played["pictures"], played["table"].astype(np.int64)
    frames = np.empty((*pictures.shape, 3), np.uint8)
    for row, episode in zip(frames, pictures):  # at once it would take 8 bytes a pixel for the positions
        np.take(PALETTE, episode, 0, out=row, mode="clip")
    action, reward, room, y, x, ball_y, ball_x, visible, score, cue, shown = np.moveaxis(table, -1, 0)
    states = SimpleNamespace(
        room=room.copy(), cell=np.stack([y, x], -1), ball=np.stack([ball_y, ball_x], -1), visible=visible > 0,
        walls=played["walls"], coins=played["coins"], score=score.copy(), cue=cue.copy(), shown=shown > 0)
    count, length = room.shape
    first, level = record["first_seed"], record["level"]
    moved = (states.room[:, 1:] != states.room[:, :-1]) | (states.cell[:, 1:] != states.cell[:, :-1]).any(-1)
    facts = (f"{count:,} episodes of {length} frames, L{level} ({LEVELS[level]}), seeds {first}.."
             f"{first + count - 1}" + ", stochastic" * record["stochastic"]
             + (f"; the agent moves on {moved.mean():.0%} of steps" if moved.size else ""))
    return SimpleNamespace(frames=frames, actions=action.copy(), rewards=reward.astype(np.float32),
                           states=states, facts=facts)


# ------------------------------------------------------------------------------------------------------------
# From frames to states

def decode(frames):
    """What a person reads off frames, exactly right on rendered ones; the nearest colour of PALETTE counts.

    frames: uint8 (..., 32, 32, 3). Returns a namespace of arrays, ... being the same leading axes:
        agents  int (...): cells with >= 8 of 16 px of the agent's colour; a legal frame has one
        cell    int (..., 2): (y, x) of that cell; -1 unless there is exactly one
        walls   bool (..., 7, 8): >= 8 of 16 px        coins  bool (..., 7, 8): >= 2 of the inner 4 px
        exits   bool (..., 2), left and right: >= 2 of 4 px
        ball    int (..., 2): top left, body px; -1 unless there is exactly one full 2x2 square
        hud     int (...): markers with >= 2 of 4 px   cue    int (...): colour of >= 8 of 16 px; -1 for none
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape[-3:] != (SIDE, SIDE, 3):
        raise ValueError(f"decode: expected frames uint8 (..., {SIDE}, {SIDE}, 3), found {frames.dtype} "
                         f"{frames.shape}")
    lead, flat = frames.shape[:-3], frames.reshape(-1, SIDE, SIDE, 3)
    parts = [_decoded(_nearest(flat[i:i + CHUNK])) for i in range(0, max(len(flat), 1), CHUNK)]
    return SimpleNamespace(**{name: np.concatenate([part[name] for part in parts]).reshape(
        lead + parts[0][name].shape[1:]) for name in parts[0]})


def _nearest(frames):
    """uint8 (M, 32, 32, 3) -> positions of the nearest colours, uint8 (M, 32, 32).

    |x - p|^2 less |x|^2 is linear in x. With the position in its last four bits one minimum finds both; all
    numbers are integers below 2^24, exact in float32.
    """
    p = PALETTE.astype(np.float32)
    keys = p @ frames.reshape(-1, 3).T.astype(np.float32) * -32
    keys += 16 * np.square(p).sum(1, keepdims=True) + np.arange(len(p), dtype=np.float32)[:, None]
    return (keys.min(0).astype(np.int32) & 15).astype(np.uint8).reshape(frames.shape[:-1])


def _decoded(pictures):
    """Positions in PALETTE, uint8 (M, 32, 32) -> dict of what decode() returns."""
    hud, body = pictures[:, :HUD], pictures[:, HUD:]
    cells = body.reshape(-1, ROWS, CELL, COLS, CELL)

    def most(colour):
        return (cells == colour).sum((2, 4), dtype=np.uint8) >= 8
    agent = most(AGENT).reshape(-1, ROWS * COLS)
    agents, at = agent.sum(1), agent.argmax(1)
    ends = body[:, CELL * EXITS[0][0]:CELL * (EXITS[0][0] + 1)][:, :, [0, -1]]
    red = body == BALL
    red = red[:, 1:] & red[:, :-1]
    red = (red[:, :, 1:] & red[:, :, :-1]).reshape(-1, (SIDE - HUD - 1) * (SIDE - 1))  # where a square starts
    ball = np.stack(np.divmod(red.argmax(1), SIDE - 1), -1)
    marks = np.stack([hud[:, 1:3, 1 + 3 * i:3 + 3 * i] == COIN for i in range(COINS)], 1)
    cue = np.stack([(hud[:, :, SIDE - CELL:] == CUE + i).sum((1, 2)) for i in range(CUES)], 1)
    return dict(
        agents=agents, cell=np.where(agents[:, None] == 1, np.stack(np.divmod(at, COLS), -1), -1),
        walls=most(WALL), coins=(cells[:, :, 1:3, :, 1:3] == COIN).sum((2, 4)) >= 2,
        exits=(ends == EXIT).sum(1) >= 2, ball=np.where(red.sum(1, keepdims=True) == 1, ball, -1),
        hud=(marks.sum((2, 3)) >= 2).sum(1), cue=np.where(cue.max(1) >= 8, cue.argmax(1), -1))


# ------------------------------------------------------------------------------------------------------------
# The scoreboard

def scores(dream, truth, actions, context):
    """How much of the game a dream gets right, decoded and compared with the exact state.

    dream: uint8 (N, T, 32, 32, 3), the first `context` frames given and the others dreamt; truth: the states
    of episodes() on the same frames; actions: int (N, T), as there. For a floor give other frames as the
    dream: the last given one repeated, or frames drawn at random. The truth itself gets 1 (ball_error 0).

    Every score is a ratio of two sums over dreamt frames; NaN where its frames do not occur, as in levels
    that lack the thing. "Once seen" means seen by the player earlier in these T frames.
        agent         share of frames with the agent in its cell, and nowhere else
        ball_found    of the frames that show the ball: share with one ball within FOUND px on both axes
        ball_error    distance in px, mean over frames where truth and dream show one ball
        coins         F1 of the cells with coins
        hud           share of frames whose counter is the number of coins taken
        legal         share of frames with one agent, where the frame before had no wall (or through an exit)
        obey          share of frames whose agent is where rule() leads from the dream's own frame before
        permanence    ball_found on the frame where a ball once seen comes out from cloud or agent
        return_walls  F1 of walls (rows 1-5, columns 2-5: the others never differ) as long as the player is
        return_coins  F1 of coins                            back in a room once seen, entered in the dream
        return_ball   ball_found on the first frame that shows the ball of a room once seen again
        cue           share of right colours when the cue shows again after at least one frame
    Returns a namespace of dicts name -> value: mean, a float over all dreamt frames; horizon, float (T -
    context,) by frame; and by frames out of sight, in bins that start at GAPS: gap, float (7,), and cases,
    int (7,), the number of its frames, for permanence, return_ball and cue.
    """
    dream, actions = np.asarray(dream), np.asarray(actions)
    N, T = truth.room.shape
    if dream.shape[:2] != (N, T) or actions.shape != (N, T) or not 1 <= context < T:
        raise ValueError(f"scores: expected dream and actions (N, T, ...) = ({N}, {T}, ...) like the "
                         f"truth and a context in 1..T-1, found {dream.shape}, {actions.shape} and {context}")
    seen = decode(dream[:, context - 1:])
    was, now = (SimpleNamespace(**{k: v[:, part] for k, v in vars(seen).items()})
                for part in (slice(None, -1), slice(1, None)))
    true = SimpleNamespace(**{k: v[:, context:] for k, v in vars(truth).items()})

    # Frames out of sight before each frame, over the whole window; 0: in sight, or never seen before
    start = np.zeros((N, T), int)  # first frame of the present stay in a room
    start[:, 1:] = np.where(truth.room[:, 1:] != truth.room[:, :-1], np.arange(1, T), 0)
    start = np.maximum.accumulate(start, 1)
    ball_gap, room_gap = (sum(_gaps(sight & (truth.room == room)) for room in (0, 1))
                          for sight in (truth.visible, np.ones((N, T), bool)))
    away = np.arange(T) - ball_gap <= start  # the ball was last seen before this stay
    back = (start >= context) & (np.take_along_axis(room_gap, start, 1) > 0)
    hidden_gap, away_gap, cue_gap, back = (x[:, context:] for x in (
        ball_gap * ~away, ball_gap * away, _gaps(truth.shown), back))

    one = np.ones((N, T - context))
    off = np.where(now.ball >= 0, now.ball - true.ball, SIDE)
    found = np.abs(off).max(-1) <= FOUND
    both = true.visible & (now.ball >= 0).all(-1)
    counts = true.score >= 0
    known = (now.cell >= 0).all(-1)
    through = (now.cell[..., 0] == 3) & (np.abs(now.cell[..., 1] - was.cell[..., 1]) == COLS - 1)
    flat = was.walls.reshape(N, T - context, -1)
    in_wall = np.take_along_axis(flat, (now.cell @ (COLS, 1)).clip(0)[..., None], -1)[..., 0] & ~through
    obeyed = known & (now.cell == rule(was.walls, was.cell, actions[:, context:])).all(-1)
    inner = (slice(None), slice(None), slice(1, -1), slice(2, 6))
    both_walls, all_walls = _f1(now.walls[inner], true.walls[inner])
    both_coins, all_coins = _f1(now.coins, true.coins)
    ratios = dict(
        agent=((now.cell == true.cell).all(-1), one),
        ball_found=(found & true.visible, true.visible),
        ball_error=(np.hypot(*np.moveaxis(off, -1, 0)) * both, both),
        coins=(both_coins * counts, all_coins * counts),
        hud=((now.hud == true.score) & counts, counts),
        legal=(known & ~in_wall, one),
        obey=(obeyed, one),
        permanence=(found & (hidden_gap > 0), hidden_gap > 0),
        return_walls=(both_walls * back, all_walls * back),
        return_coins=(both_coins * back, all_coins * back),
        return_ball=(found & (away_gap > 0), away_gap > 0),
        cue=((now.cue == true.cue) & (cue_gap > 0), cue_gap > 0))
    board = SimpleNamespace(mean={}, horizon={}, gap={}, cases={})
    for name, (right, of) in ratios.items():
        board.mean[name] = float(_ratio(right.sum(), of.sum()))
        board.horizon[name] = _ratio(right.sum(0), of.sum(0))
    for name, gap in dict(permanence=hidden_gap, return_ball=away_gap, cue=cue_gap).items():
        bins = np.searchsorted(GAPS, gap.ravel(), "right")  # 0: no gap
        right, of = (np.bincount(bins, x.ravel(), len(GAPS) + 1)[1:] for x in ratios[name])
        board.gap[name], board.cases[name] = _ratio(right, of), of.astype(int)
    return board


def _gaps(seen):
    """bool (N, T) -> int (N, T): frames since it was last seen, on frames where it is seen again; else 0."""
    t = np.arange(seen.shape[1])
    last = np.maximum.accumulate(np.where(seen, t, -1), 1)
    before = np.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return np.where(seen & (before >= 0), t - before - 1, 0)


def _f1(a, b):
    """Two parts of F1 of sets, bool (N, T, rows, columns): int (N, T), to be summed and then divided."""
    return 2 * (a & b).sum((2, 3)), a.sum((2, 3)) + b.sum((2, 3))


def _ratio(right, of):
    return np.divide(right, of, out=np.full(np.shape(of), np.nan), where=np.asarray(of) > 0)


# ------------------------------------------------------------------------------------------------------------
# Commands

def preview(path="runs/preview_game.png", seed=419, columns=9, every=5):
    """Write a PNG: a row for each level, every few frames of one seed, one in which much
    happens. Returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(len(LEVELS), columns, figsize=(1.6 * columns + 1.3, 1.72 * len(LEVELS)),
                                  facecolor="#faf8f3", gridspec_kw=dict(left=.085, right=.99, bottom=.035,
                                                                        top=.985, wspace=.05, hspace=.06))
    for level, row in enumerate(panels):
        frames = episodes(level, 1, every * (columns - 1) + 1, seed).frames[0, ::every]
        for k, (panel, frame) in enumerate(zip(row, frames)):
            panel.imshow(frame, interpolation="nearest")
            panel.set_axis_off()
            if level == len(LEVELS) - 1:
                panel.text(.5, -.04, f"t = {every * k}", transform=panel.transAxes, ha="center", va="top",
                           fontsize=10, color="#666666")
        row[0].text(-.08, .5, f"L{level}\n+ {LEVELS[level]}" if level else f"L0\n{LEVELS[0]}", ha="right",
                    va="center", transform=row[0].transAxes, fontsize=12, color="#333333")
    return written(figure, path)


USAGE = "usage: python -m data.game [preview [PNG]]"


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr."""
    command, *rest = arguments or ["preview"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "preview" and len(rest) <= 1:
        print(f"wrote {preview(*rest)}")
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
