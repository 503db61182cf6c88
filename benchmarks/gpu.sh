#!/usr/bin/env bash
# What an NVIDIA GPU does with training, EVA's directions and rollouts: benchmarks/gpu.sh [DEVICE] [PEAK_TFLOPS]
# `benchmarks/gpu.sh cpu` goes through the same at tiny settings, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda} peak=${2:-0} out=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out"
if [ "$device" = cpu ]; then
    train=(--widths 32 --windows 5 --layers 1 --batch 4 --rounds 1 --threads 1)
    eva=(--widths 32 --contexts 5 --layers 1 --batches 2 --batch-size 4 --rank 2 --methods moments --peft-seconds 5 --peft-tau 0.5)
    rollouts=(--context-lengths 5 --seconds 0.1 --turns 1)
    low_rank=(--rounds 1 --batch-size 2 --steps 5) sizes=(small) precisions=(float32)
    decompositions=(--widths 32 --layers 2 --components 4)
    envs=(2)
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
    train=(--sizes small base large --batch 128 --rounds 30)
    eva=(--widths 128 512 --contexts 20 50 --layers 4 --peft-seconds 120)
    rollouts=(--context-lengths 20 50 --size base)
    low_rank=(--rounds 30) sizes=("" base large) precisions=(float32 bfloat16)
    decompositions=()
    envs=(16 32 64)
fi
{
    echo "== Low-rank steps: full fine-tuning, PEFT's layers and fused ones"
    for size in "${sizes[@]}"; do
        for precision in "${precisions[@]}"; do
            python benchmarks/low_rank.py "${low_rank[@]}" ${size:+--size $size} --precision "$precision" --device "$device"
        done
    done
    echo "== Decompositions: batched, against a loop of torch.linalg.svd"
    python benchmarks/eva_decompositions.py "${decompositions[@]}" --device "$device"
    echo "== Gradient steps: float32, bfloat16, compiled, CUDA graphs; fraction of peak; peak memory"
    python benchmarks/training.py "${train[@]}" --variants --ours-only --peak "$peak" --device "$device" --out "$out/training.json"
    echo "== EVA's directions: all layers in few calls, against one by one and against PEFT"
    python benchmarks/eva_init.py "${eva[@]}" --device "$device" --out "$out/eva_init"
    for n in "${envs[@]}"; do
        echo "== Rollouts in $n environments: growing and static shapes, bfloat16, compiled"
        python benchmarks/rollouts.py "${rollouts[@]}" --num-envs "$n" --variants --device "$device" --out "$out/rollouts-$n.json"
    done
} 2>&1 | tee "$out/report.txt"
echo "Everything lies in $out"
