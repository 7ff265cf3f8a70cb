"""Parameter Golf in one file: train a 36M-parameter GPT, quantize it, pack it, score it.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                  the contest's run (PR #1541)
    PRESET=smoke torchrun --standalone --nproc_per_node=1 train_gpt.py     every stage on a laptop
    MODE=help python train_gpt.py                                          every setting, with its meaning

Everything is set by environment variables. The contest: the lowest bits per byte on FineWeb's validation
split, from code and weights of at most 16,000,000 bytes, trained in 600 s and scored in 600 s on 8xH100.

The file is read from top to bottom, as the data goes through it; each room uses only the rooms above it.

     1  Config        every setting: type, default, range, meaning; presets
     2  Runtime       ranks, device, collectives, log, progress, files, compiled C, choice of the attention kernel
     3  Data          byte tables, shards, training order, validation split, embedded corpus
     4  Model         virtual layers, rotary attention, lanes, skips, softcapped loss
     5  Optimizer     Newton-Schulz, banked Muon, AdamW, schedules, EMA and SWA
     6  Training      warm-up, the loop, fine-tuning before quantization
     7  Quantization  Hessians, sensitivities, GPTQ with trellis-coded columns or with row scales
     8  Artifact      the container, the entropy coder, the fit to the cap
     9  Evaluation    one scoring function; plain, sliding and test-time-training walks over it; the byte mixture
    10  Submission    record, checks, packed script, collect
    11  main          the pipeline
"""
import os  # these two are loaded before any script
import sys

PACKED = False  # True in the packed script, which does without what stands under `not PACKED`
if not PACKED and __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # what lies beside the script is not counted, and so not imported

import ast
import builtins
import collections
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import keyword
import lzma
import math
import mmap
import platform
import re
import resource
import shutil
import signal
import string
import struct
import subprocess
import tempfile
import textwrap
import time
import types
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics as documentation  # 0.5 MB of text that every Python has
from typing import NamedTuple

import brotli
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

flash_attn_func = None  # FlashAttention-3, an optional wheel for Hopper GPUs: choose_attention imports it

# torch 2.13 renames the two collectives on single tensors
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

SOURCE = Path(__file__).read_bytes()  # as it stood when the run began: what is packed, hashed and counted
RUNNING = sys._getframe(PACKED).f_code  # what Python has made of the script, or of the packed one around this

# ----------------------------------------------------------------------------------------------------------------------
# 1. Config: every setting, in the order of the rooms that read it. A field's variable is its name in capitals.
# ----------------------------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Bad input, found before any work is done; the message names what is wrong and what is allowed."""


def setting(room: str, default: object, meaning: str = "", low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] | None = None) -> dataclasses.Field:
    """Declare one setting: the room it belongs to, default, meaning and allowed values (bounds included)."""
    return dataclasses.field(default=default, metadata={"room": room, "meaning": meaning, "low": low, "high": high,
                                                        "choices": choices})


_run, _data, _model, _optim, _quant, _eval, _collect = (functools.partial(setting, room) for room in (
    "run", "data", "model", "optimizer", "quantization", "evaluation", "collect"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, made and checked by `Config.from_env(os.environ)`; values never change afterwards."""

    mode: str = _run("train", "train: all stages; eval: score OUT_DIR's artifact; pack: write the packed script; "
                     "collect: records to submission.json; help: this", choices=("train", "eval", "pack", "collect",
                                                                                "help"))
    preset: str = _run("pr1541", "named values for other settings", choices=("pr1541", "pr1858", "pr1395",
                                                                                 "pr1517", "smoke"))
    seed: int = _run(1337, "weights and the order of the training data", 0, 2**31 - 1)
    run_id: str = _run("", "name of the log and the record; empty: preset, seed, time and process")
    out_dir: str = _run("./out", "folder for the weights, the artifact and the packed script")
    log_dir: str = _run("./logs", "folder for the log and the record")
    device: str = _run("auto", "auto: the GPU where there is one", choices=("auto", "cuda", "cpu"))
    compile: str = _run("auto", "torch.compile; auto: on CUDA", choices=("auto", "0", "1"))
    attention: str = _run("auto", "auto: FlashAttention-3 on Hopper if importable", choices=("auto", "fa3", "sdpa",
                                                                                               "plain"))
    micro_batch_tokens: int = _run(0, "tokens a rank holds at a time; 0: 98304 on CUDA, else 4096", 0, 2**24)

    data_dir: str = _data("./data", "folder with datasets/ and tokenizers/")
    data_path: str = _data("", "folder with the shards; empty: DATA_DIR/datasets/fineweb10B_sp{VOCAB_SIZE}")
    tokenizer_path: str = _data("", "empty: DATA_DIR/tokenizers/fineweb_{VOCAB_SIZE}_bpe.model")
    corpus: str = _data("shards", "embedded: made from Python's documentation, unless shards are there",
                        choices=("shards", "embedded"))
    train_batch_tokens: int = _data(786432, "tokens of one optimizer step, over all ranks", 1, 2**30)
    train_seq_len: int = _data(2048, "tokens of one training sequence", 8, 2**17)

    vocab_size: int = _model(8192, "pieces of the tokenizer", 260, 65536)
    num_layers: int = _model(11, "physical layers", 1, 64)
    model_dim: int = _model(512, "width of the residual stream", 8, 16384)
    embedding_dim: int = _model(0, "width of the tied embedding; 0 or MODEL_DIM, nothing else", 0, 16384)
    num_heads: int = _model(8, "query heads", 1, 256)
    num_kv_heads: int = _model(4, "key and value heads", 1, 256)
    mlp_mult: float = _model(4.0, "hidden width of the MLP in units of MODEL_DIM", 0.25, 16)
    rope_dims: int = _model(16, "rotated dimensions of each head", 2, 1024)
    rope_base: float = _model(10000.0, "base of the rotary frequencies", 1, 10**9)
    rope_train_seq_len: int = _model(2048, "length beyond which the rotary base grows", 1, 2**20)
    qk_gain_init: float = _model(5.25, "initial gain of each head's queries", 0, 100)
    xsa_last_n: int = _model(11, "last layers whose attention output loses its part along the token's own value", 0, 64)
    ln_scale: bool = _model(True, "divide the input of layer i's sublayers by sqrt(i + 1)")
    parallel_residual: str = _model("improved", "plain: attention and MLP read one stream; lanes: two streams, joined "
                                    "at the end; improved: two that mix", choices=("improved", "plain", "lanes",
                                                                                   "none"))
    parallel_residual_start: int = _model(7, "first layer with parallel residuals", 0, 64)
    num_loops: int = _model(2, "further runs of the looped layers; 0: none", 0, 8)
    loop_start: int = _model(3, "first looped layer", 0, 63)
    loop_end: int = _model(5, "last looped layer", 0, 63)
    recur_layers: str = _model("", "the looped layers, separated by commas; empty: LOOP_START..LOOP_END")
    max_skips: int = _model(0, "U-Net skips at most; 0: one from each layer of the first half", 0, 64)
    skip_gates_enabled: bool = _model(True, "gate the U-Net skips; 0: add them")
    smear_gate_enabled: bool = _model(False, "mix a token's embedding with that of the token before it")
    ve_layers: str = _model("", "layers whose values get value embeddings, separated by commas")
    ve_dim: int = _model(128, "width of the value embeddings", 1, 16384)
    logit_softcap: float = _model(30.0, "logits are bounded by this, smoothly", 1, 60)
    tied_embed_init_std: float = _model(0.005, "standard deviation of the initial embedding", 0, 1)

    iterations: int = _optim(20000, "optimizer steps at most", 1, 10**9)
    max_wallclock_seconds: float = _optim(600.0, "budget up to the finished artifact; 0: ITERATIONS decide", 0, 10**6)
    gptq_reserve_seconds: float = _optim(40.0, "seconds of MAX_WALLCLOCK_SECONDS for all that follows the steps", 0,
                                         10**6)
    warmup_steps: int = _optim(20, "steps that compile each state of the model, then are undone", 0, 1000)
    train_log_every: int = _optim(500, "steps between two log lines (one comes, too, once 30 s have passed)", 1, 10**9)
    val_loss_every: int = _optim(4000, "steps between two validation losses; 0: only at the end", 0, 10**9)
    enable_looping_at: float = _optim(0.35, "fraction of the budget after which the loops run", 0, 1)
    recur_start_step: int = _optim(0, "step at which the loops start; 0: ENABLE_LOOPING_AT decides", 0, 10**9)
    matrix_lr: float = _optim(0.03, "Muon's learning rate", 0, 10)
    muon_momentum: float = _optim(0.97, "Muon's momentum", 0, 1)
    muon_momentum_warmup_start: float = _optim(0.92, "Muon's momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = _optim(1500, "steps until MUON_MOMENTUM is reached", 0, 10**9)
    muon_backend_steps: int = _optim(5, "Newton-Schulz iterations", 1, 20)
    muon_row_normalize: bool = _optim(True, "divide each row by its norm before the iteration (MuonEq-R)")
    muon_wd: float = _optim(0.095, "Muon's weight decay", 0, 10)
    tied_embed_lr: float = _optim(0.03, "AdamW's learning rate for the embedding", 0, 10)
    embed_wd: float = _optim(0.085, "weight decay of the embedding", 0, 10)
    scalar_lr: float = _optim(0.02, "AdamW's learning rate for scalars and vectors", 0, 10)
    adam_wd: float = _optim(0.02, "weight decay of scalars and vectors", 0, 10)
    beta1: float = _optim(0.9, "AdamW's decay of the mean gradient", 0, 0.9999)
    beta2: float = _optim(0.95, "AdamW's decay of the mean squared gradient", 0, 0.9999)
    adam_eps: float = _optim(1e-8, "AdamW's epsilon", 1e-12, 1)
    grad_clip_norm: float = _optim(0.3, "bound of the global gradient norm; 0: none", 0, 10**6)
    warmdown_frac: float = _optim(0.72, "last fraction of the budget, over which the learning rates fall", 0, 1)
    lr_schedule: str = _optim("linear", "how the learning rates fall: to 0, or by a cosine to MIN_LR",
                              choices=("linear", "cosine"))
    min_lr: float = _optim(0.0, "learning-rate multiplier at least", 0, 1)
    ema_decay: float = _optim(0.9965, "decay per step of the averaged weights; 0: no averaging", 0, 0.999999)
    swa_every: int = _optim(0, "steps between snapshots of a uniform average in the EMA's place; 0: EMA", 0, 10**9)
    late_qat_threshold: float = _optim(0.0, "learning-rate multiplier below which the matrices are trained as if "
                                       "rounded; 0: never", 0, 1)
    prequant_ttt_enabled: bool = _optim(False, "fine-tune before quantization, with TTT_BATCH_SEQS and TTT_GRAD_CLIP")
    prequant_ttt_data: str = _optim("val", "fine-tune on what; val: tokens that are scored later, which is forbidden",
                                    choices=("val", "train"))
    prequant_ttt_epochs: int = _optim(22, "passes over as many tokens as the validation split has", 1, 1000)
    prequant_ttt_lr: float = _optim(2.5e-4, "AdamW's learning rate, which falls by a cosine to a tenth", 0, 10)
    prequant_ttt_freeze_blocks: int = _optim(1, "how many first layers are frozen in it", 0, 64)

    gptq_calibration_batches: int = _quant(64, "eighths of a training batch for the Hessians, rounded up to "
                                            "whole batches", 1, 10**5)
    quantizer: str = _quant("trellis", "trellis: fitted to TARGET_BYTES; sdclip: PR #1541's, by MATRIX_BITS and what "
                            "follows it", choices=("trellis", "sdclip"))
    target_bytes: int = _quant(16_000_000, "code + artifact with trellis, at most; aim of pruning", 1, 2**30)
    matrix_bits: int = _quant(6, "bits of a matrix entry", 2, 8)
    matrix_clip_sigmas: float = _quant(12.85, "row scale of the matrices in standard deviations", 0.1, 1000)
    embed_bits: int = _quant(8, "bits of an embedding entry", 2, 8)
    embed_clip_sigmas: float = _quant(20.0, "row scale of the embedding in standard deviations", 0.1, 1000)
    embed_gptq_enabled: bool = _quant(True, "feed the embedding's rounding errors forward; 0: round to the nearest")
    selective_pruning_enabled: bool = _quant(False, "QUANTIZER=sdclip: zero the cheapest +-1 to fit TARGET_BYTES")
    compressor: str = _quant("brotli", "byte compressor of the artifact", choices=("brotli", "lzma"))

    eval_seq_len: int = _eval(2048, "tokens of one scored window", 8, 2**17)
    eval_stride: int = _eval(64, "targets scored by one sliding window", 1, 2**17)
    eval_drop_tail: bool = _eval(False, "leave out the last partial window, as published runs did")
    val_batch_tokens: int = _eval(65536, "tokens of one scoring pass of a rank (MICRO_BATCH_TOKENS at most)", 1, 2**24)
    sliding_window_enabled: bool = _eval(True, "score with sliding windows")
    ttt_enabled: bool = _eval(False, "score with score-first test-time training")
    ttt_chunk_tokens: int = _eval(32768, "tokens scored before each adaptation", 1, 2**30)
    ttt_epochs: int = _eval(3, "passes over a scored chunk", 0, 100)
    ttt_batch_seqs: int = _eval(32, "sequences of one adaptation step, over all ranks", 1, 2**16)
    ttt_lr: float = _eval(0.005, "SGD's learning rate at the first chunk", 0, 10)
    ttt_momentum: float = _eval(0.9, "SGD's momentum", 0, 1)
    ttt_grad_clip: float = _eval(1.0, "bound of the gradient norm; 0: none", 0, 10**6)
    ppm_enabled: bool = _eval(False, "score a byte mixture with PPM-D, too, in a field of its own")
    ppm_mode: str = _eval("trie", "trie: a distribution over tokens; spread: the published figure, no distribution",
                          choices=("trie", "spread"))

    records: str = _collect("", "records to collect, separated by spaces")
    reference_bpb: str = _collect("", "val_bpb of the seeds of the record to beat, separated by commas")
    author: str = _collect("", "author's name for submission.json")
    github_id: str = _collect("", "author's GitHub name for submission.json")
    submission_name: str = _collect("", "the submission's name: makes the folder records/<date>_<name>")

    @classmethod
    def from_env(cls, env: Mapping[str, str], stored: Mapping[str, object] | None = None) -> "Config":
        """Build the settings: defaults, then the preset, then `stored` (an artifact's own), then the environment.

        Raises UsageError that lists every misspelt name and bad value or, without any, every pair that does not fit.
        """
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        problems, given, base = [], {}, {}  # UsageErrors, not text: the packer shortens those
        if ALIASES:  # empty in other presets' packed scripts
            preset = str(env.get("PRESET", (stored or {}).get("preset", cls.preset)))
            meant = ALIASES.get(preset, {})
            problems += [UsageError(f"{name} means {meant[name]} with PRESET={preset}: set one of them")
                         for name in meant if name in env and meant[name] in env]
            env = {meant.get(name, name): text for name, text in env.items()}
        if not PACKED:  # which does without settings that nothing in it reads
            problems += misspelt(env, list(fields))
            problems += [UsageError(f"the artifact was made with {name}, which this script's artifacts do not store")
                         for name in stored or () if name not in STORED_SETTINGS]
        own = {name.upper(): value for name, value in (stored or {}).items() if name in STORED_SETTINGS}
        for values, text_of in ((given, env), (base, own)):
            for name in fields.keys() & text_of.keys():
                try:
                    values[fields[name].name] = parse_setting(name, str(text_of[name]), fields[name])
                except UsageError as error:
                    problems.append(error)
        if not problems:
            base = {**PRESETS[base.get("preset", given.get("preset", cls.preset))], **base}
            config, made_with = cls(**{**base, **given}), cls(**base)
            problems += [UsageError(f"{name.upper()}={getattr(config, name)}, but the artifact was made with "
                                    f"{getattr(made_with, name)}: unset it") for name in SETTLED_SETTINGS
                         if stored and getattr(config, name) != getattr(made_with, name)]
        if problems:
            raise UsageError("\n  ".join(["bad settings:", *sorted(map(str, problems))]))
        config.check()
        return config

    def check(self):
        """Raise UsageError that names every pair of settings that does not fit together."""
        broken = [rule_with_values(rule, vars(self)) for rule in CONSTRAINTS if not eval(rule, dict(vars(self)))]
        if broken:
            raise UsageError("\n  ".join(["each of these must hold:", *broken]))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def looped_layers(self) -> list[int]:
        """The layers that run again, in the order in which they do."""
        return numbers(self.recur_layers) or [*range(self.loop_start, self.loop_end + 1)]

    @property
    def shard_dir(self) -> Path:
        """Folder that holds fineweb_train_*.bin and fineweb_val_*.bin."""
        return Path(self.data_path or f"{self.data_dir}/datasets/fineweb10B_sp{self.vocab_size}")

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model's file."""
        return Path(self.tokenizer_path or f"{self.data_dir}/tokenizers/fineweb_{self.vocab_size}_bpe.model")

    def in_force(self) -> dict[str, object]:
        """Settings that differ from the defaults above or from the preset's, and PACKED_FOR: for log and record.

        Folders and what MODE=collect reads are left out: they change no figure, and logs are published.
        """
        preset = Config(**PRESETS[self.preset])
        shown = [f for f in dataclasses.fields(self) if f.metadata["room"] != "collect"
                 and not f.name.endswith(("_dir", "_path"))]
        return {f.name: getattr(self, f.name) for f in shown if f.name in PACKED_FOR
                or {getattr(self, f.name), getattr(preset, f.name)} != {f.default}}


# What must hold between settings: expressions, which an error shows with the values of their variables.
CONSTRAINTS = (
    "model_dim % num_heads == 0", "num_heads % num_kv_heads == 0", "embedding_dim in (0, model_dim)",
    "rope_dims % 2 == 0 and rope_dims <= model_dim // num_heads",
    "num_loops == 0 or recur_layers.strip(',') or loop_start <= loop_end < num_layers",
    "len(layers := f'{recur_layers},{ve_layers}') < 256 and all(i.isdecimal() and int(i) < num_layers for i in "
    "layers.split(',') if i)",
    "ve_layers == '' or quantizer == 'sdclip'", "selective_pruning_enabled == 0 or quantizer == 'sdclip'",
    "train_batch_tokens % train_seq_len == 0",
    "micro_batch_tokens == 0 or max(eval_seq_len, train_seq_len * (mode != 'eval')) <= micro_batch_tokens",
    "eval_stride <= eval_seq_len <= ttt_chunk_tokens",
    "max_wallclock_seconds == 0 or gptq_reserve_seconds < max_wallclock_seconds",
    "len(run_id) < 200 and run_id.isascii() and all(c.isalnum() or c in '._-' for c in run_id)",
)

# How an artifact was made: MODE=eval cannot change it.
# (But TTT_BATCH_SEQS and TTT_GRAD_CLIP, which fine-tuning reads, too, are scoring's.)
SETTLED_SETTINGS = ("preset", "seed", "train_batch_tokens", "train_seq_len", *(
    f.name for f in dataclasses.fields(Config) if f.metadata["room"] in ("model", "optimizer", "quantization")))
# What an artifact says of itself and brings along; folders and the machine's settings are never its business.
STORED_SETTINGS = (*SETTLED_SETTINGS, "corpus", *(f.name for f in dataclasses.fields(Config)
                                                  if f.metadata["room"] == "evaluation"))
# Settings that decide what code a run needs: the packed script is made for the run's values of them, and
# record and artifact name all of these, for in the packed script they are the defaults. Conditions name them even where
# the state alone would tell (`late_qat_threshold and self.late_qat`): so the packer knows which branch goes.
PACKED_FOR = ("preset", "corpus", "quantizer", "compressor", "parallel_residual", "smear_gate_enabled", "ve_layers",
              "skip_gates_enabled", "ln_scale", "recur_start_step", "lr_schedule", "muon_row_normalize", "swa_every",
              "late_qat_threshold", "prequant_ttt_enabled", "selective_pruning_enabled", "ppm_enabled")

PRESETS = {
    # PR #1541 is the default system: the fields above are its values, but for test-time training.
    "pr1541": {"ttt_enabled": True},
    "pr1858": {"parallel_residual": "plain", "matrix_lr": 0.022, "muon_momentum": 0.99, "quantizer": "sdclip",
               "ttt_enabled": True, "ttt_epochs": 2},
    "pr1395": {"vocab_size": 4096, "qk_gain_init": 5.0, "parallel_residual": "lanes", "num_loops": 1,
               "recur_layers": "4,5", "recur_start_step": 3000, "max_skips": 5, "ve_layers": "9,10", "matrix_lr": 0.02,
               "muon_momentum": 0.99, "muon_wd": 0.09, "ema_decay": 0.997, "warmdown_frac": 0.667,
               "quantizer": "sdclip", "embed_gptq_enabled": False, "selective_pruning_enabled": True},
    "pr1517": {"parallel_residual": "none", "num_loops": 1, "recur_layers": "3,4,5", "recur_start_step": 3000,
               "max_skips": 5, "smear_gate_enabled": True, "matrix_lr": 0.02, "muon_momentum": 0.99,
               "warmdown_frac": 0.667, "late_qat_threshold": 0.15, "gptq_calibration_batches": 256,
               "quantizer": "sdclip", "matrix_clip_sigmas": 9.5},
    # Every stage in about two minutes on two CPU cores, with no data and no GPU: the same pipeline, small numbers.
    "smoke": {
        "data_dir": "./out/smoke_data", "corpus": "embedded", "vocab_size": 1024, "num_layers": 8, "model_dim": 96,
        "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8, "loop_start": 2, "loop_end": 3,
        "parallel_residual_start": 5, "train_seq_len": 128, "eval_seq_len": 128, "rope_train_seq_len": 128,
        "train_batch_tokens": 4096, "iterations": 72, "max_wallclock_seconds": 0.0, "warmup_steps": 1,
        "val_loss_every": 0, "train_log_every": 25, "muon_momentum": 0.95, "muon_momentum_warmup_steps": 40,
        "ema_decay": 0.93, "gptq_calibration_batches": 32, "target_bytes": 430_000, "eval_stride": 32,
        "ttt_enabled": True, "ttt_chunk_tokens": 2048,
    },
}

# What a submission's own variables are called here, where the same names mean something else.
ALIASES = {"pr1517": {f"TTT_{name}": f"PREQUANT_TTT_{name}" for name in ("ENABLED", "EPOCHS", "LR", "FREEZE_BLOCKS")}}

# Prefixes that nobody but the contest's scripts uses: an unknown variable that starts with one is no stranger, but a
# mistake or a piece of a submission that is not here.
KNOWN_PREFIXES = ("TTT_", "MUON_", "GPTQ_", "ROPE_", "LOOP_", "XSA_", "EMA_", "SWA_", "MATRIX_", "EMBED_", "VE_",
                  "TIED_EMBED_", "WARMDOWN_", "EVAL_", "PARALLEL_RESIDUAL", "PREQUANT_", "RECUR_", "PPM_", "QK_",
                  "SKIP_GATES", "SMEAR_", "LATE_QAT", "PARALLEL_START_", "PARALLEL_FINAL_", "HASH_EMBED_", "LQER_",
                  "SPARSE_ATTN_", "GATED_ATTN_", "PHASED_TTT_", "CASEOPS_", "BIGRAM_", "MLP_CLIP_", "ATTN_CLIP_")


def numbers(text: str) -> list[int]:
    """Split whole numbers at their commas."""
    return [int(part) for part in text.split(",") if part]


def misspelt(env: Mapping[str, str], known: list[str]) -> list[str]:
    """Describe each variable of `env` that is no setting but is nearly one, or carries a prefix of one."""
    problems = []
    for name in env:
        if name in known or len(name) < 4 or not (name.isupper() or name.upper() in known):
            continue
        close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.87 if len(name) > 5 else 0.75)
        close = close or [other for other in known if "_" in name and other.startswith(f"{name}_")]
        prefix = next(filter(name.startswith, KNOWN_PREFIXES), None)
        if not close and prefix:
            alike = [other for other in known if other.startswith(prefix)]
            close = difflib.get_close_matches(name, alike, n=1, cutoff=0.0)
        if close or prefix:
            meant = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"{name} is no setting here{meant} (MODE=help lists all; unset it if it is meant for "
                            "another program)")
    return problems


def parse_setting(name: str, text: str, field: dataclasses.Field) -> object:
    """Turn a variable's text into the field's type; raise UsageError that names variable, value and what is allowed."""
    kind, limits = type(field.default), field.metadata
    try:
        word = text.strip()
        value = ("0", "1", "false", "true").index(word.lower()) % 2 == 1 if kind is bool else kind(word)
    except ValueError:
        value = None
    in_range = limits["low"] is None or (value is not None and limits["low"] <= value <= limits["high"])  # NaN is not
    in_range = in_range and text.isprintable() and (not limits["choices"] or value in limits["choices"])
    if value is None or not in_range:
        raise UsageError(f"{name}={text!r} is not allowed: it must be {allowed_values(field)}")
    return value


def allowed_values(field: dataclasses.Field) -> str:
    """Say in words what a setting may be."""
    limits = field.metadata
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    kind = {bool: "0 or 1", int: "a whole number", float: "a number", str: "printable text"}[type(field.default)]
    return kind if limits["low"] is None else f"{kind} from {limits['low']} to {limits['high']}"


def rule_with_values(rule: str, values: Mapping[str, object]) -> str:
    """Write a constraint, and beside it the variables that it is about."""
    named = {name: values[name] for name in re.findall("[a-z_]+", rule) if name in values}
    if not PACKED:
        rule = re.sub("[a-z_]+", lambda word: word[0].upper() if word[0] in named else word[0], rule)
    return f"{rule} ({assignments(named)})"


def print_help():
    """MODE=help: print every variable with type, default, allowed values and meaning, grouped by room."""
    width = 120
    with contextlib.suppress(OSError):  # the screen's, wherever the text is piped to
        width = min(max(os.get_terminal_size(sys.stderr.fileno()).columns, 80), width)

    def wrap(begin: str, text: str):
        print(textwrap.fill(text, width, initial_indent=begin, subsequent_indent=" " * len(begin),
                            break_on_hyphens=False))

    print("NAME=value torchrun ... train_gpt.py sets a variable. Its type, default, meaning [allowed]:")
    for room, fields in itertools.groupby(dataclasses.fields(Config), lambda field: field.metadata["room"]):
        print(f"\n{room}")
        for field in fields:
            name, _, default = assignments({field.name: field.default}).partition("=")
            limits, kind = field.metadata, type(field.default).__name__
            allowed = limits["choices"] or [f"{limits['low']} to {limits['high']}"] * (limits["low"] is not None)
            wrap(f"  {name:<26} {kind:<5} {default or repr(''):<8} ",
                 limits["meaning"] + (f" [{', '.join(allowed)}]" if allowed else ""))
    print("\npresets (PRESET=...; any variable overrides them)")
    for name, values in PRESETS.items():
        wrap(f"  {name:<8}", assignments(values))


def assignments(values: Mapping[str, object]) -> str:
    """Write settings as a shell would take them: NAME=value NAME=value ..."""
    return " ".join(f"{name.upper()}={int(v) if isinstance(v, bool) else v}" for name, v in values.items())


# ----------------------------------------------------------------------------------------------------------------------
# 2. Runtime: ranks, device, collectives, log, progress, files, compiled C, the choice of the attention kernel
# ----------------------------------------------------------------------------------------------------------------------


class RunStopped(BaseException):
    """The run ends before its end; what it had is saved. args: (what happened, exit code).

    Not an Exception: so no library can turn a signal into an error of its own.
    """


def check_launcher(env: Mapping[str, str]):
    """Raise UsageError if only some of torchrun's variables are set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    whole = "MASTER_ADDR" in env and all(env.get(name, "").isdecimal() for name in names)
    if not whole and ("RANK" in env or "WORLD_SIZE" in env):
        raise UsageError(f"{', '.join(names)} and MASTER_ADDR: torchrun sets all of them, here some are missing")


class Runtime:
    """One rank's place in the run: device, dtype, collectives and the log.

    One rank and many run the same lines: without torchrun the process group simply has one member.
    """

    def __init__(self, config: Config):
        """Find this rank's device and join the process group (NCCL on CUDA, gloo on CPU)."""
        env = os.environ
        if not PACKED:
            check_launcher(env)
        self.rank, self.world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.main = self.rank == 0  # the one that logs and writes files
        on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        local_rank = int(env.get("LOCAL_RANK", 0))
        if on_gpu and local_rank >= torch.cuda.device_count():
            raise UsageError(f"PyTorch sees {torch.cuda.device_count()} GPUs, and each rank needs one; DEVICE=cpu runs "
                             "without")
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self.dtype = torch.bfloat16 if on_gpu else torch.float32  # of the matrix products; masters stay fp32
        self.compile = on_gpu if config.compile == "auto" else config.compile == "1"
        self.micro_batch_tokens = config.micro_batch_tokens or (98304 if on_gpu else 4096)
        self.paused, self.log_file = 0.0, None
        self.stop_signal, self.signals_wait = 0, False
        if on_gpu:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.compile:  # a compilation each for training, plain and sliding windows, with and without loops
            torch._dynamo.config.recompile_limit = 32
            torch._inductor.config.freezing = False  # weights folded into a graph would score after they have changed
        self.attention = choose_attention(config.attention, on_gpu)
        if not dist.is_initialized():  # tests and bench make several runtimes in one process
            group = {"device_id": self.device} if on_gpu else {}
            if "WORLD_SIZE" not in env:
                group.update(store=dist.HashStore(), rank=0, world_size=1)
            dist.init_process_group("nccl" if on_gpu else "gloo", **group)
        self.check_alike("MODE", config.mode)

    def catch_signals(self):
        """Let SIGTERM and SIGINT end the run in order: training after the step under way, anything else at once."""
        def on_signal(number: int, _frame):
            self.stop_signal = number
            if not self.signals_wait:
                raise RunStopped(f"stopped by {signal.Signals(number).name}", 128 + number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def open_log(self, path: Path):
        """Start rank 0's log file; an earlier one of this name, and its record, are renamed by the time."""
        self.logged = hashlib.sha256()  # of the lines, as they are written
        if self.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            now = time.strftime(".%Y%m%d_%H%M%S")
            for earlier in (path, path.with_suffix(".json")):
                if earlier.exists():
                    earlier.replace(f"{earlier}{now}")
            self.log_file = path.open("w", encoding="utf-8")

    def log(self, message: str):
        """Print on rank 0, and write to the log file if it is open."""
        if self.main:
            print(message, flush=True)
            if self.log_file:
                self.log_file.write(message + "\n")
                self.log_file.flush()
                self.logged.update((message + "\n").encode())

    def progress(self, stage: str, items: Sequence) -> Iterator:
        """Yield the items; every 10 s, log how many of them are done and about how long the others will take."""
        begin = shown = time.perf_counter()
        for done, item in enumerate(items):
            now = time.perf_counter()
            if now - shown > 10 and done:
                shown = now
                left = (now - begin) / done * (len(items) - done)
                self.log(f"{stage}: {done}/{len(items)} {now - begin:.0f}s, about {left:.0f}s left")
            yield item

    def clock(self) -> float:
        """Seconds since an arbitrary point, pauses excluded; waits for the device first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Let the time inside count as `paused`: the budget is for making the artifact, not for looking at it."""
        begin = self.clock()
        yield
        self.paused += self.clock() - begin

    def all_reduce(self, tensor: Tensor):
        """Sum `tensor` over ranks, in place."""
        dist.all_reduce(tensor)

    def share(self, items: int) -> range:
        """This rank's contiguous share of `items`; the shares of all ranks are disjoint and cover them."""
        return range(items * self.rank // self.world, items * (self.rank + 1) // self.world)

    def own(self, items: Sequence | Tensor) -> Sequence | Tensor:
        """Take this rank's share of a list or of a tensor's first dimension (a view)."""
        share = self.share(len(items))
        return items[share.start:share.stop]

    def gather(self, value: object) -> list:
        """Give every rank all ranks' values: nodes need no shared file system."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """Raise on every rank the UsageError that any rank meets inside: nobody waits for a rank that stopped."""
        problem = None
        try:
            yield
        except UsageError as error:
            problem = str(error)
        problems = [text for text in self.gather(problem) if text]
        if problems:
            raise UsageError(problems[0])

    def check_alike(self, what: str, value: object):
        """Raise UsageError on every rank unless all have the same value: they may be told different things."""
        values = self.gather(value)
        different = [rank for rank in range(self.world) if values[rank] != values[0]]
        if different:
            raise UsageError(f"ranks {different} differ in {what}: {values[different[0]]}, rank 0 has {values[0]}")

    def compiled(self, function: Callable) -> Callable:
        """Return `function` compiled with static shapes where COMPILE asks for it, else as it is."""
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compile else function

    def peak_memory_mib(self) -> int:
        """Most memory this rank has used: on the GPU, else of the process (in Linux's unit, KiB)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    def hardware(self) -> str:
        """Name the devices of all ranks, e.g. `8x NVIDIA H100 80GB HBM3`."""
        if self.device.type == "cuda":
            return f"{self.world}x {torch.cuda.get_device_name()}"
        return f"{self.world}x CPU rank, {torch.get_num_threads()} threads ({platform.machine()})"

    def end(self):
        """End this rank's process once all ranks have come here; does not return."""
        if self.log_file:
            self.log_file.close()
        dist.barrier()
        dist.destroy_process_group()
        end_process(0)


def end_process(code: int):
    """End at once.

    Python's own shutdown stops threads wherever they are, and one of the process group's that is just then freeing a
    tensor aborts the process: seen in one of 40 runs of two gloo ranks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sha256(data: bytes | np.ndarray) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def write_files(files: Mapping[Path, bytes]):
    """Write files whole or not at all: old ones stay until all the new ones are complete. Raises OSError."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(data)
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@functools.cache
def c_library(source: str) -> ctypes.CDLL:
    """Compile C with the system's compiler and load it; raise UsageError if there is none, or either fails."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        raise UsageError("no C compiler: the PATH has no cc, gcc or clang (Debian, Ubuntu: apt-get install gcc "
                         "libc6-dev); PPM_ENABLED=1 and, packed, QUANTIZER=trellis cannot do without")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/library.so"
        # Without contraction, products and sums are rounded alike on all machines.
        command = [compiler, "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-o", library, "-xc", "-"]
        try:
            subprocess.run(command, input=source, capture_output=True, text=True, check=True, env={
                name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR")})  # no other headers
            return ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UsageError(f"the C code cannot be compiled or loaded: {getattr(error, 'stderr', error)}") from error


def choose_attention(wanted: str, on_gpu: bool) -> str:
    """Name the attention kernel in use: fa3, sdpa (cuDNN, flash or PyTorch's CPU kernel) or plain."""
    global flash_attn_func
    hopper = on_gpu and torch.cuda.get_device_capability()[0] == 9
    if hopper and wanted in ("fa3", "auto"):
        with contextlib.suppress(ImportError):
            from flash_attn_interface import flash_attn_func
    if wanted == "fa3" and not flash_attn_func:
        raise UsageError("ATTENTION=fa3 needs a Hopper GPU and flash_attn_interface; ATTENTION=auto does without")
    return wanted if wanted != "auto" else "fa3" if flash_attn_func else "sdpa"


@contextlib.contextmanager
def attention_kernels(rt: Runtime) -> Iterator[None]:
    """On CUDA, let SDPA choose among fused kernels only: falling back to the quadratic one must not go unnoticed."""
    kernel = nn.attention.SDPBackend
    others = [] if rt.device.type == "cuda" else [kernel.MATH]
    with nn.attention.sdpa_kernel([kernel.CUDNN_ATTENTION, kernel.FLASH_ATTENTION, *others], set_priority=True):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# 3. Data: byte tables, shards, the training order, the validation split, the embedded corpus
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS = 1  # begins every document
HOW_TO_GET_DATA = ("Get FineWeb with the contest's downloader (see README.md), set DATA_DIR, or try the whole pipeline "
                   "without data: PRESET=smoke")


def load_tokenizer(config: Config) -> spm.SentencePieceProcessor:
    """Load the tokenizer and its file's `sha256`.

    Raises UsageError unless it has VOCAB_SIZE pieces, the contest's control ids and all ASCII.
    The sample that it must give back is single ASCII characters, then prose: normalization may match sequences.
    """
    path = config.tokenizer
    if not path.is_file():
        raise UsageError(f"no tokenizer at {path}. {HOW_TO_GET_DATA}")
    try:
        sp = spm.SentencePieceProcessor(model_proto=(model := path.read_bytes()))
    except (RuntimeError, OSError) as error:
        raise UsageError(f"{path} is no SentencePiece model ({error})") from error
    if sp.vocab_size() != config.vocab_size:
        raise UsageError(f"{path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={config.vocab_size}")
    longest = max(map(len, map(sp.id_to_piece, range(config.vocab_size))))
    if longest > 16:  # SentencePiece's own limit: the vocabulary is not counted, and could hold the split
        raise UsageError(f"{path} has pieces of up to {longest} characters, the contest's have 16 at most")
    ids = [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()]
    if ids != [0, BOS, 2, 3]:
        raise UsageError(f"{path} has the control ids {ids} (pad, BOS, EOS, unknown), not the contest's [0, 1, 2, 3]")
    text = " ".join([*map(chr, range(33, 127)), *documentation.values()])
    text = " ".join(text.encode("ascii", "ignore").decode().split())[:100_000]
    if sp.decode(sp.encode(text)) != text:  # as many bytes of simpler text are easier to predict
        raise UsageError(f"{path} changes ASCII text")
    sp.sha256 = sha256(model)
    return sp


def is_boundary(sp: spm.SentencePieceProcessor, token: int) -> bool:
    """Whether the token stands for no text, so that a leading space mark after it is no byte of the text."""
    return sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)


def token_bytes(sp: spm.SentencePieceProcessor, token: int, after_boundary: bool) -> bytes:
    """The bytes of text that a token stands for: without a leading space after a boundary token."""
    piece = sp.id_to_piece(token)
    if is_boundary(sp, token):
        return b""
    if sp.is_byte(token):
        return bytes([int(piece[3:-1], 16)])  # <0x41>
    return piece.removeprefix("\u2581" if after_boundary else "").replace("\u2581", " ").encode()


def build_byte_luts(sp: spm.SentencePieceProcessor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tabulate how many bytes of text each token stands for.

    Returns three [vocab_size] tensors: base bytes (int64; the UTF-8 length without a leading space mark, 1 for a byte
    piece, 0 for control, unknown and unused pieces), has_leading_space (bool), is_boundary (bool; after such a token a
    leading space mark is no byte of the text). Raises UsageError for a tokenizer that cannot be counted exactly.
    """
    if sp.vocab_size() != vocab_size:
        raise UsageError(f"the tokenizer has {sp.vocab_size()} pieces, but VOCAB_SIZE={vocab_size}")
    if sp.is_unknown(sp.piece_to_id("\u2581")):
        raise UsageError("the tokenizer has no piece U+2581 (a lone space), so it would spend 3 bytes on one space")
    base_bytes, whole = (torch.tensor([len(token_bytes(sp, token, after_boundary)) for token in range(vocab_size)])
                         for after_boundary in (True, False))
    boundary = torch.tensor([is_boundary(sp, token) for token in range(vocab_size)])
    return base_bytes, whole > base_bytes, boundary


def shard_files(config: Config, split: str) -> list[Path]:
    """List the shards of `split` (train or val) in order.

    Raises UsageError if there are none, one is no file, or the validation split's numbers, from 000000 on, have a gap.
    """
    files = sorted(config.shard_dir.glob(f"fineweb_{split}_*.bin"))
    if not files:
        raise UsageError(f"no fineweb_{split}_*.bin in {config.shard_dir}. {HOW_TO_GET_DATA}")
    if split == "val":  # by their numbers, for what lies there may have a hole
        files = [config.shard_dir / f"fineweb_val_{number:06}.bin" for number in range(len(files))]
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is missing, no file, or a link to none")
    return files


def open_shard(path: Path, vocab_size: int = 65536) -> np.ndarray:
    """Map a shard's tokens (uint16) into memory, and read them once; their `file` stays open.

    Raises UsageError that names the file if its header lies or a token is outside the vocabulary.
    """
    file = path.open("rb")  # once: the path may lead elsewhere the next time
    size = os.fstat(file.fileno()).st_size
    if size < SHARD_HEADER_BYTES:
        raise UsageError(f"{path}: {size} bytes are less than a shard's header")
    magic, version, count = np.fromfile(file, dtype="<i4", count=3).tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UsageError(f"{path}: magic {magic} and version {version} are not a shard's "
                         f"({SHARD_MAGIC} and {SHARD_VERSION})")
    if count < 2 or size != SHARD_HEADER_BYTES + 2 * count:
        raise UsageError(f"{path}: the header promises {count} tokens (two at least), the file holds "
                         f"{(size - SHARD_HEADER_BYTES) / 2:g}: download it again")
    tokens = np.memmap(file, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))
    tokens.file = file
    if (highest := int(tokens.max())) >= vocab_size:
        raise UsageError(f"{path}: token {highest} is outside the vocabulary (VOCAB_SIZE={vocab_size})")
    return tokens


class TrainData:
    """The training windows in an order that depends on SEED alone.

    A window is TRAIN_SEQ_LEN inputs and one more token for the last target. Windows do not overlap and start at a
    random phase of each shard; each epoch takes all of them in one new random permutation, which draws shards in
    proportion to what they have left. Global batch k is thus a pure function of (SEED, k): every rank computes
    the same one and takes its slice, and starting over is asking for batch 0 again.
    """

    def __init__(self, config: Config, rt: Runtime):
        """Open and check all shards; raise UsageError if they or the ranks do not fit the batch."""
        self.seq_len, self.seed = config.train_seq_len, (config.seed, 0)
        self.sequences = config.train_batch_tokens // config.train_seq_len  # per global batch
        self.rt, self.epoch = rt, None
        if self.sequences % rt.world:
            fits = [n for n in range(1, self.sequences + 1) if self.sequences % n == 0]
            raise UsageError(f"{rt.world} ranks cannot share TRAIN_BATCH_TOKENS={config.train_batch_tokens}, which is "
                             f"{self.sequences} sequences of {self.seq_len}: use {', '.join(map(str, fits))} ranks")
        per_rank = self.sequences // rt.world
        # Static shapes: every micro-batch is the same share of a rank's sequences, as large as the memory bound allows.
        self.micro_sequences = max(n for n in range(1, per_rank + 1)
                                   if per_rank % n == 0 and (n == 1 or n * self.seq_len <= rt.micro_batch_tokens))
        with rt.agree():  # every rank reads and hashes all shards: nodes may hold different files
            self.shards = [open_shard(path, config.vocab_size) for path in shard_files(config, "train")]
            self.opened = self.changes()
            self.sha256 = sha256("".join(map(sha256, self.shards)).encode())
        # One window less than fits, so that any phase below seq_len leaves as many; at least one if one fits.
        counts = [max((n - self.seq_len) // self.seq_len, int(n > self.seq_len)) for n in map(len, self.shards)]
        self.first_window = np.cumsum([0, *counts])
        if self.first_window[-1] < self.sequences:
            raise UsageError(f"the training shards hold {self.first_window[-1]} windows of {self.seq_len} tokens, one "
                             f"batch takes {self.sequences}: lower TRAIN_BATCH_TOKENS or get more data")
        # Else the loader's thread would pin memory through GPU 0, whichever GPU the rank has.
        chosen = (torch.cuda.set_device, (rt.device,)) if rt.device.type == "cuda" else (None, ())
        self.worker = ThreadPoolExecutor(1, "loader", *chosen)
        self.pending = (None, None)

    def changes(self) -> list[int]:
        """Times of the last change (ns) of the files that are mapped, as the file system notes writes."""
        return [os.fstat(shard.file.fileno()).st_ctime_ns for shard in self.shards]

    def in_order(self, stream: int) -> "TrainData":
        """Return the same windows in an independent order (0 is training's, 1 calibration's, 2 fine-tuning's)."""
        other = copy.copy(self)
        other.seed, other.epoch, other.pending = (self.seed[0], stream), None, (None, None)
        return other

    def window(self, position: int) -> np.ndarray:
        """Tokens (seq_len + 1, uint16) of the window at `position` of the endless global order."""
        epoch, index = divmod(position, int(self.first_window[-1]))
        if epoch != self.epoch:  # draw its phases and its permutation
            rng, counts = np.random.default_rng((*self.seed, epoch)), np.diff(self.first_window)
            slack = np.array([len(s) - 1 for s in self.shards]) - counts * self.seq_len
            self.phase = rng.integers(0, np.minimum(slack + 1, self.seq_len))
            self.order, self.epoch = rng.permutation(self.first_window[-1]), epoch
        window = self.order[index]
        shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
        start = self.phase[shard] + (window - self.first_window[shard]) * self.seq_len
        return self.shards[shard][start:start + self.seq_len + 1]

    def stack(self, positions: range) -> Tensor:
        """Windows at these positions of the endless global order, on the host: [positions, seq_len + 1] int64."""
        tokens = torch.from_numpy(np.stack([self.window(position) for position in positions]).astype(np.int64))
        return tokens.pin_memory() if self.rt.device.type == "cuda" else tokens

    def assemble(self, batch: int) -> Tensor:
        """This rank's slice of global batch `batch`, [sequences / ranks, seq_len + 1]."""
        share, first = self.rt.share(self.sequences), batch * self.sequences
        return self.stack(range(first + share.start, first + share.stop))

    def batch(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches (inputs, targets) of this rank's slice of global batch `number`, each [sequences, seq_len].

        The next batch is assembled in the background, and the copy to the device does not block.
        """
        known, future = self.pending
        # Always by the worker: `window` keeps state, and the worker may still be making a batch that nobody wants.
        tokens = future.result() if known == number else self.worker.submit(self.assemble, number).result()
        self.pending = (number + 1, self.worker.submit(self.assemble, number + 1))
        tokens = tokens.to(self.rt.device, non_blocking=True)
        return [(t[:, :-1], t[:, 1:]) for t in tokens.split(self.micro_sequences)]


class ValidationData:
    """The whole validation split, with the byte count of every target.

    tokens: int32 [N + 1] on the device; target p is token p + 1, so there are N = `targets` of them. `left_out` more
    are not scored (EVAL_DROP_TAIL). sha256 is that of all shards' tokens, uint16, in order, tokenizer_sha256 that of
    the tokenizer's file.
    """

    def __init__(self, config: Config, rt: Runtime, sp: spm.SentencePieceProcessor):
        """Read and check the shards; raise UsageError if they hold less than one window."""
        shards = [open_shard(path, config.vocab_size) for path in shard_files(config, "val")]
        tokens, self.tokenizer = np.concatenate(shards), sp
        self.sha256, self.tokenizer_sha256 = sha256(tokens.tobytes()), sp.sha256
        tokens = tokens.astype(np.int32)
        targets, window = len(tokens) - 1, config.eval_seq_len
        if targets < window:
            raise UsageError(f"the validation split in {config.shard_dir} has {targets} targets, less than one window "
                             f"(EVAL_SEQ_LEN={window})")
        if config.eval_drop_tail:
            targets -= targets % window
        self.left_out = sum(map(len, shards)) - 1 - targets  # by the shards' own counts
        host = torch.from_numpy(tokens[:targets + 1])
        base_bytes, has_leading_space, boundary = build_byte_luts(sp, config.vocab_size)
        previous, target = host[:-1], host[1:]
        self.target_bytes = base_bytes[target] + (has_leading_space[target] & ~boundary[previous])  # [N] int64
        self.tokens, self.targets = host.to(rt.device), targets
        self.bytes = int(self.target_bytes.sum())
        if not self.bytes:
            raise UsageError(f"the validation split in {config.shard_dir} holds no text")

    def bits_per_byte(self, total_nats: float) -> float:
        """Convert the summed negative log-likelihood of all targets."""
        return total_nats / math.log(2) / self.bytes


def write_shard(path: Path, tokens: np.ndarray):
    """Write tokens in the contest's shard format, under a temporary name until it is whole."""
    header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_files({path: header.tobytes() + tokens.astype("<u2").tobytes()})


def write_embedded_corpus(config: Config):
    """Make shards and a tokenizer from the documentation topics that come with Python, unless all of them are there.

    Each topic is a document, unless a longer one holds it; every fifth goes to the validation split. Same recipe as the
    contest's tokenizers.
    Raises UsageError if some of the files are there and some are not: they may be somebody's own.
    """
    there = [config.tokenizer.is_file(), *(any(config.shard_dir.glob(f"fineweb_{s}_*.bin")) for s in ("train", "val"))]
    if all(there):
        return
    if any(there):
        raise UsageError(f"CORPUS=embedded: of {config.tokenizer} and the train and val shards in {config.shard_dir} "
                         "some are there and some are not; remove them or choose another DATA_DIR")
    documents = list(dict.fromkeys(text for _, text in sorted(documentation.items())))
    documents = [text for text in documents if not any(
        len(text) < len(other) and text[len(text) // 2:][:200] in other for other in documents)]  # nothing twice
    model = io.BytesIO()
    lines = [line for text in documents for line in text.splitlines()]
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=config.vocab_size, model_type="bpe",
            byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1,
            eos_id=2, unk_id=3, minloglevel=2)
    except RuntimeError as error:
        raise UsageError(f"CORPUS=embedded: no tokenizer with VOCAB_SIZE={config.vocab_size} ({error})") from error
    print(f"corpus and tokenizer: made from Python's documentation, in {config.data_dir}")
    write_files({config.tokenizer: model.getvalue()})
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    for split, chosen in (("val", documents[2::5]), ("train", [d for i, d in enumerate(documents) if i % 5 != 2])):
        tokens = [token for text in chosen for token in (BOS, *sp.encode(text))]
        write_shard(config.shard_dir / f"fineweb_{split}_000000.bin", np.array(tokens))


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model: a schedule of virtual layers, and a forward pass that loops over it
# ----------------------------------------------------------------------------------------------------------------------


class VirtualLayer(NamedTuple):
    """One entry of the schedule: which physical layer runs, on how many lanes, and what it does to the skip stack."""

    layer: int  # physical layer whose weights are used
    parallel: bool  # attention and MLP side by side, as PARALLEL_RESIDUAL says
    push: bool  # encoder half: the output goes onto the skip stack
    skip: int  # decoder half: row of the skip weights that merges the popped skip; -1: none


def build_schedule(config: Config, looping: bool) -> tuple[VirtualLayer, ...]:
    """List the virtual layers: the looped ones repeated, first half encoder, second half decoder (U-Net skips)."""
    order = list(range(config.num_layers))
    if looping:
        again, stop = config.looped_layers, max(config.looped_layers) + 1
        order = order[:stop] + again * config.num_loops + order[stop:]
    encoder = len(order) // 2
    skips = min(encoder, config.max_skips or encoder)
    first = config.num_layers if config.parallel_residual == "none" else config.parallel_residual_start
    parallel = [deepest >= first for deepest in itertools.accumulate(order, max)]  # two lanes stay two
    return tuple(VirtualLayer(layer, parallel[i], i < encoder, i - encoder if encoder <= i < encoder + skips else -1)
                 for i, layer in enumerate(order))


class LayerWeights(NamedTuple):
    """What one physical layer computes with, in the compute dtype. Matrices are [out, in]."""

    qkv: Tensor  # the three projections of one input, stacked: one matrix product
    out: Tensor  # rows times attn_scale: scaling a small matrix spares a pass over all tokens
    up: Tensor
    down: Tensor  # rows times mlp_scale
    qk_gain: Tensor  # [H + G, 1]: the learned gain of each query head, 1 for the keys
    resid_mix: Tensor  # [2, D]: weights of the stream and of x0 in the layer's input
    par_resid: Tensor | None  # [2]: factor on the lanes as attention's, then the MLP's, output is added
    par_post: Tensor | None  # [2, 2]: weight of (attention, MLP) output in (lane 0, lane 1)


def norm(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """RMSNorm over the last dimension, without weights, times `scale` (one factor per row at most: nearly free)."""
    wide = x.float()
    return (wide * (torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-7) * scale)).to(x.dtype)


def rotary_angles(config: Config, length: int, device: torch.device) -> Tensor:
    """Angles [length, 1, rope_dims / 2] of the rotary embedding, fp32.

    Beyond ROPE_TRAIN_SEQ_LEN the base grows with the length (NTK-aware scaling), so that the slowest frequency sees
    the range of angles it was trained on.
    """
    base, dims = config.rope_base, config.rope_dims
    if length > config.rope_train_seq_len:
        base *= (length / config.rope_train_seq_len) ** (dims / max(dims - 2, 1))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first rope_dims dimensions of x [B, T, H, d] by their position's angles; leave the rest."""
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    """Causal softmax attention with grouped key/value heads: q [B, T, H, d], k and v [B, T, G, d] -> [B, T, H, d]."""
    if kernel == "fa3":
        return flash_attn_func(q, k, v, causal=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not PACKED and kernel == "plain":
        batch, heads, length, dim = q.shape
        scores = q.unflatten(1, (k.size(1), -1)) @ k[:, :, None].transpose(-1, -2) / math.sqrt(dim)  # [B, G, H/G, T, T]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return (weights @ v[:, :, None]).reshape(batch, heads, length, dim).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: take from each head's output y [B, T, H, d] its projection on its own position's value v [B, T, G, d]."""
    grouped, v = y.unflatten(2, (v.size(2), -1)), v[:, :, :, None]  # [B, T, G, H/G, d], [B, T, G, 1, d]
    along = (grouped * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.addcmul(grouped, along, v, value=-1).flatten(2, 3)


class SquaredLeakyReLU(torch.autograd.Function):
    """leaky_relu(x, 0.5)^2, which is x * leaky_relu(x, 0.25); its derivative is twice the second factor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Elementwise."""
        half = F.leaky_relu(x, 0.25)
        ctx.save_for_backward(half)
        return x * half

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Elementwise."""
        return (grad * ctx.saved_tensors[0]).mul_(2)


HEAD_CHUNK_TOKENS = {"cpu": 512, "cuda": 16384}  # rows of logits that exist at a time; CPU: they stay in the cache


class SoftcapCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of softcapped logits, c * tanh(x @ weight.T / c), in chunks of rows.

    The gradients are made in the forward pass while a chunk's logits are at hand, so that neither the logits nor
    their gradient ever exist for all rows: with 8192 pieces they would be most of the memory traffic of a small model.
    |logit| <= c also spares the softmax its search for the maximum.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        """x [N, D] in the compute dtype, weight [V, D] fp32, targets [N] int64 -> scalar fp32."""
        matrix = (weight / softcap).to(x.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        rows = HEAD_CHUNK_TOKENS[x.device.type]
        for begin in range(0, len(x), rows):
            part, target = x[begin:begin + rows], targets[begin:begin + rows, None]
            cap = F.linear(part, matrix).float().tanh_()  # [rows, V], logit / softcap
            picked = cap.gather(1, target)
            p = torch.mul(cap, softcap).exp_()
            mass = p.sum(1, keepdim=True)
            total += (mass.log() - softcap * picked).sum()
            # d loss / d (x @ weight.T) = (p / mass - onehot) * (1 - cap^2) / N; what is constant in a row is left to
            # the narrow factors of the two products.
            p.scatter_add_(1, target, -mass)
            p = p.addcmul_(p, cap.square_(), value=-1).to(x.dtype)
            per_row = 1 / (mass * len(x))
            grad_x[begin:begin + rows] = (p @ matrix) * (softcap * per_row)
            grad_weight += p.t() @ (part * per_row).to(x.dtype)
        ctx.save_for_backward(grad_x, grad_weight)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the gradients made in forward."""
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None


def row_scale(w: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """SDClip's step of each row of w [..., out, in] -> [..., out, 1]: clip_sigmas deviations over the top integer."""
    scale = clip_sigmas * w.std(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    # fp16's smallest positive number: an all-zero row still has a step to divide by
    return scale.clamp(2.0**-24, torch.finfo(torch.half).max)


def fake_quantize(w: Tensor, config: Config) -> Tensor:
    """Round matrices [..., out, in] as SDClip would; gradients pass as if nothing had been done (Bengio et al. 2013).

    Late in the warm-down (LATE_QAT_THRESHOLD) the weights so adapt to their rounding.
    """
    with torch.no_grad():
        top, step = 2 ** (config.matrix_bits - 1) - 1, row_scale(w, config.matrix_bits, config.matrix_clip_sigmas)
        error = (w / step).round().clamp(-top, top) * step - w
    return w + error


def smear(x: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    """SmearGate: mix x [B, T, D] with the position before, by sigmoid(gate [D]), never across documents' beginnings."""
    before = torch.where((ids == BOS)[..., None], x, torch.cat((x[:, :1], x[:, :-1]), 1))
    return torch.lerp(x, before, torch.sigmoid(gate).to(x.dtype))


class ValueEmbedding(nn.Module):
    """A narrow table of tokens, projected and added to the values of a few layers (PR #1395; zero at first)."""

    def __init__(self, config: Config, kv_dim: int):
        super().__init__()
        self.layers, self.heads = numbers(config.ve_layers), config.num_kv_heads
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.ve_dim).normal_(0, 0.01))
        self.bank = nn.Parameter(torch.zeros(1, kv_dim, config.ve_dim))  # a bank of one, for Muon
        self.scale = nn.Parameter(torch.full((), 0.1))
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, gpt: "GPT", ids: Tensor) -> dict[int, Tensor]:
        """Token ids [B, T] -> {layer: [B, T, G, d]}, in the compute dtype of `gpt`."""
        narrow = F.embedding(ids, self.table).to(gpt.dtype)
        values = gpt.project(narrow, self.bank[0].to(gpt.dtype), "values").unflatten(-1, (self.heads, -1))
        scales = (self.scale * self.layer_scales).to(gpt.dtype)
        return {layer: values * scale for layer, scale in zip(self.layers, scales)}


TABLES = ("embedding", "value_embedding.table")  # parameters with a row for each token


class GPT(nn.Module):
    """The language model: tied embedding, virtual layers with U-Net skips, softcapped head.

    Matrices live in banks, [matrices, out, in] stacks of one shape, so that Muon treats each bank as one batch.
    """

    BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")

    def __init__(self, config: Config):
        """Make the parameters (fp32, on the CPU, from torch's global generator: torch.manual_seed decides)."""
        super().__init__()
        self.config, self.attention, self.looping, self.late_qat = config, "sdpa", False, False
        self.dtype = torch.float32  # of the matrix products; `to_compute` sets it and the attention kernel
        layers, dim, heads = config.num_layers, config.model_dim, config.num_heads
        kv_dim, hidden = config.num_kv_heads * config.head_dim, round(config.mlp_mult * dim)
        self.schedules = {looping: build_schedule(config, looping and config.num_loops > 0)
                          for looping in (False, True)}
        skips = sum(v.skip >= 0 for v in self.schedules[True])
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, dim).normal_(0, config.tied_embed_init_std))
        self.qo_bank = nn.Parameter(torch.zeros(2 * layers, dim, dim))  # q of layer i at i, output at layers + i
        self.kv_bank = nn.Parameter(torch.zeros(2 * layers, kv_dim, dim))  # k of layer i at i, v at layers + i
        self.up_bank = nn.Parameter(torch.zeros(layers, hidden, dim))
        self.down_bank = nn.Parameter(torch.zeros(layers, dim, hidden))
        for matrix in (*self.qo_bank[:layers], *self.kv_bank, *self.up_bank):  # outputs of sublayers start at zero
            nn.init.orthogonal_(matrix.data)
        self.resid_mix = nn.Parameter(torch.tensor([1.0, 0.0])[None, :, None].repeat(layers, 1, dim))
        self.attn_scale = nn.Parameter(torch.ones(layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(layers, dim))
        self.q_gain = nn.Parameter(torch.full((layers, heads), config.qk_gain_init))
        self.skip_weights = nn.Parameter(torch.ones(skips, dim))
        # What is off is None: no parameter.
        self.skip_gates = nn.Parameter(torch.zeros(skips, dim)) if config.skip_gates_enabled else None
        if config.parallel_residual == "improved":
            self.par_resid = nn.Parameter(torch.full((layers, 2), math.sqrt(1.1)))
            self.par_post = nn.Parameter(torch.ones(layers, 2, 2))
        else:
            self.par_resid = self.par_post = None
        self.lane_merge = nn.Parameter(torch.full((), 0.5)) if config.parallel_residual == "lanes" else None
        self.smear_gate = nn.Parameter(torch.zeros(dim)) if config.smear_gate_enabled else None
        self.value_embedding = ValueEmbedding(config, kv_dim) if config.ve_layers else None
        if not PACKED:  # a forgotten site would only be missed at quantization
            sites = self.matrix_sites()
            for name, bank in self.named_parameters():
                if name.endswith("bank") and len(sites.get(name, ())) != len(bank):
                    raise UsageError(f"GPT.matrix_sites must name the inputs of the {len(bank)} matrices of {name}")

    def to_compute(self, rt: Runtime) -> "GPT":
        """Move to the runtime's device, dtype and attention kernel; masters stay fp32."""
        self.dtype, self.attention = rt.dtype, rt.attention
        return self.to(rt.device)

    def matrix_sites(self) -> dict[str, list[str]]:
        """Name, for each matrix of each bank and for the embedding, the input that it is applied to (see `project`)."""
        layers = range(self.config.num_layers)
        return {"qo_bank": [f"attn_in.{i}" for i in layers] + [f"attn_out.{i}" for i in layers],
                "kv_bank": [f"attn_in.{i}" for i in layers] * 2,
                "up_bank": [f"mlp_in.{i}" for i in layers],
                "down_bank": [f"mlp_hidden.{i}" for i in layers],
                "embedding": ["head"], **({"value_embedding.bank": ["values"]} if self.config.ve_layers else {})}

    def project(self, x: Tensor, matrix: Tensor, site: str) -> Tensor:
        """Apply a matrix [out, in]. All matrix products but the training loss's go through here, named by site."""
        return F.linear(x, matrix)

    def layer_weights(self) -> list[LayerWeights]:
        """Join and scale the matrices, cast them to the compute dtype and sort them by layer."""
        n, groups = self.config.num_layers, self.config.num_kv_heads
        qo, kv, up, down = (self.qo_bank, self.kv_bank, self.up_bank, self.down_bank)
        if self.config.late_qat_threshold and self.late_qat:
            qo, kv, up, down = (fake_quantize(bank, self.config) for bank in (qo, kv, up, down))
        stacks = [torch.cat((qo[:n], kv[:n], kv[n:]), 1), self.attn_scale[:, :, None] * qo[n:], up,
                  self.mlp_scale[:, :, None] * down,
                  F.pad(self.q_gain, (0, groups), value=1.0)[:, :, None], self.resid_mix, self.par_resid, self.par_post]
        return [LayerWeights(*w) for w in
                zip(*([None] * n if stack is None else stack.to(self.dtype).unbind() for stack in stacks))]

    def attend(self, x: Tensor, w: LayerWeights, layer: int, rope: tuple[Tensor, Tensor],
               values: Tensor | None) -> Tensor:
        """Attention sublayer: [B, T, D] -> [B, T, D]; `values` [B, T, G, d] are added to its own."""
        heads, groups = self.config.num_heads, self.config.num_kv_heads
        qkv = self.project(x, w.qkv, f"attn_in.{layer}").unflatten(-1, (-1, self.config.head_dim))
        qk, v = qkv.split((heads + groups, groups), dim=2)
        if self.config.ve_layers and values is not None:
            v = v + values
        q, k = rotate(norm(qk, w.qk_gain), *rope).split((heads, groups), dim=2)
        y = causal_attention(q, k, v, self.attention)
        if layer >= self.config.num_layers - self.config.xsa_last_n:
            y = exclude_own_value(y, v)
        return self.project(y.flatten(2), w.out, f"attn_out.{layer}")

    def mlp(self, x: Tensor, w: LayerWeights, layer: int) -> Tensor:
        """MLP sublayer: [B, T, D] -> [B, T, D]."""
        hidden = SquaredLeakyReLU.apply(self.project(x, w.up, f"mlp_in.{layer}"))
        return self.project(hidden, w.down, f"mlp_hidden.{layer}")

    def block(self, lanes: list[Tensor], x0: Tensor, w: LayerWeights, v: VirtualLayer, rope: tuple[Tensor, Tensor],
              values: Tensor | None) -> list[Tensor]:
        """Run one physical layer on one residual stream or on two lanes, each [B, T, D]."""
        layer, depth_scale = v.layer, 1 / math.sqrt(v.layer + 1) if self.config.ln_scale else 1.0

        def mixed(lane: Tensor) -> Tensor:
            return torch.addcmul(w.resid_mix[0] * lane, w.resid_mix[1], x0)

        x = mixed(lanes[0])
        attn_out = self.attend(norm(x, depth_scale), w, layer, rope, values)
        if not v.parallel:
            x = x + attn_out
            return [x + self.mlp(norm(x, depth_scale), w, layer)]
        if self.config.parallel_residual == "plain":
            return [x + attn_out + self.mlp(norm(x, depth_scale), w, layer)]
        if self.config.parallel_residual == "lanes":  # PR #1395: attention has one lane, the MLP the other
            return [x + attn_out, lanes[1] + self.mlp(norm(lanes[1], depth_scale), w, layer)]
        # PR #1529: the mixes only feed the sublayers, the lanes themselves go on unmixed.
        mlp_out = self.mlp(norm(mixed(lanes[1]), depth_scale), w, layer)
        (a, b), post = w.par_resid, w.par_post
        return [(a * b) * lane + (b * post[0, k]) * attn_out + post[1, k] * mlp_out for k, lane in enumerate(lanes)]

    def merge_skip(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        """Join a popped encoder output with the decoder's stream, both [B, T, D]."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if not self.config.skip_gates_enabled:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[row]).to(x.dtype))

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> final normalized states [B, T, D], through the schedule in force."""
        weights = self.layer_weights()
        angles = rotary_angles(self.config, ids.size(1), ids.device)
        rope = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x0 = norm(F.embedding(ids, self.embedding).to(self.dtype))
        if self.config.smear_gate_enabled:
            x0 = smear(x0, ids, self.smear_gate)
        values = self.value_embedding(self, ids) if self.config.ve_layers else {}
        lanes, skips = [x0], []
        for v in self.schedules[self.looping]:
            if self.config.parallel_residual != "plain":
                lanes = lanes * 2 if v.parallel and len(lanes) == 1 else lanes
            if v.skip >= 0:  # with PR #1395's lanes the skip enters attention's alone
                skip, entered = skips.pop(), 1 if self.config.parallel_residual == "lanes" else len(lanes)
                lanes = [self.merge_skip(lane, skip, v.skip) for lane in lanes[:entered]] + lanes[entered:]
            lanes = self.block(lanes, x0, weights[v.layer], v, rope, values.get(v.layer))
            if v.push:
                skips.append(lanes[-1])
        if self.config.parallel_residual == "lanes" and len(lanes) > 1:
            return norm(torch.lerp(lanes[1], lanes[0], self.lane_merge.to(self.dtype)))
        return norm(lanes[-1])

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean training loss in nats per token of ids and targets, both [B, T]."""
        x = self.hidden(ids).flatten(0, 1)
        return SoftcapCrossEntropy.apply(x, self.embedding, targets.flatten(), self.config.logit_softcap)

    def head(self, x: Tensor) -> Tensor:
        """Softcapped logits of final states: [..., D] -> [..., V] fp32."""
        z = self.project(x, self.embedding.to(self.dtype), "head").float()
        return (z / self.config.logit_softcap).tanh_() * self.config.logit_softcap

    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Score: nats of each target [B, S] of the last S positions of ids [B, T], under the full softmax, fp32."""
        x, rows = self.hidden(ids)[:, -targets.size(1):].flatten(0, 1), HEAD_CHUNK_TOKENS[ids.device.type]
        nll = [F.cross_entropy(self.head(part), target, reduction="none")
               for part, target in zip(x.split(rows), targets.flatten().split(rows))]
        return torch.cat(nll).view_as(targets)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Optimizer: Muon for the banks, AdamW for the rest; schedules; weight averaging
# ----------------------------------------------------------------------------------------------------------------------


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Orthogonalize a batch of matrices [..., m, n] approximately: its singular values end between about 0.7 and 1.2.

    The quintic iteration of Muon (Jordan et al. 2024), with its coefficients, in `dtype`, the result's, too; runs on
    the short side.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def bind_gradients(params: list[Tensor]) -> Tensor:
    """Make every gradient a view into one flat buffer of zeros, fp32 [sum of sizes], which is returned."""
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, segment in zip(params, flat.split(sizes)):
        p.grad = segment.view_as(p)
    return flat


class Optimizer:
    """Muon on the banks and AdamW on everything else, the tables of tokens apart, for one rank and many.

    Gradients live in a buffer for each bank and one for all the rest. A step sums each bank's gradients into the rank
    that owns that slice of the bank (reduce-scatter), orthogonalizes the own slice, and gathers the updates behind the
    AdamW steps. A bank that the ranks cannot share evenly is padded with zero matrices, which an update leaves at zero.
    """

    def __init__(self, config: Config, rt: Runtime, model: GPT):
        """Lay the gradients of `model` into buffers of zeros and make the optimizer states."""
        self.config, self.rt = config, rt
        named = dict(model.named_parameters())
        self.banks = [p for name, p in named.items() if name.endswith("bank")]
        tables = [named[name] for name in TABLES if name in named]
        rest = [p for name, p in named.items() if not name.endswith(("bank", *TABLES))]
        padded = [-(-len(bank) // rt.world) * rt.world for bank in self.banks]
        self.bank_grads = [bank.new_zeros(n, *bank.shape[1:]) for n, bank in zip(padded, self.banks)]
        for bank, grad in zip(self.banks, self.bank_grads):
            bank.grad = grad[:len(bank)]
        self.small_grads = bind_gradients([*tables, *rest])
        self.momenta = [torch.zeros_like(g[:len(g) // rt.world]) for g in self.bank_grads]
        self.adamw = torch.optim.AdamW(
            [{"params": tables, "lr": config.tied_embed_lr, "weight_decay": config.embed_wd},
             {"params": rest, "lr": config.scalar_lr, "weight_decay": config.adam_wd}],
            betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.base_lrs = [group["lr"] for group in self.adamw.param_groups]

    def step(self, multiplier: float, momentum: float):
        """Average the gradients over ranks, clip them, update all weights, forget the gradients.

        `multiplier` is that of all learning rates. Nothing here waits for the device.
        """
        world = self.rt.world
        slices = [torch.empty_like(m) for m in self.momenta]
        pending = [reduce_scatter(s, g, async_op=True) for s, g in zip(slices, self.bank_grads)]
        pending.append(dist.all_reduce(self.small_grads, async_op=True))
        for work in pending:
            work.wait()
        torch._foreach_div_([*slices, self.small_grads], world)
        self.clip(slices)
        gathering = [self.muon_update(s, m, g, momentum) for s, m, g in zip(slices, self.momenta, self.bank_grads)]
        for group, base in zip(self.adamw.param_groups, self.base_lrs):
            group["lr"] = base * multiplier
        self.adamw.step()
        lr = self.config.matrix_lr * multiplier
        for bank, (update, work) in zip(self.banks, gathering):
            work.wait()
            scale = math.sqrt(max(1.0, bank.size(1) / bank.size(2)))
            bank.data.mul_(1 - lr * self.config.muon_wd).add_(update[:len(bank)], alpha=-lr * scale)
        torch._foreach_zero_([*self.bank_grads, self.small_grads])

    def clip(self, slices: list[Tensor]):
        """Bound the norm of the averaged gradient of all weights; one that is not finite becomes zero.

        So the weights are still finite when the loop, a step later, learns that the loss is not.
        """
        square = sum(s.square().sum() for s in slices)
        self.rt.all_reduce(square)
        total = (square + self.small_grads.square().sum()).sqrt()
        factor = ((self.config.grad_clip_norm or math.inf) / (total + 1e-6)).clamp(max=1.0).nan_to_num_(0.0)
        for grad in (*slices, self.small_grads):
            grad.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)

    def muon_update(self, grad: Tensor, buffer: Tensor, whole: Tensor,
                    momentum: float) -> tuple[Tensor, dist.Work]:
        """Orthogonalize the Nesterov momentum of the own slice [matrices / ranks, out, in].

        Returns the updates of the whole padded bank, the shape of `whole`, and the gathering of them under way.
        """
        buffer.mul_(momentum).add_(grad)
        update = grad.add(buffer, alpha=momentum)
        if self.config.muon_row_normalize:
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        update = newton_schulz(update, self.config.muon_backend_steps, self.rt.dtype).contiguous()
        gathered = torch.empty(whole.shape, dtype=update.dtype, device=update.device)
        return gathered, all_gather(gathered, update, async_op=True)


def half_cosine(frac: float) -> float:
    """1 at 0, falling along half a cosine to 0 at 1."""
    return (1 + math.cos(math.pi * frac)) / 2


def lr_multiplier(config: Config, frac: float) -> float:
    """Factor of all learning rates at `frac` of the budget: 1, then over WARMDOWN_FRAC linear to 0, MIN_LR at least.

    LR_SCHEDULE=cosine falls to MIN_LR by half a cosine instead.
    """
    left = (1 - frac) / config.warmdown_frac if frac > 1 - config.warmdown_frac else 1.0
    if config.lr_schedule == "cosine":
        return config.min_lr + (1 - config.min_lr) * half_cosine(1 - max(left, 0.0))
    return max(left, config.min_lr)


def momentum_at(config: Config, step: int) -> float:
    """Momentum at `step`: linear from the start value to MUON_MOMENTUM over the warm-up steps."""
    frac = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return (1 - frac) * config.muon_momentum_warmup_start + frac * config.muon_momentum


SWA_BELOW = 0.2  # learning-rate multiplier below which SWA takes snapshots


class WeightAverage:
    """Average of all weights over the steps, fp32: exponential (EMA_DECAY), or uniform over snapshots (SWA_EVERY)."""

    def __init__(self, config: Config, model: GPT):
        self.config, self.weights, self.snapshots = config, list(model.parameters()), 0
        self.average = [p.detach().clone() for p in self.weights]

    def update(self, step: int, multiplier: float):
        """Take in the weights after `step` steps, the last of which had this learning-rate multiplier."""
        share = 1 - self.config.ema_decay
        if self.config.swa_every:
            if multiplier >= SWA_BELOW or step % self.config.swa_every:
                return
            self.snapshots += 1
            share = 1 / self.snapshots
        torch._foreach_lerp_(self.average, [p.data for p in self.weights], share)

    def apply(self):
        """Put the average into the model, unless there is none yet."""
        if not self.config.swa_every or self.snapshots:
            torch._foreach_copy_([p.data for p in self.weights], self.average)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Training: warm-up, the loop, fine-tuning before quantization
# ----------------------------------------------------------------------------------------------------------------------


class Pulse:
    """What all ranks must agree on, once a step: the mean loss, rank 0's clock, and whether a signal came.

    The sum over ranks is sent before the optimizer's work and read after it, when it has long arrived: no step waits
    for the device, and the host is never more than one step ahead.
    """

    def __init__(self, rt: Runtime):
        self.rt, on_gpu = rt, rt.device.type == "cuda"
        self.host = torch.zeros(3, pin_memory=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None

    def send(self, loss: Tensor, seconds: float):
        """Begin to share this step's loss, the clock and the signal."""
        own = (seconds if self.rt.main else 0.0, float(self.rt.stop_signal))
        values = torch.stack([loss / self.rt.world, *(torch.full((), x, device=self.rt.device) for x in own)])
        self.rt.all_reduce(values)
        self.host.copy_(values, non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def read(self) -> tuple[float, float, float]:
        """Return (mean loss in nats, seconds, not 0 if any rank was told to stop) of the last step sent."""
        if self.arrived:
            self.arrived.synchronize()
        return tuple(self.host.tolist())


def descend(config: Config, rt: Runtime, loss_fn: Callable, optimizer: torch.optim.Optimizer, grads: Tensor,
            sequences: Tensor, frozen: Sequence[Tensor] = ()):
    """Go once through sequences [S, length + 1], TTT_BATCH_SEQS a step, of which each rank takes its share.

    `grads` is the buffer of all gradients; the parts of it that are `frozen` stay zero.
    """
    for batch in sequences.split(config.ttt_batch_seqs):
        grads.zero_()
        for part in rt.own(batch.long()).split(max(1, rt.micro_batch_tokens // (batch.size(1) - 1))):
            if len(part):
                (loss_fn(part[:, :-1], part[:, 1:]) * (len(part) / len(batch))).backward()
        rt.all_reduce(grads)
        for grad in frozen:
            grad.zero_()
        if config.ttt_grad_clip:
            grads *= (config.ttt_grad_clip / (grads.square().sum().sqrt() + 1e-6)).clamp(max=1.0)
        optimizer.step()


def backward_batch(loss_fn: Callable, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Accumulate the gradients of a rank's micro-batches; returns their mean loss, nats per token, on the device."""
    total = torch.zeros((), device=batch[0][0].device)
    for inputs, targets in batch:
        loss = loss_fn(inputs, targets) / len(batch)
        loss.backward()
        total += loss.detach()
    return total


def warm_up(config: Config, rt: Runtime, model: GPT, loss_fn: Callable, data: TrainData):
    """Compile every state of the model on training batches, then put the weights back: its effect is thrown away.

    The optimizer and its states are made for the warm-up alone; the order of the data is a function of the step.
    """
    if not config.warmup_steps:
        return
    states = [(False, False), (True, False), *([(True, True)] if config.late_qat_threshold else [])]
    rt.log(f"warm-up: {config.warmup_steps} steps in each of {len(states)} states")
    initial = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(config, rt, model)
    for step in rt.progress("warm-up", range(len(states) * config.warmup_steps)):
        model.looping, model.late_qat = states[step // config.warmup_steps]
        backward_batch(loss_fn, data.batch(step))
        optimizer.step(1.0, config.muon_momentum)
    model.looping = model.late_qat = False
    torch._foreach_copy_([p.data for p in model.parameters()], initial)


def train(config: Config, rt: Runtime, model: GPT, loss_fn: Callable, data: TrainData,
          validate: Callable[[], str]) -> tuple[int, float]:
    """Train until ITERATIONS or the budget is used up -> (steps, seconds); the model ends averaged, with its loops on.

    `validate` scores the validation split and returns the line to log; the clock stands still meanwhile.
    Raises RunStopped that names the step if the loss is not finite or a signal came; the weights then still are finite.
    """
    budget = config.max_wallclock_seconds - config.gptq_reserve_seconds if config.max_wallclock_seconds else None
    optimizer, average, pulse = Optimizer(config, rt, model), WeightAverage(config, model), Pulse(rt)
    begin, shown, step = rt.clock(), 0.0, 0
    while True:
        loss, seconds, stop = pulse.read()  # zeros before the first step
        if not math.isfinite(loss):
            raise RunStopped(f"the training loss is {loss} at step {step}: lower the learning rates", 1)
        frac = seconds / budget if budget else step / config.iterations
        done = step == config.iterations or frac >= 1
        rt.signals_wait = not done  # a signal ends what follows at once
        if stop or (done and rt.stop_signal):
            raise RunStopped(f"stopped by a signal after step {step}", 128 + int(rt.stop_signal or signal.SIGTERM))
        if step and (step <= 5 or step % config.train_log_every == 0 or seconds - shown > 30):
            shown = seconds
            rt.log(f"{step}/{config.iterations} train_loss: {loss:.4f} train_time: {seconds / 60:.1f}m "
                   f"tok/s: {step * config.train_batch_tokens / max(seconds, 1e-9):.0f}")
        if done or (config.val_loss_every and step and step % config.val_loss_every == 0):
            rt.signals_wait = False
            with rt.pause():
                rt.log(f"{step}/{config.iterations} {validate()}")
            rt.signals_wait = not done
        due = step >= config.recur_start_step if config.recur_start_step else frac >= config.enable_looping_at
        if not model.looping and config.num_loops and (due or done):  # the log tells, too, if they never ran
            model.looping = True
            halves = [[v.layer for v in model.schedules[True] if v.push == encoder] for encoder in (True, False)]
            rt.log(f"layer_loop:enabled step:{step} frac:{frac:.3f} encoder:{halves[0]} decoder:{halves[1]}")
            if not PACKED and done:
                rt.log("the loops did not run in training: RECUR_START_STEP or ENABLE_LOOPING_AT comes after its end")
        if done:
            break
        multiplier = lr_multiplier(config, frac)
        if config.late_qat_threshold and not model.late_qat and multiplier < config.late_qat_threshold:
            model.late_qat = True
            rt.log(f"late_qat:enabled step:{step} frac:{frac:.3f}")
        step_loss = backward_batch(loss_fn, data.batch(step))
        pulse.send(step_loss, time.perf_counter() - rt.paused - begin)
        optimizer.step(multiplier, momentum_at(config, step))
        step += 1
        average.update(step, multiplier)
    seconds = rt.clock() - begin
    if step < config.iterations:
        rt.log(f"stopping_early: wallclock_cap train_time: {seconds * 1000:.0f}ms step: {step}/{config.iterations}")
    average.apply()
    model.late_qat = False
    return step, seconds


def prequant_ttt(config: Config, rt: Runtime, model: GPT, loss_fn: Callable, sequences: Tensor):
    """Fine-tune on sequences [S, length + 1] (PR #1517): AdamW for some epochs, without the first layers.

    Its learning rate falls by a cosine over the epochs, to a tenth.
    """
    params = list(model.parameters())
    grads = bind_gradients(params)
    layered = (*GPT.BANKS, "resid_mix", "attn_scale", "mlp_scale", "q_gain", "par_resid", "par_post")
    frozen = [p.grad.unflatten(0, (-1, config.num_layers))[:, :config.prequant_ttt_freeze_blocks]  # q and o, k and v
              for p in (getattr(model, name) for name in layered) if p is not None]
    optimizer = torch.optim.AdamW(params, lr=config.prequant_ttt_lr, weight_decay=0.0)
    for epoch in rt.progress("prequant_ttt", range(config.prequant_ttt_epochs)):
        share = 0.1 + 0.9 * half_cosine(epoch / config.prequant_ttt_epochs)
        optimizer.param_groups[0]["lr"] = config.prequant_ttt_lr * share
        descend(config, rt, loss_fn, optimizer, grads, sequences, frozen)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Quantization: Hessians and sensitivities from training data; GPTQ with trellis-coded columns, or with row scales
# ----------------------------------------------------------------------------------------------------------------------

KEPT_FP16_ELEMENTS = 65536  # tensors (whole banks) of at most so many elements are stored as fp16


def small_tensors(model: GPT) -> dict[str, Tensor]:
    """The parameters that are no matrices or have at most KEPT_FP16_ELEMENTS: they become fp16, on the CPU."""
    return {name: p.detach().half().cpu() for name, p in model.named_parameters()
            if not name.endswith(("bank", *TABLES)) or p.numel() <= KEPT_FP16_ELEMENTS}


@torch.no_grad()
def collect_hessians(config: Config, rt: Runtime, model: GPT, data: TrainData) -> dict[str, Tensor]:
    """Mean of x x^T over training tokens for every input x of a matrix product: {site: [in, in] fp32}.

    A site that the loops visit several times averages over all visits. The embedding's site, `head`, sees the final
    normalized states. GPTQ_CALIBRATION_BATCHES counts eighths of a global batch, what one of eight GPUs trains on in a
    step; each rank takes its slice of those global batches, and the sums are added.
    """
    sums, counts = {}, {}

    def observed(x: Tensor, matrix: Tensor, site: str) -> Tensor:
        rows = x.flatten(0, -2).float()
        sums[site] = torch.addmm(sums.get(site, rows.new_zeros(())), rows.t(), rows)
        counts[site] = counts.get(site, 0) + len(rows)
        return F.linear(x, matrix)

    model.project = observed  # shadows the method on this one model
    for number in rt.progress("calibration", range(math.ceil(config.gptq_calibration_batches / 8))):
        for inputs, _ in data.batch(number):
            x = model.hidden(inputs)
            observed(x, x[:0, 0], "head")  # no logits are needed: a matrix without rows
    del model.project
    for site, total in sums.items():
        rt.all_reduce(total)
        total /= counts[site] * rt.world
    return sums


def collect_sensitivities(config: Config, rt: Runtime, model: GPT, data: TrainData) -> dict[str, Tensor]:
    """How much an error at a matrix product's outputs costs: {site: scalar fp32}.

    The mean over training tokens and outputs of the squared gradient of the sequence's loss (nats, a sum) at a token's
    output, summed over a site's visits: by the Fisher information, an error E of a matrix costs about
    sensitivity / 2 * tr(E H E^T) nats per token. Measured on one in eight of the Hessians' global batches.
    """
    sums = {}

    def watched(x: Tensor, matrix: Tensor, site: str) -> Tensor:
        y = F.linear(x, matrix)
        total = sums.setdefault(site, torch.zeros((), device=y.device))

        def add(grad: Tensor):
            total.add_(grad.float().square().mean(-1).sum())

        y.register_hook(add)
        return y

    tokens, model.project = 0, watched
    model.requires_grad_(False).embedding.requires_grad_(True)  # gradients flow, but none of the matrices' own is made
    for number in range(0, math.ceil(config.gptq_calibration_batches / 8), 8):
        for batch in data.batch(number):
            for ids, targets in zip(*(t.split(-(-len(t) // 4)) for t in batch)):  # uncompiled, so it needs more memory
                model.nll(ids, targets).sum().backward()
                tokens += ids.numel()
    del model.project
    model.requires_grad_(True)
    for total in sums.values():
        rt.all_reduce(total)
        total /= tokens * rt.world
    return sums


def mean_diagonal(hessian: Tensor) -> Tensor:
    """Mean of the diagonal of hessian [..., in, in] -> [..., 1]."""
    return hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)


class ErrorFactor(NamedTuple):
    """How the error of one column is best made up for by later ones."""

    order: Tensor  # [..., in]: columns by falling diag(hessian)
    upper: Tensor  # [..., in, in]: upper Cholesky factor of the damped hessian's inverse, in that order
    dead: Tensor  # [..., in]: inputs that are always zero

    def log2_diagonal(self) -> Tensor:
        """log2 of the diagonal of `upper`, [..., in], in the hessian's own order of columns."""
        diagonal = self.upper.diagonal(dim1=-2, dim2=-1).log2()
        return torch.empty_like(diagonal).scatter_(-1, self.order, diagonal)


def error_factor(hessian: Tensor, damping: Tensor) -> ErrorFactor:
    """Factorize hessian [..., in, in] with `damping` [..., 1] added to its diagonal, in fp64; the factor is fp32.

    Raises torch.linalg.LinAlgError if it is not positive definite then (it holds NaN, say).
    """
    h = hessian.to(torch.float64, copy=True)  # fp32 has too few digits for inputs that are nearly all alike
    diagonal = h.diagonal(dim1=-2, dim2=-1)  # a view: writing to it writes to h
    dead = diagonal == 0
    diagonal += damping + dead  # a dead input gets a one, so h stays invertible
    order = diagonal.sort(descending=True, stable=True).indices
    h = h.gather(-2, order[..., None].expand_as(h)).gather(-1, order[..., None, :].expand_as(h))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return ErrorFactor(order, upper.float(), dead)


def round_with_feedback(weight: Tensor, factor: ErrorFactor, step: Tensor, rounding: Callable) -> Tensor:
    """Round weight [..., out, in] by GPTQ in the factor's order of columns -> integers of that shape, fp32.

    step [..., out or 1, 1 or in] in the weight's own order; `rounding` turns columns, the factor's `upper` and steps,
    [..., out, in], all in its order, into integers: round_blocks with a rule for one column, or round_paths.
    """
    order = factor.order[..., None, :].expand_as(weight)
    w = weight.masked_fill(factor.dead[..., None, :], 0).gather(-1, order)
    integers = rounding(w, factor.upper, step.expand_as(w).gather(-1, order))
    return torch.empty_like(integers).scatter_(-1, order, integers)


def round_blocks(choose: Callable[[Tensor], Tensor], w: Tensor, upper: Tensor, step: Tensor,
                 block: int = 128) -> Tensor:
    """Round columns w [..., out, in] one after another, errors fed forward; `choose` gets a column over its steps.

    To the columns of later blocks all errors of a block are fed at once, by a matrix product.
    """
    integers = torch.empty_like(w)
    for begin in range(0, w.size(-1), block):
        end = min(begin + block, w.size(-1))
        part, errors = w[..., begin:end].clone(), torch.empty_like(w[..., begin:end])
        u = upper[..., begin:end, begin:end]
        for j in range(end - begin):
            column, size = part[..., j:j + 1], step[..., begin + j:begin + j + 1]
            integer = choose(column / size)
            error = (column - integer * size) / u[..., j:j + 1, j:j + 1]
            part[..., j:] -= error * u[..., j:j + 1, j:]
            integers[..., begin + j:begin + j + 1], errors[..., j:j + 1] = integer, error
        w[..., end:] -= errors @ upper[..., begin:end, end:]
    return integers


# Trellis-coded quantization (Marcellin and Fischer 1990). A column is coded from top to bottom in paths of TRELLIS_ROWS
# entries, each from state 0. Even states may take even multiples of the step, odd states odd ones: an entry of index k
# is (2 * k + state % 2) * step, and the parity of k chooses the next state, by Ungerboeck's code of 32 states (1982:
# parity checks 45 and 10, octal). An entry's bits are those of a spacing of two steps, its error that of a smaller one:
# 0.5 dB above Shannon's bound instead of a scalar quantizer's 1.5.
TRELLIS_ROWS = 128  # TRELLIS_SOURCE has this number, and the states', too
STATES = np.arange(32)[:, None]
NEXT_STATE = STATES >> 1 ^ STATES % 2 * (0o45 >> 1) ^ np.array([0, 0o10 >> 1])  # [state, parity of the index]
SENSITIVITY_POWER = 0.8  # of a matrix's sensitivity in the cost of its errors: better than 1 and 0.9, measured
STEPS_PER_OCTAVE = 4  # resolution of a column's step and of a row's spread; `column_steps` has this number, too
MOST_BITS = 6.0  # per weight: finer steps gain nothing that a score could show


def trellis_round(values: Tensor) -> Tensor:
    """Round each path of values [paths, rows], in steps, on the CPU, to the nearest path's integers (Viterbi 1967)."""
    edges = np.lexsort((np.arange(2 * len(NEXT_STATE)) % 2, NEXT_STATE.ravel()))  # to each state, even and odd index
    source, residue = edges // 2, edges // 2 % 2 + 2 * (edges % 2)  # residue: the integer modulo 4
    y, residues = values.numpy().T[:, None], np.arange(4, dtype=values.numpy().dtype)[:, None]
    nearest = np.rint((y - residues) / 4) * 4 + residues  # [rows, 4, paths]: the nearest of each residue
    error = (y - nearest) ** 2
    cost = np.full((len(NEXT_STATE), y.shape[2]), np.inf, y.dtype)
    cost[0] = 0
    second = np.empty((len(y), *cost.shape), bool)  # whether the second of the two edges is the better one
    for t in range(len(y)):
        one, other = (cost[source[i::2]] + error[t, residue[i::2]] for i in (0, 1))
        np.less(other, one, out=second[t])
        cost = np.minimum(one, other)
    state, path = cost.argmin(0), np.arange(y.shape[2])
    chosen = np.empty((len(y), 1, y.shape[2]), np.int64)
    for t in reversed(range(len(y))):
        edge = 2 * state + second[t, state, path]
        state, chosen[t] = source[edge], residue[edge]
    return torch.from_numpy(np.take_along_axis(nearest, chosen, 1)[:, 0].T)


def round_columns(y: Tensor) -> Tensor:
    """Round columns [..., out, 1], given in steps, along trellis paths."""
    rounded, rows = torch.empty_like(y), y.size(-2)
    whole = rows - rows % TRELLIS_ROWS  # the last path may be shorter
    for part, length in ((slice(whole), TRELLIS_ROWS), (slice(whole, rows), max(rows - whole, 1))):
        paths = y[..., part, 0].unflatten(-1, (-1, length))
        rounded[..., part, 0] = trellis_round(paths.flatten(0, -2)).view(paths.shape).flatten(-2)
    return rounded


# GPTQ of the rows of one path: each column by Viterbi's algorithm, then its errors fed forward; integers take the
# weights' place. State s is reached from `from[s]` by an even index, from `from[s] ^ 8` by an odd one (NEXT_STATE).
TRELLIS_SOURCE = r"""
#include <math.h>
void round_path(float *w, float *upper, float *step, int rows, int columns) {
    float cost[2][32], error[4], nearest[128][4];
    char odd[128][32], from[32];
    for (int s = 0; s < 32; s++)
        from[s] = (s ^ s / 16 * 2) % 16 * 2 + s / 16;
    for (int j = 0; j < columns; j++) {
        for (int s = 0; s < 32; s++)
            cost[0][s] = s ? INFINITY : 0;
        for (int t = 0; t < rows; t++) {
            float y = w[t * columns + j] / step[j], *before = cost[t % 2], *after = cost[1 - t % 2];
            for (int r = 0; r < 4; r++) {
                float x = nearest[t][r] = rintf((y - r) / 4) * 4 + r;
                error[r] = (y - x) * (y - x);
            }
            for (int s = 0; s < 32; s++) {
                float even = before[from[s]] + error[s / 16], other = before[from[s] ^ 8] + error[s / 16 + 2];
                odd[t][s] = other < even;
                after[s] = other < even ? other : even;
            }
        }
        int s = 0;
        for (int i = 1; i < 32; i++)
            s = cost[rows % 2][i] < cost[rows % 2][s] ? i : s;
        for (int t = rows; t--; s = from[s] ^ 8 * odd[t][s]) {
            float *row = w + t * columns, x = nearest[t][2 * odd[t][s] + s / 16];
            float e = (row[j] - x * step[j]) / upper[j * columns + j];
            for (int k = j; k < columns; k++)
                row[k] -= e * upper[j * columns + k];
            row[j] = x;
        }
    }
}
"""


def round_paths(w: Tensor, upper: Tensor, step: Tensor) -> Tensor:
    """Do what round_blocks does with round_columns and one block, to the last bit, in C, on all cores.

    w, step [matrices, out, in], upper [matrices, in, in], fp32 on the CPU; step the same in all rows of a matrix. The
    integers take w's place. Raises UsageError if there is no C compiler.
    """
    upper, round_path = upper.contiguous(), c_library(TRELLIS_SOURCE).round_path
    paths = [path for rows in w.split(TRELLIS_ROWS, 1) for path in zip(rows, upper, step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # C runs without the interpreter's lock
        list(pool.map(lambda path: round_path(*(ctypes.c_void_p(x.data_ptr()) for x in path), *path[0].shape), paths))
    return w


def choose_rounding(rt: Runtime) -> Callable:
    """Return round_paths or, where there is no C compiler, what gives the same bits much more slowly."""
    try:
        c_library(TRELLIS_SOURCE)
        return round_paths
    except UsageError as error:
        rt.log(f"trellis: the same bits in numpy, much more slowly ({' '.join(str(error).split())})")  # on one line
        return lambda w, *others: round_blocks(round_columns, w, *others, block=w.size(-1))


def column_steps(step: Tensor, columns: Tensor) -> Tensor:
    """Steps [..., 1, in] from a matrix's step [...] and its columns' exponents [..., in], the same bits everywhere."""
    fractions = torch.tensor([1.0, 2**0.25, 2**0.5, 2**0.75], device=columns.device)
    exponents = columns.to(torch.int32)
    return torch.ldexp(step[..., None] * fractions[exponents & 3], exponents >> 2)[..., None, :]


class TrellisQuantizer:
    """Quantizes all matrices with steps that share one factor.

    Rate allocation by reverse water-filling: with each matrix's Hessian times (nearly) its sensitivity, an error costs
    error^2 / diagonal(U)^2 at every entry, U being GPTQ's factor, so every column's step is in proportion to
    diagonal(U) (WaterSIC, arXiv 2603.04956), and the bits follow from the weights' spread. A Hessian is damped by what
    an entry's error costs over the variance of its weights: directions that cost less are not worth a bit.
    The ranks share each bank's matrices. Columns come one after another and a path's entries, too: so many small
    operations are faster on the CPU.
    """

    def __init__(self, rt: Runtime, model: GPT, hessians: dict[str, Tensor], sensitivities: dict[str, Tensor]):
        """Sort out this rank's matrices and find the mean spread of all weights in steps of factor 1."""
        self.rt, self.small, self.parts, sites = rt, small_tensors(model), [], model.matrix_sites()
        self.rounding = round_paths if PACKED else choose_rounding(rt)
        self.weights, spreads = 0, torch.zeros((), dtype=torch.float64)
        for name, p in model.named_parameters():
            if name in self.small:
                continue
            weight, hessian = p.detach().view(-1, *p.shape[-2:]).cpu(), None
            own = rt.own(weight)
            if len(own):
                hessian = torch.stack([hessians[site] * sensitivities[site].clamp_min(1e-20) ** SENSITIVITY_POWER
                                       for site in rt.own(sites[name])])
                levels = error_factor(hessian, 1e-3 * mean_diagonal(hessian)).log2_diagonal().cpu()
                spread = own.std(-1).clamp_min(1e-12).log2() - levels.mean(-1, keepdim=True)
                spreads += weight.size(-1) * spread.double().sum()
            self.parts.append((name, weight, hessian))
            self.weights += weight.numel()
        spreads = spreads.to(rt.device)
        rt.all_reduce(spreads)
        self.weights = max(self.weights, 1)  # a very small model may have none to quantize
        self.mean_spread = float(spreads) / self.weights

    def log_step_for(self, bits: float) -> float:
        """log2 of the steps' common factor at which a weight takes about `bits`, from a Gaussian's entropy."""
        return self.mean_spread + 1.05 - bits  # log2(2 pi e) / 2 less one: a unit of the index is two steps

    @torch.no_grad()
    def quantize(self, log_step: float) -> dict[str, Tensor]:
        """Make the artifact's tensors, on the CPU, with steps of 2^log_step * diagonal(U).

        A quantized parameter P of shape [..., out, in] becomes `P.q` (int32 [matrices, out, in], multiples of steps),
        `P.step` (fp32 [matrices]), `P.columns` (int8 [matrices, in]: a column's step is step * 2^(columns / 4)) and
        `P.rows` (int8 [matrices, out]: a row's spread is step * 2^(rows / 4), for the coder); a small one stays (fp16).
        """
        tensors = dict(self.small)
        for name, weight, hessian in self.rt.progress("trellis", self.parts):
            own = self.rt.own(weight)
            q = torch.zeros(weight.shape, dtype=torch.int32)
            side = [torch.zeros(len(weight), n) for n in (1, weight.size(2), weight.size(1))]
            if len(own):
                mean, variance = mean_diagonal(hessian), own.var(-1).mean(-1, keepdim=True).clamp_min(1e-30)
                cost = 0.16 * 4**log_step / variance  # measured; an error's mean square is 0.27 of a squared step
                factor = error_factor(hessian, torch.clamp(cost.to(mean), 1e-4 * mean, mean))
                factor = ErrorFactor(*(t.cpu() for t in factor))
                levels = factor.log2_diagonal()
                level = levels.mean(-1, keepdim=True)
                step = torch.exp2(level + log_step)
                columns = (STEPS_PER_OCTAVE * (levels - level)).round_().clamp_(-128, 127).to(torch.int8)
                integers = round_with_feedback(own, factor, column_steps(step[:, 0], columns), self.rounding)
                rows = STEPS_PER_OCTAVE * (own.std(-1).clamp_min(1e-30).log2() - step.log2())
                for whole, part in zip((q, *side), (integers, step, columns, rows.round().clamp(-128, 127))):
                    self.rt.own(whole).copy_(part)
            shared = [whole.to(self.rt.device) for whole in (q, *side)]
            for whole in shared:
                self.rt.all_reduce(whole)
            q, step, columns, rows = (whole.cpu() for whole in shared)
            if q.float().abs().max() >= 2**24:  # fp32, in which a path is sought, has no odd numbers from there on
                raise RunStopped(f"{name}'s weights are too large beside others' for steps of one factor", 1)
            tensors |= {f"{name}.q": q, f"{name}.step": step[:, 0],
                        f"{name}.columns": columns.to(torch.int8), f"{name}.rows": rows.to(torch.int8)}
        return tensors


def gptq_quantize(weight: Tensor, hessian: Tensor, bits: int = 6, clip_sigmas: float = 12.85, damping: float = 0.01,
                  block: int = 128) -> tuple[Tensor, Tensor]:
    """Round a batch of matrices to `bits`-bit integers, each column's error fed forward to the columns after it.

    weight [..., out, in] and hessian [..., in, in] (mean of x x^T of its inputs) -> integers int8 [..., out, in] in
    [-(2^(bits-1) - 1), 2^(bits-1) - 1] and row scales fp16 [..., out]; the matrix is about integers * scale.

    GPTQ (Frantar et al. 2022) in the order of falling diag(hessian): with U the upper Cholesky factor of the damped
    hessian's inverse, column j's error over U[j, j], times U[j, k], is taken from every later column k. SDClip: the
    scale of a row is clip_sigmas standard deviations over the largest integer.
    Raises torch.linalg.LinAlgError if the damped hessian is not positive definite (it holds NaN, say).
    """
    w, top = weight.float(), 2 ** (bits - 1) - 1
    scale = row_scale(w, bits, clip_sigmas).half()
    step = scale.float()  # [..., out, 1]
    factor = error_factor(hessian, damping * mean_diagonal(hessian))
    integers = round_with_feedback(w, factor, step, functools.partial(
        round_blocks, lambda y: y.round().clamp(-top, top), block=block))
    return integers.to(torch.int8), scale.squeeze(-1)


@torch.no_grad()
def quantize_rows(config: Config, rt: Runtime, model: GPT, hessians: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the model's weights into the artifact's tensors, on the CPU, as PR #1541 does (QUANTIZER=sdclip).

    A quantized parameter P [..., out, in] becomes `P.q` (int8, of its shape) and `P.scale` (fp16 [..., out]); a small
    one stays P (fp16).
    """
    tensors, sites = small_tensors(model), model.matrix_sites()
    for name, p in rt.progress("GPTQ", list(model.named_parameters())):
        if name not in tensors:
            bits, clip_sigmas = ((config.embed_bits, config.embed_clip_sigmas) if name in TABLES else
                                 (config.matrix_bits, config.matrix_clip_sigmas))
            if name in sites and (name != "embedding" or config.embed_gptq_enabled):
                hessian = torch.stack([hessians[site] for site in sites[name]])
            else:  # no error to feed forward: rounding to the nearest
                hessian = torch.eye(p.size(-1), device=p.device)[None]
            integers, scale = gptq_quantize(p.view(len(hessian), *p.shape[-2:]), hessian, bits, clip_sigmas)
            tensors[f"{name}.q"] = integers.view(p.shape).cpu()
            tensors[f"{name}.scale"] = scale.reshape(p.shape[:-1]).cpu()
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# 8. Artifact: a container of its own, from which nothing is ever executed; the entropy coder; the fit to the cap
# ----------------------------------------------------------------------------------------------------------------------
#
#   magic "PGLF" | version u16 | header bytes u32 | SHA-256 of these two and of all that follows
#   header: JSON, Brotli-compressed: {settings, compressor, tensors: [[name, dtype, shape], ...], streams: [bytes, ...]}
#   streams: the tensors in the header's order, one plane per byte of the dtype, those of one dtype together and cut
#   into pieces that are compressed each on its own (so that all cores work)

ARTIFACT_NAME, ARTIFACT_MAGIC, ARTIFACT_VERSION = "final_model.ptz", b"PGLF", 3
ARTIFACT_BODY = 4 + 2 + 4 + 32  # where the header begins: magic, version, its bytes, SHA-256
PIECE_BYTES, MAX_RAW_BYTES, MAX_WEIGHTS = 4 << 20, 1 << 30, 1 << 28
ARTIFACT_DTYPES = {name: getattr(torch, name) for name in ("int8", "int16", "int32", "float16", "float32")}
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]


class ArtifactError(ValueError):
    """The file is no artifact of this script, or not the one that was written."""


def compress(data: bytes, compressor: str) -> bytes:
    """Compress one piece; data that hardly shrinks is not tried at the best quality."""
    if compressor == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    quick = brotli.compress(data, quality=0)
    return quick if len(quick) > 0.99 * len(data) else brotli.compress(data, quality=11, lgwin=24)


def decompress(data: bytes, compressor: str, size: int) -> bytes:
    """Undo `compress`, never producing much more than `size` bytes; raise ArtifactError unless it is exactly that."""
    if compressor == "lzma":
        raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(data, max_length=size + 1)
        finished = True
    else:
        stream = brotli.Decompressor()
        raw = stream.process(data, output_buffer_limit=size + 1)
        finished = stream.is_finished()
    if len(raw) != size or not finished:
        raise ArtifactError(f"a stream of the artifact should hold {size} bytes, but does not")
    return raw


def cut(size: int) -> list[int]:
    """Lengths of the pieces that `size` bytes are cut into."""
    return [min(PIECE_BYTES, size - begin) for begin in range(0, size, PIECE_BYTES)]


def byte_planes(tensor: Tensor) -> bytes:
    """A tensor's little-endian bytes, all first bytes, then all second bytes, ..."""
    array = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


# Trellis indices are coded by range asymmetric numeral systems (Duda 2013) in interleaved lanes, each a 32-bit state
# that gives off 16-bit words: whole numbers only, so the same bits on every platform. An index becomes a symbol: itself
# if it is small, else its bit length; the other bits go to the escapes. Its distribution is the histogram of
# its context: the class (how many steps its row and column make likely) and whether it stands for an odd multiple.
# An integer and its negative are equally likely: they share a level, which is stored in eighths of an octave.
FREQUENCY_BITS, DIRECT_BITS, SYMBOLS = 14, 6, 96
CLASSES, CLASS_OF_ONE = 64, 16  # a class is a quarter octave of the spread in steps; CLASS_OF_ONE: of one step
LEVEL_OF_SYMBOL = np.array([[(z + 1 - odd) // 2 if z < 1 << DIRECT_BITS else z for z in range(SYMBOLS)]
                            for odd in (0, 1)])
EIGHTHS = np.array([round(2**(16 + i / 8)) for i in range(8)])
LEAST_STATE = 1 << 16
CODE_TENSORS = ("code.levels", "code.escapes", "code.states", "code.words")


def symbols_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn int32 values into symbols below SYMBOLS and, in their order, the escapes (uint32) of those not small."""
    z = ((values << 1) ^ (values >> 31)).view(np.uint32)  # 0, -1, 1, -2, 2, ... -> 0, 1, 2, 3, 4, ...
    bits = np.frexp(z.astype(np.float64))[1] - 1  # of the leading one
    large = bits >= DIRECT_BITS
    return np.where(large, bits - DIRECT_BITS + (1 << DIRECT_BITS), z), z[large] - (1 << bits[large]).astype(np.uint32)


def values_of(symbols: np.ndarray, escapes: np.ndarray) -> np.ndarray:
    """Undo symbols_of; `escapes` holds as many as there are symbols that need one."""
    z = symbols.astype(np.int64)
    large = z >= 1 << DIRECT_BITS
    z[large] = (1 << (z[large] - (1 << DIRECT_BITS) + DIRECT_BITS)) + escapes
    return ((z >> 1) ^ -(z & 1)).astype(np.int32)


def histogram_levels(counts: np.ndarray) -> np.ndarray:
    """Turn counts [CLASSES, 2, SYMBOLS] into levels int8 of that shape.

    127 stands for the most frequent, 8 less for each halving, 0 for never seen.
    """
    shares = LEVEL_OF_SYMBOL[:, :, None] == np.arange(SYMBOLS)  # [2, symbol, level]
    mean = np.einsum("cpz,pzl->cpl", counts, shares) / np.maximum(shares.sum(1), 1)
    below = np.log2(np.maximum(mean, 1e-9) / np.maximum(mean.max(2, keepdims=True), 1e-9))
    return np.where(mean > 0, (127 + 8 * below).round().clip(1, 127), 0).astype(np.int8)


def frequency_tables(levels: np.ndarray) -> np.ndarray:
    """Frequencies [2 * CLASSES, SYMBOLS] that add up to 2^FREQUENCY_BITS wherever a context has any level."""
    levels = np.take_along_axis(levels.astype(np.int64), LEVEL_OF_SYMBOL[None], 2).reshape(-1, SYMBOLS)
    mass = np.where(levels > 0, EIGHTHS[levels & 7] << (levels >> 3), 0)
    total = mass.sum(1, keepdims=True)
    scaled = np.maximum((mass << FREQUENCY_BITS) // np.maximum(total, 1), mass > 0)
    scaled[np.arange(len(scaled)), scaled.argmax(1)] += np.where(total[:, 0], (1 << FREQUENCY_BITS) - scaled.sum(1), 0)
    return scaled.astype(np.uint32)


def rans_encode(chunks: list[np.ndarray], tables: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Code chunks of context * SYMBOLS + symbol under frequency_tables -> (states uint32 [lanes], words uint16)."""
    start = (np.cumsum(tables, 1, dtype=np.uint32) - tables).ravel()
    frequency, state, words = tables.ravel(), np.full(lanes, LEAST_STATE, np.uint32), []
    for chunk in reversed(chunks):  # the decoder goes forward, so the encoder goes back
        for begin in reversed(range(0, len(chunk), lanes)):
            index = chunk[begin:begin + lanes]
            f, x = frequency[index], state[:len(index)]
            full = x >> (32 - FREQUENCY_BITS) >= f
            words.append(x[full].astype(np.uint16))
            x = np.where(full, x >> 16, x)
            state[:len(index)] = x + x // f * ((1 << FREQUENCY_BITS) - f) + start[index]  # one division, no remainder
    return state, np.concatenate([np.empty(0, np.uint16), *reversed(words)])


class RansDecoder:
    """Reads back what rans_encode wrote, chunk by chunk."""

    def __init__(self, state: np.ndarray, words: np.ndarray, tables: np.ndarray):
        self.state, self.words, self.at = state.copy(), words, 0
        self.start, self.frequency = (np.cumsum(tables, 1, dtype=np.uint32) - tables).ravel(), tables.ravel()
        self.symbol = np.zeros((len(tables), 1 << FREQUENCY_BITS), np.uint8)
        for row, f in zip(self.symbol, tables):
            row[:f.sum()] = np.repeat(np.arange(SYMBOLS), f)

    def read(self, contexts: np.ndarray) -> np.ndarray:
        """Decode one chunk: its contexts [n] -> its symbols [n]; raise ValueError where the words end too early."""
        symbols, lanes = np.empty(len(contexts), np.uint8), len(self.state)
        for begin in range(0, len(contexts), lanes):
            context = contexts[begin:begin + lanes]
            x = self.state[:len(context)]
            slot = x & ((1 << FREQUENCY_BITS) - 1)
            symbols[begin:begin + lanes] = symbol = self.symbol[context, slot]
            index = context * SYMBOLS + symbol
            x = self.frequency[index] * (x >> FREQUENCY_BITS) + slot - self.start[index]
            low = np.flatnonzero(x < LEAST_STATE)
            words = self.words[self.at:self.at + len(low)]
            x[low] = x[low] << 16 | words
            self.at += len(low)
            self.state[:len(context)] = x
        return symbols


def trellis_contexts(tensors: Mapping[str, Tensor], name: str) -> np.ndarray:
    """Context of each entry of NAME.q in an even state, int16 [matrices, out, in]; in an odd state it is one more."""
    rows, columns = (tensors[f"{name}.{side}"].numpy().astype(np.int16) for side in ("rows", "columns"))
    if rows.shape[:-1] != columns.shape[:-1]:
        raise ArtifactError(f"the rows and columns of {name} differ in their number of matrices")
    return 2 * (rows[..., None] - columns[..., None, :] + CLASS_OF_ONE).clip(0, CLASSES - 1)


def lanes_for(indices: int) -> int:
    """How many lanes code so many indices: each takes 4 bytes, and few of them take long."""
    return min(max(indices >> 15, 1), 1024)


def encode_trellises(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the integers NAME.q of all trellis tensors, those with NAME.rows and NAME.columns, by their code."""
    plain, chunks, escapes = dict(tensors), [], []
    for name in sorted(name[:-8] for name in tensors if name.endswith(".columns")):
        q, contexts = plain.pop(f"{name}.q").numpy(), trellis_contexts(tensors, name)
        for t in range(min(TRELLIS_ROWS, q.shape[-2])):
            part = q[..., t::TRELLIS_ROWS, :]  # row t of every path: indices, and whether they stand for odd multiples
            symbols, more = symbols_of(part >> 1)
            context = contexts[..., t::TRELLIS_ROWS, :] + (part & 1)
            chunks.append((context * SYMBOLS + symbols).ravel().astype(np.int32))
            escapes.append(more.view(np.int32))
    if chunks:
        counts = sum(np.bincount(chunk, minlength=2 * CLASSES * SYMBOLS) for chunk in chunks)
        levels = histogram_levels(counts.reshape(-1, 2, SYMBOLS))
        states, words = rans_encode(chunks, frequency_tables(levels), lanes_for(sum(map(len, chunks))))
        code = (levels, np.concatenate(escapes), states.view(np.int32), words.view(np.int16))
        plain |= zip(CODE_TENSORS, map(torch.from_numpy, code))
    return plain


def decode_trellises(tensors: dict[str, Tensor]):
    """Undo encode_trellises, in place; raise ArtifactError if the code does not give just the trellis tensors."""
    names = sorted(name[:-8] for name in tensors if name.endswith(".columns"))
    if not names:
        return
    levels, escapes, states, words = (tensors.pop(name).numpy() for name in CODE_TENSORS)
    if levels.dtype != np.int8 or levels.shape != (CLASSES, 2, SYMBOLS) or levels.min() < 0:
        raise ArtifactError("the entropy coder's histograms are invalid")
    decoder, at = RansDecoder(states.view(np.uint32), words.view(np.uint16), frequency_tables(levels)), 0
    count = sum(tensors[f"{name}.rows"].numel() * tensors[f"{name}.columns"].size(-1) for name in names)
    if len(states) != lanes_for(count) or count > MAX_WEIGHTS:
        raise ArtifactError("the number of lanes does not fit, or there are too many indices")
    for name in names:
        contexts = trellis_contexts(tensors, name)
        q, state = np.empty(contexts.shape, np.int32), np.zeros_like(contexts[..., ::TRELLIS_ROWS, :])
        for t in range(min(TRELLIS_ROWS, q.shape[-2])):
            context = contexts[..., t::TRELLIS_ROWS, :]
            state = state[..., :context.shape[-2], :]  # the last path may be shorter
            symbols = decoder.read((context + (state & 1)).ravel())
            begin, at = at, at + np.count_nonzero(symbols >= 1 << DIRECT_BITS)
            indices = values_of(symbols, escapes[begin:at].view(np.uint32)).reshape(context.shape)
            q[..., t::TRELLIS_ROWS, :] = 2 * indices + (state & 1)
            state = NEXT_STATE[state, indices & 1]
        tensors[f"{name}.q"] = torch.from_numpy(q)
    if decoder.at != len(words) or at != len(escapes) or (decoder.state != LEAST_STATE).any():
        raise ArtifactError("the coded indices do not end where they should")


def pack_artifact(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bytes:
    """Serialize tensors and a JSON-able header; `header["compressor"]` says how (brotli, lzma).

    Raises TypeError for dtypes but int8, int16, int32, fp16 and fp32. `unpack_artifact` gives both back.
    """
    names = {dtype: name for name, dtype in ARTIFACT_DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise TypeError(f"tensor {name} is {tensor.dtype}; the artifact holds {', '.join(ARTIFACT_DTYPES)}")
    # Tensors of one dtype lie together: the compressor then sees like with like.
    ordered = sorted(encode_trellises(tensors).items(), key=lambda item: names[item[1].dtype])
    compressor, pieces = header.get("compressor", "brotli"), []
    for _, group in itertools.groupby(ordered, key=lambda item: item[1].dtype):
        raw = b"".join(byte_planes(tensor) for _, tensor in group)
        pieces += [raw[begin:begin + PIECE_BYTES] for begin in range(0, len(raw), PIECE_BYTES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compressors release the interpreter's lock
        streams = list(pool.map(lambda piece: compress(piece, compressor), pieces))
    head = {**header, "compressor": compressor,
            "tensors": [[name, names[tensor.dtype], list(tensor.shape)] for name, tensor in ordered],
            "streams": [len(s) for s in streams]}
    packed_head = brotli.compress(json.dumps(head, separators=(",", ":")).encode(), quality=11)
    body = struct.pack("<HI", ARTIFACT_VERSION, len(packed_head)) + packed_head + b"".join(streams)
    return ARTIFACT_MAGIC + body[:6] + hashlib.sha256(body).digest() + body[6:]


def unpack_artifact(data: bytes) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what pack_artifact wrote -> (tensors, header). Nothing from the file is executed.

    Raises ArtifactError for a truncated, altered or foreign file, or a header that lies about shapes or sizes.
    """
    if len(data) < ARTIFACT_BODY or data[:4] != ARTIFACT_MAGIC:
        raise ArtifactError("this is no artifact of train_gpt.py (wrong magic or too short)")
    version, head_bytes = struct.unpack("<HI", data[4:10])
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"the artifact has version {version}, this script reads {ARTIFACT_VERSION}")
    if hashlib.sha256(data[4:10] + data[ARTIFACT_BODY:]).digest() != data[10:ARTIFACT_BODY]:
        raise ArtifactError("the artifact is damaged: its checksum does not fit (truncated or altered)")
    try:
        return read_body(data[ARTIFACT_BODY:], head_bytes)
    except Exception as error:  # whatever a foreign file makes the libraries raise
        raise ArtifactError(f"the artifact cannot be read: {error!r}") from error


def read_body(body: bytes, head_bytes: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read header and streams, whatever they hold."""
    head = json.loads(brotli.Decompressor().process(body[:head_bytes], output_buffer_limit=1 << 20))
    table, lengths, compressor = head.pop("tensors"), head.pop("streams"), head["compressor"]
    sizes = [*lengths, *(n for *_, shape in table for n in shape)]
    if not all(type(n) is int and 0 <= n <= MAX_RAW_BYTES for n in sizes):
        raise ArtifactError("a size is negative, huge or not whole")
    table = [(str(name), ARTIFACT_DTYPES[dtype], shape) for name, dtype, shape in table]
    # Zero sizes count as ones, so that no huge empty shape passes.
    if sum(math.prod(max(n, 1) for n in shape) * dtype.itemsize for _, dtype, shape in table) > MAX_RAW_BYTES:
        raise ArtifactError("the tensors are huge")
    if len({name for name, *_ in table}) != len(table) or compressor not in ("brotli", "lzma"):
        raise ArtifactError(f"a tensor is there twice, or the compressor {compressor!r} is none of this script's")
    totals = [sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in group)
              for _, group in itertools.groupby(table, key=lambda entry: entry[1])]
    pieces = [size for total in totals for size in cut(total)]
    ends = np.cumsum([head_bytes, *lengths])
    if len(pieces) != len(lengths) or ends[-1] != len(body):
        raise ArtifactError("the header does not fit the streams")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        raw = bytearray().join(pool.map(lambda begin, end, size: decompress(body[begin:end], compressor, size),
                                        ends, ends[1:], pieces))
    tensors, begin = {}, 0
    for name, dtype, shape in table:
        end = begin + math.prod(shape) * dtype.itemsize
        planes = np.frombuffer(raw, np.uint8, end - begin, begin).reshape(dtype.itemsize, -1)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(planes.T)).flatten().view(dtype).reshape(shape)
        begin = end
    decode_trellises(tensors)
    return tensors, head


def artifact_header(config: Config) -> dict[str, object]:
    """What an artifact says of itself: PACKED_FOR, SEED, what is not as its preset has it; no folders or machine."""
    preset = Config(**PRESETS[config.preset])
    settings = {name: getattr(config, name) for name in STORED_SETTINGS
                if name in (*PACKED_FOR, "seed") or getattr(preset, name) != getattr(config, name)}
    return {"settings": settings, "compressor": config.compressor}


def prune_to_fit(config: Config, rt: Runtime, tensors: dict[str, Tensor], most_bytes: int) -> bytes:
    """Pack row-scaled tensors, entries +-1 made 0 until they fit, those of small steps first.

    PR #1395: about four of them save a byte, so four are dropped for each one too many. If all are gone and it is still
    too much, it is packed as it is.
    """
    artifact = pack_artifact(tensors, artifact_header(config))
    names = [name[:-2] for name in tensors if name.endswith(".q")]
    while names and len(artifact) > most_bytes:
        places = [(tensors[f"{name}.q"].abs() == 1).nonzero(as_tuple=True) for name in names]
        cost = torch.cat([tensors[f"{name}.scale"][at[:-1]].float().square() for name, at in zip(names, places)])
        if not len(cost):
            break
        dropped = torch.zeros(len(cost), dtype=torch.bool)
        dropped[cost.argsort(stable=True)[:4 * (len(artifact) - most_bytes)]] = True
        for name, at, part in zip(names, places, dropped.split([len(at[0]) for at in places])):
            tensors[f"{name}.q"][tuple(index[part] for index in at)] = 0
        artifact = pack_artifact(tensors, artifact_header(config))
        rt.log(f"pruning: {int(dropped.sum())} of {len(cost)} entries +-1 dropped, {len(artifact)} of {most_bytes} "
               "bytes")
    return artifact


def fit_artifact(config: Config, rt: Runtime, quantizer: TrellisQuantizer, most_bytes: int) -> bytes:
    """Make the artifact that comes nearest to `most_bytes` from below; the bytes are rank 0's, others get none.

    The sizes are those of whole artifacts, and a step twice as coarse saves a bit per weight: a few secant steps on the
    common factor of all steps are enough. Raises RunStopped if even the coarsest steps take too much.
    """
    aim, finest = most_bytes * (1 - 2.5e-4), quantizer.log_step_for(MOST_BITS)
    log_step, best, before = quantizer.log_step_for(min(8 * aim / quantizer.weights, MOST_BITS)), None, None
    for _ in range(12):
        tensors = quantizer.quantize(log_step)
        artifact = pack_artifact(tensors, artifact_header(config)) if rt.main else b""
        size = rt.gather(len(artifact))[0]
        slope = -0.93 * quantizer.weights / 8  # some weights have no bit left to save
        rt.log(f"fit: steps of 2^{log_step:.4f} make {size} of {most_bytes} bytes")
        if size <= most_bytes:
            best = artifact if best is None else max(best, artifact, key=len)
            if size >= most_bytes * (1 - 5e-4) or log_step <= finest:
                return best
        if before:
            secant = (size - before[1]) / (log_step - before[0])
            slope = min(max(secant, 1.3 * slope), 0.02 * slope)
        before = log_step, size
        # 16 octaves coarser, all is rounded to zero, well inside fp32's range
        log_step = min(max(log_step + (aim - size) / slope, finest), finest + 16)
        if log_step == before[0]:
            break
    if best is None:
        raise RunStopped(f"TARGET_BYTES={config.target_bytes} cannot be reached: the coarsest steps make {size} bytes "
                         f"where {most_bytes} are left beside the code", 1)
    return best


def model_from_artifact(config: Config, rt: Runtime, tensors: Mapping[str, Tensor]) -> GPT:
    """Build the model that an artifact's tensors describe; raise ArtifactError if they do not fit its settings."""
    with torch.device("meta"):  # no initial values, which the stored ones would only replace
        model = GPT(config)
    if sum(p.numel() for p in model.parameters()) > MAX_WEIGHTS:
        raise ArtifactError("the artifact's settings make a huge model")
    model.to_empty(device="cpu")
    left = dict(tensors)
    with torch.no_grad():
        for name, p in model.named_parameters():
            plain, q, scale, step, columns, _ = (left.pop(f"{name}{suffix}", None) for suffix in (
                "", ".q", ".scale", ".step", ".columns", ".rows"))
            shapes = [getattr(tensor, "shape", None) for tensor in (scale, step, columns)]
            if q is not None and shapes[0] == q.shape[:-1]:
                plain = q.float() * scale.float()[..., None]
            elif q is not None and q.dtype == torch.int32 and q.dim() == 3 and shapes[1:] == [
                    q.shape[:1], q.shape[::2]]:
                plain = q.float() * column_steps(step, columns)
                plain = plain.view(p.shape) if plain.numel() == p.numel() else None
            if plain is None or plain.shape != p.shape:
                raise ArtifactError(f"the artifact has no {name} of shape {list(p.shape)}: it is another model's")
            if not plain.isfinite().all():
                raise ArtifactError(f"the artifact's {name} holds values that are not finite")
            p.copy_(plain)
    if left:
        raise ArtifactError(f"the artifact has {', '.join(left)}, which this model lacks")
    model.looping = config.num_loops > 0
    return model.to_compute(rt)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation: one scoring function; plain, sliding and test-time-training walks over it; the byte mixture with PPM-D
# ----------------------------------------------------------------------------------------------------------------------


class Scores:
    """The score of every target of the validation split, filled window by window.

    nll [N] fp64 in nats and times_scored [N] on the device; one more slot at the end takes the padding.
    """

    def __init__(self, rt: Runtime, val: ValidationData):
        self.rt, self.val, self.begin = rt, val, rt.clock()
        self.nll = torch.zeros(val.targets + 1, dtype=torch.float64, device=rt.device)
        self.times_scored = torch.zeros(val.targets + 1, dtype=torch.int32, device=rt.device)
        self.released, self.early = 0, torch.zeros((), dtype=torch.int64, device=rt.device)

    def add(self, positions: Tensor, nll: Tensor):
        """Enter the scores of target positions (both [B, S]); a position beyond the split is padding."""
        positions = positions.clamp(max=self.val.targets).flatten()
        self.nll.index_add_(0, positions, nll.flatten().double())
        self.times_scored.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))

    def release(self, begin: int, end: int) -> Tensor:
        """Hand out tokens [begin, end], to train on targets [begin, end); add those without a score to `early`."""
        times = self.times_scored[begin:end].clone()
        self.rt.all_reduce(times)
        self.released += end - begin
        self.early += (times != 1).sum()
        return self.val.tokens[begin:end + 1]

    def finish(self) -> dict[str, float]:
        """Join the ranks' scores -> {val_loss (nats per token), val_bpb, seconds}; `nll` then holds all of them."""
        self.nll, self.times_scored = self.nll[:-1], self.times_scored[:-1]
        self.rt.all_reduce(self.nll)
        self.rt.all_reduce(self.times_scored)
        total = float(self.nll.sum())
        return {"val_loss": total / self.val.targets, "val_bpb": self.val.bits_per_byte(total),
                "seconds": self.rt.clock() - self.begin}


def windows(config: Config, targets: int, stride: int) -> list[tuple[int, int]]:
    """Cover all targets, each once, by (start of the window, number of its last targets that it scores).

    The first window scores all its EVAL_SEQ_LEN targets, each later one starts `stride` further and scores its last
    `stride`; with a stride of EVAL_SEQ_LEN they do not overlap. The last window may reach beyond the split.
    """
    length = config.eval_seq_len
    return [(0, length), *((start, stride) for start in range(stride, targets - length + stride, stride))]


def windows_at_once(config: Config, rt: Runtime) -> int:
    """Windows of one scoring pass on one rank."""
    return max(1, min(config.val_batch_tokens, rt.micro_batch_tokens) // config.eval_seq_len)


@torch.no_grad()
def score_windows(config: Config, rt: Runtime, nll_fn: Callable, scores: Scores, chosen: list[tuple[int, int]]):
    """Score this rank's share of the `chosen` windows: the one way in which any target gets its score.

    A window is (start, count): inputs are EVAL_SEQ_LEN tokens from `start`, scored are its last `count` targets.
    Shapes are static: a batch is filled up with windows that lie beyond the split and so do not count.
    """
    length, val = config.eval_seq_len, scores.val
    batch = windows_at_once(config, rt)
    mine = rt.own(chosen)
    for count in sorted({count for _, count in mine}, reverse=True):
        starts = torch.tensor([start for start, n in mine if n == count], device=rt.device)
        starts = F.pad(starts, (0, -len(starts) % batch), value=val.targets)
        for start in rt.progress("scoring", starts.split(batch)):
            inside = start[:, None] + torch.arange(length, device=rt.device)  # [B, T] token positions
            ids = val.tokens[inside.clamp(max=val.targets)].long()
            positions = inside[:, -count:]
            targets = val.tokens[(positions + 1).clamp(max=val.targets)].long()
            scores.add(positions, nll_fn(ids, targets))
            if config.ppm_enabled and isinstance(nll_fn, ByteShares):
                nll_fn.keep(positions)


def evaluate(config: Config, rt: Runtime, nll_fn: Callable, val: ValidationData, stride: int) -> Scores:
    """Score the split with windows every `stride` tokens; a stride of EVAL_SEQ_LEN is the plain evaluation.

    Returns this rank's scores: `Scores.finish` joins all ranks'.
    """
    scores = Scores(rt, val)
    score_windows(config, rt, nll_fn, scores, windows(config, val.targets, stride))
    return scores


def evaluate_ttt(config: Config, rt: Runtime, model: GPT, loss_fn: Callable, nll_fn: Callable,
                 val: ValidationData, look: Callable[[Scores, list, int], object] = lambda *_: None) -> Scores:
    """Score-first test-time training: a chunk is scored by sliding windows, only then does the model learn from it.

    A window belongs to the chunk of its first scored target, so that all targets of a chunk have their final scores
    before any update sees one of them. There is no update after the last chunk. Changes the model's weights; returns
    this rank's scores, as `evaluate` does.
    `look(scores, windows, n)` is called once a chunk is scored, with this rank's windows and how many to score again.
    """
    scores, chunk = Scores(rt, val), config.ttt_chunk_tokens
    chunks = -(-val.targets // chunk)
    members = [[] for _ in range(chunks)]
    for start, count in windows(config, val.targets, config.eval_stride):
        members[(start + config.eval_seq_len - count) // chunk].append((start, count))
    grads = bind_gradients(list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.ttt_lr, momentum=config.ttt_momentum)
    for number, chosen in enumerate(rt.progress("TTT", members)):
        score_windows(config, rt, nll_fn, scores, chosen)
        if rt.own(chosen):
            look(scores, rt.own(chosen), -(-32 // chunks))  # at least 32 in all
        if number + 1 < chunks and config.ttt_epochs:
            optimizer.param_groups[0]["lr"] = config.ttt_lr * half_cosine(number / (chunks - 1))
            adapt(config, rt, loss_fn, optimizer, grads, scores.release(number * chunk, (number + 1) * chunk))
    return scores


def adapt(config: Config, rt: Runtime, loss_fn: Callable, optimizer: torch.optim.Optimizer, grads: Tensor,
          tokens: Tensor):
    """Run TTT_EPOCHS epochs of SGD on the sequences of one scored chunk, tokens [C + 1]; the ranks share each batch."""
    length = config.eval_seq_len
    for _ in range(config.ttt_epochs):
        descend(config, rt, loss_fn, optimizer, grads, tokens.unfold(0, length + 1, length))


def rehearse(config: Config, rt: Runtime, model: GPT, val: ValidationData):
    """Compile what scores and adapts, by a walk over a chunk of zeros; changes the model's weights."""
    val = copy.copy(val)
    val.tokens = torch.zeros_like(val.tokens)
    val.targets = min(val.targets, config.ttt_chunk_tokens + config.ttt_enabled)  # one more, or no update would follow
    evaluate_ttt(config, rt, model, rt.compiled(model), rt.compiled(model.nll), val)


# A byte mixture of the model and PPM-D (PPM_ENABLED, after PR #1858's experiment) that is a distribution over tokens: a
# token is reached through the trie of the vocabulary's bytes. Whether it ends at a node is the model's to say alone;
# which byte comes next, both say, PPM restricted to the bytes that lead on from there.
SURE = math.exp(-0.277)  # where the model gives its likeliest next byte more, it is left alone
PPM_CONFIDENT = 0.9  # where PPM gives one byte so much, the model weighs PPM_WEIGHTS[0], elsewhere the other
PPM_WEIGHTS = (0.05, 0.9)
MASS_FLOOR = 1e-14  # joins every probability: above the rounding of a cumulative sum, so that no mass is lost in it


class ByteTrie:
    """The vocabulary as two tries of byte strings: the tokens elsewhere, and those after a boundary token.

    A row is a token in one of the two: token, or V + token after a boundary. Sorted by their bytes, the tokens below a
    node are a range, and those that end at the node (several may have the same bytes) are the beginning of this range.
    For rows [2V]: path [2V, longest], the nodes that the row's bytes lead to, then zeros; length, how many these are.
    For nodes: byte, the one that leads to the node; siblings [nodes, 4], all that lead on from its parent, as bits.
    """

    def __init__(self, sp: spm.SentencePieceProcessor, device: torch.device | str = "cpu"):
        """Build both tries: `rows` and `shares` work on `device`, the public arrays are numpy's."""
        self.vocab_size = sp.vocab_size()
        nodes, order, place, paths = [], [], [], []
        for after_boundary in (False, True):
            strings = [token_bytes(sp, token, after_boundary) for token in range(self.vocab_size)]
            ordered = sorted(range(self.vocab_size), key=strings.__getitem__)
            keys, beyond = sorted(strings), b"\xff" * (1 + max(map(len, strings)))
            prefixes = sorted({string[:n] for string in strings for n in range(len(string) + 1)})
            number = {prefix: n for n, prefix in enumerate(prefixes, len(nodes))}
            nodes += [(bisect_left(keys, prefix), bisect_right(keys, prefix), bisect_left(keys, prefix + beyond),
                       number[prefix[:-1]], int.from_bytes(prefix[-1:], "big")) for prefix in prefixes]
            order.append([0, *ordered])  # behind a filler, for the mass of no token
            place += np.argsort(ordered).tolist()
            paths += [[number[string[:n]] for n in range(1, len(string) + 1)] for string in strings]
        begin, own_end, end, parent, byte = np.array(nodes).T
        self.length = np.array([len(path) for path in paths])
        self.path = np.array([path + [0] * (self.length.max() - len(path)) for path in paths], dtype=np.int32)
        self.byte = byte.astype(np.uint8)
        children, inner = np.zeros((len(nodes), 256), dtype=bool), parent != np.arange(len(nodes))
        children[parent[inner], byte[inner]] = True
        self.siblings = np.packbits(children[parent], axis=1, bitorder="little").view("<u8")
        self.boundary = build_byte_luts(sp, self.vocab_size)[2].to(device)
        self.tables = [torch.tensor(table, dtype=torch.int64, device=device)
                       for table in (begin, own_end, end, parent, order, place, self.path)]

    def rows(self, previous: Tensor, targets: Tensor) -> Tensor:
        """Rows (int64) of targets that follow the `previous` tokens, of any one shape."""
        return targets.long() + self.vocab_size * self.boundary[previous.long()]

    @torch.no_grad()
    def shares(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tell what a byte mixture needs of the model: logits [P, V], target rows [P] -> shares [bytes], rest [P].

        A byte's share (fp32) is the part that its node's tokens have in the mass of all tokens that go on beyond the
        parent, the model's probability of the byte; negative where the model is sure, the likeliest byte having more
        than SURE. A target's rest (fp64, nats) is the cost of all that chooses no byte: ending or going on, and which
        of the tokens with the same bytes. rest - sum(log |share|) is the target's negative log-likelihood under the
        softmax, to which MASS_FLOOR is added. Takes some 50 bytes for each logit: call it with a few thousand rows.
        """
        begin, own_end, end, parent, order, place, path = self.tables
        ordered, node = order[rows // self.vocab_size], path[rows]  # [P, V + 1], [P, longest]
        mass = torch.softmax(logits.double(), 1).add_(MASS_FLOOR).gather(1, ordered)
        mass[:, 0] = 0
        mass.cumsum_(1)  # of the first n tokens in the order

        def below(node: Tensor) -> Tensor:
            return mass.gather(1, end[node]) - mass.gather(1, begin[node])

        ended, total = mass.gather(1, own_end[parent[node]]), mass.gather(1, end[parent[node]])
        share = (below(node) / (total - ended)).float()
        # A byte with more than half of the mass holds its middle: no other sibling needs to be looked at.
        middle = ordered.gather(1, torch.searchsorted(mass, (ended + total) / 2))
        depth = torch.arange(path.size(1), device=path.device)
        likeliest = path[middle + rows[:, None] // self.vocab_size * self.vocab_size, depth]
        sure, inside = below(likeliest) > SURE * (total - ended), node > 0
        at = place[rows, None]
        p = (mass.gather(1, at + 1) - mass.gather(1, at)) / mass[:, -1:]
        rest = (share.double().log() * inside).sum(1) - p[:, 0].log()
        return torch.where(sure, -share, share)[inside], rest


PPM_SOURCE = r"""
#include <math.h>
#include <stdint.h>

enum { ORDER = 5, PER_PAGE = 11 };
typedef uint64_t u64;

/* A context of order 0 or 1: what followed it. A symbol counted c times weighs 2c - 1. */
typedef struct { uint32_t weight[256], sum, distinct, most; } Short;
/* A longer one: the first 11 symbols that followed, in order of appearance; the next 11 are on its page 1, and so on.
   The key of a free page is 0. */
typedef struct { u64 key; uint32_t weight[PER_PAGE]; uint8_t symbol[PER_PAGE], used; } Page;
/* History: the last byte is the lowest. Of the short contexts, the first is of order 0. */
typedef struct { Short *shorts; Page *pages; int bits; u64 *used, *history; } Model;

/* The key of a context's page 0; that of each further page is 2 more. */
static u64 key_of(u64 history, int order) {
    return (history & ((1ull << 8 * order) - 1)) << 9 | order << 6 | 1;
}

/* Where a page belongs: those of a context lie side by side. */
static Page *slot_of(const Model *m, u64 key) {
    u64 context = key >> 6, page = key >> 1 & 31;
    u64 slot = ((context ^ context >> 23) * 0x9E3779B97F4A7C15u >> (64 - m->bits)) + page;
    return m->pages + (slot & ((1ull << m->bits) - 1));
}

/* The page with that key, or the free page that would take it. */
static Page *find(const Model *m, u64 key) {
    Page *page = slot_of(m, key), *last = m->pages + (1ull << m->bits) - 1;
    while (page->key && page->key != key)
        page = page == last ? m->pages : page + 1;
    return page;
}

static Short *short_of(const Model *m, int order) {
    return m->shorts + order * (1 + (*m->history & 255));
}

/* Probability of the byte, given that the next one is in the set; confidence of the longest context seen. */
static double predict(const Model *m, int byte, const u64 *set, double *confidence) {
    int size = 0;
    for (int i = 0; i < 4; i++)
        size += __builtin_popcountll(set[i]);
    if (size == 1)
        return *confidence = 1;
    double p = 1 / 256., p_set = size / 256.;
    *confidence = p;
    for (int order = 0; order <= ORDER; order++) {
        u64 key = key_of(*m->history, order), sum = 0, sum_set = 0, hit = 0, most = 0, distinct = 0;
        const Short *s = short_of(m, order < 2 ? order : 0);
        const Page *page = order < 2 ? 0 : find(m, key);
        if (page ? !page->key : !s->sum)
            break;
        if (!page) {
            sum = s->sum, hit = s->weight[byte], most = s->most, distinct = s->distinct;
            for (int i = 0; i < 4 && size < 256; i++)
                for (u64 left = set[i]; left; left &= left - 1)
                    sum_set += s->weight[64 * i + __builtin_ctzll(left)];
            sum_set = size < 256 ? sum_set : sum;
        }
        for (; page; page = find(m, key += 2)) {
            for (int i = 0; i < page->used; i++) {
                u64 weight = page->weight[i], symbol = page->symbol[i];
                sum += weight;
                sum_set += weight & -(set[symbol >> 6] >> (symbol & 63) & 1);
                hit += symbol == byte ? weight : 0;
                most = weight > most ? weight : most;
            }
            distinct += page->used;
            if (page->used < PER_PAGE)
                break;
        }
        double all = sum + distinct;
        p = (hit + distinct * p) / all;
        p_set = (sum_set + distinct * p_set) / all;
        *confidence = most / all;
    }
    return p / p_set;
}

/* Count the byte in its contexts, from the longest to the first that knows it. */
static void update(Model *m, int byte) {
    int order = ORDER, known = 0;
    for (; order > 1 && !known; order--) {
        u64 key = key_of(*m->history, order);
        Page *page = find(m, key);
        int i = 0;
        while (i < page->used && page->symbol[i] != byte)
            if (++i == PER_PAGE)
                i = 0, page = find(m, key += 2);
        known = i < page->used;
        if (!page->key && *m->used >= 3ull << m->bits >> 2)
            continue;  /* the table is full */
        *m->used += !page->key;
        page->key = key;
        page->symbol[i] = byte;
        page->weight[i] += known ? 2 : 1;
        page->used += !known;
    }
    for (; order >= 0 && !known; order--) {
        Short *s = short_of(m, order);
        uint32_t *weight = s->weight + byte, more = *weight ? 2 : 1;
        known = *weight > 0;
        s->distinct += !known, s->sum += more, *weight += more;
        s->most = *weight > s->most ? *weight : s->most;
    }
    *m->history = *m->history << 8 | byte;
}

/* Predict each byte of the tokens among its siblings, then count it; negative: where PPM is confident. */
void predict_text(Short *shorts, Page *pages, u64 *used, u64 *history, const int32_t *rows, const int32_t *paths,
                  const uint8_t *bytes, const u64 *siblings, float *found, int bits, int longest, int64_t tokens,
                  double confident) {
    Model m = { shorts, pages, bits, used, history };
    for (int64_t t = 0; t < tokens; t++) {
        const int32_t *path = paths + (int64_t)rows[t] * longest;
        for (int i = 0; i < longest && path[i]; i++) {
            int byte = bytes[path[i]];
            for (int order = 2; order <= ORDER; order++)  /* what the next byte needs: time to come from memory */
                __builtin_prefetch(slot_of(&m, key_of(*history << 8 | byte, order)));
            double confidence, p = predict(&m, byte, siblings + 4 * path[i], &confidence);
            *found++ = confidence >= confident ? -p : p;
            update(&m, byte);
        }
    }
}
"""


class PPM:
    """PPM-D of order 5 over the bytes of a text.

    A context of n symbols, q different ones, gives p(s) = (2c(s) - 1) / 2n + q / 2n * p'(s) with the next shorter
    context's p' (Howard's estimates, 1993; without exclusion, all ways to a symbol are added up, which makes a
    distribution); below the empty context all 256 bytes are alike. A byte is counted after it has been predicted, in
    the contexts from the longest to the first that knows it. Contexts reach over documents' ends; the first ones are
    filled up with zero bytes. Longer contexts count only where all shorter ones have been seen.
    Contexts of two bytes and more share 2^table_bits pages of 64 bytes, each for up to 11 symbols of a context; once
    3/4 are in use, a symbol that needs a new page is not counted in that context any more. The others take 266 kB.
    """

    def __init__(self, trie: ByteTrie, table_bits: int = 24):
        """Nothing is seen yet; the memory is taken as the pages come into use."""
        self.trie, self.table_bits = trie, table_bits
        memory = mmap.mmap(-1, 64 << table_bits)  # page-aligned, as numpy's would not be
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: fewer misses in the address tables
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.pages = np.frombuffer(memory, dtype=np.uint64)
        self.used, self.history = np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
        self.shorts = np.zeros((257, 259), dtype=np.uint32)

    def predict(self, rows: np.ndarray, among_all: bool = False) -> np.ndarray:
        """Probability of each byte of the next tokens, given the text before it: rows [n] int32 -> [bytes] fp32.

        Among its siblings in the trie, or among all 256 bytes; negative where PPM is confident, or where one byte
        alone leads on. Other threads run meanwhile.
        """
        trie, found = self.trie, np.empty(int(self.trie.length[rows].sum()), np.float32)
        siblings = ~np.zeros_like(trie.siblings) if among_all else trie.siblings
        arrays = (self.shorts, self.pages, self.used, self.history, rows, trie.path, trie.byte, siblings, found)
        c_library(PPM_SOURCE).predict_text(
            *(ctypes.c_void_p(x.ctypes.data) for x in arrays), ctypes.c_int(self.table_bits),
            ctypes.c_int(trie.path.shape[1]), ctypes.c_int64(len(rows)), ctypes.c_double(PPM_CONFIDENT))
        return found


def mix_bytes(length: np.ndarray, share: np.ndarray, rest: np.ndarray, ppm: np.ndarray, spread: bool) -> np.ndarray:
    """Nats of tokens of `length` bytes [n], from the model's shares [bytes] and rests [n] and PPM's predictions.

    A negative share: the model is sure; a negative prediction: PPM is confident. The weights depend on what is before
    a byte alone. With `spread` it is the published figure, which is no distribution: all bytes of a token get the same
    exp(-nll / bytes), mixed unless it is above SURE.
    """
    token = np.repeat(np.arange(len(length)), length)
    p, rest = np.abs(share).astype(np.float64), rest.astype(np.float64)
    sure = share < 0
    if spread:
        p = np.exp(-((rest - np.bincount(token, np.log(p), len(length))) / np.maximum(length, 1))[token])
        rest, sure = np.where(length > 0, 0, rest), p > SURE
    weight = np.where(ppm < 0, *PPM_WEIGHTS)
    mixed = np.where(sure, p, weight * p + (1 - weight) * np.abs(ppm))
    return rest - np.bincount(token, np.log(mixed), len(length))


class ByteShares:
    """A scoring function that keeps what the byte mixture needs of the model: each byte's share, each target's rest."""

    def __init__(self, rt: Runtime, val: ValidationData, trie: ByteTrie, model: GPT):
        """Nothing is scored yet; `rows` [N] are the targets' in the trie, on the CPU."""
        self.rt, self.val, self.trie, self.model = rt, val, trie, model
        self.rows = trie.rows(val.tokens[:-1], val.tokens[1:]).cpu().numpy().astype(np.int32)
        self.length = trie.length[self.rows]
        self.first_byte = torch.from_numpy(np.cumsum([0, *self.length])).to(rt.device)
        self.share = torch.zeros(int(self.length.sum()), device=rt.device)
        self.rest = torch.zeros(val.targets, dtype=torch.float64, device=rt.device)

    @torch.no_grad()
    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Score as GPT.nll does, and hold the targets' shares until `keep` is told their positions."""
        logits = self.model.head(self.model.hidden(ids)[:, -targets.size(1):]).flatten(0, 1)
        self.seen_rows = self.trie.rows(ids[:, -targets.size(1):], targets).flatten()
        parts = [self.trie.shares(*part) for part in zip(logits.split(1024), self.seen_rows.split(1024))]
        self.seen = [torch.cat(part) for part in zip(*parts)]
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def keep(self, positions: Tensor):
        """Enter the shares of the targets scored last at their positions [B, S]; beyond the split is padding."""
        positions, (share, rest) = positions.flatten(), self.seen
        length = torch.from_numpy(self.trie.length).to(positions)[self.seen_rows]
        ends, inside = length.cumsum(0), positions < self.val.targets
        self.rest[positions[inside]] = rest[inside]
        token = torch.arange(len(positions), device=length.device).repeat_interleave(length)
        byte = self.first_byte[positions.clamp(max=self.val.targets)] - (ends - length)
        at = (byte[token] + torch.arange(len(token), device=length.device))[inside[token]]
        self.share[at] = share[inside[token]]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Join the ranks' shares [bytes] and rests [N]."""
        self.rt.all_reduce(self.share)
        self.rt.all_reduce(self.rest)
        return self.share.cpu().numpy(), self.rest.cpu().numpy()


def predict_split(config: Config, mixture: ByteShares) -> np.ndarray:
    """PPM's predictions of the whole split, [bytes]: work for a thread of its own, beside the model's evaluation."""
    ppm, pieces = PPM(mixture.trie), np.array_split(mixture.rows, 1 + len(mixture.rows) // 2**20)
    return np.concatenate([ppm.predict(rows, config.ppm_mode == "spread") for rows in pieces])


# ----------------------------------------------------------------------------------------------------------------------
# 10. Submission: the record, the checks, the packed script, and what is made from records
# ----------------------------------------------------------------------------------------------------------------------


# --- the record -------------------------------------------------------------------------------------------------------


def record_lines(values: Mapping[str, object]) -> list[str]:
    """What the log says of a record's entries but the scores and checks, which have lines of their own."""
    return [f"{key}: {assignments(value) if isinstance(value, dict) else value}" for key, value in values.items()
            if value is not None and key not in (*Record.STAGES, "ppm", "checks")]


def score_line(result: Mapping[str, float]) -> str:
    """An evaluation in the log's community form."""
    loss, bpb, seconds = (result[key] for key in ("val_loss", "val_bpb", "seconds"))
    return f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{seconds * 1000:.0f}ms"


def check_line(check: Mapping[str, object]) -> str:
    """The outcome of a check in the log."""
    name, ok, detail = (check[key] for key in ("name", "ok", "detail"))
    outcome = "ok" if ok else "FAILED"
    return f"check {name}: {outcome} ({detail})"


class Record:
    """What a run reports: logs/<RUN_ID>.json, rewritten whole after every stage, so that no figure is ever lost.

    It is the one source of figures: submission.json and the README's table are made from records alone.
    """

    STAGES = {"prequant": "pre-quantization post-ema", "prequant_ttt": "pre-quantization post-ttt",  # as logs say it
              "quantized": "quantized", "sliding": "quantized_sliding_window", "ttt": "quantized_ttt"}
    KEYS = ("run_id", "mode", "preset", "seed", "settings", "date", "hardware", "world_size", "python", "torch",
            "attention_backend", "source_sha256", "steps", "train_seconds", "calibration_seconds", "quantize_seconds",
            "artifact_seconds", "step_ms", "tokens_per_second", "peak_memory_mib", "train_sha256", "val_tokens",
            "val_bytes", "val_sha256", "tokenizer_sha256", *STAGES, "ppm", "artifact_bytes", "code_bytes",
            "total_bytes", "artifact_sha256", "code_sha256", "eval_seconds", "stopped", "compliant", "checks")

    def __init__(self, config: Config, rt: Runtime, run_id: str):
        """Begin the record with what is known before any work; everything not yet measured is null."""
        self.rt, self.path = rt, Path(config.log_dir) / f"{run_id}.json"
        self.data = {**dict.fromkeys(self.KEYS), "checks": []}
        self.set(run_id=run_id, mode=config.mode, preset=config.preset, seed=config.seed,
                 settings=config.in_force(), date=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                 hardware=rt.hardware(), world_size=rt.world, python=platform.python_version(),
                 torch=torch.__version__, attention_backend=rt.attention, source_sha256=sha256(SOURCE))

    def set(self, **values) -> bytes:
        """Enter and log figures and write the file; returns its content."""
        self.data.update(values)
        content = (json.dumps(self.data, indent=2) + "\n").encode()
        if self.rt.main:
            write_files({self.path: content})
        for line in record_lines(values):
            self.rt.log(line)
        return content

    @contextlib.contextmanager
    def kept(self) -> "Iterator[Record]":
        """Enter an error raised inside as `stopped`, and let it pass."""
        try:
            yield self
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self.set(stopped=repr(error))
            raise

    def seal(self):
        """End the log with a line that vouches for the record and for all lines above it, as they were written."""
        self.rt.signals_wait = True  # a signal comes too late: what is sealed stays
        self.rt.logged.update(self.set())
        self.rt.log(f"record: {self.path.name}; SHA-256 of the lines above and of it: {self.rt.logged.hexdigest()}")

    def check(self, name: str, ok: bool, detail: str):
        """Enter the outcome of a check; a failed one is loud in the log, and stops nothing."""
        check = {"name": name, "ok": bool(ok), "detail": str(detail)}  # packed, a tuple of values
        self.data["checks"].append(check)
        self.rt.log(check_line(check))

    def stage(self, name: str, scores: Scores):
        """Log and enter a finished evaluation, and check that it scored every target once."""
        result = scores.finish()
        self.rt.log(f"{self.STAGES[name]} {score_line(result)}")
        once = int((scores.times_scored == 1).sum())
        self.check(f"single_pass_{name}", once == scores.val.targets,
                   f"{once} of {scores.val.targets} targets scored exactly once")
        if name == "ttt":
            self.check("score_before_update_ttt", not scores.early,
                       f"{scores.released} targets to train on, {int(scores.early)} of them without a final score")
        self.set(**{name: result})


# --- checks of the data: the split's text, the training shards --------------------------------------------------------


def passage_distance(val: ValidationData) -> int:
    """Mean letters from one passage to the next; few in a small split, so that its passages are too many to avoid."""
    return min(max(val.bytes // 4096, 4), 512)


def passage_keys(tokens: np.ndarray, val: ValidationData, salt: str = "") -> np.ndarray:
    """Numbers (uint64) of passages of 256 letters, the same for the same text, wherever it stands.

    Letters and digits count, ASCII's in lower case: cutting documents or words elsewhere, other blanks, or byte pieces
    in the place of others change none. A passage begins where a hash of its first 8 letters says so. The hash depends
    on the split and the salt: who alters a text so that it has no passages has other ones.
    """
    signs, keys, text = (string.punctuation + string.whitespace).encode(), [], np.empty(0, np.uint8)
    known = [token_bytes(val.tokenizer, token, False).lower().translate(None, signs)
             for token in range(val.tokenizer.vocab_size())]
    seed = int(sha256((val.sha256 + salt).encode()), 16)
    multipliers = np.random.default_rng(seed).integers(2**63, size=256, dtype=np.uint64) | 1
    for part in np.array_split(tokens, 1 + len(tokens) // 2**18):  # bounds the memory
        # Decoded together, for byte pieces may spell what is no letter; one cut by the part's end is left out.
        letters = b"".join(map(known.__getitem__, part.tolist())).decode(errors="ignore")
        text = np.concatenate([text, np.frombuffer(re.sub(r"\W+", "", letters).encode(), np.uint8)])
        places = max(len(text) - 255, 0)
        chances = np.ndarray(places, "<u8", text, 0, (1,)) * multipliers[0]  # of the 8 letters at each place
        starts = np.flatnonzero(chances >> 32 < 2**32 // passage_distance(val))
        keys.append(text[starts[:, None] + np.arange(256)] @ multipliers)
        text = text[places:]
    return np.concatenate(keys)


def check_split(record: Record, val: ValidationData):
    """Hold byte tables and tokens against the decoded text of every document; the ranks share them.

    Text that is encoded again must give the tokens back, or tokenizer and shards do not belong together, and a split
    must not repeat itself: each is true of 90% at least.
    """
    tokens, sp, wrong, foreign = val.tokens.cpu().numpy(), val.tokenizer, [], 0
    starts = np.union1d(0, np.flatnonzero(tokens == BOS))
    totals = np.concatenate([[0, 0], np.cumsum(val.target_bytes.numpy())])  # bytes of the targets before token p
    # EVAL_DROP_TAIL may cut the last document inside a character, which then decodes otherwise.
    whole = [*zip(starts, np.append(starts[1:], len(tokens)))][:len(starts) - (val.left_out > 0)]
    mine = record.rt.own(whole)
    for first in record.rt.progress("decoding", range(0, len(mine), 1024)):  # bounds the memory
        some = mine[first:first + 1024]
        parts = [tokens[begin:end].tolist() for begin, end in some]
        texts = sp.decode(parts)
        for (begin, end), part, text, again in zip(some, parts, texts, sp.encode(texts)):
            own = 0 if begin else len(sp.decode(part[:1]).encode())  # the split's first token is no target
            if totals[end] - totals[begin] + own != len(text.encode()):
                wrong.append(int(begin))
            foreign += len(part) * (again != part[part[0] == BOS:])  # all but a leading BOS
    wrong, foreign = sum(record.rt.gather(wrong), []), sum(record.rt.gather(foreign))
    record.check("byte_count", whole and not wrong and val.bytes == totals[-1],
                 f"{len(whole)} of {len(starts)} documents decoded, {len(wrong)} differ from the byte tables: "
                 f"{wrong[:3]}")
    keys = passage_keys(tokens, val)
    repeated, least = len(keys) - len(np.unique(keys)), (val.bytes / 2 - 256) / passage_distance(val) - 1
    empty = int((val.target_bytes == 0).sum())  # BOS, which else could outnumber what is foreign
    record.check("split_text", max(foreign, empty) <= 0.1 * val.targets and repeated <= 0.1 * len(keys)
                 and len(keys) >= least,  # fewer if it has a short period or is hardly any letters
                 f"{foreign} of {val.targets} tokens stand in documents that encode otherwise, {repeated} of "
                 f"{len(keys)} passages repeat ({least:.0f} must be there), {empty} targets have no bytes; at most a "
                 "tenth each")


def check_held_out(record: Record, val: ValidationData, data: TrainData):
    """See how much of the validation split stands in the training shards: the web repeats itself, but not by 10%.

    A passage must lie within a shard to be seen, and so not much may stand in short ones. And a tokenizer of the
    split's own phrases would be one whose tokens the training text hardly has.
    """
    keys, vocab = passage_keys(val.tokens.cpu().numpy(), val, data.sha256), val.tokenizer.vocab_size()
    with ThreadPoolExecutor(4) as pool:  # each rank has the same shards, and takes its share of them
        seen = pool.map(lambda shard: np.append(np.isin(keys, passage_keys(shard, val, data.sha256)),
                                                np.isin(range(vocab), np.unique(shard))), record.rt.own(data.shards))
        found = torch.from_numpy(sum(seen, np.zeros(len(keys) + vocab))).to(record.rt.device)
    record.rt.all_reduce(found)
    copied, unseen = int((found[:len(keys)] > 0).sum()), int((found[val.tokens.long() + len(keys)] == 0).sum())
    short = sum(n for n in map(len, data.shards) if n < 1024)
    if not PACKED:
        record.rt.log(f"training shards: {len(data.shards)} of {sum(map(len, data.shards))} tokens")
    record.check("held_out", len(keys) and copied <= 0.1 * len(keys) and max(unseen, short) <= 0.1 * val.targets,
                 f"{copied} of {len(keys)} passages of the split stand in the training shards, {unseen} of its tokens "
                 f"nowhere there; {short} tokens in shards too short for passages; at most a tenth each")


# --- checks of the scores, and the contest's limits -------------------------------------------------------------------

TRAIN_LIMIT_SECONDS = EVAL_LIMIT_SECONDS = 600
SUBMISSION_CAP_BYTES = 16_000_000
# What every run of MODE=train must have.
CHECKS = """byte_count split_text held_out warm_up_undone shards_unchanged causal normalized weights_kept train_seconds
    eval_seconds total_bytes full_split single_pass_prequant single_pass_quantized normalized_quantized"""


def artifact_rng(record: Record) -> np.random.Generator:
    """Random numbers that follow from artifact and rank: the same in every run, and known to nobody before."""
    return np.random.default_rng((int(record.data["artifact_sha256"], 16), record.rt.rank))


def windows_to_check(count: int) -> int:
    """How many of `count` windows to look at, over all ranks: one in 16, to meet any faulty share that matters."""
    return min(max(32, count // 16), 1024)


@torch.no_grad()
def check_scoring(record: Record, config: Config, model: GPT, nll_fn: Callable, val: ValidationData):
    """Show on the spot that a score is causal (as compiled) and that the model's scores are normalized (as written)."""
    length, rows, vocab = config.eval_seq_len, windows_at_once(config, record.rt), config.vocab_size
    ahead, rng = torch.arange(length + 1, device=val.tokens.device), artifact_rng(record)
    batches = max(3, windows_to_check(val.targets // config.eval_stride) // (rows * record.rt.world))
    wrong, still = 0, 0.0
    for number in range(batches):
        starts = torch.from_numpy(rng.integers(val.targets - length + 1, size=(rows, 1)))
        tokens = val.tokens[starts.to(ahead) + ahead].long()
        place = (length // 2, length // 4, length - 2)[number % 3]  # other tokens from here on, some of them BOS
        other = torch.where(((ahead - place) % 3 == 0) & (tokens != BOS), BOS, (tokens + 1) % vocab)
        # The last target that stays does not stand in the input any more.
        pairs = (tokens, tokens), [torch.where(ahead < begin, tokens, other) for begin in (place, place + 1)]
        same = torch.eq(*(nll_fn(ids[:, :-1].contiguous(), targets[:, 1:].contiguous()) for ids, targets in pairs))
        wrong += int((~same[:, :place]).sum())
        still = max(still, float(same[:, place:].float().mean()))  # by chance, a few after it may be the same
    wrong, still = sum(record.rt.gather(wrong)), max(record.rt.gather(still))
    record.check("causal", not wrong and still < 0.5, f"{batches} x {rows} windows of each rank with other tokens from "
                 f"a place on: {wrong} scores before it changed, {1 - still:.0%} of those after it")
    candidates = torch.arange(vocab, device=tokens.device)[:, None].split(max(1, record.rt.micro_batch_tokens // 9))
    mass = 0.0
    for c in candidates:  # each is scored at the last place but one, and is input only after it
        ids = torch.cat((tokens[0, :8].expand(len(c), -1), c), 1)
        mass += float(model.nll(ids, c.expand(-1, 2))[:, 0].neg().exp().sum())
    masses = record.rt.gather(mass)
    record.check("normalized", all(abs(mass - 1) < 1e-3 for mass in masses),
                 f"the probabilities of all {vocab} tokens at one place, on each rank, add up to {masses}")


@torch.no_grad()
def deviation(config: Config, model: GPT, scores: Scores, window: tuple[int, int]) -> Tensor:
    """By how many nats per token the scores as entered for a window differ from the model's log-softmax.

    Stays on the device: the evaluation must not wait for it.
    """
    (start, count), val = window, scores.val
    places = torch.arange(start, start + config.eval_seq_len + 1, device=val.tokens.device)
    tokens = val.tokens[places.clamp(max=val.targets)].long()
    nll = F.cross_entropy(model.head(model.hidden(tokens[None, :-1])[0, -count:]), tokens[-count:], reduction="none")
    entered = scores.nll[:val.targets][start + config.eval_seq_len - count:][:count]  # fewer at the split's end
    return (entered - nll[:len(entered)]).mean()


def check_entered(record: Record, scores: Scores, stage: str, deviations: list[Tensor], tolerance: float):
    """Check scores by some windows' deviations, and the stage's figure against the scores that it stands for."""
    deviations = sum(record.rt.gather([float(x) for x in deviations]), [])
    off, total = float(np.mean(deviations)), record.data[stage]["val_bpb"] * math.log(2) * scores.val.bytes
    record.check(f"normalized_{stage}", abs(off) < tolerance and math.isclose(total, scores.nll.sum(), rel_tol=1e-6),
                 f"{len(deviations)} windows scored again: mean difference from the model's log-softmax {off:.1e} "
                 f"nats; all scores: {float(scores.nll.sum()):.1f} nats, the figure's {total:.1f}")


def score_mixture(record: Record, config: Config, mixture: ByteShares, shares: tuple[np.ndarray, np.ndarray],
                  predicted: np.ndarray, neural: Scores, begin: float):
    """Log and enter the score of the byte mixture, beside the neural one that it was made from.

    Its seconds are those since `begin`, when the shares began to be kept: all the evaluations beside it.
    """
    (share, rest), spread, val = shares, config.ppm_mode == "spread", neural.val
    # Where the model is taken to be sure of every byte, its own score must come out again.
    alone = float(mix_bytes(mixture.length, -np.abs(share), rest, predicted, False).sum())
    total = float(mix_bytes(mixture.length, share, rest, predicted, spread).sum())
    same = math.isclose(alone, neural.nll.sum(), rel_tol=1e-4) and len(predicted) == val.bytes
    record.check("ppm_normalized", same and not spread, f"PPM_MODE={config.ppm_mode}; without PPM {len(predicted)} "
                 f"bytes take {alone:.1f} nats, the neural score is {float(neural.nll.sum()):.1f}")
    result = {"val_loss": total / val.targets, "val_bpb": val.bits_per_byte(total),
              "seconds": record.rt.clock() - begin}
    record.rt.log(f"quantized_ppm {score_line(result)}")
    record.set(ppm=result)


def final_checks(record: Record, config: Config, val: ValidationData):
    """Hold the run against the contest's limits; in MODE=train fill in `compliant`: all checks are there, and ok."""
    data = record.data
    used = data["artifact_seconds"]  # not the record's `train_seconds`, those of the steps alone
    if used is not None:
        record.check("train_seconds", used <= TRAIN_LIMIT_SECONDS,
                     f"from the first step to the artifact, scoring excluded, {used:.1f} s of {TRAIN_LIMIT_SECONDS}")
    record.check("eval_seconds", data["eval_seconds"] <= EVAL_LIMIT_SECONDS,
                 f"{data['eval_seconds']:.1f} s of {EVAL_LIMIT_SECONDS}")
    record.check("total_bytes", data["total_bytes"] <= SUBMISSION_CAP_BYTES,
                 f"code and artifact {data['total_bytes']} bytes of {SUBMISSION_CAP_BYTES}")
    record.check("full_split", not val.left_out, f"{val.left_out} targets at the end of the split are not scored")
    if data["mode"] == "train":
        wanted = (CHECKS + " single_pass_sliding normalized_sliding" * config.sliding_window_enabled
                  + " single_pass_ttt score_before_update_ttt normalized_ttt" * config.ttt_enabled).split()
        if config.prequant_ttt_enabled:
            wanted += ["no_early_training", "single_pass_prequant_ttt"]
        if config.ppm_enabled:
            wanted.append("ppm_normalized")
        missing = sorted({*wanted} - {check["name"] for check in data["checks"]})
        record.check("complete", not missing, f"missing checks: {missing}")
        record.set(compliant=all(check["ok"] for check in data["checks"]))


# --- the packed script: what goes from the syntax tree ----------------------------------------------------------------

PUBLIC_NAMES = {"Config", "from_env", "GPT", "build_byte_luts", "gptq_quantize", "pack_artifact", "unpack_artifact",
                "SOURCE", "main", "__file__", "__name__"}


class SourceStripper(ast.NodeTransformer):
    """Remove from a syntax tree what only a reader needs: docstrings, annotations, the settings' meanings.

    An error's sentence becomes its line in the readable script and the values that it names, a check's the values
    alone. The settings that the script is packed for keep no other choices, and with these go the branches that they
    would take, where `PACKED` and such settings (`config.<setting>`, `self.config.<setting>`, `<setting>`) decide a
    condition.
    """

    def __init__(self, packed_for: Mapping[str, tuple[str, ...]]):
        values = {name: values[0] for name, values in packed_for.items() if len(values) == 1}
        config = types.SimpleNamespace(**values)
        self.packed_for, self.known = packed_for, {**values, "PACKED": True, "ALIASES": config.preset in ALIASES,
                                                   "config": config, "self": types.SimpleNamespace(config=config)}

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Put line and values where a sentence stands, and items where their progress is shown."""
        if getattr(node.func, "attr", "") == "progress":
            return self.visit(node.args[1])
        sentences = {"check": 2, "fail": 0, "TypeError": 0, "UsageError": 0, "ArtifactError": 0, "RunStopped": 0}
        place = sentences.get(getattr(node.func, "attr", getattr(node.func, "id", "")), len(node.args))
        if isinstance(next(iter(node.args[place:]), None), (ast.Constant, ast.JoinedStr)):
            parts = getattr(node.args[place], "values", ())
            values = [part.value for part in parts if isinstance(part, ast.FormattedValue)
                      and getattr(getattr(part.value, "func", part.value), "id", "") not in (
                          "HOW_TO_GET_DATA", "allowed_values")]
            line = [] if place else [ast.Constant(node.lineno)]  # a check has its name
            alone = len(node.args) == 1 and getattr(node.func, "id", "").endswith("Error")
            node.args[place:place + 1] = [*line, *values] if alone else [ast.Tuple([*line, *values], ast.Load())]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        """Drop what shows progress."""
        return None if node.name == "progress" else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        """Reduce an annotation to what named tuples and dataclasses accept, and a setting to what is needed."""
        node.annotation, name = ast.Name("int", ast.Load()), getattr(node.target, "id", "")
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "").startswith("_"):
            if node.value.func.id == "_collect":
                return None
            node.annotation = ast.Constant(0)
            node.value.args[1:2] = [ast.Constant(0)] * (len(node.value.args) > 2)
            if name in self.packed_for:
                node.value.args = [ast.Constant(self.packed_for[name][0])]
                node.value.keywords = [ast.keyword("choices", ast.parse(repr(self.packed_for[name]), mode="eval").body)]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        """Keep the preset that the script is packed for, and the constraints that it leaves open.

        PACKED_FOR becomes the settings that have one choice: shorter than their names.
        """
        name = getattr(node.targets[0], "id", "")
        if name == "PACKED_FOR":
            node.value = ast.parse("[f.name for f in dataclasses.fields(Config) if len(f.metadata['choices'] or '') "
                                   "== 1]", mode="eval").body
        if name in ("PRESETS", "ALIASES"):
            node.value = self.kept_items(node.value, lambda key: key in self.packed_for["preset"])
        if name == "PRESETS":  # the defaults now are what the script is packed for
            node.value.values = [self.kept_items(values, lambda key: key not in self.packed_for)
                                 for values in node.value.values]
        if name == "CONSTRAINTS":
            node.value.elts = [rule for rule in node.value.elts if not all(
                word in self.packed_for for word in re.findall(r"\w+", rule.value) if hasattr(Config, word))]
        return self.generic_visit(node)

    @staticmethod
    def kept_items(node: ast.Dict, wanted: Callable[[str], bool]) -> ast.Dict:
        """The dictionary's items with wanted keys."""
        kept = [item for item in zip(node.keys, node.values) if wanted(item[0].value)]
        return ast.Dict(*([item[i] for item in kept] for i in (0, 1)))

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST | list[ast.stmt]:
        """Keep the branch that is taken, where PACKED and the settings packed for decide it."""
        self.generic_visit(node)
        try:
            taken = eval(ast.unparse(node.test), {"__builtins__": {}}, self.known)
        except (NameError, AttributeError):  # it depends on what is known in the run alone
            return node
        return node.body if taken else node.orelse

    visit_IfExp = visit_If

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put the value of PACKED where it is read."""
        return ast.Constant(True) if node.id == "PACKED" and isinstance(node.ctx, ast.Load) else node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        """Shorten C."""
        if str(node.value).startswith("\n#include"):
            node.value = shorten_c(node.value)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Drop the annotation of a parameter."""
        node.annotation = None
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Drop docstring and return annotation, visit the children, then drop what stands after a return."""
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            node.returns = None
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and not isinstance(node, ast.Module):
            ends = [i for i, statement in enumerate(body) if isinstance(statement, ast.Return)]
            node.body = body[:ends[0] + 1 if ends else None] or [ast.Pass()]
        return node


# --- the packed script: shorter C and names ---------------------------------------------------------------------------

C_WORDS = """include math stdint INFINITY rintf void char int float double const static struct typedef enum for if else
    while return break continue round_path predict_text"""  # the last two are what Python calls


def shorten_c(source: str) -> str:
    """C without comments and needless blanks, its own names one or two letters long."""
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    source = re.sub(r"(?<=[^\w\s>])\s+|\s+(?=[^\w\s#])", "", source)  # a directive's line ends
    words = dict.fromkeys(re.findall(r"\b[a-zA-Z]\w*\b(?<!_t)", source))
    names = (a + b for a in ("", *string.ascii_letters) for b in string.ascii_letters if a + b not in words)
    short = {word: next(names) for word in words if len(word) > 2 and word not in C_WORDS.split()}
    return re.sub(r"\w+", lambda match: short.get(match[0], match[0]), source)


def defined_names(node: ast.stmt) -> list[str]:
    """Names that a statement of the module makes."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def acts(node: ast.stmt) -> bool:
    """Whether a definition of the module may do more than to make a name."""
    calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)] if isinstance(
        node, (ast.Assign, ast.AnnAssign)) else getattr(node, "decorator_list", [])
    return not {*map(ast.unparse, calls)} <= {"re.compile", "math.exp", "functools.cache", "torch.no_grad()"}


def drop_unused(tree: ast.Module):
    """Drop imports, and functions, classes and constants that nothing refers to and that only make a name."""
    body = tree.body
    reads = {node: {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)}
             for node in body}
    tree.body = []
    while tree.body != body:
        tree.body = body
        used = set().union(*map(reads.get, body))
        for node in body:
            if isinstance(node, ast.ImportFrom):
                node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
        body = [node for node in body if getattr(node, "names", True) and
                (not defined_names(node) or acts(node) or {"SOURCE", *used} & {*defined_names(node)})]


def drop_unread_settings(tree: ast.Module, packed_for: Mapping[str, tuple]):
    """Drop settings that nothing left reads, but those packed for: their other values must be refused."""
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {word for node in ast.walk(tree) if isinstance(node, ast.Constant)
             for word in re.findall(r"\w+", str(node.value).lower())}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            node.body = [line for line in node.body if not isinstance(line, ast.AnnAssign) or line.target.id in read
                         or line.target.id in packed_for]


def shorten_attributes(tree: ast.Module):
    """Rename attributes and methods of several words that the program's own classes make, to `_` and a letter.

    Kept: models' attributes (names in the artifact), fields, PUBLIC_NAMES, words of any text, and what libraries have.
    """
    kept, own, nodes = {*PUBLIC_NAMES}, [], [*ast.walk(tree)]
    imported = {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    for node in nodes:
        if isinstance(node, ast.Constant):
            kept.update(re.findall(r"\w+", str(node.value)))
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in imported:
            kept.add(node.attr)
        if isinstance(node, ast.ClassDef):
            kept.update(line.target.id for line in node.body if isinstance(line, ast.AnnAssign))
            own += [line.name for line in node.body if isinstance(line, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef) and "nn.Module" not in map(ast.unparse, node.bases):
            own += [target.attr for target in ast.walk(node) if isinstance(target, ast.Attribute)
                    and isinstance(target.ctx, ast.Store) and ast.unparse(target.value) == "self"]
    own = [name for name in dict.fromkeys(own) if "_" in name.strip("_") and name not in kept]
    short = dict(zip(own, map("_".__add__, string.ascii_letters)))
    for node in nodes:
        for name in {"attr", "name"} & {*node._fields}:  # an attribute's and a function's
            setattr(node, name, short.get(getattr(node, name), getattr(node, name)))


def shorten_names(tree: ast.Module):
    """Rename the program's own variables, functions and classes to one or two letters.

    A function's own names, those of functions inside it included, begin with `a` again in every function: what is alike
    compresses. Kept: attributes, methods, fields, imports, built-ins, PUBLIC_NAMES, and in a function the parameters
    that are named where something of its name, or a variable, is called.
    """
    kept, fields, spoken = {*dir(builtins), *keyword.kwlist, *PUBLIC_NAMES}, set(), collections.defaultdict(set)
    holders = {ast.Name: "id", ast.arg: "arg", ast.FunctionDef: "name", ast.ClassDef: "name", ast.ExceptHandler: "name"}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for top in (tree, *classes) for node in top.body if isinstance(node, ast.FunctionDef)]
    callees = {node.name for node in (*classes, *functions)}
    local = {id(node) for function in functions for node in ast.walk(function) if node is not function}
    shared: collections.Counter[str] = collections.Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.args[0] if getattr(node.func, "attr", "") == "partial" else node.func
            name = getattr(called, "attr", getattr(called, "id", ""))
            spoken[name if name in callees or isinstance(called, ast.Attribute) else ""] |= {
                word.arg for word in node.keywords}
        if isinstance(node, ast.alias):
            kept.add((node.asname or node.name).split(".")[0])
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            kept.update(node.names)
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", item)]
            fields.update(getattr(target, holders.get(type(target), ""), None) for target in targets)
        if id(node) not in local and getattr(node, holders.get(type(node), ""), None):
            shared[getattr(node, holders[type(node)])] += 1

    def rename(nodes, short: dict[str, str], fresh: Iterator[str], kept: set[str]):
        for node in nodes:
            name = getattr(node, holders.get(type(node), ""), None)
            if name and name not in kept:
                if name not in short:
                    short[name] = next(fresh)
                setattr(node, holders[type(node)], short[name])

    kept |= fields & {name for node in tree.body for name in defined_names(node)}  # a function of a setting's name
    everywhere = kept | fields
    letters = [c for c in string.ascii_letters if c not in everywhere]
    pairs = ("".join(pair) for pair in itertools.product(string.ascii_letters, repeat=2))
    pairs = (pair for pair in pairs if pair not in everywhere)
    short = {name: next(pairs) for name, _ in shared.most_common() if name not in everywhere}
    for function in functions:
        numbered = (c + digit for digit in string.digits for c in letters)
        nodes = [node for node in ast.walk(function) if node is not function]
        names = {node.name for node in (function, *nodes) if isinstance(node, ast.FunctionDef)}
        names |= {node.name for node in classes if function in node.body and function.name == "__init__"}
        nodes.sort(key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)))
        rename(nodes, dict(short), itertools.chain(letters, numbered), kept.union(
            *(spoken[name] for name in {"", *names})))
    rename([node for node in ast.walk(tree) if id(node) not in local], short, pairs, everywhere)


# --- the packed script: layout and compression ------------------------------------------------------------------------

PACKED_FIRST_LINE = b"#coding:latin1\n"


def strip_source(source: str, **settings: object) -> str:
    """Return the program for counting bytes: nothing for readers, short names, no needless blanks.

    It does without MODE=help and MODE=collect, and without the code that other `settings` (those of PACKED_FOR, else
    their defaults) would need.
    """
    packed_for = {"mode": ("train", "eval", "pack"), "attention": ("auto", "fa3", "sdpa"),
                  **{name: (settings.get(name, getattr(Config, name)),) for name in PACKED_FOR}}
    tree = SourceStripper(packed_for).visit(ast.parse(source))
    drop_unused(tree)
    drop_unread_settings(tree, packed_for)
    shorten_attributes(tree)
    shorten_names(tree)
    return join_lines(ast.unparse(tree))


def spare_characters(statement: str) -> str:
    """Drop the parentheses, and the blanks beside operators, without which a statement's line means the same."""
    def meaning(text: str) -> str | None:
        text = re.sub(r"^el(?=if\b)", "", text)
        try:
            return ast.dump(ast.parse(text + " pass" * text.endswith(":"), feature_version=(3, 10)))
        except SyntaxError:
            return None

    whole = meaning(statement)
    for pattern in (r"\(", r"(?<=\W) | (?=\W)") if whole else ():
        for begin in reversed([match.start() for match in re.finditer(pattern, statement)]):
            depths = itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in statement[begin:])
            end = begin + next((i for i, depth in enumerate(depths) if not depth), 0)  # a blank's is `begin` itself
            fewer = statement[:begin] + statement[begin + 1:end] + statement[end + 1:]
            statement = fewer if meaning(fewer) == whole else statement
    return statement


def join_lines(source: str) -> str:
    """Put statements that follow each other on one line, a block of them beside its head, imports into one."""
    def opens(line: str) -> bool:
        return line.endswith(":") or line.startswith("@")

    lines: list[list] = []  # [depth, text]
    for line in filter(str.strip, source.splitlines()):
        depth, text = (len(line) - len(line.lstrip())) // 4, spare_characters(line.lstrip())
        if lines and lines[-1][0] == depth and not opens(text) and not opens(lines[-1][1]):
            last = lines[-1][1].rpartition(";")[2]
            both_import = text.startswith("import ") and last.startswith("import ")
            lines[-1][1] += "," + text[7:] if both_import else ";" + text
        else:
            lines.append([depth, text])
    joined, lines = [], [*lines, [0, ""], [0, ""]]
    heads = iter(zip(lines, lines[1:], lines[2:]))
    for (depth, text), (inner, body), (after, _) in heads:
        if text.endswith(":") and not opens(body) and after < inner:
            text += body
            next(heads)
        joined.append(" " * depth + text)
    return "\n".join(joined) + "\n"


@functools.cache
def compress_source(source: bytes, settings: tuple[tuple[str, object], ...]) -> bytes:
    """Make the packed script of the readable one: stripped, Brotli-compressed, in a Latin-1 literal; deterministic.

    The unpacked source is registered with linecache, for whoever inspects the running code.
    """
    packed = brotli.compress(strip_source(source.decode(), **dict(settings)).encode(), quality=11, lgwin=24)
    literal = packed.decode("latin1").replace("\\", r"\\").replace("\r", r"\r")
    literal = re.sub(r'"(?="|\Z)', r'\"', literal)
    literal = re.sub("\0(?=[0-7])", r"\\x00", literal).replace("\0", r"\0")
    program = ('import sys\nif __name__=="__main__":del sys.path[0]\n'
               f'import brotli,linecache\ns=brotli.decompress("""{literal}""".encode("l1")).decode()\n'
               'linecache.cache["s"]=0,None,s.splitlines(True),"s"\nexec(compile(s,"s","exec"))\n')
    return PACKED_FIRST_LINE + program.encode("latin1")


def pack_source(source: bytes, config: Config) -> bytes:
    """The packed script of a source for runs with such settings; a packed script is returned as it is."""
    if PACKED or source.startswith(PACKED_FIRST_LINE):
        return source
    return compress_source(source, tuple((name, getattr(config, name)) for name in PACKED_FOR))


# --- from records: the table ------------------------------------------------------------------------------------------


def final_score(record: Mapping[str, object]) -> dict[str, float]:
    """The stage that counts: the last that was scored from the artifact."""
    return record["ttt"] or record["sliding"] or record["quantized"]


def what_differs(records: list[dict]) -> list[str]:
    """Write, for each record, the settings that are not the same in all of them, and the hashes of code and data.

    What a record does not name was its script's default, which is known if that script is this one.
    """
    names = sorted({name for r in records for name in r["settings"] if name != "run_id" and any(
        other["settings"].get(name) != r["settings"][name] for other in records)})
    defaults = [{**vars(Config()), **PRESETS[r["preset"]]} if r["source_sha256"] == sha256(SOURCE) else {}
                for r in records]
    hashes = [key for key in ("source_sha256", "train_sha256", "val_sha256") if len({r[key] for r in records}) > 1]
    return [assignments({**{name: r["settings"].get(name, known.get(name, "default")) for name in names},
                         **{key: str(r[key])[:8] for key in hashes}}) for r, known in zip(records, defaults)]


def results_table(records: list[dict]) -> str:
    """The README's table of records, best first, Markdown; the hardware and the data are named in every row."""
    def bpb(record, stage):
        return f"{record[stage]['val_bpb']:.4f}" if record[stage] else "-"

    titles = ["run", "hardware", "validation tokens", "steps", "tok/s", "prequant", "quantized", "sliding", "TTT",
              "bytes", "failed checks"]
    differ, table = what_differs(records), []
    for r, own in zip(records, differ):
        cells = [r[key] for key in ("run_id", "hardware", "val_tokens", "steps", "tokens_per_second")]
        cells += [*(bpb(r, stage) for stage in ("prequant", "quantized", "sliding", "ttt")), r["total_bytes"]]
        cells.append(", ".join(check["name"] for check in r["checks"] if not check["ok"])
                     or ("none" if r["compliant"] else "-"))
        table.append(((final_score(r) or {"val_bpb": math.inf})["val_bpb"], [*cells, own]))
    rows = [[*titles, "settings that differ"], ["---"] * (len(titles) + 1),
            *(cells for _, cells in sorted(table, key=lambda row: row[0]))]
    return "\n".join(f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |"
                     for row in (rows if any(differ) else [row[:-1] for row in rows]))


# --- from records: submission.json ------------------------------------------------------------------------------------

FINEWEB_VAL_BYTES, FINEWEB_TARGETS = 151_080_891, 40_540_802  # 50,000 documents, the contest's 8192 pieces


def is_contest_run(record: Mapping[str, object]) -> bool:
    """Whether a record can stand for the contest: trained on 8 H100s, FineWeb's split to within 0.001%, compliant.

    The bytes are the text's, with any tokenizer that tells the truth, as public audits count them.
    """
    return (record["mode"] == "train" and record["world_size"] == 8 and record["compliant"] is True
            and record["hardware"] == "8x NVIDIA H100 80GB HBM3"
            and abs(record["val_bytes"] - FINEWEB_VAL_BYTES) < 1e-5 * FINEWEB_VAL_BYTES
            and (record["val_tokens"] == FINEWEB_TARGETS or record["settings"].get("vocab_size", 8192) != 8192))


def welch_test(ours: list[float], reference: list[float], margin: float) -> dict[str, object]:
    """Test whether `ours` lies below `reference` by more than `margin`, without assuming equal variances (Welch 1947).

    All in nats per token. The p-value is one-sided, P(T > t) of Student's distribution, whose density in
    theta = atan(T / sqrt(df)) is proportional to cos(theta)^(df - 1).
    """
    parts = [np.var(x, ddof=1) / len(x) for x in (ours, reference)]
    gain, error = float(np.mean(reference) - np.mean(ours)), max(math.sqrt(sum(parts)), 1e-12)
    t = (gain - margin) / error
    df = max(sum(parts), 1e-24) ** 2 / max(sum(v * v / (len(x) - 1) for v, x in zip(parts, (ours, reference))), 1e-48)
    theta = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(theta).clip(0) ** (df - 1)
    p = float(density[theta > math.atan(t / math.sqrt(df))].sum() / density.sum())
    return {"gain_nats_per_token": gain, "required": margin, "t": t, "degrees_of_freedom": df, "p_value": p,
            "significant": p < 0.01}


def told(log: str, record: Mapping[str, object]) -> tuple[set[str], set[str]]:
    """What a log says of a record's entries, scores and checks, and what the record says of them, line by line."""
    labels = {**Record.STAGES, "ppm": "quantized_ppm"}
    begins = ("check ", *(f"{key}: " for key in {*Record.KEYS} - {*labels, "checks"}),
              *(f"{label} val_loss:" for label in labels.values()))
    return ({line for line in log.splitlines() if line.startswith(begins)}, {
        *record_lines(record),
        *map(check_line, record["checks"]),
        *(f"{label} {score_line(record[stage])}" for stage, label in labels.items() if record[stage])})


def read_records(config: Config) -> list[dict]:
    """Read the records of finished runs that RECORDS names; raise UsageError for one that is missing or no record."""
    records = []
    for path in map(Path, config.records.split()):
        if path.resolve() == Path("submission.json").resolve():
            raise UsageError(f"RECORDS: {path} is where the submission goes: rename the run")
        try:
            content, log = path.read_bytes(), path.with_suffix(".txt").read_bytes()
            record, end = json.loads(content), log.rfind(b"\n", 0, -1) + 1  # where the last line begins
            if record["stopped"] or not log[end:].startswith(b"record: "):
                print(f"left out: {path}, a run that did not end ({record['stopped'] or 'its log breaks off'})")
                continue
            if not log[end:].endswith(f": {sha256(log[:end] + content)}\n".encode()):
                raise ValueError("its log does not end with the SHA-256 of both: one was changed")
            missing = {*Record.KEYS} - {*record}
            if missing:
                raise ValueError(f"without {', '.join(sorted(missing))}")
            results_table([record])  # raises what is caught below if a figure is not where it belongs
            if (type(record["settings"]), type(record["hardware"])) != (dict, str):
                raise ValueError("settings or hardware are of the wrong type")
            checks = [(check["name"], check["ok"]) for check in record["checks"]]
            if record["compliant"] not in (None, ("complete", True) in checks and all(ok for _, ok in checks)):
                raise ValueError("`compliant` contradicts its checks")
            logged, recorded = told(log.decode(), record)
            if logged != recorded:
                raise ValueError(f"record and log do not say the same: {sorted(logged ^ recorded)[:2]}")
            records.append(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            known = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
            raise UsageError(f"RECORDS: {path} is no record of a run ({known})") from error
    if not records:
        raise UsageError("MODE=collect needs RECORDS=\"logs/a.json logs/b.json ...\", of runs that ended")
    return records


def shared_settings(record: Mapping[str, object]) -> dict[str, object]:
    """The settings that all seeds of a submission have in common."""
    return {name: value for name, value in record["settings"].items() if name not in ("seed", "run_id")}


def check_one_system(records: list[dict]):
    """Raise UsageError unless the records are finished runs of one system that differ by nothing but the seed."""
    for r in records:
        if r["mode"] != "train" or r["compliant"] is None:
            raise UsageError(f"{r['run_id']} is no finished run of MODE=train (MODE={r['mode']})")
        for key in ("preset", "settings", "source_sha256", "code_sha256", "train_sha256", "val_sha256",
                    "tokenizer_sha256", "hardware", "torch", "python", "attention_backend"):
            mine, first = (shared_settings(x) if key == "settings" else x[key] for x in (r, records[0]))
            if mine != first:
                if key == "settings":
                    mine, first = what_differs([r, records[0]])
                raise UsageError(f"{r['run_id']} and {records[0]['run_id']} cannot make one submission: they differ in "
                                 f"{key} ({mine} and {first})")
    for key in ("seed", "artifact_sha256"):
        if len({r[key] for r in records}) < len(records):
            raise UsageError(f"two of the records have the same {key}: a run would be cherry-picked, or counted twice")


def make_submission(config: Config, records: list[dict]) -> dict[str, object]:
    """The contest's submission.json from alike records; null for what only 8xH100 with FineWeb can measure."""
    contest = all(map(is_contest_run, records))
    scores = {str(r["seed"]): final_score(r) for r in records}
    bpb, nats = ([score[key] for score in scores.values()] for key in ("val_bpb", "val_loss"))
    first, several = records[0], len(records) > 1
    try:
        reference = [float(x) for x in config.reference_bpb.split(",") if x]
    except ValueError:
        reference = [math.nan]
    if not np.isfinite(reference).all():
        raise UsageError(f"REFERENCE_BPB={config.reference_bpb!r}: numbers separated by commas, please")
    if reference and (len(reference) < 2 or not several):
        raise UsageError("REFERENCE_BPB needs two or more numbers, and two or more records: spreads are compared")
    passed = {check["name"]: all(c["ok"] for r in records for c in r["checks"] if c["name"] == check["name"])
              for check in first["checks"]}
    figures = {
        "val_bpb": float(np.mean(bpb)), "val_bpb_std": float(np.std(bpb, ddof=1)) if several else None,
        "val_loss": float(np.mean(nats)), "val_loss_std": float(np.std(nats, ddof=1)) if several else None,
        "seed_results": {str(r["seed"]): {**final_score(r), "artifact_bytes": r["artifact_bytes"],
                                          "total_bytes": r["total_bytes"]} for r in records},
        "bytes_total": max(r["total_bytes"] for r in records), "bytes_code": max(r["code_bytes"] for r in records),
        "hardware": first["hardware"],
        "compliance": {**passed, "three_seeds": len(records) >= 3,
                       "all_checks": all(r["compliant"] for r in records)},
        "significance": {"reference_bpb": reference, **welch_test(
            nats, [x * nats[0] / bpb[0] for x in reference], 0.005)} if reference else None}
    return {
        "author": config.author or None, "github_id": config.github_id or None, "name": config.submission_name or None,
        "date": max(r["date"] for r in records)[:10], "track": "10min_16mb", "seeds": [r["seed"] for r in records],
        **(figures if contest else dict.fromkeys(figures)), "python_version": first["python"],
        "pytorch_version": first["torch"],
        "technique_summary": f"{first['preset']}: {assignments(shared_settings(first))}",
        **{key: first[key] for key in ("code_sha256", "val_sha256", "tokenizer_sha256")},
        "rehearsal": None if contest else figures}


# --- from records: the folder, the README, the picture ----------------------------------------------------------------

RESULTS_PLACE = re.compile(b"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def with_results(readme: bytes, results: str) -> bytes:
    """Put results into a README's place for them; all else stays as somebody wrote it."""
    return RESULTS_PLACE.sub(lambda _: results.encode(), readme)


def submission_state(submission: Mapping[str, object]) -> str:
    """Say what the records make: a pull request, or less."""
    if submission["rehearsal"]:
        return "A rehearsal: not every run is compliant and on 8xH100 and FineWeb; submission.json's figures are null"
    missing = [what for what, there in (
        ("three seeds", len(submission["seeds"]) >= 3), ("AUTHOR", submission["author"]),
        ("GITHUB_ID", submission["github_id"]), ("a difference from REFERENCE_BPB that is significant",
         not submission["significance"] or submission["significance"]["significant"])) if not there]
    return f"A contest run without {', '.join(missing)}" if missing else "Ready for a pull request"


def folder_results(records: list[dict], submission: Mapping[str, object]) -> str:
    """What a submission's README says of its runs, in Markdown."""
    checks = "\n".join(f"- {r['run_id']}: {check_line(c).removeprefix('check ')}"
                       for r in records for c in r["checks"])
    command = f"torchrun --standalone --nproc_per_node={records[0]['world_size']} train_gpt.py"
    figures = submission["rehearsal"] or submission
    spread = f"{figures['val_bpb_std']:.5f}" if figures["val_bpb_std"] is not None else "unknown"
    return (f"{results_table(records)}\n\n{submission_state(submission)}. Mean val_bpb {figures['val_bpb']:.5f}, "
            f"standard deviation {spread}.\n\nMade from the records beside this file, by `MODE=collect`; what "
            "stands outside the marks is left alone. `train_gpt.py` is the script as it was counted: its errors "
            f"name lines and values of its readable source (SHA-256 {records[0]['source_sha256']}). It needs "
            "torch, numpy, sentencepiece and brotli, and the data in `DATA_DIR`. The run again, and the score of "
            "its artifact alone:\n\n"
            f"    SEED={records[0]['seed']} {assignments(shared_settings(records[0]))} {command}\n"
            f"    MODE=eval {command}\n\n## Checks\n\n{checks}\n")


def write_submission_folder(config: Config, records: list[dict], submission: Mapping[str, object]) -> Path:
    """Copy what a pull request needs to records/<date>_<name>/ and check there that it is what was measured."""
    folder = Path("records") / f"{submission['date']}_{re.sub(r'[^A-Za-z0-9.-]+', '-', config.submission_name)}"
    made = Path(config.out_dir) / "train_gpt.py"
    like = dataclasses.replace(Config(), **{key: value for key, value in records[0]["settings"].items()
                                            if key in PACKED_FOR})
    codes = [pack_source(SOURCE, like), *([made.read_bytes()] if made.is_file() else [])]
    code = next((c for c in codes if sha256(c) == submission["code_sha256"]), None)
    if code is None:
        raise UsageError(f"the records were made by other code: neither this script nor {made} packs to SHA-256 "
                         f"{submission['code_sha256']}; OUT_DIR is to name the runs' folder")
    title = config.submission_name.replace("<", "&lt;")  # no table of its own
    readme = folder / "README.md"
    written = (readme.read_bytes() if readme.is_file() else
               f"# {title}\n\n<!-- results -->\n<!-- /results -->\n".encode())
    if not RESULTS_PLACE.search(written):
        raise UsageError(f"{readme} was not made here, and would be overwritten: rename it")
    files = {"train_gpt.py": code, "README.md": with_results(written, folder_results(records, submission)),
             "submission.json": (json.dumps(submission, indent=2) + "\n").encode()}
    for path in map(Path, config.records.split()):
        for p in (path, path.with_suffix(".txt")):
            if p.name in files:
                raise UsageError(f"two files of the submission would be called {p.name}: rename the run")
            files[p.name] = p.read_bytes()
    strangers = sorted({path.name for path in folder.glob("*")} - {*files})
    if strangers:
        raise UsageError(f"{folder} holds {', '.join(strangers)} already: remove them or change SUBMISSION_NAME")
    write_files({folder / name: data for name, data in files.items()})
    copies = " ".join(str(folder / Path(path).name) for path in config.records.split())
    if read_records(dataclasses.replace(config, records=copies)) != records:
        raise UsageError("RECORDS: a file changed while it was read")
    machine = {name: value for name, value in os.environ.items() if not hasattr(Config, name.lower())}  # no settings
    with tempfile.TemporaryDirectory() as other:
        done = subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, stdout=subprocess.DEVNULL,
                              env={**machine, "MODE": "pack", "OUT_DIR": other})
        if done.returncode or Path(other, "train_gpt.py").read_bytes() != code:
            raise UsageError(f"{folder}/train_gpt.py does not pack to itself")
    return folder


def draw_runs(config: Config, records: list[dict]):
    """Draw loss over time and the stages' bits per byte to LOG_DIR/results.png, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    losses, stages = (figure := Figure((10, 3.5), layout="constrained")).subplots(1, 2)
    for record, path in zip(records, config.records.split()):
        log = Path(path).with_suffix(".txt").read_text(encoding="utf-8")
        lines = re.findall(r"train_loss: (\S+) train_time: (\S+)m", log)
        losses.plot([float(t) for _, t in lines], [float(x) for x, _ in lines], label=record["run_id"])
        scored = {stage: record[stage]["val_bpb"] for stage in Record.STAGES if record[stage]}
        stages.plot(list(scored), list(scored.values()), "o-", label=record["run_id"])
    losses.set(xlabel="minutes of training", ylabel="training loss, nats per token")
    stages.set(ylabel="validation bits per byte")
    losses.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    path = Path(config.log_dir) / "results.png"
    write_files({path: picture.getvalue()})
    print("drawn:", path)


def collect(config: Config):
    """MODE=collect: the table of any RECORDS; submission.json, README and records/ from those of one system.

    Raises UsageError for what is no record and, once the table is printed, for records that cannot stand together.
    """
    records = read_records(config)
    table, readme = results_table(records), Path("README.md")
    print(table)
    if len(records) < len(config.records.split()):
        raise UsageError("the table is all: no submission is made beside a run that did not end")
    check_one_system(records)
    submission = make_submission(config, records)
    if config.submission_name:
        print(f"{write_submission_folder(config, records, submission)}: {submission_state(submission)}")
    draw_runs(config, records)
    files = {Path("submission.json"): (json.dumps(submission, indent=2) + "\n").encode()}
    if readme.is_file() and RESULTS_PLACE.search(text := readme.read_bytes()):
        files[readme] = with_results(text, f"{table}\n")
    write_files(files)
    print("written:", *files)


# ----------------------------------------------------------------------------------------------------------------------
# 11. main: the pipeline
# ----------------------------------------------------------------------------------------------------------------------


def check_code():
    """Raise UsageError if the code that runs is not the script's, or a module came from its folder, uncounted.

    Later imports from there are blocked. Python itself and installed packages may lie there: a virtual environment.
    """
    if __spec__ and __name__ == "__main__":  # Python would import from its folder before the first line
        raise UsageError("`python -m` may run other code than it reads: name the file")
    # It was read from a pipe, has been exchanged since, or has an encoding in which the packer would read other code.
    if compile(SOURCE if PACKED else SOURCE.decode(), __file__, "exec") != RUNNING:
        raise UsageError(f"{__file__} does not hold the code that runs: start it again, by the name of its file")
    script = Path(__file__).resolve()

    def beside(path: Path) -> bool:  # the first known folder above it is the script's
        return script.parent == next((p for p in (path, *path.parents) if p.name in ("site-packages", "dist-packages")
                                      or p in (script.parent, Path(sys.base_prefix).resolve())), None)

    sys.path[:] = [path for path in sys.path if not beside(Path(path).resolve())]
    files = [Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
    files = {file.resolve() for file in files if file.is_absolute()}  # PyTorch makes up relative ones
    strangers = sorted(str(file) for file in files - {script} if beside(file))
    if strangers:
        raise UsageError(f"{', '.join(strangers)}: imported from the script's folder, not counted")


@functools.cache
def read_artifact(folder: str) -> bytes:
    """Read OUT_DIR's artifact, once, for settings and weights must be of one; raise UsageError if there is none."""
    path = Path(folder) / ARTIFACT_NAME
    if not path.is_file():
        raise UsageError(f"MODE=eval needs the artifact {path}: set OUT_DIR to its folder")
    return path.read_bytes()


def read_config(env: Mapping[str, str]) -> Config:
    """Settings of this run: the environment's, over an artifact's own in MODE=eval."""
    stored, env = None, {name: value.strip() for name, value in env.items()}
    if env.get("MODE") == "eval":
        stored = unpack_artifact(read_artifact(env.get("OUT_DIR", Config.out_dir)))[1].get("settings")
        if not isinstance(stored, dict):
            raise ArtifactError("the artifact does not say which settings it was made with")
    config = Config.from_env(env, stored)
    made = Path(config.out_dir, "train_gpt.py").resolve()
    if config.mode in ("train", "pack") and made.is_file() and (
            made == Path(__file__).resolve() or not made.read_bytes().startswith(PACKED_FIRST_LINE)):
        raise UsageError(f"OUT_DIR={config.out_dir} holds a script, which the packed one would overwrite")
    return config


def check_machine(config: Config, rt: Runtime):
    """Raise UsageError unless what the run will write can be written, and what it compiles compiled.

    Raises ArtifactError if the compressor's library cannot read what it writes (Brotli before 1.2).
    """
    unpack_artifact(pack_artifact({}, artifact_header(config)))
    with rt.agree():
        if config.ppm_enabled and rt.main:
            c_library(PPM_SOURCE)
        if config.quantizer == "trellis" and config.mode == "train":
            c_library(TRELLIS_SOURCE) if PACKED else choose_rounding(rt)
        for name in ("OUT_DIR", "LOG_DIR") if rt.main else ():
            folder = Path(getattr(config, name.lower())).absolute()
            there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            try:
                tempfile.TemporaryFile(dir=there).close()
            except OSError as error:
                raise UsageError(f"{name}={folder} cannot be written to: {error.strerror}") from error
            if not PACKED and (name, config.mode) == ("OUT_DIR", "train"):
                with torch.device("meta"):
                    least, free = 4 * sum(p.numel() for p in GPT(config).parameters()), shutil.disk_usage(there).free
                if free < least:
                    raise UsageError(f"OUT_DIR={folder} has {free:,} bytes free, the weights alone are {least:,}")


def open_record(config: Config, rt: Runtime, val: ValidationData) -> Record:
    """Seed everything, open log and record, and say what runs on what; raise UsageError if ranks differ in it."""
    for what, value in (("settings", assignments(config.in_force())), ("source", sha256(SOURCE)),
                        ("device", rt.hardware()), ("attention", rt.attention), ("validation tokens", val.sha256),
                        ("tokenizer", val.tokenizer_sha256)):
        rt.check_alike(what, value)
    torch.manual_seed(config.seed)
    run_id = config.run_id or time.strftime(f"{config.preset}_seed{config.seed}_%Y%m%d_%H%M%S_{os.getpid()}")
    rt.open_log(Path(config.log_dir) / f"{run_id}.txt")
    record = Record(config, rt, run_id)
    record.set(val_tokens=val.targets, val_bytes=val.bytes, val_sha256=val.sha256,
               tokenizer_sha256=val.tokenizer_sha256)
    if ALIASES:
        for name, meant in ALIASES.get(config.preset, {}).items():
            rt.log(f"{name} means {meant} in {config.preset}")
    if not PACKED:  # the switch of a piece that this script lacks, perhaps, or another program's
        unread = sorted(name for name in os.environ if re.fullmatch(r"[A-Z0-9_]+_ENABLED", name)
                        and not hasattr(Config, name.lower()))
        if unread:
            rt.log(f"no settings here, so not read: {', '.join(unread)}")
    return record


def weights_file(model: GPT) -> bytes:
    """The fp32 weights, for torch.load with weights_only=True."""
    file = io.BytesIO()
    torch.save({name: p.detach().cpu() for name, p in model.named_parameters()}, file)
    return file.getvalue()


def make_artifact(config: Config, rt: Runtime, record: Record, model: GPT, data: TrainData, start: float) -> bytes:
    """Calibrate, quantize and pack; the bytes are rank 0's, others get none. `start`: when training began."""
    times, code = [rt.clock()], pack_source(SOURCE, config)
    hessians = collect_hessians(config, rt, model, data)
    sensitivities = collect_sensitivities(config, rt, model, data) if config.quantizer == "trellis" else {}
    times.append(rt.clock())
    if config.quantizer == "trellis":
        quantizer = TrellisQuantizer(rt, model, hessians, sensitivities)
        artifact = fit_artifact(config, rt, quantizer, config.target_bytes - len(code))
    else:
        tensors = quantize_rows(config, rt, model, hessians)
        most_bytes = config.target_bytes - len(code) if config.selective_pruning_enabled else MAX_RAW_BYTES
        artifact = prune_to_fit(config, rt, tensors, most_bytes) if rt.main else b""
    times.append(rt.clock())
    calibration, quantization = np.diff(times).tolist()
    used = times[-1] - start
    reserve = used - record.data["train_seconds"]  # fine-tuning included
    rt.log(f"{reserve:.1f}s of GPTQ_RESERVE_SECONDS={config.gptq_reserve_seconds:g} used")
    record.set(calibration_seconds=calibration, quantize_seconds=quantization, artifact_seconds=used)
    return artifact


def score_artifact(config: Config, rt: Runtime, record: Record, val: ValidationData, artifact: bytes):
    """Score an artifact's bytes in every way that is switched on, and close the record."""
    code = pack_source(SOURCE, config)
    rt.log(f"Code size: {len(code)} bytes\nSerialized model quantized+{config.compressor}: {len(artifact)} bytes\n"
           f"Total submission size quantized+{config.compressor}: {len(code) + len(artifact)} bytes")
    record.set(artifact_bytes=len(artifact), code_bytes=len(code), total_bytes=len(code) + len(artifact),
               artifact_sha256=sha256(artifact), code_sha256=sha256(code))
    # The same artifact must get the same score again: gradients, the embedding's above all, are otherwise sums in any
    # order. (CUDA's attention kernels keep one of their own in the backward pass: there it holds before TTT alone.)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if rt.compile:
        rehearse(config, rt, model_from_artifact(config, rt, unpack_artifact(artifact)[0]), val)
    start = rt.clock()
    model = model_from_artifact(config, rt, unpack_artifact(artifact)[0])
    nll_fn, loss_fn, stored = rt.compiled(model.nll), rt.compiled(model), rt.gather(sha256(weights_file(model)))[0]
    check_scoring(record, config, model, nll_fn, val)
    rng, tolerance = artifact_rng(record), 5e-4 if model.dtype == torch.float32 else 2e-3

    def look(scores: Scores, chosen: list[tuple[int, int]], times: int):
        for _ in range(times):
            deviations.append(deviation(config, model, scores, chosen[rng.integers(len(chosen))]))

    walks = [("quantized", config.eval_seq_len)] + [("sliding", config.eval_stride)] * config.sliding_window_enabled
    last = "ttt" if config.ttt_enabled else walks[-1][0]
    if config.ppm_enabled:  # PPM itself knows the text alone, and has a thread of its own
        begin, mixture = rt.clock(), ByteShares(rt, val, ByteTrie(val.tokenizer, rt.device), model)
        predicted = ThreadPoolExecutor(1).submit(predict_split, config, mixture) if rt.main else None
    for stage, stride in walks:
        scores = evaluate(config, rt, mixture if config.ppm_enabled and stage == last else nll_fn, val, stride)
        record.stage(stage, scores)
        deviations, chosen = [], windows(config, val.targets, stride)
        look(scores, chosen, len(rt.share(windows_to_check(len(chosen)))))
        check_entered(record, scores, stage, deviations, tolerance)
    record.check("weights_kept", all(rt.gather(sha256(weights_file(model)) == stored)),
                 "the weights after plain and sliding scores against the artifact's")
    if config.ttt_enabled:
        deviations = []
        scores = evaluate_ttt(config, rt, model, loss_fn, mixture if config.ppm_enabled else nll_fn, val, look)
        record.stage("ttt", scores)
        check_entered(record, scores, "ttt", deviations, tolerance)
    if config.ppm_enabled:
        shares = mixture.finish()
        if rt.main:
            score_mixture(record, config, mixture, shares, predicted.result(), scores, begin)
    record.set(eval_seconds=rt.clock() - start, peak_memory_mib=rt.peak_memory_mib())
    final_checks(record, config, val)
    if not PACKED:
        rt.log(f"the score: {final_score(record.data)['val_bpb']:.5f} bits per byte, with "
               f"{record.data['total_bytes']:,} bytes of code and artifact")
    record.seal()


def run_training(config: Config, rt: Runtime):
    """MODE=train: train, quantize, pack, then score what was packed."""
    check_machine(config, rt)
    if config.corpus == "embedded":
        with rt.agree():  # nobody looks for the corpus before it is written
            if rt.main:
                write_embedded_corpus(config)
    code, out_dir = pack_source(SOURCE, config), Path(config.out_dir)
    if config.target_bytes <= len(code):
        raise UsageError(f"TARGET_BYTES={config.target_bytes}, but the code alone has {len(code)}")
    val, data = ValidationData(config, rt, load_tokenizer(config)), TrainData(config, rt)
    if config.prequant_ttt_enabled and val.targets < config.train_seq_len:
        raise UsageError(f"PREQUANT_TTT_ENABLED=1 needs {config.train_seq_len} validation tokens (TRAIN_SEQ_LEN)")
    rt.check_alike("training shards", data.sha256)
    with open_record(config, rt, val).kept() as record:
        check_split(record, val)
        record.set(train_sha256=data.sha256)
        check_held_out(record, val, data)
        model = GPT(config).to_compute(rt)
        rt.log(f"model_params: {sum(p.numel() for p in model.parameters())}")
        nll_fn, loss_fn = rt.compiled(model.nll), rt.compiled(model)
        validate = functools.partial(evaluate, config, rt, nll_fn, val, config.eval_seq_len)
        warm_up(config, rt, model, loss_fn, data)
        torch.manual_seed(config.seed)
        initial = rt.gather(sha256(weights_file(GPT(config))))[0]
        record.check("warm_up_undone", all(rt.gather(sha256(weights_file(model)) == initial)),
                     "the weights after the warm-up against those that SEED makes")
        try:
            start = rt.clock()  # from here to the artifact all but scoring counts
            steps, seconds = train(config, rt, model, loss_fn, data, lambda: score_line(validate().finish()))
            record.set(steps=steps, train_seconds=seconds, step_ms=1000 * seconds / steps,
                       tokens_per_second=round(steps * config.train_batch_tokens / seconds))
            with rt.pause():
                record.stage("prequant", validate())
            if config.prequant_ttt_enabled:
                legal, length = config.prequant_ttt_data == "train", config.train_seq_len
                record.check("no_early_training", legal, f"PREQUANT_TTT_DATA={config.prequant_ttt_data}: nothing may "
                             "be trained on validation tokens before they are scored")
                sequences = (data.in_order(2).stack(range(val.targets // length)).to(rt.device) if legal else
                             val.tokens.unfold(0, length + 1, length))
                prequant_ttt(config, rt, model, loss_fn, sequences)
                with rt.pause():
                    record.stage("prequant_ttt", validate())
            artifact = make_artifact(config, rt, record, model, data.in_order(1), start)
            if rt.main:
                write_files({out_dir / ARTIFACT_NAME: artifact, out_dir / "final_model.pt": weights_file(model),
                             out_dir / "train_gpt.py": code})
            record.check("shards_unchanged", all(rt.gather(data.opened == data.changes())),  # maps show what is written
                         "the training shards' files since they were opened, on all ranks")
        except BaseException:
            rt.signals_wait = True  # nothing may cut the writing short
            with contextlib.suppress(Exception):
                write_files({out_dir / "stopped_model.pt": weights_file(model)} if rt.main else {})
                if not PACKED:
                    rt.log(f"the weights as they stand: {out_dir}/stopped_model.pt")
            raise
        stored = rt.gather((out_dir / ARTIFACT_NAME).read_bytes() if rt.main else None)[0]
        if rt.main and stored != artifact:
            raise ArtifactError(f"another run has written to OUT_DIR={config.out_dir} meanwhile")
        score_artifact(config, rt, record, val, stored)


def run_evaluation(config: Config, rt: Runtime):
    """MODE=eval: score the artifact in OUT_DIR; no training data is touched."""
    artifact = read_artifact(config.out_dir)
    rt.check_alike("artifact", sha256(artifact))
    check_machine(config, rt)
    val = ValidationData(config, rt, load_tokenizer(config))
    with open_record(config, rt, val).kept() as record:
        check_split(record, val)
        score_artifact(config, rt, record, val, artifact)


def run_pack(config: Config):
    """MODE=pack: write the packed script and print its size."""
    code = pack_source(SOURCE, config)
    path = Path(config.out_dir) / "train_gpt.py"
    write_files({path: code})
    print(f"{path}: {len(code)} bytes, SHA-256 {sha256(code)}")


def fail(message: str, code: int):
    """End this rank: what the process group has under way must not hold up or spoil the exit."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun kills all ranks when one ends: rank 0 prints its message first
    print(f"train_gpt.py: {message}", file=sys.stderr)
    if not PACKED and "TORCHELASTIC_ERROR_FILE" in os.environ:  # what torchrun's own report ends with
        with contextlib.suppress(OSError):
            report = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
    end_process(code)


def main():
    """Do what MODE says; bad input ends in one clear message and exit code 2, before any work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic scores
    try:
        check_code()
        if not PACKED and sys.argv[1:]:
            raise UsageError(f"{sys.argv[1]}: settings are environment variables, `NAME=value torchrun ... "
                             "train_gpt.py`; `MODE=help python train_gpt.py` lists them")
        config = read_config(os.environ)
        if not PACKED and config.mode == "help":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `MODE=help ... | head` ends quietly
            return print_help()
        if config.mode == "pack":
            return run_pack(config)
        if not PACKED and config.mode == "collect":
            return collect(config)
        rt = Runtime(config)
        rt.catch_signals()
        with attention_kernels(rt):
            (run_training if config.mode == "train" else run_evaluation)(config, rt)
        rt.end()
    except RunStopped as error:
        fail(*error.args)
    except OSError as error:
        fail(f"{error}; files are written whole or not at all", 1)
    except (UsageError, ArtifactError) as error:
        fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        least = max(config.train_seq_len, config.eval_seq_len)
        fail(f"out of GPU memory with MICRO_BATCH_TOKENS={rt.micro_batch_tokens}; try "
             f"{max(least, rt.micro_batch_tokens // 2)}, and at least {least} ({error})", 1)


if __name__ == "__main__":
    main()
