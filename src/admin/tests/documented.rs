//! The requests of curl that the pages print, sent as curl sends them.

use std::{fs, path::Path};

use super::*;

/// A command of a page.
#[derive(Debug, Default)]
struct Curl {
    method: Option<String>,
    headers: Vec<String>,
    body: Option<String>,
    url: String,
}

/// The words of a command as a shell splits them, up to a pipe.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in command.chars() {
        match (c, quote) {
            ('|' | '#', None) => break,
            (' ', None) => words.extend(word.take()),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(open)) if c == open => quote = None,
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

impl Curl {
    /// `None` for another program.
    fn parse(command: &str) -> Option<Self> {
        let mut words = words(command.trim_start().strip_prefix("curl ")?).into_iter();
        let mut curl = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-s" => {}
                "-m" => drop(words.next()),
                "-X" => curl.method = words.next(),
                "-H" => curl.headers.extend(words.next()),
                "-d" => curl.body = words.next(),
                word => {
                    assert!(curl.url.is_empty() && !word.starts_with('-'), "the test does not know {word:?} of {command}");
                    word.clone_into(&mut curl.url);
                }
            }
        }
        Some(curl)
    }

    fn authority_and_path(&self) -> (&str, &str) {
        let rest = self.url.strip_prefix("http://").unwrap_or(&self.url);
        rest.split_at(rest.find('/').unwrap_or(rest.len()))
    }

    fn request(&self) -> String {
        let (authority, path) = self.authority_and_path();
        let method = self.method.as_deref().unwrap_or(if self.body.is_some() { "POST" } else { "GET" });
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n");
        self.headers.iter().for_each(|header| request.extend([header, "\r\n"]));
        match &self.body {
            Some(body) => {
                let kind = "Content-Type: application/x-www-form-urlencoded";
                request + &format!("Content-Length: {}\r\n{kind}\r\n\r\n{body}", body.len())
            }
            None => request + "\r\n",
        }
    }
}

/// Each line of a page's code blocks, and its code spans.
fn code(page: &str) -> Vec<String> {
    let blocks = page.split("```").enumerate();
    let code = blocks.flat_map(|(number, part)| match number % 2 {
        0 => part.split('`').skip(1).step_by(2).map(|span| span.replace('\n', " ")).collect::<Vec<_>>(),
        _ => part.replace("\\\n", " ").lines().map(str::to_owned).collect(),
    });
    code.collect()
}

fn pages(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(pages(&path));
        } else if path.extension().is_some_and(|it| it == "md") {
            found.push(fs::read_to_string(path).unwrap());
        }
    }
    found
}

/// The commands about the ports of agent and approver.
fn documented() -> Vec<Curl> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts: Vec<_> = ["docs", "daemonset", "examples", ".github"].iter().flat_map(|folder| pages(&root.join(folder))).collect();
    texts.extend(["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"].map(|page| fs::read_to_string(root.join(page)).unwrap()));
    let curls = texts.iter().flat_map(|text| code(text)).filter_map(|command| Curl::parse(&command));
    curls.filter(|curl| curl.authority_and_path().0.contains(":1509")).collect()
}

#[tokio::test]
async fn every_documented_request_is_accepted_as_printed() {
    let (_guard, filter) = telemetry::capture("info", telemetry::Format::Json, std::io::sink).unwrap();
    let (controls, mut calls) = controls(Arc::new(Vec::new));
    tokio::spawn(async move {
        while let Some(call) = calls.recv().await {
            call.answer.send(Reissued { matched: 1, just_done: 0, retried: 0 }).unwrap();
        }
    });
    // Kept, so that the agent is ready.
    let (routes, start) = routes();
    drop(start);
    let routes = routes.with_controls(controls).with_log(Some(LogLevel::new(filter)));
    let metrics = served(PAGES, routes.for_metrics());
    let admin = served(PAGES, routes);
    let (mut reads, mut writes) = (0, 0);
    for curl in documented() {
        let server = if curl.authority_and_path().0.ends_with(":15091") { &metrics } else { &admin };
        let answer = say(server.address, &curl.request()).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{curl:?}: {answer}");
        if curl.headers.is_empty() {
            reads += 1;
            continue;
        }
        writes += 1;
        let bare = Curl { headers: Vec::new(), ..curl };
        let answer = say(server.address, &bare.request()).await;
        let expected = "refused: a request that changes something needs the header `Sds-Agent-Admin: 1`\n";
        assert_answer(&answer, 403, TEXT, expected);
    }
    assert!(reads >= 7 && writes >= 6, "{reads} reads, {writes} writes");
}

/// Bytes that browsers and pages send, and not only values that the parser makes.
#[tokio::test]
async fn requests_of_web_pages_are_refused_on_the_admin_address_alone() {
    let (controls, mut calls) = controls(Arc::new(Vec::new));
    let routes = routes().0.with_controls(controls);
    let (metrics, admin) = (served(PAGES, routes.for_metrics()), served(PAGES, routes));
    let form = "content-type: text/plain\r\ncontent-length: 3\r\n";
    for (line, headers, body) in [
        ("GET /certs", "host: evil.example:15090\r\n".to_owned(), ""),
        ("GET /certs", String::new(), ""),
        ("GET /certs", "host: localhost\r\nhost: evil.example\r\n".to_owned(), ""),
        ("GET /certs", "host: localhost\r\nsec-fetch-site: cross-site\r\nsec-fetch-mode: no-cors\r\n".to_owned(), ""),
        ("GET http://evil.example/certs", "host: localhost\r\n".to_owned(), ""),
        ("POST /reissue", format!("host: localhost:15090\r\n{form}"), "a=b"),
        ("POST /reissue", format!("host: localhost:15090\r\norigin: null\r\nsds-agent-admin: 1\r\n{form}"), "a=b"),
        ("OPTIONS /reissue", "host: localhost\r\norigin: http://evil.example\r\naccess-control-request-method: POST\r\n".to_owned(), ""),
    ] {
        let answer = say(admin.address, &format!("{line} HTTP/1.1\r\n{headers}\r\n{body}")).await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\r\n\r\nrefused: "), "{line} {headers}: {answer}");
        assert!(!answer.contains("evil") && !answer.to_lowercase().contains("access-control-allow"), "{answer}");
    }
    assert!(calls.try_recv().is_err(), "nothing was reissued");
    assert_answer(&say(admin.address, "GET /livez HTTP/1.1\r\nHOST: [::1]:15090\r\n\r\n").await, 200, TEXT, "ok\n");
    // Prometheus names the pod.
    assert_answer(&say(metrics.address, "GET /livez HTTP/1.1\r\nhost: 10.0.0.7:15091\r\n\r\n").await, 200, TEXT, "ok\n");
}
