"""A run's merged model and its last adapter, read by transformers and PEFT: both load with no missing or unexpected key
and give the same logits (the merged model is rounded once to its stored type).

    check_merged.py BASE_DIR ADAPTER_DIR MERGED_DIR
"""
import sys

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

base_dir, adapter_dir, merged_dir = sys.argv[1:]
stored = str(AutoConfig.from_pretrained(merged_dir).dtype)
bound = 1e-5 if "float32" in stored else 2e-2  # bf16 keeps 8 bits of each merged weight
merged, info = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
adapted = PeftModel.from_pretrained(base, adapter_dir)
torch.manual_seed(0)
ids = torch.randint(0, base.config.vocab_size, (4, 48))
with torch.no_grad():
    a, b = merged(input_ids=ids).logits, adapted(input_ids=ids).logits
rel = ((a - b).abs().max() / b.abs().max()).item()
agree = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
print(f"{stored}: largest difference {rel:.2e} of the largest logit, same top token on {100 * agree:.1f}%")
sys.exit(0 if rel < bound and agree > 0.98 else 1)
