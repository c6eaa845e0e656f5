#!/usr/bin/env bash
# Runs what scripts/gpu-bundle put into this folder, on a machine with a CUDA GPU.
#
#     ./run.sh [--quick | --bench | --bench-only | --profile] [--operation NAME] [--budget SECONDS]
#
#   --quick           only the machine and the tests
#   --bench           a few benchmarks at the end, as far as there is time for them
#   --bench-only      the machine, and all benchmarks that there is time for; raw results in benches.jsonl
#   --profile         the machine, and what Nsight Compute counts in each kernel on one large tensor and on ResNet-50's
#   --operation NAME  of dot, blend and step only this one, and PyTorch's part in it
#   --budget SECONDS  for everything together, 570 by default; what does not fit is skipped
#
# Each step writes a log into ./results-<UTC time>/, or into $OUT. A failed step does not keep the others from running.
# The first thing is to put the programs in this folder together.
# Exits with 1 if a step failed. The GPU is device 0 of those that CUDA_VISIBLE_DEVICES shows, in the order of
# nvidia-smi. Nothing but the driver is needed; compute-sanitizer and ncu are used where they are on PATH or in
# /usr/local/cuda/bin.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
quick='' bench='' only='' profile='' operation='' budget=570
source "$here/machine.sh"
while (($#)); do
    case $1 in
        --quick) quick=1 ;;
        --bench) bench=1 ;;
        --bench-only) bench=1 only=1 ;;
        --profile) profile=1 only=1 ;;
        --operation) operation=${2:-} && shift ;;
        --budget) budget=${2:-} && shift ;;
        --help | -h) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift || true
done
[[ $budget =~ ^[0-9]+$ ]] || { echo "run.sh: --budget takes seconds" >&2 && exit 2; }

results=${OUT:-$PWD/results-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$results"
skip=77 # what a step returns that could not run
rows=() failed=0

# step NAME SECONDS FUNCTION...: runs a function, which may say more in `reason`, and notes how it ended.
step() {
    local name=$1 limit=$2 began=$SECONDS left=$((budget - SECONDS)) code=0 result=PASS late=''
    shift 2
    reason='' log=$results/$name.log
    if ((left < 5)); then
        code=$skip reason="out of time"
    else
        ((limit < left)) || late="out of time: " limit=$left
        deadline=$((SECONDS + limit))
        "$@" > "$log" 2>&1 || code=$?
        if ((code == 124 || (code == 137 && SECONDS >= deadline))); then
            reason="${late}stopped after $limit s${reason:+; $reason}"
            [[ -z $late ]] || code=$skip
        elif ((code > 128)); then
            reason="ended by signal $((code - 128))${reason:+; $reason}"
        fi
    fi
    case $code in
        0) ;;
        "$skip") result=SKIPPED ;;
        *)
            result=FAIL failed=$((failed + 1))
            # 1 and 101 are a test program's and the sanitizer's, which leave a reason.
            [[ -n $reason && $code =~ ^(1|101|124)$ || $code -gt 128 ]] || reason+="${reason:+; }exit status $code"
            ;;
    esac
    rows+=("$(printf '%-22s %-7s %5d  %s' "$name" "$result" $((SECONDS - began)) "$reason")")
    echo "${rows[-1]}"
}

machine() {
    local code=0
    describe || code=$?
    if [[ -z $unusable ]]; then
        # The library's own words on a missing driver or a device that will not do. Its other errors are for later steps.
        limited "$here/examples/cuda_step" > "$log.probe" 2>&1 || true
        cat "$log.probe"
        unusable=$(sed -n 's/^Error: \(no CUDA d.*\|CUDA device .*\)/\1/p' "$log.probe")
        rm "$log.probe"
    fi
    [[ -z $unusable ]] || { reason="$unusable; $reason" && code=1; }
    return "$code"
}

# Runs test programs, named before `--`, with the arguments after it; `prefix` goes before each.
tests() {
    local programs=() program code=0 passed bad skipped one
    while [[ $1 != -- ]]; do programs+=("$1") && shift; done
    shift
    for program in "${programs[@]}"; do
        echo "== $program $*"
        one=0
        limited ${prefix[@]+"${prefix[@]}"} "$here/tests/$program" "--test-threads=$threads" "$@" || one=$?
        ((one == 0)) || code=$one
    done
    # A program that was stopped has no result line: its tests are counted as they end.
    read -r passed bad skipped < <(awk '/^test result:/ { passed += $4; bad += $6; ended = 0 }
        /^== / { passed += ended; ended = 0 } /\.\.\. ok$/ { ended++ } /: skipped: / { skipped++ }
        END { print passed + ended, bad + 0, skipped + 0 }' "$log")
    reason="$passed passed"
    ((bad == 0)) || reason+=", $bad failed: $(awk '$1 == "test" && / FAILED$/ && n++ < 3 { print $2 }' "$log" | xargs)"
    # Such as tests of faults that only the stand-in driver has.
    ((skipped == 0)) || reason+=", $skipped of them had nothing to test here"
    # A filter that no longer names a test must not pass for one.
    ((code != 0 || passed > 0)) || { reason="there is no such test${*:+: $*}" && return 1; }
    return "$code"
}

# A test of the C ABI, which ends by saying how much it did.
c_test() { limited "$1" --device 0 --thin 10 && reason=$(tail -n 1 "$log"); }

# Lists of more than 2^31 numbers: 4.3 GB on the device, and as much on the host.
lengths() {
    local free host need=6000
    free=$(timeout 20 nvidia-smi -i "$gpu" --query-gpu=memory.free --format=csv,noheader,nounits 2> /dev/null || true)
    host=$(awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
    echo "free: ${free:-unknown} MiB on the device, $host MiB on the host; needed: $need MiB each"
    [[ $free =~ ^[0-9]+$ ]] || { reason="nvidia-smi does not say how much GPU memory is free" && return $skip; }
    ((free >= need)) || { reason="$free MiB of GPU memory are free, $need are needed" && return $skip; }
    ((host >= need)) || { reason="$host MiB of host memory are free, $need are needed" && return $skip; }
    tests "${programs[@]}" -- --ignored cuda
}

# toolkit PROGRAM: where a program of the toolkit is.
toolkit() { PATH=$PATH:/usr/local/cuda/bin command -v "$1"; }

# sanitize TOOL: a few tests and the example under compute-sanitizer. The tests judge the driver's results themselves,
# some of which are errors on purpose.
sanitize() {
    local tool threads=1 prefix code=0
    tool=$(toolkit compute-sanitizer) ||
        { reason="no compute-sanitizer on PATH or in /usr/local/cuda/bin" && return $skip; }
    prefix=("$tool" --tool "$1" --error-exitcode 1)
    [[ $1 != memcheck ]] || prefix+=(--report-api-errors no)
    limited "${prefix[@]}" "$here/examples/cuda_step" || code=$?
    if ((code != 0)); then
        reason="in cuda_step"
        return "$code"
    fi
    tests dot blend step graph -- "${sanitized[@]}"
}

# Each contender of a benchmark once, compared with f64.
check() { limited "$here/benches/$1" --test --device cuda && reason="$(grep -c ': right: ' "$log") cases right"; }

# bench NAME SECONDS: an operation's benchmarks, added to the raw results.
bench() {
    local extent=()
    [[ -n $only ]] || extent=(--quick)
    limited "$here/benches/$1" --bench --device cuda "${extent[@]}" --results "$results/benches.jsonl" --budget "$2"
}

# profile OPERATION CASE: what the hardware counts in one launch of our kernel.
profile() {
    local tool
    tool=$(toolkit ncu) || { reason="no ncu on PATH or in /usr/local/cuda/bin" && return $skip; }
    # The first launches are those that are compared with f64. Clocks and caches are left as they are. The program is
    # stopped once the kernel is seen.
    limited "$tool" --clock-control none --cache-control none --check-exit-code 0 --print-details all --kernel-name 'regex:^(dot|blend|dot_blend)$' --launch-skip 3 --launch-count 1 --kill yes \
        --section LaunchStats --section Occupancy --section SpeedOfLight --section MemoryWorkloadAnalysis \
        --section SchedulerStats --section WarpStateStats \
        --metrics dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct \
        --export "${log%.log}" --force-overwrite --page details \
        "$here/benches/$1" --bench --device cuda --only gradblend --results /dev/null "$2" || return
    grep -q 'dram__bytes_read' "$log" || { reason="no counters: see the log" && return 1; }
    reason="$2: $(awk '$1 ~ /^(dram__bytes_(read|write)\.sum)$/ { printf "%s%s %s %s", n++ ? ", " : "", $1, $3, $2 }' "$log")"
}

# peers SECONDS: the same by PyTorch, where it is.
peers() {
    local python extent=()
    python=$(command -v python3) || { reason="no python3" && return $skip; }
    limited "$python" -c 'import torch; print(torch.__version__)' ||
        { reason="python3 has no torch" && return $skip; }
    [[ -s $results/benches.jsonl ]] || { reason="no results to compare with" && return $skip; }
    [[ -n $only ]] || extent=(--quick)
    limited "$python" "$here/peers/pytorch.py" --device cuda "${extent[@]}" --results "$results/benches.jsonl" \
        --library "$here/shared/libgradblend.so" --budget "$1"
}

assemble || { echo "run.sh: cannot put the programs together in $here; is it writable?" >&2 && exit 1; }
threads=4 prefix=()
mapfile -t programs < <(cd "$here/tests" && printf '%s\n' *)
mapfile -t operations < <(cd "$here/benches" && printf '%s\n' *)
if [[ -n $operation ]]; then
    [[ -e $here/benches/$operation ]] || { echo "run.sh: --operation takes one of: ${operations[*]}" >&2 && exit 2; }
    operations=("$operation")
fi
# What raw results say they are of.
GRADBLEND_COMMIT=$(manifest commit)
export GRADBLEND_COMMIT
# cuBLAS, where a toolkit or PyTorch has it and the linker does not know.
for folder in /usr/local/cuda/lib64 "$(python3 -c 'import nvidia.cu13, os; print(os.path.join(list(nvidia.cu13.__path__)[0], "lib"))' 2> /dev/null)"; do
    [[ ! -e $folder/libcublas.so.13 && ! -e $folder/libcublas.so ]] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
# Each kernel once or twice: dtypes, runs of small tensors, lists beyond one block, and every operation in a graph.
sanitized=(cuda::f32s::step_is cuda::bf16s::step_is cuda::f16s::in_place cuda::bf16s::runs_of_small_tensors
    cuda::f32s::splitting replays_do)

echo "results in $results"
step machine 60 machine
if [[ -z $only ]]; then
    # Capture and replay of graphs have a program of their own, and so a line of their own: tests-graph.
    for name in "${programs[@]}"; do
        step "tests-$name" 120 tests "$name" --
    done
    for program in "$here"/c/*; do
        step "c-${program##*/}" 60 c_test "$program"
    done
    step golden-bits 60 tests "${programs[@]}" -- golden
fi
for name in "${operations[@]}"; do
    step "bench-$name-right" 60 check "$name"
done
if [[ -z $quick && -z $only ]]; then
    step example-cuda_step 60 limited "$here/examples/cuda_step"
    step example-c_step 60 limited "$here/examples/c_step" --device 0
    step example-cpp_late_fusion 60 limited "$here/examples/cpp_late_fusion" --quick --device 0 --data "$here/digits.csv"
    step lengths-over-2-31 120 lengths
    for tool in memcheck racecheck initcheck synccheck; do
        step "sanitizer-$tool" 90 sanitize "$tool"
    done
fi
if [[ -n $profile ]]; then
    for name in "${operations[@]}"; do
        step "profile-$name-large" 90 profile "$name" 'flat 1e8/K3/bf16'
        step "profile-$name-model" 90 profile "$name" ResNet-50/K3/bf16
    done
fi
if [[ -n $bench && -z $quick ]]; then
    # An equal part of what is left for each, and for PyTorch; what one does not use is the others'.
    parts=$((${#operations[@]} + 1))
    for name in "${operations[@]}"; do
        share=$(((budget - SECONDS - 10) / parts))
        ((share > 0)) || share=0
        step "bench-$name" $((share + 30)) bench "$name" "$share"
        parts=$((parts - 1))
    done
    share=$((budget - SECONDS - 30))
    ((share > 0)) || share=0
    step bench-pytorch $((budget - SECONDS)) peers "$share"
fi

{
    echo
    printf '%-22s %-7s %5s\n' step result s
    printf '%s\n' "${rows[@]}"
    echo
    [[ -z $unusable ]] || echo "THIS MACHINE CANNOT RUN THE CUDA BACKEND: $unusable"
    ((failed == 0)) && echo "no step failed" || echo "$failed of ${#rows[@]} steps failed"
} | tee "$results/summary.txt"
((failed == 0))
