//! Texts from elsewhere, before they are shown: in the log, in a status, an Event or an answer.
//!
//! A condition's message, an error of the API server, a client's words and a name in a certificate are written by others. They may be
//! long, hold control characters, or repeat what they are about: an input with a private key in it. [`excerpt`] removes what looks like
//! key material, brings the text onto one line and cuts it. The caller passes every foreign text through it where the text enters, and
//! before the text is joined with others: half a key is not recognised. Errors of our own hold a class and a place, and no input.
//!
//! Key material is recognised by its form, whatever it is: PEM blocks, whole or not; long runs of base64, base64url or hexadecimal digits,
//! wrapped or escaped; and lists of bytes as numbers. Names, paths, UUIDs and addresses do not have these forms. A SHA-256 digest does: a
//! foreign text loses it.

use std::borrow::Cow;

/// The most characters of a foreign message that are shown.
pub const MAX_MESSAGE_CHARS: usize = 400;
/// The most characters of a foreign name that are shown.
pub const MAX_NAME_CHARS: usize = 100;
/// The most bytes of a text that are looked at; what follows is left out.
const MAX_READ_BYTES: usize = 64 << 10;
/// What stands in the place of key material.
const REDACTED: &str = "[redacted]";
/// The beginnings and ends of PEM blocks, whatever follows.
const MARKS: [&str; 2] = ["-----BEGIN", "-----END"];

/// A run of so many characters of base64 in both cases is key material; in a run of hexadecimal digits, one more than a serial number has.
const MIN_RUN: usize = 41;
/// Runs of at least so many characters beside key material are part of it.
const MIN_PART: usize = 8;
/// So many numbers in a list are bytes.
const MIN_NUMBERS: usize = 4;
/// So many pairs of hexadecimal digits in a list are bytes; a MAC address has fewer.
const MIN_PAIRS: usize = 8;

/// At most `most` characters of `text`, on one line and without key material. The mark of a cut comes on top.
pub fn excerpt(text: &str, most: usize) -> String {
    let clean: String = read(text).chars().map(|c| if breaks_lines(c) { ' ' } else { c }).collect();
    let mut out = redacted(&clean).split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = out.char_indices().nth(most) {
        out.truncate(end);
        out.push('…');
    }
    out
}

/// `text` without key material, lines kept: for one that is read by its lines before it is shown. What it becomes is still foreign.
pub fn redact(text: &str) -> Cow<'_, str> {
    redacted(read(text))
}

/// Whether a line may hold a key in PEM, as text or as numbers: a cheap look.
pub fn has_pem(text: &str) -> bool {
    text.contains("-----BEGIN") || text.contains("45, 45, 45, 45, 45, 66")
}

fn read(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_READ_BYTES)]
}

/// Control characters, line separators, and what changes the direction of the text or is not seen.
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
            // Parts with nothing between them are one.
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

/// Where something stands.
type Span = (usize, usize);

/// PEM blocks: from a BEGIN to the next END, whatever its label is, or to the text's end; and what stands before an END without a BEGIN.
fn blocks(text: &str) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut at = 0;
    while let Some((start, mark)) = MARKS.iter().filter_map(|mark| Some((at + text[at..].find(mark)?, *mark))).min() {
        let begins = mark == MARKS[0];
        let first = if begins { start } else { before(text, at, start) };
        let end = if begins { text[start..].find(MARKS[1]).map(|end| start + end) } else { Some(start) };
        // The label, and the dashes after it.
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

/// Where the base64 begins that ends at `end`.
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

/// What a piece of a text is for base64 and its kin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// A digit of it, perhaps escaped.
    Digit,
    /// What may stand between two lines of it.
    Gap,
    /// Anything else.
    Other,
}

/// The pieces of a text: place, length, kind.
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

/// A run of digits, and the run of the same stretch that it belongs to.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    form: Form,
    /// Whether only gaps stand between it and the one before.
    continues: bool,
}

/// What a run looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Long, and encoded.
    Key,
    /// Encoded, and short; or part of it.
    Encoded,
    /// A word that is long enough to be a part.
    Part,
    /// A short word.
    Word,
}

/// Runs of base64 and hexadecimal digits that are long, alone or together, and what is beside them. In a text with such a run, or with a
/// PEM block (`has_key`), every run that looks encoded is taken for a part of it.
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

/// Marks the keys of one stretch.
fn mark(runs: &[Run], is_key: &mut [bool]) {
    let mut at = 0;
    while at < runs.len() {
        // Neighbours that are long enough to be parts of one text.
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
    // A path or a name of several words may be as long. Its letters change their kind at the beginning of words alone.
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

/// How often a lower-case letter, an upper-case letter or a digit is followed by one of another kind.
fn changes(run: &str) -> usize {
    let kind = |byte: u8| (byte.is_ascii_uppercase(), byte.is_ascii_digit());
    let pairs = run.as_bytes().windows(2).filter(|pair| pair.iter().all(u8::is_ascii_alphanumeric));
    pairs.filter(|pair| kind(pair[0]) != kind(pair[1])).count()
}

/// Lists of bytes: decimal numbers, or pairs of hexadecimal digits.
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

/// Where at least `least` items stand in a row, with nothing but `signs` and blanks between them.
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

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

#[cfg(any(test, feature = "testing"))]
pub mod test_keys;
#[cfg(test)]
mod tests;
