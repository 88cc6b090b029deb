"""Processes with a limit of time, the device's memory beside them, and the file of results."""
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time


class Clock:
    """Seconds left of everything, less what writing the results takes."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic() - 3


class DeviceMemory:
    """Used bytes of the device, several times a second. It counts all processes: the peer's and ours alike, the context
    and the libraries included."""

    def __init__(self, index=0):
        self.used, self.high, self.process = 0, 0, None
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", "-i", str(index), "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms",
                 "50"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
        except OSError:
            return
        threading.Thread(target=self.follow, daemon=True).start()
        time.sleep(0.5)

    def follow(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.used = int(line) << 20
                self.high = max(self.high, self.used)

    def begin(self):
        self.high = self.used
        return self.used

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait()


class Done:
    """What a process left: rc (None: stopped for time), lines of stdout, stderr, seconds, first (seconds until the line
    that was waited for), device_bytes (highest, above what was used before)."""

    def __init__(self):
        self.rc, self.lines, self.err, self.seconds = None, [], "", 0.0
        self.first, self.device_bytes = None, None

    def ok(self):
        return self.rc == 0

    def why(self):
        """One line for the results: how it failed."""
        if self.rc is None:
            return f"stopped after {self.seconds:.0f} s"
        text = self.err + "\n" + "".join(self.lines[-20:])
        lines = [s.strip() for s in text.splitlines() if s.strip()]
        cmake = [" ".join(lines[i:i + 2]) for i, s in enumerate(lines) if s.startswith("CMake Error")]
        named = cmake or [s for s in lines if re.search(r"(^|\s)(fatal )?error:|Error:|OutOfMemory", s)]
        return f"exit code {self.rc}: {(named or lines or ['no message'])[-1 if not named else 0][:300]}"

    def events(self):
        out = []
        for line in self.lines:
            if line.startswith("{"):
                try:
                    out.append(json.loads(line))
                except ValueError:
                    pass
        return out


def stop(p):
    """A process that this one started, with its own children: it was made the leader of a group."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(p.pid, sig)
            p.wait(timeout=5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


class Runner:
    def __init__(self, clock, memory, log_path):
        self.clock, self.memory = clock, memory
        self.log = open(log_path, "w")
        self.live = set()

    def say(self, text):
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def start(self, command, env=None, first=None):
        """first: a predicate on lines of stdout. Its output is read from here on."""
        err = tempfile.TemporaryFile(mode="w+")
        d, begin = Done(), time.monotonic()
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env, start_new_session=True)
        self.live.add(p)

        def read():
            for line in p.stdout:
                d.lines.append(line)
                if first and d.first is None and first(line):
                    d.first = time.monotonic() - begin

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        return p, err, begin, reader, d

    def stop_all(self):
        for p in self.live:
            stop(p)

    def finish(self, started, limit):
        """Waits until the end, or until `limit` seconds after now."""
        p, err, begin, reader, d = started
        end = time.monotonic() + min(limit, self.clock.left())
        while p.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if p.returncode is None:
            stop(p)
        else:
            d.rc = p.returncode
        self.live.discard(p)
        reader.join(timeout=5)
        d.seconds = time.monotonic() - begin
        err.seek(0)
        d.err = err.read()[-20000:]
        err.close()
        return d

    def run(self, command, limit, first=None, env=None):
        base = self.memory.begin() if self.memory else 0
        self.log.write("$ " + " ".join(command) + "\n")
        d = self.finish(self.start(command, env, first), limit)
        if self.memory and self.memory.process:
            d.device_bytes = self.memory.high - base
        self.log.write("".join(d.lines[-40:]) + d.err[-4000:] + f"[{d.rc}, {d.seconds:.1f} s]\n")
        self.log.flush()
        return d


class Results:
    """OUT/<device>.json: what earlier calls left of other sections stays."""

    def __init__(self, path, head):
        self.path, self.data = path, {}
        if os.path.exists(path):
            with open(path) as f:
                self.data = json.load(f)
        if self.data.get("device") != head["device"]:
            self.data = {}
        self.data.update(head)
        self.data.setdefault("sections", {})

    def put(self, section, value):
        self.data["sections"][section] = value
        self.write()

    def write(self):
        with open(self.path + ".new", "w") as f:
            json.dump(self.data, f, indent=1)
            f.write("\n")
        os.replace(self.path + ".new", self.path)
