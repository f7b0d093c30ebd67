//! `fetch --watch`: one stream with every name. It is opened again whenever it ends.

use std::{path::Path, time::Duration};

use super::{
    Show, client,
    failure::Failure,
    subscription::{Subscription, Taken},
};
use crate::cli::output;

/// Limits of the delay between connections, as in Envoy.
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(500);
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(30);

/// Prints updates until a failure that a new connection cannot fix. That includes a server that was never reached.
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
        output::complain(format_args!("{why}; retrying in {:.1} s", wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
    }
}

/// Prints the updates of one connection until it ends.
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
        // If the connection has ended, the next read returns the error.
        let _ = replies.send(reply).await;
    }
    Ok(())
}

/// A backoff with jitter, from 0.5 s to 30 s. Each message resets it.
#[derive(Debug, Default)]
struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next delay; `random` is uniform over 0 to 1.
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
