# What the run.sh of scripts/gpu-bundle and that of scripts/gpu-variants share, on a machine with a CUDA GPU. Sourced by
# them; `here` is the folder.

# The programs are stripped: a backtrace has no names. nvidia-smi and CUDA shall mean the same by device 0.
export RUST_BACKTRACE=0 CUDA_DEVICE_ORDER=PCI_BUS_ID GRADBLEND_REQUIRE_CUDA=1
SECONDS=0
child='' unusable=''
gpu=${CUDA_VISIBLE_DEVICES:-0} gpu=${gpu%%,*}
trap '[[ -z $child ]] || kill "$child" 2> /dev/null; exit 130' INT TERM

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$here/run.sh"; }

# limited COMMAND...: runs a command until `deadline`. In the background, so that ^C is heard.
limited() {
    local left=$((deadline - SECONDS)) code=0
    ((left > 0)) || return 124
    timeout -k 5 "$left" "$@" < /dev/null &
    child=$!
    wait "$child" || code=$?
    child=''
    return "$code"
}

# Puts the programs together from their parts; pack.py says why they are in parts.
assemble() {
    local program pieces piece
    find "$here/kernels" -name '*.gz' -exec gzip -dkf {} + || return
    while read -r program pieces; do
        mkdir -p "$here/${program%/*}" || return
        gzip -dc "$here/parts/$program.gz" | for piece in $pieces; do
            case $piece in
                kernels/*) cat "$here/$piece" ;;
                *) head -c "$piece" ;;
            esac || exit
        done > "$here/$program.new" || return
        chmod +x "$here/$program.new" && mv "$here/$program.new" "$here/$program" || return
    done < "$here/parts/list"
}

manifest() { sed -n "s/^$1 *//p" "$here/MANIFEST"; }

# Prints what machine this is. Says more in `reason`, and in `unusable` if nothing can run here; fails if files have changed.
describe() {
    local code=0 needs has
    sed '/^$/,$d' "$here/MANIFEST"
    uname -srm
    nproc
    grep -E 'MemTotal|MemAvailable' /proc/meminfo || true
    cat /proc/driver/nvidia/version 2> /dev/null || echo "no /proc/driver/nvidia/version"
    if command -v nvidia-smi > /dev/null; then
        limited nvidia-smi || true
        reason=$(timeout 20 nvidia-smi -i "$gpu" --query-gpu=name,driver_version --format=csv,noheader || true)
    else
        echo "no nvidia-smi"
        reason="no nvidia-smi"
    fi
    reason+=", commit $(manifest commit)"
    needs=$(manifest glibc) has=$(getconf GNU_LIBC_VERSION 2> /dev/null | awk '{ print $2 }')
    echo "glibc $has, needed is $needs"
    [[ $(printf '%s\n' "$needs" "$has" | sort -V | head -n 1) == "$needs" ]] ||
        unusable="glibc ${has:-?} is here, the programs need $needs"
    (cd "$here" && sed '1,/^$/d' MANIFEST | sha256sum --quiet -c) ||
        { reason="files differ from MANIFEST; $reason" && code=1; }
    return "$code"
}
