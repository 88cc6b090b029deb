#!/usr/bin/env python3
"""Claims of the literature, each at small scale over three seeds: what docs/claims.md judges.

    bench/continual/claims.py --espalier build/release/bin/espalier [--data FOLDER] [--cache FOLDER] [--jobs N]
                              [--only NAME,NAME] [--out FILE.md]

The cache is the one of prepare.py, which comes first; runs are kept below CACHE/claims and not repeated. --data holds
cl/ as for prepare.py, and gsm8k/ and e2e/ ({train,test}.jsonl with prompt and completion): texts that the base has never
seen; both are made into tasks and corpora the first time. --out gets all tables of runs that are there. Means are ± the sample standard deviation over seeds."""
import argparse
import itertools
import json
import math
import os
import re
import statistics
import struct

from ground import (FIVE, SEEDS, SHORT, THREE, TUNING, classification, corpus, corpus_set, fit, fit_many, make_data,
                    make_short, recipe, stat, sweep, table)

MEASURES, HEADS = ("acc", "forgetting", "learning_acc"), ("ACC", "forgetting", "learning")


def three_tasks(a, name):
    sets = {t: (classification(t)["test"], "choice", "all") for t in THREE}
    sets["general"] = corpus_set("general")
    return recipe(a, name, sets, [(t, classification(t)["train"], t) for t in THREE])


def rank(a):
    """R8: rank against forgetting when the adapter is merged after every task."""
    runs = sweep(a, "rank", three_tasks(a, "rank"),
                 {f"r{r}": f"adapter.r={r}; adapter.alpha={2 * r}" for r in (1, 4, 16, 64)},
                 ["continual.policy=merge_then_new"])
    lines = [(v, stat(r.last("general") - r.at("general", 0) for r in rs), stat(r.matrix["forgetting"] for r in rs),
              stat(r.matrix["learning_acc"] for r in rs), stat(r.matrix["acc"] for r in rs)) for v, rs in runs.items()]
    return table(("rank", "general text, nats worse than the base", "forgetting", "learning", "ACC"), lines)


def sequence(a, name, tasks):
    return recipe(a, name, {t: (classification(t)["test"], "choice", "all") for t in tasks},
                  [(t, classification(t)["train"], t) for t in tasks])


def differences(one, other):
    """Mean and spread of the differences of runs of the same order and seed."""
    return [stat((x.matrix[k] - y.matrix[k] for x, y in zip(one, other)), sign=True) for k in MEASURES]


def compare(runs, pairs):
    return table(("difference", "pairs", "higher ACC in", *HEADS),
                 [(f"{x} - {y}", len(runs[x]),
                   sum(p.matrix["acc"] > q.matrix["acc"] for p, q in zip(runs[x], runs[y])),
                   *differences(runs[x], runs[y])) for x, y in pairs])


def regularise(a):
    """R7: L2, EWC and distillation of features, each with the weight that is best on another sequence."""
    kinds = {"l2": ("continual.strategy=l2; continual.l2.weight=", (0.003, 0.01, 0.03, 0.1, 0.3)),
             "ewc": ("continual.strategy=ewc; continual.ewc.samples=128; continual.ewc.weight=",
                     (10, 30, 100, 300, 1000)),
             "features": ("continual.strategy=lwf; continual.lwf.kl=0; continual.lwf.hidden=", (0.1, 0.3, 1, 3, 10))}
    common = ["train.max_steps=80"]
    tuned = sweep(a, "regularise_tuning", sequence(a, "regularise_tuning", TUNING),
                  {"naive": "", **{f"{k}-{w}": f"{text}{w}" for k, (text, ws) in kinds.items() for w in ws}}, common,
                  seeds=(4, 5))
    best, lines = {}, [("naive", "-", *(stat(r.matrix[m] for r in tuned["naive"]) for m in MEASURES))]
    for k, (text, ws) in kinds.items():
        best[k] = max(ws, key=lambda w: statistics.fmean(r.matrix["acc"] for r in tuned[f"{k}-{w}"]))
        lines += [(k, f"{w}{' (best)' if w == best[k] else ''}",
                   *(stat(r.matrix[m] for r in tuned[f"{k}-{w}"]) for m in MEASURES)) for w in ws]
    text = "Weights, on the sequence " + ", ".join(TUNING) + " (seeds 4 and 5):\n\n"
    text += table(("strategy", "weight", *HEADS), lines)
    runs = sweep(a, "regularise", sequence(a, "regularise", FIVE),
                 {"naive": "", **{k: f"{kinds[k][0]}{w}" for k, w in best.items()}}, common,
                 orders=(FIVE, FIVE[::-1]))
    text += "\nWith these, " + ", ".join(FIVE) + " and the reverse order, seeds 1 to 3:\n\n"
    text += table(("strategy", *HEADS),
                  [(v, *(stat(r.matrix[m] for r in rs) for m in MEASURES)) for v, rs in runs.items()])
    pairs = [(k, "naive") for k in best] + [("l2", "ewc"), ("l2", "features"), ("ewc", "features")]
    text += "\nDifferences, run by run of the same order and seed:\n\n"
    return text + compare(runs, pairs)


def masks(a):
    """R10: MIGU on a longer sequence, against LoRA and against a random mask of the same density."""
    tasks = tuple(SHORT)
    variants = {"lora": "", **{f"{name}-{t}": f"continual.strategy=migu; continual.migu.mask={mask}; "
                                              f"continual.migu.threshold={t}"
                               for t in (0.7, 0.3) for name, mask in (("migu", "magnitude"), ("random", "random"))}}
    runs = sweep(a, "masks", sequence(a, "masks", tasks), variants, ["train.max_steps=40"],
                 orders=(tasks,))
    text = table(("variant and share of rows held", *HEADS),
                 [(v, *(stat(r.matrix[m] for r in rs) for m in MEASURES)) for v, rs in runs.items()])
    text += "\nDifferences, run by run of the same seed:\n\n"
    pairs = [(x, y) for x in runs if x != "lora" for y in ("lora", x.replace("migu", "random")) if x != y]
    return text + compare(runs, pairs)


def gap(a):
    """R11: inside a task scores fall below both of its ends, the more the less alike the tasks are."""
    def pair(second):
        first = classification("agnews", "agnews_a")
        other = classification("agnews", "agnews_b") if second == "agnews_b" else classification(second)
        return recipe(a, f"gap_{second}", {"first": (first["test"], "perplexity", 60),
                                           "second": (other["test"], "perplexity", 60)},
                      [("first", first["train"], "first"), ("second", other["train"], "second")])
    lines = []
    for second in ("agnews_b", "dbpedia", "yelp"):
        runs = sweep(a, f"gap_{second}", pair(second),
                     {"naive": "", "replay": "continual.strategy=replay; continual.replay.buffer=20%",
                      "ewc": "continual.strategy=ewc; continual.ewc.weight=30; continual.ewc.samples=128",
                      "gem": "continual.strategy=gem; continual.gem.buffer=5%",
                      "agem": "continual.strategy=agem; continual.agem.buffer=20%",
                      "distill": "continual.strategy=lwf; continual.lwf.kl=1; continual.lwf.temperature=2"},
                     ["train.max_steps=40", "eval.dense_steps=30", "eval.dense_every=2", "eval.midway=seen"])
        for v, rs in runs.items():
            before = [r.at("first", 40) for r in rs]
            inside = [max(s for step, s in r.evals["first"] if 40 < step < 80) for r in rs]
            after = [r.last("first") for r in rs]
            depth = [max(0.0, i - max(b, e)) for b, i, e in zip(before, inside, after)]
            lines.append((f"agnews -> {second}", v, stat(before), stat(inside), stat(after), stat(depth)))
    return table(("pair", "strategy", "before", "worst inside", "at the end", "depth below both ends"), lines)


def scaling(a):
    """R9: forgetting against fine-tuning loss, over ranks and steps."""
    ranks, steps = (1, 4, 16, 64), (20, 40, 60, 80, 100)
    sets = {"solutions": corpus_set("solutions"),
            "general": (corpus_set("general")[0], "base_xent", 60)}
    runs = sweep(a, "scaling", recipe(a, "scaling", sets, [("solutions", corpus("solutions"), "solutions")]),
                 {f"r{r}": f"adapter.r={r}; adapter.alpha={2 * r}" for r in ranks},
                 ["train.max_steps=100", "eval.every=20", "schedule.name=constant"])
    lines, fits = [], []
    powers = {"c P^a N^b + s": [], "a log P + b log N + s": [], "a P + b N + s": []}
    for v, rs in runs.items():
        lines.append((v, rs[0].result["trainable"], *(f"{stat(r.at('solutions', s) for r in rs)} / "
                      f"{stat(r.at('general', s) - r.at('general', 0) for r in rs)}" for s in (20, 60, 100))))
    slopes, inner = [], []
    for i in range(len(SEEDS)):
        points = [(rs[i].at("solutions", s), rs[i].at("general", s) - rs[i].at("general", 0),
                   rs[i].result["trainable"], s)
                  for rs in runs.values() for s in steps]
        slope, r2 = fit([p[0] for p in points], [p[1] for p in points])
        slopes.append(slope)
        fits.append(r2)
        inner.append(statistics.fmean(fit([p[0] for p in points[j:j + len(steps)]],
                                          [p[1] for p in points[j:j + len(steps)]])[1]
                                      for j in range(0, len(points), len(steps))))
        ys = [p[1] for p in points]
        # c P^a N^b + s: the exponents from a grid, the rest by least squares.
        grid = [k / 20 for k in range(1, 31)]
        powers["c P^a N^b + s"].append(max(fit([(p[2] / 1e5) ** u * (p[3] / 1e2) ** w for p in points], ys)[1]
                                           for u in grid for w in grid))
        powers["a log P + b log N + s"].append(fit_many([(math.log(p[2]), math.log(p[3])) for p in points], ys))
        powers["a P + b N + s"].append(fit_many([(p[2] / 1e5, p[3] / 1e2) for p in points], ys))
    text = table(("rank", "parameters", "step 20: loss / forgetting", "step 60", "step 100"), lines)
    text += f"\nForgetting = slope x loss + constant over the {len(ranks) * len(steps)} points of a seed: slope "
    text += f"{stat(slopes)}, R² {stat(fits)}; within one rank R² {stat(inner)}.\n\n"
    return text + table(("forgetting as a function of P parameters and N steps", "R²"),
                        [(k, stat(v)) for k, v in powers.items()])


def compared(a):
    """One sweep over the three tasks for two claims."""
    return sweep(a, "three", three_tasks(a, "three"),
                 {"fast": "", "slow-0.9": "continual.strategy=lae; continual.lae.decay=0.9",
                  "slow-0.98": "continual.strategy=lae; continual.lae.decay=0.98",
                  "both-0.9": "continual.strategy=lae; continual.lae.decay=0.9; continual.lae.ensemble=true",
                  "both-0.98": "continual.strategy=lae; continual.lae.decay=0.98; continual.lae.ensemble=true",
                  "lambda-0": "adapter.type=o-lora; adapter.orthogonal_lambda=0",
                  "lambda-0.5": "adapter.type=o-lora; adapter.orthogonal_lambda=0.5"})


def slow(a):
    """R27: the slow copy of the adapter, and both together, against the trained one, which is the naive run's."""
    runs = {v: rs for v, rs in compared(a).items() if not v.startswith("lambda")}
    lines = []
    for v, rs in runs.items():
        old = [statistics.fmean((r.last("agnews"), r.last("dbpedia"))) for r in rs]
        lines.append((v, stat(old), stat(r.last("trec6") for r in rs), stat(r.matrix["acc"] for r in rs)))
    return table(("deployed", "old tasks", "newest task", "ACC"), lines)


def orthogonal(a):
    """o-lora: are the subspaces orthogonal, and what is forgotten?"""
    runs = {v: rs for v, rs in compared(a).items() if not v.startswith(("slow", "both"))}
    lines = []
    for v, rs in runs.items():
        lines.append((v, "-" if v == "fast" else stat((overlap(r.path) for r in rs), 4),
                      stat(r.matrix["forgetting"] for r in rs), stat(r.matrix["learning_acc"] for r in rs),
                      stat(r.matrix["acc"] for r in rs)))
    return table(("variant (fast: one LoRA)", "mean abs. cosine of rows of A of different tasks", "forgetting",
                  "learning", "ACC"), lines)


def overlap(path):
    with open(f"{path}/adapters/{THREE[-1]}/adapter_model.safetensors", "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        header, data = json.loads(f.read(length)), f.read()
    modules = {}
    for name, entry in header.items():
        match = re.search(r"^(.*)\.lora_A\.(\d+)\.weight$", name)
        if match and "q_proj" in name:  # of each layer one module: this is plain Python
            begin, end = entry["data_offsets"]
            values = struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])
            width = entry["shape"][1]
            vectors = [values[i:i + width] for i in range(0, len(values), width)]
            norms = [math.sqrt(sum(x * x for x in v)) for v in vectors]
            modules.setdefault(match[1], []).append([[x / n for x in v] for v, n in zip(vectors, norms)])
    return statistics.fmean(abs(sum(x * y for x, y in zip(p, q))) for tasks in modules.values()
                            for first, second in itertools.combinations(tasks, 2) for p in first for q in second)


def memory(a):
    """MoRA memorises random pairs faster than LoRA at equal parameters?"""
    part = "{path: data/pairs.jsonl, format: prompt_completion}"
    sets = {"pairs": ("path: data/pairs.jsonl, format: prompt_completion", "perplexity", "all")}
    kinds = {"lora": "adapter.type=lora", "mora-sharing": "adapter.type=mora; adapter.mora_type=sharing",
             "mora-rotation": "adapter.type=mora; adapter.mora_type=rotation"}
    runs = sweep(a, "memory", recipe(a, "memory", sets, [("pairs", part, "pairs")]),
                 {f"{k}-{lr}": f"{s}; optim.lr={lr}" for k, s in kinds.items() for lr in ("2e-3", "6e-3", "2e-2")},
                 ["train.max_steps=150", "eval.every=30", "schedule.name=constant", "adapter.r=8", "adapter.alpha=16"])
    lines = [(v, rs[0].result["trainable"], *(stat(r.at("pairs", s) for r in rs) for s in (30, 60, 90, 120, 150)),
              stat(statistics.fmean(line["accuracy"] for line in r.log[-8:]) for r in rs)) for v, rs in runs.items()]
    return table(("kind and learning rate", "parameters", "NLL per token, step 30", "60", "90", "120", "150",
                  "tokens right in the last steps"), lines)


def budget(a):
    """AdaLoRA, growing and moving ranks against uniform LoRA at one final budget."""
    sets, tasks = {}, ("agnews", "clinc_domains")
    for t in tasks:
        sets[t] = (classification(t)["test"], "choice", "all")
    for t in tasks:
        sets[f"{t}_nll"] = (classification(t)["test"], "perplexity", "all")
    grown = "adapter.alpha=32; adapter.interval=5; adapter.orth_weight=0.1"
    kinds = {"lora": "adapter.type=lora; adapter.r=4; adapter.alpha=8",
             "adalora": "adapter.type=adalora; adapter.r=8; adapter.target_r=4; adapter.alpha=64; adapter.interval=5",
             "increlora": f"adapter.type=increlora; adapter.r=2; adapter.target_r=4; {grown}",
             "elalora": f"adapter.type=elalora; adapter.r=4; adapter.elastic_share=0.2; {grown}"}
    runs = sweep(a, "budget", recipe(a, "budget", sets, [(t, classification(t)["train"], t) for t in tasks]),
                 {f"{k}-{lr}": f"{s}; optim.lr={lr}" for k, s in kinds.items() for lr in ("2e-3", "5e-3", "1.5e-2")},
                 ["continual.policy=joint", "train.max_steps=70"])
    lines = [(v, stat(statistics.fmean(r.last(t) for t in tasks) for r in rs),
              stat(statistics.fmean(r.last(f"{t}_nll") for t in tasks) for r in rs)) for v, rs in runs.items()]
    return table(("kind and learning rate", "accuracy", "NLL of the labels"), lines)


def recurring(a):
    """R23: does a naive sequence over tasks that come again accumulate?"""
    sets = {t: (classification(t)["test"], "choice", "all") for t in THREE}
    tasks = [(f"{t}{'' if i == 0 else i + 1}", classification(t)["train"], t) for i in range(4) for t in THREE]
    found = sweep(a, "recurring", recipe(a, "recurring", sets, tasks),
                  {f"lr-{lr}": f"optim.lr={lr}" for lr in ("1e-3", "3e-3")},
                  ["train.max_steps=20", "schedule.name=constant"])
    lines = []
    for (v, runs), cycle in itertools.product(found.items(), range(4)):
        ends = [20 * (3 * cycle + i + 1) for i in range(3)]
        away = [[r.at(t, e) for i, t in enumerate(THREE) for j, e in enumerate(ends) if i != j] for r in runs]
        lines.append((f"{v}, {cycle + 1}",
                      stat(statistics.fmean(r.at(t, e) for t in THREE for e in ends) for r in runs),
                      stat(statistics.fmean(r.at(t, ends[i]) for i, t in enumerate(THREE)) for r in runs),
                      stat(statistics.fmean(x) for x in away)))
    return table(("rate, cycle", "mean over tasks and ends of tasks", "task just trained", "the other two"), lines)


def rewarm(a):
    """R12: a learning rate that is raised again on a new corpus."""
    sets = {"solutions": corpus_set("solutions"), "general": corpus_set("general")}
    runs = sweep(a, "rewarm", recipe(a, "rewarm", sets, [("solutions", corpus("solutions"), "solutions")]),
                 {"stay-1.5e-4": "optim.lr=1.5e-4; schedule.name=constant; schedule.warmup=0",
                  "to-1e-3": "optim.lr=1e-3", "to-3e-3": "optim.lr=3e-3",
                  "to-3e-3-at-once": "optim.lr=3e-3; schedule.warmup=0",
                  "to-3e-3-slowly": "optim.lr=3e-3; schedule.warmup=50%"},
                 ["adapter.type=full", "eval.every=4", "schedule.min_lr_ratio=0.05"])
    lines = []
    for v, rs in runs.items():
        top = lambda name: stat(max(s for _, s in r.evals[name]) - r.at(name, 0) for r in rs)
        lines.append((v, top("solutions"), stat(r.last("solutions") for r in rs), top("general"),
                      stat(r.last("general") - r.at("general", 0) for r in rs)))
    return table(("rate", "new corpus: highest rise", "loss at the end", "old corpus: highest rise", "rise at the end"),
                 lines)


def recombine(a):
    """R13: re-warming, decay and replay against training on both corpora together."""
    sets = {c: corpus_set(c) for c in ("meals", "solutions", "general")}
    tasks = [(c, corpus(c), c) for c in ("meals", "solutions")]
    runs = sweep(a, "recombine", recipe(a, "recombine", sets, tasks),
                 {"joint": "continual.policy=joint", "none": "",
                  **{f"replay-{p}": "continual.strategy=replay; continual.replay.buffer=50%; "
                                    f"continual.replay.ratio={p / 100}" for p in (5, 25)}},
                 ["adapter.type=full", "optim.lr=2e-3", "schedule.min_lr_ratio=0.05"])
    lines = [(v, *(stat(r.last(c) for r in rs) for c in ("meals", "solutions")),
              stat((r.last("meals") + r.last("solutions")) / 2 for r in rs)) for v, rs in runs.items()]
    return table(("variant", "first corpus, loss", "second corpus, loss", "mean"), lines)


def schedules(a):
    """R14: the infinite schedule against repeated cosines."""
    names = ("meals", "questions", "solutions")
    runs = sweep(a, "schedules", recipe(a, "schedules", {c: corpus_set(c) for c in names},
                                        [(c, corpus(c), c) for c in names]),
                 {"cosine-per-task": "schedule.name=cosine",
                  "cosine-once": "schedule.name=cosine; schedule.restart=continuous",
                  "infinite": "schedule.name=infinite; schedule.restart=continuous; schedule.warmup=15; "
                              "schedule.cooldown=30; schedule.constant_ratio=0.4; schedule.anneal=20%"},
                 ["adapter.type=full", "optim.lr=2e-3", "schedule.min_lr_ratio=0.05", "train.max_steps=50"])
    lines = []
    for v, rs in runs.items():
        switch = [(r.at("meals", 100) - r.at("meals", 50) + r.at("questions", 150) - r.at("questions", 100)) / 2
                  for r in rs]
        lines.append((v, stat(statistics.fmean(r.last(c) for c in names) for r in rs), stat(switch),
                      *(stat(r.last(c) for r in rs) for c in names)))
    return table(("schedule", "mean loss at the end", "rise of the last corpus' loss in the next", *names), lines)


def strategies(a):
    """R7, R10, R28: differences between strategies, run by run of the same order and seed, from table.sh's runs."""
    path = f"{a.cache}/table/sweep.json"
    if not os.path.exists(path):
        raise LookupError(path)
    with open(path, encoding="utf-8") as f:
        runs = {(r["variant"], r["order"], r["seed"]): r for r in json.load(f)["runs"] if r["finished"]}
    lines = []
    for one, other in (("l2", "naive"), ("ewc", "naive"), ("lwf", "naive"), ("l2", "ewc"), ("l2", "lwf"),
                       ("migu", "naive"), ("o-lora", "naive"), ("bank-nearest", "oracle"), ("bank-nearest", "i-lora"),
                       ("ncm", "naive"), ("ncm", "i-lora"), ("ncm", "bank-nearest")):
        pairs = [(r, runs[(other, *key[1:])]) for key, r in runs.items() if key[0] == one and (other, *key[1:]) in runs]
        differences = lambda k: stat((x[k] - y[k] for x, y in pairs), sign=True) if len(pairs) > 1 else "-"
        lines.append((f"{one} - {other}", len(pairs), *map(differences, ("acc", "forgetting", "learning_acc"))))
    base = []
    for key in (k for k in runs if k[0] == "naive"):
        with open(f"{a.cache}/{runs[key]['dir']}/matrix.json", encoding="utf-8") as f:
            base.append(statistics.fmean(json.load(f)["rows"][0]))
    text = table(("difference", "pairs", "ACC", "forgetting", "learning"), lines)
    return text + f"\nThe untouched base: {stat(base)}.\n"


CLAIMS = {"strategies": strategies, "regularise": regularise, "masks": masks, "gap": gap, "rank": rank,
          "memory": memory, "budget": budget, "orthogonal": orthogonal, "slow": slow, "scaling": scaling,
          "recurring": recurring, "schedules": schedules, "rewarm": rewarm, "recombine": recombine}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--espalier", required=True)
    p.add_argument("--data", help="folder with gsm8k/ and e2e/, needed the first time")
    p.add_argument("--cache", help="default: ${ESP_BENCH_CACHE:-~/.cache/espalier}/continual",
                   default=os.environ.get("ESP_BENCH_CACHE", os.path.expanduser("~/.cache/espalier")) + "/continual")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all runs together")
    p.add_argument("--only", default=",".join(CLAIMS), help="of " + ", ".join(CLAIMS))
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--out", help="file for the tables")
    a = p.parse_args()
    a.cache, a.espalier = os.path.abspath(a.cache), os.path.abspath(a.espalier)
    make_data(a)
    make_short(a)
    text = ""
    for name in a.only.split(","):
        try:
            part = f"## {name}\n\n{CLAIMS[name].__doc__}\n\n{CLAIMS[name](a)}\n"
        except LookupError:
            part = f"## {name}\n\n{CLAIMS[name].__doc__}\n\nNot run.\n\n"
        print(part, flush=True)
        text += part
    if a.out:
        with open(a.out, "w", encoding="utf-8") as f:
            f.write("# Claims: the numbers\n\nWritten by `bench/continual/claims.py`; what they mean: "
                    "[docs/claims.md](../../docs/claims.md). Losses are in nats per token, ± is the sample standard\n"
                    "deviation over three seeds.\n\n" + text.rstrip() + "\n")


if __name__ == "__main__":
    main()
