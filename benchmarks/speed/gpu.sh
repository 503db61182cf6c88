#!/usr/bin/env bash
# What an NVIDIA GPU does with training, EVA's directions and rollouts: benchmarks/speed/gpu.sh [DEVICE] [PEAK_TFLOPS] [SECTION ...]
# Sections: decompositions eva steps training rollouts run; about 10 minutes for all.
# `benchmarks/speed/gpu.sh cpu` goes through the same at tiny settings, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 2 ] || set -- "${1:-cuda}" "${2:-0}" decompositions eva steps training rollouts run
device=$1 peak=$2 out=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out"
if [ "$device" = cpu ]; then
    train=(--widths 32 --windows 5 --layers 1 --batch 4 --rounds 1 --threads 1)
    eva=(--widths 32 --contexts 5 --layers 1 --batches 2 --batch-size 4 --rank 2 --methods moments --peft-seconds 5 --peft-tau 0.5)
    rollouts=(--context-lengths 5 --seconds 0.1 --turns 1)
    low_rank=(--rounds 1 --batch-size 2 --steps 5) sizes=(small) precisions=(float32) compiled=default
    run=(data.episodes=2 algo.updates=2 eval.episodes=2)
    decompositions=(--widths 32 --layers 2 --components 4)
    envs=(2)
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
    train=(--sizes small base --batch 128 --rounds 30)
    eva=(--widths 512 --contexts 50 --layers 4 --methods moments auto --peft-seconds 30 --peft-tau 0.9)
    rollouts=(--context-lengths 20 --size base --seconds 1)
    low_rank=(--rounds 20) sizes=("" base) precisions=(float32 bfloat16) compiled=reduce-overhead
    run=()
    decompositions=(--widths 512 1024 2048 --layers 8)
    envs=(16 64)
fi
sections() {  # in the order given
    local name size precision compile n
    for name in "$@"; do
        case $name in
            decompositions)
                echo "== Decompositions: batched, against a loop of torch.linalg.svd"
                python -m benchmarks.eva.decompositions "${decompositions[@]}" --device "$device" ;;
            eva)
                echo "== EVA's directions: all layers in few calls, against one by one and against PEFT"
                python -m benchmarks.eva.initialisation "${eva[@]}" --device "$device" --out "$out/eva_init" ;;
            steps)
                echo "== Low-rank steps: full fine-tuning, PEFT's layers and fused ones"
                for size in "${sizes[@]}"; do
                    for precision in "${precisions[@]}"; do
                        python -m benchmarks.speed.low_rank "${low_rank[@]}" ${size:+--size $size} --precision "$precision" --device "$device"
                    done
                    python -m benchmarks.speed.low_rank "${low_rank[@]}" ${size:+--size $size} --compile $compiled --device "$device"
                done ;;
            training)
                echo "== Gradient steps: float32, bfloat16, compiled, CUDA graphs; fraction of peak; peak memory"
                python -m benchmarks.speed.training "${train[@]}" --variants --ours-only --peak "$peak" --device "$device" --out "$out/training.json" ;;
            rollouts)
                for n in "${envs[@]}"; do
                    echo "== Rollouts in $n environments: growing and static shapes, bfloat16, compiled"
                    python -m benchmarks.speed.rollouts "${rollouts[@]}" --num-envs "$n" --variants --device "$device" --out "$out/rollouts-$n.json"
                done ;;
            run)
                echo "== The main job"
                for compile in none $compiled; do
                    time python -m eva_rl.finetune env=push-v3 device="$device" algo.compile=$compile "${run[@]}" run_dir="$out/push-$compile"
                done ;;
            *) echo "no section $name" >&2; exit 2 ;;
        esac
    done
}
sections "${@:3}" 2>&1 | tee "$out/report.txt"
echo "Everything lies in $out"
