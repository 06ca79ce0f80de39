#!/usr/bin/env bash
# Builds kube-apiserver and kubelet 1.34.4 from the Go module proxy into the cache folder, once: about 8 minutes cold on two
# cores. One program is both, by the name it is called. Prints nothing when all is there already.
set -euo pipefail
cd "$(dirname "$0")"
version=1.34.4
out=${FINIAL_CACHE:-$HOME/.cache/finial}/kube-$version
for name in kube-apiserver kubelet; do
    [ -L "$out/$name" ] || { mkdir -p "$out" && ln -sfn kube "$out/$name"; }
done
[ -x "$out/kube" ] && exit 0
package=k8s.io/component-base/version
CGO_ENABLED=0 GOFLAGS=-mod=mod go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X $package.gitVersion=v$version -X $package.gitMajor=1 -X $package.gitMinor=34" -o "$out/kube.new" .
mv "$out/kube.new" "$out/kube"
