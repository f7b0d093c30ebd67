//! Tests of the quotas, on paused time.

use proptest::prelude::*;
use tokio::time::advance;

use super::*;

fn limits() -> Limits {
    Limits {
        connections: 80,
        connections_per_pod: 10,
        streams: 160,
        streams_per_pod: 20,
        new_connections_per_second_per_pod: 2,
        new_connections_burst_per_pod: 20,
        ..Limits::default()
    }
}

fn pod(number: usize) -> Origin {
    Origin::Pod(number.to_string().into())
}

fn fill(quotas: &Quotas, origin: &Origin) -> (Vec<ConnectionSlot>, Exceeded) {
    let mut slots = Vec::new();
    loop {
        match quotas.admit(origin, Instant::now()) {
            Ok(slot) => slots.push(slot),
            Err(exceeded) => return (slots, exceeded),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_has_its_share_and_takes_nothing_from_another() {
    let quotas = Quotas::new(&limits());
    let (mut mine, exceeded) = fill(&quotas, &pod(1));
    assert_eq!((mine.len(), exceeded), (10, Exceeded::Own));
    let (others, exceeded) = fill(&quotas, &pod(2));
    assert_eq!((others.len(), exceeded), (10, Exceeded::Own));
    mine.pop();
    assert!(quotas.admit(&pod(1), Instant::now()).is_ok(), "a released slot is free again");
}

#[tokio::test(start_paused = true)]
async fn connecting_again_and_again_is_bounded_and_recovers() {
    let quotas = Quotas::new(&limits());
    let mut taken = 0;
    while quotas.admit(&pod(1), Instant::now()).is_ok() {
        taken += 1;
    }
    assert_eq!(taken, 20, "the burst, one connection after the other");
    assert_eq!(quotas.admit(&pod(1), Instant::now()).unwrap_err(), Exceeded::Rate);
    assert!(quotas.admit(&pod(2), Instant::now()).is_ok(), "each caller has its own rate");
    advance(Duration::from_millis(499)).await;
    assert_eq!(quotas.admit(&pod(1), Instant::now()).unwrap_err(), Exceeded::Rate, "a refused attempt does not change the rate");
    advance(Duration::from_millis(1)).await;
    assert!(quotas.admit(&pod(1), Instant::now()).is_ok());
    assert_eq!(quotas.admit(&pod(1), Instant::now()).unwrap_err(), Exceeded::Rate);
}

#[tokio::test(start_paused = true)]
async fn however_many_flood_another_still_finds_a_place() {
    let quotas = Quotas::new(&limits());
    let floods: Vec<_> = (0..20).map(|number| fill(&quotas, &pod(number))).collect();
    let held: usize = floods.iter().map(|(slots, _)| slots.len()).sum();
    assert!(floods.iter().any(|(_, exceeded)| *exceeded == Exceeded::All));
    assert!(held <= 80);
    // Callers that came late hold little and used the reserve. Before that, the other callers were stopped at seven eighths.
    let greedy: usize = floods.iter().map(|(slots, _)| slots.len()).take_while(|count| *count == 10).sum();
    assert!(greedy <= 70, "{greedy}");

    let quotas = Quotas::new(&Limits { connections_per_pod: 1000, new_connections_burst_per_pod: 1000, ..limits() });
    let (alone, exceeded) = fill(&quotas, &pod(1));
    assert_eq!((alone.len(), exceeded), (70, Exceeded::Own), "one caller never gets the reserve, regardless of its limit");
    assert!(!quotas.are_exhausted());
    assert!(quotas.admit(&pod(2), Instant::now()).is_ok());
    let full: Vec<_> = (2..5).map(|number| fill(&quotas, &pod(number))).collect();
    assert_eq!(full.iter().map(|(slots, _)| slots.len()).collect::<Vec<_>>(), [4, 4, 2]);
    assert!(quotas.are_exhausted());
}

#[tokio::test(start_paused = true)]
async fn calls_are_counted_over_all_connections_of_a_caller() {
    let quotas = Quotas::new(&limits());
    let one = quotas.admit(&pod(1), Instant::now()).unwrap();
    let two = quotas.admit(&pod(1), Instant::now()).unwrap();
    let mut calls: Vec<_> = (0..20).map(|n| if n % 2 == 0 { one.call() } else { two.call() }.unwrap()).collect();
    for _ in 0..3 {
        assert_eq!(one.call().unwrap_err(), Exceeded::Own, "a refusal takes nothing");
    }
    let other = quotas.admit(&pod(2), Instant::now()).unwrap();
    assert!(other.call().is_ok());
    calls.pop();
    assert!(two.call().is_ok());
    drop((one, two, other, calls));
    assert_eq!(quotas.0.calls.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_caller_is_forgotten_when_it_holds_nothing_and_its_rate_has_recovered() {
    let quotas = Quotas::new(&limits());
    let slot = quotas.admit(&pod(1), Instant::now()).unwrap();
    advance(Duration::from_secs(10)).await;
    assert_eq!(quotas.remembered(), 1);
    drop(slot);
    assert_eq!(quotas.remembered(), 0, "the account is removed with the last connection");

    drop(quotas.admit(&pod(1), Instant::now()).unwrap());
    assert_eq!(quotas.remembered(), 1, "otherwise the caller would get a full burst again");
    advance(Duration::from_secs(1)).await;
    let _other = quotas.admit(&pod(2), Instant::now()).unwrap();
    assert_eq!(quotas.remembered(), 1, "the next caller removes the account");
}

#[tokio::test(start_paused = true)]
async fn who_is_turned_away_by_a_full_house_leaves_no_trace() {
    let quotas = Quotas::new(&Limits { connections: 1, ..limits() });
    let _only = quotas.admit(&pod(0), Instant::now()).unwrap();
    for number in 1..1000 {
        assert_eq!(quotas.admit(&pod(number), Instant::now()).unwrap_err(), Exceeded::All);
    }
    assert_eq!(quotas.remembered(), 1);
}

proptest! {
    /// For any sequence of connections, no caller exceeds its limit, all callers together do not exceed the total, and all counts end at
    /// zero.
    #[test]
    fn the_counts_hold(steps in proptest::collection::vec((0..12_usize, any::<bool>(), 0..400_u64), 1..300)) {
        let limits = Limits { connections: 40, connections_per_pod: 7, ..limits() };
        let quotas = Quotas::new(&limits);
        let mut held: Vec<ConnectionSlot> = Vec::new();
        let mut now = Instant::now();
        for (number, leaves, milliseconds) in steps {
            now += Duration::from_millis(milliseconds);
            if leaves {
                held.retain(|slot| *slot.origin() != pod(number));
            } else if let Ok(slot) = quotas.admit(&pod(number), now) {
                held.push(slot);
            }
            let own = held.iter().filter(|slot| *slot.origin() == pod(number)).count();
            prop_assert!(own <= 7 && held.len() <= 40);
            prop_assert_eq!(quotas.counts().connections, held.len());
        }
        held.clear();
        prop_assert_eq!(quotas.counts().connections, 0);
        let _last = quotas.admit(&pod(99), now + Duration::from_secs(60)).unwrap();
        prop_assert_eq!(quotas.remembered(), 1);
    }
}
