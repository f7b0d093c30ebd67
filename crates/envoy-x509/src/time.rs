//! The times of certificates and revocation lists (RFC 5280, section 4.1.2.5).

use crate::der::{Element, GENERALIZED_TIME, UTC_TIME};

/// A time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// Seconds since the Unix epoch.
    At(i64),
    /// A UTCTime with an offset. Envoy reads the certificate, and never accepts it in a path.
    WithOffset,
}

impl Time {
    /// Seconds since the Unix epoch. `None` for a time with an offset.
    pub fn seconds(self) -> Option<i64> {
        match self {
            Self::At(seconds) => Some(seconds),
            Self::WithOffset => None,
        }
    }
}

/// Reads a UTCTime or a GeneralizedTime.
pub(crate) fn parse(element: &Element<'_>) -> Option<Time> {
    let (year, rest) = match element.tag {
        UTC_TIME => {
            let (year, rest) = digits(element.content, 2)?;
            (if year >= 50 { 1900 + year } else { 2000 + year }, rest)
        }
        GENERALIZED_TIME => digits(element.content, 4)?,
        _ => return None,
    };
    let (month, rest) = digits(rest, 2)?;
    let (day, rest) = digits(rest, 2)?;
    let (hour, rest) = digits(rest, 2)?;
    let (minute, rest) = digits(rest, 2)?;
    let (second, rest) = digits(rest, 2)?;
    if !(1..=12).contains(&month) || day < 1 || day > days_of(year, month) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    match rest {
        b"Z" => Some(Time::At(((days_until(year, month, day) * 24 + hour) * 60 + minute) * 60 + second)),
        [b'+' | b'-', offset @ ..] if element.tag == UTC_TIME => {
            let (hours, offset) = digits(offset, 2)?;
            let (minutes, end) = digits(offset, 2)?;
            (hours <= 23 && minutes <= 59 && end.is_empty()).then_some(Time::WithOffset)
        }
        _ => None,
    }
}

fn digits(text: &[u8], count: usize) -> Option<(i64, &[u8])> {
    let (number, rest) = text.split_at_checked(count)?;
    let value = number.iter().try_fold(0, |value, byte| byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0')))?;
    Some((value, rest))
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from the Unix epoch to this day of the Gregorian calendar.
fn days_until(year: i64, month: i64, day: i64) -> i64 {
    let before = year - 1;
    let years = before * 365 + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400) - 719_162;
    years + (1..month).map(|month| days_of(year, month)).sum::<i64>() + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(tag: u32, text: &str) -> Option<Time> {
        parse(&Element { tag, whole: &[], content: text.as_bytes() })
    }

    #[test]
    fn times_are_read_in_the_forms_of_rfc_5280() {
        for (tag, text, seconds) in [
            (UTC_TIME, "700101000000Z", 0),
            (UTC_TIME, "500101000000Z", -631_152_000),
            (UTC_TIME, "491231235959Z", 2_524_607_999),
            (GENERALIZED_TIME, "20000229000000Z", 951_782_400),
            (GENERALIZED_TIME, "99991231235959Z", 253_402_300_799),
            (GENERALIZED_TIME, "00000101000000Z", -62_167_219_200),
        ] {
            assert_eq!(read(tag, text), Some(Time::At(seconds)), "{text}");
        }
        assert_eq!(read(UTC_TIME, "260101000000+0100"), Some(Time::WithOffset));
        for (tag, text) in [
            (UTC_TIME, "2601010000Z"),
            (UTC_TIME, "260101000000"),
            (UTC_TIME, "261301000000Z"),
            (UTC_TIME, "260229000000Z"),
            (UTC_TIME, "260101240000Z"),
            (UTC_TIME, "260101000060Z"),
            (UTC_TIME, "26010100000aZ"),
            (GENERALIZED_TIME, "20260101000000.5Z"),
            (GENERALIZED_TIME, "20260101000000+0100"),
            (GENERALIZED_TIME, "19000229000000Z"),
        ] {
            assert_eq!(read(tag, text), None, "{text}");
        }
    }
}
