#!/usr/bin/env bash
# A sweep over orders, seeds and values: one folder per run, the same bytes as the run by itself; what is finished is
# not trained again, what was interrupted is resumed, a run that fails takes no other with it; the table and sweep.json
# hold the means and the paired differences of the runs' own matrices.
# Mutation seen caught: a sweep that does not look whether a run is finished trains it again ("trained again").
. "$(dirname "$0")/../script.sh"
"$MAKE_TINY" "$work"
cd "$work"
common=(recipe.yaml --out sweep --seeds 1,2 --order a,b --order back=b,a --set 'large: |small: adapter.r=2; adapter.alpha=4'
  train.max_steps=3 checkpoint.every=1)
"$ESPALIER" sweep "${common[@]}" --dry-run >dry || fail "dry run"
[ "$(grep -c ': to train: recipe.yaml' dry)" = 8 ] || fail "the dry run lists $(wc -l <dry) runs"
[ ! -e sweep ] || fail "the dry run wrote"

"$ESPALIER" sweep "${common[@]}" --jobs 2 >first || fail "the sweep: $(cat first)"
[ "$(grep -c ': finished in ' first)" = 8 ] || fail "not all runs: $(cat first)"
grep -Eq '^small +4 ' first || fail "no row of the second variant: $(cat first)"
grep -Eq '^back +small ' first || fail "no row of the second order"
ls sweep/*.log 2>/dev/null && fail "logs of runs that said nothing"

# the same as by itself
"$ESPALIER" run recipe.yaml -q --output alone train.max_steps=3 checkpoint.every=1 adapter.r=2 adapter.alpha=4 seed=2 'continual.order=[b, a]'
same_adapters alone sweep/small.back.s2
cmp alone/matrix.json sweep/small.back.s2/matrix.json || fail "the matrix differs from the run by itself"

python3 - <<'P' || fail "sweep.json"
import json, statistics as st
j = json.load(open('sweep/sweep.json'))
runs = {(r['variant'], r['order'], r['seed']): json.load(open(r['dir'] + '/matrix.json')) for r in j['runs']}
assert len(runs) == 8, runs.keys()
of = lambda v, key: [m[key] for (n, o, s), m in sorted(runs.items()) if n == v]
for v in j['variants']:
    for key in ('acc', 'bwt', 'forgetting'):
        x = of(v['name'], key)
        assert v[key]['n'] == 4
        assert abs(v[key]['mean'] - st.mean(x)) < 1e-9 and abs(v[key]['sd'] - st.stdev(x)) < 1e-9, (v['name'], key)
        d = [a - b for a, b in zip(x, of('large', key))]
        assert abs(v['paired'][key]['mean'] - st.mean(d)) < 1e-9 and abs(v['paired'][key]['sd'] - st.stdev(d)) < 1e-9
    assert v['step_seconds']['mean'] > 0 and v['memory_peak']['mean'] > 0
a, b = runs['large', 'a-b', 1], runs['large', 'back', 1]
assert [t['name'] for t in a['tasks']] == ['a', 'b'] and [t['name'] for t in b['tasks']] == ['b', 'a']
P
grep -q '^| small ' sweep/sweep.md || fail "sweep.md has no table"

# finished runs stay, an interrupted one is resumed, to the same bytes
cp -r sweep kept
stamp=$(stat -c %Y.%i sweep/large.a-b.s1/result.json)
rm -r sweep/large.back.s1
"$ESPALIER" run recipe.yaml -q --output sweep/large.back.s1 train.max_steps=3 checkpoint.every=1 seed=1 'continual.order=[b, a]' --stop-after 4 >/dev/null 2>&1 && fail "was not stopped"
"$ESPALIER" sweep "${common[@]}" >second || fail "the second time"
[ "$(grep -c ': already finished' second)" = 7 ] || fail "trained again: $(cat second)"
grep -q 'large.back.s1: resumed' second || fail "not resumed: $(cat second)"
[ "$stamp" = "$(stat -c %Y.%i sweep/large.a-b.s1/result.json)" ] || fail "trained again"
same_adapters kept/large.back.s1 sweep/large.back.s1

# the run of another recipe in a folder of the sweep is refused before anything starts
code=0; "$ESPALIER" sweep "${common[@]}" optim.lr=0.5 2>err >/dev/null || code=$?
[ $code = 2 ] && grep -q 'holds the run of another recipe' err || fail "another recipe: code $code, $(cat err)"

# one run fails (its memory does not suffice): the others are trained, the code is that of the failure
code=0; "$ESPALIER" sweep recipe.yaml --out partly --set 'good: |bad: memory.limit=4KiB|late: adapter.r=2' train.max_steps=1 >out 2>err || code=$?
[ $code = 4 ] || fail "exit code $code of a sweep with a failing run"
grep -q 'partly/bad.s[0-9]*: exit code 4: .*memory.limit' err || fail "why it failed is not said: $(cat err)"
grep -Eq '^bad +0 of 1 ' out && grep -Eq '^late +1 ' out || fail "the table of what is there: $(cat out)"

# a signal stops the sweep and its runs; the same command goes on
"$ESPALIER" sweep recipe.yaml --out stopped train.max_steps=4000 checkpoint.every=100 >out 2>err &
pid=$!
for i in $(seq 200); do [ -e stopped/*/metrics.jsonl ] && break; sleep 0.1; done
kill -TERM $pid
code=0; wait $pid || code=$?
[ $code = 6 ] || fail "exit code $code after a signal: $(cat err)"
grep -q 'the same command goes on' err || fail "what to do is not said"
"$ESPALIER" sweep recipe.yaml --out stopped train.max_steps=4000 checkpoint.every=100 --dry-run | grep -q ': to resume: ' || fail "nothing to resume"
