#!/usr/bin/env python3
"""Makes tests/golden/peft: adapters, gradients, 20 training steps and target matching as PEFT does them.

Made with torch 2.15.0, transformers 5.23.0 and peft 0.21.2 over the bases of tests/golden/models:
    python tests/golden/make_peft.py [folder ...]
Each folder holds start/ (an adapter directory as PEFT saves it, with random values everywhere) and expect.safetensors:
  ids.k, targets.k, weights.k, cu    four batches of two sequences packed in one row
  logits [T, vocab]                  of batch 0 with the start adapter
  start.<name>                       of a prefix that is trained through a network: its parameters, not in the file
  grad.<key of the file>             gradient of the loss of batch 0, loss = sum(weights * nll) / sum(weights)
  losses [20], end.<key>             AdamW (lr 5e-3, 0.9, 0.999, eps 1e-4, decay 0.1 on matrices), batch = step % 4
targets.json: check_target_module_exists and get_pattern_key on a list of cases.
"""
import json
import os
import shutil
import sys
import zlib

import peft
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# (folder, base, LoraConfig or what `kind` names)
CASES = [
    ("llama", "llama", dict(r=4, lora_alpha=6, target_modules=ALL)),
    ("gpt2", "gpt2", dict(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, bias="all")),
    ("patterns", "mistral", dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], use_rslora=True,
                                 rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 6}, alpha_pattern={"v_proj": 3})),
    ("embedding", "qwen3", dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "v_proj"])),
    ("modules_to_save", "qwen3", dict(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    ("tokens_tied", "llama", dict(r=2, lora_alpha=2, target_modules=["v_proj"], trainable_token_indices=[30, 3, 12])),
    ("tokens_untied", "mistral", dict(r=2, lora_alpha=2, target_modules=["v_proj"], trainable_token_indices=[30, 3, 12])),
    ("lora_bias", "llama_bias", dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    ("bias_lora_only", "qwen2", dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], bias="lora_only")),
    ("layers", "llama", dict(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers")),
    ("pissa", "llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")),
    ("olora", "mistral", dict(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights="olora")),
    ("dora", "llama", dict(r=4, lora_alpha=6, target_modules=ALL, use_dora=True)),
    ("dora_biases", "gpt2", dict(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, use_dora=True,
                                 use_rslora=True, bias="lora_only")),
    ("vera", "llama", dict(kind="VeraConfig", r=6, target_modules=ALL, d_initial=0.3, projection_prng_key=3)),
    ("vera_seeded", "gpt2", dict(kind="VeraConfig", r=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, save_projection=False,
                                 projection_prng_key=11)),
    ("ia3", "llama", dict(kind="IA3Config", target_modules=ALL, feedforward_modules=["down_proj"])),
    ("ia3_biases", "gpt2", dict(kind="IA3Config", target_modules=["c_attn", "c_fc", "mlp.c_proj"], feedforward_modules=["mlp.c_proj", "c_attn"],
                                fan_in_fan_out=True)),
    ("ln_tuning", "qwen3", dict(kind="LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm", "q_norm"])),
    ("ln_tuning_biases", "gpt2", dict(kind="LNTuningConfig", target_modules=["ln_1", "ln_2", "ln_f"])),
    ("loha", "llama", dict(kind="LoHaConfig", r=3, alpha=24, target_modules=ALL, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 9})),
    ("lokr", "qwen3", dict(kind="LoKrConfig", r=2, alpha=8, target_modules=ALL, rank_pattern={"v_proj": 4})),
    ("lokr_both", "mistral", dict(kind="LoKrConfig", r=1, alpha=4, target_modules=["q_proj", "gate_proj", "down_proj"],
                                  decompose_both=True, decompose_factor=12)),
    ("miss", "llama", dict(kind="MissConfig", r=5, target_modules=ALL)),
    ("miss_mini", "qwen3", dict(kind="MissConfig", r=3, mini_r=4, init_weights="mini", target_modules=ALL)),
    ("miss_bat", "mistral", dict(kind="MissConfig", r=4, init_weights="bat", target_modules=ALL)),
    ("hra", "llama", dict(kind="HRAConfig", r=4, target_modules=ALL)),
    ("hra_gs", "qwen3", dict(kind="HRAConfig", r=2, apply_GS=True, init_weights=False, target_modules=["q_proj", "up_proj", "down_proj"])),
    ("oft", "llama", dict(kind="OFTConfig", oft_block_size=12, target_modules=ALL)),
    ("oft_exact", "qwen3", dict(kind="OFTConfig", oft_block_size=4, use_cayley_neumann=False, target_modules=ALL)),
    ("oft_shared", "mistral", dict(kind="OFTConfig", oft_block_size=8, num_cayley_neumann_terms=3, block_share=True, target_modules=["q_proj", "v_proj", "up_proj"])),
    ("oft_blocks", "mistral", dict(kind="OFTConfig", r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"])),
    ("coft", "llama", dict(kind="OFTConfig", oft_block_size=12, coft=True, eps=1.0, num_cayley_neumann_terms=7, target_modules=["q_proj", "gate_proj", "down_proj"])),
    ("adalora", "llama", dict(kind="AdaLoraConfig", init_r=4, target_r=2, lora_alpha=30, target_modules=ALL, total_step=20, tinit=3,
                              tfinal=0, deltaT=2)),
    ("adalora_final", "qwen3", dict(kind="AdaLoraConfig", init_r=4, target_r=1, lora_alpha=30, target_modules=ALL, total_step=20,
                                    tinit=3, tfinal=5, deltaT=3, orth_reg_weight=0.0)),
    ("prompt", "qwen3", dict(kind="PromptTuningConfig", num_virtual_tokens=5)),
    ("prompt_positions", "gpt2", dict(kind="PromptTuningConfig", num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")),
    ("prefix", "llama", dict(kind="PrefixTuningConfig", num_virtual_tokens=4)),
    ("prefix_norms", "qwen3", dict(kind="PrefixTuningConfig", num_virtual_tokens=5)),
    ("prefix_positions", "gpt2", dict(kind="PrefixTuningConfig", num_virtual_tokens=3)),
    ("prefix_window", "mistral", dict(kind="PrefixTuningConfig", num_virtual_tokens=4, init_weights="zero")),
    ("prefix_projection", "qwen3", dict(kind="PrefixTuningConfig", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=20)),
]
LENGTHS = [11, 17]


def seed_of(folder):
    at = [case[0] for case in CASES].index(folder)
    return 200 + (at if at < 12 else zlib.crc32(folder.encode()) % 1000)


def batches(vocab, seed):
    g = torch.Generator().manual_seed(seed)
    out, n, cu = [], sum(LENGTHS), [0]
    for length in LENGTHS:
        cu.append(cu[-1] + length)
    for _ in range(4):
        ids = torch.randint(0, vocab, (n,), generator=g)
        ids[2::9] = 30
        ids[5::7] = 12
        weights, targets = torch.ones(n), torch.zeros(n, dtype=torch.long)
        for a, b in zip(cu, cu[1:]):
            targets[a:b - 1] = ids[a + 1:b]
            weights[b - 1] = 0.0
        weights[:3] = 0.0
        weights[13] = 0.5
        out.append((ids, targets, weights))
    return out, cu


def forward(model, batch, cu):
    ids, targets, weights = batch
    logits = torch.cat([model(input_ids=ids[None, a:b]).logits[0, a - b:] for a, b in zip(cu, cu[1:])])
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return logits, (weights * nll).sum() / weights.sum()


def penalty(model):
    """What AdaLoraModel.forward adds to a loss."""
    ids = torch.arange(5)[None]
    return model.base_model(input_ids=ids, labels=ids).loss - model.base_model.model(input_ids=ids, labels=ids).loss


def file_state(model, values):
    """The keys of the adapter file, with the given tensors (by parameter name) in the place of the parameters."""
    if model.active_peft_config.is_prompt_learning:
        if getattr(model.active_peft_config, "prefix_projection", False):  # trained through a network: not in the file
            return {k.replace(".default", ""): v for k, v in values.items()}
        return {"prompt_embeddings": values["prompt_encoder.default.embedding.weight"]}
    state = model.state_dict()
    state = {k: values.get(k, torch.zeros_like(v)) for k, v in state.items()}
    return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


def make(folder, base, config, seed):
    torch.manual_seed(seed)
    out = os.path.join(HERE, "peft", folder)
    shutil.rmtree(out, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "models", base), dtype=torch.float32,
                                                 attn_implementation="eager")
    kind = config.get("kind", "LoraConfig")
    rewrites = "init_lora_weights" in config  # the base gives way to the start, which is kept near
    first = {"init_lora_weights": False} if kind == "LoraConfig" else {}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **{**first, **{k: v for k, v in config.items() if k != "kind"}})
    model = get_peft_model(model, config).train()  # no dropout in any base
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not rewrites:
                p.add_(torch.randn_like(p) * 0.1)
            elif p.requires_grad:
                p.mul_(1.0 + 0.2 * torch.randn_like(p))
    config.base_model_name_or_path = base
    if kind == "LoraConfig":
        config.init_lora_weights = config.init_lora_weights if rewrites else True
    model.save_pretrained(os.path.join(out, "start"))
    os.remove(os.path.join(out, "start", "README.md"))
    data, cu = batches(45, seed)
    logits, loss = forward(model, data[0], cu)
    expect = dict(cu=torch.tensor(cu, dtype=torch.int32), logits=logits.detach())
    if config.is_prompt_learning and getattr(config, "prefix_projection", False):
        values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        expect.update({"start." + k: v.clone() for k, v in file_state(model, values).items()})
    for k, (ids, targets, weights) in enumerate(data):
        expect.update({f"ids.{k}": ids.int(), f"targets.{k}": targets.int(), f"weights.{k}": weights})
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expect.update({"grad." + k: v for k, v in file_state(model, grads).items()})
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=0.1),
              dict(params=[p for p in trained if p.ndim == 1], weight_decay=0.0)]
    opt, losses = torch.optim.AdamW(groups, lr=5e-3, eps=1e-4), []
    adalora, trace, kept = kind == "AdaLoraConfig", [], 0
    for step in range(20):
        opt.zero_grad()
        _, loss = forward(model, data[step % 4], cu)
        (loss + penalty(model) if adalora else loss).backward()
        losses.append(loss.item())
        opt.step()
        if adalora:  # of step, budget and kept ranks
            ranks = model.base_model.rankallocator
            kept = kept or ranks.init_bgt
            model.base_model.update_and_allocate(step + 1)
            if model.peft_config["default"].rank_pattern:
                kept = sum(sum(v) for v in model.peft_config["default"].rank_pattern.values())
            trace.append([step + 1, ranks.budget_schedule(step + 1)[0], kept])
    expect["losses"] = torch.tensor(losses)
    if trace:
        expect["trace"] = torch.tensor(trace, dtype=torch.int32)
    end = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    expect.update({"end." + k: v for k, v in file_state(model, end).items()})
    save_file({k: v.clone().contiguous() for k, v in expect.items()}, os.path.join(out, "expect.safetensors"))
    for root, _, names in os.walk(out):
        for name in names:
            os.chmod(os.path.join(root, name), 0o644)


PATHS = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
         "model.layers.10.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj",
         "model.layers.1.mlp.xq_proj", "model.norm", "lm_head", "layers.3.attn.c_attn", "h.0.attn.c_proj",
         "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_proj", "encoder.block.4.layer.1.q_proj", "q_proj"]
TARGETS = [
    dict(target_modules=["q_proj"]), dict(target_modules=["self_attn.q_proj", "lm_head"]), dict(target_modules=["proj"]),
    dict(target_modules=["layers.1.self_attn.q_proj"]), dict(target_modules=["model.layers.1.self_attn.q_proj", "c_attn"]),
    dict(target_modules=r".*\.(q|k)_proj"), dict(target_modules=r"q_proj"), dict(target_modules=r"model\.layers\.\d\..*proj"),
    dict(target_modules=r"(?!.*mlp).*_proj"), dict(target_modules=["q_proj", "k_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]), dict(target_modules=["q_proj"], exclude_modules=r".*layers\.1\..*"),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]), dict(target_modules=["q_proj"], layers_to_transform=[0, 10, 4]),
    dict(target_modules=["c_attn", "c_proj"], layers_to_transform=[1], layers_pattern="h"),
    dict(target_modules=["c_attn", "c_proj"], layers_to_transform=[0, 3], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj"], layers_to_transform=[4], layers_pattern="block"),
    dict(target_modules=["model.layers.0.self_attn.q_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["self_attn"]),
    dict(target_modules=["norm", "embed_tokens"]), dict(target_modules=["q_proj"], exclude_modules=["q"]),
]
PATTERNS = [["q_proj"], ["layers.1.self_attn.q_proj"], ["proj", "q_proj"], [r"layers\.1.*", "q_proj"], [".*_proj"], ["^model.layers.0.self_attn.q_proj"],
            ["self_attn.q_proj", "q_proj"], ["layers.1"], [r".*layers\.(0|2)\..*", "c_(attn|proj)"]]


def targets():
    out = dict(paths=PATHS, cases=[], patterns=[])
    for case in TARGETS:
        config = LoraConfig(**case)
        if isinstance(config.target_modules, set):
            config.target_modules = set(case["target_modules"])
        hits = [bool(check_target_module_exists(config, p)) for p in PATHS]
        out["cases"].append(dict(config=case, hits=[int(h) for h in hits]))
    for keys in PATTERNS:
        out["patterns"].append(dict(keys=keys, found=[keys.index(k) if (k := get_pattern_key(keys, p)) in keys else -1 for p in PATHS]))
    with open(os.path.join(HERE, "peft", "targets.json"), "w") as f:
        json.dump(out, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        if len(sys.argv) == 1 or case[0] in sys.argv[1:]:
            make(*case, seed_of(case[0]))
    if len(sys.argv) == 1:
        targets()
