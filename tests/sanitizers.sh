#!/usr/bin/env bash
# The C++ engine over the C plugin, noop and truncate, under AddressSanitizer with UndefinedBehaviorSanitizer, and with two
# threads under ThreadSanitizer, also while a third one swaps the plugins. Host and plugins are instrumented, too. Planted bugs show that each can fail.
#
# RUSTC_BOOTSTRAP lets a stable compiler take the flags; --target keeps build scripts free of them. Needs clang++ or g++ with
# the sanitizers' runtimes. Builds into target/sanitizers, or $KVHOOK_SANITIZERS_DIR. Under 5 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-gnu
build=${KVHOOK_SANITIZERS_DIR:-target/sanitizers}
mkdir -p "$build"
build=$(cd "$build" && pwd)
warnings=(-Wall -Wextra -Wpedantic -Werror)
include=(-Ihook-abi/include -Ihost-shim/host/include)

# prepare NAME RUST_FLAGS C_FLAGS: everything instrumented, in $build/NAME.
prepare() {
    local name=$1 rust=$2 flags=$3
    echo "== $name: building"
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="$rust" CARGO_TARGET_DIR="$build/cargo-$name" \
        cargo build --quiet --target $target -p kvhook-host -p kvhook-noop -p kvhook-truncate
    local libraries="$build/cargo-$name/$target/debug"
    mkdir -p "$build/$name"
    cp "$libraries"/libkvhook_{noop,truncate}.so "$build/$name/"
    plugin() {
        cc -std=c11 -g -O1 "${warnings[@]}" $flags "${include[@]}" "${@:2}" -shared -fPIC -Wl,-z,nodelete \
            tests/c/plugin.c -o "$build/$name/libkvhook_$1.so"
    }
    plugin window-c
    plugin overflow -DPLANT_OVERFLOW
    plugin race -DPLANT_RACE
    cc -std=c11 -g -O1 "${warnings[@]}" $flags -fno-builtin -c tests/c/tsan_memory.c -o "$build/$name/tsan_memory.o"
    c++ -std=c++17 -g -O1 "${warnings[@]}" $flags "${include[@]}" tests/c/engine.cpp "$build/$name/tsan_memory.o" -o "$build/$name/engine" \
        -pthread -L"$libraries" -lkvhook_host -Wl,-rpath,"$libraries"
}

# engine NAME PLUGIN ARGUMENTS...
engine() {
    local name=$1 plugin=$2
    shift 2
    "$build/$name/engine" "$build/$name/libkvhook_$plugin.so" --copies "$build/copies" "$@"
}

# clean NAME PLUGIN ARGUMENTS...: must end without a report.
clean() {
    engine "$@" > "$build/log" 2>&1 || { cat "$build/log"; echo "FAILED: $*"; exit 1; }
    echo "clean: $*"
}

# caught REPORT NAME PLUGIN ARGUMENTS...: must fail with the report, or the sanitizer sees nothing.
caught() {
    local report=$1
    shift
    if engine "$@" > "$build/log" 2>&1 || ! grep -q "$report" "$build/log"; then
        cat "$build/log"
        echo "FAILED: the planted bug was not caught ($report): $*"
        exit 1
    fi
    echo "caught: $report: $*"
}

attention="history=top,importance=attention,window=8,budget=32,recent=8,every=16"
draw="history=sample,importance=key_diff,budget=40,recent=8,every=20"

export ASAN_OPTIONS=detect_leaks=1:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
prepare address -Zsanitizer=address "-fsanitize=address,undefined -fno-sanitize-recover=all"
caught "heap-buffer-overflow .*plugin.c" address overflow --config recent=16
for cache in contiguous paged; do
    clean address window-c --config recent=16 --expect 20 --cache $cache --late 3
    clean address noop --cache $cache
    clean address truncate --config "$attention" --expect 32 --cache $cache
    clean address truncate --config "$draw" --expect 40 --cache $cache --late 1
done
clean address window-c --config recent=16 --expect 20 --threads 2 --late 3 --swaps 200
clean address truncate --config "$attention" --expect 32 --threads 2 --late 2 --swaps 10
clean address truncate --config align=block,budget=20,every=16 --expect 24 --cache paged

export TSAN_OPTIONS=halt_on_error=1:suppressions=$PWD/tests/c/tsan.supp
prepare thread "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" -fsanitize=thread
caught "data race .*plugin.c" thread race --config recent=16 --threads 2
clean thread window-c --config recent=16 --expect 20 --threads 2
clean thread noop --threads 2 --cache paged
clean thread truncate --config "$attention" --threads 2
clean thread truncate --config "$draw" --threads 2 --cache paged --late 1
# Arms get new instances all the while. Most of a swap is the hash of the plugin's file, and the one in C is small.
clean thread window-c --config recent=16 --expect 20 --threads 2 --swaps 400
clean thread truncate --config "$attention" --threads 2 --cache paged --late 2 --swaps 4
echo "== sanitizers: all well"
