#!/bin/bash
# The table of bad input: each case is one thing that is wrong. It must give exactly one line that names the place, the
# right exit code, and leave every file as it was. Arguments: numbers of cases, none for all. ESPALIER and MAKE_TINY
# are in the environment.
# Mutation seen to be caught: without the check for non-finite weights in the loader, "NaN in the weights" fails.
set -u
espalier=${ESPALIER:?the program}
tiny=${MAKE_TINY:?writes the tiny model}
only=" $* "
export LC_ALL=C OMP_NUM_THREADS=1
unset ESPALIER_ISA ESPALIER_THREADS
top=$(mktemp -d)
trap 'rm -rf "$top"' EXIT
good=$top/good
mkdir "$good" && cd "$good" || exit 1
"$tiny" . || exit 1
cat >r.yaml <<'Y'
model: {base_model: model, dtype: fp32}
adapter: {type: lora, r: 4, target: [q_proj, v_proj]}
data: {sequence_len: 64}
train: {max_steps: 2, micro_batch_size: 2}
eval:
  sets:
    - {name: a, path: a.test.jsonl, metric: perplexity}
tasks:
  - name: a
    data: [{path: a.jsonl}]
    eval: a
checkpoint: {output_dir: out}
Y
"$espalier" run r.yaml -q --output run >log 2>&1 || { echo "the good recipe fails:"; cat log; exit 1; }
rm -f log
mkdir empty

n=0 failed=0
complain() { # what; stderr of the case is in $top/err
  failed=$((failed + 1))
  echo "FAILED $n. $name: $1"
  sed 's/^/    | /' "$top/err" | head -5
}
inventory() {
  find . \( -path ./out -o -path ./mpi \) -prune -o -print | sort
  find . -path ./out -prune -o -type f -print0 | sort -z | xargs -0 cksum
}

# bad NAME CODE PATTERN PREPARATION ARGUMENTS...: PATTERN is an extended regular expression for the one line on stderr.
bad() {
  name=$1
  local code=$2 pattern=$3 preparation=$4 got sink=$top/outp limit=unlimited
  shift 4
  n=$((n + 1))
  [ "$only" = "  " ] || [[ $only == *" $n "* ]] || return 0
  rm -rf "$top/case"
  cp -r "$good" "$top/case"
  cd "$top/case" || exit 1
  eval "$preparation"
  inventory >"$top/before"
  (trap '' XFSZ && ulimit -f "$limit" && exec timeout 100 "$espalier" "$@" >"$sink" 2>"$top/err" </dev/null)
  got=$?
  [ $got = "$code" ] || complain "exit code $got instead of $code"
  [ "$(wc -l <"$top/err")" = "${lines:-1}" ] || complain "$(wc -l <"$top/err") lines instead of ${lines:-1}"
  grep -Eq -- "$pattern" "$top/err" || complain "the message does not match: $pattern"
  inventory >"$top/after"
  cmp -s "$top/before" "$top/after" || complain "files changed: $(diff "$top/before" "$top/after" | grep '^[<>]' | head -3 | tr '\n' ' ')"
  if [ -z "${started:-}" ] && [ -e out ]; then complain "left $(find out | head -3 | tr '\n' ' ')"; fi
  if find . -name '*.tmp*' -o -name '*.stage*' | grep -q .; then complain "left temporary files"; fi
  return 0
}
patch() { # FILE OFFSET BYTES: overwrites in place
  printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}
edit() { sed -i "$1" "$2"; }
line() { echo "$1" >>r.yaml; }
replace() { printf '%s\n' "$2" >"$1"; }
size() { stat -c %s "$1"; }
shorter() { # a base of one layer, without weights
  edit 's/"num_hidden_layers": 2/"num_hidden_layers": 1/' model/config.json
  rm model/model.safetensors
}
st=model/model.safetensors
ad=run/adapters/a
no=:

# ---- the command line ----
bad "unknown verb" 2 "unknown verb 'runn' \(did you mean 'run'\?\)" $no runn r.yaml
bad "no recipe" 2 "^espalier run: RECIPE .* is missing" $no run
bad "two recipes" 2 "unexpected argument 'q.yaml'" $no run r.yaml q.yaml
bad "unknown option" 2 "unknown option '--overwritt' \(did you mean '--overwrite'\?\)" $no run r.yaml --overwritt
bad "option without value" 2 "takes a value" $no run r.yaml --stop-after
bad "flag with value" 2 "--overwrite takes no value" $no run r.yaml --overwrite=yes
bad "option not a number" 2 "--stop-after: expected an integer from 1 .* got 'soon'" $no run r.yaml --stop-after soon
bad "threads out of range" 2 "--threads: expected an integer from 1 to 4096, got '0'" $no run r.yaml -t 0
bad "required option missing" 2 "^espalier merge: --base DIR is missing" $no merge -a $ad -o out
bad "merge to an unknown type" 2 "--dtype: 'fp8' is not one of bf16, fp16, fp32" $no merge -b model -a $ad -o out --dtype fp8
bad "export as an unknown kind" 2 "--as: 'dora' is not lora" $no export -b model -a $ad -o out --as dora
bad "export for an unknown program" 2 "--for: 'ollama' is not vllm" $no export -b model -a $ad -o out --for ollama
bad "combination that is none" 2 "'tie' is no method \(did you mean 'ties'\?\)" $no merge -b model -a $ad -o out --combine tie
bad "density without combination" 2 "--density is for --method and --combine" $no merge -b model -a $ad -o out --density 0.5
bad "combination without density" 2 "dare_ties needs a density" $no merge -b model -a $ad -o out --combine dare_ties
bad "density that is not used" 2 "merge: cat takes no density" $no merge -b model -a $ad -o out --combine cat --density 0.5
bad "density out of range" 2 "--density: expected a number from 0 to 1" $no merge -b model -a $ad -o out --combine ties --density 2
bad "majority sign that is none" 2 "majority sign 'most' is none of total, frequency" $no merge -b model -a $ad -o out --combine ties --density 0.5 --majority-sign most
bad "majority sign without election" 2 "merge: magnitude_prune takes no majority sign" $no merge -b model -a $ad -o out --combine magnitude_prune --density 0.5 --majority-sign frequency
two="-b model --models model $ad --method"
bad "method that is none" 2 "'ties_' is no method \(did you mean 'ties'\?\)" $no merge $two ties_ -o out
bad "method without a model" 2 "--models DIR... is missing" $no merge -b model --method ties -o out
bad "method and combination" 2 "--method makes a model and --combine an adapter" $no merge $two ties --combine ties -o out
bad "models without a method" 2 "--models is for --method" $no merge -b model --models model -o out
bad "models in an order that is not clear" 2 "the order is not clear" $no merge -b model --models model $ad --models $ad --method opcm -o out
bad "one model for a sequence" 2 "opcm takes at least 2 inputs, not 1" $no merge -b model --models $ad --method opcm -o out
bad "three models for a slerp" 2 "slerp takes 2 inputs, not 3" $no merge $two slerp $ad --t 0.5 -o out
bad "method without density" 2 "ties needs a density above 0" $no merge $two ties -o out
bad "density 0" 2 "ties needs a density above 0" $no merge $two ties --density 0 -o out
bad "density above 1 for a method" 2 "--density: expected a number from 0 to 1, got '1.5'" $no merge $two ties --density 0.5,1.5 -o out
bad "three densities for two" 2 "3 densities for 2 inputs" $no merge $two ties --density 0.5,0.5,0.5 -o out
bad "three weights for two" 2 "3 weights for 2 inputs" $no merge $two linear --weight 1,2,3 -o out
bad "weights that cancel" 2 "add up to 0 and cannot be normalised" $no merge $two linear --weight 1,-1 -o out
bad "option that a method does not read" 2 "magmax takes no density" $no merge $two magmax --density 0.5 -o out
bad "metrics that are too few" 2 "a metric for each input: 1 for 2" $no merge $two mwa --metrics 0.5 -o out
bad "layers that do not scale" 2 "--lines: expected alpha, or alpha and beta" $no merge $two lines --lines 1,2,3 -o out
bad "verification of a method" 2 "a method has none" $no merge $two linear --verify 2 -o out
bad "input of no kind" 3 "^run: holds neither a model nor an adapter" $no merge -b model --models model run --method linear -o out
bad "model of another family" 3 "^other: is a qwen2 model, the base model a llama model" "cp -r model other; edit 's/\"llama\"/\"qwen2\"/' other/config.json" merge -b model --models other $ad --method linear -o out
bad "model of another shape" 3 "^other: tensor 'model.embed_tokens.weight' is \[48, 257\], in the base model it is \[257, 48\]" "cp -r model other; edit 's/\[257,48\]/[48,257]/' other/model.safetensors" merge -b model --models other $ad --method linear -o out
bad "method over a base without weights" 3 "^model: has no weights" "cp -r model other; rm model/model.safetensors" merge -b model --models other other --method linear -o out
bad "method onto a full disk" 3 "out.*" "limit=8" merge $two linear -o out
bad "stored form that is none" 2 "'2bit' is none of lora, lowrank, 1bit" $no extract -b model -t model -o out --as 2bit
bad "stored form with a rank" 2 "--rank is for --as lora" $no extract -b model -t model -o out --as 1bit -r 4
bad "stored difference of nothing" 3 "^model: does not differ from the base" $no extract -b model -t model -o out --as 1bit
bad "energy 0" 2 "--energy: expected a number above 0" $no extract -b model -t $ad -o out --as lowrank --energy 0
bad "stored difference of another base" 3 "residual.json: made on another base" "\"\$espalier\" extract -q -b model -t $ad -o kept --as 1bit; edit 's/32000/32001/;s/\"[0-9a-f]\{32\}\"/\"00\"/' kept/residual.json" merge -b model --models kept --method linear -o out
bad "verification of an adapter" 2 "dtype and verify are for a model" $no merge -b model -a $ad -o out --combine cat --verify 2
tune='"$espalier" run r.yaml -q --output in --set'
bad "vllm export of a module in full" 2 "^in/adapters/a: module 'model.norm' is trained in full .* use merge" "$tune 'adapter.modules_to_save=[model.norm]' >log 2>&1" export -b model -a in/adapters/a -o out --for vllm
bad "export of a kind without low-rank form" 2 "type mora has no exact low-rank form on .*; give a rank" "$tune adapter.type=mora --set adapter.mora_type=rotation >log 2>&1" export -b model -a in/adapters/a -o out --as lora
bad "adapter with modules in full, per prompt" 2 "adapter 'default' \(lora\) trains model.norm in full: it cannot be chosen per row" "$tune 'adapter.modules_to_save=[model.norm]' >log 2>&1" generate -m model -a in/adapters/a -p x -u 1
bad "merge of two multiplicative adapters" 2 "adapters 'merge0' \(oft\) and 'merge1' \(oft\) cannot both be active on" "$tune adapter.type=oft --set adapter.oft_block_size=4 >log 2>&1" merge -b model -a in/adapters/a -a in/adapters/a -o out
bad "sum of factors of a kind that has none" 2 "type oft has no low-rank factors on" "$tune adapter.type=oft --set adapter.oft_block_size=4 >log 2>&1" merge -b model -a in/adapters/a -o out --combine linear
prompt="$tune adapter.type=prompt --set adapter.virtual_tokens=4 >log 2>&1"
bad "merge of a prompt" 2 "^in/adapters/a: an adapter of type prompt cannot be merged" "$prompt" merge -b model -a in/adapters/a -o out
bad "combination with a prompt" 2 "prompt" "$prompt" merge -b model -a in/adapters/a -a $ad -o out --combine cat
bad "export of a prompt" 2 "in/adapters/a: an adapter of type prompt has no matrix form" "$prompt" export -b model -a in/adapters/a -o out --as lora
bad "dora with prompt" 2 "adapters '.*' \(dora\) and '.*' \(prompt\) cannot both be active" "$prompt; mv in p; $tune adapter.type=dora >log 2>&1" generate -m model -a in/adapters/a -a p/adapters/a -p x
bad "prompt with prompt" 2 "adapters '.*' \(prompt\) and '.*' \(prompt\) cannot both be active" "$prompt" generate -m model -a in/adapters/a -a in/adapters/a -p x
bad "merge of a prefix" 2 "^in/adapters/a: an adapter of type prefix cannot be merged" "$tune adapter.type=prefix >log 2>&1" merge -b model -a in/adapters/a -o out
bad "prefix with prompt" 2 "adapters '.*' \(prefix\) and '.*' \(prompt\) cannot both be active" "$prompt; mv in p; $tune adapter.type=prefix >log 2>&1" generate -m model -a in/adapters/a -a p/adapters/a -p x
bad "a prompt for an encoder" 3 "^in/adapters/a/adapter_config.json: key 'num_transformer_submodules' is 2" "$prompt; edit 's/\(submodules\": \)1/\12/' in/adapters/a/adapter_config.json" generate -m model -a in/adapters/a -p x
bad "extract with rank 0" 2 "--rank: expected an integer from 1" $no extract -b model -t model -o out -r 0
bad "unknown colour mode" 2 "--color: 'blue' is not one of" $no data r.yaml --color blue
bad "adapter that a prompt cannot use" 2 "--use: '2' is none of the adapters 1 to 1, or 0 for the base" $no generate -m model -a $ad -p x -u 2
bad "adapters for other prompts" 2 "--use: 2 for 1 prompts" $no generate -m model -a $ad -p x -u 1 -u 0
bad "weight of an adapter" 2 "--adapter: '1e9' is not a weight" $no generate -m model -a $ad:1e9 -p x
bad "sampling without temperature" 2 "need --temperature" $no generate -m model -p x --top-k 5
bad "unknown schema format" 2 "format 'xml' is not one of text, json, markdown" $no schema --format xml
bad "init onto a file" 2 "r.yaml: File exists" $no init model -o r.yaml
bad "output to a full device" 1 "^espalier: cannot write the output" "sink=/dev/full" schema

# ---- the recipe ----
bad "recipe missing" 2 "^nothere.yaml: .*No such file" $no run nothere.yaml
bad "recipe is a folder" 2 "^empty: .*" $no check empty
bad "empty recipe" 2 "^e.yaml:1:1: missing key 'model.base_model'" ": >e.yaml; lines=2" check e.yaml
lines=1
bad "not YAML" 2 "^r.yaml:[0-9]+:[0-9]+: YAML syntax: " "line 'x: ['" check r.yaml
bad "a tab" 2 "^r.yaml:14:1: YAML syntax: found character that cannot start any token" "printf 'log:\n\tevery: 1\n' >>r.yaml" check r.yaml
bad "not text" 2 "^r.yaml:1:1: not readable as text" "head -c 300 /dev/zero | tr '\\0' '\\377' >r.yaml" check r.yaml
bad "misspelled key" 2 "^r.yaml:2:23: unknown key 'lora_rnak' in adapter \(did you mean 'rank'\?\)" "edit 's/r: 4/lora_rnak: 4/' r.yaml" run r.yaml
bad "misspelled section" 2 "^r.yaml:13:1: unknown key 'chekpoint' in the recipe" "line 'chekpoint: {}'" run r.yaml
bad "key of another section" 2 "^r.yaml:13:7: unknown key 'lr' in log \(did you mean 'optim.lr'\?\)" "line 'log: {lr: 1}'" run r.yaml
bad "key the engine does not have" 2 "^r.yaml:13:12: unknown key 'shard' in parallel" "line 'parallel: {shard: 3}'" run r.yaml
bad "wrong type" 2 "^r.yaml:2:26: adapter.r: expected an integer, got 'four'" "edit 's/r: 4/r: four/' r.yaml" run r.yaml
bad "number in quotes" 2 "^r.yaml:2:26: adapter.r: expected an integer, got '4' in quotes" "edit 's/r: 4/r: \"4\"/' r.yaml" run r.yaml
bad "out of range" 2 "^r.yaml:13:13: optim.lr: -1 is out of range" "line 'optim: {lr: -1}'" run r.yaml
bad "unknown optimizer" 2 "^r.yaml:13:15: optim.name: 'adamv' is not one of .* \(did you mean 'adamw'\?\)" "line 'optim: {name: adamv}'" run r.yaml
bad "unknown adapter kind" 2 "^r.yaml:2:17: adapter.type: 'lor' is not one of" "edit 's/type: lora/type: lor/' r.yaml" run r.yaml
bad "duplicate key" 2 "^r.yaml:2:29: duplicate key 'r' \(first at line 2\)" "edit 's/r: 4/r: 4, r: 8/' r.yaml" run r.yaml
bad "the same key in two spellings" 2 "adapter.lora_r says again what 'r' says at line 2" "edit 's/r: 4/r: 4, lora_r: 8/' r.yaml" run r.yaml
bad "missing key" 2 "^r.yaml:1:8: missing key 'model.base_model'" "edit 's/base_model: model, //' r.yaml" run r.yaml
bad "no task" 2 "tasks: the list is empty" "edit '/^tasks/,\$d' r.yaml; line 'tasks: []'" run r.yaml
bad "unknown evaluation set" 2 "^r.yaml:11:11: tasks\[0\].eval: no evaluation set is named 'b' in eval.sets" "edit 's/eval: a/eval: b/' r.yaml" run r.yaml
bad "unknown metric" 2 "^r.yaml:7:45: eval.sets\[0\].metric: 'perplex' is not one of" "edit 's/perplexity/perplex/' r.yaml" run r.yaml
bad "bad regular expression" 2 "^r.yaml:2:[0-9]+: adapter.target: .* is not a regular expression" "edit 's/\[q_proj, v_proj\]/\"regex:(q\"/' r.yaml" run r.yaml
bad "epochs and steps" 2 "train.epochs is given as well" "edit 's/max_steps: 2/max_steps: 2, epochs: 1/' r.yaml" run r.yaml
bad "unknown chat template" 2 "data.chat_template: 'llama3' is not one of auto, builtin:chatml" "edit 's/sequence_len: 64/chat_template: llama3/' r.yaml" run r.yaml
bad "unknown anchor" 2 "unknown anchor '\*x'" "line 'log: *x'" run r.yaml
bad "a second document" 2 "^r.yaml:13:1: a second YAML document" "line '---'; line 'a: 1'" run r.yaml
bad "override of an unknown key" 2 "^override 'optim.lrr=1': unknown key 'lrr' in optim \(did you mean 'lr'\?\)" $no run r.yaml optim.lrr=1
bad "override of a task that is not there" 2 "'tasks' has 1 entries, there is no \[3\]" $no run r.yaml 'tasks[3].name=x'
bad "override without a value" 2 "^override 'optim.lr': expected key=value" $no run r.yaml --set optim.lr
lines=3
bad "three errors at once" 2 "^r.yaml:13:14: log.every: expected an integer" "edit 's/r: 4/r: 0/; s/dtype: fp32/dtype: fp33/' r.yaml; line 'log: {every: x}'" run r.yaml
lines=1

# ---- the model ----
bad "model missing" 3 "^nomodel.*: " "edit 's/base_model: model/base_model: nomodel/' r.yaml" run r.yaml
bad "config.json missing" 3 "model/config.json: " "rm model/config.json" run r.yaml
bad "config.json not JSON" 3 "model/config.json:[0-9]+" "replace model/config.json '{\"a\": '" run r.yaml
bad "unknown architecture" 3 "model/config.json.*'?mamba" "edit 's/\"llama\"/\"mamba\"/; s/LlamaForCausalLM/MambaForCausalLM/' model/config.json" run r.yaml
bad "unknown activation" 3 "model/config.json.*hidden_act.*snake" "edit 's/silu/snake/' model/config.json" run r.yaml
bad "unknown rope scaling" 3 "model/config.json.*rope" "edit 's/\"hidden_act\"/\"rope_scaling\": {\"rope_type\": \"spiral\", \"factor\": 2.0}, \"hidden_act\"/' model/config.json" run r.yaml
bad "heads do not divide" 3 "model/config.json.*num_key_value_heads" "edit 's/\"num_key_value_heads\": 2/\"num_key_value_heads\": 3/' model/config.json" run r.yaml
bad "width is not a number" 3 "model/config.json.*hidden_size" "edit 's/\"hidden_size\": 48/\"hidden_size\": \"wide\"/' model/config.json" run r.yaml
bad "shape mismatch" 3 "model/model.safetensors.*(mlp|shape)" "edit 's/\"intermediate_size\": 96/\"intermediate_size\": 80/' model/config.json" run r.yaml
bad "more layers than the file has" 3 "model.*layers.2" "edit 's/\"num_hidden_layers\": 2/\"num_hidden_layers\": 3/' model/config.json" run r.yaml
bad "weights missing" 3 "model.*safetensors" "rm $st" run r.yaml
bad "weights truncated" 3 "model/model.safetensors.*" "truncate -s -100 $st" run r.yaml
bad "weights empty" 3 "model/model.safetensors.*" ": >$st" run r.yaml
bad "header longer than the file" 3 "model/model.safetensors.*header" "patch $st 0 '\377\377\377\377\000\000\000\000'" run r.yaml
bad "header is not JSON" 3 "model/model.safetensors.*" "patch $st 8 '!!'" run r.yaml
bad "unknown element type" 3 "model/model.safetensors.*BX16" "LC_ALL=C sed -i '0,/BF16/s/BF16/BX16/' $st" run r.yaml
bad "tensor with another name" 3 "model/model.safetensors.*|mlp.up_proj" "LC_ALL=C sed -i 's/layers.0.mlp.up_proj/layers.0.mlp.up_prof/' $st" run r.yaml
bad "NaN in the weights" 3 "model/model.safetensors.*(finite|NaN)" "patch $st \$((\$(size $st) - 2)) '\377\177'" run r.yaml
bad "tokenizer missing" 3 "model/tokenizer.json: " "rm model/tokenizer.json" run r.yaml
bad "tokenizer not JSON" 3 "model/tokenizer.json:[0-9]+" "replace model/tokenizer.json '[1, 2'" run r.yaml
bad "tokenizer of an unknown kind" 3 "model/tokenizer.json.*Unigram" "edit 's/\"type\":\"BPE\"/\"type\":\"Unigram\"/' model/tokenizer.json" run r.yaml
bad "unknown pre-tokenizer" 3 "model/tokenizer.json.*Sentencey" "edit 's/\"pre_tokenizer\":{\"type\":\"ByteLevel\"/\"pre_tokenizer\":{\"type\":\"Sentencey\"/' model/tokenizer.json" run r.yaml
bad "token ids beyond the model's vocabulary" 3 "vocab" "edit 's/\"vocab_size\": 257/\"vocab_size\": 200/' model/config.json; rm $st" run r.yaml model.random_init=true adapter.type=full

# ---- the data ----
bad "data missing" 3 "nodata.jsonl: " "edit 's/path: a.jsonl/path: nodata.jsonl/' r.yaml" run r.yaml
bad "data is a folder" 3 "empty: this folder holds no train.json" "edit 's/path: a.jsonl/path: empty/' r.yaml" run r.yaml
bad "data empty" 3 "a.jsonl: the dataset is empty" ": >a.jsonl" run r.yaml
bad "row not JSON" 3 "a.jsonl:2" "edit '2s/.*/{\"prompt\": /' a.jsonl" run r.yaml
bad "row not an object" 3 "a.jsonl:3" "edit '3s/.*/[1, 2]/' a.jsonl" run r.yaml
bad "row without its field" 3 "a.jsonl:4.*completion" "edit '4s/completion/complete/' a.jsonl" run r.yaml
bad "field of the wrong type" 3 "a.jsonl:5.*completion" "edit '5s/.*/{\"prompt\": \"a\", \"completion\": 7}/' a.jsonl" run r.yaml
bad "row with no trained token" 3 "a.jsonl:6" "edit '6s/.*/{\"prompt\": \"a\", \"completion\": \"\"}/' a.jsonl" run r.yaml data.train_on_eos=none
bad "rows of an unknown shape" 3 "a.jsonl:1" "edit 's/prompt/frage/; s/completion/antwort/' a.jsonl" run r.yaml
bad "label that is not allowed" 3 " c.jsonl:2: .*green" "printf '{\"text\": \"a\", \"label\": \"red\"}\n{\"text\": \"b\", \"label\": \"green\"}\n' >c.jsonl; edit 's/{path: a.jsonl}/{path: c.jsonl, format: classification, labels: [red, blue]}/' r.yaml" run r.yaml
bad "every sample too long" 3 "a.jsonl.*" $no run r.yaml data.sequence_len=4
bad "overlong is an error" 3 "a.jsonl:1" $no run r.yaml data.sequence_len=4 data.overlong=error
bad "messages without a template" 3 "m.jsonl|chat_template" "printf '{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n' >m.jsonl; edit 's/path: a.jsonl/path: m.jsonl/' r.yaml" run r.yaml
bad "unknown role" 3 "m.jsonl:1.*robot" "printf '{\"messages\": [{\"role\": \"robot\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n' >m.jsonl; edit 's/path: a.jsonl/path: m.jsonl/' r.yaml" run r.yaml data.chat_template=builtin:alpaca
bad "evaluation data missing" 3 "a.test.jsonl: " "rm a.test.jsonl" run r.yaml
bad "unknown task" 2 "no task 'z'" $no data r.yaml --task z

# ---- adapters ----
bad "target matches nothing" 2 "target.*(nothing|no module|qq_proj)" "edit 's/q_proj, v_proj/qq_proj/' r.yaml" run r.yaml
bad "everything excluded" 2 "(target|exclude)" "edit 's/target: /exclude: [q_proj, v_proj], target: /' r.yaml" run r.yaml
bad "layer that is not there" 2 "layers" $no run r.yaml 'adapter.layers=[7]'
bad "module both targeted and saved" 2 "modules_to_save" $no run r.yaml 'adapter.modules_to_save=[q_proj]'
bad "saved module matches nothing" 2 "modules_to_save.*headd|headd" $no run r.yaml 'adapter.modules_to_save=[headd]'
bad "token beyond the vocabulary" 2 "trainable_tokens.*9999|9999" $no run r.yaml 'adapter.trainable_tokens=[9999]'
bad "layers without any" 2 "adapter.top_layers: the kind layers needs top_layers or layers" $no run r.yaml adapter.type=layers
bad "layers said twice" 2 "adapter.top_layers: layers was given too" $no run r.yaml adapter.type=layers adapter.top_layers=1 'adapter.layers=[0]'
bad "more top layers than there are" 2 "adapter.top_layers: 9, the base has 2 layers" $no run r.yaml adapter.type=layers adapter.top_layers=9
bad "a trained layer that is not there" 2 "adapter.layers: there is no layer 5, the base has 2" $no run r.yaml adapter.type=layers 'adapter.layers=[5]'
bad "loha with dropout" 2 "adapter.dropout: not for type loha" $no run r.yaml adapter.type=loha adapter.dropout=0.1
bad "lokr of rank-stabilised scale" 2 "adapter.rslora: not for type lokr" $no run r.yaml adapter.type=lokr adapter.rslora=true
bad "a factor that is no divisor's size" 2 "adapter.decompose_factor: -3 is out of range" $no run r.yaml adapter.type=lokr adapter.decompose_factor=-3
bad "ranks that differ over layers that share" 2 "adapter.rank_pattern: model.layers.1.self_attn.q_proj shares its factors with model.layers.0.self_attn.q_proj and needs the same rank" $no run r.yaml adapter.type=lotr 'adapter.rank_pattern={layers.1.self_attn.q_proj: 2}'
bad "a skeleton larger than the weight" 2 "adapter.r: pmss takes at most [0-9]+ rows and columns of model.layers.0.self_attn.q_proj, 4000 were asked for" $no run r.yaml adapter.type=pmss adapter.r=4000
bad "an unknown choice of rows" 2 "adapter.pmss_select: 'leverage' is not one of" $no run r.yaml adapter.type=pmss adapter.pmss_select=leverage
bad "hut with trained biases" 2 "adapter.bias: type hut scales biases already" $no run r.yaml adapter.type=hut adapter.bias=all
bad "a square matrix wider than the module" 2 "adapter.r: the square matrix of mora would be [0-9]+ wide" $no run r.yaml adapter.type=mora adapter.r=4000
bad "mora of a scaled kind" 2 "adapter.rslora: is for lora" $no run r.yaml adapter.type=mora adapter.rslora=true
bad "a prompt of no text" 2 "adapter.prompt_text: prompt_init text needs one" $no run r.yaml adapter.type=prompt adapter.prompt_init=text
bad "a text that is not read" 2 "adapter.prompt_text: is read with prompt_init text only" $no run r.yaml adapter.type=prompt adapter.prompt_init=random adapter.prompt_text=x
bad "a prompt with dropout" 2 "adapter.dropout: prompt has none" $no run r.yaml adapter.type=prompt adapter.dropout=0.1
bad "a prompt with modules in full" 2 "adapter.modules_to_save: prompt trains nothing of the base" $no run r.yaml adapter.type=prompt 'adapter.modules_to_save=[model.norm]'
bad "a prefix of a text" 2 "adapter.prompt_text: is read by prompt, not by prefix" $no run r.yaml adapter.type=prefix adapter.prompt_text=x
bad "a prefix of embeddings" 2 "adapter.prompt_init: 'vocab' is not for prefix, which has random and zero" $no run r.yaml adapter.type=prefix adapter.prompt_init=vocab
bad "a prefix with biases" 2 "adapter.bias: prefix trains no bias" $no run r.yaml adapter.type=prefix adapter.bias=all
bad "a prompt that leaves no room" 2 "adapter.virtual_tokens: 60000 leave no room in the base's [0-9]+ positions" $no run r.yaml adapter.type=prompt adapter.virtual_tokens=60000
bad "virtual tokens of another kind" 2 "adapter.virtual_tokens: is read by prompt" $no run r.yaml adapter.virtual_tokens=8
bad "more heads than there are" 2 "adapter.s2ft_heads: must be in 1 to [0-9]+, the heads of the base, is 99" $no run r.yaml adapter.type=s2ft adapter.s2ft_heads=99 adapter.s2ft_channels=4
bad "more channels than there are" 2 "adapter.s2ft_channels: must be in 1 to [0-9]+, the channels of the base, is 9999" $no run r.yaml adapter.type=s2ft adapter.s2ft_channels=9999
bad "slabs of the output head" 2 "adapter.target: lm_head has neither heads nor channels" $no run r.yaml adapter.type=s2ft adapter.s2ft_channels=4 'adapter.target=[lm_head]'
bad "a mask of more than half" 2 "adapter.sparse_density: (expected|must|.*0.5)" $no run r.yaml adapter.type=fish adapter.sparse_density=0.9
bad "an unknown mask" 2 "adapter.sparse_mask: 'fisher' is not one of data, random" $no run r.yaml adapter.type=spu adapter.sparse_mask=fisher
bad "a sparse update of an embedding" 2 "adapter.target: .*embed_tokens is a embedding, which spu cannot attach to|which spu cannot attach to" $no run r.yaml adapter.type=spu 'adapter.target=[embed_tokens]'
bad "a key of another kind" 2 "adapter.s2ft_heads: is read by s2ft, not by lora" $no run r.yaml adapter.s2ft_heads=2
bad "a key of another kind in a task" 2 "tasks\[0\].adapter.mora_type: is read by mora, not by lora" $no run r.yaml 'tasks[0].adapter.mora_type=rotation'
bad "slabs with dropout" 2 "adapter.dropout: s2ft has none" $no run r.yaml adapter.type=s2ft adapter.dropout=0.1
bad "more ranks at the end than at the start" 2 "adapter.target_r: 9 is above the starting rank, adapter.r 4" $no run r.yaml adapter.type=adalora adapter.r=4 adapter.target_r=9
bad "no step to move ranks" 2 "adapter.tinit, adapter.tfinal: leave no step" $no run r.yaml adapter.type=adalora adapter.target_r=2 adapter.tinit=60% adapter.tfinal=50%
bad "scale of another kind" 2 "adapter.rslora, lora_bias, alpha_pattern: are not for adapter.type adalora" $no run r.yaml adapter.type=adalora adapter.target_r=2 adapter.rslora=true
bad "fewer ranks at the end than at the start" 2 "adapter.target_r: 2 is below the starting rank, adapter.r 4" $no run r.yaml adapter.type=increlora adapter.r=4 adapter.target_r=2
bad "too many ranks at once" 2 "adapter.elastic_share" $no run r.yaml adapter.type=elalora adapter.elastic_share=0.9
bad "ranks of modules that a kind finds itself" 2 "adapter.rank_pattern: is not for adapter.type dyrank" $no run r.yaml adapter.type=dyrank 'adapter.rank_pattern={q_proj: 2}'
bad "a penalty that is not known" 2 "orthogonal.*l2.*l1" $no run r.yaml adapter.type=o-lora adapter.orthogonal=l2
bad "an init of lora for a kind per task" 2 "adapter.init: 'pissa' is for lora, not for incremental_rank" $no run r.yaml adapter.type=incremental_rank adapter.init=pissa
bad "gates with a scale of their own" 2 "adapter.rslora: the gates of mora_rank" $no run r.yaml adapter.type=mora_rank adapter.rslora=true
bad "no temperature" 2 "adapter.gate_temperature: .*0" $no run r.yaml adapter.type=mora_rank adapter.gate_temperature=0
bad "a pool that is too large" 2 "adapter.r: 1025 ranks of each of 1 tasks on model" $no run r.yaml adapter.type=mora_rank adapter.r=1025
bad "a budget of another kind" 2 "adapter.gate_top_k: is read by mora_rank, not by lora" $no run r.yaml adapter.gate_top_k=2
bad "a merge of what depends on the input" 2 "after\[0\].merge: an adapter of type mora_rank cannot be merged" $no run r.yaml adapter.type=mora_rank 'after=[{merge: {out: merged}}]'
bad "blocks that do not divide" 2 "adapter.oft_block_size: 7 does not divide the 48 inputs of model" $no run r.yaml adapter.type=oft adapter.oft_block_size=7
bad "a number of blocks that does not divide" 2 "adapter.oft_blocks: 5 does not divide the 48 inputs of model" $no run r.yaml adapter.type=oft adapter.oft_blocks=5
bad "one term is no rotation" 2 "adapter.cayley_terms: must be 0 .exact. or from 2 to 32, is 1" $no run r.yaml adapter.type=oft adapter.oft_block_size=8 adapter.cayley_terms=1
bad "rotations with dropout" 2 "adapter.dropout: oft has none" $no run r.yaml adapter.type=oft adapter.oft_block_size=8 adapter.dropout=0.1
bad "an odd number of reflections" 2 "adapter.r: hra starts from pairs of reflections that cancel: r must be even, is 3" $no run r.yaml adapter.type=hra adapter.r=3
bad "shards wider than the input" 2 "adapter.r: 64 is more than the 48 inputs of model" $no run r.yaml adapter.type=miss adapter.r=64
bad "columns that do not divide" 2 "adapter.mini_r: 7 does not divide the [0-9]+ outputs of model" $no run r.yaml adapter.type=miss adapter.miss_type=mini adapter.mini_r=7
bad "affine blocks that do not divide" 2 "adapter.r: model.* is .[0-9]+, 48., which blocks of 7 do not divide" $no run r.yaml adapter.type=bat adapter.r=7
bad "ranks of its own per module" 2 "adapter.rank_pattern: miss is the same for every module" $no run r.yaml adapter.type=miss 'adapter.rank_pattern={q_proj: 2}'
bad "ranks beyond the directions of a gradient" 2 "adapter.init: lora_ga needs a rank of at most [0-9]+ for model" $no run r.yaml adapter.init=lora_ga adapter.r=40
bad "components of too few tokens" 3 "adapter.init: eva needs micro-batches of at least [0-9]+ trained tokens for model" $no run r.yaml adapter.init=eva adapter.r=40
bad "an init from data of an embedding" 2 "adapter.init: 'corda' is for linear modules, .*embed_tokens is an embedding" $no run r.yaml adapter.init=corda 'adapter.target=[embed_tokens]'
bad "an unknown way to take directions" 2 "adapter.ga_direction: 'BrAr' is not one of" $no run r.yaml adapter.init=lora_ga adapter.ga_direction=BrAr
bad "bits that no quantiser has" 2 "adapter.loftq_bits: must be 4 or 8, is 5" $no run r.yaml adapter.init=loftq adapter.loftq_bits=5
bad "ranks dealt out below r" 2 "adapter.eva_rho: 0.5 is out of range" $no run r.yaml adapter.init=eva adapter.eva_rho=0.5
bad "a fixed A of an embedding" 2 "adapter.lora_fa: is for linear modules, .*embed_tokens is an embedding" $no run r.yaml adapter.lora_fa=true 'adapter.target=[embed_tokens]'
bad "dora started from data" 2 "adapter.init: 'eva' is for lora, not for dora" $no run r.yaml adapter.type=dora adapter.init=eva
bad "dora of an embedding" 2 "adapter.target: .*embed_tokens is a.* embedding, which dora cannot attach to" $no run r.yaml adapter.type=dora 'adapter.target=[embed_tokens]'
bad "dora of a base that is rewritten" 2 "adapter.init: 'pissa' rewrites the base, whose lengths dora keeps" $no run r.yaml adapter.type=dora adapter.init=pissa
bad "dora with a bias of B" 2 "adapter.lora_bias: dora does not have it" $no run r.yaml adapter.type=dora adapter.lora_bias=true
bad "ranks of shared projections" 2 "adapter.rank_pattern: vera's projections are shared" $no run r.yaml adapter.type=vera 'adapter.rank_pattern={q_proj: 2}'
bad "token rows beside vera" 2 "adapter.trainable_tokens: vera does not have it" $no run r.yaml adapter.type=vera 'adapter.trainable_tokens=[3]'
bad "a scaled input that others read too" 2 "adapter.feedforward: model.layers.0.self_attn.q_proj shares its input with k_proj" $no run r.yaml adapter.type=ia3 'adapter.feedforward=[q_proj]'
bad "ia3 with dropout" 2 "adapter.dropout: ia3 has none" $no run r.yaml adapter.type=ia3 adapter.dropout=0.1
bad "norm tuning of a linear module" 2 "adapter.target: .*q_proj is a linear, which ln_tuning cannot attach to" $no run r.yaml adapter.type=ln_tuning
bad "norm tuning with biases" 2 "adapter.bias: ln_tuning trains no bias beside its own" $no run r.yaml adapter.type=ln_tuning adapter.target=all-linear adapter.bias=all
bad "biases of a base that has none" 2 "adapter.type: bitfit trains biases, model has none" $no run r.yaml adapter.type=bitfit
bad "a decay to nothing" 2 "schedule.min_lr_ratio: must be above 0 for the decay of infinite" $no run r.yaml schedule.name=infinite schedule.min_lr_ratio=0
bad "a constant rate below the lowest" 2 "schedule.constant_ratio: is below min_lr_ratio" $no run r.yaml schedule.name=infinite schedule.constant_ratio=0.05
bad "a rate for no parameter" 2 "optim.lr_factors: 'lm_head' is in the name of no trained parameter" $no run r.yaml 'optim.lr_factors={lm_head: 0.1}'
bad "a rate by no regular expression" 2 "optim.lr_factors: .*\(" $no run r.yaml 'optim.lr_factors={"(": 0.1}'
bad "folder without the split" 3 "empty: this folder holds no dev.json and no dev.jsonl" $no run r.yaml 'tasks[0].data[0].path=empty' 'tasks[0].data[0].split=dev'
bad "benchmark outside its groups" 3 "x/train.json: is in no folder SC, TC" "mkdir x; replace x/train.json '[{\"sentence\": \"s\", \"label\": \"l\"}]'" run r.yaml 'tasks[0].data[0].path=x'
bad "list of rows that does not end" 3 "a.jsonl:3:1: expected ']'" "sed -i -e '1i[' -e '2,\$d' a.jsonl" run r.yaml
bad "adapter missing" 3 "noadapter" $no eval r.yaml -a noadapter
bad "adapter_config.json missing" 3 "adapter_config.json" "rm $ad/adapter_config.json" eval r.yaml -a $ad
bad "adapter_config.json not JSON" 3 "adapter_config.json:[0-9]+" "replace $ad/adapter_config.json '{'" eval r.yaml -a $ad
bad "adapter of an unknown kind" 3 "adapter_config.json.*ZORA" "edit 's/LORA/ZORA/' $ad/adapter_config.json" eval r.yaml -a $ad
bad "adapter weights truncated" 3 "adapter_model.safetensors" "truncate -s -10 $ad/adapter_model.safetensors" eval r.yaml -a $ad
bad "adapter with another rank" 3 "adapter_model.safetensors|shape|rank" "edit 's/\"r\": 4/\"r\": 8/' $ad/adapter_config.json" eval r.yaml -a $ad
bad "adapter for another base" 3 "$ad.*made on another base" "shorter" eval r.yaml -a $ad model.random_init=true
bad "merge of an adapter that is not there" 3 "noadapter" $no merge -b model -a noadapter -o out
bad "merge onto a base that is not there" 3 "nomodel" $no merge -b nomodel -a $ad -o out
bad "generate from nothing" 3 "nomodel" $no generate -m nomodel -p x
bad "extract from models of two shapes" 3 "shape|differ|layers|safetensors" "cp -r model tuned; edit 's/\"num_hidden_layers\": 2/\"num_hidden_layers\": 1/' tuned/config.json" extract -b model -t tuned -o out
bad "merge onto a full disk" 3 "out.*" "limit=8" merge -b model -a $ad -o out

lines=4
bad "everything that is wrong with the files" 3 "^evaluation set 'a': a.test.jsonl: " "rm a.test.jsonl; edit '2s/.*/{/' a.jsonl; line 'log: {every: 1}'; printf '  - {name: b, data: [{path: nodata.jsonl}]}\n' >more; edit '/eval: a\$/r more' r.yaml; rm more" check r.yaml 'adapter.target=[zz_proj]'
lines=1

bad "gem with half a sample" 2 "continual.gem.buffer: must be a whole number of samples or a share, is 1.5" $no run r.yaml continual.strategy=gem continual.gem.buffer=1.5
bad "a negative margin" 2 "margin" $no run r.yaml continual.gem.margin=-1
bad "osf of one LoRA through all tasks" 2 "osf wants factors of its own for each task" "edit 's/^tasks:/&\\n  - {name: z, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=osf
bad "osf that retains everything" 2 "continual.osf.retain" $no run r.yaml continual.osf.retain=1
bad "osf with more for unimportant layers" 2 "continual.osf.retain_min: 0.6 is above retain" $no run r.yaml continual.osf.retain_min=0.6 continual.strategy=osf
bad "migu that holds every row" 2 "continual.migu.threshold" $no run r.yaml continual.migu.threshold=1
bad "a mask that is none" 2 "continual.migu.mask: 'some' is not one of" $no run r.yaml continual.migu.mask=some
bad "more directions than samples" 2 "continual.ogd.directions: 9, of 4 samples" "edit 's/^tasks:/&\\n  - {name: z, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=ogd 'continual.ogd={samples: 4, directions: 9}'
bad "ogd with one task" 2 "ogd has nothing to do with one task" $no run r.yaml continual.strategy=ogd
bad "refactor of no factors" 2 "refactor is for lora and o-lora, full has no factors" $no run r.yaml continual.strategy=refactor 'adapter={type: full}'
bad "perturbed at no time" 2 "continual.perturb.when.*never.*step.*task" $no run r.yaml continual.perturb.when=never
bad "shrunk below nothing" 2 "continual.perturb.weight: 2 takes away more than there is" $no run r.yaml continual.strategy=perturb 'continual.perturb={when: task, weight: 2}'
bad "a utility that remembers everything" 2 "continual.upgd.beta" $no run r.yaml continual.upgd.beta=1
bad "reglora with one task" 2 "reglora has nothing to do with one task" $no run r.yaml continual.strategy=reglora
bad "reglora of one LoRA through all tasks" 2 "reglora wants factors of its own for each task" "edit 's/^tasks:/&\\n  - {name: z, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=reglora
bad "more entries than a matrix has" 2 "continual.reglora.share" $no run r.yaml continual.reglora.share=1.5
bad "gpm with one task" 2 "gpm has nothing to do with one task" $no run r.yaml continual.strategy=gpm
bad "bases of more than everything" 2 "continual.gpm.energy" $no run r.yaml continual.gpm.energy=1.5
bad "a null space of a kind without matrices" 2 "nullspace is for lora, o-lora, layers and full, not for dora" "edit 's/^tasks:/&\\n  - {name: z, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=nullspace adapter.type=dora
bad "agem with one task" 2 "continual.strategy: agem has nothing to do with one task" $no run r.yaml continual.strategy=agem

# ---- runs ----
bad "a run is already there" 2 "run.* already" $no run r.yaml --output run
bad "output below a file" 3 "a.jsonl" $no run r.yaml --output a.jsonl/x
bad "does not fit" 4 "(memory|bytes|limit)" $no run r.yaml memory.limit=4KiB
bad "plan does not fit" 4 "memory.limit is 4096" $no plan r.yaml memory.limit=4KiB
bad "resume where no run is" 3 "empty.*" $no resume empty
bad "matrix where no run is" 3 "empty.*" $no matrix empty
bad "report where no run is" 3 "empty.*" $no report empty
bad "matrix with a form of BWT that is none" 2 "'saptt' is not a form of BWT" $no matrix run --bwt saptt
bad "matrix against a run that is none" 3 "empty.*no score matrix" $no matrix run --reference empty
bad "distance from a base that merging changes" 2 "r.yaml:7:.*metric: compares with the base, which continual.policy merge_then_new" "edit 's/metric: perplexity/metric: base_kl/' r.yaml; printf '  - {name: b, data: [{path: b.jsonl}]}\n' >more; edit '/eval: a\$/r more' r.yaml; rm more" run r.yaml continual.policy=merge_then_new
bad "distance from a base that the start rewrites" 2 "metric: compares with the base, which adapter.init pissa changes" "edit 's/metric: perplexity/metric: base_xent/' r.yaml" run r.yaml adapter.init=pissa
bad "distance from a base that is trained" 2 "evaluation set 'a': adapter .* trains .* in full" "edit 's/metric: perplexity/metric: base_kl/' r.yaml" run r.yaml 'adapter.modules_to_save=[model.norm]'
bad "evaluation of sets that are none" 2 "eval.midway: 'some' is not one of own, seen, all" $no run r.yaml eval.midway=some
bad "sweep without a folder" 2 "--out DIR is missing" $no sweep r.yaml
bad "sweep over a key that is none" 2 "unknown key 'rr'" $no sweep r.yaml --out out --set 'adapter.rr=1|2'
bad "sweep over a value that is none" 2 "--set: expected KEY=VALUE, got 'a'" $no sweep r.yaml --out out --set 'a|b'
bad "sweep over the same value twice" 2 "stands twice" $no sweep r.yaml --out out --set 'seed=1|seed=1'
bad "sweep over seeds that are none" 2 "--seeds: expected integers with commas, got 'x'" $no sweep r.yaml --out out --seeds 1,x
bad "sweep over an order of other tasks" 2 "no task is named 'zz'" $no sweep r.yaml --out out --order a,zz
bad "sweep over two recipes of one name" 2 "two recipes are called 'r'" "cp r.yaml empty/r.yaml" sweep r.yaml empty/r.yaml --out out
bad "sweep into a file" 3 "a.jsonl" $no sweep r.yaml --out a.jsonl/x
bad "merge of tasks by no method" 2 "after\[0\].merge_tasks.method: 'tie' is not one of .*did you mean 'ties'" $no run r.yaml 'after=[merge_tasks: {method: tie}]'
bad "merge of tasks without a method" 2 "missing key 'after\[0\].merge_tasks.method'" $no run r.yaml 'after=[merge_tasks: ]'
bad "merge of one task" 2 "^r.yaml: after\[0\].merge_tasks: merge: magmax takes at least 2 inputs, not 1" $no run r.yaml 'after=[merge_tasks: {method: magmax}]'
bad "merge of tasks without density" 2 "^r.yaml: after\[0\].merge_tasks: merge: ties needs a density" $no run r.yaml 'after=[merge_tasks: {method: ties}]'
bad "merge of tasks by a set that is none" 2 "no evaluation set is named 'x'" $no run r.yaml 'after=[merge_tasks: {method: mwa, metric: x}]'
bad "merge before the only task" 2 "before: there is one task, and none before it" $no run r.yaml 'before=[merge_tasks: {method: linear}]'
bad "merge before the first task" 2 "tasks\[0\].before: no task has been learned by then" $no run r.yaml 'tasks[0].before=[merge_tasks: {method: linear}]'
bad "merge of one before the second task" 2 "tasks\[1\].before: one task has been learned by then, a merge needs two" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'tasks[1].before=[merge_tasks: {method: linear}]'
bad "report before a task" 2 "unknown key 'report' in before\[0\]" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'before=[report: {out: x}]'
bad "two merges before a task" 2 "before: 2 steps, a task starts from one merge" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'before=[merge_tasks: {method: linear}, merge_tasks: {method: magmax}]'
bad "merge before a task without density" 2 "^r.yaml: before\[0\].merge_tasks, for task 'a': merge: ties needs a density" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.policy=new_per_task 'before=[merge_tasks: {method: ties}]'
bad "merge before a task elsewhere" 2 "before\[0\].merge_tasks: out: it is always starts/<task>" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'before=[merge_tasks: {method: linear, out: x}]'
bad "merge before a task of a higher rank" 2 "before\[0\].merge_tasks: rank: 8, the adapter has 4" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'before=[merge_tasks: {method: linear, rank: 8}]'
bad "start of a kind that cannot" 2 "before\[0\].merge_tasks: an adapter of type loha cannot start from a merge" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml adapter.type=loha 'before=[merge_tasks: {method: linear}]'
bad "start under earlier adapters" 2 "with continual.policy stack the earlier adapters stay active" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.policy=stack 'before=[merge_tasks: {method: linear}]'
bad "start of values held by a strategy" 2 "ewc holds a value for each parameter, which a merge before a task does not keep" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}\n  - {name: c, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=ewc 'before=[merge_tasks: {method: linear}]'
bad "start added to what it is made of" 2 "before: with continual.bank.selector sum what is merged would be added again" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.policy=new_per_task continual.strategy=bank continual.bank.selector=sum 'before=[merge_tasks: {method: linear}]'
bad "start of a module in full" 2 "before: task 'b' trains '.*' in full" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.policy=new_per_task 'adapter.modules_to_save=[norm]' 'before=[merge_tasks: {method: linear}]'
bad "order with a task twice" 2 "continual.order: 'a' stands twice" $no run r.yaml 'continual.order=[a, a]'
bad "strategy that is none" 2 "continual.strategy: 'ewk' is not one of" $no run r.yaml continual.strategy=ewk
bad "strategy named twice" 2 "continual.strategy: l2 is named twice" $no run r.yaml 'continual.strategy=[l2, l2]'
bad "branch of a schedule that does not decay" 2 "branch needs a schedule that decays at the end of each task" $no run r.yaml continual.strategy=branch
bad "branch of a decay at the run's end" 2 "branch needs a schedule that decays at the end of each task" $no run r.yaml continual.strategy=branch schedule.name=wsd schedule.restart=continuous
bad "values held for ranks that move" 2 "l2 holds a value for each parameter" $no run r.yaml continual.strategy=l2 adapter.type=adalora
bad "values held for adapters that come and go" 2 "l2 needs one adapter through all tasks" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=l2 continual.policy=new_per_task
bad "joint against forgetting" 2 "with policy joint there is nothing to forget" $no run r.yaml continual.policy=joint continual.strategy=l2
bad "selector on one adapter" 2 "bank chooses among the adapters of tasks, which continual.policy: new_per_task makes" $no run r.yaml continual.strategy=bank
bad "selector that is none" 2 "continual.bank.selector: 'best' is not one of" $no run r.yaml continual.bank.selector=best
bad "class means beside an adapter" 2 "ncm is for a base on which nothing is trained \(adapter.type: none\)" $no run r.yaml continual.strategy=ncm
bad "class means beside trained modules" 2 "ncm is for a base on which nothing is trained" $no run r.yaml continual.strategy=ncm 'adapter={type: none, modules_to_save: [lm_head]}'
bad "class means of rows without labels" 3 "a.jsonl:1: the row has no label \(format classification\)" $no run r.yaml continual.strategy=ncm 'adapter={type: none}'
bad "a strategy where nothing is trained" 2 "l2 has nothing to do where nothing is trained" $no run r.yaml continual.strategy=l2 'adapter={type: none}'
bad "nearness that is none" 2 "continual.ncm.metric: 'manhattan' is not one of" $no run r.yaml continual.ncm.metric=manhattan
bad "several of the nearest" 2 "continual.bank.top_k: only the selector keys weights" $no run r.yaml continual.strategy=bank continual.policy=new_per_task continual.bank.top_k=2
bad "adapters chosen by row that are not by row" 2 "cannot be chosen per row" $no run r.yaml continual.strategy=bank continual.policy=new_per_task 'adapter.modules_to_save=[lm_head]'
bad "one export of many adapters" 2 "after.0.: the run ends with an adapter for each task" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.policy=stack 'after=[export: {out: e}]'
bad "replay with one task" 2 "replay has nothing to replay with one task" $no run r.yaml continual.strategy=replay
bad "replay of half a sample" 2 "replay.buffer: must be a whole number of samples or a share, is 1.5" $no run r.yaml continual.strategy=replay continual.replay.buffer=1.5
bad "replay of nothing but the past" 2 "continual.replay.ratio: 1 is out of range" $no run r.yaml continual.replay.ratio=1
bad "nothing to be taught" 2 "continual.lwf.kl: nothing is taught" $no run r.yaml continual.strategy=lwf continual.lwf.kl=0
bad "a slow copy that never moves" 2 "continual.lae.decay: 1 is out of range" $no run r.yaml continual.lae.decay=1
bad "lae with one task" 2 "continual.strategy: lae has nothing to do with one task" $no run r.yaml continual.strategy=lae
bad "ilora with half a sample" 2 "continual.ilora.buffer: must be a whole number of samples or a share, is 1.5" $no run r.yaml continual.strategy=ilora continual.ilora.buffer=1.5
bad "an ensemble of one" 2 "an ensemble is of two adapters: run/adapters/a, and which\?" $no eval r.yaml -e run/adapters/a
bad "an ensemble with nothing" 3 "nowhere" $no eval r.yaml -a $ad -e nowhere
bad "mos with one task" 2 "continual.strategy: mos has nothing to do with one task" $no run r.yaml continual.strategy=mos
bad "two slow copies" 2 "coin_ema and lae both decide which values are measured and saved" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml 'continual.strategy=[coin_ema, lae]'
bad "answers to one task" 2 "continual.strategy: seqkd has nothing to do with one task" $no run r.yaml continual.strategy=seqkd
bad "answers longer than rows" 3 "task 'b': no row has a prompt that leaves room for an answer of 4000 tokens" "sed -i 's/^tasks:/tasks:\n  - {name: b, data: [{path: a.jsonl}], eval: a}/' r.yaml" run r.yaml continual.strategy=seqkd 'continual.order=[a, b]' continual.seqkd.max_new_tokens=4000
bad "general samples of nowhere" 2 "continual.gere.data.path: the general samples are missing" $no run r.yaml continual.strategy=gere
bad "general samples that are not there" 3 "continual.gere.data: .*nothere.jsonl" $no run r.yaml continual.strategy=gere continual.gere.data.path=nothere.jsonl
bad "a dynamic weight of nothing" 2 "continual.gere.weight: dynamic is the weight of what" $no run r.yaml continual.strategy=gere 'continual.gere={data: {path: a.jsonl}, loss: label, weight: dynamic}'
bad "a general weight that is a word" 2 "continual.gere.weight" $no run r.yaml continual.gere.weight=static
bad "a general loss that is none" 2 "continual.gere.loss: 'l3' is not one of" $no run r.yaml continual.gere.loss=l3
bad "a teacher with another head" 2 "lwf makes the teacher's logits with the frozen head, the adapter changes lm_head" $no run r.yaml continual.strategy=lwf 'adapter.modules_to_save=[lm_head]'
bad "report of runs of which one is none" 3 "empty.*no run" $no report run empty
bad "report to the terminal and a file" 2 "text.*out" $no report run --text --out x.html
bad "report of a sweep that names no runs" 3 "sweep.json.*names no runs" "echo '{}' >empty/sweep.json" report empty
bad "inspect nothing" 3 "nothere" $no inspect nothere
bad "resume of another recipe" 2 "recipe" "edit 's/^  lr: .*/  lr: 0.5/' run/recipe.yaml" resume run
bad "unknown instruction set" 5 "ESPALIER_ISA=vax" "export ESPALIER_ISA=vax" run r.yaml
unset ESPALIER_ISA
started=1
bad "divergence" 7 "step [0-9]+: the loss is not a number" $no run r.yaml -q optim.name=sgd optim.lr=100 optim.weight_decay=10 optim.max_grad_norm=off schedule.name=constant train.max_steps=60
bad "watchdog" 7 "(watchdog|above)" $no run r.yaml -q log.watchdog.loss_above=0.001 log.watchdog.patience=1
started=

echo "$n cases, $failed complaints"
[ "$failed" = 0 ] && [ "$n" -ge 60 ]
