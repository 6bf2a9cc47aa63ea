#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: builds the CUDA kernels, runs the `gpu` tests, times
# kernels, a ViT-L training step with its MFU, and ViT-22B's blocks in bf16 and fp8. Results go to the folder given
# (default gpu_check), to be copied into docs/performance.md with this command.
#   PYTHON=python3 tools/gpu_check.sh [FOLDER]
# On a machine with two GPUs or more the tests try a pipeline's messages over NCCL, too.
# PYTHON must have torch with CUDA, pybind11, cmake, ninja, pytest, pytest-timeout and jsonargparse.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
py=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() { # step NAME SECONDS COMMAND...: run with a time limit, keep the log, go on after a failure
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - start)) s"
  [ "$code" = 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
}

"$py" - <<'PY' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no CUDA device here; run this on a machine with a GPU")
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())
PY

step build 200 env VITRUVIUS_CUDA=1 "$py" setup.py build_ext --inplace
step tests 180 "$py" -m pytest -m gpu
step kernels 60 "$py" -m tools.benchmark kernels --device cuda --json "$out/kernels.json"
step vit_l 90 "$py" -m tools.benchmark step --config configs/vit_l16.yaml --data.kind synthetic \
  --precision.dtype bf16 --train.global_batch_size 64 --train.micro_batch_size 64 --json "$out/vit_l.json"
for policy in qk_norm qk_norm+offload fc1+offload; do # what offloading to host memory saves and costs
  step "vit_l_$policy" 45 "$py" -m tools.benchmark step --config configs/vit_l16.yaml --data.kind synthetic \
    --precision.dtype bf16 --train.global_batch_size 64 --train.micro_batch_size 64 --recompute.policy "$policy" \
    --json "$out/vit_l_$policy.json"
done
for dtype in bf16 fp8; do # a ViT-22B block at its own width, four of them: 1.8 G parameters
  step "block_22b_$dtype" 60 "$py" -m tools.benchmark step --config configs/vit_22b.yaml --data.kind synthetic \
    --parallel.tensor_parallel_size 1 --parallel.zero_stage 0 --model.depth 4 --model.num_classes 1000 \
    --precision.dtype "$dtype" --train.global_batch_size 32 --train.micro_batch_size 32 --json "$out/block_22b_$dtype.json"
done
cat "$out/kernels.log" "$out"/vit_l*.log "$out"/block_22b_*.log
exit $failed
