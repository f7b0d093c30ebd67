//! A relay of TCP connections, by which a test can cut the connections of one program.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Forwards connections until dropped.
pub struct Relay {
    address: SocketAddr,
    cuts: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Relay {
    /// Forwards to `server`, a host and a port.
    pub async fn to(server: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (cuts, server) = (watch::Sender::new(()), server.to_owned());
        let cut = cuts.subscribe();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server.clone(), cut.clone()));
            }
        });
        Self { address, cuts, task }
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes every open connection; new ones are forwarded.
    pub fn cut(&self) {
        self.cuts.send_replace(());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn carry(mut client: TcpStream, server: String, mut cut: watch::Receiver<()>) {
    cut.mark_unchanged();
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    tokio::select! {
        _ = cut.changed() => {}
        _ = copy_bidirectional(&mut client, &mut server) => {}
    }
}
