#!/usr/bin/env bash
# All schemes on the quickstart's digits, from a ConvNet and from a ViT, with three seeds: a table and its plot, on a
# machine that has nothing but a Python >= 3.11 and the package registry.
#   bash examples/compare_schemes.sh            about half an hour on two cores; called again, it goes on
#   bash examples/compare_schemes.sh --fast     a trial of everything, in a minute
# Makes .venv/ (or $PYTHON's, see tests/venv.sh); writes into runs/compare_schemes/ at the repository's root, or where
# -o says. Takes the arguments of compare_schemes.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tests/venv.sh"
make_venv

output="$REPOSITORY_ROOT/runs/compare_schemes"
for argument in "$@"; do
    # the figures of a trial are not to lie where the real ones do
    [[ "$argument" != --fast ]] || output="$output-fast"
done
# the weights are in the repository: nothing is to wait for a network
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec "$REPOSITORY_ROOT/.venv/bin/python" "$REPOSITORY_ROOT/examples/compare_schemes.py" -o "$output" "$@"
