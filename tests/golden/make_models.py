#!/usr/bin/env python3
"""Makes tests/golden/models: one tiny random model per family with logits, loss and gradients by transformers.

Made with torch 2.15.0 and transformers 5.23.0; run it again to reproduce the files byte for byte:
    python tests/golden/make_models.py
Each folder is a Hugging Face directory (config.json, model.safetensors in bf16) and expect.safetensors:
  ids, targets, cu   int32     two sequences packed in one row
  weights            fp32      loss weight per position, 0: no label
  logits [T, vocab], nll [T], loss [1]      fp32; loss = sum(weights * nll) / sum(weights)
  grad.<name>        fp32      gradient of the loss: whole for vectors; for a matrix G [out, in] (Conv1D: as stored)
                               the two projections u G and G v, with u_i = (7i % 11 - 5)/8 and v_j = (5j % 13 - 6)/8:
                               [in] in grad.<name>.u and [out] in grad.<name>.v
"""
import json
import os

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
ROTARY = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=45, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
# (folder, config as transformers 5 writes it, with theta so small that llama3 has a blended frequency; old: rewritten in the spelling of transformers 4)
MODELS = [
    ("llama", dict(model_type="llama", tie_word_embeddings=True, **ROTARY,
                   rope_parameters=dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
                                        high_freq_factor=4.0, original_max_position_embeddings=32)), False),
    ("llama_bias", dict(model_type="llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
                        **{**ROTARY, "head_dim": 12, "num_key_value_heads": 1},
                        rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.5)), True),
    ("mistral", dict(model_type="mistral", tie_word_embeddings=False, sliding_window=7, **ROTARY,
                     rope_parameters=dict(rope_type="default", rope_theta=10000.0)), True),
    ("qwen2", dict(model_type="qwen2", tie_word_embeddings=True, use_sliding_window=True, sliding_window=5,
                   max_window_layers=1, **ROTARY, rope_parameters=dict(rope_type="default", rope_theta=1e6)), False),
    ("qwen3", dict(model_type="qwen3", tie_word_embeddings=False, **{**ROTARY, "head_dim": 16},
                   rope_parameters=dict(rope_type="default", rope_theta=1e6)), False),
    ("gpt2", dict(model_type="gpt2", n_embd=24, n_layer=2, n_head=4, n_inner=36, n_positions=32, attn_pdrop=0.1, vocab_size=45,
                  scale_attn_by_inverse_layer_idx=True, bos_token_id=1, eos_token_id=2), False),
]
LENGTHS = [11, 17]


def old_spelling(path):
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling at the top, torch_dtype."""
    with open(path) as f:
        c = json.load(f)
    rope = c.pop("rope_parameters")
    c["rope_theta"] = rope.pop("rope_theta")
    c["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    c["torch_dtype"] = c.pop("dtype")
    with open(path, "w") as f:
        json.dump(c, f, indent=2, sort_keys=True)
        f.write("\n")


def make(folder, config, old, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**config)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # larger than the usual init, so that every part matters
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 and "norm" in name or "ln_" in name else 0.0))
    out = os.path.join(HERE, folder)
    os.makedirs(out, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    if old:
        old_spelling(os.path.join(out, "config.json"))
    generation = os.path.join(out, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    n = sum(LENGTHS)
    ids = torch.randint(0, config.vocab_size, (n,))
    weights = torch.ones(n)
    targets = torch.zeros(n, dtype=torch.long)
    cu = [0]
    for length in LENGTHS:
        a, b = cu[-1], cu[-1] + length
        targets[a:b - 1] = ids[a + 1:b]
        weights[b - 1] = 0.0
        cu.append(b)
    weights[:4] = 0.0  # a prompt without labels
    weights[13] = 0.5
    logits = torch.cat([model(ids[None, a:b]).logits[0] for a, b in zip(cu, cu[1:])])
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = (weights * nll).sum() / weights.sum()
    loss.backward()
    expect = dict(ids=ids.int(), targets=targets.int(), weights=weights, cu=torch.tensor(cu, dtype=torch.int32),
                  logits=logits.detach(), nll=nll.detach(), loss=loss.detach().reshape(1))
    for name, p in model.named_parameters():
        g = p.grad
        if g.ndim == 1:
            expect["grad." + name] = g
            continue
        u = (torch.arange(g.shape[0]) * 7 % 11 - 5) / 8
        v = (torch.arange(g.shape[1]) * 5 % 13 - 6) / 8
        expect["grad." + name + ".u"] = (u.double() @ g.double()).float()
        expect["grad." + name + ".v"] = (g.double() @ v.double()).float()
    save_file({k: v.contiguous() for k, v in expect.items()}, os.path.join(out, "expect.safetensors"))
    for name in os.listdir(out):
        os.chmod(os.path.join(out, name), 0o644)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for i, (folder, config, old) in enumerate(MODELS):
        make(folder, config, old, 100 + i)
