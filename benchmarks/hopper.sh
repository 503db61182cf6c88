#!/usr/bin/env bash
# How the shipped policy `hopper` was made, from nothing, and what online fine-tuning makes of it. About an hour and a half on
# two cores. docs/online.md holds what it printed.
set -euo pipefail
runs=${1:-runs/hopper}
mkdir -p "$runs"

# An agent that has begun to hop: SAC, stopped at a mean return of 1200. Of its episodes those below 1500 are cloned.
python -m eva_rl.collect env=Hopper-v5 expert=sac expert.until=1200 expert.steps=150000 episodes=300 out="$runs/sac.h5"
python -m eva_rl.pretrain env=Hopper-v5 data="$runs/sac.h5" data.max_return=1500 data.after_success=1 \
    size.hidden_size=64 size.num_layers=3 size.num_heads=2 size.context_length=20 size.max_timestep=1000 return_scale=1000 \
    algo.updates=3000 algo.batch_size=64 algo.learning_rate=1e-3 algo.warmup_steps=200 eval.every=0 threads=1 run_dir="$runs/pretrain"

# What online fine-tuning makes of it; hyper-parameters were chosen with seed=0 eval.seed=100.
for seed in 1 2 3; do
    python -m eva_rl.finetune env=Hopper-v5 policy="$runs/pretrain" algo=odt_td3 adapter=full data="$runs/sac.h5" \
        data.max_return=1500 seed=$seed algo.env_steps=60000 algo.num_envs=4 algo.updates_per_iteration=500 \
        algo.batch_size=32 algo.learning_rate=3e-4 algo.q_coef=2.5 algo.exploration_noise=0.3 \
        algo.critic_learning_rate=1e-3 algo.tau=0.01 algo.critic_warmup=2000 algo.eval_every=2000 algo.keep_best=true \
        eval.quick_episodes=20 threads=1 run_dir="$runs/online/seed_$seed"
done
python benchmarks/online_report.py "$runs/online"
