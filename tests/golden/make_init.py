#!/usr/bin/env python3
"""Makes tests/golden/init.safetensors: first values of LoRA that PEFT takes from data or from a quantiser, and LoRA-FA.

Made with torch 2.15.0, transformers 5.23.0 and peft 0.21.2 over tests/golden/models/llama:
    python tests/golden/make_init.py
ids.k, targets.k [20]        four batches of one sequence, every token trained; loss: the mean
corda_ipm, corda_kpm, ga_*   <set>.A|B.<module>: lora_A, lora_B
eva_<r>.<module> [rank, in]  the rows of lora_A after the deal of ranks (tau 0.99); rank 0: one row of NaN
eva_<r>.batches              batches seen until everything stands still
loftq_<bits>_<iter>          <set>.W|A|B.<module>: what the base becomes, lora_A, lora_B, alpha = r
fa.losses [12], fa.*         steps of create_lorafa_optimizer (lr 1e-2) from fa.A, fa.B; fa.end.<module>: B at the end
bitsandbytes is not used: its two quantisers are written out below in torch.
"""
import dataclasses
import importlib.util
import inspect
import os
import sys
import types

if not importlib.util.find_spec("attr"):  # corda.py takes its dataclass from there
    sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)

import peft.tuners.lora.eva as eva
import peft.utils.loftq_utils as loftq_utils
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

def svd_lowrank(x, q, niter):
    """The same without its random start."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


torch.svd_lowrank = svd_lowrank
HERE = os.path.dirname(os.path.abspath(__file__))
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
out = {}


def model():
    return AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "models", "llama"), dtype=torch.float32,
                                                attn_implementation="eager")


def batches():
    g = torch.Generator().manual_seed(77)
    return [(torch.randint(0, 45, (20,), generator=g), torch.randint(0, 45, (20,), generator=g)) for _ in range(4)]


def loss_of(m, ids, targets):
    return torch.nn.functional.cross_entropy(m(input_ids=ids[None]).logits[0], targets)


def layers(m):
    return [(n.removeprefix("base_model.model."), x) for n, x in m.named_modules() if hasattr(x, "lora_A")]


def put(name, m):
    for path, x in layers(m):
        out[f"{name}.A.{path}"] = x.lora_A["default"].weight.detach().clone()
        out[f"{name}.B.{path}"] = x.lora_B["default"].weight.detach().clone()


def corda(method):
    m = model()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method=method))

    def run():
        for ids, _ in batches():
            m(input_ids=ids[None])

    preprocess_corda(m, config, run_model=run)
    put("corda_" + method, get_peft_model(m, config))


def lora_ga(name, **kw):
    m = model()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**kw))

    def step():
        for ids, targets in batches():
            loss_of(m, ids, targets).backward()

    torch.manual_seed(5)
    preprocess_loraga(m, config, step)
    put("ga_" + name, get_peft_model(m, config))


def make_eva(r, rho):
    m = model()
    seen = [0]
    exact = types.SimpleNamespace(pca=IncrementalPCA)
    eva.IncrementalPCA = lambda n_components, copy, lowrank, lowrank_seed: exact.pca(n_components=n_components, copy=copy)
    config = LoraConfig(r=r, lora_alpha=6, target_modules=TARGETS, init_lora_weights="eva",
                        eva_config=EvaConfig(rho=rho, tau=0.99, use_label_mask=False))
    data = [dict(input_ids=ids[None], attention_mask=torch.ones(1, 20, dtype=torch.long)) for ids, _ in batches()]

    def forward(m, inputs):
        seen[0] += 1
        m(**inputs)

    state = eva.get_eva_state_dict(m, data, config, forward_fn=forward, show_progress_bar=False)
    for k, v in state.items():
        out[f"eva_{r}.{k}"] = v.float() if len(v) else torch.full((1, 1), float("nan"))
    out[f"eva_{r}.batches"] = torch.tensor([seen[0] - 1], dtype=torch.int32)  # the first pass only compares inputs


NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def nf4(w):
    flat = w.reshape(-1)
    pad = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scale = pad.abs().amax(1, keepdim=True)
    code = ((pad / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[code] * scale).reshape(-1)[:len(flat)].reshape(w.shape)


def fake_bnb():
    bnb = types.SimpleNamespace(nn=types.SimpleNamespace(), functional=types.SimpleNamespace())

    def params4bit(w, **_):
        t = w.clone()
        return types.SimpleNamespace(data=t, quant_state=None, to=lambda *_: types.SimpleNamespace(data=t, quant_state=None))

    def int8(w, **_):
        scale = w.abs().amax(1)
        q = torch.round(w * (127.0 / scale[:, None]))
        p = types.SimpleNamespace(data=q, SCB=scale)
        p.to = lambda *_: p
        return p

    bnb.nn.Params4bit, bnb.nn.Int8Params = params4bit, int8
    bnb.functional.dequantize_4bit = lambda data, state: nf4(data)
    bnb.functional.int8_vectorwise_dequant = lambda data, scale: data * scale[:, None] / 127.0
    return bnb


def loftq(bits, rounds):
    source = inspect.getsource(loftq_utils.loftq_init).replace("import bitsandbytes as bnb", "pass")
    source = source.replace('compute_device = "xpu" if is_xpu_available() else "cuda"', 'compute_device = "cpu"')
    scope = dict(vars(loftq_utils), bnb=fake_bnb(), is_bnb_available=lambda: True, is_bnb_4bit_available=lambda: True,
                 clear_device_cache=lambda: None)
    exec(source, scope)
    for path, x in model().named_modules():
        if path.endswith(("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")):
            w, a, b = scope["loftq_init"](x.weight, bits, 4, rounds)
            for k, v in zip("WAB", (w, a, b)):
                out[f"loftq_{bits}_{rounds}.{k}.{path}"] = v.detach()


def lora_fa():
    import peft.optimizers.lorafa as module
    module.is_bf16_available = lambda: False  # its product in bf16 is rounded to 8 bits
    torch.manual_seed(9)
    m = get_peft_model(model(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    with torch.no_grad():
        for _, x in layers(m):
            x.lora_B["default"].weight.normal_(0, 0.05)
    put("fa", m)
    opt, losses = create_lorafa_optimizer(m, r=4, lora_alpha=6, lr=1e-2), []
    opt.param_groups[0]["eps"] = 1e-12  # it is added before the bias is corrected, elsewhere after
    for step in range(12):
        opt.zero_grad()
        loss = loss_of(m, *batches()[step % 4])
        loss.backward()
        losses.append(loss.item())
        opt.step()
    out["fa.losses"] = torch.tensor(losses)
    for path, x in layers(m):
        out["fa.end." + path] = x.lora_B["default"].weight.detach().clone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for k, (ids, targets) in enumerate(batches()):
        out[f"ids.{k}"], out[f"targets.{k}"] = ids.int(), targets.int()
    corda("ipm")
    corda("kpm")
    lora_ga("ArB2r")
    lora_ga("A2rBr", direction="A2rBr", scale="weight_svd")
    lora_ga("ArBr", direction="ArBr", scale="gd_scale")
    make_eva(3, 2.0)
    make_eva(1, 6.0)
    for bits, rounds in ((4, 1), (4, 3), (8, 2)):
        loftq(bits, rounds)
    lora_fa()
    save_file({k: v.clone().contiguous() for k, v in out.items()}, os.path.join(HERE, "init.safetensors"))
