"""Room 9, the byte mixture: a distribution over tokens, a function of the past, PPM-D as a slow reference has it."""
import lzma
import math
import os
import types

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import SHARED, tiny_config, tiny_model

import train_gpt
from train_gpt import MASS_FLOOR, PPM, SURE, ByteTrie, UsageError, mix_bytes, token_bytes

TOKENIZERS = {size: SHARED / "tokenizers" / f"fineweb_{size}_bpe.model" for size in (4096, 8192)}
GATE = (train_gpt.PPM_CONFIDENT, *train_gpt.PPM_WEIGHTS)


class Mixture:
    """PPM and the model's shares together, text after text, as a run puts them together."""

    def __init__(self, trie, bits):
        self.trie, self.ppm = trie, PPM(trie, bits)
        self.state = self.ppm.shorts, self.ppm.pages, self.ppm.used, self.ppm.history

    def score(self, rows, share, rest, spread=False):
        return mix_bytes(self.trie.length[rows], share, rest, self.ppm.predict(rows.astype(np.int32), spread), spread)


class SmallTokenizer:
    """Control and unused pieces, byte pieces, pieces with equal bytes, pieces within pieces, inner and lone spaces."""

    pieces = ["<pad>", "<s>", "<unk>", "<gone>", "<0x20>", "<0x61>", "<0x62>", "<0xC3>", "<0xA9>", "<0xFF>", "\u2581",
              "a", "b", "\u2581a", "\u2581b", "ab", "\u2581ab", "aba", "abab", "\u2581\u2581", "a\u2581b", "\u00e9",
              "\u2581\u00e9a", "ba", "bb", "\u2581abba", "\u00ff"]

    def vocab_size(self):
        return len(self.pieces)

    def id_to_piece(self, token):
        return self.pieces[token]

    def piece_to_id(self, piece):
        return self.pieces.index(piece)

    def is_control(self, token):
        return token < 2

    def is_unknown(self, token):
        return token == 2

    def is_unused(self, token):
        return token == 3

    def is_byte(self, token):
        return 4 <= token < 10


def real_tokenizer(vocab_size):
    if not TOKENIZERS[vocab_size].exists():
        pytest.skip("needs the shared tokenizers")
    return spm.SentencePieceProcessor(model_file=str(TOKENIZERS[vocab_size]))


@pytest.fixture(scope="module")
def tokenizer():
    return real_tokenizer(8192)


@pytest.fixture(scope="module")
def trie(tokenizer):
    return ByteTrie(tokenizer)


@pytest.fixture(scope="module")
def small():
    return ByteTrie(SmallTokenizer())


@pytest.fixture(scope="module")
def text(tokenizer):
    """Real text: 4500 tokens, some 16,000 bytes, several documents."""
    with lzma.open(SHARED / "data" / "val.txt.xz") as file:
        documents = file.read(100_000).decode("utf-8", "ignore").split("\0")
    tokens = [token for document in documents for token in (1, *tokenizer.encode(document))][:4501]
    assert tokens[1:].count(1) >= 3
    return torch.tensor(tokens)


def some_logits(targets, vocab_size, seed=0, bonus=6.0):
    """Noise, in which most of the true tokens stand out: sure bytes, unsure ones and surprises."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(len(targets), vocab_size, generator=generator)
    logits[torch.arange(len(targets)), targets] += bonus * torch.rand(len(targets), generator=generator) ** 0.5
    return logits


def model_side(trie, tokens, seed=0):
    """Rows, shares, rests and the model's own nats of the tokens behind the first."""
    rows, found, nll = trie.rows(tokens[:-1], tokens[1:]), [], []
    for part, target in zip(rows.split(500), tokens[1:].split(500)):
        logits = some_logits(target, trie.vocab_size, seed + len(found))
        found.append(trie.shares(logits, part))
        nll.append(torch.nn.functional.cross_entropy(logits.double(), target, reduction="none"))
    share, rest = (torch.cat(parts).numpy() for parts in zip(*found))
    return rows.numpy(), share, rest, torch.cat(nll).numpy()


@pytest.fixture(scope="module")
def scored(trie, text):
    return model_side(trie, text)


def small_text(trie, length, seed=0):
    """Random tokens, some of them repeating a phrase, so that PPM is confident at times."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, trie.vocab_size, length)
    for start in generator.integers(0, length - 8, length // 12):
        tokens[start:start + 6] = [13, 11, 1, 16, 15, 12]
    return torch.from_numpy(tokens)


class Reference:
    """PPM-D and its mixture in dictionaries."""

    def __init__(self, pages=math.inf):
        self.contexts, self.history, self.pages, self.most_pages = {}, bytes(5), 0, pages

    def predict(self, allowed):
        """Probability of each allowed byte, and the confidence."""
        if len(allowed) == 1:
            return dict.fromkeys(allowed, 1.0), 1.0
        p, confidence = {s: 1 / 256 for s in range(256)}, 1 / 256
        for order in range(6):
            counts = self.contexts.get(self.history[5 - order:])
            if counts is None:
                break
            n, q = sum(counts.values()), len(counts)
            p = {s: (2 * counts[s] - 1 if s in counts else 0) / (2 * n) + q / (2 * n) * p[s] for s in p}
            confidence = (2 * max(counts.values()) - 1) / (2 * n)
        total = sum(p[s] for s in allowed)
        return {s: p[s] / total for s in allowed}, confidence

    def update(self, byte):
        for order in range(5, -1, -1):
            counts = self.contexts.get(self.history[5 - order:], {})
            known = byte in counts
            if not known and len(counts) % 11 == 0 and order > 1:
                if self.pages == self.most_pages:
                    continue
                self.pages += 1
            counts[byte] = counts.get(byte, 0) + 1
            self.contexts[self.history[5 - order:]] = counts
            if known:
                break
        self.history = self.history[1:] + bytes([byte])

    def cost(self, byte, share, sure, allowed):
        """Nats of the next byte; then counts it."""
        p, confidence = self.predict(allowed)
        weight = GATE[1] if confidence >= GATE[0] else GATE[2]
        self.update(byte)
        return -math.log(share if sure else weight * share + (1 - weight) * p[byte]), weight


def reference_nll(strings, allowed, share, rest, pages=math.inf):
    """Score tokens given as byte strings; `allowed` tells the bytes that may follow a prefix in the vocabulary."""
    reference, at, costs, weights = Reference(pages), 0, [], []
    for token, string in enumerate(strings):
        total = float(rest[token])
        for n, byte in enumerate(string):
            nats, weight = reference.cost(byte, abs(float(share[at])), share[at] < 0, allowed(token, string[:n]))
            total += nats
            weights.append(weight)
            at += 1
        costs.append(total)
    return np.array(costs), reference, weights


def strings_of(sp, rows):
    v = sp.vocab_size()
    return [token_bytes(sp, row % v, row >= v) for row in rows.tolist()]


def continuations(sp):
    """Which bytes follow each prefix, found without the trie: {(after boundary, prefix): bytes}."""
    following = {}
    for after in (False, True):
        for token in range(sp.vocab_size()):
            string = token_bytes(sp, token, after)
            for n, byte in enumerate(string):
                following.setdefault((after, string[:n]), set()).add(byte)
    return following


def softmax_sides(logits, sp, target, after):
    """Shares, sureness and rest of one target, straight from their definitions."""
    p = np.exp(logits.double().numpy() - logits.double().logsumexp(0).item()) + MASS_FLOOR
    p /= p.sum()
    strings = [token_bytes(sp, token, after) for token in range(len(p))]
    shares, sures, rest, string = [], [], 0.0, strings[target]
    for n, byte in enumerate(string):
        below = [token for token, other in enumerate(strings) if other.startswith(string[:n])]
        masses = np.zeros(256)
        for token in below:
            if len(strings[token]) > n:
                masses[strings[token][n]] += p[token]
        shares.append(masses[byte] / masses.sum())
        sures.append(masses.max() / masses.sum() > SURE)
        rest -= math.log(masses.sum() / sum(p[token] for token in below))
    below = sum(p[token] for token, other in enumerate(strings) if other.startswith(string))
    own = sum(p[token] for token, other in enumerate(strings) if other == string)
    return shares, sures, rest - math.log(own / below) - math.log(p[target] / own)


# --- the model's side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [*TOKENIZERS, len(SmallTokenizer.pieces)])
def test_bytes_are_those_of_the_byte_tables(vocab_size):
    is_real = vocab_size in TOKENIZERS
    sp = real_tokenizer(vocab_size) if is_real else SmallTokenizer()
    trie = ByteTrie(sp)
    base_bytes, has_leading_space, boundary = train_gpt.build_byte_luts(sp, vocab_size)
    assert torch.equal(trie.boundary, boundary) and 0 < boundary.sum() < 10
    assert trie.length[:vocab_size].tolist() == (base_bytes + has_leading_space).tolist()
    assert trie.length[vocab_size:].tolist() == base_bytes.tolist()


def test_bytes_are_the_text(tokenizer, trie, text):
    base_bytes, has_leading_space, boundary = train_gpt.build_byte_luts(tokenizer, 8192)
    rows = trie.rows(text[:-1], text[1:])
    assert trie.length[rows].sum() == int((base_bytes[text[1:]] + (has_leading_space[text[1:]]
                                                                   & ~boundary[text[:-1]])).sum())
    walked = bytes(trie.byte[trie.path[rows]][trie.path[rows] > 0])
    documents = " ".join(map(str, text.tolist()[1:])).split(" 1 ")
    assert walked == b"".join(tokenizer.decode([int(t) for t in d.split()]).encode() for d in documents)


def test_small_vocabulary_has_every_kind_of_node(small):
    sp = SmallTokenizer()
    assert token_bytes(sp, 20, False) == b"a b" and token_bytes(sp, 19, True) == b" "
    assert token_bytes(sp, 10, True) == b"" and token_bytes(sp, 10, False) == b" " == token_bytes(sp, 4, True)
    following = continuations(sp)
    for row in range(2 * small.vocab_size):
        after, string = row >= small.vocab_size, token_bytes(sp, row % small.vocab_size, row >= small.vocab_size)
        nodes = small.path[row][:len(string)]
        assert bytes(small.byte[nodes]) == string and not small.path[row][len(string):].any()
        for n, node in enumerate(nodes):
            bits = np.unpackbits(small.siblings[node].view(np.uint8), bitorder="little")
            assert set(np.flatnonzero(bits)) == following[after, string[:n]]


@pytest.mark.parametrize("after", [False, True])
def test_shares_match_their_definition_in_the_small_vocabulary(small, after):
    targets = torch.arange(small.vocab_size)
    previous = torch.full_like(targets, 1 if after else 11)
    for seed in range(4):
        logits = some_logits(targets, small.vocab_size, seed)
        share, rest = small.shares(logits, small.rows(previous, targets))
        expected = [softmax_sides(logits[t], SmallTokenizer(), t, after) for t in range(small.vocab_size)]
        assert share.abs().tolist() == pytest.approx([s for e in expected for s in e[0]], rel=1e-6)
        assert (share < 0).tolist() == [s for e in expected for s in e[1]]
        assert rest.tolist() == pytest.approx([e[2] for e in expected], abs=1e-6)
        assert 5 < (share < 0).sum() < len(share) - 5


def test_shares_match_their_definition_in_the_real_vocabulary(tokenizer, trie, text):
    chosen = torch.tensor([0, 1, 2, 3, 50, 51, *(1 + (text[1:-1] == 1).nonzero()[:2, 0]), 400, 401])
    logits = some_logits(text[1:][chosen], 8192)
    rows = trie.rows(text[:-1], text[1:])[chosen]
    assert (rows >= 8192).sum() >= 3
    share, rest = trie.shares(logits, rows)
    expected = [softmax_sides(z, tokenizer, int(row) % 8192, bool(row >= 8192)) for z, row in zip(logits, rows)]
    assert share.abs().tolist() == pytest.approx([s for e in expected for s in e[0]], rel=1e-6)
    assert (share < 0).tolist() == [s for e in expected for s in e[1]]
    assert rest.tolist() == pytest.approx([e[2] for e in expected], abs=1e-6)


def test_model_alone_costs_its_own_nll(trie, scored):
    rows, share, rest, nll = scored
    assert Mixture(trie, 14).score(rows, -np.abs(share), rest) == pytest.approx(nll, abs=1e-6)
    tokens = np.repeat(np.arange(len(rows)), trie.length[rows])
    assert rest - np.bincount(tokens, np.log(np.abs(share), dtype=float), len(rows)) == pytest.approx(nll, abs=1e-6)
    assert 0.2 < (share < 0).mean() < 0.9  # both kinds of bytes


def test_extreme_logits_stay_finite(trie, text):
    target = text[1:65]
    logits = torch.full((64, 8192), -30.0)
    logits[torch.arange(64), (target + torch.arange(64) % 2) % 8192] = 30.0  # certain; half of the time wrongly so
    rows = trie.rows(text[:64], target)
    share, rest = (x.numpy() for x in trie.shares(logits, rows))
    assert np.isfinite(share).all() and np.isfinite(rest).all() and (np.abs(share) <= 1).all() and (share != 0).all()
    assert np.isfinite(Mixture(trie, 12).score(rows.numpy(), share, rest)).all()


# --- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, full", [
    (16, False), *(pytest.param(bits, True, marks=pytest.mark.slow) for bits in (9, 13))])
def test_core_equals_reference(tokenizer, trie, scored, bits, full):
    rows, share, rest, _ = scored
    following = continuations(tokenizer)
    fast = Mixture(trie, bits)
    expected, reference, weights = reference_nll(
        strings_of(tokenizer, rows), lambda token, prefix: following[bool(rows[token] >= 8192), prefix], share, rest,
        3 * 2 ** bits // 4)
    assert fast.score(rows, share, rest) == pytest.approx(expected, rel=1e-6)
    assert fast.ppm.used[0] == reference.pages and (reference.pages == reference.most_pages) == full
    assert full or max(len(q) for text, q in reference.contexts.items() if len(text) > 1) > 11  # several pages
    if not full:
        assert GATE[1] in weights and GATE[2] in weights


def test_core_equals_reference_in_the_small_vocabulary(small):
    tokens = small_text(small, 3000)
    rows, share, rest, _ = model_side(small, tokens)
    following = continuations(SmallTokenizer())
    expected, _, weights = reference_nll(
        strings_of(SmallTokenizer(), rows),
        lambda token, prefix: following[bool(rows[token] >= small.vocab_size), prefix], share, rest)
    assert Mixture(small, 14).score(rows, share, rest) == pytest.approx(expected, rel=1e-6)
    assert 0.02 < np.mean(np.array(weights) == GATE[1]) < 0.98


def total_probability(trie, before, logits, after):
    """Sum over all tokens of the mixture's probability, each scored as the next one after the same past."""
    saved, total = [x.copy() for x in before.state], 0.0
    rows = torch.arange(trie.vocab_size) + trie.vocab_size * after
    for part in rows.split(512):
        share, rest = (x.numpy() for x in trie.shares(logits.expand(len(part), -1), part))
        ends = np.cumsum(trie.length[part])
        for n, row in enumerate(part.numpy()):
            for array, value in zip(before.state, saved):
                array[:] = value
            own = share[ends[n] - trie.length[row]:ends[n]]
            total += math.exp(-before.score(np.array([row]), own, rest[n:n + 1])[0])
    return total


@pytest.mark.parametrize("after", [False, True])
def test_mixture_is_a_distribution_over_the_small_vocabulary(small, after):
    rows, share, rest, _ = model_side(small, small_text(small, 1200))
    ends = np.cumsum(small.length[rows])
    for bits in (6, 12):
        table = Mixture(small, bits)
        for begin in range(0, 1190, 119):
            part = slice(begin, begin + 119)
            first, last = ends[begin - 1] if begin else 0, ends[begin + 118]
            table.score(rows[part], share[first:last], rest[part])
            logits = some_logits(torch.tensor([begin % small.vocab_size]), small.vocab_size, begin)
            past = [x.copy() for x in table.state]
            assert total_probability(small, table, logits, after) == pytest.approx(1, abs=1e-6)
            for array, value in zip(table.state, past):
                array[:] = value


@pytest.mark.parametrize("after, position, confident", [(True, 700, False), *(pytest.param(
    *case, marks=pytest.mark.slow) for case in ((False, 1500, False), (False, 4000, True)))])
def test_mixture_is_a_distribution_over_the_real_vocabulary(trie, scored, text, after, position, confident):
    rows, share, rest, _ = scored
    table = Mixture(trie, 13)
    end = trie.length[rows[:position]].sum()
    table.score(rows[:position], share[:end], rest[:position])
    if confident:  # a phrase said often enough is what PPM is sure of
        phrase = np.tile(rows[200:206], 12)[:-3]
        table.score(phrase, np.ones(trie.length[phrase].sum(), np.float32), np.zeros(len(phrase)))
    logits = some_logits(text[position + 1:position + 2], 8192, position)
    assert total_probability(trie, table, logits, after) == pytest.approx(1, abs=1e-6)


def test_a_later_byte_changes_no_earlier_score(trie, scored):
    rows, share, rest, _ = scored
    before = Mixture(trie, 13).score(rows, share, rest)
    changed, at = rows.copy(), 3000
    same_length = np.flatnonzero(trie.length[:8192] == trie.length[rows[at]])
    changed[at] = next(row for row in same_length if trie.path[row][-1] == 0 and row != rows[at])
    after = Mixture(trie, 13).score(changed, share, rest)
    assert (before[:at] == after[:at]).all() and (before[at + 1:] != after[at + 1:]).any()


def test_runs_and_pieces_agree_bit_for_bit(trie, scored):
    rows, share, rest, _ = scored
    whole, ends = Mixture(trie, 13).score(rows, share, rest), np.cumsum(trie.length[rows])
    assert (Mixture(trie, 13).score(rows, share, rest) == whole).all()
    assert (Mixture(trie, 13).score(rows, share, rest, spread=True) != whole).any()
    table = Mixture(trie, 13)
    pieces = [table.score(rows[:1234], share[:ends[1233]], rest[:1234]),
              table.score(rows[1234:], share[ends[1233]:], rest[1234:])]
    assert (np.concatenate(pieces) == whole).all()


def test_gate_is_a_function_of_the_past(trie, scored):
    """The weight that the core uses follows from two shares of one byte: it is the same for all bytes of the node."""
    rows, share, rest, _ = scored
    seen = {}
    single = np.flatnonzero(trie.length[:8192] == 1)
    single = single[np.unique(trie.byte[trie.path[single, 0]], return_index=True)[1]]
    assert len(single) == 256
    for position in (10, 300, 1999, 2500, "phrase"):
        table = Mixture(trie, 12)
        if position == "phrase":
            phrase = np.tile(rows[200:206], 12)[:-3]
            table.score(phrase, np.ones(trie.length[phrase].sum(), np.float32), np.zeros(len(phrase)))
        else:
            table.score(rows[:position], share[:trie.length[rows[:position]].sum()], rest[:position])
        state = [x.copy() for x in table.state]
        weights = []
        for row in single:
            p = []
            for value in (0.25, 0.75):
                for array, old in zip(table.state, state):
                    array[:] = old
                p.append(math.exp(-table.score(np.array([row]), np.float32([value]), np.zeros(1))[0]))
            weights.append((p[1] - p[0]) / 0.5)
        seen[position] = weights[0]
        assert weights == pytest.approx([weights[0]] * 256, abs=1e-9)
    assert sorted({round(weight, 6) for weight in seen.values()}) == [GATE[1], GATE[2]]


@pytest.mark.slow
def test_sureness_is_a_function_of_the_past(trie, text):
    logits = some_logits(text[1:2], 8192)
    for peak in (0, 9):
        logits[0, text[1]] += peak
        rows = torch.arange(8192)
        sure = [trie.shares(logits.expand(512, -1), part)[0].numpy() < 0 for part in rows.split(512)]
        sure = np.concatenate(sure)
        nodes = trie.path[:8192][trie.path[:8192] > 0]
        parent = trie.tables[3].numpy()[nodes]
        for node in np.unique(parent):
            assert len(set(sure[parent == node])) == 1
        assert sure[parent == 0][0] == (peak > 0)


def test_spread_is_the_published_formula(tokenizer, trie, scored):
    rows, share, rest, nll = scored
    part, ends = slice(2600, 4400), np.cumsum(trie.length[rows])  # a document begins in it
    rows, share, rest, nll = rows[part], share[ends[2599]:ends[4399]], rest[part], nll[part]
    reference, expected, strings = Reference(), [], strings_of(tokenizer, rows)
    kinds = set()
    for string, nats in zip(strings, nll):
        total = 0 if string else nats
        for byte in string:
            cost = nats / len(string)
            p, confidence = reference.predict(range(256))
            weight = 1 if cost < 0.277 else 0.05 if confidence >= 0.9 else 0.9
            total -= math.log(weight * math.exp(-cost) + (1 - weight) * p[byte])
            kinds.add(weight)
            reference.update(byte)
        expected.append(total)
    assert kinds == {1, 0.05, 0.9} and b"" in strings
    assert Mixture(trie, 16).score(rows, share, rest, spread=True) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("found", [None, "exit 1", "exit 0"])
def test_no_compiler_is_told_clearly(monkeypatch, tmp_path, found):
    train_gpt.c_library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    if found:
        (tmp_path / "cc").write_text(f"#!/bin/sh\necho no headers >&2\n{found}\n")
        os.chmod(tmp_path / "cc", 0o755)
    with pytest.raises(UsageError, match={None: "install", "exit 1": "no headers", "exit 0": "library.so"}[found]):
        train_gpt.c_library(train_gpt.PPM_SOURCE)
    monkeypatch.undo()
    train_gpt.c_library.cache_clear()
    train_gpt.c_library(train_gpt.PPM_SOURCE)


def test_c_is_compiled_with_the_systems_own_headers(monkeypatch, tmp_path):
    """CPATH and the like could put another PPM into the C as it is read, and no check would see it."""
    train_gpt.c_library.cache_clear()
    (tmp_path / "math.h").write_text("#error another header\n")
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    train_gpt.c_library(train_gpt.PPM_SOURCE)
    train_gpt.c_library.cache_clear()


def test_ppm_reads_the_split_once_and_from_the_left(trie, text, monkeypatch):
    """In pieces as in one: nothing is learned beforehand, and none of what comes later."""
    rows = trie.rows(text[:-1], text[1:]).numpy().astype(np.int32)[:1500]
    expected = PPM(trie, 16).predict(rows)
    monkeypatch.setattr(np, "array_split", lambda array, parts: [array[:500], array[500:900], array[900:]])
    monkeypatch.setattr(train_gpt, "PPM", lambda trie: PPM(trie, 16))
    mixture = types.SimpleNamespace(trie=trie, rows=rows)
    assert np.array_equal(train_gpt.predict_split(train_gpt.Config(), mixture), expected)


def test_byte_shares_are_of_the_models_own_scores_and_of_all_ranks(rt, monkeypatch):
    """With logits large enough for the softcap to show."""
    config, tokenizer = tiny_config(VOCAB_SIZE=260), SmallTokenizer()
    tokenizer.pieces = SmallTokenizer.pieces + [chr(0x4E00 + i) for i in range(260 - len(SmallTokenizer.pieces))]
    model = tiny_model(config)
    model.embedding.data *= 0.4
    tokens = torch.randint(0, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    val = types.SimpleNamespace(tokens=tokens.flatten(), targets=17)
    mixture = train_gpt.ByteShares(rt, val, ByteTrie(tokenizer), model)
    nll = mixture(tokens[:, :-1], tokens[:, 1:])
    share, rest = mixture.seen
    length = mixture.trie.length[mixture.seen_rows]
    alone = mix_bytes(length, -share.abs().numpy(), rest.numpy(), np.ones(length.sum(), np.float32), False)
    assert float(nll.max()) > 10 and torch.allclose(nll, model.nll(tokens[:, :-1], tokens[:, 1:]), atol=1e-4)
    assert alone == pytest.approx(nll.flatten().detach().numpy(), abs=1e-3)
    reduced = []
    monkeypatch.setattr(rt, "all_reduce", reduced.append)
    mixture.finish()
    assert [id(x) for x in reduced] == [id(mixture.share), id(mixture.rest)]
