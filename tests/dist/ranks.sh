#!/usr/bin/env bash
# The communicator's suite, and a run, under mpirun with 2 and 4 ranks. A run on more ranks with as many rows per step is
# the run on one rank, to rounding; the same number of ranks gives the same bytes; resume is exact.
# Mutations seen caught: gradients scaled as if a rank's share were the whole step (step.c): losses differ; the sums of
# mora_rank not added over ranks (step.c): the mean gates of several ranks.
. "$(dirname "$0")/../script.sh"
command -v mpirun > /dev/null || skip "no mpirun"
[ -n "${DIST_SUITE:-}" ] || skip "built without MPI"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
ranks() { local n=$1; shift; mpirun --oversubscribe --bind-to none -n "$n" "$@"; }
ranks 2 true > /dev/null 2>&1 || skip "mpirun cannot start two processes here"
"$DIST_SUITE" > suite.log 2>&1 || { cat suite.log; fail "communicator suite on self"; }
for n in 2 4; do
  ESP_TEST_RANKS=$n ranks "$n" "$DIST_SUITE" > "$work/suite.log" 2>&1 || { cat "$work/suite.log"; fail "communicator suite on $n ranks"; }
done
rm -f suite.log
"$MAKE_TINY" "$work"
cd "$work"
opts=(train.epochs=2 adapter.dropout=0 model.dtype=fp32 train.micro_batch_size=1)
go() { # ranks accumulation folder
  ranks "$1" "$ESPALIER" run recipe.yaml --quiet "${opts[@]}" "train.gradient_accumulation_steps=$2" --output "$work/$3" \
    > log.txt 2>&1 || { cat log.txt; fail "run on $1 ranks"; }
}
go 1 4 one
go 2 2 two
go 4 1 four
go 2 2 again
same_adapters two again
same_losses() { # folder of one rank's run, of that on more, their number
  awk -v other="$3" '
    function value(line, key) { # of a number in a flat JSON line
      if (!match(line, "\"" key "\":[-+0-9.e]+")) return "none"
      return substr(line, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
    }
    !/"loss":/ { next }
    FNR == NR { loss[++n] = value($0, "loss"); tokens[n] = value($0, "tokens"); next }
    { m++
      d = (value($0, "loss") - loss[m]) / loss[m]; if (d < 0) d = -d
      if (d > worst) worst = d
      if (value($0, "tokens") != tokens[m]) bad = 1 }
    END { printf "%s ranks: %d steps, losses within %.2e of one rank\n", other, m, worst
          exit n != m || n == 0 || bad || worst > 1e-4 }' "$1/metrics.jsonl" "$2/metrics.jsonl" ||
    fail "$3 ranks: losses differ from one rank's"
}
same_losses one two 2
same_losses one four 4
# A weight that is taken of the whole step: a pass of a strategy that sums over ranks.
printf '{"text":"%s"}\n' "the first of a few" "and the second one" "now comes a third" "this is the last" > general.jsonl
plain=("${opts[@]}")
opts+=(continual.strategy=gere 'continual.gere={data: {path: general.jsonl, format: text}, weight: dynamic}' optim.lr=1e-4)
go 1 4 weighed1
go 2 2 weighed2
same_losses weighed1 weighed2 2
opts=("${plain[@]}")
code=0
ranks 2 "$ESPALIER" run recipe.yaml --quiet "${opts[@]}" train.gradient_accumulation_steps=2 --stop-after 5 --output "$work/cut" \
  > log.txt 2>&1 || code=$?
[ "$code" = 6 ] || { cat log.txt; fail "stopped run: exit code $code"; }
"$ESPALIER" resume "$work/cut" > log.txt 2>&1 && fail "resumed with another number of ranks"
grep -q "ranks" log.txt || { cat log.txt; fail "the refusal does not name the ranks"; }
ranks 2 "$ESPALIER" resume "$work/cut" --quiet > log.txt 2>&1 || { cat log.txt; fail "resume on 2 ranks"; }
same_adapters two cut

# mora_rank: the gates that stand for those of the data are those of all ranks' rows, and survive a resume
opts+=(adapter.type=mora_rank train.epochs=1)
go 1 4 gates1
go 2 2 gates2
go 4 1 gates4
python3 - <<'P' || fail "the mean gates of several ranks are not those of one"
import json
def gates(run):
    out = {}
    for task in 'ab':
        for site, g in json.load(open('%s/adapters/%s/adapter_config.json' % (run, task)))['mean_gates'].items():
            for i, v in enumerate(g['gates'] + [g['error']]): out[task, site, i] = v
    return out
one = gates('gates1')
assert len(one) > 50 and max(one.values()) > 0.01
for run in ('gates2', 'gates4'):
    other = gates(run)
    assert other.keys() == one.keys()
    worst = max(abs(other[k] - one[k]) / max(abs(one[k]), 1e-2) for k in one)
    print('%s: gates within %.2e of one rank' % (run, worst))
    assert worst < 1e-3, worst
P
ranks 2 "$ESPALIER" run recipe.yaml --quiet "${opts[@]}" train.gradient_accumulation_steps=2 --stop-after 3 --output "$work/half" \
  > log.txt 2>&1 && fail "did not stop"
ranks 2 "$ESPALIER" resume "$work/half" --quiet > log.txt 2>&1 || { cat log.txt; fail "resume of mora_rank on 2 ranks"; }
same_adapters gates2 half
for task in a b; do
  cmp <(grep -v base_model gates2/adapters/$task/adapter_config.json) <(grep -v base_model half/adapters/$task/adapter_config.json) || fail "the gates of $task after a resume"
done

# a start that is merged by the first rank is every rank's
opts=(train.epochs=1 adapter.dropout=0 model.dtype=fp32 train.micro_batch_size=1 continual.policy=new_per_task
  'before=[merge_tasks: {method: task_arithmetic, lambda: 0.5}]')
go 1 2 start1
go 2 1 start2
python3 - <<'P' || fail "a run that starts from a merge on 2 ranks is not that of one"
import json
one, two = (json.load(open('start%d/matrix.json' % n))['rows'] for n in (1, 2))
worst = max(abs(x - y) / max(abs(x), 1e-3) for a, b in zip(one, two) for x, y in zip(a, b))
print('merged start: scores within %.2e of one rank' % worst)
assert worst < 1e-3
P
