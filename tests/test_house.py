"""The house rules that a reader relies on: settings, imports, the commands of the documents, the pinned
packages."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import sample

TRAIN = sorted(ROOT.glob("train_*.py"))
MODULES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not {"runs", ".venv", "__pycache__"} & set(p.relative_to(ROOT).parts)
    and not any(part.startswith(("runs", ".")) for part in p.relative_to(ROOT).parts)
)
SOURCES = [p for p in MODULES if p.parent.name != "tests"]
README = ROOT / "README.md"
WIDTH = 110
FORBIDDEN = ("TO" + "DO", "FIX" + "ME")
PACKAGES = {"torch", "numpy", "einops", "tqdm", "matplotlib", "pytest"}
MARGIN = 0  # lines by which the README's column may be off

needs_readme = pytest.mark.skipif(not README.exists(), reason="no README.md yet")


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


# ------------------------------------------------------------------------------------------------------------
# Settings: literals at the top of a script, which override() replaces after the import


def literal(node):
    """The value of a literal, where dict(NAME=literal) counts as one too; ValueError when it is none."""
    if isinstance(node, ast.Dict):
        return {literal(k): literal(v) for k, v in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict" and not node.args:
        return {k.arg: literal(k.value) for k in node.keywords}
    return ast.literal_eval(node)


def is_literal(node):
    try:
        literal(node)
        return True
    except ValueError:
        return False


def assigned(statement):
    """(name, value node) of the plain names that a module-level statement assigns."""
    if isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    else:
        targets = getattr(statement, "targets", [])
    return [(n.id, statement.value) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def stale(source):
    """What an override on the command line would not reach: a list of complaints about a script."""
    tree = ast.parse(source)
    values = [pair for statement in tree.body for pair in assigned(statement)]
    settings = {name for name, value in values if name.isupper() and value is not None and is_literal(value)}
    complaints = [
        f"{name} is not a literal"
        for name, value in values
        if name.isupper() and not (value and is_literal(value))
    ]

    def uses(node):
        return sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in settings})

    for name, value in values:
        if value is not None and uses(value):
            complaints.append(f"{name} is made from {uses(value)} at import")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                if uses(default):
                    complaints.append(
                        f"a default of {getattr(node, 'name', 'a lambda')}() is {uses(default)}"
                    )
            for decorator in getattr(node, "decorator_list", []):
                if uses(decorator):
                    complaints.append(f"a decorator of {node.name}() reads {uses(decorator)}")
        elif isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, (ast.Assign, ast.AnnAssign)) and uses(statement):
                    complaints.append(f"class {node.name} reads {uses(statement)} when it is defined")
    for statement in tree.body:  # code that runs at import, outside the guard
        guard = isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test)
        if (
            isinstance(statement, (ast.For, ast.While, ast.With, ast.Expr, ast.If))
            and not guard
            and uses(statement)
        ):
            complaints.append(f"line {statement.lineno} reads {uses(statement)} at import")
    return complaints


@named(TRAIN)
def test_an_override_reaches_every_use(path):
    assert stale(path.read_text()) == []


@pytest.mark.parametrize(
    "fault",
    [
        "A = 1\nB = A * 2",
        "A = 1\nhalf = A / 2",
        "A = 1\ndef f(x=A): pass",
        "A = 1\ndef f(*, x=[A]): pass",
        "A = 1\ng = lambda x=A: x",
        "A = len('abc')",
        "A = 1\nclass C:\n    size = A",
        "A = 1\nprint(A)",
        "A = 1\nfor i in range(A): pass",
        "A = 1\nA += 1\nb = [A]",
    ],
)
def test_and_a_stale_one_is_found(fault):
    assert stale(fault), fault
    assert (
        stale("A = 1\nT = (1, 2)\ndef f(x=None):\n    return A\nif __name__ == '__main__':\n    print(A)")
        == []
    )


@named(TRAIN)
def test_settings_have_plain_types_and_a_reason(path):
    source = path.read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    settings = [
        s for s in tree.body if isinstance(s, ast.Assign) and any(n.isupper() for n, _ in assigned(s))
    ]
    assert len(settings) > 10
    for statement in settings:
        value = literal(statement.value)
        ((name, _),) = assigned(statement)
        assert isinstance(value, common.PLAIN) or name == "EXPERIMENTS", name
    bare = [assigned(s)[0][0] for s in settings if "#" not in lines[s.end_lineno - 1]]
    assert set(bare) <= {"SEED"}, f"no comment beside {bare}"
    shared = "DATA EPOCHS BATCH_SIZE ACCUM LR EMA_DECAY STEPS SAMPLES SEED OUT RESUME".split()
    if path.name == "train_lm.py":
        shared.remove("STEPS")  # of a diffusion or ODE sampler; text has none
    for name in shared:
        assert any(assigned(s)[0][0] == name for s in settings), name


# ------------------------------------------------------------------------------------------------------------
# Imports


def python(*arguments, cwd=ROOT):
    environment = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONPATH=str(ROOT),
    )
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_has_no_side_effects(tmp_path):
    """All scripts and modules at once: no file, no output, no random number drawn, no thread count
    changed."""
    names = [p.stem for p in SOURCES if p.parent == ROOT] + [
        f"data.{p.stem}" for p in SOURCES if p.parent.name == "data"
    ]
    code = (
        "import random, numpy as np, torch\n"
        "before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()\n"
        f"import importlib\nfor name in {[n for n in names if n != 'data.__init__']!r}:\n    importlib.import_module(name)\n"
        "assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())\n"
    )
    runs = sorted(p.name for p in ROOT.iterdir())
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == [] and "train_stl10" in names
    assert {p for p in runs if p.startswith("runs")} == {
        p.name for p in ROOT.iterdir() if p.name.startswith("runs")
    }


# ------------------------------------------------------------------------------------------------------------
# The documents' commands


def commands(text):
    """The command lines of a document or a docstring: continued lines joined, comments cut."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = []
    for line in lines:
        if re.match(r"    (python|torchrun)\b.*\b(train_\w+|sample)\.py", line):
            found.append(shlex.split(line.strip(), comments=True))
    return found


def check_command(words):
    """Raises when the program would refuse the command: the script is there, settings exist and have the
    right types."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name, rest = words[at], words[at + 1 :]
    assert (ROOT / name).exists(), name
    placeholder = [w for w in rest if "@" in w]
    rest = [w for w in rest if w not in placeholder]
    if name == "sample.py":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *rest])
            args = sample.parse()
        settings = args.settings
        run = args.checkpoint.parent.name.split("_stage")[0]  # runs/lm_stage3/last.pt was made by train_lm.py
        script = f"train_{run}.py" if (ROOT / f"train_{run}.py").exists() else "train_stl10.py"
    else:
        settings, script = [w for w in rest if w not in ("-h", "--help")], name
    namespace = {}
    for statement in ast.parse((ROOT / script).read_text()).body:
        for key, value in assigned(statement):
            if key.isupper():
                namespace[key] = literal(value)
    for word in placeholder:
        assert word.split("=")[0] in namespace, word
    common.override(namespace, settings)  # SystemExit where the script itself would refuse


def documents():
    found = [(p.name, ast.get_docstring(ast.parse(p.read_text()))) for p in [*TRAIN, ROOT / "sample.py"]]
    return found + ([(README.name, README.read_text())] if README.exists() else [])


@pytest.mark.parametrize("name, text", documents(), ids=lambda v: v if len(v) < 40 else "")
def test_every_command_parses(name, text):
    found = commands(text)
    assert found, f"{name} shows no command"
    for words in found:
        try:
            check_command(words)
        except SystemExit:
            pytest.fail(f"{name}: {shlex.join(words)}")
    # a continued command that lost its backslash, or two commands on one line
    for line in text.splitlines():
        assert not re.match(r"\s+([A-Z_]{2,}=\S+\s*)+$", line) or re.search(
            r"\\\n" + re.escape(line), text
        ), line
        assert (
            len(re.findall(r"python \S+\.py", line.split("#")[0])) <= 1 or "&&" in line or "`" in line
        ), line


def test_a_wrong_command_is_found():
    for line in (
        "python train_stl10.py EPOCH=3",
        "python train_stl10.py EPOCHS=many",
        "python train_nothing.py",
        "python train_stl10.py LR",
    ):
        with pytest.raises((SystemExit, AssertionError)):
            check_command(line.split())
    for line in ("python sample.py --checkpoint a.pt --no-such-flag", "python sample.py --prompt cat"):
        with pytest.raises(SystemExit):
            check_command(line.split())
    check_command("python train_stl10.py --lr 1e-4 EPOCHS=3 --batch-size=8".split())


@needs_readme
def test_the_lines_column_is_true():
    rows = re.findall(r"^\|\s*`?(?:\[`?)?(train_\w+\.py)[^|]*\|(.*)\|\s*$", README.read_text(), re.M)
    header = next(
        line for line in README.read_text().splitlines() if line.startswith("|") and "lines" in line
    )
    column = [cell.strip() for cell in header.strip("|").split("|")].index("lines") - 1
    assert rows
    for script, rest in rows:
        stated = rest.split("|")[column].strip().replace(",", "")
        if "@" in stated:
            pytest.skip(f"README.md still has {stated}")
        assert (ROOT / script).exists(), script
        assert (
            abs(int(stated) - (ROOT / script).read_text().count("\n")) <= MARGIN
        ), f"{script}: {stated} lines stated"


@needs_readme
def test_the_files_named_in_the_readme_exist():
    text = README.read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    missing = [p for p in pictures if not p.startswith("http") and not (ROOT / p).exists()]
    if "@" in text and missing:
        pytest.skip(f"README.md is unfinished: {missing}")
    assert not missing


@needs_readme
def test_ci_runs_the_readme_command():
    """.ci/run takes the first README line with pytest in it and runs it in a fresh clone."""
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK) and subprocess.run(["bash", "-n", str(run)]).returncode == 0
    text = run.read_text()
    picked = re.search(r"command=\$\((.+)\)", text)[1]
    command = subprocess.run(["bash", "-c", picked], cwd=ROOT, capture_output=True, text=True).stdout.strip(
        "\n"
    )
    assert "\n" not in command and command in README.read_text().splitlines()
    assert re.search(r'bash -c "\$command"', text) and "set -e" in text
    parts = [part.strip() for part in command.split("&&")]
    assert any("venv" in p for p in parts) and any(
        "pip install" in p and "requirements.txt" in p for p in parts
    )
    assert re.search(r"\bpytest\b.*\btests\b", parts[-1]), parts[-1]
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


# ------------------------------------------------------------------------------------------------------------
# Files


def test_requirements_are_the_six_pinned():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    pins = dict(re.fullmatch(r"([\w-]+)==(\d+(?:\.\d+)+)", line).groups() for line in lines)
    assert set(pins) == PACKAGES and len(lines) == 6


@named(SOURCES)
def test_imports_need_no_other_package(path):
    own = {p.stem for p in MODULES} | {"data"}
    optional = {"PIL", "tensorboard"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) else []
        )
        for name in (n.split(".")[0] for n in names):
            assert (
                name in sys.stdlib_module_names
                or name in own | PACKAGES | optional
                or path.parent.name == "benchmarks"
            ), name


@named(SOURCES)
def test_width_and_words(path):
    text = path.read_text()
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]
    assert not wide, f"lines over {WIDTH} columns: {wide}"
    assert not [word for word in FORBIDDEN if word in text]
    assert "\t" not in text and (not text or text.endswith("\n")) and not re.search(r"[ \t]+$", text, re.M)


@named(SOURCES)
def test_docstrings_keep_their_shape(path):
    """A reflow must not leave a bracket alone on the last line, nor shift the text of a docstring by one
    column."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (
            text := ast.get_docstring(node)
        ):
            for line in text.splitlines():
                assert not re.fullmatch(
                    r"\s*[\w.]{0,3}[)\]]+\.?", line
                ), f"{getattr(node, 'name', path.name)}: {line!r}"
                assert not re.match(r" \S", line), f"{getattr(node, 'name', path.name)}: {line!r}"
