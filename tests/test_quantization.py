"""Room 7: Hessians from training data, GPTQ against the paper done slowly, the artifact's tensors."""
import collections
import itertools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import path_of, tiny_config, tiny_model, write_shards
from test_data import RankOf

import train_gpt
from train_gpt import (
    GPT,
    TrainData,
    TrellisQuantizer,
    collect_hessians,
    collect_sensitivities,
    gptq_quantize,
    quantize_rows,
    trellis_round,
)


def random_hessian(columns: int, generator: torch.Generator, batch: tuple[int, ...] = ()) -> torch.Tensor:
    """Mean of x x^T of correlated inputs whose variances differ a lot and lie in no order."""
    x = torch.randn(*batch, 3 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns ** 0.5)
    x = x * torch.exp(torch.randn(columns, generator=generator))
    return x.mT @ x / x.size(-2)


def inverses(hessian, damping: float | None = None) -> list[tuple[list[int], torch.Tensor]]:
    """The columns that are left, by falling diagonal, and the inverse of their part of the damped hessian (fp64)."""
    h = hessian.double().clone()
    order = torch.argsort(-h.diagonal(), stable=True).tolist()
    h += (0.01 * h.diagonal().mean() if damping is None else damping) * torch.eye(len(h), dtype=torch.double)
    return [(order[i:], torch.linalg.inv(h[order[i:]][:, order[i:]])) for i in range(len(order))]


def column_by_column(weight, left_and_inverse, step, choose) -> torch.Tensor:
    """GPTQ as published: round one column (given in steps) after another, make up for its error in what is left."""
    w, integers = weight.double().clone(), torch.zeros_like(weight).double()
    for left, inverse in left_and_inverse:
        column = left[0]
        integers[:, column] = choose(w[:, column] / step[:, column])
        error = (w[:, column] - integers[:, column] * step[:, column]) / inverse[0, 0]
        w[:, left] -= torch.outer(error, inverse[0])
    return integers


def by_the_paper(weight, hessian, bits, clip_sigmas, damping=None, scale=None):
    """GPTQ with row scales, the inverse made anew for the columns that are left (fp64)."""
    top = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * weight.std(1) / top).half() if scale is None else scale
    step = scale.double()[:, None].expand_as(weight)
    return column_by_column(weight, inverses(hessian, damping), step, lambda y: y.round().clamp(-top, top)), scale


def weighted_error(weight, integers, scale, hessian) -> float:
    error = (weight - integers * scale.float()[..., None]).double()
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("rows, columns, bits, clip_sigmas", [(24, 40, 6, 12.85), (40, 24, 6, 4.0), (16, 128, 4, 6.0),
                                                              (12, 129, 6, 12.85), (8, 300, 6, 12.85),
                                                              (30, 64, 8, 20.0)])
def test_gptq_does_what_the_paper_says(rows, columns, bits, clip_sigmas):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    hessian = random_hessian(columns, generator)
    kept = weight.clone(), hessian.clone()
    integers, scale = gptq_quantize(weight, hessian, bits, clip_sigmas)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])  # the inputs are the caller's
    expected, expected_scale = by_the_paper(weight, hessian, bits, clip_sigmas)
    assert integers.dtype == torch.int8 and scale.dtype == torch.float16 and torch.equal(scale, expected_scale)
    different = integers != expected
    assert different.float().mean() < 1e-3, f"{int(different.sum())} of {different.numel()} differ"  # ties
    nearest = (weight / scale.float()[:, None]).round()
    assert (nearest != expected).float().mean() > 0.02  # error feedback has something to do here


def test_gptq_in_a_batch_is_gptq_one_by_one():
    generator = torch.Generator().manual_seed(7)
    weight, hessian = torch.randn(3, 10, 150, generator=generator), random_hessian(150, generator, (3,))
    integers, scale = gptq_quantize(weight, hessian)
    assert integers.shape == weight.shape and scale.shape == (3, 10)
    for i in range(3):
        expected, expected_scale = by_the_paper(weight[i], hessian[i], 6, 12.85)
        assert torch.equal(scale[i], expected_scale)
        assert (integers[i] != expected).float().mean() < 1e-3


@pytest.mark.parametrize("block", [1, 16, 999])
def test_the_block_size_is_only_a_matter_of_speed(block):
    generator = torch.Generator().manual_seed(3)
    weight, hessian = torch.randn(20, 100, generator=generator), random_hessian(100, generator)
    integers = gptq_quantize(weight, hessian, block=block)[0]
    assert (integers != gptq_quantize(weight, hessian)[0]).float().mean() < 1e-3


@pytest.mark.parametrize("bits, clip_sigmas", [(6, 12.85), (4, 5.0)])
def test_gptq_beats_rounding_to_nearest(bits, clip_sigmas):
    generator = torch.Generator().manual_seed(5)
    weight, hessian = torch.randn(32, 160, generator=generator), random_hessian(160, generator)
    integers, scale = gptq_quantize(weight, hessian, bits, clip_sigmas)
    top = 2 ** (bits - 1) - 1
    nearest = (weight / scale.float()[:, None]).round().clamp(-top, top)
    ours, theirs = (weighted_error(weight, q, scale, hessian) for q in (integers, nearest))
    assert ours < 0.8 * theirs


def test_without_correlations_gptq_is_rounding_to_nearest():
    weight = torch.randn(20, 60, generator=torch.Generator().manual_seed(1))
    integers, scale = gptq_quantize(weight, torch.eye(60))
    assert torch.equal(integers, (weight / scale.float()[:, None]).round().to(torch.int8))
    torch.testing.assert_close(scale.float(), 12.85 * weight.std(1) / 31, rtol=1e-3, atol=0)


def test_dead_inputs_and_zero_rows():
    """An input that is always zero gets zero weights and disturbs no other; a row of zeros stays one."""
    generator = torch.Generator().manual_seed(2)
    weight, hessian = torch.randn(6, 40, generator=generator), random_hessian(40, generator)
    weight[4] = 0
    dead, alive = [3, 17, 39], [i for i in range(40) if i not in (3, 17, 39)]
    hessian[dead], hessian[:, dead] = 0, 0
    integers, scale = gptq_quantize(weight, hessian)
    assert not integers[:, dead].any() and not integers[4].any()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    others = [0, 1, 2, 3, 5]  # the damping's mean counts the dead inputs
    expected, _ = by_the_paper(weight[others][:, alive], hessian[alive][:, alive], 6, 12.85,
                               0.01 * hessian.diagonal().mean(), scale[others])
    assert torch.equal(integers[others][:, alive], expected.to(torch.int8)) and expected.any()
    nothing, scale = gptq_quantize(weight, torch.zeros(40, 40))
    assert not nothing.any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("bits, top", [(2, 1), (4, 7), (6, 31), (8, 127)])
def test_integers_are_clamped(bits, top):
    generator = torch.Generator().manual_seed(bits)
    weight, hessian = torch.randn(16, 90, generator=generator), random_hessian(90, generator)
    integers, scale = gptq_quantize(weight, hessian, bits, 1.0)  # one standard deviation: many weights lie beyond
    assert integers.dtype == torch.int8 and int(integers.min()) == -top and int(integers.max()) == top
    torch.testing.assert_close(scale.float(), weight.std(1) / top, rtol=1e-3, atol=0)


def test_scales_stay_representable():
    """Rows whose scale fp16 cannot hold get the nearest one it can: never 0, never infinite."""
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-12], [1], [1e7], [0]])
    integers, scale = gptq_quantize(weight, torch.eye(30))
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("columns", [64, 1024])
def test_inputs_that_are_nearly_all_alike(columns):
    """A Hessian of rank one with the least damping that is ever added: beyond fp32's digits."""
    hessian = torch.ones(columns, columns)
    upper = train_gpt.error_factor(wide := hessian.double(), torch.tensor([1e-4])).upper.double()
    assert torch.equal(wide, hessian.double()), "the caller's own stays as it is"
    expected = torch.linalg.inv(hessian.double() + 1e-4 * torch.eye(columns).double())
    torch.testing.assert_close(upper.T @ upper, expected, rtol=1e-5, atol=1e-2)


def test_a_hessian_of_nan_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        gptq_quantize(torch.randn(4, 8), torch.full((8, 8), torch.nan))


# --- trellis-coded columns --------------------------------------------------------------------------------------------


def nearest_path(y: list[float]) -> tuple[int, ...]:
    """Of all paths from state 0, for every choice of parities, the one nearest to y."""
    paths = []
    for parities in itertools.product((0, 1), repeat=len(y)):
        state, cost, integers = 0, 0.0, []
        for value, parity in zip(y, parities):
            allowed = [2 * k + state % 2 for k in range(-40 + parity, 40, 2)]
            integers.append(min(allowed, key=lambda integer, value=value: abs(value - integer)))
            cost += (value - integers[-1]) ** 2
            state = train_gpt.NEXT_STATE[state][parity]
        paths.append((cost, tuple(integers)))
    return min(paths)[1]


@pytest.mark.parametrize("spread", [0.3, 2.0, 12.0])
def test_the_viterbi_path_is_the_nearest_of_all(spread):
    values = spread * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    values[0] = 0
    assert trellis_round(values).tolist() == [list(nearest_path(y)) for y in values.tolist()]


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 11])
def test_columns_are_cut_into_paths(batch, rows, monkeypatch):
    """The last path of a column may be short: what it is filled up with has no say in it."""
    monkeypatch.setattr(train_gpt, "TRELLIS_ROWS", 5)
    columns = 3 * torch.randn(*batch, rows, 1, generator=torch.Generator().manual_seed(rows))
    found = train_gpt.round_columns(columns)
    assert found.shape == columns.shape
    for column, integers in zip(columns.reshape(-1, rows).tolist(), found.reshape(-1, rows).tolist()):
        assert integers == [x for begin in range(0, rows, 5) for x in nearest_path(column[begin:begin + 5])]


def test_trellis_coding_comes_near_shannons_bound():
    """Gaussian weights at about 3 bits: 0.5 dB from the bound of distortion at that rate, where uniform steps lose 1.5.

    The rate is the entropy of the indices given whether they stand for odd multiples, as the coder has it.
    """
    weight = torch.randn(64, 4000, generator=torch.Generator().manual_seed(0))

    def decibels(step: float, integers: torch.Tensor, indices: torch.Tensor, context: torch.Tensor) -> float:
        bits = 0.0
        for value in context.unique():
            p = indices[context == value].unique(return_counts=True)[1] / indices.numel()
            bits -= float((p * (p / p.sum()).log2()).sum())
        assert 2.8 < bits < 3.2
        return 10 * math.log10(float((weight - step * integers).square().mean()) * 4 ** bits)

    uniform = (weight / 0.5).round()
    assert decibels(0.5, uniform, uniform, torch.zeros_like(uniform)) > 1.45
    integers = trellis_round((weight / 0.26).t()).t()
    assert 0.4 < decibels(0.26, integers, integers.int() >> 1, integers.int() & 1) < 0.6  # four states: 0.70


def along_one_column(integers: list[int]) -> list[int]:
    """Indices of a column, by the definition; fails where the column is no path."""
    indices, state = [], 0
    for row, integer in enumerate(integers):
        state = 0 if row % 128 == 0 else state
        index, rest = divmod(integer - state % 2, 2)
        assert rest == 0
        indices.append(index)
        state = train_gpt.NEXT_STATE[state][index % 2]
    return indices


@pytest.mark.parametrize("shape", [(1, 1), (128, 3), (129, 2), (2, 127, 4), (2, 400, 3), (2, 2, 130, 1)], ids=str)
def test_columns_are_rounded_to_paths(shape):
    generator = torch.Generator().manual_seed(1)
    rounded = torch.stack([train_gpt.round_columns(7 * torch.randn(*shape[:-1], 1, generator=generator)).squeeze(-1)
                           for _ in range(shape[-1])], -1)
    assert rounded.shape == shape
    for column in rounded.int().mT.reshape(-1, shape[-2]).tolist():
        assert along_one_column(column) == [integer // 2 for integer in column]
    assert torch.equal(path_of(rounded.int() >> 1), rounded.int())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 128, 5), (3, 300, 130), (1, 129, 64)], ids=str)
def test_paths_in_c_are_those_of_the_plain_way_to_the_last_bit(shape):
    generator, (matrices, _, columns) = torch.Generator().manual_seed(0), shape
    w = 3 * torch.randn(shape, generator=generator)
    w[0, 0, 0] = 0  # as near to 2 as to -2
    upper = torch.triu(0.1 * torch.randn(matrices, columns, columns, generator=generator))
    upper.diagonal(dim1=-2, dim2=-1).copy_(0.5 + torch.rand(matrices, columns, generator=generator))
    step = (0.3 + torch.rand(matrices, 1, columns, generator=generator)).expand(shape)
    plain = train_gpt.round_blocks(train_gpt.round_columns, w, upper, step, block=columns)
    found = train_gpt.round_paths(w.clone(), upper.mT.contiguous().mT, step)
    assert torch.equal(found, plain)
    alone = train_gpt.round_columns((w / step).mT[..., None])[..., 0].mT
    assert columns == 1 or not torch.equal(found, alone), "errors are fed forward"


def test_without_a_compiler_the_same_tensors_come_out(rt, monkeypatch, tmp_path):
    lines, (_, model) = [], narrow_model(monkeypatch)
    monkeypatch.setattr(rt, "log", lines.append)
    hessians, sensitivities = calibrated(model)
    with_c = TrellisQuantizer(rt, model, hessians, sensitivities)
    assert with_c.rounding is train_gpt.round_paths and not lines
    train_gpt.c_library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    without = TrellisQuantizer(rt, model, hessians, sensitivities)
    assert len(lines) == 1 and "no C compiler: the PATH has" in lines[0]
    found = without.quantize(-9.0)
    monkeypatch.undo()
    expected = with_c.quantize(-9.0)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_compilers_words_take_one_line_of_the_log(rt, monkeypatch, tmp_path):
    """However many it has: the log has no line that a compiler wrote."""
    lines, compiler = [], tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'bad\nthe score: 0.9 bits per byte' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(rt, "log", lines.append)
    train_gpt.c_library.cache_clear()
    train_gpt.choose_rounding(rt)
    train_gpt.c_library.cache_clear()
    assert len(lines) == 1 and "\n" not in lines[0] and "bad the score" in lines[0]


def test_weights_that_no_common_factor_fits_stop_the_run(rt, monkeypatch):
    """Banks of zeros make steps so fine that fp32 cannot hold the others' integers: no file could be read again."""
    _, model = narrow_model(monkeypatch)
    hessians, sensitivities = calibrated(model)
    quantizer = TrellisQuantizer(rt, model, hessians, sensitivities)
    name = quantizer.parts[0][0]
    with pytest.raises(train_gpt.RunStopped, match=f"{name}'s weights are too large"):
        quantizer.quantize(-30.0)


def test_steps_are_the_same_bits_everywhere():
    """One rounded product with a quarter octave, then an exact power of two; beyond fp32: 0 or infinity."""
    exponents = torch.arange(-128, 128, dtype=torch.int8)
    steps = train_gpt.column_steps(torch.tensor([0.7, 3e38, 1e-38]), exponents.expand(3, -1))
    assert steps.shape == (3, 1, 256) and steps.dtype == torch.float32
    for step, found in zip((0.7, 3e38, 1e-38), steps[:, 0].numpy()):
        with np.errstate(all="ignore"):
            quarters = [np.float32(step) * np.float32(2 ** (exponent % 4 / 4)) for exponent in exponents.tolist()]
            expected = np.ldexp(np.array(quarters, np.float32), exponents.numpy().astype(np.int32) // 4)
        assert np.array_equal(found, expected)


def narrow_model(monkeypatch, **settings) -> tuple[train_gpt.Config, GPT]:
    """A very small model whose matrices are quantized all the same."""
    monkeypatch.setattr(train_gpt, "KEPT_FP16_ELEMENTS", 1000)
    config = tiny_config(**{"MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MLP_MULT": 2, **settings})
    return config, tiny_model(config)


def sites_of(model: GPT) -> list[tuple[str, int, str, torch.Tensor]]:
    """(bank, number, site, matrix) of all matrices."""
    return [(name, i, site, matrix) for name, sites in model.matrix_sites().items()
            for i, (site, matrix) in enumerate(zip(sites, getattr(model, name).detach().view(
                len(sites), *getattr(model, name).shape[-2:])))]


def calibrated(model: GPT) -> tuple[dict, dict]:
    """Random Hessians and sensitivities for every site."""
    generator, hessians, sensitivities = torch.Generator().manual_seed(0), {}, {}
    for _, _, site, matrix in sites_of(model):
        hessians.setdefault(site, random_hessian(matrix.size(1), generator))
        sensitivities.setdefault(site, torch.rand((), generator=generator) * 1e-4)
    return hessians, sensitivities


def test_trellis_quantizer_does_what_it_says(rt, monkeypatch):
    """Against a slow transcription: steps 2^(log_step + level + columns / 4), GPTQ one column at a time in fp64.

    A Hessian is damped by 0.16 * 4^log_step over the weights' variance, sensitivity counted, within bounds.
    """
    clamped = []
    config, model = narrow_model(monkeypatch)
    hessians, sensitivities = calibrated(model)
    tensors = TrellisQuantizer(rt, model, hessians, sensitivities).quantize(log_step := -9.0)
    different = total = without_feedback = 0
    for bank, i, site, matrix in sites_of(model):
        mean = hessians[site].diagonal().mean().double()
        damping = 0.16 * 4 ** log_step / matrix.double().var(1).mean() / sensitivities[site] ** 0.8
        clamped.append(torch.sign(damping - damping.clamp(1e-4 * mean, mean)).item())
        walk = inverses(hessians[site], damping.clamp(1e-4 * mean, mean))
        log = torch.zeros(matrix.size(1), dtype=torch.double)
        for left, inverse in walk:
            log[left[0]] = inverse[0, 0].log2() / 2
        level = log.mean() - 0.8 * sensitivities[site].double().log2() / 2
        columns = (4 * (log - log.mean())).round()
        step = 2 ** (log_step + level + columns / 4)
        integers = column_by_column(matrix, walk, step.expand_as(matrix), lambda y: train_gpt.round_columns(
            y[:, None].float())[:, 0])
        q, side = tensors[f"{bank}.q"][i], [tensors[f"{bank}.{part}"][i] for part in ("step", "columns", "rows")]
        assert q.dtype == torch.int32 and side[1].dtype == side[2].dtype == torch.int8
        assert side[0].item() == pytest.approx(2 ** (log_step + level.item()), rel=1e-5)
        assert torch.equal(side[1], columns.to(torch.int8)) and columns.unique().numel() > 3
        rows = 4 * (matrix.std(1).log2() - log_step - level)
        assert (side[2] - rows).abs().max() < 0.51
        different += int((q != integers).sum())
        alone = train_gpt.round_columns((matrix / step).float().T[..., None])[..., 0].T
        without_feedback += int((alone != q).sum())
        total += integers.numel()
        restored = q * train_gpt.column_steps(side[0][None], side[1][None])[0]
        torch.testing.assert_close(restored, (q * step).float(), rtol=1e-5, atol=0)
    assert set(clamped) >= {0}, clamped
    assert different < 1e-3 * total and without_feedback > 0.02 * total, f"{different} of {total} differ"
    kept = {name for name, p in model.named_parameters() if p.numel() <= 1000}
    assert set(tensors) == kept | {f"{bank}.{part}" for bank in (*GPT.BANKS, "embedding")
                                   for part in ("q", "step", "columns", "rows")}
    assert all(torch.equal(tensors[name], dict(model.named_parameters())[name].half()) for name in kept)


def test_steps_follow_the_sensitivity(rt, monkeypatch):
    """A matrix of 32 times less sensitivity gets steps four times as long, and the others keep theirs."""
    config, model = narrow_model(monkeypatch)
    hessians, sensitivities = calibrated(model)
    before = TrellisQuantizer(rt, model, hessians, sensitivities).quantize(-18.0)  # damped as little as may be
    sensitivities["mlp_in.2"] /= 32  # 32^(0.8 / 2) = 4
    after = TrellisQuantizer(rt, model, hessians, sensitivities).quantize(-18.0)
    ratio = torch.tensor([1, 1, 4, 1, 1, 1])
    torch.testing.assert_close(after["up_bank.step"], before["up_bank.step"] * ratio)
    assert after["up_bank.q"][2].abs().sum() < 0.3 * before["up_bank.q"][2].abs().sum()
    for name in set(before) - {"up_bank.step", "up_bank.q", "up_bank.rows"}:
        assert torch.equal(before[name], after[name]), name


def bits_of(symbols: torch.Tensor, context: torch.Tensor) -> float:
    """Entropy in bits of symbols given their context, by their histograms."""
    bits = 0.0
    for value in context.unique():
        n = symbols[context == value].unique(return_counts=True)[1].double()
        bits -= float((n * (n / n.sum()).log2()).sum())
    return bits / symbols.numel()


def test_the_trellis_costs_less_than_row_scales(rt, monkeypatch):
    """At the same entropy (a bit is 6 dB), where the Hessian's spectrum is spread: less than a third of the error."""
    config, model = narrow_model(monkeypatch, MODEL_DIM=64, MLP_MULT=4)
    hessians, sensitivities = calibrated(model)
    quantizer = TrellisQuantizer(rt, model, hessians, dict.fromkeys(sensitivities, torch.tensor(1.0)))
    tensors = quantizer.quantize(quantizer.log_step_for(3.0))
    assert 8 * len(train_gpt.pack_artifact(tensors, {})) / quantizer.weights == pytest.approx(3.0, abs=0.4)
    for bank, i in (("up_bank", 1), ("down_bank", 2)):
        site, matrix = model.matrix_sites()[bank][i], getattr(model, bank)[i].detach()
        q, step, columns, rows = (tensors[f"{bank}.{part}"][i:i + 1] for part in ("q", "step", "columns", "rows"))
        restored = (q * train_gpt.column_steps(step, columns))[0]
        contexts = torch.from_numpy(train_gpt.trellis_contexts({"w.rows": rows, "w.columns": columns}, "w"))[0]
        integers, scale = gptq_quantize(matrix, hessians[site], 4, 3.5)
        bits = bits_of(q[0] >> 1, contexts + (q[0] & 1)), bits_of(integers, torch.zeros_like(integers))
        errors = (weighted_error(matrix, restored, torch.ones(len(matrix)), hessians[site]),
                  weighted_error(matrix, integers, scale, hessians[site]))
        assert abs(bits[0] - bits[1]) < 1 and errors[0] * 4 ** bits[0] < 0.3 * errors[1] * 4 ** bits[1]


class ThreadRank(RankOf):
    """One of several ranks that are threads of this process: what they share is real."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: dict):
        super().__init__(rank, barrier.parties)
        self.barrier, self.given, self.log_file = barrier, given, None

    def gather(self, value):
        self.given[self.rank] = value
        self.barrier.wait(20)
        values = [self.given[rank] for rank in range(self.world)]
        self.barrier.wait(20)
        return values

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.gather(tensor.clone())))


def on_ranks(world: int, work) -> list:
    """What work(rt) returns on each of several ranks."""
    barrier, given = threading.Barrier(world), {}
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, [ThreadRank(rank, barrier, given) for rank in range(world)]))


def test_ranks_quantize_what_one_does(rt, monkeypatch):
    """Three of them: banks of 6 and 12 matrices, and an embedding that two have no share in."""
    config, model = narrow_model(monkeypatch)
    args = model, *calibrated(model)

    def work(rt):
        quantizer = TrellisQuantizer(rt, *args)
        return quantizer.weights, quantizer.log_step_for(4.0), quantizer.quantize(-9.0)

    weights, log_step, tensors = work(rt)
    assert weights == sum(matrix.numel() for *_, matrix in sites_of(model))
    for found in on_ranks(3, work):
        assert found[:2] == (weights, pytest.approx(log_step)) and list(found[2]) == list(tensors)
        for name, tensor in tensors.items():
            if name.endswith(".q"):
                assert (found[2][name] != tensor).float().mean() < 1e-3, name  # ties
            else:
                torch.testing.assert_close(found[2][name], tensor, rtol=1e-6, atol=0)


def test_dead_inputs_zero_matrices_and_insensitive_sites(rt, monkeypatch):
    config, model = narrow_model(monkeypatch)
    hessians, sensitivities = calibrated(model)
    hessians["mlp_in.1"][[3, 7]], hessians["mlp_in.1"][:, [3, 7]] = 0, 0
    hessians["mlp_in.4"].zero_()
    sensitivities["mlp_in.5"].zero_()
    with torch.no_grad():
        model.up_bank[2] = 0
        model.up_bank[3, 10] = 0
    quantizer = TrellisQuantizer(rt, model, hessians, sensitivities)
    assert math.isfinite(quantizer.mean_spread)
    tensors = quantizer.quantize(-9.0)
    q, step, columns, rows = (tensors[f"up_bank.{part}"] for part in ("q", "step", "columns", "rows"))
    restored = q * train_gpt.column_steps(step, columns)
    assert restored.isfinite().all() and (step > 0).all()
    assert not restored[1][:, [3, 7]].any() and restored[1].any()
    assert not restored[2].any() and not restored[4].any() and not restored[5].any()
    # a row of zeros goes along in its column's paths, which may pass it by a step or two
    assert (restored[3, 10].abs() <= 2.01 * train_gpt.column_steps(step, columns)[3, 0]).all()
    assert int(rows[2].max()) <= int(rows[3, 10]) < int(rows[3].float().mean())


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calibration(tmp_path):
    """Configuration, looping model and data whose training tokens lie below 150, its validation tokens above."""
    config = tiny_config(DATA_DIR=tmp_path, GPTQ_CALIBRATION_BATCHES=17, MICRO_BATCH_TOKENS=64)
    folder = write_shards(tmp_path, vocab_size=150)
    folder.rename(config.shard_dir)
    train_gpt.write_shard(config.shard_dir / "fineweb_val_000000.bin", np.arange(150, 300).repeat(20))
    model = tiny_model(config)
    model.looping = True
    return config, model, TrainData(config, train_gpt.Runtime(config))


def direct_hessians(model: GPT, batches: list[torch.Tensor], monkeypatch) -> tuple[dict, dict]:
    """Mean of x x^T for what torch's own linear function gets, told apart by the sublayer that is running."""
    inputs, sites = {}, []
    linear, attend, mlp, hidden = F.linear, GPT.attend, GPT.mlp, GPT.hidden

    def seen(x, site):
        inputs.setdefault(site, []).append(x.detach().double().flatten(0, 1))

    def watched_linear(x, matrix, bias=None):
        seen(x, sites.pop(0))
        return linear(x, matrix, bias)

    def watched_attend(self, x, w, layer, *rest):
        sites[:] = [f"attn_in.{layer}", f"attn_out.{layer}"]
        return attend(self, x, w, layer, *rest)

    def watched_mlp(self, x, w, layer):
        sites[:] = [f"mlp_in.{layer}", f"mlp_hidden.{layer}"]
        return mlp(self, x, w, layer)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched_linear)
        patch.setattr(GPT, "attend", watched_attend)
        patch.setattr(GPT, "mlp", watched_mlp)
        for ids in batches:
            seen(hidden(model, ids), "head")
    stacked = {site: torch.cat(x) for site, x in inputs.items()}
    return {site: x.T @ x / len(x) for site, x in stacked.items()}, {site: len(x) for site, x in stacked.items()}


def test_hessians_are_the_mean_over_training_inputs(calibration, monkeypatch):
    config, model, data = calibration
    batches = [torch.cat([inputs for inputs, _ in data.batch(k)]) for k in range(3)]
    expected, rows = direct_hessians(model, batches, monkeypatch)
    assert rows["head"] == 3 * 256 and rows["attn_in.1"] == 3 * 256 and rows["mlp_hidden.2"] == 3 * 3 * 256  # looped
    found = collect_hessians(config, data.rt, model, data)
    assert set(found) == set(expected) and "head" in found
    assert set(found) == {site for names in model.matrix_sites().values() for site in names}
    for site, hessian in expected.items():
        assert found[site].dtype == torch.float32
        difference = (found[site] - hessian).norm() / hessian.norm()
        assert difference < 1e-5, f"{site}: {difference}"
    still_watched = "project" in vars(model)
    assert not still_watched


def test_calibration_reads_training_tokens_only(calibration, monkeypatch):
    config, model, data = calibration
    seen, hidden, files, open_shard = [], GPT.hidden, [], train_gpt.open_shard
    monkeypatch.setattr(GPT, "hidden", lambda self, ids: seen.append(ids) or hidden(self, ids))
    monkeypatch.setattr(train_gpt, "open_shard", lambda path, *size: files.append(path.name) or open_shard(path, *size))
    training = ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    for number, (collector, batches) in enumerate(((collect_hessians, 3), (collect_sensitivities, 1))):
        seen.clear()
        collector(config, data.rt, model, TrainData(config, data.rt).in_order(1))
        assert sum(ids.numel() for ids in seen) == batches * 256 and max(int(ids.max()) for ids in seen) < 150
        assert files == training * (number + 1)


def by_hand(model: GPT, losses, ids: torch.Tensor) -> collections.Counter:
    """Sum over `losses` of the squared gradients at every site's outputs: mean over outputs, sum over the rest."""
    outputs, sums = [], collections.Counter()

    def kept(x, matrix, site):
        outputs.append((site, F.linear(x, matrix)))
        return outputs[-1][1]

    model.project = kept
    logits = kept(model.hidden(ids), model.embedding, "head")
    del model.project
    for loss in losses(30 * torch.tanh(logits / 30)):
        for site, gradient in zip((site for site, _ in outputs), torch.autograd.grad(
                loss, [y for _, y in outputs], retain_graph=True, allow_unused=True)):
            if gradient is not None:
                sums[site] += float(gradient.double().square().mean(-1).sum())
    return sums


@pytest.fixture
def one_sequence_at_a_time(tmp_path):
    """A looping model and few, short training sequences: the smallest micro-batches there are."""
    config = tiny_config(DATA_DIR=tmp_path, TRAIN_SEQ_LEN=8, TRAIN_BATCH_TOKENS=96, MICRO_BATCH_TOKENS=40,
                         GPTQ_CALIBRATION_BATCHES=65)
    write_shards(tmp_path, vocab_size=300)
    model = tiny_model(config)
    model.looping = True
    return config, model, TrainData(config, train_gpt.Runtime(config))


def test_sensitivities_are_mean_squared_gradients(one_sequence_at_a_time):
    """Batches 0 and 8, one sequence after another: the gradient of the sequence's loss at each output."""
    config, model, data = one_sequence_at_a_time
    expected, tokens = collections.Counter(), 0
    for ids, targets in itertools.chain(data.batch(0), data.batch(8)):
        for i in range(len(ids)):
            expected.update(by_hand(model, lambda z, t=targets[i]: [F.cross_entropy(z[0], t, reduction="sum")],
                                    ids[i:i + 1]))
            tokens += ids.size(1)
    found = collect_sensitivities(config, data.rt, model, data)
    assert tokens == 2 * 96 and set(found) == set(expected) == {
        site for names in model.matrix_sites().values() for site in names}
    for site, value in found.items():
        assert value.shape == () and value.dtype == torch.float32
        assert float(value) == pytest.approx(expected[site] / tokens, rel=1e-4), site
    assert all(p.requires_grad for p in model.parameters()) and "project" not in vars(model)


def test_a_sequences_gradient_stands_for_its_tokens(one_sequence_at_a_time):
    """Gradients of one sequence's tokens are uncorrelated where the model itself draws them: the Fisher information."""
    config, model, _ = one_sequence_at_a_time
    together, alone = collections.Counter(), collections.Counter()
    torch.manual_seed(0)
    for _ in range(12):
        ids = torch.randint(0, 300, (1, 8))
        with torch.no_grad():
            targets = torch.distributions.Categorical(logits=model.head(model.hidden(ids)[:, -8:])).sample()

        def each(z, targets=targets):
            return F.cross_entropy(z[0], targets[0], reduction="none")

        together.update(by_hand(model, lambda z: [each(z).sum()], ids))
        alone.update(by_hand(model, each, ids))
    for site, value in alone.items():
        assert 0.85 < together[site] / value < 1.2, site


def test_sensitivities_of_ranks_add_up_to_one(calibration):
    config, model, data = calibration
    whole = collect_sensitivities(config, data.rt, model, data)
    shares = [collect_sensitivities(config, rt, model, TrainData(config, rt)) for rt in (RankOf(0, 2), RankOf(1, 2))]
    for site, value in whole.items():
        torch.testing.assert_close(shares[0][site] + shares[1][site], value, rtol=1e-4, atol=0)


def test_an_untrained_models_sensitivities_are_finite(calibration):
    """Where sublayers' outputs are still zero, no gradient reaches what stands before them."""
    config, _, data = calibration
    found = collect_sensitivities(config, data.rt, GPT(config), data)
    assert found["attn_in.0"] == 0 and found["head"] > 0 and all(value.isfinite() for value in found.values())


def test_ranks_add_up_to_one(calibration):
    config, model, data = calibration
    whole = collect_hessians(config, data.rt, model, data)
    shares = []
    for rank in range(2):
        rt = RankOf(rank, 2)
        shares.append(collect_hessians(config, rt, model, TrainData(config, rt)))
    for site, hessian in whole.items():
        torch.testing.assert_close(shares[0][site] + shares[1][site], hessian, rtol=1e-4, atol=1e-5)


# --- the artifact's tensors -----------------------------------------------------------------------------------------


def wide_model(vocab_size: int) -> tuple[train_gpt.Config, GPT]:
    """A model whose banks are large enough to be quantized."""
    config = tiny_config(MODEL_DIM=128, NUM_LAYERS=5, VOCAB_SIZE=vocab_size, MATRIX_CLIP_SIGMAS=7, EMBED_CLIP_SIGMAS=11)
    return config, tiny_model(config)


def hessians_of(model: GPT, make) -> dict[str, torch.Tensor]:
    width = {"mlp_hidden": model.down_bank.size(-1)}
    return {site: make(width.get(site.split(".")[0], 128)) for names in model.matrix_sites().values() for site in names}


def test_small_tensors_stay_fp16_and_large_ones_become_integers(rt):
    banks = {"qo_bank", "kv_bank", "up_bank", "down_bank"}
    for vocab_size, quantized in ((512, banks), (513, banks | {"embedding"})):  # 512 * 128 is 65,536: it stays
        config, model = wide_model(vocab_size)
        tensors = quantize_rows(config, rt, model, hessians_of(model, torch.eye))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        expected = {name: (torch.float16, shape) for name, shape in shapes.items() if name not in quantized}
        for name in quantized:
            expected[f"{name}.q"] = torch.int8, shapes[name]
            expected[f"{name}.scale"] = torch.float16, shapes[name][:-1]
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected
        for name in set(shapes) - quantized:
            assert torch.equal(tensors[name], dict(model.named_parameters())[name].half())


def test_tables_may_be_rounded_to_the_nearest(rt):
    """EMBED_GPTQ_ENABLED=0, and the table of value embeddings always: no Hessian moves an integer."""
    config = tiny_config(MODEL_DIM=128, NUM_LAYERS=5, VOCAB_SIZE=700, VE_LAYERS="4", VE_DIM=128, EMBED_GPTQ_ENABLED=0,
                         QUANTIZER="sdclip", EMBED_CLIP_SIGMAS=11)
    model, generator = tiny_model(config), torch.Generator().manual_seed(4)
    tensors = quantize_rows(config, rt, model, hessians_of(model, lambda width: random_hessian(width, generator)))
    for name, table in (("embedding", model.embedding), ("value_embedding.table", model.value_embedding.table)):
        scale = (11 * table.detach().std(-1) / 127).half()
        assert torch.equal(tensors[f"{name}.scale"], scale)
        nearest = (table.detach() / scale.float()[:, None]).round().clamp(-127, 127)
        assert torch.equal(tensors[f"{name}.q"].float(), nearest)
    restored = train_gpt.model_from_artifact(config, rt, tensors)
    assert (restored.value_embedding.table - model.value_embedding.table).abs().max() < 0.02


def test_each_matrix_is_quantized_with_its_own_hessian_and_bits(rt):
    config, model = wide_model(600)
    generator = torch.Generator().manual_seed(4)
    hessians = hessians_of(model, lambda width: random_hessian(width, generator))
    tensors = quantize_rows(config, rt, model, hessians)
    layers = range(5)
    sites = {"qo_bank": [f"attn_in.{i}" for i in layers] + [f"attn_out.{i}" for i in layers],
             "kv_bank": [f"attn_in.{i}" for i in layers] + [f"attn_in.{i}" for i in layers],
             "up_bank": [f"mlp_in.{i}" for i in layers], "down_bank": [f"mlp_hidden.{i}" for i in layers]}
    for bank, names in sites.items():
        for i in (0, len(names) // 2, len(names) - 1):
            matrix = getattr(model, bank).detach()[i]
            integers, scale = gptq_quantize(matrix, hessians[names[i]], 6, 7.0)
            assert torch.equal(tensors[f"{bank}.scale"][i], scale)
            assert (tensors[f"{bank}.q"][i] != integers).float().mean() < 1e-3, f"{bank} {i}"
    integers, scale = gptq_quantize(model.embedding.detach(), hessians["head"], 8, 11.0)
    assert torch.equal(tensors["embedding.scale"], scale) and int(tensors["embedding.q"].abs().max()) > 31
    assert (tensors["embedding.q"] != integers).float().mean() < 1e-3


def test_the_dequantized_model_is_near_the_original(rt):
    config, model = wide_model(600)
    tensors = quantize_rows(config, rt, model, hessians_of(model, torch.eye))
    restored = train_gpt.model_from_artifact(config, rt, tensors)
    assert restored.looping
    for (name, p), (_, q) in zip(model.named_parameters(), restored.named_parameters()):
        if name in GPT.BANKS or name == "embedding":  # half a step of the row's scale, and clipped outliers
            sigmas, top = (11, 127) if name == "embedding" else (7, 31)
            assert ((p - q).abs() <= 0.501 * sigmas / top * p.std(-1, keepdim=True)).float().mean() > 0.999, name
            assert not torch.equal(p, q)
        else:
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-6)
    ids = torch.randint(0, 600, (2, 32), generator=torch.Generator().manual_seed(0))
    model.looping = True
    with torch.no_grad():
        logits, again = (m.head(m.hidden(ids)[:, -32:]) for m in (model, restored))
        assert (logits - again).abs().mean() < 0.25 * logits.std()


@pytest.mark.parametrize("quantize", ["trellis", "rows"])
def test_a_large_vector_is_no_matrix(quantize, rt, monkeypatch):
    """Of 33 layers 1024 wide, `resid_mix` has more than 65,536 elements."""
    config, model = narrow_model(monkeypatch)
    monkeypatch.setattr(train_gpt, "KEPT_FP16_ELEMENTS", 10)
    hessians, sensitivities = calibrated(model)
    tensors = (TrellisQuantizer(rt, model, hessians, sensitivities).quantize(-9.0) if quantize == "trellis" else
               train_gpt.quantize_rows(config, rt, model, hessians))
    assert {name.rpartition(".")[0] for name in tensors if name.endswith(".q")} == {*GPT.BANKS, "embedding"}
    assert torch.equal(tensors["resid_mix"], model.resid_mix.half())
