//! What is to be done where the kernel or fusermount3 does not let a fork be mounted.

use std::io;
use std::path::Path;

use super::ENODEV;
use crate::protocol::{Code, Failure};
use crate::sys::{mount as kernel, process};

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
