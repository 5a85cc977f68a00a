#!/usr/bin/env bash
# The main job from end to end, on data it makes itself, on a machine that has nothing but a Python >= 3.11 and the
# package registry: a backbone that knows printed letters learns handwritten digits from 1,257 pictures.
#   bash examples/quickstart.sh
# Makes .venv/ (or $PYTHON's, see tests/venv.sh) and quickstart/ at the repository's root; the latter anew on each run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tests/venv.sh"
make_venv

examples="$REPOSITORY_ROOT/examples"
weights="$examples/weights/glyphs_test_resnet.safetensors"
export PATH="$REPOSITORY_ROOT/.venv/bin:$PATH"
rm -rf "$REPOSITORY_ROOT/quickstart"
mkdir "$REPOSITORY_ROOT/quickstart"
cd "$REPOSITORY_ROOT/quickstart"
# the model is tiny: a thread for it leaves the other core to the reader of pictures
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
SECONDS=0

# Prints a command before it runs, as one would type it in quickstart/.
show() {
    printf '\n$' && printf ' %q' "${@//$REPOSITORY_ROOT/..}" && printf '\n'
    "$@"
}

show python "$examples/make_digits.py" digits
show cadapt inspect "$weights" --backbone test_resnet --img-size 32
show cadapt insert test_resnet --checkpoint "$weights" --img-size 32 --scheme conv-par -o adapter.safetensors
show cadapt train digits -m adapter.safetensors --epochs 12 --lr 1e-3 --batch-size 64 --augment none
show cadapt eval digits/test -m adapter.safetensors --fail-under top1=0.9
show cadapt merge-report -m adapter.safetensors
show cadapt export -m adapter.safetensors --onnx -o digits.onnx

pictures=(digits/test/7/*.png)
show python "$examples/predict_onnx.py" digits.onnx "${pictures[0]}"
show python "$examples/quickstart_table.py" digits --checkpoint "$weights"

printf '\ndone in %d s; the files are in quickstart/\n' "$SECONDS"
