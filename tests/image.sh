#!/usr/bin/env bash
# Builds the Dockerfile without a registry, and checks the image:
#
#   tests/image.sh [dev | dist] [amd64 | arm64]
#
# The script makes both base images: the builder from Debian 12 with C compilers and this machine's Rust, the runtime from the few files
# of distroless/cc that the agent needs. The test does not pull the real base images. It takes minutes and needs root, buildah,
# debootstrap and cargo. The base images and the layers stay in buildah's storage until `buildah rmi` removes them. The default
# architecture is this machine's; for another one the script cross-compiles and runs the agent with qemu-user.
set -euo pipefail

profile=${1-dev}
own=$(dpkg --print-architecture)
arch=${2-$own}
root=$(cd "$(dirname "$0")/.." && pwd)
builder=localhost/sds-agent-test/builder-for-$arch
runtime=localhost/sds-agent-test/runtime-$arch
image=localhost/sds-agent-test/agent-$arch
work=$(mktemp -d)
container= served=
trap '[ -z "$served" ] || kill "$served"; [ -z "$container" ] || buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT

fail() {
    echo "tests/image.sh: $*" >&2
    exit 1
}

# is WHAT FOUND EXPECTED
is() {
    [ "$2" = "$3" ] || fail "$1 is \"$2\" and should be \"$3\""
}

case $arch in
amd64) machine=x86_64 compiler=gcc-x86-64-linux-gnu loader=ld-linux-x86-64.so.2 ;;
arm64) machine=aarch64 compiler=gcc-aarch64-linux-gnu loader=ld-linux-aarch64.so.1 ;;
*) fail "\"$arch\" is no architecture of the image: amd64 or arm64" ;;
esac
target=$machine-unknown-linux-gnu

# commit FOLDER IMAGE ARCHITECTURE [OPTION OF buildah config...]
commit() {
    local made
    made=$(buildah from --arch "$3" scratch)
    buildah add -q "$made" "$1" / >/dev/null
    buildah config --arch "$3" "${@:4}" "$made"
    buildah commit -q --rm "$made" "$2" >/dev/null
}

# Debian 12 with the packages that the Dockerfile would otherwise install, so that the build needs no network.
make_builder() {
    local rootfs=$work/builder other=
    [ "$arch" = "$own" ] || other=,$compiler,libc6-dev-$arch-cross
    echo "tests/image.sh: making the builder's base"
    debootstrap --variant=minbase --include="gcc,libc6-dev,ca-certificates$other" bookworm "$rootfs" http://deb.debian.org/debian \
        >"$work/log" || { tail -n 5 "$work/log" >&2 && fail "debootstrap failed"; }
    # The crates are copied with the toolchain. The build cannot download anything else.
    (cd "$root" && cargo fetch --quiet --locked)
    mkdir -p "$rootfs/usr/local/rust" "$rootfs/usr/local/cargo"
    cp -a "$(rustc --print sysroot)"/{bin,lib} "$rootfs/usr/local/rust/"
    cp -a "${CARGO_HOME:-$HOME/.cargo}/registry" "$rootfs/usr/local/cargo/"
    commit "$rootfs" "$builder" "$own" --env CARGO_HOME=/usr/local/cargo --env CARGO_NET_OFFLINE=true \
        --env PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    make_runtime "$rootfs"
    rm -rf "$rootfs"
}

# make_runtime ROOTFS: each library that the agent is linked to, the loader, the root certificates, two users.
make_runtime() {
    local files=$work/runtime library found
    mkdir -p "$files/etc/ssl/certs"
    for library in libc.so.6 libm.so.6 libgcc_s.so.1 "$loader"; do
        found=$(find "$1/usr/$machine-linux-gnu" "$1/usr/lib/$machine-linux-gnu" "$1/lib/$machine-linux-gnu" \
            -name "$library" -print -quit 2>/dev/null || true)
        [ -n "$found" ] || fail "the builder's base has no $library"
        install -D "$(readlink -f "$found")" "$files/lib/$library"
    done
    ln -s lib "$files/lib64"
    cp "$1/etc/ssl/certs/ca-certificates.crt" "$files/etc/ssl/certs/"
    printf 'root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/:/sbin/nologin\n' >"$files/etc/passwd"
    commit "$files" "$runtime" "$arch"
    rm -rf "$files"
}

# build REVISION: with the unchanged Dockerfile, with a layer for each instruction.
build() {
    local start=$SECONDS
    buildah bud --isolation chroot --layers --pull-never --platform "linux/$arch" --build-arg BUILDPLATFORM="linux/$own" --build-arg RUST_IMAGE="$builder" --build-arg RUNTIME_IMAGE="$runtime" \
        --build-arg PROFILE="$profile" --build-arg REVISION="$1" -t "$image" "$root" >"$work/log" 2>&1 ||
        { tail -n 30 "$work/log" >&2 && fail "the image does not build"; }
    echo "figure: profile $profile, revision $1: built in $((SECONDS - start)) s"
}

# inspect FORMAT
inspect() {
    buildah inspect --type image --format "$1" "$image"
}

for program in buildah debootstrap cargo; do
    command -v "$program" >/dev/null || fail "$program is not on PATH: apt-get install buildah debootstrap, and a Rust toolchain"
done
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
if [ "$arch" != "$own" ]; then
    command -v "qemu-$machine-static" >/dev/null || fail "qemu-$machine-static is not on PATH: apt-get install qemu-user-static"
    [ -d "$(rustc --print target-libdir --target "$target")" ] || fail "this Rust has no library for $arch: rustup target add $target"
fi
{ [ -n "$(buildah images -q "$builder" 2>/dev/null)" ] && [ -n "$(buildah images -q "$runtime" 2>/dev/null)" ]; } || make_builder

build "first-$$"
build "second-$$"
# The layer of the dependencies is shared by every revision; the agent's is not.
cached=$(grep -c -- '--> Using cache' "$work/log" || true)
awk '/STEP .*: RUN for target in/ { next_line = NR + 1 } NR == next_line { cached = /Using cache/ } END { exit !cached }' "$work/log" ||
    fail "a new revision builds the dependencies again"
echo "figure: $cached instructions came from the cache of the first build"

is "the user" "$(inspect '{{.OCIv1.Config.User}}')" 65532:65532
is "the entrypoint" "$(inspect '{{.OCIv1.Config.Entrypoint}}')" "[/usr/local/bin/sds-agent]"
is "the revision of the label" "$(inspect '{{index .OCIv1.Config.Labels "org.opencontainers.image.revision"}}')" "second-$$"

container=$(buildah from "$image")
files=$(buildah mount "$container")
grep -qa "second-$$" "$files/usr/local/bin/sds-agent" || fail "the agent was built without its revision"
! grep -qa "first-$$" "$files/usr/local/bin/sds-agent" || fail "the agent is that of the first revision"
version=$(inspect '{{index .OCIv1.Config.Labels "org.opencontainers.image.version"}}')
is "the architecture" "$(inspect '{{.OCIv1.Architecture}}')" "$arch"
# The agent runs with the image's own loader and libraries, independent of this machine's.
if [ "$arch" = "$own" ]; then
    socket=/run/sds.sock seen=$files$socket agent=(chroot "$files" /usr/local/bin/sds-agent)
else
    socket=$work/sds.sock seen=$socket agent=("qemu-$machine-static" -L "$files" "$files/usr/local/bin/sds-agent")
fi
is "what the agent says in the image" "$("${agent[@]}" --version)" "sds-agent $version"
# The agent works in the image: keys, signatures, the caller's credentials, a stream.
mkdir -p "$files/run"
"${agent[@]}" dev --socket "$socket" --admin 127.0.0.1:0 >"$work/log" 2>&1 &
served=$!
for _ in $(seq 300); do
    [ ! -S "$seen" ] || break
    sleep 0.1
done
"${agent[@]}" fetch --socket "$socket" --name default --name ROOTCA -o json >"$work/fetched" ||
    { tail -n 30 "$work/log" >&2 && fail "the agent of the image does not serve"; }
for field in spiffe_id chain_pem trusted_ca_pem; do
    grep -q "\"$field\"" "$work/fetched" || fail "fetch has no $field: $(head -c 500 "$work/fetched")"
done
kill "$served" && wait "$served" || fail "the agent of the image does not end at SIGTERM"
served=
echo "figure: $arch serves a certificate and its roots"
echo "figure: the binary has $(stat -c %s "$files/usr/local/bin/sds-agent") bytes, all files of the image $(du -sb "$files" | cut -f 1)"
