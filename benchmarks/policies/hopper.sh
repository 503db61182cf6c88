#!/usr/bin/env bash
# How the shipped policy `hopper` was made, from nothing: an agent that has begun to hop (SAC, stopped at a mean return of 1,200),
# of whose episodes those below 1,500 are cloned. `benchmarks/online/mujoco.py` says what online fine-tuning makes of it.
set -euo pipefail
runs=${1:-runs/hopper}
mkdir -p "$runs"

python -m eva_rl.collect env=Hopper-v5 expert=sac expert.until=1200 expert.steps=150000 episodes=300 out="$runs/sac.h5"
python -m eva_rl.pretrain env=Hopper-v5 data="$runs/sac.h5" data.max_return=1500 data.after_success=1 \
    size.hidden_size=64 size.num_layers=3 size.num_heads=2 size.context_length=20 size.max_timestep=1000 return_scale=1000 \
    algo.updates=3000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup_steps=200 eval.every=0 threads=1 run_dir="$runs/pretrain"
python -m eva_rl.evaluate policy="$runs/pretrain" eval.episodes=50
