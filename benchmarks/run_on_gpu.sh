#!/usr/bin/env bash
# Run what needs an NVIDIA GPU on a bare machine that has one, in two calls of under six minutes each.
#
#   benchmarks/run_on_gpu.sh OUTPUT tests      # qlora doctor, then the tests marked gpu
#   benchmarks/run_on_gpu.sh OUTPUT measure    # the GPU suite: memory, seconds of a step, kernels
#
# OUTPUT: the folder for the results. A call with the same folder continues where the one before it ended.
# Further arguments go to benchmarks/gpu_tests.py or benchmarks/gpu_suite.py, such as `--cases '8b-*'`, or `--rehearse`
# for all of `measure` on a CPU.
# WHEELS, a variable: a folder that benchmarks/make_wheels.py made, to put before what is installed; nothing is
# downloaded. PYTHON names the interpreter (default: python3).
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
output=$(realpath -m "$1")
part=$2
shift 2
case $part in
tests) script=gpu_tests.py ;;
measure) script=gpu_suite.py ;;
*)
    echo "There is no part '$part', only: tests, measure" >&2
    exit 2
    ;;
esac
wheels=${WHEELS:+$(realpath "$WHEELS")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

if [ -n "$wheels" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$packages" "$wheels"/*.whl
    export PYTHONPATH="$packages:$PYTHONPATH"
fi

mkdir -p "$output"
"$python" "benchmarks/$script" --output-dir "$output" "$@" 2>&1 | tee -a "$output/$part.log"
