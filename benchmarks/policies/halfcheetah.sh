#!/usr/bin/env bash
# How the shipped policy `halfcheetah` was made, from nothing: an agent that has begun to run (SAC, stopped at a mean return of
# 2,500), cloned; with seed 0 SAC stays at 900. Half an hour on one core. `benchmarks/online/mujoco.py`
# says what online fine-tuning makes of it.
set -euo pipefail
runs=${1:-runs/halfcheetah}
mkdir -p "$runs"

OMP_NUM_THREADS=1 python -m eva_rl.collect env=HalfCheetah-v5 expert=sac expert.until=2500 expert.steps=200000 \
    episodes=100 seed=1 out="$runs/sac.h5"
python -m eva_rl.pretrain env=HalfCheetah-v5 data="$runs/sac.h5" \
    size.hidden_size=64 size.num_layers=3 size.num_heads=2 size.context_length=20 size.max_timestep=1000 return_scale=1000 \
    algo.updates=3000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup_steps=200 eval.every=0 threads=1 run_dir="$runs/pretrain"
python -m eva_rl.evaluate policy="$runs/pretrain" eval.episodes=50
