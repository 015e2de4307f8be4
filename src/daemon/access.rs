//! Who may do what. Identity is what the kernel says of the socket's other end, never a field of a message.

use crate::protocol::{Code, Failure};
use crate::sys::socket::Peer;

/// A private socket is for root and the store's owner; who may open a shared one is said by its mode and group.
pub fn admit(peer: Peer, daemon: u32, shared_socket: bool) -> Result<(), Failure> {
    if shared_socket || is_administrator(peer, daemon) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Policy,
        format!("user {} may not use this store", peer.uid),
    )
    .hint("use a store of your own, or the service"))
}

/// What concerns the whole store is for root and its owner.
pub fn administer(peer: Peer, daemon: u32) -> Result<(), Failure> {
    if is_administrator(peer, daemon) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Policy,
        format!("user {} does not own the store", peer.uid),
    )
    .hint(format!("ask root or user {daemon}")))
}

/// A fork is for who made it, beside root and the store's owner.
pub fn use_fork(peer: Peer, daemon: u32, owner: u32, fork: &str) -> Result<(), Failure> {
    if peer.uid == owner || is_administrator(peer, daemon) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Policy,
        format!("fork {fork} belongs to user {owner}"),
    ))
}

/// Files with a suid bit may only come from a store that root alone may use.
pub fn mount_suid(peer: Peer, daemon: u32, shared_socket: bool) -> Result<(), Failure> {
    if peer.uid == 0 && daemon == 0 && !shared_socket {
        return Ok(());
    }
    Err(Failure::new(
        Code::Policy,
        "--suid and --dev need a store that root alone may use",
    )
    .hint("leave them out, or run as root with a store of root's own"))
}

fn is_administrator(peer: Peer, daemon: u32) -> bool {
    peer.uid == 0 || peer.uid == daemon
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32) -> Peer {
        Peer {
            uid,
            gid: uid,
            pid: 1,
        }
    }

    #[test]
    fn a_private_store_is_for_its_owner_and_root() {
        for (uid, shared, admitted) in [
            (0, false, true),
            (7, false, true),
            (8, false, false),
            (8, true, true),
        ] {
            assert_eq!(
                admit(peer(uid), 7, shared).is_ok(),
                admitted,
                "{uid} {shared}"
            );
        }
        assert!(administer(peer(8), 7).is_err());
        assert!(use_fork(peer(8), 7, 8, "f-a").is_ok());
        assert_eq!(
            use_fork(peer(9), 7, 8, "f-a").unwrap_err().code,
            Code::Policy
        );
    }

    #[test]
    fn suid_is_for_root_alone() {
        for (uid, daemon, shared, allowed) in [
            (0, 0, false, true),
            (0, 0, true, false),
            (0, 7, false, false),
            (7, 7, false, false),
        ] {
            assert_eq!(mount_suid(peer(uid), daemon, shared).is_ok(), allowed);
        }
    }
}
