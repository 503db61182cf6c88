#!/usr/bin/env bash
# How the shipped policy `walker2d` was made, from nothing: an agent that has begun to walk (SAC, stopped at a mean return of
# 1,200), cloned. About an hour on one core. `benchmarks/online/mujoco.py` says what online fine-tuning makes of it.
set -euo pipefail
runs=${1:-runs/walker2d}
mkdir -p "$runs"

OMP_NUM_THREADS=1 python -m eva_rl.collect env=Walker2d-v5 expert=sac expert.until=1200 expert.steps=200000 episodes=100 out="$runs/sac.h5"
python -m eva_rl.pretrain env=Walker2d-v5 data="$runs/sac.h5" \
    size.hidden_size=64 size.num_layers=3 size.num_heads=2 size.context_length=20 size.max_timestep=1000 return_scale=1000 \
    algo.updates=3000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup_steps=200 eval.every=0 threads=1 run_dir="$runs/pretrain"
python -m eva_rl.evaluate policy="$runs/pretrain" eval.episodes=50
