#!/usr/bin/env bash
# Builds pebble (an ACME authority for tests, by Let's Encrypt) and its DNS server by package name into the cache folder, once (20 s).
set -euo pipefail
version=2.10.1
out=${FINIAL_CACHE:-$HOME/.cache/finial}/pebble-$version
[ -x "$out/pebble" ] && [ -x "$out/pebble-challtestsrv" ] && exit 0
mkdir -p "$out"
at=github.com/letsencrypt/pebble/v2/cmd
GOBIN=$out go install "$at/pebble@v$version" "$at/pebble-challtestsrv@v$version"
