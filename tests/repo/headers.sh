#!/bin/sh
# Every public header compiles alone, as C11 and as C++; every internal header compiles alone as C17.
# Mutation it caught: <stdint.h> taken out of include/espalier/run.h.
set -eu
cd "$(dirname "$0")/../.."
bad=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for h in include/espalier/*.h; do
  for mode in "-std=c11 -x c" "-std=c++17 -x c++"; do
    # shellcheck disable=SC2086
    ${CC:-gcc} $mode -Wall -Wextra -Werror -pedantic -fsyntax-only -Iinclude "$h" 2>"$log" ||
      { echo "headers: $h as $mode:"; cat "$log"; bad=1; }
  done
done
for h in src/*/*.h adapters/*.h optim/*.h dist/*.h; do
  ${CC:-gcc} -std=gnu17 -D_GNU_SOURCE -x c -fsyntax-only -Iinclude -Isrc -I. "$h" 2>"$log" ||
    { echo "headers: $h:"; cat "$log"; bad=1; }
done
[ $bad = 0 ] && echo "headers: each compiles alone"
exit $bad
