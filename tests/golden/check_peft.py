#!/usr/bin/env python3
"""Loads adapters that this engine saved into PEFT: no missing and no unexpected key, the same logits, the same config keys.

    ESP_PEFT_OUT=/path/out build/release/test_optim_peft_parity
    python tests/golden/check_peft.py /path/out
Every <out>/<case>/ is checked on its base of tests/golden/models against <out>/<case>.logits.safetensors.
"""
import json
import os
import sys
import warnings

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from make_peft import CASES, HERE, batches, seed_of  # noqa: E402


def check(folder, base, out, seed):
    path = os.path.join(out, folder)
    with open(os.path.join(path, "adapter_config.json")) as f:
        ours = json.load(f)
    with open(os.path.join(HERE, "peft", folder, "start", "adapter_config.json")) as f:
        theirs = json.load(f)
    if set(ours) != set(theirs):
        return f"config keys differ: {sorted(set(ours) ^ set(theirs))}"
    model = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "models", base), dtype=torch.float32,
                                                 attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT reports missing and unexpected keys as warnings
        warnings.filterwarnings("ignore", message=".*[Tt]ied.*|.*fan_in_fan_out.*|.*save_embedding.*|.*lora_bias.*|.*tie_word.*|.*rank_pattern keys.*")  # the last: AdaLoRA's own pattern
        warnings.filterwarnings("ignore", message="Unsupported layer type.*norm.*|Specified to not (save|load) vera_A.*")  # PEFT's of every norm; seeded projections
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(model, path).eval()
    file = load_file(os.path.join(path, "adapter_model.safetensors"))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(file) != set(state):
        return f"keys differ: {sorted(set(file) ^ set(state))}"
    for key in file:
        if not torch.equal(file[key], state[key]):
            return f"{key} was not loaded"
    data, cu = batches(45, seed)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=data[0][0][None, a:b]).logits[0, a - b:] for a, b in zip(cu, cu[1:])])
    want = load_file(path + ".logits.safetensors")["logits"]
    worst = ((logits - want).abs().max() / want.abs().max()).item()
    print(f"{folder:16} {len(file):3} tensors, logits differ by {worst:.2g}")
    return None if worst < 1e-4 else "logits differ"


if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = 0
    for folder, base, _, _ in CASES:
        message = check(folder, base, sys.argv[1], seed_of(folder))
        if message:
            failed += 1
            print(f"{folder}: {message}")
    sys.exit(failed != 0)
