#!/bin/sh
# Compiles every kernel family into kernels/prebuilt/NAME.fatbin: code for sm_80 and sm_90a, and PTX for other chips.
#
#   build.sh            write the files
#   build.sh --check    compile elsewhere and compare with the files, byte by byte
#   build.sh NAME...    write these families only
#   build.sh --in DIR   before any of these: the kernels of another folder, whose files go to DIR/../prebuilt
#
# NVCC names the compiler (CUDA 13.0: a newer one writes PTX that drivers of 13.0 refuse).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
nvcc=${NVCC:-nvcc}
if [ "${1:-}" = --in ]; then
    here=$(cd "$2" && pwd)
    shift 2
fi
out=$here/../prebuilt
check=
if [ "${1:-}" = --check ]; then
    check=1
    shift
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
cd "$here"
[ $# -gt 0 ] || set -- *.cu
for name in "$@"; do
    name=${name%.cu}
    # Without a seed of its own, each build names its internal symbols anew.
    "$nvcc" -fatbin -std=c++17 -O3 -frandom-seed="$name" --compress-mode=size -Xptxas=-warn-spills ${NVCC_FLAGS:-} \
        -gencode arch=compute_80,code=[compute_80,sm_80] -gencode arch=compute_90a,code=sm_90a \
        "$name.cu" -o "$out/$name.fatbin"
    if [ -n "$check" ]; then
        cmp "$out/$name.fatbin" "../prebuilt/$name.fatbin"
    fi
done
