//! Simulates the certificate requests of a whole fleet: `cargo run --release --example fleet`.
//!
//! Prints a table and exits with 1 if a bound is exceeded; `--svg FILE` draws the requests over time. The planner and the schedule are
//! the agent's own; time and signer are simulated. `docs/sizing.md` explains the bounds.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::disallowed_methods, reason = "its output is its purpose")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    unreachable_pub,
    reason = "counts and times of a simulation"
)]

use std::{ops::Range, path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;

use self::simulation::{Outage, Outcome, Scenario};

mod plot;
mod simulation;

/// The windows in which requests are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Maximum ratio of a window to the mean, for a fleet in operation.
const PEAK: f64 = 1.3;
/// Maximum ratio of requests with a restart to requests without. The difference is the requests in progress (for a certificate that was
/// signed and not yet published, the agent requests another one) and the variance between two draws.
const RESTART: f64 = 1.005;
const HOUR: Duration = Duration::from_secs(3600);

/// The fleet.
#[derive(Debug, Parser)]
struct Args {
    /// Agents
    #[arg(long, default_value_t = 5000)]
    nodes: usize,
    /// Identities of each agent
    #[arg(long, default_value_t = 30)]
    identities: usize,
    /// Lifetime of a certificate
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
    lifetime: Duration,
    /// A shorter lifetime, for which an hour without a signer matters
    #[arg(long, default_value = "4h", value_parser = humantime::parse_duration)]
    short: Duration,
    /// Signatures per second in normal operation, as a multiple of the mean
    #[arg(long, default_value_t = 10.0)]
    headroom: f64,
    /// Seed of all random draws
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// File for the drawing
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// A line of the table.
struct Row {
    name: String,
    requests: usize,
    mean: f64,
    peak: Option<f64>,
    expired: usize,
    beyond_saving: usize,
    broken: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let (rows, panels) = simulate(&args);
    println!("{} nodes × {} identities, windows of {} s", args.nodes, args.identities, WINDOW.as_secs());
    println!("{:<44} {:>9} {:>8} {:>10} {:>8} {:>14}", "", "requests", "mean/s", "peak/mean", "expired", "beyond saving");
    for row in &rows {
        let peak = row.peak.map_or_else(|| "-".to_owned(), |peak| format!("{peak:.2}"));
        println!(
            "{:<44} {:>9} {:>8.2} {peak:>10} {:>8} {:>14}{}",
            row.name,
            row.requests,
            row.mean,
            row.expired,
            row.beyond_saving,
            row.broken.as_deref().map(|why| format!("  <- {why}")).unwrap_or_default()
        );
    }
    if let Some(path) = args.svg
        && let Err(error) = std::fs::write(&path, plot::svg(&panels))
    {
        eprintln!("cannot write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    if rows.iter().any(|row| row.broken.is_some()) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs all scenarios.
fn simulate(args: &Args) -> (Vec<Row>, Vec<plot::Panel>) {
    let (mut rows, mut panels) = (Vec::new(), Vec::new());
    let cold = Scenario {
        nodes: args.nodes,
        identities: args.identities,
        lifetime: args.lifetime,
        rate: 0.0,
        rollout: WINDOW,
        until: args.lifetime * 3,
        restart: None,
        outage: None,
        seed: args.seed,
    };
    let cold = Scenario { rate: cold.mean_rate() * args.headroom, ..cold };
    let undisturbed = simulation::run(&cold);
    // All first renewals lie before this time, so only later renewals are counted.
    let settled = args.lifetime.mul_f64(0.65)..cold.until;
    rows.push(steady(&format!("cold start, {} certificates", humantime::format_duration(args.lifetime)), &cold, &undisturbed, &settled));
    panels.push(plot::Panel::new("cold start of the whole fleet", &undisturbed, &cold, WINDOW));

    let at = args.lifetime * 3 / 2;
    let restart = Scenario { restart: Some(at), ..cold.clone() };
    let restarted = simulation::run(&restart);
    rows.push(compare("all agents restarted within a minute", &restart, &restarted, &undisturbed, &(at..restart.until)));
    panels.push(plot::Panel::new("all agents restarted within a minute", &restarted, &restart, WINDOW));

    for lifetime in [args.lifetime, args.short] {
        for fails in [false, true] {
            let begin = lifetime * 2;
            let outage = Outage { at: begin..begin + HOUR, fails };
            let scenario = Scenario { lifetime, until: begin + HOUR + lifetime * 2, outage: Some(outage), ..cold.clone() };
            let scenario = Scenario { rate: scenario.mean_rate() * 2.0, ..scenario };
            let outcome = simulation::run(&scenario);
            let how = if fails { "requests fail" } else { "requests wait" };
            let name = format!("signer away for 1h, {how}, {}", humantime::format_duration(lifetime));
            rows.push(outlived(&name, &scenario, &outcome));
            panels.push(plot::Panel::new(&name, &outcome, &scenario, WINDOW));
        }
    }
    (rows, panels)
}

fn row(name: &str, scenario: &Scenario, outcome: &Outcome) -> Row {
    Row {
        name: name.to_owned(),
        requests: outcome.requests.len(),
        mean: scenario.mean_rate(),
        peak: None,
        expired: outcome.expired(scenario.until),
        beyond_saving: 0,
        broken: None,
    }
}

fn steady(name: &str, scenario: &Scenario, outcome: &Outcome, span: &Range<Duration>) -> Row {
    let peak = outcome.peak_to_mean(WINDOW, span);
    let broken = (peak > PEAK).then(|| format!("more than {PEAK} times the mean"));
    let row = Row { peak: Some(peak), broken, ..row(name, scenario, outcome) };
    none_expired(row)
}

fn compare(name: &str, scenario: &Scenario, outcome: &Outcome, before: &Outcome, span: &Range<Duration>) -> Row {
    let count = |outcome: &Outcome| outcome.requests.iter().filter(|at| span.contains(*at)).count() as f64;
    let added = count(outcome) / count(before);
    let broken = (added > RESTART).then(|| format!("{:.2} % more requests than without", (added - 1.0) * 100.0));
    none_expired(Row { broken, ..row(name, scenario, outcome) })
}

fn none_expired(row: Row) -> Row {
    let broken = row.broken.or_else(|| (row.expired > 0).then(|| "certificates expired".to_owned()));
    Row { broken, ..row }
}

fn outlived(name: &str, scenario: &Scenario, outcome: &Outcome) -> Row {
    let outage = scenario.outage.as_ref().map(|outage| outage.at.clone()).unwrap_or_default();
    let beyond_saving = outcome.beyond_saving(scenario.rate, &outage, scenario.until);
    let row = Row { beyond_saving, ..row(name, scenario, outcome) };
    let broken = (row.expired > beyond_saving).then(|| "more expired than had to".to_owned());
    Row { broken, ..row }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cold(nodes: usize, lifetime: Duration) -> Scenario {
        let scenario = Scenario {
            nodes,
            identities: 30,
            lifetime,
            rate: 0.0,
            rollout: WINDOW,
            until: lifetime * 2,
            restart: None,
            outage: None,
            seed: 1,
        };
        Scenario { rate: scenario.mean_rate() * 10.0, ..scenario }
    }

    #[test]
    fn a_large_fleet_that_started_at_once_is_even_from_the_second_renewal_on() {
        let lifetime = 24 * HOUR;
        let scenario = cold(5000, lifetime);
        let outcome = simulation::run(&scenario);
        let peak = outcome.peak_to_mean(WINDOW, &(lifetime.mul_f64(0.65)..scenario.until));
        println!("figure: a cold fleet's busiest minute, as a share of the mean: {peak:.2}");
        assert!(peak <= PEAK, "{peak}");
        assert_eq!(outcome.expired(scenario.until), 0);
    }

    #[test]
    fn a_restart_of_all_agents_asks_only_for_what_was_under_way() {
        let lifetime = 24 * HOUR;
        let scenario = Scenario { until: lifetime * 3, ..cold(200, lifetime) };
        let at = lifetime * 3 / 2;
        let (before, after) = (simulation::run(&scenario), simulation::run(&Scenario { restart: Some(at), ..scenario.clone() }));
        let row = compare("restart", &scenario, &after, &before, &(at..scenario.until));
        assert_eq!(row.broken, None);
        // Shows that the check can fail.
        let twice = Outcome { requests: [before.requests.clone(), before.requests.clone()].concat(), ..Outcome::default() };
        assert!(compare("twice", &scenario, &twice, &before, &(at..scenario.until)).broken.is_some());
    }

    #[test]
    fn an_hour_without_a_signer_costs_no_certificate_that_could_be_saved() {
        for (hours, fails) in [(24, false), (24, true), (4, false), (4, true)] {
            let begin = 2 * hours * HOUR;
            let scenario = cold(100, hours * HOUR);
            let outage = Some(Outage { at: begin..begin + HOUR, fails });
            let scenario = Scenario { rate: scenario.mean_rate() * 2.0, until: begin + (hours + 1) * HOUR, outage, ..scenario };
            assert_eq!(outlived("", &scenario, &simulation::run(&scenario)).broken, None, "{hours} h, {fails}");
        }
        // Shows that the check can fail, with a signer that does not return.
        let scenario = cold(10, HOUR);
        let outage = Some(Outage { at: HOUR..2 * HOUR, fails: true });
        let outcome = simulation::run(&Scenario { until: 2 * HOUR, outage, ..scenario.clone() });
        assert!(outcome.expired(2 * HOUR) > 0);
    }
}
