#!/usr/bin/env bash
# Tasks added to a finished run (`run --append`): adapters, scores and what strategies remember have the bytes of a run
# that had all tasks from the start, also when the added part is stopped and resumed; what cannot be added is refused and
# leaves the run as it was.
# Mutation seen caught: `next_task` (loop.c) without handing over when tasks are added.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
cd "$work/recipes/continual"
short=(train.max_steps=5 train.micro_batch_size=4 schedule.restart=per_task checkpoint.every=1000 -q)
for i in 0 1 2 3; do short+=("eval.sets[$i].limit=8"); done
cat >more.yaml <<'Y'
tasks:
  - {name: time, data: [{path: ../demo/data/time.train.jsonl, format: classification}], eval: time}
  - {name: mood, data: [{path: ../demo/data/mood.train.jsonl, format: classification}], eval: mood}
Y
for recipe in ewc replay bank stack; do
  "$ESPALIER" run $recipe.yaml "${short[@]}" --output "$work/all" --overwrite || fail "$recipe"
  "$ESPALIER" run $recipe.yaml "${short[@]}" 'continual.order=[animal, number]' --output "$work/two" --overwrite || fail "$recipe, two tasks"
  code=0
  "$ESPALIER" run "$work/two" --append more.yaml -q --stop-after 13 2> err.txt || code=$?
  [ $code = 6 ] || { cat err.txt; fail "$recipe: stopped in the added part with exit code $code"; }
  "$ESPALIER" resume "$work/two" -q || fail "$recipe: resumed"
  for task in animal number time mood; do
    cmp "$work/all/adapters/$task/adapter_model.safetensors" "$work/two/adapters/$task/adapter_model.safetensors" ||
      fail "$recipe: adapter $task"
  done
  cmp "$work/all/matrix.json" "$work/two/matrix.json" || fail "$recipe: another matrix"
done
refused() { # words, file
  local before code=0
  before=$(find "$work/two" -type f ! -name run.log -print0 | sort -z | xargs -0 cksum)
  "$ESPALIER" run "$work/two" --append "$2" -q > out.txt 2> err.txt || code=$?
  [ $code = 2 ] || { cat err.txt; fail "$2: exit code $code"; }
  grep -q -- "$1" err.txt || { cat err.txt; fail "$2: says nothing of '$1'"; }
  [ "$before" = "$(find "$work/two" -type f ! -name run.log -print0 | sort -z | xargs -0 cksum)" ] || fail "$2 was refused and changed the run"
}
printf 'tasks:\n  - {nam: x, data: [{path: y}]}\n' > misspelled.yaml
refused "misspelled.yaml:2:5: a task needs a name" misspelled.yaml
printf 'optim: {lr: 1}\ntasks: []\n' > other.yaml
refused "other.yaml:1:1: optim: only tasks and eval.sets can be added" other.yaml
refused "stands twice\|already\|another task" more.yaml
"$ESPALIER" run naive.yaml "${short[@]}" 'continual.order=[animal, number]' --output "$work/two" --overwrite --stop-after 7 2> /dev/null || true
refused "has not finished its 2 tasks" more.yaml
"$ESPALIER" run naive.yaml "${short[@]}" adapter.type=o-lora 'continual.order=[animal, number]' --output "$work/two" --overwrite || fail "o-lora"
refused "has no room for" more.yaml
echo "added tasks: as if they had been there"
