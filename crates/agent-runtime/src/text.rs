//! Sanitises untrusted text before it appears in the log, in a status, an Event or a response.
//!
//! A condition's message, an error of the API server, a client's message and a name in a certificate are untrusted. They may be long,
//! contain control characters, or quote their input, which may contain a private key. [`excerpt`] removes text that looks like key
//! material, joins the lines and truncates the result. The caller passes each untrusted text through it where the text enters, and before
//! it is joined with other text: half a key is not recognised. Errors of this project contain a class and a place, and no input.
//!
//! Key material is recognised by its form: PEM blocks, complete or not; long runs of base64, base64url or hexadecimal digits, wrapped or
//! escaped; and lists of bytes as numbers. Names, paths, UUIDs and addresses do not have these forms. A SHA-256 digest does, and is removed
//! from untrusted text.

use std::borrow::Cow;

/// Maximum characters of an untrusted message that are shown.
pub const MAX_MESSAGE_CHARS: usize = 400;
/// Maximum characters of an untrusted name that are shown.
pub const MAX_NAME_CHARS: usize = 100;
/// Maximum bytes of a text that are read, 64 KiB; the rest is left out.
const MAX_READ_BYTES: usize = 64 << 10;
/// Replacement of key material.
const REDACTED: &str = "[redacted]";
/// Begin and end markers of PEM blocks (RFC 7468), with any label.
const MARKS: [&str; 2] = ["-----BEGIN", "-----END"];

/// Minimum length of a run that is key material: hexadecimal digits, or base64 with an upper-case letter and a lower-case letter or a
/// digit. A serial number has at most 40 hexadecimal digits (RFC 5280, section 4.1.2.2).
const MIN_RUN: usize = 41;
/// Minimum length of a run beside key material that is taken for a part of it.
const MIN_PART: usize = 8;
/// Minimum number of decimal numbers in a list that are taken for bytes.
const MIN_NUMBERS: usize = 4;
/// Minimum number of hexadecimal pairs in a list that are taken for bytes; a MAC address has fewer.
const MIN_PAIRS: usize = 8;

/// Returns at most `most` characters of `text` on one line, without key material. A truncated text has one more character, the mark.
pub fn excerpt(text: &str, most: usize) -> String {
    let clean: String = read(text).chars().map(|c| if breaks_lines(c) { ' ' } else { c }).collect();
    let mut out = redacted(&clean).split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = out.char_indices().nth(most) {
        out.truncate(end);
        out.push('…');
    }
    out
}

/// Returns `text` without key material, with its lines, for text whose lines are parsed before it is shown. The result is still untrusted.
pub fn redact(text: &str) -> Cow<'_, str> {
    redacted(read(text))
}

/// Returns whether a line may contain a key in PEM, as text or as a list of numbers. A fast check.
pub fn has_pem(text: &str) -> bool {
    text.contains("-----BEGIN") || text.contains("45, 45, 45, 45, 45, 66")
}

fn read(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_READ_BYTES)]
}

/// Matches control characters, line separators, and characters that are invisible or change the direction of the text.
fn breaks_lines(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

fn redacted(text: &str) -> Cow<'_, str> {
    let blocks = blocks(text);
    let runs = runs(text, !blocks.is_empty());
    let mut spans = [blocks, runs, numbers(text)].concat();
    if spans.is_empty() {
        return Cow::Borrowed(text);
    }
    spans.sort_unstable();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    for (start, end) in spans {
        if start >= at {
            // Spans with only white space between them become one.
            let between = &text[at..start];
            if !out.ends_with(REDACTED) || !between.trim().is_empty() {
                out += between;
                out += REDACTED;
            }
        }
        at = at.max(end);
    }
    out += &text[at..];
    Cow::Owned(out)
}

/// Start and end of a part of a text.
type Span = (usize, usize);

/// Finds PEM blocks: from a BEGIN to the next END with any label, or to the end of the text. The base64 before an END without a BEGIN
/// counts too.
fn blocks(text: &str) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut at = 0;
    while let Some((start, mark)) = MARKS.iter().filter_map(|mark| Some((at + text[at..].find(mark)?, *mark))).min() {
        let begins = mark == MARKS[0];
        let first = if begins { start } else { before(text, at, start) };
        let end = if begins { text[start..].find(MARKS[1]).map(|end| start + end) } else { Some(start) };
        // Includes the label and the dashes after it.
        let end = end.and_then(|end| {
            let label = end + MARKS[1].len();
            let dashes = label + text[label..].find('-')?;
            Some(dashes + text[dashes..].bytes().take_while(|byte| *byte == b'-').count().min(5))
        });
        at = end.unwrap_or(text.len());
        spans.push((first, at));
    }
    spans
}

/// Returns the start of the base64 that ends at `end`.
fn before(text: &str, from: usize, end: usize) -> usize {
    let mut first = end;
    let units: Vec<(usize, usize, Unit)> = units(&text[from..end]).map(|(at, len, unit)| (from + at, len, unit)).collect();
    for (at, len, unit) in units.into_iter().rev() {
        if unit == Unit::Other || at + len != first {
            break;
        }
        first = at;
    }
    first
}

/// Class of a piece of text: digits of base64 and hexadecimal, or the text between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// A digit, possibly escaped.
    Digit,
    /// A separator that may occur between two lines of digits.
    Gap,
    /// Anything else.
    Other,
}

/// Returns the pieces of a text: start, length, class.
fn units(text: &str) -> impl Iterator<Item = (usize, usize, Unit)> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &text[at..];
        let (len, unit) = unit(rest)?;
        at += len;
        Some((at - len, len, unit))
    })
}

fn unit(rest: &str) -> Option<(usize, Unit)> {
    let first = rest.chars().next()?;
    let is = |c: char| c.is_ascii_alphanumeric() || "+/=-_".contains(c);
    let code = |from: usize, to: usize| {
        let digits = rest.get(from..to).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        u8::from_str_radix(digits, 16).ok().map(char::from)
    };
    let coded =
        |len: usize, c: char| if is(c) { (len, Unit::Digit) } else { (len, if c.is_whitespace() { Unit::Gap } else { Unit::Other }) };
    Some(match first {
        '%' => code(1, 3).map_or((1, Unit::Other), |c| coded(3, c)),
        '\\' => match rest[1..].chars().next() {
            Some('/' | '+' | '=') => (2, Unit::Digit),
            Some('n' | 'r' | 't' | '\\' | '"' | '\'') => (2, Unit::Gap),
            Some('u') if rest[2..].starts_with("00") => code(4, 6).map_or((1, Unit::Other), |c| coded(6, c)),
            _ => (1, Unit::Gap),
        },
        c if is(c) => (1, Unit::Digit),
        c if c.is_whitespace() || "\"'`,;|>[](){}".contains(c) => (c.len_utf8(), Unit::Gap),
        c => (c.len_utf8(), Unit::Other),
    })
}

/// A run of digits.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    form: Form,
    /// Whether only separators lie between this run and the previous one.
    continues: bool,
}

/// Class of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Long enough to be key material.
    Key,
    /// Looks encoded, but is too short to be key material alone.
    Encoded,
    /// Does not look encoded, but is long enough to be a part of key material.
    Part,
    /// A short word.
    Word,
}

/// Finds runs of base64 and hexadecimal digits that are long, alone or together, and the runs beside them. If the text contains such a run
/// or a PEM block (`has_key`), every run that looks encoded counts as a part of the key.
fn runs(text: &str, has_key: bool) -> Vec<Span> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut start, mut broken) = (None, true);
    for (at, _, unit) in units(text).chain([(text.len(), 0, Unit::Other)]) {
        match (unit, start) {
            (Unit::Digit, None) => start = Some(at),
            (Unit::Digit, Some(_)) => {}
            (_, Some(first)) => {
                runs.push(Run { start: first, end: at, form: form(&text[first..at]), continues: !broken });
                (start, broken) = (None, false);
            }
            (_, None) => {}
        }
        broken |= unit == Unit::Other;
    }
    let mut marked = vec![false; runs.len()];
    let mut first = 0;
    while first < runs.len() {
        let next = (first + 1..runs.len()).find(|at| !runs[*at].continues).unwrap_or(runs.len());
        mark(&runs[first..next], &mut marked[first..next]);
        first = next;
    }
    let has_key = has_key || marked.contains(&true);
    let is_key = |(run, is_key): (&Run, bool)| (is_key || (has_key && run.form == Form::Encoded)).then_some((run.start, run.end));
    runs.iter().zip(marked).filter_map(is_key).collect()
}

/// Marks the keys among runs that are separated only by separators.
fn mark(runs: &[Run], is_key: &mut [bool]) {
    let mut at = 0;
    while at < runs.len() {
        // Adjacent runs that are long enough to be parts of one key.
        let end = (at..runs.len()).find(|at| runs[*at].form == Form::Word).unwrap_or(runs.len());
        let group = &runs[at..end];
        let encoded = group.iter().filter(|run| matches!(run.form, Form::Key | Form::Encoded));
        let length: usize = encoded.clone().map(|run| run.end - run.start).sum();
        let is_wrapped = length >= MIN_RUN && encoded.count() >= 2;
        if is_wrapped || group.iter().any(|run| run.form == Form::Key) {
            is_key[at..end].fill(true);
            // The last line of a key may be short.
            if let Some(last) = is_key.get_mut(end).filter(|_| runs[end].continues && is_mixed(runs[end])) {
                *last = true;
            }
        }
        at = end.max(at) + 1;
    }

    fn is_mixed(run: Run) -> bool {
        run.end - run.start >= 4 && run.form == Form::Word
    }
}

fn form(run: &str) -> Form {
    let has = |is: fn(&u8) -> bool| run.as_bytes().iter().any(is);
    let (upper, lower, digit) = (has(u8::is_ascii_uppercase), has(u8::is_ascii_lowercase), has(u8::is_ascii_digit));
    let sign = run.contains(['+', '=', '%', '\\']);
    let hex = run.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max().unwrap_or_default();
    // A path or a name of several words may be as long. In these, letters change between upper case, lower case and digits only at the
    // start of a word.
    let is_one = !run.contains(['/', '-', '_']) || changes(run) * 4 >= run.len();
    if hex >= MIN_RUN || (run.len() >= MIN_RUN && is_one && upper && (lower || digit)) {
        Form::Key
    } else if run.len() < MIN_PART {
        Form::Word
    } else if (upper && lower && (digit || sign)) || hex >= 24 {
        Form::Encoded
    } else {
        Form::Part
    }
}

/// Counts changes between upper-case letters, digits and other characters in adjacent letters and digits.
fn changes(run: &str) -> usize {
    let kind = |byte: u8| (byte.is_ascii_uppercase(), byte.is_ascii_digit());
    let pairs = run.as_bytes().windows(2).filter(|pair| pair.iter().all(u8::is_ascii_alphanumeric));
    pairs.filter(|pair| kind(pair[0]) != kind(pair[1])).count()
}

/// Finds lists of bytes: decimal numbers, or pairs of hexadecimal digits.
fn numbers(text: &str) -> Vec<Span> {
    let decimal = list(text, MIN_NUMBERS, ",;", |rest| {
        let len = rest.bytes().take_while(u8::is_ascii_digit).count();
        (1..=3).contains(&len).then_some(len).filter(|len| rest[..*len].parse::<u16>().is_ok_and(|number| number < 256))
    });
    let pairs = list(text, MIN_PAIRS, ",;:", |rest| {
        let prefix = if rest.starts_with("0x") || rest.starts_with("\\x") { 2 } else { 0 };
        let len = rest[prefix..].bytes().take_while(u8::is_ascii_hexdigit).count();
        if prefix > 0 { (len >= 2).then_some(4) } else { (len == 2).then_some(2) }
    });
    [decimal, pairs].concat()
}

/// Finds sequences of at least `least` items, with only `signs` and white space between them.
fn list(text: &str, least: usize, signs: &str, item: impl Fn(&str) -> Option<usize>) -> Vec<Span> {
    let mut spans = Vec::new();
    let (mut at, mut current): (usize, Option<(Span, usize)>) = (0, None);
    let mut after_word = false;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        if let Some(len) = item(rest).filter(|_| !after_word) {
            let ((start, _), count) = current.unwrap_or(((at, at), 0));
            (current, after_word) = (Some(((start, at + len), count + 1)), !rest.starts_with("\\x"));
            at += len;
            continue;
        }
        if !c.is_whitespace() && !signs.contains(c) {
            spans.extend(current.take().filter(|(_, count)| *count >= least).map(|(span, _)| span));
        }
        after_word = c.is_alphanumeric();
        at += c.len_utf8();
    }
    spans.extend(current.filter(|(_, count)| *count >= least).map(|(span, _)| span));
    spans
}

/// Encodes bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

#[cfg(any(test, feature = "testing"))]
pub mod test_keys;
#[cfg(test)]
mod tests;
