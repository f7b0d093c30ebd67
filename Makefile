# What people type. `make test` is everything; `cargo test` alone is everything that needs no other program.
.PHONY: dev test test-long test-tools lint

dev:
	cargo run --release -- dev

# One cargo invocation: the library is built once, and its closing lines are the test runner's.
test: test-tools
	cargo test --locked --features real-tests --no-fail-fast

# Tests that take minutes, by group: `make test-long GROUP=scale`. One at a time: they measure.
test-long: test-tools
	cargo test --locked --features long-tests --test long_$(GROUP) -- --nocapture --test-threads 1

# Envoy, grpcurl and the control plane of the tests, pinned, into target/tools.
test-tools:
	tests/tools.sh

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	tests/tools.sh cargo-deny
	$${SDS_AGENT_TOOLS:-target/tools}/bin/cargo-deny --locked check bans licenses sources
