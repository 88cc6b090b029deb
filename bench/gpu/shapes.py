"""Named model shapes, and folders with random weights, a tokenizer and rows of tokens for both sides of a comparison.

    python3 bench/gpu/shapes.py SHAPE FOLDER [--rows N] [--seq S] [--device cuda]

Writes config.json, model.safetensors (bf16; normal 0.02, norms 1), tokenizer.json, rows.json (token ids) and
rows.jsonl (the same ids as text). Sizes are those of the published models' config.json. The tokenizer's vocabulary is
words of letters and it takes a whole word where there is one (`ignore_merges`, as Llama 3's does), so that text and ids
are the same by construction.
"""
import argparse
import json
import os
import random
import struct

LLAMA3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def llama(hidden, ffn, layers, heads, kv, vocab, theta, tied, eps=1e-5, head_dim=None, rope=None, positions=131072):
    c = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, intermediate_size=ffn,
             num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab,
             rope_theta=theta, tie_word_embeddings=tied, rms_norm_eps=eps, max_position_embeddings=positions,
             hidden_act="silu", attention_bias=False, mlp_bias=False, head_dim=head_dim or hidden // heads)
    if rope:
        c["rope_scaling"] = rope
    return c


def qwen3(hidden, ffn, layers, heads, kv, vocab, tied):
    c = llama(hidden, ffn, layers, heads, kv, vocab, 1e6, tied, 1e-6, 128, None, 40960)
    c.update(architectures=["Qwen3ForCausalLM"], model_type="qwen3", use_sliding_window=False)
    del c["mlp_bias"]
    return c


# config; S and sequences of a micro-batch of the bench; which form of torch.compile the peer gets: "model" is
# torch.compile(model), "layers" compiles each decoder layer by itself (one compilation serves all layers, which is
# what makes it fit into minutes at 8B).
SHAPES = {
    "llama-3.1-8b": dict(config=llama(4096, 14336, 32, 32, 8, 128256, 5e5, False, rope=dict(LLAMA3_ROPE, factor=8.0)),
                         seq=4096, batch=2, compile="layers"),
    "qwen3-8b": dict(config=qwen3(4096, 12288, 36, 32, 8, 151936, False), seq=2048, batch=2, compile="layers"),
    "llama-3.2-1b": dict(config=llama(2048, 8192, 16, 32, 8, 128256, 5e5, True, rope=dict(LLAMA3_ROPE, factor=32.0)),
                         seq=2048, batch=8, compile="layers"),
    "qwen3-0.6b": dict(config=qwen3(1024, 3072, 28, 16, 8, 151936, True), seq=2048, batch=8, compile="model"),
    "smollm2-135m": dict(config=llama(576, 1536, 30, 9, 3, 49152, 1e5, True, positions=8192), seq=2048, batch=16,
                         compile="model"),
    # the same with a bias behind every projection, for what trains biases
    "smollm2-135m-biases": dict(config=dict(llama(576, 1536, 30, 9, 3, 49152, 1e5, True, positions=8192),
                                            attention_bias=True, mlp_bias=True), seq=2048, batch=16, compile="model"),
    # of the checks, not of the bench
    "small": dict(config=llama(512, 1408, 4, 8, 2, 8192, 1e4, False, positions=4096), seq=256, batch=4,
                  compile="model"),
    "tiny": dict(config=llama(128, 352, 2, 2, 1, 1024, 1e4, True, positions=1024), seq=64, batch=2, compile="model"),
}


def counts(config):
    """Values in the matrices of the blocks, in the vocabulary's matrix, and width of all query heads."""
    h, d = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    block = h * (q + 2 * kv) + q * h + 3 * h * config["intermediate_size"]
    return block * config["num_hidden_layers"], config["vocab_size"] * h, q


def flops_per_token(config, seq):
    """4 N + attention: 2N forward and 2N for the gradient of the inputs (frozen matrices have no gradient of their
    own), N without the input embedding and with the head; causal attention 2 * width * S per layer forward, three
    times that with backward. The adapter's own products are not counted."""
    block, head, width = counts(config)
    return 4 * (block + head) + 3 * 2 * width * seq * config["num_hidden_layers"]


def tensors(config):
    """(name, shape, standard deviation; None: ones)"""
    h, d, ffn = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    residual = 0.02 / (2 * config["num_hidden_layers"]) ** 0.5
    yield "model.embed_tokens.weight", (config["vocab_size"], h), 0.02
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,), None
        for name, out, into, std in (("self_attn.q_proj", q, h, 0.02), ("self_attn.k_proj", kv, h, 0.02),
                                     ("self_attn.v_proj", kv, h, 0.02), ("self_attn.o_proj", h, q, residual)):
            yield f"{p}{name}.weight", (out, into), std
            if config["attention_bias"]:
                yield f"{p}{name}.bias", (out,), 0.02
        if config["model_type"] == "qwen3":
            yield p + "self_attn.q_norm.weight", (d,), None
            yield p + "self_attn.k_norm.weight", (d,), None
        yield p + "post_attention_layernorm.weight", (h,), None
        for name, out, into, std in (("mlp.gate_proj", ffn, h, 0.02), ("mlp.up_proj", ffn, h, 0.02),
                                     ("mlp.down_proj", h, ffn, residual)):
            yield f"{p}{name}.weight", (out, into), std
            if config.get("mlp_bias"):
                yield f"{p}{name}.bias", (out,), 0.02
    yield "model.norm.weight", (h,), None
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], h), 0.02


def write_config(config, folder):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(dict(config, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1), f, indent=1)


def write_weights(config, folder, device):
    import torch

    torch.manual_seed(0)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors(config):
        n = 2
        for s in shape:
            n *= s
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, shape, std in tensors(config):
            if std is None:
                t = torch.ones(shape, dtype=torch.bfloat16)
            else:
                t = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, std)
            t.view(torch.int16).cpu().numpy().tofile(f)
    return at


def byte_letters():
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters, n = {b: chr(b) for b in keep}, 0
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + n)
            n += 1
    return [letters[b] for b in range(256)]


FIRST_WORD = 258  # ids before it: <s>, </s> and the 256 bytes


def word(i):
    """Four letters, one word per id."""
    out = ""
    for _ in range(4):
        out += chr(97 + i % 26)
        i //= 26
    return out


def write_tokenizer(config, folder):
    space = byte_letters()[32]
    vocab = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(byte_letters())}}
    for i in range(FIRST_WORD, config["vocab_size"]):
        vocab[space + word(i)] = i
    added = [{"id": i, "content": c, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, c in enumerate(("<s>", "</s>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": vocab, "merges": []}
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        json.dump({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                   "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}, f)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}, f)


def write_rows(config, folder, rows, seq):
    draw = random.Random(0)
    top = config["vocab_size"]
    ids = [[draw.randrange(FIRST_WORD, top) for _ in range(seq - 1)] + [1] for _ in range(rows)]
    with open(os.path.join(folder, "rows.json"), "w") as f:
        json.dump({"rows": ids}, f)
    with open(os.path.join(folder, "rows.jsonl"), "w") as f:
        for row in ids:
            f.write(json.dumps({"text": "".join(" " + word(i) for i in row[:-1])}) + "\n")


def make(shape, folder, rows, seq, device="cpu"):
    config = SHAPES[shape]["config"]
    write_config(config, folder)
    write_tokenizer(config, folder)
    write_rows(config, folder, rows, seq)
    return write_weights(config, folder, device)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("shape", choices=SHAPES)
    ap.add_argument("folder")
    ap.add_argument("--rows", type=int, default=8)
    ap.add_argument("--seq", type=int)
    ap.add_argument("--device", default="cpu")
    a = ap.parse_args()
    made = make(a.shape, a.folder, a.rows, a.seq or SHAPES[a.shape]["seq"], a.device)
    print(json.dumps({"shape": a.shape, "bytes": made}))


if __name__ == "__main__":
    main()
