#!/usr/bin/env bash
#
# From a fresh clone to a learned stream of tasks: sets up an environment (on the first run) and runs
# recipes/llama_stream.py on the small backbone and tasks of recipes/assets. Needs Python 3.10 or newer.
#
#     bash recipes/quickstart.sh [arguments of llama_stream.py]
#
# Environment: PYTHON and SHARE_HF_VENV as in recipes/setup_env.sh.

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env plots

# The first four options are given because accelerate warns about each one that is not. Routes let recipes/demo find the
# task of a text.
exec accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    "$root/recipes/llama_stream.py" --routing true "$@"
