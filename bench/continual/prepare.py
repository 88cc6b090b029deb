#!/usr/bin/env python3
"""Ground for the tables of continual learning: reduced classification data and a small base trained on their texts.

    bench/continual/prepare.py --data FOLDER --espalier build/release/bin/espalier [--cache FOLDER]

FOLDER holds cl/<task>/{train,test}.jsonl with rows {"text", "label"} and cl/tasks.json, tinystories/ and instruct/.
The cache (default ${ESP_BENCH_CACHE:-~/.cache/espalier}/continual) receives

    data/<task>.{train,test}.jsonl   texts cut to --chars characters at a word's end, classes balanced
    corpus.jsonl, shape/             what the base is trained on, its tokenizer and config.json
    base/                            the base, trained by espalier itself (bench/continual/base.yaml)
    sequence.yaml                    a copy of the one beside this file: its paths are relative to the cache

Test rows are in none of the training texts. A base that is there already is kept; making it takes 4 minutes of two cores."""
import argparse
import glob
import json
import os
import random
import shutil
import subprocess
import sys

# The tasks of sequence.yaml: short words for the labels (of several tokens each, the longest would be the least likely
# whatever the text), rows of the test set.
SEQUENCE = {
    "agnews": ({"Science or Technology": "science"}, 120),
    "dbpedia": ({"Educational Institution": "school", "Office Holder": "politician", "Mean of Transportation": "vehicle",
                 "Natural Place": "nature", "Written Work": "book"}, 84),
    "trec6": ({"Numeric": "number"}, 120),
    "clinc_domains": ({"auto and commute": "car", "credit cards": "credit", "kitchen and dining": "food",
                       "small talk": "talk"}, 100),
    "yelp": ({"very negative": "bad", "very positive": "good", "negative": None, "neutral": None, "positive": None}, 120),
}
# What the base learns to answer: none of the above, with other questions and other words.
QUESTION = {"amazon": "How many stars?", "boolqa": "True or false?", "mnli": "Relation?"}
STARS = {"very negative": "one", "negative": "two", "neutral": "three", "positive": "four", "very positive": "five"}


def rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write(path, items):
    with open(path + ".part", "w", encoding="utf-8") as f:
        for item in items:
            f.write(json.dumps(item, ensure_ascii=False) + "\n")
    os.replace(path + ".part", path)


def cut(text, chars):
    """One line: the title, then the text, cut at a word's end."""
    text = " ".join(text.replace("\\n", " ").split())
    for word in ("Title: ", "Text: "):
        text = text.replace(word, "")
    return text if len(text) <= chars else text[:chars].rsplit(" ", 1)[0]


def balanced(items, n, rng):
    """n rows, of every class as many as the others where it has them."""
    by = {}
    for item in items:
        by.setdefault(item["label"], []).append(item)
    for group in by.values():
        rng.shuffle(group)
    out = []
    while len(out) < n and any(by.values()):
        for label in sorted(by):
            if by[label] and len(out) < n:
                out.append(by[label].pop())
    rng.shuffle(out)
    return out


def make_tasks(a, cl):
    rng = random.Random(20250601)
    for task, (words, test) in SEQUENCE.items():
        for split, n in (("train", a.train), ("test", test)):
            items = []
            for r in rows(f"{cl}/{task}/{split}.jsonl"):
                label = words.get(r["label"], r["label"].lower())
                if label:
                    items.append({"text": cut(r["text"], a.chars), "label": label})
            write(f"{a.cache}/data/{task}.{split}.jsonl", balanced(items, n, rng))


def make_corpus(a, cl):
    corpus = []
    for task in [*SEQUENCE, *QUESTION, "rte"]:
        corpus += [{"text": cut(r["text"], 400)} for r in rows(f"{cl}/{task}/train.jsonl")]
    for task, question in QUESTION.items():
        for r in rows(f"{cl}/{task}/train.jsonl"):
            label = STARS[r["label"]] if task == "amazon" else r["label"].lower()
            corpus.append({"text": f"{cut(r['text'], a.chars)}\n{question}\n{label}"})
    for path in sorted(glob.glob(f"{a.data}/tinystories/*.jsonl"))[:1]:
        corpus += [{"text": cut(r["text"], 1000)} for r in rows(path)[:1500]]
    random.Random(1).shuffle(corpus)
    write(f"{a.cache}/corpus.jsonl", corpus)
    return corpus


def make_shape(a, here, corpus):
    """Tokenizer and config.json of a base that has no weights yet."""
    shape = f"{a.cache}/shape"
    os.makedirs(shape, exist_ok=True)
    with open(f"{a.cache}/corpus.txt", "w", encoding="utf-8") as f:
        f.writelines(r["text"] + "\n" for r in corpus)
    bpe = os.path.join(os.path.dirname(os.path.abspath(a.espalier)), "espalier-bpe")
    subprocess.run([bpe, f"{a.cache}/corpus.txt", str(a.vocabulary), shape], check=True)
    os.remove(f"{a.cache}/corpus.txt")
    with open(f"{here}/shape.json", encoding="utf-8") as f:
        config = json.load(f)
    config["vocab_size"] = a.vocabulary
    with open(f"{shape}/config.json", "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)
    return shape


def main():
    cache = os.path.join(os.environ.get("ESP_BENCH_CACHE", os.path.expanduser("~/.cache/espalier")), "continual")
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--espalier", required=True)
    p.add_argument("--cache", default=cache)
    p.add_argument("--chars", type=int, default=120)
    p.add_argument("--train", type=int, default=1200, help="rows of a task")
    p.add_argument("--vocabulary", type=int, default=2048)
    p.add_argument("--override", action="append", default=[], help="key=value for base.yaml")
    a = p.parse_args()
    a.cache = os.path.abspath(a.cache)
    os.makedirs(os.path.join(a.cache, "data"), exist_ok=True)
    cl = os.path.join(a.data, "cl")
    make_tasks(a, cl)
    shutil.copyfile(f"{here}/sequence.yaml", f"{a.cache}/sequence.yaml")
    if not os.path.exists(f"{a.cache}/base/model.safetensors"):
        shape = make_shape(a, here, make_corpus(a, cl))
        subprocess.run([a.espalier, "run", f"{here}/base.yaml", f"model.base_model={shape}",
                        f"tasks[0].data[0].path={a.cache}/corpus.jsonl", f"after[0].merge.out={a.cache}/base",
                        "--output", f"{a.cache}/pretraining", "--overwrite", *a.override], check=True)
    print(f"{a.cache}/sequence.yaml")


if __name__ == "__main__":
    sys.exit(main())
