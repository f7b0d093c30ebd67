//! The table: one line for each identity, the most urgent first, and its errors below.

use std::{
    cmp::Ordering,
    fmt::Write,
    time::{Duration, SystemTime},
};

use super::Row;
use crate::cli::output::{printable, wrapped};

const HEADINGS: [&str; 6] = ["IDENTITY", "STATE", "SERIAL", "EXPIRES IN", "RENEWAL IN", "SUBS"];
/// Digits of a serial number that are shown. They distinguish it from the others of a node.
const SERIAL: usize = 12;
/// Indentation of the lines below an identity.
const INDENT: &str = "    ";

/// The rows as text, for a terminal of `width` columns; without one, nothing is wrapped.
pub(super) fn text(mut rows: Vec<Row>, now: SystemTime, width: Option<usize>) -> String {
    if rows.is_empty() {
        return "the agent holds no certificate: no client has requested one\n".to_owned();
    }
    rows.sort_by(|a, b| pressing(a).cmp(&pressing(b)).then_with(|| by_end(a, b)).then_with(|| a.spiffe_id.cmp(&b.spiffe_id)));
    let cells: Vec<[String; 6]> = rows.iter().map(|row| cells(row, now)).collect();
    let mut widths = HEADINGS.map(str::len);
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = line(&HEADINGS.map(str::to_owned), &widths);
    for (row, cells) in rows.iter().zip(&cells) {
        out += &line(cells, &widths);
        for (label, said) in below(row) {
            for text in wrapped(&format!("{label}: {}", printable(said)), width.map(|width| width.saturating_sub(INDENT.len()))) {
                // Writing to a string does not fail.
                let _ = writeln!(out, "{INDENT}{text}");
            }
        }
    }
    out
}

fn line(cells: &[String; 6], widths: &[usize; 6]) -> String {
    let mut out = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        // Writing to a string does not fail.
        let _ = write!(out, "{cell:<width$}  ");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

fn cells(row: &Row, now: SystemTime) -> [String; 6] {
    let serial = row.serial.as_deref().map_or_else(|| "-".to_owned(), short);
    // After a failed attempt, the next attempt precedes the planned renewal.
    let next = if row.state == "idle" { None } else { row.next_attempt.as_deref().or(row.renew_at.as_deref()) };
    [
        printable(&row.spiffe_id),
        printable(&row.state),
        serial,
        until(row.not_after.as_deref(), now),
        until(next, now),
        row.subscribers.to_string(),
    ]
}

fn short(serial: &str) -> String {
    let serial = printable(serial);
    match serial.char_indices().nth(SERIAL) {
        Some((end, _)) => format!("{}…", &serial[..end]),
        None => serial,
    }
}

fn below(row: &Row) -> Vec<(&'static str, &str)> {
    let error = row.last_error.as_deref().map(|error| ("last error", error));
    let waits = row.waits_for.as_deref().map(|why| ("waits for", why));
    let request = row.request.as_deref().map(|name| ("request", name));
    [error, waits, request].into_iter().flatten().collect()
}

/// The time until `time` in its two largest units; negative if it has passed.
fn until(time: Option<&str>, now: SystemTime) -> String {
    let Some(at) = time.and_then(|time| humantime::parse_rfc3339(time).ok()) else { return "-".to_owned() };
    match at.duration_since(now) {
        Ok(left) => rough(left),
        Err(passed) => format!("-{}", rough(passed.duration())),
    }
}

fn rough(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

fn pressing(row: &Row) -> u8 {
    match (row.state.as_str(), row.last_error.is_some()) {
        ("expired", _) => 0,
        ("overdue", _) => 1,
        ("pending", true) => 2,
        ("pending", false) => 3,
        ("valid", true) => 4,
        ("valid", false) => 5,
        ("held_by_client", _) => 6,
        _ => 7,
    }
}

/// Orders by expiry. The times are RFC 3339 in UTC, which sort as text.
fn by_end(a: &Row, b: &Row) -> Ordering {
    match (&a.not_after, &b.not_after) {
        (Some(a), Some(b)) => a.cmp(b),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, state: &str, not_after: Option<&str>) -> Row {
        Row { spiffe_id: id.into(), state: state.into(), not_after: not_after.map(str::to_owned), subscribers: 2, ..Row::default() }
    }

    #[test]
    fn the_most_pressing_is_first_and_says_what_is_wrong() {
        let now = humantime::parse_rfc3339("2026-01-01T00:00:00Z").unwrap();
        let good = Row {
            serial: Some("0123456789abcdef0123".into()),
            renew_at: Some("2026-01-01T12:00:30Z".into()),
            next_attempt: Some("2026-01-01T00:01:05Z".into()),
            ..row("spiffe://a/good", "valid", Some("2026-01-03T01:00:00Z"))
        };
        let expired = row("spiffe://a/expired", "expired", Some("2025-12-31T23:59:58Z"));
        let pending = Row {
            last_error: Some("create: no\x1b[2J".into()),
            waits_for: Some("an approver: it is neither approved nor denied".into()),
            ..row("spiffe://a/pending", "pending", None)
        };
        let idle = Row { renew_at: Some("2026-01-01T12:00:30Z".into()), ..row("spiffe://a/idle", "idle", Some("2026-01-01T00:00:09Z")) };
        let expected = "\
IDENTITY            STATE    SERIAL         EXPIRES IN  RENEWAL IN  SUBS
spiffe://a/expired  expired  -              -2s         -           2
spiffe://a/pending  pending  -              -           -           2
    last error: create: no\\u{1b}[2J
    waits for: an approver: it is neither approved nor denied
spiffe://a/good     valid    0123456789ab…  2d1h        1m5s        2
spiffe://a/idle     idle     -              9s          -           2
";
        let rows = vec![idle, good, pending.clone(), expired];
        assert_eq!(text(rows, now, None), expected);
        let narrow = text(vec![pending], now, Some(32));
        assert!(narrow.ends_with("    waits for: an approver: it\n    is neither approved nor\n    denied\n"), "{narrow}");
    }

    #[test]
    fn equals_are_sorted_by_their_end() {
        let rows = [("b", Some("2026-01-02T00:00:00Z")), ("c", None), ("a", Some("2026-01-01T00:00:00Z"))];
        let rows = rows.map(|(id, end)| row(id, "valid", end)).to_vec();
        let text = text(rows, SystemTime::UNIX_EPOCH, None);
        let order: Vec<_> = text.lines().skip(1).filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(order, ["a", "b", "c"]);
    }

    #[test]
    fn nothing_is_said_in_words() {
        assert_eq!(text(Vec::new(), SystemTime::UNIX_EPOCH, None), "the agent holds no certificate: no client has requested one\n");
    }
}
