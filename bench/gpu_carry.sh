#!/usr/bin/env bash
# Collects on a Debian or Ubuntu machine with a network what bench/gpu.sh needs on one without: headers, shared libraries
# and pkg-config files of the libraries espalier links, as one relocatable archive (about 12 MiB).
#
#   bench/gpu_carry.sh FOLDER          then, on the other machine:  ESP_DEPS=FOLDER bench/gpu.sh
#
# The libraries run with this machine's C library or a newer one: of two machines, collect on the older.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

depends() { # the packages that $2.. depend on and whose names begin with one of $1
  apt-cache depends --no-recommends --no-suggests "${@:2}" | sed -n 's/^ *|\{0,1\}Depends: *//p' | grep -E "^($1)" || true
}
# Names of runtime packages end in their interface's number, which differs between releases: taken from the -dev ones.
dev="libjansson-dev libyaml-dev libpcre2-dev libutf8proc-dev libxxhash-dev libopenblas-pthread-dev libcmocka-dev"
runtime=$(depends 'libjansson[0-9]|libyaml-0|libpcre2-8|libutf8proc[0-9]|libxxhash0|libcmocka0|libopenblas0' $dev)
fortran=$(depends 'libgfortran[0-9]' libopenblas0-pthread)
quadmath=$(depends 'libquadmath' "$fortran")
pkgconf=$(depends 'libpkgconf' pkgconf-bin)
(cd "$work" && apt-get -q download $dev $runtime $fortran $quadmath pkgconf-bin $pkgconf >"$work/log" 2>&1) ||
  { cat "$work/log" >&2; exit 1; }
for deb in "$work"/*.deb; do dpkg -x "$deb" "$work/all"; done

triplet=$(basename "$(dirname "$(dirname "$(find "$work/all/usr/lib" -name jansson.pc)")")")
libs=$work/all/usr/lib/$triplet
deps=$work/deps
mkdir -p "$deps/lib/pkgconfig" "$deps/bin" "$deps/include"
cp "$work"/all/usr/include/*.h "$deps/include/"
for at in "$libs" "$work/all/lib/$triplet"; do
  [ ! -d "$at" ] || find "$at" -maxdepth 1 -name '*.so*' -exec cp -a {} "$deps/lib/" \;
done
rm -f "$deps"/lib/libpcre2-16* "$deps"/lib/libpcre2-32* "$deps"/lib/libpcre2-posix*
cp -L "$libs/openblas-pthread/libopenblas.so.0" "$deps/lib/"
ln -sf libopenblas.so.0 "$deps/lib/libopenblas.so"
cp "$work/all/usr/bin/pkgconf" "$deps/bin/"
for name in jansson yaml-0.1 libpcre2-8 libutf8proc libxxhash cmocka; do
  sed -e "s|/usr/lib/$triplet|\${pcfiledir}/..|g" -e 's|/usr/include|${pcfiledir}/../../include|g' \
    -e 's|=/usr$|=${pcfiledir}/../..|' -e "s|/lib/$triplet|/lib|g" "$libs/pkgconfig/$name.pc" \
    >"$deps/lib/pkgconfig/$name.pc"
done
tar -C "$work" -cf - deps | gzip -9 >"$out/deps.tar.gz"
du -k "$out/deps.tar.gz"
