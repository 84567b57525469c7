"""
Draw samples from any checkpoint: it says which script made it, and with which settings.

    python sample.py --checkpoint runs/stl10/last.pt                    # a few of everything
    python sample.py --checkpoint runs/stl10/last.pt --prompt cat,ship --num-samples 8 --sampling-steps 50
    python sample.py --checkpoint runs/stl10/last.pt SOLVER=ddim ETA=1  # any setting of that script
    python sample.py --checkpoint runs/lm_stage3/last.pt --prompt "The with statement" TEMPERATURE=0.7
    python sample.py --checkpoint runs/voxel_d3pm/last.pt --prompt "tall oak tree" --size normal
    python sample.py --checkpoint runs/stl10/last.pt --full             # all diagnostics again, the same bits
    python sample.py --checkpoint runs/stl10/last.pt --export           # the EMA weights alone, to publish
    python sample.py --checkpoint runs/world_model/last.pt --play       # a world model, in the terminal
    python sample.py --checkpoint runs/world_model/last.pt --serve      # the same, as a page for the browser

The same seed gives the same sample here and in the run. What cannot work is one line and exit code 2.
"""

import argparse
import contextlib
import errno
import importlib.util
import ipaddress
import json
import os
import re
import select
import signal
import socket
import string
import sys
import textwrap
import threading
import time
import traceback
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np

try:
    import termios
    import tty
except ImportError:  # Windows
    import msvcrt
    termios = None

from common import fail, load_checkpoint, override, save_checkpoint, settings

SCRIPTS = ("train_voxel_d3pm", "train_stl10", "train_3d_rflow", "train_world_model", "train_lm")


def parse():
    parser = argparse.ArgumentParser(description="Draw samples from a checkpoint of any of the five scripts.",
                                     epilog="NAME=value after the flags overrides any setting of the script.")
    parser.add_argument("--checkpoint", required=True, type=Path,
                        help="last.pt, best.pt or epoch_NNNN.pt of a run folder")
    parser.add_argument("--prompt", default="",
                        help="class names, separated by commas (empty: every class); what a tree should be, "
                             "such as 'tall oak'; or how a text begins")
    parser.add_argument("--size", default="",
                        help="pixels a side, where the network can draw others; trees: small, normal, large")
    parser.add_argument("--num-samples", type=int, default=8, help="for each prompt")
    parser.add_argument("--sampling-steps", type=int, help="instead of the STEPS of the run")
    parser.add_argument("--guidance", type=float, help="instead of the GUIDANCE of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; default: samples/ beside the checkpoint")
    parser.add_argument("--full", action="store_true", help="redraw every metric and diagnostic of the run")
    parser.add_argument("--export", action="store_true", help="write the averaged weights alone to ema.pt")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--play", action="store_true", help="play a world model in the terminal")
    how.add_argument("--serve", action="store_true", help="play a world model in the browser")
    parser.add_argument("--host", default="127.0.0.1", help="of --serve; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=int, default=8000, help="of --serve; 0 takes a free one")
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    return parser.parse_args()


def load(path, overrides=()):
    """The script that made a checkpoint, as a module with the checkpoint's settings; and the checkpoint."""
    checkpoint = load_checkpoint(path)
    if checkpoint["script"] not in SCRIPTS:
        fail(f"{path} was made by {checkpoint['script']!r}, not by one of {', '.join(SCRIPTS)}")
    if importlib.util.find_spec(checkpoint["script"]) is None:
        fail(f"{path} was made by {checkpoint['script']}.py, which is not here")
    script = importlib.import_module(checkpoint["script"])  # definitions only: main() hides behind the guard
    unknown = sorted(checkpoint["settings"].keys() - settings(vars(script)).keys())
    if unknown:
        fail(f"{path} has settings this {checkpoint['script']}.py does not know ({', '.join(unknown)}): "
             "use the copy of the script in its run folder")
    vars(script).update(checkpoint["settings"])
    override(vars(script), overrides)
    return script, checkpoint


# ---------------------------------------------------------------- play
COMMANDS = dict(r="test", i="invented", b="bookmark", u="back", x="noise", e="export")  # key: command


class BadRequest(Exception):
    """What a request asks for does not exist."""


class Game:
    """What both front ends do to a dream (open_dream() of a script): one frame on, and the commands."""

    def __init__(self, dream, seed, folder):
        self.dream, self.folder = dream, folder
        self.bookmark, self.noises, self.ms = None, 0, 0.0
        self.do("test", seed)

    def act(self, action):
        """One frame on."""
        if type(action) is not int or not 0 <= action < len(self.dream.names):
            raise BadRequest(f"action {action!r}: a number from 0 to {len(self.dream.names) - 1}")
        start = time.perf_counter()
        self.dream.act(action)
        self.ms = 1000 * (time.perf_counter() - start)

    def do(self, command, value=None):
        """One of COMMANDS, or steps; value: a seed (None: the next one), or K."""
        dream = self.dream
        if command in ("test", "invented"):
            seed = (self.seed + 1) % 2**31 if value is None else value
            if type(seed) is not int or not 0 <= seed < 2**31:
                raise BadRequest(f"seed {seed!r}: a number from 0 to {2**31 - 1}")
            dream.reset(seed, command)
            self.seed = seed
            self.message = f"{'test episode' if command == 'test' else 'invented start'}, seed {seed}"
        elif command == "steps":
            if value not in dream.choices or type(value) is not int:
                raise BadRequest(f"K {value!r}: one of {', '.join(map(str, dream.choices))}")
            dream.steps = value
        elif command == "bookmark":
            self.bookmark, self.message = dream.save(), "bookmark set"
        elif command == "back":
            if self.bookmark is not None:
                dream.load(self.bookmark)
            self.message = "no bookmark yet" if self.bookmark is None else "back at the bookmark"
        elif command == "noise":
            self.noises += 1
            dream.noise(self.noises)
            self.message = f"new noise, number {self.noises}"
        elif command == "export":
            number = next(i for i in range(10**6) if not (self.folder / f"{i:03d}").exists())
            try:
                dream.export(self.folder / f"{number:03d}")
                self.message = f"wrote {self.folder / f'{number:03d}'}"
            except OSError as error:  # a full disk does not end a game
                self.message = f"not exported: {error}"
        else:
            raise BadRequest(f"do {command!r}: one of {', '.join([*COMMANDS.values(), 'steps'])}")

    def psnr(self):
        """Of the dream against the real frame, in dB, at most 60; None without a real frame."""
        if self.dream.real is None:
            return None
        mse = np.mean((np.asarray(self.dream.frame, np.float32) - self.dream.real) ** 2) / 255**2
        return float(-10 * np.log10(max(mse, 1e-6)))


def action_keys(names):
    """Key -> action: arrows and WASD (up or move_up), space for ask or do (or the last action), n for noop
    (or the first), and for all, named or not, 0-9 and A-Z."""
    place = {name.removeprefix("move_"): i for i, name in enumerate(names)}
    keys = dict(zip(string.digits + string.ascii_uppercase, range(len(names))))
    keys |= {" ": place.get("ask", place.get("do", len(names) - 1)), "n": place.get("noop", 0)}
    for name, letter in dict(up="w", left="a", down="s", right="d").items():
        if name in place:
            keys |= {name: place[name], letter: place[name]}
    return keys


def leave(number, frame):
    """A signal ends the program as sys.exit() does: what must be put back is put back."""
    sys.exit(128 + number)


# ---------------------------------------------------------------- play in a terminal
KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.S)
UNFINISHED = re.compile(r"\x1b(\[[0-?]*[ -/]*|O)?\Z")
ARROW = {start + end: name for start in ("\x1b[", "\x1bO") for end, name in
         zip("ABCD", ("up", "down", "right", "left"))}
LEVELS = (0, 95, 135, 175, 215, 255)
PALETTE = np.array([(r, g, b) for r in LEVELS for g in LEVELS for b in LEVELS]
                   + [(8 + 10 * i,) * 3 for i in range(24)], np.float32)  # colours 16 to 255 of the 256


def decode(text):
    """The keys in what was typed, and the rest: the start of an escape sequence that is still to come."""
    whole = UNFINISHED.sub("", text)
    return [ARROW.get(key, key) for key in KEY.findall(whole)], text[len(whole):]


def colours_of(environment):
    """24 (bit) or 256, by what the terminal says of itself."""
    term = environment.get("TERM", "")
    if environment.get("NO_COLOR") or term == "dumb":
        fail(("NO_COLOR is set" if environment.get("NO_COLOR") else "TERM is dumb")
             + ", and a picture needs colours: another terminal, or --serve for the browser")
    if environment.get("COLORTERM") in ("truecolor", "24bit") or os.name == "nt":
        return 24
    if "256color" in term:
        return 256
    fail(f"TERM={term} has too few colours: COLORTERM=truecolor if it has more, or --serve for the browser")


def zoom_of(columns, lines, width, height):
    """By how much a picture is enlarged in a window, with room for two lines of text; 0: no room at all."""
    if columns < width or lines < (height + 1) // 2 + 1:
        return 0
    return max(1, min(columns // width, 2 * (lines - 2) // height))


def cells(pixels, zoom, colours):
    """(H, W, 3) -> (lines, columns, 2, n): an upper and a lower pixel each, as RGB or as one of the 256."""
    if colours == 256:  # the nearest colour: |p|^2 - 2 p.x is smallest
        pixels = ((PALETTE ** 2).sum(-1) - 2 * (pixels @ PALETTE.T)).argmin(-1)[..., None] + 16
    pixels = pixels.repeat(zoom, 0).repeat(zoom, 1)
    black = 0 if colours == 24 else 16
    pixels = np.pad(pixels, ((0, len(pixels) % 2), (0, 0), (0, 0)), constant_values=black)
    return np.stack([pixels[::2], pixels[1::2]], 2)


def paint(new, old=None):
    """The escape sequences that turn the cells `old` on the screen (None: unknown) into the cells `new`."""
    changed = np.ones(new.shape[:2], bool) if old is None else (new != old).any((2, 3))
    text, place, colour = [], None, [None, None]
    kind = (2,) if new.shape[-1] == 3 else (5,)
    for (y, x), pair in zip(np.argwhere(changed).tolist(), new[changed].tolist()):
        if place != (y, x):
            text.append(f"\x1b[{y + 1};{x + 1}H")
        for ground, pixel in enumerate(pair):  # 38: foreground, the upper pixel; 48: background
            if pixel != colour[ground]:
                text.append(f"\x1b[{';'.join(map(str, (38 + 10 * ground, *kind, *pixel)))}m")
        text.append("\u2580")
        place, colour = (y, x + 1), pair
    return "".join(text)


class Screen:
    """The terminal while a game runs: keys at once and unseen, a second screen without a cursor. Every way
    out puts it back as it was: the end, an exception, a signal, Ctrl-Z."""

    def __init__(self, colours):
        self.colours, self.last, self.rest = colours, None, ""
        self.input, self.output = sys.stdin.fileno(), sys.stdout.fileno()
        self.before = termios and termios.tcgetattr(self.input)
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP")  # Windows has the first two
        self.handlers = {s: signal.getsignal(s) for s in (getattr(signal, n, None) for n in names) if s}

    def __enter__(self):
        for s in [*self.handlers][1:]:
            signal.signal(s, self.suspend if s.name == "SIGTSTP" else leave)
        self.open()
        return self

    def __exit__(self, *error):
        for s in self.handlers:  # a second one must not stop this
            signal.signal(s, signal.SIG_IGN)
        self.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def open(self):
        if termios:
            tty.setcbreak(self.input)
        else:
            os.system("")  # makes a Windows console read escape sequences
        self.last = None  # draw all of it
        self.write("\x1b[?1049h\x1b[?25l\x1b[2J")

    def close(self):
        self.write("\x1b[0m\x1b[?25h\x1b[?1049l")
        if termios:
            with contextlib.suppress(termios.error):  # a terminal that is gone
                termios.tcsetattr(self.input, termios.TCSAFLUSH, self.before)

    def suspend(self, number, frame):
        """Ctrl-Z: sleep as any program does, and come back."""
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # returns when the shell says fg
        signal.signal(number, self.suspend)
        self.open()

    def write(self, text):
        data = text.encode()
        with contextlib.suppress(OSError):  # a terminal that is gone: keys() ends the game
            while data:
                data = data[os.write(self.output, data):]

    def keys(self, until):
        """What is typed up to a time. A rest of the last call whose end did not come is dropped."""
        text, wait = self.rest, lambda: max(0, until - time.perf_counter())
        if not termios:  # Windows: not tested. An arrow is two characters
            time.sleep(wait())
            while msvcrt.kbhit():
                key = msvcrt.getwch()
                text += key if key not in "\0\xe0" else "\x1b[" + "ABDC"["HPKM".find(msvcrt.getwch())]
            return decode(text)[0]
        while select.select([self.input], [], [], wait())[0]:
            try:
                new = os.read(self.input, 1024)
            except OSError:
                new = b""
            if not new:
                sys.exit(128 + signal.SIGHUP)
            text += new.decode("latin-1")
        keys, rest = decode(text)
        self.rest = rest if rest != self.rest else ""
        return keys

    def size(self):
        """Columns and lines; a terminal that does not know says 0, and one that is gone nothing."""
        columns = lines = 0
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(self.output)
        return columns or 80, lines or 24

    def show(self, pixels, text):
        """A picture and the text below it, in one write. False, with a line that says so, where the window is
        too small."""
        height, width = pixels.shape[:2]
        columns, lines = self.size()
        zoom = zoom_of(columns, lines, width, height)
        if not zoom:
            self.last = None
            need = f"window {columns} x {lines}, needs {width} x {(height + 1) // 2 + 1}"
            self.write(f"\x1b[0m\x1b[2J\x1b[H{need[:columns - 1]}")
            return False
        new, place = cells(pixels, zoom, self.colours), (columns, lines, pixels.shape)
        old = self.last[1] if self.last and self.last[0] == place else None
        self.last = place, new
        below = textwrap.wrap(text, columns - 1)[:lines - len(new)]
        self.write(("\x1b[0m\x1b[2J" if old is None else "") + paint(new, old)
                   + f"\x1b[0m\x1b[{len(new) + 1};1H" + "\x1b[K\r\n".join(below) + "\x1b[J")
        return True


def play(game):
    """A game in the terminal, at the clock of its recording. A terminal says when a key goes down, never when
    it goes up: a key counts for one frame, and the last one of a frame wins."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fail("--play needs a terminal on both ends; --serve shows the same in a browser")
    dream, keys, times, beside = game.dream, action_keys(game.dream.names), deque(maxlen=20), False
    moves = "arrows/wasd" if "up" in keys else f"0-{min(9, len(dream.names) - 1)}"
    legend = (f"{moves} act, space {dream.names[keys[' ']]}, n {dream.names[keys['n']]}, l real, r restart, "
              "i invented start, b bookmark, u back, [ ] K, x noise, e export, q quit")
    with contextlib.suppress(KeyboardInterrupt), Screen(colours_of(os.environ)) as screen:
        due = time.perf_counter()
        while True:
            times.append(time.perf_counter())
            fps, psnr = (len(times) - 1) / max(times[-1] - times[0], 1e-3), game.psnr()
            text, picture = f"{fps:.0f} fps, {game.ms:.0f} ms, K {dream.steps}", np.asarray(dream.frame)
            if psnr is not None:
                text += f", {psnr:.1f} dB"
            if beside and dream.real is not None:
                both = np.concatenate([dream.real, np.zeros_like(picture[:, :1]), picture], 1)
                roomy = zoom_of(*screen.size(), both.shape[1], len(both)) > 0
                picture = both if roomy else picture
                text += " | real, dream" if roomy else f" | real needs {both.shape[1]} columns"
            fits = screen.show(picture, f"{text} | {game.message} | {legend}")
            due, action = max(due + 1 / dream.fps, time.perf_counter()), keys["n"]
            for key in screen.keys(due):
                if key == "q":
                    return
                elif key in keys:
                    action = keys[key]
                elif key == "l":
                    beside = not beside
                elif key in ("[", "]"):
                    near = int(np.argmin([abs(k - dream.steps) for k in dream.choices]))
                    near += 1 if key == "]" else -1
                    game.do("steps", dream.choices[min(max(near, 0), len(dream.choices) - 1)])
                elif key in COMMANDS:
                    game.do(COMMANDS[key])
            if fits:  # nobody sees a game in a window that is too small: it waits
                game.act(action)


# ---------------------------------------------------------------- play in a browser
class Handler(BaseHTTPRequestHandler):
    """GET / is the page. POST /step takes {"action": 3}, one frame on, or {"do": "steps", "value": 2}, a
    command, or both, or {}; the answer is the RGB bytes of the dream and then, where there is one, of the
    real frame; their size and the numbers are JSON in the header X-State. What cannot be is one line."""

    protocol_version = "HTTP/1.1"  # one connection for all frames
    wbufsize, disable_nagle_algorithm = -1, True  # one packet for an answer, at once
    timeout = 60

    def do_GET(self):
        if not self.refused("/"):
            dream = self.server.game.dream
            config = dict(names=dream.names, fps=dream.fps, choices=dream.choices,
                          keys=action_keys(dream.names), commands=COMMANDS)
            page = PAGE.replace("@CONFIG@", json.dumps(config).replace("<", "\\u003c"))
            self.answer(200, "text/html; charset=utf-8", page.encode())

    def do_POST(self):
        if self.refused("/step"):
            return
        length, game = self.headers.get("Content-Length", ""), self.server.game
        if not length.isdecimal() or int(length) > 1000:
            return self.send_error(400, "a request has a Content-Length of at most 1000")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return self.send_error(400, "a request is JSON")
        if not isinstance(asked, dict) or asked.keys() - {"action", "do", "value"}:
            return self.send_error(400, "a request is an object of action, do, value")
        try:
            with self.server.lock:
                if asked.get("do") is not None:
                    game.do(asked["do"], asked.get("value"))
                if asked.get("action") is not None:
                    game.act(asked["action"])
                dream, real = game.dream, game.dream.real is not None
                frames = [np.asarray(f, np.uint8) for f in (dream.frame, dream.real)[:1 + real]]
                height, width, _ = frames[0].shape
                state = dict(height=height, width=width, real=real, steps=dream.steps, seed=game.seed,
                             ms=round(game.ms, 2), psnr=game.psnr(), message=game.message)
        except BadRequest as error:
            return self.send_error(400, str(error))
        except Exception as error:  # a fault of the model: the player goes on, the terminal tells
            traceback.print_exc()
            return self.send_error(500, f"{type(error).__name__} in the model, see the terminal of sample.py")
        self.answer(200, "application/octet-stream", b"".join(f.tobytes() for f in frames),
                    {"X-State": json.dumps(state)})

    def refused(self, path):
        """True, and an answer, where a request is not for this game. A page from elsewhere must not play, be
        it under a name of its own that leads here (DNS rebinding) or from its own origin. The port may be
        another one: that of a tunnel."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            name = urlsplit("//" + host).hostname or ""
            known = name in ("localhost", "127.0.0.1", "::1", self.server.host.lower())
            if not known and not self.server.loopback:
                known = name == socket.gethostname().lower() or bool(ipaddress.ip_address(name))
            known = known and (origin is None or urlsplit(origin).netloc == host)
        except ValueError:
            known = False
        if not known:
            self.send_error(403, "this host or origin is not served here")
        elif urlsplit(self.path).path != path:
            self.send_error(404, "there is GET / and POST /step")
        else:
            return False
        return True

    def answer(self, code, kind, body, headers={}):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store",
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        self.close_connection = True  # its body may be unread
        message = message or self.responses[code][0]
        self.answer(code, "text/plain; charset=utf-8", f"{message}\n".encode(), {"Connection": "close"})

    def log_message(self, *rest):
        pass  # ten requests a second


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5, a sixth connection at a time may wait for a second

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that left is no news
            super().handle_error(request, address)


def serve(game, host, port):
    """A game as one page, until Ctrl-C. All tabs see the same game; one at a time is served by the model."""
    if not 0 <= port < 65536:
        fail(f"--port {port}: a number from 0 to 65535")
    Server.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = Server((host, port), Handler)
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        fail(f"port {port} is in use, perhaps by another --serve: give another --port" if used
             else f"cannot serve on {host}, port {port}: {error.strerror}")
    server.game, server.host, server.lock = game, host, threading.Lock()
    server.loopback = host in ("localhost", "::1") or host.startswith("127.")
    if not server.loopback:
        print(f"warning: all who reach {host} can play, and write exports to {game.folder}", file=sys.stderr)
    before = signal.signal(signal.SIGTERM, leave)
    name = f"[{host}]" if ":" in host else host
    print(f"play at http://{name}:{server.server_port} (Ctrl-C ends)", flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()
        with server.lock:  # a frame in the making is finished
            print("stopped", flush=True)


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>world model</title>
<style>
  :root { color-scheme: dark; --line: #2b3140; --soft: #8b93a7; --accent: #7cc4ff }
  body { margin: 0 auto; padding: 18px; max-width: 1080px; background: #11141b; color: #e7eaf2;
         font: 15px/1.4 system-ui, sans-serif; text-align: center; touch-action: manipulation }
  div { display: flex; flex-wrap: wrap; gap: 10px 16px; align-items: center; justify-content: center;
         margin: 14px 0 }
  #views { flex-wrap: nowrap } #actions, #commands { gap: 10px }
  figure { margin: 0; flex: 1 1 0; max-width: 58vh }
  canvas { width: 100%; image-rendering: pixelated; border-radius: 10px; box-shadow: 0 0 0 1px var(--line) }
  figcaption, label, kbd, p { color: var(--soft); overflow-wrap: anywhere }
  b { display: inline-block; min-width: 2.2em; font-variant-numeric: tabular-nums; color: #e7eaf2 }
  button, [type=number] { font: inherit; color: inherit; background: #1b202b; padding: 7px 12px;
         border: 1px solid var(--line); border-radius: 8px; user-select: none }
  button:hover { border-color: var(--accent) }
  button.on, .on kbd { background: var(--accent); color: #0b0e14 }
  [type=number] { width: 7em }
  [type=range] { width: 120px; vertical-align: middle; accent-color: var(--accent) }
  kbd { font: 12px ui-monospace, monospace; margin-left: 6px }
</style>
<div id="views"><figure><canvas id="real"></canvas><figcaption>real</figcaption></figure>
  <figure><canvas id="dream"></canvas><figcaption>dream</figcaption></figure></div>
<div><span><b id="rate">-</b> fps</span><span><b id="ms">-</b> ms</span>
  <span id="score"><b id="psnr">-</b> dB</span></div>
<div id="actions"></div>
<div><label>FPS <input type="range" id="fps" min="1" max="60"> <b id="fpsnow"></b></label>
  <label>K <input type="range" id="steps" min="0"> <b id="stepsnow"></b></label>
  <label>seed <input type="number" id="seed" min="0"></label><button id="reset">reset</button></div>
<div id="commands"></div>
<p id="message"></p>
<script>
"use strict";
const C = @CONFIG@, $ = id => document.getElementById(id), sleep = ms => new Promise(r => setTimeout(r, ms));
const say = (id, text) => $(id).textContent = text, held = new Map(), times = [];
let tap = null, turn = Promise.resolve();

// held: keys and buttons that are down -> action, in the order of pressing; a tap counts for one frame
const now = () => [...held.values()].at(-1);
const mark = () => [...$("actions").children].forEach((b, i) => b.classList.toggle("on", now() === i));
const press = (id, action) => { held.set(id, action); tap = action; mark(); };
const release = id => { held.delete(id); mark(); };

function draw(id, { width, height }, rgb) {
  const canvas = $(id), image = new ImageData(width, height);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  image.data.fill(255);  // opaque
  for (let i = 0; i < rgb.length; i++) image.data[i + Math.floor(i / 3)] = rgb[i];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

async function send(request) {
  try {
    const answer = await fetch("/step", { method: "POST", body: JSON.stringify(request) });
    if (!answer.ok) throw await answer.text();
    const state = JSON.parse(answer.headers.get("X-State")), rgb = new Uint8Array(await answer.arrayBuffer());
    const size = 3 * state.width * state.height, near = C.choices.map(k => Math.abs(k - state.steps));
    draw("dream", state, rgb.subarray(0, size));
    if (state.real) draw("real", state, rgb.subarray(size));
    $("real").parentNode.hidden = $("score").hidden = !state.real;
    say("ms", state.ms.toFixed(1));
    say("psnr", state.psnr?.toFixed(1));
    say("message", state.message);
    say("stepsnow", state.steps);
    if (document.activeElement !== $("steps")) $("steps").value = near.indexOf(Math.min(...near));
    if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  } catch (error) {
    say("message", typeof error === "string" ? error : "no answer from sample.py; trying again");
    await sleep(1500);
  }
}
const post = request => turn = turn.then(() => send(request));  // in turn, so that errors can be read

async function play() {
  for (let due = performance.now(); ; await sleep(due - performance.now())) {
    due = Math.max(due + 1000 / $("fps").value, performance.now());
    if (document.hidden) continue;
    const action = now() ?? tap ?? C.keys.n;
    tap = null;
    await post({ action });
    if (times.push(performance.now()) > 20) times.shift();
    if (times.length > 1) say("rate", (1000 * (times.length - 1) / (times.at(-1) - times[0])).toFixed(1));
  }
}

function button(parent, text, key) {
  const made = $(parent).appendChild(document.createElement("button"));
  made.textContent = text;
  if (key) made.appendChild(document.createElement("kbd")).textContent = key === " " ? "space" : key;
  return made;
}
C.names.forEach((name, i) => {
  const made = button("actions", name, Object.keys(C.keys).find(k => C.keys[k] === i && /^[a-z ]$/.test(k)));
  made.onpointerdown = e => { e.preventDefault(); press(made, i); };
  made.onpointerup = made.onpointerleave = made.onpointercancel = () => release(made);
});
const titles = { test: "next start", invented: "invented start", noise: "new noise" };
for (const [key, name] of Object.entries(C.commands))
  button("commands", titles[name] ?? name, key).onclick = () => post({ do: name });
$("reset").onclick = () => post({ do: "test", value: $("seed").valueAsNumber });
$("seed").onkeydown = e => { if (e.key === "Enter") { e.target.blur(); $("reset").click(); } };
$("steps").max = C.choices.length - 1;
$("steps").oninput = () => post({ do: "steps", value: C.choices[$("steps").value] });
$("fps").oninput = () => say("fpsnow", $("fps").value);
$("fps").value = say("fpsnow", Math.round(C.fps));
for (const kind of ["click", "change"])  // the keys belong to the game, not to what was clicked last
  addEventListener(kind, e => { if (e.target.id !== "seed") e.target.blur?.(); });
addEventListener("keydown", e => {
  if (e.target.id === "seed" || e.ctrlKey || e.altKey || e.metaKey) return;
  const key = e.key.replace(/^Arrow/, ""), small = key.toLowerCase(), action = C.keys[key] ?? C.keys[small];
  if (action !== undefined) {
    e.preventDefault();
    if (!e.repeat) press(e.code, action);
  } else if (small in C.commands) post({ do: C.commands[small] });
  else if (key === "[" || key === "]") { $("steps").value -= key === "[" ? 1 : -1; $("steps").oninput(); }
});
addEventListener("keyup", e => release(e.code));
addEventListener("blur", () => { held.clear(); mark(); });
play();
</script></html>
"""


def main():
    args = parse()
    flags = dict(STEPS=args.sampling_steps, GUIDANCE=args.guidance, SIZE=args.size or None)
    overrides = [f"{name}={value}" for name, value in flags.items() if value is not None] + args.settings
    if args.num_samples < 1:
        fail(f"--num-samples {args.num_samples}: at least 1")
    if not 0 <= args.seed < 2**31:
        fail(f"--seed {args.seed}: expected 0 to {2**31 - 1}")
    script, checkpoint = load(args.checkpoint, overrides)
    folder = args.out or args.checkpoint.parent / ("full" if args.full else "samples")
    if args.play or args.serve:
        if not hasattr(script, "open_dream"):
            fail(f"{args.checkpoint} was made by {checkpoint['script']}.py, which cannot be played: "
                 "a checkpoint of train_world_model.py can")
        game = Game(script.open_dream(checkpoint, args.seed), args.seed,
                    args.out or args.checkpoint.parent / "played")
        play(game) if args.play else serve(game, args.host, args.port)
    elif args.export:
        whole = {"model", "optimizer", "guard", "script", "settings", "format"}  # sampling needs the rest
        target = args.out or args.checkpoint.parent / "ema.pt"
        run = SimpleNamespace(script=checkpoint["script"], settings=checkpoint["settings"])
        if not save_checkpoint(target, run, **{k: v for k, v in checkpoint.items() if k not in whole}):
            fail(f"cannot write {target}; give another --out")
        print(f"wrote {target}")
    elif args.full:
        script.inference_full(checkpoint, folder, args.checkpoint.parent / "log.csv")
        print(f"wrote {folder}")
    else:
        script.save_samples(checkpoint, folder, args.prompt, args.num_samples, args.seed)
        print(f"wrote {folder}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror}; give another --out")
