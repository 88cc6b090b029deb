"""What claims.py stands on: its data and tasks, recipes, sweeps and what they measured, means and fits."""
import json
import math
import os
import random
import statistics
import subprocess

from prepare import balanced, cut

SEEDS = (1, 2, 3)
QUESTION = {"agnews": "What topic?", "dbpedia": "What is it?", "trec6": "What kind of answer?",
            "clinc_domains": "Which domain?", "yelp": "Good or bad?"}
THREE = ("agnews", "dbpedia", "trec6")
FIVE = (*THREE, "clinc_domains", "yelp")
# More and shorter tasks: (data, question, words of the labels). Those of the other data (sst2full, mnli, rte, boolqa)
# are not learnt by this base: after 60 steps it answers them as often right as by chance.
SHORT = {
    "persons": ("dbpedia", "Who or what?", {"Artist": "artist", "Athlete": "athlete", "Office Holder": "politician",
                                            "Company": "company", "Educational Institution": "school"}),
    "questions": ("trec6", "What is asked for?", {"Numeric": "number", "Location": "location", "Human": "human"}),
    "pages": ("agnews", "Which pages?", {"World": "world", "Sports": "sports"}),
    "money": ("clinc_domains", "Whose help?", {"banking": "banking", "credit cards": "credit", "work": "work",
                                               "travel": "travel", "auto and commute": "car"}),
    "reviews": ("amazon", "Worth it?", {"very positive": "great", "very negative": "awful"}),
    "works": ("dbpedia", "Of what kind?", {"Animal": "animal", "Plant": "plant", "Album": "album", "Film": "film",
                                           "Written Work": "book"}),
    "news": ("agnews", "News of what?", {"Business": "business", "Science or Technology": "science"}),
    "house": ("clinc_domains", "About what?", {"home": "home", "kitchen and dining": "food", "utility": "utility",
                                               "small talk": "talk", "meta": "meta"}),
    "places": ("dbpedia", "Which thing?", {"Mean of Transportation": "vehicle", "Building": "building",
                                           "Natural Place": "nature", "Village": "village"}),
    "answers": ("trec6", "Asked how?", {"Description": "description", "Entity": "entity"}),
    "places_to_eat": ("yelp", "Any good?", {"very positive": "good", "very negative": "bad"}),
}
TUNING = ("works", "reviews", "house", "questions", "news")


# ---- ground -------------------------------------------------------------------------------------------------------

def rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write(path, items):
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    os.replace(path + ".part", path)


def make_data(a):
    """Halves of one task, random pairs, and corpora of text, in CACHE/claims/data."""
    folder = f"{a.cache}/claims/data"
    if os.path.exists(f"{folder}/general.jsonl"):
        return
    if not a.data:
        raise SystemExit("claims.py: the first time --data must name the folder that holds gsm8k/ and e2e/")
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "test"):
        items = rows(f"{a.cache}/data/agnews.{split}.jsonl")
        for half in (0, 1):
            write(f"{folder}/agnews_{'ab'[half]}.{split}.jsonl", items[half::2])
        solved = rows(f"{a.data}/gsm8k/{split}.jsonl")[:900 if split == "train" else 60]
        write(f"{folder}/questions.{split}.jsonl", [{"text": r["prompt"]} for r in solved])
        write(f"{folder}/solutions.{split}.jsonl", [{"text": r["completion"]} for r in solved])
    # Four short sentences a row, so that this corpus has as many tokens as the others, about. Answers to one question
    # are kept together: none is in both parts but where two questions have the same answer.
    lines = [r["completion"] for r in rows(f"{a.data}/e2e/train.jsonl")]
    meals = [{"text": " ".join(lines[i:i + 4])} for i in range(0, len(lines) - 3, 4)]
    write(f"{folder}/meals.train.jsonl", meals[:900])
    write(f"{folder}/meals.test.jsonl", meals[-60:])
    rng = random.Random(3)
    word = lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))
    write(f"{folder}/pairs.jsonl", [{"prompt": word() + " ", "completion": word()} for _ in range(160)])
    corpus = [r for r in rows(f"{a.cache}/corpus.jsonl") if 150 < len(r["text"]) < 400]
    write(f"{folder}/general.jsonl", corpus[:60])


def make_short(a):
    """The tasks of SHORT, as prepare.py makes its own, in CACHE/claims/data."""
    folder = f"{a.cache}/claims/data"
    if os.path.exists(f"{folder}/places_to_eat.test.jsonl"):
        return
    if not a.data:
        raise SystemExit("claims.py: the first time --data must name the folder that holds cl/")
    rng = random.Random(20250602)
    for name, (task, _, words) in SHORT.items():
        for split, n in (("train", 600), ("test", 100)):
            items = [{"text": cut(r["text"], 120), "label": words[r["label"]]}
                     for r in rows(f"{a.data}/cl/{task}/{split}.jsonl") if r["label"] in words]
            write(f"{folder}/{name}.{split}.jsonl", balanced(items, n, rng))


# ---- recipes and runs ---------------------------------------------------------------------------------------------

def classification(name, data=None):
    folder = f"data/{data or name}" if data or name in SHORT else f"../data/{name}"
    template = json.dumps("{text}\n" + (SHORT[name][1] if name in SHORT else QUESTION[name]) + "\n")
    return {"train": f"{{path: {folder}.train.jsonl, format: classification, prompt_template: {template}}}",
            "test": f"path: {folder}.test.jsonl, format: classification, prompt_template: {template}"}


def recipe(a, name, sets, tasks):
    """sets: {name: (test part, metric, limit)}; tasks: [(name, train part, evaluation set)]."""
    path = f"{a.cache}/claims/{name}.yaml"
    text = f"""name: {name}
model: {{base_model: ../base, dtype: bf16}}
adapter: {{type: lora, r: 16, alpha: 32, target: all-linear}}
data: {{sequence_len: 128, packing: bfd, overlong: truncate_end}}
optim: {{name: adamw, lr: 2e-3, max_grad_norm: 1.0}}
schedule: {{name: cosine, warmup: 10%, min_lr_ratio: 0.1}}
train: {{max_steps: 60, micro_batch_size: 8}}
eval:
  midway: all
  sets:
"""
    for set_name, (part, metric, limit) in sets.items():
        text += f"    - {{name: {set_name}, {part}, metric: {metric}, limit: {limit}}}\n"
    text += "tasks:\n"
    for task, part, evaluated in tasks:
        text += f"  - {{name: {task}, data: [{part}], eval: {evaluated}}}\n"
    text += "log: {every: 20, to: [jsonl]}\ncheckpoint: {every: task, keep: 1}\n"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def corpus(name):
    return f"{{path: data/{name}.train.jsonl, format: text}}"


def corpus_set(name):
    return (f"path: data/{name}.{'test.' if name != 'general' else ''}jsonl, format: text", "perplexity", 60)


class Run:
    """One run's measurements: evaluations {set: [(step, score)]} in the order of time, and the training log."""

    def __init__(self, path):
        self.path, self.evals, self.log, self.rows = path, {}, [], []
        for line in rows(f"{path}/metrics.jsonl"):
            if "eval" in line:
                score = math.log(line["score"]) if line["metric"] == "perplexity" else line["score"]
                self.evals.setdefault(line["eval"], []).append((line["step"], score))
            elif "loss" in line:
                self.log.append(line)
        with open(f"{path}/matrix.json", encoding="utf-8") as f:
            self.matrix = json.load(f)
        with open(f"{path}/result.json", encoding="utf-8") as f:
            self.result = json.load(f)

    def at(self, name, step):
        return next(score for s, score in self.evals[name] if s == step)

    def last(self, name):
        return self.evals[name][-1][1]


def sweep(a, name, recipe_path, variants, common=(), seeds=SEEDS, orders=()):
    """Trains what is missing; {variant: [Run of each order and seed]}, with --report of the complete ones."""
    out = f"{a.cache}/claims/{name}"
    if not a.report:
        command = [a.espalier, "sweep", recipe_path, *common, "--out", out, "--jobs", str(a.jobs), "--threads",
                   str(a.threads), "--seeds", ",".join(map(str, seeds)),
                   *(word for order in orders for word in ("--order", ",".join(order))),
                   "--set", " | ".join(f"{v}: {k}" for v, k in variants.items()), "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = {}
    for variant in variants:
        for order in range(max(1, len(orders))):
            for seed in seeds:
                names = [f"order{order + 1}.s{seed}"] + [f"s{seed}"] * (len(orders) < 2)
                if len(seeds) == 1:
                    names.append(f"order{order + 1}" if orders else "")
                for part in names:
                    folder = f"{out}/{variant}{'.' if part else ''}{part}"
                    if os.path.exists(f"{folder}/result.json"):
                        found.setdefault(variant, []).append(Run(folder))
    found = {v: runs for v, runs in found.items() if len(runs) == len(seeds) * max(1, len(orders))}
    if not found:
        raise LookupError(name)
    return found


# ---- numbers and tables -------------------------------------------------------------------------------------------

def stat(values, digits=3, sign=False):
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{'+' if sign else ''}.{digits}f} ±{spread:.{digits}f}"


def table(head, lines):
    text = "| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|\n"
    return text + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def fit(xs, ys):
    """Least squares y = a x + b; slope, R^2."""
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)
    rest = sum((y - my - slope * (x - mx)) ** 2 for x, y in zip(xs, ys))
    return slope, 1 - rest / sum((y - my) ** 2 for y in ys)


def solve(matrix, right):
    n = len(right)
    m = [row[:] + [right[i]] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(m[r][i]))
        m[i], m[pivot] = m[pivot], m[i]
        for r in range(n):
            if r != i:
                factor = m[r][i] / m[i][i]
                m[r] = [x - factor * y for x, y in zip(m[r], m[i])]
    return [m[i][n] / m[i][i] for i in range(n)]


def fit_many(features, ys):
    """R^2 of least squares on several features with a constant."""
    x = [[1.0, *f] for f in features]
    n = len(x[0])
    beta = solve([[sum(r[i] * r[j] for r in x) for j in range(n)] for i in range(n)],
                 [sum(r[i] * y for r, y in zip(x, ys)) for i in range(n)])
    predicted = [sum(b * v for b, v in zip(beta, r)) for r in x]
    mean = statistics.fmean(ys)
    return 1 - sum((y - p) ** 2 for y, p in zip(ys, predicted)) / sum((y - mean) ** 2 for y in ys)
