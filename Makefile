# What people type. `make test` is everything; `cargo test` alone is everything that needs no other program.
.PHONY: dev test test-long long-group long-groups test-tools lint

# Each is a test target `long_…` of its own, which takes at most 20 minutes, and the programs that it needs.
LONG_GROUPS := scale vault oldest former
TOOLS_scale := system controlplane
TOOLS_vault := system controlplane envoy vault
TOOLS_oldest := system controlplane oldest render
TOOLS_former := system controlplane envoy oldest former

dev:
	cargo run --release -- dev

# One cargo invocation: the library is built once, and its closing lines are the test runner's.
test: test-tools
	cargo test --locked --features real-tests --no-fail-fast

# The rest, by group: `make test-long GROUP=scale`. One test at a time: some measure.
test-long: long-group
	tests/tools.sh $(TOOLS_$(GROUP))
	cargo test --locked --features long-tests --test long_$(GROUP) -- --nocapture

long-groups:
	@echo $(LONG_GROUPS)

long-group:
	@test -n "$(filter $(GROUP),$(LONG_GROUPS))" || { echo "make test-long GROUP=…: one of $(LONG_GROUPS)" >&2; exit 2; }

# What `make test` needs, such as Envoy, grpcurl and the control plane of the tests: pinned, into target/tools.
test-tools:
	tests/tools.sh

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	# As it is shipped: without the feature `testing` of the libraries, which the tests switch on.
	cargo check --locked --bin sds-agent
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --quiet
	tests/tools.sh cargo-deny cargo-machete
	$${SDS_AGENT_TOOLS:-target/tools}/bin/cargo-deny --locked check bans licenses sources
	$${SDS_AGENT_TOOLS:-target/tools}/bin/cargo-machete --skip-target-dir
