"""The whole pipeline as a user runs it: torchrun, one and two ranks, MODE=eval from the packed script alone."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, torchrun

import train_gpt

SMALL = {"PRESET": "smoke", "ITERATIONS": "6", "WARMUP_STEPS": "1", "EVAL_STRIDE": "64", "TTT_EPOCHS": "1",
         "TRAIN_LOG_EVERY": "1", "GPTQ_CALIBRATION_BATCHES": "1", "RUN_ID": "run"}


class Run:
    """A finished run: its folder, output and record."""

    def __init__(self, folder, ranks):
        folder.mkdir()
        self.folder, self.done = folder, torchrun(ranks, str(ROOT / "train_gpt.py"), cwd=folder, env=SMALL)
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        self.record = json.loads((folder / "logs" / "run.json").read_text())
        self.losses = [float(x) for x in re.findall(r"train_loss: (\S+)", self.done.stdout)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return Run(folder / "one", 1), Run(folder / "two", 2)


STAGES = ("prequant", "quantized", "sliding", "ttt")


def test_every_stage_is_in_record_and_log(runs):
    run = runs[0]
    record, log = run.record, (run.folder / "logs" / "run.txt").read_text()
    for stage, label in zip(STAGES, ("pre-quantization post-ema", "quantized", "quantized_sliding_window",
                                     "quantized_ttt")):
        shown, = re.findall(rf"^{label} val_loss:(\S+) val_bpb:(\S+) eval_time:\d+ms$", log, re.MULTILINE)
        exact = [record[stage]["val_loss"], record[stage]["val_bpb"]]
        assert [float(x) for x in shown] == pytest.approx(exact, abs=1e-7)
    assert re.search(r"^6/6 train_loss: \d+\.\d{4} train_time: \d+\.\dm tok/s: \d+$", log, re.MULTILINE)
    assert re.search(r"^layer_loop:enabled step:3 frac:0\.500 encoder:\[0, 1, 2, 3, 2, 3\] decoder:\[2, 3, ", log,
                     re.MULTILINE)
    assert re.search(rf"^Total submission size quantized\+brotli: {record['total_bytes']} bytes$", log, re.MULTILINE)
    assert record["compliant"] and all(check["ok"] for check in record["checks"]) and record["steps"] == 6


def test_what_is_written(runs):
    folder, record = runs[0].folder / "out", runs[0].record
    artifact, code = (folder / "final_model.ptz").read_bytes(), (folder / "train_gpt.py").read_bytes()
    assert (len(artifact), len(code)) == (record["artifact_bytes"], record["code_bytes"])
    assert record["total_bytes"] == len(artifact) + len(code)
    assert record["artifact_sha256"] == train_gpt.sha256(artifact)
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "a temporary file is left"


def test_two_ranks_train_and_score_as_one(runs):
    one, two = runs
    assert one.losses[:3] == pytest.approx(two.losses[:3], abs=1e-4)
    for stage in STAGES:
        assert one.record[stage]["val_bpb"] == pytest.approx(two.record[stage]["val_bpb"], abs=1e-3)
    assert two.record["world_size"] == 2 and two.record["compliant"]


def test_packed_script_scores_the_artifact_alone(runs, tmp_path):
    """Only the packed script, the artifact, the tokenizer and the validation shards; sockets raise; same digits."""
    source = runs[0].folder / "out"
    shutil.copy(source / "train_gpt.py", tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(source / "final_model.ptz", tmp_path / "out")
    shutil.copytree(source / "smoke_data", tmp_path / "data", ignore=shutil.ignore_patterns("*train*"))
    no_network = ("import socket, runpy; socket.socket.connect = None; "
                  "runpy.run_path('train_gpt.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", no_network], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env={"MODE": "eval", "DATA_DIR": "data", "RUN_ID": "again", "PATH": "/usr/bin:/bin",
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / "logs" / "again.json").read_text())
    for stage in STAGES[1:]:
        assert {**again[stage], "seconds": 0} == {**runs[0].record[stage], "seconds": 0}
    assert again["code_sha256"] == runs[0].record["code_sha256"] and again["prequant"] is None


@pytest.mark.slow
def test_two_nodes_train_as_one(runs, tmp_path):
    """Two torchrun agents that meet by rendezvous, each with a folder of its own and one rank: the same lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in (0, 1):
        folder = tmp_path / str(node)
        folder.mkdir()
        shutil.copytree(runs[0].folder / "out" / "smoke_data", folder / "out" / "smoke_data")
        nodes.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", str(ROOT / "train_gpt.py")],
            cwd=folder, env={**os.environ, **SMALL, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    records = list(tmp_path.glob("*/logs/run.json"))
    assert len(records) == 1, "rank 0 alone writes"
    record = json.loads(records[0].read_text())
    assert record["world_size"] == 2
    for stage in STAGES:
        assert record[stage]["val_bpb"] == pytest.approx(runs[1].record[stage]["val_bpb"], abs=1e-6)


@pytest.mark.parametrize("ranks, env, message", [
    (3, {}, "3 ranks cannot share TRAIN_BATCH_TOKENS=4096, which is 32 sequences of 128: use 1, 2, 4, 8, 16, 32 ranks"),
    (1, {"PRESET": "pr1541", "DEVICE": "cpu"}, "PRESET=smoke"),
    (1, {"MODE": "eval", "OUT_DIR": "nowhere"}, "MODE=eval needs the artifact nowhere/final_model.ptz"),
    (1, {"TTT_EPOCH": "2"}, "did you mean TTT_EPOCHS?")])
def test_bad_input_ends_in_one_message_before_any_work(tmp_path, ranks, env, message):
    done = torchrun(ranks, str(ROOT / "train_gpt.py"), cwd=tmp_path, env={**SMALL, **env})
    assert done.returncode != 0 and done.stderr.count(message) == 1
    assert "train_loss" not in done.stdout and not (tmp_path / "logs").exists()
