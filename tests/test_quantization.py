"""Room 7: Hessians from training data, GPTQ against the paper done slowly, the artifact's tensors."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model, write_shards
from test_data import RankOf

import train_gpt
from train_gpt import GPT, TrainData, collect_hessians, dequantize, gptq_quantize, quantize_rows


def random_hessian(columns: int, generator: torch.Generator, batch: tuple[int, ...] = ()) -> torch.Tensor:
    """Mean of x x^T of correlated inputs whose variances differ a lot and lie in no order."""
    x = torch.randn(*batch, 3 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns ** 0.5)
    x = x * torch.exp(torch.randn(columns, generator=generator))
    return x.mT @ x / x.size(-2)


def by_the_paper(weight, hessian, bits, clip_sigmas, damping=0.01, scale=None):
    """GPTQ as published, one column after another, the inverse made anew for the columns that are left (fp64)."""
    top = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * weight.std(1) / top).half() if scale is None else scale
    w, h, s = weight.double().clone(), hessian.double().clone(), scale.double()
    order = torch.argsort(-h.diagonal(), stable=True).tolist()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.double)
    integers = torch.zeros_like(w)
    while order:
        inverse = torch.linalg.inv(h[order][:, order])
        column = order[0]
        integers[:, column] = (w[:, column] / s).round().clamp(-top, top)
        error = (w[:, column] - integers[:, column] * s) / inverse[0, 0]
        w[:, order] -= torch.outer(error, inverse[0])
        order.pop(0)
    return integers, scale


def weighted_error(weight, integers, scale, hessian) -> float:
    error = (weight - dequantize(integers, scale)).double()
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
    expected, _ = by_the_paper(weight[others][:, alive], hessian[alive][:, alive], 6, 12.85, 0.01 * 37 / 40,
                               scale[others])
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
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(dequantize(integers, scale)).all()


def test_a_hessian_of_nan_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        gptq_quantize(torch.randn(4, 8), torch.full((8, 8), torch.nan))


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calibration(tmp_path):
    """Configuration, looping model and data whose training tokens lie below 150, its validation tokens above."""
    config = tiny_config(DATA_DIR=tmp_path, GPTQ_CALIBRATION_BATCHES=3, MICRO_BATCH_TOKENS=64)
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

    def watched_attend(self, x, w, layer, rope):
        sites[:] = [f"attn_in.{layer}", f"attn_out.{layer}"]
        return attend(self, x, w, layer, rope)

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
    monkeypatch.setattr(train_gpt, "open_shard", lambda path: files.append(path.name) or open_shard(path))
    collect_hessians(config, data.rt, model, TrainData(config, data.rt).in_order(1))
    assert sum(ids.numel() for ids in seen) == 3 * 256 and max(int(ids.max()) for ids in seen) < 150
    assert files == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]


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
        assert (model.logits(ids, 32) - restored.logits(ids, 32)).abs().mean() < 0.25 * model.logits(ids, 32).std()
