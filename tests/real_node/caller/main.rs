//! A caller that the tests run in cgroups and PID namespaces of pods: one process that does exactly what its arguments say, frame by
//! frame.
//!
//! ```text
//! test-caller ask SOCKET METHOD MILLISECONDS NAME…   makes a call and prints each event, until its end or the timeout
//! test-caller watch SOCKET NAME…                     opens a stream and prints each event until the connection is closed
//! test-caller hand-over SOCKET NAME…                 opens a stream; after the first answer it ends, and a child keeps the connection
//! test-caller read                                   prints each event of the connection that is its standard input
//! test-caller dial SOCKET                            connects the socket that is its standard input, and ends
//! test-caller hold                                   runs until its standard input ends
//! test-caller breed                                  starts one `hold` for each line that it reads; the next line ends it
//! test-caller naive SOCKET                           a server that trusts pids: answers with the cgroups of the caller's pid
//! test-caller reuse …                                see `reuse`
//! ```

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a part of the tests: it talks by its output and fails loudly"
)]

use std::{
    io::{BufRead, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt};

mod http2;
mod reuse;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["ask", path, method, milliseconds, ref names @ ..] => ask(path, method, milliseconds, names),
        ["watch", path, ref names @ ..] => show(&mut call(path, "StreamSecrets", names), &mut http2::Reader::default()),
        ["hand-over", path, ref names @ ..] => hand_over(path, names),
        ["read"] => show(&mut UnixStream::from(stdin()), &mut http2::Reader::default()),
        ["dial", path] => dial(std::io::stdin().as_fd(), path),
        ["hold"] => drop(std::io::stdin().read_to_end(&mut Vec::new())),
        ["breed"] => breed(),
        ["naive", path] => naive(path),
        ["reuse", ref rest @ ..] => reuse::attack(rest),
        _ => panic!("unknown: {words:?}"),
    }
}

fn ask(path: &str, method: &str, milliseconds: &str, names: &[&str]) {
    let mut stream = call(path, method, names);
    let wait = Duration::from_millis(milliseconds.parse().expect("milliseconds"));
    let ending = stream.try_clone().expect("a second descriptor");
    std::thread::spawn(move || {
        std::thread::sleep(wait);
        ending.shutdown(std::net::Shutdown::Both)
    });
    let mut reader = http2::Reader::default();
    while let Some(event) = reader.next(&mut stream) {
        println!("{event}");
        if matches!(event, http2::Event::End) {
            break;
        }
    }
}

fn call(path: &str, method: &str, names: &[&str]) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("the socket answers");
    stream.write_all(&http2::request(method, names)).expect("it reads");
    stream
}

#[expect(clippy::zombie_processes, reason = "the child is to outlive this process")]
fn hand_over(path: &str, names: &[&str]) {
    let mut stream = call(path, "StreamSecrets", names);
    let mut reader = http2::Reader::default();
    while let Some(event) = reader.next(&mut stream) {
        println!("{event}");
        if matches!(event, http2::Event::Message(_)) {
            break;
        }
    }
    me("read").stdin(OwnedFd::from(stream)).spawn().expect("a child");
    println!("handed over");
}

fn show(stream: &mut UnixStream, reader: &mut http2::Reader) {
    while let Some(event) = reader.next(stream) {
        println!("{event}");
    }
    println!("closed");
}

fn breed() {
    let mut child: Option<Child> = None;
    for _ in std::io::stdin().lock().lines() {
        match child.take() {
            Some(mut old) => {
                old.kill().expect("a child of this process");
                old.wait().expect("a child of this process");
                println!("0");
            }
            None => {
                let new = me("hold").stdin(Stdio::piped()).spawn().expect("a child");
                println!("{}", new.id());
                child = Some(new);
            }
        }
    }
    if let Some(mut last) = child {
        let _ = last.kill();
    }
}

/// A server that does what the agent must not do: it assumes that the pid of the credentials is still the caller's.
fn naive(path: &str) {
    let listener = UnixListener::bind(path).expect("a fresh name");
    println!("listening");
    for stream in listener.incoming() {
        let mut stream = stream.expect("a connection");
        let pid = getsockopt(&stream, sockopt::PeerCredentials).expect("credentials").pid();
        let _ = stream.read(&mut [0; 4096]);
        let cgroups = std::fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let _ = stream.write_all(&cgroups);
    }
}

fn me(word: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a path of its own"));
    command.arg(word);
    command
}

/// A socket that is not connected yet.
fn fresh_socket() -> OwnedFd {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket")
}

fn dial(socket: BorrowedFd<'_>, path: &str) {
    use std::os::fd::AsRawFd;
    connect(socket.as_raw_fd(), &UnixAddr::new(path).expect("a short path")).expect("the socket answers");
}

fn stdin() -> OwnedFd {
    std::io::stdin().as_fd().try_clone_to_owned().expect("a standard input")
}
