#!/bin/bash
# Every verb once on the tiny model: what it prints, where it prints it, what it leaves. ESPALIER and MAKE_TINY
# are in the environment.
# Mutation seen to be caught: `data` that shows weights[i + 1] for token i fails "loss mask".
set -u
espalier=${ESPALIER:?the program}
tiny=${MAKE_TINY:?writes the tiny model}
export LC_ALL=C
unset ESPALIER_ISA ESPALIER_THREADS
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
"$tiny" . || exit 1
cat >r.yaml <<'Y'
name: verbs
model: {base_model: model, dtype: fp32}
adapter: {r: 4}
data: {sequence_len: 64}
optim: {lr: 1e-2}
train: {max_steps: 6, micro_batch_size: 2}
eval:
  sets:
    - {name: a, path: a.test.jsonl, metric: perplexity}
    - {name: b, path: b.test.jsonl, metric: exact_match, max_new_tokens: 6}
tasks:
  - {name: a, data: [{path: a.jsonl}], eval: a}
  - {name: b, data: [{path: b.jsonl}], eval: b}
checkpoint: {output_dir: out, every: 4}
after: [merge: {verify: 4}, report: ]
Y
failed=0
try() { # NAME CODE ARGUMENTS...: stdout in o, stderr in e
  name=$1
  local code=$2 got
  shift 2
  timeout 100 "$espalier" "$@" >o 2>e </dev/null
  got=$?
  [ $got = "$code" ] || { echo "FAILED $name: exit code $got instead of $code"; head -3 e; failed=$((failed + 1)); }
}
says() { # FILE PATTERN
  grep -Eq -- "$2" "$1" || { echo "FAILED $name: $1 does not say: $2"; head -5 "$1"; failed=$((failed + 1)); }
}
holds() {
  for f; do [ -e "$f" ] || { echo "FAILED $name: no $f"; failed=$((failed + 1)); }; done
}
json() { # every line of o is an object
  python3 -c 'import json,sys; [json.loads(l) for l in open("o")]' || { echo "FAILED $name: not JSON"; failed=$((failed + 1)); }
}

try version 0 --version; says o '^espalier [0-9.]+$'
try help 0 help; says o '^  resume '
try "help of a verb" 0 help merge; says o '--adapter DIR'
try "help option" 0 merge --help; says o '--adapter DIR'
try init 0 init model -o made.yaml; holds made.yaml
try "schema as JSON" 0 schema --format json; json
try doctor 0 doctor --json; says o '"instructions_used"'
try check 0 check r.yaml; says o '^task a: 60 rows'; says o '^r.yaml: ok$'
try plan 0 plan r.yaml; says o ' of .*: fits$'; says o '^all  .* 12 '
try "plan as JSON" 0 plan r.yaml --json; json; says o '"steps": 12'
try "dry run" 0 run r.yaml --dry-run; says o '^all  .* 12 '
try "resolved recipe" 0 plan r.yaml --resolved optim.lr=3e-3; says o '^  lr: 0.003 # override optim.lr=3e-3$'; says o '^  r: 4 # line 3$'
try "loss mask" 0 data r.yaml --show 1 --task a; says o '^item 0 is \[red<\|end\|>\]$'
try "loss mask in colour" 0 data r.yaml --show 1 --task a --color always; says o $'\033\[0;32m.*d'
try "data as JSON" 0 data r.yaml --show 2 --json; json
[ -e out ] && { echo "FAILED: something wrote the run's folder before the run"; failed=1; }
try "overrides in three spellings" 0 plan r.yaml --resolved adapter.r=5 --optim.lr 1e-3 --set seed=9
says o '^  r: 5 # override'; says o '^  lr: 0.001 # override'; says o '^seed: 9 # override'

try "stopped run" 6 run r.yaml --stop-after 5; says e 'continue with: espalier resume out'; holds out/checkpoints
try resume 0 resume out; says o '^step 6/12 '; says o '^ACC '; holds out/adapters/b/adapter_model.safetensors out/merged/model.safetensors out/report.html
grep -q '^step 5/12' o && { echo "FAILED resume: a step was done twice"; failed=1; }
grep -q $'\r' o e && { echo "FAILED resume: a bar without a terminal"; failed=1; }
try "run as JSON" 0 run r.yaml --output out2 --json; json; says o '"event": "step".*"loss": '; says o '"event": "result", "status": 0, "steps": 12'
cmp -s out/adapters/b/adapter_model.safetensors out2/adapters/b/adapter_model.safetensors ||
  { echo "FAILED: the resumed adapter differs from the undisturbed one"; failed=1; }
try "quiet run" 0 run r.yaml --output out2 --overwrite -q
[ -s o ] || [ -s e ] && { echo "FAILED quiet run: it is not"; failed=1; }
try "alias" 0 train r.yaml --output out3 -q train.max_steps=1
try matrix 0 matrix out; says o '^ACC '; says o 'BWT = '
try "matrix as JSON" 0 matrix out --json
try report 0 report out --out page.html; says page.html '<svg'
try "report as text" 0 report out --text; says o '^ACC '; says o '^loss '; says o '^adapter '
try "report of two" 0 report out out2; says report.html 'Forgetting against memory'
try "report of two as text" 0 report out out2 --text; says o '^out2 +1 '
try inspect 0 inspect out/adapters/a; says o '^kind +adapter'
try eval 0 eval r.yaml -a out/adapters/b; says o '^a +perplexity '; says o '^b +exact_match '
try "eval of the base" 0 eval r.yaml --json; json
try generate 0 generate -m model -a out/adapters/b -p 'item 1 is ' -p 'item 2 is ' -n 8 --json; json; [ "$(wc -l <o)" = 2 ] || failed=1
try merge 0 merge -b model -a out/adapters/b:0.5 -o merged --verify 4; says o 'tensors, [1-9][0-9]* changed'; says o 'verified'
try export 0 export -b model -a out/adapters/b -o exported --as lora; holds exported/adapter_config.json
try extract 0 extract -b model -t merged -o extracted -r 4; holds extracted/adapter_model.safetensors
try "method over models" 0 merge -b model --models merged out/adapters/a --method ties --density 0.5 --weight 0.6,0.4 -o tied; says o '^ties of 2 inputs'; holds tied/model.safetensors tied/tokenizer.json
try "method over adapters" 0 merge -b model -a out/adapters/a -a out/adapters/b --combine opcm -o joined --json; json; holds joined/adapter_model.safetensors
try "difference in one bit" 0 extract -b model -t merged --as 1bit -o bits; says o "of the model's bytes"; holds bits/residual.safetensors
try "difference in low rank" 0 extract -b model -t merged --as lowrank --energy 0.99 --bits 8 -o ranks --json; json
try "models from differences" 0 merge -b model --models bits ranks merged --method magmax -o back; holds back/model.safetensors
for s in INT TERM USR1; do
  rm -f o e
  "$espalier" run r.yaml --output sig$s train.max_steps=100000 >o 2>e &
  pid=$!
  for i in $(seq 900); do grep -q '^step 3/' o && break; sleep 0.1; done
  kill -$s $pid
  wait $pid
  code=$?
  name="signal $s"
  [ $code = 6 ] || { echo "FAILED $name: exit code $code"; failed=$((failed + 1)); }
  says e 'complete checkpoint'
done
[ "$failed" = 0 ] && echo "all verbs answer"
[ "$failed" = 0 ]
