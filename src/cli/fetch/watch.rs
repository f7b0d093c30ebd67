//! `fetch --watch`: one stream with every name, opened again whenever it ends.

use std::{path::Path, time::Duration};

use super::{
    Show, client,
    failure::Failure,
    subscription::{Subscription, Taken},
};
use crate::cli::output;

/// Envoy's own bounds.
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(500);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(30);

/// Shows updates for ever. Returns what no new connection can mend; a server that has never been reached is such a thing.
pub(super) async fn watch(socket: &Path, subscription: &mut Subscription, show: &mut Show<'_>) -> Result<(), Failure> {
    let mut backoff = Backoff::default();
    let mut served = false;
    loop {
        let failure = match follow(socket, subscription, show, &mut backoff, &mut served).await {
            Ok(()) => None,
            Err(failure) if served && failure.is_passing() => Some(failure),
            Err(failure) => return Err(failure),
        };
        let wait = backoff.next(fastrand::f64());
        let why = failure.map_or_else(|| "the server ended the stream".to_owned(), |failure| failure.to_string());
        output::complain(format_args!("{why}; asking again in {:.1} s", wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
    }
}

/// One connection's life.
async fn follow(
    socket: &Path,
    subscription: &mut Subscription,
    show: &mut Show<'_>,
    backoff: &mut Backoff,
    served: &mut bool,
) -> Result<(), Failure> {
    let mut client = client::connect(socket).await?;
    let (replies, mut responses) = client::stream(&mut client, subscription.first()).await?;
    if *served {
        output::complain(format_args!("connected again"));
    }
    *served = true;
    while let Some(response) = responses.message().await.map_err(Failure::status)? {
        backoff.reset();
        let Taken { updates, problems, reply } = subscription.take(response);
        show.all(&updates)?;
        for problem in problems {
            output::complain(format_args!("{problem}"));
        }
        // Where the server has gone, the next message says so.
        let _ = replies.send(reply).await;
    }
    Ok(())
}

/// Jittered, 0.5 to 30 s, from the start again after each message.
#[derive(Debug, Default)]
struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next wait; `random` is uniform over 0 to 1.
    fn next(&mut self, random: f64) -> Duration {
        self.attempts = self.attempts.saturating_add(1);
        let ceiling = MAX_RECONNECT_DELAY.min(MIN_RECONNECT_DELAY * 2_u32.saturating_pow(self.attempts.min(8)));
        MIN_RECONNECT_DELAY + (ceiling - MIN_RECONNECT_DELAY).mul_f64(random)
    }

    fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_to_its_bound_and_starts_again() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8).map(|_| u64::try_from(backoff.next(1.0).as_millis()).unwrap()).collect();
        assert_eq!(waits, [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
        assert_eq!(backoff.next(0.0), MIN_RECONNECT_DELAY);
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_secs(1));
    }
}
