#!/bin/sh
# cmake --install into a fresh prefix gives program, libraries, headers, pkg-config file,
# man page and completion; the example compiles against nothing but the installed tree and runs from a moved one.
# Mutation it caught: an absolute prefix in packaging/espalier.pc.in.
set -eu
build=$ESP_BINARY_DIR
source=$ESP_SOURCE_DIR
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/moved"
for f in bin/espalier lib/libespalier.so lib/libespalier.a include/espalier/espalier.h lib/pkgconfig/espalier.pc \
  share/man/man1/espalier.1 share/bash-completion/completions/espalier; do
  found=$(cd "$work/moved" && find . -path "*/$(basename "$(dirname "$f")")/$(basename "$f")" | head -1)
  [ -n "$found" ] || { echo "install: no $f"; exit 1; }
done
PKG_CONFIG_PATH=$(dirname "$(find "$work/moved" -name espalier.pc)")
export PKG_CONFIG_PATH
# shellcheck disable=SC2046
${CC:-cc} "$source/examples/finetune.c" -o "$work/example" $(pkg-config --cflags --libs espalier)
libs=$(dirname "$(find "$work/moved" -name libespalier.so)")
"$work/moved/bin/espalier" --version | grep -q espalier || { echo "install: the program does not say its version"; exit 1; }
set +e
out=$(LD_LIBRARY_PATH=$libs "$work/example" 2>&1)
code=$?
set -e
[ $code -eq 2 ] || { echo "install: the example without arguments ended with $code: $out"; exit 1; }
echo "install: complete and movable"
