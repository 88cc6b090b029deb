#!/bin/sh
# symbols.sh LIBESPALIER_SO: the shared library exports the public esp_ functions and nothing else.
# Mutation it caught: -fvisibility=hidden taken out of the flags.
set -eu
root=$(dirname "$0")/../..
exported=$(nm -D --defined-only "$1" | awk '$2 ~ /[TDBRV]/ {print $3}' | sort)
declared=$(cat "$root"/include/espalier/*.h | grep -oE '\besp_[a-z0-9_]+\(' | tr -d '(' | sort -u)
bad=0
for s in $exported; do
  echo "$declared" | grep -qx "$s" || { echo "symbols: $s is exported but is in no public header"; bad=1; }
done
[ -n "$exported" ] || { echo "symbols: nothing is exported"; bad=1; }
[ $bad = 0 ] && echo "symbols: $(echo "$exported" | wc -l) exported, all public"
exit $bad
