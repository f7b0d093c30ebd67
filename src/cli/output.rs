//! Printing: to readers that may go away, and of text that others chose.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
};

use clap::ValueEnum;

use super::Exit;

/// The forms of output of most commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Prints to standard output at once, so that a reader behind a pipe sees it.
pub fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// One line to standard error, under the program's name.
pub fn complain(message: fmt::Arguments<'_>) {
    tell(format_args!("sds-agent: {message}"));
}

/// One line to standard error.
pub fn tell(message: fmt::Arguments<'_>) {
    // Nobody is left to be told that nobody reads this.
    let _ = writeln!(io::stderr().lock(), "{message}");
}

/// How a process ends that cannot print: a reader that has seen enough, such as `head`, is no failure.
pub fn unsaid(error: &io::Error) -> Exit {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Exit::Ok;
    }
    complain(format_args!("cannot write to standard output: {error}"));
    Exit::Failed
}

/// `text` without what could command a terminal.
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

/// The columns of the terminal that is standard output, where it tells.
pub fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    // Serial lines tell nothing, and a window of a few columns is no help to anybody.
    (size.ws_col >= 40).then_some(size.ws_col.into())
}

/// `text` in lines of at most `width` characters, cut between words where there is a gap; a single line without a width.
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
