# The agent's image: a builder with a separate layer for the dependencies, and a final stage with only the libraries of the binary.
#
#   docker build -t sds-agent .            (or: buildah bud -t sds-agent .)
#   docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/sds-agent --push .
#
# The builder always has the architecture of the build machine and compiles for the requested platform: an optimised build under emulation
# would take hours. Both base images exist for amd64 and arm64. A buildah that does not know BUILDPLATFORM (1.28) needs it as an argument:
#
#   buildah bud --platform linux/arm64 --build-arg BUILDPLATFORM=linux/amd64 -t sds-agent .

# aws-lc-rs needs only a C compiler besides Rust. The builder has the same Debian version as the runtime, because the binary needs a C
# library that is at least as new as the builder's.
ARG RUST_IMAGE=docker.io/library/rust:1.95-slim-bookworm
# `cc`: the binary is linked to libc, libm and libgcc_s. The image's root certificates are for a kubeconfig without an authority.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM --platform=${BUILDPLATFORM} ${RUST_IMAGE} AS builder
WORKDIR /src

# The compiler for the platform: if it is not the builder's own, Rust's library and a C compiler with its library are installed.
ARG TARGETARCH
RUN case "${TARGETARCH:-$(dpkg --print-architecture)}" in \
        amd64) machine=x86_64 package=x86-64 library=amd64 ;; \
        arm64) machine=aarch64 package=aarch64 library=arm64 ;; \
        *) echo "no build for TARGETARCH=\"${TARGETARCH}\": amd64 and arm64 are known" >&2; exit 1 ;; \
    esac \
    && target="$machine-unknown-linux-gnu" linker="$machine-linux-gnu-gcc" \
    && { [ -d "$(rustc --print target-libdir --target "$target")" ] || rustup target add "$target"; } \
    && { command -v "$linker" || { apt-get update \
        && apt-get install -y --no-install-recommends "gcc-$package-linux-gnu" "libc6-dev-$library-cross"; }; } \
    && printf '[build]\ntarget = "%s"\n[target.%s]\nlinker = "%s"\n' "$target" "$target" "$linker" >>"${CARGO_HOME}/config.toml"

# `dist`, or `release` or `dev`, which are built faster.
ARG PROFILE=dist

# The dependencies: built again only when a manifest changes. cargo requires every target to exist, so each is replaced by a stub. The
# stubs of tests and benches stay, so that a change of them rebuilds nothing. The build results of the stubs are removed: otherwise cargo
# would treat source files that are older than this layer as built.
COPY Cargo.toml Cargo.lock ./
COPY crates/agent-kube/Cargo.toml crates/agent-kube/
COPY crates/agent-runtime/Cargo.toml crates/agent-runtime/
COPY crates/approver/Cargo.toml crates/approver/
COPY crates/attest-kubernetes/Cargo.toml crates/attest-kubernetes/
COPY crates/cert-manager/Cargo.toml crates/cert-manager/
COPY crates/envoy-x509/Cargo.toml crates/envoy-x509/
COPY crates/issuance/Cargo.toml crates/issuance/
COPY crates/sds-server/Cargo.toml crates/sds-server/
COPY crates/unix-peer/Cargo.toml crates/unix-peer/
COPY crates/workload-identity/Cargo.toml crates/workload-identity/
COPY tests/harness/Cargo.toml tests/harness/
RUN for target in build.rs src/lib.rs src/main.rs tests/flood/main.rs tests/long_former/main.rs tests/long_memory/main.rs tests/long_oldest/main.rs tests/long_scale/main.rs tests/long_scale_agents/main.rs tests/long_throughput/main.rs tests/long_vault/main.rs \
        tests/real_authority/main.rs tests/real_envoys/main.rs tests/real_install/main.rs tests/real_node/main.rs tests/real_node/caller/main.rs tests/serving/main.rs examples/fleet/main.rs benches/path.rs benches/ratios.rs benches/flood.rs \
        crates/sds-server/build.rs crates/agent-kube/src/lib.rs crates/agent-runtime/src/lib.rs crates/approver/src/lib.rs crates/attest-kubernetes/src/lib.rs crates/cert-manager/src/lib.rs crates/envoy-x509/src/lib.rs crates/issuance/src/lib.rs crates/sds-server/src/lib.rs crates/unix-peer/src/lib.rs crates/workload-identity/src/lib.rs tests/harness/src/lib.rs; do \
        mkdir -p "$(dirname "$target")" && echo 'fn main() {}' >"$target"; \
    done \
    && cargo build --locked --bin sds-agent --profile "${PROFILE}" \
    && cargo clean --locked --package sds-agent $(ls crates | sed 's/^/--package /') --profile "${PROFILE}"

COPY build.rs ./
COPY proto proto
COPY crates crates
COPY src src
# Shown by `sds_agent_build_info`. Below the dependencies, so that a new revision rebuilds only the agent.
ARG REVISION=unknown
RUN SDS_AGENT_REVISION="${REVISION}" cargo build --locked --bin sds-agent --profile "${PROFILE}" \
    && install -D -t /out target/*-linux-gnu/*/sds-agent

# Explicit, because the same buildah otherwise keeps the platform of the first stage.
FROM --platform=${TARGETPLATFORM} ${RUNTIME_IMAGE}
COPY LICENSE /usr/share/doc/sds-agent/LICENSE
COPY --from=builder /out/sds-agent /usr/local/bin/sds-agent

ARG REVISION=unknown
ARG VERSION=0.1.0
ARG SOURCE=
LABEL org.opencontainers.image.title="sds-agent" \
      org.opencontainers.image.description="A per-node agent that serves Envoy's SDS from cert-manager: keys in memory only, rotated before expiry" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# A number, which `runAsNonRoot` can check. The approver needs no other user. For modes of the agent that need root (a CSI driver mounts
# in the host's namespace), the manifests set `runAsUser`.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/sds-agent"]
