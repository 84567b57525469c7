"""The players of sample.py, around a small game that stands in for a world model. The browser test needs
chromium and chromedriver on the path (Debian: apt install chromium chromium-driver), or is skipped."""
import base64
import codecs
import contextlib
import http.client
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from types import SimpleNamespace

import fcntl
import numpy as np
import pytest

import sample

NOOP, UP, DOWN, LEFT, RIGHT, ASK = range(6)
MOVES = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}


class Fake:
    """A square that moves over 6 x 8 pixels. The dream shows K in its red, the real frame does not; noise is
    the blue of the ground. Each call leaves a line in a file, which a test of another process can read."""
    names, choices = "noop up down left right ask".split(), [1, 2, 4, 8, 16]

    def __init__(self, log, fps=50, simulator=True, broken=None, names=names, pause=0, gate=None):
        self.names, self.pause, self.gate = names, pause, gate
        self.log, self.fps, self.simulator, self.broken = log, fps, simulator, broken
        self.steps, self.ground = 4, 0

    def note(self, *words):
        with open(self.log, "a") as f:
            print(*words, file=f)

    def picture(self, red):
        picture = np.zeros((6, 8, 3), np.uint8)
        picture[..., 2] = self.ground
        picture[tuple(self.place)] = red, 200, 50
        return picture

    @property
    def frame(self):
        return self.picture(10 * self.steps)

    @property
    def real(self):
        return self.picture(250) if self.simulator else None

    def reset(self, seed, start="test"):
        self.note("reset", seed, start)
        self.place = [seed % 6, 0 if start == "test" else 7]
        return self.frame

    def act(self, action):
        if action == self.broken:
            raise RuntimeError("the model broke")
        self.note("act", action)
        if self.gate is not None:
            os.read(self.gate, 1)
        down, right = MOVES.get(action, (0, 0))
        y, x = self.place
        time.sleep(self.pause)  # two calls at once would lose one
        self.place = [(y + down) % 6, (x + right) % 8]

    def noise(self, seed):
        self.note("noise", seed)
        self.ground = 40 + seed

    def save(self):
        return list(self.place)

    def load(self, state):
        self.place = list(state)

    def export(self, folder):
        folder.mkdir(parents=True)
        (folder / "play.npz").write_bytes(b"")
        return [folder / "play.npz"]

    def calls(self, name):
        """The arguments of each call so far."""
        lines = [line.split() for line in open(self.log)] if os.path.exists(self.log) else []
        return [words[1:] for words in lines if words[0] == name]


def wait_for(condition, what="", seconds=30):
    """The first true value of condition()."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    pytest.fail(f"{what or condition}: not within {seconds} s")


def one_line(capsys, *parts):
    """stderr is one clear line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(p in error for p in parts), error


# ---------------------------------------------------------------- pictures and keys
def test_half_blocks_are_exact():
    """Two by two pixels are one line of two cells; what did not change is not written again."""
    pixels = np.array([[[1, 2, 3], [1, 2, 3]], [[4, 5, 6], [7, 8, 9]]], np.uint8)
    first = sample.cells(pixels, 1, 24)
    assert first.shape == (1, 2, 2, 3)
    assert sample.paint(first) == "\x1b[1;1H\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀\x1b[48;2;7;8;9m▀"
    assert sample.paint(first, first) == ""
    pixels[1, 1] = 0
    assert sample.paint(sample.cells(pixels, 1, 24), first) == "\x1b[1;2H\x1b[38;2;1;2;3m\x1b[48;2;0;0;0m▀"
    odd = sample.cells(np.full((3, 1, 3), 9, np.uint8), 1, 24)  # a last line of which half is black
    assert odd.tolist() == [[[[9] * 3, [9] * 3]], [[[9] * 3, [0] * 3]]]


def test_enlargement():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    big = sample.cells(pixels, 3, 24).transpose(0, 2, 1, 3).reshape(6, 6, 3)  # the pixels, put back
    assert all((big[y, x] == pixels[y // 3, x // 3]).all() for y in range(6) for x in range(6))
    # 32 x 32 takes 16 lines and one of text; twice as large, 32 lines and two of text
    windows = [(32, 17), (31, 17), (32, 16), (64, 33), (64, 34), (300, 52)]
    assert [sample.zoom_of(*window, 32, 32) for window in windows] == [1, 0, 0, 1, 2, 3]


def test_256_colours():
    """Colours of the cube and the greys are themselves; others go to the nearest."""
    known = {(0, 0, 0): 16, (255, 255, 255): 231, (255, 0, 0): 196, (95, 135, 175): 67, (8, 8, 8): 232,
             (238, 238, 238): 255, (250, 4, 3): 196, (120, 120, 122): 243}
    got = sample.cells(np.array([list(known)], np.uint8), 1, 256)
    assert got[0, :, 0, 0].tolist() == list(known.values())
    assert sample.paint(got[:, :1]) == "\x1b[1;1H\x1b[38;5;16m\x1b[48;5;16m▀"  # the lower half is padding
    rng = np.random.default_rng(0)
    for pixel in rng.integers(0, 256, (50, 3)):
        distance = np.abs(sample.PALETTE - pixel)
        near = sample.cells(pixel[None, None].astype(np.uint8), 1, 256)[0, 0, 0, 0] - 16
        assert (distance[near] ** 2).sum() == (distance ** 2).sum(-1).min()


def test_keys_are_decoded():
    """Arrows in both modes of a terminal, other sequences in one piece, sequences that come in two reads."""
    assert sample.decode("w\x1b[A\x1bOBq") == (["w", "up", "down", "q"], "")
    assert sample.decode("\x1b[1;5C\x1b[3~x") == (["\x1b[1;5C", "\x1b[3~", "x"], "")  # no "C", no "3"
    assert sample.decode("\x1bq") == (["\x1b", "q"], "")
    for text in ("\x1b[C", "\x1bOD", "\x1b[1;5C"):
        whole = sample.decode(text)[0]
        for cut in range(1, len(text)):
            keys, rest = sample.decode("a" + text[:cut])
            assert (keys, rest) == (["a"], text[:cut])
            assert sample.decode(rest + text[cut:] + "b")[0] == [*whole, "b"]


def test_keys_of_actions():
    keys = sample.action_keys(Fake.names)
    assert [keys[k] for k in "wasd n05"] == [UP, LEFT, DOWN, RIGHT, ASK, NOOP, 0, 5] and keys["left"] == LEFT
    assert not set(keys) & {*sample.COMMANDS, "l", "q", "[", "]"}
    keys = sample.action_keys([str(i) for i in range(17)])
    assert [keys[k] for k in "09AG n"] == [0, 9, 10, 16, 16, 0] and "w" not in keys and "H" not in keys
    keys = sample.action_keys(["noop", "move_left", "move_up", "do", "sleep"])
    assert [keys[k] for k in "aw n"] + [keys["left"]] == [1, 2, 3, 0, 1]


# ---------------------------------------------------------------- in a terminal
class Terminal:
    """A game in a child process on a pseudo-terminal, and what the terminal shows: cells[line, column] is
    (character, foreground, background)."""

    def __init__(self, run, lines=24, columns=80, shell=False, **environment):
        self.fd, self.slave = pty.openpty()
        self.resize(lines, columns)
        self.before = termios.tcgetattr(self.slave)
        back, self.pipe = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            code = 1
            try:
                os.login_tty(self.slave)
                os.close(self.fd)
                for name in ("NO_COLOR", "COLORTERM"):
                    os.environ.pop(name, None)
                os.environ.update(dict(TERM="xterm", COLORTERM="truecolor") | environment)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                if shell:
                    job_control(back)
                run()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                with contextlib.suppress(OSError):  # a terminal that is gone
                    sys.stdout.flush()
                os._exit(code)
        os.close(back)
        self.bytes, self.cut, self.decoder = b"", "", codecs.getincrementaldecoder("utf-8")()
        self.cells, self.colour, self.code = {}, [None, None], None
        self.at, self.second, self.cursor = [0, 0], False, True

    def resize(self, lines, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text):
        os.write(self.fd, text.encode())

    def read(self):
        """Take in what was written, and come back even from a flood."""
        for _ in range(20):
            if not select.select([self.fd], [], [], 0)[0]:
                break
            new = os.read(self.fd, 65536)
            self.bytes += new
            text = self.cut + self.decoder.decode(new)
            whole = re.sub(r"\x1b(\[\??[\d;]*)?$", "", text)  # a read may end inside a sequence
            self.cut = text[len(whole):]
            self.feed(whole)

    def feed(self, text):
        tokens = re.findall(r"(\x1b\[(\??)([\d;]*)([A-Za-z])|[^\x1b])", text, re.S)
        for whole, private, numbers, kind in tokens:
            n = [int(x) for x in numbers.split(";") if x]
            if kind == "H":
                self.at = [x - 1 for x in n or (1, 1)]
            elif kind == "m":
                ground = {38: [0], 48: [1]}.get(n[0] if n else 0, [0, 1])
                for i in ground:
                    self.colour[i] = tuple(n[2:]) or None
            elif kind in ("J", "K"):
                y, x = self.at
                gone = {"J": lambda p: n == [2] or p >= (y, x), "K": lambda p: p[0] == y and p[1] >= x}[kind]
                self.cells = {p: cell for p, cell in self.cells.items() if not gone(p)}
            elif private:
                if n == [1049]:
                    self.second = kind == "h"
                    self.cells = {}
                elif n == [25]:
                    self.cursor = kind == "h"
            elif whole == "\r":
                self.at[1] = 0
            elif whole == "\n":
                self.at[0] += 1
            else:
                self.cells[tuple(self.at)] = (whole, *self.colour)
                self.at[1] += 1

    def text(self):
        """All that is readable, line by line."""
        self.read()
        rows = {}
        for (y, x), (character, *_) in sorted(self.cells.items()):
            rows.setdefault(y, {})[x] = character
        return "\n".join("".join(row.values()) for row in rows.values()).replace("▀", "")

    def picture(self, height=6, width=8, zoom=1):
        """The pixels that the half blocks show, or None where one is missing."""
        self.read()
        picture = np.zeros((height, width, 3), int)
        for y in range(height * zoom):
            for x in range(width * zoom):
                character, *pair = self.cells.get((y // 2, x), " ")
                if character != "▀" or None in pair:
                    return None
                picture[y // zoom, x // zoom] = pair[y % 2]
        return picture

    def shows(self, expected, **how):
        wait_for(lambda: np.array_equal(self.picture(**how), expected), "the picture")

    def says(self, text):
        wait_for(lambda: text in " ".join(self.text().split()), text)

    def end(self):
        """The exit code, or the negative signal, of the child; the terminal is as it was before."""
        wait_for(lambda: self.read() or self.ended(), "the end")
        assert self.is_restored()
        return self.code

    def ended(self):
        if self.code is None:
            child, status = os.waitpid(self.child, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if child else None
        return self.code is not None

    def close(self):
        for fd in (self.fd, self.slave, self.pipe):
            with contextlib.suppress(OSError):
                os.close(fd)
        if not self.ended():
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)

    def is_restored(self):
        self.read()
        return termios.tcgetattr(self.slave) == self.before and self.cursor and not self.second


def job_control(back):
    """Turns this process, the leader of a session, into a shell: the caller goes on in a child that can be
    suspended; after a stop, a byte on the pipe is `fg`."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        return
    while True:
        status = os.waitpid(child, os.WUNTRACED)[1]
        os.tcsetpgrp(0, os.getpid())
        if not os.WIFSTOPPED(status):
            os._exit(os.waitstatus_to_exitcode(status) % 256)
        print("[1]+ Stopped", flush=True)
        os.read(back, 1)
        os.tcsetpgrp(0, child)
        os.kill(child, signal.SIGCONT)


@pytest.fixture
def start(tmp_path):
    """start(fake={}, seed=1, lines=24, columns=80, shell=False, **environment): a running game."""
    terminals = []

    def run(fake={}, seed=1, **how):
        dream = Fake(tmp_path / "log.txt", **fake)
        play = lambda: sample.play(sample.Game(dream, seed, tmp_path / "played"))
        terminals.append(Terminal(play, **how))
        return terminals[-1], dream
    yield run
    for terminal in terminals:
        terminal.close()


def square(y, x, red=40, ground=0):
    picture = np.zeros((6, 8, 3), int)
    picture[..., 2] = ground
    picture[y, x] = red, 200, 50
    return picture


def test_a_game_in_the_terminal(start, tmp_path):
    """Each key does what it says; the picture on the screen is the dream's frame, pixel for pixel."""
    terminal, dream = start(columns=20, lines=24)  # 20 columns: twice as large
    how = dict(zoom=2)
    terminal.shows(square(1, 0), **how)
    assert terminal.second and not terminal.cursor and not terminal.is_restored()
    for keys, place in (("\x1b[C", (1, 1)), ("d", (1, 2)), ("\x1bOB", (2, 2)), ("w", (1, 2)), ("4", (1, 3)),
                        ("\x1b[C", (1, 4))):
        terminal.type(keys)
        terminal.shows(square(*place), **how)
    terminal.type(" ")
    wait_for(lambda: [str(ASK)] in dream.calls("act"))
    assert [a for [a] in dream.calls("act") if a != "0"] == ["4", "4", "2", "1", "4", "4", "5"]
    terminal.type("]")
    terminal.shows(square(1, 4, red=80), **how)
    terminal.type("[[[[[[")
    terminal.shows(square(1, 4, red=10), **how)
    terminal.type("b")
    terminal.says("bookmark set")
    terminal.type("d")
    terminal.shows(square(1, 5, red=10), **how)
    terminal.type("u")
    terminal.shows(square(1, 4, red=10), **how)
    terminal.type("x")
    terminal.shows(square(1, 4, red=10, ground=41), **how)
    terminal.type("i")
    terminal.shows(square(2, 7, red=10, ground=41), **how)
    terminal.type("r")
    terminal.shows(square(3, 0, red=10, ground=41), **how)
    assert dream.calls("reset") == [["1", "test"], ["2", "invented"], ["3", "test"]]
    terminal.type("ee")
    wait_for(lambda: (tmp_path / "played" / "001" / "play.npz").exists())
    terminal.type("q")
    assert terminal.end() == 0


def test_the_last_key_of_a_frame_counts_once(start):
    """Held keys repeat: they do not pile up, and without a key there is noop. Here a frame lasts until
    the test lets go of it: what was typed meanwhile belongs to the next one."""
    out, go = os.pipe()
    terminal, dream = start(fake=dict(gate=out))
    # an arrow may come in two frames; the end of an Escape of long ago does not come: [ is K
    typed = "", "aaaaaaasd", "", "\x1b", "[A", "\x1b", "", "["
    for frame, keys in enumerate(typed):
        terminal.type(keys)
        os.write(go, b"." * (frame > 0))
        wait_for(lambda: len(dream.calls("act")) == frame + 1)
    assert [int(a) for [a] in dream.calls("act")] == [NOOP, RIGHT, NOOP, NOOP, UP, NOOP, NOOP, NOOP]
    os.write(go, b".")
    terminal.shows(square(0, 1, red=20), zoom=7)
    terminal.type("q")
    os.write(go, b"." * 9)
    assert terminal.end() == 0
    os.close(out)
    os.close(go)


def test_a_key_does_not_end_a_frame(monkeypatch):
    """Keys are collected up to the end of the frame, and what is late comes at once."""
    outside, inside = pty.openpty()
    monkeypatch.setattr(sample.sys, "stdin", SimpleNamespace(fileno=lambda: inside))
    monkeypatch.setattr(sample.sys, "stdout", SimpleNamespace(fileno=lambda: inside))
    screen = sample.Screen(24)
    os.write(outside, b"nd\n")
    begin = time.perf_counter()
    assert screen.keys(begin + 0.2) == ["n", "d", "\n"] and time.perf_counter() >= begin + 0.2
    os.write(outside, b"q\n")
    assert screen.keys(begin) == ["q", "\n"]
    os.close(outside)
    os.close(inside)


def test_the_clock(start):
    """The game keeps the pace of the recording, whatever is typed; what changes little writes little."""
    terminal, dream = start(fake=dict(fps=20), columns=200, lines=60)
    terminal.shows(square(1, 0), zoom=19)
    begin, before, size = time.monotonic(), len(dream.calls("act")), len(terminal.bytes)
    for _ in range(40):
        terminal.type("n")
        time.sleep(0.025)
    terminal.read()
    frames = len(dream.calls("act")) - before
    assert 0 < frames / (time.monotonic() - begin) < 21
    assert (len(terminal.bytes) - size) / (frames + 1) < 400
    assert re.search(r"\b\d+ fps, \d+ ms, K 4, \d\d\.\d dB", terminal.text())
    terminal.type("\x03")  # Ctrl-C
    assert terminal.end() == 0


def test_real_beside_dream(start):
    """l shows the real frame on the left where both fit; 17 columns they need."""
    terminal, _ = start(columns=17, lines=24)
    terminal.shows(square(1, 0), zoom=2)
    terminal.type("l")
    wide = np.concatenate([square(1, 0, red=250), np.zeros((6, 1, 3), int), square(1, 0)], 1)
    terminal.shows(wide, width=17)
    terminal.resize(24, 16)
    terminal.shows(square(1, 0), zoom=2)
    terminal.says("needs 17")
    terminal.type("lq")
    assert terminal.end() == 0
    terminal, _ = start(fake=dict(simulator=False))
    terminal.type("ld")
    terminal.says("K 4 |")  # no PSNR, and no picture to show beside
    terminal.type("q")
    assert terminal.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_signals_restore_the_terminal(start, number):
    terminal, _ = start()
    terminal.shows(square(1, 0), zoom=7)
    os.kill(terminal.child, number)
    assert terminal.end() == (0 if number == signal.SIGINT else 128 + number)


def test_a_fault_restores_the_terminal(start):
    """An exception in the model comes through, on the first screen."""
    terminal, _ = start(fake=dict(broken=ASK))
    terminal.shows(square(1, 0), zoom=7)
    terminal.type(" ")
    assert terminal.end() == 1 and "RuntimeError: the model broke" in terminal.text()


def test_suspend_and_continue(start):
    """Ctrl-Z gives the terminal back as it was; fg draws everything again and plays on."""
    terminal, dream = start(shell=True)
    terminal.shows(square(1, 0), zoom=7)
    for column in (1, 2):  # twice: the handler is back in its place
        terminal.type("\x1a")
        terminal.says("Stopped")
        assert terminal.is_restored()
        asleep = len(dream.calls("act"))
        time.sleep(0.1)
        assert len(dream.calls("act")) == asleep
        os.write(terminal.pipe, b".")
        wait_for(lambda: not terminal.is_restored())
        terminal.type("d")
        terminal.shows(square(1, column), zoom=7)
    terminal.type("q")
    assert terminal.end() == 0


def test_a_terminal_that_closes(start, monkeypatch):
    """Hung up, and the signal does not come: the end of the input ends the game."""
    monkeypatch.setattr(sample, "leave", lambda *rest: None)
    terminal, dream = start()
    terminal.shows(square(1, 0), zoom=7)
    os.close(terminal.slave)
    os.close(terminal.fd)
    wait_for(terminal.ended)
    assert terminal.code == 129


def test_a_small_window_waits(start):
    """Too small: a line that says what is needed, and no frame is played unseen; larger again, it goes on."""
    terminal, dream = start(columns=40, lines=3)
    terminal.says("window 40 x 3, needs 8 x 4")
    played = len(dream.calls("act"))
    time.sleep(0.1)
    assert len(dream.calls("act")) == played == 0
    terminal.resize(4, 8)
    terminal.shows(square(1, 0))
    terminal.resize(4, 5)
    terminal.says("wind")
    terminal.resize(0, 0)  # a serial line that does not know: 80 x 24
    terminal.shows(square(1, 0), zoom=7)
    terminal.type("q")
    assert terminal.end() == 0


def test_colours(start, capsys):
    """24 bit where the terminal says so, 256 where it says that, and a line otherwise."""
    terminal, _ = start(TERM="xterm-256color", COLORTERM="")
    wait_for(lambda: terminal.read() or b"\x1b[38;5;16m" in terminal.bytes)
    terminal.type("q")
    assert terminal.end() == 0 and b";2;" not in terminal.bytes
    for environment, part in ((dict(NO_COLOR="1"), "NO_COLOR is set"), (dict(TERM="dumb"), "TERM is dumb"),
                              (dict(COLORTERM=""), "TERM=xterm has too few colours")):
        terminal, dream = start(**environment)
        assert terminal.end() == 2
        text = terminal.text()
        assert text.startswith("error: " + part) and text.count("\n") == 0 and "--serve" in text
    assert sample.colours_of(dict(TERM="xterm", NO_COLOR="", COLORTERM="24bit")) == 24  # empty is not set
    with pytest.raises(SystemExit):
        sample.play(SimpleNamespace())  # pytest's stdin is no terminal
    one_line(capsys, "--play needs a terminal", "--serve")


# ---------------------------------------------------------------- in a browser
@pytest.fixture
def serve(tmp_path):
    """serve(fake={}, host="127.0.0.1"): a served game in a child process, with port, child, dream and what it
    said."""
    children = []

    def run(fake={}, host="127.0.0.1", port=0):
        dream, said = Fake(tmp_path / "log.txt", **fake), tmp_path / f"said_{len(children)}.txt"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = open(said, "w", buffering=1)
                sample.serve(sample.Game(dream, 1, tmp_path / "played"), host, port)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                os._exit(code)
        children.append(child)
        line = r"play at http://\S+:(\d+) |error"
        found = wait_for(lambda: said.exists() and re.search(line, said.read_text()))
        return SimpleNamespace(port=found[1] and int(found[1]), child=child, dream=dream, said=said.read_text)
    yield run
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def ask(port, body={}, method="POST", path="/step", headers={}, host="127.0.0.1"):
    """An answer: its status, headers and bytes."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data if method == "POST" else None, headers)
    answer = connection.getresponse()
    found = SimpleNamespace(status=answer.status, headers=answer.headers, data=answer.read())
    connection.close()
    if "X-State" in found.headers:
        found.state = json.loads(found.headers["X-State"])
    return found


def test_step(serve, tmp_path):
    """The bytes are the dream's frame, then the real one; the numbers are in X-State."""
    game = serve()
    answer = ask(game.port)  # {}: look, do nothing
    assert (answer.status, answer.data) == (200, square(1, 0).astype("u1").tobytes()
                                            + square(1, 0, red=250).astype("u1").tobytes())
    mse = 210 ** 2 / (6 * 8 * 3) / 255 ** 2
    assert answer.state.pop("psnr") == pytest.approx(-10 * np.log10(mse), abs=1e-4)
    assert answer.state == dict(height=6, width=8, real=True, steps=4, seed=1, ms=0,
                                message="test episode, seed 1")
    answer = ask(game.port, dict(action=RIGHT))
    assert answer.data[:144] == square(1, 1).astype("u1").tobytes() and answer.state["ms"] > 0
    answer = ask(game.port, dict(do="steps", value=8, action=DOWN))
    assert answer.data[:144] == square(2, 1, red=80).astype("u1").tobytes() and answer.state["steps"] == 8
    for do, value, seed, place in (("test", 5, 5, (5, 0)), ("test", None, 6, (0, 0)),
                                   ("invented", 3, 3, (3, 7))):
        answer = ask(game.port, dict(do=do, value=value))
        assert answer.data[:144] == square(*place, red=80).astype("u1").tobytes()
        assert answer.state["seed"] == seed
    assert ask(game.port, dict(do="back")).state["message"] == "no bookmark yet"
    ask(game.port, dict(do="bookmark"))
    assert ask(game.port, dict(action=UP)).data != answer.data == ask(game.port, dict(do="back")).data
    answer = ask(game.port, dict(do="noise"))
    assert answer.data[:144] == square(3, 7, red=80, ground=41).astype("u1").tobytes()
    assert ask(game.port, dict(do="export")).state["message"] == f"wrote {tmp_path / 'played' / '000'}"
    (tmp_path / "played" / "001").mkdir()
    ask(game.port, dict(do="export"))
    assert (tmp_path / "played" / "002" / "play.npz").exists()
    assert game.dream.calls("act") == [["4"], ["2"], ["1"]]  # and no other


def test_one_game_for_all(serve):
    """Requests at the same time are played one after the other, on one game."""
    game = serve(fake=dict(pause=0.1))
    connections = [http.client.HTTPConnection("127.0.0.1", game.port, timeout=10) for _ in range(7)]
    for connection in connections:
        connection.request("POST", "/step", b'{"action": 4}')
    assert {len(connection.getresponse().read()) for connection in connections} == {288}
    assert len(game.dream.calls("act")) == 7
    assert ask(game.port).data[:144] == square(1, 7).astype("u1").tobytes()


def test_no_simulator(serve):
    answer = ask(serve(fake=dict(simulator=False)).port)
    assert len(answer.data) == 144 and answer.state["real"] is False and answer.state["psnr"] is None


def test_the_page(serve):
    """One page, with all that it needs, and the names of a recording as text only."""
    game = serve()
    page = ask(game.port, method="GET", path="/?x=1")
    text = page.data.decode()
    assert page.status == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert json.loads(re.search(r"const C = (\{.*?\}), \$ =", text)[1])["names"] == Fake.names
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://""", text)
    game = serve(fake=dict(names=["</script><script>", *Fake.names]))
    assert ask(game.port, method="GET", path="/").data.count(b"</script>") == 1


BAD = [
    (b"", "JSON"), (b"no", "JSON"), (b"\xff\xfe", "JSON"), (b"[" * 999, "JSON"),
    (b" " * 1001, "at most 1000"), (b"[]", "object"), (b"7", "object"), ({"actions": 1}, "action, do, value"),
    ({"action": 6}, "0 to 5"), ({"action": -1}, "0 to 5"), ({"action": "up"}, "0 to 5"),
    ({"action": True}, "0 to 5"), ({"action": 1.0}, "0 to 5"), ({"action": [0]}, "0 to 5"),
    (b'{"action": NaN}', "0 to 5"), ({"do": "quit"}, "one of test"), ({"do": ["test"]}, "one of test"),
    ({"do": 1}, "one of test"), ({"do": "steps", "value": 3}, "1, 2, 4, 8, 16"),
    ({"do": "steps"}, "1, 2, 4"), ({"do": "steps", "value": []}, "K"), ({"do": "steps", "value": True}, "K"),
    ({"do": "test", "value": -1}, "seed"), ({"do": "test", "value": 2**31}, "seed"),
    ({"do": "test", "value": "x"}, "seed"),
]


def test_bad_requests_are_one_line(serve):
    game = serve()

    def refused(answer, status, part):
        assert answer.status == status and answer.headers["Content-Type"].startswith("text/plain")
        assert answer.data.count(b"\n") == 1 and part in answer.data.decode(), answer.data
    for body, part in BAD:
        refused(ask(game.port, body), 400, part)
    refused(ask(game.port, headers={"Content-Length": "-3"}), 400, "Content-Length")
    for method, path in (("GET", "/favicon.ico"), ("POST", "/"), ("GET", "/step"), ("GET", "/../sample.py")):
        refused(ask(game.port, method=method, path=path), 404, "GET / and POST /step")
    refused(ask(game.port, method="DELETE"), 501, "DELETE")
    for raw in (b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00\xff\r\n\r\n",
                b"POST /step HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", game.port), 10) as connection:
            connection.sendall(raw)
            lines = connection.makefile("rb").read()
            assert b"<" not in lines and lines.count(b"\n") < 12
    with socket.create_connection(("127.0.0.1", game.port)) as connection:  # one that leaves in the middle
        connection.sendall(b"POST /step HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(game.port).data == ask(game.port, dict(do="test", value=1)).data  # nothing had happened
    assert game.dream.calls("act") == [] and "Traceback" not in game.said()


def test_pages_from_elsewhere_cannot_play(serve):
    """DNS rebinding: a name of their own that leads here. And requests from a page of another origin."""
    game = serve()
    good = [f"127.0.0.1:{game.port}", "localhost", "LOCALHOST:9000", "[::1]:80"]  # a tunnel has its own port
    bad = [f"evil.example:{game.port}", "127.0.0.1.evil.example", "", "[", "192.0.2.1", "a b",
           "localhost@evil.example"]
    assert [ask(game.port, headers={"Host": host}).status for host in good + bad] == [200] * 4 + [403] * 7
    assert ask(game.port, method="GET", path="/", headers={"Host": bad[0]}).status == 403
    for origin, status in ((f"http://127.0.0.1:{game.port}", 200), ("http://evil.example", 403),
                           ("null", 403), ("http://127.0.0.1:1", 403)):
        assert ask(game.port, headers={"Origin": origin}).status == status
    assert "warning" not in game.said()


def test_open_to_the_network(serve):
    """With --host 0.0.0.0: a warning, and any address is a good name, but a foreign name is not."""
    game = serve(host="0.0.0.0")
    assert re.match(r"warning: .*0\.0\.0\.0.*\nplay at http://0\.0\.0\.0:\d+ ", game.said())
    hosts = ["192.0.2.1:8000", "localhost", socket.gethostname(), "evil.example"]
    assert [ask(game.port, headers={"Host": host}).status for host in hosts] == [200] * 3 + [403]


def test_ports(serve, capsys):
    """A port in use, one that cannot be, a host that is not ours: one line each."""
    game = serve()
    for host, port, part in (("127.0.0.1", game.port, f"port {game.port} is in use"),
                             ("127.0.0.1", 70000, "--port 70000"),
                             ("192.0.2.1", 0, "cannot serve on 192.0.2.1"),
                             ("no such", 0, "cannot serve on no such")):
        with pytest.raises(SystemExit) as end:
            sample.serve(SimpleNamespace(), host, port)
        assert end.value.code == 2
        one_line(capsys, part)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_server(serve, number):
    """At once, with a browser still connected; a new one has the port again."""
    game = serve()
    with socket.create_connection(("127.0.0.1", game.port)):
        ask(game.port)
        os.kill(game.child, number)
        _, status = wait_for(lambda: (w := os.waitpid(game.child, os.WNOHANG))[0] and w)
    code = os.waitstatus_to_exitcode(status)
    assert code == (143 if number == signal.SIGTERM else 0)
    assert game.said().endswith("stopped\n") and "Traceback" not in game.said()
    assert serve(port=game.port).port == game.port


def test_a_fault_of_the_model_is_one_line_in_the_browser(serve):
    """The traceback is for the terminal; the server goes on."""
    game = serve(fake=dict(broken=ASK))
    answer = ask(game.port, dict(action=ASK))
    assert (answer.status, answer.data.count(b"\n")) == (500, 1) and b"RuntimeError" in answer.data
    assert "RuntimeError: the model broke" in game.said() and ask(game.port, dict(action=UP)).status == 200


class Browser:
    """A headless Chromium behind chromedriver: the few commands of the W3C's WebDriver that we need."""

    def __init__(self, folder):
        self.folder = folder
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        found = (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout)
        self.base = f"http://127.0.0.1:{next(port[1] for port in found if port)}/session"
        flags = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
                 "disable-component-update disable-sync window-size=1100,900").split()
        options = dict(args=[f"--{flag}" for flag in flags] + [f"--user-data-dir={folder / 'profile'}"])
        session = self.call("", capabilities=dict(alwaysMatch={
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}))
        self.base += "/" + session["sessionId"]

    def call(self, path, method="POST", **values):
        body = json.dumps(values).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"},
                                         method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, code, *values):
        return self.call("/execute/sync", script=code, args=values)

    def keys(self, *actions):
        """keys(("keyDown", "w"), ("pause", 100)): what a person does on the keyboard."""
        steps = [dict(type=kind, **(dict(duration=value) if kind == "pause" else dict(value=value)))
                 for kind, value in actions]
        self.call("/actions", actions=[dict(type="key", id="keyboard", actions=steps)])

    def tap(self, key):
        self.keys(("keyDown", key), ("keyUp", key))

    def mouse(self, selector, *kinds):
        """The pointer on an element, and then pointerDown, pointerUp."""
        element = self.call("/element", using="css selector", value=selector)
        steps = [dict(type="pointerMove", origin=element, x=0, y=0), *(dict(type=k, button=0) for k in kinds)]
        self.call("/actions", actions=[dict(type="pointer", id="mouse", actions=steps)])

    def pixels(self, name):
        """What a canvas shows, (H, W, 3)."""
        height, width, data = self.run("""const c = document.getElementById(arguments[0]);
            const image = c.getContext("2d").getImageData(0, 0, c.width, c.height);
            return [c.height, c.width, [...image.data]]""", name)
        return np.array(data).reshape(height, width, 4)[..., :3]

    def shows(self, expected, name="dream"):
        wait_for(lambda: np.array_equal(self.pixels(name), expected), "the canvas")

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def slide(self, name, value):
        """A slider, as a person moves it."""
        self.run("""const e = document.getElementById(arguments[0]); e.value = arguments[1];
            for (const kind of ["input", "change"]) e.dispatchEvent(new Event(kind, {bubbles: true}))""",
                 name, value)

    def screenshot(self, name):
        (self.folder / name).write_bytes(base64.b64decode(self.call("/screenshot", "GET")))

    def close(self):
        with contextlib.suppress(OSError):
            self.call("", "DELETE")
        self.driver.terminate()
        self.driver.wait(20)


@pytest.mark.skipif(not (shutil.which("chromedriver") and shutil.which("chromium")),
                    reason="no chromium and chromedriver on the path")
def test_in_a_browser(serve, tmp_path):
    """Keys held and tapped, buttons, sliders, seeds, commands in a browser: the canvas shows the frames."""
    game = serve(fake=dict(fps=10))
    played = lambda: [int(a) for [a] in game.dream.calls("act")]
    with contextlib.closing(Browser(tmp_path)) as browser:
        browser.call("/url", url=f"http://127.0.0.1:{game.port}/")
        browser.shows(square(1, 0))
        browser.shows(square(1, 0, red=250), "real")
        begin, before = time.monotonic(), len(played())
        time.sleep(1)
        assert 0 < (len(played()) - before) / (time.monotonic() - begin) < 12 and set(played()) == {NOOP}
        assert 0 < float(browser.text("rate")) < 12 and float(browser.text("psnr")) > 10
        browser.slide("fps", 2)
        for tap, place in (("\uE014", (1, 1)), ("d", (1, 2)), ("\uE015", (2, 2)), ("w", (1, 2)),
                           ("A", (1, 1))):
            browser.tap(tap)  # shorter than a frame, and it counts for one
            browser.shows(square(*place))
        browser.tap(" ")
        wait_for(lambda: ASK in played())
        assert [a for a in played() if a] == [RIGHT, RIGHT, DOWN, UP, LEFT, ASK]
        browser.slide("fps", 20)
        before = len(played())
        browser.keys(("keyDown", "\uE014"), ("pause", 900), ("keyDown", "s"), ("pause", 600), ("keyUp", "s"),
                     ("pause", 600), ("keyUp", "\uE014"))
        wait_for(lambda: played()[-3:] == [NOOP] * 3)  # up is up
        runs = re.sub(r"(.)\1+", r"\1", "".join(map(str, played()[before:])))
        assert re.fullmatch("0?4240", runs), runs  # the last key that is down wins, then the one before again
        before = len(played())
        browser.mouse("#actions button:nth-child(3)", "pointerDown")
        wait_for(lambda: played()[-3:] == [DOWN] * 3)
        assert browser.run("return document.querySelectorAll('#actions .on').length") == 1
        browser.mouse("#actions button:nth-child(3)", "pointerUp")
        wait_for(lambda: played()[-3:] == [NOOP] * 3)

        browser.run("document.getElementById('seed').focus()")
        browser.run("document.getElementById('seed').value = ''")
        for key in "13\uE007":  # a number and Enter, not actions
            browser.tap(key)
        browser.shows(square(1, 0))
        assert game.dream.calls("reset")[1:] == [["13", "test"]] and set(played()[-3:]) == {NOOP}
        browser.tap("d")
        browser.shows(square(1, 1))
        browser.mouse("#reset", "pointerDown", "pointerUp")
        wait_for(lambda: len(game.dream.calls("reset")) == 3)
        browser.shows(square(1, 0))
        browser.slide("steps", 4)  # the fifth choice
        browser.shows(square(1, 0, red=160))
        assert browser.text("stepsnow") == "16"
        browser.tap("[")
        browser.shows(square(1, 0, red=80))
        browser.mouse("#commands button:nth-child(2)", "pointerDown", "pointerUp")  # invented start
        browser.shows(square(2, 7, red=80))
        for key, expected in (("b", square(2, 7, red=80)), ("a", square(2, 6, red=80)),
                              ("u", square(2, 7, red=80)), ("x", square(2, 7, red=80, ground=41)),
                              ("r", square(3, 0, red=80, ground=41))):
            browser.tap(key)
            browser.shows(expected)
        assert game.dream.calls("reset")[2:] == [["13", "test"], ["14", "invented"], ["15", "test"]]
        assert browser.run("return document.getElementById('seed').value") == "15"
        browser.tap("e")
        wait_for(lambda: browser.text("message").startswith("wrote "))
        browser.screenshot("page.png")
        assert "SEVERE" not in [entry["level"] for entry in browser.call("/se/log", type="browser")]
        os.kill(game.child, signal.SIGTERM)
        wait_for(lambda: "no answer" in browser.text("message"))


# ---------------------------------------------------------------- from the command line
def test_main(monkeypatch, capsys, tmp_path):
    """--play and --serve reach the players with the script's dream; a script without one is refused."""
    called = []
    script = SimpleNamespace(open_dream=lambda checkpoint, seed: Fake(tmp_path / "log.txt"))
    monkeypatch.setattr(sample, "load", lambda *rest: (script, dict(script="train_stl10")))
    monkeypatch.setattr(sample, "play", lambda game: called.append(("play", game.seed, game.folder)))
    monkeypatch.setattr(sample, "serve", lambda game, *where: called.append(("serve", game.seed, *where)))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--checkpoint", str(tmp_path / "last.pt"), *words])
        sample.main()
    run("--play", "--seed", "3")
    run("--serve")
    run("--serve", "--port", "81", "--host", "::1")
    assert called == [("play", 3, tmp_path / "played"), ("serve", 0, "127.0.0.1", 8000),
                      ("serve", 0, "::1", 81)]
    del script.open_dream
    for flag in ("--play", "--serve"):
        with pytest.raises(SystemExit) as end:
            run(flag)
        assert end.value.code == 2
        one_line(capsys, "made by train_stl10.py, which cannot be played")
    with pytest.raises(SystemExit):
        run("--play", "--serve")
