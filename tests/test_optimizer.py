"""Room 5: Muon and AdamW against a slow transcription of both, one matrix at a time; schedules; averaging."""
import json
import math
import os

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_env, tiny_model, torchrun, write_shards

import train_gpt
from train_gpt import Config, Optimizer, Runtime

BANKS = {"qo_bank", "kv_bank", "up_bank", "down_bank"}
MOMENTA, MULTIPLIERS = (0.92, 0.95, 0.97), (1.0, 0.7, 0.3)  # of three steps
GRADIENT_NORMS = (2.0, 0.05, 0.4)  # the first and the last are clipped to 0.3


# ---- Newton-Schulz ---------------------------------------------------------------------------------------------------


def quintic(s, steps=5):
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return s


@pytest.mark.parametrize("shape", [(3, 32, 80), (3, 80, 32), (2, 48, 48), (24, 40)])
def test_newton_schulz_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, min(shape[-2:]), dtype=torch.float64)
    x = train_gpt.newton_schulz(7 * (u * s) @ vh, 5, torch.float64)
    middle = u.mT @ x @ vh.mT
    levelled = middle.diagonal(dim1=-2, dim2=-1)
    assert levelled.min() > 0.6 and levelled.max() < 1.3
    torch.testing.assert_close(middle, torch.diag_embed(quintic(s / s.norm()).expand_as(levelled)), rtol=0, atol=1e-5)
    torch.testing.assert_close(x, u @ middle @ vh, rtol=0, atol=1e-9)  # nothing outside these vectors


def test_newton_schulz_of_the_transpose_is_the_transpose():
    g = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(train_gpt.newton_schulz(g.mT, 5, torch.float32),
                               train_gpt.newton_schulz(g, 5, torch.float32).mT)


def test_newton_schulz_computes_in_the_dtype_asked_for():
    x = train_gpt.newton_schulz(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), 5, torch.bfloat16)
    assert x.dtype == torch.bfloat16
    s = torch.linalg.svdvals(x.float())
    assert s.min() > 0.6 and s.max() < 1.3
    assert not train_gpt.newton_schulz(torch.zeros(8, 8), 5, torch.float32).any()  # padding stays zero


# ---- a whole step ----------------------------------------------------------------------------------------------------


def slow_newton_schulz(g):
    x = g / g.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


class SlowOptimizer:
    """Muon and AdamW with the default settings: fp64, one matrix after the other."""

    def __init__(self, model, row_normalize, clip):
        self.p = {name: w.detach().double().clone() for name, w in model.named_parameters()}
        self.row_normalize, self.clip = row_normalize, clip
        self.momentum = {name: torch.zeros_like(w) for name, w in self.p.items() if name in BANKS}
        rest = [w for name, w in self.p.items() if name not in BANKS | {"embedding"}]
        self.adamw = [torch.optim.AdamW(params, lr=lr, weight_decay=wd, betas=(0.9, 0.95), eps=1e-8, foreach=False)
                      for params, lr, wd in (([self.p["embedding"]], 0.03, 0.085), (rest, 0.02, 0.02))]

    def step(self, grads, multiplier, mu):
        grads = {name: g.double() for name, g in grads.items()}
        total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        factor = min(1.0, self.clip / total)
        for name, p in self.p.items():
            p.grad = grads[name] * factor
        for optimizer, lr in zip(self.adamw, (0.03, 0.02)):
            optimizer.param_groups[0]["lr"] = lr * multiplier
            optimizer.step()
        for name, momentum in self.momentum.items():
            for p, m, g in zip(self.p[name], momentum, self.p[name].grad):
                m.copy_(mu * m + g)
                update = g + mu * m
                if self.row_normalize:
                    update = torch.stack([row / row.norm() for row in update])
                rows, columns = update.shape
                lr = 0.03 * multiplier
                p.copy_(p * (1 - lr * 0.095) - lr * math.sqrt(max(1, rows / columns)) * slow_newton_schulz(update))


def random_gradients(model, step):
    """Uneven gradients of all parameters with the global norm GRADIENT_NORMS[step]."""
    generator = torch.Generator().manual_seed(step)
    grads = {name: torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator)
             for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    return {name: g * (GRADIENT_NORMS[step] / norm) for name, g in grads.items()}


def three_steps(config, rt, gradients=random_gradients):
    model = tiny_model(config)
    optimizer = Optimizer(config, rt, model)
    for step in range(3):
        grads = gradients(model, step)
        for name, p in model.named_parameters():
            p.grad += grads[name]
        optimizer.step(MULTIPLIERS[step], MOMENTA[step])
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("overrides, row_normalize, clip", [
    ({}, True, 0.3), ({"muon_row_normalize": 0}, False, 0.3), ({"grad_clip_norm": 0}, True, math.inf)])
def test_three_steps_are_the_slow_reference(rt, overrides, row_normalize, clip):
    config = tiny_config(**overrides)
    got = three_steps(config, rt)
    start = tiny_model(config)
    slow = SlowOptimizer(start, row_normalize, clip)
    for step in range(3):
        slow.step(random_gradients(start, step), MULTIPLIERS[step], MOMENTA[step])
    for name, p in start.named_parameters():
        assert (got[name] - slow.p[name]).abs().max() < 1e-5, name
        assert (got[name] - p).abs().max() > 0.01, name  # it did move


def test_default_groups_and_their_learning_rates(rt):
    """Muon has the banks, AdamW the embedding and all the rest; rates and decays of the default settings."""
    for settings in (Config.from_env({}), tiny_config()):  # the tiny configuration keeps the defaults
        assert (settings.matrix_lr, settings.muon_wd, settings.muon_momentum) == (0.03, 0.095, 0.97)
        assert (settings.grad_clip_norm, settings.ema_decay, settings.muon_backend_steps) == (0.3, 0.9965, 5)
        assert settings.muon_row_normalize
    model = tiny_model(tiny_config())
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Optimizer(model.config, rt, model)
    assert {names[id(p)] for p in optimizer.banks} == BANKS
    embedding, rest = optimizer.adamw.param_groups
    assert [names[id(p)] for p in embedding["params"]] == ["embedding"]
    assert {names[id(p)] for p in rest["params"]} == {
        "resid_mix", "attn_scale", "mlp_scale", "q_gain", "skip_weights", "skip_gates", "par_resid", "par_post"}
    assert (embedding["lr"], embedding["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.03, 0.085, 0.02, 0.02)
    assert {(group["betas"], group["eps"]) for group in (embedding, rest)} == {((0.9, 0.95), 1e-8)}


def test_without_gradients_there_is_only_weight_decay(rt):
    model = tiny_model(tiny_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Optimizer(model.config, rt, model).step(0.5, 0.97)
    for name, p in model.named_parameters():
        lr, wd = (0.03, 0.095) if name in BANKS else (0.03, 0.085) if name == "embedding" else (0.02, 0.02)
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * lr * wd), rtol=1e-6, atol=0)


def test_a_step_forgets_its_gradients(rt):
    model = tiny_model(tiny_config())
    optimizer = Optimizer(model.config, rt, model)
    tokens = torch.randint(3, 300, (2, 9))
    seen = []
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        seen.append([p.grad.clone() for p in model.parameters()])
        optimizer.step(0.0, 0.95)
    assert all(g.any() for g in seen[0])
    assert all(map(torch.equal, *seen))


# ---- schedules, averaging, accumulation ------------------------------------------------------------------------------


@pytest.mark.parametrize("frac, expected", [
    (0, 1), (0.2, 1), (0.28, 1), (0.46, 0.75), (0.64, 0.5), (0.82, 0.25), (1, 0)])
def test_lr_multiplier(frac, expected):
    assert train_gpt.lr_multiplier(Config.from_env({}), frac) == pytest.approx(expected, abs=1e-9)


def test_lr_multiplier_limits():
    floor = Config.from_env({"MIN_LR": "0.1"})
    assert train_gpt.lr_multiplier(floor, 0.64) == pytest.approx(0.5)
    assert train_gpt.lr_multiplier(floor, 1.0) == pytest.approx(0.1)
    assert train_gpt.lr_multiplier(Config.from_env({"WARMDOWN_FRAC": "0"}), 1.0) == 1
    assert train_gpt.lr_multiplier(Config.from_env({"WARMDOWN_FRAC": "1"}), 0.25) == pytest.approx(0.75)


def test_cosine_schedule_ends_at_its_floor():
    """PR #1395's ablation: 1, then half a cosine to MIN_LR over the warm-down."""
    cfg = Config.from_env({"LR_SCHEDULE": "cosine", "WARMDOWN_FRAC": "0.5", "MIN_LR": "0.05"})
    values = [train_gpt.lr_multiplier(cfg, frac) for frac in (0, 0.5, 0.625, 0.75, 1, 1.01)]
    quarter = 0.05 + 0.95 * (1 + math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([1, 1, quarter, 0.525, 0.05, 0.05], abs=1e-9)


def test_muon_momentum_warms_up():
    cfg = Config.from_env({})
    values = [train_gpt.momentum_at(cfg, step) for step in (0, 300, 750, 1500, 4000)]
    assert values == pytest.approx([0.92, 0.93, 0.945, 0.97, 0.97], abs=1e-9)
    assert train_gpt.momentum_at(Config.from_env({"MUON_MOMENTUM_WARMUP_STEPS": "0"}), 0) == 0.97


def test_weight_average():
    model = tiny_model(tiny_config())
    average = train_gpt.WeightAverage(tiny_config(ema_decay=0.9), model)
    expected = [p.detach().double().clone() for p in model.parameters()]
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 * (step + 1))
        average.update(step + 1, 1.0)
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, model.parameters())]
    assert not any(torch.allclose(p.double(), e) for p, e in zip(model.parameters(), expected))
    average.apply()
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.detach().double(), e, rtol=0, atol=1e-5)


def test_uniform_average_of_snapshots():
    """Every SWA_EVERY steps, and only while the learning rates' multiplier is below 0.2."""
    model = tiny_model(tiny_config())
    average = train_gpt.WeightAverage(tiny_config(swa_every=2, ema_decay=0.9), model)
    snapshots, untouched = [], [p.detach().clone() for p in model.parameters()]
    average.apply()
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), untouched)), "there is no snapshot yet"
    for step, multiplier in enumerate((0.3, 0.2, 0.19, 0.15, 0.1, 0.05, 0.0), start=1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(step, multiplier)
        if step in (4, 6):
            snapshots.append([p.detach().clone() for p in model.parameters()])
    average.apply()
    for p, one, other in zip(model.parameters(), *snapshots):
        torch.testing.assert_close(p.detach(), (one + other) / 2, rtol=1e-5, atol=1e-6)


def test_value_embeddings_are_optimized_as_what_they_are(rt):
    """The table like the embedding, the projection by Muon, the scales with the scalars."""
    config = tiny_config(ve_layers="4", quantizer="sdclip")
    optimizer = Optimizer(config, rt, model := tiny_model(config))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in optimizer.banks} == BANKS | {"value_embedding.bank"}
    tables, rest = optimizer.adamw.param_groups
    assert [names[id(p)] for p in tables["params"]] == ["embedding", "value_embedding.table"]
    assert {"value_embedding.scale", "value_embedding.layer_scales"} < {names[id(p)] for p in rest["params"]}


def test_gradients_do_not_depend_on_the_micro_batches(tmp_path):
    write_shards(tmp_path)
    results = {}
    for micro_tokens, expected_parts in ((32, 8), (96, 4), (256, 1), (0, 1)):
        config = tiny_config(data_dir=tmp_path, micro_batch_tokens=micro_tokens)
        model, rt = tiny_model(config), Runtime(config)
        Optimizer(config, rt, model)
        batch = train_gpt.TrainData(config, rt).batch(0)
        assert len(batch) == expected_parts
        loss = train_gpt.backward_batch(model, batch)
        results[micro_tokens] = loss, torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro_tokens in (32, 96, 0):
        torch.testing.assert_close(results[micro_tokens][0], results[256][0], rtol=1e-6, atol=0)
        difference = (results[micro_tokens][1] - results[256][1]).norm() / results[256][1].norm()
        assert difference < 1e-5


# ---- several ranks ---------------------------------------------------------------------------------------------------

RANK_SCRIPT = """
import json, os, sys, torch
sys.path.insert(0, os.environ["TESTS"])
import test_optimizer, train_gpt
config = train_gpt.Config.from_env(json.loads(os.environ["SETTINGS"]))
rt = train_gpt.Runtime(config)
weights = test_optimizer.three_steps(config, rt, test_optimizer.uneven_over_ranks(rt.rank, rt.world))
torch.save(weights, f"weights_{rt.rank}.pt")
rt.end()
"""


def uneven_over_ranks(rank, world):
    """Gradients that differ from rank to rank and whose mean is random_gradients, of norms just around the clip.

    Muon and AdamW hardly notice a wrong scale of all gradients, but the clip does: it must see the mean, not the sum.
    """
    share = 1 if world == 1 else 0.5 + rank / (world - 1)  # 0.5, 1.5 or 0.5, 1, 1.5
    norms = (0.2, 0.06, 0.4)
    return lambda model, step: {name: g * (share * norms[step] / GRADIENT_NORMS[step])
                                for name, g in random_gradients(model, step).items()}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_muon_and_get_the_same_weights(rt, tmp_path, ranks):
    """Five layers are banks of 10 and 5 matrices: neither divides by three, and 5 not by two."""
    settings = tiny_env(num_layers=5)
    expected = three_steps(Config.from_env(settings), rt, uneven_over_ranks(0, 1))
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT)
    done = torchrun(ranks, str(script), cwd=tmp_path, timeout=60, env={
        "PYTHONPATH": str(ROOT), "TESTS": os.path.dirname(__file__), "SETTINGS": json.dumps(settings)})
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        weights = torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True)
        for name, p in expected.items():
            assert (weights[name] - p).norm() <= 1e-6 * p.norm(), (rank, name)
