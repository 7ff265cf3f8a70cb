"""Figures, not tests: python tests/bench.py speed [--data DIR] [--json FILE]

`speed` times training steps of the small model of the README's 200-step run, without and with loops, in this script's
form and written plainly (one product per matrix, F.rms_norm, whole logits, micro-batches of 2048 tokens, as the
published script runs on one device), in turn, and this machine's own matrix product in the same run: quote the ratios.
"""
import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt
from train_gpt import GPT, Config, Optimizer, Runtime, TrainData, WeightAverage

SMALL = {"SEED": "42", "NUM_LAYERS": "11", "MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
         "TRAIN_SEQ_LEN": "256", "EVAL_SEQ_LEN": "256", "ROPE_TRAIN_SEQ_LEN": "256", "TRAIN_BATCH_TOKENS": "16384",
         "TTT_CHUNK_TOKENS": "16384"}


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
            lanes = lanes * v.lanes if v.lanes > len(lanes) else lanes
            mixed = [self.resid_mix[i][0] * lane + self.resid_mix[i][1] * x0 for lane in lanes]
            attn_out = attend(norm(mixed[0]) * depth, i)
            if v.lanes == 1:
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


def seconds(function) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def training_step(kind: type[GPT], data_dir: str, micro_batch_tokens: int):
    """Return the model and a function that runs one optimizer step of it."""
    config = Config.from_env({**SMALL, "DATA_DIR": data_dir, "MICRO_BATCH_TOKENS": str(micro_batch_tokens)})
    rt = Runtime(config)
    torch.manual_seed(config.seed)
    model = kind(config).to_compute(rt)
    data, optimizer, average = TrainData(config, rt), Optimizer(config, rt, model), WeightAverage(model, 0.95)

    def step():
        optimizer.zero_grad()
        loss = train_gpt.backward_batch(model, data.batch(0))
        optimizer.step(1.0, 0.95)
        average.update()
        return float(loss)

    return model, step


def speed(data_dir: str) -> list[dict]:
    """Tokens per second of both forms, interleaved, and the machine's matrix product."""
    square, rows = torch.randn(1024, 1024), []
    forms = {"train_gpt": training_step(GPT, data_dir, 0), "plain": training_step(PlainGPT, data_dir, 2048)}
    for looping in (False, True):
        times = {name: [] for name in forms}
        for model, step in forms.values():
            model.looping = looping
            step()
        for _ in range(3):
            for name, (_, step) in forms.items():
                times[name].append(seconds(step))
        peak = 2 * 1024**3 / statistics.median(seconds(lambda: square @ square) for _ in range(9)) / 1e9
        rows += [{"form": name, "looping": looping, "tokens_per_second": round(16384 / statistics.median(t)),
                  "matmul_gflops_per_second": round(peak)} for name, t in times.items()]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed"])
    parser.add_argument("--data", help="DATA_DIR with SP8192 shards; without it, random tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.data:
            tokens = torch.randint(3, 8192, (100_000,)).numpy()
            train_gpt.write_shard(Path(folder) / "datasets/fineweb10B_sp8192/fineweb_train_000000.bin", tokens)
        rows = speed(arguments.data or folder)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
