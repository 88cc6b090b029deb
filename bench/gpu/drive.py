"""What bench/gpu.sh runs: the sections, their limits of time, the results. See there for the options."""
import argparse
import ast
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import shapes
import table
import training
from job import Clock, DeviceMemory, Results, Runner

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SECTIONS = ["build", "tests", "sanitizer", "parity", "bench"]
LIMITS = {"build": 240, "tests": 150, "sanitizer": 90, "parity": 120, "bench": 600}
# Warnings that newer compilers give for sound code: they stay warnings here.
FLOW_WARNINGS = ("array-bounds", "stringop-overflow", "stringop-overread", "maybe-uninitialized", "restrict",
                 "format-truncation", "free-nonheap-object", "nonnull")


class Context:
    """What every section gets."""

    def __init__(self, a):
        self.a, self.python = a, sys.executable
        self.dry = a.dry
        self.device = "cpu" if a.dry else a.device
        self.on_gpu = self.device != "cpu"
        # ESPALIER_CUDA_PLUGIN may name the simulated plug-in: small sizes then, and torch on the processor
        self.simulated = self.on_gpu and "cuda-sim" in os.environ.get("ESPALIER_CUDA_PLUGIN", "")
        self.peer_device = "cpu" if self.simulated else self.device
        self.clock = Clock(a.deadline)
        self.build = os.path.abspath(a.build)
        self.espalier = os.path.join(self.build, "bin/espalier")
        self.work = tempfile.mkdtemp(prefix="espalier-bench-")
        self.memory = DeviceMemory() if self.on_gpu and shutil.which("nvidia-smi") else None
        self.run = Runner(self.clock, self.memory, os.path.join(a.out, "gpu.log"))
        self.say = self.run.say
        self.sanitizers = {}
        self.env = dict(os.environ)
        found = [os.path.dirname(p) for p in wheel_files("lib/libcudnn.so.9", "lib/libnccl.so.2")]
        if found:
            self.env["LD_LIBRARY_PATH"] = ":".join(found + [self.env.get("LD_LIBRARY_PATH", "")]).rstrip(":")

    def recipe(self, folder, name, **keys):
        """A LoRA recipe over what shapes.py wrote into the folder."""
        device = f", device: {self.device}" if self.on_gpu else ""
        path = os.path.join(folder, name + ".yaml")
        with open(path, "w") as f:
            f.write(f"""name: {name}
seed: 1
model: {{base_model: {folder}, dtype: {keys.get("dtype", "bf16")}}}
adapter: {{type: lora, r: 16, alpha: 32, target: all-linear}}
data: {{sequence_len: {keys["seq"]}, packing: "off", add_bos: false, shuffle: false}}
optim: {{name: adamw, lr: 2e-4, max_grad_norm: 1.0, weight_decay: 0}}
schedule: {{name: constant}}
train: {{max_steps: {keys["steps"]}, micro_batch_size: {keys["batch"]}}}
parallel: {{threads: auto{device}}}
tasks: [{{name: t, data: [{{path: {folder}/rows.jsonl, format: text}}]}}]
checkpoint: {{output_dir: {os.path.join(folder, name)}, every: 100000}}
""")
        return path

    def scratch(self, nbytes):
        """A folder for model files: memory-backed where there is room."""
        for top in ("/dev/shm", self.work):
            if os.path.isdir(top) and shutil.disk_usage(top).free > nbytes * 5 // 4 + (1 << 30):
                return tempfile.mkdtemp(prefix="espalier-model-", dir=top)
        return None


def wheel_files(*names):
    """Files of NVIDIA's Python wheels, which lie beside torch, where the toolkit has no such library."""
    out = []
    for base in sys.path:
        for name in names:
            out += sorted(glob.glob(os.path.join(base, "nvidia", "*", name)))
    return out


def from_wheels(toolkit):
    """Compiler flags and CMake definitions for what the toolkit's include folder lacks and the wheels have."""
    flags, definitions = [], []
    for header, option in (("cudnn.h", "ESP_CUDNN_INCLUDE"), ("nccl.h", "ESP_NCCL_INCLUDE"), ("cublasLt.h", None),
                           ("nvtx3/nvToolsExt.h", None)):
        folders = [toolkit] + [p[: -len(header) - 1] for p in wheel_files("include/" + header)]
        at = next((f for f in folders if os.path.exists(os.path.join(f, header))), None)
        if at and option:
            definitions.append(f"-D{option}={at}")
        elif at and at != toolkit and f"-isystem{at}" not in flags:
            flags.append(f"-isystem{at}")
    libraries = wheel_files("lib/libcublasLt.so.13")
    if libraries and not os.path.exists(os.path.join(toolkit, "cublasLt.h")):
        definitions.append(f"-DESP_CUBLASLT={libraries[0]}")
    return flags, definitions


def build(c):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return {"failed": "no nvcc on the PATH"}
    toolkit = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "include")
    arch = c.a.arch or (smi("compute_cap") or "9.0").replace(".", "") + "-real"
    flags, definitions = from_wheels(toolkit)
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", c.build, "-DCMAKE_BUILD_TYPE=Release", "-DESP_MPI=OFF",
               "-DESP_CUDA=ON", "-DESP_CUDA_SIM=OFF", f"-DESP_CUDA_ARCHS={arch}", *definitions,
               "-DCMAKE_C_FLAGS=" + " ".join(flags + ["-Wno-error=" + w for w in FLOW_WARNINGS])]
    if flags:
        command.append("-DCMAKE_CUDA_FLAGS=" + " ".join(f.replace("-isystem", "-I") for f in flags))
    if os.environ.get("CMAKE_LIBRARY_PATH"):
        command.append(f"-DESP_OPENBLAS={os.environ['CMAKE_LIBRARY_PATH']}/libopenblas.so")
    d = c.run.run(command, 60)
    out = {"arch": arch, "configure_s": round(d.seconds, 1), "processors": os.cpu_count()}
    if not d.ok():
        return dict(out, failed=d.why())
    # test programs last: if time runs out there, the measurements still have what they need
    steps = [("program", ["espalier_bin", "espalier-cuda", "bench_cuda_gemm", "bench_cuda_ops", "bench_step"])]
    if "tests" in c.a.sections:
        steps.append(("tests", sorted({name.removesuffix("_gpu") for name in gpu_tests(c)})))
    for name, targets in steps:
        d = c.run.run(["ninja", "-C", c.build, *targets], LIMITS["build"])
        out[name + "_s"] = round(d.seconds, 1)
        if not d.ok():
            return dict(out, failed=f"{name}: {d.why()}")
    d = c.run.run([c.espalier, "doctor", "--json"], 30, env=c.env)
    out["doctor"] = json.loads("".join(d.lines)) if d.ok() else d.why()
    return out


def gpu_tests(c):
    d = subprocess.run(["ctest", "--test-dir", c.build, "-N", "-L", "gpu"], capture_output=True, text=True)
    return re.findall(r"Test +#\d+: (\S+)", d.stdout)


def tests(c):
    if "sanitizer" in c.a.sections:
        sanitizer_begin(c)
    d = c.run.run(["ctest", "--test-dir", c.build, "-L", "gpu", "-j", str(min(os.cpu_count(), 8)), "--timeout", "120",
                   "--output-on-failure"], LIMITS["tests"], env=c.env)
    text = "".join(d.lines)
    found = re.search(r"(\d+)% tests passed, (\d+) tests? failed out of (\d+)", text)
    out = {"seconds": round(d.seconds, 1)}
    if not found or d.rc is None:
        out["failed"] = d.why()
        out["passed"] = len(re.findall(r"\bPassed\b", text))
        return out
    out["run"], out["failures"] = int(found.group(3)), int(found.group(2))
    out["skipped"] = len(re.findall(r"\*+Skipped", text))
    if out["failures"] or out["skipped"]:
        out["failed"] = ", ".join(re.findall(r"^\s+\d+ - (\S+) \(", text, re.M))
    return out


def sanitizer_begin(c):
    """Starts the tools beside one another (each keeps one processor busy), and beside the tests."""
    program = shutil.which("compute-sanitizer")
    if c.sanitizers or not program:
        return
    folder = os.path.join(c.work, "sanitizer")
    shape = shapes.SHAPES["tiny"]
    shapes.make("tiny", folder, 4, shape["seq"])
    for tool in ("memcheck", "racecheck", "initcheck"):
        recipe = c.recipe(folder, tool, seq=shape["seq"], steps=2, batch=shape["batch"])
        c.sanitizers[tool] = c.run.start([program, "--tool", tool, "--error-exitcode", "99", c.espalier, "run", recipe,
                                          "--overwrite", "--json"], c.env)


def sanitizer(c):
    sanitizer_begin(c)
    if not c.sanitizers:
        return {"failed": "no compute-sanitizer on the PATH"}
    out = {}
    for tool, job in c.sanitizers.items():
        d = c.run.finish(job, LIMITS["sanitizer"])
        text = "".join(d.lines) + d.err
        c.run.log.write(text[-6000:])
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
        out[tool] = {"summary": summary[-1] if summary else None}
        if not d.ok():
            out[tool]["failed"] = d.why()
    bad = [t for t in out if "failed" in out[t]]
    if bad:
        out["failed"] = ", ".join(bad)
    return out


def losses(folder, name):
    with open(os.path.join(folder, name, "metrics.jsonl")) as f:
        return [r["loss"] for r in map(json.loads, f) if "loss" in r]


def adapter_bytes(folder, name):
    with open(os.path.join(folder, name, "adapters/t/adapter_model.safetensors"), "rb") as f:
        return f.read()


def distance(a, b):
    return max(abs(x - y) / max(abs(y), 1e-9) for x, y in zip(a, b)) if len(a) == len(b) and a else None


def parity(c):
    """20 steps of a small Llama: the device against the processor's backend and against PEFT on the same device from
    the same start; twice; and stopped in the middle and resumed."""
    name = "tiny" if c.dry or c.simulated else "small"
    shape = shapes.SHAPES[name]
    steps, folder = 20, os.path.join(c.work, "parity")
    shapes.make(name, folder, 4 * shape["batch"], shape["seq"])
    out = {"steps": steps, "device": c.device, "failed": None}

    def run(name, *extra, dtype="bf16", resume=False, expect=0):
        recipe = c.recipe(folder, name, seq=shape["seq"], steps=steps, batch=shape["batch"], dtype=dtype)
        words = ["resume", os.path.join(folder, name)] if resume else ["run", recipe, "--overwrite", *extra]
        d = c.run.run([c.espalier, *words, "--json"], LIMITS["parity"], env=c.env)
        if d.rc != expect:
            raise RuntimeError(f"{name}: {d.why()}")
        return d

    def hold(name, value, bound):
        out[name] = {"value": value, "bound": bound, "holds": value is not None and value <= bound}

    try:
        on_cpu = ["parallel.device=cpu"] if c.on_gpu else []
        plan = c.run.run([c.espalier, "plan", c.recipe(folder, "first", seq=shape["seq"], steps=steps,
                                                       batch=shape["batch"]), "--json"], 60, env=c.env)
        if not plan.ok():
            raise RuntimeError(f"plan: {plan.why()}")
        planned = json.loads("".join(plan.lines))["device_peak_bytes" if c.on_gpu else "peak_bytes"]
        end = run("first").events()[-1]
        hold("peak_to_plan", abs(end["device_peak" if c.on_gpu else "memory_peak"] / planned - 1), 0.02)
        run("second")
        same = adapter_bytes(folder, "first") == adapter_bytes(folder, "second")
        out["two_runs_equal_bits"] = same and losses(folder, "first") == losses(folder, "second")
        run("stopped", "--stop-after", str(steps // 2), expect=6)
        run("stopped", resume=True)
        out["resume_equal_bits"] = adapter_bytes(folder, "first") == adapter_bytes(folder, "stopped")
        run("processor", *on_cpu)
        hold("bf16_to_cpu", distance(losses(folder, "first"), losses(folder, "processor")), 5e-3)
        run("first32", dtype="fp32")
        run("processor32", *on_cpu, dtype="fp32")
        hold("fp32_to_cpu", distance(losses(folder, "first32"), losses(folder, "processor32")), 1e-4)
        # a step of next to no length leaves the adapter as it began: what PEFT starts from
        run("start", "optim.lr=1e-30", "train.max_steps=1")
        peer = [c.python, os.path.join(ROOT, "bench/gpu/peer_step.py"), folder, "--device", c.peer_device, "--steps",
                str(steps), "--batch", str(shape["batch"]), "--adapter", os.path.join(folder, "start/adapters/t")]
        for dtype, name, bound in (("bf16", "first", 1e-2), ("fp32", "first32", 1e-4)):
            d = c.run.run([*peer, "--dtype", dtype], LIMITS["parity"])
            if not d.ok():
                raise RuntimeError(f"PEFT: {d.why()}")
            hold(dtype + "_to_peft", distance(losses(folder, name), d.events()[-1]["losses"]), bound)
        out["first_and_last_loss"] = [losses(folder, "first")[0], losses(folder, "first")[-1]]
    except (RuntimeError, OSError, LookupError) as e:
        out["failed"] = str(e)
    bad = [k for k, v in out.items() if v is False or (isinstance(v, dict) and not v["holds"])]
    if bad and not out["failed"]:
        out["failed"] = ", ".join(bad)
    return out


def syntax(c):
    """Of everything that cannot run here."""
    bad = []
    for path in sorted(glob.glob(os.path.join(ROOT, "bench/gpu/*.py"))):
        try:
            with open(path) as f:
                ast.parse(f.read(), path)
        except SyntaxError as e:
            bad.append(str(e))
    for path in ("bench/gpu.sh", "bench/gpu_carry.sh"):
        d = subprocess.run(["bash", "-n", os.path.join(ROOT, path)], capture_output=True, text=True)
        bad += d.stderr.splitlines()
    seen = {}
    for name, shape in shapes.SHAPES.items():
        folder = os.path.join(c.work, "config", name)
        shapes.write_config(shape["config"], folder)
        try:
            from transformers import AutoConfig

            got = AutoConfig.from_pretrained(folder)
            seen[name] = type(got).__name__
            wrong = [k for k in ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
                     if getattr(got, k) != shape["config"][k]]
            bad += [f"{name}: {k}" for k in wrong]
        except ImportError:
            seen[name] = "transformers is missing"
    return {"configs": seen, "failed": "; ".join(bad) or None}


def smi(field):
    """A fact of the first device as nvidia-smi says it; None without one."""
    try:
        d = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True,
                           text=True)
    except OSError:
        return None
    return d.stdout.splitlines()[0].strip() if d.returncode == 0 and d.stdout else None


def commit():
    d = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return d.stdout.strip() or None


def main():
    ap = argparse.ArgumentParser(prog="bench/gpu.sh")
    ap.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    ap.add_argument("--deadline", type=float, default=540)
    ap.add_argument("--out", default=os.path.join(ROOT, "bench/results"))
    ap.add_argument("--build", default=os.path.join(ROOT, "build/gpu"))
    ap.add_argument("--shapes", default="")
    ap.add_argument("--device", default="cuda")
    ap.add_argument("--arch", default="", help="CUDA architecture (default: the device's)")
    ap.add_argument("--steps", type=int, default=8)
    ap.add_argument("--dry", action="store_true")
    a = ap.parse_args()
    for s in a.sections:
        if s not in SECTIONS:
            ap.error(f"no section '{s}': {' '.join(SECTIONS)}")
    for s in filter(None, a.shapes.split(",")):
        if s not in shapes.SHAPES:
            ap.error(f"no shape '{s}': {' '.join(shapes.SHAPES)}")
    if a.dry:
        a.sections = ["syntax"] + [s for s in a.sections or ["parity", "bench"] if s in ("parity", "bench")]
        a.out = a.out if a.out != os.path.join(ROOT, "bench/results") else tempfile.mkdtemp(prefix="espalier-dry-")
    a.sections = a.sections or SECTIONS
    os.makedirs(a.out, exist_ok=True)
    c = Context(a)
    name = "simulated cuda" if c.simulated else (smi("name") or c.device) if c.on_gpu else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    head = {"device": name, "driver": smi("driver_version"), "commit": commit(),
            "command": "bench/gpu.sh " + " ".join(sys.argv[1:]), "host": platform.machine(),
            "processors": os.cpu_count()}
    results = Results(os.path.join(a.out, slug + ".json"), head)
    failed = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is there is written all the same
    try:
        for s in a.sections:
            if c.clock.left() < 10:
                c.say(f"== {s}: not begun, the time is over")
                results.put(s, {"failed": "not begun: the time was over"})
                failed.append(s)
                continue
            if s not in ("build", "syntax") and not os.path.exists(c.espalier):
                c.say(f"== {s}: no {c.espalier}")
                results.put(s, {"failed": "there is no build"})
                failed.append(s)
                continue
            c.say(f"== {s} ({c.clock.left():.0f} s left)")
            if s == "bench":
                value = training.bench(c, results)
            else:
                value = globals()[s](c)
                c.say(json.dumps(value, indent=1))
            results.put(s, value)
            if value.get("failed"):
                failed.append(s)
            table.write(results.data, os.path.join(a.out, slug + ".md"))
    finally:
        c.run.stop_all()
        table.write(results.data, os.path.join(a.out, slug + ".md"))
        if c.memory:
            c.memory.close()
        shutil.rmtree(c.work, ignore_errors=True)
    with open(os.path.join(a.out, slug + ".md")) as f:
        print(f.read())
    print(f"{results.path}, {slug}.md and gpu.log beside it; "
          + (f"failed: {', '.join(failed)}" if failed else "everything held"))
    return 1 if failed else 0


sys.exit(main())
