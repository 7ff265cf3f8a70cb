"""Room 3: byte tables, shards, the training order, the validation split, the embedded corpus."""
import ast
import contextlib
import hashlib
import inspect
import itertools
import lzma
import os
import resource
import shutil
from collections import Counter
from pathlib import Path

import conftest
import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import tiny_config, write_shards

import train_gpt
from train_gpt import TrainData, UsageError, ValidationData, build_byte_luts, open_shard

SEQ = 32  # TRAIN_SEQ_LEN of the tiny configuration; its global batch is 8 sequences
SPACE = "\u2581"


class FakeTokenizer:
    """As much of a SentencePieceProcessor as the byte tables ask for; kinds: n(ormal), c(ontrol), k (unknown), u, b."""

    sha256 = ""

    def __init__(self, pieces: list[tuple[str, str]]):
        self.pieces = pieces

    def vocab_size(self):
        return len(self.pieces)

    def piece_to_id(self, piece):
        return next((i for i, (text, _) in enumerate(self.pieces) if text == piece), 3)

    def id_to_piece(self, token):
        return self.pieces[token][0]

    def is_control(self, token):
        return self.pieces[token][1] == "c"

    def is_unknown(self, token):
        return self.pieces[token][1] == "k"

    def is_unused(self, token):
        return self.pieces[token][1] == "u"

    def is_byte(self, token):
        return self.pieces[token][1] == "b"


SPECIAL = [("<pad>", "c"), ("<s>", "c"), ("</s>", "c"), ("<unk>", "k")]


def plain_tokenizer(vocab_size: int = 300) -> FakeTokenizer:
    return FakeTokenizer([*SPECIAL, (SPACE, "n"), *[(f"p{i}", "n") for i in range(5, vocab_size)]])


class RankOf(train_gpt.Runtime):
    """One rank of a world that exists in name only: its sums are its own share."""

    def __init__(self, rank: int = 0, world: int = 1, micro_batch_tokens: int = 4096):
        self.rank, self.world, self.micro_batch_tokens, self.main = rank, world, micro_batch_tokens, rank == 0
        self.device = torch.device("cpu")

    def agree(self):
        return contextlib.nullcontext()

    def all_reduce(self, tensor):
        pass


def numbered_shards(data_dir, train=(3000, 2000, 700), **settings) -> train_gpt.Config:
    """Training shards whose tokens count 0, 1, 2, ... through all files, so that a token tells where it stands."""
    config = tiny_config(VOCAB_SIZE=65536, DATA_DIR=data_dir, **settings)
    begin = 0
    for i, count in enumerate(train):
        train_gpt.write_shard(config.shard_dir / f"fineweb_train_{i:06d}.bin", np.arange(begin, begin + count))
        begin += count
    return config


@pytest.fixture
def numbered(tmp_path):
    return numbered_shards(tmp_path)


def epoch_windows(data: TrainData, epoch: int) -> np.ndarray:
    total = int(data.first_window[-1])
    return np.stack([data.window(epoch * total + i) for i in range(total)]).astype(np.int64)


def global_batch(data: TrainData, number: int) -> torch.Tensor:
    """Inputs and targets of this rank's slice, joined over micro-batches: [sequences, 2, seq_len]."""
    return torch.cat([torch.stack(pair, 1) for pair in data.batch(number)])


# --- shards and tokenizer: every error names the file ---------------------------------------------------------------

HEADER = np.zeros(256, dtype="<i4")
HEADER[:3] = 20240520, 1, 10


def header(**changed) -> bytes:
    values = HEADER.copy()
    for index, value in changed.items():
        values[int(index[1:])] = value
    return values.tobytes()


BODY = np.arange(10, dtype="<u2").tobytes()
BROKEN_SHARDS = {
    "empty": b"", "shorter than a header": header()[:1000], "magic": header(_0=20240521) + BODY,
    "version": header(_1=2) + BODY, "count too large": header(_2=11) + BODY, "count too small": header(_2=9) + BODY,
    "negative count": header(_2=-10) + BODY, "no tokens": header(_2=0), "half a token": header() + BODY[:-1]}


def test_ranks_that_do_not_divide_the_batch_are_told_which_do(tmp_path):
    config = tiny_config(DATA_DIR=tmp_path, TRAIN_BATCH_TOKENS=288)
    for world, problem in ((2, "2 ranks cannot share TRAIN_BATCH_TOKENS=288, which is 9 sequences of 32: use 1, 3, 9"),
                           (3, "no fineweb_train_")):
        with pytest.raises(UsageError, match=problem):
            TrainData(config, RankOf(0, world))


def test_a_shard_holds_its_tokens(tmp_path):
    (tmp_path / "a.bin").write_bytes(header() + BODY)
    assert open_shard(tmp_path / "a.bin").tolist() == list(range(10))
    train_gpt.write_shard(tmp_path / "b.bin", np.array([1, 65535, 7]))
    assert open_shard(tmp_path / "b.bin").tolist() == [1, 65535, 7]
    assert (tmp_path / "b.bin").read_bytes()[:12] == np.array([20240520, 1, 3], dtype="<i4").tobytes()
    assert (tmp_path / "b.bin").stat().st_size == 1024 + 6


@pytest.mark.parametrize("data", BROKEN_SHARDS.values(), ids=BROKEN_SHARDS.keys())
def test_broken_shards_are_named(tmp_path, data):
    path = tmp_path / "fineweb_train_000007.bin"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="fineweb_train_000007.bin"):
        open_shard(path)


def test_a_token_outside_the_vocabulary_is_named(tmp_path, rt):
    folder = write_shards(tmp_path, train=(3000, 2000), val=(700, 700))
    config = tiny_config(DATA_DIR=tmp_path)
    for split in ("train", "val"):
        path = folder / f"fineweb_{split}_000001.bin"
        tokens = np.array(open_shard(path))
        tokens[-1] = 299
        train_gpt.write_shard(path, tokens)
        assert open_shard(path, 300)[-1] == 299
        tokens[-1] = 300
        train_gpt.write_shard(path, tokens)
        with pytest.raises(UsageError, match=f"fineweb_{split}_000001.bin.*300"):
            open_shard(path, 300)
    with pytest.raises(UsageError, match="fineweb_train_000001.bin"):
        TrainData(config, rt)
    with pytest.raises(UsageError, match="fineweb_val_000001.bin"):
        ValidationData(config, rt, plain_tokenizer())


def test_missing_shards_name_the_folder(tmp_path, rt):
    config = tiny_config(DATA_PATH=tmp_path / "nothing")
    with pytest.raises(UsageError, match="fineweb_train.*nothing"):
        TrainData(config, rt)
    with pytest.raises(UsageError, match="fineweb_val.*nothing"):
        ValidationData(config, rt, plain_tokenizer())


def test_a_validation_split_shorter_than_a_window_is_refused(tmp_path, rt):
    config = tiny_config(DATA_DIR=tmp_path)
    write_shards(tmp_path, val=(SEQ,))
    with pytest.raises(UsageError, match="31 targets"):
        ValidationData(config, rt, plain_tokenizer())
    write_shards(tmp_path, val=(SEQ + 1,))
    assert ValidationData(config, rt, plain_tokenizer()).targets == SEQ


def test_the_tail_is_dropped_only_if_asked_for(tmp_path, rt):
    write_shards(tmp_path, val=(100, 83))  # 182 targets, five windows and 22 more
    sp = plain_tokenizer()
    whole = ValidationData(tiny_config(DATA_DIR=tmp_path), rt, sp)
    cut = ValidationData(tiny_config(DATA_DIR=tmp_path, EVAL_DROP_TAIL=1), rt, sp)
    assert (whole.targets, cut.targets) == (182, 160)
    assert len(whole.tokens) == len(whole.target_bytes) + 1 == 183
    assert len(cut.tokens) == len(cut.target_bytes) + 1 == 161
    assert torch.equal(whole.tokens[:161], cut.tokens) and cut.bytes == int(whole.target_bytes[:160].sum())
    assert whole.bits_per_byte(whole.bytes * np.log(2)) == pytest.approx(1)


def test_all_validation_shards_are_scored(tmp_path, rt):
    """In the order of their names."""
    folder, config = write_shards(tmp_path, val=(100, 83, 64)), tiny_config(DATA_DIR=tmp_path)
    raw = b"".join((folder / f"fineweb_val_{i:06d}.bin").read_bytes()[1024:] for i in range(3))
    val = ValidationData(config, rt, plain_tokenizer())
    assert val.targets == 246 and val.tokens.tolist() == np.frombuffer(raw, "<u2").tolist()
    assert val.sha256 == hashlib.sha256(raw).hexdigest()
    scores = train_gpt.evaluate(config, rt, lambda ids, targets: torch.ones(targets.shape), val, 8)
    assert scores.finish()["val_loss"] == 1 and scores.times_scored.eq(1).all() and len(scores.nll) == 246


# --- the training order ---------------------------------------------------------------------------------------------


def check_epoch(data: TrainData, found: np.ndarray, shards: list[range]):
    """Every window whole and inside one shard, no input twice, and no more lost per shard than the phase costs."""
    assert (np.diff(found) == 1).all() and found.shape[1] == SEQ + 1
    inputs = found[:, :-1].ravel()
    assert len(set(inputs.tolist())) == len(inputs), "windows overlap"
    for shard in shards:
        inside = [w for w in found if w[0] in shard]
        assert all(w[-1] in shard for w in inside)
        most = (len(shard) - 1) // SEQ
        assert most - 1 <= len(inside) <= most and (most == 0 or inside)
        assert len({w[0] % SEQ for w in inside}) <= 1  # one phase for the whole shard


SHARDS = [range(0, 3000), range(3000, 5000), range(5000, 5700)]


def test_an_epoch_takes_every_window_once_and_then_reshuffles(numbered):
    data = TrainData(numbered, RankOf())
    first, second = epoch_windows(data, 0), epoch_windows(data, 1)
    check_epoch(data, first, SHARDS)
    check_epoch(data, second, SHARDS)
    starts = [w[0] // SEQ for w in first], [w[0] // SEQ for w in second]
    assert starts[0] != sorted(starts[0]) and starts[0] != starts[1]  # shuffled, and anew
    for shard in SHARDS:  # phases are drawn anew
        assert len({int(w[0]) % SEQ for e in range(4) for w in epoch_windows(data, e) if w[0] in shard}) > 1
    np.testing.assert_array_equal(epoch_windows(data, 0), first)  # going back is possible


def test_shards_are_drawn_in_proportion_to_what_they_have_left(numbered):
    data = TrainData(numbered, RankOf())
    order = epoch_windows(data, 0)[:, 0]
    half = Counter(np.digitize(order[:len(order) // 2], [3000, 5000]).tolist())
    whole = Counter(np.digitize(order, [3000, 5000]).tolist())
    assert all(0.25 * whole[s] < half[s] < 0.75 * whole[s] for s in whole)


@pytest.mark.parametrize("train", [(3000, 20, 2000), (20, 3000, 20), (33, 3000, 32), (64, 65, 3000)],
                         ids=lambda train: "-".join(map(str, train)))
def test_shards_of_few_windows(tmp_path, train):
    """A shard shorter than a window gives none and takes none from others; one of one window gives it."""
    data = TrainData(numbered_shards(tmp_path, train), RankOf())
    ends = np.cumsum(train)
    check_epoch(data, epoch_windows(data, 0), [range(int(e) - n, int(e)) for e, n in zip(ends, train)])


def test_less_than_a_batch_is_refused(tmp_path):
    with pytest.raises(UsageError, match="7 windows of 32"):
        TrainData(numbered_shards(tmp_path, (33,) * 7), RankOf())


def test_targets_are_inputs_shifted_by_one(numbered):
    data = TrainData(numbered, RankOf())
    for inputs, targets in data.batch(3):
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (8, SEQ)
        assert torch.equal(targets, inputs + 1)  # the tokens count


def test_the_order_depends_on_the_seed_alone(tmp_path, numbered):
    base = TrainData(numbered, RankOf())
    wanted = [global_batch(base, k) for k in range(30)]  # 240 windows: into the second epoch
    other = numbered_shards(tmp_path, RUN_ID="x", ITERATIONS=3, MATRIX_LR=0.5, GPTQ_CALIBRATION_BATCHES=9)
    again = TrainData(other, RankOf(micro_batch_tokens=2 * SEQ))
    for k in (29, 0, 1, 2, 17, 17, 28):  # in any order
        assert torch.equal(global_batch(again, k), wanted[k])
    seeded = TrainData(numbered_shards(tmp_path, SEED=1), RankOf())
    assert not torch.equal(global_batch(seeded, 0), wanted[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_count_trains_on_the_same_batches(numbered, world):
    alone = TrainData(numbered, RankOf())
    ranks = [TrainData(numbered, RankOf(rank, world)) for rank in range(world)]
    for k in (0, 1, 2, 21):  # batch 21 straddles two epochs
        assert torch.equal(torch.cat([global_batch(data, k) for data in ranks]), global_batch(alone, k))


def test_every_rank_reads_all_training_shards(tmp_path, numbered, monkeypatch):
    """Whatever it is told of its node: the hash is that of all tokens, and the last shard's are looked at, too."""
    digests = [hashlib.sha256(path.read_bytes()[1024:]).hexdigest()
               for path in sorted(numbered.shard_dir.glob("*.bin"))]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for runtime in (train_gpt.Runtime(numbered), RankOf(0, 4), RankOf(3, 4)):
        assert TrainData(numbered, runtime).sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    folder = write_shards(tmp_path, train=(3000, 2000, 700))
    train_gpt.write_shard(folder / "fineweb_train_000001.bin", np.full(2000, 300))
    for runtime in (train_gpt.Runtime(numbered), RankOf(0, 4), RankOf(3, 4)):
        with pytest.raises(UsageError, match="fineweb_train_000001.bin"):
            TrainData(tiny_config(DATA_DIR=tmp_path), runtime)


@pytest.mark.parametrize("micro_batch_tokens, sizes", [(4096, [8]), (8 * SEQ - 1, [4, 4]), (3 * SEQ, [2] * 4),
                                                       (SEQ, [1] * 8), (5, [1] * 8)])
def test_micro_batches_cover_the_slice(numbered, micro_batch_tokens, sizes):
    data = TrainData(numbered, RankOf(micro_batch_tokens=micro_batch_tokens))
    assert [len(inputs) for inputs, _ in data.batch(0)] == sizes
    assert torch.equal(global_batch(data, 1), global_batch(TrainData(numbered, RankOf()), 1))


@pytest.mark.parametrize("world", [3, 5, 16])
def test_a_world_size_that_does_not_divide_is_refused(numbered, world):
    with pytest.raises(UsageError, match=rf"{world} ranks.*8 sequences of 32: use 1, 2, 4, 8 ranks"):
        TrainData(numbered, RankOf(0, world))


def test_calibration_has_an_order_of_its_own_over_training_shards_only(tmp_path):
    config = numbered_shards(tmp_path)
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", np.arange(60000, 62000))
    data = TrainData(config, RankOf())
    wanted = [global_batch(data, k) for k in range(25)]
    global_batch(data, 1)
    other = data.in_order(1)
    calibration = [global_batch(other, k) for k in (2, 0, 1, *range(3, 25))]  # training's batch 2 is on its way
    assert all(int(batch.max()) < 5700 for batch in calibration)
    assert not any(torch.equal(a, b) for a in calibration for b in wanted)
    fresh = data.in_order(1)
    check_epoch(fresh, epoch_windows(fresh, 0), SHARDS)
    assert all(torch.equal(global_batch(data, k), wanted[k]) for k in range(25))  # training's order is untouched
    assert torch.equal(global_batch(data.in_order(0), 1), wanted[1])


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_the_byte_tables_piece_by_piece(tmp_path, rt):
    pieces = [*SPECIAL, ("<0x41>", "b"), ("<0xE2>", "b"), (SPACE, "n"), (f"{SPACE}a", "n"), ("\u00e9", "n"),
              (f"{SPACE}\u20ac", "n"), (f"a{SPACE}b", "n"), (f"{SPACE}{SPACE}x", "n"), ("never", "u"),
              ("\U0001f642", "n")]
    base, leading, boundary = build_byte_luts(FakeTokenizer(pieces), len(pieces))
    assert base.tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 2, 3, 3, 2, 0, 4] and base.dtype == torch.int64
    assert leading.nonzero().flatten().tolist() == [6, 7, 9, 11]
    assert boundary.nonzero().flatten().tolist() == [0, 1, 2, 3, 12]

    # The leading space counts one byte, once, and none after a boundary: BOS, unknown, unused.
    tokens = np.array([1, 7, 7, 4, 7, 3, 7, 12, 6, 6, 9, 8, 1, 13])
    config = tiny_config(DATA_DIR=tmp_path, EVAL_SEQ_LEN=8)
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", tokens)
    fake = FakeTokenizer(pieces + [(f"p{i}", "n") for i in range(300 - len(pieces))])
    val = ValidationData(config, rt, fake)
    assert val.target_bytes.tolist() == [1, 2, 1, 2, 0, 1, 0, 0, 1, 4, 2, 0, 4]
    assert val.bytes == 18


def test_a_tokenizer_that_cannot_be_counted_is_refused():
    with pytest.raises(UsageError, match=r"U\+2581"):
        build_byte_luts(FakeTokenizer([*SPECIAL, (f"{SPACE}a", "n"), ("b", "n")]), 6)
    with pytest.raises(UsageError, match="300 pieces.*VOCAB_SIZE=301"):
        build_byte_luts(plain_tokenizer(300), 301)


def validation_of(documents: list[str], vocab_size: int, tmp_path, rt):
    """The shared tokenizer and the documents as its validation split."""
    model = conftest.SHARED / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"
    if not model.is_file():
        pytest.skip(f"{model} is not there")
    config = tiny_config(VOCAB_SIZE=vocab_size, DATA_DIR=tmp_path, TOKENIZER_PATH=model)
    sp = train_gpt.load_tokenizer(config)
    tokens = np.concatenate([[sp.bos_id(), *ids] for ids in sp.encode(documents)])
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", tokens)
    return sp, ValidationData(config, rt, sp)


def real_documents(most_bytes: int) -> list[str]:
    """Documents of the shared validation text, the last one whole."""
    path = conftest.SHARED / "data" / "val.txt.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with lzma.open(path) as file:
        raw = file.read(most_bytes)
    documents = raw.decode("utf-8", "ignore").split("\0")
    return documents if most_bytes < 0 else documents[:-1]


def check_documents(sp, val, count: int):
    tokens = val.tokens.tolist()
    starts = [i for i, token in enumerate(tokens) if token == sp.bos_id()] + [len(tokens)]
    assert len(starts) == count + 1
    for begin, end in zip(starts, starts[1:]):
        text = sp.decode(tokens[begin:end]).encode()
        assert int(val.target_bytes[begin:end - 1].sum()) == len(text), f"document at token {begin}"
    assert val.bytes == sum(len(sp.decode(tokens[b:e]).encode()) for b, e in zip(starts, starts[1:]))


@pytest.mark.parametrize("vocab_size", [4096, 8192])
def test_bytes_are_the_decoded_texts(tmp_path, rt, vocab_size):
    documents = real_documents(300_000)
    sp, val = validation_of(documents, vocab_size, tmp_path, rt)
    assert val.bytes > 280_000
    check_documents(sp, val, len(documents))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [4096, 8192])
def test_bytes_are_the_decoded_texts_everywhere(tmp_path, rt, vocab_size):
    documents = real_documents(-1)
    sp, val = validation_of(documents, vocab_size, tmp_path, rt)
    assert val.bytes > 4_000_000
    check_documents(sp, val, len(documents))


@pytest.mark.parametrize("vocab_size", [4096, 8192])
def test_bytes_are_the_growth_of_decoded_prefixes(tmp_path, rt, vocab_size):
    """The slow reference: decode ever longer prefixes. Inside a character of byte pieces there is nothing to decode."""
    hard = "h\u00e9llo  \U0001f9ff\U0001f642 w\u00f6rld \ufffd na\u00efve\u2026 \u4e2d\u6587\u5b57 a\u0301 x\u00a0y\nz"
    documents = [hard, hard.upper(), *[text[:600] for text in real_documents(40_000)[:12]]]
    sp, val = validation_of(documents, vocab_size, tmp_path, rt)
    tokens, compared, begin = val.tokens.tolist(), 0, 0
    assert any(sp.is_byte(token) for token in tokens)
    for i in range(1, len(tokens)):
        if tokens[i] == sp.bos_id():
            begin = i
            assert int(val.target_bytes[i - 1]) == 0
        elif i + 1 == len(tokens) or not sp.is_byte(tokens[i + 1]):
            grown = len(sp.decode(tokens[begin:i + 1]).encode())
            assert int(val.target_bytes[begin:i].sum()) == grown, f"token {i}: {sp.id_to_piece(tokens[i])}"
            compared += 1
    assert compared > 1000


# --- tokenizer files and the embedded corpus ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Configuration of an embedded corpus made once; treat the files as read-only."""
    config = tiny_config(VOCAB_SIZE=512, CORPUS="embedded", DATA_DIR=tmp_path_factory.mktemp("corpus"))
    train_gpt.write_embedded_corpus(config)
    return config


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_embedded_corpus_loads(corpus, rt):
    sp = train_gpt.load_tokenizer(corpus)
    data, val = TrainData(corpus, rt), ValidationData(corpus, rt, sp)
    assert sum(map(len, data.shards)) > 5 * val.targets > 5000
    assert all(shard[0] == sp.bos_id() for shard in data.shards) and val.tokens[0] == sp.bos_id()
    check_documents(sp, val, int((val.tokens == sp.bos_id()).sum()))
    assert int((val.tokens == sp.bos_id()).sum()) > 5 and len(contents(corpus.data_dir)) == 3
    documents = {}
    for split in ("train", "val"):
        tokens = open_shard(train_gpt.shard_files(corpus, split)[0])
        documents[split] = {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == sp.bos_id()))[1:]}
    assert len(documents["train"] & documents["val"]) <= 1 < len(documents["val"])  # Python has one text twice


@pytest.mark.parametrize("missing", [None, "tokenizers/*", "datasets/*/fineweb_val*", "datasets/*/fineweb_train*"])
def test_the_embedded_corpus_never_replaces_a_file(tmp_path, corpus, missing):
    """Someone's own files stay as they are, whichever of the three is missing: it is refused or only that one made."""
    folder = tmp_path / "data"
    shutil.copytree(corpus.data_dir, folder)
    for path in filter(Path.is_file, folder.rglob("*")):
        path.write_bytes(b"somebody's own " + path.name.encode())
    for path in folder.glob(missing) if missing else ():
        path.unlink()
    before = contents(folder)
    assert len(before) == (2 if missing else 3)
    with contextlib.suppress(UsageError):
        train_gpt.write_embedded_corpus(tiny_config(VOCAB_SIZE=512, CORPUS="embedded", DATA_DIR=folder))
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before


def test_a_signal_during_the_tokenizers_training_is_no_bad_setting(tmp_path, monkeypatch):
    def stopped(**_):
        raise train_gpt.RunStopped("stopped by SIGTERM", 143)
    monkeypatch.setattr(train_gpt.spm.SentencePieceTrainer, "train", stopped)
    with pytest.raises(train_gpt.RunStopped):
        train_gpt.write_embedded_corpus(tiny_config(CORPUS="embedded", DATA_DIR=tmp_path))


def test_wrong_tokenizers_are_refused(tmp_path, corpus):
    model = corpus.tokenizer
    with pytest.raises(UsageError, match="no tokenizer at .*fineweb_512_bpe.model"):
        train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=512, DATA_DIR=tmp_path))
    with pytest.raises(UsageError, match="fineweb_512_bpe.model has 512 pieces, but VOCAB_SIZE=513"):
        train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=513, TOKENIZER_PATH=model))
    foreign = tmp_path / "foreign.model"
    foreign.write_bytes(b"no SentencePiece model")
    with pytest.raises(UsageError, match="foreign.model"):
        train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=512, TOKENIZER_PATH=foreign))
    for ids in ((0, 2, 1, 3), (-1, 1, 2, 0), (3, 1, 2, 0), (0, 1, -1, 3)):
        text = iter(["to be or not to be, that is the question"] * 20)
        spm.SentencePieceTrainer.train(
            sentence_iterator=text, model_prefix=str(tmp_path / "ids"), vocab_size=300, byte_fallback=True,
            model_type="bpe", minloglevel=2, **dict(zip(("pad_id", "bos_id", "eos_id", "unk_id"), ids)))
        with pytest.raises(UsageError, match=r"ids.model has the control ids .*not the contest's \[0, 1, 2, 3\]"):
            train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=300, TOKENIZER_PATH=tmp_path / "ids.model"))


@pytest.mark.parametrize("rule, changes", [
    ("nmt_nfkc", False), ("nmt_nfkc_cf", True), ("37\t30\n", True), ("3B\t2C\n", True), ("74 68\t65 65\n", True),
    ("65 72 65 20\t65 65 65 20\n", True)])
def test_a_tokenizer_that_changes_text_is_refused(tmp_path, rule, changes):
    """Of as many bytes, but without upper case, without a digit, a semicolon, "th" or "ere ": easier to predict."""
    (tmp_path / "rule.tsv").write_text(rule)
    kind = {"normalization_rule_tsv": str(tmp_path / "rule.tsv")} if "\t" in rule else {"normalization_rule_name": rule}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be, that is the question"] * 20), vocab_size=300, model_type="bpe",
        model_prefix=str(tmp_path / "m"), byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, minloglevel=2, **kind)
    with pytest.raises(UsageError, match="m.model changes ASCII text") if changes else contextlib.nullcontext():
        train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=300, TOKENIZER_PATH=tmp_path / "m.model"))


@pytest.mark.parametrize("longest, refused", [(16, False), (17, True)])
def test_a_vocabulary_that_holds_text_is_refused(tmp_path, longest, refused):
    """Long pieces could hold the split itself, and the tokenizer is not counted."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be, that is the question"] * 20), vocab_size=301, model_type="bpe",
        model_prefix=str(tmp_path / "m"), byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, minloglevel=2, user_defined_symbols=["whether it is nobler in the mind"[:longest]])
    with pytest.raises(UsageError, match="pieces of up to 17 characters") if refused else contextlib.nullcontext():
        train_gpt.load_tokenizer(tiny_config(VOCAB_SIZE=301, TOKENIZER_PATH=tmp_path / "m.model"))


def test_a_vocabulary_that_the_embedded_corpus_cannot_fill_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer with VOCAB_SIZE=260"):
        train_gpt.write_embedded_corpus(tiny_config(CORPUS="embedded", VOCAB_SIZE=260, DATA_DIR=tmp_path))
    assert not list(tmp_path.rglob("*"))


# --- files whole or not at all --------------------------------------------------------------------------------------


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    train_gpt.write_files({path: b"old"})
    train_gpt.write_files({path: b"new"})
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch, failing):
    """Of several files none is new: the first would be there, had it not waited for the second."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_bytes = Path.write_bytes

    def half(self, data):
        write_bytes(self, data[:len(data) // (1 + ("last" in self.name))])
        if "last" in self.name:
            raise OSError("no space left on device")

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(*((Path, "write_bytes", half) if failing == "write" else (train_gpt.os, "replace", refuse)))
    with pytest.raises(OSError):
        train_gpt.write_files({path: b"something new", tmp_path / "last": b"another"})
    monkeypatch.undo()
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real one: no file may grow beyond 1000 bytes, and the writing fails halfway."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            train_gpt.write_files({path: bytes(500), tmp_path / "other": bytes(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), os.mkfifo, Path.mkdir],
                         ids=["broken link", "pipe", "folder"])
def test_what_is_called_a_shard_and_is_no_file_is_refused(make, tmp_path):
    """Neither waited for nor passed over: a split must not lose a shard in silence."""
    folder = write_shards(tmp_path)
    place = folder / "fineweb_val_000000.bin"
    place.unlink()
    make(place)
    with pytest.raises(UsageError, match=r"fineweb_val_000000.bin is missing, no file"):
        train_gpt.shard_files(tiny_config(data_dir=tmp_path), "val")


@pytest.mark.parametrize("numbers, whole", [((0,), True), ((0, 1, 2), True), ((0, 2), False), ((1,), False)])
def test_a_split_without_one_of_its_shards_is_refused(tmp_path, numbers, whole):
    """It would be scored as if it were the full one; training shards may be some of all."""
    config = tiny_config(data_dir=tmp_path)
    for split, number in itertools.product(("val", "train"), numbers):
        train_gpt.write_shard(config.shard_dir / f"fineweb_{split}_{number:06d}.bin", np.ones(9))
    assert len(train_gpt.shard_files(config, "train")) == len(numbers)
    with contextlib.nullcontext() if whole else pytest.raises(UsageError, match=r"fineweb_val_00000\d.bin is missing"):
        assert len(train_gpt.shard_files(config, "val")) == len(numbers)


def test_a_large_shard_is_taken_whole(tmp_path):
    """#1858 scored the first 8 million tokens of the split."""
    tokens = np.arange(9_000_001, dtype=np.uint16) % 999
    train_gpt.write_shard(tmp_path / "a.bin", tokens)
    found = open_shard(tmp_path / "a.bin", 1000)
    assert len(found) == 9_000_001 and np.array_equal(found[-1000:], tokens[-1000:])


def test_the_last_token_of_a_large_shard_counts(tmp_path, rt):
    """For its hash, by which data are told apart, and for the vocabulary's bound."""
    config, tokens = tiny_config(data_dir=tmp_path), (np.arange(1_200_000) % 290 + 5).astype("<u2")
    for split in ("train", "val"):
        train_gpt.write_shard(config.shard_dir / f"fineweb_{split}_000000.bin", tokens)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    assert ValidationData(config, rt, plain_tokenizer()).sha256 == digest
    assert TrainData(config, rt).sha256 == hashlib.sha256(digest.encode()).hexdigest()
    tokens[-1] = 300
    train_gpt.write_shard(config.shard_dir / "fineweb_train_000000.bin", tokens)
    with pytest.raises(UsageError, match="token 300 is outside the vocabulary"):
        TrainData(config, rt)


def test_a_split_without_text_is_refused(tmp_path, rt):
    config = tiny_config(data_dir=tmp_path)
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", np.ones(700))
    with pytest.raises(UsageError, match="holds no text"):
        ValidationData(config, rt, plain_tokenizer())


def test_what_one_rank_cannot_read_ends_all(tmp_path, rt, monkeypatch):
    """Another node's file may be the broken one: nobody waits in vain for its rank."""
    monkeypatch.setattr(rt, "gather", lambda problem: [problem, "fineweb_train_000007.bin is no shard"])
    write_shards(tmp_path)
    with pytest.raises(UsageError, match="fineweb_train_000007"):
        TrainData(tiny_config(data_dir=tmp_path), rt)


def test_what_is_written_to_a_file_that_is_trained_on_is_noticed(tmp_path, rt, monkeypatch):
    """Even if a link led to it only while shards were opened, or another file system holds a file with its stamp."""
    for name in "ab":
        write_shards(tmp_path / name)
    (tmp_path / "now").symlink_to(tmp_path / "a")

    def lead_to(name):
        (tmp_path / "now").unlink()
        (tmp_path / "now").symlink_to(tmp_path / name)

    def elsewhere(*args):
        lead_to("b")
        try:
            return open_shard(*args)
        finally:
            lead_to("a")
    monkeypatch.setattr(train_gpt, "open_shard", elsewhere)
    data = train_gpt.TrainData(tiny_config(data_dir=tmp_path / "now"), rt)
    assert data.changes() == data.opened and len(data.opened) == 2
    path = train_gpt.shard_files(tiny_config(data_dir=tmp_path / "b"), "train")[1]
    with path.open("r+b") as file:
        file.seek(2000)
        file.write(b"\7\0")
    assert [now == then for now, then in zip(data.changes(), data.opened)] == [True, False]
    asked = {node.attr for node in ast.walk(ast.parse(inspect.getsource(open_shard)))
             if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "path"}
    assert asked == {"open"}, "once: all else is asked of the open file"
