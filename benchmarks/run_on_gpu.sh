#!/usr/bin/env bash
# Run the GPU tests and the GPU suite on a bare machine with an NVIDIA GPU.
#
#   benchmarks/run_on_gpu.sh [WHEELS] [OUTPUT] [CASES...]
#
# WHEELS: a folder of wheels to put before what is installed; nothing is downloaded. "" for none.
# OUTPUT: where the results go (default: benchmarks/results). PYTHON names the interpreter (default: python3).
# CASES: patterns of cases of the suite; with them, the GPU tests are left out. '*-memory-*' compares predicted with
# measured memory and takes about eight minutes.
set -euo pipefail
wheels=${1:+$(realpath "$1")}
output=$(realpath -m "${2:-"$(dirname "$0")/results"}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "$wheels" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "$wheels"/*.whl
    export PYTHONPATH="$packages:$PYTHONPATH"
fi

mkdir -p "$output"
status=0
if [ $# -gt 2 ]; then
    "$python" benchmarks/gpu_suite.py --output-dir "$output" --cases "${@:3}"
    exit
fi
"$python" -m pytest -m gpu tests/gpu -p no:cacheprovider 2>&1 | tee "$output/gpu-tests.log" || status=$?
# Names with `memory` in them are left for a call of their own.
"$python" benchmarks/gpu_suite.py --output-dir "$output" --without '*-memory-*' || status=$?
exit "$status"
