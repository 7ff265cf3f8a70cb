"""Room 10: the packed script, the checks, the record, and what is made from records."""
import ast
import builtins
import collections
import contextlib
import copy
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import os
import re
import subprocess
import symtable
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Characters, fake_validation, tiny_config

import train_gpt
from train_gpt import SOURCE, Record, UsageError, pack_artifact, pack_source, strip_source, unpack_artifact


def run_script(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """Run Python in a folder, with these variables and no others; its end and text output."""
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True,
                          env={"PATH": "", **env})


def load_packed(folder, code: bytes | None = None):
    """Import the packed script, or its readable code, from a folder under a name of its own."""
    (folder / "packed_train_gpt.py").write_bytes(code or pack_source(SOURCE, train_gpt.Config()))
    sys.path.insert(0, str(folder))
    try:
        sys.modules.pop("packed_train_gpt", None)
        return __import__("packed_train_gpt")
    finally:
        sys.path.remove(str(folder))


def test_packing_is_deterministic_and_idempotent():
    packed = pack_source(SOURCE, train_gpt.Config())
    code = "import hashlib; from train_gpt import *; print(hashlib.sha256(pack_source(SOURCE, Config())).hexdigest())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "1", "PATH": ""})
    assert done.stdout.strip() == train_gpt.sha256(packed), "with other hashes of strings"
    assert pack_source(packed, train_gpt.Config()) == packed


@pytest.mark.parametrize("ending", [b'""', b'a"', b'"""', b"a\\", b"\0007", b"\r\n", b"a\0", b'\\"', b"\x005", b'"'])
def test_any_bytes_survive_the_literal(ending, monkeypatch):
    """Today's compressed code happens to hold only some of what must be escaped."""
    content = bytes(range(256)) + b'"""' + ending
    monkeypatch.setattr(train_gpt.brotli, "compress", lambda *_, **__: content)
    monkeypatch.setattr(train_gpt, "strip_source", lambda *_, **__: "")
    code = train_gpt.compress_source.__wrapped__(b"", ())
    literal = max((node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)
                   and isinstance(node.value, str)), key=len)
    assert literal.encode("latin1") == content


@pytest.mark.parametrize("preset", ["pr1541", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "pr1858", "pr1395", "pr1517", "smoke"))])
def test_every_pythons_packed_script_is_one_that_python_310_reads(preset):
    """No text in the braces of an f-string: from Python 3.12 on, ast.unparse quotes it as 3.10 cannot read it."""
    settings = {**vars(train_gpt.Config()), **train_gpt.PRESETS[preset], "preset": preset}
    tree = ast.parse(strip_source(SOURCE.decode(), **{name: settings[name] for name in train_gpt.PACKED_FOR}))
    inside = [part for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)
              for part in ast.walk(node.value) if isinstance(getattr(part, "value", None), str)]
    assert not inside, ast.unparse(inside[0])


def test_stripped_source_keeps_the_program_and_drops_what_readers_need():
    stripped = strip_source(SOURCE.decode())
    tree = ast.parse(stripped, feature_version=(3, 10))
    assert not any(isinstance(n, ast.arg) and n.annotation for n in ast.walk(tree))
    assert not any(ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    for name in ("Config", "GPT", "build_byte_luts", "pack_artifact", "unpack_artifact", "main"):
        assert re.search(rf"^(def|class) {name}\b", stripped, re.MULTILINE), name
    assert "tokens of one optimizer step" not in stripped and "train_batch_tokens" in stripped


def test_a_packed_script_holds_what_its_settings_need():
    """Branches of other settings go, and then what nothing refers to any more."""
    default, published = strip_source(SOURCE.decode()), strip_source(SOURCE.decode(), quantizer="sdclip")
    assert "def gptq_quantize" in published and "viterbi" not in published.lower() and "argmin" not in published
    assert "round_path" not in published
    assert "def gptq_quantize" not in default and "round_path" in default and "argmin" not in default
    embedded = strip_source(SOURCE.decode(), preset="smoke", corpus="embedded")
    assert "SentencePieceTrainer" in embedded and "SentencePieceTrainer" not in default
    assert "matrix_bits" in published and "matrix_bits" not in default, "nothing reads it"
    assert "embedding_dim" in default, "a constraint reads it"
    assert "LZMADecompressor" in strip_source(SOURCE.decode(), compressor="lzma") and "LZMADecompressor" not in default
    for gone in ("Welch", "submission.json", "matplotlib", "NodeTransformer", "author"):
        assert gone not in default, gone


def undefined_names(program: str) -> set[str]:
    """Global names that functions and classes of a program read and nothing defines."""
    top = symtable.symtable(program, "program", "exec")
    inner = list(top.get_children())
    for table in inner:
        inner.extend(table.get_children())
    known = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()} | {*dir(builtins)}
    return {s.get_name() for table in (top, *inner) for s in table.get_symbols()
            if s.is_global() and s.is_referenced()} - known - {"__file__", "__annotations__"}


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_name_in_a_packed_script_is_one_that_it_defines(preset):
    """Whatever is called like a setting: a function that only training calls would be missed when it is over."""
    assert undefined_names("import os\ndef f(a): return os, a, len(b)\nclass C:\n def m(d): return f, c") == {"b", "c"}
    settings = vars(train_gpt.Config.from_env({"PRESET": preset}))
    assert undefined_names(SOURCE.decode()) == set()
    assert undefined_names(strip_source(SOURCE.decode(), **settings)) == set()


def unknown_keywords(program: str) -> list[str]:
    """Keywords of calls of a program's own functions and classes, partial ones too, that they have no parameter of."""
    parameters: dict[str, set[str]] = collections.defaultdict(set)
    for top in ast.parse(program).body:
        fields = [line.target.id for line in getattr(top, "body", ()) if isinstance(line, ast.AnnAssign)]
        for node in ast.walk(top):
            if isinstance(node, ast.FunctionDef):
                name = top.name if node.name == "__init__" else node.name
                parameters[name] |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                parameters[name] |= {"**"} if node.args.kwarg else set()
        if isinstance(top, ast.ClassDef):
            parameters[top.name] |= {*fields}
    unknown = []
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call):
            called = node.args[0] if ast.unparse(node.func) == "functools.partial" else node.func
            own = parameters.get(called.id if isinstance(called, ast.Name) else getattr(called, "attr", ""), {"**"})
            if isinstance(called, ast.Name) or ast.unparse(called).startswith("self."):
                unknown += [ast.unparse(node) for word in node.keywords if word.arg and not {word.arg, "**"} & own]
    return unknown


@pytest.mark.parametrize("env", [*({"PRESET": preset} for preset in train_gpt.PRESETS), {
    "QUANTIZER": "sdclip", "SELECTIVE_PRUNING_ENABLED": "1", "PPM_ENABLED": "1", "PREQUANT_TTT_ENABLED": "1"}], ids=str)
def test_parameters_that_are_named_keep_their_names(env):
    """A call may name them at second hand."""
    planted = ("def f(a, b=1): pass\ndef g(**c): pass\nclass C(T):\n  d: int\nclass D:\n  def __init__(self, e): pass\n"
               "f(b=1)\nC(d=2)\nD(e=3)\ng(h=4)\nzeros(i=5)\nfunctools.partial(f, b=6)\n")
    assert not unknown_keywords(planted) and len(unknown_keywords(planted.replace("b=1): pass", "j=1): pass"))) == 2
    settings = vars(train_gpt.Config.from_env(env))
    assert unknown_keywords(SOURCE.decode()) == [] == unknown_keywords(strip_source(SOURCE.decode(), **settings))


def test_attributes_are_renamed_where_nothing_else_is_called_so():
    program = """
import os.path as files
class Config:
    a_field: int = 1
    from_env: int = 2
class Rank(object):
    def two_words(self, other): self.log_file, self.told_here, other.of_others = 1, 2, 3; return self.inner_one()
    def inner_one(self): self.is_file = self.a_field = self.word = 4; return files.is_file(self)
class Model(nn.Module):
    def a_method(self): self.a_weight = self.two_words
SOURCE = "told_here's text", Rank.from_env, f"{SOURCE.log_file}", Model.a_method, x.two_words.log_file
"""
    tree = ast.parse(program)
    train_gpt.shorten_attributes(tree)
    short = ast.unparse(tree)
    kept = "a_field from_env told_here of_others is_file word a_weight".split()
    assert all(name in short for name in kept)
    assert not re.search("two_words|log_file|inner_one|a_method", short)
    assert "{SOURCE._c}" in short and "Model._d, x._a._c" in short and "return self._b()" in short


@pytest.mark.parametrize("source", [train_gpt.TRELLIS_SOURCE, train_gpt.PPM_SOURCE], ids=["trellis", "PPM"])
def test_short_c_is_the_same_program(source, tmp_path):
    """To the compiler: it makes the same code of both, but for names that it keeps for other files."""
    short = train_gpt.shorten_c(source)
    assert len(short) < 0.6 * len(source) and "/*" not in short
    assembly = []
    for text in (source, short):
        done = subprocess.run(["cc", "-O1", "-fno-toplevel-reorder", "-S", "-xc", "-", "-o", "-"], input=text,
                              capture_output=True, text=True, check=True)
        assembly.append([line for line in done.stdout.splitlines() if line.startswith("\t") and line[1] != "."
                         and "call" not in line])
    assert assembly[0] == assembly[1] and len(assembly[0]) > 90


def test_branches_are_decided_and_blanks_dropped():
    program = """
PACKED = False
def one(config, other):
    if config.quantizer == "sdclip" and other:
        return unused()
    elif config.corpus == "embedded" or not other == 2:
        x = f"{other:>4} a , b"  # blanks in strings stay
        return x if config.quantizer == "trellis" else unused()
    if PACKED:
        return 'p = q'
    return unused()
def unused():
    return 1
SOURCE = [one(type('C', (), dict(quantizer='trellis', corpus='shards')), n) for n in (1, 2)]
"""
    stripped = strip_source(program)
    space = {}
    exec(stripped, space)
    assert space["SOURCE"] == ["   1 a , b", "p = q"] and "unused" not in stripped
    assert stripped.count("return") == 2 and " = " in stripped and "=[" in stripped


def test_names_are_shortened_consistently():
    """Closures, f-strings, keywords and fields survive the renaming; distinct names stay distinct."""
    program = '''
from dataclasses import dataclass
LIMIT_OF_ALL = 3
@dataclass
class Holder:
    """Doc."""
    number_of_things: int = 2
    def total_value(self, extra_amount: int = 1, *, keyword_only=5) -> int:
        """Doc."""
        inner_sum: int = self.number_of_things + extra_amount
        self.amount_so_far: int = 0
        def closure_function(): return inner_sum + LIMIT_OF_ALL
        try: raise ValueError(-1)
        except ValueError as caught_error: inner_sum += caught_error.args[0] + 1
        return closure_function() + keyword_only + self.amount_so_far
result_text = f"{LIMIT_OF_ALL:>3} {Holder().total_value(4, keyword_only=6)} {[item_here for item_here in range(2)]}"
RESULT = [result_text, Holder(number_of_things=9).number_of_things]
'''
    stripped = strip_source(program)
    long_names = ("LIMIT_OF_ALL", "inner_sum", "closure_function", "item_here", "extra_amount", "result_text",
                  "caught_error")
    assert not any(name in stripped for name in long_names)
    program, spaces = program.replace("RESULT", "SOURCE"), [{}, {}]
    for text, space in zip((program, strip_source(program)), spaces):
        space["__name__"] = "anything"
        sys.modules["anything"] = type(sys)("anything")
        exec(text, space)
    assert spaces[0]["SOURCE"] == spaces[1]["SOURCE"] == ["  3 15 [0, 1]", 9]


def test_what_acts_is_kept_although_nothing_reads_its_name():
    """The readable script does it, so that the packed one would be another program."""
    program = """
import atexit
def helper(): CALLS.append(1)
CALLS, SOURCE = [], 0
_ = helper()
@atexit.register
def at_the_end(): pass
@functools.cache
def unread(): pass
UNREAD = 5
"""
    stripped, space = strip_source(program), {}
    exec(stripped, space)
    assert [1] in space.values() and "atexit.register" in stripped
    assert "5" not in stripped and "functools" not in stripped


def test_what_the_run_alone_knows_is_left_to_it():
    """A condition is decided where PACKED and the settings that are packed for decide it, and nowhere else."""
    program = """
PACKED = False
def one(config, seed):
    found = [1 if config.quantizer else 2, 3 if seed and config.ppm_enabled else 4, PACKED]
    if seed == 5 or config.corpus == "embedded":
        found.append("by the run")
    if not PACKED and seed:
        found.append("never")
    if len(found) > 9 or config.seed:
        found.append("both")
    elif config.swa_every == 0:
        found.append("by the setting")
    return found
SOURCE = [one(type("C", (), dict(seed=seed, corpus="shards", ppm_enabled=False)), seed) for seed in (0, 5)]
"""
    space, stripped = {}, strip_source(program)
    exec(stripped, space)
    assert space["SOURCE"] == [[1, 4, True, "by the setting"], [1, 4, True, "by the run", "both"]]
    assert "never" not in stripped and "quantizer" not in stripped and "swa_every" not in stripped


def test_packed_script_computes_the_same(tmp_path):
    packed = load_packed(tmp_path)
    config, other = tiny_config(), packed.Config.from_env({k.upper(): str(int(v) if isinstance(v, bool) else v)
                                                           for k, v in tiny_config().in_force().items()})
    kept = [field.name for field in dataclasses.fields(packed.Config)]
    assert len(kept) > 60 and all(getattr(config, name) == getattr(other, name) for name in kept)
    torch.manual_seed(0)
    ours = train_gpt.GPT(config)
    torch.manual_seed(0)
    theirs = packed.GPT(other)
    ids = torch.arange(64).view(2, 32)
    assert torch.equal(ours(ids, ids), theirs(ids, ids))
    stored = {"preset": "pr1541", "seed": 7, "matrix_clip_sigmas": 9.0, "matrix_lr": 0.01}
    assert not hasattr(packed.Config, "matrix_clip_sigmas"), "QUANTIZER=trellis does not read it"
    assert packed.Config.from_env({}, stored).matrix_lr == train_gpt.Config.from_env({}, stored).matrix_lr == 0.01
    elsewhere = {**stored, "data_path": "elsewhere", "log_dir": "elsewhere", "run_id": "x"}
    assert packed.Config.from_env({}, elsewhere) == packed.Config.from_env({}, stored), "never an artifact's business"
    tensors = {"a": torch.arange(10, dtype=torch.int8)}
    assert packed.pack_artifact(tensors, {"x": 1}) == train_gpt.pack_artifact(tensors, {"x": 1})
    assert ".project(" in inspect.getsource(packed.GPT.mlp), "its source is registered: Triton, for one, asks for it"
    assert pack_source(SOURCE, config) == packed.SOURCE, "the packed script must count itself, not what it unpacks to"


@pytest.mark.parametrize("name, text", [
    ("LN_SCALE", "0"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("PARALLEL_RESIDUAL", "plain"), ("PPM_ENABLED", "1"), ("MUON_ROW_NORMALIZE", "0")))])
def test_what_a_packed_script_is_made_for_stands_in_record_and_artifact(
        tmp_path, monkeypatch, name, text):
    """Although it is the default there: another script would score the artifact as another model's, and silently."""
    readable = train_gpt.Config.from_env({name: text})
    monkeypatch.setattr(train_gpt, "shorten_names", lambda tree: None)
    monkeypatch.setattr(train_gpt, "shorten_attributes", lambda tree: None)
    packed = load_packed(tmp_path, strip_source(SOURCE.decode(), **vars(readable)).encode())
    made_by_it = packed.Config.from_env({})
    assert made_by_it.in_force() == readable.in_force() and name.lower() in readable.in_force()
    told = unpack_artifact(pack_artifact({}, packed.artifact_header(made_by_it)))[1]
    assert told == train_gpt.artifact_header(readable)
    assert getattr(train_gpt.Config.from_env({}, told["settings"]), name.lower()) == getattr(readable, name.lower())
    others = train_gpt.artifact_header(train_gpt.Config.from_env({}))["settings"]
    with pytest.raises(ValueError, match=name):
        packed.Config.from_env({}, others)


@pytest.mark.parametrize("env", [
    {"PRESET": "pr1858", "QUANTIZER": "trellis"}, {"PRESET": "smoke", "CORPUS": "shards"},
    {"PRESET": "pr1517", "SMEAR_GATE_ENABLED": "0", "RECUR_START_STEP": "0", "LATE_QAT_THRESHOLD": "0"}], ids=str)
def test_what_a_packed_script_is_made_for_needs_no_variable(env, tmp_path, monkeypatch):
    """Nor does its preset hide it, whose values it overrides: its record would name a quantizer that it has not."""
    readable = train_gpt.Config.from_env(env)
    monkeypatch.setattr(train_gpt, "join_lines", lambda code: code)
    packed = load_packed(tmp_path, strip_source(SOURCE.decode(), **vars(readable)).encode())
    bare, names = packed.Config.from_env({}), [field.name for field in dataclasses.fields(packed.Config)]
    assert {name: getattr(bare, name) for name in names} == {name: getattr(readable, name) for name in names}


def test_packed_script_reports_bad_input_as_the_readable_one(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(pack_source(SOURCE, train_gpt.Config()))
    for env, values in (({"SEED": "x", "TTT_EPOCH": "1"}, {"SEED", "'x'"}), ({"NUM_HEADS": "7"}, {"NUM_HEADS=7"})):
        with pytest.raises(UsageError) as readable:
            train_gpt.read_config(env)
        done = run_script(tmp_path, "train_gpt.py", **env)
        assert done.returncode == 2 and done.stderr.startswith("train_gpt.py: ")
        assert all(value in done.stderr and value in str(readable.value) for value in values)
    done = run_script(tmp_path, "train_gpt.py", PATH=os.environ["PATH"], DATA_DIR="nowhere")
    line, value = re.match(r"train_gpt.py: \((\d+), PosixPath\('nowhere/tokenizers/", done.stderr)[1], "no tokenizer at"
    assert done.returncode == 2 and value in SOURCE.decode().splitlines()[int(line) - 1]


def test_the_packed_script_packs_itself_and_refuses_what_it_is_not_packed_for(tmp_path):
    code = pack_source(SOURCE, train_gpt.Config())
    (tmp_path / "train_gpt.py").write_bytes(code)
    for env in ({"MODE": "collect"}, {"PRESET": "smoke"}, {"QUANTIZER": "sdclip"}, {"ATTENTION": "plain"},
                {"MODE": "pack", "OUT_DIR": "made"}):
        done = run_script(tmp_path, "train_gpt.py", **env)
        (name, value), = list(env.items())[:1]
        if value == "pack":
            assert done.returncode == 0 and f"{len(code)} bytes" in done.stdout, done.stderr
        else:
            assert done.returncode == 2 and f"'{name}', '{value}')" in done.stderr, done.stderr
    assert (tmp_path / "made" / "train_gpt.py").read_bytes() == code


UNCOUNTED = {
    "brotli.py": "print('uncounted')",
    "difflib/__init__.py": "print('uncounted')",
    "opt_einsum.py": "print('uncounted')\nraise ImportError",  # PyTorch does without it, and leaves no trace of it
    "numpy.py": "import os, sys\nprint('uncounted')\ndel sys.modules['numpy']\nsys.path.remove(os.path.dirname("
                "os.path.abspath(__file__)))\nimport numpy",  # the real one takes its place
}


@pytest.mark.parametrize("packed, name", [
    *((True, name) for name in UNCOUNTED), (False, "opt_einsum.py"),
    *(pytest.param(False, name, marks=pytest.mark.slow) for name in UNCOUNTED if name != "opt_einsum.py")])
def test_code_beside_the_script_is_not_run(tmp_path, packed, name):
    """It would not be counted. A text or a folder of a module's name lies there, too, and does no harm."""
    (tmp_path / "train_gpt.py").write_bytes(pack_source(SOURCE, train_gpt.Config()) if packed else SOURCE)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(UNCOUNTED[name])
    (tmp_path / "token.txt").write_text("secret")
    (tmp_path / "platform").mkdir()
    done = run_script(tmp_path, "train_gpt.py", MODE="pack")
    assert done.returncode == 0 and "uncounted" not in done.stdout, done.stderr


def test_no_later_import_finds_code_beside_the_script(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(SOURCE)
    (tmp_path / "flash_attn_interface.py").write_text("print('uncounted')")
    done = run_script(tmp_path, "train_gpt.py", ATTENTION="fa3", PRESET="smoke")
    assert done.returncode == 2 and "ATTENTION=fa3 needs a Hopper GPU" in done.stderr, done.stderr
    assert "uncounted" not in done.stdout


@pytest.mark.parametrize("name", ["__future__", "keyword", "os", "sys"])
def test_nothing_is_imported_before_the_scripts_folder_is_left_out(tmp_path, name):
    """By then a module beside the script has run: it could put the real one in its place and leave no trace."""
    first = list(itertools.takewhile(lambda node: not isinstance(node, ast.If), ast.parse(SOURCE).body))
    assert {alias.name for node in first if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names} == {
        "os", "sys"} and not any(isinstance(node, ast.ImportFrom) for node in first)
    (tmp_path / f"{name}.py").write_text("print('uncounted')")
    (tmp_path / "train_gpt.py").write_bytes(SOURCE)
    done = run_script(tmp_path, "train_gpt.py", MODE="pack")
    assert done.returncode == 0 and "uncounted" not in done.stdout, done.stderr


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["pipe", "module", "exchanged"])
def test_what_runs_is_what_the_file_holds(tmp_path, way, packed):
    """A script from a pipe is gone when it reads itself; `python -m` imports from its folder before the first line.

    What was counted and hashed would be another.
    """
    code = pack_source(SOURCE, train_gpt.Config()) if packed else SOURCE
    (tmp_path / "train_gpt.py").write_bytes(code)
    other = ("space = {'__name__': '__main__', '__file__': 'train_gpt.py', '__spec__': None}\n"
             "code = open('train_gpt.py', 'rb').read() + b'other = 1'\n"
             "exec(compile(code, 'train_gpt.py', 'exec'), space)")
    command = {"pipe": ["/dev/stdin"], "module": ["-m", "train_gpt"], "exchanged": ["-c", other]}[way]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True,
                          input=code if way == "pipe" else b"", env={"PATH": "", "MODE": "pack"})
    assert done.returncode != 0 and not (tmp_path / "out").exists(), done.stderr
    said = b"name the file" if way == "module" else b"does not hold the code that runs"
    assert packed or (said in done.stderr and done.returncode == 2), done.stderr


def test_an_encoding_that_hides_code_is_refused(tmp_path):
    """The packer would read a comment where Python reads a line of code."""
    hidden = b"# coding: raw_unicode_escape\n# \\u000aprint('uncounted')\n"
    (tmp_path / "train_gpt.py").write_bytes(hidden + SOURCE)
    done = run_script(tmp_path, "train_gpt.py", MODE="pack")
    assert done.returncode == 2 and "does not hold the code that runs" in done.stderr and "uncounted" in done.stdout


VENV = "venv/lib/python3.10/site-packages"


@pytest.mark.parametrize("place, name", [pytest.param(
    place, name, marks=[] if (place, name) in ((".", "difflib.py"), ("a/b/c", "difflib.py"), (VENV, "difflib.py"))
    else pytest.mark.slow) for place in (".", "lib", "a/b/c", "my-site-packages", VENV)
    for name in ("difflib.py", "difflib/__init__.py", "later.py")])
def test_code_anywhere_below_the_script_is_refused(place, name, tmp_path):
    """It came by way of PYTHONPATH. The packages of a virtual environment that lies there are not meant."""
    module = tmp_path / place / name
    module.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "train_gpt.py").write_bytes(SOURCE)
    module.write_text(Path(difflib.__file__).read_text())
    code = "import train_gpt; train_gpt.check_code(); import later"
    command = ["-c", code] if name == "later.py" else ["train_gpt.py"]
    done = run_script(tmp_path, *command, MODE="help", PYTHONPATH=str(tmp_path / place))
    said = "No module named 'later'" if name == "later.py" else f"{module}: imported from the script's folder"
    assert (done.returncode != 0 and said in done.stderr) if place != VENV else done.returncode == 0, done.stderr


def test_source_has_only_python_310_grammar():
    ast.parse(SOURCE, feature_version=(3, 10))
    lines = SOURCE.splitlines()
    for node in ast.walk(ast.parse(SOURCE)):  # nested same quotes in an f-string: PR #1541 did not parse on 3.10
        if isinstance(node, ast.JoinedStr) and node.lineno == node.end_lineno:
            text = lines[node.lineno - 1][node.col_offset:node.end_col_offset].decode()
            quote = re.match(r"\w*(\"\"\"|'''|\"|')", text)
            if quote:
                assert text.count(quote[1]) == 2, text


@pytest.mark.parametrize("mode", ["pack", "train"])
def test_the_running_script_is_never_overwritten(mode):
    with pytest.raises(UsageError, match="would overwrite"):
        train_gpt.read_config({"MODE": mode, "OUT_DIR": str(ROOT)})


@pytest.mark.parametrize("running", [True, False])
def test_the_running_script_is_not_overwritten_though_it_is_a_packed_one(tmp_path, monkeypatch, running):
    (tmp_path / "train_gpt.py").write_bytes(train_gpt.PACKED_FIRST_LINE + b"...")
    monkeypatch.setattr(train_gpt, "__file__", str(tmp_path / ("train_gpt.py" if running else "another.py")))
    with pytest.raises(UsageError, match="would overwrite") if running else contextlib.nullcontext():
        train_gpt.read_config({"MODE": "pack", "OUT_DIR": str(tmp_path)})


@pytest.mark.parametrize("mode, refused", [("train", True), ("pack", True), ("eval", False)])
def test_another_projects_script_is_never_overwritten(tmp_path, mode, refused, monkeypatch):
    monkeypatch.setattr(train_gpt, "read_artifact", lambda folder: pack_artifact({}, {"settings": {}}))
    env = {"MODE": mode, "OUT_DIR": str(tmp_path)}
    (tmp_path / "train_gpt.py").write_bytes(pack_source(SOURCE, train_gpt.Config()))
    train_gpt.read_config(env)
    (tmp_path / "train_gpt.py").write_text("print('somebody else')")
    with pytest.raises(UsageError, match="would overwrite") if refused else contextlib.nullcontext():
        train_gpt.read_config(env)


STAGE = {"val_loss": 2.0, "val_bpb": 1.5, "seconds": 1.0}


@pytest.fixture
def record(tmp_path, rt):
    config = tiny_config(log_dir=tmp_path)
    record = Record(config, rt, "run")
    record.set(steps=5, train_seconds=100.0, calibration_seconds=5.0, quantize_seconds=5.0, artifact_seconds=111.0,
               eval_seconds=50.0, tokens_per_second=1000, val_tokens=50, val_bytes=100, val_sha256="5",
               quantized=STAGE, prequant=STAGE, artifact_bytes=15_000_000, code_bytes=20_000, total_bytes=15_020_000,
               code_sha256=train_gpt.sha256(pack_source(SOURCE, train_gpt.Config())))
    return record


ALL_ALONG = ["byte_count", "split_text", "held_out", "warm_up_undone", "shards_unchanged", "weights_kept", "causal",
             "normalized", "single_pass_prequant", "single_pass_quantized", "normalized_quantized"]
OF_SLIDING = ["single_pass_sliding", "normalized_sliding"]
OF_TTT = ["single_pass_ttt", "score_before_update_ttt", "normalized_ttt"]


def finish(record, left_out: int = 0, checks=(*ALL_ALONG, *OF_SLIDING, *OF_TTT), **settings):
    val = fake_validation(torch.ones(11), tiny_config())
    val.left_out = left_out
    for name in checks:
        record.check(name, True, "")
    train_gpt.final_checks(record, tiny_config(**settings), val)


def outcome(record, name):
    return next(check["ok"] for check in record.data["checks"] if check["name"] == name)


@pytest.mark.parametrize("figures, failing", [
    ({}, None), ({"total_bytes": 16_000_001}, "total_bytes"), ({"total_bytes": 16_000_000}, None),
    ({"artifact_seconds": 600.1}, "train_seconds"), ({"eval_seconds": 600.1}, "eval_seconds")])
def test_limits_of_the_contest(record, figures, failing):
    record.set(**figures)
    finish(record)
    assert record.data["compliant"] == (failing is None)
    assert [check["name"] for check in record.data["checks"] if not check["ok"]] == ([failing] if failing else [])


@pytest.mark.parametrize("sliding, ttt", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_a_check_that_did_not_take_place_is_not_passed(record, sliding, ttt):
    """What is switched on decides which there must be."""
    needed = [*ALL_ALONG, *OF_SLIDING * sliding, *OF_TTT * ttt]
    for missing in (None, *needed):
        record.data["checks"].clear()
        finish(record, checks=[name for name in needed if name != missing], sliding_window_enabled=sliding,
               ttt_enabled=ttt)
        assert record.data["compliant"] == (missing is None), missing
        assert missing is None or missing in record.data["checks"][-1]["detail"]


@pytest.mark.parametrize("setting, missing", [
    ("ppm_enabled", "ppm_normalized"), ("prequant_ttt_enabled", "no_early_training"),
    ("prequant_ttt_enabled", "single_pass_prequant_ttt")])
def test_what_is_switched_on_besides_has_its_checks(record, setting, missing):
    checks = [*ALL_ALONG, *OF_SLIDING, *OF_TTT, "ppm_normalized", "no_early_training", "single_pass_prequant_ttt"]
    finish(record, checks=checks, **{setting: 1})
    assert record.data["compliant"]
    record.data["checks"].clear()
    finish(record, checks=[name for name in checks if name != missing], **{setting: 1})
    assert not record.data["compliant"] and missing in record.data["checks"][-1]["detail"]


def test_dropped_tail_is_not_compliant(record):
    finish(record, left_out=7)
    assert not outcome(record, "full_split") and not record.data["compliant"]


def test_single_pass_check_counts_targets(record, rt):
    """A target scored twice or never fails the check, and the figure is written all the same."""
    for plant in (lambda s: None, lambda s: s.add(torch.tensor([[3]]), torch.ones(1, 1))):
        val = fake_validation(torch.full((11,), 7), tiny_config())
        scores = train_gpt.Scores(rt, val)
        scores.add(torch.arange(10)[None], torch.ones(1, 10))
        plant(scores)
        record.data["checks"].clear()
        record.stage("sliding", scores)
        planted = scores.times_scored.max() > 1
        assert outcome(record, "single_pass_sliding") != planted
    assert record.data["sliding"]["val_loss"] == pytest.approx(1.1)


class Folding(Characters):
    """Decodes one more token to what another stands for."""

    def decode(self, ids):
        return super().decode([97 if i == 250 else i for i in ids])


def test_letters_of_any_script_count(record):
    """A split that repeats itself in Cyrillic behind a little English."""
    class Cyrillic(Characters):
        def id_to_piece(self, token):
            return chr(token) if token < 128 else chr(0x400 + token)

    rng = np.random.default_rng(0)
    english, once = rng.integers(97, 120, 20_000), rng.integers(150, 200, 20_000)
    for again, ok in ((rng.integers(150, 200, 20_000), True), (once, False)):
        val = fake_validation(torch.from_numpy(np.concatenate([english, once, again])), tiny_config(VOCAB_SIZE=300))
        keys = train_gpt.passage_keys(val.tokens.numpy(), types.SimpleNamespace(
            tokenizer=Cyrillic(), sha256="5", bytes=val.bytes))
        assert (len(np.unique(keys)) > 0.9 * len(keys)) == ok and len(keys) > 100


def test_the_splits_text_must_be_its_tokens_and_not_repeat_itself(record):
    rng = np.random.default_rng(0)
    short = [np.array([1, 97 + i, 98]) for i in range(9)]  # documents weigh by their tokens
    document = np.concatenate([[1], rng.integers(97, 120, 20_000)])
    periodic = np.concatenate([[1], np.tile([97, 98], 10_000)])
    other = np.concatenate([[1], rng.integers(97, 120, 20_000)])
    changed = document.copy()
    changed[5] = 250  # decodes to what encodes to another token
    fifth, foreign = document[:10_000], np.concatenate([[1, 250], rng.integers(97, 120, 6000)])
    for documents, ok in (((document, other), True), ((document, document), False), ((changed, other), False),
                          ((changed, *short), False), ((periodic,), False),
                          ((other, document, fifth), False), ((other, document, foreign), False)):
        tokens = np.concatenate(documents)
        val = fake_validation(tokens, tiny_config())
        val.target_bytes = torch.tensor((tokens[1:] > 1).astype(np.int64))
        val.bytes, val.tokenizer = int(val.target_bytes.sum()), Folding()
        record.data["checks"].clear()
        train_gpt.check_split(record, val)
        assert outcome(record, "byte_count") and outcome(record, "split_text") == ok


@pytest.mark.parametrize("more, ok", [(1000, True), (5000, False)])
def test_what_is_no_text_may_not_outnumber_what_is_foreign(record, more, ok):
    """A document that is nothing but BOS encodes to itself: ten for each token, and any tokenizer's tokens passed."""
    text = np.random.default_rng(0).integers(97, 120, 20_000)
    val = fake_validation(np.concatenate([[1], text, np.ones(more, int)]), tiny_config())
    val.target_bytes = (val.tokens[1:] > 1).long()
    val.bytes, val.tokenizer = 20_000, Characters()
    train_gpt.check_split(record, val)
    assert outcome(record, "byte_count") and outcome(record, "split_text") == ok


@pytest.mark.parametrize("share, ok", [(0.7, True), (0.35, False)])
def test_half_of_a_split_must_be_letters(record, share, ok):
    """What is hardly any letters has hardly any passages to be found in the training shards."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(200_000) < share, rng.integers(97, 120, 200_000), rng.integers(33, 47, 200_000))
    tokens[0] = 1
    val = fake_validation(tokens, tiny_config())
    val.target_bytes = torch.ones(199_999, dtype=torch.int64)
    val.bytes, val.tokenizer = 199_999, Characters()
    train_gpt.check_split(record, val)
    assert outcome(record, "byte_count") and outcome(record, "split_text") == ok


def test_quotes_and_blanks_beyond_ascii_are_no_letters():
    """A page that was copied with no-break spaces and curly quotes is the same text, also if byte pieces spell them."""
    class Pieces(Characters):
        def is_byte(self, token):
            return token in (2, 8)

        def id_to_piece(self, token):
            return {2: "<0xC2>", 3: "\u00a0", 4: "\u201c", 5: "\u00c4", 6: "\u200b", 7: "_", 8: "<0xA0>"}.get(
                token, chr(token))

    tokens = np.random.default_rng(0).integers(97, 123, 5000)
    tokens[::9] = 5
    val = types.SimpleNamespace(tokenizer=Pieces(), sha256="5", bytes=9000)
    keys = train_gpt.passage_keys(tokens, val)
    assert len(keys) > 300
    for sign in ([3], [4], [6], [7], [2, 8], [2], [8], [2, 3, 8]):  # no-break blanks, and bytes that are no text
        other = np.concatenate([[*sign, *tokens[i:i + 90]] for i in range(0, 5000, 90)])
        assert np.array_equal(train_gpt.passage_keys(other, val), keys), sign
    assert not np.isin(keys, train_gpt.passage_keys(tokens[tokens != 5], val)).any(), "it is a letter"


def test_a_letter_that_byte_pieces_spell_is_that_letter():
    """A copy of the split whose text is the same, and whose tokens are not, is a copy."""
    class Spelled(Characters):
        def is_byte(self, token):
            return token in (2, 3, 4)

        def id_to_piece(self, token):
            return {2: "<0xD0>", 3: "<0xB0>", 4: "<0x58>", 5: "\u0430"}.get(token, chr(token))

    tokens = np.random.default_rng(0).choice([5, *range(97, 123)], 5000)
    tokens[::7] = ord("x")
    val = types.SimpleNamespace(tokenizer=Spelled(), sha256="5", bytes=9000)
    keys = train_gpt.passage_keys(tokens, val)
    spelled = np.concatenate([{5: [2, 3], ord("x"): [4]}.get(token, [token]) for token in tokens.tolist()])
    assert len(spelled) > len(tokens) and len(keys) > 300
    assert np.array_equal(train_gpt.passage_keys(spelled, val), keys)


def test_every_document_is_looked_at(record):
    """Wherever it stands: a byte too many in one of 2500 documents, or text that encodes otherwise."""
    rng = np.random.default_rng(0)
    honest = np.concatenate([np.concatenate([[1], rng.integers(97, 120, 100)]) for _ in range(2500)])
    for place in (5, 101 * 1500 + 5, len(honest) - 1):
        tokens = honest.copy()
        tokens[place] = 250
        val = fake_validation(tokens, tiny_config())
        val.target_bytes, val.tokenizer = torch.tensor((tokens[1:] > 1).astype(np.int64)), Folding()
        val.bytes = int(val.target_bytes.sum())
        record.data["checks"].clear()
        train_gpt.check_split(record, val)
        assert outcome(record, "byte_count") and record.data["checks"][1]["detail"].startswith("101 of 252499 tokens")
        val.target_bytes[place - 1], val.bytes = 2, val.bytes + 1
        record.data["checks"].clear()
        train_gpt.check_split(record, val)
        assert not outcome(record, "byte_count")
        assert record.data["checks"][0]["detail"].endswith(f"1 differ from the byte tables: [{place // 101 * 101}]")


def test_passages_are_chosen_by_the_text_and_the_salt():
    """Whoever alters a text where one choice of passages begins leaves another choice's passages as they are."""
    tokens = np.random.default_rng(0).integers(97, 123, 50_000)
    val = fake_validation(tokens, tiny_config())
    val.tokenizer, val.bytes = Characters(), 2**21  # a passage for every 512 letters
    one, other = (train_gpt.passage_keys(tokens, val, salt) for salt in "ab")
    assert min(len(one), len(other)) > 60 and not np.isin(one, other).any()
    assert len(np.unique(one)) == len(one)
    moved = np.concatenate([tokens[20_000:], tokens[:20_000]])
    assert np.isin(one, train_gpt.passage_keys(moved, val, "a")).mean() > 0.96
    altered, letters = tokens.copy(), tokens.astype(np.uint64)
    seed = int(train_gpt.sha256(b"0a"), 16)
    multipliers = np.random.default_rng(seed).integers(2**63, size=256, dtype=np.uint64) | np.uint64(1)
    chances = sum(letters[i:len(letters) - 7 + i] << np.uint64(8 * i) for i in range(8)) * multipliers[0]
    altered[:-7][chances >> np.uint64(32) < 2**32 // train_gpt.passage_distance(val)] = 97
    assert np.isin(one, train_gpt.passage_keys(altered, val, "a")).mean() < 0.1
    assert np.isin(other, train_gpt.passage_keys(altered, val, "b")).mean() > 0.5


def test_passages_are_those_of_the_letters_wherever_they_are_cut():
    """Other blanks, other capitals, other documents: the same passages. In pieces of a shard as in one."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(97, 123, 30_000)
    val = fake_validation(tokens, tiny_config())
    val.tokenizer = Characters()
    keys = np.sort(train_gpt.passage_keys(tokens, val))
    assert len(keys) > 30
    cut = np.insert(tokens, np.arange(0, len(tokens), 12), rng.choice([1, 32, 46], 2500))
    assert np.array_equal(np.sort(train_gpt.passage_keys(np.where(rng.random(len(cut)) < 0.5, cut, np.where(
        cut >= 97, cut - 32, cut)), val)), keys)
    long = np.concatenate([rng.integers(97, 123, 2**21), tokens])
    assert np.isin(keys, train_gpt.passage_keys(long, val)).all()
    assert not len(train_gpt.passage_keys(tokens[:100], val))


def test_layout_changes_nothing_but_the_layout(monkeypatch):
    """Lines joined, parentheses and blanks dropped: the same syntax tree, but for imports on one line."""
    packed = strip_source(SOURCE.decode())
    monkeypatch.setattr(train_gpt, "join_lines", lambda source: source)
    plain = strip_source(SOURCE.decode())
    trees = [ast.parse(source) for source in (packed, plain)]
    for tree in trees:
        tree.body = [one for node in tree.body for one in (
            [ast.Import([name]) for name in node.names] if isinstance(node, ast.Import) else [node])]
    assert ast.dump(trees[0]) == ast.dump(trees[1]) and len(packed) < 0.8 * len(plain)


def test_byte_count_check_sees_a_doubled_space(record):
    tokens = np.array([1, 97, 98, 32, 99, 1, 97, 32, 32, 98, 1, 99])
    val = fake_validation(tokens, tiny_config())
    honest = torch.tensor((tokens[1:] > 1).astype(np.int64))
    doubled = honest + torch.tensor((tokens[1:] == 32).astype(np.int64))
    for target_bytes, total, ok in ((honest, 9, True), (doubled, 12, False), (honest, 10, False)):
        val.target_bytes, val.bytes, val.tokenizer = target_bytes, total, Characters()
        record.data["checks"].clear()
        train_gpt.check_split(record, val)
        assert outcome(record, "byte_count") == ok


def test_record_is_complete_json_with_null_for_what_was_not_measured(record):
    data = json.loads(record.path.read_text())
    wanted = """run_id preset seed settings hardware world_size python torch attention_backend steps train_seconds
        calibration_seconds quantize_seconds step_ms tokens_per_second peak_memory_mib val_tokens val_bytes
        prequant quantized sliding ttt artifact_bytes code_bytes total_bytes eval_seconds compliant checks""".split()
    assert set(wanted) <= set(data)
    assert data["ttt"] is None and data["compliant"] is None


# --- from records to a submission -------------------------------------------------------------------------------------


def told_by(record) -> list[str]:
    """The lines of a log that say the same as its record."""
    shown = {key.upper(): int(v) if isinstance(v, bool) else v for key, v in record["settings"].items()}
    labels = {"prequant": "pre-quantization post-ema", "prequant_ttt": "pre-quantization post-ttt",
              "quantized": "quantized", "sliding": "quantized_sliding_window", "ttt": "quantized_ttt",
              "ppm": "quantized_ppm"}
    return [*(f"{key}: {record[key]}" for key in record if not isinstance(record[key], (dict, list, type(None)))),
            "settings: " + " ".join(f"{name}={value}" for name, value in shown.items()),
            *(f"check {check['name']}: {'ok' if check['ok'] else 'FAILED'} ({check['detail']})"
              for check in record["checks"]),
            *(f"{label} {train_gpt.score_line(record[stage])}" for stage, label in labels.items() if record[stage])]


def collected(tmp_path, monkeypatch, records, readme=None, logs_of=None, **settings):
    """What MODE=collect makes of these records, each with the log that its run would have written (or another's)."""
    monkeypatch.chdir(tmp_path)
    for i, record in enumerate(records):
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
        log = "".join(f"{line}\n" for line in ("5/5 train_loss: 2.5 train_time: 1.0m tok/s: 9",
                                               *told_by((logs_of or records)[i])))
        digest = hashlib.sha256(log.encode() + (tmp_path / f"{i}.json").read_bytes()).hexdigest()
        (tmp_path / f"{i}.txt").write_text(f"{log}record: {i}.json; SHA-256 of both: {digest}\n")
    if readme:
        (tmp_path / "README.md").write_text(readme)
    train_gpt.collect(tiny_config(records=" ".join(f"{i}.json" for i in range(len(records))), **settings))
    return json.loads((tmp_path / "submission.json").read_text())


def contest_records(record, bpb=(1.07, 1.08, 1.09), **changed) -> list[dict]:
    """Finished runs as 8 H100s would report them, one a seed; the last is the largest."""
    finish(record)
    records = []
    for i, (seed, x) in enumerate(zip((42, 314, 999, 7), bpb)):
        records.append(copy.deepcopy(record.data))
        records[-1].update(run_id=f"run{seed}", seed=seed, hardware="8x NVIDIA H100 80GB HBM3", world_size=8,
                           val_tokens=40_540_802, val_bytes=151_080_891, artifact_sha256=str(seed),
                           total_bytes=15_980_000 + i,
                           settings={**record.data["settings"], "seed": seed, "run_id": f"run{seed}"},
                           quantized={"val_loss": 2.6 * x, "val_bpb": x + 0.03, "seconds": 9.0},
                           prequant={"val_loss": 2.0, "val_bpb": 0.9, "seconds": 9.0},
                           sliding={"val_loss": 2.55 * x, "val_bpb": x + 0.02, "seconds": 9.0},
                           ttt={"val_loss": 2.5 * x, "val_bpb": x, "seconds": 9.0})
        records[-1].update(changed)
    return records


def test_rehearsals_never_fill_the_contest_figures(record, tmp_path, monkeypatch):
    finish(record)
    submission = collected(tmp_path, monkeypatch, [record.data],
                           "before\n<!-- results -->\nold\n<!-- /results -->\nafter")
    for key in ("val_bpb", "val_loss", "seed_results", "bytes_total", "hardware", "compliance", "significance"):
        assert submission[key] is None, key
    assert submission["rehearsal"]["hardware"] == record.data["hardware"]
    assert submission["rehearsal"]["val_bpb"] == 1.5
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme and "| run |" in readme and readme.startswith("before") and readme.endswith("after")
    assert not (tmp_path / "records").exists()


def test_contest_runs_are_averaged_with_worst_case_bytes(record, tmp_path, monkeypatch):
    submission = collected(tmp_path, monkeypatch, contest_records(record), author="A. Uthor", github_id="uthor")
    assert submission["val_bpb"] == pytest.approx(1.08) and submission["val_bpb_std"] == pytest.approx(0.01)
    assert submission["val_loss"] == pytest.approx(2.7) and submission["bytes_total"] == 15_980_002
    assert submission["seeds"] == [42, 314, 999] and submission["seed_results"]["999"]["val_bpb"] == 1.09
    assert submission["author"] == "A. Uthor" and submission["rehearsal"] is None and submission["name"] is None
    assert submission["compliance"]["three_seeds"] and submission["compliance"]["train_seconds"]
    assert submission["track"] == "10min_16mb" and submission["pytorch_version"] == torch.__version__
    found = train_gpt.results_table(contest_records(record, (1.07,))).splitlines()[-1]
    assert found == ("| run42 | 8x NVIDIA H100 80GB HBM3 | 40540802 | 5 | 1000 | 0.9000 | 1.1000 | 1.0900 | 1.0700 | "
                     "15980000 | none |"), "prequant, quantized, sliding, TTT"
    table = train_gpt.results_table(contest_records(record)[::-1])
    assert table.index("run42") < table.index("run314") < table.index("run999"), "best first"
    records = contest_records(record)
    records[0]["ttt"]["val_bpb"], records[1]["ttt"]["val_bpb"] = 1.08, 1.07  # what counts, though quantized says not
    table = train_gpt.results_table(records)
    assert table.index("run314") < table.index("run42")


@pytest.mark.parametrize("missing, bpb", [(None, 1.07), ("ttt", 1.09), ("sliding", 1.10)])
def test_the_last_stage_from_the_artifact_counts(record, tmp_path, monkeypatch, missing, bpb):
    """Never the stage before quantization, which is the lowest here."""
    off = {stage: None for stage in ("ttt", "sliding") if missing in ("sliding", stage)}
    submission = collected(tmp_path, monkeypatch, contest_records(record, (1.07,), **off))
    assert submission["val_bpb"] == submission["seed_results"]["42"]["val_bpb"] == pytest.approx(bpb)


def test_four_seeds_that_are_not_alike(record, tmp_path, monkeypatch):
    """The mean and not the median, spreads of a sample, and the worst bytes wherever they stand."""
    bpb = (1.07, 1.0705, 1.071, 1.09)
    records = contest_records(record, bpb)
    records[1]["total_bytes"], records[2]["code_bytes"] = 15_990_000, 21_000
    submission = collected(tmp_path, monkeypatch, records)
    mean = sum(bpb) / 4
    std = (sum((x - mean) ** 2 for x in bpb) / 3) ** 0.5
    for key, unit in (("val_bpb", 1), ("val_loss", 2.5)):
        assert submission[key] == pytest.approx(unit * mean) and submission[f"{key}_std"] == pytest.approx(unit * std)
    assert (submission["bytes_total"], submission["bytes_code"]) == (15_990_000, 21_000)
    assert submission["seeds"] == [42, 314, 999, 7] and submission["compliance"]["three_seeds"]
    assert not collected(tmp_path, monkeypatch, contest_records(record)[:2])["compliance"]["three_seeds"]


def test_each_seeds_figures_are_its_own_and_the_date_is_the_last_runs(record, tmp_path, monkeypatch):
    records = contest_records(record)
    for each, day in zip(records, (3, 5, 4)):
        each["date"] = f"2020-01-0{day}T00:00:00+00:00"
    submission = collected(tmp_path, monkeypatch, records)
    assert submission["date"] == "2020-01-05"
    assert submission["seed_results"] == {
        str(each["seed"]): {**each["ttt"], **{key: each[key] for key in ("artifact_bytes", "total_bytes")}}
        for each in records}


def test_a_score_alone_has_not_passed_the_runs_checks(record):
    """MODE=eval cannot know how the artifact was made."""
    finish(record)
    alone = {**record.data, "mode": "eval", "compliant": None}
    rows = train_gpt.results_table([record.data, alone]).splitlines()[2:]
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["none", "-"]


def test_failed_checks_are_shown(record, tmp_path, monkeypatch):
    """In the table, and with their detail in the folder's README."""
    record.check("held_out", False, "9 of 9 passages")
    record.check("causal", False, "all of them")
    record.check("no_early_training", False, "")
    record.check("normalized_ttt", False, "")
    records = contest_records(record)
    everyone = "| held_out, causal, no_early_training, normalized_ttt |"
    assert all(everyone in row for row in train_gpt.results_table(records).splitlines()[2:])
    collected(tmp_path, monkeypatch, records, submission_name="x")
    readme, = (tmp_path / "records").glob("*/README.md")
    for seed in (42, 314, 999):
        assert f"- run{seed}: held_out: FAILED (9 of 9 passages)\n" in readme.read_text()
    assert everyone in readme.read_text()


def test_what_ran_is_told_from_the_records(record, tmp_path, monkeypatch):
    """Not from the machine and the settings that collect; an author's name is no setting, and a title no table."""
    settings = {"preset": "pr1395", "matrix_lr": 0.0123, "ttt_enabled": True, "seed": 5, "run_id": "first"}
    records = contest_records(record, settings=settings, preset="pr1395", torch="2.9.9", python="3.10.9", world_size=2,
                              code_sha256=train_gpt.sha256(pack_source(SOURCE, train_gpt.Config(preset="pr1395"))))
    submission = collected(tmp_path, monkeypatch, records, submission_name="<b>x</b>", author="me MATRIX_LR=5")
    told = "PRESET=pr1395 MATRIX_LR=0.0123 TTT_ENABLED=1"
    assert submission["technique_summary"] == f"pr1395: {told}"
    assert (submission["pytorch_version"], submission["python_version"]) == ("2.9.9", "3.10.9")
    readme, = (tmp_path / "records").glob("*/README.md")
    again = f"    SEED={records[0]['seed']} {told} torchrun --standalone --nproc_per_node=2 train_gpt.py\n"
    assert again in readme.read_text()
    assert readme.read_text().startswith("# &lt;b>x&lt;/b>\n")


def test_what_is_copied_is_what_was_read(record, tmp_path, monkeypatch):
    """A pipe may give an honest record first and then another."""
    honest = train_gpt.write_files
    monkeypatch.setattr(train_gpt, "write_files", lambda files: honest(
        {path: content.replace(b'"val_bpb": 1.0', b'"val_bpb": 0.5') if path.name == "1.json" else content
         for path, content in files.items()}))
    with pytest.raises(UsageError, match=r"records/\S+/1.json is no record of a run"):
        collected(tmp_path, monkeypatch, contest_records(record), submission_name="x")


def test_a_log_that_was_written_over_meanwhile_is_refused(tmp_path, rt):
    """The seal is over what the run has logged, not over what the file holds in the end."""
    config = tiny_config(log_dir=tmp_path)
    for change in (None, (b"val_bpb:3.5", b"val_bpb:0.9")):
        with contextlib.ExitStack() as stack:
            rt.open_log(tmp_path / "run.txt")
            stack.callback(lambda: (rt.log_file.close(), setattr(rt, "log_file", None)))
            record = Record(config, rt, "run")
            rt.log("5/5 val_bpb:3.5")
            if change:
                (tmp_path / "run.txt").write_bytes((tmp_path / "run.txt").read_bytes().replace(*change))
            record.seal()
        wanted = tiny_config(records=str(tmp_path / "run.json"))
        with pytest.raises(UsageError, match="one was changed") if change else contextlib.nullcontext():
            assert len(train_gpt.read_records(wanted)) == 1


def test_nothing_but_the_seed_may_differ(record):
    """Whichever setting it is: two systems would make one submission."""
    records = contest_records(record)[:2]
    train_gpt.check_one_system(records)
    for field in dataclasses.fields(train_gpt.Config):
        pair = copy.deepcopy(records)
        pair[1]["settings"][field.name] = "another"
        may = field.name in ("seed", "run_id")
        with contextlib.nullcontext() if may else pytest.raises(UsageError, match="differ in settings"):
            train_gpt.check_one_system(pair)


@pytest.mark.parametrize("change", [
    {"settings": {"ttt_epochs": 9}},
    {"preset": "smoke"}, {"source_sha256": "0"}, {"code_sha256": "0"},
    {"train_sha256": "0"}, {"val_sha256": "0"}, {"tokenizer_sha256": "0"}, {"hardware": "8x NVIDIA H200"},
    {"torch": "2.9.0"}, {"python": "3.10.0"}, {"attention_backend": "fa3"}, {"mode": "eval"}, {"seed": 42},
    {"artifact_sha256": "42"}, {"compliant": None}, {"stopped": "a signal came"}], ids=str)
def test_what_does_not_belong_together_is_refused(record, tmp_path, monkeypatch, change, capsys):
    records = contest_records(record)
    records[1].update({**change, "settings": {**records[1]["settings"], **change.get("settings", {})}})
    key, = list(change)[:1]
    told = {"mode": "no finished run", "compliant": "no finished run", "stopped": "did not end"}.get(key, key)
    with pytest.raises(UsageError, match=told):
        collected(tmp_path, monkeypatch, records)
    assert not (tmp_path / "submission.json").exists()
    out = capsys.readouterr().out
    assert "| run999 |" in out, "the table is printed for any records"
    assert ("left out: 1.json, a run that did not end (a signal came)" in out) == (key == "stopped")
    assert ("| run314 |" in out) == (key != "stopped")


def test_the_table_names_the_settings_that_differ(record):
    """What a sweep is read by: values, the default's included, and nothing that all have in common."""
    record.data.update(settings={"run_id": "base", "seed": 42, "preset": "pr1541"}, preset="pr1541")
    lower = {**record.data, "run_id": "lower", "settings": {"run_id": "lower", "seed": 42, "matrix_lr": 0.02,
                                                            "preset": "pr1541", "ttt_enabled": False}}
    rows = train_gpt.results_table([record.data, lower]).splitlines()
    assert rows[0].endswith("| failed checks | settings that differ |") and len({row.count("|") for row in rows}) == 1
    assert {row.split(" | ")[-1] for row in rows[2:]} == {"MATRIX_LR=0.03 TTT_ENABLED=1 |",
                                                          "MATRIX_LR=0.02 TTT_ENABLED=0 |"}
    other = train_gpt.what_differs([{**record.data, "source_sha256": "0"}, lower])
    assert other == ["MATRIX_LR=default TTT_ENABLED=default SOURCE_SHA256=0", "MATRIX_LR=0.02 TTT_ENABLED=0 "
                     f"SOURCE_SHA256={train_gpt.sha256(SOURCE)[:8]}"], "another script's"
    elsewhere = train_gpt.what_differs([{**record.data, "val_sha256": letter * 64} for letter in "ab"])
    assert elsewhere == ["VAL_SHA256=aaaaaaaa", "VAL_SHA256=bbbbbbbb"], "scores of two texts"
    assert "settings that differ" not in train_gpt.results_table([record.data, {**record.data, "seed": 1}])
    with pytest.raises(UsageError, match=r"differ in settings \(MATRIX_LR=0.02 TTT_ENABLED=0 and MATRIX_LR=0.03 "):
        train_gpt.check_one_system([{**r, "mode": "train", "compliant": True} for r in (record.data, lower)])


@pytest.mark.parametrize("change", [
    {"hardware": "48x NVIDIA H100 80GB HBM3"}, {"hardware": "8x NVIDIA H100 80GB HBM3 MIG 1g.10gb"},
    {"hardware": "8x NVIDIA H200"}, {"hardware": "4x NVIDIA H100 80GB HBM3"},
    {"hardware": "8x NVIDIA H100 PCIe"}, {"world_size": 16}, {"val_bytes": 300_000_000},
    {"val_bytes": 30_000_000}, {"val_bytes": 151_090_000}, {"val_bytes": 151_070_000}, {"compliant": False},
    {"val_bytes": 151_080_891 + 2000}, {"val_bytes": 151_080_891 - 2000},
    {"val_tokens": 40_540_801, "settings": {}}], ids=str)
def test_only_the_contests_machine_and_split_fill_its_figures(record, tmp_path, monkeypatch, change):
    records = contest_records(record, **change)
    for each in records if "compliant" in change else ():
        each["checks"].append({"name": "held_out", "ok": False, "detail": ""})
    submission = collected(tmp_path, monkeypatch, records)
    assert submission["val_bpb"] is None and submission["rehearsal"]["val_bpb"] == pytest.approx(1.08)


SCORE = {"val_loss": 2.5, "val_bpb": 1.25, "seconds": 1.0}


@pytest.mark.parametrize("change", [
    {"hardware": "8x NVIDIA H100 80GB HBM3"}, {"val_bytes": 151_080_891}, {"val_sha256": "6"}, {"compliant": False},
    {"checks": []}, {"seed": 5}, {"total_bytes": 9}, {"train_seconds": 9.0}, {"torch": "9"}, {"date": "2026"},
    {"ttt": {"val_loss": 2.0, "val_bpb": 0.9, "seconds": 1.0}}, {"artifact_sha256": "6"},
    {"ppm": {"val_loss": 2.0, "val_bpb": 0.9, "seconds": 1.0}},
    {"hardware": None, "settings": []}, {"quantized": SCORE, "ttt": None}, {"ttt": None}, {"eval_seconds": None},
    {"checks": "renamed"}, {"checks": "detail"}, {"checks": "twice"}], ids=str)
def test_a_record_that_its_log_or_its_checks_contradict_is_refused(record, tmp_path, monkeypatch, change):
    """Sealed again though it is: the seal is nobody's signature."""
    finish(record)
    record.set(artifact_sha256="5", ttt=SCORE)
    first, *others = record.data["checks"]
    changed = {"renamed": [{**first, "name": "causal"}, *others], "detail": [{**first, "detail": "5"}, *others],
               "twice": [first, *others, {**first, "detail": "again"}]}
    change = {key: changed[value] if key == "checks" and value else value for key, value in change.items()}
    assert collected(tmp_path, monkeypatch, [record.data])["rehearsal"]
    with pytest.raises(UsageError, match="0.json is no record of a run"):
        collected(tmp_path, monkeypatch, [{**record.data, **change}], logs_of=[record.data])


@pytest.mark.parametrize("left_out", ["date", "torch", "preset", "seed", "ppm", "checks", "settings"])
def test_a_record_without_what_every_record_has_is_refused(record, tmp_path, monkeypatch, left_out):
    finish(record)
    with pytest.raises(UsageError, match=f"0.json is no record of a run.*{left_out}"):
        collected(tmp_path, monkeypatch, [{k: v for k, v in record.data.items() if k != left_out}],
                  logs_of=[record.data])


def test_a_failed_check_cannot_be_left_out(record, tmp_path, monkeypatch):
    """The log tells of it, whatever the record holds."""
    record.check("held_out", False, "all of it")
    finish(record)
    kept = [check for check in record.data["checks"] if check["ok"]]
    log = {**record.data, "compliant": True}
    with pytest.raises(UsageError, match="record and log do not say the same"):
        collected(tmp_path, monkeypatch, [{**log, "checks": kept}], logs_of=[log])


@pytest.mark.parametrize("check", ["held_out", "complete"])
def test_compliant_is_what_the_checks_make_it(record, tmp_path, monkeypatch, check):
    """Where record, log and seal agree: a failed check, or none that says that all were made."""
    finish(record)
    checks = [{**c, "ok": False} if c["name"] == check != "complete" else c for c in record.data["checks"]]
    checks = [c for c in checks if c["name"] != "complete" or check != "complete"]
    record.data["artifact_sha256"] = "5"
    assert record.data["compliant"] is True and collected(tmp_path, monkeypatch, [record.data])
    with pytest.raises(UsageError, match="`compliant` contradicts its checks"):
        collected(tmp_path, monkeypatch, [{**record.data, "checks": checks}])


def test_a_record_is_never_overwritten_by_the_submission(record, tmp_path, monkeypatch):
    collected(tmp_path, monkeypatch, contest_records(record)[:1])
    before = (tmp_path / "0.json").read_bytes()
    for kind in ("json", "txt"):
        (tmp_path / f"0.{kind}").rename(tmp_path / f"submission.{kind}")
    with pytest.raises(UsageError, match="rename the run"):
        train_gpt.collect(tiny_config(records="./submission.json"))
    assert (tmp_path / "submission.json").read_bytes() == before


def test_what_is_refused_changes_no_file(record, tmp_path, monkeypatch):
    collected(tmp_path, monkeypatch, contest_records(record))
    before = (tmp_path / "submission.json").read_bytes()
    monkeypatch.setattr(train_gpt, "draw_runs", lambda *_: pytest.fail("the picture is changed"))
    with pytest.raises(UsageError, match="made by other code"):
        collected(tmp_path, monkeypatch, contest_records(record, code_sha256="0"), submission_name="x")
    assert (tmp_path / "submission.json").read_bytes() == before


@pytest.mark.parametrize("change", [{"settings": {}}, {"val_tokens": 50_000_000}], ids=str)
def test_another_tokenizer_has_another_number_of_targets(record, tmp_path, monkeypatch, change):
    """The settings of these records are those of a small vocabulary, the first case's are the contest's."""
    submission = collected(tmp_path, monkeypatch, contest_records(record, **change))
    assert submission["val_bpb"] == pytest.approx(1.08)


def test_one_run_that_breaks_a_rule_takes_the_others_figures(record, tmp_path, monkeypatch):
    records = contest_records(record)
    records[2]["compliant"] = False
    records[2]["checks"][0] = {**records[2]["checks"][0], "ok": False}
    submission = collected(tmp_path, monkeypatch, records)
    assert submission["val_bpb"] is None and not submission["rehearsal"]["compliance"]["all_checks"]
    assert not submission["rehearsal"]["compliance"][records[2]["checks"][0]["name"]]


def test_welch_test_against_closed_forms():
    """Two values on each side with equal spreads: two degrees of freedom, whose tail has a closed form."""
    for gain in (0.002, 0.005, 0.02, 0.033, 0.5):
        ours, reference = [2.0, 2.01], [2.0 + gain, 2.01 + gain]
        found = train_gpt.welch_test(ours, reference, 0.005)
        t = (gain - 0.005) / 5e-5 ** 0.5  # each side has variance 5e-5 and two values
        assert found["t"] == pytest.approx(t, abs=1e-9) and found["degrees_of_freedom"] == pytest.approx(2)
        assert found["p_value"] == pytest.approx(0.5 - t / (2 * (2 + t * t) ** 0.5), abs=2e-5)
        assert found["significant"] == (gain == 0.5) and (0.01 < found["p_value"] < 0.05) == (gain == 0.033)
        assert found["gain_nats_per_token"] == pytest.approx(gain)
    # Spreads that differ: Welch-Satterthwaite by hand. The smaller sample's spread of zero leaves the other's freedom.
    found = train_gpt.welch_test([1.0, 1.0], [1.1, 1.2, 1.3], 0.0)
    assert found["degrees_of_freedom"] == pytest.approx(2) and found["t"] == pytest.approx(0.2 / (0.01 / 3) ** 0.5)


def test_the_standing_record_must_be_beaten_by_five_millinats(record, tmp_path, monkeypatch):
    """In nats per token: 2.5 per bit per byte here, so 0.002 bpb are just the 0.005 nats that do not suffice."""
    for bpb, enough in (((1.0700, 1.0701, 1.0702), True), ((1.0790, 1.0791, 1.0792), False)):
        found = collected(tmp_path, monkeypatch, contest_records(record, bpb), reference_bpb="1.0810,1.0811,1.0812")
        assert found["significance"]["significant"] == enough
        assert found["significance"]["gain_nats_per_token"] == pytest.approx(2.5 * (1.0811 - bpb[1]))
        assert found["significance"]["reference_bpb"] == [1.0810, 1.0811, 1.0812]
    for reference, records in (("1.08", 3), ("1.08,x", 3), ("1.08,nan", 3), ("1.08,inf,1.09", 3), ("1.08,1.09", 1)):
        with pytest.raises(UsageError, match="REFERENCE_BPB"):
            collected(tmp_path, monkeypatch, contest_records(record)[:records], reference_bpb=reference)


@pytest.mark.parametrize("changed, seeds, state", [
    ({}, 3, "Ready for a pull request"), ({}, 2, "A contest run without three seeds"),
    ({}, 3, "A contest run without AUTHOR, GITHUB_ID"),
    ({}, 3, "A contest run without a difference from REFERENCE_BPB that is significant"),
    ({"hardware": "1x CPU rank, 2 threads (x86_64)"}, 3, "A rehearsal")])
def test_a_records_folder_says_what_it_is(record, tmp_path, monkeypatch, capsys, changed, seeds, state):
    names = {} if "AUTHOR" in state else {"author": "me", "github_id": "me"}
    reference = {"reference_bpb": "1.08,1.09"} if "REFERENCE" in state else {}
    collected(tmp_path, monkeypatch, contest_records(record, **changed)[:seeds], submission_name="x", **names,
              **reference)
    readme, = (tmp_path / "records").glob("*/README.md")
    assert f": {state}" in capsys.readouterr().out and f"\n\n{state}" in readme.read_text()


def test_a_records_folder_is_ready_for_a_pull_request(record, tmp_path, monkeypatch, capsys):
    records = contest_records(record)
    submission = collected(tmp_path, monkeypatch, records, submission_name="Some name / 2", author="me", github_id="me")
    folder, = (tmp_path / "records").iterdir()
    assert folder.name == f"{submission['date']}_Some-name-2"
    assert {p.name for p in folder.iterdir()} == {"train_gpt.py", "README.md", "submission.json",
                                                  *(f"{i}.{kind}" for i in range(3) for kind in ("json", "txt"))}
    assert train_gpt.sha256((folder / "train_gpt.py").read_bytes()) == submission["code_sha256"]
    assert json.loads((folder / "submission.json").read_text()) == submission
    readme = (folder / "README.md").read_text()
    assert "| run42 |" in readme and "total_bytes: ok" in readme and "Ready for a pull request" in readme
    assert "ready" not in capsys.readouterr().out.replace("Ready for a pull request", "", 1)
    (folder / "README.md").write_text(f"{readme}How it works.\n".replace("| run42 |", "| old |"))
    collected(tmp_path, monkeypatch, records, submission_name="Some name / 2", author="me", github_id="me")
    assert (folder / "README.md").read_text() == f"{readme}How it works.\n", "what was written by hand stays"
    (folder / "README.md").write_text("How it works.\n")
    with pytest.raises(UsageError, match="README.md was not made here"):
        collected(tmp_path, monkeypatch, records, submission_name="Some name / 2")
    (folder / "README.md").unlink()
    (folder / "another.json").write_text("{}")
    with pytest.raises(UsageError, match="holds another.json already"):
        collected(tmp_path, monkeypatch, records, submission_name="Some name / 2")
    with pytest.raises(UsageError, match="made by other code"):
        collected(tmp_path, monkeypatch, contest_records(record, code_sha256="0"), submission_name="x")

    def packs_otherwise(command, env, **_):
        assert not {"MATRIX_LR", "PRESET"} & {*env} and env["MODE"] == "pack", "no settings of the user's"
        (Path(env["OUT_DIR"]) / "train_gpt.py").write_bytes(b"other code")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(train_gpt.subprocess, "run", packs_otherwise)
    monkeypatch.setenv("MATRIX_LR", "0.5")
    with pytest.raises(UsageError, match="does not pack to itself"):
        collected(tmp_path, monkeypatch, records, submission_name="y")


@pytest.mark.parametrize("name, old, new", [
    ("1.json", "1.08", "1.07"), ("1.txt", "loss: 2.5", "loss: 2.4"), ("1.txt", "5/5 ", "\n5/5 "),
    ("1.txt", "both: ", "both: 0"), ("1.txt", "record: ", "one more line\nrecord: ")])
def test_a_record_or_log_that_was_changed_is_refused(record, tmp_path, monkeypatch, name, old, new):
    """The log's last line is the hash of the record and of the lines above: none can be changed alone."""
    collected(tmp_path, monkeypatch, contest_records(record))
    path = tmp_path / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match="1.json is no record of a run.*SHA-256"):
        train_gpt.collect(tiny_config(records="0.json 1.json 2.json"))


def test_a_run_that_was_killed_is_left_out_of_the_table(record, tmp_path, monkeypatch, capsys):
    """Its log breaks off, and its record cannot tell why."""
    collected(tmp_path, monkeypatch, contest_records(record))
    (tmp_path / "submission.json").unlink()
    log = (tmp_path / "1.txt").read_text()
    (tmp_path / "1.txt").write_text(log[:log.index("record: ")])
    capsys.readouterr()
    with pytest.raises(UsageError, match="no submission is made beside a run that did not end"):
        train_gpt.collect(tiny_config(records="0.json 1.json 2.json"))
    out = capsys.readouterr().out
    assert "left out: 1.json, a run that did not end (its log breaks off)" in out and "| run999 |" in out
    assert "| run314 |" not in out and not (tmp_path / "submission.json").exists()


def test_the_readmes_table_is_put_in_its_place_whatever_else_it_holds(record, tmp_path, monkeypatch):
    around = b"caf\xe9 \\1\n<!-- results -->\n", b"<!-- /results -->\nend"
    (tmp_path / "README.md").write_bytes(b"old\n".join(around))
    for records in (contest_records(record), contest_records(record)[:1]):
        collected(tmp_path, monkeypatch, records)
        table = f"{train_gpt.results_table([json.loads(json.dumps(r)) for r in records])}\n"
        assert (tmp_path / "README.md").read_bytes() == table.encode().join(around)


def test_files_of_one_name_are_refused(record, tmp_path, monkeypatch):
    collected(tmp_path, monkeypatch, contest_records(record)[:1])
    (tmp_path / "0.json").rename(tmp_path / "train_gpt.py")
    (tmp_path / "0.txt").rename(tmp_path / "train_gpt.txt")
    with pytest.raises(UsageError, match="two files of the submission would be called train_gpt.py"):
        train_gpt.collect(tiny_config(records="train_gpt.py", submission_name="x"))


def test_this_repositorys_results_are_those_of_its_record(tmp_path, monkeypatch):
    """README and submission.json, to the byte: made again from the record, they do not change."""
    names = ("README.md", "submission.json", "logs/cpu_200steps_seed42.json", "logs/cpu_200steps_seed42.txt")
    (tmp_path / "logs").mkdir()
    for name in names:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    train_gpt.collect(tiny_config(records=names[2], log_dir=tmp_path / "drawn"))
    assert "| cpu_200steps_seed42 |" in (tmp_path / "README.md").read_text()
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_runs_are_drawn_where_matplotlib_is(record, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    collected(tmp_path, monkeypatch, contest_records(record))
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not list((tmp_path / "logs").iterdir())
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    collected(tmp_path, monkeypatch, contest_records(record))
    picture = (tmp_path / "logs" / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@pytest.mark.parametrize("content", ["not json", "{}", "[]", '{"checks": []}'])
def test_collect_refuses_what_is_no_record(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match="x.json is no record"):
        train_gpt.collect(tiny_config(records=tmp_path / "x.json"))
    with pytest.raises(UsageError, match="RECORDS"):
        train_gpt.collect(tiny_config())
