#!/usr/bin/env bash
# How the shipped policy `hopper` was made, from nothing, and what online fine-tuning makes of it. About an hour on two cores.
# docs/online.md holds what it printed.
set -euo pipefail
runs=${1:-runs/hopper}
mkdir -p "$runs"

# An agent that has begun to hop: SAC, stopped at a mean return of 1200. Of its episodes those below 1500 are cloned.
python -m eva_rl.collect env=mujoco/hopper expert=sac expert.until=1200 expert.steps=150000 episodes=300 out="$runs/sac.h5"
python -m eva_rl.pretrain env=mujoco/hopper data="$runs/sac.h5" data.max_return=1500 data.after_success=1 \
    size.hidden_size=64 size.num_layers=3 size.num_heads=2 size.context_length=20 size.max_timestep=1000 return_scale=1000 \
    algo.updates=3000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup=200 eval.every=0 threads=1 run_dir="$runs/pretrain"
