"""The whole pipeline as a user runs it: torchrun, one and two ranks, MODE=eval from the packed script alone."""
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_config, torchrun

import train_gpt
from train_gpt import UsageError

SMALL = {"PRESET": "smoke", "NUM_LAYERS": "4", "LOOP_START": "1", "LOOP_END": "2", "NUM_LOOPS": "1",
         "PARALLEL_RESIDUAL_START": "3", "ITERATIONS": "6", "WARMUP_STEPS": "1", "EVAL_STRIDE": "64", "TTT_EPOCHS": "1",
         "TRAIN_LOG_EVERY": "1", "GPTQ_CALIBRATION_BATCHES": "1", "RUN_ID": "run",
         "TARGET_BYTES": "16000000"}


class Run:
    """A finished run: its folder, output and record."""

    def __init__(self, folder, ranks, data):
        shutil.copytree(data, folder / "out" / "smoke_data")
        self.folder, self.done = folder, torchrun(ranks, str(ROOT / "train_gpt.py"), cwd=folder, env=SMALL)
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        self.record = json.loads((folder / "logs" / "run.json").read_text())
        self.losses = [float(x) for x in re.findall(r"train_loss: (\S+)", self.done.stdout)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one and on two ranks, with half of the smoke corpus's validation split."""
    folder = tmp_path_factory.mktemp("runs")
    config = train_gpt.Config.from_env({"PRESET": "smoke", "DATA_DIR": str(folder / "data")})
    train_gpt.write_embedded_corpus(config)
    val, = train_gpt.shard_files(config, "val")
    train_gpt.write_shard(val, train_gpt.open_shard(val)[:4000])
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(Run, (folder / "one", folder / "two"), (1, 2), 2 * [folder / "data"]))


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
    assert re.search(r"^layer_loop:enabled step:3 frac:0\.500 encoder:\[0, 1, 2\] decoder:\[1, 2, 3\]", log,
                     re.MULTILINE)
    assert re.search(rf"^Total submission size quantized\+brotli: {record['total_bytes']} bytes$", log, re.MULTILINE)
    assert record["compliant"] and all(check["ok"] for check in record["checks"]) and record["steps"] == 6
    assert record["step_ms"] * 6 / 1000 == pytest.approx(record["train_seconds"])
    assert record["tokens_per_second"] == pytest.approx(6 * 4096 / record["train_seconds"], abs=1)
    assert sorted(check["name"] for check in record["checks"]) == sorted("""
        byte_count split_text held_out shards_unchanged warm_up_undone weights_kept causal normalized
        normalized_quantized normalized_sliding normalized_ttt
        single_pass_prequant single_pass_quantized single_pass_sliding single_pass_ttt score_before_update_ttt
        train_seconds eval_seconds total_bytes full_split complete""".split())


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
    assert one.record["code_sha256"] == two.record["code_sha256"]  # in folders of their own, too
    assert two.record["world_size"] == 2 and two.record["compliant"]


OFFLINE = """
import fcntl, os, runpy, socket, struct, sys
opened = open("opened.txt", "w", buffering=1)
def note(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and not os.path.isdir(args[0]):
        path = os.path.abspath(args[0])
        print(os.path.relpath(path) if path.startswith(os.getcwd()) else path, file=opened)
sys.addaudithook(note)
try:
    fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
except PermissionError:
    pass  # not in a namespace of its own
socket.socket.connect = None
runpy.run_path("train_gpt.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def scored_alone(runs, tmp_path_factory):
    """The packed script's own scores of the artifact of `runs`, from a folder with little else."""
    folder = tmp_path_factory.mktemp("scored_alone")
    source = runs[0].folder / "out"
    shutil.copy(source / "train_gpt.py", folder)
    (folder / "out").mkdir()
    shutil.copy(source / "final_model.ptz", folder / "out")
    shutil.copytree(source / "smoke_data", folder / "data", ignore=shutil.ignore_patterns("*train*"))
    (folder / "offline.py").write_text(OFFLINE)
    shutil.copy(source / "final_model.pt", folder / "out")
    (folder / "logs").mkdir()
    # Where the kernel lets us, in a network namespace of its own with but a loopback; Python's sockets raise anyway.
    unshare = [shutil.which("unshare") or "/none", "-rn"]
    alone = unshare if subprocess.run(["unshare", "-rn", "true"], check=False).returncode == 0 else []
    done = subprocess.run([*alone, sys.executable, "offline.py"], cwd=folder, capture_output=True, text=True,
                          timeout=240, env={"MODE": "eval", "DATA_DIR": "data", "RUN_ID": "again", "TMPDIR": "logs",
                                            "PATH": "/none", "OMP_NUM_THREADS": "1"})  # no compiler either
    return done, folder


def test_packed_script_scores_the_artifact_alone(runs, scored_alone):
    """Only the packed script, the artifact, the tokenizer and the validation shards; no network; the same digits.

    Other files may lie beside them, and none is opened.
    """
    done, folder = scored_alone
    assert done.returncode == 0, done.stdout + done.stderr
    system = tuple({f"{Path(path).resolve()}/" for path in (sys.prefix, sys.base_prefix, "/usr", "/lib")} | {
        f"{sys.prefix}/", f"{sys.base_prefix}/", "/usr/", "/lib", "/etc/", "/proc/", "/sys/", "/dev/"})
    own = {name for name in (folder / "opened.txt").read_text().splitlines()
           if not name.startswith((*system, "logs/", "offline.py"))}
    val, = (folder / "data").rglob("fineweb_val*")
    tokenizer, = (folder / "data").rglob("*.model")
    assert own == {"train_gpt.py", "out/final_model.ptz", *(str(p.relative_to(folder)) for p in (val, tokenizer))}
    again = json.loads((folder / "logs" / "again.json").read_text())
    for stage in STAGES[1:]:
        assert {**again[stage], "seconds": 0} == {**runs[0].record[stage], "seconds": 0}
    assert again["code_sha256"] == runs[0].record["code_sha256"] and again["prequant"] is None
    assert again["compliant"] is None and all(check["ok"] for check in again["checks"])


@pytest.fixture(scope="module")
def trained_packed(runs, tmp_path_factory):
    """The run of `runs` once more, by its packed script."""
    folder = tmp_path_factory.mktemp("trained_packed")
    source = runs[0].folder / "out"
    shutil.copy(source / "train_gpt.py", folder)
    shutil.copytree(source / "smoke_data", folder / "out" / "smoke_data")
    return torchrun(0, "train_gpt.py", cwd=folder, env=SMALL), folder


def test_packed_script_trains_the_same_artifact(runs, trained_packed):
    done, folder = trained_packed
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "logs" / "run.json").read_text())
    for key in ("artifact_sha256", "code_sha256", "compliant", "settings"):
        assert record[key] == runs[0].record[key]
    assert record["ttt"]["val_loss"] == runs[0].record["ttt"]["val_loss"]


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


@pytest.mark.slow
def test_two_ranks_train_alike_whatever_the_split_holds(runs, tmp_path):
    """Fine-tuning before quantization included: the split's tokens decide nothing on several ranks either."""
    records = []
    for reverse in (1, -1):
        folder = tmp_path / str(reverse)
        shutil.copytree(runs[0].folder / "out" / "smoke_data", folder / "out" / "smoke_data")
        val, = folder.rglob("fineweb_val*")
        train_gpt.write_shard(val, train_gpt.open_shard(val)[::reverse].copy())
        done = torchrun(2, str(ROOT / "train_gpt.py"), cwd=folder, env={
            **SMALL, "ITERATIONS": "2", "TTT_ENABLED": "0", "SLIDING_WINDOW_ENABLED": "0", "PREQUANT_TTT_ENABLED": "1",
            "PREQUANT_TTT_DATA": "train", "PREQUANT_TTT_EPOCHS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        records.append(json.loads((folder / "logs" / "run.json").read_text()))
    assert records[0]["val_sha256"] != records[1]["val_sha256"]
    assert records[0]["artifact_sha256"] == records[1]["artifact_sha256"]


BAD_INPUT = [
    pytest.param(2, {"TRAIN_BATCH_TOKENS": "1152"}, "2 ranks cannot share TRAIN_BATCH_TOKENS=1152, which is 9 "
                 "sequences of 128: use 1, 3, 9 ranks", marks=pytest.mark.slow),
    (0, {"PRESET": "pr1541", "DEVICE": "cpu"}, "PRESET=smoke"),
    (0, {"MODE": "eval", "OUT_DIR": "nowhere"}, "MODE=eval needs the artifact nowhere/final_model.ptz"),
    (1, {"DATA_DIR": "nowhere", "CORPUS": "shards"}, "no tokenizer at nowhere/"),
    pytest.param(0, {"TTT_EPOCH": "2"}, "did you mean TTT_EPOCHS?", marks=pytest.mark.slow)]


@pytest.mark.parametrize("ranks, env, message", BAD_INPUT, ids=range(len(BAD_INPUT)))
def test_bad_input_ends_in_one_message_before_any_work(tmp_path, ranks, env, message):
    done = torchrun(ranks, str(ROOT / "train_gpt.py"), cwd=tmp_path, env={**SMALL, **env})
    assert done.returncode != 0 and done.stderr.count(message) == (2 if ranks else 1)
    assert message in "".join(done.stderr.splitlines()[-3:]), "torchrun's report, too, ends with it"
    assert "train_loss" not in done.stdout and not (tmp_path / "logs").exists()


def test_arguments_are_refused(tmp_path):
    """`--help` would otherwise begin a run."""
    for argument in ("--help", "ITERATIONS=5"):
        done = torchrun(0, str(ROOT / "train_gpt.py"), argument, cwd=tmp_path, env=SMALL)
        assert done.returncode == 2 and f"train_gpt.py: {argument}: settings are environment" in done.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"},
                                 {"RANK": "0", "WORLD_SIZE": "1"}], ids=str)
def test_half_a_launcher_is_refused(monkeypatch, env):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train_gpt.UsageError, match="torchrun sets all of them"):
        train_gpt.Runtime(train_gpt.Config())


OWN_VARIABLE = """
import os, runpy, sys
path, os.environ[sys.argv[2]] = sys.argv[1], os.environ["RANK"]
del sys.argv[1:]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("name, what", [
    pytest.param("SEED", "settings", marks=pytest.mark.slow), ("DATA_DIR", "training shards")])
def test_ranks_that_are_told_different_things_are_refused(runs, tmp_path, name, what):
    """Each has variables and folders of its own: a seed, and shards of which one token differs."""
    for rank in "01":
        shutil.copytree(runs[0].folder / "out" / "smoke_data", tmp_path / rank)
    shard, = (tmp_path / "1").rglob("fineweb_train*")
    shard.write_bytes(shard.read_bytes()[:-2] + b"\7\0")
    (tmp_path / "own.py").write_text(OWN_VARIABLE)
    done = torchrun(2, "own.py", str(ROOT / "train_gpt.py"), name, cwd=tmp_path, env={**SMALL, "DATA_DIR": "0"})
    assert done.returncode != 0 and f"ranks [1] differ in {what}: " in done.stderr, done.stderr
    assert "train_loss" not in done.stdout


def start(folder, runs, **env):
    """A run of very many steps on the smoke corpus that `runs` has made; returns once it is training."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(runs[0].folder / "out" / "smoke_data", folder / "out" / "smoke_data")
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if env.pop("ranks", 1) == 2 else []
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    process = subprocess.Popen(
        [sys.executable, *ranks, str(ROOT / "train_gpt.py")], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**clean, **SMALL, "ITERATIONS": "20000", "OMP_NUM_THREADS": "1", **env})
    said = ""
    while "train_loss" not in said:
        line = process.stdout.readline()
        assert line, f"it ended before it trained: {said}"
        said += line
    return process


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminated_run_leaves_weights_log_and_record(runs, tmp_path, ranks):
    process = start(tmp_path / "run", runs, ranks=ranks)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM if ranks == 1 else process.returncode != 0, said
    record = json.loads((tmp_path / "run" / "logs" / "run.json").read_text())
    assert re.search(r"stopped by a signal after step \d+", record["stopped"]) and record["compliant"] is None
    assert "stopped by a signal" in (tmp_path / "run" / "logs" / "run.txt").read_text()
    weights = torch.load(tmp_path / "run" / "out" / "stopped_model.pt", weights_only=True)
    assert all(p.isfinite().all() for p in weights.values())
    assert ranks == 2 or "Traceback" not in said  # torchrun itself writes one
    assert not (tmp_path / "run" / "out" / "final_model.ptz").exists()


def test_a_full_disk_loses_no_artifact(runs, tmp_path):
    """No file may grow beyond 200 kB: the weights cannot be written, and what an earlier run left is as it was."""
    folder = tmp_path / "out"
    shutil.copytree(runs[0].folder / "out", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, **SMALL, "SEED": "2", "ITERATIONS": "1", "OMP_NUM_THREADS": "1",
             "QUANTIZER": "sdclip"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert done.returncode == 1 and "train_gpt.py: [Errno 27]" in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert "File too large" in json.loads((tmp_path / "logs" / "run.json").read_text())["stopped"]


def test_a_disk_without_room_for_the_weights_is_named_before_any_work(tmp_path, rt, monkeypatch):
    """GPT's weights in fp32, to the byte."""
    config = tiny_config(out_dir=tmp_path / "out", log_dir=tmp_path)
    weights = 4 * sum(p.numel() for p in train_gpt.GPT(config).parameters())
    for free in (weights, weights - 1):
        monkeypatch.setattr(train_gpt.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with contextlib.nullcontext() if free == weights else pytest.raises(UsageError, match=f"alone are {weights:,}"):
            train_gpt.check_machine(config, rt)


@pytest.mark.parametrize("name, folder", [
    ("OUT_DIR", "link"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
    ("LOG_DIR", "link/below"), ("OUT_DIR", "file/below"), ("LOG_DIR", "file/below")])])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, name, folder):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "link").symlink_to("nowhere")
    done = torchrun(0, str(ROOT / "train_gpt.py"), cwd=tmp_path, env={**SMALL, name: folder})
    assert done.returncode == 2 and f"{name}=" in done.stderr and "cannot be written to" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
