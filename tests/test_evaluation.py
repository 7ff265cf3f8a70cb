"""Room 9: scores against slow references; windows, and what must not matter: batch sizes, tail, ranks."""
import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fake_validation, tiny_config, tiny_env, tiny_model, torchrun, write_shards
from test_quantization import on_ranks

import train_gpt
from train_gpt import Runtime, evaluate, evaluate_ttt, windows

LENGTH, STRIDE, CHUNK = 32, 8, 96
MODES = ["plain", "sliding", "ttt"]
# A shallow model, small passes (each is filled up with padding), a chunk of three sequences in batches of two.
SMALL = dict(NUM_LAYERS=4, MODEL_DIM=32, LOOP_START=1, LOOP_END=2, NUM_LOOPS=1, PARALLEL_RESIDUAL_START=3,
             EVAL_SEQ_LEN=LENGTH, EVAL_STRIDE=STRIDE, TTT_CHUNK_TOKENS=CHUNK, TTT_BATCH_SEQS=2, TTT_LR=0.02,
             TTT_EPOCHS=2, MICRO_BATCH_TOKENS=512)
TARGETS = 2 * CHUNK + 21


def small_config(**overrides) -> train_gpt.Config:
    return train_gpt.Config.from_env(tiny_env(**{**SMALL, **overrides}))


def random_split(targets: int, config, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, config.vocab_size, (targets + 1,), generator=generator)
    tokens[torch.rand(targets + 1, generator=generator) < 0.05] = 1  # documents begin
    return fake_validation(tokens, config)


def looping_model(config):
    model = tiny_model(config)
    model.looping = True
    return model


def score(mode: str, config, model, val, rt=None) -> torch.Tensor:
    """Every target's score in one of the three modes, each target scored once; the model stays as it is.

    Or in a fourth, plain after fine-tuning on the split's first five sequences, in batches of two and then one.
    """
    rt, model = rt or Runtime(config), copy.deepcopy(model)
    if mode == "fine-tuned":
        sequences = val.tokens[:5 * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
        train_gpt.prequant_ttt(dataclasses.replace(config, prequant_ttt_epochs=2), rt, model, model, sequences)
    if mode == "ttt":
        scores = evaluate_ttt(config, rt, model, model, model.nll, val)
    else:
        stride = config.eval_stride if mode == "sliding" else config.eval_seq_len
        scores = evaluate(config, rt, model.nll, val, stride)
    result = scores.finish()
    assert scores.times_scored.tolist() == [1] * val.targets
    assert len(scores.nll) == val.targets and scores.nll.dtype == torch.float64
    assert result["val_loss"] == pytest.approx(float(scores.nll.mean()), rel=1e-12)
    assert result["val_bpb"] == pytest.approx(float(scores.nll.sum()) / math.log(2) / val.bytes, rel=1e-12)
    return scores.nll


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, stride", [(8, 8), (8, 1), (8, 3), (9, 8), (32, 8), (32, 32), (33, 5), (10, 7)])
def test_windows_cover_every_target_once_from_left_to_right(length, stride):
    config = small_config(EVAL_SEQ_LEN=length, EVAL_STRIDE=stride)
    for targets in (*range(length, 3 * length + 2), 500, 512, 513):
        chosen = windows(config, targets, stride)
        covered = [p for start, count in chosen for p in range(start + length - count, start + length)]
        assert covered == list(range(len(covered))), "a gap, an overlap or a step back"
        assert targets <= len(covered) < targets + stride, "every target, and no window for padding alone"
        assert chosen[0] == (0, length) and all(count == stride for _, count in chosen[1:])


# --- against slow references ----------------------------------------------------------------------------------------


def reference_nll(model, tokens: torch.Tensor, start: int, p: int) -> torch.Tensor:
    """Nats of target p, alone, given the tokens from `start` on: explicit softcap and log-softmax in fp64."""
    ids = tokens[start:p + 1].long()[None]
    z = (model.hidden(ids)[0, -1].double() @ model.embedding.double().T)
    return -F.log_softmax(30 * torch.tanh(z / 30), 0)[tokens[p + 1].long()]


def window_start(p: int, stride: int, length: int = LENGTH) -> int:
    """Where the window that scores target p begins: none before `length`, then every `stride`."""
    return 0 if p < length else -(-(p - length + 1) // stride) * stride


@torch.no_grad()
@pytest.mark.parametrize("mode, stride, targets", [("plain", LENGTH, 5 * LENGTH), ("plain", LENGTH, 139),
                                                   ("sliding", STRIDE, 136), ("sliding", STRIDE, 139),
                                                   ("sliding", 7, 101), ("sliding", LENGTH, 65), ("sliding", 1, 50)])
def test_scores_equal_one_target_at_a_time(mode, stride, targets):
    config = small_config(EVAL_STRIDE=stride)
    model, val = looping_model(config), random_split(targets, config)
    expected = torch.stack([reference_nll(model, val.tokens, window_start(p, stride), p) for p in range(targets)])
    assert (score(mode, config, model, val) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


def reference_ttt(config, model, val) -> torch.Tensor:
    """Chunk after chunk: score with one window at a time; then SGD as PyTorch has it, but not after the last chunk."""
    length, stride, chunk = config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens
    model, tokens, nll = copy.deepcopy(model), val.tokens, torch.zeros(val.targets, dtype=torch.float64)
    chunks = math.ceil(val.targets / chunk)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.ttt_momentum)
    for number in range(chunks):
        with torch.no_grad():
            for p in range(val.targets):
                start = window_start(p, stride, length)
                first = 0 if start == 0 else start + length - stride  # the first target that p's window scores
                if first // chunk == number:
                    nll[p] = reference_nll(model, tokens, start, p)
        if number == chunks - 1:
            break
        inside = tokens[number * chunk:(number + 1) * chunk + 1].long()
        rows = [(inside[i:i + length], inside[i + 1:i + length + 1]) for i in range(0, chunk - length + 1, length)]
        for _ in range(config.ttt_epochs):
            for begin in range(0, len(rows), config.ttt_batch_seqs):
                ids, targets = (torch.stack(t) for t in zip(*rows[begin:begin + config.ttt_batch_seqs]))
                optimizer.zero_grad()
                z = 30 * torch.tanh(model.hidden(ids) @ model.embedding.T / 30)
                F.cross_entropy(z.flatten(0, 1), targets.flatten()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.ttt_grad_clip or math.inf)
                optimizer.param_groups[0]["lr"] = config.ttt_lr * (1 + math.cos(math.pi * number / (chunks - 1))) / 2
                optimizer.step()
    return nll


@pytest.mark.parametrize("overrides, targets", [
    ({}, 3 * CHUNK + 21), ({"TTT_CHUNK_TOKENS": 75, "EVAL_STRIDE": 7}, 170), ({"TTT_GRAD_CLIP": 0.3}, 2 * CHUNK),
    ({"TTT_GRAD_CLIP": 0, "TTT_LR": 0.002, "TTT_EPOCHS": 1}, 2 * CHUNK + 1)], ids=str)
def test_ttt_equals_a_slow_loop(overrides, targets):
    config = small_config(MICRO_BATCH_TOKENS=32, **overrides)  # one sequence in a pass
    model, val = looping_model(config), random_split(targets, config)
    expected = reference_ttt(config, model, val)
    assert (score("ttt", config, model, val) - expected).abs().max() < 1e-4
    chunk, sliding = config.ttt_chunk_tokens, score("sliding", config, model, val)
    assert torch.equal(score("ttt", config, model, val)[:chunk], sliding[:chunk])  # nothing is learned yet
    assert (sliding - expected)[chunk + STRIDE:].abs().mean() > 0.03  # ... and then it is


def test_no_update_follows_the_last_chunk():
    config = small_config()
    model = looping_model(config)
    for targets, updates in ((CHUNK, 0), (CHUNK + 1, 2 * 2), (3 * CHUNK, 2 * 2 * 2)):
        calls, learner = [], copy.deepcopy(model)
        evaluate_ttt(config, Runtime(config), learner, lambda *pair: calls.append(pair) or learner(*pair), learner.nll,  # noqa: B023
                     random_split(targets, config))
        assert len(calls) == updates
        changed = any(not torch.equal(p, q) for p, q in zip(model.parameters(), learner.parameters()))
        assert changed == (updates > 0)


def test_ttt_without_epochs_is_sliding():
    config = small_config(TTT_EPOCHS=0)
    model, val = looping_model(config), random_split(300, config)
    assert (score("ttt", config, model, val) - score("sliding", config, model, val)).abs().max() < 1e-6


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_batch_sizes_do_not_matter(mode):
    model, expected = looping_model(small_config()), None
    for sizes in ({}, {"VAL_BATCH_TOKENS": 1}, {"VAL_BATCH_TOKENS": 100}, {"MICRO_BATCH_TOKENS": 32},
                  {"MICRO_BATCH_TOKENS": 4096, "VAL_BATCH_TOKENS": 64}):
        config = small_config(**sizes)
        found = score(mode, config, model, random_split(TARGETS, config))
        expected = found if expected is None else expected
        assert (found - expected).abs().max() < 1e-5, sizes


class WordPerToken:
    """A tokenizer of whole words: `p5`, `p6`, ..."""

    piece_to_id = staticmethod(lambda piece: 4)
    id_to_piece = staticmethod(lambda token: f"p{token}")
    vocab_size = staticmethod(lambda: 300)
    sha256 = ""
    is_unknown = is_control = is_unused = is_byte = staticmethod(lambda token: False)


@pytest.mark.parametrize("mode", MODES)
def test_dropping_the_tail_changes_nothing_before_it(mode, tmp_path, rt):
    write_shards(tmp_path, val=(150, 51))  # 200 targets: six windows and 8 more
    config, short = (small_config(DATA_DIR=tmp_path, EVAL_DROP_TAIL=drop) for drop in (0, 1))
    model = looping_model(config)
    whole, cut = (score(mode, c, model, train_gpt.ValidationData(c, rt, WordPerToken())) for c in (config, short))
    assert (len(whole), len(cut)) == (200, 192)
    torch.testing.assert_close(cut, whole[:192], rtol=0, atol=1e-5)


RANKS_SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from test_evaluation import MODES, TARGETS, looping_model, random_split, score, small_config
from train_gpt import Runtime
config = small_config()
rt = Runtime(config)
model, results = looping_model(config), {{}}
for mode in (*MODES, "fine-tuned"):
    results[mode] = score(mode, config, model, random_split(TARGETS, config), rt).tolist()
if rt.main:
    json.dump(results, open("scores.json", "w"))
rt.end()
"""


@pytest.mark.slow  # test_pipeline has two ranks' scores of a whole run
def test_two_ranks_score_like_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS_SCRIPT.format(root=str(ROOT)))
    done = torchrun(2, "ranks.py", cwd=tmp_path, env={})
    assert done.returncode == 0, done.stderr[-3000:]
    config = small_config()
    val, model = random_split(TARGETS, config), looping_model(config)
    for mode, found in json.loads((tmp_path / "scores.json").read_text()).items():
        found, expected = torch.tensor(found, dtype=torch.float64), score(mode, config, model, val)
        assert abs(float(found.sum() - expected.sum())) / math.log(2) / val.bytes < 1e-5, mode
        assert (found - expected).abs().max() < 1e-4, mode


def test_the_published_settings_are_the_defaults():
    config = train_gpt.Config.from_env({})
    assert (config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens) == (2048, 64, 32768)
    assert (config.ttt_enabled, config.ttt_epochs, config.ttt_batch_seqs) == (True, 3, 32)
    assert (config.ttt_lr, config.ttt_momentum, config.ttt_grad_clip) == (0.005, 0.9, 1.0)


def test_ranks_adapt_as_one():
    """Three ranks share batches of five sequences, and end with one rank's weights."""
    config, sequences = tiny_config(ttt_batch_seqs=5, ttt_grad_clip=0), torch.randint(3, 300, (8, 33))
    models = [tiny_model(config) for _ in range(3)]

    def work(rt):
        model = copy.deepcopy(models[rt.rank])
        grads = train_gpt.bind_gradients(list(model.parameters()))
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train_gpt.descend(config, rt, model, sgd, grads, sequences)
        return [p.detach() for p in model.parameters()]

    alone, = on_ranks(1, work)
    assert not torch.equal(alone[0], next(models[0].parameters()))
    for found in on_ranks(3, work):
        for mine, theirs in zip(found, alone):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_released_is_what_was_asked_for(rt):
    val = fake_validation(torch.arange(3, 200), tiny_config())
    assert torch.equal(train_gpt.Scores(rt, val).release(10, 20), val.tokens[10:21])
