#!/bin/sh
# Made the certificates here, once, with OpenSSL 3: a small PKI that is not SPIFFE. The keys protect nothing.
set -eu
cd "$(dirname "$0")"
t=$(mktemp -d); trap 'rm -rf "$t"' EXIT
ca() { # name subject issuer
  openssl ecparam -genkey -name prime256v1 -noout -out "$t/$1.key"
  printf 'basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n' >"$t/ca.ext"
  openssl req -new -key "$t/$1.key" -subj "/CN=$2" -out "$t/$1.csr"
  if [ "$1" = "$3" ]; then signer="-signkey $t/$1.key"; else signer="-CA $3.pem -CAkey $t/$3.key"; fi
  openssl x509 -req -in "$t/$1.csr" $signer -extfile "$t/ca.ext" -days 36500 -out "$1.pem"
}
leaf() { # name issuer usage days serial
  printf 'basicConstraints=critical,CA:false\nkeyUsage=critical,%s\nsubjectAltName=DNS:%s.test,URI:x509pop://example.org/rack/r1/top,URI:x509pop://other.org/a/b\n' "$3" "$1" >"$t/leaf.ext"
  openssl req -new -key "$1.key" -subj "/O=Finial/CN=node $1" -out "$t/$1.csr"
  openssl x509 -req -in "$t/$1.csr" -CA "$2.pem" -CAkey "$t/$2.key" -extfile "$t/leaf.ext" -days "$4" -set_serial "$5" -out "$1.pem"
}
ec() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:$2 -out "$1.key"; }
rsa() { openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:$2 -out "$1.key"; }
ca root "test root" root; ca intermediate "test intermediate" root; ca other-root "other root" other-root
ec p256 P-256; ec p384 P-384; ec p521 P-521; rsa rsa2048 2048; rsa rsa4096 4096; ec stranger P-256; ec expired P-256; ec nosign P-256
for n in p256 p384 p521 rsa2048 rsa4096; do leaf $n intermediate digitalSignature 36500 0x0a11; done
leaf stranger other-root digitalSignature 36500 0x0a12
leaf expired intermediate digitalSignature 1 0x0a13
leaf nosign intermediate keyAgreement 36500 0x0a14
