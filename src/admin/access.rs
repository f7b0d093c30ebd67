//! Which requests the admin address accepts: those of programs on the node, but not those that a web page makes a browser send.
//!
//! The address is loopback only and asks for no credentials, but a browser on the same machine reaches it too. A page can send it requests,
//! and read the answers if its own name resolves to 127.0.0.1 (DNS rebinding). So a request has to name this machine in `Host`, and must not
//! come from a page. A request that changes the agent also needs a header that a form cannot send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::{HeaderMap, HeaderName, Method, Request, Version, header};

/// The header of requests that change the agent. Its value is `1`.
pub const HEADER: HeaderName = HeaderName::from_static("sds-agent-admin");

/// Browsers send it with every request; no page can change it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Checks a request to the admin address. An error is the sentence for the client.
pub(super) fn check<B>(request: &Request<B>) -> Result<(), &'static str> {
    let headers = request.headers();
    check_host(headers, request.version())?;
    // A request for a proxy names its host in the first line.
    if request.uri().authority().is_some_and(|authority| !is_this_machine(authority.as_str())) {
        return Err(OTHER_HOST);
    }
    if headers.contains_key(header::ORIGIN) {
        return Err("refused: the request comes from a web page (it has the header Origin)\n");
    }
    if headers.get_all(SEC_FETCH_SITE).iter().any(|site| site != "none" && site != "same-origin") {
        return Err("refused: the request comes from another site (by its header Sec-Fetch-Site)\n");
    }
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    if is_read || headers.get(HEADER).is_some_and(|value| value == "1") {
        Ok(())
    } else {
        Err("refused: a request that changes something needs the header `Sds-Agent-Admin: 1`\n")
    }
}

const OTHER_HOST: &str = "refused: the request is for another host; use localhost, 127.0.0.1 or [::1] in the URL\n";

fn check_host(headers: &HeaderMap, version: Version) -> Result<(), &'static str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        // HTTP/1.0 does not require it, and no browser sends HTTP/1.0.
        (None, _) if version <= Version::HTTP_10 => Ok(()),
        (None, _) => Err("refused: the request has no header Host\n"),
        (Some(_), Some(_)) => Err("refused: the request has more than one header Host\n"),
        (Some(host), None) if host.to_str().is_ok_and(is_this_machine) => Ok(()),
        (Some(_), None) => Err(OTHER_HOST),
    }
}

/// Whether `host`, with any port or none, is a name or an address of loopback. `admin.address` itself is always one.
fn is_this_machine(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            let is_loopback = |address: Ipv6Addr| IpAddr::from(address).to_canonical().is_loopback();
            (address.parse().is_ok_and(is_loopback), port)
        }
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            (name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: Ipv4Addr| address.is_loopback()), port)
        }
    };
    let is_port = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u16>().is_ok();
    name && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GET request with these headers.
    fn checked(headers: &[(&str, &str)]) -> Result<(), &'static str> {
        let request = headers.iter().fold(Request::get("/certs"), |request, (name, value)| request.header(*name, *value));
        check(&request.body(()).unwrap())
    }

    #[test]
    fn only_loopback_is_a_host_whatever_its_port_or_case() {
        for host in [
            "localhost",
            "localhost:15090",
            "LOCALHOST:1",
            "LocalHost",
            "127.0.0.1",
            "127.0.0.1:15190",
            "127.8.9.10:65535",
            "[::1]",
            "[::1]:15090",
            "[0:0:0:0:0:0:0:1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert_eq!(checked(&[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:15090",
            "localhost.evil.example",
            "evil.localhost",
            "localhost@evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1:15090:1",
            "127.0.0.1:x",
            "127.0.0.1:99999",
            "127.0.0.1:+80",
            "127.0.0.1:",
            "128.0.0.1",
            "0.0.0.0",
            "0177.0.0.1",
            "127.1",
            "2130706433",
            "10.0.0.1:15090",
            "::1",
            "[::]",
            "[::1",
            "[::1]x",
            "[::1]:",
            "[fe80::1]",
            "[::ffff:10.0.0.1]",
            "[127.0.0.1]",
            "",
            " localhost",
            "localhost,evil.example",
        ] {
            assert_eq!(checked(&[("host", host)]), Err(OTHER_HOST), "{host}");
        }
    }

    #[test]
    fn a_request_has_one_host_unless_it_is_http_1_0() {
        assert!(checked(&[]).unwrap_err().contains("no header Host"));
        assert!(checked(&[("host", "localhost"), ("host", "localhost")]).unwrap_err().contains("more than one"));
        assert!(checked(&[("host", "localhost"), ("host", "evil.example")]).unwrap_err().contains("more than one"));
        let old = |host: Option<&str>| {
            let request = Request::get("/certs").version(Version::HTTP_10);
            check(&host.into_iter().fold(request, |request, host| request.header("host", host)).body(()).unwrap())
        };
        assert_eq!((old(None), old(Some("evil.example"))), (Ok(()), Err(OTHER_HOST)));
        let request = |uri: &str| check(&Request::get(uri).header("host", "localhost").body(()).unwrap());
        assert_eq!((request("http://127.0.0.1:1/certs"), request("http://evil.example/certs")), (Ok(()), Err(OTHER_HOST)));
    }

    #[test]
    fn a_request_of_a_web_page_is_refused() {
        let host = ("host", "localhost");
        for header in [("origin", "http://evil.example"), ("origin", "http://localhost:15090"), ("origin", "null"), ("origin", "")] {
            assert!(checked(&[host, header]).unwrap_err().contains("Origin"), "{header:?}");
        }
        for site in ["none", "same-origin"] {
            assert_eq!(checked(&[host, ("sec-fetch-site", site)]), Ok(()), "a user has opened the address");
        }
        for site in ["cross-site", "same-site", "", "None"] {
            assert!(checked(&[host, ("sec-fetch-site", site)]).unwrap_err().contains("Sec-Fetch-Site"), "{site}");
        }
        assert!(checked(&[host, ("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")]).is_err());
    }

    #[test]
    fn what_is_not_a_read_needs_the_header() {
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"] {
            let request = |value: Option<&str>| {
                let request = Request::builder().method(method).uri("/reissue").header("host", "localhost");
                check(&value.into_iter().fold(request, |request, value| request.header("Sds-Agent-Admin", value)).body(()).unwrap())
            };
            assert_eq!(request(Some("1")), Ok(()), "{method}");
            for value in [None, Some("0"), Some(""), Some("true")] {
                assert!(request(value).unwrap_err().contains("Sds-Agent-Admin: 1"), "{method} {value:?}");
            }
        }
        let head = Request::head("/certs").header("host", "localhost").body(()).unwrap();
        assert_eq!(check(&head), Ok(()));
    }
}
