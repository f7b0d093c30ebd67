//! HTTP/1.1 over TCP with one connection per request, for probes, an admin interface and load.

use std::net::SocketAddr;

use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A response with any status.
pub struct Response {
    pub status: StatusCode,
    pub body: String,
}

/// Sends one GET request. The error is a sentence.
pub async fn get(from: SocketAddr, path: &str) -> Result<Response, String> {
    ask(Method::GET, from, path).await
}

/// Sends one POST request without a body, with the header that the admin address requires.
pub async fn post(to: SocketAddr, path: &str) -> Result<Response, String> {
    ask(Method::POST, to, path).await
}

async fn ask(method: Method, from: SocketAddr, path: &str) -> Result<Response, String> {
    let stream = TcpStream::connect(from).await.map_err(|e| format!("connect to {from}: {e}"))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| format!("HTTP with {from}: {e}"))?;
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(&method).uri(path).header("host", "localhost").header("sds-agent-admin", "1");
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok::<_, hyper::Error>(Response { status, body: String::from_utf8_lossy(&body).into_owned() })
    };
    let answer = answer.await.map_err(|e| format!("{method} {from}{path}: {e}"));
    connection.abort();
    answer
}

/// Sends one GET request; any status but 200 is an error.
pub async fn get_ok(from: SocketAddr, path: &str) -> Result<String, String> {
    let response = get(from, path).await?;
    if response.status == StatusCode::OK {
        Ok(response.body)
    } else {
        Err(format!("GET {from}{path}: {} {}", response.status, response.body.trim()))
    }
}
