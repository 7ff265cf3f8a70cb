"""What the tests share: a tiny configuration, one rank's runtime, small shards and a way to run several ranks."""
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
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


WORKS: dict = {}  # of the fixtures made by `ahead`, in the order of their modules
BEGUN: dict[str, Future] = {}
OTHER_CORE, FOLDERS = ThreadPoolExecutor(1), tempfile.TemporaryDirectory(prefix="train_gpt_tests_")


def ahead(work):
    """Make a fixture of work(folder), which only waits for other processes: it begins with the session.

    Tests use one core, such processes the other, and the results are there when the tests come to them.
    """
    WORKS[work.__name__] = work
    return pytest.fixture(scope="session", name=work.__name__)(lambda: BEGUN[work.__name__].result())


def pytest_collection_finish(session):
    wanted = {name for item in session.items for name in item.fixturenames}
    for name, work in WORKS.items():
        if name in wanted and not session.config.option.collectonly:
            folder = Path(FOLDERS.name, name)
            folder.mkdir()
            BEGUN[name] = OTHER_CORE.submit(work, folder)


def pytest_unconfigure():
    OTHER_CORE.shutdown(cancel_futures=True)
    FOLDERS.cleanup()


@pytest.fixture(scope="session")
def rt() -> train_gpt.Runtime:
    """The runtime of one CPU rank."""
    return train_gpt.Runtime(tiny_config())


def torchrun(ranks: int, *command: str, cwd: Path, env: dict[str, str], timeout: int = 240, nodes: int = 1):
    """Run a Python script on several gloo ranks of this machine; returns the finished process (text output)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command],
        cwd=cwd, env={**clean, "OMP_NUM_THREADS": "1", **env}, timeout=timeout, capture_output=True, text=True)
