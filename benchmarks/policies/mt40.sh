#!/usr/bin/env bash
# How the shipped policy mt40 was made and measured, from nothing. About two hours on two cores with bfloat16 in hardware.
# docs/mt40.md holds what it printed.
set -euo pipefail
runs=${1:-runs/mt40}

python -m eva_rl.pretrain env=mt40 data.episodes=100 data.noise.std=0.4 data.noise.burst_probability=0.03 \
    algo.updates=20000 algo.batch_size=64 algo.learning_rate=6e-4 algo.warmup_steps=500 algo.weight_decay=1e-3 \
    size.max_timestep=500 return_scale=200 algo.precision=bfloat16 eval.episodes=1 eval.every=2500 checkpoint.every=500 run_dir="$runs/pretrain"
python -m eva_rl.evaluate policy="$runs/pretrain" env=mt40 eval.episodes=50 out="$runs/mt40.json"
python -m eva_rl.evaluate policy="$runs/pretrain" env=cw10 eval.episodes=50 out="$runs/cw10.json"
python -m benchmarks.policies.report --run "$runs/pretrain" --evaluations "$runs/mt40.json" "$runs/cw10.json" --out docs/results
