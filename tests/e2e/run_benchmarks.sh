#!/usr/bin/env bash
# The recipes of published orders (O-LoRA's six, TRACE's) on data in their layouts: each passes `check`, the shortest one
# trains, and data that is not there is named.
# Mutation seen caught: `find_split` (source.c) giving train.json whatever the split is.
. "$(dirname "$0")/../script.sh"
cp -r "$ESP_SOURCE_DIR/recipes" "$work/recipes"
export CL_BENCHMARK=$work/CL_Benchmark TRACE=$work/TRACE BASE_MODEL=$work/recipes/demo/base
python3 - "$CL_BENCHMARK" "$TRACE" <<'P'
import json, os, sys
olora, trace = sys.argv[1:]
groups = {"TC": ["dbpedia", "yahoo", "agnews"], "SC": ["amazon", "yelp", "IMDB", "SST-2"], "NLI": ["MNLI", "CB", "RTE"],
          "WiC": ["WiC"], "COPA": ["COPA"], "QQP": ["QQP"], "BoolQA": ["BoolQA"], "MultiRC": ["MultiRC"]}
def put(folder, splits, rows, **others):
    os.makedirs(folder)
    for i, split in enumerate(splits):
        json.dump(rows(split), open(f"{folder}/{split}.json", "w"), indent=4 * (i % 2) or None)
    for name, value in others.items():
        json.dump(value, open(f"{folder}/{name}.json", "w"))
for group, names in groups.items():
    for name in names:
        put(f"{olora}/{group}/{name}", ["train", "dev", "test"],
            lambda split: [{"label": "ab"[i % 2], "sentence": f"{name} {split} {i}"} for i in range(6 + len(split))],
            labels=["a", "b"])
for name in ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]:
    put(f"{trace}/{name}", ["train", "eval", "test"],
        lambda split: [{"prompt": f"{name} {split} {i}", "answer": f"{i}"} for i in range(6 + len(split))])
P
n=0
for recipe in "$work"/recipes/continual/{olora_order?,trace}.yaml; do
  "$ESPALIER" check "$recipe" > log 2>&1 || { cat log; fail "$(basename "$recipe")"; }
  # 11 rows in train.json, 10 in test.json
  tasks=$(grep -c '^task [^ ]*: 11 rows' log || true) sets=$(grep -c '^evaluation set [^ ]*: 10 rows' log || true)
  [ "$tasks" = "$sets" ] && [ "$tasks" -ge 4 ] || { cat log; fail "$(basename "$recipe"): $tasks tasks, $sets sets"; }
  n=$((n + 1))
done
[ $n = 7 ] || fail "$n recipes"
"$ESPALIER" run "$work/recipes/continual/olora_order1.yaml" train.gradient_accumulation_steps=1 -q --output "$work/run" \
  > log 2>&1 || { cat log; fail "order 1"; }
[ "$(ls "$work/run/adapters" | tr '\n' ' ')" = "agnews amazon dbpedia yahoo " ] || fail "the adapters of order 1"
rm -r "$CL_BENCHMARK/TC/yahoo"
code=0
"$ESPALIER" check "$work/recipes/continual/olora_order1.yaml" > log 2>&1 || code=$?
[ $code = 3 ] && grep -q "task 'yahoo': .*/TC/yahoo" log || { cat log; fail "data that is not there: exit code $code"; }
echo "benchmarks: $n recipes"
