"""Room 8: the container gives back what went in and refuses everything else."""
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import lzma
import math
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from conftest import path_of, tiny_config, tiny_env, tiny_model
from test_quantization import calibrated, narrow_model, on_ranks

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


def trellis_tensors(name: str = "w", shape=(2, 70, 9), spread: float = 3) -> dict[str, torch.Tensor]:
    """A trellis tensor and what goes with it. Any indices are those of some path; some of these need escapes."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    matrices, rows, columns = shape
    tails = 1 / torch.rand(shape, generator=generator).clamp_min(1e-3)
    return {f"{name}.q": path_of((spread * torch.randn(shape, generator=generator) * tails).round().int()),
            f"{name}.rows": torch.randint(-9, 50, (matrices, rows), dtype=torch.int8, generator=generator),
            f"{name}.columns": torch.randint(-9, 10, (matrices, columns), dtype=torch.int8, generator=generator),
            f"{name}.step": torch.rand(matrices, generator=generator)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, shape and dtype included."""
    raw = [t.detach().contiguous().numpy().tobytes() for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]


def small_artifact(compressor: str = "brotli") -> bytes:
    tensors = {"w.q": torch.arange(-20, 20, dtype=torch.int8).view(5, 8), "w.scale": torch.rand(5).half(),
               **trellis_tensors("v", (1, 3, 5))}
    return pack_artifact(tensors, {"settings": {"preset": "pr1541"}, "compressor": compressor})


def craft(head, streams: bytes = b"", raw_head: bytes | None = None, head_bytes: int | None = None) -> bytes:
    """An artifact with a checksum that fits, whatever its header says."""
    packed = brotli.compress(json.dumps(head).encode()) if raw_head is None else raw_head
    size = len(packed) if head_bytes is None else head_bytes
    digest = hashlib.sha256(struct.pack("<HI", 3, size) + packed + streams).digest()
    return struct.pack("<4sHI32s", b"PGLF", 3, size, digest) + packed + streams


def packed_as_it_stands(plain: dict[str, torch.Tensor]) -> bytes:
    """The artifact of plain tensors, the parts of the entropy code among them, whatever these are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "encode_trellises", dict)
        return pack_artifact(plain, {})


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


@pytest.mark.parametrize("compressor, piece_bytes", [("brotli", 1000), ("lzma", 4 << 20)])
def test_round_trip(compressor, piece_bytes, monkeypatch):
    monkeypatch.setattr(train_gpt, "PIECE_BYTES", piece_bytes)  # many streams, cut anywhere
    tensors = {**some_tensors(), **trellis_tensors(), **trellis_tensors("one", (1, 1, 1)),
               **trellis_tensors("no matrix", (0, 5, 3))}
    header = {"settings": {"seed": 3, "preset": "pr1541", "matrix_lr": 0.1}, "compressor": compressor, "note": "\u00fc"}
    data = pack_artifact(tensors, header)
    restored, head = unpack_artifact(data)
    assert head == header and set(restored) == set(tensors)
    assert [name for name, tensor in tensors.items() if not same(tensor, restored[name])] == []
    restored["fp32 cube"].add_(1)  # the tensors are the caller's own
    assert pack_artifact(tensors, header) == data  # deterministic


GOLDEN = Path(__file__).with_name("golden.ptz")
GOLDEN_SHA256 = "d804b9bb901636525f161febbdff8757a788c15185852a8b7eef90907c75caff"


def golden_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, small and large indices: whole numbers and quarters only, so that they are the same everywhere."""
    def numbers(dtype, *shape):
        i = torch.arange(math.prod(shape)).view(shape)
        return ((i * 7919 % 101 - 50) ** 3 // 4000).to(dtype)

    tensors = {"int8": numbers(torch.int8, 4, 9), "fp16": numbers(torch.half, 7) / 4, "fp32": numbers(torch.float, 5)}
    for name, (matrices, rows, columns) in {"w": (2, 70, 9), "v": (1, 3, 2)}.items():
        tensors |= {f"{name}.q": path_of(numbers(torch.int32, matrices, rows, columns) ** 3),
                    f"{name}.rows": numbers(torch.int8, matrices, rows), f"{name}.step": torch.full((matrices,), 0.25),
                    f"{name}.columns": numbers(torch.int8, matrices, columns) // 4}
    return tensors


def test_the_format_stays_as_it_is():
    """golden.ptz is pack_artifact(golden_tensors(), {"settings": {"seed": 1}}); a new format needs a new version."""
    data, tensors = GOLDEN.read_bytes(), golden_tensors()
    restored, head = unpack_artifact(data)
    assert head == {"settings": {"seed": 1}, "compressor": "brotli"} and set(restored) == set(tensors)
    assert all(same(tensor, restored[name]) for name, tensor in tensors.items())
    digest = hashlib.sha256()
    for name in sorted(restored):
        digest.update(f"{name} {restored[name].dtype} {tuple(restored[name].shape)}".encode())
        digest.update(restored[name].numpy().tobytes())
    assert digest.hexdigest() == GOLDEN_SHA256
    if brotli.__version__ == "1.2.0":  # another encoder may find other bytes for the same streams
        assert pack_artifact(tensors, head) == data


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


# --- the entropy coder ------------------------------------------------------------------------------------------------

LIMITS = np.array([0, 1, -1, 15, 16, -16, -17, 2**20, -2**20, 2**31 - 1, -2**31, 31, 32, -32, -33, 63, -64], np.int32)


KINDS = {
    "zeros": lambda rng, count: np.zeros(count), "one value": lambda rng, count: np.full(count, -7),
    "limits": lambda rng, count: rng.choice(LIMITS, count),
    "all": lambda rng, count: rng.integers(-2**31, 2**31, count),
    "mostly zeros": lambda rng, count: (rng.random(count) < 1e-3) * -2.0**31,
    "outliers": lambda rng, count: np.where(rng.random(count) < 0.01, rng.choice([-2**20, 2**20], count),
                                            rng.normal(0, 4, count)),
    "heavy tails": lambda rng, count: rng.standard_cauchy(count).clip(-2e9, 2e9),
    "narrow": lambda rng, count: rng.normal(0, 0.3, count), "usual": lambda rng, count: rng.normal(0, 2, count),
    "wide": lambda rng, count: rng.normal(0, 9, count)}


def drawn(kind: str, count: int) -> np.ndarray:
    """int32 values of a hard distribution."""
    return KINDS[kind](np.random.default_rng(count), count).round().astype(np.int32)


def with_sides(integers: torch.Tensor, rows, columns) -> dict[str, torch.Tensor]:
    return {"w.q": integers, "w.rows": torch.as_tensor(rows, dtype=torch.int8),
            "w.columns": torch.as_tensor(columns, dtype=torch.int8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (3, 130, 3), (2, 127, 4), (1, 400, 2), (0, 9, 2)], ids=str)
def test_indices_come_back_whatever_they_are(kind, shape):
    rng = np.random.default_rng(1)  # classes far beyond those there are, on both sides
    indices = drawn(kind, math.prod(shape)).reshape(shape).clip(-2**30, 2**30 - 1)
    rows, columns = rng.integers(-128, 128, shape[:2]), rng.integers(-128, 128, shape[::2])
    tensors = with_sides(path_of(torch.from_numpy(indices)), rows, columns)
    data = pack_artifact(tensors, {})
    assert all(same(tensor, tensors[name]) for name, tensor in unpack_artifact(data)[0].items())
    assert pack_artifact(tensors, {}) == data


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_come_back_as_values(kind):
    values = np.concatenate([drawn(kind, 1000), LIMITS])
    symbols, escapes = train_gpt.symbols_of(values)
    assert 0 <= symbols.min() <= symbols.max() < train_gpt.SYMBOLS and len(escapes) == (symbols >= 64).sum()
    assert np.array_equal(train_gpt.values_of(symbols, escapes), values)
    assert len(train_gpt.symbols_of(np.arange(-32, 32, dtype=np.int32))[1]) == 0  # small ones are symbols themselves


def mirrored(symbols: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Symbols of the negative integers: an even multiple's k becomes -k, an odd one's -k - 1."""
    values = train_gpt.values_of(symbols, np.zeros(0))
    return train_gpt.symbols_of(np.where(odd, -values - 1, -values).astype(np.int32))[0]


def test_frequencies_are_those_of_an_integer_and_its_negative():
    """To within a sixteenth of an octave, and a unit; what was never counted has none, all else has some."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 10, (64, 2, 96)) ** rng.integers(0, 12, (64, 2, 1))
    counts *= rng.random((64, 2, 96)) < rng.random((64, 2, 1))
    counts[:5] = 0
    counts[3, 1, 7], counts[4] = 1, 1  # one symbol alone, all alike
    counts[4, 0, 9] = 10**12  # and others that the scale would make nothing of
    levels = train_gpt.histogram_levels(counts)
    assert levels.dtype == np.int8 and levels.shape == counts.shape and levels.min() == 0
    tables = train_gpt.frequency_tables(levels)
    assert tables.dtype == np.uint32 and tables.shape == (128, 96) and (tables[:6] == 0).all()
    assert np.array_equal(tables.sum(1), np.where(counts.any(2).ravel(), 1 << 14, 0))
    small = np.arange(63)
    for odd in (0, 1):
        both = counts[:, odd].astype(float)
        both[:, small] = (both[:, small] + counts[:, odd, mirrored(small, np.full(63, odd))]) / 2
        if odd:  # of the even ones, the last symbol's negative is none any more
            both[:, [62, 63]] = counts[:, 1, 62:64].mean(1, keepdims=True)
        found = tables[odd::2]
        assert np.array_equal(found > 0, both > 0)
        ideal = both / np.maximum(both.sum(1, keepdims=True), 1) * (1 << 14)
        most = found.argmax(1)[:, None] == np.arange(96)  # takes what is left over
        # levels are off by 2^(1/16) at most, and so is their sum
        assert ((found <= ideal * 2 ** 0.126 + 1) | most).all() and ((found >= ideal * 2 ** -0.126 - 1) | most).all()


@pytest.mark.parametrize("spread, most", [
    (4, 0.003), pytest.param(20, 0.003, marks=pytest.mark.slow), pytest.param(0.6, 0.006, marks=pytest.mark.slow)])
def test_code_lengths_are_near_the_ideal(spread, most):
    """A million indices of Gaussian paths; the ideal is the entropy of their own histograms, and the escapes' bits."""
    paths = spread * torch.randn(1 << 13, 128, generator=torch.Generator().manual_seed(0))
    integers = train_gpt.trellis_round(paths).reshape(2, 1024, 512).mT.contiguous().int()
    tensors = with_sides(integers, np.zeros((2, 512)), np.zeros((2, 1024)))
    symbols, escapes = train_gpt.symbols_of(integers.numpy() >> 1)
    odd = integers.numpy() & 1
    ideal = float((np.maximum(symbols - 58, 0) * (symbols >= 64)).sum())
    for parity in (0, 1):
        counts = np.bincount(symbols[odd == parity], minlength=96)
        ideal -= (counts * np.log2(np.maximum(counts, 1) / counts.sum())).sum()
    data = pack_artifact(tensors, {})
    assert 8 * len(data) < (1 + most) * ideal, 8 * len(data) / ideal
    assert same(unpack_artifact(data)[0]["w.q"], tensors["w.q"])


@pytest.fixture
def message():
    """Chunks of contexts and symbols, the tables they come from, and their code in three lanes."""
    rng = np.random.default_rng(0)
    levels = np.zeros((train_gpt.CLASSES, 2, 96), np.int8)
    levels[:2] = rng.integers(40, 128, (2, 2, 96)) * (rng.random((2, 2, 96)) < 0.5)
    tables = train_gpt.frequency_tables(levels)
    chunks = []
    for length in (1, 0, 2, 3, 50, 7):
        contexts = rng.integers(0, 4, length)
        chunks.append((contexts, np.array([rng.choice(96, p=tables[c] / 2**14) for c in contexts], np.uint8)))
    code = train_gpt.rans_encode([(c * 96 + s).astype(np.int32) for c, s in chunks], tables, 3)
    return chunks, tables, code


def read_all(chunks, tables, states, words):
    decoder = train_gpt.RansDecoder(states, words, tables)
    found = [decoder.read(contexts) for contexts, _ in chunks]
    assert decoder.at == len(words) and (decoder.state == 1 << 16).all(), "the coded indices end elsewhere"
    return found


def test_lanes_give_back_their_symbols(message):
    chunks, tables, (states, words) = message
    assert states.dtype == np.uint32 and words.dtype == np.uint16 and len(states) == 3
    kept = states.copy()
    found = read_all(chunks, tables, states, words)
    assert all(np.array_equal(a, b) for a, (_, b) in zip(found, chunks)) and np.array_equal(states, kept)


def test_reading_anything_else_is_an_error(message):
    chunks, tables, (states, words) = message
    shorter = [(contexts[:-1], symbols) for contexts, symbols in chunks]
    for other in (chunks[:-1], chunks[1:], [*chunks, chunks[0]], [*chunks, chunks[4]], shorter):
        with pytest.raises((AssertionError, ValueError), match="coded indices|broadcast"):
            read_all(other, tables, states, words)
    for code in (words[:-1], words[1:], np.append(words, words[:1]), words[::-1], words[:0]):
        with pytest.raises((AssertionError, ValueError), match="coded indices|broadcast"):
            read_all(chunks, tables, states, code)
    for part, code in ((0, states), (1, words)):
        for bit in range(code.itemsize * 8 * len(code)):
            altered = [states.copy(), words.copy()]
            altered[part][bit % len(code)] ^= 1 << bit // len(code)
            with contextlib.suppress(AssertionError, ValueError):  # the few that are a message, are another one
                found = read_all(chunks, tables, *altered)
                same_symbols = all(np.array_equal(a, b) for a, (_, b) in zip(found, chunks))
                pytest.fail("another code gave the same symbols") if same_symbols else None


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
    with pytest.raises(ArtifactError, match="version 4"):
        unpack_artifact(good[:4] + b"\4\0" + good[6:])
    with pytest.raises(ArtifactError, match="checksum"):
        unpack_artifact(good[:-1])


# --- files that were made to deceive: the checksum fits, the header lies ---------------------------------------------

STREAM = brotli.compress(b"abcd")
HONEST = {"compressor": "brotli", "settings": {}, "escapes": 0, "tensors": [["a", "int8", [4]]],
          "streams": [len(STREAM)]}


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
    "unknown dtype": with_shape(4, dtype="int4"), "a dtype of torch": with_shape(4, dtype="uint8"),
    "a trellis alone": with_shape(1, dtype="trellis"),
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


def part_is(name, change):
    """Change one of an artifact's plain tensors."""
    return lambda plain: plain.update({name: change(plain[name])})


def code_is(name, change):
    return part_is(f"code.{name}", change)


TRELLIS_LIES = {
    "a column more": part_is("w.columns", lambda t: t[:, [0, *range(9)]]),
    "a column less": part_is("w.columns", lambda t: t[:, 1:]),
    "a row more": part_is("w.rows", lambda t: t[:, [0, *range(70)]]), "no rows": part_is("w.rows", lambda t: t[:, :0]),
    "another row": part_is("w.rows", lambda t: t.roll(1, 1)),
    "other columns": part_is("w.columns", lambda t: t.flip(1)),
    "one matrix's rows": part_is("w.rows", lambda t: t[:1]),
    "three matrices' rows": part_is("w.rows", lambda t: t[[0, 1, 1]]),
    "rows of no dimension": part_is("w.rows", lambda t: t[0, 0]),
    "no rows' exponents": lambda plain: plain.pop("w.rows"),
    "one matrix's rows for thousands": lambda plain: plain.update({
        "w.rows": torch.zeros(1, 9999, dtype=torch.int8), "w.columns": torch.zeros(9999, 1, dtype=torch.int8)}),
    "no more indices than 2^62": lambda plain: plain.update({
        "w.rows": torch.zeros(1, 1 << 15, dtype=torch.int8), "w.columns": torch.zeros(1, 1 << 16, dtype=torch.int8)}),
    **{f"no {name}": lambda plain, name=name: plain.pop(f"code.{name}")
       for name in ("levels", "escapes", "states", "words")},
    **{f"empty {name}": code_is(name, lambda t: t[:0]) for name in ("levels", "escapes", "states", "words")},
    **{f"{name} of fp32": code_is(name, lambda t: t.float()) for name in ("levels", "escapes", "states", "words")},
    **{f"{name}, one less": code_is(name, lambda t: t[:-1]) for name in ("levels", "escapes", "states", "words")},
    **{f"{name}, one more": code_is(name, lambda t: torch.cat((t, t[:1])))
       for name in ("levels", "escapes", "states", "words")},
    "a state of zero": code_is("states", torch.zeros_like), "the largest state": code_is("states", lambda t: t * 0 - 1),
    "another word": code_is("words", lambda t: t ^ (torch.arange(len(t)) == 4)),
    "the words turned round": code_is("words", lambda t: t.flip(0)),
    "no levels": code_is("levels", torch.zeros_like), "negative": code_is("levels", lambda t: -t),
    "other levels": code_is("levels", lambda t: t // 2), "one level for all": code_is("levels", torch.ones_like),
    "levels turned round": code_is("levels", lambda t: t.flip(1)),
}


@pytest.mark.parametrize("lie", [None, *TRELLIS_LIES.values()], ids=["honest", *TRELLIS_LIES])
def test_a_trellis_that_lies_is_refused(lie):
    plain = train_gpt.encode_trellises(trellis_tensors())
    if lie:
        lie(plain)
    data = packed_as_it_stands(plain)
    with little_memory(), pytest.raises(ArtifactError) if lie else contextlib.nullcontext():
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
    "Python": brotli.compress(f"dict({json.dumps(HONEST)})".encode()),
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
    config, rng, refused = tiny_config(MODEL_DIM=16, NUM_HEADS=2, NUM_KV_HEADS=1), random.Random(0), 0
    good = pack_artifact(tensors_of(tiny_model(config)), artifact_header(config))
    end = 42 + int.from_bytes(good[6:10], "little")
    head, streams = brotli.decompress(good[42:end]), good[end:]
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


def levels_moved(rng: random.Random, levels: torch.Tensor) -> torch.Tensor:
    """Levels of which some are other ones."""
    levels = levels.clone()
    for _ in range(rng.randint(1, 9)):
        place = rng.choice(levels.nonzero().tolist())
        place[2] = rng.choice([place[2], rng.randrange(96)])
        levels[tuple(place)] = rng.randrange(128)
    return levels


def bytes_mutated(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same dtype and, mostly, shape with mutated bytes."""
    data = mutated(rng, tensor.numpy().tobytes())
    if rng.random() < 0.8:
        data = data[:tensor.nbytes].ljust(tensor.nbytes, b"\1")
    values = torch.from_numpy(np.frombuffer(data[:len(data) // tensor.itemsize * tensor.itemsize],
                                            tensor.numpy().dtype).copy())
    return values.view(tensor.shape) if len(values) == tensor.numel() else values


def fuzz_decoder(count: int) -> collections.Counter:
    """Mutate what the entropy decoder gets, behind checksum and compressor; returns the outcomes."""
    rng, outcomes = random.Random(0), collections.Counter()
    good = train_gpt.encode_trellises({**trellis_tensors("w", (2, 66, 2)), **trellis_tensors("v", (1, 3, 5))})
    for _ in range(count):
        plain = dict(good)
        for name in rng.choices(list(good), k=2):
            if name == "code.levels" and rng.random() < 0.9:
                plain[name] = levels_moved(rng, good[name])
            else:
                plain[name] = bytes_mutated(rng, good[name])
        try:
            restored, _ = unpack_artifact(packed_as_it_stands(plain))
        except ArtifactError as error:
            outcomes[re.sub(r"\d+", "N", str(error))] += 1
        else:
            outcomes["read"] += 1
            for name in ("w", "v"):
                shape = (*restored[f"{name}.rows"].shape, restored[f"{name}.columns"].shape[-1])
                assert restored[f"{name}.q"].shape == shape and restored[f"{name}.q"].dtype == torch.int32
    return outcomes


def test_mutated_codes_are_refused_or_whole():
    outcomes = fuzz_decoder(100)
    for said in ("read", "do not end where they should", "histograms are", "lanes does not fit", "not be broad"):
        assert any(said in outcome for outcome in outcomes), (said, outcomes)


@pytest.mark.slow
def test_ten_thousand_mutated_artifacts(rt):
    with little_memory(400):
        refused, read = fuzz(10_000, rt)
        outcomes = fuzz_decoder(10_000)
    print(f"{refused} refused, {read} read, {outcomes}")
    assert refused > 8000 and read > 0


# --- from an artifact back to the settings and the model --------------------------------------------------------------


def stored_settings(config: Config) -> dict:
    """The settings as they come back from a file."""
    return unpack_artifact(pack_artifact({}, artifact_header(config)))[1]["settings"]


OF_OTHER_ROOMS = {"preset", "seed", "corpus", "train_batch_tokens", "train_seq_len"}


def described(config: Config) -> dict:
    """What an artifact has to remember: model, optimization, quantization, evaluation, preset, seed, batches."""
    rooms = ("model", "optimizer", "quantization", "evaluation")
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
            if f.metadata["room"] in rooms or f.name in OF_OTHER_ROOMS}


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
    assert not (machine - OF_OTHER_ROOMS) & set(stored)


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
    blanks = {"MODE": " eval ", "OUT_DIR": f"{tmp_path}\n"}  # are no part of a value, and of none of them
    assert described(train_gpt.read_config(blanks)) == described(config)


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
    """An artifact's tensors of a tiny model, two banks quantized by hand: rows of integers, and trellis paths."""
    tensors = {name: p.detach().half() for name, p in model.named_parameters() if name not in ("up_bank", "kv_bank")}
    up, kv = model.up_bank.detach(), model.kv_bank.detach()
    scale = up.abs().amax(-1) / 31
    matrices, _, columns = kv.shape
    exponents = torch.arange(-6, columns - 6, dtype=torch.int8).fmod(7).expand(matrices, -1)
    step = torch.linspace(0.01, 0.02, matrices)
    paths = (kv / train_gpt.column_steps(step, exponents)).mT[..., None]  # all columns at once
    integers = train_gpt.round_columns(paths)[..., 0].mT.contiguous()
    return {**tensors, "up_bank.q": (up / scale[..., None]).round().to(torch.int8), "up_bank.scale": scale.half(),
            "kv_bank.q": integers.int(), "kv_bank.step": step,
            "kv_bank.rows": torch.full(kv.shape[:2], 8, dtype=torch.int8), "kv_bank.columns": exponents}


def test_settings_of_a_huge_model_are_refused(rt):
    config = tiny_config(NUM_LAYERS=64, MODEL_DIM=16384, MLP_MULT=16, NUM_HEADS=256)
    with little_memory(), pytest.raises(ArtifactError, match="huge model"):
        train_gpt.model_from_artifact(config, rt, {})


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
        elif name == "kv_bank":
            assert 0 < (p - q).abs().max() < 2 * 0.02 * 2 ** 1.5 and (p - q).std() < 0.02
            tensors = tensors_of(model)
            q_, step, columns = (tensors[f"kv_bank.{part}"] for part in ("q", "step", "columns"))
            assert torch.equal(q, q_ * train_gpt.column_steps(step, columns))  # to the last bit
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
    for name in ("embedding", "up_bank.scale", "kv_bank.step"):
        tensors = tensors_of(tiny_model(config))
        tensors[name].view(-1)[3] = bad
        with pytest.raises(ArtifactError, match=f"{name.split('.')[0]} holds values that are not finite"):
            train_gpt.model_from_artifact(config, rt, tensors)


def test_incomplete_tensors_are_refused(rt):
    config = tiny_config()
    whole = tensors_of(tiny_model(config))
    for missing in ("up_bank.q", "up_bank.scale", "embedding", "q_gain", "kv_bank.q", "kv_bank.step",
                    "kv_bank.columns"):
        with pytest.raises(ArtifactError, match=missing.split(".")[0]):
            train_gpt.model_from_artifact(config, rt, {n: t for n, t in whole.items() if n != missing})
    for scale in (torch.ones(6, 255).half(), torch.ones(7, 256).half(), torch.ones(2, 6, 256).half()):
        with pytest.raises(ArtifactError, match="up_bank"):
            train_gpt.model_from_artifact(config, rt, {**whole, "up_bank.scale": scale})
    for part, (name, tensor) in itertools.product((0, 1, 2), whole.items()):
        if name in ("kv_bank.q", "kv_bank.step", "kv_bank.columns") and part < tensor.dim():
            for other in (tensor[None], tensor.select(part, 0), tensor.narrow(part, 0, 1), tensor.narrow(part, 0, 0),
                          torch.cat([tensor, tensor], part)):
                with pytest.raises(ArtifactError, match="kv_bank"):
                    train_gpt.model_from_artifact(config, rt, {**whole, name: other})
    for dtype in (torch.int8, torch.float16, torch.float32):
        with pytest.raises(ArtifactError, match="kv_bank"):
            train_gpt.model_from_artifact(config, rt, {**whole, "kv_bank.q": whole["kv_bank.q"].to(dtype)})


# --- the fit to a size ------------------------------------------------------------------------------------------------


class FakeQuantizer:
    """Makes tensors of random bytes, as many as `bytes_at(bits per weight)` says."""

    weights = 20_000

    def __init__(self, bytes_at):
        self.bytes_at, self.bits = bytes_at, []

    def log_step_for(self, bits: float) -> float:
        return -3.0 - bits

    def quantize(self, log_step: float) -> dict[str, torch.Tensor]:
        self.bits.append(-3.0 - log_step)
        size = max(int(self.bytes_at(self.bits[-1])), 0)
        return {"noise": torch.from_numpy(np.random.default_rng(0).integers(-128, 128, size).astype(np.int8))}


SIZES = {
    "as expected": lambda bits: 2500 * bits, "more than expected": lambda bits: 3000 * bits + 1500,
    "less": lambda bits: 1500 * bits, "as of Gaussians": lambda bits: 1250 * math.log2(1 + 4 ** bits),
    "in stairs": lambda bits: 2500 * bits // 3 * 3,  # within the tolerance
    "weights of two kinds": lambda bits: 1500 * bits + 1000 * max(bits - 3, 0)}


@pytest.mark.parametrize("bytes_at", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("target", [6000, 8192])
def test_the_artifact_fills_its_target(rt, bytes_at, target):
    quantizer = FakeQuantizer(bytes_at)
    artifact = train_gpt.fit_artifact(tiny_config(), rt, quantizer, target)
    assert target * (1 - 5e-4) <= len(artifact) <= target and len(quantizer.bits) <= 12
    assert same(unpack_artifact(artifact)[0]["noise"], quantizer.quantize(-3.0 - quantizer.bits[-1])["noise"])


@pytest.mark.parametrize("sizes, best", [([8001, 7000, 8001, 8000], 8000),
                                         ([7000, 8001, 7990, 8002, 7980, 8001] * 2, 7990)])
def test_a_byte_too_many_is_too_many(rt, monkeypatch, sizes, best):
    """Of a dozen tries the longest that fits is taken, whatever came after it."""
    left = iter(sizes)
    monkeypatch.setattr(train_gpt, "pack_artifact", lambda tensors, header: bytes(next(left)))
    assert len(train_gpt.fit_artifact(tiny_config(), rt, FakeQuantizer(SIZES["as expected"]), 8000)) == best
    assert list(left) == []


def test_pruning_drops_ones_of_small_steps_until_it_fits(rt):
    """PR #1395: +-1 become 0 in the order of the squared step; nothing else changes, and no more than it takes."""
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.integers(-3, 4, (40, 500)).astype(np.int8))
    scale = torch.from_numpy(rng.permutation(np.linspace(0.01, 0.4, 40)).astype(np.float16))
    config, whole = tiny_config(QUANTIZER="sdclip"), {"a.q": q, "a.scale": scale, "b": torch.ones(3).half()}
    size = len(train_gpt.pack_artifact(whole, train_gpt.artifact_header(config)))
    for most in (size, size - 1, size - 150, size - 900):
        artifact = train_gpt.prune_to_fit(config, rt, {k: t.clone() for k, t in whole.items()}, most)
        found = unpack_artifact(artifact)[0]["a.q"]
        dropped = found != q
        assert len(artifact) <= most and (most < size) == bool(dropped.any())
        assert (q[dropped].abs() == 1).all() and not found[dropped].any()
        kept = (q.abs() == 1) & ~dropped
        rows = scale[:, None].expand_as(q)
        assert not dropped.any() or rows[dropped].max() <= rows[kept].min()
        assert dropped.sum() <= 10 * max(size - most, 16 * (most < size))  # Brotli goes up and down by some bytes
    artifact = train_gpt.prune_to_fit(config, rt, {k: t.clone() for k, t in whole.items()}, 10)
    assert len(artifact) > 10 and not (unpack_artifact(artifact)[0]["a.q"].abs() == 1).any(), "all it can do"


def test_nothing_to_prune_is_packed_as_it_is(rt):
    """A model all of whose tensors stay fp16."""
    whole = {"b": torch.ones(300).half()}
    artifact = train_gpt.prune_to_fit(tiny_config(QUANTIZER="sdclip"), rt, whole, 10)
    assert unpack_artifact(artifact)[0]["b"].equal(whole["b"])


def test_ranks_agree_on_the_fit(rt):
    """Rank 0 packs and has the bytes; the others go the same steps."""
    alone, quantizers = FakeQuantizer(SIZES["less"]), {rank: FakeQuantizer(SIZES["less"]) for rank in range(2)}
    artifact = train_gpt.fit_artifact(tiny_config(), rt, alone, 6000)
    found = on_ranks(2, lambda rt: train_gpt.fit_artifact(tiny_config(), rt, quantizers[rt.rank], 6000))
    assert found == [artifact, b""] and quantizers[0].bits == quantizers[1].bits == alone.bits


def test_steps_are_never_finer_than_six_bits(rt):
    quantizer = FakeQuantizer(SIZES["as expected"])
    artifact = train_gpt.fit_artifact(tiny_config(), rt, quantizer, 10**6)
    assert quantizer.bits == [train_gpt.MOST_BITS] and len(artifact) > 2500 * train_gpt.MOST_BITS
    quantizer = FakeQuantizer(SIZES["less"])  # whose steps must shrink to reach the target, but may not
    artifact = train_gpt.fit_artifact(tiny_config(), rt, quantizer, 12_000)
    assert max(quantizer.bits) == train_gpt.MOST_BITS and len(artifact) < 12_000


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1.5, 3.5])
def test_a_real_model_fills_its_target(rt, monkeypatch, bits):
    config, model = narrow_model(monkeypatch, MODEL_DIM=64)
    quantizer = train_gpt.TrellisQuantizer(rt, model, *calibrated(model))
    target = int(bits * quantizer.weights / 8)
    artifact = train_gpt.fit_artifact(config, rt, quantizer, target)
    assert target - max(5e-4 * target, 64) <= len(artifact) <= target  # tables and Brotli jump by tens of bytes
    train_gpt.model_from_artifact(config, rt, unpack_artifact(artifact)[0])


def test_a_target_out_of_reach_stops_the_run(rt):
    quantizer = FakeQuantizer(lambda bits: 1000 + 100 * max(bits, 0))
    with pytest.raises(train_gpt.RunStopped, match=r"TARGET_BYTES=4321 .* \d{4} bytes where 500 are left") as stopped:
        train_gpt.fit_artifact(tiny_config(TARGET_BYTES=4321), rt, quantizer, 500)
    assert stopped.value.args[1] == 1
    # Steps 2^16 times the finest ones leave nothing; beyond them there is no point, and at last no fp32 number.
    assert min(quantizer.bits) == train_gpt.MOST_BITS - 16 and len(set(quantizer.bits)) == len(quantizer.bits) < 8


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
    code = train_gpt.pack_source(train_gpt.SOURCE, train_gpt.Config())
    print(f"code {len(code)} + artifact {len(artifact)} = {len(code) + len(artifact)} bytes")
    assert len(code) + len(artifact) < train_gpt.SUBMISSION_CAP_BYTES == 16_000_000
    restored, head = unpack_artifact(artifact)
    assert all(same(tensor, restored[name]) for name, tensor in tensors.items())
    assert described(Config.from_env({"MODE": "eval"}, head["settings"])) == described(config)


def test_a_signal_while_an_artifact_is_read_is_no_broken_artifact(monkeypatch):
    def stop(*_):
        raise train_gpt.RunStopped("stopped by SIGTERM", 143)

    monkeypatch.setattr(train_gpt, "read_body", stop)
    with pytest.raises(train_gpt.RunStopped):
        unpack_artifact(pack_artifact({}, artifact_header(tiny_config())))
