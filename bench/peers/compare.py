"""The same LoRA fine-tune in espalier and in PyTorch + PEFT, alternating: tokens/s, peak resident memory and time to the
first finished step, as ratios. Same model directory, same token ids, batch, sequence length, rank, targets, dtype.

    python -m venv .peers && .peers/bin/pip install -r bench/peers/requirements.txt
    .peers/bin/python bench/peers/compare.py --rounds 3 [--shape 135m|tiny] [--out bench/results/peers.json]

The model has random weights of the given shape. Its tokenizer knows every id as an added token "<|id|>", so that the
JSONL text of the recipe and the rows given to the peer are the same ids by construction. Peak memory is the kernel's
ru_maxrss of each process; time to the first step runs from the start of the process.
"""
import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHAPES = {
    "135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, rope_theta=100000.0),
    "tiny": dict(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, rope_theta=10000.0),
}


def make_inputs(folder, shape, seq, rows, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    random.seed(0)
    vocab = shape["vocab_size"]
    config = LlamaConfig(**shape, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
                         bos_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.save_pretrained(folder)
    # a byte-level BPE without merges; ids 2.. beyond the byte letters are added tokens
    letters = bytes_to_unicode()
    base = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}
    added = [{"id": i, "content": c, "special": True} for i, c in enumerate(("<s>", "</s>"))]
    added += [{"id": i, "content": f"<|{i}|>", "special": False} for i in range(len(base), vocab)]
    for a in added:
        a.update(single_word=False, lstrip=False, rstrip=False, normalized=False)
    json.dump(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": base,
                      "merges": []},
        },
        open(os.path.join(folder, "tokenizer.json"), "w"),
    )
    json.dump({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"},
              open(os.path.join(folder, "tokenizer_config.json"), "w"))
    ids = [[random.randrange(len(base), vocab) for _ in range(seq - 1)] + [1] for _ in range(rows)]
    json.dump({"rows": ids}, open(os.path.join(folder, "rows.json"), "w"))
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        for row in ids:
            f.write(json.dumps({"text": "".join(f"<|{i}|>" for i in row[:-1])}) + "\n")


def bytes_to_unicode():
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters, n = [chr(b) for b in keep], 0
    for b in range(256):
        if b not in keep:
            letters.append(chr(256 + n))
            n += 1
    return letters


def measured(command, on_line=None):
    """Runs a process; returns its stdout, peak RSS in bytes, and what on_line saw."""
    start = time.time()
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines, first = [], None
    for line in p.stdout:
        lines.append(line)
        if first is None and on_line and on_line(line):
            first = time.time() - start
    err = p.stderr.read()
    _, status, usage = os.wait4(p.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{err[-2000:]}")
    return lines, usage.ru_maxrss * 1024, first


def espalier(folder, a, dtype):
    run = os.path.join(folder, "run")
    recipe = os.path.join(folder, "recipe.yaml")
    with open(recipe, "w") as f:
        f.write(f"""name: peer
seed: 1
model: {{base_model: {folder}, dtype: {dtype}}}
adapter: {{type: lora, r: {a.rank}, alpha: {2 * a.rank}, target: all-linear}}
data: {{sequence_len: {a.seq}, packing: "off", add_bos: false, shuffle: false}}
optim: {{name: adamw, lr: 2e-4, max_grad_norm: 1.0}}
schedule: {{name: constant}}
train: {{max_steps: {a.steps}, micro_batch_size: {a.batch}}}
parallel: {{threads: {a.threads}}}
tasks: [{{name: t, data: [{{path: {folder}/rows.jsonl, format: text}}]}}]
checkpoint: {{output_dir: {run}}}
""")
    lines, rss, first = measured([a.espalier, "run", recipe, "--overwrite", "--json"],
                                 lambda s: '"loss"' in s)
    rows = [json.loads(s) for s in open(os.path.join(run, "metrics.jsonl"))]
    rows = [r for r in rows if "loss" in r]
    speeds = sorted(r["tokens_per_second"] for r in rows[2:])
    return {"peer": "espalier", "dtype": dtype, "tokens_per_s": speeds[len(speeds) // 2], "peak_rss": rss,
            "first_step_s": first, "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}


def peft(folder, a, dtype, extra=()):
    command = [sys.executable, os.path.join(ROOT, "bench/peers/peft_side.py"), folder,
               os.path.join(folder, "rows.json"), "--dtype", dtype, "--rank", str(a.rank), "--steps", str(a.steps),
               "--batch", str(a.batch), "--threads", str(a.threads), *extra]
    lines, rss, _ = measured(command)
    out = json.loads(lines[-1])
    out["peak_rss"] = rss
    return out


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--shape", default="135m", choices=SHAPES)
    ap.add_argument("--seq", type=int, default=512)
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--rank", type=int, default=16)
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--espalier", default=os.path.join(ROOT, "build/release/bin/espalier"))
    ap.add_argument("--skip-fp32", action="store_true")
    ap.add_argument("--out")
    a = ap.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as top:
        for dtype in ["bf16"] + ([] if a.skip_fp32 else ["fp32"]):
            folder = os.path.join(top, dtype)
            os.mkdir(folder)
            make_inputs(folder, SHAPES[a.shape], a.seq, a.batch * a.steps, dtype)
            sides = [lambda: espalier(folder, a, dtype), lambda: peft(folder, a, dtype)]
            if dtype == "bf16":
                sides.append(lambda: peft(folder, a, dtype, ["--adapter-bf16"]))
            for _ in range(a.rounds if dtype == "bf16" else 1):
                for side in sides:
                    results.append(side())
                    print(json.dumps(results[-1]), flush=True)
    table = {}
    for r in results:
        table.setdefault((r["peer"], r["dtype"]), []).append(r)
    summary = {f"{p} {d}": {k: median([r[k] for r in rs]) for k in ("tokens_per_s", "peak_rss", "first_step_s")}
               for (p, d), rs in table.items()}
    print(f"\n{'':26}{'tokens/s':>10}{'peak MiB':>10}{'first step s':>14}")
    for name, s in summary.items():
        print(f"{name:26}{s['tokens_per_s']:10.0f}{s['peak_rss'] / 2**20:10.0f}{s['first_step_s']:14.2f}")
    ours = summary["espalier bf16"]
    peers = {n: s for n, s in summary.items() if n.startswith("peft")}
    best = max(peers, key=lambda n: peers[n]["tokens_per_s"])
    ratios = {"better_peer": best, "speed": ours["tokens_per_s"] / peers[best]["tokens_per_s"],
              "memory": ours["peak_rss"] / peers[best]["peak_rss"],
              "first_step": ours["first_step_s"] / peers[best]["first_step_s"]}
    print(f"\nespalier bf16 / {best}: {ratios['speed']:.2f}x the tokens/s, {ratios['memory']:.2f}x the memory, "
          f"{ratios['first_step']:.3f}x the time to the first step")
    if a.out:
        json.dump({"command": "bench/peers/compare.py " + " ".join(sys.argv[1:]), "machine": platform.processor() or
                   platform.machine(), "shape": SHAPES[a.shape], "results": results, "summary": summary,
                   "ratios": ratios}, open(a.out, "w"), indent=1)


main()
