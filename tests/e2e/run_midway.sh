#!/usr/bin/env bash
# Evaluation inside tasks: which sets, at which steps; the numbers that follow; what is kept of answers. A run that was
# stopped between two evaluations and resumed has the same curves, numbers and samples, byte for byte.
# Mutations seen caught: metrics.jsonl that is not cut to the checkpoint on resume has the steps after it twice; a plan
# whose evaluations are counted before the longest task is 5% short.
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
cat >more.yaml <<'Y'
    - {name: drift, path: a.test.jsonl, metric: base_kl}
Y
sed -i '/name: b, path: b.test/r more.yaml' recipe.yaml
set_at() { # RUN SET: steps at which it was measured, as "task:step"
  python3 -c '
import json, sys
print(*("%s:%d" % (l["task"], l["step"]) for l in map(json.loads, open(sys.argv[1] + "/metrics.jsonl")) if l.get("eval") == sys.argv[2]))' "$1" "$2"
}
expect() { [ "$2" = "$3" ] || fail "$1: '$2' instead of '$3'"; }
args=(train.max_steps=9 eval.every=4 eval.samples=2 eval.dense_steps=3 eval.dense_every=2 checkpoint.every=1 checkpoint.keep=50 -q)

"$ESPALIER" run recipe.yaml "${args[@]}" --output own
expect own/a "$(set_at own a)" "a:0 a:2 a:4 a:8 a:9 b:18"
expect own/b "$(set_at own b)" "a:0 a:9 b:11 b:13 b:17 b:18"
"$ESPALIER" run recipe.yaml "${args[@]}" --output seen eval.midway=seen
expect seen/a "$(set_at seen a)" "a:0 a:2 a:4 a:8 a:9 b:11 b:13 b:17 b:18"
expect seen/b "$(set_at seen b)" "a:0 a:9 b:11 b:13 b:17 b:18"
expect seen/drift "$(set_at seen drift)" "a:0 a:9 b:18"
"$ESPALIER" run recipe.yaml "${args[@]}" --output all eval.midway=all
expect all/b "$(set_at all b)" "a:0 a:2 a:4 a:8 a:9 b:11 b:13 b:17 b:18"
# a set that no adapter of the bank is chosen for is as far from the base as the base: distances follow the selector
"$ESPALIER" run recipe.yaml train.max_steps=2 checkpoint.every=task -q --output bank continual.policy=new_per_task continual.strategy=[bank] continual.bank.selector=oracle || fail "the bank"
python3 -c '
import json
r = json.load(open("bank/matrix.json"))["rows"]
assert all(row[2] == 0 for row in r) and r[0][0] != r[1][0], r' || fail "the distance under a selector"
# what evaluations and samples hold is in the plan: caches of generation lie beside the stack of the longest task
sed 's/sequence_len: 64/sequence_len: 256/; s/micro_batch_size: 2/micro_batch_size: 16/' recipe.yaml >long.yaml
"$ESPALIER" run long.yaml train.max_steps=1 eval.samples=1 -q --output planned 'eval.sets[1].max_new_tokens=100' 'eval.sets[1].limit=2' 'tasks[a].train.micro_batch_size=1' || fail "the long run"
python3 -c '
import json
r = json.load(open("planned/result.json"))
ratio = r["memory_peak"] / r["planned_memory_peak"]
assert 0.99 < ratio < 1.01, ratio' || fail "the plan of a run with evaluations"
same_adapters own seen
same_adapters own all # measuring changes nothing

python3 - <<'P' || fail "the numbers"
import json, subprocess, os
out = subprocess.run([os.environ['ESPALIER'], 'matrix', 'seen', '--json', '--window', '4'], capture_output=True, text=True, check=True).stdout
m = json.loads(out)
at = {}
for l in map(json.loads, open('seen/metrics.jsonl')):
    if 'eval' in l: at.setdefault(l['eval'], []).append((l['task'], l['step'], l['score']))
near = lambda a, b: abs(a - b) < 1e-6 * max(1, abs(b))
a = [(t, s, -v) for t, s, v in at['a']]  # perplexity: smaller is better
b = at['b']
low = min(v for t, s, v in a if t == 'b')
assert near(m['min_acc'], low), (m['min_acc'], low)
assert near(m['wc_acc'], b[-1][2] / 2 + low / 2)
move = lambda c, sign: max(0, max(sign * (v - u) for i, (t, s, u) in enumerate(c) for (t2, s2, v) in c[i + 1:] if s2 - s <= 4))
bs = b[1:]  # from the state in which b begins
assert near(m['wf'], (move(a, -1) + move(bs, -1)) / 2) and near(m['wp'], (move(a, 1) + move(bs, 1)) / 2)
end = {(t, s): v for t, s, v in a}
ends = min(end['a', 9], end['b', 18])
assert near(m['gap'], ends - min(ends, low))
assert m['evaluations_inside'] == 3 + 3 + 3 and m['window'] == 4
rows = m['rows']
assert rows[0][2] == 0 and rows[1][2] > 0  # divergence from the base: none before the first step
s = [json.load(open(f'seen/samples/{r}.json')) for r in range(3)]
assert all([x['set'] for x in r] == ['a', 'a', 'b', 'b', 'drift', 'drift'] for r in s)
assert s[0][0]['prompt'] == s[2][0]['prompt'] and s[0][0]['answer'] != s[2][0]['answer']
P

for at in 3 10 13; do
  rm -rf again
  "$ESPALIER" run recipe.yaml "${args[@]}" --output again eval.midway=seen --stop-after $at 2>/dev/null && fail "was not stopped at $at"
  "$ESPALIER" resume again -q || fail "resume after $at"
  cmp <(grep '"eval"' seen/metrics.jsonl) <(grep '"eval"' again/metrics.jsonl) || fail "curves after a stop at $at"
  cmp seen/matrix.json again/matrix.json || fail "matrix after a stop at $at"
  diff -r seen/samples again/samples || fail "samples after a stop at $at"
done
# killed behind a checkpoint, with evaluations after it already in the file
rm -rf again
cp -r seen again
rm -r again/result.json $(ls -d again/checkpoints/* | tail -n +12)
sed -i "s|output_dir: .*|output_dir: $work/again|" again/recipe.yaml
"$ESPALIER" resume again -q || fail "resume from an earlier checkpoint"
cmp <(grep '"eval"' seen/metrics.jsonl) <(grep '"eval"' again/metrics.jsonl) || fail "curves from an earlier checkpoint"
diff -r seen/samples again/samples || fail "samples from an earlier checkpoint"
