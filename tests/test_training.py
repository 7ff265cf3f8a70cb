"""Room 6: warm-up, schedule switches, budget, log lines, averaging and rank independence of the training loop."""
import contextlib
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_env, tiny_model, torchrun, write_shards
from test_quantization import on_ranks

import train_gpt
from train_gpt import GPT, Config, Optimizer, RunStopped, Runtime, TrainData

LOG_LINE = re.compile(r"(\d+)/(\d+) train_loss: (\d+\.\d{4}) train_time: (\d+\.\d)m tok/s: (\d+)")


@pytest.fixture
def data_dir(tmp_path):
    write_shards(tmp_path)
    return tmp_path


class Clock:
    """A clock that only moves when told to; stands in for train_gpt's `time` module."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train_gpt, "time", clock)
    return clock


def train_run(config, after_pass=lambda model: None, validate=lambda: "val_loss:0 val_bpb:0 eval_time:0ms",
              catch_signals=False):
    """Warm up and train from weights that do not depend on SEED, and write down what can be seen from outside.

    One micro-batch is one step here: `states` has (looping, loss, weights before the step) of each.
    """
    rt = Runtime(config)
    if catch_signals:
        rt.catch_signals()
    lines, states, rates = [], [], []
    rt.log = lines.append
    torch.manual_seed(0)
    model = GPT(config).to_compute(rt)

    def loss_fn(ids, targets):
        loss = model(ids, targets)
        states.append((model.looping, loss.item(), [p.detach().clone() for p in model.parameters()]))
        return loss + (after_pass(model) or 0.0)

    class WatchedOptimizer(Optimizer):
        def step(self, lr_multiplier, momentum):
            rates.append((lr_multiplier, momentum))
            super().step(lr_multiplier, momentum)

    data = TrainData(config, rt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "Optimizer", WatchedOptimizer)
        train_gpt.warm_up(config, rt, model, loss_fn, data)
        warmup = states[:], rates[:], [p.detach().clone() for p in model.parameters()], model.looping
        states.clear()
        rates.clear()
        result = train_gpt.train(config, rt, model, loss_fn, data, validate)
    return SimpleNamespace(model=model, lines=lines, states=states, rates=rates, result=result, warmup=warmup,
                           losses=[loss for _, loss, _ in states], looping=[looping for looping, _, _ in states])


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


# ---- warm-up and determinism -----------------------------------------------------------------------------------------


def test_warm_up_leaves_no_trace(data_dir):
    """Both looping states run and change the weights; then every weight is back, and training is as without it."""
    without = train_run(tiny_config(data_dir=data_dir))
    assert without.warmup[0] == []
    run = train_run(tiny_config(data_dir=data_dir, warmup_steps=2))
    states, rates, restored, looping = run.warmup
    assert [state[0] for state in states] == [False, False, True, True]
    assert len(rates) == 4 and rates[0][0] > 0
    initial = states[0][2]
    assert not same_weights(initial, states[-1][2])
    assert same_weights(initial, restored)
    assert not looping
    assert run.losses == without.losses and len(run.losses) == 6
    assert same_weights(run.model.parameters(), without.model.parameters())


def test_training_depends_on_the_seed_alone(data_dir):
    one, again, other = (train_run(tiny_config(data_dir=data_dir, seed=seed)) for seed in (1, 1, 2))
    assert one.losses == again.losses
    assert same_weights(one.model.parameters(), again.model.parameters())
    assert all(a != b for a, b in zip(one.losses, other.losses))  # other data from the first batch on


def test_the_loop_is_one_step_on_each_batch_in_turn(data_dir):
    """The loop without anything around it, by hand, from the pieces of rooms 3 to 5."""
    config = tiny_config(data_dir=data_dir, iterations=5, num_loops=0)
    run = train_run(config)
    rt = Runtime(config)
    torch.manual_seed(0)
    model, data = GPT(config), TrainData(config, rt)
    optimizer, losses = Optimizer(config, rt, model), []
    for step in range(5):
        (ids, targets), = data.batch(step)
        for p in model.parameters():
            p.grad.zero_()
        loss = model(ids, targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step(train_gpt.lr_multiplier(config, step / 5), train_gpt.momentum_at(config, step))
    assert run.losses == losses


def test_the_loss_falls_on_learnable_data(data_dir):
    """Each token follows from the one before it."""
    walk = [1]
    while len(walk) < 4000:
        walk.append(3 + (walk[-1] * 5 + 7) % 60)
    train_gpt.write_shard(data_dir / "datasets/fineweb10B_sp300/fineweb_train_000000.bin", np.array(walk))
    (data_dir / "datasets/fineweb10B_sp300/fineweb_train_000001.bin").unlink()
    run = train_run(tiny_config(data_dir=data_dir, iterations=40))
    assert run.losses[0] == pytest.approx(math.log(300), abs=0.05)  # knows nothing yet
    assert run.losses[-1] < 0.5


# ---- the schedules in the loop ---------------------------------------------------------------------------------------


def test_looping_switches_on_at_its_part_of_the_run(data_dir):
    run = train_run(tiny_config(data_dir=data_dir, iterations=10, enable_looping_at=0.35))
    assert run.looping == [False] * 4 + [True] * 6
    assert [line for line in run.lines if line.startswith("layer_loop")] == [
        "layer_loop:enabled step:4 frac:0.400 encoder:[0, 1, 2, 3, 2] decoder:[3, 2, 3, 4, 5]"]
    assert run.model.looping
    assert not any("did not run" in line for line in run.lines)


def test_looping_at_once_never_and_not_at_all(data_dir):
    assert train_run(tiny_config(data_dir=data_dir, iterations=2, enable_looping_at=0)).looping == [True, True]
    late = train_run(tiny_config(data_dir=data_dir, iterations=2, enable_looping_at=1))
    assert late.looping == [False, False] and late.model.looping  # scored with the loops all the same
    assert any(line.startswith("the loops did not run in training: RECUR_START_STEP") for line in late.lines)
    assert "layer_loop:enabled step:2 frac:1.000 encoder:[0, 1, 2, 3, 2] decoder:[3, 2, 3, 4, 5]" in late.lines
    without = train_run(tiny_config(data_dir=data_dir, iterations=2, enable_looping_at=0, num_loops=0))
    assert without.looping == [False, False] and not without.model.looping
    assert not any(line.startswith("layer_loop") for line in without.lines)


def test_looping_from_a_step_on(data_dir):
    run = train_run(tiny_config(data_dir=data_dir, recur_start_step=2, enable_looping_at=0, recur_layers="2,3",
                                num_loops=1))
    assert run.looping == [False] * 2 + [True] * 4
    assert "layer_loop:enabled step:2 frac:0.333 encoder:[0, 1, 2, 3] decoder:[2, 3, 4, 5]" in run.lines


def test_late_qat_begins_below_its_threshold_and_ends_with_training(data_dir):
    """Multipliers 1, 1, 1, 0.67, 0.33 over six steps of which the last four warm down; compiled in the warm-up."""
    seen = []
    config = tiny_config(data_dir=data_dir, warmdown_frac=0.5, late_qat_threshold=0.5, warmup_steps=1)
    run = train_run(config, lambda model: seen.append((model.looping, model.late_qat)) or 0.0)
    assert [late for _, late in seen] == [False, False, True] + [rate < 0.5 for rate, _ in run.rates]
    assert True in [late for _, late in seen[3:]] and seen[:3] == [(False, False), (True, False), (True, True)]
    assert "late_qat:enabled step:5 frac:0.833" in run.lines and not run.model.late_qat
    without = train_run(tiny_config(data_dir=data_dir, warmdown_frac=0.5))
    assert without.losses[:5] == run.losses[:5] and without.losses[5] != run.losses[5]


def test_snapshots_are_averaged(data_dir):
    """Of the two last steps, whose multipliers are below 0.2; the model ends as their mean."""
    config = tiny_config(data_dir=data_dir, warmdown_frac=1, iterations=12, swa_every=1, ema_decay=0.5)
    run = train_run(config)
    after = [run.states[i + 1][2] for i in (10,)]  # weights before step 11: after the first of them
    assert [rate < 0.2 for rate, _ in run.rates] == [False] * 10 + [True] * 2
    by_ema = train_run(tiny_config(data_dir=data_dir, warmdown_frac=1, iterations=12, ema_decay=0)).model
    for p, one, last in zip(run.model.parameters(), after[0], by_ema.parameters()):
        torch.testing.assert_close(p.detach(), (one + last.detach()) / 2, rtol=1e-5, atol=1e-6)


def test_fine_tuning_before_quantization_is_a_slow_loop(data_dir):
    """AdamW without decay, batches in order, a cosine over the epochs to a tenth, the first layers as they were."""
    config = tiny_config(data_dir=data_dir, prequant_ttt_epochs=3, prequant_ttt_lr=0.01, prequant_ttt_freeze_blocks=2,
                         ttt_batch_seqs=4, ttt_grad_clip=0.5)
    rt = Runtime(config)
    sequences = TrainData(config, rt).in_order(2).stack(range(10))
    assert sequences.shape == (10, 33)
    model, slow = (tiny_model(config) for _ in range(2))
    train_gpt.prequant_ttt(config, rt, model, model, sequences)
    optimizer = torch.optim.AdamW(slow.parameters(), weight_decay=0)
    frozen = {name: [i for i in range(p.size(0)) if i % 6 < 2] for name, p in slow.named_parameters()
              if name in (*GPT.BANKS, "resid_mix", "attn_scale", "mlp_scale", "q_gain", "par_resid", "par_post")}
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.001 + 0.009 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for batch in (sequences[:4], sequences[4:8], sequences[8:]):
            optimizer.zero_grad()
            slow(batch[:, :-1], batch[:, 1:]).backward()
            for name, p in slow.named_parameters():
                p.grad[frozen.get(name, [])] = 0
            torch.nn.utils.clip_grad_norm_(slow.parameters(), 0.5)
            optimizer.step()
    untouched = dict(tiny_model(config).named_parameters())
    for (name, p), q in zip(model.named_parameters(), slow.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        assert torch.equal(p[frozen.get(name, [])], untouched[name][frozen.get(name, [])])
        assert not torch.equal(p, untouched[name])


def test_each_step_gets_its_learning_rate_and_momentum(data_dir):
    run = train_run(tiny_config(data_dir=data_dir, iterations=8, warmdown_frac=0.5, muon_momentum_warmup_steps=4))
    multipliers, momenta = zip(*run.rates)
    assert multipliers == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert momenta == pytest.approx([0.92, 0.9325, 0.945, 0.9575, 0.97, 0.97, 0.97, 0.97])


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_the_wallclock_budget_ends_training_and_paces_it(data_dir, clock):
    """22 s less a reserve of 12 s, 1 s a step; validation takes 100 s each time, and they do not count."""
    def one_second(model):
        clock.now += 1

    def validate():
        clock.now += 100
        return "val_loss:1 val_bpb:2 eval_time:3ms"

    run = train_run(tiny_config(data_dir=data_dir, iterations=50, max_wallclock_seconds=22, gptq_reserve_seconds=12,
                                val_loss_every=4, warmdown_frac=0.5), one_second, validate)
    assert run.result == (10, 10)
    assert run.looping == [False] * 4 + [True] * 6  # 0.35 of 10 s
    assert "layer_loop:enabled step:4 frac:0.400 encoder:[0, 1, 2, 3, 2] decoder:[3, 2, 3, 4, 5]" in run.lines
    assert [rate for rate, _ in run.rates] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [line for line in run.lines if "val_loss" in line] == [
        f"{step}/50 val_loss:1 val_bpb:2 eval_time:3ms" for step in (4, 8, 10)]
    assert "stopping_early: wallclock_cap train_time: 10000ms step: 10/50" in run.lines


def test_a_run_that_finishes_does_not_stop_early(data_dir, clock):
    run = train_run(tiny_config(data_dir=data_dir, iterations=3, max_wallclock_seconds=1000))
    assert run.result[0] == 3
    assert not any("stopping_early" in line for line in run.lines)


def test_log_lines_keep_the_communitys_shape(data_dir, clock):
    """The first five steps, every TRAIN_LOG_EVERY-th, and whenever more than 30 s have passed."""
    def three_seconds_or_a_minute(model):
        clock.now += 60 if clock.now == 21 else 3

    run = train_run(tiny_config(data_dir=data_dir, iterations=12, train_log_every=6), three_seconds_or_a_minute)
    shown = [LOG_LINE.fullmatch(line) for line in run.lines if "train_loss" in line]
    assert all(shown), run.lines
    seconds = [3, 6, 9, 12, 15, 18, 81, 93]
    assert [int(m[1]) for m in shown] == [1, 2, 3, 4, 5, 6, 8, 12]
    assert [m[4] for m in shown] == [f"{s / 60:.1f}" for s in seconds]
    assert [m[5] for m in shown] == [f"{int(m[1]) * 256 / s:.0f}" for m, s in zip(shown, seconds)]
    assert {m[2] for m in shown} == {"12"}
    assert [m[3] for m in shown] == [f"{run.losses[int(m[1]) - 1]:.4f}" for m in shown]


# ---- failures and the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.3, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_loss_that_is_not_finite_stops_the_run(data_dir, bad, step, clip):
    """The error names the step, and the weights are still good: the bad gradient moved none of them out of bounds."""
    models = []

    def break_one(model):
        models.append(model)
        return sum(p.sum() for p in model.parameters()) * bad if len(models) == step else 0.0

    with pytest.raises(RunStopped, match=rf"loss is {'(nan|inf)' if bad == math.inf else 'nan'} at step {step}\b"):
        train_run(tiny_config(data_dir=data_dir, iterations=4, grad_clip_norm=clip), break_one)
    assert all(p.isfinite().all() for p in models[0].parameters())
    assert float(max(p.abs().max() for p in models[0].parameters())) < 10


@pytest.mark.parametrize("where, said", [("in the last step", "signal after step 2"), ("in validation", "SIGTERM")])
def test_a_signal_at_the_end_is_not_lost(data_dir, where, said):
    passes, before = [], {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def interrupt(model):
        passes.append(model)
        if len(passes) == 2 and where == "in the last step":
            os.kill(os.getpid(), signal.SIGTERM)

    def validate():
        if where == "in validation":
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    try:
        with pytest.raises(RunStopped, match=said) as stopped:
            train_run(tiny_config(data_dir=data_dir, iterations=2), interrupt, validate, catch_signals=True)
        assert stopped.value.args[1] == 128 + signal.SIGTERM
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_after_the_step(data_dir, number):
    passes = []

    def interrupt(model):
        passes.append(model)
        if len(passes) == 2:
            os.kill(os.getpid(), number)

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(RunStopped, match="signal after step 2") as stopped:
            train_run(tiny_config(data_dir=data_dir, iterations=9), interrupt, catch_signals=True)
        assert stopped.value.args[1] == 128 + number and len(passes) == 2
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_the_model_ends_with_the_averaged_weights(data_dir, decay):
    last = []
    config = tiny_config(data_dir=data_dir, iterations=4, ema_decay=decay)

    def validate():  # runs after the last step and before the average is put in: sees the raw weights
        last.extend(p.detach().clone() for p in models[-1].parameters())
        return ""

    models = []
    run = train_run(config, lambda model: models.append(model), validate)
    expected, *later = [weights for _, _, weights in run.states] + [last]
    for weights in later:
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights)]
    for p, e in zip(run.model.parameters(), expected):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-6)
    assert same_weights(run.model.parameters(), last) == (decay == 0)


# ---- several ranks ---------------------------------------------------------------------------------------------------

RANK_SCRIPT = """
import json, os, sys
sys.path.insert(0, os.environ["TESTS"])
import test_training, train_gpt
rank = int(os.environ["RANK"])
clock = train_gpt.time = test_training.Clock()
reports = test_training.two_runs(json.loads(os.environ["SETTINGS"]), clock, 1 + 2.5 * rank)
with open(f"reports_{rank}.json", "w") as f:
    json.dump(reports, f)
train_gpt.dist.barrier()
train_gpt.end_process(0)
"""


def two_runs(settings, clock, seconds_per_pass):
    """One run by steps, then one by the clock; what all ranks together saw, exact: the losses and steps of each."""
    reports = []
    for more in ({"ITERATIONS": "6"}, {"ITERATIONS": "9", "MAX_WALLCLOCK_SECONDS": "16", "GPTQ_RESERVE_SECONDS": "12"}):
        losses, read = [], train_gpt.Pulse.read

        def watched_read(pulse, losses=losses, read=read):
            values = read(pulse)
            losses.append(values[0])
            return values

        def tick(model):
            clock.now += seconds_per_pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt.Pulse, "read", watched_read)
            steps = train_run(Config.from_env({**settings, **more}), tick).result[0]
        reports.append({"losses": losses[1:], "steps": steps})  # the first is read before any step
    return reports


def test_two_ranks_see_the_losses_of_one(data_dir, tmp_path, clock):
    """And they stop together: the budget is rank 0's, however fast rank 1's clock runs."""
    settings = tiny_env(data_dir=data_dir)
    expected = two_runs(settings, clock, 1)
    assert [len(report["losses"]) for report in expected] == [6, 4]
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT)
    done = torchrun(2, str(script), cwd=tmp_path, timeout=60, env={
        "PYTHONPATH": str(ROOT), "TESTS": os.path.dirname(__file__), "SETTINGS": json.dumps(settings)})
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        reports = json.loads((tmp_path / f"reports_{rank}.json").read_text())
        for report, one in zip(reports, expected):
            assert report["steps"] == one["steps"]
            assert report["losses"] == pytest.approx(one["losses"], abs=1e-4)


def test_after_training_a_signal_ends_the_run_at_once(data_dir):
    config = tiny_config(data_dir=data_dir, iterations=2)
    rt = Runtime(config)
    model, during = GPT(config).to_compute(rt), []
    train_gpt.train(config, rt, model, lambda *batch: during.append(rt.signals_wait) or model(*batch),
                    TrainData(config, rt), lambda: "")
    assert during == [True, True] and not rt.signals_wait


def test_any_ranks_signal_counts_and_the_clock_is_rank_0s():
    def work(rt):
        pulse = train_gpt.Pulse(rt)
        rt.stop_signal = 15 * (rt.rank == 1)
        pulse.send(torch.tensor(2.0 + rt.rank), 1.0 + rt.rank)
        return pulse.read()

    assert on_ranks(2, work) == [(2.5, 1.0, 15.0)] * 2


def test_what_has_not_arrived_from_the_device_is_waited_for():
    waited, pulse = [], object.__new__(train_gpt.Pulse)
    pulse.host, pulse.arrived = torch.zeros(3), SimpleNamespace(synchronize=lambda: waited.append(True))
    pulse.read()
    assert waited


def test_a_rank_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(train_gpt.UsageError, match="PyTorch sees 0 GPUs.*DEVICE=cpu"):
        Runtime(tiny_config(device="cuda"))


def test_ranks_must_have_one_mode(monkeypatch):
    """Or some would train, and wait for others that score."""
    told = []
    monkeypatch.setattr(Runtime, "check_alike", lambda self, what, value: told.append((what, value)))
    Runtime(tiny_config(mode="eval"))
    assert told == [("MODE", "eval")]


def test_attention_never_falls_back_to_the_quadratic_kernel_on_a_gpu(monkeypatch):
    chosen, kernel = [], torch.nn.attention.SDPBackend
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kernels, set_priority: chosen.append(
        kernels) or contextlib.nullcontext())
    for device in ("cuda", "cpu"):
        with train_gpt.attention_kernels(SimpleNamespace(device=torch.device(device))):
            pass
    fused = [kernel.CUDNN_ATTENTION, kernel.FLASH_ATTENTION]
    assert chosen == [fused, [*fused, kernel.MATH]]


def test_compile_means_what_it_says():
    assert Runtime(tiny_config(compile="1")).compile and not Runtime(tiny_config()).compile
