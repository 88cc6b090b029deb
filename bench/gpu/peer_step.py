"""The peer on one device: a PyTorch + PEFT LoRA fine-tune as its users write it (SDPA attention, fused AdamW, the loss
of transformers). One process is one measured run.

    peer_step.py FOLDER [--device cuda] [--dtype bf16] [--steps 8] [--batch 2] [--compile none|model|layers]
                 [--adapter-bf16] [--adapter DIR]

FOLDER is what shapes.py writes. Prints one line of JSON per step (the loss) and a last one with the figures. The
driver takes the time to the first step from outside, from the start of the process.
"""
import argparse
import json
import time

ap = argparse.ArgumentParser()
ap.add_argument("folder")
ap.add_argument("--device", default="cuda")
ap.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
ap.add_argument("--rank", type=int, default=16)
ap.add_argument("--steps", type=int, default=8)
ap.add_argument("--batch", type=int, default=2)
ap.add_argument("--lr", type=float, default=2e-4)
ap.add_argument("--compile", default="none", choices=["none", "model", "layers"])
ap.add_argument("--checkpointing", action="store_true")
ap.add_argument("--adapter-bf16", action="store_true", help="autocast_adapter_dtype=False")
ap.add_argument("--adapter", help="start from this PEFT adapter instead of a new one")
a = ap.parse_args()

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
torch.set_flush_denormal(True)
cuda = a.device.startswith("cuda")
dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
with open(f"{a.folder}/rows.json") as f:
    rows = torch.tensor(json.load(f)["rows"], device=a.device)
model = AutoModelForCausalLM.from_pretrained(a.folder, dtype=dtype, attn_implementation="sdpa",
                                             device_map={"": a.device})
model.config.use_cache = False
if a.adapter:
    model = peft.PeftModel.from_pretrained(model, a.adapter, is_trainable=True,
                                           autocast_adapter_dtype=not a.adapter_bf16)
else:
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=not a.adapter_bf16,
    )
model.train()
if a.checkpointing:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
params = [p for p in model.parameters() if p.requires_grad]
opt = torch.optim.AdamW(params, lr=a.lr, weight_decay=0.0, fused=cuda)
if a.compile == "layers":
    for layer in model.get_base_model().model.layers:
        layer.compile()
forward = torch.compile(model) if a.compile == "model" else model


def wait():
    if cuda:
        torch.cuda.synchronize()


times, losses = [], []
for step in range(a.steps):
    wait()
    begin = time.perf_counter()
    ids = rows[torch.arange(step * a.batch, (step + 1) * a.batch) % len(rows)]
    loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
    losses.append(loss.item())
    wait()
    times.append(time.perf_counter() - begin)
    print(json.dumps({"event": "step", "step": step + 1, "loss": losses[-1], "seconds": times[-1]}), flush=True)
steady = sorted(times[min(3, a.steps - 1):])
seconds = steady[len(steady) // 2]
out = {
    "event": "result",
    "tokens_per_s": a.batch * rows.shape[1] / seconds,
    "step_s": seconds,
    "losses": losses,
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
}
if cuda:
    out["allocated_bytes"] = torch.cuda.max_memory_allocated()
    out["reserved_bytes"] = torch.cuda.max_memory_reserved()
print(json.dumps(out), flush=True)
