//! Opens the HTTP listeners.
//!
//! The kubelet and Prometheus connect to the pod's address, which is IPv4 or IPv6. `[::]` therefore means every IPv6 and IPv4 address,
//! regardless of `net.ipv6.bindv6only`, and every IPv4 address on a node without IPv6. Any other address means only itself.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};
use tokio::net::TcpListener;

/// Connections that the kernel queues until they are accepted, if `net.core.somaxconn` is not lower; its default is the same. The client
/// of a connection that does not fit tries again after 1 s, which is already the time-out of a probe. tokio's listeners queue only 128.
const BACKLOG: i32 = 4096;

/// Listens on `address`. Call it inside the runtime.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = if address.ip() == Ipv6Addr::UNSPECIFIED { both_families(address.port(), open)? } else { open(address)? };
    TcpListener::from_std(listener)
}

/// Opens one listener for every IPv6 and IPv4 address, or for every IPv4 address if the node has no IPv6.
fn both_families<L>(port: u16, open: impl Fn(SocketAddr) -> io::Result<L>) -> io::Result<L> {
    match open((Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if is_without_ipv6(&error) => open((Ipv4Addr::UNSPECIFIED, port).into()),
        opened => opened,
    }
}

/// Whether the error means that the kernel has no IPv6 or has it disabled.
fn is_without_ipv6(error: &io::Error) -> bool {
    let without = [Errno::AFNOSUPPORT, Errno::PROTONOSUPPORT, Errno::ADDRNOTAVAIL, Errno::NOPROTOOPT];
    Errno::from_io_error(error).is_some_and(|errno| without.contains(&errno))
}

/// Opens a non-blocking listener. An IPv6 listener accepts IPv4 connections too.
fn open(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    net::bind(&socket, &address)?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn of(errno: Errno) -> io::Error {
        errno.into()
    }

    #[test]
    fn a_node_without_ipv6_is_served_over_ipv4() {
        let (v6, v4): (SocketAddr, SocketAddr) = ("[::]:15091".parse().unwrap(), "0.0.0.0:15091".parse().unwrap());
        for errno in [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL] {
            let tried = RefCell::default();
            let opened = both_families(15091, |address| {
                Vec::push(&mut tried.borrow_mut(), address);
                if address.is_ipv6() { Err(of(errno)) } else { Ok(address) }
            });
            assert_eq!((opened.unwrap(), tried.into_inner()), (v4, vec![v6, v4]));
        }
        assert_eq!(both_families(15091, Ok).unwrap(), v6);
    }

    #[test]
    fn another_trouble_is_no_reason_to_leave_a_family_out() {
        for errno in [Errno::ADDRINUSE, Errno::ACCESS, Errno::MFILE] {
            let error = both_families(15091, |address| {
                assert!(address.is_ipv6(), "{errno}");
                Err::<(), _>(of(errno))
            });
            assert_eq!(error.unwrap_err().kind(), of(errno).kind());
        }
    }
}
