#!/bin/sh
# The generated pages are what the program writes now. usage: docs.sh ESPALIER
set -eu
espalier=$1
cd "$(dirname "$0")/../.."
status=0
check() { # FILE COMMAND...
  page=$1
  shift
  "$espalier" "$@" | cmp -s - "$page" || { echo "$page is not current: espalier $* > $page"; status=1; }
}
check docs/cli.md help --markdown
check docs/recipe.md schema --format markdown
exit $status
