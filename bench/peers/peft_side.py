"""The peer: a plain PyTorch + PEFT LoRA fine-tune, as its users write it. One process = one measured run; prints one
JSON line. Timing starts at process start (time to first step includes imports and loading, as a user waits for it).

    peft_side.py MODEL_DIR ROWS.json --dtype bf16|fp32 --rank 16 --steps 12 --batch 4 [--threads 2] [--checkpointing]

ROWS.json: {"rows": [[token ids], ...]}, every row of equal length, every token trained but the first of a row.
"""
import time

T0 = time.time()
try:  # the real start of the process, before the interpreter
    import psutil

    T0 = psutil.Process().create_time()
except ImportError:
    pass
import argparse
import json
import resource

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ap = argparse.ArgumentParser()
ap.add_argument("model")
ap.add_argument("rows")
ap.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
ap.add_argument("--rank", type=int, default=16)
ap.add_argument("--steps", type=int, default=12)
ap.add_argument("--batch", type=int, default=4)
ap.add_argument("--threads", type=int, default=2)
ap.add_argument("--lr", type=float, default=2e-4)
ap.add_argument("--checkpointing", action="store_true")
ap.add_argument("--adapter-bf16", action="store_true", help="autocast_adapter_dtype=False")
a = ap.parse_args()

torch.set_num_threads(a.threads)
torch.set_flush_denormal(True)
torch.manual_seed(0)
dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
rows = json.load(open(a.rows))["rows"]
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype, attn_implementation="sdpa")
model.config.use_cache = False
model = get_peft_model(
    model,
    LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    autocast_adapter_dtype=not a.adapter_bf16,
)
if a.checkpointing:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
model.train()
opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr, weight_decay=0.0)
times, losses, first = [], [], None
for step in range(a.steps):
    begin = time.time()
    ids = torch.tensor([rows[(step * a.batch + i) % len(rows)] for i in range(a.batch)])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    losses.append(loss.item())
    times.append(time.time() - begin)
    if first is None:
        first = time.time() - T0
tokens = a.batch * len(rows[0])
steady = sorted(times[2:] or times)
print(
    json.dumps(
        {
            "peer": "peft",
            "dtype": a.dtype + ("-adapter-bf16" if a.adapter_bf16 else ""),
            "tokens_per_s": tokens / steady[len(steady) // 2],
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "first_step_s": first,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    )
)
