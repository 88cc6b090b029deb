#!/bin/sh
# Runs every libFuzzer target FUZZ_RUNS times (default 20000) from its kept corpus, with AddressSanitizer and UBSan.
# New inputs go to build/fuzz/corpus; a finding stays in build/fuzz/found and fails the script.
set -eu
cd "$(dirname "$0")/.."
runs=${FUZZ_RUNS:-20000}
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz
mkdir -p build/fuzz/found
status=0
for target in build/fuzz/fuzz_*; do
  [ -f "$target" ] && [ -x "$target" ] || continue
  name=$(basename "$target")
  work=build/fuzz/corpus/$name
  mkdir -p "$work"
  seeds=tests/fuzz/corpus/${name#fuzz_}
  [ -d "$seeds" ] || { echo "fuzz: $name has no seeds in $seeds" >&2; exit 1; }
  if "$target" -runs="$runs" -seed=1 -max_len=65536 -rss_limit_mb=4096 -timeout=20 -close_fd_mask=3 \
      -artifact_prefix=build/fuzz/found/"$name"- "$work" "$seeds" 2>build/fuzz/"$name".log; then
    echo "fuzz: $name passed $runs runs"
  else
    echo "fuzz: $name FAILED:"; tail -40 build/fuzz/"$name".log; status=1
  fi
done
exit $status
