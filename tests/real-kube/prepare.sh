#!/usr/bin/env bash
# What a one-node cluster needs before its programs start: certificates, client configurations and an image, in folder $1.
# The API server's port is $2.
set -euo pipefail
cd "$1"
port=$2
mkdir -p pki image/root/bin
key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "pki/$1.key" 2>/dev/null; }
key ca
openssl req -x509 -key pki/ca.key -out pki/ca.crt -days 2 -subj /CN=test-ca -addext keyUsage=critical,keyCertSign,cRLSign
# certificate NAME SUBJECT NAMES USAGE
certificate() {
    key "$1"
    openssl req -new -key "pki/$1.key" -subj "$2" -out "pki/$1.csr"
    { [ -z "$3" ] || echo "subjectAltName=$3"; echo "extendedKeyUsage=$4"; } >"pki/$1.ext"
    openssl x509 -req -in "pki/$1.csr" -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -days 2 -extfile "pki/$1.ext" \
        -out "pki/$1.crt" 2>/dev/null
}
certificate apiserver /CN=kube-apiserver DNS:localhost,IP:127.0.0.1,IP:10.0.0.1 serverAuth
certificate admin /O=system:masters/CN=admin "" clientAuth
certificate kubelet /O=system:nodes/CN=system:node:node1 DNS:node1,DNS:localhost serverAuth,clientAuth
openssl genrsa -out pki/sa.key 2048 2>/dev/null
openssl rsa -in pki/sa.key -pubout -out pki/sa.pub 2>/dev/null
cat >kubelet.conf <<END
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:$port", certificate-authority: $PWD/pki/ca.crt}}]
users: [{name: me, user: {client-certificate: $PWD/pki/kubelet.crt, client-key: $PWD/pki/kubelet.key}}]
contexts: [{name: x, context: {cluster: c, user: me}}]
current-context: x
END
# An image from busybox, in the form of `docker save`.
cp /bin/busybox image/root/bin/
for applet in sh sleep cat ls id true; do ln -sf busybox "image/root/bin/$applet"; done
mkdir -p image/root/{tmp,lib,lib64,out,run/spire}
tar -C image/root --sort=name --owner=0 --group=0 --mtime=@0 -cf image/layer.tar .
layer=$(sha256sum image/layer.tar | cut -d' ' -f1)
echo '{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/sleep","1000000"]},"rootfs":{"type":"layers","diff_ids":["sha256:'"$layer"'"]}}' >image/config.json
echo '[{"Config":"config.json","RepoTags":["docker.io/local/pause:1","docker.io/local/busybox:1"],"Layers":["layer.tar"]}]' >image/manifest.json
tar -C image -cf image.tar config.json layer.tar manifest.json
