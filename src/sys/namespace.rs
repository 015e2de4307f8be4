//! Private mount namespaces for a command, with the rights of root or in a user namespace of its own.
//!
//! The calling process must have a single thread: the kernel refuses otherwise.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use super::{check, mount, process};

/// Moves the calling process into a mount namespace of its own: what it mounts is seen by it and its children alone, and goes
/// when the last of them ends.
pub fn private_mounts() -> io::Result<()> {
    // SAFETY: plain flags.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount::make_slave()
}

/// As [`private_mounts`], by way of a user namespace in which the caller keeps its own user and group.
pub fn private_mounts_in_user_namespace() -> io::Result<()> {
    let (uid, gid) = (process::euid(), process::egid());
    // SAFETY: plain flags.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) })?;
    // Without privileges the kernel takes a map of groups only from a process that has given up setgroups.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    mount::make_slave()
}

/// The mount namespace of a process, or of the caller, by its inode number, as far as the caller may look.
pub fn of_mounts(pid: Option<u32>) -> Option<u64> {
    let whose = pid.map_or_else(|| "self".into(), |pid| pid.to_string());
    let namespace = fs::metadata(format!("/proc/{whose}/ns/mnt"));
    namespace.ok().map(|namespace| namespace.ino())
}

/// Lets the command start in a user and mount namespace of its own, with folders bound over others: (what, over what).
pub fn enter_in_child(command: &mut Command, binds: Vec<(PathBuf, PathBuf)>) -> &mut Command {
    let folder = std::env::current_dir();
    // SAFETY: this process has a single thread, so no lock can be held by another one at the fork, and the child may allocate.
    unsafe {
        command.pre_exec(move || {
            private_mounts_in_user_namespace()?;
            for (from, to) in &binds {
                mount::bind(from, to)?;
            }
            // The working directory may have been covered.
            match &folder {
                Ok(folder) => std::env::set_current_dir(folder),
                Err(_) => Ok(()),
            }
        })
    }
}

/// Returns whether [`private_mounts_in_user_namespace`] would succeed. It is tried in a child: some systems let the namespace be
/// made and take every right in it away, and there is no way back from that.
pub fn user_namespaces_work() -> bool {
    // SAFETY: this process has a single thread, so the child may run any code; it ends by _exit.
    let child = unsafe { libc::fork() };
    match child {
        -1 => false,
        0 => {
            let status = i32::from(private_mounts_in_user_namespace().is_err());
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        pid => {
            let mut status = 0;
            loop {
                // SAFETY: `status` is writable for the length of the call.
                match check(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
                    Ok(_) => return libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return false,
                }
            }
        }
    }
}

/// Returns how user ids here differ from those outside, as /proc/self/uid_map has it; None where every id stands for itself.
pub fn uid_map() -> Option<String> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    other_than_identity(&map)
}

fn other_than_identity(map: &str) -> Option<String> {
    let lines: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let differs = lines.iter().any(|line| line.first() != line.get(1));
    differs.then(|| {
        lines
            .iter()
            .map(|line| line.join(" "))
            .collect::<Vec<_>>()
            .join(", ")
    })
}

/// Returns whether user ids mean the same here as outside: whether this process is in no user namespace that maps them.
pub fn ids_are_identity() -> bool {
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_ids_counts_only_where_an_id_stands_for_another() {
        assert_eq!(
            other_than_identity("         0          0 4294967295\n"),
            None
        );
        assert_eq!(
            other_than_identity("      1000       1000          1\n"),
            None
        );
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(
            other_than_identity(rootless).as_deref(),
            Some("0 1000 1, 1 100000 65536")
        );
    }
}
