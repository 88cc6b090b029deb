#!/usr/bin/env python3
"""Merges of the `tokenizers` BPE trainer on a small generated text: make_bpe_train.py OUT.json"""
import json
import random
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

rng = random.Random(3)
WORDS = "the cat sat on a mat aaa aaaa banana bananas don't it's naïve 2024 12 été 世界 hello hello, world! x=y+1".split()
text = "".join(rng.choice(WORDS) + rng.choice((" ", " ", " ", "\n", "  ", ". ")) for _ in range(1500))
vocab = 340
t = Tokenizer(models.BPE())
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
t.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocab, show_progress=False,
                                                  special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
model = json.loads(t.to_str())["model"]
json.dump({"text": text, "vocab": vocab, "ids": model["vocab"],
           "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]},
          open(sys.argv[1], "w", encoding="utf-8"), ensure_ascii=True)
