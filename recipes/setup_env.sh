# This file is sourced by recipes/quickstart.sh and tests/run.sh; it is not run by itself.
#
#     setup_env EXTRAS [PACKAGE…]
#
# installs share_hf with EXTRAS (comma-separated, see setup.py) in a virtual environment, then each PACKAGE without its
# dependencies, and puts the python of that environment first on PATH. What is already up to date is left alone, so only
# the first call takes time.
#
#     PYTHON          the interpreter for the environment; default: the first suitable one that is found
#     SHARE_HF_VENV   the environment's folder; default: .venv in the repository

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() {
    printf '%s\n' "$*" >&2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

can_make_environments() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
    # python3 comes first, because it is the default that the user has chosen.
    local candidates=(python3 python3.13 python3.12 python3.11 python3.10 python) candidate without_venv=""
    if [ -n "${PYTHON:-}" ]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        is_new_enough "$candidate" || continue
        if can_make_environments "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv="${without_venv:-$candidate}"
    done
    if [ -n "$without_venv" ]; then
        say "error: $without_venv cannot create virtual environments: its venv or ensurepip module is missing."
        say "Install it (Debian and Ubuntu: apt install python3-venv), or set PYTHON to another interpreter."
    elif [ -n "${PYTHON:-}" ]; then
        say "error: PYTHON=$PYTHON is not a Python of version 3.10 or newer."
    else
        say "error: no Python of version 3.10 or newer found. Install one, or set PYTHON to its path."
    fi
    return 1
}

# Shows errors only: this script cannot act on pip's warnings about its configuration or its cache.
quiet_pip() {
    python -m pip --quiet --quiet --disable-pip-version-check "$@"
}

# Prints what an installation depends on. Any change makes every stamp stale.
fingerprint() {
    printf '%s %s ' "$root" "$(python -V)"
    cat "$root/setup.py" "$root/.github/constraints.txt" "$root/recipes/setup_env.sh" | cksum
}

setup_env() {
    local extras="$1"
    shift
    local venv="${SHARE_HF_VENV:-$root/.venv}"
    local constraints="$root/.github/constraints.txt"

    # venv installs pip last. If pip is missing, the first run was interrupted, and venv completes its work.
    if [ ! -x "$venv/bin/python" ] || [ ! -x "$venv/bin/pip" ]; then
        local python
        python="$(find_python)"
        say "Creating a virtual environment in $venv with $("$python" -V)"
        "$python" -m venv "$venv"
    fi
    VIRTUAL_ENV="$(cd "$venv" && pwd)"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME

    # Each extra and package has a stamp of its own, so that scripts with different needs can share the environment.
    local stamps="$VIRTUAL_ENV/.share_hf" current part
    local parts=() stale=()
    IFS=, read -r -a parts <<<"$extras"
    parts+=("$@")
    current="$(fingerprint)"
    for part in "${parts[@]}"; do
        [ "$(cat "$stamps/$part" 2>/dev/null)" = "$current" ] || stale+=("$part")
    done
    [ "${#stale[@]}" -gt 0 ] || return 0

    say "Installing into $VIRTUAL_ENV: torch (large; this can take some minutes)"
    quiet_pip install -c "$constraints" torch
    say "Installing into $VIRTUAL_ENV: share_hf[$extras]"
    quiet_pip install -c "$constraints" -e "${root}[$extras]"
    if [ "$#" -gt 0 ]; then
        say "Installing into $VIRTUAL_ENV: $*"
        quiet_pip install -c "$constraints" --no-deps "$@"
    fi
    mkdir -p "$stamps"
    for part in "${parts[@]}"; do
        printf '%s\n' "$current" >"$stamps/$part"
    done
}
