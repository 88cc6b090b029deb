#!/usr/bin/env bash
# Learning rates of sequences through the program. The infinite schedule runs on over tasks: every rate in metrics.jsonl
# is that of its formula. With `branch` the decay at a task's end is measured and undone: the next task has the bytes it
# has after another decay from the same step, also when the run is stopped within the decay and resumed.
# Mutation seen caught: `deploy` (branch.c) leaving the optimizer's step count where the decay brought it.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
cd "$work/recipes/continual"
run() { # NAME ARGUMENTS...
  local out=$work/$1
  shift
  "$ESPALIER" run branch.yaml train.micro_batch_size=4 train.max_steps=8 'continual.order=[animal, number]' after=[] \
    eval.sets=[] 'tasks[animal].eval=[]' 'tasks[number].eval=[]' 'tasks[time].eval=[]' 'tasks[mood].eval=[]' \
    checkpoint.every=1000 "$@" -q --output "$out" > log 2>&1
}
phases=(schedule.warmup=2 schedule.cooldown=4 schedule.constant_ratio=0.4 schedule.min_lr_ratio=0.1 optim.lr=1e-3)

run rates "${phases[@]}" schedule.anneal=3 || { cat log; fail "the infinite schedule"; }
python3 - "$work/rates/metrics.jsonl" <<'P' || fail "learning rates"
import json, math, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
steps = [s for s in steps if "lr" in s]
assert len(steps) == 16, len(steps)
for i, s in enumerate(steps):
    body = i - i % 8 + min(i % 8, 5)  # where the decay of this task began
    f = (body + 1) / 2 if body < 2 else 0.4 + 0.3 * (1 + math.cos(math.pi * (body - 2) / 4)) if body < 6 else 0.4
    if i % 8 > 5:
        f *= (0.1 / f) ** ((i % 8 - 5) / 3)
    assert abs(s["lr"] - 1e-3 * f) < 1e-9, (i, s["lr"], 1e-3 * f)
P

per_task=("${phases[@]}" schedule.restart=per_task)
run long "${per_task[@]}" 'tasks[animal].train.max_steps=10' 'tasks[animal].schedule.anneal=4' || { cat log; fail "long decay"; }
run short "${per_task[@]}" 'tasks[animal].train.max_steps=7' 'tasks[animal].schedule.anneal=1' || { cat log; fail "short decay"; }
code=0
run cut "${per_task[@]}" 'tasks[animal].train.max_steps=10' 'tasks[animal].schedule.anneal=4' --stop-after 8 || code=$?
[ $code = 6 ] || { cat log; fail "to be stopped: exit code $code"; }
"$ESPALIER" resume "$work/cut" -q > log 2>&1 || { cat log; fail "resume within the decay"; }
adapter=adapter_model.safetensors
cmp "$work/long/adapters/number/$adapter" "$work/short/adapters/number/$adapter" || fail "a decay was not undone"
! cmp -s "$work/long/adapters/animal/$adapter" "$work/short/adapters/animal/$adapter" || fail "what was saved did not decay"
for task in animal number; do
  cmp "$work/long/adapters/$task/$adapter" "$work/cut/adapters/$task/$adapter" || fail "$task: resumed to other bytes"
done
echo "schedule: 16 rates, and a decay that leaves nothing behind"
