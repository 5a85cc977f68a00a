# Makes the repository's virtual environment; sourced by tests/run.sh and examples/quickstart.sh, from any folder.
# `make_venv` leaves .venv/ at the repository's root with cadapt and its test extra in it. A second call costs nothing
# until pyproject.toml, the interpreter or the folder changes.

REPOSITORY_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Prints the first Python >= 3.11 found that can make virtual environments; $PYTHON, if set, is the only candidate.
find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3 python)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.11 with the venv module among: ${candidates[*]}; install one, or set PYTHON=/path/to/python3" >&2
    return 1
}

# Prints what the installed environment depends on: another value means another installation.
venv_key() {
    local environment="$REPOSITORY_ROOT/.venv"
    { "$environment/bin/python" -c 'import sys; print(sys.version, sys.prefix)'; cat "$REPOSITORY_ROOT/pyproject.toml"; } | cksum
}

make_venv() {
    local environment="$REPOSITORY_ROOT/.venv" python
    local stamp="$environment/.cadapt-installed"
    if ! "$environment/bin/python" -c '' >/dev/null 2>&1; then
        python="$(find_python)" || return 1
        echo "making $environment with $python" >&2
        "$python" -m venv --clear "$environment" || return 1
    fi
    # An environment that another tool made may come without pip.
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        "$environment/bin/python" -m ensurepip >&2 || return 1
    fi
    if [[ -f "$stamp" && "$(<"$stamp")" == "$(venv_key)" ]]; then
        return 0
    fi
    echo "installing cadapt and its test extra into $environment (some minutes the first time)" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$REPOSITORY_ROOT[test]" >&2 || return 1
    venv_key >"$stamp"
}
