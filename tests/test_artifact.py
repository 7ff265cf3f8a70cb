"""Room 8: the container gives back what went in and refuses everything else."""
import contextlib
import dataclasses
import hashlib
import json
import lzma
import pickle
import random
import struct
import tracemalloc
import zipfile

import brotli
import pytest
import torch
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt
from train_gpt import ArtifactError, Config, UsageError, artifact_header, pack_artifact, unpack_artifact


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "empty": (0,), "empty matrix": (3, 0), "one": (1,), "row": (1, 7), "cube": (3, 5, 7)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"int8 {name}"] = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        tensors[f"fp32 {name}"] = torch.randn(shape, generator=generator)
        tensors[f"fp16 {name}"] = torch.randn(shape, generator=generator).half()
    tensors["special \u00e9"] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    tensors["transposed"] = torch.randn(4, 6, generator=generator).T
    tensors["parameter"] = torch.nn.Parameter(torch.randn(5, generator=generator))
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, shape and dtype included."""
    raw = [t.detach().contiguous().numpy().tobytes() for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]


def small_artifact(compressor: str = "brotli") -> bytes:
    tensors = {"w.q": torch.arange(-20, 20, dtype=torch.int8).view(5, 8), "w.scale": torch.rand(5).half()}
    return pack_artifact(tensors, {"settings": {"preset": "pr1541"}, "compressor": compressor})


def craft(head, streams: bytes = b"", raw_head: bytes | None = None, head_bytes: int | None = None) -> bytes:
    """An artifact with a checksum that fits, whatever its header says."""
    packed = brotli.compress(json.dumps(head).encode()) if raw_head is None else raw_head
    size = len(packed) if head_bytes is None else head_bytes
    digest = hashlib.sha256(struct.pack("<HI", 2, size) + packed + streams).digest()
    return struct.pack("<4sHI32s", b"PGLF", 2, size, digest) + packed + streams


@contextlib.contextmanager
def little_memory(mebibytes: int = 100):
    """Fail if Python and the decompressors ever hold more at a time (LZMA's dictionary alone takes 64)."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()
    assert peak < mebibytes, f"{peak} MiB"


# --- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [4 << 20, 100])
@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_round_trip(compressor, piece_bytes, monkeypatch):
    monkeypatch.setattr(train_gpt, "PIECE_BYTES", piece_bytes)  # many streams, cut anywhere
    tensors = some_tensors()
    header = {"settings": {"seed": 3, "preset": "pr1541", "matrix_lr": 0.1}, "compressor": compressor, "note": "\u00fc"}
    data = pack_artifact(tensors, header)
    restored, head = unpack_artifact(data)
    assert head == header and set(restored) == set(tensors)
    assert [name for name, tensor in tensors.items() if not same(tensor, restored[name])] == []
    restored["fp32 cube"].add_(1)  # the tensors are the caller's own
    assert pack_artifact(tensors, header) == data  # deterministic


def test_nothing_at_all_survives_too():
    assert unpack_artifact(pack_artifact({}, {})) == ({}, {"compressor": "brotli"})


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_compression_compresses(compressor):
    """Integers as GPTQ makes them: hardly more bytes than their entropy."""
    tensor = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).mul(3).round().to(torch.int8)
    p = tensor.unique(return_counts=True)[1] / tensor.numel()
    entropy_bytes = float(-(p * p.log2()).sum()) * tensor.numel() / 8
    size = len(pack_artifact({"w": tensor}, {"compressor": compressor}))
    assert size < (1.04 if compressor == "brotli" else 1.06) * entropy_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="weight_7"):
        pack_artifact({"a": torch.ones(2), "weight_7": torch.ones(2, dtype=dtype)}, {})


# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_every_truncation_is_refused(compressor):
    data = small_artifact(compressor)
    for length in range(len(data)):
        with pytest.raises(ArtifactError):
            unpack_artifact(data[:length])
    with pytest.raises(ArtifactError):
        unpack_artifact(data + b"\0")


def test_every_flipped_bit_is_refused():
    data = bytearray(small_artifact())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            unpack_artifact(bytes(data))
        data[bit // 8] ^= 1 << bit % 8
    unpack_artifact(bytes(data))


def test_foreign_files_are_refused(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "zip.zip", "w") as archive:
        archive.writestr("a", "b")
    foreign = [b"", b"P", b"PGLF", b"\0" * 1000, b"#!/usr/bin/env python\n" * 9, pickle.dumps({"w": [1, 2]}),
               lzma.compress(b"x" * 99), brotli.compress(b"x" * 99), *(p.read_bytes() for p in tmp_path.iterdir())]
    for data in foreign:
        with pytest.raises(ArtifactError):
            unpack_artifact(data)
    good = small_artifact()
    with pytest.raises(ArtifactError, match="magic"):
        unpack_artifact(b"PGLG" + good[4:])
    with pytest.raises(ArtifactError, match="version 3"):
        unpack_artifact(good[:4] + b"\3\0" + good[6:])
    with pytest.raises(ArtifactError, match="checksum"):
        unpack_artifact(good[:-1])


# --- files that were made to deceive: the checksum fits, the header lies ---------------------------------------------

STREAM = brotli.compress(b"abcd")
HONEST = {"compressor": "brotli", "settings": {}, "tensors": [["a", "int8", [4]]], "streams": [len(STREAM)]}


def with_shape(*shape, dtype="int8", streams=HONEST["streams"]):
    return {**HONEST, "tensors": [["a", dtype, list(shape)]], "streams": streams}


def without(key):
    return {k: v for k, v in HONEST.items() if k != key}


LIES = {
    "another size": with_shape(5), "smaller": with_shape(3), "wider": with_shape(4, dtype="float16"),
    "huge": with_shape(2**40), "huge product": with_shape(2**20, 2**20), "huge beyond int64": with_shape(10**30),
    "a gibibyte": with_shape(2**30), "a gibibyte of nothing": with_shape(2**30, streams=[0] * 256),
    "over a gibibyte in two": {**HONEST, "tensors": [["a", "float32", [2**28]], ["b", "int8", [1]]]},
    "negative": with_shape(-4), "negative twice": with_shape(-2, -2), "minus one": with_shape(4, -1),
    "float": with_shape(4.0), "nan": with_shape(float("nan")), "infinity": with_shape(float("inf")),
    "bool": with_shape(4, True), "null": with_shape(None), "text": with_shape("4"), "list": with_shape([4]),
    "repeated text": with_shape(3 * 10**8, "a"), "shape is text": {**HONEST, "tensors": [["a", "int8", "4"]]},
    "shape is a number": {**HONEST, "tensors": [["a", "int8", 4]]},
    "empty but huge": with_shape(0, 10**30, streams=[]),
    "empty but huge twice": with_shape(2**62, 2**62, 0, streams=[]),
    "repeated names": {**HONEST, "tensors": [["a", "int8", [2]], ["a", "int8", [2]]]},
    "no dtype": {**HONEST, "tensors": [["a", [4]]]}, "dtype is a list": with_shape(4, dtype=["int8"]),
    "unknown dtype": with_shape(4, dtype="int4"), "a dtype of torch": with_shape(1, dtype="int32"),
    "tensors is a number": {**HONEST, "tensors": 3}, "a tensor is null": {**HONEST, "tensors": [None]},
    "no tensors": {**HONEST, "tensors": []},
    "stream too long": {**HONEST, "streams": [len(STREAM) + 1]}, "too short": {**HONEST, "streams": [len(STREAM) - 1]},
    "one too many": {**HONEST, "streams": [len(STREAM), 0]}, "no stream": {**HONEST, "streams": []},
    "negative stream": {**HONEST, "streams": [-1]}, "stream is text": {**HONEST, "streams": [str(len(STREAM))]},
    "stream is a float": {**HONEST, "streams": [float(len(STREAM))]}, "huge stream": {**HONEST, "streams": [10**40]},
    "streams that wrap around": {**with_shape(5 << 20), "streams": [2**63, 2**63 + len(STREAM)]},
    "streams is null": {**HONEST, "streams": None}, "streams is a number": {**HONEST, "streams": 8},
    "unknown compressor": {**HONEST, "compressor": "zip"}, "the other compressor": {**HONEST, "compressor": "lzma"},
    "compressor is null": {**HONEST, "compressor": None}, "compressor is a list": {**HONEST, "compressor": ["brotli"]},
    **{f"without {key}": without(key) for key in ("tensors", "streams", "compressor")},
    "header is a list": [HONEST], "header is text": "tensors", "header is a number": 5, "header is null": None,
}


def test_the_honest_header_is_read():
    tensors, head = unpack_artifact(craft(HONEST, STREAM))
    assert tensors["a"].tolist() == list(b"abcd") and head["settings"] == {}


@pytest.mark.parametrize("head", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(head, monkeypatch):
    cut = train_gpt.cut
    monkeypatch.setattr(train_gpt, "cut", lambda size: cut(size) if size <= 2**31 else pytest.fail("believed it"))
    data = craft(head, b"" if isinstance(head, dict) and head.get("streams") in ([], [0] * 256) else STREAM)
    with little_memory(), pytest.raises(ArtifactError):
        unpack_artifact(data)


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_a_stream_that_does_not_decompress_is_refused(compressor):
    for stream in (b"\xff" * 9, b"\x1b\xff\xff\xff" * 9, b"", *(train_gpt.compress(text, compressor) for text in
                                                         (b"", b"abc", b"abcde", bytes(5000)))):
        with pytest.raises(ArtifactError):
            unpack_artifact(craft({**HONEST, "compressor": compressor, "streams": [len(stream)]}, stream))


def bomb(compressor: str, mebibytes: int = 160) -> bytes:
    """A few bytes that decompress to many zeros."""
    if compressor == "brotli":
        encoder = brotli.Compressor(quality=5)
        return b"".join(encoder.process(bytes(1 << 20)) for _ in range(mebibytes)) + encoder.finish()
    encoder = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "lc": 0, "pb": 0}])
    return b"".join(encoder.compress(bytes(1 << 20)) for _ in range(mebibytes)) + encoder.flush()


UNREADABLE = {
    "empty": b"", "not compressed": b"not compressed", "empty text": brotli.compress(b""),
    "not JSON": brotli.compress(b"{not JSON"), "cut": brotli.compress(json.dumps(HONEST).encode())[:-3],
    "not UTF-8": brotli.compress(b"\xff\xfe{\""),
    "more behind it": brotli.compress(json.dumps(HONEST).encode()) + b"more",
    "nested lists": brotli.compress(b"[" * 100_000 + b"]" * 100_000),
    "nested objects": brotli.compress(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)}


@pytest.mark.parametrize("raw_head", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_header_that_cannot_be_read_is_refused(raw_head):
    with pytest.raises(ArtifactError):
        unpack_artifact(craft(None, STREAM, raw_head))


@pytest.mark.parametrize("head_bytes", [0, 5, 10**6, 2**32 - 1])
def test_a_header_of_another_length_is_refused(head_bytes):
    with pytest.raises(ArtifactError):
        unpack_artifact(craft(HONEST, STREAM, head_bytes=head_bytes))


@pytest.mark.parametrize("where", ["header", "brotli", "lzma"])
def test_decompression_bombs_are_refused(where):
    packed = bomb("lzma" if where == "lzma" else "brotli")
    assert len(packed) < 1 << 18
    data = (craft(None, STREAM, packed) if where == "header" else
            craft({**HONEST, "compressor": where, "streams": [len(packed)]}, packed))
    with little_memory(), pytest.raises(ArtifactError):
        unpack_artifact(data)


# --- fuzzing --------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four random changes: bits, bytes, runs of bytes set, cut out, doubled or moved; numbers made huge."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 40])
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at:at + length]
        elif kind == 3:
            data[at:at] = data[at:at + length]
        elif kind == 4:
            data[at:at + length] = rng.choice([b"\0", b"\xff", b"9", b"-", b"[", b'"']) * length
        elif kind == 5:
            data[at:at] = rng.randbytes(length)
        else:
            del data[at:]
    return bytes(data)


def fuzz(count: int, rt) -> tuple[int, int]:
    """Mutate a real artifact; returns how many mutants were refused and how many read (checksum put right again)."""
    config, rng, refused = tiny_config(), random.Random(0), 0
    good = pack_artifact(tensors_of(tiny_model(config)), artifact_header(config))
    _, _, head_bytes, _ = train_gpt.ARTIFACT_PREFIX.unpack_from(good)
    begin = train_gpt.ARTIFACT_PREFIX.size
    head, streams = brotli.decompress(good[begin:begin + head_bytes]), good[begin + head_bytes:]
    for number in range(count):
        if number % 4 == 0:  # the file as it is, checksum and all: always refused
            data = mutated(rng, good)
            if data != good:
                with pytest.raises(ArtifactError):
                    unpack_artifact(data)
            refused += 1
            continue
        raw_head, raw_streams = brotli.compress(mutated(rng, head) if number % 4 > 1 else head, quality=1), streams
        if number % 4 in (1, 3):
            raw_streams = mutated(rng, streams)
        if number % 16 == 15:
            raw_head = mutated(rng, raw_head)
        try:
            tensors, read = unpack_artifact(craft(None, raw_streams, raw_head))
            model = train_gpt.model_from_artifact(config, rt, tensors)
            if isinstance(read.get("settings"), dict):
                Config.from_env({"MODE": "eval"}, read["settings"])
        except (ArtifactError, UsageError):
            refused += 1
        else:
            assert all(p.isfinite().all() for p in model.parameters())
    return refused, count - refused


def test_mutated_artifacts_are_refused_or_whole(rt):
    refused, read = fuzz(400, rt)
    assert refused > 300


@pytest.mark.slow
def test_ten_thousand_mutated_artifacts(rt):
    with little_memory(400):
        refused, read = fuzz(10_000, rt)
    print(f"{refused} refused, {read} read")
    assert refused > 8000 and read > 0


# --- from an artifact back to the settings and the model --------------------------------------------------------------


def stored_settings(config: Config) -> dict:
    """The settings as they come back from a file."""
    return unpack_artifact(pack_artifact({}, artifact_header(config)))[1]["settings"]


def described(config: Config) -> dict:
    """What an artifact has to remember: model, optimization, quantization, evaluation, preset, seed."""
    rooms = ("model", "optimizer", "quantization", "evaluation")
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
            if f.metadata["room"] in rooms or f.name in ("preset", "seed")}


@pytest.mark.parametrize("env", [
    {}, {"SEED": "7"}, {"NUM_LAYERS": "9", "MATRIX_LR": "0.025", "PARALLEL_RESIDUAL": "none", "EVAL_STRIDE": "128"},
    {"TTT_ENABLED": "0"}, {"PRESET": "smoke"}, {"SKIP_GATES_ENABLED": "0", "LN_SCALE": "0", "COMPRESSOR": "lzma"},
    {"PRESET": "smoke", "TTT_ENABLED": "0", "NUM_LAYERS": "11", "EMA_DECAY": "0.9965", "MUON_MOMENTUM": "0.97"},
    {"PRESET": "smoke", "SEED": "5", "TTT_LR": "0.0025", "EVAL_DROP_TAIL": "1", "ADAM_EPS": "1e-10"}, tiny_env()],
    ids=lambda env: ",".join(f"{k}={v}" for k, v in list(env.items())[:3]) or "defaults")
def test_an_artifact_remembers_its_settings(env):
    config = Config.from_env(env)
    stored = stored_settings(config)
    assert described(Config.from_env({"MODE": "eval"}, stored)) == described(config)
    machine = {f.name for f in dataclasses.fields(Config) if f.metadata["room"] in ("run", "data", "collect")}
    assert not (machine - {"preset", "seed"}) & set(stored)


def test_the_artifacts_compressor_is_the_settings():
    assert artifact_header(tiny_config(COMPRESSOR="lzma"))["compressor"] == "lzma"
    assert artifact_header(tiny_config())["compressor"] == "brotli"


@pytest.mark.parametrize("env, conflict", [
    ({}, "NUM_LAYERS=10"), ({}, "LOGIT_SOFTCAP=20"), ({}, "LN_SCALE=0"), ({"NUM_LAYERS": "9"}, "NUM_LAYERS=11"),
    ({"PRESET": "smoke"}, "VOCAB_SIZE=8192"), ({"PRESET": "smoke"}, "NUM_LOOPS=1"),
    ({"PRESET": "smoke"}, "PRESET=pr1541"), ({}, "PRESET=smoke"), ({}, "SEED=7"), ({}, "MATRIX_LR=0.5"),
    ({}, "MATRIX_BITS=2"), ({}, "ITERATIONS=7"), ({}, "MAX_WALLCLOCK_SECONDS=900")])
def test_what_an_artifact_was_made_with_cannot_be_changed(env, conflict):
    stored = stored_settings(Config.from_env(env))
    name, value = conflict.split("=")
    with pytest.raises(UsageError, match=f"(?s){name}.*artifact"):
        Config.from_env({"MODE": "eval", name: value}, stored)


def test_evaluation_settings_may_differ_from_the_artifacts():
    stored = stored_settings(Config.from_env({"NUM_LAYERS": "9"}))
    config = Config.from_env({"MODE": "eval", "EVAL_STRIDE": "256", "TTT_ENABLED": "0", "NUM_LAYERS": "9"}, stored)
    assert (config.eval_stride, config.ttt_enabled, config.num_layers) == (256, False, 9)


def test_the_file_in_out_dir_decides_in_eval_mode(tmp_path):
    config = tiny_config()
    (tmp_path / train_gpt.ARTIFACT_NAME).write_bytes(pack_artifact({}, artifact_header(config)))
    env = {"MODE": "eval", "OUT_DIR": str(tmp_path)}
    assert described(train_gpt.read_config(env)) == described(config)
    with pytest.raises(UsageError, match="NUM_LAYERS"):
        train_gpt.read_config({**env, "NUM_LAYERS": "7"})
    with pytest.raises(UsageError, match="final_model.ptz"):
        train_gpt.read_config({**env, "OUT_DIR": str(tmp_path / "nothing")})


@pytest.mark.parametrize("settings", [
    [1], "text", 5, {"num_layers": "many"}, {"num_layers": 10**9}, {"num_layers": [1]}, {"num_layers": None},
    {"preset": "another"}, {"num_heads": 3}, {"a_setting_of_a_later_version": 1}], ids=str)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings):
    (tmp_path / train_gpt.ARTIFACT_NAME).write_bytes(craft({**HONEST, "settings": settings}, STREAM))
    with pytest.raises((UsageError, ArtifactError)):
        train_gpt.read_config({"MODE": "eval", "OUT_DIR": str(tmp_path)})


def test_an_artifact_has_no_say_in_folders_and_machine_settings(tmp_path):
    folders = {"log_dir": "/foreign", "run_id": "../x", "data_dir": "/foreign", "mode": "train", "device": "cuda"}
    (tmp_path / train_gpt.ARTIFACT_NAME).write_bytes(craft({**HONEST, "settings": folders}, STREAM))
    with contextlib.suppress(UsageError, ArtifactError):
        config = train_gpt.read_config({"MODE": "eval", "OUT_DIR": str(tmp_path)})
        assert config == Config.from_env({"MODE": "eval", "OUT_DIR": str(tmp_path)})


def tensors_of(model: train_gpt.GPT) -> dict[str, torch.Tensor]:
    """An artifact's tensors of a tiny model, one bank quantized by hand."""
    tensors = {name: p.detach().half() for name, p in model.named_parameters() if name != "up_bank"}
    scale = model.up_bank.detach().abs().amax(-1) / 31
    return {**tensors, "up_bank.q": (model.up_bank.detach() / scale[..., None]).round().to(torch.int8),
            "up_bank.scale": scale.half()}


def test_a_model_comes_back_from_its_artifact(rt):
    config = tiny_config()
    model = tiny_model(config)
    restored = train_gpt.model_from_artifact(config, rt, tensors_of(model))
    assert restored.looping and not train_gpt.model_from_artifact(
        tiny_config(NUM_LOOPS=0), rt, tensors_of(tiny_model(tiny_config(NUM_LOOPS=0)))).looping
    for (name, p), (_, q) in zip(model.named_parameters(), restored.named_parameters()):
        assert q.dtype == torch.float32
        if name == "up_bank":
            assert 0 < (p - q).abs().max() < 0.51 * p.abs().max() / 31
        else:
            assert torch.equal(q, p.half().float()), name


@pytest.mark.parametrize("other", [{"NUM_LAYERS": 7}, {"MODEL_DIM": 128}, {"VOCAB_SIZE": 301}, {"NUM_KV_HEADS": 4},
                                   {"MLP_MULT": 3}, {"SKIP_GATES_ENABLED": 0}, {"PARALLEL_RESIDUAL": "none"},
                                   {"NUM_LOOPS": 1}], ids=str)
def test_another_models_tensors_are_refused(rt, other):
    """Both ways round: tensors that are missing, of another shape, or too many."""
    pair = tiny_config(), tiny_config(**other)
    for mine, theirs in (pair, pair[::-1]):
        with pytest.raises(ArtifactError):
            train_gpt.model_from_artifact(mine, rt, tensors_of(tiny_model(theirs)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(rt, bad):
    config = tiny_config()
    for name in ("embedding", "up_bank.scale"):
        tensors = tensors_of(tiny_model(config))
        tensors[name].view(-1)[3] = bad
        with pytest.raises(ArtifactError, match=f"{name.split('.')[0]} holds values that are not finite"):
            train_gpt.model_from_artifact(config, rt, tensors)


def test_incomplete_tensors_are_refused(rt):
    config = tiny_config()
    whole = tensors_of(tiny_model(config))
    for missing in ("up_bank.q", "up_bank.scale", "embedding", "q_gain"):
        with pytest.raises(ArtifactError, match=missing.split(".")[0]):
            train_gpt.model_from_artifact(config, rt, {n: t for n, t in whole.items() if n != missing})
    for scale in (torch.ones(6, 255).half(), torch.ones(7, 256).half(), torch.ones(2, 6, 256).half()):
        with pytest.raises(ArtifactError, match="up_bank"):
            train_gpt.model_from_artifact(config, rt, {**whole, "up_bank.scale": scale})


# --- the contest's size -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_full_model_fits_the_cap(rt):
    """At its random initial weights, which compress no better than trained ones."""
    config = Config.from_env({"DEVICE": "cpu", "TTT_ENABLED": "0", "QUANTIZER": "sdclip"})
    torch.manual_seed(config.seed)
    model = train_gpt.GPT(config)
    sites = {site: matrix.size(-1) for bank, names in model.matrix_sites().items()
             for site, matrix in zip(names, getattr(model, bank) if bank != "embedding" else [model.embedding])}
    tensors = train_gpt.quantize_rows(config, rt, model, {site: torch.eye(width) for site, width in sites.items()})
    artifact = pack_artifact(tensors, artifact_header(config))
    code = train_gpt.pack_source(train_gpt.SOURCE)
    print(f"code {len(code)} + artifact {len(artifact)} = {len(code) + len(artifact)} bytes")
    assert len(code) + len(artifact) < train_gpt.SUBMISSION_CAP_BYTES == 16_000_000
    restored, head = unpack_artifact(artifact)
    assert all(same(tensor, restored[name]) for name, tensor in tensors.items())
    assert described(Config.from_env({"MODE": "eval"}, head["settings"])) == described(config)
