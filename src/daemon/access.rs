//! Who may do what. Identity is what the kernel says of the socket's other end, never a field of a message.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};

use crate::engine::{Asker, JobFacts, TrustPolicy};
use crate::protocol::{Code, Failure};
use crate::sys::process;
use crate::sys::socket::{self, Peer};

/// Who is at the other end of a connection.
pub struct Who {
    pub peer: Peer,
    /// The user that the daemon runs as.
    daemon: u32,
    /// A process in a container may have the uid of anybody: it has the rights of a job.
    is_local: bool,
    /// Lives as long as the connection.
    connected: Arc<()>,
}

impl Who {
    pub fn of(stream: &UnixStream, daemon: u32) -> std::io::Result<Who> {
        let peer = socket::peer(stream)?;
        // Looked at once, at the beginning: later its number may be another's. What has ended by then is nobody that is known.
        let is_local = match socket::peer_process(stream) {
            Ok(process) => {
                process::shares_pid_namespace(peer.pid, process.as_ref().map(AsFd::as_fd))
            }
            Err(_) => false,
        };
        Ok(Who {
            peer,
            daemon,
            is_local,
            connected: Arc::default(),
        })
    }

    /// Lives for as long as this client may still come with a request.
    pub fn connected(&self) -> Weak<()> {
        Arc::downgrade(&self.connected)
    }

    fn owns_the_store(&self) -> bool {
        self.peer.uid == 0 || self.peer.uid == self.daemon
    }

    /// A private socket is for root and the store's owner; who may open a shared one is said by its mode and group.
    pub fn admit(&self, shared_socket: bool) -> Result<(), Failure> {
        if shared_socket || self.owns_the_store() {
            return Ok(());
        }
        Err(Failure::new(
            Code::Policy,
            format!("user {} may not use this store", self.peer.uid),
        )
        .hint("use a store of your own, or the service"))
    }

    /// What concerns the whole store is for root and its owner.
    pub fn administer(&self) -> Result<(), Failure> {
        if !self.owns_the_store() {
            return Err(Failure::new(
                Code::Policy,
                format!("user {} does not own the store", self.peer.uid),
            )
            .hint(format!("ask root or user {}", self.daemon)));
        }
        if !self.is_local {
            return Err(Failure::new(
                Code::Policy,
                "from inside a container only forks can be made and ended",
            )
            .hint("run it where the daemon runs"));
        }
        Ok(())
    }

    /// A fork is for who made it, beside root and the store's owner. From inside a container nobody is either, whatever his uid, and
    /// nobody has made a fork that commits to a trusted volume.
    pub fn use_fork(&self, owner: u32, is_trusted: bool, fork: &str) -> Result<(), Failure> {
        let why = match self.is_local {
            true if self.peer.uid == owner || self.owns_the_store() => return Ok(()),
            false if self.peer.uid == owner && !is_trusted => return Ok(()),
            false if self.peer.uid == owner => {
                format!("fork {fork} is a trusted job's, which is none from inside a container")
            }
            _ => format!("fork {fork} belongs to user {owner}"),
        };
        Err(Failure::new(Code::Policy, why))
    }

    /// Files with a suid bit may only come from a store that root alone may use.
    pub fn mount_suid(&self, shared_socket: bool) -> Result<(), Failure> {
        if self.peer.uid == 0 && self.daemon == 0 && !shared_socket {
            return Ok(());
        }
        Err(Failure::new(
            Code::Policy,
            "--suid and --dev need a store that root alone may use",
        )
        .hint("leave them out, or run as root with a store of root's own"))
    }

    /// Who asks, as far as trust is concerned. What is said of a job counts only where an agent says it.
    pub fn asker(&self, policy: &TrustPolicy, said: Option<JobFacts>) -> Asker {
        if !self.is_local {
            return Asker::User(self.peer.uid);
        }
        let believed = self.owns_the_store() || policy.agents.contains(&self.peer.uid);
        match said {
            Some(facts) if believed => Asker::Agent(facts),
            _ if self.owns_the_store() => Asker::Administrator,
            None if believed => Asker::Agent(JobFacts::default()),
            _ => Asker::User(self.peer.uid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(uid: u32, daemon: u32) -> Who {
        let peer = Peer {
            uid,
            gid: uid,
            pid: std::process::id().cast_signed(),
        };
        Who {
            peer,
            daemon,
            is_local: true,
            connected: Arc::default(),
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
            let who = who(uid, 7);
            assert_eq!(who.admit(shared).is_ok(), admitted, "{uid} {shared}");
        }
        assert!(who(8, 7).administer().is_err());
        assert!(who(7, 7).administer().is_ok());
    }

    #[test]
    fn a_fork_is_for_who_made_it_and_from_a_container_for_nobody_else() {
        for (uid, is_local, owner, is_trusted, allowed) in [
            (8, true, 8, true, true),
            (9, true, 8, false, false),
            (0, true, 8, true, true),
            (7, true, 8, true, true),
            (0, false, 8, false, false),
            (7, false, 8, false, false),
            (0, false, 0, false, true),
            (0, false, 0, true, false),
        ] {
            let mut who = who(uid, 7);
            who.is_local = is_local;
            let used = who.use_fork(owner, is_trusted, "f-a");
            assert_eq!(
                used.is_ok(),
                allowed,
                "{uid} {is_local} {owner} {is_trusted}"
            );
        }
    }

    #[test]
    fn suid_is_for_root_alone() {
        for (uid, daemon, shared, allowed) in [
            (0, 0, false, true),
            (0, 0, true, false),
            (0, 7, false, false),
            (7, 7, false, false),
        ] {
            assert_eq!(who(uid, daemon).mount_suid(shared).is_ok(), allowed);
        }
    }

    #[test]
    fn who_is_not_seen_in_the_own_pid_namespace_has_the_rights_of_a_job() {
        let mut who = who(0, 0);
        who.is_local = false;
        let failure = who.administer().unwrap_err();
        assert!(failure.message.contains("container"), "{failure}");
        let policy = TrustPolicy::default();
        assert_eq!(who.asker(&policy, None), Asker::User(0));
        let said = Some(JobFacts {
            foreign: Some(false),
            protected: Some(true),
        });
        assert_eq!(who.asker(&policy, said), Asker::User(0));
    }

    #[test]
    fn only_agents_are_believed() {
        let mut policy = TrustPolicy::default();
        policy.agents = vec![8];
        let facts = JobFacts {
            foreign: Some(false),
            protected: None,
        };
        for (uid, said, asker) in [
            (7, None, Asker::Administrator),
            (7, Some(facts), Asker::Agent(facts)),
            (8, Some(facts), Asker::Agent(facts)),
            (8, None, Asker::Agent(JobFacts::default())),
            (9, Some(facts), Asker::User(9)),
            (9, None, Asker::User(9)),
        ] {
            assert_eq!(who(uid, 7).asker(&policy, said), asker, "{uid}");
        }
    }
}
