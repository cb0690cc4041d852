#!/usr/bin/env bash
#
# Runs the CUDA tests, and the benchmarks of training and merging at the size of a 1B Llama, on one card within
# 8 minutes and without a network; writes one JSON to recipes/benchmarks/results/ and prints it as a table.
#
#     bash recipes/benchmarks/gpu.sh
#     bash recipes/benchmarks/gpu.sh --only streams         a part of it; --help lists all options
#     bash recipes/benchmarks/gpu.sh --device cpu           a rehearsal without a GPU
#
# Installs nothing. The script uses the first Python that can import share_hf: $PYTHON, python3, python, or that of the
# environment in .venv ($SHARE_HF_VENV), which tests/run.sh creates. Packages may also be in folders that PYTHONPATH
# names (pip install --target). If none can import it, the script uses the first that has PyTorch, and the rows say
# what is missing.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

find_python() {
    local candidates=(python3 python "${SHARE_HF_VENV:-$root/.venv}/bin/python") candidate module
    if [ -n "${PYTHON:-}" ]; then
        candidates=("$PYTHON")
    fi
    for module in share_hf torch; do
        for candidate in "${candidates[@]}"; do
            if "$candidate" -c "import $module" >/dev/null 2>&1; then
                printf '%s\n' "$candidate"
                return
            fi
        done
    done
    printf 'error: none of these has PyTorch: %s. Set PYTHON to one that does.\n' "${candidates[*]}" >&2
    return 1
}

python="$(find_python)"
exec "$python" "$root/recipes/benchmarks/gpu.py" "$@"
