#!/usr/bin/env bash
# Installs and builds the clients by package name into the cache folder, with one launcher each under CACHE/clients.
set -euo pipefail
cd "$(dirname "$0")"
out=${FINIAL_CACHE:-$HOME/.cache/finial}/clients
mkdir -p "$out"

GOFLAGS=-mod=readonly go build -C go -o "$out/go" .

[ -x "$out/pyenv/bin/python" ] || python3 -m venv "$out/pyenv"
if ! cmp -s python/requirements.txt "$out/pyenv/installed.txt"; then
    "$out/pyenv/bin/pip" install -q --disable-pip-version-check -r python/requirements.txt
    cp python/requirements.txt "$out/pyenv/installed.txt"
fi
cp python/client.py "$out/client.py"
printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$out/pyenv/bin/python" "$out/client.py" >"$out/python"

mvn -q -B -f java/pom.xml -DbuildDirectory="$out/java-build" package dependency:copy-dependencies -DoutputDirectory="$out/java-build/libs"
printf '#!/bin/sh\nexec java -XX:TieredStopAtLevel=1 -cp "%s/*:%s/libs/*" finial.Client "$@"\n' "$out/java-build" "$out/java-build" >"$out/java"

CARGO_TARGET_DIR=$out/rust-target cargo build -q --locked --manifest-path rust/Cargo.toml
ln -sf "$out/rust-target/debug/client" "$out/rust"
chmod +x "$out/python" "$out/java"
