"""The least time of a training step for every named shape, from the counting backend (bench_step), as Markdown.

    python3 bench/gpu/roofline.py BUILD_DIR [--tflops 989] [--tbps 4.8] >bench/results/roofline.md
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import shapes
import training

CLASSES = [("base_matmul", "base products"), ("head_matmul", "head products"), ("thin_matmul", "adapters' products"),
           ("attention_fwd", "attention forward"), ("attention_bwd", "attention backward"),
           ("elementwise", "norms, rotations, activations"), ("loss", "loss"), ("optimizer", "optimizer")]
KINDS = ["weights", "params", "optim", "activations", "workspace"]
GOAL = 0.6


def planned(build, folder, shape):
    """What `espalier plan` says of the same step."""
    recipe = os.path.join(folder, "recipe.yaml")
    shapes.write_tokenizer(shape["config"], folder)
    shapes.write_rows(shape["config"], folder, shape["batch"], shape["seq"])
    with open(recipe, "w") as f:
        f.write(f"""name: roofline
model: {{base_model: {folder}, dtype: bf16, random_init: true}}
adapter: {{type: lora, r: 16, alpha: 32, target: all-linear}}
data: {{sequence_len: {shape["seq"]}, packing: "off", add_bos: false}}
train: {{max_steps: 1, micro_batch_size: {shape["batch"]}}}
parallel: {{device: cuda}}
tasks: [{{name: t, data: [{{path: {folder}/rows.jsonl, format: text}}]}}]
""")
    p = subprocess.run([os.path.join(build, "bin/espalier"), "plan", recipe, "--json"], capture_output=True, text=True)
    if p.returncode:
        sys.exit(p.stderr)
    return json.loads(p.stdout)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("--tflops", type=float, default=989)
    ap.add_argument("--tbps", type=float, default=4.8)
    a = ap.parse_args()
    counted, plans = {}, {}
    for name in training.ORDER:
        shape = shapes.SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            shapes.write_config(shape["config"], folder)
            p = subprocess.run([os.path.join(a.build, "bin/bench_step"), folder, str(shape["seq"]),
                                str(shape["batch"]), "16", str(a.tflops), str(a.tbps)], capture_output=True, text=True)
            plans[name] = planned(a.build, folder, shape)
        if p.returncode:
            sys.exit(f"{name}: {p.stderr}")
        counted[name] = json.loads(p.stdout)
    print(f"""# Roofline of a LoRA step

    python3 bench/gpu/roofline.py BUILD_DIR --tflops {a.tflops:g} --tbps {a.tbps:g}

Rank 16 on all linears, bf16, AdamW, nothing recomputed, every row full. Floors for {a.tflops:g} TFLOP/s of dense bf16
and {a.tbps:g} TB/s (the data sheet of an H100 or H200's matrix units and of an H200's memory). Operations and bytes are
what the counting backend counts while the engine's own step runs on it, call by call; a call's floor is the larger of
operations / rate and bytes / bandwidth. The adapters' up-projections count as products of their own, which read and
write the output once more.

| shape | sequences | TFLOP | GB moved | floor ms | tokens/s at the floor | 4N formula, GFLOP/token | tokens/s at {100 * GOAL:.0f}% of {a.tflops:g} | floor / time at {100 * GOAL:.0f}% |
|---|---|---|---|---|---|---|---|---|""")
    for name, c in counted.items():
        shape = shapes.SHAPES[name]
        each = shapes.flops_per_token(shape["config"], shape["seq"])
        floor = sum(v["floor_s"] for v in c["classes"].values())
        goal = GOAL * a.tflops * 1e12 / each
        print(f"| {name} | {shape['batch']} x {shape['seq']} | {sum(v['flops'] for v in c['classes'].values()) / 1e12:.1f} | "
              f"{sum(v['bytes'] for v in c['classes'].values()) / 1e9:.0f} | {1e3 * floor:.2f} | "
              f"{c['tokens'] / floor:,.0f} | {each / 1e9:.2f} | {goal:,.0f} | {floor * goal / c['tokens']:.2f} |")
    print("""
The last column is the share of the goal's time that the floor already takes: what is left is for everything that does
not run at the data sheet's rates.

## Where the floor is spent

| shape | """ + " | ".join(t for _, t in CLASSES) + " |")
    print("|---" * (len(CLASSES) + 1) + "|")
    for name, c in counted.items():
        floor = sum(v["floor_s"] for v in c["classes"].values())
        cells = [f"{1e3 * c['classes'][k]['floor_s']:.2f} ms, {100 * c['classes'][k]['floor_s'] / floor:.1f}%"
                 for k, _ in CLASSES]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("""
## Bound by memory

Milliseconds of the floor that bandwidth decides, how much they are of the whole, calls of a step, and the rate that the
products of the base and the head would need (of the data sheet's) for the goal if all other classes ran at their floor.

| shape | bound by memory, ms | share | calls | products' rate needed |
|---|---|---|---|---|""")
    for name, c in counted.items():
        shape = shapes.SHAPES[name]
        k = c["classes"]
        floor = sum(v["floor_s"] for v in k.values())
        by_memory = sum(v["floor_s"] for v in k.values() if v["bytes"] / (a.tbps * 1e12) > v["flops"] / (a.tflops * 1e12))
        time = c["tokens"] * shapes.flops_per_token(shape["config"], shape["seq"]) / (GOAL * a.tflops * 1e12)
        products = k["base_matmul"]["floor_s"] + k["head_matmul"]["floor_s"]
        print(f"| {name} | {1e3 * by_memory:.2f} | {100 * by_memory / floor:.0f}% | {sum(v['calls'] for v in k.values())} | "
              f"{100 * products / (time - floor + products):.0f}% |")
    print("""
## Memory

What `espalier plan` says of the device, GiB; the context and the libraries come on top of it.

| shape | planned | """ + " | ".join(KINDS) + " | context and libraries |")
    print("|---" * (len(KINDS) + 3) + "|")
    for name, p in plans.items():
        cells = [p["device_peak_bytes"], *[p["memory"][k] for k in KINDS], p["device_overhead_bytes"]]
        print(f"| {name} | " + " | ".join(f"{x / 2**30:.2f}" for x in cells) + " |")


if __name__ == "__main__":
    main()
