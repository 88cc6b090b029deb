"""The section `bench`: what the device can do at most (matrix products, memory), then training throughput of the named
shapes beside PyTorch + PEFT, each side its own process, one after the other on an otherwise idle device."""
import json
import os
import shutil

import shapes

HERE = os.path.dirname(os.path.abspath(__file__))
ORDER = ["llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "smollm2-135m"]
WARM = 3  # steps before the measured ones: choice of algorithms, recorded graphs, compilation


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def peaks(c):
    """Products and memory-bound operations over espalier's op table, and the same ones in torch."""
    out = {}
    small = ["--small"] if c.dry or c.simulated else []
    for program, limit in (("bench_cuda_gemm", 60), ("bench_cuda_ops", 60)):
        path = os.path.join(c.build, "bin", program)
        if not os.path.exists(path):
            out[program] = {"failed": "not built"}
            continue
        d = c.run.run([path, "--device", c.device, *small], limit, env=c.env)
        if not d.ok():
            out[program] = {"failed": d.why()}
            continue
        rows = os.path.join(c.work, program + ".jsonl")
        with open(rows, "w") as f:
            f.writelines(d.lines)
        p = c.run.run([c.python, os.path.join(HERE, "peer_ops.py"), rows, "--device", c.peer_device], limit)
        theirs = {r["name"]: r for r in p.events()}
        if not p.ok():
            out[program + "_peer"] = {"failed": p.why()}
        table = []
        for r in d.events():
            t = theirs.get(r["name"], {}).get("seconds")
            table.append(dict(r, torch_seconds=t, ratio_to_torch=t / r["seconds"] if t else None))
        out[program] = table
    products = [(r["flops"] / s / 1e12, who) for r in out.get("bench_cuda_gemm", []) if isinstance(r, dict)
                for who, s in (("espalier", r["seconds"]), ("torch", r["torch_seconds"])) if s and r.get("peak")]
    copies = [(r["bytes"] / s / 1e12, who) for r in out.get("bench_cuda_ops", []) if isinstance(r, dict)
              for who, s in (("espalier", r["seconds"]), ("torch", r["torch_seconds"])) if s and r.get("peak")]
    if products:
        out["matmul_peak_tflops"], out["matmul_peak_by"] = max(products)
    if copies:
        out["memory_peak_tbps"], out["memory_peak_by"] = max(copies)
    return out


def espalier(c, folder, shape, seq, batch):
    recipe = c.recipe(folder, "run", seq=seq, steps=WARM + c.a.steps, batch=batch)
    row = {"side": "espalier"}
    plan = c.run.run([c.espalier, "plan", recipe, "--json"], 60, env=c.env)
    if plan.ok():
        p = json.loads("".join(plan.lines))
        row["plan_bytes"] = p["device_peak_bytes"] + p["device_overhead_bytes"] if c.on_gpu else p["peak_bytes"]
        row["plan_own_bytes"] = p["device_peak_bytes"] if c.on_gpu else p["peak_bytes"]
        row["counted_flops_per_step"] = p["flops_per_step"]
    d = c.run.run([c.espalier, "run", recipe, "--overwrite", "--json"], 100, lambda s: '"event": "step"' in s, c.env)
    steps = [e for e in d.events() if e.get("event") == "step"]
    if len(steps) <= WARM:
        return dict(row, failed=d.why())
    if not d.ok():
        row["failed"] = d.why()
    end = d.events()[-1]
    own = end.get("device_peak") if c.on_gpu else end.get("memory_peak")
    row.update(tokens_per_s=seq * batch / median([e["step_seconds"] for e in steps[WARM:]]), first_step_s=d.first,
               device_bytes=d.device_bytes, first_loss=steps[0]["loss"], last_loss=steps[-1]["loss"])
    if own and row.get("plan_own_bytes"):
        row["own_to_plan"] = own / row["plan_own_bytes"]
    if row["device_bytes"] and row.get("plan_bytes"):
        row["device_to_plan"] = row["device_bytes"] / row["plan_bytes"]
    return row


def peft(c, folder, side, batch, limit, *options):
    d = c.run.run([c.python, os.path.join(HERE, "peer_step.py"), folder, "--device", c.peer_device, "--batch", str(batch),
                   "--steps", str(WARM + c.a.steps), *options], limit, lambda s: '"loss"' in s)
    events = d.events()
    row = {"side": side}
    if not d.ok() or not events or events[-1].get("event") != "result":
        return dict(row, failed=d.why(), device_bytes=d.device_bytes)
    e = events[-1]
    return dict(row, tokens_per_s=e["tokens_per_s"], first_step_s=d.first, device_bytes=d.device_bytes,
                first_loss=e["losses"][0], last_loss=e["losses"][-1], allocated_bytes=e.get("allocated_bytes"),
                versions=e["versions"])


def profile(c, folder, seq, batch, peak):
    """Where the time of a step goes: each operation by itself, beside its floor at the measured ceilings."""
    ceilings = [f"{peak.get(k) or sheet:g}" for k, sheet in (("matmul_peak_tflops", 989), ("memory_peak_tbps", 4.8))]
    d = c.run.run([os.path.join(c.build, "bin/bench_step"), folder, str(seq), str(batch), "16", *ceilings, c.device], 60,
                  env=c.env)
    return json.loads("".join(d.lines)) if d.ok() else {"failed": d.why()}


def one_shape(c, name, results, out):
    shape = shapes.SHAPES[name]
    config, seq, batch = shape["config"], shape["seq"], shape["batch"]
    block, head, _ = shapes.counts(config)
    folder = c.scratch(2 * (block + head * (1 if config["tie_word_embeddings"] else 2)))
    entry = {"seq": seq, "batch": batch, "flops_per_token": shapes.flops_per_token(config, seq), "rows": []}
    out["shapes"][name] = entry
    if not folder:
        entry["failed"] = "no room for the model's file"
        return
    try:
        d = c.run.run([c.python, os.path.join(HERE, "shapes.py"), name, folder, "--rows", str(4 * batch), "--device",
                       c.peer_device], 90)
        if not d.ok():
            entry["failed"] = d.why()
            return
        sides = [
            lambda: espalier(c, folder, shape, seq, batch),
            lambda: peft(c, folder, "peft eager", batch, 90, "--adapter-bf16"),
            lambda: peft(c, folder, "peft compile", batch, 120, "--adapter-bf16", "--compile", shape["compile"]),
        ]
        for side in sides:
            if c.clock.left() < 15:
                entry["failed"] = "the time was over"
                return
            row = side()
            finish_row(row, entry, out["peaks"])
            c.say(json.dumps({"shape": name, **{k: v for k, v in row.items() if k != "versions"}}))
            entry["rows"].append(row)
            results.put("bench", out)
        if c.clock.left() > 30:
            entry["profile"] = profile(c, folder, seq, batch, out["peaks"])
            results.put("bench", out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish_row(row, entry, peak):
    """Derived figures; every peer's row gets espalier's ratio to it."""
    speed = row.get("tokens_per_s")
    if not speed:
        return
    row["tflops"] = speed * entry["flops_per_token"] / 1e12
    if peak.get("matmul_peak_tflops"):
        row["share_of_peak"] = row["tflops"] / peak["matmul_peak_tflops"]
    ours = entry["rows"][0] if entry["rows"] else None
    if ours and ours.get("tokens_per_s"):
        row["espalier_speed_ratio"] = ours["tokens_per_s"] / speed
        for key in ("device_bytes", "first_step_s"):
            if ours.get(key) and row.get(key):
                row["espalier_" + key + "_ratio"] = ours[key] / row[key]


def bench(c, results):
    names = [s for s in c.a.shapes.split(",") if s] or (["tiny"] if c.dry or c.simulated else ORDER)
    out = {"warm_steps": WARM, "steps": c.a.steps, "shapes": {}, "peaks": peaks(c)}
    c.say(json.dumps({k: v for k, v in out["peaks"].items() if not isinstance(v, list)}))
    results.put("bench", out)
    for name in names:
        if c.clock.left() < 30 and not c.dry:
            out["shapes"][name] = {"failed": "not begun: the time was over", "rows": []}
            continue
        one_shape(c, name, results, out)
    bad = [n for n, e in out["shapes"].items() if e.get("failed") or not e["rows"] or e["rows"][0].get("failed")]
    bad += [k for k, v in out["peaks"].items() if isinstance(v, dict)]
    if bad:
        out["failed"] = ", ".join(bad)
    return out
