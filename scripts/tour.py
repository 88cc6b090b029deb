#!/usr/bin/env python3
"""Writes docs/tour.md: one line per source file, the first sentence of its opening comment. --check: fails when the
page is not current."""
import os
import re
import subprocess
import sys

ROOMS = """include/espalier src/core src/io src/text src/backend src/backend/cpu src/backend/count src/model adapters optim
dist src/tasks src/recipe src/train src/eval src/merge src/api src/cli recipes/demo examples""".split()


def line(path):
    name = os.path.basename(path)
    with open(path, encoding="utf-8") as f:
        m = re.match(r"\s*/\*+\s*(.*?)\*/", f.read(4000), re.S)
    text = ""
    if m:
        text = re.sub(r"\n\s*\*?\s?", " ", m.group(1)).strip()
        text = re.sub(r"^" + re.escape(name) + r"\s*[:.]?\s*", "", text)
        text = re.split(r"(?<=[a-z0-9)\"'])\.(?:\s|$)", text)[0].strip()
    elif path.endswith(".c") and os.path.exists(path[:-1] + "h"):
        text = "implements " + name[:-1] + "h"
    return f"- `{name}`: {text}" if text else f"- `{name}`"


os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
out = ["# Source tour", "", "One line per file, from its opening comment (written by `scripts/tour.py`)."]
for room in ROOMS:
    mine = sorted(f for f in files if os.path.dirname(f) == room and re.search(r"\.(h|c|inc)$", f) and os.path.exists(f))
    if mine:
        out += ["", f"## {room}", ""] + [line(f) for f in mine]
page = "\n".join(out) + "\n"
path = "docs/tour.md"
if sys.argv[1:] == ["--check"]:
    if not os.path.exists(path) or open(path, encoding="utf-8").read() != page:
        sys.exit(f"{path} is not current: run scripts/tour.py")
    print("tour: current")
else:
    open(path, "w", encoding="utf-8").write(page)
