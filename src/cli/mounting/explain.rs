//! What is to be done where the kernel or fusermount3 does not let a fork be mounted.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::ENODEV;
use crate::protocol::{Code, Failure};
use crate::sys::mount::{self as kernel, MountPoint};
use crate::sys::{process, socket};

/// Says what is to be done where the FUSE device cannot be opened.
pub fn device(error: &io::Error) -> Failure {
    let failure = Failure::new(
        Code::Failed,
        format!("cannot open {}: {error}", kernel::FUSE_DEVICE),
    );
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotFound, _) => failure.hint(
            "modprobe fuse; in a container, --device /dev/fuse, or on Kubernetes a device plugin for it",
        ),
        // EPERM comes from a container's device rules, EACCES from the mode of the node.
        (_, Some(1)) => failure.hint(
            "the container's device rules forbid it: --device /dev/fuse, or on Kubernetes a device plugin for it",
        ),
        // Root comes past every mode but the one of another user namespace.
        (io::ErrorKind::PermissionDenied, _) if process::euid() == 0 => failure.hint(
            "its mode, or a mount without devices (nodev), forbids it: in a container, --device /dev/fuse",
        ),
        (io::ErrorKind::PermissionDenied, _) => {
            failure.hint(format!("chmod 0666 {}, or run as root", kernel::FUSE_DEVICE))
        }
        (_, Some(ENODEV) | Some(6)) => failure.hint("modprobe fuse"),
        _ => failure,
    }
}

/// Says which of these paths containers will not have: an engine outside of this mount namespace binds what is there for it.
pub fn hidden_from_engine(paths: &[PathBuf]) -> Option<String> {
    let engine = engine_socket()?;
    if !is_apart(&engine) {
        return None;
    }
    let mounts = kernel::mounts().ok()?;
    let around = |path: &Path| {
        let holds = |m: &&MountPoint| m.kind != kernel::FS_TYPE && path.starts_with(&m.path);
        mounts
            .iter()
            .filter(holds)
            .max_by_key(|m| m.path.as_os_str().len())
    };
    let hidden = |path: &&PathBuf| around(path).is_some_and(|mount| mount.peers.is_none());
    let hidden: Vec<String> = paths
        .iter()
        .filter(hidden)
        .map(|p| p.display().to_string())
        .collect();
    (!hidden.is_empty()).then(|| {
        format!(
            "containers started through {} will not see {}: this is another mount namespace than the engine's; bind the folder above it rshared, or attach outside",
            engine.display(),
            hidden.join(", ")
        )
    })
}

/// The socket of a container engine, if one is in reach.
fn engine_socket() -> Option<PathBuf> {
    let named = std::env::var("DOCKER_HOST").unwrap_or_default();
    let known = [
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/podman/podman.sock",
    ];
    let paths = named.strip_prefix("unix://").into_iter().chain(known);
    let is_socket = |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.file_type().is_socket());
    paths.map(PathBuf::from).find(is_socket)
}

/// Whether an engine sees other mounts than this process, as far as it can be told.
fn is_apart(engine: &Path) -> bool {
    let Ok(listens) = UnixStream::connect(engine).and_then(|stream| socket::peer(&stream)) else {
        return false;
    };
    let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    match listens.pid {
        // It is outside of this container.
        0 => true,
        pid => {
            let theirs = mounts(&pid.to_string());
            theirs
                .zip(mounts("self"))
                .is_some_and(|(theirs, own)| theirs != own)
        }
    }
}

pub(super) fn refusal(at: &Path, words: &str) -> Failure {
    let failure = Failure::new(
        Code::Failed,
        format!("cannot mount on {}: fusermount3: {words}", at.display()),
    );
    if words.contains("mount_max") || words.contains("too many FUSE filesystems") {
        return failure.hint("raise mount_max in /etc/fuse.conf, or end forks: forkvol forks");
    }
    if words.contains("/dev/fuse") && words.contains("Permission denied") {
        return failure.hint(format!("chmod 0666 {}", kernel::FUSE_DEVICE));
    }
    if words.contains("/dev/fuse") || words.contains("fuse device") {
        return failure.hint("modprobe fuse; in a container, --device /dev/fuse");
    }
    if words.contains("no write access to mountpoint") {
        return failure.hint("choose a folder of your own");
    }
    if words.contains("determine username") {
        return failure.hint("this user id has no name in /etc/passwd, which fusermount3 needs");
    }
    if words.contains("user_allow_other") {
        return failure.hint("set user_allow_other in /etc/fuse.conf");
    }
    if words.contains("Operation not permitted") {
        return failure.hint(
            "fusermount3 must be setuid root and may not run under no_new_privs; or use forkvol run",
        );
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_is_explained() {
        for (words, remedy) in [
            (
                "too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf",
                "mount_max",
            ),
            (
                "option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
                "user_allow_other",
            ),
            (
                "user has no write access to mountpoint /m",
                "a folder of your own",
            ),
            ("could not determine username", "/etc/passwd"),
            ("failed to open /dev/fuse: Permission denied", "chmod 0666"),
            ("mount failed: Operation not permitted", "setuid"),
        ] {
            let failure = refusal(Path::new("/m"), words);
            assert!(
                failure.hint.is_some_and(|hint| hint.contains(remedy)),
                "{words}"
            );
        }
    }

    #[test]
    fn a_device_that_cannot_be_opened_has_its_remedy() {
        for (errno, remedy) in [
            (2, "--device /dev/fuse"),
            (1, "device rules"),
            (19, "modprobe"),
            (6, "modprobe"),
        ] {
            let failure = device(&io::Error::from_raw_os_error(errno));
            assert!(
                failure.hint.is_some_and(|hint| hint.contains(remedy)),
                "{errno}"
            );
        }
    }
}
