"""The results as Markdown, for people."""


def number(value, form="{:.1f}", scale=1.0):
    return form.format(value / scale) if isinstance(value, (int, float)) and not isinstance(value, bool) else "-"


def peaks(p):
    yield ""
    if p.get("matmul_peak_tflops"):
        yield (f"Largest bf16 matrix products reached {p['matmul_peak_tflops']:.4g} TFLOP/s "
               f"({p['matmul_peak_by']}); all shares below are of this.")
    if p.get("memory_peak_tbps"):
        yield f"A copy of device memory moved {p['memory_peak_tbps']:.3g} TB/s ({p['memory_peak_by']}), read and written."
    for key, title in (("bench_cuda_gemm", "Matrix products"), ("bench_cuda_ops", "Other operations")):
        rows = p.get(key)
        if isinstance(rows, dict):
            yield f"\n{title}: {rows['failed']}"
        if not isinstance(rows, list):
            continue
        yield f"\n| {title} | ms | TFLOP/s | GB/s | torch ms | torch time / ours |"
        yield "|---|---|---|---|---|---|"
        for r in rows:
            yield (f"| {r['name']} | {number(r['seconds'], '{:.4f}', 1e-3)} | "
                   f"{number(r['flops'] / r['seconds'], '{:.1f}', 1e12)} | "
                   f"{number(r['bytes'] / r['seconds'], '{:.0f}', 1e9)} | "
                   f"{number(r['torch_seconds'], '{:.4f}', 1e-3)} | {number(r['ratio_to_torch'], '{:.2f}')} |")


def training(bench):
    yield ("\n| shape | side | tokens/s | TFLOP/s | share of peak | device MiB | planned MiB | first step s | "
           "ours / theirs: tokens/s | memory | first step |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name, e in bench["shapes"].items():
        shape = f"{name} S={e['seq']} b{e['batch']}" if "seq" in e else name
        for r in e["rows"]:
            if not r.get("tokens_per_s"):
                yield f"| {shape} | {r['side']} | {r['failed']} | | | | | | | | |"
                continue
            share = f"{100 * r['share_of_peak']:.1f}%" if r.get("share_of_peak") else "-"
            yield (f"| {shape} | {r['side']} | {number(r['tokens_per_s'], '{:.0f}')} | {number(r['tflops'], '{:.4g}')} | "
                   f"{share} | {number(r.get('device_bytes'), '{:.0f}', 2**20)} | "
                   f"{number(r.get('plan_bytes'), '{:.0f}', 2**20)} | {number(r.get('first_step_s'))} | "
                   f"{number(r.get('espalier_speed_ratio'), '{:.2f}')} | "
                   f"{number(r.get('espalier_device_bytes_ratio'), '{:.2f}')} | "
                   f"{number(r.get('espalier_first_step_s_ratio'), '{:.2f}')} |")
        if e.get("failed"):
            yield f"| {shape} | | {e['failed']} | | | | | | | | |"


def profiles(bench):
    """Time of each class of operations beside its floor, from a step with a wait around every operation."""
    found = {n: e["profile"] for n, e in bench["shapes"].items() if "classes" in e.get("profile", {})}
    if not found:
        return
    classes = list(next(iter(found.values()))["classes"])
    yield "\nMilliseconds of a step, operations apart from one another / their floor at the ceilings below. The adapters'"
    yield "up-projections are timed with the base products and have their floor under thin_matmul.\n"
    yield "| shape | step | sum | " + " | ".join(classes) + " |"
    yield "|---" * (len(classes) + 3) + "|"
    for name, p in found.items():
        total = sum(v["seconds"] for v in p["classes"].values())
        cells = [f"{1e3 * v['seconds']:.2f} / {1e3 * v['floor_s']:.2f}" for v in p["classes"].values()]
        yield f"| {name} | {1e3 * p['step_seconds']:.1f} | {1e3 * total:.1f} | " + " | ".join(cells) + " |"
    for name, p in found.items():
        slow = sorted(p["operations"], key=lambda o: o["floor_s"] - o["seconds"])[:8]
        yield f"\n{name}, the operations that lose most against their floor:\n"
        yield "| operation | dims | calls | ms | floor ms |"
        yield "|---|---|---|---|---|"
        for o in slow:
            yield (f"| {o['op']}{' + adapter' if o['tails'] else ''} | {' x '.join(str(d) for d in o['dims'] if d)} | "
                   f"{o['calls']} | {1e3 * o['seconds']:.3f} | {1e3 * o['floor_s']:.3f} |")


def checks(name, s):
    yield f"\n## {name}\n"
    for key, value in s.items():
        if isinstance(value, dict) and "bound" in value:
            yield f"- {key}: {number(value['value'], '{:.2e}')} (bound {value['bound']:g})"
        elif isinstance(value, dict):
            yield f"- {key}: " + ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, (dict, list)))
        elif value is not None:
            yield f"- {key}: {value}"


def lines(data):
    yield f"# {data['device']}\n"
    yield f"Driver {data['driver']}, commit {data['commit']}, `{data['command']}`. LoRA rank 16 on all linears, bf16,"
    yield "random weights. Operations: 4 N + causal attention per token, head included, adapter not (shapes.py)."
    sections = data["sections"]
    if "shapes" in sections.get("bench", {}):
        b = sections["bench"]
        yield from training(b)
        yield from profiles(b)
        yield from peaks(b["peaks"])
    elif "bench" in sections:
        yield f"\nbench: {sections['bench']['failed']}"
    for name in ("build", "tests", "sanitizer", "parity", "syntax"):
        if name in sections:
            yield from checks(name, sections[name])


def write(data, path):
    with open(path, "w") as f:
        f.write("\n".join(lines(data)) + "\n")
