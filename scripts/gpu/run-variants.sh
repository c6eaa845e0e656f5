#!/usr/bin/env bash
# Times the variants that scripts/gpu-variants put into this folder, in turns, on a machine with a CUDA GPU.
#
#     ./run.sh [--test] [--budget SECONDS] [NAME...]
#
#   --test            each variant once, on tiny inputs: whether it is right; times mean nothing
#   --budget SECONDS  for everything together, 570 by default; what does not fit is skipped
#   NAME              variants, all that are here by default; as-it-stands is always one of them
#
# Goes round all variants twice, in the other direction the second time, and again as long as there is time. Each time a
# variant is compared with f64 first, then timed beside the limit. Writes into ./results-<UTC time>/, or into $OUT: raw
# results as round-N/VARIANT.jsonl, what programs said as VARIANT.log, and table.txt. Exits with 1 if a variant failed.
# The GPU is device 0 of those that CUDA_VISIBLE_DEVICES shows, in the order of nvidia-smi.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Parts of cases' names: networks, aligned and not; a large tensor; many small ones.
cases=(ResNet-50/K3/bf16 ViT-B/16/K3/bf16 "flat 1e8/K2/f32" "flat 1e8/K3/bf16" "10000 tensors")
operations=(step dot blend)
test='' budget=570 asked=()
source "$here/machine.sh"
while (($#)); do
    case $1 in
        --test) test=1 ;;
        --budget) budget=${2:-} && shift ;;
        --help | -h) usage && exit ;;
        -*) usage >&2 && exit 2 ;;
        *) asked+=("$1") ;;
    esac
    shift || true
done
[[ $budget =~ ^[0-9]+$ ]] || { echo "run.sh: --budget takes seconds" >&2 && exit 2; }
mapfile -t variants < "$here/variants.txt"
if ((${#asked[@]})); then
    for name in "${asked[@]}"; do
        grep -qxF "$name" "$here/variants.txt" || { echo "run.sh: no variant $name; there are: ${variants[*]}" >&2 && exit 2; }
    done
    mapfile -t variants < <(printf '%s\n' "${variants[0]}" "${asked[@]}" | awk '!seen[$0]++')
fi

results=${OUT:-$PWD/results-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$results"
printf '%s\n' "${variants[@]}" > "$results/variants.txt"
cp "$here/left-out.txt" "$results"
deadline=$budget failed=0

# program VARIANT OPERATION ARGUMENT...
program() {
    local name=$1 operation=$2
    shift 2
    local run=("$here/programs/$name/$operation" --device cuda --only gradblend --only limit "$@")
    # The variant's own, where it was brought.
    [[ ! -d $here/standin/$name ]] || run=(env LD_LIBRARY_PATH="$here/standin/$name" "${run[@]}")
    GRADBLEND_COMMIT="$(manifest commit), $name" limited "${run[@]}"
}

# turn ROUND VARIANT OPERATION SECONDS: one operation of a variant. One that fails is left out from then on.
turn() {
    local name=$2 operation=$3 log=$results/$2.log code=0
    local arguments=(--test)
    [[ -n $test ]] || arguments=(--bench --budget "$4" "${cases[@]}")
    # A case that was begun in time may end.
    deadline=$((SECONDS + $4 + 30 < budget ? SECONDS + $4 + 30 : budget))
    echo "== round $1: $operation" >> "$log"
    mkdir -p "$results/round-$1"
    program "$name" "$operation" "${arguments[@]}" --results "$results/round-$1/$name.jsonl" >> "$log" 2>&1 || code=$?
    ((code != 0)) || return 0
    if ((code == 124 || code == 137 && SECONDS >= deadline)); then
        echo "round $1: $operation: $name: out of time"
        return
    fi
    reason=$(grep '^Error: ' "$log" | tail -n 1 || true)
    echo "$name: $operation failed: ${reason:-exit status $code; $(tail -n 1 "$log")}" | tee -a "$results/left-out.txt"
    failed=$((failed + 1))
    if [[ $name == "$base" ]]; then
        tail -n 3 "$log" >&2
        echo "run.sh: there is nothing to compare with" >&2
        exit 1
    fi
    mapfile -t variants < <(printf '%s\n' "${variants[@]}" | grep -vxF "$name")
}

# round NUMBER ROUNDS: all variants, in time for so many rounds.
round() {
    local order=("${variants[@]}") began=$SECONDS operation name turns
    (($1 % 2)) || mapfile -t order < <(printf '%s\n' "${variants[@]}" | tac)
    turns=$((${#order[@]} * ${#operations[@]} * $2))
    for operation in "${operations[@]}"; do
        for name in "${order[@]}"; do
            turns=$((turns - 1))
            [[ " ${variants[*]} " == *" $name "* ]] || continue
            ((SECONDS + 5 < budget)) || { echo "round $1: $operation: $name: out of time" && continue; }
            turn "$1" "$name" "$operation" $(((budget - SECONDS - 5) / (turns + 1)))
        done
    done
    took=$((SECONDS - began))
    echo "round $1: $took s"
}

base=${variants[0]} took=0
echo "results in $results"
assemble || { echo "run.sh: cannot put the programs together in $here; is it writable?" >&2 && exit 1; }
if ! describe > "$results/machine.log" 2>&1 || [[ -n $unusable ]]; then
    echo "run.sh: ${unusable:-$reason}" >&2
    exit 1
fi
echo "$reason"
if [[ -n $test ]]; then
    # Cases that no longer have these names would be an error.
    program "$base" step --bench --budget 0 "${cases[@]}" --results /dev/null > "$results/cases.log" ||
        { cat "$results/cases.log" && exit 1; }
    round 1 1
else
    round 1 2
    round 2 1
    for ((number = 3; budget - SECONDS > took + 10; number++)); do round "$number" 1; done
fi
if python=$(command -v python3); then
    "$python" "$here/table.py" "$results" | tee "$results/table.txt"
else
    echo "no python3 here: scripts/gpu/table.py RESULTS makes the table elsewhere"
fi
((failed == 0))
