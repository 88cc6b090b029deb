#!/usr/bin/env python3
"""What each strategy adds to a step: bench/results/overhead.md.

    bench/continual/overhead.py --espalier build/release/bin/espalier [--cache DIR] [--only ewc,l2]

Two grounds. `small`: the base and the tasks of prepare.py (2.2 million parameters, LoRA r 16, 8 rows a step), every
strategy. `135m`: the 135M Llama shape with random weights (LoRA r 8, 4 rows of 128 tokens), where the adapter has the
share of a model that it usually has. A run has two tasks. In the second one, in which there is something to protect, it
takes turns with a run of the plain sequence on the same data: one is stopped while the other goes on, so that a step of
one and the same step of the other are made within a second of each other. Each pair of steps gives a ratio; their median
counts. The first row is the plain sequence against itself: what the machine repeats. One thread.
"""
import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BENCH = os.path.dirname(HERE)

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
FIRST = 20  # steps of the first task
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
                "train: {micro_batch_size: 4}\ncontinual: {policy: continue}\ntasks:\n"
                + "".join(f"  - {{name: t{t}, data: [{{path: task{t}.jsonl, format: prompt_completion}}]}}\n"
                          for t in range(2)))


class Run:
    """A run that goes on only in its turns."""

    def __init__(self, a, ground, folder, overrides, out, steps):
        self.out, self.seen, self.times, self.step = out, 0, {}, 0
        command = [a.espalier, "run", f"{folder}/sequence.yaml", "--quiet", "--overwrite", "--output", out, "--threads", "1",
                   f"train.max_steps={steps}", f"tasks[0].train.max_steps={FIRST}",
                   *(o.replace("FOLDER", folder) for o in overrides)]
        if ground == "small":
            command += ["continual.order=[agnews, dbpedia]", "continual.baseline=false",
                        *(f"eval.sets[{i}].limit=1" for i in range(5))]
        shutil.rmtree(out, ignore_errors=True)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def turn(self, seconds):
        """Goes on for that long; notes the seconds of each step of the second task, but of the one with the pause in it."""
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGSTOP)
        try:
            lines = open(f"{self.out}/metrics.jsonl").read().split("\n")[:-1]
        except FileNotFoundError:
            return
        rows = [r for r in map(json.loads, lines[self.seen:]) if "seconds" in r and "loss" in r and r["step"] > FIRST]
        self.seen = len(lines)
        if rows:
            self.times |= {r["step"]: r["seconds"] for r in rows[1:]}
            self.step = rows[-1]["step"]

    def ended(self):
        return self.process.poll() is not None

    def close(self):
        if not self.ended():
            self.process.kill()
        return self.process.communicate()[1]


def pair(a, ground, folder, name, work):
    """Of each step that both made: the strategy's seconds to those of the plain sequence."""
    steps, turn = (a.steps, 0.2) if ground == "small" else (max(a.steps // 5, 8), 2.5)
    runs = [Run(a, ground, folder, STRATEGIES[name][i], f"{work}/{i}", steps) for i in range(2)]
    try:
        for r in runs:
            r.process.send_signal(signal.SIGSTOP)
        while not any(r.ended() for r in runs):  # the one behind goes on
            min(runs, key=lambda r: r.step).turn(turn)
    finally:  # nobody else would wake them
        why = [r.close() for r in runs]
    for r, text in zip(runs, why):
        if r.process.returncode > 0:
            sys.exit(f"overhead.py: {ground}, {name}: {(text.strip().splitlines() or ['?'])[0]}")
    both = sorted(runs[0].times.keys() & runs[1].times.keys())
    if len(both) < 8:
        sys.exit(f"overhead.py: {ground}, {name}: too few steps, more --steps")
    return [runs[0].times[i] / runs[1].times[i] for i in both]


def measure(a, ground, folder, names, work):
    lines = []
    for name in names:
        rounds = [pair(a, ground, folder, name, work) for _ in range(a.rounds)]
        every, each = [x for r in rounds for x in r], [statistics.median(r) for r in rounds]
        ratio = statistics.median(every)
        above = " **above**" if name in BOUND and ratio > 1.05 else ""
        lines.append(f"| {name} | {ratio:.3f}{above} | {min(each):.3f} to {max(each):.3f} | {len(every)} |")
        print(ground, lines[-1], flush=True)
    return ["", f"## {ground}", "", "| strategy | step, to the plain sequence | rounds | steps |", "|---|---:|---:|---:|",
            *lines]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--espalier", required=True)
    p.add_argument("--cache", default=os.path.join(os.environ.get("ESP_BENCH_CACHE", os.path.expanduser("~/.cache/espalier")),
                                                   "continual"), help="where prepare.py made its ground")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=300, help="of the second task on the small ground; a fifth of it on the other")
    p.add_argument("--only", default="")
    p.add_argument("--ground", choices=("small", "135m"))
    a = p.parse_args()
    a.espalier = os.path.abspath(a.espalier)
    names = [n for n in STRATEGIES if not a.only or n.split(",")[0] in a.only.split(",")]
    text = ["# What a strategy adds to a step", "",
            f"    bench/continual/overhead.py --espalier ESPALIER --cache DIR --rounds {a.rounds} --steps {a.steps}", "",
            "Two tasks; steps of the second one, in turns with a run of the plain sequence on the same data (one is stopped "
            "while the other goes on), one thread. Of each step that both made the ratio of their times: the median over all "
            "of them, the medians of the rounds, and how many there were. The first row, the plain sequence against itself, "
            "says what the machine repeats. `small`: the ground of continual.md, LoRA r 16 (a tenth of the model), 8 rows a "
            "step. `135m`: the 135M Llama shape, random weights, bf16, LoRA r 8, 4 rows of 128 tokens. Bound for o-lora, l2, "
            "ewc, migu and the moving averages (lae, coin_ema, mos): 1.05. osf is compared with full training."]
    with tempfile.TemporaryDirectory() as work:
        if a.ground != "135m":
            text += measure(a, "small", os.path.abspath(a.cache), names, work)
        if a.ground != "small":
            large_recipe(work)
            text += measure(a, "135m", work, [n for n in names if n in LARGE], work)
    if not a.only and not a.ground:
        with open(os.path.join(BENCH, "results", "overhead.md"), "w") as f:
            f.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
