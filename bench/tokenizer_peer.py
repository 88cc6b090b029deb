#!/usr/bin/env python3
"""MB/s of bench/tokenizer against the `tokenizers` package in one run, alternating, one thread each:
tokenizer_peer.py BENCH_PROGRAM TOKENIZER_DIR [TOKENIZER_DIR ...] -- TEXT_FILE
Both encode the same documents (64 KiB, cut at line breaks) without special tokens; CPU time, best of the rounds."""
import json
import os
import subprocess
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer, __version__  # noqa: E402


def documents(data, size=65536):
    at = 0
    while at < len(data):
        end = min(at + size, len(data))
        nl = data.find(b"\n", end)
        end = nl + 1 if end < len(data) and nl >= 0 else len(data)
        yield data[at:end].decode("utf-8", "replace")
        at = end


def peer(path, docs, size):
    start = time.process_time()
    t = Tokenizer.from_file(path + "/tokenizer.json")
    load = time.process_time() - start
    start = time.process_time()
    tokens = sum(len(t.encode(d, add_special_tokens=False).ids) for d in docs)
    return tokens, size / (time.process_time() - start) / 1e6, load * 1e3


def main():
    split = sys.argv.index("--")
    program, dirs, text = sys.argv[1], sys.argv[2:split], sys.argv[split + 1]
    data = open(text, "rb").read()
    docs = list(documents(data))
    print(f"{len(data) / 1e6:.1f} MB in {len(docs)} documents; tokenizers {__version__}")
    print(f"{'tokenizer':24}{'espalier MB/s':>14}{'peer MB/s':>11}{'ratio':>8}{'load ms':>9}{'peer load':>11}")
    for d in dirs:
        ours, theirs, loads, peer_loads, tokens = 0, 0, [], [], set()
        for _ in range(2):
            r = json.loads(subprocess.run([program, d, text, "1"], check=True, capture_output=True).stdout)
            ours = max(ours, r["mb_per_s"])
            loads.append(r["load_ms"])
            n, speed, load = peer(d, docs, len(data))
            theirs = max(theirs, speed)
            peer_loads.append(load)
            tokens |= {n, r["tokens"]}
        same = "" if len(tokens) == 1 else f"  DIFFERENT token counts {sorted(tokens)}"
        print(f"{os.path.basename(d):24}{ours:14.1f}{theirs:11.2f}{ours / theirs:8.1f}{min(loads):9.1f}"
              f"{min(peer_loads):11.1f}{same}", flush=True)


main()
