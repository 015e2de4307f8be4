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

const EPERM: i32 = 1;
const EACCES: i32 = 13;
/// CAP_SYS_ADMIN among the capabilities of a process.
const SYS_ADMIN: u64 = 1 << 21;

/// What lets a process mount, or keeps it from that though it is root.
#[derive(Debug, Default)]
pub(super) struct Guards {
    may_mount: bool,
    /// The profile that AppArmor enforces.
    apparmor: Option<String>,
    /// The context of SELinux where that is enforced.
    selinux: Option<String>,
}

impl Guards {
    pub(super) fn of_this_process() -> Guards {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Guards::read(
            &read("/proc/self/status"),
            &read("/proc/self/attr/current"),
            &read("/sys/kernel/security/lsm"),
            &read("/sys/fs/selinux/enforce"),
        )
    }

    /// From what the kernel shows. A container often has neither the list of modules nor the switch of SELinux, so the form of the
    /// label decides then.
    fn read(status: &str, label: &str, modules: &str, enforce: &str) -> Guards {
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        let label = label.trim_end_matches(['\0', '\n']);
        let has = |module: &str| {
            modules.trim().is_empty() || modules.trim().split(',').any(|found| found == module)
        };
        let profile = label.strip_suffix(" (enforce)").filter(|_| has("apparmor"));
        let context = Some(label)
            .filter(|label| label.split(':').count() >= 3 && profile.is_none() && has("selinux"))
            .filter(|_| enforce.trim() != "0");
        Guards {
            may_mount: effective.is_none_or(|set| set & SYS_ADMIN != 0),
            apparmor: profile.map(str::to_owned),
            selinux: context.map(str::to_owned),
        }
    }
}

/// Why the kernel does not let this process mount, and what is to be done.
pub(super) fn forbidden(error: &io::Error, guards: &Guards) -> (String, String) {
    let is_access = error.raw_os_error() == Some(EACCES);
    match guards {
        Guards { may_mount: false, .. } => (
            "the kernel does not permit it".into(),
            "mounting needs CAP_SYS_ADMIN: in a container, --cap-add SYS_ADMIN and a profile that allows mount".into(),
        ),
        Guards { apparmor: Some(profile), .. } if is_access => (
            format!("AppArmor does not permit it to the profile {profile}"),
            "allow `mount fstype=fuse.forkvol,` and `umount,` in the profile; in a container, --security-opt apparmor=unconfined".into(),
        ),
        Guards { selinux: Some(context), .. } if is_access => (
            format!("SELinux does not permit it to {context}"),
            "allow what `ausearch -m avc -ts recent` shows; in a container, --security-opt label=disable".into(),
        ),
        _ => (
            "the kernel does not permit it".into(),
            "allow mount(2) in what confines this process: in a container, its seccomp profile (--security-opt seccomp=…)".into(),
        ),
    }
}

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
        (_, Some(EPERM)) => failure.hint(
            "the container's device rules forbid it: --device /dev/fuse, or on Kubernetes a device plugin for it",
        ),
        (io::ErrorKind::PermissionDenied, _)
            if process::euid() == 0 && Guards::of_this_process().selinux.is_some() =>
        {
            failure.hint("SELinux may forbid it: in a container, --device /dev/fuse and --security-opt label=disable")
        }
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
    if words.contains("Permission denied") {
        return failure.hint(
            "AppArmor's profile of fusermount3, or SELinux, may forbid this place: choose a folder below your home, or extend /etc/apparmor.d/local/fusermount3",
        );
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
            ("mount failed: Permission denied", "AppArmor"),
        ] {
            let failure = refusal(Path::new("/m"), words);
            assert!(
                failure.hint.is_some_and(|hint| hint.contains(remedy)),
                "{words}"
            );
        }
    }

    #[test]
    fn who_or_what_forbids_a_mount_is_named_with_what_lets_it() {
        let root = "Name:\tforkvol\nCapEff:\t000001ffffffffff\n";
        let bare = "Name:\tforkvol\nCapEff:\t00000000a80425fb\n";
        let context = "system_u:system_r:container_t:s0:c1,c2\0";
        let profile = "docker-default (enforce)\n";
        for (errno, status, label, modules, enforce, says, remedy) in [
            (
                EPERM,
                bare,
                profile,
                "",
                "",
                "the kernel",
                "--cap-add SYS_ADMIN",
            ),
            (
                EACCES,
                root,
                profile,
                "",
                "",
                "AppArmor does not permit it to the profile docker-default",
                "apparmor=unconfined",
            ),
            (
                EACCES,
                root,
                profile,
                "lockdown,capability,yama,apparmor",
                "",
                "docker-default",
                "fstype=fuse.forkvol",
            ),
            (
                EACCES,
                root,
                context,
                "",
                "",
                "SELinux does not permit it to system_u:system_r:container_t:s0:c1,c2",
                "label=disable",
            ),
            (
                EACCES,
                root,
                context,
                "capability,selinux",
                "1",
                "container_t",
                "ausearch",
            ),
            (
                EACCES,
                root,
                context,
                "capability,selinux",
                "0",
                "the kernel",
                "seccomp",
            ),
            (
                EACCES,
                root,
                "unconfined\n",
                "capability,apparmor",
                "",
                "the kernel",
                "seccomp",
            ),
            (
                EACCES,
                root,
                "docker-default (complain)\n",
                "",
                "",
                "the kernel",
                "seccomp",
            ),
            (EPERM, root, profile, "", "", "the kernel", "seccomp"),
            (EPERM, "", "", "", "", "the kernel", "seccomp"),
        ] {
            let guards = Guards::read(status, label, modules, enforce);
            let (why, hint) = forbidden(&io::Error::from_raw_os_error(errno), &guards);
            assert!(
                why.contains(says) && hint.contains(remedy),
                "{guards:?}: {why}; {hint}"
            );
            assert!(!why.contains('\0') && why.lines().count() == 1, "{why:?}");
        }
    }

    #[test]
    fn a_device_that_cannot_be_opened_has_its_remedy() {
        for (errno, remedy) in [
            (2, "--device /dev/fuse"),
            (1, "device rules"),
            (1, "device plugin"),
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
