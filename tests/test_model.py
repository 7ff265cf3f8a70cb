"""Room 4: the model against slow, obvious references written from the formulas themselves."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model

import train_gpt
from train_gpt import GPT, Config, build_schedule

# ---- the slow reference: one position of one head at a time, fp64 ----------------------------------------------------


def rms_norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def reference_rope(x, cfg):
    """Rotate x [T, d]: dimension i and i + rope_dims / 2 are the real and imaginary part of a complex number."""
    length, half = len(x), cfg.rope_dims // 2
    base = cfg.rope_base
    if length > cfg.rope_train_seq_len:
        base = base * (length / cfg.rope_train_seq_len) ** (cfg.rope_dims / (cfg.rope_dims - 2))
    rows = []
    for t in range(length):
        angles = torch.tensor([-t / base ** (2 * i / cfg.rope_dims) for i in range(half)], dtype=torch.float64)
        pair = torch.complex(x[t, :half], x[t, half:2 * half]) * torch.polar(torch.ones_like(angles), angles)
        rows.append(torch.cat((pair.real, pair.imag, x[t, 2 * half:])))
    return torch.stack(rows)


def reference_attention(x, layer, p, cfg, ids):
    """Attention sublayer of one sequence [T, D], before the learned output scale."""
    n, heads, groups, width = cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    q = (x @ p["qo_bank"][layer].T).reshape(-1, heads, width)
    k = (x @ p["kv_bank"][layer].T).reshape(-1, groups, width)
    v = x @ p["kv_bank"][n + layer].T
    value_layers = [int(i) for i in cfg.ve_layers.split(",") if i]
    if layer in value_layers:
        scale = p["value_embedding.scale"] * p["value_embedding.layer_scales"][value_layers.index(layer)]
        v = v + scale * (p["value_embedding.table"][ids] @ p["value_embedding.bank"][0].T)
    v = v.reshape(-1, groups, width)
    outputs = []
    for h in range(heads):
        g = h // (heads // groups)
        queries = reference_rope(rms_norm(q[:, h]), cfg) * p["q_gain"][layer, h]
        keys, values = reference_rope(rms_norm(k[:, g]), cfg), v[:, g]
        rows = []
        for t in range(len(x)):
            y = torch.softmax(keys[:t + 1] @ queries[t] / math.sqrt(width), 0) @ values[:t + 1]
            if layer >= n - cfg.xsa_last_n:
                own = values[t] / values[t].norm()
                y = y - (y @ own) * own
            rows.append(y)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ p["qo_bank"][n + layer].T


def reference_mlp(x, layer, p):
    hidden = x @ p["up_bank"][layer].T
    return torch.where(hidden > 0, hidden, 0.5 * hidden).square() @ p["down_bank"][layer].T


def reference_logits(ids, p, cfg, looping):
    """Logits [T, V] of one sequence, straight from the published descriptions."""
    loop = [int(i) for i in cfg.recur_layers.split(",") if i] or list(range(cfg.loop_start, cfg.loop_end + 1))
    order = list(range(max(loop) + 1)) + loop * cfg.num_loops * looping + list(range(max(loop) + 1, cfg.num_layers))
    encoder, decoder = order[:len(order) // 2], order[len(order) // 2:]
    kind = cfg.parallel_residual
    x0 = rms_norm(p["embedding"][ids])
    if cfg.smear_gate_enabled:
        gate, alone = torch.sigmoid(p["smear_gate"]), x0
        x0 = torch.stack([alone[t] if t == 0 or ids[t] == 1 else (1 - gate) * alone[t] + gate * alone[t - 1]
                          for t in range(len(ids))])
    lanes, skips = [x0], []
    for position, layer in enumerate(encoder + decoder):
        row = position - len(encoder)
        parallel = kind != "none" and max(order[:position + 1]) >= cfg.parallel_residual_start
        if kind in ("improved", "lanes") and parallel and len(lanes) == 1:
            lanes = [lanes[0], lanes[0]]
        if row >= 0 and skips and (cfg.max_skips == 0 or row < cfg.max_skips):
            skip = p["skip_weights"][row] * skips.pop()
            for k in range(1 if kind == "lanes" else len(lanes)):
                if cfg.skip_gates_enabled:
                    gate = torch.sigmoid(p["skip_gates"][row])
                    lanes[k] = (1 - gate) * skip + gate * lanes[k]
                else:
                    lanes[k] = lanes[k] + skip
        depth = math.sqrt(layer + 1) if cfg.ln_scale else 1
        mixed = [p["resid_mix"][layer, 0] * x + p["resid_mix"][layer, 1] * x0 for x in lanes]
        attn_out = p["attn_scale"][layer] * reference_attention(rms_norm(mixed[0]) / depth, layer, p, cfg, ids)

        def mlp_of(x, layer=layer, depth=depth):
            return p["mlp_scale"][layer] * reference_mlp(rms_norm(x) / depth, layer, p)

        if not parallel:
            x = mixed[0] + attn_out
            lanes = [x + mlp_of(x)]
        elif kind == "plain":
            lanes = [mixed[0] + attn_out + mlp_of(mixed[0])]
        elif kind == "lanes":
            lanes = [mixed[0] + attn_out, lanes[1] + mlp_of(lanes[1])]
        else:
            mlp_out = mlp_of(mixed[1])
            (a, b), post = p["par_resid"][layer], p["par_post"][layer]
            lanes = [a * lanes[k] + post[0, k] * attn_out for k in (0, 1)]
            lanes = [b * lanes[k] + post[1, k] * mlp_out for k in (0, 1)]
        if row < 0:
            skips.append(lanes[-1])
    final = lanes[-1]
    if kind == "lanes" and len(lanes) == 2:
        final = p["lane_merge"] * lanes[0] + (1 - p["lane_merge"]) * lanes[1]
    z = rms_norm(final) @ p["embedding"].T
    return cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)


def random_ids(*shape, seed=0):
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overrides, looping", [
    ({}, False), ({}, True), ({"skip_gates_enabled": 0}, True), ({"parallel_residual": "none"}, True),
    ({"parallel_residual_start": 5, "loop_start": 1, "loop_end": 1}, True), ({"parallel_residual_start": 3}, False),
    ({"xsa_last_n": 2}, False), ({"xsa_last_n": 0}, True), ({"ln_scale": 0}, True), ({"num_kv_heads": 4}, True),
    ({"rope_train_seq_len": 5, "rope_dims": 16}, True), ({"logit_softcap": 5}, False),
    ({"parallel_residual": "plain"}, True), ({"parallel_residual": "lanes"}, True),
    ({"parallel_residual": "lanes", "parallel_residual_start": 2, "recur_layers": "1,4", "skip_gates_enabled": 0},
     True),
    ({"parallel_residual": "plain", "parallel_residual_start": 1}, False), ({"max_skips": 2}, True),
    ({"recur_layers": "3,4", "num_loops": 1, "max_skips": 3, "smear_gate_enabled": 1}, True),
    ({"ve_layers": "1,5", "ve_dim": 12, "quantizer": "sdclip"}, True)], ids=str)
def test_model_is_the_slow_reference(overrides, looping):
    """Logits, scores, loss and the gradient of every parameter, none of which is at its initial value."""
    cfg = tiny_config(**overrides)
    model = tiny_model(cfg, noise=0.2)
    model.looping = looping
    p = {name: w.detach().double().requires_grad_() for name, w in model.named_parameters()}
    tokens = random_ids(2, 10)
    tokens[0, 4] = 1  # a document begins
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    expected = torch.stack([reference_logits(row, p, cfg, looping) for row in ids])
    expected_nll = expected.logsumexp(-1) - expected.gather(-1, targets[..., None])[..., 0]
    expected_nll.mean().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.hidden(ids)).double(), expected, rtol=0, atol=5e-4)
        torch.testing.assert_close(model.nll(ids, targets).double(), expected_nll, rtol=0, atol=5e-4)
        torch.testing.assert_close(model.nll(ids, targets[:, -4:]).double(), expected_nll[:, -4:], rtol=0, atol=5e-4)
    loss = model(ids, targets)
    torch.testing.assert_close(loss.double(), expected_nll.mean(), rtol=0, atol=1e-4)
    loss.backward()
    for name, w in model.named_parameters():
        error = (w.grad - p[name].grad).norm() / (p[name].grad.norm() + 1e-12)
        assert error < 1e-4, (name, float(error))


# ---- parameters of the default preset --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_model():
    torch.manual_seed(0)
    return GPT(Config.from_env({}))


def test_default_parameter_count_and_shapes(default_model):
    shapes = {name: tuple(p.shape) for name, p in default_model.named_parameters()}
    assert shapes == {
        "embedding": (8192, 512), "qo_bank": (22, 512, 512), "kv_bank": (22, 256, 512), "up_bank": (11, 2048, 512),
        "down_bank": (11, 512, 2048), "resid_mix": (11, 2, 512), "attn_scale": (11, 512), "mlp_scale": (11, 512),
        "q_gain": (11, 8), "skip_weights": (8, 512), "skip_gates": (8, 512), "par_resid": (11, 2),
        "par_post": (11, 2, 2)}
    assert sum(p.numel() for p in default_model.parameters()) == 35_944_602
    assert {p.dtype for p in default_model.parameters()} == {torch.float32}


def test_default_initial_values(default_model):
    p = {name: w.detach() for name, w in default_model.named_parameters()}
    assert abs(p["embedding"].std().item() - 0.005) < 2e-5 and abs(p["embedding"].mean().item()) < 2e-5
    assert not p["qo_bank"][11:].any() and not p["down_bank"].any()  # outputs of sublayers
    for matrix in (*p["qo_bank"][:11], *p["kv_bank"], *p["up_bank"]):
        short = matrix if len(matrix) <= 512 else matrix.T
        torch.testing.assert_close(short @ short.T, torch.eye(len(short)), rtol=0, atol=1e-4)
    assert not torch.equal(p["qo_bank"][0], p["qo_bank"][1]) and not torch.equal(p["kv_bank"][0], p["kv_bank"][11])
    for name, value in {"q_gain": 5.25, "attn_scale": 1, "mlp_scale": 1, "skip_weights": 1, "skip_gates": 0,
                        "par_resid": math.sqrt(1.1), "par_post": 1}.items():
        torch.testing.assert_close(p[name], torch.full_like(p[name], value), rtol=1e-7, atol=0)
    assert (p["resid_mix"][:, 0] == 1).all() and (p["resid_mix"][:, 1] == 0).all()


def test_optional_parameters_follow_the_settings():
    names = {name for name, _ in GPT(tiny_config(skip_gates_enabled=0, parallel_residual="none")).named_parameters()}
    assert not names & {"skip_gates", "par_resid", "par_post"}
    assert "skip_weights" in names
    assert GPT(tiny_config(num_loops=0)).skip_weights.shape == (3, 64)
    assert GPT(tiny_config()).skip_weights.shape == (5, 64)


def test_matrices_start_orthogonal_and_outputs_of_sublayers_at_zero():
    model = GPT(tiny_config())
    layers = model.config.num_layers
    for matrix in (*model.qo_bank[:layers], *model.kv_bank, *model.up_bank):
        wide = matrix.detach() if matrix.size(0) <= matrix.size(1) else matrix.detach().T
        assert torch.allclose(wide @ wide.T, torch.eye(len(wide)), atol=1e-5)
    assert not model.qo_bank[layers:].any() and not model.down_bank.any()


# ---- schedule --------------------------------------------------------------------------------------------------------


def halves(schedule):
    return [v.layer for v in schedule if v.push], [v.layer for v in schedule if not v.push]


def popped(schedule):
    """Simulate the stack: (decoder position, row of the skip weights, encoder position that is popped)."""
    stack, merges, encoder = [], [], sum(v.push for v in schedule)
    for i, v in enumerate(schedule):
        if v.skip >= 0:
            merges.append((i - encoder, v.skip, stack.pop()))
        if v.push:
            stack.append(i)
    return merges


def test_default_schedule():
    cfg = Config.from_env({})
    plain, looped = build_schedule(cfg, False), build_schedule(cfg, True)
    assert halves(plain) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert halves(looped) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    for schedule in (plain, looped):
        assert {v.layer for v in schedule if v.parallel} == {7, 8, 9, 10}
        assert {v.layer for v in schedule if not v.parallel} == {0, 1, 2, 3, 4, 5, 6}
    assert popped(plain) == [(j, j, 4 - j) for j in range(5)]
    assert popped(looped) == [(j, j, 7 - j) for j in range(8)]


def test_other_schedules():
    cfg = Config.from_env({"LOOP_START": "4", "LOOP_END": "5", "NUM_LOOPS": "1", "PARALLEL_RESIDUAL": "none"})
    looped = build_schedule(cfg, True)
    assert halves(looped) == ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10])
    assert not any(v.parallel for v in looped)
    whole = Config.from_env({"LOOP_START": "0", "LOOP_END": "10", "NUM_LOOPS": "1"})
    assert halves(build_schedule(whole, True)) == (list(range(11)), list(range(11)))
    one = Config.from_env({"LOOP_START": "10", "LOOP_END": "10", "NUM_LOOPS": "3"})
    assert sum(halves(build_schedule(one, True)), []) == [*range(11), 10, 10, 10]
    assert len(popped(build_schedule(one, True))) == 7


@pytest.mark.parametrize("preset, parameters, encoder, decoder, parallel, skips", [
    ("pr1858", 35_944_536, [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10], 4, 8),
    ("pr1395", 34_401_372, [0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10], 4, 5),
    ("pr1517", 35_941_976, [0, 1, 2, 3, 4, 5, 3], [4, 5, 6, 7, 8, 9, 10], 0, 5)])
def test_published_presets(preset, parameters, encoder, decoder, parallel, skips):
    """Parameters and virtual layers of the submissions' own logs."""
    cfg = Config.from_env({"PRESET": preset})
    with torch.device("meta"):
        model = GPT(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert halves(model.schedules[True]) == (encoder, decoder)
    assert halves(model.schedules[False]) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert [v.layer for v in model.schedules[True] if v.parallel] == list(range(7, 11))[:parallel]
    assert popped(model.schedules[True]) == [(j, j, len(encoder) - 1 - j) for j in range(skips)]
    assert len(model.skip_weights) == len(model.skip_gates) == skips


def test_new_parameters_start_without_effect_or_as_published():
    cfg = tiny_config(parallel_residual="lanes", smear_gate_enabled=1, ve_layers="4,5", ve_dim=16, quantizer="sdclip")
    p = {name: w.detach() for name, w in GPT(cfg).named_parameters()}
    assert p["lane_merge"] == 0.5 and not p["smear_gate"].any() and torch.sigmoid(p["smear_gate"][0]) == 0.5
    assert not p["value_embedding.bank"].any() and p["value_embedding.bank"].shape == (1, 32, 16)
    assert p["value_embedding.scale"] == pytest.approx(0.1) and (p["value_embedding.layer_scales"] == 1).all()
    assert p["value_embedding.table"].shape == (300, 16) and p["value_embedding.table"].std() > 0.005


def test_no_document_smears_into_the_next():
    """Other tokens before a document's beginning leave its mixed embeddings as they are, to the last bit."""
    torch.manual_seed(0)
    table, gate = torch.randn(300, 8), torch.randn(8)
    ids = random_ids(1, 12)
    ids[0, 5] = 1
    other = ids.clone()
    other[0, :5] = random_ids(1, 5, seed=1)
    mixed = [train_gpt.smear(table[tokens], tokens, gate) for tokens in (ids, other)]
    assert torch.equal(mixed[0][:, 5:], mixed[1][:, 5:]) and not torch.equal(mixed[0][:, 4], mixed[1][:, 4])
    assert torch.equal(mixed[0][:, [0, 5]], table[ids[:, [0, 5]]]), "nothing comes before a window or a document"


@pytest.mark.parametrize("bits, top", [(6, 31), (4, 7)])
def test_late_qat_reaches_every_bank(bits, top):
    """The matrices compute as if rounded to SDClip's integers, and their gradients pass unchanged."""
    cfg = tiny_config(late_qat_threshold=0.1, matrix_clip_sigmas=6, matrix_bits=bits)
    model, ids = tiny_model(cfg), random_ids(2, 8)
    exact = model(ids, ids)
    exact.backward()
    exact_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.late_qat = True
    rounded_loss = model(ids, ids)
    rounded_loss.backward()
    rounded = tiny_model(cfg)
    with torch.no_grad():
        for name in GPT.BANKS:
            bank = getattr(rounded, name)
            for row in bank.view(-1, bank.size(-1)):
                step = 6 * row.std() / top
                row.copy_((row / step).round().clamp(-top, top) * step)
    expected = rounded(ids, ids)
    expected.backward()
    torch.testing.assert_close(rounded_loss, expected, rtol=1e-5, atol=1e-6)
    assert abs(rounded_loss - exact) > 1e-5
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, dict(rounded.named_parameters())[name].grad, rtol=1e-3, atol=1e-6)
        assert not torch.equal(p.grad, exact_grads[name])


def test_no_loops_means_one_schedule():
    model = tiny_model(tiny_config(num_loops=0))
    assert model.schedules[False] == model.schedules[True] == build_schedule(model.config, False)
    assert halves(model.schedules[True]) == ([0, 1, 2], [3, 4, 5])


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_rotary_base_grows_beyond_the_training_length():
    """1e4, and beyond 2048 tokens 1e4 * (length / 2048)^(16/14)."""
    cfg = Config.from_env({})
    for length, base in ((64, 1e4), (2048, 1e4), (4096, 1e4 * 2 ** (16 / 14)), (3000, 1e4 * (3000 / 2048) ** (8 / 7))):
        angles = train_gpt.rotary_angles(cfg, length, torch.device("cpu"))
        assert angles.shape == (length, 1, 8)
        expected = torch.tensor([base ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
        torch.testing.assert_close(angles[1, 0].double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(angles[length - 1, 0].double(), expected * (length - 1), rtol=1e-5, atol=0)


def slow_flash_attention(q, k, v, causal):
    """What flash_attn_func promises: [B, T, H, d] in and out, grouped heads, scale 1 / sqrt(d)."""
    assert causal and q.shape[:2] == k.shape[:2] == v.shape[:2]
    each = q.size(2) // k.size(2)
    heads = []
    for h in range(q.size(2)):
        rows = []
        for t in range(q.size(1)):
            keys, values = k[:, :t + 1, h // each], v[:, :t + 1, h // each]
            scores = (keys * q[:, t, None, h]).sum(-1) / math.sqrt(q.size(-1))
            rows.append((scores.softmax(-1)[..., None] * values).sum(1))
        heads.append(torch.stack(rows, 1))
    return torch.stack(heads, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_kernels_agree(groups, monkeypatch):
    monkeypatch.setattr(train_gpt, "flash_attn_func", slow_flash_attention)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 11, heads, 16) for heads in (4, groups, groups)]
    upstream, results = torch.randn(2, 11, 4, 16), {}
    for kernel in ("fa3", "sdpa", "plain"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = train_gpt.causal_attention(*leaves, kernel)
        results[kernel] = [y, *torch.autograd.grad(y, leaves, upstream)]
    for kernel in ("sdpa", "plain"):
        for got, expected in zip(results[kernel], results["fa3"]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_model_gives_the_same_with_every_kernel(monkeypatch):
    monkeypatch.setattr(train_gpt, "flash_attn_func", slow_flash_attention)
    tokens, results = random_ids(2, 10), {}
    for kernel in ("sdpa", "plain", "fa3"):
        model = tiny_model(tiny_config())
        model.attention, model.looping = kernel, True
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results[kernel] = [loss.detach(), *(p.grad for p in model.parameters())]
    for kernel in ("plain", "fa3"):
        for got, expected in zip(results[kernel], results["sdpa"]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows, chunk", [(17, 7), (17, 17), (17, 512), (1, 1), (16, 4)])
def test_softcap_cross_entropy_is_autograd(rows, chunk, monkeypatch):
    monkeypatch.setattr(train_gpt, "HEAD_CHUNK_TOKENS", {"cpu": chunk})
    torch.manual_seed(0)
    x, weight, targets = 3 * torch.randn(rows, 24), 2 * torch.randn(50, 24), torch.randint(50, (rows,))
    targets[0] = 49
    got = [t.clone().requires_grad_() for t in (x, weight)]
    want = [t.double().requires_grad_() for t in (x, weight)]
    loss = train_gpt.SoftcapCrossEntropy.apply(*got, targets, 30.0)
    expected = F.cross_entropy(30 * torch.tanh(want[0] @ want[1].T / 30), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (-2.5 * loss).backward()  # a factor upstream must reach the gradients
    (-2.5 * expected).backward()
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_score(monkeypatch):
    monkeypatch.setattr(train_gpt, "HEAD_CHUNK_TOKENS", {"cpu": 7})
    model, tokens = tiny_model(tiny_config()), random_ids(3, 12)
    with torch.no_grad():
        loss, nll = model(tokens[:, :-1], tokens[:, 1:]), model.nll(tokens[:, :-1], tokens[:, 1:])
    assert nll.shape == (3, 11)
    torch.testing.assert_close(loss, nll.mean(), rtol=1e-5, atol=0)


def test_logits_are_fp32_whatever_the_products_are():
    """A log-softmax in bf16 would have two digits."""
    model = tiny_model(tiny_config())
    model.dtype = torch.bfloat16
    assert model.head(torch.randn(2, 64).bfloat16()).dtype == torch.float32


def test_squared_leaky_relu_is_autograd():
    x = torch.cat((torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.zeros(1)))
    upstream = torch.linspace(-1, 2, len(x))
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = train_gpt.SquaredLeakyReLU.apply(got), F.leaky_relu(want, 0.5) ** 2
    torch.testing.assert_close(y, expected)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(got.grad, want.grad)


def test_exclude_own_value():
    torch.manual_seed(0)
    y, v = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 3, 8)
    got = train_gpt.exclude_own_value(y, v)
    own = v.repeat_interleave(2, dim=2)
    assert (got * own).sum(-1).abs().max() < 1e-5
    unit = F.normalize(own, dim=-1)
    torch.testing.assert_close(got, y - (y * unit).sum(-1, keepdim=True) * unit)
    assert train_gpt.exclude_own_value(y, torch.zeros_like(v)).equal(y)  # nothing to project on, and no NaN


@pytest.mark.parametrize("looping", [False, True])
def test_no_position_sees_the_future_or_another_row(looping):
    model, ids = tiny_model(tiny_config(), noise=0.2), random_ids(3, 32)
    model.looping = looping
    with torch.no_grad():
        before = model.head(model.hidden(ids)[:, -32:])
        for t in (0, 13, 31):
            changed = ids.clone()
            changed[1, t] += 1 if ids[1, t] < 299 else -1
            after = model.head(model.hidden(changed)[:, -32:])
            assert torch.equal(before[1, :t], after[1, :t])
            assert torch.equal(before[[0, 2]], after[[0, 2]])
            assert (before[1, t:] != after[1, t:]).any(-1).all()  # all later ones do see it


@pytest.mark.slow
@pytest.mark.parametrize("looping", [False, True])
def test_compiled_loss_is_the_eager_one(looping):
    tokens, results = random_ids(4, 33), []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = tiny_model(tiny_config(num_layers=3, loop_start=1, loop_end=1, parallel_residual_start=2))
        model.looping = looping
        loss_fn = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        loss = loss_fn(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_bank_without_inputs_for_gptq_is_refused_at_once():
    """It would be missed after training only, or be quantized as if its inputs were white."""
    class Gated(train_gpt.GPT):
        sites = {}

        def matrix_sites(self):
            return {**super().matrix_sites(), **self.sites}

    config = tiny_config()
    for sites in ({"up_bank": ["a"]}, {"up_bank": []}):
        Gated.sites = sites
        with pytest.raises(train_gpt.UsageError, match="GPT.matrix_sites must name the inputs of the .* of up_bank"):
            Gated(config)
