#!/usr/bin/env bash
# before: a task that starts from the merge of the earlier ones, with adapters and with models. What it starts from is, byte
# for byte, what `merge` makes of those; a run that broke off in the middle of a merge, or was stopped directly before,
# directly behind or between merges, ends with the bytes of the undisturbed one, on three threads as on one; the plan
# covers what merging holds; a task's own `before` counts; a recipe without it has the hash that it had.
# Mutation seen caught: esp_loop_start (start.c) leaving the base of the next task as it was.
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
sed -i 's/metric: exact_match, max_new_tokens: 6/metric: perplexity/
  s/^  - {name: b, data.*/&\n  - {name: c, data: [{path: a.jsonl}], eval: a}\n  - {name: d, data: [{path: b.jsonl}], eval: b}/' recipe.yaml
common=(train.max_steps=4 train.epochs=null checkpoint.every=1000 checkpoint.keep=100 -q)
same() { # runs, all that was learned
  local task
  for task in a b c d; do
    cmp "$1/adapters/$task/adapter_model.safetensors" "$2/adapters/$task/adapter_model.safetensors" || fail "$2: adapter $task"
  done
  cmp "$1/matrix.json" "$2/matrix.json" || fail "$2: another matrix"
  for task in "$1"/starts/*; do
    cmp "$task"/*model.safetensors "$2/starts/$(basename "$task")"/*model.safetensors || fail "$2: the start of $task"
  done
}
interrupted() { # policy, step
  local name=$1 out=$work/$1
  "$ESPALIER" run recipe.yaml --output "$out" continual.policy="$name" "before=[merge_tasks: $2]" "${common[@]}" || fail "$name"
  for at in 6 7 8 9 13; do # 8: directly behind the merge of a and b
    rm -rf again
    ESPALIER_THREADS=3 "$ESPALIER" run recipe.yaml --output "$work/again" continual.policy="$name" \
      "before=[merge_tasks: $2]" "${common[@]}" --stop-after $at > log 2>&1 && fail "$name: did not stop after step $at"
    if [ $at = 7 ]; then # the merge cannot be written: what was learned is there, the checkpoint behind it is not
      mkdir -p again/starts && mv again/starts kept
      echo in the way > again/starts
      "$ESPALIER" resume again > log 2>&1 && fail "$name: merged into nowhere"
      [ -d again/adapters/b ] && [ ! -e again/checkpoints/*-task2 ] && grep -q 'starts' log || fail "$name: $(cat log)"
      rm again/starts && mv kept again/starts
      mkdir -p again/starts/.c.staged-4194303-0 # of a process that is gone
    fi
    ESPALIER_THREADS=3 "$ESPALIER" resume again -q || fail "$name: resume after step $at"
    [ -z "$(find again -name '*staged*')" ] || fail "$name: left behind: $(find again -name '*staged*')"
    same "$name" again
  done
  rm -rf again
  cp -r "$name" again # killed behind the merge, before its checkpoint
  rm -r again/checkpoints/*-task[234] again/checkpoints/*1[0-9] again/adapters/[cd] again/starts/d 2> /dev/null || true
  "$ESPALIER" resume again -q || fail "$name: resume before the merge"
  same "$name" again
  peak=$(sed -n 's/.*"memory_peak": \([0-9]*\).*/\1/p' "$name/result.json" | head -1)
  planned=$(sed -n 's/.*"planned_memory_peak": \([0-9]*\).*/\1/p' "$name/result.json")
  [ "$peak" -le $((planned + planned / 50)) ] || fail "$name: peak of $peak bytes, $planned were planned"
}
interrupted continue '{method: ties, density: 0.5}'
grep -q 'task c starts from the 2 before it, merged by ties, rank 4, relative error: mean' continue/run.log || fail "no error is told"
"$ESPALIER" merge --base model --adapter continue/adapters/a --adapter continue/adapters/b --combine ties --density 0.5 \
  --rank 4 --out by_hand -q && cmp by_hand/adapter_model.safetensors continue/starts/c/adapter_model.safetensors ||
  fail "the start of c is not what merge makes"
[ ! -e continue/starts/b ] || fail "one adapter through all tasks needs no merge of one"
interrupted new_per_task '{method: opcm, alpha: 0.6}'
ls -d new_per_task/starts/b > /dev/null || fail "the second task starts from the first"
interrupted merge_then_new '{method: magmax}'
"$ESPALIER" merge --base model --models merge_then_new/bases/a merge_then_new/bases/b merge_then_new/bases/c --method magmax \
  --out by_hand -q && cmp by_hand/model.safetensors merge_then_new/starts/d/model.safetensors ||
  fail "the start of d is not what merge makes"
"$ESPALIER" merge --base merge_then_new/starts/c --adapter merge_then_new/adapters/c --out on_top -q &&
  cmp on_top/model.safetensors merge_then_new/bases/c/model.safetensors || fail "c was not trained on its start"

# a list with a value for each; one task's own; none of its own
run() { "$ESPALIER" run recipe.yaml --output "$work/$1" "${common[@]}" "${@:2}" || fail "$1"; }
run own "tasks[3].before=[merge_tasks: {method: linear, weight: [1, 2, 3]}]"
[ "$(ls own/starts)" = d ] || fail "own: $(ls own/starts)"
run all 'before=[merge_tasks: {method: linear, weight: [1, 2, 3]}]' 'tasks[2].before=[]'
same own all
"$ESPALIER" resume all -q || fail "the resolved recipe is another"
run naive
! cmp -s own/adapters/d/adapter_model.safetensors naive/adapters/d/adapter_model.safetensors || fail "the merge changed nothing"
cmp own/adapters/c/adapter_model.safetensors naive/adapters/c/adapter_model.safetensors || fail "own: c"
# a task that is added to a finished run
sed '/name: [cd], data/d' recipe.yaml > two.yaml
printf 'name: c\ndata: [{path: a.jsonl}]\neval: a\n' > c.yaml
"$ESPALIER" run two.yaml --output "$work/two" "${common[@]}" 'before=[merge_tasks: {method: linear}]' || fail "two"
"$ESPALIER" run "$work/two" --append c.yaml -q > log 2>&1 || fail "append: $(cat log)"
"$ESPALIER" merge --base model --adapter two/adapters/a --adapter two/adapters/b --combine linear --rank 4 \
  --out by_hand -q && cmp by_hand/adapter_model.safetensors two/starts/c/adapter_model.safetensors || fail "the start of what is added"
echo "before: resumed to the same bytes in three policies"
