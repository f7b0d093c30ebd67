# The commands for developers. `make test` runs everything except the long groups; `cargo test` alone runs everything that needs no other
# program.
.PHONY: dev test test-long long-group long-groups test-tools lint fuzz

# Each group is a test target `long_…`, which takes at most 20 minutes, and the programs that it needs.
LONG_GROUPS := scale scale-agents vault oldest former throughput memory
TOOLS_scale := system controlplane
TOOLS_vault := system controlplane envoy vault trustmanager
TOOLS_oldest := system controlplane oldest render
TOOLS_former := system controlplane envoy oldest former render
TOOLS_scale-agents := system controlplane
TOOLS_memory := system controlplane
TOOLS_throughput := system controlplane former

dev:
	cargo run --release -- dev

# One cargo invocation: the library is built once, and the last lines of the output are the test runner's.
test: test-tools
	cargo test --locked --features real-tests --no-fail-fast

# The long tests, by group: `make test-long GROUP=scale`. Tests run one after the other, because some measure times.
test-long: long-group
	tests/tools.sh $(TOOLS_$(GROUP))
	cargo test --locked --features long-tests --test long_$(GROUP) -- --nocapture

long-groups:
	@echo $(LONG_GROUPS)

long-group:
	@test -n "$(filter $(GROUP),$(LONG_GROUPS))" || { echo "make test-long GROUP=…: one of $(LONG_GROUPS)" >&2; exit 2; }

# The programs that `make test` needs, such as Envoy, grpcurl and the control plane of the tests, at pinned versions in target/tools.
test-tools:
	tests/tools.sh

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	# The shipped configuration: without the feature `testing` of the libraries, which the tests enable.
	cargo check --locked --bin sds-agent
	# The lock file of the fuzz targets, which are not part of the workspace.
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	tests/prose/prose.py --self-test
	tests/prose/prose.py
	tests/tools.sh cargo-deny cargo-machete actionlint
	$${SDS_AGENT_TOOLS:-target/tools}/bin/cargo-deny --locked check bans licenses sources
	$${SDS_AGENT_TOOLS:-target/tools}/bin/cargo-machete --skip-target-dir
	$${SDS_AGENT_TOOLS:-target/tools}/actionlint -shellcheck= -pyflakes=

# Each fuzz target until it finds nothing new for ten minutes: `make fuzz`, or `make fuzz TARGETS="pem csi"`.
fuzz:
	fuzz/run.py $(TARGETS)
