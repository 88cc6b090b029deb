#!/bin/sh
# Installs what the build needs and this machine lacks (Debian 12 and relatives; root or sudo). Says nothing when
# nothing is missing. scripts/setup.sh [build|test]
set -eu
build="gcc cmake ninja-build pkg-config libjansson-dev libyaml-dev libpcre2-dev libutf8proc-dev libxxhash-dev libopenblas-pthread-dev libopenmpi-dev openmpi-bin"
tests="g++ libcmocka-dev clang-14 libclang-rt-14-dev clang-format-14 python3"
want="$build"
[ "${1:-build}" = test ] && want="$want $tests"
missing=""
for p in $want; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "setup: this machine has no apt-get; install the equivalents of:$missing" >&2
  exit 1
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null 2>&1 || { echo "setup: run as root, or install sudo, to get:$missing" >&2; exit 1; }
  sudo=sudo
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
