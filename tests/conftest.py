"""What the tests share: a tiny configuration, one rank's runtime, small shards and a way to run several ranks."""
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits

import torch

import train_gpt

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

TINY = dict(
    DEVICE="cpu", VOCAB_SIZE="300", NUM_LAYERS="6", MODEL_DIM="64", NUM_HEADS="4", NUM_KV_HEADS="2", ROPE_DIMS="8",
    LOOP_START="2", LOOP_END="3", NUM_LOOPS="2", PARALLEL_RESIDUAL_START="4", TRAIN_SEQ_LEN="32", EVAL_SEQ_LEN="32",
    ROPE_TRAIN_SEQ_LEN="32", TRAIN_BATCH_TOKENS="256", ITERATIONS="6", MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="0",
    VAL_LOSS_EVERY="0", EVAL_STRIDE="8", TTT_CHUNK_TOKENS="128", GPTQ_CALIBRATION_BATCHES="2")


def tiny_env(**overrides) -> dict[str, str]:
    """Variables of a configuration small enough for any test; keyword arguments are further variables."""
    return {**TINY, **{name.upper(): str(value) for name, value in overrides.items()}}


def tiny_config(**overrides) -> train_gpt.Config:
    return train_gpt.Config.from_env(tiny_env(**overrides))


def tiny_model(config: train_gpt.Config, seed: int = 0, noise: float = 0.05) -> train_gpt.GPT:
    """A model none of whose parameters is at its special initial value (zeros and ones hide mistakes)."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
        model.embedding.normal_()
    return model


def write_shards(data_dir: Path, vocab_size: int = 300, train=(3000, 2000), val=(700,), seed: int = 0) -> Path:
    """Random shards (and no tokenizer) below data_dir, a BOS every 50 tokens or so; returns their folder."""
    rng = np.random.default_rng(seed)
    folder = Path(data_dir) / "datasets" / f"fineweb10B_sp{vocab_size}"
    for split, counts in (("train", train), ("val", val)):
        for i, count in enumerate(counts):
            tokens = rng.integers(3, vocab_size, count)
            tokens[rng.random(count) < 0.02] = 1
            tokens[0] = 1
            train_gpt.write_shard(folder / f"fineweb_{split}_{i:06d}.bin", tokens)
    return folder


def fake_validation(tokens, config) -> train_gpt.ValidationData:
    """A validation split of the given tokens without files or a tokenizer; a target has 0 to 4 bytes, BOS none."""
    val = object.__new__(train_gpt.ValidationData)
    val.tokens = torch.as_tensor(tokens, dtype=torch.int32)
    val.targets = len(val.tokens) - 1
    val.target_bytes = val.tokens[1:].long() % 5 * (val.tokens[1:] != 1)
    val.bytes, val.left_out, val.sha256 = int(val.target_bytes.sum()), 0, "0"
    return val


class Characters:
    """A tokenizer of one byte per token, for the check of the byte tables."""

    is_control = is_unknown = is_unused = is_byte = staticmethod(lambda token: token < 2)

    def vocab_size(self):
        return 300

    def id_to_piece(self, token):
        return chr(token)

    def bos_id(self):
        return 1

    def decode(self, ids):
        if ids and isinstance(ids[0], list):
            return [self.decode(part) for part in ids]
        return "".join(chr(i) for i in ids if i > 1)

    def encode(self, text):
        return [self.encode(part) for part in text] if isinstance(text, list) else [ord(c) for c in text]


class Noted:
    """A record that keeps what checks find, in `found` {name: ok} and `details` {name: detail}, and nothing else."""

    def __init__(self, rt, **data):
        self.rt, self.data, self.found, self.details = rt, {"artifact_sha256": "5", **data}, {}, {}

    def check(self, name: str, ok: bool, detail: str):
        self.found[name], self.details[name] = bool(ok), detail


# --- one process of tests for each core -------------------------------------------------------------------------------


def groups_of(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Tests that share a fixture of their module stay together, in front; otherwise each function goes its own way."""
    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        made = [name for name, found in item._fixtureinfo.name2fixturedefs.items()
                if found[-1].scope in ("module", "session") and found[-1].baseid == item.nodeid.partition("::")[0]]
        groups.setdefault((not made, item.path, "" if made else item.originalname), []).append(item)
    return [group for (alone, *_), group in sorted(groups.items(), key=lambda pair: pair[0][0])]


class Reporter:
    """Writes a helper's reports to a file, a line each, from which the first process takes them."""

    def __init__(self, config: pytest.Config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        told = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        os.write(self.file.fileno(), json.dumps(told).encode() + b"\n")


def run_share(session: pytest.Session, groups: list[list[pytest.Item]], queue: int, after=lambda: None):
    """Run groups of tests until the queue, which all processes read from, has no more numbers of them."""
    def taken():
        while number := os.read(queue, 2):
            yield from groups[int.from_bytes(number, "little")]

    items = taken()
    item = next(items, None)
    while item:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after()
        if session.shouldfail or session.shouldstop:
            while os.read(queue, 1 << 16):
                pass
            raise session.Failed(session.shouldfail or session.shouldstop)
        item = following


def help_out(session: pytest.Session, groups: list[list[pytest.Item]], queue: int, file):
    """What a helper does, a fork of the first process: its share, silently, with a capture of output of its own."""
    status, plugins = 1, session.config.pluginmanager
    try:
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        plugins.unregister(plugins.getplugin("terminalreporter"))
        plugins.register(Reporter(session.config, file))
        with contextlib.suppress(session.Failed):
            run_share(session, groups, queue)
        status = 0
    finally:
        os._exit(status)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run many tests in as many processes as there are cores; pytest itself shows and counts all reports."""
    config, groups = session.config, groups_of(session.items)
    cores = min(len(os.sched_getaffinity(0)), 4)
    few = len(session.items) < 20 or cores == 1
    if few or config.option.collectonly or config.option.usepdb or session.testsfailed:
        return None
    queue, numbers = os.pipe()
    os.write(numbers, b"".join(number.to_bytes(2, "little") for number in range(len(groups))))
    os.close(numbers)
    with tempfile.TemporaryFile("a+b") as reports:  # all write to its end
        helpers, read = [], 0
        for _ in range(cores - 1):
            helpers.append(os.fork())
            if not helpers[-1]:
                help_out(session, groups, queue, reports)

        def show():
            nonlocal read
            lines, end, _ = os.pread(reports.fileno(), 1 << 26, read).rpartition(b"\n")
            read += len(lines + end)
            for line in lines.splitlines():
                report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
                config.hook.pytest_runtest_logreport(report=report)

        try:
            run_share(session, groups, queue, show)
        finally:
            lost = [pid for pid in helpers if os.waitpid(pid, 0)[1]]
        show()
    if lost:
        raise RuntimeError("a helper of the tests has died before its share was done")
    return True


def path_of(indices: torch.Tensor) -> torch.Tensor:
    """Integers of the trellis paths that have these indices [..., out, in]: any indices are some path's."""
    indices = indices.numpy()
    integers, state = np.empty_like(indices), np.zeros((*indices.shape[:-2], indices.shape[-1]), np.int32)
    for row in range(indices.shape[-2]):
        state *= row % 128 > 0
        integers[..., row, :] = 2 * indices[..., row, :] + state % 2
        state = train_gpt.NEXT_STATE[state, indices[..., row, :] % 2]
    return torch.from_numpy(integers)


@pytest.fixture(scope="session")
def rt() -> train_gpt.Runtime:
    """The runtime of one CPU rank."""
    return train_gpt.Runtime(tiny_config())


def torchrun(ranks: int, *command: str, cwd: Path, env: dict[str, str], timeout: int = 240):
    """Run a Python script on several gloo ranks of this machine, or (0) without torchrun; its end and text output."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run([sys.executable, *agent, *command], cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1", **env},
                          timeout=timeout, capture_output=True, text=True)
