"""Room 10: the packed script, the checks, the record, and what is made from records."""
import ast
import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, fake_validation, tiny_config

import train_gpt
from train_gpt import SOURCE, Record, UsageError, pack_source, strip_source


def load_packed(folder):
    """Import the packed script from a folder under a name of its own."""
    (folder / "packed_train_gpt.py").write_bytes(pack_source(SOURCE))
    sys.path.insert(0, str(folder))
    try:
        sys.modules.pop("packed_train_gpt", None)
        return __import__("packed_train_gpt")
    finally:
        sys.path.remove(str(folder))


def test_packing_is_deterministic_and_idempotent():
    packed = pack_source(SOURCE)
    code = "import train_gpt, hashlib; print(hashlib.sha256(train_gpt.pack_source(train_gpt.SOURCE)).hexdigest())"
    for seed in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              env={"PYTHONHASHSEED": seed, "PATH": ""})
        assert done.stdout.strip() == train_gpt.sha256(packed)
    assert pack_source(packed) == packed


def test_stripped_source_keeps_the_program_and_drops_what_readers_need():
    stripped = strip_source(SOURCE.decode())
    tree = ast.parse(stripped, feature_version=(3, 10))
    assert not any(isinstance(n, ast.arg) and n.annotation for n in ast.walk(tree))
    assert not any(ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    for name in ("Config", "GPT", "build_byte_luts", "gptq_quantize", "pack_artifact", "unpack_artifact", "main"):
        assert re.search(rf"^(def|class) {name}\b", stripped, re.MULTILINE), name
    assert "tokens of one optimizer step" not in stripped and "train_batch_tokens" in stripped


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
        def closure_function(): return inner_sum + LIMIT_OF_ALL
        try: raise ValueError(-1)
        except ValueError as caught_error: inner_sum += caught_error.args[0] + 1
        return closure_function() + keyword_only
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


def test_packed_script_computes_the_same(tmp_path):
    packed = load_packed(tmp_path)
    config, other = tiny_config(), packed.Config.from_env({k.upper(): str(int(v) if isinstance(v, bool) else v)
                                                           for k, v in tiny_config().non_defaults().items()})
    assert config.non_defaults() == other.non_defaults()
    torch.manual_seed(0)
    ours = train_gpt.GPT(config)
    torch.manual_seed(0)
    theirs = packed.GPT(other)
    ids = torch.arange(64).view(2, 32)
    assert torch.equal(ours(ids, ids), theirs(ids, ids))
    tensors = {"a": torch.arange(10, dtype=torch.int8)}
    assert packed.pack_artifact(tensors, {"x": 1}) == train_gpt.pack_artifact(tensors, {"x": 1})
    assert pack_source(SOURCE) == packed.SOURCE, "the packed script must count itself, not what it unpacks to"


def test_packed_script_reports_bad_input_as_the_readable_one(tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(pack_source(SOURCE))
    for env in ({"SEED": "x", "TTT_EPOCH": "1"}, {"MODE": "eval", "OUT_DIR": "nowhere"},
                {"MODE": "collect", "RECORDS": "none.json"}):
        said = [subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, capture_output=True, text=True,
                               env={**env, "PATH": ""}) for folder in (ROOT, tmp_path)]
        assert said[0].returncode == said[1].returncode == 2
        assert said[0].stderr == said[1].stderr and said[0].stderr.startswith("train_gpt.py: ")


def test_source_has_only_python_310_grammar():
    ast.parse(SOURCE, feature_version=(3, 10))
    for node in ast.walk(ast.parse(SOURCE)):  # nested same quotes in an f-string: PR #1541 did not parse on 3.10
        if isinstance(node, ast.JoinedStr):
            text = ast.get_source_segment(SOURCE.decode(), node) or ""
            quote = re.match(r"\w*(\"\"\"|'''|\"|')", text)
            if quote and "\n" not in text:
                assert text.count(quote[1]) == 2, text


def test_pack_mode_never_overwrites_the_running_script(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_bytes(SOURCE)
    for mode in ("pack", "train"):
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True,
                              env={"MODE": mode, "OUT_DIR": ".", "PATH": ""})
        assert done.returncode == 2 and "would overwrite it" in done.stderr
    assert script.read_bytes() == SOURCE


@pytest.fixture
def record(tmp_path, rt):
    config = tiny_config(log_dir=tmp_path)
    record = Record(config, rt, "run")
    stage = {"val_loss": 2.0, "val_bpb": 1.5, "seconds": 1.0}
    record.set(steps=5, train_seconds=100.0, calibration_seconds=5.0, quantize_seconds=5.0, eval_seconds=50.0,
               tokens_per_second=1000, val_tokens=50, val_bytes=100, quantized=stage, prequant=stage,
               artifact_bytes=15_000_000, code_bytes=20_000, total_bytes=15_020_000)
    return record


def outcome(record, name):
    return next(check["ok"] for check in record.data["checks"] if check["name"] == name)


@pytest.mark.parametrize("figures, failing", [
    ({}, None), ({"total_bytes": 16_000_001}, "total_bytes"), ({"total_bytes": 16_000_000}, None),
    ({"train_seconds": 590.1}, "train_seconds"), ({"eval_seconds": 600.1}, "eval_seconds")])
def test_limits_of_the_contest(record, figures, failing):
    record.set(**figures)
    train_gpt.final_checks(record, tiny_config())
    assert record.data["compliant"] == (failing is None)
    assert [check["name"] for check in record.data["checks"] if not check["ok"]] == ([failing] if failing else [])


def test_dropped_tail_is_not_compliant(record):
    train_gpt.final_checks(record, tiny_config(eval_drop_tail=1))
    assert not outcome(record, "full_split") and not record.data["compliant"]


def test_single_pass_check_counts_targets(record, rt):
    """A target scored twice or never fails the check, and the figure is written all the same."""
    for plant in (lambda s: None, lambda s: s.add(torch.tensor([[3]]), torch.ones(1, 1))):
        val = fake_validation(torch.ones(11), tiny_config())
        scores = train_gpt.Scores(rt, val)
        scores.add(torch.arange(10)[None], torch.ones(1, 10))
        plant(scores)
        record.data["checks"].clear()
        record.stage("sliding", "quantized_sliding_window", scores)
        planted = scores.times_scored.max() > 1
        assert outcome(record, "single_pass_sliding") != planted
    assert record.data["sliding"]["val_loss"] == pytest.approx(1.1)


class Characters:
    """A tokenizer of one byte per token, for the check of the byte tables."""

    def bos_id(self):
        return 1

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 1)


def test_byte_count_check_sees_a_doubled_space(record):
    tokens = np.array([1, 97, 98, 32, 99, 1, 97, 32, 32, 98, 1, 99])
    val = fake_validation(tokens, tiny_config())
    val.target_bytes = torch.tensor((tokens[1:] > 1).astype(np.int64))
    train_gpt.check_byte_count(record, tiny_config(), val, Characters())
    assert outcome(record, "byte_count")
    record.data["checks"].clear()
    val.target_bytes = val.target_bytes + torch.tensor((tokens[1:] == 32).astype(np.int64))
    train_gpt.check_byte_count(record, tiny_config(), val, Characters())
    assert not outcome(record, "byte_count")


def test_record_is_complete_json_with_null_for_what_was_not_measured(record):
    data = json.loads(record.path.read_text())
    wanted = """run_id preset seed settings hardware world_size python torch attention_backend steps train_seconds
        calibration_seconds quantize_seconds step_ms tokens_per_second peak_memory_mib val_tokens val_bytes
        prequant quantized sliding ttt artifact_bytes code_bytes total_bytes eval_seconds compliant checks""".split()
    assert set(wanted) <= set(data)
    assert data["ttt"] is None and data["compliant"] is None


def collected(tmp_path, monkeypatch, records, readme=None):
    monkeypatch.chdir(tmp_path)
    for i, record in enumerate(records):
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
    if readme:
        (tmp_path / "README.md").write_text(readme)
    train_gpt.collect(tiny_config(records=" ".join(f"{i}.json" for i in range(len(records)))))
    return json.loads((tmp_path / "submission.json").read_text())


def test_rehearsals_never_fill_the_contest_figures(record, tmp_path, monkeypatch):
    train_gpt.final_checks(record, tiny_config())
    submission = collected(tmp_path, monkeypatch, [record.data],
                           "before\n<!-- results -->\nold\n<!-- /results -->\nafter")
    assert submission["val_bpb"] is None and submission["bytes_total"] is None and submission["hardware"] is None
    assert submission["rehearsals"][0]["hardware"] == record.data["hardware"]
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme and "| run |" in readme and readme.startswith("before") and readme.endswith("after")


def test_contest_runs_are_averaged_with_worst_case_bytes(record, tmp_path, monkeypatch):
    train_gpt.final_checks(record, tiny_config())
    records = []
    for seed, bpb, size in ((42, 1.07, 15_990_000), (314, 1.09, 15_980_000)):
        data = copy.deepcopy(record.data)
        data.update(seed=seed, hardware="8x NVIDIA H100 80GB HBM3", val_tokens=40_540_802, total_bytes=size,
                    ttt={"val_loss": 2.7, "val_bpb": bpb, "seconds": 300.0})
        records.append(data)
    submission = collected(tmp_path, monkeypatch, records)
    assert submission["val_bpb"] == pytest.approx(1.08) and submission["bytes_total"] == 15_990_000
    records[0]["compliant"] = False
    assert collected(tmp_path, monkeypatch, records)["val_bpb"] == pytest.approx(1.09)


@pytest.mark.parametrize("content", ["not json", "{}", "[]"])
def test_collect_refuses_what_is_no_record(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match="x.json is no record"):
        train_gpt.collect(tiny_config(records=tmp_path / "x.json"))
    with pytest.raises(UsageError, match="RECORDS"):
        train_gpt.collect(tiny_config())
