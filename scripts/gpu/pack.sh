# What scripts/gpu-bundle and scripts/gpu-variants share: how a folder is made for a machine that has an NVIDIA driver, but
# neither Rust nor a CUDA toolkit. Sourced at the root of the repository; `out` is the folder, `profile` cargo's.

# What is sent to other machines should stay easy to send.
limit=$((64 << 20))
script=${0##*/}

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "scripts/$script"; }

need() {
    local tool
    for tool in "$@" strip objdump sha256sum python3; do
        command -v "$tool" > /dev/null || { echo "$script: $tool is needed" >&2 && exit 1; }
    done
}

# Only a folder that these scripts made is emptied.
ours_to_empty() {
    if [[ -d $out && -n $(ls -A "$out") && ! -e $out/MANIFEST ]]; then
        echo "$script: $out is not empty and has no MANIFEST; name another folder" >&2
        exit 1
    fi
}

# An empty folder, by its whole name. It is ours from the beginning, even if something fails before it is complete.
empty() {
    rm -rf "$out"
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    touch "$out/MANIFEST"
}

# finish BUILT FOLDER...: strips the programs in these folders, writes MANIFEST, and packs; BUILT is what pack.py printed.
finish() {
    local built=$1 glibc bytes
    shift
    (
        cd "$out"
        find "$@" -type f -exec strip {} +
    )
    # The newest symbol version that any program asks of the C library.
    glibc=$(cd "$out" && find "$@" -type f -exec objdump -T {} + | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
    {
        echo "commit        $(git describe --always --dirty)"
        echo "built         $(date -u +%Y-%m-%dT%H:%M:%SZ)"
        echo "profile       $profile"
        echo "rustc         $(rustc --version)"
        sed 's/^toolkit      /nvcc         /' "$built"
        echo "glibc         ${glibc#GLIBC_}"
        echo
        (cd "$out" && find . -type f ! -name MANIFEST -printf '%P\0' | sort -z | xargs -0 sha256sum)
    } > "$built.manifest"
    mv "$built.manifest" "$out/MANIFEST"
    python3 scripts/gpu/pack.py parts "$out" "$@"
    bytes=$(find "$out" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }')
    echo "$out: $((bytes >> 20)) MiB, needs glibc ${glibc#GLIBC_}"
    if ((bytes > limit)); then
        echo "$script: more than $((limit >> 20)) MiB; fewer architectures (--archs) make it smaller. The largest:" >&2
        (cd "$out" && find . -type f -printf '%s %P\n' | sort -rn | head -n 8) >&2
        exit 1
    fi
}
