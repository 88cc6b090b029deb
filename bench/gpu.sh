#!/usr/bin/env bash
# Everything that is to be known of espalier on the GPU of this machine, in one call of under ten minutes: builds, tests,
# looks for faults, compares with the CPU backend and with PEFT, measures. Stops cleanly when the time is over and writes
# what it has: OUT/<device>.json and a table, OUT/<device>.md (bench/README.md says how to read them).
#
#   bench/gpu.sh [OPTIONS] [SECTION ...]      sections: build tests sanitizer parity bench (all, in this order)
#     --deadline S     seconds for everything (540)
#     --out DIR        default bench/results; results of sections that did not run now are kept
#     --build DIR      default build/gpu; without the section `build` it must hold a build
#     --shapes A,B     only these shapes in `bench` (names: bench/gpu/shapes.py), in this order
#     --device NAME    cuda (default), cuda:N, cpu
#     --steps N        measured steps of a training run (8)
#     --dry            no GPU: builds nothing, runs `parity` and `bench` at a tiny size on the processor, checks the rest
#                      for syntax, and labels the results cpu
#
# Needs nvcc, cmake, ninja, a C compiler and a python3 (or $PYTHON) with torch, transformers and peft. No network. Where
# the libraries that espalier links are missing, ESP_DEPS names a folder made by bench/gpu_carry.sh on another machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PATH=$PATH:/usr/local/cuda/bin

if [ -n "${ESP_DEPS:-}" ]; then
  unpacked=${TMPDIR:-/tmp}/espalier-deps
  mkdir -p "$unpacked"
  tar -xzf "$ESP_DEPS/deps.tar.gz" -C "$unpacked"
  deps=$unpacked/deps
  export PKG_CONFIG_LIBDIR=$deps/lib/pkgconfig
  # RPATH and not RUNPATH: it also holds for what these libraries load themselves
  export LDFLAGS="${LDFLAGS:-} -Wl,--disable-new-dtags -Wl,-rpath,$deps/lib -Wl,-rpath-link,$deps/lib"
  export CMAKE_LIBRARY_PATH=$deps/lib CMAKE_INCLUDE_PATH=$deps/include
  if ! pkg-config --version >/dev/null 2>&1; then
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$deps/lib" "$deps/bin/pkgconf" >"$deps/bin/pkg-config"
    chmod +x "$deps/bin/pkg-config"
    export PATH=$deps/bin:$PATH
  fi
fi
exec "$python" -u bench/gpu/drive.py "$@"
