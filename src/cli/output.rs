//! Printing: the reader may close the pipe, and texts may come from untrusted sources.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
};

use clap::ValueEnum;

use super::Exit;

/// The output formats of most commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For users
    Text,
    /// For programs
    Json,
}

/// Prints to standard output and flushes, so that a reader behind a pipe sees the text immediately.
pub fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints one line to standard error, with the prefix `sds-agent: `.
pub fn complain(message: fmt::Arguments<'_>) {
    tell(format_args!("sds-agent: {message}"));
}

/// Prints one line to standard error.
pub fn tell(message: fmt::Arguments<'_>) {
    // If standard error is closed, no other output remains to report the failure.
    let _ = writeln!(io::stderr().lock(), "{message}");
}

/// The exit code after a failure to print: a reader that closes the pipe, such as `head`, is no failure.
pub fn unsaid(error: &io::Error) -> Exit {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Exit::Ok;
    }
    complain(format_args!("cannot write to standard output: {error}"));
    Exit::Failed
}

/// `text` with its control characters escaped, so that it cannot control the terminal.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            // Writing to a string does not fail.
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// The number of columns of the terminal at standard output; `None` if it is unknown or below 40.
pub fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    // A serial line reports 0 columns, and text in a very narrow window is unreadable.
    (size.ws_col >= 40).then_some(size.ws_col.into())
}

/// Wraps `text` at spaces into lines of at most `width` characters; a longer word has its own line. Without a width, one line.
pub fn wrapped(text: &str, width: Option<usize>) -> Vec<String> {
    let Some(width) = width else { return vec![text.to_owned()] };
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_commanded_and_lines_fit() {
        assert_eq!(wrapped("a bc def", Some(4)), ["a bc", "def"]);
        assert_eq!(wrapped("longer than that", Some(4)), ["longer", "than", "that"]);
        assert_eq!(wrapped("a bc def", None), ["a bc def"]);
        assert_eq!(printable("a\x1b[2Jb\nü"), "a\\u{1b}[2Jb\\nü");
    }
}
