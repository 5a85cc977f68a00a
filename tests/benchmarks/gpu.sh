#!/usr/bin/env bash
# The benchmark of training steps on a CUDA machine, from a copy of the tree: bf16, batch 256, allocator peaks.
#   bash tests/benchmarks/gpu.sh [FOLDER] [BATCH]     results in FOLDER (default: $OUT, else benchmarks-gpu)
# Needs torch >= 2.11 with CUDA; what else is missing is installed where a package registry is reached. $PYTHON chooses
# the interpreter. Results are written after every model, so that a run that is cut short leaves what it has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder="${1:-${OUT:-benchmarks-gpu}}"
batch="${2:-256}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
if ! "$python" -c 'import timm, safetensors, PIL, typer, rich, peft, matplotlib' 2>/dev/null; then
    "$python" -m pip install --quiet timm safetensors pillow typer rich -r tests/benchmarks/requirements.txt ||
        echo "warning: could not install everything; what is missing has no row" >&2
fi

eager=(full full-cl linear linear-cl paper paper-cl lora lora-cl plain engine engine-min)
status=0
"$python" -m tests.benchmarks.steps --device cuda --precisions bf16 --batches "$batch" --repeats 10 \
    --contenders "${eager[@]}" --output "$folder" || status=1
# compilation takes minutes per model: only where it is to be compared
"$python" -m tests.benchmarks.steps --device cuda --precisions bf16 --batches "$batch" --repeats 10 \
    --models resnet50 convnext_tiny --contenders full-cl full-compile engine engine-compile \
    --output "$folder/compiled" || status=1
"$python" -m tests.benchmarks.steps --device cuda --precisions bf16 --batches "$batch" --repeats 3 \
    --models resnet50 --profile full-cl engine --output "$folder/profile" || status=1
exit "$status"
