#!/usr/bin/env bash
# A run on a base on which nothing is trained, answered by the nearest class mean: no steps, no trained value, a plan that
# covers it; with three threads and its last task taken back and resumed it has the bytes of the undisturbed run, so has
# one whose last tasks were added later; two ranks have the scores of one; a signal stops it between two tasks.
# Mutation seen caught: `state_read` (ncm.c) with every class at 0 rows.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
cd "$work/recipes/continual"
short=(model.dtype=fp32 checkpoint.keep=10 -q)
for i in 0 1 2 3; do short+=("eval.sets[$i].limit=20" "tasks[$i].data[0].limit=80"); done
number() { sed -n "s/.*\"$2\": \([0-9]*\).*/\1/p" "$work/$1/result.json" | head -1; }
same() { # what, run
  cmp "$work/all/matrix.json" "$work/$2/matrix.json" || fail "$1: another matrix"
  cmp "$work/all/checkpoints/checkpoint-00000000-task4/strategy.safetensors" \
    "$work/$2/checkpoints/checkpoint-00000000-task4/strategy.safetensors" || fail "$1: other means"
}
"$ESPALIER" run ncm.yaml "${short[@]}" --output "$work/all" || fail "the run"
for key in steps trainable params optim; do [ "$(number all $key)" = 0 ] || fail "$key: $(number all $key)"; done
[ "$(number all ncm)" -ge 4096 ] || fail "the means are not counted" # 8 of 64 values
peak=$(number all memory_peak) plan=$(number all planned_memory_peak)
[ "$peak" -le $((plan + plan / 50)) ] && [ "$plan" -le $((peak + peak / 10)) ] || fail "planned $plan, held $peak"
! grep -q '"loss"' "$work/all/metrics.jsonl" || fail "a step was taken"
"$ESPALIER" report "$work/all" > /dev/null || fail "the report"

ESPALIER_THREADS=3 "$ESPALIER" run ncm.yaml "${short[@]}" --output "$work/cut" || fail "three threads"
rm -r "$work/cut/matrix.json" "$work/cut/result.json" "$work/cut"/checkpoints/*-task[34]
"$ESPALIER" resume "$work/cut" -q || fail "resumed"
same "resumed" cut
cat > more.yaml <<'Y'
tasks:
  - {name: time, data: [{path: ../demo/data/time.train.jsonl, format: classification, limit: 80}], eval: time}
  - {name: mood, data: [{path: ../demo/data/mood.train.jsonl, format: classification, limit: 80}], eval: mood}
Y
"$ESPALIER" run ncm.yaml "${short[@]}" 'continual.order=[animal, number]' --output "$work/two" || fail "two tasks"
"$ESPALIER" run "$work/two" --append more.yaml -q || fail "tasks added"
same "added" two

stopped=no
for attempt in 1 2 3; do
  rm -rf "$work/signal"
  "$ESPALIER" run ncm.yaml -q --output "$work/signal" 2> err.txt &
  pid=$! code=0
  until ls "$work"/signal/checkpoints/*-task1 > /dev/null 2>&1; do kill -0 $pid 2> /dev/null || break; sleep 0.01; done
  kill -TERM $pid 2> /dev/null || true
  wait $pid || code=$?
  [ $code = 0 ] && continue # it was faster
  [ $code = 6 ] && grep -q 'complete checkpoint: .*task' err.txt || { cat err.txt; fail "stopped with exit code $code"; }
  stopped=yes
  "$ESPALIER" resume "$work/signal" -q || fail "resumed after a signal"
  break
done
[ $stopped = yes ] || fail "a signal does not stop it"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
if command -v mpirun > /dev/null && mpirun --oversubscribe -n 2 true > /dev/null 2>&1 && "$ESPALIER" doctor | grep -qi mpi; then
  mpirun --oversubscribe --bind-to none -n 2 "$ESPALIER" run ncm.yaml "${short[@]}" --output "$work/ranks" > log 2>&1 ||
    { cat log; fail "two ranks"; }
  cmp "$work/all/matrix.json" "$work/ranks/matrix.json" || fail "two ranks: another matrix"
fi
echo "frozen: resumed, added to, stopped and on two ranks: one matrix"
