"""Figures, not tests: python tests/bench.py WHAT [--data DIR] [--weights FILE] [--json FILE]

`speed` times training steps without and with loops, split into data, forward, backward, communication and the rest of
the optimizer, in this script's form and (on the CPU) written plainly: one product per matrix, F.rms_norm, whole logits,
micro-batches of 2048 tokens, as the published script runs on one device. Both in turn, medians of 3, with this
machine's own matrix product in the same run: quote the ratios. Model FLOPs count the matrix products and attention,
forward and backward. `first_step_s` is the first step of its kind, compilation included, `collectives_ms_8` an estimate
of what 8 GPUs would wait for (see `scaling`). Then the seconds of what follows training, on random weights. On a GPU it
is the full preset, on the CPU the model of the README's 200-step run; ranks: `torchrun --standalone --nproc_per_node=2
tests/bench.py speed`.

`scaling` estimates tokens/s of the full preset on 1 to 64 GPUs, 8 to a node, for one global batch (strong) and for a
batch that grows with them (weak), from the tokens/s of one GPU (--rate; the default is an eighth of PR #1541's before
looping) and the bytes of the collectives, of which nothing is taken to be hidden. An estimate, not a measurement.

`quantization` packs the trained small model (--weights: final_model.pt of the README's 200-step run; without it, 200
steps are trained first) by several methods into as many bytes as PR #1541's takes, and measures what is lost:
distortion tr(E H E^T) over all matrices, in dB against PR #1541's; the same weighted by sensitivity; dB above Shannon's
bound (reverse water-filling over the Hessians' eigenvalues and the rows' variances, at the method's own weights and
bits); bits per byte before and after. With --full: the full-size model instead, all weights Gaussian, inputs whose
Hessians have random eigenvectors and eigenvalues that spread by 0, 2 and 4 dB (standard deviation of their logarithm).
With --share 8: what one pass over that model takes the first and the last of 8 ranks, which has the embedding, on this
machine's cores, and what packing takes the first.

`presets` runs the four published systems end to end, scaled down alike to the README's 200-step run (--steps: another
number; --only: some of them), on --data's SP8192 and SP4096 shards, each in a process of its own: some half an hour
each on 2 CPU cores.

`memory` adds up the tensors that one rank would hold at a time on a GPU, full preset with loops on, for some values of
MICRO_BATCH_TOKENS: the script's own code runs on tensors without values (PyTorch's meta device) in bf16, uncompiled,
with attention that keeps its inputs and its output, as the fused kernels do. An estimate, not a measurement.
"""
import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import GPT, Config, Optimizer, Runtime, TrainData, TrellisQuantizer, ValidationData, WeightAverage

SMALL = {"SEED": "42", "NUM_LAYERS": "11", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
         "TRAIN_SEQ_LEN": "256", "EVAL_SEQ_LEN": "256", "ROPE_TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "16384",
         "TTT_CHUNK_TOKENS": "16384"}
RUN_200 = {"MUON_MOMENTUM": "0.95", "MUON_MOMENTUM_WARMUP_STEPS": "50", "EMA_DECAY": "0.95", "ITERATIONS": "200",
           "MAX_WALLCLOCK_SECONDS": "0", "VAL_LOSS_EVERY": "0", "GPTQ_CALIBRATION_BATCHES": "16"}


class PlainGPT(GPT):
    """The same model as anyone would first write it: the reference for speed."""

    def hidden(self, ids):
        c, n = self.config, self.config.num_layers

        def norm(x):
            return F.rms_norm(x, (x.size(-1),))

        angles = train_gpt.rotary_angles(c, ids.size(1), ids.device)
        cos, sin = angles.cos(), angles.sin()

        def attend(x, i):
            q = F.linear(x, self.qo_bank[i]).unflatten(-1, (-1, c.head_dim))
            k, v = (F.linear(x, self.kv_bank[j]).unflatten(-1, (-1, c.head_dim)) for j in (i, n + i))
            q, k = (train_gpt.rotate(norm(y), cos, sin) for y in (q, k))
            y = train_gpt.causal_attention(q * self.q_gain[i][:, None], k, v, "sdpa")
            y, direction = y.unflatten(2, (v.size(2), -1)), F.normalize(v, dim=-1)[:, :, :, None]
            y = (y - (y * direction).sum(-1, keepdim=True) * direction).flatten(2)
            return self.attn_scale[i] * F.linear(y, self.qo_bank[n + i])

        def mlp(x, i):
            hidden = F.leaky_relu(F.linear(x, self.up_bank[i]), 0.5).square()
            return self.mlp_scale[i] * F.linear(hidden, self.down_bank[i])

        x0 = norm(F.embedding(ids, self.embedding))
        lanes, skips = [x0], []
        for v in self.schedules[self.looping]:
            i, depth = v.layer, 1 / math.sqrt(v.layer + 1)
            if v.skip >= 0:
                skip = skips.pop()
                lanes = [self.merge_skip(lane, skip, v.skip) for lane in lanes]
            lanes = lanes * 2 if v.parallel and len(lanes) == 1 else lanes
            mixed = [self.resid_mix[i][0] * lane + self.resid_mix[i][1] * x0 for lane in lanes]
            attn_out = attend(norm(mixed[0]) * depth, i)
            if not v.parallel:
                x = mixed[0] + attn_out
                lanes = [x + mlp(norm(x) * depth, i)]
            else:
                mlp_out = mlp(norm(mixed[1]) * depth, i)
                for k in range(2):
                    lane = self.par_resid[i][0] * lanes[k] + self.par_post[i][0, k] * attn_out
                    lanes[k] = self.par_resid[i][1] * lane + self.par_post[i][1, k] * mlp_out
            if v.push:
                skips.append(lanes[-1])
        return norm(lanes[-1])

    def forward(self, ids, targets):
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(F.linear(self.hidden(ids), self.embedding) / cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def seconds(function, clock=time.perf_counter) -> float:
    """Wall time of one call."""
    begin = clock()
    function()
    return clock() - begin


class Steps:
    """Training steps of one form of the model, and how long their parts take."""

    def __init__(self, kind: type[GPT], data_dir: str, **env: str):
        self.config = Config.from_env({**({} if torch.cuda.is_available() else SMALL), "DATA_DIR": data_dir, **env})
        self.rt = Runtime(self.config)
        torch.manual_seed(self.config.seed)
        self.model = kind(self.config).to_compute(self.rt)
        self.loss_fn = self.rt.compiled(self.model)
        self.data, self.optimizer = TrainData(self.config, self.rt), Optimizer(self.config, self.rt, self.model)
        self.average, self.steps = WeightAverage(self.config, self.model), 0

    def waited(self, collective):
        """The collective, its time counted and nothing else under way meanwhile."""
        def call(*args, async_op=False):
            begin = self.rt.clock()
            work = collective(*args, async_op=True)
            work.wait()
            self.parts["communication"] += self.rt.clock() - begin
            return work
        return call

    def step(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        self.parts = dict.fromkeys(("data", "forward", "backward", "optimizer", "communication"), 0.0)
        collectives = (train_gpt, "reduce_scatter"), (train_gpt, "all_gather"), (train_gpt.dist, "all_reduce")
        kept, clock = [getattr(*place) for place in collectives], self.rt.clock
        begin = clock()
        batch = self.data.batch(self.steps)
        times = [clock()]
        self.parts["data"] = times[0] - begin
        for inputs, targets in batch:
            loss = self.loss_fn(inputs, targets) / len(batch)
            times.append(clock())
            loss.backward()
            times.append(clock())
        for place, collective in zip(collectives, kept):
            setattr(*place, self.waited(collective))
        self.optimizer.step(1.0, 0.95)
        for place, collective in zip(collectives, kept):
            setattr(*place, collective)
        self.average.update(1, 1.0)
        spans = np.diff(times)
        self.parts["forward"], self.parts["backward"] = spans[::2].sum(), spans[1::2].sum()
        self.parts["optimizer"] = clock() - times[-1] - self.parts["communication"]
        self.steps += 1
        return self.parts

    def gflop_per_token(self) -> float:
        """Matrix products and causal attention, forward and backward."""
        c, layers = self.config, len(self.model.schedules[self.model.looping])
        own = sum(getattr(self.model, bank).numel() for bank in GPT.BANKS) / c.num_layers
        return 6 * (layers * (own + c.train_seq_len * c.model_dim) + c.vocab_size * c.model_dim) / 1e9


def collective_seconds(model: GPT, ranks: int) -> float:
    """What the collectives of a step take if nothing hides them, by rings at 400 GB/s in a node, 50 beyond (estimate).

    The banks' fp32 gradients are reduce-scattered, their bf16 updates gathered, the other gradients all-reduced: a rank
    sends (ranks - 1) / ranks of the bytes once, once and twice.
    """
    numels = {name: p.numel() for name, p in model.named_parameters()}
    banks = sum(n for name, n in numels.items() if name.endswith("bank"))
    sent = (ranks - 1) / ranks * ((4 + 2) * banks + 2 * 4 * (sum(numels.values()) - banks))
    return sent / (400e9 if ranks <= 8 else 50e9)


def scaling(rate: float) -> list[dict]:
    """Tokens/s on several GPUs, estimated from those of one."""
    config = Config()
    with torch.device("meta"):
        model = GPT(config)
    rows = []
    for gpus in (1, 2, 4, 8, 16, 64):
        row = {"gpus": gpus, "collectives_ms": round(1000 * collective_seconds(model, gpus), 2)}
        for kind, tokens in (("strong", config.train_batch_tokens), ("weak", config.train_batch_tokens // 8 * gpus)):
            speed = tokens / (tokens / gpus / rate + collective_seconds(model, gpus))
            row |= {f"{kind}_tokens_per_second": round(speed), f"{kind}_efficiency": round(speed / gpus / rate, 3)}
        rows.append(row)
    return rows


def matmul_gflops(rt: Runtime) -> float:
    """GFLOP/s of this machine's matrix product in the compute dtype."""
    size = 8192 if rt.device.type == "cuda" else 1024
    square = torch.randn(size, size, device=rt.device, dtype=rt.dtype)
    return 2 * size**3 / statistics.median(seconds(lambda: square @ square, rt.clock) for _ in range(9)) / 1e9


def speed(data_dir: str) -> list[dict]:
    """Training steps' parts, and the seconds of what follows training."""
    forms = {"train_gpt": Steps(GPT, data_dir)}
    if not torch.cuda.is_available():
        forms["plain"] = Steps(PlainGPT, data_dir, MICRO_BATCH_TOKENS="2048")
    with train_gpt.attention_kernels(forms["train_gpt"].rt):  # as in main: else PyTorch may take others
        return step_parts(forms) + stages(forms["train_gpt"])


def step_parts(forms: dict[str, Steps]) -> list[dict]:
    """Training steps' parts without and with loops, the forms in turn."""
    rows, (config, rt) = [], (forms["train_gpt"].config, forms["train_gpt"].rt)
    for looping in (False, True):
        times, first = {name: [] for name in forms}, {}
        for name, form in forms.items():
            form.model.looping = looping
            first[name] = seconds(form.step, rt.clock)
        for _ in range(3):
            for name, form in forms.items():
                times[name].append(form.step())
        peak = matmul_gflops(rt) * rt.world
        for name, form in forms.items():
            parts = {key: statistics.median(step[key] for step in times[name]) for key in times[name][0]}
            rate = config.train_batch_tokens / statistics.median(sum(step.values()) for step in times[name])
            rows.append({"form": name, "ranks": rt.world, "looping": looping, "tokens_per_second": round(rate),
                         **{f"{key}_ms": round(1000 * value, 1) for key, value in parts.items()},
                         "gflop_per_token": round(form.gflop_per_token(), 4), "matmul_gflops": round(peak),
                         "share_of_matmul": round(rate * form.gflop_per_token() / peak, 3),
                         "first_step_s": round(first[name], 2),
                         "collectives_ms_8": round(1000 * collective_seconds(form.model, 8), 2),
                         "peak_memory_mib": rt.peak_memory_mib()})
    return rows


def stages(form: Steps) -> list[dict]:
    """Seconds of calibration, quantization, coding and the three evaluations."""
    model, rt, rows = form.model, form.rt, []
    config = dataclasses.replace(form.config, gptq_calibration_batches=1)

    def timed(stage: str, tokens: int, function, *args):
        begin = rt.clock()
        result = function(*args)
        spent = rt.clock() - begin
        rows.append({"stage": stage, "ranks": rt.world, "seconds": round(spent, 2),
                     "seconds_per_million_tokens": round(1e6 * spent / tokens, 2) if tokens else None})
        return result

    batch = config.train_batch_tokens
    hessians = timed("hessians", batch, train_gpt.collect_hessians, config, rt, model, form.data)
    sensitivities = timed("sensitivities", batch, train_gpt.collect_sensitivities, config, rt, model, form.data)
    quantizer = TrellisQuantizer(rt, model, hessians, sensitivities)
    tensors = timed("quantize", 0, quantizer.quantize, quantizer.log_step_for(3.4))
    artifact = timed("encode", 0, train_gpt.pack_artifact, tensors, {})
    timed("decode", 0, train_gpt.unpack_artifact, artifact)
    targets = 2 * config.ttt_chunk_tokens
    tokens = torch.randint(3, config.vocab_size, (targets + 1,), device=rt.device, dtype=torch.int32)
    val = types.SimpleNamespace(tokens=tokens, targets=targets)
    nll_fn = rt.compiled(model.nll)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in score_artifact
    for stage, function, *args in (
            ("plain", train_gpt.evaluate, config, rt, nll_fn, val, config.eval_seq_len),
            ("sliding", train_gpt.evaluate, config, rt, nll_fn, val, config.eval_stride),
            ("ttt", train_gpt.evaluate_ttt, config, rt, model, form.loss_fn, nll_fn, val)):
        if rt.compile:  # once before it counts
            function(*args)
        timed(stage, targets, function, *args)
    return rows


class Quantization:
    """The trained small model, its Hessians, and what several ways of quantizing it cost."""

    def __init__(self, config: Config, model: GPT, hessians: dict, sensitivities: dict):
        self.config, self.rt, self.model = config, Runtime(config), model
        self.hessians, self.sensitivities, self.val, self.before = hessians, sensitivities, None, None

    @classmethod
    def trained(cls, data_dir: str, weights: Path | None):
        """The 200-step model, trained here if no weights are given."""
        config = Config.from_env({**SMALL, **RUN_200, "DATA_DIR": data_dir})
        rt = Runtime(config)
        data = TrainData(config, rt)
        torch.manual_seed(config.seed)
        model = GPT(config).to_compute(rt)
        if weights:
            model.load_state_dict(torch.load(weights, weights_only=True))
            model.looping = True
        else:
            train_gpt.train(config, rt, model, model, data, lambda: "")
        data = data.in_order(1)
        q = cls(config, model, train_gpt.collect_hessians(config, rt, model, data),
                train_gpt.collect_sensitivities(config, rt, model, data))
        q.val = ValidationData(config, rt, train_gpt.load_tokenizer(config))
        q.before = q.bpb(model)
        return q

    @classmethod
    def full_size(cls, spread_db: float):
        """The full-size model with random weights, and random Hessians."""
        config = Config.from_env({"DEVICE": "cpu"})
        torch.manual_seed(config.seed)
        model = GPT(config)
        widths = {}
        for name, sites in model.matrix_sites().items():
            p = dict(model.named_parameters())[name]
            torch.nn.init.normal_(p, std=0.02)
            widths |= dict.fromkeys(sites, p.size(-1))
        hessians = {}
        for site, width in widths.items():
            vectors = torch.linalg.qr(torch.randn(width, width))[0]
            hessians[site] = vectors * 10 ** (spread_db * torch.randn(width) / 10) @ vectors.T
        return cls(config, model, hessians, dict.fromkeys(hessians, 1.0))

    def bpb(self, model: GPT) -> float | None:
        """Plain score of the split, if there is one."""
        if not self.val:
            return None
        scores = train_gpt.evaluate(self.config, self.rt, model.nll, self.val, self.config.eval_seq_len)
        return round(scores.finish()["val_bpb"], 5)

    def matrices(self, model: GPT):
        """(weights [out, in], site) of all that is quantized."""
        small = train_gpt.small_tensors(model)
        for name, p in model.named_parameters():
            if name not in small:
                yield from zip(p.detach().view(-1, *p.shape[-2:]).double(), model.matrix_sites()[name])

    def distortion(self, model: GPT, weights: dict[str, float]) -> float:
        """Sum of weight * tr(E H E^T)."""
        total = 0.0
        for (w, site), (approximate, _) in zip(self.matrices(self.model), self.matrices(model)):
            error = w - approximate
            total += weights[site] * float((error @ self.hessians[site].double() * error).sum())
        return total

    def bound(self, weights: dict[str, float], bits: float) -> float:
        """Least distortion of Gaussian rows with these variances in so many bits: reverse water-filling."""
        power = torch.cat([(weights[site] * w.var(1)[:, None] * torch.linalg.eigvalsh(self.hessians[site].double())
                            .clamp_min(0)).flatten() for w, site in self.matrices(self.model)])
        low, high = -100.0, math.log2(float(power.max()))
        for _ in range(60):
            level = (low + high) / 2
            needed = float((power / 2**level).clamp_min(1).log2().sum()) / 2
            low, high = (level, high) if needed > bits else (low, level)
        return float(power.clamp_max(2**level).sum())

    def row(self, method: str, make) -> dict:
        """Measure what `make` -> artifact's bytes costs."""
        begin = time.perf_counter()
        artifact = make()
        quantize_s = time.perf_counter() - begin
        begin = time.perf_counter()
        tensors, _ = train_gpt.unpack_artifact(artifact)
        decode_s = time.perf_counter() - begin
        encode_s = seconds(lambda: train_gpt.pack_artifact(tensors, {}))
        model = train_gpt.model_from_artifact(self.config, self.rt, dict(tensors))
        kept = {k: t for k, t in tensors.items() if "." not in k}
        count = sum(w.numel() for w, _ in self.matrices(self.model))
        bits = 8 * (len(artifact) - len(train_gpt.pack_artifact(kept, {})))  # all but the tensors that stay fp16
        own = {site: weight ** train_gpt.SENSITIVITY_POWER for site, weight in self.weights_of(method).items()}
        return {"method": method, "bits_per_weight": round(bits / count, 4), "total_bytes": len(artifact),
                "distortion": self.distortion(model, dict.fromkeys(self.hessians, 1.0)),
                "cost": self.distortion(model, self.weights_of("sensitivity")),
                "db_above_bound": round(10 * math.log10(self.distortion(model, own) / self.bound(own, bits)), 2),
                "bpb_before": self.before, "bpb_after": self.bpb(model),
                "encode_s": round(encode_s, 2), "decode_s": round(decode_s, 2), "quantize_s": round(quantize_s, 1),
                "coder_overhead": coder_overhead(tensors)}

    def weights_of(self, method: str) -> dict[str, float]:
        """What a method minimizes the distortion under."""
        return {site: float(self.sensitivities[site]) if "sensitivity" in method else 1.0 for site in self.hessians}

    def trellis(self, method: str, most_bytes: int) -> bytes:
        """The artifact of TrellisQuantizer at so many bytes."""
        weights = {site: torch.tensor(weight) for site, weight in self.weights_of(method).items()}
        quantizer = TrellisQuantizer(self.rt, self.model, self.hessians, weights)
        return train_gpt.fit_artifact(self.config, self.rt, quantizer, most_bytes)


def coder_overhead(tensors: dict[str, torch.Tensor]) -> float | None:
    """Bytes of the entropy coder's tensors, packed alone, over the entropy of the indices in their contexts."""
    coded = {k: t for k, t in train_gpt.encode_trellises(tensors).items() if k.startswith("code.")}
    if not coded:
        return None
    ideal, counts = 0.0, collections.defaultdict(collections.Counter)  # for each context
    for name in [k[:-8] for k in tensors if k.endswith(".columns")]:
        q, contexts = tensors[f"{name}.q"].numpy(), train_gpt.trellis_contexts(tensors, name)
        for pair, n in zip(*np.unique((contexts.astype(np.int64) + (q & 1) << 32) + (q >> 1), return_counts=True)):
            counts[pair + 2**31 >> 32][pair] += n
    for histogram in counts.values():
        n = np.array(list(histogram.values()))
        ideal -= float((n * np.log2(n / n.sum())).sum())
    return round(8 * len(train_gpt.pack_artifact(coded, {})) / ideal - 1, 5)


def quantization(data_dir: str, weights: Path | None) -> list[dict]:
    """The table of the trained small model."""
    return table(Quantization.trained(data_dir, weights), "columns", "columns + trellis",
                 "columns + trellis + sensitivity")


def full_size() -> list[dict]:
    """The table of random weights at full size, for each spread of the Hessians' eigenvalues."""
    return [{"spread_db": spread, **row} for spread in (0, 2, 4)
            for row in table(Quantization.full_size(spread), "columns", "columns + trellis")]


def table(q: Quantization, *methods: str) -> list[dict]:
    """One row for each method, all at the bytes of the first, PR #1541's."""
    rows = [q.row("sdclip + Brotli", lambda: train_gpt.pack_artifact(
        train_gpt.quantize_rows(q.config, q.rt, q.model, q.hessians), {}))]
    for method in methods:
        plain = functools.partial(train_gpt.round_blocks, lambda y: 2 * (y / 2).round())
        patched = {} if "trellis" in method else {"NEXT_STATE": np.zeros((32, 2), int), "round_paths": plain}
        kept = {name: getattr(train_gpt, name) for name in patched}
        vars(train_gpt).update(patched)
        try:
            rows.append(q.row(method, lambda method=method: q.trellis(method, rows[0]["total_bytes"])))
        finally:
            vars(train_gpt).update(kept)
    for row in rows[::-1]:
        for key in ("distortion", "cost"):
            row[f"{key}_db_vs_sdclip"] = round(10 * math.log10(row[key] / rows[0][key]), 2)
    return [{key: value for key, value in row.items() if key not in ("distortion", "cost")} for row in rows]


def share_of(ranks: int) -> list[dict]:
    """Seconds of one pass over the full-size model on the first and the last rank, and of packing it; medians of 3."""
    q, log_step, rows = Quantization.full_size(2), -8.13, []  # some 3.5 bits per weight
    q.rt.all_reduce = lambda tensor: None
    alike = {site: torch.tensor(1.0) for site in q.hessians}

    def median(function) -> float:
        return round(statistics.median(seconds(function) for _ in range(3)), 2)

    def factors():
        for sites in filter(None, map(q.rt.own, q.model.matrix_sites().values())):
            train_gpt.error_factor(torch.stack([q.hessians[site] for site in sites]), torch.tensor([0.1]))

    for q.rt.rank, q.rt.world in ((0, ranks), (ranks - 1, ranks), (0, 1)):
        quantizer = TrellisQuantizer(q.rt, q.model, q.hessians, alike)
        pass_s = median(functools.partial(quantizer.quantize, log_step))
        rows.append({"rank": q.rt.rank, "of": q.rt.world, "cores": len(os.sched_getaffinity(0)), "pass_s": pass_s,
                     "of_which_factors_s": median(factors)})
    tensors = quantizer.quantize(log_step)
    return [*rows, {"pack_s": median(lambda: train_gpt.pack_artifact(tensors, {}))}]


PUBLISHED = [name for name in train_gpt.PRESETS if name != "smoke"]


def presets(data_dir: str, steps: int, log_dir: Path | None, chosen: Sequence[str]) -> list[dict]:
    """One row for each published system, from the records of runs of the script itself; PPM's score beside."""
    rows = []
    for preset in chosen:
        own, run = Config.from_env({"PRESET": preset}), f"cpu_{steps}steps_{preset}"
        env = {**SMALL, **RUN_200, "PRESET": preset, "MUON_MOMENTUM": str(own.muon_momentum), "DATA_DIR": data_dir,
               "ITERATIONS": str(steps), "WARMUP_STEPS": "0", "PPM_ENABLED": "1", "VE_DIM": "32",
               "RECUR_START_STEP": str(steps * 3 // 5 if own.recur_start_step else 0), "RUN_ID": run}
        with torch.device("meta"):
            parameters = sum(p.numel() for p in GPT(Config.from_env(env)).parameters())
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, train_gpt.__file__], check=True, stdout=sys.stderr,
                           env={**os.environ, **env, "OUT_DIR": f"{folder}/out", "LOG_DIR": str(log_dir or folder)})
            record = json.loads(Path(log_dir or folder, f"{run}.json").read_text())
        scores = {f"{stage}_bpb": record[stage] and round(record[stage]["val_bpb"], 4)
                  for stage in ("prequant", "quantized", "sliding", "ttt", "ppm")}
        rows.append({"preset": preset, "parameters": parameters, "tokens_per_second": record["tokens_per_second"],
                     **scores, "total_bytes": record["total_bytes"]})
    return rows


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel has in memory; no values."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors' storages while they live: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key: int):
        self.live -= self.known.pop(key)

    def most(self, function, *arguments) -> float:
        """GiB that live at most during a call."""
        self.peak = self.live
        function(*arguments)
        return round(self.peak / 2**30, 2)


def memory(tokens: int) -> dict:
    """GiB that each stage would hold at most with these MICRO_BATCH_TOKENS."""
    config, rt = Config.from_env({"GPTQ_CALIBRATION_BATCHES": "1"}), Runtime(Config(micro_batch_tokens=tokens))
    rt.dtype, rt.device = torch.bfloat16, torch.device("meta")
    rt.all_reduce = lambda tensor: None
    train_gpt.HEAD_CHUNK_TOKENS["meta"] = train_gpt.HEAD_CHUNK_TOKENS["cuda"]
    train_gpt.causal_attention = lambda q, k, v, kernel: FusedAttention.apply(q, k, v)
    with Allocations() as allocations, rt.device:
        model = GPT(config).to_compute(rt)
        model.looping = True
        optimizer, average = Optimizer(config, rt, model), WeightAverage(config, model)
        ids = torch.zeros(tokens // config.train_seq_len, config.train_seq_len, dtype=torch.int64)
        windows = ids[:train_gpt.windows_at_once(config, rt)]
        data = types.SimpleNamespace(batch=lambda number: [(ids, ids)])

        def step():
            model(ids, ids).backward()
            optimizer.clip(optimizer.momenta)
            average.update(1, 1.0)

        return {"micro_batch_tokens": tokens, "weights_and_states_gib": round(allocations.live / 2**30, 2),
                "training_gib": allocations.most(step),
                "scoring_gib": allocations.most(torch.no_grad()(model.nll), windows, windows),
                "hessians_gib": allocations.most(train_gpt.collect_hessians, config, rt, model, data),
                "sensitivities_gib": allocations.most(train_gpt.collect_sensitivities, config, rt, model, data)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "scaling", "quantization", "presets", "memory"])
    parser.add_argument("--data", help="DATA_DIR with SP8192 shards; without it, random tokens")
    parser.add_argument("--weights", type=Path, help="quantization: final_model.pt of the 200-step run")
    parser.add_argument("--full", action="store_true", help="quantization: random weights at full size")
    parser.add_argument("--share", type=int, default=0, help="quantization: one rank's share of the full-size model")
    parser.add_argument("--steps", type=int, default=200, help="presets: optimizer steps")
    parser.add_argument("--only", nargs="+", choices=PUBLISHED, default=PUBLISHED, help="presets: these alone")
    parser.add_argument("--logs", type=Path, help="presets: folder for the runs' logs and records")
    parser.add_argument("--rate", type=float, default=7.40e6 / 8, help="scaling: tokens/s of one GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.data:
            tokens = torch.randint(3, 8192, (1_000_000,), generator=torch.Generator().manual_seed(0)).numpy()
            train_gpt.write_shard(Path(folder) / "datasets/fineweb10B_sp8192/fineweb_train_000000.bin", tokens)
        data = arguments.data or folder
        rows = {"speed": lambda: speed(data), "scaling": lambda: scaling(arguments.rate),
                "presets": lambda: presets(data, arguments.steps, arguments.logs, arguments.only),
                "memory": lambda: [memory(tokens) for tokens in (98304, 49152, 16384, 8192)],
                "quantization": lambda: share_of(arguments.share) if arguments.share else full_size()
                if arguments.full else quantization(data, arguments.weights),
                }[arguments.what]()
    if os.environ.get("RANK", "0") != "0":
        return
    for keys, table_rows in itertools.groupby(rows, key=lambda row: " | ".join(row)):
        print(keys)
        for row in table_rows:
            print(" | ".join(map(str, row.values())))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
