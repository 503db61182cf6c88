#!/usr/bin/env bash
# How the shipped policy mt40-small was made and measured, from nothing. About an hour on two cores with bfloat16 in hardware.
# docs/mt40.md holds what it printed.
set -euo pipefail
runs=${1:-runs/mt40-small}

python -m eva_rl.pretrain env=mt40 size=small data.episodes=100 data.noise.std=0.4 data.noise.burst_probability=0.03 \
    algo.updates=20000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup_steps=500 algo.weight_decay=1e-3 \
    size.max_timestep=500 return_scale=200 algo.precision=bfloat16 eval.episodes=1 eval.every=5000 checkpoint.every=500 run_dir="$runs/pretrain"
python -m eva_rl.evaluate policy="$runs/pretrain" env=mt40 eval.episodes=20 out="$runs/mt40.json"
python -m eva_rl.evaluate policy="$runs/pretrain" env=cw10 eval.episodes=20 out="$runs/cw10.json"
python -m benchmarks.policies.report --name mt40-small --run "$runs/pretrain" --evaluations "$runs/mt40.json" "$runs/cw10.json" --out docs/results
