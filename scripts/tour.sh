#!/bin/sh
# Writes docs/tour.md: one line per source file, taken from the first sentence of its opening comment.
# --check: fails when the page is not current.
set -eu
cd "$(dirname "$0")/.."
out=$(mktemp)
trap 'rm -f "$out"' EXIT
line() {
  python3 - "$1" <<'P'
import re, sys, os
path = sys.argv[1]
text = open(path, encoding="utf-8").read(4000)
m = re.match(r"\s*/\*+\s*(.*?)\*/", text, re.S)
name = os.path.basename(path)
if m:
    s = re.sub(r"\n\s*\*?\s?", " ", m.group(1)).strip()
    s = re.sub(r"^" + re.escape(name) + r"\s*[:.]?\s*", "", s)
    s = re.split(r"(?<=[a-z0-9)\"'])[.](?:\s|$)", s)[0].strip()
elif os.path.exists(os.path.splitext(path)[0] + ".h") and path.endswith(".c"):
    s = "implements " + os.path.splitext(name)[0] + ".h"
else:
    s = ""
print(f"- `{name}`: {s}" if s else f"- `{name}`")
P
}
{
  echo "# Source tour"
  echo
  echo "One line per file, from its opening comment (written by \`scripts/tour.sh\`)."
  for dir in include/espalier src/core src/io src/text src/backend src/backend/cpu src/backend/count src/model adapters optim \
    dist src/tasks src/recipe src/train src/eval src/merge src/api src/cli recipes/demo examples; do
    files=$(git ls-files "$dir/*.h" "$dir/*.c" "$dir/*.inc" | awk -F/ -v d="$(echo "$dir" | tr -cd / | wc -c)" 'NF==d+2')
    [ -n "$files" ] || continue
    echo
    echo "## $dir"
    echo
    for f in $files; do line "$f"; done
  done
} >"$out"
if [ "${1:-}" = --check ]; then
  cmp -s "$out" docs/tour.md || { echo "docs/tour.md is not current: run scripts/tour.sh"; diff docs/tour.md "$out" | head -10; exit 1; }
  echo "tour: current"
else
  cp "$out" docs/tour.md
  chmod 644 docs/tour.md
fi
