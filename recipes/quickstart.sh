#!/usr/bin/env bash
#
# Gets from a fresh clone to a learned stream of tasks: sets up an environment (on the first run) and runs
# recipes/llama_stream.py on the small backbone and tasks of recipes/assets. Needs Python 3.10 or newer.
#
#     bash recipes/quickstart.sh [arguments of llama_stream.py]
#
# Environment variables: PYTHON and SHARE_HF_VENV as in recipes/setup_env.sh.

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env plots

# accelerate warns about each of these four options that is missing. Routes let recipes/demo find the task of a
# text.
exec accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    "$root/recipes/llama_stream.py" --routing true "$@"
