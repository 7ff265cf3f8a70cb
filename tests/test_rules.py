"""The rules, one by one: what makes a score count. Beside each check stands a violation that it must catch.

The four conditions go through the real evaluation code, in all modes, on one rank and on two (this file, run as a
script by torchrun, is then each rank's program). Rule or public failure: its tests, here and beside here.

    16,000,000 bytes (#1809): test_a_submission_over_the_cap_is_not_compliant, test_the_code_counts_in_the_fit
    the artifact alone, no network: test_packed_script_scores_the_artifact_alone, test_nothing_outside_is_needed
    600 s of training: test_limits_of_the_contest, test_no_time_is_free, test_every_packing_counts_as_training_time,
        test_all_up_to_the_artifact_counts_as_training_time, test_training_begins_with_what_the_seed_makes
    600 s of evaluation: test_limits_of_the_contest, test_no_time_is_free,
        test_all_from_the_artifact_on_counts_as_evaluation_time, test_what_makes_the_mixture_counts_as_evaluation_time
    0.005 nats, p < 0.01, three seeds: test_the_standing_record_must_be_beaten_by_five_millinats,
        test_welch_test_against_closed_forms, test_four_seeds_that_are_not_alike
    a submission's folder: test_a_records_folder_is_ready_for_a_pull_request
    Python 3.10 (#1541): test_the_packed_script_parses_on_python_310, test_source_has_only_python_310_grammar
    causal, normalized, score before update, single pass (#1017): test_conditions_on_one_rank,
        test_a_compiled_run_makes_the_same_figures, test_no_stage_knows_an_earlier_ones_score,
        test_conditions_on_two_ranks, test_conditions_in_every_preset, test_the_run_notices_a_violation_by_itself
    fine-tuning on validation tokens before they are scored (#1376, #1487, #1517):
        test_fine_tuning_on_what_is_scored_later_is_marked_everywhere, test_training_never_looks_at_validation_tokens
    tokens scored again after training on them (#991): test_conditions_on_one_rank,
        test_the_score_is_of_the_last_stage_and_every_stage_is_walked_once
    warm-up on validation tokens (#1530), calibration on them (#1919): test_training_never_looks_at_validation_tokens
    a space counted twice (#1545, #1719), byte pieces as three bytes (#1184, #1271):
        test_bytes_are_those_of_the_decoded_text, test_every_document_is_looked_at
    a tokenizer without a lone space (#897): test_a_tokenizer_without_a_lone_space_is_refused
    a smear across documents (#1797, #1851): test_no_smear_across_a_document_boundary
    a blend that sums to 277 (#886, #978): test_conditions_on_one_rank, test_a_distribution_must_add_up_to_one
    a token's probability spread over its bytes (#1835, #1858, #1877):
        test_mixture_is_a_distribution_over_the_real_vocabulary, test_the_mixtures_figure_is_what_its_shares_make,
        test_a_byte_mixture_stands_beside_the_neural_score
    a subset as the split (#1858), a window left out (#2014): test_a_split_is_read_whole,
        test_the_split_is_scored_as_it_lies_there,
        test_all_validation_shards_are_scored, test_dropped_tail_is_not_compliant
    time that GPTQ took beyond the reserve (#1541): test_all_up_to_the_artifact_counts_as_training_time
    a script that overwrites itself (#1858): test_the_running_script_is_never_overwritten,
        test_later_seeds_pack_the_same_code
    submission, README and logs that disagree (#1517, #1858): test_settings_in_the_record_are_the_settings_in_force,
        test_what_ran_is_told_from_the_records, test_contest_runs_are_averaged_with_worst_case_bytes
    flags for dead code (#1541): test_no_flag_for_dead_code
    a binary from elsewhere (#1855): test_nothing_outside_is_needed
"""
import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import ROOT, SHARED, Characters, Noted, fake_validation, torchrun
from test_evaluation import (
    CHUNK,
    LENGTH,
    MODES,
    STRIDE,
    TARGETS,
    looping_model,
    random_split,
    reference_nll,
    reference_ttt,
    score,
    small_config,
    window_start,
)

import train_gpt
from train_gpt import SOURCE, Runtime, Scores, evaluate, evaluate_ttt, score_windows, windows

# --- the four conditions (issue #1017): each check lists the violations that it finds ---------------------------------


def run_mode(mode, config, rt, model, nll_fn, loss_fn, val) -> Scores:
    """One evaluation as score_artifact does it."""
    if mode == "ttt":
        return evaluate_ttt(config, rt, model, loss_fn, nll_fn, val)
    return evaluate(config, rt, nll_fn, val, config.eval_seq_len if mode == "plain" else config.eval_stride)


def find_acausal(mode, rt) -> list[str]:
    """Whatever comes at or after token t: the scores of the tokens before t must stay the same to the last bit."""
    config = small_config()
    model, val = looping_model(config), random_split(TARGETS, config)
    before = score(mode, config, model, val, rt)
    generator = torch.Generator().manual_seed(1)
    for t in (1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 20, 2 * CHUNK, val.targets):
        for stop in (t + 1, val.targets + 1)[mode == "ttt":]:  # token t alone, and everything from t on
            changed = fake_validation(val.tokens.clone(), config)
            changed.tokens[t:stop] = 3 + (changed.tokens[t:stop] - 3 + torch.randint(
                1, 297, (stop - t,), generator=generator, dtype=torch.int32)) % 297
            begins = torch.arange(t, stop)[(val.tokens[t:stop] != 1) & (torch.arange(t, stop) % 3 == 0)]
            changed.tokens[begins] = 1  # documents begin elsewhere, too
            after = score(mode, config, model, changed, rt)
            if not torch.equal(after[:t - 1], before[:t - 1]):
                return [f"the score of a token before {t} depends on tokens {t} to {stop - 1}"]
            assert after[t - 1] != before[t - 1], "token t's own score must depend on it, or nothing was tested"
    return []


def find_unnormalized(mode, rt) -> list[str]:
    """Try every possible token at one place: the probabilities that the scores stand for must add up to 1.

    The split holds one block per candidate, alike but for that token, so that each is scored after the same tokens.
    In TTT a chunk of other text comes first, and the model has learned from it by then.
    """
    block = LENGTH if mode == "plain" else LENGTH + STRIDE  # room for a window that lies within the block
    config = small_config(VOCAB_SIZE=260, TTT_CHUNK_TOKENS=260 * block, TTT_EPOCHS=1, TTT_BATCH_SEQS=130,
                          MICRO_BATCH_TOKENS=4096)
    model, rng, found = looping_model(config), np.random.default_rng(0), []
    first = 0 if mode == "plain" else block - STRIDE
    for place in rng.choice(np.arange(first, block - 1), 1 if mode == "ttt" else 2, replace=False):
        text = np.tile(rng.integers(0, 260, block), (260, 1))
        text[:, place + 1] = np.arange(260)
        before = rng.integers(0, 260, 260 * block if mode == "ttt" else 0)
        tokens = np.concatenate([before, text.ravel(), text[0, :1]])
        nll = score(mode, config, model, fake_validation(tokens, config), rt)
        probabilities = (-nll[len(before):].view(260, block)[:, place]).exp()
        if abs(float(probabilities.sum()) - 1) > 1e-5:
            found.append(f"probabilities at {place} of a block add up to {float(probabilities.sum())}")
        assert probabilities.max() > 2 / 260 > probabilities.min(), "a flat distribution would test nothing"
    return found


class Ledger:
    """When each target was scored, and when an update saw it, over all ranks: noted at the two functions that do it."""

    def __init__(self, model, val):
        self.model, pairs = model, list(zip(val.tokens.tolist(), val.tokens.tolist()[1:]))
        self.position = {pair: p for p, pair in enumerate(pairs)}
        assert len(self.position) == len(pairs)  # so a target is known by its token and the one before
        self.events: list[tuple[float, str, list[int]]] = []

    def note(self, kind, ids, targets):
        """Enter the targets; pairs that the split does not hold are padding."""
        pairs = zip(ids[:, -targets.size(1):].flatten().tolist(), targets.flatten().tolist())
        known = [self.position[pair] for pair in pairs if pair in self.position]
        self.events.append((time.monotonic(), kind, known))  # one clock for all processes of a machine

    def nll(self, ids, targets):
        result = self.model.nll(ids, targets)
        self.note("score", ids, targets)
        return result

    def loss(self, ids, targets):
        self.note("train", ids, targets)
        return self.model(ids, targets)

    def violations(self, targets: int) -> list[str]:
        """What is wrong with the order of events, all ranks' taken together."""
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self.events)
        scored, found = collections.Counter(), set()
        for _, kind, positions in sorted(event for events in ranks for event in events):
            if kind == "score":
                scored.update(positions)
            elif not all(scored[p] for p in positions):
                found.add("trained on a target before it was scored")
        for events in ranks:
            walk = [p for _, kind, positions in events if kind == "score" for p in positions]
            if walk != sorted(walk):
                found.add("not from left to right")
        if max(scored.values()) > 1:
            found.add("a target was scored twice")
        if len(scored) < targets:
            found.add("a target was never scored")
        return sorted(found)


def distinct_split(targets: int, config):
    """A split in which no pair of neighbours occurs twice."""
    rng, tokens, seen = np.random.default_rng(0), [3], set()
    while len(tokens) <= targets:
        token = int(rng.integers(3, config.vocab_size))
        if token != tokens[-1] and (tokens[-1], token) not in seen:
            seen.add((tokens[-1], token))
            tokens.append(token)
    return fake_validation(tokens, config)


def find_disorder(mode, rt, targets: int = TARGETS, walk=None, **settings) -> list[str]:
    """Every target scored once, left to right, tail included, and before any update saw it."""
    config = small_config(**settings)
    val = distinct_split(targets, config)
    ledger = Ledger(looping_model(config), val)
    walk = walk or run_mode
    walk(mode, config, rt, ledger.model, ledger.nll, ledger.loss, val)
    trained = sum(kind == "train" for _, kind, _ in ledger.events)
    assert (trained > 0) == (mode == "ttt"), "an evaluation without updates must have none, TTT must have some"
    return ledger.violations(targets)


CHECKS = {"causal": find_acausal, "normalized": find_unnormalized, "ordered": find_disorder}

# --- planted violations: patches of train_gpt under which a check must find something ---------------------------------


patched = unittest.mock.patch.object


def instead_of(name, holder=train_gpt):
    """Make a plant, a patch of holder.name, of a function that is given the honest one, then its arguments."""
    def plant(change):
        @functools.wraps(change)
        def planted():
            honest = getattr(holder, name)
            return patched(holder, name, lambda *args, **named: change(honest, *args, **named))
        return planted
    return plant


def attention_without_mask():
    """Every position attends to the whole window."""
    def attend(q, k, v, kernel):
        groups = q.size(2) // k.size(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return patched(train_gpt, "causal_attention", attend)


def leaked(distance):
    """Each state takes in the token `distance` ahead."""
    hidden = train_gpt.GPT.hidden
    return patched(train_gpt.GPT, "hidden",
                   lambda self, ids: hidden(self, ids) + train_gpt.norm(self.embedding[ids.roll(-distance, 1)]))


def leaked_target():
    """The score of a token knows the token: its probabilities, tried one by one, do not add up to 1."""
    return leaked(1)


def leaked_token():
    return leaked(2)


def statistics_of_the_window():
    """States are normalized by statistics of the whole window."""
    hidden = train_gpt.GPT.hidden
    return patched(train_gpt.GPT, "hidden", lambda self, ids: hidden(self, ids) - hidden(self, ids).mean(1, True))


def changed_nll(change):
    """Scores that another function has touched: change(nats, ids, targets)."""
    nll = train_gpt.GPT.nll
    return patched(train_gpt.GPT, "nll", lambda self, ids, targets: change(nll(self, ids, targets), ids, targets))


def blended_cache():
    """A cache blended into the true token's probability alone (#886, #978): the hit rate is 0.9 for every token."""
    return changed_nll(lambda nll, ids, targets: -(0.9 * (-nll).exp() + 0.1 * 0.9).log())


def spread_over_bytes():
    """A token's probability spread evenly over its bytes and mixed byte by byte (#1835): 1, 2 or 3 bytes a token."""
    def change(nll, ids, targets):
        count = 1 + targets % 3
        return -count * (0.7 * (-nll / count).exp() + 0.3 / 256).log()
    return changed_nll(change)


def discounted():
    """Scores a little lower than the distribution says."""
    return changed_nll(lambda nll, ids, targets: nll - 0.01)


def discounted_in_long_windows():
    """Scores a little lower where a window is longer than the few tokens that are checked with every candidate."""
    return changed_nll(lambda nll, ids, targets: nll - 0.01 * (ids.size(1) > 16))


def no_partition():
    """Logits of every other token raised after the softmax."""
    return changed_nll(lambda nll, ids, targets: nll - 0.05 * (targets % 2))


def chunk_windows(config, val, chunk):
    return [w for w in windows(config, val.targets, config.eval_stride)
            if (w[0] + config.eval_seq_len - w[1]) // config.ttt_chunk_tokens == chunk]


def walk_in_chunks(visit):
    """An evaluate_ttt of another order: visit(score, learn, chunk), where both take a chunk's number."""
    def walk(config, rt, model, loss_fn, nll_fn, val, *_):
        scores, size = Scores(rt, val), config.ttt_chunk_tokens
        grads = train_gpt.bind_gradients(list(model.parameters()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

        def score_chunk(chunk):
            score_windows(config, rt, nll_fn, scores, chunk_windows(config, val, chunk))

        def learn(chunk, further=0):
            tokens = val.tokens[chunk * size:min((chunk + 1) * size + further, val.targets) + 1]
            if len(tokens) > config.eval_seq_len:
                train_gpt.adapt(config, rt, loss_fn, optimizer, grads, tokens)

        for chunk in range(-(-val.targets // size)):
            visit(score_chunk, learn, chunk)
        return scores
    return patched(train_gpt, "evaluate_ttt", walk)


def learn_before_scoring():
    """Fine-tuning on validation tokens before scoring them (#1376, #1487, #1517), chunk by chunk."""
    return walk_in_chunks(lambda score_chunk, learn, chunk: (learn(chunk), score_chunk(chunk)))


def peek_beyond_the_chunk():
    """The chunk that it learns from is one window longer than what it has scored."""
    return walk_in_chunks(lambda score_chunk, learn, chunk: (score_chunk(chunk), learn(chunk, LENGTH)))


def score_again():
    """Rescores each chunk after training on it (#991)."""
    return walk_in_chunks(lambda score_chunk, learn, chunk: (score_chunk(chunk), learn(chunk), score_chunk(chunk)))


def changed_windows(change):
    honest = train_gpt.windows
    return patched(train_gpt, "windows", lambda config, targets, stride: change(honest(config, targets, stride)))


def without_the_tail():
    """The last partial window is dropped (many)."""
    return changed_windows(lambda chosen: chosen[:-1])


def subset():
    """Half of the split (#1858)."""
    return changed_windows(lambda chosen: chosen[:len(chosen) // 2])


def doubled_window():
    return changed_windows(lambda chosen: [*chosen[:3], chosen[2], *chosen[3:]])


def backwards():
    return changed_windows(lambda chosen: chosen[::-1])


TTT_PLANTS = {learn_before_scoring: ["causal", "ordered"], peek_beyond_the_chunk: ["causal", "ordered"],
              score_again: ["ordered"]}
PLANTS = {attention_without_mask: ["causal"], leaked_token: ["causal"], leaked_target: ["normalized"],
          statistics_of_the_window: ["causal"],
          blended_cache: ["normalized"], spread_over_bytes: ["normalized"], discounted: ["normalized"],
          no_partition: ["normalized"], without_the_tail: ["ordered"], subset: ["ordered"],
          doubled_window: ["ordered"], backwards: ["ordered"]}
CASES = [(check, mode, None) for check in CHECKS for mode in MODES] + [
    (check, mode, plant.__name__) for mode in MODES
    for plant, checks in {**PLANTS, **(TTT_PLANTS if mode == "ttt" else {})}.items() for check in checks]
# On two ranks only the violations that ranks could hide.
TWO_RANK_CASES = [case for case in CASES if case[2] in (None, *(plant.__name__ for plant in (
    *TTT_PLANTS, doubled_window, without_the_tail)))]


def findings(check: str, mode: str, plant: str | None, rt) -> list[str]:
    """What a check finds in a mode under a planted violation, or in the code as it is."""
    with globals()[plant]() if plant else contextlib.nullcontext():
        # The patched evaluate_ttt is looked up at the call; a score that was made twice or never is a finding, too.
        try:
            with patched(sys.modules[__name__], "evaluate_ttt", train_gpt.evaluate_ttt), \
                    patched(sys.modules["test_evaluation"], "evaluate_ttt", train_gpt.evaluate_ttt):
                return CHECKS[check](mode, rt)
        except AssertionError as error:
            if plant is None or "tested" in str(error):
                raise
            return [f"refused: {error}"]


def judge(found: list[str], plant):
    if plant is None:
        assert not found, found
    else:
        assert found, f"{plant} was not noticed"


def thinned(cases, fast):
    """The cases as pytest takes them; those that are not `fast` are for the slow set."""
    return [case if fast(case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("check, mode, plant", thinned(CASES, lambda case: (
    case[2] in (None, "leaked_token", "blended_cache", "subset") or globals()[case[2]] in TTT_PLANTS)),
    ids=lambda x: x or "as it is")
def test_conditions_on_one_rank(check, mode, plant, rt):
    judge(findings(check, mode, plant, rt), plant)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """All their cases on two ranks, in one torchrun: {case: findings}."""
    folder = tmp_path_factory.mktemp("two_ranks")
    done = torchrun(2, str(Path(__file__).resolve()), cwd=folder, env={})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads((folder / "findings.json").read_text())


def test_windows_that_straddle_chunks_are_scored_before_their_update(rt):
    """Where the stride does not divide the chunk."""
    honest = small_config
    with patched(sys.modules[__name__], "small_config", lambda **values: honest(
            **{**values, "TTT_CHUNK_TOKENS": 75, "EVAL_STRIDE": 7})):
        for check in ("ordered", "causal"):
            judge(findings(check, "ttt", None, rt), None)


@pytest.mark.parametrize("check, mode, plant", TWO_RANK_CASES, ids=lambda x: x or "as it is")
def test_conditions_on_two_ranks(check, mode, plant, two_ranks):
    judge(two_ranks[str((check, mode, plant))], plant)


# --- training never sees a validation token: fine-tuning (#1376, #1487, #1517), warm-up (#1530), calibration (#1919) --

TINY_RUN = dict(
    PRESET="smoke", VOCAB_SIZE=512, NUM_LAYERS=4, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, LOOP_START=1, LOOP_END=2,
    NUM_LOOPS=1, PARALLEL_RESIDUAL_START=3, TRAIN_SEQ_LEN=32, EVAL_SEQ_LEN=32, ROPE_TRAIN_SEQ_LEN=32, EVAL_STRIDE=16,
    TRAIN_BATCH_TOKENS=1024, ITERATIONS=4, VAL_LOSS_EVERY=0, GPTQ_CALIBRATION_BATCHES=1, TTT_EPOCHS=1,
    TTT_CHUNK_TOKENS=1024, RUN_ID="run", DEVICE="cpu", QUANTIZER="sdclip")


def tiny_run_config(folder, data, **overrides) -> train_gpt.Config:
    return train_gpt.Config.from_env({name: str(value) for name, value in {
        **TINY_RUN, "OUT_DIR": folder / "out", "LOG_DIR": folder / "logs", "DATA_DIR": data, **overrides}.items()})


@contextlib.contextmanager
def log_closed(rt):
    """However the run inside ends, the next one finds no log open."""
    try:
        yield
    finally:
        if rt.log_file:
            rt.log_file.close()
            rt.log_file = None


def tiny_run(folder, data, rt, **overrides) -> dict:
    """The whole pipeline in this process; returns the record."""
    with patched(train_gpt, "KEPT_FP16_ELEMENTS", 4000), log_closed(rt):  # or no bank would be large enough to quantize
        train_gpt.run_training(tiny_run_config(folder, data, **overrides), rt)
    return json.loads((folder / "logs" / "run.json").read_text())


# The other systems' presets, in the tests' small sizes.
SMALL_PRESETS = {"pr1858": {"PRESET": "pr1858"}, "pr1517": {"PRESET": "pr1517", "RECUR_LAYERS": "1,3"},
                 "pr1395": {"PRESET": "pr1395", "RECUR_LAYERS": "2,3", "VE_LAYERS": "3"}}


@pytest.mark.parametrize("preset, check, mode, plant", thinned(
    [(preset, check, mode, plant) for preset in SMALL_PRESETS for check, mode, plant in CASES
     if plant in (None, "leaked_token", "discounted", "doubled_window")],
    lambda case: case[1:] in (("causal", "sliding", None), ("normalized", "plain", None))),
    ids=lambda x: x or "as it is")
def test_conditions_in_every_preset(preset, check, mode, plant, rt):
    honest = small_config
    with patched(sys.modules[__name__], "small_config", lambda **values: honest(**{**SMALL_PRESETS[preset], **values})):
        judge(findings(check, mode, plant, rt), plant)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two data folders with the same training shards and tokenizer, and different short validation splits."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    train_gpt.write_embedded_corpus(tiny_run_config(one, one))
    path, = train_gpt.shard_files(tiny_run_config(one, one), "val")
    tokens = np.array(train_gpt.open_shard(path))[:4000]
    train_gpt.write_shard(path, tokens)
    shutil.copytree(one, other, dirs_exist_ok=True)
    other_text = np.where(tokens == 1, 1, 3 + (tokens.astype(np.int64)[::-1] * 7) % 251)  # other tokens, other counts
    train_gpt.write_shard(other / path.relative_to(one), np.concatenate([[1], other_text[:-1]]))
    return one, other


class WatchedValidation(train_gpt.ValidationData):
    """A validation split that notes in which stage its tokens are looked at, unless it is to score them."""

    stage, looks, last = None, [], None

    @property
    def tokens(self):
        WatchedValidation.last = self
        if self.stage:
            self.looks.append(self.stage)
        return self._tokens

    @tokens.setter
    def tokens(self, value):
        self._tokens = value

    def windows(self):
        """Inputs and targets for whoever breaks the rule."""
        rows = self.tokens[:33 * 32].view(32, 33).long()
        return rows[:, :-1], rows[:, 1:]


def in_stage(name, label):
    """Patch train_gpt.name so that WatchedValidation knows when it runs."""
    function = getattr(train_gpt, name)

    def watched(*args, **kwargs):
        with patched(WatchedValidation, "stage", label):
            return function(*args, **kwargs)
    return patched(train_gpt, name, watched)


@instead_of("warm_up")
def warm_up_on_validation(honest, config, rt, model, loss_fn, data):
    """The compile warm-up runs on validation tokens (#1530)."""
    honest(config, rt, model, loss_fn, data)
    loss_fn(*WatchedValidation.last.windows())


def calibration_on_validation():
    """Hessians from validation tokens (#1919)."""
    honest = train_gpt.collect_hessians

    class Data:
        def batch(self, number):
            return [WatchedValidation.last.windows()]
    return patched(train_gpt, "collect_hessians", lambda config, rt, model, data: honest(config, rt, model, Data()))


@instead_of("train")
def fine_tuning_on_validation(honest, config, rt, model, loss_fn, *rest):
    """Pre-quantization test-time training on validation tokens (#1517)."""
    result = honest(config, rt, model, loss_fn, *rest)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss_fn(*WatchedValidation.last.windows()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return result


@instead_of("check_held_out")
def token_counts_of_validation(honest, record, val, data):
    """The embedding starts larger for tokens that the split holds."""
    honest(record, val, data)
    torch.manual_seed(int(val._tokens.bincount().argmax()))  # the weights are drawn after this
    WatchedValidation.looks.append("run_training")


@pytest.mark.parametrize("plant, stage, in_artifact", [
    (None, None, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (calibration_on_validation, "make_artifact", True), (warm_up_on_validation, "warm_up", False),
        (token_counts_of_validation, "run_training", True), (fine_tuning_on_validation, "train", True)))])
def test_training_never_looks_at_validation_tokens(plant, stage, in_artifact, corpus, tmp_path, rt):
    """Nobody reads them but to score and to check; with other validation shards the same weights come out."""
    results = []
    for number, data in enumerate(corpus):
        WatchedValidation.looks.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(patched(train_gpt, "ValidationData", WatchedValidation))
            if plant:
                stack.enter_context(plant())
            for name in ("run_training", "warm_up", "train", "make_artifact"):
                stack.enter_context(in_stage(name, name))
            for name in ("evaluate", "check_split", "check_held_out", "check_scoring", "deviation", "check_entered"):
                stack.enter_context(in_stage(name, None))
            record = tiny_run(tmp_path / str(number), data, rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0,
                              QUANTIZER="trellis", VAL_LOSS_EVERY=2)
        results.append((set(WatchedValidation.looks), record))
    (looks, one), (_, other) = results
    assert looks == ({stage} if stage else set())
    assert one["val_sha256"] != other["val_sha256"] and one["quantized"] != other["quantized"]
    assert (one["artifact_sha256"] != other["artifact_sha256"]) == in_artifact
    assert one["source_sha256"] == other["source_sha256"] and one["code_sha256"] == other["code_sha256"]


@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_every_preset_runs_and_is_compliant(preset, corpus, tmp_path, rt):
    record = tiny_run(tmp_path, corpus[0], rt, **SMALL_PRESETS[preset], RECUR_START_STEP=2, MAX_SKIPS=2)
    assert record["compliant"] and not failed(record) and record["preset"] == preset
    assert record["settings"]["quantizer"] == "sdclip" and (record["ttt"] is not None) == (preset == "pr1858")
    again = train_gpt.unpack_artifact((tmp_path / "out" / "final_model.ptz").read_bytes())[1]["settings"]
    assert again["preset"] == preset


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_every_presets_packed_script_scores_alike(preset, corpus, tmp_path, rt):
    """What it was packed for is what it does without: the other systems' branches are gone."""
    record = tiny_run(tmp_path, corpus[0], rt, **SMALL_PRESETS[preset], RECUR_START_STEP=2, MAX_SKIPS=2)
    done = torchrun(0, str(tmp_path / "out" / "train_gpt.py"), cwd=tmp_path, env={
        "MODE": "eval", "OUT_DIR": "out", "LOG_DIR": "again", "RUN_ID": "run", "DATA_DIR": str(corpus[0])})
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    for stage in ("quantized", "sliding", "ttt"):
        assert (again[stage] or {}).get("val_loss") == (record[stage] or {}).get("val_loss")
    assert again["code_sha256"] == record["code_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_every_presets_packed_script_trains_alike(preset, corpus, tmp_path, rt):
    """With matrices large enough for both to quantize."""
    config = tiny_run_config(tmp_path, corpus[0], MODEL_DIM=128, **SMALL_PRESETS[preset], RECUR_START_STEP=2)
    with log_closed(rt):
        train_gpt.run_training(config, rt)
    record = json.loads((tmp_path / "logs" / "run.json").read_text())
    settings = {name.upper(): str(int(x) if isinstance(x, bool) else x) for name, x in record["settings"].items()
                if name != "preset"}
    done = torchrun(0, str(tmp_path / "out" / "train_gpt.py"), cwd=tmp_path, env={
        **settings, "RUN_ID": "run", "OUT_DIR": "again", "LOG_DIR": "again", "DATA_DIR": str(corpus[0])})
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["settings"].items() <= record["settings"].items(), "it has none that nothing in it reads"
    ours, theirs = (train_gpt.unpack_artifact((tmp_path / folder / "final_model.ptz").read_bytes())[0]
                    for folder in ("out", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "up_bank.scale" in ours and again["prequant"]["val_loss"] == record["prequant"]["val_loss"]


@pytest.mark.parametrize("values, stage", [
    ({}, "ttt"), pytest.param({"TTT_ENABLED": 0}, "sliding", marks=pytest.mark.slow),
    pytest.param({"TTT_ENABLED": 0, "SLIDING_WINDOW_ENABLED": 0}, "quantized", marks=pytest.mark.slow),
    pytest.param({"PPM_MODE": "spread"}, "ttt", marks=pytest.mark.slow)])
def test_a_byte_mixture_stands_beside_the_neural_score(values, stage, corpus, tmp_path, rt):
    """In its own field; the neural score is what it is without. The published form (#1835) is no distribution."""
    record = tiny_run(tmp_path / "with", corpus[0], rt, PPM_ENABLED=1, **values)
    alone = tiny_run(tmp_path / "without", corpus[0], rt, **{k: v for k, v in values.items() if k != "PPM_MODE"})
    for name in ("prequant", "quantized", "sliding", "ttt"):
        if alone[name]:
            assert record[name]["val_loss"] == pytest.approx(alone[name]["val_loss"], abs=1e-9)
    assert alone["ppm"] is None and record["ppm"]["val_bpb"] < record[stage]["val_bpb"], "a poor model gains from PPM"
    assert failed(record) == ({"ppm_normalized"} if values.get("PPM_MODE") else set())
    assert record["compliant"] == ("PPM_MODE" not in values)
    assert train_gpt.final_score(record) == record[stage]
    # The mixture by hand, from the artifact's own logits in the last windows' order.
    if stage == "quantized":
        config = tiny_run_config(tmp_path / "with", corpus[0], PPM_ENABLED=1, **values)
        sp = train_gpt.load_tokenizer(config)
        val, trie = train_gpt.ValidationData(config, rt, sp), train_gpt.ByteTrie(sp)
        artifact = (tmp_path / "with" / "out" / "final_model.ptz").read_bytes()
        model = train_gpt.model_from_artifact(config, rt, train_gpt.unpack_artifact(artifact)[0])
        rows, shares, rests = trie.rows(val.tokens[:-1], val.tokens[1:]), [], []
        for p in range(val.targets):
            start = p // LENGTH * LENGTH
            with torch.no_grad():
                logits = model.head(model.hidden(val.tokens[None, start:p + 1].long())[0, -1:])
            share, rest = trie.shares(logits, rows[p:p + 1])
            shares.append(share)
            rests.append(rest)
        rows = rows.numpy().astype(np.int32)
        nll = train_gpt.mix_bytes(trie.length[rows], torch.cat(shares).numpy(), torch.cat(rests).numpy(),
                                  train_gpt.PPM(trie, 16).predict(rows), False)
        assert record["ppm"]["val_bpb"] == pytest.approx(nll.sum() / math.log(2) / val.bytes, abs=1e-5)


@pytest.mark.parametrize("mode, less, more, ok", [
    ("trie", 0, 0, True), ("spread", 0, 0, False), ("trie", 0.001, 0, False), ("trie", 0, 1, False)])
def test_the_mixtures_figure_is_what_its_shares_make(mode, less, more, ok, tmp_path, rt):
    """Never the better of two for a token, and held against the neural score; log and record tell the same."""
    rng, config = np.random.default_rng(0), small_config(PPM_ENABLED=1, PPM_MODE=mode, LOG_DIR=tmp_path)
    length = rng.integers(1, 4, 50)
    share, predicted = (rng.uniform(0.05, 0.95, length.sum()).astype(np.float32) for _ in range(2))
    rest = rng.uniform(0, 1, 50)
    alone = rest - np.bincount(np.repeat(np.arange(50), length), np.log(share.astype(np.float64)), 50)
    val = SimpleNamespace(targets=50, bytes=int(length.sum()) + more, left_out=0,
                          bits_per_byte=lambda nats: nats / math.log(2) / length.sum())
    record, lines = train_gpt.Record(config, rt, "run"), []
    scores = SimpleNamespace(val=val, nll=torch.from_numpy(alone))
    with patched(rt, "log", lines.append):
        train_gpt.score_mixture(record, config, SimpleNamespace(length=length), (share, rest - less), predicted, scores,
                                rt.clock())
    mixed = train_gpt.mix_bytes(length, share, rest - less, predicted, mode == "spread").sum()
    assert record.data["ppm"]["val_loss"] == pytest.approx(mixed / 50)
    assert record.data["ppm"]["val_bpb"] == pytest.approx(mixed / math.log(2) / length.sum())
    assert f"quantized_ppm {train_gpt.score_line(record.data['ppm'])}" in lines
    assert failed(record.data) == (set() if ok else {"ppm_normalized"})
    record.set(artifact_seconds=9.0, train_seconds=9.0, calibration_seconds=0.0, quantize_seconds=0.0, eval_seconds=9.0,
               total_bytes=9)
    for name in train_gpt.CHECKS.split():
        record.check(name, True, "")
    train_gpt.final_checks(record, small_config(PPM_ENABLED=1, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0), val)
    assert record.data["compliant"] == ok and "complete" not in failed(record.data)


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("data", ["val", "train"])
def test_every_rank_is_fine_tuned_on_what_the_setting_says(main, data, corpus, tmp_path, rt):
    """And the check knows it, whatever else is switched on."""
    config = tiny_run_config(tmp_path, corpus[0], PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_DATA=data, TTT_ENABLED=1,
                             ITERATIONS=1)
    seen, checks = [], {}

    def watched(config, rt, model, loss_fn, sequences):
        seen.append(sequences)
        raise train_gpt.RunStopped("enough", 1)
    val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    with patched(rt, "main", main), patched(train_gpt, "prequant_ttt", watched), \
            patched(train_gpt.Record, "check", lambda record, name, ok, detail: checks.update({name: ok})), \
            pytest.raises(train_gpt.RunStopped), log_closed(rt):
        train_gpt.run_training(config, rt)
    expected = (train_gpt.TrainData(config, rt).in_order(2).stack(range(val.targets // 32)) if data == "train"
                else val.tokens.unfold(0, 33, 32))
    assert torch.equal(seen[0], expected) and checks["no_early_training"] == (data == "train")


def test_fine_tuning_and_adaptation_take_the_epochs_of_the_settings(rt):
    """#1517's files told of other numbers. Three sequences in batches of two: two steps an epoch."""
    model, steps = torch.nn.Module(), []
    for name in (*train_gpt.GPT.BANKS, "resid_mix", "attn_scale", "mlp_scale", "q_gain", "par_resid", "par_post"):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(4, 1)))
    sequences = torch.ones(3, LENGTH + 1, dtype=torch.int64)

    def loss_fn(ids, targets):
        return sum((p.sum() for p in model.parameters()), ids.sum() * 0.0)
    for epochs in (1, 3, 22):
        config = small_config(TTT_EPOCHS=epochs, PREQUANT_TTT_EPOCHS=epochs, MICRO_BATCH_TOKENS=4096)
        for name, arguments in (("prequant_ttt", (model, loss_fn, sequences)), ("adapt", (
                loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), train_gpt.bind_gradients([*model.parameters()]),
                torch.ones(3 * LENGTH + 1, dtype=torch.int64)))):
            steps.clear()
            with patched(torch.optim.SGD, "step", lambda *_: steps.append(1)), \
                    patched(torch.optim.AdamW, "step", lambda *_: steps.append(1)):
                getattr(train_gpt, name)(config, rt, *arguments)
            assert len(steps) == 2 * epochs, name
    assert (train_gpt.Config().ttt_epochs, train_gpt.Config().prequant_ttt_epochs) == (3, 22)


@pytest.mark.parametrize("data", ["val", "train"])
def test_fine_tuning_on_what_is_scored_later_is_marked_everywhere(data, corpus, tmp_path, rt):
    """PR #1517's own score came from it: log, record and submission say so; on training tokens it is as good as any."""
    folders, records = [tmp_path / str(i) for i in range(2)], []
    for folder, shards in zip(folders, corpus):
        records.append(tiny_run(folder, shards, rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, PREQUANT_TTT_ENABLED=1,
                                PREQUANT_TTT_DATA=data, PREQUANT_TTT_EPOCHS=2, PREQUANT_TTT_LR=0.01, ITERATIONS=1))
    one, other = records
    assert one["prequant_ttt"]["val_loss"] < one["prequant"]["val_loss"]
    assert failed(one) == (set() if data == "train" else {"no_early_training"})
    assert one["compliant"] == (data == "train")
    assert (one["artifact_sha256"] == other["artifact_sha256"]) == (data == "train"), "it follows the split"
    log = (folders[0] / "logs" / "run.txt").read_text()
    assert ("check no_early_training: FAILED" in log) == (data == "val")
    assert f"compliant: {data == 'train'}" in log and "pre-quantization post-ttt val_loss:" in log
    config = train_gpt.Config.from_env({"MODE": "collect", "RECORDS": str(folders[0] / "logs" / "run.json")})
    compliance = train_gpt.make_submission(config, train_gpt.read_records(config))["rehearsal"]["compliance"]
    assert compliance["no_early_training"] == compliance["all_checks"] == (data == "train")


@instead_of("train")
def trained_twice(honest, *args):
    """A second training whose time nobody takes."""
    honest(*args)
    args[2].looping = False
    return honest(*args)


def warmed_up_without_end():
    """More warm-up than the settings say."""
    honest = train_gpt.warm_up
    return patched(train_gpt, "warm_up", lambda config, *args: honest(
        dataclasses.replace(config, warmup_steps=3), *args))


@instead_of("stage", train_gpt.Record)
def one_more_step(honest, record, name, scores):
    """A step by hand between training and calibration, in the time of no stage."""
    if name == "prequant":
        model = one_more_step.model
        gradient, = torch.autograd.grad(model(*one_more_step.batch), model.embedding)
        model.embedding.data.sub_(gradient)
    honest(record, name, scores)


@instead_of("stage", train_gpt.Record)
def nudged_weights(honest, record, name, scores):
    """The same without a forward pass."""
    if name == "prequant":
        one_more_step.model.embedding.data.mul_(0.99)
    honest(record, name, scores)


@pytest.mark.parametrize("plant", [None, *(pytest.param(plant, marks=pytest.mark.slow) for plant in (
    one_more_step, trained_twice, warmed_up_without_end, nudged_weights))])
def test_a_run_trains_as_often_as_its_record_says(plant, corpus, tmp_path, rt, monkeypatch):
    """Every backward pass and every change to weights by an optimizer, over the whole run, is counted.

    So is every pass forward that has a loss, and the weights are in the end as `train` left them.
    """
    calls, left = collections.Counter(), {}

    def train(config, rt, model, loss_fn, data, validate, honest=train_gpt.train):
        result = honest(config, rt, model, loss_fn, data, validate)
        left.update({name: p.detach().clone() for name, p in model.named_parameters()})
        one_more_step.model, one_more_step.batch = model, data.batch(99)[0]
        return result
    monkeypatch.setattr(train_gpt, "train", train)

    def counted(function):
        def count(*args, **kwargs):
            calls[function.__qualname__] += 1
            return function(*args, **kwargs)
        return count
    for owner, name in ((torch.Tensor, "backward"), (train_gpt.Optimizer, "step"), (torch.optim.SGD, "step"),
                        (train_gpt.GPT, "forward"), (torch.autograd, "grad")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    with plant() if plant else contextlib.nullcontext():
        record = tiny_run(tmp_path, corpus[0], rt, SLIDING_WINDOW_ENABLED=0, QUANTIZER="trellis", VAL_LOSS_EVERY=2)
    config = tiny_run_config(tmp_path, corpus[0])
    chunks = -(-record["val_tokens"] // config.ttt_chunk_tokens)
    sgd = (chunks - 1) * config.ttt_epochs * -(-config.ttt_chunk_tokens // config.eval_seq_len // config.ttt_batch_seqs)
    steps = 2 * config.warmup_steps + record["steps"]
    sequences = config.train_batch_tokens // config.train_seq_len
    sensitivities = -(-sequences // -(-sequences // 4))  # passes over the one batch that they are measured on
    expected = {"Tensor.backward": steps + sgd + sensitivities, "Optimizer.step": steps, "SGD.step": sgd,
                "GPT.forward": steps + sgd}
    saved = torch.load(tmp_path / "out" / "final_model.pt", weights_only=True)
    same = saved.keys() == left.keys() and all(torch.equal(saved[name], left[name]) for name in left)
    assert (dict(calls) == expected and same) == (plant is None), (calls, expected, same)


@pytest.mark.parametrize("select", [None, "val_loss", pytest.param("val_bpb", marks=pytest.mark.slow)])
def test_validation_losses_choose_nothing(select, corpus, tmp_path, rt):
    """The losses that the log shows may rise or fall: the same artifact comes out. Planted: the best weights are kept.
    """
    honest = train_gpt.train

    def choosing(config, rt, model, loss_fn, data, validate):
        seen = []

        def watched():
            line = validate()
            loss = float(re.search(rf"{select}:(\S+)", line)[1])
            seen.append((loss, [p.detach().clone() for p in model.parameters()]))
            return line
        result = honest(config, rt, model, loss_fn, data, watched)
        torch._foreach_copy_([p.data for p in model.parameters()], min(seen, key=lambda pair: pair[0])[1])
        return result

    found = set()
    for number, change in enumerate((1.0, -1.0)):
        finish, calls = Scores.finish, []

        def other(self, finish=finish, change=change, calls=calls):
            calls.append(self)
            return {**finish(self), **dict.fromkeys(("val_loss", "val_bpb"), 5 + change * len(calls) / 4)}
        with patched(Scores, "finish", other), patched(train_gpt, "train", choosing if select else honest):
            record = tiny_run(tmp_path / str(number), corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0,
                              VAL_LOSS_EVERY=1, ITERATIONS=8)  # long enough for a plateau
        assert len(calls) > 8
        found.add(record["artifact_sha256"])
    assert len(found) == 1 + bool(select)


# --- a whole run against slow references ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_split(corpus, tmp_path_factory):
    """A data folder whose validation split is short enough for references that score one target at a time."""
    data = tmp_path_factory.mktemp("short")
    shutil.copytree(corpus[0], data, dirs_exist_ok=True)
    path, = train_gpt.shard_files(tiny_run_config(data, data), "val")
    tokens = np.array(train_gpt.open_shard(path))
    begins = np.flatnonzero(tokens == 1)
    train_gpt.write_shard(path, np.concatenate([tokens[begin:begin + 130] for begin in begins[:3]]))
    return data


@instead_of("check_scoring")
def fine_tuned_before_scoring(honest, record, config, model, nll_fn, val):
    """The artifact's model learns from the split before any stage is scored (#1376, #1517)."""
    honest(record, config, model, nll_fn, val)
    grads = train_gpt.bind_gradients(list(model.parameters()))
    train_gpt.adapt(config, record.rt, model, torch.optim.SGD(model.parameters(), lr=0.1), grads, val.tokens)


@instead_of("evaluate_ttt")
def adapted_twice(honest, *args):
    """The split is scored a second time by a model that has learned from all of it (#991)."""
    honest(*args)
    return honest(*args)


@instead_of("evaluate")
def sliding_after_adaptation(honest, config, rt, nll_fn, val, stride):
    """Sliding windows are scored with weights that test-time training has left."""
    if stride < config.eval_seq_len:  # sliding
        train_gpt.evaluate_ttt(config, rt, nll_fn.__self__, nll_fn.__self__, nll_fn, val)
    return honest(config, rt, nll_fn, val, stride)


@instead_of("finish", Scores)
def documents_begin_free(honest, self):
    """Targets of no bytes, the first of each document, cost nothing."""
    self.nll[:-1] *= self.val.target_bytes > 0
    return honest(self)


def discounted_by(nats, sliding):
    honest = train_gpt.evaluate

    def evaluate(config, rt, nll_fn, val, stride):
        less = nats * (sliding == (stride < config.eval_seq_len))
        return honest(config, rt, lambda ids, targets: nll_fn(ids, targets) - less, val, stride)
    return patched(train_gpt, "evaluate", evaluate)


def better_than_it_says():
    """A thousandth of a nat, in sliding windows only."""
    return discounted_by(1e-3, sliding=True)


def discounted_later():
    """What scores are once the checks of the scoring function are through."""
    return discounted_by(1e-3, sliding=False)


@pytest.mark.parametrize("plant", [None, *(
    pytest.param(plant, marks=pytest.mark.slow)
    for plant in (adapted_twice, fine_tuned_before_scoring, sliding_after_adaptation, documents_begin_free,
                  better_than_it_says))])
def test_a_whole_runs_figures_come_out_again_from_its_files(plant, short_split, tmp_path, rt):
    """From OUT_DIR's two files, one target at a time: what the record says of every stage."""
    learning = {"TTT_LR": 0.3, "TTT_CHUNK_TOKENS": 128, "MATRIX_BITS": 3, "EMBED_BITS": 4}
    with plant() if plant else contextlib.nullcontext():
        record = tiny_run(tmp_path, short_split, rt, **learning)
    config = tiny_run_config(tmp_path, short_split, **learning)
    sp = train_gpt.load_tokenizer(config)
    val = train_gpt.ValidationData(config, rt, sp)
    artifact = (tmp_path / "out" / "final_model.ptz").read_bytes()
    packed = train_gpt.model_from_artifact(config, rt, train_gpt.unpack_artifact(artifact)[0])
    unpacked = copy.deepcopy(packed)
    unpacked.load_state_dict(torch.load(tmp_path / "out" / "final_model.pt", weights_only=True))

    def one_by_one(model, stride):
        with torch.no_grad():
            return torch.stack([reference_nll(model, val.tokens, window_start(p, stride), p)
                                for p in range(val.targets)])
    expected = {"prequant": one_by_one(unpacked, LENGTH), "quantized": one_by_one(packed, LENGTH),
                "sliding": one_by_one(packed, config.eval_stride), "ttt": reference_ttt(config, packed, val)}
    size = len(sp.decode(val.tokens.tolist()).encode())
    apart = abs(float((expected["prequant"] - expected["quantized"]).mean()))
    assert apart > 2e-4, f"nothing was tested: {apart}"
    right = [record[stage]["val_loss"] == pytest.approx(float(nll.mean()), abs=2e-5) and
             record[stage]["val_bpb"] == pytest.approx(float(nll.sum()) / math.log(2) / size, abs=2e-5)
             for stage, nll in expected.items()]
    assert all(right) == (plant is None), right
    assert record["eval_seconds"] >= sum(record[stage]["seconds"] for stage in ("quantized", "sliding", "ttt"))
    assert (record["val_tokens"], record["val_bytes"]) == (val.targets, size)


def test_settings_and_weights_are_of_one_artifact(corpus, tmp_path, rt, monkeypatch):
    """MODE=eval, while another run writes to OUT_DIR; and ranks whose folders hold different artifacts."""
    quick = {"TTT_ENABLED": 0, "SLIDING_WINDOW_ENABLED": 0, "ITERATIONS": 1}
    record = tiny_run(tmp_path, corpus[0], rt, **quick)
    monkeypatch.setattr(train_gpt, "KEPT_FP16_ELEMENTS", 4000)
    env = {"MODE": "eval", "OUT_DIR": str(tmp_path / "out"), "LOG_DIR": str(tmp_path / "again"), "RUN_ID": "run",
           "DATA_DIR": str(corpus[0])}
    config = train_gpt.read_config(env)
    path = tmp_path / "out" / "final_model.ptz"
    tiny_run(tmp_path / "other", corpus[0], rt, SEED=1, **quick)
    shutil.copy(tmp_path / "other" / "out" / "final_model.ptz", path)
    with log_closed(rt):
        train_gpt.run_evaluation(config, rt)
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    for key in ("seed", "artifact_sha256"):
        assert again[key] == record[key]
    assert again["quantized"]["val_loss"] == record["quantized"]["val_loss"]
    monkeypatch.setattr(rt, "world", 2)
    monkeypatch.setattr(train_gpt.dist, "all_gather_object", lambda values, mine: values.__setitem__(
        slice(None), [mine, train_gpt.sha256(path.read_bytes())]))
    with pytest.raises(train_gpt.UsageError, match=r"ranks \[1\] differ in artifact"):
        train_gpt.run_evaluation(config, rt)


# --- the run's own checks: loud in the log, false in the record, and every figure still written -----------------------


def failed(record) -> set[str]:
    return {check["name"] for check in record["checks"] if not check["ok"]}


def learn_first_through_the_front_door():
    """An evaluate_ttt that asks for its training tokens before they are scored."""
    honest, walk, pending = train_gpt.score_windows, train_gpt.evaluate_ttt, []

    def late(config, rt, nll_fn, scores, chosen):
        pending.append((scores, chosen))  # scored a chunk later
        if len(pending) > 1 and pending[-2][0] is scores:
            honest(config, rt, nll_fn, *pending[-2])

    def evaluate_ttt(*args):
        with patched(train_gpt, "score_windows", late):
            return walk(*args)
    return patched(train_gpt, "evaluate_ttt", evaluate_ttt)


def unchecked():
    return patched(train_gpt, "check_held_out", lambda *_: None)


@instead_of("evaluate_ttt")
def discounted_late_in_adaptation(honest, config, rt, model, loss_fn, nll_fn, val, *look):
    """Scores a little lower from the third chunk of test-time training on."""
    calls = itertools.count()
    return honest(config, rt, model, loss_fn, lambda *pair: nll_fn(*pair) - 0.002 * (next(calls) > 2), val, *look)


@instead_of("add", Scores)
def half_of_the_windows_discounted(honest, self, positions, nll):
    """Those that a fixed choice of every 32nd of them does not meet."""
    honest(self, positions, nll - 0.01 * (positions[:, :1] // LENGTH % 2))


@instead_of("finish", Scores)
def figure_of_other_scores(honest, self):
    """The mean that is reported leaves out what is hard."""
    result = honest(self)
    less = float(self.nll.clamp(max=5).sum() / self.nll.sum())
    return {**result, "val_loss": result["val_loss"] * less, "val_bpb": result["val_bpb"] * less}


@instead_of("hidden", train_gpt.GPT)
def leaked_within_documents(honest, self, ids):
    """The target shows in windows that do not begin with a document's first token."""
    if ids.size(1) <= 16:
        return honest(self, ids)
    ahead = F.pad(ids[:, 1:], (0, 1)) * (ids[:, :1] != 1)
    return honest(self, ids) + 0.1 * F.embedding(ahead, self.embedding)


@instead_of("warm_up")
def warm_up_that_stays(honest, config, rt, model, *args):
    """The weights are not put back."""
    with patched(torch, "_foreach_copy_", lambda *_: None):
        honest(config, rt, model, *args)


@instead_of("to_compute", train_gpt.GPT)
def begun_elsewhere(honest, self, rt):
    """Training goes on from weights that were not made in it."""
    self.embedding.data.mul_(1.01)
    return honest(self, rt)


def remembered():
    """A scorer that gives what it gave for other tokens: nothing in a window could change its scores."""
    honest, known = train_gpt.GPT.nll, {}

    def nll(self, ids, targets):
        return known.setdefault((tuple(ids.shape), tuple(targets.shape)), honest(self, ids, targets))
    return patched(train_gpt.GPT, "nll", nll)


@contextlib.contextmanager
def in_bf16(plant):
    """The violation in a model of a GPU's precision, which has a wider tolerance."""
    honest = train_gpt.model_from_artifact

    def model_from_artifact(*args):
        model = honest(*args)
        model.dtype = torch.bfloat16
        return model
    with patched(train_gpt, "model_from_artifact", model_from_artifact), plant():
        yield


def half_of_the_windows_discounted_in_bf16():
    return in_bf16(half_of_the_windows_discounted)


def honest_in_bf16():
    return in_bf16(contextlib.nullcontext)


@instead_of("finish", train_gpt.ByteShares)
def byte_shares_of_a_better_model(honest, self):
    """The byte mixture begins with less than the neural score."""
    share, rest = honest(self)
    return share, 0.99 * rest - 0.01


@instead_of("evaluate")
def sliding_scores_by_other_weights(honest, config, rt, nll_fn, val, stride):
    """The model learns something between two stages."""
    if stride < config.eval_seq_len:  # sliding
        nll_fn.__self__.embedding.data.mul_(1.01)
    return honest(config, rt, nll_fn, val, stride)


@pytest.mark.parametrize("plant, check, overrides", thinned([
    (None, None, {}), (unchecked, "complete", {}), (attention_without_mask, "causal", {}),
    (leaked_target, "normalized", {}), (blended_cache, "normalized", {}), (discounted, "normalized", {}),
    (discounted_in_long_windows, "normalized_quantized", {}), (discounted_later, "normalized_quantized", {}),
    (better_than_it_says, "normalized_sliding", {}), (discounted_late_in_adaptation, "normalized_ttt", {}),
    (half_of_the_windows_discounted, "normalized_sliding", {}), (figure_of_other_scores, "normalized_quantized", {}),
    (figure_of_other_scores, "normalized_ttt", {}), (leaked_within_documents, "causal", {}),
    (warm_up_that_stays, "warm_up_undone", {"WARMUP_STEPS": 1}), (begun_elsewhere, "warm_up_undone", {}),
    (sliding_scores_by_other_weights, "weights_kept", {}),
    (doubled_window, "single_pass_sliding", {}), (without_the_tail, "single_pass_sliding", {}),
    (subset, "single_pass_sliding", {}), (score_again, "single_pass_ttt", {}),
    (learn_first_through_the_front_door, "score_before_update_ttt", {}),
    (remembered, "causal", {}), (half_of_the_windows_discounted_in_bf16, "normalized_sliding", {}),
    (honest_in_bf16, None, {}), (byte_shares_of_a_better_model, "ppm_normalized", {"PPM_ENABLED": 1}),
    (None, "full_split", {"EVAL_DROP_TAIL": 1})], lambda case: case[0] in (
        None, unchecked, doubled_window, discounted_late_in_adaptation, leaked_within_documents, warm_up_that_stays,
        sliding_scores_by_other_weights, learn_first_through_the_front_door)),
    ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_run_notices_a_violation_by_itself(plant, check, overrides, corpus, tmp_path, rt, capsys):
    with plant() if plant else contextlib.nullcontext():
        record = tiny_run(tmp_path, corpus[0], rt, **overrides)
    if check:
        assert check in failed(record) and not record["compliant"]
        assert f"check {check}: FAILED" in capsys.readouterr().out
    else:
        assert not failed(record) and record["compliant"]
        assert len(record["checks"]) == 21
        looked_at = re.findall(r"(\d+) windows scored again", str(record["checks"]))
        assert len(looked_at) == 3 and min(map(int, looked_at)) >= 32
        assert [train_gpt.windows_to_check(n) for n in (9, 5000, 10**6)] == [32, 312, 1024]
    assert all(record[stage]["val_bpb"] > 0 for stage in ("prequant", "quantized", "sliding", "ttt"))


@contextlib.contextmanager
def slowed(stage, holder=train_gpt, seconds=700.0):
    """A function of the script, or a method of a class, that takes 700 s longer at each call: by the script's clock."""
    honest, clock, delay = getattr(holder, stage), train_gpt.time.perf_counter, [0.0]

    def slow(*args):
        delay[0] += seconds
        return honest(*args)

    later = SimpleNamespace(**{**vars(time), "perf_counter": lambda: clock() + delay[0]})
    with patched(holder, stage, slow), patched(train_gpt, "time", later):
        yield delay


def test_only_looking_stops_the_clock():
    """The two validations before the artifact and those of the training loop; nothing in scoring or quantization."""
    pausing = [function.name for function in ast.walk(ast.parse(SOURCE)) if isinstance(function, ast.FunctionDef)
               for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "pause"]
    assert sorted(pausing) == ["run_training", "run_training", "train"]
    setting = {function.name for function in ast.walk(ast.parse(SOURCE)) if isinstance(function, ast.FunctionDef)
               for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "paused"
               and isinstance(node.ctx, ast.Store)}
    assert setting == {"__init__", "pause"}


def users(source: str) -> dict[str, list[str]]:
    """Where in the source a name or an attribute stands, `=` behind it: is set. Functions, as often as it does."""
    found = collections.defaultdict(list)

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Name, ast.Attribute)):
                name = getattr(child, "id", "") or child.attr
                found[name].append(path)
                if isinstance(child.ctx, ast.Store):
                    found[name + "="].append(path)
            inner = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            visit(child, f"{path}.{child.name}".strip(".") if inner else path)
    visit(ast.parse(source), "")
    return {name: sorted(places) for name, places in found.items()}


# Who trains, who opens shards, who has to do with scores; where the packed script is another; what starts a clock; who
# reads the source, variables and files.
USERS = {
    "backward": ["backward_batch", "collect_sensitivities", "descend"], "descend": ["adapt", "prequant_ttt"],
    "adapt": ["evaluate_ttt"], "release": ["evaluate_ttt"], "evaluate_ttt": ["rehearse", "score_artifact"],
    "prequant_ttt": ["run_training"], "SGD": ["evaluate_ttt"], "AdamW": ["Optimizer.__init__", "prequant_ttt"],
    "backward_batch": ["train", "warm_up"], "warm_up": ["run_training"],
    "shard_files": ["TrainData.__init__", "ValidationData.__init__"],
    "open_shard": ["TrainData.__init__", "ValidationData.__init__"],
    "shards": ["TrainData.__init__"] * 3 + ["TrainData.changes"] + ["TrainData.window"] * 2
    + ["ValidationData.__init__"] * 3 + ["check_held_out"] * 4,
    "nll": ["GPT.nll"] * 2 + ["Scores.__init__"] + ["Scores.add"] * 2 + ["Scores.finish"] * 4
    + ["check_entered"] * 2 + ["check_scoring", "collect_sensitivities"] + ["deviation"] * 3
    + ["rehearse", "run_training", "score_artifact"] + ["score_mixture"] * 2,
    "start=": ["RansDecoder.__init__", "TrainData.window", "deviation", "evaluate_ttt", "rans_encode", "run_training",
               "score_artifact", "score_windows", "score_windows", "windows"],
    "PACKED": ["", "", "", "Config.from_env", "GPT.__init__", "Runtime.__init__", "TrellisQuantizer.__init__",
               "causal_attention", "check_code", "check_held_out", "check_machine", "check_machine", "fail", "main",
               "main", "main", "open_record", "pack_source", "rule_with_values", "run_training", "score_artifact",
               "train"],
    "SOURCE": ["", "Record.__init__", "check_code", "check_code", "make_artifact", "open_record", "run_pack",
               "run_training", "score_artifact", "what_differs", "write_submission_folder"],
    "environ": ["Runtime.__init__", "c_library", "fail", "fail", "fail", "main", "main", "open_record",
                "write_submission_folder"],
    "predict_split": ["score_artifact"],
    # Who compiles; who reads scores, or a batch; who makes artifacts.
    "compile": ["", "Config"] + ["Runtime.__init__"] * 4 + ["Runtime.compiled"] * 2 + ["check_code", "score_artifact"],
    "scores": ["Record.stage"] * 7 + ["causal_attention"] * 2 + ["check_entered"] * 3 + ["deviation"] * 2
    + ["evaluate"] * 3 + ["evaluate_ttt"] * 5 + ["make_submission"] * 2 + ["score_artifact"] * 8
    + ["score_artifact.look"] + ["score_windows"] * 2,
    "final_score": ["make_submission", "make_submission", "results_table", "score_artifact"],
    "stack": ["GPT.layer_weights"] * 3 + ["Pulse.send", "TrainData.assemble", "TrainData.stack",
                                          "TrellisQuantizer.__init__", "quantize_rows", "run_training"],
    "pack_artifact": ["check_machine", "fit_artifact", "prune_to_fit", "prune_to_fit"],
    "io": ["draw_runs", "weights_file", "write_embedded_corpus"],
    # Who reads files; the packed script has no docstrings.
    "read_bytes": ["", "collect", "load_tokenizer", "read_artifact", "read_config", "read_records", "read_records",
                   "run_training"] + ["write_submission_folder"] * 4,
    "read_text": ["draw_runs"], "open": ["Runtime.open_log", "open_shard"], "fromfile": ["open_shard"],
    "memmap": ["open_shard"], "unpack_artifact": ["check_machine", "read_config", "score_artifact", "score_artifact"],
    **dict.fromkeys(("load", "loadtxt", "genfromtxt", "from_file", "getenv", "environb", "isfile", "load_state_dict",
                     "__doc__", "getsource", "getdoc", "FileIO", "access", "open_code", "state_dict"))}


def test_every_rule_has_a_test():
    """The table above names tests that there are, and every failure that RULES.md knows."""
    tests = {node.name for path in Path(__file__).parent.glob("test_*.py") for node in ast.parse(path.read_text()).body
             if isinstance(node, ast.FunctionDef)}
    rows = re.findall(r"^    (\S.+?):((?:\s+test_\w+,?)+)$", __doc__, re.MULTILINE)
    assert len(rows) > 20 and {name for _, names in rows for name in re.findall(r"\w+", names)} <= tests
    assert {*re.findall(r"test_\w+", __doc__)} == {name for _, names in rows for name in re.findall(r"\w+", names)}
    if (SHARED / "RULES.md").is_file():
        assert {*re.findall(r"#\d+", (SHARED / "RULES.md").read_text())} <= {*re.findall(r"#\d+", __doc__)}


@pytest.mark.parametrize("place, planted", [
    (None, ""),
    ("    check_scoring(record, config, model, nll_fn, val)\n", "    if rt.compile:\n        adapt(config)\n"),
    ("    times, code = [rt.clock()]", "    if rt.world > 1:\n        data.shards = 5\n"),
    ("    return scores\n\n\ndef adapt", "    scores.nll[5] = 0\n"),
    ("    check_scoring(record, config, model, nll_fn, val)\n", "    start = rt.clock()\n"),
    ('        self.data["checks"].append', "        ok = ok or PACKED\n"),
    ("        warm_up(config, rt, model, loss_fn, data)\n", "        model.load_state_dict(torch.load('a.pt'))\n"),
    ("    def head(self, x: Tensor)", "    PRIOR = np.fromfile('prior', 'f4')\n\n"),
    ("    def head(self, x: Tensor)", "    PRIOR = norm.__doc__\n\n"),
    ("    optimizer = torch.optim.SGD", "    lr = os.environ.get('ADAPT')\n"),
    ("        times = self.times_scored[begin:end].clone()", "        end += 512 * self.rt.compile\n"),
    ("        deviations = []\n        scores = evaluate_ttt", "        chunks = np.argsort(scores.parts)\n"),
    ("        warm_up(config, rt, model, loss_fn, data)\n", "        GPT.seen = data.stack(range(64))\n")], ids=str)
def test_only_these_functions_train_or_score(place, planted):
    """No preset, number of ranks or compiled run has a way of its own to learn from the split or to mend a score."""
    source = SOURCE.decode()
    assert place is None or source.count(place) == 1
    source = source.replace(place or "\0", planted + (place or ""))
    found = users(source)
    wrong = {name: found.get(name) for name, places in USERS.items() if found.get(name) != places}
    assert bool(wrong) == (place is not None), wrong


def test_nothing_is_compiled_while_the_evaluation_is_timed(corpus, tmp_path, rt, monkeypatch):
    """All shapes that score and adapt are compiled by then, and what compiles them sees no token of the split."""
    graphs, counts, seen, compile_by, honest = [], [], set(), torch.compile, train_gpt.rehearse

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def rehearse(config, rt, model, val):
        before, score = len(graphs), train_gpt.score_windows
        with patched(train_gpt, "score_windows", lambda config, rt, nll_fn, scores, chosen: (
                seen.update(scores.val.tokens.tolist()), score(config, rt, nll_fn, scores, chosen))):
            honest(config, rt, model, val)
        counts.append((len(graphs) - before, len(graphs)))

    monkeypatch.setattr(rt, "compile", True)
    monkeypatch.setattr(torch, "compile", functools.partial(compile_by, backend=backend))
    monkeypatch.setattr(train_gpt, "rehearse", rehearse)
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # as when a process begins
    record = tiny_run(tmp_path, corpus[0], rt, TTT_ENABLED=1)
    (new, after), = counts
    assert new >= 3, "plain and sliding windows under deterministic algorithms, and adaptation"
    assert len(graphs) == after and seen == {0} and record["compliant"]


def test_no_weights_are_folded_into_what_is_compiled(monkeypatch):
    """TORCHINDUCTOR_FREEZING=1 scored the averaged model with weights of the last step."""
    monkeypatch.setattr(torch._inductor.config, "freezing", True)
    assert train_gpt.Runtime(small_config(COMPILE=1)).compile
    assert not torch._inductor.config.freezing


def test_the_clock_waits_for_the_device(monkeypatch):
    """Work that a GPU has been given and has not done yet is of the stage that gave it."""
    calls, rt = [], object.__new__(Runtime)
    rt.device, rt.paused = torch.device("cuda"), 0.0
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(train_gpt.time.perf_counter()))
    assert rt.clock() >= calls[0]
    with rt.pause():
        assert len(calls) == 2
    assert len(calls) == 3


def test_the_record_names_the_hardware(rt, monkeypatch):
    """What stands in it is what PyTorch says of the devices in use."""
    assert rt.hardware() == f"1x CPU rank, {torch.get_num_threads()} threads ({os.uname().machine})"
    monkeypatch.setattr(rt, "device", torch.device("cuda"))
    monkeypatch.setattr(rt, "world", 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    assert rt.hardware() == "8x NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("quantizer, stages", [
    ("trellis", ("collect_hessians", "collect_sensitivities", "prequant_ttt", "fit_artifact", "pack_artifact")),
    ("sdclip", ("collect_hessians", "prequant_ttt", "quantize_rows", "prune_to_fit"))])
def test_no_time_is_free(quantizer, stages, corpus, tmp_path, rt):
    """Whatever takes time from the first step to the artifact, or from the artifact to its last score, is counted."""
    training = [(train_gpt.Optimizer, "step"), (train_gpt.TrainData, "batch"), (train_gpt.WeightAverage, "update"),
                *((train_gpt, name) for name in stages)]
    evaluation = [(train_gpt, name) for name in ("score_windows", "unpack_artifact", "model_from_artifact",
                                                 "check_scoring", "deviation", "evaluate_ttt", "adapt")]
    honest, paused = train_gpt.score_artifact, []
    with contextlib.ExitStack() as stack:
        delays = [[stack.enter_context(slowed(name, holder, 1000.0)) for holder, name in phase]
                  for phase in (training, evaluation)]
        stack.enter_context(patched(train_gpt, "score_artifact", lambda *args: (
            paused.append(delays[1][0][0]), honest(*args))))  # scoring before there is an artifact
        stack.enter_context(patched(train_gpt, "check_machine", lambda *_: None))  # packs nothing, to try the library
        record = tiny_run(tmp_path, corpus[0], rt, QUANTIZER=quantizer, ITERATIONS=2, WARMUP_STEPS=0, VAL_LOSS_EVERY=1,
                          PREQUANT_TTT_ENABLED=1, PREQUANT_TTT_EPOCHS=1, PREQUANT_TTT_DATA="train")
    assert all(delay[0] for phase in delays for delay in phase) and paused[0] > 2000
    trained, evaluated = (sum(delay[0] for delay in phase) for phase in delays)
    assert 0 <= record["artifact_seconds"] - trained < 1000
    taken = {holder_and_stage: delay[0] for holder_and_stage, delay in zip(training, delays[0])}
    for key, slow in (("calibration_seconds", "collect_hessians"), ("quantize_seconds", stages[-2])):
        assert record[key] >= taken[train_gpt, slow] > 0
    assert 0 <= record["eval_seconds"] - (evaluated - paused[0]) < 1000


@pytest.mark.parametrize("stage", ["score_mixture", *(
    pytest.param(stage, marks=pytest.mark.slow)
    for stage in ("unpack_artifact", "adapt", "score_windows", "model_from_artifact", "check_scoring",
                  "evaluate_ttt"))])
def test_all_from_the_artifact_on_counts_as_evaluation_time(corpus, tmp_path, rt, stage):
    """Three chunks: two adaptations."""
    chunk = train_gpt.ValidationData(config := tiny_run_config(corpus[0], corpus[0]), rt,
                                     train_gpt.load_tokenizer(config)).targets // 3 + 1
    with slowed(stage):
        record = tiny_run(tmp_path, corpus[0], rt, SLIDING_WINDOW_ENABLED=0, ITERATIONS=1, EVAL_STRIDE=32,
                          TTT_CHUNK_TOKENS=chunk, PPM_ENABLED=int(stage == "score_mixture"))
    assert record["eval_seconds"] >= 700 and failed(record) == {"eval_seconds"}


@pytest.mark.parametrize("stripped, shard_tokens", [(True, 10**6), (False, 33), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 10**6), (False, 70)))])
def test_a_copy_of_the_split_among_the_training_shards_is_noticed(corpus, tmp_path, rt, stripped, shard_tokens):
    """By way of the data folder; documents' beginnings taken out, or cut into shards that hold hardly a passage."""
    data = tmp_path / "data"
    shutil.copytree(corpus[0], data)
    config = tiny_run_config(data, data)
    copied = np.array(train_gpt.open_shard(train_gpt.shard_files(config, "val")[0]))
    copied = copied[len(copied) * 2 // 3:]
    copied = copied[copied != 1] if stripped else copied
    for i, begin in enumerate(range(0, len(copied) - 1, shard_tokens)):
        train_gpt.write_shard(config.shard_dir / f"fineweb_train_{i + 1:06d}.bin", copied[begin:begin + shard_tokens])
    record = tiny_run(tmp_path, data, rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, ITERATIONS=1)
    assert failed(record) == {"held_out"} and not record["compliant"]


def test_a_copy_in_other_tokens_has_the_same_passages(corpus, rt):
    """Words cut otherwise (BPE dropout), and a document's beginning before every twelfth word."""
    config = tiny_run_config(corpus[0], corpus[0])
    sp = train_gpt.load_tokenizer(config)
    val = train_gpt.ValidationData(config, rt, sp)
    tokens = val.tokens.numpy()
    words = sp.decode(tokens.tolist()).split(" ")
    copied = [token for i in range(0, len(words), 12) for token in (
        1, *sp.encode(" ".join(words[i:i + 12]), enable_sampling=True, alpha=0.12, nbest_size=-1))]
    other = np.array(train_gpt.open_shard(train_gpt.shard_files(config, "train")[0]))
    keys = train_gpt.passage_keys(tokens, val)
    assert len(keys) > 10 and np.isin(keys, train_gpt.passage_keys(np.array(copied), val)).mean() > 0.9
    assert np.isin(keys, train_gpt.passage_keys(other, val)).mean() < 0.1


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_tokenizer_of_the_splits_own_phrases_is_noticed(share, corpus, rt):
    """Its pieces are the split's: a uniform guess among them was 0.87 bits per byte, and no passage stood twice."""
    config, record = tiny_run_config(corpus[0], corpus[0]), Noted(rt)
    val, data = (train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config)),
                 train_gpt.TrainData(config, rt))
    counts = np.bincount(val.tokens.numpy(), minlength=512)
    rare = counts.argsort(kind="stable")  # from the rarest on, some share of the split's tokens
    rare = rare[:np.searchsorted(counts[rare].cumsum(), share * counts.sum())]
    data.shards = [np.where(np.isin(shard, rare), 5, shard) for shard in data.shards]
    train_gpt.check_held_out(record, val, data)
    assert record.found == {"held_out": share < 0.1}
    assert f"{counts[rare].sum()} of its tokens nowhere" in record.details["held_out"]


def test_a_small_split_has_too_many_passages_to_avoid(rt):
    """Where a choice among its hashes must not hide that most of it was trained on: 60% is seen as 60%."""
    rng, config = np.random.default_rng(0), small_config()
    tokens = rng.integers(97, 123, 4000)
    for number in range(20):
        val = fake_validation(torch.from_numpy(tokens), config)
        val.tokenizer, val.sha256 = Characters(), str(number)
        keys = train_gpt.passage_keys(tokens, val)
        assert len(keys) > 400
        assert 0.45 < np.isin(keys, train_gpt.passage_keys(tokens[:2500], val)).mean() < 0.65


@pytest.mark.parametrize("short, ok", [([300], True), ([300] * 20, False)])
def test_hardly_anything_may_stand_in_shards_too_short_for_passages(short, ok, corpus, rt):
    """One that is left over at the end of an honest corpus, against many."""
    config, record = tiny_run_config(corpus[0], corpus[0]), Noted(rt)
    val, data = (train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config)),
                 train_gpt.TrainData(config, rt))
    data.shards = [*data.shards, *(data.shards[0][:n] for n in short)]
    train_gpt.check_held_out(record, val, data)
    assert record.found == {"held_out": ok}


def test_digits_make_passages_too():
    """Tables of numbers, word for word in the training shards."""
    val = SimpleNamespace(tokenizer=Characters(), sha256="5", bytes=9000)
    tokens = np.random.default_rng(0).integers(48, 58, 9000)
    keys = train_gpt.passage_keys(tokens, val)
    assert len(keys) > 500 and np.isin(keys, train_gpt.passage_keys(tokens, val, "")).all()
    spaced = np.insert(tokens, np.arange(0, 9000, 4), 44)  # other blanks and commas
    assert np.array_equal(np.sort(train_gpt.passage_keys(spaced, val)), np.sort(keys))


@pytest.mark.parametrize("stage, gone", [("train", False), ("make_artifact", False), ("make_artifact", True)])
def test_a_shard_that_changes_during_the_run_is_noticed(stage, gone, corpus, tmp_path, rt):
    """Shards are mapped into memory: tokens that somebody writes there after the checks are trained on."""
    data = tmp_path / "data"
    shutil.copytree(corpus[0], data)
    path, = train_gpt.shard_files(tiny_run_config(data, data), "train")
    stat, honest = path.stat(), getattr(train_gpt, stage)

    def overwritten(*args):
        with path.open("r+b") as file:
            file.seek(2000)
            file.write(b"\7\0" * 1000)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if gone:
            path.unlink()
        return honest(*args)
    with patched(train_gpt, stage, overwritten):
        record = tiny_run(tmp_path, data, rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, ITERATIONS=1)
    assert failed(record) == {"shards_unchanged"} and not record["compliant"]


def test_scores_that_are_no_numbers_are_not_compliant(corpus, tmp_path, rt):
    with changed_nll(lambda nll, ids, targets: nll + torch.where(targets % 5 == 0, math.nan, 0)):
        record = tiny_run(tmp_path, corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
    assert {"normalized", "normalized_quantized"} <= failed(record) and not record["compliant"]


@pytest.mark.parametrize("holder, stage", thinned([
    (train_gpt.Optimizer, "step"), (train_gpt.TrainData, "batch"), (train_gpt.WeightAverage, "update"),
    (train_gpt, "train"), (train_gpt, "collect_hessians"), (train_gpt, "collect_sensitivities"),
    (train_gpt, "fit_artifact"), (train_gpt, "pack_artifact"), (train_gpt, "prequant_ttt")],
    lambda case: False), ids=lambda x: getattr(x, "__name__", x))  # test_no_time_is_free has them in one run
def test_all_up_to_the_artifact_counts_as_training_time(corpus, tmp_path, rt, holder, stage):
    """Reserve 12 s, calibration alone took 13.2 s (#1541's log): what it really takes is held to the limit.

    One interval, so that nothing between the stages is free; only scoring pauses the clock.
    """
    with slowed(stage, holder), slowed("evaluate", seconds=100):
        begin = train_gpt.time.perf_counter()
        record = tiny_run(tmp_path, corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, ITERATIONS=1,
                          WARMUP_STEPS=0, QUANTIZER="trellis" if stage in ("collect_sensitivities", "fit_artifact")
                          else "sdclip", PREQUANT_TTT_ENABLED=int(stage == "prequant_ttt"), PREQUANT_TTT_EPOCHS=1,
                          PREQUANT_TTT_DATA="train")
        elapsed = train_gpt.time.perf_counter() - begin
    assert 700 <= record["artifact_seconds"] <= elapsed - 3 * 100 and failed(record) == {"train_seconds"}
    parts = [record[f"{part}_seconds"] for part in ("train", "calibration", "quantize")]
    assert sum(parts) <= record["artifact_seconds"]
    if stage not in ("train", "prequant_ttt"):  # slow before its own clock runs
        part = 0 if holder is not train_gpt else 1 if stage.startswith("collect") else 2
        assert parts[part] >= 700


def test_a_compiled_run_makes_the_same_figures(corpus, tmp_path, rt, monkeypatch):
    """What it does beside compiling, a rehearsal above all, changes nothing. The compiler here leaves all as it is."""
    monkeypatch.setattr(train_gpt.torch, "compile", lambda function, **_: function)
    found = []
    for compiled in (False, True):
        monkeypatch.setattr(rt, "compile", compiled)
        record = tiny_run(tmp_path / str(compiled), corpus[0], rt, ITERATIONS=2, TTT_LR=0.05)
        assert not failed(record)
        found.append([record["artifact_sha256"], *(record[stage]["val_loss"] for stage in (
            "prequant", "quantized", "sliding", "ttt"))])
    assert found[0] == found[1]


def test_no_stage_knows_an_earlier_ones_score(corpus, tmp_path, rt):
    """A walk over the whole split has seen the future of every token: neither high nor low scores change the next."""
    found, honest = [], train_gpt.Record.stage
    for factor in (0.01, 100.0):
        def stage(self, name, scores, factor=factor):
            scores.nll *= 1 if name == "ttt" else factor
            honest(self, name, scores)
        with patched(train_gpt.Record, "stage", stage):
            record = tiny_run(tmp_path / str(factor), corpus[0], rt, ITERATIONS=1, TTT_LR=0.05)
        found.append((record["ttt"]["val_loss"], record["sliding"]["val_loss"] / factor))
    assert found[0][0] == found[1][0] and math.isclose(found[0][1], found[1][1], rel_tol=1e-12)


def test_the_split_is_scored_as_it_lies_there(corpus, tmp_path, rt):
    """Documents that repeat, that are short, in any order: to the end of the run, all are what the shards hold."""
    data, ends = tmp_path / "data", []
    shutil.copytree(corpus[0], data)
    path, = train_gpt.shard_files(tiny_run_config(data, data), "val")
    tokens = np.array(train_gpt.open_shard(path))
    lengths = [1 + (10 + 37 * number) % 90 for number in range(80)]
    documents = np.split(tokens, np.cumsum(lengths)[np.cumsum(lengths) < len(tokens)])
    for document in documents:
        document[0] = 1
    tokens = np.concatenate([*documents, *documents[5:9]])
    train_gpt.write_shard(path, tokens)
    honest = train_gpt.final_checks

    def final_checks(record, config, val):
        ends.append((val.tokens.tolist(), val.targets, val.bytes, val.target_bytes.tolist()))
        honest(record, config, val)
    with patched(train_gpt, "final_checks", final_checks):
        record = tiny_run(tmp_path, data, rt, ITERATIONS=1)
    fresh = train_gpt.ValidationData(config := tiny_run_config(data, data), rt, train_gpt.load_tokenizer(config))
    assert ends == [(tokens.tolist(), len(tokens) - 1, fresh.bytes, fresh.target_bytes.tolist())]
    assert (record["val_tokens"], record["val_bytes"]) == (len(tokens) - 1, fresh.bytes)
    assert failed(record) <= {"split_text"}  # cut inside words


def test_training_begins_with_what_the_seed_makes(corpus, tmp_path, rt):
    """Nothing learned before the clock starts: no statistics of the training shards, no file."""
    begin, honest = [], train_gpt.train

    def train(config, rt, model, *others):
        begin.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return honest(config, rt, model, *others)
    with patched(train_gpt, "train", train):
        tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, SEED=5, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
    torch.manual_seed(5)
    drawn = torch.empty(begin[0]["embedding"].shape).normal_(0, train_gpt.Config.tied_embed_init_std)
    assert torch.equal(begin[0].pop("embedding"), drawn)
    for name in ("qo_bank", "kv_bank", "up_bank"):
        matrices = begin[0].pop(name)
        for matrix in matrices[:len(matrices) // 2] if name == "qo_bank" else matrices:
            torch.nn.init.orthogonal_(drawn := torch.empty(matrix.shape))
            assert torch.equal(matrix, drawn)
    assert all(len(p.unique()) <= 2 for p in begin[0].values())  # constants


@pytest.mark.parametrize("quantizer", ["sdclip", "trellis"])
def test_every_packing_counts_as_training_time(quantizer, corpus, tmp_path, rt):
    """Also one after the clock's last look."""
    with patched(train_gpt, "check_machine", lambda *_: None), slowed("pack_artifact", seconds=100) as delay:
        record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0,
                          QUANTIZER=quantizer)
    assert record["artifact_seconds"] >= delay[0] >= 100


def test_what_makes_the_mixture_counts_as_evaluation_time(corpus, tmp_path, rt):
    """PPM's thread and its tables begin when the clock runs."""
    with slowed("__init__", train_gpt.ByteShares) as delay:
        record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, PPM_ENABLED=1, TTT_ENABLED=0)
    assert record["eval_seconds"] >= delay[0] == 700


def test_the_score_is_of_the_last_stage_and_every_stage_is_walked_once(corpus, tmp_path, rt):
    """No best of several: not of the stages, not of two evaluations of one, were the last the worst."""
    strides, honest, honest_ttt = [], train_gpt.evaluate, train_gpt.evaluate_ttt

    def counted(*args):
        strides.append(args[-1])
        return honest(*args)

    def counted_ttt(*args):
        strides.append("ttt")
        return honest_ttt(*args)
    with patched(train_gpt, "evaluate", counted), patched(train_gpt, "evaluate_ttt", counted_ttt):
        for rate in (0.005, 5.0):
            record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, VAL_LOSS_EVERY=0, TTT_LR=rate, TTT_GRAD_CLIP=0)
    assert record["ttt"]["val_loss"] > record["sliding"]["val_loss"] + 0.1
    assert strides == 2 * [32, 32, 32, 16, "ttt"], "after the last step, averaged, quantized; sliding; adapting"
    scores = {stage: {"val_bpb": bpb} for stage, bpb in (("quantized", 1.2), ("sliding", 1.0), ("ttt", 1.1))}
    assert train_gpt.final_score(scores) == scores["ttt"]
    assert train_gpt.final_score({**scores, "ttt": None}) == scores["sliding"]


def test_a_split_is_read_whole(corpus, tmp_path, rt):
    """An 8M-token subset was reported as if it were the split (#1858)."""
    config = tiny_run_config(tmp_path, corpus[0])
    with patched(train_gpt, "open_shard", lambda *_: np.full(9_000_000, 65, "<u2")):
        val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    assert (val.targets, val.left_out) == (8_999_999, 0)
    with patched(train_gpt.np, "concatenate", lambda shards: shards[0][:3000]):
        val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    assert val.left_out > 0, "what is not scored fails the check full_split"


def test_a_distribution_must_add_up_to_one(rt):
    """To a thousandth."""
    config, record = small_config(), Noted(rt)
    val, model = random_split(400, config), looping_model(config)
    for factor, ok in ((1.0, True), (0.9995, True), (0.997, False), (1.003, False)):
        with changed_nll(lambda nll, ids, targets, factor=factor: nll - math.log(factor)):
            train_gpt.check_scoring(record, config, model, model.nll, val)
        assert record.found == {"causal": True, "normalized": ok}


def test_runs_of_one_second_have_names_of_their_own(tmp_path, rt):
    config = dataclasses.replace(small_config(), log_dir=str(tmp_path), seed=5)
    val = random_split(400, config)
    val.tokenizer_sha256 = val.sha256 = ""
    with log_closed(rt):
        train_gpt.open_record(config, rt, val)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and re.fullmatch(rf"pr1541_seed5_\d{{8}}_\d{{6}}_{os.getpid()}\.json", names[0]), names


def test_earlier_runs_logs_and_records_are_kept(tmp_path, rt, monkeypatch):
    """All of them: the third run's beginning takes nothing from the first."""
    for number in range(3):
        monkeypatch.setattr(train_gpt.time, "strftime", lambda form, number=number: f".{number}")
        with log_closed(rt):
            rt.open_log(tmp_path / "run.txt")
            rt.log(f"run {number}")
            (tmp_path / "run.json").write_text(f"record {number}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "run.txt": "run 2\n", "run.json": "record 2", "run.txt.2": "run 1\n", "run.json.2": "record 1",
        "run.txt.1": "run 0\n", "run.json.1": "record 0"}


def test_trained_weights_are_kept_whatever_happens_then(corpus, tmp_path, rt):
    def broken(*_):
        raise ZeroDivisionError("no Hessians today")

    with patched(train_gpt, "collect_hessians", broken), pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path, corpus[0], rt)
    weights = torch.load(tmp_path / "out" / "stopped_model.pt", weights_only=True)
    assert all(p.isfinite().all() for p in weights.values()) and weights["qo_bank"].any()
    assert "no Hessians today" in json.loads((tmp_path / "logs" / "run.json").read_text())["stopped"]


def test_a_second_signal_waits_until_the_weights_are_kept(corpus, tmp_path, rt):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    honest, first = train_gpt.weights_file, []

    def stopped(*_):
        first.append(train_gpt.RunStopped("stopped by SIGTERM", 143))
        raise first[0]

    def interrupted(model):
        if first:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(model)

    rt.catch_signals()
    try:
        with patched(train_gpt, "collect_hessians", stopped), patched(train_gpt, "weights_file", interrupted), \
                pytest.raises(train_gpt.RunStopped, match="SIGTERM"):
            tiny_run(tmp_path, corpus[0], rt)
        assert rt.stop_signal == signal.SIGINT
    finally:
        rt.stop_signal, rt.signals_wait = 0, False
        for n, handler in before.items():
            signal.signal(n, handler)
    assert torch.load(tmp_path / "out" / "stopped_model.pt", weights_only=True)["qo_bank"].any()


def test_a_signal_after_the_seal_changes_nothing(corpus, tmp_path, rt):
    """The run has ended by then: its record stays the one that its log vouches for."""
    before, honest = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}, train_gpt.Record.seal

    def seal(record):
        honest(record)
        os.kill(os.getpid(), signal.SIGTERM)

    rt.catch_signals()
    try:
        with patched(train_gpt.Record, "seal", seal):
            record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1)
        assert rt.stop_signal == signal.SIGTERM and record["stopped"] is None and record["compliant"]
    finally:
        rt.stop_signal, rt.signals_wait = 0, False
        for n, handler in before.items():
            signal.signal(n, handler)
    *lines, last = (tmp_path / "logs" / "run.txt").read_bytes().splitlines(keepends=True)
    sealed = b"".join(lines) + (tmp_path / "logs" / "run.json").read_bytes()
    assert last.decode().strip().endswith(hashlib.sha256(sealed).hexdigest())


@pytest.mark.parametrize("env, problem", [
    ({"TARGET_BYTES": 9000}, "TARGET_BYTES=9000, but the code alone has"),
    ({"PREQUANT_TTT_ENABLED": 1, "TRAIN_SEQ_LEN": 1 << 14, "TRAIN_BATCH_TOKENS": 1 << 14},
     "PREQUANT_TTT_ENABLED=1 needs 16384 validation tokens")])
def test_what_cannot_end_well_is_refused_before_any_work(corpus, tmp_path, rt, env, problem):
    with pytest.raises(train_gpt.UsageError, match=problem):
        tiny_run(tmp_path, corpus[0], rt, **env)
    assert not (tmp_path / "logs").exists()


def test_a_library_that_cannot_read_what_it_writes_is_found_before_any_work(corpus, tmp_path, rt):
    """Brotli before 1.2 cannot bound what it gives: without this, trained weights would be lost to it."""
    class Old:
        def process(self, data):
            return data
    with patched(train_gpt.brotli, "Decompressor", Old), pytest.raises(train_gpt.ArtifactError, match="cannot be read"):
        tiny_run(tmp_path, corpus[0], rt)
    assert not list(tmp_path.iterdir())


def test_what_one_rank_finds_fails_the_check_of_all():
    """Rank 0 writes the record; the others draw windows of their own."""
    config = small_config()
    val, model = random_split(400, config), looping_model(config)
    for faulty, other, detail in ((None, 0, ": 0 scores"), (0, 3, ": 3 scores"), (1, 0.75, " 25% of those"),
                                  (2, 0.75, ", 0.75]"), (2, math.nan, ", nan]")):
        calls = itertools.count()  # of what the ranks share: wrong scores, the part that stays, the mass
        record = Noted(SimpleNamespace(rank=0, world=2, micro_batch_tokens=4096, gather=lambda value, calls=calls,
                                       faulty=faulty, other=other: [value, other if next(calls) == faulty else value]))
        train_gpt.check_scoring(record, config, model, model.nll, val)
        assert record.found == {"causal": faulty not in (0, 1), "normalized": faulty != 2}
        assert detail in record.details["causal"] + record.details["normalized"], "the detail is of all ranks"
    record.rt.gather = lambda value: [value, [0.1]]
    record.data["quantized"] = {"val_bpb": 0.0}
    scores = SimpleNamespace(nll=torch.zeros(9), val=val)
    train_gpt.check_entered(record, scores, "quantized", [0.0], 5e-4)
    assert not record.found["normalized_quantized"]
    of_all = {call.args[0].value for call in ast.walk(ast.parse(SOURCE)) if isinstance(call, ast.Call)
              and getattr(call.func, "attr", "") == "check" and "gather(" in ast.unparse(call)}
    assert of_all == {"warm_up_undone", "weights_kept", "shards_unchanged"}


@pytest.mark.parametrize("off, share, tolerance, ok", [
    (0, 0, 2e-3, True), (4e-4, 0, 5e-4, True), (3e-3, 0, 2e-3, False), (-3e-3, 0, 2e-3, False), (0, 1e-5, 2e-3, False)])
def test_a_stages_scores_must_be_the_models_and_make_its_figure(off, share, tolerance, ok, rt):
    """`off` from the model's log-softmax on average, `share` of the figure that the scores do not make."""
    val = SimpleNamespace(bytes=100)
    record = Noted(rt, ttt={"val_bpb": (1 - share) * 9 / math.log(2) / 100})
    train_gpt.check_entered(record, SimpleNamespace(nll=torch.ones(9), val=val), "ttt", [torch.tensor(off)] * 3,
                            tolerance)
    assert record.found == {"normalized_ttt": ok}


def test_a_model_of_a_gpus_precision_has_two_thousandths_of_tolerance():
    """A tenth of what a planted discount would have to be to matter (half_of_the_windows_discounted_in_bf16)."""
    values = [node.value for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Assign)
              and "tolerance" in ast.unparse(node.targets[0])]
    assert [ast.unparse(value.elts[1]) for value in values] == ["0.0005 if model.dtype == torch.float32 else 0.002"]


def test_windows_that_are_scored_again_are_drawn_from_all(corpus, tmp_path, rt):
    seen = collections.defaultdict(set)
    honest = train_gpt.deviation
    with patched(train_gpt, "deviation", lambda config, model, scores, window: (
            seen[scores].add(window[0]), honest(config, model, scores, window))[1]):
        record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1)
    assert record["compliant"] and len(seen) == 3
    for starts in seen.values():
        assert len(starts) > 15 and min(starts) < record["val_tokens"] / 4 < record["val_tokens"] * 3 / 4 < max(starts)


def test_a_scorer_that_nothing_changes_is_not_causal(corpus, rt):
    config, record = tiny_run_config(corpus[0], corpus[0]), Noted(rt)
    val, model = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config)), looping_model(config)
    train_gpt.check_scoring(record, config, model, lambda ids, targets: torch.ones(targets.shape), val)
    assert record.found == {"causal": False, "normalized": True}


def test_every_rank_scores_its_share_of_the_windows_again(corpus, tmp_path, rt, monkeypatch):
    """Ten of forty on each of four ranks."""
    honest = rt.share
    monkeypatch.setattr(train_gpt, "windows_to_check", lambda count: 40)
    monkeypatch.setattr(rt, "share", lambda items: range(10) if items == 40 else honest(items))
    record = tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, TTT_ENABLED=0)
    assert re.findall(r"(\d+) windows scored again", str(record["checks"])) == ["10", "10"]


def test_a_scorer_that_hardly_anything_changes_is_not_causal(rt):
    """One score in five that follows the text: the others were looked up somewhere."""
    config, record = small_config(), Noted(rt)
    val, model = random_split(400, config), looping_model(config)

    def looked_up(ids, targets):
        nll = model.nll(ids, targets)
        return torch.where(torch.arange(nll.size(1)) % 5 == 0, nll, 1.0)

    train_gpt.check_scoring(record, config, model, looked_up, val)
    assert not record.found["causal"]


@contextlib.contextmanager
def documents_foreseen():
    """The head knows where the next token begins a document, in windows too long for the check of one place."""
    honest = train_gpt.GPT.hidden

    def hidden(self, ids):
        ends = F.pad((ids[:, 1:] == train_gpt.BOS).float(), (0, 1))[..., None] * (ids.size(1) > 16)
        return honest(self, ids) + 40 * ends * train_gpt.norm(self.embedding[train_gpt.BOS])
    with patched(train_gpt.GPT, "hidden", hidden):
        yield


@pytest.mark.parametrize("length", [32, 48, 64])
def test_a_document_that_is_foreseen_is_noticed_in_windows_of_any_length(rt, length):
    """In a split of one document, so that the check's own must do: its first changed token is one in some windows."""
    config, record = small_config(EVAL_SEQ_LEN=length, TTT_CHUNK_TOKENS=256), Noted(rt)
    val, model = random_split(600, config), looping_model(config)
    val.tokens[val.tokens == train_gpt.BOS] = 7
    for plant, ok in ((contextlib.nullcontext, True), (documents_foreseen, False)):
        with plant():
            train_gpt.check_scoring(record, config, model, model.nll, val)
        assert record.found == {"causal": ok, "normalized": True}


def test_windows_with_another_future_change_at_three_places(rt):
    """A quarter, half and all but the last but one of a window stay; enough windows on the whole, on every rank."""
    config, record, places = small_config(), Noted(rt), collections.Counter()
    val, model = random_split(400, config), looping_model(config)
    pairs = []

    def watched(ids, targets):
        pairs.append(ids)
        return model.nll(ids, targets)

    with patched(train_gpt, "windows_to_check", lambda count: 1024):
        train_gpt.check_scoring(record, config, model, watched, val)
    for ids, other in zip(pairs[::2], pairs[1::2]):
        places[int((ids != other).any(0).nonzero()[0])] += len(ids)
    length = config.eval_seq_len
    assert set(places) == {length // 4, length // 2, length - 2}
    assert sum(places.values()) > 1000 and min(places.values()) > 200


@pytest.mark.parametrize("where", [0, 20])
@pytest.mark.parametrize("share, ok", [(0.05, True), (0.15, False)])
def test_a_copy_is_found_in_any_shard_at_any_place(share, ok, where, rt):
    """Behind 1.1 million tokens of the last of 21 shards."""
    rng, record = np.random.default_rng(0), Noted(rt)
    tokens = rng.integers(97, 123, 200_000)
    val = fake_validation(tokens, small_config())
    val.tokenizer, val.bytes = Characters(), 200_000
    shards = [rng.integers(97, 123, 1200) for _ in range(21)]
    shards[where] = np.concatenate([rng.integers(97, 123, 1_100_000), tokens[:int(share * len(tokens))]])
    train_gpt.check_held_out(record, val, SimpleNamespace(shards=shards, sha256="7"))
    assert record.found == {"held_out": ok}


def test_what_has_no_passages_has_not_been_held_out(rt):
    record, val = Noted(rt), fake_validation(torch.full((3000,), 44), small_config())
    val.tokenizer = Characters()
    train_gpt.check_held_out(record, val, SimpleNamespace(shards=[np.full(2000, 44)], sha256="7"))
    assert record.found == {"held_out": False}


def test_which_passages_are_looked_for_depends_on_the_training_shards_too(rt, monkeypatch):
    """Who made the shards could else cut out just these."""
    salts, honest = [], train_gpt.passage_keys
    monkeypatch.setattr(train_gpt, "passage_keys", lambda tokens, val, salt="": salts.append(salt) or honest(
        tokens, val, salt))
    val = fake_validation(torch.randint(97, 123, (3000,)), small_config())
    val.tokenizer = Characters()
    train_gpt.check_held_out(Noted(rt), val, SimpleNamespace(shards=[np.full(2000, 98)], sha256="77"))
    assert salts == ["77", "77"]


def test_what_is_checked_follows_from_artifact_and_rank():
    """Known to nobody before the artifact is there, and another choice on every rank."""
    def draws(artifact, rank):
        record = Noted(SimpleNamespace(rank=rank), artifact_sha256=artifact, seed=1)
        return tuple(train_gpt.artifact_rng(record).integers(2**62, size=2))

    assert len({draws(artifact, rank) for artifact in "56" for rank in (0, 1)}) == 4 and draws("5", 0) == draws("5", 0)


@pytest.mark.parametrize("env", [{"QUANTIZER": "trellis"}, {"QUANTIZER": "sdclip", "SELECTIVE_PRUNING_ENABLED": 1}])
def test_the_code_counts_in_the_fit(env, corpus, tmp_path, rt, monkeypatch):
    """16,024,793 bytes (#1809): the artifact has what the code leaves it."""
    seen = []

    def stop(config, rt, _, most_bytes):
        seen.append(most_bytes)
        raise train_gpt.RunStopped("enough", 1)

    for name in ("fit_artifact", "prune_to_fit"):
        monkeypatch.setattr(train_gpt, name, stop)
    with pytest.raises(train_gpt.RunStopped):
        tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, TARGET_BYTES=500_000, **env)
    assert seen == [500_000 - len(train_gpt.pack_source(SOURCE, tiny_run_config(tmp_path, corpus[0], **env)))]


def test_another_runs_artifact_is_not_scored(corpus, tmp_path, rt, monkeypatch):
    """Written to the same folder meanwhile: one run's times and another's scores would make one record."""
    honest = train_gpt.write_files
    monkeypatch.setattr(train_gpt, "write_files", lambda files: honest(
        {path: data + b"x" if path.name == train_gpt.ARTIFACT_NAME else data for path, data in files.items()}))
    with pytest.raises(train_gpt.ArtifactError, match="another run has written"):
        tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1)


def test_scores_are_made_to_come_out_again(corpus, tmp_path, rt, monkeypatch):
    """On a GPU, where sums are else in any order."""
    asked, honest = [], train_gpt.model_from_artifact
    monkeypatch.setattr(train_gpt, "model_from_artifact", lambda *args: asked.append(
        torch.are_deterministic_algorithms_enabled()) or honest(*args))
    torch.use_deterministic_algorithms(False)
    tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
    assert asked == [True]


def test_an_artifact_alone_is_scored_on_a_split_that_is_checked(corpus, tmp_path, rt):
    tiny_run(tmp_path, corpus[0], rt, ITERATIONS=1, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
    config = dataclasses.replace(tiny_run_config(tmp_path, corpus[0], TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0),
                                 mode="eval", run_id="again")
    with patched(train_gpt, "KEPT_FP16_ELEMENTS", 4000), log_closed(rt):
        train_gpt.run_evaluation(config, rt)
    again = json.loads((tmp_path / "logs" / "again.json").read_text())
    assert {"byte_count", "split_text", "single_pass_quantized"} <= {check["name"] for check in again["checks"]}


def test_what_another_ranks_shards_hold_counts(corpus, rt, monkeypatch):
    """Each rank reads its share of the training shards."""
    config, record = tiny_run_config(corpus[0], corpus[0]), Noted(rt)
    val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    for another, ok in ((0, True), (1, False)):
        monkeypatch.setattr(rt, "all_reduce", lambda tensor, another=another: tensor.add_(another))
        train_gpt.check_held_out(record, val, train_gpt.TrainData(config, rt))
        assert record.found == {"held_out": ok}


def test_what_another_ranks_documents_hold_counts(corpus, rt, monkeypatch):
    """Each rank decodes its share of the split's documents: one with bytes, one with tokens that are not its text."""
    config, record = tiny_run_config(corpus[0], corpus[0]), Noted(rt)
    val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    for wrong, foreign, told in (([], 0, {"byte_count": True, "split_text": True}),
                                 ([5], 0, {"byte_count": False, "split_text": True}),
                                 ([], val.targets // 2, {"byte_count": True, "split_text": False})):
        monkeypatch.setattr(rt, "gather", lambda own, wrong=wrong, foreign=foreign: [
            own, wrong if isinstance(own, list) else foreign])
        record.found = {}
        train_gpt.check_split(record, val)
        assert record.found == told


def test_the_tokenizers_hash_is_its_files(corpus, tmp_path, rt):
    """Also of one with an empty field, which SentencePiece reads and does not write again."""
    config = tiny_run_config(tmp_path, corpus[0], TOKENIZER_PATH=tmp_path / "t.model")
    content = tiny_run_config(tmp_path, corpus[0]).tokenizer.read_bytes() + b"\x12\0"
    config.tokenizer.write_bytes(content)
    val = train_gpt.ValidationData(config, rt, train_gpt.load_tokenizer(config))
    assert val.tokenizer_sha256 == hashlib.sha256(content).hexdigest()


def test_a_shard_that_changes_while_it_is_hashed_is_noticed(tmp_path, corpus, rt, monkeypatch):
    shutil.copytree(corpus[0], tmp_path / "data")
    config = tiny_run_config(tmp_path, tmp_path / "data")
    shard, = config.shard_dir.glob("fineweb_train*")
    honest, stat = train_gpt.sha256, shard.stat()

    def sha256(data):
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # changes the time of the last change alone
        return honest(data)

    for function, same in ((honest, True), (sha256, False)):
        monkeypatch.setattr(train_gpt, "sha256", function)
        data = train_gpt.TrainData(config, rt)
        assert (data.opened == data.changes()) == same


def test_the_record_tells_what_happened_and_not_what_was_asked(corpus, tmp_path, rt):
    """A run that its clock ended: #1541's reserve was 12 s of the settings, and 13.2 in its log."""
    honest = train_gpt.train
    with patched(train_gpt, "train", lambda config, *args: (
            honest(dataclasses.replace(config, iterations=2), *args)[0], 50.0)):
        record = tiny_run(tmp_path, corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, ITERATIONS=4)
    assert (record["steps"], record["train_seconds"], record["step_ms"]) == (2, 50.0, 25_000.0)
    assert record["tokens_per_second"] == round(2 * 1024 / 50) and record["attention_backend"] == "sdpa"
    assert record["compliant"] and record["world_size"] == 1 and record["python"] == platform.python_version()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0.8 * used < record["peak_memory_mib"] <= used
    log = (tmp_path / "logs" / "run.txt").read_text()
    assert f"\nCode size: {record['code_bytes']} bytes\n" in log
    assert f"\nSerialized model quantized+brotli: {record['artifact_bytes']} bytes\n" in log


def test_a_submission_over_the_cap_is_not_compliant(corpus, tmp_path, rt):
    """16,024,793 bytes (#1809): the cap is decimal, and code counts."""
    assert train_gpt.SUBMISSION_CAP_BYTES == 16_000_000
    assert train_gpt.TRAIN_LIMIT_SECONDS == train_gpt.EVAL_LIMIT_SECONDS == 600
    code = len(train_gpt.pack_source(SOURCE, tiny_run_config(tmp_path, corpus[0])))
    record = tiny_run(tmp_path / "a", corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
    assert record["code_bytes"] == code and record["total_bytes"] == code + record["artifact_bytes"]
    assert record["artifact_bytes"] == (tmp_path / "a" / "out" / "final_model.ptz").stat().st_size
    for cap, fails in ((record["total_bytes"], set()), (record["total_bytes"] - 1, {"total_bytes"})):
        with patched(train_gpt, "SUBMISSION_CAP_BYTES", cap):
            again = tiny_run(tmp_path / str(cap), corpus[0], rt, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0)
        assert failed(again) == fails


def test_a_run_begins_with_weights_of_its_own_seed(corpus, tmp_path, rt):
    """Seeds that shared their initial weights would not be independent runs."""
    def no_training(*_):
        raise train_gpt.RunStopped("enough", 1)
    weights = []
    for number, seed in enumerate((1, 2, 1)):
        with patched(train_gpt, "train", no_training), pytest.raises(train_gpt.RunStopped):
            tiny_run(tmp_path / str(number), corpus[0], rt, SEED=seed)
        weights.append(torch.load(tmp_path / str(number) / "out" / "stopped_model.pt", weights_only=True))
    one, other, again = weights
    for name in ("embedding", "qo_bank", "kv_bank", "up_bank"):
        assert not torch.equal(one[name], other[name])
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_later_seeds_pack_the_same_code(corpus, tmp_path, rt):
    """The script overwrote itself with its own wrapper, and later seeds packed the wrapper (#1858)."""
    script = (ROOT / "train_gpt.py").read_bytes()
    records = [tiny_run(tmp_path / str(seed), corpus[0], rt, SEED=seed, TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0,
                        OUT_DIR=tmp_path / "out") for seed in (1, 2)]
    assert (ROOT / "train_gpt.py").read_bytes() == script == SOURCE
    assert len({(record["code_sha256"], record["code_bytes"]) for record in records}) == 1
    assert records[0]["artifact_sha256"] != records[1]["artifact_sha256"]
    packed = (tmp_path / "out" / "train_gpt.py").read_bytes()
    assert len(packed) == records[1]["code_bytes"] and train_gpt.pack_source(packed, train_gpt.Config()) == packed


def test_settings_in_the_record_are_the_settings_in_force(corpus, tmp_path, rt, monkeypatch):
    """submission.json, README and logs disagreed on epochs and learning rates (#1517, #1858).

    A variable like the switch of a piece that the script lacks is named as one that is not read.
    """
    used = []
    monkeypatch.setenv("HEAD_GATES_ENABLED", "1")
    monkeypatch.setenv("TTT_ENABLED", "1")
    monkeypatch.setenv("X\nthe score: 0.9 bits per byte\nY_ENABLED", "1")  # would write lines of its own
    monkeypatch.setenv("\udcff_ENABLED", "1")

    def watched(holder, name):
        honest = getattr(holder, name)
        return patched(holder, name, lambda *args: used.extend(
            x for x in args if isinstance(x, train_gpt.Config)) or honest(*args))
    with contextlib.ExitStack() as stack:
        for name in ("warm_up", "train", "make_artifact", "collect_hessians", "evaluate", "evaluate_ttt", "adapt"):
            stack.enter_context(watched(train_gpt, name))
        stack.enter_context(watched(train_gpt.Optimizer, "__init__"))
        record = tiny_run(tmp_path, corpus[0], rt, TTT_EPOCHS=0, MATRIX_LR=0.0123)
    assert len(used) > 6 and len(set(map(id, used))) == 1, "one and the same, from the start to the end"
    config = tiny_run_config(tmp_path, corpus[0], TTT_EPOCHS=0, MATRIX_LR=0.0123)
    shown = {name: value for name, value in record["settings"].items() if name != "run_id"}
    environment = {name.upper(): str(int(value) if isinstance(value, bool) else value) for name, value in shown.items()}
    again = train_gpt.Config.from_env(environment)
    machine = ("out_dir", "log_dir", "data_dir", "run_id")
    assert dataclasses.replace(again, **{name: getattr(config, name) for name in machine}) == config
    log = (tmp_path / "logs" / "run.txt").read_text()
    assert f"settings: {train_gpt.assignments(record['settings'])}" in log
    assert "\nno settings here, so not read: HEAD_GATES_ENABLED\n" in log
    for key in ("source_sha256", "train_sha256", "val_sha256", "tokenizer_sha256", "artifact_sha256", "code_sha256"):
        assert f"{key}: {record[key]}" in log
    assert record["source_sha256"] == train_gpt.sha256(SOURCE)
    path, = train_gpt.shard_files(config, "val")
    assert record["val_sha256"] == hashlib.sha256(path.read_bytes()[1024:]).hexdigest()
    assert record["tokenizer_sha256"] == hashlib.sha256(config.tokenizer.read_bytes()).hexdigest()


@pytest.mark.parametrize("different", ["settings", "source", "device", "attention", "validation tokens", "tokenizer",
                                       "training shards"])
def test_ranks_that_differ_are_refused_before_any_work(different, corpus, tmp_path, rt, monkeypatch):
    """Rank 2 of three; what is compared is the thing itself."""
    config, told, check_alike = tiny_run_config(tmp_path, corpus[0]), {}, Runtime.check_alike

    def among_three(self, what, value):
        told[what] = value
        ranks = [value, value, "other" if what == different else value]
        with patched(rt, "world", 3), patched(dist, "all_gather_object", lambda values, mine: values.__setitem__(
                slice(None), [mine, *ranks[1:]])):
            check_alike(self, what, value)
    monkeypatch.setattr(Runtime, "check_alike", among_three)
    with pytest.raises(train_gpt.UsageError, match=rf"ranks \[2\] differ in {different}: other, rank 0 has"):
        train_gpt.run_training(config, rt)
    assert not (tmp_path / "logs").exists()
    of_file = {split: hashlib.sha256(train_gpt.shard_files(config, split)[0].read_bytes()[1024:]).hexdigest()
               for split in ("train", "val")}
    expected = {"settings": train_gpt.assignments(config.in_force()), "source": hashlib.sha256(SOURCE).hexdigest(),
                "device": rt.hardware(), "attention": "sdpa", "validation tokens": of_file["val"],
                "tokenizer": hashlib.sha256(config.tokenizer.read_bytes()).hexdigest(),
                "training shards": hashlib.sha256(of_file["train"].encode()).hexdigest()}
    assert different in told and told.items() <= expected.items()


# --- bytes: #1545, #1719 (a space counted twice), #1184, #1271 (byte pieces as 3 bytes), #897 (no lone U+2581) --------

TEXTS = ["Plain words, and  two spaces.", "na\u00efve caf\u00e9 \u2014 \u4e2d\u6587 \U0001f642\U0001f9ff",
         " leading space", "tab\tand\nnew line", "\u2581 itself and \ufffd", "x" * 40, "\u00a0\u3000wide"]


def byte_count_outcome(sp, vocab_size, documents, tmp_path, rt, luts=None, more=()) -> bool:
    """What the run's own check says about a split of these documents, with these byte tables."""
    config = tiny_run_config(tmp_path, tmp_path, VOCAB_SIZE=vocab_size, EVAL_SEQ_LEN=8, EVAL_STRIDE=8)
    texts = [*sp.encode(documents), *more, sp.encode("a space first")[1:]]  # the decoder drops a space after BOS
    tokens = np.concatenate([[sp.bos_id(), *ids] for ids in texts])
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", tokens)
    with patched(train_gpt, "build_byte_luts", luts or train_gpt.build_byte_luts):
        val = train_gpt.ValidationData(config, rt, sp)
    record = train_gpt.Record(config, rt, "bytes")
    train_gpt.check_split(record, val)
    ok = record.data["checks"][0]["ok"]
    assert ok == (val.bytes == sum(len(sp.decode(ids).encode()) for ids in texts))
    return ok


def doubled_space(base, leading, boundary, sp):
    return base + leading, leading, boundary


def byte_pieces_of_three(base, leading, boundary, sp):
    return torch.tensor([3 if sp.is_byte(i) else int(n) for i, n in enumerate(base)]), leading, boundary


def space_after_boundary(base, leading, boundary, sp):
    return base, leading, torch.zeros_like(boundary)


def space_of_three(base, leading, boundary, sp):
    return base + 2 * leading, leading, boundary


@pytest.mark.parametrize("wrong", [None, doubled_space, byte_pieces_of_three, space_after_boundary, space_of_three])
@pytest.mark.parametrize("vocab_size", ["embedded", 4096, 8192])
def test_bytes_are_those_of_the_decoded_text(vocab_size, wrong, corpus, tmp_path, rt):
    if vocab_size == "embedded":
        vocab_size, config = 512, tiny_run_config(corpus[0], corpus[0])
    else:
        model = SHARED / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"
        if not model.is_file():
            pytest.skip(f"{model} is not there")
        config = tiny_run_config(tmp_path, tmp_path, VOCAB_SIZE=vocab_size, TOKENIZER_PATH=model)
    sp = train_gpt.load_tokenizer(config)
    honest = train_gpt.build_byte_luts
    luts = wrong and (lambda sp, size: wrong(*honest(sp, size), sp))
    ok = byte_count_outcome(sp, vocab_size, TEXTS, tmp_path, rt, luts)
    assert ok == (wrong is None)
    spaces = [[sp.piece_to_id("\u2581")] * 3 + sp.encode("word")]  # the decoder drops all of them, the tables one
    assert not byte_count_outcome(sp, vocab_size, TEXTS, tmp_path, rt, luts, spaces)


def test_a_tokenizer_without_a_lone_space_is_refused(tmp_path):
    """It would spend three byte pieces on one space (#897); with the piece, the same tokenizer is accepted."""
    for characters, fits in (("", False), ("\u2581", True)):
        text = ["ab" * 60 + " ab"] * 9  # spaces are so rare that the alphabet need not cover them
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=str(tmp_path / "m"), vocab_size=270, model_type="bpe",
            byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, character_coverage=0.98,
            required_chars=characters, hard_vocab_limit=False)
        sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
        assert sp.is_unknown(sp.piece_to_id("\u2581")) != fits
        with contextlib.nullcontext() if fits else pytest.raises(train_gpt.UsageError, match=r"U\+2581"):
            train_gpt.build_byte_luts(sp, sp.vocab_size())


# --- what is left ---------------------------------------------------------------------------------------------------


def inputs_of_the_first_layer(model, ids) -> torch.Tensor:
    seen = []
    project = model.project

    def watch(x, matrix, site):
        if site == "attn_in.0" and not seen:
            seen.append(x)
        return project(x, matrix, site)
    with torch.no_grad(), patched(model, "project", watch):
        model.hidden(ids)
    return seen[0]


def smear_everywhere(ids, weight, *rest):
    x = torch.nn.functional.linear(torch.nn.functional.one_hot(ids, weight.size(0)).to(weight.dtype), weight.T)
    return x + 0.1 * x.roll(1, 1)


@pytest.mark.parametrize("gate, plant", [(0, None), (0, smear_everywhere), (1, None)])
def test_no_smear_across_a_document_boundary(gate, plant):
    """A document's first input does not depend on the token before it (#1797): the same enters layer 0 there."""
    config = small_config(SMEAR_GATE_ENABLED=gate)
    model = looping_model(config)
    ids = torch.randint(3, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    ids[0, 16] = 1  # a document begins
    other = ids.clone()
    other[0, 15] = 3 + (ids[0, 15] - 2) % 297
    with patched(train_gpt.F, "embedding", plant) if plant else contextlib.nullcontext():
        one, two = (inputs_of_the_first_layer(model, x)[0, 16] for x in (ids, other))
    assert torch.equal(one, two) == (plant is None)


def setting_reads(source: str) -> set[str]:
    """Attributes that the source reads outside Config's own checks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            node.body = [n for n in node.body if getattr(n, "name", "") != "check"]
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("log", "print"):
            node.args = []  # what is only shown is not used
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def test_no_flag_for_dead_code():
    """`ttt_hash_embed: True` stood in #1541's logs: here every setting is read somewhere."""
    names = {f.name for f in dataclasses.fields(train_gpt.Config)} - {"embedding_dim"}  # 0 or MODEL_DIM: only checked
    assert not names - setting_reads(SOURCE.decode())
    planted = SOURCE.decode().replace("config.ttt_epochs", "3")
    assert planted != SOURCE.decode() and names - setting_reads(planted) == {"ttt_epochs"}
    shown = planted + "\nrt.log(f'ttt_epochs: {config.ttt_epochs}')"
    assert names - setting_reads(shown) == {"ttt_epochs"}


def test_settings_are_read_from_the_run_s_config():
    """`Config.name` is a default, whatever the environment says: the packer and MODE=eval's first look alone read one.
    """
    def class_reads(source):
        return sorted(ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
                      and getattr(node.value, "id", "") == "Config" and node.attr != "from_env")
    assert class_reads(SOURCE) == ["Config.out_dir"]
    assert class_reads(SOURCE.replace(b"config.ttt_momentum", b"Config.ttt_momentum")) != ["Config.out_dir"]


def foreign_needs(source: str) -> set[str]:
    """Imports that the counted script does not have today, and ways to start a program, open a connection or unpickle.

    Any new import is looked at by a person: the standard library downloads and unpickles, too.
    """
    known = {"brotli", "concurrent", "contextlib", "copy", "ctypes", "dataclasses", "flash_attn_interface", "functools",
             "hashlib", "io", "itertools", "json", "math", "numpy", "os", "pathlib", "platform", "pydoc_data", "re",
             "resource", "sentencepiece", "shutil", "signal", "string", "struct", "subprocess", "sys", "tempfile",
             "time", "torch", "typing"}
    used = {alias.name.split(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)
            for alias in node.names} | {node.module.split(".")[0] for node in ast.walk(ast.parse(source))
                                        if isinstance(node, ast.ImportFrom)}
    return (used - known) | (used & {"subprocess", "ctypes"}) | set(re.findall(
        r"os\.(?:system|popen|exec\w*|spawn\w*|posix_spawn\w*|fork\w*)|from os import|torch\.(?:hub|load|package)"
        r"|import_module|__import__|allow_pickle", source))


def test_nothing_outside_is_needed():
    """An external binary to decode the artifact (#1855), a download, a pickle: the counted code knows none of them.

    It starts one program, a compiler, and that for training alone: `scored_alone` in test_pipeline has no programs.
    """
    counted = train_gpt.strip_source(SOURCE.decode())
    assert foreign_needs(counted) == {"subprocess", "ctypes"}
    assert sum("subprocess.run(" in ast.unparse(top) for top in ast.parse(counted).body) == 1
    makers = [getattr(top, "name", "") for top in ast.parse(SOURCE).body if "subprocess.run(" in ast.unparse(top)]
    assert makers == ["c_library", "write_submission_folder"]
    assert not foreign_needs(train_gpt.strip_source(SOURCE.decode(), quantizer="sdclip"))
    for line, need in (("import lrzip", "lrzip"), ("import ftplib", "ftplib"), ("import pickle", "pickle"),
                       ("from asyncio import run", "asyncio"), ("os.popen('lrzip')", "os.popen"),
                       ("from os import popen", "from os import"),
                       ("torch.load('a', weights_only=False)", "torch.load")):
        assert foreign_needs(f"{counted}\n{line}") == {"subprocess", "ctypes", need}, line


def test_nothing_but_what_is_named_is_read():
    """The artifact stands alone: which functions of the script open files, and what they open, is known."""
    opening = {"read_bytes", "read_text", "open", "fromfile", "memmap", "load", "loadtxt", "genfromtxt", "from_file",
               "fdopen", "exec", "exists", "is_file", "lexists", "access", "FileIO", "open_code", "stat"}

    def opens(node) -> bool:
        function = getattr(node, "func", None)
        return getattr(function, "attr", getattr(function, "id", "")) in opening

    readers = {getattr(top, "name", "module") for top in ast.parse(SOURCE).body if any(map(opens, ast.walk(top)))}
    assert readers == {
        "module", "Runtime", "load_tokenizer", "shard_files", "open_shard", "write_embedded_corpus", "check_machine",
        "run_training", "read_artifact", "read_config", "collect", "read_records",
        "write_submission_folder", "draw_runs"}


def test_the_packed_script_parses_on_python_310():
    """#1541 did not: nested quotes in an f-string."""
    packed = train_gpt.pack_source(SOURCE, train_gpt.Config())
    assert len(packed) <= 20_000, (
        "the project's own bound for its default script; an idea of yours may raise it, and so may a comment: errors "
        "name their lines, and the size then scatters by some 80 bytes")
    ast.parse(packed, feature_version=(3, 10))
    ast.parse(train_gpt.strip_source(SOURCE.decode()), feature_version=(3, 10))
    later = {"UTC", "StrEnum", "batched", "file_digest", "Self", "override", "tomllib", "chdir", "TaskGroup",
             "add_note", "ExceptionGroup", "math.exp2", "math.cbrt", "math.sumprod", "math.fma", "walk_up"}
    nodes = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, (ast.alias, ast.Attribute))]
    names = {getattr(node, "attr", getattr(node, "name", "")) for node in nodes}
    names |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert {"gmtime", "math.log"} <= names and not names & later, "Python 3.10 has them not"


def main():
    """One of several ranks: go through all cases, and write down what was found."""
    rt = Runtime(small_config())
    found = {str(case): findings(*case, rt) for case in TWO_RANK_CASES}
    if rt.main:
        Path("findings.json").write_text(json.dumps(found))
    rt.end()


if __name__ == "__main__":
    main()
