#!/usr/bin/env bash
# Builds the Dockerfile for real, without a registry, and looks at what comes out:
#
#   tests/image.sh [dev | release]
#
# Both base images are made here: the builder of Debian 12 with a C compiler and this machine's Rust, the runtime of the few files that
# distroless/cc has and the agent needs. What is left of the work for the real bases is to pull them. It takes minutes, root, buildah,
# debootstrap and cargo; the bases and the layers stay among buildah's images until `buildah rmi` takes them.
set -euo pipefail

profile=${1-dev}
root=$(cd "$(dirname "$0")/.." && pwd)
builder=localhost/sds-agent-test/builder
runtime=localhost/sds-agent-test/runtime
image=localhost/sds-agent-test/agent
work=$(mktemp -d)
container=
trap '[ -z "$container" ] || buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT

fail() {
    echo "tests/image.sh: $*" >&2
    exit 1
}

# is WHAT FOUND WANTED
is() {
    [ "$2" = "$3" ] || fail "$1 is \"$2\" and should be \"$3\""
}

# commit FOLDER IMAGE [OPTION OF buildah config...]
commit() {
    local made
    made=$(buildah from scratch)
    buildah add -q "$made" "$1" / >/dev/null
    [ $# -lt 3 ] || buildah config "${@:3}" "$made"
    buildah commit -q --rm "$made" "$2" >/dev/null
}

bases() {
    local rootfs=$work/builder files=$work/runtime library
    echo "tests/image.sh: making the base images"
    debootstrap --variant=minbase --include=gcc,libc6-dev,ca-certificates bookworm "$rootfs" http://deb.debian.org/debian >"$work/log" ||
        { tail -n 5 "$work/log" >&2 && fail "debootstrap failed"; }

    # Each library that the agent is linked to, and its loader; the roots; two users.
    mkdir -p "$files/etc/ssl/certs"
    for library in libc.so.6 libm.so.6 libgcc_s.so.1 ld-linux-x86-64.so.2 ld-linux-aarch64.so.1; do
        library=$(find "$rootfs/usr/lib" "$rootfs"/lib* -name "$library" -print -quit)
        [ -z "$library" ] || install -D "$(readlink -f "$library")" "$files/lib/$(basename "$library")"
    done
    ln -s lib "$files/lib64"
    cp "$rootfs/etc/ssl/certs/ca-certificates.crt" "$files/etc/ssl/certs/"
    printf 'root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/:/sbin/nologin\n' >"$files/etc/passwd"

    # The crates come with the toolchain: whatever the build lacks, it cannot get.
    (cd "$root" && cargo fetch --quiet --locked)
    mkdir -p "$rootfs/usr/local/rust" "$rootfs/usr/local/cargo"
    cp -a "$(rustc --print sysroot)"/{bin,lib} "$rootfs/usr/local/rust/"
    cp -a "${CARGO_HOME:-$HOME/.cargo}/registry" "$rootfs/usr/local/cargo/"

    commit "$rootfs" "$builder" --env CARGO_HOME=/usr/local/cargo --env CARGO_NET_OFFLINE=true \
        --env PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    commit "$files" "$runtime"
    rm -rf "$rootfs" "$files"
}

# build REVISION: by the Dockerfile as it is, with a layer for each instruction.
build() {
    local start=$SECONDS
    buildah bud --isolation chroot --layers --build-arg RUST_IMAGE="$builder" --build-arg RUNTIME_IMAGE="$runtime" \
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
[ "$(id -u)" = 0 ] || fail "debootstrap wants root"
{ [ -n "$(buildah images -q "$builder" 2>/dev/null)" ] && [ -n "$(buildah images -q "$runtime" 2>/dev/null)" ]; } || bases

build "first-$$"
build "second-$$"
# The dependencies' layer serves every revision; the agent's does not.
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
is "what the agent says in the image" "$(buildah run --isolation chroot "$container" -- /usr/local/bin/sds-agent --version)" "sds-agent $version"
echo "figure: the binary has $(stat -c %s "$files/usr/local/bin/sds-agent") bytes, all files of the image $(du -sb "$files" | cut -f 1)"
