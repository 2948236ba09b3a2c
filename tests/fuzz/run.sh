#!/usr/bin/env bash
# Builds every fuzz target with coverage and AddressSanitizer and runs each over its committed corpus and new inputs:
#     run.sh [TARGET...]
# KVHOOK_FUZZ_SECONDS: seconds for each, default 10. An input that crashes a target is left in artifacts/.
#
# The flags are those of cargo-fuzz, which is not needed. RUSTC_BOOTSTRAP lets a stable compiler take -Zsanitizer; --target
# keeps build scripts free of the flags. Needs a C++ compiler for the fuzzer's runtime.
set -euo pipefail
cd "$(dirname "$0")"

target=x86_64-unknown-linux-gnu
coverage=(-Cpasses=sancov-module)
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    coverage+=("-Cllvm-args=-sanitizer-coverage-$option")
done
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing ${coverage[*]} -Zsanitizer=address -Ccodegen-units=1"
cargo build --quiet --locked --release --target $target --bins

targets=("$@")
[ $# -gt 0 ] || targets=(config config_noop metadata spec control plan calls weights)
seconds=${KVHOOK_FUZZ_SECONDS:-10}
found=$(mktemp -d)
trap 'rm -rf "$found"' EXIT
mkdir -p artifacts
for name in "${targets[@]}"; do
    mkdir "$found/$name"
    options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1)
    options+=(-artifact_prefix="artifacts/$name-")
    case $name in plan | calls) options+=(-max_len=600 -len_control=0) ;; esac
    [ ! -f "dictionaries/$name.txt" ] || options+=(-dict="dictionaries/$name.txt")
    # New inputs go to the first folder: the committed corpus stays as it is.
    if ! "${CARGO_TARGET_DIR:-target}/$target/release/$name" "${options[@]}" "$found/$name" "corpus/$name" \
        > "$found/log" 2>&1; then
        tail -n 60 "$found/log"
        echo "FAILED: fuzz target $name; its input is in $PWD/artifacts"
        exit 1
    fi
    executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$found/log")
    echo "$name: $executed inputs in $seconds s, $(find "corpus/$name" -type f | wc -l) of them committed"
done
