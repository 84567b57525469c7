"""
Text: corpora, three tokenizers, the floors that every language model has to beat, a card of sample quality.

Corpora. A corpus is three lists of documents (str); "".join(documents) is the exact text of a split.
    pydoc          embedded: the language reference and the docstrings of this Python's own standard library
    shakespeare    tinyshakespeare, 1.1 MB, train is its first 90 %, no test (public domain)
    wikitext2      WikiText-2 raw, 13.4 MB, the published splits (CC BY-SA)
    PATH           a text file (cut 90/5/5 in order) or a folder of text files (split by file, or taken as it
                   is when they are called train/valid/test, in any spelling like wiki.train.raw)

Tokenizers (V counts the end-of-text token, which is always the last id and has 0 bytes):
    byte           V = 257
    bpe            V = any size; V - 257 byte-pair merges learned from the train split (Sennrich et al. 2016)
    gpt2           V = 50,257; GPT-2's merges from its own file vocab.bpe, which you bring

Floors, bits per byte: a model that does not beat the n-gram and xz has learned less than counting does.

    python -m data.text                                           # the embedded corpus: facts, floors, a look
    python -m data.text show NAME                                 # the same for any corpus
    python -m data.text prepare shakespeare|wikitext2 [--from PATH]       # download it, or take a local copy
Both take --cache FOLDER (runs/cache).

Does not: read parquet, train on more text than fits in memory, normalise Unicode, filter or shuffle.
"""
import ast
import bz2
import hashlib
import heapq
import io
import json
import lzma
import math
import os
import platform
import re
import sys
import sysconfig
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import program

SPLITS = ("train", "val", "test")
CACHE = "runs/cache"
SPELLINGS = dict(train="train", val="val", valid="val", validation="val", dev="val", test="test")
PYDOC = 1  # part of the cache's name: raise it whenever the embedded corpus is built differently
BPE = 1  # the same for learned merges
SMALLEST = 2000  # characters of a text file: below, 5 % of it are no validation set

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # 1,115,394 bytes
WIKITEXT_URL = "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
WIKITEXT_SHA = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"  # 4,721,645 bytes
WIKITEXT_WORDS = dict(train=2_088_628, val=217_646, test=245_569)  # Merity et al. 2016; every line end counts
GPT2_SHA = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # vocab.bpe, 456,318 bytes
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/vocab.bpe"


# ------------------------------------------------------------------------------------------------------------
# Corpora

def load(name, cache=CACHE):
    """Read a corpus.

    name: 'pydoc' | 'shakespeare' | 'wikitext2' | path of a text file or folder; cache: folder for what is
    built or prepared (None: nothing is stored). Returns a namespace: name, train, val, test (lists of str,
    test may be empty), sha (hex sha256 of all texts and the split) and facts (one line to print).
    Raises ValueError or OSError in one line that says what to do.
    """
    note = ""
    if name == "pydoc":
        splits, note = _pydoc(cache)
    elif name == "shakespeare":
        splits = _shakespeare(_prepared(name, cache, "input.txt"))
    elif name == "wikitext2":
        splits = _folder(_prepared(name, cache, "wiki.train.raw").parent)
    elif not Path(name).exists():
        raise FileNotFoundError(f"{name}: not found; expected pydoc, shakespeare, wikitext2, or the path of "
                                "a text file or of a folder of text files")
    else:
        splits = _folder(Path(name)) if Path(name).is_dir() else _cut(Path(name))
    for split in ("train", "val"):
        if not any(splits[split]):
            raise ValueError(f"{name}: expected text for {split}, found none; add files, or call them "
                             "train.txt, valid.txt, test.txt")
    sha = _sha([splits[s] for s in SPLITS])
    sizes = [f"{s} {len(joined(splits[s])):,} bytes in {len(splits[s]):,}" for s in SPLITS]
    facts = f"{name}: {', '.join(sizes)} documents; {note}sha256 {sha[:12]}"
    return SimpleNamespace(name=str(name), sha=sha, facts=facts, **splits)


def text_bytes(text):
    """UTF-8 of any str. A lone surrogate, which UTF-8 does not allow, becomes its three bytes."""
    return text.encode("utf-8", "surrogatepass")


def joined(documents):
    """bytes of all documents of a split."""
    return text_bytes("".join(documents))


def word_count(text):
    """Words for a word perplexity: blank-separated words, and each newline as one more (WikiText's rule)."""
    return len(text_bytes(text).split()) + text.count("\n")  # bytes: only ASCII blanks separate


def _sha(value):
    """hex sha256 of nested lists of str, bytes, and plain values; a length stands before every str."""
    digest = hashlib.sha256()

    def add(part):
        if isinstance(part, (list, tuple)):
            digest.update(f"list {len(part)}\n".encode())
            for item in part:
                add(item)
        else:
            data = part if isinstance(part, bytes) else text_bytes(str(part))
            digest.update(f"{type(part).__name__} {len(data)}\n".encode() + data)
    add(value)
    return digest.hexdigest()


def _read(path):
    """str of a UTF-8 text file; line ends stay as they are."""
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: expected text, found an empty file; give another one or remove it")
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: expected UTF-8 text, found parquet; export its text column to a .txt file")
    if b"\0" in data:
        raise ValueError(f"{path}: expected UTF-8 text, found a zero byte at offset {data.index(0)}; this is "
                         "a binary file (or UTF-16), convert it or take it out of the folder")
    try:
        return data.decode().removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at offset "
                         f"{error.start}; convert it (iconv -t utf-8) or take it out of the folder") from None


def _cut(path):
    """A text file in three pieces, 90/5/5 in order; each cut moves on to the next paragraph, line or word."""
    text = _read(path)
    if len(text) < SMALLEST:
        raise ValueError(f"{path}: expected at least {SMALLEST:,} characters to cut into 90/5/5, found "
                         f"{len(text):,}; give a longer text or a folder with train.txt and valid.txt")
    edges = [0]
    for share in (0.9, 0.95):
        at = max(int(share * len(text)), edges[-1])
        for mark in ("\n\n", "\n", " "):
            end = text.find(mark, at, at + len(text) // 50)
            if end >= 0:
                at = end + len(mark)
                break
        edges.append(at)
    return {split: [text[a:b]] for split, a, b in zip(SPLITS, edges, [*edges[1:], len(text)])}


def _folder(root):
    """The files of a folder. Called train/valid/test they are the splits (WikiText's cut into articles); else
    every file is a document, and the 5 % with the smallest hash of their path are val, the next 5 % test."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file()
             and not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root}: expected text files, found none; put .txt files into it")
    named = defaultdict(list)
    for path in files:
        means = {SPELLINGS[word] for word in re.split(r"[\W_]+", path.name.lower()) if word in SPELLINGS}
        if len(means) == 1:
            named[means.pop()].append(path)
    if named["train"] and (named["val"] or len(files) == sum(map(len, named.values())) > 1):
        for split in SPLITS[:2 + bool(named["test"])]:
            if len(named[split]) != 1:
                raise ValueError(f"{root}: expected one file for {split}, found "
                                 f"{', '.join(p.name for p in named[split]) or 'none'}; add or remove files")
        return {s: [a for path in named[s] for a in articles(_read(path))] for s in SPLITS}
    if len(files) == 1:
        return _cut(files[0])
    texts = {}  # text -> path: a copy of a file would otherwise land in two splits
    for path in files:
        texts.setdefault(_read(path), path.relative_to(root).as_posix())
    order = sorted(texts, key=lambda text: hashlib.sha256(texts[text].encode()).digest())
    few = max(1, round(len(order) / 20))
    part = {text: SPLITS[1 + k // few] for k, text in enumerate(order[:2 * few if len(order) > 2 else few])}
    return {s: [text for text in texts if part.get(text, "train") == s] for s in SPLITS}


def articles(text):
    """WikiText's articles: list of str, cut before each top-level heading, a line ' = Title = '."""
    starts = [m.start() for m in re.finditer(r"(?m)^ = (?!= )[^\n]* = $", text)]
    if starts and not text[:starts[0]].strip():
        del starts[0]  # a blank line at the top belongs to the first article
    edges = [0, *starts, len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:])]


def _shakespeare(path):
    data = path.read_bytes()
    _check(path, data, SHAKESPEARE_SHA)
    text = data.decode()
    cut = int(0.9 * len(text))  # nanoGPT's split, so that its numbers compare
    return dict(train=[text[:cut]], val=[text[cut:]], test=[])


def _check(name, data, sha):
    found = hashlib.sha256(data).hexdigest()
    if found != sha:
        raise ValueError(f"{name}: expected sha256 {sha}, found {found} ({len(data):,} bytes); the file is "
                         "another one or damaged, get it again")


# ------------------------------------------------------------------------------------------------------------
# The embedded corpus

SKIPPED = {"test", "tests", "idlelib", "pydoc_data", "site-packages", "dist-packages", "lib2to3",
           "turtledemo", "ensurepip", "msilib"}


def _pydoc(cache):
    """(splits, note): built in about 5 s, then kept as one JSON file per Python version."""
    path = f"pydoc{PYDOC}_{platform.python_version()}.json"

    def valid(kept):
        return kept["sha"] == _sha([kept[s] for s in SPLITS])

    def build():
        splits, note = _build_pydoc(Path(sysconfig.get_path("stdlib")))
        return dict(splits, note=note, sha=_sha([splits[s] for s in SPLITS]))
    kept = _kept(cache, path, build, valid)
    return {s: kept[s] for s in SPLITS}, kept["note"]


def _build_pydoc(library):
    """Documents of the Python sources in a folder, parsed and never imported.

    A document is a topic of pydoc's language reference or the docstrings of one module in the order of the
    source, each under its name. Paragraphs that occurred before are left out (inherited docstrings would let
    val and test repeat train); whole packages go to one split, by hash of their name.
    """
    topics = library / "pydoc_data" / "topics.py"
    documents = [("topic", name, text) for name, text in sorted(_topics(topics).items())]
    files = [path for path in sorted(library.rglob("*.py"))
             if not any(part in SKIPPED or part.startswith(("config-", "_sysconfigdata"))
                        for part in path.relative_to(library).parts)]
    strings = 0
    for path in files:
        found = _docstrings(path)
        parts = path.relative_to(library).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        documents.append(("doc", name, "\n\n".join(f"{own or name}\n{text}" for own, text in found)))
        strings += len(found)
    if not strings:
        raise FileNotFoundError(f"{library}: expected the sources of Python's standard library, found no "
                                "docstrings in it; install them, or give a text file instead of pydoc")
    splits, seen = {s: [] for s in SPLITS}, set()
    for kind, name, text in documents:
        text = _without_repeats(text, seen)
        if len(text) >= 200:
            top = f"{kind}/{name.split('.')[0].lstrip('_')}"
            place = int.from_bytes(hashlib.sha256(top.encode()).digest()[:4], "big") % 20
            splits[{0: "val", 1: "test"}.get(place, "train")].append(text + "\n\n")
    note = f"Python {platform.python_version()}, {len(files):,} files, {strings:,} docstrings, "
    return splits, note + ("" if topics.is_file() else "no topics (pydoc_data is missing), ")


def _topics(path):
    if not path.is_file():
        return {}
    values = [s.value for s in ast.parse(path.read_bytes()).body if isinstance(s, ast.Assign)]
    return {name: text.strip() for name, text in ast.literal_eval(values[0]).items()}


def _docstrings(path):
    """[(name, docstring of 20 characters or more)] of a source file in its order; the module has no name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and the like
        return []
    found = []

    def visit(node):  # ast.walk goes level by level, so not in the order of the source
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text) >= 20:
                found.append((getattr(node, "name", ""), text.encode("utf-8", "replace").decode()))
        for child in ast.iter_child_nodes(node):
            visit(child)
    visit(tree)
    return found


def _without_repeats(text, seen):
    """text without its paragraphs of 40 characters or more (blanks squeezed) that are in seen; it grows."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if len(key) < 40 or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept)


# ------------------------------------------------------------------------------------------------------------
# What is kept between runs

def _write(path, data):
    """bytes to a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _kept(cache, name, make, valid=lambda value: True):
    """The JSON value of cache/name; made and stored when the file is missing, damaged, or not valid."""
    if cache is None:
        return make()
    path = Path(cache) / name
    try:
        value = json.loads(path.read_bytes())
        if valid(value):
            return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # made again
    value = make()
    _write(path, json.dumps(value).encode())
    return value


# ------------------------------------------------------------------------------------------------------------
# Downloads

def _prepared(name, cache, file):
    path = Path(cache or CACHE) / name / file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; get the corpus once: python -m data.text prepare {name} "
                                f"--cache {cache or CACHE}")
    return path


def prepare(name, source=None, cache=CACHE):
    """Put shakespeare or wikitext2 into cache/name, from the network or from source (a local file, zip or
    folder), verified. Returns one line that says what was done. Raises ValueError or OSError in one line."""
    root = Path(cache) / name
    if name == "shakespeare":
        source = source and Path(source)
        if source and source.is_dir():
            source = source / "input.txt"
        data = source.read_bytes() if source else _fetch(SHAKESPEARE_URL)
        _check(source or SHAKESPEARE_URL, data, SHAKESPEARE_SHA)
        _write(root / "input.txt", data)
        return f"{root / 'input.txt'}: {len(data):,} bytes, sha256 as published"
    if name != "wikitext2":
        raise ValueError(f"{name}: expected shakespeare or wikitext2; other texts are loaded from their path")
    if source and Path(source).is_dir():
        texts, published = {s: "".join(documents) for s, documents in _folder(Path(source)).items()}, False
    else:
        data = Path(source).read_bytes() if source else _fetch(WIKITEXT_URL)
        published = hashlib.sha256(data).hexdigest() == WIKITEXT_SHA
        if not source:
            _check(WIKITEXT_URL, data, WIKITEXT_SHA)
        texts = _unzip(source or WIKITEXT_URL, data)
    words = {s: word_count(text) for s, text in texts.items()}
    for split, spelling in (("val", "valid"), ("test", "test"), ("train", "train")):
        if texts[split]:
            _write(root / f"wiki.{spelling}.raw", text_bytes(texts[split]))
        else:
            (root / f"wiki.{spelling}.raw").unlink(missing_ok=True)  # of another copy
    found, wanted = (", ".join(f"{s} {n:,}" for s, n in w.items()) for w in (words, WIKITEXT_WORDS))
    if words == WIKITEXT_WORDS or published:
        return f"{root}: the full WikiText-2, words with line ends {found} (published: {wanted})"
    return (f"{root}: NOT the full WikiText-2, so nothing compares with published numbers: words with line "
            f"ends {found} (published: {wanted})")


def _unzip(name, data):
    texts = dict.fromkeys(SPLITS, "")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                found = re.search(r"(?:^|/)(?:wiki\.)?(train|valid|test)\.(?:raw|tokens|txt)$", member)
                if found:
                    texts[SPELLINGS[found[1]]] = archive.read(member).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{name}: expected a folder or zip with wiki.train.raw, wiki.valid.raw and "
                         f"wiki.test.raw, found: {error}") from None
    if not texts["train"] or not texts["val"]:
        raise ValueError(f"{name}: expected wiki.train.raw and wiki.valid.raw inside, found at most one of "
                         "them; is this WikiText-2?")
    return texts


def _fetch(url):
    """bytes behind a URL."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})  # some refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except (HTTPException, OSError) as error:  # URLError is an OSError
        raise OSError(f"{url}: cannot be fetched ({getattr(error, 'reason', error)}); get the file in "
                      "another way and give it with --from PATH") from None


# ------------------------------------------------------------------------------------------------------------
# Tokenizers

# GPT-2's pre-split: contractions; letters, digits or other signs with at most one blank before them; blanks,
# without the last one before a word. Everything in a text falls into one of these, so nothing is lost.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?{L}+| ?{N}+| ?{X}+|{S}+(?!{T})|{S}+"
WORDS = re.compile(SPLIT.format(L=r"[^\W\d_]", N=r"\d", X=r"(?:[^\s\w]|_)", S=r"\s", T=r"\S"))


def _gpt2_words():
    r"""The same with GPT-2's classes \p{L}, \p{N}, White_Space: re's \w and \s differ on a thousand signs."""
    classes = dict(L=[], N=[], S=[])
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))[0]
        if kind in "LN":
            classes[kind].append(code)
        elif chr(code).isspace() and not 0x1c <= code <= 0x1f:
            classes["S"].append(code)
    parts = {}
    for name, codes in classes.items():
        breaks = [k for k in range(1, len(codes)) if codes[k] != codes[k - 1] + 1]
        runs = [(codes[a], codes[b - 1]) for a, b in zip([0, *breaks], [*breaks, len(codes)])]
        parts[name] = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)
    return re.compile(SPLIT.format(L=f"[{parts['L']}]", N=f"[{parts['N']}]", S=f"[{parts['S']}]",
                                   X=f"[^{''.join(parts.values())}]", T=f"[^{parts['S']}]"))


class Tokenizer:
    """Text <-> ids, without loss for every str.

    kind: 'byte' | 'bpe' | 'gpt2'; merges: list of (left id, right id), merge k makes id 256 + k; V: number
    of ids; end: id of end-of-text, V - 1; bytes_of: bytes of each id (b"" for end); byte_lengths: their
    lengths, int64 (V,); sha: hex sha256 of all that matters; facts: one line to print.
    """

    def __init__(self, kind, merges=(), note=""):
        self.kind, self.merges = kind, [(int(a), int(b)) for a, b in merges]
        self.byte_order = list(GPT2_ORDER if kind == "gpt2" else range(256))  # id -> byte
        self.bytes_of = [bytes([b]) for b in self.byte_order]
        for left, right in self.merges:
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self.end = len(self.bytes_of)
        self.bytes_of.append(b"")
        self.V = len(self.bytes_of)
        self.byte_lengths = np.array([len(b) for b in self.bytes_of], np.int64)
        self.sha = _sha([kind, self.merges])
        self.facts = (f"{kind}: V {self.V:,} (256 bytes, {len(self.merges):,} merges, end-of-text "
                      f"{self.end:,}){note}")
        self._id_of = {b: i for i, b in enumerate(self.byte_order)}
        self._rank = {pair: 256 + k for k, pair in enumerate(self.merges)}
        self._cache = {}
        self._words = None

    def encode(self, text):
        """list of int; no end-of-text."""
        if self.kind == "byte":
            return list(text_bytes(text))
        if self._words is None:
            self._words = _gpt2_words() if self.kind == "gpt2" else WORDS
        ids, cache = [], self._cache
        for word in self._words.findall(text):
            found = cache.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(cache) < 1 << 20:
                    cache[word] = found
            ids += found
        return ids

    def _encode_word(self, word):
        """Apply the earliest learned merge until none fits."""
        ids = [self._id_of[b] for b in text_bytes(word)]
        while len(ids) > 1:
            new, pair = min((self._rank.get(pair, self.V), pair) for pair in zip(ids, ids[1:]))
            if new == self.V:
                break
            ids = _merge(ids, pair, new)
        return ids

    def encode_documents(self, documents):
        """uint16 (uint32 when V > 65,536) (N,): all documents, each followed by end-of-text."""
        kind = np.uint16 if self.V <= 1 << 16 else np.uint32
        parts = [np.array(self.encode(document) + [self.end], kind) for document in documents]
        return np.concatenate(parts) if parts else np.zeros(0, kind)

    def decode_bytes(self, ids):
        """bytes: exactly text_bytes() of what was encoded."""
        return b"".join([self.bytes_of[i] for i in ids])

    def decode(self, ids):
        """str that can be printed: bytes that are no UTF-8 (cut signs, lone surrogates) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def state(self):
        """Plain values for a checkpoint; from_state() makes the same tokenizer of it."""
        return dict(kind=self.kind, merges=list(self.merges))

    @classmethod
    def from_state(cls, state):
        return cls(state["kind"], state["merges"])


def _merge(ids, pair, new):
    """ids with each pair of neighbours, from the left, replaced by new."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def learn_merges(documents, count):
    """Byte-pair encoding: list of at most count (left id, right id); stops when no pair occurs twice.

    Each step merges the most frequent pair of neighbours inside words (of equal ones the smaller pair), and
    only the words that contain it are counted again. The heap is lazy: an entry whose count is out of date is
    put back with the right one when it comes up.
    """
    frequency = Counter()
    for document in documents:
        frequency.update(WORDS.findall(document))
    words, counts = [list(text_bytes(w)) for w in frequency], list(frequency.values())
    total, places = Counter(), defaultdict(set)  # pair -> its count, and the words that may contain it
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            total[pair] += counts[w]
            places[pair].add(w)
    heap = [(-n, pair) for pair, n in total.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < count:
        n, pair = heapq.heappop(heap)
        if -n != total[pair]:
            if total[pair] > 1:
                heapq.heappush(heap, (-total[pair], pair))
            continue
        if -n < 2:
            break
        new, changed = 256 + len(merges), set()
        merges.append(pair)
        for w in places.pop(pair):
            old, words[w] = words[w], _merge(words[w], pair, new)
            for gone in zip(old, old[1:]):
                total[gone] -= counts[w]
            for came in zip(words[w], words[w][1:]):
                total[came] += counts[w]
                if new in came:
                    places[came].add(w)
                    changed.add(came)
        for came in changed:
            heapq.heappush(heap, (-total[came], came))
    return merges


def tokenizer(kind, size=1024, train_docs=(), cache=CACHE, merges_path=None):
    """Make a tokenizer.

    kind: 'byte' | 'bpe' | 'gpt2'; size: V of bpe, at least 258 (others have their own); train_docs: what bpe
    learns from, the train split and nothing else; merges_path: GPT-2's vocab.bpe (default: cache/vocab.bpe).
    Learned merges are kept in cache by hash of the documents and size. Raises ValueError or OSError.
    """
    if kind == "byte":
        return Tokenizer("byte")
    if kind == "gpt2":
        return Tokenizer("gpt2", _gpt2_merges(Path(merges_path or Path(cache or CACHE) / "vocab.bpe")))
    if kind != "bpe":
        raise ValueError(f"tokenizer {kind!r}: expected byte, bpe or gpt2")
    if size < 258:
        raise ValueError(f"vocabulary {size}: expected at least 258 for bpe (256 bytes, end-of-text and one "
                         "merge); raise it or take the byte tokenizer")
    sha = _sha(list(train_docs))

    def valid(kept):
        return kept["sha"] == _sha([sha, kept["merges"]]) and len(kept["merges"]) <= size - 257

    def make():
        merges = [list(pair) for pair in learn_merges(train_docs, size - 257)]
        return dict(merges=merges, sha=_sha([sha, merges]))
    merges = _kept(cache, f"bpe{BPE}_{sha[:16]}_{size}.json", make, valid)["merges"]
    short = len(merges) < size - 257
    return Tokenizer("bpe", merges, f"; {size:,} asked for, but no other pair occurs twice" if short else "")


# GPT-2 numbers the bytes that print as Latin-1 first, then the others; a merge list names byte b by one sign:
# itself when it prints, else chr(256 + its place among the others).
PRINTING = [*range(33, 127), *range(161, 173), *range(174, 256)]
GPT2_ORDER = PRINTING + [b for b in range(256) if b not in PRINTING]


def _gpt2_merges(path):
    """[(left id, right id)] of GPT-2's vocab.bpe."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; put GPT-2's vocab.bpe (456,318 bytes) there: {GPT2_URL}")
    data = path.read_bytes()
    _check(path, data, GPT2_SHA)
    byte_of = {chr(b) if b in PRINTING else chr(256 + k - len(PRINTING)): bytes([b])
               for k, b in enumerate(GPT2_ORDER)}
    id_of = {bytes([b]): k for k, b in enumerate(GPT2_ORDER)}
    merges = []
    for line in data.decode("utf-8").split("\n"):
        if line and not line.startswith("#version"):
            left, right = (b"".join(byte_of[sign] for sign in part) for part in line.split(" "))
            merges.append((id_of[left], id_of[right]))
            id_of[left + right] = 256 + len(merges) - 1
    return merges


def tokens(corpus, tokenizer, cache=CACHE):
    """dict split -> ids (N,) of encode_documents(), kept in cache as .npy files and opened as memory maps."""
    found = {}
    for split in SPLITS:
        documents = getattr(corpus, split)
        if cache is None or not documents:
            found[split] = tokenizer.encode_documents(documents)
            continue
        path = Path(cache) / f"tokens_{corpus.sha[:16]}_{tokenizer.sha[:16]}_{split}.npy"
        try:
            ids = np.load(path, mmap_mode="r")
            # a file of another length or content has another number of ends, or another last one
            good = ids.ndim == 1 and ids.size and ids.max() == ids[-1] == tokenizer.end
            good = good and np.count_nonzero(ids == tokenizer.end) == len(documents)
        except (OSError, ValueError, EOFError):
            good = False
        if not good:
            packed = io.BytesIO()
            np.save(packed, tokenizer.encode_documents(documents))
            _write(path, packed.getvalue())
            ids = np.load(path, mmap_mode="r")
        found[split] = ids
    return found


# ------------------------------------------------------------------------------------------------------------
# Floors: what counting and compressing reach, in bits per byte

def unigram_bits(train, val):
    """Bits per byte of val (bytes) under add-one byte frequencies of train (bytes)."""
    count = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1
    return float(-np.log2(count / count.sum())[np.frombuffer(val, np.uint8)].mean())


class NGram:
    """Byte n-gram with absolute discounting, interpolated down to uniform (Ney, Essen and Kneser 1994).

        p_0 = 1/256
        p_k(c | ctx) = max(n(ctx c) - D, 0) / n(ctx) + D types(ctx) / n(ctx) p_{k-1}(c | all but ctx's first)
    ctx: the k-1 bytes before c; n: counts in train; types: number of different bytes after ctx. A context
    that train does not have adds nothing: p_k = p_{k-1}. train: bytes; order: largest k, 1..8.
    """
    D = 0.75

    def __init__(self, train, order):
        if not 1 <= order <= 8:
            raise ValueError(f"order {order}: expected 1..8, so that a gram fits into 64 bits")
        self.order, self.tables = order, []
        for k in range(1, min(order, len(train)) + 1):
            grams, n = np.unique(_grams(train, k), return_counts=True)
            # Sorted grams have equal contexts side by side: the context is all but the last byte.
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            types = np.diff(np.append(first, len(grams)))
            self.tables.append((grams, n, contexts, np.add.reduceat(n, first), types))

    def ladder(self, data):
        """Yield p_k of every byte of data (bytes), float64 (N,), for k = 1..order: one array, overwritten."""
        p = np.full(len(data), 1 / 256)
        for k, (grams, n, contexts, total, types) in enumerate(self.tables, 1):
            if len(data) >= k:
                wanted = _grams(data, k)
                gram, known = _find(grams, wanted)
                context, seen = _find(contexts, wanted >> np.uint64(8))
                rest = p[k - 1:]  # the first k-1 bytes have no context of this length
                count = np.where(known, n[gram], 0)
                better = (np.maximum(count - self.D, 0) + self.D * types[context] * rest) / total[context]
                p[k - 1:] = np.where(seen, better, rest)
            yield p

    def byte_bits(self, data):
        """float64 (N,): -log2 p of every byte of data (bytes), given the bytes before it in data."""
        p = np.full(len(data), 1 / 256)
        for p in self.ladder(data):
            pass
        return -np.log2(p)

    def bits(self, data):
        """Bits per byte of data (bytes); nan when it is empty."""
        return float(self.byte_bits(data).mean()) if len(data) else math.nan


def _grams(data, size):
    """uint64 (N - size + 1,): each run of size <= 8 bytes as one number, the first byte highest."""
    data = np.frombuffer(data, np.uint8).astype(np.uint64)
    count = len(data) - size + 1
    grams = np.zeros(max(count, 0), np.uint64)
    for k in range(size):
        grams = (grams << np.uint64(8)) | data[k:k + count]
    return grams


def _find(table, wanted):
    """(place of each wanted in the sorted table, whether it is there)."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


def compressor_bits(train, val, name):
    """Bits per byte of val (bytes) once train is seen: 8 (C(train + val) - C(train)) / len(val).

    name: 'zlib' (looks back 32 kB), 'bz2' (blocks of 900 kB) or 'xz' (sees all of train).
    """
    shrink = dict(zlib=lambda data: zlib.compress(data, 9), bz2=lambda data: bz2.compress(data, 9),
                  xz=lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))[name]
    return 8 * (len(shrink(train + val)) - len(shrink(train))) / len(val)


def floors(train_docs, val_docs, cache=CACHE):
    """dict of bits per byte: uniform_byte, unigram, ngram (the best of orders 3..7 on val itself, so a strict
    floor), zlib, bz2, xz; and ngram_order. Kept in cache by content."""
    train, val = joined(train_docs), joined(val_docs)
    if not train or not val:
        raise ValueError(f"floors: expected text on both sides, found {len(train):,} and {len(val):,} bytes; "
                         "this split of the corpus is empty, leave it out")

    def make():
        ladder = [float(-np.log2(p).mean()) for p in NGram(train, 7).ladder(val)]
        order = min(range(3, len(ladder) + 1), key=lambda k: ladder[k - 1], default=len(ladder))
        return dict(uniform_byte=8.0, unigram=unigram_bits(train, val), ngram=ladder[order - 1],
                    ngram_order=order, **{c: compressor_bits(train, val, c) for c in ("zlib", "bz2", "xz")})
    names = {"uniform_byte", "unigram", "ngram", "ngram_order", "zlib", "bz2", "xz"}
    return _kept(cache, f"floors_{_sha([train, val])[:16]}.json", make, lambda kept: set(kept) == names)


# ------------------------------------------------------------------------------------------------------------
# Leaks and copies

def _windows(ids, size):
    """uint64 (N - size + 1,): a hash of each run of size ids (int, N). Polynomial modulo 2^64 over a fixed
    random number per id, by differences of prefix sums; the base is odd, so it can be divided out again."""
    if len(ids) < size:
        return np.zeros(0, np.uint64)
    table = np.random.default_rng(0).integers(0, 1 << 64, int(ids.max()) + 1, np.uint64)
    base = 0x9E3779B97F4A7C15
    power = np.cumprod(np.full(len(ids), base, np.uint64))
    back = np.cumprod(np.full(len(ids), pow(base, -1, 1 << 64), np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(table[ids] * power)])
    return (sums[size:] - sums[:-size]) * back[:len(ids) - size + 1]


def shared_shingles(train_docs, val_docs, size=64):
    """Share of the val text's runs of `size` bytes that occur in the train text; 0 when it is shorter."""
    train, val = (_windows(np.frombuffer(joined(docs), np.uint8), size) for docs in (train_docs, val_docs))
    return float(np.isin(val, train).mean()) if len(val) else 0.0


class Index:
    """What the quality card needs of the train split: its lexicon and the hashes of its word 8-grams."""

    def __init__(self, train_docs):
        text = train_docs if isinstance(train_docs, str) else "".join(train_docs)
        self.lexicon = set(_letters(text))
        words = text.split()
        self.number = {word: k for k, word in enumerate(dict.fromkeys(words), 1)}  # 0: not in train
        self.eights = np.unique(self._hashes(words))

    def has_eights(self, words):
        """bool (N - 7,): which of the 8-grams of these N words occur in train."""
        hashes = self._hashes(words)
        return _find(self.eights, hashes)[1] if len(self.eights) else np.zeros(len(hashes), bool)

    def _hashes(self, words):
        return _windows(np.array([self.number.get(word, 0) for word in words], np.int64), 8)


def _letters(text):
    """Words in the sense of a dictionary: runs of letters, lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


# ------------------------------------------------------------------------------------------------------------
# Quality of samples, without a judge

# (name, which direction is better; None: the nearer to the human row the better)
CARD = (("distinct_1", None), ("distinct_2", None), ("distinct_3", None), ("repetition_4", "lower"),
        ("longest_repeat", "lower"), ("real_words", "higher"), ("zipf_slope", None), ("ngram_bits", None),
        ("copied_8", "lower"), ("copied_prompt_8", "lower"), ("balanced", "higher"))


def quality(samples, train, ngram, prompts=None):
    """The quality card of generated texts: dict of floats, names and directions in CARD.

    samples: list of str without their prompts; train: Index, or the train documents; ngram: NGram of the
    train split; prompts: the list of str they continue (None: no copied_prompt_8). Words end at blanks.
        distinct_1, 2, 3   different / all word n-grams of all samples
        repetition_4       mean over samples of 1 - different / all word 4-grams
        longest_repeat     mean over samples of the longest run of bytes that occurs twice in it
        real_words         share of the runs of letters that occur in train
        zipf_slope         slope of log count over log rank of the words, ranks 1..1000 (text: about -1)
        ngram_bits         bits per byte under ngram: far below human text = worn phrases, far above = noise
        copied_8           share of the word 8-grams that occur in train
        copied_prompt_8    share of the word 8-grams that occur in the sample's own prompt
        balanced           share of brackets and quotes that have a partner in their sample (1 without any)
    Nearly all of them depend on the amount of text: compare only sets of equal number and length of samples,
    such as human_samples() cuts. Without words to count a share is 0.
    """
    train = train if isinstance(train, Index) else Index(train)
    words = [sample.split() for sample in samples]
    data = [text_bytes(sample) for sample in samples]
    letters = [word for sample in samples for word in _letters(sample)]
    copied = [was for w in words for was in train.has_eights(w)]
    card = {f"distinct_{n}": _distinct([g for w in words for g in _word_grams(w, n)]) for n in (1, 2, 3)}
    card["repetition_4"] = _mean([1 - _distinct(grams) for w in words if (grams := _word_grams(w, 4))])
    card["longest_repeat"] = _mean([_longest_repeat(d) for d in data])
    card["real_words"] = _mean([word in train.lexicon for word in letters])
    card["zipf_slope"] = _zipf(Counter(word for w in words for word in w))
    card["ngram_bits"] = _mean(np.concatenate([np.zeros(0), *(ngram.byte_bits(d) for d in data)]))
    card["copied_8"] = _mean(copied)
    if prompts is not None:
        given = [set(_word_grams(prompt.split(), 8)) for prompt in prompts]
        card["copied_prompt_8"] = _mean([gram in own for w, own in zip(words, given, strict=True)
                                         for gram in _word_grams(w, 8)])
    card["balanced"] = _balanced(samples)
    return card


def human_samples(documents, count, length, seed=0):
    """list of count str: the human row of the quality card. Pieces of a held-out text that do not overlap,
    begin at a word and are `length` bytes long (up to 3 fewer where that would cut a character)."""
    data = joined(documents)
    slots = len(data) // (length + 32)  # 32: room to move on to the next word
    if slots < count or length < 1:
        raise ValueError(f"human samples: expected {count} x {length} bytes in the held-out text, found "
                         f"{len(data):,}; ask for fewer or shorter ones")
    pieces = []
    for slot in np.sort(np.random.default_rng(seed).permutation(slots)[:count]):
        at = int(slot) * (length + 32)
        skip = re.search(rb"\s(?=\S)", data[at:at + 32])
        at += skip.end() if skip else 0
        pieces.append(data[at:at + length].decode("utf-8", "ignore"))
    return pieces


def _mean(values):
    return float(np.mean(values)) if len(values) else 0.0


def _word_grams(words, n):
    return list(zip(*(words[k:] for k in range(n))))


def _distinct(grams):
    return len(set(grams)) / len(grams) if grams else 0.0


def _longest_repeat(data):
    """Bytes of the longest run that occurs twice, by bisection: a shorter run of it then does so too."""
    ids, low, high = np.frombuffer(data, np.uint8), 0, len(data)
    while high - low > 1:
        size = (low + high) // 2
        found = _windows(ids, size)
        low, high = (size, high) if len(np.unique(found)) < len(found) else (low, size)
    return low


def _zipf(counts):
    top = np.sort(np.array(list(counts.values()), float))[::-1][:1000]
    return float(np.polyfit(np.log(np.arange(1, len(top) + 1)), np.log(top), 1)[0]) if len(top) > 1 else 0.0


def _balanced(samples):
    partner, paired, every = {")": "(", "]": "[", "}": "{"}, 0, 0
    for sample in samples:
        signs, stack = re.findall(r'[()\[\]{}"]', sample), []
        for sign in signs:
            if sign == '"':
                continue
            if stack and stack[-1] == partner.get(sign):
                stack.pop()
                paired += 2
            elif sign not in partner:
                stack.append(sign)
        quotes = signs.count('"')
        paired, every = paired + quotes - quotes % 2, every + len(signs)
    return paired / every if every else 1.0


# ------------------------------------------------------------------------------------------------------------
# Commands

def show(name="pydoc", cache=CACHE):
    """Print a corpus: facts, repeats between splits, floors, the beginning of its val text."""
    corpus = load(name, cache)
    print(corpus.facts)
    for split in ("val", "test"):
        documents = getattr(corpus, split)
        if not documents:
            continue
        shared = 100 * shared_shingles(corpus.train, documents)
        print(f"{split}: {shared:.2f} % of its runs of 64 bytes are in train")
        found = floors(corpus.train, documents, cache)
        order = found.pop("ngram_order")
        print(f"{split} floors, bits per byte: " + ", ".join(
            f"{order}-gram {bits:.3f}" if key == "ngram" else f"{key} {bits:.3f}"
            for key, bits in found.items()))
    print("val begins:", corpus.val[0][:600].strip(), sep="\n")


USAGE = ("usage: python -m data.text [show [NAME]] [--cache FOLDER] | "
         "prepare shakespeare|wikitext2 [--from PATH] [--cache FOLDER]")


@program
def main(arguments):
    """Run one command line; returns the exit code: 0, or 2 after one line on stderr."""
    words, options = [], dict(cache=CACHE)
    rest = iter(arguments)
    for word in rest:
        if word in ("--from", "--cache"):
            options[word[2:]] = next(rest, None)
            if options[word[2:]] is None:
                raise ValueError(f"{word}: expected a path after it; {USAGE}")
        else:
            words.append(word)
    command, *names = words or ["show"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "show" and len(names) <= 1 and "from" not in options:
        show(*names, cache=options["cache"])
    elif command == "prepare" and len(names) == 1:
        print(prepare(names[0], options.get("from"), options["cache"]))
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
