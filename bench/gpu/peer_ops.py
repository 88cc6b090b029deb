"""The operations that bench_cuda_gemm and bench_cuda_ops measured, in torch as its users write them (eager), timed the
same way: many issued between two waits, the median of seven samples.

    peer_ops.py ROWS.jsonl [--device cuda]        one line of JSON per operation: name, seconds
"""
import argparse
import json
import time

import torch
import torch.nn.functional as F

ap = argparse.ArgumentParser()
ap.add_argument("rows")
ap.add_argument("--device", default="cuda")
a = ap.parse_args()
dev, BF, F32 = torch.device(a.device), torch.bfloat16, torch.float32
torch.manual_seed(0)
if dev.type == "cpu":
    torch.set_num_threads(1)  # sizes are small there


def rand(*shape, dtype=BF):
    return torch.empty(shape, device=dev, dtype=dtype).uniform_(-0.05, 0.05)


def wait():
    if dev.type == "cuda":
        torch.cuda.synchronize()


def seconds(fn):
    for _ in range(2):
        fn()
    wait()
    begin = time.perf_counter()
    fn()
    wait()
    n = min(1000, int(0.02 / (time.perf_counter() - begin + 1e-9)) + 1)
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        for _ in range(n):
            fn()
        wait()
        samples.append((time.perf_counter() - begin) / n)
    return sorted(samples)[3]


def backward(y, inputs, dy):
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def linear(d, r):
    t, out, into = d
    w, x = rand(out, into), rand(t, into)
    y = torch.empty(t, out, device=dev, dtype=BF)
    return lambda: torch.mm(x, w.t(), out=y)  # torch keeps bf16: its loss converts the logits afterwards


def linear_dx(d, r):
    t, out, into = d
    w, dy = rand(out, into), rand(t, out)
    dx = torch.empty(t, into, device=dev, dtype=BF)
    return lambda: torch.mm(dy, w, out=dx)


def matmul(d, r):
    m, n, k = d
    x = rand(k, m).t() if r["trans_a"] else rand(m, k)
    b = rand(n, k).t() if r["trans_b"] else rand(k, n)
    c = rand(m, n)
    if r["beta"]:
        return lambda: torch.addmm(c, x, b, out=c)
    return lambda: torch.mm(x, b, out=c)


def copy(d, r):
    x, y = rand(d[0], dtype=F32), rand(d[0], dtype=F32)
    return lambda: y.copy_(x)


def norm(d, r):
    x, res, w = rand(*d), rand(*d), rand(d[1])
    return lambda: F.rms_norm(x + res, (d[1],), w, 1e-5)


def norm_bwd(d, r):
    x, w, dy = rand(*d).requires_grad_(), rand(d[1]), rand(*d)
    return backward(F.rms_norm(x, (d[1],), w, 1e-5), x, dy)


def rope(d, r):
    t, heads, dim = d
    x, cos, sin = rand(t, heads, dim), rand(t, 1, dim), rand(t, 1, dim)

    def run():
        half = torch.cat((-x[..., dim // 2:], x[..., : dim // 2]), dim=-1)
        return x * cos + half * sin

    return run


def embed(d, r):
    t, hidden, vocab = d
    table, ids = rand(vocab, hidden), torch.randint(0, vocab, (t,), device=dev)
    return lambda: F.embedding(ids, table)


def dropout(d, r):
    x = rand(*d)
    return lambda: F.dropout(x, 0.1, True)


def glu(d, r):
    g, u = rand(*d), rand(*d)
    return lambda: F.silu(g) * u


def glu_bwd(d, r):
    g, u, dh = rand(*d).requires_grad_(), rand(*d).requires_grad_(), rand(*d)
    return backward(F.silu(g) * u, (g, u), dh)


def heads(d):
    n, s, h, kv, dim = d
    return rand(n, h, s, dim).requires_grad_(), *[rand(n, kv, s, dim).requires_grad_() for _ in range(2)]


def attn(d, r):
    q, k, v = (x.detach() for x in heads(d))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attn_bwd(d, r):
    q, k, v = heads(d)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return backward(o, (q, k, v), torch.rand_like(o))


def cross_entropy(d, r):
    logits, targets = rand(*d).requires_grad_(), torch.randint(0, d[1], (d[0],), device=dev)

    def run():
        torch.autograd.grad(F.cross_entropy(logits.float(), targets), logits)

    return run


def update(d, r):
    p = torch.nn.Parameter(rand(d[0], dtype=F32))
    p.grad = rand(d[0], dtype=F32)
    opt = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.0, fused=dev.type == "cuda")
    return opt.step


with open(a.rows) as f:
    for r in map(json.loads, f):
        fn = globals()[r["op"]](r["dims"], r)
        print(json.dumps({"name": r["name"], "seconds": seconds(fn)}), flush=True)
        del fn
        if dev.type == "cuda":
            torch.cuda.empty_cache()
