//! A client of the agent's admin interface: one GET on a new connection, limited in time and size.

use std::{fmt, io, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use crate::admin::access;

/// Timeout of the whole request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of an answer, 64 MiB. An inventory of 16,000 identities has 10 MB.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// The address of an agent's admin interface: `host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.0)
    }
}

impl std::str::FromStr for Address {
    type Err = &'static str;

    /// Parses `http://host:port`. The scheme and a final slash are optional.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "write http://HOST:PORT, such as http://127.0.0.1:15090; there is no TLS on loopback";
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = authority.rsplit_once(':').ok_or(wrong)?;
        let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]%_".contains(&b));
        if is_host && port.parse::<u16>().is_ok_and(|port| port > 0) { Ok(Self(authority.to_owned())) } else { Err(wrong) }
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Self {
        Self(address.to_string())
    }
}

/// The reason why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No program listens at the address, or it is not reachable.
    #[error("{address} cannot be reached: {cause}")]
    Connect {
        /// The address.
        address: Address,
        /// The error of the kernel.
        cause: io::Error,
    },
    /// The program that listens does not speak HTTP, or ends the connection during the answer.
    #[error("{address} does not answer in HTTP: {cause}")]
    Http {
        /// The address.
        address: Address,
        /// The error of the connection.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer within the timeout.
    #[error("{address} does not answer within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout {
        /// The address.
        address: Address,
    },
}

/// Requests `path` and returns the status and body, including error statuses.
pub async fn get(address: &Address, path: &str) -> Result<(StatusCode, String), Error> {
    let asked = timeout(REQUEST_TIMEOUT, ask(address, path)).await;
    asked.unwrap_or_else(|_| Err(Error::Timeout { address: address.clone() }))
}

async fn ask(address: &Address, path: &str) -> Result<(StatusCode, String), Error> {
    let stream = TcpStream::connect(&address.0).await.map_err(|cause| Error::Connect { address: address.clone(), cause })?;
    let broken = |cause: Box<dyn std::error::Error + Send + Sync>| Error::Http { address: address.clone(), cause };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|cause| broken(cause.into()))?;
    // The agent accepts only names of loopback, also if its port is forwarded to another address.
    let request = Request::get(path).header(header::HOST, "localhost").header(access::HEADER, "1");
    let request = request.body(Empty::<Bytes>::new()).map_err(|cause| broken(cause.into()))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    let driven = async {
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            // The connection may end at the same time as the answer.
            _ = &mut connection => answer.await,
        }
    };
    driven.await.map_err(broken)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for text in ["http://127.0.0.1:15090", "127.0.0.1:15090", "http://[::1]:15090/", "localhost:1"] {
            assert!(text.parse::<Address>().is_ok(), "{text}");
        }
        for text in ["", "127.0.0.1", "https://127.0.0.1:1", "http://127.0.0.1:0", "http://:1", "http://a:1/certs", "a:70000"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        assert_eq!("127.0.0.1:1".parse::<Address>().unwrap().to_string(), "http://127.0.0.1:1");
    }

    #[tokio::test]
    async fn an_answer_and_the_lack_of_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Address::from(listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            for words in ["HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\nconnection: close\r\n\r\nno\n", "SSH-2.0-x\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 512];
                let read = stream.read(&mut asked).await.unwrap();
                assert_eq!(&asked[..read], b"GET /readyz?verbose HTTP/1.1\r\nhost: localhost\r\nsds-agent-admin: 1\r\n\r\n");
                stream.write_all(words.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(get(&address, "/readyz?verbose").await.unwrap(), (StatusCode::SERVICE_UNAVAILABLE, "no\n".to_owned()));
        assert!(matches!(get(&address, "/readyz?verbose").await, Err(Error::Http { .. })));
        server.await.unwrap();
        let gone = get(&address, "/livez").await.unwrap_err();
        assert!(gone.to_string().starts_with(&format!("{address} cannot be reached: ")), "{gone}");
    }
}
