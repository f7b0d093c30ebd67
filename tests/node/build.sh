#!/bin/sh
# Builds the programs of the tests' node: build.sh FOLDER
set -eu

[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
case $1 in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "$0: go (1.26 or newer) is not on PATH" >&2; exit 1; }
mkdir -p "$out"

# build CGO TAGS LINKING PACKAGE…
build() {
    cgo=$1 tags=$2 linking=$3
    shift 3
    CGO_ENABLED=$cgo go build -trimpath -buildvcs=false -tags "$tags" -ldflags "-s -w $linking" -o "$out/" "$@"
}

kubernetes=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
containerd=github.com/containerd/containerd/v2
# The same flags as for the control plane, which shares most packages.
build 0 "" "-X k8s.io/component-base/version.gitVersion=$kubernetes" k8s.io/kubernetes/cmd/kubelet
build 0 "" "" "$containerd/cmd/containerd" "$containerd/cmd/containerd-shim-runc-v2" "$containerd/cmd/ctr" ./pause
# runc enters namespaces in C before Go's runtime starts, so it needs cgo. The runtime's seccomp profile for every pod needs libseccomp.
build 1 seccomp "" github.com/opencontainers/runc
