#!/bin/sh
# Builds the control plane of the tests: build.sh OUTPUT
#
# cert-manager's CRDs are copied from its Go module at build time, so that they match the controllers and this repository contains no
# copy.
set -eu

[ $# -eq 1 ] || { echo "usage: $0 OUTPUT" >&2; exit 2; }
case $1 in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
cd "$(dirname "$0")"
command -v go >/dev/null || { echo "$0: go (1.26 or newer) is not on PATH" >&2; exit 1; }

module=github.com/cert-manager/cert-manager
go mod download "$module"
source=$(go list -m -f '{{.Dir}}' "$module")/deploy/crds

# A file is written only if it changed, so that an unchanged tree is not linked again.
for file in crds/*.yaml; do
    [ -e "$source/${file#crds/}" ] || rm -f "$file"
done
for file in "$source"/*.yaml; do
    copy=crds/${file##*/}
    cmp -s "$file" "$copy" || { rm -f "$copy"; cat "$file" >"$copy"; }
done

mkdir -p "$(dirname "$out")"
# Helm requests the API server's version.
kubernetes=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$kubernetes" -o "$out" .
