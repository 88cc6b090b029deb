#!/usr/bin/env python3
"""What each strategy adds to a step: bench/results/overhead.md.

    bench/continual/overhead.py --espalier build/release/bin/espalier [--cache DIR] [--rounds 3] [--only ewc,l2]

Two grounds. `small`: the base and the tasks of prepare.py (2.2 million parameters, LoRA r 16, 8 rows a step), every
strategy. `135m`: the 135M Llama shape with random weights (LoRA r 8, 4 rows of 128 tokens), where the adapter has the
share of a model that it usually has. A run has two tasks; its step time is the median over the steps of the second one,
in which there is something to protect, without the first two; of several rounds the fastest counts. One thread. The first
row is the plain sequence against itself: what the machine repeats.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BENCH = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(BENCH, "gpu"))
import shapes  # noqa: E402

GENERAL = "continual.gere.data={path: FOLDER/general.jsonl, format: text}"
# name: (overrides, those of the sequence that it is compared with)
STRATEGIES = {
    "naive-again": ([], []),
    "o-lora": (["adapter.type=o-lora"], []),
    "l2": (["continual.strategy=l2"], []),
    "ewc": (["continual.strategy=ewc", "continual.ewc.samples=8"], []),
    "lae": (["continual.strategy=lae"], []),
    "coin_ema": (["continual.strategy=coin_ema"], []),
    "mos": (["continual.strategy=mos"], []),
    "migu": (["continual.strategy=migu"], []),
    "si": (["continual.strategy=si"], []),
    "group_lasso": (["continual.strategy=group_lasso"], []),
    "perturb": (["continual.strategy=perturb"], []),
    "upgd": (["continual.strategy=upgd"], []),
    "refactor": (["continual.strategy=refactor"], []),
    "bank": (["continual.policy=new_per_task", "continual.strategy=bank"], []),
    "ogd": (["continual.strategy=ogd"], []),
    "gpm": (["continual.strategy=gpm"], []),
    "nullspace": (["continual.strategy=nullspace"], []),
    "osf": (["adapter.type=full", "continual.strategy=osf"], ["adapter.type=full"]),
    "reglora": (["continual.policy=merge_then_new", "continual.strategy=reglora"], []),
    "replay, 5%": (["continual.strategy=replay", "continual.replay.buffer=5%"], []),
    "ilora, 4 rows": (["continual.strategy=ilora", "continual.ilora.buffer=5%", "continual.ilora.batch=4"], []),
    "agem, 8 rows": (["continual.strategy=agem", "continual.agem.buffer=5%", "continual.agem.batch=8"], []),
    "gem, 8 rows": (["continual.strategy=gem", "continual.gem.buffer=8"], []),
    "lwf": (["continual.strategy=lwf"], []),
    "seqkd, 4 rows": (["continual.strategy=seqkd", "continual.seqkd.samples=8", "continual.seqkd.batch=4"], []),
    "gere, 4 rows": (["continual.strategy=gere", GENERAL, "continual.gere.batch=4"], []),
}
BOUND = {"o-lora", "l2", "ewc", "lae", "coin_ema", "mos", "migu"}  # at most 1.05
LARGE = ["naive-again", "o-lora", "l2", "ewc", "lae", "coin_ema", "mos", "migu", "si"]


def large_recipe(folder):
    """The 135M shape and two tasks of 32 rows each, whose labels are not looked at."""
    command = [sys.executable, os.path.join(BENCH, "gpu", "shapes.py"), "smollm2-135m", f"{folder}/base", "--rows", "64",
               "--seq", "128"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit("overhead.py: the model could not be written (shapes.py needs torch)")
    texts = [json.loads(line)["text"].split() for line in open(f"{folder}/base/rows.jsonl")]
    random.Random(1).shuffle(texts)
    for t in range(2):
        with open(f"{folder}/task{t}.jsonl", "w") as f:
            for words in texts[32 * t:32 * t + 32]:
                half = len(words) // 2
                f.write(json.dumps({"prompt": " ".join(words[:half]) + " ", "completion": " ".join(words[half:])}) + "\n")
    with open(f"{folder}/sequence.yaml", "w") as f:
        f.write("model: {base_model: base, dtype: bf16}\nadapter: {type: lora, r: 8, alpha: 16, target: all-linear}\n"
                "data: {sequence_len: 160}\noptim: {name: adamw, lr: 1e-4}\nschedule: {name: constant, warmup: 0}\n"
                "train: {max_steps: 8, micro_batch_size: 4}\ncontinual: {policy: continue}\ntasks:\n"
                + "".join(f"  - {{name: t{t}, data: [{{path: task{t}.jsonl, format: prompt_completion}}]}}\n"
                          for t in range(2)))


def step(a, ground, folder, overrides, out):
    small = ground == "small"
    command = [a.espalier, "run", f"{folder}/sequence.yaml", "--quiet", "--overwrite", "--output", out, "--threads", "1"]
    command += [o.replace("FOLDER", folder) for o in overrides]
    if small:
        command += ["continual.order=[agnews, dbpedia]", f"train.max_steps={a.steps}",
                    "continual.baseline=false", *(f"eval.sets[{i}].limit=1" for i in range(5))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["?"])[0]
    rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    rows = [r for r in rows if "loss" in r and "tokens_per_second" in r]
    last = [r["tokens"] / r["tokens_per_second"] for r in rows if r["task"] == rows[-1]["task"]]
    return statistics.median(last[2:]), None


def measure(a, ground, folder, names, out):
    """In each round the plain sequences, then every strategy. The machine adds to a time and never takes from it: the
    fastest of a variant's medians is compared with the fastest of its plain sequence."""
    plain, mine = {}, {n: [] for n in names}
    for _ in range(a.rounds):
        for name, overrides in [(None, list(p)) for p in sorted({tuple(STRATEGIES[n][1]) for n in names})] + [
                (n, STRATEGIES[n][0]) for n in names]:
            time, why = step(a, ground, folder, overrides, out)
            if why:
                sys.exit(f"overhead.py: {ground}, {name}: {why}")
            (plain.setdefault(tuple(overrides), []) if name is None else mine[name]).append(time)
    lines = []
    for name in names:
        base = plain[tuple(STRATEGIES[name][1])]
        ratio = min(mine[name]) / min(base)
        above = " **above**" if name in BOUND and ratio > 1.05 else ""
        lines.append(f"| {name} | {1e3 * min(mine[name]):.2f} | {ratio:.3f}{above} | {max(mine[name]) / min(base):.3f} |")
        print(ground, lines[-1], flush=True)
    return ["", f"## {ground}", "", "| strategy | step, ms | to the plain sequence | slowest round |", "|---|---:|---:|---:|", *lines]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--espalier", required=True)
    p.add_argument("--cache", default=os.path.join(os.environ.get("ESP_BENCH_CACHE", os.path.expanduser("~/.cache/espalier")),
                                                   "continual"), help="where prepare.py made its ground")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=40, help="of each task on the small ground")
    p.add_argument("--only", default="")
    p.add_argument("--ground", choices=("small", "135m"))
    a = p.parse_args()
    a.espalier = os.path.abspath(a.espalier)
    names = [n for n in STRATEGIES if not a.only or n.split(",")[0] in a.only.split(",")]
    text = ["# What a strategy adds to a step", "", f"    bench/continual/overhead.py --espalier ESPALIER --cache DIR --rounds {a.rounds}",
            "", f"Two tasks; median step of the second one; the fastest of {a.rounds} rounds; one thread. `small`: the ground of "
            "continual.md, LoRA r 16 (a tenth of the model), 8 rows a step. `135m`: the 135M Llama shape, random weights, bf16, "
            "LoRA r 8, 4 rows of 128 tokens. Bound for o-lora, l2, ewc, migu and the "
            "moving averages (lae, coin_ema, mos): 1.05. osf is compared with full training."]
    with tempfile.TemporaryDirectory() as work:
        if a.ground != "135m":
            text += measure(a, "small", os.path.abspath(a.cache), names, f"{work}/run")
        if a.ground != "small":
            large_recipe(work)
            text += measure(a, "135m", work, [n for n in names if n in LARGE], f"{work}/run")
    if not a.only and not a.ground:
        with open(os.path.join(BENCH, "results", "overhead.md"), "w") as f:
            f.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
