#!/usr/bin/env bash
# Two identity providers that nobody here wrote, by package name into the cache folder, once: Keycloak (190 MB, prepared for the
# features that the tests use) and npm's oidc-provider.
set -euo pipefail
cd "$(dirname "$0")"
keycloak=26.7.4
cache=${FINIAL_CACHE:-$HOME/.cache/finial}
out=$cache/relying-parties
if [ ! -e "$out/keycloak-$keycloak/built" ]; then
    rm -rf "$out/keycloak-$keycloak"
    mkdir -p "$out"
    at=org.keycloak:keycloak-quarkus-dist:$keycloak:tar.gz
    mvn -q -B dependency:copy -Dartifact=$at -DoutputDirectory="$out" -Dmdep.useBaseVersion=true
    tar -C "$out" -xzf "$out/keycloak-quarkus-dist-$keycloak.tar.gz"
    rm "$out/keycloak-quarkus-dist-$keycloak.tar.gz"
    "$out/keycloak-$keycloak/bin/kc.sh" build --db=dev-mem --features=spiffe,client-auth-federated
    touch "$out/keycloak-$keycloak/built"
fi
if ! cmp -s package-lock.json "$out/npm/package-lock.json" || [ ! -d "$out/npm/node_modules/oidc-provider" ]; then
    mkdir -p "$out/npm"
    cp package.json package-lock.json "$out/npm/"
    (cd "$out/npm" && npm ci --no-audit --no-fund)
fi
cp oidc-provider.mjs "$out/npm/"
