"""Step time of every adapter kind relative to LoRA, on the processor: the 135M Llama shape with random weights, all
linear layers, bf16, one row of tokens a step; beside it PEFT's own ratio for the kinds that PEFT has.

    .peers/bin/python bench/kinds.py BUILD_DIR [--steps 7] [--rounds 2] [--tokens 512] [--peft PYTHON] [--only dora,oft]

A kind is paired with the LoRA whose rank comes nearest to its number of trained values (trained values are what
`plan` says), and both are run in turn, `rounds` times each; a run's step time is the median over its steps without the
first two. Kinds that train nothing like a rank (layers, ln_tuning, ...) are paired with LoRA r=8. Prints and writes
bench/results/kinds-135m.md. Bounds: 1.25 for kinds that are sums of products, 1.6 for dora, oft, bat, hut and hra.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(HERE, "gpu"))
import shapes  # noqa: E402

# kind: recipe keys; the ranks give between 0.6 and 5 million values on this shape
KINDS = {
    "lora": "r: 8, alpha: 16", "dora": "r: 8, alpha: 16", "adalora": "r: 12, alpha: 16",
    "loha": "r: 4, alpha: 8", "lokr": "r: 8, alpha: 8", "lotr": "r: 16", "hut": "r: 8", "pmss": "r: 32",
    "ia3": "", "vera": "r: 64", "ln_tuning": "", "bitfit": "", "mora": "r: 8", "mora_rank": "r: 8",
    "olora_cl": "r: 8, alpha: 16", "incremental_rank": "", "increlora": "r: 8, alpha: 16", "elalora": "r: 8, alpha: 16",
    "dyrank": "r: 8, alpha: 16", "miss": "r: 16", "bat": "r: 16", "hra": "r: 8", "oft": "oft_block_size: 32",
    "s2ft": "", "fish": "", "spu": "", "layers": "top_layers: 2", "prompt": "", "prefix": "",
}
SLOW = {"dora": 1.6, "oft": 1.6, "bat": 1.6, "hut": 1.6, "hra": 1.6}
SHAPE = {"bitfit": "smollm2-135m-biases"}  # kind and its LoRA on another shape
NO_TARGET = {"ln_tuning", "bitfit", "layers", "prompt", "prefix"}
PEFT = {  # PEFT's configuration of the same kind
    "lora": "LoraConfig(r=8, lora_alpha=16, target_modules=T)", "dora": "LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=T)",
    "adalora": "AdaLoraConfig(init_r=12, target_r=8, total_step=100, target_modules=T)",
    "loha": "LoHaConfig(r=4, alpha=8, target_modules=T)", "lokr": "LoKrConfig(r=8, alpha=8, target_modules=T)",
    "ia3": "IA3Config(target_modules=T, feedforward_modules=['down_proj'])", "vera": "VeraConfig(r=64, target_modules=['o_proj'])",
    "ln_tuning": "LNTuningConfig(target_modules=['input_layernorm', 'post_attention_layernorm', 'norm'])",
    "miss": "MissConfig(r=16, target_modules=T)", "bat": "MissConfig(r=16, init_weights='bat', target_modules=T)",
    "hra": "HRAConfig(r=8, target_modules=T)", "oft": "OFTConfig(oft_block_size=32, target_modules=T)",
    "prompt": "PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=20)",
    "prefix": "PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=20)",
}
PEER = """
import json, sys, time, torch, peft
from peft import *
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
T = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
folder, kinds, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
rows = json.load(open(folder + '/rows.json'))['rows']
out = {}
for kind, text in kinds.items():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = get_peft_model(model, eval(text), autocast_adapter_dtype=False).train()
        params = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(params, lr=1e-4)
        times = []
        for s in range(steps):
            ids = torch.tensor([rows[s % len(rows)]])
            t = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - t)
        out[kind] = [sorted(times[2:])[len(times[2:]) // 2], sum(p.numel() for p in params)]
    except Exception as e:
        out[kind] = [None, str(e).splitlines()[0][:100] if str(e) else type(e).__name__]
    print(json.dumps({kind: out[kind]}), flush=True)
"""


def recipe(folder, out, kind, keys, steps, seq):
    target = "" if kind in NO_TARGET else ", target: all-linear"
    keys = (", " + keys) if keys else ""
    path = os.path.join(out, f"{kind}.yaml")
    with open(path, "w") as f:
        f.write(f"name: {kind}\nmodel: {{base_model: {folder}, dtype: bf16}}\n"
                f"adapter: {{type: {kind}{keys}{target}}}\n"
                f"data: {{sequence_len: {seq + 64}}}\noptim: {{lr: 1e-4}}\nschedule: {{name: constant, warmup: 0}}\n"
                f"train: {{max_steps: {steps}, micro_batch_size: 1}}\n"
                f"tasks:\n  - {{name: t, data: [{{path: {folder}/rows.jsonl, format: text}}]}}\n"
                f"checkpoint: {{output_dir: {out}/run-{kind}}}\nparallel: {{device: cpu}}\n")
    return path


def call(command):
    return subprocess.run(command, capture_output=True, text=True)


def step_time(program, path, run):
    done = call([program, "run", path, "--quiet", "--overwrite"])
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["?"])[0]
    times = []
    for line in open(os.path.join(run, "metrics.jsonl")):
        row = json.loads(line)
        if "loss" in row:
            times.append(row["tokens"] / row["tokens_per_second"])
    return statistics.median(times[2:]), None


def main():
    p = argparse.ArgumentParser()
    p.add_argument("build")
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--peft", help="a python with torch, transformers and peft")
    p.add_argument("--only", default="")
    a = p.parse_args()
    program = os.path.join(a.build, "bin", "espalier")
    kinds = [k for k in KINDS if not a.only or k in a.only.split(",") or k == "lora"]
    lines = []
    with tempfile.TemporaryDirectory() as out:
        folders = {k: os.path.join(out, SHAPE.get(k, "smollm2-135m")) for k in kinds}
        for folder in set(folders.values()):
            if call([sys.executable, os.path.join(HERE, "gpu", "shapes.py"), os.path.basename(folder), folder, "--rows",
                     str(a.steps), "--seq", str(a.tokens)]).returncode:
                sys.exit("bench: the model could not be written")
        folder = folders["lora"]

        def trained(kind, keys):
            done = call([program, "plan", recipe(folders[kind], out, kind, keys, a.steps, a.tokens), "--json"])
            return json.loads(done.stdout)["trainable"] if done.returncode == 0 else done.stderr.strip()

        per_rank = trained("lora", "r: 1, alpha: 2")
        peers = {}
        if a.peft:
            env = dict(os.environ)
            env.pop("OPENBLAS_CORETYPE", None)
            texts = {k: PEFT[k] for k in kinds if k in PEFT}
            done = subprocess.run([a.peft, "-c", PEER, folder, json.dumps(texts), str(a.steps)], capture_output=True,
                                  text=True, env=env)
            for line in done.stdout.splitlines():
                peers.update(json.loads(line))
        base = peers.get("lora", [None])[0]
        for kind in kinds:
            n = trained(kind, KINDS[kind])
            if isinstance(n, str):
                lines.append((kind, None, None, None, None, None, n.splitlines()[-1] if n else "not there"))
                continue
            r = max(1, round(n / per_rank)) if kind not in NO_TARGET and n > per_rank // 2 else 8
            mine, its = [], []
            why = None
            for _ in range(a.rounds):
                path = recipe(folders[kind], out, "lora", f"r: {r}, alpha: {2 * r}", a.steps, a.tokens)
                its.append(step_time(program, path, os.path.join(out, "run-lora"))[0])
                path = recipe(folders[kind], out, kind, KINDS[kind], a.steps, a.tokens)
                t, why = step_time(program, path, os.path.join(out, "run-" + kind))
                mine.append(t)
                if t is None:
                    break
            if why:
                lines.append((kind, n, r, None, None, None, why))
                continue
            ratio = statistics.median([m / l for m, l in zip(mine, its)])
            peer = peers.get(kind, [None])[0]
            lines.append((kind, n, r, min(mine), ratio, peer / base if peer and base else None, ""))
            print(f"{kind:18} {n:>10,} r={r:<4} {min(mine)*1e3:8.0f} ms  {ratio:.2f} of LoRA", flush=True)
    bound = lambda k: SLOW.get(k, 1.25)
    text = ["# Step time of the kinds next to LoRA", "",
            f"    python3 bench/kinds.py BUILD_DIR --steps {a.steps} --rounds {a.rounds} --tokens {a.tokens} --peft PYTHON", "",
            f"135M Llama shape (bitfit: with biases), random weights, bf16, all linear layers, {a.tokens} tokens a step, AdamW, {os.cpu_count()} "
            f"processors ({platform.processor() or platform.machine()}). Ratio: median over {a.rounds} pairs of runs of the "
            "kind's step time over that of LoRA with the nearest number of trained values. PEFT: its own ratio to its LoRA "
            "r=8 on the same machine in the same call.", "",
            "| kind | trained | LoRA r | ms/step | ratio | bound | PEFT's ratio |", "|---|---|---|---|---|---|---|"]
    for kind, n, r, ms, ratio, peer, why in lines:
        if ratio is None:
            text.append(f"| {kind} | {n or ''} | | | not measured: {why} | | |")
        else:
            text.append(f"| {kind} | {n:,} | {r} | {ms*1e3:.0f} | {ratio:.2f}{'' if ratio <= bound(kind) else ' **above**'} | "
                        f"{bound(kind)} | {'' if peer is None else f'{peer:.2f}'} |")
    with open(os.path.join(HERE, "results", "kinds-135m.md"), "w") as f:
        f.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
