#!/usr/bin/env bash
# Runs the tests on a machine that has nothing but a Python >= 3.11 and the package registry:
#   bash tests/run.sh            all tests, on two processes
#   bash tests/run.sh -k merge   any of pytest's arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv
cd "$REPOSITORY_ROOT"
# The tests need no network and must not wait for one; a thread per process keeps two processes on two cores.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 "$@"
