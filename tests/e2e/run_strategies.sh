#!/usr/bin/env bash
# Every recipe of recipes/continual that stands on the demo's base, cut short: stopped in the middle of its second task and
# resumed it has the bytes of the undisturbed run, and with three threads those of one. Its peak is what was planned.
# Mutation seen caught: `esp_strategies_load` (state.c) leaving the arrays of the resumed run as task_begin made them.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
cd "$work/recipes/continual"
short=(train.max_steps=6 train.micro_batch_size=4 after=[] checkpoint.every=1000 -q)
for i in 0 1 2 3; do short+=("eval.sets[$i].limit=8"); done
n=0
for recipe in *.yaml; do
  grep -q 'demo/base' "$recipe" || continue
  name=${recipe%.yaml}
  [ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
  "$ESPALIER" run "$recipe" "${short[@]}" --output "$work/$name.a" > log 2>&1 || { cat log; fail "$name"; }
  code=0
  ESPALIER_THREADS=3 "$ESPALIER" run "$recipe" "${short[@]}" --stop-after 9 --output "$work/$name.b" > log 2>&1 || code=$?
  [ $code = 6 ] || [ $code = 0 ] || { cat log; fail "$name, to be stopped: exit code $code"; } # joint: one task; ncm: no steps
  if [ $code = 0 ]; then # nothing to stop in: what came last is taken back
    last=$(ls -d "$work/$name.b"/checkpoints/checkpoint-* | sort | tail -1)
    rm -r "$last" "$work/$name.b/matrix.json"
  fi
  "$ESPALIER" resume "$work/$name.b" -q > log 2>&1 || { cat log; fail "$name, resumed"; }
  python3 - "$work/$name.a/result.json" "$name" <<'END' || fail "$name: its plan"
import json, sys
name, r = sys.argv[2], json.load(open(sys.argv[1]))
ratio = r["memory_peak"] / r["planned_memory_peak"]
# bases as large as the data can make them; a merge between tasks as large as any method makes it
low = 0.85 if name in ("osf", "gpm", "nullspace", "merge_between") else 0.98
high = 1.01 if name in ("ncm", "migu") else 1
sys.exit(None if low <= ratio <= high else f"a peak of {ratio:.4f} of the plan")
END
  (cd "$work/$name.a" && find adapters -name '*.safetensors' | sort) > files
  [ -s files ] || fail "$name wrote no adapter"
  while read -r file; do
    cmp "$work/$name.a/$file" "$work/$name.b/$file" || fail "$name: $file differs"
  done < files
  cmp "$work/$name.a/matrix.json" "$work/$name.b/matrix.json" || fail "$name: another matrix"
  n=$((n + 1))
done
[ $n -gt 0 ] || fail "no recipe of a strategy was found"
echo "strategies: $n, each resumed to the same bytes"
