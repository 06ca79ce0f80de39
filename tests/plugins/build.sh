#!/usr/bin/env bash
# Builds the tests' external plugins, which are made with SPIRE's plugin SDK, from the Go module proxy into the cache folder.
set -euo pipefail
cd "$(dirname "$0")"
out=${FINIAL_CACHE:-$HOME/.cache/finial}/plugins
mkdir -p "$out"
# Go knows by itself when there is nothing to do. Built aside: a running plugin's file cannot be written.
GOFLAGS="-mod=readonly -buildvcs=false" go build -C go -ldflags "-s -w" -o "$out/.plugin.$$" .
mv "$out/.plugin.$$" "$out/plugin"
