#!/usr/bin/env bash
# What is worth knowing from a machine with a GPU, in one command that without names of steps ends within 9 minutes:
# the tests, the check of every op, the benchmarks, their report. Nothing to install and no network:
#
#     bash bench/gpu.sh                        # gpu_tests tests check bench attention
#     bash bench/gpu.sh tests sanitize         # these steps alone; there are also: host model memory
#
# PYTHON names the interpreter (default python3); it needs torch, triton, pytest, pytest-xdist, hypothesis,
# pytest-benchmark, matplotlib and rich. Ten files go to ${OUT:-out}/gpu-<name>-<date>/. A step that fails does not stop the
# next one. SUITE=900 gives the whole test suite 15 minutes, in place of one, which is what it gets after the tests that are
# about a GPU alone. SANITIZE="--tool racecheck --ops glu_packed" are options of bench.sanitize.
# Status: 0, 1 where a step failed, 2 where there is no GPU.
set -u
here=$PWD
usual="gpu_tests tests check bench attention"
all="$usual host model memory sanitize"
steps=" ${*:-$usual} "
for name in $steps; do
    case " $all " in *" $name "*) ;; *)
        echo "gpu.sh: there is no step '$name'; there are: $all" >&2
        exit 2
        ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if ! name=$(timeout 20 "$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu.sh: PyTorch sees no GPU here (torch.cuda.is_available() is False); on a CPU use: make bench")
from bench.record import slug
print(slug())'); then
    exit 2
fi
out=${OUT:-out}
case $out in /*) ;; *) out=$here/$out ;; esac
folder=$out/gpu-$name-$(date -u +%Y%m%d-%H%M%S)
mkdir -p "$folder" || exit 2
failed=()

# step NAME SECONDS COMMAND...: an interrupt after SECONDS, so that pytest still writes what it has; then a kill.
step() {
    local step=$1 seconds=$2 status
    shift 2
    case $steps in *" $step "*) ;; *) return ;; esac
    echo "== $step (at most $seconds s)"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$folder/$step.log" 2>&1
    status=$?
    tail -n 3 "$folder/$step.log"
    echo "$step: status $status after $((SECONDS - began)) s in all" >>"$folder/summary.txt"
    [ "$status" = 0 ] || failed+=("$step (status $status)")
}

state() {
    nvidia-smi --query-gpu=name,driver_version,temperature.gpu,clocks.sm,clocks.mem,power.draw --format=csv 2>&1
}

began=$SECONDS
state >"$folder/summary.txt"
workers=$(nproc)
about_a_gpu="tests/test_gpu.py tests/test_gpu_attention.py tests/test_attention_gpu.py tests/test_replay.py"
# shellcheck disable=SC2086
step gpu_tests 100 "$python" -m pytest $about_a_gpu -q -n "$workers" -p no:cacheprovider --durations=10
# The whole suite takes longer: a quarter of it took 16 slow cores 3 minutes.
step tests "${SUITE:-60}" "$python" -m pytest tests -q -n "$workers" -p no:cacheprovider --durations=10
step check 50 "$python" -c '
import sys, torch
from retainops.cli.sweep import paths, sweep  # what `retainops check` runs, without the library of its command line
from retainops.registry import ops
kernels = paths()[0]
print(kernels.description)
bad = 0
with kernels.entered():
    for op in ops():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for found in sweep(op, dtype, torch.Size((257, 1023)), kernels):
                bad += not found.ok
                print(op.name, dtype, found.layout, "ok" if found.ok else f"FAILED\n{found}", flush=True)
sys.exit(f"check: {bad} FAILED" if bad else 0)'
export TORCHINDUCTOR_COMPILE_THREADS=1 # a compiler for each of the processes that warm up
step bench 260 "$python" -m bench.run --results "$folder" --warm "$workers" --seconds 140 --note "by bench/gpu.sh"
step attention 45 "$python" -m bench.attention_time --results "$folder"
step host 60 "$python" -m bench.host_time
step model 90 "$python" -m bench.model_step --no-compile --results "$folder"
step memory 120 "$python" -m bench.linear_cross_entropy_memory --results "$folder"
# shellcheck disable=SC2086
step sanitize 420 "$python" -m bench.sanitize --jobs "$workers" --seconds 200 ${SANITIZE:-}
state >>"$folder/summary.txt"

case $steps in *" bench "*)
    echo "== report"
    timeout --kill-after=5 20 "$python" -m bench.report "$folder" || failed+=("report")
    ;;
esac
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}" | tee -a "$folder/summary.txt"
    grep -hsE '^(FAILED|ERROR)|FAILED$' "$folder/gpu_tests.log" "$folder/tests.log" "$folder/check.log" "$folder/bench.log" | head -n 40
fi
echo "== everything is in $folder"
[ ${#failed[@]} = 0 ]
