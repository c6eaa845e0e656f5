#!/usr/bin/env bash
# Runs the programs of this folder, which `cargo xtask gpu-bundle` made, on a machine with a CUDA GPU.
set -euo pipefail
usage='usage: ./run.sh [--quick | --bench-only | --profile] [--budget SECONDS]

  (none)            the machine, tests, examples, compute-sanitizer, then the laboratory and its PyTorch baselines
  --quick           only the machine, the tests, and the results of the laboratory without times
  --bench-only      only the machine, the laboratory and its baselines, on all cases; raw results in results.jsonl
  --profile         only the machine, and what Nsight Compute counts in a launch of each operation
  --budget SECONDS  for everything together (default: 3600); what does not fit is skipped

Writes a log of each step and summary.txt into $OUT (default: results-TIME in the current folder), and exits with 1 if a
step failed. The device is the first that CUDA_VISIBLE_DEVICES shows. The driver is needed; compute-sanitizer, ncu, a C
compiler, and Python with torch are used where they are installed, and reported as skipped where not.'
mode=all budget=3600
while (($#)); do
    case $1 in
        --quick | --bench-only | --profile) mode=${1#--} ;;
        --budget) budget=${2:?"$usage"} && shift ;;
        --help | -h) echo "$usage" && exit ;;
        *) echo "$usage" >&2 && exit 2 ;;
    esac
    shift
done
[[ $budget =~ ^(0|[1-9][0-9]{0,8})$ ]] || { echo "--budget $budget: expected a number of seconds" >&2 && exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-results-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
results=$out/results.jsonl
# The programs are stripped, so a backtrace has no names. nvidia-smi and CUDA then mean the same by device 0.
export RUST_BACKTRACE=0 CUDA_DEVICE_ORDER=PCI_BUS_ID GRADBLEND_REQUIRE_CUDA=1
GRADBLEND_COMMIT=$(sed -n 's/^commit //p' "$here/MANIFEST")
export GRADBLEND_COMMIT
PATH=$PATH:/usr/local/cuda/bin
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64
SECONDS=0 failed=0
: >"$out/summary.txt"

# step NAME LIMIT COMMAND...: runs a command for at most LIMIT seconds, and writes its result into the summary.
step() {
    local name=$1 limit=$2 began=$SECONDS code=0 result=passed note='' counts
    ((limit <= budget - SECONDS)) || limit=$((budget - SECONDS))
    if ((limit < 5)); then
        result=skipped note='no time left'
    elif ! command -v "$3" >/dev/null; then
        result=skipped note="$3 is not installed"
    else
        timeout --kill-after 5 "$limit" "${@:3}" </dev/null >"$out/$name.log" 2>&1 || code=$?
        case $code in
            0) ;;
            77) result=skipped note='a tool is not installed: see the log' ;;
            *) result=FAILED note="exit status $code" failed=$((failed + 1)) ;;
        esac
        ((code != 124)) || note="stopped after $limit s"
        counts=$(awk '/^test result:/ { seen = 1; passed += $4; bad += $6 } /: skipped: / { skipped++ }
            END { if (seen) printf "%d passed, %d failed, %d skipped", passed, bad, skipped }' "$out/$name.log")
        # A filter that names no test is a mistake.
        if [[ $result == passed && $counts == '0 passed, 0 failed,'* ]]; then
            result=FAILED failed=$((failed + 1))
        fi
        note+=${counts:+ $counts}
    fi
    printf '%-24s %-8s %5d s  %s\n' "$name" "$result" $((SECONDS - began)) "$note" | tee -a "$out/summary.txt"
}

machine() {
    cat "$here/MANIFEST"
    date -u +"date %Y-%m-%dT%H:%M:%SZ"
    uname -srm
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free --format=csv || echo "no nvidia-smi"
    "$here/cuda_step"
}
export here
export -f machine

# laboratory STEP ARGUMENT...: a step of one hour at most.
laboratory() { step "$1" 3600 "$here/gradblend-lab" run --device cuda "${@:2}"; }
# left PARTS: an equal part of the time that is left, less a reserve for the last case of each.
left() { echo $(((budget - SECONDS) / $1 - 30)); }

step machine 120 bash -c machine
if [[ $mode == all || $mode == quick ]]; then
    for program in "$here"/tests/*; do
        [[ -f $program ]] || continue
        step "test-${program##*/}" 300 "$program" --test-threads=4
    done
    laboratory results --test --results "$out/results-test.jsonl"
fi
if [[ $mode == all ]]; then
    # More than 2^31 elements of 2 bytes: 4.3 GB of memory on the device, and as much on the host.
    step test-large 300 "$here/tests/dot" --ignored cuda
    step test-c 300 bash -c 'command -v cc || exit 77; "$here/tests/ffi/run" "$here/lib" --device 0 --out "$0/c"' "$out"
    for tool in memcheck racecheck initcheck synccheck; do
        # The tests check the driver's results themselves; some of them are errors on purpose.
        options=(--tool "$tool" --error-exitcode 1)
        [[ $tool != memcheck ]] || options+=(--report-api-errors no)
        step "$tool-example" 120 compute-sanitizer "${options[@]}" "$here/cuda_step"
        for program in step dot blend observe; do
            step "$tool-$program" 120 compute-sanitizer "${options[@]}" "$here/tests/$program" cuda:: --skip f16s::
        done
        # Its tests run on CUDA only and are in no module.
        step "$tool-graph" 120 compute-sanitizer "${options[@]}" "$here/tests/graph"
    done
fi
if [[ $mode == all || $mode == bench-only ]]; then
    cases=()
    [[ $mode == bench-only ]] || cases=(--quick)
    for operation in step dot blend; do
        laboratory "bench-$operation" --operation "$operation" "${cases[@]}" --results "$results" --budget "$(left 4)"
    done
    step bench-pytorch 3600 bash -c 'python3 -c "import torch" || exit 77; exec python3 "$@"' - \
        "$here/benches/lab/pytorch.py" "$results" --device cuda --library "$here/lib/libgradblend.so" --budget "$(left 1)"
fi
if [[ $mode == profile ]]; then
    for operation in step dot blend; do
        # The first launches are those that are checked. Clocks and caches stay as they are.
        step "profile-$operation" 300 ncu --set full --clock-control none --cache-control none \
            --kernel-name 'regex:^(dot|blend|dot_blend)$' --launch-skip 3 --launch-count 1 --kill yes \
            --check-exit-code 0 --export "$out/$operation" --force-overwrite --page details \
            "$here/gradblend-lab" run --device cuda --operation "$operation" --implementation ours --case ResNet-50/K3/bf16
    done
fi
((failed == 0)) && echo "no step failed" | tee -a "$out/summary.txt"
((failed == 0))
