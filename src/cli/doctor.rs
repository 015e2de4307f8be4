//! `doctor`: what of the machine and the set-up stands in the way, each finding with its remedy.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::Context;
use super::client::{Client, ends_with_its_cgroup};
use super::mounting;
use super::output::{self, warn};
use super::place::Place;
use crate::engine::Engine;
use crate::protocol::{Code, Failure, VERSION};
use crate::sys::mount as kernel;
use crate::sys::namespace;
use crate::sys::process;
use crate::sys::{FsKind, fs_kind, room};

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grade {
    Ok,
    Warning,
    Error,
}

struct Finding {
    what: &'static str,
    grade: Grade,
    message: String,
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, message: impl Into<String>) -> Finding {
        Finding {
            what,
            grade: Grade::Ok,
            message: message.into(),
            remedy: None,
        }
    }

    fn warning(
        what: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding {
            what,
            grade: Grade::Warning,
            message: message.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn error(what: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding {
            what,
            grade: Grade::Error,
            message: message.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn document(&self) -> Value {
        let grade = match self.grade {
            Grade::Ok => "ok",
            Grade::Warning => "warning",
            Grade::Error => "error",
        };
        json!({"what": self.what, "grade": grade, "message": self.message, "remedy": self.remedy})
    }
}

pub fn doctor(context: &Context, fix: Option<Option<String>>) -> Result<(), Failure> {
    if let Some(what) = fix {
        mend(context, what.as_deref())?;
    }
    let findings = examine(context);
    let documents: Vec<Value> = findings.iter().map(Finding::document).collect();
    let document =
        json!({"version": VERSION, "store": context.place.to_string(), "findings": documents});
    output::show(context.json, &document, |_| {
        findings.iter().map(line).collect()
    })?;
    let errors = findings.iter().filter(|f| f.grade == Grade::Error).count();
    match errors {
        0 => Ok(()),
        n => Err(Failure::new(Code::Failed, standing(n))),
    }
}

fn standing(errors: usize) -> String {
    match errors {
        1 => "1 finding stands in the way".into(),
        n => format!("{n} findings stand in the way"),
    }
}

fn line(finding: &Finding) -> String {
    let mark = match finding.grade {
        Grade::Ok => "ok",
        Grade::Warning => "warning",
        Grade::Error => "error",
    };
    let remedy = finding
        .remedy
        .as_ref()
        .map_or_else(String::new, |r| format!("\n          {r}"));
    format!("{mark:8}  {}: {}{remedy}\n", finding.what, finding.message)
}

fn examine(context: &Context) -> Vec<Finding> {
    let mut findings = vec![kernel_version(), device()];
    findings.extend(helper());
    findings.push(namespaces());
    findings.push(store(context));
    findings.extend(space(context));
    findings.push(daemon(context));
    findings.extend(cgroup(context));
    findings.extend(dead_mounts());
    findings.push(ids());
    findings.push(trust(context));
    findings.extend(idle_cores());
    findings
}

const CPUIDLE: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
const HALT_POLL: &str = "/sys/module/haltpoll/parameters/guest_halt_poll_ns";
/// The kernel's own default.
const HALT_POLL_NS: &str = "200000";

/// Whether the cores of a virtual machine poll for a while before they halt: waking a halted one is most of the price of a request.
fn idle_cores() -> Option<Finding> {
    let read = |path: &str| {
        fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
    };
    let is_guest = read("/proc/cpuinfo").is_some_and(|text| text.contains(" hypervisor"));
    idle_cores_of(
        is_guest,
        read(CPUIDLE).as_deref(),
        read(HALT_POLL).as_deref(),
    )
}

fn idle_cores_of(is_guest: bool, driver: Option<&str>, polls: Option<&str>) -> Option<Finding> {
    let what = "idle cores";
    match (driver, polls) {
        _ if !is_guest => None,
        (Some("haltpoll"), Some("0")) => Some(Finding::warning(
            what,
            "they halt at once, and waking one makes each request up to three times as dear",
            "forkvol doctor --fix=halt-polling (root; until the next boot), or leave it to `wakeful`",
        )),
        (Some("haltpoll"), Some(ns)) => Some(Finding::ok(
            what,
            format!("they poll for {ns} ns before they halt"),
        )),
        _ => Some(Finding::warning(
            what,
            "this virtual machine has no driver that polls before a core halts, which makes each request dearer",
            "modprobe cpuidle-haltpoll force=Y (root), or leave it to `wakeful`",
        )),
    }
}

fn trust(context: &Context) -> Finding {
    let message = match context.config.trust() {
        Some(policy) => format!(
            "jobs are judged; untrusted ones commit {}",
            if policy.scopes {
                "to volumes of their own"
            } else {
                "nothing"
            }
        ),
        None => "off: what any job of this store commits, the next one reads".into(),
    };
    Finding::ok("trust", message)
}

fn kernel_version() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|n| n.parse::<u32>().ok());
    match (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) {
        at if at < (5, 11) => Finding::error(
            "kernel",
            format!("{release} is too old"),
            "use 5.11 or newer",
        ),
        at if at < (6, 16) => Finding::warning(
            "kernel",
            format!("{release}: what a program has mapped and not synced may miss a commit"),
            "end such programs with msync, or use 6.16 or newer",
        ),
        _ => Finding::ok("kernel", release),
    }
}

fn device() -> Finding {
    match kernel::open_fuse() {
        Ok(_) => Finding::ok("fuse", format!("{} can be opened", kernel::FUSE_DEVICE)),
        Err(e) => {
            let failure = mounting::explain_device(&e);
            Finding::error("fuse", failure.message, failure.hint.unwrap_or_default())
        }
    }
}

/// fusermount3 and its rules concern ordinary users alone.
fn helper() -> Vec<Finding> {
    if process::euid() == 0 {
        return Vec::new();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("fusermount3"))
        .find(|p| p.is_file());
    let Some(found) = found else {
        return vec![Finding::error(
            "fusermount3",
            "it is not installed",
            "install the package fuse3",
        )];
    };
    let setuid =
        fs::metadata(&found).is_ok_and(|m| m.permissions().mode() & 0o4000 != 0 && m.uid() == 0);
    let mut findings = vec![match setuid {
        true => Finding::ok("fusermount3", found.display().to_string()),
        false => Finding::warning(
            "fusermount3",
            format!("{} is not setuid root", found.display()),
            format!("chown root {0} && chmod u+s {0}", found.display()),
        ),
    }];
    if !mounting::user_allow_other() {
        findings.push(Finding::warning(
            "user_allow_other",
            "other users, and root, cannot enter your forks",
            "put the line user_allow_other into /etc/fuse.conf",
        ));
    }
    findings
}

fn namespaces() -> Finding {
    if process::euid() == 0 {
        return Finding::ok("namespaces", "root may make them");
    }
    match namespace::user_namespaces_work() {
        true => Finding::ok("namespaces", "user namespaces work"),
        false => Finding::warning(
            "namespaces",
            "run cannot give commands a private view of their paths",
            "permit user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile",
        ),
    }
}

fn store(context: &Context) -> Finding {
    let Place::Embedded { store, .. } = &context.place else {
        return Finding::ok("store", context.place.to_string());
    };
    let existing = store
        .ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/"));
    // A lock that is not there yet would belong to who looks.
    if store.join("lock").exists()
        && let Err(error) = Engine::recognise(store)
    {
        let remedy =
            "put back what is missing, or name another store with --store or FORKVOL_STORE";
        return Finding::error("store", error.message, error.hint.unwrap_or(remedy.into()));
    }
    let text = context.place.to_string();
    let elsewhere = "choose a folder on a local disk with --store or FORKVOL_STORE";
    match fs_kind(existing) {
        Ok(kind) if kind.is_unsafe() => Finding::error(
            "store",
            format!("{text} lies on {kind}, where it is not safe"),
            elsewhere,
        ),
        Ok(FsKind::Overlay) => Finding::warning(
            "store",
            format!("{text} lies on an overlay and goes with its container"),
            "put it on a volume of the host",
        ),
        Ok(FsKind::Tmpfs) => Finding::warning(
            "store",
            format!("{text} lies in memory and does not survive a reboot"),
            elsewhere,
        ),
        Ok(_) => match fs::metadata(store) {
            Ok(metadata) if metadata.mode() & 0o077 != 0 => Finding::warning(
                "store",
                format!("{text} is open to other users"),
                format!(
                    "chmod 0700 {}, or forkvol doctor --fix=store",
                    store.display()
                ),
            ),
            _ => Finding::ok("store", text),
        },
        Err(e) => Finding::error("store", format!("{text}: {e}"), elsewhere),
    }
}

fn space(context: &Context) -> Option<Finding> {
    let Place::Embedded { store, .. } = &context.place else {
        return None;
    };
    let room = room(store.ancestors().find(|dir| dir.is_dir())?).ok()?;
    let reserve = context
        .config
        .reserve()
        .unwrap_or((room.total / 50).max(1 << 30));
    let free = output::size(room.available);
    Some(match room.available > reserve {
        true => Finding::ok("space", format!("{free} free")),
        false => Finding::error(
            "space",
            format!(
                "{free} free, of which {} are kept in reserve",
                output::size(reserve)
            ),
            "free some room, or run forkvol gc",
        ),
    })
}

fn daemon(context: &Context) -> Finding {
    match Client::connect(&context.place)
        .and_then(|client| client.map(|mut c| c.status()).transpose())
    {
        Ok(Some(status)) if status.version != VERSION => Finding::warning(
            "daemon",
            format!(
                "pid {} is forkvol {}, this is {VERSION}",
                status.pid, status.version
            ),
            "it is replaced when its forks have ended",
        ),
        Ok(Some(status)) => Finding::ok(
            "daemon",
            format!("pid {} with {} live forks", status.pid, status.forks),
        ),
        Ok(None) => Finding::ok("daemon", "not running; it is started when needed"),
        Err(failure) => Finding::error(
            "daemon",
            failure.message,
            failure.hint.unwrap_or_else(|| "see its log".into()),
        ),
    }
}

/// An embedded daemon that a job starts ends with the job's cgroup where systemd cannot give it another.
fn cgroup(context: &Context) -> Option<Finding> {
    if context.place == Place::Service || Path::new("/run/systemd/system").exists() {
        return None;
    }
    if !ends_with_its_cgroup() {
        return None;
    }
    Some(Finding::warning(
        "cgroup",
        "a daemon started from here ends with this container or job, and its live forks with it",
        "run forkvol daemon run as a service outside, and pass its socket in",
    ))
}

/// Mounts whose daemon is gone.
fn dead_mounts() -> Vec<Finding> {
    let mounts = kernel::mounts().unwrap_or_default();
    mounts
        .iter()
        .filter(|m| m.kind == kernel::FS_TYPE && is_dead(&m.path))
        .map(|m| {
            let path = m.path.display();
            Finding::warning(
                "mount",
                format!("{path} has lost its daemon"),
                format!("umount -l {path}, or forkvol doctor --fix=mounts"),
            )
        })
        .collect()
}

fn is_dead(path: &Path) -> bool {
    fs::metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotConnected)
}

fn ids() -> Finding {
    match namespace::ids_are_identity() {
        true => Finding::ok("ids", "user ids mean the same here as outside"),
        false => Finding::warning(
            "ids",
            "this user namespace maps user ids, and forks store them as they are in here",
            "write a volume from one kind of namespace only",
        ),
    }
}

/// Mends what needs no change of the kernel.
fn mend(context: &Context, what: Option<&str>) -> Result<(), Failure> {
    if let Some(unknown) = what.filter(|w| !matches!(*w, "store" | "mounts" | "halt-polling")) {
        return Err(Failure::new(
            Code::Usage,
            format!("there is nothing to fix called {unknown}"),
        )
        .hint("store, mounts or halt-polling"));
    }
    // The kernel is changed only where that was asked for by name.
    if what == Some("halt-polling") {
        return fs::write(HALT_POLL, HALT_POLL_NS).map_err(|e| {
            Failure::new(Code::Failed, format!("cannot set {HALT_POLL}: {e}"))
                .hint("run it as root, on a machine whose cpuidle driver is haltpoll")
        });
    }
    let wanted = |name: &str| what.is_none_or(|w| w == name);
    if wanted("store")
        && let Place::Embedded { store, .. } = &context.place
        && store.is_dir()
    {
        fs::set_permissions(store, fs::Permissions::from_mode(0o700)).map_err(|e| {
            Failure::new(
                Code::Failed,
                format!("cannot close {} to others: {e}", store.display()),
            )
        })?;
    }
    if wanted("mounts") {
        for mount in kernel::mounts().unwrap_or_default() {
            if mount.kind != kernel::FS_TYPE || !is_dead(&mount.path) {
                continue;
            }
            let user = process::euid();
            match owner(&mount.super_options) {
                Some(owner) if user != 0 && owner != user => warn(&format!(
                    "{} is not yours but user {owner}'s: root unmounts it, or that user",
                    mount.path.display()
                )),
                _ => unmount_dead(&mount.path)?,
            }
        }
    }
    Ok(())
}

/// Who has mounted a fork, by the options that the kernel shows of it.
fn owner(options: &str) -> Option<u32> {
    let mut options = options.split(',');
    options.find_map(|option| option.strip_prefix("user_id=")?.parse().ok())
}

fn unmount_dead(path: &Path) -> Result<(), Failure> {
    let failed = |why: String| {
        Failure::new(
            Code::Failed,
            format!("cannot unmount {}: {why}", path.display()),
        )
    };
    if process::euid() == 0 {
        return kernel::detach_abort(path).map_err(|e| failed(e.to_string()));
    }
    let mut command = Command::new("fusermount3");
    command.args(["-u", "-z", "--"]).arg(path);
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            Err(failed(
                words.lines().next().unwrap_or("fusermount3 refused").into(),
            ))
        }
        Err(e) => Err(failed(format!("fusermount3: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_finding_is_one() {
        assert_eq!(standing(1), "1 finding stands in the way");
        assert_eq!(standing(2), "2 findings stand in the way");
    }

    #[test]
    fn whose_a_mount_is_stands_in_its_options() {
        assert_eq!(
            owner("rw,user_id=1000,group_id=7,default_permissions"),
            Some(1000)
        );
        assert_eq!(owner("rw,group_id=7"), None);
    }

    #[test]
    fn cores_that_halt_at_once_are_found_in_virtual_machines_alone() {
        let grade = |guest, driver, polls| {
            idle_cores_of(guest, driver, polls).map(|finding| finding.grade == Grade::Warning)
        };
        assert_eq!(grade(false, Some("intel_idle"), None), None);
        assert_eq!(grade(true, Some("haltpoll"), Some("0")), Some(true));
        assert_eq!(grade(true, Some("haltpoll"), Some("200000")), Some(false));
        assert_eq!(grade(true, Some("none"), None), Some(true));
    }
}
